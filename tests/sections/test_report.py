"""The report: its table of codes, the contract of its data field by field, its sums, and settling."""

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence

import pytest

import merge_contacts as tool
from merge_contacts import ADVICE, STATE_WORDS, TERMINAL, UNFINISHED, Contact, Pair, State
from tests.sandbox import Sandbox
from tests.sections.test_savepoint import pair_of
from tests.simulation.scene import Run, Scene
from tests.support import ROOT, Workplace, organisation_of_pairs

SOURCE = (ROOT / "merge_contacts.py").read_text(encoding="utf-8")
# Of a file of choices, which is refused before there is a run; no pair ever has it.
NOT_OF_PAIRS = {"bad_choice"}
EARLIER, NOW = "20250101_000000", "20250131_120000"
QUICK = ("--merge-timeout", "2")


# -- the table of codes -------------------------------------------------------------------------------


def test_every_code_stands_in_the_table() -> None:
    raises = r'(?:PairError|PairSkipped|SkippedGroup)\(\s*(?:[\w.\[\]]+,\s*)?"([a-z_]+)"'
    assigned = r'\b(?:pair\.)?code(?:, \w+)* = "([a-z_]+)"'
    found = {
        match.group(1) or match.group(2) for match in re.finditer(f"{raises}|{assigned}", SOURCE)
    }
    assert len(found) > 25  # so that the pattern can't fall silent
    assert not found - ADVICE.keys() - NOT_OF_PAIRS
    assert {"forbidden", "api_error", *tool.SKIP_REASONS, *tool.SYSTEMIC} < ADVICE.keys()
    assert set(tool.PASSING) < ADVICE.keys() and set(STATE_WORDS) == set(State)


def test_the_table_says_in_sentences_what_to_do_and_why_a_group_is_skipped() -> None:
    for text in (*ADVICE.values(), *tool.SKIP_REASONS.values()):
        assert text[0].isupper() and text.endswith(".") and "  " not in text


def test_a_run_is_named_by_the_next_second_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = 1738324800.7  # 2025-01-31 12:00:00 UTC
    assert tool.free_run_id(start) == NOW
    assert tool.free_run_id(start, [NOW, "20250131_120002"]) == "20250131_120001"
    names = (
        "reports/merge_report_{}.json",
        "reports/undo_report_{}.json",
        "logs/contact_merge_{}.log",
    )
    for name in names:
        expected = tool.free_run_id(start)
        path = tmp_path / name.format(expected)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert tool.free_run_id(start) > expected
    assert tool.free_run_id(start, ["20250131_120003"]) == "20250131_120004"


# -- the contract of the data -------------------------------------------------------------------------

PRIMARY = Contact("don:p", "Ana", "ana@example.com", "REVU-1", "Ana A", 3, "2023-01-01", "")
DUPLICATE = Contact("don:d", "Bo", "ana@example.com", "user_9", "Bo B", 4, "2023-02-02", "")


def the_pair(state: State, **fields: Any) -> Pair:
    known: Dict[str, Any] = {
        "manifest_sha256": "5ha", "backup": "backups/ana", "backed_up": {"works": 7}, "proved": 6, "seconds": 1.2345,
        "fields_lost": [{"field": "phone", "value": "1"}], "requested_at": 1738324800.0,
        "first_requested_at": 1738324800.0, "updated": "2025-01-31T12:00:09.000+00:00",
    }  # fmt: skip
    return Pair(PRIMARY, DUPLICATE, "user_9", state, **{**known, **fields})


def entry_of(contact: Contact, short: str) -> Dict[str, Any]:
    return {
        "id": contact.id, "display_id": short, "display_name": contact.display_name,
        "old_external_ref": contact.external_ref, "tickets": contact.tickets,
        "created": contact.created,
    }  # fmt: skip


def test_a_merge_entry_has_each_field_with_its_value() -> None:
    primary, duplicate = (
        entry_of(PRIMARY, PRIMARY.short_id),
        entry_of(DUPLICATE, DUPLICATE.short_id),
    )
    done = tool.merge_entry(the_pair(State.DONE), {("don:p", "don:d")})
    assert done == {
        "email": "ana@example.com", "primary": primary, "duplicate": duplicate,
        "new_external_ref": "user_9", "reference_set": True, "state": "done",
        "status": "merged and verified", "in_csv": True, "backup": "backups/ana",
        "backed_up": {"works": 7}, "manifest_sha256": "5ha", "proved": 6, "fields_lost": [{"field": "phone", "value": "1"}],
        "seconds": 1.234, "requested": "2025-01-31T12:00:00.000+00:00",
        "finished": "2025-01-31T12:00:09.000+00:00",
    }  # fmt: skip
    pair = the_pair(State.MERGED, code="left_behind", error="why", left_behind=[{"id": "t"}])
    unfinished = tool.merge_entry(pair, set())
    more = {name: value for name, value in unfinished.items() if name not in done}
    assert more == {
        "code": "left_behind", "error": "why", "left_behind": [{"id": "t"}],
        "advice": ADVICE["left_behind"], "so_far": "merged in DevRev",
        "to_do": "set the reference, verify that nothing was left behind",
    }  # fmt: skip
    assert (unfinished["in_csv"], unfinished["finished"], unfinished["reference_set"]) == (
        False, None, False,
    )  # fmt: skip
    assert tool.merge_entry(pair, None)["in_csv"] is None


@pytest.mark.parametrize(
    "state, code, advice",
    [
        (State.FAILED, "not_found", "not_found"), (State.VERIFYING, "still_listed", "still_listed"),
        (State.SETTLED, "left_behind", None), (State.UNDO_SETTLED, "not_restored", None),
        (State.CANCELLED, "merge_refused", "cancelled"), (State.FAILED, "of_another_version", None),
    ],
)  # fmt: skip
def test_only_where_something_remains_to_be_done_a_pair_has_advice(
    state: State, code: str, advice: Any
) -> None:
    entry = tool.merge_entry(the_pair(state, code=code), None)
    assert entry["advice"] == ADVICE.get(advice)


def test_a_merge_that_was_carried_out_after_a_cancellation_says_so() -> None:
    entry = tool.merge_entry(the_pair(State.DONE, after_cancel=True), None)
    assert entry["after_cancel"] is True and entry["code"] == "after_cancel"
    assert "--undo" in entry["advice"] and "cancelled" in entry["error"]


def test_each_column_of_the_tables_has_its_own_value() -> None:
    row = tool.table_row(the_pair(State.DONE, code="a_code"), "merged")
    assert [row[name] for name in tool.MERGE_COLUMNS] == [
        "ana@example.com", "merged", "a_code", "don:d", DUPLICATE.short_id, "user_9", "don:p",
        PRIMARY.short_id, "REVU-1", "user_9", "4", "3", "backups/ana",
    ]  # fmt: skip
    progress = tool.UndoProgress("x", "done", "", 0, contact="don:new", display_id="REVU-N")
    row = tool.table_row(the_pair(State.UNDONE, undo=progress), "undone")
    assert [row[name] for name in tool.UNDO_COLUMNS] == [
        "ana@example.com", "undone", "", "don:d", DUPLICATE.short_id, "don:new", "REVU-N", "user_9",
    ]  # fmt: skip


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("missing", ["", "user_9"])
def test_the_table_has_a_new_reference_only_where_it_is_set(state: State, missing: str) -> None:
    pair = the_pair(state, reference_not_set=missing)
    is_set = state in (State.VERIFYING, State.DONE, State.SETTLED) and not missing
    assert tool.reference_is_set(pair) is is_set
    row = tool.table_row(pair, "")
    assert row["primary_new_external_ref"] == ("user_9" if is_set else "REVU-1")


# -- lists and sums -----------------------------------------------------------------------------------


@pytest.fixture
def savepoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tool.SavePoint]:
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(tool.SavePoint(tool.Environment(tool.ApiSettings("")), NOW)) as found:
        yield found


def stored(savepoint: tool.SavePoint, run: str, *pairs: Pair) -> List[Pair]:
    savepoint.run = run
    savepoint.save_now(pairs)
    savepoint.run = NOW
    return list(pairs)


EVERY_STATE = [state for state in State if state is not State.PLANNED]


def plan_of(pairs: Sequence[Pair], **fields: Any) -> tool.Plan:
    return tool.Plan(contacts_read=100, ids={pair.ids for pair in pairs}, **fields)


def test_a_pair_stands_in_the_report_of_the_run_that_ended_it_and_in_no_other(
    savepoint: tool.SavePoint,
) -> None:
    stored(savepoint, EARLIER, *(pair_of(10 + n, one) for n, one in enumerate(EVERY_STATE)))
    stored(savepoint, NOW, *(pair_of(30 + n, one) for n, one in enumerate(EVERY_STATE)))
    lists = tool.merge_lists(savepoint, NOW, None)
    found = {name: sorted(pair.primary.short_id for pair in pairs) for name, pairs in lists.items()}
    place = {state: f"REVU-P{30 + n}" for n, state in enumerate(EVERY_STATE)}
    assert found["successful_merges"] == [place[State.DONE]]
    assert found["failed_merges"] == [place[State.FAILED], place[State.MERGED_ELSEWHERE]]
    for name in ("settled", "cancelled", "undo_settled"):
        assert found[name] == [place[State(name)]]
    assert len(found["unfinished_merges"]) == 2 * len(UNFINISHED)  # whoever has left them
    rows = list(tool.table_rows(tool.merge_lists(savepoint, NOW, None)))
    assert len(rows) == sum(map(len, found.values()))
    assert {row["outcome"] for row in rows} == {
        "merged", "failed", "merged_elsewhere", "unfinished", "settled", "cancelled", "undo_settled",
    }  # fmt: skip


def test_the_summary_counts_the_pairs_of_the_csv_and_the_others_apart(
    savepoint: tool.SavePoint,
) -> None:
    requested = {"first_requested_at": 1.0}
    mine = stored(
        savepoint, NOW,
        pair_of(1, State.DONE, **requested), pair_of(2, State.DONE, **requested),
        pair_of(3, State.SETTLED, **requested), pair_of(4, State.FAILED),
        pair_of(5, State.MERGED_ELSEWHERE, **requested), pair_of(6, State.CANCELLED, **requested),
        pair_of(7, State.REQUESTED, **requested), pair_of(8, State.ACKNOWLEDGED, **requested),
        pair_of(9, State.MERGED, **requested), pair_of(10, State.VERIFYING, **requested),
        pair_of(11, State.UNDO_SETTLED),
    )  # fmt: skip
    stored(savepoint, NOW, pair_of(20, State.DONE), pair_of(21, State.VERIFYING))
    left_out = pair_of(30, code="already_gone"), pair_of(31, code="different_rev_org")
    plan = plan_of([*mine, *left_out, pair_of(32)], already_merged=1, left_out=list(left_out))
    summary = tool.merge_summary(savepoint, NOW, plan)
    assert summary == {
        "contacts_read": 100, "invalid_rows": 0, "pairs_planned": 14, "already_merged": 2,
        "total_merges_attempted": 9, "successful_merges": 3, "failed_merges": 3,
        "unfinished_merges": 4, "unfinished_but_merged": 2, "settled": 1, "cancelled": 1, "left": 2,
        "skipped_groups": 1, "undo_settled": 1,
        "earlier_runs": {
            "successful_merges": 1, "failed_merges": 0, "unfinished_merges": 1,
            "unfinished_but_merged": 1, "settled": 0, "cancelled": 0, "total_merges_attempted": 0,
        },
    }  # fmt: skip
    assert tool.headline(summary, tool.RunRecord(kind="merge")) == (
        "3 of 12 pairs finished, 4 unfinished, 2 of them merged in DevRev, 2 failed, 2 remaining, "
        "2 merged before, 1 group skipped, of earlier runs, not in this plan: "
        "1 finished, 1 unfinished"
    )
    killed = tool.merge_summary(savepoint, NOW, None)
    assert killed["successful_merges"] == 4 and "earlier_runs" not in killed
    unknown = ("contacts_read", "invalid_rows", "pairs_planned", "already_merged", "left")
    assert [killed[name] for name in (*unknown, "skipped_groups")] == [None] * 6
    assert tool.headline(killed, tool.RunRecord(kind="merge")).startswith("the run was killed: 4 ")


@pytest.mark.parametrize(
    "counts, words",
    [
        ({"pairs_planned": 3, "successful_merges": 3}, "3 of 3 pairs merged"),
        ({"pairs_planned": 1, "left": 1}, "0 of 1 pair merged, 1 remaining"),
        ({"pairs_planned": 2, "already_merged": 2}, "nothing to merge, 2 merged before"),
        (
            {"skipped_groups": 2, "invalid_rows": 1},
            "nothing to merge, 2 groups skipped, 1 invalid row",
        ),
        ({"kind": "settle", "pairs_planned": None}, "nothing settled"),
        ({"kind": "settle", "settled": 1, "unfinished_merges": 2}, "1 settled, 2 unfinished"),
        (
            {"kind": "settle", "failed_merges": 1, "cancelled": 1, "undo_settled": 1},
            "1 cancelled, 1 partly undone",
        ),
    ],
)
def test_the_headline_says_what_a_run_has_come_to(counts: Dict[str, Any], words: str) -> None:
    kind = counts.pop("kind", "merge")
    summary = {**dict.fromkeys(tool.SUMMARY, 0), **counts}
    assert tool.headline(summary, tool.RunRecord(kind=kind)) == words


def test_no_more_than_a_thousand_invalid_rows_are_listed_and_all_are_counted(
    place: Workplace,
) -> None:
    good = "don:identity:dvrv-us-1:devo/A:revu/{},A,a@example.com,{},A,1,2023-01-01,\n"
    lines = [good.format(1, "REVU-1"), good.format(2, "user_1"), "1,2,3\n" * 5000]
    place.csv.write_text(f"{','.join(tool.COLUMNS.values())}\n{''.join(lines)}", encoding="utf-8")
    plan = json.loads(place.run(None, "--preview", "--json", check=0).out)
    assert 100 < len(plan["invalid_rows"]) <= 1000 and plan["summary"]["invalid_rows"] == 5000
    out = place.run(None, "--preview", check=0).out
    assert len(out.splitlines()) < 50 and "5,000 invalid rows" in out
    assert max(path.stat().st_size for path in place.folder.glob("logs/*")) < 200_000


# -- settling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("code", ["", "interrupted", "merge_not_confirmed", "undo_unfinished"])
def test_what_can_be_settled(state: State, code: str) -> None:
    # A reference that is not set yet is set by another run, unless two have left it so.
    pair = pair_of(1, state, code=code, error="why", run=NOW, unset_since=EARLIER)
    error = tool.settle_error(pair)
    named = code == "merge_not_confirmed"
    is_past_it = state in (*TERMINAL, State.MERGED, State.VERIFYING, State.UNDOING)
    assert (not error) == (is_past_it or (state in UNFINISHED and named))
    if not error:
        tool.settle_pair(pair)
        wanted = {
            State.REQUESTED: State.CANCELLED, State.ACKNOWLEDGED: State.CANCELLED,
            State.MERGED: State.SETTLED, State.VERIFYING: State.SETTLED,
            State.UNDOING: State.UNDO_SETTLED,
        }  # fmt: skip
        assert pair.state is wanted.get(state, state)
        assert bool(pair.accepted) == (state in wanted)
        assert (pair.reference_not_set == "user_1") == (state is State.MERGED)
    assert tool.settle_error(pair_of(1, State.MERGED, run=NOW, unset_since=NOW))


def table_of(path: Path) -> List[Mapping[str, str]]:
    """Return the rows of the CSV beside a report."""
    raw = path.with_suffix(".csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))


def never_merges(scene: Scene, duplicate: str) -> Any:
    return scene.fault(
        "merge-never", "rev-users.merge", match=lambda body: body.get("secondary_user") == duplicate
    )


def assert_sum(run: Run) -> None:
    summary = run.report["summary"]
    parts = ("already_merged", "successful_merges", "failed_merges", "unfinished_merges", "left")
    assert summary["pairs_planned"] == sum(summary[part] for part in parts), summary


def test_the_parts_are_the_sum_and_the_table_has_a_line_a_pair(scene: Scene) -> None:
    pairs = scene.pairs(5)
    scene.export({pairs[1][0]: {"tickets": 9}})
    never_merges(scene, pairs[2][1])
    scene.merge("--email", "person5@example.com")
    run = scene.merge(*QUICK, "--limit", "3")
    assert_sum(run)
    summary = run.report["summary"]
    assert (summary["already_merged"], summary["successful_merges"], summary["left"]) == (1, 1, 1)
    assert summary["failed_merges"] == summary["unfinished_merges"] == 1
    rows = {row["email"][6]: row for row in table_of(run.report_path)}
    outcomes = {number: row["outcome"] for number, row in rows.items()}
    assert outcomes == {"1": "merged", "2": "failed", "3": "unfinished"}
    assert rows["1"]["primary_new_external_ref"] == "user_1"
    assert rows["2"]["code"] == "count_mismatch"
    assert rows["3"]["primary_new_external_ref"] == "REVU-P3"
    facts = run.report["run"]
    assert facts["plan_id"] and len(facts["csv"][0]["sha256"]) == 64
    assert run.report["schema"] == tool.SCHEMA


def test_a_cancelled_merge_is_left_alone_until_it_is_named(scene: Scene) -> None:
    pairs = scene.pairs(2)
    fault = never_merges(scene, pairs[1][1])
    scene.merge(*QUICK)
    requests = len(scene.world.requests)
    settled = scene.settle("Person2@EXAMPLE.com")
    assert settled.code == 0 and len(scene.world.requests) == requests
    (entry,) = settled.report["cancelled"]
    assert (entry["state"], entry["code"]) == ("cancelled", "merge_not_confirmed")
    summary = settled.report["summary"]
    assert summary["failed_merges"] == summary["cancelled"] == 1
    assert settled.report["run"]["kind"] == "settle" and settled.report["skipped"] is None
    again = scene.merge()
    assert [one["code"] for one in again.report["skipped"]] == ["cancelled"]
    (row,) = table_of(again.report_path)
    named = {"email": "person2@example.com", "outcome": "skipped", "code": "cancelled"}
    assert row == {**dict.fromkeys(tool.MERGE_COLUMNS, ""), **named}
    assert again.count("rev-users.merge") == 0
    assert_sum(again)
    scene.world.faults.remove(fault)
    run = scene.merge("--email", "person2@example.com", *QUICK)
    assert run.code == 0 and len(run.report["successful_merges"]) == 1
    assert scene.holder("user_2") == pairs[1][0]


def test_a_cancelled_merge_that_devrev_carries_out_after_all_is_finished_and_marked(
    scene: Scene,
) -> None:
    pairs = scene.pairs(2)
    never_merges(scene, pairs[1][1])
    scene.merge(*QUICK)
    scene.settle("person2@example.com")
    scene.organisation.merge(*pairs[1])
    run = scene.merge()
    (entry,) = run.report["successful_merges"]
    assert run.code == 1 and entry["after_cancel"] and "--undo" in run.out
    # The CSV has the pair, and the plan has not: its group is skipped.
    assert "of earlier runs, not in this plan: 1 finished" in run.report["run"]["headline"]
    assert scene.merge().report["successful_merges"] == []
    assert scene.holder("user_2") == pairs[1][0]


def test_a_settled_pair_is_no_plain_success_and_its_reference_is_named_in_every_report(
    scene: Scene,
) -> None:
    scene.pairs(2)
    match = lambda body: body.get("external_ref") == "user_2"  # noqa: E731
    scene.fault("400", "rev-users.update", match=match)
    scene.merge(*QUICK)
    scene.merge(*QUICK)
    settled = scene.settle("person2@example.com")
    (entry,) = settled.report["settled"]
    assert settled.code == 0 and entry["accepted"] and entry["advice"] is None
    assert (entry["reference_set"], entry["reference_not_set"]) == (False, "user_2")
    assert settled.report["successful_merges"] == []
    later = scene.merge()
    assert later.report["summary"]["already_merged"] == 2
    assert_sum(later)
    for run in (settled, later):
        (reference,) = run.report["references_to_set"]
        assert reference["reference"] == "user_2" and "set it on REVU-P2" in reference["advice"]


def test_settle_says_the_truth_of_every_address(scene: Scene) -> None:
    pairs = scene.pairs(3)
    scene.export({pairs[1][0]: {"tickets": 9}})
    never_merges(scene, pairs[2][1])
    scene.merge(*QUICK)
    unknown = scene.settle("persom3@example.com", "person1@example.com")
    assert unknown.code == 2 and "persom3@example.com: no pair in savepoint.db" in unknown.err
    done = scene.settle("person1@example.com")
    assert "done  person1@example.com" in done.out
    assert done.report["run"]["headline"] == "nothing settled, 1 unfinished"
    mixed = scene.settle("person2@example.com", "person3@example.com")
    assert mixed.code == 1
    assert re.search(r"NOT SETTLED  person2@.* was not requested \(count_mismatch\)", mixed.out)
    assert [one["email"] for one in mixed.report["cancelled"]] == ["person3@example.com"]


def test_a_pair_that_was_only_interrupted_is_run_again_not_settled(scene: Scene) -> None:
    (pair,) = scene.pairs(1)
    never_merges(scene, pair[1])
    scene.after("rev-users.get", scene.ctrl_c)
    scene.merge()
    settled = scene.settle("person1@example.com")
    assert settled.code == 1 and "run again" in settled.out


# -- who is in which report ---------------------------------------------------------------------------


def test_pairs_of_earlier_runs_that_are_not_in_the_csv_are_marked_and_outside_the_sum(
    scene: Scene,
) -> None:
    pairs = scene.pairs(2)
    never_merges(scene, pairs[1][1])
    scene.merge(*QUICK)
    scene.export(leave_out=pairs[1])
    scene.organisation.merge(*pairs[1])
    run = scene.merge()
    (entry,) = run.report["successful_merges"]
    assert (entry["email"], entry["in_csv"]) == ("person2@example.com", False)
    assert_sum(run)
    assert run.report["summary"]["earlier_runs"]["successful_merges"] == 1
    assert run.report["summary"]["pairs_planned"] == 0


def test_what_the_live_check_leaves_out_is_skipped_and_the_sum_holds(scene: Scene) -> None:
    pairs = scene.pairs(1)
    gone, elsewhere = (
        scene.organisation.add_contact(key, "person1@example.com") for key in ("G1", "W1")
    )
    for contact, workspace in ((elsewhere, "9"), (pairs[0][0], "1"), (pairs[0][1], "1")):
        one = scene.organisation.contacts[contact]
        one["rev_org"] = {"id": f"don:identity:dvrv-us-1:devo/SANDBOX1:revo/{workspace}"}
    Path("choices.csv").write_text("EMAIL,EXTERNAL_REF\nperson1@example.com,user_1\n")
    scene.export()
    del scene.organisation.contacts[gone]
    run = scene.merge("--choices", "choices.csv")
    rows = [row for row in table_of(run.report_path) if row["outcome"] == "skipped"]
    assert {(row["duplicate_id"], row["code"]) for row in rows} == {
        (gone, "already_gone"), (elsewhere, "different_rev_org"),
    }  # fmt: skip
    summary = run.report["summary"]
    assert (summary["already_merged"], summary["successful_merges"], summary["left"]) == (1, 1, 0)
    assert summary["skipped_groups"] == 1
    assert_sum(run)


def test_a_killed_undo_gets_its_report_from_the_next_run(scene: Scene) -> None:
    scene.pairs(2)
    merged = scene.merge("--email", "person1@example.com")
    scene.kill("sending rev-users.create")
    scene.undo(str(merged.report_path))
    run = scene.merge()
    (path,) = Path("reports").glob("undo_report_*.json")
    undone = json.loads(path.read_bytes())
    assert (undone["run"]["stopped"], undone["run"]["exit_code"]) == ("killed", None)
    assert [one["email"] for one in undone["unfinished"]] == ["person1@example.com"]
    assert [row["outcome"] for row in table_of(path)] == ["unfinished"]
    assert run.codes == {"person1@example.com": "undo_unfinished"}
    assert_sum(run)


def test_an_id_is_followed_through_the_tables_of_a_merge_an_undo_and_a_second_merge(
    scene: Scene,
) -> None:
    ((primary, old),) = scene.pairs(1)
    merged = scene.merge()
    before = Path("contacts.csv").read_text()
    undone = scene.undo(str(merged.report_path))
    assert [one["code"] for one in scene.merge().report["skipped"]] == ["undone"]
    scene.export()
    tables = [table_of(run.report_path) for run in (merged, undone)]
    assert [row["primary_id"] for row in tables[0] if row["duplicate_id"] == old] == [primary]
    (row,) = (row for row in tables[1] if row["old_id"] == old)
    assert (row["outcome"], row["external_ref"]) == ("undone", "user_1")
    assert scene.organisation.contacts[row["new_id"]]["external_ref"] == "user_1"
    second = scene.merge("--email", "person1@example.com")
    (last,) = (one for one in table_of(second.report_path) if one["duplicate_id"] == row["new_id"])
    assert last["primary_id"] == primary == scene.holder("user_1")
    # The first CSV is of before all this: it is told what has become of its pair.
    Path("contacts.csv").write_text(before)
    (skip,) = scene.merge().report["skipped"]
    assert skip["code"] == "merged_again" and "Nothing needs to be done." in skip["advice"]


def test_a_run_leaves_the_page_and_the_table_beside_the_report(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=0)
    for name in ("report", "page", "table"):
        (path,) = re.findall(rf"^{name} +(\S+)$", result.out, re.MULTILINE)
        assert (place.folder / path).stat().st_size > 100
