"""The invariants of merge_contacts.py, held against what is true in tests.fake.organisation.

Nothing here uses the module: its plan, its backups, its savepoint and its reports are judged by a
second opinion (tests.simulation.expected). The invariants of undos and of reports, and the reasons
that a pair may have in the end, are in files of their own.

A new invariant is `broken("what always holds", "what broke it")`, called at the first moment at
which it can be judged: `asked` (a request leaves: `self.latest` is what the savepoint says of each
pair, `self.asks` what was requested), `answered`, `wrote` (a commit), `after_run`, `after_life`.
The truth is `self.organisation`; `expected.versions` has what an object was a while ago. Where
`self.lies`, answers were false; `forget` says what the tool can't know any more.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sqlite3
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Sequence

from tests.fake.organisation import Thing, org_id_of, own_reference
from tests.fake.world import World
from tests.simulation import expected
from tests.simulation.expected import COPY, ENDED, MAIN, UNFINISHED, Document, Ids, Rows, pairs_in
from tests.simulation.reasons import LISTED, ReasonChecker
from tests.simulation.report_invariants import TRUE, ReportChecker
from tests.simulation.undo_invariants import LOST, WRITES, UndoChecker
from tests.simulation.world import Clock, Sent, SimulatedProcess, broken, name_of, short, stored_row

FRESH = 60.0  # seconds for which a check may be relied on
GRACE = 10.0  # seconds in which an interrupted run may finish what is under way
AT_ONCE = 1.0  # seconds from an answer until what rests on it leaves
JITTER = 0.01  # seconds by which a comparison of two clocks may be off
FRESHNESS = "no contact is merged whose check is not fresh"
BACKED_UP = "nothing is requested without a complete backup, its lists at most two minutes old"


class Ask:
    """One merge request."""

    def __init__(self, run: int, sent: Sent, wall: float, backup: str) -> None:
        self.run = run
        self.at = self.ended = sent.at
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
        self.fake_devrev, self.clock = fake_devrev, clock
        self.organisation = fake_devrev.organisation
        self.run = 0
        self.plan: expected.Plan = {}
        self.known: defaultdict[Ids, list[expected.Wanted]] = defaultdict(list)
        self.asks: defaultdict[Ids, list[Ask]] = defaultdict(list)
        self.ever_intended: set[Ids] = set()
        self.committed: dict[str, Rows] = {MAIN.name: {}, COPY.name: {}}
        self.latest: Rows = {}  # the last row of each pair that was written
        self.backups: defaultdict[Ids, list[str]] = defaultdict(list)  # of each request
        self.cancelled: set[Ids] = set()  # pairs that were cancelled at any time
        self.moving: set[Ids] = set()  # pairs whose reference was sent at least once
        self.forbidden: set[Ids] = set()  # pairs of which a merge request was answered with 403
        self.judged: set[Ids] = set()  # pairs whose end was held against the truth
        self.lies = False  # whether answers were false: what was believed then may be wrong
        self.backups_lost = False
        # Seconds there or back, where nothing disturbs a run:
        self.slowest: Callable[[], float | None] = lambda: None
        self.lag = 0.0  # the longest that lists have lagged
        self.others_spent = 0
        self.shown: dict[str, float] = {}  # when the last request left that has shown a contact
        self.read: dict[str, tuple[float, float]] = {}  # the last read: when sent, when heard of
        self.listed: dict[tuple[str, str], float] = {}  # the same of what a person has in a role
        self.first_pages: dict[str, float] = {}  # when the first page of a list was requested
        self.undo = UndoChecker(self)
        self.reports = ReportChecker(self)
        self.reasons = ReasonChecker(self)

    # ----- a run begins ---------------------------------------------------------------------------

    def begin(
        self, process: SimulatedProcess, tool: Any, rows: Sequence[Any], choices: Any
    ) -> None:
        """`tool` is the module's RunContext; `rows` and `choices` are what it will read."""
        self.run += 1
        self.process, self.tool, self.options = process, tool, tool.options
        self.stopped = self.full_now = False  # told to stop; the disk was full
        self.interrupted = math.inf  # by Ctrl-C, at this time
        self.began = self.clock.now, self.clock.wall
        self.sent_at: list[float] = []  # steady seconds, of the last requests
        self.polled: set[str] = set()  # contacts that this run has read
        self.written: set[str] = set()  # the files that this run has written
        self.has_asked = False
        self.first_merge: Ids | None = None  # of this run, of these not forbidden
        self.is_forbidden = False  # its answer was a 403
        self.takes_updates = False  # one was carried out, or refused for a reason of its own
        self.begun: set[Ids] = set()  # in this run, never requested before
        mine = organisation_of(self.organisation.dev_user["id"])
        self.is_foreign = any(organisation_of(row.id) != mine for row in rows)  # the CSV
        files = self._read_files()
        self.before = expected.joined(*files)
        self.latest = dict(self.before)
        self.runs_before = expected.runs_of(*files)
        # Unfinished; the run before may have been killed before a request left.
        self.intended = pairs_in(self.before, UNFINISHED)
        self.tried = pairs_in(self.before, ["failed"])
        self.undo.begin(self.options)
        named = {expected.email_key(email) for email in self.options.email or ()}
        self.rows, self.choices = list(rows), choices
        # The plan, with what was undone or cancelled:
        self.asked_for = expected.plan_of(rows, choices, self.options.primary or "revu")
        self.plan = self._without_stopped(self.asked_for, named)
        self.allowed = {
            ids for ids, wanted in self.plan.items() if not named or wanted.primary.key in named
        }
        for ids, wanted in self.asked_for.items():
            if wanted not in self.known[ids]:
                self.known[ids].append(wanted)

    def _read_files(self) -> Any:
        """Read both files. They hold what was committed to them, however a run has ended."""
        files = expected.read_files()
        for path, file in zip((MAIN, COPY), files):
            found = documents(file.rows) if file else {}
            if found != documents(self.committed[path.name]):
                broken("what was committed is on the disk", f"{path} holds something else")
        return files

    def _without_stopped(self, plan: expected.Plan, named: set[str]) -> expected.Plan:
        """Leave out the groups of which a pair was undone or cancelled, until they are named."""
        if self.is_foreign:  # what the savepoint knows is of another organisation
            return dict(plan)
        groups = expected.groups_of(self.rows)
        stopped = pairs_in(self.before, expected.STOPPING)
        known = pairs_in(self.before, (*UNFINISHED, *ENDED))
        # The export is older than the undo:
        stale = pairs_in(self.before, expected.UNDONE)
        left_out = {one.primary.key for ids, one in plan.items() if ids in stale}
        for email in {one.primary.key for ids, one in plan.items() if ids not in known} - named:
            members = {row.id for row in groups[email]}
            for ids in stopped:
                now = {*map(self.undo.stand_in, ids), *ids}
                has_email = expected.email_key(self.before[ids]["email"]) == email
                if has_email or len(now & members) >= 2:
                    left_out.add(email)
        return {ids: one for ids, one in plan.items() if one.primary.key not in left_out}

    # ----- the savepoint --------------------------------------------------------------------------

    def wrote(self, name: str, rows: Sequence[Document]) -> None:
        self.written.add(name)
        for row in rows:
            ids = row["primary_id"], row["duplicate_id"]
            before = self.latest.get(ids, {}).get("state")
            self.committed[name][ids] = self.latest[ids] = row
            if row["state"] == "requested" and row["backup"] not in self.backups[ids]:
                self.backups[ids].append(row["backup"])
            if row["state"] == "cancelled":
                self.cancelled.add(ids)
            self.undo.wrote(ids, row)
            if row["state"] == "done" and before in UNFINISHED and not self.lies:
                self._judge_last_read(ids, row["new_ref"])

    def _judge_last_read(self, ids: Ids, reference: str | None) -> None:
        """A pair is done only where the last answer about its primary has shown it as it should."""
        shown, asks = self.shown.get(ids[0]), self.asks[ids]
        if shown is None or (asks and shown < asks[-1].at):
            broken(TRUE, f"{name_of(ids)} is done, and no answer has shown the primary since")
        since = (shown or 0.0) - self.lag - self.fake_devrev.reference_lag - JITTER
        been = expected.versions(self.organisation, ids[0], since)
        if reference and not any(one and one.get("external_ref") == reference for one in been):
            broken(TRUE, f"{name_of(ids)} is done, and the primary does not have {reference}")

    def rests_since(self, identity: str) -> float:
        """Return since when others' edits may be lost to a write that leaves now: since the read
        that it rests on was sent, or, where something has waited behind that, since now."""
        now = self.clock.now
        sent, heard = self.read.get(identity, (now, now))
        return sent - JITTER if now - heard <= AT_ONCE else now

    def lately(self, contact: str) -> list[Thing | None]:
        """Return what a contact was since the read on which a write of it rests."""
        return expected.versions(self.organisation, contact, self.rests_since(contact))

    def _judge_join(self) -> None:
        """Before its first request a run knows what both files said, and both know the same."""
        self.has_asked = True
        if not self.written:
            return  # it only reads
        newest = max(self.runs_before, default="")
        # What no file knows at all can be undone from its report.
        if self.runs_before or not self.undo.active:
            for name in self.reports.on_disk():
                if expected.run_of(name) > newest:
                    broken("a savepoint that was put back from an older backup is refused", name)
        for ids, before in self.before.items():
            for name, rows in self.committed.items():
                row = rows.get(ids, {"state": "nothing", "run": ""})
                if row["state"] != before["state"] and row["run"] != self.tool.run_id:
                    invariant = "what the two files say together is what the next run knows"
                    what = f"{name}: {name_of(ids)} is {row['state']}, and was {before['state']}"
                    broken(invariant, what)

    def _judge_files(self, killed: bool) -> Rows:
        """Judge what a run has left in the two files; return what they know together."""
        main, copy = self._read_files()
        rows = expected.joined(main, copy)
        self.latest = dict(rows)
        if main and copy and not self.full_now and self.has_asked and len(self.written) == 2:
            behind = main.last_write - copy.last_write
            if not 0 <= behind <= killed:
                broken("the copy is at most one write behind", f"it is {behind} writes behind")
            for ids, row in rows.items():
                is_late = killed and row["revision"] == main.last_write
                found = {file.rows.get(ids, {}).get("revision") for file in (main, copy)}
                if not is_late and found != {row["revision"]}:
                    broken("each file alone knows everything", name_of(ids))
        return rows

    # ----- requests -------------------------------------------------------------------------------

    def asked(self, sent: Sent) -> None:
        if not self.has_asked:
            self._judge_join()
        if self.stopped and not (self.undo.may_finish(sent) or self._gives_reference(sent)):
            broken("no request after a stop", f"{sent.endpoint} leaves")
        if self.is_foreign and sent.endpoint != "dev-users.self":
            broken("a CSV of another organisation stops everything", f"{sent.endpoint} leaves")
        if self.options.settle and sent.endpoint in WRITES:
            broken("settling changes nothing in DevRev", sent.endpoint)
        self._judge_client_limit()
        self.undo.asked(sent)
        if self.undo.active:
            return
        if sent.endpoint == "rev-users.merge":
            self._judge_merge(ids_of_merge(sent), sent)
        elif sent.endpoint == "rev-users.update":
            self._judge_update(sent)

    def _gives_reference(self, sent: Sent) -> bool:
        """Whether a request of an interrupted run gives a merged pair's primary its reference."""
        # A machine that sleeps meanwhile does not count the time.
        end = self.interrupted + GRACE + JITTER  # it counts from when it has handled the signal
        if not self.interrupted <= sent.at <= end and not self.clock.slept:
            return False
        whose = {"rev-users.update": (0,), "rev-users.get": (0, 1)}.get(sent.endpoint, ())
        for ids, row in self.latest.items():
            if not row["new_ref"]:
                continue
            is_mine = sent.body.get("id") in [ids[one] for one in whose]
            is_mine |= sent.body.get("external_ref") == [row["new_ref"]]
            # The probe comes first where requests have failed in a row.
            if row["state"] == "merged" and (is_mine or sent.endpoint == "dev-users.self"):
                return True
            # What this run has requested may still be carried out: it is polled, or looked up.
            is_awaited = row["state"] in ("requested", "acknowledged")
            if is_awaited and row["run"] == self.tool.run_id and sent.endpoint not in WRITES:
                return True
        return False

    def answered(self, sent: Sent, answer: Any) -> None:
        self._note_shown(sent, answer)
        self.undo.answered(sent)
        if answer.status == 401 and answer.data is not None:
            self.stopped, self.interrupted = True, math.inf
        if sent.endpoint == "rev-users.update":
            # The merge has moved the reference:
            is_moved = "nothing would be changed" in str((answer.data or {}).get("message"))
            self.takes_updates |= answer.status in (200, 409) or is_moved
        elif sent.endpoint == "rev-users.merge":
            self._note_merge(ids_of_merge(sent), answer)
        elif sent.endpoint == "rev-users.get" and answer.status in (200, 404) and answer.data:
            self._note_poll(sent.body["id"], answer.data.get("rev_user"))

    def _note_merge(self, ids: Ids, answer: Any) -> None:
        status, told = answer.status, answer.data is not None
        if status == 429 or not answer.sent:
            self.asks[ids].pop()  # it can't have been acted on
            return
        if status == 403 and told:
            self.is_forbidden |= ids == self.first_merge
            self.forbidden.add(ids)
        ask = self.asks[ids][-1]
        ask.ended = self.clock.now
        if 200 <= (status or 0) < 300:
            ask.answer = "acknowledged"
        elif told and 300 <= (status or 0) < 500:
            ask.answer = "lost" if status == 408 else "refused"
            crowded = any(other != ids for other in self._asked_in_this_run())
            ask.busy = status in (409, 423, 425)
            ask.busy |= crowded and status not in (401, 403, 404, 408)

    def _asked_in_this_run(self) -> dict[Ids, Ask]:
        last = {ids: asks[-1] for ids, asks in self.asks.items() if asks}
        return {ids: ask for ids, ask in last.items() if ask.run == self.run}

    def _note_poll(self, contact: str, user: Any) -> None:
        exists = isinstance(user, dict) and user.get("id") == contact
        exists = exists and user.get("state") == "active" and not user.get("primary_identity")
        if self.first_merge and contact == self.first_merge[1] and not exists:
            self.is_forbidden = False  # it was carried out all the same
        for (_, duplicate), asks in self.asks.items():
            if exists and asks and duplicate == contact:
                asks[-1].polled = self.run

    def _note_shown(self, sent: Sent, answer: Any) -> None:
        if sent.endpoint == "rev-users.get":
            self.polled.add(sent.body["id"])
        if answer.status != 200 or not answer.data:
            return
        if "cursor" in sent.body:  # a list is as old as its first page
            at = self.first_pages.get(list_of(sent), expected.NEVER)
        else:
            at = self.first_pages[list_of(sent)] = sent.at
        shows = sent.endpoint in ("rev-users.list", "rev-users.get")
        for name, value in answer.data.items():
            things = value if isinstance(value, list) else [value]
            for one in things:
                if isinstance(one, dict) and isinstance(one.get("id"), str):
                    self.read[one["id"]] = (sent.at, self.clock.now)
                    if shows and name in ("rev_users", "rev_user"):
                        self.shown[one["id"]] = max(at, self.shown.get(one["id"], at))
        if sent.endpoint.endswith("s.list"):
            for role in expected.ALL_ROLES:
                for person in sent.body.get(role, ()):
                    self.listed[role, person] = max(at, self.listed.get((role, person), at))

    def _judge_client_limit(self) -> None:
        """What fits into two windows may leave in any time that is as long as one."""
        calls, period = self.process.settings.calls, self.process.settings.period
        now = self.clock.steady
        self.sent_at = [at for at in self.sent_at if now - at < period - JITTER] + [now]
        if calls and len(self.sent_at) > 2 * calls:
            broken("the client-side rate limit holds", f"{len(self.sent_at)} in {period:g} s")

    # ----- a merge request ------------------------------------------------------------------------

    def _judge_merge(self, ids: Ids, sent: Sent) -> None:
        if self.first_merge is None and ids not in self.forbidden:
            self.first_merge = ids
        # What DevRev has carried out all the same was seen by a poll.
        if self.is_forbidden and self.first_merge and self.organisation.alive(self.first_merge[1]):
            broken("a 403 to the first merge request of a run ends it", name_of(ids))
        row = self._judge_intent(ids)
        self._judge_plan(ids, row)
        self._judge_turn(ids)
        self._judge_freshness(ids)
        self._judge_check(ids)
        self._judge_group(ids)
        self.undo.judge_merge(ids)
        self._judge_backup(ids, Path(row["backup"]))
        if self.asks[ids]:
            self._judge_patience(ids, self.asks[ids][-1], row["backup"])
        self._judge_room(ids)
        self.asks[ids].append(Ask(self.run, sent, self.clock.wall, row["backup"]))

    def _judge_intent(self, ids: Ids) -> Document:
        """The intent is in both files, and nothing of it is still to be committed."""
        invariant = "the intent is in both files before the request leaves"
        found = []
        for path in (MAIN, COPY):
            db = self.process.connections.get(path.name)
            if db is None or db.in_transaction:
                broken(invariant, f"{path} is not open, or its transaction is")
            select = f"SELECT {', '.join(expected.ROW)} FROM pairs"
            select += " WHERE primary_id = ? AND duplicate_id = ?"
            values = sqlite3.Connection.execute(db, select, ids).fetchone()
            row = stored_row(values) if values else {"state": "nothing", "requested_at": 0.0}
            is_set = self.clock.set_by or self.clock.slept
            late = abs(row["requested_at"] - self.clock.wall) > 5 and not is_set
            if row["state"] != "requested" or late:
                broken(invariant, f"{path} says {row['state']} of {name_of(ids)}")
            found.append(row)
        if found[0]["document"] != found[1]["document"]:
            broken(invariant, f"the two files differ about {name_of(ids)}")
        return found[0]

    def _judge_plan(self, ids: Ids, row: Document) -> None:
        invariant = "only what is in the plan is merged"
        wanted = self.asked_for.get(ids)
        if wanted is None or wanted.new_ref != row["new_ref"]:
            broken(invariant, f"{name_of(ids)} with the reference {row['new_ref']}")
        if ids in self.intended or (self.asks[ids] and self.asks[ids][-1].run == self.run):
            return
        if ids not in self.allowed:
            broken(invariant, f"{name_of(ids)} was stopped, or --email does not name it")
        self.begun.add(ids)
        limit = self.options.limit
        if limit and len(self.begun) > limit:
            broken(invariant, f"--limit {limit}, and {len(self.begun)} new pairs are requested")
        sizes = Counter(primary for primary, _ in self.allowed - self.before.keys())
        known = {primary for primary, _ in self.before}
        fresh = [size for primary, size in sizes.items() if primary not in known]
        if limit and ids in self.tried and sum(fresh) >= limit and set(fresh) == {1}:
            broken("what was never tried comes first", f"{name_of(ids)} failed before")

    def _judge_turn(self, ids: Ids) -> None:
        """Until one merge is confirmed they go one by one, and the pairs of a group always do."""
        mine = self._asked_in_this_run()
        mine.pop(ids, None)
        there = pairs_in(self.latest, ("merged", "proving", *ENDED))
        merged = {one for one in there if self.latest[one]["run"] == self.tool.run_id}
        # A poll may have confirmed what was contradicted since.
        is_confirmed = self.lies or not merged.isdisjoint({*mine, *self.intended})
        # A merge without a reference has nothing to set: it confirms the run alone.
        takes_updates = self.lies or self.takes_updates
        takes_updates |= not all(self.latest[one]["new_ref"] for one in merged)
        for other, last in mine.items():
            row, what = self.latest[other], f"{name_of(ids)} after {name_of(other)}"
            given_up = row["code"] or last.answer == "refused"
            is_waiting = row["state"] in ("requested", "acknowledged") and not given_up
            if is_waiting and not is_confirmed and self.organisation.alive(other[1]):
                broken("the first merge of a run goes alone until it is confirmed", what)
            if row["state"] == "merged" and row["new_ref"] and not (row["code"] or takes_updates):
                broken("no more merges before the first reference is set", what)
            there = all(self.organisation.alive(one) for one in other) and not self.lies
            if other[0] == ids[0] and there and not given_up:
                broken("the pairs of a group go one after the other", what)
        failed = {one for one in mine if self.latest[one]["code"] == "merge_not_confirmed"}
        fresh = failed - self.tried - self.intended
        if len(fresh) >= 5 and not is_confirmed and ids not in self.tried:
            broken("five failures in a row stop a run", f"{name_of(ids)} after {len(fresh)}")

    def _judge_freshness(self, ids: Ids) -> None:
        """What the run was told is fresh, whether anything has changed or not."""
        now = self.clock.now - JITTER
        for contact in ids:
            age = now - self.shown.get(contact, expected.NEVER)
            if age > FRESH:
                broken(FRESHNESS, f"{short(contact)} was shown {age:.0f} s ago")
            for role in expected.ALL_ROLES:
                age = now - self.listed.get((role, contact), expected.NEVER)
                if age > LISTED:
                    broken(BACKED_UP, f"{role} of {short(contact)} was listed {age:.0f} s ago")

    def _judge_check(self, ids: Ids) -> None:
        """Some moment of the last minute has to have shown each contact as the export has it."""
        since = self.clock.now - FRESH - self.lag - JITTER
        orgs: list[set[str | None]] = []
        moved = {one.new_ref for one in self.known_of(ids[0])} - {None}
        for place, contact in enumerate(ids):
            rows = [one[place] for one in self.known[ids]]  # of the primary, of the duplicate
            refs = {row.ref for row in rows}
            if contact == ids[0]:
                refs |= moved
            emails = {row.key for row in rows}
            merge_time = self.organisation.merge_times.get(contact)
            if merge_time and self.reasons.is_odd(contact):  # merged, and DevRev answers as before
                since = merge_time - JITTER
            good = [
                one
                for one in expected.versions(self.organisation, contact, since)
                if one and one["state"] == "active" and one.get("external_ref") in refs
                if expected.email_key(str(one.get("email") or "")) in emails
            ]
            if not good:
                broken(FRESHNESS, f"{short(contact)} has been another for {FRESH:g} s")
            orgs.append({org_id_of(one) for one in good})
        if not (orgs[0] & orgs[1] or self.options.across_workspaces or None in orgs[0] | orgs[1]):
            broken(FRESHNESS, f"{name_of(ids)} are of different rev orgs")

    def known_of(self, primary: str) -> list[expected.Wanted]:
        """Return the merges into a primary that exports have ever asked for."""
        mine = [known for ids, known in self.known.items() if ids[0] == primary]
        return list(chain.from_iterable(mine))

    def _judge_group(self, ids: Ids) -> None:
        """What DevRev shows besides: unverified contacts, several references, and namesakes."""
        wanted, contacts = self.asked_for[ids], self.organisation.contacts
        # The second of these is the contact that is not verified:
        for pair in (ids, ids[::-1]):
            odd = [one in self.organisation.unverified for one in pair]
            is_refused = odd[1] and (not odd[0] or (pair == ids and wanted.new_ref))
            if is_refused and self.reasons.shows_verified(pair) and not self.options.try_unverified:
                broken("an unverified contact is not merged with a verified one", name_of(ids))
        for contact in ids:
            one = contacts.get(contact) or {}
            own = {one.get("external_ref"), own_reference(contact)}
            several = set(one.get("external_refs", ())) - own
            if several and "external_refs" not in self.fake_devrev.hidden_fields:
                broken("a contact with several references is not merged", short(contact))
        if self.lies:
            return
        since = self.clock.now - FRESH - self.lag - JITTER
        group = [row for row in self.rows if row.key == wanted.primary.key]
        spellings = {row.email for row in group}

        def is_listed(was: Thing | None) -> bool:
            return bool(
                was and expected.takes_part(was.get("external_ref")) and was["email"] in spellings
            )

        listed = {
            one["id"]: one["external_ref"]
            for one in contacts.find([("email", sorted(spellings))])
            if self.organisation.alive(one["id"])
            and all(map(is_listed, expected.versions(self.organisation, one["id"], since)))
        }
        new = [listed[one] for one in listed.keys() - {row.id for row in group if row.takes_part}]
        is_chosen = wanted.primary.key in self.choices
        if is_chosen and new:
            broken("a chosen group is as the choice has seen it", f"{len(new)} have joined")
        has_too_many = len(listed) > expected.most_contacts(wanted.primary.key)
        if not is_chosen and (has_too_many or any(one.startswith("user_") for one in new)):
            broken("a shared mailbox is not merged without a choice", f"{len(listed)} contacts")

    def _judge_backup(self, ids: Ids, folder: Path) -> None:
        try:
            contents = read_backup(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken(BACKED_UP, f"{folder}: {type(error).__name__} {error}")
            return
        entries = expected.entries_of(str(folder))
        for contact in ids:
            if contact not in entries:
                broken(BACKED_UP, f"{folder} does not hold {short(contact)}")
            entry, files = entries[contact], contents[entries[contact]["folder"]]
            if files["contact.json"]["id"] != contact:
                broken(BACKED_UP, f"{folder}: contact.json is not {short(contact)}'s")
            works = {work["id"]: work for work in files["works.json"]}
            talks = {talk["id"]: talk for talk in files["conversations.json"]}
            counts = []
            for key, role in expected.ROLES.items():
                listed = entry["works"][key]
                self._judge_list(role, contact, set(listed), works)
                counts.append(sum(":ticket/" in one or ":issue/" in one for one in listed))
            self._judge_list("members", contact, set(entry["conversations"]), talks)
            if not self.options.no_timelines:
                self._judge_timelines({**works, **talks}, files["timelines.json"])
            self._judge_count(ids, contact, max(counts))

    def _judge_list(self, role: str, contact: str, listed: set[str], there: Document) -> None:
        """What is listed is there; it was so at some time lately, and is all that was so then."""
        organisation, since = self.organisation, self.clock.now - LISTED - self.lag - JITTER
        table = organisation.conversations if role == "members" else organisation.works
        always, ever = expected.holdings(table, role, contact, since)
        wrong = listed - there.keys()
        if not self.lies:
            wrong |= listed - ever
            wrong |= {one for one in always if self.reasons.is_listed(one)} - listed
        if wrong:
            shown = ", ".join(map(short, sorted(wrong)))
            broken(BACKED_UP, f"{role} of {short(contact)}: {shown}")

    def _judge_timelines(self, things: Document, timelines: Document) -> None:
        for object_id, thing in things.items():
            now = expected.now_of(self.organisation, object_id)
            if self.lies or now is None or now["modified_date"] != thing["modified_date"]:
                continue
            there = self.organisation.timelines.get(object_id, ())
            truth = [entry["id"] for entry in there]
            saved = [entry["id"] for entry in timelines.get(object_id, ())]
            # What was there before others edited anything:
            least = sum(not entry.get("body", "").startswith("later") for entry in there)
            is_whole = saved == truth[: len(saved)] and len(saved) >= least
            if object_id not in timelines or not is_whole:
                broken(BACKED_UP, f"{len(saved)} of {len(truth)} comments on {short(object_id)}")

    def _judge_count(self, ids: Ids, contact: str, count: int) -> None:
        counts = {one[ids.index(contact)].tickets for one in self.known[ids]}
        asked = {pair for pair, asks in self.asks.items() if asks} | self.ever_intended
        has_grown = contact == ids[0] and contact in {primary for primary, _ in asked}
        at_least = has_grown or self.options.count_policy == "at-least"
        if count not in counts and not (at_least and count > min(counts)):
            what = f"{count} of {short(contact)}, the export has {sorted(counts)}"
            broken("a count that does not match refuses the group", what)

    def _judge_patience(self, ids: Ids, last: Ask, backup: str) -> None:
        invariant = "nothing is requested again without a poll of the same run and the wait"
        if last.polled != self.run:
            broken(invariant, f"{name_of(ids)}: no poll of this run has shown it unmerged since")
        waited = self.clock.now - last.ended
        if last.run != self.run:
            last.busy = False
            # By the wall clock until then, because no other one runs between two runs.
            now, wall = self.began
            at_begin = wall - last.wall + self.clock.now - now
            waited = max(self.clock.now - last.at, self.clock.wall - last.wall, at_begin)
        patience = last.patience(self.options.merge_timeout)
        if waited < patience - JITTER:
            broken(invariant, f"{name_of(ids)}: after {waited:.2f} s, the wait is {patience:g} s")
        if backup == last.backup and not last.busy:
            broken(invariant, f"{name_of(ids)}: requested again with the backup of the last time")

    def _judge_room(self, ids: Ids) -> None:
        """The window has room for the merge, and for what finishes it."""
        quota, process = self.fake_devrev.quota, self.process
        # What others spend can't be known, nor what the run has not been told of.
        if quota is None or quota.others or self.others_spent or process.units_unseen:
            return
        if quota.rolls and quota.limit < 10:
            return  # a request in flight, which nothing tells of yet, is a large part of it
        needed = 2 + any(one.new_ref for one in self.known[ids])
        now, reset = quota._turn()
        left = quota.limit - quota._used - process.travelling
        if reset - now > 3 and quota._used and left < min(needed, quota.limit):
            invariant = "a merge leaves only where the quota has room to finish it"
            broken(invariant, f"{left} units left")

    # ----- an update of a primary -----------------------------------------------------------------

    def _judge_update(self, sent: Sent) -> None:
        primary = sent.body["id"]
        # What was intended by a run that was killed before it sent the request counts as requested.
        asked = {ids for ids in self.known if self.asks[ids]} | self.ever_intended
        mine = [ids for ids in self.known if ids[0] == primary and ids in asked]
        self._judge_fields(sent, mine)
        if "external_ref" not in sent.body:
            return
        reference = sent.body["external_ref"].strip()  # DevRev's own may have blanks around it
        mine = [ids for ids in mine if any(one.new_ref == reference for one in self.known[ids])]
        what = f"{reference} to {short(primary)}"
        if not mine:
            broken("only references of merged duplicates are moved", what)
        if not self.lies and all(self.organisation.alive(duplicate) for _, duplicate in mine):
            broken("a reference is moved after the merge", what)
        if not any(self.asks[ids] and self.asks[ids][-1].run == self.run for ids in mine):
            # A resumed pair reads the primary first.
            known: set[str | None] = set()
            for one in self.known_of(primary):
                known |= {one.primary.ref, one.new_ref}
            been = expected.versions(self.organisation, primary, self.began[0])
            if all(was is not None and was.get("external_ref") not in known for was in been):
                broken("a reference that another user has set is not overwritten", what)
        for ids in mine:
            self._judge_gap(ids)

    def _judge_fields(self, sent: Sent, mine: Sequence[Ids]) -> None:
        invariant = "only fields that the duplicate had are carried, and only with --carry-fields"
        primary, fields = sent.body["id"], sorted(sent.body.keys() - {"id", "external_ref"})
        if not fields:
            return
        if not any(self.latest[ids]["fields_to_carry"] for ids in mine if ids in self.latest):
            broken(invariant, f"{', '.join(fields)} of {short(primary)}")
        been: list[Thing | None] = []
        for ids in mine:
            # The check of a merge may be older than the last edit of the duplicate.
            requested = self.asks[ids][-1].at if self.asks[ids] else expected.NEVER
            since = requested - FRESH - self.lag - JITTER
            been += expected.versions(self.organisation, ids[0], expected.NEVER)
            been += expected.versions(self.organisation, ids[1], since)
        contacts = [one for one in been if one]
        lately = self.lately(primary)
        for field in fields:
            value = sent.body[field]
            what = f"{field} of {short(primary)} becomes {value!r}"
            if field == "phone_numbers":
                numbers = chain.from_iterable(one.get(field, ()) for one in contacts)
                is_known = set(value).issubset(numbers)
                is_lost = not expected.kept_numbers(lately) <= set(value)
            else:
                is_known = any(one.get(field) == value for one in contacts)
                is_known &= field in ("description", "display_name")
                is_lost = not any(may_be_replaced(one, field) for one in lately)
            if not is_known:
                broken(invariant, what)
            if is_lost and not self.lies:
                broken(LOST, what)

    def _judge_gap(self, ids: Ids) -> None:
        """Where nothing is disturbed, the reference is moved at the next poll, which comes soon."""
        merged, slowest = self.organisation.merge_times.get(ids[1]), self.slowest()
        if slowest is None or merged is None or ids in self.moving:
            return
        # Where it stays, and no object tells, lists are read twice.
        stays = self.fake_devrev.stays and not self.reasons.objects_tell(ids, self.latest[ids])
        if stays or [ask.run for ask in self.asks[ids]] != [self.run]:
            return
        self.moving.add(ids)
        gap, most = self.clock.now - merged, 1.0 + 0.1 * self.fake_devrev.merge_delay + 6 * slowest
        if gap > most:
            what = f"{gap:.1f} s, {name_of(ids)}"
            broken("between DevRev's merge and the new reference nothing waits", what)

    # ----- a run ends -----------------------------------------------------------------------------

    def after_run(self, report: Path, code: int | None, killed: bool, needed: bool) -> Rows:
        """Judge what a run has left on the disk; return the savepoint's rows.

        `report` is its own; `needed`: it has to have written it.
        """
        rows = self._judge_files(killed)
        self.ever_intended |= pairs_in(rows, UNFINISHED)
        self._judge_rows(rows)
        if needed and code in (0, 1) and self.options.csv and not self.options.preview:
            for ids in sorted(pairs_in(self.before, ["cancelled"])):
                if ids[1] not in self.polled:
                    broken("every run polls each cancelled pair", name_of(ids))
        self.undo.after_run(rows, report, code, needed)
        self.reports.after_run(rows, None if self.undo.active else report, code, needed)
        for ids, asks in self.asks.items():
            row = rows.get(ids)
            saved = row and (row["rejected"] or row["state"] != "requested")
            if asks and not saved:
                asks[-1].answer = "lost"  # the run was killed before it could save the answer
        return rows

    def _judge_rows(self, rows: Rows) -> None:
        for ids, asks in self.asks.items():
            state = rows[ids]["state"] if ids in rows else "nothing"
            if asks and state not in (*expected.TERMINAL, *UNFINISHED, "undoing"):
                what = f"the savepoint says {state} of {name_of(ids)}"
                broken("a request is never forgotten", what)
        for ids, row in rows.items():
            state = row["state"]
            exists = self.organisation.alive(ids[1]) and not self.lies
            if state == "merged_elsewhere":
                self._judge_elsewhere(ids)
            elif state == "done":
                self.judge_done(ids, row["new_ref"], row["backup"])
            elif state in ("merged", "proving", "settled") and exists:
                broken(TRUE, f"{name_of(ids)} is {state}, and its duplicate still exists")
            if row["after_cancel"] and ids not in self.cancelled:
                broken(TRUE, f"{name_of(ids)} was never cancelled")

    def _judge_elsewhere(self, ids: Ids) -> None:
        if self.lies or ids in self.judged:
            return
        self.judged.add(ids)
        asks, merge_times = self.asks[ids], self.organisation.merge_times
        was_gone = bool(asks) and merge_times.get(ids[0], self.clock.now) < asks[0].at
        if self.organisation.alive(ids[1]) or was_gone or len(asks) > 1:
            invariant = "merged_elsewhere is said only of what another user has merged or deleted"
            broken(invariant, f"{name_of(ids)} still exists, or was requested more than once")

    def judge_done(self, ids: Ids, reference: str | None, backup: str | None) -> None:
        if not self.into(ids) and not self._is_as_if_merged(ids, backup):
            broken(TRUE, f"{name_of(ids)} is done, and was not merged")
        # The primary may have been merged onward.
        times = self.organisation.reference_times
        had = [*times[ids[0]], *times[self.organisation.survivor(ids[0])]]
        if reference and not any(ref == reference for _, ref in had):
            broken(TRUE, f"{name_of(ids)} is done, and the primary never got {reference}")
        self._judge_transfer(ids, backup)

    def _judge_transfer(self, ids: Ids, backup: str | None) -> None:
        """What was backed up was the primary's at some time since, but for what is deleted."""
        entries = expected.entries_of(backup)
        if self.lies or ids in self.judged or not entries or not self.into(ids):
            return
        self.judged.add(ids)
        since = self.organisation.merge_times[ids[1]] - self.lag - LISTED
        for one, role in expected.in_backup(entries[ids[1]]):
            been = expected.versions(self.organisation, one, since)
            if been[0] and not any(expected.held(thing, role, ids[0]) for thing in been):
                what = f"{role} of {short(one)}, {name_of(ids)}"
                broken("a pair is done only where all that was backed up is the primary's", what)

    def _is_as_if_merged(self, ids: Ids, backup: str | None) -> bool:
        """Whether others have deleted the duplicate, or merged it elsewhere, and that can't be told
        from a merge: all that it had belongs to the primary, or it had nothing."""
        if self.organisation.alive(ids[1]):
            return False
        entries = expected.entries_of(backup)
        items = expected.in_backup(entries[ids[1]]) if entries else ()
        return all(self.belongs_to(one, role, ids[0]) for one, role in items)

    def leaves_behind(self, ids: Ids) -> bool:
        """Whether what was backed up of a duplicate is not all its primary's, or not all exists."""
        entries = expected.entries_of(self.latest[ids]["backup"] if ids in self.latest else None)
        items = expected.in_backup(entries[ids[1]]) if entries else ()
        things = [(expected.now_of(self.organisation, one), role) for one, role in items]
        return not entries or not all(expected.held(thing, role, ids[0]) for thing, role in things)

    def into(self, ids: Ids) -> bool:
        one: str | None = ids[1]
        while one is not None and one != ids[0]:
            one = self.organisation.merged_into.get(one)
        return one is not None

    def belongs_to(self, object_id: str, role: str, contact: str) -> bool:
        thing = expected.now_of(self.organisation, object_id)
        return thing is None or expected.held(thing, role, contact)

    # ----- what gets lost between runs ------------------------------------------------------------

    def lose_file(self, path: Path, put_back: Path | None = None, forget: bool = True) -> None:
        for tail in ("", "-journal"):
            target = Path(f"{path}{tail}")
            if target.exists():
                target.unlink()
            if put_back is not None and Path(f"{put_back}{tail}").exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copy(f"{put_back}{tail}", str(target))
        file = expected.read_file(path)
        self.committed[path.name] = dict(file.rows) if file else {}
        self.reports.put_back(file)
        for asks in self.asks.values():
            if asks:
                asks[-1].answer = "lost"  # for all that the tool can know
        if forget:
            self.forget()

    def lose_backups(self) -> None:
        """Delete the folder `backups`, the copy of the savepoint included."""
        shutil.rmtree("backups")
        self.committed[COPY.name] = {}
        self.backups_lost = True
        self.forget()

    def forget(self) -> None:
        """Forget what neither file knows any more: both were lost, or put back from a backup."""
        rows = expected.joined(*expected.read_files())
        for ids in list(self.asks):
            row = rows.get(ids)
            if self.asks[ids] and (row is None or row["state"] in ("planned", "failed")):
                del self.asks[ids]
                self.ever_intended.discard(ids)
        self.reports.reopened |= pairs_in(self.latest, ENDED) - pairs_in(rows, ENDED)
        self.latest = dict(rows)
        self.judged &= rows.keys()
        self.undo.forget(rows)

    # ----- a scenario ends ------------------------------------------------------------------------

    def after_life(self, rows: Rows) -> None:
        """Everything was left in peace: each pair has ended, or there is a true reason."""
        self.reasons.judge(rows)
        self.undo.after_life(rows)


def ids_of_merge(sent: Sent) -> Ids:
    return sent.body["primary_user"], sent.body["secondary_user"]


def organisation_of(don: str) -> str:
    return don.partition(":devo/")[2].partition(":")[0]


def documents(rows: Rows) -> dict[Ids, str]:
    return {ids: row["document"] for ids, row in rows.items()}


def may_be_replaced(contact: Thing | None, field: str) -> bool:
    """Return whether a contact has no value of a field, or a name that DevRev has made."""
    value = str((contact or {}).get(field) or "")
    if field != "display_name" or contact is None:
        return not value
    email = str(contact.get("email") or "").lower()
    return value.lower() in ("", email, email.partition("@")[0], contact["display_id"].lower())


def list_of(sent: Sent) -> str:
    """Return what the pages of one list have in common."""
    body = {name: value for name, value in sent.body.items() if name != "cursor"}
    return json.dumps([sent.endpoint, body])


def read_backup(folder: Path) -> defaultdict[str, Document]:
    """Return the files of a backup by folder and name; they are what its manifest says."""
    contents: defaultdict[str, Document] = defaultdict(dict)
    for file, known in json.loads((folder / "manifest.json").read_bytes())["files"].items():
        data = (folder / file).read_bytes()
        if len(data) != known["bytes"] or hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise ValueError(f"{file} is not what was written")
        home, _, title = file.rpartition("/")
        contents[home][title] = json.loads(data)
    return contents
