"""Simulated time, a simulated process, and the network between it and tests.fake.organisation.

Nothing here sleeps, flushes to a disk or opens a socket. A run can be killed between any two steps
that it takes outside its own memory, and in the middle of a durable write; what it had sent by then
arrives all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import importlib.util
import json
import math
import os
import random
import sqlite3
import sys
import types
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

from requests.structures import CaseInsensitiveDict as Headers

from tests.fake.trouble import Answer
from tests.fake.world import World

MODULE = Path(__file__).resolve().parents[2] / "merge_contacts.py"
EPOCH = 1_750_000_000.0  # the wall clock at the beginning of a scenario


class Killed(KeyboardInterrupt):
    """The process was killed. A KeyboardInterrupt, because asyncio lets that through at once."""


class InvariantBroken(KeyboardInterrupt):
    """An invariant is broken; `invariant` names it, `what` says what broke it."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(invariant, what)
        self.invariant = invariant
        self.what = what


WAIVED: set = set()  # the invariants that a scripted scene does without


def broken(invariant: str, what: str) -> None:
    """Raise InvariantBroken, unless a script has turned this one off."""
    if invariant not in WAIVED:
        raise InvariantBroken(invariant, what)


def load(source: str | None = None, name: str = "merge_contacts_simulated") -> types.ModuleType:
    """Load the module under a name of its own, from another source if one is given (a mutant)."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    module = importlib.util.module_from_spec(spec)
    # Where there is no template of a report's page:
    module.__file__ = str(MODULE.parent / "tests" / MODULE.name)
    sys.modules[name] = module
    text = MODULE.read_text(encoding="utf-8") if source is None else source
    exec(compile(text, str(MODULE), "exec"), module.__dict__)
    return module


class Clock:
    """True time, and two clocks: the steady one stops in sleep, the wall clock can be set."""

    def __init__(self) -> None:
        self.now = 0.0  # true seconds
        self.slept = 0.0
        self.set_by = 0.0
        self.fake_devrev: World | None = None
        self.last_progress = 0.0

    @property
    def steady(self) -> float:
        return 1000.0 + self.now - self.slept

    @property
    def wall(self) -> float:
        return EPOCH + self.now + self.set_by

    def next_due(self) -> float | None:
        return self.fake_devrev.next_due() if self.fake_devrev else None

    def advance(self, seconds: float) -> None:
        """Let time pass, and DevRev do what is due meanwhile, each thing at its moment."""
        end = self.now + seconds
        while self.fake_devrev:
            due = self.next_due()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self.fake_devrev.catch_up()
        self.now = max(self.now, end)

    def nap(self, seconds: float) -> None:
        now, slept = self.now, self.slept
        self.advance(seconds)
        self.slept = slept + self.now - now


class Loop(asyncio.BaseEventLoop):
    """An event loop that jumps to the next event: a timer of its own, or an act of DevRev's."""

    LONGEST_SILENCE = 6 * 3600.0  # seconds without a request
    MOST_ROUNDS = 50_000  # without a request

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self._selector = self
        self._clock_resolution = 1e-6
        self._rounds, self._progress = 0, 0.0
        self.set_exception_handler(lambda _loop, _context: None)

    def time(self) -> float:
        return self.clock.steady

    def select(self, timeout: float | None) -> list[Any]:
        """Wait, as a selector does. There is never an event, but time passes."""
        due = self.clock.next_due()
        if timeout is None and due is None:
            raise InvariantBroken("a run ends", "it waits for something that never happens")
        self._rounds += 1
        if self.clock.last_progress != self._progress:
            self._rounds, self._progress = 0, self.clock.last_progress
        if self._rounds > self.MOST_ROUNDS:
            raise InvariantBroken("a run ends", "the event loop spins without a request")
        if timeout is not None and timeout <= 0:
            return []
        until = math.inf if due is None else max(0.0, due - self.clock.now)
        self.clock.advance(until if timeout is None else min(timeout, until))
        if self.clock.now - self.clock.last_progress > self.LONGEST_SILENCE + self.clock.slept:
            raise InvariantBroken("a run ends", "hours have passed without a request")
        return []

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run_to_the_end(loop: Loop, main: Any) -> Any:
    """Do what asyncio.run does, on a simulated loop."""
    asyncio.set_event_loop(loop)
    try:
        result = loop.run_until_complete(main)
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        return result
    finally:
        bury(loop)


def bury(loop: Loop) -> None:
    """Discard what a killed run leaves in memory, without letting it do anything more."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that are never awaited
    try:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False
            with contextlib.suppress(BaseException):
                task.get_coro().close()
        loop.close()
    finally:
        asyncio.set_event_loop(None)
        sys.unraisablehook = hook


class NetworkFaults(NamedTuple):
    """What the network does to a request."""

    there: float = 0.05  # seconds until it arrives
    back: float = 0.05
    kind: str = ""  # "refused" (no connection), "lost", "unheard" (no answer), "late", "twice"


class Sent(NamedTuple):
    """A request, as the invariants see it."""

    endpoint: str
    body: dict[str, Any]
    at: float  # true seconds


class Nth:
    """The n-th of the steps whose name has these words; of all steps where there are no words."""

    def __init__(self, words: str, n: int) -> None:
        self.words, self.left = words, n

    def is_it(self, what: str) -> bool:
        self.left -= self.words in what
        return self.words in what and not self.left


class SimulatedProcess:
    """The process of a run on a stage: it takes steps, and may be killed at any of them.

    The stage's checker is told `asked(sent)` before a request leaves, `answered(sent, answer)` as
    an answer is handed over, and `wrote(file, rows)` after each commit.
    """

    MOST_IDLE = 3000  # requests without a durable write

    def __init__(self, stage: Any, seed: int) -> None:
        self.module, self.clock, self.fake_devrev = stage.module, stage.clock, stage.world
        self.observer, self.trace = stage.checker, stage.trace
        self.network_faults: Callable[[str], NetworkFaults] = stage.network_faults
        self.settings: Any = None
        self.random = random.Random(seed)
        self.kill_when: list[Nth] = []
        # So many steps after the n-th merge request:
        self.kill_after_merge: tuple[int, int] | None = None
        self.full_at: int | None = None  # the disk is full at this step
        self.full_for = ""  # and from then on for every write with these words in its name, if any
        self.full_from: Nth | None = None  # a write that takes the place of the step
        self.steps = self.merges = self.travelling = 0
        self.dead = False
        self.connections: dict[str, Connection] = {}  # by the file's name
        self.hot_journal: tuple[Path, bytes] | None = None  # that a torn commit leaves
        self.idle = 0  # requests since the last durable write
        self.units_unseen = 0  # requests whose answer's headers the run has never seen

    def step(self, what: str) -> None:
        """Take a step outside the run's memory, at which it may be killed."""
        if self.dead:
            raise Killed
        self.steps += 1
        if self._is_meant(what):
            self.kill(what)
        if self.kill_after_merge and self.merges >= self.kill_after_merge[0]:
            self.kill_when.append(Nth("", self.kill_after_merge[1]))
            self.kill_after_merge = None

    def _is_meant(self, what: str) -> bool:
        return any(one.is_it(what) for one in self.kill_when)

    def kill(self, what: str) -> None:
        self.dead = True
        self.trace(f"KILLED: {what}")
        raise Killed

    def durable(self, what: str) -> bool:
        """Take the step before a durable write. Return whether a kill tears it in its middle."""
        self.step(f"before {what}")
        self.idle = 0
        if self.full_from and self.full_from.is_it(what):
            self.full_at = self.steps
        is_full = self.full_at is not None and self.steps >= self.full_at
        if is_full and self.full_for in what:
            if not self.full_for:
                self.full_at = None
            self.trace(f"the disk is full: {what}")
            self.observer.full_now = True
            raise OSError(28, "No space left on device")
        self.steps += 1
        return self._is_meant(f"in the middle of {what}")

    def end(self) -> None:
        """Close the files as the operating system does, and leave what a torn commit leaves."""
        self.dead = True
        for connection in self.connections.values():
            connection.close()
        if self.hot_journal:
            path, content = self.hot_journal
            path.write_bytes(content)


class Connection(sqlite3.Connection):
    """A connection to a file of the savepoint: each COMMIT is a step; nothing is flushed."""

    process: SimulatedProcess
    path: Path
    pending: list[Any] = []  # rows of the open transaction

    def execute(self, statement: str, *values: Any) -> Any:
        if self.process.dead:
            raise Killed
        if statement.startswith("PRAGMA synchronous"):
            statement = "PRAGMA synchronous = OFF"
        if statement == "ROLLBACK":
            self.pending = []
        if statement == "COMMIT":
            return self._commit()
        return super().execute(statement, *values)

    def _commit(self) -> Any:
        process, name = self.process, f"the commit of {self.path.name}"
        if any(row["state"] == "requested" for row in self.pending):
            name += " with an intent"
        try:
            torn = process.durable(name)
        except OSError:
            raise sqlite3.OperationalError("database or disk is full") from None
        if torn:
            self._tear(name)
        found = super().execute("COMMIT")
        rows, self.pending = self.pending, []
        process.observer.wrote(self.path.name, rows)
        process.step(f"after {name}")
        return found

    def _tear(self, name: str) -> None:
        """Be killed in the middle of a commit: SQLite's journal is left beside the file, which has
        all new pages or none. Whoever opens it next has to roll it back."""
        journal = self.path.with_name(self.path.name + "-journal")
        content = journal.read_bytes() if journal.exists() else b""
        if self.process.steps % 2:
            super().execute("COMMIT")
        self.process.hot_journal = (journal, content) if content else None
        self.process.kill(f"in the middle of {name}")

    def executemany(self, statement: str, rows: Any) -> Any:
        if self.process.dead:
            raise Killed
        rows = list(rows)
        if "INTO pairs" in statement:
            for row in map(stored_row, rows):
                self.pending = [*self.pending, row]
                code = row["code"] and f" ({row['code']}: {row['error'][:100]})"
                duplicate = short(row["duplicate_id"])
                self.process.trace(f"  {self.path.name}: {duplicate} is {row['state']}{code}")
        return super().executemany(statement, rows)


ROW = (
    "primary_id", "duplicate_id", "organisation", "email", "state", "new_ref", "run", "revision",
    "document",
)  # fmt: skip


def stored_row(values: Any) -> dict[str, Any]:
    """Return a row of the table `pairs`: its columns, and what its document says besides."""
    row = dict(zip(ROW, values))
    return {**json.loads(row["document"]), **row}


def short(don: str) -> str:
    """`REVU-7`, `TKT-3` of an id."""
    kind, _, key = don.rpartition(":")[2].partition("/")
    prefixes = {"revu": "REVU-", "ticket": "TKT-", "issue": "ISS-", "conversation": "CONV-"}
    return prefixes.get(kind, kind) + key


def name_of(ids: tuple[str, str]) -> str:
    """`REVU-6 <- REVU-5` of a pair: primary, duplicate."""
    return f"{short(ids[0])} <- {short(ids[1])}"


def environment_of(process: SimulatedProcess) -> Any:
    """Make an Environment of the module that is the simulated process."""
    module = process.module

    class Simulated(module.Environment):
        def __init__(self) -> None:
            super().__init__(process.settings)
            self.random = process.random
            self.loop: Loop | None = None

        def run_event_loop(self, work: Any) -> Any:
            self.loop = Loop(process.clock)
            return run_to_the_end(self.loop, work)

        def now(self) -> Any:
            return module.Timestamp(process.clock.wall, process.clock.steady)

        async def post(
            self, endpoint: str, body: dict[str, Any], deadline: float | None = None
        ) -> Any:
            try:
                return await exchange(process, endpoint, body, deadline)
            except Exception as error:  # which the module would take for one of its own
                what = f"{endpoint}: {error!r}"
                raise InvariantBroken("the simulation itself works", what) from error

        async def run_in_thread(self, job: Any, *args: Any) -> Any:
            await asyncio.sleep(0.001 + 0.02 * process.random.random())
            return job(*args)

        def create_file(self, path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
            name = f"writing {path.name.replace(str(os.getpid()), '<process>')}"
            torn = process.durable(name)
            found: tuple[int, str] = super().create_file(path, tear(chunks) if torn else chunks)
            if torn:
                process.kill(f"in the middle of {name}")
            process.step(f"after {name}")
            return found

        def rename_into_place(self, aside: Path, final: Path) -> None:
            name = f"naming {final.name}"
            if process.durable(name):
                process.kill(f"before {name}")
            super().rename_into_place(aside, final)
            process.trace(f"  on the disk: {final}")
            process.step(f"after {name}")

        def open_database(self, uri: str) -> Any:
            path = Path(uri[len("file:") :].partition("?")[0])
            process.step(f"opening {path.name}")
            db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0, factory=Connection)
            db.process, db.path = process, path
            process.connections[path.name] = db
            return db

        def fsync_file(self, file: Any) -> None:
            file.flush()

        def fsync_dir(self, folder: Path) -> None:
            pass

    return Simulated()


def tear(chunks: Iterable[bytes]) -> Iterator[bytes]:
    whole = b"".join(chunks)
    yield whole[: len(whole) // 2]


async def exchange(
    process: SimulatedProcess, endpoint: str, body: dict[str, Any], deadline: float | None
) -> Any:
    """Send a request through the network; return its answer as the transport would give it."""
    timeout, loop = process.settings.timeout, asyncio.get_event_loop()
    complete = min(10 * timeout, deadline or math.inf)
    silence = min(timeout, complete)
    process.step(f"sending {endpoint}")
    process.idle += 1
    if process.idle > process.MOST_IDLE:
        what = f"{process.idle} requests without a durable write"
        raise InvariantBroken("a run makes progress", what)
    sent = Sent(endpoint, json.loads(process.module.to_json(body)), process.clock.now)
    process.observer.asked(sent)
    process.clock.last_progress = process.clock.now
    process.merges += endpoint == "rev-users.merge"
    future = loop.create_future()

    def hand_over(answer: Any) -> None:
        if not (process.dead or loop.is_closed() or future.done()):
            future.set_result(answer)

    begin(process, sent, process.network_faults(endpoint), hand_over)
    timer = loop.call_later(silence, hand_over, nothing(process, f"no answer in {silence:g} s"))
    try:
        answer = await future
    finally:
        timer.cancel()
    if answer is LONG:
        await asyncio.sleep(max(0.0, complete - 0.9 * timeout))
        answer = nothing(process, f"not complete within {complete:g} s")
    process.units_unseen += "X-Ratelimit-Remaining" not in answer.headers
    heard = f"{answer.status or answer.problem} {told(answer.data)}"
    process.trace(f"  <- {endpoint} {describe(sent.body)}: {heard}")
    process.step(f"hearing of {endpoint}")
    process.observer.answered(sent, answer)
    return answer


LONG = object()  # an answer that goes on for too long


def nothing(process: SimulatedProcess, why: str, sent: bool = True) -> Any:
    """Return what the transport says of a request without an answer."""
    return process.module.HttpResponse(None, {}, None, why, sent=sent)


def begin(
    process: SimulatedProcess, sent: Sent, faults: NetworkFaults, hand_over: Callable[[Any], None]
) -> None:
    """Let a request travel: it arrives whatever happens to the process that has sent it."""
    devrev, settings, kind = process.fake_devrev, process.settings, faults.kind
    note = f" [{kind}]" if kind else ""
    process.trace(f"  -> {sent.endpoint} {describe(sent.body)}{note}")
    if kind == "refused":
        answer = nothing(process, "no connection", sent=False)
        devrev.later(faults.there, lambda: hand_over(answer))
    if kind in ("refused", "lost"):
        return

    def arrive() -> None:
        process.travelling -= 1
        answer = devrev.respond(sent.endpoint, dict(sent.body), settings.token)
        if kind == "twice":
            devrev.respond(sent.endpoint, dict(sent.body), devrev.token)
        if kind == "unheard":
            parsed, seconds = nothing(process, "the connection broke"), 0.0
        else:
            parsed, seconds = parse(process, answer)
        if seconds is not None:
            devrev.later(faults.back + seconds, lambda: hand_over(parsed))

    process.travelling += 1
    devrev.later(faults.there + (3 * settings.timeout if kind == "late" else 0.0), arrive)


def parse(process: SimulatedProcess, answer: Answer) -> tuple[Any, float | None]:
    """Return DevRev's answer as module.HttpTransport would read it, and the seconds that it takes;
    None: it never comes."""
    timeout = process.settings.timeout
    if answer.manner in ("hang", "reset", "cut"):
        seconds = answer.seconds if answer.manner == "hang" else 0.0
        return nothing(process, "the connection broke"), seconds
    seconds = answer.seconds * (len(answer.payload) if answer.manner == "drip" else 1)
    if answer.manner == "drip" and seconds > 10 * timeout:
        return LONG, timeout * 0.9
    date = email.utils.formatdate(EPOCH + process.clock.now, usegmt=True)
    data, problem = process.module.parse_body(answer.status, answer.payload, process.settings)
    headers = Headers(answer.headers, Date=date)
    response = process.module.HttpResponse(answer.status, headers, data, problem)
    return response, min(seconds, 9.9 * timeout)


def describe(body: Mapping[str, Any]) -> str:
    shown = [name for name in body if name not in ("limit", "type")]
    return " ".join(f"{name}={words(body[name])}" for name in shown)


def words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(words, value))
    text = str(value)
    return short(text) if text.startswith("don:") else text[:40]


def told(data: Mapping[str, Any] | None) -> str:
    for name, value in (data or {}).items():
        if isinstance(value, list):
            ids = [short(str(item.get("id"))) for item in value if isinstance(item, dict)]
            return f"{len(value)} {name}: {','.join(ids)}"
        if isinstance(value, dict):
            shown = [short(str(value.get("id"))), value.get("state"), value.get("external_ref")]
            return " ".join(str(one) for one in shown if one)
    return str((data or {}).get("message", ""))[:80]
