"""A second opinion, without the module: what an export gives, what the savepoint's two files know
together, what was true lately, and what is in a backup."""

import contextlib
import datetime
import json
import re
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import (
    Any,
    DefaultDict,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from tests.fake.organisation import Organisation, Table, Thing
from tests.simulation.world import ROW, short, stored_row

Ids = Tuple[str, str]  # primary, duplicate
ROLES = {"owned": "owned_by", "created": "created_by", "reported": "reported_by"}
ALL_ROLES = (*ROLES.values(), "members")
MAIN, COPY = Path("savepoint.db"), Path("backups") / "savepoint-copy.db"
UNFINISHED = ("requested", "acknowledged", "merged", "proving")
ENDED = ("done", "merged_elsewhere", "settled")
UNDONE = ("undone", "undo_settled")
TERMINAL = (*ENDED, "cancelled", *UNDONE)
AUTHORITY = (
    "planned",
    "failed",
    *UNFINISHED,
    *ENDED,
    "undoing",
    "cancelled",
    "undo_settled",
    "undone",
)
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


def name_of(ids: Ids) -> str:
    return f"{short(ids[0])} <- {short(ids[1])}"


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
    new_ref: Optional[str]

    @property
    def ids(self) -> Ids:
        return self.primary.id, self.duplicate.id


def email_key(text: str) -> str:
    """Lower-case the ASCII letters of an address, and nothing else."""
    return re.sub("[A-Z]+", lambda found: found.group().lower(), text.strip())


def takes_part(reference: Any) -> bool:
    return str(reference).startswith(("REVU-", "user_"))


def most_contacts(email: str) -> int:
    """Return how many contacts of one address are believed to be one person."""
    local = email_key(email).partition("@")[0].partition("+")[0].lower()
    return 1 if local in PLACEHOLDERS.split() else 2 if local in ROLE_ADDRESSES.split() else 3


def instant(created: str) -> float:
    """Return a date as epoch seconds; without a zone it is in UTC."""
    time, zone = created.strip()[:19].replace("T", " "), created.strip()[19:]
    zone = re.sub(r"^\.\d+| ", "", zone) or "Z"
    return datetime.datetime.strptime(f"{time} {zone}", "%Y-%m-%d %H:%M:%S %z").timestamp()


def groups_of(rows: Iterable[Row]) -> Dict[str, List[Row]]:
    """Return the contacts of each address that take part."""
    groups: DefaultDict[str, List[Row]] = defaultdict(list)
    for row in rows:
        if row.takes_part:
            groups[row.key].append(row)
    return groups


def plan_of(
    rows: Iterable[Row], choices: Mapping[str, str], primary_kind: str = "revu"
) -> Dict[Ids, Wanted]:
    """Return the merges that an export asks for."""
    found: Dict[Ids, Wanted] = {}
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
                wanted = Wanted(primary, row, row.ref if row is kept else None)
                found[wanted.ids] = wanted
    return found


def export_of(organisation: Organisation) -> List[Row]:
    """Return what the query of the warehouse would give now."""
    there = [one for one in organisation.contacts.values() if organisation.alive(one["id"])]
    return [
        Row(
            one["id"],
            one["email"],
            one["external_ref"],
            greatest(organisation, one["id"]),
            one["created_date"],
        )
        for one in there
        if one.get("email") and one.get("external_ref")
    ]


def greatest(organisation: Organisation, contact: str) -> int:
    """Return a contact's TICKET_COUNT: tickets and issues, in the role in which it has most."""
    kinds = [("type", ("ticket", "issue"))]
    return max(len(organisation.works.find([*kinds, (role, [contact])])) for role in ROLES.values())


class StoredFile(NamedTuple):
    """What one of the savepoint's files holds."""

    rows: Dict[Ids, Dict[str, Any]]
    runs: Dict[str, Dict[str, Any]]
    last_write: int


def read_file(path: Path) -> Optional[StoredFile]:
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


def joined(main: Optional[StoredFile], copy: Optional[StoredFile]) -> Dict[Ids, Dict[str, Any]]:
    """Return the rows that both files know together: of each pair, the one that was written last.

    One that knows of a request does not lose to one that doesn't.
    """
    found: Dict[Ids, Dict[str, Any]] = {}
    for file in (main, copy):
        for ids, row in file.rows.items() if file else ():
            if ids not in found:
                found[ids] = row
                continue
            loser, winner = sorted((found[ids], row), key=authority)
            is_idle = winner["state"] in ("planned", "failed") and not winner["requested_at"]
            if is_idle and loser["requested_at"]:
                winner = {**loser, "revision": winner["revision"]}
            found[ids] = winner
    return found


def authority(row: Mapping[str, Any]) -> Tuple[int, int, float]:
    return row["revision"], AUTHORITY.index(row["state"]), row["requested_at"]


def changes(table: Table, since: float) -> Iterator[Tuple[str, Optional[Thing]]]:
    """Yield what objects were before each change since a moment, the latest first."""
    for changed, object_id, was in reversed(table._log):
        if changed < since:
            return
        yield object_id, was


def versions(table: Table, object_id: str, since: float) -> List[Optional[Thing]]:
    """Return what an object was at any time since a moment, the latest first."""
    before = [was for changed, was in changes(table, since) if changed == object_id]
    return [table.get(object_id), *before]


def people_of(thing: Optional[Thing], roles: Sequence[str] = ALL_ROLES) -> Iterator[Thing]:
    """Yield everybody who has one of these roles in a work or a conversation."""
    for role in roles:
        people = (thing or {}).get(role) or ()
        yield from [people] if isinstance(people, dict) else people


def held(thing: Optional[Thing], role: str, person: str) -> bool:
    return any(one["id"] == person for one in people_of(thing, [role]))


def holdings(table: Table, role: str, person: str, since: float) -> Tuple[Set[str], Set[str]]:
    """Return the ids of what a person has held in a role all the time since a moment, and ever."""
    ever = {thing["id"] for thing in table.find([(role, [person])])}
    always = set(ever)
    for object_id, was in changes(table, since):
        if held(was, role, person):
            ever.add(object_id)
        else:
            always.discard(object_id)
    return always, ever


def table_of(organisation: Organisation, object_id: str) -> Table:
    is_talk = ":conversation/" in object_id
    return organisation.conversations if is_talk else organisation.works


def holders(organisation: Organisation, *references: str) -> List[str]:
    """Return the contacts that exist and have one of these references."""
    found = organisation.contacts.find([("external_ref", references)])
    return [one["id"] for one in found if organisation.alive(one["id"])]


def entries_of(backup: Optional[str]) -> Dict[str, Any]:
    """Return the entries of a backup's manifest, by contact; nothing where it is not there."""
    path = Path(backup or "nowhere") / "manifest.json"
    manifest = json.loads(path.read_bytes()) if path.exists() else {}
    return {one["csv"]["id"]: one for one in manifest.get("contacts", ())}


def in_backup(entry: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """Return what a merge has to transfer of a contact in a manifest: object id and role."""
    items = [(work, ROLES[role]) for role in ("owned", "reported") for work in entry["works"][role]]
    return items + [(talk, "members") for talk in entry["conversations"]]
