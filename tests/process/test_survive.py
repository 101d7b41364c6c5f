"""What must hold when things go wrong: crashes, lost answers, a failing API, yesterday's CSV, a full disk."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from tests.sandbox import Fault, Organisation, Request, Sandbox
from tests.support import (
    ROOT,
    SCRIPT,
    Workplace,
    assert_merged,
    diagonal,
    organisation_of_pairs,
    pair,
    the_rest_is_slow,
    watch_merges,
)

GONE = ("404", "301", "state", "primary")
STAGES = ("before", "after")
TURN = (
    SCRIPT.stat().st_size % 2
)  # sweeps that leave something out leave something else out after most changes
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals, permissions or mounts")
killer = [sys.executable, str(ROOT / "tests" / "process" / "killer.py")]


def small_organisation() -> Tuple[Organisation, List[Tuple[str, str]]]:
    """Two plain pairs, and a group of three that becomes two merges into one primary."""
    organisation, pairs = organisation_of_pairs(2, (2, 1))
    extra = organisation.add_contact("E2", "person2@example.com")
    organisation.add_work(reported_by=[extra], comments=1)
    organisation.add_contact("S1", "single@example.com")
    return organisation, [*pairs, (pairs[1][0], extra)]


def kill_at(
    sandbox: Sandbox, folder: Path, number: int, stage: str, process: List[Any]
) -> List[Any]:
    """Kill the client when request `number` arrives (and is then not acted on), or after it was acted on."""
    findings = watch_merges(sandbox, folder)
    watch = sandbox.on_request

    def hook(at: str, request: Request) -> None:
        watch(at, request)
        if request.number == number and at == stage and process:
            if at == "before":
                sandbox.faults.insert(
                    0, Fault("reset-before", match=lambda body: body is request.body)
                )
            process[0].kill()
            process[0].wait()

    sandbox.on_request = hook
    return findings


def survive_kill_at_request(folder: Path, number: int, stage: str, gone: str) -> bool:
    """One kill and the runs that follow; returns whether the run got as far as that request."""
    place = Workplace(folder)
    organisation, pairs = small_organisation()
    place.export(organisation)
    with Sandbox(organisation, merge_delay=0.1, gone=gone) as sandbox:
        process: List[Any] = []
        findings = kill_at(sandbox, folder, number, stage, process)
        process.append(place.start(sandbox, "--merge-timeout", "8"))
        process[0].communicate(timeout=60)
        killed = process[0].returncode == -signal.SIGKILL
        sandbox.faults.clear()
        process.clear()
        place.run(sandbox, "--merge-timeout", "8", check=0)
    assert_merged(organisation, pairs)
    assert findings and set(findings) == {None}
    assert (
        organisation.contacts["don:identity:dvrv-us-1:devo/SANDBOX1:revu/S1"]["external_ref"]
        == "REVU-S1"
    )
    return killed


@posix
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_any_request_is_finished_by_the_next(tmp_path: Path, part: int) -> None:
    """All requests, in parts; before and after take turns, and swap them with TURN. (Every step of a life: tests/simulate.py.)"""
    number = 1 + part
    while survive_kill_at_request(
        _made(tmp_path / str(number)), number, STAGES[(number + TURN) % 2], GONE[part]
    ):
        number += 4
    assert number > 20


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@posix
@pytest.mark.parametrize(
    "number, stage, gone",
    [(5, "after", "301"), (18, "before", "primary"), (20, "after", "404"), (22, "before", "state"), (23, "after", "301")],
)  # fmt: skip
def test_a_run_killed_at_some_requests_is_finished_by_the_next(
    tmp_path: Path, number: int, stage: str, gone: str
) -> None:
    assert survive_kill_at_request(tmp_path, number, stage, gone)


def survive_kill_at_write(folder: Path, number: int, stage: str, gone: str) -> bool:
    place = Workplace(folder)
    organisation, pairs = small_organisation()
    place.export(organisation)
    with Sandbox(organisation, merge_delay=0.05, gone=gone) as sandbox:
        findings = watch_merges(sandbox, folder)
        first = place.run(sandbox, "--merge-timeout", "8", python=[*killer, str(number), stage])
        place.run(sandbox, "--merge-timeout", "8", check=0)
    assert_merged(organisation, pairs)
    assert set(findings) == {None}
    return first.code == -signal.SIGKILL


@posix
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_any_durable_write_is_finished_by_the_next(
    tmp_path: Path, part: int
) -> None:
    """Every other write, with TURN the others; before and after take turns. (Every step of a life: tests/simulate.py.)"""
    number = 1 + TURN + 2 * part
    while survive_kill_at_write(
        _made(tmp_path / str(number)), number, STAGES[number // 8 % 2], GONE[part]
    ):
        number += 8
    assert number > 50


@posix
@pytest.mark.parametrize("number", [42, 45, 50])
def test_a_run_killed_at_some_durable_writes_is_finished_by_the_next(
    tmp_path: Path, number: int
) -> None:
    assert survive_kill_at_write(
        tmp_path, number, ("before", "after")[number % 2], GONE[number % 4]
    )


def test_a_merge_is_never_requested_before_its_intent_is_in_the_savepoint(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(6)
    place.export(organisation)
    seen = []

    def look(stage: str, request: Request) -> None:
        if stage == "before" and request.endpoint == "rev-users.merge":
            copy = place.folder / f"copy{request.number}.db"
            for suffix in ("", "-journal"):
                if (place.folder / f"savepoint.db{suffix}").exists():
                    shutil.copy(str(place.folder / f"savepoint.db{suffix}"), f"{copy}{suffix}")
            with sqlite3.connect(str(copy)) as db:
                states = db.execute(
                    "SELECT state FROM pairs WHERE duplicate_id = ?",
                    (request.body["secondary_user"],),
                )
                seen.append(states.fetchall())

    with Sandbox(organisation, on_request=look) as sandbox:
        place.run(sandbox, "--workers", "1", check=0)
    assert seen == [[("requested",)]] * 6


# -- interrupted politely ----------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    "number, at",
    diagonal(
        (signal.SIGINT, signal.SIGTERM),
        ("timeline-entries.list", "rev-users.merge", "rev-users.get"),
    ),
)
def test_an_interrupted_run_reports_and_is_resumed(place: Workplace, number: int, at: str) -> None:
    code = 128 + number
    organisation, pairs = organisation_of_pairs(12)
    place.export(organisation)
    with Sandbox(organisation, latency=0.01) as sandbox:
        process: List[Any] = []

        def look(stage: str, request: Request) -> None:
            if stage == "after" and request.endpoint == at and process:
                process.pop().send_signal(number)

        sandbox.on_request = look
        started = place.start(sandbox)
        process.append(started)
        _, err = started.communicate(timeout=30)
        assert started.returncode == code, err
        assert "again to resume" in err
        (report,) = (place.folder / "reports").glob("*.json")
        sandbox.on_request = None
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


@posix
@pytest.mark.parametrize("refusals", [0, 2])
def test_an_interruption_after_the_merge_leaves_the_reference_on_no_contact_for_a_moment_only(
    place: Workplace, refusals: int
) -> None:
    """The poll that finds the duplicate merged is under way when Ctrl-C comes; the update is made all the same."""
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    held = Fault("409", "rev-users.update", times=refusals)
    with Sandbox(organisation, merge_delay=0.0, faults=[held] if refusals else []) as sandbox:
        process: List[Any] = []

        def interrupt(stage: str, request: Request) -> None:
            if stage == "after" and request.endpoint == "rev-users.get" and process:
                process.pop().send_signal(signal.SIGINT)
                time.sleep(0.7)  # the answer comes once that has surely been noticed

        sandbox.on_request = interrupt
        started = place.start(sandbox)
        process.append(started)
        started.communicate(timeout=30)
        assert started.returncode == 130
        ((primary, duplicate),) = [one for one in pairs if not organisation.alive(one[1])]
        assert (
            organisation.contacts[primary]["external_ref"]
            == f"user_{pairs.index((primary, duplicate)) + 1}"
        )
        # Nothing else was begun or finished after the signal.
        assert (
            sandbox.count("rev-users.merge") == 1
            and sandbox.requests[-1].endpoint == "rev-users.update"
        )
        sandbox.on_request = None
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


@posix
def test_a_merge_that_is_carried_out_within_the_time_of_grace_gets_its_reference(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation, merge_delay=1.5) as sandbox:
        process = place.start(sandbox)
        while not sandbox.count("rev-users.merge"):
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130 and sandbox.count("rev-users.merge") == 1
        ((primary, duplicate),) = [one for one in pairs if not organisation.alive(one[1])]
        assert (
            organisation.contacts[primary]["external_ref"]
            == f"user_{pairs.index((primary, duplicate)) + 1}"
        )
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def test_where_no_reference_can_be_set_no_more_than_five_are_on_no_contact(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(12)
    place.export(organisation)
    with Sandbox(organisation, forbidden=["rev-users.update"]) as sandbox:
        place.run(sandbox, "--merge-timeout", "5", check=3)
        assert len(organisation.merges) <= 5
        sandbox.forbidden = []
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


@posix
def test_a_second_interruption_stops_at_once(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("hang", "rev-users.merge", detail=30)]) as sandbox:
        process = place.start(sandbox)
        while not sandbox.count("rev-users.merge"):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
        assert process.returncode == 130


# -- lost and false answers --------------------------------------------------------------------------

MISBEHAVIOUR = [
    "reset-before", "reset-after", "cut", "hang", "hang-after", "html-200",
    "500", "500-after", "502", "503", "429", "429-bare",
]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    the_rest_is_slow(
        MISBEHAVIOUR,
        "reset-before",
        "reset-after",
        "hang-after",
        "html-200",
        "500-after",
        "429-bare",
    ),
)
def test_every_pair_is_merged_once_whatever_happens_to_a_merge_answer(
    place: Workplace, kind: str
) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    faults = [Fault(kind, "rev-users.update", times=2)]
    if kind != "html-200":  # any 2xx acknowledges a merge, whatever its body
        faults.append(Fault(kind, "rev-users.merge", times=2))
    with Sandbox(organisation, faults=faults, merge_delay=0.1) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        place.run(sandbox, "--merge-timeout", "8", check=0, DEVREV_TIMEOUT="0.5")
        assert set(findings) == {None}
        lost_before_the_act = kind in (
            "reset-before",
            "hang",
            "500",
            "502",
            "503",
            "429",
            "429-bare",
        )
        assert sandbox.count("rev-users.merge") == (5 if lost_before_the_act else 3)
    assert_merged(organisation, pairs)


@pytest.mark.parametrize(
    "seed, gone",
    [
        (0, "404"),
        (1, "301"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((2, "state"), (3, "primary"))),
    ],
)
def test_every_pair_is_merged_once_with_twelve_percent_of_all_answers_gone_wrong(
    place: Workplace, seed: int, gone: str
) -> None:
    organisation, pairs = organisation_of_pairs(12)
    place.export(organisation)
    share = 1 - (1 - 0.12) ** (1 / len(MISBEHAVIOUR))
    faults = [
        Fault(kind, chance=share, detail=0.05 if kind == "429" else None) for kind in MISBEHAVIOUR
    ]
    for fault in faults:
        if fault.kind == "html-200":  # any 2xx acknowledges a merge, whatever its body
            fault.match = lambda body: "secondary_user" not in body
    with Sandbox(organisation, faults=faults, seed=seed, gone=gone, merge_delay=0.1) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        place.run(sandbox, "--merge-timeout", "20", timeout=150, check=0, DEVREV_TIMEOUT="1")
        assert set(findings) == {None}
        assert len([one for one in sandbox.requests if one.fault]) > 0.05 * len(sandbox.requests)
    assert_merged(organisation, pairs)


# -- merges that go wrong ----------------------------------------------------------------------------


def only(contact: str) -> Callable[[Dict[str, Any]], bool]:
    return lambda body: contact in (body.get("secondary_user"), body.get("id"))


def test_a_merge_that_never_finishes_holds_up_no_other_and_is_polled_first_in_the_next_run(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(5)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("merge-never", "rev-users.merge", match=only(pairs[2][1]))]
    ) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "4", check=1)
        assert result.codes == {"person3@example.com": "merge_not_confirmed"}
        assert_merged(organisation, pairs[:2] + pairs[3:])
        endpoints = [request.endpoint for request in sandbox.requests]
        last_proof = max(
            index for index, endpoint in enumerate(endpoints) if endpoint == "works.list"
        )
        assert "rev-users.get" in endpoints[last_proof:], (
            "the others are proved while the one is still waited for"
        )
        organisation.merge(*pairs[2])
        before = len(sandbox.requests)
        place.run(sandbox, "--merge-timeout", "2", check=0)
        assert [one.endpoint for one in sandbox.requests[before:]][:2] == [
            "dev-users.self",
            "rev-users.get",
        ]
        assert not [one for one in sandbox.requests[before:] if one.endpoint == "rev-users.merge"]
    assert_merged(organisation, pairs)


def test_an_acknowledged_merge_that_devrev_has_dropped_is_requested_again_by_the_next_run(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("merge-never", "rev-users.merge", times=1)]
    ) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        findings = watch_merges(sandbox, place.folder)
        place.run(sandbox, "--merge-timeout", "3", check=0)
        assert findings == [None]
    assert_merged(organisation, pairs)


def test_what_a_merge_leaves_behind_is_named_and_proved_again_by_the_next_run(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(3, (1, 3))
    place.export(organisation)
    left = sorted(
        one
        for one, work in organisation.works.items()
        if pairs[1][1] in [u["id"] for u in work["reported_by"]]
    )[:2]
    fault = Fault("merge-leaves", "rev-users.merge", match=only(pairs[1][1]), detail=set(left))
    with Sandbox(organisation, faults=[fault]) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "1", check=1)
        (entry,) = result.report["unfinished_merges"]
        assert (entry["email"], entry["code"]) == ("person2@example.com", "left_behind")
        assert sorted({one["id"] for one in entry["left_behind"]}) == left
        names = [organisation.works[one]["display_id"] for one in left]
        assert all(name in result.out for name in names)
        assert organisation.contacts[pairs[1][0]]["external_ref"] == "user_2"
        primary = organisation.people([pairs[1][0]])
        for one in left:
            for role in ("owned_by", "reported_by"):
                people = [u for u in organisation.works[one][role] if u["id"] != pairs[1][1]]
                if len(people) < len(organisation.works[one][role]):
                    organisation.works[one][role] = people + primary
        place.run(sandbox, check=0)
        assert sandbox.count("rev-users.merge") == 3


def test_a_reference_held_by_another_user_is_a_conflict_that_stays_resumable(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    thief: List[str] = []

    def take(stage: str, request: Request) -> None:
        if (
            stage == "before"
            and request.endpoint == "rev-users.update"
            and request.body["id"] == pairs[0][0]
            and not thief
        ):
            deadline = time.monotonic() + 5
            while organisation.alive(pairs[0][1]) and time.monotonic() < deadline:
                time.sleep(0.01)
            thief.append(organisation.add_contact("THIEF", "thief@example.com", "user_1"))

    with Sandbox(organisation, on_request=take) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "2", check=1)
        assert result.codes == {"person1@example.com": "external_ref_conflict"}
        assert "REVU-THIEF" in result.out
        assert sorted(organisation.merges) == sorted(pairs)
        organisation.contacts[thief[0]]["external_ref"] = "REVU-THIEF"
        place.run(sandbox, check=0)
        assert sandbox.count("rev-users.merge") == 3
    assert_merged(organisation, pairs)


# -- an API that is down -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after, kind",
    diagonal(
        ("dev-users.self", "timeline-entries.list", "rev-users.merge", "rev-users.update"),
        ("503", "401", "502", "reset-before"),
    ),
)
def test_an_api_that_goes_down_is_not_hammered_and_the_run_resumes(
    place: Workplace, kind: str, after: str
) -> None:
    organisation, pairs = organisation_of_pairs(8)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        down: List[int] = []

        def look(stage: str, request: Request) -> None:
            if stage == "after" and request.endpoint == after and not down:
                down.append(request.number)
                sandbox.faults.append(Fault(kind))

        sandbox.on_request = look
        result = place.run(sandbox, check=3, DEVREV_MAX_RETRIES="1")
        assert "again to resume" in result.err
        assert len(sandbox.requests) - down[0] <= 8 + 5
        assert result.report["run"]["stopped"]
        sandbox.faults.clear()
        sandbox.on_request = None
        place.run(sandbox, "--merge-timeout", "8", check=0)
    assert_merged(organisation, pairs)


def test_nothing_listening_is_said_and_changes_nothing(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    result = place.run(
        None,
        check=3,
        DEVREV_API_TOKEN="x",
        DEVREV_BASE_URL="http://127.0.0.1:9",
        DEVREV_MAX_RETRIES="1",
    )
    assert "can't be reached" in result.err


def test_five_failures_in_a_row_stop_the_run_before_more_is_started(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(60, (0, 0))
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("400", "rev-users.merge")]) as sandbox:
        result = place.run(sandbox, check=3)
        assert organisation.merges == []
        assert sandbox.count("rev-users.merge") <= 5 + 8
        assert set(result.codes.values()) == {"merge_refused"}
        sandbox.faults.clear()
        place.run(sandbox, "--merge-timeout", "1", check=0)
    assert_merged(organisation, pairs)


def test_one_ticket_that_can_not_be_read_costs_only_its_own_group(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation)
    poison = next(
        one
        for one, work in organisation.works.items()
        if pairs[1][0] in [u["id"] for u in work["reported_by"]]
    )
    fault = Fault("500", "timeline-entries.list", match=lambda body: body["object"] == poison)
    with Sandbox(organisation, faults=[fault]) as sandbox:
        result = place.run(sandbox, check=1, DEVREV_MAX_RETRIES="1")
        assert result.codes == {"person2@example.com": "api_error"}
    assert_merged(organisation, [pairs[0], *pairs[2:]])


# -- yesterday's CSV ---------------------------------------------------------------------------------


def test_nothing_that_has_changed_since_the_export_is_merged(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(12)
    place.export(organisation)
    changes: Dict[int, Tuple[str, Dict[str, Any]]] = {
        0: ("email_changed", {"email": "new@example.com"}),
        1: ("external_ref_changed", {"external_ref": "user_new"}),
        2: ("not_active", {"state": "deleted"}),
        3: ("not_active", {"state": "locked"}),
        4: ("not_active", {"state": "shadow"}),
        5: (
            "different_rev_org",
            {
                "rev_org": {
                    "type": "rev_org",
                    "id": "don:identity:dvrv-us-1:devo/SANDBOX1:revo/OTHER",
                    "display_id": "REV-OTHER",
                }
            },
        ),
    }
    expected = {}
    for index, (code, change) in changes.items():
        organisation.contacts[pairs[index][index % 2]].update(change)
        expected[f"person{index + 1}@example.com"] = code
    del organisation.contacts[pairs[6][0]]
    expected["person7@example.com"] = "not_found"
    organisation.merge(*pairs[7])
    expected["person8@example.com"] = "reference_unheld"
    organisation.add_contact("NEW", "person9@example.com", "user_new9")
    expected["person9@example.com"] = "several_user_refs"
    done_by_hand = [pairs[7]]
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=1)
    assert result.codes == expected
    assert sorted(organisation.merges) == sorted(done_by_hand + pairs[9:])


def test_a_csv_of_another_organisation_stops_everything(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(3)
    other = Organisation("OTHERORG")
    pair(other, 1)
    place.export(other)
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=2)
        assert [request.endpoint for request in sandbox.requests] == ["dev-users.self"]
    assert "another organisation" in result.err and organisation.merges == []


def test_a_contact_that_changes_between_check_and_merge_is_not_merged(place: Workplace) -> None:
    """A long wait in between (for quota, say) makes the live check stale: it is done again."""
    pytest.importorskip("ratelimit")
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    source = SCRIPT.read_text(encoding="utf-8")
    hurried = place.folder / "merge_contacts.py"
    hurried.write_text(source.replace("FRESH = 60.0", "FRESH = 0.3"), encoding="utf-8")

    def change(stage: str, request: Request) -> None:
        if stage == "before" and request.endpoint == "timeline-entries.list":
            organisation.contacts[pairs[0][1]]["email"] = "moved@example.com"
            time.sleep(0.4)

    with Sandbox(organisation, on_request=change) as sandbox:
        command = [sys.executable, str(hurried), "--csv", str(place.csv), "--yes"]
        process = subprocess.run(
            command,
            cwd=str(place.folder),
            env=place.environment(sandbox, {}),
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    assert process.returncode == 1
    assert_merged(organisation, pairs[1:])


# -- savepoint ---------------------------------------------------------------------------------------


def test_a_second_run_on_the_same_savepoint_is_told_who_holds_it(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("hang", "works.list", times=1, detail=30)]) as sandbox:
        first = place.start(sandbox)
        while not sandbox.count("works.list"):
            time.sleep(0.01)
        second = place.run(sandbox, check=11)
        assert f"process {first.pid}" in second.err
        status = place.run(None, "--status", check=0)
        assert f"process {first.pid}" in status.out
        first.kill()
        first.communicate()
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def _newer(path: Path) -> None:
    with sqlite3.connect(str(path)) as db:
        db.execute("PRAGMA user_version = 99")


def _torn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:8192] = os.urandom(4096)
    path.write_bytes(bytes(data))


def _foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(str(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda path: path.write_bytes(b"not a database at all" * 50), "not a savepoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (_torn, "damaged"),
        (_newer, "format 99"),
        (_foreign, "damaged"),
        (lambda path: path.chmod(0o400), "read-only"),
    ],
)
def test_a_savepoint_that_can_not_be_trusted_is_left_as_it_is(
    place: Workplace, spoil: Callable[[Path], Any], word: str
) -> None:
    organisation, _ = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--limit", "1", check=0)
        path = place.folder / "savepoint.db"
        spoil(path)
        before, requests = path.read_bytes(), len(sandbox.requests)
        for options in ([], ["--preview"]):
            result = place.run(sandbox, *options)
            if not (options and word in ("read-only", "damaged")):
                assert result.code == (3 if word == "read-only" else 2) and word in result.err, (
                    result
                )
            assert path.read_bytes() == before
            assert len(sandbox.requests) == requests and len(organisation.merges) == 1


# -- the disk ----------------------------------------------------------------------------------------


def spoiled(place: Workplace, what: str) -> None:
    (place.folder / what).parent.mkdir(parents=True, exist_ok=True)
    (place.folder / what).write_text("a file where a folder should be", encoding="utf-8")


@pytest.mark.parametrize("what", ["backups", "backups/person1@example.com", "logs", "reports"])
def test_a_file_where_a_folder_should_be_means_no_merge_without_its_backup(
    place: Workplace, what: str
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    spoiled(place, what)
    with Sandbox(organisation) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        place.run(sandbox, check=3)
        assert set(findings) <= {None}
        (place.folder / what).unlink()
        place.run(sandbox, check=0)
        assert set(findings) == {None}
    assert_merged(organisation, pairs)


@posix
def test_a_link_that_leads_out_of_backups_is_not_followed(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    outside = place.folder / "outside"
    outside.mkdir()
    (place.folder / "backups").mkdir()
    (place.folder / "backups" / "person1@example.com").symlink_to(outside)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=3)
    assert organisation.merges == [] and not list(outside.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """A file system of 300 kB, or a skip where this machine does not let us mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if not sys.platform.startswith("linux") or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
    ):
        pytest.skip("a small tmpfs can't be mounted here")
    yield folder
    subprocess.call(["umount", str(folder)])


def test_a_full_disk_stops_the_run_before_a_merge_without_backup(tiny_disk: Path) -> None:
    organisation, pairs = organisation_of_pairs(20, (6, 6))
    place = Workplace(tiny_disk)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        findings = watch_merges(sandbox, tiny_disk)
        result = place.run(sandbox, check=3)
        assert set(findings) <= {None}
        assert len(organisation.merges) < 20
        assert "disk" in result.err or "full" in result.err or "space" in result.err
        subprocess.check_call(["mount", "-o", "remount,size=20m", str(tiny_disk)])
        place.run(sandbox, "--merge-timeout", "8", check=0)
        assert set(findings) == {None}
    assert_merged(organisation, pairs)


def test_a_read_only_disk_changes_nothing(tiny_disk: Path) -> None:
    organisation, _ = organisation_of_pairs(1)
    place = Workplace(tiny_disk)
    place.export(organisation)
    subprocess.check_call(["mount", "-o", "remount,ro", str(tiny_disk)])
    with Sandbox(organisation) as sandbox:
        assert place.run(sandbox).code in (2, 3)
        assert (
            place.run(sandbox, "--preview", check=0)
            .out.splitlines()[-1]
            .startswith("1 pair to merge")
        )
        assert sandbox.requests == []


def test_nothing_is_written_outside_backups_whatever_the_email_says(place: Workplace) -> None:
    organisation = Organisation()
    emails = [
        "../../x@example.com",
        "/etc/passwd@example.com",
        "nul@example.com",
        "a\\b@example.com",
        "c:@example.com",
        "x" * 300 + "@example.com",
    ]
    for number, email in enumerate(emails):
        organisation.add_contact(f"P{number}", email)
        organisation.add_contact(f"D{number}", email, f"user_{number}")
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
    assert len(organisation.merges) == len(emails)
    tops = {path.relative_to(place.folder).parts[0] for path in place.folder.rglob("*")}
    assert tops == {"contacts.csv", "backups", "logs", "reports", "savepoint.db"}
    assert len([path for path in (place.folder / "backups").iterdir() if path.is_dir()]) == len(
        emails
    )


def test_a_redirect_is_never_followed_with_the_token(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(Organisation("ELSEWHERE")) as elsewhere, Sandbox(
        organisation, gone="301"
    ) as sandbox:
        sandbox.moved_to = elsewhere.url
        place.run(sandbox, check=0)
        assert elsewhere.requests == [] and elsewhere.connections == 0
        assert {request.endpoint for request in sandbox.requests if request.status == 301} == {
            "rev-users.get"
        }
    assert_merged(organisation, pairs)


def with_hooked_replace(place: Workplace, hook: str) -> List[str]:
    """A Python that runs the script with `hooked(source, target)`, which is given in source, for os.replace."""
    wrapper = place.folder / "wrapper.py"
    wrapper.write_text(
        "import os, runpy, signal, sys\n"
        "replace = os.replace\n"
        f"{hook}"
        "os.replace = hooked\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module('merge_contacts', run_name='__main__', alter_sys=True)\n",
        encoding="utf-8",
    )
    return [sys.executable, str(wrapper)]


def test_a_damaged_backup_is_never_merged_on(place: Workplace) -> None:
    """The check reads the disk: what is damaged between writing and reading is seen."""
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    spoiler = with_hooked_replace(
        place,
        "def hooked(source, target):\n"
        "    replace(source, target)\n"
        "    works = os.path.join(target, 'primary_REVU-P1', 'works.json')\n"
        "    if os.path.exists(works):\n"
        "        with open(works, 'r+b') as file:\n"
        "            file.write(b'[ ')\n",
    )
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, python=spoiler, check=1)
        assert result.codes == {"person1@example.com": "backup_failed"}
        assert organisation.merges == []
        assert re.search(r"works\.json", result.out)
        verified = place.run(None, "--verify-backups", check=1)
        assert "works.json" in verified.out
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def test_a_pair_that_was_requested_is_never_forgotten_whatever_the_next_poll_says(
    place: Workplace,
) -> None:
    """The merge takes long, its answer is lost, and half of it is done when the pair is checked anew."""
    organisation, pairs = organisation_of_pairs(1, (1, 3))
    place.export(organisation)
    moving: List[int] = []

    def half_done(stage: str, request: Request) -> None:
        if (
            stage == "after"
            and request.endpoint == "rev-users.list"
            and sandbox.count("rev-users.merge")
            and not moving
        ):
            moving.append(request.number)
            for work in organisation.works.values():
                if pairs[0][1] in [user["id"] for user in work["reported_by"]]:
                    work["reported_by"] = organisation.people([pairs[0][0]])

    faults = [Fault("reset-after", "rev-users.merge", times=1)]
    with Sandbox(organisation, faults=faults, merge_delay=3600, on_request=half_done) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "2", check=1)
        assert result.codes == {"person1@example.com": "count_mismatch"} and moving
        sandbox.settle()
        place.run(sandbox, "--merge-timeout", "2", check=0)
        assert sandbox.count("rev-users.merge") == 1
    assert_merged(organisation, pairs)


def group_of_three() -> Tuple[Organisation, str, str, str]:
    organisation = Organisation()
    a, b = (organisation.add_contact(key, "person@example.com") for key in "AB")
    user = organisation.add_contact("U", "person@example.com", "user_1")
    organisation.add_work(reported_by=[a])
    organisation.add_work(reported_by=[user])
    return organisation, a, b, user


def test_another_export_with_another_primary_never_asks_a_pending_duplicate_into_it(
    place: Workplace,
) -> None:
    organisation, a, b, user = group_of_three()
    place.export(organisation)
    never = Fault(
        "merge-never", "rev-users.merge", match=lambda body: body["secondary_user"] == user
    )
    with Sandbox(organisation, faults=[never]) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        for _ in range(3):
            organisation.add_work(reported_by=[b])
        place.export(organisation)
        place.run(sandbox, "--merge-timeout", "1", check=1)
        asked = {
            (one.body["primary_user"], one.body["secondary_user"])
            for one in sandbox.requests
            if "merge" in one.endpoint
        }
        assert asked == {(a, user)}


def test_a_refused_merge_is_not_taken_for_a_merge_because_the_contact_is_locked(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)

    def lock(stage: str, request: Request) -> None:
        if stage == "before" and request.body.get("secondary_user") == pairs[0][1]:
            organisation.change(organisation.contacts[pairs[0][1]], state="locked")

    faults = [Fault("400", "rev-users.merge", match=only(pairs[0][1]))]
    with Sandbox(organisation, faults=faults, on_request=lock) as sandbox:
        result = place.run(sandbox, check=1)
        assert result.codes == {"person1@example.com": "merge_refused"}
    assert_merged(organisation, pairs[1:])


def test_a_pair_that_waits_to_be_requested_again_is_not_given_up_when_the_run_is_interrupted(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    faults = [
        Fault("reset-after", "rev-users.merge", times=1),
        Fault("429", "rev-users.merge", detail=60),
    ]
    with Sandbox(organisation, faults=faults, merge_delay=3600) as sandbox:
        process = place.start(sandbox, "--merge-timeout", "4")
        while sandbox.count("rev-users.merge") < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        process.terminate()
        process.communicate(timeout=20)
        sandbox.faults.clear()
        sandbox.settle()
        place.run(sandbox, "--merge-timeout", "4", check=0)
    assert_merged(organisation, pairs)


@posix
def test_an_interruption_while_the_report_is_written_costs_nothing(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    wrapper = with_hooked_replace(
        place,
        "def hooked(source, target):\n"
        "    if target.endswith('.json') and 'merge_report' in target:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return replace(source, target)\n",
    )
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, python=wrapper)
    assert result.report["summary"]["successful_merges"] == 2
    assert_merged(organisation, pairs)


MALFORMED: Dict[str, Tuple[str, Callable[[Dict[str, Any]], Dict[str, Any]]]] = {
    "nobody's token": ("dev-users.self", lambda answer: {"dev_user": None}),
    "a list of token owners": ("dev-users.self", lambda answer: {"dev_user": []}),
    "nobody where somebody was": ("rev-users.get", lambda answer: {"rev_user": None}),
    "nobody updated": ("rev-users.update", lambda answer: {"rev_user": None}),
    "a cursor that is a list": ("works.list", lambda answer: {**answer, "next_cursor": ["x"]}),
    "a rev org that is a word": (
        "rev-users.list",
        lambda answer: {"rev_users": [{**user, "rev_org": "x"} for user in answer["rev_users"]]},
    ),
    "contacts that are words": ("rev-users.list", lambda answer: {"rev_users": ["x"]}),
    "nobody owns": (
        "works.list",
        lambda answer: {"works": [{**work, "owned_by": None} for work in answer["works"]]},
    ),
    "entries without an id": ("timeline-entries.list", lambda answer: {"timeline_entries": [{}]}),
    "works in a dict": ("works.list", lambda answer: {"works": {"a": 1}}),
}


@pytest.mark.parametrize(
    "name",
    the_rest_is_slow(
        MALFORMED,
        "nobody where somebody was",
        "nobody updated",
        "a cursor that is a list",
        "contacts that are words",
    ),
)
def test_an_answer_of_the_wrong_shape_is_never_taken_for_a_merge_nor_ends_in_a_traceback(
    place: Workplace, name: str
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    endpoint, change = MALFORMED[name]
    with Sandbox(
        organisation, faults=[Fault("changed", endpoint, detail=change)], merge_delay=0.1
    ) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "1", DEVREV_MAX_RETRIES="1")
        assert result.code in (0, 1, 3)
        assert "(a bug" not in result.err
        sandbox.faults.clear()
        place.run(sandbox, "--merge-timeout", "4", check=0)
    assert_merged(organisation, pairs)


def test_contacts_of_two_rev_orgs_are_not_merged(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    organisation.add_contact("P2", "person2@example.com")
    organisation.add_contact("D2", "person2@example.com", "user_2", rev_org="OTHER")
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        assert place.run(sandbox, check=1).codes == {"person2@example.com": "different_rev_org"}
    assert_merged(organisation, pairs)


def test_pairs_that_need_a_second_proof_get_it_while_others_are_proved(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(40, (1, 1))
    place.export(organisation)
    late = {duplicate for _, duplicate in pairs[::3]}
    faults = [
        Fault("merge-leaves", "rev-users.merge", match=lambda body: body["secondary_user"] in late)
    ]
    with Sandbox(organisation, faults=faults, latency=0.01) as sandbox:
        result = place.run(sandbox, "--merge-timeout", "4")
    assert set(result.codes.values()) == {"left_behind"}
    named = {entry["duplicate"]["id"] for entry in result.report["unfinished_merges"]}
    assert named <= late and len(named) + len(result.report["successful_merges"]) == len(
        organisation.merges
    )
