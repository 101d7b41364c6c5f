"""Scenarios of an organisation and of the runs over it, in simulated time, from a seed.

    python -m tests.simulate --seeds 400 --jobs 2      play scenarios, a line for each that fails
    python -m tests.simulate --seed 17                 play one again, and show all that happens

How to read a failing scenario is in tests/README.md.
"""

from __future__ import annotations

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
import traceback
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

from tests.fake.organisation import org_id_of
from tests.fake.trouble import Fault, Request
from tests.fake.world import SWITCHES, World
from tests.simulation import expected
from tests.simulation.concurrent_edits import ConcurrentEdits
from tests.simulation.expected import COPY, MAIN, STOPPING, Ids, Row, groups_of, instant, pairs_in
from tests.simulation.organisations import Draws, OrganisationBuilder, quota_of, set_switches
from tests.simulation.scene import FILES, Run, Stage, the_module
from tests.simulation.world import InvariantBroken, NetworkFaults, Nth, SimulatedProcess, short

# What makes requests wait:
DISTURBING = (
    "requests ", "merges unheard", "naps", "a clock", "others spend", "windows roll",
    "no quota headers", "waits told elsewhere", "polls that", "a poll that hangs", "empty pages",
    "short pages", "answers: ", "fields that can't be set",
)  # fmt: skip
DISTURBING_FOR_GOOD = (
    "polls that", "windows roll", "no quota headers", "empty pages", "short pages"
)  # fmt: skip
NETWORK_FAULTS = {"refused": 0.03, "lost": 0.04, "unheard": 0.05, "late": 0.03, "twice": 0.03}
ANSWERS = {
    "500": 0.05, "503": 0.05, "502": 0.03, "html-200": 0.03, "html-403": 0.01, "429": 0.03,
    "429-bare": 0.03, "429-body": 0.03, "route-404": 0.02, "redirect": 0.01, "hang": 0.02,
    "hang-after": 0.02, "500-after": 0.05, "cut": 0.03, "reset-before": 0.03, "reset-after": 0.03,
    "slow": 0.05, "drip": 0.01, "nested": 0.01, "endless": 0.02, "400": 0.01, "403": 0.01,
    "409": 0.02, "410": 0.01, "413": 0.01, "doubled": 0.03, "half-emoji": 0.03, "odd-quota": 0.03,
}  # fmt: skip
LOSSES = {
    "savepoint lost": 0.1, "copy lost": 0.08, "an old savepoint": 0.08, "an old copy": 0.06,
    "both put back": 0.08, "both lost": 0.03, "backups lost": 0.06,
}  # fmt: skip


class Verdict(NamedTuple):
    """How a scenario has ended."""

    seed: int
    invariant: str  # that was broken
    what: str
    events: list[str]
    counts: Counter[str]
    seconds: float  # simulated


class Scenario(Stage):
    """An organisation, and runs over it until everything has ended, drawn from a seed."""

    def __init__(self, seed: int, module: Any, trace: bool) -> None:
        self.seed = seed
        self.draws = draws = Draws(seed)
        self.chance = draws.random
        self.counts: Counter[str] = Counter()
        organisation = OrganisationBuilder(draws).build()
        is_slow = draws.has("slow merges", 0.2)
        super().__init__(
            module,
            organisation,
            merge_delay=draws.somewhen(0.5, 60.0) if is_slow else draws.somewhen(0.02, 3.0),
            gone=self.chance.choice(World.GONE),
            quota=quota_of(draws),
            seed=seed,
        )
        self.tracing = trace
        self.checker.reasons.trouble = set_switches(self.world, draws)
        self.others = ConcurrentEdits(self)
        self.latency = draws.somewhen(0.01, 0.4)
        self.exports: list[list[Row]] = []
        self.has_kept = False  # files of the savepoint as they were once
        # Of its own, so that kept seeds stay the scenarios that they were.
        self.rare = random.Random(seed + 2)
        self.may_not_merge = self.rare.random() < 0.06 and not draws.calm
        self.has_foreign_exports = self.rare.random() < 0.06 and not draws.calm
        self._describe()

    def _describe(self) -> None:
        world, quota = self.world, self.world.quota
        shown = f"{quota.limit} in {quota.window:g} s" if quota else "none"
        self.trace(f"merges take {world.merge_delay:.2f} s, quota {shown}")
        for name in sorted(SWITCHES - {"merge_delay"}):
            if getattr(world, name) != getattr(World, name, {}):
                self.trace(f"  {name}: {getattr(world, name)}")
        for one in self.organisation.contacts.values():
            unverified = "unverified" if one["id"] in self.organisation.unverified else ""
            words = (one.get("email"), one["external_ref"], one["state"], org_id_of(one))
            self.trace(f"  {short(one['id'])} {' '.join(map(str, words))} {unverified}")

    # ----- what happens meanwhile ----------------------------------------------------------------

    def of_interest(self) -> list[str]:
        return list(chain(*self.checker.plan))

    def visit(self, ids: Ids) -> str:
        """The application identifies the person of a pair."""
        wanted = self.checker.known[ids][-1]
        primary = self.organisation.contacts.get(ids[0])
        if primary is None or wanted.new_ref is None:
            return ""
        org = (org_id_of(primary) or "").rpartition("/")[2] or None
        found = self.organisation.visit(wanted.primary.email, wanted.new_ref, org)
        return f"the application meets {wanted.new_ref}: {short(found)}"

    def on_request(self, stage: str, request: Request) -> None:
        super().on_request(stage, request)
        if stage == "before" or request.endpoint != "rev-users.merge" or self.in_peace:
            return
        ids = request.body["primary_user"], request.body["secondary_user"]
        if self.draws.has("a visit in the gap", 0.2) and self.chance.random() < 0.4:
            when = self.world.merge_delay + self.draws.somewhen(0.01, 5.0)
            self.world.later(when, lambda: self.trace(f"OTHERS {self.visit(ids)}"))

    def meanwhile(self, least: float, most: float, act: Callable[[], Any]) -> None:
        """Let something happen at some time, unless there is peace by then."""
        self.world.later(self.draws.somewhen(least, most), lambda: self.in_peace or act())

    # ----- network and faults --------------------------------------------------------------------

    def network_faults(self, endpoint: str) -> NetworkFaults:
        there, back = (self.latency * self.chance.uniform(0.3, 1.0) for _ in range(2))
        if self.in_peace:
            return NetworkFaults(there, back)
        for kind, chance in NETWORK_FAULTS.items():
            if self.draws.has(f"requests {kind}", 0.15) and self.chance.random() < chance:
                self.checker.others_spent += kind in ("twice", "late")
                return NetworkFaults(there, back, kind)
        rare = endpoint in ("rev-users.merge", "rev-users.create")
        if rare and self.draws.has("merges unheard", 0.15) and self.chance.random() < 0.3:
            kind = self.chance.choice(("unheard", "lost", "late", "twice"))
            return NetworkFaults(there, back, kind)
        return NetworkFaults(there, back)

    def faults(self) -> list[Fault]:
        found = []
        for kind, chance in ANSWERS.items():
            if self.draws.has(f"answers: {kind}", 0.07):
                detail = None
                if kind == "half-emoji":
                    field = self.chance.choice(("email", "external_ref", "state", "id"))
                    detail = (field,) if self.chance.random() < 0.3 else None
                found.append(Fault(kind, chance=chance, detail=detail))
        if self.draws.has("no merge is carried out", 0.04) and self.chance.random() < 0.6:
            found.append(Fault("merge-never"))
        again, slow = self.draws.somewhen(0.1, 60.0), self.draws.somewhen(1.0, 400.0)
        late = self.chance.choice((400, 403, 409)), self.draws.somewhen(0.1, 300.0)
        details = {"merge-doubled": again, "merge-slow": slow, "merge-refused-late": late}
        for kind in ("merge-never", "merge-leaves", *details):
            if self.draws.has(kind, 0.12):
                found.append(Fault(kind, chance=0.4, detail=details.get(kind)))
        if self.draws.has("a poll that hangs", 0.08):
            found.append(Fault("hang", "rev-users.get", chance=0.3))
        if self.undos and self.draws.has("contacts refused", 0.2):
            kind = self.chance.choice(("400", "403", "409", "500-after"))
            found.append(Fault(kind, "rev-users.create", chance=0.5))
        doubled = self.draws.has("requests twice", 0.15) or self.draws.has("answers: doubled", 0.07)
        # The second of two requests may be made all the same.
        if self.draws.has("answers: not so", 0.08) and not doubled:
            forget = Fault("changed", "rev-users.update", chance=0.3, detail=self._forget_update)
            found += [forget, Fault("changed", "rev-users.get", chance=0.05, detail=self._garble)]
        if self.draws.has("a poll finds nothing", 0.08):
            found.append(Fault("404", "rev-users.get", chance=0.1))
            self.checker.lies = True
        self.checker.lies |= any(fault.kind in ("endless", "half-emoji") for fault in found)
        return found

    def _forget_update(self, content: dict[str, Any]) -> dict[str, Any]:
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

    def _garble(self, content: dict[str, Any]) -> dict[str, Any]:
        identity = (content.get("rev_user") or {}).get("id")
        bad = ({}, {"rev_user": None}, {"rev_user": {"id": identity}}, {"rev_user": {}})
        return dict(self.chance.choice(bad))

    def _disturb(self) -> None:
        """Draw what the coming run meets on DevRev's side."""
        chance, world = self.chance, self.world
        if self.draws.has("others", 0.5):
            for _ in range(chance.randint(1, 6)):
                self.meanwhile(0.1, 600.0, self.others.act)
        world.faults = self.faults()
        is_forbidden = self.may_not_merge and self.rare.random() < 0.5
        world.forbidden = ("rev-users.merge",) if is_forbidden else ()
        lags = self.draws.has("lists lag", 0.15)
        world.list_lag = self.draws.somewhen(0.5, 30.0) if lags else 0.0
        self.checker.lag = max(self.checker.lag, world.list_lag)
        held = self.draws.has("references held", 0.1)
        self.organisation.ref_release = self.draws.somewhen(0.1, 60.0) if held else 0.0
        if self.draws.has("stuck references", 0.05):
            references = [one["external_ref"] for one in self.organisation.contacts.values()]
            stuck = [one for one in references if chance.random() < 0.1]
            self.organisation.stuck_references.update(stuck)
        if world.quota and self.draws.has("others spend quota", 0.15):
            self.checker.others_spent += 1
            for _ in range(3):
                units = chance.randint(1, world.quota.limit)
                self.meanwhile(0.1, 600.0, lambda units=units: self._spend(units))
        if self.draws.has("contacts vanish", 0.05):
            self.meanwhile(0.1, 300.0, self._vanish)
        if self.draws.has("a token revoked", 0.05):
            self.meanwhile(0.1, 200.0, self._revoke)
        for _ in range(chance.randint(0, 3)):
            if self.draws.has("naps", 0.12):
                self.meanwhile(0.2, 300.0, self._nap)
            elif self.draws.has("a clock that is set", 0.08):
                self.meanwhile(0.2, 300.0, self._set_clock)

    def _spend(self, units: int) -> None:
        self.trace(f"OTHERS spend {units} units of quota")
        self.world.quota.spend(units)

    def _vanish(self) -> None:
        """Contacts, or all of them, are as if they did not exist, for some seconds."""
        interest = self.of_interest()
        if not interest:
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
        self.trace("OTHERS revoke the token")
        self.world.token += "x"

    def _nap(self) -> None:
        seconds = self.draws.somewhen(10.0, 40_000.0)
        self.trace(f"the laptop sleeps for {seconds:.0f} s")
        self.clock.nap(seconds)

    def _set_clock(self) -> None:
        seconds = self.chance.choice((-1, 1)) * self.draws.somewhen(1.0, 40_000.0)
        self.trace(f"the clock is set by {seconds:.0f} s")
        self.clock.set_by += seconds

    # ----- exports and options -------------------------------------------------------------------

    def export_rows(self) -> list[Row]:
        rows = super().export_rows()
        if self.draws.has("wrong counts", 0.1) and not self.in_peace:
            for place, row in enumerate(rows):
                if self.chance.random() < 0.2:
                    tickets = row.tickets + self.chance.choice((-1, 1))
                    rows[place] = row._replace(tickets=max(0, tickets))
        if self.draws.has("a warehouse in lower case", 0.1):
            rows = [row._replace(email=row.email.lower()) for row in rows]
        if self.draws.has("dates of other forms", 0.2):
            rows = [row._replace(created=self._written(row.created)) for row in rows]
        self.chance.shuffle(rows)
        self.exports.append(rows)
        return rows

    def _written(self, created: str) -> str:
        """Write a date in one of the forms that a warehouse has, for the same instant."""
        form, zone = self.chance.choice(("Z", "space", "zone")), ""
        if form == "Z":
            return created
        moment = instant(created)
        if form == "zone":
            hours, zone = self.chance.choice(((2, " +02:00"), (-5, " -05:00")))
            moment += 3600 * hours
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment)) + zone

    def _options(self) -> list[str]:
        chance, draws = self.chance, self.draws
        if not self.exports or chance.random() < 0.4:
            self.export_rows()
        rows = self.exports[-1] if chance.random() < 0.8 else chance.choice(self.exports)
        if self.has_foreign_exports and self.rare.random() < 0.3:
            rows = [row._replace(id=row.id.replace(":devo/", ":devo/OTHER")) for row in rows]
        self.write_csv(rows)
        workers = str(chance.choice((1, 2, 8, 8, 32)))
        options = ["--csv", "contacts.csv", "--yes", "--quiet", "--workers", workers]
        options += ["--merge-timeout", f"{draws.somewhen(2.0, 300.0):.1f}"]
        if draws.has("--limit", 0.2) and chance.random() < 0.6:
            options += ["--limit", str(chance.randint(1, 4))]
        names: list[str] = []
        if draws.has("--email", 0.15) and chance.random() < 0.5:
            names = [row.email for row in chance.sample(rows, min(3, len(rows)))]
        stopped = {self.rows[ids]["email"] for ids in pairs_in(self.rows, STOPPING)}
        there = sorted(stopped & {row.key for row in rows})
        if there and draws.has("a stopped pair is named", 0.5) and chance.random() < 0.5:
            names.append(chance.choice(there))
        for name in names:
            options += ["--email", name]
        if draws.has("--count-policy", 0.2):
            options += ["--count-policy", "at-least"]
        if draws.has("--no-timelines", 0.7 if draws.has("huge") else 0.1):
            options.append("--no-timelines")
        if draws.has("--choices", 0.15) and self._write_choices(rows):
            options += ["--choices", "choices.csv"]
        return options + self.manner()

    def manner(self) -> list[str]:
        options = ["--primary", "user"] if self.draws.has("--primary user", 0.15) else []
        kinds = {"--carry-fields": 0.2, "--across-workspaces": 0.1, "--try-unverified": 0.1}
        return options + [name for name, chance in kinds.items() if self.draws.has(name, chance)]

    def _write_choices(self, rows: Sequence[Row]) -> bool:
        """Choose for some of the groups that can't be told."""
        chosen = []
        for group in groups_of(rows).values():
            users = [row for row in group if row.ref.startswith("user_")]
            if self.chance.random() < 0.6 and (users or len(group) > 1):
                chosen.append(self.chance.choice(users or group))
        with open("choices.csv", "w", encoding="utf-8") as file:
            file.write("EMAIL,EXTERNAL_REF\n" + "".join(f"{row.key},{row.ref}\n" for row in chosen))
        return bool(chosen)

    def make_settings(self, workers: int) -> Any:
        chance, calls, period = self.chance, 0, 60.0
        if chance.random() < 0.2:
            limits = ((3, 2.0), (10, 6.0), (60, 6.0), (200, 60.0), (30, 60.0))
            calls, period = chance.choice(limits)
        limits = {"calls": calls, "period": period, "timeout": chance.choice((2.0, 5.0, 30.0))}
        settings = self.settings_of(workers, **limits, retries=chance.choice((2, 5)))
        self.checker.slowest = lambda: self.latency if self._is_undisturbed(settings) else None
        return settings

    # ----- runs ----------------------------------------------------------------------------------

    def play(self) -> None:
        """Play some runs in which anything may happen, then runs in peace."""
        Path("reports").mkdir()
        Path("logs").mkdir()
        self.export_rows()
        for _ in range(1 if self.draws.calm else self.chance.randint(1, 4)):
            self._disturb()
            self.play_run(self._options())
            self._between()
            if self.draws.has("undo", 0.2) and self.chance.random() < 0.6:
                self._undo()
            if self.draws.has("settle", 0.25) and self.chance.random() < 0.6:
                self._settle()
        self.leave_in_peace()

    def _undo(self) -> None:
        """Undo merges: those of a backup or of a report, an old one as well."""
        found = sorted(Path("backups").glob("*/*/"))
        found += sorted(Path("reports").glob("merge_report_*.json"))
        if not found:
            return
        again = self.undos and self.chance.random() < 0.5
        path = self.chance.choice(self.undos if again else list(map(str, found)))
        options = ["--undo", path, "--quiet", "--workers", str(self.chance.choice((1, 2, 8)))]
        options += ["--merge-timeout", f"{self.draws.somewhen(2.0, 300.0):.1f}"]
        if self.chance.random() < 0.1:
            options.append("--preview")
        else:
            options.append("--yes")
            self.note_undo(path)
        self._disturb()
        if self.draws.has("primaries go while an undo is open", 0.2):
            self.meanwhile(0.1, 60.0, self._take_primary)
        self.play_run(options)
        self._between()

    def _alive(self) -> list[str]:
        return [one for one in self.organisation.contacts if self.organisation.alive(one)]

    def _take_primary(self) -> None:
        """Somebody merges the primary of an open undo onward, or deletes it."""
        open_primaries = {ids[0] for ids in self.checker.undo.open()}
        there = sorted(open_primaries.intersection(self._alive()))
        if not there:
            return
        primary = self.chance.choice(there)
        others = [one for one in self._alive() if one != primary]
        if others and self.chance.random() < 0.5:
            self.trace(f"OTHERS merge the primary {short(primary)} onward")
            self.organisation.merge(self.chance.choice(others), primary)
        else:
            self.trace(f"OTHERS delete the primary {short(primary)}")
            self.organisation.delete_contact(primary)

    def _settle(self) -> None:
        """Settle some of what a report has named as unfinished; DevRev may do it later."""
        emails = self.unfinished_emails()
        if not emails:
            return
        chosen = self.chance.sample(emails, self.chance.randint(1, len(emails)))
        self.play_run(["--settle", *chosen, "--yes", "--quiet"])
        for ids, row in self.rows.items():
            if row["state"] != "cancelled":
                continue
            if self.draws.has("a cancelled duplicate goes elsewhere", 0.2):
                self.meanwhile(0.1, 1000.0, lambda ids=ids: self._send_elsewhere(ids))
            elif self.draws.has("a cancelled merge is carried out", 0.6):
                self.meanwhile(0.1, 100_000.0, lambda ids=ids: self._carry_out(ids))
        self._between()

    def _send_elsewhere(self, ids: Ids) -> None:
        """Somebody merges a cancelled duplicate into another contact, or deletes it."""
        there = self._alive()
        if ids[1] not in there or len(there) < 3:
            return
        other = self.chance.choice([one for one in there if one not in ids])
        if self.chance.random() < 0.5:
            self.trace(f"OTHERS merge the cancelled {short(ids[1])} into {short(other)}")
            self.organisation.merge(other, ids[1])
        else:
            self.trace(f"OTHERS delete the cancelled {short(ids[1])}")
            self.organisation.delete_contact(ids[1])

    def _carry_out(self, ids: Ids) -> None:
        if all(map(self.organisation.alive, ids)):
            self.trace(f"DevRev carries out the cancelled merge of {short(ids[1])}")
            self.organisation.merge(*ids)

    def make_process(self) -> SimulatedProcess:
        chance, draws = self.chance, self.draws
        process = super().make_process(chance.randrange(1 << 32))
        if self.in_peace:
            return process
        if draws.has("kills", 0.6) and chance.random() < 0.7:
            kind = chance.random()
            if kind < 0.4:
                process.kill_when.append(Nth("", int(draws.somewhen(1, 1500))))
            elif kind < 0.8:
                process.kill_after_merge = (int(draws.somewhen(1, 10)), int(draws.somewhen(1, 60)))
            else:  # when it is not in the copy yet
                intent = "after the commit of savepoint.db with an intent"
                process.kill_when.append(Nth(intent, int(draws.somewhen(1, 8))))
        if draws.has("killed at its report", 0.1) and chance.random() < 0.4:
            process.kill_when.append(Nth("before naming merge_report", 1))
        if draws.has("a full disk", 0.1) and chance.random() < 0.4:
            name = chance.choice((MAIN.name, COPY.name))
            intent = f"the commit of {name} with an intent"
            process.full_from = Nth(intent, int(draws.somewhen(1, 6)))
            process.full_for = f"of {name}"
        elif draws.has("a full disk", 0.1):
            process.full_at = int(draws.somewhen(1, 1000))
            words = ("", "", "of savepoint.db", "savepoint-copy.db", "commit", "of")
            process.full_for = chance.choice(words)
        return process

    def _is_undisturbed(self, settings: Any) -> bool:
        """Return whether nothing but the quota keeps a run's requests waiting, and its windows are
        large enough for polls."""
        windows = [settings.calls] * bool(settings.calls)
        if self.world.quota:
            windows.append(self.world.quota.limit - 3 * self.world.quota.others)
        kinds = DISTURBING_FOR_GOOD if self.in_peace else DISTURBING
        disturbed = any(kind.startswith(kinds) for kind in self.draws.drawn())
        enough = 60 if self.world.merge_delay < 3 else 1000  # for polls
        return not (disturbed or self.world.faults) and min(windows, default=1000) >= enough

    def play_run(self, argv: Sequence[str]) -> Run:
        """Play one run; where it is refused because the savepoint was put back, move the named
        report away and go on."""
        for _ in range(10):
            run = super().play_run(argv)
            self.counts["runs"] += 1
            self.counts["kills"] += run.killed
            found = re.search(r"(?:merge|undo)_report_\d+_\d+\.json", run.refusal)
            if not (found and run.code == 2 and "put back" in run.refusal):
                break
            self.trace(f"the report {found.group()} is moved away")
            self.lose(found.group())
        return run

    def on_signal(self, run: Any, loop: Any, act: Callable[[], None]) -> None:
        """Perhaps the user presses Ctrl-C."""
        if not self.in_peace and self.draws.has("signals", 0.15) and self.chance.random() < 0.6:
            loop.call_later(self.draws.somewhen(0.05, 100.0), self.interrupt, run, act)

    # ----- between runs --------------------------------------------------------------------------

    def _between(self) -> None:
        """From one run to the next: time passes, and things get lost."""
        most = 200_000.0 if self.chance.random() < 0.3 else 100.0
        self.clock.advance(self.draws.somewhen(0.5, most))
        keeps = self.draws.has("undo", 0.2)  # what an undo names
        if not keeps and self.draws.has("reports lost", 0.08) and self.chance.random() < 0.5:
            self.trace("LOST: all reports")
            self.lose("merge_report_*.json")
        kinds = [kind for kind, chance in LOSSES.items() if self.draws.has(kind, chance)]
        if kinds and self.chance.random() < 0.5 and MAIN.exists():
            self._lose(self.chance.choice(kinds), keeps)
        if MAIN.exists() and not self.has_kept:
            self.keep(*FILES)
            self.has_kept = True

    def _lose(self, kind: str, keeps: bool) -> None:
        """Let one thing get lost, or be put back from an older backup."""
        self.trace(f"LOST: {kind}")
        if kind == "backups lost":
            if not keeps and Path("backups").exists():
                self.lose("backups")
            return
        one = COPY.name if "copy" in kind else MAIN.name
        names = tuple(FILES) if "both" in kind else (one,)
        if "lost" in kind:
            self.lose(*names)
        elif self.has_kept:
            self.put_back(*names)
            if len(names) == 2 and self.chance.random() < 0.5:
                self._put_back_reports()

    def _put_back_reports(self) -> None:
        """The whole folder is put back: newer reports are not there either."""
        known = expected.runs_of(*expected.read_files())
        for name in self.checker.reports.on_disk():
            if expected.run_of(name) not in known:
                self.lose(name)


def play(seed: int, module: Any, trace: bool = False) -> Verdict:
    logging.getLogger("merge_contacts").setLevel(logging.CRITICAL + 1)
    home = Path.cwd()
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="scenario-", dir=room)
    os.chdir(folder)
    invariant, what = "", ""
    scenario = Scenario(seed, module, trace)
    try:
        scenario.play()
    except InvariantBroken as problem:
        invariant, what = problem.invariant, problem.what
        frames = traceback.extract_tb(problem.__traceback__)
        judge = [frame for frame in frames if frame.name != "broken"][-1]
        scenario.trace(f"BROKEN: {judge.name}, {Path(judge.filename).name}:{judge.lineno}")
    except Exception:
        invariant, what = "the simulation itself works", traceback.format_exc()
    finally:
        os.chdir(str(home))
        shutil.rmtree(folder, ignore_errors=True)
    counts = scenario.counts
    counts["requests"] = len(scenario.world.requests)
    counts["merges"] = len(scenario.organisation.merges)
    counts.update(f"pairs {row['state']}" for row in scenario.rows.values())
    return Verdict(seed, invariant, what, scenario.events, counts, scenario.clock.now)


def play_quietly(seed: int) -> Verdict:
    return play(seed, the_module())


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # half an emoji is no UTF-8
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulate", description=str(__doc__).splitlines()[0]
    )
    option = parser.add_argument
    option("--seeds", metavar="N", type=int, default=100, help="play so many (default 100)")
    option("--start", metavar="S", type=int, default=1, help="the first seed (default 1)")
    option("--jobs", metavar="J", type=int, default=1, help="in so many processes")
    option("--seed", metavar="S", type=int, help="play one scenario, and show all of it")
    options = parser.parse_args()
    begun, counts, failed = time.monotonic(), Counter(), 0  # type: ignore[var-annotated]
    with multiprocessing.Pool(options.jobs) as pool:
        if options.seed is not None:
            verdicts = iter([play(options.seed, the_module(), trace=True)])
        else:
            seeds = range(options.start, options.start + options.seeds)
            verdicts = pool.imap_unordered(play_quietly, seeds, chunksize=2)
        for verdict in verdicts:
            counts.update(verdict.counts, scenarios=1)
            counts["simulated days"] += verdict.seconds / 86400
            for line in verdict.events:
                print(line)
            if verdict.invariant:
                failed += 1
                print(f"seed {verdict.seed}: {verdict.invariant}: {verdict.what}", flush=True)
    shown = ", ".join(f"{number:.0f} {kind}" for kind, number in sorted(counts.items()))
    print(f"{failed} failed: {shown} in {time.monotonic() - begun:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
