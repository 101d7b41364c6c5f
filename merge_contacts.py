#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.32.4", "python-dotenv>=1.0.1", "ratelimit>=2.2.1"]
# ///
"""Merge duplicate DevRev contacts, safely.

contacts.csv -> pairs that share an email -> live check -> backup -> integrity check from the disk
-> merge -> external_ref -> verification -> JSON report

A merge in DevRev is asynchronous and can't be undone there. So every step refuses rather than
guesses, and is in the savepoint before its request is sent. `--undo` restores most of a merge from
its backup. `--help` has the options.

Map of this file, roughly bottom-up:

  Errors        FatalError, PairError         what ends a run, what fails a pair
  Text                                        sanitizing, file names, JSON
  Environment   Environment, CancelToken      clocks, disk, threads, network, for a simulation
  CSV           Contact, ContactReader        which rows are contacts
  Detection     detect                        which contact is primary, and by what rule
                check_live                    what DevRev has to say before a group is merged
                State, Pair                   what is known of one merge
  Quota         RequestScheduler.on_response  quota, circuit breaker: where a 429 is handled
  Requests      DevRevAPI._call               retries; one method for each endpoint
  Batches       BatchLoader                   one list call for many contacts
  Backup        write_backup, snapshot_entry  where to add a field to a contact's backup
  Savepoint     SavePoint                     two files with one content; what a crash leaves
  Merge         GroupRun, PairMerge           the order of pairs; a pair's state machine
                ReferenceUpdate               where a reference is set, by merge and undo
                TaskRunner                    what stops a run: failures in a row, signals, disk
                ContactMerger                 the order of groups; what earlier runs left
  Export        ContactExporter               the CSV from DevRev itself
  Undo          PairUndo, UndoRunner          what comes back
  Report        ADVICE, SYSTEMIC              advice for each code; which of them stop a run
                merge_entry, table_row        where to add a field to the report: JSON, CSV
  Console                                     what people see: also Preview and Page
  Command line  RunContext, main              options, settings, a function for each mode

How a pair resumes: SavePoint._join (what two files know of it), ContactMerger._resume (with
what else is known of its primary), PairMerge (from its state on), ContactMerger._poll_cancelled
(given up, and carried out all the same), PairUndo (the same of an undo), settle_pair (ended by a
person). A new state: State and the sets of states beside it, PairMerge, STATE_WORDS,
AUTHORITY (which of two files wins). A new field of a pair: Pair, with a default; rows without it
are read, and rows of other versions keep theirs. What needs more than a default: MIGRATIONS.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The script's folder is no place to import from: requests would try a simplejson.py there.
    _folder = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
    sys.path[:] = [place for place in sys.path if os.path.realpath(place) != _folder]

import argparse
import asyncio
import base64
import bisect
import collections
import contextlib
import csv
import errno
import functools
import gc
import gzip
import hashlib
import html
import importlib
import io
import ipaddress
import json
import logging
import math
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import tempfile
import textwrap
import threading
import time
import unicodedata
import zlib
from array import array
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from itertools import accumulate, chain, combinations, compress, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import (
    Any,
    AsyncIterator,
    Awaitable,
    BinaryIO,
    Callable,
    ClassVar,
    Collection,
    Coroutine,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Sequence,
    TextIO,
    Tuple,
    TypeVar,
)
from urllib.parse import quote, unquote, urlsplit

__version__ = "3.1.0"
SCHEMA = 3  # of every JSON document

SIGNALS = [one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP")]
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_HELD = 0, 1, 2, 3, 11
# In the current folder, as everything that a run writes:
SAVEPOINT = Path("savepoint.db")
BACKUPS = Path("backups")
LOGS = Path("logs")
REPORTS = Path("reports")
SAVEPOINT_COPY = BACKUPS / "savepoint-copy.db"

Json = Dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("merge_contacts")


# --------------------------------------------------------------------------------------------------
# What ends a run, what fails a pair
# --------------------------------------------------------------------------------------------------


class FatalError(Exception):
    """The run can't continue. `exit_code` is one of EXIT_… ."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PermissionDenied(FatalError):
    """DevRev rejects the token (401), or a permission without which the run is pointless (403)."""


class Cancelled(FatalError):
    """The run was told to stop; a request that raises this was not sent."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED, "interrupted")


class PairError(Exception):
    """One group or pair is refused or failed. Scripts branch on `code`, one of ADVICE."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PairSkipped(PairError):
    """A pair is left out of its group, whose other pairs continue; it is no failure."""


class ApiError(PairError):
    """DevRev understood the request and refused it (3xx, 4xx).

    A merge may be carried out all the same.
    """

    def __init__(
        self,
        endpoint: str,
        status: int,
        message: str,
        data: Json,
    ) -> None:
        code = "forbidden" if status == 403 else "api_error"
        super().__init__(code, f"{endpoint} answered {status}: {message}")
        self.status = status
        self.data = data  # of the body

    @property
    def missing(self) -> bool:
        """Whether it says that an object does not exist.

        The 404 of a route has no type, and says nothing of objects.
        """
        return self.status == 404 and self.data.get("type") == "not_found"


class PreconditionsExpired(Exception):
    """A request was not sent, because what it rests on was read too long ago."""


class NoUsableResponse(PairError):
    """No usable answer came: only a later read can tell whether the request was carried out."""

    def __init__(self, endpoint: str, message: str) -> None:
        super().__init__("api_error", f"{endpoint} gave no usable answer: {message}")


# What reading an answer of another shape raises. One contact's answer fails its own pair or group;
# the others continue.
ODD_ANSWER = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


def odd_answer(email: str, error: Exception) -> PairError:
    """Log where an answer could not be understood, and return the problem of its group.

    Call it in the handler.
    """
    log.exception("%s: unexpected", email)
    why = f"{type(error).__name__}: {error}"
    return PairError("api_error", f"an answer could not be understood ({why})")


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def escape_unprintable(text: str) -> str:
    """Escape what a terminal could act on: controls, line breaks, bidi marks, lone surrogates."""

    def shown(character: str) -> str:
        if character.isprintable():
            return character
        return character.encode("unicode_escape").decode("ascii")

    return "".join(map(shown, text))


def plural(count: int, noun: str) -> str:
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """Render seconds for people: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def some(words: Sequence[str], most: int = 5) -> list[str]:
    """Return the first `most` words, and how many more there are."""
    if len(words) <= most:
        return list(words)
    return [*words[:most], f"and {len(words) - most:,} more"]


def minute(instant: str) -> str:
    """Return an instant of `iso` as a person reads it."""
    return f"{instant[:16].replace('T', ' ')} UTC"


def iso(epoch: float) -> str:
    """Epoch seconds as UTC, `2025-01-31T12:00:00.000+00:00`."""
    return datetime.fromtimestamp(epoch, timezone.utc).isoformat(timespec="milliseconds")


_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])$", re.IGNORECASE)


def safe_name(text: str) -> str:
    """Turn any text into one path component that means the same on Linux, macOS and Windows.

    Everything but letters, digits and `@ . _ + -` of ASCII is percent-encoded, so that two texts
    never share a name. Names that Windows reserves are encoded too, and long names end in a hash of
    the full text.
    """
    name = quote(text, safe="@+", errors="surrogatepass").replace("~", "%7E")
    if name.startswith((".", "-")) or _RESERVED.match(name.split(".")[0]):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if name.endswith("."):
        name = name[:-1] + "%2E"
    if len(name) > 80:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        name = f"{name[:63]}~{digest[:16]}"
    return name or "%"


def encodable(text: str) -> str:
    """Escape lone surrogates in `text`, which no column of a database can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Encode as UTF-8 JSON. A lone surrogate, which UTF-8 can't hold, stays an escape of JSON."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


# --------------------------------------------------------------------------------------------------
# Environment: clocks, disk, threads, network
# --------------------------------------------------------------------------------------------------


class Timestamp(NamedTuple):
    """A point in time on two clocks: sleep stops the monotonic one, a user may set the other."""

    wall: float  # epoch seconds
    monotonic: float  # monotonic seconds


class HttpResponse(NamedTuple):
    """The outcome of one request."""

    status: int | None  # None: no answer
    headers: Mapping[str, str]
    data: Json | None  # the JSON object in the body; None where there is no complete one
    problem: str = ""  # in words
    sent: bool = True  # whether the request may have reached DevRev


class Environment:
    """All that a run touches beyond its own memory, so that a simulation can stand in its place."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.random = random.Random()
        self._transport: HttpTransport | None = None
        self._warned: set[str] = set()  # what `tolerate` has said

    def now(self) -> Timestamp:
        return Timestamp(time.time(), time.monotonic())

    def age(self, since: Timestamp) -> float:
        """Seconds since then by the clock that advanced further: how old a read may be at most."""
        now = self.now()
        return max(now.wall - since.wall, now.monotonic - since.monotonic)

    def elapsed(self, since: Timestamp) -> float:
        """Monotonic seconds since then: a wall clock that is set back would make a wait longer."""
        return self.now().monotonic - since.monotonic

    def run_event_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    async def post(
        self,
        endpoint: str,
        body: Json,
        deadline: float | None = None,
    ) -> HttpResponse:
        """POST one request, and return within `deadline` seconds, with a complete answer or not.

        The deadline is ten times `timeout` at most.
        """
        self._transport = self._transport or HttpTransport(self.settings)
        limit = min(deadline or math.inf, 10 * self.settings.timeout)
        work = self.run_in_thread(self._transport.post, endpoint, body, limit)
        try:
            return await asyncio.wait_for(work, limit)  # and leave its thread alone
        except asyncio.TimeoutError:
            log.debug("%s -> no complete answer in %g s", endpoint, limit)
            return HttpResponse(None, {}, None, f"not complete within {limit:g} s")

    async def run_in_thread(self, job: Callable[..., T], *args: Any) -> T:
        """Have a daemon thread of its own do what blocks, so that it never delays the exit."""
        loop = asyncio.get_event_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                outcome = functools.partial(future.set_result, job(*args))
            except BaseException as error:
                outcome = functools.partial(future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: future.done() or outcome())

        threading.Thread(target=work, daemon=True).start()
        return await future

    def create_file(self, path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
        """Create `path` (0600) from `chunks`, flush it to the disk; return its size and SHA-256."""
        size = 0
        digest = hashlib.sha256()
        with create_anew(path) as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            self.fsync_file(file)
        return size, digest.hexdigest()

    def rename_into_place(self, aside: Path, final: Path) -> None:
        """Rename `aside` to `final`, in one step that survives a power cut."""
        for pause in (0.1, 0.4, 1.6, 0.0):
            try:
                os.replace(str(aside), str(final))
                break
            except PermissionError:
                # A virus scanner on Windows may hold a new file for a moment.
                if os.name != "nt" or not pause:
                    raise
                time.sleep(pause)
        self.fsync_dir(final.parent)

    def write_atomically(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write a temporary file and rename it to `path`; an OSError leaves nothing behind."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.unlink(missing_ok=True)
            self.create_file(aside, chunks)
            self.rename_into_place(aside, path)
        except (OSError, FatalError):
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def open_database(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri,
            uri=True,
            isolation_level=None,
            timeout=0,
            check_same_thread=False,
        )

    def fsync_file(self, file: Any) -> None:
        file.flush()
        os.fsync(file.fileno())

    def fsync_dir(self, folder: Path) -> None:
        """Make a rename or a new name in `folder` survive a power cut (Windows does so by itself).

        SMB, FUSE and WSL mounts can't flush a folder; their files are flushed all the same, so one
        warning is enough.
        """
        if os.name == "nt":
            return
        what = f"{folder}: this file system can't flush a folder"
        with self.tolerate(what, "a power cut may lose new names"):
            handle = os.open(str(folder), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def make_private_dir(self, path: Path) -> Path:
        """Create `path` and its missing parents, open to their owner alone.

        A link is followed. Raises OSError, and FatalError(2) where a folder is a stranger's.
        """
        for folder in [*reversed(path.parents), path]:
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                self.fsync_dir(folder.parent)
            if folder != Path() and not folder.is_absolute():
                check_owner(folder)
            if folder in (BACKUPS, LOGS, REPORTS):
                self._close_to_others(folder)
        return path

    def _close_to_others(self, folder: Path) -> None:
        """Set the mode of a folder of this user's that others may write, or read if it has backups.

        A clone under umask 002 has such folders. A link's target is left as it is.
        """
        mine = folder.lstat()
        others = 0o077 if folder == BACKUPS else 0o022
        is_link = stat.S_ISLNK(mine.st_mode)
        if os.name == "nt" or is_link or mine.st_uid != os.geteuid() or not mine.st_mode & others:
            return
        result = "other users of this machine may be able to use it"
        with self.tolerate(f"{folder}: its permissions can't be set", result):
            folder.chmod(0o700)
            if folder.stat().st_mode & others:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            if mine.st_mode & 0o022:
                log.warning("others could write to %s; it is open to you alone now", folder)

    @contextlib.contextmanager
    def tolerate(self, what: str, result: str) -> Iterator[None]:
        """Warn once of what a file system can't do and need not be able to do.

        Any other error is raised.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            if result not in self._warned:
                self._warned.add(result)
                log.warning("%s (%s), so %s", what, error.strerror, result)


# What a file system answers that has no such operation, or that has it for the owner alone.
NOT_SUPPORTED = (
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF,
    errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
)  # fmt: skip
# Flags of os.open, as far as this system has them.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
CREATE_ANEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK


def create_anew(path: Path) -> BinaryIO:
    """Create a file (0600) for writing. What is there already, also a link, is an OSError."""
    return open(os.open(str(path), CREATE_ANEW, 0o600), "wb")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; anything else (link, pipe, device) is an OSError, at once."""
    # A pipe without a writer would block without O_NONBLOCK.
    handle = os.open(str(path), os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(handle, "rb")


def check_owner(path: Path, folder: Path = Path()) -> None:
    """Raise FatalError(2) where a stranger owns `path`, or the link that stands there.

    Accepted are this user, root and the owner of `folder`, by default the current one.
    """
    if os.name == "nt":
        return
    accepted = (os.geteuid(), 0, folder.stat().st_uid)
    for found in (path.lstat(), path.stat()):
        if found.st_uid not in accepted:
            words = (
                f"{path} belongs to another user (number {found.st_uid}), who could have made it"
            )
            fix = f"sudo chown -h {os.geteuid()} {shlex.quote(str(path))}"
            raise FatalError(EXIT_USAGE, f"{words} to mislead you; if it is yours: {fix}")


def locks_work(path: Path) -> bool:
    """Try whether files beside `path` can be locked.

    A database on a file system without locks looks held or damaged. SQLite tries it on a new file,
    which no other process has. Where none can be created, nothing is known: True.
    """
    trial = path.resolve().with_name(f".lock_trial.{os.getpid()}")
    try:
        trial.unlink(missing_ok=True)
        create_anew(trial).close()
        with contextlib.closing(sqlite3.connect(str(trial), timeout=0)) as database:
            database.execute("BEGIN EXCLUSIVE")
        return True
    except (OSError, sqlite3.Error) as error:
        log.info("%s: a trial lock failed: %s", path, error)
        return isinstance(error, OSError)
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


NO_LOCKS = "this file system has no working locks; run in a folder on a local disk"


def parse_body(status: int, content: bytes, settings: ApiSettings) -> tuple[Json | None, str]:
    """Return the JSON object in a body, and in words what is wrong.

    HTML of a gateway is no answer of DevRev's.
    """
    data = None
    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(content)
    if not isinstance(data, dict):
        return None, f"{status} without a JSON object: not DevRev's, but a proxy's or firewall's?"
    if 200 <= status < 300:
        return data, ""
    words = " ".join(str(data[name]) for name in ("message", "detail") if data.get(name))
    return data, settings.mask(words)[:500] or f"status {status}"


class HttpTransport:
    """HTTPS to DevRev over persistent connections; blocks, and may be used by many threads."""

    MAX_BODY = 64 << 20  # bytes; a list of a hundred objects has some hundred thousand
    CHUNK = 1 << 16

    def __init__(self, settings: ApiSettings) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self.settings = settings
        self.session = session = requests.Session()
        # It would read the body of a redirect, which is not followed, without any limit.
        session.resolve_redirects = lambda *_args, **_more: iter(())  # type: ignore[method-assign]
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=settings.workers + 4, max_retries=0)
        session.mount(settings.base_url, adapter)
        self._headers = {
            "Authorization": f"Bearer {settings.token}",
            "User-Agent": f"merge_contacts/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        # Proxy and CA bundle are asked for once, and never a proxy for plain http on loopback.
        # There are no credentials to take from ~/.netrc.
        session.trust_env = settings.base_url.startswith("https:")
        found = session.merge_environment_settings(
            settings.base_url,
            {},
            None,
            None,
            None,
        )
        session.proxies = found["proxies"]
        session.verify = found["verify"]
        session.trust_env = False

    def post(
        self,
        endpoint: str,
        body: Json,
        limit: float,
    ) -> HttpResponse:
        """POST once, and read the answer until it is complete or `limit` seconds are over."""
        import requests
        from urllib3.exceptions import HTTPError

        started = time.monotonic()
        silence = min(self.settings.timeout, limit)
        response = HttpResponse(None, {}, None)
        try:
            url = f"{self.settings.base_url}/{endpoint}"
            # Prepared without the session, which would look for cookies, hooks and credentials.
            prepared = requests.Request("POST", url, data=to_json(body), headers=self._headers)
            timeouts = (min(10.0, silence), silence)
            with self.session.send(
                prepared.prepare(), timeout=timeouts, allow_redirects=False, stream=True
            ) as answer:
                response = HttpResponse(answer.status_code, answer.headers, None)
                data, problem = self._read(answer, started + limit)
                response = response._replace(data=data, problem=problem)
        except (OSError, ValueError, HTTPError) as error:  # of requests, or below it
            response = self._explained(response, error)
        seconds = time.monotonic() - started
        said = (response.status, seconds, response.problem)
        log.debug("%s %.200s -> %s in %.3f s %s", endpoint, body, *said)
        return response

    def _read(self, answer: Any, deadline: float) -> tuple[Json | None, str]:
        """Read a body, as `parse_body` does. urllib3 would decode it without a limit.

        No encoding was asked for, but a gateway may compress all the same.
        """
        content = bytearray()
        encoding = answer.headers.get("Content-Encoding", "").strip().lower()
        decoder = zlib.decompressobj(32 + zlib.MAX_WBITS)  # of gzip and deflate
        try:
            for chunk in answer.raw.stream(self.CHUNK, decode_content=False):
                if encoding not in ("", "identity"):
                    chunk = decoder.decompress(chunk, self.MAX_BODY + 1)
                content += chunk
                # A body in small pieces is never silent.
                if len(content) > self.MAX_BODY or time.monotonic() > deadline:
                    raise ValueError(f"no end within {self.MAX_BODY >> 20} MiB and the deadline")
        except (ValueError, zlib.error) as error:
            return None, f"{answer.status_code} with a body that can't be used: {error}"
        return parse_body(answer.status_code, bytes(content), self.settings)

    # How exceptions of the library name a request that can't have reached DevRev.
    NOT_SENT = re.compile(
        "NewConnectionError|NameResolution|ConnectTimeout|Tunnel connection failed"
    )

    def _explained(self, response: HttpResponse, error: Exception) -> HttpResponse:
        """Give the library's own reason, and say whether the request may have reached DevRev."""
        words = repr(error)
        reason: BaseException = error
        inner: BaseException | None = error
        while inner:
            if isinstance(inner, OSError):  # of OpenSSL or the system, or of requests itself
                reason = inner
            inner = inner.__cause__ or inner.__context__
        text = re.sub(r"//\S*@", "//", str(reason)) or type(reason).__name__
        if "URL(" in words:
            text = text.partition(": ")[0]  # what follows may be the password of a proxy
        sent = not self.NOT_SENT.search(words)
        return response._replace(problem=text, sent=sent)


class CancelToken:
    """Ends a run: once it is cancelled, all that waits or would wait raises Cancelled.

    No request leaves any more.
    """

    def __init__(self) -> None:
        self.stop: FatalError | None = None
        # Tasks that an interruption does not end.
        self._shielded: set[asyncio.Future[Any] | None] = set()
        # What is waited for, in the order in which it came; True: by a shielded task.
        self._waiting: dict[asyncio.Future[Any], bool] = {}

    def cancel(self, stop: FatalError) -> None:
        """Stop for this reason. The first one counts, unless it is a mere interruption."""
        if self.stop is None or isinstance(self.stop, Cancelled):
            self.stop = stop
        for future, is_shielded in list(self._waiting.items()):
            if not future.done() and not (is_shielded and isinstance(self.stop, Cancelled)):
                future.set_exception(Cancelled())

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Let the current task finish the block in spite of an interruption; other stops end it."""
        task = asyncio.current_task()
        self._shielded.add(task)
        try:
            self.raise_if_cancelled()
            yield
        finally:
            self._shielded.discard(task)

    def _is_shielded(self) -> bool:
        return bool(self._shielded) and asyncio.current_task() in self._shielded

    def raise_if_cancelled(self) -> None:
        if self.stop and not (isinstance(self.stop, Cancelled) and self._is_shielded()):
            raise Cancelled()

    def future(self) -> asyncio.Future[Any]:
        """A future to wait for, which a cancellation ends."""
        self.raise_if_cancelled()
        future: asyncio.Future[Any] = asyncio.get_event_loop().create_future()
        self._waiting[future] = self._is_shielded()
        future.add_done_callback(self._waiting.pop)
        return future

    async def wait(self, work: Awaitable[Any]) -> None:
        """Wait for `work`; a cancellation ends the wait, and `work` with it."""
        task = asyncio.ensure_future(work)
        stopped = self.future()
        await asyncio.wait({stopped, task}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            task.cancel()
            stopped.result()
        stopped.cancel()

    async def sleep(self, seconds: float) -> None:
        await self.wait(asyncio.sleep(max(0.0, seconds)))


async def together(*works: Awaitable[Any]) -> list[Any]:
    """Return the results of all; a failure is raised once all have ended."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --------------------------------------------------------------------------------------------------
# Contacts: the CSV export
# --------------------------------------------------------------------------------------------------

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
MAX_TEXT = 1000  # characters of a name or an address that are normalised: it takes quadratic time
# So many invalid rows are named, and of each reason some, however many others come before: with the
# seven reasons of INVALID_ROWS at most a thousand. More are only counted.
MAX_INVALID_ROWS = 860
MAX_OF_A_KIND = 20
# `4.0` is what a spreadsheet makes of 4. Three zeros may be thousands: `1.000` is not guessed.
_COUNT = re.compile(r"[0-9]{1,18}(?:\.0{1,2})?")
# A date as a warehouse or a spreadsheet writes it, in whichever order.
_DATE = re.compile(r"(\d{4}[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.]\d{4})(?!\d)")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # how a cell begins that a spreadsheet takes for a formula
# Where spreadsheets of half of Europe split a cell, and the rest would be a formula.
_SPLIT = re.compile(r"([;\t\r\n])(?=[\"']*[=+\-@\t\r])")
_ADDRESS = re.compile(r"[^@,;<>\"\s]+@[^@,;<>\"\s]+")
# Invisible beside the categories Cc, Cf, Zs, Zl and Zp: blank letters and variation selectors.
_BLANK = re.compile(
    "[ \u115f\u1160\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_PUNYCODE = re.compile(r"(?<=[@.])xn--([^@.]+)")
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_NULL_IDS = frozenset(("\\N", "NULL", "null", "nan", "NaN", "None", "none"))
# Id, email, reference and count of a row, a line each, that need no closer look: no blanks, no
# apostrophe in front, common letters alone. Nearly all of a million rows are so.
_LETTERS = r"[!#-+\--:=?A-Z\[-~\u00c0-\u052f\u3041-\u30ff\u4e00-\u9fff\uac00-\ud7a3]{1,400}"
_PLAIN_ROW = re.compile(rf"(don:\S+)\n(?!')({_LETTERS}@{_LETTERS})\n([^\s']\S*)\n[0-9]{{1,18}}")


@functools.lru_cache(maxsize=10_000)
def parse_count(cell: str) -> int | None:
    """Return the count that a cell holds, None where it holds none or where that is a guess."""
    text = cell.strip()
    return int(text.partition(".")[0]) if _COUNT.fullmatch(text) else None


def trimmed_text(cell: str) -> str:
    """Return a cell without white space around it and without the apostrophe of `guard_cell`."""
    text = cell.lstrip()
    if text[:1] == "'" and _FORMULA.match(text, 1):
        text = text[1:]
    return text.strip()


def email_key(text: str) -> str:
    """Return what emails are compared by: trimmed, the ASCII letters lower-cased, no more folded.

    `straße@` and `strasse@` are two mailboxes, though every kind of case folding makes them one.
    """
    text = text.strip()
    return text.lower() if text.isascii() else text.translate(_ASCII_LOWER)


def loose_key(text: str) -> str:
    """Return what look-alikes of an email have in common: its first characters, normalised,
    case-folded, without punycode and without invisible characters.

    It only ever leaves contacts out; it never joins any.
    """
    key = _fold(text.strip()[:MAX_TEXT])
    return _fold(_PUNYCODE.sub(_decode_label, key)) if "xn--" in key else key


def _decode_label(label: re.Match[str]) -> str:
    """Return a label of a domain without punycode."""
    with contextlib.suppress(ValueError, OverflowError):
        return label.group(1).encode("ascii").decode("punycode")
    return label.group()


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded if is_visible(folded) else "".join(filter(is_visible, folded))


def is_visible(text: str) -> bool:
    """Whether `text` holds no white space and no control or invisible character."""
    if _BLANK.search(text):
        return False
    invisible = ("Cc", "Cf", "Zs", "Zl", "Zp")
    return text.isprintable() or not any(unicodedata.category(one) in invisible for one in text)


@dataclass
class Contact:
    """One row of the export: each field is one of its COLUMNS.

    `id` is the contact's DON (`don:identity:dvrv-us-1:devo/<ORG>:revu/<KEY>`), `tickets` the
    warehouse's TICKET_COUNT: the greatest of the tickets and issues that the contact owns, has
    created and has reported.
    """

    __slots__ = tuple(COLUMNS)  # of a million rows, a hundred thousand may be held

    SYSTEM_PREFIX: ClassVar[str] = "REVU-"
    user_prefix: ClassVar[str] = "user_"  # of the user's own application: a setting

    id: str
    display_name: str
    email: str
    external_ref: str
    full_name: str
    tickets: int
    created: str
    updated: str

    def to_json(self) -> Json:
        return {name: getattr(self, name) for name in COLUMNS}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Contact:
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
    def takes_part(self) -> bool:
        return self.is_user or self.is_system

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
        """What to call the contact: the first of both names and the short id that is not empty."""
        return self.display_name.strip() or self.full_name.strip() or self.short_id

    @property
    def organisation(self) -> str:
        return organisation_of(self.id)


def check_user_prefix(text: str) -> str:
    """Return the prefix that a setting names, the default where it is empty.

    Raises FatalError(2) where a reference could be of both kinds.
    """
    prefix = text.strip() or "user_"
    if prefix.startswith(Contact.SYSTEM_PREFIX) or Contact.SYSTEM_PREFIX.startswith(prefix):
        words = f"DEVREV_USER_REF_PREFIX {prefix} overlaps with {Contact.SYSTEM_PREFIX}"
        raise FatalError(EXIT_USAGE, f"{words}: name the application's own prefix")
    return prefix


def email_of(user: Json) -> str:
    return email_key(str(user.get("email") or ""))


def live_reference(user: Json) -> str:
    """Return the reference that DevRev shows, trimmed as the CSV's are, to be compared."""
    return str(user.get("external_ref") or "").strip()


def contact_of(user: Json) -> Contact:
    """The row of a `rev_user`; its tickets are not counted yet."""
    texts: dict[str, Any] = {name: str(user.get(name) or "") for name in COLUMNS}
    texts["external_ref"] = live_reference(user)
    texts["tickets"] = 0
    texts["created"] = str(user.get("created_date") or "")
    texts["updated"] = str(user.get("modified_date") or "")
    return Contact(**texts)


_ORGANISATION = re.compile(r"don:[a-z_]+:(dvrv-[^:]+:devo/[^:]+):")


def organisation_of(don: str) -> str:
    """Return the `dvrv-…:devo/<ORG>` in every id of one DevRev organisation, or `""`."""
    match = _ORGANISATION.match(don)
    return match.group(1) if match else ""


class InvalidRow(NamedTuple):
    """A row that is left out. `code` groups the reasons: one of INVALID_ROWS."""

    file: str
    line: int
    code: str
    reason: str
    email: str | None


INVALID_ROWS = {
    "fields": "not as many fields as the header",
    "nul": "a NUL character, or U+FDD0",
    "stray_quote": "a quoted field holds other rows",
    "empty": "an empty id, address or reference",
    "email": "not one plain address",
    "count": "not a count",
    "conflict": "one id with different data",
}


@dataclass
class CsvContents:
    """What matters of a CSV: rows whose email or id recurs, or whose email was requested."""

    contacts: list[Contact] = field(default_factory=list)  # each row once, also conflicting ones
    contacts_read: int = 0
    invalid_rows: list[InvalidRow] = field(default_factory=list)  # some, by file and line
    invalid_counts: collections.Counter[str] = field(default_factory=collections.Counter)  # by code
    emails_in_invalid_rows: set[str] = field(default_factory=set)  # loose keys: their groups are
    look_alikes: list[Json] = field(default_factory=list)  # not known to be complete
    other_refs: int = 0  # contacts that take no part because of their reference
    other_ref: str = ""  # one of these references
    passed_over: list[str] = field(default_factory=list)  # files, and why

    @property
    def invalid_count(self) -> int:
        return sum(self.invalid_counts.values())

    def leave_out(self, row: InvalidRow, keys: Iterable[str]) -> None:
        """Count an invalid row, and name it unless very many are named already.

        Without it the groups of these loose keys may not be complete.
        """
        self.emails_in_invalid_rows.update(keys)
        self.invalid_counts[row.code] += 1
        is_rare = self.invalid_counts[row.code] <= MAX_OF_A_KIND
        if is_rare or len(self.invalid_rows) < MAX_INVALID_ROWS:
            self.invalid_rows.append(row)


_NUL_MARK = "\ufdd0"  # a noncharacter: the csv module of Python 3.8 to 3.10 can't read a NUL
FileIdentity = Tuple[int, ...]


class _MarkedBytes(io.BufferedReader):
    """A file that holds a mark for each NUL."""

    has_nul = False

    def read1(self, size: int = -1) -> bytes:
        data = super().read1(size)
        if b"\0" in data:
            self.has_nul = True
            data = data.replace(b"\0", _NUL_MARK.encode())
        return data


class CsvTable:
    """A CSV, plain or gzip."""

    def __init__(self, file: int, identity: FileIdentity) -> None:
        self.identity = identity
        self.width = 0  # fields of the header
        self.places: Sequence[int] = ()  # of the wanted columns
        self.ended = 0  # the last line of the last row
        self._file = file
        self._is_packed = False
        self._is_packed = self._open().read(2) == b"\x1f\x8b"
        head = self._open().read(1 << 16)
        for pattern, what in FOREIGN_FILES:
            if re.match(pattern, head, re.DOTALL):
                where = "in the gzip file: " if self._is_packed else ""
                raise FatalError(EXIT_USAGE, where + what)
        # Of the first line that does not consist of blank cells.
        first = re.split(rb"[\r\n]", head.lstrip(b"\xef\xbb\xbf ,;\t\r\n"))[0]
        self.delimiter = ","
        if b"," not in first and (b";" in first or b"\t" in first):
            self.delimiter = ";" if b";" in first else "\t"
        self.bytes = self._open()
        self.text = _text(self.bytes)
        self.rows = csv.reader(self.text, delimiter=self.delimiter, strict=True)

    def _open(self) -> _MarkedBytes:
        """Return the file from its beginning."""
        raw = io.FileIO(self._file, closefd=False)
        raw.seek(0)
        unpacked: Any = gzip.GzipFile(fileobj=raw) if self._is_packed else raw
        return _MarkedBytes(unpacked)

    def read_header(self, wanted: Iterable[str]) -> None:
        """Find the wanted columns, none in an empty file. Raises FatalError(2) naming what is
        missing or doubled."""
        header: list[str] = []
        for row in self.rows:
            if any(map(str.strip, row)):
                header = row
                break
        names = [name.strip().upper() for name in header]
        if not names:
            return
        if any("\n" in name or "\r" in name for name in names):
            raise FatalError(EXIT_USAGE, "a line break in the header (a stray quote?)")
        missing = [name for name in wanted if name not in names]
        if missing:
            found = textwrap.shorten(", ".join(names), 300, placeholder=" ...")
            words = f"no column {', '.join(missing)} (found: {found})"
            raise FatalError(EXIT_USAGE, words)
        doubled = [name for name in wanted if names.count(name) > 1]
        if doubled:
            raise FatalError(EXIT_USAGE, f"the column {doubled[0]} is there twice")
        self.ended = self.rows.line_num
        self.width = len(header)
        self.places = [names.index(name) for name in wanted]

    def texts(self, row: Sequence[str]) -> dict[str, str]:
        """Return the trimmed cells of COLUMNS by field."""
        return {name: trimmed_text(row[place]) for name, place in zip(COLUMNS, self.places)}

    def rows_of(self, wanted: Iterator[int]) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows on the wanted lines behind the header, each with its last line."""
        line = 0

        def lines() -> Iterator[str]:
            nonlocal line
            for number, text in compress(enumerate(self.text, self.ended + 1), wanted):
                line = number
                yield text

        for row in csv.reader(lines(), delimiter=self.delimiter, strict=True):
            yield line, row

    def describe_error(self, error: csv.Error) -> str:
        """Say which line is not well-formed, and why."""
        line = self.rows.line_num
        for number, text in enumerate(islice(_text(self._open()), line), 1):
            if number > self.ended and '\\"' in text:
                hint = "a backslash escapes a quote; unload with doubled quotes"
                return f"line {number}: {hint}"
        return f"line {line}: {error}"


def _text(source: _MarkedBytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(source, encoding="utf-8-sig", newline="")


@contextlib.contextmanager
def open_table(
    path: Path, wanted: Iterable[str], before: FileIdentity | None = None
) -> Iterator[CsvTable]:
    """Open a CSV with the `wanted` columns, at a second reading with the identity of the first.

    Whatever goes wrong inside becomes FatalError(2), one line with the path.
    """
    csv.field_size_limit(MAX_CELL)
    table: CsvTable | None = None
    problem = ""
    try:
        if path.is_dir():
            example = path / "part-1.csv"
            hint = f"a folder, not a file; name the files in it: {example} ..."
            raise FatalError(EXIT_USAGE, hint)
        identity = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")
        with open(path, "rb", buffering=0) as raw:
            opened = before or identity(os.fstat(raw.fileno()))
            try:
                table = CsvTable(raw.fileno(), opened)
                table.read_header(wanted)
                yield table
            except csv.Error as error:
                where = table.describe_error(error) if table else error
                problem = f"not a well-formed CSV: {where}"
            finally:
                if identity(os.fstat(raw.fileno())) != opened:
                    changed = "changed while it was being read; wait for the export to finish"
                    raise FatalError(EXIT_USAGE, changed)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        problem = "the gzip file is cut off or damaged; fetch it again"
    except OSError as error:
        problem = f"can't be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason}); export the CSV as UTF-8"
    except FatalError as stop:
        raise FatalError(stop.exit_code, f"{path}: {stop}") from None
    if problem:
        raise FatalError(EXIT_USAGE, f"{path}: {problem}")


FOREIGN_FILES = (
    (rb"\x1f\x8b", "gzip inside gzip; unpack it first"),
    (
        rb"PK[\x03\x05\x07]|\xd0\xcf\x11\xe0",
        "a ZIP archive or an Excel workbook; unpack it, or save it as CSV UTF-8",
    ),
    (
        rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff|\0{1,3}[^\0]\0|[^\0]\0{1,3}[^\0]\0",
        "UTF-16 or UTF-32; export the CSV as UTF-8",
    ),
    (rb"PAR1", "a Parquet file; export the table as CSV"),
    (
        rb"(?i:(\xef\xbb\xbf)?\s*(<!doctype html|<html))",
        "a web page (HTML), not a CSV; was the download a login page?",
    ),
    (rb".{0,31}[\0-\x08\x0e-\x1f]", "a binary file, not a CSV"),
)


class ContactReader:
    """Reads the parts of an export as one, each file twice, to hold few of very many rows: once to
    check the rows and to count addresses and ids, and once to keep the rows that matter.

    In between a hash stands for a value, so that a million rows cost tens of megabytes; two values
    of one hash do no harm.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.contents = CsvContents()
        self.keys = array("q")  # of each line the hash of its row's loose key, and that of its id;
        self.ids = array("q")  # -1, which no hash is, where the row is left out
        self.odd: set[str] = set()  # loose keys of rows whose own key is another
        self.tables: list[tuple[Path, FileIdentity]] = []
        self.variants: dict[str, list[tuple[str, int, Contact]]] = {}  # id -> its different rows

    def read(self, emails: Iterable[str] = ()) -> CsvContents:
        """Read all; of `emails` every row is stored, of others those that recur.

        Raises FatalError(2) where a file can't be read, is no UTF-8 CSV or lacks a column, and
        where there are invalid rows and no other.
        """
        contents = self.contents
        files = list(map(str, self.paths))
        for path in self.paths:
            with open_table(path, COLUMNS.values()) as table:
                if table.width:
                    self._check_rows(table, str(path))
                    self.tables.append((path, table.identity))
                else:
                    contents.passed_over.append(f"{path}: the file is empty; it was passed over")
        if not self.tables:
            raise FatalError(EXIT_USAGE, f"{', '.join(some(files, 3))}: the file is empty")
        self._store_rows(self._rows_that_matter(emails))
        self._find_conflicts()
        contents.invalid_rows.sort(key=lambda row: (files.index(row.file), row.line))
        if contents.invalid_rows and not contents.contacts_read:
            count = plural(contents.invalid_count, "invalid row")
            reasons = [
                f"{row.file}, line {row.line}: {row.reason}" for row in contents.invalid_rows
            ]
            raise FatalError(EXIT_USAGE, f"no usable row, {count}: {'; '.join(some(reasons, 3))}")
        return contents

    def _check_rows(self, table: CsvTable, file: str) -> None:
        """Take the keys of a file's rows, and leave the bad rows out."""
        places = dict(zip(COLUMNS, table.places))
        pick = itemgetter(*(places[name] for name in ("id", "email", "external_ref", "tickets")))
        prefixes = (Contact.SYSTEM_PREFIX, Contact.user_prefix)
        contents = self.contents
        rows = table.rows
        match = _PLAIN_ROW.fullmatch
        is_normal = unicodedata.is_normalized
        add_key = self.keys.append
        add_id = self.ids.append
        for row in rows:
            lines = rows.line_num - table.ended
            table.ended = rows.line_num
            is_plain = lines == 1 and not table.bytes.has_nul
            found = None
            if is_plain and len(row) == table.width:
                found = match("\n".join(pick(row)))
            if found:
                identity, email, reference = found.groups()
            else:
                code, reason = row_error(table, row, is_plain)
                if reason:
                    self._leave_out(table, file, row, code, reason)
                if code:
                    self.keys.extend([-1] * lines)
                    self.ids.extend([-1] * lines)
                    continue
                identity, email, reference = map(trimmed_text, pick(row)[:3])
            key = email.lower()
            is_folded = email.isascii() or (email == email.casefold() and is_normal("NFKC", email))
            if not (found and is_folded) or "xn--" in key:
                key = loose_key(email)
                if key != email_key(email):
                    self.odd.add(key)
            for _ in range(lines):
                add_key(hash(key))
                add_id(hash(identity))
            contents.contacts_read += 1
            if not reference.startswith(prefixes):
                contents.other_refs += 1
                contents.other_ref = contents.other_ref or reference

    def _leave_out(
        self,
        table: CsvTable,
        file: str,
        row: Sequence[str],
        code: str,
        reason: str,
    ) -> None:
        """Note a bad row, and the addresses in it: their groups may not be complete.

        Its cells may be shifted, so that any may hold its address. Where they are not, only EMAIL
        counts: a contact's name is of its own choice, and must not spoil other people's groups.
        """
        place = table.places[list(COLUMNS).index("email")]
        email = row[place:][:1]
        text = trimmed_text("".join(email)).replace(_NUL_MARK, "")[:320]
        is_in_place = code not in ("fields", "stray_quote") and is_unshifted(table, row)
        keys = loose_keys_in(email if is_in_place else row)
        self.contents.leave_out(InvalidRow(file, table.ended, code, reason, text or None), keys)

    def _rows_that_matter(self, emails: Iterable[str]) -> Iterator[tuple[str, int, Contact]]:
        """Yield the contacts whose address or id recurs, or whose address is requested; and those
        of several lines, each of which counts."""
        requested = chain(map(loose_key, emails), self.contents.emails_in_invalid_rows)
        keys = repeated(self.keys).union(map(hash, requested))
        ids = repeated(self.ids)
        wanted = iter(bytes(key in keys or one in ids for key, one in zip(self.keys, self.ids)))
        for path, identity in self.tables:
            with open_table(path, COLUMNS.values(), identity) as table:
                for line, row in table.rows_of(wanted):
                    texts: dict[str, Any] = table.texts(row)
                    texts["tickets"] = parse_count(texts["tickets"])
                    yield str(path), line, Contact(**texts)

    def _store_rows(self, rows: Iterable[tuple[str, int, Contact]]) -> None:
        """Take each row once, and find the look-alikes among all of them."""
        contents = self.contents
        similar: dict[str, set[tuple[str, str, int]]] = collections.defaultdict(set)
        for row in contents.invalid_rows:
            if row.email and "@" in row.email:
                similar[loose_key(row.email)].add((row.email, row.file, row.line))
        odd = self.odd.union(similar)
        for file, line, contact in rows:
            if odd and contact.takes_part and loose_key(contact.email) in odd:
                similar[loose_key(contact.email)].add((contact.email, file, line))
            variants = self.variants.setdefault(contact.id, [])
            if all(contact != other for _, _, other in variants):
                variants.append((file, line, contact))
                contents.contacts.append(contact)
                continue
            contents.contacts_read -= 1
            if not contact.takes_part:
                contents.other_refs -= 1
        for _, found in sorted(similar.items()):
            emails = sorted({email_key(email) for email, _, _ in found})
            if len(emails) > 1:
                lines = [
                    {"email": email, "file": file, "line": line}
                    for email, file, line in sorted(found)
                ]
                contents.look_alikes.append({"emails": emails, "lines": lines})

    def _find_conflicts(self) -> None:
        """Rows of one id that differ are invalid."""
        for variants in self.variants.values():
            if len(variants) == 1:
                continue
            places = some([f"{file}, line {line}" for file, line, _ in variants])
            reason = f"one {COLUMNS['id']} with different data: {'; '.join(places)}"
            for file, line, contact in variants:
                invalid = InvalidRow(file, line, "conflict", reason, contact.email[:320])
                self.contents.leave_out(invalid, [loose_key(contact.email)])


def row_error(table: CsvTable, row: Sequence[str], is_plain: bool) -> tuple[str, str]:
    """Return the code and the words for why a row is no contact, both empty where it is one; a row
    of blank cells is none, and no error.

    `is_plain` is a row of one line without a NUL.
    """
    if not any(map(str.strip, row)):
        return "blank", ""
    # Spreadsheets leave blank cells at the end of a row out, or write some more.
    extra = row[table.width :]
    is_complete = len(row) > max(table.places) and not any(map(str.strip, extra))
    if extra and not is_plain:
        is_complete = False
    if len(row) != table.width and not (is_complete and is_unshifted(table, row)):
        return "fields", f"{plural(len(row), 'field')} instead of {table.width}"
    if any(_NUL_MARK in cell for cell in row):
        return "nul", "a NUL character, or U+FDD0"
    if not is_plain and any(cell.count(table.delimiter) >= max(table.places) for cell in row):
        hint = "a stray quote, or one that a backslash escapes: unload with doubled quotes"
        return "stray_quote", f"a quoted field that holds other rows ({hint})"
    cells = table.texts(row)
    for name in ("id", "email", "external_ref"):
        if cells[name] == "":
            return "empty", f"empty {COLUMNS[name]}"
    if cells["id"] in _NULL_IDS:
        return "empty", f"{COLUMNS['id']} is {cells['id']}"
    if not is_address(cells["email"]):
        return "email", f"{COLUMNS['email']} is not one plain address: {cells['email'][:80]}"
    if parse_count(cells["tickets"]) is None:
        return "count", f"{COLUMNS['tickets']} is not a count: {cells['tickets'][:40]}"
    return "", ""


def is_address(email: str) -> bool:
    return len(email) <= MAX_TEXT and bool(_ADDRESS.fullmatch(email)) and is_visible(email)


def is_unshifted(table: CsvTable, row: Sequence[str]) -> bool:
    """Whether id, reference, count and times hold what belongs there: no comma has shifted them."""
    cells = table.texts(row)
    return (
        cells["id"] not in ("", *_NULL_IDS)
        and "@" not in cells["id"]
        and cells["external_ref"] != ""
        and parse_count(cells["tickets"]) is not None
        and all(_DATE.match(cells[name]) for name in ("created", "updated"))
    )


def loose_keys_in(cells: Iterable[str]) -> Iterator[str]:
    """The loose keys of whatever may be an address in cells of an invalid row."""
    for cell in cells:
        if cell.isascii() and "@" not in cell:
            continue
        text = cell.replace(_NUL_MARK, "")
        words = {trimmed_text(text)}
        for border in (r"[,\r\n]", r"[\s,;<>\"]+", r"[\s,;<>\"()\[\]{}:|]+"):
            words.update(re.split(border, text))
        for key in map(loose_key, words):
            if "@" in key:
                yield key


def repeated(values: array[int]) -> set[int]:
    """Return the hashes that recur; -1 is none."""
    return {value for value, times in collections.Counter(values).items() if times > 1} - {-1}


def csv_line(*cells: str) -> str:
    line = io.StringIO()
    # With this end of a line, no character that ends one stays unquoted in a cell.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue()[:-2]


def guard_cell(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula; `trimmed_text` reads it back."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def guard_name(cell: str) -> str:
    """Return a name that is no formula, nor is any part of it where a spreadsheet splits it."""
    return guard_cell(_SPLIT.sub(r"\1 ", cell))


def csv_chunks(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[bytes]:
    """A CSV, line by line, without formulas.

    It has a byte order mark, so that a spreadsheet shows it right.
    """
    names = list(header)
    people = (COLUMNS["display_name"], COLUMNS["full_name"])
    guards = [guard_name if name in people else guard_cell for name in names]
    yield ("\ufeff" + csv_line(*names) + "\n").encode("utf-8")
    for cells in rows:
        line = csv_line(*(guard(cell) for guard, cell in zip(guards, cells)))
        yield (line + "\n").encode("utf-8", "backslashreplace")


# --------------------------------------------------------------------------------------------------
# Detection: which contacts are one person
# --------------------------------------------------------------------------------------------------


class State(str, Enum):
    """How far a pair is. REQUESTED to VERIFYING are unfinished, only one of TERMINAL ends a
    pair."""

    PLANNED = "planned"
    SKIPPED = "skipped"  # left out of its group in this run; never stored
    FAILED = "failed"  # without a merge request: the next run tries it again
    REQUESTED = "requested"  # the request may have been sent
    ACKNOWLEDGED = "acknowledged"
    MERGED = "merged"  # the duplicate no longer exists
    VERIFYING = "proving"  # the reference is on the primary
    DONE = "done"
    MERGED_ELSEWHERE = "merged_elsewhere"  # another user merged or deleted the duplicate first
    SETTLED = "settled"  # merged, and a person accepted what can't be fixed
    CANCELLED = "cancelled"  # a person gave it up while the duplicate still existed
    UNDOING = "undoing"
    UNDONE = "undone"
    UNDO_SETTLED = "undo_settled"  # a person gave up the rest of its undo


Ids = Tuple[str, str]  # primary, duplicate
REQUESTED_STATES = (State.REQUESTED, State.ACKNOWLEDGED)
UNFINISHED = (*REQUESTED_STATES, State.MERGED, State.VERIFYING)
ENDED = (State.DONE, State.MERGED_ELSEWHERE, State.SETTLED)
TERMINAL = (*ENDED, State.CANCELLED, State.UNDONE, State.UNDO_SETTLED)
# The states that are stored, by how much they say was done: where two files disagree at the same
# revision, the later one is believed.
AUTHORITY = (
    State.PLANNED,
    State.FAILED,
    *UNFINISHED,
    *ENDED,
    State.UNDOING,
    State.CANCELLED,
    State.UNDO_SETTLED,
    State.UNDONE,
)


@dataclass
class UndoProgress:
    """How far the undo of one merge is. Every step is saved before its request.

    It stays with a pair whose contact DevRev refused, whose state is what it was before.
    """

    path: str  # of the --undo
    state_before: str  # of the pair
    merge_run: str  # the run that wrote the pair last before
    merge_revision: int  # of the pair's row before
    reference_free: bool = False  # the reference that the merge had moved may be on no contact
    # Field of the contact -> why DevRev refused it.
    left_out: dict[str, str] = field(default_factory=dict)
    # Ids of the email before the create request; None: not requested yet.
    contacts_before: list[str] | None = None
    contact: str = ""  # id of the contact created again
    display_id: str = ""
    # `{field, value, why}` of what stays with the primary.
    fields_left: list[Json] = field(default_factory=list)
    left: list[Json] | None = None  # `{id, role, why}` of what is not restored; None: not known yet
    others: Json = field(default_factory=dict)  # fields of another version: kept as they are


@dataclass
class Pair:
    """One merge: `duplicate` goes into `primary`, whose external_ref becomes `new_ref` (if any).

    `to_json` is the document that the savepoint stores. Times are epoch seconds; 0 stands for
    never. The state changes by the methods of this class alone.
    """

    primary: Contact
    duplicate: Contact
    new_ref: str | None
    state: State = State.PLANNED
    code: str = ""
    error: str = ""
    backup: str = ""
    backed_up: Json = field(default_factory=dict)  # what the backup holds, by kind
    manifest_sha256: str = ""  # of the backup; "" where 3.0.0 made it
    requested_at: float = 0.0  # the last request
    first_requested_at: float = 0.0
    # DevRev answered the last request with a refusal, and may have carried it out all the same.
    rejected: bool = False
    forbidden: bool = False  # DevRev answered a request for the merge with 403
    seconds: float = 0.0
    left_behind: list[Json] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)  # objects of the backup that no longer exist
    proved: int = 0  # objects that were found with the primary
    # What the primary is to get of the duplicate's fields (--carry-fields), then what it got.
    fields_to_carry: Json = field(default_factory=dict)
    # The primary's values of these fields before that; none of a field that was not written yet.
    fields_before: Json = field(default_factory=dict)
    # `{field, value}` of the duplicate that the primary lacks.
    fields_lost: list[Json] = field(default_factory=list)
    accepted: str = ""  # what a person accepted with --settle
    reference_not_set: str = ""  # that no contact has, though the pair has ended
    unset_since: str = ""  # the first run that left the reference of the merged pair unset
    carries_last: bool = False  # fields are carried last, not with the reference as 3.0.0 did
    after_cancel: bool = False  # DevRev carried it out after it was cancelled
    undo: UndoProgress | None = None
    run: str = ""  # that wrote it last
    revision: int = 0  # of that write
    updated: str = ""
    # Fields of another version: kept as they are.
    others: Json = field(default_factory=dict)
    # Known to this run only:
    is_requested_again: bool = False  # its merge is about to be requested once more
    before_request: Pair | None = None  # what `withdraw_request` restores

    @property
    def email(self) -> str:
        return self.primary.key

    @property
    def ids(self) -> tuple[str, str]:
        return self.primary.id, self.duplicate.id

    def to_json(self) -> Json:
        document = stored_fields(self)
        document.update(
            primary=self.primary.to_json(),
            duplicate=self.duplicate.to_json(),
            state=self.state.value,
            undo=None,
        )
        if self.undo:
            document["undo"] = stored_fields(self.undo)
        return document

    @classmethod
    def from_json(cls, document: Json) -> Pair:
        """Read `to_json` back, also of another version: unknown fields are kept, missing ones have
        their default. Raises LookupError, TypeError, ValueError where it is no such document."""
        pair: Pair = read_stored(cls, document)
        pair.primary = Contact.from_json(document["primary"])
        pair.duplicate = Contact.from_json(document["duplicate"])
        pair.state = State(document["state"])
        if document.get("undo"):
            pair.undo = read_stored(UndoProgress, document["undo"])
            State(pair.undo.state_before)
        return pair

    def move_to(
        self,
        state: State,
        code: str = "",
        error: str = "",
    ) -> None:
        """Be in this state; `code` and `error` say what keeps the pair from its end, or ended
        it."""
        self.state = state
        self.code = code
        self.error = error
        self.before_request = None

    def is_merged_already(self) -> bool:
        """Whether the live check has found it merged, by a run in another folder."""
        return self.state is State.SKIPPED and self.code == "already_merged"

    def begin_request(self, now: float) -> None:
        """Note that the merge is requested, which is saved before the request is sent.

        A request that waits for quota may begin several times.
        """
        before = self.before_request or replace(self)
        self.move_to(State.REQUESTED)
        self.before_request = before
        self.rejected = False
        self.requested_at = now
        self.first_requested_at = self.first_requested_at or now

    def withdraw_request(self) -> None:
        """Be as before `begin_request`: this process knows that the request was not sent."""
        before = self.before_request
        for one in fields(self):
            setattr(self, one.name, getattr(before, one.name))


NOT_STORED = ("run", "revision", "is_requested_again", "before_request", "others")


def stored_fields(record: Any) -> Json:
    """The fields of a record as the savepoint stores them, with those of another version."""
    names = [one.name for one in fields(record) if one.name not in NOT_STORED]
    return {**record.others, **{name: getattr(record, name) for name in names}}


def read_stored(kind: Any, document: Json) -> Any:
    """Make a Pair, UndoProgress or RunRecord of its stored fields."""
    names = {one.name for one in fields(kind) if one.name not in NOT_STORED}
    known = {name: value for name, value in document.items() if name in names}
    others = {name: value for name, value in document.items() if name not in names}
    return kind(**known, others=others)


def into(pair: Pair) -> str:
    return f"{pair.duplicate.short_id} into {pair.primary.short_id}"


@dataclass(eq=False)
class Group:
    """The contacts of one email. Every pair has the same primary; the one whose reference moves is
    first."""

    email: str
    pairs: list[Pair]
    chosen: str = ""  # the reference that --choices names for the email
    age_undecided: bool = False  # the CSV does not show which contact is the oldest

    @property
    def primary(self) -> Contact:
        return self.pairs[0].primary

    def contacts(self) -> list[Contact]:
        """The primary, and every duplicate that is still to be merged."""
        return [self.primary, *(pair.duplicate for pair in self.pending())]

    def pending(self) -> list[Pair]:
        """The pairs that are still to be merged, that of a request that is being repeated
        included."""
        return [
            pair for pair in self.pairs if pair.state is State.PLANNED or pair.is_requested_again
        ]

    def all_contacts(self) -> list[Contact]:
        return [self.primary, *(pair.duplicate for pair in self.pairs)]

    def primary_ref(self) -> str:
        """The reference that the primary has now, as far as a merge is known to have moved one to
        it."""
        for pair in self.pairs:
            has_moved = pair.state in (State.VERIFYING, State.DONE) or pair.is_merged_already()
            if pair.new_ref and has_moved:
                return pair.new_ref
        return self.primary.external_ref

    def has_ended(self) -> bool:
        return all(pair.state in ENDED for pair in self.pairs)

    def has_absorbed(self) -> bool:
        """Return whether this tool has requested a merge into the primary since the export."""
        return any(pair.state in (*UNFINISHED, *ENDED) for pair in self.pairs)

    def lost_refs(self) -> list[Contact]:
        """Return the duplicates whose `user_` reference no contact keeps: their accounts lose their
        contact."""
        kept = self.pairs[0].new_ref or self.primary.external_ref
        users = [pair.duplicate for pair in self.pairs if pair.duplicate.is_user]
        return [contact for contact in users if contact.external_ref != kept]

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Yield codes and words of what a person should know before the group is merged."""
        contacts = self.all_contacts()
        if self.chosen and len(contacts) > mailbox_limit(self.email):
            words = f"joins {len(contacts)} contacts of what looks like a shared mailbox"
            yield "shared_mailbox", words
        names = different_names(self.email, contacts)
        if names:
            words = f"these contacts have different names: {', '.join(some(names, 6))}"
            yield "names_differ", words
        if self.age_undecided:
            words = "age could not decide which contact is the primary: the smallest id did"
            yield "age_undecided", f"{words} ({self.primary.short_id})"


def different_names(email: str, contacts: Sequence[Contact]) -> list[str]:
    """Return the names of contacts that may not be one person's, none where they may.

    Case does not count, nor does a name that is the address, its local part or the short id, nor a
    name all of whose words are in the other.
    """
    names: dict[frozenset[str], str] = {}
    for contact in contacts:
        texts = ("", email, email.rpartition("@")[0], contact.short_id)
        useless = set(map(str.casefold, texts))
        for name in (contact.display_name.strip(), contact.full_name.strip()):
            folded = name[:MAX_TEXT].casefold()
            if folded not in useless:
                words = re.findall(r"\w+", unicodedata.normalize("NFKC", folded))
                names.setdefault(frozenset(words), name)
                break
    for one, other in combinations(names, 2):
        if not (one <= other or other <= one):
            return sorted(names.values())
    return []


# Local parts, compared as a whole, without what follows a `+`.
ROLE_ADDRESSES = frozenset((
    "info", "support", "help", "helpdesk", "service", "sales", "contact", "hello", "office", "team",
    "admin", "administrator", "billing", "accounts", "accounting", "finance", "hr", "jobs",
    "careers", "marketing", "press", "media", "legal", "privacy", "security", "abuse", "postmaster",
    "hostmaster", "webmaster", "root", "mail", "email", "reception", "orders", "booking",
    "bookings", "customerservice", "customer-service", "customercare", "feedback",
))  # fmt: skip
PLACEHOLDER_ADDRESSES = frozenset((
    "noreply", "no-reply", "no_reply", "donotreply", "do-not-reply", "none", "null", "nobody",
    "unknown", "anonymous", "test", "na", "n-a", "noemail", "no-email", "invalid",
))  # fmt: skip


def mailbox_limit(email: str) -> int:
    """Return with how many contacts an address is still taken for one person's."""
    local = email.strip().rpartition("@")[0].partition("+")[0].lower()
    if local in PLACEHOLDER_ADDRESSES:
        return 1
    return 2 if local in ROLE_ADDRESSES else 3


class SkippedGroup(NamedTuple):
    """A group that is left alone. `contacts` are those that take part: `user_` first, and of each
    kind the likeliest first."""

    email: str
    code: str
    contacts: list[Contact]

    def choice_lines(self) -> dict[str, Contact]:
        """The lines of CSV of which --choices may take one, each with the contact whose reference
        it keeps."""
        lines: dict[str, Contact] = {}
        if self.code in ("several_user_refs", "no_user_ref"):
            users = [contact for contact in self.contacts if contact.is_user]
            for contact in users or self.contacts:
                lines.setdefault(csv_line(self.email, contact.external_ref), contact)
        return lines


def skip_words(code: str) -> tuple[str, str]:
    """Say why a group is skipped and what to do, with the prefix of the user's application."""
    why = SKIP_REASONS[code].replace("user_", Contact.user_prefix)
    return why, ADVICE[code].replace("user_", Contact.user_prefix)


@dataclass
class Plan(CsvContents):
    """What a run would do: the one object that the preview prints and the run carries out."""

    groups: list[Group] = field(default_factory=list)
    skipped: list[SkippedGroup] = field(default_factory=list)
    already_merged: int = 0
    ids: set[Ids] = field(default_factory=set)  # of all pairs of the CSV
    wanted: dict[Ids, Pair] = field(default_factory=dict)  # the same, --email and --limit apart
    tried: dict[Ids, str] = field(default_factory=dict)  # when a run refused or failed it last
    chosen: list[Group] = field(default_factory=list)  # by --choices, and still to be merged
    unverified: set[str] = field(default_factory=set)  # ids of contacts, as far as DevRev was asked
    id: str = ""  # of `plan_id`
    revived: list[Pair] = field(default_factory=list)  # were cancelled, and are named with --email
    # By the live check, while others of their group were merged:
    left_out: list[Pair] = field(default_factory=list)
    # Left alone, because their undo is unfinished; their rows stay:
    refused: list[Pair] = field(default_factory=list)
    warnings: list[Json] = field(default_factory=list)  # before the groups are consumed

    def others_line(self) -> str:
        """Say how many contacts take no part because of their reference, `""` where all do."""
        if not self.other_refs:
            return ""
        verb = "takes" if self.other_refs == 1 else "take"
        example = f"with other references, for example {self.other_ref[:60]}"
        return f"{plural(self.other_refs, 'contact')} {example}, {verb} no part"

    def find_warnings(self) -> list[Json]:
        """What a person should know of the groups that are still to be merged, one entry for each
        group and code."""
        found = []
        for group in self.groups:
            if not group.has_ended():
                for code, words in group.warnings():
                    found.append({"email": group.email, "code": code, "warning": words})
        return found

    def pairs(self) -> Iterator[Pair]:
        """Return the pairs of which the merge has not ended."""
        for group in self.groups:
            for pair in group.pairs:
                if pair.state not in ENDED:
                    yield pair

    def new_pairs(self) -> list[Pair]:
        """Return the pairs that are still to be requested."""
        return [pair for pair in self.pairs() if pair.state is State.PLANNED]

    def count(self) -> int:
        return sum(1 for _ in self.pairs())


def plan_id(groups: Iterable[Group], **options: Any) -> str:
    """Name what all groups of a CSV come to: what is merged into what with which reference, and by
    which `options`."""
    lines = []
    for group in groups:
        for pair in group.pairs:
            lines.append(json.dumps([*pair.ids, pair.new_ref]))
    text = "\n".join([json.dumps(options, sort_keys=True), *sorted(lines)])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def read_choices(path: Path) -> dict[str, str]:
    """Read which reference an email is to keep: a CSV of EMAIL and EXTERNAL_REF.

    Returns key of the email -> reference. Raises FatalError(2) where the file can't be read, lacks
    a column, or has a row that is no choice or a second one.
    """
    choices: dict[str, str] = {}
    with open_table(path, ("EMAIL", "EXTERNAL_REF")) as table:
        if not table.width:
            raise FatalError(EXIT_USAGE, "the file is empty")
        for row in table.rows:
            if not any(map(str.strip, row)):
                continue
            row += [""] * (table.width - len(row))
            email, reference = (trimmed_text(row[place]) for place in table.places)
            key = email_key(email)
            problem = ""
            if any(map(str.strip, row[table.width :])):
                problem = f"{plural(len(row), 'field')} instead of {table.width}"
            elif not key or not reference:
                problem = "empty EMAIL or EXTERNAL_REF"
            elif key in choices:
                problem = f"a second choice for {key}; keep one line per address"
            if problem:
                raise FatalError(EXIT_USAGE, f"line {table.rows.line_num}: {problem}")
            choices[key] = reference
    return choices


# ISO 8601 as Snowflake and --export write it.
_INSTANT = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?"
    r" ?(?:Z|([+-])(\d\d)(?::?([0-5]\d))?)?)?",
    re.ASCII,
)


def parse_instant(text: str) -> int | None:
    """Return the time that a cell holds, in nanoseconds since 1970, None where it holds none.

    A time without a zone is UTC.
    """
    match = _INSTANT.fullmatch(text.strip())
    if not match:
        return None
    *clock, fraction, sign, hours, minutes = match.groups(default="0")
    try:
        since = datetime(*map(int, clock)) - datetime(1970, 1, 1)  # type: ignore[arg-type]
    except ValueError:
        return None
    offset = (int(hours) * 60 + int(minutes)) * 60
    seconds = since.days * 86_400 + since.seconds + (offset if sign == "-" else -offset)
    return seconds * 10**9 + int(fraction.ljust(9, "0"))


def rank(contacts: Iterable[Contact]) -> tuple[list[Contact], bool]:
    """Order contacts of one kind: most tickets first, of those the oldest, then the smallest id.

    Return them, and whether age could not decide which is first: one of the tied dates can't be
    read, and the id decides.
    """
    ranked = sorted(contacts, key=lambda one: (-one.tickets, one.id))
    tied = [one for one in ranked if one.tickets == ranked[0].tickets]
    if len(tied) < 2:
        return ranked, False
    if any(parse_instant(one.created) is None for one in tied):
        return ranked, True
    tied.sort(key=lambda one: parse_instant(one.created) or 0)
    return [*tied, *ranked[len(tied) :]], False


def detect(contents: CsvContents, choices: Mapping[str, str], primary: str) -> Plan:
    """Find the groups to merge and the groups to skip, ordered by email.

    `choices` are as `read_choices` gives them. `primary` says which contact remains where there is
    one of each kind, the system-made `revu` or the application's `user`. Raises FatalError(2) where
    a choice can't be followed, unless its group may not be complete and is skipped anyway.
    """
    plan = Plan(**vars(contents))
    spoiled = contents.emails_in_invalid_rows
    by_email: dict[str, list[Contact]] = {email: [] for email in choices}
    for contact in contents.contacts:
        if contact.takes_part:
            by_email.setdefault(contact.key, []).append(contact)
    for email, contacts in sorted(by_email.items()):
        users, _ = rank(contact for contact in contacts if contact.is_user)
        system, is_undecided = rank(contact for contact in contacts if contact.is_system)
        found = users + system
        choice = choices.get(email, "")
        code = ""
        if loose_key(email) in spoiled:
            code = "invalid_row"
        elif choice:
            users = [resolve_choice(email, users or system, choice)]
        else:
            code = skip_code(email, users, system)
        if code and found:
            plan.skipped.append(SkippedGroup(email, code, found))
        elif not code and len(found) > 1:
            kept = users[0]
            remaining = kept
            if kept.is_user and system and primary == "revu":
                remaining = system[0]
            group = Group(email, pairs_of(remaining, kept, found), choice)
            group.age_undecided = is_undecided and remaining is not kept
            plan.groups.append(group)
    return plan


def pairs_of(remaining: Contact, kept: Contact, contacts: Iterable[Contact]) -> list[Pair]:
    """Return the merges of contacts into one that remains; of one of them the reference is kept."""
    pairs = [Pair(remaining, one, None) for one in contacts if one not in (remaining, kept)]
    if kept is not remaining:
        pairs.insert(0, Pair(remaining, kept, kept.external_ref))
    return pairs


def skip_code(email: str, users: Sequence[Contact], system: Sequence[Contact]) -> str:
    """Say why a group needs a choice, `""` where it needs none."""
    if len(users) + len(system) > mailbox_limit(email):
        return "shared_mailbox"
    if len(users) > 1:
        return "several_user_refs"
    return "no_user_ref" if len(system) > 1 and not users else ""


def resolve_choice(email: str, candidates: Sequence[Contact], choice: str) -> Contact:
    """Return the contact that a choice names. A system-made one is no candidate beside a `user_`,
    which is how the application knows the person."""
    found = [contact for contact in candidates if contact.external_ref == choice]
    if len(found) == 1:
        return found[0]
    there = ", ".join(some([contact.external_ref for contact in candidates], 10)) or "nothing"
    words = f"--choices: {choice} for {email} is not the reference of one contact to choose from"
    raise FatalError(EXIT_USAGE, f"{words} ({there})")


# -- what earlier runs and the options leave of a plan ---------------------------------------------


def blocked_by_history(
    groups: Iterable[Group], cancelled: Iterable[Pair], undone: Collection[Pair]
) -> dict[str, str]:
    """Return the emails of groups that repeat a merge which was undone or cancelled, with the code.

    A group repeats it that has its address, or two of its contacts in whatever role. A contact that
    an undo created stands for its old id, also where that one had been created so.
    """
    old_ids = {pair.undo.contact: pair.duplicate.id for pair in undone if pair.undo}

    def original(identity: str) -> str:
        while old_ids.get(identity, identity) != identity:
            identity = old_ids[identity]
        return identity

    codes: dict[Any, str] = {}  # by address, and by two ids; `undone` counts where both are true
    for pair in (*cancelled, *undone):
        code = "cancelled" if pair.state is State.CANCELLED else "undone"
        codes[pair.email] = codes[frozenset(map(original, pair.ids))] = code
    blocked: dict[str, str] = {}
    if not codes:
        return blocked
    for group in groups:
        ids = sorted({original(contact.id) for contact in group.all_contacts()})
        keys = [group.email, *map(frozenset, combinations(ids, 2))]
        found = {codes[key] for key in keys if key in codes}
        if found:
            blocked[group.email] = "undone" if "undone" in found else "cancelled"
    return blocked


def apply_savepoint(plan: Plan, savepoint: SavePoint, named: Collection[str]) -> None:
    """Bring what the savepoint knows into a plan: what has ended, was requested or was tried, and
    what is not to be merged again.

    A group that repeats what was undone or cancelled is skipped until it is `named`; an export from
    before an undo also then.
    """
    if plan.groups:
        savepoint.organisation = plan.groups[0].primary.organisation
    known = {pair.ids: pair for pair in savepoint.pairs(*UNFINISHED, *ENDED)}
    cancelled = {pair.ids: pair for pair in savepoint.pairs(State.CANCELLED)}
    undone = {pair.ids: pair for pair in savepoint.pairs(State.UNDONE, State.UNDO_SETTLED)}
    plan.tried = {pair.ids: pair.updated for pair in savepoint.pairs(State.FAILED)}
    blocked = blocked_by_history(plan.groups, cancelled.values(), undone.values())
    created = {pair.undo.contact for pair in undone.values() if pair.undo}
    ended = [pair for pair in known.values() if pair.state in ENDED]
    again = {pair.email for pair in ended if created.intersection(pair.ids)}
    groups = plan.groups
    plan.groups = []
    for group in groups:
        code = blocked.get(group.email, "")
        is_older = any(pair.ids in undone for pair in group.pairs)  # than an undo
        is_named = group.email in named and not is_older
        if is_named or all(pair.ids in known for pair in group.pairs):
            code = ""
        if code == "undone" and group.email in again:
            code = "merged_again"
        if code:
            plan.skipped.append(SkippedGroup(group.email, code, group.all_contacts()))
            continue
        plan.groups.append(group)
        take_states(plan, group, known, cancelled)


def take_states(
    plan: Plan,
    group: Group,
    known: Mapping[Ids, Pair],
    cancelled: Mapping[Ids, Pair],
) -> None:
    """Give the pairs of a planned group the states that the savepoint knows.

    A cancelled one is named now. It was requested once, and DevRev may still carry that out: it is
    polled first, like any other.
    """
    for pair in group.pairs:
        if pair.ids in known:
            pair.move_to(known[pair.ids].state)
            if pair.state in ENDED:
                plan.already_merged += 1
        elif pair.ids in cancelled:
            row = cancelled[pair.ids]
            row.accepted = ""
            row.new_ref = pair.new_ref  # what was cancelled does not bind the new plan
            row.move_to(State.REQUESTED)
            row.rejected = True  # or accepted: it has the whole wait of an answered request
            pair.move_to(State.REQUESTED)
            plan.revived.append(row)


def keep_emails(plan: Plan, wanted: Collection[str]) -> None:
    """Keep what --email names. Raises FatalError(2) for an email in no row."""
    known = {contact.key for contact in plan.contacts}
    unknown = []
    for email in sorted(set(wanted) - known):
        if loose_key(email) not in plan.emails_in_invalid_rows:
            unknown.append(email)
    if unknown:
        raise FatalError(EXIT_USAGE, f"--email: in no row of the CSV: {', '.join(some(unknown))}")
    plan.groups = [group for group in plan.groups if group.email in wanted]
    plan.skipped = [skip for skip in plan.skipped if skip.email in wanted]
    plan.look_alikes = [one for one in plan.look_alikes if set(one["emails"]).intersection(wanted)]


def keep_limit(plan: Plan, limit: int) -> list[str]:
    """Keep complete groups with at most `limit` pairs in all, and pass over what would not fit.

    What no run has tried comes first, then what was tried longest ago: a contact that always fails
    keeps no other waiting. Returns what a person should know of it, line by line.
    """

    def last_try(group: Group) -> str:
        return max(plan.tried.get(pair.ids, "") for pair in group.pairs)

    room = limit
    kept: set[str] = set()
    passed_over = 0
    for group in sorted(plan.groups, key=last_try):
        size = sum(1 for pair in group.pairs if pair.state is State.PLANNED)
        if size <= room:
            kept.add(group.email)
            room -= size
        else:
            passed_over += 1
    plan.groups = [group for group in plan.groups if group.email in kept]
    if passed_over and room == limit:
        return [f"--limit {limit}: no group has so few pairs, and a group is merged as one"]
    return []


# -- what DevRev says of a group now ---------------------------------------------------------------


def has_reference(user: Json | None, reference: str | None) -> bool:
    """Whether DevRev shows a contact that still exists with this reference."""
    return (
        user is not None
        and reference is not None
        and not is_gone(user)
        and live_reference(user) == reference.strip()
    )


def live_contact_error(contact: Contact, live: Json | None, external_ref: str) -> PairError | None:
    """Compare a row of the export with the contact as DevRev has it now; None where they agree.

    `live` is a `rev_user` of DevRev's API, None where there is none of that id.
    """
    name = contact.short_id
    if live is None:
        return PairError("not_found", f"{name} is not in DevRev any more")
    if live.get("primary_identity"):
        return PairError("not_active", f"{name} is merged into another contact")
    if live.get("state") != "active":
        return PairError("not_active", f"{name} is {live.get('state')}, not active")
    if email_of(live) != contact.key:
        words = f"{name} has another email now: {live.get('email') or 'none'}"
        return PairError("email_changed", words)
    reference = live_reference(live)
    if reference != external_ref.strip():
        words = f"{name} has another reference now: {reference or 'none'}"
        return PairError("external_ref_changed", words)
    refs = live.get("external_refs")
    others = {str(one or "").strip() for one in refs} if isinstance(refs, list) else set()
    others -= {reference, contact.short_id, ""}
    if others:
        names = ", ".join(some([external_ref, *sorted(others)], 4))
        words = f"{name} has several references ({names})"
        unknown = "what setting one does to the others is not known"
        return PairError("several_external_refs", f"{words}, and {unknown}")
    return None


def is_gone(live: Json | None) -> bool:
    """Whether DevRev has no such contact any more: not found, deleted, or merged into another."""
    return live is None or live.get("state") == "deleted" or bool(live.get("primary_identity"))


def rev_org_id(user: Json | None) -> str | None:
    rev_org = user.get("rev_org") if user else None
    identity = rev_org.get("id") if isinstance(rev_org, dict) else rev_org
    return str(identity) if identity else None


@dataclass(frozen=True)
class LiveGroup:
    """A group, and what DevRev says of its contacts now."""

    group: Group
    users: Mapping[str, Json | None]  # rev_users by id; None: it no longer exists
    listed: Sequence[Json] = ()  # rev_users that DevRev lists for the group's addresses
    unverified: Collection[str] = ()  # ids of contacts that are known to be unverified
    unheld: Collection[str] = ()  # references that no contact has any more

    @property
    def primary(self) -> Json | None:
        return self.users.get(self.group.primary.id)

    def duplicate(self, pair: Pair) -> Json | None:
        return self.users.get(pair.duplicate.id)

    def orgs_differ(self, pair: Pair) -> bool:
        """Whether both are known to belong to a rev org, and not to the same."""
        orgs = {rev_org_id(self.primary), rev_org_id(self.duplicate(pair))} - {None}
        return len(orgs) > 1

    def may_be_half_merged(self, pair: Pair) -> bool:
        """Whether the reference that is to move may be on no contact: the primary does not have it,
        and the duplicate is not what it was."""
        if pair.new_ref is None or pair.first_requested_at or is_gone(self.primary):
            return False
        duplicate = self.duplicate(pair)
        if duplicate is not None and duplicate.get("state") == "active" and not is_gone(duplicate):
            return False
        there = (self.primary, duplicate)
        return not any(has_reference(user, pair.new_ref) for user in there)


# The codes with which the live check refuses a group: of several errors the first here counts.
LIVE_CODES = (
    "reference_unheld", "not_found", "not_active", "email_changed", "external_ref_changed",
    "several_external_refs", "shared_mailbox", "several_user_refs", "group_changed", "unverified",
    "different_rev_org",
)  # fmt: skip


def check_live(live: LiveGroup, options: MergeOptions) -> list[tuple[Pair, PairSkipped]]:
    """Compare a group with DevRev as it is now: for the live preview and for a run.

    Return the pairs that leave it, while the others continue. Raises PairError where it is refused.
    """
    reference = live.group.primary_ref()
    dropped: list[tuple[Pair, PairSkipped]] = []
    found: list[PairError | None] = []
    for pair in live.group.pending():
        skip = reason_to_drop(live, pair, options)
        if skip:
            dropped.append((pair, skip))
        else:
            found += pair_errors(live, pair, options)
        # A merge elsewhere has moved it, or an earlier request, though the duplicate is there.
        if has_reference(live.primary, pair.new_ref) and (skip or pair.first_requested_at):
            reference = str(pair.new_ref)
    if found:
        found.append(live_group_error(live))
    found.insert(0, live_contact_error(live.group.primary, live.primary, reference))
    errors = list(filter(None, found))
    if errors:
        raise min(errors, key=lambda error: LIVE_CODES.index(error.code))
    return dropped


def reason_to_drop(live: LiveGroup, pair: Pair, options: MergeOptions) -> PairSkipped | None:
    """Say why a pair may leave its group, if the others can be merged without it.

    What was requested once is polled instead.
    """
    if pair.state is not State.PLANNED or pair.first_requested_at:
        return None
    name = pair.duplicate.short_id
    if is_gone(live.duplicate(pair)) and not pair.new_ref:
        return PairSkipped("already_gone", f"{name} no longer exists in DevRev")
    if is_gone(live.duplicate(pair)) and has_reference(live.primary, pair.new_ref):
        why = f"by a run in another folder? The primary has {pair.new_ref}"
        return PairSkipped("already_merged", f"{into(pair)} looks merged already, {why}")
    if not pair.new_ref and live.orgs_differ(pair) and not options.across_workspaces:
        why = f"another workspace (rev org) than {pair.primary.short_id}"
        return PairSkipped("different_rev_org", f"{name} belongs to {why}")
    return None


def pair_errors(live: LiveGroup, pair: Pair, options: MergeOptions) -> Iterator[PairError | None]:
    """Yield what is wrong with a pair that stays in its group."""
    duplicate = pair.duplicate
    yield live_contact_error(duplicate, live.duplicate(pair), duplicate.external_ref)
    if pair.new_ref in live.unheld:
        words = f"{pair.new_ref} is on no contact any more: {duplicate.short_id}, which had it, is"
        why = f"{words} gone or not active, and {pair.primary.short_id} does not have it"
        yield PairError("reference_unheld", why)
    if not options.try_unverified:
        yield unverified_error(pair, live.unverified)
    if pair.new_ref and live.orgs_differ(pair) and not options.across_workspaces:
        words = f"{into(pair)}: they belong to different workspaces (rev orgs)"
        yield PairError("different_rev_org", f"{words}, and {pair.new_ref} has to move")


def unverified_side(pair: Pair, unverified: Collection[str]) -> str:
    """Say whose being unverified speaks against a merge: the `primary`'s, the `duplicate`'s, that
    of `both`, or `""` where nothing does.

    DevRev documents that an unverified contact can't be merged into a verified one, and that a
    reference which an unverified contact has used can't be given to any other.
    """
    primary = pair.primary.id in unverified
    duplicate = pair.duplicate.id in unverified
    if primary and duplicate:
        return "both" if pair.new_ref else ""
    if primary:
        return "primary"
    return "duplicate" if duplicate else ""


def unverified_error(pair: Pair, unverified: Collection[str]) -> PairError | None:
    side = unverified_side(pair, unverified)
    if not side:
        return None
    if side == "both":
        words = f"{into(pair)}: both are unverified, and {pair.new_ref} has to move"
        why = "DevRev documents that a reference of an unverified contact can't be given to another"
        return PairError("unverified", f"{words}; {why}")
    odd = pair.primary.short_id
    other = pair.duplicate.short_id
    if side == "duplicate":
        odd, other = other, odd
    words = f"{into(pair)}: {odd} is unverified, {other} is not known to be"
    why = "anybody may have typed this address into a chat, and would come to know"
    return PairError("unverified", f"{words}; {why} tickets and conversations of {other}")


def unverified_lines(pairs: Iterable[Pair], unverified: Collection[str], listed: bool) -> list[str]:
    """Count pairs by whose being unverified speaks against their merge, for preview and question;
    where they are to be merged all the same (`listed`), name those with an unverified primary."""
    by_side: dict[str, list[Pair]] = collections.defaultdict(list)
    for pair in pairs:
        by_side[unverified_side(pair, unverified)].append(pair)
    lines = []
    for side, words in (
        ("primary", "whose primary is unverified, the duplicate not"),
        ("duplicate", "whose duplicate is unverified, the primary not"),
        ("both", "whose reference would move from an unverified contact to another"),
    ):
        if by_side[side]:
            lines.append(f"{plural(len(by_side[side]), 'pair')} {words}")
    if listed:
        lines += some([f"{pair.email}: {into(pair)}" for pair in by_side["primary"]], 20)
    return lines


def live_group_error(live: LiveGroup) -> PairError | None:
    """Count the contacts of an address again, by what DevRev lists for it; None where the group is
    still known."""
    group = live.group
    pending = group.pending()
    merged = set()
    for pair in group.pairs:
        if pair.state in (*UNFINISHED, *ENDED) and pair not in pending:
            merged.add(pair.duplicate.id)
    known = {contact.id for contact in group.all_contacts()}
    there: dict[str, Contact] = {}
    for user in (*live.listed, *live.users.values()):
        if user and not is_gone(user) and user["id"] not in merged:
            contact = contact_of(user)
            if contact.takes_part and contact.key == group.email:
                there[contact.id] = contact
    if not group.chosen and len(there) > mailbox_limit(group.email):
        count = plural(len(there), "contact")
        words = f"DevRev has {count} of this email, more than one person has: a shared mailbox?"
        return PairError("shared_mailbox", words)
    new = [contact for contact in there.values() if contact.id not in known]
    new.sort(key=lambda contact: (not contact.is_user, contact.external_ref))
    if new and (new[0].is_user or group.chosen):
        code = "several_user_refs" if new[0].is_user else "group_changed"
        words = f"DevRev has another contact of this email by now: {new[0].external_ref}"
        return PairError(code, words)
    return None


def check_count(
    group: Group,
    contact: Contact,
    greatest: int,
    options: MergeOptions,
    who: str = "the backup",
) -> None:
    """Compare the greatest(owned, created, reported) that `who` has with the CSV's TICKET_COUNT.

    Raises PairError where they do not agree.
    """
    is_primary = contact.id == group.primary.id
    accepts_more = options.count_policy == "at-least" or (is_primary and group.has_absorbed())
    if greatest == contact.tickets or (greatest > contact.tickets and accepts_more):
        return
    hint = "--count-policy at-least accepts more"
    if greatest < contact.tickets:
        hint = "the token may not see them all"
    has = f"{contact.short_id}: {who} has {plural(greatest, 'ticket')}"
    raise PairError("count_mismatch", f"{has}, the CSV says {contact.tickets} ({hint})")


# --------------------------------------------------------------------------------------------------
# API: quota
# --------------------------------------------------------------------------------------------------


# How urgent a request is: what finishes a merge goes before what begins one.
FINISH, RESUME, MERGE, VERIFY, PREPARE = range(5)


class Backoff:
    """Pauses in seconds, each `factor` times as long as the last, up to `longest`."""

    def __init__(
        self,
        first: float,
        longest: float,
        factor: float = 2.0,
    ) -> None:
        self.longest = longest
        self.factor = factor
        self._next = first

    def next(self) -> float:
        pause = self._next
        self._next = min(self.longest, self.factor * pause)
        return pause


class FreshRead:
    """The moment of a read that a write is to rest on.

    Where the write has waited since (for quota, in a pause, while a laptop slept), others may have
    changed what was read: it is not sent, and its caller reads again. So nobody's edit is lost but
    within a round trip.
    """

    LIMIT = 0.25  # seconds, by the clock that has advanced further
    MOST = 10  # reads before one write

    def __init__(self, environment: Environment, sent: Timestamp) -> None:
        """Note that a read which began at `sent` has been answered."""
        now = environment.now()
        slept = (now.wall - sent.wall) - (now.monotonic - sent.monotonic)
        self.environment = environment
        self.since = sent if slept > self.LIMIT else now

    def require(self) -> None:
        """Raise PreconditionsExpired where the write must not be sent any more."""
        if self.environment.age(self.since) > self.LIMIT:
            raise PreconditionsExpired()


async def until_fresh(read_and_write: Callable[[], Awaitable[T]]) -> T:
    """Read and write, again where something has waited between the two. Raises PairError(stale)."""
    for _ in range(FreshRead.MOST):
        with contextlib.suppress(PreconditionsExpired):
            return await read_and_write()
    words = "something has waited between a read and its write each time; the quota is too small"
    raise PairError("stale", words)


class RequestOptions(NamedTuple):
    """How a request is queued and sent."""

    priority: int = PREPARE
    units: int = 1  # of quota that must be left: its own, and those of what follows it
    merge: tuple[str, str] | None = None  # ids of the pair whose merge it requests or finishes
    rests_on: FreshRead | None = None  # where that is over, the request is not sent
    deadline: float | None = None  # seconds, after which its caller repeats it
    # Awaited when it may be sent; what that raises keeps it from being sent.
    before: Callable[[], Awaitable[None]] | None = None


ANY_OPTIONS = RequestOptions()


PLAIN_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


class AnnouncedQuota(NamedTuple):
    limit: float
    remaining: float
    reset: float  # epoch seconds, by DevRev's clock


def announced_quota(headers: Mapping[str, str]) -> AnnouncedQuota | None:
    """Read the X-Ratelimit headers; None where one is missing or odd.

    Gateways send 0, -1 or texts for "none", and a number of 400 digits must not become a float.
    """
    names = ("X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset")
    texts = [str(headers.get(name, "")).strip() for name in names]
    if not all(PLAIN_NUMBER.fullmatch(text) for text in texts) or not float(texts[0]):
        return None
    return AnnouncedQuota(*map(float, texts))


def retry_after(response: HttpResponse) -> float:
    """Return the seconds that a 429 asks to wait, by its header or, without one, by its body."""
    for value in (response.headers.get("Retry-After"), (response.data or {}).get("retry_after")):
        text = str(value).strip()
        if PLAIN_NUMBER.fullmatch(text):
            return float(text)
    return 0.0


class QuotaWindow:
    """DevRev's quota, as its answers announce it. Times are monotonic seconds.

    A fixed window has all its units again at its reset. A rolling one has each unit again a window
    after the request that has spent it, and its reset moves on with the clock. For both, what is
    left is what the answer with the latest reset says; where nothing is, nothing leaves until that
    reset. So no window is overdrawn, and of a rolling one at least half is used.
    """

    LONGEST = 600.0  # seconds; a clock that is off must not stop a run for longer
    MARGIN = 0.01  # seconds

    def __init__(self) -> None:
        self.limit: float | None = None  # None: none was announced
        self.remaining: float | None = None  # None: not known, as at the start of a window
        self.length = 0.0  # seconds, the longest that was seen
        self.resets_at = 0.0
        # Of the answer that `remaining` is from, in epoch seconds of DevRev's clock.
        self._reset = 0.0

    @property
    def is_unknown(self) -> bool:
        """Whether there is a quota, and only an answer can tell what is left of it."""
        return self.limit is not None and self.remaining is None

    def on_response(
        self,
        response: HttpResponse,
        now: float,
        server_time: float,
    ) -> None:
        announced = announced_quota(response.headers)
        # A reset in the past may be seconds from now: no window is known by that.
        if announced is None or announced.reset < server_time - 2:
            return
        self.limit = announced.limit
        # Whole seconds may be rounded up or down.
        grain = 1.5 if announced.reset.is_integer() else 0.15
        moved = announced.reset - self._reset
        if self.remaining is None or moved > grain:
            wait = max(0.0, min(self.LONGEST, announced.reset - server_time))
            self._reset = announced.reset
            self.remaining = announced.remaining
            self.resets_at = now + wait + self.MARGIN
            self.length = max(self.length, wait)
        elif moved >= -grain:
            # Answers arrive in another order than requests do.
            self.remaining = min(self.remaining, announced.remaining)

    def has_ended(self, now: float) -> bool:
        """Whether what was known of the window is over now; `remaining` is None then."""
        if self.remaining is None or now < self.resets_at:
            return False
        self.remaining = None
        return True

    def room(self, in_flight: int) -> float:
        """Units that are left; the server may not have counted requests in flight yet."""
        if self.remaining is None:
            return math.inf
        return self.remaining - in_flight


class ClientLimit:
    """The client-side rate limit: so many calls a period, counted by the package `ratelimit`."""

    def __init__(
        self,
        calls: int,
        period: float,
        clock: Callable[[], float],
    ) -> None:
        from ratelimit.decorators import RateLimitDecorator

        self.calls = calls
        self.period = period
        self._limit: Any = RateLimitDecorator(calls, period, clock=clock)
        self.count: Callable[[], None] = self._limit(lambda: None)  # one more call

    def room(self) -> float:
        if self.seconds_left() <= 0:
            return float(self.calls)
        return float(self.calls - self._limit.num_calls)

    def seconds_left(self) -> float:
        # The package rounds in the same way: it raises where it takes a period for not yet over.
        return float(self.period - (self._limit.clock() - self._limit.last_reset))


class CircuitBreaker:
    """Holds requests back after a 429 or failures in a row.

    None leaves until `open_until`; then, while it `is_tripped`, one probe at a time, until one is
    answered well.
    """

    THRESHOLD = 3  # failures in a row
    LONGEST = 3600.0  # seconds that a 429 may ask for
    MOST_OVER_QUOTA = 20  # in a row, with pauses that come to minutes

    def __init__(self, retries: int) -> None:
        self.most_failures = self.THRESHOLD + retries
        self.open_until = 0.0
        self.close()

    def close(self) -> None:
        self.failures_in_a_row = 0
        self.over_quota_in_a_row = 0
        self._pauses = Backoff(0.5, 30.0)

    @property
    def seems_down(self) -> bool:
        return self.failures_in_a_row >= self.THRESHOLD

    @property
    def is_tripped(self) -> bool:
        return self.seems_down or self.over_quota_in_a_row > 0

    def on_response(
        self,
        status: int | None,
        pause: float,
        now: float,
    ) -> str:
        """Note an answer. `status` None: none, or none of use; a 429 asks for `pause` seconds.

        Return why nothing more is worth sending, "" where it is.
        """
        if now < self.open_until:
            # Its request had left before, and tells nothing new, unless how long to wait.
            if status == 429:
                self.open_until = max(self.open_until, now + min(self.LONGEST, pause))
        elif status == 429:
            self.over_quota_in_a_row += 1
            least = self._pauses.next()
            self.open_until = now + max(least, min(self.LONGEST, pause))
        elif status is None or status >= 500:
            self.failures_in_a_row += 1
            if self.seems_down:
                self.open_until = now + self._pauses.next()
        else:
            self.close()
        if self.failures_in_a_row > self.most_failures:
            return "can't be reached or keeps failing (is DEVREV_BASE_URL right?)"
        if self.over_quota_in_a_row > self.MOST_OVER_QUOTA:
            return "keeps answering 429 (over quota), however long one waits"
        return ""


class QueuedRequest(NamedTuple):
    """A request that waits for its turn; they are ordered by priority, then by arrival."""

    priority: int
    serial: int
    options: RequestOptions
    future: asyncio.Future[None]


class RequestScheduler:
    """Decides which request leaves next, and when; owned by the event loop.

    A request waits for one of the workers, for DevRev's quota, for the client-side rate limit, and
    for the circuit breaker. A merge is requested only where the rest of the window covers it and
    all merges in flight, each with as many units as merges took lately; nothing spends those but
    what finishes a merge. Times are monotonic seconds.
    """

    PART = 4  # of a window one merge holds at most a quarter,
    LEAST = 4  # but so many units at least
    OTHERS = 5  # a fifth of the quota is left to others where no client-side limit is set,
    FEWER = 20  # a twentieth where they use so much that it would let nothing leave
    UNANNOUNCED = 200  # calls in a period, until DevRev has announced a quota
    QUOTA = "quota"  # what requests wait for
    CLIENT_LIMIT = "client-side rate limit"
    FAILURES = "DevRev fails"

    def __init__(
        self,
        environment: Environment,
        cancel_token: CancelToken,
        settings: ApiSettings,
    ) -> None:
        self.environment = environment
        self.cancel_token = cancel_token
        self.workers = settings.workers
        self.host = urlsplit(settings.base_url).netloc
        self.quota = QuotaWindow()
        self.breaker = CircuitBreaker(settings.retries)
        self.waiting_for = ""
        self.wait_ends = 0.0
        self.leaves_a_share = settings.calls is None
        calls = self.UNANNOUNCED if settings.calls is None else settings.calls
        self.client_limit: ClientLimit | None = None
        if calls:
            self.client_limit = ClientLimit(calls, settings.period, self._now)
        self._queue: list[QueuedRequest] = []
        self._serial = 0
        self._in_flight = 0
        self.others = self.OTHERS
        self._share_held_back = False  # in this window
        self._has_sent = False  # in this window, beside what finishes merges or asks for the rest
        self._is_asking = False  # a request in flight finds out what is left, or is a probe
        self._merges: set[Ids] = set()  # in flight
        self.proving: set[Ids] = set()  # of these, by requests that name no merge
        self._units_per_merge = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waited = 0.0  # seconds, for DevRev's quota or the client-side limit
        self._noted_at = 0.0

    def _now(self) -> float:
        return self.environment.now().monotonic

    def quota_seen(self) -> Json | None:
        """The quota that DevRev has announced, None where it has not."""
        if self.quota.limit is None:
            return None
        return {"limit": int(self.quota.limit), "window_seconds": round(self.quota.length, 1)}

    # -- what leaves when --------------------------------------------------------------------------

    async def acquire(self, options: RequestOptions) -> None:
        """Wait until a request may leave. Raises Cancelled."""
        self._serial += 1
        future = self.cancel_token.future()
        bisect.insort(self._queue, QueuedRequest(options.priority, self._serial, options, future))
        self._dispatch()
        await future

    def _dispatch(self) -> None:
        """Release the requests that may leave; try again when the next thing changes."""
        if self._timer:
            self._timer.cancel()
        wait, reason = self._release()
        if reason != self.waiting_for:
            self._note_wait(reason)
        self.wait_ends = self._now() + wait
        if wait:
            loop = asyncio.get_event_loop()
            self._timer = loop.call_later(max(0.001, wait), self._dispatch)

    def _release(self) -> tuple[float, str]:
        """Let requests leave, the most urgent first.

        Return the seconds until the next may leave, and what it waits for; 0 where an answer tells.
        """
        while self._queue and self._has_slot(self._queue[0].priority):
            now = self._now()
            if now < self.breaker.open_until:
                reason = self.QUOTA if self.breaker.over_quota_in_a_row else self.FAILURES
                return self.breaker.open_until - now, reason
            if self.quota.has_ended(now):
                self._on_new_window()
            if self._is_asking and (self.quota.is_unknown or self.breaker.is_tripped):
                return 0.0, ""
            request = self._first_that_may_leave()
            if request is None:
                if 1 <= self.quota.room(self._in_flight) <= self.share_of_others():
                    self._share_held_back = True
                return self._seconds_until_room()
            self._queue.remove(request)
            if not request.future.done():  # by a cancellation
                self._let_leave(request)
        return 0.0, ""

    def _first_that_may_leave(self) -> QueuedRequest | None:
        for request in self._queue:
            if self._has_slot(request.priority) and self._has_room(request.options):
                return request
        return None

    def _let_leave(self, request: QueuedRequest) -> None:
        options = request.options
        self._in_flight += 1
        if options.merge:
            self._merges.add(options.merge)
            self._units_per_merge = self._units_needed(options)
        if self.client_limit:
            self.client_limit.count()
        self._is_asking = self.quota.is_unknown or self.breaker.is_tripped
        if options.priority != FINISH and not self._is_asking:
            self._has_sent = True
        request.future.set_result(None)

    def _on_new_window(self) -> None:
        """Leave others less where their share has let nothing leave for a whole window."""
        self._is_asking = False
        if self._share_held_back and not self._has_sent and self.others == self.OTHERS:
            self.others = self.FEWER
            log.warning(
                "other programs use most of the quota: only a twentieth is left to them now"
            )
        self._share_held_back = False
        self._has_sent = False

    def _has_slot(self, priority: int) -> bool:
        """Whether another may be in flight; after a failure fewer, until one is answered well.

        While a merge is in flight, lists and timelines leave a worker to what finishes it.
        """
        slots = self.workers >> self.breaker.failures_in_a_row
        if priority == PREPARE and self._merges:
            slots -= 1
        return self._in_flight < max(1, slots)

    def _has_room(self, options: RequestOptions) -> bool:
        """Whether the quota has room for a request, and for what has to follow it.

        Only what finishes a merge spends the share of others and the units of merges in flight.
        """
        held = 0.0
        if options.merge not in self._merges:
            proving = self.proving if options.priority == FINISH else ()
            held = len(self._merges.difference(proving)) * self._units_per_merge

        def free(left: float, window: float) -> float:
            # Merges in flight may wait for lists: of what a window has, two units are not held.
            return left - max(0, min(held, window - 2))

        left = self.quota.room(self._in_flight)
        room = free(left, self._window())
        if self.client_limit:
            room = min(room, free(self.client_limit.room(), self.client_limit.calls))
        if options.priority == FINISH:
            return room >= 1
        return room >= self._units_needed(options) and left > self.share_of_others()

    def _window(self) -> float:
        """The most units that DevRev's quota can have at once."""
        window = self.quota.limit or math.inf
        if self.others == self.FEWER:
            window /= self.OTHERS
        return window

    def _units_needed(self, options: RequestOptions) -> float:
        """The units that a request asks for, as far as a window can hold them."""
        window = self._window()
        if self.client_limit:
            window = min(window, self.client_limit.calls)
        return min(options.units, max(self.LEAST, window / self.PART), window)

    def end_merge(self, merge: tuple[str, str]) -> None:
        """Note that a merge needs no more units: it has its reference, or others need not wait."""
        self._merges.discard(merge)
        self._dispatch()

    def give_back(self) -> None:
        """Return the slot of a request that is not sent after all."""
        self._in_flight -= 1
        self._is_asking = False
        self._dispatch()

    def cancel_preparations(self) -> None:
        """Cancel the requests in the queue that no merge in progress needs."""
        for request in self._queue:
            if request.priority == PREPARE and not request.future.done():
                request.future.set_exception(Cancelled())

    def share_of_others(self) -> float:
        """Units of the quota that only the requests which finish a merge may spend."""
        if not self.leaves_a_share:
            return 0.0
        return (self.quota.limit or 0) / self.others

    def _seconds_until_room(self) -> tuple[float, str]:
        """Seconds until more units may be spent, and what limits them now."""
        limit = self.client_limit
        left = self.quota.room(self._in_flight) - self.share_of_others()
        if limit is None or left <= limit.room():
            return max(0.001, self.quota.resets_at - self._now()), self.QUOTA
        seconds = limit.seconds_left()
        if seconds > 0:
            return max(0.001, seconds), self.CLIENT_LIMIT
        # Where a complete period has not room enough, merges hold it; their end is noticed.
        return limit.period, ""

    # -- answers -----------------------------------------------------------------------------------

    def on_response(self, response: HttpResponse, usable: bool) -> None:
        """Note an answer, and whether it is of use where its status is good."""
        now = self._now()
        self._in_flight -= 1
        self._is_asking = False
        self.quota.on_response(response, now, self._server_time(response))
        if self.leaves_a_share and self.quota.limit is not None:
            self.client_limit = None  # an announced quota takes the default's place
        status = response.status
        if status is not None and 200 <= status < 300 and not usable:
            status = None
        # Where a 429 does not say how long to wait: until the window is over.
        pause = retry_after(response)
        if not pause and self.quota.remaining == 0:
            pause = self.quota.resets_at - now
        words = self.breaker.on_response(status, pause, now)
        if words:
            self.cancel_token.cancel(FatalError(EXIT_STOPPED, f"DevRev at {self.host} {words}"))
        self._dispatch()

    def _server_time(self, response: HttpResponse) -> float:
        """The time by DevRev's clock, in epoch seconds."""
        wall = self.environment.now().wall
        with contextlib.suppress(*ODD_ANSWER, OverflowError):
            # The Date header has whole seconds, so small differences are noise.
            skew = parsedate_to_datetime(response.headers["Date"]).timestamp() + 0.5 - wall
            if abs(skew) > 2:
                return wall + skew
        return wall

    # -- waits -------------------------------------------------------------------------------------

    def _note_wait(self, reason: str) -> None:
        """Note what requests wait for from now on, "" where they don't."""
        now = self._now()
        if self.waiting_for:
            log.debug("waited %.3f s (%s)", now - self._noted_at, self.waiting_for)
        if self.waiting_for in (self.QUOTA, self.CLIENT_LIMIT):
            self._waited += now - self._noted_at
        self.waiting_for = reason
        self._noted_at = now

    def quota_wait_seconds(self) -> float:
        """Seconds waited for DevRev's quota or the client-side limit, the present wait included."""
        self._note_wait(self.waiting_for)
        return self._waited


def requests_per_minute(scheduler: RequestScheduler) -> float:
    """Requests that may be sent in the next minute or so: the size of batches follows it."""
    quota = scheduler.quota
    limit = scheduler.client_limit
    most = 1e6
    if quota.limit and quota.length > 30:
        most = min(most, quota.limit - scheduler.share_of_others())
    if limit:
        most = min(most, limit.calls * max(1.0, 60 / limit.period))
    return most


def describe_wait(scheduler: RequestScheduler) -> str:
    """Say what requests wait for, or how much quota is left; "" where neither is known."""
    quota = scheduler.quota
    why = scheduler.waiting_for
    if not why:
        if quota.remaining is None:
            return ""
        return f"{quota.remaining:.0f} of {quota.limit:.0f} units left"
    wait = scheduler.wait_ends - scheduler.environment.now().monotonic
    if wait <= 0.5:
        return ""
    if why == scheduler.QUOTA and scheduler.others == scheduler.FEWER:
        why += ", which other programs use; a twentieth is left to them"
    return f"waiting {duration(wait)} ({why})"


# --------------------------------------------------------------------------------------------------
# API: requests
# --------------------------------------------------------------------------------------------------

PAGE = 100
ROLES = {"owned": "owned_by", "created": "created_by", "reported": "reported_by"}
TICKETS_AND_ISSUES = ("ticket", "issue")
# DevRev's description does not promise that lists take them, and a token may not be allowed to.
OTHER_WORKS = ("task", "incident", "opportunity")


@dataclass
class ApiSettings:
    """What a client is made from.

    `calls` in `period` seconds is the client-side rate limit: 0 is none at all, None follows the
    quota that DevRev announces. `timeout` is in seconds.
    """

    token: str = field(repr=False)
    base_url: str = "https://api.devrev.ai"
    calls: int | None = None
    period: float = 60.0
    timeout: float = 30.0
    retries: int = 5
    workers: int = 8
    user_ref_prefix: str = "user_"  # of the references of the user's own application
    # The .env that each is from; "" where it is from the environment.
    token_file: str = ""
    url_file: str = ""

    def mask(self, text: str) -> str:
        """`text` without the token. One of a few characters is none, and is in every other word."""
        return text.replace(self.token, "[token]") if len(self.token) >= 8 else text


def scopes_needed(endpoint: str, body: Json) -> str:
    """Name the scopes that a request needs, such as `ticket:read`.

    A timeline takes the scope of its object.
    """
    family, _, verb = endpoint.partition(".")
    access = {"merge": "all", "update": "write", "create": "write"}.get(verb, "read")
    kinds = {"rev-users": ["rev_user"], "conversations": ["conversation"]}.get(family, [])
    if endpoint == "works.list":
        kinds = body["type"]
    elif family in ("works", "timeline-entries"):
        kinds = [kind_of(str(body.get("id") or body.get("object")))]
    return " and ".join(f"{kind}:{access}" for kind in kinds)


def kind_of(identity: str) -> str:
    """Return the kind that an id names: `ticket` of `don:core:dvrv-us-1:devo/ORG:ticket/7`."""
    return identity.rpartition(":")[2].partition("/")[0]


def user_ids(name: str, obj: Json) -> set[str]:
    """The ids in a work's `owned_by`, `reported_by` (lists) or `created_by` (one), or a
    conversation's `members`."""
    value = obj.get(name)
    users = value if isinstance(value, list) else [value]
    return {
        user["id"] for user in users if isinstance(user, dict) and isinstance(user.get("id"), str)
    }


class ListResult(NamedTuple):
    """Items of a list, once each, in order; `since` is when its first page was requested."""

    items: list[Json]
    since: Timestamp


class DuplicateStatus(Enum):
    """What a poll of a duplicate, or a list, shows."""

    EXISTS = "exists"  # as the live check saw it
    CHANGED = "changed"  # in another state, or with another email or reference
    NOT_FOUND = "not found"
    DELETED = "deleted"
    IN_PRIMARY = "in primary"  # DevRev names the primary in its place

    @property
    def is_gone(self) -> bool:
        return self not in (DuplicateStatus.EXISTS, DuplicateStatus.CHANGED)


def duplicate_status(user: Json, primary: str, duplicate: Contact) -> DuplicateStatus:
    """Interpret a `rev_user` that DevRev answers with for the duplicate.

    Raises PairError(merged_into_another) where it names another contact than the primary.
    """
    identity = user.get("primary_identity")
    if isinstance(identity, dict):
        identity = identity.get("id")
    named = {user["id"], identity or duplicate.id} - {duplicate.id}
    if named == {primary}:
        return DuplicateStatus.IN_PRIMARY
    if named:
        words = f"{duplicate.id} has become {min(named)}, not the primary"
        raise PairError("merged_into_another", words)
    if user.get("state") == "deleted":
        return DuplicateStatus.DELETED
    seen = (user.get("state"), email_of(user), live_reference(user))
    if seen == ("active", duplicate.key, duplicate.external_ref.strip()):
        return DuplicateStatus.EXISTS
    return DuplicateStatus.CHANGED


# Of what changes DevRev, this may be repeated where its answer is lost. The people of an object may
# be others by then, and only a later read tells what became of a merge or a new contact.
REPEATABLE_WRITE = "rev-users.update"
WRITES = (
    REPEATABLE_WRITE,
    "rev-users.merge",
    "rev-users.create",
    "works.update",
    "conversations.update",
)
PROBE = "dev-users.self"


class Reading:
    """One reading of a list, page by page."""

    STALE_PAGES = 3  # in a row whose items were all seen before
    EMPTY_PAGES = 100  # in a row

    def __init__(self) -> None:
        self.seen: set[int] = set()  # hashes of ids
        self.cursors: set[str] = set()
        self.has_shifted = False  # an item was on two pages, so another may have been on none
        self.has_gaps = False  # a page came again, perhaps in place of another, or none came
        self._stale = 0
        self._empty = 0

    def add(self, ids: set[int], next_cursor: str) -> bool:
        """Note a page; return whether the list goes in circles."""
        if not ids.isdisjoint(self.seen):
            self.has_shifted = True
        if not ids:
            self._empty += 1
        elif ids <= self.seen:
            self.has_gaps = True
            self._stale += 1
        else:
            self._stale = 0
            self._empty = 0
        is_known = next_cursor in self.cursors
        self.seen |= ids
        self.cursors.add(next_cursor)
        return is_known or self._stale >= self.STALE_PAGES or self._empty >= self.EMPTY_PAGES


def is_write(endpoint: str, body: Json) -> bool:
    """Whether a request changes something; an update that sets nothing does not."""
    return endpoint in WRITES and not body.keys() <= {"id", "type"}


class DevRevAPI:
    """The part of DevRev's REST API that a merge needs, over POST with JSON bodies.

    Requests leave when the scheduler lets them, and again where that is safe; lists are read page
    by page. Every method raises ApiError (a definite no), NoUsableResponse (none after the
    retries), PermissionDenied (the token is not accepted), or Cancelled (the run stops, and the
    request was not sent).
    """

    READINGS = 4  # of a list that shifts
    MOST_OVER_QUOTA = 35  # 429s to one request

    def __init__(
        self,
        settings: ApiSettings,
        environment: Environment,
        cancel_token: CancelToken,
    ) -> None:
        self.settings = settings
        self.environment = environment
        self.cancel_token = cancel_token
        self.scheduler = RequestScheduler(environment, cancel_token, settings)
        self.requests: dict[str, int] = collections.Counter()
        self.writes = 0  # requests that may have changed DevRev
        self.work_kinds = [*TICKETS_AND_ISSUES, *OTHER_WORKS]  # that lists name
        self.warnings: list[str] = []  # of what the token can't see
        self._kinds_are_known = False
        self._finding_kinds: asyncio.Lock | None = None  # of the loop that lists
        self._verified_filter_refused = False
        by_email = functools.partial(self._list_by, "email")
        self.emails = BatchLoader(by_email, cancel_token, lambda user: {email_of(user)}, email_key)
        self.unverified = BatchLoader(
            self._list_unverified, cancel_token, lambda user: {email_of(user)}, email_key
        )
        # By the field that names contacts: a work's role, or a conversation's members.
        self.objects = {
            name: BatchLoader(
                functools.partial(self._list_by, name),
                cancel_token,
                functools.partial(user_ids, name),
            )
            for name in (*ROLES.values(), "members")
        }

    # -- requests and lists ------------------------------------------------------------------------

    async def _call(
        self,
        endpoint: str,
        body: Json,
        key: str = "",
        options: RequestOptions = ANY_OPTIONS,
    ) -> tuple[Json, Timestamp]:
        """POST, and return the answer's JSON object, which holds `key`, and when it was sent.

        Without `key` any 2xx will do. Where it is safe, a request is repeated with growing,
        jittered pauses. A write that is not repeatable, or a request with a deadline of its own, is
        sent again only where it can't have been acted on: no connection was made, or it was over
        quota.
        """
        pauses = Backoff(0.2, 8.0)
        attempts = 0
        over_quota = 0
        is_once = options.deadline is not None
        if is_write(endpoint, body) and endpoint != REPEATABLE_WRITE:
            is_once = True
        while True:
            answer, since = await self._send(endpoint, body, key, options)
            if is_good(answer, key):
                return answer.data or {}, since
            if answer.status == 429:  # the scheduler holds the next one back
                over_quota += 1
                if over_quota > self.MOST_OVER_QUOTA:
                    raise ApiError(endpoint, 429, "over quota, however long one waits", {})
                continue
            attempts += 1
            is_final = attempts > self.settings.retries or (answer.sent and is_once)
            problem = self._problem_of(endpoint, body, answer, is_final)
            if isinstance(problem, FatalError):
                self.cancel_token.cancel(problem)  # nothing more is sent
            if problem:
                raise problem
            await self.cancel_token.sleep(self.environment.random.uniform(0.5, 1.0) * pauses.next())

    async def _send(
        self,
        endpoint: str,
        body: Json,
        key: str,
        options: RequestOptions,
    ) -> tuple[HttpResponse, Timestamp]:
        """Send a request once it may leave; return the answer, and when it was sent."""
        await self.scheduler.acquire(options)
        while self.scheduler.breaker.seems_down and endpoint != PROBE:
            # One object's requests may fail for good; one that names none shows if DevRev is down.
            self.scheduler.give_back()
            probe = options._replace(deadline=None, before=None)
            with contextlib.suppress(ApiError, NoUsableResponse):
                await self._call(PROBE, {}, "dev_user", probe)
            await self.scheduler.acquire(options)
        writes = is_write(endpoint, body)
        try:
            self.cancel_token.raise_if_cancelled()
            if options.before:
                await options.before()
            if writes and options.rests_on:
                options.rests_on.require()
            self.requests[endpoint] += 1
            if writes:
                self.writes += 1
            since = self.environment.now()
            answer = await self.environment.post(endpoint, body, options.deadline)
        except BaseException:
            self.scheduler.give_back()
            raise
        if writes and (not answer.sent or answer.status in (401, 403, 429)):
            self.writes -= 1
        self.scheduler.on_response(answer, not key or answer.data is not None)
        return answer, since

    def _problem_of(
        self,
        endpoint: str,
        body: Json,
        answer: HttpResponse,
        is_final: bool,
    ) -> Exception | None:
        """Return what an answer that is no good means; None where the request may be repeated.

        A FatalError where every request would be refused, an ApiError for a definite no: only
        DevRev's JSON is one.
        """
        status = answer.status or 0
        if 300 <= status < 400:
            location = self.settings.mask(str(answer.headers.get("Location", "")))
            words = f"redirected to {location or 'nowhere'}"
            return ApiError(endpoint, status, words, {"location": location})
        words = answer.problem
        if answer.data is None or not 400 <= status < 500 or status == 408:
            if not is_final:
                return None
            words = words or "its answer does not hold what was asked for"
            return NoUsableResponse(endpoint, words)
        if status == 401:
            words = f"DevRev does not accept the token (401: {words.rstrip('.')})"
            advice = "create a new one in DevRev and set DEVREV_API_TOKEN to it"
            return PermissionDenied(EXIT_STOPPED, f"{words}; {advice}")
        if status == 403:
            words += forbidden_words(endpoint, body, answer.data)
        return ApiError(endpoint, status, words, answer.data)

    async def pages(
        self,
        endpoint: str,
        key: str,
        body: Json,
        options: RequestOptions = ANY_OPTIONS,
    ) -> ListResult:
        """Return all items of a cursor-paged list."""
        pages = [page async for page in self.each_page(endpoint, key, body, options)]
        items = chain.from_iterable(page.items for page in pages)
        return ListResult(list(items), pages[0].since)

    async def each_page(
        self,
        endpoint: str,
        key: str,
        body: Json,
        options: RequestOptions = ANY_OPTIONS,
    ) -> AsyncIterator[ListResult]:
        """Yield the pages of a list, without items that were on earlier ones.

        An item on two pages shows that the list has shifted: it is read again until a reading adds
        nothing. So is one whose cursor is refused, because it has expired. Raises NoUsableResponse
        where that does not help, or where the list goes in circles.
        """
        known: set[int] = set()  # hashes of ids, of all readings
        has_shifted = False
        for number in range(1, self.READINGS + 1):
            reading = Reading()
            before = len(known)
            # Where always the same page is left out, others are with another length.
            page = {"limit": PAGE // number, **body}
            while True:
                try:
                    reply, since = await self._call(endpoint, page, key, options)
                except ApiError as error:
                    if "cursor" not in page:
                        raise
                    log.info("a cursor is refused: %s", error)
                    reading.has_shifted = True
                    reading.has_gaps = True
                    break
                items = objects_in(reply[key], endpoint, key)
                cursor = str(reply.get("next_cursor") or "")
                in_circles = reading.add({hash(item["id"]) for item in items}, cursor)
                new = [item for item in by_id(items).values() if hash(item["id"]) not in known]
                known.update(hash(item["id"]) for item in new)
                yield ListResult(new, since)
                if not cursor:
                    break
                if in_circles:
                    raise NoUsableResponse(endpoint, "its pages bring nothing new")
                page["cursor"] = cursor
                # Before other lists begin: a cursor may expire.
                options = options._replace(priority=min(options.priority, VERIFY))
            has_shifted = has_shifted or reading.has_shifted
            if not has_shifted or (len(known) == before and not reading.has_gaps):
                return
            log.info("%s: reading the list again", endpoint)
        words = "its items move, or its cursors expire, each time that it is read"
        raise NoUsableResponse(endpoint, words)

    async def get_one(
        self,
        endpoint: str,
        body: Json,
        key: str,
        options: RequestOptions,
    ) -> Json:
        """Return the one object in an answer. Raises NoUsableResponse where there is none."""
        found, _ = await self._call(endpoint, body, key, options)
        return objects_in([found[key]], endpoint, key)[0]

    # -- contacts ----------------------------------------------------------------------------------

    async def _get_contact(self, identity: str, options: RequestOptions) -> Json | None:
        """Return what DevRev has at this id; None where there is none (an object's 404).

        Of a contact that has become another one (301) only the other's id: `{"id": …}`.
        """
        try:
            return await self.get_one("rev-users.get", {"id": identity}, "rev_user", options)
        except ApiError as error:
            if error.missing:
                return None
            location = unquote(str(error.data.get("location")))
            match = re.search(r"don:identity:[^&?#\s]+:revu/[^&?#/\s]+", location)
            if match is None or match.group(0) == identity:
                raise
            return {"id": match.group(0)}

    async def contact(self, identity: str, options: RequestOptions = ANY_OPTIONS) -> Json | None:
        """Return the rev user of this id, None where there is none or it has become another."""
        user = await self._get_contact(identity, options)
        return user if user and user["id"] == identity else None

    async def poll_duplicate(
        self,
        primary: str,
        duplicate: Contact,
        options: RequestOptions,
    ) -> DuplicateStatus:
        """Return what has become of the duplicate.

        Raises PairError(merged_into_another) where DevRev names another contact than the primary.
        """
        user = await self._get_contact(duplicate.id, options)
        if user is None:
            return DuplicateStatus.NOT_FOUND
        return duplicate_status(user, primary, duplicate)

    async def contacts_by_email(self, emails: Iterable[str], priority: int = PREPARE) -> ListResult:
        """Return the contacts that DevRev lists for these emails."""
        return await load_all(self.emails, emails, priority)

    async def unverified_ids(
        self, emails: Iterable[str], priority: int = PREPARE
    ) -> set[str] | None:
        """Return the ids of the unverified contacts of these emails, None where that is not known.

        It is for organisations whose answers do not show `is_verified`. DevRev may refuse the
        filter; a list that shows verified contacts all the same has ignored it.
        """
        if self._verified_filter_refused:
            return None
        users = (await load_all(self.unverified, emails, priority)).items
        if self._verified_filter_refused or any(user.get("is_verified") is True for user in users):
            return None
        return {user["id"] for user in users}

    async def holders_of(self, external_ref: str, options: RequestOptions) -> list[Json]:
        """Return the contacts that DevRev lists for a reference, in a call of its own."""
        body = {"external_ref": [external_ref]}
        return (await self.pages("rev-users.list", "rev_users", body, options)).items

    async def merge(
        self,
        primary: str,
        duplicate: str,
        options: RequestOptions,
    ) -> None:
        """Request a merge. DevRev only acknowledges it and carries it out later."""
        body = {"primary_user": primary, "secondary_user": duplicate}
        await self._call("rev-users.merge", body, options=options)

    async def update_contact(
        self,
        identity: str,
        fields: Json,
        options: RequestOptions,
    ) -> Json:
        """Set fields of a contact, and return the contact as DevRev has it then.

        Raises ApiError with status 409 while another contact holds its `external_ref`.
        """
        endpoint = "rev-users.update"
        user = await self.get_one(endpoint, {"id": identity, **fields}, "rev_user", options)
        if user["id"] != identity:
            raise NoUsableResponse(endpoint, f"the answer is about {user['id']}, not {identity}")
        return user

    async def create_contact(self, fields: Json, options: RequestOptions) -> Json:
        """Create a contact and return it. The caller finds out what a lost answer would say."""
        return await self.get_one("rev-users.create", fields, "rev_user", options)

    async def set_people(
        self,
        obj: Json,
        roles: Mapping[str, Sequence[str]],
        options: RequestOptions,
    ) -> Json:
        """Replace the people of a work or a conversation, by role, and return it.

        Without roles nothing is changed: it shows whether the token may.
        """
        body: Json = {"id": obj["id"], **{role: {"set": list(ids)} for role, ids in roles.items()}}
        if kind_of(obj["id"]) == "conversation":
            return await self.get_one("conversations.update", body, "conversation", options)
        return await self.get_one("works.update", {"type": obj["type"], **body}, "work", options)

    def dispatch(self) -> None:
        """Send every list call that waits for others to join."""
        for batch_loader in (self.emails, self.unverified, *self.objects.values()):
            batch_loader.dispatch()

    async def timeline(self, object_id: str) -> list[Json]:
        """Return all comments on a ticket, issue or conversation."""
        body = {"object": object_id}
        return (await self.pages("timeline-entries.list", "timeline_entries", body)).items

    async def get_object(self, object_id: str, options: RequestOptions) -> Json | None:
        """Return a work or a conversation, None where there is none of that id."""
        endpoint = "works.get"
        key = "work"
        if kind_of(object_id) == "conversation":
            endpoint = "conversations.get"
            key = "conversation"
        try:
            return await self.get_one(endpoint, {"id": object_id}, key, options)
        except ApiError as api_error:
            if api_error.missing:
                return None
            raise

    # -- what the batch loaders call ---------------------------------------------------------------

    async def _list_unverified(self, emails: Sequence[str], options: RequestOptions) -> ListResult:
        """List with the filter, which DevRev may refuse, for a single email, too."""
        body = {"email": list(emails), "is_verified": False}
        try:
            return await self.pages("rev-users.list", "rev_users", body, options)
        except ApiError as error:
            if error.status not in (400, 403):
                raise
            if len(emails) > 1:
                await self._list_unverified(emails[:1], options)
                if not self._verified_filter_refused:
                    raise  # of so many emails
            self._verified_filter_refused = True
            return ListResult([], self.environment.now())

    async def _list_by(
        self,
        name: str,
        keys: Sequence[str],
        options: RequestOptions,
    ) -> ListResult:
        """List contacts by `email`, conversations by `members`, or all works by a role."""
        body: Json = {name: list(keys)}
        if name == "email":
            return await self.pages("rev-users.list", "rev_users", body, options)
        if name == "members":
            return await self.pages("conversations.list", "conversations", body, options)
        self._finding_kinds = self._finding_kinds or asyncio.Lock()
        async with self._finding_kinds:  # one list finds out for all
            if not self._kinds_are_known:
                try:
                    found = await self._list_works(self.work_kinds, body, options)
                    self._kinds_are_known = True
                    return found
                except ApiError as error:
                    if error.status not in (400, 403):
                        raise
                    await self._find_kinds({name: keys[:1]}, options)
        return await self._list_works(self.work_kinds, body, options)

    async def _list_works(
        self,
        kinds: Iterable[str],
        body: Json,
        options: RequestOptions,
    ) -> ListResult:
        return await self.pages("works.list", "works", {"type": list(kinds), **body}, options)

    async def _find_kinds(self, body: Json, options: RequestOptions) -> None:
        """Try each further kind of works beside tickets and issues, and leave out what is refused.

        Raises ApiError where these are refused, too: that says nothing of kinds.
        """
        await self._list_works(TICKETS_AND_ISSUES, body, options)
        for kind in self.work_kinds[len(TICKETS_AND_ISSUES) :]:
            try:
                await self._list_works((*TICKETS_AND_ISSUES, kind), body, options)
            except ApiError as error:
                if error.status not in (400, 403):
                    raise
                self.work_kinds.remove(kind)
                words = f"works of type {kind} are not backed up: DevRev does not list them"
                self.warnings.append(f"{words} ({error.status})")
                level = logging.INFO if error.status == 400 else logging.WARNING
                log.log(level, "%s", self.warnings[-1])
        self._kinds_are_known = True


async def load_all(loader: BatchLoader, keys: Iterable[str], priority: int) -> ListResult:
    """Return what a loader finds for these keys, once each."""
    lists = await together(*(loader.load(key, 1, priority) for key in sorted(set(keys))))
    found = by_id(chain.from_iterable(one.items for one in lists))
    return ListResult(list(found.values()), oldest(one.since for one in lists))


CHECK_NETWORK = "Check the network, DEVREV_BASE_URL, HTTPS_PROXY and REQUESTS_CA_BUNDLE."


def is_good(answer: HttpResponse, key: str) -> bool:
    """Whether an answer is a 2xx with an object that holds `key`; without `key` any 2xx is."""
    if answer.status is None or not 200 <= answer.status < 300:
        return False
    return not key or (answer.data is not None and key in answer.data)


def forbidden_words(endpoint: str, body: Json, data: Json) -> str:
    """Say which objects a 403 is about, and what the token needs."""
    words = ""
    ids = data.get("object_ids")
    if isinstance(ids, list) and ids:
        words = f" ({', '.join(some([str(one).rpartition('/')[2] for one in ids]))})"
    scopes = scopes_needed(endpoint, body)
    if scopes:
        words += f"; the token needs the scope {scopes}, and its owner access"
    return words


def objects_in(items: Any, endpoint: str, key: str) -> list[Json]:
    """Return `items` of an answer. Raises NoUsableResponse where they are no objects with an id."""
    if isinstance(items, list):
        ids = [item.get("id") if isinstance(item, dict) else None for item in items]
        if all(isinstance(one, str) and encodable(one) == one != "" for one in ids):
            return items
    raise NoUsableResponse(endpoint, f"{key} is not made of objects with an id")


@contextlib.contextmanager
def before_any_change(api: DevRevAPI) -> Iterator[None]:
    """Turn what the API raises into the FatalError that ends a run which has changed nothing."""
    try:
        yield
    except NoUsableResponse as error:
        words = f"DevRev at {api.scheduler.host} can't be read: {error}. {CHECK_NETWORK}"
        raise FatalError(EXIT_STOPPED, words) from None
    except ApiError as error:
        hint = "" if error.status == 403 else " (is DEVREV_BASE_URL right?)"
        raise FatalError(EXIT_USAGE, f"{error}{hint}") from None
    except FatalError as stop:
        reason = api.cancel_token.stop or stop
        if isinstance(reason, PermissionDenied):
            raise FatalError(EXIT_USAGE, str(reason)) from None
        raise reason from None


# --------------------------------------------------------------------------------------------------
# API: one list call for many contacts
# --------------------------------------------------------------------------------------------------

Lister = Callable[[Sequence[str], RequestOptions], Awaitable[ListResult]]
LINGER = 0.02  # seconds for which a key lingers for others to join


class PendingKey(NamedTuple):
    """A key that waits to be listed for."""

    key: str
    weight: int  # items that are expected
    priority: int
    future: asyncio.Future[ListResult]


class BatchLoader:
    """Lists for many contacts with one call, though each key is loaded by itself: a key lingers.

    A call names as many keys as fit on a few pages, so that a contact with a thousand tickets does
    not age what is read for its neighbours. A call that fails is halved until the key that it fails
    for is found, and only that key fails; where an item names none of the requested keys, each is
    listed by itself.
    """

    MAX_ITEMS = 250  # items that are expected
    MAX_UNANSWERED = 6  # calls in a row after which it is no single key's fault

    def __init__(
        self,
        lister: Lister,
        token: CancelToken,
        owners: Callable[[Json], set[str]],
        name: Callable[[str], str] = str,
    ) -> None:
        self._lister = lister
        self._cancel_token = token
        self._owners = owners  # the names that an item belongs to
        self._name = name  # of a key
        self._pending: list[PendingKey] = []
        self._timer: asyncio.TimerHandle | None = None
        self._max_keys = PAGE  # keys a call
        self._has_listed = False
        self._unanswered = 0  # calls in a row without a usable answer
        self._calls: set[asyncio.Future[None]] = set()

    async def load(
        self,
        key: str,
        weight: int = 1,
        priority: int = PREPARE,
        linger: float = LINGER,
    ) -> ListResult:
        """Return what the list holds of `key`, of which `weight` items are expected.

        Raises what the call raises.
        """
        loop = asyncio.get_event_loop()
        future = self._cancel_token.future()
        self._pending.append(PendingKey(key, max(1, weight), priority, future))
        weights = sum(each.weight for each in self._pending)
        if len(self._pending) >= self._max_keys or weights >= self.MAX_ITEMS:
            self.dispatch()
        elif self._timer is None or loop.time() + linger < self._timer.when():
            if self._timer:
                self._timer.cancel()
            self._timer = loop.call_later(linger, self.dispatch)
        found: ListResult = await future
        return found

    def dispatch(self) -> None:
        """Send the calls for all keys that linger, the light ones together."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        pending = sorted(self._pending, key=attrgetter("weight"))
        self._pending = []
        while pending:
            weights = list(accumulate(each.weight for each in pending))
            count = min(self._max_keys, max(1, bisect.bisect_right(weights, self.MAX_ITEMS)))
            call = asyncio.ensure_future(self._fetch(pending[:count]))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            pending = pending[count:]

    async def _fetch(self, pending: Sequence[PendingKey]) -> None:
        """List for these keys with one call, or part by part where that fails."""
        keys = list(dict.fromkeys(each.key for each in pending))
        options = RequestOptions(min(each.priority for each in pending))
        parts: list[Sequence[str]] = []
        try:
            listing = await self._lister(keys, options)
            self._has_listed = True
            self._unanswered = 0
            parts = self._deliver(pending, keys, listing)
        except BaseException as error:
            if isinstance(error, (ApiError, NoUsableResponse)):
                parts = await self._parts_to_list(keys, error, options)
            if not parts:
                for each in pending:
                    if not each.future.done():
                        each.future.set_exception(error)
        fetches = []
        for part in parts:
            fetches.append(self._fetch([each for each in pending if each.key in part]))
        await together(*fetches)

    async def _parts_to_list(
        self,
        keys: Sequence[str],
        error: PairError,
        options: RequestOptions,
    ) -> list[Sequence[str]]:
        """Return which keys to list for together after an error; none where it is final."""
        half = (len(keys) + 1) // 2
        if len(keys) == 1:
            self._max_keys = PAGE  # it was this key, not their number
            return []
        if isinstance(error, ApiError):
            if error.status == 429:
                return []
            self._max_keys = min(self._max_keys, half)
            is_unclear = error.status == 403 and not self._has_listed
            if is_unclear and not await self._can_list(keys, options):
                return []
        else:
            self._unanswered += 1
            if self._unanswered > self.MAX_UNANSWERED:
                return []
        return [keys[:half], keys[half:]]

    async def _can_list(self, keys: Sequence[str], options: RequestOptions) -> bool:
        """Whether one of some single keys is listed. Where none is, the token is at fault: halving
        down to each of many contacts would cost two requests a contact."""
        for key in keys[:: max(1, len(keys) // 4)]:
            with contextlib.suppress(ApiError, NoUsableResponse, FatalError):
                await self._lister([key], options)
                self._has_listed = True
                return True
        return False

    def _deliver(
        self,
        pending: Sequence[PendingKey],
        keys: Sequence[str],
        listing: ListResult,
    ) -> list[Sequence[str]]:
        """Give each key what was listed of it, and return no parts.

        Where an item names none of several keys, return each key as a part to list by itself.
        """
        found = {key: ListResult([], listing.since) for key in keys}
        names = [(key, self._name(key)) for key in keys]
        for item in listing.items:
            owners = self._owners(item)
            mine = [key for key, name in names if name in owners or len(keys) == 1]
            if not mine:
                log.info("an item names none of the requested keys; listing one by one")
                return [[key] for key in keys]
            for key in mine:
                found[key].items.append(item)
        for each in pending:
            if not each.future.done():
                each.future.set_result(found[each.key])
        return []


# --------------------------------------------------------------------------------------------------
# Backup: what DevRev holds of a group, on the disk
# --------------------------------------------------------------------------------------------------


@dataclass
class ContactSnapshot:
    """What DevRev has of one contact. Works and conversations are API objects by id."""

    contact: Contact
    live: Json
    roles: dict[str, dict[str, Json]]  # a role of ROLES -> works
    conversations: dict[str, Json]

    def works(self) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for works in self.roles.values():
            found.update(works)
        return found

    def objects(self) -> dict[str, Json]:
        """Return everything that has a timeline, by id."""
        return {**self.works(), **self.conversations}


Timelines = Mapping[str, List[Json]]
INCOMPLETE_BACKUP = ".incomplete_"
CONTACT_FILES = ("contact.json", "works.json", "conversations.json", "timelines.json")


def write_backup(
    environment: Environment,
    home: Path,
    facts: Json,
    snapshots: Sequence[ContactSnapshot],
    timelines: Timelines,
) -> Path:
    """Back up a group as `<home>/<YYYYmmdd_HHMMSS>/` (UTC); `home` is its email's in `backups/`.

    The first of `snapshots` is the primary; `facts` stand in the manifest, too. Files are written
    to a temporary folder and flushed, and the folder is renamed: a kill leaves no half backup.
    Raises OSError.
    """
    environment.make_private_dir(home)
    if home.resolve().parent != home.parent.resolve():
        raise OSError(f"{home} is a link that leads out of {home.parent}; remove it")
    stamp = int(environment.now().wall)
    while (home / timestamp_name(stamp)).exists():
        stamp += 1
    final = home / timestamp_name(stamp)
    aside = home / f"{INCOMPLETE_BACKUP}{os.getpid()}_{final.name}"
    aside.mkdir(mode=0o700)
    manifest: Json = {
        "format": 1,
        "tool": f"merge_contacts {__version__}",
        "created": iso(environment.now().wall),
        **facts,
        "contacts": [],
        "files": {},
    }
    for index, snapshot in enumerate(snapshots):
        role = "primary" if index == 0 else "duplicate"
        name = str(snapshot.live.get("display_id") or snapshot.contact.short_id)
        folder = f"{role}_{safe_name(name)}"
        if (aside / folder).exists():  # where a file system ignores case, two may be one
            folder += f"_{index}"
        (aside / folder).mkdir(mode=0o700)
        read = {one: timelines[one] for one in snapshot.objects() if one in timelines}
        counts = {role: len(works) for role, works in snapshot.roles.items()}
        counts["conversations"] = len(snapshot.conversations)
        counts["timeline_entries"] = sum(map(len, read.values()))
        entry = {
            "folder": folder,
            "role": role,
            "csv": snapshot.contact.to_json(),
            "counts": counts,
            "works": {role: list(works) for role, works in snapshot.roles.items()},
            "conversations": list(snapshot.conversations),
        }
        manifest["contacts"].append(entry)
        contents = (
            snapshot.live,
            list(snapshot.works().values()),
            list(snapshot.conversations.values()),
            read,
        )
        for name, content in zip(CONTACT_FILES, contents):
            chunks = [to_json(content, indent=1)]
            size, digest = environment.create_file(aside / folder / name, chunks)
            manifest["files"][f"{folder}/{name}"] = {"bytes": size, "sha256": digest}
        environment.fsync_dir(aside / folder)
    environment.create_file(aside / "manifest.json", [to_json(manifest, indent=1)])
    environment.fsync_dir(aside)
    environment.rename_into_place(aside, final)
    return final


def timestamp_name(epoch: float) -> str:
    """Name a moment in UTC: local names would sort backwards in the hour that autumn has twice."""
    return time.strftime("%Y%m%d_%H%M%S", time.gmtime(epoch))


LARGEST_FILE = 256 << 20  # bytes, of a backup


@dataclass
class Backup:
    """A backup as it is on the disk. What reads it may raise OSError and ODD_ANSWER."""

    folder: Path
    manifest: Json
    sha256: str  # of manifest.json
    holdings: Json = field(default_factory=dict)  # how much it holds, by kind, once it is verified

    def entry(self, contact: str) -> Json:
        """Return the manifest's entry of a contact."""
        entries = {entry["csv"]["id"]: entry for entry in self.manifest["contacts"]}
        return entries[contact]  # type: ignore[no-any-return]

    def file(self, entry: Json, name: str) -> Any:
        """Return a file of one contact, `entry` being the manifest's of it, as it was written."""
        if not re.fullmatch(r"(primary|duplicate)_[^/\\]+", entry["folder"]):
            raise ValueError("no backup has such a folder")
        path = f"{entry['folder']}/{name}"
        content = backup_bytes(self.folder / path)
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][path]["sha256"]:
            raise ValueError(f"{path} differs from what was written")
        return json.loads(content)

    def ids(self) -> set[str]:
        """Return the ids of its contacts."""
        return {entry["csv"]["id"] for entry in self.manifest["contacts"]}

    def contact(self, identity: str) -> Json:
        """Return the `rev_user` of a contact."""
        user: Json = self.file(self.entry(identity), "contact.json")
        return user

    def to_transfer(self, contact: str) -> list[Json]:
        """Return what a merge moves from a contact to the primary, as `{id, role}`.

        `role` is `owned_by` or `reported_by` of a work, `members` of a conversation.
        """
        entry = self.entry(contact)
        items = []
        for name in ("owned", "reported"):
            items += [{"id": work, "role": ROLES[name]} for work in entry["works"][name]]
        items += [{"id": talk, "role": "members"} for talk in entry["conversations"]]
        return items


def backup_bytes(path: Path) -> bytes:
    """Return what a file of a backup holds; raises OSError where it is none that could be."""
    with open_regular(path) as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE or path.parent.is_symlink():
        raise OSError(errno.EINVAL, "no file of a backup")
    return content


@contextlib.contextmanager
def reading_backup(folder: str) -> Iterator[Backup]:
    """Read a backup's manifest; what an odd backup raises becomes PairError(backup_failed)."""
    try:
        content = backup_bytes(Path(folder) / "manifest.json")
        yield Backup(Path(folder), json.loads(content), hashlib.sha256(content).hexdigest())
    except (OSError, *ODD_ANSWER) as error:
        words = f"the backup {folder} is not as it was written"
        raise PairError("backup_failed", f"{words}: {type(error).__name__} {error}") from None


def verify_backup(folder: str) -> Backup:
    """Read a backup again from the disk; nothing is opened but the files that a backup has.

    What two contacts share is counted once. Raises PairError(backup_failed).
    """
    with reading_backup(folder) as backup:
        works: dict[str, Json] = {}
        talks: dict[str, Json] = {}
        timelines: Json = {}
        contacts = backup.manifest["contacts"]
        if len(backup.manifest["files"]) != len(contacts) * len(CONTACT_FILES):
            raise ValueError("it names other files than a backup has")
        for entry in contacts:
            live, *lists, read = (backup.file(entry, name) for name in CONTACT_FILES)
            my_works, my_talks = map(by_id, lists)
            is_whole = (
                live["id"] == entry["csv"]["id"]
                and set(my_works) == set(chain(*entry["works"].values()))
                and set(my_talks) == set(entry["conversations"])
            )
            has_timelines = {*my_works, *my_talks} == set(read) or not backup.manifest["timelines"]
            if not (is_whole and has_timelines):
                raise ValueError(f"{entry['folder']} does not hold what the manifest says")
            works.update(my_works)
            talks.update(my_talks)
            timelines.update(read)
        backup.holdings = {
            "works": len(works),
            "conversations": len(talks),
            "timeline_entries": sum(map(len, timelines.values())),
        }
        return backup


def ticket_count(works: Iterable[Iterable[str]]) -> int:
    """Return the greatest number of ids in one of several lists, counting as the warehouse does:
    tickets and issues."""
    greatest = 0
    for ids in works:
        counted = [one for one in set(ids) if kind_of(one) in TICKETS_AND_ISSUES]
        greatest = max(greatest, len(counted))
    return greatest


def backed_up_contact(backup: str, identity: str) -> Json:
    """Return the `rev_user` of a contact as a backup holds it. Raises PairError(backup_failed)."""
    with reading_backup(backup) as found:
        return found.contact(identity)


def describe(backup: str, items: Iterable[Json]) -> list[Json]:
    """Add display id, kind and title from a backup to objects (`{id, role, …}`)."""
    known: dict[str, Json] = {}
    for path in (*Path(backup).glob("*/works.json"), *Path(backup).glob("*/conversations.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known.update(by_id(json.loads(backup_bytes(path))))
    found = []
    for item in items:
        obj = known.get(item["id"], {})
        shown = {
            "display_id": obj.get("display_id") or item["id"],
            "kind": obj.get("type") or kind_of(item["id"]),
            "title": obj.get("title") or "",
        }
        found.append({**item, **shown})
    return found


def by_id(items: Iterable[Json]) -> dict[str, Json]:
    return {item["id"]: item for item in items}


# --------------------------------------------------------------------------------------------------
# Savepoint: what was done, across crashes
# --------------------------------------------------------------------------------------------------


class StoredRow(NamedTuple):
    """A row of the table `pairs`, whose key are its ids, or of `runs`, with its id and ""."""

    revision: int  # the number of the write that stored it
    run: str
    document: Json  # of a run: the report's `run`, and `reported`: whether it was written


Rows = Mapping[Ids, StoredRow]


def winning_row(one: StoredRow, other: StoredRow) -> StoredRow:
    """Return which of two files to believe about one pair or run.

    The higher revision wins, for clocks can be set; at equal revisions the state that says more was
    done. A row that records a request never loses to one that doesn't.
    """

    def authority(row: StoredRow) -> tuple[int, int, float]:
        state = row.document.get("state", State.PLANNED)
        return row.revision, AUTHORITY.index(state), row.document.get("requested_at", 0.0)

    winner, loser = sorted((one, other), key=authority, reverse=True)
    forgets = loser.document.get("requested_at") and not winner.document["requested_at"]
    if forgets and winner.document["state"] in (State.PLANNED, State.FAILED):
        return loser._replace(revision=winner.revision)
    return winner


FIRST_FORMAT = 3  # the oldest one that is read: that of version 3.0.0
# The SQL that takes a file from each format to the next. A new field of a pair needs no other step
# than a default. A new meaning of an old one, a table or a state needs another format, and an entry
# here.
MIGRATIONS: Sequence[Sequence[str]] = (
    (),  # 3 to 4: rows may have fields that 3.0.0 would refuse
)
FORMAT = FIRST_FORMAT + len(MIGRATIONS)


class SavePointFile:
    """One of the savepoint's two SQLite files; each is complete without the other.

    Reads and writes raise sqlite3.Error.
    """

    APPLICATION = 0x4D434F4E  # "MCON", in the file's header
    ATTEMPTS = 6  # to read it between two transactions of a run
    db: sqlite3.Connection  # once it is open
    SCHEMA = """
        CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE runs (id TEXT PRIMARY KEY, revision INTEGER NOT NULL, document TEXT NOT NULL);
        CREATE TABLE pairs (
            primary_id TEXT NOT NULL, duplicate_id TEXT NOT NULL, organisation TEXT NOT NULL,
            email TEXT NOT NULL, state TEXT NOT NULL, new_ref TEXT, run TEXT NOT NULL,
            revision INTEGER NOT NULL, document TEXT NOT NULL,
            PRIMARY KEY (primary_id, duplicate_id)
        );
        CREATE INDEX pairs_by_state ON pairs (state);
        CREATE INDEX pairs_by_duplicate ON pairs (duplicate_id);
        CREATE INDEX pairs_by_run ON pairs (run)
    """

    def __init__(self, path: Path, environment: Environment) -> None:
        self.path = path
        self.environment = environment
        self.failure: FatalError | None = None  # it can't be written any more

    def check_header(self) -> None:
        """Read the header (https://sqlite.org/fileformat.html) before SQLite may touch the file.

        Raises OSError, and FatalError(2) where it is damaged, a stranger's, or of a format that
        this version does not read.
        """
        for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
            if os.path.lexists(str(path)):
                check_owner(path)
        if not os.path.lexists(str(self.path)):
            return
        with open_regular(self.path) as file:
            head = file.read(100)
        if not head:
            return
        version = int.from_bytes(head[60:64], "big")
        application = int.from_bytes(head[68:72], "big")
        if len(head) < 100 or application not in (0, self.APPLICATION):
            raise self._damaged("it is not a savepoint")
        if application and not FIRST_FORMAT <= version <= FORMAT:
            known = f"formats {FIRST_FORMAT} to {FORMAT}"
            raise self._other_format(f"it has format {version}, and this version reads {known}")

    def _damaged(self, why: str) -> FatalError:
        words = f"{self.path} is damaged and was left as it is ({why})."
        other = SAVEPOINT_COPY if self.path == SAVEPOINT else SAVEPOINT
        if other.exists():
            words += f" Move it away and run again: {other} has everything that it had."
        return FatalError(EXIT_USAGE, words)

    def _other_format(self, why: str) -> FatalError:
        words = f"{self.path} was left as it is: {why}. Continue it with the version that wrote it."
        return FatalError(EXIT_USAGE, words)

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Turn what keeps the file from being opened into the FatalError that says so."""
        name = f"the savepoint {self.path}"
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise FatalError(EXIT_STOPPED, f"{name} can't be used: {why}") from None
        except sqlite3.Error as error:
            text = str(error)
            is_operational = isinstance(error, sqlite3.OperationalError)
            if not is_operational or re.search("no such|unsupported file format", text):
                raise self._damaged(text) from None
            if "locking protocol" in text or not locks_work(self.path):
                raise FatalError(EXIT_USAGE, f"{name} can't be locked: {NO_LOCKS}") from None
            if "locked" in text:
                raise FatalError(EXIT_HELD, self.held_by()) from None
            words = f"{name} can't be written: {text}; nothing was changed"
            raise FatalError(EXIT_STOPPED, words) from None

    def held_by(self) -> str:
        """Say that another run is using the file, and which, where that is known."""
        words = f"another run is using {self.path}"
        with contextlib.suppress(sqlite3.Error, KeyError, FatalError):
            holder = SavePoint(self.environment, readonly=True).holder
            process = f"process {holder['pid']} on {holder['host']}"
            words += f": {process}, since {minute(holder['since'])}"
        return words

    def connect(self, mode: str) -> sqlite3.Connection:
        # as_uri() makes of a network share what SQLite does not take.
        path = os.fsencode((Path.cwd() / self.path).as_posix())
        slash = "" if path.startswith(b"/") else "/"
        return self.environment.open_database(f"file:{slash}{quote(path, safe='/:')}?{mode}")

    def open(self) -> None:
        """Lock the file for as long as it is open, and begin its first transaction.

        The lock of savepoint.db is the run's; its copy is used without one where the file system
        has none.
        """
        if self.path == SAVEPOINT_COPY:
            self.environment.make_private_dir(self.path.parent)
        try:
            self._begin("mode=rwc")
        except sqlite3.OperationalError as error:
            if self.path == SAVEPOINT or "locking protocol" not in str(error):
                raise
            self._begin("mode=rwc&nolock=1")
            log.warning("%s is on a file system without locks and is used without", self.path)

    def _begin(self, mode: str) -> None:
        self.db = self.connect(mode)
        # Who only reads releases the file in a moment.
        self.db.execute("PRAGMA busy_timeout = 1000")
        self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self.db.execute("PRAGMA synchronous = EXTRA")
        self.db.execute("BEGIN EXCLUSIVE")

    def content(self) -> tuple[Rows, dict[str, str]]:
        """Check what the file holds, and return it.

        A file without tables (it is new, or a run was killed in its first transaction) gets them;
        one of an older format is migrated. Raises FatalError(2) where a newer version wrote a row.
        """
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if not self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in self.SCHEMA.split(";"):
                self.db.execute(statement)
            self.db.execute(f"PRAGMA application_id = {self.APPLICATION}")
        elif not FIRST_FORMAT <= version <= FORMAT:
            raise sqlite3.DatabaseError("it is another program's database")
        else:
            for statement in chain.from_iterable(MIGRATIONS[version - FIRST_FORMAT :]):
                self.db.execute(statement)
        if version != FORMAT:
            self.db.execute(f"PRAGMA user_version = {FORMAT}")
        problem = self.db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        meta = dict(self.db.execute("SELECT name, value FROM meta"))
        rows: dict[Ids, StoredRow] = {}
        query = """
            SELECT id, '', revision, id, document FROM runs UNION ALL
            SELECT primary_id, duplicate_id, revision, run, document FROM pairs
        """
        try:
            for one, other, revision, run, text in self.db.execute(query):
                # What another version wrote is kept as it is, but it has to be understood.
                document = json.loads(text)
                if other:
                    Pair.from_json(document)
                rows[one, other] = StoredRow(revision, run, document)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            why = f"another version has written it ({error})"
            raise self._other_format(why) from None
        return rows, meta

    def write(self, rows: Rows, meta: Mapping[str, str]) -> None:
        """Store rows in one transaction; when it returns they are on the disk."""
        pairs = []
        runs = []
        for ids, row in rows.items():
            document = row.document
            text = to_json(document).decode()
            if not ids[1]:
                runs.append((row.run, row.revision, text))
                continue
            email = encodable(document["primary"]["email"])
            new_ref = document["new_ref"] and encodable(document["new_ref"])
            about = (organisation_of(ids[0]), email, document["state"], new_ref)
            pairs.append((*ids, *about, row.run, row.revision, text))
        try:
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany(
                f"INSERT OR REPLACE INTO pairs VALUES ({', '.join('?' * 9)})", pairs
            )
            self.db.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", runs)
            self.db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(meta.items()))
            self.db.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise

    def read_snapshot(self) -> None:
        """Load the content into memory, without a lock and without writing, also during a run.

        SQLite would have to roll back what a killed run left: that happens in a temporary copy.
        """
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        journal = self.path.with_name(f"{self.path.name}-journal")
        for attempt in range(self.ATTEMPTS):
            time.sleep(attempt / 10)
            if not self.path.exists():
                break
            try:
                with tempfile.TemporaryDirectory() as folder:
                    before = self._change_counter()
                    for path in (self.path, journal):
                        if path.exists():
                            shutil.copy(str(path), folder)
                    aside = Path(folder) / self.path.name
                    with contextlib.closing(sqlite3.connect(str(aside))) as db:
                        db.backup(memory)
                    if self._change_counter() == before:
                        break
            except (FileNotFoundError, sqlite3.DatabaseError):
                if attempt == self.ATTEMPTS - 1:
                    raise
        self.db = memory

    def _change_counter(self) -> bytes:
        """What tells whether a transaction ended meanwhile."""
        with open_regular(self.path) as file:
            return file.read(28)[24:]


class SavePoint:
    """What was done, twice: in `savepoint.db`, and in the copy in `backups/`.

    Each write goes to the file and then to its copy, each in a transaction of its own; a request
    that changes DevRev is sent only after both. So a file that is lost, or replaced by an older
    one, loses nothing: at opening each takes from the other the rows of higher revision. One
    transaction over two attached files was tried and rejected: each file then names SQLite's
    super-journal by its absolute path, and a kill followed by a move corrupts the other.

    A run holds both files exclusively. `readonly` joins them in memory. `organisation`, once set,
    limits what is read. Raises FatalError(2) where a file is damaged or of another format,
    FatalError(3) where one can't be written, FatalError(11) where another run holds one.
    """

    def __init__(
        self,
        environment: Environment,
        run: str = "",
        readonly: bool = False,
    ) -> None:
        self.environment = environment
        self.run = run
        self.organisation = ""
        self.main = SavePointFile(SAVEPOINT, environment)
        self.copy = SavePointFile(SAVEPOINT_COPY, environment)
        self.files = (self.main, self.copy)
        self.meta: dict[str, str] = {}
        self.holder: Json = {}  # who opened the savepoint last: `pid`, `host`, `since`
        self._lock = threading.Lock()  # one thread at a time uses the connections
        self._pending: dict[Ids, StoredRow] = {}
        self._writing: asyncio.Lock | None = None  # of the loop that saves
        for file in self.files:
            with file.opening():
                file.check_header()
        try:
            self._open(readonly)
        except FatalError:
            self.close()
            raise

    def _open(self, readonly: bool) -> None:
        """Give each file the rows of the other that are newer."""
        contents = []
        for file in self.files:
            with file.opening():
                if readonly:
                    file.read_snapshot()
                else:
                    file.open()
                contents.append(file.content())
        (ours, my_meta), (theirs, their_meta) = contents
        rows = self._join(ours, theirs)
        if (self.run, "") in rows:
            # The clock was set back, or a run that began in the same second has ended already.
            self.run = free_run_id(self.environment.now().wall, {one for one, _ in rows})
        self.write_number = max((row.revision for row in rows.values()), default=0)
        self.meta = {**their_meta, **my_meta}
        self.holder = json.loads(self.meta.get("holder", "{}"))
        if not readonly:
            self.holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": iso(self.environment.now().wall),
            }
            self.meta["holder"] = json.dumps(self.holder)
        for file, (mine, _) in zip(self.files, contents):
            with file.opening():
                news = {ids: row for ids, row in rows.items() if mine.get(ids) != row}
                file.write(news, self.meta)

    def _join(self, ours: Rows, theirs: Rows) -> Rows:
        """Return all rows as both files together know them."""
        joined = {**theirs, **ours}
        for ids in ours.keys() & theirs.keys():
            mine = ours[ids]
            other = theirs[ids]
            joined[ids] = row = winning_row(mine, other)
            if ids[1] and mine.revision == other.revision and mine.document != other.document:
                what = f"{row.document['primary']['email']}: {SAVEPOINT} and its copy disagree"
                log.warning("%s; '%s' is taken, and is checked", what, row.document["state"])
        return joined

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(AttributeError):  # it was never opened
                file.db.close()

    # -- writing -----------------------------------------------------------------------------------

    @property
    def failure(self) -> FatalError | None:
        """Why one of the files can't be written any more: nothing more may be requested then."""
        return next((file.failure for file in self.files if file.failure), None)

    async def save(self, pair: Pair, keep_run: bool = False) -> None:
        """Store a pair; when it returns, it is on the disk in each file that can be written.

        With `keep_run` it stays the pair of the run that ended it. Raises FatalError(3) where
        neither can be written. What is saved at the same time shares a transaction.
        """
        if not keep_run:
            pair.run = self.run
        self._pending[pair.ids] = self._row(pair)
        self._writing = self._writing or asyncio.Lock()
        async with self._writing:
            await asyncio.sleep(0)  # other tasks may save in this moment, too
            batch, self._pending = self._pending, {}
            if batch:  # otherwise a write for another pair had this one in its batch
                try:
                    await self.environment.run_in_thread(self.write, batch)
                except BaseException:
                    # None of it is written: the others have to learn so.
                    self._pending = {**batch, **self._pending}
                    raise

    def save_now(self, pairs: Iterable[Pair]) -> None:
        """Store pairs without an event loop."""
        rows = {}
        for pair in pairs:
            pair.run = self.run
            rows[pair.ids] = self._row(pair)
        self.write(rows)

    def save_run(self, record: RunRecord) -> None:
        self.write({(record.id, ""): StoredRow(0, record.id, stored_fields(record))})

    def _row(self, pair: Pair) -> StoredRow:
        pair.updated = iso(self.environment.now().wall)
        return StoredRow(0, pair.run, pair.to_json())

    def write(self, rows: Rows, **meta: str) -> None:
        """Write rows to the file, then to its copy.

        Raises FatalError(3) where neither can be written.
        """
        with self._lock:
            if rows:
                self.write_number += 1
            rows = {ids: row._replace(revision=self.write_number) for ids, row in rows.items()}
            for file in self.files:
                if file.failure:
                    continue
                try:
                    file.write(rows, meta)
                except sqlite3.Error as error:
                    words = f"the savepoint {file.path} can't be written any more ({error})"
                    file.failure = FatalError(EXIT_STOPPED, f"{words}; free the disk, run again")
                    log.warning("%s", file.failure)
            if all(file.failure for file in self.files):
                raise FatalError(EXIT_STOPPED, str(self.main.failure))

    # -- reading -----------------------------------------------------------------------------------

    def _query(self, statement: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        file = self.copy if self.main.failure else self.main
        try:
            with self._lock:
                cursor = file.db.execute(statement, values)
                found = cursor.fetchmany(1000)
            while found:
                yield from found
                with self._lock:
                    found = cursor.fetchmany(1000)
        except sqlite3.Error as error:
            words = f"the savepoint {file.path} can't be read ({error})"
            raise FatalError(EXIT_STOPPED, words) from None

    def pairs(self, *states: State, **columns: str) -> Iterator[Pair]:
        """Yield the pairs in these states (all, where none is named) that have these values in
        columns of the table, such as `run`; those that changed last come last."""
        conditions = ["1"]
        values = [state.value for state in states]
        if states:
            conditions.append(f"state IN ({', '.join('?' * len(states))})")
        for name, value in columns.items():
            conditions.append(f"{name} = ?")
            values.append(value)
        if self.organisation:
            conditions.append("organisation IN (?, '')")  # an id may name none
            values.append(self.organisation)
        query = f"SELECT run, revision, document FROM pairs WHERE {' AND '.join(conditions)}"
        for run, revision, document in self._query(f"{query} ORDER BY revision, email", *values):
            pair = Pair.from_json(json.loads(document))
            pair.run = run
            pair.revision = revision
            yield pair

    def pair(self, ids: Ids) -> Pair | None:
        """Return what is known of a pair."""
        return next(self.pairs(primary_id=ids[0], duplicate_id=ids[1]), None)

    def unfinished(self) -> list[Pair]:
        """Return the pairs that a run left between the merge request and their end."""
        return list(self.pairs(*UNFINISHED))

    def counts(self) -> dict[str, int]:
        return dict(self._query("SELECT state, count(*) FROM pairs GROUP BY state ORDER BY state"))

    def other_organisations(self) -> int:
        """Return how many pairs belong to another organisation than this run's."""
        query = "SELECT count(*) FROM pairs WHERE organisation != ?"
        return int(next(self._query(query, self.organisation))[0])

    def runs(self) -> dict[str, RunRecord]:
        """Return all runs, by their ids."""
        rows = self._query("SELECT id, document FROM runs ORDER BY id")
        return {run: read_stored(RunRecord, json.loads(document)) for run, document in rows}

    def is_held(self) -> bool:
        """Return whether a run holds the savepoint right now."""
        try:
            with contextlib.closing(self.main.connect("mode=ro")) as db:
                db.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.OperationalError as error:
            return "locked" in str(error) or "busy" in str(error)
        except sqlite3.Error:
            pass
        return False


# --------------------------------------------------------------------------------------------------
# Merge
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeOptions:
    """What the command line says of how to merge, and the token's organisation."""

    organisation: str = ""
    count_policy: str = "exact"
    merge_timeout: float = 120.0
    timelines: bool = True
    across_workspaces: bool = False
    try_unverified: bool = False
    carry_fields: bool = False
    preview: bool = False  # of an undo


class MergeGate:
    """Lets merges be requested: one at a time until one is confirmed, and DevRev takes its
    reference.

    The first merge of a run shows whether the token may, and whether this organisation answers as
    expected. Where it does not, one reference is on no contact. Some organisations carry out one
    merge at a time: from the first that shows it, merges go one at a time again. The merges of one
    primary do not wait for each other here.
    """

    def __init__(self, cancel_token: CancelToken) -> None:
        self.confirmed = False
        self.one_at_a_time = False
        self.requested_pairs = 0  # by this run, but for what an earlier one was forbidden to merge
        self._under_way: set[str] = set()  # primaries of merges that this run has requested
        self._alone = ""  # the primary whose merge all others wait for
        self._waiting: list[asyncio.Future[None]] = []
        self._cancel_token = cancel_token

    def others_under_way(self, pair: Pair) -> bool:
        return bool(self._under_way - {pair.primary.id})

    async def enter(self, pair: Pair, alone: bool = False) -> None:
        """Wait until a merge may be requested; `alone`: until no other is under way. Raises
        Cancelled."""
        primary = pair.primary.id
        while primary not in self._under_way:  # one that is requested again goes on
            if alone and not self._alone:
                self._alone = primary
            is_free = self._alone in ("", primary)
            is_serial = alone or self.one_at_a_time or not self.confirmed
            if is_free and not (is_serial and self.others_under_way(pair)):
                self._under_way.add(primary)
            else:
                future = self._cancel_token.future()
                self._waiting.append(future)
                await future

    def leave(self, pair: Pair) -> None:
        """Let others enter: the pair's merge is not under way, or not any more."""
        self._under_way.discard(pair.primary.id)
        if self._alone == pair.primary.id:
            self._alone = ""
        waiting = self._waiting
        self._waiting = []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def note_merged(self, pair: Pair) -> None:
        """Note that this run has seen the merge carried out."""
        if self.confirmed:
            self.leave(pair)

    def confirm(self, pair: Pair) -> None:
        """Let others go side by side: a merge of this run has its reference, or another contact has
        it."""
        if pair.primary.id in self._under_way:
            self.confirmed = True
            self.leave(pair)


async def check_group(
    api: DevRevAPI,
    plan: Plan,
    group: Group,
    options: MergeOptions,
    priority: int,
) -> tuple[LiveGroup, list[tuple[Pair, PairSkipped]], Timestamp]:
    """Read a group's contacts and compare them with the plan: for a run, and for the live preview.

    Return what DevRev says, the pairs that leave the group, and since when it is true. Raises
    PairError with what refuses the group.
    """
    contacts = group.contacts()
    users: dict[str, Json | None] = {}
    listed: dict[str, Json] = {}
    since: list[Timestamp] = []
    asked: set[str] = set()
    spellings = {contact.email for contact in contacts}
    while spellings - asked:
        # DevRev's filter may mind case: it is asked with the spellings of its own answers, too.
        listing = await api.contacts_by_email(spellings - asked, priority)
        since.append(listing.since)
        asked |= spellings
        listed.update(by_id(listing.items))
        for contact in contacts:
            # Lists may lag behind what this tool has done to the primary.
            is_changed = contact is group.primary and group.has_absorbed()
            if contact.id in listed and not is_changed:
                users[contact.id] = listed[contact.id]
            elif contact.id not in users:
                since.append(api.environment.now())
                users[contact.id] = await api.contact(contact.id, RequestOptions(priority))
        known = [user for user in (*listed.values(), *users.values()) if user]
        spellings.update(user["email"].strip() for user in known if email_of(user) == group.email)
    unverified = await unverified_among(api, known, spellings, priority)
    live = LiveGroup(group, users, list(listed.values()), unverified)
    live = replace(live, unheld=await unheld_references(api, live, priority))
    plan.unverified.update(live.unverified)
    return live, check_live(live, options), oldest(since)


async def unverified_among(
    api: DevRevAPI,
    users: Iterable[Json],
    emails: Collection[str],
    priority: int,
) -> set[str]:
    """Return the ids of the users that are known to be unverified.

    A contact's own answer counts; where it does not say, the list of the unverified does.
    """
    found: set[str] = set()
    unsaid: set[str] = set()
    for user in users:
        if user.get("is_verified") is False:
            found.add(user["id"])
        elif user.get("is_verified") is not True:
            unsaid.add(user["id"])
    if unsaid:
        found |= unsaid.intersection(await api.unverified_ids(emails, priority) or ())
    return found


async def unheld_references(api: DevRevAPI, live: LiveGroup, priority: int) -> set[str]:
    """Return the references that are to move and that no contact has any more: their pairs look
    half merged. It asks only where the duplicate is not what it was."""
    found: set[str] = set()
    for pair in live.group.pending():
        if not live.may_be_half_merged(pair) or not pair.new_ref:
            continue
        try:
            await api.poll_duplicate(pair.primary.id, pair.duplicate, RequestOptions(priority))
        except PairError as error:
            if error.code != "merged_into_another":
                raise
            continue
        holders = await api.holders_of(pair.new_ref, RequestOptions(priority))
        if not any(has_reference(user, pair.new_ref) for user in holders):
            found.add(pair.new_ref)
    return found


async def find_unverified(api: DevRevAPI, plan: Plan) -> None:
    """Note which contacts of a plan are known to be unverified, as far as lists tell."""
    emails: set[str] = set()
    for group in plan.groups:
        if group.pending():
            emails.update(contact.email for contact in group.contacts())
    if not emails:
        return
    with contextlib.suppress(PairError, NoUsableResponse):
        users = (await api.contacts_by_email(emails)).items
        plan.unverified |= await unverified_among(api, users, emails, PREPARE)


async def foresee_group(
    api: DevRevAPI,
    plan: Plan,
    group: Group,
    options: MergeOptions,
) -> None:
    """Raise PairError with what a run would refuse the group with now; reads only."""
    _, dropped, _ = await check_group(api, plan, group, options, PREPARE)
    if len(dropped) == len(group.pending()):
        raise dropped[0][1]
    left_out = {pair.duplicate.id for pair, _ in dropped}
    for contact in group.contacts():
        if contact.id not in left_out:
            lists = await together(*load_works(api, contact, PREPARE))
            greatest = ticket_count([work["id"] for work in listing.items] for listing in lists)
            check_count(
                group,
                contact,
                greatest,
                options,
                "DevRev",
            )


def load_works(api: DevRevAPI, contact: Contact, priority: int) -> list[Awaitable[ListResult]]:
    """Start the lists of a contact's works, by role."""
    loaders = [api.objects[role] for role in ROLES.values()]
    return [loader.load(contact.id, contact.tickets, priority) for loader in loaders]


class Preconditions:
    """What the merges of a group rest on: the live check, the backup, and the integrity check from
    the disk.

    Each part is as old as the first request that it was read with.
    """

    FRESH = 60.0  # seconds for which a live check may be relied on
    LISTED = 120.0  # seconds for which the lists in a backup may be relied on
    # Timelines that a group requests at once: with all of them queued, later groups would come
    # before its rest.
    AHEAD = 50

    def __init__(self, context: ContactMerger, group: Group) -> None:
        self.context = context
        self.group = group
        self.backup: Backup | None = None  # the last one
        self.live: dict[str, Json] = {}  # rev users by id
        self._checked: Timestamp | None = None
        self._listed: Timestamp | None = None
        # Object id -> its modified_date, and its entries.
        self._timelines: dict[str, tuple[Any, list[Json]]] = {}

    def require_fresh(self) -> None:
        """Raise PreconditionsExpired where a request must not rest on them any more."""
        if self._is_older(self._checked, self.FRESH) or self._is_older(self._listed, self.LISTED):
            raise PreconditionsExpired()

    async def ensure_fresh(self) -> None:
        """Check and back up again what is too old, or was never read. Raises PairError with the
        first problem."""
        self.context.raise_if_draining()
        if self._is_older(self._listed, self.LISTED):
            await self._check()
            if self.group.pending():
                await self._back_up()
        elif self._is_older(self._checked, self.FRESH):
            await self._check()

    def _is_older(self, since: Timestamp | None, limit: float) -> bool:
        return since is None or self.context.environment.age(since) > limit

    async def _check(self) -> None:
        """Compare the group with DevRev as it is now; a pair that is none any more leaves it."""
        priority = PREPARE if self._checked is None else MERGE
        live, dropped, self._checked = await check_group(
            self.context.api, self.context.plan, self.group, self.context.options, priority
        )
        for pair, skip in dropped:
            pair.move_to(State.SKIPPED, skip.code, str(skip))
        self.live = {identity: user for identity, user in live.users.items() if user}
        log.info("%s: the live check has passed", self.group.email)

    async def _back_up(self) -> None:
        """Read all that DevRev holds of the group, write it to the disk, and check what is
        there."""
        environment = self.context.environment
        email = self.group.email
        snapshots, since = await self._read_contacts()
        objects: dict[str, Json] = {}
        for snapshot in snapshots:
            objects.update(snapshot.objects())
        if self.context.options.timelines:
            await self._read_timelines(objects)
        timelines = {one: self._timelines[one][1] for one in objects if one in self._timelines}
        facts = {
            "email": email,
            "organisation": self.context.options.organisation,
            "timelines": self.context.options.timelines,
            "work_kinds": list(self.context.api.work_kinds),  # that DevRev lists for the token
        }
        home = BACKUPS / safe_name(email)
        folder = await environment.run_in_thread(
            write_backup,
            environment,
            home,
            facts,
            snapshots,
            timelines,
        )
        backup = await environment.run_in_thread(verify_backup, str(folder))
        self.backup = backup
        words = [f"{count} {name.replace('_', ' ')}" for name, count in backup.holdings.items()]
        log.info("%s: backed up in %s: %s", email, folder, ", ".join(words))
        for pair in self.group.pairs:
            if pair.state is State.PLANNED:
                self.note_backup(pair)
        for entry in backup.manifest["contacts"]:
            contact = Contact.from_json(entry["csv"])
            greatest = ticket_count(entry["works"].values())
            check_count(self.group, contact, greatest, self.context.options)
        log.info("%s: the integrity check of %s has passed", email, folder)
        self._listed = since

    async def _read_contacts(self) -> tuple[list[ContactSnapshot], Timestamp]:
        """Read the lists of each contact; return what they hold, and since when that is true."""
        contacts = self.group.contacts()
        api = self.context.api
        priority = PREPARE if self._listed is None else MERGE
        calls: list[Awaitable[ListResult]] = []
        for contact in contacts:
            calls += load_works(api, contact, priority)
            # Of four tickets about one has a conversation.
            calls.append(api.objects["members"].load(contact.id, contact.tickets // 4, priority))
        lists: list[ListResult] = await together(*calls)
        since = oldest(listing.since for listing in lists)
        snapshots = []
        for contact in contacts:
            roles = {role: by_id(lists.pop(0).items) for role in ROLES}
            talks = by_id(lists.pop(0).items)
            snapshots.append(ContactSnapshot(contact, self.live[contact.id], roles, talks))
        return snapshots, since

    async def _read_timelines(self, objects: Mapping[str, Json]) -> None:
        """Read the timelines that are not known yet, and those of objects that have changed; a few
        at a time."""
        known = self._timelines
        wanted = []
        for identity, obj in objects.items():
            if identity not in known or known[identity][0] != obj.get("modified_date"):
                wanted.append(identity)

        async def read(identity: str) -> None:
            try:
                entries = await self.context.api.timeline(identity)
            except (ApiError, NoUsableResponse) as error:
                raise PairError(error.code, f"{identity}: {error}") from None
            known[identity] = objects[identity].get("modified_date"), entries

        for start in range(0, len(wanted), self.AHEAD):
            self.context.raise_if_draining()
            await together(*map(read, wanted[start : start + self.AHEAD]))

    def note_backup(self, pair: Pair) -> None:
        """Note in a pair which backup its merge rests on."""
        assert self.backup
        pair.backup = str(self.backup.folder)
        pair.backed_up = self.backup.holdings
        pair.manifest_sha256 = self.backup.sha256


def oldest(moments: Iterable[Timestamp]) -> Timestamp:
    return min(moments, key=lambda moment: moment.monotonic)


def fields_to_carry(primary: Mapping[str, Any], duplicate: Mapping[str, Any]) -> Json:
    """Return what an update of the primary has to set, so that it keeps what only the duplicate
    has.

    `phone_numbers` is the whole list, because an update replaces it. A name is carried only where
    the primary has none of its own: its address or its id is no name.
    """
    found: Json = {}
    if duplicate.get("description") and not primary.get("description"):
        found["description"] = duplicate["description"]
    numbers = list(primary.get("phone_numbers") or ())
    more = [number for number in duplicate.get("phone_numbers") or () if number not in numbers]
    if more:
        found["phone_numbers"] = numbers + more
    nameless = ["", *(primary.get(one) for one in ("email", "id", "display_id", "external_ref"))]
    if duplicate.get("display_name") and (primary.get("display_name") or "") in nameless:
        found["display_name"] = duplicate["display_name"]
    return found


def lost_fields(duplicate: Mapping[str, Any], primary: Mapping[str, Any]) -> list[Json]:
    """Return `{field, value}` of what the duplicate had and the primary does not have, as far as
    answers show it."""
    kept = list(field_values(primary))
    lost = [one for one in field_values(duplicate) if one not in kept]
    return [{"field": name, "value": value} for name, value in lost]


def field_values(user: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a contact's fields one by one, with the name of each."""
    names = ("display_name", "full_name", "description", "phone_numbers", "tags", "custom_fields")
    for name in names:
        value = user.get(name)
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", one) for key, one in value.items())
        elif isinstance(value, list):
            yield from ((name, one) for one in value)
        elif value:
            yield name, value


def check_reference(pair: Pair, primary: Json | None) -> Json:
    """Return the primary as it was read.

    Raises PairError where it no longer exists, or where another user gave it a reference that is
    neither the old nor the new one.
    """
    name = pair.primary.short_id
    if primary is None or is_gone(primary):
        raise PairError("not_found", f"the primary {name} no longer exists")
    reference = live_reference(primary)
    if pair.new_ref and reference not in ("", pair.new_ref, pair.primary.external_ref.strip()):
        given = f"another user gave {name} the reference {reference or 'none'}"
        raise PairError("external_ref_changed", f"{given}; {pair.new_ref} was not set")
    return primary


class BackedUp(NamedTuple):
    """What a pair's backup says of its merge."""

    folder: str
    expected: list[Json]  # what has to belong to the primary, as `{id, role}`
    telling: list[Json]  # of these what no other contact of the backup had: it proves a merge
    duplicate: Json  # its `rev_user`
    emails: list[str]  # the address as DevRev spells it, whose filter may mind case


def read_backed_up(pair: Pair) -> BackedUp:
    """Read what a pair's backup says of its merge. Raises PairError(backup_failed)."""
    with reading_backup(pair.backup) as backup:
        expected = backup.to_transfer(pair.duplicate.id)
        shared: set[str] = set()
        for entry in backup.manifest["contacts"]:
            identity = entry["csv"]["id"]
            if identity != pair.duplicate.id:
                shared.update(item["id"] for item in backup.to_transfer(identity))
        telling = [item for item in expected if item["id"] not in shared]
        primary, duplicate = map(backup.contact, pair.ids)
        emails = sorted({str(user["email"]).strip() for user in (primary, duplicate)})
        return BackedUp(
            pair.backup,
            expected,
            telling,
            duplicate,
            emails,
        )


class TransferVerifier:
    """Tells from lists and objects whether a pair is merged, for as long as DevRev's lists may lag
    behind."""

    FIRST_LINGER = 10.0  # seconds for which the first lists wait for other groups to verify
    EXAMINED = 25  # objects that are read one by one before the time is over

    def __init__(
        self,
        context: ContactMerger,
        pair: Pair,
        priority: int,
    ) -> None:
        self.context = context
        self.api = context.api
        self.pair = pair
        self.priority = priority
        self.primary: Json = {}  # the primary's `rev_user`, as the last list of its email shows it
        self.was_edited = False  # the same list shows that somebody gave the duplicate a reference
        self._kinds: set[str] = set()  # kinds of objects that have answered for this pair
        self._backed_up: BackedUp | None = None

    @property
    def backed_up(self) -> BackedUp:
        if self._backed_up is None or self._backed_up.folder != self.pair.backup:
            self._backed_up = read_backed_up(self.pair)
        return self._backed_up

    async def wait(
        self, pause: Callable[[float], Awaitable[None]]
    ) -> tuple[list[Json], DuplicateStatus | None]:
        """Poll until all that was the duplicate's belongs to the primary, or `merge_timeout` is
        over.

        Return the objects still missing, and the duplicate's status where the list of its email
        still shows it. Objects deleted since are named in the pair and hold nothing up.
        """
        timeout = self.context.options.merge_timeout
        started = self.context.environment.now()
        expected = self.backed_up.expected
        rounds = 0
        while True:
            linger = self.FIRST_LINGER
            if rounds or self.priority == RESUME:
                linger = LINGER
            missing, listed = await together(
                self._missing(expected, self.priority, linger), self.is_listed(linger)
            )
            status = None
            if listed:
                status = await self.poll()
            rounds += 1
            waited = self.context.environment.elapsed(started)
            over = waited >= timeout
            if missing and (over or rounds == 3):
                few = missing if over else missing[: self.EXAMINED]
                left = await self._examine(few)
                found = [item for item in few if item not in left]
                expected = [item for item in expected if item not in found]
                missing = [item for item in missing if item not in found]
            if over or status is DuplicateStatus.EXISTS or not (missing or status):
                return missing, status
            await pause(min(20.0, 0.5 + waited / 2, timeout - waited))

    async def poll(self) -> DuplicateStatus:
        pair = self.pair
        options = RequestOptions(FINISH)
        return await self.api.poll_duplicate(pair.primary.id, pair.duplicate, options)

    async def objects_prove(self) -> bool | None:
        """Return whether objects show that the pair is merged, None where there is none that tells.

        All that still exist belong to the primary, and among them is one that it did not have
        before.
        """
        telling = self.backed_up.telling
        if not telling:
            return None
        first = await self.api.get_object(telling[0]["id"], RequestOptions(FINISH))
        if first is not None:
            people = user_ids(telling[0]["role"], first)
            # Another merge may have brought the primary in beside the duplicate.
            if self.pair.primary.id not in people or self.pair.duplicate.id in people:
                return False
        missing = await self._missing(self.backed_up.expected, FINISH)
        if len(missing) > self.EXAMINED or await self._examine(missing):
            return False
        if all(item["id"] in self.pair.deleted for item in telling):
            return None
        return True

    async def lists_show_merged(self) -> bool:
        """Decide by lists where polls give no usable answer, and by objects where some tell.

        The lists of the duplicate's email and of its reference no longer show it as it was.
        Where no object tells, the former does not show it with a reference that somebody gave it,
        and the latter not at all, and both are read twice: they may lag.
        """
        for pause in (0.0, min(10.0, self.context.options.merge_timeout / 4)):
            if pause:
                await self.context.cancel_token.sleep(pause)
            # A list that does not show the primary either says nothing.
            if await self.is_listed() or not self.primary:
                return False
            reference = self.pair.duplicate.external_ref
            holders = await self.api.holders_of(reference, RequestOptions(FINISH))
            if self._shows_duplicate(holders):
                return False
            proof = await self.objects_prove()
            if proof is not None:
                return proof
            if self.was_edited:
                return False
            if any(user["id"] == self.pair.duplicate.id and not is_gone(user) for user in holders):
                return False
        return not await self._missing(self.backed_up.expected, FINISH)

    async def is_merged_elsewhere(self) -> bool:
        """Return whether the primary exists, the duplicate doesn't, and objects do not show them
        merged."""
        options = RequestOptions(FINISH)
        primary = await self.api.contact(self.pair.primary.id, options)
        if primary is None or is_gone(primary):
            return False
        try:
            status = await self.poll()
        except PairError as problem:
            if problem.code != "merged_into_another":
                raise
            return True
        if status not in (DuplicateStatus.NOT_FOUND, DuplicateStatus.DELETED):
            return False
        return await self.objects_prove() is not True

    async def is_listed(self, linger: float = LINGER) -> bool:
        """Return whether the list of its email shows the duplicate as the live check saw it."""
        loads = [
            self.api.emails.load(email, 1, self.priority, linger) for email in self.backed_up.emails
        ]
        users: list[Json] = []
        for listing in await together(*loads):
            users += listing.items
        self.primary = {}
        self.was_edited = False
        for user in users:
            if user["id"] == self.pair.primary.id:
                self.primary = user
            if user["id"] == self.pair.duplicate.id:
                has_none = not live_reference(user) or contact_of(user).is_system
                self.was_edited = user.get("state") == "active" and not has_none
        return self._shows_duplicate(users)

    def _shows_duplicate(self, users: Iterable[Json]) -> bool:
        """Return whether the duplicate is among these `rev_users` as the live check saw it."""
        pair = self.pair
        for user in users:
            if user["id"] == pair.duplicate.id:
                status = duplicate_status(user, pair.primary.id, pair.duplicate)
                return status is DuplicateStatus.EXISTS
        return False

    async def _missing(
        self,
        expected: Sequence[Json],
        priority: int,
        linger: float = LINGER,
    ) -> list[Json]:
        """Return which of the expected objects the lists don't show with the primary."""
        weight = self.pair.primary.tickets + self.pair.duplicate.tickets
        roles = sorted({item["role"] for item in expected})
        loaders = [self.api.objects[role] for role in roles]
        listings = await together(
            *(loader.load(self.pair.primary.id, weight, priority, linger) for loader in loaders)
        )
        there: set[tuple[str, str]] = set()
        for role, listing in zip(roles, listings):
            for item in listing.items:
                there.add((role, item["id"]))
                self._kinds.add(kind_of(item["id"]))
        return [item for item in expected if (item["role"], item["id"]) not in there]

    async def _examine(self, items: Iterable[Json]) -> list[Json]:
        """Read objects one by one; return those that are not with the primary, and note those that
        were deleted.

        A 404 says so only where another object of its kind has answered: the token may not see the
        kind.
        """
        left: list[Json] = []
        absent: list[Json] = []
        for item in items:
            try:
                obj = await self.api.get_object(item["id"], RequestOptions(self.priority))
            except (ApiError, NoUsableResponse):
                left.append(item)
                continue
            if obj is None:
                absent.append(item)
                continue
            self._kinds.add(kind_of(item["id"]))
            if not self._is_with_primary(item, obj):
                left.append(item)
        for item in absent:
            if kind_of(item["id"]) not in self._kinds:
                left.append(item)
            elif item["id"] not in self.pair.deleted:
                self.pair.deleted = sorted([*self.pair.deleted, item["id"]])
        return left

    def _is_with_primary(self, item: Json, obj: Json) -> bool:
        return self.pair.primary.id in user_ids(item["role"], obj)


# Seconds for the first poll and the first update; each repeat has twice as long.
FIRST_DEADLINE = 5.0


class ReferenceUpdate:
    """Sets the reference of a contact, for a merge and for an undo; an update may be sent again and
    again.

    What an answer does not tell is read: a lost or refused update may have been made all the same,
    and a merge may move the reference by itself.
    """

    def __init__(
        self,
        api: DevRevAPI,
        contact: Contact,
        reference: str,
        options: Callable[[], RequestOptions],
    ) -> None:
        self.api = api
        self.contact = contact
        self.reference = reference
        self.options = options
        # Why the last update is not known to have been made: a refusal, or that it had no answer.
        self.problem: ApiError | NoUsableResponse | None = None
        self._deadlines = Backoff(FIRST_DEADLINE, api.settings.timeout)

    async def send(self) -> Json | None:
        """Update the contact once, and return it as DevRev has it then; None where it no longer
        exists.

        `{}` where neither the answer nor a read tells.
        """
        body = {"external_ref": self.reference}
        options = self.options()._replace(deadline=self._deadlines.next())
        try:
            user = await self.api.update_contact(self.contact.id, body, options)
            self.problem = None
            return user
        except (ApiError, NoUsableResponse) as error:
            self.problem = error
        try:
            return await self.read()
        except (ApiError, NoUsableResponse) as error:
            log.info("%s can't be read after its update: %s", self.contact.short_id, error)
            return {}

    async def read(self) -> Json | None:
        """Return the contact, None where it no longer exists."""
        return await self.api.contact(self.contact.id, self.options())


class UnexplainedConflict(PairError):
    """A reference is in use, and no contact outside the pair holds it: it says something of the
    organisation."""


class PairMerge:
    """One merge: request, wait, set the reference, verify. A pair that an earlier run left enters
    at its state.

    Each phase takes the pair at a recovery point and returns the next one; a wait may request the
    merge again. What keeps the pair from its end is raised as PairError and recorded as its
    outcome; what stops the run passes through.
    """

    MAX_REQUESTS = 3  # times that a run requests one merge
    MAX_REFRESHES = 12  # times that preconditions are read again before a pair is given up
    MAX_CONTRADICTIONS = 20  # times that the duplicate seems to be merged and exists after all
    SLOW = 3.0  # seconds after which no other pair waits for this one
    PROMPT = 10.0  # seconds for which nothing that finishes a merge waits for quota
    MOST_POLLS = 16  # in these seconds

    def __init__(
        self,
        context: ContactMerger,
        pair: Pair,
        run: GroupRun,
    ) -> None:
        self.context = context
        self.api = context.api
        self.timeout = context.options.merge_timeout
        self.pair = pair
        self.run = run
        self.verifier = TransferVerifier(context, pair, RESUME if run.resumed else VERIFY)
        self.update = ReferenceUpdate(
            self.api, pair.primary, str(pair.new_ref), self._request_options
        )
        self.requests_sent = 0  # in this run
        self.was_forbidden = pair.forbidden  # an earlier run's request for it was answered with 403
        # DevRev's answer to the last request, where it was a clear refusal.
        self.rejection: PairError | None = None
        self.contradictions = 0
        self._requested: Timestamp | None = None  # when the merge was, once this run waits for it
        self._made_room = False  # others had to end their merges before the last request
        self._busy_since: Timestamp | None = None  # DevRev refuses the merge for now
        self._busy_pauses = Backoff(0.5, 20.0)
        self._unusable = 0  # polls in a row without a usable answer
        self._poll_problem: PairError | None = None  # of the last poll
        self._deadlines = Backoff(FIRST_DEADLINE, self.api.settings.timeout)

    async def advance(self, until: State | None = None) -> bool:
        """Take the pair from one recovery point to the next, up to `until` or its end. Return
        whether it got there."""
        pair = self.pair
        phases = {
            State.PLANNED: self._request,
            State.REQUESTED: self._wait,
            State.ACKNOWLEDGED: self._wait,
            State.MERGED: self._set_reference,
            State.VERIFYING: self._verify,
        }
        if pair.ids in self.context.outcomes:
            return False
        try:
            while pair.state in phases and pair.state is not until:
                # Also in the time of grace after an interruption: once DevRev has merged the two,
                # the application finds no contact for the person until the reference is set.
                is_urgent = self.requests_sent or pair.state is State.MERGED
                with contextlib.ExitStack() as stack:
                    if pair.new_ref and is_urgent and pair.state is not State.VERIFYING:
                        stack.enter_context(self.context.cancel_token.shield())
                    await self._move_to(await phases[pair.state]())
        except PairError as problem:
            await self.end(problem)
            return False
        except ODD_ANSWER as error:
            await self.end(odd_answer(pair.email, error))
            return False
        finally:
            self.api.scheduler.end_merge(pair.ids)
            self.context.gate.leave(pair)
        if pair.state in TERMINAL:
            await self.end()
        elif pair.state is State.SKIPPED:
            await self.end(PairSkipped(pair.code, pair.error))
        return True

    async def _move_to(self, state: State) -> None:
        """Move the pair to its next state, durably."""
        pair = self.pair
        if state is State.SKIPPED:
            return
        if state is not State.MERGED_ELSEWHERE:  # that has its reason already
            pair.move_to(state)
        if pair.requested_at:
            pair.seconds = max(0.0, self.context.environment.now().wall - pair.requested_at)
        await self.context.savepoint.save(pair)
        if state is State.VERIFYING:
            self.context.gate.confirm(pair)
        log.info("%s: %s", pair.email, STATE_WORDS[state])

    async def end(self, problem: PairError | None = None) -> None:
        """Record that the pair has ended, or what keeps it from its end in this run.

        A failure counts among the failures in a row, unless an earlier run left the pair or failed
        at it too, or only its verification is open.
        """
        pair = self.pair
        if problem and problem.code == "not_found":
            await self._doubt_merge()
        if problem and pair.new_ref and pair.state is State.MERGED:
            pair.unset_since = pair.unset_since or self.context.savepoint.run
        was_tried = pair.ids in self.context.plan.tried
        counts = not (self.run.resumed or was_tried or pair.state is State.VERIFYING)
        await self.context.record_outcome(pair, problem, counts)

    async def _doubt_merge(self) -> None:
        """Take the pair back to its request where neither of its contacts is found, which confirms
        nothing, or where the duplicate is there after all."""
        is_merged = self.pair.state in (State.MERGED, State.VERIFYING)
        if is_merged and self.requests_sent and not self.verifier.primary:
            with contextlib.suppress(PairError):
                status = await self.verifier.poll()
                if status in (DuplicateStatus.NOT_FOUND, DuplicateStatus.EXISTS):
                    self.pair.move_to(self._unconfirmed())

    def _unconfirmed(self) -> State:
        return State.REQUESTED if self.pair.rejected else State.ACKNOWLEDGED

    def _request_options(self, priority: int = FINISH) -> RequestOptions:
        """Return how a request waits that belongs to the merge.

        The merge is sent where there is quota for the most polls lately and two requests more: the
        merge itself and the update of the reference.
        """
        if priority == FINISH and self._waited() > self.PROMPT:
            self.api.scheduler.end_merge(self.pair.ids)  # others may spend the quota meanwhile
            return RequestOptions(priority)
        recent = [polls for _, polls in self.context.recent_merges]
        polls = max(recent, default=self.MOST_POLLS)
        return RequestOptions(priority, min(self.MOST_POLLS, polls) + 2, self.pair.ids)

    def _waited(self) -> float:
        """Return the seconds since the merge was requested."""
        if self._requested is None:
            return 0.0
        return self.context.environment.elapsed(self._requested)

    async def _pause(self, seconds: float) -> None:
        """Sleep until DevRev may have got further. From now on, new work and other groups do not
        wait for this pair."""
        if seconds > 0:
            self.run.attempted.set()
            if self._waited() > self.SLOW:
                self.context.at_verification(self.run.group)
            await self.context.cancel_token.sleep(seconds)

    # -- the request -------------------------------------------------------------------------------

    async def _request(self) -> State:
        """Request the merge, resting on preconditions that are fresh at the moment when the request
        is sent.

        A pair that was requested before is polled first whatever the preconditions say: it may be
        merged by now.
        """
        pair = self.pair
        if pair.requested_at:
            wanted = self.context.plan.wanted.get(pair.ids)
            if wanted is None or wanted.new_ref != pair.new_ref:
                words = f"the merge of {into(pair)} was requested"
                words += ", and is not in this plan with the same reference"
                raise PairError("plan_changed", words)
            pair.primary = wanted.primary
            pair.duplicate = wanted.duplicate
            self.run.forget_preconditions()
        async with self.run.lock:  # the pairs of a group rest on the same preconditions
            try:
                refreshes = 0
                while refreshes < self.MAX_REFRESHES:
                    pair.is_requested_again = bool(pair.requested_at)
                    if await self._prepare():
                        return State.MERGED
                    if pair.state is State.SKIPPED:
                        return State.SKIPPED
                    try:
                        state = await self._send()
                    except PreconditionsExpired:
                        log.info("%s: the check or the backup is too old by now", pair.email)
                        refreshes += 1
                        continue
                    if state:
                        return state
            finally:
                pair.is_requested_again = False
        words = "checks and backups become too old before the merge can be requested"
        raise PairError("stale", f"{words}; the quota is too small")

    async def _prepare(self) -> bool:
        """Make the preconditions fresh; return whether an earlier request was carried out."""
        pair = self.pair
        # Its units would keep others waiting while the preconditions are read.
        self.api.scheduler.end_merge(pair.ids)
        problem: PairError | None = None
        try:
            await self.run.preconditions.ensure_fresh()
        except PairError as error:
            problem = error
        if pair.requested_at:
            status = await self.verifier.poll()
            if await self._shows_merged(status):
                self.context.gate.note_merged(pair)
                return True
            if status is DuplicateStatus.CHANGED and not problem:
                # The lists of the check lag behind what the poll has seen.
                words = f"{pair.duplicate.short_id} is no longer as the check has seen it"
                problem = PairError("not_active", words)
        if problem and pair.state is not State.SKIPPED:
            raise problem
        return False

    async def _shows_merged(self, status: DuplicateStatus) -> bool:
        """Return whether the pair is merged, by a poll and, where the duplicate is not as it was,
        by objects."""
        if status is not DuplicateStatus.CHANGED:
            return status.is_gone
        proving = self.api.scheduler.proving  # objects may spend the units that the merge holds
        proving.add(self.pair.ids)
        try:
            return await self.verifier.objects_prove() is True
        except (ApiError, NoUsableResponse):
            return False
        finally:
            proving.discard(self.pair.ids)

    async def _send(self) -> State | None:
        """Send the merge request. Return None where it has to be sent again, because DevRev was
        busy.

        Raises PreconditionsExpired where it was not sent.
        """
        pair = self.pair
        gate = self.context.gate
        is_first = not pair.first_requested_at
        state = State.ACKNOWLEDGED
        refusal: ApiError | None = None
        await gate.enter(pair)
        others = gate.others_under_way(pair)
        try:
            options = self._request_options(MERGE)._replace(before=self._save_intent)
            await self.api.merge(*pair.ids, options)
        except ApiError as error:
            refusal = error
            state = State.REQUESTED
        except NoUsableResponse as error:
            log.info("%s: the answer to the merge request was lost (%s)", pair.email, error)
            state = State.REQUESTED
        # The request was sent; the wait for its merge starts now.
        pair.move_to(State.REQUESTED)
        self._requested = self.context.environment.now()
        if not self.was_forbidden and not self.requests_sent:
            gate.requested_pairs += 1
        self.requests_sent += 1
        if refusal is None:
            if self._made_room and state is State.ACKNOWLEDGED and not gate.one_at_a_time:
                gate.one_at_a_time = True
                log.warning("DevRev merges one pair at a time, so this run goes on in that way")
            return state
        pair.rejected = True
        pair.forbidden = pair.forbidden or refusal.status == 403
        await self.context.savepoint.save(pair)
        others = others or gate.others_under_way(pair)
        if refusal.status not in (403, 404) and await self._make_room(refusal, others):
            return None
        return await self._rejected(refusal, is_first)

    async def _save_intent(self) -> None:
        """Save that the merge is requested, at the last moment before the request is sent.

        Raises PreconditionsExpired or Cancelled where it must not be sent; then the savepoint says
        that it was not.
        """
        context = self.context
        pair = self.pair
        preconditions = self.run.preconditions
        self.rejection = None
        pair.begin_request(context.environment.now().wall)
        try:
            preconditions.require_fresh()  # another pair of the group may have them read again
            preconditions.note_backup(pair)
            if context.options.carry_fields:
                duplicate = preconditions.live[pair.duplicate.id]
                pair.fields_to_carry = fields_to_carry({}, duplicate)
                pair.carries_last = True
            await context.savepoint.save(pair)
            # The disk may be slow, and the run may have been stopped meanwhile.
            preconditions.require_fresh()
            context.raise_if_draining()
        except (PreconditionsExpired, Cancelled):
            pair.withdraw_request()
            await context.savepoint.save(pair)
            raise
        log.info("%s: requesting the merge of %s", pair.email, into(pair))

    async def _make_room(self, refusal: ApiError, others: bool) -> bool:
        """Wait until DevRev may be ready for the merge, and return whether it is to be requested
        again.

        It may be busy with others, and then says so in many ways; alone it says so in one.
        """
        environment = self.context.environment
        if not others:
            self._busy_since = self._busy_since or environment.now()
            is_over = environment.elapsed(self._busy_since) >= self.timeout
            if is_over or refusal.status not in (409, 423, 425):
                return False
            await self._pause(self._busy_pauses.next())
        log.info("%s: DevRev may be busy (%s); requesting it again", self.pair.email, refusal)
        self._made_room = others
        self.api.scheduler.end_merge(self.pair.ids)  # others would wait for the units it holds
        self.context.gate.leave(self.pair)
        await self.context.gate.enter(self.pair, alone=True)
        return True

    async def _rejected(self, error: ApiError, is_first: bool) -> State:
        """Decide after a refusal; DevRev may carry the merge out all the same."""
        pair = self.pair
        if error.missing and is_first and await self.verifier.is_merged_elsewhere():
            words = f"another user merged or deleted {pair.duplicate.short_id}"
            words += " before the merge was requested"
            if pair.new_ref:
                words += f"; its reference {pair.new_ref} was not moved"
            pair.move_to(State.MERGED_ELSEWHERE, "merged_elsewhere", words)
            return State.MERGED_ELSEWHERE
        code = "forbidden" if error.status == 403 else "merge_refused"
        self.rejection = PairError(code, str(error))
        # The first pair of a run shows whether the token may merge at all.
        is_first_pair = self.context.gate.requested_pairs == 1 and not self.was_forbidden
        if error.status == 403 and is_first_pair:
            await self._stop_unless_merged(error)
        return State.REQUESTED

    async def _stop_unless_merged(self, error: ApiError) -> None:
        """Raise PermissionDenied, unless polls show that a merge which was forbidden is carried out
        all the same."""
        pauses = Backoff(0.2, 1.0)
        code = EXIT_USAGE
        while self._waited() < self.SLOW:
            await self._pause(pauses.next())
            try:
                if await self._shows_merged(await self.verifier.poll()):
                    return
                code = EXIT_USAGE
            except (ApiError, NoUsableResponse):
                code = EXIT_STOPPED  # something may have changed
        raise PermissionDenied(code, f"the token may not merge contacts: {error}")

    # -- the wait ----------------------------------------------------------------------------------

    async def _wait(self) -> State:
        """Poll until the duplicate no longer exists, or until the merge has to be requested
        again."""
        pair = self.pair
        recent = self.context.recent_merges
        if self._requested is None:  # an earlier run requested it: it is polled at once
            now = self.context.environment.now()
            before = max(0.0, now.wall - pair.requested_at)
            self._requested = now._replace(monotonic=now.monotonic - before)
        else:
            usual = max((seconds for seconds, _ in recent), default=0.25)
            await self._pause(min(usual, 0.75) - self._waited())
        # A request whose answer was lost may never have arrived.
        longest = self.timeout if self._is_answered() else min(10.0, self.timeout / 4)
        self._unusable = 0
        self._deadlines = Backoff(FIRST_DEADLINE, self.api.settings.timeout)
        polls = 0
        while True:
            asked = self._waited()
            polls += 1
            status = await self._poll()
            if status is DuplicateStatus.CHANGED:
                polls += 4  # an object and three lists tell
            if status and await self._shows_merged(status):
                if self.requests_sent:  # the next merge is polled a little sooner
                    recent.append((0.95 * asked, polls))
                break
            waited = self._waited()
            # Where the wait is over, for a pair of an earlier run at once, there is no third poll.
            lists_decide = self._unusable >= 3 or (self._unusable > 0 and waited >= longest)
            if status is DuplicateStatus.CHANGED and pair.state is State.ACKNOWLEDGED:
                lists_decide = not self.verifier.backed_up.telling
            if lists_decide:
                self.api.scheduler.end_merge(pair.ids)  # lists would wait for the units it holds
                if await self.verifier.lists_show_merged():
                    break
            if self.rejection:
                raise self.rejection
            if waited >= longest:
                self._require_another_request(waited)
                return await self._request()
            pause = min(0.1 + 0.5 * waited, 0.75) if waited < 10 else min(10.0, 0.1 * waited)
            await self._pause(min(pause, longest - waited))
        self.context.gate.note_merged(pair)
        return State.MERGED

    async def _poll(self) -> DuplicateStatus | None:
        """Poll the duplicate once. Return None where the answer does not tell; `_poll_problem` says
        why."""
        self._poll_problem = None
        options = self._request_options()._replace(deadline=self._deadlines.next())
        try:
            status = await self.api.poll_duplicate(
                self.pair.primary.id, self.pair.duplicate, options
            )
        except (ApiError, NoUsableResponse) as error:
            self._poll_problem = PairError(error.code, f"the merge can't be confirmed: {error}")
            # The 404 of a route has no type, and says nothing.
            if not isinstance(error, ApiError) or error.status != 404 or error.data.get("type"):
                self._unusable += 1
            return None
        self._unusable = 0
        self._deadlines = Backoff(FIRST_DEADLINE, self.api.settings.timeout)
        return status

    def _is_answered(self) -> bool:
        """Whether DevRev knows of the request: it has accepted or refused it."""
        return self.pair.state is State.ACKNOWLEDGED or self.pair.rejected

    def _require_another_request(self, waited: float) -> None:
        """Raise PairError where a wait that is over must not be followed by another request."""
        if self._poll_problem:
            raise self._poll_problem
        if self.requests_sent >= self.MAX_REQUESTS or (self.requests_sent and self._is_answered()):
            words = f"{self.pair.duplicate.short_id} still exists {duration(waited)} after"
            raise PairError("merge_not_confirmed", f"{words} its merge was requested")

    def _still_exists(self) -> State:
        """Return to polling: the duplicate seemed to be merged until something contradicted it."""
        pair = self.pair
        self.contradictions += 1
        log.info("%s: %s still exists after all", pair.email, pair.duplicate.short_id)
        if self.contradictions > self.MAX_CONTRADICTIONS:
            pair.move_to(State.REQUESTED)
            words = f"{pair.duplicate.short_id} seemed to be merged again and again"
            raise PairError("merge_not_confirmed", words)
        return self._unconfirmed()

    # -- the reference -----------------------------------------------------------------------------

    async def _set_reference(self) -> State:
        """Give the primary the duplicate's reference. Until then it is on no contact, so nothing
        else is waited for."""
        pair = self.pair
        pair.carries_last = True
        pair.reference_not_set = ""  # it was noted while the merge was cancelled
        if pair.new_ref:
            with contextlib.suppress(PairError):  # it is written as DevRev spells it
                own = str(self.verifier.backed_up.duplicate.get("external_ref"))
                if own.strip() == pair.new_ref:
                    self.update.reference = own
            # Where another run requested the merge, others may have set a reference by hand.
            is_new = self.requests_sent > 0 or not self.run.resumed
            is_set = not is_new and self._has_it(check_reference(pair, await self.update.read()))
            if not is_set and not await self._update_reference():
                return self._still_exists()
        return State.VERIFYING

    async def _update_reference(self) -> bool:
        """Update the primary until it has the reference. Return False where the duplicate still
        exists.

        Raises PairError.
        """
        pair = self.pair
        pauses = Backoff(0.2, 10.0, 1.6)
        started = self.context.environment.now()
        while True:
            user = await self.update.send()
            if self._has_it(user):
                return True
            problem = self.update.problem
            is_over = self.context.environment.elapsed(started) > self.timeout
            is_conflict = isinstance(problem, ApiError) and problem.status == 409
            if user != {} and problem:
                check_reference(pair, user)
            if not is_conflict and (is_over or not isinstance(problem, NoUsableResponse)):
                raise self._not_set(user)
            await self._pause(pauses.next())
            if is_conflict:
                with contextlib.suppress(ApiError, NoUsableResponse):  # else lists have decided
                    if await self.verifier.poll() is DuplicateStatus.EXISTS:
                        return False
                if await self._holds_reference():
                    return True
                if is_over:
                    words = f"the reference {pair.new_ref} is in use by no contact that can be seen"
                    raise UnexplainedConflict("external_ref_conflict", words)

    def _not_set(self, user: Json | None) -> PairError:
        """Return why the last update has not given the primary its reference."""
        problem = self.update.problem
        code = "external_ref_not_set"
        if isinstance(problem, ApiError) and problem.missing:
            code = "not_found"
        elif isinstance(problem, NoUsableResponse) or (problem and problem.code == "forbidden"):
            code = problem.code
        why = problem or f"DevRev answered with the reference {live_reference(user or {})}"
        return PairError(code, f"the reference {self.pair.new_ref} could not be set: {why}")

    def _has_it(self, user: Json | None) -> bool:
        """Return whether the primary exists with its new reference, if it gets one, and keep what
        shows it."""
        if is_gone(user) or self.pair.new_ref not in (None, live_reference(user or {})):
            return False
        self.verifier.primary = user or {}
        return True

    async def _holds_reference(self) -> bool:
        """Return whether the primary itself is listed for the reference; False: the duplicate still
        is, or nobody.

        Raises PairError where another contact is.
        """
        pair = self.pair
        holders: list[str] = []
        with contextlib.suppress(ApiError, NoUsableResponse):
            for user in await self.api.holders_of(str(pair.new_ref), self._request_options()):
                if user["id"] == pair.primary.id and self._has_it(user):
                    return True
                if user["id"] not in pair.ids:
                    holders.append(str(user.get("display_id") or user["id"]))
        if holders:
            self.context.gate.confirm(pair)  # this conflict is the pair's alone
            words = f"the reference {pair.new_ref} is held by {', '.join(holders)}"
            raise PairError("external_ref_conflict", words)
        return False

    # -- the verification --------------------------------------------------------------------------

    async def _verify(self) -> State:
        """Check that everything the duplicate had belongs to the primary, and that it is listed no
        more."""
        pair = self.pair
        self.context.at_verification(self.run.group)
        missing, status = await self.verifier.wait(self._pause)
        if status is DuplicateStatus.EXISTS:
            return self._still_exists()
        primary = await self._last_read()
        if missing:
            pair.left_behind = describe(pair.backup, missing)
            names = ", ".join(dict.fromkeys(item["display_id"] for item in pair.left_behind))
            words = f"merged, but these do not belong to the primary: {names}"
            raise PairError("left_behind", words)
        if status:
            words = f"merged, but DevRev still lists {pair.duplicate.short_id} for its email"
            raise PairError("still_listed", words)
        if pair.fields_to_carry and pair.carries_last:
            async with self.run.lock:
                self.verifier.primary = await self._carry_fields(primary)
            primary = await self._last_read()  # its reference may have been put back meanwhile
        pair.fields_lost = lost_fields(self.verifier.backed_up.duplicate, primary)
        pair.left_behind = []
        expected = {item["id"] for item in self.verifier.backed_up.expected}
        pair.proved = len(expected.difference(pair.deleted))
        return State.DONE

    async def _last_read(self) -> Json:
        """Return the primary as it was read last, which decides; where it lost its reference again,
        it gets it once more.

        Raises PairError: not_found, external_ref_changed, reference_reverted.
        """
        pair = self.pair
        primary: Json | None = self.verifier.primary or None
        pauses = Backoff(0.5, 10.0)
        started = self.context.environment.now()
        while not self._has_it(primary):
            primary = check_reference(pair, await self.update.read())  # lists lag
            if self._has_it(primary):
                break
            if pair.state is State.VERIFYING:
                log.warning("%s: %s has its old reference again", pair.email, pair.primary.short_id)
                pair.move_to(State.MERGED)
                await self._update_reference()
            elif self.context.environment.elapsed(started) > self.timeout / 4:
                words = f"{pair.primary.short_id} had the reference {pair.new_ref}, and has"
                now = live_reference(primary) or "none"
                raise PairError("reference_reverted", f"{words} {now} again")
            await self._pause(pauses.next())
        return self.verifier.primary

    async def _carry_fields(self, primary: Json) -> Json:
        """Give the primary what only the duplicate had (--carry-fields), and return the primary as
        it is then.

        The old values are durable first. The write rests on a read that nothing has waited behind.
        What DevRev refuses stands in `fields_lost`.
        """
        pair = self.pair
        for _ in range(FreshRead.MOST):
            body = fields_to_carry(primary, pair.fields_to_carry)
            pair.fields_before.update({name: primary.get(name) for name in body})
            written = {**pair.fields_to_carry, **body}
            pair.fields_to_carry = {name: written[name] for name in pair.fields_before}
            if not body:
                return primary
            await self.context.savepoint.save(pair)
            sent = self.context.environment.now()
            options = RequestOptions(VERIFY, units=2)  # for the write, too
            primary = check_reference(pair, await self.api.contact(pair.primary.id, options))
            options = RequestOptions(FINISH, rests_on=FreshRead(self.context.environment, sent))
            if fields_to_carry(primary, pair.fields_to_carry) == body:
                try:
                    return await self.api.update_contact(pair.primary.id, body, options)
                except PreconditionsExpired:
                    log.info("%s: the primary was read too long ago", pair.email)
                except ApiError as error:
                    log.info("%s: %s can't be carried: %s", pair.email, ", ".join(body), error)
                    return primary
        raise PairError("stale", "the primary can't be updated right after it was read")


class GroupRun:
    """Merges the pairs of one group one after the other, then verifies them together.

    `pairs` are those of the group to be merged now. `resumed`: an earlier run left them.
    """

    def __init__(
        self,
        context: ContactMerger,
        group: Group,
        pairs: Sequence[Pair],
        resumed: bool,
    ) -> None:
        self.context = context
        self.group = group
        self.pairs = pairs
        self.resumed = resumed
        self.forget_preconditions()
        self.lock = asyncio.Lock()
        self.attempted = asyncio.Event()  # each pair was tried, or has to wait

    def forget_preconditions(self) -> None:
        """Have them read again before the next request, and free their memory until then."""
        self.preconditions = Preconditions(self.context, self.group)

    async def run(self) -> None:
        merges = [PairMerge(self.context, pair, self) for pair in self.pairs]
        try:
            for merge in merges:
                if not await merge.advance(until=State.VERIFYING):
                    await self._refuse_planned(merges, merge.pair)
                    break
            self.forget_preconditions()
            await together(*(merge.advance() for merge in merges))
        finally:
            self.attempted.set()

    async def _refuse_planned(self, merges: Sequence[PairMerge], failed: Pair) -> None:
        """Refuse what is still planned: what refuses one pair refuses the group, and what was
        requested has to be finished before the next request."""
        words = "another merge into the same contact has to be finished first"
        problem = PairError("group_incomplete", words)
        if failed.state is State.FAILED:
            problem = PairError(failed.code, failed.error)
        for merge in merges:
            if merge.pair.state is State.PLANNED:
                await merge.end(problem)

    def contact_ids(self) -> set[str]:
        return {contact.id for contact in self.group.all_contacts()}


class TaskRunner:
    """Starts tasks, waits for them, and ends them in good order: what a merge run and an undo
    share, and what their tasks need of the run."""

    MAX_FAILURES_IN_A_ROW = 5
    GRACE = 10.0  # seconds to wait for requests in progress when the run is interrupted

    def __init__(
        self,
        api: DevRevAPI,
        savepoint: SavePoint,
        options: MergeOptions,
        on_outcome: Callable[[Pair], None],
    ) -> None:
        self.api = api
        self.environment = api.environment
        self.cancel_token = api.cancel_token
        self.savepoint = savepoint
        self.options = options
        self.on_outcome = on_outcome
        self.outcomes: dict[Ids, Pair] = {}  # ended, refused, or given up for this run
        self.draining: FatalError | None = None  # finish what is in progress, start nothing
        self.total = 0
        self.tasks: dict[asyncio.Future[None], Sequence[Pair]] = {}
        self._failures_in_a_row = 0

    def is_success(self, pair: Pair) -> bool:
        """Whether a pair with an outcome is one that the user wanted."""
        raise NotImplementedError

    @property
    def stop(self) -> FatalError | None:
        return self.cancel_token.stop or self.draining or self.savepoint.failure

    def raise_if_draining(self) -> None:
        """Raise Cancelled where nothing more may be started."""
        if self.stop:
            raise Cancelled()

    async def run(self, work: Awaitable[None]) -> int:
        """Do the work as far as it goes, and return the exit code. Raises nothing: `stop` says what
        ended it."""
        await self._guard(work, ())
        # Where nothing more is started, what is in progress is finished.
        await self._guard(self.wait_all(), ())
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=self.GRACE)
        for pairs in list(self.tasks.values()):
            await self._record_interrupted(pairs)
        stop = self.stop
        is_complete = len(self.outcomes) >= self.total
        if stop and not (is_complete and stop is self.draining):
            # Exit 2 promises that nothing was changed.
            if stop.exit_code == EXIT_USAGE and self.api.writes:
                return EXIT_STOPPED
            return stop.exit_code
        if not is_complete:
            self.draining = FatalError(EXIT_STOPPED, "pairs have no outcome (a bug; run again)")
            return EXIT_STOPPED
        return EXIT_OK if all(map(self.is_success, self.outcomes.values())) else EXIT_FAILED

    def start(self, work: Awaitable[None], pairs: Sequence[Pair]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(self._guard(work, pairs))
        self.tasks[task] = pairs
        task.add_done_callback(self.tasks.pop)
        return task

    async def wait_any(self) -> None:
        """Wait until one task has ended. Raises Cancelled."""
        await self.cancel_token.wait(
            asyncio.wait(set(self.tasks), return_when=asyncio.FIRST_COMPLETED)
        )

    async def wait_all(self) -> None:
        while self.tasks:
            await self.wait_any()

    async def _guard(self, work: Awaitable[Any], pairs: Sequence[Pair]) -> None:
        """Do the work; whatever it raises ends the run in good order."""
        try:
            await work
        except Cancelled:
            pass
        except FatalError as stop:
            self.cancel_token.cancel(stop)
        except OSError as error:
            self.cancel_token.cancel(FatalError(EXIT_STOPPED, f"disk error: {error}"))
        except Exception as error:
            log.exception("unexpected")
            words = f"unexpected {type(error).__name__}: {error} (a bug; the log has the details)"
            self.cancel_token.cancel(FatalError(EXIT_STOPPED, words))
        await self._record_interrupted(pairs)

    async def _record_interrupted(self, pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            if pair.state in (*UNFINISHED, State.UNDOING) and pair.ids not in self.outcomes:
                words = stranded(pair) or "run again"
                problem = PairError("interrupted", f"stopped before it was finished; {words}")
                with contextlib.suppress(FatalError, OSError):
                    await self.record_outcome(pair, problem, False)

    async def record_outcome(
        self,
        pair: Pair,
        problem: PairError | None = None,
        counts: bool = True,
    ) -> None:
        """Take note that a pair has ended (it is saved by then), or of what keeps it from its end.

        `counts`: whether the problem counts among the failures in a row that stop a run, if its
        code is systemic.
        """
        if problem:
            is_skipped = isinstance(problem, PairSkipped)
            state = pair.state
            if state in (State.PLANNED, State.SKIPPED):
                state = State.SKIPPED if is_skipped else State.FAILED
            pair.move_to(state, problem.code, str(problem))
            if not is_skipped:
                await self.savepoint.save(pair)
        self.outcomes[pair.ids] = pair
        self.on_outcome(pair)
        if not problem:
            self._failures_in_a_row = 0
        elif counts and (problem.code in SYSTEMIC or isinstance(problem, UnexplainedConflict)):
            self._count_failure(problem)

    def _count_failure(self, problem: PairError) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.MAX_FAILURES_IN_A_ROW and not self.draining:
            words = f"{self._failures_in_a_row} failures in a row, the last: {problem}"
            if problem.code == "merge_not_confirmed":
                words += " (--merge-timeout sets how long a merge may take)"
            self.draining = FatalError(EXIT_STOPPED, words)
            self.api.scheduler.cancel_preparations()

    def pairs(self) -> Iterator[Pair]:
        """Yield the pairs that have an outcome or are in progress."""
        yield from self.outcomes.values()
        for pairs in self.tasks.values():
            for pair in pairs:
                if pair.ids not in self.outcomes:
                    yield pair


class ContactMerger(TaskRunner):
    """Carries out a plan: finishes what earlier runs left, then merges group after group."""

    BATCH = 25  # pairs that start together, so that one list call serves them all
    IN_PROGRESS = 100  # pairs

    def __init__(
        self,
        api: DevRevAPI,
        savepoint: SavePoint,
        options: MergeOptions,
        on_outcome: Callable[[Pair], None],
        plan: Plan,
    ) -> None:
        super().__init__(
            api,
            savepoint,
            options,
            on_outcome,
        )
        self.plan = plan
        self.gate = MergeGate(api.cancel_token)
        # How long the last merges took: seconds, and polls.
        self.recent_merges: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        # Groups that will verify soon: lists wait for them (LINGER), so that one call serves many.
        self.before_verification: set[Group] = set()
        self._resumed: dict[asyncio.Future[None], GroupRun] = {}

    def is_success(self, pair: Pair) -> bool:
        if pair.state is State.SKIPPED:
            return pair.code in SKIP_REASONS
        return pair.state in (State.DONE, State.SETTLED) and not pair.after_cancel

    def at_verification(self, group: Group) -> None:
        """Note that a group verifies, or won't soon. After the last one, send the list calls that
        wait."""
        self.before_verification.discard(group)
        if not self.before_verification and not self.cancel_token.stop:
            asyncio.get_event_loop().call_later(LINGER, self.api.dispatch)

    async def work(self, unfinished: list[Pair]) -> None:
        """Finish what earlier runs left unfinished, and carry out the plan."""
        self.savepoint.save_now(self.plan.revived)
        unfinished += await self._poll_cancelled()
        self.total = len({pair.ids for pair in chain(self.plan.pairs(), unfinished)})
        self._resume(unfinished)
        for run in list(self._resumed.values()):
            await self.cancel_token.wait(run.attempted.wait())
        await self._start_new(unfinished)
        await self.wait_all()

    # -- what earlier runs left --------------------------------------------------------------------

    async def _poll_cancelled(self) -> list[Pair]:
        """Poll each cancelled pair once: return those that DevRev has carried out after all, as
        unfinished pairs."""
        found = []
        for pair in list(self.savepoint.pairs(State.CANCELLED)):
            try:
                is_merged = await self._is_merged_after_all(pair)
            except (PairError, *ODD_ANSWER) as error:
                words = f"{pair.email}: the cancelled merge of {into(pair)} can't be polled"
                log.info("%s: %s", words, error)
                continue
            if is_merged:
                pair.after_cancel = True
                pair.move_to(State.MERGED)
                await self.savepoint.save(pair)
                words = f"{pair.email}: DevRev has carried out the cancelled merge of {into(pair)}"
                log.warning("%s", words)
                found.append(pair)
            elif pair.reference_not_set:
                warning = {"email": pair.email, "code": pair.code, "warning": pair.error}
                self.plan.warnings.append(warning)
        return found

    async def _is_merged_after_all(self, pair: Pair) -> bool:
        """Return whether DevRev shows that a cancelled pair was merged into its primary; note a
        reference that nobody has.

        Raises PairError, and what an odd answer raises.
        """
        verifier = TransferVerifier(self, pair, RESUME)
        elsewhere = any(self.savepoint.pairs(State.DONE, duplicate_id=pair.duplicate.id))
        try:
            status = await verifier.poll()
            if status in (DuplicateStatus.EXISTS, DuplicateStatus.IN_PRIMARY):
                return status is DuplicateStatus.IN_PRIMARY
        except (ApiError, NoUsableResponse) as error:
            log.info("%s can't be polled: %s", pair.duplicate.short_id, error)
        except PairError as problem:
            if problem.code != "merged_into_another":
                raise
            elsewhere = True
        if not elsewhere and Path(pair.backup).exists() and await verifier.objects_prove():
            return True
        await self._note_reference(pair)
        return False

    async def _note_reference(self, pair: Pair) -> None:
        """Note whether no contact that still exists has the reference of a cancelled pair."""
        if not pair.new_ref:
            return
        holders = await self.api.holders_of(pair.new_ref, RequestOptions(RESUME))
        is_held = any(not is_gone(user) for user in holders)
        noted = "" if is_held else pair.new_ref
        if noted != pair.reference_not_set:
            pair.reference_not_set = noted
            code = "reference_unheld" if noted else "cancelled"
            pair.move_to(pair.state, code, where_to_set(pair) if noted else pair.accepted)
            await self.savepoint.save(pair, keep_run=True)

    def _resume(self, unfinished: Sequence[Pair]) -> None:
        """Start a group for each primary of unfinished pairs, with what else is known of that
        primary."""
        by_primary: dict[str, list[Pair]] = collections.defaultdict(list)
        for pair in unfinished:
            pair.move_to(pair.state)
            by_primary[pair.primary.id].append(pair)
        planned = {group.primary.id: group for group in self.plan.groups}
        for primary, pairs in by_primary.items():
            group = Group(pairs[0].email, list(pairs))
            siblings = []
            for pair in self.savepoint.pairs(primary_id=primary):
                if pair.state is not State.PLANNED:  # else it is the plan's, if it still is in it
                    siblings.append(pair)
            if primary in planned:
                group.chosen = planned[primary].chosen
                siblings += planned[primary].pairs
            for pair in siblings:
                if pair.ids not in {one.ids for one in group.pairs}:
                    group.pairs.append(pair)
            run = GroupRun(self, group, pairs, resumed=True)
            self._resumed[self._start(run)] = run

    # -- new merges --------------------------------------------------------------------------------

    async def _start_new(self, unfinished: Sequence[Pair]) -> None:
        """Start the groups of the plan, a batch at a time while there is room.

        What no run has tried yet comes first, so that a contact which always fails keeps no other
        waiting; groups with a contact of an unfinished pair come last.
        """
        known = {pair.ids: pair for pair in unfinished}
        undoing: dict[str, str] = {}  # contact -> what finishes its undo
        for pair in self.savepoint.pairs(State.UNDOING):
            path = pair.undo.path if pair.undo else ""
            undoing.update(dict.fromkeys(pair.ids, f"merge_contacts.py --undo {path}"))
        groups = self.plan.groups
        self.plan.groups = []
        groups.sort(key=lambda group: any(pair.ids in self.plan.tried for pair in group.pairs))
        deferred: list[GroupRun] = []
        batch: list[GroupRun] = []
        for group in groups:
            group.pairs = [known.get(pair.ids, pair) for pair in group.pairs]
            for pair in group.pairs:
                if pair.state is State.SKIPPED:  # by the live check of an unfinished pair
                    await self.record_outcome(pair, PairSkipped(pair.code, pair.error))
            planned = [pair for pair in group.pairs if pair.state is State.PLANNED]
            run = GroupRun(self, group, planned, resumed=False)
            ids = run.contact_ids()
            undo = next((undoing[one] for one in sorted(ids) if one in undoing), "")
            if undo:
                words = f"its undo is not finished; finish it first: {undo}"
                await self._refuse(run, PairSkipped("undo_unfinished", words))
            elif not ids.isdisjoint(chain.from_iterable(known)):
                deferred.append(run)
            elif run.pairs:
                batch.append(run)
            size = sum(len(one.pairs) for one in batch)
            if size >= min(self.BATCH, max(1, self._room() // 2)):
                await self._start_batch(batch)
        await self._start_batch(batch)
        await together(*(self._start_deferred(run, unfinished) for run in deferred))

    async def _refuse(self, run: GroupRun, problem: PairError) -> None:
        for pair in run.pairs:
            await self.record_outcome(pair, problem, False)

    def _room(self) -> int:
        """Return how many pairs may be in progress: under a small quota few, because checks and
        backups that wait for the next window would have to be read again then."""
        return int(max(2, min(self.IN_PROGRESS, requests_per_minute(self.api.scheduler) // 4)))

    def _start(self, run: GroupRun) -> asyncio.Future[None]:
        task = self.start(run.run(), run.pairs)
        task.add_done_callback(lambda _: self.at_verification(run.group))
        return task

    async def _start_batch(self, batch: list[GroupRun]) -> None:
        while batch:
            in_progress = sum(map(len, self.tasks.values()))
            if in_progress and in_progress + sum(len(run.pairs) for run in batch) > self._room():
                await self.wait_any()
                continue
            self.raise_if_draining()
            for run in batch:
                self.before_verification.add(run.group)
                self._start(run)
            batch.clear()

    async def _start_deferred(self, run: GroupRun, unfinished: Sequence[Pair]) -> None:
        """Start a group that shares a contact with an unfinished pair, once that pair is past its
        request.

        A group with the contact that holds that pair's reference goes first: the reference follows
        it.
        """
        ids = run.contact_ids()
        refs = {pair.new_ref for pair in run.pairs if pair.new_ref}
        for task, resumed in list(self._resumed.items()):
            if not task.done() and any(ids & set(pair.ids) for pair in resumed.pairs):
                await self.cancel_token.wait(asyncio.wait({task}))
        for other in unfinished:
            frees = other.state is State.MERGED and other.new_ref in refs
            is_open = other.state in (*REQUESTED_STATES, State.MERGED)
            if is_open and not frees and not ids.isdisjoint(other.ids):
                words = "another merge of one of its contacts has to be finished first"
                await self._refuse(run, PairError("group_incomplete", words))
                return
        await self._start_batch([run])


def check_organisation(organisation: str, origin: str, contacts: Iterable[Contact]) -> None:
    """Refuse contacts of another organisation than the token's. Raises FatalError(2)."""
    for contact in contacts:
        if contact.organisation and contact.organisation != organisation:
            owner = organisation or "an unknown one"
            raise FatalError(
                EXIT_USAGE,
                f"the {origin} is of another organisation than the token: "
                f"{contact.short_id} belongs to {contact.organisation}, "
                f"the token to {owner}; use a token of {contact.organisation}",
            )


# --------------------------------------------------------------------------------------------------
# Export: the CSV from DevRev itself
# --------------------------------------------------------------------------------------------------


class ContactExporter:
    """Reads from DevRev what the CSV holds: all contacts, and works of those whose email recurs.

    An email recurs under the looser comparison, so that look-alikes are in the export. Deleted and
    merged contacts are left out. `endings` are those of the wanted emails, such as `@example.com`.
    Contacts wait in `spool`, a file, until all are read and it is known which emails recur: only
    these are ever held in memory.
    """

    WAVE = 4 * PAGE  # contacts whose works are counted together

    def __init__(
        self,
        api: DevRevAPI,
        endings: Sequence[str],
        spool: BinaryIO,
    ) -> None:
        self.api = api
        self.endings = tuple(endings) or ("",)
        self.spool = spool
        self.read = self.counted = 0
        self.rows: list[Contact] = []

    async def run(self) -> list[Contact]:
        """Return all rows, ordered by email. Raises what a list call does, and OSError."""
        keys = array("q")  # hashes of the spooled contacts' emails
        async for page in self.api.each_page("rev-users.list", "rev_users", {}):
            for user in page.items:
                contact = contact_of(user)
                takes_part = contact.is_user or contact.is_system
                is_wanted = contact.key != "" and contact.key.endswith(self.endings)
                if takes_part and is_wanted and not is_gone(user):
                    keys.append(hash(loose_key(contact.email)))
                    self.spool.write(to_json(astuple(contact)) + b"\n")
            self.read += len(page.items)
        self.spool.seek(0)
        wanted = compress(self.spool, map(repeated(keys).__contains__, keys))
        rows = [Contact(*json.loads(line)) for line in wanted]
        self.rows = sorted(rows, key=lambda contact: (contact.key, contact.id))
        log.info("%s read, %s with an email that recurs", plural(self.read, "contact"), len(rows))
        for start in range(0, len(rows), self.WAVE):
            await together(*map(self._count, self.rows[start : start + self.WAVE]))
        return self.rows

    async def _count(self, contact: Contact) -> None:
        """Set TICKET_COUNT as the README's query has it: the most that one role has."""
        listings = await together(
            *(self.api.objects[name].load(contact.id) for name in ROLES.values())
        )
        contact.tickets = ticket_count(
            [work["id"] for work in listing.items] for listing in listings
        )
        self.counted += 1

    def progress(self) -> str:
        """How far it is, what it has cost, and what it waits for."""
        counted = f"tickets of {self.counted:,} of {len(self.rows):,} counted" if self.rows else ""
        requests = plural(sum(self.api.requests.values()), "request")
        words = (
            f"{plural(self.read, 'contact')} read",
            counted,
            requests,
            describe_wait(self.api.scheduler),
        )
        return ", ".join(filter(None, words))


def check_free(path: Path) -> None:
    """Refuse a name in no folder, and one that is taken, but for an empty file, which a killed
    export leaves.

    Raises FatalError(2).
    """
    if not path.parent.is_dir():
        words = f"{path} can't be written: there is no folder {path.parent}"
        raise FatalError(EXIT_USAGE, words)
    is_left = path.is_file() and not path.is_symlink() and path.stat().st_size == 0
    if os.path.lexists(str(path)) and not is_left:
        words = f"{path} already exists and was not changed"
        raise FatalError(EXIT_USAGE, f"{words}; name a file that does not exist yet")


def write_new_file(
    environment: Environment,
    path: Path,
    chunks: Iterable[bytes],
) -> None:
    """Write a file aside and give it its name in one step that fails where the name is taken.

    A file system without hard links knows no such step: there an empty file takes the name first.
    Raises FatalError(2) where another file has the name, OSError where the disk fails; then nothing
    is left.
    """
    check_free(path)
    aside = path.with_name(f".{path.name[:80]}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        environment.create_file(aside, chunks)
        try:
            os.link(str(aside), str(path))
        except OSError:
            check_free(path)
            if not path.exists():
                path.touch(mode=0o600, exist_ok=False)
            environment.rename_into_place(aside, path)
        environment.fsync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


# --------------------------------------------------------------------------------------------------
# Undo
# --------------------------------------------------------------------------------------------------

MERGED_STATES = (State.MERGED, State.VERIFYING, State.DONE, State.SETTLED)
UNDO_STATES = (State.UNDOING, State.UNDONE, State.UNDO_SETTLED)


@dataclass
class UndoPlan:
    """What an undo would do: complete groups, in the order in which they are undone."""

    path: Path  # relative to the current folder
    groups: list[Group] = field(default_factory=list)
    undone: list[Pair] = field(default_factory=list)  # by an earlier undo
    skipped: list[Pair] = field(default_factory=list)  # with code and error
    older: list[Path] = field(default_factory=list)  # backups of the same email, left alone
    # Of each backup that a report names, the SHA-256 of its manifest, as far as reports have it.
    hashes: dict[str, set[str]] = field(default_factory=dict)
    left: int = 0  # pairs that --limit leaves

    def pairs(self) -> list[Pair]:
        return list(chain.from_iterable(group.pairs for group in self.groups))


def plan_undo(
    path: Path,
    savepoint: SavePoint,
    emails: Collection[str],
    limit: int | None,
) -> UndoPlan:
    """Plan the undo of exactly the merges that `path` names, as the savepoint knows them, else as
    `path` tells.

    What was undone and merged again later belongs to a later report, and is skipped. Raises
    FatalError(2).
    """
    located, older = locate_undo(path, savepoint)
    plan = UndoPlan(located, older=older, hashes=hashes_in_reports(located))
    groups: dict[str, Group] = {}
    seen: set[str] = set()
    for named in merges_named(located):
        pair = savepoint.pair(named.ids) or named
        seen.add(pair.email)
        if emails and pair.email not in emails:
            continue
        was_requested = pair.state not in (State.PLANNED, State.FAILED)
        if located.is_dir() and not was_requested:
            continue
        if not was_requested or named.backup not in (pair.backup, *plan.hashes):
            pair = named
        if not pair.manifest_sha256:
            pair.manifest_sha256 = max(plan.hashes.get(pair.backup, ()), default="")
        again = merged_again(pair, savepoint)
        if again:
            pair.code = "merged_again"
            pair.error = f"it was merged again later; that is undone with {report_of(again)}"
            plan.skipped.append(pair)
        elif pair.state in (State.MERGED_ELSEWHERE, State.CANCELLED, State.UNDO_SETTLED):
            pair.code = pair.state.value
            pair.error = STATE_WORDS[pair.state]
            plan.skipped.append(pair)
        elif pair.state is State.UNDONE:
            plan.undone.append(pair)
        else:
            groups.setdefault(pair.primary.id, Group(pair.email, [])).pairs.append(pair)
    unknown = sorted(set(emails) - seen)
    if unknown:
        words = f"--email: in no merge of {located}: {', '.join(unknown)}"
        raise FatalError(EXIT_USAGE, words)

    def is_new(group: Group) -> bool:
        return all(pair.state is not State.UNDOING for pair in group.pairs)

    for group in sorted(groups.values(), key=is_new):  # what an earlier undo has begun comes first
        # The application's reference comes before anything else.
        group.pairs.sort(key=lambda pair: not pair.new_ref)
        if limit and len(plan.pairs()) + len(group.pairs) > limit:
            plan.left += len(group.pairs)
        else:
            plan.groups.append(group)
    return plan


def merged_entries(report: Path) -> list[Json]:
    """Return the entries of the merges that a report calls merged. Raises OSError, ODD_ANSWER."""
    with open_regular(report) as file:
        lists = json.load(file)
    return [*lists["successful_merges"], *lists["unfinished_merges"], *lists["settled"]]


def hashes_in_reports(named: Path) -> dict[str, set[str]]:
    """Return the backups that the merge reports of this folder name, with what is known of each;
    `named` may be another report."""
    found: dict[str, set[str]] = {}
    for path in (*REPORTS.glob("merge_report_*.json"), named):
        with contextlib.suppress(OSError, *ODD_ANSWER):
            for entry in merged_entries(path):
                hashes = found.setdefault(entry["backup"], set())
                hashes.add(entry.get("manifest_sha256") or "")
    return found


def locate_undo(path: Path, savepoint: SavePoint) -> tuple[Path, list[Path]]:
    """Return the backup folder or report that `path` means, relative to the current folder, and the
    older backups.

    `backups/<email>` means the newest backup in it, by the savepoint's order, whose merge was
    carried out, undone since or not. Raises FatalError(2).
    """
    if not path.exists():
        raise FatalError(EXIT_USAGE, f"{path} does not exist")
    located = path
    for root in (BACKUPS, REPORTS):
        if root.resolve() in path.resolve().parents:
            located = root / path.resolve().relative_to(root.resolve())
    if not located.is_dir() or (located / "manifest.json").exists():
        return located, []

    def order(pair: Pair) -> int:
        return pair.undo.merge_revision if pair.undo else pair.revision

    pairs = savepoint.pairs(*MERGED_STATES, *UNDO_STATES)
    pairs_here = [pair for pair in pairs if Path(pair.backup).parent == located]
    pairs_here.sort(key=order, reverse=True)
    if not pairs_here:
        words = f"{path} holds no backup of a merge that the savepoint knows"
        raise FatalError(EXIT_USAGE, f"{words}; name one of its backups")
    newest, *older = dict.fromkeys(Path(pair.backup) for pair in pairs_here)
    return newest, older


def merges_named(path: Path) -> list[Pair]:
    """Return the pairs of a backup folder, or those that a merge report calls merged.

    Raises FatalError(2).
    """
    try:
        if not path.is_dir():
            return [pair_of_entry(entry) for entry in merged_entries(path)]
        with reading_backup(str(path)) as backup:
            return pairs_of_backup(backup)
    except (OSError, PairError, *ODD_ANSWER):
        words = f"{path} is neither a backup folder nor a merge report (JSON)"
        raise FatalError(EXIT_USAGE, words) from None


def pairs_of_backup(backup: Backup) -> list[Pair]:
    """Return the pairs whose contacts are in a backup."""
    entries = backup.manifest["contacts"]
    primary, *duplicates = (Contact.from_json(entry["csv"]) for entry in entries)
    pairs = []
    for one in duplicates:
        new_ref = one.external_ref if one.is_user and not primary.is_user else None
        pairs.append(
            Pair(
                primary,
                one,
                new_ref,
                State.DONE,
                backup=str(backup.folder),
            )
        )
    return pairs


def pair_of_entry(entry: Json) -> Pair:
    """Return the pair of an entry of a merge report. Raises what reading another shape raises."""
    contacts = []
    email = entry["email"]
    backup = entry["backup"] or ""
    texts = [email, backup]
    for role in ("primary", "duplicate"):
        told = {**entry[role], "email": email, "external_ref": entry[role]["old_external_ref"]}
        contacts.append(Contact.from_json(told))
        texts += [told["id"], told["external_ref"]]
    "".join(texts)  # raises TypeError where one is no text
    return Pair(
        contacts[0],
        contacts[1],
        entry["new_external_ref"],
        State(entry["state"]),
        backup=backup,
        manifest_sha256=entry.get("manifest_sha256") or "",
    )


def current_ids(contact: str, savepoint: SavePoint) -> list[str]:
    """Return a contact's id, and those of the contacts that undos created again in its place; the
    last one exists."""
    ids = [contact]
    for one in ids:  # which grows
        for row in savepoint.pairs(duplicate_id=one):
            if row.undo and row.undo.contact not in ("", *ids):
                ids.append(row.undo.contact)
    return ids


def merged_again(pair: Pair, savepoint: SavePoint) -> Pair | None:
    """Return the later merge of two contacts of which an undo had created one again, if any."""
    if pair.undo and pair.undo.contact:
        for one in (pair.undo.contact, *current_ids(pair.primary.id, savepoint)):
            for row in savepoint.pairs(*REQUESTED_STATES, *MERGED_STATES, duplicate_id=one):
                if pair.undo.contact in row.ids:
                    return row
    return None


def stranded(pair: Pair) -> str:
    """Say which reference an unfinished undo may have left on no contact, `""` where none."""
    if pair.state is not State.UNDOING or pair.undo is None or not pair.undo.reference_free:
        return ""
    words = f"the reference {pair.duplicate.external_ref} may be on no contact until"
    again = f"merge_contacts.py --undo {pair.undo.path}"
    return f"{words} {again} finishes the undo (--settle {pair.email} gives it up)"


def report_of(pair: Pair) -> str:
    """Name the report of the merge run that wrote a pair last."""
    return f"reports/merge_report_{pair.undo.merge_run if pair.undo else pair.run}.json"


# -- what was before, and what follows from it -----------------------------------------------------

Role = Tuple[str, str]  # object id, and `owned_by`, `reported_by` or `members`
RESTORED_KINDS = ("ticket", "issue", "conversation")


def roles_in(items: Iterable[Json]) -> set[Role]:
    return {(item["id"], item["role"]) for item in items}


@dataclass
class UndoGroup:
    """Merges into one primary that are to be undone: what the contacts were, from the backups, and
    what they are."""

    pairs: Sequence[Pair]
    siblings: Sequence[Pair]  # other pairs of the primary
    # By the duplicate's id: the primary and the duplicate as DevRev had them before the merge.
    users: dict[str, list[Json]] = field(default_factory=dict)
    roles: dict[str, set[Role]] = field(default_factory=dict)  # of duplicates before the merges
    primary_roles: set[Role] = field(default_factory=set)  # before the merges
    primary_id: str = ""  # of the contact that stands for the primary now
    primary: Json = field(default_factory=dict)  # as DevRev has it now
    read: FreshRead | None = None  # when it was read
    # Ids that no longer exist, and those of the contacts in their place.
    aliases: dict[str, str] = field(default_factory=dict)

    def everybody(self) -> list[Pair]:
        return [*self.pairs, *self.siblings]

    def ids(self) -> set[str]:
        """Return the ids of the group: as it was, and as far as it was created again."""
        found = {self.primary_id, *self.aliases}
        for pair in self.everybody():
            found.update(pair.ids)
        return found

    def references(self, pair: Pair) -> tuple[list[str], str | None]:
        """Return the primary's reference before the merge with what may stand in for it, and the
        one that moved to it.

        DevRev may refuse the `REVU-` reference of an old id to a contact that was created again.
        """
        old, moved = (str(user.get("external_ref")) for user in self.users[pair.duplicate.id])
        own = str(self.primary.get("display_id"))
        possible = [old]
        if old.startswith("REVU-") and own != old:
            possible.append(own)
        return possible, moved if pair.new_ref and moved != old else None

    def staying_roles(self, pair: Pair) -> set[Role]:
        """Return where the primary stays: where it had the role itself, or stands for another
        duplicate."""
        stays = set(self.primary_roles)
        for one in self.everybody():
            if one is pair or one.state not in (*MERGED_STATES, State.UNDOING):
                continue
            roles = self.roles[one.duplicate.id]
            if one.undo and one.undo.left is not None:
                roles = roles & roles_in(one.undo.left)  # what it has not got again yet
            stays |= roles
        return stays

    def read_backups(self, hashes: Mapping[str, set[str]]) -> None:
        """Read and check the backups of all pairs; `hashes` are what reports say of them.

        Those of siblings that were undone may be missing. Raises PairError: backup_failed,
        backup_changed, backup_unknown.
        """
        backups: dict[str, Backup] = {}
        read: list[Pair] = []
        for pair in self.everybody():
            try:
                backup = backups.get(pair.backup) or verify_backup(pair.backup)
                self.users[pair.duplicate.id] = check_backup(backup, pair, hashes)
                backups[pair.backup] = backup
                read.append(pair)
            except PairError:
                if pair in self.pairs or pair.state in (*MERGED_STATES, State.UNDOING):
                    raise
        read.sort(key=lambda pair: str(backups[pair.backup].manifest["created"]))
        for pair in read:
            backup = backups[pair.backup]
            roles = roles_in(backup.to_transfer(pair.primary.id))
            # What the primary had by then from a duplicate that no longer existed is not its own.
            for one in self.roles.keys() - backup.ids():
                roles -= self.roles[one]
            self.primary_roles |= roles
            self.roles[pair.duplicate.id] = roles_in(backup.to_transfer(pair.duplicate.id))


def check_backup(backup: Backup, pair: Pair, hashes: Mapping[str, set[str]]) -> list[Json]:
    """Check that a backup is the one that a merge rests on: it may have been changed, or made up.

    Return the primary and the duplicate as it has them. Raises PairError: backup_failed,
    backup_changed, backup_unknown.
    """
    if BACKUPS not in backup.folder.parents or not (pair.run or pair.backup in hashes):
        words = f"{pair.backup}: no report and no row of the savepoint names this backup"
        raise PairError("backup_unknown", words)
    known = {pair.manifest_sha256, *hashes.get(pair.backup, ())} - {""}
    is_same = known <= {backup.sha256}
    if not known and pair.backed_up:
        is_same = pair.backed_up == backup.holdings
    with reading_backup(pair.backup):
        users = [backup.contact(identity) for identity in pair.ids]
    for user, contact in zip(users, (pair.primary, pair.duplicate)):
        reference = str(user.get("external_ref")).strip()
        # An earlier merge may have given the primary another one.
        has_its_own = contact is pair.duplicate or pair.new_ref
        if has_its_own and reference != contact.external_ref.strip():
            is_same = False
        if email_of(user) != contact.key:
            is_same = False
    if not is_same:
        words = "its SHA-256, how much it holds, or a contact's email or reference"
        raise PairError("backup_changed", f"{pair.backup} is not as the merge made it: {words}")
    return users


def plan_restore(
    obj: Json | None,
    roles: Sequence[str],
    primary: str,
    contact: str,
    aliases: Mapping[str, str],
    stays: set[Role],
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Plan what gives `contact` its `roles` on an object as it is now: role -> ids to set, and
    role -> why it is left to others.

    The contact replaces the primary, or joins it where the primary `stays`; everyone else stays.
    `aliases` are ids of contacts that no longer exist, and the ids of those that were created again
    in their place.
    """
    changes: dict[str, list[str]] = {}
    if obj is None:
        return changes, dict.fromkeys(roles, "deleted")
    left: dict[str, str] = {}
    for role in roles:
        now = [person["id"] for person in obj.get(role) or ()]
        # A merge may have left the old id.
        people = list(dict.fromkeys(aliases.get(one, one) for one in now))
        if contact not in people:
            if primary not in people:
                left[role] = "given to others"
                continue
            at = people.index(primary)
            stay = [primary] if (obj["id"], role) in stays else []
            people[at : at + 1] = [*stay, contact]
        if people != now:
            changes[role] = people
    return changes, left


def plan_fields(pair: Pair, live: Json) -> tuple[Json, list[Json]]:
    """Plan what removes from the primary, as it is now, the fields that a merge carried to it.

    Of phone numbers the added ones go; any other field gets its old value if it still has the one
    that the merge wrote. Return the fields to set, and `{field, value, why}` of those that stay.
    """
    update: Json = {}
    left: list[Json] = []
    for name in pair.fields_before:  # what was not written yet is not the merge's
        carried = pair.fields_to_carry[name]
        value = live.get(name)
        old = pair.fields_before[name]
        if name == "phone_numbers":
            added = set(carried).difference(old or ())
            kept = [number for number in value or () if number not in added]
            if len(kept) < len(value or ()):
                update[name] = kept
        elif value == carried and carried != old:
            update[name] = old or ""
        elif value and value not in (carried, old):
            left.append({"field": name, "value": value, "why": "it was changed since the merge"})
    return update, left


# -- the check -------------------------------------------------------------------------------------


async def read_primary(context: TaskRunner, group: UndoGroup, options: RequestOptions) -> None:
    """Read the primary, for a write that is to rest on it.

    Raises PairError where it is not the active contact any more that was merged: an undo must not
    bring back somebody who was erased.
    """
    pair = group.pairs[0]
    name = pair.primary.short_id
    sent = context.environment.now()
    user = await context.api.contact(group.primary_id, options)
    group.read = FreshRead(context.environment, sent)
    if user is None or is_gone(user):
        for row in context.savepoint.pairs(duplicate_id=group.primary_id):
            if row.state in (*UNFINISHED, *MERGED_STATES, State.UNDOING):
                words = f"{name} was merged into {row.primary.short_id} later"
                raise PairError("merged_onward", f"{words}; undo {report_of(row)} first")
        raise PairError("not_found", f"the primary {name} no longer exists in DevRev")
    if user.get("state") != "active":
        raise PairError("not_active", f"the primary {name} is {user.get('state')}, not active")
    if email_of(user) != pair.email:
        words = f"the primary {name} has another email than it was merged with"
        raise PairError("email_changed", f"{words}: {user.get('email') or 'none'}")
    group.primary = user


async def no_longer_exists(api: DevRevAPI, group: UndoGroup, pair: Pair) -> bool:
    """Return whether the duplicate no longer exists. Where polls give no usable answer for good,
    lists decide."""
    duplicate = pair.duplicate.id
    try:
        status = await api.poll_duplicate(
            group.primary_id,
            pair.duplicate,
            ANY_OPTIONS,
        )
        # What a confirmed merge has left behind may be in another state, or without its address.
        is_husk = status is DuplicateStatus.CHANGED and pair.state not in REQUESTED_STATES
        return status.is_gone or is_husk
    except (ApiError, NoUsableResponse) as error:
        name = pair.duplicate.short_id
        log.info("%s: lists decide whether %s still exists: %s", pair.email, name, error)
        listed = (await api.contacts_by_email([pair.duplicate.email.strip()])).items
        reference = str(group.users[duplicate][1].get("external_ref"))
        listed += await api.holders_of(reference, ANY_OPTIONS)
        return all(is_gone(one) for one in listed if one["id"] == duplicate)
    except PairError as problem:
        # DevRev may name the contact that the primary was merged into before it was created again.
        if problem.code == "merged_into_another" and group.primary_id != pair.primary.id:
            return True
        raise


def check_moved_reference(group: UndoGroup, pair: Pair) -> None:
    """Check that the primary has the reference that the merge gave it, or its old one.

    Raises PairError(external_ref_changed).
    """
    reference = group.primary.get("external_ref")
    old, moved = group.references(pair)
    if reference == moved or reference in old:
        return
    if moved is None:  # it may have one that another merge has moved, or an undo has given back
        rows = group.everybody()
        others = {row.new_ref for row in rows} | {row.primary.external_ref for row in rows}
        if str(reference).strip() in others:
            return
    words = f"another user gave {pair.primary.short_id} the reference {reference or 'none'}"
    hint = f"set {moved or old[0]} again, undo again"
    raise PairError("external_ref_changed", f"{words}; {hint}")


FINISH_OPTIONS = RequestOptions(FINISH)


# -- the run ---------------------------------------------------------------------------------------


class Recreation:
    """Creates the contact of an undo again, once, whatever becomes of the answers.

    DevRev makes no second contact with the same reference, so one with its reference is simply
    requested again; one without is looked for first.
    """

    FIELDS = (
        "display_name",
        "email",
        "external_ref",
        "description",
        "phone_numbers",
        "display_picture",
        "rev_org",
    )
    PATIENCE = 10.0  # seconds for which the application's reference may be on no contact
    TAKEN = (
        "; no contact has its reference, so your organisation probably takes each address once, "
        "and then no contact can be created again"
    )

    def __init__(
        self,
        context: TaskRunner,
        group: UndoGroup,
        pair: Pair,
        undo: UndoProgress,
    ) -> None:
        self.context = context
        self.api = context.api
        self.group = group
        self.pair = pair
        self.undo = undo
        self.known = creation_fields(group.users[pair.duplicate.id][1])
        self._forget()
        self._may_exist = undo.contacts_before is not None  # an earlier request may have created it
        if undo.contacts_before is None and "external_ref" in self._fields():
            undo.contacts_before = []  # saved before the reference is freed, nothing waits for it

    def _forget(self) -> None:
        """Begin anew, with no request under way."""
        self._since = self.context.environment.now()
        self._pause = Backoff(
            0.2,
            self.PATIENCE,
            1.6,
        )
        self._may_exist = False
        self._refusal = ""  # why the last request has created nothing, as far as is known

    def _fields(self) -> Json:
        left_out = self.undo.left_out
        return {name: value for name, value in self.known.items() if name not in left_out}

    async def run(self) -> Json:
        """Return the contact, with the fields that DevRev takes.

        Raises PairError: contact_refused, forbidden, external_ref_conflict, contact_not_confirmed.
        """
        while True:
            fields = self._fields()
            if self._may_exist or self._refusal:
                user = await self._find(fields)
                if user:
                    return user
                if not await self._may_request_again("external_ref" in fields):
                    continue
            before: list[str] = []
            if "external_ref" not in fields:
                listed = {user["id"] for user in await self._listed()}
                before = sorted(listed | self.group.ids())
            if self.undo.contacts_before != before:
                self.undo.contacts_before = before
                await self.context.savepoint.save(self.pair)
            if "external_ref" not in fields:  # DevRev would create a second one
                self.context.raise_if_draining()
            try:
                return await self.api.create_contact(fields, FINISH_OPTIONS)
            except NoUsableResponse as error:
                self._may_exist = True
                self._refusal = str(error)
            except ApiError as error:
                self._note_refusal(error, fields)

    def _note_refusal(self, error: ApiError, fields: Json) -> None:
        """Leave out the fields that DevRev does not take. Raises PairError where it is not that."""
        # The application knows the person by its own reference.
        is_vital = "external_ref" in fields and self.pair.duplicate.is_user
        self._refusal = str(error)
        refused = refused_fields(
            error,
            fields,
            is_vital,
        )
        if refused:
            self.undo.left_out.update(dict.fromkeys(refused, self._refusal))
            self._forget()
        elif error.status == 409 and "external_ref" not in fields:
            raise self._refused(self.TAKEN)
        elif error.status != 409:
            problem = self._refused()
            problem.code = "forbidden" if error.status == 403 else problem.code
            raise problem

    def _refused(self, why: str = "") -> PairError:
        words = f"{self.pair.duplicate.short_id} could not be created again: {self._refusal}"
        return PairError("contact_refused", f"{words}{why}")

    async def _may_request_again(self, has_reference: bool) -> bool:
        """Wait, for lists may lag, and return whether the contact may be requested again.

        False: it is looked for first. Raises PairError where it is given up.
        """
        if has_reference and not self._refusal:
            return True
        is_vital = has_reference and self.pair.duplicate.is_user
        limit = self.PATIENCE if is_vital else self.context.options.merge_timeout
        if self._may_exist and self.context.environment.elapsed(self._since) < limit:
            await self.context.cancel_token.sleep(self._pause.next())
            return has_reference
        if is_vital:
            raise self._refused("" if self._may_exist else self.TAKEN)
        if has_reference:
            self.undo.left_out["external_ref"] = self._refusal
            self.undo.contacts_before = None
            self._forget()
            return False
        if self._refusal:
            words = f"it is not known whether {self.pair.duplicate.short_id} was created again"
            raise PairError("contact_not_confirmed", f"{words}; undo again, which looks for it")
        return True

    async def _find(self, fields: Json) -> Json | None:
        """Return the contact that was requested, if it exists. A reference is looked up in the
        whole organisation.

        Raises PairError(external_ref_conflict) where the reference belongs to another contact.
        """
        reference = fields.get("external_ref")
        if reference is None:
            for user in await self._listed():
                is_new = user["id"] not in (self.undo.contacts_before or ())
                own = (None, "", user.get("display_id"))
                if is_new and user.get("external_ref") in own:
                    return user
            return None
        other: Json | None = None
        for holder in await self.api.holders_of(reference, FINISH_OPTIONS):
            if holder["id"] in self.group.ids():
                continue
            # Lists lag behind contacts that no longer exist, or no longer have the reference.
            there = await self.api.contact(holder["id"], FINISH_OPTIONS)
            if there is None or is_gone(there) or there.get("external_ref") != reference:
                continue
            rev_org = rev_org_id(there)
            is_here = rev_org in (None, fields.get("rev_org", rev_org))
            if is_here and email_of(there) == self.pair.email:
                return there
            other = there  # a reference may be unique in its workspace alone
        if other:
            self.undo.reference_free = False
            who = f"{other.get('display_id')} <{other.get('email')}>, another contact,"
            raise PairError("external_ref_conflict", f"{who} has the reference {reference} now")
        return None

    async def _listed(self) -> list[Json]:
        return (await self.api.contacts_by_email([self.known["email"].strip()], FINISH)).items


def creation_fields(user: Json) -> Json:
    """Return what a contact is created again with: the fields that can be set, of `user` as its
    backup has it."""
    picture = user.get("display_picture")
    picture_id = picture.get("id") if isinstance(picture, dict) else None
    known = {**user, "display_picture": picture_id, "rev_org": rev_org_id(user)}
    return {name: known[name] for name in Recreation.FIELDS if known.get(name)}


def refused_fields(error: ApiError, fields: Json, is_vital: bool) -> list[str]:
    """Return which fields to leave out after a 400: the one that it names, else all that say little
    of a person. The email never goes, nor the reference where it `is_vital`."""
    if error.status != 400:
        return []
    named = re.split(r"\W", str(error.data.get("field_name")))[0]
    if named == "email" or (named == "external_ref" and is_vital):
        return []
    if named in fields:
        return [named]
    return [name for name in ("description", "phone_numbers", "display_picture") if name in fields]


class PairUndo:
    """The undo of one merge: the primary's old reference, the contact, the primary's fields, then
    object after object.

    Nothing runs beside it, and between the freed reference and the new contact nothing waits or
    interrupts.
    """

    ATTEMPTS = 6  # times that something is written, where answers are lost or odd

    def __init__(
        self,
        context: TaskRunner,
        group: UndoGroup,
        pair: Pair,
        path: Path,
    ) -> None:
        self.context = context
        self.api = context.api
        self.savepoint = context.savepoint
        self.group = group
        self.pair = pair
        self.old, self.moved = group.references(pair)
        if pair.undo and pair.state is State.UNDOING:
            self.undo = pair.undo
        else:  # none has started, or one was refused, so that the merge stands as it was
            was = pair.undo or UndoProgress(
                "",
                "",
                pair.run,
                pair.revision,
            )
            self.undo = replace(
                was,
                path=str(path),
                state_before=pair.state.value,
                contact="",
            )
        self.is_new = pair.state is not State.UNDOING
        self.stays = group.staying_roles(pair)

    async def run(self) -> None:
        """Undo the merge; in a preview only find out what would be left to others."""
        pair = self.pair
        undo = self.undo
        pair.undo = undo
        _, undo.fields_left = plan_fields(pair, self.group.primary)
        if self.context.options.preview:
            await self._restore_objects()
            return
        recreation = Recreation(
            self.context,
            self.group,
            pair,
            undo,
        )
        if self._has_moved() and not undo.contact:
            undo.reference_free = True
        pair.move_to(State.UNDOING)
        await self.savepoint.save(pair)
        if not undo.contact:
            await until_fresh(functools.partial(self._recreate, recreation))
            undo.reference_free = False
            await self.savepoint.save(pair)
        self.group.aliases[pair.duplicate.id] = undo.contact
        await self._remove_fields()
        await self._restore_objects()
        pair.move_to(State.UNDONE)
        await self.savepoint.save(pair)
        log.info("%s: undone, %s is %s now", pair.email, pair.duplicate.short_id, undo.display_id)

    def _has_moved(self) -> bool:
        """Whether the primary has the reference that the contact had."""
        return self.moved is not None and self.group.primary.get("external_ref") == self.moved

    async def _recreate(self, recreation: Recreation) -> None:
        """Give the primary its old reference, and create the contact.

        Between the two nothing waits, an interruption included: the units for both are there
        before the primary is read. Raises PreconditionsExpired where something has waited since.
        """
        try:
            # With the units for what follows: the contact, perhaps with fewer fields, or the way
            # back.
            await read_primary(
                self.context,
                self.group,
                RequestOptions(MERGE, 9),
            )
            check_moved_reference(self.group, self.pair)
        except PairError:
            if self.is_new:
                await self._save_as_before()
            raise
        self.context.raise_if_draining()
        with self.context.cancel_token.shield():
            if self._has_moved():
                await self._free_reference()
            try:
                user = await recreation.run()
            except PairError as problem:
                if problem.code in ("contact_refused", "forbidden"):
                    await self._be_as_before(problem)
                raise
        self.undo.contact = user["id"]
        self.undo.display_id = str(user.get("display_id"))

    async def _free_reference(self) -> None:
        """Give the primary its old reference. Raises PreconditionsExpired, and PairError where it
        keeps the moved one or another user has changed it."""
        group = self.group
        for reference in self.old:
            try:
                await self._set_reference(reference)
                return
            except PairError as error:
                problem = error
            # Where it has gone since the update, the contact is created all the same.
            if not group.primary and isinstance(problem, NoUsableResponse):
                return
        if self._has_moved() or not group.primary:
            await self._save_as_before()
        words = f"the primary did not get its old reference {self.old[0]}: {problem}"
        raise PairError(problem.code, words)

    async def _set_reference(self, reference: str) -> None:
        """Set the primary's reference. `group.primary` is what the last answer shows, empty where
        it no longer exists.

        Raises PreconditionsExpired, and PairError where it does not have the reference then.
        """
        group = self.group
        before = group.primary.get("external_ref")
        contact = replace(self.pair.primary, id=group.primary_id)
        update = ReferenceUpdate(
            self.api, contact, reference, lambda: RequestOptions(FINISH, rests_on=group.read)
        )
        for _ in range(self.ATTEMPTS):
            sent = self.context.environment.now()
            user = await update.send()
            if user != {}:
                group.primary = {} if user is None or is_gone(user) else user
                group.read = FreshRead(self.context.environment, sent)
            now = group.primary.get("external_ref")
            if now == reference:
                return
            words = f"DevRev answered with the reference {now}"
            problem = update.problem or PairError("external_ref_not_set", words)
            if not isinstance(problem, NoUsableResponse) or now != before:
                break
        raise problem

    async def _be_as_before(self, refusal: PairError) -> None:
        """Give the primary the moved reference again, because no contact can be created.

        Raises PairError where that fails: another contact may have it by now, which lists do not
        show yet.
        """
        try:
            if self.undo.reference_free:
                await until_fresh(self._return_reference)
        except PairError as error:
            words = f"{self.moved} could not be set on {self.pair.primary.short_id} again: {error}"
            raise PairError(refusal.code, f"{refusal}; {words}") from None
        await self._save_as_before()

    async def _return_reference(self) -> None:
        await read_primary(
            self.context,
            self.group,
            FINISH_OPTIONS,
        )
        check_moved_reference(self.group, self.pair)
        await self._set_reference(str(self.moved))

    async def _save_as_before(self) -> None:
        """Save that the merge stands as it was. What its undo knows of the merge stays."""
        self.undo.reference_free = False
        self.undo.contacts_before = None
        self.undo.left_out = {}
        self.pair.move_to(State(self.undo.state_before))
        await self.savepoint.save(self.pair)

    async def _remove_fields(self) -> None:
        """Remove from the primary what the merge carried to it and is still there; what DevRev
        refuses is named."""
        if not self.pair.fields_before:
            return
        try:
            await until_fresh(self._write_fields)
        except PairError as problem:
            for name in self.pair.fields_before:
                value = self.group.primary.get(name)
                self.undo.fields_left.append({"field": name, "value": value, "why": str(problem)})

    async def _write_fields(self) -> None:
        await read_primary(
            self.context,
            self.group,
            RequestOptions(RESUME, 2),
        )
        update, self.undo.fields_left = plan_fields(self.pair, self.group.primary)
        if update:
            self.context.raise_if_draining()
            options = RequestOptions(FINISH, rests_on=self.group.read)
            await self.api.update_contact(
                self.group.primary_id,
                update,
                options,
            )

    async def _restore_objects(self) -> None:
        """Give the contact its works and conversations, one after the other: read, write, verify
        the answer.

        What was deleted or given to others since is left and named. Raises PairError(not_restored)
        where DevRev refuses an update, or in a preview a read.
        """
        roles: dict[str, list[str]] = collections.defaultdict(list)
        for identity, role in sorted(self.group.roles[self.pair.duplicate.id]):
            roles[identity].append(role)
        left: list[Json] = []
        failed: list[Json] = []
        for identity, mine in roles.items():
            try:
                stay = await self._restore_object(identity, mine)
            except (PairError, *ODD_ANSWER) as error:
                stay = dict.fromkeys(mine, str(error))
                failed.append({"id": identity})
            left += [{"id": identity, "role": role, "why": why} for role, why in stay.items()]
        self.undo.left = left
        if failed:
            names = [item["display_id"] for item in describe(self.pair.backup, failed)]
            raise PairError("not_restored", f"not restored: {', '.join(some(names))}")

    async def _restore_object(self, identity: str, roles: list[str]) -> dict[str, str]:
        """Write one object, and return why which of its roles are left to others. Only who joins
        between read and write can be missed."""
        if kind_of(identity) not in RESTORED_KINDS:
            return dict.fromkeys(roles, "works of this kind are not restored")
        write = functools.partial(
            self._write_object,
            identity,
            roles,
        )
        pause = Backoff(0.1, 10.0)
        for _ in range(self.ATTEMPTS):
            left = await until_fresh(write)
            if left is not None:
                return left
            await self.context.cancel_token.sleep(pause.next())
        raise NoUsableResponse(f"an update of {identity}", "it answers with other people")

    async def _write_object(self, identity: str, roles: list[str]) -> dict[str, str] | None:
        """Read one object and write it; return what of it is left to others, None where no answer
        shows that it is written. Raises PreconditionsExpired."""
        sent = self.context.environment.now()
        obj = await self.api.get_object(
            identity,
            RequestOptions(RESUME, 2),
        )
        read = FreshRead(self.context.environment, sent)
        changes, left = plan_restore(
            obj,
            roles,
            self.group.primary_id,
            self.undo.contact or self.pair.duplicate.id,
            self.group.aliases,
            self.stays,
        )
        if obj and changes and not self.context.options.preview:
            self.context.raise_if_draining()
            try:
                options = RequestOptions(FINISH, rests_on=read)
                answer = await self.api.set_people(
                    obj,
                    changes,
                    options,
                )
            except NoUsableResponse as error:
                log.info("%s: %s", identity, error)
                return None
            if any(set(people) - user_ids(role, answer) for role, people in changes.items()):
                return None
        return left


class UndoRunner(TaskRunner):
    """Carries out an undo, one group after the other. How it starts, stops and ends is as with
    merges."""

    def __init__(
        self,
        api: DevRevAPI,
        savepoint: SavePoint,
        options: MergeOptions,
        on_outcome: Callable[[Pair], None],
    ) -> None:
        super().__init__(
            api,
            savepoint,
            options,
            on_outcome,
        )
        # Kinds of objects that the token is known to be allowed to write.
        self.writable_kinds: set[str] = set()

    def is_success(self, pair: Pair) -> bool:
        return not pair.code

    async def undo(self, plan: UndoPlan) -> int:
        """Carry out the plan and return the exit code; nothing is raised."""
        self.total = len(plan.pairs())
        code = await self.run(self._work(plan))
        errors = {pair.code: pair.error for pair in self.outcomes.values()}
        may_not_write = set(errors) == {"forbidden"} and not self.api.writes
        if may_not_write and code in (EXIT_FAILED, EXIT_STOPPED):
            self.draining = FatalError(EXIT_USAGE, errors["forbidden"])
            return EXIT_USAGE
        return code

    async def _work(self, plan: UndoPlan) -> None:
        for group in plan.groups:
            self.raise_if_draining()
            task = self.start(self._undo_group(group, plan), group.pairs)
            await self.cancel_token.wait(asyncio.wait({task}))

    async def _undo_group(self, group: Group, plan: UndoPlan) -> None:
        """Undo the pairs one after the other, once the whole group is as its merges have left it.

        What keeps a pair from its end is recorded with it; what stops the run passes through.
        """
        checked: UndoGroup | None = None
        for pair in group.pairs:
            problem: PairError | None = None
            try:
                self.raise_if_draining()
                checked = checked or await self._check_group(group, plan)
                await PairUndo(self, checked, pair, plan.path).run()
            except PairError as error:
                problem = error
            except ODD_ANSWER as odd:
                problem = odd_answer(group.email, odd)
            words = stranded(pair)
            if problem and words:
                problem = PairError(problem.code, f"{problem}; {words}")
            await self.record_outcome(pair, problem)

    async def _check_group(self, group: Group, plan: UndoPlan) -> UndoGroup:
        """Find a group as its merges have left it, or as an undo that was not finished has. Raises
        PairError."""
        savepoint = self.savepoint
        pairs = group.pairs
        ids = current_ids(group.primary.id, savepoint)
        mine = {pair.ids for pair in pairs}
        siblings: list[Pair] = []
        for one in ids:
            siblings += [row for row in savepoint.pairs(primary_id=one) if row.ids not in mine]
        found = UndoGroup(pairs, siblings, primary_id=ids[-1])
        await self.environment.run_in_thread(found.read_backups, plan.hashes)
        found.aliases = dict.fromkeys(ids[:-1], ids[-1])
        for pair in found.everybody():
            if pair.undo and pair.undo.contact:
                found.aliases[pair.duplicate.id] = pair.undo.contact
        await read_primary(
            self,
            found,
            ANY_OPTIONS,
        )
        there = []
        objects: set[str] = set()
        for pair in pairs:
            check_moved_reference(found, pair)
            objects.update(identity for identity, _ in found.roles[pair.duplicate.id])
            if not await no_longer_exists(self.api, found, pair):
                there.append(pair.duplicate.short_id)
        if there:
            words = f"not merged, or not yet, because still there: {', '.join(there)}"
            raise PairError("not_merged", words)
        if not self.options.preview:
            await self._check_write_access(sorted(objects))
        return found

    async def _check_write_access(self, objects: Iterable[str]) -> None:
        """Set nothing on an object of each kind: a token that may not write is refused while all is
        as it was."""
        refused: dict[str, ApiError] = {}
        for identity in objects:
            kind = kind_of(identity)
            if kind not in RESTORED_KINDS or kind in self.writable_kinds:
                continue
            try:
                await self.api.set_people({"id": identity, "type": kind}, {}, ANY_OPTIONS)
            except ApiError as api_error:
                if api_error.status == 403:
                    refused[kind] = api_error  # which may concern this one object alone
                if api_error.status == 403 or api_error.missing:
                    continue
            self.writable_kinds.add(kind)
        for kind in refused.keys() - self.writable_kinds:
            raise PairError("forbidden", f"the token may not write: {refused[kind]}")

    async def record_outcome(
        self,
        pair: Pair,
        problem: PairError | None = None,
        counts: bool = True,
    ) -> None:
        """Record that a pair is undone, or what keeps it from that; the row of a refused pair stays
        as it is."""
        if problem and (self.options.preview or pair.state not in UNDO_STATES):
            problem = PairSkipped(problem.code, str(problem))
        elif not problem:
            pair.code = ""
            pair.error = ""
        await super().record_outcome(pair, problem, counts)


def undo_entry(pair: Pair) -> Json:
    """Return what an undo has restored, or would restore, of a pair, what is left to others, and
    what is lost."""
    undo = pair.undo or UndoProgress("", "", "", 0)
    restored: list[Json] = []
    lost: list[Json] = []
    created: Json = {}
    with contextlib.suppress(PairError), reading_backup(pair.backup) as backup:
        user = backup.contact(pair.duplicate.id)
        created = creation_fields(user)
        lost = lost_in_undo(backup.entry(pair.duplicate.id), user, undo.left_out)
        if undo.left is not None:
            others = roles_in(undo.left)
            moved = backup.to_transfer(pair.duplicate.id)
            restored = [item for item in moved if (item["id"], item["role"]) not in others]
    contact: Json | None = None
    if undo.contact:
        contact = {"id": undo.contact, "display_id": undo.display_id}
        contact["external_ref"] = created.get("external_ref")
        if "external_ref" in undo.left_out:
            contact["external_ref"] = undo.display_id
    return {
        "email": pair.email,
        "primary": contact_entry(pair.primary),
        "duplicate": contact_entry(pair.duplicate),
        "creates": {name: created.get(name) for name in ("display_name", "email", "external_ref")},
        "contact": contact,
        "state": pair.state.value,
        "status": STATE_WORDS[pair.state],
        "backup": pair.backup,
        "pinned": bool(pair.manifest_sha256),
        "code": pair.code,
        "error": pair.error,
        "advice": ADVICE.get(pair.code),
        "restored": describe(pair.backup, restored),
        "left": describe(pair.backup, undo.left or ()),
        "fields_left": undo.fields_left,
        "not_restored": lost,
    }


def lost_in_undo(entry: Json, user: Json, left_out: Mapping[str, str]) -> list[Json]:
    """Return `{what, value, why}` of what no undo can restore of a contact: `entry` is the
    manifest's, `user` the rev_user in the backup, `left_out` are fields that DevRev refused."""
    why = "DevRev does not allow it to be set"
    settable = (*Recreation.FIELDS, "state", "is_verified")
    rows = [(name, value, why) for name, value in user.items() if name not in settable]
    rows += [(name, user.get(name), refusal) for name, refusal in left_out.items()]
    if user.get("is_verified") is False:
        rows.append(("verification", False, "a contact created through the API is verified"))
    if entry["works"]["created"]:
        words = "the primary stays the creator"
        rows.append(("creator of works", entry["works"]["created"], words))
    rows.append(("authors of comments", None, why))
    return [dict(zip(("what", "value", "why"), row)) for row in rows]


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


# What to do about a pair or group with a code; what has happened stands in its error.
ADVICE: Mapping[str, str] = {
    # Skipped by detection, or by the live check.
    "several_user_refs": (
        "Find out which user_ reference the application uses, and name it with --choices."
    ),
    "no_user_ref": (
        "Nothing needs to be done. To merge them, name the reference to keep with --choices."
    ),
    "shared_mailbox": "If it is one person, name the reference to keep with --choices.",
    "invalid_row": "Correct the rows, which are listed with their lines, and run again.",
    "undone": "To merge it again, export again and name the address with --email.",
    "cancelled": (
        "Every run asks DevRev whether it was carried out after all. To request it again, name "
        "the address with --email."
    ),
    "already_gone": "Nothing needs to be done.",
    "already_merged": (
        "Nothing needs to be done. If it was merged in another folder, keep using that one: the "
        "history is there."
    ),
    "different_rev_org": (
        "Check both contacts in DevRev. --across-workspaces merges them all the same."
    ),
    # Refused by the live check or the integrity check: nothing was requested.
    "not_found": (
        "Export again, or leave the row out. If the pair is merged, --settle accepts it as it is."
    ),
    "not_active": "Check the contact in DevRev. If it no longer exists, leave its row out.",
    "email_changed": "Export again.",
    "external_ref_changed": (
        "Export again. If the pair is merged, --settle accepts the reference that it has now."
    ),
    "several_external_refs": "Leave its row out, or have DevRev reduce it to one reference.",
    "unverified": (
        "Leave its row out. Where your application's own sign-in vouches for the address, merge "
        "one pair with --primary user --try-unverified first."
    ),
    "reference_unheld": (
        "If it looks half merged, run again in the folder in which it was merged. If there is "
        "none any more, set the reference in DevRev on the primary. If the contact was deleted on "
        "purpose, leave its row out."
    ),
    "group_changed": "Export again, and choose again.",
    "count_mismatch": (
        "Where DevRev shows fewer tickets than the CSV, the token may not see them all: use one "
        "that does, and don't replace a warehouse's CSV by an export, which counts with the same "
        "token. Where it shows more, export again."
    ),
    "backup_failed": (
        "Check the file or ticket that the message names, then run again. An undo needs the "
        "backup as it was written."
    ),
    "stale": "Raise DEVREV_RATE_LIMIT_CALLS, or ask DevRev for a larger quota.",
    "undo_unfinished": "Finish the undo with the command in the message first.",
    "group_incomplete": "Run again.",
    "interrupted": "Run the same command again. It finishes unfinished pairs first.",
    # DevRev's answers.
    "api_error": "Run again. If it stays, send the message and the log to DevRev's support.",
    "forbidden": (
        "Do what the message says (another scope, access to the object, or a new token), then run "
        "again."
    ),
    "merge_refused": "Check both contacts in DevRev, then run again. --settle cancels the merge.",
    "merge_not_confirmed": (
        "Run again later: a run first asks DevRev whether the merge is done. --merge-timeout "
        "waits longer; --settle cancels the merge."
    ),
    "plan_changed": "Use the CSV that has the pair, or cancel the merge with --settle.",
    "merged_elsewhere": "Check the reference that the message names, and export again.",
    "merged_into_another": "Check both contacts in DevRev. --settle accepts it as it is.",
    "after_cancel": "If the contacts are two people, undo the merge with --undo and this report.",
    # Merged, and not finished.
    "reference_reverted": (
        "Find out what sets the old reference again, such as an integration, then run again. "
        "Until the primary has the new one, the application may not recognise this person."
    ),
    "external_ref_conflict": (
        "Export and run again. If it stays, free the reference from the contact that the message "
        "names. Until the primary has it, the application may not recognise this person."
    ),
    "external_ref_not_set": (
        "Run again. If it stays, set the reference by hand in DevRev, then use --settle. Until "
        "the primary has it, the application may not recognise this person."
    ),
    "left_behind": (
        "Run again later, because DevRev may still be moving objects, or move them by hand. The "
        "backup has them. --settle accepts what stays."
    ),
    "still_listed": "Run again later. --settle accepts it as it is.",
    # Undo.
    "merged_again": (
        "Nothing needs to be done. To undo the later merge, use the report that names it."
    ),
    "not_merged": "If the merge is unfinished, finish it first.",
    "backup_changed": (
        "Put the backup back as it was, from a copy, then run the same --undo again. A changed "
        "backup may name another person."
    ),
    "backup_unknown": "Undo the report of the run that merged them.",
    "contact_refused": (
        "Check DevRev's answer in the message, then run the same --undo again. Where each address "
        "may be used once, the merge has to stay. --settle gives up the rest."
    ),
    "contact_not_confirmed": "Run the same --undo again: it looks the contact up first.",
    "not_restored": (
        "Run the same --undo again, or set the people in DevRev. --settle gives up the rest."
    ),
    "merged_onward": "Undo the later merge first, with the report that the message names.",
}
# Why groups and duplicates are left out, which have no error.
SKIP_REASONS: Mapping[str, str] = {
    "several_user_refs": (
        "Several contacts have a user_ reference. The CSV can't tell which one the application "
        "uses."
    ),
    "no_user_ref": "No contact has a user_ reference: the application knows none of them.",
    "shared_mailbox": (
        "Several people probably share this address. After a merge each could read the others' "
        "conversations."
    ),
    "invalid_row": "A row with this address is invalid, so the group may not be complete.",
    "undone": "A merge of this address was undone.",
    "cancelled": "A merge of this address was cancelled with --settle.",
    "already_gone": "The duplicate no longer exists, and its reference is not needed.",
    "already_merged": (
        "It looks merged already: the primary has the reference, and the duplicate no longer "
        "exists."
    ),
    "different_rev_org": "The contacts belong to different workspaces.",
    "merged_again": "The merge was undone, and deliberately done again later.",
}
# These count among the failures in a row that stop a run.
SYSTEMIC = (
    "backup_failed", "stale", "api_error", "forbidden", "merge_refused",
    "merge_not_confirmed", "merged_into_another", "external_ref_not_set", "contact_refused",
    "contact_not_confirmed",
)  # fmt: skip
# Another run ends these: there is nothing that --settle could accept.
PASSING = ("undo_unfinished", "group_incomplete", "interrupted", "after_cancel")
STATE_WORDS: Mapping[State, str] = {
    State.PLANNED: "planned",
    State.SKIPPED: "skipped in this run",
    State.FAILED: "failed, not merged",
    State.REQUESTED: "requested, and not merged yet",
    State.ACKNOWLEDGED: "accepted by DevRev, not yet confirmed",
    State.MERGED: "merged in DevRev",
    State.VERIFYING: "merged in DevRev, and the reference is in place",
    State.DONE: "merged and verified",
    State.SETTLED: "merged, and the rest accepted with --settle",
    State.MERGED_ELSEWHERE: "merged or deleted by another user",
    State.CANCELLED: "cancelled, not merged",
    State.UNDOING: "being undone",
    State.UNDONE: "undone",
    State.UNDO_SETTLED: "partly undone, and the rest given up with --settle",
}


# -- one pair --------------------------------------------------------------------------------------


def contact_entry(contact: Contact, reference: str = "old_external_ref") -> Json:
    return {
        "id": contact.id,
        "display_id": contact.short_id,
        "display_name": contact.name,
        reference: contact.external_ref,
        "tickets": contact.tickets,
        "created": contact.created,
    }


def reference_is_set(pair: Pair) -> bool | None:
    """Whether the primary has the reference that the merge gives it; None where none moves."""
    if not pair.new_ref:
        return None
    is_past_it = pair.state in (State.VERIFYING, State.DONE, State.SETTLED)
    return is_past_it and not pair.reference_not_set


def progress_of(pair: Pair) -> Json:
    """Return what DevRev has done of an unfinished pair and what is still to do."""
    if pair.state not in UNFINISHED:
        return {}
    steps = []
    if pair.state in REQUESTED_STATES:
        steps.append("confirm the merge")
    if pair.new_ref and pair.state is not State.VERIFYING:
        steps.append("set the reference")
    steps.append("verify that nothing was left behind")
    return {"so_far": STATE_WORDS[pair.state], "to_do": ", ".join(steps)}


def merge_entry(pair: Pair, planned: Collection[Ids] | None) -> Json:
    """Return a pair as the report's lists have it.

    `in_csv` says whether it is among `planned`, the pairs of the CSV; it is null where these are
    not known.
    """
    entry: Json = {
        "email": pair.email,
        "primary": contact_entry(pair.primary),
        "duplicate": contact_entry(pair.duplicate),
        "new_external_ref": None if pair.reference_not_set else pair.new_ref,
        "reference_set": reference_is_set(pair),
        "state": pair.state.value,
        "status": STATE_WORDS[pair.state],
        "in_csv": None if planned is None else pair.ids in planned,
        "backup": pair.backup or None,
        "backed_up": pair.backed_up,
        "manifest_sha256": pair.manifest_sha256 or None,
        "proved": pair.proved,
        "fields_lost": pair.fields_lost,
        "seconds": round(pair.seconds, 3),
        "requested": iso(pair.requested_at) if pair.requested_at else None,
        "finished": None if pair.state in UNFINISHED else pair.updated,
    }
    for name in ("deleted", "accepted", "reference_not_set", "after_cancel"):
        if getattr(pair, name):
            entry[name] = getattr(pair, name)
    code = pair.code
    error = pair.error
    if pair.state is State.DONE and pair.after_cancel and not code:
        code = "after_cancel"
        error = "DevRev has carried out a merge that was cancelled"
    if pair.state is not State.DONE or code:
        entry.update(code=code, error=error, advice=None, left_behind=pair.left_behind)
        helps = "cancelled" if pair.state is State.CANCELLED else code
        # Of a settled pair nothing remains to be done.
        if pair.state not in (State.SETTLED, State.UNDO_SETTLED):
            entry["advice"] = ADVICE.get(helps)
    return {**entry, **progress_of(pair)}


def settle_error(pair: Pair) -> str:
    """Say why --settle can't end a pair, `""` where it can, or where the pair has ended."""
    if pair.state in (*TERMINAL, State.VERIFYING):
        return ""
    if pair.state is State.UNDOING:
        if pair.undo and pair.undo.reference_free and pair.code in ("", "interrupted"):
            words = f"the reference {pair.duplicate.external_ref} may be on no contact"
            return f"{words}; finish the undo first: merge_contacts.py --undo {pair.undo.path}"
        return ""
    if pair.state is State.MERGED:
        if pair.new_ref and pair.run in ("", pair.unset_since):
            words = f"its reference {pair.new_ref} is not set yet"
            return f"{words}; run again, which sets it: only what two runs have left so is settled"
        return ""
    if pair.state not in UNFINISHED:
        words = f"its merge was not requested ({pair.code}), so there is nothing to settle"
        return f"{words}; leave its rows out of the CSV"
    if pair.code in ADVICE and pair.code not in PASSING:
        return ""
    why = pair.code or STATE_WORDS[pair.state]
    return f"it is unfinished ({why}), and no report has named a problem that stays; run again"


def settle_pair(pair: Pair) -> None:
    """End a pair that `settle_error` lets end: accept its problem, or give up its merge or undo."""
    pair.accepted = f"{pair.code}: {pair.error}"
    state = State.SETTLED
    if pair.state in REQUESTED_STATES:
        state = State.CANCELLED
    elif pair.state is State.UNDOING:
        state = State.UNDO_SETTLED
        if pair.undo and pair.undo.reference_free:
            pair.reference_not_set = pair.duplicate.external_ref
    elif pair.new_ref and pair.state is State.MERGED:
        pair.reference_not_set = pair.new_ref
    pair.move_to(state, pair.code, pair.error)
    if pair.reference_not_set:
        pair.accepted += f"; {where_to_set(pair)}"


def where_to_set(pair: Pair) -> str:
    """Say where the reference that a pair has left on no contact could be set, if there is one."""
    if not pair.reference_not_set:
        return ""
    contact = pair.primary.short_id
    if pair.state is State.UNDO_SETTLED and pair.undo and pair.undo.display_id:
        contact = pair.undo.display_id
    elif pair.code == "not_found":
        contact = f"a contact of {pair.email}"
    return f"the reference {pair.reference_not_set} is on no contact; set it on {contact} in DevRev"


# -- the report of a merge run or a settle ---------------------------------------------------------


@dataclass
class RunRecord:
    """A run as its report and the savepoint have it. Times are ISO 8601, UTC."""

    id: str = ""
    kind: str = ""  # merge, settle or undo
    version: str = __version__
    headline: str = ""
    csv: list[Json] | None = None  # `path` and `sha256` of each file
    plan_id: str | None = None
    pairs: int | None = None
    undo: str | None = None  # what --undo named
    base_url: str = ""
    organisation: str = ""
    token_owner: Json | None = None
    options: Json = field(default_factory=dict)
    start: str = ""
    end: str | None = None
    exit_code: int | None = None  # null where it was killed
    stopped: str | None = None  # why it ended early
    log: str = ""
    requests: dict[str, int] | None = None  # by endpoint
    requests_total: int | None = None
    quota: Json | None = None  # what DevRev has announced
    quota_wait_seconds: float | None = None
    warnings: list[str] = field(default_factory=list)  # of what the token can't see
    # Not in the report's `run`:
    reported: bool = False  # whether its report was written
    summary: Json | None = None
    others: Json = field(default_factory=dict)  # fields of another version: kept as they are


def report_path(run_id: str, kind: str) -> Path:
    return REPORTS / f"{'undo' if kind == 'undo' else 'merge'}_report_{run_id}.json"


def free_run_id(start: float, known: Collection[str] = ()) -> str:
    """Return the name of a run that begins at `start` (epoch seconds).

    It is that second in UTC, or the next one that is free among the `known` runs, in `reports/`
    and in `logs/`.
    """
    while True:
        run_id = timestamp_name(start)
        taken = [*REPORTS.glob(f"*_{run_id}.json"), *LOGS.glob(f"*_{run_id}.log")]
        if run_id not in known and not taken:
            return run_id
        start += 1


def check_not_restored(savepoint: SavePoint) -> None:
    """Refuse to run where a report is newer than all that the savepoint knows.

    Then the folder was put back from an older backup, and merges or undos have happened that would
    be repeated. Raises FatalError(2).
    """
    newest = max(savepoint.runs(), default="")
    for path in sorted(REPORTS.glob("*_report_????????_??????.json")):
        if path.stem.rpartition("_report_")[2] > newest:
            raise FatalError(
                EXIT_USAGE,
                "the savepoint was put back from an older copy: "
                f"neither {SAVEPOINT} nor {SAVEPOINT_COPY} knows the run of {path}. "
                "Put the newest copy of both back. If nothing is missing, move that report away.",
            )


BESIDE_PAIRS = ("choices", "skipped", "look_alikes", "warnings", "invalid_rows")


def beside_pairs(plan: Plan | None) -> dict[str, Iterable[Json] | None]:
    """Return what reports and previews list besides pairs; null is what only a plan could tell."""
    if plan is None:
        return dict.fromkeys(BESIDE_PAIRS)
    choices: list[Json] = []
    for group in plan.chosen:
        lost = [contact_entry(contact, "external_ref") for contact in group.lost_refs()]
        choices.append({"email": group.email, "kept": group.chosen, "lost": lost})
    skipped = [skip_entry(skip) for skip in plan.skipped]
    for pair in plan.left_out:
        skip = SkippedGroup(pair.email, pair.code, [pair.duplicate])
        skipped.append({**skip_entry(skip), "error": pair.error})
    return {
        "choices": choices,
        "skipped": skipped,
        "look_alikes": plan.look_alikes,
        "warnings": plan.warnings,
        "invalid_rows": (row._asdict() for row in plan.invalid_rows),
    }


def skip_entry(skip: SkippedGroup) -> Json:
    """Return a skipped group, with the lines of which --choices may take one."""
    why, advice = skip_words(skip.code)
    return {
        "email": skip.email,
        "code": skip.code,
        "reason": why,
        "advice": advice,
        "contacts": [contact_entry(contact, "external_ref") for contact in skip.contacts],
        "choices": [
            {"line": line, "external_ref": contact.external_ref, "display_id": contact.short_id}
            for line, contact in skip.choice_lines().items()
        ],
    }


def report_chunks(head: Json, lists: Mapping[str, Iterable[Json] | None]) -> Iterator[bytes]:
    """Return a JSON document of `head` and of lists too long for the memory, None for null."""
    yield to_json({"schema": SCHEMA, **head}, indent=1)[:-2]
    for name, items in lists.items():
        yield b",\n %s: " % to_json(name)
        if items is None:
            yield b"null"
            continue
        yield b"["
        for index, item in enumerate(items):
            yield (b",\n  " if index else b"\n  ") + to_json(item)
        yield b"\n ]"
    yield b"\n}\n"


def merge_lists(savepoint: SavePoint, run_id: str, plan: Plan | None) -> dict[str, Iterator[Pair]]:
    """Return the pairs of a report's lists, read from the savepoint again with each call.

    A pair that has ended is in the report of the run that ended it, and in no other.
    """
    plan = plan or Plan()
    failed = savepoint.pairs(State.FAILED, State.MERGED_ELSEWHERE, run=run_id)
    return {
        "successful_merges": savepoint.pairs(State.DONE, run=run_id),
        "failed_merges": chain(failed, plan.refused),
        "unfinished_merges": savepoint.pairs(*UNFINISHED),
        "settled": savepoint.pairs(State.SETTLED, run=run_id),
        "cancelled": savepoint.pairs(State.CANCELLED, run=run_id),
        "undo_settled": savepoint.pairs(State.UNDO_SETTLED, run=run_id),
        "skipped": iter(plan.left_out),
    }


COUNTS = (
    "successful_merges", "failed_merges", "unfinished_merges", "unfinished_but_merged", "settled",
    "cancelled", "total_merges_attempted",
)  # fmt: skip
# What a summary holds; without a plan, what only the CSV could tell is null.
SUMMARY = (
    "contacts_read", "invalid_rows", "pairs_planned", "already_merged", *COUNTS, "left",
    "skipped_groups",
)  # fmt: skip


def merge_summary(savepoint: SavePoint, run_id: str, plan: Plan | None) -> Json:
    """Return a run in numbers, which are those of the CSV's pairs; `earlier_runs` counts the other
    pairs in the lists. Without a plan all are counted.

    Settled pairs count as successful too, cancelled ones as failed.
    """
    mine: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    for name, pairs in merge_lists(savepoint, run_id, plan).items():
        for pair in pairs:
            count = mine if plan is None or pair.ids in plan.ids else others
            count[name] += 1
            if name == "unfinished_merges" and pair.state in (State.MERGED, State.VERIFYING):
                count["unfinished_but_merged"] += 1
            if pair.first_requested_at:
                count["total_merges_attempted"] += 1
    for count in (mine, others):
        count["successful_merges"] += count["settled"]
        count["failed_merges"] += count["cancelled"]
    summary: Json = {**dict.fromkeys(SUMMARY), **{name: mine[name] for name in COUNTS}}
    if plan:
        gone = sum(1 for pair in plan.left_out if pair.code in LIVE_DONE)
        before = plan.already_merged + gone
        ended = mine["successful_merges"] + mine["failed_merges"] + mine["unfinished_merges"]
        summary.update(
            contacts_read=plan.contacts_read,
            invalid_rows=plan.invalid_count,
            pairs_planned=len(plan.ids),
            already_merged=before,
            left=len(plan.ids) - before - ended,
            skipped_groups=len(plan.skipped) + len(plan.left_out) - gone,
        )
    if mine["undo_settled"]:
        summary["undo_settled"] = mine["undo_settled"]
    earlier = {name: others[name] for name in COUNTS}
    if any(earlier.values()):
        summary["earlier_runs"] = earlier
    return summary


def in_words(counts: Json, **words: str) -> list[str]:
    """Say each of the named counts that is not 0 or null with its words."""
    return [f"{counts[name]:,} {what}" for name, what in words.items() if counts.get(name)]


def left_out_in_words(counts: Json) -> list[str]:
    words = []
    if counts["skipped_groups"]:
        words.append(f"{plural(counts['skipped_groups'], 'group')} skipped")
    if counts["invalid_rows"]:
        words.append(plural(counts["invalid_rows"], "invalid row"))
    return words


def headline(summary: Json, record: RunRecord) -> str:
    """Return what a run has come to, in one line. It never says "all" where some remain."""
    merged = f"{summary['successful_merges']:,}"
    verb = "finished" if summary["unfinished_merges"] else "merged"
    if record.kind == "settle":
        ends = {"settled": "settled", "cancelled": "cancelled", "undo_settled": "partly undone"}
        words = in_words(summary, **ends) or ["nothing settled"]
    elif summary["pairs_planned"] is None:
        words = [f"the run was killed: {merged} {verb}"]
    elif summary["pairs_planned"] > summary["already_merged"]:
        pairs = plural(summary["pairs_planned"] - summary["already_merged"], "pair")
        words = [f"{merged} of {pairs} {verb}"]
    else:
        words = ["nothing to merge"]
    unfinished = "unfinished"
    if summary["unfinished_but_merged"]:
        unfinished += f" ({summary['unfinished_but_merged']:,} merged in DevRev)"
    words += in_words(
        {**summary, "failed": summary["failed_merges"] - summary["cancelled"]},
        unfinished_merges=unfinished,
        failed="failed",
        left="remaining",
        already_merged="merged before",
    )
    words += left_out_in_words(summary)
    ends = {"successful_merges": "finished", "unfinished_merges": "unfinished"}
    earlier = in_words(summary.get("earlier_runs", {}), **ends, failed_merges="failed")
    if earlier:
        words.append(f"of earlier runs, not in this plan: {', '.join(earlier)}")
    return ", ".join(words)


class ReportContents(NamedTuple):
    """What stands in a report beside the run: the JSON's lists, null where not known, and the rows
    of the CSV, by the names of their columns."""

    lists: dict[str, Iterable[Json] | None]
    rows: Iterable[Mapping[str, str]]


def merge_contents(savepoint: SavePoint, run_id: str, plan: Plan | None) -> ReportContents:
    """Return what the report of a merge run or a settle holds; a killed run has no plan."""
    entry = functools.partial(merge_entry, planned=plan.ids if plan else None)
    pairs = merge_lists(savepoint, run_id, plan)
    lists = {name: map(entry, found) for name, found in pairs.items()}
    rows = table_rows(merge_lists(savepoint, run_id, plan))
    groups = plan.skipped if plan else ()
    # A skipped group has no pairs: its row has no ids.
    words = ({"email": one.email, "outcome": "skipped", "code": one.code} for one in groups)
    return ReportContents({**lists, **beside_pairs(plan)}, chain(rows, words))


def undo_contents(pairs: Mapping[str, Sequence[Pair]]) -> ReportContents:
    lists = {name: map(undo_entry, found) for name, found in pairs.items()}
    return ReportContents({**lists}, table_rows(pairs))


def references_to_set(savepoint: SavePoint) -> Iterator[Json]:
    """Yield the references that no contact had when their pairs ended, and where to set each."""
    for pair in savepoint.pairs(*TERMINAL):
        if pair.reference_not_set:
            yield {
                "email": pair.email,
                "reference": pair.reference_not_set,
                "advice": where_to_set(pair),
            }


def report_head(record: RunRecord) -> Json:
    run = stored_fields(record)
    del run["reported"]
    return {"run": run, "summary": run.pop("summary")}


def write_report(
    environment: Environment,
    savepoint: SavePoint,
    record: RunRecord,
    contents: ReportContents,
) -> Path:
    """Write the report of a run: the JSON, and beside it the page and the CSV that show the same.
    Return the JSON's path.

    The savepoint learns the end, which is in `record`, before the file is written, and that it
    was written afterwards, so that the next run can write what a kill has prevented. Raises
    OSError, and FatalError(3) where the savepoint can't be written.
    """
    path = report_path(record.id, record.kind)
    savepoint.save_run(record)
    environment.make_private_dir(path.parent)
    # One that is there was written by the run itself, which knew more, before it was killed.
    if not path.exists():
        lists = {**contents.lists, "references_to_set": references_to_set(savepoint)}
        chunks = report_chunks(report_head(record), lists)
        environment.write_atomically(path, chunks)
    with open(path, "rb") as lines:
        page = page_chunks(record.kind, record.headline, lines)
        environment.write_atomically(path.with_suffix(".html"), page)
    table = path.with_suffix(".csv")
    if not table.exists():
        columns = UNDO_COLUMNS if record.kind == "undo" else MERGE_COLUMNS
        rows = ([row.get(name, "") for name in columns] for row in contents.rows)
        environment.write_atomically(table, csv_chunks(columns, rows))
    record.reported = True
    savepoint.save_run(record)
    return path


def page_chunks(kind: str, headline: str, report: Iterable[bytes]) -> Iterator[bytes]:
    """Return the page of a report, given as lines of JSON.

    The headline is in the page itself, so that it is seen where no script runs. The page's policy
    lets the browser run only the script with this hash.
    """
    script = REPORT_PAGE.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head, _, tail = REPORT_PAGE.partition("__REPORT__")
    head = head.replace("__HASH__", digest).replace("__KIND__", kind)
    yield head.replace("__HEADLINE__", html.escape(headline)).encode()
    for line in report:
        # So that nothing in it can end the <script> element that holds it.
        yield line.replace(b"<", b"\\u003c")
    yield tail.encode()


MERGE_COLUMNS = (
    "email", "outcome", "code", "duplicate_id", "duplicate_display_id", "duplicate_external_ref",
    "primary_id", "primary_display_id", "primary_old_external_ref", "primary_new_external_ref",
    "duplicate_tickets", "primary_tickets", "backup",
)  # fmt: skip
UNDO_COLUMNS = (
    "email", "outcome", "code", "old_id", "old_display_id", "new_id", "new_display_id",
    "external_ref",
)  # fmt: skip


OUTCOMES = {
    "successful_merges": "merged",
    "failed_merges": "failed",
    "unfinished_merges": "unfinished",
}


def table_rows(lists: Mapping[str, Iterable[Pair]]) -> Iterator[Mapping[str, str]]:
    """Yield a row for each pair of a report's lists, for systems that have stored the duplicate's
    id: with MERGE_COLUMNS and UNDO_COLUMNS."""
    for name, pairs in lists.items():
        for pair in pairs:
            outcome = OUTCOMES.get(name, name)
            if name == "failed_merges" and pair.state is State.MERGED_ELSEWHERE:
                outcome = pair.state.value
            yield table_row(pair, outcome)


def table_row(pair: Pair, outcome: str) -> Mapping[str, str]:
    primary = pair.primary
    duplicate = pair.duplicate
    row = {
        "email": pair.email,
        "outcome": outcome,
        "code": pair.code,
        "duplicate_id": duplicate.id,
        "duplicate_display_id": duplicate.short_id,
        "duplicate_external_ref": duplicate.external_ref,
        "primary_id": primary.id,
        "primary_display_id": primary.short_id,
        "primary_old_external_ref": primary.external_ref,
        "primary_new_external_ref": primary.external_ref,
        "duplicate_tickets": str(duplicate.tickets),
        "primary_tickets": str(primary.tickets),
        "backup": pair.backup,
        "old_id": duplicate.id,
        "old_display_id": duplicate.short_id,
        "external_ref": duplicate.external_ref,
    }
    if pair.new_ref and reference_is_set(pair):
        row["primary_new_external_ref"] = pair.new_ref
    if pair.undo:
        row.update(new_id=pair.undo.contact, new_display_id=pair.undo.display_id)
    return row


def by_undo_outcome(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Return the pairs that an undo has dealt with as the lists of its report."""
    lists: dict[str, list[Pair]] = {"undone": [], "unfinished": [], "failed": []}
    names = {State.UNDONE: "undone", State.UNDOING: "unfinished"}
    for pair in pairs:
        lists[names.get(pair.state, "failed")].append(pair)
    return lists


def report_killed_runs(environment: Environment, savepoint: SavePoint) -> Iterator[Path]:
    """Write the reports of runs that were killed before they could; yield their paths.

    It comes before anything else of a run, because rows that change name the run that changed them.
    """
    for run_id, record in savepoint.runs().items():
        if record.reported:
            continue
        savepoint.organisation = record.organisation
        if record.kind == "undo":
            lists = by_undo_outcome(savepoint.pairs(run=run_id))
            contents = undo_contents(lists)
            contents.lists["skipped"] = None
            summary: Json = {name: len(pairs) for name, pairs in lists.items()}
            words = undo_headline(summary)
        else:
            contents = merge_contents(savepoint, run_id, None)
            summary = merge_summary(savepoint, run_id, None)
            words = headline(summary, record)
        if record.end is None:
            record.stopped = "killed"
            record.summary = summary
            record.headline = words
        yield write_report(environment, savepoint, record, contents)
    savepoint.organisation = ""


# --------------------------------------------------------------------------------------------------
# Estimate
# --------------------------------------------------------------------------------------------------


def expected_requests(plan: Plan, options: argparse.Namespace) -> int:
    """About how many requests a run takes: ten for its start and first lists, four a pair, and with
    timelines one for each work and conversation, of which there are more than the CSV counts
    tickets."""
    if not plan.count():
        return 0
    requests = 10.0
    for pair in plan.pairs():
        requests += 4
        if not options.no_timelines:
            requests += 1 + 1.3 * (pair.primary.tickets + pair.duplicate.tickets)
    return round(requests)


# --------------------------------------------------------------------------------------------------
# Console
# --------------------------------------------------------------------------------------------------


class Output:
    """Writes to streams in the order of its calls, once started in a thread: a terminal that takes
    nothing more delays neither a merge nor a signal.

    What can't be written is dropped; `failures` says why, unless the reader has closed the pipe.
    """

    PIECE = 1024  # bytes at a time, so that a slow terminal is seen to take some
    PATIENCE = 10.0  # seconds to wait for a terminal that takes nothing

    def __init__(self) -> None:
        self.failures: dict[TextIO, str] = {}
        self.jobs: queue.SimpleQueue[tuple[TextIO, str] | threading.Event] = queue.SimpleQueue()
        self._is_started = False
        self._stream: TextIO | None = None  # what is written to right now
        self._written = 0  # bytes

    def start(self) -> None:
        self._is_started = True
        threading.Thread(target=self._serve, daemon=True).start()

    def put(self, stream: TextIO, text: str) -> None:
        """Take a piece of text; safe in a signal handler too."""
        if self._is_started:
            self.jobs.put((stream, text))
        else:
            self._write(stream, text)

    def finish(self, patience: Callable[[], float]) -> bool:
        """Wait until everything is written, but for nothing that takes nothing for that long.

        Return whether it is.
        """
        done = threading.Event()
        self.jobs.put(done)
        seen = self._written
        since = time.monotonic()
        while self._is_started and not done.wait(0.05):
            longest = patience()
            if self._stream and self._stream.isatty():
                longest = min(longest, self.PATIENCE)
            if self._written != seen:
                seen = self._written
                since = time.monotonic()
            elif time.monotonic() - since > longest:
                return False
        return True

    def _serve(self) -> None:
        while True:
            job = self.jobs.get()
            if isinstance(job, threading.Event):
                job.set()
            else:
                self._write(*job)

    def _write(self, stream: TextIO, text: str) -> None:
        """Write past Python's own buffers: text stuck in one of them would delay the exit."""
        self._stream = stream
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        try:
            if raw is None:
                stream.write(text)
                return
            encoding = stream.encoding or "utf-8"
            data = text.replace("\n", os.linesep).encode(encoding, "backslashreplace")
            while data:
                taken = raw.write(data[: self.PIECE]) or 0
                if not taken:  # another program has made it a stream that does not block
                    time.sleep(0.05)
                self._written += taken
                data = data[taken:]
        except BrokenPipeError:
            pass
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.failures.setdefault(stream, str(error))


class Console:
    """What the user sees: results on stdout (`out`), everything else on stderr (`err`).

    It is plain where it is piped. JSON goes to `data`, which is `out` unless a run has its report
    printed: then all text goes to stderr.
    """

    COLOURS: Mapping[str, str] = {"good": "32", "bad": "31", "bold": "1"}

    def __init__(self, quiet: bool = False, out: TextIO | None = None) -> None:
        self.quiet = quiet
        nowhere = functools.partial(open, os.devnull, "w", encoding="utf-8")
        self.data: TextIO = sys.stdout or nowhere()
        self.err: TextIO = sys.stderr or nowhere()
        self.out = out or self.data
        self.mask: Callable[[str], str] = str
        self._output = Output()
        self._has_status = False  # whether a status line is shown
        # Whether a terminal knows escape sequences, and a line can be rewritten in place.
        self.is_smart = os.environ.get("TERM") != "dumb"
        self.rewrites = self.err.isatty() and self.is_smart

    def begin(self) -> None:
        """From now on write beside the work."""
        if os.name == "nt" and self.err.isatty():
            os.system("")  # makes the console of Windows 10 and later understand escape sequences
        self._output.start()

    def end(self, patience: Callable[[], float]) -> str:
        """Wait until everything is written, but for nothing that hangs for `patience()` seconds.

        Return why results can't be written; "" where they are.
        """
        if not self._output.finish(patience) and not self.data.isatty():
            return "nothing reads the terminal or the pipe that comes first"
        return self._output.failures.get(self.data, "")

    @staticmethod
    def columns(stream: TextIO) -> int:
        """How wide the terminal is, 80 where stdout is none; what goes elsewhere is not wrapped."""
        return shutil.get_terminal_size().columns if stream.isatty() else 10_000

    def sanitize(self, text: str) -> str:
        return escape_unprintable(self.mask(text))

    def print(
        self,
        text: str = "",
        style: str = "",
        to: TextIO | None = None,
    ) -> None:
        """Print a line, by default of results, wrapped on a terminal; a closed pipe raises nothing.

        What is wrapped is indented by two columns more than the line itself.
        """
        stream = to or self.out
        text = self.sanitize(text)
        lines = [text]
        width = self.columns(stream)
        if len(text) > width:
            blanks = " " * (len(text) - len(text.lstrip()) + 2)
            lines = textwrap.wrap(text, width, subsequent_indent=blanks, break_on_hyphens=False)
        if style and stream.isatty() and self.is_smart and "NO_COLOR" not in os.environ:
            lines = [f"\x1b[{self.COLOURS[style]}m{line}\x1b[0m" for line in lines]
        self._put(stream, "".join(f"{line}\n" for line in lines))

    def _put(self, stream: TextIO, text: str) -> None:
        if self._has_status:
            self._has_status = False
            self._output.put(self.err, "\r\x1b[K")
        self._output.put(stream, text)

    def stream(self, text: str, to: TextIO | None = None) -> None:
        """Print a part of long results as it is, once most of the earlier parts are written."""
        while self._output.jobs.qsize() > 10:
            time.sleep(0.01)
        self._put(to or self.out, text)

    def json(self, chunks: Iterable[bytes]) -> None:
        """Print results as JSON, in ASCII, which nothing on the way to a program changes."""
        for chunk in chunks:
            text = chunk.decode("utf-8")
            escaped = re.sub(r"[^\x00-\x7e]", lambda one: json.dumps(one.group())[1:-1], text)
            self.stream(escaped, self.data)

    def print_err(self, text: str, style: str = "") -> None:
        """Print a line that is no result."""
        self.print(text, style, self.err)

    def suggest(self, words: str, command: str = "") -> None:
        """Print a next step; its command is not wrapped, so that it can be copied."""
        if self.quiet:
            return
        self.print_err(f"next: {words}")
        if command:
            self._put(self.err, f"  {self.sanitize(command)}\n")

    def error(self, text: str) -> None:
        log.error("%s", text)
        self.print_err(f"error: {text}", "bad")

    def status(self, text: str) -> None:
        """Show the one line that is rewritten in place on a terminal; `""` removes it."""
        if self.quiet or not self.rewrites or self._output.jobs.qsize():
            return
        self._put(self.err, self.sanitize(text)[: self.columns(self.err) - 1])
        self._has_status = bool(text)


class LogHandler(logging.Handler):
    """Writes records to the log file, and shows those of at least `shown` on stderr.

    Each is one line, without the token and without anything that a terminal could act on. Errors
    are not shown again: the console has shown them.
    """

    def __init__(self, console: Console, shown: int) -> None:
        super().__init__()
        self.console = console
        self.shown = shown
        self.file: TextIO | None = None
        self.formatter = logging.Formatter("%(levelname)s %(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a log that can't be written stops nothing
            if record.levelno >= self.shown and record.levelno != logging.ERROR:
                self.console.print_err(f"{record.levelname.lower()}: {record.getMessage()}")
            if self.file:
                line = self.console.sanitize(f"{iso(record.created)} {self.format(record)}")
                self.file.write(f"{line}\n")
                self.file.flush()


# --------------------------------------------------------------------------------------------------
# Preview
# --------------------------------------------------------------------------------------------------


def plan_summary(plan: Plan, earlier: Sequence[Pair]) -> Json:
    """The plan in numbers; `earlier` are the pairs that are taken over from earlier runs."""
    new = len(plan.new_pairs())
    in_csv = sum(1 for pair in earlier if pair.ids in plan.ids)
    return {
        "plan_id": plan.id,
        "contacts_read": plan.contacts_read,
        "pairs_planned": len(plan.ids),
        "pairs_to_merge": new,
        "pairs_to_finish": len(earlier),
        "already_merged": plan.already_merged,
        "left": len(plan.ids) - plan.already_merged - in_csv - new,
        "skipped_groups": len(plan.skipped),
        "look_alikes": len(plan.look_alikes),
        "invalid_rows": plan.invalid_count,
        "other_references": plan.other_refs,
        "other_reference_example": plan.other_ref or None,
    }


def plan_headline(facts: Json) -> str:
    """Say in one line what a run would do with a plan."""
    words = in_words(
        facts,
        pairs_to_finish="of earlier runs to finish first",
        left="remaining (--email, --limit)",
        already_merged="merged before",
    )
    new = f"{plural(facts['pairs_to_merge'], 'pair')} to merge"
    return ", ".join([new, *words, *left_out_in_words(facts)])


def plan_chunks(
    plan: Plan,
    facts: Json,
    earlier: Sequence[Pair],
    live: Sequence[Json] | None,
) -> Iterator[bytes]:
    """Return the plan as JSON, for `--preview --json`."""
    pairs = (
        {
            "email": pair.email,
            "primary": contact_entry(pair.primary, "external_ref"),
            "duplicate": contact_entry(pair.duplicate, "external_ref"),
            "new_external_ref": pair.new_ref,
        }
        for pair in plan.new_pairs()
    )
    lists: dict[str, Iterable[Json] | None] = {"pairs": pairs}
    lists["to_finish"] = (merge_entry(one, plan.ids) for one in earlier)
    if live is not None:
        lists["live"] = live
    lists.update(beside_pairs(plan))
    return report_chunks({"summary": facts}, lists)


def show_plan(
    plan: Plan,
    facts: Json,
    console: Console,
    earlier: Sequence[Pair],
) -> None:
    """Print what a run would do, so that a person can sign it."""
    if not console.quiet:
        _show_pairs(plan, console)
        for title, lines in chain(_plan_lists(plan, earlier), _skip_lists(plan)):
            print_list(console, title, lines)
    console.print(f"{plural(plan.contacts_read, 'contact')} read")
    requests = f"about {plural(facts['estimated_requests'], 'request')}"
    for line in filter(None, (plan.others_line(), requests, f"plan {plan.id}")):
        console.print(line)
    console.print(plan_headline(facts), "bold")


def print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    """Print a title, the lines under it and an empty line; nothing where there are no lines."""
    if lines:
        console.print(title, "bold")
        for line in lines:
            console.print(f"  {line}")
        console.print()


def names_of(pair: Pair) -> str:
    """Whose contacts they are: one name, or both where they differ."""
    return " / ".join(dict.fromkeys((pair.primary.name, pair.duplicate.name)))


def describe_pair(pair: Pair) -> str:
    becomes = f", which gets the reference {pair.new_ref}" if pair.new_ref else ""
    return f"{names_of(pair)} <{pair.email}>: {into(pair)}{becomes}"


def describe_contact(contact: Contact) -> str:
    words = f"{contact.name}, {contact.short_id}, {plural(contact.tickets, 'ticket')}"
    return f"{words}, since {contact.created[:10]}" if contact.created else words


# What a person should know of a group that is merged all the same.
WARNINGS = {
    "shared_mailbox": "If several people share this address, each could read the others' tickets.",
    "names_differ": "If these are different people, each could read the others' tickets.",
    "age_undecided": "Check which contact is to be the primary.",
}


def _plan_lists(plan: Plan, earlier: Sequence[Pair]) -> Iterator[tuple[str, list[str]]]:
    """What a person should read beside pairs and skipped groups: titles with their lines."""
    title = f"TO FINISH FIRST, from earlier runs: {plural(len(earlier), 'pair')}"
    unfinished = [f"{describe_pair(pair)} ({STATE_WORDS[pair.state]})" for pair in earlier]
    yield title, some(unfinished, 20)
    choices: list[str] = []
    for group in plan.chosen:
        choices.append(f"{group.email} keeps {group.chosen}")
        for one in group.lost_refs():
            choices.append(f"  loses {one.external_ref} ({describe_contact(one)})")
    yield f"CHOICES: {plural(len(plan.chosen), 'group')}", choices
    for code, why in WARNINGS.items():
        found = [one for one in plan.warnings if one["code"] == code]
        lines = some([f"{one['email']}: {one['warning']}" for one in found], 20)
        yield f"WARNING {code}: {plural(len(found), 'group')}", [why, *lines] if found else []
    alike: list[str] = []
    for entry in plan.look_alikes:
        rows = []
        for line in entry["lines"]:
            email = ascii(line["email"])[1:-1]
            rows.append(f"{email} ({line['file']}, line {line['line']})")
        alike.append(" and ".join(some(rows)))
    title = f"LOOK ALIKE, and not joined: {plural(len(alike), 'group')} of addresses"
    yield f"{title}; correct them in DevRev", some(alike, 20)
    invalid: list[str] = []
    for code, count in plan.invalid_counts.most_common():
        invalid.append(f"{INVALID_ROWS[code]}: {plural(count, 'row')}")
        for row in [one for one in plan.invalid_rows if one.code == code][:20]:
            email = f" ({row.email})" if row.email else ""
            invalid.append(f"  {row.file}, line {row.line}: {row.reason}{email}")
    yield f"LEFT OUT: {plural(plan.invalid_count, 'invalid row')}", invalid


def _skip_lists(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """The groups that are skipped, by reason, with the lines that --choices may take."""
    for code in SKIP_REASONS:
        skips = [skip for skip in plan.skipped if skip.code == code]
        why, advice = skip_words(code)
        lines = [f"why: {why}", f"what to do: {advice}"]
        for skip in skips:
            group = f"{skip.email} ({plural(len(skip.contacts), 'contact')})"
            choices = skip.choice_lines()
            if choices:
                lines.append(f"{group}; copy one of these lines into the --choices file:")
                for line, contact in choices.items():
                    lines += [f"  {describe_contact(contact)}", f"    {line}"]
            else:
                names = [
                    f"{one.external_ref} ({plural(one.tickets, 'ticket')})" for one in skip.contacts
                ]
                lines.append(f"{group}: {', '.join(some(names))}")
        yield f"SKIPPED {code}: {plural(len(skips), 'group')}", lines if skips else []


def _show_pairs(plan: Plan, console: Console) -> None:
    """Print the pairs as a table; a row that does not fit the terminal on two lines."""
    rows: list[tuple[str, ...]] = [
        ("EMAIL", "PRIMARY", "TICKETS", "<-", "DUPLICATE", "TICKETS", "REFERENCE", "NAME")
    ]
    for pair in plan.new_pairs():
        moves = "moves" if pair.new_ref else "unchanged"
        primary = pair.primary
        duplicate = pair.duplicate
        cells = (
            pair.email, _ids(primary), str(primary.tickets), "<-", _ids(duplicate),
            str(duplicate.tickets), moves, names_of(pair),
        )  # fmt: skip
        rows.append(tuple(map(console.sanitize, cells)))
    if len(rows) == 1:
        return
    # One long cell must not take the table from all the others.
    widths = [max(len(cell) for cell in column if len(cell) <= 60) for column in zip(*rows)]
    form = "%-{}s  %-{}s %{}s %{}s %-{}s %{}s  %-{}s  %-{}s".format(*widths)
    lines = []
    width = console.columns(console.out)
    for row in rows:
        line = (form % row).rstrip()
        if len(line) > width:
            line = "{0}  {7}\n  {1} ({2}) {3} {4} ({5}), {6}".format(*row)
        lines.append(line)
    for line in lines[0].split("\n"):
        console.print(line, "bold")
    for start in range(1, len(lines), 1000):
        console.stream("\n".join([*lines[start : start + 1000], ""]))
    console.print()


def _ids(contact: Contact) -> str:
    """The reference, which tells which contact it is, and the id by which DevRev is searched."""
    return " ".join(dict.fromkeys((contact.external_ref, contact.short_id)))


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

EXIT_CODES: Mapping[int, str] = {
    EXIT_OK: "every planned pair is merged, or there was nothing to do",
    EXIT_FAILED: "some pairs failed or are unfinished; the rest are merged",
    EXIT_USAGE: "bad option, CSV, token, permission or environment; nothing was changed",
    EXIT_STOPPED: "stopped early (API, token, disk): run again to resume",
    EXIT_HELD: "another run is using the savepoint",
    130: "interrupted by Ctrl-C: run again to resume",
    143: "interrupted by SIGTERM: run again to resume",
    129: "interrupted by SIGHUP, a closed terminal: run again to resume",
}
DESCRIPTION = """\
Merge duplicate DevRev contacts that share an email address. Each pair is
checked, backed up, merged and verified; a report names every result.
"""
EPILOG = """\
A first time, step by step:
  merge_contacts.py --export contacts.csv                 read the contacts
  merge_contacts.py --csv contacts.csv --preview --live   see what it would do
  merge_contacts.py --csv contacts.csv --limit 1          merge one, check it
  merge_contacts.py --csv contacts.csv                    merge the rest
Run each command in the same folder: its history is there. To resume a run that
has stopped, run the same command again. To undo all merges of a run, or one:
  merge_contacts.py --undo reports/merge_report_20250131_120000.json
  merge_contacts.py --undo backups/ana@example.com

Environment, or .env in the current folder or beside the script:
  DEVREV_API_TOKEN          your token; --preview and --status need none
  DEVREV_BASE_URL           (default: https://api.devrev.ai)
  DEVREV_RATE_LIMIT_CALLS   send at most this many requests; 0: no limit
                            (default: as many as DevRev's quota allows)
  DEVREV_RATE_LIMIT_PERIOD  ... in this many seconds (default: 60)
  DEVREV_TIMEOUT            seconds to wait for an answer (default: 30)
  DEVREV_MAX_RETRIES        repeats of a failed request (default: 5)
  DEVREV_USER_REF_PREFIX    how the references of your application begin
                            (default: user_)

A run writes savepoint.db, logs/, backups/ and reports/; times are UTC.

Exit codes:
""" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())


class OptionParser(argparse.ArgumentParser):
    """Prints what is wrong with an option first, then the usage."""

    as_json = False  # whether a program reads stdout
    goes_with: dict[str, Sequence[str]]  # modes, by option

    def error(self, message: str) -> NoReturn:
        if self.as_json:
            answer = {"schema": SCHEMA, "exit_code": EXIT_USAGE, "error": message}
            sys.stdout.write(json.dumps(answer) + "\n")
        text = escape_unprintable(f"error: {message}")
        usage = "usage: merge_contacts.py --csv PATH [option ...]   (--help lists the options)"
        self.exit(EXIT_USAGE, f"{text}\n{usage}\n")


MERGE_RULES = ("count_policy", "across_workspaces", "try_unverified", "carry_fields")


def build_parser() -> OptionParser:
    """Build the parser. Each option names the modes that it goes with, none where it goes with all.

    `merge` is a run without another mode.
    """
    parser = OptionParser(
        prog="merge_contacts.py",
        usage="%(prog)s --csv PATH [--preview] [option ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        add_help=False,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=28
        ),
    )
    parser.goes_with = {}
    planning = ("merge", "preview", "check")

    path: Json = {"metavar": "PATH", "type": Path}
    several: Json = {"nargs": "+", "action": "extend"}

    def add(name: str, words: str, modes: Sequence[str] = (), **how: Any) -> None:
        group.add_argument(name, help=words, **how)
        parser.goes_with[name] = modes or list(MODES)

    def flag(name: str, words: str, modes: Sequence[str] = ()) -> None:
        add(name, words, modes, action="store_true")

    group = parser.add_argument_group("Input")
    add(
        "--csv",
        "the contacts: one CSV, or all parts of one export",
        [mode for mode in MODES if mode != "export"],
        **path,
        **several,
    )
    add(
        "--choices",
        "a CSV that says which reference a group keeps",
        planning,
        **path,
    )
    add(
        "--email",
        "merge only this address; repeatable",
        (*planning, "undo"),
        metavar="ADDRESS",
        action="append",
    )
    add(
        "--limit",
        "merge at most N pairs in this run",
        (*planning, "undo"),
        metavar="N",
        type=int,
    )
    add(
        "--plan",
        "merge only if the plan's ID is still this one",
        ("merge", "preview"),
        metavar="ID",
    )

    group = parser.add_argument_group("Read-only modes")
    flag("--preview", "print what a run, or --undo, would do")
    flag("--live", "with --preview: compare the plan with DevRev", ["preview"])
    flag("--check", "test whether a run can start")
    flag("--status", "print what is done, and what is not")
    add(
        "--verify-backups",
        "test whether the backups are intact",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=BACKUPS,
    )

    group = parser.add_argument_group("Other modes")
    add("--undo", "undo the merges that a report or backup names", **path)
    add(
        "--settle",
        "close unfinished pairs whose problem will stay",
        metavar="ADDRESS",
        **several,
    )
    add("--export", "read all contacts from DevRev, write the CSV", **path)
    add(
        "--domain",
        "with --export: only this domain; repeatable",
        ["export"],
        metavar="DOMAIN",
        action="append",
    )
    add(
        "--choices-template",
        "write a CSV for --choices. Delete lines until one is left for each address",
        **path,
    )

    group = parser.add_argument_group("Merge rules")
    add(
        "--primary",
        "the contact that remains: DevRev's own or your application's (default: revu)",
        (*planning, "choices_template"),
        metavar="revu|user",
        choices=("revu", "user"),
        default="revu",
    )
    add(
        "--count-policy",
        "exact: as many tickets as TICKET_COUNT; at-least: or more (default: exact)",
        planning,
        metavar="POLICY",
        choices=("exact", "at-least"),
        default="exact",
    )
    flag("--across-workspaces", "also merge contacts of different workspaces", planning)
    flag("--try-unverified", "also request merges of unverified contacts", planning)
    flag("--carry-fields", "copy to the primary what only the duplicate has", planning)
    flag("--no-timelines", "leave comments out of the backup (fewer requests)")
    add(
        "--merge-timeout",
        "how long to wait for a merge (default: 120)",
        metavar="SECONDS",
        type=float,
        default=120.0,
    )
    add(
        "--workers",
        "requests at a time (default: 8)",
        metavar="N",
        type=int,
        default=8,
    )

    group = parser.add_argument_group("Confirmation and output")
    flag("--yes", "do not ask; required where stdin is no terminal")
    flag(
        "--json",
        "print the result as JSON, all else on stderr",
        (*planning, "status", "verify_backups", "settle", "undo"),
    )
    group.add_argument("-v", "--verbose", action="store_true", help="show each request")
    group.add_argument("-q", "--quiet", action="store_true", help="show only errors and results")
    version = f"merge_contacts {__version__}"
    add(
        "--version",
        "print the version",
        action="version",
        version=version,
    )
    group.add_argument("-h", "--help", action="help", help="print this help")
    return parser


def option_name(name: str) -> str:
    """Return an option as it is typed, from its name in the parsed options."""
    return f"--{name.replace('_', '-')}"


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and refuse options that don't go together (exit 2).

    Besides the options the result has `mode`, a key of MODES, and `words`, as they were typed.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    parser.as_json = "--json" in words
    options = parser.parse_args(words)
    typed = collections.Counter(word.partition("=")[0] for word in words)
    for name, value in vars(options).items():
        # "The last one wins" would hide a mistake.
        if typed[option_name(name)] > 1 and not isinstance(value, (bool, list)):
            parser.error(f"{option_name(name)} is given twice; it takes one value")
    for name in ("limit", "workers", "merge_timeout"):
        number = getattr(options, name)
        if number is not None and not 0 < number <= 1e9:
            parser.error(f"{option_name(name)} takes a number above 0, not {number}")
    options.words = words
    options.mode = find_mode(parser, typed)
    if options.mode in ("merge", "preview", "choices_template") and not options.csv:
        parser.error("--csv PATH is needed (--export PATH makes one; --help lists the options)")
    return options


def find_mode(parser: OptionParser, typed: Collection[str]) -> str:
    """Return the one mode that the options ask for; refuse an option that does nothing in it."""
    modes = [mode for mode in MODES if option_name(mode) in typed]
    if "undo" in modes and "preview" in modes:
        modes.remove("preview")
    if len(modes) > 1:
        parser.error(f"{' and '.join(map(option_name, modes))} don't go together: give one of them")
    mode = modes[0] if modes else "merge"

    def named(fit: str) -> str:
        return "a merge" if fit == "merge" else option_name(fit)

    for option, fits in parser.goes_with.items():
        if option in typed and mode not in fits:
            parser.error(
                f"{option} goes with {', '.join(map(named, fits))}, not with {named(mode)}"
            )
    return mode


# -- settings --------------------------------------------------------------------------------------


def import_package(name: str) -> Any:
    """Import a run-time package. Raises FatalError(2) where that fails."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken package may raise anything
        why = f"{type(error).__name__}: {error}; python -m pip install -r requirements.txt"
        raise FatalError(EXIT_USAGE, f"the package {name} can't be imported: {why}") from None


def read_env_file(path: Path) -> str:
    """Read `.env` once: a regular file, or a pipe to which a password manager writes.

    Raises FatalError(2).
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            log.info("%s is a pipe; waiting for the program that writes to it", path)
        elif not stat.S_ISREG(mode):
            raise ValueError("neither a file nor a pipe")
        elif os.name != "nt" and mode & 0o044:
            log.warning("other users may read %s: chmod 600 %s", path, shlex.quote(str(path)))
        return str(path.read_bytes(), "utf-8-sig")
    except (OSError, ValueError) as error:
        raise FatalError(EXIT_USAGE, f"{path} can't be read as UTF-8: {error}") from None


class RawSettings(NamedTuple):
    """Settings as they are written down, by the names of their variables."""

    values: Mapping[str, str]
    files: Mapping[str, str] = {}  # the `.env` that each is from; none: the environment

    def get(self, name: str, default: str = "") -> str:
        return self.values.get(name, "").strip() or default

    def number(self, name: str, default: float, least: float = 0) -> float:
        """Raises FatalError(2) where a number is needed and there is another text."""
        text = self.get(name, str(default))
        with contextlib.suppress(ValueError):
            if least <= float(text) <= 1e9:
                return float(text)
        raise FatalError(EXIT_USAGE, f"{name} is not a number of at least {least:g}: {text}")


def load_environment() -> RawSettings:
    """The environment, else `.env` in the current folder, else `.env` beside the script."""
    found = {name: value for name, value in os.environ.items() if value}
    files: dict[str, str] = {}
    for path in dict.fromkeys((Path.cwd() / ".env", Path(__file__).resolve().parent / ".env")):
        if not os.path.lexists(str(path)) or path.is_dir():
            continue
        check_owner(path, path.parent)
        text = io.StringIO(read_env_file(path))
        values = import_package("dotenv").dotenv_values(stream=text, interpolate=False)
        for name, value in values.items():
            if value and name not in found:
                found[name] = value
                files[name] = str(path)
    return RawSettings(found, files)


def load_settings(raw: RawSettings, workers: int) -> ApiSettings:
    """Check the settings. Raises FatalError(2) that names the variable, never the token."""
    calls = None
    if raw.get("DEVREV_RATE_LIMIT_CALLS"):
        calls = math.ceil(raw.number("DEVREV_RATE_LIMIT_CALLS", 0))
    url = raw.get("DEVREV_BASE_URL", ApiSettings.base_url).rstrip("/")
    return ApiSettings(
        token=raw.get("DEVREV_API_TOKEN"),
        token_file=raw.files.get("DEVREV_API_TOKEN", ""),
        base_url=check_base_url(url),
        url_file=raw.files.get("DEVREV_BASE_URL", ""),
        calls=calls,
        period=raw.number("DEVREV_RATE_LIMIT_PERIOD", ApiSettings.period, 0.001),
        timeout=raw.number("DEVREV_TIMEOUT", ApiSettings.timeout, 0.01),
        retries=int(raw.number("DEVREV_MAX_RETRIES", ApiSettings.retries)),
        workers=workers,
        user_ref_prefix=check_user_prefix(raw.get("DEVREV_USER_REF_PREFIX")),
    )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: `localhost`, or an IP address that is."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_base_url(url: str) -> str:
    """Return `url`. Raises FatalError(2) where the token must not be sent to it."""
    is_good = False
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        _ = parts.port
        host = parts.hostname or ""
        is_private = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))
        has_more = parts.username is not None or parts.query or parts.fragment
        is_good = bool(host) and is_private and not has_more
    if not is_good:
        words = "DEVREV_BASE_URL is not an https address of a host and a path"
        raise FatalError(EXIT_USAGE, f"{words}; set it to {ApiSettings.base_url}")
    return url


def check_destination(settings: ApiSettings, console: Console) -> None:
    """Name the host that the token goes to, before the first request, where it is not DevRev's.

    Raises FatalError(2) where a `.env` names another host, and the token is not from that file.
    """
    if settings.base_url == ApiSettings.base_url:
        return
    if settings.token and settings.url_file not in ("", settings.token_file):
        token_at = settings.token_file or "the environment"
        words = f"DEVREV_BASE_URL is from {settings.url_file}, and DEVREV_API_TOKEN from {token_at}"
        fix = "put both into one of these places, so that no file sends the token of another away"
        raise FatalError(EXIT_USAGE, f"{words}; {fix}")
    if not is_loopback(urlsplit(settings.base_url).hostname or ""):
        log.info("requests go to %s", settings.base_url)
        console.print_err(f"requests go to {settings.base_url}")


def check_token(token: str) -> None:
    """Refuse a token that can't be one. Raises FatalError(2)."""
    problem = ""
    if not token:
        problem = "is not set; put it into .env (see .env.example) or the environment"
    elif not re.fullmatch(r"[\x21-\x7e]+", token):
        problem = "contains a space, a line break or a character that is not ASCII; copy it again"
    if problem:
        raise FatalError(EXIT_USAGE, f"DEVREV_API_TOKEN {problem}")


# -- one call --------------------------------------------------------------------------------------


class RunContext:
    """One call of the tool: options, settings, console, log and signals.

    It is named by the second in which it started.
    """

    TICK = 0.2  # seconds between updates of the status line

    def __init__(self, options: argparse.Namespace, environment: Environment | None = None) -> None:
        self.options = options
        # Whether it may write more than a log.
        changes_something = options.mode in ("merge", "undo", "settle", "export")
        self.may_write = changes_something and not options.preview
        # With --json a run prints its report on stdout, and everything else on stderr.
        self.reports_json = options.json and self.may_write
        text: TextIO | None = None
        if self.reports_json:
            text = sys.stderr
        elif options.json:
            text = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.console = Console(options.quiet, text)
        self.environment = environment or Environment(ApiSettings(token=""))
        self.started = self.environment.now()
        self.run_id = free_run_id(self.started.wall)
        self.log_path = LOGS / f"contact_merge_{self.run_id}.log"
        self.settings = self.environment.settings
        self.signal = 0  # the first signal that came
        self.organisation = ""  # the token's
        self.record = RunRecord()
        self.progress = Progress(self)
        self.error = ""  # what has ended it without a report

    @property
    def report_path(self) -> Path:
        return report_path(self.run_id, "undo" if self.options.undo else "merge")

    @functools.cached_property
    def api(self) -> DevRevAPI:
        """The client of this call. Raises FatalError(2) where the token can't be one."""
        check_token(self.settings.token)
        return DevRevAPI(self.settings, self.environment, CancelToken())

    def show(self, facts: Json, lists: Mapping[str, Iterable[Json]]) -> None:
        """Print what a mode has found, where a program reads it; people have read it by now."""
        if self.options.json:
            self.console.json(report_chunks(facts, lists))

    def on_signal(
        self, act: Callable[[], Any], loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """Let the first Ctrl-C, SIGTERM or SIGHUP call `act`, in the `loop` if there is one.

        The second ends the process at once, with the same exit code. A closed terminal may send
        SIGHUP twice, from the kernel and from the shell: a repeated one is still the first.
        """

        def handle(number: int, _frame: Any) -> None:
            if self.signal == number == getattr(signal, "SIGHUP", None):
                return
            if self.signal:
                words = "ended at once; run the same command again to resume"
                self.console.print_err(words, "bold")
                self.console.end(lambda: 0.2)
                os._exit(128 + self.signal)
            self.signal = number
            if not loop:
                act()
                return
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(act)
            words = "stopping: waiting up to 10 s for requests under way (again: stop at once) ..."
            self.console.print_err(words)

        for number in SIGNALS:
            # A program started by nohup is to outlive the terminal.
            if not (number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, handle)

    def open_log(self) -> None:
        """Log to a file and to stderr.

        Raises OSError where a run that may change something can't log.
        """
        log.setLevel(logging.DEBUG)
        log.propagate = False
        shown = logging.WARNING
        if self.options.verbose:
            shown = logging.DEBUG
        if self.options.quiet:
            shown = logging.CRITICAL
        handler = LogHandler(self.console, shown)
        log.addHandler(handler)
        if self.options.status:  # which may be called every few seconds
            return
        try:
            handler.file = self._create_log()
        except OSError as error:
            if self.may_write:
                raise
            self.console.print_err(f"warning: the log can't be written: {error}")
        log.info("merge_contacts %s, Python %s", __version__, sys.version)

    def _create_log(self) -> TextIO:
        self.environment.make_private_dir(LOGS)
        while True:
            with contextlib.suppress(FileExistsError):  # of a call that began in the same second
                return io.TextIOWrapper(create_anew(self.log_path), encoding="utf-8")
            self.run_id = free_run_id(self.started.wall)
            self.log_path = LOGS / f"contact_merge_{self.run_id}.log"

    async def identify(self, origin: str, contacts: Iterable[Contact]) -> str:
        """Find out whose token it is, and say so.

        Raises FatalError, also for `contacts` of another organisation.
        """
        with before_any_change(self.api):
            owner = await self.api.get_one("dev-users.self", {}, "dev_user", ANY_OPTIONS)
        self.organisation = self.record.organisation = organisation_of(str(owner.get("id")))
        self.record.token_owner = {
            name: owner.get(name) for name in ("id", "display_name", "email")
        }
        check_organisation(self.organisation, origin, contacts)
        who = owner.get("display_name") or owner.get("id")
        return f"{who} <{owner.get('email')}>, organisation {self.organisation or 'unknown'}"

    def merge_options(self) -> MergeOptions:
        names = (*MERGE_RULES, "merge_timeout", "preview")
        rules = {name: getattr(self.options, name) for name in names}
        timelines = not self.options.no_timelines
        return MergeOptions(
            organisation=self.organisation,
            timelines=timelines,
            **rules,
        )

    def retyped(self, *more: str, without: Collection[str] = ()) -> str:
        """The command of this call as it was typed, but for the options `without` and those that
        only look at it or confirm it, and `more`."""
        kept: list[str] = []
        dropping = False
        for word in self.options.words:
            if word.startswith("-"):
                name = word.partition("=")[0]
                dropping = name in NOT_RETYPED or name in without
            if not dropping:
                kept.append(word)
        return command_line(*kept, *more)


NOT_RETYPED = (
    "--preview", "--live", "--check", "--plan", "--json", "--yes", "--choices-template",
)  # fmt: skip


def command_line(*words: str) -> str:
    """A command that starts this script from the current folder, quoted for the shell."""
    return " ".join(map(shlex.quote, ["python", sys.argv[0], *words]))


def history_folder_error(path: Path) -> str | None:
    """Say why `path` can't be undone from the current folder, None where it can.

    Only the savepoint of its own folder knows its merges.
    """
    parents = path.resolve().parents
    if BACKUPS.resolve() in parents or REPORTS.resolve() in parents:
        return None
    for parent in parents:
        if parent.name in ("backups", "reports"):
            why = f"{path} belongs to another folder's history"
            return f"{why}; run --undo in {parent.parent}, where its savepoint is"
    where = "below backups/ or reports/ of the current folder"
    return f"{path} is not {where}; name one report or backup in them"


# -- the plan --------------------------------------------------------------------------------------


def make_plan(run: RunContext, savepoint: SavePoint) -> Plan:
    """Read, detect, and leave out what is not wanted or has ended already."""
    options = run.options
    named = {email_key(email) for email in options.email or ()}
    gc.disable()  # it would walk, again and again, through what is being built and holds no cycle
    try:
        choices = read_choices(options.choices) if options.choices else {}
        contents = ContactReader(options.csv).read([*choices, *named])
        plan = detect(contents, choices, options.primary)
    finally:
        gc.enable()
    rules = {name: getattr(options, name) for name in (*MERGE_RULES, "primary")}
    plan.id = plan_id(plan.groups, timelines=not options.no_timelines, **rules)
    if options.plan is not None and options.plan.strip().lower() != plan.id:
        why = "the CSV, the choices or an option of the merge differs from what it was"
        words = f"the plan is {plan.id}, not {options.plan}: {why}; read the preview again"
        raise FatalError(EXIT_USAGE, words)
    apply_savepoint(plan, savepoint, named)
    for group in plan.groups:
        for pair in group.pairs:
            plan.wanted[pair.ids] = pair
    plan.ids = set(plan.wanted)
    lines = plan.passed_over
    if options.email:
        keep_emails(plan, named)
    if options.limit:
        lines += keep_limit(plan, options.limit)
    for line in lines:
        run.console.print_err(line)
    plan.chosen = [group for group in plan.groups if group.chosen and not group.has_ended()]
    plan.warnings = plan.find_warnings()
    return plan


CHOICES_HEADER = (
    "EMAIL",
    "EXTERNAL_REF",
    "DISPLAY_NAME",
    "TICKET_COUNT",
    "CREATED_AT",
    "REV_USER_ID",
    "CONTACTS",
)


def write_choices_template(run: RunContext) -> int:
    """Write a file for --choices; return the exit code.

    It has a line for each contact that may be kept of the skipped groups. The columns behind the
    first two are there to decide by, and are ignored when it is read.
    """
    path = run.options.choices_template
    with open_savepoint(run, readonly=True) as savepoint:
        plan = make_plan(run, savepoint)
    rows: list[Sequence[str]] = []
    for group in plan.skipped:
        for one in group.choice_lines().values():
            facts = (one.name, str(one.tickets), one.created, one.id, str(len(group.contacts)))
            rows.append((group.email, one.external_ref, *facts))
    write_new_file(run.environment, path, csv_chunks(CHOICES_HEADER, rows))
    run.console.print(f"{plural(len(rows), 'line')} written to {path}", "good")
    command = run.retyped("--choices", str(path), "--preview")
    run.console.suggest(f"keep one line per address in {path}, then", command)
    return EXIT_OK


def preview(run: RunContext) -> int:
    """Print the plan, and with --live what DevRev says of each group; return the exit code."""
    with open_savepoint(run, readonly=True) as known:
        plan = make_plan(run, known)
        earlier = [*known.unfinished(), *plan.revived]
    facts = plan_summary(plan, earlier)
    facts["estimated_requests"] = expected_requests(plan, run.options)
    live: list[Json] | None = None
    if run.options.live:
        live = run.environment.run_event_loop(preview_live(run, plan))
        facts.update(live_summary(live))
    if run.options.json:
        run.console.json(plan_chunks(plan, facts, earlier, live))
        return EXIT_OK
    if live is not None:
        show_live(run, plan, live)
    show_plan(
        plan,
        facts,
        run.console,
        earlier,
    )
    ready = facts["pairs_to_merge"] if live is None else facts["live_ready"]
    if ready and live is None:
        run.console.suggest("compare the plan with DevRev", run.retyped("--preview", "--live"))
    elif ready:
        one = run.retyped("--limit", "1", without=["--limit"])
        run.console.suggest("merge one pair first", one)
    return EXIT_OK


LIVE_DONE = ("already_merged", "already_gone")  # what the live preview finds done


async def preview_live(run: RunContext, plan: Plan) -> list[Json]:
    """Compare each planned group with DevRev by read requests.

    Return `{email, code, reason}` of each, by email, code None where it is ready. Raises
    FatalError(2) for the token or the organisation, FatalError(3) where DevRev can't be reached.
    """
    api = run.api
    groups = [group for group in plan.groups if group.pending()]
    found: list[Json] = []

    def progress(_now: float) -> str:
        return f"{len(found):,} of {plural(len(groups), 'group')} compared with DevRev"

    async def compare(group: Group) -> None:
        problem: PairError | None = None
        try:
            await foresee_group(api, plan, group, run.merge_options())
        except PairError as error:
            problem = error
        except ODD_ANSWER as error:
            problem = odd_answer(group.email, error)
        code = problem.code if problem else None
        found.append({"email": group.email, "code": code, "reason": str(problem or "ready")})

    async with ticking(run, progress):
        await run.identify("CSV", plan.contacts)
        with before_any_change(api):
            for start in range(0, len(groups), ContactMerger.BATCH):
                await together(*map(compare, groups[start : start + ContactMerger.BATCH]))
    return sorted(found, key=itemgetter("email"))


def live_summary(live: Sequence[Json]) -> Json:
    """Count what the live preview has found."""
    counts = collections.Counter(one["code"] or "ready" for one in live)
    ready = counts.pop("ready", 0)
    done = sum(counts.pop(code, 0) for code in LIVE_DONE)
    return {"live_ready": ready, "live_done": done, "live_refused": dict(sorted(counts.items()))}


def show_live(
    run: RunContext,
    plan: Plan,
    live: Sequence[Json],
) -> None:
    lines = unverified_lines(plan.pairs(), plan.unverified, run.options.try_unverified)
    totals: collections.Counter[str] = collections.Counter()
    for one in live:
        code = one["code"] or "ready"
        totals[code] += 1
        why = f": {one['reason']}" if one["code"] else ""
        lines.append(f"{code}  {one['email']}{why}")
    total = ", ".join(f"{count:,} {code}" for code, count in totals.most_common())
    title = f"COMPARED WITH DEVREV: {plural(len(live), 'group')}"
    print_list(run.console, title, [*lines, f"in all: {total or 'none'}"])


# -- the real run ----------------------------------------------------------------------------------


async def merge(run: RunContext) -> int:
    """Plan, find out whose token it is, ask, merge, report; return the exit code."""
    api = run.api
    with open_savepoint(run) as savepoint:
        plan = make_plan(run, savepoint)
        record = start_record(run, "merge")
        record.plan_id = plan.id
        record.pairs = plan.count()
        record.organisation = savepoint.organisation
        record.csv = []
        for path in run.options.csv:
            record.csv.append({"path": str(path), "sha256": sha256_of(path)})
        # Where the folder is of another organisation than the CSV, the token tells which is right.
        has_others = savepoint.organisation and savepoint.other_organisations()
        has_more = has_others or any(savepoint.pairs(*UNFINISHED, State.CANCELLED))
        if not plan.count() and not has_more:
            return finish_run(run, savepoint, EXIT_OK, plan)
        whose = await run.identify("CSV", plan.contacts)
        savepoint.organisation = run.organisation
        if not run.options.yes:
            await find_unverified(api, plan)
        merger = ContactMerger(
            api,
            savepoint,
            run.merge_options(),
            run.progress.on_pair,
            plan,
        )
        others = savepoint.other_organisations()
        if others:
            words = f"{plural(others, 'pair')} of another organisation stay in {SAVEPOINT}"
            run.console.print_err(f"{words} as they are")
        unfinished = [*savepoint.unfinished(), *plan.revived]
        record.pairs += sum(1 for pair in unfinished if pair.ids not in plan.ids)
        facts = merge_facts(run, plan, unfinished, whose)
        warning = "DevRev can't undo a merge; --undo restores most of it from the backups."
        code = await confirm_and_run(
            run,
            merger,
            "merge",
            facts,
            warning,
            lambda: merger.run(merger.work(unfinished)),
        )
        return finish_run(
            run,
            savepoint,
            code,
            plan,
            merger,
        )


def sha256_of(path: Path) -> str:
    """Hash a file of whatever size. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


async def settle(run: RunContext) -> int:
    """End the pairs of the named addresses whose problem stays; nothing is requested of DevRev.

    Returns the exit code. Raises FatalError(2) where an address is unknown, or where settling a
    merge that DevRev has acknowledged is not confirmed.
    """
    with open_savepoint(run) as savepoint:
        pairs = pairs_to_settle(savepoint, run.options.settle)
        record = start_record(run, "settle")
        organisations = {organisation_of(pair.primary.id) for pair in pairs}
        if len(organisations) == 1:  # else the report is of all of them
            record.organisation = savepoint.organisation = organisations.pop()
        problems = {pair.ids: settle_error(pair) for pair in pairs}
        accepted = []
        for pair in pairs:
            if pair.state is State.ACKNOWLEDGED and not problems[pair.ids]:
                accepted.append(describe_pair(pair))
        if accepted:
            merges = plural(len(accepted), "merge")
            facts = [("to cancel", f"{merges} that DevRev has accepted")]
            facts += [("", line) for line in accepted]
            words = "DevRev may still carry them out: only this tool stops waiting for them."
            await confirm(
                run,
                "settle",
                facts,
                words,
            )
        savepoint.save_run(record)
        code = EXIT_OK
        ending = []
        for pair in pairs:
            what = f"{pair.email}: {into(pair)}"
            if problems[pair.ids]:
                code = EXIT_FAILED
                run.console.print(f"NOT SETTLED  {what}: {problems[pair.ids]}", "bad")
                continue
            if pair.state not in TERMINAL:
                settle_pair(pair)
                ending.append(pair)
            words = f"{pair.state.value}  {what}: {STATE_WORDS[pair.state]} ({pair.accepted})"
            run.console.print(words)
        savepoint.save_now(ending)
        return finish_run(run, savepoint, code)


def pairs_to_settle(savepoint: SavePoint, emails: Iterable[str]) -> list[Pair]:
    """Return the pairs of the named addresses. Raises FatalError(2) where one has none."""
    wanted = {email_key(email) for email in emails}
    pairs = [pair for pair in savepoint.pairs() if pair.email in wanted]
    unknown = wanted.difference(pair.email for pair in pairs)
    if unknown:
        words = f"--settle: {', '.join(sorted(unknown))}: no pair in {SAVEPOINT}"
        raise FatalError(EXIT_USAGE, f"{words}; --status lists the unfinished pairs")
    # A pair that was never requested is no failure beside one that was.
    requested = {pair.email for pair in pairs if pair.state is not State.FAILED}
    return [pair for pair in pairs if pair.state is not State.FAILED or pair.email not in requested]


@contextlib.contextmanager
def open_savepoint(run: RunContext, readonly: bool = False) -> Iterator[SavePoint]:
    """Open the savepoint. A run that may change something also writes what killed runs could not.

    Raises FatalError(2) where the savepoint is older than the reports, FatalError(3) where
    `reports/` can't be written.
    """
    with contextlib.closing(SavePoint(run.environment, run.run_id, readonly)) as savepoint:
        if not readonly:
            run.run_id = savepoint.run
            begin_history(run, savepoint)
        yield savepoint


def begin_history(run: RunContext, savepoint: SavePoint) -> None:
    # What no file knows at all can be undone from its report.
    if savepoint.runs() or not run.options.undo:
        check_not_restored(savepoint)
    try:
        trial = run.environment.make_private_dir(REPORTS) / f".trial.{os.getpid()}"
        trial.unlink(missing_ok=True)
        create_anew(trial).close()
        trial.unlink()
        for path in report_killed_runs(run.environment, savepoint):
            run.console.print_err(f"an earlier run was killed before its report; it is {path}")
    except OSError as error:
        why = f"{REPORTS} can't be written ({error.strerror or error}), so nothing was changed"
        raise FatalError(EXIT_STOPPED, f"{why}; make it writable") from None


Facts = List[Tuple[str, str]]  # what a user confirms, each with its name


async def confirm_and_run(
    run: RunContext,
    runner: TaskRunner,
    word: str,
    facts: Facts,
    warning: str,
    work: Callable[[], Awaitable[int]],
) -> int:
    """Have the `facts` confirmed, and do the work until it ends or a signal comes.

    Returns the exit code. Once it is confirmed the run may change something: its record is stored,
    and it has a report.
    """
    savepoint = runner.savepoint
    async with ticking(run, functools.partial(run.progress.line, runner)):
        if not run.options.preview:
            savepoint.write({}, organisation=run.organisation)
            await confirm(
                run,
                word,
                facts,
                warning,
            )
            savepoint.save_run(run.record)
        cancel = functools.partial(runner.api.cancel_token.cancel, Cancelled())
        run.on_signal(cancel, asyncio.get_event_loop())
        code = await work()
    return run.signal + 128 if run.signal else code


async def confirm(
    run: RunContext,
    word: str,
    facts: Facts,
    warning: str,
) -> None:
    """Print the `facts` and the `warning`, and have them confirmed by a typed `word`.

    Raises FatalError(2) where it is not confirmed, and where no terminal can ask and --yes is
    missing.
    """
    console = run.console
    if run.options.yes:
        return
    console.status("")
    if not (sys.stdin and sys.stdin.isatty()):
        words = "there is no terminal to confirm it on, and nothing was changed"
        raise FatalError(EXIT_USAGE, f"{words}. Add --yes to {word} without being asked")
    to = console.out if console.out.isatty() else console.err  # what the user sees
    for name, fact in facts:
        console.print(f"{name:<12}  {fact}", to=to)
    console.print(warning, "bold", to)
    console.stream(f"Type {word} to continue, anything else to cancel: ", to)
    # A thread reads, past Python's own buffers, so that a terminal never delays a signal.
    answer = await run.environment.run_in_thread(os.read, sys.stdin.fileno(), 1024)
    if answer.strip() != word.encode():
        words = f"not confirmed; nothing was changed. Run again and type {word}"
        raise FatalError(EXIT_USAGE, words)


def merge_facts(
    run: RunContext,
    plan: Plan,
    unfinished: Sequence[Pair],
    whose: str,
) -> Facts:
    """What the user confirms with a typed `merge`; `whose` token it is."""
    odd = unverified_lines(plan.pairs(), plan.unverified, run.options.try_unverified)
    facts = [("UNVERIFIED", line) for line in odd]
    facts += [("token of", whose), ("host", run.settings.base_url)]
    facts += [("CSV", str(path)) for path in run.options.csv]
    new = [describe_pair(pair) for pair in plan.new_pairs()]
    words = plan_headline(plan_summary(plan, unfinished))
    facts.append(("plan", f"{plan.id}: {words}"))
    if unfinished:
        earlier = "; ".join(some([describe_pair(pair) for pair in unfinished], 3))
        finish = f"finish {plural(len(unfinished), 'pair')} of earlier runs: {earlier}"
        facts.append(("first", finish))
    facts += [("", line) for line in some(new, 3)]
    for group in plan.chosen:
        for one in group.lost_refs():
            facts.append(("loses", f"{one.external_ref} ({describe_contact(one)})"))
    # At most twenty, but each that may be of a shared mailbox.
    warnings = sorted(plan.warnings, key=lambda one: bool(one["code"] != "shared_mailbox"))
    shared = sum(1 for one in warnings if one["code"] == "shared_mailbox")
    told = [f"{one['email']}: {one['warning']}" for one in warnings]
    facts += [("WARNING", line) for line in some(told, max(20, shared))]
    requests = plural(expected_requests(plan, run.options), "request")
    facts.append(("takes", f"about {requests}"))
    return facts


@contextlib.asynccontextmanager
async def ticking(run: RunContext, line_at: Callable[[float], str]) -> AsyncIterator[None]:
    """Show how far a run is, by `line_at(monotonic seconds)`, for as long as the block lasts.

    It also lets signals in, however quiet the network is. Where there is no terminal that can
    rewrite a line, the line is printed now and then.
    """
    console = run.console

    async def tick() -> None:
        printed = run.environment.now().monotonic
        while True:
            await asyncio.sleep(run.TICK)
            now = run.environment.now().monotonic
            line = line_at(now)
            console.status(line)
            if line and now - printed >= Progress.EVERY:
                printed = now
                log.info("%s", line)
                if not console.quiet and not console.rewrites:
                    console.print_err(line)

    task = asyncio.ensure_future(tick())
    try:
        yield
    finally:
        task.cancel()
        console.status("")


class Progress:
    """Says what a run is doing: a line a pair, and a status line."""

    EVERY = 30.0  # seconds between lines where there is no terminal
    SLOW = 20.0  # seconds after which a merge is slow, and no forecast holds
    PACE = 60.0  # the last seconds, by which the rest is forecast
    LEAST = 10.0  # seconds that say something of the pace

    def __init__(self, run: RunContext) -> None:
        self.run = run
        # (monotonic seconds, pairs that have ended by then), of the last PACE seconds.
        self._ended: collections.deque[tuple[float, int]] = collections.deque()

    def on_pair(self, pair: Pair) -> None:
        if self.run.options.preview:
            return
        console = self.run.console
        what = f"{pair.email}: {into(pair)}"
        why = f"{what}: {pair.code}: {pair.error}"
        facts = progress_of(pair)
        style = ""
        if not pair.code and pair.state is State.UNDONE and pair.undo:
            line = f"undone  {what}, created again as {pair.undo.display_id}"
        elif not pair.code:
            moved = f", now {pair.new_ref}" if pair.new_ref else ""
            line = f"merged  {what}{moved}"
        elif pair.state is State.SKIPPED and pair.code in SKIP_REASONS:
            line = f"skipped  {why}"
        else:
            style = "bad"
            is_open = facts or pair.state is State.UNDOING
            line = f"{'UNFINISHED' if is_open else 'FAILED'}  {why}"
        if facts:
            line += f" ({facts['so_far']}; still to do: {facts['to_do']})"
        log.info("%s", line)
        if not console.quiet:
            console.print(line, style)

    def line(self, runner: TaskRunner, now: float) -> str:
        """How many pairs are merged, what the run waits for, and when it will end.

        A narrow terminal cuts the end of the line: what was merged comes first.
        """
        total = runner.total
        if not total:
            return ""
        pairs = list(runner.pairs())
        outcomes = runner.outcomes
        merged = sum(1 for pair in pairs if pair.state in (*MERGED_STATES, State.UNDONE))
        word = "undone" if isinstance(runner, UndoRunner) else "merged"
        parts = [f"{merged:,} of {plural(total, 'pair')} {word}"]
        failed = sum(1 for pair in outcomes.values() if not runner.is_success(pair))
        if failed:
            parts.append(f"{failed:,} failed")
        open_pairs = [pair for pair in pairs if pair.ids not in outcomes]
        slow = self._slow_merge(open_pairs, is_first=not merged)
        if self.run.signal:
            parts.append("stopping, waiting for requests under way")
        elif runner.api.scheduler.waiting_for:
            parts.append(describe_wait(runner.api.scheduler))
        forecast = self._forecast(now, len(outcomes), total)
        parts.append(slow or forecast)
        return " \u00b7 ".join(filter(None, parts))

    def _slow_merge(self, pairs: Iterable[Pair], is_first: bool) -> str:
        """Name what takes DevRev long, and the first merge of a run, for which all others wait."""
        requested = [pair for pair in pairs if pair.state in UNFINISHED]
        if not requested:
            return ""
        oldest = min(requested, key=attrgetter("requested_at"))
        since = max(oldest.requested_at, self.run.started.wall)
        spent = self.run.environment.now().wall - since
        if not is_first and spent < self.SLOW:
            return ""
        what = "the first merge" if is_first else "the merge"
        return f"waiting {duration(spent)} for {what} ({oldest.email})"

    def _forecast(
        self,
        now: float,
        ended: int,
        total: int,
    ) -> str:
        """Say how long the rest takes at the last minute's pace; "" where that says nothing."""
        self._ended.append((now, ended))
        while self._ended[0][0] < now - self.PACE:
            self._ended.popleft()
        since, before = self._ended[0]
        if now - since < self.LEAST or ended <= before or ended >= total:
            return ""
        return f"{duration((total - ended) * (now - since) / (ended - before))} left"


def finish_run(
    run: RunContext,
    savepoint: SavePoint,
    code: int,
    plan: Plan | None = None,
    merger: ContactMerger | None = None,
) -> int:
    """Complete the record of a merge run or a settle, and conclude it; return the exit code."""
    if plan and merger:
        note_refused(plan, merger)
    run.record.summary = merge_summary(savepoint, run.run_id, plan)
    run.record.headline = headline(run.record.summary, run.record)
    contents = merge_contents(savepoint, run.run_id, plan)
    return conclude(
        run,
        savepoint,
        merger,
        code,
        contents,
    )


def conclude(
    run: RunContext,
    savepoint: SavePoint,
    runner: TaskRunner | None,
    code: int,
    contents: ReportContents,
) -> int:
    """Write the report of a run, print what it says, and suggest what comes next.

    Returns the exit code: 3 where the report can't be written, unless `code` is worse.
    """
    console = run.console
    record = run.record
    stop = end_record(run, runner, code)
    try:
        write_report(run.environment, savepoint, record, contents)
    except (OSError, FatalError) as error:
        console.error(f"the report can't be written: {error}")
        code = max(code, EXIT_STOPPED)
    if stop:
        console.error(stop)
    console.print()
    console.print(record.headline, "bold" if code else "good")
    failures: list[Pair] = []
    if runner:
        failures = [pair for pair in runner.outcomes.values() if not runner.is_success(pair)]
        print_failures(console, failures)
    for name, suffix in (("report", ".json"), ("page", ".html"), ("table", ".csv")):
        path = run.report_path.with_suffix(suffix)
        if path.exists():
            console.print(f"{name:<8} {path}")
    log.info("exit code %d", code)
    if code >= EXIT_STOPPED:
        console.suggest("run the same command again to resume")
    elif failures:
        console.suggest("do what is said above, then run again (after an export: with the new CSV)")
    elif record.summary and record.summary["left"]:
        rest = run.retyped(without=("--limit", "--email"))
        console.suggest("check the contacts in DevRev, then do the same with the rest", rest)
    return code


def note_refused(plan: Plan, merger: ContactMerger) -> None:
    """Note in the plan which of its pairs were refused or left out before they were requested."""
    for pair in merger.outcomes.values():
        if pair.state is State.SKIPPED:
            outcome = plan.left_out if pair.code in SKIP_REASONS else plan.refused
            outcome.append(pair)
            if pair.code == "different_rev_org":
                plan.ids.discard(pair.ids)


# Options that say nothing of what a run did.
NOT_REPORTED = frozenset((
    "csv", "preview", "live", "check", "status", "verify_backups", "json", "plan",
    "choices_template", "export", "domain", "yes", "verbose", "quiet", "words", "mode",
))  # fmt: skip


def start_record(run: RunContext, kind: str) -> RunRecord:
    """Begin the record of a run; `kind` names its report."""
    options: Json = {}
    for name, value in vars(run.options).items():
        if name not in NOT_REPORTED:
            options[name] = str(value) if isinstance(value, Path) else value
    options["rate_limit"] = [run.settings.calls, run.settings.period]
    run.record = RunRecord(
        id=run.run_id,
        kind=kind,
        base_url=run.settings.base_url,
        options=options,
        start=iso(run.started.wall),
        log=str(run.log_path),
    )
    return run.record


def end_record(run: RunContext, runner: TaskRunner | None, code: int) -> str:
    """Complete the record of a run but for its summary.

    Return what has stopped it, "" where nothing or a signal has.
    """
    record = run.record
    record.end = iso(run.environment.now().wall)
    record.exit_code = code
    record.requests = {}
    stop = ""
    if runner:
        scheduler = runner.api.scheduler
        record.requests = dict(sorted(runner.api.requests.items()))
        record.quota = scheduler.quota_seen()
        record.quota_wait_seconds = round(scheduler.quota_wait_seconds(), 3)
        record.warnings = runner.api.warnings
        if code >= EXIT_USAGE:
            stop = str(runner.stop or "")
    record.requests_total = sum(record.requests.values())
    record.stopped = "interrupted" if run.signal else stop or None
    return "" if run.signal else stop


def print_failures(console: Console, pairs: Sequence[Pair]) -> None:
    by_code: dict[str, list[str]] = collections.defaultdict(list)
    for pair in pairs:
        by_code[pair.code or "after_cancel"].append(pair.email)
    for code, emails in sorted(by_code.items()):
        console.print(f"  {len(emails)} {code}: {', '.join(some(sorted(emails)))}")
        console.print(f"    what to do: {ADVICE.get(code, 'see the report')}")


# -- export ----------------------------------------------------------------------------------------


async def export(run: RunContext) -> int:
    """Write the CSV from DevRev itself; return the exit code.

    What is wrong with the path is found out first.
    """
    path = run.options.export
    api = run.api
    check_free(path)
    try:
        spool = tempfile.TemporaryFile(dir=str(path.parent))  # noqa: SIM115
    except OSError as error:
        raise FatalError(EXIT_USAGE, f"{path} can't be written: {error.strerror}") from None
    endings = [f"@{email_key(domain).lstrip('@')}" for domain in run.options.domain or ()]
    exporter = ContactExporter(api, endings, spool)
    work = asyncio.ensure_future(exporter.run())
    run.on_signal(work.cancel, asyncio.get_event_loop())
    try:
        with spool, before_any_change(api):
            async with ticking(run, lambda _now: exporter.progress()):
                contacts = await work
            cells = (map(str, astuple(one)) for one in contacts)
            write_new_file(run.environment, path, csv_chunks(COLUMNS.values(), cells))
    except asyncio.CancelledError:
        run.console.print_err("interrupted; nothing was written")
        return 128 + run.signal
    emails = plural(len({one.key for one in contacts}), "email address")
    rows = plural(len(contacts), "contact")
    run.console.print(f"exported {rows} that share {emails} to {path}", "good")
    command = command_line("--csv", str(path), "--preview", "--live")
    run.console.suggest("see what would be merged", command)
    return EXIT_OK


# -- undo ------------------------------------------------------------------------------------------

UPDATES = (
    "tickets, issues and conversations are updated; "
    "automations and webhooks of your organisation may react to each."
)
NOT_RESTORED = "Ids, dates, creators and authors of comments can't be restored."


async def undo(run: RunContext) -> int:
    """Undo merges, or with --preview print what would be restored; return the exit code."""
    api = run.api
    options = run.options
    elsewhere = history_folder_error(options.undo)  # before this folder gets a history
    if elsewhere:
        raise FatalError(EXIT_USAGE, elsewhere)
    with open_savepoint(run, readonly=options.preview) as savepoint:
        emails = {email_key(email) for email in options.email or ()}
        plan = plan_undo(options.undo, savepoint, emails, options.limit)
        pairs = plan.pairs()
        record = start_record(run, "undo")
        record.undo = str(plan.path)
        record.pairs = len(pairs)
        contacts = chain.from_iterable((pair.primary, pair.duplicate) for pair in pairs)
        whose = await run.identify("backup", contacts)
        savepoint.organisation = run.organisation
        runner = UndoRunner(api, savepoint, run.merge_options(), run.progress.on_pair)
        code = EXIT_OK
        if pairs:
            facts = [("token of", whose), ("host", run.settings.base_url), *undo_facts(plan)]
            work = functools.partial(runner.undo, plan)
            code = await confirm_and_run(
                run,
                runner,
                "undo",
                facts,
                NOT_RESTORED,
                work,
            )
        return finish_undo(run, plan, runner, code)


def undo_facts(plan: UndoPlan) -> Facts:
    """What the user confirms with a typed `undo`."""
    pairs = plan.pairs()
    objects: set[str] = set()
    for pair in pairs:
        with contextlib.suppress(PairError), reading_backup(pair.backup) as backup:
            objects.update(item["id"] for item in backup.to_transfer(pair.duplicate.id))
    facts = [("to undo", plural(len(pairs), "merge")), ("of", str(plan.path))]
    facts += [("", created_again(pair)) for pair in pairs]
    if objects:
        facts.append(("updates", f"Up to {len(objects):,} {UPDATES}"))
    facts += [("left alone", f"the older backup {path}") for path in plan.older]
    return facts


def created_again(pair: Pair) -> str:
    """Say which contact an undo creates, from its backup."""
    known: Json = {}
    with contextlib.suppress(PairError):
        known = creation_fields(backed_up_contact(pair.backup, pair.duplicate.id))
    name = known.get("display_name") or "no name"
    who = f"{name} <{known.get('email')}>, reference {known.get('external_ref')}"
    words = f"{pair.duplicate.short_id}, merged into {pair.primary.short_id}, is created again"
    pinned = "" if pair.manifest_sha256 else " (version 3.0.0 has not pinned its backup)"
    return f"{words}: {who}{pinned}"


def undo_headline(counts: Json) -> str:
    """Say in one line what an undo has done, or would do."""
    words = {name: name.replace("_", " ") for name in counts}
    return ", ".join(in_words(counts, **words)) or "nothing to undo"


def finish_undo(
    run: RunContext,
    plan: UndoPlan,
    runner: UndoRunner,
    code: int,
) -> int:
    """Write the report of an undo, or with --preview print it, and say what comes next."""
    console = run.console
    record = run.record
    lists = undo_lists(plan, runner, run.options.preview)
    counts = {name: len(found) for name, found in lists.items()}
    before = len(plan.undone)
    left = plan.left
    for pair in plan.pairs():
        if pair.ids not in runner.outcomes and pair.state not in UNDO_STATES:
            left += 1
    total = sum(counts.values()) + left
    record.summary = {**counts, "pairs": total, "undone_before": before, "left": left}
    now = {**counts, "undone_before": before, "remaining": left}
    if "undone" in counts:
        now["undone"] -= before
    record.headline = undo_headline(now)
    if run.options.preview:
        stop = end_record(run, runner, code)
        if stop:
            console.error(stop)
        show_undo(run, lists)
        return code
    for pair in plan.skipped:
        console.print(f"skipped  {pair.email}: {into(pair)}: {pair.code}: {pair.error}")
    for pair in lists["unfinished"]:
        if stranded(pair):
            console.error(f"{pair.email}: {stranded(pair)}")
    contents = undo_contents(lists)
    return conclude(
        run,
        runner.savepoint,
        runner,
        code,
        contents,
    )


def undo_lists(plan: UndoPlan, runner: UndoRunner, preview: bool) -> dict[str, list[Pair]]:
    """Return the pairs of an undo's report, by list."""
    pairs = plan.pairs()
    outcomes = runner.outcomes
    if preview:
        ended = [pair for pair in pairs if pair.ids in outcomes]
        return {
            "to_undo": [pair for pair in ended if not pair.code],
            "refused": [pair for pair in ended if pair.code],
            "skipped": plan.skipped,
        }
    begun = [pair for pair in pairs if pair.state in UNDO_STATES or pair.ids in outcomes]
    # Those that a killed run has undone may be in no report.
    return {**by_undo_outcome([*plan.undone, *begun]), "skipped": plan.skipped}


def show_undo(run: RunContext, lists: Mapping[str, Sequence[Pair]]) -> None:
    """Print what an undo would restore."""
    say = run.console.print
    entries = {name: [undo_entry(pair) for pair in pairs] for name, pairs in lists.items()}
    for pair, entry in zip(lists["to_undo"], entries["to_undo"]):
        mine = {item["id"] for item in entry["restored"]}
        say(f"undo     {created_again(pair)}")
        say(f"           tickets, issues and conversations that go back to it: {len(mine):,}")
        for item in entry["left"]:
            say(f"           {item['display_id']} {item['title']} stays: {item['why']}")
    for name in ("refused", "skipped"):
        for pair in lists[name]:
            say(f"{name:<8} {pair.email}: {into(pair)}: {pair.code}: {pair.error}", "bad")
    if lists["to_undo"]:
        say(f"These {UPDATES}")
        say(NOT_RESTORED)
        run.console.suggest("undo it", run.retyped())
    say(run.record.headline, "bold")
    run.show(report_head(run.record), entries)


# -- check, status, verify -------------------------------------------------------------------------


async def check(run: RunContext) -> int:
    """Print whether a real run could start; return the exit code."""
    console = run.console
    checks: list[Json] = []
    for name, part in CHECKS.items():
        if (name == "csv" and not run.options.csv) or (name == "access" and not run.organisation):
            continue
        console.status(f"checking {name} ...")
        is_good = True
        try:
            words = await part(run)
        except (FatalError, PairError, OSError) as error:
            is_good = False
            words = str(error)
        log.info("check of %s: %s", name, words)
        checks.append(
            {
                "check": name,
                "ok": is_good,
                "says": words,
            }
        )
        if is_good:
            console.print(f"ok      {name}: {words}")
        else:
            console.print(f"FAILED  {name}: {words}", "bad")
    console.status("")
    notes: list[str] = []
    if run.organisation:
        quota = describe_wait(run.api.scheduler) or "DevRev has not announced one yet"
        only_a_merge = "only a merge shows whether the token may merge (rev_user:all)"
        notes = [f"quota: {quota}", f"{only_a_merge}: try one pair first"]
    for note in notes:
        console.print(f"note    {note}")
    problems = sum(1 for one in checks if not one["ok"])
    verdict = f"not ready: {plural(problems, 'problem')}" if problems else "ready"
    console.print(verdict, "bad" if problems else "good")
    run.show(
        {
            "verdict": verdict,
            "ready": not problems,
            "checks": checks,
            "notes": notes,
        },
        {},
    )
    return EXIT_USAGE if problems else EXIT_OK


async def check_owner_of_token(run: RunContext) -> str:
    whose = await run.identify("CSV", ())
    return f"belongs to {whose} (from {run.settings.token_file or 'the environment'})"


async def check_csv(run: RunContext) -> str:
    with open_savepoint(run, readonly=True) as known:
        plan = make_plan(run, known)
        earlier = [*known.unfinished(), *plan.revived]
    if run.organisation:
        check_organisation(run.organisation, "CSV", plan.contacts)
    return plan_headline(plan_summary(plan, earlier))


async def check_access(run: RunContext) -> str:
    """Send one cheap request of each kind that a backup sends."""

    async def first(endpoint: str, key: str, **body: Any) -> list[Json]:
        page = await run.api.each_page(endpoint, key, dict(body, limit=1)).__anext__()
        return page.items

    with before_any_change(run.api):
        objects = await first("conversations.list", "conversations")
        for user in await first("rev-users.list", "rev_users"):
            # Of the kinds that a run lists.
            works = await run.api.objects["reported_by"].load(user["id"])
            objects = [*works.items, *objects]
        for one in objects[:1]:
            await first("timeline-entries.list", "timeline_entries", object=one["id"])
    words = "contacts, tickets, conversations and comments can be read"
    return "; ".join([words, *run.api.warnings])


async def check_savepoint(run: RunContext) -> str:
    if not locks_work(SAVEPOINT):
        raise FatalError(EXIT_USAGE, f"{SAVEPOINT.resolve().parent}: {NO_LOCKS}")
    with open_savepoint(run, readonly=True) as savepoint:
        if savepoint.is_held():
            raise FatalError(EXIT_HELD, savepoint.main.held_by())
        check_not_restored(savepoint)
        return f"{SAVEPOINT} is free, {plural(len(savepoint.unfinished()), 'unfinished pair')}"


async def check_disk(_run: RunContext) -> str:
    for path in (Path.cwd(), SAVEPOINT, SAVEPOINT_COPY, LOGS, BACKUPS, REPORTS):
        if os.path.lexists(str(path)):
            check_owner(path)
        if path.exists() and not os.access(str(path), os.W_OK):
            raise OSError(f"{path} can't be written; make it writable")
        if path in (LOGS, BACKUPS, REPORTS) and path.exists() and not path.is_dir():
            raise OSError(f"{path} is no folder, and one is needed; move it away")
    return "what a run writes can be written"


CHECKS: Mapping[str, Callable[[RunContext], Awaitable[str]]] = {
    "token": check_owner_of_token,
    "csv": check_csv,
    "access": check_access,
    "savepoint": check_savepoint,
    "disk": check_disk,
}


def status(run: RunContext) -> int:
    """Print what the savepoint knows, also while a run is in progress."""
    with open_savepoint(run, readonly=True) as savepoint:
        runs = savepoint.runs()
        last = runs[max(runs)] if runs else RunRecord()
        ended = sum(1 for _ in savepoint.pairs(State.FAILED, *TERMINAL, run=last.id))
        facts: Json = {
            "savepoint": str(SAVEPOINT),
            "running": savepoint.is_held(),
            "last_opened": savepoint.holder or None,
            "organisation": last.organisation or savepoint.meta.get("organisation"),
            "counts": {State(name).value: count for name, count in savepoint.counts().items()},
            "last_run": {**report_head(last)["run"], "pairs_ended": ended} if runs else None,
        }
        lists = {
            "unfinished": list(savepoint.pairs(*UNFINISHED, State.UNDOING)),
            "failed": list(savepoint.pairs(State.FAILED)),
            "cancelled": list(savepoint.pairs(State.CANCELLED)),
        }
        to_set = list(references_to_set(savepoint))
    describe_history(run.console, facts, last)
    entries: dict[str, list[Json]] = {}
    for name, pairs in lists.items():
        entries[name] = [merge_entry(pair, None) for pair in pairs]
        for line in some([describe_open(pair) for pair in pairs], 20):
            run.console.print(f"{name}  {line}")
    for one in to_set:
        run.console.print(f"to set  {one['email']}: {one['advice']}", "bold")
    run.show(facts, {**entries, "references_to_set": to_set})
    return EXIT_OK


def describe_open(pair: Pair) -> str:
    why = f"{pair.code}: {pair.error}" if pair.code else STATE_WORDS[pair.state]
    return f"{pair.email}: {into(pair)}, last {minute(pair.updated)}: {why}"


def describe_history(console: Console, facts: Json, last: RunRecord) -> None:
    """Say whether a run is in progress, what the last one came to, and how many pairs there are."""
    holder = facts["last_opened"]
    if not holder:
        console.print(f"{SAVEPOINT}: no run has used this folder yet")
        return
    console.print(f"{SAVEPOINT}: organisation {facts['organisation'] or 'not known yet'}")
    of = f"{last.kind} of {plural(last.pairs or 0, 'pair')}"
    if facts["running"]:
        who = f"process {holder['pid']} on {holder['host']}, since {minute(holder['since'])}"
        console.print(f"a run is in progress: {who}")
    if facts["running"] and last.id:
        console.print(f"{of}: {facts['last_run']['pairs_ended']:,} ended")
    elif last.id:
        how = last.headline if last.end else f"{of} was killed; the next run writes its report"
        console.print(f"last {last.kind}: {how}")
    for name, count in facts["counts"].items():
        console.print(f"{count:>7,} {STATE_WORDS[State(name)]}")
    console.print(f"{sum(facts['counts'].values()):>7,} in all")


def verify_backups(run: RunContext) -> int:
    """Read every backup below a folder again, and compare it with its manifest.

    Returns the exit code: 1 where one is damaged or missing.
    """
    root = run.options.verify_backups
    fix = "name the folder that holds the backups"
    if not root.is_dir():
        raise FatalError(EXIT_USAGE, f"{root} is not a folder; {fix}")
    complete = 0
    found: dict[str, list[str]] = {"damaged": [], "missing": [], "partial": []}
    for folder in backup_folders(root):
        run.console.status(f"{complete:,} backups read ...")
        if folder.name.startswith(INCOMPLETE_BACKUP):  # of a run that was killed; may be deleted
            found["partial"].append(str(folder))
            continue
        try:
            verify_backup(str(folder))
            complete += 1
        except PairError as error:
            found["damaged"].append(str(error))
    run.console.status("")
    if root == BACKUPS:
        with open_savepoint(run, readonly=True) as savepoint:
            backups = {pair.backup for pair in savepoint.pairs(*State) if pair.backup}
        found["missing"] = sorted(backup for backup in backups if not Path(backup).is_dir())
    elif not complete and not any(found.values()):
        raise FatalError(EXIT_USAGE, f"{root} holds no backup; {fix}")
    for kind, names in found.items():
        for name in names:
            run.console.print(f"{kind}  {name}", "" if kind == "partial" else "bad")
    counts = f"{len(found['damaged']):,} damaged, {len(found['missing']):,} missing"
    run.console.print(f"{plural(complete, 'complete backup')}, {counts}", "bold")
    run.show(
        {
            "folder": str(root),
            "complete": complete,
            **found,
        },
        {},
    )
    return EXIT_FAILED if found["damaged"] or found["missing"] else EXIT_OK


def backup_folders(root: Path) -> Iterator[Path]:
    """Yield the folders below `root` that are, or should be, a backup. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    for name, folders, files in os.walk(str(root), onerror=fail):
        folder = Path(name)
        is_partial = folder.name.startswith(INCOMPLETE_BACKUP)
        if is_partial or re.fullmatch(r"\d{8}_\d{6}", folder.name) or "manifest.json" in files:
            folders.clear()
            yield folder
        folders.sort()


# -- main ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, and return the exit code."""
    run = RunContext(parse_options(argv))
    os.umask(0o077)
    run.console.begin()
    run.on_signal(functools.partial(signal.default_int_handler, signal.SIGINT, None))
    code = run_command(run)
    if run.reports_json:
        print_report(run, code)
    before = run.signal
    run.on_signal(lambda: None)
    unwritten = run.console.end(lambda: 2.0 if run.signal else math.inf)
    if unwritten and code < EXIT_USAGE:
        run.console.error(f"the output can't be written: {unwritten}")
        run.console.end(lambda: 2.0)
        code = EXIT_STOPPED
    return 128 + run.signal if run.signal and not before else code


def print_report(run: RunContext, code: int) -> None:
    """Print the report of a run as JSON, or why it has ended without one."""
    try:
        with open(run.report_path, "rb") as file:
            run.console.json(file)
    except OSError:
        error = run.console.mask(run.error) or None
        run.console.json(report_chunks({"exit_code": code, "error": error}, {}))


def run_command(run: RunContext) -> int:
    """Run the command; whatever ends it early becomes one line and an exit code."""
    options = run.options
    try:
        run.open_log()
        run.settings = run.environment.settings = load_settings(load_environment(), options.workers)
        Contact.user_prefix = run.settings.user_ref_prefix
        run.console.mask = run.settings.mask
        if options.live or options.mode in ("merge", "undo", "export", "check"):
            check_destination(run.settings, run.console)
            import_package("requests")
            import_package("ratelimit")
        outcome = MODES[options.mode](run)
        return outcome if isinstance(outcome, int) else run.environment.run_event_loop(outcome)
    except FatalError as stop:
        code = stop.exit_code
        run.error = str(stop)
    except OSError as error:
        code = EXIT_STOPPED
        run.error = f"disk error: {error}"
    except KeyboardInterrupt:
        code = 128 + (run.signal or signal.SIGINT)
        run.error = "interrupted; nothing was changed"
    run.console.status("")
    run.console.error(run.error)
    return code


MODES: dict[str, Callable[[RunContext], int | Coroutine[Any, Any, int]]] = {
    "export": export,
    "undo": undo,
    "preview": preview,
    "choices_template": write_choices_template,
    "check": check,
    "status": status,
    "verify_backups": verify_backups,
    "settle": settle,
    "merge": merge,
}


# --------------------------------------------------------------------------------------------------
# Page: a report for people, in one file without anything from outside
# --------------------------------------------------------------------------------------------------

REPORT_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
  form-action 'none'; style-src 'unsafe-inline'; script-src 'sha256-__HASH__';
  require-trusted-types-for 'script'; trusted-types 'none'">
<meta name="robots" content="noindex">
<meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Contact __KIND__ report</title>
<style>
:root {
  --back: #fff; --ink: #1c1e21; --soft: #5b626b; --line: #dde1e6; --tint: #f4f6f8;
  --good: #18794e; --bad: #b42318; --rest: #c3c9d1; --link: #0b5cad; --note: #fff6e0;
  --mono: ui-monospace, Menlo, Consolas, monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --back: #15171a; --ink: #e8eaed; --soft: #a2a9b3; --line: #33383f; --tint: #20242a;
    --good: #5cc596; --bad: #ff8f82; --rest: #4b525c; --link: #7db7f2; --note: #33290f;
  }
}
* { box-sizing: border-box }
html { background: var(--back); color: var(--ink); scroll-padding-top: 6.5em }
body { margin: 0; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; overflow-wrap: anywhere }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.75rem 4rem }
h1, h2, h3, p, ul, dl, dd { margin: 0; padding: 0; list-style: none; font-size: inherit }
h1 { font-weight: 600; color: var(--soft) }
h2 { font-size: 1.4rem; margin: 3rem 0 .25rem }
h3 { font-size: 1.05rem; margin-top: 1.75rem }
h2 small, h3 small { font-weight: 400; font-size: 1rem; margin-left: .5em; display: inline }
a { color: var(--link); text-decoration: none }
small, .soft, dt, th { color: var(--soft) }
.lead { font-size: 1.9rem; line-height: 1.25; font-weight: 600; margin: .3rem 0 .5rem }
.mono { font-family: var(--mono); font-size: .9em }
.banner { background: var(--note); border-radius: 6px; padding: .75rem 1rem; margin-top: 1rem }
.bar { display: flex; gap: 2px; height: 10px; margin: 1.5rem 0 }
.bar i { background: var(--rest); min-width: 4px }
.bar .good { background: var(--good) } .bar .bad { background: var(--bad) }
.counts { display: flex; flex-wrap: wrap; gap: .5rem 2.25rem }
.counts div { display: flex; flex-direction: column-reverse }
.counts dd { font-size: 1.75rem; font-weight: 600; line-height: 1.3 }
.counts .good dd { color: var(--good) } .counts .bad dd { color: var(--bad) }
.tools { position: sticky; top: 0; z-index: 1; background: var(--back); margin-top: 1.5rem;
  padding: .75rem 0; border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: .4rem 1.25rem; align-items: center }
.tools input { flex: 0 1 22rem; min-width: 0 }
input, button { font: inherit; color: inherit; background: none }
input, .more button { border: 1px solid var(--rest); border-radius: 6px; padding: .35rem .75rem }
button { border: 0; padding: 0; cursor: pointer; text-align: inherit }
table { width: 100%; border-collapse: collapse; margin-top: .75rem }
th, td { padding: .5rem 1rem .5rem 0; vertical-align: top; text-align: left }
th { font-weight: 600; border-bottom: 1px solid var(--soft) }
td { border-bottom: 1px solid var(--line) }
th:not(.toggle, .number) { min-width: 8rem }
th.email { min-width: 12rem }
.email { font-weight: 600 }
th button { font-weight: inherit; white-space: nowrap }
th button::after { content: " \2195"; opacity: .5 }
[aria-sort=ascending] button::after { content: " \2191"; opacity: 1 }
[aria-sort=descending] button::after { content: " \2193"; opacity: 1 }
td small { display: block }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.toggle { width: 1.4rem }
.toggle button::before { content: "\25b8" }
.toggle [aria-expanded=true]::before { content: "\25be" }
.hidden { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden }
.details > td { padding: .25rem 0 1rem 1.4rem; background: var(--tint) }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 3rem; padding: .5rem 1rem }
.columns > * { flex: 1 1 22rem }
.facts { display: grid; grid-template-columns: fit-content(12rem) 1fr; gap: .1rem 1rem }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .3rem }
.chips li { background: var(--tint); border-radius: 4px; padding: 0 .5rem }
.more { display: flex; gap: 1rem; align-items: center; margin-top: .75rem }
.sign { display: none }
[hidden] { display: none !important }
@media screen and (max-width: 48rem) {
  main { padding: 1.25rem 1rem 3rem }
  .lead { font-size: 1.45rem }
  .counts { gap: .5rem 1.5rem }
  table, thead, tbody, tr, td { display: block }
  thead tr { display: flex; flex-wrap: wrap; gap: 0 1rem }
  thead th:not(.toggle, .number) { min-width: 0; padding: 0; border: 0 }
  tr { border-bottom: 1px solid var(--line); padding: .6rem 0 }
  td, .details > td { border: 0; padding: .1rem 0 }
  td:not(.toggle)[data-label]::before { content: attr(data-label) ": "; color: var(--soft) }
  td:empty { display: none }
  td small { display: inline; margin-left: .5em }
  .toggle { float: right; font-size: 1.3rem }
  .tools { position: static }
}
@media print {
  html, body, td small { font-size: 11px }
  main { max-width: none; padding: 0 }
  .tools, .toggle, .more button, th button::after { display: none !important }
  h2, h3, thead { break-after: avoid }
  tr { break-inside: avoid }
  .bar i { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .sign { display: flex; gap: 2rem; margin-top: 4rem; break-inside: avoid }
  .sign p { flex: 1; border-top: 1px solid var(--ink); padding-top: .25rem }
}
</style>
</head>
<body>
<main>
<h1>Contact __KIND__ report</h1>
<p class="lead">__HEADLINE__</p>
<p id="unread">This page needs JavaScript. The JSON file beside it holds the same.</p>
</main>
<script type="application/json" id="report">__REPORT__</script>
<script>
(() => {
'use strict';
const SLICE = 200, PRINTED = 5000;  // rows of a table that are drawn at once
const doc = document, page = doc.querySelector('main');

// ---- Text. Nothing of the report reaches the page but as text; what can't be seen is spelt out.
const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]/gu;
const spell = c => '\\u{' + c.codePointAt(0).toString(16) + '}';
const has = x => x !== null && x !== undefined && x !== '' && x !== false;
const str = x => !has(x) ? '' : typeof x === 'object' ? JSON.stringify(x) : String(x);
const text = x => str(x).replace(UNSEEN, spell);
const obj = x => x && typeof x === 'object' ? x : {};
const arr = x => Array.isArray(x) ? x.map(obj) : [];
const num = x => typeof x === 'number' ? x.toLocaleString('en') : text(x);
const many = (n, one) => num(n) + ' ' + one + (n === 1 ? '' : 's');
const title = code => text(code).replace(/_/g, ' ').replace(/^./, c => c.toUpperCase());
const time = x => /^\d{4}-\d\d-\d\dT/.test(x) ? x.slice(0, 19).replace('T', ' ') + ' UTC' : text(x);
function h(tag, attributes, ...kids) {
  const el = doc.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'onclick') el.addEventListener('click', value);
    else el.setAttribute(name, value);
  }
  el.append(...kids.flat(3).filter(has).map(kid => kid instanceof Node ? kid : text(kid)));
  return el;
}
const v = x => has(x) ? h('bdi', {},  // a long word may be broken where its parts end
  text(x).split(/(?<=[@/])/).flatMap(one => [one, h('wbr', {})]).slice(0, -1)) : null;
const mono = x => has(x) ? h('bdi', { class: 'mono' }, x) : null;
const soft = (...kids) => h('small', {}, kids);

// ---- Tables: sorted by their heads, drawn in slices, searched, with details under a row.
const sections = [], tables = [];
const flat = x => x && typeof x === 'object' ? Object.values(x).map(flat).join('\n') : text(x);
const indexed = new WeakMap();
const words = item => indexed.get(item)
  || indexed.set(item, flat(item).toLowerCase()).get(item);
const { compare } = new Intl.Collator('en', { numeric: true, sensitivity: 'base' });
const order = (a, b) => typeof a === 'number' ? a - b : compare(str(a), str(b));
// A column is [label, item => what its cell shows, item => what it is sorted by, class].
function table(items, columns, details) {
  let list = items, shown = 0;
  const open = new Set(), body = h('tbody', {}), note = h('span', { class: 'soft' });
  const button = h('button', { onclick: () => add(SLICE) });
  const more = h('div', { class: 'more' }, button, note);
  const toggle = item => h('td', { class: 'toggle' }, h('button', {
    'aria-expanded': open.has(item),
    onclick: event => {
      const row = event.currentTarget.closest('tr');
      if (open.delete(item)) row.nextSibling.remove();
      else row.after(unfolded(item));
      event.currentTarget.setAttribute('aria-expanded', open.has(item));
    },
  }, h('span', { class: 'hidden' }, 'Details')));
  const unfolded = item => {
    open.add(item);
    return h('tr', { class: 'details' }, h('td', { colspan: columns.length + 1 }, details(item)));
  };
  const rows = item => [
    h('tr', {}, details ? toggle(item) : null, columns.map(([label, cell, , kind]) =>
      h('td', { 'data-label': label, class: kind || '' }, cell(item)))),
    ...open.has(item) ? [unfolded(item)] : []];
  const sort = (key, head) => {
    const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    for (const one of head.parentNode.children) one.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
    items.sort((a, b) => sign * order(key(a), key(b)));
    filter();
  };
  const heads = columns.map(([label, , key, kind]) => h('th', { scope: 'col', class: kind || '' },
    key ? h('button', { onclick: e => sort(key, e.currentTarget.parentNode) }, label) : label));
  function add(count) {
    body.append(...list.slice(shown, shown + count).flatMap(rows));
    shown = Math.min(list.length, shown + count);
    more.hidden = shown === list.length;
    button.textContent = 'Show ' + num(Math.min(list.length - shown, SLICE)) + ' more';
    note.textContent = num(shown) + ' of ' + num(list.length) + ' shown';
  }
  function draw(count) {
    body.textContent = '';
    shown = 0;
    add(count);
  }
  let query = [];
  function filter(wanted = query) {
    query = wanted;
    list = query.length ? items.filter(i => query.every(w => words(i).includes(w))) : items;
    draw(SLICE);
    self.hits = list.length;
    el.hidden = !list.length;
  }
  const head = h('tr', {}, details ? h('th', { class: 'toggle' }) : null, heads);
  const el = h('div', {}, h('table', {}, h('thead', {}, head), body), more);
  const self = { el, filter, draw, hits: 0 };
  tables.push(self);
  filter();
  return self;
}
function section(id, heading, count, ...kids) {
  const el = h('section', { id }, h('h2', {}, heading, h('small', {}, num(count))));
  el.append(...kids.map(one => one.el || one));
  const link = h('a', { href: '#' + id }, heading);
  sections.push({ el, link, tables: kids.filter(one => one.filter) });
}
function listed(id, heading, items, about, columns, details) {
  const note = h('p', { class: 'soft' }, about);
  if (items.length) section(id, heading, items.length, note, table(items, columns, details));
}
// A table for each code, under what is the same for all that have it.
function grouped(id, heading, items, columns, details) {
  const codes = new Map();
  for (const item of items) {
    if (codes.has(item.code)) codes.get(item.code).push(item);
    else codes.set(item.code, [item]);
  }
  const kids = [...codes].sort(([a], [b]) => order(a, b)).map(([code, list]) => {
    const one = table(list, columns, details);
    one.el.prepend(h('h3', {}, title(code), soft(num(list.length))),
      h('p', {}, [list[0].reason, list[0].advice].filter(has).join(' ')));
    return one;
  });
  if (items.length) section(id, heading, items.length, ...kids);
}
function facts(heading, rows) {
  const list = h('dl', { class: 'facts' });
  for (const [label, value] of rows) {
    if ([value].flat().some(has)) list.append(h('dt', {}, label), h('dd', {}, value));
  }
  return h('div', {}, h('b', {}, heading), list);
}
const sides = (...kids) => h('div', { class: 'columns' }, kids);

// ---- A pair, a group, an undone merge.
const name = c => c.display_name || c.display_id;
const contact = c => [v(name(c)), soft(mono(c.display_id))];
const tickets = m => [m.primary, m.duplicate].map(c => obj(c).tickets);
function reference(m) {
  const before = mono(obj(m.primary).old_external_ref);
  if (m.reference_set) return [before, ' \u2192 ', mono(m.new_external_ref)];
  const missing = m.reference_not_set || m.new_external_ref;
  return has(missing) ? [mono(missing), soft('not set')] : soft('unchanged');
}
const objects = list => arr(list).length ? h('ul', { class: 'chips' }, arr(list).map(one =>
  h('li', {}, mono(one.display_id || one.id), ' ', v(one.title), ' ',
    soft(str(one.role).replace(/_/g, ' '), ' ', v(one.why))))) : null;
const side = (heading, c) => facts(heading, [['Name', v(c.display_name)],
  ['Display id', mono(c.display_id)], ['Id', mono(c.id)], ['Created', time(c.created)],
  ['Reference before', mono(c.old_external_ref)], ['Tickets before', num(c.tickets)]]);
const both = (list, one, other) => arr(list).map(item =>
  h('div', {}, title(item[one]), ': ', v(item[other])));
const held = m => Object.entries(obj(m.backed_up)).map(([what, n]) => num(n) + ' '
  + what.replace(/_/g, ' ')).join(', ');
const pair = m => sides(side('Primary', obj(m.primary)), side('Duplicate', obj(m.duplicate)),
  facts('Merge', [['State', text(m.status)], ['Reference', reference(m)],
    ['Requested', time(m.requested)], ['Finished', time(m.finished)], ['Seconds', num(m.seconds)],
    ['Backup', mono(m.backup)], ['Backed up', held(m)],
    ['Objects found with the primary', num(m.proved)],
    ['Only the duplicate had', both(m.fields_lost, 'field', 'value')],
    ['Deleted since', v([m.deleted].flat().filter(has).join(', '))],
    ['Accepted with --settle', v(m.accepted)]]));
const email = ['Email', one => v(one.email), one => one.email, 'email'];
const people = [
  email,
  ['Primary', m => contact(obj(m.primary)), m => name(obj(m.primary))],
  ['Duplicate', m => contact(obj(m.duplicate)), m => name(obj(m.duplicate))],
];
const problem = [
  ...people,
  ['What happened', m => [v(m.error), soft(text(m.status),
    m.to_do ? '; still to do: ' + m.to_do : ''), objects(m.left_behind)], m => m.error],
];
const merged = [
  ...people,
  ['Reference', reference, m => m.new_external_ref],
  ['Tickets', m => tickets(m).map(num).join(' + '), m => tickets(m)[0] + tickets(m)[1], 'number'],
  ['Seconds', m => num(m.seconds), m => m.seconds, 'number'],
  ['Finished', m => time(m.finished).slice(11, 19), m => m.finished, 'number'],
];
const group = [email, ['Contacts', s => arr(s.contacts).map(c => h('div', {}, v(name(c)), ' ',
  mono(c.external_ref), ' ', soft(many(c.tickets, 'ticket')))), s => arr(s.contacts).length]];
const undone = [
  email,
  ['Created again as', m => mono(obj(m.contact).display_id), m => obj(m.contact).display_id],
  ['Was', m => mono(obj(m.duplicate).display_id), m => obj(m.duplicate).display_id],
  ['Reference', m => mono(obj(m.duplicate).old_external_ref)],
  ['Restored', m => num(arr(m.restored).length), m => arr(m.restored).length, 'number'],
  ['Stays as it is', m => num(arr(m.left).length), m => arr(m.left).length, 'number'],
];
const undo = m => sides(side('Primary', obj(m.primary)), side('Duplicate', obj(m.duplicate)),
  facts('Undo', [['New id', mono(obj(m.contact).id)], ['Backup', mono(m.backup)],
    ['Restored', objects(m.restored)], ['Stays as it is', objects(m.left)],
    ['The primary keeps', both(m.fields_left, 'field', 'why')],
    ["Can't be restored", both(m.not_restored, 'what', 'why')]]));

// ---- The page.
const report = obj(JSON.parse(doc.getElementById('report').textContent));
const run = obj(report.run), sum = obj(report.summary), isUndo = run.kind === 'undo';
const file = (/[\w.-]*_report_[\w.-]+(?=\.html$)/.exec(location.pathname) || [])[0];
const part = isUndo ? undo : pair;
doc.getElementById('unread').remove();
doc.title = [doc.title, time(run.start).slice(0, 10), text(run.headline)].join(' ');
const files = arr(run.csv).map(one => v(one.path));
page.append(h('p', { class: 'soft' }, [v(run.organisation), time(run.start), ...files]
  .filter(has).flatMap(one => [one, ' \u00b7 ']).slice(0, -1)));
const stopped = has(run.stopped) ? 'Stopped early: ' + text(run.stopped) : '';
page.append(...[stopped, run.warnings].flat().filter(has).map(words =>
  h('p', { class: 'banner' }, v(words))));
const counts = isUndo ? [['Undone', sum.undone, 'good'], ['Undone before', sum.undone_before],
  ['Unfinished', sum.unfinished, 'bad'], ['Failed', sum.failed, 'bad'], ['Skipped', sum.skipped],
  ['Remaining', sum.left, 'rest']] : [['Merged', sum.successful_merges - sum.settled, 'good'],
  ['Settled', sum.settled], ['Unfinished', sum.unfinished_merges, 'bad'],
  ['Failed', sum.failed_merges - sum.cancelled, 'bad'], ['Cancelled', sum.cancelled],
  ['Remaining', sum.left, 'rest'], ['Merged before', sum.already_merged],
  ['Groups skipped', sum.skipped_groups], ['Invalid rows', sum.invalid_rows],
  ['Contacts read', sum.contacts_read]];
const said = counts.filter(([, n], index) => n || !index);
const bar = said.filter(([, n, kind]) => n && kind);
page.append(
  h('div', { class: 'bar', 'aria-hidden': 'true' }, bar.map(([, n, kind]) =>
    h('i', { class: kind, style: 'flex: ' + n }))),
  h('dl', { class: 'counts' }, said.map(([label, n, kind]) =>
    h('div', { class: n && kind || '' }, h('dt', {}, label), h('dd', {}, num(n))))));

const open = arr(report.unfinished_merges || report.unfinished);
grouped('unfinished', 'Unfinished', open, problem, part);
grouped('failed', 'Failed', arr(report.failed_merges || report.failed), problem, part);
grouped('cancelled', 'Cancelled', arr(report.cancelled), problem, pair);
listed('references', 'References to set by hand', arr(report.references_to_set),
  'No contact has them. Until one has, the application may not recognise these people.',
  [email, ['Reference', one => mono(one.reference), one => one.reference],
    ['What to do', one => v(one.advice)]]);
const merges = arr(report.successful_merges);
grouped('merged-and-odd', 'Merged, and to be checked', merges.filter(m => m.code), problem, pair);
listed('merged', 'Merged', merges.filter(m => !m.code), 'Verified, each with a backup.',
  merged, pair);
listed('settled', 'Settled', arr(report.settled), 'Merged; a person accepted the rest.',
  problem, pair);
listed('partly-undone', 'Partly undone', arr(report.undo_settled), 'A person gave up the rest.',
  problem, pair);
listed('undone', 'Undone', arr(report.undone), 'Each contact has a new id.', undone, undo);
listed('warnings', 'Warnings', arr(report.warnings), 'Check these groups: nothing stops them.',
  [email, ['Warning', one => v(one.warning)]]);
listed('choices', 'Choices', arr(report.choices), 'What each choice keeps, and what is lost.',
  [email, ['Keeps', one => mono(one.kept)], ['Loses', one => arr(one.lost).map(c =>
    h('div', {}, mono(c.external_ref), soft(v(name(c)), ' ', many(c.tickets, 'ticket'))))]]);
grouped('skipped', 'Skipped', arr(report.skipped), isUndo ? problem : group);
listed('look-alikes', 'Look-alikes', arr(report.look_alikes), 'Similar addresses, not joined.',
  [['Addresses', one => [one.emails].flat().map(address => h('div', {}, v(address)))]]);
listed('invalid-rows', 'Invalid rows', arr(report.invalid_rows),
  'Left out, with the groups of their addresses.', [['File', one => v(one.file)],
    ['Line', one => num(one.line), one => one.line, 'number'],
    ['Reason', one => v(one.reason), one => one.reason], email]);
const owner = obj(run.token_owner);
const each = list => Object.entries(obj(list)).map(([key, value]) => [key,
  key === 'rate_limit' && !has(value[0]) ? '' : v(value)]);
const link = kind => file ? [h('a', { href: './' + file + '.' + kind }, kind.toUpperCase())] : [];
section('run', 'Run', '', sides(
  facts('Source', [['Organisation', mono(run.organisation)], ['DevRev at', mono(run.base_url)],
    ['Token of', [v(owner.display_name), ' ', v(owner.email)]], ['Undo of', mono(run.undo)],
    ['Plan', mono(run.plan_id)],
    ...arr(run.csv).flatMap(one => [['CSV', mono(one.path)], ['SHA-256', mono(one.sha256)]])]),
  facts('Course', [['Start', time(run.start)], ['End', time(run.end)],
    ['Exit code', num(run.exit_code)], ['Quota', v(run.quota)],
    ['Seconds waited for quota', num(run.quota_wait_seconds)], ['Version', v(run.version)],
    ['Log', mono(run.log)], ['The same as', [link('json'), ' ', link('csv')]]]),
  facts('Options', each(run.options)),
  facts('Requests', [['all', num(run.requests_total)], ...each(run.requests)])));
const found = h('span', { class: 'soft', role: 'status' });
const input = h('input', { type: 'search', 'aria-label': 'Search',
  placeholder: 'Search for an address, name, id, reference \u2026' });
input.addEventListener('input', () => {
  const query = input.value.toLowerCase().split(/\s+/).filter(has);
  tables.forEach(one => one.filter(query));
  for (const one of sections) {
    one.el.hidden = one.link.hidden = query.length && !one.tables.some(inner => inner.hits);
  }
  const hits = tables.reduce((sum, one) => sum + one.hits, 0);
  found.textContent = query.length ? num(hits) + ' found' : '';
});
page.append(h('div', { class: 'tools' }, input, found, sections.map(one => one.link)),
  ...sections.map(one => one.el),
  h('div', { class: 'sign' }, ['Checked by', 'Signature', 'Date'].map(one => h('p', {}, one))));
addEventListener('beforeprint', () => tables.forEach(one => one.draw(PRINTED)));
addEventListener('afterprint', () => tables.forEach(one => one.draw(SLICE)));
})();
</script>
</body>
</html>
"""


if __name__ == "__main__":
    exit_code = main()
    for ending in SIGNALS:
        # What is done is done: while Python ends, another signal would only change the exit code.
        signal.signal(ending, signal.SIG_IGN)
    raise SystemExit(exit_code)
