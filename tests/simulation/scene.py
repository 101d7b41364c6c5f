"""Scripted scenes: an organisation, what befalls it, and runs over it, in simulated time.

    def test_a_lost_answer_is_polled_for(scene: Scene) -> None:
        primary, duplicate = scene.pair(1)
        scene.lose_answer("rev-users.merge")
        scene.before("rev-users.update", lambda devrev: devrev.delete_contact(primary))
        run = scene.merge("--merge-timeout", "20")
        assert run.code == 1 and run.codes == {"person1@example.com": "not_found"}
        assert scene.count("rev-users.merge") == 1 and scene.holder("user_1") is None

What there is
    scene.pair(1)           two contacts of person1@example.com, REVU-P1 and user_1, with tickets
    scene.organisation      the truth (tests.fake.organisation.Organisation)
    scene.world             how DevRev serves it: every switch, e.g. scene.world.merge_delay = 3.0
    scene.settings          of the client: scene.settings["timeout"] = 5.0
What happens
    scene.export(changes)   write contacts.csv as the warehouse has it (else the first run does)
    scene.at(5.0, act)      act(organisation) in so many simulated seconds
    scene.before(endpoint, act, 2)    before DevRev acts on the second such request; after likewise
    scene.fault("500", endpoint)      a Fault of DevRev's, with skip, times, match, detail
    scene.answer(endpoint, 406, "<html>")   in place of DevRev's; done=True: and it is carried out
    scene.lose_answer(endpoint)       the request arrives, its answer does not
    scene.kill("sending rev-users.merge", 2)   kill -9 at the second step of that name
    scene.ctrl_c                      an act: scene.after("rev-users.merge", scene.ctrl_c)
    scene.lose("savepoint.db"), keep("savepoint.db"), put_back("savepoint.db"), clock.advance(s)
Runs
    scene.merge("--limit", "1"), undo(), settle(email), run("--status"): each leaves a Run
    scene.end()             no more trouble: all ends, each reason is true, all can be settled
Every request, file and report is judged by the invariants; scene.waive(invariant, reason) turns one
off by its name.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from tests.fake.organisation import Organisation
from tests.fake.trouble import Fault, Request
from tests.fake.world import World
from tests.simulation import expected
from tests.simulation import world as simulated
from tests.simulation.expected import COPY, MAIN, UNFINISHED, Ids, Row, Rows, export_of, pairs_in
from tests.simulation.invariants import InvariantChecker
from tests.simulation.undo_invariants import WRITES
from tests.simulation.world import InvariantBroken, NetworkFaults, Nth, SimulatedProcess, short

HEADER = (
    "REV_USER_ID", "DISPLAY_NAME", "EMAIL", "EXTERNAL_REF", "FULL_NAME", "CREATED_AT", "UPDATED_AT",
    "TICKET_COUNT",
)  # fmt: skip
PEACEFUL_RUNS = 12  # that a scenario which is left in peace may need to end
ALL_ENDS = "a scenario that is left in peace ends"
REPORTING = ("merge", "undo", "settle")  # modes that leave a report
OPEN = (*UNFINISHED, "undoing")
FILES = {MAIN.name: MAIN, COPY.name: COPY}  # of the savepoint
Act = Callable[[Organisation], Any]


@functools.lru_cache(maxsize=1)
def the_module() -> Any:
    return simulated.load()


class Run:
    """What one run has left: out, err, report_path, report, requests, and rows of the savepoint by
    the duplicate's id."""

    code: int | None = None  # None: it was killed
    killed = False
    refusal = ""  # why it did nothing
    report: dict[str, Any] = {}

    @property
    def codes(self) -> dict[str, str]:
        """Return email -> code of what failed or is unfinished, as the report has it."""
        found = {}
        for name in ("failed", "unfinished", "failed_merges", "unfinished_merges"):
            found.update((one["email"], one["code"]) for one in self.report.get(name) or ())
        return found

    def count(self, endpoint: str) -> int:
        return sum(request.endpoint == endpoint for request in self.requests)


class Stage:
    """One machine, one organisation, and the runs between them; what befalls them comes later."""

    def __init__(self, module: Any, organisation: Organisation, **switches: Any) -> None:
        self.module, self.organisation = module, organisation
        self.clock = clock = simulated.Clock()
        times = (lambda: clock.now, lambda: simulated.EPOCH + clock.now)
        self.world = World(organisation, *times, on_request=self.on_request, **switches)
        clock.fake_devrev = self.world
        self.checker = InvariantChecker(self.world, clock)
        self.rows: Rows = {}  # of the savepoint, after the last run
        self.undos: list[str] = []  # what was undone, or begun to be
        self.in_peace = False
        self.tracing = True
        self.events: list[str] = []

    def trace(self, what: str) -> None:
        if self.tracing:
            self.events.append(f"{self.clock.now:12.3f}  {what}")

    # ----- to be defined, or added to -------------------------------------------------------------

    def make_process(self, seed: int = 1) -> SimulatedProcess:
        return SimulatedProcess(self, seed)

    def on_request(self, stage: str, request: Request) -> None:
        self.checker.undo.heard(stage, request)

    def on_signal(self, run: Any, loop: Any, act: Callable[[], None]) -> None:
        """A run is ready to be told of a signal."""

    def interrupt(self, run: Any, act: Callable[[], None]) -> None:
        """The user presses Ctrl-C."""
        self.trace("Ctrl-C")
        run.signal = 2
        act()
        if not self.checker.stopped:
            self.checker.stopped, self.checker.interrupted = True, self.clock.now

    def manner(self) -> list[str]:
        return []

    # ----- runs -----------------------------------------------------------------------------------

    def export_rows(self) -> list[Row]:
        rows = export_of(self.organisation)
        self.trace(f"an export: {len(rows)} contacts")
        return rows

    def write_csv(self, rows: Iterable[Row]) -> None:
        with open("contacts.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for row in rows:
                times = row.created, row.created
                writer.writerow((row.id, "A Name", row.email, row.ref, "", *times, row.tickets))

    def settings_of(self, workers: int, **more: Any) -> Any:
        where = {"token": self.world.token, "base_url": "https://api.devrev.ai"}
        return self.module.ApiSettings(**where, workers=workers, **more)

    def play_run(self, argv: Sequence[str]) -> Run:
        module, checker, process, found = self.module, self.checker, self.make_process(), Run()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            options = module.parse_options(list(argv))
        process.settings = settings = self.make_settings(options.workers)
        environment, stage = simulated.environment_of(process), self

        class Simulated(module.RunContext):
            TICK = 3600.0

            def on_signal(self, act: Callable[[], None], loop: Any = None) -> None:
                if loop is not None:
                    stage.on_signal(self, loop, act)

        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run = Simulated(options, environment)
        checker.begin(process, run, *read_inputs(options))
        limit = f"{settings.calls} in {settings.period:g} s, time-out {settings.timeout:g} s"
        self.trace(f"RUN {checker.run}: {' '.join(argv)} (client-side limit {limit})")
        self.clock.last_progress = self.clock.now
        asked = len(self.world.requests)
        try:
            run.settings = settings
            run.log_path.parent.mkdir(exist_ok=True)
            run.log_path.touch()
            outcome = module.MODES[options.mode](run)
            is_code = isinstance(outcome, int)
            found.code = outcome if is_code else environment.run_event_loop(outcome)
        except simulated.Killed:
            found.killed = True
        except module.FatalError as stop:
            found.code, found.refusal = stop.exit_code, str(stop)
            run.console.error(found.refusal)
            self.trace(f"refused: {stop}")
        finally:
            process.end()
        self.trace(f"exit code {found.code}")
        reports = options.mode in REPORTING and not options.preview
        needed = reports and not (found.killed or found.refusal or checker.full_now)
        report_path = run.report_path if reports or options.mode == "preview" else None
        self.rows = checker.after_run(report_path, found.code, found.killed, needed)
        found.out, found.err, found.report_path = out.getvalue(), err.getvalue(), run.report_path
        if found.report_path.exists():
            found.report = json.loads(found.report_path.read_bytes())
        found.rows = {ids[1]: row for ids, row in self.rows.items()}
        found.requests = self.world.requests[asked:]
        return found

    # ----- files ----------------------------------------------------------------------------------

    def note_undo(self, path: str) -> None:
        if path not in self.undos:
            self.undos.append(path)

    def lose(self, *names: str) -> None:
        """Delete files of the savepoint, "backups", or reports."""
        for name in names:
            if name in FILES:
                self.checker.lose_file(FILES[name])
            elif name == "backups":
                self.checker.lose_backups()
            else:
                self.checker.reports.lose(name)

    def keep(self, *names: str) -> None:
        for name in names:
            for tail in ("", "-journal"):
                if Path(f"{FILES[name]}{tail}").exists():
                    shutil.copy(f"{FILES[name]}{tail}", f"{name}.kept{tail}")

    def put_back(self, *names: str) -> None:
        for name in names:
            self.checker.lose_file(FILES[name], Path(f"{name}.kept"), forget=name == names[-1])

    # ----- the end --------------------------------------------------------------------------------

    def leave_in_peace(self) -> None:
        """No more faults, edits or kills: after some runs everything has ended."""
        self.trace("FROM HERE ON IN PEACE")
        self.in_peace = True
        self.world.faults = []
        self.world.forbidden = self.world.vanished = ()
        self.world.list_lag = 0.0
        self.organisation.ref_release = 0.0
        if self.world.quota:
            self.world.quota.others = 0
        self.clock.advance(1000.0)
        for path in self.undos:
            self._undo_in_peace(path)
        if self._merge_in_peace():
            self.checker.after_life(self.rows)
            self._settle_in_peace()

    def _merge_in_peace(self) -> bool:
        """Export and run until nothing changes any more; return whether there was any contact."""
        last = ""
        for _ in range(PEACEFUL_RUNS):
            rows = self.export_rows()
            if not rows:  # others have deleted all contacts
                return bool(last)
            self.write_csv(rows)
            run = self.play_run(["--csv", "contacts.csv", "--yes", "--quiet", *self.manner()])
            forbidden = "403" in run.refusal or "403" in str(self.checker.reports.last.get("run"))
            if run.code not in (0, 1, 3) and not (forbidden and run.code == 2):
                what = f"a run ends with exit code {run.code}: {run.refusal}"
                raise InvariantBroken(ALL_ENDS, what)
            self.clock.advance(400.0)
            before, last = last, self.checker.reports.standing(self.rows)
            if run.code == 0 or last == before:  # the next run would do the same again
                break
        return True

    def _undo_in_peace(self, path: str) -> None:
        """The same command again finishes an undo; once more, and it changes nothing."""
        if not Path(path).exists():
            return
        code, asked = None, 0
        for _ in range(PEACEFUL_RUNS):
            before, asked = code, len(self.world.requests)
            code = self.play_run(["--undo", path, "--yes", "--quiet"]).code
            self.clock.advance(400.0)
            if code not in (0, 1, 2, 3):  # 3: five that can't be undone, one after the other
                raise InvariantBroken(ALL_ENDS, f"an undo ends with exit code {code}")
            if code == before:
                break
        wrote = [one.endpoint for one in self.world.requests[asked:] if one.endpoint in WRITES]
        if code == 0 and wrote:
            raise InvariantBroken("a second undo does nothing", ", ".join(wrote))

    def unfinished_emails(self) -> list[str]:
        return sorted({str(self.rows[ids]["email"]) for ids in pairs_in(self.rows, OPEN)})

    def _settle_in_peace(self) -> None:
        """Every state has a way out: what is unfinished can be settled."""
        emails = self.unfinished_emails()
        if not emails:
            return
        code = self.play_run(["--settle", *emails, "--yes", "--quiet"]).code
        for ids in sorted(pairs_in(self.rows, OPEN)):
            row = self.rows[ids]
            # There is another way out: to run again, or to undo again.
            runs_again = row["code"] in ("stale", "group_incomplete", "interrupted")
            if not (runs_again or self.checker.undo.lacks_reference(ids)):
                state = f"{row['state']} ({row['code']}) after --settle, exit code {code}"
                raise InvariantBroken("every state has a way out", f"{short(ids[1])} is {state}")


def read_inputs(options: Any) -> tuple[list[Row], dict[str, str]]:
    """Read the rows of the export and the choices that a command line names."""
    rows = []
    if options.mode in ("merge", "preview"):
        for one in records(*options.csv or ()):
            place = one["REV_USER_ID"], one["EMAIL"], one["EXTERNAL_REF"]
            rows.append(Row(*place, int(one["TICKET_COUNT"]), one["CREATED_AT"]))
    choices = records(options.choices) if options.choices else ()
    return rows, {one["EMAIL"]: one["EXTERNAL_REF"] for one in choices}


def records(*paths: Any) -> Iterator[dict[str, str]]:
    for path in paths:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)


class Scene(Stage):
    def __init__(self) -> None:
        super().__init__(the_module(), Organisation())
        self.settings: dict[str, Any] = {"calls": 0, "period": 60.0, "timeout": 30.0, "retries": 5}
        self._hooks: list[tuple[str, str, int, Callable[[Any], bool], Act]] = []
        self._kill: list[Nth] = []
        self._full: Nth | None = None
        self._tell: Callable[[], None] | None = None

    # ----- the organisation -----------------------------------------------------------------------

    def pair(
        self, number: int, tickets: tuple[int, int] = (2, 1), talk: bool = True, **fields: Any
    ) -> Ids:
        """Add the two contacts of one person; return primary and duplicate."""
        email = f"person{number}@example.com"
        primary = self.organisation.add_contact(f"P{number}", email, **fields)
        duplicate = self.organisation.add_contact(f"D{number}", email, f"user_{number}", **fields)
        for contact, count in zip((primary, duplicate), tickets):
            for _ in range(count):
                self.organisation.add_work(reported_by=[contact], comments=1)
        if talk:
            self.organisation.add_conversation([duplicate], comments=1)
        return primary, duplicate

    def pairs(self, count: int, **more: Any) -> list[Ids]:
        return [self.pair(number, **more) for number in range(1, count + 1)]

    def export(
        self, changes: Mapping[str, Mapping[str, Any]] = {}, leave_out: Iterable[str] = ()
    ) -> None:
        """Write contacts.csv; `changes`: fields of a Row by contact."""
        rows = [row for row in self.export_rows() if row.id not in set(leave_out)]
        self.write_csv(row._replace(**changes.get(row.id, {})) for row in rows)

    # ----- what happens ---------------------------------------------------------------------------

    def at(self, seconds: float, act: Act) -> None:
        self.world.later(seconds, lambda: act(self.organisation))

    def before(self, endpoint: str, act: Act, n: int = 1, match: Any = lambda _body: True) -> None:
        self._hooks.append(("before", endpoint, n, match, act))

    def after(self, endpoint: str, act: Act, n: int = 1, match: Any = lambda _body: True) -> None:
        """Act after DevRev has acted on the n-th such request, before its answer arrives."""
        self._hooks.append(("after", endpoint, n, match, act))

    def on_request(self, stage: str, request: Request) -> None:
        super().on_request(stage, request)
        due = []
        for number, (when, endpoint, left, match, act) in enumerate(self._hooks):
            if when == stage and endpoint == request.endpoint and match(request.body):
                self._hooks[number] = (when, endpoint, left - 1, match, act)
                if left == 1:
                    due.append(act)
        for act in due:
            self.trace(f"THE SCRIPT acts {stage} {request.endpoint}")
            act(self.organisation)

    def fault(self, kind: str, endpoint: str = "*", **more: Any) -> Fault:
        """Let DevRev misbehave; `times`, `skip`, `match`, `chance` and `detail` as in Fault."""
        self.world.faults.append(Fault(kind, endpoint, **more))
        return self.world.faults[-1]

    def answer(
        self, endpoint: str, status: int, content: Any, done: bool = False, **more: Any
    ) -> Fault:
        """Answer with a status, and JSON or HTML; `done`: the request is carried out."""
        kind = "other-after" if done else "other"
        return self.fault(kind, endpoint, detail=(status, content), **more)

    def lose_answer(self, endpoint: str) -> None:
        self.fault("reset-after", endpoint, times=1)

    def kill(self, step: str, n: int = 1) -> None:
        """Kill the next run at its n-th step whose name holds these words: "sending …",
        "before the commit of savepoint.db", "in the middle of …", "after writing …"."""
        self._kill = [Nth(step, n)]

    def fill_disk(self, write: str, n: int) -> None:
        """In the next run the disk is full from the n-th such write on, for such writes."""
        self._full = Nth(write, n)

    def ctrl_c(self, _organisation: Any = None) -> None:
        """The user presses Ctrl-C: an act."""
        assert self._tell, "no run is under way"
        self._tell()

    def on_signal(self, run: Any, loop: Any, act: Callable[[], None]) -> None:
        self._tell = lambda: loop.call_soon(self.interrupt, run, act)

    # ----- runs -----------------------------------------------------------------------------------

    def network_faults(self, _endpoint: str) -> NetworkFaults:
        return NetworkFaults()

    def make_settings(self, workers: int) -> Any:
        return self.settings_of(workers, **self.settings)

    def make_process(self) -> SimulatedProcess:
        process = super().make_process()
        if not self.in_peace:
            process.kill_when, self._kill = self._kill, []
            process.full_from, self._full = self._full, None
            process.full_for = process.full_from.words if process.full_from else ""
        return process

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell of a broken invariant with all that has happened."""
        try:
            yield
        except InvariantBroken as broken:
            story = "\n".join(self.events)
            raise AssertionError(f"{broken.invariant}: {broken.what}\n{story}") from None
        finally:
            self._tell = None

    def run(self, *argv: str) -> Run:
        """Run the tool with these arguments, in a folder that is the current one, and judge it."""
        if not Path("reports").exists():
            Path("reports").mkdir()
        with self._told():
            run = self.play_run(argv)
        self.clock.advance(1.0)
        return run

    def merge(self, *options: str) -> Run:
        """Merge what contacts.csv asks for; it is written first if it is not there."""
        if not Path("contacts.csv").exists():
            self.export()
        return self.run("--csv", "contacts.csv", "--yes", *options)

    def undo(self, path: Any = None, *options: str) -> Run:
        """Undo a backup or a report: by default the first merge report."""
        found = str(path or min(Path("reports").glob("merge_report_*.json")))
        if "--preview" not in options:
            self.note_undo(found)
            options = ("--yes", *options)
        return self.run("--undo", found, *options)

    def settle(self, *emails: str) -> Run:
        return self.run("--settle", *emails, "--yes")

    def end(self) -> None:
        """Leave all in peace: it ends, for reasons that are true, and what does not is settled."""
        with self._told():
            self.leave_in_peace()

    def waive(self, invariant: str, reason: str) -> None:
        assert reason
        simulated.WAIVED.add(invariant)

    # ----- what is so -----------------------------------------------------------------------------

    def requests(self, endpoint: str) -> list[Request]:
        return [request for request in self.world.requests if request.endpoint == endpoint]

    def count(self, endpoint: str) -> int:
        return self.world.count(endpoint)

    def reference(self, contact: str) -> Any:
        """Return the reference that a contact has now; None where there is none any more."""
        exists = self.organisation.alive(contact)
        return self.organisation.contacts[contact]["external_ref"] if exists else None

    def holder(self, reference: str) -> Any:
        return next(iter(expected.holders(self.organisation, reference)), None)

    def works_of(self, contact: str) -> set[str]:
        """Return the works and conversations in which a contact has a role."""
        mine = [("anyone", [contact])]
        found = (*self.organisation.works.find(mine), *self.organisation.conversations.find(mine))
        return {one["id"] for one in found}

    def merged(self, *pairs: Ids) -> bool:
        """Return whether exactly these were merged, and each user_ reference is on its primary."""
        references = [str(self.reference(primary)) for primary, _ in pairs]
        done = sorted(self.organisation.merges) == sorted(pairs)
        return done and all(one.startswith("user_") for one in references)
