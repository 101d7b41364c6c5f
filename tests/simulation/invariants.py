"""The invariants of merge_contacts.py, held against what is true in tests.fake.organisation.

Nothing here uses the module: its plan, its backups, its savepoint and its reports are judged by a second opinion
(tests.simulation.expected). The invariants of an undo are in tests.simulation.undo_invariants, those of reports in tests.simulation.report_invariants,
and the reasons that a pair may have in the end in tests.simulation.reasons.
"""

import hashlib
import json
import math
import shutil
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import (
    Any,
    Callable,
    DefaultDict,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from tests.fake.organisation import Table, Thing, org_id_of
from tests.fake.world import World
from tests.simulation.expected import (
    COPY,
    ENDED,
    MAIN,
    ROLES,
    ROW,
    STOPPING,
    TERMINAL,
    UNFINISHED,
    Ids,
    Row,
    StoredFile,
    Wanted,
    email_key,
    groups_of,
    joined,
    most_contacts,
    name_of,
    plan_of,
    read_file,
    takes_part,
)
from tests.simulation.reasons import ReasonChecker
from tests.simulation.report_invariants import ReportChecker
from tests.simulation.undo_invariants import WRITES, UndoChecker
from tests.simulation.world import Clock, Sent, SimulatedProcess, broken, short, stored_row

FRESH, LISTED = 60.0, 120.0
JITTER = 0.01  # seconds by which a comparison of two clocks may be off
FRESHNESS = "no contact is merged whose check is not fresh"
BACKED_UP = "nothing is requested without a complete backup, its lists at most two minutes old"
TRUE = "savepoint and reports say what is true"
KNOWN = "what the two files say together is what the next run knows"
GRACE = 10.0  # seconds in which an interrupted run may finish what is under way
REMEMBERED = "a request is never forgotten"
LOST = "nobody's edit is lost but within one round trip"
AT_ONCE = 1.0  # seconds from an answer until what rests on it leaves


# --------------------------------------------------------------------------------------------------
# What was true lately
# --------------------------------------------------------------------------------------------------


def changes(table: Table, since: float) -> Iterator[Tuple[str, Optional[Thing]]]:
    """Yield what objects were before each change since a moment, the latest first; None where there was none."""
    for changed, object_id, was in reversed(table._log):
        if changed < since:
            return
        yield object_id, was


def versions(table: Table, object_id: str, since: float) -> List[Optional[Thing]]:
    """Return what an object was at any time since a moment."""
    return [
        table.get(object_id),
        *(was for changed, was in changes(table, since) if changed == object_id),
    ]


def held(thing: Optional[Thing], role: str, person: str) -> bool:
    if thing is None:
        return False
    people = thing.get(role) or ()
    return any(one["id"] == person for one in ([people] if role == "created_by" else people))


def holdings(table: Table, role: str, person: str, since: float) -> Tuple[Set[str], Set[str]]:
    """Return the ids of what a person has held in a role all the time since a moment, and at any time since then."""
    ever = {thing["id"] for thing in table.find([(role, [person])])}
    always = set(ever)
    for object_id, was in changes(table, since):
        if held(was, role, person):
            ever.add(object_id)
        else:
            always.discard(object_id)
    return always, ever


def in_backup(entry: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """Return what a merge has to transfer of a contact in a manifest: object id and role."""
    items = [(work, ROLES[role]) for role in ("owned", "reported") for work in entry["works"][role]]
    return items + [(talk, "members") for talk in entry["conversations"]]


# --------------------------------------------------------------------------------------------------
# The checker
# --------------------------------------------------------------------------------------------------


class Ask:
    """One merge request."""

    def __init__(self, run: int, sent: Sent, wall: float, backup: str) -> None:
        self.run = run
        self.at = sent.at
        self.ended = sent.at
        self.wall = wall
        self.backup = backup
        self.answer = "lost"  # "acknowledged", "refused"
        self.polled = -1  # the run that has seen the duplicate exist since
        self.busy = False  # DevRev may have been busy with others

    def patience(self, timeout: float) -> float:
        if self.busy:
            return 0.0
        return min(10.0, timeout / 4) if self.answer == "lost" else timeout


class InvariantChecker:
    """All merge requests of a scenario, and the invariants about them."""

    def __init__(self, fake_devrev: World, clock: Clock) -> None:
        self.fake_devrev, self.clock, self.organisation = (
            fake_devrev,
            clock,
            fake_devrev.organisation,
        )
        self.process: Optional[SimulatedProcess] = None
        self.options: Any = None
        self.run, self._run_id = 0, lambda: ""  # type: int, Callable[[], str]
        self.rows: List[Row] = []  # of the export
        self.choices: Mapping[str, str] = {}
        self.plan: Dict[Ids, Wanted] = {}
        self.asked_for: Dict[Ids, Wanted] = {}  # the plan, with what was undone or cancelled
        self.allowed: Set[Ids] = set()  # of the plan, by --email
        self.known: DefaultDict[Ids, List[Wanted]] = defaultdict(list)
        self.asks: DefaultDict[Ids, List[Ask]] = defaultdict(list)
        self.begun: Set[Ids] = set()  # in this run, never requested before
        self.tried: Set[Ids] = set()  # pairs that an earlier run refused or failed
        self.intended: Set[Ids] = (
            set()
        )  # unfinished as this run began; it may have been killed before a request left
        self.ever_intended: Set[Ids] = set()
        self.committed: Dict[str, Dict[Ids, Dict[str, Any]]] = {MAIN.name: {}, COPY.name: {}}
        self.latest: Dict[Ids, Dict[str, Any]] = {}  # the last row of each pair that was written
        self.backups: DefaultDict[Ids, List[str]] = defaultdict(list)  # of each request
        self.cancelled: Set[Ids] = set()  # pairs that were cancelled at any time
        self.written: Set[str] = set()  # the files that this run has written
        self.joined: Optional[Set[str]] = None  # the same, until its first request
        self.runs_before: Set[str] = set()  # that a file knew as this run began
        self.expected: Dict[Ids, Dict[str, Any]] = {}  # what both files said as this run began
        self.stopped = False  # the run was told to stop
        self.interrupted = math.inf  # by Ctrl-C, at this time
        # Seconds there or back, where nothing disturbs a run:
        self.slowest: Callable[[], Optional[float]] = lambda: None
        self.moving: Set[Ids] = set()  # pairs whose reference was sent at least once
        self.lies = False  # whether answers were false: what was believed then may be wrong
        self.blind_lists = False  # whether lists may leave out what is there
        self.began = (0.0, 0.0)  # this run: true seconds, and what the wall clock said
        self.backups_lost = self.disk_was_full = False
        self.full_now = False  # in this run
        self.lag = 0.0  # the longest that lists have lagged
        self.others_spent = 0
        self.undo = UndoChecker(self)
        self.reports = ReportChecker(self)
        self.reasons = ReasonChecker(self)
        self.shown: Dict[
            str, float
        ] = {}  # when the last request left whose answer has shown a contact
        self.read: Dict[
            str, Tuple[float, float]
        ] = {}  # the last read: when sent, and when heard of
        self.listed: Dict[Tuple[str, str], float] = {}  # the same of what a person has in a role
        self.first_pages: Dict[str, float] = {}  # when the first page of a list was requested
        self.polled: Set[str] = set()  # contacts that this run has read
        self.judged: Set[Ids] = set()  # pairs whose end was held against the truth
        self.sent_at: List[float] = []  # steady seconds, of the last requests
        self.flying = 0  # merge requests without an answer
        self.forbidden: Set[Ids] = set()  # pairs of which a merge request was answered with 403
        self.first_merge: Optional[Ids] = None  # that this run has requested, of these
        self.is_forbidden = False  # its answer was a 403
        self.is_foreign = False  # the CSV is of another organisation
        self.takes_updates = (
            False  # an update of this run was carried out, or refused for a reason of its own
        )

    versions = staticmethod(versions)
    held = staticmethod(held)

    @property
    def run_id(self) -> str:
        return self._run_id()

    # ----- a run begins ---------------------------------------------------------------------------

    def begin(
        self,
        process: SimulatedProcess,
        options: Any,
        run_id: Callable[[], str],
        rows: Sequence[Row],
        choices: Mapping[str, str],
    ) -> None:
        self.run, self._run_id = self.run + 1, run_id
        self.process, self.options, self.stopped, self.full_now = process, options, False, False
        self.interrupted = math.inf
        self.began = self.clock.now, self.clock.wall
        self.flying, self.sent_at, self.polled, self.joined = 0, [], set(), set()
        self.written = set()
        self.first_merge, self.is_forbidden, self.takes_updates = None, False, False
        mine = self.organisation.dev_user["id"].partition(":devo/")[2].partition(":")[0]
        self.is_foreign = any(
            row.id.partition(":devo/")[2].partition(":")[0] != mine for row in rows
        )
        main, copy = self._read_files()
        self.expected = joined(main, copy)
        self.latest = dict(self.expected)
        self.runs_before = self._runs_of(main, copy)
        self.intended = {ids for ids, row in self.expected.items() if row["state"] in UNFINISHED}
        self.tried = {ids for ids, row in self.expected.items() if row["state"] == "failed"}
        self.undo.begin(options)
        named = {email_key(email) for email in options.email or ()}
        self.rows, self.choices = list(rows), choices
        self.asked_for = plan_of(rows, choices, getattr(options, "primary", None) or "revu")
        self.plan = self._without_stopped(self.asked_for, named)
        self.allowed = {
            ids for ids, wanted in self.plan.items() if not named or wanted.primary.key in named
        }
        self.begun = set()
        for ids, wanted in self.asked_for.items():
            if wanted not in self.known[ids]:
                self.known[ids].append(wanted)

    def _read_files(self) -> Tuple[Optional[StoredFile], Optional[StoredFile]]:
        """Read both files. They have to hold what was committed to them, however the last run has ended."""
        files = read_file(MAIN), read_file(COPY)
        for path, file in zip((MAIN, COPY), files):
            rows = {ids: row["document"] for ids, row in self.committed[path.name].items()}
            if (
                (file is not None or rows)
                and rows != {ids: row["document"] for ids, row in file.rows.items()}
                if file
                else rows
            ):
                broken("what was committed is on the disk", f"{path} holds something else")
        return files

    def _without_stopped(self, plan: Dict[Ids, Wanted], named: Set[str]) -> Dict[Ids, Wanted]:
        """Leave out the groups of which a pair was undone or cancelled, until they are named."""
        if self.is_foreign:  # what the savepoint knows is of another organisation
            return dict(plan)
        groups = groups_of(self.rows)
        stopped = [(ids, row) for ids, row in self.expected.items() if row["state"] in STOPPING]
        known = {ids for ids, row in self.expected.items() if row["state"] in (*UNFINISHED, *ENDED)}
        stale = {
            ids for ids, row in stopped if row["state"] != "cancelled"
        }  # the export is older than the undo
        left_out = {one.primary.key for ids, one in plan.items() if ids in stale}
        for email in {one.primary.key for ids, one in plan.items() if ids not in known} - named:
            members = {row.id for row in groups[email]}
            for ids, row in stopped:
                two = {self.undo.stand_in(one) for one in ids} | set(ids)
                if email_key(row["email"]) == email or len(two & members) >= 2:
                    left_out.add(email)
        return {ids: one for ids, one in plan.items() if one.primary.key not in left_out}

    # ----- the savepoint --------------------------------------------------------------------------

    def wrote(self, name: str, rows: Sequence[Dict[str, Any]]) -> None:
        """A file of the savepoint was written."""
        self.written.add(name)
        if self.joined is not None:
            self.joined.add(name)
        for row in rows:
            ids = row["primary_id"], row["duplicate_id"]
            before = self.latest.get(ids, {}).get("state")
            self.committed[name][ids] = self.latest[ids] = row
            if row["state"] == "requested" and row["backup"] not in self.backups[ids]:
                self.backups[ids].append(row["backup"])
            if row["state"] == "cancelled":
                self.cancelled.add(ids)
            self.undo.wrote(ids, row)
            if row["state"] == "done" and before in UNFINISHED:
                self._judge_last_read(ids, row["new_ref"])

    def _judge_last_read(self, ids: Ids, reference: Optional[str]) -> None:
        """A pair is done only where the last answer about its primary has shown it as it is to be."""
        if self.lies:
            return
        if ids[0] not in self.shown or (
            self.asks[ids] and self.shown[ids[0]] < self.asks[ids][-1].at
        ):
            broken(TRUE, f"{name_of(ids)} is done, and no answer has shown the primary since")
        since = self.shown.get(ids[0], 0.0) - self.lag - self.fake_devrev.reference_lag - JITTER
        been = versions(self.organisation.contacts, ids[0], since)
        if reference and not any(one and one.get("external_ref") == reference for one in been):
            broken(TRUE, f"{name_of(ids)} is done, and the primary does not have {reference}")

    def rests_since(self, identity: str) -> float:
        """Return since when others' edits may be lost to a write that leaves now: since the read that it rests on was
        sent, or, where something has waited behind that, since now."""
        now = self.clock.now
        sent, heard = self.read.get(identity, (now, now))
        return sent - JITTER if now - heard <= AT_ONCE else now

    def _judge_join(self) -> None:
        """Before its first request a run knows what both files together said, and both files know the same."""
        written, self.joined = self.joined, None
        if not written:
            return  # it only reads
        newest = max(self.runs_before, default="")
        # What no file knows at all can be undone from its report.
        for name in self.reports.on_disk() if self.runs_before or not self.undo.active else ():
            run = name.rpartition(".")[0].partition("_report_")[2]
            if run not in self.runs_before and run > newest:
                broken("a savepoint that was put back from an older backup is refused", name)
        for ids, before in self.expected.items():
            for name, rows in self.committed.items():
                row = rows.get(ids)
                if row is None:
                    broken(
                        KNOWN, f"{name} does not know {name_of(ids)}, which is {before['state']}"
                    )
                if row["run"] != self.run_id and row["state"] != before["state"]:
                    what = f"{name}: {name_of(ids)} is {row['state']}, and both files said {before['state']}"
                    broken(KNOWN, what)

    def judge_files(self, killed: bool) -> Dict[Ids, Dict[str, Any]]:
        """Judge what a run has left in the two files; return what they know together."""
        main, copy = self._read_files()
        rows = joined(main, copy)
        self.latest = dict(rows)
        if main and copy and not self.full_now and self.joined is None and len(self.written) == 2:
            ahead = main.last_write - copy.last_write
            if ahead not in ((0, 1) if killed else (0,)):
                broken("the copy is at most one write behind", f"it is {ahead} writes behind")
            for ids, row in rows.items():
                late = killed and row["revision"] == main.last_write
                for path, file in ((MAIN, main), (COPY, copy)):
                    if not late and (
                        ids not in file.rows or file.rows[ids]["revision"] != row["revision"]
                    ):
                        broken("each file alone knows everything", f"{path} and {name_of(ids)}")
        return rows

    # ----- requests -------------------------------------------------------------------------------

    def asked(self, sent: Sent) -> None:
        """A request leaves."""
        if self.joined is not None:
            self._judge_join()
        if self.stopped and not (self.undo.may_finish(sent) or self._gives_reference(sent)):
            broken("no request after a stop", f"{sent.endpoint} leaves")
        if self.is_foreign and sent.endpoint != "dev-users.self":
            broken("a CSV of another organisation stops everything", f"{sent.endpoint} leaves")
        if getattr(self.options, "settle", None) and sent.endpoint in WRITES:
            broken("settling changes nothing in DevRev", sent.endpoint)
        self._judge_client_limit()
        self.undo.asked(sent)
        if self.undo.active:
            return
        if sent.endpoint == "rev-users.merge":
            self._judge_merge((sent.body["primary_user"], sent.body["secondary_user"]), sent)
        elif sent.endpoint == "rev-users.update":
            self._judge_update(sent)

    def _gives_reference(self, sent: Sent) -> bool:
        """Whether an interrupted run sends a request that gives the primary of a merged pair its reference."""
        # A machine that sleeps meanwhile does not count the time.
        if not self.interrupted <= sent.at <= self.interrupted + GRACE and not self.clock.slept:
            return False
        for ids, row in self.latest.items():
            if row["state"] == "merged" and row["new_ref"]:
                mine = {"rev-users.update": ids[:1], "rev-users.get": ids}.get(sent.endpoint, ())
                is_probe = (
                    sent.endpoint == "dev-users.self"
                )  # goes first where requests have failed in a row
                if (
                    is_probe
                    or sent.body.get("id") in mine
                    or sent.body.get("external_ref") == [row["new_ref"]]
                ):
                    return True
            # What this run has requested may still be carried out: it is polled, or looked up in lists.
            is_awaited = (
                row["state"] in ("requested", "acknowledged")
                and row["new_ref"]
                and row["run"] == self.run_id
            )
            if is_awaited and sent.endpoint not in WRITES:
                return True
        return False

    def answered(self, sent: Sent, answer: Any) -> None:
        """The run is told the answer to a request."""
        self._note_shown(sent, answer)
        self.undo.answered(sent, answer)
        if answer.status == 401 and answer.data is not None:
            self.stopped, self.interrupted = True, math.inf
        if sent.endpoint == "rev-users.update":
            self.takes_updates = self.takes_updates or answer.status in (200, 409)
            nothing_to_do = "nothing would be changed"  # the merge has moved the reference
            self.takes_updates |= nothing_to_do in str((answer.data or {}).get("message"))
        if sent.endpoint == "rev-users.merge":
            self.flying -= 1
            asks = self.asks[sent.body["primary_user"], sent.body["secondary_user"]]
            if answer.status == 429 or not answer.sent:
                asks.pop()  # it can't have been acted on
                return
            ids = sent.body["primary_user"], sent.body["secondary_user"]
            if answer.status == 403 and answer.data is not None:
                self.is_forbidden = self.is_forbidden or ids == self.first_merge
                self.forbidden.add(ids)
            ask = asks[-1]
            ask.ended = self.clock.now
            if answer.status is not None and 200 <= answer.status < 300:
                ask.answer = "acknowledged"
            elif (
                answer.data is not None and answer.status is not None and 300 <= answer.status < 500
            ):
                ask.answer = "lost" if answer.status == 408 else "refused"
                others = [one for other, one in self.asks.items() if other != ids and one]
                crowded = any(one[-1].run == self.run for one in others)
                ask.busy = answer.status in (409, 423, 425)
                ask.busy |= crowded and answer.status not in (401, 403, 404, 408)
        elif sent.endpoint == "rev-users.get" and answer.status in (200, 404) and answer.data:
            user = answer.data.get("rev_user")
            exists = (
                isinstance(user, dict)
                and user.get("id") == sent.body["id"]
                and user.get("state") != "deleted"
            )
            exists = exists and user.get("state") == "active" and not user.get("primary_identity")
            if self.first_merge and sent.body["id"] == self.first_merge[1] and not exists:
                self.is_forbidden = False  # it was carried out all the same
            if exists:
                for (_, duplicate), asks in self.asks.items():
                    if duplicate == sent.body["id"] and asks:
                        asks[-1].polled = self.run

    def _note_shown(self, sent: Sent, answer: Any) -> None:
        if sent.endpoint == "rev-users.get":
            self.polled.add(sent.body["id"])
        if answer.status != 200 or not answer.data:
            return
        for value in answer.data.values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict) and isinstance(one.get("id"), str):
                    self.read[one["id"]] = (sent.at, self.clock.now)
        if "cursor" in sent.body:  # a list is as old as its first page
            sent = sent._replace(at=self.first_pages.get(list_of(sent), -1e9))
        else:
            self.first_pages[list_of(sent)] = sent.at
        if sent.endpoint in ("rev-users.list", "rev-users.get"):
            users = answer.data.get("rev_users") or [answer.data.get("rev_user")]
            for user in users if isinstance(users, list) else ():
                if isinstance(user, dict) and isinstance(user.get("id"), str):
                    self.shown[user["id"]] = max(sent.at, self.shown.get(user["id"], sent.at))
        for role in (*ROLES.values(), "members"):
            for person in sent.body.get(role, ()) if sent.endpoint.endswith("s.list") else ():
                self.listed[role, person] = max(sent.at, self.listed.get((role, person), sent.at))

    def _judge_client_limit(self) -> None:
        """What fits into two windows may leave in any time that is as long as one."""
        settings = self.process.settings
        calls, period = settings.calls, settings.period
        now = self.clock.steady
        self.sent_at = [at for at in self.sent_at if now - at < period - JITTER] + [now]
        if calls and len(self.sent_at) > 2 * calls:
            what = f"{len(self.sent_at)} requests in {period:g} s, of {calls}"
            broken("the client-side rate limit holds", what)

    # ----- a merge request ------------------------------------------------------------------------

    def _judge_merge(self, ids: Ids, sent: Sent) -> None:
        earlier = self.asks[ids]
        if self.first_merge is None and ids not in self.forbidden:
            self.first_merge = ids
        # What DevRev has carried out all the same was seen by a poll.
        if self.is_forbidden and self.first_merge and self.organisation.alive(self.first_merge[1]):
            broken(
                "a 403 to the first merge request of a run ends it", f"{name_of(ids)} is requested"
            )
        row = self._judge_intent(ids)
        self._judge_plan(ids, row)
        self._judge_turn(ids)
        self._judge_freshness(ids)
        self._judge_check(ids)
        self._judge_group(ids)
        self.undo.judge_merge(ids)
        self._judge_backup(ids, Path(row["backup"]))
        if earlier:
            self._judge_patience(ids, earlier[-1], row["backup"])
        self._judge_room(ids)
        earlier.append(Ask(self.run, sent, self.clock.wall, row["backup"]))

    def _judge_intent(self, ids: Ids) -> Dict[str, Any]:
        """The intent is in both files, and nothing of it is still to be committed."""
        invariant = "the intent is in both files before the request leaves"
        found = []
        for path in (MAIN, COPY):
            db = self.process.connections.get(path.name) if self.process else None
            if db is None or db.in_transaction:
                broken(invariant, f"{path} is not open, or its transaction is")
            statement = (
                f"SELECT {', '.join(ROW)} FROM pairs WHERE primary_id = ? AND duplicate_id = ?"
            )
            values = sqlite3.Connection.execute(db, statement, ids).fetchone()
            row = stored_row(values) if values else {"state": "nothing", "requested_at": 0.0}
            late = abs(row["requested_at"] - self.clock.wall) > 5 and not (
                self.clock.set_by or self.clock.slept
            )
            if row["state"] != "requested" or late:
                broken(invariant, f"{path} says {row['state']} of {name_of(ids)}")
            found.append(row)
        if found[0]["document"] != found[1]["document"]:
            broken(invariant, f"the two files differ about {name_of(ids)}")
        return found[0]

    def _judge_plan(self, ids: Ids, row: Mapping[str, Any]) -> None:
        invariant = "only what is in the plan is merged"
        wanted = self.asked_for.get(ids)
        if wanted is None or wanted.new_ref != row["new_ref"]:
            what = (
                f"{name_of(ids)} with the reference {row['new_ref']} is not in the plan of this run"
            )
            broken(invariant, what)
        if ids in self.intended or (self.asks[ids] and self.asks[ids][-1].run == self.run):
            return
        if ids not in self.allowed:
            stopped = ids in self.asked_for and ids not in self.plan
            why = (
                "it was undone or cancelled, and is not named"
                if stopped
                else "--email does not name it"
            )
            broken(invariant, f"{name_of(ids)}: {why}")
        self.begun.add(ids)
        limit = self.options.limit
        if limit and len(self.begun) > limit:
            broken(invariant, f"--limit {limit}, and {len(self.begun)} new pairs are requested")
        sizes: DefaultDict[str, int] = defaultdict(int)
        for other in self.allowed - self.expected.keys():
            sizes[other[0]] += 1
        fresh = [
            size
            for primary, size in sizes.items()
            if not any(one[0] == primary for one in self.expected)
        ]
        if limit and ids in self.tried and sum(fresh) >= limit and set(fresh) == {1}:
            what = f"{name_of(ids)} failed before, and {sum(fresh)} pairs were never tried"
            broken("what was never tried comes first", what)

    def _judge_turn(self, ids: Ids) -> None:
        """Until one merge is confirmed they go one at a time, and the pairs of a group always do."""
        mine = [
            other
            for other, asks in self.asks.items()
            if other != ids and asks and asks[-1].run == self.run
        ]
        confirmed = any(
            row["run"] == self.run_id and row["state"] in ("merged", "proving", *ENDED)
            for other, row in self.latest.items()
            if other in mine or other in self.intended
        )
        if not confirmed and not self.lies:  # a poll may have confirmed what was contradicted since
            for other in mine:
                row, last = self.latest[other], self.asks[other][-1]
                waiting = row["state"] in ("requested", "acknowledged") and not row["code"]
                if waiting and last.answer != "refused" and self.organisation.alive(other[1]):
                    what = f"{name_of(ids)}, and {name_of(other)} is not confirmed"
                    broken("the first merge of a run goes alone until it is confirmed", what)
            failed = [
                other for other in mine if self.latest[other]["code"] == "merge_not_confirmed"
            ]
            fresh = [
                other for other in failed if other not in self.tried and other not in self.intended
            ]
            if len(fresh) >= 5 and ids not in self.tried:
                what = f"{name_of(ids)}, after {len(fresh)} merges that were not confirmed"
                broken("five failures in a row stop a run", what)
        # A merge without a reference has nothing to set: it confirms the run alone.
        is_confirmed = any(
            row["run"] == self.run_id
            and not row["new_ref"]
            and row["state"] in ("merged", "proving", *ENDED)
            for row in self.latest.values()
        )
        for other in () if self.takes_updates or is_confirmed or self.lies else mine:
            row = self.latest[other]
            if row["state"] == "merged" and row["new_ref"] and not row["code"]:
                what = f"{name_of(ids)}, and the reference of {name_of(other)} is not set"
                broken("no more merges before the first reference is set", what)
        self.flying += 1
        for other in mine:
            there = all(self.organisation.alive(one) for one in other) and not self.lies
            given_up = self.latest[other]["code"] or self.asks[other][-1].answer == "refused"
            if other[0] == ids[0] and there and not given_up:
                what = f"{name_of(ids)} before {name_of(other)} is merged"
                broken("the pairs of a group go one after the other", what)

    def _judge_freshness(self, ids: Ids) -> None:
        """What the run was told is fresh, whether anything has changed or not."""
        now, never = self.clock.now + JITTER, -1e9
        for contact in ids:
            if now - self.shown.get(contact, never) > FRESH + 2 * JITTER:
                what = (
                    f"{short(contact)} was shown {now - self.shown.get(contact, never):.0f} s ago"
                )
                broken(FRESHNESS, what)
            for role in (*ROLES.values(), "members"):
                age = now - self.listed.get((role, contact), never)
                if age > LISTED + 2 * JITTER:
                    broken(BACKED_UP, f"{role} of {short(contact)} was listed {age:.0f} s ago")

    def _judge_check(self, ids: Ids) -> None:
        """Some moment of the last minute has to have shown each contact as the export has it."""
        since = self.clock.now - FRESH - self.lag - JITTER
        seen: List[List[Thing]] = []
        wanted = self.known[ids]
        moved = {
            w.new_ref
            for pairs in self.known.values()
            for w in pairs
            if w.primary.id == ids[0] and w.new_ref
        }
        for contact, rows, more in (
            (ids[0], [one.primary for one in wanted], moved),
            (ids[1], [one.duplicate for one in wanted], set()),
        ):
            refs = {row.ref for row in rows} | more
            emails = {row.key for row in rows}
            if self.reasons.is_odd(contact):  # merged, and DevRev answers as before
                since = self.organisation.merge_times[contact] - JITTER
            good = [
                one
                for one in versions(self.organisation.contacts, contact, since)
                if one and one["state"] == "active" and one.get("external_ref") in refs
                if email_key(str(one.get("email") or "")) in emails
            ]
            if not good:
                now = self.organisation.contacts.get(contact) or {}
                shown = ", ".join(
                    f"{field} {now.get(field)}" for field in ("state", "email", "external_ref")
                )
                what = f"{short(contact)} has been another for over {FRESH:g} s: {shown}"
                broken(FRESHNESS, what)
            seen.append(good)
        orgs = [{org_id_of(one) for one in good} for good in seen]
        across = getattr(self.options, "across_workspaces", False) or None in orgs[0] | orgs[1]
        if not orgs[0] & orgs[1] and not across:
            broken(FRESHNESS, f"{name_of(ids)} are of different rev orgs")

    def _judge_group(self, ids: Ids) -> None:
        """What DevRev shows besides: contacts that are not verified, that have several references, and namesakes."""
        since, wanted = self.clock.now - FRESH - self.lag - JITTER, self.asked_for[ids]
        if not getattr(self.options, "try_unverified", False):
            for pair in (ids, ids[::-1]):  # whose second is the contact that is not verified
                odd = [one in self.organisation.unverified for one in pair]
                moves = pair == ids and wanted.new_ref
                if odd[1] and self.reasons.shows_verified(pair) and (moves or not odd[0]):
                    broken("an unverified contact is not merged with a verified one", name_of(ids))
        for contact in ids:
            one = self.organisation.contacts.get(contact) or {}
            own = {one.get("external_ref"), "REVU-" + contact.rpartition("/")[2]}
            several = set(one.get("external_refs", ())) - own
            if several and "external_refs" not in self.fake_devrev.hidden_fields:
                broken("a contact with several references is not merged", short(contact))
        if self.lies or self.blind_lists:
            return
        group = [row for row in self.rows if row.key == wanted.primary.key]
        members = {row.id for row in group if row.takes_part}
        spellings = {row.email for row in group}
        listed = set()
        for one in self.organisation.contacts.find([("email", sorted(spellings))]):
            been = versions(self.organisation.contacts, one["id"], since)
            always = all(
                was and takes_part(was.get("external_ref")) and was["email"] in spellings
                for was in been
            )
            if always and self.organisation.alive(one["id"]):
                listed.add(one["id"])
        chosen = wanted.primary.key in self.choices
        users = {
            one
            for one in listed - members
            if self.organisation.contacts[one]["external_ref"].startswith("user_")
        }
        if chosen and listed - members:
            broken(
                "a chosen group is as the choice has seen it",
                f"{len(listed - members)} have joined",
            )
        if not chosen and (len(listed) > most_contacts(wanted.primary.key) or users):
            what = f"{wanted.primary.key} has {len(listed)} contacts, {len(users)} of them with another user_ reference"
            broken("a shared mailbox is not merged without a choice", what)

    def _judge_backup(self, ids: Ids, folder: Path) -> None:
        try:
            manifest, contents = read_backup(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken(BACKED_UP, f"{folder}: {type(error).__name__} {error}")
            return
        entries = {entry["csv"]["id"]: entry for entry in manifest["contacts"]}
        since = self.clock.now - LISTED - self.lag - JITTER
        for contact in ids:
            if contact not in entries:
                broken(BACKED_UP, f"{folder} does not hold {short(contact)}")
            entry, files = entries[contact], contents[entries[contact]["folder"]]
            if files["contact.json"]["id"] != contact:
                broken(BACKED_UP, f"{folder}: contact.json is not {short(contact)}'s")
            works = {work["id"]: work for work in files["works.json"]}
            lists = [
                (role, self.organisation.works, entry["works"][key], works)
                for key, role in ROLES.items()
            ]
            talks = {talk["id"]: talk for talk in files["conversations.json"]}
            lists.append(
                ("members", self.organisation.conversations, entry["conversations"], talks)
            )
            for role, table, listed, there in lists:
                self._judge_list(
                    f"{folder}: {role} of {short(contact)}",
                    table,
                    role,
                    contact,
                    listed,
                    there,
                    since,
                )
            if not self.options.no_timelines:
                self._judge_timelines(folder, {**works, **talks}, files["timelines.json"])
            kinds = (":ticket/", ":issue/")
            counts = [
                sum(any(kind in one for kind in kinds) for one in entry["works"][key])
                for key in ROLES
            ]
            self._judge_count(ids, contact, max(counts))

    def _judge_list(
        self,
        what: str,
        table: Table,
        role: str,
        contact: str,
        listed: Sequence[str],
        there: Mapping[str, Thing],
        since: float,
    ) -> None:
        always, ever = holdings(table, role, contact, since)
        if not set(listed) <= set(there):
            broken(BACKED_UP, f"{what}: not all that is listed is there")
        if self.lies or self.blind_lists:
            return
        always = {one for one in always if self.reasons.is_listed(one)}
        if not always <= set(listed):
            broken(BACKED_UP, f"{what} lacks {', '.join(map(short, sorted(always - set(listed))))}")
        if not set(listed) <= ever:
            gone = ", ".join(map(short, sorted(set(listed) - ever)))
            broken(BACKED_UP, f"{what} names {gone}, which has not been so for {LISTED:g} s")

    def _judge_timelines(
        self, folder: Path, things: Mapping[str, Thing], timelines: Mapping[str, Any]
    ) -> None:
        for object_id, thing in things.items():
            now = self.organisation.works.get(object_id) or self.organisation.conversations.get(
                object_id
            )
            if self.lies or now is None or now["modified_date"] != thing["modified_date"]:
                continue
            truth = [entry["id"] for entry in self.organisation.timelines.get(object_id, ())]
            saved = [entry["id"] for entry in timelines.get(object_id, ())]
            if (
                object_id not in timelines
                or saved != truth[: len(saved)]
                or len(saved) < self._comments(object_id)
            ):
                what = f"{folder}: of {len(truth)} comments on {short(object_id)} it holds {len(saved)}"
                broken(BACKED_UP, what)

    def _comments(self, object_id: str) -> int:
        """Return how many comments there were before others edited anything."""
        return sum(
            not entry.get("body", "").startswith("later")
            for entry in self.organisation.timelines.get(object_id, ())
        )

    def _judge_count(self, ids: Ids, contact: str, count: int) -> None:
        rows = [
            row
            for one in self.known[ids]
            for row in (one.primary, one.duplicate)
            if row.id == contact
        ]
        grown = contact == ids[0] and any(
            pair[0] == ids[0] and asks for pair, asks in self.asks.items()
        )
        grown = grown or (
            contact == ids[0] and any(pair[0] == ids[0] for pair in self.ever_intended)
        )
        at_least = grown or self.options.count_policy == "at-least"
        if not any(row.tickets == count or (at_least and count > row.tickets) for row in rows):
            counts = sorted({row.tickets for row in rows})
            what = f"the backup of {short(contact)} counts {count} tickets, the export {counts}"
            broken("a count that does not match refuses the group", what)

    def _judge_patience(self, ids: Ids, last: Ask, backup: str) -> None:
        invariant = "nothing is requested again without a poll of the same run and the wait"
        if last.polled != self.run:
            what = (
                f"{name_of(ids)}: no poll of this run has shown it unmerged since it was requested"
            )
            broken(invariant, what)
        waited = self.clock.now - last.ended
        if last.run != self.run:
            last.busy = False
            now, wall = (
                self.began
            )  # by the wall clock until then, because no other one runs between two runs
            waited = max(
                self.clock.now - last.at,
                self.clock.wall - last.wall,
                wall - last.wall + self.clock.now - now,
            )
        patience = last.patience(self.options.merge_timeout)
        if waited < patience - JITTER:
            what = f"{name_of(ids)}: requested again {waited:.2f} s after it, the wait is {patience:g} s"
            broken(invariant, what)
        if backup == last.backup and not last.busy:
            broken(invariant, f"{name_of(ids)}: requested again with the backup of the last time")

    def _judge_room(self, ids: Ids) -> None:
        """The window has room for the merge, and for what finishes it; what others spend can't be known."""
        quota, process = self.fake_devrev.quota, self.process
        if (
            quota is None
            or process is None
            or quota.others
            or self.others_spent
            or process.units_unseen
        ):
            return
        if quota.rolls and quota.limit < 10:
            return  # a request in flight, which nothing tells of yet, is a large part of it
        needed = 2 + any(one.new_ref for one in self.known[ids])
        now, reset = quota._turn()
        left = quota.limit - quota._used - process.travelling
        if reset - now > 3 and quota._used and left < min(needed, quota.limit):
            broken(
                "a merge request leaves only when the quota has room for the requests that finish the pair",
                f"{left} of {quota.limit} units left at the request for {name_of(ids)}",
            )

    # ----- an update of a primary -----------------------------------------------------------------

    def _judge_update(self, sent: Sent) -> None:
        primary, fields = sent.body["id"], set(sent.body) - {"id", "external_ref"}
        # What was intended by a run that was killed before it sent the request counts as requested.
        mine = [
            ids
            for ids in self.known
            if ids[0] == primary and (self.asks[ids] or ids in self.ever_intended)
        ]
        if fields:
            self._judge_fields(sent, mine)
        if "external_ref" not in sent.body:
            return
        reference = sent.body["external_ref"].strip()  # DevRev's own may have blanks around it
        mine = [ids for ids in mine if any(one.new_ref == reference for one in self.known[ids])]
        if not mine:
            what = f"{reference} to {short(primary)}"
            broken("only references of merged duplicates are moved", what)
        if not self.lies and all(self.organisation.alive(duplicate) for _, duplicate in mine):
            what = f"{reference}, and {short(mine[0][1])} still exists"
            broken("a reference is moved after the merge", what)
        if not any(self.asks[ids] and self.asks[ids][-1].run == self.run for ids in mine):
            self._judge_overwritten(primary, mine)
        for ids in mine:
            self._judge_gap(ids)

    def _judge_overwritten(self, primary: str, mine: Sequence[Ids]) -> None:
        """A resumed pair reads the primary first, and leaves a reference that another user has set."""
        known = {ref for ids in self.known if ids in mine or ids[0] == primary for one in self.known[ids]
                 for ref in (one.primary.ref, one.new_ref)}  # fmt: skip
        been = versions(self.organisation.contacts, primary, self.began[0])
        if been and all(was is not None and was.get("external_ref") not in known for was in been):
            what = f"{(been[0] or {}).get('external_ref')} of {short(primary)}"
            broken("a reference that another user has set is not overwritten", what)

    def _judge_fields(self, sent: Sent, mine: Sequence[Ids]) -> None:
        """Fields are carried only where that was asked for, and only what the duplicates had."""
        invariant = "only fields that the duplicate had are carried, and only with --carry-fields"
        rows = [
            self.latest[ids]
            for ids in mine
            if ids in self.latest and self.latest[ids]["fields_to_carry"]
        ]
        if not rows:
            broken(invariant, f"{', '.join(sorted(sent.body))} of {short(sent.body['id'])}")
        primary = sent.body["id"]
        contacts = [self.organisation.contacts.get(one) or {} for ids in mine for one in ids]
        for ids in mine:
            been = versions(self.organisation.contacts, ids[0], -1e9)
            contacts += [one for one in been if one]
        lately = versions(self.organisation.contacts, primary, self.rests_since(primary))
        for field in sorted(set(sent.body) - {"id", "external_ref"}):
            value = sent.body[field]
            if field == "phone_numbers":
                numbers = {number for one in contacts for number in one.get(field, ())}
                good = set(value) <= numbers
                is_lost = not kept_numbers(lately) <= set(value)
            else:
                good = field in ("description", "display_name")
                good = good and any(one.get(field) == value for one in contacts)
                is_lost = not any(may_be_replaced(one, field) for one in lately)
            if not good:
                broken(invariant, f"{field} of {short(primary)} becomes {value!r}")
            if is_lost and not self.lies:
                broken(LOST, f"{field} of {short(primary)} becomes {value!r}")

    def _judge_gap(self, ids: Ids) -> None:
        """Where nothing is disturbed, the reference is moved at the next poll, and that comes soon."""
        merged, asks, slowest = (
            self.organisation.merge_times.get(ids[1]),
            self.asks[ids],
            self.slowest(),
        )
        if (
            slowest is None
            or merged is None
            or len(asks) != 1
            or asks[0].run != self.run
            or ids in self.moving
        ):
            return
        self.moving.add(ids)
        gap, most = self.clock.now - merged, 1.0 + 0.1 * self.fake_devrev.merge_delay + 6 * slowest
        if gap > most:
            what = f"{gap:.1f} s from the merge of {name_of(ids)} to its reference"
            broken("between DevRev's merge and the new reference nothing waits", what)

    # ----- a run ends -----------------------------------------------------------------------------

    def after_run(
        self, report: Path, code: Optional[int], ended: bool, needed: bool
    ) -> Dict[Ids, Dict[str, Any]]:
        """Judge what a run has left on the disk; return the savepoint's rows.

        `report` is its own; `ended`: it was not killed; `needed`: it has to have written its report.
        """
        rows = self.judge_files(not ended)
        self.ever_intended.update(ids for ids, row in rows.items() if row["state"] in UNFINISHED)
        self._judge_rows(rows)
        if needed and code in (0, 1) and self.options.csv and not self.options.preview:
            self._judge_cancelled_polled()
        self.undo.after_run(rows, report, code, needed)
        self.reports.after_run(rows, None if self.undo.active else report, code, needed)
        for ids, asks in self.asks.items():
            row = rows.get(ids)
            if (
                asks
                and asks[-1].answer != "lost"
                and not (row and (row["rejected"] or row["state"] != "requested"))
            ):
                asks[-1].answer = "lost"  # the run was killed before it could save the answer
        return rows

    def _judge_cancelled_polled(self) -> None:
        for ids, row in self.expected.items():
            if row["state"] == "cancelled" and ids[1] not in self.polled:
                broken("every run polls each cancelled pair", name_of(ids))

    def _judge_rows(self, rows: Mapping[Ids, Mapping[str, Any]]) -> None:
        for ids, asks in self.asks.items():
            state = rows[ids]["state"] if ids in rows else "nothing"
            if asks and state not in (*TERMINAL, *UNFINISHED, "undoing"):
                broken(REMEMBERED, f"the savepoint says {state} of {name_of(ids)}")
        for ids, row in rows.items():
            state = row["state"]
            if state == "merged_elsewhere":
                self._judge_elsewhere(ids)
            elif state == "done":
                self.judge_done(ids, row["new_ref"], row["backup"])
            elif (
                state in ("merged", "proving") and not self.lies and self.organisation.alive(ids[1])
            ):
                broken(TRUE, f"{name_of(ids)} is {state}, and is not merged")
            elif state == "settled" and not self.lies and self.organisation.alive(ids[1]):
                broken(TRUE, f"{name_of(ids)} is settled, and its duplicate still exists")
            if row["after_cancel"] and ids not in self.cancelled:
                broken(TRUE, f"{name_of(ids)} was never cancelled")

    def _judge_elsewhere(self, ids: Ids) -> None:
        if self.lies or ids in self.judged:
            return
        self.judged.add(ids)
        asks = self.asks[ids]
        was_gone = (
            bool(asks) and self.organisation.merge_times.get(ids[0], self.clock.now) < asks[0].at
        )
        if self.organisation.alive(ids[1]) or was_gone or len(asks) > 1:
            invariant = "merged_elsewhere is said only of what another user has merged or deleted"
            broken(invariant, f"{name_of(ids)} still exists, or was requested more than once")

    def judge_done(self, ids: Ids, reference: Optional[str], backup: Optional[str]) -> None:
        if not self.into(ids) and not self._is_as_if_merged(ids, backup):
            broken(TRUE, f"{name_of(ids)} is done, and was not merged")
        holders = {
            ids[0],
            self.organisation.survivor(ids[0]),
        }  # the primary may have been merged onward
        times = self.organisation.reference_times
        if reference and not any(reference == ref for one in holders for _, ref in times[one]):
            broken(TRUE, f"{name_of(ids)} is done, and the primary never got {reference}")
        self._judge_transfer(ids, backup)

    def _judge_transfer(self, ids: Ids, backup: Optional[str]) -> None:
        """All that was backed up belonged to the primary at some time since the merge, but for what is deleted."""
        folder = Path(backup or "nowhere")
        if self.lies or ids in self.judged or not folder.exists() or not self.into(ids):
            return
        self.judged.add(ids)
        manifest, since = (
            json.loads((folder / "manifest.json").read_bytes()),
            self.organisation.merge_times[ids[1]],
        )
        for entry in (one for one in manifest["contacts"] if one["csv"]["id"] == ids[1]):
            for one, role in in_backup(entry):
                table = (
                    self.organisation.conversations
                    if role == "members"
                    else self.organisation.works
                )
                was = versions(table, one, since - self.lag - LISTED)
                if table.get(one) is not None and not any(
                    held(thing, role, ids[0]) for thing in was
                ):
                    invariant = (
                        "a pair is done only where all that was backed up belongs to the primary"
                    )
                    broken(invariant, f"{role} of {short(one)}, {name_of(ids)}")

    def _is_as_if_merged(self, ids: Ids, backup: Optional[str]) -> bool:
        """Whether others have deleted the duplicate, or merged it elsewhere, and that can't be told from a merge: all
        that it had belongs to the primary, or it had nothing."""
        if self.organisation.alive(ids[1]):
            return False
        try:
            manifest = json.loads((Path(backup or "") / "manifest.json").read_bytes())
        except OSError:
            return True
        (entry,) = (one for one in manifest["contacts"] if one["csv"]["id"] == ids[1])
        return all(self.belongs_to(one, role, ids[0]) for one, role in in_backup(entry))

    def left_behind(self, ids: Ids) -> List[str]:
        """Return what was backed up of a duplicate and does not belong to its primary, or no longer exists."""
        folder = Path(self.latest[ids]["backup"] if ids in self.latest else "nowhere")
        if not (folder / "manifest.json").exists():
            return [str(folder)]
        manifest = json.loads((folder / "manifest.json").read_bytes())
        entries = [one for one in manifest["contacts"] if one["csv"]["id"] == ids[1]]
        items = [item for entry in entries for item in in_backup(entry)]
        tables = self.organisation.works, self.organisation.conversations
        there = {one for one, _ in items if any(one in table for table in tables)}
        return [
            one for one, role in items if one not in there or not self.belongs_to(one, role, ids[0])
        ]

    def into(self, ids: Ids) -> bool:
        """Whether the duplicate was merged into the primary."""
        one: Optional[str] = ids[1]
        while one is not None and one != ids[0]:
            one = self.organisation.merged_into.get(one)
        return one is not None

    def belongs_to(self, object_id: str, role: str, contact: str) -> bool:
        thing = self.organisation.works.get(object_id) or self.organisation.conversations.get(
            object_id
        )
        return thing is None or held(thing, role, contact)

    # ----- what gets lost between runs ------------------------------------------------------------

    def lose_file(self, path: Path, put_back: Optional[Path] = None, forget: bool = True) -> None:
        """Delete a file of the savepoint, or put an older copy of it in its place."""
        for tail in ("", "-journal"):
            target = Path(f"{path}{tail}")
            if target.exists():
                target.unlink()
            if put_back is not None and Path(f"{put_back}{tail}").exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copy(f"{put_back}{tail}", str(target))
        file = read_file(path)
        self.committed[path.name] = dict(file.rows) if file else {}
        self.reports.put_back(file)
        for asks in self.asks.values():
            if asks:
                asks[-1].answer = "lost"  # for all that the tool can know
        if forget:
            self.forget()

    @staticmethod
    def _runs_of(*files: Optional[StoredFile]) -> Set[str]:
        return {
            run
            for file in files
            if file
            for run in (*file.runs, *(row["run"] for row in file.rows.values()))
        }

    def known_runs(self) -> Set[str]:
        return self._runs_of(read_file(MAIN), read_file(COPY))

    def lose_backups(self) -> None:
        """Delete the folder `backups`, the copy of the savepoint included."""
        shutil.rmtree("backups")
        self.committed[COPY.name] = {}
        self.backups_lost = True
        self.forget()

    def forget(self) -> None:
        """Forget what neither file knows any more: both were lost, or put back from an older backup."""
        main, copy = read_file(MAIN), read_file(COPY)
        rows = joined(main, copy)
        for ids in list(self.asks):
            row = rows.get(ids)
            if self.asks[ids] and (row is None or row["state"] in ("planned", "failed")):
                del self.asks[ids]
                self.ever_intended.discard(ids)
        ended = {ids for ids, row in self.latest.items() if row["state"] in ENDED}
        self.reports.reopened |= {
            ids for ids in ended if ids not in rows or rows[ids]["state"] not in ENDED
        }
        self.latest = dict(rows)
        self.judged = {ids for ids in self.judged if ids in rows}
        self.undo.forget(rows)

    # ----- a scenario ends ------------------------------------------------------------------------

    def after_life(self, rows: Mapping[Ids, Mapping[str, Any]], stuck: Set[str]) -> None:
        """Everything was left in peace for long enough: each pair has ended, or there is a true reason."""
        self.reasons.judge(rows, stuck)
        self.undo.after_life(rows)


def kept_numbers(been: Sequence[Optional[Thing]]) -> Set[str]:
    """Return the phone numbers that a contact has had all the time."""
    found = [set((one or {}).get("phone_numbers", ())) for one in been]
    return set.intersection(*found)


def may_be_replaced(contact: Optional[Thing], field: str) -> bool:
    """Return whether a contact has no value of a field, or a name that DevRev has made."""
    value = str((contact or {}).get(field) or "")
    if field != "display_name" or contact is None:
        return not value
    email = str(contact.get("email") or "")
    return value.lower() in (
        "",
        email.lower(),
        email.partition("@")[0].lower(),
        contact["display_id"].lower(),
    )


def list_of(sent: Sent) -> str:
    """Return what the pages of one list have in common."""
    return json.dumps(
        [sent.endpoint, {name: value for name, value in sent.body.items() if name != "cursor"}]
    )


def read_backup(folder: Path) -> Tuple[Any, Dict[str, Dict[str, Any]]]:
    """Return a backup's manifest, and its files by folder and name. Raise ValueError where they don't match."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    contents: DefaultDict[str, Dict[str, Any]] = defaultdict(dict)
    for file, expected in manifest["files"].items():
        data = (folder / file).read_bytes()
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise ValueError(f"{file} is not what was written")
        home, _, title = file.rpartition("/")
        contents[home][title] = json.loads(data)
    return manifest, contents
