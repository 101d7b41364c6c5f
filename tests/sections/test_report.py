"""The report: its codes, the contract of its data field by field, its sums, and settling."""

import contextlib
import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping

import pytest

import merge_contacts as tool
from merge_contacts import ADVICE, STATE_WORDS, TERMINAL, UNFINISHED, Contact, Pair, State
from tests.sections.test_savepoint import pair_of
from tests.simulation.scene import Scene
from tests.support import ROOT

EARLIER, NOW = "20250101_000000", "20250131_120000"
QUICK = ("--merge-timeout", "2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_code_has_advice_and_advice_and_reasons_are_sentences() -> None:
    source = (ROOT / "merge_contacts.py").read_text(encoding="utf-8")
    raises = r'(?:PairError|PairSkipped|SkippedGroup)\(\s*(?:[\w.\[\]]+,\s*)?"([a-z_]+)"'
    assigned = r'\b(?:pair\.)?code(?:, \w+)* = "([a-z_]+)"'
    found = {one[1] or one[2] for one in re.finditer(f"{raises}|{assigned}", source)}
    assert len(found) > 25  # so that the pattern can't fall silent
    # A file of choices is refused before there is a run; no pair ever has its code.
    found |= {"forbidden", "api_error", *tool.SKIP_REASONS, *tool.SYSTEMIC, *tool.PASSING}
    found.update(tool.LIVE_CODES)
    assert found - {"bad_choice"} < ADVICE.keys() and set(STATE_WORDS) == set(State)
    for text in (*ADVICE.values(), *tool.SKIP_REASONS.values()):
        assert text[0].isupper() and text.endswith(".") and "  " not in text


def test_a_run_is_named_by_the_next_free_second(here: None) -> None:
    start = 1738324800.7  # 2025-01-31 12:00:00 UTC
    assert tool.free_run_id(start) == NOW
    assert tool.free_run_id(start, [NOW, "20250131_120002"]) == "20250131_120001"
    for name in ("reports/merge_report", "reports/undo_report", "logs/contact_merge"):
        expected = tool.free_run_id(start)
        path = Path(f"{name}_{expected}.{'log' if 'logs' in name else 'json'}")
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert tool.free_run_id(start) > expected


# -- the contract of the data --------------------------------------------------------------------

PRIMARY = Contact("don:p", "Ana", "ana@example.com", "REVU-1", "Ana A", 3, "2023-01-01", "")
DUPLICATE = Contact("don:d", "Bo", "ana@example.com", "user_9", "Bo B", 4, "2023-02-02", "")
LOST = [{"field": "phone", "value": "1"}]


def the_pair(state: State, **fields: Any) -> Pair:
    known: Dict[str, Any] = {
        "manifest_sha256": "5ha", "backup": "backups/ana", "backed_up": {"works": 7}, "proved": 6,
        "seconds": 1.2345, "fields_lost": LOST, "requested_at": 1738324800.0,
        "first_requested_at": 1738324800.0, "updated": "2025-01-31T12:00:09.000+00:00",
    }  # fmt: skip
    return Pair(PRIMARY, DUPLICATE, "user_9", state, **{**known, **fields})


def test_a_merge_entry_has_each_field_with_its_value() -> None:
    primary = {
        "id": "don:p", "display_id": PRIMARY.short_id, "display_name": "Ana",
        "old_external_ref": "REVU-1", "tickets": 3, "created": "2023-01-01",
    }  # fmt: skip
    duplicate = {
        "id": "don:d", "display_id": DUPLICATE.short_id, "display_name": "Bo",
        "old_external_ref": "user_9", "tickets": 4, "created": "2023-02-02",
    }  # fmt: skip
    done = tool.merge_entry(the_pair(State.DONE), {("don:p", "don:d")})
    assert done == {
        "email": "ana@example.com", "primary": primary, "duplicate": duplicate,
        "new_external_ref": "user_9", "reference_set": True, "state": "done",
        "status": "merged and verified", "in_csv": True, "backup": "backups/ana",
        "backed_up": {"works": 7}, "manifest_sha256": "5ha", "proved": 6, "fields_lost": LOST,
        "seconds": 1.234, "requested": "2025-01-31T12:00:00.000+00:00",
        "finished": "2025-01-31T12:00:09.000+00:00",
    }  # fmt: skip
    pair = the_pair(State.MERGED, code="left_behind", error="why", left_behind=[{"id": "t"}])
    unfinished = tool.merge_entry(pair, set())
    assert {name: one for name, one in unfinished.items() if one != done.get(name)} == {
        "code": "left_behind", "error": "why", "left_behind": [{"id": "t"}],
        "advice": ADVICE["left_behind"], "so_far": "merged in DevRev", "state": "merged",
        "to_do": "set the reference, verify that nothing was left behind", "in_csv": False,
        "status": "merged in DevRev", "finished": None, "reference_set": False,
    }  # fmt: skip
    assert tool.merge_entry(pair, None)["in_csv"] is None
    late = tool.merge_entry(the_pair(State.DONE, after_cancel=True), None)
    assert late["after_cancel"] is True and late["code"] == "after_cancel"
    assert "--undo" in late["advice"] and "cancelled" in late["error"]


@pytest.mark.parametrize(
    "state, code, advice",
    [
        (State.FAILED, "not_found", "not_found"), (State.VERIFYING, "still_listed", "still_listed"),
        (State.SETTLED, "left_behind", ""), (State.UNDO_SETTLED, "not_restored", ""),
        (State.CANCELLED, "merge_refused", "cancelled"), (State.FAILED, "of_another_version", ""),
    ],
)  # fmt: skip
def test_a_pair_has_advice_only_where_something_remains(
    state: State, code: str, advice: str
) -> None:
    entry = tool.merge_entry(the_pair(state, code=code), None)
    assert entry["advice"] == ADVICE.get(advice)


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


# -- lists and sums ------------------------------------------------------------------------------


@pytest.fixture
def savepoint(here: None) -> Iterator[tool.SavePoint]:
    with contextlib.closing(tool.SavePoint(tool.Environment(tool.ApiSettings("")), NOW)) as found:
        yield found


def stored(savepoint: tool.SavePoint, run: str, *pairs: Pair) -> List[Pair]:
    savepoint.run = run
    savepoint.save_now(pairs)
    savepoint.run = NOW
    return list(pairs)


EVERY_STATE = [state for state in State if state is not State.PLANNED]


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
        "merged", "failed", "merged_elsewhere", "unfinished", "settled", "cancelled",
        "undo_settled",
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
    ids = {pair.ids for pair in (*mine, *left_out, pair_of(32))}
    plan = tool.Plan(contacts_read=100, ids=ids, already_merged=1, left_out=list(left_out))
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
        "3 of 12 pairs finished, 4 unfinished (2 merged in DevRev), 2 failed, 2 remaining, "
        "2 merged before, 1 group skipped, of earlier runs, not in this plan: "
        "1 finished, 1 unfinished"
    )
    killed = tool.merge_summary(savepoint, NOW, None)
    assert killed["successful_merges"] == 4 and "earlier_runs" not in killed
    unknown = ("contacts_read", "invalid_rows", "pairs_planned", "already_merged", "left")
    assert [killed[name] for name in (*unknown, "skipped_groups")] == [None] * 6
    assert tool.headline(killed, tool.RunRecord(kind="merge")).startswith("the run was killed: 4 ")


@pytest.mark.parametrize(
    "kind, counts, words",
    [
        ("merge", {"pairs_planned": 3, "successful_merges": 3}, "3 of 3 pairs merged"),
        ("merge", {"pairs_planned": 1, "left": 1}, "0 of 1 pair merged, 1 remaining"),
        ("merge", {"pairs_planned": 2, "already_merged": 2}, "nothing to merge, 2 merged before"),
        ("merge", {"skipped_groups": 2}, "nothing to merge, 2 groups skipped"),
        ("merge", {"invalid_rows": 1}, "nothing to merge, 1 invalid row"),
        ("settle", {"pairs_planned": None}, "nothing settled"),
        ("settle", {"settled": 1, "unfinished_merges": 2}, "1 settled, 2 unfinished"),
        ("settle", {"failed_merges": 1, "cancelled": 1}, "1 cancelled"),
        ("settle", {"undo_settled": 1}, "1 partly undone"),
    ],
)  # fmt: skip
def test_the_headline_says_what_a_run_has_come_to(
    kind: str, counts: Dict[str, Any], words: str
) -> None:
    summary = {**dict.fromkeys(tool.SUMMARY, 0), **counts}
    assert tool.headline(summary, tool.RunRecord(kind=kind)) == words


# -- settling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("code", ["", "interrupted", "merge_not_confirmed", "undo_unfinished"])
def test_what_can_be_settled(state: State, code: str) -> None:
    # A reference that is not set yet is set by another run, unless two have left it so.
    pair = pair_of(1, state, code=code, error="why", run=NOW, unset_since=EARLIER)
    error = tool.settle_error(pair)
    named = code == "merge_not_confirmed"
    is_past_it = state in (*TERMINAL, State.MERGED, State.VERIFYING, State.UNDOING)
    assert (not error) == (is_past_it or (state in UNFINISHED and named))
    if not error and state not in TERMINAL:
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


@pytest.mark.parametrize(
    "code, is_free, can",
    [
        ("interrupted", True, False), ("", True, False), ("contact_refused", True, True),
        ("interrupted", False, True),
    ],
)  # fmt: skip
def test_an_undo_is_settled_unless_its_reference_may_be_on_no_contact(
    code: str, is_free: bool, can: bool
) -> None:
    progress = tool.UndoProgress("reports/x.json", "done", "", 0, reference_free=is_free)
    pair = pair_of(1, State.UNDOING, code=code, undo=progress)
    error = tool.settle_error(pair)
    assert (error == "") is can and (can or "--undo reports/x.json" in error)
    tool.settle_pair(pair)
    assert (pair.state, pair.reference_not_set) == (State.UNDO_SETTLED, "user_1" if is_free else "")


def test_a_reference_on_no_contact_is_named_with_its_place() -> None:
    progress = tool.UndoProgress("x", "done", "", 0, display_id="REVU-N")
    for pair, place in (
        (the_pair(State.SETTLED, code="left_behind", undo=progress), PRIMARY.short_id),
        (the_pair(State.SETTLED, code="not_found"), "a contact of ana@example.com"),
        (the_pair(State.UNDO_SETTLED, undo=progress), "REVU-N"),
    ):
        assert tool.where_to_set(pair) == ""
        pair.reference_not_set = "user_9"
        assert f"user_9 is on no contact; set it on {place} in DevRev" in tool.where_to_set(pair)


def table_of(path: Path) -> List[Mapping[str, str]]:
    """Return the rows of the CSV beside a report."""
    raw = path.with_suffix(".csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))


def never_merges(scene: Scene, duplicate: str) -> Any:
    match = lambda body: body.get("secondary_user") == duplicate  # noqa: E731
    return scene.fault("merge-never", "rev-users.merge", match=match)


def test_report_page_and_table_are_named_and_the_table_has_a_line_a_pair(scene: Scene) -> None:
    pairs = scene.pairs(5)
    scene.export({pairs[1][0]: {"tickets": 9}})
    never_merges(scene, pairs[2][1])
    scene.merge("--email", "person5@example.com")
    run = scene.merge(*QUICK, "--limit", "3")
    paths = re.findall(r"^(?:report|page|table) +(\S+)$", run.out, re.MULTILINE)
    assert len(paths) == 3 and all(Path(path).stat().st_size > 100 for path in paths)
    rows = {row["email"][6]: (row["outcome"], row["code"]) for row in table_of(run.report_path)}
    unfinished = ("unfinished", "merge_not_confirmed")
    assert rows == {"1": ("merged", ""), "2": ("failed", "count_mismatch"), "3": unfinished}
    summary = run.report["summary"]
    assert (summary["already_merged"], summary["left"]) == (1, 1)
    assert run.report["schema"] == tool.SCHEMA


def test_a_report_says_how_its_run_went(scene: Scene) -> None:
    scene.pairs(2)
    scene.world.set_quota(9, 20.0)
    merged, undone = scene.merge(), scene.undo()
    sha256 = hashlib.sha256(Path("contacts.csv").read_bytes()).hexdigest()
    for run, kind, named in ((merged, "merge", None), (undone, "undo", str(merged.report_path))):
        facts = run.report["run"]
        assert (facts["kind"], facts["undo"], facts["version"]) == (kind, named, tool.__version__)
        assert (facts["exit_code"], facts["stopped"], facts["pairs"]) == (0, None, 2)
        assert facts["organisation"].endswith("SANDBOX1") and facts["token_owner"]["id"]
        assert facts["base_url"] == "https://api.devrev.ai" and facts["options"]
        assert facts["headline"] in run.out and facts["id"] in facts["log"]
        assert facts["start"][:19] < facts["end"][:19] and facts["quota"]["limit"] == 9
        assert facts["quota_wait_seconds"] > 20
        assert facts["requests_total"] == len(run.requests) == sum(facts["requests"].values())
    assert merged.report["run"]["plan_id"] and undone.report["run"]["plan_id"] is None
    assert merged.report["run"]["csv"] == [{"path": "contacts.csv", "sha256": sha256}]
    summary = {"undone": 2, "pairs": 2, "unfinished": 0, "failed": 0, "skipped": 0, "left": 0}
    assert undone.report["summary"] == {**summary, "undone_before": 0}


def test_a_cancelled_merge_is_left_alone_until_it_is_named(scene: Scene) -> None:
    pairs = scene.pairs(2)
    fault = never_merges(scene, pairs[1][1])
    scene.merge(*QUICK)
    settled = scene.settle("Person2@EXAMPLE.com")
    assert settled.code == 0 and settled.requests == []
    (entry,) = settled.report["cancelled"]
    assert (entry["state"], entry["code"]) == ("cancelled", "merge_not_confirmed")
    summary = settled.report["summary"]
    assert summary["failed_merges"] == summary["cancelled"] == 1
    assert settled.report["run"]["kind"] == "settle" and settled.report["skipped"] is None
    scene.export()
    again = scene.merge()
    assert [one["code"] for one in again.report["skipped"]] == ["cancelled"]
    named = {"email": "person2@example.com", "outcome": "skipped", "code": "cancelled"}
    assert table_of(again.report_path) == [{**dict.fromkeys(tool.MERGE_COLUMNS, ""), **named}]
    assert again.code == 0 and again.count("rev-users.merge") == 0
    scene.world.faults.remove(fault)
    run = scene.merge("--email", "person2@example.com", *QUICK)
    assert run.code == 0 and len(run.report["successful_merges"]) == 1
    assert scene.merged(*pairs)


def test_a_cancelled_merge_that_is_carried_out_after_all_is_marked(scene: Scene) -> None:
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
    again = scene.merge()
    assert again.code == 0 and again.report["successful_merges"] == []
    assert scene.holder("user_2") == pairs[1][0]


def test_a_settled_pair_is_no_success_and_every_report_names_its_reference(scene: Scene) -> None:
    scene.pairs(2)
    match = lambda body: body.get("external_ref") == "user_2"  # noqa: E731
    scene.fault("400", "rev-users.update", match=match)
    assert scene.merge(*QUICK).codes == {"person2@example.com": "external_ref_not_set"}
    assert scene.settle("person2@example.com").code == 1, "another run may set it"
    scene.merge(*QUICK)
    settled = scene.settle("person2@example.com")
    (entry,) = settled.report["settled"]
    assert settled.code == 0 and "REVU-P2" in entry["accepted"] and entry["advice"] is None
    assert (entry["reference_set"], entry["reference_not_set"]) == (False, "user_2")
    assert settled.report["successful_merges"] == []
    later = scene.merge()
    assert later.report["summary"]["already_merged"] == 2
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
    assert "done  person1@example.com" in scene.settle("person1@example.com").out
    mixed = scene.settle("person2@example.com", "person3@example.com")
    assert mixed.code == 1
    assert re.search(r"NOT SETTLED  person2@.* was not requested \(count_mismatch\)", mixed.out)
    assert [one["email"] for one in mixed.report["cancelled"]] == ["person3@example.com"]


# -- who is in which report ----------------------------------------------------------------------


def test_what_the_live_check_leaves_out_is_skipped(scene: Scene) -> None:
    scene.pairs(2, rev_org="ORG1")
    gone = scene.organisation.add_contact("G1", "person1@example.com")
    elsewhere = scene.organisation.add_contact("W2", "person2@example.com", rev_org="ORG9")
    scene.export()
    scene.organisation.delete_contact(gone)
    run = scene.merge()
    rows = [row for row in table_of(run.report_path) if row["outcome"] == "skipped"]
    left_out = {(gone, "already_gone"), (elsewhere, "different_rev_org")}
    assert {(row["duplicate_id"], row["code"]) for row in rows} == left_out
    summary = run.report["summary"]
    names = ("already_merged", "successful_merges", "left", "skipped_groups")
    assert [summary[name] for name in names] == [1, 2, 0, 1]


def test_a_killed_undo_gets_its_report_from_the_next_run(scene: Scene) -> None:
    scene.pairs(2)
    scene.merge("--email", "person1@example.com")
    scene.kill("sending rev-users.create")
    scene.undo()
    run = scene.merge()
    (path,) = Path("reports").glob("undo_report_*.json")
    undone = json.loads(path.read_bytes())
    assert (undone["run"]["stopped"], undone["run"]["exit_code"]) == ("killed", None)
    assert [one["email"] for one in undone["unfinished"]] == ["person1@example.com"]
    assert [row["outcome"] for row in table_of(path)] == ["unfinished"]
    assert run.codes == {"person1@example.com": "undo_unfinished"}


def test_a_csv_of_before_an_undo_is_told_what_has_become_of_its_pair(scene: Scene) -> None:
    _, old = scene.pair(1)
    scene.merge()
    before = Path("contacts.csv").read_text()
    (row,) = table_of(scene.undo().report_path)
    assert (row["old_id"], row["new_id"]) == (old, scene.holder("user_1"))
    codes = [[one["code"] for one in scene.merge().report["skipped"]]]
    scene.export()
    assert scene.merge("--email", "person1@example.com").code == 0
    Path("contacts.csv").write_text(before)
    codes.append([one["code"] for one in scene.merge().report["skipped"]])
    assert codes == [["undone"], ["merged_again"]]


def test_preview_and_report_have_what_was_chosen_and_what_may_be(scene: Scene) -> None:
    for key, reference in (("A", "user_A"), ("B", "user_B"), ("C", "REVU-C")):
        scene.organisation.add_contact(key, "chosen@example.com", reference)
    for key in "XY":
        scene.organisation.add_contact(key, "open@example.com", f"user_{key}")
    scene.export()
    Path("choices.csv").write_text("EMAIL,EXTERNAL_REF\nchosen@example.com,user_A\n")
    given = ("--choices", "choices.csv")
    plan = scene.run("--csv", "contacts.csv", *given, "--preview", "--json").out
    for found in (json.loads(plan), scene.merge(*given).report):
        (choice,) = found["choices"]
        assert (choice["email"], choice["kept"]) == ("chosen@example.com", "user_A")
        assert [one["external_ref"] for one in choice["lost"]] == ["user_B"]
        (skip,) = found["skipped"]
        assert (skip["email"], skip["code"]) == ("open@example.com", "several_user_refs")
        assert skip["reason"].startswith("Several contacts") and "--choices" in skip["advice"]
        assert [one["external_ref"] for one in skip["contacts"]] == ["user_X", "user_Y"]
        assert [[*one.values()] for one in skip["choices"]] == [
            ["open@example.com,user_X", "user_X", "REVU-X"],
            ["open@example.com,user_Y", "user_Y", "REVU-Y"],
        ]
