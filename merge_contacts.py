#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.28", "python-dotenv>=0.20", "ratelimit>=2.2.1"]
# ///
"""Merge duplicate DevRev contacts, safely.

contacts.csv -> pairs that share an email -> live check -> backup -> integrity check from the disk
-> merge -> external_ref -> proof that nothing was left behind -> JSON report

A merge in DevRev is asynchronous and can't be undone, so every step refuses rather than guesses, and
everything that was done is in the savepoint before the next thing is tried. `--help` has the options.
"""

import argparse
import collections
import contextlib
import csv
import gc
import hashlib
import heapq
import io
import json
import logging
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
import textwrap
import threading
import time
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from itertools import chain, compress, islice
from operator import attrgetter, itemgetter, or_
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Deque,
    Dict,
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
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import requests

__version__ = "1.0.0"

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_HELD = 0, 1, 2, 3, 11

Json = Dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("merge_contacts")


# ---------------------------------------------------------------------------------------------------
# What ends a run, what fails a pair
# ---------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The run can't go on. `exit_code` is one of the contract's exit codes."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Denied(Stop):
    """DevRev refuses the token itself (401) or a scope that the run can't do without (403)."""


class Interrupted(Stop):
    """The run was told to stop; a request that meets this has not left."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED, "interrupted")


class PairError(Exception):
    """One group or pair is refused or has failed; `code` is what scripts branch on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ApiRefused(PairError):
    """DevRev understood the request and said no (3xx, 4xx): it was not acted on."""

    def __init__(self, endpoint: str, status: int, message: str, location: str = "") -> None:
        super().__init__("forbidden" if status == 403 else "api_error", f"{endpoint} answered {status}: {message}")
        self.status = status
        self.location = location


class Stale(PairError):
    """A request did not leave because what it rests on was checked too long ago."""

    def __init__(self) -> None:
        super().__init__("stale", "the live check is too old")


class ApiUnanswered(PairError):
    """No usable answer came: whether the request was acted on can only be found out by looking."""

    def __init__(self, endpoint: str, message: str) -> None:
        super().__init__("api_error", f"{endpoint} gave no usable answer: {message}")


# ---------------------------------------------------------------------------------------------------
# Text and files
# ---------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
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


def now_iso() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


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


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power cut (Windows does so by itself)."""
    if os.name == "nt":
        return
    handle = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, chunks: Iterable[bytes]) -> Tuple[int, str]:
    """Create `path` (0600) from `chunks` and flush it to the disk; return its bytes and SHA-256."""
    size, digest = 0, hashlib.sha256()
    handle = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with open(handle, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def publish(aside: Path, final: Path) -> None:
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
    sync_folder(final.parent)


def private_folder(path: Path) -> Path:
    """Create `path` and what is missing above it, open to its owner alone."""
    for folder in [*reversed(path.parents), path]:
        if not folder.exists():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                sync_folder(folder.parent)
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path


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
_COUNT = re.compile(r"\s*(\d{1,9})(?:\.0+)?\s*")  # `4.0` is what a spreadsheet makes of 4


@dataclass
class Contact:
    """One row of the export: each field is one of its COLUMNS.

    `id` is the contact's DON (`don:identity:dvrv-us-1:devo/<ORG>:revu/<KEY>`), `tickets` the warehouse's TICKET_COUNT:
    the greatest of the tickets and issues that the contact owns, has created and has reported.
    """

    __slots__ = ("created", "display_name", "email", "external_ref", "full_name", "id", "tickets", "updated")

    id: str
    display_name: str
    email: str
    external_ref: str
    full_name: str
    tickets: int
    created: str
    updated: str

    @staticmethod
    def flaw_of(identity: str, email: str, external_ref: str, tickets: str) -> str:
        """Say why cells of a row make no contact, `""` if they do: who it is has to be there, and a count."""
        if not (identity.strip() and email.strip() and external_ref.strip()):
            names = {"id": identity, "email": email, "external_ref": external_ref}
            return "empty " + next(COLUMNS[name] for name, value in names.items() if not value.strip())
        return "" if _COUNT.fullmatch(tickets) else f"{COLUMNS['tickets']} is not a count: {tickets.strip()[:40]}"

    @classmethod
    def from_cells(cls, cells: Sequence[str]) -> "Contact":
        """Make a contact of cells without a flaw, in the order of COLUMNS."""
        identity, display_name, email, external_ref, full_name, tickets, created, updated = cells
        count = int(tickets.partition(".")[0])
        return cls(identity, display_name, email, external_ref, full_name, count, created, updated)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Contact":
        """Read `asdict` of a contact back, also one of version 1.0.0, which had other columns."""
        return cls(**{name: row.get(name, 0 if name == "tickets" else "") for name in COLUMNS})

    @property
    def is_user(self) -> bool:
        """Whether the application made the contact, and knows the person by its reference."""
        return self.external_ref.startswith("user_")

    @property
    def is_system(self) -> bool:
        """Whether DevRev made the contact, from an email."""
        return self.external_ref.startswith("REVU-")

    @property
    def key(self) -> str:
        """What contacts are grouped by: the email, trimmed and case-folded."""
        return self.email.strip().casefold()

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


_ORGANISATION = re.compile(r"don:[a-z_]+:(dvrv-[^:]+:devo/[^:]+):")


def organisation_of(don: str) -> str:
    """Return the `dvrv-…:devo/<ORG>` that every id of one DevRev organisation carries, or `""`."""
    match = _ORGANISATION.match(don)
    return match.group(1) if match else ""


class InvalidRow(NamedTuple):
    line: int
    reason: str
    email: Optional[str]


@dataclass
class Reading:
    """What a CSV holds that matters: only rows whose email or id recurs, or whose email was asked for, are kept."""

    contacts: List[Contact] = field(default_factory=list)  # each row once, conflicting ones included
    contacts_read: int = 0
    invalid_rows: List[InvalidRow] = field(default_factory=list)  # by line
    tainted: Set[str] = field(default_factory=set)  # emails of groups that are no longer known whole


_NUL_MARK = "\ufdd0"  # a noncharacter: the csv module of Python 3.8 to 3.10 can't read a NUL
_ADDRESS = re.compile(r"[^\s,;\"<>()]+@[^\s,;\"<>()]+")


def read_contacts(path: Path, emails: Iterable[str] = ()) -> Reading:
    """Read the export; of `emails` (keys) every row is kept, of others those that recur.

    Raises Stop(2) where the file can't be read, is no UTF-8 CSV, lacks a column or has no usable row.
    """
    with _csv_file(path) as raw:
        before = os.fstat(raw.fileno())
        try:
            return _ContactReader(raw).read(emails)
        finally:
            after = os.fstat(raw.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise Stop(EXIT_USAGE, "changed while it was being read; wait for the export to finish")


@contextlib.contextmanager
def _csv_file(path: Path) -> Iterator[BinaryIO]:
    """Open a CSV; whatever goes wrong inside becomes Stop(2) with one line that names the file."""
    csv.field_size_limit(1 << 20)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Stop(EXIT_USAGE, "not a regular file")
        with open(path, "rb", buffering=0) as raw:
            flaw = _foreign(raw.read(1 << 16))
            if flaw:
                raise Stop(EXIT_USAGE, flaw)
            yield raw
    except OSError as error:
        raise Stop(EXIT_USAGE, f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Stop(EXIT_USAGE, f"{path}: not UTF-8 ({error.reason}); export the CSV as UTF-8") from None
    except csv.Error as error:
        raise Stop(EXIT_USAGE, f"{path}: not a well-formed CSV: {error}") from None
    except Stop as stop:
        raise Stop(stop.exit_code, f"{path}: {stop}") from None


def _foreign(head: bytes) -> str:
    """Say what it is that begins like no CSV of ours, `""` where it may be one."""
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        return "an Excel workbook, not a CSV; save it as «CSV UTF-8 (comma delimited)»"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        return "UTF-16, or no text at all; export the CSV as UTF-8"
    (first, *_) = head.lstrip(b"\xef\xbb\xbf \r\n").splitlines() or [b""]
    if first.lower().startswith(b"sep="):
        return "the first line is `sep=`, a note for Excel alone; delete it"
    for separator, name in ((b";", "semicolons"), (b"\t", "tabs")):
        if separator in first and b"," not in first:
            return f"separated by {name}; export the CSV with commas"
    return ""


class _Table(NamedTuple):
    """A CSV that is read as far as its header."""

    places: List[int]  # of the wanted columns
    width: int
    lines: Iterator[str]
    rows: Any  # the csv.reader of the lines

    @classmethod
    def of(cls, raw: BinaryIO, wanted: Iterable[str], has_nul: bool = False) -> "_Table":
        os.lseek(raw.fileno(), 0, os.SEEK_SET)
        lines: Iterator[str] = open(raw.fileno(), encoding="utf-8-sig", newline="", closefd=False)  # noqa: SIM115
        if has_nul:
            lines = (line.replace("\0", _NUL_MARK) for line in lines)
        table = cls([], 0, lines, csv.reader(lines, strict=True))
        header = next((row for _, row in table.numbered() if row), None)
        if header is None:
            raise Stop(EXIT_USAGE, "the file is empty")
        return table._replace(places=locate_columns(header, wanted), width=len(header))

    def numbered(self) -> Iterator[Tuple[int, List[str]]]:
        """Yield each row that is left with the number of its last line, which an error of csv names too."""
        try:
            for row in self.rows:
                yield self.rows.line_num, row
        except csv.Error as error:
            raise csv.Error(f"line {self.rows.line_num}: {error}") from None


def locate_columns(header: Sequence[str], wanted: Iterable[str]) -> List[int]:
    """Return the places of the wanted columns in a header; raises Stop(2) naming what is missing or doubled."""
    names = [name.strip().upper() for name in header]
    if any("," in name for name in names if "\n" in name or "\r" in name):
        raise Stop(EXIT_USAGE, "the header holds other rows (a stray quote?)")
    missing = [name for name in wanted if name not in names]
    if missing:
        found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "none"
        raise Stop(EXIT_USAGE, f"missing column{'s' * (len(missing) > 1)} {', '.join(missing)} (found: {found})")
    doubled = [name for name in wanted if names.count(name) > 1]
    if doubled:
        raise Stop(EXIT_USAGE, f"the column {doubled[0]} is there twice")
    return [names.index(name) for name in wanted]


class _ContactReader:
    """Reads the file twice, to hold but few of very many rows: first to learn which emails and ids recur."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        os.lseek(raw.fileno(), 0, os.SEEK_SET)
        self.has_nul = any(b"\0" in block for block in iter(lambda: raw.read(1 << 20), b""))
        self.rows_are_lines = False
        self.reading = Reading()

    def read(self, emails: Iterable[str]) -> Reading:
        self._keep(self._survey(emails))
        invalid = self.reading.invalid_rows
        invalid.sort(key=attrgetter("line"))
        if not self.reading.contacts_read:
            some = "; ".join(f"line {row.line}: {row.reason}" for row in invalid[:3])
            more = f"; and {len(invalid) - 3:,} more" if len(invalid) > 3 else ""
            flaw = f"no usable row, {plural(len(invalid), 'invalid one')} ({some}{more})"
            raise Stop(EXIT_USAGE, flaw if invalid else "no row but the header")
        return self.reading

    def _table(self) -> _Table:
        return _Table.of(self.raw, COLUMNS.values(), self.has_nul)

    def _survey(self, emails: Iterable[str]) -> bytes:
        """Check every row, and say of each whether it is to be kept: its email or id recurs, or the email is wanted.

        A hash stands for a value, so a million rows cost tens of megabytes; two values of one hash do no harm.
        """
        table = self._table()
        places = dict(zip(COLUMNS, table.places))
        pick = itemgetter(*(places[name] for name in ("id", "email", "external_ref", "tickets")))
        keys, ids = array("q"), array("q")  # -1, which no hash is, for a row that is left out
        header_line = line = table.rows.line_num
        for last_line, row in table.numbered():
            line, lines = last_line, last_line - line
            odd = len(row) != table.width or lines > 1 or self.has_nul
            flaw = self._shape_flaw(row, table.width) if odd else ""
            flaw = flaw or Contact.flaw_of(*pick(row))
            if flaw:
                self._reject(line, row, places["email"], flaw)
                keys.append(-1)
                ids.append(-1)
            else:
                keys.append(hash(row[places["email"]].strip().casefold()))
                ids.append(hash(row[places["id"]]))
        self.rows_are_lines = line - header_line == len(keys)
        self.reading.contacts_read = len(keys) - keys.count(-1)
        wanted_keys = _repeated(keys).union(map(hash, chain(emails, self.reading.tainted)))
        wanted_ids = _repeated(ids)
        return bytes(map(or_, map(wanted_keys.__contains__, keys), map(wanted_ids.__contains__, ids)))

    def _shape_flaw(self, row: Sequence[str], width: int) -> str:
        """Say why the fields of a row can't be told apart for sure."""
        if len(row) != width:
            return f"{plural(len(row), 'field')} instead of {width}"
        if self.has_nul and any(_NUL_MARK in value for value in row):
            return "a NUL character"
        if any(value.count(",") >= width - 1 and ("\n" in value or "\r" in value) for value in row):
            return "a quoted field that holds other rows (a stray quote?)"
        return ""

    def _reject(self, line: int, row: Sequence[str], place: int, reason: str) -> None:
        """Leave the row out, and with it all groups whose email stands in any of its fields; a blank row is nothing."""
        if not row:
            return
        email = row[place].strip() if place < len(row) else ""
        self.reading.invalid_rows.append(InvalidRow(line, reason, email[:320] or None))
        for value in row:
            for text in {value, value.replace(_NUL_MARK, "")}:
                words = (text, *re.split(r"[,\r\n]", text), *_ADDRESS.findall(text))
                self.reading.tainted.update(word.strip().casefold() for word in words)

    def _keep(self, wanted: bytes) -> None:
        """Make contacts of the wanted rows, the same row once; rows of one id that differ are invalid."""
        table = self._table()
        pick = itemgetter(*table.places)
        rows: Iterable[Tuple[int, List[str]]] = compress(table.numbered(), wanted)
        if self.rows_are_lines:  # so that the lines of the others need not be taken apart again
            first = table.rows.line_num + 1
            numbers = compress(range(first, first + len(wanted)), wanted)
            rows = zip(numbers, csv.reader(compress(table.lines, wanted), strict=True))
        by_id: Dict[str, List[Tuple[int, Contact]]] = {}
        for line, row in rows:
            contact = Contact.from_cells(pick(row))
            variants = by_id.setdefault(contact.id, [])
            if any(contact == other for _, other in variants):
                self.reading.contacts_read -= 1
            else:
                variants.append((line, contact))
                self.reading.contacts.append(contact)
        for variants in by_id.values():
            for line, contact in variants if len(variants) > 1 else ():
                other_line, other = next(variant for variant in variants if variant[0] != line)
                differing = [COLUMNS[name] for name in COLUMNS if getattr(contact, name) != getattr(other, name)]
                reason = f"the {COLUMNS['id']} of line {other_line} with another {', '.join(differing)}"
                self.reading.invalid_rows.append(InvalidRow(line, reason, contact.email.strip()[:320]))
                self.reading.tainted.add(contact.key)


def _repeated(hashes: "array[int]") -> Set[int]:
    seen, repeated = {-1}, set()
    for value in hashes:
        if value in seen:
            repeated.add(value)
        else:
            seen.add(value)
    return repeated - {-1}


# ---------------------------------------------------------------------------------------------------
# Detection: which contacts are one person
# ---------------------------------------------------------------------------------------------------


class State(str, Enum):
    """How far a pair is. From REQUESTED to PROVING it is unfinished: something was done that has to be finished."""

    PLANNED = "planned"
    FAILED = "failed"  # refused or failed before a merge was asked for: tried again by the next run
    REQUESTED = "requested"  # the request may have left
    ACKNOWLEDGED = "acknowledged"  # DevRev has accepted it
    MERGED = "merged"  # the duplicate is gone
    PROVING = "proving"  # the reference is on the primary
    DONE = "done"  # nothing was left behind: never touched again


UNFINISHED = (State.REQUESTED, State.ACKNOWLEDGED, State.MERGED, State.PROVING)


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

    @property
    def email(self) -> str:
        return self.primary.key

    @property
    def ids(self) -> Tuple[str, str]:
        return self.primary.id, self.duplicate.id


@dataclass(eq=False)
class Group:
    """The contacts of one email: every pair has the same primary; the pair with the `user_` contact is first."""

    email: str
    pairs: List[Pair]
    checked_at: float = 0.0  # monotonic seconds, of the last live check
    backed_up_at: float = 0.0

    @property
    def primary(self) -> Contact:
        return self.pairs[0].primary

    def waiting(self) -> List[Pair]:
        """The pairs that have not been asked for, nor refused, in this run."""
        return [pair for pair in self.pairs if pair.state is State.PLANNED]

    def contacts(self) -> List[Contact]:
        """The primary and every duplicate that has not been asked to go yet."""
        return [self.primary, *(pair.duplicate for pair in self.waiting())]

    def everybody(self) -> List[Contact]:
        return [self.primary, *(pair.duplicate for pair in self.pairs)]

    def primary_ref(self) -> str:
        """The reference that the primary has now, as far as this tool has moved one to it."""
        moved = [pair.new_ref for pair in self.pairs if pair.new_ref and pair.state in (State.PROVING, State.DONE)]
        return moved[0] if moved else self.primary.external_ref

    def has_grown(self) -> bool:
        """Whether this tool has merged somebody into the primary since the export."""
        return any(pair.state in UNFINISHED or pair.state is State.DONE for pair in self.pairs)

    chosen: str = ""  # the reference that --choices names for the email

    def lost_refs(self) -> List[Contact]:
        """Duplicates whose `user_` reference nobody has in the end: the application's accounts lose their contact."""
        last = next((pair.new_ref for pair in self.pairs if pair.new_ref), self.primary.external_ref)
        return [pair.duplicate for pair in self.pairs if pair.duplicate.is_user and pair.duplicate.external_ref != last]

    def warnings(self) -> List[str]:
        """What speaks for a shared mailbox rather than a person, in a group that a choice joins."""
        if not self.chosen:
            return []
        everybody = self.everybody()
        names = {one.name.casefold(): one.name for one in everybody if one.name != one.short_id}
        found = [f"joins {len(everybody)} contacts"] if len(everybody) > 3 else []
        if len(names) > 1:
            found.append(f"joins different names: {', '.join(sorted(names.values()))}")
        return found


class Skip(NamedTuple):
    """A group that is left alone. `contacts` are those that take part: `user_` first, the likeliest of a kind first."""

    email: str
    code: str
    contacts: List[Contact]

    def choice_lines(self) -> Dict[str, Contact]:
        """The lines of CSV of which --choices may take one, each with the contact whose reference it keeps."""
        if self.code not in ("several_user_refs", "no_user_ref"):
            return {}
        users = [contact for contact in self.contacts if contact.is_user]
        return {csv_line(self.email, contact.external_ref): contact for contact in users or self.contacts}


SKIP_REASONS = {
    "several_user_refs": (
        "several contacts have a user_ reference; which one the application uses can't be told from the export",
        "find out in the application which user_ reference is alive, and name it with --choices",
    ),
    "no_user_ref": (
        "several REVU- contacts and none with a user_ reference: the application knows none of them",
        "nothing to do for the application; where you want one contact, name the one to keep with --choices",
    ),
    "invalid_row": (
        "a row of this email is bad or conflicts with another, so the group is not known whole",
        "repair the rows, which are named with their lines, and run again",
    ),
    "undone": (
        "a merge of this email was taken back with --undo",
        "name the address with --email to merge it again",
    ),
}


@dataclass
class Plan:
    """What a run would do: the one object that the preview prints and the run carries out."""

    groups: List[Group]
    skipped: List[Skip]
    invalid_rows: List[InvalidRow]
    contacts_read: int
    already_merged: int = 0
    id: str = ""  # of `plan_id`
    left_alone: Dict[str, str] = field(default_factory=dict)  # email -> why there is nothing to merge

    def pairs(self) -> Iterator[Pair]:
        return (pair for group in self.groups for pair in group.pairs if pair.state is not State.DONE)

    def count(self) -> int:
        return sum(1 for _ in self.pairs())


def plan_id(groups: Iterable[Group], count_policy: str, timelines: bool) -> str:
    """Name what all groups of a CSV come to: who is merged into whom with which reference, and on what backup."""
    pairs = sorted(json.dumps([*pair.ids, pair.new_ref]) for group in groups for pair in group.pairs)
    whole = "\n".join([count_policy, str(timelines), *pairs])
    return hashlib.sha256(whole.encode("ascii")).hexdigest()[:12]


def csv_line(*cells: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def read_choices(path: Path) -> Dict[str, str]:
    """Read which contact of an email is the one to keep: a CSV of EMAIL and EXTERNAL_REF, as key -> reference.

    Raises Stop(2) where the file can't be read, lacks a column, or has a row that is no choice or a second one.
    """
    choices: Dict[str, str] = {}
    lines: Dict[str, int] = {}
    with _csv_file(path) as raw:
        table = _Table.of(raw, ("EMAIL", "EXTERNAL_REF"))
        for line, row in table.numbered():
            if not row:
                continue
            if len(row) != table.width:
                raise Stop(EXIT_USAGE, f"line {line}: {plural(len(row), 'field')} instead of {table.width}")
            email, reference = (row[place].strip() for place in table.places)
            key = email.casefold()
            if not key or not reference:
                raise Stop(EXIT_USAGE, f"line {line}: empty {'EXTERNAL_REF' if key else 'EMAIL'}")
            if key in choices:
                raise Stop(EXIT_USAGE, f"line {line}: a second choice for {key} (the first: line {lines[key]})")
            choices[key], lines[key] = reference, line
    return choices


def detect(reading: Reading, choices: Mapping[str, str] = {}) -> Plan:
    """Find the groups to merge and the groups to skip, ordered by email; `choices` as `read_choices` gives them.

    Raises Stop(2) where a choice can't be followed, unless its group is not known whole and is skipped anyway.
    """
    by_email: Dict[str, List[Contact]] = {email: [] for email in choices if email not in reading.tainted}
    for contact in reading.contacts:
        by_email.setdefault(contact.key, []).append(contact)
    plan = Plan([], [], reading.invalid_rows, reading.contacts_read)
    flaws: List[str] = []
    for email in sorted(by_email):
        try:
            found = judge(email, by_email[email], email in reading.tainted, choices.get(email, ""))
        except PairError as error:
            flaws.append(str(error))
            continue
        if isinstance(found, Group):
            plan.groups.append(found)
        elif found:
            plan.skipped.append(found)
        else:
            taking_part = sum(contact.is_user or contact.is_system for contact in by_email[email])
            plan.left_alone[email] = f"{plural(taking_part, 'contact')} with a REVU- or user_ reference, none to merge"
    if flaws:
        more = f"; and {len(flaws) - 3:,} more" if len(flaws) > 3 else ""
        raise Stop(EXIT_USAGE, f"choices that can't be followed: {'; '.join(flaws[:3])}{more}")
    return plan


def judge(email: str, contacts: Iterable[Contact], broken: bool = False, choice: str = "") -> Union[Group, Skip, None]:
    """Decide what becomes of the contacts of one email: a group to merge, a skip with its reason, or nothing.

    Raises PairError where `choice`, a reference, is not that of one contact that may be kept.
    """
    ranked = sorted(contacts, key=lambda c: (-c.tickets, c.created or "~", c.id))
    users = [contact for contact in ranked if contact.is_user]
    system = [contact for contact in ranked if contact.is_system]
    if broken:
        return Skip(email, "invalid_row", users + system) if users or system else None
    if choice:
        kept = _chosen(email, users, system, choice)
    elif len(users) > 1:
        return Skip(email, "several_user_refs", users + system)
    elif len(system) > 1 and not users:
        return Skip(email, "no_user_ref", system)
    elif users and system:
        (kept,) = users
    else:
        return None
    primary = system[0] if kept.is_user and system else kept
    others = [contact for contact in (*users, *system) if contact is not primary and contact is not kept]
    pairs = [] if kept is primary else [Pair(primary, kept, kept.external_ref)]
    pairs += [Pair(primary, other, None) for other in others]
    return Group(email, pairs, chosen=choice) if pairs else None


def _chosen(email: str, users: Sequence[Contact], system: Sequence[Contact], choice: str) -> Contact:
    candidates = users or system
    found = [contact for contact in candidates if contact.external_ref.strip() == choice]
    if len(found) == 1:
        return found[0]
    if found:
        why = f"{len(found)} contacts have it"
    elif any(contact.external_ref.strip() == choice for contact in system):
        why = "the application knows this person by a user_ reference, which has to stay"
    else:
        why = "no contact of this email has it"
    there = ", ".join(contact.external_ref for contact in candidates) or "nothing"
    raise PairError("bad_choice", f"{choice} for {email}: {why} (to choose from: {there})")


def live_flaw(contact: Contact, live: Optional[Json], external_ref: str) -> Optional[PairError]:
    """Compare a row of the export with the contact as DevRev has it now; None where they agree.

    `live` is a `rev_user` of DevRev's API, None where there is none of that id.
    """
    name = contact.short_id
    if live is None:
        return PairError("not_found", f"{name} is not in DevRev any more")
    if live.get("state") != "active":
        return PairError("not_active", f"{name} is {live.get('state') or 'of unknown state'}, not active")
    if str(live.get("email") or "").strip().casefold() != contact.key:
        return PairError("email_changed", f"{name} has another email now: {live.get('email') or 'none'}")
    if live.get("external_ref") != external_ref:
        return PairError(
            "external_ref_changed", f"{name} has another reference now: {live.get('external_ref') or 'none'}"
        )
    return None


def rev_org_id(user: Json) -> Optional[str]:
    rev_org = user.get("rev_org")
    return str(rev_org.get("id")) if isinstance(rev_org, dict) else None


def group_flaw(group: Group, live: Mapping[str, Json], namesakes: Iterable[Json]) -> Optional[PairError]:
    """The first reason why a group must not be merged as DevRev has its contacts now; None if there is none.

    `live` maps ids to rev_users, `namesakes` are all rev_users that DevRev lists for the group's email.
    """
    contacts = group.contacts()
    for contact in contacts:
        expected = group.primary_ref() if contact is group.primary else contact.external_ref
        flaw = live_flaw(contact, live.get(contact.id), expected)
        if flaw:
            return flaw
    orgs = {rev_org_id(live[contact.id]) for contact in contacts}
    if len(orgs) > 1:
        return PairError("different_rev_org", "the contacts belong to different rev orgs: " + ", ".join(map(str, orgs)))
    known = {contact.id for contact in contacts}
    for other in namesakes:
        reference = str(other.get("external_ref"))
        same = str(other.get("email") or "").strip().casefold() == group.email
        if other["id"] not in known and same and other.get("state") == "active" and reference.startswith("user_"):
            return PairError("several_user_refs", f"DevRev has another user_ contact of this email by now: {reference}")
    return None


def count_flaw(contact: Contact, greatest: int, policy: str) -> Optional[PairError]:
    """Compare the backup's greatest(owned, created, reported) with the export's TICKET_COUNT."""
    if greatest == contact.tickets or (greatest > contact.tickets and policy == "at-least"):
        return None
    hint = "" if greatest < contact.tickets else " (export again, or let more through with --count-policy at-least)"
    return PairError(
        "count_mismatch", f"{contact.short_id}: the backup has {greatest} of {contact.tickets} tickets{hint}"
    )


# ---------------------------------------------------------------------------------------------------
# API: quota
# ---------------------------------------------------------------------------------------------------


class Throttle:
    """Decides when the next request may leave; all threads draw on it before they send.

    Four things hold a request back: the client's own ceiling (`ratelimit`), the budget that the server's
    X-Ratelimit headers give, a 429's Retry-After, and trouble (failures in a row), in which one request at a
    time finds out whether the API is back. Where a new window's budget is not known yet, one request goes ahead
    and brings it. Times are `time.monotonic()`.
    """

    TROUBLE = 3  # failures in a row, over all threads
    LONGEST_WINDOW = 600.0  # seconds; DevRev's quota resets every five minutes

    def __init__(self, calls: int, period: float, retries: int, halt: threading.Event) -> None:
        self.retries = retries
        self.halt = halt
        self.limit: Optional[int] = None
        self.remaining: Optional[int] = None  # as the server last said, for this window
        self.waits: List[Tuple[float, float]] = []  # epoch seconds
        self.verdict: Optional[Stop] = None  # why nothing may leave any more
        self._ceiling = self._make_ceiling(calls, period)
        self._changed = threading.Condition()
        self._in_flight = 0
        self._window = 0.0  # the server's X-Ratelimit-Reset
        self._resets_at = 0.0
        self._closed_until = 0.0
        self._scouting = False  # one request at a time
        self._scout_out = False
        self._failures = 0
        self._refusals = 0  # 429s in a row
        self._failed_scouts = 0
        self._waiting_since = 0.0
        self._waiters = 0

    @staticmethod
    def _make_ceiling(calls: int, period: float) -> Callable[[], None]:
        def nothing() -> None:
            return None

        if calls <= 0:
            return nothing
        from ratelimit import limits

        limited: Callable[[], None] = limits(calls=calls, period=period)(nothing)
        return limited

    def enter(self) -> bool:
        """Wait until a request may leave; returns whether it goes ahead as a scout. Raises Interrupted."""
        self._pass_ceiling()
        with self._changed, contextlib.ExitStack() as waiting:
            for_quota = False
            while True:
                wait, quota = self._wait()
                if self.halt.is_set():
                    raise Interrupted()
                if not wait:
                    break
                if quota and not for_quota:
                    for_quota = True
                    waiting.enter_context(self._noted_wait())
                self._changed.wait(min(wait, 0.5))
            self._in_flight += 1
            self._scout_out = self._scout_out or self._scouting
            return self._scouting

    def _pass_ceiling(self) -> None:
        from ratelimit import RateLimitException

        while True:
            try:
                self._ceiling()
                return
            except RateLimitException as full:
                with self._noted_wait():
                    self.halt.wait(max(0.005, full.period_remaining))
                if self.halt.is_set():
                    raise Interrupted() from None

    @contextlib.contextmanager
    def _noted_wait(self) -> Iterator[None]:
        """Note the time in which at least one thread waits for quota."""
        with self._changed:
            self._waiters += 1
            if self._waiters == 1:
                self._waiting_since = time.time()
        try:
            yield
        finally:
            with self._changed:
                self._waiters -= 1
                if not self._waiters:
                    self.waits.append((self._waiting_since, time.time()))

    def _wait(self) -> Tuple[float, bool]:
        """Seconds to wait before the gate is looked at again (0: go), and whether it is quota that is waited for.

        Where the known window is over, the first to look makes the next request a scout.
        """
        now = time.monotonic()
        if now < self._closed_until:
            return self._closed_until - now, self._refusals > 0
        if self.remaining is not None and now >= self._resets_at:
            self.remaining = None
            self._scouting = True
            self._scout_out = False
        if self._scouting:
            return (0.5 if self._scout_out else 0.0), False
        if self.remaining is None or self.remaining - self._in_flight > 0:
            return 0.0, False
        return max(0.001, self._resets_at - now), True

    def leave(self, scout: bool, status: Optional[int], headers: Mapping[str, str]) -> None:
        """Take note of an answer (`status` None: none came). Raises Stop(3) where the API stays down."""
        with self._changed:
            self._in_flight -= 1
            if scout:
                self._scout_out = False
            if status == 429:
                self._refusals += 1
            else:
                self._refusals = 0
            failed = status is None or status >= 500
            self._failures = self._failures + 1 if failed else 0
            self._learn(headers)
            if status == 429:
                self._close(self._retry_after(headers))
            elif self._failures >= self.TROUBLE:
                self._failed_scouts += scout
                self._close(min(10.0, 0.5 * 2**self._failed_scouts))
            elif not failed:
                self._failed_scouts = 0
                self._scouting = self._scouting and not scout
            self._changed.notify_all()
        if self._failed_scouts > self.retries:
            self.shut(Stop(EXIT_STOPPED, "DevRev can't be reached or keeps failing"))
        if self._refusals > 10 + 5 * self.retries:
            self.shut(Stop(EXIT_STOPPED, "DevRev keeps answering 429 (over quota), however long it is waited"))

    def cancel(self, scout: bool) -> None:
        """Give back the turn of a request that is not sent after all."""
        with self._changed:
            self._in_flight -= 1
            self._scout_out = self._scout_out and not scout
            self._changed.notify_all()

    def shut(self, verdict: Stop) -> None:
        """Let nothing leave any more, and say why."""
        self.verdict = self.verdict or verdict
        self.halt.set()
        raise verdict

    def _close(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)
        self._scouting = True

    def _retry_after(self, headers: Mapping[str, str]) -> float:
        least = min(30.0, 0.05 * 2.0 ** min(self._refusals, 10))
        text = headers.get("Retry-After", "")
        wait = 0.5
        try:
            wait = float(text)
        except ValueError:
            with contextlib.suppress(TypeError, ValueError, IndexError):
                wait = parsedate_to_datetime(text).timestamp() - self._server_time(headers)
            if not text and self.remaining is not None and self.remaining <= 0:
                wait = self._resets_at - time.monotonic()
        return max(least, min(3600.0, wait if wait == wait else 0.5))

    def _learn(self, headers: Mapping[str, str]) -> None:
        try:
            remaining, window = int(headers["X-Ratelimit-Remaining"]), float(headers["X-Ratelimit-Reset"])
            self.limit = int(headers.get("X-Ratelimit-Limit", remaining))
        except (KeyError, ValueError):
            return
        if window > self._window + 1:
            self._window, self.remaining = window, remaining
            # A clock that is off must not stop a run: past the longest window that makes sense, a scout finds out.
            wait = min(self.LONGEST_WINDOW, window - self._server_time(headers))
            self._resets_at = time.monotonic() + wait + 0.01
        elif window >= self._window - 1 and self.remaining is not None:
            self.remaining = min(self.remaining, remaining)

    @staticmethod
    def _server_time(headers: Mapping[str, str]) -> float:
        """The server's clock, in epoch seconds; its Date header has whole seconds, so small differences are noise."""
        now = time.time()
        with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
            skew = parsedate_to_datetime(headers["Date"]).timestamp() + 0.5 - now
            return now + skew if abs(skew) > 2 else now
        return now

    def outlook(self) -> str:
        """What is waited for, in words, or how much quota is left; empty where neither is known."""
        now = time.monotonic()
        if self._closed_until > now + 0.5:
            what = "quota" if self._refusals else "the API"
            return f"waiting {duration(self._closed_until - now)} for {what}"
        if self._waiters and time.time() - self._waiting_since > 0.5:
            ends = max(0.0, self._resets_at - now) if self.remaining is not None else 0.0
            return f"waiting {duration(ends)} for quota" if ends else "waiting for the tool's own limit"
        return f"{self.remaining} of {self.limit} units left" if self.remaining is not None else ""


# ---------------------------------------------------------------------------------------------------
# API: requests
# ---------------------------------------------------------------------------------------------------

SCOPES = {
    "rev-users.merge": "rev_user:all (to merge contacts)",
    "rev-users.update": "rev_user:all (to set a contact's reference)",
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


def scope_of(endpoint: str) -> str:
    return next((scope for start, scope in SCOPES.items() if endpoint.startswith(start)), "of this endpoint")


def user_ids(value: Any) -> Set[str]:
    """The ids in a work's `owned_by`, `reported_by` (lists), `created_by` (one) or a conversation's `members`."""
    users = value if isinstance(value, list) else [value]
    return {user["id"] for user in users if isinstance(user, dict) and isinstance(user.get("id"), str)}


class Found(NamedTuple):
    """What a list call that named many contacts found, taken apart again by contact, and what failed for whom."""

    items: Dict[str, List[Json]]
    errors: Dict[str, PairError]


class DevRevAPI:
    """The part of DevRev's REST API (version 2024-01-24) that a merge needs, over POST with JSON bodies.

    Every method raises ApiRefused (a definite no), ApiUnanswered (no usable answer after the retries), Denied
    (token or scope), Stop(3) (the API is down) or Interrupted (told to stop before the request left).
    """

    def __init__(self, settings: ApiSettings, halt: threading.Event) -> None:
        self.settings = settings
        self.halt = halt
        self.throttle = Throttle(settings.calls, settings.period, settings.retries, halt)
        self.requests: Dict[str, int] = collections.Counter()
        self._answered: Set[str] = set()
        self._forbidden: Dict[str, Set[bytes]] = collections.defaultdict(set)  # bodies that were answered with 403
        self._ids_per_call: Dict[str, int] = collections.defaultdict(lambda: PAGE)
        self._lock = threading.Lock()
        self._session = self._open_session()

    def _open_session(self) -> "requests.Session":
        import requests
        from requests.adapters import HTTPAdapter

        token = self.settings.token

        def authorize(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        session = requests.Session()
        session.auth = authorize  # without it, requests would look for credentials in ~/.netrc
        session.headers["User-Agent"] = f"merge_contacts/{__version__}"
        session.headers["Accept"] = "application/json"
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=self.settings.workers, max_retries=0)
        session.mount(self.settings.base_url, adapter)
        # The environment's proxies and CA bundle, looked up once; never a proxy for plain http on loopback.
        if self.settings.base_url.startswith("https:"):
            found = session.merge_environment_settings(self.settings.base_url, {}, None, None, None)
            session.proxies, session.verify = found["proxies"], found["verify"]
        session.trust_env = False
        return session

    # -- the one place that sends -------------------------------------------------------------------

    def _call(
        self,
        endpoint: str,
        body: Json,
        key: Optional[str] = None,
        repeatable: bool = True,
        unless: Callable[[], bool] = lambda: False,
    ) -> Json:
        """POST and return the answer's JSON object, which holds `key`; Stale if `unless()` when its turn comes.

        What is safe to repeat is repeated with growing, jittered pauses. A request that is not `repeatable` is sent
        again only where it can't have been acted on: no connection was made, or it was over quota.
        """
        attempt, problem = 0, ""
        while True:
            status, data, location, problem, sent = self._send(endpoint, body, unless)
            if status == 200 and data is not None and (key is None or key in data):
                self._answered.add(endpoint)
                return data
            if status == 200 and data is not None:
                problem = f"no {key} in the answer"
            if data is not None and status in (401, 403):
                self._deny(endpoint, status, problem, body)
            if status is not None and 300 <= status < 400:
                raise ApiRefused(endpoint, status, f"redirected to {location or 'nowhere'}", location)
            if status == 403:
                problem = f"{problem} (scope {scope_of(endpoint)})"
            if status is not None and 400 <= status < 500 and status not in (408, 429) and data is not None:
                raise ApiRefused(endpoint, status, problem)
            if status != 429:
                attempt += 1
                if attempt > self.settings.retries or (sent and not repeatable):
                    if status in (401, 403):
                        self._deny(endpoint, status, problem, body)
                    raise ApiUnanswered(endpoint, problem)
                self.halt.wait(random.uniform(0.5, 1.0) * min(8.0, 0.1 * 2**attempt))

    def _send(
        self, endpoint: str, body: Json, unless: Callable[[], bool]
    ) -> Tuple[Optional[int], Optional[Json], str, str, bool]:
        """Send once; return status (None: no answer), JSON object (None: none), Location, what went wrong, and
        whether the request may have reached DevRev."""
        import requests

        scout = self.throttle.enter()
        if unless():
            self.throttle.cancel(scout)
            raise Stale()
        status: Optional[int] = None
        headers: Mapping[str, str] = {}
        data: Optional[Json] = None
        problem, sent = "", True
        begun = time.monotonic()
        with self._lock:
            self.requests[endpoint] += 1
        try:
            answer = self._session.post(
                f"{self.settings.base_url}/{endpoint}",
                data=to_json(body),
                headers={"Content-Type": "application/json"},
                timeout=(min(10.0, self.settings.timeout), self.settings.timeout),
                allow_redirects=False,
            )
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
            problem = "the connection broke" if sent else "no connection"
        except requests.exceptions.RequestException as error:
            problem = type(error).__name__
        finally:
            log.debug(
                "%s -> %s in %.3f s%s",
                endpoint,
                status or "no answer",
                time.monotonic() - begun,
                f" ({problem})" if problem else "",
            )
            self.throttle.leave(scout, None if status == 200 and data is None else status, headers)
        location = headers.get("Location", "").replace(self.settings.token, "[token]")
        return status, data, location, problem, sent

    def _read(self, answer: "requests.Response") -> Tuple[Optional[Json], str]:
        """Parse a body: the JSON object, and in words what is wrong. A gateway's HTML is no word of DevRev's."""
        try:
            data = json.loads(answer.content)
        except ValueError:
            return None, f"{answer.status_code} with a body that is not whole JSON"
        if not isinstance(data, dict):
            return None, f"{answer.status_code} with JSON that is not an object"
        if answer.status_code == 200:
            return data, ""
        words = " ".join(str(data[name]) for name in ("message", "detail") if data.get(name))
        return data, words.replace(self.settings.token, "[token]")[:500] or f"status {answer.status_code}"

    def _deny(self, endpoint: str, status: int, message: str, body: Json) -> None:
        """Send nothing more with a token that is not accepted, or that lacks a scope which it never had.

        One ticket or conversation that it may not see says nothing of its scopes: a second has to be refused.
        """
        if status == 401:
            words = message.rstrip(".")
            text = f"DevRev does not accept the token (401): {words}. Is DEVREV_API_TOKEN right, and not expired?"
            self.throttle.shut(Denied(EXIT_STOPPED, text))
        with self._lock:
            self._forbidden[endpoint].add(to_json(body))
            alone = len(self._forbidden[endpoint]) == 1
        one_object = alone and not endpoint.startswith("rev-users.")
        if endpoint not in self._answered and not one_object:
            text = f"the token may not call {endpoint} (403): it lacks the scope {scope_of(endpoint)}"
            self.throttle.shut(Denied(EXIT_USAGE, text))

    def _pages(self, endpoint: str, key: str, body: Json) -> List[Json]:
        """All items of a cursor-paged list, once each, in order."""
        items: Dict[str, Json] = {}
        cursors: Set[str] = set()
        cursor = ""
        while True:
            page = dict(body, limit=PAGE)
            if cursor:
                page["cursor"] = cursor
            answer = self._call(endpoint, page, key)
            try:
                items.update((item["id"], item) for item in answer[key] or ())
            except (TypeError, KeyError):
                raise ApiUnanswered(endpoint, f"{key} holds something without an id") from None
            cursor = answer.get("next_cursor") or ""
            if not isinstance(cursor, str):
                raise ApiUnanswered(endpoint, "next_cursor is no text")
            if not cursor:
                return list(items.values())
            if cursor in cursors:
                raise ApiUnanswered(endpoint, "its pages go round in a circle")
            cursors.add(cursor)

    def _many(self, endpoint: str, key: str, body: Json, name: str, ids: Sequence[str]) -> Found:
        """List with the filter `name` naming many ids; where that is refused, halve and go on.

        `Found.items` has one entry only, `""`; `errors` has the ids that can't be asked for even alone.
        """
        found: Dict[str, Json] = {}
        errors: Dict[str, PairError] = {}
        parts = collections.deque(_chunks(ids, self._ids_per_call[endpoint]))
        while parts:
            part = parts.popleft()
            try:
                found.update((item["id"], item) for item in self._pages(endpoint, key, dict(body, **{name: part})))
            except (ApiRefused, ApiUnanswered) as error:
                if len(part) == 1:
                    errors[part[0]] = error
                    self._ids_per_call[endpoint] = PAGE  # it was this id, not their number
                    continue
                half = (len(part) + 1) // 2
                parts.extendleft((part[half:], part[:half]))
                if isinstance(error, ApiRefused):
                    self._ids_per_call[endpoint] = min(self._ids_per_call[endpoint], half)
        return Found({"": list(found.values())}, errors)

    def _by_contact(self, endpoint: str, key: str, body: Json, name: str, ids: Sequence[str]) -> Found:
        """List with one filter for many contacts, and take it apart by the ids in each item's field `name`.

        Where an item names none of the contacts that were asked for, each contact is asked for by itself.
        """
        whole = self._many(endpoint, key, body, name, ids)
        wanted = set(ids)
        items: Dict[str, List[Json]] = {one: [] for one in ids}
        for item in whole.items[""]:
            owners = user_ids(item.get(name)) & wanted
            if not owners:
                break
            for one in owners:
                items[one].append(item)
        else:
            return Found(items, whole.errors)
        log.info("%s: an item names none of the contacts asked for; asking contact by contact", endpoint)
        alone = {one: self._many(endpoint, key, body, name, [one]) for one in ids}
        errors = {one: error for found in alone.values() for one, error in found.errors.items()}
        return Found({one: found.items[""] for one, found in alone.items()}, errors)

    # -- endpoints ----------------------------------------------------------------------------------

    def _user(self, endpoint: str, body: Json, key: str = "rev_user") -> Json:
        """The user that an endpoint answers with. ApiUnanswered where it is none."""
        user = self._call(endpoint, body, key)[key]
        if not (isinstance(user, dict) and isinstance(user.get("id"), str)):
            raise ApiUnanswered(endpoint, f"{key} holds no user")
        return user

    def whoami(self) -> Json:
        """The token's owner (`dev_user`)."""
        return self._user("dev-users.self", {}, "dev_user")

    def contacts_by_email(self, emails: Sequence[str]) -> Found:
        """All rev users that DevRev lists for these addresses, under `""`; `errors` has addresses that it refuses."""
        return self._many("rev-users.list", "rev_users", {}, "email", emails)

    def contact(self, identity: str) -> Optional[Json]:
        """The rev user of this id, None where there is none (404), or where it has moved to another id (301)."""
        try:
            user = self._user("rev-users.get", {"id": identity})
        except ApiRefused as refusal:
            if refusal.status == 404 or 300 <= refusal.status < 400:
                return None
            raise
        return user if user.get("id") == identity else None

    def merge(self, primary: str, duplicate: str, unless: Callable[[], bool]) -> None:
        """Ask for a merge, unless it must not be any more when its turn comes (Stale).

        DevRev only acknowledges it and carries it out later; it is never repeated blindly.
        """
        body = {"primary_user": primary, "secondary_user": duplicate}
        self._call("rev-users.merge", body, repeatable=False, unless=unless)

    def is_merged(self, primary: str, duplicate: str, refused: bool = False) -> bool:
        """Look whether the duplicate has gone: 404, 301, a state other than active, or the primary's own record.

        Where DevRev has `refused` the merge, of the states only `deleted` counts: a contact that was locked since the
        live check is why it was refused.
        Raises PairError(merge_not_confirmed) where it has become somebody else than the primary.
        """
        try:
            user = self._user("rev-users.get", {"id": duplicate})
        except ApiRefused as refusal:
            if refusal.status == 404:
                return True
            if not 300 <= refusal.status < 400:
                raise
            user = {"id": self._moved_to(refusal.location) or primary}
        if user.get("id") in (primary, duplicate):
            state = user.get("state")
            if user["id"] == primary:
                return True
            if not isinstance(state, str):
                raise ApiUnanswered("rev-users.get", "the user has no state")
            return state == "deleted" if refused else state != "active"
        raise PairError("merge_not_confirmed", f"{duplicate} has become {user.get('id')}, not the primary")

    @staticmethod
    def _moved_to(location: str) -> str:
        """The contact's id in a Location header, or `""`."""
        match = re.search(r"don:identity:[^&?#\s]+:revu/[^&?#/\s]+", unquote(location))
        return match.group(0) if match else ""

    def set_external_ref(self, identity: str, external_ref: str) -> None:
        """Set the reference and read it back from the answer. ApiRefused with status 409 while another holds it."""
        user = self._user("rev-users.update", {"id": identity, "external_ref": external_ref})
        if user.get("id") != identity or user.get("external_ref") != external_ref:
            raise PairError(
                "external_ref_not_set", f"DevRev answered the update with the reference {user.get('external_ref')}"
            )

    def holder_of(self, external_ref: str) -> str:
        """Who holds a reference, in words."""
        found = self._pages("rev-users.list", "rev_users", {"external_ref": [external_ref]})
        return (
            ", ".join(str(user.get("display_id") or user["id"]) for user in found)
            or "a contact that the token can't see"
        )

    def peek(self, endpoint: str, key: str, body: Json) -> List[Json]:
        """One item of a list, to see whether the token may read it."""
        items: List[Json] = self._call(endpoint, dict(body, limit=1), key)[key]
        return items

    def works(self, role: str, ids: Sequence[str]) -> Found:
        """Tickets and issues that these contacts have in a role of ROLES, by contact."""
        return self._by_contact("works.list", "works", {"type": ["ticket", "issue"]}, ROLES[role], ids)

    def conversations(self, ids: Sequence[str]) -> Found:
        """Conversations that these contacts are members of, by contact."""
        return self._by_contact("conversations.list", "conversations", {}, "members", ids)

    def timeline(self, object_id: str) -> List[Json]:
        """Everything that was said on a ticket, issue or conversation."""
        return self._pages("timeline-entries.list", "timeline_entries", {"object": object_id})


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---------------------------------------------------------------------------------------------------
# Backup: what DevRev holds of a group, on the disk
# ---------------------------------------------------------------------------------------------------


@dataclass
class Holdings:
    """All that DevRev holds of one contact. Works and conversations are API objects by id."""

    contact: Contact
    live: Json
    roles: Dict[str, Dict[str, Json]]  # a role of ROLES -> works
    conversations: Dict[str, Json]

    def works(self) -> Dict[str, Json]:
        return {identity: work for works in self.roles.values() for identity, work in works.items()}

    def objects(self) -> List[str]:
        """Ids of everything that has a timeline."""
        return [*self.works(), *self.conversations]


Timelines = Mapping[str, List[Json]]


def contact_files(held: Holdings, timelines: Timelines) -> Dict[str, Any]:
    """The files of one contact's folder, by name."""
    return {
        "contact.json": held.live,
        "works.json": list(held.works().values()),
        "conversations.json": list(held.conversations.values()),
        "timelines.json": {identity: timelines[identity] for identity in held.objects() if identity in timelines},
    }


def contact_manifest(folder: str, role: str, held: Holdings, timelines: Timelines) -> Json:
    """What the manifest says of one contact: its row, its counts, and which objects it has in which role."""
    return {
        "folder": folder,
        "role": role,
        "csv": asdict(held.contact),
        "counts": {
            **{name: len(works) for name, works in held.roles.items()},
            "conversations": len(held.conversations),
            "timeline_entries": sum(len(timelines.get(identity, ())) for identity in held.objects()),
        },
        "works": {name: list(works) for name, works in held.roles.items()},
        "conversations": list(held.conversations),
    }


class Backups:
    """The folder `backups/`: `<email>/<YYYYmmdd_HHMMSS>/`, complete or absent.

    Raises OSError where the disk refuses.
    """

    INCOMPLETE = ".incomplete_"

    def __init__(self, root: Path, with_timelines: bool = True) -> None:
        self.root = root
        self.with_timelines = with_timelines

    def write(self, email: str, organisation: str, holdings: Sequence[Holdings], timelines: Timelines) -> Path:
        """Back up a group: written aside, flushed, renamed into place. The first of `holdings` is the primary."""
        home = private_folder(self.root / safe_name(email))
        if home.resolve().parent != self.root.resolve():
            raise OSError(f"{home} leads out of {self.root}; remove the link")
        stamp = int(time.time())
        while (home / _stamp(stamp)).exists():
            stamp += 1
        final = home / _stamp(stamp)
        aside = home / f"{self.INCOMPLETE}{os.getpid()}_{_stamp(stamp)}"
        aside.mkdir(mode=0o700)
        manifest: Json = {
            "format": 1,
            "tool": f"merge_contacts {__version__}",
            "created": now_iso(),
            "email": email,
            "organisation": organisation,
            "timelines": self.with_timelines,
            "contacts": [],
            "files": {},
        }
        for folder, role, held in zip(_folder_names(holdings), chain(["primary"], _forever("duplicate")), holdings):
            (aside / folder).mkdir(mode=0o700)
            for name, content in contact_files(held, timelines).items():
                size, digest = write_durably(aside / folder / name, [to_json(content, indent=1)])
                manifest["files"][f"{folder}/{name}"] = {"bytes": size, "sha256": digest}
            sync_folder(aside / folder)
            manifest["contacts"].append(contact_manifest(folder, role, held, timelines))
        write_durably(aside / "manifest.json", [to_json(manifest, indent=1)])
        sync_folder(aside)
        publish(aside, final)
        return final


def _stamp(epoch: float) -> str:
    return time.strftime("%Y%m%d_%H%M%S", time.localtime(epoch))


def _forever(value: T) -> Iterator[T]:
    while True:
        yield value


def _folder_names(holdings: Sequence[Holdings]) -> List[str]:
    """`primary_REVU-…`, `duplicate_REVU-…`, told apart also where a file system ignores case."""
    names: List[str] = []
    for index, held in enumerate(holdings):
        shown = str(held.live.get("display_id") or held.contact.short_id)
        name = f"{'duplicate' if index else 'primary'}_{safe_name(shown)}"
        taken = [other.casefold() for other in names]
        names.append(f"{name}_{index}" if name.casefold() in taken else name)
    return names


def read_backup(folder: Path) -> Json:
    """Re-read a backup from the disk and return its manifest.

    Raises PairError(backup_failed) naming everything that is missing, damaged or does not add up.
    """
    try:
        manifest: Json = json.loads((folder / "manifest.json").read_bytes())
        problems = list(_backup_flaws(folder, manifest))
    except (OSError, ValueError) as error:
        raise PairError("backup_failed", f"{folder}: manifest.json can't be read: {type(error).__name__}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise PairError(
            "backup_failed", f"{folder}: manifest.json is not a manifest: {type(error).__name__} {error}"
        ) from None
    if problems:
        raise PairError("backup_failed", f"{folder}: " + "; ".join(problems))
    return manifest


def _backup_flaws(folder: Path, manifest: Json) -> Iterator[str]:
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
            yield from _contact_flaws(entry, files, manifest["timelines"])


def _contact_flaws(entry: Json, files: Sequence[Any], timelines_wanted: bool) -> Iterator[str]:
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


def to_prove(manifest: Json, duplicate: str) -> List[Json]:
    """What has to hang on the primary after the merge: works owned or reported, conversations taken part in.

    Each as `{id, role}` with role `owned_by`, `reported_by` or `members`.
    """
    (entry,) = (entry for entry in manifest["contacts"] if entry["csv"]["id"] == duplicate)
    return [
        *({"id": work, "role": ROLES[role]} for role in ("owned", "reported") for work in entry["works"][role]),
        *({"id": conversation, "role": "members"} for conversation in entry["conversations"]),
    ]


# ---------------------------------------------------------------------------------------------------
# Savepoint: what was done, across crashes
# ---------------------------------------------------------------------------------------------------


class SavePoint:
    """An SQLite file with a row a pair, held exclusively while a run lasts, each write on the disk when it returns.

    Raises Stop(2) where the file is damaged, foreign, from a newer version or read-only (and leaves it as it
    is), Stop(11) where another run holds it, Stop(3) where a write fails.
    """

    VERSION = 1
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
    COLUMNS = (
        "primary_id", "duplicate_id", "email", "new_ref", "state", "code", "error", "backup", "requested_at",
        "first_requested_at", "seconds", "left_behind", "primary_row", "duplicate_row", "run", "created", "updated",
    )  # fmt: skip

    PLAIN = ("new_ref", "code", "error", "backup", "requested_at", "first_requested_at", "seconds")

    def __init__(self, path: Path, run: str = "", readonly: bool = False) -> None:
        self.path = path
        self.run = run
        self._inspect()
        try:
            self._db = self._attach(readonly)
        except sqlite3.DatabaseError as error:
            raise self._trouble(error, EXIT_USAGE) from None

    def _inspect(self) -> None:
        """Look at the file's header (https://sqlite.org/fileformat.html) before SQLite may touch it."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(100)
                writable = os.fstat(file.fileno()).st_mode & 0o222 and os.access(str(self.path), os.W_OK)
        except FileNotFoundError:
            return
        except OSError as error:
            raise Stop(EXIT_USAGE, f"the savepoint {self.path} can't be opened: {error.strerror}") from None
        if not head:
            return
        version, application = (int.from_bytes(head[at : at + 4], "big") for at in (60, 68))
        if (
            not head.startswith(b"SQLite format 3\0")
            or len(head) < 100
            or (application and application != self.APPLICATION)
        ):
            raise Stop(EXIT_USAGE, f"{self.path} is damaged or not a savepoint; it was left as it is")
        if version > self.VERSION:
            raise Stop(
                EXIT_USAGE, f"the savepoint {self.path} is from a newer version of this tool; it was left as it is"
            )
        if not writable:
            raise Stop(EXIT_USAGE, f"the savepoint {self.path} is read-only; it was left as it is")

    def _attach(self, readonly: bool) -> sqlite3.Connection:
        uri = self.path.resolve().as_uri()
        if readonly:
            return self._peek(uri)
        db = sqlite3.connect(f"{uri}?mode=rwc", uri=True, isolation_level=None, timeout=0)
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("BEGIN EXCLUSIVE")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("another program's database")
            for statement in self.SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {self.APPLICATION}")
            db.execute(f"PRAGMA user_version = {self.VERSION}")
        flaw = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if flaw != "ok":
            raise sqlite3.DatabaseError(flaw)
        db.execute("SELECT primary_id, state, run FROM pairs LIMIT 1")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now_iso()}
        db.execute("INSERT OR REPLACE INTO about VALUES ('holder', ?)", (json.dumps(holder),))
        db.execute("COMMIT")
        return db

    @staticmethod
    def _peek(uri: str) -> sqlite3.Connection:
        """Read past the lock of a run that may be going on; what looks torn is looked at again."""
        for patience in (0.05, 0.1, 0.2, 0.4, 0.0):
            db = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
            try:
                db.execute("SELECT primary_id, state, run FROM pairs LIMIT 1")
                flaw = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if flaw == "ok":
                    return db
                raise sqlite3.DatabaseError(flaw)
            except sqlite3.DatabaseError:
                db.close()
                if not patience:
                    raise
                time.sleep(patience)
        raise AssertionError("unreachable")

    def _trouble(self, error: sqlite3.Error, exit_code: int) -> Stop:
        text = str(error)
        if "locked" in text or "busy" in text:
            return Stop(EXIT_HELD, f"another run holds the savepoint {self.path}{self._holder()}")
        if exit_code == EXIT_STOPPED:
            return Stop(EXIT_STOPPED, f"the savepoint {self.path} can't be used ({text})")
        if "full" in text or "disk I/O" in text:
            return Stop(EXIT_STOPPED, f"the savepoint {self.path} can't be made ({text})")
        if "readonly" in text or "unable to open" in text:
            return Stop(EXIT_USAGE, f"the savepoint {self.path} can't be written: {text}")
        return Stop(
            EXIT_USAGE,
            f"the savepoint {self.path} is damaged ({text}); it was left as it is. Restore it, or move it away",
        )

    def _holder(self) -> str:
        with contextlib.suppress(sqlite3.Error, ValueError, TypeError, KeyError):
            about = SavePoint(self.path, readonly=True).holder()
            return f": process {about['pid']} on {about['host']}, since {about['since']}"
        return ""

    def holder(self) -> Json:
        """Who opened the savepoint last: `pid`, `host`, `since`."""
        found: Json = json.loads(self._db.execute("SELECT value FROM about WHERE name = 'holder'").fetchone()[0])
        return found

    def close(self) -> None:
        self._db.close()

    def about(self, name: str, value: Optional[str] = None) -> Optional[str]:
        """Read, or set for good, a fact about the savepoint (`organisation`)."""
        if value is not None:
            self._write("INSERT OR REPLACE INTO about VALUES (?, ?)", [(name, value)])
        return next((value for (value,) in self._query("SELECT value FROM about WHERE name = ?", name)), None)

    def record(self, *pairs: Pair) -> None:
        """Write the state of pairs; when this returns it is on the disk."""
        now = now_iso()
        rows = [
            (
                *pair.ids, pair.email, pair.new_ref, pair.state.value, pair.code, pair.error, pair.backup,
                pair.requested_at, pair.first_requested_at, pair.seconds, json.dumps(pair.left_behind),
                json.dumps(asdict(pair.primary)), json.dumps(asdict(pair.duplicate)), self.run, now, now,
            )
            for pair in pairs
        ]  # fmt: skip
        kept = ("primary_id", "duplicate_id", "created")
        changed = ", ".join(f"{name} = excluded.{name}" for name in self.COLUMNS if name not in kept)
        self._write(
            f"INSERT INTO pairs ({', '.join(self.COLUMNS)}) VALUES ({', '.join('?' * len(self.COLUMNS))}) "
            f"ON CONFLICT (primary_id, duplicate_id) DO UPDATE SET {changed}",
            rows,
        )

    def _write(self, statement: str, rows: Sequence[Tuple[Any, ...]]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(statement, rows)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise self._trouble(error, EXIT_STOPPED) from None

    def _query(self, statement: str, *values: Any) -> Iterator[Tuple[Any, ...]]:
        try:
            yield from self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise self._trouble(error, EXIT_STOPPED) from None

    def _select(self, condition: str, *values: Any) -> Iterator[Tuple[Pair, str, str]]:
        query = f"SELECT {', '.join(self.COLUMNS)} FROM pairs WHERE {condition} ORDER BY updated, email"
        for found in self._query(query, *values):
            row = dict(zip(self.COLUMNS, found))
            pair = Pair(
                primary=Contact.from_json(json.loads(row["primary_row"])),
                duplicate=Contact.from_json(json.loads(row["duplicate_row"])),
                state=State(row["state"]),
                left_behind=json.loads(row["left_behind"]),
                **{name: row[name] for name in self.PLAIN},
            )
            yield pair, row["created"], row["updated"]

    def unfinished(self) -> List[Pair]:
        """Pairs that an earlier run left between the merge request and `done`."""
        wanted = ", ".join(f"'{state.value}'" for state in UNFINISHED)
        return [pair for pair, _, _ in self._select(f"state IN ({wanted})")]

    def family(self, pair: Pair) -> Group:
        """The group of an unfinished pair as far as the savepoint knows it: all pairs of the same primary."""
        siblings = (other for other, _, _ in self._select("primary_id = ?", pair.primary.id) if other.ids != pair.ids)
        return Group(pair.email, [pair, *siblings])

    def entangled(self, group: Group) -> bool:
        """Whether a contact of the group takes part in an unfinished merge, whatever its role there."""
        ids = [contact.id for contact in group.everybody()]
        marks, wanted = ", ".join("?" * len(ids)), ", ".join("?" * len(UNFINISHED))
        query = (
            f"SELECT 1 FROM pairs WHERE state IN ({wanted}) AND (primary_id IN ({marks}) OR duplicate_id IN ({marks}))"
        )
        return any(True for _ in self._query(query, *(state.value for state in UNFINISHED), *ids, *ids))

    def rows(self, *states: State) -> Iterator[Tuple[Pair, str, str]]:
        """Pairs in these states with the times (ISO) of their first and last change."""
        return self._select(f"state IN ({', '.join('?' * len(states))})", *(state.value for state in states))

    def of_run(self, done: bool) -> Iterator[Tuple[Pair, str]]:
        """Pairs that this run has finished (or not), with the time of their last change."""
        rows = self._select(f"run = ? AND state {'=' if done else '!='} 'done'", self.run)
        return ((pair, updated) for pair, _, updated in rows if done or pair.code)

    def refresh(self, group: Group) -> None:
        """Bring what is known of a group's pairs into it, for the pairs that are done or unfinished."""
        known = dict(self._query("SELECT duplicate_id, state FROM pairs WHERE primary_id = ?", group.primary.id))
        for pair in group.pairs:
            state = State(known.get(pair.duplicate.id, State.PLANNED.value))
            if state in UNFINISHED or state is State.DONE:
                pair.state = state

    def counts(self) -> Dict[str, int]:
        return dict(self._query("SELECT state, count(*) FROM pairs GROUP BY state ORDER BY state"))


# ---------------------------------------------------------------------------------------------------
# Merge
# ---------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Groups that are checked and backed up together, so that one list call serves them all."""

    groups: List[Group]
    flaws: Dict[str, PairError] = field(default_factory=dict)  # by email
    rechecking: bool = False
    held: List["Merge"] = field(default_factory=list)


@dataclass
class Merge:
    """A pair on its way from the merge request to `done`. Times are monotonic seconds."""

    pair: Pair
    group: Group
    batch: Optional[Batch] = None  # None: taken over from an earlier run
    sent: float = 0.0
    deadline: float = 0.0
    look_after: float = 0.0  # seconds from `sent` to the next look
    looks: int = 0
    ref_deadline: float = 0.0
    ref_tries: int = 0
    proofs: int = 0
    refusal: Optional[PairError] = None  # DevRev's or our own no, to be believed only after a look

    @property
    def slow(self) -> bool:
        return self.looks > 3 or self.ref_tries > 3 or self.proofs > 0


Step = Callable[..., None]
Event = Tuple[Step, Tuple[Any, ...], Optional["Future[Any]"]]  # what to do next, with what, after which work


class ContactMerger:
    """Carries out a plan: live check, backup, integrity check, merge, external_ref, proof.

    Three kinds of threads: this one holds every decision, every state and the savepoint; `stages` prepare and
    prove whole batches; `requests` carry single requests. Work goes out through `_submit`, answers come back
    through `_inbox`, waits are timers, so that no pair waits for another.
    """

    BATCH = 25  # pairs
    STAGES = 3  # batches prepared at a time
    OUTSTANDING = 100  # pairs between preparation and `done`
    FRESH = 60.0  # seconds for which a live check is believed
    IDLE = 120.0  # seconds that a backup may wait for its merge
    STREAK = 5  # failures in a row that stop the run
    HOPE = 86400.0  # seconds for which a merge that was asked for may still come
    PROOF_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before what seems left behind is looked for again
    DATA_CODES = (
        "not_found", "not_active", "email_changed", "external_ref_changed", "different_rev_org", "several_user_refs",
        "count_mismatch",
    )  # fmt: skip

    def __init__(
        self,
        api: DevRevAPI,
        savepoint: SavePoint,
        backups: Backups,
        count_policy: str = "exact",
        merge_timeout: float = 120.0,
        on_pair: Callable[[Pair], None] = lambda _pair: None,
        on_tick: Callable[["ContactMerger"], None] = lambda _merger: None,
    ) -> None:
        self.api = api
        self.savepoint = savepoint
        self.backups = backups
        self.count_policy = count_policy
        self.merge_timeout = merge_timeout
        self.on_pair = on_pair
        self.on_tick = on_tick
        self.halt = api.halt
        self.token_owner: Json = {}
        self.organisation = ""
        self.total = self.merged = self.failed = 0
        self.changed = False  # whether DevRev may have acted on anything
        self.stop: Optional[Stop] = None
        self._closing = False  # finish what is under way, begin nothing
        self._streak = 0
        self._stages = ThreadPoolExecutor(self.STAGES + 2, "stage")
        self._requests = ThreadPoolExecutor(api.settings.workers, "request")
        self._inbox: queue.Queue[Event] = queue.Queue()
        self._active = 0
        self._timers: List[Tuple[float, int, Step, Tuple[Any, ...]]] = []
        self._serial = 0
        self._groups: Iterator[Group] = iter(())
        self._deferred: Deque[Group] = collections.deque()
        self._again: Deque[Group] = collections.deque()
        self._restarts: Dict[Tuple[str, str], int] = collections.Counter()
        self._open: Dict[Tuple[str, str], Merge] = {}
        self._taken_over: Set[Tuple[str, str]] = set()  # pairs of an earlier run that are not settled
        self._resumed: Set[str] = set()  # contacts of all pairs of an earlier run
        self._preparing = 0
        self._sending = 0
        self._acknowledged_once = False
        self._queue: Deque[Merge] = collections.deque()
        self._usual_delays: Deque[float] = collections.deque(maxlen=20)
        self._scout: Optional[Merge] = None
        self._unlooked: List[Merge] = []
        self._to_prove: List[Merge] = []

    # -- the run ------------------------------------------------------------------------------------

    def identify(self, plan: Plan) -> List[Pair]:
        """Find out whose token it is; refuse another organisation's CSV or savepoint. Returns the unfinished pairs.

        Raises Stop(2), before anything else has been asked or done.
        """
        try:
            self.token_owner = self.api.whoami()
        except ApiUnanswered as error:
            raise Stop(EXIT_STOPPED, f"DevRev can't be reached: {error}") from None
        except ApiRefused as error:
            raise Stop(EXIT_USAGE, f"{error} (is DEVREV_BASE_URL right?)") from None
        except Denied as denied:
            raise Stop(EXIT_USAGE, str(denied)) from None
        self.organisation = organisation_of(str(self.token_owner.get("id")))
        unfinished = self.savepoint.unfinished()
        for origin, pairs in (("CSV", plan.pairs()), ("savepoint", iter(unfinished))):
            check_organisation(self.organisation, origin, pairs)
        return unfinished

    def run(self, plan: Plan, unfinished: Sequence[Pair]) -> int:
        """Finish what an earlier run left unfinished, carry out the plan, and return the exit code.

        `identify` has to come first. Nothing is raised: what stops the run is in `stop`.
        """
        todo = {pair.ids for pair in plan.pairs()} | {pair.ids for pair in unfinished}
        self.total = len(todo)
        del todo
        self._groups = _drain(plan.groups)
        self._guard(self._take_over, self._as_exported_now(plan, unfinished))
        while True:
            if not self.halt.is_set():
                self._guard(self._advance)
            if not self._active and (self.halt.is_set() or not (self._timers or self._has_more())):
                break
            self._take_event()
        self._guard(self._account_for_open_pairs)
        for pool in (self._stages, self._requests):
            pool.shutdown(wait=True)
        return self._exit_code()

    @property
    def under_way(self) -> int:
        """Pairs between the merge request and `done`."""
        return sum(merge.pair.state in UNFINISHED for merge in self._open.values())

    def _advance(self) -> None:
        self._feed()
        self._send_queued()
        self._prove_collected()

    def _has_more(self) -> bool:
        return bool((self._queue and not self._closing) or self._to_prove or self._inbox.qsize())

    def _guard(self, step: Step, *args: Any) -> None:
        """Take a step; whatever it raises ends the run in good order."""
        try:
            step(*args)
        except Stop as stop:
            self._end(stop)
        except OSError as error:
            self._end(Stop(EXIT_STOPPED, f"the disk refuses: {error}"))
        except Exception as error:
            log.exception("unexpected")
            self._end(
                Stop(EXIT_STOPPED, f"unexpected {type(error).__name__}: {error} (a bug; the log has the details)")
            )

    def _end(self, stop: Stop) -> None:
        if self.stop is None or isinstance(self.stop, Interrupted):
            self.stop = stop
        self.halt.set()

    def _exit_code(self) -> int:
        stop = self.stop = self.api.throttle.verdict or self.stop
        if isinstance(stop, Denied) and (self.changed or self.merged):
            return EXIT_STOPPED
        if stop and not (self._closing and self.merged + self.failed >= self.total):
            return stop.exit_code
        if self.merged + self.failed < self.total:
            self.stop = Stop(EXIT_STOPPED, "pairs were left without a word (a bug; run again)")
            return EXIT_STOPPED
        return EXIT_FAILED if self.failed else EXIT_OK

    def _submit(self, pool: ThreadPoolExecutor, then: Step, work: Callable[..., Any], *args: Any) -> None:
        """Have a pool do `work(*args)`; then, in this thread, `then(future, *args)`."""
        future = pool.submit(work, *args)
        self._active += 1
        future.add_done_callback(lambda done: self._inbox.put((then, args, done)))

    def _later(self, seconds: float, step: Step, *args: Any) -> None:
        self._serial += 1
        heapq.heappush(self._timers, (time.monotonic() + max(0.0, seconds), self._serial, step, args))

    def _take_event(self) -> None:
        """Wait for an answer or the next timer, whichever comes first, and act on it."""
        due = self._timers[0][0] - time.monotonic() if self._timers and not self.halt.is_set() else 0.25
        with contextlib.suppress(queue.Empty):
            then, args, future = self._inbox.get(timeout=min(0.25, max(0.001, due)))
            if future is not None:
                self._active -= 1
                args = (future, *args)
            self._guard(then, *args)
        while self._timers and self._timers[0][0] <= time.monotonic() and not self.halt.is_set():
            _, _, step, args = heapq.heappop(self._timers)
            self._guard(step, *args)
        self._guard(self.on_tick, self)

    # -- what to work on ----------------------------------------------------------------------------

    @staticmethod
    def _as_exported_now(plan: Plan, unfinished: Sequence[Pair]) -> Sequence[Pair]:
        """Unfinished pairs with this export's rows where it has them: what is done over is checked against these."""
        exported = {pair.ids: pair for pair in plan.pairs()}
        for pair in unfinished:
            if pair.ids in exported:
                pair.primary, pair.duplicate = exported[pair.ids].primary, exported[pair.ids].duplicate
        return unfinished

    def _take_over(self, unfinished: Sequence[Pair]) -> None:
        for pair in unfinished:
            merge = Merge(pair, self.savepoint.family(pair))
            self._resumed.update(pair.ids)
            self._open[pair.ids] = merge
            self._taken_over.add(pair.ids)
            if pair.state in (State.REQUESTED, State.ACKNOWLEDGED):
                age = max(0.0, time.time() - pair.requested_at)
                merge.sent = time.monotonic() - age
                merge.look_after = age
                merge.deadline = merge.sent + self._patience(pair)
                self._look(merge)
            elif pair.state is State.MERGED:
                self._set_ref(merge)
            else:
                self._to_prove.append(merge)

    def _feed(self) -> None:
        """Begin batches while there is room."""
        while (
            not self._closing and self._preparing < self.STAGES and (self._again or len(self._open) < self.OUTSTANDING)
        ):
            groups = self._next_groups()
            if not groups:
                return
            self._preparing += 1
            batch = Batch(groups)
            for group in groups:
                self._open.update((pair.ids, Merge(pair, group, batch)) for pair in group.waiting())
            self._submit(self._stages, self._on_prepared, self._prepare, batch)

    def _next_groups(self) -> List[Group]:
        groups: List[Group] = []
        pairs = 0
        while pairs < self.BATCH:
            group = self._again.popleft() if self._again else self._next_planned()
            if group is None:
                break
            groups.append(group)
            pairs += len(group.waiting())
        return groups

    def _next_planned(self) -> Optional[Group]:
        """The next group with something to do; those of pairs that an earlier run left unfinished come last."""
        for group in self._groups:
            if any(contact.id in self._resumed for contact in group.everybody()):
                self._deferred.append(group)
            elif group.waiting():
                return group
        while self._deferred and not self._taken_over:
            group = self._deferred.popleft()
            self.savepoint.refresh(group)
            if self.savepoint.entangled(group):
                self._fail_rest(group)
            elif group.waiting():
                return group
        return None

    # -- live check, backup, integrity check (in a stage thread) ------------------------------------

    def _prepare(self, batch: Batch) -> None:
        """Check and back up a batch; each group is handed over, ready or refused, as soon as it is known."""
        live = self._live_check(batch, batch.groups)
        groups = []
        for group in batch.groups:
            flaw = batch.flaws.get(group.email)
            if flaw:
                self._hand_over(self._on_refused, group, flaw)
            else:
                groups.append(group)
        held, errors = self._fetch(groups, live)
        for group in groups[:]:
            lost = next((errors[contact.id] for contact in group.contacts() if contact.id in errors), None)
            if lost:
                groups.remove(group)
                self._hand_over(self._on_refused, group, lost)
        self._back_up(batch, groups, held)

    def _hand_over(self, then: Step, *args: Any) -> None:
        self._inbox.put((then, args, None))

    def _each(self, work: Callable[[str], T], ids: Iterable[str]) -> Iterator[Tuple[str, Union[T, PairError]]]:
        """Do `work` for each id on the request threads, a few ahead; yields results, or what one failed with."""
        ahead: Deque[Tuple[str, Future[T]]] = collections.deque()
        source = iter(ids)
        while True:
            if self._closing:
                raise Interrupted()
            # Few enough that the looks and references of merged pairs don't wait long behind backup reads.
            room = self.api.settings.workers // max(1, self._preparing) + 2 - len(ahead)
            ahead.extend((one, self._requests.submit(work, one)) for one in islice(source, max(0, room)))
            if not ahead:
                return
            one, future = ahead.popleft()
            try:
                yield one, future.result()
            except PairError as error:
                yield one, error

    def _live_check(self, batch: Batch, groups: Sequence[Group]) -> Dict[str, Json]:
        """Compare groups with DevRev as it is now, note the flaws in `batch`, and return the contacts by id."""
        contacts = [contact for group in groups for contact in group.contacts()]
        found_by_email = self.api.contacts_by_email(sorted({contact.email.strip() for contact in contacts}))
        checked_at = time.monotonic()
        listed = found_by_email.items[""]
        live: Dict[str, Json] = {user["id"]: user for user in listed}
        namesakes: Dict[str, List[Json]] = collections.defaultdict(list)
        for user in listed:
            namesakes[str(user.get("email") or "").strip().casefold()].append(user)
        unlisted = {email.casefold(): error for email, error in found_by_email.errors.items()}
        failed: Dict[str, PairError] = {}
        for identity, found in self._each(self.api.contact, [c.id for c in contacts if c.id not in live]):
            if isinstance(found, PairError):
                failed[identity] = found
            elif found:
                live[identity] = found
        for group in groups:
            lost = next((failed[contact.id] for contact in group.contacts() if contact.id in failed), None)
            flaw = unlisted.get(group.email) or lost or group_flaw(group, live, namesakes[group.email])
            if flaw:
                batch.flaws[group.email] = flaw
            group.checked_at = checked_at
        return live

    def _fetch(
        self, groups: Sequence[Group], live: Mapping[str, Json]
    ) -> Tuple[Dict[str, Holdings], Dict[str, PairError]]:
        """Everything but the timelines, for all contacts of the groups at once."""
        contacts = [contact for group in groups for contact in group.contacts()]
        ids = [contact.id for contact in contacts]
        if not ids:
            return {}, {}
        calls = {role: self._requests.submit(self.api.works, role, ids) for role in ROLES}
        talks = self._requests.submit(self.api.conversations, ids).result()
        works = {role: call.result() for role, call in calls.items()}
        held = {
            contact.id: Holdings(
                contact,
                live[contact.id],
                {role: _by_id(works[role].items[contact.id]) for role in ROLES},
                _by_id(talks.items[contact.id]),
            )
            for contact in contacts
        }
        errors = {identity: error for found in (talks, *works.values()) for identity, error in found.errors.items()}
        return held, errors

    def _back_up(self, batch: Batch, groups: Sequence[Group], held: Mapping[str, Holdings]) -> None:
        """Fetch timelines in the order of the groups, write each group's backup when it has all of its own."""
        wanted = {
            group.email: list(dict.fromkeys(chain.from_iterable(held[c.id].objects() for c in group.contacts())))
            for group in groups
        }
        uses = collections.Counter(chain.from_iterable(wanted.values()))
        answers = self._each(self.api.timeline, list(uses) if self.backups.with_timelines else [])
        timelines: Dict[str, List[Json]] = {}
        failed: Dict[str, PairError] = {}
        for group in groups:
            objects = wanted[group.email]
            while self.backups.with_timelines and any(one not in timelines and one not in failed for one in objects):
                identity, entries = next(answers)
                if isinstance(entries, PairError):
                    failed[identity] = PairError(entries.code, f"{identity}: {entries}")
                else:
                    timelines[identity] = entries
            lost = next((failed[one] for one in objects if one in failed), None)
            if lost:
                self._hand_over(self._on_refused, group, lost)
            else:
                self._write_backup(batch, group, [held[contact.id] for contact in group.contacts()], timelines)
            uses.subtract(objects)
            for one in objects:
                if not uses[one]:
                    timelines.pop(one, None)

    def _write_backup(self, batch: Batch, group: Group, held: Sequence[Holdings], timelines: Timelines) -> None:
        """Back a group up; check, from the disk, that the backup is whole and holds what the export counts."""
        folder = self.backups.write(group.email, self.organisation, held, timelines)
        flaw: Optional[PairError] = None
        try:
            manifest = read_backup(folder)
            for entry in manifest["contacts"]:
                grown = entry["role"] == "primary" and group.has_grown()
                flaw = flaw or count_flaw(
                    Contact.from_json(entry["csv"]), greatest_count(entry), "at-least" if grown else self.count_policy
                )
        except PairError as error:
            flaw = error
        if flaw:
            self._hand_over(self._on_refused, group, flaw, str(folder))
        else:
            group.backed_up_at = time.monotonic()
            self._hand_over(self._on_ready, batch, group, str(folder))

    def _on_prepared(self, future: "Future[None]", batch: Batch) -> None:
        self._preparing -= 1
        try:
            future.result()
        except PairError as error:
            for group in batch.groups:
                if all(pair.ids in self._open and not pair.backup for pair in group.waiting()):
                    self._on_refused(group, error)
        except Interrupted:
            if not self._closing:
                raise

    def _on_refused(self, group: Group, flaw: PairError, folder: str = "") -> None:
        """Refuse what of a group has not been asked for. Where it may have been asked for, a look decides."""
        for pair in group.waiting():
            merge = self._open.get(pair.ids)
            if merge is None:
                continue
            if self._restarts[pair.ids]:
                merge.refusal = flaw
                pair.state = State.REQUESTED
                self._look(merge)
            else:
                pair.backup = folder
                self._fail(merge, flaw.code, str(flaw))

    # -- merge and confirmation ---------------------------------------------------------------------

    def _on_ready(self, batch: Batch, group: Group, folder: str) -> None:
        if group.email in batch.flaws:
            self._on_refused(group, batch.flaws[group.email])
            return
        waiting = group.waiting()
        for pair in waiting:
            if not self._restarts[pair.ids]:
                pair.backup = folder
        merge = self._open[waiting[0].ids]
        if self._restarts[merge.pair.ids]:
            self._submit(self._requests, self._on_looked_again, self._look_again, merge, folder)
        else:
            self._queue.append(merge)

    def _look_again(self, merge: Merge, _folder: str) -> bool:
        return self._is_merged(merge)

    def _on_looked_again(self, future: "Future[bool]", merge: Merge, folder: str) -> None:
        """A new backup replaces the earlier one only if it was whole before the first request was carried out."""
        try:
            gone = future.result()
        except PairError as error:
            self._on_refused(merge.group, error)
            return
        if gone:
            self._on_confirmed(merge)
        else:
            merge.pair.backup = folder
            self._queue.append(merge)

    def _send_queued(self) -> None:
        """Ask for merges, the first of a run alone: it shows whether the token may."""
        room = self.api.settings.workers if self._acknowledged_once else 1
        while self._queue and self._sending < room and not self._closing:
            merge = self._queue.popleft()
            batch = merge.batch
            if time.monotonic() - merge.group.backed_up_at > self.IDLE:
                self._again.append(merge.group)
            elif batch and self._is_stale(merge.group):
                batch.held.append(merge)
                if not batch.rechecking:
                    batch.rechecking = True
                    self._submit(
                        self._stages, self._on_rechecked, self._recheck, batch, self._quiet_stale_groups(batch)
                    )
            else:
                self._ask(merge)

    def _is_stale(self, group: Group) -> bool:
        return time.monotonic() - group.checked_at > self.FRESH

    def _recheck(self, batch: Batch, groups: Sequence[Group]) -> None:
        self._live_check(batch, groups)

    def _quiet_stale_groups(self, batch: Batch) -> List[Group]:
        """Groups of a batch to be checked with one more list call: held ones, and those with no merge under way."""
        held = [merge.group for merge in batch.held]
        settled = (State.PLANNED, State.FAILED, State.PROVING, State.DONE)
        return held + [
            group
            for group in batch.groups
            if group not in held
            and group.waiting()
            and self._is_stale(group)
            and all(pair.state in settled for pair in group.pairs)
        ]

    def _on_rechecked(self, future: "Future[None]", batch: Batch, _groups: Sequence[Group]) -> None:
        batch.rechecking = False
        held, batch.held = batch.held, []
        error = future.exception()
        for merge in held if error is None or isinstance(error, PairError) else ():
            flaw = error if isinstance(error, PairError) else batch.flaws.get(merge.group.email)
            if flaw:
                self._on_refused(merge.group, flaw)
            else:
                self._queue.append(merge)
        if error and not isinstance(error, PairError) and not (self._closing and isinstance(error, Interrupted)):
            raise error

    def _ask(self, merge: Merge) -> None:
        """Write the intent to the savepoint, then let the request leave."""
        pair = merge.pair
        pair.state, pair.code, pair.error, pair.requested_at = State.REQUESTED, "", "", time.time()
        pair.first_requested_at = pair.first_requested_at or pair.requested_at
        self.savepoint.record(pair)
        self._sending += 1
        self._submit(self._requests, self._on_answer, self._request_merge, merge)

    def _request_merge(self, merge: Merge) -> None:
        self.api.merge(*merge.pair.ids, unless=lambda: self._is_stale(merge.group))

    def _on_answer(self, future: "Future[None]", merge: Merge) -> None:
        self._sending -= 1
        pair = merge.pair
        try:
            future.result()
            pair.state = State.ACKNOWLEDGED
            self._acknowledged_once = self.changed = True
            self.savepoint.record(pair)
        except Stale:
            pair.state = State.PLANNED
            if not self._restarts[pair.ids]:
                self.savepoint.record(pair)
            self._queue.appendleft(merge)
            return
        except ApiRefused as refusal:
            merge.refusal = PairError("merge_refused", str(refusal))
        except ApiUnanswered as error:
            self.changed = True
            log.info("%s: the answer to the merge was lost (%s); looking", pair.email, error)
        except (Denied, Interrupted) as stop:
            self._fail(merge, "forbidden" if isinstance(stop, Denied) else "interrupted", str(stop), self._unsent(pair))
            raise
        merge.sent = time.monotonic()
        merge.deadline = merge.sent + self._patience(pair)
        self._plan_first_look(merge)

    def _patience(self, pair: Pair) -> float:
        """Seconds after the request until a duplicate that is still there means that the merge won't come.

        An acknowledged merge has the whole timeout. One whose answer was lost may never have arrived, so it is
        waited for several times as long as merges take (ten seconds where that is not known), and then done over.
        """
        if pair.state is State.ACKNOWLEDGED:
            return self.merge_timeout
        longest = max(self._usual_delays, default=0.0)
        return min(max(3.0, 6 * longest) if longest else 10.0, self.merge_timeout / 4)

    def _usual_delay(self) -> Optional[float]:
        """How long merges have taken lately, in seconds: three of four were done by then."""
        delays = sorted(self._usual_delays)
        return delays[len(delays) * 3 // 4] if delays else None

    def _plan_first_look(self, merge: Merge) -> None:
        """Look when merges are usually done. While that is not known, one pair scouts and the others wait for it."""
        usual = self._usual_delay()
        if merge.refusal:
            merge.look_after = 0.0
        elif usual is not None:
            merge.look_after = usual
        elif self._scout is None:
            self._scout, merge.look_after = merge, 0.2
        else:
            self._unlooked.append(merge)
            return
        self._later(merge.sent + merge.look_after - time.monotonic(), self._look, merge)

    def _look(self, merge: Merge) -> None:
        merge.looks += 1
        self._submit(self._requests, self._on_looked, self._is_merged, merge)

    def _is_merged(self, merge: Merge) -> bool:
        return self.api.is_merged(*merge.pair.ids, refused=getattr(merge.refusal, "code", "") == "merge_refused")

    def _on_looked(self, future: "Future[bool]", merge: Merge) -> None:
        problem: Optional[PairError] = None
        try:
            gone = future.result()
        except (ApiRefused, ApiUnanswered) as error:
            gone, problem = False, error
        except PairError as error:
            self._free_scouted(merge, None)
            self._fail(merge, error.code, str(error))
            return
        if gone:
            self._free_scouted(merge, merge.look_after)
            self._on_confirmed(merge)
        elif merge.refusal or time.monotonic() >= merge.deadline:
            self._free_scouted(merge, None)
            self._on_unconfirmed(merge, problem)
        else:
            elapsed = time.monotonic() - merge.sent
            merge.look_after = min(1.5 * elapsed + 0.1, elapsed + 10)
            if merge.look_after > 1.5:
                self._free_scouted(merge, None)
            self._later(min(merge.look_after, merge.deadline - merge.sent) - elapsed, self._look, merge)

    def _free_scouted(self, merge: Merge, delay: Optional[float]) -> None:
        """Note how long a merge took (None: no telling) and let those go that waited to hear it."""
        if merge.batch is None or merge.refusal:
            return
        if delay is not None:
            self._usual_delays.append(delay)
        if merge is self._scout or delay is not None:
            self._scout = None
            waiting, self._unlooked = self._unlooked, []
            for other in waiting:
                other.look_after = delay or merge.look_after
                self._later(other.sent + other.look_after - time.monotonic(), self._look, other)

    def _on_unconfirmed(self, merge: Merge, problem: Optional[PairError]) -> None:
        pair = merge.pair
        if merge.refusal:
            self._fail(merge, merge.refusal.code, str(merge.refusal), self._unsent(pair))
        elif problem:
            self._fail(merge, problem.code, f"the merge can't be confirmed: {problem}")
        elif self._restarts[pair.ids] < 3 and (pair.state is State.REQUESTED or merge.batch is None):
            self._start_over(merge)
        else:
            waited = time.monotonic() - merge.sent
            self._fail(
                merge, "merge_not_confirmed", f"{pair.duplicate.short_id} is still there after {duration(waited)}"
            )

    def _unsent(self, pair: Pair) -> State:
        """The state of a pair whose last request was not acted on: an earlier one may still be under way in DevRev.

        For a day; what has not come by then will not come.
        """
        hopeful = self._restarts[pair.ids] and time.time() - pair.first_requested_at < self.HOPE
        return State.REQUESTED if hopeful else State.FAILED

    def _start_over(self, merge: Merge) -> None:
        """A merge that was asked for and has not come: check and back up anew, then ask again."""
        pair = merge.pair
        log.info("%s: %s has been looked at and is still there; starting over", pair.email, pair.duplicate.short_id)
        self._restarts[pair.ids] += 1
        pair.state = State.PLANNED
        self._again.append(merge.group)

    def _on_confirmed(self, merge: Merge) -> None:
        self.changed = True
        self._streak = 0
        merge.pair.state = State.MERGED
        self.savepoint.record(merge.pair)
        self._set_ref(merge)

    # -- external_ref -------------------------------------------------------------------------------

    def _set_ref(self, merge: Merge) -> None:
        if merge.pair.new_ref:
            self._submit(self._requests, self._on_ref_set, self._move_ref, merge)
        else:
            self._on_renamed(merge)

    def _move_ref(self, merge: Merge) -> None:
        self.api.set_external_ref(merge.pair.primary.id, merge.pair.new_ref or "")

    def _on_ref_set(self, future: "Future[None]", merge: Merge) -> None:
        try:
            future.result()
        except ApiRefused as refusal:
            if refusal.status == 409:
                self._retry_ref(merge)
            else:
                self._fail(merge, refusal.code, f"the reference {merge.pair.new_ref} could not be set: {refusal}")
        except PairError as error:
            self._fail(merge, error.code, f"the reference {merge.pair.new_ref} could not be set: {error}")
        else:
            self.changed = True
            self._on_renamed(merge)

    def _retry_ref(self, merge: Merge) -> None:
        """The duplicate may hold its reference for a while after it has gone."""
        now = time.monotonic()
        merge.ref_deadline = merge.ref_deadline or now + self.merge_timeout
        if now >= merge.ref_deadline:
            self._submit(self._requests, self._on_conflict, self._holder, merge)
            return
        pause = min(0.2 * 1.6**merge.ref_tries, 10.0, merge.ref_deadline - now)
        merge.ref_tries += 1
        self._later(pause, self._set_ref, merge)

    def _holder(self, merge: Merge) -> str:
        return self.api.holder_of(merge.pair.new_ref or "")

    def _on_conflict(self, future: "Future[str]", merge: Merge) -> None:
        error = future.exception()
        holder = "somebody else" if isinstance(error, PairError) else future.result()
        self._fail(merge, "external_ref_conflict", f"the reference {merge.pair.new_ref} is held by {holder}")

    def _on_renamed(self, merge: Merge) -> None:
        merge.pair.state = State.PROVING
        self.savepoint.record(merge.pair)
        self._to_prove.append(merge)
        waiting = merge.group.waiting()
        if waiting and merge.batch and waiting[0].ids in self._open:
            self._queue.append(self._open[waiting[0].ids])

    # -- proof --------------------------------------------------------------------------------------

    def _prove_collected(self) -> None:
        """Prove many pairs with the same calls: a batch of them, or what there is when nothing else will come soon."""
        if not self._to_prove:
            return
        coming = (self._queue or self._preparing) and not self._closing
        moving = any(
            not merge.slow and merge.pair.state in (State.REQUESTED, State.ACKNOWLEDGED, State.MERGED)
            for merge in self._open.values()
        )
        if len(self._to_prove) >= self.BATCH or not (coming or moving) or any(merge.proofs for merge in self._to_prove):
            merges, self._to_prove = self._to_prove, []
            self._submit(self._stages, self._on_proved, self._prove, merges)

    def _prove_again(self, merge: Merge) -> None:
        self._to_prove.append(merge)

    def _prove(self, merges: Sequence[Merge]) -> List[Union[List[Json], PairError]]:
        """What of each duplicate's backup does not hang on its primary (in a stage thread)."""
        wanted: List[Union[List[Json], PairError]] = [self._wanted(merge.pair) for merge in merges]
        ask: Dict[str, List[str]] = collections.defaultdict(list)
        for merge, items in zip(merges, wanted):
            for role in {item["role"] for item in items} if isinstance(items, list) else ():
                ask[role].append(merge.pair.primary.id)
        calls = {role: self._requests.submit(self._list_role, role, sorted(set(ids))) for role, ids in ask.items()}
        answers = {role: call.result() for role, call in calls.items()}
        there = {
            (role, primary): {item["id"] for item in items}
            for role, found in answers.items()
            for primary, items in found.items.items()
        }
        results: List[Union[List[Json], PairError]] = []
        for merge, items in zip(merges, wanted):
            primary = merge.pair.primary.id
            errors = [found.errors[primary] for found in answers.values() if primary in found.errors]
            if isinstance(items, PairError) or errors:
                results.append(items if isinstance(items, PairError) else errors[0])
            else:
                results.append([item for item in items if item["id"] not in there[item["role"], primary]])
        return results

    def _list_role(self, role: str, primaries: Sequence[str]) -> Found:
        if role == "members":
            return self.api.conversations(primaries)
        return self.api.works(next(name for name in ROLES if ROLES[name] == role), primaries)

    @staticmethod
    def _wanted(pair: Pair) -> Union[List[Json], PairError]:
        try:
            return to_prove(json.loads((Path(pair.backup) / "manifest.json").read_bytes()), pair.duplicate.id)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return PairError(
                "backup_failed",
                f"merged, but can't be proved: the backup {pair.backup} can't be read ({type(error).__name__})",
            )

    def _on_proved(self, future: "Future[List[Union[List[Json], PairError]]]", merges: Sequence[Merge]) -> None:
        error = future.exception()
        if error and not isinstance(error, PairError):
            raise error
        results = [error] * len(merges) if isinstance(error, PairError) else future.result()
        proved = []
        for merge, left in zip(merges, results):
            if isinstance(left, PairError):
                self._fail(merge, left.code, f"merged, but not proved: {left}")
            elif not left:
                proved.append(merge)
            elif (
                merge.proofs < len(self.PROOF_PAUSES)
                and sum(self.PROOF_PAUSES[: merge.proofs + 1]) < self.merge_timeout
            ):
                merge.proofs += 1
                self._later(self.PROOF_PAUSES[merge.proofs - 1], self._prove_again, merge)
            else:
                merge.pair.left_behind = describe(merge.pair, left)
                names = ", ".join(dict.fromkeys(item["display_id"] for item in merge.pair.left_behind))
                self._fail(merge, "left_behind", f"merged, but not on the primary: {names}")
        self._finish(proved)

    # -- the end of a pair --------------------------------------------------------------------------

    def _finish(self, merges: Sequence[Merge]) -> None:
        for merge in merges:
            pair = merge.pair
            pair.state, pair.code, pair.error, pair.left_behind = State.DONE, "", "", []
            pair.seconds = max(0.0, time.time() - pair.requested_at)
        if merges:
            self.savepoint.record(*(merge.pair for merge in merges))
            self._streak = 0
        for merge in merges:
            self.merged += 1
            self._settle(merge)

    def _fail(self, merge: Merge, code: str, error: str, state: Optional[State] = None) -> None:
        """Give up on a pair for this run: before the request as FAILED, after it in the state that it has reached."""
        pair = merge.pair
        pair.state = state or (State.FAILED if pair.state is State.PLANNED else pair.state)
        pair.code, pair.error = code, error
        pair.seconds = max(0.0, time.time() - pair.requested_at) if pair.requested_at else 0.0
        self.savepoint.record(pair)
        self.failed += 1
        self._settle(merge)
        if merge.batch and code != "group_incomplete":
            self._fail_rest(merge.group)
        if code not in self.DATA_CODES and code not in ("interrupted", "group_incomplete"):
            self._streak += 1
            if self._streak >= self.STREAK and not self._closing:
                self._closing = True
                self.stop = Stop(EXIT_STOPPED, f"{self._streak} failures in a row, the last: {error}")

    def _fail_rest(self, group: Group) -> None:
        """One pair of a group has failed: the others wait for the next run."""
        for pair in group.waiting():
            merge = self._open.get(pair.ids)
            if merge is None and pair.code:
                continue
            self._fail(
                merge or Merge(pair, group),
                "group_incomplete",
                "another merge into the same contact has to be finished first",
            )

    def _settle(self, merge: Merge) -> None:
        self._open.pop(merge.pair.ids, None)
        self._taken_over.discard(merge.pair.ids)
        self.on_pair(merge.pair)

    def _account_for_open_pairs(self) -> None:
        """What was asked for and could not be followed to its end is named in the report."""
        for merge in list(self._open.values()):
            if self._restarts[merge.pair.ids] and merge.pair.state is State.PLANNED:
                merge.pair.state = State.REQUESTED
            if merge.pair.state in UNFINISHED:
                self._fail(merge, "interrupted", f"stopped while {merge.pair.state.value}; run again to finish")


def _drain(items: List[T]) -> Iterator[T]:
    """Yield the items in order and forget them, so that memory does not grow with what is done."""
    items.reverse()
    while items:
        yield items.pop()


def _by_id(items: Iterable[Json]) -> Dict[str, Json]:
    return {item["id"]: item for item in items}


def check_organisation(organisation: str, origin: str, pairs: Iterable[Pair]) -> None:
    """Refuse pairs of another organisation than the token's. Raises Stop(2)."""
    for pair in pairs:
        for contact in (pair.primary, pair.duplicate):
            if contact.organisation and contact.organisation != organisation:
                raise Stop(
                    EXIT_USAGE,
                    f"the {origin} is of another organisation than the token: {contact.short_id} belongs to "
                    f"{contact.organisation}, the token to {organisation or 'an unknown one'}",
                )


def describe(pair: Pair, items: Iterable[Json]) -> List[Json]:
    """Name objects (`{id, role}`) with display id, kind and title from the backup."""
    known: Dict[str, Json] = {}
    for path in (*Path(pair.backup).glob("*/works.json"), *Path(pair.backup).glob("*/conversations.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known.update(_by_id(json.loads(path.read_bytes())))
    return [
        {
            "id": item["id"],
            "display_id": known.get(item["id"], {}).get("display_id") or item["id"],
            "kind": known.get(item["id"], {}).get("type") or item["id"].split(":")[-1].split("/")[0],
            "title": known.get(item["id"], {}).get("title") or "",
            "role": item["role"],
        }
        for item in items
    ]


# ---------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------


ADVICE = {
    "not_found": "the export is stale: export again",
    "not_active": "look at the contact in DevRev: a locked or deactivated contact is not merged",
    "email_changed": "the export is stale: export again",
    "external_ref_changed": "the export is stale: export again",
    "different_rev_org": "contacts of different rev orgs are not merged: look at them in DevRev",
    "several_user_refs": "find out which user_ reference the application uses, export again",
    "count_mismatch": "export again, or let a backup with more than the export pass with --count-policy at-least",
    "backup_failed": "look at the named file or ticket, run again",
    "api_error": "run again; if it stays, send the message and the log to DevRev's support",
    "forbidden": "give the token the missing scope (or access to the named object), run again",
    "merge_refused": "look at both contacts in DevRev; run again",
    "merge_not_confirmed": "DevRev has not carried the merge out yet: run again later, which looks again first",
    "external_ref_conflict": "free the reference from its holder in DevRev, run again: only the reference is set then",
    "external_ref_not_set": "run again; if it stays, set the reference by hand in DevRev",
    "left_behind": "run again later (DevRev may still be moving them), or move them by hand",
    "group_incomplete": "run again",
    "interrupted": "run again with the same savepoint: it is finished first",
}


def contact_entry(contact: Contact) -> Json:
    return {
        "id": contact.id,
        "display_id": contact.short_id,
        "display_name": contact.display_name,
        "old_external_ref": contact.external_ref,
        "tickets": contact.tickets,
    }


def merge_entry(pair: Pair, finished: str) -> Json:
    """A pair in `successful_merges` or `failed_merges` (with `state`, `code`, `error`, `left_behind`)."""
    entry: Json = {
        "email": pair.email,
        "primary": contact_entry(pair.primary),
        "duplicate": contact_entry(pair.duplicate),
        "new_external_ref": pair.new_ref,
        "backup": pair.backup or None,
        "seconds": round(pair.seconds, 3),
        "finished": finished,
    }
    if pair.state is not State.DONE:
        entry.update(state=pair.state.value, code=pair.code, error=pair.error, left_behind=pair.left_behind)
    return entry


def skip_entry(skip: Skip) -> Json:
    contacts = [
        {
            "id": c.id,
            "display_id": c.short_id,
            "display_name": c.display_name,
            "external_ref": c.external_ref,
            "tickets": c.tickets,
        }
        for c in skip.contacts
    ]
    return {"email": skip.email, "code": skip.code, "reason": SKIP_REASONS[skip.code][0], "contacts": contacts}


def report_chunks(head: Json, lists: Mapping[str, Iterable[Json]]) -> Iterator[bytes]:
    """A JSON object of `head` and of lists that are too long to be held in memory."""
    yield to_json(head, indent=1)[:-2]
    for name, items in lists.items():
        yield b",\n %s: [" % to_json(name)
        for index, item in enumerate(items):
            yield (b",\n  " if index else b"\n  ") + to_json(item)
        yield b"\n ]"
    yield b"\n}\n"


def summarise(plan: Plan, merger: Optional[ContactMerger]) -> Json:
    merged, failed = (merger.merged, merger.failed) if merger else (0, 0)
    return {
        "contacts_read": plan.contacts_read,
        "invalid_rows": len(plan.invalid_rows),
        "pairs_planned": plan.already_merged + (merger.total or plan.count() if merger else 0),
        "already_merged": plan.already_merged,
        "total_merges_attempted": merged + failed,
        "successful_merges": merged,
        "failed_merges": failed,
        "skipped_groups": len(plan.skipped),
    }


def write_report(path: Path, run: Json, plan: Plan, merger: Optional[ContactMerger], savepoint: SavePoint) -> None:
    """Write the JSON report, and beside it the page that shows it. Raises OSError where the disk refuses."""
    private_folder(path.parent)
    lists: Dict[str, Iterable[Json]] = {
        "successful_merges": (merge_entry(pair, finished) for pair, finished in savepoint.of_run(done=True)),
        "failed_merges": (merge_entry(pair, finished) for pair, finished in savepoint.of_run(done=False)),
        "skipped": map(skip_entry, plan.skipped),
        "invalid_rows": (row._asdict() for row in plan.invalid_rows),
    }
    _replace(path, report_chunks({"run": run, "summary": summarise(plan, merger)}, lists))
    template = Path(__file__).resolve().parent / "reports" / "template.html"
    if template.is_file():
        before, _, after = template.read_bytes().partition(b"__REPORT_JSON__")
        with open(path, "rb") as report:
            _replace(path.with_suffix(".html"), chain([before], map(for_script, report), [after]))


def for_script(text: bytes) -> bytes:
    """Escape JSON so that nothing in it can end the <script> element that holds it."""
    for raw, escaped in (
        (b"<", rb"\u003c"),
        (b">", rb"\u003e"),
        (b"&", rb"\u0026"),
        (b"\xe2\x80\xa8", rb"\u2028"),
        (b"\xe2\x80\xa9", rb"\u2029"),
    ):
        text = text.replace(raw, escaped)
    return text


def _replace(path: Path, chunks: Iterable[bytes]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    try:
        write_durably(aside, chunks)
        publish(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


# ---------------------------------------------------------------------------------------------------
# Estimate
# ---------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    requests: int
    seconds: float


def estimate(pairs: int, contacts: int, tickets: int, settings: ApiSettings, with_timelines: bool) -> Estimate:
    """What a run costs: three requests a pair, some ten lists a batch, one timeline a ticket and conversation.

    The number of conversations is not in the export: one for every other contact is assumed. Seconds are what the
    requests take under the client's own ceiling, or at 0.2 s each over the workers, whichever is more.
    """
    batches = -(-pairs // ContactMerger.BATCH)
    requests = 3 * pairs + 8 * batches + 4 * tickets // PAGE + (1 if pairs else 0)
    if with_timelines:
        requests += tickets + contacts // 2
    by_ceiling = requests / settings.calls * settings.period if settings.calls else 0.0
    return Estimate(requests, max(by_ceiling if requests > settings.calls else 0.0, requests * 0.2 / settings.workers))


def estimate_plan(plan: Plan, settings: ApiSettings, with_timelines: bool) -> Estimate:
    pairs = contacts = tickets = 0
    for group in plan.groups:
        left = [pair for pair in group.pairs if pair.state is not State.DONE]
        if left:
            pairs += len(left)
            contacts += len(left) + 1
            tickets += group.primary.tickets + sum(pair.duplicate.tickets for pair in left)
    return estimate(pairs, contacts, tickets, settings, with_timelines)


# ---------------------------------------------------------------------------------------------------
# Console
# ---------------------------------------------------------------------------------------------------


class Console:
    """What people see: results on stdout, the rest on stderr; plain where it is piped."""

    COLOURS: Mapping[str, str] = {"good": "32", "bad": "31", "bold": "1"}

    def __init__(self, quiet: bool = False, out: Optional[TextIO] = None, err: Optional[TextIO] = None) -> None:
        self.quiet = quiet
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.token = ""
        self._status = ""
        for stream in (self.out, self.err):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    @property
    def width(self) -> int:
        return shutil.get_terminal_size((100, 24)).columns if self.out.isatty() else 10_000

    def paint(self, style: str, text: str, stream: Optional[TextIO] = None) -> str:
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not (stream or self.out).isatty()
        return text if plain else f"\x1b[{self.COLOURS[style]}m{text}\x1b[0m"

    def symbol(self, fancy: str, plain: str) -> str:
        try:
            fancy.encode(self.out.encoding or "ascii")
        except UnicodeEncodeError:
            return plain
        return fancy

    def clean(self, text: str) -> str:
        return printable(text.replace(self.token, "[token]") if self.token else text)

    def say(self, text: str = "", style: str = "") -> None:
        """A line of results, wrapped on a terminal; never raises because nobody reads it any more."""
        for line in self.wrap(self.clean(text)):
            self._write(self.out, self.paint(style, line) if style else line)

    def wrap(self, text: str) -> List[str]:
        if len(text) <= self.width:
            return [text]
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        return textwrap.wrap(text, self.width, subsequent_indent=indent, break_on_hyphens=False)

    def say_all(self, lines: Iterable[str]) -> None:
        """Many lines of results with one write."""
        self._write(self.out, "\n".join(map(self.clean, lines)))

    def note(self, text: str, style: str = "") -> None:
        """A line beside the results."""
        self._write(self.err, self.paint(style, self.clean(text), self.err) if style else self.clean(text))

    def error(self, text: str) -> None:
        log.error("%s", text)
        self.note(f"error: {text}", "bad")

    def status(self, text: str) -> None:
        """The one line that is rewritten in place on a terminal; `""` removes it."""
        if self.quiet or not self.err.isatty() or text == self._status:
            return
        room = shutil.get_terminal_size((80, 24)).columns - 1
        self._status = text
        with contextlib.suppress(OSError, ValueError):
            self.err.write("\r\x1b[K" + self.clean(text)[:room])
            self.err.flush()

    def _write(self, stream: TextIO, line: str) -> None:
        status, self._status = self._status, self._status and "-"
        with contextlib.suppress(OSError, ValueError):
            if status:
                self.err.write("\r\x1b[K")
                self.err.flush()
            stream.write(line + "\n")
            stream.flush()


class PlainFormatter(logging.Formatter):
    """One line a record, without the token and without anything that a terminal could act on."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.token = ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(text.replace(self.token, "[token]") if self.token else text)


# ---------------------------------------------------------------------------------------------------
# Preview
# ---------------------------------------------------------------------------------------------------


def show_plan(plan: Plan, console: Console, cost: Estimate, ceiling: str) -> None:
    """Print what a run would do, so that somebody can sign it."""
    _show_pairs(plan, console)
    _show_skipped(plan, console)
    if plan.already_merged:
        console.say(f"{plural(plan.already_merged, 'pair')} of this export already merged (says the savepoint)")
    unfinished = sum(pair.state in UNFINISHED for pair in plan.pairs())
    if unfinished:
        console.say(f"{plural(unfinished, 'pair')} begun by an earlier run, to be finished first")
    console.say(f"{plural(plan.contacts_read, 'contact')} read, {plural(len(plan.invalid_rows), 'invalid row')}")
    console.say(f"about {plural(cost.requests, 'request')}, about {duration(cost.seconds)} {ceiling}")
    console.say(f"{plural(plan.count(), 'pair')} to merge, {plural(len(plan.skipped), 'group')} skipped", "bold")


def _show_pairs(plan: Plan, console: Console) -> None:
    """A table where it fits the terminal, else two lines a pair."""
    arrow = console.symbol("\u2190", "<-")
    head = ("EMAIL", "PRIMARY", "TICKETS", arrow, "DUPLICATE", "TICKETS", "REFERENCE")
    rows = [_pair_cells(pair, arrow) for pair in plan.pairs()]
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    form = "%-{}s  %-{}s %{}s %{}s %-{}s %{}s  %s".format(*widths)
    if sum(widths) + 8 > console.width:
        form = "%s\n  %s (%s) %s %s (%s), %s"
    for line in (form % head).split("\n"):
        console.say(line, "bold")
    for start in range(0, len(rows), 1000):
        console.say_all("\n".join(form % row for row in rows[start : start + 1000]).split("\n"))
    console.say()


def _pair_cells(pair: Pair, arrow: str) -> Tuple[str, ...]:
    cells = (
        pair.email, pair.primary.short_id, str(pair.primary.tickets), arrow, pair.duplicate.short_id,
        str(pair.duplicate.tickets), pair.new_ref or "none",
    )  # fmt: skip
    return tuple(map(printable, cells))


def _show_skipped(plan: Plan, console: Console) -> None:
    for row in plan.invalid_rows:
        console.say(f"line {row.line}: {row.reason}" + (f" ({row.email})" if row.email else ""))
    if plan.invalid_rows:
        console.say()
    for code, (reason, advice) in SKIP_REASONS.items():
        skips = [skip for skip in plan.skipped if skip.code == code]
        if not skips:
            continue
        console.say(f"SKIPPED {code}: {plural(len(skips), 'group')}", "bold")
        console.say(f"  why: {reason}")
        console.say(f"  what to do: {advice}")
        for skip in skips:
            names = ", ".join(f"{contact.external_ref} ({contact.tickets})" for contact in skip.contacts[:6])
            more = f", and {len(skip.contacts) - 6} more" if len(skip.contacts) > 6 else ""
            console.say(f"  {skip.email}: {names}{more}")
        console.say()


def plan_chunks(plan: Plan, cost: Estimate) -> Iterator[bytes]:
    """The plan as JSON, for `--preview --json`."""
    pairs = (
        {
            "email": pair.email,
            "primary": contact_entry(pair.primary),
            "duplicate": contact_entry(pair.duplicate),
            "new_external_ref": pair.new_ref,
            "state": pair.state.value,
        }
        for pair in plan.pairs()
    )
    summary = {
        "contacts_read": plan.contacts_read,
        "pairs_to_merge": plan.count(),
        "already_merged": plan.already_merged,
        "skipped_groups": len(plan.skipped),
        "invalid_rows": len(plan.invalid_rows),
        "estimated_requests": cost.requests,
        "estimated_seconds": round(cost.seconds),
    }
    skipped = map(skip_entry, plan.skipped)
    return report_chunks(
        {"summary": summary},
        {"pairs": pairs, "skipped": skipped, "invalid_rows": (row._asdict() for row in plan.invalid_rows)},
    )


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

environment, or .env in this folder or beside the script:
  DEVREV_API_TOKEN          needed for a real run
  DEVREV_BASE_URL           default https://api.devrev.ai
  DEVREV_RATE_LIMIT_CALLS, DEVREV_RATE_LIMIT_PERIOD
                            the tool's own ceiling, default 200 calls in 60 seconds; 0 calls: none
  DEVREV_TIMEOUT            seconds to wait for an answer, default 30
  DEVREV_MAX_RETRIES        default 5

exit codes:
  0    all merged, or nothing to do
  1    some failed, the rest are merged
  2    bad option, CSV, token or permission: nothing was changed
  3    stopped early: run again
  11   another run holds the savepoint
  130, 143   interrupted: run again
"""


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{printable(text)} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"{printable(text)} is not a number of seconds between 0 and 86400")


class OptionParser(argparse.ArgumentParser):
    """argparse, but what it repeats of a wrong option can't act on the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def build_parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="merge_contacts.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to work on")
    what.add_argument("--csv", metavar="PATH", type=Path, help="the export of contacts (README: how to make it)")
    what.add_argument("--email", metavar="ADDRESS", action="append", help="only this address (may be repeated)")
    what.add_argument("--limit", metavar="N", type=_positive_int, help="at most N pairs in this run: a canary")
    look = parser.add_argument_group("look, without changing anything")
    look.add_argument("--preview", action="store_true", help="print the plan; no request is made")
    look.add_argument("--json", action="store_true", help="with --preview: the plan as JSON")
    look.add_argument("--check", action="store_true", help="say whether a real run could start (a few read requests)")
    look.add_argument("--status", action="store_true", help="print what the savepoint knows")
    look.add_argument(
        "--verify-backups", metavar="FOLDER", nargs="?", type=Path, const=Path("backups"), help="re-read every backup"
    )
    how = parser.add_argument_group("how to work")
    how.add_argument(
        "--count-policy", choices=("exact", "at-least"), default="exact",
        help="a contact's backup must hold exactly the export's TICKET_COUNT (default), or at least that",
    )  # fmt: skip
    how.add_argument(
        "--merge-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=120.0,
        help="how long to wait for DevRev to finish a merge (default 120)",
    )
    how.add_argument("--workers", metavar="N", type=_positive_int, default=8, help="concurrent requests (default 8)")
    how.add_argument(
        "--savepoint", metavar="PATH", type=Path, default=Path("savepoint.db"), help="default savepoint.db"
    )
    how.add_argument(
        "--no-timelines",
        action="store_true",
        help="leave the comments out of the backup (a request each); the manifest says so",
    )
    how.add_argument("--yes", action="store_true", help="don't ask before the first merge")
    show = parser.add_argument_group("what to show")
    show.add_argument("-v", "--verbose", action="store_true", help="show each request")
    show.add_argument("-q", "--quiet", action="store_true", help="errors and the summary alone")
    show.add_argument("--version", action="version", version=f"merge_contacts {__version__}")
    return parser


def parse_options(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = build_parser()
    options = parser.parse_args(argv)
    modes = [name for name in ("preview", "check", "status", "verify_backups") if getattr(options, name)]
    if len(modes) > 1:
        parser.error("--" + " and --".join(mode.replace("_", "-") for mode in modes) + " don't go together")
    if options.json and not options.preview:
        parser.error("--json goes with --preview")
    if options.csv is None and modes in ([], ["preview"]):
        parser.error("--csv PATH is needed (try --help)")
    return options


# -- settings ----------------------------------------------------------------------------------------


def load_environment() -> Dict[str, str]:
    """The DEVREV_ settings: the environment, else `.env` in the current folder, else `.env` beside the script."""
    found: Dict[str, str] = {}
    for path in dict.fromkeys((Path.cwd() / ".env", Path(__file__).resolve().parent / ".env")):
        if path.is_file():
            from dotenv import dotenv_values

            try:
                values = dotenv_values(path, interpolate=False)
            except (OSError, UnicodeDecodeError):
                raise Stop(EXIT_USAGE, f"{path} can't be read as UTF-8 text") from None
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
        raise Stop(EXIT_USAGE, f"{name} is not a number of at least {least:g}: {text}")

    base_url = environment.get("DEVREV_BASE_URL", ApiSettings.base_url).strip().rstrip("/")
    return ApiSettings(
        token=environment.get("DEVREV_API_TOKEN", "").strip(),
        base_url=check_base_url(base_url),
        calls=int(number("DEVREV_RATE_LIMIT_CALLS", 200, 0)),
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
        raise Stop(EXIT_USAGE, "DEVREV_BASE_URL is not a URL") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise Stop(EXIT_USAGE, "DEVREV_BASE_URL holds more than a host and a path")
    loopback = host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host)
    if not host or parts.scheme not in ("http", "https"):
        raise Stop(EXIT_USAGE, f"DEVREV_BASE_URL is not an https address: {url}")
    if parts.scheme == "http" and not loopback:
        raise Stop(
            EXIT_USAGE,
            f"DEVREV_BASE_URL: plain http would show the token to everybody between here and {host}; use https",
        )
    return url


def check_token(token: str) -> None:
    if not token:
        raise Stop(EXIT_USAGE, "DEVREV_API_TOKEN is not set; put it into .env (see .env.example) or the environment")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise Stop(EXIT_USAGE, "DEVREV_API_TOKEN holds a space, a line break or something that is not ASCII")


# -- the log -----------------------------------------------------------------------------------------


class Run:
    """One call of the tool: options, settings, console, log; named by its stamp."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(options.quiet)
        self.started = time.time()
        self.stamp = self._free_stamp()
        self.formatter = PlainFormatter()
        self.settings = ApiSettings(token="")
        self.halt = threading.Event()
        self.organisation = ""
        self.signal = 0

    @property
    def report_path(self) -> Path:
        return Path("reports") / f"merge_report_{self.stamp}.json"

    @property
    def log_path(self) -> Path:
        return Path("logs") / f"contact_merge_{self.stamp}.log"

    def _free_stamp(self) -> str:
        second = self.started
        while True:
            self.stamp = _stamp(second)
            if not (self.report_path.exists() or self.log_path.exists()):
                return self.stamp
            second += 1

    def open_log(self) -> None:
        """Log to a file and, with -v, to stderr. Raises Stop(3) where a real run can't log."""
        logging.raiseExceptions = False
        log.setLevel(logging.DEBUG)
        log.propagate = False
        shown = logging.StreamHandler(sys.stderr)
        shown.setLevel(logging.DEBUG if self.options.verbose else logging.WARNING)
        shown.addFilter(lambda record: record.levelno != logging.ERROR)  # the console has shown it already
        if not self.options.quiet:
            self._add_handler(shown)
        try:
            private_folder(self.log_path.parent)
            self._add_handler(
                logging.FileHandler(str(self.log_path), encoding="utf-8", errors="backslashreplace")
                if sys.version_info >= (3, 9)
                else logging.FileHandler(str(self.log_path), encoding="utf-8")
            )
        except OSError as error:
            if not self.options.preview:
                raise Stop(EXIT_STOPPED, f"the log can't be written: {error}") from None
            self.console.note(f"warning: the log can't be written: {error}")
        log.info("merge_contacts %s, Python %s on %s", __version__, sys.version.split()[0], sys.platform)

    def _add_handler(self, handler: logging.Handler) -> None:
        handler.setFormatter(self.formatter)
        log.addHandler(handler)

    def load_settings(self) -> None:
        self.settings = load_settings(load_environment(), self.options.workers)
        self.console.token = self.formatter.token = self.settings.token

    def ceiling(self) -> str:
        if not self.settings.calls:
            return "without a ceiling of the tool's own"
        return f"at {self.settings.calls} calls in {self.settings.period:g} s"


# -- the plan ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking, again and again, through what is being built and holds no cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def make_plan(run: Run, savepoint: Optional[SavePoint]) -> Plan:
    """Read, detect, and leave out what is not wanted or done already."""
    options = run.options
    with _no_collection():
        plan = detect(read_contacts(options.csv))
    if options.email:
        _keep_emails(plan, options.email, run.console)
    if savepoint:
        for group in plan.groups:
            savepoint.refresh(group)
        total = sum(len(group.pairs) for group in plan.groups)
        plan.already_merged = total - plan.count()
    if options.limit:
        _keep_first(plan, options.limit)
    for row in plan.invalid_rows:
        log.info("line %d left out: %s", row.line, row.reason)
    for skip in plan.skipped:
        log.info("%s skipped: %s", skip.email, skip.code)
    return plan


def _keep_emails(plan: Plan, emails: Sequence[str], console: Console) -> None:
    wanted = {email.strip().casefold() for email in emails}
    plan.groups = [group for group in plan.groups if group.email in wanted]
    plan.skipped = [skip for skip in plan.skipped if skip.email in wanted]
    found = {group.email for group in plan.groups} | {skip.email for skip in plan.skipped}
    for email in sorted(wanted - found):
        console.note(f"{email}: not in the CSV, or only one contact there: nothing to merge")


def _keep_first(plan: Plan, limit: int) -> None:
    """Keep whole groups with at most `limit` pairs in all; one that would not fit is passed over."""
    kept: List[Group] = []
    for group in plan.groups:
        size = sum(pair.state is not State.DONE for pair in group.pairs)
        if size and size <= limit:
            kept.append(group)
            limit -= size
    plan.groups = kept


def preview(run: Run) -> int:
    known = SavePoint(run.options.savepoint, readonly=True) if _has_content(run.options.savepoint) else None
    plan = make_plan(run, known)
    cost = estimate_plan(plan, run.settings, not run.options.no_timelines)
    if run.options.json:
        with contextlib.suppress(OSError, ValueError):
            for chunk in plan_chunks(plan, cost):
                sys.stdout.write(re.sub(r"[^\x00-\x7e]", lambda c: json.dumps(c.group())[1:-1], chunk.decode("utf-8")))
            sys.stdout.flush()
    else:
        show_plan(plan, run.console, cost, run.ceiling())
    return EXIT_OK


def _has_content(path: Path) -> bool:
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


# -- the real run ------------------------------------------------------------------------------------


def merge(run: Run) -> int:
    """Carry the plan out and report it; returns the exit code."""
    check_token(run.settings.token)
    savepoint = SavePoint(run.options.savepoint, run.stamp)
    try:
        plan = make_plan(run, savepoint)
        if not plan.count() and not savepoint.unfinished():
            return _report(run, plan, None, savepoint, EXIT_OK)
        run.console.status("connecting to DevRev ...")
        api = DevRevAPI(run.settings, run.halt)
        backups = Backups(Path("backups"), not run.options.no_timelines)
        progress = Progress(run)
        merger = ContactMerger(
            api,
            savepoint,
            backups,
            run.options.count_policy,
            run.options.merge_timeout,
            progress.on_pair,
            progress.on_tick,
        )
        try:
            unfinished = merger.identify(plan)
        except Stop as stop:
            if stop.exit_code != EXIT_STOPPED:
                raise
            merger.stop = stop
            return _report(run, plan, merger, savepoint, stop.exit_code)
        confirm(run, plan, merger, len(unfinished))
        savepoint.about("organisation", merger.organisation)
        with _signals(run):
            code = merger.run(plan, unfinished)
            run.console.status("")
            return _report(run, plan, merger, savepoint, run.signal + 128 if run.signal else code)
    finally:
        savepoint.close()


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run in good order, the second at once."""

    def handle(number: int, _frame: Any) -> None:
        if run.signal:
            os._exit(128 + number)
        run.signal = number
        run.halt.set()
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping: waiting for the requests that are under way (again to stop at once) ...\n")

    numbers = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def confirm(run: Run, plan: Plan, merger: ContactMerger, unfinished: int) -> None:
    """On a terminal: say what is about to happen, and go on only on a typed `merge`. Raises Stop(2) otherwise."""
    owner = merger.token_owner
    who = str(owner.get("display_name") or owner.get("full_name") or owner.get("email") or owner.get("id"))
    log.info("organisation %s, token of %s (%s)", merger.organisation, who, owner.get("id"))
    if run.options.yes or not sys.stdin.isatty():
        return
    say = run.console.say
    say(f"organisation  {merger.organisation} at {run.settings.base_url}")
    say(f"token of      {who}" + (f" <{owner['email']}>" if owner.get("email") else ""))
    say(
        f"to merge      {plural(plan.count(), 'pair')}"
        + (f", {unfinished} of an earlier run to finish first" if unfinished else "")
    )
    say(f"backups in    {Path('backups').resolve()}")
    say("A merge can't be undone.", "bold")
    try:
        answer = input("Type merge to go on, anything else to leave: ")
    except EOFError:
        answer = ""
    if answer.strip() != "merge":
        raise Stop(EXIT_USAGE, "not confirmed; nothing was changed")


class Progress:
    """Tells what a run is doing: a line a pair, a status line, or a log line now and then."""

    EVERY = 30.0  # seconds between lines where there is no terminal

    def __init__(self, run: Run) -> None:
        self.run = run
        self.begun = self.told = self.drawn = time.monotonic()
        self.recent: Deque[Tuple[float, int]] = collections.deque([(self.begun, 0)], maxlen=120)

    def on_pair(self, pair: Pair) -> None:
        console = self.run.console
        arrow = console.symbol("\u2190", "<-")
        names = f"{pair.email}: {pair.primary.short_id} {arrow} {pair.duplicate.short_id}"
        if pair.state is State.DONE:
            log.info("merged %s", names)
            line, style = f"merged  {names}" + (f", now {pair.new_ref}" if pair.new_ref else ""), ""
        else:
            log.info("failed %s: %s: %s", names, pair.code, pair.error)
            word = "UNFINISHED" if pair.state in UNFINISHED else "FAILED"
            line, style = f"{word}  {names}: {pair.code}: {pair.error}", "bad"
        if not self.run.options.quiet:
            console.say(line, style)

    def on_tick(self, merger: ContactMerger) -> None:
        now = time.monotonic()
        if now - self.drawn < 0.2:
            return
        self.drawn = now
        if now - self.recent[-1][0] >= 1:
            self.recent.append((now, sum(merger.api.requests.values())))
        line = self.line(merger, now)
        self.run.console.status(line)
        if now - self.told >= self.EVERY:
            self.told = now
            log.info("%s", line)
            if not self.run.options.quiet and not self.run.console.err.isatty():
                self.run.console.note(line)

    def line(self, merger: ContactMerger, now: float) -> str:
        done = merger.merged + merger.failed
        since, before = (
            self.recent[0] if now - self.recent[0][0] < 60 else next(r for r in self.recent if now - r[0] < 60)
        )
        rate = (sum(merger.api.requests.values()) - before) / max(1.0, now - since) * 60
        parts = [f"{done}/{merger.total} pairs"]
        if merger.under_way:
            parts.append(f"{merger.under_way} merging")
        if merger.failed:
            parts.append(f"{merger.failed} failed")
        parts.append(f"{rate:.0f} requests/min")
        parts.extend(filter(None, [merger.api.throttle.outlook()]))
        if done and done < merger.total:
            parts.append(f"about {duration((now - self.begun) / done * (merger.total - done))} left")
        return ", ".join(parts)


def _report(run: Run, plan: Plan, merger: Optional[ContactMerger], savepoint: SavePoint, code: int) -> int:
    """Write the report and print the summary; a full disk here makes the exit code 3."""
    stop = str(merger.stop) if merger and merger.stop and code >= EXIT_USAGE else None
    try:
        write_report(run.report_path, run_facts(run, merger, savepoint, code, stop), plan, merger, savepoint)
        written = True
    except (OSError, Stop) as error:
        run.console.error(f"the report can't be written: {error}")
        code, written = code if code >= EXIT_USAGE else EXIT_STOPPED, False
    if stop and not run.signal:
        run.console.error(stop)
    show_summary(run, plan, merger, savepoint, written)
    if code >= EXIT_STOPPED:
        run.console.note(f"Stopped early. Run the same command again to go on from {run.options.savepoint}.", "bold")
    elif code == EXIT_USAGE:
        run.console.note("Nothing was changed in DevRev.")
    log.info("exit code %d", code)
    return code


def run_facts(run: Run, merger: Optional[ContactMerger], savepoint: SavePoint, code: int, stop: Optional[str]) -> Json:
    """The report's `run`."""
    owner = merger.token_owner if merger else {}
    requests = dict(sorted(merger.api.requests.items())) if merger else {}
    waits = merger.api.throttle.waits if merger else []
    options = run.options
    return {
        "version": __version__,
        "csv": str(options.csv),
        "csv_sha256": _sha256(options.csv),
        "base_url": run.settings.base_url,
        "organisation": merger.organisation if merger else savepoint.about("organisation"),
        "token_owner": {name: owner.get(name) for name in ("id", "display_name", "email")},
        "options": {
            "email": options.email, "limit": options.limit, "count_policy": options.count_policy,
            "merge_timeout": options.merge_timeout, "workers": options.workers, "savepoint": str(options.savepoint),
            "timelines": not options.no_timelines, "rate_limit": [run.settings.calls, run.settings.period],
        },
        "start": _iso(run.started),
        "end": now_iso(),
        "exit_code": code,
        "stopped": ("interrupted" if run.signal else stop),
        "requests": requests,
        "requests_total": sum(requests.values()),
        "quota_wait_seconds": round(sum(end - start for start, end in waits), 3),
        "quota_waits": [{"start": _iso(start), "end": _iso(end)} for start, end in waits if end - start > 0.5],
        "log": str(run.log_path),
    }  # fmt: skip


def _iso(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, timezone.utc).isoformat(timespec="milliseconds")


def _sha256(path: Path) -> Optional[str]:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def show_summary(run: Run, plan: Plan, merger: Optional[ContactMerger], savepoint: SavePoint, written: bool) -> None:
    say = run.console.say
    facts = summarise(plan, merger)
    if not merger:
        done, skipped = plural(plan.already_merged, "pair"), plural(len(plan.skipped), "group")
        say(f"Nothing to do: {done} already merged, {skipped} skipped.")
    else:
        say()
        say(
            f"merged   {facts['successful_merges']} of {plural(merger.total, 'pair')}",
            "good" if not merger.failed else "bold",
        )
        left = merger.total - merger.merged - merger.failed
        if merger.failed:
            say(f"failed   {merger.failed}", "bad")
            _show_failures(run.console, savepoint)
        if left:
            say(f"left     {left} not begun")
        if plan.already_merged:
            say(f"before   {plan.already_merged} merged by earlier runs")
        if plan.skipped:
            say(f"skipped  {plural(len(plan.skipped), 'group')} (--preview says why)")
        say(f"cost     {plural(sum(merger.api.requests.values()), 'request')}, {duration(time.time() - run.started)}")
    if written:
        page = run.report_path.with_suffix(".html")
        say(f"report   {run.report_path}" + (f", to read: {page}" if page.exists() else ""))


def _show_failures(console: Console, savepoint: SavePoint) -> None:
    by_code: Dict[str, List[str]] = collections.defaultdict(list)
    counts: Dict[str, int] = collections.Counter()
    for pair, _ in savepoint.of_run(done=False):
        counts[pair.code] += 1
        if counts[pair.code] <= 5:
            by_code[pair.code].append(pair.email)
    for code, emails in sorted(by_code.items()):
        more = f" and {counts[code] - len(emails)} more" if counts[code] > len(emails) else ""
        console.say(f"  {counts[code]} {code}: {', '.join(emails)}{more}")
        console.say(f"    what to do: {ADVICE.get(code, 'see the report')}")


# -- check, status, verify ---------------------------------------------------------------------------


def check(run: Run) -> int:
    """Say whether a real run could start: token, organisation, read access, quota, disk, savepoint."""
    failed = 0

    def tell(name: str, work: Callable[[], str]) -> None:
        nonlocal failed
        try:
            run.console.say(f"ok      {name}: {work()}")
        except (Stop, PairError, OSError) as error:
            failed += 1
            log.info("check of %s: %s", name, error)
            run.console.say(f"FAILED  {name}: {error}", "bad")

    api: List[DevRevAPI] = []
    tell("token", lambda: _check_token(run, api))
    if api:
        if run.options.csv:
            tell("csv", lambda: _check_csv(run))
        for name, work in read_checks(api[0]).items():
            tell(name, work)
        run.console.say(
            f"note    quota: {api[0].throttle.outlook() or 'the server says nothing about it'}, {run.ceiling()}"
        )
    tell("savepoint", lambda: _check_savepoint(run.options.savepoint))
    tell("disk", _check_disk)
    run.console.say(
        "note    the permission to merge (rev_user:all) can't be tried without merging: --limit 1 is the first proof"
    )
    return EXIT_USAGE if failed else EXIT_OK


def _check_token(run: Run, apis: List[DevRevAPI]) -> str:
    check_token(run.settings.token)
    api = DevRevAPI(run.settings, run.halt)
    owner = api.whoami()
    run.organisation = organisation_of(str(owner.get("id")))
    apis.append(api)
    return f"of {owner.get('display_name') or owner.get('id')}, organisation {run.organisation or 'unknown'}"


def _check_csv(run: Run) -> str:
    plan = detect(read_contacts(run.options.csv))
    check_organisation(run.organisation, "CSV", plan.pairs())
    return f"{plural(plan.count(), 'pair')} to merge, of the token's organisation"


def read_checks(api: DevRevAPI) -> Dict[str, Callable[[], str]]:
    """One cheap request an endpoint that the backup needs."""
    seen: List[str] = []

    def first(endpoint: str, key: str, body: Json) -> Callable[[], str]:
        def work() -> str:
            items = api.peek(endpoint, key, body)
            seen.extend(item["id"] for item in items if endpoint != "rev-users.list")
            return "readable"

        return work

    def timelines() -> str:
        if not seen:
            return "nothing there to try it on"
        api.peek("timeline-entries.list", "timeline_entries", {"object": seen[0]})
        return "readable"

    return {
        "contacts": first("rev-users.list", "rev_users", {}),
        "works": first("works.list", "works", {"type": ["ticket", "issue"]}),
        "conversations": first("conversations.list", "conversations", {}),
        "timelines": timelines,
    }


def _check_savepoint(path: Path) -> str:
    if not path.exists():
        if not os.access(str(path.resolve().parent), os.W_OK):
            raise Stop(EXIT_USAGE, f"{path.resolve().parent} can't be written to")
        return f"{path} will be created"
    savepoint = SavePoint(path)
    try:
        return f"{path} is free, {plural(len(savepoint.unfinished()), 'unfinished pair')}"
    finally:
        savepoint.close()


def _check_disk() -> str:
    free = shutil.disk_usage(".").free
    if free < 100 << 20:
        raise OSError(f"only {free >> 20} MiB free")
    return f"{free >> 20:,} MiB free"


def status(run: Run) -> int:
    """Print what the savepoint knows; also while a run is going on."""
    path = run.options.savepoint
    say = run.console.say
    if not _has_content(path):
        say(f"{path}: nothing was merged with it yet")
        return EXIT_OK
    savepoint = SavePoint(path, readonly=True)
    try:
        holder = savepoint.holder()
        say(
            f"{path}: organisation {savepoint.about('organisation') or 'unknown'}, last opened {holder['since']} "
            f"by process {holder['pid']} on {holder['host']}"
        )
        for name, count in savepoint.counts().items():
            say(f"{count:>7,} {name}")
        for title, states in (("unfinished", UNFINISHED), ("failed", (State.FAILED,))):
            for pair, created, updated in savepoint.rows(*states):
                why = f"{pair.code}: {pair.error}" if pair.code else f"{pair.state.value}"
                names = f"{pair.primary.short_id} <- {pair.duplicate.short_id}"
                say(f"{title}  {pair.email}: {names}, since {created}, last {updated}: {why}")
    finally:
        savepoint.close()
    return EXIT_OK


def verify_backups(run: Run) -> int:
    """Re-read every backup below a folder against its manifest; 1 where one is damaged or missing."""
    root: Path = run.options.verify_backups
    if not root.is_dir():
        raise Stop(EXIT_USAGE, f"{root} is not a folder")
    whole = damaged = 0
    for folder in sorted(_backup_folders(root)):
        run.console.status(f"{whole + damaged} backups read ...")
        try:
            read_backup(folder)
            whole += 1
        except PairError as error:
            damaged += 1
            run.console.say(f"DAMAGED  {error}", "bad")
    run.console.status("")
    for left in sorted(root.glob(f"**/{Backups.INCOMPLETE}*")):
        run.console.say(f"note     {left}: begun and never finished by a run that was killed; may be deleted")
    missing = _missing_backups(run, root)
    run.console.say(
        f"{plural(whole, 'whole backup')}, {damaged} damaged, {missing} missing",
        "bad" if damaged or missing else "good",
    )
    return EXIT_FAILED if damaged or missing else EXIT_OK


def _backup_folders(root: Path) -> Iterator[Path]:
    """Every folder named like a backup, and `root` itself where it is one."""
    stamped = re.compile(r"\d{8}_\d{6}$")
    if stamped.match(root.name) or (root / "manifest.json").exists():
        yield root
        return
    for folder, names, _ in os.walk(str(root)):
        yield from (Path(folder) / name for name in names if stamped.match(name))
        names[:] = [name for name in names if not stamped.match(name) and not name.startswith(Backups.INCOMPLETE)]


def _missing_backups(run: Run, root: Path) -> int:
    """Backups that the savepoint knows of and that are not below `root` any more."""
    path = run.options.savepoint
    if root != Path("backups") or not _has_content(path):
        return 0
    savepoint = SavePoint(path, readonly=True)
    try:
        gone = {pair.backup for pair, _, _ in savepoint.rows(*State) if pair.backup and not Path(pair.backup).is_dir()}
    finally:
        savepoint.close()
    for backup in sorted(gone):
        run.console.say(f"MISSING  {backup}", "bad")
    return len(gone)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse the command line, do what it says, and return the exit code."""
    options = parse_options(argv)
    os.umask(0o077)
    run = Run(options)

    def terminate(number: int, _frame: Any) -> None:
        run.signal = number
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        run.open_log()
        run.load_settings()
        work = next((work for name, work in MODES.items() if getattr(options, name)), merge)
        return work(run)
    except Stop as stop:
        run.console.status("")
        run.console.error(str(stop))
        return stop.exit_code
    except ImportError as error:
        run.console.error(f"the package {error.name} is missing: python -m pip install -r requirements.txt")
        return EXIT_USAGE
    except KeyboardInterrupt:
        run.console.status("")
        run.console.note("interrupted; nothing was changed")
        return 128 + (run.signal or signal.SIGINT)


MODES: Dict[str, Callable[[Run], int]] = {
    "preview": preview,
    "check": check,
    "status": status,
    "verify_backups": verify_backups,
}

if __name__ == "__main__":
    raise SystemExit(main())
