"""Simulated time, a simulated machine, and what lies between it and tests.fake_devrev: all that a run touches, from a seed.

Nothing here sleeps, flushes to a disk or goes through a socket. A run can be killed between any two things that it
does outside its own memory, and in the middle of a durable write; what it had sent by then arrives all the same.
"""

import asyncio
import contextlib
import email.utils
import importlib.util
import io
import json
import os
import random
import sqlite3
import sys
import types
import warnings
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from tests import fake_devrev

MODULE = Path(__file__).resolve().parent.parent / "merge_contacts.py"
EPOCH = 1_750_000_000.0  # the wall clock at the beginning of a life


class Killed(KeyboardInterrupt):
    """The process is no more. A KeyboardInterrupt, for asyncio lets that through at once, whatever waits."""


class InvariantBroken(KeyboardInterrupt):
    """A invariant is broken; `invariant` says which, in the contract's words."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(invariant, what)
        self.invariant = invariant
        self.what = what


def load(source: Optional[str] = None, name: str = "merge_contacts_simulated") -> types.ModuleType:
    """The module under a name of its own, from another source where one is given (a mutant)."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(MODULE.parent / "tests" / MODULE.name)  # where there is no template of a report's page
    sys.modules[name] = module
    text = MODULE.read_text(encoding="utf-8") if source is None else source
    exec(compile(text, str(MODULE), "exec"), module.__dict__)
    return module


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


class Clock:
    """True time, and what the machine makes of it: a laptop that sleeps stops the steady clock, somebody sets the
    other."""

    def __init__(self) -> None:
        self.now = 0.0  # true seconds
        self.slept = 0.0
        self.set_by = 0.0
        self.fake_devrev: Optional[fake_devrev.World] = None
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
        """Let time pass, and the world do what it does meanwhile, each thing at its moment."""
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
    """An event loop that jumps to whatever comes next: a timer of its own, or something in the world."""

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
        """What a selector does: wait. Nothing is ever there, but time passes."""
        due = self.clock.next_due()
        if timeout is None and due is None:
            raise InvariantBroken("a run ends", "it waits for something that will never come")
        self._rounds = self._rounds + 1 if self.clock.last_progress == self._progress else 0
        self._progress = self.clock.last_progress
        if self._rounds > self.MOST_ROUNDS:
            raise InvariantBroken("a run ends", "it goes round and round, and nothing comes of it")
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
    """What asyncio.run does, on a loop of ours."""
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
    """Take away what a killed run leaves in memory, without letting it do anything more."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that nobody awaits any more
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
# The machine
# --------------------------------------------------------------------------------------------------


class NetworkFaults(NamedTuple):
    """What the network does to a request."""

    there: float  # seconds until it arrives
    back: float
    draws: str = ""  # "refused" (no connection), "lost", "unheard" (no answer), "late", "twice"


class Sent(NamedTuple):
    """A request of this run, as the invariants see it."""

    endpoint: str
    body: Dict[str, Any]
    at: float  # true seconds


class SimulatedProcess:
    """One run's process: it does things step by step, and is killed at one of them.

    `observer` hears `asked(sent)` before a request leaves, `answered(sent, answer)` as one is handed over, `wrote()`
    after each durable write; `weather(endpoint)` says what the network does.
    """

    MOST_IDLE = 3000  # requests without anything that reaches the disk

    def __init__(self, module: Any, clock: Clock, its_devrev: fake_devrev.World, seed: int) -> None:
        self.module = module
        self.clock = clock
        self.fake_devrev = its_devrev
        self.random = random.Random(seed)
        self.network_faults: Callable[[str], NetworkFaults] = lambda _endpoint: NetworkFaults(0.05, 0.05)
        self.observer: Any = None
        self.trace: Callable[[str], None] = lambda _what: None
        self.tracing = False
        self.kill_at: Optional[int] = None
        self.kill_after_merge: Optional[Tuple[int, int]] = None  # so many steps after the n-th merge request
        self.killed_at_report = False  # before a merge report gets its name
        self.full_at: Optional[int] = None  # the disk is full at this step, once
        self.steps = self.merges = self.travelling = 0
        self.dead = False
        self.connection: Optional[Connection] = None
        self.idle = 0  # requests since anything has reached the disk
        self.units_unseen = 0  # requests whose answer's headers the run has never seen

    def step(self, what: str) -> None:
        """Something that the run does outside its memory; where it may be killed."""
        if self.dead:
            raise Killed
        self.steps += 1
        if self.kill_after_merge and self.merges >= self.kill_after_merge[0]:
            self.kill_at = self.steps + self.kill_after_merge[1]
            self.kill_after_merge = None
        if self.steps == self.kill_at:
            self.kill(what)

    def kill(self, what: str) -> None:
        self.dead = True
        self.trace(f"KILLED: {what}")
        raise Killed

    def durable(self, what: str) -> bool:
        """Before a durable write: True where it is torn by a kill in its middle."""
        self.step(f"before {what}")
        self.idle = 0
        if self.killed_at_report and what.startswith("naming merge_report"):
            self.kill(f"before {what}")
        if self.steps == self.full_at:
            self.trace(f"the disk is full: {what}")
            self.observer.disk_was_full = True
            raise OSError(28, "No space left on device")
        self.steps += 1
        return self.steps == self.kill_at


class Connection(sqlite3.Connection):
    """A savepoint's connection: each COMMIT is a step; nothing is flushed."""

    process: SimulatedProcess

    def execute(self, statement: str, *values: Any) -> Any:
        if self.process.dead:
            raise Killed
        if statement == "PRAGMA synchronous = EXTRA":
            statement = "PRAGMA synchronous = OFF"
        if statement != "COMMIT":
            return super().execute(statement, *values)
        try:
            if self.process.durable("the savepoint's commit"):
                self.process.kill("in the middle of the savepoint's commit")
        except OSError:
            raise sqlite3.OperationalError("database or disk is full") from None
        found = super().execute(statement)
        self.process.step("after the savepoint's commit")
        self.process.observer.wrote()
        return found

    def executemany(self, statement: str, rows: Any) -> Any:
        if self.process.dead:
            raise Killed
        rows = list(rows)
        if self.process.tracing and "INTO pairs" in statement:
            places = [name.strip() for name in statement[statement.index("(") + 1 : statement.index(")")].split(",")]
            for row in rows:
                told = dict(zip(places, row))
                state, code = told["state"], told["code"] and f" ({told['code']}: {told['error'][:100]})"
                self.process.trace(f"  savepoint: {short(told['duplicate_id'])} is {state}{code}")
        return super().executemany(statement, rows)


def short(don: str) -> str:
    """`REVU-7`, `TKT-3` of an id."""
    kind, _, key = don.rpartition(":")[2].partition("/")
    return {"revu": "REVU-", "ticket": "TKT-", "issue": "ISS-", "conversation": "CONV-"}.get(kind, kind) + key


def environment_of(module: Any, process: SimulatedProcess, settings: Any) -> Any:
    """An Outside of this module which is the machine."""

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

        async def post(self, endpoint: str, body: Dict[str, Any]) -> Any:
            return await exchange(module, process, settings, endpoint, body)

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

        def append_lines(self, path: Path, lines: bytes) -> None:
            if process.durable("a line of the journal"):
                with open(path, "ab+") as file:
                    file.seek(max(0, file.tell() - 1))
                    apart = b"" if file.read(1) in (b"\n", b"") else b"\n"
                    file.write(apart + lines[: len(lines) // 2])
                process.kill("in the middle of a line of the journal")
            if process.tracing:
                for told in map(json.loads, lines.splitlines()):
                    process.trace(f"  journal: {told['event']} {short(told['duplicate']['id'])}")
            super().append_lines(path, lines)
            process.step("after a line of the journal")

        def rename_into_place(self, aside: Path, final: Path) -> None:
            name = f"naming {final.name}"
            if process.durable(name):
                process.kill(f"before {name}")
            super().rename_into_place(aside, final)
            process.trace(f"  on the disk: {final}")
            process.step(f"after {name}")

        def open_database(self, uri: str) -> Any:
            process.step("opening the savepoint")
            Connection.process = process
            process.connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0, factory=Connection)
            return process.connection

        def fsync_file(self, file: Any) -> None:
            file.flush()

        def fsync_dir(self, folder: Path) -> None:
            pass

    return Simulated()


def tear(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The first half of what was to be written."""
    whole = b"".join(chunks)
    yield whole[: len(whole) // 2]


class SilentStream(io.StringIO):
    """A console that nobody reads."""

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return False


# --------------------------------------------------------------------------------------------------
# The wire
# --------------------------------------------------------------------------------------------------


async def exchange(module: Any, process: SimulatedProcess, settings: Any, endpoint: str, body: Dict[str, Any]) -> Any:
    """One request through the weather, and its answer as the real wire would hand it over."""
    body = json.loads(module.to_json(body))
    process.step(f"sending {endpoint}")
    process.idle += 1
    if process.idle > process.MOST_IDLE:
        raise InvariantBroken(
            "a run gets somewhere", f"{process.idle} requests, and nothing of it has reached the disk"
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
    none = module.HttpResponse(None, {}, None, f"no answer within {settings.timeout:g} s")
    timer = loop.call_later(settings.timeout, hand_over, none)
    try:
        answer = await future
    finally:
        timer.cancel()
    if answer is LONG:
        limit = 9 * settings.timeout
        await asyncio.sleep(limit)
        answer = module.HttpResponse(None, {}, None, f"no whole answer within {10 * settings.timeout:g} s")
    process.units_unseen += "X-Ratelimit-Remaining" not in answer.headers
    process.trace(f"  <- {endpoint} {describe(body)}: {answer.status or answer.problem} {told(answer.data)}")
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
    """Let a request travel: it arrives whatever becomes of the process that has sent it."""
    later, draws = process.fake_devrev.later, network_faults.draws
    note = f" [{draws}]" if draws else ""
    process.trace(f"  -> {sent.endpoint} {describe(sent.body)}{note}")
    if draws == "refused":
        later(network_faults.there, lambda: hand_over(module.HttpResponse(None, {}, None, "no connection", sent=False)))
        return
    if draws == "lost":
        return

    def arrive() -> None:
        process.travelling -= 1
        answer = process.fake_devrev.respond(sent.endpoint, dict(sent.body), settings.token)
        if draws == "twice":
            process.fake_devrev.respond(sent.endpoint, dict(sent.body), process.fake_devrev.token)
        if draws == "unheard":
            later(network_faults.back, lambda: hand_over(module.HttpResponse(None, {}, None, "the connection broke")))
            return
        parsed, seconds = parse(module, process, settings, answer)
        if seconds is not None:
            later(network_faults.back + seconds, lambda: hand_over(parsed))

    process.travelling += 1
    later(network_faults.there + (3 * settings.timeout if draws == "late" else 0.0), arrive)


def parse(
    module: Any, process: SimulatedProcess, settings: Any, answer: fake_devrev.Answer
) -> Tuple[Any, Optional[float]]:
    """An answer of the world as module.HttpTransport would read it, and the seconds it takes; None where it never comes."""
    if answer.manner == "hang":
        return module.HttpResponse(None, {}, None, "the connection broke"), answer.seconds
    if answer.manner in ("reset", "cut"):
        return module.HttpResponse(None, {}, None, "the connection broke"), 0.0
    if answer.manner == "drip" and answer.seconds * len(answer.payload) > 10 * settings.timeout:
        return LONG, settings.timeout * 0.9
    seconds = answer.seconds * (len(answer.payload) if answer.manner == "drip" else 1)
    headers = dict(answer.headers, Date=email.utils.formatdate(EPOCH + process.clock.now, usegmt=True))
    whole = types.SimpleNamespace(content=answer.payload, status_code=answer.status)
    data, problem = module.HttpTransport._read(types.SimpleNamespace(settings=settings), whole)
    return module.HttpResponse(answer.status, Headers(headers), data, problem), min(seconds, 9.9 * settings.timeout)


class Headers(Dict[str, str]):
    """Headers, found whatever the case of their letters."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__({name.lower(): value for name, value in headers.items()})

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


def describe(body: Mapping[str, Any]) -> str:
    """A request's body in a few words."""
    return " ".join(f"{name}={words(value)}" for name, value in body.items() if name not in ("limit", "type"))


def words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(words, value[:4])) + (f"+{len(value) - 4}" if len(value) > 4 else "")
    text = str(value)
    return short(text) if text.startswith("don:") else text[:40]


def told(data: Optional[Mapping[str, Any]]) -> str:
    """What an answer says, in a few words."""
    if not data:
        return ""
    for name, value in data.items():
        if isinstance(value, list):
            return f"{len(value)} {name}: " + ",".join(short(str(item.get("id"))) for item in value[:8])
        if isinstance(value, dict):
            return f"{short(str(value.get('id')))} {value.get('state', '')} {value.get('external_ref', '')}".strip()
    return str(data.get("message", ""))[:80]


class Trace:
    """The last events of a life, for people."""

    def __init__(self, clock: Clock, most: Optional[int]) -> None:
        self.clock = clock
        self.lines: Deque[str] = deque(maxlen=most)

    def __call__(self, what: str) -> None:
        self.lines.append(f"{self.clock.now:12.3f}  {what}")
