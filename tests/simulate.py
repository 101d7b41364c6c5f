"""Whole lives of an organisation and of the runs over it, in simulated time, from a seed.

    python -m tests.simulate --seeds 400 --jobs 2      play lives, stop at the first that breaks an invariant
    python -m tests.simulate --seed 17 --trace         play one again, step by step
    python -m tests.simulate --mutants                 take the module's safety lines out, one at a time

How to read a failing life is in tests/README.md.
"""

import argparse
import contextlib
import csv
import logging
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from tests import fake_devrev
from tests.invariants import LISTED, Ids, InvariantChecker, Row, export_of
from tests.simulated import (
    Clock,
    InvariantBroken,
    Killed,
    NetworkFaults,
    SilentStream,
    SimulatedProcess,
    Trace,
    environment_of,
    load,
    short,
)
from tests.undo_invariants import WRITES

SEEDS = Path(__file__).with_name("seeds.txt")
HEADER = (
    "REV_USER_ID", "DISPLAY_NAME", "EMAIL", "EXTERNAL_REF", "FULL_NAME", "CREATED_AT", "UPDATED_AT", "TICKET_COUNT",
)  # fmt: skip
DISTURBING = ("requests ", "merges unheard", "naps", "a clock", "others spend")  # what makes requests wait
PEACEFUL_RUNS = 7  # that a life which is left in peace may need to end


class Verdict(NamedTuple):
    """What became of a life."""

    seed: int
    invariant: str = ""  # that was broken
    what: str = ""
    events: Tuple[str, ...] = ()
    counts: "Counter[str]" = Counter()
    seconds: float = 0.0  # simulated


class Draws:
    """Draws, of which each kind is on or off for a whole life, so that lives differ."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calm = self.random.random() < 0.1
        self._on: Dict[str, bool] = {}

    def has(self, kind: str, chance: float = 0.3) -> bool:
        """Whether this life knows such things."""
        if kind not in self._on:
            drawn = self.random.random() < chance
            self._on[kind] = drawn and not self.calm
        return self._on[kind]

    def drawn(self) -> List[str]:
        return [kind for kind, on in self._on.items() if on]

    def somewhen(self, least: float, most: float) -> float:
        """Seconds, as often short as long."""
        return float(least * (most / least) ** self.random.random())


# --------------------------------------------------------------------------------------------------
# An organisation
# --------------------------------------------------------------------------------------------------

SHAPES = (  # references of the contacts of one email: R is DevRev's, u the application's, - none of the two
    ("Ru", 10), ("RRu", 3), ("RRRu", 1), ("Ruu", 2), ("RRuu", 1), ("RR", 2), ("uu", 1), ("R", 1), ("u", 1), ("Ru-", 1),
)  # fmt: skip


class OrganisationBuilder:
    """Makes an organisation."""

    HUGE = 600  # tickets at most: some pages, and more than fit into a call for many contacts

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.chance = draws.random
        self.organisation = fake_devrev.Organisation()
        self.keys = iter(range(1, 1 << 20))
        self.huge = draws.has("huge", 0.02)

    def found(self) -> fake_devrev.Organisation:
        shapes, weights = zip(*SHAPES)
        contacts: List[str] = []
        for number in range(self.chance.randint(3, 12)):
            (shape,) = self.chance.choices(shapes, weights)
            contacts += self._group(f"person{number}@example.com", shape)
        for _ in range(self.chance.randint(0, len(contacts))):
            self._shared(self.chance.sample(contacts, min(len(contacts), self.chance.randint(1, 3))))
        return self.organisation

    def _group(self, email: str, shape: str) -> List[str]:
        two_orgs = self.draws.has("two rev orgs", 0.1) and self.chance.random() < 0.3
        people = []
        for place, letter in enumerate(shape):
            key = str(next(self.keys))
            reference = {"R": None, "u": f"user_{key}", "-": f"crm-{key}"}[letter]
            written = email.title() if self.chance.random() < 0.1 else email
            org = "OTHER" if two_orgs and place else "ACME"
            state = self.chance.choice(("locked", "deactivated")) if self.chance.random() < 0.02 else "active"
            day = f"2024-01-{self.chance.randint(1, 28):02d}T00:00:00.000Z"
            people.append(self.organisation.add_contact(key, written, reference, None, org, state, day))
            self._works(people[-1])
        return people

    def _works(self, contact: str) -> None:
        most = self.HUGE if self.huge else self.chance.choice((0, 0, 1, 2, 5))
        self.huge = False
        for _ in range(self.chance.randint(most // 2, most)):
            roles = self.chance.choices(("owned_by", "created_by", "reported_by"), k=self.chance.randint(1, 3))
            people: Dict[str, Any] = {role: contact if role == "created_by" else [contact] for role in roles}
            comments = self.chance.choice((0, 0, 1, 3)) if most < 100 else 0
            self.organisation.add_work(kind=self.chance.choice(fake_devrev.WORK_KINDS), comments=comments, **people)
        if self.chance.random() < 0.3:
            self.organisation.add_conversation([contact, self.organisation.dev_user["id"]], comments=1)

    def _shared(self, people: Sequence[str]) -> None:
        if self.chance.random() < 0.3:
            self.organisation.add_conversation(people, comments=self.chance.randint(0, 2))
        else:
            role = self.chance.choice(("owned_by", "reported_by"))
            self.organisation.add_work(**{role: people}, comments=self.chance.randint(0, 2))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Others
# --------------------------------------------------------------------------------------------------


class ConcurrentEdits:
    """People and programs that change things meanwhile; each method does one thing and says what."""

    def __init__(self, scenario: "Scenario") -> None:
        self.scenario = scenario
        self.chance = random.Random(scenario.seed + 1)
        self.organisation = scenario.organisation
        self.numbers = iter(range(1, 1 << 20))

    def act(self) -> None:
        """Do something, or nothing where there is nothing to do it to."""
        kind = self.chance.choice(self.kinds())
        done = getattr(self, kind)()
        if done:
            self.scenario.counts["edits"] += 1
            self.scenario.trace(f"OTHERS {done}")

    def kinds(self) -> List[str]:
        kinds = ["comment", "ticket"]
        for kind, chance in (
            ("email", 0.4), ("reference", 0.3), ("lock", 0.3), ("delete", 0.3), ("merge", 0.3), ("newcomer", 0.4),
            ("visit", 0.4), ("delete_ticket", 0.3), ("give", 0.3), ("unlock", 0.4), ("new_name", 0.3),
        ):  # fmt: skip
            if self.scenario.draws.has(f"others: {kind}", chance):
                kinds.append(kind)
        return kinds

    def contact(self) -> Optional[fake_devrev.Record]:
        """Somebody who is there; mostly somebody whom the run is about to merge."""
        there = [one for one in self.scenario.of_interest() if self.organisation.alive(one)]
        if not there or self.chance.random() < 0.2:
            there = [one for one in self.organisation.contacts if self.organisation.alive(one)]
        return self.organisation.contacts[self.chance.choice(there)] if there else None

    def work(self) -> Optional[str]:
        one = self.contact()
        found = self.organisation.works.find([("anyone", [one["id"]])]) if one else []
        return str(self.chance.choice(found)["id"]) if found else None

    def email(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, email=f"somebody{next(self.numbers)}@example.com")
        return f"change the email of {short(one['id'])}"

    def reference(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, external_ref=f"hand-{next(self.numbers)}")
        return f"change the reference of {short(one['id'])}"

    def new_name(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, display_name="Somebody Else")
        return f"change the name of {short(one['id'])}"

    def lock(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, state=self.chance.choice(("locked", "deactivated")))
        return f"make {short(one['id'])} {one['state']}"

    def unlock(self) -> str:
        shut = [one for one in self.organisation.contacts.values() if one["state"] in ("locked", "deactivated")]
        for one in shut:
            self.organisation.change(one, state="active")
        return f"unlock {len(shut)} contacts" if shut else ""

    def delete(self) -> str:
        one = self.contact()
        if one is None or any(one["id"] in pair for pair in self.organisation.merges):
            return ""
        self.organisation.delete_contact(one["id"])
        return f"delete {short(one['id'])}"

    def merge(self) -> str:
        one, other = self.contact(), self.contact()
        if one is None or other is None or one is other:
            return ""
        self.organisation.merge(one["id"], other["id"])
        return f"merge {short(other['id'])} into {short(one['id'])}"

    def newcomer(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        reference = self.chance.choice((None, f"user_n{next(self.numbers)}"))
        key = f"Y{next(self.numbers)}"
        made = self.organisation.add_contact(key, one.get("email"), reference, rev_org=one["rev_org"]["id"][-4:])
        return f"make {short(made)} with the email and rev org of {short(one['id'])}"

    def visit(self) -> str:
        wanted = [one for one in self.scenario.checker.plan.values() if one.new_ref]
        if not wanted:
            return ""
        return self.scenario.visit(self.chance.choice(wanted).ids)

    def comment(self) -> str:
        work = self.work()
        if work is None:
            return ""
        self.organisation.add_comment(work, f"later {next(self.numbers)}")
        self.organisation.change(self.organisation.works[work])
        return f"comment on {short(work)}"

    def ticket(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        return f"open {short(self.organisation.add_work(owned_by=[one['id']]))} for {short(one['id'])}"

    def delete_ticket(self) -> str:
        work = self.work()
        if work is None:
            return ""
        self.organisation.delete_work(work)
        return f"delete {short(work)}"

    def give(self) -> str:
        work, one = self.work(), self.contact()
        if work is None or one is None:
            return ""
        self.organisation.give(work, self.chance.choice(("owned_by", "reported_by")), [one["id"]])
        return f"give {short(work)} to {short(one['id'])}"


# --------------------------------------------------------------------------------------------------
# A life
# --------------------------------------------------------------------------------------------------


class Scenario:
    """An organisation, and runs over it until everything is at its end."""

    def __init__(self, seed: int, module: Any, trace: bool = False, echo: bool = False) -> None:
        self.seed, self.module = seed, module
        self.draws = draws = Draws(seed)
        self.chance = draws.random
        self.counts: Counter[str] = Counter()
        self.clock = Clock()
        self.tracing = trace
        self.events = Trace(self.clock, None if echo else 60)
        self.organisation = OrganisationBuilder(draws).found()
        self.fake_devrev = self._make_world()
        self.clock.fake_devrev = self.fake_devrev
        self.checker = InvariantChecker(self.fake_devrev, self.clock)
        self.others = ConcurrentEdits(self)
        self.stuck: Set[str] = set()
        self.undos: List[str] = []  # what was taken back, or begun to be
        self.latency = draws.somewhen(0.01, 0.4)
        self.in_peace = False
        self.exports: List[List[Row]] = []
        self.run: Any = None
        self._describe_world()

    def trace(self, what: str) -> None:
        if self.tracing:
            self.events(what)

    def _make_world(self) -> fake_devrev.World:
        draws, chance = self.draws, self.chance
        quota = None
        if self.chance.random() < 0.4:
            quota = (chance.choice((1, 2, 3, 5, 8, 20, 60, 200, 1000)), chance.choice((6.0, 30.0, 60.0, 300.0)))
            least = 1 if draws.has("tiny quota", 0.03) else math.ceil(quota[1] * 16 / LISTED)
            quota = (max(quota[0], least), quota[1])
        delay = draws.somewhen(0.5, 60.0) if draws.has("slow merges", 0.2) else draws.somewhen(0.02, 3.0)
        made = fake_devrev.World(
            self.organisation,
            lambda: self.clock.now,
            lambda: 1_750_000_000.0 + self.clock.now,
            merge_delay=delay,
            gone=chance.choice(fake_devrev.World.GONE),
            quota=quota,
            max_ids=chance.choice((1, 3, 10)) if draws.has("few ids a filter", 0.1) else None,
            list_lag=0.0,
            seed=self.seed,
            on_request=self._on_request,
        )
        made.in_progress = chance.choice((200, 200, 400, 409))
        made.unique_emails = draws.has("unique emails", 0.04)
        if draws.has("others spend quota", 0.15) and made.quota:
            made.quota.others = made.quota.limit // 3
        return made

    def _describe_world(self) -> None:
        quota = self.fake_devrev.quota
        shown = f"{quota.limit} in {quota.window:g} s" if quota else "none"
        self.trace(
            f"a world: gone {self.fake_devrev.gone}, merges take {self.fake_devrev.merge_delay:.2f} s, quota {shown}, "
            f"latency {self.latency:.3f} s"
        )
        for one in self.organisation.contacts.values():
            email, reference = one.get("email"), one["external_ref"]
            self.trace(f"  {short(one['id'])} {email} {reference} {one['state']} {one['rev_org']['id'][-5:]}")

    # ----- what happens meanwhile ------------------------------------------------------------------

    def of_interest(self) -> List[str]:
        return [one for pair in self.checker.plan for one in pair]

    def visit(self, ids: Ids) -> str:
        """The application identifies the person of a pair."""
        wanted = self.checker.known[ids][-1]
        primary = self.organisation.contacts.get(ids[0])
        if primary is None or wanted.new_ref is None:
            return ""
        org = primary["rev_org"]["id"].rpartition("/")[2]
        found = self.organisation.visit(wanted.primary.email, wanted.new_ref, org)
        return f"the application meets {wanted.new_ref}: {short(found)}"

    def _on_request(self, stage: str, request: fake_devrev.Request) -> None:
        self.checker.undo.heard(stage, request)
        if stage == "before" or request.endpoint != "rev-users.merge" or self.in_peace:
            return
        ids = request.body["primary_user"], request.body["secondary_user"]
        if self.draws.has("a visit in the gap", 0.2) and self.chance.random() < 0.4:
            when = self.fake_devrev.merge_delay + self.draws.somewhen(0.01, 5.0)
            self.fake_devrev.later(when, lambda: self.trace(f"OTHERS {self.visit(ids)}"))

    def _edits(self) -> None:
        """Let others act at some times from now on."""
        if self.draws.has("others", 0.5):
            for _ in range(self.chance.randint(1, 6)):
                self.fake_devrev.later(self.draws.somewhen(0.1, 600.0), self._act)

    def _act(self) -> None:
        if not self.in_peace:
            self.others.act()

    # ----- weather ---------------------------------------------------------------------------------

    def network_faults(self, endpoint: str) -> NetworkFaults:
        there, back = (self.latency * self.chance.uniform(0.3, 1.0) for _ in range(2))
        if self.in_peace:
            return NetworkFaults(there, back)
        for draws, chance in (("refused", 0.03), ("lost", 0.04), ("unheard", 0.05), ("late", 0.03), ("twice", 0.03)):
            if self.draws.has(f"requests {draws}", 0.15) and self.chance.random() < chance:
                self.counts[draws] += 1
                self.checker.others_spent += draws in ("twice", "late")
                return NetworkFaults(there, back, draws)
        rare = endpoint in ("rev-users.merge", "rev-users.create")
        if rare and self.draws.has("merges unheard", 0.15) and self.chance.random() < 0.3:
            self.counts["unheard"] += 1
            return NetworkFaults(there, back, self.chance.choice(("unheard", "lost", "late", "twice")))
        return NetworkFaults(there, back)

    def faults(self) -> List[fake_devrev.Fault]:
        """What goes wrong at DevRev's side during a run."""
        found = []
        for kind, chance in (
            ("500", 0.05), ("503", 0.05), ("502", 0.03), ("html-200", 0.03), ("429", 0.03), ("429-bare", 0.03),
            ("route-404", 0.02), ("hang", 0.02), ("hang-after", 0.02), ("500-after", 0.05), ("cut", 0.03),
            ("reset-before", 0.03), ("reset-after", 0.03), ("slow", 0.05), ("drip", 0.01), ("nested", 0.01),
            ("endless", 0.02), ("400", 0.01), ("403", 0.01), ("409", 0.02), ("doubled", 0.03),
        ):  # fmt: skip
            if self.draws.has(f"answers: {kind}", 0.08):
                found.append(fake_devrev.Fault(kind, chance=chance))
        for kind, detail in (
            ("merge-never", None), ("merge-leaves", None), ("merge-doubled", self.draws.somewhen(0.1, 60.0)),
            ("merge-slow", self.draws.somewhen(1.0, 400.0)),
            ("merge-refused-late", (self.chance.choice((400, 403, 409)), self.draws.somewhen(0.1, 300.0))),
        ):  # fmt: skip
            if self.draws.has(kind, 0.12):
                found.append(fake_devrev.Fault(kind, chance=0.4, detail=detail))
        if self.undos and self.draws.has("contacts refused", 0.2):
            kind = self.chance.choice(("400", "403", "409", "500-after"))
            found.append(fake_devrev.Fault(kind, "rev-users.create", chance=0.5))
        doubled = self.draws.has("requests twice", 0.15) or self.draws.has("answers: doubled", 0.08)
        if self.draws.has("answers: not so", 0.08) and not doubled:  # the second may be made all the same
            found.append(fake_devrev.Fault("changed", "rev-users.update", chance=0.3, detail=self._forget_update))
            found.append(fake_devrev.Fault("changed", "rev-users.get", chance=0.05, detail=self._garble))
        if self.draws.has("a look finds nobody", 0.08):
            found.append(fake_devrev.Fault("404", "rev-users.get", chance=0.1))
            self.checker.lies = True
        if any(fault.kind in ("endless",) for fault in found):
            self.checker.lies = True
        return found

    def _forget_update(self, content: Dict[str, Any]) -> Dict[str, Any]:
        """An update that is answered with 200 and the reference as it was, for it was not made."""
        user = content.get("rev_user")
        times = self.organisation.reference_times[user["id"]] if isinstance(user, dict) else []
        if len(times) > 1:
            old = times[-2][1]
            self.organisation.change(self.organisation.contacts[user["id"]], external_ref=old)
            del times[-2:]
            content["rev_user"] = {**user, "external_ref": old}
        return content

    def _garble(self, content: Dict[str, Any]) -> Dict[str, Any]:
        identity = (content.get("rev_user") or {}).get("id")
        return dict(self.chance.choice(({}, {"rev_user": None}, {"rev_user": {"id": identity}}, {"rev_user": {}})))

    # ----- runs ------------------------------------------------------------------------------------

    def play(self) -> None:
        """Live: some runs in which anything may happen, then runs in peace."""
        Path("reports").mkdir()
        Path("logs").mkdir()
        self._export()
        for _ in range(1 if self.draws.calm else self.chance.randint(1, 4)):
            self._edits()
            self._disturb()
            self._run(self._options(), self._machine())
            self._between()
            if self.draws.has("undo", 0.2) and self.chance.random() < 0.6:
                self._undo()
        self._leave_in_peace()

    def _undo(self) -> None:
        """Somebody takes merges back: of a backup or of a report."""
        found = [str(one) for one in sorted(Path("backups").glob("*/*/"))] if Path("backups").exists() else []
        found += [str(one) for one in sorted(Path("reports").glob("merge_report_*.json"))]
        if not found:
            return
        path = (
            self.chance.choice(self.undos) if self.undos and self.chance.random() < 0.5 else self.chance.choice(found)
        )
        options = ["--undo", path, "--quiet", "--workers", str(self.chance.choice((1, 2, 8)))]
        options += ["--merge-timeout", f"{self.draws.somewhen(2.0, 300.0):.1f}"]
        if self.chance.random() < 0.1:
            options += ["--preview"]
        else:
            options += ["--yes"]
            self.undos += [path] if path not in self.undos else []
        self._edits()
        self._disturb()
        self._run(options, self._machine())
        self._between()

    def _disturb(self) -> None:
        """What the coming run meets at DevRev's side."""
        chance = self.chance
        self.fake_devrev.faults = self.faults()
        self.fake_devrev.list_lag = self.draws.somewhen(0.5, 30.0) if self.draws.has("lists lag", 0.15) else 0.0
        self.checker.lag = max(self.checker.lag, self.fake_devrev.list_lag)
        self.organisation.ref_release = (
            self.draws.somewhen(0.1, 60.0) if self.draws.has("references held", 0.1) else 0.0
        )
        if self.draws.has("stuck references", 0.05):
            stuck = [one["external_ref"] for one in self.organisation.contacts.values() if chance.random() < 0.1]
            self.organisation.stuck_references.update(stuck)
            self.stuck.update(stuck)
        if self.fake_devrev.quota and self.draws.has("others spend quota", 0.15):
            self.checker.others_spent += 1
            for _ in range(3):
                units = chance.randint(1, self.fake_devrev.quota.limit)
                self.fake_devrev.later(self.draws.somewhen(0.1, 600.0), lambda units=units: self._spend(units))
        if self.draws.has("a token revoked", 0.05):
            self.fake_devrev.later(self.draws.somewhen(0.1, 200.0), self._revoke)
        for _ in range(chance.randint(0, 3)):
            if self.draws.has("naps", 0.12):
                self.fake_devrev.later(self.draws.somewhen(0.2, 300.0), self._nap)
            elif self.draws.has("a clock that is set", 0.08):
                self.fake_devrev.later(self.draws.somewhen(0.2, 300.0), self._set_clock)

    def _spend(self, units: int) -> None:
        if self.fake_devrev.quota and not self.in_peace:
            self.trace(f"OTHERS spend {units} units of quota")
            self.fake_devrev.quota.spend(units)

    def _revoke(self) -> None:
        """The token of this run is not accepted any more; the next run has the new one."""
        if not self.in_peace:
            self.trace("OTHERS revoke the token")
            self.fake_devrev.token += "x"

    def _nap(self) -> None:
        if not self.in_peace:
            seconds = self.draws.somewhen(10.0, 40_000.0)
            self.counts["naps"] += 1
            self.trace(f"the laptop sleeps for {seconds:.0f} s")
            self.clock.nap(seconds)

    def _set_clock(self) -> None:
        if not self.in_peace:
            seconds = self.chance.choice((-1, 1)) * self.draws.somewhen(1.0, 40_000.0)
            self.counts["clock set"] += 1
            self.trace(f"somebody sets the clock by {seconds:.0f} s")
            self.clock.set_by += seconds

    def _export(self) -> None:
        """A new export, as the warehouse has it."""
        rows = export_of(self.organisation)
        if self.draws.has("wrong counts", 0.1) and not self.in_peace:
            rows = [
                row._replace(tickets=max(0, row.tickets + self.chance.choice((-1, 1))))
                if self.chance.random() < 0.2
                else row
                for row in rows
            ]
        self.chance.shuffle(rows)
        self.exports.append(rows)
        self.trace(f"an export: {len(rows)} contacts")

    def _write_csv(self, rows: Sequence[Row]) -> None:
        with open("contacts.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for row in rows:
                writer.writerow((row.id, "A Name", row.email, row.ref, "", row.created, row.created, row.tickets))

    def _options(self) -> List[str]:
        """The command line of a run, and the files that it names."""
        chance, draws = self.chance, self.draws
        if not self.exports or chance.random() < 0.4:
            self._export()
        rows = self.exports[-1] if chance.random() < 0.8 else chance.choice(self.exports)
        self._write_csv(rows)
        options = ["--csv", "contacts.csv", "--yes", "--quiet", "--workers", str(chance.choice((1, 2, 8, 8, 32)))]
        options += ["--merge-timeout", f"{draws.somewhen(2.0, 300.0):.1f}"]
        if draws.has("--limit", 0.2) and chance.random() < 0.6:
            options += ["--limit", str(chance.randint(1, 4))]
        if draws.has("--email", 0.15) and chance.random() < 0.5:
            options += [word for row in chance.sample(rows, min(3, len(rows))) for word in ("--email", row.email)]
        if draws.has("--count-policy", 0.2):
            options += ["--count-policy", "at-least"]
        if draws.has("--no-timelines", 0.7 if draws.has("huge") else 0.1):
            options += ["--no-timelines"]
        if draws.has("--choices", 0.15) and self._write_choices(rows):
            options += ["--choices", "choices.csv"]
        return options

    def _write_choices(self, rows: Sequence[Row]) -> bool:
        """Choose for some of the groups that can't be told."""
        users: Dict[str, List[Row]] = {}
        for row in rows:
            if row.ref.startswith("user_"):
                users.setdefault(row.key, []).append(row)
        chosen = [self.chance.choice(found) for found in users.values() if self.chance.random() < 0.6]
        with open("choices.csv", "w", encoding="utf-8") as file:
            file.write("EMAIL,EXTERNAL_REF\n" + "".join(f"{row.key},{row.ref}\n" for row in chosen))
        self.choices = {row.key: row.ref for row in chosen}
        return bool(chosen)

    def _settings(self, workers: int) -> Any:
        calls, period = 0, 60.0
        if self.chance.random() < 0.2:
            calls, period = self.chance.choice(((3, 2.0), (10, 6.0), (60, 6.0), (200, 60.0), (30, 60.0)))
        timeout = self.chance.choice((2.0, 5.0, 30.0))
        return self.module.ApiSettings(
            self.fake_devrev.token,
            "https://api.example.com",
            calls,
            period,
            timeout,
            self.chance.choice((2, 5)),
            workers,
        )

    def _machine(self) -> SimulatedProcess:
        """The process of a run, with what will befall it."""
        process = SimulatedProcess(self.module, self.clock, self.fake_devrev, self.chance.randrange(1 << 32))
        process.network_faults, process.observer = self.network_faults, self.checker
        process.trace, process.tracing = self.trace, self.tracing
        if not self.in_peace and self.draws.has("kills", 0.6) and self.chance.random() < 0.7:
            if self.chance.random() < 0.5:
                process.kill_at = int(self.draws.somewhen(1, 1500))
            else:
                process.kill_after_merge = (int(self.draws.somewhen(1, 10)), int(self.draws.somewhen(1, 60)))
        process.killed_at_report = (
            not self.in_peace and self.draws.has("killed at its report", 0.1) and self.chance.random() < 0.4
        )
        if not self.in_peace and self.draws.has("a full disk", 0.06):
            process.full_at = int(self.draws.somewhen(1, 1000))
        return process

    def _is_undisturbed(self, settings: Any) -> bool:
        """Whether nothing but the quota keeps a run's requests waiting, and its windows are large enough for looks."""
        windows = [settings.calls] * bool(settings.calls)
        if self.fake_devrev.quota:
            windows.append(self.fake_devrev.quota.limit - 3 * self.fake_devrev.quota.others)
        disturbed = any(kind.startswith(DISTURBING) for kind in self.draws.drawn()) and not self.in_peace
        enough = 60 if self.fake_devrev.merge_delay < 3 else 1000  # for looks
        return not (disturbed or self.fake_devrev.faults) and min(windows, default=1000) >= enough

    def _run(self, argv: List[str], process: SimulatedProcess) -> Optional[int]:
        """One run; its exit code, None where it was killed."""
        module = self.module
        options = module.parse_options(argv)
        choices = self.choices if options.choices else {}
        rows: List[Row] = []
        if options.csv:
            with open("contacts.csv", newline="", encoding="utf-8") as file:
                rows = [Row(one[0], one[2], one[3], int(one[7]), one[5]) for one in list(csv.reader(file))[1:]]
        self.checker.begin(process, options, rows, choices)
        settings = self._settings(options.workers)
        self.checker.ceiling = settings.calls, settings.period
        self.checker.slowest = lambda: self.latency if self._is_undisturbed(settings) else None
        outside = environment_of(module, process, settings)
        scenario = self

        class Quiet(module.RunContext):  # type: ignore[misc, name-defined]
            TICK = 3600.0

            def on_signal(self, loop: Any, act: Callable[[], None]) -> None:
                scenario.signal(self, loop, act)

        self.counts["runs"] += 1
        self.trace(f"RUN {self.checker.run}: {' '.join(argv)} (ceiling {settings.calls} in {settings.period:g} s)")
        self.clock.last_progress = self.clock.now
        code: Optional[int] = None
        ended = True
        try:
            run = Quiet(options, outside)
            run.console = module.Console(True, SilentStream(), SilentStream())
            run.settings = settings
            run.log_path.touch()
            code = module.undo(run) if options.undo else module.merge(run)
        except Killed:
            self.counts["kills"] += 1
            ended = False
        except module.FatalError as stop:
            code, ended = stop.exit_code, False
            self.trace(f"refused: {stop}")
        finally:
            process.dead = True
            if process.connection:
                process.connection.close()
        self.trace(f"exit code {code}")
        full = process.full_at is not None and process.steps >= process.full_at
        reports = ended and not full and not options.preview
        self.rows = self.checker.after_run(run.report_path if reports else None, code)
        return code

    def signal(self, run: Any, loop: Any, act: Callable[[], None]) -> None:
        """Perhaps somebody presses Ctrl-C."""
        if not self.in_peace and self.draws.has("signals", 0.15) and self.chance.random() < 0.6:

            def arrive() -> None:
                self.counts["signals"] += 1
                self.trace("Ctrl-C")
                run.signal = 2
                act()
                self.checker.stopped = True

            loop.call_later(self.draws.somewhen(0.05, 100.0), arrive)

    def _between(self) -> None:
        """From one run to the next: time passes, and things get lost."""
        self.checker.process = None
        self.clock.advance(self.draws.somewhen(0.5, 200_000.0 if self.chance.random() < 0.3 else 100.0))
        lost = ""
        keeps = self.draws.has("undo", 0.2)  # what an undo names
        if not keeps and self.draws.has("reports lost", 0.08) and self.chance.random() < 0.5:
            self.checker.lose_reports()
            lost = "reports"
        if self.draws.has("savepoint lost", 0.15):
            if self.chance.random() < 0.5 and Path("savepoint.db").exists():
                self.checker.lose_savepoint()
                lost += " savepoint"
        elif self.draws.has("an old savepoint", 0.1) and Path("savepoint.db").exists():
            if not Path("old.db").exists():
                self._copy_savepoint("savepoint.db", "old.db")
            elif self.chance.random() < 0.5:
                self.checker.lose_savepoint()
                self._copy_savepoint("old.db", "savepoint.db")
                lost += " savepoint (an old one is put back)"
        elif (
            not keeps
            and self.draws.has("backups lost", 0.08)
            and self.chance.random() < 0.5
            and Path("backups").exists()
        ):
            self.checker.lose_backups()
            lost += " backups"
        if lost:
            self.counts["losses"] += 1
            self.trace(f"LOST: {lost}")

    @staticmethod
    def _copy_savepoint(old: str, new: str) -> None:
        """With what SQLite rolls back after a kill."""
        for tail in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                Path(new + tail).unlink()
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(old + tail, new + tail)

    def _leave_in_peace(self) -> None:
        """No more faults, edits or kills: after some runs everything is at its end."""
        self.trace("FROM HERE ON IN PEACE")
        self.in_peace = True
        self.fake_devrev.faults, self.fake_devrev.list_lag = [], 0.0
        self.organisation.ref_release = 0.0
        if self.fake_devrev.quota:
            self.fake_devrev.quota.others = 0
        self.clock.advance(1000.0)
        for path in self.undos:
            self._undo_in_peace(path)
        last = ""
        for _ in range(PEACEFUL_RUNS):
            self._export()
            if not self.exports[-1]:  # others have deleted everybody
                break
            self._write_csv(self.exports[-1])
            code = self._run(["--csv", "contacts.csv", "--yes", "--quiet"], self._machine())
            if code not in (0, 1, 3):
                raise InvariantBroken("a life that is left in peace ends", f"a run ends with exit code {code}")
            self.clock.advance(400.0)
            last, before = self.checker.standing(self.rows), last
            if code == 0 or last == before:  # the next run would do the same again
                break
        self.checker.after_life(self.rows, self.stuck)

    def _undo_in_peace(self, path: str) -> None:
        """The same command again finishes an undo; once more, and it changes nothing."""
        code, asked = None, 0
        for _ in range(PEACEFUL_RUNS):
            before, asked = code, len(self.fake_devrev.requests)
            code = self._run(["--undo", path, "--yes", "--quiet"], self._machine())
            self.clock.advance(400.0)
            if code not in (0, 1, 2, 3):  # 3: five that can't be taken back, one after the other
                raise InvariantBroken("a life that is left in peace ends", f"an undo ends with exit code {code}")
            if code == before:
                break
        wrote = [one.endpoint for one in self.fake_devrev.requests[asked:] if one.endpoint in WRITES]
        if code == 0 and wrote:
            raise InvariantBroken("a second undo does nothing", ", ".join(wrote))


# --------------------------------------------------------------------------------------------------
# Playing
# --------------------------------------------------------------------------------------------------


def play(seed: int, module: Any, trace: bool = False, echo: bool = False) -> Verdict:
    """Play one life in a folder of its own."""
    logging.getLogger("merge_contacts").setLevel(logging.CRITICAL + 1)
    home = Path.cwd()
    room = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="life-", dir=str(room) if os.access(str(room), os.W_OK) else None)
    os.chdir(folder)
    invariant, what = "", ""
    scenario = Scenario(seed, module, trace, echo)
    try:
        scenario.play()
    except InvariantBroken as broken:
        invariant, what = broken.invariant, broken.what
    except Exception as error:
        if trace:
            raise
        invariant, what = "the simulation itself holds", f"{type(error).__name__}: {error}"
    finally:
        os.chdir(str(home))
        shutil.rmtree(folder, ignore_errors=True)
    scenario.counts["requests"] = len(scenario.fake_devrev.requests)
    scenario.counts["merges"] = len(scenario.organisation.merges)
    for kind in scenario.draws.drawn():
        scenario.counts[f"drawn: {kind}"] += 1
    return Verdict(seed, invariant, what, tuple(scenario.events.lines), scenario.counts, scenario.clock.now)


_MODULE: Any = None


def play_quietly(seed: int) -> Verdict:
    global _MODULE
    if _MODULE is None:
        _MODULE = load()
    return play(seed, _MODULE)


def play_all(seeds: Sequence[int], jobs: int) -> Iterator[Verdict]:
    if jobs == 1:
        yield from map(play_quietly, seeds)
        return
    with multiprocessing.Pool(jobs) as pool:
        yield from pool.imap_unordered(play_quietly, seeds, chunksize=2)


def explain(verdict: Verdict, module: Any) -> str:
    """A failing life, for people: played again with its events."""
    again = play(verdict.seed, module, trace=True) if not verdict.events else verdict
    return "\n".join(
        [
            *again.events,
            "",
            f"seed {verdict.seed} breaks an invariant: {verdict.invariant}",
            f"    {verdict.what}",
            f"play it again with: python -m tests.simulate --seed {verdict.seed} --trace",
        ]
    )


def summary(verdicts: int, seconds: float, counts: "Counter[str]", spent: float) -> str:
    parts = [f"{verdicts} lives", f"{seconds / 86400:.1f} simulated days"]
    parts += [f"{counts[name]} {name}" for name in ("runs", "requests", "merges", "kills", "edits")]
    kinds = ", ".join(f"{kind[7:]} {n}" for kind, n in sorted(counts.items()) if kind.startswith("drawn: "))
    return f"{', '.join(parts)} in {spent:.1f} s; drawn: {kinds}"


def kept_seeds() -> List[int]:
    """The seeds that have found something once."""
    lines = SEEDS.read_text(encoding="utf-8").splitlines() if SEEDS.exists() else []
    return [int(line.split()[0]) for line in lines if line.strip() and not line.startswith("#")]


def play_many(seeds: Sequence[int], jobs: int, keep_going: bool = False) -> int:
    begun, counts, seconds, failed = time.monotonic(), Counter(), 0.0, []  # type: Any, Counter[str], float, List[Verdict]
    for number, verdict in enumerate(play_all(seeds, jobs), 1):
        counts.update(verdict.counts)
        seconds += verdict.seconds
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{number} of {len(seeds)} lives, {len(failed)} failed ")
        if verdict.invariant:
            failed.append(verdict)
            if not keep_going:
                break
            print(f"seed {verdict.seed}: {verdict.invariant}: {verdict.what[:300]}", flush=True)
    print(summary(number, seconds, counts, time.monotonic() - begun))
    if failed and not keep_going:
        print(explain(failed[0], load()))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", metavar="N", type=int, help="play so many lives")
    parser.add_argument("--start", metavar="S", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--jobs", metavar="J", type=int, default=1, help="in so many processes")
    parser.add_argument(
        "--keep-going", action="store_true", help="a line for each life that fails, instead of stopping"
    )
    parser.add_argument("--seed", metavar="S", type=int, help="play one life")
    parser.add_argument("--trace", action="store_true", help="with --seed: show all of it")
    parser.add_argument("--kept", action="store_true", help="play the seeds that have failed once")
    parser.add_argument("--mutants", action="store_true", help="take out the module's safety lines, one at a time")
    parser.add_argument(
        "--only", metavar="WORDS", default="", help="with --mutants: those with these words in the name"
    )
    options = parser.parse_args()
    if options.mutants:
        from tests.mutants import table

        return table(options.jobs, options.only)
    if options.seed is not None:
        verdict = play(options.seed, load(), trace=True, echo=options.trace)
        if verdict.invariant:
            print(explain(verdict, None))
        elif options.trace:
            print("\n".join(verdict.events))
        print(summary(1, verdict.seconds, verdict.counts, 0.0))
        return 1 if verdict.invariant else 0
    seeds = kept_seeds() if options.kept else range(options.start, options.start + (options.seeds or 100))
    return play_many(list(seeds), options.jobs, options.keep_going)


if __name__ == "__main__":
    raise SystemExit(main())
