"""Undoing merges: who has what before and after, whatever happens in between."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any, Callable, Mapping

import pytest

from merge_contacts import Contact, Pair, lost_in_undo, plan_fields, plan_restore
from tests.fake.world import Quota
from tests.simulation.expected import Ids
from tests.simulation.scene import FILES, Run, Scene

PEOPLE = ("owned_by", "reported_by", "members")
PERSON1, PERSON2, PERSON3 = (f"person{n}@example.com" for n in (1, 2, 3))


def seeded(scene: Scene, count: int = 2) -> list[Ids]:
    """Pairs that share tickets and talks with each other and agents, with fields of their own."""
    organisation = scene.organisation
    agent = organisation.dev_user["id"]
    pairs = []
    for n in range(1, count + 1):
        mine = {"rev_org": f"ORG{n % 2}", "full_name": f"Person {n}"}
        email = f"person{n}@example.com"
        primary = organisation.add_contact(f"P{n}", email, display_name=f"Person {n}", **mine)
        mine["display_name"] = f"P. {n}"
        more = {"description": f"Of {n}.", "phone_numbers": [f"+4930123456{n}"]}
        duplicate = organisation.add_contact(f"D{n}", email, f"user_{n}", **mine, **more)
        for people in ([duplicate], [primary], [primary, duplicate], [duplicate, agent]):
            kind = "issue" if n % 2 else "ticket"
            organisation.add_work(owned_by=people, reported_by=people, comments=1, kind=kind)
            organisation.add_work(reported_by=people, created_by=people[0])
            organisation.add_conversation([*people, agent], comments=1)
        organisation.add_work(owned_by=[agent], reported_by=[agent, duplicate])
        pairs.append((primary, duplicate))
    return pairs


def with_a_third(scene: Scene, count: int = 1) -> list[Ids]:
    """The first person has a third contact, which shares a ticket with both others."""
    pairs = seeded(scene, count)
    organisation = scene.organisation
    third = organisation.add_contact("E1", PERSON1, rev_org="ORG1")
    organisation.add_work(reported_by=[third, pairs[0][1]])
    organisation.add_work(reported_by=[third], owned_by=[third, organisation.dev_user["id"]])
    organisation.add_conversation([third, pairs[0][0]])
    return [*pairs, (pairs[0][0], third)]


def truth(scene: Scene, names: Mapping[str, str] = {}) -> dict[str, Any]:
    """Who has which role on what, and what each contact has; contacts go by `names`, if any."""
    devrev = scene.organisation
    people = {}
    for thing in (*devrev.works.values(), *devrev.conversations.values()):
        for role in PEOPLE:
            ids = {one["id"] for one in thing.get(role, ())}
            people[thing["id"], role] = {names.get(one, one) for one in ids}
    users = {}
    fields = ("display_name", "email", "external_ref", "description", "phone_numbers", "rev_org")
    for identity, user in devrev.contacts.items():
        if devrev.alive(identity):
            users[names.get(identity, identity)] = {name: user.get(name) for name in fields}
    return {"people": people, "users": users}


def merged(scene: Scene, *options: str) -> dict[str, Any]:
    """Merge all, and return the truth before."""
    before = truth(scene)
    scene.merge(*options)
    return before


def names_after(*runs: Run) -> dict[str, str]:
    entries = [entry for run in runs for entry in run.report["undone"]]
    return {one["contact"]["id"]: one["duplicate"]["id"] for one in entries}


def assert_undone(scene: Scene, before: dict[str, Any], run: Run) -> None:
    """All is as it was but for the ids; nobody was made twice."""
    assert run.code == 0 and truth(scene, names_after(run)) == before


def writes(run: Run) -> list[str]:
    """What an undo has sent but reads; what sets nobody only tries whether the token may."""
    found = []
    for request in run.requests:
        verb = request.endpoint.rpartition(".")[2]
        if verb == "create" or (verb == "update" and len(request.body) > 2):
            found.append(request.endpoint)
    return found


def people(obj: Mapping[str, Any], role: str) -> list[str]:
    return [one["id"] for one in obj[role]]


def is_write(body: dict[str, Any]) -> bool:
    return any(role in body for role in PEOPLE)


def moves_reference(body: dict[str, Any]) -> bool:
    return "external_ref" in body


def reports() -> list[Path]:
    return sorted(Path("reports").glob("merge_report_*.json"))


def backup_of(run: Run, email: str = PERSON1) -> Path:
    entries = run.report["successful_merges"]
    return Path(next(one["backup"] for one in entries if one["email"] == email))


# -- what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["404", "301", "state", "primary", "shadow", "unassigned", "410"])
def test_all_is_as_before_and_a_second_undo_does_nothing(scene: Scene, gone: str) -> None:
    with_a_third(scene, 2)
    scene.world.gone = gone
    before = merged(scene)
    run = scene.undo()
    assert_undone(scene, before, run)
    assert run.count("rev-users.create") == run.report["summary"]["undone"] == 3
    for entry in run.report["undone"]:
        lost = {item["what"] for item in entry["not_restored"]}
        assert {"id", "created_date", "created_by", "authors of comments"} <= lost
        assert entry["restored"] and not entry["left"] and entry["pinned"]
        assert entry["contact"]["external_ref"] == entry["duplicate"]["old_external_ref"]
    again = scene.undo()
    assert not writes(again) and again.report["summary"]["undone_before"] == 3


def test_each_field_that_devrev_lets_be_set_comes_back(scene: Scene) -> None:
    primary, duplicate = seeded(scene, 1)[0]
    picture = {"id": "don:core:dvrv-us-1:devo/SANDBOX1:artifact/7", "display_id": "ARTIFACT-7"}
    fields = {"display_picture": picture, "custom_fields": {"tnt__plan": "gold"}}
    scene.organisation.change(scene.organisation.contacts[duplicate], **fields)
    scene.merge()
    run = scene.undo()
    (create,) = (one.body for one in run.requests if one.endpoint == "rev-users.create")
    assert create == {
        "display_name": "P. 1", "email": PERSON1, "external_ref": "user_1", "description": "Of 1.",
        "phone_numbers": ["+49301234561"], "display_picture": picture["id"],
        "rev_org": scene.organisation.contacts[primary]["rev_org"]["id"],
    }  # fmt: skip
    lost = {item["what"]: item["value"] for item in run.report["undone"][0]["not_restored"]}
    assert lost["full_name"] == "Person 1" and lost["custom_fields"] == {"tnt__plan": "gold"}


def test_an_unverified_contact_is_verified_when_it_is_created_again() -> None:
    lost = lost_in_undo({"works": {"created": []}}, {"email": "a@x.com", "is_verified": False}, {})
    assert [item["what"] for item in lost] == ["verification", "authors of comments"]


def test_live_data_wins(scene: Scene) -> None:
    """New tickets stay, what was given to others or deleted is named, who joined stays."""
    pairs = seeded(scene)
    devrev = scene.organisation
    agent = devrev.dev_user["id"]
    primary, duplicate = pairs[0]
    given, deleted, joined = (
        devrev.add_work(reported_by=[duplicate], owned_by=[duplicate]) for _ in range(3)
    )
    scene.merge()
    new = devrev.add_work(reported_by=[primary], owned_by=[primary])
    devrev.give(given, "reported_by", [pairs[1][0]])
    devrev.delete_work(deleted)
    devrev.give(joined, "owned_by", [primary, agent])
    run = scene.undo()
    entry = next(one for one in run.report["undone"] if one["email"] == PERSON1)
    made = entry["contact"]["id"]
    assert people(devrev.works[new], "reported_by") == [primary]
    assert people(devrev.works[given], "reported_by") == [pairs[1][0]]
    assert people(devrev.works[given], "owned_by") == [made]
    assert people(devrev.works[joined], "owned_by") == [made, agent]
    assert {(one["id"], one["role"], one["why"]) for one in entry["left"]} == {
        (given, "reported_by", "given to others"),
        (deleted, "reported_by", "deleted"),
        (deleted, "owned_by", "deleted"),
    }


@pytest.mark.parametrize("how", ["no reference has moved", "unfinished", "set back by hand"])
def test_a_merge_is_undone_however_it_stands(scene: Scene, how: str) -> None:
    ((primary, _),) = seeded(scene, 1)
    if how == "unfinished":
        scene.fault("400", "rev-users.update")
    options = ["--primary", "user"] if how == "no reference has moved" else ["--merge-timeout", "1"]
    before = merged(scene, *options)
    scene.world.faults.clear()
    if how == "set back by hand":
        scene.organisation.change(scene.organisation.contacts[primary], external_ref="REVU-P1")
    run = scene.undo()
    assert_undone(scene, before, run)
    assert not run.count("rev-users.update")


@pytest.mark.parametrize("order", [1, -1])
def test_exactly_the_merges_that_a_report_names_are_undone(scene: Scene, order: int) -> None:
    """The third contact's merge is unfinished in the first report and ends in the second."""
    (_, one), (_, two) = with_a_third(scene)
    scene.fault("400", "rev-users.merge", match=lambda body: body["secondary_user"] == two)
    before = merged(scene, "--merge-timeout", "1")
    scene.world.faults.clear()
    scene.merge("--merge-timeout", "1")
    runs = [scene.undo(report) for report in reports()[::order]]
    created = [run.count("rev-users.create") for run in runs]
    assert created == ([2, 0] if order == 1 else [1, 1])
    assert set(names_after(runs[1]).values()) == ({two} if order == 1 else {one, two})
    assert truth(scene, names_after(*runs)) == before


@pytest.mark.parametrize("refused, gone", [(False, "301"), (True, "404"), (False, "primary")])
def test_a_chain_is_undone_last_merge_first(scene: Scene, refused: bool, gone: str) -> None:
    """DevRev may refuse the `REVU-` reference of an old id to the contact that is created again."""
    pairs = with_a_third(scene)
    before = truth(scene)
    scene.world.gone = gone
    for left_out in (pairs[1][1], pairs[0][1]):
        scene.export(leave_out=[left_out])
        assert scene.merge().code == 0
    first, last = reports()
    if refused:
        old = {"external_ref": "REVU-P1"}
        scene.fault("400", "rev-users.update", match=lambda body: old.items() <= body.items())
    merged_twice = truth(scene)
    (entry,) = scene.undo(first).report["failed"]
    assert entry["code"] == "merged_onward" and str(last) in entry["error"]
    assert truth(scene) == merged_twice
    names = names_after(scene.undo(last), scene.undo(first))
    after = truth(scene, names)
    if refused:
        (middle,) = (new for new, old in names.items() if old == pairs[0][0])
        own = scene.organisation.contacts[middle]["display_id"]
        before["users"][pairs[0][0]]["external_ref"] = own
    assert after == before


def test_what_was_merged_again_on_purpose_is_not_undone_by_the_first_report(scene: Scene) -> None:
    pairs = seeded(scene)
    scene.merge()
    scene.undo()
    scene.export(leave_out=[duplicate for _, duplicate in pairs])
    scene.merge("--email", PERSON1)
    first, *_, later = reports()
    run = scene.undo(first)
    (skipped,) = run.report["skipped"]
    assert skipped["code"] == "merged_again" and str(later) in skipped["error"]
    assert not writes(run) and len(run.report["undone"]) == 1
    # Its own report undoes it; the first one has nothing to do then, either.
    assert scene.undo(later).report["summary"]["undone"] == 1
    assert not scene.undo(first).report["skipped"]


def test_the_same_csv_merges_nothing_that_was_undone_until_it_is_named(scene: Scene) -> None:
    pairs = seeded(scene)
    scene.merge()
    scene.undo()
    for leave_out in ((), [duplicate for _, duplicate in pairs]):
        scene.export(leave_out=leave_out)
        run = scene.merge()
        assert [one["code"] for one in run.report["skipped"]] == ["undone", "undone"]
    scene.lose("savepoint.db")
    scene.merge()
    assert len(scene.organisation.merges) == 2  # the copy knows it, too
    scene.merge("--email", PERSON2)
    assert len(scene.organisation.merges) == 3 and scene.holder("user_2") == pairs[1][0]


def test_email_and_limit_take_back_some(scene: Scene) -> None:
    pairs = seeded(scene, 3)
    scene.merge()
    scene.undo(None, "--email", "Person2@example.com")
    assert scene.reference(pairs[1][0]) == "REVU-P2"
    summary = scene.undo(None, "--limit", "1").report["summary"]
    assert (summary["undone"], summary["left"]) == (2, 1) and scene.count("rev-users.create") == 2


def test_preview_only_reads_and_names_each_contact_and_what_would_be_restored(scene: Scene) -> None:
    pairs = seeded(scene)
    given = scene.organisation.add_work(reported_by=[pairs[0][1]], title="Given away")
    scene.merge()
    scene.organisation.give(given, "reported_by", [pairs[1][0]])
    after = truth(scene)
    run = scene.undo(None, "--preview")
    words = ("P. 1 <person1@example.com>, reference user_1", "Given away", "can't be restored")
    assert all(word in run.out for word in words) and "pinned" not in run.out
    assert not writes(run) and truth(scene) == after and not list(Path("reports").glob("undo*"))
    first, second = json.loads(scene.undo(None, "--preview", "--json").out)["to_undo"]
    assert [one["id"] for one in first["left"]] == [given] and second["email"] == PERSON2
    creates = {"display_name": "P. 1", "email": PERSON1, "external_ref": "user_1"}
    assert first["creates"] == creates
    scene.world.forbidden = ["rev-users.get"]
    assert "403" in scene.undo(None, "--preview").out


# -- what a path means, and which backups are believed ---------------------------------------------


def test_what_the_savepoint_does_not_know_is_undone_from_report_or_backup(scene: Scene) -> None:
    pairs = seeded(scene)
    before = truth(scene)
    merge = scene.merge()
    scene.lose(*FILES)
    one = scene.undo(backup_of(merge, PERSON2))
    assert list(names_after(one).values()) == [pairs[1][1]] and scene.holder("user_1")
    assert truth(scene, names_after(one, scene.undo())) == before
    scene.export(leave_out=[duplicate for _, duplicate in pairs])
    codes = {entry["code"] for entry in scene.merge().report["skipped"]}
    assert codes == {"undone"}  # its rows were created


def test_a_folder_of_an_email_stands_for_its_newest_backup_that_was_merged(scene: Scene) -> None:
    pairs = seeded(scene, 1)
    scene.merge()
    scene.undo()
    scene.export(leave_out=[pairs[0][1]])
    newest = backup_of(scene.merge("--email", PERSON1))
    # A later backup whose merge was never requested, and whose name sorts behind.
    shutil.copytree(str(newest), str(newest.with_name("20991231_000000")))
    for _ in range(2):  # undone since or not: never the older one instead
        run = scene.undo(newest.parent)
        assert run.report["run"]["undo"] == str(newest) and run.report["summary"]["undone"] == 1
    scene.lose(*FILES)
    assert "name one of its backups" in scene.undo(newest.parent).err


def change_backup(backup: Path, **fields: Any) -> None:
    """Write other things into the duplicate's contact.json, and make the manifest agree."""
    (path,) = backup.glob("duplicate_*/contact.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}), encoding="utf-8")
    manifest = json.loads((backup / "manifest.json").read_bytes())
    known = manifest["files"][path.relative_to(backup).as_posix()]
    known["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (backup / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def without_hashes(scene: Scene, run: Run, works: int) -> None:
    """Make of this folder one of version 3.0.0, which wrote no hashes."""
    scene.waive("what was committed is on the disk", "rows are made those of 3.0.0")
    changed = "json_set(json_remove(document, '$.manifest_sha256'), '$.backed_up.works', ?)"
    for path in FILES.values():
        with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
            db.execute(f"UPDATE pairs SET document = {changed}", [works])
    (entry,) = run.report["successful_merges"]
    del entry["manifest_sha256"]
    run.report_path.write_text(json.dumps(run.report), encoding="utf-8")


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{"email": "eve@x.com"}, {"external_ref": "user_2"}, {"display_name": "Eve"}, {"works": 99}],
)
def test_a_backup_that_was_changed_is_not_undone(
    scene: Scene, fields: dict[str, Any], pinned: bool
) -> None:
    scene.pair(1)
    merge = scene.merge()
    if not pinned:
        without_hashes(scene, merge, fields.get("works", 3))
    change_backup(backup_of(merge), **fields)
    preview = scene.undo(None, "--preview")
    run = scene.undo()
    if pinned or "display_name" not in fields:
        assert run.codes == {PERSON1: "backup_changed"} and not writes(run)
    else:
        words = ("Eve <person1@example.com>", "3.0.0 has not pinned its backup")
        assert run.code == 0 and all(one in preview.out for one in words)  # as in the question


@pytest.mark.parametrize("lost", [True, False])
def test_a_backup_that_neither_row_nor_report_names_is_not_undone(scene: Scene, lost: bool) -> None:
    """Whether the savepoint knows another backup of the merge or nothing at all."""
    scene.pair(1)
    backup = backup_of(scene.merge())
    made_up = Path("backups/eve@example.com/20250101_000000")
    shutil.copytree(str(backup), str(made_up))
    if lost:
        scene.lose(*FILES)
    run = scene.undo(made_up)
    assert run.codes == {PERSON1: "backup_unknown"} and not writes(run)
    assert scene.undo(backup).code == 0


@pytest.mark.parametrize("name", ["../../../etc/passwd", "primary_x/y.json", "a folder", "a pipe"])
def test_a_manifest_that_names_other_files_is_none(scene: Scene, name: str) -> None:
    scene.pair(1)
    backup = backup_of(scene.merge())
    path = backup / "manifest.json"
    (contact,) = backup.glob("primary_*/contact.json")
    if name == "a folder":
        contact.parent.rename(Path("elsewhere"))
        path.write_text(path.read_text().replace(contact.parent.name, "../../../elsewhere"))
    elif name != "a pipe":
        manifest = json.loads(path.read_bytes())
        manifest["files"][name] = {"bytes": 1, "sha256": "0"}
        path.write_text(json.dumps(manifest))
    elif hasattr(os, "mkfifo"):
        contact.unlink()
        os.mkfifo(str(contact))
    assert scene.undo().codes == {PERSON1: "backup_failed"}
    assert scene.run("--verify-backups").code == 1


def test_a_backup_of_contacts_that_were_never_merged_is_refused(scene: Scene) -> None:
    seeded(scene, 1)
    scene.fault("400", "rev-users.merge")
    scene.merge("--merge-timeout", "1")
    (folder,) = Path("backups").glob("*/*/")
    run = scene.undo(folder)
    assert run.codes == {PERSON1: "not_merged"} and not writes(run)
    for nothing in ("contacts.csv", "backups", "nowhere"):
        assert scene.undo(nothing).code == 2


def test_what_does_not_stand_as_the_merge_has_left_it_is_refused(scene: Scene) -> None:
    pairs = seeded(scene, 5)
    merge = scene.merge()
    contacts = scene.organisation.contacts
    scene.organisation.change(contacts[pairs[0][0]], external_ref="user_other")
    scene.organisation.change(contacts[pairs[1][0]], state="locked")
    scene.organisation.delete_contact(pairs[2][0])
    (backup_of(merge, "person4@example.com") / "manifest.json").write_text("{}")
    scene.organisation.change(contacts[pairs[4][0]], email="erased@example.com")
    run = scene.undo()
    assert list(run.codes.values()) == [
        "external_ref_changed", "not_active", "not_found", "backup_failed", "email_changed",
    ]  # fmt: skip
    assert not writes(run)
    assert scene.merge().report["summary"]["already_merged"] == 5


@pytest.mark.parametrize("role, name", [("primary", "id"), ("duplicate", "old_external_ref")])
def test_a_report_of_another_shape_is_refused(scene: Scene, role: str, name: str) -> None:
    scene.pair(1)
    merge = scene.merge()
    merge.report["successful_merges"][0][role][name] = 5
    merge.report_path.write_text(json.dumps(merge.report), encoding="utf-8")
    assert "is neither a backup folder nor a merge report" in scene.undo().err


# -- the contact: refused, lost, taken -------------------------------------------------------------


def test_a_field_that_is_refused_is_left_out_once_and_named(scene: Scene) -> None:
    seeded(scene, 1)
    scene.merge()
    scene.world.refused_fields = ("description", "phone_numbers")
    run = scene.undo()
    (entry,) = run.report["undone"]
    assert run.count("rev-users.create") == 3
    made = scene.organisation.contacts[entry["contact"]["id"]]
    assert (made["external_ref"], made["display_name"]) == ("user_1", "P. 1")
    why = {item["what"]: item["why"] for item in entry["not_restored"]}
    assert "not permitted" in why["description"] and "not permitted" in why["phone_numbers"]


@pytest.mark.parametrize("trouble", ["400", "409", "403", "unique emails"])
@pytest.mark.parametrize("carried", [False, True])
def test_where_the_contact_is_refused_for_good_the_primary_gets_the_reference_again(
    scene: Scene, trouble: str, carried: bool
) -> None:
    """At once: where no contact has the reference, a 409 says that the address is taken."""
    with_a_third(scene)
    scene.merge(*["--carry-fields"] * carried)
    after = truth(scene)
    scene.world.unique_emails = trouble == "unique emails"
    if not scene.world.unique_emails:
        scene.fault(trouble, "rev-users.create")
    run = scene.undo(None, "--merge-timeout", "60")
    assert run.code == 1 and truth(scene) == after
    assert set(run.codes.values()) == {"forbidden" if trouble == "403" else "contact_refused"}
    freed, again = [one.started for one in run.requests if moves_reference(one.body)][:2]
    assert again - freed < 0.6  # seconds on no contact: four round trips
    if trouble in ("409", "unique emails"):
        assert "takes each address once" in json.dumps(run.report)
    scene.world.faults.clear()
    scene.world.unique_emails = False
    assert len(scene.undo().report["undone"]) == 2


@pytest.mark.parametrize("email", [PERSON1, "other@example.com"])
def test_a_reference_that_another_person_has_meanwhile_stays(scene: Scene, email: str) -> None:
    """The application may have made the contact itself, which is as good."""
    seeded(scene, 1)
    before = merged(scene)
    scene.before("rev-users.create", lambda devrev: devrev.visit(email, "user_1", "ORG1"))
    run = scene.undo()
    if email == PERSON1:
        assert run.code == 0 and truth(scene, names_after(run))["people"] == before["people"]
    else:
        assert run.codes == {PERSON1: "external_ref_conflict"}
        assert len(truth(scene)["users"]) == 2 and scene.settle(PERSON1).code == 0


@pytest.mark.parametrize("email", [PERSON1, "other@example.com"])
def test_a_contact_of_another_workspace_is_not_taken_for_the_one_whose_answer_was_lost(
    scene: Scene, email: str
) -> None:
    seeded(scene, 1)
    before = merged(scene)
    scene.organisation.add_contact("Z", email, "user_1", rev_org="OTHER")
    scene.lose_answer("rev-users.create")
    run = scene.undo()
    assert run.code == 0 and run.report["undone"][0]["contact"]["display_id"] != "REVU-Z"
    assert truth(scene, names_after(run))["people"] == before["people"]


@pytest.mark.parametrize("endpoint", ["rev-users.create", "rev-users.update", "works.update"])
@pytest.mark.parametrize(
    "kind", ["reset-before", "reset-after", "cut", "500-after", "502", "doubled"]
)
def test_lost_answers_make_no_contact_twice(scene: Scene, kind: str, endpoint: str) -> None:
    with_a_third(scene)
    before = merged(scene)
    scene.fault(kind, endpoint, times=2)
    # A contact without the application's reference that DevRev has made twice is not noticed then.
    scene.world.list_lag = 0.0 if kind == "doubled" else 1.5
    assert_undone(scene, before, scene.undo())


@pytest.mark.parametrize("kind", ["reset-before", "reset-after", "kill"])
def test_a_contact_without_its_reference_is_made_once_too(scene: Scene, kind: str) -> None:
    """The system's references may not be given: it is known by its email and its being new."""
    with_a_third(scene)
    before = merged(scene)

    def is_system(body: dict[str, Any]) -> bool:
        return str(body.get("external_ref")).startswith("REVU-")

    scene.fault("409", "rev-users.create", match=is_system)
    if kind == "kill":  # when it is made: the next run knows who was there before
        scene.kill("hearing of rev-users.create", 3)
    else:
        scene.fault(kind, "rev-users.create", match=lambda body: not moves_reference(body), times=1)
    run = scene.undo(None, "--merge-timeout", "6")
    assert run.code == {"reset-before": 1, "reset-after": 0, "kill": None}[kind]
    run = scene.undo()
    third = next(one for one in run.report["undone"] if one["duplicate"]["display_id"] == "REVU-E1")
    assert "external_ref" in {item["what"] for item in third["not_restored"]}
    assert third["contact"]["external_ref"] == third["contact"]["display_id"]
    assert truth(scene, names_after(run))["people"] == before["people"]
    assert len(truth(scene)["users"]) == 3


def test_a_token_that_may_not_write_is_told_so_before_anything_is_changed(scene: Scene) -> None:
    seeded(scene)
    scene.merge()
    after = truth(scene)
    for endpoint in ("works.update", "conversations.update"):
        scene.world.forbidden = (endpoint,)
        run = scene.undo()
        assert run.code == 2 and truth(scene) == after and f"{endpoint} answered 403" in run.err


def test_one_restricted_object_keeps_no_other_group_from_being_undone(scene: Scene) -> None:
    pairs = seeded(scene)
    scene.merge()
    mine = sorted(scene.works_of(pairs[0][0]))
    scene.world.restricted_writes = mine
    run = scene.undo()
    assert [one["email"] for one in run.report["undone"]] == [PERSON2]
    assert run.codes == {PERSON1: "forbidden"} and scene.holder("user_1") == pairs[0][0]
    scene.world.restricted_writes = [one for one in mine if ":issue/" in one][:1]
    (entry,) = scene.undo().report["unfinished"]
    assert entry["code"] == "not_restored" and len({item["id"] for item in entry["left"]}) == 1
    # A merge run leaves the group alone, and there is a way out.
    scene.export(leave_out=[pairs[0][1]])
    merge = scene.merge()
    assert merge.codes == {PERSON1: "undo_unfinished"}
    assert "--undo reports/merge_report_" in merge.report["failed_merges"][0]["error"]
    scene.settle(PERSON1)
    assert [one["code"] for one in scene.undo().report["skipped"]] == ["undo_settled"]


def test_duplicates_that_shared_a_ticket_get_it_again_after_a_refusal(scene: Scene) -> None:
    devrev = scene.organisation
    one = devrev.add_contact("A", PERSON1, "user_1")
    other, primary = (devrev.add_contact(key, PERSON1) for key in ("B", "C"))
    for _ in range(2):
        devrev.add_work(owned_by=[primary], reported_by=[primary])
    devrev.add_work(owned_by=[one], reported_by=[one])
    shared = devrev.add_work(owned_by=[one, other], reported_by=[one])
    scene.merge()
    scene.world.restricted_writes = [shared]
    assert scene.undo().code == 1
    scene.world.restricted_writes = ()
    again = {old: new for new, old in names_after(scene.undo()).items()}
    assert set(people(devrev.works[shared], "owned_by")) == {again[one], again[other]}
    assert people(devrev.works[shared], "reported_by") == [again[one]]


def test_what_a_merge_carried_is_removed_and_what_people_wrote_stays(scene: Scene) -> None:
    """People write before the undo, and right before the fields are removed."""
    pairs = seeded(scene, 3)
    devrev = scene.organisation
    first, second, third = (devrev.contacts[primary] for primary, _ in pairs)
    for one in (first, second, third):
        devrev.change(one, phone_numbers=["+4940"])
    before = merged(scene, "--carry-fields")
    assert first["description"] == "Of 1." and len(first["phone_numbers"]) == 2
    mine = {"description": "Mine.", "phone_numbers": ["+4940", "+49301234562", "+4950"]}
    devrev.change(second, **mine)
    mine = {"description": "Mine.", "phone_numbers": ["+49301234561"]}
    scene.after("rev-users.create", lambda _: devrev.change(first, **mine))
    refused = {"id": pairs[2][0], "description": ""}
    scene.fault("403", "rev-users.update", match=lambda body: refused.items() <= body.items())
    run = scene.undo()
    left = {one["email"]: one["fields_left"] for one in run.report["undone"]}
    fields = {email: [item["field"] for item in items] for email, items in left.items()}
    assert fields == {
        PERSON1: ["description"],
        PERSON2: ["description"],
        PERSON3: ["description", "phone_numbers"],
    }
    assert "403" in left[PERSON3][0]["why"]
    assert first["phone_numbers"] == [] and first["description"] == "Mine."
    assert second["phone_numbers"] == ["+4940", "+4950"] and second["description"] == "Mine."
    assert len(third["phone_numbers"]) == 2 and third["description"] == "Of 3."
    assert truth(scene, names_after(run))["people"] == before["people"]


# -- others, quota, sleep: a write rests on what was just read -------------------------------------


def test_groups_that_share_an_object_do_not_undo_each_other(scene: Scene) -> None:
    pairs = scene.pairs(3)
    agent = scene.organisation.dev_user["id"]
    scene.organisation.add_conversation([pairs[1][1], pairs[2][1], agent])
    before = merged(scene)
    assert_undone(scene, before, scene.undo())


def test_who_joins_while_much_is_written_stays(scene: Scene) -> None:
    """Once the first conversation is written, an agent joins all others."""
    primary, duplicate = scene.pair(1)
    devrev = scene.organisation
    agent = devrev.dev_user["id"]
    talks = [devrev.add_conversation([duplicate]) for _ in range(9)]
    joined: list[str] = []

    def join(_organisation: Any) -> None:
        for one in talks:
            if people(devrev.conversations[one], "members") == [primary]:
                devrev.give(one, "members", [primary, agent])
                joined.append(one)

    scene.merge()
    scene.after("conversations.update", join, match=is_write)
    (made,) = names_after(scene.undo())
    assert len(joined) >= 8
    for one in joined:
        assert set(people(devrev.conversations[one], "members")) == {agent, made}


def test_an_update_whose_answer_does_not_show_it_is_read_and_written_again(scene: Scene) -> None:
    primary, _ = scene.pair(1)
    devrev = scene.organisation
    scene.merge()
    visitor = devrev.add_contact("V", "visitor@example.com")
    (talk,) = (one for one in scene.works_of(primary) if "conversation" in one)

    def overwrite(_answer: dict[str, Any]) -> dict[str, Any]:
        devrev.give(talk, "members", [primary, visitor])
        return {"conversation": dict(devrev.conversations[talk])}

    scene.waive("an undo moves no one but whom the merge has moved", "one joins in an answer")
    scene.fault("changed", "conversations.update", match=is_write, times=1, detail=overwrite)
    (made,) = names_after(scene.undo())
    assert {made, visitor} == set(people(devrev.conversations[talk], "members"))


def spend_quota(scene: Scene) -> None:
    assert scene.world.quota
    scene.world.quota.spend(scene.world.quota.limit)


WAITS: dict[str, Callable[[Scene], None]] = {
    "quota": spend_quota,
    "a nap": lambda scene: scene.clock.nap(900.0),
}


@pytest.mark.parametrize("wait", WAITS)
def test_an_edit_during_a_wait_before_a_write_is_not_lost(scene: Scene, wait: str) -> None:
    """Others use the quota up, or the laptop sleeps, between each read and its write."""
    primary, duplicate = scene.pair(1, phone_numbers=["+1"])
    devrev = scene.organisation
    devrev.change(devrev.contacts[duplicate], phone_numbers=["+2"])
    mine = scene.works_of(duplicate)
    visitor = devrev.add_contact("V", "visitor@example.com")
    scene.merge("--carry-fields")
    scene.world.quota = Quota(scene.world._epoch, 1000, 300.0)
    edited = set()

    def edit(thing: dict[str, Any]) -> None:
        """A visitor joins, or the primary gets a number."""
        edited.add(thing["id"])
        if thing["id"] == primary:
            devrev.change(thing, phone_numbers=[*thing["phone_numbers"], "+3"])
        else:
            role = "reported_by" if "reported_by" in thing else "members"
            devrev.give(thing["id"], role, [*people(thing, role), visitor])

    def wait_and_edit(thing: dict[str, Any]) -> None:
        WAITS[wait](scene)
        scene.at(0.06, lambda _: edit(thing))

    def disturb(endpoint: str, thing: dict[str, Any], n: int = 1) -> None:
        scene.after(endpoint, lambda _: wait_and_edit(thing), n, {"id": thing["id"]}.__eq__)

    for one in mine:
        is_work = one in devrev.works
        things = devrev.works if is_work else devrev.conversations
        disturb("works.get" if is_work else "conversations.get", things[one])
    disturb("rev-users.get", devrev.contacts[primary], n=3)
    scene.undo()
    assert edited == {primary, *mine} and devrev.contacts[primary]["phone_numbers"] == ["+1", "+3"]
    assert mine == scene.works_of(visitor)


@pytest.mark.parametrize("wait", WAITS)
def test_a_reference_that_is_set_during_a_wait_is_not_overwritten(scene: Scene, wait: str) -> None:
    primary, _ = scene.pair(1)
    scene.merge()
    scene.world.quota = Quota(scene.world._epoch, 1000, 300.0)

    def disturb(devrev: Any) -> None:
        WAITS[wait](scene)
        scene.at(0.06, lambda _: devrev.change(devrev.contacts[primary], external_ref="user_new"))

    scene.after("rev-users.get", disturb, 2, {"id": primary}.__eq__)
    run = scene.undo()
    assert run.codes == {PERSON1: "external_ref_changed"} and scene.reference(primary) == "user_new"
    assert run.report["failed"] and not run.count("rev-users.create")


def test_between_reference_and_contact_nothing_waits_for_quota(scene: Scene) -> None:
    scene.pairs(6)
    before = merged(scene)
    scene.world.quota = Quota(scene.world._epoch, 14, 60.0)
    run = scene.undo()
    assert_undone(scene, before, run)
    freed = [one.started for one in run.requests if moves_reference(one.body)][::2]
    found = [one.started for one in run.requests if one.endpoint == "rev-users.create"]
    assert len(found) == 6 and all(two - one < 0.2 for one, two in zip(freed, found))


@pytest.mark.parametrize("endpoint", ["rev-users.get", "rev-users.update", "rev-users.create"])
def test_an_interruption_leaves_the_reference_on_a_contact(scene: Scene, endpoint: str) -> None:
    pairs = scene.pairs(2)
    before = merged(scene)
    scene.after(endpoint, scene.ctrl_c)
    run = scene.undo()
    assert run.code == 130 and scene.holder("user_1")
    began = endpoint != "rev-users.get"
    assert (scene.holder("user_1") not in pairs[0]) is began
    assert run.count("rev-users.create") == began
    assert_undone(scene, before, scene.undo())


def test_an_undo_stopped_with_a_reference_on_no_contact_names_the_way_on(scene: Scene) -> None:
    """Others use the quota up right after the reference is freed, and somebody presses Ctrl-C."""
    scene.pair(1)
    before = merged(scene)
    scene.world.quota = Quota(scene.world._epoch, 100, 300.0)

    def spend(_devrev: Any) -> None:
        spend_quota(scene)
        scene.at(1.0, scene.ctrl_c)

    scene.after("rev-users.update", spend, match=moves_reference)
    run = scene.undo()
    assert run.code == 130 and scene.holder("user_1") is None
    for text in (run.err, run.report["unfinished"][0]["error"]):
        assert "user_1" in text and "--undo reports/merge_report_" in text
    assert_undone(scene, before, scene.undo())


@pytest.mark.parametrize("n, last", [(4, None), (5, "rev-users.create")])
def test_no_write_follows_one_of_the_savepoint_that_failed(scene: Scene, n: int, last: str) -> None:
    """The undo is about to free the first reference (seen in seed 50554), or to give a ticket."""
    scene.pair(1)
    before = merged(scene)
    scene.fill_disk("commit of savepoint-copy.db", n)
    run = scene.undo()
    assert run.code == 3 and (writes(run) or [None])[-1] == last
    assert_undone(scene, before, scene.undo())


# -- the primary goes ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "merged", "unheard"])
def test_a_contact_whose_primary_goes_is_created_all_the_same(scene: Scene, how: str) -> None:
    primary, _ = scene.pair(1)
    other = scene.organisation.add_contact("X", "x@example.com")
    scene.merge()

    def go(devrev: Any) -> None:
        if how == "merged":
            devrev.merge(other, primary)
        else:
            devrev.delete_contact(primary)

    scene.after("rev-users.update", go, match=moves_reference)
    if how == "unheard":
        scene.lose_answer("rev-users.update")
    run = scene.undo()
    made = scene.holder("user_1")
    assert made and scene.organisation.contacts[made]["email"] == PERSON1
    (entry,) = run.report["undone"] + run.report["unfinished"]
    assert entry["contact"]["id"] == made
    if how == "merged":
        assert {item["why"] for item in entry["left"]} == {"given to others"}
    scene.end()


@pytest.mark.parametrize("how", ["deleted", "renamed", "set by hand"])
def test_a_primary_that_goes_in_a_killed_undo_leaves_a_way_out(scene: Scene, how: str) -> None:
    """It is refused, naming the reference and --settle, which ends it (seen in seed 770053)."""
    primary, _ = scene.pair(1)
    contacts = scene.organisation.contacts
    other = scene.organisation.add_contact("X", "x@example.com")
    scene.merge()
    scene.kill("hearing of rev-users.update")
    assert scene.undo().killed and scene.holder("user_1") is None
    if how == "renamed":
        scene.organisation.change(contacts[primary], email="erased@example.com")
    else:
        scene.organisation.delete_contact(primary)
    if how == "set by hand":
        scene.organisation.change(contacts[other], external_ref="user_1")
    run = scene.undo()
    (entry,) = run.report["unfinished"]
    assert entry["code"] == ("email_changed" if how == "renamed" else "not_found")
    assert "user_1" in entry["error"] and f"--settle {PERSON1}" in entry["error"]
    assert not writes(run)
    settled = scene.settle(PERSON1)
    assert settled.code == 0 and settled.rows[entry["duplicate"]["id"]]["state"] == "undo_settled"


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_an_undo_killed_at_any_request_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """At any request, answer and durable write; every other time the savepoint is lost, too."""
    step = 1 + part
    killed = True
    while killed:
        folder = tmp_path / str(step)
        folder.mkdir()
        monkeypatch.chdir(folder)
        scene = Scene()
        with_a_third(scene)
        before = merged(scene)
        scene.kill("", step)
        run = scene.undo()
        killed = run.killed
        if killed and step % 8 > 3:
            scene.lose("savepoint.db")
        assert_undone(scene, before, scene.undo() if killed else run)
        step += 4
    assert step > 40


# -- what is planned -------------------------------------------------------------------------------


PEOPLE_NOW = [
    ("p", False, "new", ""),
    ("p", True, "p new", ""),
    ("a p b", False, "a new b", ""),
    ("a old p", False, "a new p", ""),  # the merge has left the old id
    ("a gone p", False, "a again new", ""),  # another that was created again
    ("new p", False, "", ""),  # an undo that was killed has written it
    ("a b", False, "", "given to others"),
    ("", True, "", "given to others"),
    (None, True, "", "deleted"),
]


@pytest.mark.parametrize("now, stays, expected, why", PEOPLE_NOW)
def test_what_is_written_to_an_object(now: Any, stays: bool, expected: str, why: str) -> None:
    thing = None
    if now is not None:
        thing = {"id": "thing", "members": [{"id": one} for one in now.split()]}
    kept = {("thing", "members")} if stays else {("thing", "owned_by"), ("other", "members")}
    aliases = {"old": "new", "gone": "again"}
    changes, left = plan_restore(thing, ["members"], "p", "new", aliases, kept)
    assert changes == ({"members": expected.split()} if expected else {})
    assert left == ({"members": why} if why else {})


NEVER: Any = object()  # the merge has not written the field yet


FIELDS = [
    ("description", "d", None, "d", "", False),
    ("description", "d", "", "new", None, True),
    ("description", "d", "old", "new", None, True),
    ("description", "d", "", "", None, False),
    ("description", "d", NEVER, "d", None, False),
    ("display_name", "Ana", "REVU-1", "Ana", "REVU-1", False),
    ("phone_numbers", ["1", "2"], ["1"], ["3", "2", "1"], ["3", "1"], False),
    ("phone_numbers", ["2"], None, ["2"], [], False),
    ("phone_numbers", ["2"], None, ["3"], None, False),
    ("phone_numbers", ["2"], NEVER, ["2"], None, False),
]


@pytest.mark.parametrize("name, carried, before, live, update, is_left", FIELDS)
def test_what_a_merge_has_added_to_the_primary(
    name: str, carried: Any, before: Any, live: Any, update: Any, is_left: bool
) -> None:
    contact = Contact.from_json({})
    pair = Pair(contact, contact, None, fields_to_carry={name: carried})
    pair.fields_before = {} if before is NEVER else {name: before}
    found, stays = plan_fields(pair, {name: live})
    assert found == ({} if update is None else {name: update})
    assert [item["field"] for item in stays] == [name] * is_left
