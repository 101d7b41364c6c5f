"""Scenes in which knowledge is older or weaker than it looks: what was requested is never forgotten, what is called done
is done, and nothing waits for ever."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from tests.sandbox import Fault, Organisation, Request, Sandbox
from tests.support import (
    Workplace,
    assert_merged,
    diagonal,
    organisation_of_pairs,
    pair,
    watch_merges,
)

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals or terminals")
QUICK = ("--merge-timeout", "1")


def reference_of(organisation: Organisation, contact: str) -> str:
    return str(organisation.contacts[contact]["external_ref"])


def after(
    endpoint: str, act: Callable[[Request], None], times: int = 1
) -> Callable[[str, Request], None]:
    """A hook that acts once an endpoint has been answered."""
    left = [times]

    def hook(stage: str, request: Request) -> None:
        if stage == "after" and request.endpoint == endpoint and left[0]:
            left[0] -= 1
            act(request)

    return hook


def stored(place: Workplace) -> Dict[str, Dict[str, Any]]:
    """What the savepoint knows of each pair, by the duplicate's id."""
    with contextlib.closing(sqlite3.connect(str(place.folder / "savepoint.db"))) as db:
        rows = db.execute("SELECT duplicate_id, document FROM pairs")
        return {duplicate: json.loads(document) for duplicate, document in rows}


# -- once asked, never forgotten ---------------------------------------------------------------------


@pytest.mark.parametrize("status, lost", diagonal((400, 403, 409), ("", "savepoint.db", "reports")))
def test_a_merge_that_was_refused_and_comes_all_the_same_is_finished(
    place: Workplace, status: int, lost: str
) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("merge-refused-late", detail=(status, 3600))]
    ) as sandbox:
        result = place.run(sandbox, *QUICK)
        assert result.code in (1, 2), result
        asked = {entry["duplicate"]["id"] for entry in result.report["unfinished_merges"]}
        assert asked == {
            request.body["secondary_user"]
            for request in sandbox.requests
            if "merge" in request.endpoint
        }
        if lost:
            gone = place.folder / lost
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        sandbox.faults.clear()
        sandbox.settle()
        place.export(
            organisation, leave_out=[duplicate for _, duplicate in pairs if duplicate in asked]
        )
        place.run(sandbox, *QUICK, check=0)
    assert_merged(organisation, pairs)


def test_a_pair_that_was_requested_days_ago_needs_one_poll_and_is_then_requested_again(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("merge-never", times=1)]) as sandbox:
        place.run(sandbox, *QUICK, check=1)
        for name in ("savepoint.db", "backups/savepoint-copy.db"):
            with sqlite3.connect(str(place.folder / name)) as db:
                (document,) = (
                    json.loads(row[0]) for row in db.execute("SELECT document FROM pairs")
                )
                document["requested_at"] -= 172800
                db.execute("UPDATE pairs SET document = ?", (json.dumps(document),))
        before = len(sandbox.requests)
        place.run(sandbox, "--merge-timeout", "60", check=0)
        endpoints = [request.endpoint for request in sandbox.requests[before:]]
        assert endpoints.index("rev-users.get") < endpoints.index("rev-users.merge")
    assert_merged(organisation, pairs)


def test_a_lost_savepoint_loses_nothing_that_was_requested_or_has_ended(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation)
    never = Fault("merge-never", match=lambda body: body["secondary_user"] == pairs[3][1])
    with Sandbox(organisation, faults=[never]) as sandbox:
        place.run(sandbox, *QUICK, check=1)
        (place.folder / "savepoint.db").unlink()
        sandbox.faults.clear()
        organisation.merge(*pairs[3])
        merges = sandbox.count("rev-users.merge")
        result = place.run(sandbox, *QUICK, check=0)
        assert sandbox.count("rev-users.merge") == merges
        assert [entry["email"] for entry in result.report["successful_merges"]] == [
            "person4@example.com"
        ]
        assert result.report["summary"]["already_merged"] == 3
    assert_merged(organisation, pairs)
    assert {row["state"] for row in stored(place).values()} == {"done"}


def test_a_backup_alone_is_no_proof_that_a_merge_was_requested(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation, {pairs[0][0]: {"TICKET_COUNT": 9}})
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=1)
        (place.folder / "savepoint.db").unlink()
        organisation.merge(*pairs[0])  # a colleague has
        result = place.run(sandbox, check=1)
        assert result.codes == {"person1@example.com": "not_found"}
    assert reference_of(organisation, pairs[0][0]) == "REVU-P1"


@posix
def test_what_was_not_sent_before_a_stop_was_not_requested(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(40, (0, 0))
    place.export(organisation)
    with Sandbox(organisation, latency=0.02) as sandbox:
        process: List[Any] = []

        def look(stage: str, request: Request) -> None:
            if (
                stage == "before"
                and request.endpoint == "rev-users.merge"
                and sandbox.count("rev-users.merge") > 8
            ):
                process and process.pop().send_signal(signal.SIGINT)

        sandbox.on_request = look
        started = place.start(sandbox, "--workers", "16")
        process.append(started)
        started.communicate(timeout=60)
        assert started.returncode == 130
        sent = {
            request.body["secondary_user"]
            for request in sandbox.requests
            if request.endpoint == "rev-users.merge"
        }
    assert {one for one, row in stored(place).items() if row["requested_at"]} == sent
    (report,) = (place.folder / "reports").glob("*.json")
    unfinished = json.loads(report.read_text(encoding="utf-8"))["unfinished_merges"]
    assert {entry["duplicate"]["id"] for entry in unfinished} <= sent


def test_pairs_that_a_killed_run_has_finished_stand_in_its_own_report(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(6)
    place.export(organisation)
    with Sandbox(
        organisation,
        faults=[Fault("merge-never", match=lambda body: "D6" in body["secondary_user"])],
    ) as sandbox:
        process = place.start(sandbox)
        deadline = time.monotonic() + 20
        while place.logs().count("INFO merged  person") < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.communicate()
        assert not list((place.folder / "reports").glob("*.json"))
        sandbox.faults.clear()
        organisation.merge(*pairs[5])
        first = place.run(sandbox, *QUICK, check=0)
        second = place.run(sandbox, *QUICK, check=0)
    killed = json.loads(min((place.folder / "reports").glob("*.json")).read_text(encoding="utf-8"))
    assert killed["run"]["exit_code"] is None and killed["run"]["stopped"] == "killed"
    assert len(killed["successful_merges"]) == 5 and len(first.report["successful_merges"]) == 1
    assert (
        second.report["successful_merges"] == [] and second.report["summary"]["already_merged"] == 6
    )


# -- old knowledge -----------------------------------------------------------------------------------


def test_a_laptop_that_sleeps_between_check_and_merge_checks_again(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    wrapper = place.folder / "sleeper.py"
    wrapper.write_text(
        "import os, runpy, sys, time\n"
        "awake = time.time\n"
        "time.time = lambda: awake() + (28800 if os.path.exists('slept') else 0)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module('merge_contacts', run_name='__main__', alter_sys=True)\n",
        encoding="utf-8",
    )

    def sleep(request: Request) -> None:
        (place.folder / "slept").write_text("eight hours")
        for _, duplicate in pairs:
            organisation.change(organisation.contacts[duplicate], email="somebody.else@example.com")

    with Sandbox(organisation, on_request=after("timeline-entries.list", sleep)) as sandbox:
        result = place.run(sandbox, python=[sys.executable, str(wrapper)], check=1)
    assert set(result.codes.values()) == {"email_changed"}
    assert organisation.merges == []


def test_lists_that_have_become_too_old_are_read_again_with_the_timelines_of_what_has_changed(
    place: Workplace,
) -> None:
    """The clocks run a hundred times faster after the first timeline, so that everything is old by the merge."""
    organisation, pairs = organisation_of_pairs(1, (2, 2))
    place.export(organisation)
    wrapper = place.folder / "hurried.py"
    wrapper.write_text(
        "import os, runpy, sys, time\n"
        "awake = time.time\n"
        "time.time = lambda: awake() + (130 if os.path.exists('late') else 0)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module('merge_contacts', run_name='__main__', alter_sys=True)\n",
        encoding="utf-8",
    )
    changed = next(iter(organisation.works))

    def comment(request: Request) -> None:
        (place.folder / "late").write_text("two minutes")
        organisation.add_comment(changed, "One more thing.")
        organisation.change(organisation.works[changed])

    with Sandbox(organisation, on_request=after("rev-users.merge", lambda _: None)) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        watch = sandbox.on_request
        seen: List[str] = []

        def hook(stage: str, request: Request) -> None:
            watch(stage, request)
            if stage == "after" and request.endpoint == "timeline-entries.list":
                seen.append(request.body["object"])
                if len(seen) == len(organisation.works) + len(organisation.conversations):
                    comment(request)

        sandbox.on_request = hook
        place.run(sandbox, python=[sys.executable, str(wrapper)], check=0)
        assert findings == [None], "what was said meanwhile is in the backup too"
        assert seen.count(changed) == 2 and len(seen) == len(set(seen)) + 1
    assert_merged(organisation, pairs)


def test_a_merge_that_comes_while_it_is_about_to_be_requested_again_is_finished(
    place: Workplace,
) -> None:
    """The next run has polled it, waited, and read the backup again: the poll right before the request sees it."""
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("merge-never", "rev-users.merge", times=1)]
    ) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        sandbox.on_request = after("timeline-entries.list", lambda _: organisation.merge(*pairs[0]))
        place.run(sandbox, "--merge-timeout", "1", check=0)
        assert sandbox.count("rev-users.merge") == 1
    assert_merged(organisation, pairs)


# -- called done, and isn't --------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [True, False])
def test_a_duplicate_that_another_user_has_merged_or_deleted_is_not_called_ours(
    place: Workplace, deleted: bool
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    other = organisation.add_contact("ELSE", "else@example.com")
    place.export(organisation)

    def interfere(stage: str, request: Request) -> None:
        if (
            stage == "before"
            and request.body.get("secondary_user") == pairs[0][1]
            and organisation.alive(pairs[0][1])
        ):
            if deleted:
                organisation.delete_contact(pairs[0][1])
            else:
                organisation.merge(other, pairs[0][1])

    with Sandbox(organisation, on_request=interfere) as sandbox:
        result = place.run(sandbox, *QUICK, check=1)
        assert result.codes == {"person1@example.com": "merged_elsewhere"}
        (entry,) = result.report["failed_merges"]
        assert "user_1" in entry["error"]
        assert reference_of(organisation, pairs[0][0]) == "REVU-P1"
        place.run(sandbox, *QUICK, check=0)


@pytest.mark.parametrize("gone", ["301", "primary"])
def test_a_duplicate_without_objects_is_ours_where_devrev_names_the_primary_in_its_place(
    place: Workplace, gone: str
) -> None:
    """A colleague merges the same pair just before: the merge request finds no such contact."""
    organisation, _ = organisation_of_pairs(0)
    bare = pair(organisation, 1, (0, 0))
    place.export(organisation)

    def merge_first(stage: str, request: Request) -> None:
        if (
            stage == "before"
            and request.endpoint == "rev-users.merge"
            and organisation.alive(bare[1])
        ):
            organisation.merge(*bare)

    fault = Fault("404", "rev-users.merge")
    with Sandbox(organisation, gone=gone, on_request=merge_first, faults=[fault]) as sandbox:
        result = place.run(sandbox, *QUICK, check=0)
        assert [entry["email"] for entry in result.report["successful_merges"]] == [
            "person1@example.com"
        ]
    assert_merged(organisation, [bare])


def test_one_false_not_found_while_the_merge_is_pending_does_no_harm(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("404", "rev-users.get", times=1)], merge_delay=1.5
    ) as sandbox:
        place.run(sandbox, "--merge-timeout", "10", check=0)
        assert sandbox.count("rev-users.merge") == 2
    assert_merged(organisation, pairs)


@pytest.mark.parametrize("state", ["locked", "deactivated"])
def test_a_duplicate_that_is_locked_while_its_merge_is_pending_is_still_there(
    place: Workplace, state: str
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)

    def lock(request: Request) -> None:
        organisation.change(organisation.contacts[pairs[0][1]], state=state)

    with Sandbox(
        organisation, merge_delay=3600, on_request=after("rev-users.merge", lock)
    ) as sandbox:
        assert place.run(sandbox, *QUICK, check=1).codes == {
            "person1@example.com": "merge_not_confirmed"
        }
        assert sandbox.count("rev-users.update") == 0
        sandbox.settle()
        place.run(sandbox, *QUICK, check=0)
    assert_merged(organisation, pairs)


def test_the_404_of_a_route_says_nothing_of_a_contact(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(
        organisation, merge_delay=3600, faults=[Fault("route-404", "rev-users.get")]
    ) as sandbox:
        place.run(sandbox, *QUICK, check=1)
        assert sandbox.count("rev-users.update") == 0
        sandbox.faults.clear()
        sandbox.settle()
        place.run(sandbox, *QUICK, check=0)
    assert_merged(organisation, pairs)


def test_a_reference_that_another_user_has_set_by_hand_meanwhile_is_left(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("500", "rev-users.update")]) as sandbox:
        place.run(sandbox, *QUICK, check=1, DEVREV_MAX_RETRIES="0")
        sandbox.faults.clear()
        organisation.change(organisation.contacts[pairs[0][0]], external_ref="by-hand")
        assert place.run(sandbox, *QUICK, check=1).codes == {
            "person1@example.com": "external_ref_changed"
        }
        assert reference_of(organisation, pairs[0][0]) == "by-hand"
        assert place.run(None, "--settle", "person1@example.com", check=0).report["settled"][0][
            "accepted"
        ]
        place.run(sandbox, *QUICK, check=0)


# -- no dead ends ------------------------------------------------------------------------------------


def test_a_ticket_that_was_deleted_before_the_proof_is_named_and_holds_nothing_up(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    gone = next(
        one
        for one, work in organisation.works.items()
        if pairs[0][1] in [user["id"] for user in work["reported_by"]]
    )
    with Sandbox(
        organisation, on_request=after("rev-users.update", lambda _: organisation.delete_work(gone))
    ) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "6", check=0)
    (entry,) = (
        one for one in result.report["successful_merges"] if one["email"] == "person1@example.com"
    )
    assert entry["deleted"] == [gone]


def test_lists_that_lag_behind_a_merge_are_waited_for(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation, list_lag=3) as sandbox:
        place.run(sandbox, "--merge-timeout", "20", check=0)
    assert_merged(organisation, pairs)


def test_what_can_not_be_proved_can_be_settled_once_a_report_has_named_it(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("500", "rev-users.update")]) as sandbox:
        assert place.run(None, "--settle", "person1@example.com", check=2).report == {}
        place.run(sandbox, *QUICK, check=1, DEVREV_MAX_RETRIES="0")
        sandbox.faults.clear()
        shutil.rmtree(str(place.folder / "backups" / "person1@example.com"))
        assert place.run(sandbox, *QUICK, check=1).codes == {"person1@example.com": "backup_failed"}
        requests = len(sandbox.requests)
        result = place.run(sandbox, "--settle", "Person1@example.com", check=0)
        assert len(sandbox.requests) == requests
        (entry,) = result.report["settled"]
        assert entry["state"] == "settled" and "backup_failed" in entry["accepted"]
        assert place.run(sandbox, *QUICK, check=0).report["summary"]["already_merged"] == 2
    assert_merged(organisation, pairs)


def test_pairs_that_can_not_be_proved_never_stop_a_run(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(12)
    place.export(organisation, leave_out=pairs[11])
    with Sandbox(organisation, faults=[Fault("500", "rev-users.update")]) as sandbox:
        while len(organisation.merges) < 11:
            place.run(sandbox, *QUICK, DEVREV_MAX_RETRIES="0")
        sandbox.faults.clear()
        for number in range(1, 12):
            shutil.rmtree(str(place.folder / "backups" / f"person{number}@example.com"))
        place.export(organisation)
        result = place.run(sandbox, *QUICK, check=1)
        assert set(result.codes.values()) == {"backup_failed"}
    assert_merged(organisation, pairs)


def test_a_contact_that_the_application_makes_again_in_the_gap_is_healed_by_exporting_and_running_again(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    visitors: List[str] = []

    def visit(stage: str, request: Request) -> None:
        if stage != "before" or request.endpoint != "rev-users.update" or visitors:
            return
        if request.body["id"] == pairs[0][0] and not organisation.alive(pairs[0][1]):
            visitors.append(organisation.add_contact("NEW", "person1@example.com", "user_1"))

    with Sandbox(organisation, on_request=visit) as sandbox:
        assert place.run(sandbox, *QUICK, check=1).codes == {
            "person1@example.com": "external_ref_conflict"
        }
        place.export(organisation, leave_out=[duplicate for _, duplicate in pairs])
        result = place.run(sandbox, *QUICK, check=0)
    assert_merged(organisation, [*pairs, (pairs[0][0], visitors[0])])
    assert len(result.report["successful_merges"]) == 2


def test_what_was_started_is_referenced_and_proved_before_anything_new_is_backed_up(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(8)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("500", "rev-users.update")]) as sandbox:
        place.run(sandbox, "--limit", "3", *QUICK, check=1, DEVREV_MAX_RETRIES="0")
        sandbox.faults.clear()
        before = len(sandbox.requests)
        place.run(sandbox, check=0)
        endpoints = [request.endpoint for request in sandbox.requests[before:]]
        first = endpoints.index("timeline-entries.list")
        assert endpoints[:first].count("rev-users.update") == 3
        assert endpoints.index("works.list") < endpoints.index("rev-users.merge")
        assert "conversations.list" in endpoints[:first]
    assert_merged(organisation, pairs)


# -- nothing waits for ever --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, detail", [("endless", None), ("endless", "empty"), ("nested", None), ("drip", 0.2)]
)
def test_an_answer_without_an_end_fails_its_group_alone(
    place: Workplace, kind: str, detail: Any
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    poison = next(
        one
        for one, talk in organisation.conversations.items()
        if talk["members"][0]["id"] == pairs[0][1]
    )
    fault = Fault(
        kind, "timeline-entries.list", match=lambda body: body["object"] == poison, detail=detail
    )
    with Sandbox(organisation, faults=[fault]) as sandbox:
        result = place.run(sandbox, check=1, DEVREV_TIMEOUT="0.4", DEVREV_MAX_RETRIES="1")
        assert result.codes == {"person1@example.com": "api_error"}
        assert "(a bug" not in result.err
    assert_merged(organisation, pairs[1:])


@posix
def test_a_signal_ends_a_run_while_an_answer_drips(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("drip", "works.list", detail=0.5)]) as sandbox:
        process = place.start(sandbox)
        while not sandbox.count("works.list"):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == 143


# -- the savepoint -----------------------------------------------------------------------------------


def test_a_savepoint_that_a_kill_has_left_in_the_middle_of_a_write_is_not_called_damaged(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    path = place.folder / "savepoint.db"
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--limit", "1", check=0)
        hot_journal(path)
        for options in (["--status"], ["--preview"]):
            assert place.run(None, *options, "-q", check=0).err == ""
        hot_journal(path)
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def hot_journal(path: Path) -> None:
    """Leave the file as a killed process does: pages written, and the journal that takes them back beside it."""
    copy, hot = path.with_name("copy"), path.with_name("copy-journal")
    db = sqlite3.connect(str(path), isolation_level=None)
    db.execute("PRAGMA cache_size = 1")
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TABLE junk (text TEXT)")
    db.executemany("INSERT INTO junk VALUES (?)", [("x" * 3000,)] * 200)
    db.execute("UPDATE pairs SET state = 'nonsense'")
    shutil.copy(str(path), str(copy))
    shutil.copy(f"{path}-journal", str(hot))
    db.execute("ROLLBACK")
    db.close()
    os.replace(str(copy), str(path))
    os.replace(str(hot), f"{path}-journal")


def test_a_folder_for_reports_that_can_not_be_written_is_known_before_the_first_request(
    place: Workplace,
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    (place.folder / "reports").write_text("in the way")
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=3)
        assert sandbox.requests == []


def test_a_token_of_a_few_characters_does_not_stand_in_every_word(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, token="e") as sandbox:
        result = place.run(sandbox, check=0)
    assert "[token]" not in result.out + result.err + place.logs()


# -- the gap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quota, ceiling",
    [(None, "0"), ((40, 2.0), "0"), ((6, 1.5), "0"), (None, "40/2"), (None, "6/1.5")],
)
def test_between_a_merge_and_its_reference_no_window_of_quota_passes(
    place: Workplace, quota: Any, ceiling: str
) -> None:
    organisation, pairs = organisation_of_pairs(8, (1, 1))
    place.export(organisation)
    calls, _, period = ceiling.partition("/")
    limits = {"DEVREV_RATE_LIMIT_CALLS": calls, "DEVREV_RATE_LIMIT_PERIOD": period or "60"}
    windows: List[int] = []

    def look(stage: str, request: Request) -> None:
        if stage == "before" and request.endpoint == "rev-users.merge" and sandbox.quota:
            windows.append(sandbox.quota.limit)

    with Sandbox(organisation, quota=quota, on_request=look) as sandbox:
        place.run(sandbox, check=0, **limits)
        assert sandbox.over_quota == 0
        requests = [
            (request.started, request.endpoint, request.body) for request in sandbox.requests
        ]
    assert_merged(organisation, pairs)
    for primary, duplicate in pairs:
        asked = next(at for at, _, body in requests if body.get("secondary_user") == duplicate)
        named = next(
            at for at, end, body in requests if end == "rev-users.update" and body["id"] == primary
        )
        between = [end for at, end, _ in requests if asked < at < named]
        # Nothing that only begins is let through while a merged pair waits for units: they were kept for it.
        assert len(between) < 40 and named - asked < 20
    gaps = [organisation.reference_times[p][-1][0] - organisation.merge_times[d] for p, d in pairs]
    assert sorted(gaps)[len(gaps) // 2] < 5


def test_a_merge_leaves_only_with_room_for_what_finishes_it(place: Workplace) -> None:
    """By the server's count, two units at least are left in the window when a merge is accepted."""
    organisation, pairs = organisation_of_pairs(10, (1, 1))
    place.export(organisation)
    left: List[int] = []

    with Sandbox(organisation, quota=(20, 1.5)) as sandbox:

        def look(stage: str, request: Request) -> None:
            if stage == "after" and request.endpoint == "rev-users.merge":
                used = sum(one.status is not None for one in sandbox.requests)
                left.append(20 - used % 20)

        sandbox.on_request = look
        place.run(sandbox, check=0)
        assert sandbox.over_quota == 0
    assert_merged(organisation, pairs)
    assert pair and len(left) == 10


# -- one contact's trouble is nobody else's ----------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["rev-users.update", "rev-users.get", "rev-users.merge"])
def test_a_contact_that_the_token_may_not_touch_costs_its_own_pair_alone(
    place: Workplace, endpoint: str
) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation)
    ids = set(pairs[1])
    fault = Fault("403", endpoint, match=lambda body: not ids.isdisjoint(map(str, body.values())))
    with Sandbox(organisation, faults=[fault]) as sandbox:
        place.run(sandbox, *QUICK, "--email", "person1@example.com", check=0)
        place.run(
            sandbox, *QUICK
        )  # where its merge is the first of the run, that shows what the token may: exit code 2
        for _ in range(2):  # where polls of it are refused, lists tell that it is merged
            result = place.run(sandbox, *QUICK, check=0 if endpoint == "rev-users.get" else 1)
        others = [one for one in pairs if one[0] not in ids]
        assert set(others) <= set(organisation.merges) and len(organisation.merges) <= 4
        assert [reference_of(organisation, primary) for primary, _ in others] == [
            "user_1",
            "user_3",
            "user_4",
        ]
        if endpoint == "rev-users.get":
            assert_merged(organisation, pairs)
            return
        assert result.codes["person2@example.com"] in ("forbidden", "merge_refused"), result
        if endpoint == "rev-users.update":
            assert "settled" in place.run(None, "--settle", "person2@example.com", check=0).out


def test_what_can_be_fixed_is_not_settled(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("500", "rev-users.update")]) as sandbox:
        result = place.run(sandbox, *QUICK, DEVREV_MAX_RETRIES="0")
        assert result.codes == {"person1@example.com": "api_error"}
        place.run(None, "--settle", "person1@example.com", check=1)
        sandbox.faults.clear()
        place.run(sandbox, *QUICK, check=0)
    assert_merged(organisation, pairs)


# -- what one savepoint knows ------------------------------------------------------------------------


def test_what_an_old_copy_of_the_savepoint_does_not_know_is_not_forgotten(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation, merge_delay=3600) as sandbox:
        place.run(sandbox, *QUICK, "--email", "person1@example.com", check=1)
        savepoint = place.folder / "savepoint.db"
        shutil.copy(str(savepoint), str(place.folder / "old.db"))
        place.run(sandbox, *QUICK, check=1)
        shutil.move(str(place.folder / "old.db"), str(savepoint))
        sandbox.settle()
        assert (
            len(json.loads(place.run(None, "--preview", "--json", check=0).out)["to_finish"]) == 3
        )
        place.run(sandbox, *QUICK, check=0)
    assert_merged(organisation, pairs)
    assert [row["state"] for row in stored(place).values()] == ["done"] * 3


# -- what others do ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["301", "primary", "shadow"])
def test_a_duplicate_that_went_into_another_user_is_merged_elsewhere(
    place: Workplace, gone: str
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    other = organisation.add_contact("X", "x@example.com")
    place.export(organisation)

    def merge_first(stage: str, request: Request) -> None:
        if (
            stage == "before"
            and request.body.get("secondary_user") == pairs[1][1]
            and organisation.alive(pairs[1][1])
        ):
            organisation.merge(other, pairs[1][1])

    with Sandbox(organisation, gone=gone, on_request=merge_first) as sandbox:
        result = place.run(sandbox, *QUICK, check=1)
        assert result.codes == {"person2@example.com": "merged_elsewhere"}
        place.run(sandbox, *QUICK, check=0)
    assert reference_of(organisation, pairs[1][0]) == "REVU-P2"


def test_a_primary_that_is_merged_into_another_takes_its_unfinished_pair_along(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    third = organisation.add_contact("P2", "person1@example.com", display_name="Person 1")
    place.export(organisation)

    def visit(_request: Request) -> None:
        organisation.merge(*pairs[0])
        organisation.visit("person1@example.com", "user_1")

    with Sandbox(
        organisation, merge_delay=3600, on_request=after("rev-users.merge", visit)
    ) as sandbox:
        result = place.run(sandbox, *QUICK, check=1)
        assert result.codes["person1@example.com"] in ("external_ref_conflict", "group_incomplete")
        for _ in range(5):
            organisation.add_work(owned_by=[third], reported_by=[third], created_by=third)
        sandbox.merge_delay = 0.05
        place.export(organisation, leave_out=[pairs[0][1]])
        place.run(sandbox, *QUICK)
        assert place.run(sandbox, *QUICK, check=0).report["summary"]["unfinished_merges"] == 0
    assert (
        reference_of(organisation, third) == "user_1"
        and organisation.survivor(pairs[0][0]) == third
    )


def test_nothing_ends_in_a_traceback(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        assert "the plan is" in place.run(sandbox, "--plan", "", check=2).err
        (place.folder / "backups" / "savepoint-copy.db").unlink()
        (place.folder / "backups" / "savepoint-copy.db").mkdir()
        result = place.run(sandbox, check=3)
        assert "savepoint-copy.db" in result.err and "Traceback" not in result.err
        assert sandbox.count() == 0
