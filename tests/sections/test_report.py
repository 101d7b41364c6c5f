"""Reports and settling: the sum, one table of codes, CSV cells, and what becomes of a pair that a person gives up."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

import merge_contacts
from merge_contacts import (
    CODES,
    SKIP_REASONS,
    STATE_WORDS,
    TERMINAL,
    UNFINISHED,
    State,
    free_run_id,
    guard_cell,
    settle_error,
    settle_pair,
)
from tests.sandbox import Fault, Organisation, Sandbox
from tests.sections.test_savepoint import pair_of, posix
from tests.support import ROOT, Result, Workplace, assert_merged, organisation_of_pairs

SOURCE = (ROOT / "merge_contacts.py").read_text(encoding="utf-8")
# Of a file of choices, which is refused before there is a run; no pair ever has it.
NOT_OF_PAIRS = {"bad_choice"}


# -- the table of codes -------------------------------------------------------------------------------


def raised_codes() -> Dict[str, str]:
    """Every code that the module gives to a pair or a group, with the text around it."""
    raises = r'(?:PairError|PairSkipped|SkippedGroup)\(\s*(?:[\w.\[\]]+,\s*)?"([a-z_]+)"'
    assigned = r'\b(?:pair\.)?code(?:, \w+)* = "([a-z_]+)"'
    return {
        found.group(1): found.group()
        for found in re.finditer(f"{raises}|{assigned}", SOURCE)
        if found.group(1)
    }


def test_every_code_stands_in_the_table() -> None:
    codes = raised_codes()
    assert len(codes) > 25  # so that the pattern can't fall silent
    assert not codes.keys() - CODES.keys() - NOT_OF_PAIRS
    assert {"forbidden", "api_error"} < CODES.keys()


def test_the_table_says_in_sentences_what_a_code_means_and_what_to_do() -> None:
    for code, one in CODES.items():
        for text in filter(None, (one.why, one.advice)):
            assert text[0].isupper() and text.endswith(".") and "  " not in text, code
    assert list(SKIP_REASONS) == [code for code, one in CODES.items() if one.why]
    assert set(STATE_WORDS) == set(State)


# -- small things by tables ---------------------------------------------------------------------------


def test_a_run_is_named_by_the_next_second_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = 1738324800.7  # 2025-01-31 12:00:00 UTC
    assert free_run_id(start) == "20250131_120000"
    assert free_run_id(start, ["20250131_120000", "20250131_120002"]) == "20250131_120001"
    for folder, name in (
        ("reports", "merge_report_{}.json"),
        ("reports", "undo_report_{}.json"),
        ("logs", "contact_merge_{}.log"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        expected = free_run_id(start)
        (tmp_path / folder / name.format(expected)).touch()
        assert free_run_id(start) > expected
    assert free_run_id(start, ["20250131_120003"]) == "20250131_120004"


@pytest.mark.parametrize(
    "cell, safe",
    [
        ("ana@example.com", "ana@example.com"), ("", ""), ("it's", "it's"), ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"),
        ("@sum", "'@sum"), ("\tx", "'\tx"), ("\rx", "'\rx"), ("'=1", "''=1"), ("''@x", "'''@x"), ("'x", "'x"),
    ],
)  # fmt: skip
def test_no_cell_is_a_formula(cell: str, safe: str) -> None:
    assert guard_cell(cell) == safe


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(
    "code",
    ["", "interrupted", "left_behind", "merge_not_confirmed", "api_error", "undo_unfinished"],
)
def test_what_can_be_settled(state: State, code: str) -> None:
    pair = pair_of(1, state, code=code, error="why")
    error = settle_error(pair)
    # What DevRev did not answer may be fixed by another run, where the duplicate no longer exists.
    can_be_fixed = code == "api_error" and state in (State.MERGED, State.VERIFYING)
    named = code in ("left_behind", "merge_not_confirmed", "api_error") and not can_be_fixed
    assert (not error) == (
        state in TERMINAL or state is State.UNDOING or (state in UNFINISHED and named)
    )
    if not error:
        settle_pair(pair)
        wanted = {
            State.REQUESTED: State.CANCELLED,
            State.ACKNOWLEDGED: State.CANCELLED,
            State.MERGED: State.SETTLED,
            State.VERIFYING: State.SETTLED,
            State.UNDOING: State.UNDO_SETTLED,
        }
        assert pair.state is wanted.get(state, state)
        assert bool(pair.accepted) == (state in wanted)
        assert (pair.reference_not_set == "user_1") == (state is State.MERGED)


# -- the sum ------------------------------------------------------------------------------------------


def assert_sum(report: Dict[str, Any]) -> None:
    summary = report["summary"]
    parts = ("already_merged", "successful_merges", "failed_merges", "unfinished_merges", "left")
    assert summary["pairs_planned"] == sum(summary[part] for part in parts), summary
    mine = {name: [one for one in report[name] if one["in_csv"]] for name in LISTS}
    assert summary["successful_merges"] == len(mine["successful_merges"]) + len(mine["settled"])
    assert summary["failed_merges"] == len(mine["failed_merges"]) + len(mine["cancelled"])
    assert summary["unfinished_merges"] == len(mine["unfinished_merges"])
    assert (summary["settled"], summary["cancelled"]) == (
        len(mine["settled"]),
        len(mine["cancelled"]),
    )


def table_of(place: Workplace, result: Result) -> List[Dict[str, str]]:
    """Return the rows of the CSV beside a report."""
    raw = (place.folder / "reports" / f"merge_report_{result.report['run']['id']}.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))


LISTS = ("successful_merges", "failed_merges", "unfinished_merges", "settled", "cancelled")


def only(duplicate: str) -> Any:
    return lambda body: duplicate in (body.get("secondary_user"), body.get("id"))


def test_the_parts_are_the_sum_and_the_csv_has_a_line_a_pair(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(5, (1, 1))
    organisation.contacts[pairs[0][1]]["display_name"] = "=HYPERLINK(1)"
    place.export(organisation, {pairs[1][0]: {"TICKET_COUNT": 9}})
    with Sandbox(
        organisation, faults=[Fault("merge-never", "rev-users.merge", match=only(pairs[2][1]))]
    ) as sandbox:
        place.run(sandbox, "--email", "person5@example.com", check=0)
        result = place.run(sandbox, "--merge-timeout", "1", "--limit", "3", check=1)
    assert_sum(result.report)
    summary = result.report["summary"]
    assert (summary["already_merged"], summary["successful_merges"], summary["left"]) == (1, 1, 1)
    assert summary["failed_merges"] == summary["unfinished_merges"] == 1
    assert summary["total_merges_attempted"] == 2  # of the others none was requested
    rows = {row["email"]: row for row in table_of(place, result)}
    assert {email[6]: row["outcome"] for email, row in rows.items()} == {
        "1": "merged",
        "2": "failed",
        "3": "unfinished",
    }
    row = rows["person1@example.com"]
    assert (row["duplicate_id"], row["primary_id"]) == (pairs[0][1], pairs[0][0])
    assert (row["duplicate_external_ref"], row["primary_old_external_ref"]) == ("user_1", "REVU-P1")
    assert row["primary_new_external_ref"] == "user_1" and row["backup"].startswith("backups")
    assert rows["person2@example.com"]["code"] == "count_mismatch"
    assert rows["person3@example.com"]["primary_new_external_ref"] == "REVU-P3"
    run = result.report["run"]
    assert run["plan_id"] and len(run["csv"]) == 1 and len(run["csv"][0]["sha256"]) == 64
    assert "plan" not in run and result.report["schema"] == merge_contacts.SCHEMA
    assert {"look_alikes", "skipped", "invalid_rows"} <= result.report.keys()


# -- settling -----------------------------------------------------------------------------------------


def never_merged(place: Workplace) -> Tuple[Organisation, List[Tuple[str, str]]]:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    return organisation, pairs


def test_a_merge_that_devrev_never_carries_out_can_be_cancelled_and_is_then_left_alone(
    place: Workplace,
) -> None:
    organisation, pairs = never_merged(place)
    fault = Fault("merge-never", "rev-users.merge", match=only(pairs[1][1]))
    with Sandbox(organisation, faults=[fault]) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        requests = len(sandbox.requests)
        result = place.run(sandbox, "--settle", " Person2@EXAMPLE.com", check=0)
        assert len(sandbox.requests) == requests  # nothing is requested, nothing is changed
        assert "cancelled" in result.out and "not in this plan" not in result.out
        (entry,) = result.report["cancelled"]
        assert (entry["email"], entry["state"], entry["code"]) == (
            "person2@example.com",
            "cancelled",
            "merge_not_confirmed",
        )
        assert (
            result.report["summary"]["failed_merges"] == result.report["summary"]["cancelled"] == 1
        )
        assert result.report["successful_merges"] == result.report["settled"] == []
        assert result.report["run"]["kind"] == "settle" and result.report["skipped"] is None
        assert "1 cancelled, not merged" in place.run(None, "--status", check=0).out
        # Later runs skip it, and say so.
        merges = sandbox.count("rev-users.merge")
        again = place.run(sandbox, check=0)
        assert [one["code"] for one in again.report["skipped"]] == ["cancelled"] and again.report[
            "cancelled"
        ] == []
        (row,) = table_of(place, again)
        assert (row["email"], row["outcome"], row["code"]) == (
            "person2@example.com",
            "skipped",
            "cancelled",
        )
        assert set(row.values()) == {
            "person2@example.com",
            "skipped",
            "cancelled",
            "",
        }  # it has no pairs
        assert_sum(again.report)
        assert sandbox.count("rev-users.merge") == merges
        # To settle it once more changes nothing.
        assert (
            place.run(sandbox, "--settle", "person2@example.com", check=0).report["cancelled"] == []
        )
        # A person who names it has it merged after all.
        sandbox.faults.clear()
        named = place.run(
            sandbox, "--email", "person2@example.com", "--merge-timeout", "1", check=0
        )
        assert [one["email"] for one in named.report["successful_merges"]] == [
            "person2@example.com"
        ]
        assert_sum(named.report)
    assert_merged(organisation, pairs)


def test_a_cancelled_merge_that_devrev_carries_out_after_all_is_finished_and_marked(
    place: Workplace,
) -> None:
    organisation, pairs = never_merged(place)
    fault = Fault("merge-never", "rev-users.merge", match=only(pairs[1][1]))
    with Sandbox(organisation, faults=[fault]) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        place.run(sandbox, "--settle", "person2@example.com", check=0)
        organisation.merge(*pairs[1])
        result = place.run(sandbox, check=1)
        (entry,) = result.report["successful_merges"]
        assert entry["email"] == "person2@example.com" and entry["after_cancel"] is True
        assert "1 after_cancel: person2@example.com" in result.out and "--undo" in result.out
        # The CSV has the pair, and the plan has not: its group is skipped.
        assert "of earlier runs, not in this plan: 1 finished" in result.report["run"]["headline"]
        assert place.run(sandbox, check=0).report["successful_merges"] == []
    assert_merged(organisation, pairs)


def test_what_can_not_be_fixed_of_a_merged_pair_is_settled_and_no_plain_success(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2, (1, 3))
    place.export(organisation)
    left = {
        one
        for one, work in organisation.works.items()
        if pairs[1][1] in [u["id"] for u in work["reported_by"]]
    }
    fault = Fault("merge-leaves", "rev-users.merge", match=only(pairs[1][1]), detail=left)
    with Sandbox(organisation, faults=[fault]) as sandbox:
        assert (
            "next: run the same command again later"
            in place.run(sandbox, "--merge-timeout", "1", check=1).err
        )
        result = place.run(sandbox, "--settle", "person2@example.com", check=0)
        (entry,) = result.report["settled"]
        assert entry["accepted"].startswith("left_behind: ") and entry["state"] == "settled"
        assert result.report["successful_merges"] == [] and result.report["summary"]["settled"] == 1
        assert "1 settled" in result.report["run"]["headline"]
        again = place.run(sandbox, check=0)
        assert again.report["summary"]["already_merged"] == 2
        assert_sum(again.report)


def test_settle_says_the_truth_of_every_address(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation, {pairs[1][0]: {"TICKET_COUNT": 9}})
    fault = Fault("merge-never", "rev-users.merge", match=only(pairs[2][1]))
    with Sandbox(organisation, faults=[fault]) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        before = (place.folder / "savepoint.db").read_bytes()
        unknown = place.run(
            sandbox, "--settle", "persom3@example.com", "person1@example.com", check=2
        )
        assert (
            "persom3@example.com" in unknown.err
            and "did you mean person3@example.com?" in unknown.err
        )
        assert unknown.report == {}
        done = place.run(sandbox, "--settle", "person1@example.com", check=0)
        assert (
            "nothing to settle  person1@example.com" in done.out
            and "merged and verified" in done.out
        )
        assert done.report["run"]["headline"] == "nothing settled, 1 still unfinished"
        failed = place.run(
            sandbox, "--settle", "person2@example.com", "person3@example.com", check=1
        )
        assert re.search(
            r"NOT SETTLED  person2@.* was not requested \(count_mismatch\)", failed.out
        )
        assert [one["email"] for one in failed.report["cancelled"]] == ["person3@example.com"]
        assert failed.report["run"]["headline"] == "1 cancelled"
        assert before != (place.folder / "savepoint.db").read_bytes()


def test_a_pair_that_was_only_interrupted_is_run_again_not_settled(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("merge-never", "rev-users.merge", times=1)]
    ) as sandbox:
        process = place.start(sandbox)
        while not sandbox.count("rev-users.get"):
            pass
        process.terminate()
        process.communicate(timeout=30)
        result = place.run(sandbox, "--settle", "person1@example.com", check=1)
        assert "run again" in result.out
        place.run(sandbox, "--merge-timeout", "1", check=0)
    assert_merged(organisation, pairs)


def entries_of(result: Result, name: str) -> List[str]:
    return [entry["email"] for entry in result.report[name]]


def test_pairs_of_earlier_runs_that_are_not_in_the_csv_are_marked_and_outside_the_sum(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(
        organisation, faults=[Fault("merge-never", "rev-users.merge", match=only(pairs[1][1]))]
    ) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        place.export(organisation, leave_out=pairs[1])
        organisation.merge(*pairs[1])
        result = place.run(sandbox, check=0)
        assert entries_of(result, "successful_merges") == ["person2@example.com"]
        assert result.report["successful_merges"][0]["in_csv"] is False
        assert_sum(result.report)
        assert result.report["summary"]["earlier_runs"]["successful_merges"] == 1
        assert "of earlier runs, not in this plan: 1 finished" in result.out
        assert result.report["summary"]["pairs_planned"] == 0


def test_what_the_live_check_leaves_out_is_skipped_and_the_sum_holds(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    gone, elsewhere = (organisation.add_contact(key, "person1@example.com") for key in ("G1", "W1"))
    organisation.contacts[elsewhere]["rev_org"] = {
        "id": "don:identity:dvrv-us-1:devo/SANDBOX1:revo/9"
    }
    organisation.contacts[pairs[0][0]]["rev_org"] = {
        "id": "don:identity:dvrv-us-1:devo/SANDBOX1:revo/1"
    }
    organisation.contacts[pairs[0][1]]["rev_org"] = {
        "id": "don:identity:dvrv-us-1:devo/SANDBOX1:revo/1"
    }
    choices = place.folder / "choices.csv"
    choices.write_text("EMAIL,EXTERNAL_REF\nperson1@example.com,user_1\n", encoding="utf-8")
    place.export(organisation)
    del organisation.contacts[gone]
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, "--choices", str(choices), check=0)
    assert {(one["email"], one["code"]) for one in result.report["skipped"]} == {
        ("person1@example.com", "already_gone"), ("person1@example.com", "different_rev_org"),
    }  # fmt: skip
    assert_sum(result.report)
    rows = [row for row in table_of(place, result) if row["outcome"] == "skipped"]
    assert {(row["duplicate_id"], row["code"]) for row in rows} == {
        (gone, "already_gone"), (elsewhere, "different_rev_org"),
    }  # fmt: skip
    assert {row["primary_id"] for row in rows} == {pairs[0][0]}
    summary = result.report["summary"]
    assert (summary["pairs_planned"], summary["already_merged"], summary["successful_merges"]) == (
        3,
        1,
        2,
    )
    assert (summary["skipped_groups"], summary["left"]) == (1, 0)
    assert_merged(organisation, pairs)


@posix
def test_a_killed_undo_gets_its_report_from_the_next_run_and_refuses_its_group_meanwhile(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    process: List[Any] = []
    with Sandbox(organisation) as sandbox:
        merged = place.run(sandbox, "--email", "person1@example.com", check=0)
        path = f"reports/merge_report_{merged.report['run']['id']}.json"

        def kill(stage: str, request: Any) -> None:
            if stage == "before" and request.endpoint == "rev-users.create" and process:
                process.pop().kill()

        sandbox.on_request = kill
        process.append(place.start(sandbox, "--undo", path, "--yes"))
        process[0].communicate(timeout=60)
        result = place.run(sandbox, check=1)
        (report,) = (place.folder / "reports").glob("undo_report_*.json")
        undone = json.loads(report.read_text(encoding="utf-8"))
        assert (undone["run"]["kind"], undone["run"]["stopped"], undone["run"]["exit_code"]) == (
            "undo",
            "killed",
            None,
        )
        assert [one["email"] for one in undone["unfinished"]] == ["person1@example.com"]
        newest = max((place.folder / "reports").glob("merge_report_*.json"))
        result.report = json.loads(newest.read_text(encoding="utf-8"))
        assert result.codes == {"person1@example.com": "undo_unfinished"}
        assert entries_of(result, "successful_merges") == ["person2@example.com"]
        assert_sum(result.report)
        place.run(sandbox, "--undo", path, "--yes", check=0)
        assert len(list((place.folder / "reports").glob("undo_report_*.json"))) == 2
