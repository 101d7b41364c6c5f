"""What DevRev does, without sockets, threads or a clock of its own.

One implementation for two uses: `tests.sandbox` speaks it over HTTP on loopback, and a simulation calls it in
simulated time. It misbehaves on demand, and knows the truth afterwards: what was merged and when, which references
moved, and what every single request was. The same seed and the same calls give the same world.

    organisation = Organisation()
    primary = organisation.add_contact("1", "ada@example.com")
    secondary = organisation.add_contact("2", "ada@example.com", external_ref="user_2")
    world = World(organisation, clock=lambda: now)
    answer = world.respond("rev-users.merge", {"primary_user": primary, "secondary_user": secondary}, world.token)

What is known of DevRev only either way is a switch; each stands for the behaviour that most tests want. Any text may
hold half an emoji (HALF_EMOJI): answers carry it as the JSON escape that it is.

Merges (of a World, like all below unless an Organisation is named):
    merge_delay           seconds from a merge's acknowledgement until it is carried out
    merge_answer          the acknowledgement: 200, 202, 204, 200-empty and 202-empty (no body), 200-other, 200-list
    in_progress           status of a request for a merge that is pending already: 200, 400, 403 or 409
    unverified_merge      an unverified contact into a verified one: works, never (acknowledged), 400, 403, 409
    verified_merge        a verified contact into an unverified one: the same
    gone                  how rev-users.get answers for a contact that was merged, while lists tell the truth: 404, 301
                          (Location: the primary), state (deleted), primary (its record), shadow or unassigned (with a
                          primary_identity); and for good what tells nothing: locked, stale (as before the merge),
                          404-route, 404-other (of another type), 400, 403, 410, 500, 502, 503, shape, empty, hang, drip
                          stays: as what `stays` leaves
    gone_of               the same for single contacts, by id
    stays                 what a merged contact is afterwards, in lists and (with gone="stays") by its id: "" (gone),
                          locked, shadow, archived, deactivated, no-email, no-reference, own-reference, bare (neither),
                          as-before
    merge_jobs            how many merges DevRev carries out at a time; another is refused with busy_status (400, 409,
                          423, 425) and "try again later"
    gone_seconds          seconds of hang, and of each byte of drip
    moved_to, location    another base of the Location that a 301 names; the whole Location, which may be no URL
    Organisation.merge_moves_reference whether a merge gives the primary the secondary's reference (not a REVU-)
    Organisation.merge_joins           fields with several values that a merge joins, e.g. phone_numbers
Contacts:
    verified_shown        is_verified in answers: hidden, shown, null, mixed (contact by contact)
    verified_filter       is_verified as a filter: accepted, 400, 403
    hidden_fields         fields that answers leave out, e.g. external_refs, tags, custom_fields, phone_numbers
    refused_fields        fields that can't be set, everywhere or as e.g. rev-users.update.phone_numbers
    refused_status        the status of that: 400 (which names the field), 403, 409, …
    reference_updates     what an update of a reference is answered with: works, 400, 403, 409
    unchanged_updates     status of an update that changes nothing: 200, 400
    reference_lag         seconds for which answers (but an update's own) show a contact's former reference
    puts_back             how often something puts a contact's former reference back after an update (inf: always),
    puts_back_after       so many seconds later
    vanished              ids of contacts for which all is as if they did not exist; "*" for all
    account_rev_orgs      whether a contact can be made in a rev org that is an account
    unique_emails         whether a contact can't be made with an email that another has
    email_ignores_case    whether the filter email ignores case
    deleted_listed        whether lists show deleted and merged contacts
    deleted_contacts      how a deleted contact answers: 404, state
    Organisation.unverified            ids of contacts that are not verified (add_contact(verified=False))
    Organisation.visitors_verified     whether a contact that the application's widget makes is verified
    Organisation.unique_references     where a reference is unique: rev_org, organisation
    Organisation.unverified_keep_references  whether an unverified contact's reference stays its own until deleted
    Organisation.stuck_references, ref_release  references that merged contacts never, or only later, let go of
Lists:
    list_lag              seconds that lists of contacts, works and conversations lag behind
    max_ids               how many ids a filter may name
    thin_lists            patterns of the lists that have empty pages
    empty_pages           how many come before each page with items, or a function of endpoint and position
    largest_page          the most items of a page, whatever the limit that was asked for
    trailing_page         whether a list ends with an empty page
    paging                cursor; again (a page comes a second time in place of the next), overlap (each page begins with
                          the last item of the one before), offset (a list that changes while it is read shifts)
    paging_lists, paging_times   patterns of the lists of which that is so; how often it goes wrong (None: always)
    cursor_life           seconds after which a cursor is refused
Works:
    long_work_types       whether tasks, incidents and opportunities are listed and may be asked for
    unknown_kinds         kinds of these that `type` does not know all the same, e.g. incident
    unknown_kinds_answer  400 (with allowed_values and value), 400-bare, 403: of a list that names a kind it does not know
    hidden_kinds          kinds that the token may not read: of works, or conversation
    hidden_kinds_answer   a list that asks for such a kind: 403, left out
Refusals:
    bad_token             the type of the 401 for another token
    forbidden             patterns of endpoints that the token may not use
    restricted            ids of objects for which every request that names them is 403
    restricted_timelines, restricted_writes  ids whose timeline, or whose change, is 403
    restricted_in_lists   a list that would show a restricted object: shown, left out, 403
    names_object_ids      whether such a 403 names them
    firewall              words; a request with one of them is refused in HTML, with firewall_status (403, 406)
    max_bytes             of a request, more is 413
Quota:
    quota_rolls           whether the window rolls, its reset always a window after the request
    quota_whole_seconds   whether times are whole seconds (rounded up) in windows of less than a minute, too
    quota.others          what other clients spend of each window
    quota_share           the share of each window that another program of the same user takes, from 0 to 1
    quota_headers         whether answers carry X-Ratelimit-…
    retry_after           where a 429 says how long to wait: both, header, body, neither
What strikes single requests, once, often or always, is a Fault.
"""

import base64
import binascii
import csv
import datetime
import fnmatch
import functools
import hashlib
import heapq
import html
import itertools
import json
import math
import random
import re
import threading
import urllib.parse
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import (
    Any,
    Callable,
    Collection,
    DefaultDict,
    Deque,
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
    Type,
    Union,
)

DEFAULT_PAGE = 50
LARGEST_PAGE = 100
LONG_AGO = -math.inf  # what was there before anybody looked at a clock
HALF_EMOJI = "\ud83d"  # a lone surrogate, as services that count in UTF-16 cut a text

USER_KINDS = ("devu", "revu", "svcacc", "sysu")
WORK_KINDS = ("issue", "ticket")
OTHER_WORK_KINDS = ("task", "incident", "opportunity")
ALL_WORK_KINDS = (*WORK_KINDS, *OTHER_WORK_KINDS)
ROLES = ("reported_by", "owned_by", "created_by")
USER_LISTS = ("owned_by", "reported_by", "members")

Thing = Dict[str, Any]
Key = Tuple[str, Any]
Filter = Tuple[str, Collection[str]]

# --------------------------------------------------------------------------------------------------
# Objects that are found by what they hold, and as they were a while ago
# --------------------------------------------------------------------------------------------------


class Record(Dict[str, Any]):
    """An object as the API answers it. Its table hears of every change, whoever makes it.

    What lies within it (a list of people) is replaced as a whole, never changed in place.
    """

    def __init__(self, table: "Table", fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.table = table

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __delitem__(self, name: str) -> None:
        with Changing(self):
            super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:  # type: ignore[override]
        with Changing(self):
            return super().pop(name, *default)

    def update(self, *fields: Any, **more: Any) -> None:
        with Changing(self):
            super().update(*fields, **more)


class Changing:
    """A change of a record: out of its table's index before, into it again afterwards."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __enter__(self) -> None:
        self.record.table.lock.acquire()
        self.record.table.leave(self.record)

    def __exit__(self, *_: Any) -> None:
        self.record.table.enter(self.record)
        self.record.table.lock.release()


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
        self.numbers: Dict[str, int] = {}  # of objects that are gone, too
        self._now = now
        self._keys = keys
        self._changed = changed
        self._index: DefaultDict[Key, Set[str]] = defaultdict(set)
        self._log: Deque[Tuple[float, str, Optional[Thing]]] = deque(maxlen=self.REMEMBERED)

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
        """Put a record into the index as it is now."""
        if self.get(record["id"]) is record:
            for key in self._keys(record):
                self._index[key].add(record["id"])
            self._changed(record)

    def find(self, filters: Sequence[Filter] = (), ago: float = 0.0) -> List[Thing]:
        """The objects that hold a value of every filter, oldest first, as they were `ago` seconds ago."""
        before = self._before(self._now() - ago) if ago > 0 else {}
        wanted = [{(name, value) for value in values} for name, values in filters]
        found: List[Thing] = []
        for object_id in sorted(
            self._candidates(wanted) | before.keys(), key=self.numbers.__getitem__
        ):
            thing = before[object_id] if object_id in before else self[object_id]
            if thing is not None and not any(one.isdisjoint(self._keys(thing)) for one in wanted):
                found.append(thing)
        return found

    def _candidates(self, wanted: Sequence[Set[Key]]) -> Set[str]:
        if not wanted:
            return set(self)
        fewest = min(wanted, key=lambda keys: sum(len(self._index.get(key, ())) for key in keys))
        return set().union(*(self._index.get(key, ()) for key in fewest))

    def _before(self, moment: float) -> Dict[str, Optional[Thing]]:
        """What has changed since a moment, as it was then; None for what wasn't there yet."""
        found: Dict[str, Optional[Thing]] = {}
        for changed, object_id, was in reversed(self._log):
            if changed <= moment:
                break
            found[object_id] = was
        return found

    def _remember(self, object_id: str, was: Optional[Thing]) -> None:
        now = self._now()
        if now > LONG_AGO:
            self._log.append((now, object_id, was))


def contact_keys(contact: Mapping[str, Any]) -> Iterator[Key]:
    """What a contact is found by."""
    email = contact.get("email")
    yield "email", email
    yield "email_lower", email and email.lower()
    yield "external_ref", contact.get("external_ref")
    for reference in contact.get("external_refs", ()):
        yield "external_ref", reference
    if "rev_org" in contact:
        yield "rev_org", contact["rev_org"]["id"]
    for number in contact.get("phone_numbers", ()):
        yield "phone_numbers", number


def people_keys(thing: Mapping[str, Any]) -> Iterator[Key]:
    """What a work or a conversation is found by: its type and everybody in it, by role and in whatever role."""
    yield "type", thing.get("type")
    for role in ("created_by", *USER_LISTS):
        people = thing.get(role, ())
        for person in [people] if role == "created_by" else people:
            yield role, person["id"]
            yield "anyone", person["id"]


# --------------------------------------------------------------------------------------------------
# Ground truth
# --------------------------------------------------------------------------------------------------


class Rules:
    """What an organisation can be set to do in one way or another; all of it may be changed at any time.

    `ref_release`: seconds for which a merged contact doesn't let go of its reference yet.
    `stuck_references`: those that never leave the contact that had them, merged or not.
    `unique_references`: nobody else in the "rev_org", or in the whole "organisation", may have a reference.
    `unverified_keep_references`: a reference that an unverified contact had is nobody else's until that contact is
    deleted, whether it was merged or has another reference since.
    `merge_joins`: fields with several values (`phone_numbers`, `tags`, `external_refs`) that a merge joins.
    `merge_moves_reference`: whether a merge gives the primary the secondary's reference, unless DevRev has made it.
    `visitors_verified`: whether a contact that the application's widget makes is verified.
    `unverified`: the ids of contacts that are not verified.
    """

    def __init__(self) -> None:
        self.ref_release = 0.0
        self.stuck_references: Set[str] = set()
        self.unique_references = "rev_org"
        self.unverified_keep_references = False
        self.merge_joins: Collection[str] = ()
        self.merge_moves_reference = False
        self.visitors_verified = True
        self.unverified: Set[str] = set()

    def joined(self, primary: Mapping[str, Any], secondary: Mapping[str, Any]) -> Thing:
        """What a merge makes of the primary's fields with several values."""
        found = {}
        for name in self.merge_joins:
            values = [
                *primary.get(name, ()),
                *(one for one in secondary.get(name, ()) if one not in primary.get(name, ())),
            ]
            if values:
                found[name] = values
        return found


class Organisation(Rules):
    """What is true, whatever a client was told.

    Contacts, works and conversations are kept just as the API answers them. A user's summary is one
    dictionary shared by everything the user appears in, so a changed reference shows everywhere.
    Times are those of `clock`, which a World brings along; before that everything was LONG_AGO.
    """

    def __init__(self, key: str = "SANDBOX1", partition: str = "dvrv-us-1") -> None:
        super().__init__()
        self.key = key
        self.partition = partition
        self.lock = threading.RLock()
        self.clock: Callable[[], float] = lambda: LONG_AGO
        self.moment: Optional[float] = (
            None  # in place of the clock, for what is carried out belatedly
        )
        self.contacts = Table(self.lock, self.now, contact_keys, self._contact_changed)
        self.works = Table(self.lock, self.now, people_keys)
        self.conversations = Table(self.lock, self.now, people_keys)
        self.timelines: Dict[str, List[Thing]] = {}
        self.deleted: Dict[str, Thing] = {}
        self.merges: List[Tuple[str, str]] = []
        self.merged_into: Dict[str, str] = {}
        self.merge_times: Dict[str, float] = {}
        self.reference_times: DefaultDict[str, List[Tuple[float, Optional[str]]]] = defaultdict(
            list
        )
        self._users_of: DefaultDict[str, Set[str]] = defaultdict(set)  # of a reference, at any time
        self.rev_orgs: Dict[str, Thing] = {}
        self._summaries: Dict[str, Thing] = {}
        self._numbers: Dict[str, int] = Counter()
        self._minutes = itertools.count()
        self.dev_user = dev_user(
            self.don("identity", "devu", "1"), "Dana Developer", "dana.developer@example.com"
        )
        self._summarise("dev_user", self.dev_user)

    @classmethod
    def from_csv(cls, path: Union[str, Path]) -> "Organisation":
        """An organisation for which the export at `path` is accurate, the same one every time."""
        return seed(cls, path)

    def now(self) -> float:
        """When what happens now happens."""
        return self.clock() if self.moment is None else self.moment

    def don(self, service: str, kind: str, key: object) -> str:
        """The id of an object, e.g. `don:core:dvrv-us-1:devo/SANDBOX1:ticket/7`."""
        return f"don:{service}:{self.partition}:devo/{self.key}:{kind}/{key}"

    # ----- what is added ---------------------------------------------------------------------------

    def add_contact(
        self,
        key: str,
        email: Optional[str],
        external_ref: Optional[str] = None,
        display_name: Optional[str] = None,
        rev_org: Optional[str] = "ACME",
        state: str = "active",
        created: str = "2024-01-01T00:00:00.000Z",
        verified: bool = True,
        **more: Any,
    ) -> str:
        """Add a contact and return its id. Its reference must be free. `account/KEY` is a rev org that is an account."""
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
        self,
        email: Optional[str],
        reference: Optional[str],
        rev_org: Optional[str] = "ACME",
        **more: Any,
    ) -> str:
        """Add a contact with an id that DevRev chooses."""
        with self.lock:
            self._numbers["revu"] += 1
            more.setdefault("created", self._now())
            return self.add_contact(
                "N{}".format(self._numbers["revu"]), email, reference, rev_org=rev_org, **more
            )

    def visit(self, email: str, reference: str, rev_org: Optional[str] = "ACME") -> str:
        """The application identifies somebody by a reference: who holds it, or a new contact that does."""
        with self.lock:
            holder = self.holder(rev_org and self._org_summary(rev_org)["id"], reference)
            if holder is not None:
                return self.survivor(holder)
            return self.new_contact(email, reference, rev_org, verified=self.visitors_verified)

    def add_work(
        self,
        owned_by: Iterable[str] = (),
        created_by: Optional[str] = None,
        reported_by: Iterable[str] = (),
        kind: str = "ticket",
        title: Optional[str] = None,
        comments: int = 0,
    ) -> str:
        """Add a work (a ticket, an issue, …) and return its id. A dev user fills the roles nobody has."""
        prefix = {"ticket": "TKT", "issue": "ISS"}.get(kind, kind[:4].upper())
        with self.lock:
            work = self._new_object(kind, prefix, created_by)
            work["type"] = kind
            work["title"] = title or "About {}".format(work["display_id"])
            work["body"] = "What {} is about, in a sentence or two.".format(work["display_id"])
            work["stage"] = {"name": "queued" if kind == "ticket" else "triage"}
            work["owned_by"] = self.people(owned_by) or self.people([self.dev_user["id"]])
            work["reported_by"] = self.people(reported_by)
            work.update(
                {"ticket": {"severity": "medium"}, "issue": {"priority": "p2"}}.get(kind, {})
            )
            self.works[work["id"]] = work  # type: ignore[assignment]
            self._add_comments(work, comments)
            return str(work["id"])

    def add_conversation(
        self, members: Iterable[str] = (), title: Optional[str] = None, comments: int = 0
    ) -> str:
        """Add a conversation, created by its first member, and return its id."""
        with self.lock:
            people = list(members)
            talk = self._new_object("conversation", "CONV", people[0] if people else None)
            talk["title"] = title or "Talk {}".format(talk["display_id"])
            talk["stage"] = {"name": "new"}
            talk["source_channel"] = "plug"
            talk["members"] = self.people(people)
            talk["owned_by"] = self.people([self.dev_user["id"]])
            self.conversations[talk["id"]] = talk  # type: ignore[assignment]
            self._add_comments(talk, comments)
            return str(talk["id"])

    def add_comment(self, object_id: str, body: str, created_by: Optional[str] = None) -> str:
        """Add a comment to the timeline of a work or a conversation and return its id."""
        with self.lock:
            parent = self.works.get(object_id) or self.conversations[object_id]
            entries = self.timelines.setdefault(object_id, [])
            now = self._now()
            entry = {
                "type": "timeline_comment",
                "id": f"{object_id}:comment/{len(entries) + 1}",
                "display_id": f"COMMENT-{len(entries) + 1}",
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

    # ----- what is changed -------------------------------------------------------------------------

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
                self.change(
                    self.contacts[primary],
                    **self.joined(self.contacts[primary], self.contacts[secondary]),
                )
            self.merged_into[secondary] = primary
            self.merge_times[secondary] = self.now()
            self.merges.append((primary, secondary))
            self.contacts[secondary]["state"] = "deleted"
            reference = self.contacts[secondary].get("external_ref", "")
            if self.merge_moves_reference and reference and reference != own_reference(secondary):
                self.change(self.contacts[primary], external_ref=reference)

    def change(self, thing: Thing, **fields: Any) -> None:
        """Set fields of a contact, a work or a conversation."""
        with self.lock:
            thing.update(fields, modified_date=self._now())

    def give(self, object_id: str, role: str, user_ids: Iterable[str]) -> None:
        """Give a work or a conversation to others: all that have a role in it."""
        self.change(
            self.works.get(object_id) or self.conversations[object_id],
            **{role: self.people(user_ids)},
        )

    def delete_contact(self, contact_id: str) -> None:
        """Delete a contact; what it had a role in goes on naming it."""
        with self.lock:
            self.deleted[contact_id] = dict(self.contacts[contact_id])
            del self.contacts[contact_id]

    def delete_work(self, object_id: str) -> None:
        """Delete a work or a conversation with its timeline."""
        with self.lock:
            table = self.works if object_id in self.works else self.conversations
            self.deleted[object_id] = dict(table[object_id])
            del table[object_id]
            self.timelines.pop(object_id, None)

    # ----- what is so ------------------------------------------------------------------------------

    def alive(self, contact_id: str) -> bool:
        """Whether the contact exists and hasn't been merged into another."""
        return contact_id in self.contacts and contact_id not in self.merged_into

    def survivor(self, contact_id: str) -> str:
        """Who the contact is now, after any number of merges."""
        while contact_id in self.merged_into:
            contact_id = self.merged_into[contact_id]
        return contact_id

    def holder(self, rev_org_id: Optional[str], reference: str) -> Optional[str]:
        """The id of the contact that holds a reference in a rev org, or doesn't let go of it yet."""
        if self.unique_references not in ("rev_org", "organisation"):
            raise ValueError(f"unique_references: {self.unique_references!r}")
        with self.lock:
            ids = [one["id"] for one in self.contacts.find([("external_ref", [reference])])]
            ids = [one for one in ids if self._holds_on(one, reference)]
            if self.unverified_keep_references:
                ids += [
                    one
                    for one in self._users_of[reference] & self.unverified
                    if one in self.contacts
                ]
            for contact_id in sorted(ids, key=self.contacts.numbers.__getitem__):
                if (
                    self.unique_references == "organisation"
                    or org_id_of(self.contacts[contact_id]) == rev_org_id
                ):
                    return str(contact_id)
        return None

    def people(self, ids: Iterable[str]) -> List[Thing]:
        """The summaries of users; KeyError for one who doesn't exist."""
        return [self._summaries[user_id] for user_id in dict.fromkeys(ids)]

    def first_work_of(self, user_id: str) -> Optional[str]:
        """The oldest work on which the user has any role."""
        with self.lock:
            works = self.works.find([("anyone", [user_id])])
            return str(works[0]["id"]) if works else None

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
        fields = (
            "id",
            "display_id",
            "display_name",
            "full_name",
            "email",
            "state",
            "external_ref",
            "rev_org",
        )
        summary = self._summaries.setdefault(user["id"], {"type": kind})
        summary.update({name: user[name] for name in fields if name in user})

    def _org_summary(self, key: str) -> Thing:
        kind, prefix = ("account", "ACC-") if key.startswith("account/") else ("revo", "REV-")
        key = key.rpartition("/")[2]
        org_id = self.don("identity", kind, key)
        names = {"display_id": prefix + key, "display_name": key.capitalize()}
        return self.rev_orgs.setdefault(org_id, {"type": "rev_org", "id": org_id, **names})

    def _new_object(self, kind: str, prefix: str, created_by: Optional[str]) -> Thing:
        self._numbers[kind] += 1
        now = self._now()
        return {
            "id": self.don("core", kind, self._numbers[kind]),
            "display_id": f"{prefix}-{self._numbers[kind]}",
            "created_by": self._summaries[created_by or self.dev_user["id"]],
            "created_date": now,
            "modified_date": now,
        }

    def _add_comments(self, parent: Thing, number: int) -> None:
        self.timelines[parent["id"]] = []
        for n in range(1, number + 1):
            body = "Reply {} on {}.".format(n, parent["display_id"])
            self.add_comment(parent["id"], body, parent["created_by"]["id"] if n % 2 else None)

    def _now(self) -> str:
        start = datetime.datetime(2024, 7, 1)
        moment = start + datetime.timedelta(minutes=next(self._minutes))
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


ID = re.compile(
    r"don:(?:core|identity):(?P<partition>dvrv-[\w-]+):devo/(?P<org>[\w.-]+)"
    r":(?P<kind>[a-z_]+)/(?P<key>[\w.-]+)",
    re.ASCII,
)


def dev_user(user_id: str, name: str, email: str) -> Thing:
    """A user of the organisation that DevRev serves, as opposed to its customers."""
    return {
        "id": user_id,
        "display_id": "DEVU-" + user_id.rpartition("/")[2],
        "display_name": name,
        "full_name": name,
        "email": email,
        "state": "active",
        "created_date": "2023-01-01T00:00:00.000Z",
    }


def own_reference(contact_id: str) -> str:
    """The reference that DevRev makes of a contact's id where none was given."""
    return "REVU-" + contact_id.rpartition("/")[2]


def org_id_of(contact: Mapping[str, Any]) -> Optional[str]:
    """The id of a contact's rev org; None where it has none."""
    return str(contact["rev_org"]["id"]) if "rev_org" in contact else None


@functools.lru_cache(maxsize=65536)
def kind_of(object_id: str) -> Optional[str]:
    """`ticket` of `don:core:dvrv-us-1:devo/SANDBOX1:ticket/7`; None for what is no id."""
    found = ID.fullmatch(object_id)
    return found.group("kind") if found else None


# --------------------------------------------------------------------------------------------------
# Seeding from an export
# --------------------------------------------------------------------------------------------------


class ExportRow(NamedTuple):
    """A usable row of an export."""

    partition: str
    organisation: str
    key: str
    name: str
    email: str
    reference: str
    rev_org: str
    created: str
    tickets: int
    more: Dict[str, Any]


def seed(organisation_type: Type[Organisation], path: Union[str, Path]) -> Organisation:
    """Build the organisation an export came from.

    Of each contact, greatest(owned, created, reported) equals its TICKET_COUNT. Bad rows are left
    out and the first row of an id counts, since an export is not always clean.
    """
    rows = list(read_export(path))
    rows = [row for row in rows if row.organisation == rows[0].organisation]
    if not rows:
        raise ValueError(f"{path} holds no usable row")
    organisation = organisation_type(rows[0].organisation, rows[0].partition)
    groups: Dict[str, List[Seedling]] = {}
    for number, row in enumerate(rows):
        details: Dict[str, Any] = {
            "phone_numbers": [f"+4930{number:07}"],
            "description": f"Customer since {row.created[:4]}.",
        }
        try:
            contact = organisation.add_contact(
                row.key,
                row.email,
                row.reference,
                row.name,
                row.rev_org,
                created=row.created,
                **details,
                **row.more,
            )
        except ValueError:
            continue
        seedling = Seedling(organisation, contact, row.tickets, number)
        groups.setdefault(row.email.casefold(), []).append(seedling)
        seedling.grow()
    for group in groups.values():
        for one, other in zip(group, group[1:]):
            one.share_with(other)
    return organisation


def read_export(path: Union[str, Path]) -> Iterable[ExportRow]:
    """The rows of an export that make sense."""
    with open(str(path), newline="", encoding="utf-8-sig") as file:
        for record in csv.DictReader(line for line in file if "\0" not in line):
            row = usable(record)
            if row is not None:
                yield row


def usable(record: Dict[str, str]) -> Optional[ExportRow]:
    """The row, or None where an id, the email, the reference or the count is no good."""
    values = {
        (name or "").strip().upper(): value.strip()
        for name, value in record.items()
        if isinstance(value, str)
    }
    user = ID.fullmatch(values.get("REV_USER_ID", ""))
    org = ID.fullmatch(values.get("REV_ORG_ID", "don:identity:dvrv-us-1:devo/ANY:revo/ACME"))
    email, reference = values.get("EMAIL"), values.get("EXTERNAL_REF")
    created = values.get("CREATED_AT", values.get("CREATED_DATE"))
    try:
        tickets = int(re.sub(r"\.0+$", "", values["TICKET_COUNT"]))
    except (KeyError, ValueError):
        return None
    if user is None or org is None or created is None or tickets < 0 or not email or not reference:
        return None
    where = user.group("partition"), user.group("org"), user.group("key")
    more: Dict[str, Any] = {
        "full_name": values.get("FULL_NAME", ""),
        "modified_date": api_time(values.get("UPDATED_AT", "")),
    }
    more = {name: value for name, value in more.items() if value}
    name = values.get("DISPLAY_NAME", "")
    return ExportRow(
        *where, name, email, reference, org.group("key"), api_time(created), tickets, more
    )


def api_time(text: str) -> str:
    """A warehouse's time as the API writes it; what is no time stays as it is."""
    found = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(\.\d{3})?", text, re.ASCII)
    return (
        "{}T{}{}Z".format(found.group(1), found.group(2), found.group(3) or ".000")
        if found
        else text
    )


class Seedling:
    """Gives one contact its works: `tickets` in a leading role, fewer in the others."""

    def __init__(self, organisation: Organisation, contact: str, tickets: int, number: int) -> None:
        self.organisation = organisation
        self.contact = contact
        self.tickets = tickets
        self.number = number
        self.roles = Counter()  # type: Counter[str]
        self.works: List[str] = []

    def grow(self) -> None:
        """Add the works, and for every other contact a conversation."""
        lead = ROLES[self.number % 3]
        second = ROLES[(self.number + 1) % 3]
        for n in range(self.tickets):
            self._add((lead, second) if n % 3 == 0 else (lead,), n)
        for n in range(self.tickets // 3):
            self._add((second,), n)
        if self.number % 2 == 0:
            people = [self.contact, self.organisation.dev_user["id"]]
            self.organisation.add_conversation(people, comments=self.number % 4)

    def share_with(self, other: "Seedling") -> None:
        """Let the other have a role on a work of this one, where its count leaves room."""
        spare = [role for role in ROLES[:2] if other.roles[role] < other.tickets]
        if not (self.works and spare):
            return
        work = self.organisation.works[self.works[0]]
        ids = [person["id"] for person in work[spare[0]]]
        people = self.organisation.people(ids + [other.contact])
        self.organisation.change(work, **{spare[0]: people})
        other.roles[spare[0]] += 1

    def _add(self, roles: Sequence[str], n: int) -> None:
        self.roles.update(roles)
        people: Dict[str, Any] = {role: [self.contact] for role in roles}
        if "created_by" in people:
            people["created_by"] = self.contact
        kind = "issue" if n % 5 == 4 else "ticket"
        self.works.append(self.organisation.add_work(kind=kind, comments=n % 4, **people))


# --------------------------------------------------------------------------------------------------
# Requests, answers, faults
# --------------------------------------------------------------------------------------------------

REFUSALS = {
    "400": (400, "bad_request"),
    "401": (401, "unauthenticated"),
    "401-expired": (401, "token_expired"),
    "401-revoked": (401, "token_revoked"),
    "401-deactivated": (401, "dev_org_deactivated"),
    "403": (403, "forbidden"),
    "404": (404, "not_found"),
    "409": (409, "conflict"),
    "410": (410, "gone"),
    "413": (413, "request_entity_too_large"),
    "423": (423, "locked"),
    "425": (425, "too_early"),
    "429": (429, "too_many_requests"),
    "429-bare": (429, "too_many_requests"),
    "429-body": (429, "too_many_requests"),
    "429-header": (429, "too_many_requests"),
    "500": (500, "internal_error"),
    "503": (503, "service_unavailable"),
}
PAGES = {  # of a gateway in front of the API, in HTML
    "502": 502, "504": 504, "html-200": 200, "html-401": 401, "html-403": 403, "html-404": 404, "html-413": 413,
    "html-429": 429, "html-503": 503,
}  # fmt: skip
BEFORE_THE_ACT = (*REFUSALS, *PAGES, "route-404", "redirect", "reset-before", "hang", "other")
AFTER_THE_ACT = (
    "reset-after", "cut", "500-after", "hang-after", "slow", "drip", "nested", "changed", "endless", "half-emoji",
    "odd-quota", "other-after",
)  # fmt: skip
OF_A_MERGE = ("merge-never", "merge-leaves", "merge-slow", "merge-refused-late", "merge-doubled")
FAULTS = (*BEFORE_THE_ACT, *AFTER_THE_ACT, "doubled", *OF_A_MERGE)
QUOTA_HEADERS = ("X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset")
WRITTEN_BY_PEOPLE = (
    "display_name",
    "full_name",
    "title",
    "body",
    "description",
    "message",
    "detail",
)
SECONDS = {"hang": 60.0, "hang-after": 60.0, "slow": 1.0, "drip": 0.5}


@dataclass
class Fault:
    """One misbehaviour: which requests it strikes, and how often.

    A request is struck by the first fault of the world's list that wants it; the ones behind it
    don't get to see the request. What `detail` says, where a kind takes one:

    429: seconds to wait · 413: max_bytes · 403: the message, or a list of object_ids · other refusals: the message ·
    redirect: its Location, which may be no URL · half-emoji: names of fields, which get a lone surrogate at their
    end (else those that people write) · odd-quota: the headers, or one value for all three · hang, hang-after, slow (the answer comes late), drip (a
    byte each time), merge-slow: seconds · doubled, merge-doubled: seconds until the same request arrives again
    (else at once, and what is answered is the second) · merge-refused-late: the status, or status and seconds until
    it is carried out all the same · merge-leaves: ids · changed: a function of the answer · endless: "empty" for
    pages without items instead of the first page again and again, "repeated" for the first page under one and the
    same cursor · other, other-after: a status and what comes with it, as JSON, or as HTML where it is text.

    A 429 says in the header and in the body how long to wait, 429-body and 429-header in one of them, 429-bare nowhere.
    """

    kind: str
    endpoint: str = "*"
    chance: float = 1.0
    skip: int = 0
    times: Optional[int] = None
    match: Optional[Callable[[Dict[str, Any]], bool]] = None
    detail: Any = None
    seen: int = field(default=0, init=False)
    struck: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError("unknown fault {!r}: one of {}".format(self.kind, ", ".join(FAULTS)))

    def strikes(self, request: "Request", chance: random.Random) -> bool:
        """Whether this request is to go wrong; counts it."""
        if self.kind in OF_A_MERGE and request.endpoint != "rev-users.merge":
            return False
        if self.kind == "endless" and not request.endpoint.endswith(".list"):
            return False
        if not fnmatch.fnmatchcase(request.endpoint, self.endpoint):
            return False
        if self.match is not None and not self.match(request.body):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.struck >= self.times):
            return False
        if self.chance < 1.0 and chance.random() >= self.chance:
            return False
        self.struck += 1
        return True


@dataclass
class Request:
    """One request as the server saw it."""

    number: int
    endpoint: str
    body: Dict[str, Any]
    started: float
    status: Optional[int] = None
    ended: Optional[float] = None
    fault: Optional[str] = None


@dataclass
class Answer:
    """What goes back, and how.

    `send` (after some seconds), `cut` in half, `reset`, `hang` for some seconds, `drip` a byte every so many.
    """

    status: int
    payload: bytes
    headers: Dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    manner: str = "send"
    seconds: float = 0.0


class Refused(Exception):
    """An answer other than 200, in DevRev's form: message, type, and what the type calls for."""

    def __init__(self, status: int, kind: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.answer = json_answer(status, dict(more, message=message, type=kind))


class Instead(Refused):
    """An answer of any form, in place of the one that an endpoint would give."""

    def __init__(self, answer: Answer) -> None:
        Exception.__init__(self)
        self.answer = answer


def json_answer(status: int, content: Any) -> Answer:
    """An answer as the API itself gives it; half an emoji is written as the JSON escape that it was."""
    return Answer(
        status, json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")
    )


def html_answer(status: int) -> Answer:
    """An answer as a gateway in front of the API gives it."""
    phrase = html.escape(HTTPStatus(status).phrase)
    page = f"<html><head><title>{phrase}</title></head><body><h1>{phrase}</h1></body></html>"
    return Answer(status, page.encode("utf-8"), content_type="text/html; charset=utf-8")


def other_answer(status: int, content: Any) -> Answer:
    """Any other answer: JSON, or HTML where it is text."""
    if isinstance(content, str):
        return Answer(status, content.encode("utf-8"), content_type="text/html; charset=utf-8")
    return json_answer(status, content)


def too_many(seconds: float, text: str, message: str) -> Answer:
    """A 429 that says how long to wait, in the header as `text` and in the body rounded up."""
    fields = {"message": message, "type": "too_many_requests", "retry_after": math.ceil(seconds)}
    answer = json_answer(429, fields)
    answer.headers["Retry-After"] = text
    return answer


def struck_before(fault: Fault) -> Answer:
    """The answer to a request that a fault keeps from being carried out."""
    if fault.kind in ("429", "429-body", "429-header"):
        seconds = 0.2 if fault.detail is None else float(fault.detail)
        answer = too_many(seconds, f"{seconds:g}", "Slow down.")
        return answer if fault.kind == "429" else wait_told(answer, fault.kind[4:])
    if fault.kind in REFUSALS:
        status, kind = REFUSALS[fault.kind]
        content = {"message": HTTPStatus(status).phrase, "type": kind}
        if fault.detail is not None:
            names = (
                {"403": "object_ids"}
                if isinstance(fault.detail, (list, tuple))
                else {"413": "max_bytes"}
            )
            content[names.get(fault.kind, "message")] = fault.detail
        return json_answer(status, content)
    if fault.kind == "other":
        return other_answer(*fault.detail)
    if fault.kind == "route-404":
        return route_not_found()
    if fault.kind == "redirect":
        return moved(fault.detail or "/elsewhere")
    if fault.kind in PAGES:
        return html_answer(PAGES[fault.kind])
    return struck_after(fault, Answer(0, b""))


def moved(place: str) -> Answer:
    """301: the object has another id now, and this is where it is."""
    answer = json_answer(
        301, {"message": "The object has another id now.", "type": "moved_permanently"}
    )
    answer.headers["Location"] = place
    return answer


def wait_told(answer: Answer, where: str) -> Answer:
    """Let a 429 say how long to wait in the "header" alone, in the "body" alone, in "both", or in "neither"."""
    if where in ("body", "neither"):
        answer.headers.pop("Retry-After", None)
    if where in ("header", "neither") and answer.content_type == "application/json":
        content = json.loads(answer.payload.decode("utf-8"))
        answer.payload = json_answer(
            429, {name: value for name, value in content.items() if name != "retry_after"}
        ).payload
    return answer


def route_not_found() -> Answer:
    """404 of an address that leads nowhere: it says nothing about any object."""
    return json_answer(404, {"message": "route not found"})


def struck_after(fault: Fault, answer: Answer) -> Answer:
    """What becomes of the answer to a request that was carried out."""
    if fault.kind == "other-after":
        return other_answer(*fault.detail)
    if fault.kind == "500-after":
        return json_answer(500, {"message": "Something broke.", "type": "internal_error"})
    if fault.kind == "nested":
        return Answer(200, b'{"a":' * 100_000 + b"{}" + b"}" * 100_000)
    if fault.kind == "odd-quota":
        values = {} if fault.detail is None else fault.detail
        answer.headers.update(
            values if isinstance(values, dict) else {name: str(values) for name in QUOTA_HEADERS}
        )
        return answer
    if fault.kind in ("changed", "endless", "half-emoji"):
        if not answer.payload or answer.content_type != "application/json":
            return answer
        content = json.loads(answer.payload.decode("utf-8"))
        if fault.kind == "half-emoji":
            return json_answer(answer.status, halved(content, fault.detail or WRITTEN_BY_PEOPLE))
        if fault.kind == "endless":
            return json_answer(answer.status, without_end(fault, content))
        return json_answer(answer.status, fault.detail(content) if fault.detail else {})
    if fault.kind in SECONDS:
        answer.seconds = SECONDS[fault.kind] if fault.detail is None else float(fault.detail)
    answer.manner = "send" if fault.kind == "slow" else fault.kind.split("-")[0]
    return answer


def halved(content: Any, names: Collection[str]) -> Any:
    """The same content in which every text of these names, at any depth, ends with half an emoji."""
    if isinstance(content, list):
        return [halved(one, names) for one in content]
    if not isinstance(content, dict):
        return content
    cut = {name for name in names if isinstance(content.get(name), str)}
    return {
        name: value + HALF_EMOJI if name in cut else halved(value, names)
        for name, value in content.items()
    }


def without_end(fault: Fault, content: Thing) -> Thing:
    """A page that claims that more comes, under a cursor never seen before (or always the same one)."""
    if fault.detail == "empty":
        content = {
            name: [] if isinstance(value, list) else value for name, value in content.items()
        }
    return {
        **content,
        "next_cursor": "more" if fault.detail == "repeated" else f"more-{fault.struck}",
    }


# --------------------------------------------------------------------------------------------------
# The API: request shapes and endpoints
# --------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A property of a request. `allowed` are the kinds of an id or the values of an enumeration."""

    kind: str
    allowed: Tuple[str, ...] = ()
    required: bool = False
    nullable: bool = False


JSON_TYPES = {
    "bool": bool,
    "id": str,
    "text": str,
    "enum": str,
    "int": int,
    "set": dict,
    "object": dict,
}
JSON_NAMES = (
    (type(None), "null"),
    (bool, "bool"),
    ((int, float), "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)  # type: Tuple[Tuple[Any, str], ...]

TEXT = Field("text")
TEXTS = Field("texts")
USERS = Field("ids", USER_KINDS)
USER_SET = Field("set", USER_KINDS)
CONTACT = Field("id", ("revu",), required=True)
CONVERSATION = Field("id", ("conversation",), required=True)
WORK = Field("id", ALL_WORK_KINDS, required=True)
OBJECT = Field("object")
ORGS = Field("ids", ("revo", "account"))
OF_A_CONTACT = {
    "external_ref": TEXT,
    "display_name": TEXT,
    "description": TEXT,
    "email": TEXT,
    "phone_numbers": TEXTS,
    "display_picture": TEXT,
    "custom_schema_spec": OBJECT,
}
PAGING = {"cursor": TEXT, "limit": Field("int"), "mode": Field("enum", ("after",))}
OF_WORKS = {
    "type": Field("enums", WORK_KINDS),
    "owned_by": USERS,
    "created_by": USERS,
    "reported_by": USERS,
}

SHAPES: Dict[str, Dict[str, Field]] = {
    "dev-users.self": {},
    "rev-users.get": {"id": CONTACT},
    "rev-users.list": dict(
        PAGING,
        email=TEXTS,
        external_ref=TEXTS,
        phone_numbers=TEXTS,
        rev_org=ORGS,
        associations=ORGS,
        is_verified=Field("bool"),
    ),
    "rev-users.scan": {"cursor": TEXT, "email": TEXTS, "external_ref": TEXTS},
    "rev-users.merge": {"primary_user": CONTACT, "secondary_user": CONTACT},
    "rev-users.create": dict(
        OF_A_CONTACT, rev_org=Field("id", ("revo", "account")), custom_schema_fragments=TEXTS
    ),
    "rev-users.update": dict(
        OF_A_CONTACT,
        id=CONTACT,
        custom_fields=OBJECT,
        custom_schema_fragments=OBJECT,
        display_picture=Field("text", nullable=True),
    ),
    "rev-users.delete": {"id": CONTACT},
    "works.list": dict(PAGING, **OF_WORKS),
    "works.count": OF_WORKS,
    "works.get": {"id": WORK},
    "works.update": {
        "id": WORK,
        "type": Field("enum", WORK_KINDS),
        "owned_by": USER_SET,
        "reported_by": USER_SET,
        "title": TEXT,
        "body": TEXT,
    },
    "conversations.list": dict(PAGING, members=USERS),
    "conversations.get": {"id": CONVERSATION},
    "conversations.update": {
        "id": CONVERSATION,
        "members": USER_SET,
        "owned_by": USER_SET,
        "title": TEXT,
        "description": TEXT,
    },
    "timeline-entries.list": dict(
        PAGING,
        object=Field("id", (*ALL_WORK_KINDS, "conversation", "revu"), required=True),
        visibility=Field("enums", ("external", "internal", "private", "public")),
    ),
}
LONG_SHAPES = {  # where works of every kind can be asked for
    name: dict(SHAPES[name], type=Field(SHAPES[name]["type"].kind, ALL_WORK_KINDS))
    for name in ("works.list", "works.count", "works.update")
}
CONTACT_FILTERS = ("email", "external_ref", "phone_numbers", "rev_org")
POST_ONLY = tuple(
    name for name in SHAPES if name.endswith((".merge", ".create", ".update", ".delete"))
)


def check_shape(shape: Dict[str, Field], body: Dict[str, Any], max_ids: Optional[int]) -> None:
    """Refuse a body with a property that is missing, unknown or of the wrong kind.

    The world knows the properties it acts on and no others: a filter that was accepted and then
    ignored would answer a question nobody asked.
    """
    for name in body:
        if name not in shape:
            message = f"unknown property: {name}"
            raise Refused(400, "invalid_field", message, field_name=name)
    for name, wanted in shape.items():
        if name in body:
            check_value(name, wanted, body[name], max_ids)
        elif wanted.required:
            message = f"missing property: {name}"
            raise Refused(400, "missing_required_field", message, field_name=name)


def check_value(name: str, wanted: Field, value: Any, max_ids: Optional[int]) -> None:
    """Refuse a value of the wrong type, an id that is none, a value outside an enumeration."""
    if value is None and wanted.nullable:
        return
    if wanted.kind.endswith("s"):
        check_type(name, value, list)
        if wanted.kind == "ids" and max_ids is not None and len(value) > max_ids:
            message = f"{name} names more than {max_ids} ids"
            raise Refused(400, "value_not_permitted", message, field_name=name)
        for item in value:
            check_value(name, Field(wanted.kind[:-1], wanted.allowed), item, max_ids)
        return
    check_type(name, value, JSON_TYPES[wanted.kind])
    if wanted.kind == "id":
        check_id(name, value, wanted.allowed)
    elif wanted.kind == "enum" and value not in wanted.allowed:
        message = f"{name}: {value!r} is not permitted"
        allowed = list(wanted.allowed)
        more = {"field_name": name, "value": value, "allowed_values": allowed}
        raise Refused(400, "invalid_enum_value", message, **more)
    elif wanted.kind == "set":
        for key in value:
            if key != "set":
                message = f"unknown property: {name}.{key}"
                raise Refused(400, "invalid_field", message, field_name=f"{name}.{key}")
        check_value(f"{name}.set", Field("ids", wanted.allowed), value.get("set", []), None)


def check_type(name: str, value: Any, wanted: type) -> None:
    """Refuse a value of another JSON type."""
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return
    more = {"field_name": name, "actual": json_name(type(value)), "expected": json_name(wanted)}
    message = "{field_name}: expected {expected}, got {actual}".format(**more)
    raise Refused(400, "unexpected_json_type", message, **more)


def json_name(python_type: type) -> str:
    """What JSON calls a Python type."""
    return next(name for types, name in JSON_NAMES if issubclass(python_type, types))


def check_id(name: str, value: str, kinds: Collection[str]) -> None:
    """Refuse what is no id, or the id of something else."""
    kind = kind_of(value)
    if kind is None:
        message = f"{name}: {value!r} is not an id"
        raise Refused(400, "invalid_id", message, field_name=name)
    if kind not in kinds:
        message = f"{name}: the id of a {kind} is not wanted here"
        raise Refused(400, "unexpected_id_type", message, field_name=name, value=value)


class Restrictions:
    """What a token may not see, and the pages that lists are served in."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.organisation = world.organisation
        self._endpoint = ""

    def _check_restricted(self, body: Thing) -> None:
        """Refuse a request that names what the token may not see, or may not see the timeline of, or change."""
        world = self.world
        named = [
            body[name]
            for name in ("id", "object", "primary_user", "secondary_user")
            if name in body
        ]
        named += [
            one
            for name in ("owned_by", "created_by", "reported_by", "members")
            for one in body.get(name, ())
        ]
        hidden = set(world.restricted)
        if self._endpoint == "timeline-entries.list":
            hidden |= set(world.restricted_timelines)
        if self._endpoint.endswith((".update", ".merge", ".delete")):
            hidden |= set(world.restricted_writes)
        self._forbid([one for one in named if one in hidden])
        kinds = [kind_of(one) for name, one in body.items() if name in ("id", "object")]
        if self._endpoint.startswith("conversations."):
            kinds.append("conversation")
        if any(kind in world.hidden_kinds for kind in kinds):
            self._forbid(
                [one for name, one in body.items() if name in ("id", "object")], refused=True
            )

    def _forbid(self, ids: Sequence[str], refused: bool = False) -> None:
        """Refuse with 403, naming the objects where the world names them."""
        if ids or refused:
            more = (
                {"object_ids": list(dict.fromkeys(ids))}
                if ids and self.world.names_object_ids
                else {}
            )
            raise Refused(403, "forbidden", "The token may not do that.", **more)

    def _page(self, name: str, things: Sequence[Tuple[int, Thing]], body: Thing) -> Thing:
        """One page of a list, as the world serves lists."""
        world = self.world
        if world.restricted_in_lists == "left out":
            things = [one for one in things if one[1]["id"] not in world.restricted]
        empty = 0
        if any(fnmatch.fnmatchcase(self._endpoint, pattern) for pattern in world.thin_lists):
            start = start_of(name, body)[0]
            empty = (
                world.empty_pages(self._endpoint, start)
                if callable(world.empty_pages)
                else world.empty_pages
            )
        paging = self._paging(body)
        found = page(name, things, body, empty, world.largest_page, world.trailing_page, paging)
        if "next_cursor" in found:
            world.cursors[found["next_cursor"]] = self.organisation.now()
        if world.restricted_in_lists == "403":
            self._forbid([one["id"] for one in found[name] if one["id"] in world.restricted])
        return found

    def _paging(self, body: Thing) -> str:
        """How this page is made; refuses a cursor that has expired."""
        world = self.world
        if "cursor" in body and world.cursor_life is not None:
            age = self.organisation.now() - world.cursors.get(body["cursor"], -math.inf)
            if age > world.cursor_life:
                message = "the cursor has expired"
                raise Refused(400, "value_not_permitted", message, field_name="cursor")
        if not any(fnmatch.fnmatchcase(self._endpoint, one) for one in world.paging_lists):
            return "cursor"
        if world.paging in ("again", "overlap") and "cursor" in body:
            if world.paging_times == 0:
                return "cursor"
            if world.paging_times is not None:
                world.paging_times -= 1
        return world.paging


class Api(Restrictions):
    """What each endpoint does. Every method runs while the organisation's lock is held."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self._endpoints: Dict[str, Callable[[Thing], Thing]] = {
            "dev-users.self": self._self,
            "rev-users.get": self._get_contact,
            "rev-users.list": self._list_contacts,
            "rev-users.scan": self._list_contacts,
            "rev-users.merge": self._merge,
            "rev-users.create": self._create_contact,
            "rev-users.update": self._update_contact,
            "rev-users.delete": self._delete_contact,
            "works.list": self._list_works,
            "works.count": self._count_works,
            "works.get": self._get_work,
            "works.update": self._update_work,
            "conversations.list": self._list_conversations,
            "conversations.get": self._get_conversation,
            "conversations.update": self._update_conversation,
            "timeline-entries.list": self._list_entries,
        }
        self._fault: Optional[Fault] = None

    def act(self, endpoint: str, body: Thing, fault: Optional[Fault] = None) -> Answer:
        """Carry a request out. Whatever it says is serialised before anyone else can change it."""
        world = self.world
        try:
            if world.max_bytes is not None and len(json.dumps(body)) > world.max_bytes:
                raise Refused(
                    413,
                    "request_entity_too_large",
                    "The request is too large.",
                    max_bytes=world.max_bytes,
                )
            if any(word in json.dumps(body, ensure_ascii=False) for word in world.firewall):
                raise Instead(html_answer(world.firewall_status))
            self._check_kinds(endpoint, body)
            shape = SHAPES[endpoint]
            if world.long_work_types:
                shape = LONG_SHAPES.get(endpoint, shape)
            check_shape(shape, body, world.max_ids)
            with self.organisation.lock:
                self._endpoint, self._fault = endpoint, fault
                self._check_restricted(body)
                content = self._endpoints[endpoint](body)
                if endpoint == "rev-users.merge":
                    return merge_acknowledged(world.merge_answer, content)
                return json_answer(201 if endpoint == "rev-users.create" else 200, content)
        except Refused as refusal:
            return refusal.answer

    def _check_kinds(self, endpoint: str, body: Thing) -> None:
        """Refuse a list that asks for kinds of works that this organisation does not know."""
        world = self.world
        known = [kind for kind in ALL_WORK_KINDS if kind not in world.unknown_kinds]
        if not world.long_work_types:
            known = list(WORK_KINDS)
        asked = body.get("type") if endpoint in LONG_SHAPES else None
        unknown = [kind for kind in asked if kind not in known] if isinstance(asked, list) else []
        if not unknown or (world.unknown_kinds_answer == "400" and not world.unknown_kinds):
            return
        message = f"type: {unknown[0]!r} is not permitted"
        if world.unknown_kinds_answer == "403":
            raise Refused(403, "forbidden", "The token may not do that.")
        if world.unknown_kinds_answer == "400-bare":
            raise Refused(400, "bad_request", "Bad request.")
        more = {"field_name": "type", "value": unknown[0], "allowed_values": known}
        raise Refused(400, "invalid_enum_value", message, **more)

    def _self(self, body: Thing) -> Thing:
        return {"dev_user": self.organisation.dev_user}

    # ----- contacts --------------------------------------------------------------------------------

    def _get_contact(self, body: Thing) -> Thing:
        contact_id = body["id"]
        organisation = self.organisation
        if self._has_vanished(contact_id):
            raise not_found(contact_id)
        if contact_id in organisation.contacts and not organisation.alive(contact_id):
            return {"rev_user": self._shown(self._merged_contact(contact_id))}
        if self.world.deleted_contacts == "state" and contact_id in organisation.deleted:
            return {
                "rev_user": self._shown({**organisation.deleted[contact_id], "state": "deleted"})
            }
        return {"rev_user": self._shown(self._contact(contact_id))}

    def _merged_contact(self, contact_id: str) -> Thing:
        world, contacts = self.world, self.organisation.contacts
        survivor = self.organisation.survivor(contact_id)
        gone = world.gone_of.get(contact_id, world.gone)
        if gone in ODD_POLLS:
            raise Instead(odd_poll(gone, world.gone_seconds))
        if gone == "404" or (survivor not in contacts and gone not in world.ODD):
            raise not_found(contact_id)
        if gone == "301":
            place = urllib.parse.quote(survivor, safe="")
            base = world.moved_to or world.url
            raise Instead(
                moved(
                    f"{base}/rev-users.get?id={place}" if world.location is None else world.location
                )
            )
        if gone == "primary":
            return contacts[survivor]
        return self._left_over(contact_id, (world.stays or "locked") if gone == "stays" else gone)

    def _left_over(self, contact_id: str, gone: str) -> Thing:
        """What is left of a contact that was merged, where something is shown of it."""
        contact = self.organisation.contacts[contact_id]
        if gone in ("shadow", "unassigned"):
            (primary,) = self.organisation.people([self.organisation.survivor(contact_id)])
            if gone != self.world.stays:
                return {**contact, "state": gone, "primary_identity": primary}
        left = dict(contact, state=STATES_LEFT.get(gone, "deleted"))
        if gone in ("no-email", "bare"):
            left.pop("email", None)
        if gone in ("no-reference", "bare"):
            left.pop("external_ref", None)
        if gone == "own-reference":
            left["external_ref"] = own_reference(contact_id)
        return left

    def _has_vanished(self, contact_id: str) -> bool:
        return self.world.vanished == "*" or contact_id in self.world.vanished

    def _list_contacts(self, body: Thing) -> Thing:
        world, organisation = self.world, self.organisation
        if "is_verified" in body and world.verified_filter != "accepted":
            if world.verified_filter == "403":
                self._forbid((), refused=True)
            raise Refused(
                400, "invalid_field", "unknown property: is_verified", field_name="is_verified"
            )
        filters: List[Filter] = [(name, body[name]) for name in CONTACT_FILTERS if body.get(name)]
        if world.email_ignores_case and body.get("email"):
            filters[0] = ("email_lower", [one.lower() for one in body["email"]])
        if body.get("associations"):
            filters.append(("rev_org", body["associations"]))
        contacts = organisation.contacts.find(filters, world.list_lag)
        if world.deleted_listed:
            known = {one["id"] for one in contacts}
            for one in organisation.deleted.values():
                if fits(one, filters) and one["id"] not in known and kind_of(one["id"]) == "revu":
                    contacts.append({**one, "state": "deleted"})
        seen_at = organisation.now() - world.list_lag
        found = []
        for contact in contacts:
            if self._has_vanished(contact["id"]):
                continue
            if organisation.merge_times.get(contact["id"], math.inf) <= seen_at:
                left = self._listed_left_over(contact["id"])
                if left is None or not fits(left, filters):
                    continue
                contact = left
            verified = contact["id"] not in organisation.unverified
            if body.get("is_verified", verified) == verified:
                found.append((organisation.contacts.numbers[contact["id"]], contact))
        found.sort(key=lambda one: one[0])
        answer = self._page("rev_users", found, body)
        return {**answer, "rev_users": [self._shown(one) for one in answer["rev_users"]]}

    def _listed_left_over(self, contact_id: str) -> Optional[Thing]:
        """What lists show of a contact that was merged; None for nothing."""
        world = self.world
        if world.stays:
            return self._left_over(contact_id, world.stays)
        if not world.deleted_listed:
            return None
        gone = world.gone_of.get(contact_id, world.gone)
        return self._left_over(contact_id, gone if gone in ("shadow", "unassigned") else "state")

    def _shown(self, contact: Thing, is_own_answer: bool = False) -> Thing:
        """A contact as answers show it; an update's own answer never lags."""
        world, found = self.world, contact
        if world.reference_lag and not is_own_answer:
            seen_at = self.organisation.now() - world.reference_lag
            times = self.organisation.reference_times[contact["id"]]
            former = [reference for at, reference in times if at <= seen_at]
            if former and contact.get("external_ref") == times[-1][1]:
                found = {**found, "external_ref": former[-1]}
        if world.hidden_fields:
            found = {
                name: value for name, value in found.items() if name not in world.hidden_fields
            }
        form, contact_id = world.verified_shown, contact["id"]
        if form == "mixed":
            form = ("shown", "hidden", "null")[self.organisation.contacts.numbers[contact_id] % 3]
        if form == "hidden":
            return found
        verified = contact_id not in self.organisation.unverified
        return {**found, "is_verified": verified if form == "shown" else None}

    def _merge(self, body: Thing) -> Thing:
        primary, secondary = body["primary_user"], body["secondary_user"]
        if primary == secondary:
            message = "a contact can't be merged into itself"
            raise Refused(400, "value_not_permitted", message, field_name="secondary_user")
        for contact_id in (primary, secondary):
            self._contact(contact_id)
        unverified = [one in self.organisation.unverified for one in (primary, secondary)]
        manner = {
            (False, True): self.world.unverified_merge,
            (True, False): self.world.verified_merge,
        }.get((unverified[0], unverified[1]), "works")
        if manner == "works":
            self.world.plan_merge(primary, secondary, self._fault)
        elif manner != "never":
            message = "Unverified users cannot be merged into verified users."
            raise Refused(int(manner), REFUSALS[manner][1], message)
        return {}

    def _create_contact(self, body: Thing) -> Thing:
        self._check_fields(body)
        email, reference = body.get("email"), body.get("external_ref")
        org_id = body.get("rev_org") or self.organisation.don("identity", "revo", "ACME")
        if kind_of(org_id) == "account" and not self.world.account_rev_orgs:
            message = "rev_org: the id of an account is not wanted here"
            raise Refused(400, "unexpected_id_type", message, field_name="rev_org", value=org_id)
        if "rev_org" in body and org_id not in self.organisation.rev_orgs:
            raise Refused(
                400, "value_not_permitted", "there is no such rev org", field_name="rev_org"
            )
        if email is not None and self.world.unique_emails:
            contacts = self.organisation.contacts.find([("email", [email])])
            if any(self.organisation.alive(one["id"]) for one in contacts):
                raise Refused(409, "conflict", f"{email!r} is the email of another contact")
        self._check_free(reference, org_id)
        more = shown(body, ("description", "phone_numbers", "display_picture"))
        rev_org = ("account/" if kind_of(org_id) == "account" else "") + org_id.rpartition("/")[2]
        contact_id = self.organisation.new_contact(
            email, reference, rev_org, display_name=body.get("display_name"), **more
        )
        return {"rev_user": self._shown(self.organisation.contacts[contact_id], True)}

    def _update_contact(self, body: Thing) -> Thing:
        contact, world = self._contact(body["id"]), self.world
        self._check_fields(body)
        former = contact.get("external_ref")
        moves = body.get("external_ref", former) != former
        is_changed = any(value != contact.get(name) for name, value in body.items())
        if world.unchanged_updates != 200 and not is_changed:
            raise Refused(400, "bad_request", "nothing would be changed")
        if moves and world.reference_updates != "works":
            status, kind = REFUSALS[world.reference_updates]
            raise Refused(status, kind, "this reference can't be used for another user")
        self._check_free(body.get("external_ref"), org_id_of(contact), contact["id"])
        changes = shown(body, (*OF_A_CONTACT, "custom_fields"))
        if "custom_fields" in changes:
            changes["custom_fields"] = {
                **contact.get("custom_fields", {}),
                **changes["custom_fields"],
            }
        if "external_ref" in changes and contact.get("external_refs"):
            old, new = contact["external_ref"], changes["external_ref"]
            changes["external_refs"] = list(
                dict.fromkeys(new if one == old else one for one in contact["external_refs"])
            )
        self.organisation.change(contact, **changes)
        if body.get("display_picture", "") is None:
            contact.pop("display_picture", None)
        if moves:
            world.put_back(contact["id"], former)
        return {"rev_user": self._shown(contact, is_own_answer=True)}

    def _delete_contact(self, body: Thing) -> Thing:
        self.organisation.delete_contact(self._contact(body["id"])["id"])
        return {}

    def _contact(self, contact_id: str) -> Record:
        if not self.organisation.alive(contact_id) or self._has_vanished(contact_id):
            raise not_found(contact_id)
        return self.organisation.contacts[contact_id]

    def _check_fields(self, body: Thing) -> None:
        names, status = self.world.refused_fields, self.world.refused_status
        for name in body:
            if name in names or f"{self._endpoint}.{name}" in names:
                message = f"{name}: this is not permitted"
                if status == 400:
                    raise Refused(400, "value_not_permitted", message, field_name=name)
                raise Refused(status, REFUSALS[str(status)][1], message)
        if not all(
            re.fullmatch(r"\+[1-9][0-9]{1,14}", number) for number in body.get("phone_numbers", ())
        ):
            message = "phone_numbers: this is not permitted"
            raise Refused(400, "value_not_permitted", message, field_name="phone_numbers")

    def _check_free(
        self, reference: Optional[str], org_id: Optional[str], contact_id: Optional[str] = None
    ) -> None:
        if reference is not None and self.organisation.holder(org_id, reference) not in (
            None,
            contact_id,
        ):
            raise Refused(409, "conflict", f"{reference!r} is held by another contact")

    # ----- works, conversations, timelines ---------------------------------------------------------

    def _list_works(self, body: Thing) -> Thing:
        return self._page("works", self._works(body), body)

    def _count_works(self, body: Thing) -> Thing:
        return {"count": len(self._works(body)), "has_more": False}

    def _works(self, body: Thing) -> List[Tuple[int, Thing]]:
        """The works that a request wants and the token may see."""
        hidden = set(self.world.hidden_kinds)
        if hidden.intersection(body.get("type", ())) and self.world.hidden_kinds_answer == "403":
            self._forbid((), refused=True)
        if not self.world.long_work_types:
            hidden.update(OTHER_WORK_KINDS)
        works = self._found(self.organisation.works, body, ("type", *ROLES))
        return [one for one in works if one[1]["type"] not in hidden]

    def _get_work(self, body: Thing) -> Thing:
        return {"work": existing(self.organisation.works, body["id"])}

    def _update_work(self, body: Thing) -> Thing:
        work = existing(self.organisation.works, body["id"])
        if body.get("type", work["type"]) != work["type"]:
            message = "{} is no {}".format(work["display_id"], body["type"])
            raise Refused(400, "value_not_permitted", message, field_name="type")
        if body.get("owned_by", {}).get("set") == []:
            raise Refused(
                400, "value_not_permitted", "owned_by.set: must not be empty", field_name="owned_by"
            )
        if not 1 <= len(body.get("title", "as it was")) <= 256:
            raise Refused(
                400, "value_not_permitted", "title: from 1 to 256 characters", field_name="title"
            )
        self._update_thing(work, body)
        return {"work": work}

    def _list_conversations(self, body: Thing) -> Thing:
        return self._page(
            "conversations", self._found(self.organisation.conversations, body, ("members",)), body
        )

    def _get_conversation(self, body: Thing) -> Thing:
        return {"conversation": existing(self.organisation.conversations, body["id"])}

    def _update_conversation(self, body: Thing) -> Thing:
        talk = existing(self.organisation.conversations, body["id"])
        self._update_thing(talk, body)
        return {"conversation": talk}

    def _list_entries(self, body: Thing) -> Thing:
        object_id = body["object"]
        organisation = self.organisation
        things = (organisation.works, organisation.conversations, organisation.contacts)
        if not any(object_id in collection for collection in things):
            raise not_found(object_id)
        visible = set(body.get("visibility", ()))
        entries = enumerate(organisation.timelines.get(object_id, ()))
        return self._page(
            "timeline_entries",
            [e for e in entries if not visible or e[1]["visibility"] in visible],
            body,
        )

    def _found(self, table: Table, body: Thing, names: Iterable[str]) -> List[Tuple[int, Thing]]:
        """What a list is about to show, each with its place in the whole list."""
        filters = [(name, body[name]) for name in names if body.get(name)]
        return [(table.numbers[one["id"]], one) for one in table.find(filters, self.world.list_lag)]

    def _update_thing(self, thing: Thing, body: Thing) -> None:
        changes = dict(body)
        for role in USER_LISTS:
            ids = changes.pop(role, {}).get("set")
            if ids is None:
                continue
            for user_id in ids:
                if kind_of(user_id) == "revu":
                    self._contact(user_id)
            try:
                changes[role] = self.organisation.people(ids)
            except KeyError as unknown:
                raise not_found(str(unknown.args[0])) from unknown
        self.organisation.change(thing, **changes)


def fits(contact: Thing, filters: Sequence[Filter]) -> bool:
    """Whether a contact has a value of every filter."""
    keys = set(contact_keys(contact))
    return all(any((name, value) in keys for value in values) for name, values in filters)


def not_found(object_id: str) -> Refused:
    """404: there is no such object, or there is none any more."""
    return Refused(404, "not_found", f"{object_id} was not found")


def existing(table: Table, object_id: str) -> Record:
    """An object by its id."""
    if object_id not in table:
        raise not_found(object_id)
    return table[object_id]


def shown(body: Thing, names: Iterable[str]) -> Thing:
    """The fields of a request that the answers show, as they show them."""
    fields = {
        name: body[name]
        for name in names
        if body.get(name) is not None and name != "custom_schema_spec"
    }
    if "display_picture" in fields:
        fields["display_picture"] = {"id": fields["display_picture"]}
    return fields


def page(
    name: str,
    things: Sequence[Tuple[int, Thing]],
    body: Thing,
    empty: int = 0,
    largest: Optional[int] = None,
    trailing: bool = False,
    paging: str = "cursor",
) -> Thing:
    """One page of a list, with a cursor where there is more.

    Each thing comes with its number, which stays the same whatever comes and goes: the number is where the next page
    starts. Before a page with things come `empty` ones without any, no page has more than `largest` things, and with
    `trailing` the last things have a cursor, too, which leads to an empty page.
    """
    limit = body.get("limit", DEFAULT_PAGE)
    if not 1 <= limit <= LARGEST_PAGE:
        message = f"limit: from 1 to {LARGEST_PAGE}"
        raise Refused(400, "value_not_permitted", message, field_name="limit")
    size = min(limit, largest or limit)
    start, served = start_of(name, body)
    if paging == "offset":
        things = [(place, thing) for place, (_, thing) in enumerate(things)]
    rest = [one for one in things if one[0] >= start][: size + 1]
    before = [one for one in things if one[0] < start] if "cursor" in body else []
    if rest and served < empty:
        return {name: [], "next_cursor": cursor(name, body, start, served + 1)}
    if paging == "overlap" and size > 1:
        rest = [*before[-1:], *rest][: size + 1]
    items = before[-size:] if paging == "again" and before else rest[:size]
    found = {name: [thing for _, thing in items]}  # type: Thing
    if len(rest) > size:
        found["next_cursor"] = cursor(name, body, rest[size][0])
    elif trailing and rest:
        found["next_cursor"] = cursor(name, body, rest[-1][0] + 1)
    return found


def cursor(name: str, body: Dict[str, Any], position: int, served: int = 0) -> str:
    """A cursor that is good for the same filters only, and says nothing to a client.

    It stands for a position, and for how many empty pages were served there.
    """
    filters = {key: value for key, value in body.items() if key not in PAGING}
    digest = hashlib.sha256(json.dumps([name, filters], sort_keys=True).encode()).hexdigest()[:16]
    return base64.urlsafe_b64encode(f"{digest}:{position}:{served}".encode()).decode()


def start_of(name: str, body: Dict[str, Any]) -> Tuple[int, int]:
    """The position that a cursor stands for, and how many empty pages were served there."""
    if "cursor" not in body:
        return 0, 0
    try:
        _, position, served = base64.urlsafe_b64decode(body["cursor"]).decode().split(":")
        found = int(position), int(served)
    except (binascii.Error, ValueError):
        found = -1, 0
    if min(found) < 0 or cursor(name, body, *found) != body["cursor"]:
        message = "the cursor is not one of this list"
        raise Refused(400, "value_not_permitted", message, field_name="cursor")
    return found


def merge_acknowledged(form: str, content: Any) -> Answer:
    """The acknowledgement of a merge, in one of the forms of World.merge_answer."""
    if form == "200-other":
        content = {"status": "accepted", "rev_user": None, "jobs": [{"state": "queued"}]}
    answer = json_answer(int(form[:3]), [] if form == "200-list" else content)
    if form in ("204", "200-empty", "202-empty"):
        answer.payload = b""
    return answer


STATES_LEFT = {  # of a merged contact
    "locked": "locked", "shadow": "shadow", "archived": "archived", "deactivated": "deactivated", "stale": "active",
    "no-email": "active", "no-reference": "active", "own-reference": "active", "bare": "active", "as-before": "active",
}  # fmt: skip
STAYS = ("", *(one for one in STATES_LEFT if one != "stale"))
ODD_POLLS = (
    "404-route", "404-other", "400", "403", "410", "500", "502", "503", "shape", "empty", "hang", "drip",
)  # fmt: skip
MERGE_MANNERS = ("works", "never", "400", "403", "409")


def odd_poll(manner: str, seconds: Optional[float]) -> Answer:
    """An answer for a contact that was merged, from which nobody can tell that it was."""
    if manner in ("hang", "drip"):
        answer = json_answer(200, {"rev_user": {}})
        return struck_after(Fault(manner, detail=seconds), answer)
    if manner == "404-route":
        return route_not_found()
    if manner == "404-other":
        return json_answer(
            404, {"message": "There is nothing to see here.", "type": "object_hidden"}
        )
    if manner == "shape":
        return json_answer(200, {"rev_user": {"id": 7, "state": ["deleted"]}})
    if manner == "empty":
        return Answer(200, b"")
    if manner == "502":
        return html_answer(502)
    return json_answer(int(manner), {"message": "Not so.", "type": REFUSALS[manner][1]})


# --------------------------------------------------------------------------------------------------
# The world
# --------------------------------------------------------------------------------------------------


class Quota:
    """So many units in a window; the windows follow each other from the first request on, or roll.

    `others` is what other clients spend of each window, at its start. With `rolls` every window ends with the moment
    that it is asked at, and the reset that is announced is always a window away.
    """

    def __init__(
        self,
        limit: int,
        window: float,
        epoch: Callable[[], float],
        others: int = 0,
        rolls: bool = False,
    ) -> None:
        self.limit = limit
        self.window = window
        self.others = others
        self.rolls = rolls
        self.whole_seconds = False
        self.share = 0.0  # of each window that another program takes
        self._epoch = epoch
        self._first: Optional[float] = None
        self._current = -1
        self._used = 0
        self._spent: Deque[float] = deque()  # when each unit of a rolling window was

    def take(self) -> Tuple[Dict[str, str], Optional[Answer]]:
        """The headers for one more request, and its 429 if there is nothing left."""
        now, reset = self._turn()
        granted = self._used < self.limit
        self._use(now, int(granted))
        headers = {
            "X-Ratelimit-Limit": str(self.limit),
            "X-Ratelimit-Remaining": str(self.limit - self._used),
            "X-Ratelimit-Reset": self._number(reset),
        }
        if granted:
            return headers, None
        if self.rolls:
            reset = self._spent[0] + self.window if self._spent else reset
        left = max(reset - now, 0.0)
        return headers, too_many(left, self._number(left), "The quota is used up.")

    def spend(self, units: int) -> None:
        """Others spend some units of the present window, as far as there are any."""
        now, _ = self._turn()
        self._use(now, min(units, self.limit - self._used))

    def _use(self, now: float, units: int) -> None:
        self._used += units
        if self.rolls:
            self._spent.extend([now] * units)

    def _turn(self) -> Tuple[float, float]:
        now = self._epoch()
        others = max(self.others, math.ceil(self.share * self.limit))
        if self.rolls:
            while self._spent and self._spent[0] <= now - self.window:
                self._spent.popleft()
            self._used = min(self.limit, others + len(self._spent))
            return now, now + self.window
        self._first = now if self._first is None else self._first
        current = int((now - self._first) // self.window)
        if current != self._current:
            self._current, self._used = current, min(self.limit, others)
        return now, self._first + (current + 1) * self.window

    def _number(self, seconds: float) -> str:
        if self.window >= 60 or self.whole_seconds:
            return str(math.ceil(seconds))
        return f"{math.ceil(seconds * 1000) / 1000:.3f}"


class Event(NamedTuple):
    """Something that is yet to happen."""

    due: float
    number: int
    action: Callable[[], Any]


class World:
    """An organisation, how DevRev serves it, and the books of who asked what.

    `clock` gives the seconds that everything here happens at, `epoch` (else the clock too) those of the quota's
    headers. `on_request(stage, request)` is called "before" and "after" each act. Everything else is a switch: an
    attribute that may be given by name here and be changed at any time. The module's docstring has them all.
    """

    GONE = ("404", "301", "state", "primary", "shadow", "unassigned")
    ODD = ("locked", "stale", *ODD_POLLS)
    CHOICES: Mapping[str, Collection[Any]] = {
        "gone": (*GONE, *ODD, "stays"),
        "stays": STAYS,
        "busy_status": (400, 409, 423, 425),
        "reference_updates": ("works", "400", "403", "409"),
        "unchanged_updates": (200, 400),
        "paging": ("cursor", "again", "overlap", "offset"),
        "unknown_kinds_answer": ("400", "400-bare", "403"),
        "merge_answer": ("200", "200-empty", "200-other", "200-list", "202", "202-empty", "204"),
        "unverified_merge": MERGE_MANNERS,
        "verified_merge": MERGE_MANNERS,
        "verified_shown": ("hidden", "shown", "null", "mixed"),
        "verified_filter": ("accepted", "400", "403"),
        "deleted_contacts": ("404", "state"),
        "retry_after": ("both", "header", "body", "neither"),
        "bad_token": ("unauthenticated", "token_expired", "token_revoked", "dev_org_deactivated"),
        "restricted_in_lists": ("shown", "left out", "403"),
        "hidden_kinds_answer": ("403", "left out"),
        "in_progress": (200, 400, 403, 409),
    }
    # Merges
    merge_delay = 0.3
    merge_answer = "200"
    in_progress = 200
    unverified_merge = "works"
    verified_merge = "works"
    gone = "404"
    stays = ""
    merge_jobs: Optional[int] = None
    busy_status = 409
    gone_seconds: Optional[float] = None
    moved_to = ""
    location: Optional[str] = None
    # Contacts
    verified_shown = "hidden"
    verified_filter = "accepted"
    hidden_fields: Collection[str] = ()
    refused_fields: Collection[str] = ()
    refused_status = 400
    reference_updates = "works"
    unchanged_updates = 200
    reference_lag = 0.0
    puts_back = 0.0
    puts_back_after = 0.0
    vanished: Collection[str] = ()
    account_rev_orgs = False
    unique_emails = False
    email_ignores_case = False
    deleted_listed = False
    deleted_contacts = "404"
    # Lists
    list_lag = 0.0
    max_ids: Optional[int] = None
    thin_lists: Collection[str] = ("timeline-entries.list",)
    empty_pages: Union[int, Callable[[str, int], int]] = 0
    largest_page: Optional[int] = None
    trailing_page = False
    paging = "cursor"
    paging_lists: Collection[str] = ("*",)
    paging_times: Optional[int] = None
    cursor_life: Optional[float] = None
    # Works
    long_work_types = False
    unknown_kinds: Collection[str] = ()
    unknown_kinds_answer = "400"
    hidden_kinds: Collection[str] = ()
    hidden_kinds_answer = "403"
    # Refusals
    bad_token = "unauthenticated"
    forbidden: Collection[str] = ()
    restricted: Collection[str] = ()
    restricted_timelines: Collection[str] = ()
    restricted_writes: Collection[str] = ()
    restricted_in_lists = "shown"
    names_object_ids = True
    firewall: Collection[str] = ()
    firewall_status = 403
    max_bytes: Optional[int] = None
    # Quota
    quota_share = 0.0
    quota_rolls = False
    quota_whole_seconds = False
    quota_headers = True
    retry_after = "both"

    def __init__(
        self,
        organisation: Organisation,
        clock: Callable[[], float],
        epoch: Optional[Callable[[], float]] = None,
        *,
        token: str = "sandbox-token",
        quota: Optional[Tuple[int, float]] = None,
        faults: Iterable[Fault] = (),
        seed: int = 0,
        on_request: Optional[Callable[[str, Request], None]] = None,
        **switches: Any,
    ) -> None:
        self.organisation = organisation
        self.clock = organisation.clock = clock
        self.token = token
        self.url = ""
        self.gone_of: Dict[str, str] = {}
        self.faults: List[Fault] = list(faults)
        self._epoch = epoch or clock
        self.quota = Quota(*quota, self._epoch) if quota else None
        self.on_request = on_request
        for name, value in switches.items():
            if name not in SWITCHES:
                raise TypeError(f"{name} is no switch: one of {', '.join(sorted(SWITCHES))}")
            setattr(self, name, value)
        self.requests: List[Request] = []
        self.over_quota = 0
        self._chance = random.Random(seed)
        self._api = Api(self)
        self._pending: Set[Tuple[str, str]] = set()
        self.cursors: Dict[str, float] = {}  # when each was given out
        self._put_back: Counter[str] = Counter()
        self._events: List[Event] = []
        self._numbers = itertools.count()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.CHOICES and value not in self.CHOICES[name]:
            raise ValueError(
                f"{name}: {value!r} is none of {', '.join(map(str, self.CHOICES[name]))}"
            )
        super().__setattr__(name, value)
        if name in ("quota_rolls", "quota_whole_seconds", "quota_share") and self.quota:
            setattr(self.quota, name[len("quota_") :], value)

    # ----- requests --------------------------------------------------------------------------------

    def respond(self, endpoint: str, body: Thing, token: Optional[str]) -> Answer:
        """What comes back for a request that arrives now."""
        return self.answer(self.record(endpoint, body), token)

    def record(self, endpoint: str, body: Thing, started: Optional[float] = None) -> Request:
        """Enter a request into the books."""
        self.catch_up()
        with self.organisation.lock:
            request = Request(
                len(self.requests) + 1, endpoint, body, self.clock() if started is None else started
            )
            self.requests.append(request)
        self._tell("before", request)
        return request

    def answer(
        self, request: Request, token: Optional[str], problem: Optional[Refused] = None
    ) -> Answer:
        """Decide what comes back. The quota comes first, then faults, the token and the request."""
        self.catch_up()
        with self.organisation.lock:
            headers, answer = self.quota.take() if self.quota else ({}, None)
            if answer is None:
                answer = self._decide(request, token, problem)
            else:
                self.over_quota += 1
            if self.quota_headers and request.fault != "429-bare":
                answer.headers = {**headers, **answer.headers}
            if answer.status == 429:
                wait_told(answer, self.retry_after)
        request.status = answer.status if answer.manner in ("send", "cut", "drip") else None
        request.ended = self.clock()
        self._tell("after", request)
        return answer

    def count(self, endpoint: Optional[str] = None) -> int:
        """How many requests were made, in all or to an endpoint."""
        with self.organisation.lock:
            return sum(1 for r in self.requests if endpoint is None or r.endpoint == endpoint)

    def _decide(self, request: Request, token: Optional[str], problem: Optional[Refused]) -> Answer:
        fault = self._pick_fault(request)
        if fault is not None and fault.kind in BEFORE_THE_ACT:
            return struck_before(fault)
        if token != self.token:
            answer = Refused(401, self.bad_token, "The token is not valid.").answer
        elif problem is not None:
            answer = problem.answer
        elif request.endpoint not in SHAPES:
            answer = route_not_found()
        elif any(fnmatch.fnmatchcase(request.endpoint, pattern) for pattern in self.forbidden):
            answer = Refused(403, "forbidden", "The token may not do that.").answer
        else:
            answer = self._act(request, fault)
        if fault is not None and fault.kind in AFTER_THE_ACT:
            return struck_after(fault, answer)
        return answer

    def _act(self, request: Request, fault: Optional[Fault]) -> Answer:
        body = request.body
        if fault is not None and fault.kind == "endless":
            body = {name: value for name, value in body.items() if name != "cursor"}
        answer = self._api.act(request.endpoint, body, fault)
        if fault is not None and fault.kind in ("doubled", "merge-doubled"):
            again = functools.partial(self._api.act, request.endpoint, body)
            if fault.detail is None:
                return again()
            self.later(float(fault.detail), again)
        return answer

    def _pick_fault(self, request: Request) -> Optional[Fault]:
        for fault in list(self.faults):
            if fault.strikes(request, self._chance):
                request.fault = fault.kind
                return fault
        return None

    def _tell(self, stage: str, request: Request) -> None:
        if self.on_request is not None:
            self.on_request(stage, request)

    # ----- what happens later ----------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], Any]) -> None:
        """Let something happen at its time: a merge, or what others do."""
        with self.organisation.lock:
            heapq.heappush(
                self._events, Event(self.organisation.now() + seconds, next(self._numbers), action)
            )

    def next_due(self) -> Optional[float]:
        """When the next thing happens of which is known already that it will."""
        return self._events[0].due if self._events else None

    def catch_up(self) -> None:
        """Let everything happen that is due, each at the moment it was due."""
        with self.organisation.lock:
            while self._events and self._events[0].due <= self.clock():
                self._happen(self._events[0].due)

    def settle(self) -> None:
        """Let everything happen that is pending, without waiting for its time."""
        with self.organisation.lock:
            while self._events:
                self._happen(min(self.clock(), self._events[0].due))

    def plan_merge(self, primary: str, secondary: str, fault: Optional[Fault]) -> None:
        """Take a merge on, unless the same one is pending; Refused where a fault or `in_progress` says so."""
        kind, detail = (fault.kind, fault.detail) if fault else ("", None)
        pending = (primary, secondary) in self._pending
        status, delay = self.in_progress, self.merge_delay
        if kind == "merge-slow":
            delay = 5.0 if detail is None else float(detail)
        if kind == "merge-refused-late":
            status, delay = detail if isinstance(detail, tuple) else (detail or 400, delay)
        is_busy = self.merge_jobs is not None and len(self._pending) >= self.merge_jobs
        if is_busy and not pending:
            message = "another merge is in progress, try again later"
            raise Refused(self.busy_status, REFUSALS[str(self.busy_status)][1], message)
        if kind != "merge-never" and not pending:
            self._pending.add((primary, secondary))
            left = detail if kind == "merge-leaves" else ()
            self.later(delay, lambda: self._carry_out(primary, secondary, left))
        if status != 200 and (pending or kind == "merge-refused-late"):
            message = (
                "a merge of these contacts is in progress already"
                if pending
                else "this can't be merged"
            )
            raise Refused(status, REFUSALS[str(status)][1], message)

    def put_back(self, contact_id: str, reference: Optional[str]) -> None:
        """Let something put a contact's former reference back, where the switches say so."""
        if self._put_back[contact_id] >= self.puts_back:
            return
        self._put_back[contact_id] += 1

        def act() -> None:
            if self.organisation.alive(contact_id):
                contact = self.organisation.contacts[contact_id]
                self.organisation.change(contact, external_ref=reference)

        self.later(self.puts_back_after, act)

    def set_quota(self, limit: int, window: float, **more: Any) -> None:
        """Let DevRev have a quota from now on: so many units in a window of so many seconds."""
        self.quota = Quota(limit, window, self._epoch, **more)
        for name in ("quota_rolls", "quota_whole_seconds", "quota_share"):
            setattr(self, name, getattr(self, name))

    def _happen(self, moment: float) -> None:
        event = heapq.heappop(self._events)
        self.organisation.moment = moment
        try:
            event.action()
        finally:
            self.organisation.moment = None

    def _carry_out(self, primary: str, secondary: str, left: Optional[Collection[str]]) -> None:
        self._pending.discard((primary, secondary))
        if self.organisation.alive(primary) and self.organisation.alive(secondary):
            if left is None:
                left = [self.organisation.first_work_of(secondary) or ""]
            self.organisation.merge(primary, secondary, left)


SWITCHES = frozenset(
    name
    for name, value in vars(World).items()
    if name.islower() and name[0] != "_" and not callable(value)
) | {"gone_of"}
