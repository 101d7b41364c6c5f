"""What is true in DevRev: contacts, works, conversations, timelines, and what merges make of them.

Objects are found by what they hold, and as they were a while ago. tests.fake.world serves an
organisation.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import re
import threading
from collections import Counter, defaultdict, deque
from typing import Any, Callable, Collection, Dict, Iterable, Iterator, Mapping, Sequence, Tuple

DEFAULT_PAGE = 50
LARGEST_PAGE = 100
LONG_AGO = -math.inf  # what was there before anybody looked at a clock
HALF_EMOJI = "\ud83d"  # a lone surrogate, as services that count in UTF-16 cut a text

USER_KINDS = ("devu", "revu", "svcacc", "sysu")
WORK_KINDS = ("issue", "ticket")
OTHER_WORK_KINDS = ("task", "incident", "opportunity")
ALL_WORK_KINDS = (*WORK_KINDS, *OTHER_WORK_KINDS)
ROLES = ("reported_by", "owned_by", "created_by")
SUMMARY = (
    "id", "display_id", "display_name", "full_name", "email", "state", "external_ref", "rev_org"
)  # fmt: skip
PREFIXES = {"ticket": "TKT", "issue": "ISS"}  # of display ids
USER_LISTS = ("owned_by", "reported_by", "members")

Thing = Dict[str, Any]
Key = Tuple[str, Any]
Filter = Tuple[str, Collection[str]]


class Record(Dict[str, Any]):
    """An object as the API answers it. Its table hears of every change, whoever makes it.

    What lies within it (a list of people) is replaced as a whole, never changed in place.
    """

    def __init__(self, table: Table, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.table = table

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *fields: Any, **more: Any) -> None:
        with self.table.lock:
            self.table.leave(self)
            super().update(*fields, **more)
            self.table.enter(self)


class Table(Dict[str, Record]):
    """Objects by id, oldest first."""

    REMEMBERED = 20_000  # changes

    def __init__(
        self,
        lock: Any,
        now: Callable[[], float],
        keys: Callable[[Mapping[str, Any]], Iterable[Key]],
        changed: Callable[[Record], None] = lambda record: None,
    ) -> None:
        super().__init__()
        self.lock = lock
        self.numbers: dict[str, int] = {}  # of objects that are gone, too
        self._now = now
        self._keys = keys
        self._changed = changed
        self._index: defaultdict[Key, set[str]] = defaultdict(set)
        self._log: deque[tuple[float, str, Thing | None]] = deque(maxlen=self.REMEMBERED)

    def __setitem__(self, object_id: str, fields: Mapping[str, Any]) -> None:
        with self.lock:
            if object_id in self:
                raise ValueError(f"{object_id} exists already")
            record = Record(self, fields)
            self._remember(object_id, None)
            self.numbers.setdefault(object_id, len(self.numbers))
            super().__setitem__(object_id, record)
            self.enter(record)

    def __delitem__(self, object_id: str) -> None:
        with self.lock:
            self.leave(self[object_id])
            super().__delitem__(object_id)

    def leave(self, record: Record) -> None:
        """Take a record out of the index, and remember what it was."""
        if self.get(record["id"]) is record:
            self._remember(record["id"], dict(record))
            for key in self._keys(record):
                self._index[key].discard(record["id"])

    def enter(self, record: Record) -> None:
        if self.get(record["id"]) is record:
            for key in self._keys(record):
                self._index[key].add(record["id"])
            self._changed(record)

    def find(self, filters: Sequence[Filter] = (), ago: float = 0.0) -> list[Thing]:
        """The objects that hold a value of every filter, oldest first, as they were a while ago."""
        before = self._before(self._now() - ago) if ago > 0 else {}
        wanted = [{(name, value) for value in values} for name, values in filters]
        ids = sorted(self._candidates(wanted) | before.keys(), key=self.numbers.__getitem__)
        things = [before[one] if one in before else self[one] for one in ids]
        return [
            thing
            for thing in things
            if thing and not any(one.isdisjoint(self._keys(thing)) for one in wanted)
        ]

    def _candidates(self, wanted: Sequence[set[Key]]) -> set[str]:
        if not wanted:
            return set(self)
        fewest = min(wanted, key=lambda keys: sum(len(self._index.get(key, ())) for key in keys))
        return set().union(*(self._index.get(key, ()) for key in fewest))

    def _before(self, moment: float) -> dict[str, Thing | None]:
        """What has changed since a moment, as it was then; None for what wasn't there yet."""
        found: dict[str, Thing | None] = {}
        for changed, object_id, was in reversed(self._log):
            if changed <= moment:
                break
            found[object_id] = was
        return found

    def _remember(self, object_id: str, was: Thing | None) -> None:
        now = self._now()
        if now > LONG_AGO:
            self._log.append((now, object_id, was))


def contact_keys(contact: Mapping[str, Any]) -> Iterator[Key]:
    email = contact.get("email")
    yield "email", email
    yield "email_lower", email and email.lower()
    yield "external_ref", contact.get("external_ref")
    for reference in contact.get("external_refs", ()):
        yield "external_ref", reference


def people_keys(thing: Mapping[str, Any]) -> Iterator[Key]:
    """What a work or a conversation is found by: its type, and everybody in it, by role."""
    yield "type", thing.get("type")
    for role in ("created_by", *USER_LISTS):
        people = thing.get(role, ())
        for person in [people] if role == "created_by" else people:
            yield role, person["id"]
            yield "anyone", person["id"]


class Organisation:
    """What is true, whatever a client was told.

    Contacts, works and conversations are kept just as the API answers them. A user's summary is one
    dictionary shared by everything the user appears in, so a changed reference shows everywhere.
    Times are those of `clock`, which a World brings along; before that everything was LONG_AGO.
    """

    # What DevRev does in one way or another; all of it may be changed at any time.
    ref_release = 0.0  # seconds for which a merged contact doesn't let go of its reference yet
    unique_references = "rev_org"  # nobody else in it, or in the whole "organisation", may have one
    unverified_keep_references = False  # whether theirs are nobody else's until they are deleted
    merge_joins: Collection[str] = ()  # fields with several values that a merge joins
    merge_moves_reference = False  # whether the primary gets the secondary's, unless DevRev made it
    visitors_verified = True  # whether a contact that the application's widget makes is

    def __init__(self, key: str = "SANDBOX1", partition: str = "dvrv-us-1") -> None:
        self.stuck_references: set[str] = set()  # that never leave the contact that had them
        self.unverified: set[str] = set()
        self.key = key
        self.partition = partition
        self.lock = threading.RLock()
        self.clock: Callable[[], float] = lambda: LONG_AGO
        self.moment: float | None = None  # in place of the clock, for what happens belatedly
        self.contacts = Table(self.lock, self.now, contact_keys, self._contact_changed)
        self.works = Table(self.lock, self.now, people_keys)
        self.conversations = Table(self.lock, self.now, people_keys)
        self.timelines: dict[str, list[Thing]] = {}
        self.deleted: dict[str, Thing] = {}  # contacts
        self.merges: list[tuple[str, str]] = []
        self.merged_into: dict[str, str] = {}
        self.merge_times: dict[str, float] = {}
        self.reference_times: defaultdict[str, list[tuple[float, str | None]]] = defaultdict(list)
        self._users_of: defaultdict[str, set[str]] = defaultdict(set)  # of a reference, at any time
        self.rev_orgs: dict[str, Thing] = {}
        self._summaries: dict[str, Thing] = {}
        self._numbers: dict[str, int] = Counter()
        self._minutes = itertools.count()
        self.dev_user = {
            "id": self.don("identity", "devu", "1"),
            "display_id": "DEVU-1",
            "display_name": "Dana Developer",
            "full_name": "Dana Developer",
            "email": "dana.developer@example.com",
            "state": "active",
            "created_date": "2023-01-01T00:00:00.000Z",
        }
        self._summarise("dev_user", self.dev_user)

    def now(self) -> float:
        return self.clock() if self.moment is None else self.moment

    def don(self, service: str, kind: str, key: object) -> str:
        """The id of an object, e.g. `don:core:dvrv-us-1:devo/SANDBOX1:ticket/7`."""
        return f"don:{service}:{self.partition}:devo/{self.key}:{kind}/{key}"

    # ----- what is added --------------------------------------------------------------------------

    def add_contact(
        self,
        key: str,
        email: str | None,
        external_ref: str | None = None,
        display_name: str | None = None,
        rev_org: str | None = "ACME",
        state: str = "active",
        created: str = "2024-01-01T00:00:00.000Z",
        verified: bool = True,
        **more: Any,
    ) -> str:
        """Add a contact, whose reference must be free; `account/KEY` is an account as rev org."""
        with self.lock:
            contact_id = self.don("identity", "revu", key)
            reference = "REVU-" + key if external_ref is None else external_ref
            org = {} if rev_org is None else {"rev_org": self._org_summary(rev_org)}
            holder = self.holder(org_id_of(org), reference)
            if holder is not None:
                raise ValueError(f"{reference} is held by {holder}")
            contact: Thing = {
                "id": contact_id,
                "display_id": "REVU-" + key,
                "display_name": display_name or (email or key).split("@")[0],
                "external_ref": reference,
                "state": state,
                **org,
                "created_date": created,
                "modified_date": created,
                "created_by": self._summaries[self.dev_user["id"]],
                **more,
            }
            if email is not None:
                contact["email"] = email
            if not verified:
                self.unverified.add(contact_id)
            self.contacts[contact_id] = contact  # type: ignore[assignment]
            return contact_id

    def new_contact(
        self, email: str | None, reference: str | None, rev_org: str | None = "ACME", **more: Any
    ) -> str:
        self._numbers["revu"] += 1
        key, now = f"N{self._numbers['revu']}", self._now()
        return self.add_contact(key, email, reference, rev_org=rev_org, created=now, **more)

    def visit(self, email: str, reference: str, rev_org: str | None = "ACME") -> str:
        """The application identifies somebody: who holds the reference, or a new contact."""
        with self.lock:
            holder = self.holder(rev_org and self._org_summary(rev_org)["id"], reference)
            if holder is not None:
                return self.survivor(holder)
            return self.new_contact(email, reference, rev_org, verified=self.visitors_verified)

    def add_work(
        self,
        owned_by: Iterable[str] = (),
        created_by: str | None = None,
        reported_by: Iterable[str] = (),
        kind: str = "ticket",
        title: str | None = None,
        comments: int = 0,
    ) -> str:
        """Add a work and return its id. A dev user fills the roles nobody has."""
        work = self._new_object(kind, PREFIXES.get(kind, kind[:4].upper()), created_by)
        work.update(
            type=kind,
            title=title or f"About {work['display_id']}",
            body=f"What {work['display_id']} is about, in a sentence or two.",
            stage={"name": "queued"},
            owned_by=self.people(owned_by) or self.people([self.dev_user["id"]]),
            reported_by=self.people(reported_by),
        )
        return self._add(self.works, work, comments)

    def add_conversation(self, members: Iterable[str] = (), comments: int = 0) -> str:
        people = list(members)
        talk = self._new_object("conversation", "CONV", people[0] if people else None)
        talk.update(
            title=f"Talk {talk['display_id']}",
            stage={"name": "new"},
            source_channel="plug",
            members=self.people(people),
            owned_by=self.people([self.dev_user["id"]]),
        )
        return self._add(self.conversations, talk, comments)

    def add_comment(self, object_id: str, body: str, created_by: str | None = None) -> str:
        parent = self.table_of(object_id)[object_id]
        entries = self.timelines.setdefault(object_id, [])
        number, now = len(entries) + 1, self._now()
        entry = {
            "type": "timeline_comment",
            "id": f"{object_id}:comment/{number}",
            "display_id": f"COMMENT-{number}",
            "object": object_id,
            "object_display_id": parent["display_id"],
            "object_type": kind_of(object_id),
            "visibility": "external",
            "body": body,
            "body_type": "text",
            "created_by": self._summaries[created_by or self.dev_user["id"]],
            "created_date": now,
            "modified_date": now,
        }
        entries.append(entry)
        return str(entry["id"])

    # ----- what is changed ------------------------------------------------------------------------

    def merge(self, primary: str, secondary: str, leave_behind: Collection[str] = ()) -> None:
        """Carry out a merge at once: the secondary's roles move, its reference becomes free."""
        with self.lock:
            if primary == secondary or not (self.alive(primary) and self.alive(secondary)):
                raise ValueError(f"{secondary} can't be merged into {primary}")
            for table in (self.works, self.conversations):
                for thing in table.find([("anyone", [secondary])]):
                    if thing["id"] not in leave_behind:
                        self._hand_over(thing, secondary, primary)
            if self.merge_joins:
                self._join(self.contacts[primary], self.contacts[secondary])
            self.merged_into[secondary] = primary
            self.merge_times[secondary] = self.now()
            self.merges.append((primary, secondary))
            self.contacts[secondary]["state"] = "deleted"
            reference = self.contacts[secondary].get("external_ref", "")
            if self.merge_moves_reference and reference and reference != own_reference(secondary):
                self.change(self.contacts[primary], external_ref=reference)

    def change(self, thing: Thing, **fields: Any) -> None:
        thing.update(fields, modified_date=self._now())

    def give(self, object_id: str, role: str, user_ids: Iterable[str]) -> None:
        thing = self.table_of(object_id)[object_id]
        self.change(thing, **{role: self.people(user_ids)})

    def delete_contact(self, contact_id: str) -> None:
        """Delete a contact; what it had a role in goes on naming it."""
        with self.lock:
            self.deleted[contact_id] = dict(self.contacts[contact_id])
            del self.contacts[contact_id]

    def delete_work(self, object_id: str) -> None:
        self.timelines.pop(object_id, None)
        del self.table_of(object_id)[object_id]

    # ----- what is so -----------------------------------------------------------------------------

    def table_of(self, object_id: str) -> Table:
        return self.conversations if kind_of(object_id) == "conversation" else self.works

    def alive(self, contact_id: str) -> bool:
        return contact_id in self.contacts and contact_id not in self.merged_into

    def survivor(self, contact_id: str) -> str:
        """Who the contact is now, after any number of merges."""
        while contact_id in self.merged_into:
            contact_id = self.merged_into[contact_id]
        return contact_id

    def holder(self, rev_org_id: str | None, reference: str) -> str | None:
        """The contact that holds a reference in a rev org, or doesn't let go of it yet."""
        had = [one["id"] for one in self.contacts.find([("external_ref", [reference])])]
        ids = {one for one in had if self._holds_on(one, reference)}
        if self.unverified_keep_references:
            ids |= self._users_of[reference] & self.unverified & self.contacts.keys()
        for contact_id in sorted(ids, key=self.contacts.numbers.__getitem__):
            same = org_id_of(self.contacts[contact_id]) == rev_org_id
            if same or self.unique_references == "organisation":
                return str(contact_id)
        return None

    def people(self, ids: Iterable[str]) -> list[Thing]:
        """The summaries of users; KeyError for one who doesn't exist."""
        return [self._summaries[user_id] for user_id in dict.fromkeys(ids)]

    def _holds_on(self, contact_id: str, reference: str) -> bool:
        if self.alive(contact_id) or reference in self.stuck_references:
            return True
        return self.now() < self.merge_times[contact_id] + self.ref_release

    def _contact_changed(self, contact: Record) -> None:
        self._summarise("rev_user", contact)
        times = self.reference_times[contact["id"]]
        if not times or times[-1][1] != contact.get("external_ref"):
            times.append((self.now(), contact.get("external_ref")))
            self._users_of[contact.get("external_ref", "")].add(contact["id"])

    def _join(self, primary: Record, secondary: Record) -> None:
        joined = {}
        for name in self.merge_joins:
            values = list(primary.get(name, ()))
            values += [one for one in secondary.get(name, ()) if one not in values]
            if values:
                joined[name] = values
        self.change(primary, **joined)

    def _hand_over(self, thing: Thing, secondary: str, primary: str) -> None:
        changes: Thing = {}
        for role in USER_LISTS:
            ids = [person["id"] for person in thing.get(role, ())]
            if secondary in ids:
                changes[role] = self.people(primary if i == secondary else i for i in ids)
        if thing["created_by"]["id"] == secondary:
            changes["created_by"] = self._summaries[primary]
        self.change(thing, **changes)

    def _summarise(self, kind: str, user: Mapping[str, Any]) -> None:
        summary = self._summaries.setdefault(user["id"], {"type": kind})
        summary.update({name: user[name] for name in SUMMARY if name in user})

    def _org_summary(self, key: str) -> Thing:
        kind, prefix = ("account", "ACC-") if key.startswith("account/") else ("revo", "REV-")
        key = key.rpartition("/")[2]
        org_id = self.don("identity", kind, key)
        names = {"display_id": prefix + key, "display_name": key.capitalize()}
        return self.rev_orgs.setdefault(org_id, {"type": "rev_org", "id": org_id, **names})

    def _new_object(self, kind: str, prefix: str, created_by: str | None) -> Thing:
        self._numbers[kind] += 1
        now = self._now()
        return {
            "id": self.don("core", kind, self._numbers[kind]),
            "display_id": f"{prefix}-{self._numbers[kind]}",
            "created_by": self._summaries[created_by or self.dev_user["id"]],
            "created_date": now,
            "modified_date": now,
        }

    def _add(self, table: Table, thing: Thing, comments: int) -> str:
        thing_id, creator = str(thing["id"]), thing["created_by"]["id"]
        table[thing_id] = thing  # type: ignore[assignment]
        self.timelines[thing_id] = []
        for n in range(1, comments + 1):
            body = f"Reply {n} on {thing['display_id']}."
            self.add_comment(thing_id, body, creator if n % 2 else None)
        return thing_id

    def _now(self) -> str:
        start = datetime.datetime(2024, 7, 1)
        moment = start + datetime.timedelta(minutes=next(self._minutes))
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


ID = re.compile(
    r"don:(?:core|identity):(?P<partition>dvrv-[\w-]+):devo/(?P<org>[\w.-]+)"
    r":(?P<kind>[a-z_]+)/(?P<key>[\w.-]+)",
    re.ASCII,
)


def own_reference(contact_id: str) -> str:
    """The reference that DevRev makes of a contact's id where none was given."""
    return "REVU-" + contact_id.rpartition("/")[2]


def org_id_of(contact: Mapping[str, Any]) -> str | None:
    return str(contact["rev_org"]["id"]) if "rev_org" in contact else None


@functools.lru_cache(maxsize=65536)
def kind_of(object_id: str) -> str | None:
    """`ticket` of `don:core:dvrv-us-1:devo/SANDBOX1:ticket/7`; None for what is no id."""
    found = ID.fullmatch(object_id)
    return found.group("kind") if found else None
