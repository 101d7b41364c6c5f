"""A second opinion, without the module: what an export gives, what the savepoint's two files know
together, what was true lately, and what is in a backup."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping, NamedTuple, Sequence, Tuple

from tests.fake.organisation import Organisation, Table, Thing, kind_of
from tests.simulation.world import ROW, stored_row

NEVER = -1e9
Ids = Tuple[str, str]  # primary, duplicate
Document = Dict[str, Any]
Rows = Dict[Ids, Document]  # of the savepoint
ROLES = {"owned": "owned_by", "created": "created_by", "reported": "reported_by"}
ALL_ROLES = (*ROLES.values(), "members")
MAIN, COPY = Path("savepoint.db"), Path("backups") / "savepoint-copy.db"
UNFINISHED = ("requested", "acknowledged", "merged", "proving")
ENDED = ("done", "merged_elsewhere", "settled")
UNDONE = ("undone", "undo_settled")
TERMINAL = (*ENDED, "cancelled", *UNDONE)
# Which of two files wins: the later of these states.
AUTHORITY = ("planned", "failed", *UNFINISHED, *ENDED, "undoing", "cancelled", *UNDONE[::-1])
STOPPING = ("cancelled", *UNDONE)  # a pair in such a state is merged again only where it is named
ROLE_ADDRESSES = """
    info support help helpdesk service sales contact hello office team admin administrator billing
    accounts accounting finance hr jobs careers marketing press media legal privacy security abuse
    postmaster hostmaster webmaster root mail email reception orders booking bookings
    customerservice customer-service customercare feedback
"""
PLACEHOLDERS = """
    noreply no-reply no_reply donotreply do-not-reply none null nobody unknown anonymous test na n-a
    noemail no-email invalid
"""


class Row(NamedTuple):
    """One contact of an export."""

    id: str
    email: str
    ref: str
    tickets: int
    created: str

    @property
    def key(self) -> str:
        return email_key(self.email)

    @property
    def takes_part(self) -> bool:
        return takes_part(self.ref)


class Wanted(NamedTuple):
    """One merge that an export asks for."""

    primary: Row
    duplicate: Row
    new_ref: str | None


Plan = Dict[Ids, Wanted]


def email_key(text: str) -> str:
    """Lower-case the ASCII letters of an address, and nothing else."""
    return re.sub("[A-Z]+", lambda found: found.group().lower(), text.strip())


def takes_part(reference: Any) -> bool:
    return str(reference).startswith(("REVU-", "user_"))


def most_contacts(email: str) -> int:
    """Return how many contacts of one address are believed to be one person."""
    local = email_key(email).partition("@")[0].partition("+")[0].lower()
    if local in PLACEHOLDERS.split():
        return 1
    return 2 if local in ROLE_ADDRESSES.split() else 3


def instant(created: str) -> float:
    """Return a date as epoch seconds; without a zone it is in UTC."""
    time, zone = created.strip()[:19].replace("T", " "), created.strip()[19:]
    zone = re.sub(r"^\.\d+| ", "", zone) or "Z"
    return datetime.datetime.strptime(f"{time} {zone}", "%Y-%m-%d %H:%M:%S %z").timestamp()


def groups_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the contacts of each address that take part."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.takes_part:
            groups[row.key].append(row)
    return groups


def plan_of(rows: Iterable[Row], choices: Mapping[str, str], primary_kind: str) -> Plan:
    found: Plan = {}
    for email, group in groups_of(rows).items():
        ranked = sorted(group, key=lambda row: (-row.tickets, instant(row.created), row.id))
        users = [row for row in ranked if row.ref.startswith("user_")]
        system = [row for row in ranked if row.ref.startswith("REVU-")]
        kept = next((row for row in users or system if row.ref == choices.get(email)), None)
        if kept is None and len(group) <= most_contacts(email) and len(users) == 1 and system:
            kept = users[0]
        if kept is None:
            continue
        primary = system[0] if kept in users and system and primary_kind == "revu" else kept
        for row in (*users, *system):
            if row is not primary:
                found[primary.id, row.id] = Wanted(primary, row, row.ref if row is kept else None)
    return found


def export_of(organisation: Organisation) -> list[Row]:
    """Return what the query of the warehouse would give now."""
    found = []
    for identity, one in organisation.contacts.items():
        if organisation.alive(identity) and one.get("email") and one.get("external_ref"):
            tickets = greatest(organisation, identity)
            row = Row(identity, one["email"], one["external_ref"], tickets, one["created_date"])
            found.append(row)
    return found


def greatest(organisation: Organisation, contact: str) -> int:
    """Return a contact's TICKET_COUNT: tickets and issues, in the role in which it has most."""
    kinds = ("type", ("ticket", "issue"))
    return max(len(organisation.works.find([kinds, (role, [contact])])) for role in ROLES.values())


class StoredFile(NamedTuple):
    """What one of the savepoint's files holds."""

    rows: Rows
    runs: dict[str, Document]
    last_write: int


def read_file(path: Path) -> StoredFile | None:
    """Read a file of the savepoint as whoever opens it next finds it; None where it has no tables.

    It is read in a copy, because SQLite rolls back what a killed run has left in the file.
    """
    if not path.exists() or not path.stat().st_size:
        return None
    with tempfile.TemporaryDirectory(dir=str(Path.cwd())) as folder:
        for tail in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(f"{path}{tail}", f"{folder}/{path.name}{tail}")
        with contextlib.closing(sqlite3.connect(f"{folder}/{path.name}")) as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return None
            pairs = db.execute(f"SELECT {', '.join(ROW)} FROM pairs").fetchall()
            runs = db.execute("SELECT id, revision, document FROM runs").fetchall()
    rows = {(row["primary_id"], row["duplicate_id"]): row for row in map(stored_row, pairs)}
    revisions = [row["revision"] for row in rows.values()] + [run[1] for run in runs]
    documents = {run: json.loads(document) for run, _, document in runs}
    return StoredFile(rows, documents, max(revisions, default=0))


def read_files() -> tuple[StoredFile | None, StoredFile | None]:
    return read_file(MAIN), read_file(COPY)


def runs_of(*files: StoredFile | None) -> set[str]:
    """Return the ids of all runs of which files know."""
    found: set[str] = set()
    for file in files:
        if file:
            found.update(file.runs, (row["run"] for row in file.rows.values()))
    return found


def pairs_in(rows: Rows, states: Iterable[str]) -> set[Ids]:
    return {ids for ids, row in rows.items() if row["state"] in states}


def joined(*files: StoredFile | None) -> Rows:
    """Return the rows that both files know together: of each pair, the one that was written last.

    One that knows of a request does not lose to one that doesn't.
    """
    known = [file.rows for file in files if file]
    found: Rows = {}
    for ids in chain(*known):
        *losers, winner = sorted((rows[ids] for rows in known if ids in rows), key=authority)
        is_idle = winner["state"] in ("planned", "failed") and not winner["requested_at"]
        if is_idle and losers and losers[0]["requested_at"]:
            winner = {**losers[0], "revision": winner["revision"]}
        found[ids] = winner
    return found


def authority(row: Document) -> tuple[int, int, float]:
    return row["revision"], AUTHORITY.index(row["state"]), row["requested_at"]


def run_of(report: str) -> str:
    """Return the id of a run, from the name of its report."""
    return report.partition(".")[0].partition("_report_")[2]


def changes(table: Table, since: float) -> Iterator[tuple[str, Thing | None]]:
    """Yield what objects were before each change since a moment, the latest first."""
    for changed, object_id, was in reversed(table._log):
        if changed < since:
            return
        yield object_id, was


def table_of(organisation: Organisation, identity: str) -> Table:
    """Return the table in which an object is, or was."""
    kind = kind_of(identity)
    if kind == "revu":
        return organisation.contacts
    return organisation.conversations if kind == "conversation" else organisation.works


def now_of(organisation: Organisation, identity: str) -> Thing | None:
    """Return an object as it is now; None where there is none any more."""
    return table_of(organisation, identity).get(identity)


def versions(organisation: Organisation, identity: str, since: float) -> list[Thing | None]:
    """Return what an object was at any time since a moment, the latest first: what it is now, and
    what it was before each change."""
    table = table_of(organisation, identity)
    return [table.get(identity), *(was for one, was in changes(table, since) if one == identity)]


def people_of(thing: Thing | None, roles: Sequence[str] = ALL_ROLES) -> Iterator[str]:
    """Yield everybody who has one of these roles in a work or a conversation."""
    for role in roles:
        people = (thing or {}).get(role) or ()
        people = [people] if isinstance(people, dict) else people
        yield from (one["id"] for one in people)


def held(thing: Thing | None, role: str, person: str) -> bool:
    return person in people_of(thing, [role])


def holdings(table: Table, role: str, person: str, since: float) -> tuple[set[str], set[str]]:
    """Return the ids of what a person has held in a role all the time since a moment, and ever."""
    ever = {thing["id"] for thing in table.find([(role, [person])])}
    always = set(ever)
    for object_id, was in changes(table, since):
        if held(was, role, person):
            ever.add(object_id)
        else:
            always.discard(object_id)
    return always, ever


def holders(organisation: Organisation, reference: str) -> list[str]:
    found = organisation.contacts.find([("external_ref", [reference])])
    return [one["id"] for one in found if organisation.alive(one["id"])]


def kept_numbers(been: Sequence[Thing | None]) -> set[str]:
    """Return the phone numbers that a contact has had all the time."""
    return set.intersection(*(set((one or {}).get("phone_numbers", ())) for one in been))


def entries_of(backup: str | None) -> Document:
    """Return the entries of a backup's manifest, by contact; nothing where it is not there."""
    path = Path(backup or "nowhere") / "manifest.json"
    manifest = json.loads(path.read_bytes()) if path.exists() else {}
    return {one["csv"]["id"]: one for one in manifest.get("contacts", ())}


def in_backup(entry: Document) -> list[tuple[str, str]]:
    """Return what a merge has to transfer of a contact in a manifest: object id and role."""
    works = entry["works"]
    items = [(work, "owned_by") for work in works["owned"]]
    items += [(work, "reported_by") for work in works["reported"]]
    return items + [(talk, "members") for talk in entry["conversations"]]
