"""The invariants of merge reports: each ended pair in exactly one, sums that add up, no untruth."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.simulation import expected
from tests.simulation.expected import ENDED, UNFINISHED, Document, Ids, Rows, StoredFile, pairs_in
from tests.simulation.world import broken, name_of

ONCE = "each ended pair is in exactly one report, that of the run in which it ended"
TRUE = "savepoint and reports say what is true"
CODE = "the exit code says how it went"


class ReportChecker:
    """The merge reports of a scenario."""

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.reports: dict[str, Any] = {}  # by file name
        self.named: set[str] = set()  # references of pairs that are not done, in any report
        self.reopened: set[Ids] = set()  # ended pairs of which neither file knows the end any more
        self.lost: set[str] = set()  # reports that were deleted, or moved away
        self.owed: set[str] = set()  # reports of runs that were killed, or could not write them
        self.forgotten: set[Ids] = set()  # pairs whose report was lost
        self.last: Document = {}  # the last report of a run over an export
        self.last_code: int | None = None

    def after_run(self, rows: Rows, mine: Path | None, code: int | None, needed: bool) -> None:
        """Judge the reports after a run. `mine` is the run's own, None for an undo."""
        mine_name = mine.name if mine else ""
        self.owed.add(mine_name)
        for path in sorted(Path("reports").glob("merge_report_*.json")):
            if path.name not in self.reports:
                self._read(path, is_mine=path.name == mine_name)
        where: defaultdict[Ids, list[str]] = defaultdict(list)
        for name, report in self.reports.items():
            for entry in ended_entries(report):
                where[ids_of(entry)].append(name)
        for ids, names in where.items():
            if len(names) > 1 and ids not in self.checker.cancelled | self.reopened:
                broken(ONCE, f"{name_of(ids)} is in {', '.join(names)}")
        if mine is None or not needed:
            return
        report = read_report(mine)
        for ids in sorted(pairs_in(rows, ENDED) - self.forgotten - self.reopened):
            # A merge that could not be undone stands as it was, in the report of old.
            undone_in_vain = ids in self.checker.undo.begun and len(where[ids]) == 1
            if where[ids] != [f"merge_report_{rows[ids]['run']}.json"] and not undone_in_vain:
                broken(ONCE, f"{name_of(ids)} became {rows[ids]['state']}, and is in {where[ids]}")
        for ids in pairs_in(rows, UNFINISHED) - set(map(ids_of, report["unfinished_merges"])):
            broken(TRUE, f"{name_of(ids)} is unfinished, and not reported")
        self._judge_code(report, rows, code)
        if self.checker.options.csv:
            self.last, self.last_code = report, code

    def _judge_code(self, report: Document, rows: Rows, code: int | None) -> None:
        settled = self.checker.options.settle
        if settled:
            left = {rows[ids]["email"] for ids in pairs_in(rows, UNFINISHED)}
            if code == 0 and not left.isdisjoint(settled):
                broken(CODE, f"0, and not all of {', '.join(settled)} has ended")
            return
        after_cancel = [entry for entry in report["successful_merges"] if entry.get("after_cancel")]
        judge_code(code, *report["failed_merges"], *report["unfinished_merges"], *after_cancel)

    def _read(self, path: Path, is_mine: bool) -> None:
        if path.name in self.lost:
            broken("a report that was deleted is not written again", path.name)
        report = self.reports[path.name] = read_report(path)
        if is_mine:
            self._judge_sums(report)
            self._judge_failed(report)
        elif path.name not in self.owed:
            broken(TRUE, f"{path.name} is neither of this run nor of one that was killed")
        for title in ("failed_merges", "unfinished_merges", "settled", "cancelled"):
            for entry in report.get(title) or ():
                names = entry.get("new_external_ref"), entry.get("reference_not_set")
                self.named.update(map(str, names))
        for entry in report["successful_merges"]:
            if entry["state"] == "done":
                self.checker.judge_done(ids_of(entry), entry["new_external_ref"], entry["backup"])

    def _judge_failed(self, report: Document) -> None:
        for entry in report["failed_merges"]:
            ids = ids_of(entry)
            refused = entry["code"] == "undo_unfinished" and ids in self.checker.undo.open()
            ended = entry["state"] in ("merged_elsewhere", "cancelled")
            if self.checker.asks[ids] and not ended and not refused:
                broken(TRUE, f"{name_of(ids)} is called failed, and was requested")

    def _judge_sums(self, report: Document) -> None:
        summary = report["summary"]
        if not self.checker.options.csv:
            return
        parts = ("already_merged", "successful_merges", "failed_merges", "unfinished_merges")
        total = sum(summary[part] for part in parts) + summary["left"]
        # What the live check leaves out of a group is planned no more, but for what is gone.
        left_out = sum(one["code"] == "different_rev_org" for one in report["skipped"])
        planned = len(self.checker.plan) - left_out
        if summary["pairs_planned"] != total or summary["left"] < 0 or total != planned:
            broken("the sums of a report", f"{planned} pairs are planned, it says {summary}")

    @staticmethod
    def on_disk() -> list[str]:
        return [path.name for path in sorted(Path("reports").glob("*_report_*.json"))]

    def put_back(self, file: StoredFile | None) -> None:
        """An older file may know a run, and not that its report was written."""
        runs = file.runs if file else {}
        for run, document in runs.items():
            if not document["reported"]:
                self.lost -= {f"merge_report_{run}.json", f"undo_report_{run}.json"}
                self.owed.add(f"merge_report_{run}.json")

    def standing(self, rows: Rows) -> str:
        """Return how things stand after a run: where two runs leave the same, and neither has
        requested anything, a third one does nothing new."""
        entries = [*self.last.get("failed_merges", ()), *self.last.get("unfinished_merges", ())]
        resting = sorted([ids_of(one), one["state"], one["code"]] for one in entries)
        organisation = self.checker.organisation
        asks = sum(map(len, self.checker.asks.values())), len(organisation.merges)
        fields = ("id", "state", "external_ref")
        contacts = [[one[name] for name in fields] for one in organisation.contacts.values()]
        states = sorted((ids, row["state"]) for ids, row in rows.items())
        return json.dumps([self.last_code, resting, asks, contacts, states])

    @staticmethod
    def _is_owed(name: str) -> bool:
        """Whether a file knows the run of a report, and not that its report was written."""
        runs = [file.runs.get(expected.run_of(name)) for file in expected.read_files() if file]
        return any(one is not None and not one["reported"] for one in runs)

    def lose(self, name: str) -> None:
        for path in list(Path("reports").glob(name)):
            for one in (path, path.with_suffix(".html"), path.with_suffix(".csv")):
                if one.exists():
                    one.unlink()
            if not self._is_owed(path.name):  # killed before it noted that the report was written
                self.lost.add(path.name)
            if path.name in self.reports:
                self.forgotten.update(map(ids_of, ended_entries(self.reports.pop(path.name))))


def read_report(path: Path) -> Any:
    """Read the report of a run: it is there, whole, and names no bug."""
    if not path.exists():
        broken("the report is written, also when the run stops early", path.name)
    try:
        report = json.loads(path.read_bytes())
    except ValueError as error:
        broken("a report is written atomically", f"{path.name}: {error}")
    stopped = str(report["run"].get("stopped"))
    if "(a bug" in stopped:
        broken("no run ends with a bug", stopped)
    return report


def judge_code(code: int | None, *bad: Any) -> None:
    if code in (0, 1) and (code == 0) != (not bad):
        broken(CODE, f"{code}, and {len(bad)} failed, unfinished or done after a cancel")


def ended_entries(report: Document) -> list[Document]:
    elsewhere = [one for one in report["failed_merges"] if one["state"] == "merged_elsewhere"]
    return [*report["successful_merges"], *(report.get("settled") or ()), *elsewhere]


def ids_of(entry: Document) -> Ids:
    return entry["primary"]["id"], entry["duplicate"]["id"]
