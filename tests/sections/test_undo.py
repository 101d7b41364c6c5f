"""Undoing merges: who has what before and after, whatever happens in between."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Tuple

import pytest

from merge_contacts import COLUMNS, Contact, Pair, plan_fields, plan_restore
from tests.process.test_terminal import Terminal
from tests.sandbox import Fault, Organisation, Request, Sandbox
from tests.support import (
    ROOT,
    Result,
    Workplace,
    diagonal,
    organisation_of_pairs,
    roles_of,
    the_rest_is_slow,
)

posix = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
READS = ("dev-users.self", "rev-users.get", "rev-users.list", "works.list", "works.get", "conversations.list",
         "conversations.get")  # fmt: skip
PEOPLE = ("owned_by", "reported_by", "members")
Pairs = List[Tuple[str, str]]


def seeded(count: int = 5) -> Tuple[Organisation, Pairs]:
    """Pairs whose contacts share tickets and conversations with each other and with agents, fields of their own."""
    organisation = Organisation()
    agent = organisation.dev_user["id"]
    pairs = []
    for n in range(1, count + 1):
        email = f"person{n}@example.com"
        mine = dict(rev_org=f"ORG{n % 2}", display_name=f"P. {n}", full_name=f"Person {n}")
        primary = organisation.add_contact(
            f"P{n}", email, **{**mine, "display_name": f"Person {n}"}
        )
        more = dict(description=f"The account of {n}.", phone_numbers=[f"+4930123456{n}"])
        duplicate = organisation.add_contact(f"D{n}", email, f"user_{n}", **mine, **more)
        for people in ([duplicate], [primary], [primary, duplicate], [duplicate, agent]):
            organisation.add_work(
                owned_by=people, reported_by=people, comments=1, kind="issue" if n % 2 else "ticket"
            )
            organisation.add_work(reported_by=people, created_by=people[0])
            organisation.add_conversation([*people, agent], comments=1)
        organisation.add_work(owned_by=[agent], reported_by=[agent, duplicate])
        pairs.append((primary, duplicate))
    return organisation, pairs


def with_a_third(organisation: Organisation, pairs: Pairs) -> Pairs:
    """The first person has a third contact, which shares a ticket with both others."""
    third = organisation.add_contact("E1", "person1@example.com", rev_org="ORG1")
    organisation.add_work(reported_by=[third, pairs[0][1]])
    organisation.add_work(reported_by=[third], owned_by=[third, organisation.dev_user["id"]])
    organisation.add_conversation([third, pairs[0][0]])
    return [*pairs, (pairs[0][0], third)]


def truth(
    organisation: Organisation, names: Mapping[str, str] = MappingProxyType({})
) -> Dict[str, Any]:
    """Who has which role on what, as sets, and who has which reference; contacts called by `names` where they have one."""
    people = {
        (thing["id"], role): {names.get(one["id"], one["id"]) for one in thing.get(role, ())}
        for table in (organisation.works, organisation.conversations)
        for thing in table.values()
        for role in PEOPLE
    }
    fields = (
        "display_name",
        "email",
        "external_ref",
        "description",
        "phone_numbers",
        "rev_org",
        "state",
    )
    users = {
        names.get(one, one): {name: user.get(name) for name in fields}
        for one, user in organisation.contacts.items()
        if organisation.alive(one)
    }
    return {"people": people, "users": users}


def assert_undone(
    organisation: Organisation, before: Dict[str, Any], result: Result
) -> Dict[str, str]:
    """All is as it was but for the ids; nobody was made twice. Returns new id -> old id."""
    names = {entry["contact"]["id"]: entry["duplicate"]["id"] for entry in result.report["undone"]}
    assert truth(organisation, names) == before
    return names


KEPT = tempfile.TemporaryDirectory(prefix="merged-")
runs: Dict[str, Tuple[Result, Pairs, Dict[str, str]]] = {}


def merged(place: Workplace, sandbox: Sandbox) -> Tuple[str, Result]:
    """Merge all; the path of the report, which is what is undone.

    What a run has made of an organisation is the same for the next test that has the same one: it gets the files that the run has left,
    and its merges are carried out on the organisation.
    """
    organisation = sandbox.organisation
    place.export(organisation)
    held = [
        organisation.contacts,
        organisation.works,
        organisation.conversations,
        organisation.timelines,
    ]
    facts = json.dumps([sandbox.gone, *map(dict, held)], sort_keys=True)
    key = hashlib.sha256(facts.encode("utf-8")).hexdigest()
    kept = Path(KEPT.name) / key
    if key in runs:
        result, merges, references = runs[key]
        for pair in merges:
            organisation.merge(*pair)
        for primary, reference in references.items():
            organisation.change(organisation.contacts[primary], external_ref=reference)
        for path in kept.iterdir():
            if path.is_dir():
                shutil.copytree(str(path), str(place.folder / path.name))
            else:
                shutil.copy2(str(path), str(place.folder / path.name))
    else:
        result = place.run(sandbox, "--yes", check=0)
        references = {
            one: organisation.contacts[one]["external_ref"] for one, _ in organisation.merges
        }
        shutil.copytree(str(place.folder), str(kept))
        runs[key] = result, list(organisation.merges), references
    (path,) = (place.folder / "reports").glob("merge_report_*.json")
    return str(path.relative_to(place.folder)), result


def read(path: Path) -> Dict[str, Any]:
    found: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def forget(place: Workplace) -> None:
    """Delete both files of the savepoint."""
    (place.folder / "savepoint.db").unlink()
    (place.folder / "backups" / "savepoint-copy.db").unlink()


def no_writes(requests: List[Request]) -> bool:
    return {request.endpoint for request in requests} <= set(READS)


def test_what_was_merged_is_as_before_and_a_second_undo_does_nothing(place: Workplace) -> None:
    organisation, pairs = seeded()
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        assert truth(organisation) != before
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
        assert_undone(organisation, before, result)
        assert sandbox.count("rev-users.create") == 5
        assert result.report["summary"]["undone"] == 5
        entries = sorted(result.report["undone"], key=lambda entry: entry["email"])
        for entry, (_, duplicate) in zip(entries, pairs):
            lost = {item["what"]: item["value"] for item in entry["not_restored"]}
            assert {"id", "full_name", "created_date", "created_by", "authors of comments"} <= set(
                lost
            )
            assert (entry["duplicate"]["id"], lost["full_name"]) == (
                duplicate,
                organisation.contacts[duplicate]["full_name"],
            )
            assert {item["id"] for item in entry["restored"]} and not entry["left"]
        page = next((place.folder / "reports").glob("undo_report_*.html")).read_text(
            encoding="utf-8"
        )
        assert '<p class="lead">5 undone</p>' in page and page.count("<script") == 2
        asked = len(sandbox.requests)
        again = place.run(sandbox, "--yes", "--undo", path, check=0)
        assert no_writes(sandbox.requests[asked:]) and again.report["summary"]["undone_before"] == 5


def test_one_backup_folder_undoes_one_group_without_any_savepoint(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    with Sandbox(organisation) as sandbox:
        _, result = merged(place, sandbox)
        first = truth(organisation)
        entry = next(
            one
            for one in result.report["successful_merges"]
            if one["email"] == "person2@example.com"
        )
        forget(place)
        undone = place.run(sandbox, "--yes", "--undo", entry["backup"], check=0)
        assert [one["duplicate"]["id"] for one in undone.report["undone"]] == [pairs[1][1]]
        assert organisation.contacts[pairs[1][0]]["external_ref"] == "REVU-P2"
        (made,) = (one for one in truth(organisation)["users"] if one not in first["users"])
        assert organisation.contacts[made]["external_ref"] == "user_2"
        assert organisation.contacts[pairs[0][0]]["external_ref"] == "user_1"
        forget(place)
        place.run(sandbox, "--yes", "--undo", entry["backup"], check=0)
        assert sandbox.count("rev-users.create") == 2 and len(truth(organisation)["users"]) == 3


@pytest.mark.parametrize(
    "gone",
    the_rest_is_slow(
        ["404", "301", "state", "primary", "shadow", "unassigned"], "301", "primary", "shadow"
    ),
)
def test_a_group_of_three_comes_apart_as_three(place: Workplace, gone: str) -> None:
    organisation, pairs = seeded(1)
    with_a_third(organisation, pairs)
    before = truth(organisation)
    with Sandbox(organisation, gone=gone) as sandbox:
        path, _ = merged(place, sandbox)
        assert len(organisation.merges) == 2
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


def test_preview_only_reads_and_tells_what_would_be_restored(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    given = organisation.add_work(reported_by=[pairs[0][1]], title="Given away")
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        organisation.give(given, "reported_by", [pairs[1][0]])
        after, files, asked = truth(organisation), place.files(), len(sandbox.requests)
        result = place.run(sandbox, "--yes", "--undo", path, "--preview", check=0)
        for word in (
            "person1@example.com",
            "REVU-P1",
            "REVU-D1",
            "user_1",
            "Given away",
            "full name",
            "created by",
        ):
            assert word in result.out
        assert result.out.count("Can't be restored") == 1
        plan = json.loads(
            place.run(sandbox, "--yes", "--undo", path, "--preview", "--json", check=0).out
        )
        assert [one["email"] for one in plan["to_undo"]] == [
            "person1@example.com",
            "person2@example.com",
        ]
        assert [one["id"] for one in plan["to_undo"][0]["left"]] == [given]
        had = roles_of(organisation, pairs[0][0])
        assert {one["id"] for one in plan["to_undo"][0]["restored"]} <= set().union(*had.values())
        assert no_writes(sandbox.requests[asked:]) and truth(organisation) == after
        assert [one for one in place.files() if one.parent.name != "logs"] == [
            one for one in files if one.parent.name != "logs"
        ]


def test_a_preview_that_may_not_read_says_so(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.forbidden = ["rev-users.get"]
        result = place.run(sandbox, "--undo", path, "--preview", check=2)
        assert "refused  person1@example.com" in result.out and "403" in result.err


def test_an_undo_is_told_which_file_to_name_and_finds_a_folder_by_the_address(
    place: Workplace,
) -> None:
    organisation = Organisation()
    organisation.add_contact("P1", "o'dell@example.com")
    organisation.add_contact("D1", "o'dell@example.com", "user_1")
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        page = Path(path).with_suffix(".html")
        assert f"name {Path(path)}" in place.run(sandbox, "--undo", str(page), check=2).err
        assert (
            "name one report or backup in them"
            in place.run(sandbox, "--undo", "reports", check=2).err
        )
        contact = next(place.folder.glob("backups/o%27dell@example.com/*/*/contact.json"))
        as_written = contact.read_bytes()
        contact.write_bytes(as_written + b"\n")
        refused = place.run(sandbox, "--yes", "--undo", path, check=1)
        assert (
            "backup_failed" in refused.out
            and "An undo needs the backup as it was written." in refused.out
        )
        assert "next: fix what is named above, then run the same command again" in refused.err
        contact.write_bytes(as_written)
        done = place.run(sandbox, "--yes", "--undo", "backups/o'dell@example.com", check=0)
        assert done.report["summary"]["undone"] == 1 and " --export " in done.err.splitlines()[-1]
        assert done.out.index("1 undone") < done.out.index("report  ")
        assert "next:" not in place.run(sandbox, "--yes", "--undo", path, check=0).err


def test_live_data_wins(place: Workplace) -> None:
    """New tickets stay with the primary; what was given to others or deleted is left and named; who joined stays."""
    organisation, pairs = seeded(2)
    agent, (primary, duplicate) = organisation.dev_user["id"], pairs[0]
    given, deleted, joined = (
        organisation.add_work(reported_by=[duplicate], owned_by=[duplicate]) for _ in range(3)
    )
    talk = organisation.add_conversation([duplicate])
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        new = organisation.add_work(reported_by=[primary], owned_by=[primary])
        new_talk = organisation.add_conversation([primary, agent])
        organisation.give(given, "reported_by", [pairs[1][0]])
        organisation.delete_work(deleted)
        organisation.give(joined, "owned_by", [primary, agent])
        organisation.give(talk, "members", [agent, primary])
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
    entry = next(one for one in result.report["undone"] if one["email"] == "person1@example.com")
    made = entry["contact"]["id"]

    def people(thing: Dict[str, Any], role: str) -> List[str]:
        return [one["id"] for one in thing[role]]

    assert (
        people(organisation.works[new], "reported_by")
        == people(organisation.works[new], "owned_by")
        == [primary]
    )
    assert people(organisation.conversations[new_talk], "members") == [primary, agent]
    assert people(organisation.works[given], "reported_by") == [pairs[1][0]]
    assert people(organisation.works[given], "owned_by") == [made]
    assert people(organisation.works[joined], "owned_by") == [made, agent]
    assert people(organisation.conversations[talk], "members") == [agent, made]
    assert {(one["id"], one["role"], one["why"]) for one in entry["left"]} == {
        (given, "reported_by", "given to others"), (deleted, "reported_by", "deleted"), (deleted, "owned_by", "deleted"),
    }  # fmt: skip


def test_the_same_csv_merges_nothing_that_was_undone_until_it_is_named(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        place.run(sandbox, "--yes", "--undo", path, check=0)
        for fresh in (False, True):
            if fresh:
                place.export(organisation, leave_out=[duplicate for _, duplicate in pairs])
            again = place.run(sandbox, "--yes", check=0)
            assert len(organisation.merges) == 2
            assert {(one["email"], one["code"]) for one in again.report["skipped"]} == {
                ("person1@example.com", "undone"), ("person2@example.com", "undone"),
            }  # fmt: skip
        (place.folder / "savepoint.db").unlink()
        place.run(sandbox, "--yes", check=0)
        assert len(organisation.merges) == 2, "the copy knows it, too"
        named = place.run(sandbox, "--yes", "--email", "person2@example.com", check=0)
        assert (
            len(organisation.merges) == 3
            and organisation.contacts[pairs[1][0]]["external_ref"] == "user_2"
        )
        assert named.report["summary"]["successful_merges"] == 1
        assert place.run(sandbox, "--yes", check=0).report["summary"]["already_merged"] == 1
        assert "2 undone" in place.run(sandbox, "--status", check=0).out


def test_what_does_not_stand_as_the_merge_has_left_it_is_refused(place: Workplace) -> None:
    organisation, pairs = seeded(4)
    with Sandbox(organisation) as sandbox:
        path, merge = merged(place, sandbox)
        organisation.contacts[pairs[0][0]]["external_ref"] = "user_other"
        organisation.contacts[pairs[1][0]]["state"] = "locked"
        organisation.delete_contact(pairs[2][0])
        last = next(
            one
            for one in merge.report["successful_merges"]
            if one["email"] == "person4@example.com"
        )
        backup = place.folder / last["backup"]
        (backup / "manifest.json").write_text("{}")
        asked = len(sandbox.requests)
        result = place.run(sandbox, "--yes", "--undo", path, check=1)
        assert [one["code"] for one in result.report["failed"]] == [
            "external_ref_changed", "not_active", "not_found", "backup_failed",
        ]  # fmt: skip
        assert no_writes(sandbox.requests[asked:])
        assert place.run(sandbox, "--yes", check=0).report["summary"]["already_merged"] == 4


def test_a_backup_of_contacts_that_were_never_merged_is_refused(place: Workplace) -> None:
    organisation, _ = seeded(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("400", "rev-users.merge")]) as sandbox:
        place.run(sandbox, "--yes", "--merge-timeout", "1", check=1)
        (folder,) = (place.folder / "backups").glob("*/*/")
        asked = len(sandbox.requests)
        assert (
            place.run(sandbox, "--yes", "--undo", str(folder)).report["failed"][0]["code"]
            == "not_merged"
        )
        assert no_writes(sandbox.requests[asked:])
    for nothing in (place.csv, place.folder / "backups", place.folder / "nowhere"):
        assert place.run(sandbox, "--yes", "--undo", str(nothing), check=2).report == {}


def test_a_field_that_is_refused_is_left_out_once_and_named(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.refused_fields = ("description", "phone_numbers")
        (entry,) = place.run(sandbox, "--yes", "--undo", path, check=0).report["undone"]
        assert sandbox.count("rev-users.create") == 3
    made = organisation.contacts[entry["contact"]["id"]]
    assert (made["external_ref"], made["display_name"]) == (
        "user_1",
        "P. 1",
    ) and "description" not in made
    why = {item["what"]: item["why"] for item in entry["not_restored"]}
    assert "not permitted" in why["description"] and "not permitted" in why["phone_numbers"]


def held_by_another(sandbox: Sandbox) -> None:
    """As soon as the primary lets go of the reference, somebody else takes it."""

    def hook(stage: str, request: Request) -> None:
        if stage == "before" and request.endpoint == "rev-users.create":
            sandbox.organisation.visit("other@example.com", "user_1", "ORG1")
            sandbox.on_request = None

    sandbox.on_request = hook


@pytest.mark.parametrize(
    "trouble", the_rest_is_slow(["400", "409", "403", "email"], "403", "email")
)
def test_where_the_contact_is_refused_for_good_the_primary_gets_the_reference_again(
    place: Workplace, trouble: str
) -> None:
    organisation, pairs = seeded(1)
    with_a_third(organisation, pairs)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        after = truth(organisation)
        if trouble == "email":
            sandbox.unique_emails = True
        else:
            sandbox.faults.append(Fault(trouble, "rev-users.create"))
        result = place.run(sandbox, "--yes", "--undo", path, "--merge-timeout", "4")
        assert result.code == (3 if trouble == "403" else 1), result
        assert truth(organisation) == after
        assert {one["code"] for one in result.report["failed"]} == {
            "forbidden" if trouble == "403" else "contact_refused"
        }
        summary = place.run(sandbox, "--yes", check=0).report["summary"]
        assert summary["already_merged"] == 2
        sandbox.faults.clear()
        sandbox.unique_emails = False
        assert len(place.run(sandbox, "--yes", "--undo", path, check=0).report["undone"]) == 2


def test_a_reference_that_another_user_has_taken_is_not_taken_from_them(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        held_by_another(sandbox)
        result = place.run(sandbox, "--yes", "--undo", path, check=1)
        assert [one["code"] for one in result.report["unfinished"]] == ["external_ref_conflict"]
        assert len(truth(organisation)["users"]) == 2


def test_the_application_may_have_made_the_contact_meanwhile(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)

        def hook(stage: str, request: Request) -> None:
            if stage == "before" and request.endpoint == "rev-users.create":
                organisation.visit("person1@example.com", "user_1", "ORG1")
                sandbox.on_request = None

        sandbox.on_request = hook
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
    names = {entry["contact"]["id"]: entry["duplicate"]["id"] for entry in result.report["undone"]}
    assert truth(organisation, names)["people"] == before["people"]


@pytest.mark.parametrize(
    "kind, endpoint",
    diagonal(
        ("reset-before", "reset-after", "cut", "500-after", "502", "doubled"),
        ("rev-users.create", "rev-users.update", "works.update"),
    ),
)
def test_lost_answers_make_no_contact_twice(place: Workplace, kind: str, endpoint: str) -> None:
    organisation, pairs = seeded(1)
    with_a_third(organisation, pairs)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.faults.append(Fault(kind, endpoint, times=2))
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


@pytest.mark.parametrize("kind", ["reset-before", "reset-after"])
def test_a_contact_without_its_reference_is_made_once_too(place: Workplace, kind: str) -> None:
    """The system's own references may not be given; such a contact is known by its email and its being new."""
    organisation, pairs = seeded(1)
    with_a_third(organisation, pairs)
    before = truth(organisation)

    def is_system(body: Dict[str, Any]) -> bool:
        return str(body.get("external_ref")).startswith("REVU-")

    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.faults += [
            Fault("409", "rev-users.create", match=is_system),
            Fault(kind, "rev-users.create", match=lambda body: "external_ref" not in body, times=1),
        ]
        result = place.run(sandbox, "--yes", "--undo", path, "--merge-timeout", "6")
        assert result.code == (0 if kind == "reset-after" else 1)
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
    third = next(
        one for one in result.report["undone"] if one["duplicate"]["display_id"] == "REVU-E1"
    )
    assert "external_ref" in {item["what"] for item in third["not_restored"]}
    names = {entry["contact"]["id"]: entry["duplicate"]["id"] for entry in result.report["undone"]}
    assert truth(organisation, names)["people"] == before["people"]
    assert len(truth(organisation)["users"]) == 3


def test_a_token_that_may_not_write_is_told_so_before_anything_is_changed(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        after = truth(organisation)
        for endpoint in ("works.update", "conversations.update"):
            sandbox.forbidden = (endpoint,)
            result = place.run(sandbox, "--yes", "--undo", path, check=2)
            assert truth(organisation) == after and f"may not call {endpoint}" in result.err
        sandbox.forbidden = ()
        sandbox.faults.append(
            Fault("403", "works.update", skip=2)
        )  # tickets and issues are tried first
        result = place.run(sandbox, "--yes", "--undo", path)
        assert result.code == 1 and len(result.report["unfinished"]) == 2
        sandbox.faults.clear()
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


def test_a_merge_run_leaves_a_group_alone_whose_undo_is_not_finished(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.faults.append(Fault("400", "works.update", skip=1))
        place.run(sandbox, "--yes", "--undo", path, check=1)
        place.export(organisation, leave_out=[pairs[0][1]])
        result = place.run(sandbox, "--yes", check=1)
        assert result.codes == {"person1@example.com": "undo_unfinished"}
        assert f"--undo {path}" in result.report["failed_merges"][0]["error"]
        sandbox.faults.clear()
        place.run(sandbox, "--yes", "--undo", path, check=0)
    assert len(organisation.merges) == 1


def test_between_reference_and_contact_nothing_waits_for_quota(place: Workplace) -> None:
    organisation, pairs = seeded(4)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
    with Sandbox(organisation, quota=(14, 1.0)) as sandbox:
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
        names = assert_undone(organisation, before, result)
        calls = [request for request in sandbox.requests if request.status != 429]
        for made in names:
            reference = organisation.contacts[made]["external_ref"]
            created = next(
                one
                for one in calls
                if one.body.get("external_ref") == reference and "id" not in one.body
            )
            freed = next(
                one for one in calls
                if one.endpoint == "rev-users.update" and one.body["id"].endswith(f"/P{reference[5:]}")
            )  # fmt: skip
            between = [one.endpoint for one in calls if freed.number < one.number < created.number]
            assert len(between) <= 8 and created.started - freed.started < 0.9, between


def test_an_unfinished_merge_is_undone_too(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    before = truth(organisation)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("400", "rev-users.update")]) as sandbox:
        place.run(sandbox, "--yes", "--merge-timeout", "1", check=1)
        sandbox.faults.clear()
        (path,) = (place.folder / "reports").glob("merge_report_*.json")
        assert_undone(
            organisation, before, place.run(sandbox, "--yes", "--undo", str(path), check=0)
        )


def test_lists_that_lag_are_waited_for(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.list_lag = 1.5
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


def interrupt_at(
    sandbox: Sandbox, process: "subprocess.Popen[str]", endpoint: str, stage: str
) -> None:
    """Send Ctrl-C while the first such request is under way, and answer it once that has surely been noticed."""

    def hook(at: str, request: Request) -> None:
        if at == stage and request.endpoint == endpoint:
            sandbox.on_request = None
            process.send_signal(signal.SIGINT)
            time.sleep(0.7)

    sandbox.on_request = hook


@posix
@pytest.mark.parametrize(
    "endpoint, stage", [("rev-users.update", "after"), ("rev-users.create", "before")]
)
def test_an_interruption_between_reference_and_contact_leaves_the_reference_on_a_contact(
    place: Workplace, endpoint: str, stage: str
) -> None:
    organisation, pairs = seeded(2)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        process = place.start(sandbox, "--yes", "--undo", path)
        interrupt_at(sandbox, process, endpoint, stage)
        process.communicate(timeout=60)
        assert process.returncode == 130
        holders = [
            one
            for one, user in truth(organisation)["users"].items()
            if user["external_ref"] == "user_1"
        ]
        assert (
            len(holders) == 1
            and holders[0] not in pairs[0]
            and sandbox.count("rev-users.create") == 1
        )
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


def test_an_interruption_waits_for_a_hanging_contact_no_longer_than_ten_seconds(
    place: Workplace,
) -> None:
    organisation, pairs = seeded(1)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        sandbox.faults.append(Fault("hang-after", "rev-users.create", times=1))
        process = place.start(sandbox, "--yes", "--undo", path, DEVREV_TIMEOUT="60")
        interrupt_at(sandbox, process, "rev-users.create", "before")
        process.communicate(timeout=40)
        assert process.returncode == 130
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


def test_what_a_merge_carried_to_the_primary_is_removed_and_what_people_wrote_stays(
    place: Workplace,
) -> None:
    organisation, pairs = seeded(3)
    for n, (primary, _) in enumerate(pairs, 1):
        organisation.change(organisation.contacts[primary], phone_numbers=[f"+4940{n}"])
    before = truth(organisation)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--yes", "--carry-fields", check=0)
        (path,) = (place.folder / "reports").glob("merge_report_*.json")
        first, second, third = (organisation.contacts[primary] for primary, _ in pairs)
        assert first["description"] == "The account of 1." and len(first["phone_numbers"]) == 2
        organisation.change(
            second,
            description="Written by an agent.",
            phone_numbers=[*second["phone_numbers"], "+4950"],
        )
        # The fields of the third are refused in one update with the reference, one by one afterwards, or for good.
        sandbox.faults.append(
            Fault(
                "400", "rev-users.update", match=lambda body: len(body) > 2 and "P3" in body["id"]
            )
        )
        sandbox.faults.append(
            Fault(
                "403",
                "rev-users.update",
                match=lambda body: "description" in body and "P3" in body["id"],
            )
        )
        result = place.run(sandbox, "--yes", "--undo", str(path), check=0)
    entries = {entry["email"]: entry for entry in result.report["undone"]}
    left = {
        email: [item["field"] for item in entry["fields_left"]] for email, entry in entries.items()
    }
    assert left == {
        "person1@example.com": [], "person2@example.com": ["description"], "person3@example.com": ["description"],
    }  # fmt: skip
    assert "403" in entries["person3@example.com"]["fields_left"][0]["why"]
    assert (
        first["phone_numbers"] == third["phone_numbers"][:0] + ["+49401"]
        and not first["description"]
    )
    assert (
        second["phone_numbers"] == ["+49402", "+4950"]
        and second["description"] == "Written by an agent."
    )
    assert third["phone_numbers"] == ["+49403"] and third["description"] == "The account of 3."
    names = {entry["contact"]["id"]: entry["duplicate"]["id"] for entry in entries.values()}
    after = truth(organisation, names)
    assert after["people"] == before["people"]
    assert {one: user["external_ref"] for one, user in after["users"].items()} == {
        one: user["external_ref"] for one, user in before["users"].items()
    }


def test_the_fields_come_back_with_the_reference_where_no_contact_can_be_created(
    place: Workplace,
) -> None:
    organisation, pairs = seeded(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--yes", "--carry-fields", check=0)
        (path,) = (place.folder / "reports").glob("merge_report_*.json")
        after = truth(organisation)
        sandbox.unique_emails = True
        place.run(sandbox, "--yes", "--undo", str(path), "--merge-timeout", "4", check=1)
        assert truth(organisation) == after


def test_an_unverified_contact_is_verified_when_it_is_created_again(place: Workplace) -> None:
    organisation = Organisation()
    organisation.add_contact("P1", "person1@example.com", verified=False)
    organisation.add_contact("D1", "person1@example.com", "user_1", verified=False)
    with Sandbox(organisation, verified_shown="shown") as sandbox:
        path, _ = merged(place, sandbox)
        (entry,) = place.run(sandbox, "--yes", "--undo", path, check=0).report["undone"]
    lost = {item["what"]: item["why"] for item in entry["not_restored"]}
    assert "verified" in lost["verification"] and "is_verified" not in lost


@pytest.mark.parametrize(
    "broken", [("primary", "id", 5), ("duplicate", "old_external_ref", []), ("backup", None, 12)]
)
def test_a_report_of_another_shape_is_refused(place: Workplace, broken: Any) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
        (path,) = (place.folder / "reports").glob("merge*.json")
        report = json.loads(path.read_text(encoding="utf-8"))
        (entry,), (role, name, value) = report["successful_merges"], broken
        entry.update({role: {**entry[role], name: value} if name else value})
        path.write_text(json.dumps(report), encoding="utf-8")
        result = place.run(sandbox, "--undo", str(path), check=2)
    assert "is neither a backup folder nor a merge report" in result.err


def test_duplicates_that_shared_a_ticket_get_it_again_after_a_refusal(place: Workplace) -> None:
    organisation = Organisation()
    keys = (("A", "user_1"), ("B", None), ("C", None))
    one, other, primary = (
        organisation.add_contact(key, "ada@example.com", reference) for key, reference in keys
    )
    for _ in range(2):
        organisation.add_work(owned_by=[primary], reported_by=[primary])
    organisation.add_work(owned_by=[one], reported_by=[one])
    shared = organisation.add_work(owned_by=[one, other], reported_by=[one])
    place.export(organisation)
    with Sandbox(organisation, merge_delay=0.05) as sandbox:
        place.run(sandbox, check=0)
        (report,) = (place.folder / "reports").glob("merge*.json")
        sandbox.restricted_writes = [shared]
        place.run(sandbox, "--undo", str(report), check=1)
        sandbox.restricted_writes = ()
        undone = place.run(sandbox, "--undo", str(report), check=0).report["undone"]
    again = {entry["duplicate"]["id"]: entry["contact"]["id"] for entry in undone}
    assert {user["id"] for user in organisation.works[shared]["owned_by"]} == {
        again[one],
        again[other],
    }
    assert [user["id"] for user in organisation.works[shared]["reported_by"]] == [again[one]]


def test_one_restricted_object_keeps_no_other_group_from_being_undone(place: Workplace) -> None:
    organisation, pairs = seeded(3)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        mine = sorted(set().union(*roles_of(organisation, pairs[0][0]).values()))
        sandbox.restricted_writes = mine
        result = place.run(sandbox, "--yes", "--undo", path, check=1)
        assert [one["email"] for one in result.report["undone"]] == [
            "person2@example.com",
            "person3@example.com",
        ]
        (entry,) = result.report["failed"]
        assert (
            entry["code"] == "forbidden"
            and organisation.contacts[pairs[0][0]]["external_ref"] == "user_1"
        )
        sandbox.restricted_writes = [one for one in mine if ":ticket/" in one][:1]
        (entry,) = place.run(sandbox, "--yes", "--undo", path, check=1).report["unfinished"]
        assert entry["code"] == "not_restored" and len({item["id"] for item in entry["left"]}) == 1
        # A group that can't be finished has a way out.
        place.run(sandbox, "--yes", "--settle", "person1@example.com", check=0)
        again = place.run(sandbox, "--yes", "--undo", path, check=0)
        assert [one["code"] for one in again.report["skipped"]] == ["undo_settled"]


def test_a_merge_whose_polls_give_no_usable_answer_is_undone_too(place: Workplace) -> None:
    """Lists decide whether the duplicate still exists."""
    organisation, _ = seeded(1)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        for gone in ("410", "404-other"):
            sandbox.gone = gone
            assert "0 refused" not in place.run(sandbox, "--undo", path, "--preview", check=0).out
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))


def test_an_undo_of_merges_that_moved_no_reference(place: Workplace) -> None:
    organisation, pairs = seeded(2)
    before = truth(organisation)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--yes", "--primary", "user", check=0)
        (path,) = (place.folder / "reports").glob("merge_report_*.json")
        assert {into for into, _ in organisation.merges} == {duplicate for _, duplicate in pairs}
        asked = len(sandbox.requests)
        assert_undone(
            organisation, before, place.run(sandbox, "--yes", "--undo", str(path), check=0)
        )
        assert "rev-users.update" not in {one.endpoint for one in sandbox.requests[asked:]}


# --------------------------------------------------------------------------------------------------
# What is planned
# --------------------------------------------------------------------------------------------------


def people(*ids: str) -> List[Dict[str, str]]:
    return [{"id": one} for one in ids]


@pytest.mark.parametrize(
    "now, stays, expected, why",
    [
        (("p",), False, ["new"], ""),
        (("p",), True, ["p", "new"], ""),
        (("a", "p", "b"), False, ["a", "new", "b"], ""),
        (("a", "old", "p"), False, ["a", "new", "p"], ""),  # the merge has left the old id
        (
            ("a", "gone", "p"),
            False,
            ["a", "again", "new"],
            "",
        ),  # another contact that was created again
        (("new", "p"), False, None, ""),  # an undo that was killed has written it
        (("a", "b"), False, None, "given to others"),
        ((), True, None, "given to others"),
        (None, True, None, "deleted"),
    ],
)
def test_what_is_written_to_an_object(now: Any, stays: bool, expected: Any, why: str) -> None:
    thing = None if now is None else {"id": "thing", "members": people(*now)}
    kept = {("thing", "members")} if stays else {("thing", "owned_by"), ("other", "members")}
    changes, left = plan_restore(
        thing, ["members"], "p", "new", {"old": "new", "gone": "again"}, kept
    )
    assert changes == ({"members": expected} if expected else {})
    assert [(item["role"], item["why"]) for item in left] == ([("members", why)] if why else [])


@pytest.mark.parametrize(
    "carried, before, live, update, left",
    [
        ({"description": "d"}, {"description": None}, {"description": "d"}, {"description": ""}, []),
        ({"description": "d"}, {"description": ""}, {"description": "new"}, {}, ["description"]),
        ({"description": "d"}, {"description": ""}, {"description": ""}, {}, []),  # removed already, or never carried
        ({"display_name": "Ana"}, {"display_name": "REVU-1"}, {"display_name": "Ana"}, {"display_name": "REVU-1"}, []),
        ({"phone_numbers": ["1", "2"]}, {"phone_numbers": ["1"]}, {"phone_numbers": ["1", "2"]},
         {"phone_numbers": ["1"]}, []),
        ({"phone_numbers": ["1", "2"]}, {"phone_numbers": ["1"]}, {"phone_numbers": ["3", "2", "1"]},
         {"phone_numbers": ["3", "1"]}, []),
        ({"phone_numbers": ["2"]}, {"phone_numbers": None}, {"phone_numbers": ["2"]}, {"phone_numbers": []}, []),
        ({"phone_numbers": ["2"]}, {}, {"phone_numbers": ["3"]}, {}, []),
        ({"phone_numbers": ["2"]}, {}, {}, {}, []),
        ({}, {}, {"description": "d", "phone_numbers": ["1"]}, {}, []),
    ],
)  # fmt: skip
def test_what_a_merge_has_added_to_the_primary(
    carried: Dict[str, Any],
    before: Dict[str, Any],
    live: Dict[str, Any],
    update: Dict[str, Any],
    left: List[str],
) -> None:
    contact = Contact.from_json({**dict.fromkeys(COLUMNS, ""), "tickets": 0})
    pair = Pair(contact, contact, None, fields_to_carry=carried, fields_before=before)
    found, stays = plan_fields(pair, live)
    assert found == update and [item["field"] for item in stays] == left


# --------------------------------------------------------------------------------------------------
# Killed
# --------------------------------------------------------------------------------------------------


def survive_kill(folder: Path, number: int, stage: str, lose: bool = False) -> bool:
    """Kill an undo at its n-th request, and finish it; returns whether it got that far."""
    folder.mkdir(exist_ok=True)
    place = Workplace(folder)
    organisation, pairs = seeded(2)
    with_a_third(organisation, pairs)
    before = truth(organisation)
    with Sandbox(organisation, merge_delay=0.02) as sandbox:
        path, _ = merged(place, sandbox)
        asked, process = len(sandbox.requests), []  # type: Tuple[int, List[Any]]

        def hook(at: str, request: Request) -> None:
            if request.number == asked + number and at == stage and process:
                if at == "before":
                    sandbox.faults.insert(
                        0, Fault("reset-before", match=lambda body: body is request.body)
                    )
                process[0].kill()
                process[0].wait()

        sandbox.on_request = hook
        process.append(place.start(sandbox, "--yes", "--undo", path))
        process[0].communicate(timeout=60)
        killed = process[0].returncode == -signal.SIGKILL
        sandbox.on_request = None
        sandbox.faults.clear()
        if lose and (place.folder / "savepoint.db").exists():
            (place.folder / "savepoint.db").unlink()
        made = place.run(sandbox, "--yes", "--undo", path, check=0)
        assert_undone(organisation, before, made)
        assert organisation.merges and len(truth(organisation)["users"]) == 5
    return killed


@posix
@pytest.mark.parametrize(
    "number, stage", [(14, "before"), (15, "after"), (16, "before"), (17, "after")]
)
def test_an_undo_killed_at_some_requests_is_finished_by_the_same_command(
    tmp_path: Path, number: int, stage: str
) -> None:
    assert survive_kill(tmp_path, number, stage, lose=number % 2 == 0)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("part", range(3))
def test_an_undo_killed_at_any_request_is_finished_by_the_same_command(
    tmp_path: Path, stage: str, part: int
) -> None:
    """All requests, in parts; every other time the savepoint is lost too."""
    number = 1 + part
    while survive_kill(
        tmp_path / str(number), number, stage, lose=(number % 2 == 0) is (stage == "before")
    ):
        number += 3
    assert number > 30


def survive_kill_at_write(folder: Path, number: int, stage: str) -> bool:
    """The same, killed at its n-th durable write."""
    folder.mkdir(exist_ok=True)
    place = Workplace(folder)
    organisation, pairs = seeded(1)
    with_a_third(organisation, pairs)
    before = truth(organisation)
    with Sandbox(organisation, merge_delay=0.02) as sandbox:
        path, _ = merged(place, sandbox)
        killer = [sys.executable, str(ROOT / "tests" / "process" / "killer.py"), str(number), stage]
        first = place.run(sandbox, "--yes", "--undo", path, python=killer)
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))
    return first.code == -signal.SIGKILL


@posix
@pytest.mark.parametrize("number", [8, 14])
def test_an_undo_killed_at_some_durable_writes_is_finished_by_the_same_command(
    tmp_path: Path, number: int
) -> None:
    assert survive_kill_at_write(tmp_path, number, ("before", "after")[number % 2])


@posix
@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_an_undo_killed_at_any_durable_write_is_finished_by_the_same_command(
    tmp_path: Path, part: int
) -> None:
    """All writes, in parts; before and after take turns: what lies between two writes is a kill at a request."""
    number = 1 + part
    while survive_kill_at_write(tmp_path / str(number), number, ("before", "after")[number % 2]):
        number += 3
    assert number > 15


@posix
@pytest.mark.parametrize("typed, code", [("undo\n", 0), ("merge\n", 2), ("\x03", 130)])
def test_on_a_terminal_only_a_typed_undo_continues(place: Workplace, typed: str, code: int) -> None:
    organisation, _ = seeded(2)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        asked = len(sandbox.requests)
        terminal = Terminal(place, sandbox, "--undo", path)
        text = terminal.read_until("Type undo")
        for fact in ("SANDBOX1", "Dana Developer", "2 merges", "can't be restored"):
            assert fact in text
        assert no_writes(sandbox.requests[asked:])
        terminal.type(typed)
        assert terminal.end() == code, terminal.text
        assert sandbox.count("rev-users.create") == (0 if code else 2)


@posix
def test_an_interrupted_undo_reports_and_is_resumed(place: Workplace) -> None:
    organisation, _ = seeded(4)
    before = truth(organisation)
    with Sandbox(organisation, latency=0.03) as sandbox:
        path, _ = merged(place, sandbox)
        process = place.start(sandbox, "--yes", "--undo", path)
        while not sandbox.count("rev-users.create"):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        (report,) = (place.folder / "reports").glob("undo_report_*.json")
        summary = json.loads(report.read_text(encoding="utf-8"))["summary"]
        assert summary["unfinished"] and summary["left"] and sum(
            summary[name] for name in ("undone", "unfinished", "failed", "left")
        ) == summary["pairs"] == 4  # fmt: skip
        assert_undone(
            organisation,
            before,
            place.run(sandbox, "--yes", "--undo", path, "--limit", "4", check=0),
        )


def test_email_and_limit_take_back_some(place: Workplace) -> None:
    organisation, pairs = seeded(3)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        place.run(sandbox, "--yes", "--undo", path, "--email", "Person2@example.com", check=0)
        assert organisation.contacts[pairs[1][0]]["external_ref"] == "REVU-P2"
        result = place.run(sandbox, "--yes", "--undo", path, "--limit", "1", check=0)
        assert (result.report["summary"]["undone"], result.report["summary"]["left"]) == (2, 1)
        assert sandbox.count("rev-users.create") == 2


def test_an_undo_from_another_folder_is_refused_and_names_the_folder_that_has_the_history(
    place: Workplace,
) -> None:
    """Unknown at home, the merge would be requested again by the next export."""
    organisation, _ = seeded(1)
    with Sandbox(organisation) as sandbox:
        path, merge = merged(place, sandbox)
        (place.folder / "elsewhere").mkdir()
        elsewhere = Workplace(place.folder / "elsewhere")
        asked = len(sandbox.requests)
        for named in (path, merge.report["successful_merges"][0]["backup"]):
            result = elsewhere.run(sandbox, "--yes", "--undo", str(place.folder / named), check=2)
            assert f"run --undo in {place.folder}" in result.err and not result.report
        shutil.copy(str(place.folder / path), str(elsewhere.folder / "report.json"))
        assert "not below" in elsewhere.run(sandbox, "--yes", "--undo", "report.json", check=2).err
        assert len(sandbox.requests) == asked
        place.run(sandbox, "--yes", "--undo", str(place.folder / path), check=0)


def test_groups_that_share_an_object_do_not_undo_each_other(place: Workplace) -> None:
    """While the second group hands its many tickets back, the third writes to what both share."""
    organisation = Organisation()
    pairs = []
    for n in range(1, 4):
        email = f"person{n}@example.com"
        pairs.append(
            (
                organisation.add_contact(f"P{n}", email),
                organisation.add_contact(f"D{n}", email, f"user_{n}"),
            )
        )
    for _ in range(60):
        organisation.add_work(reported_by=[pairs[1][1]])
    shared = organisation.add_conversation([pairs[1][1], pairs[2][1], organisation.dev_user["id"]])
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
    with Sandbox(organisation, latency=0.03) as sandbox:
        result = place.run(sandbox, "--yes", "--undo", path, "--merge-timeout", "10", check=0)
    assert_undone(organisation, before, result)
    assert len(organisation.conversations[shared]["members"]) == 3


def test_who_joins_while_much_is_written_stays(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    agent = organisation.dev_user["id"]
    things = [organisation.add_conversation([pairs[0][1]]) for _ in range(30)]
    joined: List[str] = []

    def join(stage: str, request: Request) -> None:
        """Once the first conversation is written, an agent joins all others."""
        tried = request.endpoint == "conversations.update" and "members" not in request.body
        if (
            stage == "before"
            and request.endpoint == "conversations.update"
            and not (joined or tried)
        ):
            joined[:] = [one for one in things if one != request.body["id"]]
            for one in joined:
                organisation.give(one, "members", [pairs[0][0], agent])

    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
    with Sandbox(organisation, on_request=join) as sandbox:
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
    made = result.report["undone"][0]["contact"]["id"]
    for one in joined:
        assert {who["id"] for who in organisation.conversations[one]["members"]} == {agent, made}
    assert len(joined) >= 29


def is_write(body: Dict[str, Any]) -> bool:
    """Whether an update sets anybody: what sets nothing only tries whether the token may."""
    return any(role in body for role in PEOPLE)


def test_an_update_whose_answer_shows_other_people_is_read_and_written_again(
    place: Workplace,
) -> None:
    organisation, pairs = seeded(1)
    before, agent = truth(organisation), organisation.dev_user["id"]
    overwritten: List[str] = []

    def overwrite(answer: Dict[str, Any]) -> Dict[str, Any]:
        overwritten.append(answer["conversation"]["id"])
        organisation.give(overwritten[0], "members", [pairs[0][0], agent])
        return {"conversation": dict(organisation.conversations[overwritten[0]])}

    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
    fault = Fault("changed", "conversations.update", match=is_write, times=1, detail=overwrite)
    with Sandbox(organisation, faults=[fault]) as sandbox:
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
        writes = [one.body["id"] for one in sandbox.requests if is_write(one.body)]
    assert writes.count(overwritten[0]) == 2
    assert_undone(organisation, before, result)


def test_who_joins_after_a_write_whose_answer_is_lost_stays(place: Workplace) -> None:
    """The object is read again before anything else is written to it."""
    organisation, pairs = seeded(1)
    joined: List[str] = []

    def join(stage: str, request: Request) -> None:
        if (
            stage == "after"
            and request.endpoint == "conversations.update"
            and is_write(request.body)
            and not joined
        ):
            talk = organisation.conversations[request.body["id"]]
            joined.append(talk["id"])
            organisation.give(
                talk["id"], "members", [*(one["id"] for one in talk["members"]), visitor]
            )

    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
    visitor = organisation.add_contact("V", "visitor@example.com")
    fault = Fault("reset-after", "conversations.update", match=is_write, times=1)
    with Sandbox(organisation, faults=[fault], on_request=join) as sandbox:
        place.run(sandbox, "--yes", "--undo", path, check=0)
    assert visitor in {one["id"] for one in organisation.conversations[joined[0]]["members"]}


@pytest.mark.parametrize("order", [1, -1])
def test_exactly_the_merges_that_a_report_names_are_undone(place: Workplace, order: int) -> None:
    """The third contact's merge is unfinished in the first report and ends in the second."""
    organisation, pairs = seeded(1)
    pairs = with_a_third(organisation, pairs)
    before = truth(organisation)
    place.export(organisation)
    third = Fault(
        "400", "rev-users.merge", match=lambda body: body["secondary_user"] == pairs[1][1]
    )
    with Sandbox(organisation, faults=[third]) as sandbox:
        place.run(sandbox, "--yes", "--merge-timeout", "1", check=1)
        sandbox.faults.clear()
        place.run(sandbox, "--yes", "--merge-timeout", "1", check=0)
        names: Dict[str, str] = {}
        undone = []
        for report in sorted((place.folder / "reports").glob("merge_report_*.json"))[::order]:
            result = place.run(sandbox, "--yes", "--undo", str(report), check=0)
            made = {one["contact"]["id"]: one["duplicate"]["id"] for one in result.report["undone"]}
            undone.append(sorted(set(made.values()) - set(names.values())))
            names.update(made)
        assert undone == (
            [[pairs[0][1], pairs[1][1]], []] if order == 1 else [[pairs[1][1]], [pairs[0][1]]]
        )
        assert truth(organisation, names) == before


def chain(place: Workplace, sandbox: Sandbox) -> List[str]:
    """Merge the first contact into the second, and in a later run the second into the third; return both reports."""
    organisation = sandbox.organisation
    place.export(organisation, leave_out=[organisation.don("identity", "revu", "E1")])
    place.run(sandbox, "--yes", check=0)
    place.export(organisation, leave_out=[organisation.don("identity", "revu", "D1")])
    place.run(sandbox, "--yes", check=0)
    assert [into.rpartition("/")[2] for into, _ in organisation.merges] == ["P1", "E1"]
    return [
        f"reports/{path.name}"
        for path in sorted((place.folder / "reports").glob("merge_report_*.json"))
    ]


@pytest.mark.parametrize(
    "together, refused, gone",
    [
        (False, False, "404"),
        (True, False, "404"),
        (False, True, "404"),
        (True, False, "301"),
        (False, False, "primary"),
    ],
)
def test_a_chain_is_undone_last_merge_first(
    place: Workplace, together: bool, refused: bool, gone: str
) -> None:
    """DevRev may refuse the `REVU-` reference of an old id to the contact that is created again."""
    organisation, pairs = seeded(1)
    with_a_third(organisation, pairs)
    before = truth(organisation)
    with Sandbox(organisation, gone=gone) as sandbox:
        first, last = chain(place, sandbox)
        merged_twice = truth(organisation)
        if refused:
            sandbox.faults.append(
                Fault(
                    "400",
                    "rev-users.update",
                    match=lambda body: body.get("external_ref") == "REVU-P1",
                )
            )
        result = place.run(sandbox, "--yes", "--undo", first, check=1)
        (entry,) = result.report["failed"]
        assert (
            entry["code"] == "merged_onward"
            and last in entry["error"]
            and truth(organisation) == merged_twice
        )
        if together:
            both = {**read(place.folder / first)}
            both["successful_merges"] += read(place.folder / last)["successful_merges"]
            (place.folder / "reports" / "both.json").write_text(json.dumps(both))
            made, middle = place.run(
                sandbox, "--yes", "--undo", "reports/both.json", check=0
            ).report["undone"]
            if made["duplicate"]["id"] == pairs[0][0]:
                made, middle = middle, made
        else:
            (middle,) = place.run(sandbox, "--yes", "--undo", last, check=0).report["undone"]
            (made,) = place.run(sandbox, "--yes", "--undo", first, check=0).report["undone"]
        names = {one["contact"]["id"]: one["duplicate"]["id"] for one in (middle, made)}
        after = truth(organisation, names)
        if refused:
            own = organisation.contacts[middle["contact"]["id"]]["display_id"]
            assert after["users"][pairs[0][0]].pop("external_ref") == own
            assert before["users"][pairs[0][0]].pop("external_ref") == "REVU-P1"
        assert after == before


def test_what_was_merged_again_on_purpose_is_not_undone_by_the_first_report(
    place: Workplace,
) -> None:
    organisation, pairs = seeded(2)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        (undone, _) = place.run(sandbox, "--yes", "--undo", path, check=0).report["undone"]
        place.export(organisation, leave_out=[duplicate for _, duplicate in pairs])
        again = place.run(sandbox, "--yes", "--email", "person1@example.com", check=0)
        after, asked = truth(organisation), len(sandbox.requests)
        result = place.run(sandbox, "--yes", "--undo", path, check=0)
        (skipped,) = result.report["skipped"]
        later = max((place.folder / "reports").glob("merge_report_*.json"))
        assert skipped["code"] == "merged_again" and f"reports/{later.name}" in skipped["error"]
        assert skipped["email"] == "person1@example.com" and len(result.report["undone"]) == 1
        assert truth(organisation) == after and no_writes(sandbox.requests[asked:])
        assert again.report["successful_merges"][0]["duplicate"]["id"] == undone["contact"]["id"]
        # Its own report undoes it; the first one has nothing to do then, either.
        assert (
            place.run(sandbox, "--yes", "--undo", str(later), check=0).report["summary"]["undone"]
            == 1
        )
        assert not place.run(sandbox, "--yes", "--undo", path, check=0).report["skipped"]


def test_a_folder_of_an_email_stands_for_its_newest_backup_that_was_merged(
    place: Workplace,
) -> None:
    organisation, pairs = seeded(1)
    folder = place.folder / "backups" / "person1@example.com"
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        place.run(sandbox, "--yes", "--undo", path, check=0)
        place.export(organisation, leave_out=[pairs[0][1]])
        merge = place.run(sandbox, "--yes", "--email", "person1@example.com", check=0)
        # A later backup whose merge was never requested, and names that sort before the one that counts.
        unmerged = folder / "20991231_000000"
        shutil.copytree(
            str(place.folder / merge.report["successful_merges"][0]["backup"]), str(unmerged)
        )
        preview = place.run(sandbox, "--undo", str(folder), "--preview", "--json", check=0)
        (entry,) = json.loads(preview.out)["to_undo"]
        assert entry["backup"] == merge.report["successful_merges"][0]["backup"]
        for count in (3, 3):  # undone since or not: never the older one instead
            result = place.run(sandbox, "--yes", "--undo", str(folder), check=0)
            assert (
                result.report["run"]["undo"] == entry["backup"]
                and result.report["summary"]["undone"] == 1
            )
            assert len(truth(organisation)["users"]) == count - 1
        forget(place)
        assert (
            "name one of its backups"
            in place.run(sandbox, "--yes", "--undo", str(folder), check=2).err
        )


def test_a_merge_that_the_savepoint_does_not_know_is_undone_from_its_report(
    place: Workplace,
) -> None:
    organisation, _ = seeded(2)
    before = truth(organisation)
    with Sandbox(organisation) as sandbox:
        path, _ = merged(place, sandbox)
        forget(place)
        assert_undone(organisation, before, place.run(sandbox, "--yes", "--undo", path, check=0))
        place.export(organisation, leave_out=[duplicate for _, duplicate in organisation.merges])
        again = place.run(sandbox, "--yes", check=0)
        assert {one["code"] for one in again.report["skipped"]} == {"undone"}, (
            "its rows were created"
        )


def test_a_merge_by_another_user_is_not_undone(place: Workplace) -> None:
    organisation, pairs = seeded(1)
    place.export(organisation)

    def delete(stage: str, request: Request) -> None:
        if stage == "before" and request.endpoint == "rev-users.merge":
            organisation.delete_contact(pairs[0][1])

    with Sandbox(organisation, on_request=delete) as sandbox:
        assert place.run(sandbox, "--yes", "--merge-timeout", "1", check=1).codes == {
            "person1@example.com": "merged_elsewhere"
        }
        sandbox.on_request = None
        (backup,) = (place.folder / "backups" / "person1@example.com").iterdir()
        assert "nothing to undo" in place.run(sandbox, "--yes", "--undo", str(backup), check=0).out
        assert not sandbox.count("rev-users.create")
