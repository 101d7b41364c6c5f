"""The invariants of merge reports: each ended pair in exactly one, sums that add up, no untruth."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, DefaultDict, Dict, Iterator, List, Mapping, Optional, Set

from tests.simulation.expected import (
    COPY,
    ENDED,
    MAIN,
    UNFINISHED,
    Ids,
    StoredFile,
    name_of,
    read_file,
)
from tests.simulation.world import broken

ONCE = "each ended pair is in exactly one report, that of the run in which it ended"
TRUE = "savepoint and reports say what is true"
SUMS = "the sums of a report"
CODE = "the exit code says how it went"


class ReportChecker:
    """The merge reports of a scenario."""

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.reports: Dict[str, Any] = {}  # by file name
        self.named: Set[str] = set()  # references of pairs that are not done, in any report
        self.reopened: Set[Ids] = set()  # ended pairs of which neither file knows the end any more
        self.lost: Set[str] = set()  # reports that were deleted, or moved away
        self.owed: Set[str] = set()  # reports of runs that were killed, or could not write them
        self.forgotten: Set[Ids] = set()  # pairs whose report was lost
        self.last_name, self.last_code = "", None

    @property
    def last(self) -> Mapping[str, Any]:
        """The last report of a run over an export."""
        found: Mapping[str, Any] = self.reports.get(self.last_name, {})
        return found

    def after_run(
        self,
        rows: Mapping[Ids, Mapping[str, Any]],
        mine: Optional[Path],
        code: Optional[int],
        needed: bool,
    ) -> None:
        """Judge the reports after a run. `mine` is the run's own, None for an undo."""
        self.owed.update([mine.name] if mine else [])
        there = {path.name: path for path in sorted(Path("reports").glob("merge_report_*.json"))}
        for name, path in there.items():
            if name not in self.reports:
                self._read(name, path, is_mine=mine is not None and path.name == mine.name)
        where: DefaultDict[Ids, List[str]] = defaultdict(list)
        for name, report in self.reports.items():
            for entry in ended_entries(report):
                where[ids_of(entry)].append(name)
        for ids, names in where.items():
            if len(names) > 1 and ids not in self.checker.cancelled | self.reopened:
                broken(ONCE, f"{name_of(ids)} is in {', '.join(names)}")
        if mine is None or not needed:
            return
        read_report(mine)
        for ids, row in rows.items():
            if row["state"] in ENDED and ids not in self.forgotten:
                self._judge_place(ids, row, where[ids])
        report = self.reports[mine.name]
        listed = {ids_of(entry) for entry in report["unfinished_merges"]}
        for ids, row in rows.items():
            if row["state"] in UNFINISHED and ids not in listed:
                broken(TRUE, f"{name_of(ids)} is unfinished, and not reported")
        self._judge_code(report, rows, code)
        if self.checker.options.csv:
            self.last_name, self.last_code = mine.name, code

    def _judge_place(self, ids: Ids, row: Mapping[str, Any], names: List[str]) -> None:
        # A merge that could not be undone stands as it was, in the report of old.
        if ids in self.reopened:
            return
        undone_in_vain = ids in self.checker.undo.begun and len(names) == 1
        if names != [f"merge_report_{row['run']}.json"] and not undone_in_vain:
            broken(ONCE, f"{name_of(ids)} became {row['state']}, and is in {names}")

    def _judge_code(
        self, report: Mapping[str, Any], rows: Mapping[Ids, Any], code: Optional[int]
    ) -> None:
        settled = self.checker.options.settle
        if settled:
            left = [row["email"] for row in rows.values() if row["state"] in UNFINISHED]
            if code == 0 and not set(settled).isdisjoint(left):
                broken(CODE, f"0, and not all of {', '.join(settled)} has ended")
            return
        after_cancel = [entry for entry in report["successful_merges"] if entry.get("after_cancel")]
        judge_code(code, *report["failed_merges"], *report["unfinished_merges"], *after_cancel)

    def _read(self, name: str, path: Path, is_mine: bool) -> None:
        if name in self.lost:
            broken("a report that was deleted is not written again", name)
        report = self.reports[name] = read_report(path)
        if is_mine:
            self._judge_sums(name, report)
        elif name not in self.owed:
            broken(TRUE, f"{name} is neither of this run nor of one that was killed")
        for title in ("failed_merges", "unfinished_merges", "settled", "cancelled"):
            for entry in report.get(title) or ():
                names = entry.get("new_external_ref"), entry.get("reference_not_set")
                self.named.update(map(str, names))
        for entry in report["successful_merges"]:
            if entry["state"] == "done":
                self.checker.judge_done(ids_of(entry), entry["new_external_ref"], entry["backup"])
        undo = self.checker.undo
        for entry in report["failed_merges"] if is_mine else ():
            ids = ids_of(entry)
            refused = entry["code"] == "undo_unfinished" and ids in undo.open()
            ended = entry["state"] in ("merged_elsewhere", "cancelled")
            if self.checker.asks[ids] and not ended and not refused:
                broken(TRUE, f"{name}: {name_of(ids)} is called failed, and was requested")

    def _judge_sums(self, name: str, report: Mapping[str, Any]) -> None:
        summary = report["summary"]
        if not self.checker.options.csv:
            return
        parts = ("already_merged", "successful_merges", "failed_merges", "unfinished_merges")
        total = sum(summary[part] for part in parts) + summary["left"]
        # What the live check leaves out of a group is planned no more, but for what is gone.
        left_out = sum(one["code"] == "different_rev_org" for one in report["skipped"])
        planned = len(self.checker.plan) - left_out
        if summary["pairs_planned"] != total or summary["left"] < 0 or total != planned:
            broken(SUMS, f"{name}: {planned} pairs are planned, it says {summary}")

    @staticmethod
    def on_disk() -> List[str]:
        return [path.name for path in sorted(Path("reports").glob("*_report_*.json"))]

    def put_back(self, file: Optional[StoredFile]) -> None:
        """An older file may know a run, and not that its report was written."""
        for run, document in file.runs.items() if file else ():
            if not document["reported"]:
                self.lost -= {f"merge_report_{run}.json", f"undo_report_{run}.json"}
                self.owed.add(f"merge_report_{run}.json")

    def standing(self, rows: Mapping[Ids, Mapping[str, Any]]) -> str:
        """Return how things stand after a run: where two runs leave the same, and neither has
        requested anything, a third one does nothing new."""
        parts = [self.last.get(one) for one in ("failed_merges", "unfinished_merges")]
        entries = [one for part in parts for one in part or ()]
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
        run = name.rpartition(".")[0].partition("_report_")[2]
        runs = [file.runs.get(run) for file in map(read_file, (MAIN, COPY)) if file]
        return any(one is not None and not one["reported"] for one in runs)

    def lose(self, name: str) -> None:
        """Delete reports."""
        for path in list(Path("reports").glob(name)):
            for one in (path, path.with_suffix(".html"), path.with_suffix(".csv")):
                if one.exists():
                    one.unlink()
            if not self._is_owed(path.name):  # killed before it noted that the report was written
                self.lost.add(path.name)
            entries = ended_entries(self.reports.pop(path.name, {}))
            self.forgotten.update(map(ids_of, entries))


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


def judge_code(code: Optional[int], *bad: Any) -> None:
    if code in (0, 1) and (code == 0) != (not bad):
        broken(CODE, f"{code}, and {len(bad)} failed, unfinished or done after a cancel")


def ended_entries(report: Mapping[str, Any]) -> Iterator[Any]:
    yield from report.get("successful_merges") or ()
    yield from report.get("settled") or ()
    for entry in report.get("failed_merges") or ():
        if entry["state"] == "merged_elsewhere":
            yield entry


def ids_of(entry: Mapping[str, Any]) -> Ids:
    return entry["primary"]["id"], entry["duplicate"]["id"]
