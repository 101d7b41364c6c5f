#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.28", "python-dotenv>=0.20", "ratelimit>=2.2.1"]
# ///
"""Merge duplicate DevRev contacts, safely.

contacts.csv -> pairs that share an email -> live check -> backup -> integrity check from the disk
-> merge -> external_ref -> proof that nothing was left behind -> JSON report

A merge in DevRev is asynchronous and can't be undone there, so every step refuses rather than guesses, and
everything that was done is in the savepoint before the next thing is tried. From its backups most of a merge can
be taken back (`--undo`). `--help` has the options.
"""

import argparse
import asyncio
import bisect
import collections
import contextlib
import csv
import difflib
import functools
import gc
import gzip
import hashlib
import io
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import zlib
from array import array
from dataclasses import astuple, dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from itertools import chain, compress
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Awaitable,
    BinaryIO,
    Callable,
    ClassVar,
    Collection,
    Coroutine,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    TextIO,
    Tuple,
    TypeVar,
    Union,
)
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    import requests

__version__ = "2.0.0"
SCHEMA = 3  # of every JSON document

SIGNALS = [one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP")]
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_HELD = 0, 1, 2, 3, 11

Json = Dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("merge_contacts")


# ---------------------------------------------------------------------------------------------------
# What ends a run, what fails a pair
# ---------------------------------------------------------------------------------------------------


class FatalError(Exception):
    """The run can't go on. `exit_code` is one of the contract's exit codes."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PermissionDenied(FatalError):
    """DevRev refuses the token itself (401) or a scope that the run can't do without (403)."""


class Cancelled(FatalError):
    """The run was told to stop; a request that meets this has not left."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED, "interrupted")


class PairError(Exception):
    """One group or pair is refused or has failed; `code` is what scripts branch on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ApiError(PairError):
    """DevRev understood the request and said no (3xx, 4xx). What it was asked for may come about all the same."""

    def __init__(
        self, endpoint: str, status: int, message: str, location: str = "", data: Optional[Json] = None
    ) -> None:
        super().__init__("forbidden" if status == 403 else "api_error", f"{endpoint} answered {status}: {message}")
        self.status = status
        self.location = location
        self.data = data or {}

    @property
    def missing(self) -> bool:
        """Whether it says that an object is not there; the 404 of a route has no type, and says nothing of objects."""
        return self.status == 404 and self.data.get("type") == "not_found"


class PreconditionsExpired(Exception):
    """A request has not left, for what it rests on was read too long ago."""


class NoUsableResponse(PairError):
    """No usable answer came: whether the request was acted on can only be found out by looking."""

    def __init__(self, endpoint: str, message: str) -> None:
        super().__init__("api_error", f"{endpoint} gave no usable answer: {message}")


# ---------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------


def escape_unprintable(text: str) -> str:
    """Return `text` with everything a terminal could act on (controls, line breaks, bidi marks) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """Render seconds for people: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def some(words: Sequence[str], most: int = 5) -> List[str]:
    """The first few, and in words how many more there are."""
    return [*words[:most], *([f"and {len(words) - most:,} more"] if len(words) > most else [])]


def subject(body: Json) -> str:
    """Whom or what a request is about, in a few words."""
    lists = [value if isinstance(value, list) else [value] for name, value in body.items() if name not in UNTOLD]
    named = [str(one).rpartition("/")[2] for one in chain.from_iterable(lists) if not isinstance(one, dict)]
    return f"for {', '.join(some(named, 3))}" if named else ""


UNTOLD = ("limit", "cursor", "type")  # of a request's body


def iso(epoch: float) -> str:
    """Epoch seconds as UTC, `2025-01-31T12:00:00.000+00:00`."""
    return datetime.fromtimestamp(epoch, timezone.utc).isoformat(timespec="milliseconds")


_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])$", re.IGNORECASE)
_NAME_LIMIT = 80


def safe_name(text: str) -> str:
    """Turn any text into one path component that means the same on Linux, macOS and Windows.

    Everything but letters, digits and `@ . _ + -` of ASCII is percent-encoded, so that two texts never
    share a name; what Windows reserves is encoded too, and long names end in a hash of the whole.
    """
    name = "".join(
        c
        if (c.isascii() and c.isalnum()) or c in "@._+-"
        else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogatepass"))
        for c in text
    )
    if name.startswith((".", "-")) or _RESERVED.match(name.split(".")[0]):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if name.endswith("."):
        name = name[:-1] + "%2E"
    if len(name) > _NAME_LIMIT:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name[: _NAME_LIMIT - 17]}~{digest}"
    return name or "%"


def to_json(value: Any, indent: Optional[int] = None) -> bytes:
    """Encode as UTF-8 JSON; a lone surrogate, which JSON can hold and UTF-8 can't, stays an escape."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------------
# Outside: clocks, disk, threads, the wire
# ---------------------------------------------------------------------------------------------------


class Timestamp(NamedTuple):
    """A point in time on two clocks: a laptop that sleeps stops the steady one, somebody may set the other."""

    wall: float  # epoch seconds
    monotonic: float  # monotonic seconds


class HttpResponse(NamedTuple):
    """What came of one request. `data` is the JSON object in the body, None where there is no whole one."""

    status: Optional[int]  # None: no answer
    headers: Mapping[str, str]
    data: Optional[Json]
    problem: str = ""  # in words
    sent: bool = True  # whether the request may have reached DevRev


class Environment:
    """All that a run touches beyond its own memory: two clocks, the disk, threads for what blocks, and the wire.

    The event loop owns every decision and meets the world only here, so that a simulation can stand in its place.
    """

    def __init__(self, settings: "ApiSettings") -> None:
        self.settings = settings
        self.random = random.Random()
        self._threads_pool = DaemonThreadPool()
        self._transport: Optional[HttpTransport] = None

    def now(self) -> Timestamp:
        return Timestamp(time.time(), time.monotonic())

    def age(self, since: Timestamp) -> float:
        """Seconds since then by the clock that has gone further: what a check or a backup must not be believed past."""
        now = self.now()
        return max(now.wall - since.wall, now.monotonic - since.monotonic)

    def elapsed(self, since: Timestamp) -> float:
        """Seconds since then, at least: how long something has surely been waited for. Not by the wall clock, for where
        somebody sets that back by hours, it would be waited for as long."""
        return self.now().monotonic - since.monotonic

    def run_event_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run an event loop until the work is done."""
        return asyncio.run(work)

    async def post(self, endpoint: str, body: Json) -> HttpResponse:
        """POST one request. Its whole answer has ten times the time that silence has; then the connection is shut."""
        self._transport = self._transport or HttpTransport(self.settings)
        watch = OpenConnection()
        answer = self._threads_pool.submit(self._transport.post, endpoint, body, watch)
        limit = 10 * self.settings.timeout

        def give_up() -> None:
            watch.shut()
            if not answer.done():
                answer.set_result(HttpResponse(None, {}, None, f"no whole answer within {limit:g} s"))

        timer = asyncio.get_event_loop().call_later(limit, give_up)
        try:
            return await answer
        finally:
            timer.cancel()

    async def run_in_thread(self, job: Callable[..., T], *args: Any) -> T:
        """Have a thread do what blocks."""
        return await self._threads_pool.submit(job, *args)

    def create_file(self, path: Path, chunks: Iterable[bytes]) -> Tuple[int, str]:
        """Create `path` (0600) from `chunks` and flush it to the disk; return its bytes and SHA-256."""
        size, digest = 0, hashlib.sha256()
        handle = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with open(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            self.fsync_file(file)
        return size, digest.hexdigest()

    def append_lines(self, path: Path, lines: bytes) -> None:
        """Add lines to `path` and flush them to the disk; one that a crash has torn before them stays alone."""
        handle = os.open(str(path), os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        with open(handle, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                lines = lines if file.read(1) == b"\n" else b"\n" + lines
            file.write(lines + b"\n")
            self.fsync_file(file)
        if not end:
            self.fsync_dir(path.parent)

    def rename_into_place(self, aside: Path, final: Path) -> None:
        """Give what was written aside its final name, in one step that survives a power cut."""
        for patience in (0.1, 0.4, 1.6, 0.0):
            try:
                os.replace(str(aside), str(final))
                break
            except PermissionError:
                # A virus scanner on Windows may hold a new file for a moment.
                if os.name != "nt" or not patience:
                    raise
                time.sleep(patience)
        self.fsync_dir(final.parent)

    def write_atomically(self, path: Path, chunks: Iterable[bytes], before: Callable[[], None] = lambda: None) -> None:
        """Write a whole file aside, call `before`, and give it its name. Raises OSError, and leaves nothing, where the
        disk refuses."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
            self.create_file(aside, chunks)
            before()
            self.rename_into_place(aside, path)
        except (OSError, FatalError):
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def open_database(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0, check_same_thread=False)

    def fsync_file(self, file: Any) -> None:
        file.flush()
        os.fsync(file.fileno())

    def fsync_dir(self, folder: Path) -> None:
        """Make a rename or a new name in `folder` survive a power cut (Windows does so by itself)."""
        if os.name == "nt":
            return
        handle = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_private_dir(self, path: Path) -> Path:
        """Create `path` and what is missing above it, open to its owner alone."""
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
                    self.fsync_dir(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a folder")
        return path


class DaemonThreadPool:
    """Daemon threads that do what blocks; there are always enough of them, and one that hangs holds up no exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Tuple[asyncio.Future[Any], Callable[..., Any], Tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        self._threads = self._busy = 0  # counted by the event loop alone

    def submit(self, job: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        loop = asyncio.get_event_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._busy += 1
        if self._busy > self._threads:
            self._threads += 1
            threading.Thread(target=self._serve, args=(loop,), daemon=True).start()
        self._jobs.put((future, job, args))
        return future

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            future, job, args = self._jobs.get()
            result, error = None, None
            try:
                result = job(*args)
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                loop.call_soon_threadsafe(self._settle, future, result, error)
            del future, job, args, result, error

    def _settle(self, future: "asyncio.Future[Any]", result: Any, error: Optional[BaseException]) -> None:
        self._busy -= 1
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


class OpenConnection:
    """Knows the connection that a request uses, so that it can be shut from another thread."""

    current = threading.local()

    def __init__(self) -> None:
        self.connection: Any = None

    def shut(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.connection.sock.shutdown(socket.SHUT_RDWR)


def observed_pool(pool: Any) -> Any:
    """A connection pool of urllib3's that tells the watch of its thread which connection it has handed out."""

    class ObservedPool(pool):  # type: ignore[misc]
        def _get_conn(self, timeout: Optional[float] = None) -> Any:
            connection = super()._get_conn(timeout)
            OpenConnection.current.watch.connection = connection
            return connection

    return ObservedPool


class HttpTransport:
    """HTTPS to DevRev over kept connections; blocks, and may be used by many threads."""

    def __init__(self, settings: "ApiSettings") -> None:
        import requests
        from requests.adapters import HTTPAdapter

        class Adapter(HTTPAdapter):
            def init_poolmanager(self, *args: Any, **options: Any) -> None:
                super().init_poolmanager(*args, **options)
                self._watch(self.poolmanager)

            def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
                return self._watch(super().proxy_manager_for(*args, **options))

            @staticmethod
            def _watch(manager: Any) -> Any:
                if not hasattr(manager, "watched"):
                    classes = manager.pool_classes_by_scheme
                    manager.pool_classes_by_scheme = {scheme: observed_pool(pool) for scheme, pool in classes.items()}
                    manager.observed_pool = True
                return manager

        self.settings = settings
        self.session = session = requests.Session()
        session.mount(settings.base_url, Adapter(pool_connections=1, pool_maxsize=settings.workers + 4, max_retries=0))
        # The environment's proxies and CA bundle, looked up once; never a proxy for plain http on loopback.
        if settings.base_url.startswith("https:"):
            found = session.merge_environment_settings(settings.base_url, {}, None, None, None)
            session.proxies, session.verify = found["proxies"], found["verify"]
        session.trust_env = False  # no credentials from ~/.netrc either
        self._headers = {
            "Authorization": f"Bearer {settings.token}",
            "User-Agent": f"merge_contacts/{__version__}",
            "Accept": "application/json",
            "Content-Type": "application/json",
        }

    def post(self, endpoint: str, body: Json, watch: OpenConnection) -> HttpResponse:
        """POST once, follow no redirect, and read the whole answer."""
        import requests

        OpenConnection.current.watch = watch
        begun = time.monotonic()
        status: Optional[int] = None
        headers: Mapping[str, str] = {}
        data: Optional[Json] = None
        problem, sent = "", True
        try:
            url = f"{self.settings.base_url}/{endpoint}"
            # Prepared without the session, which would look for cookies, hooks and credentials each time.
            request = requests.Request("POST", url, data=to_json(body), headers=self._headers).prepare()
            timeout = (min(10.0, self.settings.timeout), self.settings.timeout)
            answer = self.session.send(request, timeout=timeout, allow_redirects=False)
            status, headers = answer.status_code, answer.headers
            data, problem = self._read(answer)
        except requests.exceptions.SSLError as error:
            sent = "CERTIFICATE_VERIFY_FAILED" not in repr(error) and "CertificateError" not in repr(error)
            problem = "the TLS connection broke" if sent else "the server's certificate can't be verified"
        except requests.exceptions.Timeout as error:
            sent = not isinstance(error, requests.exceptions.ConnectTimeout)
            problem = f"no answer within {self.settings.timeout:g} s"
        except requests.exceptions.ConnectionError as error:
            sent = "NewConnectionError" not in repr(error) and "NameResolutionError" not in repr(error)
            problem = "the connection broke" if sent else f"no connection to {urlsplit(self.settings.base_url).netloc}"
        except requests.exceptions.RequestException as error:
            problem = type(error).__name__
        tail = f" ({problem})" if problem else ""
        took = time.monotonic() - begun
        whom = subject(body)
        log.debug("%s%s -> %s in %.3f s%s", endpoint, whom and f" {whom}", status or "no answer", took, tail)
        return HttpResponse(status, headers, data, problem, sent)

    def _read(self, answer: "requests.Response") -> Tuple[Optional[Json], str]:
        """Parse a body: the JSON object, and in words what is wrong. A gateway's HTML is no word of DevRev's."""
        try:
            data = json.loads(answer.content)
        except (ValueError, RecursionError):
            return None, f"{answer.status_code} with a body that is not whole JSON"
        if not isinstance(data, dict):
            return None, f"{answer.status_code} with JSON that is not an object"
        if 200 <= answer.status_code < 300:
            return data, ""
        words = " ".join(str(data[name]) for name in ("message", "detail") if data.get(name))
        return data, self.settings.mask(words)[:500] or f"status {answer.status_code}"


class CancelToken:
    """Ends a run: once it is pulled, all that waits, and all that would, raises Interrupted, and nothing leaves."""

    def __init__(self) -> None:
        self.stop: Optional[FatalError] = None
        self.on_cancel: List[Callable[[], None]] = []
        self._waiting: Dict[asyncio.Future[Any], None] = {}  # in the order in which they came

    def cancel(self, stop: FatalError) -> None:
        """Stop for this reason; the first reason counts, but that it was interrupted explains less than another."""
        if self.stop is None or isinstance(self.stop, Cancelled):
            self.stop = stop
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(Cancelled())
        for act in self.on_cancel:
            act()

    def raise_if_cancelled(self) -> None:
        if self.stop:
            raise Cancelled()

    def future(self) -> "asyncio.Future[Any]":
        """Something to wait for, which the brake ends."""
        self.raise_if_cancelled()
        future: asyncio.Future[Any] = asyncio.get_event_loop().create_future()
        self._waiting[future] = None
        future.add_done_callback(self._waiting.pop)
        return future

    async def wait(self, work: Awaitable[Any]) -> None:
        """Wait for something, unless the brake ends it."""
        task = asyncio.ensure_future(work)
        stopped = self.future()
        await asyncio.wait({stopped, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        if stopped.done():
            stopped.result()
        stopped.cancel()

    async def sleep(self, seconds: float) -> None:
        await self.wait(asyncio.sleep(max(0.0, seconds)))


async def together(*works: Awaitable[Any]) -> List[Any]:
    """The results of all. A failure is raised once all have ended, so that nothing outlives who waits for it."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# ---------------------------------------------------------------------------------------------------
# Contacts: the CSV export
# ---------------------------------------------------------------------------------------------------

COLUMNS = {
    "id": "REV_USER_ID",
    "display_name": "DISPLAY_NAME",
    "email": "EMAIL",
    "external_ref": "EXTERNAL_REF",
    "full_name": "FULL_NAME",
    "tickets": "TICKET_COUNT",
    "created": "CREATED_AT",
    "updated": "UPDATED_AT",
}
MAX_CELL = 64 << 20
# `4.0` is what a spreadsheet makes of 4. Three zeros may be thousands: `1.000` is not guessed.
_COUNT = re.compile(r"[0-9]{1,18}(?:\.0{1,2})?")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")  # what a formula-like cell becomes in an export, so that it is no formula
# Of the commonest letters alone: other addresses are checked character by character.
_LETTERS = r"!#-+\--:=?A-Z\[-~\u00c0-\u052f\u3041-\u30ff\u4e00-\u9fff\uac00-\ud7a3"
_PLAIN_ADDRESS = re.compile(f"(?!')[{_LETTERS}]+@[{_LETTERS}]+")
_NO_ADDRESS = re.compile(r"[,;<>\"\s]")
# Invisible beside the categories Cc, Cf, Zs, Zl and Zp: blank letters and variation selectors.
_BLANK = re.compile("[ \u115f\u1160\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_NULL_WORDS = frozenset(("", "\\n", "null", "(null)", "nan", "none", "n/a", "na", "nil", "<na>", "-", "#n/a"))


@functools.lru_cache(maxsize=10_000)
def parse_count(cell: str) -> Optional[int]:
    """Return the count that a cell holds, None where it holds none or where that is a guess."""
    text = cell.strip()
    return int(text.partition(".")[0]) if _COUNT.fullmatch(text) else None


def cell_text(cell: str) -> str:
    """Return a cell without the apostrophe that an export puts before what a spreadsheet would take for a formula."""
    return cell[1:] if cell[:1] == "'" and _GUARDED.match(cell) else cell


def trimmed_text(cell: str) -> str:
    """Return `cell_text` without white space around it, in whichever order they came."""
    text = cell.strip()
    return cell_text(text).strip() if text[:1] == "'" else text


def email_key(text: str) -> str:
    """Return what emails are compared by: trimmed, with the ASCII letters lower-cased and nothing else folded.

    `straße@` and `strasse@` are two mailboxes, though every kind of case folding makes them one.
    """
    text = text.strip()
    return text.lower() if text.isascii() else text.translate(_ASCII_LOWER)


def loose_key(text: str) -> str:
    """Return what look-alikes of an email have in common: normalised, case-folded, without punycode and without
    invisible characters. It only ever leaves contacts out; it never joins any."""
    key = text.strip().lower()
    if key.isascii() and key.isprintable() and " " not in key and "xn--" not in key:
        return key
    key = _fold(text)
    local, at, domain = key.rpartition("@")
    if at and "xn--" in domain:
        labels = domain.split(".")
        for index, label in enumerate(labels):
            # No domain has longer labels, and decoding takes time that grows with the square of the length.
            if label.startswith("xn--") and len(label) < 100:
                with contextlib.suppress(ValueError, OverflowError):
                    labels[index] = label[4:].encode("ascii").decode("punycode")
        key = _fold(f"{local}@{'.'.join(labels)}")
    return key


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded if is_visible(folded) else "".join(filter(is_visible, folded))


def is_visible(text: str) -> bool:
    """Whether `text` holds no white space and no control or invisible character."""
    if _BLANK.search(text):
        return False
    return text.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in text)


@dataclass
class Contact:
    """One row of the export: each field is one of its COLUMNS.

    `id` is the contact's DON (`don:identity:dvrv-us-1:devo/<ORG>:revu/<KEY>`), `tickets` the warehouse's TICKET_COUNT:
    the greatest of the tickets and issues that the contact owns, has created and has reported.
    """

    __slots__ = ("created", "display_name", "email", "external_ref", "full_name", "id", "tickets", "updated")

    SYSTEM_PREFIX: ClassVar[str] = "REVU-"
    user_prefix: ClassVar[str] = "user_"  # what references of the user's own application begin with: a setting

    id: str
    display_name: str
    email: str
    external_ref: str
    full_name: str
    tickets: int
    created: str
    updated: str

    @staticmethod
    def cells_error(identity: str, email: str, external_ref: str, tickets: str) -> Tuple[str, str]:
        """Return the code and the words for why trimmed cells make no contact, two empty texts where they do."""
        if not (identity and email and external_ref):
            names = {"id": identity, "email": email, "external_ref": external_ref}
            return "empty", "empty " + next(COLUMNS[name] for name, value in names.items() if not value)
        local, _, domain = email.partition("@")
        if not (local and domain) or "@" in domain or _NO_ADDRESS.search(email) or not is_visible(email):
            return "email", f"{COLUMNS['email']} is not one plain address: {email[:80]}"
        if parse_count(tickets) is None:
            return "count", f"{COLUMNS['tickets']} is not a count: {tickets.strip()[:40]}"
        return "", ""

    @classmethod
    def from_cells(cls, cells: Sequence[str]) -> "Contact":
        """Make a contact of cells without an error, in the order of COLUMNS."""
        identity, display_name, email, external_ref, full_name, tickets, created, updated = cells
        return cls(
            id=trimmed_text(identity),
            display_name=cell_text(display_name),
            email=trimmed_text(email),
            external_ref=trimmed_text(external_ref),
            full_name=cell_text(full_name),
            tickets=parse_count(tickets) or 0,
            created=trimmed_text(created),
            updated=cell_text(updated),
        )

    def to_json(self) -> Json:
        return {name: getattr(self, name) for name in COLUMNS}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Contact":
        """Read `to_json` of a contact back; a report's entry lacks some of its fields."""
        return cls(**{name: row.get(name, 0 if name == "tickets" else "") for name in COLUMNS})

    @property
    def is_user(self) -> bool:
        """Whether the application made the contact, and knows the person by its reference."""
        return self.external_ref.startswith(self.user_prefix)

    @property
    def is_system(self) -> bool:
        """Whether DevRev made the contact, from an email."""
        return self.external_ref.startswith(self.SYSTEM_PREFIX)

    @property
    def key(self) -> str:
        """What contacts are grouped by."""
        return email_key(self.email)

    @property
    def short_id(self) -> str:
        """The `REVU-<KEY>` that people see, made from the id."""
        return "REVU-" + self.id.rpartition("/")[2]

    @property
    def name(self) -> str:
        """What to call the contact: DISPLAY_NAME; where that is empty FULL_NAME; where both are, the short id."""
        return self.display_name.strip() or self.full_name.strip() or self.short_id

    @property
    def organisation(self) -> str:
        return organisation_of(self.id)


def check_user_prefix(text: str) -> str:
    """Return the prefix that a setting names, the default where it is empty. Raises FatalError(2) where a reference
    could be of both kinds."""
    prefix = text.strip() or "user_"
    if prefix.startswith(Contact.SYSTEM_PREFIX) or Contact.SYSTEM_PREFIX.startswith(prefix):
        words = (
            f"DEVREV_USER_REF_PREFIX {prefix} overlaps with {Contact.SYSTEM_PREFIX}: name the application's own prefix"
        )
        raise FatalError(EXIT_USAGE, words)
    return prefix


def email_of(user: Json) -> str:
    return email_key(str(user.get("email") or ""))


def contact_of(user: Json) -> Contact:
    """The row of a `rev_user`; its tickets are not counted yet."""
    names = ("id", "display_name", "email", "external_ref", "full_name", "created_date", "modified_date")
    identity, display_name, email, external_ref, full_name, created, updated = (
        str(user.get(name) or "") for name in names
    )
    return Contact(identity, display_name, email, external_ref, full_name, 0, created, updated)


_ORGANISATION = re.compile(r"don:[a-z_]+:(dvrv-[^:]+:devo/[^:]+):")


def organisation_of(don: str) -> str:
    """Return the `dvrv-…:devo/<ORG>` that every id of one DevRev organisation carries, or `""`."""
    match = _ORGANISATION.match(don)
    return match.group(1) if match else ""


class InvalidRow(NamedTuple):
    """A row that is left out. `code` groups the reasons: one of INVALID_ROWS."""

    file: str
    line: int
    code: str
    reason: str
    email: Optional[str]


INVALID_ROWS = {
    "fields": "the number of fields differs from the header's",
    "nul": "a NUL character",
    "stray_quote": "a quoted field holds other rows",
    "empty": "an empty id, address or reference",
    "email": "not one plain address",
    "count": "not a count",
    "conflict": "one id with different data",
}
# What a file probably is whose invalid rows nearly all have one reason.
INVALID_FILES = {
    "fields": "this looks like unquoted commas or line breaks in names: export with quoted fields",
    "nul": "this looks like a damaged file: export again",
    "stray_quote": "this looks like quotes that are not doubled: export with quoted fields",
    "empty": "this looks like an export with contacts that have no email or reference: leave them out of it",
    "email": "this looks like a column that holds something else than addresses",
    "null_words": "this looks like an unload that writes a word for NULL: leave out contacts without an email",
    "count": "this looks like numbers that a spreadsheet or a locale has formatted: export plain whole numbers",
    "conflict": "this looks like a history table, with a row for each state: export each contact's current state",
}


def looks_like(rows: Sequence[InvalidRow]) -> str:
    """Say what a file probably is, where at least nine of ten invalid rows have one reason; else return `""`."""
    if len(rows) < 3:
        return ""
    ((code, count),) = collections.Counter(row.code for row in rows).most_common(1)
    if count < 0.9 * len(rows):
        return ""
    words = sum((row.email or "").casefold() in _NULL_WORDS for row in rows)
    return INVALID_FILES["null_words" if code == "email" and words > count / 2 else code]


@dataclass
class CsvContents:
    """What a CSV holds that matters: only rows whose email or id recurs, or whose email was requested, are stored."""

    contacts: List[Contact] = field(default_factory=list)  # each row once, conflicting ones included
    contacts_read: int = 0
    invalid_rows: List[InvalidRow] = field(default_factory=list)  # by file and line
    emails_in_invalid_rows: Set[str] = field(default_factory=set)  # loose keys of groups that may not be complete
    look_alikes: List[Json] = field(default_factory=list)
    files: int = 1
    other_refs: int = 0  # contacts whose reference is neither the system's nor the application's
    other_ref: str = ""  # the first of these references in alphabetical order


_NUL_MARK = "\ufdd0"  # a noncharacter: the csv module of Python 3.8 to 3.10 can't read a NUL
_AT_SIGNS = ("@", "\uff20", "\ufe6b")  # and what a loose comparison takes for one


class _Bytes(io.BufferedReader):
    """A file that holds a mark for each NUL."""

    has_nul = False

    def read1(self, size: int = -1) -> bytes:
        data = super().read1(size)
        self.has_nul = self.has_nul or b"\0" in data
        return data.replace(b"\0", _NUL_MARK.encode()) if self.has_nul else data


class CsvTable:
    """A CSV, plain or gzip, read as far as its header; yields its rows, each with the number of its last line."""

    def __init__(self, raw: io.FileIO, wanted: Iterable[str]) -> None:
        source: Any = raw
        head = raw.read(1 << 16)
        raw.seek(0)
        if head.startswith(b"\x1f\x8b"):
            source = gzip.GzipFile(fileobj=raw)
            head = source.read(1 << 16)
            source.seek(0)
        problem = not_our_csv_reason(head)
        if problem:
            raise FatalError(EXIT_USAGE, ("in the gzip file: " if source is not raw else "") + problem)
        self.bytes = _Bytes(source)
        self.lines = io.TextIOWrapper(self.bytes, encoding="utf-8-sig", newline="")
        # Where each comma of the header has a blank behind it, the blank is no part of a cell, nor before a quote.
        first = head.partition(b"\n")[0]
        self.skips_blanks = 0 < first.count(b",") == first.count(b", ")
        self.rows = self.parse(self.lines)
        header = next((row for _, row in self if row), None)
        if header is None:
            raise FatalError(EXIT_USAGE, "the file is empty")
        self.width = len(header)
        self.places = locate_columns(header, wanted)

    def parse(self, lines: Iterable[str]) -> Any:
        return csv.reader(lines, strict=True, skipinitialspace=self.skips_blanks)

    def __iter__(self) -> Iterator[Tuple[int, List[str]]]:
        rows = self.rows
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise self.located(error) from None

    def located(self, error: csv.Error) -> csv.Error:
        words = str(error) if "field limit" not in str(error) else "a cell of more than 64 MiB (an open quote?)"
        return csv.Error(f"line {self.rows.line_num}: {words}")

    def shape_error(self, row: Sequence[str]) -> Tuple[str, str]:
        """Return the code and the words for why the fields of a row are in doubt, two empty texts where none is."""
        if len(row) != self.width:
            return "fields", f"{plural(len(row), 'field')} instead of {self.width}"
        if any(_NUL_MARK in value for value in row):
            return "nul", "a NUL character"
        if any(value.count(",") >= self.width - 1 and ("\n" in value or "\r" in value) for value in row):
            return "stray_quote", "a quoted field that holds other rows (a stray quote?)"
        return "", ""


FileIdentity = Tuple[int, ...]


@contextlib.contextmanager
def open_table(
    path: Path, wanted: Iterable[str], before: Optional[FileIdentity] = None
) -> Iterator[Tuple[CsvTable, FileIdentity]]:
    """Open a CSV with the `wanted` columns. Whatever goes wrong inside becomes FatalError(2), one line with the path.

    `before` is the file's identity at an earlier reading, if there was one.
    """
    csv.field_size_limit(MAX_CELL)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file, and it has to be read twice"
            raise FatalError(EXIT_USAGE, what)
        with open(path, "rb", buffering=0) as raw:

            def identity() -> FileIdentity:
                found = os.fstat(raw.fileno())
                return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

            opened = identity()
            changed = FatalError(EXIT_USAGE, "changed while it was being read; wait for the export to finish")
            if before and opened != before:
                raise changed
            try:
                yield CsvTable(io.FileIO(raw.fileno(), closefd=False), wanted), opened
            finally:
                if identity() != opened:
                    raise changed
    except (EOFError, zlib.error, gzip.BadGzipFile):
        words = f"{path}: the gzip file is cut off or damaged; fetch it again"
        raise FatalError(EXIT_USAGE, words) from None
    except OSError as error:
        raise FatalError(EXIT_USAGE, f"{path}: can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FatalError(EXIT_USAGE, f"{path}: not UTF-8 ({error.reason}); export the CSV as UTF-8") from None
    except csv.Error as error:
        raise FatalError(EXIT_USAGE, f"{path}: not a well-formed CSV: {error}") from None
    except FatalError as stop:
        raise FatalError(stop.exit_code, f"{path}: {stop}") from None


_SAVE_AS = "not a CSV; save it as «CSV UTF-8 (comma delimited)»"
_UNPACK = "not a CSV; unpack it first"
_EXPORT = "not a CSV; export the table as CSV"
FOREIGN_FILES = (
    (rb"PK\x03\x04.{26}(\[Content_Types\]\.xml|_rels/|xl/|docProps/)", f"an Excel workbook, {_SAVE_AS}"),
    (rb"PK\x03\x04.{26}mimetypeapplication/vnd\.oasis", f"an OpenDocument spreadsheet, {_SAVE_AS}"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", f"a ZIP archive, {_UNPACK}"),
    (rb"\xd0\xcf\x11\xe0", f"an old Excel workbook, {_SAVE_AS}"),
    (rb"\x1f\x8b", f"gzip inside gzip, {_UNPACK}"),
    (rb"BZh[1-9]1AY", f"a bzip2 archive, {_UNPACK}"),
    (rb"\xfd7zXZ\0", f"an xz archive, {_UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"a Zstandard archive, {_UNPACK}"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive, {_UNPACK}"),
    (rb"Rar!\x1a\x07", f"a RAR archive, {_UNPACK}"),
    (rb"\x04\x22\x4d\x18", f"an LZ4 archive, {_UNPACK}"),
    (rb"\x1f[\x9d\xa0]", f"a compress archive, {_UNPACK}"),
    (rb"\xff\x06\0\0sNaPpY", f"a Snappy archive, {_UNPACK}"),
    (rb".{257}ustar", f"a tar archive, {_UNPACK}"),
    (rb"PAR1", f"a Parquet file, {_EXPORT}"),
    (rb"ORC[^\w,\"; \t]", f"an ORC file, {_EXPORT}"),
    (rb"Obj\x01", f"an Avro file, {_EXPORT}"),
    (rb"ARROW1|FEA1", f"an Arrow file, {_EXPORT}"),
    (rb"SQLite format 3\0", f"an SQLite database, {_EXPORT}"),
    (rb"%PDF-", f"a PDF, {_EXPORT}"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff|\0\0\0[^\0]|[^\0]\0\0\0", "UTF-32; export the CSV as UTF-8"),
    (rb"\xff\xfe|\xfe\xff|\0[^\0]\0|[^\0]\0[^\0]\0", "UTF-16; export the CSV as UTF-8"),
    (rb".{0,3}\0", "a binary file, not a CSV"),
    (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html)", "a web page (HTML), not a CSV; was the download a login page?"),
    (rb"(\xef\xbb\xbf)?\s*<", f"XML, {_EXPORT}"),
    (rb"(\xef\xbb\xbf)?\s*[\[{]", f"JSON, {_EXPORT}"),
)


def not_our_csv_reason(head: bytes) -> str:
    """Say what it is that begins like no CSV of ours, `""` where it may be one."""
    for pattern, what in FOREIGN_FILES:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE if b"html" in pattern else re.DOTALL):
            return what
    (first, *_) = head.lstrip(b"\xef\xbb\xbf \r\n").splitlines() or [b""]
    if first.lower().startswith(b"sep="):
        return "the first line is `sep=`, a note for Excel alone; delete it"
    for mark, name in ((b";", "semicolons"), (b"\t", "tabs"), (b"|", "vertical bars")):
        if b"," not in first and mark in first:
            return f"separated by {name}; export the CSV with commas"
    return ""


def locate_columns(header: Sequence[str], wanted: Iterable[str]) -> List[int]:
    """Return the places of the wanted columns in a header. Raises FatalError(2) naming what is missing or doubled."""
    names = [name.strip().upper() for name in header]
    if any("," in name for name in names if "\n" in name or "\r" in name):
        raise FatalError(EXIT_USAGE, "the header holds other rows (a stray quote?)")
    missing = [name for name in wanted if name not in names]
    if missing:
        found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "none"
        data = any("@" in name or name.startswith("DON:") for name in names)
        hint = "; its first line is a contact: each file needs a header of its own" if data else ""
        which = f"column{'s' * (len(missing) > 1)} {', '.join(missing)}"
        raise FatalError(EXIT_USAGE, f"missing {which} (found: {found}){hint}")
    doubled = [name for name in wanted if names.count(name) > 1]
    if doubled:
        raise FatalError(EXIT_USAGE, f"the column {doubled[0]} is there twice")
    return [names.index(name) for name in wanted]


class CsvPart(NamedTuple):
    """One file of an export after the first reading."""

    path: Path
    identity: FileIdentity
    rows: int
    header_line: int
    rows_are_lines: bool  # so that the lines of other rows need not be parsed again


def read_contacts(paths: Sequence[Path], emails: Iterable[str] = ()) -> CsvContents:
    """Read the parts of an export as one; of `emails` every row is stored, of others those that recur.

    Each file is read twice, to hold few of very many rows. Raises FatalError(2) where one can't be read, is no UTF-8
    CSV or lacks a column, and where there are invalid rows and no other.
    """
    contents = CsvContents(files=len(paths))
    odd: Dict[int, List[InvalidRow]] = {}  # hashes of loose keys that differ from the key, with the invalid rows
    parts, wanted = select_rows(paths, contents, odd, emails)
    _store_rows(_wanted_rows(parts, wanted), contents, odd)
    order = {str(path): index for index, path in enumerate(paths)}
    contents.invalid_rows.sort(key=lambda row: (order[row.file], row.line))
    invalid = contents.invalid_rows
    if invalid and not contents.contacts_read:
        hint = looks_like(invalid)
        why = "; ".join(some([f"{place_of(row.file, row.line, len(paths))}: {row.reason}" for row in invalid], 3))
        words = f"no usable row, {plural(len(invalid), 'invalid one')} ({why})" + (f"; {hint}" if hint else "")
        raise FatalError(EXIT_USAGE, f"{', '.join(some(list(order), 3))}: {words}")
    return contents


def place_of(file: str, line: int, files: int) -> str:
    return f"{file}, line {line}" if files > 1 else f"line {line}"


def select_rows(
    paths: Sequence[Path], contents: CsvContents, odd: Dict[int, List[InvalidRow]], emails: Iterable[str]
) -> Tuple[List[CsvPart], bytes]:
    """Check every row, and tell for each whether it is stored: its email or id recurs, or the email is requested.

    A hash stands for a value, so a million rows cost tens of megabytes; two values of one hash do no harm.
    """
    parts: List[CsvPart] = []
    keys, ids = array("q"), array("q")  # -1, which no hash is, for a row that is left out
    for path in paths:
        with open_table(path, COLUMNS.values()) as (table, identity):
            header_line, start = table.rows.line_num, len(keys)
            _survey_rows(table, str(path), contents, keys, ids, odd)
            count = len(keys) - start
            parts.append(CsvPart(path, identity, count, header_line, table.rows.line_num - header_line == count))
    contents.contacts_read = len(keys) - keys.count(-1)
    named = map(loose_key, emails)
    wanted_keys = repeated(keys).union(map(hash, chain(named, contents.emails_in_invalid_rows))) - {-1}
    wanted_ids = repeated(ids) - {-1}
    if not wanted_ids:
        return parts, bytes(map(wanted_keys.__contains__, keys))
    return parts, bytes(key in wanted_keys or one in wanted_ids for key, one in zip(keys, ids))


def _survey_rows(
    table: CsvTable,
    file: str,
    contents: CsvContents,
    keys: "array[int]",
    ids: "array[int]",
    odd: Dict[int, List[InvalidRow]],
) -> None:
    """Check the rows of a file; append the hashes of each row's loose key and id.

    Most rows are plain and take the short way; with a million of them it is half of a preview's time.
    """
    places = dict(zip(COLUMNS, table.places))
    pick = itemgetter(*(places[name] for name in ("id", "email", "external_ref", "tickets")))
    prefixes = (Contact.SYSTEM_PREFIX, Contact.user_prefix)
    is_plain, is_normalized = _PLAIN_ADDRESS.fullmatch, unicodedata.is_normalized
    add_key, add_id = keys.append, ids.append
    rows, width, data, line = table.rows, table.width, table.bytes, table.rows.line_num
    try:
        for row in rows:
            line, lines, problem = rows.line_num, rows.line_num - line, ("", "")
            if len(row) != width or lines > 1 or data.has_nul:
                problem = table.shape_error(row)
            if not problem[0]:
                identity, email, reference, tickets = pick(row)
                identity, reference, key = identity.strip(), reference.strip(), email.lower()
                if not (
                    is_plain(email)
                    and (email.isascii() or (key == email == key.casefold() and is_normalized("NFKC", key)))
                    and "xn--" not in key
                    and identity and reference
                    and parse_count(tickets) is not None
                ):  # fmt: skip
                    identity, email, reference = map(trimmed_text, (identity, email, reference))
                    problem = Contact.cells_error(identity, email, reference, tickets)
                    key = loose_key(email)
                    if not problem[0] and key != email_key(email):
                        odd.setdefault(hash(key), [])
            if problem[0]:
                _add_invalid_row(contents, file, line, row, places["email"], problem, odd)
                add_key(-1)
                add_id(-1)
                continue
            add_key(hash(key))
            add_id(hash(identity))
            if not reference.startswith(prefixes):
                contents.other_refs += 1
                contents.other_ref = min(contents.other_ref or reference, reference)
    except csv.Error as error:
        raise table.located(error) from None


def repeated(values: "array[int]") -> Set[int]:
    if len(set(values)) == len(values):
        return set()
    seen: Set[int] = set()
    found: Set[int] = set()
    for value in values:
        (found if value in seen else seen).add(value)
    return found


def _add_invalid_row(
    contents: CsvContents,
    file: str,
    line: int,
    row: Sequence[str],
    place: int,
    problem: Tuple[str, str],
    odd: Dict[int, List[InvalidRow]],
) -> None:
    """Leave a row out, and with it all groups whose email stands in any of its fields; a blank row is nothing."""
    if not row:
        return
    email = trimmed_text(row[place]).replace(_NUL_MARK, "") if place < len(row) else ""
    invalid = InvalidRow(file, line, *problem, email[:320] or None)
    contents.invalid_rows.append(invalid)
    words: Set[str] = set()
    for cell in row:
        if any(sign in cell for sign in _AT_SIGNS):
            text = cell.replace(_NUL_MARK, "")
            words.update((text, trimmed_text(text), *re.split(r"[,\r\n]", text), *re.split(r"[\s,;<>\"]+", text)))
            words.update(re.findall(r"[^\s,;\"<>()\[\]{}:|]+", text))
    contents.emails_in_invalid_rows.update(map(loose_key, words))
    if "@" in email:
        odd.setdefault(hash(loose_key(email)), []).append(invalid)


def _wanted_rows(parts: Sequence[CsvPart], wanted: bytes) -> Iterator[Tuple[str, int, Contact]]:
    """Read the files again, as far as they have rows that are wanted; yields file, line and contact."""
    start = 0
    for part in parts:
        mine = wanted[start : start + part.rows]
        start += part.rows
        with open_table(part.path, COLUMNS.values(), part.identity) as (table, _):
            pick, first = itemgetter(*table.places), part.header_line + 1
            rows: Iterable[Tuple[int, List[str]]] = compress(table, mine)
            if part.rows_are_lines:
                rows = zip(compress(range(first, first + part.rows), mine), table.parse(compress(table.lines, mine)))
            for line, row in rows:
                yield str(part.path), line, Contact.from_cells(pick(row))


def _store_rows(
    rows: Iterable[Tuple[str, int, Contact]], contents: CsvContents, odd: Mapping[int, Sequence[InvalidRow]]
) -> None:
    """Take each row once; rows of one id that differ are invalid. Find the look-alikes among all of them."""
    by_id: Dict[str, List[Tuple[str, int, Contact]]] = {}
    similar: Dict[str, List[Tuple[str, str, int]]] = {}  # loose key -> email, file and line
    for invalid in chain.from_iterable(odd.values()):
        email = str(invalid.email)
        similar.setdefault(loose_key(email), []).append((email, invalid.file, invalid.line))
    for file, line, contact in rows:
        variants = by_id.setdefault(contact.id, [])
        if odd and (contact.is_user or contact.is_system) and hash(loose_key(contact.email)) in odd:
            similar.setdefault(loose_key(contact.email), []).append((contact.email, file, line))
        if any(contact == other for _, _, other in variants):
            contents.contacts_read -= 1
            contents.other_refs -= not (contact.is_user or contact.is_system)
        else:
            variants.append((file, line, contact))
            contents.contacts.append(contact)
    for variants in by_id.values():
        for file, line, contact in variants if len(variants) > 1 else ():
            other_file, other_line, other = next(one for one in variants if one[:2] != (file, line))
            differing = [COLUMNS[name] for name in COLUMNS if getattr(contact, name) != getattr(other, name)]
            where = f"line {other_line}" if other_file == file else f"{other_file}, line {other_line},"
            reason = f"the {COLUMNS['id']} of {where} with another {', '.join(differing)}"
            contents.invalid_rows.append(InvalidRow(file, line, "conflict", reason, contact.email[:320]))
            contents.emails_in_invalid_rows.add(loose_key(contact.email))
    for _, found in sorted(similar.items()):
        emails = sorted({email_key(email) for email, _, _ in found})
        if len(emails) > 1:
            lines = [{"email": email, "file": file, "line": line} for email, file, line in sorted(set(found))]
            contents.look_alikes.append({"emails": emails, "lines": lines})


# ---------------------------------------------------------------------------------------------------
# Detection: which contacts are one person
# ---------------------------------------------------------------------------------------------------


class State(str, Enum):
    """How far a pair is.

    From REQUESTED to PROVING it is unfinished: it was asked for, and only an end of ENDED makes that forgotten.
    """

    PLANNED = "planned"
    FAILED = "failed"  # refused, or failed before a merge was asked for: tried again by the next run
    REQUESTED = "requested"  # the request may have left
    ACKNOWLEDGED = "acknowledged"  # DevRev has accepted it
    MERGED = "merged"  # the duplicate has gone
    PROVING = "proving"  # the reference is on the primary
    DONE = "done"  # nothing was left behind: never touched again
    MERGED_ELSEWHERE = "merged_elsewhere"  # somebody else was faster
    SETTLED = "settled"  # what could not be mended was accepted by a person
    UNDOING = "undoing"  # an undo has begun
    UNDONE = "undone"


REQUESTED_STATES = (State.REQUESTED, State.ACKNOWLEDGED)
UNFINISHED = (*REQUESTED_STATES, State.MERGED, State.PROVING)
ENDED = (State.DONE, State.MERGED_ELSEWHERE, State.SETTLED)


@dataclass
class Pair:
    """One merge: `duplicate` goes into `primary`, and `new_ref` (if any) becomes the primary's external_ref."""

    primary: Contact
    duplicate: Contact
    new_ref: Optional[str]
    state: State = State.PLANNED
    code: str = ""
    error: str = ""
    backup: str = ""
    requested_at: float = 0.0  # epoch seconds, of the last request
    first_requested_at: float = 0.0
    seconds: float = 0.0
    left_behind: List[Json] = field(default_factory=list)
    refused: bool = False  # DevRev's answer to the last request was a no
    details: Json = field(default_factory=dict)  # `deleted`: ids; `accepted`: what was settled; `undo`
    report: str = ""  # that names it: as ended, or as unfinished
    updated: str = ""
    exported: Optional["Pair"] = None  # of an unfinished pair: the same as this run's CSV has it
    is_overruled: bool = False  # of an unfinished pair: the reference that is to stay is another by now

    @property
    def email(self) -> str:
        return self.primary.key

    @property
    def ids(self) -> Tuple[str, str]:
        return self.primary.id, self.duplicate.id

    @property
    def is_settleable(self) -> bool:
        """Whether a person may accept what it lacks: a report has said what is wrong, and the duplicate has gone or
        the merge can't be asked for again."""
        gone = self.state in (State.MERGED, State.PROVING)
        return bool(self.report) and self.code in (SETTLEABLE_MERGED if gone else SETTLEABLE_REQUESTED)


# Why a merged pair can't be brought to its end.
SETTLEABLE_MERGED = (
    "left_behind", "still_listed", "external_ref_changed", "external_ref_conflict", "external_ref_not_set", "not_found",
    "merged_into_another", "backup_failed", "forbidden",
)  # fmt: skip
# Why a merge that was asked for, and has not come, is not asked for again.
SETTLEABLE_REQUESTED = (
    "not_found", "not_active", "email_changed", "external_ref_changed", "different_rev_org", "several_user_refs",
    "merged_into_another", "merge_refused", "forbidden", "plan_changed",
)  # fmt: skip


def into(pair: Pair) -> str:
    return f"{pair.duplicate.short_id} into {pair.primary.short_id}"


@dataclass(eq=False)
class Group:
    """The contacts of one email: every pair has the same primary; the pair with the `user_` contact is first."""

    email: str
    pairs: List[Pair]
    requesting: Optional[Pair] = None  # the pair that is being asked for
    chosen: str = ""  # the reference that --choices names for the email
    age_undecided: bool = False  # which contact is the oldest could not be read from the CSV
    dropped: Tuple["Dropped", ...] = ()  # pairs that the live check has found to be no pairs any more

    @property
    def primary(self) -> Contact:
        return self.pairs[0].primary

    def contacts(self) -> List[Contact]:
        """The primary, the duplicate whose merge is being requested, and every other whose merge is still planned."""
        return [self.primary, *(pair.duplicate for pair in self.pending())]

    def pending(self) -> List[Pair]:
        """The pairs that are still to be merged."""
        dropped = {one.pair.ids for one in self.dropped}
        planned = (pair for pair in self.pairs if pair.state is State.PLANNED or pair is self.requesting)
        return [pair for pair in planned if pair.ids not in dropped]

    def all_contacts(self) -> List[Contact]:
        return [self.primary, *(pair.duplicate for pair in self.pairs)]

    def primary_ref(self) -> str:
        """The reference that the primary has now, as far as this tool has moved one to it."""
        moved = [pair.new_ref for pair in self.pairs if pair.new_ref and pair.state in (State.PROVING, State.DONE)]
        moved += [one.pair.new_ref for one in self.dropped if one.code == "already_merged" and one.pair.new_ref]
        return moved[0] if moved else self.primary.external_ref

    def has_absorbed(self) -> bool:
        """Whether this tool has asked for a merge into the primary since the export."""
        return any(pair.state in (*UNFINISHED, *ENDED) for pair in self.pairs)

    def final_ref(self) -> str:
        """The reference that the one remaining contact has in the end."""
        return next((pair.new_ref for pair in self.pairs if pair.new_ref), self.primary.external_ref)

    def lost_refs(self) -> List[Contact]:
        """Duplicates whose `user_` reference nobody has in the end: the application's accounts lose their contact."""
        duplicates, kept = (pair.duplicate for pair in self.pairs), self.final_ref()
        return [one for one in duplicates if one.is_user and one.external_ref != kept]

    def overrules(self, pair: Pair) -> bool:
        """Whether a merge of its contacts, asked for by an earlier run, would leave another reference than it keeps."""
        if pair.new_ref:
            return pair.new_ref != self.final_ref()
        return pair.duplicate.external_ref == self.final_ref()

    def warnings(self) -> List[Tuple[str, str]]:
        """Codes and words of what a person should know before the group is merged."""
        contacts = self.all_contacts()
        found: List[Tuple[str, str]] = []
        if self.chosen and len(contacts) > mailbox_limit(self.email):
            found.append(("shared_mailbox", f"joins {len(contacts)} contacts of what looks like a shared mailbox"))
        names = different_names(self.email, contacts)
        if names:
            found.append(("names_differ", f"joins different names: {', '.join(some(names, 6))}"))
        if self.age_undecided:
            words = f"age could not decide which contact is the primary: the smallest id did ({self.primary.short_id})"
            found.append(("age_undecided", words))
        return found


def different_names(email: str, contacts: Sequence[Contact]) -> List[str]:
    """Return the names of contacts that may not be one person's, none where they may.

    Case does not count, nor does a name that is the address, its local part or the short id, nor a name all of whose
    words are in the other.
    """
    shown = {contact.display_name for contact in contacts}
    if len(shown) == 1 and "" not in shown:
        return []
    names: Dict[FrozenSet[str], str] = {}
    for contact in contacts:
        for name in (contact.display_name.strip(), contact.full_name.strip()):
            folded = name.casefold()
            if folded and folded not in (
                email.casefold(),
                email.rpartition("@")[0].casefold(),
                contact.short_id.casefold(),
            ):
                names.setdefault(frozenset(re.findall(r"\w+", unicodedata.normalize("NFKC", folded))), name)
                break
    keys = list(names)
    differ = any(not (one <= other or other <= one) for index, one in enumerate(keys) for other in keys[:index])
    return sorted(names.values()) if differ else []


# The whole local part of an address, before any `+`.
ROLE_ADDRESSES = frozenset((
    "info", "support", "help", "helpdesk", "service", "sales", "contact", "hello", "office", "team", "admin",
    "administrator", "billing", "accounts", "accounting", "finance", "hr", "jobs", "careers", "marketing", "press",
    "media", "legal", "privacy", "security", "abuse", "postmaster", "hostmaster", "webmaster", "root", "mail", "email",
    "reception", "orders", "booking", "bookings", "customerservice", "customer-service", "customercare", "feedback",
))  # fmt: skip
PLACEHOLDER_ADDRESSES = frozenset((
    "noreply", "no-reply", "no_reply", "donotreply", "do-not-reply", "none", "null", "nobody", "unknown", "anonymous",
    "test", "na", "n-a", "noemail", "no-email", "invalid",
))  # fmt: skip


def mailbox_limit(email: str) -> int:
    """Return with how many contacts an address is still taken for one person's."""
    local = email.strip().rpartition("@")[0].partition("+")[0].lower()
    return 1 if local in PLACEHOLDER_ADDRESSES else 2 if local in ROLE_ADDRESSES else 3


class SkippedGroup(NamedTuple):
    """A group that is left alone. `contacts` are those that take part: `user_` first, the likeliest of a kind first."""

    email: str
    code: str
    contacts: List[Contact]
    details: str = ""  # the reason, where it is not the one of all groups with this code

    def reason(self) -> str:
        return self.details or skip_words(self.code)[0]

    def choice_lines(self) -> Dict[str, Contact]:
        """The lines of CSV of which --choices may take one, each with the contact whose reference it keeps."""
        if self.code not in ("several_user_refs", "no_user_ref"):
            return {}
        users = [contact for contact in self.contacts if contact.is_user]
        return {csv_line(self.email, contact.external_ref): contact for contact in users or self.contacts}


SKIP_REASONS = {
    "shared_mailbox": (
        "more contacts than one person has: probably a shared mailbox, and merging would show others' conversations",
        "leave it as it is; where it is one person after all, name the contact to keep with --choices",
    ),
    "several_user_refs": (
        "several contacts have a user_ reference; which one the application uses can't be told from the export",
        "find out in the application which user_ reference is alive, and name it with --choices",
    ),
    "no_user_ref": (
        "several REVU- contacts and none with a user_ reference: the application knows none of them",
        "nothing to do for the application; where you want one contact, name the one to keep with --choices",
    ),
    "invalid_row": (
        "a row of this email is bad or conflicts with another, so the group may not be complete",
        "fix the rows, which are named with their lines, and run again",
    ),
    "undone": (
        "a merge of this email was undone",
        "name the address with --email, and an export made since, to merge it again",
    ),
    "cancelled": (
        "a merge of this email was given up with --settle",
        "name the address with --email to merge it after all",
    ),
    "already_gone": (
        "the duplicate no longer exists in DevRev",
        "nothing to do; an export made now does not have it",
    ),
    "already_merged": (
        "looks merged already, by a run in another folder?",
        "nothing to do; an export made now shows it",
    ),
    "different_rev_org": (
        "the duplicate belongs to another workspace (rev org) than the primary",
        "check them in DevRev; --across-workspaces merges them all the same",
    ),
}


def skip_words(code: str) -> Tuple[str, str]:
    """Return the reason and the advice of SKIP_REASONS, with the prefix of the user's own application."""
    reason, advice = (words.replace("user_", Contact.user_prefix) for words in SKIP_REASONS[code])
    return reason, advice


@dataclass
class Plan:
    """What a run would do: the one object that the preview prints and the run carries out."""

    groups: List[Group]
    skipped: List[SkippedGroup]
    invalid_rows: List[InvalidRow]
    contacts_read: int
    already_merged: int = 0
    unreported: int = 0  # merged by a run that was killed before its report
    ids: Set[Tuple[str, str]] = field(default_factory=set)  # of all pairs of the CSV
    chosen: List[Group] = field(default_factory=list)  # by --choices, and still to be merged
    id: str = ""  # of `plan_id`
    left_alone: Dict[str, str] = field(default_factory=dict)  # email -> why there is nothing to merge
    overruled: Set[Tuple[str, str]] = field(default_factory=set)  # pairs of earlier runs that contradict it
    look_alikes: List[Json] = field(default_factory=list)
    files: int = 1  # that the CSV has come in
    other_refs: int = 0  # contacts that take no part
    other_ref: str = ""  # an example
    warnings: List[Json] = field(default_factory=list)  # of `find_warnings`, before the groups are consumed

    def others_line(self) -> str:
        """Say how many contacts take no part because of their reference, `""` where all do."""
        if not self.other_refs:
            return ""
        with_refs = f"{plural(self.other_refs, 'contact')} with other references, for example {self.other_ref[:60]},"
        return f"{with_refs} take{'s' * (self.other_refs == 1)} no part"

    def find_warnings(self) -> List[Json]:
        """What a person should know of the groups that are still to be merged, one entry for each group and code."""
        return [
            {"email": group.email, "code": code, "warning": words}
            for group in self.groups
            for code, words in group.warnings()
            if any(pair.state not in ENDED for pair in group.pairs)
        ]

    def pairs(self) -> Iterator[Pair]:
        return (pair for group in self.groups for pair in group.pairs if pair.state not in ENDED)

    def count(self) -> int:
        return sum(1 for _ in self.pairs())


def plan_id(groups: Iterable[Group], **options: Any) -> str:
    """Name what all groups of a CSV come to: what is merged into what with which reference, and by which `options`."""
    pairs = sorted(json.dumps([*pair.ids, pair.new_ref]) for group in groups for pair in group.pairs)
    lines = "\n".join([json.dumps(options, sort_keys=True), *pairs])
    return hashlib.sha256(lines.encode("ascii")).hexdigest()[:12]


def csv_line(*cells: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # of which no character stays unquoted in a cell
    return line.getvalue()[:-2]


def read_choices(path: Path) -> Dict[str, str]:
    """Read which contact of an email is the one to keep: a CSV of EMAIL and EXTERNAL_REF, as key -> reference.

    Raises FatalError(2) where the file can't be read, lacks a column, or has a row that is no choice or a second one.
    """
    choices: Dict[str, str] = {}
    lines: Dict[str, int] = {}
    with open_table(path, ("EMAIL", "EXTERNAL_REF")) as (table, _):
        for line, row in table:
            if not row:
                continue
            if len(row) != table.width:
                raise FatalError(EXIT_USAGE, f"line {line}: {plural(len(row), 'field')} instead of {table.width}")
            email, reference = (trimmed_text(row[place]) for place in table.places)
            key = email_key(email)
            if not key or not reference:
                raise FatalError(EXIT_USAGE, f"line {line}: empty {'EXTERNAL_REF' if key else 'EMAIL'}")
            if key in choices:
                words = (
                    f"a second choice for {key} (the first: line {lines[key]}); cut the file down to one line a group"
                )
                raise FatalError(EXIT_USAGE, f"line {line}: {words}")
            choices[key], lines[key] = reference, line
    return choices


def choices_template(skipped: Iterable[SkippedGroup]) -> Iterator[bytes]:
    """Yield the lines of a file for --choices, a line for each contact that may be kept of the skipped groups.

    The further columns are there to decide by, and are ignored when it is read.
    """
    columns = ("EMAIL", "EXTERNAL_REF", "DISPLAY_NAME", "TICKET_COUNT", "CREATED_AT", "REV_USER_ID", "CONTACTS")
    yield ("\ufeff" + csv_line(*columns) + "\n").encode("utf-8")
    for group in skipped:
        for contact in group.choice_lines().values():
            cells = (
                group.email, contact.external_ref, contact.name, str(contact.tickets), contact.created, contact.id,
                str(len(group.contacts)),
            )  # fmt: skip
            yield (csv_line(*map(guard_cell, cells)) + "\n").encode("utf-8", "backslashreplace")


_CLOCK = (
    r"(?:(?:\s*,\s*|\s+at\s+|\s+|T)(?P<hour>\d{1,2})[:.](?P<minute>\d\d)(?:[:.](?P<second>\d\d)(?:[.,](?P<part>\d+))?)?"
    r"(?:\s*(?P<half>[ap])\.?m\.?)?)?"
)
_ZONE = (
    r"\s*(?:Z|UTC|GMT)?\s*(?:(?P<sign>[+-])(?P<east>\d{1,2})(?::?(?P<odd>\d\d))?)?\s*(?:Z|UTC|GMT)?(?:\s*\([^)]*\))?"
)
_WEEKDAY = r"(?:[a-z]{3,9}\.?,?\s+)?"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})" + _CLOCK + _ZONE,
        r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)(?:T?(?P<hour>\d\d):?(?P<minute>\d\d)(?::?(?P<second>\d\d))?)?"
        + _ZONE,
        _WEEKDAY + r"(?P<day>\d{1,2})[-\s./]+(?P<name>[a-z]{3,9})\.?[-\s,./]+(?P<year>\d{4}|\d\d)" + _CLOCK + _ZONE,
        _WEEKDAY + r"(?P<name>[a-z]{3,9})\.?\s+(?P<day>\d{1,2})(?:st|nd|rd|th)?,?\s+(?P<year>\d{4})" + _CLOCK + _ZONE,
        _WEEKDAY + r"(?P<name>[a-z]{3,9})\s+(?P<day>\d{1,2})" + _CLOCK + _ZONE + r"\s+(?P<year>\d{4})",
        r"(?P<first>\d{1,2})(?P<mark>[-/.])(?P<other>\d{1,2})(?P=mark)(?P<year>\d{4})" + _CLOCK + _ZONE,
        r"(?P<first>\d{1,2})(?P<mark>[/.])(?P<other>\d{1,2})(?P=mark)(?P<year>\d\d)" + _CLOCK + _ZONE,
    )
)
_EPOCHS = {9: 9, 10: 9, 12: 6, 13: 6, 15: 3, 16: 3, 18: 0, 19: 0}  # digits of an epoch time -> zeros to nanoseconds
_DAY = 86_400 * 10**9


def parse_instants(text: str) -> Tuple[Optional[int], Optional[int]]:
    """Return the time that a cell holds, in nanoseconds since 1970, read as month/day/year and as day/month/year.

    The two differ only for dates such as 1/2/2024; None where a reading makes no date. A time without a zone is UTC;
    zones by other names than UTC and GMT are not known.
    """
    text = text.strip()
    number = re.fullmatch(r"(\d{5}|\d{9,10}|\d{12,13}|\d{15,16}|\d{18,19})(?:\.(\d{1,9})\d*)?", text)
    if number:
        whole, part = number.group(1), int((number.group(2) or "0").ljust(9, "0"))
        if len(whole) in _EPOCHS:
            found = int(whole) * 10 ** _EPOCHS[len(whole)] + (part if len(whole) < 12 else 0)
        else:  # the days of a spreadsheet since the end of 1899
            found = (int(whole) - 25_569) * _DAY + part * 86_400
        return found, found
    match = next(filter(None, (one.fullmatch(text) for one in _DATES)), None) if len(text) < 100 else None
    if not match:
        return None, None
    cells = match.groupdict()
    year, name = int(cells["year"]), (cells.get("name") or "")[:3].lower()
    year += 0 if len(cells["year"]) == 4 else 2000 if year < 69 else 1900
    if "first" in cells:
        first, other = int(cells["first"]), int(cells["other"])
        readings = [(other, first)] * 2 if cells["mark"] == "." else [(first, other), (other, first)]
    else:
        month = int(cells.get("month") or 0) or (_MONTHS.index(name) + 1 if name in _MONTHS else 0)
        readings = [(month, int(cells["day"]))] * 2
    hour, minute, second = (int(cells.get(part) or 0) for part in ("hour", "minute", "second"))
    if cells.get("half"):
        hour = -1 if not 1 <= hour <= 12 else hour % 12 + 12 * (cells["half"].lower() == "p")
    offset = (int(cells["east"] or 0) * 60 + int(cells["odd"] or 0)) * (-60 if cells["sign"] == "-" else 60)
    part = int((cells.get("part") or "0")[:9].ljust(9, "0"))
    found_instants: List[Optional[int]] = []
    for month, day in readings:
        try:
            when = datetime(year, month, day, hour, minute, second) - datetime(1970, 1, 1)
            found_instants.append((when.days * 86_400 + when.seconds - offset) * 10**9 + part)
        except ValueError:
            found_instants.append(None)
    return found_instants[0], found_instants[1]


def rank(contacts: List[Contact]) -> Tuple[List[Contact], bool]:
    """Order contacts of one kind: most tickets first, then the oldest, then the smallest id. Return them, and whether
    age could not decide which is first.

    Where one of the tied dates can't be read, or the first depends on whether 1/2/2024 is in January, the id decides.
    """
    if len(contacts) < 2:
        return contacts, False
    by_id = sorted(contacts, key=attrgetter("id"))
    tied: Dict[int, List[Contact]] = {}
    for contact in by_id:
        tied.setdefault(contact.tickets, []).append(contact)
    ranked: List[Contact] = []
    undecided = False
    for tickets in sorted(tied, reverse=True):
        equal = tied[tickets]
        if len(equal) > 1:
            instants = [parse_instants(contact.created) for contact in equal]
            orders = [
                [contact for _, contact in sorted(zip(column, equal), key=itemgetter(0))]
                for column in zip(*instants)
                if None not in column
            ]
            if orders and all(order[0] is orders[0][0] for order in orders):
                equal = orders[0]
            else:
                undecided = undecided or not ranked
        ranked += equal
    return ranked, undecided


def detect(contents: CsvContents, choices: Mapping[str, str] = {}, primary: str = "revu") -> Plan:
    """Find the groups to merge and the groups to skip, ordered by email; `choices` as `read_choices` gives them.

    Raises FatalError(2) where a choice can't be followed, unless its group may not be complete and is skipped anyway.
    """
    broken = contents.emails_in_invalid_rows
    by_email: Dict[str, List[Contact]] = {email: [] for email in choices if loose_key(email) not in broken}
    for contact in contents.contacts:
        by_email.setdefault(contact.key, []).append(contact)
    plan = Plan(
        [], [], contents.invalid_rows, contents.contacts_read, look_alikes=contents.look_alikes, files=contents.files,
        other_refs=contents.other_refs, other_ref=contents.other_ref,
    )  # fmt: skip
    problems: List[str] = []
    for email in sorted(by_email):
        is_broken = bool(broken) and loose_key(email) in broken
        try:
            found = classify_group(email, by_email[email], is_broken, choices.get(email, ""), primary)
        except PairError as error:
            problems.append(str(error))
            continue
        if isinstance(found, Group):
            plan.groups.append(found)
        elif found:
            plan.skipped.append(found)
        else:
            taking_part = sum(contact.is_user or contact.is_system for contact in by_email[email])
            kinds = f"{Contact.SYSTEM_PREFIX} or {Contact.user_prefix}"
            plan.left_alone[email] = f"{plural(taking_part, 'contact')} with a {kinds} reference, none to merge"
    if problems:
        raise FatalError(EXIT_USAGE, f"choices that can't be followed: {'; '.join(some(problems, 3))}")
    return plan


def classify_group(
    email: str, contacts: Iterable[Contact], broken: bool = False, choice: str = "", primary: str = "revu"
) -> Union[Group, SkippedGroup, None]:
    """Decide what becomes of the contacts of one email: a group to merge, a skip with its reason, or nothing.

    `primary` says which contact remains where there is one of each kind, the system-made `revu` or the application's
    `user`. Raises PairError where `choice`, a reference, is not that of one contact that may be kept.
    """
    contacts = list(contacts)
    users, _ = rank([contact for contact in contacts if contact.is_user])
    system, undecided = rank([contact for contact in contacts if contact.is_system])
    if broken:
        return SkippedGroup(email, "invalid_row", users + system) if users or system else None
    if choice:
        kept = resolve_choice(email, users, system, choice)
    elif len(users) + len(system) > mailbox_limit(email):
        return SkippedGroup(email, "shared_mailbox", users + system)
    elif len(users) > 1:
        return SkippedGroup(email, "several_user_refs", users + system)
    elif len(system) > 1 and not users:
        return SkippedGroup(email, "no_user_ref", system)
    elif users and system:
        (kept,) = users
    else:
        return None
    remaining = system[0] if kept.is_user and system and primary == "revu" else kept
    others = [contact for contact in (*users, *system) if contact is not remaining and contact is not kept]
    pairs = [] if kept is remaining else [Pair(remaining, kept, kept.external_ref)]
    pairs += [Pair(remaining, other, None) for other in others]
    return Group(email, pairs, chosen=choice, age_undecided=undecided and remaining is not kept) if pairs else None


def resolve_choice(email: str, users: Sequence[Contact], system: Sequence[Contact], choice: str) -> Contact:
    candidates = users or system
    found = [contact for contact in candidates if contact.external_ref.strip() == choice]
    if len(found) == 1:
        return found[0]
    if found:
        why = f"{len(found)} contacts have it"
    elif any(contact.external_ref.strip() == choice for contact in system):
        why = f"the application knows this person by a {Contact.user_prefix} reference, which has to stay"
    else:
        why = "no contact of this email has it"
    there = ", ".join(some([contact.external_ref for contact in candidates], 10)) or "nothing"
    raise PairError("bad_choice", f"{choice} for {email}: {why} (to choose from: {there})")


class HistoryRow(NamedTuple):
    """A merge of an earlier run that is not to be repeated unasked. `new_id` is the contact that an undo created."""

    email: str
    ids: Tuple[str, str]  # primary and duplicate
    code: str  # `undone` or `cancelled`
    new_id: str = ""


def blocked_by_history(groups: Iterable[Group], rows: Iterable[HistoryRow]) -> Dict[str, str]:
    """Return the emails of groups that repeat a merge which was undone or cancelled, each with the code.

    A group repeats it that has its address, or two of its contacts in whatever role. A contact that an undo created
    stands for its old id, also where that one had been created so.
    """
    rows = list(rows)
    old_ids = {row.new_id: row.ids[1] for row in rows if row.new_id}

    def original(identity: str) -> str:
        seen = {identity}
        while old_ids.get(identity, identity) not in seen:
            identity = old_ids[identity]
            seen.add(identity)
        return identity

    codes: Dict[str, str] = {}  # by email
    by_pair: Dict[FrozenSet[str], str] = {}
    partners: Dict[str, Set[str]] = {}
    for row in sorted(rows, key=lambda row: row.code != "undone"):
        codes.setdefault(row.email, row.code)
        one, other = map(original, row.ids)
        by_pair.setdefault(frozenset((one, other)), row.code)
        partners.setdefault(one, set()).add(other)
        partners.setdefault(other, set()).add(one)
    blocked: Dict[str, str] = {}
    for group in groups if rows else ():
        ids = {original(contact.id) for contact in group.all_contacts()}
        found = [codes[group.email]] if group.email in codes else []
        found += [by_pair[frozenset((one, other))] for one in ids for other in partners.get(one, set()) & ids]
        if found:
            blocked[group.email] = max(found)  # `undone` before `cancelled`
    return blocked


def live_contact_error(contact: Contact, live: Optional[Json], external_ref: str) -> Optional[PairError]:
    """Compare a row of the export with the contact as DevRev has it now; None where they agree.

    `live` is a `rev_user` of DevRev's API, None where there is none of that id.
    """
    name = contact.short_id
    if live is None:
        return PairError("not_found", f"{name} is not in DevRev any more; leave its row out of the export")
    state, reference = live.get("state"), live.get("external_ref")
    if state != "active" or live.get("primary_identity"):
        what = "merged into another contact" if live.get("primary_identity") else state or "of unknown state"
        hint = "; leave its row out of the export" if is_gone(live) else ""
        return PairError("not_active", f"{name} is {what}, not active{hint}")
    if email_of(live) != contact.key:
        return PairError("email_changed", f"{name} has another email now: {live.get('email') or 'none'}")
    if reference != external_ref:
        return PairError("external_ref_changed", f"{name} has another reference now: {reference or 'none'}")
    own = {external_ref, contact.short_id, None, ""}
    refs = live.get("external_refs")
    more = [str(one) for one in refs if one not in own] if isinstance(refs, list) else []
    if more:
        words = f"{name} has several references ({', '.join(some([external_ref, *more], 4))})"
        return PairError("several_external_refs", f"{words}, and what setting one does to the others is not known")
    return None


def is_gone(live: Optional[Json]) -> bool:
    """Whether DevRev has no such contact any more: not found, deleted, or merged into another."""
    return live is None or live.get("state") == "deleted" or bool(live.get("primary_identity"))


def rev_org_id(user: Json) -> Optional[str]:
    rev_org = user.get("rev_org")
    identity = rev_org.get("id") if isinstance(rev_org, dict) else rev_org
    return str(identity) if identity else None


class Dropped(NamedTuple):
    """A pair that the live check takes out of its group, while the others go on."""

    pair: Pair
    code: str  # `already_gone`, `already_merged` or `different_rev_org`
    reason: str


class LiveCheck(NamedTuple):
    """What DevRev says of a group now: the error that refuses it, if any, else the pairs that are dropped from it."""

    error: Optional[PairError] = None
    dropped: Tuple[Dropped, ...] = ()

    @property
    def already_merged(self) -> bool:
        """Whether the reference has moved already, by a run that this savepoint does not know."""
        return any(one.code == "already_merged" for one in self.dropped)


LIVE_CODES = (
    "not_found", "not_active", "email_changed", "external_ref_changed", "several_external_refs", "shared_mailbox",
    "several_user_refs", "group_changed", "unverified", "different_rev_org",
)  # fmt: skip


def check_live(
    group: Group,
    live: Mapping[str, Optional[Json]],
    listed: Iterable[Json],
    unverified: Optional[Collection[str]] = None,
    across_workspaces: bool = False,
    try_unverified: bool = False,
) -> LiveCheck:
    """Compare a group with DevRev as it is now. Of several errors the first in the order of LIVE_CODES counts.

    `live` maps the ids of the group's contacts to rev_users, `listed` are the rev_users that DevRev lists for its
    addresses, `unverified` the ids that are known to be unverified (None where nothing is known).
    """
    primary, dropped = group.primary, dropped_pairs(group, live, across_workspaces)
    gone = {one.pair.ids for one in dropped}
    pairs = [pair for pair in group.pending() if pair.ids not in gone]
    moved = [one.pair.new_ref for one in dropped if one.code == "already_merged"]
    expected = (moved and moved[0]) or group.primary_ref()
    errors = [live_contact_error(primary, live.get(primary.id), expected)]
    for pair in pairs:
        duplicate = live.get(pair.duplicate.id)
        errors.append(live_contact_error(pair.duplicate, duplicate, pair.duplicate.external_ref))
        if duplicate and pair.new_ref and not across_workspaces and orgs_differ(live.get(primary.id), duplicate):
            words = (
                f"{into(pair)}: they belong to different workspaces (rev orgs), and {pair.new_ref} would have to move"
            )
            errors.append(PairError("different_rev_org", words))
        ids = {identity: known_unverified(live.get(identity), identity, unverified) for identity in pair.ids}
        if ids[pair.duplicate.id] and not ids[primary.id] and not try_unverified:
            words = f"{into(pair)}: DevRev does not merge an unverified contact into a verified one"
            errors.append(PairError("unverified", f"{words} (--try-unverified requests it all the same)"))
    errors.append(live_group_error(group, live, listed) if pairs else None)
    found = sorted((error for error in errors if error), key=lambda error: LIVE_CODES.index(error.code))
    return LiveCheck(found[0]) if found else LiveCheck(None, tuple(dropped))


def dropped_pairs(group: Group, live: Mapping[str, Optional[Json]], across_workspaces: bool) -> List[Dropped]:
    """The pairs of a group that are none any more and keep the others from nothing."""
    dropped: List[Dropped] = []
    primary = live.get(group.primary.id)
    for pair in group.pending():
        duplicate = live.get(pair.duplicate.id)
        name, never_requested = pair.duplicate.short_id, pair.state is State.PLANNED and not pair.first_requested_at
        if is_gone(duplicate) and never_requested:
            if not pair.new_ref:
                dropped.append(Dropped(pair, "already_gone", f"{name} no longer exists in DevRev"))
            elif primary and not is_gone(primary) and primary.get("external_ref") == pair.new_ref:
                words = f"{into(pair)} looks merged already, by a run in another folder? The primary has {pair.new_ref}"
                dropped.append(Dropped(pair, "already_merged", words))
        elif never_requested and not pair.new_ref and not across_workspaces and orgs_differ(primary, duplicate):
            words = f"{name} belongs to another workspace (rev org) than {pair.primary.short_id}"
            dropped.append(Dropped(pair, "different_rev_org", words))
    return dropped


def orgs_differ(one: Optional[Json], other: Optional[Json]) -> bool:
    """Whether two contacts belong to different rev orgs; one without a rev org conflicts with nothing."""
    orgs = {rev_org_id(user) for user in (one, other) if user}
    return len(orgs - {None}) > 1


def known_unverified(live: Optional[Json], identity: str, unverified: Optional[Collection[str]]) -> bool:
    """Whether a contact is known to be unverified: its own answer counts, else the list of those that are."""
    verified = (live or {}).get("is_verified")
    return verified is False if isinstance(verified, bool) else identity in (unverified or ())


def live_group_error(group: Group, live: Mapping[str, Optional[Json]], listed: Iterable[Json]) -> Optional[PairError]:
    """Count the contacts of an address again, by what DevRev lists for it; None where the group is still known."""
    merged = {pair.duplicate.id for pair in group.pairs if pair.state in (*UNFINISHED, *ENDED)}
    known = {contact.id for contact in group.all_contacts()}
    users = {user["id"]: user for user in (*listed, *filter(None, live.values())) if user["id"] not in merged}
    there = [contact_of(user) for user in users.values() if not is_gone(user)]
    there = [one for one in there if one.key == group.email and (one.is_user or one.is_system)]
    new = sorted((one for one in there if one.id not in known), key=attrgetter("external_ref", "id"))
    if not group.chosen and len(there) > mailbox_limit(group.email):
        words = f"DevRev has {plural(len(there), 'contact')} of this email, more than one person has: a shared mailbox?"
        return PairError("shared_mailbox", words)
    for stranger in new:
        if stranger.is_user:
            words = f"DevRev has another {Contact.user_prefix} contact of this email by now: {stranger.external_ref}"
            return PairError("several_user_refs", words)
    if new and group.chosen:
        words = f"DevRev has another contact of this email by now, so choose again: {new[0].external_ref}"
        return PairError("group_changed", words)
    return None


def count_error(contact: Contact, greatest: int, policy: str) -> Optional[PairError]:
    """Compare the backup's greatest(owned, created, reported) with the export's TICKET_COUNT."""
    if greatest == contact.tickets or (greatest > contact.tickets and policy == "at-least"):
        return None
    hint = "" if greatest < contact.tickets else " (export again, or let more through with --count-policy at-least)"
    words = f"{contact.short_id}: the backup has {plural(greatest, 'ticket')}, the CSV says {contact.tickets}{hint}"
    return PairError("count_mismatch", words)


# ---------------------------------------------------------------------------------------------------
# API: quota
# ---------------------------------------------------------------------------------------------------

FINISH, RESUME, MERGE, VERIFY, PREPARE = range(5)  # how urgent a request is: finishing comes before beginning


@dataclass
class Reservation:
    """Units of quota that are kept for the requests which finish one merge."""

    units: int = 0


class RequestOptions(NamedTuple):
    """How a request waits for its turn."""

    priority: int = PREPARE
    reservation: Optional[Reservation] = None  # units that were kept for it, and from now on for what has to follow
    reserve: int = 0  # units that this has to have, once it has left


ANY_OPTIONS = RequestOptions()


class QueuedRequest(NamedTuple):
    priority: int
    serial: int
    options: RequestOptions
    future: "asyncio.Future[bool]"


class RequestScheduler:
    """Decides which request may leave next, and when; owned by the event loop.

    Four things hold a request back: how many are under way, the server's quota (X-Ratelimit headers), the tool's own
    ceiling (`ratelimit`), and trouble: after a 429 or failures in a row one request at a time finds out whether
    things are well again, as it does where a new window's budget is not known yet. Units that are kept for finishing
    a merge are spent by nothing else, and kept anew with each look that it takes. Times are steady seconds.
    """

    FAILURE_THRESHOLD = 3  # failures in a row
    SLOW_REQUEST = 0.5  # seconds; requests that take longer leave a worker to what finishes a merge
    SHARE, LEAST = 4, 3  # of a window no more than this part is kept for one merge, but so many units at least
    LONGEST_WINDOW = 600.0  # seconds; DevRev's quota resets every five minutes

    def __init__(self, environment: Environment, cancel_token: CancelToken, settings: "ApiSettings") -> None:
        self.environment = environment
        self.cancel_token = cancel_token
        self.workers = settings.workers
        self.retries = settings.retries
        self.host = urlsplit(settings.base_url).netloc
        self.limit: Optional[int] = None
        self.remaining: Optional[int] = None  # as the server last said, for this window
        self.waits: List[Tuple[float, float]] = []  # epoch seconds
        self._client_limit = self._make_client_limit(settings.calls, settings.period)
        self._queue: List[QueuedRequest] = []
        self._serial = self._in_flight = self._reserved = 0
        self._timer: Optional[asyncio.TimerHandle] = None
        self._window = self._window_length = self._resets_at = self._open_until = 0.0
        self._half_open = self._probe_in_flight = False
        self._consecutive_failures = self._consecutive_429 = self._failed_probes = 0
        self._longest = 0.0  # seconds that a request has taken lately
        self._waiting_for, self._waiting_since = "", 0.0

    def _make_client_limit(self, calls: int, period: float) -> Any:
        if calls <= 0:
            return None
        from ratelimit.decorators import RateLimitDecorator

        ceiling = RateLimitDecorator(calls, period, clock=self._now)
        self._count = ceiling(lambda: None)
        return ceiling

    def _now(self) -> float:
        return self.environment.now().monotonic

    async def acquire(self, options: RequestOptions) -> bool:
        """Wait until a request may leave; returns whether it goes ahead as a scout. Raises Interrupted."""
        self._serial += 1
        waiting = QueuedRequest(options.priority, self._serial, options, self.cancel_token.future())
        bisect.insort(self._queue, waiting)
        self._dispatch()
        return await waiting.future

    def _dispatch(self) -> None:
        """Let all through that may go, the most urgent first; look again when the next thing changes."""
        if self._timer:
            self._timer.cancel()
        wait, reason = 0.0, ""
        while self._queue and self._has_slot(self._queue[0].priority):
            wait, reason = self._seconds_open()
            able = (each for each in self._queue if self._has_slot(each.priority) and self._has_quota_for(each.options))
            first = None if wait else next(able, None)
            if first is None:
                break
            self._queue.remove(first)
            if not first.future.done():  # by the brake
                self._send_now(first)
        else:
            wait, reason = 0.0, ""
        if self._queue and self._has_slot(self._queue[0].priority) and not wait:
            wait, reason = self._seconds_until_room()
        self._note_wait(reason)
        if wait:
            self._timer = asyncio.get_event_loop().call_later(max(0.001, wait), self._dispatch)

    def _has_slot(self, priority: int) -> bool:
        """Whether another request may be under way; after a failure fewer, until one is answered well. While a merge is
        on its way, lists and timelines that take long leave a worker to what finishes it."""
        spared = self.workers > 1 and self._reserved > 0 and priority == PREPARE and self._longest > self.SLOW_REQUEST
        return self._in_flight < max(1, self.workers >> min(self._consecutive_failures, 4)) - spared

    def _seconds_open(self) -> Tuple[float, str]:
        """Seconds for which nothing at all may leave, and what for."""
        now = self._now()
        if now < self._open_until:
            return self._open_until - now, "quota" if self._consecutive_429 else "DevRev fails"
        if self.remaining is not None and now >= self._resets_at:
            self.remaining, self._half_open, self._probe_in_flight = None, True, False
        return (60.0 if self._half_open and self._probe_in_flight else 0.0), ""

    def _server_room(self) -> float:
        return float("inf") if self.remaining is None else self.remaining - self._in_flight

    def _client_limit_room(self) -> float:
        if self._client_limit is None:
            return float("inf")
        over = self._now() - self._client_limit.last_reset >= self._client_limit.period
        return float(self._client_limit.clamped_calls - (0 if over else self._client_limit.num_calls))

    def _has_quota_for(self, options: RequestOptions) -> bool:
        """Whether the window has room for a request, and for as much of what is to be kept as it can hold."""
        if options.priority == FINISH:  # takes what there is
            return self._room() >= 1 if options.reservation and options.reservation.units else self._spare(options) >= 1
        return self._spare(options) >= min(1 + self._units_to_reserve(options), self._window_size())

    def _room(self) -> float:
        """Units that are left in this window."""
        return min(self._server_room(), self._client_limit_room())

    def _spare(self, options: RequestOptions) -> float:
        """Units of them that are kept for nobody else."""
        return self._room() - self._reserved + (options.reservation.units if options.reservation else 0)

    def _window_size(self) -> float:
        return min(self.limit or float("inf"), self._client_limit.clamped_calls if self._client_limit else float("inf"))

    def _units_to_reserve(self, options: RequestOptions) -> float:
        return min(options.reserve, max(self.LEAST, self._window_size() // self.SHARE))

    def _seconds_until_room(self) -> Tuple[float, str]:
        now = self._now()
        if self._server_room() <= self._client_limit_room():
            return max(0.001, self._resets_at - now), "quota"
        left = self._client_limit.last_reset + self._client_limit.period - now
        # Where a whole window has not room enough, it is because of what is kept: its release is heard of.
        return (max(0.001, left), "the tool's own ceiling") if left > 0 else (self._client_limit.period, "")

    def _send_now(self, waiting: QueuedRequest) -> None:
        options = waiting.options
        if options.reservation:
            self._reserve(
                options.reservation, int(max(0, min(self._units_to_reserve(options), self._spare(options) - 1)))
            )
        self._in_flight += 1
        self._probe_in_flight = self._probe_in_flight or self._half_open
        if self._client_limit:
            self._count()
        waiting.future.set_result(self._half_open)

    def _reserve(self, reservation: Reservation, units: int) -> None:
        self._reserved += units - reservation.units
        reservation.units = units

    def release(self, reservation: Reservation) -> None:
        """Give back what was kept and is not needed."""
        self._reserve(reservation, 0)
        self._dispatch()

    def cancel_waiting(self, priority: int) -> None:
        """Send away what waits and is not more urgent than this."""
        for waiting in self._queue:
            if waiting.priority >= priority and not waiting.future.done():
                waiting.future.set_exception(Cancelled())

    def give_back(self, is_probe: bool) -> None:
        """Give back the turn of a request that is not sent after all."""
        self._in_flight -= 1
        self._probe_in_flight = self._probe_in_flight and not is_probe
        self._dispatch()

    def on_response(self, is_probe: bool, status: Optional[int], headers: Mapping[str, str], seconds: float) -> None:
        """Take note of an answer (`status` None: none came, or none of use), and of how long it took."""
        self._in_flight -= 1
        self._longest = max(seconds, 0.95 * self._longest)
        self._probe_in_flight = self._probe_in_flight and not is_probe
        self._consecutive_429 = self._consecutive_429 + 1 if status == 429 else 0
        failed = status is None or status >= 500
        self._consecutive_failures = self._consecutive_failures + 1 if failed else 0
        self._update_quota(headers)
        if status == 429:
            self._open_circuit(self._retry_after(headers))
        elif self._consecutive_failures >= self.FAILURE_THRESHOLD:
            self._failed_probes += is_probe
            self._open_circuit(min(10.0, 0.5 * 2**self._failed_probes))
        elif not failed:
            self._failed_probes = 0
            self._half_open = self._half_open and not is_probe
        if self._failed_probes > self.retries:
            self.cancel_token.cancel(
                FatalError(
                    EXIT_STOPPED, f"DevRev at {self.host} can't be reached or keeps failing (is DEVREV_BASE_URL right?)"
                )
            )
        if self._consecutive_429 > 10 + 5 * self.retries:
            self.cancel_token.cancel(
                FatalError(EXIT_STOPPED, "DevRev keeps answering 429 (over quota), however long it is waited")
            )
        self._dispatch()

    def _open_circuit(self, seconds: float) -> None:
        self._open_until = max(self._open_until, self._now() + seconds)
        self._half_open = True

    def _retry_after(self, headers: Mapping[str, str]) -> float:
        least = min(30.0, 0.05 * 2.0 ** min(self._consecutive_429, 10))
        text = headers.get("Retry-After", "")
        wait = 0.5
        try:
            wait = float(text)
        except ValueError:
            with contextlib.suppress(TypeError, ValueError, IndexError):
                wait = parsedate_to_datetime(text).timestamp() - self._server_time(headers)
            if not text and self.remaining is not None and self.remaining <= 0:
                wait = self._resets_at - self._now()
        return max(least, min(3600.0, wait if wait == wait else 0.5))

    def _update_quota(self, headers: Mapping[str, str]) -> None:
        try:
            remaining, window = int(headers["X-Ratelimit-Remaining"]), float(headers["X-Ratelimit-Reset"])
            self.limit = int(headers.get("X-Ratelimit-Limit", remaining))
        except (KeyError, ValueError):
            return
        if window > self._window + 1:
            self._window, self.remaining = window, remaining
            # A clock that is off must not stop a run: past the longest window that makes sense, a scout finds out.
            wait = min(self.LONGEST_WINDOW, window - self._server_time(headers))
            self._resets_at = self._now() + wait + 0.01
            self._window_length = max(self._window_length, wait)
        elif window >= self._window - 1 and self.remaining is not None:
            self.remaining = min(self.remaining, remaining)

    def _server_time(self, headers: Mapping[str, str]) -> float:
        """The server's clock, in epoch seconds; its Date header has whole seconds, so small differences are noise."""
        now = self.environment.now().wall
        with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
            skew = parsedate_to_datetime(headers["Date"]).timestamp() + 0.5 - now
            return now + skew if abs(skew) > 2 else now
        return now

    def _note_wait(self, reason: str) -> None:
        """Keep account of the time in which requests wait for quota or ceiling, and of what is waited for."""
        now = self.environment.now().wall
        if bool(reason) != bool(self._waiting_for):
            if reason:
                self._waiting_since = now
            else:
                self.waits.append((self._waiting_since, max(now, self._waiting_since)))
        self._waiting_for = reason

    def requests_per_minute(self) -> float:
        """Requests that may be sent in the next minute or so."""
        server = float(self.limit) if self.limit is not None and self._window_length > 30 else float("inf")
        ceiling = (
            self._client_limit.clamped_calls * max(1.0, 60 / self._client_limit.period)
            if self._client_limit
            else float("inf")
        )
        return min(server, ceiling, 1e6)

    def minimum_seconds(self, requests: float) -> float:
        """Seconds that so many more requests take at least, under the server's quota and the tool's own ceiling."""
        now, least = self._now(), 0.0
        if self._client_limit:
            ceiling = self._client_limit
            wait = ceiling.last_reset + ceiling.period - now
            least = seconds_in_windows(requests, self._client_limit_room(), wait, ceiling.clamped_calls, ceiling.period)
        if self.remaining is not None and self.limit:
            wait = self._resets_at - now
            least = max(least, seconds_in_windows(requests, self._server_room(), wait, self.limit, self._window_length))
        return least

    def describe_wait(self) -> str:
        """What is waited for, in words, or how much quota is left; empty where neither is known."""
        now = self._now()
        if self._waiting_for:
            wait = self._open_until - now if now < self._open_until else self._seconds_until_room()[0]
            why = {"quota": f"quota {self.limit:,} of DevRev's" if self.limit else "quota of DevRev's"}
            if self._client_limit:
                why["the tool's own ceiling"] = (
                    f"ceiling {self._client_limit.clamped_calls} in {self._client_limit.period:g} s"
                )
            return f"waiting {duration(wait)} ({why.get(self._waiting_for, self._waiting_for)})" if wait > 0.5 else ""
        return f"{self.remaining} of {self.limit} units left" if self.remaining is not None else ""


def seconds_in_windows(requests: float, room: float, wait: float, limit: int, window: float) -> float:
    """Seconds until so many requests have left, of which `room` may leave now, and `limit` in each window from `wait`
    seconds on."""
    over = requests - room
    return max(0.0, wait) + (math.ceil(over / limit) - 1) * window if over > 0 else 0.0


# ---------------------------------------------------------------------------------------------------
# API: requests
# ---------------------------------------------------------------------------------------------------

SCOPES = {
    "rev-users.merge": "rev_user:all (to merge contacts)",
    "rev-users.update": "rev_user:all (to set a contact's reference)",
    "rev-users.create": "rev_user:all (to make a contact again)",
    "works.update": "ticket:all and issue:all (to hand tickets and issues back)",
    "conversations.update": "conversation:all (to hand conversations back)",
    "rev-users.": "rev_user:read (to read contacts)",
    "works.": "ticket:read and issue:read (to back up tickets and issues)",
    "conversations.": "conversation:read (to back up conversations)",
    "timeline-entries.": "timeline:read (to back up comments)",
}
PAGE = 100
ROLES = {"owned": "owned_by", "created": "created_by", "reported": "reported_by"}


@dataclass
class ApiSettings:
    """What a client is made from. `calls` in `period` seconds is its own ceiling (0: none); `timeout` in seconds."""

    token: str = field(repr=False)
    base_url: str = "https://api.devrev.ai"
    calls: int = 200
    period: float = 60.0
    timeout: float = 30.0
    retries: int = 5
    workers: int = 8

    def mask(self, text: str) -> str:
        """`text` without the token; one of a few characters is none, and would stand in every other word."""
        return text.replace(self.token, "[token]") if len(self.token) >= 8 else text


def scope_of(endpoint: str) -> str:
    return next((scope for start, scope in SCOPES.items() if endpoint.startswith(start)), "of this endpoint")


def user_ids(value: Any) -> Set[str]:
    """The ids in a work's `owned_by`, `reported_by` (lists), `created_by` (one) or a conversation's `members`."""
    users = value if isinstance(value, list) else [value]
    return {user["id"] for user in users if isinstance(user, dict) and isinstance(user.get("id"), str)}


class ApiResponse(NamedTuple):
    """An answer's JSON object, and the moment at which its request left: it is as old as that."""

    data: Json
    since: Timestamp


class ListResult(NamedTuple):
    """Items of a list, once each, in order; `since` is when the request for its first page left."""

    items: List[Json]
    since: Timestamp


class DuplicateStatus(Enum):
    """What a look at a duplicate shows."""

    THERE = "there"
    GONE = "gone"  # deleted, or not found
    IN_PRIMARY = "in primary"  # DevRev names the primary in its place


def duplicate_status(user: Json, primary: str, duplicate: str) -> DuplicateStatus:
    """What a `rev_user` that DevRev answers with for the duplicate says. `locked` or `deactivated` is still there.

    Raises PairError(merged_into_another) where it names somebody else than the primary.
    """
    identity = user.get("primary_identity")
    named = {user["id"], identity.get("id") if isinstance(identity, dict) else None} - {None, duplicate}
    if named - {primary}:
        raise PairError("merged_into_another", f"{duplicate} has become {named.pop()}, not the primary")
    if named:
        return DuplicateStatus.IN_PRIMARY
    return DuplicateStatus.GONE if user.get("state") == "deleted" else DuplicateStatus.THERE


class DevRevAPI:
    """The part of DevRev's REST API (version 2024-01-24) that a merge needs, over POST with JSON bodies.

    Every method raises ApiRefused (a definite no), ApiUnanswered (no usable answer after the retries), Denied
    (token or scope) or Interrupted (the run stops; the request has not left).
    """

    STALE_PAGES = 3  # pages that bring nothing new before a list is given up

    def __init__(self, settings: ApiSettings, environment: Environment, cancel_token: CancelToken) -> None:
        self.settings = settings
        self.environment = environment
        self.cancel_token = cancel_token
        self.scheduler = RequestScheduler(environment, cancel_token, settings)
        self.requests: Dict[str, int] = collections.Counter()
        self._answered: Set[str] = set()
        self._forbidden: Dict[str, Set[bytes]] = collections.defaultdict(set)  # bodies that were answered with 403
        self.emails = BatchLoader(self._list_emails, cancel_token, lambda user: {email_of(user)}, email_key)
        # By whom they name: a work's role, or a conversation's members.
        self.objects = {name: self._batch_loader(name) for name in (*ROLES.values(), "members")}

    # -- the one place that sends -------------------------------------------------------------------

    async def _call(
        self,
        endpoint: str,
        body: Json,
        key: str = "",
        options: RequestOptions = ANY_OPTIONS,
        repeatable: bool = True,
        before: Optional[Callable[[], Awaitable[None]]] = None,
        telling: bool = False,
    ) -> ApiResponse:
        """POST, and return the answer's JSON object, which holds `key`. `before` is awaited when the request's turn has
        come, and what it raises keeps the request from leaving. `telling`: a 403 says what the token may.

        What is safe to repeat is repeated with growing, jittered pauses. A request that is not `repeatable` is sent
        again only where it can't have been acted on: no connection was made, or it was over quota.
        """
        attempt = 0
        while True:
            is_probe = await self.scheduler.acquire(options)
            try:
                self.cancel_token.raise_if_cancelled()
                if before:
                    await before()
            except BaseException:
                self.scheduler.give_back(is_probe)
                raise
            self.requests[endpoint] += 1
            since = self.environment.now()
            answer = await self.environment.post(endpoint, body)
            status, data, problem = answer.status, answer.data, answer.problem
            good = status is not None and 200 <= status < 300
            took = self.environment.elapsed(since)
            self.scheduler.on_response(is_probe, None if good and data is None else status, answer.headers, took)
            if good and data is not None and (not key or key in data):
                self._answered.add(endpoint)
                return ApiResponse(data, since)
            if good and data is not None:
                problem = f"no {key} in the answer"
            self._judge(endpoint, body, answer, telling, final=False)
            if status != 429:
                attempt += 1
                if attempt > self.settings.retries or (answer.sent and not repeatable):
                    self._judge(endpoint, body, answer, telling, final=True)
                    raise NoUsableResponse(endpoint, problem)
                await self.cancel_token.sleep(self.environment.random.uniform(0.5, 1.0) * min(8.0, 0.1 * 2**attempt))

    def _judge(self, endpoint: str, body: Json, answer: HttpResponse, telling: bool, final: bool) -> None:
        """Raise what a definite no means. A gateway's HTML is one for 401 and 403 alone, and only after the retries."""
        status = answer.status or 0
        if status in (401, 403) and (final or answer.data is not None):
            self._deny(endpoint, status, answer.problem, body, telling)
        if 300 <= status < 400:
            location = self.settings.mask(answer.headers.get("Location", ""))
            raise ApiError(endpoint, status, f"redirected to {location or 'nowhere'}", location=location)
        if 400 <= status < 500 and status not in (408, 429) and answer.data is not None:
            words = f"{answer.problem} (scope {scope_of(endpoint)})" if status == 403 else answer.problem
            raise ApiError(endpoint, status, words, data=answer.data)

    def _deny(self, endpoint: str, status: int, message: str, body: Json, telling: bool) -> None:
        """Send nothing more with a token that is not accepted, or that lacks a scope which it never had.

        One object that it may not see or change says nothing of its scopes: a second has to be refused. Who may not
        make a contact has a reference to put back first.
        """
        if status == 401:
            words = f"{message.rstrip('.')}. Is DEVREV_API_TOKEN right, and not expired?"
            code, text = EXIT_STOPPED, f"DevRev does not accept the token (401): {words}"
        else:
            self._forbidden[endpoint].add(to_json(body))
            one_object = len(self._forbidden[endpoint]) == 1 and not telling
            if endpoint in self._answered or one_object or endpoint == "rev-users.create":
                return
            code, text = EXIT_USAGE, f"the token may not call {endpoint} (403): it lacks the scope {scope_of(endpoint)}"
        denied = PermissionDenied(code, text)
        self.cancel_token.cancel(denied)
        raise denied

    async def pages(self, endpoint: str, key: str, body: Json, options: RequestOptions = ANY_OPTIONS) -> ListResult:
        """All items of a cursor-paged list."""
        items: Dict[str, Json] = {}
        since: Optional[Timestamp] = None
        async for page in self.each_page(endpoint, key, body, options):
            since = since or page.since
            items.update((item["id"], item) for item in page.items)
        return ListResult(list(items.values()), since or self.environment.now())

    async def each_page(
        self, endpoint: str, key: str, body: Json, options: RequestOptions = ANY_OPTIONS
    ) -> AsyncIterator[ListResult]:
        """The pages of a list, one after the other; an item that moves meanwhile may stand on two of them."""
        known: Set[int] = set()  # hashes of ids
        cursors: Set[str] = set()
        stale = 0
        page = dict(body, limit=PAGE)
        while True:
            reply = await self._call(endpoint, page, key, options)
            before = len(known)
            items = reply.data[key] or []
            try:
                known.update(hash(item["id"]) for item in items)
            except (TypeError, KeyError):
                raise NoUsableResponse(endpoint, f"{key} holds something without an id") from None
            cursor = reply.data.get("next_cursor") or ""
            if not isinstance(cursor, str):
                raise NoUsableResponse(endpoint, "next_cursor is no text")
            yield ListResult(items, reply.since)
            if not cursor:
                return
            stale = stale + 1 if len(known) == before else 0
            if cursor in cursors or stale >= self.STALE_PAGES:
                raise NoUsableResponse(endpoint, "its pages go on without bringing anything new")
            cursors.add(cursor)
            page["cursor"] = cursor

    async def _user(
        self, endpoint: str, body: Json, key: str = "rev_user", options: RequestOptions = ANY_OPTIONS, **how: Any
    ) -> Json:
        """The user that an endpoint answers with. ApiUnanswered where it is none."""
        user = (await self._call(endpoint, body, key, options, **how)).data[key]
        if not (isinstance(user, dict) and isinstance(user.get("id"), str)):
            raise NoUsableResponse(endpoint, f"{key} holds no user")
        return user

    # -- endpoints ----------------------------------------------------------------------------------

    async def whoami(self) -> Json:
        """The token's owner (`dev_user`)."""
        return await self._user("dev-users.self", {}, "dev_user", telling=True)

    async def contact(self, identity: str, options: RequestOptions = ANY_OPTIONS) -> Optional[Json]:
        """The rev user of this id, None where there is none (404), or where it has moved to another id (301)."""
        try:
            user = await self._user("rev-users.get", {"id": identity}, options=options)
        except ApiError as api_error:
            if api_error.missing or 300 <= api_error.status < 400:
                return None
            raise
        return user if user["id"] == identity else None

    async def merge(
        self,
        primary: str,
        duplicate: str,
        options: RequestOptions,
        before: Callable[[], Awaitable[None]],
        telling: bool,
    ) -> None:
        """Ask for a merge. DevRev only acknowledges it and carries it out later; it is never repeated blindly."""
        body = {"primary_user": primary, "secondary_user": duplicate}
        await self._call("rev-users.merge", body, options=options, repeatable=False, before=before, telling=telling)

    async def poll_duplicate(self, primary: str, duplicate: str, options: RequestOptions) -> "DuplicateStatus":
        """What has become of the duplicate. Raises PairError(merged_into_another) where DevRev names somebody else than
        the primary."""
        try:
            user = await self._user("rev-users.get", {"id": duplicate}, options=options)
        except ApiError as api_error:
            if api_error.missing:
                return DuplicateStatus.GONE
            if not 300 <= api_error.status < 400:
                raise
            match = re.search(r"don:identity:[^&?#\s]+:revu/[^&?#/\s]+", unquote(api_error.location))
            user = {"id": match.group(0) if match else duplicate, "state": "moved"}
        if not isinstance(user.get("state"), str):
            raise NoUsableResponse("rev-users.get", "the user has no state")
        return duplicate_status(user, primary, duplicate)

    async def set_external_ref(
        self, identity: str, external_ref: str, options: RequestOptions, telling: bool = False
    ) -> None:
        """Set the reference and read it back from the answer. ApiRefused with status 409 while another holds it."""
        body = {"id": identity, "external_ref": external_ref}
        user = await self._user("rev-users.update", body, options=options, telling=telling)
        if user["id"] != identity or user.get("external_ref") != external_ref:
            raise PairError(
                "external_ref_not_set", f"DevRev answered the update with the reference {user.get('external_ref')}"
            )

    async def create_contact(self, fields: Json, options: RequestOptions) -> Json:
        """Make a contact and return it. It is never repeated blindly: a lost answer is for the caller to look into."""
        return await self._user("rev-users.create", fields, options=options, repeatable=False)

    async def set_people(
        self,
        obj: Json,
        roles: Mapping[str, Sequence[str]],
        options: RequestOptions,
        before: Optional[Callable[[], Awaitable[None]]] = None,
    ) -> None:
        """Replace the whole lists of a work's or a conversation's people, by role; none: try whether one may."""
        body: Json = {"id": obj["id"], **{role: {"set": list(ids)} for role, ids in roles.items()}}
        if ":conversation/" in obj["id"]:
            await self._call("conversations.update", body, "conversation", options, before=before, telling=True)
        else:
            body["type"] = obj["type"]
            await self._call("works.update", body, "work", options, before=before, telling=True)

    async def holders_of(self, external_ref: str, options: RequestOptions) -> List[Json]:
        """The rev users that DevRev lists for a reference."""
        return (await self.pages("rev-users.list", "rev_users", {"external_ref": [external_ref]}, options)).items

    def dispatch(self) -> None:
        """Let every list call leave that waits for others to join."""
        for batch_loader in (self.emails, *self.objects.values()):
            batch_loader.dispatch()

    async def read_one(self, endpoint: str, key: str, body: Json) -> List[Json]:
        """One item of a list, to see whether the token may read it."""
        items: List[Json] = (await self._call(endpoint, dict(body, limit=1), key)).data[key]
        return items

    async def timeline(self, object_id: str) -> List[Json]:
        """Everything that was said on a ticket, issue or conversation."""
        return (await self.pages("timeline-entries.list", "timeline_entries", {"object": object_id})).items

    async def get_object(self, object_id: str, options: RequestOptions) -> Optional[Json]:
        """A ticket, an issue or a conversation; None where there is none of that id."""
        endpoint, key = (
            ("conversations.get", "conversation") if ":conversation/" in object_id else ("works.get", "work")
        )
        try:
            found: Json = (await self._call(endpoint, {"id": object_id}, key, options)).data[key]
        except ApiError as api_error:
            if api_error.missing:
                return None
            raise
        return found

    async def _list_emails(self, emails: Sequence[str], options: RequestOptions) -> ListResult:
        return await self.pages("rev-users.list", "rev_users", {"email": list(emails)}, options)

    def _batch_loader(self, name: str) -> "BatchLoader":
        key, body = ("conversations", {}) if name == "members" else ("works", {"type": ["ticket", "issue"]})

        async def objects(ids: Sequence[str], options: RequestOptions) -> ListResult:
            return await self.pages(f"{key}.list", key, {**body, name: list(ids)}, options)

        return BatchLoader(objects, self.cancel_token, lambda item: user_ids(item.get(name)))


@contextlib.contextmanager
def before_any_change(api: DevRevAPI) -> Iterator[None]:
    """Turn what DevRev's API raises into the Stop that ends a run which has changed nothing."""
    try:
        yield
    except NoUsableResponse as error:
        hint = "Is the network there, and DEVREV_BASE_URL right?"
        raise FatalError(EXIT_STOPPED, f"DevRev at {api.scheduler.host} can't be reached: {error}. {hint}") from None
    except ApiError as error:
        raise FatalError(EXIT_USAGE, f"{error} (is DEVREV_BASE_URL right?)") from None
    except FatalError as stop:
        reason = api.cancel_token.stop or stop
        raise (FatalError(EXIT_USAGE, str(reason)) if isinstance(reason, PermissionDenied) else reason) from None


# ---------------------------------------------------------------------------------------------------
# API: one list call for many contacts
# ---------------------------------------------------------------------------------------------------

Lister = Callable[[Sequence[str], RequestOptions], Awaitable[ListResult]]


@dataclass
class PendingKey:
    """A key that waits to be listed for: `weight` items are expected."""

    key: str
    weight: int
    priority: int
    future: "asyncio.Future[ListResult]"


class BatchLoader:
    """Lists for many contacts with one call, though each asks for itself: who asks waits a moment for the others.

    A call names as many keys as fit on a few pages, so that a contact with a thousand tickets does not age what is read
    for its neighbours. Where a call is refused, it is halved; where an item names none of the keys that were asked
    for, each is asked for by itself.
    """

    LINGER = 0.02  # seconds
    MAX_ITEMS = 250  # items that are expected

    def __init__(
        self,
        lister: Lister,
        cancel_token: CancelToken,
        owners: Callable[[Json], Set[str]],
        name: Callable[[str], str] = lambda key: key,
    ) -> None:
        self._lister = lister
        self._cancel_token = cancel_token
        cancel_token.on_cancel.append(self.dispatch)  # who waits for others to join is to hear of it
        self._owners = owners  # the names that an item belongs to
        self._name = name  # of a key
        self._pending: List[PendingKey] = []
        self._timer: Optional[asyncio.TimerHandle] = None
        self._dispatch_at = 0.0
        self._max_keys = PAGE  # keys a call
        self._calls: Set[asyncio.Future[None]] = set()

    async def load(self, key: str, weight: int = 1, priority: int = PREPARE, linger: float = LINGER) -> ListResult:
        """What the list holds of `key`. Raises what the call for it raises."""
        loop = asyncio.get_event_loop()
        self._cancel_token.raise_if_cancelled()
        pending = PendingKey(key, max(1, weight), priority, loop.create_future())
        self._pending.append(pending)
        if self._timer is None or loop.time() + linger < self._dispatch_at:
            if self._timer:
                self._timer.cancel()
            self._dispatch_at = loop.time() + linger
            self._timer = loop.call_later(linger, self.dispatch)
        if len(self._pending) >= self._max_keys or sum(each.weight for each in self._pending) >= self.MAX_ITEMS:
            self.dispatch()
        return await pending.future

    def dispatch(self) -> None:
        """Let what waits leave now."""
        if self._timer:
            self._timer.cancel()
        self._timer, pendings, self._pending = None, self._pending, []
        pendings.sort(key=lambda pending: pending.weight)
        while pendings:
            part = [pendings.pop(0)]
            while (
                pendings
                and len(part) < self._max_keys
                and sum(each.weight for each in [*part, pendings[0]]) <= self.MAX_ITEMS
            ):
                part.append(pendings.pop(0))
            call = asyncio.ensure_future(self._fetch(part))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _fetch(self, pendings: Sequence[PendingKey]) -> None:
        keys = list(dict.fromkeys(pending.key for pending in pendings))
        try:
            listing = await self._lister(keys, RequestOptions(min(pending.priority for pending in pendings)))
        except (ApiError, NoUsableResponse) as error:
            if isinstance(error, ApiError):
                self._max_keys = min(self._max_keys, (len(keys) + 1) // 2)
            if len(keys) == 1:
                self._max_keys = PAGE  # it was this key, not their number
                _fail_all(pendings, error)
            else:
                half = (len(keys) + 1) // 2
                await self._fetch_parts(pendings, [keys[:half], keys[half:]])
        except BaseException as error:
            _fail_all(pendings, error)
        else:
            found = self._split_items(keys, listing.items)
            if found is None:
                log.info("an item names none of those asked for; asking one by one")
                await self._fetch_parts(pendings, [[key] for key in keys])
                return
            for pending in pendings:
                if not pending.future.done():
                    pending.future.set_result(ListResult(found[pending.key], listing.since))

    async def _fetch_parts(self, pendings: Sequence[PendingKey], parts: Iterable[Sequence[str]]) -> None:
        await together(*(self._fetch([pending for pending in pendings if pending.key in part]) for part in parts))

    def _split_items(self, keys: Sequence[str], items: Sequence[Json]) -> Optional[Dict[str, List[Json]]]:
        """The items by key; None where one names none of several keys."""
        if len(keys) == 1:
            return {keys[0]: list(items)}
        found: Dict[str, List[Json]] = {key: [] for key in keys}
        named: Dict[str, List[str]] = collections.defaultdict(list)
        for key in keys:
            named[self._name(key)].append(key)
        for item in items:
            mine = [key for name in self._owners(item) & named.keys() for key in named[name]]
            if not mine:
                return None
            for key in mine:
                found[key].append(item)
        return found


def _fail_all(pendings: Iterable[PendingKey], error: BaseException) -> None:
    for pending in pendings:
        if not pending.future.done():
            pending.future.set_exception(error)


# ---------------------------------------------------------------------------------------------------
# Backup: what DevRev holds of a group, on the disk
# ---------------------------------------------------------------------------------------------------


@dataclass
class ContactSnapshot:
    """All that DevRev holds of one contact. Works and conversations are API objects by id."""

    contact: Contact
    live: Json
    roles: Dict[str, Dict[str, Json]]  # a role of ROLES -> works
    conversations: Dict[str, Json]

    def objects(self) -> Dict[str, Json]:
        """Everything that has a timeline, by id."""
        return {**self.works(), **self.conversations}

    def works(self) -> Dict[str, Json]:
        return {identity: work for works in self.roles.values() for identity, work in works.items()}


Timelines = Mapping[str, List[Json]]


def contact_files(snapshot: ContactSnapshot, timelines: Timelines) -> Dict[str, Any]:
    """The files of one contact's folder, by name."""
    return {
        "contact.json": snapshot.live,
        "works.json": list(snapshot.works().values()),
        "conversations.json": list(snapshot.conversations.values()),
        "timelines.json": {identity: timelines[identity] for identity in snapshot.objects() if identity in timelines},
    }


def contact_manifest(folder: str, role: str, snapshot: ContactSnapshot, timelines: Timelines) -> Json:
    """What the manifest says of one contact: its row, its counts, and which objects it has in which role."""
    return {
        "folder": folder,
        "role": role,
        "csv": snapshot.contact.to_json(),
        "counts": {
            **{name: len(works) for name, works in snapshot.roles.items()},
            "conversations": len(snapshot.conversations),
            "timeline_entries": sum(len(timelines.get(identity, ())) for identity in snapshot.objects()),
        },
        "works": {name: list(works) for name, works in snapshot.roles.items()},
        "conversations": list(snapshot.conversations),
    }


class BackupStore:
    """The folder `backups/`: `<email>/<YYYYmmdd_HHMMSS>/`, complete or absent.

    Raises OSError where the disk refuses.
    """

    INCOMPLETE = ".incomplete_"

    def __init__(self, root: Path, environment: Environment, with_timelines: bool = True) -> None:
        self.root = root
        self.environment = environment
        self.with_timelines = with_timelines

    def create(self, email: str, organisation: str, snapshots: Sequence[ContactSnapshot], timelines: Timelines) -> Path:
        """Back up a group: written aside, flushed, renamed into place. The first of `holdings` is the primary."""
        environment = self.environment
        home = environment.make_private_dir(self.root / safe_name(email))
        self.root.chmod(0o700)  # which may have come with less, and emails are names in it
        if home.resolve().parent != self.root.resolve():
            raise OSError(f"{home} leads out of {self.root}; remove the link")
        stamp = int(environment.now().wall)
        while (home / timestamp_name(stamp)).exists():
            stamp += 1
        final = home / timestamp_name(stamp)
        aside = home / f"{self.INCOMPLETE}{os.getpid()}_{timestamp_name(stamp)}"
        if aside.exists():
            shutil.rmtree(str(aside))
        aside.mkdir(mode=0o700)
        manifest: Json = {
            "format": 1,
            "tool": f"merge_contacts {__version__}",
            "created": iso(environment.now().wall),
            "email": email,
            "organisation": organisation,
            "timelines": self.with_timelines,
            "contacts": [],
            "files": {},
        }
        for index, (folder, snapshot) in enumerate(zip(_folder_names(snapshots), snapshots)):
            (aside / folder).mkdir(mode=0o700)
            for name, content in contact_files(snapshot, timelines).items():
                size, digest = environment.create_file(aside / folder / name, [to_json(content, indent=1)])
                manifest["files"][f"{folder}/{name}"] = {"bytes": size, "sha256": digest}
            environment.fsync_dir(aside / folder)
            role = "duplicate" if index else "primary"
            manifest["contacts"].append(contact_manifest(folder, role, snapshot, timelines))
        environment.create_file(aside / "manifest.json", [to_json(manifest, indent=1)])
        environment.fsync_dir(aside)
        environment.rename_into_place(aside, final)
        return final


def timestamp_name(epoch: float) -> str:
    return time.strftime("%Y%m%d_%H%M%S", time.localtime(epoch))


def _folder_names(snapshots: Sequence[ContactSnapshot]) -> List[str]:
    """`primary_REVU-…`, `duplicate_REVU-…`, told apart also where a file system ignores case."""
    names: List[str] = []
    for index, snapshot in enumerate(snapshots):
        shown = str(snapshot.live.get("display_id") or snapshot.contact.short_id)
        name = f"{'duplicate' if index else 'primary'}_{safe_name(shown)}"
        taken = [other.casefold() for other in names]
        names.append(f"{name}_{index}" if name.casefold() in taken else name)
    return names


def verify_backup(folder: Path) -> Json:
    """Re-read a backup from the disk and return its manifest.

    Raises PairError(backup_failed) naming everything that is missing, damaged or does not add up.
    """
    manifest = read_manifest(str(folder))
    try:
        problems = list(_backup_errors(folder, manifest))
    except (KeyError, TypeError, AttributeError) as error:
        raise PairError(
            "backup_failed", f"{folder}: manifest.json is not a manifest: {type(error).__name__} {error}"
        ) from None
    if problems:
        raise PairError("backup_failed", f"{folder}: " + "; ".join(problems))
    return manifest


def _backup_errors(folder: Path, manifest: Json) -> Iterator[str]:
    contents: Dict[str, Any] = {}
    for name, expected in manifest["files"].items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            yield f"{name}: differs from what was written"
            continue
        try:
            contents[name] = json.loads(data)
        except ValueError:
            yield f"{name}: not JSON"
    for entry in manifest["contacts"]:
        files = [
            contents.get(f"{entry['folder']}/{name}.json")
            for name in ("contact", "works", "conversations", "timelines")
        ]
        if any(file is None for file in files):
            yield f"{entry['folder']}: not all of its files are whole"
        else:
            yield from _contact_errors(entry, files, manifest["timelines"])


def _contact_errors(entry: Json, files: Sequence[Any], timelines_wanted: bool) -> Iterator[str]:
    """Recount one contact's files against what the manifest says of them."""
    folder = entry["folder"]
    live, works, conversations, timelines = files
    work_ids = {work["id"] for work in works}
    conversation_ids = {conversation["id"] for conversation in conversations}
    if live["id"] != entry["csv"]["id"]:
        yield f"{folder}: contact.json is another contact's"
    if set(chain.from_iterable(entry["works"].values())) != work_ids:
        yield f"{folder}: works.json does not hold the works of the manifest"
    if set(entry["conversations"]) != conversation_ids:
        yield f"{folder}: conversations.json does not hold the conversations of the manifest"
    if timelines_wanted and set(timelines) != work_ids | conversation_ids:
        yield f"{folder}: timelines.json does not hold a timeline for each object"
    counted = {name: len(set(ids)) for name, ids in entry["works"].items()}
    counted["conversations"] = len(conversation_ids)
    counted["timeline_entries"] = sum(map(len, timelines.values()))
    if counted != entry["counts"]:
        yield f"{folder}: the files hold {counted}, the manifest says {entry['counts']}"


def greatest_count(entry: Json) -> int:
    """greatest(owned, created, reported) of a contact in a manifest: what the export calls TICKET_COUNT."""
    return max(len(set(entry["works"][role])) for role in ROLES)


def read_manifest(backup: str) -> Json:
    """A backup's manifest. Raises PairError(backup_failed) where it can't be read."""
    try:
        manifest: Json = json.loads((Path(backup) / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PairError("backup_failed", f"{backup}: manifest.json can't be read ({type(error).__name__})") from None
    return manifest


def objects_to_transfer(backup: str, duplicate: str) -> List[Json]:
    """What has to hang on the primary after the merge: works owned or reported, conversations taken part in.

    Each as `{id, role}` with role `owned_by`, `reported_by` or `members`. Raises PairError(backup_failed).
    """
    try:
        (entry,) = (one for one in read_manifest(backup)["contacts"] if one["csv"]["id"] == duplicate)
        return transferred_objects(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise PairError("backup_failed", f"the backup {backup} is no whole one ({type(error).__name__})") from None


def transferred_objects(entry: Json) -> List[Json]:
    """Of a contact in a manifest, what a merge hands on, as `{id, role}`."""
    return [
        *({"id": work, "role": ROLES[role]} for role in ("owned", "reported") for work in entry["works"][role]),
        *({"id": conversation, "role": "members"} for conversation in entry["conversations"]),
    ]


def describe(backup: str, items: Iterable[Json]) -> List[Json]:
    """Name objects (`{id, role, …}`) with display id, kind and title from a backup."""
    known: Dict[str, Json] = {}
    for path in (*Path(backup).glob("*/works.json"), *Path(backup).glob("*/conversations.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known.update(by_id(json.loads(path.read_bytes())))
    return [
        {
            **item,
            "display_id": known.get(item["id"], {}).get("display_id") or item["id"],
            "kind": known.get(item["id"], {}).get("type") or item["id"].split(":")[-1].split("/")[0],
            "title": known.get(item["id"], {}).get("title") or "",
        }
        for item in items
    ]


def by_id(items: Iterable[Json]) -> Dict[str, Json]:
    return {item["id"]: item for item in items}


JOURNAL = Path("backups") / "journal.jsonl"


class Journal:
    """`backups/journal.jsonl`: what was asked for and what has ended, on the disk before it is done or said.

    A line an event, `{"event", "time", "run", "primary", "duplicate", "email", "new_ref", "backup", …}`; primary and
    duplicate are whole rows, so that a lost savepoint can be made again from it.
    """

    STATES: Mapping[str, State] = {
        "asked": State.REQUESTED,
        "withdrawn": State.PLANNED,  # a first request did not leave after all
        "merged": State.MERGED,
        "done": State.DONE,
        "merged elsewhere": State.MERGED_ELSEWHERE,
        "settled": State.SETTLED,
        "undo begun": State.UNDOING,
        "undone": State.UNDONE,
    }

    def __init__(self, path: Path, environment: Environment, run: str) -> None:
        self.path = path
        self.environment = environment
        self.run = run

    def line(self, event: str, pair: Pair) -> bytes:
        line = {
            "event": event,
            "time": iso(self.environment.now().wall),
            "run": self.run,
            "email": pair.email,
            "primary": pair.primary.to_json(),
            "duplicate": pair.duplicate.to_json(),
            "new_ref": pair.new_ref,
            "backup": pair.backup,
            "requested_at": pair.requested_at,
            "first_requested_at": pair.first_requested_at,
            "details": pair.details,
        }
        return to_json(line)

    def add(self, lines: Iterable[bytes]) -> None:
        """Append events. Raises OSError where the disk refuses."""
        self.environment.make_private_dir(self.path.parent)
        self.environment.append_lines(self.path, b"\n".join(lines))

    def asked_before(self, pair: Pair) -> bool:
        """Whether another run in this folder has asked for a pair."""
        events = [
            line["event"]
            for line in self._lines()
            if line["run"] != self.run and (line["primary"]["id"], line["duplicate"]["id"]) == pair.ids
        ]
        return bool(events) and events[-1] != "withdrawn"

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def pairs(self, known: int) -> List[Pair]:
        """The pairs of which it tells behind so many bytes, in the state that its last event tells of."""
        found: Dict[Tuple[str, str], Pair] = {}
        for line in self._lines(known):
            pair = Pair(Contact.from_json(line["primary"]), Contact.from_json(line["duplicate"]), line["new_ref"])
            pair.state = self.STATES[line["event"]]
            pair.refused = pair.state is State.REQUESTED  # which an answer may have said: the whole patience
            pair.backup, pair.details = line["backup"], line.get("details", {})
            pair.requested_at, pair.first_requested_at = line["requested_at"], line["first_requested_at"]
            found[pair.ids] = pair
        return list(found.values())

    def _lines(self, known: int = 0) -> Iterator[Json]:
        """The events in order; a line that a crash has torn says nothing, for what it announced was not done."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(known)
            for raw in file:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    line = json.loads(raw)
                    if line["event"] in self.STATES and line["primary"]["id"] and line["duplicate"]["id"]:
                        yield {"new_ref": None, "backup": "", "requested_at": 0.0, "first_requested_at": 0.0, **line}


# ---------------------------------------------------------------------------------------------------
# Savepoint: what was done, across crashes
# ---------------------------------------------------------------------------------------------------


def inspect_savepoint(path: Path, readonly: bool) -> None:
    """Look at the file's header (https://sqlite.org/fileformat.html) before SQLite may touch it.

    Raises Stop(2) where it is no savepoint of ours, from a newer version, or can't be written.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(100)
            writable = os.fstat(file.fileno()).st_mode & 0o222 and os.access(str(path), os.W_OK)
    except FileNotFoundError:
        if not path.resolve().parent.is_dir():
            raise FatalError(EXIT_USAGE, f"the savepoint's folder {path.parent} is not there") from None
        return
    except OSError as error:
        raise FatalError(EXIT_USAGE, f"the savepoint {path} can't be opened: {error.strerror}") from None
    if not head:
        return
    version, application = (int.from_bytes(head[at : at + 4], "big") for at in (60, 68))
    not_our_csv_reason = application and application != SavePoint.APPLICATION
    if not head.startswith(b"SQLite format 3\0") or len(head) < 100 or not_our_csv_reason:
        raise FatalError(EXIT_USAGE, f"{path} is damaged or not a savepoint; it was left as it is")
    if version > SavePoint.VERSION:
        raise FatalError(EXIT_USAGE, f"the savepoint {path} is from a newer version of this tool; it was left as it is")
    if not writable and not readonly:
        raise FatalError(EXIT_USAGE, f"the savepoint {path} is read-only; it was left as it is")


class SavePoint:
    """An SQLite file with a row a pair, held exclusively while a run lasts, each write on the disk when it returns.

    `readonly` looks at it as well as it can, also while a run holds it. Raises Stop(2) where the file is damaged,
    foreign, from a newer version or read-only (and leaves it as it is), Stop(11) where another run holds it, Stop(3)
    where a write fails.
    """

    VERSION = 2
    APPLICATION = 0x4D434F4E  # "MCON", in the file's header
    SCHEMA = """
        CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE pairs (
            primary_id TEXT NOT NULL, duplicate_id TEXT NOT NULL, email TEXT NOT NULL, new_ref TEXT,
            state TEXT NOT NULL, code TEXT NOT NULL, error TEXT NOT NULL, backup TEXT NOT NULL,
            requested_at REAL NOT NULL, first_requested_at REAL NOT NULL, seconds REAL NOT NULL,
            left_behind TEXT NOT NULL, primary_row TEXT NOT NULL, duplicate_row TEXT NOT NULL,
            run TEXT NOT NULL, created TEXT NOT NULL, updated TEXT NOT NULL,
            PRIMARY KEY (primary_id, duplicate_id)
        );
        CREATE INDEX pairs_by_state ON pairs (state);
    """
    # From version 1.0.0 on: what was once asked for is never forgotten, and what had ended by then was reported then.
    UPGRADE = """
        ALTER TABLE pairs ADD COLUMN refused INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE pairs ADD COLUMN details TEXT NOT NULL DEFAULT '{}';
        ALTER TABLE pairs ADD COLUMN report TEXT NOT NULL DEFAULT '';
        UPDATE pairs SET state = 'requested', refused = 1 WHERE state = 'failed' AND requested_at > 0;
        UPDATE pairs SET report = 'before' WHERE state = 'done';
        CREATE INDEX pairs_by_duplicate ON pairs (duplicate_id);
        CREATE INDEX pairs_unreported ON pairs (report) WHERE report = '';
        INSERT INTO about VALUES ('journal', '0');
    """
    PLAIN = ("new_ref", "code", "error", "backup", "requested_at", "first_requested_at", "seconds")
    COLUMNS = (
        "primary_id", "duplicate_id", "email", *PLAIN, "state", "left_behind", "primary_row", "duplicate_row",
        "refused", "details", "report", "run", "created", "updated",
    )  # fmt: skip

    def __init__(self, path: Path, environment: Environment, run: str = "", readonly: bool = False) -> None:
        self.path = path
        self.environment = environment
        self.run = run
        self.readonly = readonly
        self.glimpsed = False  # read past the lock of a run that goes on
        self._lock = threading.Lock()  # one thread at a time uses the connection
        inspect_savepoint(path, readonly)
        try:
            self._db = self._poll() if readonly else self._open()
        except sqlite3.Error as error:
            raise self._trouble(error, EXIT_USAGE) from None

    # -- opening ------------------------------------------------------------------------------------

    def _connect(self, mode: str) -> sqlite3.Connection:
        path = (Path.cwd() / self.path).as_posix()  # as_uri() makes of a share what SQLite does not take
        return self.environment.open_database(
            f"file:{'' if path.startswith('/') else '/'}{quote(path, safe='/:')}?{mode}"
        )

    def _open(self) -> sqlite3.Connection:
        db = self._connect("mode=rwc")
        db.execute("PRAGMA busy_timeout = 1000")  # who only looks lets go in a moment
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("BEGIN EXCLUSIVE")
        self._upgrade(db)
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": iso(self.environment.now().wall)}
        db.execute("INSERT OR REPLACE INTO about VALUES ('holder', ?)", (json.dumps(holder),))
        db.execute("COMMIT")
        return db

    def _upgrade(self, db: sqlite3.Connection) -> None:
        """Bring the schema to this version, within the transaction that is open."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("another program's database")
        else:
            db.execute("SELECT primary_id, state, run FROM pairs LIMIT 1")
        for statement in {0: self.SCHEMA + self.UPGRADE, 1: self.UPGRADE}.get(version, "").split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {self.APPLICATION}")
        db.execute(f"PRAGMA user_version = {self.VERSION}")

    def _poll(self) -> sqlite3.Connection:
        """Read what a normal open would recover; past the lock of a run that goes on, and then several times."""
        copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        for patience in (0.0, 0.05, 0.1, 0.2, 0.4):
            time.sleep(patience)
            if not (self.path.exists() and self.path.stat().st_size):
                break
            try:
                with contextlib.closing(self._connect("mode=ro&immutable=1" if patience else "mode=rw")) as db:
                    db.execute("SELECT primary_id, state, run FROM pairs LIMIT 1")
                    db.backup(copy)
                problem = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
                if problem == "ok":
                    break
                trouble = sqlite3.DatabaseError(problem)
            except sqlite3.OperationalError as error:
                trouble = error
                if not patience and ("locked" in str(error) or "busy" in str(error)):
                    self.glimpsed = True
                elif not patience and "readonly" not in str(error):
                    raise
            except sqlite3.DatabaseError as error:
                trouble = error
                if not self.glimpsed:
                    raise
        else:
            if self.glimpsed:
                raise FatalError(
                    EXIT_HELD, f"a run is writing to the savepoint {self.path} right now; look again in a moment"
                )
            raise trouble
        copy.execute("BEGIN")
        self._upgrade(copy)
        copy.execute("COMMIT")
        return copy

    def _trouble(self, error: sqlite3.Error, exit_code: int) -> FatalError:
        text = str(error)
        if "locked" in text or "busy" in text:
            return FatalError(EXIT_HELD, f"another run holds the savepoint {self.path}{self._holder()}")
        if exit_code == EXIT_STOPPED:
            return FatalError(EXIT_STOPPED, f"the savepoint {self.path} can't be used ({text})")
        if "full" in text or "disk I/O" in text:
            return FatalError(EXIT_STOPPED, f"the savepoint {self.path} can't be made ({text})")
        if "readonly" in text or "unable to open" in text:
            return FatalError(EXIT_USAGE, f"the savepoint {self.path} can't be written: {text}")
        return FatalError(
            EXIT_USAGE,
            f"the savepoint {self.path} is damaged ({text}); it was left as it is. Move it away: "
            "backups/journal.jsonl knows what it knew",
        )

    def _holder(self) -> str:
        with contextlib.suppress(sqlite3.Error, ValueError, TypeError, KeyError, FatalError):
            meta = SavePoint(self.path, self.environment, readonly=True).holder()
            return f": process {meta['pid']} on {meta['host']}, since {meta['since']}"
        return ""

    def close(self) -> None:
        self._db.close()

    # -- reading and writing ------------------------------------------------------------------------

    def holder(self) -> Json:
        """Who opened the savepoint last: `pid`, `host`, `since`."""
        found: Json = json.loads(self.meta("holder") or "{}")
        return found

    def meta(self, name: str, value: Optional[str] = None) -> Optional[str]:
        """Read, or set for good, a fact about the savepoint (`organisation`)."""
        if value is not None:
            self._write(("INSERT OR REPLACE INTO about VALUES (?, ?)", [(name, value)]))
        return next((value for (value,) in self._query("SELECT value FROM about WHERE name = ?", name)), None)

    def journal_read(self) -> int:
        """How many bytes of the journal it knows. What stands behind them is from a run with another savepoint, or from
        one that was killed between the two."""
        return int(self.meta("journal") or 0)

    def row(self, pair: Pair) -> Tuple[Any, ...]:
        """What is written of a pair, in the order of COLUMNS."""
        now = iso(self.environment.now().wall)
        return (
            *pair.ids, pair.email, *(getattr(pair, name) for name in self.PLAIN), pair.state.value,
            json.dumps(pair.left_behind), json.dumps(pair.primary.to_json()), json.dumps(pair.duplicate.to_json()),
            pair.refused, json.dumps(pair.details), pair.report, self.run, now, now,
        )  # fmt: skip

    def record(self, rows: Iterable[Tuple[Any, ...]], journal: int) -> None:
        """Write rows, and how many bytes of the journal are known with them; when this returns they are on the disk."""
        self._write(self._recording(rows), ("UPDATE about SET value = ? WHERE name = 'journal'", [(str(journal),)]))

    def _recording(self, rows: Iterable[Tuple[Any, ...]]) -> Tuple[str, Sequence[Tuple[Any, ...]]]:
        kept = ("primary_id", "duplicate_id", "created")
        changed = ", ".join(f"{name} = excluded.{name}" for name in self.COLUMNS if name not in kept)
        statement = (
            f"INSERT INTO pairs ({', '.join(self.COLUMNS)}) VALUES ({', '.join('?' * len(self.COLUMNS))}) "
            f"ON CONFLICT (primary_id, duplicate_id) DO UPDATE SET {changed}"
        )
        return statement, list(rows)

    def _write(self, *statements: Tuple[str, Sequence[Tuple[Any, ...]]]) -> None:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for statement, rows in statements:
                    self._db.executemany(statement, rows)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise self._trouble(error, EXIT_STOPPED) from None

    def _query(self, statement: str, *values: Any) -> Iterator[Tuple[Any, ...]]:
        try:
            with self._lock:
                cursor = self._db.execute(statement, values)
                found = cursor.fetchmany(1000)
            while found:
                yield from found
                with self._lock:
                    found = cursor.fetchmany(1000)
        except sqlite3.Error as error:
            raise self._trouble(error, EXIT_STOPPED) from None

    def _select(self, condition: str, *values: Any) -> Iterator[Pair]:
        query = f"SELECT {', '.join(self.COLUMNS)} FROM pairs WHERE {condition} ORDER BY updated, email"
        for found in self._query(query, *values):
            row = dict(zip(self.COLUMNS, found))
            yield Pair(
                primary=Contact.from_json(json.loads(row["primary_row"])),
                duplicate=Contact.from_json(json.loads(row["duplicate_row"])),
                state=State(row["state"]),
                left_behind=json.loads(row["left_behind"]),
                refused=bool(row["refused"]),
                details=json.loads(row["details"]),
                **{name: row[name] for name in (*self.PLAIN, "report", "updated")},
            )

    def rows(self, *states: State) -> Iterator[Pair]:
        """Pairs in these states, those that changed last behind."""
        return self._select(f"state IN ({', '.join('?' * len(states))})", *(state.value for state in states))

    def unfinished(self) -> List[Pair]:
        """Pairs that an earlier run left between the merge request and their end."""
        return list(self.rows(*UNFINISHED))

    def states(self, primary: str) -> Dict[str, Pair]:
        """What is known of the pairs with this primary, by the duplicate's id."""
        return {pair.duplicate.id: pair for pair in self._select("primary_id = ?", primary)}

    def went_into(self, contact: str, reference: Optional[str]) -> Optional[Pair]:
        """The pair that is done and has taken this contact into one that has got this reference (if any)."""
        for pair in self._select("duplicate_id = ? AND state = ?", contact, State.DONE.value):
            moved = (one.new_ref for one in self.states(pair.primary.id).values() if one.state is State.DONE)
            if reference is None or reference in moved:
                return pair
        return None

    def counts(self) -> Dict[str, int]:
        return dict(self._query("SELECT state, count(*) FROM pairs GROUP BY state ORDER BY state"))

    # -- what is in which report --------------------------------------------------------------------

    def unreported(self) -> Iterator[Pair]:
        """Pairs that have ended and stand in no report yet."""
        return self._select(
            f"report = '' AND state IN ({', '.join('?' * len(ENDED))})", *(state.value for state in ENDED)
        )

    def failed(self) -> Iterator[Pair]:
        """Pairs that this run has refused, or given up before they were asked for."""
        refused = "(state = 'failed' OR (state = 'undoing' AND code = 'undo_unfinished'))"
        return self._select(f"{refused} AND run = ?", self.run)

    def announce_report(self, name: str) -> None:
        """Note the report that is about to name what has ended and what is unfinished, before it gets its name."""
        ended, unfinished = (", ".join(f"'{state.value}'" for state in states) for states in (ENDED, UNFINISHED))
        self._write(
            (f"UPDATE pairs SET report = ? WHERE report = '' AND state IN ({ended})", [(name,)]),
            (f"UPDATE pairs SET report = ? WHERE state IN ({unfinished})", [(name,)]),
            ("INSERT OR REPLACE INTO about VALUES ('report', ?)", [(name,)]),
        )

    def confirm_report(self, is_there: Callable[[str], bool]) -> None:
        """Find out whether the report that was announced last came to be; if not, the next one holds what it would."""
        name = self.meta("report")
        if name:
            lost = [] if is_there(name) else [(name,)]
            self._write(
                ("UPDATE pairs SET report = '' WHERE report = ?", lost),
                ("DELETE FROM about WHERE name = ?", [("report",)]),
            )


class PendingWrite(NamedTuple):
    """What waits to be written of a pair: a line of the journal, or none, and a row of the savepoint."""

    line: Optional[bytes]
    row: Tuple[Any, ...]
    written: "asyncio.Future[None]"


class StateWriter:
    """Journal and savepoint: what becomes of a pair is noted in both, here alone.

    A thread writes; what comes meanwhile waits, and is flushed together.
    """

    EVENTS: Mapping[State, str] = {
        **{state: event for event, state in Journal.STATES.items()},
        State.FAILED: "withdrawn",
        State.ACKNOWLEDGED: "asked",
        State.PROVING: "merged",
    }

    def __init__(self, savepoint: SavePoint, journal: Journal) -> None:
        self.savepoint, self.journal = savepoint, journal
        self._waiting: List[PendingWrite] = []
        self._writing: Optional[asyncio.Future[None]] = None

    def reconcile(self, reported: Callable[[], Mapping[Tuple[str, str], str]]) -> None:
        """Let each learn what the other alone knows: the journal where it was lost, or the savepoint is one of version
        1.0.0; the savepoint where the journal goes on behind what it knows. `reported` tells who stands as ended in
        which report."""
        savepoint, size = self.savepoint, self.journal.size()
        known = savepoint.journal_read() if savepoint.journal_read() <= size else 0
        describe_pair = {pair.ids: pair for pair in self.journal.pairs(known)} if known < size else {}
        rows = {row.ids: row for row in savepoint.rows(*State)} if describe_pair or not known else {}
        unreported = [pair for pair in savepoint.unreported() if pair.ids not in describe_pair]
        reports = reported() if describe_pair or unreported else {}
        news = [pair for pair in unreported if pair.ids in reports]  # it is an old copy
        for pair in news:
            pair.report = reports[pair.ids]
        for ids, pair in describe_pair.items():
            row = rows.get(ids)
            same = row and self.EVENTS[row.state] == self.EVENTS[pair.state] and row.requested_at == pair.requested_at
            if row is None or not same or pair.state is State.UNDOING:
                pair.report = row.report if row and same else reports.get(ids, "")
                news.append(pair)
        asked = (row for ids, row in rows.items() if self.EVENTS[row.state] != "withdrawn" and ids not in describe_pair)
        untold = [] if known or savepoint.readonly else list(asked)
        if news or untold:
            log.info("%s learned from the journal, %d written to it", plural(len(news), "pair"), len(untold))
            self.put(untold, news)

    def put(self, lines: Iterable[Pair], rows: Iterable[Pair]) -> None:
        """Write at once: in the journal what has become of pairs, and rows of the savepoint."""
        added = [self.journal.line(self.EVENTS[pair.state], pair) for pair in lines]
        if added:
            self.journal.add(added)
        self.savepoint.record(map(self.savepoint.row, rows), self.journal.size())

    async def save(self, pair: Pair, event: str = "") -> None:
        """Note the state of a pair, and the event that has led to it: both are on the disk when this returns.

        Raises OSError or Stop(3) where the disk refuses.
        """
        line = self.journal.line(event, pair) if event else None
        entry = PendingWrite(line, self.savepoint.row(pair), asyncio.get_event_loop().create_future())
        self._waiting.append(entry)
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write())
        await entry.written

    async def _write(self) -> None:
        while self._waiting:
            entries, self._waiting = self._waiting, []
            failure: Optional[Exception] = None
            try:
                await self.savepoint.environment.run_in_thread(self.write, entries)
            except Exception as error:
                failure = error
            for entry in entries:
                if failure and not entry.written.done():
                    entry.written.set_exception(failure)
                elif not entry.written.done():
                    entry.written.set_result(None)
        self._writing = None

    def write(self, entries: Sequence[PendingWrite]) -> None:
        """The journal first: a savepoint that is lost is made again from it."""
        lines = [entry.line for entry in entries if entry.line]
        if lines:
            self.journal.add(lines)
        self.savepoint.record([entry.row for entry in entries], self.journal.size())


# ---------------------------------------------------------------------------------------------------
# Merge: the walk of one group
# ---------------------------------------------------------------------------------------------------


class Preconditions:
    """What the merges of a group rest on: the live check, the backup, and the integrity check from the disk.

    Each part is as old as the first request that it was read with.
    """

    FRESH = 60.0  # seconds for which a live check is believed
    LISTED = 120.0  # seconds for which the lists in a backup are believed
    AHEAD = 50  # timelines that wait for their turn at once; groups that began earlier are read first

    def __init__(self, merger: "ContactMerger", group: Group) -> None:
        self.merger = merger
        self.api = merger.api
        self.environment = merger.environment
        self.group = group
        self.folder = ""  # of the backup, once the integrity check has passed
        self.counts: Json = {}  # of what the backup holds
        self._checked: Optional[Timestamp] = None
        self._listed: Optional[Timestamp] = None
        self._live: Dict[str, Json] = {}  # rev users by id
        self._timelines: Dict[str, Tuple[Any, List[Json]]] = {}  # object id -> modified_date, entries

    def require_fresh(self) -> None:
        """Raises Stale where a request must not rest on it any more."""
        if self._is_old(self._checked, self.FRESH) or self._is_old(self._listed, self.LISTED):
            raise PreconditionsExpired()

    def invalidate(self) -> None:
        """Believe nothing of it any more; only timelines of what has not changed need not be read again."""
        self.folder, self._checked, self._listed = "", None, None

    async def ensure_fresh(self) -> None:
        """Make anew what has become too old, or has never been made. Raises PairError with the first flaw."""
        self.merger.raise_if_draining()
        if not self.folder or self._is_old(self._listed, self.LISTED):
            await self._check()
            if self.group.pending():
                await self._back_up()
        elif self._is_old(self._checked, self.FRESH):
            await self._check()

    def _is_old(self, since: Optional[Timestamp], limit: float) -> bool:
        return since is None or self.environment.age(since) > limit

    async def _check(self) -> None:
        """Compare the group with DevRev as it is now."""
        contacts = self.group.contacts()
        emails = sorted({contact.email.strip() for contact in contacts})
        priority = PREPARE if self._checked is None else MERGE
        listings = await together(*(self.api.emails.load(email, 1, priority) for email in emails))
        live: Dict[str, Optional[Json]] = {user["id"]: user for listing in listings for user in listing.items}
        namesakes = [user for listing in listings for user in listing.items]
        since = [listing.since for listing in listings]
        for contact in contacts:
            # Lists may lag behind what this tool has done to the primary.
            if contact.id not in live or (contact is self.group.primary and self.group.has_absorbed()):
                since.append(self.environment.now())
                live.pop(contact.id, None)
                found = await self.api.contact(contact.id, RequestOptions(priority))
                live[contact.id] = found
        found_now = check_live(self.group, live, namesakes, None, **self.merger.live_options)
        if found_now.error:
            raise found_now.error
        self.merger.drop(self.group, found_now.dropped)
        self._live, self._checked = {one: user for one, user in live.items() if user}, oldest(since)
        log.info("%s: the live check of %s has passed", self.group.email, plural(len(contacts), "contact"))

    async def _back_up(self) -> None:
        """Read all that DevRev holds of the group, write it down, and check what is on the disk."""
        contacts = self.group.contacts()
        priority = PREPARE if self._listed is None else MERGE
        read = await together(*(self._snapshot(contact, priority) for contact in contacts))
        snapshot, since = [one for one, _ in read], oldest(moment for _, moment in read)
        objects = {identity: obj for one in snapshot for identity, obj in one.objects().items()}
        if self.merger.backups.with_timelines:
            await self._read_timelines(objects)
        timelines = {identity: self._timelines[identity][1] for identity in objects if identity in self._timelines}
        folder, problem = await self.environment.run_in_thread(self._write_backup, snapshot, timelines)
        works = {work for one in snapshot for work in one.works()}
        entries = sum(map(len, timelines.values()))
        self.counts = {"works": len(works), "conversations": len(objects) - len(works), "timeline_entries": entries}
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.counts.items())
        log.info("%s: backed up in %s: %s", self.group.email, folder, counts)
        for pair in self.group.pairs:
            if pair.state is State.PLANNED:
                pair.backup, pair.details["backed_up"] = folder, self.counts
        if problem:
            raise problem
        log.info("%s: the integrity check of %s has passed", self.group.email, folder)
        self.folder, self._listed = folder, since

    async def _snapshot(self, contact: Contact, priority: int) -> Tuple[ContactSnapshot, Timestamp]:
        """Everything but the timelines of one contact."""
        lists = await together(
            *(self.api.objects[name].load(contact.id, contact.tickets, priority) for name in ROLES.values()),
            self.api.objects["members"].load(contact.id, 1 + contact.tickets // 4, priority),
        )
        roles = {role: by_id(listing.items) for role, listing in zip(ROLES, lists)}
        snapshot = ContactSnapshot(contact, self._live[contact.id], roles, by_id(lists[-1].items))
        return snapshot, oldest(listing.since for listing in lists)

    async def _read_timelines(self, objects: Mapping[str, Json]) -> None:
        """Read the timelines that are not there yet, and those of what has changed; a few at a time."""
        known = self._timelines
        wanted = [one for one, obj in objects.items() if known.get(one, (known,))[0] != obj.get("modified_date")]

        async def read() -> None:
            while wanted:
                identity = wanted.pop(0)
                try:
                    self.merger.raise_if_draining()
                    entries = await self.api.timeline(identity)
                except (ApiError, NoUsableResponse) as error:
                    wanted.clear()
                    raise PairError(error.code, f"{identity}: {error}") from None
                except Cancelled:
                    wanted.clear()
                    raise
                known[identity] = objects[identity].get("modified_date"), entries

        await together(*(read() for _ in range(min(self.AHEAD, len(wanted)))))

    def _write_backup(
        self, snapshot: Sequence[ContactSnapshot], timelines: Timelines
    ) -> Tuple[str, Optional[PairError]]:
        """Write the backup (in a thread); check from the disk that it is whole and holds what the export counts."""
        merger = self.merger
        try:
            folder = merger.backups.create(self.group.email, merger.organisation, snapshot, timelines)
        except RecursionError:
            raise PairError("backup_failed", "DevRev answered with something that is nested too deep") from None
        try:
            for entry in verify_backup(folder)["contacts"]:
                grown = entry["role"] == "primary" and self.group.has_absorbed()
                policy = "at-least" if grown else merger.count_policy
                problem = count_error(Contact.from_json(entry["csv"]), greatest_count(entry), policy)
                if problem:
                    return str(folder), problem
        except PairError as error:
            return str(folder), error
        return str(folder), None


def oldest(moments: Iterable[Timestamp]) -> Timestamp:
    return min(moments, key=lambda moment: moment.monotonic)


def has_reference(pair: Pair, primary: Optional[Json]) -> bool:
    """Whether the primary of a pair that an earlier run left has the new reference already.

    Raises PairError where somebody has set one that is neither the old nor the new one: it is left.
    """
    name = pair.primary.short_id
    if primary is None:
        raise PairError("not_found", f"the primary {name} is not in DevRev any more")
    reference = primary.get("external_ref")
    if reference not in (pair.new_ref, pair.primary.external_ref):
        words = f"{name} has got the reference {reference or 'none'} from somebody; {pair.new_ref} was not set"
        raise PairError("external_ref_changed", words)
    return bool(reference == pair.new_ref)


async def set_reference(api: DevRevAPI, pair: Pair, reference: str, options: RequestOptions) -> bool:
    """Set the reference of a pair's primary: True where it is set and read back, False where somebody holds it."""
    try:
        await api.set_external_ref(pair.primary.id, reference, options)
    except ApiError as api_error:
        if api_error.status == 409:
            return False
        code = "not_found" if api_error.missing else api_error.code
        raise PairError(code, f"the reference {reference} could not be set: {api_error}") from None
    except (NoUsableResponse, PairError) as error:
        raise PairError(error.code, f"the reference {reference} could not be set: {error}") from None
    return True


def check_holders(pair: Pair, listed: Iterable[Json], over: bool) -> None:
    """Raise PairError where another contact holds the pair's new reference, or it has not been let go for too long."""
    holders = [str(user.get("display_id") or user["id"]) for user in listed if user["id"] not in pair.ids]
    if holders or over:
        nobody = f"{pair.duplicate.short_id}, which has gone, or a contact that the token can't see"
        who = ", ".join(holders) or nobody
        raise PairError("external_ref_conflict", f"the reference {pair.new_ref} is held by {who}")


def check_nothing_left(pair: Pair, left: Sequence[Json]) -> None:
    """Raise PairError where something does not hang on the primary, named."""
    if left:
        pair.left_behind = describe(pair.backup, left)
        names = ", ".join(dict.fromkeys(item["display_id"] for item in pair.left_behind))
        raise PairError("left_behind", f"merged, but not on the primary: {names}")


def confirmation_timeout(pair: Pair, merge_timeout: float) -> float:
    """Seconds after the request until a duplicate that is still there means that the merge won't come by itself."""
    if pair.state is State.ACKNOWLEDGED or pair.refused:
        return merge_timeout
    return min(10.0, merge_timeout / 4)


@dataclass
class PairMerge:
    """What this run knows of a pair beyond its state."""

    MAX_REQUESTS = 3  # times that a run asks for one merge

    requests_sent: int = 0  # requests of this run
    waiting_since: Optional[Timestamp] = None  # that the merge is waited for
    before: float = 0.0  # seconds that it had been waited for by then
    polled: bool = False  # since the last request
    rejection: Optional[PairError] = None  # DevRev's answer to the last request, where it was a clear no
    contradictions: int = 0  # times that the duplicate was believed gone and was there after all

    def waited(self, environment: Environment) -> float:
        """Seconds since the merge was asked for."""
        return self.before + environment.elapsed(self.waiting_since) if self.waiting_since else 0.0

    def check_may_request_again(self, pair: Pair, waited: float) -> None:
        """Raise PairError where the patience is over and this run has asked: not again where DevRev has answered."""
        answered = pair.state is State.ACKNOWLEDGED or pair.refused
        if self.requests_sent >= self.MAX_REQUESTS or (self.requests_sent and answered):
            words = f"{pair.duplicate.short_id} is still there {duration(waited)} after it was asked for"
            raise PairError("merge_not_confirmed", words)


class GroupMerge:
    """One group on its way: check, back up, ask, confirm, move the reference, prove, done.

    A pair that an earlier run left enters the same walk at its state. Whatever keeps a pair from its end is raised as
    PairError and noted by `ContactMerger.rest`; what stops the run passes through.
    """

    MAX_REFRESHES = 12  # times that a check or a backup is made anew before a pair is given up
    SLOW = 3.0  # seconds after which nobody waits for a pair any more

    def __init__(self, merger: "ContactMerger", group: Group, pairs: Sequence[Pair], resumed: bool = False) -> None:
        self.merger = merger
        self.api = merger.api
        self.environment = merger.environment
        self.group = group
        self.pairs = pairs
        self.resumed = resumed
        self.attempted = asyncio.Event()  # each pair has been tried, or something has to be waited for
        self.preconditions = Preconditions(merger, group)
        self.verifier = TransferVerifier(self)
        self.reservation = Reservation()
        self.pair_merges: Dict[Tuple[str, str], PairMerge] = collections.defaultdict(PairMerge)
        self._request_lock = asyncio.Lock()

    async def run(self) -> None:
        """Merge the pairs one after the other, then prove them."""
        try:
            for index, pair in enumerate(self.pairs):
                if not await self._attempt(pair, self._merge) and pair.ids not in self.merger.dropped:
                    await self._skip_pairs(pair, self.pairs[index + 1 :])
                    break
            self.preconditions = Preconditions(
                self.merger, self.group
            )  # for memory: what is proved is read from the disk
            await together(*(self.merger.guarded(self._attempt(pair, self._finish)) for pair in self.pairs))
        finally:
            self.api.scheduler.release(self.reservation)
            self.attempted.set()

    async def _attempt(self, pair: Pair, step: Callable[[Pair], Awaitable[None]]) -> bool:
        """Take a pair further; False where it comes to rest before its end."""
        if pair.ids in self.merger.outcomes:
            return False
        try:
            await step(pair)
        except PairError as problem:
            await self.merger.record_outcome(self, pair, problem)
        except PermissionDenied as denied:
            if pair.state in UNFINISHED:
                await self.merger.record_outcome(self, pair, PairError("forbidden", str(denied)))
            raise
        return pair.ids not in self.merger.outcomes

    async def _skip_pairs(self, first: Pair, pairs: Sequence[Pair]) -> None:
        """What refuses a group refuses all of its pairs; what has been asked for has to be finished first."""
        refused, why = first.state is State.FAILED, "another merge into the same contact has to be finished first"
        problem = PairError(first.code, first.error) if refused else PairError("group_incomplete", why)
        for pair in pairs:
            if pair.state is State.PLANNED:
                await self.merger.record_outcome(self, pair, problem)

    async def _merge(self, pair: Pair) -> None:
        """Bring a pair from whatever state it is in to the reference's being on the primary."""
        if self.resumed and pair.state in (State.MERGED, State.PROVING):
            onward = self.merger.savepoint.went_into(pair.primary.id, pair.new_ref)
            if onward:
                await self._verify_onward(pair, onward.primary)
                return
        try:
            while pair.state not in (State.PROVING, *ENDED) and pair.ids not in self.merger.dropped:
                if pair.state is State.MERGED:
                    await self._set_reference(pair)
                elif pair.state is State.PLANNED or not await self._confirm(pair):
                    async with self._request_lock:  # one of the group at a time, for they rest on the same evidence
                        await self._request_merge(pair)
        finally:
            self.api.scheduler.release(self.reservation)

    async def _finish(self, pair: Pair) -> None:
        """Prove a pair; where that shows that it is not merged after all, it is merged first."""
        while pair.state not in ENDED:
            await self._merge(pair)
            if pair.state is State.PROVING:
                await self._verify(pair)
        await self.merger.record_outcome(self, pair)

    # -- ask ----------------------------------------------------------------------------------------

    async def _request_merge(self, pair: Pair) -> None:
        """Ask, on evidence that is fresh at the moment the request leaves."""
        first, pair_merge = not pair.first_requested_at, self.pair_merges[pair.ids]
        if pair.is_overruled:
            words = f"{into(pair)} was asked for, and now another reference is to stay than it would leave"
            raise PairError("plan_changed", words)
        self.group.requesting = pair
        if pair.exported:
            # What is asked for again rests on what is known now; until then the rows of the first request count.
            exported, pair.exported = pair.exported, None
            pair.primary, pair.duplicate, pair.new_ref = exported.primary, exported.duplicate, exported.new_ref
        if not first:
            self.preconditions.invalidate()
        for _ in range(self.MAX_REFRESHES):
            self.api.scheduler.release(self.reservation)  # what was kept for the last request would keep others waiting
            if not await self._ensure_ready(pair, first) or pair.ids in self.merger.dropped:
                return
            try:
                async with self.merger.exclusive_first_merge():
                    api_error = await self._request(pair)
                pair_merge.waiting_since, pair_merge.before = self.environment.now(), 0.0
                if api_error and api_error.missing and first and not self.merger.journal.asked_before(pair):
                    await self._check_merged_elsewhere(pair)
                return
            except PreconditionsExpired:
                log.info("%s: the check or the backup has become too old; making it anew", pair.email)
        raise PairError(
            "stale", "checks and backups become too old before the merge can be asked for; the quota is too small"
        )

    async def _ensure_ready(self, pair: Pair, first: bool) -> bool:
        """Renew the evidence. A pair that was asked for before is looked at whatever the renewal says: False if it has
        gone by then. The look keeps no units, for pairs that wait to ask would wait for each other's."""
        problem: Optional[PairError] = None
        try:
            await self.preconditions.ensure_fresh()
        except PairError as error:
            problem = error
        if not first and await self.api.poll_duplicate(*pair.ids, RequestOptions(FINISH)) is not DuplicateStatus.THERE:
            await self._save_merged(pair)
            return False
        if problem:
            raise problem
        return True

    async def _request(self, pair: Pair) -> Optional[ApiError]:
        new = not pair.first_requested_at
        try:
            await self.api.merge(
                *pair.ids, self._request_options(pair, MERGE), lambda: self._save_intent(pair), telling=new
            )
        except ApiError as api_error:
            pair.refused = self.merger.changed = True  # for it may be carried out all the same
            await self.merger.state_writer.save(pair)
            if api_error.status != 409:  # which may say that it is being merged
                self.pair_merges[pair.ids].rejection = PairError("merge_refused", str(api_error))
            return api_error
        except PermissionDenied:
            pair.refused = True
            raise
        except NoUsableResponse as error:
            self.merger.changed = True
            log.info("%s: the answer to the merge was lost (%s); looking", pair.email, error)
        else:
            pair.state = State.ACKNOWLEDGED
            await self.merger.state_writer.save(pair)
            log.info("%s: DevRev has acknowledged the merge", pair.email)
            self.merger.note_acknowledged()
        return None

    async def _save_intent(self, pair: Pair) -> None:
        """The last moment before the request leaves: Stale if it must not, else the intent goes to the disk."""
        self.preconditions.require_fresh()
        self.merger.raise_if_draining()
        pair_merge, earlier = self.pair_merges[pair.ids], dict(vars(pair))
        pair_merge.requests_sent, pair_merge.polled, pair_merge.rejection = pair_merge.requests_sent + 1, False, None
        pair.state, pair.code, pair.error, pair.refused = State.REQUESTED, "", "", False
        pair.backup, pair.details["backed_up"] = self.preconditions.folder, self.preconditions.counts
        pair.requested_at = self.environment.now().wall
        pair.first_requested_at = pair.first_requested_at or pair.requested_at
        await self.merger.state_writer.save(pair, "asked")
        try:
            # The disk may be slow, and the run may have been stopped meanwhile: what is not sent was not asked for.
            self.preconditions.require_fresh()
            self.merger.cancel_token.raise_if_cancelled()
        except (PreconditionsExpired, Cancelled):
            pair_merge.requests_sent -= 1
            vars(pair).update(earlier)
            await self.merger.state_writer.save(pair, "asked" if pair.first_requested_at else "withdrawn")
            raise
        log.info("%s: asking for the merge of %s", pair.email, into(pair))

    async def _check_merged_elsewhere(self, pair: Pair) -> None:
        """A first request was answered with an object's 404: somebody has merged or deleted one of the two."""
        self.api.scheduler.release(self.reservation)
        if not await self.verifier.is_elsewhere(pair):
            return
        pair.state, pair.code = State.MERGED_ELSEWHERE, "merged_elsewhere"
        pair.error = f"{pair.duplicate.short_id} was merged or deleted by somebody else before it was asked for"
        if pair.new_ref:
            pair.error += f"; its reference {pair.new_ref} was not moved"
        await self.merger.record_outcome(self, pair)

    # -- confirm ------------------------------------------------------------------------------------

    def _request_options(self, pair: Pair, priority: int = FINISH) -> RequestOptions:
        """For a request after which a pair must not wait for quota; where it takes long, others may go on meanwhile."""
        slow = self.pair_merges[pair.ids].waited(self.environment) > 10
        return RequestOptions(
            priority, self.reservation, 2 if slow else self.merger.poll_history.polls() + bool(pair.new_ref)
        )

    async def _poll(self, pair: Pair) -> bool:
        return await self.api.poll_duplicate(*pair.ids, self._request_options(pair)) is not DuplicateStatus.THERE

    async def _confirm(self, pair: Pair) -> bool:
        """Look until the duplicate has gone (True), or may be asked for again (False)."""
        await self._wait_for_first_poll(pair)
        pair_merge, polls = self.pair_merges[pair.ids], 0
        while True:
            problem: Optional[PairError] = None
            polls, before = polls + 1, pair_merge.waited(self.environment)
            try:
                if await self._poll(pair):
                    if pair_merge.requests_sent:
                        self.merger.poll_history.record(before, polls)
                    await self._save_merged(pair)
                    return True
            except (ApiError, NoUsableResponse) as error:
                problem = PairError(error.code, f"the merge can't be confirmed: {error}")
            waited, longest = pair_merge.waited(self.environment), confirmation_timeout(pair, self.merger.merge_timeout)
            if pair_merge.rejection:
                raise pair_merge.rejection
            if waited >= longest:
                if problem:
                    raise problem
                pair_merge.check_may_request_again(pair, waited)
                return False
            pause = min(0.1 + 0.5 * waited, 0.75) if waited < 10 else min(10.0, 0.1 * waited)
            await self.pause(pair, min(pause, longest - waited))

    async def _wait_for_first_poll(self, pair: Pair) -> None:
        """Wait as long as merges take; what an earlier run has asked for is looked at at once."""
        pair_merge = self.pair_merges[pair.ids]
        if pair_merge.waiting_since is None:
            pair_merge.waiting_since = self.environment.now()
            pair_merge.before = max(0.0, pair_merge.waiting_since.wall - pair.requested_at)
        elif not (pair_merge.rejection or pair_merge.polled):
            await self.pause(pair, self.merger.poll_history.first_poll() - pair_merge.waited(self.environment))
        pair_merge.polled = True

    async def _save_merged(self, pair: Pair) -> None:
        self.merger.changed = True
        pair.state, pair.code, pair.error = State.MERGED, "", ""
        await self.merger.state_writer.save(pair, "merged")
        log.info("%s: confirmed, %s has gone", pair.email, pair.duplicate.short_id)

    async def _save_still_exists(self, pair: Pair) -> None:
        """It was believed gone until something has contradicted it: back to looking."""
        log.info("%s: %s is still there after all", pair.email, pair.duplicate.short_id)
        self.pair_merges[pair.ids].contradictions += 1
        pair.state = State.REQUESTED if pair.refused else State.ACKNOWLEDGED
        await self.merger.state_writer.save(pair, "asked")
        if self.pair_merges[pair.ids].contradictions > 20:
            raise PairError("merge_not_confirmed", f"{pair.duplicate.short_id} has gone and come back too often")

    async def pause(self, pair: Pair, seconds: float) -> None:
        """Wait for DevRev. What an earlier run has left is no longer waited for by others then."""
        if seconds > 0:
            self.attempted.set()
            if self.pair_merges[pair.ids].waited(self.environment) > self.SLOW:
                self.merger.expect_no_verification(self)
            await self.merger.cancel_token.sleep(seconds)

    # -- the reference ------------------------------------------------------------------------------

    async def _set_reference(self, pair: Pair) -> None:
        """Set the duplicate's reference on the primary; a 409 may take the pair back to being looked at."""
        resumed = not self.pair_merges[pair.ids].requests_sent
        primary = (
            await self.api.contact(pair.primary.id, self._request_options(pair)) if resumed and pair.new_ref else None
        )
        if pair.new_ref and not (resumed and has_reference(pair, primary)):
            self.merger.changed = True
            begun, pause = self.environment.now(), 0.2
            while not await set_reference(self.api, pair, pair.new_ref, self._request_options(pair)):
                await self.pause(pair, pause)
                pause = min(10.0, 1.6 * pause)
                if not await self._poll(pair):
                    await self._save_still_exists(pair)
                    return
                over = self.environment.elapsed(begun) > self.merger.merge_timeout
                check_holders(pair, await self.api.holders_of(pair.new_ref, self._request_options(pair)), over)
        pair.state = State.PROVING
        await self.merger.state_writer.save(pair)
        log.info("%s: %s has the reference %s", pair.email, pair.primary.short_id, pair.new_ref or "that it had")

    # -- proof --------------------------------------------------------------------------------------

    async def _verify(self, pair: Pair) -> None:
        """Look until all that the duplicate had hangs on the primary, and the list of its email shows it no more."""
        self.merger.expect_no_verification(self)
        wanted = objects_to_transfer(pair.backup, pair.duplicate.id)
        left, listed = await self.verifier.wait(pair, wanted)
        if listed is DuplicateStatus.THERE:
            await self._save_still_exists(pair)
            return
        check_nothing_left(pair, left)
        if listed:
            raise PairError("still_listed", f"merged, but DevRev still lists {pair.duplicate.short_id} for its email")
        pair.state, pair.code, pair.error, pair.left_behind = State.DONE, "", "", []
        pair.details["proved"] = len({item["id"] for item in wanted}.difference(pair.details.get("deleted", ())))
        log.info("%s: proved, all %d objects hang on the primary", pair.email, pair.details["proved"])

    async def _verify_onward(self, pair: Pair, survivor: Contact) -> None:
        """The primary itself has been merged into another by now, which has the reference: prove the pair there."""
        wanted = objects_to_transfer(pair.backup, pair.duplicate.id)
        check_nothing_left(pair, (await self.verifier.wait(replace(pair, primary=survivor), wanted))[0])
        pair.state, pair.code, pair.error, pair.left_behind = State.DONE, "", "", []
        pair.details["onward"] = survivor.short_id


class TransferVerifier:
    """Looks whether what a duplicate had hangs on its primary, for as long as DevRev's lists may lag behind a merge."""

    EXAMINED = 25  # objects that are looked at one by one, in each round before the whole time is over

    def __init__(self, group_merge: "GroupMerge") -> None:
        self.group_merge = group_merge
        self.api = group_merge.api
        self.priority = RESUME if group_merge.resumed else VERIFY

    async def wait(self, pair: Pair, wanted: Sequence[Json]) -> Tuple[List[Json], Optional[DuplicateStatus]]:
        """What of `{id, role}` is not on the primary, and what a look says where the list of the email still shows the
        duplicate; for as long as lists may lag behind. What has been deleted since is named, and holds nothing up."""
        begun, rounds = self.group_merge.environment.now(), 0
        examined: Set[str] = set()
        while True:
            missing, listed = await together(
                self._missing(pair, wanted, bool(rounds)), self._is_listed(pair, bool(rounds))
            )
            status_ = await self.api.poll_duplicate(*pair.ids, RequestOptions(FINISH)) if listed else None
            waited, rounds = self.group_merge.environment.elapsed(begun), rounds + 1
            over = waited >= self.group_merge.merger.merge_timeout
            if missing and rounds > 2:
                few = [item["id"] for item in missing if over or item["id"] not in examined]
                gone = {one for one in few[: None if over else self.EXAMINED] if await self._is_deleted(one)}
                examined.update(few[: self.EXAMINED])
                if gone:
                    pair.details["deleted"] = sorted(gone.union(pair.details.get("deleted", [])))
                wanted, missing = ([one for one in items if one["id"] not in gone] for items in (wanted, missing))
            if over or status_ is DuplicateStatus.THERE or not (missing or status_):
                return missing, status_
            await self.group_merge.pause(
                pair, min(20.0, 0.5 + waited / 2, self.group_merge.merger.merge_timeout - waited)
            )

    async def is_elsewhere(self, pair: Pair) -> bool:
        """Whether the duplicate has gone and the primary has not got it. Where what the duplicate had hangs on the
        primary, they are merged, whoever asked for it."""
        primary = await self.api.contact(pair.primary.id, RequestOptions(FINISH)) or {}
        if primary.get("state") not in ("active", "locked", "deactivated") or primary.get("primary_identity"):
            return False
        wanted = objects_to_transfer(pair.backup, pair.duplicate.id)
        try:
            if await self.api.poll_duplicate(*pair.ids, RequestOptions(FINISH)) is not DuplicateStatus.GONE:
                return False
            missing = (await self.wait(pair, wanted))[0] if wanted else []
        except PairError as problem:
            if problem.code == "merged_into_another":
                return True
            raise
        deleted = pair.details.get("deleted", ())
        return bool(missing) or all(item["id"] in deleted for item in wanted)

    async def _missing(self, pair: Pair, wanted: Sequence[Json], again: bool) -> List[Json]:
        """What of `{id, role}` the lists don't show on the primary now."""
        weight = pair.primary.tickets + pair.duplicate.tickets
        roles = sorted({item["role"] for item in wanted})
        listings = await together(
            *(self._list(self.api.objects[role], pair.primary.id, weight, again) for role in roles)
        )
        there = {(role, item["id"]) for role, listing in zip(roles, listings) for item in listing.items}
        return [item for item in wanted if (item["role"], item["id"]) not in there]

    async def _is_listed(self, pair: Pair, again: bool) -> bool:
        listing = await self._list(self.api.emails, pair.duplicate.email.strip(), 1, again)
        return any(
            user["id"] == pair.duplicate.id and duplicate_status(user, *pair.ids) is DuplicateStatus.THERE
            for user in listing.items
        )

    async def _list(self, batch_loader: BatchLoader, key: str, weight: int, again: bool) -> ListResult:
        """List; with a long linger where nobody waits for it, so that many pairs are proved with the same calls."""
        hurried = again or self.group_merge.resumed
        linger = BatchLoader.LINGER if hurried else self.group_merge.merger.LINGER
        return await batch_loader.load(key, weight, self.priority, linger)

    async def _is_deleted(self, identity: str) -> bool:
        with contextlib.suppress(ApiError, NoUsableResponse):
            return await self.api.get_object(identity, RequestOptions(self.priority)) is None
        return False


# ---------------------------------------------------------------------------------------------------
# Merge: the run
# ---------------------------------------------------------------------------------------------------


class PollHistory:
    """How long merges have taken lately, by the look that found them done."""

    SOONEST, LATEST = 0.25, 0.75  # seconds to the first look: where nothing is known, and whatever is known
    MOST = 16  # looks in the first ten seconds after a merge was asked for

    def __init__(self) -> None:
        self._merges: Deque[Tuple[float, int]] = collections.deque(maxlen=20)  # seconds, looks

    def record(self, seconds: float, polls: int) -> None:
        self._merges.append((0.95 * seconds, polls))  # a little sooner is tried the next time

    def first_poll(self) -> float:
        """Seconds after an answer at which a merge is usually done."""
        return min(self.LATEST, max((seconds for seconds, _ in self._merges), default=self.SOONEST))

    def polls(self) -> int:
        """Looks that are kept for a merge: as many as lately, and one since a look may come too early."""
        return min(self.MOST, 1 + max((polls for _, polls in self._merges), default=self.MOST))


# What keeps a pair from its end and says nothing of the next one.
NOT_SYSTEMIC = frozenset((
    "not_found", "not_active", "email_changed", "external_ref_changed", "different_rev_org", "several_user_refs",
    "count_mismatch", "left_behind", "still_listed", "merged_into_another", "external_ref_conflict", "plan_changed",
    "group_changed", "several_external_refs", "shared_mailbox", "unverified",
    "undo_unfinished", "group_incomplete", "interrupted", "not_merged", "not_handed_back",
))  # fmt: skip


class ContactMerger:
    """Carries out a plan: finishes what an earlier run left, then walks group after group."""

    BATCH = 25  # pairs that are begun together, so that one list call serves them all
    OUTSTANDING = 100  # pairs on their way
    MAX_FAILURES_IN_A_ROW = 5  # failures in a row that stop the run
    GRACE = 10.0  # seconds that requests under way are waited for when the run is interrupted
    UNDER_WAY: Tuple[State, ...] = UNFINISHED
    LINGER = 10.0  # seconds that a proof waits for others to share its list calls

    def __init__(
        self,
        api: DevRevAPI,
        savepoint: SavePoint,
        journal: Journal,
        backups: BackupStore,
        count_policy: str = "exact",
        merge_timeout: float = 120.0,
        on_pair: Callable[[Pair], None] = lambda _pair: None,
    ) -> None:
        self.api = api
        self.environment, self.cancel_token = api.environment, api.cancel_token
        self.savepoint, self.journal, self.backups = savepoint, journal, backups
        self.state_writer = StateWriter(savepoint, journal)
        self.count_policy, self.merge_timeout = count_policy, merge_timeout
        self.on_pair = on_pair
        self.token_owner: Json = {}
        self.organisation = ""
        self.total = 0
        self.outcomes: Dict[Tuple[str, str], Pair] = {}  # ended, refused, or given up for this run
        self.live_options: Dict[str, bool] = {}  # of check_live
        self.dropped: Dict[Tuple[str, str], Dropped] = {}  # pairs that the live check has taken out of their groups
        self.draining: Optional[FatalError] = None  # finish what is under way, begin nothing
        self.changed = False  # whether DevRev may have acted on anything
        self._failures_in_a_row = 0
        self._group_merges: Dict[asyncio.Future[None], GroupMerge] = {}
        self._expected_verifications: Set[GroupMerge] = set()  # walks that will be at their proof soon
        self.poll_history = PollHistory()
        self._acknowledged = False
        self._first_merge_lock = asyncio.Lock()

    # -- the run ------------------------------------------------------------------------------------

    async def identify(self, plan: Plan) -> List[Pair]:
        """Find out whose token it is; refuse another organisation's CSV or savepoint. Returns the unfinished pairs.

        Raises Stop(2), before anything else has been asked or done.
        """
        await self.find_owner()
        unfinished = self.savepoint.unfinished()
        for origin, pairs in (("CSV", plan.pairs()), ("savepoint", iter(unfinished))):
            check_organisation(self.organisation, origin, pairs)
        for pair in unfinished:
            pair.is_overruled = pair.ids in plan.overruled
        return unfinished

    async def find_owner(self) -> None:
        with before_any_change(self.api):
            self.token_owner = await self.api.whoami()
        self.organisation = organisation_of(str(self.token_owner.get("id")))

    async def run(self, groups: List[Group], unfinished: Sequence[Pair]) -> int:
        """Finish what an earlier run left unfinished, carry out the plan, and return the exit code.

        `identify` has to come first. Nothing is raised: what stops the run is in `stop`.
        """
        self.total = len(
            {pair.ids for group in groups for pair in group.pairs if pair.state not in ENDED}.union(
                pair.ids for pair in unfinished
            )
        )
        return await self.drive(self._work(groups, unfinished))

    async def drive(self, work: Awaitable[None]) -> int:
        """Do the work as far as it goes, and return the exit code; nothing is raised."""
        await self.guarded(work)
        await self.guarded(self._all_group_merges())  # where nothing more is begun, what is under way is finished
        if self._group_merges:
            await asyncio.wait(set(self._group_merges), timeout=self.GRACE)
        await together(*map(self._note_interrupted, list(self._group_merges.values())))
        return self._exit_code()

    async def _work(self, groups: List[Group], unfinished: Sequence[Pair]) -> None:
        earlier = [self._start(group_merge) for group_merge in self._resumed_group_merges(groups, unfinished)]
        for group_merge in earlier:
            await self.cancel_token.wait(group_merge.attempted.wait())
        await self._begin(groups, unfinished)
        await self._all_group_merges()
        freed = [pair for pair in unfinished if pair.state is State.MERGED and pair.code == "external_ref_conflict"]
        for pair in freed:
            # The contact that held its reference may have been merged meanwhile.
            if any(other.state in ENDED and other.new_ref == pair.new_ref for other in self.outcomes.values()):
                del self.outcomes[pair.ids]
                self._start(GroupMerge(self, Group(pair.email, [pair]), [pair], resumed=True))
        await self._all_group_merges()

    def _resumed_group_merges(self, groups: Sequence[Group], unfinished: Sequence[Pair]) -> List[GroupMerge]:
        """A walk for each primary of unfinished pairs; they know this export's rows where it has them."""
        exported = {pair.ids: pair for group in groups for pair in group.pairs}
        families: Dict[str, List[Pair]] = collections.defaultdict(list)
        for pair in unfinished:
            pair.exported = exported.get(pair.ids)
            families[pair.primary.id].append(pair)
        group_merges = []
        for primary, pairs in families.items():
            mine = {pair.ids for pair in pairs}
            siblings = [pair for pair in self.savepoint.states(primary).values() if pair.ids not in mine]
            group_merges.append(GroupMerge(self, Group(pairs[0].email, [*pairs, *siblings]), pairs, resumed=True))
        return group_merges

    async def _begin(self, groups: List[Group], unfinished: Sequence[Pair]) -> None:
        """Begin the groups of the plan, a batch at a time while there is room; those with a contact of an unfinished
        pair last."""
        known = {pair.ids: pair for pair in unfinished}
        stuck = {identity for pair in unfinished for identity in pair.ids}
        undoing = {one: pair for pair in self.savepoint.rows(State.UNDOING) for one in pair.ids}
        deferred = []
        batch: List[GroupMerge] = []
        for group in consume(groups):
            group.pairs = [known.get(pair.ids, pair) for pair in group.pairs]
            pairs = [pair for pair in group.pairs if pair.state is State.PLANNED]
            ids = {contact.id for contact in group.all_contacts()}
            if not pairs:
                continue
            if ids & undoing.keys():
                path = next(undoing[one].details["undo"]["path"] for one in ids if one in undoing)
                why = f"its undo is not finished; finish it first: merge_contacts.py --undo {path}"
                # What is being undone stays so in the savepoint: a refusal must not make a new beginning of it.
                begun = {pair.ids: pair for pair in undoing.values()}
                await self._refuse(group, [begun.get(pair.ids, pair) for pair in pairs], "undo_unfinished", why)
            elif ids & stuck:
                deferred.append((group, pairs))
            else:
                batch.append(GroupMerge(self, group, pairs))
            if sum(len(group_merge.pairs) for group_merge in batch) >= self._batch():
                await self._begin_batch(batch)
        await self._begin_batch(batch)
        await together(*(self._begin_deferred(group, pairs, unfinished) for group, pairs in deferred))

    def _batch(self) -> int:
        return min(self.BATCH, max(1, self._outstanding() // 2))

    def _outstanding(self) -> int:
        """Pairs on their way: under a small quota few, for checks and backups that wait for the next window are made
        anew then."""
        return int(max(2, min(self.OUTSTANDING, self.api.scheduler.requests_per_minute() // 4)))

    async def _begin_batch(self, batch: List[GroupMerge]) -> None:
        while batch:
            under_way = sum(len(group_merge.pairs) for group_merge in self._group_merges.values())
            if under_way and under_way + len(batch) > self._outstanding():
                await self.cancel_token.wait(self._any_group_merge())
                continue
            self.raise_if_draining()
            for group_merge in batch:
                self._expected_verifications.add(self._start(group_merge))
            batch.clear()

    async def _begin_deferred(self, group: Group, pairs: Sequence[Pair], unfinished: Sequence[Pair]) -> None:
        """Begin a group that shares a contact with an unfinished pair, once that is past asking.

        Where the group has the contact that holds that pair's reference, it goes first: the reference follows.
        """
        ids = {contact.id for contact in group.all_contacts()}
        refs = {pair.new_ref for pair in pairs if pair.new_ref}
        for task, group_merge in list(self._group_merges.items()):
            if group_merge.resumed and any(ids & set(pair.ids) for pair in group_merge.pairs):
                await self.cancel_token.wait(asyncio.wait({task}))
        for other in unfinished:
            frees = other.state is State.MERGED and other.new_ref in refs
            if ids & set(other.ids) and other.state in (*REQUESTED_STATES, State.MERGED) and not frees:
                await self._refuse(
                    group, pairs, "group_incomplete", "another merge of one of its contacts has to be finished first"
                )
                return
        await self._begin_batch([GroupMerge(self, group, pairs)])

    async def _refuse(self, group: Group, pairs: Sequence[Pair], code: str, why: str) -> None:
        group_merge = GroupMerge(self, group, pairs)
        await together(*(self.record_outcome(group_merge, pair, PairError(code, why)) for pair in pairs))

    # -- walks --------------------------------------------------------------------------------------

    def _start(self, group_merge: GroupMerge) -> GroupMerge:
        task = asyncio.ensure_future(self.guarded(group_merge.run(), group_merge))
        self._group_merges[task] = group_merge
        task.add_done_callback(self._forget)
        return group_merge

    def _forget(self, task: "asyncio.Future[None]") -> None:
        self.expect_no_verification(self._group_merges.pop(task))

    async def guarded(self, work: Awaitable[Any], group_merge: Optional[GroupMerge] = None) -> None:
        """Do the work; whatever it raises ends the run in good order."""
        try:
            await work
        except Cancelled:
            pass
        except FatalError as stop:
            self.cancel_token.cancel(stop)
        except OSError as error:
            self.cancel_token.cancel(FatalError(EXIT_STOPPED, f"the disk refuses: {error}"))
        except Exception as error:
            log.exception("unexpected")
            words = f"unexpected {type(error).__name__}: {error} (a bug; the log has the details)"
            self.cancel_token.cancel(FatalError(EXIT_STOPPED, words))
        if group_merge:
            await self._note_interrupted(group_merge)

    async def _note_interrupted(self, group_merge: GroupMerge) -> None:
        why = PairError("interrupted", "stopped before it was finished; run again")
        pairs = [pair for pair in group_merge.pairs if pair.state in self.UNDER_WAY and pair.ids not in self.outcomes]
        with contextlib.suppress(FatalError, OSError):
            await together(*(self.record_outcome(group_merge, pair, why) for pair in pairs))

    def _any_group_merge(self) -> Awaitable[Any]:
        return asyncio.wait(set(self._group_merges), return_when=asyncio.FIRST_COMPLETED)

    async def _all_group_merges(self) -> None:
        while self._group_merges:
            await self.cancel_token.wait(self._any_group_merge())

    # -- what walks ask and tell --------------------------------------------------------------------

    def raise_if_draining(self) -> None:
        """Raises Interrupted where nothing more is to be begun."""
        if self.draining or self.cancel_token.stop:
            raise Cancelled()

    @contextlib.asynccontextmanager
    async def exclusive_first_merge(self) -> AsyncIterator[None]:
        """The first merge of a run goes alone until DevRev has acknowledged it: it shows whether the token may."""
        if self._acknowledged:
            yield
            return
        async with self._first_merge_lock:
            self.raise_if_draining()
            yield

    def drop(self, group: Group, pairs: Sequence[Dropped]) -> None:
        """Take pairs out of a group; nothing is requested for them, and the others go on."""
        group.dropped += tuple(pairs)
        for one in pairs:
            self.dropped[one.pair.ids] = one
            self.outcomes[one.pair.ids] = one.pair
            log.info("%s: skipped %s: %s", group.email, one.code, one.reason)

    def note_acknowledged(self) -> None:
        self._acknowledged = self.changed = True
        self._failures_in_a_row = 0

    def expect_no_verification(self, group_merge: GroupMerge) -> None:
        """A walk won't be at its proof soon, or is there: where it was the last, proofs wait for nobody."""
        self._expected_verifications.discard(group_merge)
        if not self._expected_verifications and not self.cancel_token.stop:
            asyncio.get_event_loop().call_later(BatchLoader.LINGER, self.api.dispatch)

    async def record_outcome(self, group_merge: GroupMerge, pair: Pair, problem: Optional[PairError] = None) -> None:
        """A pair has ended, is refused, or can't be taken further in this run."""
        if problem:
            pair.state = State.FAILED if pair.state is State.PLANNED else pair.state
            pair.code, pair.error = problem.code, str(problem)
        if pair.requested_at:
            pair.seconds = max(0.0, self.environment.now().wall - pair.requested_at)
        event = ""
        if pair.state in ENDED:
            pair.report, event = "", StateWriter.EVENTS[pair.state]
        await self.state_writer.save(pair, event)
        self._note_outcome(group_merge, pair, problem)

    def _note_outcome(self, group_merge: GroupMerge, pair: Pair, problem: Optional[PairError]) -> None:
        self.outcomes[pair.ids] = pair
        self.on_pair(pair)
        if not problem:
            self._failures_in_a_row = 0
        elif not group_merge.resumed and pair.state is not State.PROVING and problem.code not in NOT_SYSTEMIC:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self.MAX_FAILURES_IN_A_ROW and not self.draining:
                self.draining = FatalError(
                    EXIT_STOPPED, f"{self._failures_in_a_row} failures in a row, the last: {problem}"
                )
                self.api.scheduler.cancel_waiting(PREPARE)

    # -- the end ------------------------------------------------------------------------------------

    @property
    def stop(self) -> Optional[FatalError]:
        return self.cancel_token.stop or self.draining

    def count(self, *states: State) -> int:
        """Pairs that have come to rest in these states."""
        return sum(pair.state in states for pair in self.outcomes.values())

    def is_success(self, pair: Pair) -> bool:
        return pair.state in (State.DONE, State.SETTLED) or pair.ids in self.dropped

    def pairs(self) -> Iterator[Pair]:
        """Pairs that have come to rest or are on their way."""
        yield from self.outcomes.values()
        for group_merge in self._group_merges.values():
            yield from (pair for pair in group_merge.pairs if pair.ids not in self.outcomes)

    def _exit_code(self) -> int:
        stop = self.stop
        if isinstance(stop, PermissionDenied) and self.changed:
            return EXIT_STOPPED
        if stop and (self.cancel_token.stop or len(self.outcomes) < self.total):
            return stop.exit_code
        if len(self.outcomes) < self.total:
            self.draining = FatalError(EXIT_STOPPED, "pairs were left without a word (a bug; run again)")
            return EXIT_STOPPED
        return EXIT_OK if all(map(self.is_success, self.outcomes.values())) else EXIT_FAILED


def consume(items: List[T]) -> Iterator[T]:
    """Yield the items in order and forget them, so that memory does not grow with what is done."""
    items.reverse()
    while items:
        yield items.pop()


def check_organisation(organisation: str, origin: str, pairs: Iterable[Pair]) -> None:
    """Refuse pairs of another organisation than the token's. Raises Stop(2)."""
    for pair in pairs:
        for contact in (pair.primary, pair.duplicate):
            if contact.organisation and contact.organisation != organisation:
                raise FatalError(
                    EXIT_USAGE,
                    f"the {origin} is of another organisation than the token: {contact.short_id} belongs to "
                    f"{contact.organisation}, the token to {organisation or 'an unknown one'}",
                )


# ---------------------------------------------------------------------------------------------------
# Export: the CSV from DevRev itself
# ---------------------------------------------------------------------------------------------------


class ContactExporter:
    """Reads from DevRev what the CSV holds: all contacts, page by page, and the works of those whose email recurs.

    An email recurs under the looser comparison, so that look-alikes are in the export. Deleted and merged contacts are
    left out.

    `endings` are those of the wanted emails, such as `@example.com`. Contacts wait in `spool`, a file, until all are
    read and it is known which emails recur: only these are ever held in memory.
    """

    WAVE = 4 * PAGE  # contacts whose works are counted together

    def __init__(self, api: DevRevAPI, endings: Sequence[str], spool: BinaryIO) -> None:
        self.api = api
        self.endings = tuple(endings) or ("",)
        self.spool = spool
        self.read = self.counted = 0
        self.rows: List[Contact] = []

    async def run(self) -> List[Contact]:
        """All rows, ordered by email. Raises what a list call does, and OSError where the spool's disk refuses."""
        self.rows = self._recurring(await self._list())
        log.info("%s read, %s with an email that recurs", plural(self.read, "contact"), len(self.rows))
        for start in range(0, len(self.rows), self.WAVE):
            await together(*map(self._count, self.rows[start : start + self.WAVE]))
        return self.rows

    async def _list(self) -> "array[int]":
        """Spool every contact that takes part; returns the hashes of their emails, in the same order."""
        keys = array("q")
        async for page in self.api.each_page("rev-users.list", "rev_users", {}):
            for contact in map(contact_of, (user for user in page.items if not is_gone(user))):
                if (contact.is_user or contact.is_system) and contact.key and contact.key.endswith(self.endings):
                    keys.append(hash(loose_key(contact.email)))
                    self.spool.write(to_json(astuple(contact)) + b"\n")
            self.read += len(page.items)
        return keys

    def _recurring(self, keys: "array[int]") -> List[Contact]:
        self.spool.seek(0)
        wanted = compress(self.spool, map(repeated(keys).__contains__, keys))
        # A contact that is changed while the list is read may stand in it twice.
        contacts = {contact.id: contact for contact in (Contact(*json.loads(line)) for line in wanted)}
        times = collections.Counter(loose_key(contact.email) for contact in contacts.values())
        rows = [contact for contact in contacts.values() if times[loose_key(contact.email)] > 1]
        return sorted(rows, key=lambda contact: (contact.key, contact.id))

    async def _count(self, contact: Contact) -> None:
        """TICKET_COUNT, as the README's query has it: the greatest of owned, created and reported works."""

        listings = await together(*(self.api.objects[name].load(contact.id) for name in ROLES.values()))
        contact.tickets = max(len(listing.items) for listing in listings)
        self.counted += 1

    def progress(self) -> str:
        """How far it is, what it has cost, and what it waits for."""
        counted = f"tickets of {self.counted:,} of {len(self.rows):,} counted" if self.rows else ""
        requests = plural(sum(self.api.requests.values()), "request")
        return ", ".join(
            filter(
                None, [f"{plural(self.read, 'contact')} read", counted, requests, self.api.scheduler.describe_wait()]
            )
        )


def guard_cell(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula; `cell_text` reads it back."""
    return f"'{cell}" if re.match(r"'*[=+\-@\t\r]", cell) else cell


def csv_chunks(contacts: Iterable[Contact]) -> Iterator[bytes]:
    """A CSV of contacts, line by line, with a byte order mark, so that a spreadsheet shows it right."""
    yield ("\ufeff" + csv_line(*COLUMNS.values()) + "\n").encode("utf-8")
    for contact in contacts:
        cells = (guard_cell(str(getattr(contact, name))) for name in COLUMNS)
        yield (csv_line(*cells) + "\n").encode("utf-8", "backslashreplace")


def is_taken(path: Path) -> bool:
    """Whether a file must not be written because its name is taken; an empty file is what a killed export leaves."""
    return os.path.lexists(str(path)) and not (path.is_file() and not path.is_symlink() and path.stat().st_size == 0)


def write_new_file(environment: Environment, path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file aside and give it its name in one step that fails where the name is taken.

    A file system without hard links knows no such step: there the name is taken first, by an empty file. Raises
    FileExistsError where another file has the name, OSError where the disk fails; then nothing is left.
    """
    aside = path.with_name(f".{path.name[:80]}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        environment.create_file(aside, chunks)
        if is_taken(path):
            raise FileExistsError(str(path))
        if not os.path.lexists(str(path)):
            try:
                os.link(str(aside), str(path))
                aside.unlink()
                environment.fsync_dir(path.parent)
                return
            except FileExistsError:
                raise
            except (OSError, AttributeError, NotImplementedError):
                path.touch(mode=0o600, exist_ok=False)
        environment.rename_into_place(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


# ---------------------------------------------------------------------------------------------------
# Undo: what is to be taken back
# ---------------------------------------------------------------------------------------------------


@dataclass
class UndoPlan:
    """What an undo would take back: whole groups, those that an earlier one has begun first."""

    groups: List[Group] = field(default_factory=list)
    pairs: List[Pair] = field(default_factory=list)  # of these groups, but for those in `undone`
    undone: List[Pair] = field(default_factory=list)  # by an earlier undo
    left: int = 0  # pairs that --limit leaves


def plan_undo(path: Path, savepoint: SavePoint, emails: Collection[str], limit: Optional[int]) -> UndoPlan:
    """The pairs that `path` holds, as the savepoint knows them, else as `path` tells. Raises Stop(2)."""
    groups: Dict[str, Group] = {}
    for describe_pair in merged_pairs(path):
        pair = savepoint.states(describe_pair.primary.id).get(describe_pair.duplicate.id, describe_pair)
        if pair.state is State.MERGED_ELSEWHERE:
            continue  # by somebody else
        if pair.state in (State.PLANNED, State.FAILED):
            if not describe_pair.report:
                continue  # backed up, and never asked for
            pair = describe_pair
        if pair is describe_pair:
            pair.report = pair.report or path.name  # so that no other report calls it new
        if not Path(pair.backup).is_dir():
            pair.backup = describe_pair.backup
        if not emails or pair.email in emails:
            groups.setdefault(pair.primary.id, Group(pair.email, [])).pairs.append(pair)
    for primary, group in groups.items():
        named = {pair.ids for pair in group.pairs}
        siblings = (pair for ids, pair in savepoint.states(primary).items() if ids not in {one for _, one in named})
        group.pairs += [pair for pair in siblings if pair.state in UNDOABLE]
    unknown = sorted(set(emails) - {group.email for group in groups.values()})
    if unknown:
        raise FatalError(EXIT_USAGE, f"--email: in no merge of {path}: {', '.join(unknown)}")
    plan, room = UndoPlan(), limit or sys.maxsize
    for group in sorted(groups.values(), key=lambda group: (not _undo_is_started(group), group.email)):
        pairs = [pair for pair in group.pairs if pair.state is not State.UNDONE]
        plan.undone += [pair for pair in group.pairs if pair.state is State.UNDONE]
        if pairs and (_undo_is_started(group) or len(pairs) <= room):
            plan.groups.append(group)
            plan.pairs += pairs
            room -= 0 if _undo_is_started(group) else len(pairs)
        else:
            plan.left += len(pairs)
    return plan


UNDOABLE = (*UNFINISHED, State.DONE, State.SETTLED, State.UNDOING)


def _undo_is_started(group: Group) -> bool:
    return any(pair.state is State.UNDOING for pair in group.pairs)


def merged_pairs(path: Path) -> List[Pair]:
    """The pairs of a backup folder, or the successful and unfinished ones of a merge report. Raises Stop(2)."""
    try:
        if path.is_dir():
            primary, *duplicates = (Contact.from_json(entry["csv"]) for entry in read_manifest(str(path))["contacts"])
            return [
                Pair(primary, one, one.external_ref if one.is_user else None, State.DONE, backup=str(path))
                for one in duplicates
            ]
        report = json.loads(path.read_bytes())
        entries = [*report["successful_merges"], *report.get("unfinished_merges", ())]
        return [_reported_pair(path, entry) for entry in entries]
    except PairError as error:
        raise FatalError(EXIT_USAGE, str(error)) from None
    except FileNotFoundError:
        raise FatalError(EXIT_USAGE, f"{path} is not there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FatalError(EXIT_USAGE, f"{path} is neither a backup folder nor a merge report") from None


def _reported_pair(path: Path, entry: Json) -> Pair:
    primary, duplicate = (
        Contact.from_json({**entry[role], "email": entry["email"], "external_ref": entry[role]["old_external_ref"]})
        for role in ("primary", "duplicate")
    )
    backup = Path(str(entry["backup"]))
    if not backup.is_dir():  # named from the folder that holds reports/ and backups/
        backup = path.resolve().parent.parent / backup
    state = State(entry.get("state", "done"))
    return Pair(primary, duplicate, entry["new_external_ref"], state, backup=str(backup), report=path.name)


Role = Tuple[str, str]  # object id, and `owned_by`, `reported_by` or `members`
Objects = Dict[str, Optional[Json]]  # works and conversations as they are now, None for what has been deleted
Changes = Dict[str, Dict[str, List[str]]]  # object id -> role -> the ids of everybody who is to have it
Left = Dict[str, List[Json]]  # old contact id -> `{id, role, why}` of what can't be handed back


@dataclass
class StateBeforeMerge:
    """What the contacts of a group were before their merges, from its backups: by contact id."""

    users: Dict[str, Json] = field(default_factory=dict)  # rev users
    had: Dict[str, Set[Role]] = field(default_factory=dict)


def read_state_before(pairs: Sequence[Pair]) -> StateBeforeMerge:
    """Read and check the backups of one primary's pairs. Raises PairError(backup_failed)."""
    before = StateBeforeMerge()
    primary = pairs[0].primary.id
    manifests = [(verify_backup(Path(folder)), Path(folder)) for folder in {pair.backup for pair in pairs}]
    for manifest, folder in sorted(manifests, key=lambda one: str(one[0]["created"])):
        entries = {entry["csv"]["id"]: entry for entry in manifest["contacts"]}
        # What the primary has by then from a duplicate that has gone is not its own.
        gone = [before.had.get(pair.duplicate.id, set()) for pair in pairs if pair.duplicate.id not in entries]
        for identity, entry in entries.items():
            user = json.loads((folder / entry["folder"] / "contact.json").read_bytes())
            had = {(item["id"], item["role"]) for item in transferred_objects(entry)}
            if identity == primary:
                before.users.setdefault(identity, user)
                before.had.setdefault(identity, set()).update(had.difference(*gone))
            else:
                before.users[identity], before.had[identity] = user, had
    for pair in pairs:
        if not {primary, pair.duplicate.id} <= before.users.keys():
            raise PairError("backup_failed", f"the backup {pair.backup} does not hold {pair.duplicate.short_id}")
    return before


def plan_restore(
    objects: Objects, had: Mapping[str, Set[Role]], primary: str, recreated: Mapping[str, str], stays: Set[Role]
) -> Tuple[Changes, Left]:
    """What has to be written to these things so that the contacts that were `made` again (old id -> new id) have what
    they `had`, and what belongs to others by now.

    A new contact takes the primary's place, or joins it where that `stays`; nobody else is moved.
    """
    changes: Changes = collections.defaultdict(dict)
    left: Left = {old: [] for old in recreated}
    for identity, role in sorted(set().union(*(had[old] for old in recreated))):
        if identity not in objects:
            continue
        obj = objects[identity]
        now = [person["id"] for person in (obj or {}).get(role) or ()]
        people = [
            recreated.get(one, one) for one in now
        ]  # a merge may have left the old id, and lists may lag behind one
        missing = {old: new for old, new in recreated.items() if (identity, role) in had[old] and new not in people}
        if missing and primary in people:
            at = people.index(primary)
            kept = [primary] if (identity, role) in stays else []
            people[at : at + 1] = [*kept, *dict.fromkeys(missing.values())]
        else:
            why = "deleted" if obj is None else "given to others"
            for old in missing:
                left[old].append({"id": identity, "role": role, "why": why})
        if people != now:
            changes[identity][role] = people
    return changes, left


# ---------------------------------------------------------------------------------------------------
# Undo: the walk of one group
# ---------------------------------------------------------------------------------------------------


class GroupUndo(GroupMerge):
    """One group on its way back: look, the primary's old reference, the contacts again, what they had, proof, undone.

    `Pair.details["undo"]` says how far a pair is: `path` of the --undo, state `before` it, whether its reference was
    `moved` to the primary; `asked` once the contact was asked for, `left_out` with the fields that DevRev refused of
    it; `contact` and `display_id` once it is made; `left` with what was not handed back.
    """

    merger: "UndoRunner"
    KEEP = 8  # units for what follows the primary's old reference: the contact, some times with less, or the way back
    FIELDS = ("display_name", "email", "external_ref", "description", "phone_numbers", "display_picture", "rev_org")

    def __init__(self, merger: "UndoRunner", group: Group) -> None:
        super().__init__(merger, group, [pair for pair in group.pairs if pair.state is not State.UNDONE])
        self.restorer = ObjectRestorer(self)
        self.before = StateBeforeMerge()
        self.moved: Optional[Pair] = None  # whose reference the primary has
        self._lost: Set[Tuple[str, str]] = set()  # pairs of whose contact no answer tells whether it was made
        self._why = ""

    async def run(self) -> None:
        try:
            self.merger.raise_if_draining()
            self.before = await self.environment.run_in_thread(read_state_before, self.group.pairs)
            await self._check_group()
            if self.merger.preview:
                await self._preview()
                return
            await self._check_write_access()
            await self._begin()
            await self._recreate_contacts()
            await self.restorer.restore_all()
        except PairError as problem:
            for pair in self.in_progress():
                await self.merger.record_outcome(self, pair, problem)
        finally:
            self.api.scheduler.release(self.reservation)

    def in_progress(self) -> List[Pair]:
        return [pair for pair in self.pairs if pair.ids not in self.merger.outcomes]

    async def save(self, pair: Pair, event: str = "undo begun") -> None:
        await self.merger.state_writer.save(pair, event)

    def _request_options(self, pair: Pair, priority: int = FINISH) -> RequestOptions:  # noqa: ARG002
        return RequestOptions(priority, self.reservation, self.KEEP)

    def _old_ref(self, contact: Contact) -> str:
        return str(self.before.users[contact.id].get("external_ref"))

    # -- look ---------------------------------------------------------------------------------------

    async def _check_group(self) -> None:
        """Find the group as its merges have left it, or as an undo has that was not finished."""
        contact = self.group.primary
        primary = await self.api.contact(contact.id)
        statuses = await together(*(self.api.poll_duplicate(*pair.ids, ANY_OPTIONS) for pair in self.pairs))
        if primary is None:
            raise PairError("not_found", f"the primary {contact.short_id} is not in DevRev any more")
        if primary.get("state") != "active":
            raise PairError("not_active", f"the primary {contact.short_id} is {primary.get('state')}, not active")
        there = [
            pair.duplicate.short_id for pair, status_ in zip(self.pairs, statuses) if status_ is DuplicateStatus.THERE
        ]
        if there:
            raise PairError("not_merged", f"still there, so not merged, or not yet: {', '.join(there)}")
        reference = primary.get("external_ref")
        known = (pair for pair in self.pairs if pair.updated)  # to the savepoint
        had_moved = any(pair.new_ref and pair.state in (State.PROVING, State.DONE) for pair in known)
        if reference == self._old_ref(contact) and had_moved and not _undo_is_started(self.group):
            words = f"{contact.short_id} has got its old reference {reference} back from somebody"
            raise PairError("external_ref_changed", words)
        moved = (pair for pair in self.pairs if self._old_ref(pair.duplicate) == reference)
        self.moved = None if reference == self._old_ref(contact) else next(moved, None)
        if reference != self._old_ref(contact) and self.moved is None:
            words = f"{contact.short_id} has got the reference {reference or 'none'} from somebody"
            raise PairError("external_ref_changed", words)

    async def _preview(self) -> None:
        """Say what would be handed back."""
        _, left = self.restorer.plan((await self.restorer.read(self._as_if()))[0], self._as_if())
        for pair in self.pairs:
            pair.details.setdefault("undo", {})["left"] = left[pair.duplicate.id]
            await self.merger.record_outcome(self, pair)

    async def _check_write_access(self) -> None:
        """Set nothing on an object of each kind: a token that may not is told so while all is as it was."""
        if len(self.merger.writable_kinds) == 3:
            return
        objects, _ = await self.restorer.read(self._as_if())
        for identity in self.restorer.plan(objects, self._as_if())[0]:
            kind = identity.rpartition(":")[2].partition("/")[0]  # ticket, issue, conversation
            if kind in self.merger.writable_kinds:
                continue
            try:
                await self.api.set_people(objects[identity] or {}, {}, ANY_OPTIONS)
            except ApiError as api_error:
                if api_error.status == 403:
                    raise PermissionDenied(EXIT_USAGE, f"the token may not hand back {identity}: {api_error}") from None
            self.merger.writable_kinds.add(kind)

    def _as_if(self) -> Dict[str, str]:
        """The contacts as if all were made again; where they are not, the old id stands for the new one."""
        return {**{pair.duplicate.id: pair.duplicate.id for pair in self.pairs}, **self.recreated()}

    async def _begin(self) -> None:
        self.merger.raise_if_draining()
        for pair in self.pairs:
            if pair.state is not State.UNDOING:
                pair.details["undo"] = {"path": str(self.merger.path), "before": pair.state.value, "moved": False}
            pair.details["undo"]["moved"] |= pair is self.moved
            pair.details["undo"].setdefault("left_out", {})
            pair.state, pair.code, pair.error = State.UNDOING, "", ""
            await self.save(pair)

    # -- references and contacts --------------------------------------------------------------------

    async def _recreate_contacts(self) -> None:
        """Give the primary its old reference, and make the contacts again: first the one whose reference that frees."""
        if self.moved:
            await self._free_reference(self.moved)
        for pair in sorted(self.pairs, key=lambda pair: not pair.details["undo"]["moved"]):
            try:
                await self._recreate(pair)
            except PairError as problem:
                back = problem.code != "contact_not_confirmed" and not self.recreated()
                if back:
                    await self._restore_reference(problem)
                for one in self.in_progress() if back else [pair]:
                    await self.merger.record_outcome(self, one, problem)
                if problem.code == "forbidden":
                    raise PermissionDenied(EXIT_USAGE, str(problem)) from None
                if back:
                    return
            self.api.scheduler.release(self.reservation)

    def recreated(self) -> Dict[str, str]:
        """Old id -> new id of the contacts that are there again."""
        undos = ((pair, pair.details.get("undo", {})) for pair in self.group.pairs)
        return {pair.duplicate.id: undo["contact"] for pair, undo in undos if "contact" in undo}

    async def _free_reference(self, moved: Pair) -> None:
        """Set the primary's old reference, once there is quota for what has to follow; an error says little of it."""
        primary, old = self.group.primary, self._old_ref(self.group.primary)
        try:
            await self.api.set_external_ref(primary.id, old, self._request_options(moved, MERGE), telling=True)
        except PairError:
            self.merger.changed = True
            live = await self.api.contact(primary.id, self._request_options(moved)) or {}
            if live.get("external_ref") == self._old_ref(moved.duplicate):
                await self._restore_states()
            if live.get("external_ref") != old:
                raise
        except PermissionDenied:
            await self._restore_states()
            raise
        self.merger.changed = True

    async def _recreate(self, pair: Pair) -> None:
        """Make the contact again, with what DevRev takes of it; once, whatever becomes of the answers."""
        undo = pair.details["undo"]
        begun, pause, before = self.environment.now(), 0.2, "asked" in undo
        for twin in (one.details["undo"] for one in self.pairs if self._is_twin(pair, one)):
            undo.update(contact=twin["contact"], display_id=twin["display_id"])
            await self.save(pair)
        while "contact" not in undo:
            fields = self._fields(pair)
            user = await self._find_recreated(pair, fields) if "asked" in undo else None
            if user is None and ("external_ref" in fields or pair.ids not in self._lost):
                user = await self._create(pair, fields)
                if user is None and "asked" in undo:
                    user = await self._find_recreated(pair, fields)
            lost, vital = pair.ids in self._lost, self._is_vital(pair, "external_ref")
            if user:
                undo.update(contact=user["id"], display_id=str(user.get("display_id")))
                await self.save(pair)
            elif "asked" not in undo:
                continue  # a field is left out
            elif self.environment.elapsed(begun) < self._patience(before or lost, vital):
                await self.merger.cancel_token.sleep(pause)
                pause = min(10.0, 1.6 * pause)
            elif vital:
                raise PairError("contact_refused", f"{pair.duplicate.short_id} could not be made again: {self._why}")
            elif lost:
                words = f"it is not known whether {pair.duplicate.short_id} was made again"
                raise PairError("contact_not_confirmed", words)
            else:
                undo["left_out"]["external_ref"] = self._why
                del undo["asked"]

    def _is_twin(self, pair: Pair, other: Pair) -> bool:
        """Whether another contact of the group, there again, had the same reference: the application had made it anew
        after the merge, so the two are one."""
        same = self._old_ref(pair.duplicate) == self._old_ref(other.duplicate)
        return (
            same and other is not pair and "contact" in other.details["undo"] and self._is_vital(pair, "external_ref")
        )

    def _patience(self, perhaps: bool, vital: bool) -> float:
        """Seconds in which a contact that may have been made is looked for; the longer where it `perhaps` was, and is
        missed by nobody meanwhile, for lists may lag behind."""
        timeout = self.merger.merge_timeout
        return timeout if perhaps and not vital else min(10.0, timeout / 4)

    def _fields(self, pair: Pair) -> Json:
        """What the contact is made with."""
        user = self.before.users[pair.duplicate.id]
        picture = user.get("display_picture")
        known = {
            **user,
            "display_picture": picture.get("id") if isinstance(picture, dict) else None,
            "rev_org": rev_org_id(user),
        }
        left_out = pair.details["undo"]["left_out"]
        return {name: known[name] for name in self.FIELDS if known.get(name) and name not in left_out}

    def _is_vital(self, pair: Pair, name: str) -> bool:
        """Without its `user_` reference a contact is not the one that the application knows."""
        return name == "external_ref" and self._old_ref(pair.duplicate).startswith(Contact.user_prefix)

    async def _create(self, pair: Pair, fields: Json) -> Optional[Json]:
        """Ask for the contact; None where it may or may not be there now, or a field of it was refused."""
        undo, named = pair.details["undo"], "external_ref" in fields
        undo["asked"] = (
            [] if named else sorted(self._ids().union(user["id"] for user in await self._contacts_of_email(pair)))
        )
        await self.save(pair)
        self.merger.changed = True
        try:
            return await self.api.create_contact(fields, self._request_options(pair))
        except NoUsableResponse as error:
            self._lost.add(pair.ids)
            self._why = str(error)
        except ApiError as api_error:
            self._why = str(api_error)
            name = re.split(r"\W", str(api_error.data.get("field_name")))[0]
            if api_error.status == 400 and name in fields and not self._is_vital(pair, name):
                undo["left_out"][name] = str(api_error)
                del undo["asked"]
            elif api_error.status != 409 or not named:
                code = "forbidden" if api_error.status == 403 else "contact_refused"
                raise PairError(code, f"{pair.duplicate.short_id} could not be made again: {api_error}") from None
        return None

    async def _find_recreated(self, pair: Pair, fields: Json) -> Optional[Json]:
        """The contact that was asked for, where it was made. PairError where its reference is somebody else's."""
        if "external_ref" not in fields:
            known = pair.details["undo"]["asked"]
            return next((user for user in await self._contacts_of_email(pair) if user["id"] not in known), None)
        for user in await self.api.holders_of(fields["external_ref"], self._request_options(pair)):
            elsewhere = "rev_org" in fields and rev_org_id(user) not in (None, fields["rev_org"])
            if user["id"] in self._ids() or elsewhere:
                continue
            if await self.api.contact(user["id"], self._request_options(pair)) is None:
                continue  # lists lag behind whoever has gone
            if email_of(user) != email_key(fields.get("email", "")):
                words = (
                    f"the reference {fields['external_ref']} is held by {user.get('display_id')}, who is somebody else"
                )
                raise PairError("external_ref_conflict", words)
            return user
        return None

    async def _contacts_of_email(self, pair: Pair) -> List[Json]:
        body = {"email": [pair.duplicate.email.strip()]}
        return (await self.api.pages("rev-users.list", "rev_users", body, self._request_options(pair))).items

    def _ids(self) -> Set[str]:
        """The group, as it was and as far as it is made again."""
        return {contact.id for contact in self.group.all_contacts()}.union(self.recreated().values())

    async def _restore_reference(self, problem: PairError) -> None:
        """No contact can be made: the reference goes to the primary again, and the group is as it was."""
        for pair in self.pairs:
            reference = self._old_ref(pair.duplicate)
            if pair.details["undo"]["moved"] and not await set_reference(
                self.api, pair, reference, self._request_options(pair)
            ):
                raise PairError(problem.code, f"{problem}; {reference} is held by somebody by now, and stays there")
        await self._restore_states()

    async def _restore_states(self) -> None:
        for pair in self.pairs:
            pair.state = State(pair.details.pop("undo")["before"])
            await self.save(pair, StateWriter.EVENTS.get(pair.state, "merged"))


class ObjectRestorer:
    """Gives a group's works and conversations back: in each as it is now, the primary makes room for whom it was."""

    SOON = 3.0  # seconds for which a list is believed where everybody it does not show would be thrown out
    TRIES = 5  # times that an object is read anew before it is given up

    def __init__(self, group_merge: "GroupUndo") -> None:
        self.group_merge = group_merge

    async def restore_all(self) -> None:
        """Write what has to change until the lists show nothing more to change, which is the proof."""
        recreated = {
            pair.duplicate.id: self.group_merge.recreated()[pair.duplicate.id]
            for pair in self.group_merge.in_progress()
        }
        handled: Dict[str, str] = {}  # object id -> what DevRev has said to it, `""` where it was accepted
        waiting_since, pause = self.group_merge.environment.now(), 0.5
        while True:
            objects, since = await self.read(recreated)
            changes, left = self.plan(objects, recreated)
            if all(handled.get(one) for one in changes):
                break
            fresh = {one: roles for one, roles in changes.items() if one not in handled}
            if fresh:
                await self._write(fresh, objects, since, recreated, handled)
                waiting_since = self.group_merge.environment.now()
            elif self.group_merge.environment.elapsed(waiting_since) > self.group_merge.merger.merge_timeout:
                break
            else:
                await self.group_merge.merger.cancel_token.sleep(pause)
                pause = min(20.0, 1.5 * pause)
        for pair in self.group_merge.in_progress():
            try:
                await self._end(pair, changes, handled, left[pair.duplicate.id])
            except PairError as problem:
                await self.group_merge.merger.record_outcome(self.group_merge, pair, problem)
            else:
                await self.group_merge.merger.record_outcome(self.group_merge, pair)

    def plan(self, objects: Objects, recreated: Mapping[str, str]) -> Tuple[Changes, Left]:
        """`hand_back`: the primary stays where it, or a duplicate that is not back, had the role itself."""
        primary, had = self.group_merge.group.primary.id, self.group_merge.before.had
        missing = (one.duplicate.id for one in self.group_merge.group.pairs if one.state is not State.UNDONE)
        stays = had[primary].union(*(had[old] for old in missing if old not in recreated))
        return plan_restore(objects, had, primary, recreated, stays)

    async def read(self, recreated: Mapping[str, str]) -> Tuple[Objects, Timestamp]:
        """The works and conversations of the contacts that were `made` again (old id -> new id), and since when they
        are so. Only what no list shows is asked for by itself."""
        wanted = set().union(*(self.group_merge.before.had[old] for old in recreated))
        batch_loaders = self.group_merge.api.objects
        people = sorted({self.group_merge.group.primary.id, *recreated.values()} - recreated.keys())
        weight = sum(contact.tickets for contact in self.group_merge.group.all_contacts())
        since = [self.group_merge.environment.now()]
        listings = await together(
            *(
                batch_loaders[role].load(one, weight, VERIFY)
                for role in sorted({role for _, role in wanted})
                for one in people
            )
        )
        objects: Objects = {item["id"]: item for listing in listings for item in listing.items}
        unlisted = sorted({identity for identity, _ in wanted} - objects.keys())
        objects.update(
            zip(
                unlisted,
                await together(*(self.group_merge.api.get_object(one, RequestOptions(VERIFY)) for one in unlisted)),
            )
        )
        return objects, oldest(chain(since, (listing.since for listing in listings)))

    async def _write(
        self,
        changes: Changes,
        objects: Objects,
        since: Timestamp,
        recreated: Mapping[str, str],
        handled: Dict[str, str],
    ) -> None:
        """Hand objects back, a few at a time, and note what DevRev says to each."""

        async def write() -> None:
            while changes:
                identity, roles = changes.popitem()
                try:
                    async with self.group_merge.merger.turn_to_write[identity]:  # for groups may share an object
                        handled[identity] = await self._write_one(identity, roles, objects[identity], since, recreated)
                except ApiError as api_error:
                    handled[identity] = str(api_error)
                except BaseException:
                    changes.clear()
                    raise

        await together(*(write() for _ in range(self.group_merge.api.settings.workers)))

    async def _write_one(
        self,
        identity: str,
        roles: Dict[str, List[str]],
        obj: Optional[Json],
        since: Timestamp,
        recreated: Mapping[str, str],
    ) -> str:
        """Replace an object's people; where the lists may not know who has joined by now, or what this undo has written
        to it, it is read by itself first. Returns why it was not done, `""` if it was."""
        environment, written, limit = self.group_merge.environment, self.group_merge.merger.written, self.SOON

        async def is_fresh() -> None:
            if environment.age(since) > limit:
                raise PreconditionsExpired()

        for _ in range(self.TRIES):
            if identity in written or environment.age(since) > limit:
                since, limit = environment.now(), Preconditions.FRESH
                obj = await self.group_merge.api.get_object(identity, RequestOptions(RESUME))
                roles = self.plan({identity: obj}, recreated)[0].get(identity, {})
            if obj is None or not roles:
                return ""
            with contextlib.suppress(PreconditionsExpired):
                await self.group_merge.api.set_people(obj, roles, RequestOptions(RESUME), is_fresh)
                written.add(identity)
                return ""
        return "what was read of it becomes too old before it can be written; the quota is too small"

    async def _end(self, pair: Pair, changes: Changes, handled: Mapping[str, str], left: List[Json]) -> None:
        pair.details["undo"]["left"] = left
        mine = (
            one for one in sorted(self.group_merge.before.had[pair.duplicate.id]) if one[1] in changes.get(one[0], {})
        )
        open_items = ({"id": one, "role": role, "why": handled[one] or "not shown yet"} for one, role in mine)
        pair.left_behind = describe(pair.backup, open_items)
        if pair.left_behind:
            names = ", ".join(dict.fromkeys(item["display_id"] for item in pair.left_behind))
            raise PairError("not_handed_back", f"made again, but not handed back: {names}")
        pair.state, pair.code, pair.error = State.UNDONE, "", ""
        await self.group_merge.save(pair, "undone")


# ---------------------------------------------------------------------------------------------------
# Undo: the run
# ---------------------------------------------------------------------------------------------------


class UndoRunner(ContactMerger):
    """Carries out an undo: one group alone until the first is undone, then many; how it ends is as with merges."""

    UNDER_WAY = (State.UNDOING,)

    def __init__(
        self, api: DevRevAPI, savepoint: SavePoint, journal: Journal, path: Path, preview: bool, **options: Any
    ) -> None:
        super().__init__(api, savepoint, journal, BackupStore(journal.path.parent, api.environment), **options)
        self.path, self.preview = path, preview
        self.writable_kinds: Set[str] = set()  # kinds of objects that may be written
        self.written: Set[str] = set()  # objects
        self.turn_to_write: Dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)  # by object

    async def undo(self, plan: UndoPlan) -> int:
        """Take the plan back and return the exit code; nothing is raised."""
        self.total = len(plan.pairs)
        return await self.drive(self._undo(plan.groups))

    async def _undo(self, groups: List[Group]) -> None:
        for group in groups:
            while len(self._group_merges) >= (self._outstanding() if self.preview or self.count(State.UNDONE) else 1):
                await self.cancel_token.wait(self._any_group_merge())
            self.raise_if_draining()
            self._start(GroupUndo(self, group))
        await self._all_group_merges()

    async def record_outcome(self, group_merge: GroupMerge, pair: Pair, problem: Optional[PairError] = None) -> None:
        """A pair is undone, refused, or can't be taken further in this run; only what has begun is noted for good."""
        pair.code, pair.error = (problem.code, str(problem)) if problem else ("", "")
        if pair.state in self.UNDER_WAY:
            await self.state_writer.save(pair)
        self._note_outcome(group_merge, pair, problem)

    def is_success(self, pair: Pair) -> bool:
        return not pair.code


def undo_entry(pair: Pair) -> Json:
    """What was, or would be, given back of a pair, and what can't be."""
    undo = pair.details.get("undo", {})
    # What the merge has left behind, where it was not proved, says nothing of what can be given back.
    open_items = [item for item in pair.left_behind if "why" in item]
    left = {(item["id"], item["role"]): item for item in (*undo.get("left", ()), *open_items)}
    entry = {
        "email": pair.email,
        "primary": contact_entry(pair.primary),
        "duplicate": contact_entry(pair.duplicate),
        "contact": {"id": undo["contact"], "display_id": undo["display_id"]} if "contact" in undo else None,
        "state": pair.state.value,
        "backup": pair.backup,
        "code": pair.code,
        "error": pair.error,
        "given_back": [],
        "left": describe(pair.backup, left.values()),
        "not_given_back": [],
    }
    with contextlib.suppress(PairError, OSError, ValueError, KeyError, TypeError):
        manifest = read_manifest(pair.backup)
        (mine,) = (one for one in manifest["contacts"] if one["csv"]["id"] == pair.duplicate.id)
        user = json.loads((Path(pair.backup) / mine["folder"] / "contact.json").read_bytes())
        given = [item for item in transferred_objects(mine) if (item["id"], item["role"]) not in left]
        entry["given_back"] = describe(pair.backup, given) if "left" in undo else []
        entry["not_given_back"] = list(_lost_for_good(user, mine, undo.get("left_out", {})))
    return entry


def _lost_for_good(user: Json, entry: Json, left_out: Mapping[str, str]) -> Iterator[Json]:
    """What nobody can give back of a contact: its rev user and its entry in the manifest say what it had."""
    for name, value in user.items():
        if name not in GroupUndo.FIELDS and name != "state":
            yield {"what": name, "value": value, "why": "DevRev does not let it be set"}
    for name, why in left_out.items():
        yield {"what": name, "value": user.get(name), "why": why}
    if entry["works"]["created"]:
        yield {"what": "created_by", "value": entry["works"]["created"], "why": "the primary stays their creator"}
    yield {"what": "authors of comments", "value": None, "why": "DevRev does not let them be set"}


# ---------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------


ADVICE = {
    **dict.fromkeys(
        ("not_found", "email_changed", "external_ref_changed"),
        "the export is stale: export again; of a merged pair: --settle accepts what somebody has changed",
    ),
    "not_active": "look at the contact in DevRev: a locked or deactivated contact is not merged",
    "different_rev_org": "contacts of different rev orgs are not merged: look at them in DevRev",
    "group_changed": "export again, and choose again",
    "several_user_refs": "find out which user_ reference the application uses, export again, name it with --choices",
    "several_external_refs": "check the contact in DevRev: remove the references that it does not need, export again",
    "unverified": "request one such merge with --try-unverified --email to see what DevRev does",
    "shared_mailbox": "leave it as it is; where it is one person after all, export again and decide it with --choices",
    "count_mismatch": "export again, or let a backup with more than the export pass with --count-policy at-least",
    "backup_failed": "look at the named file or ticket, run again",
    "api_error": "run again; if it stays, send the message and the log to DevRev's support",
    "forbidden": "give the token the missing scope (or access to the named object), run again",
    "merge_refused": "look at both contacts in DevRev; run again; --settle gives the merge up",
    "plan_changed": "where it is not to be merged so any more, give it up with --settle",
    "merge_not_confirmed": "DevRev has not carried the merge out yet: run again later, which looks again first",
    "external_ref_conflict": "free the reference from its holder in DevRev, run again: only the reference is set then",
    "external_ref_not_set": "run again; if it stays, set the reference by hand in DevRev",
    "left_behind": "run again later (DevRev may still be moving them), or move them; --settle accepts what stays",
    **dict.fromkeys(("still_listed", "group_incomplete"), "run again later"),
    "merged_into_another": "look at both contacts in DevRev; --settle accepts it",
    "merged_elsewhere": "export again; the reference named in the message has to be looked at by hand",
    "stale": "raise DEVREV_RATE_LIMIT_CALLS, or ask DevRev for a larger quota",
    "undo_unfinished": "finish the undo first",
    "not_merged": "nothing to take back yet; where the merge is unfinished, finish it first",
    "contact_refused": "look at what DevRev has answered, undo again",
    "contact_not_confirmed": "undo again: it looks for the contact first",
    "not_handed_back": "undo again, or hand them over in DevRev",
    "interrupted": "run again with the same savepoint: it is finished first",
}


def contact_entry(contact: Contact, reference: str = "old_external_ref") -> Json:
    return {
        "id": contact.id,
        "display_id": contact.short_id,
        "display_name": contact.name,
        reference: contact.external_ref,
        "tickets": contact.tickets,
        "created": contact.created,
    }


SO_FAR: Mapping[State, str] = {
    State.REQUESTED: "asked for, and not merged yet",
    State.ACKNOWLEDGED: "DevRev has accepted the merge",
    State.MERGED: "merged in DevRev, for good",
    State.PROVING: "merged in DevRev, for good, and its reference is in place",
}


def progress_of(pair: Pair) -> Json:
    """What DevRev has done of an unfinished pair, and what is still to do; nothing of any other."""
    if pair.state not in UNFINISHED:
        return {}
    steps = ["confirm the merge"] if pair.state in REQUESTED_STATES else []
    steps += ["set the reference"] if pair.new_ref and pair.state is not State.PROVING else []
    steps.append("prove that nothing was left behind")
    return {"so_far": SO_FAR[pair.state], "to_do": ", ".join(steps)}


def merge_entry(pair: Pair, planned: Collection[Tuple[str, str]]) -> Json:
    """A pair in one of the report's lists; `in_csv` says whether it is one of this CSV's, `planned`."""
    entry: Json = {
        "email": pair.email,
        "primary": contact_entry(pair.primary),
        "duplicate": contact_entry(pair.duplicate),
        "new_external_ref": None if "reference_not_set" in pair.details else pair.new_ref,
        "backup": pair.backup or None,
        "seconds": round(pair.seconds, 3),
        "finished": None if pair.state in UNFINISHED else pair.updated,
        "state": pair.state.value,
        "in_csv": pair.ids in planned,
        **pair.details,
    }
    if pair.state is not State.DONE:
        entry.update(code=pair.code, error=pair.error, left_behind=pair.left_behind, advice=ADVICE.get(pair.code))
    return {**entry, **progress_of(pair)}


def beside_pairs(plan: Plan) -> Dict[str, Iterable[Json]]:
    """What --choices has decided, each with the references that are lost by it; the skipped groups, each with the lines
    of which --choices may take one; look-alikes, warnings and invalid rows."""

    def choice(group: Group) -> Json:
        lost = [contact_entry(contact, "external_ref") for contact in group.lost_refs()]
        warnings = [words for _, words in group.warnings()]
        return {"email": group.email, "kept": group.chosen, "lost": lost, "warnings": warnings}

    def entry(skipped_group: SkippedGroup) -> Json:
        choices = skipped_group.choice_lines().items()
        return {
            "email": skipped_group.email,
            "code": skipped_group.code,
            "reason": skipped_group.reason(),
            "advice": skip_words(skipped_group.code)[1],
            "contacts": [contact_entry(contact, "external_ref") for contact in skipped_group.contacts],
            "choices": [
                {"line": line, "external_ref": contact.external_ref, "display_id": contact.short_id}
                for line, contact in choices
            ],
        }

    return {
        "choices": [choice(group) for group in plan.chosen],
        "skipped": map(entry, plan.skipped),
        "look_alikes": plan.look_alikes,
        "warnings": plan.warnings,
        "invalid_rows": (row._asdict() for row in plan.invalid_rows),
    }


def report_chunks(head: Json, lists: Mapping[str, Iterable[Json]]) -> Iterator[bytes]:
    """A JSON object of `head` and of lists that are too long to be held in memory."""
    yield to_json(head, indent=1)[:-2]
    for name, items in lists.items():
        yield b",\n %s: [" % to_json(name)
        for index, item in enumerate(items):
            yield (b",\n  " if index else b"\n  ") + to_json(item)
        yield b"\n ]"
    yield b"\n}\n"


def outcome(savepoint: SavePoint) -> Dict[str, Iterator[Pair]]:
    """What a run has come to: the pairs of the report's lists, read from the savepoint anew with each call."""
    elsewhere = State.MERGED_ELSEWHERE
    return {
        # Those of a run that was killed before its report are among them.
        "successful_merges": (pair for pair in savepoint.unreported() if pair.state is not elsewhere),
        "failed_merges": chain(savepoint.failed(), (one for one in savepoint.unreported() if one.state is elsewhere)),
        "unfinished_merges": savepoint.rows(*UNFINISHED),
    }


def summary_of(plan: Plan, savepoint: SavePoint) -> Json:
    """The contract's numbers, of this CSV's pairs; `earlier_runs` counts the other pairs in the lists."""
    counts = {
        name: collections.Counter(pair.ids in plan.ids for pair in pairs) for name, pairs in outcome(savepoint).items()
    }
    mine, others = ({name: count[which] for name, count in counts.items()} for which in (True, False))
    attempted = sum(mine.values())
    return {
        "contacts_read": plan.contacts_read,
        "invalid_rows": len(plan.invalid_rows),
        "pairs_planned": len(plan.ids),
        "already_merged": plan.already_merged,
        "total_merges_attempted": attempted,
        **mine,
        "left": len(plan.ids) - plan.already_merged - attempted,
        "skipped_groups": sum(one.code not in ("already_gone", "already_merged") for one in plan.skipped),
        **({"earlier_runs": others} if any(others.values()) else {}),
    }


def headline(plan: Plan, summary: Json, savepoint: SavePoint) -> str:
    """What a run has come to, in one line: nobody may read "all" where some remain."""
    mine, others = summary["pairs_planned"] - summary["already_merged"], summary.get("earlier_runs", {})
    unfinished, skipped = summary["unfinished_merges"], summary["skipped_groups"]
    gone = sum(pair.ids in plan.ids for pair in savepoint.rows(State.MERGED, State.PROVING))
    verb = "finished" if unfinished else "merged"
    words = [f"{summary['successful_merges']:,} of {plural(mine, 'pair')} {verb}"] if mine else []
    words += ["nothing to merge"] if not (mine or others) else []
    words += [f"{unfinished:,} unfinished ({gone:,} of them merged in DevRev for good)"] if unfinished else []
    counts = {"failed": "failed_merges", "left": "left", "merged before": "already_merged"}
    words += [f"{summary[name]:,} {what}" for what, name in counts.items() if summary[name]]
    words += [f"{plural(skipped, 'group')} skipped"] if skipped else []
    words += [plural(summary["invalid_rows"], "invalid row")] if summary["contacts_read"] else []
    ends = {"successful_merges": "at their end", "unfinished_merges": "unfinished", "failed_merges": "failed"}
    more = [f"{others[name]:,} {what}" for name, what in ends.items() if others.get(name)]
    if more:
        words.append(f"of earlier runs, not in this CSV: {', '.join(more)}")
    return ", ".join(words) or "nothing was done"


def write_report(path: Path, run: Json, plan: Plan, savepoint: SavePoint, environment: Environment) -> None:
    """Write the JSON report, and beside it the page that shows it. Raises OSError where the disk refuses.

    The savepoint knows the report's name before the report has it, so that what has ended stands in exactly one.
    """
    summary = summary_of(plan, savepoint)
    lists: Dict[str, Iterable[Json]] = {
        name: (merge_entry(pair, plan.ids) for pair in pairs) for name, pairs in outcome(savepoint).items()
    }
    environment.make_private_dir(path.parent)
    chunks = report_chunks({"run": run, "summary": summary}, {**lists, **beside_pairs(plan)})
    environment.write_atomically(path, chunks, before=lambda: savepoint.announce_report(path.name))
    savepoint.confirm_report(lambda _name: True)
    write_page(path, "template.html", run["headline"], environment)


def write_page(report: Path, template: str, headline: str, environment: Environment) -> None:
    """Write the page that shows a report, beside it. What stands in the page itself is seen where no script runs."""
    path = Path(__file__).resolve().parent / "reports" / template
    if path.is_file():
        page = path.read_bytes().replace(b"__REPORT_HEADLINE__", headline.encode("ascii"))
        before, _, after = page.partition(b"__REPORT_JSON__")
        with open(report, "rb") as lines:
            environment.write_atomically(report.with_suffix(".html"), chain([before], map(for_script, lines), [after]))


def for_script(text: bytes) -> bytes:
    """Escape JSON so that nothing in it can end the <script> element that holds it."""
    return re.sub(rb"[<>&]|\xe2\x80[\xa8\xa9]", lambda found: rb"\u%04x" % ord(found.group().decode("utf-8")), text)


# ---------------------------------------------------------------------------------------------------
# Estimate
# ---------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    requests: int
    seconds: float

    def __str__(self) -> str:
        return f"about {plural(self.requests, 'request')}, about {duration(self.seconds)}"


def estimate(plan: Plan, settings: ApiSettings, with_timelines: bool) -> Estimate:
    """What a run costs: for each pair a merge and, at the pace of most merges, two looks, for some a reference; ten
    list calls a batch and one a page; one timeline for each ticket, issue and conversation.

    The export has the greatest of three counts, and no conversations: a third more tickets than that and one
    conversation for every other contact are assumed. Seconds are what the requests take under the client's own
    ceiling, or at 0.2 s each over the workers, whichever is more.
    """
    pairs = contacts = tickets = 0
    requests = 4 * sum(pair.state in UNFINISHED for pair in plan.pairs())  # their backups are made
    for group in plan.groups:
        left = [pair for pair in group.pairs if pair.state is State.PLANNED]
        pairs += len(left)
        contacts += len(left) + bool(left)
        tickets += sum(pair.duplicate.tickets for pair in left) + (group.primary.tickets if left else 0)
        requests += sum(3 + bool(pair.new_ref) for pair in left)
    requests += 10 * -(-pairs // ContactMerger.BATCH) + tickets // 20 + bool(pairs)
    if with_timelines:
        requests += tickets * 13 // 10 + contacts // 2
    calls, period = settings.calls, settings.period
    least = seconds_in_windows(requests, calls, period, calls, period) if calls else 0.0
    return Estimate(requests, max(least, requests * 0.2 / settings.workers))


# ---------------------------------------------------------------------------------------------------
# Console
# ---------------------------------------------------------------------------------------------------


class OutputThread:
    """Writes to streams in the order of what it is given; once begun in a thread, so that a terminal that takes
    nothing more holds up nobody.

    What can't be written is dropped; `failure` says why, unless it is that nobody reads it any more.
    """

    PIECE = 1024  # bytes, so that a slow terminal is seen to take some
    BACKLOG = 10_000  # lines, past which what is not a result is dropped

    def __init__(self) -> None:
        self.failure: Optional[OSError] = None
        self.written = 0  # bytes
        self._status: Optional[TextIO] = None  # where a status line is shown
        self._jobs: queue.SimpleQueue[Union[Tuple[TextIO, str, bool], threading.Event]] = queue.SimpleQueue()
        self._begun = False

    def begin(self) -> None:
        self._begun = True
        threading.Thread(target=self._serve, daemon=True).start()

    def backlog(self) -> int:
        return self._jobs.qsize()

    def put(self, stream: TextIO, text: str, status: bool = False) -> None:
        """Take a piece of text; safe in a signal handler too."""
        if self._begun:
            self._jobs.put((stream, text, status))
        else:
            self._write(stream, text, status)

    def consume(self, patience: Callable[[], float]) -> bool:
        """Wait until all is written; False where nothing has been taken for `patience` seconds."""
        done, seen, since = threading.Event(), self.written, time.monotonic()
        self._jobs.put(done)
        while self._begun and not done.wait(0.05):
            if self.written != seen:
                seen, since = self.written, time.monotonic()
            elif time.monotonic() - since > patience():
                return False
        return True

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            if isinstance(job, threading.Event):
                job.set()
            else:
                self._write(*job)

    def _write(self, stream: TextIO, text: str, status: bool) -> None:
        shown, self._status = self._status, stream if status and text else None
        try:
            if shown:
                self._send(shown, "\r\x1b[K")
            self._send(stream, text)
        except BrokenPipeError:
            pass
        except (OSError, ValueError) as error:
            self.failure = self.failure or (error if isinstance(error, OSError) else OSError(str(error)))

    def _send(self, stream: TextIO, text: str) -> None:
        """Write past Python's own buffers: what is stuck in one of them would hold up the exit."""
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if raw is None:
            stream.write(text)
            return
        data = text.replace("\n", os.linesep).encode(stream.encoding or "utf-8", "backslashreplace")
        while data:
            taken = raw.write(data[: self.PIECE]) if stream.isatty() else raw.write(data)
            if not taken:  # somebody has made it a stream that does not block
                time.sleep(0.05)
            self.written += taken or 0
            data = data[taken or 0 :]


class Console:
    """What people see: results on stdout, the rest on stderr; plain where it is piped."""

    COLOURS: Mapping[str, str] = {"good": "32", "bad": "31", "bold": "1"}
    STUCK, STUCK_AFTER_SIGNAL = 10.0, 2.0  # seconds after which a terminal that takes nothing is given up

    def __init__(self, quiet: bool = False, out: Optional[TextIO] = None, err: Optional[TextIO] = None) -> None:
        self.quiet = quiet
        self.out: TextIO = out or sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.err: TextIO = err or sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.mask: Callable[[str], str] = str
        # Where one alone is a terminal, the other has a pen of its own: a frozen terminal holds up no file.
        output = OutputThread()
        self._outputs = {
            self.err: output,
            self.out: output if self.out.isatty() == self.err.isatty() else OutputThread(),
        }

    def begin(self) -> None:
        """From now on write beside the work."""
        for output in set(self._outputs.values()):
            output.begin()

    def end(self, signalled: Callable[[], bool]) -> Optional[OSError]:
        """Wait until all is written, unless a terminal takes nothing more. Returns what kept results from it."""
        for stream, output in self._outputs.items():
            is_terminal = stream.isatty()

            def patience(is_terminal: bool = is_terminal) -> float:
                return self.STUCK_AFTER_SIGNAL if signalled() else self.STUCK if is_terminal else float("inf")

            output.consume(patience)
        return self._outputs[self.out].failure

    @property
    def width(self) -> int:
        return shutil.get_terminal_size((100, 24)).columns if self.out.isatty() else 10_000

    def style_text(self, style: str, text: str, stream: Optional[TextIO] = None) -> str:
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not (stream or self.out).isatty()
        return text if plain or not style else f"\x1b[{self.COLOURS[style]}m{text}\x1b[0m"

    @property
    def arrow(self) -> str:
        """Points from the duplicate to the primary, with what the output can show."""
        return "<-" if "\u2190".encode(self.out.encoding or "ascii", "ignore") == b"" else "\u2190"

    def sanitize(self, text: str) -> str:
        return escape_unprintable(self.mask(text))

    def print(self, text: str = "", style: str = "") -> None:
        """A line of results, wrapped on a terminal; never raises because nobody reads it any more."""
        lines = self.wrap(self.sanitize(text))
        self._outputs[self.out].put(self.out, "".join(self.style_text(style, line) + "\n" for line in lines))

    def wrap(self, text: str) -> List[str]:
        if len(text) <= self.width:
            return [text]
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        return textwrap.wrap(text, self.width, subsequent_indent=indent, break_on_hyphens=False)

    def stream(self, text: str) -> None:
        """A part of long results as it is; waits for what was given before, so that memory does not grow."""
        output = self._outputs[self.out]
        while output.backlog() > 10:
            time.sleep(0.01)
        output.put(self.out, text)

    def json(self, chunks: Iterable[bytes]) -> None:
        """Results as JSON, in ASCII, which nothing on the way to a program spoils."""
        for chunk in chunks:
            self.stream(re.sub(r"[^\x00-\x7e]", lambda c: json.dumps(c.group())[1:-1], chunk.decode("utf-8")))

    def print_err(self, text: str, style: str = "") -> None:
        """A line beside the results."""
        output = self._outputs[self.err]
        if output.backlog() < output.BACKLOG:
            output.put(self.err, self.style_text(style, self.sanitize(text), self.err) + "\n")

    def question_streams(self) -> Tuple[Callable[..., None], Callable[[str], None]]:
        """What says lines, and what puts a question, where somebody is who can answer: not into a file or a pipe."""
        if self.out.isatty():
            return self.print, self.stream
        return self.print_err, lambda text: self._outputs[self.err].put(self.err, text)

    def print_last(self, text: str) -> None:
        """Say a last word, if anybody listens, before the process ends at once."""
        self.print_err(text, "bold")
        self._outputs[self.err].consume(lambda: 0.2)

    def error(self, text: str) -> None:
        log.error("%s", text)
        self.print_err(f"error: {text}", "bad")

    def status(self, text: str) -> None:
        """The one line that is rewritten in place on a terminal; `""` removes it."""
        if not self.quiet and self.err.isatty() and not self._outputs[self.err].backlog():
            room, line = shutil.get_terminal_size((80, 24)).columns - 1, self.sanitize(text)
            if len(line) > room:
                line = re.sub(r"\((\w+) [^)]*\)", r"(\1)", line)  # without details
            self._outputs[self.err].put(self.err, line if len(line) <= room else f"{line[: room - 3]}...", True)


class PlainFormatter(logging.Formatter):
    """One line a record, without the token and without anything that a terminal could act on."""

    def __init__(self, console: Console) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.console = console

    def formatTime(self, record: logging.LogRecord, datefmt: Optional[str] = None) -> str:  # noqa: ARG002
        return iso(record.created)

    def format(self, record: logging.LogRecord) -> str:
        return self.console.sanitize(super().format(record))


class ConsoleHandler(logging.Handler):
    """Shows log records beside the work; errors the console has shown already."""

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.console.print_err(f"warning: {record.getMessage()}")
        elif record.levelno != logging.ERROR:
            self.console.print_err(self.format(record))


# ---------------------------------------------------------------------------------------------------
# Preview
# ---------------------------------------------------------------------------------------------------


def plan_summary(plan: Plan, cost: Estimate, earlier: Sequence[Pair]) -> Json:
    """The plan in numbers; `earlier` are the pairs that are taken over from earlier runs."""
    new = sum(pair.state is State.PLANNED for pair in plan.pairs())
    in_csv = sum(pair.ids in plan.ids for pair in earlier)
    return {
        "plan_id": plan.id,
        "contacts_read": plan.contacts_read,
        "pairs_planned": len(plan.ids),
        "pairs_to_merge": new,
        "pairs_to_finish": len(earlier),
        "already_merged": plan.already_merged + plan.unreported,
        "left": len(plan.ids) - plan.already_merged - plan.unreported - in_csv - new,
        "skipped_groups": len(plan.skipped),
        "look_alikes": len(plan.look_alikes),
        "invalid_rows": len(plan.invalid_rows),
        "other_references": plan.other_refs,
        "other_reference_example": plan.other_ref or None,
        "estimated_requests": cost.requests,
        "estimated_seconds": round(cost.seconds),
    }


def plan_chunks(plan: Plan, facts: Json, earlier: Sequence[Pair]) -> Iterator[bytes]:
    """The plan as JSON, for `--preview --json`."""

    def entry(pair: Pair) -> Json:
        return {
            "email": pair.email,
            "primary": contact_entry(pair.primary, "external_ref"),
            "duplicate": contact_entry(pair.duplicate, "external_ref"),
            "new_external_ref": pair.new_ref,
        }

    lists: Dict[str, Iterable[Json]] = {
        "pairs": (entry(pair) for pair in plan.pairs() if pair.state is State.PLANNED),
        "to_finish": (merge_entry(pair, plan.ids) for pair in earlier),
    }
    return report_chunks({"schema": SCHEMA, "summary": facts}, {**lists, **beside_pairs(plan)})


def show_plan(plan: Plan, facts: Json, console: Console, cost: str, earlier: Sequence[Pair]) -> None:
    """Print what a run would do, so that a person can sign it."""
    if not console.quiet:
        _show_pairs(plan, console)
        blocks = (earlier_lines(earlier), choice_lines(plan), warning_lines(plan), look_alike_lines(plan))
        skips = (skip_lines(plan, code) for code in SKIP_REASONS)
        for lines in chain(blocks, [invalid_lines(plan)], skips):
            print_lines(console, lines)
    counts = [f"{plural(plan.contacts_read, 'contact')} read", plural(len(plan.invalid_rows), "invalid row")]
    counts += [f"{plural(len(plan.look_alikes), 'group')} of look-alikes"] if plan.look_alikes else []
    console.print(", ".join(filter(None, [*counts, plan.others_line()])))
    if facts["already_merged"]:
        console.print(f"{plural(facts['already_merged'], 'pair')} of this export already merged (says the savepoint)")
    if facts["left"]:
        console.print(f"{plural(facts['left'], 'pair')} left for another run (--email, --limit)")
    console.print(cost)
    console.print(f"plan {plan.id}")
    more = f", {len(earlier):,} of earlier runs to finish first" if earlier else ""
    what = f"{plural(facts['pairs_to_merge'], 'pair')} to merge, {plural(len(plan.skipped), 'group')} skipped"
    console.print(what + more, "bold")


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """A block: its first line stands out, an empty one follows."""
    style = "bold"
    for line in lines:
        console.print(line, style)
        style = ""
    if not style:
        console.print()


def names_of(pair: Pair) -> str:
    """Whose contacts they are: one name, or both where they differ."""
    names = {contact.name.casefold(): contact.name for contact in (pair.primary, pair.duplicate)}
    return " / ".join(names.values())


def describe_pair(pair: Pair) -> str:
    becomes = f", which becomes {pair.new_ref}" if pair.new_ref else ""
    return f"{names_of(pair)} <{pair.email}>: {into(pair)}{becomes}"


def earlier_lines(pairs: Sequence[Pair]) -> Iterator[str]:
    """What a run takes over from earlier runs, beside the plan."""
    if pairs:
        yield f"TO FINISH FIRST, from earlier runs: {plural(len(pairs), 'pair')}"
    for words in some([f"{describe_pair(pair)} ({SO_FAR[pair.state]})" for pair in pairs], 20):
        yield f"  {words}"


def choice_lines(plan: Plan) -> Iterator[str]:
    """What the choices come to: which reference stays and which are lost."""
    if plan.chosen:
        yield f"CHOICES: {plural(len(plan.chosen), 'group')}"
    for group in plan.chosen:
        yield f"  {group.email} keeps {group.chosen}"
        for contact in group.lost_refs():
            yield f"    lost: {contact.external_ref} ({describe_contact(contact)}): its account has no contact then"


def warning_lines(plan: Plan) -> Iterator[str]:
    """What a person should check before groups are merged, twenty lines of each kind at most."""
    by_code: Dict[str, List[str]] = collections.defaultdict(list)
    for one in plan.warnings:
        by_code[one["code"]].append(f"{one['email']}: {one['warning']}")
    for code, lines in sorted(by_code.items(), key=lambda item: item[0] != "shared_mailbox"):
        yield f"WARNING {code}: {plural(len(lines), 'group')}"
        if code != "age_undecided":
            yield "  a shared mailbox is not a person: after the merge one would read the others' conversations"
        yield from (f"  {words}" for words in some(lines, 20))


def look_alike_lines(plan: Plan) -> Iterator[str]:
    """Addresses that are probably one, but for how they are written; they are never joined."""
    if plan.look_alikes:
        yield f"LOOK ALIKE, and not joined: {plural(len(plan.look_alikes), 'group')} of addresses; fix them in DevRev"
    for one in plan.look_alikes[:20]:
        places: Dict[str, List[str]] = collections.defaultdict(list)
        for line in one["lines"]:
            places[ascii(line["email"])[1:-1]].append(place_of(line["file"], line["line"], plan.files))
        yield "  " + " and ".join(f"{email} ({', '.join(some(found))})" for email, found in places.items())
    if len(plan.look_alikes) > 20:
        yield f"  and {len(plan.look_alikes) - 20:,} more (--json has them all)"


def describe_contact(contact: Contact) -> str:
    since = f", since {contact.created[:10]}" if contact.created else ""
    return f"{contact.name}, {contact.short_id}, {plural(contact.tickets, 'ticket')}{since}"


def invalid_lines(plan: Plan) -> Iterator[str]:
    """The rows that are left out, grouped by reason; twenty lines of each reason at most."""
    if not plan.invalid_rows:
        return
    hint = looks_like(plan.invalid_rows)
    yield f"LEFT OUT: {plural(len(plan.invalid_rows), 'invalid row')}" + (f"; {hint}" if hint else "")
    by_code: Dict[str, List[InvalidRow]] = collections.defaultdict(list)
    for row in plan.invalid_rows:
        by_code[row.code].append(row)
    for code, rows in sorted(by_code.items(), key=lambda item: -len(item[1])):
        yield f"  {INVALID_ROWS[code]}: {plural(len(rows), 'row')}"
        for row in rows[:20]:
            yield f"    {place_of(row.file, row.line, plan.files)}: {row.reason}" + (
                f" ({row.email})" if row.email else ""
            )
        if len(rows) > 20:
            yield f"    and {len(rows) - 20:,} more (--json has them all)"


def skip_lines(plan: Plan, code: str) -> Iterator[str]:
    """The groups that are skipped for one reason, with the lines of which one would go into a file of choices."""
    skips = [skipped_group for skipped_group in plan.skipped if skipped_group.code == code]
    if not skips:
        return
    yield f"SKIPPED {code}: {plural(len(skips), 'group')}"
    reason, advice = skip_words(code)
    yield f"  why: {reason}"
    yield f"  what to do: {advice}"
    lines: Dict[str, List[str]] = collections.defaultdict(list)
    for row in plan.invalid_rows if code == "invalid_row" else ():
        where = str(row.line) if plan.files == 1 else place_of(row.file, row.line, plan.files)
        lines[email_key(row.email or "")].append(where)
    for skipped_group in skips:
        choices = list(skipped_group.choice_lines().items())
        size = plural(len(skipped_group.contacts), "contact")
        if choices:
            yield f"  {skipped_group.email}, {size}; a line for --choices (EMAIL,EXTERNAL_REF):"
            for line, contact in choices[:6]:
                yield f"    {describe_contact(contact)}"
                yield f"      {line}"
            yield from [f"    and {len(choices) - 6:,} more"] if len(choices) > 6 else []
            continue
        names = some([f"{one.external_ref} ({plural(one.tickets, 'ticket')})" for one in skipped_group.contacts], 6)
        places = some(lines[skipped_group.email], 20) if code == "invalid_row" else []
        word = f"line{'s' * (len(places) > 1)} " if plan.files == 1 else ""
        where = f" ({word}{', '.join(places)})" if places else ""
        where = f", {size}" if code == "shared_mailbox" else where
        yield f"  {skipped_group.email}{where}: {', '.join(names)}"


def _show_pairs(plan: Plan, console: Console) -> None:
    """Print the pairs as a table; a row that is much longer than most, or does not fit the terminal, on lines of its
    own."""
    head = ("EMAIL", "PRIMARY", "TICKETS", console.arrow, "DUPLICATE", "TICKETS", "REFERENCE", "NAME")
    rows = [_pair_cells(pair, console) for pair in plan.pairs() if pair.state is State.PLANNED]
    if not rows:
        return
    # One long address must not take the table from all the others: a column is as wide as nine of ten cells need.
    share = 1.0 if max(len("  ".join(row)) for row in rows) + 10 < console.width / 2 else 0.9
    widths = [
        max(len(title), sorted(map(len, column))[int(share * (len(rows) - 1))])
        for title, column in zip(head, zip(*rows))
    ]
    form = "%-{}s  %-{}s %{}s %{}s %-{}s %{}s  %-{}s  %s".format(*widths)
    lines = "%s\n  %s (%s) %s %s (%s), %s\n  %s"
    room = console.width - 10 - sum(widths[:-1])
    is_table = room >= len(head[-1])
    for line in ((form if is_table else lines) % head).split("\n"):
        console.print(line, "bold")
    for start in range(0, len(rows), 1000):
        text = ""
        for row in rows[start : start + 1000]:
            fits = is_table and len(row[-1]) <= room and all(map(int.__le__, map(len, row[:-1]), widths))
            text += (form if fits else lines) % row + "\n"
        console.stream(text)
    console.print()


def _pair_cells(pair: Pair, console: Console) -> Tuple[str, ...]:
    # The reference tells which contact it is; the id, where it is another, is what DevRev is searched by.
    primary, duplicate = (
        " ".join(dict.fromkeys((one.external_ref, one.short_id))) for one in (pair.primary, pair.duplicate)
    )
    cells = (
        pair.email, primary, str(pair.primary.tickets), console.arrow, duplicate, str(pair.duplicate.tickets),
        "moves" if pair.new_ref else "unchanged", names_of(pair),
    )  # fmt: skip
    return tuple(map(console.sanitize, cells))


# ---------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------

DESCRIPTION = "Merge duplicate DevRev contacts that share an email: check, back up, merge, move the reference, prove."
EPILOG = """\
examples:
  look at the plan (no request, no token needed):
    merge_contacts.py --csv contacts.csv --preview
  merge one customer first, then the rest:
    merge_contacts.py --csv contacts.csv --email ana@example.com
    merge_contacts.py --csv contacts.csv
  after a crash or an interruption, the same command again goes on:
    merge_contacts.py --csv contacts.csv
  take back what a run has merged (ids, dates, creators and authors of comments can't be given back):
    merge_contacts.py --undo reports/merge_report_20250131_120000.json --preview
    merge_contacts.py --undo reports/merge_report_20250131_120000.json

environment, or .env in this folder or beside the script:
  DEVREV_API_TOKEN          needed for a real run
  DEVREV_BASE_URL           default https://api.devrev.ai
  DEVREV_RATE_LIMIT_CALLS, DEVREV_RATE_LIMIT_PERIOD
                            the tool's own ceiling, default 200 calls in 60 seconds; 0 calls: none
  DEVREV_TIMEOUT            seconds to wait for an answer, default 30
  DEVREV_MAX_RETRIES        default 5
  DEVREV_USER_REF_PREFIX    what references of your application begin with, default user_

exit codes:
  0    all merged, or nothing to do
  1    some failed, the rest are merged
  2    bad option, CSV, token or permission: nothing was changed
  3    stopped early: run again
  11   another run holds the savepoint
  130, 143, 129   interrupted (Ctrl-C, SIGTERM, SIGHUP): run again
"""


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{escape_unprintable(text)} is not a whole number of at least 1")
    return int(text)


def _domain(text: str) -> str:
    domain = email_key(text)
    domain = domain[1:] if domain.startswith("@") else domain
    if not re.fullmatch(r"[^\s@,;]+", domain):
        raise argparse.ArgumentTypeError(f"{escape_unprintable(text)} is not a domain such as example.com")
    return domain


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"{escape_unprintable(text)} is not a number of seconds above 0, up to 86400")


class OptionParser(argparse.ArgumentParser):
    """argparse, but a wrong option is told first, with what may have been meant, and can't act on the terminal."""

    MEANT: Mapping[str, str] = {"--dry-run": "--preview", "--force": "--yes", "--resume": "the same command again"}

    def error(self, message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        hint = self._hint(unknown.split()[0]) if unknown.split() else ""
        usage = "usage: merge_contacts.py --csv PATH [--preview] [option ...]   (--help tells them all)"
        self.exit(EXIT_USAGE, escape_unprintable(f"{self.prog}: error: {message}{hint}") + f"\n{usage}\n")

    def _hint(self, word: str) -> str:
        name = word.split("=")[0]
        if word.lower().endswith(".csv"):
            return f"; did you mean --csv {word}?"
        near = difflib.get_close_matches(name, list(self._option_string_actions), 1)
        meant = self.MEANT.get(name) or (near[0] if near else "")
        return f"; did you mean {meant}?" if meant else ""


FLAG: Json = {"action": "store_true"}
OPTIONS: Mapping[str, Mapping[str, Tuple[str, Json]]] = {
    "what to work on": {
        "--csv PATH": (
            "the export of contacts (README: how to make it), or its parts, each plain or gzip",
            {"type": Path, "nargs": "+", "action": "extend"},
        ),
        "--choices PATH": ("a CSV (EMAIL, EXTERNAL_REF): which contact to keep of ambiguous groups", {"type": Path}),
        "--choices-template PATH": ("write such a CSV, to be cut down to one line a group", {"type": Path}),
        "--email ADDRESS": ("only this address (may be repeated)", {"action": "append"}),
        "--limit N": ("at most N pairs in this run: a canary", {"type": _positive_int}),
        "--undo PATH": (
            "take merges back: those of a backup folder, or of a merge report; with --preview: say what would be",
            {"type": Path},
        ),
    },
    "make the CSV": {
        "--export PATH": ("read it from DevRev itself, with list calls alone", {"type": Path}),
        "--domain D": ("only emails of this domain (may be repeated)", {"type": _domain, "action": "append"}),
    },
    "look, without changing anything": {
        "--preview": ("print the plan; no request is made", FLAG),
        "--check": ("say whether a real run could start (a few read requests)", FLAG),
        "--status": ("print what the savepoint knows", FLAG),
        "--verify-backups FOLDER": ("re-read every backup", {"nargs": "?", "type": Path, "const": Path("backups")}),
        "--json": ("with one of these: the same as JSON", FLAG),
    },
    "how to work": {
        "--count-policy": (
            "a contact's backup must hold exactly the export's TICKET_COUNT (default), or at least that",
            {"choices": ("exact", "at-least"), "default": "exact"},
        ),
        "--primary": (
            "which contact of a pair remains: the system-made one, to which the reference moves (revu, the default), "
            "or the application's, which keeps its reference (user)",
            {"choices": ("revu", "user"), "default": "revu"},
        ),
        "--across-workspaces": ("also merge contacts of different workspaces (rev orgs)", FLAG),
        "--try-unverified": ("also request merges of an unverified contact into a verified one", FLAG),
        "--merge-timeout SECONDS": (
            "how long to wait for DevRev to finish a merge (default 120)", {"type": _seconds, "default": 120.0},
        ),
        "--workers N": ("concurrent requests (default 8)", {"type": _positive_int, "default": 8}),
        "--savepoint PATH": ("default savepoint.db", {"type": Path, "default": Path("savepoint.db")}),
        "--no-timelines": ("leave the comments out of the backup (a request each); the manifest says so", FLAG),
        "--settle ADDRESS": (
            "accept what can't be mended of merged pairs that an earlier report has named as unfinished",
            {"nargs": "+", "action": "extend"},
        ),
        "--plan ID": ("only if the plan is still the one that a preview named so", {}),
        "--yes": ("don't ask before the first change", FLAG),
    },
    "what to show": {
        "-v --verbose": ("show each request", FLAG),
        "-q --quiet": ("errors and the summary alone", FLAG),
        "--version": ("", {"action": "version", "version": f"merge_contacts {__version__}"}),
    },
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="merge_contacts.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for names, (words, details) in options.items():
            flags, metavar = re.findall(r"-[\w-]+", names), re.search(r" ([A-Z]+)$", names)
            more: Json = {"metavar": metavar.group(1)} if metavar else {}
            group.add_argument(*flags, help=words or None, **more, **details)
    return parser


def parse_options(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = build_parser()
    options = parser.parse_args(argv)
    given = {name for name, value in vars(options).items() if value not in (None, False)}
    modes = [name for name in MODES if name != "undo" and name in given]
    merges = modes in ([], ["preview"])
    needs_csv = (merges and options.undo is None) or "choices_template" in given
    with_export = [name for name in ("csv", "choices", "plan", "email", "limit") if name in given]
    wrong = {
        f"--{' and --'.join(modes).replace('_', '-')} don't go together": len(modes) > 1,
        "--json goes with --preview, --check, --status or --verify-backups": (
            "json" in given and not given & {"preview", "check", "status", "verify_backups"}
        ),
        "--plan goes with --csv and a merge, or its --preview": (
            "plan" in given and not ("csv" in given and merges and "undo" not in given)
        ),
        f"--export makes a CSV for a later run: --{' --'.join(with_export)} does not go with it": (
            "export" in given and bool(with_export)
        ),
        "--domain goes with --export": "domain" in given and "export" not in given,
        "--undo goes with --preview alone": "undo" in given and not merges,
        "--csv PATH is needed (try --help)": needs_csv and options.csv is None,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            parser.error(message)
    return options


# -- settings ----------------------------------------------------------------------------------------


def load_environment() -> Dict[str, str]:
    """The DEVREV_ settings: the environment, else `.env` in the current folder, else `.env` beside the script."""
    found: Dict[str, str] = {}
    for path in dict.fromkeys((Path.cwd() / ".env", Path(__file__).resolve().parent / ".env")):
        if path.is_file():
            from dotenv import dotenv_values

            logging.getLogger("dotenv").setLevel(logging.ERROR)  # what is off in the file is told below
            try:
                values = dotenv_values(path, interpolate=False)
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                raise FatalError(EXIT_USAGE, f"{path} can't be read as UTF-8 text") from None
            for number, line in enumerate(lines, 1):
                if line.strip() and not re.match(r"\s*(#|(export\s+)?['\"]?[^=#\s]+\s*=)", line):
                    log.warning("%s, line %d is no NAME=value and is left out", path, number)
            found = {**{name: value for name, value in values.items() if value}, **found}
    return {**found, **{name: value for name, value in os.environ.items() if value}}


def load_settings(environment: Mapping[str, str], workers: int) -> ApiSettings:
    """Check the settings. Raises Stop(2) naming the variable that is off, never its value if that is the token."""

    def number(name: str, default: float, least: float) -> float:
        text = environment.get(name, "")
        with contextlib.suppress(ValueError):
            value = float(text) if text else default
            if least <= value <= 1e9:
                return value
        raise FatalError(EXIT_USAGE, f"{name} is not a number of at least {least:g}: {text}")

    base_url = environment.get("DEVREV_BASE_URL", ApiSettings.base_url).strip().rstrip("/")
    return ApiSettings(
        token=environment.get("DEVREV_API_TOKEN", "").strip(),
        base_url=check_base_url(base_url),
        calls=math.ceil(number("DEVREV_RATE_LIMIT_CALLS", 200, 0)),
        period=number("DEVREV_RATE_LIMIT_PERIOD", 60, 0.001),
        timeout=number("DEVREV_TIMEOUT", 30, 0.01),
        retries=int(number("DEVREV_MAX_RETRIES", 5, 0)),
        workers=workers,
    )


def check_base_url(url: str) -> str:
    """Refuse a base URL that the token must not be sent to. Raises Stop(2)."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise FatalError(EXIT_USAGE, "DEVREV_BASE_URL is not a URL") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise FatalError(EXIT_USAGE, "DEVREV_BASE_URL holds more than a host and a path")
    loopback = host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host)
    if not host or parts.scheme not in ("http", "https"):
        raise FatalError(EXIT_USAGE, f"DEVREV_BASE_URL is not an https address: {url}")
    if parts.scheme == "http" and not loopback:
        why = f"plain http would show the token to everybody between here and {host}; use https"
        raise FatalError(EXIT_USAGE, f"DEVREV_BASE_URL: {why}")
    return url


def check_token(token: str) -> None:
    if not token:
        raise FatalError(
            EXIT_USAGE, "DEVREV_API_TOKEN is not set; put it into .env (see .env.example) or the environment"
        )
    if token[0] in "'\"\u2018\u2019\u201c\u201d":
        raise FatalError(EXIT_USAGE, "DEVREV_API_TOKEN is in quotes, which are no part of it: take them away")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise FatalError(EXIT_USAGE, "DEVREV_API_TOKEN holds a space, a line break or something that is not ASCII")


# -- one call ----------------------------------------------------------------------------------------


class RunContext:
    """One call of the tool: options, settings, console, log; named by its stamp."""

    TICK = 0.2  # seconds between looks at what the status line says

    def __init__(self, options: argparse.Namespace, environment: Optional[Environment] = None) -> None:
        self.options = options
        self.console = Console(options.quiet)
        self.environment = environment or Environment(ApiSettings(token=""))
        self.started = self.environment.now()
        self.run_id = self._free_run_id()
        self.settings = self.environment.settings
        self.organisation = ""
        self.csv_sha256: List[Optional[str]] = []
        self.signal = 0

    @property
    def report_path(self) -> Path:
        return Path("reports") / f"{'undo' if self.options.undo else 'merge'}_report_{self.run_id}.json"

    @property
    def log_path(self) -> Path:
        return Path("logs") / f"contact_merge_{self.run_id}.log"

    def _free_run_id(self) -> str:
        second = self.started.wall
        while True:
            self.run_id = timestamp_name(second)
            if not (self.report_path.exists() or self.log_path.exists()):
                return self.run_id
            second += 1

    def on_signal(self, loop: asyncio.AbstractEventLoop, act: Callable[[], Any]) -> None:
        """The first Ctrl-C, SIGTERM or SIGHUP acts, in the event loop; the second ends the process at once."""

        def handle(number: int, _frame: Any) -> None:
            self.second_signal(number)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(act)
            self.console.print_err("stopping: waiting for requests that are under way (again: stop at once) ...")

        self.catch(handle)

    def second_signal(self, number: int) -> None:
        """Note the first signal; the second ends the process at once."""
        if self.signal:
            self.console.print_last("cut off; run the same command again to go on")
            os._exit(128 + self.signal)
        self.signal = number

    def catch(self, handle: Callable[[int, Any], None]) -> None:
        for number in SIGNALS:
            # Whoever started it with nohup wants it to outlive the terminal.
            if not (number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, handle)

    def open_log(self) -> None:
        """Log to a file and, with -v, to stderr. Raises Stop(3) where a real run can't log."""
        logging.raiseExceptions = False
        log.setLevel(logging.DEBUG)
        log.propagate = False
        if not self.options.quiet:
            self._add_handler(ConsoleHandler(self.console, logging.DEBUG if self.options.verbose else logging.WARNING))
        if self.options.status:  # which somebody may call every few seconds
            return
        try:
            self.environment.make_private_dir(self.log_path.parent)
            self._add_handler(logging.FileHandler(str(self.log_path), encoding="utf-8"))
        except OSError as error:
            if not self.options.preview:
                raise FatalError(EXIT_STOPPED, f"the log can't be written: {error}") from None
            self.console.print_err(f"warning: the log can't be written: {error}")
        log.info("merge_contacts %s, Python %s on %s", __version__, sys.version.split()[0], sys.platform)

    def _add_handler(self, handler: logging.Handler) -> None:
        handler.setFormatter(PlainFormatter(self.console))
        log.addHandler(handler)

    def load_settings(self) -> None:
        variables = load_environment()
        Contact.user_prefix = check_user_prefix(variables.get("DEVREV_USER_REF_PREFIX", ""))
        self.settings = load_settings(variables, self.options.workers)
        self.environment.settings = self.settings
        self.console.mask = self.settings.mask

    def cost(self, plan: Plan) -> Estimate:
        return estimate(plan, self.settings, not self.options.no_timelines)

    def ceiling(self) -> str:
        if not self.settings.calls:
            return "without a ceiling of the tool's own"
        return f"at {self.settings.calls} calls in {self.settings.period:g} s"


# -- the plan ----------------------------------------------------------------------------------------


def make_plan(run: RunContext, savepoint: Optional[SavePoint]) -> Plan:
    """Read, detect, and leave out what is not wanted or has ended already."""
    options = run.options
    named = {email_key(email) for email in options.email or ()}
    gc.disable()  # it would walk, again and again, through what is being built and holds no cycle
    try:
        choices = read_choices(options.choices) if options.choices else {}
        plan = detect(read_contacts(options.csv, [*choices, *named]), choices, options.primary)
    finally:
        gc.enable()
    plan.id = plan_id(
        plan.groups,
        count_policy=options.count_policy,
        timelines=not options.no_timelines,
        primary=options.primary,
        across_workspaces=options.across_workspaces,
        try_unverified=options.try_unverified,
        carry_fields=bool(getattr(options, "carry_fields", False)),
    )
    if options.plan is not None and options.plan.strip().lower() != plan.id:
        why = "the CSV, the choices or an option of the merge differs from what it was; read the preview again"
        raise FatalError(EXIT_USAGE, f"the plan is {plan.id}, not {options.plan}: {why}")
    plan.ids = {pair.ids for group in plan.groups for pair in group.pairs}
    if savepoint:
        apply_savepoint(plan, savepoint, named)
    if options.email:
        _apply_email_filter(plan, options.email, run.console)
    if options.limit:
        _apply_limit(plan, options.limit, run.console)
    plan.chosen = [group for group in plan.groups if group.chosen and any(p.state not in ENDED for p in group.pairs)]
    plan.warnings = plan.find_warnings()
    for row in plan.invalid_rows:
        log.info("%s, line %d left out: %s", row.file, row.line, row.reason)
    for skipped_group in plan.skipped:
        log.info("%s skipped: %s", skipped_group.email, skipped_group.code)
    return plan


def apply_savepoint(plan: Plan, savepoint: SavePoint, named: Collection[str] = ()) -> None:
    """Bring what the savepoint knows into a plan: what has ended or was begun, and what was undone and not `named`."""
    known = {pair.ids: pair for pair in savepoint.rows(*UNFINISHED, *ENDED)}
    history = [
        HistoryRow(pair.email, pair.ids, "undone", str(pair.details.get("undo", {}).get("contact") or ""))
        for pair in savepoint.rows(State.UNDONE)
    ]
    undone = {row.ids for row in history}  # an undo creates the duplicate again, with another id
    blocked = {email: code for email, code in blocked_by_history(plan.groups, history).items() if email not in named}
    groups, plan.groups = plan.groups, []
    asked = [row for row in known.values() if row.state in REQUESTED_STATES]
    group_of = {contact.id: group for group in groups for contact in group.all_contacts()} if asked else {}
    plan.overruled = {row.ids for row in asked for one in row.ids if one in group_of and group_of[one].overrules(row)}
    for group in groups:
        rows = [known.get(pair.ids) for pair in group.pairs]
        # An export that has an old id is older than the undo, which would begin anew after a refusal of that pair.
        stale = any(pair.ids in undone for pair in group.pairs)
        if stale or (group.email in blocked and not all(rows)):
            plan.skipped.append(SkippedGroup(group.email, blocked.get(group.email, "undone"), group.all_contacts()))
            plan.ids.difference_update(pair.ids for pair in group.pairs)
            continue
        plan.groups.append(group)
        for pair, row in zip(group.pairs, rows):
            if row:
                pair.state = row.state
                plan.already_merged += row.state in ENDED and bool(row.report)
                plan.unreported += row.state in ENDED and not row.report


def _apply_email_filter(plan: Plan, emails: Sequence[str], console: Console) -> None:
    """Keep what was requested, and say why there is nothing to merge. Raises FatalError(2) for an email in no row."""
    wanted = {email_key(email) for email in emails}
    plan.groups = [group for group in plan.groups if group.email in wanted]
    plan.skipped = [skipped_group for skipped_group in plan.skipped if skipped_group.email in wanted]
    plan.look_alikes = [one for one in plan.look_alikes if wanted & set(one["emails"])]
    rows = {email_key(row.email): row for row in plan.invalid_rows if row.email}
    found = {group.email for group in plan.groups} | {skipped_group.email for skipped_group in plan.skipped}
    unknown = sorted(wanted - found - plan.left_alone.keys() - rows.keys())
    if unknown:
        raise FatalError(EXIT_USAGE, f"--email: in no row of the CSV: {', '.join(unknown)}")
    for email in sorted(wanted - found):
        row = rows.get(email)
        why = f"{row.file}, line {row.line}: {row.reason}" if row else plan.left_alone[email]
        console.print_err(f"{email}: nothing to merge: {why}")
    for skipped_group in plan.skipped:
        console.print_err(f"{skipped_group.email}: skipped: {skipped_group.reason()}")
    for group in plan.groups:
        if all(pair.state in ENDED for pair in group.pairs):
            console.print_err(f"{group.email}: nothing to merge: merged already, says the savepoint")


def _apply_limit(plan: Plan, limit: int, console: Console) -> None:
    """Keep complete groups with at most `limit` pairs in all; one that would not fit is passed over."""
    groups: List[Group] = []
    sizes = [sum(pair.state is State.PLANNED for pair in group.pairs) for group in plan.groups]
    if any(sizes) and min(filter(None, sizes)) > limit:
        console.print_err(f"--limit {limit}: no group has so few pairs, and a group is merged as one")
    for group, size in zip(plan.groups, sizes):
        if size <= limit:  # 0 where an earlier run has requested all of them
            groups.append(group)
            limit -= size
    plan.groups = groups


def write_choices_template(run: RunContext) -> int:
    """Write a file for --choices with every contact that could be kept; returns the exit code."""
    path: Path = run.options.choices_template
    plan = make_plan(run, open_savepoint(run, readonly=True))
    groups = [group for group in plan.skipped if group.choice_lines()]
    try:
        if is_taken(path):
            raise FileExistsError(str(path))
        write_new_file(run.environment, path, choices_template(groups))
    except FileExistsError:
        words = f"{path} exists already, and is left as it is: name a file that does not exist yet"
        raise FatalError(EXIT_USAGE, words) from None
    except OSError as error:
        raise FatalError(EXIT_USAGE, f"{path} can't be written: {error.strerror or error}") from None
    lines = sum(len(group.choice_lines()) for group in groups)
    run.console.print(f"{plural(lines, 'line')} of {plural(len(groups), 'group')} written to {path}", "good")
    if groups:
        run.console.print(f"next     cut it down to one line a group, then --choices {path} --preview")
    shared = sum(group.code == "shared_mailbox" for group in plan.skipped)
    if shared:
        words = f"{plural(shared, 'group')} that may be a shared mailbox left out: write in by hand what is one person"
        run.console.print(words)
    return EXIT_OK


def preview(run: RunContext) -> int:
    known = open_savepoint(run, readonly=True)
    plan = make_plan(run, known)
    earlier = known.unfinished()
    cost = run.cost(plan)
    facts = plan_summary(plan, cost, earlier)
    if run.options.json:
        run.console.json(plan_chunks(plan, facts, earlier))
    else:
        show_plan(plan, facts, run.console, f"{cost} {run.ceiling()}", earlier)
    return EXIT_OK


def _has_content(path: Path) -> bool:
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


# -- the real run ------------------------------------------------------------------------------------


def merge(run: RunContext) -> int:
    """Carry the plan out and report it; returns the exit code."""
    check_token(run.settings.token)
    run.csv_sha256 = [_sha256(path) for path in run.options.csv]
    with contextlib.closing(open_savepoint(run)) as savepoint:
        plan = make_plan(run, savepoint)
        if not plan.count() and not savepoint.unfinished():
            return _report(run, plan, None, savepoint, EXIT_OK)
        check_writable(run.report_path.parent, run.environment)
        return run.environment.run_event_loop(run_merge(run, plan, savepoint))


def settle(run: RunContext) -> int:
    """Accept what can't be mended of merged pairs that a report has named; nothing is asked of DevRev."""
    with contextlib.closing(open_savepoint(run)) as savepoint:
        wanted = {email_key(email) for email in run.options.settle}
        pairs = [pair for pair in savepoint.unfinished() if pair.email in wanted and pair.is_settleable]
        missing = sorted(wanted - {pair.email for pair in pairs})
        if missing:
            why = "no unfinished pair whose flaw an earlier run has named in its report, and that can't be mended"
            raise FatalError(EXIT_USAGE, f"{', '.join(missing)}: {why} (--status tells what is)")
        for pair in pairs:
            pair.details["accepted"] = f"{pair.code}: {pair.error}"
            if pair.new_ref and pair.state is not State.PROVING:
                pair.details["reference_not_set"] = pair.new_ref
            pair.state, pair.report = State.SETTLED, ""
        StateWriter(savepoint, Journal(JOURNAL, run.environment, run.run_id)).put(pairs, pairs)
        for pair in pairs:
            run.console.print(f"settled  {pair.email}: {pair.details['accepted']}")
        return _report(run, Plan([], [], [], 0), None, savepoint, EXIT_OK)


def open_savepoint(run: RunContext, readonly: bool = False) -> SavePoint:
    """Open the savepoint, which learns from the journal what it does not know."""
    savepoint = SavePoint(run.options.savepoint, run.environment, run.run_id, readonly)
    journal = Journal(JOURNAL, run.environment, run.run_id)
    savepoint.confirm_report(lambda name: (run.report_path.parent / name).exists())
    StateWriter(savepoint, journal).reconcile(lambda: reported_pairs(run.report_path.parent))
    return savepoint


def reported_pairs(folder: Path) -> Dict[Tuple[str, str], str]:
    """The pairs that reports in a folder call ended, with the report's name."""
    found: Dict[Tuple[str, str], str] = {}
    for path in sorted(folder.glob("merge_report_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads(path.read_bytes())
            for entry in (*report["successful_merges"], *report["failed_merges"]):
                if entry.get("state", "done") in {state.value for state in ENDED}:
                    found[entry["primary"]["id"], entry["duplicate"]["id"]] = path.name
    return found


def check_writable(folder: Path, environment: Environment) -> None:
    """Find out now whether a file can be made in a folder. Raises Stop(3)."""
    trial = folder / f".trial.{os.getpid()}"
    try:
        environment.make_private_dir(folder)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise FatalError(EXIT_STOPPED, f"{folder} can't be written: {error}; nothing was changed") from None


async def run_merge(run: RunContext, plan: Plan, savepoint: SavePoint) -> int:
    """Find out whose token it is, ask, merge, report; returns the exit code."""
    run.console.status("connecting to DevRev ...")
    cancel_token = CancelToken()
    api = DevRevAPI(run.settings, run.environment, cancel_token)
    backups = BackupStore(JOURNAL.parent, run.environment, not run.options.no_timelines)
    journal = Journal(JOURNAL, run.environment, run.run_id)
    progress = Progress(run, run.cost(plan).requests)
    merger = ContactMerger(
        api, savepoint, journal, backups, run.options.count_policy, run.options.merge_timeout, progress.on_pair
    )
    merger.live_options = {name: getattr(run.options, name) for name in ("across_workspaces", "try_unverified")}
    try:
        unfinished = await merger.identify(plan)
    except FatalError as stop:
        if stop.exit_code != EXIT_STOPPED:
            raise
        cancel_token.cancel(stop)
        return _report(run, plan, merger, savepoint, stop.exit_code)
    warning = "In DevRev a merge can't be undone; --undo takes back most of it."
    question = Question("merge", merge_facts(run, plan, unfinished), warning)
    code = await confirm_and_run(run, merger, progress, question, lambda: merger.run(plan.groups, unfinished))
    for one in merger.dropped.values():
        if one.code == "different_rev_org":
            plan.ids.discard(one.pair.ids)
        else:
            plan.already_merged += 1
        plan.skipped.append(SkippedGroup(one.pair.email, one.code, [one.pair.duplicate, one.pair.primary], one.reason))
    return _report(run, plan, merger, savepoint, code)


async def confirm_and_run(
    run: RunContext,
    merger: ContactMerger,
    progress: "Progress",
    question: "Question",
    work: Callable[[], Awaitable[int]],
) -> int:
    """Ask, and do the work under a status line, which a signal ends; returns the exit code."""
    ticking = asyncio.ensure_future(
        progress.tick(lambda now: progress.line(merger, now))
    )  # which also lets signals in, however quiet it is
    await confirm(run, merger, question)
    merger.savepoint.meta("organisation", merger.organisation)
    run.on_signal(asyncio.get_event_loop(), lambda: merger.cancel_token.cancel(Cancelled()))
    code = await work()
    ticking.cancel()
    run.console.status("")
    return run.signal + 128 if run.signal else code


class Question(NamedTuple):
    """What one signs by typing `word`."""

    word: str
    facts: Dict[str, str]
    warning: str


def merge_facts(run: RunContext, plan: Plan, unfinished: Sequence[Pair]) -> Dict[str, str]:
    """What one signs with a typed `merge`."""
    new = [pair for pair in plan.pairs() if pair.state is State.PLANNED]
    files = [f"{path} of {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}" for path in run.options.csv]
    facts = {"CSV": ", ".join(some(files, 3)), "plan": plan.id, "to merge": plural(len(new), "pair")}
    facts.update({f"  {index}": words for index, words in enumerate(some([describe_pair(pair) for pair in new], 3), 1)})
    if unfinished:
        words = "; ".join(some([describe_pair(pair) for pair in unfinished], 3))
        facts["first"] = f"{plural(len(unfinished), 'pair')} of earlier runs to finish: {words}"
    facts["left out"] = f"{plural(len(plan.skipped), 'group')} skipped, {plural(len(plan.invalid_rows), 'invalid row')}"
    left = plan_summary(plan, run.cost(plan), unfinished)["left"]
    facts.update({"left": f"{plural(left, 'pair')} for another run (--email, --limit)"} if left else {})
    lost = [f"{one.external_ref} ({describe_contact(one)})" for group in plan.chosen for one in group.lost_refs()]
    facts.update({"choices lose": "; ".join(some(lost))} if lost else {})
    warnings = sorted(plan.warnings, key=lambda one: bool(one["code"] != "shared_mailbox"))
    shared = sum(one["code"] == "shared_mailbox" for one in warnings)  # each of which is named
    told = some([f"{one['email']}: {one['warning']}" for one in warnings], max(20, shared))
    facts.update({f"WARNING {number}": line for number, line in enumerate(told, 1)})
    facts.update({"take no part": plan.others_line()} if plan.other_refs else {})
    facts["cost"] = f"{run.cost(plan)} {run.ceiling()}"
    facts["backups in"] = str(Path("backups").resolve())
    return facts


async def confirm(run: RunContext, merger: ContactMerger, question: Question) -> None:
    """On a terminal: say what is about to happen, and go on only where it is signed. Raises Stop(2) otherwise."""
    owner = merger.token_owner
    who = str(owner.get("display_name") or owner.get("full_name") or owner.get("email") or owner.get("id"))
    log.info("organisation %s, token of %s (%s)", merger.organisation, who, owner.get("id"))
    if run.options.yes or run.options.preview or not (sys.stdin and sys.stdin.isatty()):
        return
    run.console.status("")
    show, ask = run.console.question_streams()
    show(f"organisation  {merger.organisation} at {run.settings.base_url}")
    show(f"token of      {who}" + (f" <{owner['email']}>" if owner.get("email") else ""))
    for name, fact in question.facts.items():
        show(f"{name:<12}  {fact}")
    show(question.warning, "bold")
    ask(f"Type {question.word} to go on, anything else to leave: ")
    # Read by a thread and past Python's own buffers, so that a signal is never kept waiting by the terminal.
    answer = await run.environment.run_in_thread(os.read, sys.stdin.fileno(), 1024)
    if answer.strip() != question.word.encode():
        raise FatalError(EXIT_USAGE, "not confirmed; nothing was changed")


class Progress:
    """Tells what a run is doing: a line a pair, a status line, or a log line now and then."""

    EVERY = 30.0  # seconds between lines where there is no terminal

    def __init__(self, run: RunContext, requests: int = 0) -> None:
        self.run = run
        self.requests = requests  # that the whole run is expected to take
        self.begun = self.describe_pair = run.environment.now().monotonic

    def on_pair(self, pair: Pair) -> None:
        console, style = self.run.console, ""
        words = f"{pair.email}: {pair.primary.short_id} {console.arrow} {pair.duplicate.short_id}"
        if pair.state in (State.DONE, State.SETTLED) and not pair.code:
            line = f"merged  {words}" + (f", now {pair.new_ref}" if pair.new_ref else "")
        elif pair.state is State.UNDONE and not pair.code:
            line = f"undone  {pair.email}: {into(pair)}, again as {pair.details['undo']['display_id']}"
        else:
            facts, style = progress_of(pair), "bad"
            word = "UNFINISHED" if facts or pair.state is State.UNDOING else "FAILED"
            so_far = f" ({facts['so_far']}; still to do: {facts['to_do']})" if facts else ""
            line = f"{word}  {words}: {pair.code}: {pair.error}{so_far}"
        log.info("%s", line)
        if not self.run.options.quiet:
            console.print(line, style)

    async def tick(self, line_at: Callable[[float], str]) -> None:
        """Say how far a run is for as long as it lasts; where there is no terminal, now and then."""
        while True:
            await asyncio.sleep(self.run.TICK)
            now = self.run.environment.now().monotonic
            line = line_at(now)
            self.run.console.status(line)
            if line and now - self.describe_pair >= self.EVERY:
                self.describe_pair = now
                log.info("%s", line)
                if not self.run.options.quiet and not self.run.console.err.isatty():
                    self.run.console.print_err(line)

    def line(self, merger: ContactMerger, now: float) -> str:
        """Phases, the end, and what is waited for."""
        if not merger.total:
            return ""
        pairs = list(merger.pairs())
        gone = (*ENDED, State.MERGED, State.PROVING)
        phases = {
            "backed up": sum(bool(pair.backup) for pair in pairs),
            "merged": sum(pair.state in gone for pair in pairs),
            "proved": sum(pair.state in ENDED for pair in pairs),
        }
        failed = sum(not merger.is_success(pair) for pair in merger.outcomes.values())
        words = [f"{count:,} {what}" for what, count in phases.items()] + ([f"{failed:,} failed"] if failed else [])
        parts = [f"{plural(merger.total, 'pair')}: {', '.join(words)}"]
        if self.run.signal:
            return f"{parts[0]} \u00b7 stopping (requests under way are waited for)"
        share = (sum(phases.values()) + 3 * failed) / (3 * merger.total)
        if share < 1:
            parts.append(f"{duration(self.left(merger, share, now))} left")
        parts.extend(filter(None, [merger.api.scheduler.describe_wait()]))
        return " \u00b7 ".join(parts)

    def left(self, merger: ContactMerger, share: float, now: float) -> float:
        """Seconds to the end, at the pace so far; not less than quota and ceiling allow."""
        api, known = merger.api, share > 0.05
        sent = sum(api.requests.values())
        wanted = sent / share * (1 - share) if known else max(0, self.requests - sent)
        return max(api.scheduler.minimum_seconds(wanted), (now - self.begun) / share * (1 - share) if known else 0.0)


def _report(run: RunContext, plan: Plan, merger: Optional[ContactMerger], savepoint: SavePoint, code: int) -> int:
    """Write the report and print the summary; a full disk here makes the exit code 3."""
    stop = stop_reason(merger, code)
    summary, lists = summary_of(plan, savepoint), outcome(savepoint)
    failed = list(lists["failed_merges"])  # also by a run that was killed before it could say so
    failures = [*failed, *lists["unfinished_merges"]]
    code = EXIT_FAILED if failed and code == EXIT_OK else code
    facts = run_facts(run, merger, savepoint, code, headline(plan, summary, savepoint), plan)
    code = written(run, lambda: write_report(run.report_path, facts, plan, savepoint, run.environment), code)
    if stop and not run.signal:
        run.console.error(stop)
    show_summary(run, facts["headline"], summary, merger, failures)
    if code >= EXIT_STOPPED:
        run.console.print_err(
            f"Stopped early. Run the same command again to go on from {run.options.savepoint}.", "bold"
        )
    elif code == EXIT_USAGE:
        run.console.print_err("Nothing was changed in DevRev.")
    log.info("exit code %d", code)
    return code


def written(run: RunContext, write: Callable[[], None], code: int) -> int:
    """Write a report; a disk that refuses makes the exit code 3, unless it says something worse."""
    try:
        write()
    except (OSError, FatalError) as error:
        run.console.error(f"the report can't be written: {error}")
        return code if code >= EXIT_USAGE else EXIT_STOPPED
    return code


def stop_reason(merger: Optional[ContactMerger], code: int) -> Optional[str]:
    return str(merger.stop) if merger and merger.stop and code >= EXIT_USAGE else None


def run_facts(
    run: RunContext,
    merger: Optional[ContactMerger],
    savepoint: SavePoint,
    code: int,
    headline: str,
    plan: Optional[Plan] = None,
) -> Json:
    """The report's `run`."""
    owner = merger.token_owner if merger else {}
    requests = dict(sorted(merger.api.requests.items())) if merger else {}
    waits = merger.api.scheduler.waits if merger else []
    options = run.options
    return {
        "version": __version__,
        "headline": headline,
        "csv": [str(path) for path in options.csv or ()],
        "csv_sha256": run.csv_sha256,
        "plan": plan.id if plan else None,
        "base_url": run.settings.base_url,
        "organisation": merger.organisation if merger else savepoint.meta("organisation"),
        "token_owner": {name: owner.get(name) for name in ("id", "display_name", "email")},
        "options": {
            "email": options.email, "limit": options.limit, "count_policy": options.count_policy,
            "merge_timeout": options.merge_timeout, "workers": options.workers, "savepoint": str(options.savepoint),
            "choices": str(options.choices) if options.choices else None,
            "timelines": not options.no_timelines, "rate_limit": [run.settings.calls, run.settings.period],
        },
        "start": iso(run.started.wall),
        "end": iso(run.environment.now().wall),
        "exit_code": code,
        "stopped": "interrupted" if run.signal else stop_reason(merger, code),
        "requests": requests,
        "requests_total": sum(requests.values()),
        "quota_wait_seconds": round(sum(end - start for start, end in waits), 3),
        "quota_waits": [{"start": iso(start), "end": iso(end)} for start, end in waits if end - start > 0.5],
        "log": str(run.log_path),
    }  # fmt: skip


def _sha256(path: Path) -> Optional[str]:
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
        return digest.hexdigest()
    return None


def show_summary(
    run: RunContext, headline: str, facts: Json, merger: Optional[ContactMerger], failures: Sequence[Pair]
) -> None:
    show = run.console.print
    show()
    whole = facts["left"] == facts["failed_merges"] == facts["unfinished_merges"] == 0
    show(headline, "good" if whole and not failures else "bold")
    if failures:
        _show_failures(run.console, failures)
    if facts["skipped_groups"]:
        show("         --preview says why groups are skipped")
    if merger:
        spent = run.environment.elapsed(run.started)
        show(f"cost     {plural(sum(merger.api.requests.values()), 'request')}, {duration(spent)}")
    print_report_paths(run)


def print_report_paths(run: RunContext) -> None:
    page = run.report_path.with_suffix(".html")
    if run.report_path.exists():
        run.console.print(f"report   {run.report_path}" + (f", to read: {page}" if page.exists() else ""))


def _show_failures(console: Console, pairs: Sequence[Pair]) -> None:
    by_code: Dict[str, List[str]] = collections.defaultdict(list)
    for pair in pairs:
        by_code[pair.code].append(pair.email)
    for code, emails in sorted(by_code.items()):
        emails.sort()
        console.print(f"  {len(emails)} {code}: {', '.join(some(emails))}")
        console.print(f"    what to do: {ADVICE.get(code, 'see the report')}")


# -- export ------------------------------------------------------------------------------------------


def export(run: RunContext) -> int:
    """Write the CSV from DevRev itself; returns the exit code. What is wrong with the path is found out first."""
    check_token(run.settings.token)
    path: Path = run.options.export
    if is_taken(path):
        words = f"{path} exists already, and is left as it is: name a file that does not exist yet"
        raise FatalError(EXIT_USAGE, words)
    try:
        spool = tempfile.TemporaryFile(dir=str(path.parent))  # noqa: SIM115
    except OSError as error:
        raise FatalError(EXIT_USAGE, f"{path} can't be written: {error.strerror}") from None
    with spool:
        try:
            return asyncio.run(_export(run, path, spool))
        except FileExistsError:
            raise FatalError(
                EXIT_USAGE, f"{path} was created by another program meanwhile, and is left as it is"
            ) from None
        except OSError as error:
            raise FatalError(EXIT_STOPPED, f"the disk refuses: {error}; nothing was written") from None


async def _export(run: RunContext, path: Path, spool: BinaryIO) -> int:
    api = DevRevAPI(run.settings, run.environment, CancelToken())
    exporter = ContactExporter(api, [f"@{domain}" for domain in run.options.domain or ()], spool)
    work = asyncio.ensure_future(exporter.run())
    run.on_signal(asyncio.get_event_loop(), work.cancel)
    ticking = asyncio.ensure_future(
        Progress(run).tick(lambda _now: exporter.progress())
    )  # which also lets signals in, however quiet it is
    try:
        with before_any_change(api):
            rows = await work
    except asyncio.CancelledError:
        run.console.print_err("interrupted; nothing was written")
        return 128 + run.signal
    finally:
        ticking.cancel()
        run.console.status("")
    write_new_file(run.environment, path, csv_chunks(rows))
    print_exported(run, exporter, path)
    return EXIT_OK


def print_exported(run: RunContext, exporter: ContactExporter, path: Path) -> None:
    emails = len({contact.key for contact in exporter.rows})
    rows, requests = len(exporter.rows), sum(exporter.api.requests.values())
    show = run.console.print
    show(f"exported {plural(rows, 'contact')} of {plural(emails, 'email')} that recur, to {path}", "good")
    show(f"read     {plural(exporter.read, 'contact')}")
    show(f"cost     {plural(requests, 'request')}, {duration(run.environment.elapsed(run.started))}")
    if rows and not run.options.quiet:
        name = f'"{path}"' if re.search(r"[^\w./\\:@+-]", str(path)) else str(path)
        show(f"next     python merge_contacts.py --csv {name} --preview")
    log.info("exported %d rows of %d emails to %s with %d requests", rows, emails, path, requests)


# -- undo --------------------------------------------------------------------------------------------


def undo(run: RunContext) -> int:
    """Take merges back, or with --preview say what would be; returns the exit code."""
    check_token(run.settings.token)
    options = run.options
    with contextlib.closing(open_savepoint(run, readonly=options.preview)) as savepoint:
        emails = {email_key(email) for email in options.email or ()}
        plan = plan_undo(options.undo, savepoint, emails, options.limit)
        if not options.preview:
            check_writable(run.report_path.parent, run.environment)
        return run.environment.run_event_loop(run_undo(run, plan, savepoint))


async def run_undo(run: RunContext, plan: UndoPlan, savepoint: SavePoint) -> int:
    """Find out whose token it is, ask, undo, report; returns the exit code."""
    options, cancel_token = run.options, CancelToken()
    progress, journal = Progress(run), Journal(JOURNAL, run.environment, run.run_id)
    undo_runner = UndoRunner(
        DevRevAPI(run.settings, run.environment, cancel_token), savepoint, journal, options.undo, options.preview,
        merge_timeout=options.merge_timeout, on_pair=(lambda _pair: None) if options.preview else progress.on_pair,
    )  # fmt: skip
    code = EXIT_OK
    if plan.groups:
        await undo_runner.find_owner()
        check_organisation(undo_runner.organisation, "backup", plan.pairs)
        facts = {"to take back": plural(len(plan.pairs), "merge"), "of": str(options.undo)}
        told_pairs = some([f"{names_of(pair)} <{pair.email}>: {into(pair)}" for pair in plan.pairs], 3)
        facts.update({f"  {index}": words for index, words in enumerate(told_pairs, 1)})
        question = Question("undo", facts, "Ids, dates, creators and authors of comments can't be given back.")
        code = await confirm_and_run(run, undo_runner, progress, question, lambda: undo_runner.undo(plan))
    return report_undo(run, plan, undo_runner, code)


def undo_headline(counts: Json, before: int) -> str:
    """What an undo has come to, or would, in one line; `before` were undone by an earlier one."""
    counts = {"taken back" if name == "undone" else name.replace("_", " "): count for name, count in counts.items()}
    if "taken back" in counts:
        counts["taken back"] -= before
    words = [f"{count:,} {name}" for name, count in counts.items() if count] or ["nothing to take back"]
    return ", ".join([*words, *([f"{before:,} taken back before"] if before else [])])


def report_undo(run: RunContext, plan: UndoPlan, undo_runner: UndoRunner, code: int) -> int:
    """Write the report (with --preview: print it), and say what has come of each pair."""
    stop = stop_reason(undo_runner, code)
    pairs = plan.pairs if run.options.preview else [*plan.undone, *plan.pairs]  # those of a killed run are in no report
    lists = {
        "undone": [pair for pair in pairs if pair.state is State.UNDONE],
        "unfinished": [pair for pair in pairs if pair.state is State.UNDOING],
        "failed": [pair for pair in pairs if pair.code and pair.state is not State.UNDOING],
    }
    if run.options.preview:
        lists = {"to_undo": [p for p in pairs if not p.code], "refused": [p for p in pairs if p.code]}
    summary = {name: len(found) for name, found in lists.items()}
    left = plan.left + len(pairs) - sum(summary.values())
    words = undo_headline({**summary, "left": left}, len(plan.undone))
    summary.update(pairs=len(pairs) + plan.left, undone_before=len(plan.undone), left=left)
    facts = run_facts(run, undo_runner, undo_runner.savepoint, code, words)
    head = {"run": {**facts, "undo": str(run.options.undo)}, "summary": summary}
    entries: Dict[str, Iterable[Json]] = {name: map(undo_entry, found) for name, found in lists.items()}
    if run.options.preview:
        show_undo(run, head, entries)
    else:

        def write() -> None:
            run.environment.write_atomically(run.report_path, report_chunks(head, entries))
            write_page(run.report_path, "undo_template.html", facts["headline"], run.environment)

        code = written(run, write, code)
        print_report_paths(run)
        run.console.print(facts["headline"], "bold")
        _show_failures(run.console, [*lists["failed"], *lists["unfinished"]])
    if stop and not run.signal:
        run.console.error(stop)
    log.info("exit code %d", code)
    return code


def show_undo(run: RunContext, head: Json, lists: Mapping[str, Iterable[Json]]) -> None:
    if run.options.json:
        run.console.json(report_chunks(head, lists))
        return
    show = run.console.print
    for name, entries in lists.items():
        for entry in entries:
            names = f"{entry['duplicate']['display_id']} out of {entry['primary']['display_id']}"
            if name == "refused":
                show(f"refused  {entry['email']}: {names}: {entry['code']}: {entry['error']}", "bad")
                continue
            given = len({item["id"] for item in entry["given_back"]})
            reference = entry["duplicate"]["old_external_ref"]
            show(f"undo     {entry['email']}: {names}, {reference}, {given} tickets, issues and conversations")
            for item in entry["left"]:
                show(f"           stays: {item['display_id']} {item['title']}: {item['why']}")
            never = dict.fromkeys(item["what"].replace("_", " ") for item in entry["not_given_back"])
            show(f"           never back: {', '.join(never)}")
    show(head["run"]["headline"], "bold")


# -- check, status, verify ---------------------------------------------------------------------------


async def check(run: RunContext) -> int:
    """Say whether a real run could start: token, organisation, read access, quota, disk, savepoint."""
    api = DevRevAPI(run.settings, run.environment, CancelToken())
    checks: List[Json] = []

    async def tell(name: str, work: Union[Callable[[], str], Awaitable[str]]) -> bool:
        try:
            words, good = work() if callable(work) else await work, True
        except (FatalError, PairError, OSError) as error:
            words, good = str(api.cancel_token.stop or error if isinstance(error, Cancelled) else error), False
            log.info("check of %s: %s", name, words)
        checks.append({"check": name, "ok": good, "says": words})
        if not run.options.json:
            run.console.print(f"{'ok     ' if good else 'FAILED '} {name}: {words}", "" if good else "bad")
        return good

    known = await tell("token", _check_token(run, api))
    if run.options.csv:
        await tell("csv", lambda: _check_csv(run))
    notes = []
    if known:
        seen: List[str] = []
        for name in READS:
            await tell(name, _check_read(api, name, seen))
        notes.append(f"quota: {api.scheduler.describe_wait() or 'the server says nothing meta it'}, {run.ceiling()}")
    await tell("savepoint", lambda: _check_savepoint(run))
    await tell("disk", _check_disk)
    notes.append("the permission to merge (rev_user:all) can't be tried without merging: --limit 1 is the first proof")
    notes.append("--undo also needs to write tickets, issues and conversations, which reading can't tell")
    return _verdict(run, checks, notes)


def _verdict(run: RunContext, checks: Sequence[Json], notes: Sequence[str]) -> int:
    problems = sum(not one["ok"] for one in checks)
    verdict = f"not ready: {plural(problems, 'problem')}" if problems else "ready"
    if run.options.json:
        facts = {"verdict": verdict, "ready": not problems, "checks": checks, "notes": notes}
        run.console.json([to_json(facts, indent=1) + b"\n"])
    else:
        for print_err in notes:
            run.console.print(f"note    {print_err}")
        run.console.print(verdict, "bad" if problems else "good")
    return EXIT_USAGE if problems else EXIT_OK


async def _check_token(run: RunContext, api: DevRevAPI) -> str:
    check_token(run.settings.token)
    with before_any_change(api):
        owner = await api.whoami()
    run.organisation = organisation_of(str(owner.get("id")))
    return f"of {owner.get('display_name') or owner.get('id')}, organisation {run.organisation or 'unknown'}"


def _check_csv(run: RunContext) -> str:
    """Also where the token's organisation is not known."""
    plan = make_plan(run, None)
    counts = [f"{plural(plan.count(), 'pair')} to merge", f"{plural(len(plan.skipped), 'group')} skipped"]
    counts += filter(None, [plural(len(plan.invalid_rows), "invalid row"), plan.others_line()])
    if run.organisation:
        check_organisation(run.organisation, "CSV", plan.pairs())
        counts.append("of the token's organisation")
    return ", ".join(counts)


READS: Mapping[str, Tuple[str, str, Json]] = {
    "contacts": ("rev-users.list", "rev_users", {}),
    "works": ("works.list", "works", {"type": ["ticket", "issue"]}),
    "conversations": ("conversations.list", "conversations", {}),
    "timelines": ("timeline-entries.list", "timeline_entries", {}),
}


async def _check_read(api: DevRevAPI, name: str, seen: List[str]) -> str:
    """Ask one cheap request of what the backup reads; `seen` are objects that have a timeline."""
    endpoint, key, body = READS[name]
    if name == "timelines":
        if not seen:
            return "nothing there to try it on"
        body = {"object": seen[0]}
    items = await api.read_one(endpoint, key, body)
    seen.extend(item["id"] for item in items if name != "contacts")
    return "readable"


def _check_savepoint(run: RunContext) -> str:
    path = run.options.savepoint
    if not path.exists():
        if not os.access(str(path.resolve().parent), os.W_OK):
            raise FatalError(EXIT_USAGE, f"its folder {path.parent} is not there, or can't be written to")
        return f"{path} will be created"
    with contextlib.closing(open_savepoint(run, readonly=True)) as savepoint:
        if savepoint.glimpsed:
            raise FatalError(EXIT_HELD, f"a run goes on: process {savepoint.holder()['pid']} holds {path}")
        if not os.access(str(path), os.W_OK):
            raise FatalError(EXIT_USAGE, f"the savepoint {path} is read-only")
        return f"{path} is free, {plural(len(savepoint.unfinished()), 'unfinished pair')}"


def _check_disk() -> str:
    free = shutil.disk_usage(".").free
    if free < 100 << 20:
        raise OSError(f"only {free >> 20} MiB free")
    return f"{free >> 20:,} MiB free"


STATE_WORDS: Mapping[State, str] = {
    State.DONE: "merged and proved",
    State.SETTLED: "merged, and what can't be mended accepted (--settle)",
    State.MERGED_ELSEWHERE: "merged or deleted by somebody else",
    State.UNDONE: "taken back",
    State.UNDOING: "being taken back",
    State.FAILED: "failed, nothing merged",
    **SO_FAR,
}


def status(run: RunContext) -> int:
    """Print what the savepoint knows; also while a run is going on."""
    path, pairs = run.options.savepoint, {}
    facts: Json = {"savepoint": str(path), "counts": {}}
    if _has_content(path):
        with contextlib.closing(SavePoint(path, run.environment, readonly=True)) as savepoint:
            facts["organisation"] = savepoint.meta("organisation") or None
            facts["running"], facts["last_opened"] = savepoint.glimpsed, savepoint.holder()
            facts["counts"] = {State(name).value: count for name, count in savepoint.counts().items()}
            pairs["unfinished"] = list(savepoint.rows(*UNFINISHED, State.UNDOING))
            pairs["failed"] = list(savepoint.rows(State.FAILED))
    if run.options.json:
        lists = {name: (merge_entry(pair, ()) for pair in found) for name, found in pairs.items()}
        run.console.json(report_chunks(facts, lists))
    elif pairs:
        show_status(run.console, facts, pairs)
    else:
        run.console.print(f"{path}: nothing was merged with it yet")
    return EXIT_OK


def show_status(console: Console, facts: Json, lists: Mapping[str, Sequence[Pair]]) -> None:
    holder, running = facts["last_opened"], facts["running"]
    who = f"process {holder['pid']} on {holder['host']}"
    console.print(f"{facts['savepoint']}: organisation {facts['organisation'] or 'unknown'}")
    now = f"a run goes on: {who}, since" if running else f"no run goes on; the last one: {who}, began"
    console.print(f"{now} {holder['since']}")
    for name, count in facts["counts"].items():
        console.print(f"{count:>7,} {STATE_WORDS.get(State(name), name)}")
    for title, pairs in lists.items():
        word = "working on" if running and title == "unfinished" else title
        for pair in pairs[:20]:
            why = f"{pair.code}: {pair.error}" if pair.code else STATE_WORDS.get(pair.state, pair.state.value)
            console.print(f"{word}  {pair.email}: {into(pair)}, last {pair.updated}: {why}")
        if len(pairs) > 20:
            console.print(f"{title}  and {len(pairs) - 20:,} more (--status --json has them all)")


def verify_backups(run: RunContext) -> int:
    """Re-read every backup below a folder against its manifest; 1 where one is damaged or missing."""
    root: Path = run.options.verify_backups
    if not root.exists():
        raise FatalError(EXIT_USAGE, f"{root} is not there (yet): no run has made a backup in it")
    if not root.is_dir():
        raise FatalError(EXIT_USAGE, f"{root} is not a folder")
    whole = 0
    damaged: List[str] = []
    for folder in sorted(_backup_folders(root)):
        run.console.status(f"{whole + len(damaged)} backups read ...")
        try:
            verify_backup(folder)
            whole += 1
        except PairError as error:
            damaged.append(str(error))
    run.console.status("")
    begun = [str(left) for left in sorted(root.glob(f"**/{BackupStore.INCOMPLETE}*"))]
    found = {"damaged": damaged, "missing": _missing_backups(run, root), "begun": begun}
    bad = bool(damaged or found["missing"])
    if run.options.json:
        run.console.json([to_json({"folder": str(root), "whole": whole, **found}, indent=1) + b"\n"])
        return EXIT_FAILED if bad else EXIT_OK
    why = {"begun": ": begun and never finished by a run that was killed; may be deleted"}
    for name, lines in found.items():
        for line in lines:
            run.console.print(f"{name.upper():<8} {line}{why.get(name, '')}", "" if name in why else "bad")
    counts = f"{len(damaged)} damaged, {len(found['missing'])} missing"
    run.console.print(f"{plural(whole, 'whole backup')}, {counts}", "bad" if bad else "good")
    return EXIT_FAILED if bad else EXIT_OK


def _backup_folders(root: Path) -> Iterator[Path]:
    """Every folder named like a backup, and `root` itself where it is one."""
    if re.fullmatch(r"\d{8}_\d{6}", root.name) or (root / "manifest.json").exists():
        yield root
    elif not root.name.startswith(BackupStore.INCOMPLETE):
        for folder in root.iterdir():
            yield from _backup_folders(folder) if folder.is_dir() and not folder.is_symlink() else ()


def _missing_backups(run: RunContext, root: Path) -> List[str]:
    """Backups that the savepoint knows of and that are not below `root` any more."""
    path = run.options.savepoint
    if root != Path("backups") or not _has_content(path):
        return []
    with contextlib.closing(SavePoint(path, run.environment, readonly=True)) as savepoint:
        backups = {pair.backup for pair in savepoint.rows(*State) if pair.backup}
        return sorted(backup for backup in backups if not Path(backup).is_dir())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse the command line, do what it says, and return the exit code."""
    options = parse_options(argv)
    os.umask(0o077)
    run = RunContext(options)
    run.console.begin()

    def terminate(number: int, _frame: Any) -> None:
        run.second_signal(number)
        raise KeyboardInterrupt

    run.catch(terminate)
    code = run_command(run)
    before = run.signal
    run.catch(lambda number, _frame: run.second_signal(number))
    failure = run.console.end(lambda: bool(run.signal))
    if failure and code < EXIT_USAGE:
        run.console.error(f"the output could not be written: {failure.strerror or failure}")
        run.console.end(lambda: True)
        code = EXIT_STOPPED
    return 128 + run.signal if run.signal and not before else code


def run_command(run: RunContext) -> int:
    """Do what the options say; whatever ends it early becomes one line and an exit code."""
    try:
        run.open_log()
        run.load_settings()
        work = next((work for name, work in MODES.items() if getattr(run.options, name)), merge)
        return work(run)
    except FatalError as stop:
        run.console.status("")
        run.console.error(str(stop))
        return stop.exit_code
    except OSError as error:
        run.console.status("")
        run.console.error(f"the disk refuses: {error}")
        return EXIT_STOPPED
    except ImportError as error:
        run.console.error(f"the package {error.name} is missing: python -m pip install -r requirements.txt")
        return EXIT_USAGE
    except KeyboardInterrupt:
        run.console.status("")
        run.console.print_err("interrupted; nothing was changed")
        return 128 + (run.signal or signal.SIGINT)


MODES: Dict[str, Callable[[RunContext], int]] = {
    "export": export,
    "undo": undo,
    "preview": preview,
    "choices_template": write_choices_template,
    "check": lambda run: asyncio.run(check(run)),
    "status": status,
    "verify_backups": verify_backups,
    "settle": settle,
}

if __name__ == "__main__":
    exit_code = main()
    for ending in SIGNALS:
        # What is done is done: while Python ends, another signal would change the exit code and nothing else.
        signal.signal(ending, signal.SIG_IGN)
    raise SystemExit(exit_code)
