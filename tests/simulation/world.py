"""Simulated time, a simulated process, and the network between it and tests.fake.organisation, all drawn from a seed.

Nothing here sleeps, flushes to a disk or opens a socket. A run can be killed between any two steps that it takes
outside its own memory, and in the middle of a durable write; what it had sent by then arrives all the same.
"""

import asyncio
import contextlib
import email.utils
import importlib.util
import io
import json
import math
import os
import random
import sqlite3
import sys
import types
import warnings
from collections import deque
from pathlib import Path
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)

from tests.fake.trouble import Answer
from tests.fake.world import World

MODULE = Path(__file__).resolve().parents[2] / "merge_contacts.py"
EPOCH = 1_750_000_000.0  # the wall clock at the beginning of a scenario


class Killed(KeyboardInterrupt):
    """The process was killed. A KeyboardInterrupt, because asyncio lets that through at once, whatever waits."""


class InvariantBroken(KeyboardInterrupt):
    """An invariant is broken; `invariant` names it, `what` says what broke it."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(invariant, what)
        self.invariant = invariant
        self.what = what


WAIVED: set = set()  # the invariants that a scripted scene does without


def broken(invariant: str, what: str) -> None:
    """Say that an invariant is broken. Raises InvariantBroken, unless a script has turned it off."""
    if invariant not in WAIVED:
        raise InvariantBroken(invariant, what)


def load(source: Optional[str] = None, name: str = "merge_contacts_simulated") -> types.ModuleType:
    """Load the module under a name of its own, from another source if one is given (a mutant)."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(
        MODULE.parent / "tests" / MODULE.name
    )  # where there is no template of a report's page
    sys.modules[name] = module
    text = MODULE.read_text(encoding="utf-8") if source is None else source
    exec(compile(text, str(MODULE), "exec"), module.__dict__)
    return module


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


class Clock:
    """True time, and the two clocks of the machine: a laptop that sleeps stops the steady one, the wall clock can be
    set."""

    def __init__(self) -> None:
        self.now = 0.0  # true seconds
        self.slept = 0.0
        self.set_by = 0.0
        self.fake_devrev: Optional[World] = None
        self.last_progress = 0.0

    @property
    def steady(self) -> float:
        return 1000.0 + self.now - self.slept

    @property
    def wall(self) -> float:
        return EPOCH + self.now + self.set_by

    def next_due(self) -> Optional[float]:
        return self.fake_devrev.next_due() if self.fake_devrev else None

    def advance(self, seconds: float) -> None:
        """Let time pass, and DevRev do what is due meanwhile, each thing at its moment."""
        end = self.now + seconds
        while self.fake_devrev:
            due = self.fake_devrev.next_due()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self.fake_devrev.catch_up()
        self.now = max(self.now, end)

    def nap(self, seconds: float) -> None:
        """The laptop sleeps."""
        now, slept = self.now, self.slept
        self.advance(seconds)
        self.slept = slept + self.now - now


class Loop(asyncio.BaseEventLoop):
    """An event loop that jumps to the next event: a timer of its own, or something that DevRev does."""

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

    def select(self, timeout: Optional[float]) -> List[Any]:
        """Wait, as a selector does. There is never an event, but time passes."""
        due = self.clock.next_due()
        if timeout is None and due is None:
            raise InvariantBroken("a run ends", "it waits for something that never happens")
        self._rounds = self._rounds + 1 if self.clock.last_progress == self._progress else 0
        self._progress = self.clock.last_progress
        if self._rounds > self.MOST_ROUNDS:
            raise InvariantBroken("a run ends", "the event loop spins without a request")
        if timeout is not None and timeout <= 0:
            return []
        waits = [timeout] if timeout is not None else []
        if due is not None:
            waits.append(max(0.0, due - self.clock.now))
        self.clock.advance(min(waits))
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
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(BaseException):
                task.get_coro().close()  # type: ignore[union-attr]
        loop.close()
    finally:
        asyncio.set_event_loop(None)
        sys.unraisablehook = hook


# --------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------


class NetworkFaults(NamedTuple):
    """What the network does to one request."""

    there: float  # seconds until it arrives
    back: float
    kind: str = ""  # "refused" (no connection), "lost", "unheard" (no answer), "late", "twice"


class Sent(NamedTuple):
    """A request of this run, as the invariants see it."""

    endpoint: str
    body: Dict[str, Any]
    at: float  # true seconds


class SimulatedProcess:
    """The process of one run: it takes steps, and may be killed at any of them.

    `observer` is told `asked(sent)` before a request leaves, `answered(sent, answer)` as an answer is handed over, and
    `wrote(connection)` after each commit; `network_faults(endpoint)` says what the network does.
    """

    MOST_IDLE = 3000  # requests without a durable write

    def __init__(self, module: Any, clock: Clock, its_devrev: World, seed: int) -> None:
        self.module = module
        self.clock = clock
        self.fake_devrev = its_devrev
        self.random = random.Random(seed)
        self.network_faults: Callable[[str], NetworkFaults] = lambda _endpoint: NetworkFaults(
            0.05, 0.05
        )
        self.observer: Any = None
        self.trace: Callable[[str], None] = lambda _what: None
        self.tracing = False
        self.kill_at: Optional[int] = None
        self.kill_after_merge: Optional[Tuple[int, int]] = (
            None  # so many steps after the n-th merge request
        )
        self.kill_between: Optional[int] = (
            None  # at the n-th intent, when it is in the first file and not in the copy
        )
        self.killed_at_report = False  # before a merge report gets its name
        self.kill_when: Optional[Tuple[str, int]] = (
            None  # at the n-th step with these words in its name
        )
        self.full_at: Optional[int] = None  # the disk is full at this step
        self.full_for = ""  # and from then on for every write with these words in its name, if any
        self.full_when: Optional[Tuple[str, int]] = None  # from the n-th write with these words on
        self.full_intent: Optional[Tuple[str, int]] = (
            None  # a file that can't take its n-th intent, nor anything after
        )
        self.steps = self.merges = self.intents = self.travelling = 0
        self.dead = False
        self.connections: Dict[str, Connection] = {}  # by the file's name
        self.hot_journal: Optional[Tuple[Path, bytes]] = (
            None  # that a commit leaves which was killed in its middle
        )
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
            self.kill_at = self.steps + self.kill_after_merge[1]
            self.kill_after_merge = None
        if self.steps == self.kill_at:
            self.kill(what)

    def _is_meant(self, what: str) -> bool:
        """Count a step whose name a script has given; return whether it is the one at which to be killed."""
        if self.kill_when is None or self.kill_when[0] not in what:
            return False
        self.kill_when = self.kill_when[0], self.kill_when[1] - 1
        return not self.kill_when[1]

    def kill(self, what: str) -> None:
        self.dead = True
        self.trace(f"KILLED: {what}")
        raise Killed

    def durable(self, what: str) -> bool:
        """Take the step before a durable write. Return whether a kill tears it in its middle."""
        self.step(f"before {what}")
        self.idle = 0
        if self.killed_at_report and what.startswith("naming merge_report"):
            self.kill(f"before {what}")
        self._count_write(what)
        if (
            self.full_at is not None
            and self.steps >= self.full_at
            and (self.full_for in what or not self.full_for)
        ):
            if not self.full_for:
                self.full_at = None
            self.trace(f"the disk is full: {what}")
            self.observer.disk_was_full = self.observer.full_now = True
            raise OSError(28, "No space left on device")
        self.steps += 1
        return self.steps == self.kill_at or self._is_meant(f"in the middle of {what}")

    def _count_write(self, what: str) -> None:
        """Count a write whose name a script has given: from the n-th one on the disk is full for such writes."""
        if self.full_when is None or self.full_when[0] not in what:
            return
        words, left = self.full_when
        self.full_when = words, left - 1
        if left == 1:
            self.full_at, self.full_for = self.steps, words

    def count_intent(self, name: str) -> None:
        """Count an intent that a file is about to commit; the disk may be full for that file from here on."""
        if self.full_intent and self.full_intent[0] == name:
            self.full_intent = name, self.full_intent[1] - 1
            if not self.full_intent[1]:
                self.full_at, self.full_for = self.steps, f"of {name}"

    def end(self) -> None:
        """Close the files as the operating system does when a process ends, and leave what a torn commit leaves."""
        self.dead = True
        for connection in self.connections.values():
            connection.close()
        if self.hot_journal:
            path, content = self.hot_journal
            path.write_bytes(content)


class Connection(sqlite3.Connection):
    """A connection to one of the savepoint's two files: each COMMIT is a step; nothing is flushed."""

    process: SimulatedProcess
    path: Path
    pending: List[Any] = []  # rows of the open transaction

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
            process.count_intent(self.path.name)
        try:
            torn = process.durable(name)
        except OSError:
            raise sqlite3.OperationalError("database or disk is full") from None
        if torn:
            self._tear(name)
        found = super().execute("COMMIT")
        rows, self.pending = self.pending, []
        process.observer.wrote(self.path.name, rows)
        if self.path.name == "savepoint.db" and any(row["state"] == "requested" for row in rows):
            process.intents += 1
            if process.intents == process.kill_between:
                process.kill(f"after {name} and before the copy's")
        process.step(f"after {name}")
        return found

    def _tear(self, name: str) -> None:
        """Be killed in the middle of a commit: SQLite's journal is left beside the file, of which all new pages or none
        are written. Whoever opens it next has to roll it back."""
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
            self.pending = self.pending + [stored_row(row) for row in rows]
            for row in self.pending[-len(rows) :] if self.process.tracing and rows else ():
                code = row["code"] and f" ({row['code']}: {row['error'][:100]})"
                self.process.trace(
                    f"  {self.path.name}: {short(row['duplicate_id'])} is {row['state']}{code}"
                )
        return super().executemany(statement, rows)


ROW = (
    "primary_id",
    "duplicate_id",
    "organisation",
    "email",
    "state",
    "new_ref",
    "run",
    "revision",
    "document",
)


def stored_row(values: Any) -> Dict[str, Any]:
    """Return a row of the table `pairs`: its columns, and what its document says besides."""
    row = dict(zip(ROW, values))
    return {**json.loads(row["document"]), **row}


def short(don: str) -> str:
    """`REVU-7`, `TKT-3` of an id."""
    kind, _, key = don.rpartition(":")[2].partition("/")
    return {"revu": "REVU-", "ticket": "TKT-", "issue": "ISS-", "conversation": "CONV-"}.get(
        kind, kind
    ) + key


def environment_of(module: Any, process: SimulatedProcess, settings: Any) -> Any:
    """Make an Environment of this module that is the simulated process."""

    class Simulated(module.Environment):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(settings)
            self.random = process.random
            self.loop: Optional[Loop] = None

        def run_event_loop(self, work: Any) -> Any:
            self.loop = Loop(process.clock)
            return run_to_the_end(self.loop, work)

        def now(self) -> Any:
            return module.Timestamp(process.clock.wall, process.clock.steady)

        async def post(
            self, endpoint: str, body: Dict[str, Any], deadline: Optional[float] = None
        ) -> Any:
            try:
                return await exchange(module, process, settings, endpoint, body, deadline)
            except Exception as error:  # which the module would take for one of its own
                raise InvariantBroken(
                    "the simulation itself works", f"{endpoint}: {error!r}"
                ) from error

        async def run_in_thread(self, job: Any, *args: Any) -> Any:
            await asyncio.sleep(0.001 + 0.02 * process.random.random())
            return job(*args)

        def create_file(self, path: Path, chunks: Iterable[bytes]) -> Tuple[int, str]:
            name = f"writing {path.name.replace(str(os.getpid()), '<process>')}"
            torn = process.durable(name)
            found: Tuple[int, str] = super().create_file(path, tear(chunks) if torn else chunks)
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
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, timeout=0, factory=Connection
            )
            connection.process, connection.path = process, path
            process.connections[path.name] = connection
            return connection

        def fsync_file(self, file: Any) -> None:
            file.flush()

        def fsync_dir(self, folder: Path) -> None:
            pass

    return Simulated()


def tear(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the first half of what was to be written."""
    whole = b"".join(chunks)
    yield whole[: len(whole) // 2]


class SilentStream(io.StringIO):
    """A console without a reader."""

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return False


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


async def exchange(
    module: Any,
    process: SimulatedProcess,
    settings: Any,
    endpoint: str,
    body: Dict[str, Any],
    deadline: Optional[float],
) -> Any:
    """Send one request through the network; return its answer as the real transport would hand it over."""
    complete = min(10 * settings.timeout, deadline or math.inf)
    silence = min(settings.timeout, complete)
    body = json.loads(module.to_json(body))
    process.step(f"sending {endpoint}")
    process.idle += 1
    if process.idle > process.MOST_IDLE:
        raise InvariantBroken(
            "a run makes progress", f"{process.idle} requests without a durable write"
        )
    sent = Sent(endpoint, body, process.clock.now)
    process.observer.asked(sent)
    process.clock.last_progress = process.clock.now
    process.merges += endpoint == "rev-users.merge"
    network_faults = process.network_faults(endpoint)
    loop = asyncio.get_event_loop()
    future = loop.create_future()

    def hand_over(answer: Any) -> None:
        if not (process.dead or loop.is_closed() or future.done()):
            future.set_result(answer)

    begin(module, process, settings, sent, network_faults, hand_over)
    none = module.HttpResponse(None, {}, None, f"no answer within {silence:g} s")
    timer = loop.call_later(silence, hand_over, none)
    try:
        answer = await future
    finally:
        timer.cancel()
    if answer is LONG:
        await asyncio.sleep(max(0.0, complete - 0.9 * settings.timeout))
        answer = module.HttpResponse(None, {}, None, f"no complete answer within {complete:g} s")
    process.units_unseen += "X-Ratelimit-Remaining" not in answer.headers
    process.trace(
        f"  <- {endpoint} {describe(body)}: {answer.status or answer.problem} {told(answer.data)}"
    )
    process.step(f"hearing of {endpoint}")
    process.observer.answered(sent, answer)
    return answer


LONG = object()  # an answer that goes on for too long


def begin(
    module: Any,
    process: SimulatedProcess,
    settings: Any,
    sent: Sent,
    network_faults: NetworkFaults,
    hand_over: Callable[[Any], None],
) -> None:
    """Let a request travel: it arrives whatever happens to the process that has sent it."""
    later, kind = process.fake_devrev.later, network_faults.kind
    note = f" [{kind}]" if kind else ""
    process.trace(f"  -> {sent.endpoint} {describe(sent.body)}{note}")
    if kind == "refused":
        later(
            network_faults.there,
            lambda: hand_over(module.HttpResponse(None, {}, None, "no connection", sent=False)),
        )
        return
    if kind == "lost":
        return

    def arrive() -> None:
        process.travelling -= 1
        answer = process.fake_devrev.respond(sent.endpoint, dict(sent.body), settings.token)
        if kind == "twice":
            process.fake_devrev.respond(sent.endpoint, dict(sent.body), process.fake_devrev.token)
        if kind == "unheard":
            later(
                network_faults.back,
                lambda: hand_over(module.HttpResponse(None, {}, None, "the connection broke")),
            )
            return
        parsed, seconds = parse(module, process, settings, answer)
        if seconds is not None:
            later(network_faults.back + seconds, lambda: hand_over(parsed))

    process.travelling += 1
    later(network_faults.there + (3 * settings.timeout if kind == "late" else 0.0), arrive)


def parse(
    module: Any, process: SimulatedProcess, settings: Any, answer: Answer
) -> Tuple[Any, Optional[float]]:
    """Return DevRev's answer as module.HttpTransport would read it, and the seconds that it takes; None: it never comes."""
    if answer.manner == "hang":
        return module.HttpResponse(None, {}, None, "the connection broke"), answer.seconds
    if answer.manner in ("reset", "cut"):
        return module.HttpResponse(None, {}, None, "the connection broke"), 0.0
    if answer.manner == "drip" and answer.seconds * len(answer.payload) > 10 * settings.timeout:
        return LONG, settings.timeout * 0.9
    seconds = answer.seconds * (len(answer.payload) if answer.manner == "drip" else 1)
    headers = dict(
        answer.headers, Date=email.utils.formatdate(EPOCH + process.clock.now, usegmt=True)
    )
    data, problem = module.parse_body(answer.status, answer.payload, settings)
    return module.HttpResponse(answer.status, Headers(headers), data, problem), min(
        seconds, 9.9 * settings.timeout
    )


class Headers(Dict[str, str]):
    """Headers, found in upper and lower case."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__({name.lower(): value for name, value in headers.items()})

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


def describe(body: Mapping[str, Any]) -> str:
    """Describe a request's body in a few words."""
    return " ".join(
        f"{name}={words(value)}" for name, value in body.items() if name not in ("limit", "type")
    )


def words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(words, value[:4])) + (f"+{len(value) - 4}" if len(value) > 4 else "")
    text = str(value)
    return short(text) if text.startswith("don:") else text[:40]


def told(data: Optional[Mapping[str, Any]]) -> str:
    """Describe an answer in a few words."""
    if not data:
        return ""
    for name, value in data.items():
        if isinstance(value, list):
            ids = (short(str(item.get("id"))) for item in value[:8] if isinstance(item, dict))
            return f"{len(value)} {name}: " + ",".join(ids)
        if isinstance(value, dict):
            return f"{short(str(value.get('id')))} {value.get('state', '')} {value.get('external_ref', '')}".strip()
    return str(data.get("message", ""))[:80]


class Trace:
    """The last events of a scenario, for people."""

    def __init__(self, clock: Clock, most: Optional[int]) -> None:
        self.clock = clock
        self.lines: Deque[str] = deque(maxlen=most)

    def __call__(self, what: str) -> None:
        self.lines.append(f"{self.clock.now:12.3f}  {what}")
