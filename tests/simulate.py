"""Scenarios of an organisation and of the runs over it, in simulated time, from a seed.

    python -m tests.simulate --seeds 400 --jobs 2      play scenarios, stop at the first that breaks an invariant
    python -m tests.simulate --seed 17 --trace         play one again, step by step

How to read a failing scenario is in tests/README.md.
"""

import argparse
import logging
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from tests.fake.organisation import org_id_of
from tests.fake.trouble import Fault, Request
from tests.fake.world import SWITCHES, World
from tests.simulation.concurrent_edits import ConcurrentEdits
from tests.simulation.expected import COPY, MAIN, STOPPING, Ids, Row, export_of, instant
from tests.simulation.organisations import Draws, OrganisationBuilder, quota_of, set_switches
from tests.simulation.scene import Run, Stage
from tests.simulation.world import (
    EPOCH,
    Clock,
    InvariantBroken,
    NetworkFaults,
    SimulatedProcess,
    Trace,
    load,
    short,
)

# What makes requests wait:
DISTURBING = (
    "requests ", "merges unheard", "naps", "a clock", "others spend", "windows roll", "no quota headers",
    "waits told elsewhere", "polls that", "a poll that hangs", "empty pages", "short pages", "answers: ",
    "fields that can't be set",
)  # fmt: skip
OLD = Path("old")  # files of the savepoint, as they were once


class Verdict(NamedTuple):
    """How a scenario has ended."""

    seed: int
    invariant: str = ""  # that was broken
    what: str = ""
    events: Tuple[str, ...] = ()
    counts: "Counter[str]" = Counter()
    seconds: float = 0.0  # simulated


# --------------------------------------------------------------------------------------------------
# A scenario
# --------------------------------------------------------------------------------------------------


class Scenario(Stage):
    """An organisation, and runs over it until everything has ended, drawn from a seed."""

    def __init__(self, seed: int, module: Any, trace: bool = False, echo: bool = False) -> None:
        self.seed = seed
        self.draws = draws = Draws(seed)
        self.chance = draws.random
        self.counts: Counter[str] = Counter()
        clock = Clock()
        organisation = OrganisationBuilder(draws).build()
        world = self._make_world(organisation, clock)
        super().__init__(module, world, clock, Trace(clock, None if echo else 60))
        self.tracing = trace
        self.checker.reasons.trouble = set_switches(self.world, draws)
        self.others = ConcurrentEdits(self)
        self.latency = draws.somewhen(0.01, 0.4)
        self.exports: List[List[Row]] = []
        # Of its own, so that kept seeds stay the scenarios that they were.
        self.rare = random.Random(seed + 2)
        self.may_not_merge, self.has_foreign_exports = (
            self.rare.random() < 0.06 and not draws.calm for _ in range(2)
        )
        self._describe()

    def _make_world(self, organisation: Any, clock: Clock) -> World:
        draws = self.draws
        is_slow = draws.has("slow merges", 0.2)
        delay = draws.somewhen(0.5, 60.0) if is_slow else draws.somewhen(0.02, 3.0)
        return World(
            organisation,
            lambda: clock.now,
            lambda: EPOCH + clock.now,
            merge_delay=delay,
            gone=self.chance.choice(World.GONE),
            quota=quota_of(draws),
            seed=self.seed,
            on_request=self._on_request,
        )

    def _describe(self) -> None:
        world, quota = self.world, self.world.quota
        shown = f"{quota.limit} in {quota.window:g} s" if quota else "none"
        self.trace(
            f"merges take {world.merge_delay:.2f} s, quota {shown}, latency {self.latency:.3f} s"
        )
        plain = World
        for name in sorted(SWITCHES - {"merge_delay"}):
            if getattr(world, name) != getattr(plain, name, {}):
                self.trace(f"  {name}: {getattr(world, name)}")
        for one in self.organisation.contacts.values():
            email, reference, org = (
                one.get("email"),
                one["external_ref"],
                (org_id_of(one) or "-")[-5:],
            )
            unverified = " unverified" if one["id"] in self.organisation.unverified else ""
            self.trace(f"  {short(one['id'])} {email} {reference} {one['state']} {org}{unverified}")

    # ----- what happens meanwhile ------------------------------------------------------------------

    def of_interest(self) -> List[str]:
        return [one for pair in self.checker.plan for one in pair]

    def visit(self, ids: Ids) -> str:
        """The application identifies the person of a pair."""
        wanted = self.checker.known[ids][-1]
        primary = self.organisation.contacts.get(ids[0])
        if primary is None or wanted.new_ref is None:
            return ""
        org = (org_id_of(primary) or "").rpartition("/")[2] or None
        found = self.organisation.visit(wanted.primary.email, wanted.new_ref, org)
        return f"the application meets {wanted.new_ref}: {short(found)}"

    def _on_request(self, stage: str, request: Request) -> None:
        self.checker.undo.heard(stage, request)
        if stage == "before" or request.endpoint != "rev-users.merge" or self.in_peace:
            return
        ids = request.body["primary_user"], request.body["secondary_user"]
        if self.draws.has("a visit in the gap", 0.2) and self.chance.random() < 0.4:
            when = self.world.merge_delay + self.draws.somewhen(0.01, 5.0)
            self.world.later(when, lambda: self.trace(f"OTHERS {self.visit(ids)}"))

    def _edits(self) -> None:
        """Let others act at some times from now on."""
        if self.draws.has("others", 0.5):
            for _ in range(self.chance.randint(1, 6)):
                self.world.later(self.draws.somewhen(0.1, 600.0), self._act)

    def _act(self) -> None:
        if not self.in_peace:
            self.others.act()

    # ----- network and faults ----------------------------------------------------------------------

    def network_faults(self, endpoint: str) -> NetworkFaults:
        there, back = (self.latency * self.chance.uniform(0.3, 1.0) for _ in range(2))
        if self.in_peace:
            return NetworkFaults(there, back)
        for kind, chance in (
            ("refused", 0.03),
            ("lost", 0.04),
            ("unheard", 0.05),
            ("late", 0.03),
            ("twice", 0.03),
        ):
            if self.draws.has(f"requests {kind}", 0.15) and self.chance.random() < chance:
                self.counts[kind] += 1
                self.checker.others_spent += kind in ("twice", "late")
                return NetworkFaults(there, back, kind)
        rare = endpoint in ("rev-users.merge", "rev-users.create")
        if rare and self.draws.has("merges unheard", 0.15) and self.chance.random() < 0.3:
            self.counts["unheard"] += 1
            return NetworkFaults(
                there, back, self.chance.choice(("unheard", "lost", "late", "twice"))
            )
        return NetworkFaults(there, back)

    def faults(self) -> List[Fault]:
        """Draw what goes wrong on DevRev's side during a run."""
        found = []
        for kind, chance in (
            ("500", 0.05), ("503", 0.05), ("502", 0.03), ("html-200", 0.03), ("html-403", 0.01), ("429", 0.03),
            ("429-bare", 0.03), ("429-body", 0.03), ("route-404", 0.02), ("redirect", 0.01), ("hang", 0.02),
            ("hang-after", 0.02), ("500-after", 0.05), ("cut", 0.03), ("reset-before", 0.03), ("reset-after", 0.03),
            ("slow", 0.05), ("drip", 0.01), ("nested", 0.01), ("endless", 0.02), ("400", 0.01), ("403", 0.01),
            ("409", 0.02), ("410", 0.01), ("413", 0.01), ("doubled", 0.03), ("half-emoji", 0.03), ("odd-quota", 0.03),
        ):  # fmt: skip
            if self.draws.has(f"answers: {kind}", 0.07):
                detail = (
                    self.chance.choice(("email", "external_ref", "state", "id"))
                    if kind == "half-emoji"
                    else None
                )
                detail = (detail,) if detail and self.chance.random() < 0.3 else None
                found.append(Fault(kind, chance=chance, detail=detail))
        if self.draws.has("no merge is carried out", 0.04) and self.chance.random() < 0.6:
            found.append(Fault("merge-never"))
        for kind, detail in (
            ("merge-never", None), ("merge-leaves", None), ("merge-doubled", self.draws.somewhen(0.1, 60.0)),
            ("merge-slow", self.draws.somewhen(1.0, 400.0)),
            ("merge-refused-late", (self.chance.choice((400, 403, 409)), self.draws.somewhen(0.1, 300.0))),
        ):  # fmt: skip
            if self.draws.has(kind, 0.12):
                found.append(Fault(kind, chance=0.4, detail=detail))
        if self.draws.has("a poll that hangs", 0.08):
            found.append(Fault("hang", "rev-users.get", chance=0.3))
        if self.undos and self.draws.has("contacts refused", 0.2):
            kind = self.chance.choice(("400", "403", "409", "500-after"))
            found.append(Fault(kind, "rev-users.create", chance=0.5))
        doubled = self.draws.has("requests twice", 0.15) or self.draws.has("answers: doubled", 0.07)
        if (
            self.draws.has("answers: not so", 0.08) and not doubled
        ):  # the second may be made all the same
            found.append(
                Fault("changed", "rev-users.update", chance=0.3, detail=self._forget_update)
            )
            found.append(Fault("changed", "rev-users.get", chance=0.05, detail=self._garble))
        if self.draws.has("a poll finds nothing", 0.08):
            found.append(Fault("404", "rev-users.get", chance=0.1))
            self.checker.lies = True
        self.checker.lies |= any(fault.kind in ("endless", "half-emoji") for fault in found)
        return found

    def _forget_update(self, content: Dict[str, Any]) -> Dict[str, Any]:
        """Answer an update with 200 and the reference as it was, because it was not made."""
        user = content.get("rev_user")
        times = self.organisation.reference_times[user["id"]] if isinstance(user, dict) else []
        just_now = len(times) > 1 and times[-1][0] == self.organisation.now()
        if just_now and user["id"] in self.organisation.contacts:
            old = times[-2][1]
            self.organisation.change(self.organisation.contacts[user["id"]], external_ref=old)
            del times[-2:]
            content["rev_user"] = {**user, "external_ref": old}
        return content

    def _garble(self, content: Dict[str, Any]) -> Dict[str, Any]:
        identity = (content.get("rev_user") or {}).get("id")
        return dict(
            self.chance.choice(
                ({}, {"rev_user": None}, {"rev_user": {"id": identity}}, {"rev_user": {}})
            )
        )

    def _disturb(self) -> None:
        """Draw what the coming run meets on DevRev's side."""
        chance, world = self.chance, self.world
        world.faults = self.faults()
        world.forbidden = (
            ("rev-users.merge",) if self.may_not_merge and self.rare.random() < 0.5 else ()
        )
        world.list_lag = (
            self.draws.somewhen(0.5, 30.0) if self.draws.has("lists lag", 0.15) else 0.0
        )
        self.checker.lag = max(self.checker.lag, world.list_lag)
        held = self.draws.has("references held", 0.1)
        self.organisation.ref_release = self.draws.somewhen(0.1, 60.0) if held else 0.0
        if self.draws.has("stuck references", 0.05):
            stuck = [
                one["external_ref"]
                for one in self.organisation.contacts.values()
                if chance.random() < 0.1
            ]
            self.organisation.stuck_references.update(stuck)
            self.stuck.update(stuck)
        if world.quota and self.draws.has("others spend quota", 0.15):
            self.checker.others_spent += 1
            for _ in range(3):
                units = chance.randint(1, world.quota.limit)
                world.later(self.draws.somewhen(0.1, 600.0), lambda units=units: self._spend(units))
        if self.draws.has("contacts vanish", 0.05):
            world.later(self.draws.somewhen(0.1, 300.0), self._vanish)
        if self.draws.has("a token revoked", 0.05):
            world.later(self.draws.somewhen(0.1, 200.0), self._revoke)
        for _ in range(chance.randint(0, 3)):
            if self.draws.has("naps", 0.12):
                world.later(self.draws.somewhen(0.2, 300.0), self._nap)
            elif self.draws.has("a clock that is set", 0.08):
                world.later(self.draws.somewhen(0.2, 300.0), self._set_clock)

    def _spend(self, units: int) -> None:
        if self.world.quota and not self.in_peace:
            self.trace(f"OTHERS spend {units} units of quota")
            self.world.quota.spend(units)

    def _vanish(self) -> None:
        """Contacts, or all of them, are as if they did not exist, for some seconds."""
        interest = self.of_interest()
        if self.in_peace or not interest:
            return
        some = tuple(self.chance.sample(sorted(interest), min(2, len(interest))))
        self.world.vanished = "*" if self.chance.random() < 0.3 else some
        self.trace(f"VANISHED: {', '.join(map(short, self.world.vanished))}")
        self.checker.lies = True
        self.world.later(self.draws.somewhen(0.5, 60.0), self._appear)

    def _appear(self) -> None:
        self.world.vanished = ()
        self.trace("all contacts are there again")

    def _revoke(self) -> None:
        """The token of this run is not accepted any more; the next run has the new one."""
        if not self.in_peace:
            self.trace("OTHERS revoke the token")
            self.world.token += "x"

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
            self.trace(f"the clock is set by {seconds:.0f} s")
            self.clock.set_by += seconds

    # ----- exports and options ---------------------------------------------------------------------

    def export_rows(self) -> List[Row]:
        """Make a new export, as the warehouse has it."""
        rows = export_of(self.organisation)
        if self.draws.has("wrong counts", 0.1) and not self.in_peace:
            rows = [
                row._replace(tickets=max(0, row.tickets + self.chance.choice((-1, 1))))
                if self.chance.random() < 0.2
                else row
                for row in rows
            ]
        if self.draws.has("a warehouse in lower case", 0.1):
            rows = [row._replace(email=row.email.lower()) for row in rows]
        if self.draws.has("dates of other forms", 0.2):
            rows = [row._replace(created=self._written(row.created)) for row in rows]
        self.chance.shuffle(rows)
        self.exports.append(rows)
        self.trace(f"an export: {len(rows)} contacts")
        return rows

    def _written(self, created: str) -> str:
        """Write a date in one of the forms that a warehouse has, for the same instant."""
        form, moment = self.chance.choice(("Z", "space", "zone")), instant(created)
        if form == "Z":
            return created
        shift = 0 if form == "space" else self.chance.choice((2, -5))
        text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment + 3600 * shift))
        return text if form == "space" else f"{text} {'+' if shift > 0 else '-'}{abs(shift):02d}:00"

    def _options(self) -> List[str]:
        """Draw the command line of a run, and write the files that it names."""
        chance, draws = self.chance, self.draws
        if not self.exports or chance.random() < 0.4:
            self.export_rows()
        rows = self.exports[-1] if chance.random() < 0.8 else chance.choice(self.exports)
        if self.has_foreign_exports and self.rare.random() < 0.3:
            rows = [row._replace(id=row.id.replace(":devo/", ":devo/OTHER")) for row in rows]
        self.write_csv(rows)
        options = [
            "--csv",
            "contacts.csv",
            "--yes",
            "--quiet",
            "--workers",
            str(chance.choice((1, 2, 8, 8, 32))),
        ]
        options += ["--merge-timeout", f"{draws.somewhen(2.0, 300.0):.1f}"]
        if draws.has("--limit", 0.2) and chance.random() < 0.6:
            options += ["--limit", str(chance.randint(1, 4))]
        names: List[str] = []
        if draws.has("--email", 0.15) and chance.random() < 0.5:
            names = [row.email for row in chance.sample(rows, min(3, len(rows)))]
        stopped = {row["email"] for row in self.rows.values() if row["state"] in STOPPING}
        there = sorted(stopped & {row.key for row in rows})
        if there and draws.has("a stopped pair is named", 0.5) and chance.random() < 0.5:
            names.append(chance.choice(there))
        options += [word for name in names for word in ("--email", name)]
        if draws.has("--count-policy", 0.2):
            options += ["--count-policy", "at-least"]
        if draws.has("--no-timelines", 0.7 if draws.has("huge") else 0.1):
            options += ["--no-timelines"]
        if draws.has("--choices", 0.15) and self._write_choices(rows):
            options += ["--choices", "choices.csv"]
        return options + self.manner()

    def manner(self) -> List[str]:
        """Return the options that stay the same for the whole scenario."""
        options = (
            ["--primary", "user"]
            if self._knows("--primary") and self.draws.has("--primary user", 0.15)
            else []
        )
        for name, chance in (
            ("--carry-fields", 0.2),
            ("--across-workspaces", 0.1),
            ("--try-unverified", 0.1),
        ):
            if self._knows(name) and self.draws.has(name, chance):
                options.append(name)
        return options

    def _knows(self, option: str) -> bool:
        return option in self.module.build_parser().format_help()

    def _write_choices(self, rows: Sequence[Row]) -> bool:
        """Choose for some of the groups that can't be told."""
        groups: Dict[str, List[Row]] = {}
        for row in rows:
            if row.takes_part:
                groups.setdefault(row.key, []).append(row)
        chosen = []
        for group in groups.values():
            users = [row for row in group if row.ref.startswith("user_")]
            if self.chance.random() < 0.6 and (users or len(group) > 1):
                chosen.append(self.chance.choice(users or group))
        with open("choices.csv", "w", encoding="utf-8") as file:
            file.write("EMAIL,EXTERNAL_REF\n" + "".join(f"{row.key},{row.ref}\n" for row in chosen))
        return bool(chosen)

    def make_settings(self, workers: int) -> Any:
        calls, period = 0, 60.0
        if self.chance.random() < 0.2:
            calls, period = self.chance.choice(
                ((3, 2.0), (10, 6.0), (60, 6.0), (200, 60.0), (30, 60.0))
            )
        timeout = self.chance.choice((2.0, 5.0, 30.0))
        return self.module.ApiSettings(
            token=self.world.token,
            base_url="https://api.example.com",
            calls=calls,
            period=period,
            timeout=timeout,
            retries=self.chance.choice((2, 5)),
            workers=workers,
        )

    # ----- runs ------------------------------------------------------------------------------------

    def play(self) -> None:
        """Play some runs in which anything may happen, then runs in peace."""
        Path("reports").mkdir()
        Path("logs").mkdir()
        self.export_rows()
        for _ in range(1 if self.draws.calm else self.chance.randint(1, 4)):
            self._edits()
            self._disturb()
            self._run(self._options(), self.make_process())
            self._between()
            if self.draws.has("undo", 0.2) and self.chance.random() < 0.6:
                self._undo()
            if self.draws.has("settle", 0.25) and self.chance.random() < 0.6:
                self._settle()
        self.leave_in_peace()

    def _undo(self) -> None:
        """Undo merges: those of a backup or of a report, an old one as well."""
        found = (
            [str(one) for one in sorted(Path("backups").glob("*/*/"))]
            if Path("backups").exists()
            else []
        )
        found += [str(one) for one in sorted(Path("reports").glob("merge_report_*.json"))]
        if not found:
            return
        again = self.undos and self.chance.random() < 0.5
        path = self.chance.choice(self.undos if again else found)
        options = ["--undo", path, "--quiet", "--workers", str(self.chance.choice((1, 2, 8)))]
        options += ["--merge-timeout", f"{self.draws.somewhen(2.0, 300.0):.1f}"]
        if self.chance.random() < 0.1:
            options += ["--preview"]
        else:
            options += ["--yes"]
            self.undos += [path] if path not in self.undos else []
        self._edits()
        self._disturb()
        if self.draws.has("primaries go while an undo is open", 0.2):
            self.world.later(self.draws.somewhen(0.1, 60.0), self._take_primary)
        self._run(options, self.make_process())
        self._between()

    def _take_primary(self) -> None:
        """Somebody merges the primary of an open undo onward, or deletes it."""
        there = sorted({ids[0] for ids in self.checker.undo.open()})
        there = [one for one in there if self.organisation.alive(one)]
        if self.in_peace or not there:
            return
        primary = self.chance.choice(there)
        others = [one for one in self.organisation.contacts if self.organisation.alive(one)]
        others.remove(primary)
        if others and self.chance.random() < 0.5:
            self.trace(f"OTHERS merge the primary {short(primary)} onward")
            self.organisation.merge(self.chance.choice(others), primary)
        else:
            self.trace(f"OTHERS delete the primary {short(primary)}")
            self.organisation.delete_contact(primary)

    def _settle(self) -> None:
        """Settle some of what a report has named as unfinished; DevRev may carry out what was cancelled later."""
        emails = self.unfinished_emails()
        if not emails:
            return
        chosen = self.chance.sample(emails, self.chance.randint(1, len(emails)))
        self._run(["--settle", *chosen, "--yes", "--quiet"], self.make_process())
        for ids, row in self.rows.items():
            if row["state"] != "cancelled":
                continue
            if self.draws.has("a cancelled duplicate goes elsewhere", 0.2):
                when = self.draws.somewhen(0.1, 1000.0)
                self.world.later(when, lambda ids=ids: self._send_elsewhere(ids))
            elif self.draws.has("a cancelled merge is carried out", 0.6):
                when = self.draws.somewhen(0.1, 100_000.0)
                self.world.later(when, lambda ids=ids: self._carry_out(ids))
        self._between()

    def _send_elsewhere(self, ids: Ids) -> None:
        """Somebody merges a cancelled duplicate into another contact, or deletes it."""
        others = [one for one in self.organisation.contacts if self.organisation.alive(one)]
        if self.in_peace or not self.organisation.alive(ids[1]) or len(others) < 3:
            return
        other = self.chance.choice([one for one in others if one not in ids])
        if self.chance.random() < 0.5:
            self.trace(f"OTHERS merge the cancelled {short(ids[1])} into {short(other)}")
            self.organisation.merge(other, ids[1])
        else:
            self.trace(f"OTHERS delete the cancelled {short(ids[1])}")
            self.organisation.delete_contact(ids[1])

    def _carry_out(self, ids: Ids) -> None:
        if not self.in_peace and all(map(self.organisation.alive, ids)):
            self.trace(
                f"DevRev carries out the cancelled merge of {short(ids[1])} into {short(ids[0])}"
            )
            self.organisation.merge(*ids)

    def make_process(self) -> SimulatedProcess:
        """Make the process of a run, with what will befall it."""
        process = SimulatedProcess(
            self.module, self.clock, self.world, self.chance.randrange(1 << 32)
        )
        process.network_faults, process.observer = self.network_faults, self.checker
        process.trace, process.tracing = self.trace, self.tracing
        if self.in_peace:
            return process
        chance, draws = self.chance, self.draws
        if draws.has("kills", 0.6) and chance.random() < 0.7:
            kind = chance.random()
            if kind < 0.4:
                process.kill_at = int(draws.somewhen(1, 1500))
            elif kind < 0.8:
                process.kill_after_merge = (int(draws.somewhen(1, 10)), int(draws.somewhen(1, 60)))
            else:
                process.kill_between = int(draws.somewhen(1, 8))
        process.killed_at_report = draws.has("killed at its report", 0.1) and chance.random() < 0.4
        if draws.has("a full disk", 0.1) and chance.random() < 0.4:
            process.full_intent = chance.choice((MAIN.name, COPY.name)), int(draws.somewhen(1, 6))
        elif draws.has("a full disk", 0.1):
            process.full_at = int(draws.somewhen(1, 1000))
            process.full_for = chance.choice(
                ("", "", "of savepoint.db", "savepoint-copy.db", "commit", "of")
            )
        return process

    def _is_undisturbed(self, settings: Any) -> bool:
        """Return whether nothing but the quota keeps a run's requests waiting, and its windows are large enough for
        polls."""
        windows = [settings.calls] * bool(settings.calls)
        if self.world.quota:
            windows.append(self.world.quota.limit - 3 * self.world.quota.others)
        disturbed = (
            any(kind.startswith(DISTURBING) for kind in self.draws.drawn()) and not self.in_peace
        )
        odd = any(
            kind.startswith(("polls that", "no quota", "windows", "empty", "short"))
            for kind in self.draws.drawn()
        )
        enough = 60 if self.world.merge_delay < 3 else 1000  # for polls
        return not (disturbed or odd or self.world.faults) and min(windows, default=1000) >= enough

    def _run(self, argv: List[str], process: SimulatedProcess) -> Run:
        """Play one run; where it is refused because the savepoint was put back, move the named report away and go on."""
        run = self.play_run(argv, process)
        for _ in range(10):
            found = re.search(r"(?:merge|undo)_report_\d+_\d+\.json", run.refusal)
            if not (found and run.code == 2 and "put back" in run.refusal):
                break
            self.trace(f"the report {found.group()} is moved away")
            self.counts["put back"] += 1
            self.checker.reports.lose(found.group())
            run = self.play_run(argv, self.make_process())
        return run

    def run_in_peace(self, argv: Sequence[str]) -> Run:
        return self._run(list(argv), self.make_process())

    def play_run(self, argv: Sequence[str], process: SimulatedProcess) -> Run:
        run = super().play_run(argv, process)
        self.counts["kills"] += run.killed
        return run

    def before_run(self, settings: Any) -> None:
        self.counts["runs"] += 1
        self.checker.slowest = lambda: self.latency if self._is_undisturbed(settings) else None

    def on_signal(self, run: Any, loop: Any, act: Callable[[], None]) -> None:
        """Perhaps the user presses Ctrl-C."""
        if not self.in_peace and self.draws.has("signals", 0.15) and self.chance.random() < 0.6:

            def arrive() -> None:
                self.counts["signals"] += 1
                self.trace("Ctrl-C")
                run.signal = 2
                act()
                if not self.checker.stopped:
                    self.checker.stopped, self.checker.interrupted = True, self.clock.now

            loop.call_later(self.draws.somewhen(0.05, 100.0), arrive)

    # ----- between runs ----------------------------------------------------------------------------

    def _between(self) -> None:
        """From one run to the next: time passes, and things get lost."""
        self.checker.process = None
        self.clock.advance(
            self.draws.somewhen(0.5, 200_000.0 if self.chance.random() < 0.3 else 100.0)
        )
        keeps = self.draws.has("undo", 0.2)  # what an undo names
        lost = []
        if not keeps and self.draws.has("reports lost", 0.08) and self.chance.random() < 0.5:
            self.checker.reports.lose()
            lost.append("all reports")
        kinds = [
            kind
            for kind, chance in (
                ("savepoint lost", 0.1), ("copy lost", 0.08), ("an old savepoint", 0.08), ("an old copy", 0.06),
                ("both put back", 0.08), ("both lost", 0.03), ("backups lost", 0.06),
            )
            if self.draws.has(kind, chance)
        ]  # fmt: skip
        if kinds and self.chance.random() < 0.5 and MAIN.exists():
            lost.append(self._lose(self.chance.choice(kinds), keeps))
        if MAIN.exists() and not OLD.exists():
            OLD.mkdir()
            for path in (MAIN, COPY):
                for tail in ("", "-journal"):
                    if Path(f"{path}{tail}").exists():
                        shutil.copy(f"{path}{tail}", f"{OLD / path.name}{tail}")
        if any(lost):
            self.counts["losses"] += 1
            self.trace(f"LOST: {', '.join(filter(None, lost))}")

    def _lose(self, kind: str, keeps: bool) -> str:
        """Let one thing get lost, or be put back from an older backup."""
        files = {"savepoint lost": (MAIN,), "copy lost": (COPY,), "both lost": (MAIN, COPY)}
        if kind in files:
            for path in files[kind]:
                self.checker.lose_file(path)
        elif kind == "backups lost":
            if keeps or not Path("backups").exists():
                return ""
            self.checker.lose_backups()
        else:
            if not OLD.exists():
                return ""
            put_back = {"an old savepoint": (MAIN,), "an old copy": (COPY,)}.get(kind, (MAIN, COPY))
            for path in put_back:
                self.checker.lose_file(path, OLD / path.name, forget=path == put_back[-1])
            if len(put_back) == 2 and self.chance.random() < 0.5:
                self._put_back_reports()
        return kind

    def _put_back_reports(self) -> None:
        """The whole folder is put back: reports that are newer than its savepoint are not there either."""
        known = self.checker.known_runs()
        for path in sorted(Path("reports").glob("*_report_*.json")):
            if path.stem.partition("_report_")[2] not in known:
                self.checker.reports.lose(path.name)


# --------------------------------------------------------------------------------------------------
# Playing
# --------------------------------------------------------------------------------------------------


def play(seed: int, module: Any, trace: bool = False, echo: bool = False) -> Verdict:
    """Play one scenario in a folder of its own."""
    logging.getLogger("merge_contacts").setLevel(logging.CRITICAL + 1)
    home = Path.cwd()
    room = Path("/dev/shm")
    folder = tempfile.mkdtemp(
        prefix="scenario-", dir=str(room) if os.access(str(room), os.W_OK) else None
    )
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
        invariant, what = "the simulation itself works", f"{type(error).__name__}: {error}"
    finally:
        os.chdir(str(home))
        shutil.rmtree(folder, ignore_errors=True)
    scenario.counts["requests"] = len(scenario.world.requests)
    scenario.counts["merges"] = len(scenario.organisation.merges)
    for row in scenario.rows.values():
        scenario.counts[f"ended: {row['state']}"] += 1
    for kind in scenario.draws.drawn():
        scenario.counts[f"drawn: {kind}"] += 1
    return Verdict(
        seed, invariant, what, tuple(scenario.events.lines), scenario.counts, scenario.clock.now
    )


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
    """Describe a failing scenario for people: it is played again with its events."""
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
    parts = [f"{verdicts} scenarios", f"{seconds / 86400:.1f} simulated days"]
    parts += [f"{counts[name]} {name}" for name in ("runs", "requests", "merges", "kills", "edits")]
    kinds = ", ".join(
        f"{kind[7:]} {n}" for kind, n in sorted(counts.items()) if kind.startswith("drawn: ")
    )
    states = ", ".join(
        f"{state[7:]} {n}" for state, n in sorted(counts.items()) if state.startswith("ended: ")
    )
    return f"{', '.join(parts)} in {spent:.1f} s; pairs: {states}; drawn: {kinds}"


def play_many(seeds: Sequence[int], jobs: int, keep_going: bool = False) -> int:
    begun, counts, seconds, failed = time.monotonic(), Counter(), 0.0, []  # type: Any, Counter[str], float, List[Verdict]
    for number, verdict in enumerate(play_all(seeds, jobs), 1):
        counts.update(verdict.counts)
        seconds += verdict.seconds
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{number} of {len(seeds)} scenarios, {len(failed)} failed ")
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
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # half an emoji is no UTF-8
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulate", description=__doc__.splitlines()[0]
    )  # type: ignore[union-attr]
    parser.add_argument("--seeds", metavar="N", type=int, help="play so many scenarios")
    parser.add_argument(
        "--start", metavar="S", type=int, default=1, help="the first seed (default 1)"
    )
    parser.add_argument("--jobs", metavar="J", type=int, default=1, help="in so many processes")
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="a line for each scenario that fails, instead of stopping",
    )
    parser.add_argument("--seed", metavar="S", type=int, help="play one scenario")
    parser.add_argument("--trace", action="store_true", help="with --seed: show all of it")
    options = parser.parse_args()
    if options.seed is not None:
        verdict = play(options.seed, load(), trace=True, echo=options.trace)
        if verdict.invariant:
            print(explain(verdict, None))
        elif options.trace:
            print("\n".join(verdict.events))
        print(summary(1, verdict.seconds, verdict.counts, 0.0))
        return 1 if verdict.invariant else 0
    seeds = range(options.start, options.start + (options.seeds or 100))
    return play_many(list(seeds), options.jobs, options.keep_going)


if __name__ == "__main__":
    raise SystemExit(main())
