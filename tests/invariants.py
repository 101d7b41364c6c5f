"""What merge_contacts.py invariants, held against what is true in tests.fake_devrev.

Nothing here uses the module: its plan, its backups, its savepoint and its reports are judged by a second opinion.
"""

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import (
    Any,
    Callable,
    DefaultDict,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from tests.fake_devrev import Organisation, Table, Thing, World
from tests.simulated import Clock, InvariantBroken, Sent, SimulatedProcess, short
from tests.undo_invariants import UndoChecker

Ids = Tuple[str, str]  # primary, duplicate
ROLES = {"owned": "owned_by", "created": "created_by", "reported": "reported_by"}
ENDED = ("done", "merged_elsewhere", "settled")
UNFINISHED = ("requested", "acknowledged", "merged", "proving")
FRESH, LISTED = 60.0, 120.0
JITTER = 0.01  # seconds: what a comparison of two clocks may be off by


class Row(NamedTuple):
    """One contact of an export."""

    id: str
    email: str
    ref: str
    tickets: int
    created: str

    @property
    def key(self) -> str:
        return self.email.strip().lower()


DROPPED = ("already_gone", "already_merged", "different_rev_org")  # codes of pairs that are taken out of their groups


class Wanted(NamedTuple):
    """One merge that an export asks for."""

    primary: Row
    duplicate: Row
    new_ref: Optional[str]

    @property
    def ids(self) -> Ids:
        return self.primary.id, self.duplicate.id


def plan_of(rows: Iterable[Row], choices: Mapping[str, str]) -> Dict[Ids, Wanted]:
    """The merges that the contract reads from an export."""
    groups: DefaultDict[str, List[Row]] = defaultdict(list)
    for row in rows:
        groups[row.key].append(row)
    found: Dict[Ids, Wanted] = {}
    for email, group in groups.items():
        ranked = sorted(group, key=lambda row: (-row.tickets, row.created, row.id))
        users = [row for row in ranked if row.ref.startswith("user_")]
        system = [row for row in ranked if row.ref.startswith("REVU-")]
        kept = next((row for row in users or system if row.ref == choices.get(email)), None)
        if kept is None and len(users) == 1 and system and len(users) + len(system) <= 3:
            kept = users[0]
        if kept is None:
            continue
        primary = system[0] if kept in users and system else kept
        for row in (*users, *system):
            if row is not primary:
                wanted = Wanted(primary, row, row.ref if row is kept else None)
                found[wanted.ids] = wanted
    return found


def export_of(organisation: Organisation) -> List[Row]:
    """What the warehouse's query would give now."""
    rows = []
    for contact in organisation.contacts.values():
        if organisation.alive(contact["id"]) and contact.get("email") and contact.get("external_ref"):
            row = Row(contact["id"], contact["email"], contact["external_ref"], 0, contact["created_date"])
            rows.append(row._replace(tickets=greatest(organisation, contact["id"])))
    return rows


def greatest(organisation: Organisation, contact: str) -> int:
    return max(len(organisation.works.find([(role, [contact])])) for role in ROLES.values())


# --------------------------------------------------------------------------------------------------
# What was true lately
# --------------------------------------------------------------------------------------------------


def changes(table: Table, since: float) -> Iterator[Tuple[str, Optional[Thing]]]:
    """What objects were before each change since a moment, the latest first; None where there was none."""
    for changed, object_id, was in reversed(table._log):
        if changed < since:
            return
        yield object_id, was


def versions(table: Table, object_id: str, since: float) -> List[Optional[Thing]]:
    """What an object was at any time since a moment."""
    return [table.get(object_id), *(was for changed, was in changes(table, since) if changed == object_id)]


def held(thing: Optional[Thing], role: str, person: str) -> bool:
    if thing is None:
        return False
    people = thing.get(role) or ()
    return any(one["id"] == person for one in ([people] if role == "created_by" else people))


def holdings(table: Table, role: str, person: str, since: float) -> Tuple[Set[str], Set[str]]:
    """The ids of what a person has held in a role all the time since a moment, and at any time since then."""
    ever = {thing["id"] for thing in table.find([(role, [person])])}
    always = set(ever)
    for object_id, was in changes(table, since):
        if held(was, role, person):
            ever.add(object_id)
        else:
            always.discard(object_id)
    return always, ever


# --------------------------------------------------------------------------------------------------
# The books
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
        self.looked = -1  # the run that has seen the duplicate there since

    def patience(self, run: int, timeout: float) -> float:
        return min(10.0, timeout / 4) if self.answer == "lost" else timeout


class InvariantChecker:
    """All that was asked for in a life, and the invariants about it."""

    def __init__(self, fake_devrev: World, clock: Clock) -> None:
        self.fake_devrev, self.clock, self.organisation = fake_devrev, clock, fake_devrev.organisation
        self.process: Optional[SimulatedProcess] = None
        self.options: Any = None
        self.run = 0
        self.plan: Dict[Ids, Wanted] = {}
        self.allowed: Set[Ids] = set()  # of the plan, by --email
        self.known: DefaultDict[Ids, List[Wanted]] = defaultdict(list)
        self.asks: DefaultDict[Ids, List[Ask]] = defaultdict(list)
        self.begun: Set[Ids] = set()  # in this run, never asked for before
        self.intended: Set[Ids] = set()  # by an earlier run, which may have been killed before the request left
        self.journal: DefaultDict[Ids, List[Tuple[str, str]]] = defaultdict(list)  # event, backup
        self._journal_read = 0
        self.stopped = False  # the run was told to stop
        self.slowest: Callable[[], Optional[float]] = lambda: (
            None
        )  # seconds there or back, where nothing disturbs a run
        self.moving: Set[Ids] = set()  # the reference was asked for at least once
        self.lies = False  # whether answers were false: what was believed then may be wrong
        self.began = (0.0, 0.0)  # this run: true seconds, and what the wall clock said
        self.forgotten: Set[Ids] = set()  # pairs whose report was lost
        self.journal_lost: Set[Ids] = set()  # pairs whose lines were lost
        self.backups_lost = False
        self.disk_was_full = False
        self.lag = 0.0  # the longest that lists have lagged
        self.reports: Dict[str, Any] = {}
        self.last_report, self.last_code = "", None  # type: str, Optional[int]
        self.others_spent = 0
        self.undo = UndoChecker(self)
        self.shown: Dict[str, float] = {}  # when the last request left whose answer has shown a contact
        self.listed: Dict[Tuple[str, str], float] = {}  # the same of what somebody has in a role
        self.judged: Set[Ids] = set()  # pairs whose end was held against the world
        self.ceiling = (0, 60.0)  # calls in seconds, of this run
        self.sent_at: List[float] = []  # steady seconds, of the last requests
        self.acknowledged, self.flying = False, 0  # merges of this run

    versions = staticmethod(versions)
    held = staticmethod(held)

    # ----- a run begins and ends -------------------------------------------------------------------

    def begin(self, process: SimulatedProcess, options: Any, rows: Sequence[Row], choices: Mapping[str, str]) -> None:
        self.run += 1
        self.process, self.options, self.stopped = process, options, False
        self.began = self.clock.now, self.clock.wall
        self.acknowledged, self.flying, self.sent_at = False, 0, []
        self.undo.begin(options)
        emails = {email.strip().casefold() for email in options.email or ()}
        self.plan = self._without_undone(plan_of(rows, choices), emails)
        self.allowed = {ids for ids, wanted in self.plan.items() if not emails or wanted.primary.key in emails}
        self.begun = set()
        for ids, wanted in self.plan.items():
            if wanted not in self.known[ids]:
                self.known[ids].append(wanted)

    def _without_undone(self, plan: Dict[Ids, Wanted], named: Set[str]) -> Dict[Ids, Wanted]:
        """The plan without the groups of which a pair was undone, until they are named."""
        self.read_journal()
        rows = read_savepoint(Path("savepoint.db"))
        states = {ids: (row["email"], row["state"]) for ids, row in rows.items()}
        for ids, event in self.unread(Path("savepoint.db")).items():
            if event == "undone" and self.known[ids]:
                states[ids] = self.known[ids][-1].primary.key, "undone"
            elif event not in ("undo begun", "withdrawn"):
                states[ids] = "", "done"
        undone = {email for email, state in states.values() if state == "undone"} - named
        known = {ids for ids, (_, state) in states.items() if state in (*UNFINISHED, *ENDED)}
        left_out = undone & {one.primary.key for ids, one in plan.items() if ids not in known}
        left_out |= {one.primary.key for ids, one in plan.items() if states.get(ids, ("", ""))[1] == "undone"}
        return {ids: one for ids, one in plan.items() if one.primary.key not in left_out}

    def unread(self, path: Path) -> Dict[Ids, str]:
        """The last events of the journal behind what the savepoint knows of it."""
        journal, known = Path("backups/journal.jsonl"), 0
        if path.exists() and path.stat().st_size:
            with contextlib.closing(sqlite3.connect(str(path))) as db, contextlib.suppress(sqlite3.Error):
                known = int(db.execute("SELECT value FROM about WHERE name = 'journal'").fetchone()[0])
        data = journal.read_bytes() if journal.exists() else b""
        found = {}
        for raw in data[known if known <= len(data) else 0 :].splitlines():
            with contextlib.suppress(ValueError, KeyError):
                line = json.loads(raw)
                found[line["primary"]["id"], line["duplicate"]["id"]] = line["event"]
        return found

    def rows_now(self) -> Dict[Ids, Dict[str, Any]]:
        """The savepoint's rows while a run holds it."""
        db = self.process.connection if self.process else None
        return read_rows(lambda statement: sqlite3.Connection.execute(db, statement)) if db is not None else {}

    def asked(self, sent: Sent) -> None:
        """A request leaves."""
        if self.stopped:
            raise InvariantBroken("no request after a stop", f"{sent.endpoint} leaves")
        self._judge_ceiling()
        self.undo.asked(sent)
        if self.undo.active:
            return
        if sent.endpoint == "rev-users.merge":
            self._judge_merge((sent.body["primary_user"], sent.body["secondary_user"]), sent)
        elif sent.endpoint == "rev-users.update":
            self._judge_update(sent)

    def answered(self, sent: Sent, answer: Any) -> None:
        """The run hears of a request."""
        self._note_shown(sent, answer)
        if answer.status == 401 and answer.data is not None:
            self.stopped = True
        if sent.endpoint == "rev-users.merge":
            self.flying -= 1
            self.acknowledged |= bool(answer.status and answer.status < 300 and answer.data is not None)
            asks = self.asks[sent.body["primary_user"], sent.body["secondary_user"]]
            if answer.status == 429 or not answer.sent:
                asks.pop()  # it can't have been acted on
                return
            ask = asks[-1]
            ask.ended = self.clock.now
            if answer.status is not None and answer.status < 300 and answer.data is not None:
                ask.answer = "acknowledged"
            elif answer.data is not None and answer.status is not None and 300 <= answer.status < 500:
                ask.answer = "lost" if answer.status == 408 else "refused"
        elif sent.endpoint == "rev-users.get" and answer.status == 200 and answer.data:
            user = answer.data.get("rev_user")
            there = isinstance(user, dict) and user.get("id") == sent.body["id"] and user.get("state") != "deleted"
            if there and not user.get("primary_identity"):
                for (_, duplicate), asks in self.asks.items():
                    if duplicate == sent.body["id"] and asks:
                        asks[-1].looked = self.run

    def _note_shown(self, sent: Sent, answer: Any) -> None:
        if answer.status != 200 or not answer.data or "cursor" in sent.body:
            return
        if sent.endpoint in ("rev-users.list", "rev-users.get"):
            users = answer.data.get("rev_users") or [answer.data.get("rev_user")]
            for user in users if isinstance(users, list) else ():
                if isinstance(user, dict) and "id" in user:
                    self.shown[user["id"]] = max(sent.at, self.shown.get(user["id"], sent.at))
        for role in (*ROLES.values(), "members"):
            for person in sent.body.get(role, ()) if sent.endpoint.endswith("s.list") else ():
                self.listed[role, person] = max(sent.at, self.listed.get((role, person), sent.at))

    def _judge_ceiling(self) -> None:
        """What fits into two windows may leave in any time that is as long as one."""
        calls, period = self.ceiling
        now = self.clock.steady
        self.sent_at = [at for at in self.sent_at if now - at < period - JITTER] + [now]
        if calls and len(self.sent_at) > 2 * calls:
            raise InvariantBroken(
                "the tool's own ceiling holds", f"{len(self.sent_at)} requests in {period:g} s, of {calls}"
            )

    def wrote(self) -> None:
        """The savepoint was written."""

    # ----- a merge request -------------------------------------------------------------------------

    def _judge_merge(self, ids: Ids, sent: Sent) -> None:
        earlier = self.asks[ids]
        if not earlier and ids not in self.intended:
            self._judge_plan(ids)
        self._judge_turn(ids)
        self._judge_freshness(ids)
        self._judge_check(ids)
        self.undo.judge_merge(ids)
        backup = self._judge_intent(ids)
        self._judge_backup(ids, Path(backup))
        if earlier:
            self._judge_patience(ids, earlier[-1], backup)
        self._judge_room(ids)
        earlier.append(Ask(self.run, sent, self.clock.wall, backup))

    def _judge_plan(self, ids: Ids) -> None:
        invariant = "nobody is merged who is not in the plan"
        if ids not in self.allowed:
            raise InvariantBroken(invariant, f"{name(ids)} is not in the plan of this run")
        self.begun.add(ids)
        if self.options.limit and len(self.begun) > self.options.limit:
            raise InvariantBroken(
                invariant, f"--limit {self.options.limit}, and {len(self.begun)} new pairs are asked for"
            )

    def _judge_turn(self, ids: Ids) -> None:
        """The first merge of a run goes alone, and the pairs of a group one after the other."""
        if self.flying and not self.acknowledged:
            raise InvariantBroken("the first merge of a run goes alone until DevRev has acknowledged it", name(ids))
        self.flying += 1
        for other, asks in self.asks.items():
            pending = other != ids and other[0] == ids[0] and bool(asks) and asks[-1].run == self.run
            there = all(self.organisation.alive(one) for one in other) and not self.lies
            if pending and there and asks[-1].answer != "refused":
                raise InvariantBroken(
                    "the pairs of a group go one after the other", f"{name(ids)} before {name(other)} is merged"
                )

    def _judge_freshness(self, ids: Ids) -> None:
        """What the run has heard is fresh, whether anything has changed or not."""
        now, never = self.clock.now + JITTER, -1e9
        for contact in ids:
            if now - self.shown.get(contact, never) > FRESH + 2 * JITTER:
                what = f"{short(contact)} was shown {now - self.shown.get(contact, never):.0f} s ago"
                raise InvariantBroken("nobody is merged whose check was not fresh", what)
            for role in (*ROLES.values(), "members"):
                if now - self.listed.get((role, contact), never) > LISTED + 2 * JITTER:
                    what = f"{role} of {short(contact)} was listed {now - self.listed.get((role, contact), never):.0f} s ago"
                    raise InvariantBroken(
                        "nothing is asked for without a whole backup, its lists at most two minutes old", what
                    )

    def _judge_check(self, ids: Ids) -> None:
        """Some moment of the last minute has to have shown each contact as the export has it."""
        since = self.clock.now - FRESH - self.lag - JITTER
        seen: List[List[Thing]] = []
        wanted = self.known[ids]
        moved = {w.new_ref for pairs in self.known.values() for w in pairs if w.primary.id == ids[0] and w.new_ref}
        for contact, rows, more in (
            (ids[0], [one.primary for one in wanted], moved),
            (ids[1], [one.duplicate for one in wanted], set()),
        ):
            refs = {row.ref for row in rows} | more
            emails = {row.key for row in rows}
            good = [
                one
                for one in versions(self.organisation.contacts, contact, since)
                if one and one["state"] == "active" and one.get("external_ref") in refs
                if str(one.get("email") or "").strip().casefold() in emails
            ]
            if not good:
                now = self.organisation.contacts.get(contact) or {}
                shown = ", ".join(f"{field} {now.get(field)}" for field in ("state", "email", "external_ref"))
                what = f"{short(contact)} has been another for over {FRESH:g} s: {shown}"
                raise InvariantBroken("nobody is merged whose check was not fresh", what)
            seen.append(good)
        if not {one["rev_org"]["id"] for one in seen[0]} & {one["rev_org"]["id"] for one in seen[1]}:
            raise InvariantBroken(
                "nobody is merged whose check was not fresh", f"{name(ids)} are of different rev orgs"
            )

    def _judge_intent(self, ids: Ids) -> str:
        """The journal and the savepoint know of it, on the disk; returns the backup that they name."""
        invariant = "the intent is durable before the request leaves"
        self.read_journal()
        event, backup = self.journal[ids][-1] if self.journal[ids] else ("nothing", "")
        if event != "asked":
            raise InvariantBroken(invariant, f"the journal's last word of {name(ids)} is {event}")
        db = self.process.connection if self.process else None
        assert db is not None
        if db.in_transaction:
            raise InvariantBroken(invariant, "the savepoint's transaction is still open")
        row = sqlite3.Connection.execute(
            db, "SELECT state, backup, requested_at FROM pairs WHERE primary_id = ? AND duplicate_id = ?", ids
        ).fetchone()
        late = row is not None and abs(row[2] - self.clock.wall) > 5 and not (self.clock.set_by or self.clock.slept)
        if row is None or row[0] != "requested" or late:
            raise InvariantBroken(invariant, f"the savepoint says {row} of {name(ids)}")
        if row[1] != backup:
            raise InvariantBroken(invariant, f"the journal names the backup {backup}, the savepoint {row[1]}")
        return backup

    def _judge_backup(self, ids: Ids, folder: Path) -> None:
        invariant = "nothing is asked for without a whole backup, its lists at most two minutes old"
        try:
            manifest, contents = read_backup(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvariantBroken(invariant, f"{folder}: {type(error).__name__} {error}") from None
        entries = {entry["csv"]["id"]: entry for entry in manifest["contacts"]}
        since = self.clock.now - LISTED - self.lag - JITTER
        for contact in ids:
            if contact not in entries:
                raise InvariantBroken(invariant, f"{folder} does not hold {short(contact)}")
            entry, files = entries[contact], contents[entries[contact]["folder"]]
            if files["contact.json"]["id"] != contact:
                raise InvariantBroken(invariant, f"{folder}: contact.json is not {short(contact)}'s")
            works = {work["id"]: work for work in files["works.json"]}
            lists = [(role, self.organisation.works, entry["works"][key], works) for key, role in ROLES.items()]
            talks = {talk["id"]: talk for talk in files["conversations.json"]}
            lists.append(("members", self.organisation.conversations, entry["conversations"], talks))
            for role, table, listed, there in lists:
                self._judge_list(f"{folder}: {role} of {short(contact)}", table, role, contact, listed, there, since)
            if not self.options.no_timelines:
                self._judge_timelines(folder, {**works, **talks}, files["timelines.json"])
            self._judge_count(ids, contact, max(len(entry["works"][key]) for key in ROLES))

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
        invariant = "nothing is asked for without a whole backup, its lists at most two minutes old"
        always, ever = holdings(table, role, contact, since)
        if not set(listed) <= set(there):
            raise InvariantBroken(invariant, f"{what}: not all that is listed is there")
        if self.lies:
            return
        if not always <= set(listed):
            raise InvariantBroken(invariant, f"{what} lacks {', '.join(map(short, sorted(always - set(listed))))}")
        if not set(listed) <= ever:
            gone = ", ".join(map(short, sorted(set(listed) - ever)))
            raise InvariantBroken(invariant, f"{what} names {gone}, which has not been so for {LISTED:g} s")

    def _judge_timelines(self, folder: Path, things: Mapping[str, Thing], timelines: Mapping[str, Any]) -> None:
        for object_id, thing in things.items():
            now = self.organisation.works.get(object_id) or self.organisation.conversations.get(object_id)
            if self.lies or now is None or now["modified_date"] != thing["modified_date"]:
                continue
            truth = [entry["id"] for entry in self.organisation.timelines.get(object_id, ())]
            saved = [entry["id"] for entry in timelines.get(object_id, ())]
            if object_id not in timelines or saved != truth[: len(saved)] or len(saved) < self._comments(object_id):
                what = f"{folder}: of {len(truth)} comments on {short(object_id)} it holds {len(saved)}"
                raise InvariantBroken("nothing is asked for without a whole backup", what)

    def _comments(self, object_id: str) -> int:
        """How many comments were there before anybody edited anything."""
        return sum(
            not entry.get("body", "").startswith("later") for entry in self.organisation.timelines.get(object_id, ())
        )

    def _judge_count(self, ids: Ids, contact: str, count: int) -> None:
        rows = [row for one in self.known[ids] for row in (one.primary, one.duplicate) if row.id == contact]
        grown = contact == ids[0] and any(pair[0] == ids[0] and asks for pair, asks in self.asks.items())
        at_least = grown or self.options.count_policy == "at-least"
        if not any(row.tickets == count or (at_least and count > row.tickets) for row in rows):
            counts = sorted({row.tickets for row in rows})
            what = f"the backup of {short(contact)} counts {count} tickets, the export {counts}"
            raise InvariantBroken("a count that does not match refuses the group", what)

    def _judge_patience(self, ids: Ids, last: Ask, backup: str) -> None:
        invariant = "nobody is asked for again without a look of the same run and the contract's patience"
        if last.looked != self.run:
            raise InvariantBroken(
                invariant, f"{name(ids)}: no look of this run has shown it unmerged since it was asked for"
            )
        waited = self.clock.now - last.ended
        if last.run != self.run:
            now, wall = self.began  # by the wall clock until then, for no other goes on between runs
            waited = max(self.clock.now - last.at, self.clock.wall - last.wall, wall - last.wall + self.clock.now - now)
        patience = last.patience(self.run, self.options.merge_timeout)
        if waited < patience - JITTER:
            raise InvariantBroken(
                invariant, f"{name(ids)}: asked again {waited:.2f} s after it, patience is {patience:g} s"
            )
        if backup == last.backup:
            raise InvariantBroken(invariant, f"{name(ids)}: asked again on the backup of the last time")

    def _judge_room(self, ids: Ids) -> None:
        """The window has room for the merge, and for what finishes it; what others spend can't be known."""
        quota, process = self.fake_devrev.quota, self.process
        if quota is None or process is None or quota.others or self.others_spent or process.units_unseen:
            return
        needed = 2 + any(one.new_ref for one in self.known[ids])
        now, reset = quota._turn()
        left = quota.limit - quota._used - process.travelling
        if reset - now > 3 and quota._used and left < min(needed, quota.limit):
            raise InvariantBroken(
                "a merge request leaves only when the quota has room for the requests that finish the pair",
                f"{left} of {quota.limit} units left at the request for {name(ids)}",
            )

    def _judge_update(self, sent: Sent) -> None:
        reference = sent.body["external_ref"]
        mine = [ids for ids, all_wanted in self.known.items() for one in all_wanted if one.new_ref == reference]
        # What was intended by a run that was killed before it sent the request counts as asked for.
        mine = [ids for ids in mine if ids[0] == sent.body["id"] and (self.asks[ids] or ids in self.intended)]
        if not mine:
            raise InvariantBroken(
                "only references of merged duplicates are moved", f"{reference} to {short(sent.body['id'])}"
            )
        if not self.lies and all(self.organisation.alive(duplicate) for _, duplicate in mine):
            raise InvariantBroken(
                "a reference is moved after the merge", f"{reference}, and {short(mine[0][1])} is still there"
            )
        for ids in mine:
            self._judge_gap(ids)

    def _judge_gap(self, ids: Ids) -> None:
        """Where nothing is disturbed, the reference is moved at the next look, and that comes soon."""
        merged, asks, slowest = self.organisation.merge_times.get(ids[1]), self.asks[ids], self.slowest()
        if slowest is None or merged is None or len(asks) != 1 or asks[0].run != self.run or ids in self.moving:
            return
        self.moving.add(ids)
        gap, most = self.clock.now - merged, 1.0 + 0.1 * self.fake_devrev.merge_delay + 6 * slowest
        if gap > most:
            what = f"{gap:.1f} s from the merge of {name(ids)} to its reference"
            raise InvariantBroken("between DevRev's merge and the new reference nothing waits", what)

    # ----- journal, savepoint, reports -------------------------------------------------------------

    def read_journal(self) -> None:
        """Take in the journal's new lines."""
        path = Path("backups/journal.jsonl")
        if not path.exists() or path.stat().st_size < self._journal_read:
            self.journal.clear()
            self._journal_read = 0
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self._journal_read)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._journal_read += len(raw)
                with contextlib.suppress(ValueError, KeyError):
                    line = json.loads(raw)
                    ids = line["primary"]["id"], line["duplicate"]["id"]
                    self.journal[ids].append((line["event"], line["backup"]))

    def after_run(self, report: Optional[Path], code: Optional[int]) -> Dict[Ids, Dict[str, Any]]:
        """Judge what a run has left on the disk; `report` is the one it has to have written, None for one that was
        killed. Returns the savepoint's rows."""
        self.read_journal()
        rows = read_savepoint(Path("savepoint.db"))
        self.intended.update(ids for ids, events in self.journal.items() if events and events[-1][0] != "withdrawn")
        self.intended.update(ids for ids, row in rows.items() if row["state"] in UNFINISHED)
        self._judge_savepoint(rows, report is not None)
        self.undo.after_run(rows, report, code)
        if not self.undo.active:
            self._judge_reports(rows, report, code)
        for ids, asks in self.asks.items():
            row = rows.get(ids)
            if asks and asks[-1].answer != "lost" and not (row and (row["refused"] or row["state"] != "requested")):
                asks[-1].answer = "lost"  # the run was killed before it could note the answer
        return rows

    def _judge_savepoint(self, rows: Mapping[Ids, Mapping[str, Any]], ended: bool) -> None:
        for ids, asks in self.asks.items():
            if not asks:
                continue
            state = rows[ids]["state"] if ids in rows else "nothing"
            half = state == "undoing" and (self.disk_was_full or self.undo.events(ids)[-1:] == ["undone"])
            if state == "undone" or ids in self.undo.open() or half:
                continue
            unread = not ended and ids in self.unread(Path("savepoint.db"))  # it was killed before it knew the journal
            if (rows or ended) and state not in (*ENDED, *UNFINISHED) and not unread:
                raise InvariantBroken("once asked, never forgotten", f"the savepoint says {state} of {name(ids)}")
            if ids not in self.journal_lost and not self.journal[ids]:
                raise InvariantBroken("once asked, never forgotten", f"the journal says nothing of {name(ids)}")
        for ids, row in rows.items():
            state, events = row["state"], [event for event, _ in self.journal[ids]]
            event = {"done": "done", "merged_elsewhere": "merged elsewhere"}.get(state)
            if event and ids not in self.journal_lost and event not in events:
                raise InvariantBroken(
                    "the journal knows what has ended", f"{name(ids)} is {state}, the journal says {events}"
                )
            known = ids in self.journal_lost or self.disk_was_full
            if state in ("merged", "proving") and not known and "merged" not in events:
                raise InvariantBroken(
                    "the journal knows what was merged", f"{name(ids)} is {state}, the journal says {events}"
                )
            if state == "merged_elsewhere":
                self._judge_elsewhere(ids)
            if state == "done":
                self._judge_done(ids, row["new_ref"], row["backup"])
            elif state in ("merged", "proving") and not self.lies and self.organisation.alive(ids[1]):
                raise InvariantBroken(
                    "savepoint and reports say what is true", f"{name(ids)} is {state}, and is not merged"
                )

    def _judge_elsewhere(self, ids: Ids) -> None:
        if self.lies or ids in self.judged:
            return
        self.judged.add(ids)
        invariant = "merged_elsewhere is said only of what somebody else has merged or deleted"
        had_gone = (
            self.organisation.merge_times.get(ids[0], self.clock.now) < self.asks[ids][0].at
            if self.asks[ids]
            else False
        )
        if self.organisation.alive(ids[1]) or had_gone or len(self.asks[ids]) > 1:
            raise InvariantBroken(invariant, f"{name(ids)} is there, or was asked for more than once")

    def _judge_proof(self, ids: Ids, backup: Optional[str]) -> None:
        """All that was backed up has hung on the primary some time since the merge, but for what is deleted."""
        folder = Path(backup or "nowhere")
        if self.lies or ids in self.judged or not folder.exists() or not self.into(ids):
            return
        self.judged.add(ids)
        manifest, since = json.loads((folder / "manifest.json").read_bytes()), self.organisation.merge_times[ids[1]]
        for entry in (one for one in manifest["contacts"] if one["csv"]["id"] == ids[1]):
            items = [(work, ROLES[role]) for role in ("owned", "reported") for work in entry["works"][role]]
            for one, role in [*items, *((talk, "members") for talk in entry["conversations"])]:
                table = self.organisation.conversations if role == "members" else self.organisation.works
                was = versions(table, one, since - self.lag - LISTED)
                if table.get(one) is not None and not any(held(thing, role, ids[0]) for thing in was):
                    what = f"{role} of {short(one)}, {name(ids)}"
                    raise InvariantBroken("a pair is done only where all that was backed up hangs on the primary", what)

    def _judge_done(self, ids: Ids, reference: Optional[str], backup: Optional[str]) -> None:
        invariant = "savepoint and reports say what is true"
        if not self.into(ids) and not self._is_as_if_merged(ids, backup):
            raise InvariantBroken(invariant, f"{name(ids)} is done, and was not merged")
        holders = {ids[0], self.organisation.survivor(ids[0])}  # the primary may have been merged onward
        if reference and not any(
            reference == ref for one in holders for _, ref in self.organisation.reference_times[one]
        ):
            raise InvariantBroken(invariant, f"{name(ids)} is done, and the primary never got {reference}")
        self._judge_proof(ids, backup)

    def _is_as_if_merged(self, ids: Ids, backup: Optional[str]) -> bool:
        """Whether somebody has deleted the duplicate, or merged it elsewhere, and nobody can see the difference: all
        that it had is on the primary, or it had nothing."""
        if self.organisation.alive(ids[1]):
            return False
        try:
            manifest = json.loads((Path(backup or "") / "manifest.json").read_bytes())
        except OSError:
            return True
        (entry,) = (one for one in manifest["contacts"] if one["csv"]["id"] == ids[1])
        items = [(work, ROLES[role]) for role in ("owned", "reported") for work in entry["works"][role]]
        items += [(talk, "members") for talk in entry["conversations"]]
        return all(self._is_on({"id": one, "role": role}, ids[0]) for one, role in items)

    def into(self, ids: Ids) -> bool:
        """Whether the duplicate was merged into the primary."""
        one: Optional[str] = ids[1]
        while one is not None and one != ids[0]:
            one = self.organisation.merged_into.get(one)
        return one is not None

    def _judge_reports(self, rows: Mapping[Ids, Mapping[str, Any]], mine: Optional[Path], code: Optional[int]) -> None:
        invariant = "each ended pair in exactly one report"
        there = {path.name: path for path in sorted(Path("reports").glob("merge_report_*.json"))}
        new = {file: path for file, path in there.items() if file not in self.reports}
        for file, path in new.items():
            try:
                self.reports[file] = json.loads(path.read_bytes())
            except ValueError as error:
                raise InvariantBroken("a report is written atomically", f"{file}: {error}") from None
            self._judge_report(file, self.reports[file])
        where: DefaultDict[Ids, List[str]] = defaultdict(list)
        for file, report in self.reports.items():
            for entry in ended_entries(report):
                where[ids_of(entry)].append(file)
        for ids, files in where.items():
            if len(files) > 1:
                raise InvariantBroken(invariant, f"{name(ids)} is in {', '.join(files)}")
        if mine is None:
            return
        if mine.name not in there:
            raise InvariantBroken("the report is written, also when the run stops early", f"{mine.name} is not there")
        for ids, row in rows.items():
            if row["state"] in ENDED and ids not in self.forgotten and not where[ids]:
                raise InvariantBroken(invariant, f"{name(ids)} is {row['state']} and in none")
        report, self.last_report, self.last_code = self.reports[mine.name], mine.name, code
        unfinished = {ids_of(entry) for entry in report["unfinished_merges"]}
        for ids, row in rows.items():
            if row["state"] in UNFINISHED and ids not in unfinished:
                raise InvariantBroken(
                    "savepoint and reports say what is true", f"{name(ids)} is unfinished, and not reported"
                )
        failed = len(report["failed_merges"]) + len(report["unfinished_merges"])
        if (code == 0) != (failed == 0) and code in (0, 1):
            raise InvariantBroken("the exit code says how it went", f"{code}, and {failed} failed or unfinished")

    def _judge_report(self, file: str, report: Mapping[str, Any]) -> None:
        invariant = "savepoint and reports say what is true"
        stopped = str(report["run"].get("stopped"))
        if "(a bug" in stopped:
            raise InvariantBroken("no run ends with a bug", stopped)
        summary = report["summary"]
        parts = [summary[one] for one in ("already_merged", "successful_merges", "failed_merges", "unfinished_merges")]
        if summary["pairs_planned"] != sum(parts) + summary["left"] or summary["left"] < 0:
            raise InvariantBroken("the sums of a report", f"{file}: {summary}")
        dropped = sum(one["code"] == "different_rev_org" for one in report["skipped"])
        if summary["pairs_planned"] + dropped != len(self.plan):
            raise InvariantBroken(
                "the sums of a report", f"{file}: {len(self.plan)} pairs are planned, it says {summary}"
            )
        for entry in report["successful_merges"]:
            if entry["state"] == "done":
                self._judge_done(ids_of(entry), entry["new_external_ref"], entry["backup"])
        for entry in report["failed_merges"]:
            refused = entry["code"] == "undo_unfinished" and (self.disk_was_full or ids_of(entry) in self.undo.open())
            if entry["state"] != "merged_elsewhere" and self.asks[ids_of(entry)] and not refused:
                raise InvariantBroken(invariant, f"{file}: {name(ids_of(entry))} is called failed, and was asked for")

    def standing(self, rows: Mapping[Ids, Mapping[str, Any]]) -> str:
        """How things stand after a run, in so many words: where two runs leave the same, and neither has asked for
        anything, a third one does nothing new."""
        report = self.reports.get(self.last_report, {})
        parts = [report.get(one) for one in ("failed_merges", "unfinished_merges")]
        resting = [[ids_of(one), one["state"], one["code"]] for entries in parts for one in entries or ()]
        asks = sum(map(len, self.asks.values()))
        contacts = [[one["id"], one["state"], one["external_ref"]] for one in self.organisation.contacts.values()]
        states = sorted((ids, row["state"]) for ids, row in rows.items())
        return json.dumps([self.last_code, sorted(resting), asks, len(self.organisation.merges), contacts, states])

    def lose_savepoint(self) -> None:
        Path("savepoint.db").unlink()
        for asks in self.asks.values():
            if asks:
                asks[-1].answer = "lost"  # for all that the tool can know

    def lose_backups(self) -> None:
        shutil.rmtree("backups")
        self.journal.clear()
        self._journal_read = 0
        self.journal_lost.update(ids for ids, asks in self.asks.items() if asks)
        self.backups_lost = True

    def lose_reports(self) -> None:
        for path in Path("reports").glob("merge_report_*"):
            path.unlink()
        for report in self.reports.values():
            self.forgotten.update(ids_of(entry) for entry in ended_entries(report))
        self.reports.clear()

    # ----- a life ends -----------------------------------------------------------------------------

    def after_life(self, rows: Mapping[Ids, Mapping[str, Any]], stuck: Set[str]) -> None:
        """Everything was left in peace for long enough: each pair is at its end, or there is a true reason."""
        named: Set[str] = set()
        for report in self.reports.values():
            for entry in (*report["failed_merges"], *report["unfinished_merges"]):
                named.add(str(entry["new_external_ref"]))
        last = self.reports[self.last_report]
        resting = {ids_of(entry): entry for entry in (*last["failed_merges"], *last["unfinished_merges"])}
        dropped = {
            tuple(one["id"] for one in skip["contacts"][1::-1]) for skip in last["skipped"] if skip["code"] in DROPPED
        }
        for ids in {*self.plan, *(ids for ids, asks in self.asks.items() if asks)} - dropped:
            if ids in rows and rows[ids]["state"] in (*ENDED, "undoing", "undone"):
                continue
            if "undone" in self.undo.events(ids):
                continue
            if ids not in resting and self._is_too_small() and self.last_code == 3:
                continue
            if ids not in resting:
                raise InvariantBroken(
                    "a life that is left in peace ends with every pair done or refused", f"{name(ids)}: nothing"
                )
            entry = resting[ids]
            if entry["code"] == "undo_unfinished" and self.undo.is_open(rows, self._group_of(ids, None)):
                continue
            if not self._is_true(ids, entry, resting, stuck):
                what = f"{name(ids)} is {entry['state']}, {entry['code']}: {entry['error']}"
                raise InvariantBroken("every pair is done, or refused for a reason that is true", what)
        self.undo.after_life(rows)
        for ids, asks in self.asks.items():
            reference = rows[ids]["new_ref"] if ids in rows else None
            if ids in rows and rows[ids]["state"] == "undone":
                continue  # it was given back, and is others' to take since
            if asks and reference and self.into(ids):
                had = any(ref == reference for _, ref in self.organisation.reference_times[ids[0]])
                org = self.organisation.contacts[ids[1]]["rev_org"]["id"]
                holder = self.organisation.holder(org, reference)
                if not had and reference not in named and not (holder and self.organisation.alive(holder)):
                    raise InvariantBroken(
                        "no reference is left on nobody that no report names", f"{reference} of {name(ids)}"
                    )

    def _is_true(self, ids: Ids, entry: Mapping[str, Any], resting: Mapping[Ids, Any], stuck: Set[str]) -> bool:
        """Whether the reason that the last report gives for a pair is so in the world."""
        organisation, code = self.organisation, entry["code"]
        pair = [organisation.contacts.get(one) if organisation.alive(one) else None for one in ids]
        primary, duplicate = pair
        group = self._group_of(ids, primary)
        everybody = [organisation.contacts.get(one) if organisation.alive(one) else None for one in group]
        reference = entry["new_external_ref"]
        if code == "plan_changed":
            return ids not in self.plan and any(not {*ids}.isdisjoint(other) for other in self.plan)
        if code == "not_found":
            return None in everybody
        if code == "not_active":
            return any(one is None or one["state"] != "active" for one in everybody)
        if code in ("email_changed", "external_ref_changed", "count_mismatch"):
            # A fresh export has the row as it is, but for what is no longer exported as a pair.
            return ids not in self.plan or (primary is not None and primary["external_ref"] not in (reference, None))
        if code == "different_rev_org":
            return len({one["rev_org"]["id"] for one in everybody if one}) > 1
        if code in ("several_user_refs", "shared_mailbox"):
            return True
        if code == "external_ref_conflict":
            return reference in stuck or not self._can_be_freed(ids, reference, primary, resting)
        if code == "left_behind":
            return any(not self._is_on(item, ids[0]) for item in entry["left_behind"])
        if code == "merged_into_another":
            return organisation.survivor(ids[1]) != ids[0]
        if code == "backup_failed":
            return self.backups_lost
        if code == "stale":
            return self._is_too_small()
        if code == "group_incomplete":
            return any(set(other) & group for other in resting if other != ids)
        return code == "merge_not_confirmed" and duplicate is not None and self.lies

    def _is_too_small(self) -> bool:
        """Whether the quota lets too little through for lists to be fresh at their merge."""
        quota = self.fake_devrev.quota
        pages = 0
        for contact in {one for pair in (*self.plan, *self.asks) for one in pair}:
            pages += len(self.organisation.works.find([("anyone", [contact])])) // 100
        apart = 40 if self.fake_devrev.max_ids else 0  # where a list has to be asked for contact by contact
        return quota is not None and quota.limit * LISTED / quota.window < 20 + 8 * pages + apart

    def _group_of(self, ids: Ids, primary: Optional[Thing]) -> Set[str]:
        return {one for pair in (*self.plan, *self.asks) if pair[0] == ids[0] for one in pair} | set(ids)

    def _can_be_freed(self, ids: Ids, reference: str, primary: Optional[Thing], resting: Mapping[Ids, Any]) -> bool:
        """Whether exporting and running again would have given the reference to the primary; not where its holder
        can't be merged, for a reason of its own."""
        if primary is None or primary["state"] != "active":
            return False
        holder = self.organisation.holder(primary["rev_org"]["id"], reference)
        pairs = {(holder or "", ids[0]), (ids[0], holder or "")}
        return holder is None or any(pair in self.plan and pair not in resting for pair in pairs)

    def _is_on(self, item: Mapping[str, Any], primary: str) -> bool:
        thing = self.organisation.works.get(item["id"]) or self.organisation.conversations.get(item["id"])
        return thing is None or held(thing, item["role"], primary)


def read_backup(folder: Path) -> Tuple[Any, Dict[str, Dict[str, Any]]]:
    """A backup's manifest and files by folder and name. ValueError where it is not what was written."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    contents: DefaultDict[str, Dict[str, Any]] = defaultdict(dict)
    for file, expected in manifest["files"].items():
        data = (folder / file).read_bytes()
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise ValueError(f"{file} is not what was written")
        home, _, title = file.rpartition("/")
        contents[home][title] = json.loads(data)
    return manifest, contents


def read_savepoint(path: Path) -> Dict[Ids, Dict[str, Any]]:
    """The savepoint's rows by their ids; none where there is no savepoint."""
    if not path.exists() or not path.stat().st_size:
        return {}
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        try:
            return read_rows(db.execute)
        except sqlite3.Error:
            if db.execute("PRAGMA user_version").fetchone()[0]:
                raise
            return {}  # killed while it was being made


def read_rows(execute: Callable[[str], Any]) -> Dict[Ids, Dict[str, Any]]:
    names = ("primary_id", "duplicate_id", "state", "code", "refused", "new_ref", "backup", "email", "details")
    found = execute(f"SELECT {', '.join(names)} FROM pairs").fetchall()
    return {(row[0], row[1]): dict(zip(names, row)) for row in found}


def ended_entries(report: Mapping[str, Any]) -> Iterator[Any]:
    yield from report["successful_merges"]
    yield from (entry for entry in report["failed_merges"] if entry["state"] == "merged_elsewhere")


def ids_of(entry: Mapping[str, Any]) -> Ids:
    return entry["primary"]["id"], entry["duplicate"]["id"]


def name(ids: Ids) -> str:
    return f"{short(ids[0])} <- {short(ids[1])}"
