"""A DevRev organisation on loopback that speaks real HTTP.

Merging contacts cannot be undone, so nothing here ever talks to DevRev. The sandbox answers the
same requests on 127.0.0.1, misbehaves on demand, and knows the truth afterwards: what was merged,
which references moved, and what every single request was.

    python -m tests.sandbox                      merge a sample export and show what happened
    python -m tests.sandbox serve --port 8123    stay up, to try the tool by hand

In a test:

    organisation = Organisation()
    primary = organisation.add_contact("1", "ada@example.com")
    secondary = organisation.add_contact("2", "ada@example.com", external_ref="user_2")
    with Sandbox(organisation, faults=[Fault("503", "works.list", times=2)]) as sandbox:
        ...                                      # run the tool with sandbox.environment()
    assert organisation.merges == [(primary, secondary)]
"""

import argparse
import base64
import binascii
import contextlib
import csv
import datetime
import fnmatch
import hashlib
import heapq
import html
import itertools
import json
import math
import os
import random
import re
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_CSV = Path(__file__).resolve().parent / "data" / "contacts.csv"

DEFAULT_PAGE = 50
LARGEST_PAGE = 100

USER_KINDS = ("devu", "revu", "svcacc", "sysu")
WORK_KINDS = ("issue", "ticket")
ROLES = ("reported_by", "owned_by", "created_by")
USER_LISTS = ("owned_by", "reported_by", "members")

# --------------------------------------------------------------------------------------------------
# Ground truth
# --------------------------------------------------------------------------------------------------


class Organisation:
    """What is true, whatever a client was told.

    Contacts, works and conversations are kept just as the API answers them. A user's summary is one
    dictionary shared by everything the user appears in, so a changed reference shows everywhere.
    """

    def __init__(self, key: str = "SANDBOX1", partition: str = "dvrv-us-1") -> None:
        self.key = key
        self.partition = partition
        self.lock = threading.RLock()
        self.contacts: Dict[str, Dict[str, Any]] = {}
        self.works: Dict[str, Dict[str, Any]] = {}
        self.conversations: Dict[str, Dict[str, Any]] = {}
        self.timelines: Dict[str, List[Dict[str, Any]]] = {}
        self.merges: List[Tuple[str, str]] = []
        self.merged_into: Dict[str, str] = {}
        self._summaries: Dict[str, Dict[str, Any]] = {}
        self._numbers: Dict[str, int] = Counter()
        self._minutes = itertools.count()
        self.dev_user = self._add_dev_user("1", "Dana Developer", "dana.developer@example.com")

    @classmethod
    def from_csv(cls, path: Union[str, Path]) -> "Organisation":
        """An organisation for which the export at `path` is accurate, the same one every time."""
        return seed(cls, path)

    def don(self, service: str, kind: str, key: object) -> str:
        """The id of an object, e.g. `don:core:dvrv-us-1:devo/SANDBOX1:ticket/7`."""
        return f"don:{service}:{self.partition}:devo/{self.key}:{kind}/{key}"

    def add_contact(
        self,
        key: str,
        email: Optional[str],
        external_ref: Optional[str] = None,
        display_name: Optional[str] = None,
        rev_org: str = "ACME",
        state: str = "active",
        created: str = "2024-01-01T00:00:00.000Z",
    ) -> str:
        """Add a contact and return its id. Its reference must be free in its rev org."""
        with self.lock:
            contact_id = self.don("identity", "revu", key)
            reference = "REVU-" + key if external_ref is None else external_ref
            org = self._org_summary(rev_org)
            if contact_id in self.contacts:
                raise ValueError(f"{contact_id} exists already")
            holder = self.holder(org["id"], reference)
            if holder is not None:
                raise ValueError(f"{reference} is held by {holder}")
            contact: Dict[str, Any] = {
                "id": contact_id,
                "display_id": "REVU-" + key,
                "display_name": display_name or (email or key).split("@")[0],
                "external_ref": reference,
                "state": state,
                "rev_org": org,
                "created_date": created,
                "modified_date": created,
                "created_by": self._summaries[self.dev_user["id"]],
            }
            if email is not None:
                contact["email"] = email
            self.contacts[contact_id] = contact
            self._summarise("rev_user", contact)
            return contact_id

    def add_work(
        self,
        owned_by: Iterable[str] = (),
        created_by: Optional[str] = None,
        reported_by: Iterable[str] = (),
        kind: str = "ticket",
        title: Optional[str] = None,
        comments: int = 0,
    ) -> str:
        """Add a ticket or an issue and return its id. A dev user fills the roles nobody has."""
        prefix = {"ticket": "TKT", "issue": "ISS"}[kind]
        with self.lock:
            work = self._new_object(kind, prefix, created_by)
            work["type"] = kind
            work["title"] = title or "About {}".format(work["display_id"])
            work["body"] = "What {} is about, in a sentence or two.".format(work["display_id"])
            work["stage"] = {"name": "queued" if kind == "ticket" else "triage"}
            work["owned_by"] = self.people(owned_by) or self.people([self.dev_user["id"]])
            work["reported_by"] = self.people(reported_by)
            work.update({"severity": "medium"} if kind == "ticket" else {"priority": "p2"})
            self.works[work["id"]] = work
            self._add_comments(work, comments)
            return str(work["id"])

    def add_conversation(self, members: Iterable[str] = (), title: Optional[str] = None, comments: int = 0) -> str:
        """Add a conversation, created by its first member, and return its id."""
        with self.lock:
            people = list(members)
            talk = self._new_object("conversation", "CONV", people[0] if people else None)
            talk["title"] = title or "Talk {}".format(talk["display_id"])
            talk["stage"] = {"name": "new"}
            talk["source_channel"] = "plug"
            talk["members"] = self.people(people)
            talk["owned_by"] = self.people([self.dev_user["id"]])
            self.conversations[talk["id"]] = talk
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

    def merge(self, primary: str, secondary: str, leave_behind: Collection[str] = ()) -> None:
        """Carry out a merge at once: the secondary's roles move, its reference becomes free."""
        with self.lock:
            if primary == secondary or not (self.alive(primary) and self.alive(secondary)):
                raise ValueError(f"{secondary} can't be merged into {primary}")
            for thing in self._everything():
                if thing["id"] not in leave_behind:
                    self._hand_over(thing, secondary, primary)
            self.contacts[secondary]["state"] = "deleted"
            self._summarise("rev_user", self.contacts[secondary])
            self.merged_into[secondary] = primary
            self.merges.append((primary, secondary))

    def alive(self, contact_id: str) -> bool:
        """Whether the contact exists and hasn't been merged into another."""
        return contact_id in self.contacts and contact_id not in self.merged_into

    def survivor(self, contact_id: str) -> str:
        """Who the contact is now, after any number of merges."""
        while contact_id in self.merged_into:
            contact_id = self.merged_into[contact_id]
        return contact_id

    def holder(self, rev_org_id: str, reference: str) -> Optional[str]:
        """The id of the contact that holds a reference in a rev org."""
        with self.lock:
            for contact in self.contacts.values():
                if contact.get("external_ref") != reference:
                    continue
                if contact["rev_org"]["id"] == rev_org_id and self.alive(contact["id"]):
                    return str(contact["id"])
        return None

    def change(self, thing: Dict[str, Any], **fields: Any) -> None:
        """Set fields of a contact, a work or a conversation."""
        with self.lock:
            thing.update(fields, modified_date=self._now())
            if thing["id"] in self.contacts:
                self._summarise("rev_user", thing)

    def people(self, ids: Iterable[str]) -> List[Dict[str, Any]]:
        """The summaries of users; KeyError for one who doesn't exist."""
        return [self._summaries[user_id] for user_id in dict.fromkeys(ids)]

    def first_work_of(self, user_id: str) -> Optional[str]:
        """The oldest work on which the user has any role."""
        with self.lock:
            for work in self.works.values():
                people = work["owned_by"] + work["reported_by"] + [work["created_by"]]
                if any(person["id"] == user_id for person in people):
                    return str(work["id"])
        return None

    def _everything(self) -> Iterable[Dict[str, Any]]:
        return itertools.chain(self.works.values(), self.conversations.values())

    def _hand_over(self, thing: Dict[str, Any], secondary: str, primary: str) -> None:
        changes: Dict[str, Any] = {}
        for role in USER_LISTS:
            if has_any(thing.get(role, []), {secondary}):
                ids = [person["id"] for person in thing[role]]
                changes[role] = self.people(primary if i == secondary else i for i in ids)
        if thing["created_by"]["id"] == secondary:
            changes["created_by"] = self._summaries[primary]
        if changes:
            self.change(thing, **changes)

    def _add_dev_user(self, key: str, name: str, email: str) -> Dict[str, Any]:
        user = {
            "id": self.don("identity", "devu", key),
            "display_id": "DEVU-" + key,
            "display_name": name,
            "full_name": name,
            "email": email,
            "state": "active",
            "created_date": "2023-01-01T00:00:00.000Z",
        }
        self._summarise("dev_user", user)
        return user

    def _summarise(self, kind: str, user: Dict[str, Any]) -> None:
        fields = ("id", "display_id", "display_name", "email", "state", "external_ref", "rev_org")
        summary = self._summaries.setdefault(user["id"], {"type": kind})
        summary.update({name: user[name] for name in fields if name in user})

    def _org_summary(self, key: str) -> Dict[str, Any]:
        return {
            "type": "rev_org",
            "id": self.don("identity", "revo", key),
            "display_id": "REV-" + key,
            "display_name": key.capitalize(),
        }

    def _new_object(self, kind: str, prefix: str, created_by: Optional[str]) -> Dict[str, Any]:
        self._numbers[kind] += 1
        now = self._now()
        return {
            "id": self.don("core", kind, self._numbers[kind]),
            "display_id": f"{prefix}-{self._numbers[kind]}",
            "created_by": self._summaries[created_by or self.dev_user["id"]],
            "created_date": now,
            "modified_date": now,
        }

    def _add_comments(self, parent: Dict[str, Any], number: int) -> None:
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
        try:
            contact = organisation.add_contact(
                row.key, row.email, row.reference, row.name, row.rev_org, created=row.created
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
    values = {(name or "").strip().upper(): value for name, value in record.items()}
    try:
        user = ID.fullmatch(values["REV_USER_ID"].strip())
        tickets = int(values["TICKET_COUNT"])
        email, reference = values["EMAIL"].strip(), values["EXTERNAL_REF"].strip()
        name, created = values["DISPLAY_NAME"].strip(), values["CREATED_AT"].strip()
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if user is None or tickets < 0 or not email or not reference:
        return None
    where = user.group("partition"), user.group("org"), user.group("key")
    return ExportRow(*where, name, email, reference, "ACME", created, tickets)


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
    "403": (403, "forbidden"),
    "429": (429, "too_many_requests"),
    "429-bare": (429, "too_many_requests"),
    "500": (500, "internal_error"),
    "503": (503, "service_unavailable"),
}
BEFORE_THE_ACT = tuple(REFUSALS) + ("502", "html-200", "reset-before", "hang")
AFTER_THE_ACT = ("reset-after", "cut", "500-after", "hang-after", "changed")
OF_A_MERGE = ("merge-never", "merge-leaves", "merge-slow")
FAULTS = BEFORE_THE_ACT + AFTER_THE_ACT + OF_A_MERGE


@dataclass
class Fault:
    """One misbehaviour: which requests it strikes, and how often.

    A request is struck by the first fault of the sandbox's list that wants it; the ones behind it
    don't get to see the request.
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
    """What goes back, and how: `send`, `cut` in half, `reset`, or `hang` for some seconds."""

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


def json_answer(status: int, content: Dict[str, Any]) -> Answer:
    """An answer as the API itself gives it."""
    return Answer(status, json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))


def html_answer(status: int) -> Answer:
    """An answer as a gateway in front of the API gives it."""
    phrase = html.escape(HTTPStatus(status).phrase)
    page = f"<html><head><title>{phrase}</title></head><body><h1>{phrase}</h1></body></html>"
    return Answer(status, page.encode("utf-8"), content_type="text/html; charset=utf-8")


def too_many(seconds: float, text: str, message: str) -> Answer:
    """A 429 that says how long to wait, in the header as `text` and in the body rounded up."""
    fields = {"message": message, "type": "too_many_requests", "retry_after": math.ceil(seconds)}
    answer = json_answer(429, fields)
    answer.headers["Retry-After"] = text
    return answer


def struck_before(fault: Fault) -> Answer:
    """The answer to a request that a fault keeps from being carried out."""
    if fault.kind == "429":
        seconds = 0.2 if fault.detail is None else float(fault.detail)
        return too_many(seconds, f"{seconds:g}", "Slow down.")
    if fault.kind in REFUSALS:
        status, kind = REFUSALS[fault.kind]
        return json_answer(status, {"message": HTTPStatus(status).phrase, "type": kind})
    if fault.kind in ("502", "html-200"):
        return html_answer(502 if fault.kind == "502" else 200)
    return struck_after(fault, Answer(0, b""))


def struck_after(fault: Fault, answer: Answer) -> Answer:
    """What becomes of the answer to a request that was carried out."""
    if fault.kind == "500-after":
        return json_answer(500, {"message": "Something broke.", "type": "internal_error"})
    if fault.kind.startswith("hang"):
        answer.seconds = 60.0 if fault.detail is None else float(fault.detail)
    if fault.kind == "changed":
        content = json.loads(answer.payload.decode("utf-8"))
        return json_answer(answer.status, fault.detail(content) if fault.detail else {})
    answer.manner = fault.kind.split("-")[0]
    return answer


# --------------------------------------------------------------------------------------------------
# The API: request shapes and endpoints
# --------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A property of a request. `allowed` are the kinds of an id or the values of an enumeration."""

    kind: str
    allowed: Tuple[str, ...] = ()
    required: bool = False


JSON_TYPES = {"id": str, "text": str, "enum": str, "int": int, "set": dict}
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
WORK = Field("id", WORK_KINDS, required=True)
PAGING = {"cursor": TEXT, "limit": Field("int"), "mode": Field("enum", ("after",))}

SHAPES: Dict[str, Dict[str, Field]] = {
    "dev-users.self": {},
    "rev-users.get": {"id": CONTACT},
    "rev-users.list": dict(PAGING, email=TEXTS, external_ref=TEXTS),
    "rev-users.merge": {"primary_user": CONTACT, "secondary_user": CONTACT},
    "rev-users.update": {
        "id": CONTACT,
        "external_ref": TEXT,
        "display_name": TEXT,
        "description": TEXT,
        "email": TEXT,
        "phone_numbers": TEXTS,
    },
    "works.list": dict(
        PAGING,
        type=Field("enums", WORK_KINDS),
        owned_by=USERS,
        created_by=USERS,
        reported_by=USERS,
    ),
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
        "title": TEXT,
        "description": TEXT,
    },
    "timeline-entries.list": dict(
        PAGING,
        object=Field("id", WORK_KINDS + ("conversation", "revu"), required=True),
        visibility=Field("enums", ("external", "internal", "private", "public")),
    ),
}
POST_ONLY = ("rev-users.merge", "rev-users.update", "works.update", "conversations.update")


def check_shape(shape: Dict[str, Field], body: Dict[str, Any], max_ids: Optional[int]) -> None:
    """Refuse a body with a property that is missing, unknown or of the wrong kind.

    The sandbox knows the properties it acts on and no others: a filter that was accepted and then
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
        raise Refused(400, "unexpected_id_type", message, field_name=name)


def from_query(shape: Dict[str, Field], query: str) -> Dict[str, Any]:
    """The body that a GET spells as a query string; arrays are repeated or separated by commas."""
    body: Dict[str, Any] = {}
    for name, values in urllib.parse.parse_qs(query, keep_blank_values=True).items():
        kind = shape[name].kind if name in shape else "text"
        if kind.endswith("s"):
            body[name] = [part for value in values for part in value.split(",")]
        elif kind == "int" and re.fullmatch(r"-?[0-9]+", values[-1]):
            body[name] = int(values[-1])
        else:
            body[name] = values[-1]
    return body


class Api:
    """What each endpoint does. Every method runs while the organisation's lock is held."""

    def __init__(self, sandbox: "Sandbox") -> None:
        self.sandbox = sandbox
        self.organisation = sandbox.organisation
        self._endpoints: Dict[str, Callable[[Dict[str, Any]], Dict[str, Any]]] = {
            "dev-users.self": self._self,
            "rev-users.get": self._get_contact,
            "rev-users.list": self._list_contacts,
            "rev-users.update": self._update_contact,
            "works.list": self._list_works,
            "works.get": self._get_work,
            "works.update": self._update_work,
            "conversations.list": self._list_conversations,
            "conversations.get": self._get_conversation,
            "conversations.update": self._update_conversation,
            "timeline-entries.list": self._list_entries,
        }

    def act(self, request: Request, fault: Optional[Fault]) -> Answer:
        """Carry a request out. Whatever it says is serialised before anyone else can change it."""
        try:
            check_shape(SHAPES[request.endpoint], request.body, self.sandbox.max_ids)
            with self.organisation.lock:
                if request.endpoint == "rev-users.merge":
                    return json_answer(200, self._merge(request.body, fault))
                return json_answer(200, self._endpoints[request.endpoint](request.body))
        except Refused as refusal:
            return refusal.answer

    def _self(self, body: Dict[str, Any]) -> Dict[str, Any]:
        return {"dev_user": self.organisation.dev_user}

    def _get_contact(self, body: Dict[str, Any]) -> Dict[str, Any]:
        contact_id = body["id"]
        if contact_id not in self.organisation.contacts:
            raise not_found(contact_id)
        if not self.organisation.alive(contact_id):
            return self._get_merged_contact(contact_id)
        return {"rev_user": self.organisation.contacts[contact_id]}

    def _get_merged_contact(self, contact_id: str) -> Dict[str, Any]:
        survivor = self.organisation.survivor(contact_id)
        if self.sandbox.gone == "state":
            return {"rev_user": self.organisation.contacts[contact_id]}
        if self.sandbox.gone == "primary":
            return {"rev_user": self.organisation.contacts[survivor]}
        if self.sandbox.gone == "301":
            moved = Refused(301, "moved_permanently", "The object has another id now.")
            address = "{}/rev-users.get?id={}"
            base = self.sandbox.moved_to or self.sandbox.url
            place = address.format(base, urllib.parse.quote(survivor, safe=""))
            moved.answer.headers["Location"] = place
            raise moved
        raise not_found(contact_id)

    def _list_contacts(self, body: Dict[str, Any]) -> Dict[str, Any]:
        emails, references = set(body.get("email", ())), set(body.get("external_ref", ()))

        def wanted(contact: Dict[str, Any]) -> bool:
            if not self.organisation.alive(contact["id"]):
                return False
            if emails and contact.get("email") not in emails:
                return False
            return not references or contact.get("external_ref") in references

        contacts = self.organisation.contacts.values()
        return page("rev_users", list(contacts), wanted, body)

    def _merge(self, body: Dict[str, Any], fault: Optional[Fault]) -> Dict[str, Any]:
        primary, secondary = body["primary_user"], body["secondary_user"]
        if primary == secondary:
            message = "a contact can't be merged into itself"
            raise Refused(400, "value_not_permitted", message, field_name="secondary_user")
        for contact_id in (primary, secondary):
            if not self.organisation.alive(contact_id):
                raise not_found(contact_id)
        if fault is None or fault.kind != "merge-never":
            self.sandbox.merge_queue.put(primary, secondary, self.sandbox.merge_delay, fault)
        return {}

    def _update_contact(self, body: Dict[str, Any]) -> Dict[str, Any]:
        contact = self._existing(self.organisation.contacts, body["id"])
        reference = body.get("external_ref")
        if reference is not None:
            holder = self.organisation.holder(contact["rev_org"]["id"], reference)
            if holder not in (None, contact["id"]):
                message = f"{reference!r} is held by another contact"
                raise Refused(409, "conflict", message)
        self.organisation.change(contact, **body)
        return {"rev_user": contact}

    def _list_works(self, body: Dict[str, Any]) -> Dict[str, Any]:
        kinds = set(body.get("type", ()))
        roles = [(role, set(body[role])) for role in ROLES if body.get(role)]

        def wanted(work: Dict[str, Any]) -> bool:
            if kinds and work["type"] not in kinds:
                return False
            for role, ids in roles:
                people = [work[role]] if role == "created_by" else work[role]
                if ids.isdisjoint([person["id"] for person in people]):
                    return False
            return True

        return page("works", list(self.organisation.works.values()), wanted, body)

    def _get_work(self, body: Dict[str, Any]) -> Dict[str, Any]:
        return {"work": self._existing(self.organisation.works, body["id"])}

    def _update_work(self, body: Dict[str, Any]) -> Dict[str, Any]:
        work = self._existing(self.organisation.works, body["id"])
        if body.get("type", work["type"]) != work["type"]:
            message = "{} is no {}".format(work["display_id"], body["type"])
            raise Refused(400, "value_not_permitted", message, field_name="type")
        self._update_thing(work, body)
        return {"work": work}

    def _list_conversations(self, body: Dict[str, Any]) -> Dict[str, Any]:
        members = set(body.get("members", ()))

        def wanted(talk: Dict[str, Any]) -> bool:
            return not members or has_any(talk["members"], members)

        talks = list(self.organisation.conversations.values())
        return page("conversations", talks, wanted, body)

    def _get_conversation(self, body: Dict[str, Any]) -> Dict[str, Any]:
        return {"conversation": self._existing(self.organisation.conversations, body["id"])}

    def _update_conversation(self, body: Dict[str, Any]) -> Dict[str, Any]:
        talk = self._existing(self.organisation.conversations, body["id"])
        self._update_thing(talk, body)
        return {"conversation": talk}

    def _list_entries(self, body: Dict[str, Any]) -> Dict[str, Any]:
        object_id = body["object"]
        organisation = self.organisation
        things = (organisation.works, organisation.conversations, organisation.contacts)
        if not any(object_id in collection for collection in things):
            raise not_found(object_id)
        visible = set(body.get("visibility", ()))
        entries = organisation.timelines.get(object_id, [])
        return page("timeline_entries", entries, lambda e: not visible or e["visibility"] in visible, body)

    def _existing(self, things: Dict[str, Dict[str, Any]], object_id: str) -> Dict[str, Any]:
        if object_id not in things or object_id in self.organisation.merged_into:
            raise not_found(object_id)
        return things[object_id]

    def _update_thing(self, thing: Dict[str, Any], body: Dict[str, Any]) -> None:
        changes = dict(body)
        for role in USER_LISTS:
            ids = changes.pop(role, {}).get("set")
            if ids is None:
                continue
            for user_id in ids:
                if kind_of(user_id) == "revu" and not self.organisation.alive(user_id):
                    raise not_found(user_id)
            try:
                changes[role] = self.organisation.people(ids)
            except KeyError as unknown:
                raise not_found(str(unknown.args[0])) from unknown
        self.organisation.change(thing, **changes)


def not_found(object_id: str) -> Refused:
    """404: there is no such object, or there is none any more."""
    return Refused(404, "not_found", f"{object_id} was not found")


def has_any(people: List[Dict[str, Any]], ids: Set[str]) -> bool:
    """Whether one of the users is among those of a role."""
    return any(person["id"] in ids for person in people)


def page(
    name: str,
    things: List[Dict[str, Any]],
    wanted: Callable[[Dict[str, Any]], bool],
    body: Dict[str, Any],
) -> Dict[str, Any]:
    """One page of a list, with a cursor where there is more.

    Nothing is ever removed from the organisation's lists, so a position in the whole list is where
    the next page starts, whatever has changed in between.
    """
    limit = body.get("limit", DEFAULT_PAGE)
    if not 1 <= limit <= LARGEST_PAGE:
        message = f"limit: from 1 to {LARGEST_PAGE}"
        raise Refused(400, "value_not_permitted", message, field_name="limit")
    found: List[Dict[str, Any]] = []
    for position in range(start_of(name, body), len(things)):
        if not wanted(things[position]):
            continue
        if len(found) == limit:
            return {name: found, "next_cursor": cursor(name, body, position)}
        found.append(things[position])
    return {name: found}


def cursor(name: str, body: Dict[str, Any], position: int) -> str:
    """A cursor that is good for the same filters only, and says nothing to a client."""
    filters = {key: value for key, value in body.items() if key not in PAGING}
    digest = hashlib.sha256(json.dumps([name, filters], sort_keys=True).encode()).hexdigest()[:16]
    return base64.urlsafe_b64encode(f"{digest}:{position}".encode()).decode()


def start_of(name: str, body: Dict[str, Any]) -> int:
    """The position that a cursor stands for."""
    if "cursor" not in body:
        return 0
    try:
        position = int(base64.urlsafe_b64decode(body["cursor"]).decode().partition(":")[2])
    except (binascii.Error, ValueError):
        position = -1
    if position < 0 or cursor(name, body, position) != body["cursor"]:
        message = "the cursor is not one of this list"
        raise Refused(400, "value_not_permitted", message, field_name="cursor")
    return position


class Merge(NamedTuple):
    """A merge that was acknowledged and is yet to be carried out."""

    due: float
    number: int
    primary: str
    secondary: str
    fault: Optional[Fault]


class MergeQueue:
    """Carries merges out later, one after the other, as DevRev does.

    Its condition uses the organisation's own lock: whoever holds it sees a merge either pending or
    done, never in between.
    """

    def __init__(self, organisation: Organisation) -> None:
        self.organisation = organisation
        self._changed = threading.Condition(organisation.lock)
        self._pending: List[Merge] = []
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sandbox-merges", daemon=True)
        self._thread.start()

    def put(self, primary: str, secondary: str, delay: float, fault: Optional[Fault]) -> None:
        """Plan a merge, unless the same one is pending."""
        with self._changed:
            if any((m.primary, m.secondary) == (primary, secondary) for m in self._pending):
                return
            if fault is not None and fault.kind == "merge-slow":
                delay = 5.0 if fault.detail is None else float(fault.detail)
            due = time.monotonic() + delay
            merge = Merge(due, next(self._numbers), primary, secondary, fault)
            heapq.heappush(self._pending, merge)
            self._changed.notify_all()

    def settle(self) -> None:
        """Carry out everything that is pending, without waiting for its time."""
        with self._changed:
            while self._pending:
                self._carry_out(heapq.heappop(self._pending))

    def close(self) -> None:
        """Stop; what is still pending is never carried out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if not self._pending:
                    self._changed.wait()
                elif self._pending[0].due > now:
                    self._changed.wait(self._pending[0].due - now)
                else:
                    self._carry_out(heapq.heappop(self._pending))

    def _carry_out(self, merge: Merge) -> None:
        alive = self.organisation.alive
        if not (alive(merge.primary) and alive(merge.secondary)):
            return
        left: Collection[str] = ()
        if merge.fault is not None and merge.fault.kind == "merge-leaves":
            left = merge.fault.detail
            if left is None:
                left = [self.organisation.first_work_of(merge.secondary) or ""]
        self.organisation.merge(merge.primary, merge.secondary, left)


# --------------------------------------------------------------------------------------------------
# The HTTP server
# --------------------------------------------------------------------------------------------------


class Quota:
    """So many requests in a window; the windows follow each other from the first request on."""

    def __init__(self, limit: int, window: float) -> None:
        self.limit = limit
        self.window = window
        self._lock = threading.Lock()
        self._first: Optional[float] = None
        self._current = -1
        self._used = 0

    def take(self) -> Tuple[Dict[str, str], Optional[Answer]]:
        """The headers for one more request, and its 429 if there is nothing left."""
        with self._lock:
            now = time.time()
            self._first = now if self._first is None else self._first
            current = int((now - self._first) // self.window)
            if current != self._current:
                self._current, self._used = current, 0
            reset = self._first + (current + 1) * self.window
            granted = self._used < self.limit
            self._used += granted
            headers = {
                "X-Ratelimit-Limit": str(self.limit),
                "X-Ratelimit-Remaining": str(self.limit - self._used),
                "X-Ratelimit-Reset": self._number(reset),
            }
        if granted:
            return headers, None
        left = max(reset - now, 0.0)
        return headers, too_many(left, self._number(left), "The quota is used up.")

    def _number(self, seconds: float) -> str:
        if self.window >= 60:
            return str(math.ceil(seconds))
        return f"{math.ceil(seconds * 1000) / 1000:.3f}"


class Handler(BaseHTTPRequestHandler):
    """One connection. Each answer leaves in one write: no packet waits for another's ACK."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def do_GET(self) -> None:
        """Answer a request whose properties are in the query string."""
        self._exchange("GET")

    def do_POST(self) -> None:
        """Answer a request whose properties are in a JSON body."""
        self._exchange("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: the sandbox keeps a record of its own."""

    def _exchange(self, method: str) -> None:
        address = urllib.parse.urlsplit(self.path)
        endpoint = address.path.lstrip("/")
        started = time.monotonic()
        body, problem = self._read(method, endpoint, address.query)
        if problem is None:
            problem = self._check_address(method, endpoint)
        sandbox = self.server.sandbox
        request = sandbox.record(endpoint, body, started)
        answer = sandbox.answer(request, self.headers.get("Authorization"), problem)
        self._reply(request, answer)

    def _check_address(self, method: str, endpoint: str) -> Optional[Refused]:
        if endpoint in SHAPES and not (method == "GET" and endpoint in POST_ONLY):
            return None
        return Refused(404, "not_found", f"no such endpoint: {method} /{endpoint}")

    def _read(self, method: str, endpoint: str, query: str) -> Tuple[Dict[str, Any], Optional[Refused]]:
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            length = -1
        if length < 0 or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            return {}, Refused(400, "bad_request", "a Content-Length is needed")
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ConnectionAbortedError("the client went away in the middle of a request")
        if method == "GET":
            return from_query(SHAPES.get(endpoint, {}), query), None
        if self.headers.get_content_type() != "application/json":
            return {}, Refused(400, "bad_request", "the body must be application/json")
        try:
            body = json.loads(raw.decode("utf-8"))
        except ValueError:
            return {}, Refused(400, "parse_error", "the body is not JSON")
        if not isinstance(body, dict):
            return {}, Refused(400, "parse_error", "the body is not a JSON object")
        return body, None

    def _reply(self, request: Request, answer: Answer) -> None:
        if answer.manner in ("hang", "reset"):
            if answer.manner == "hang":
                self._hold(answer.seconds)
            request.ended = time.monotonic()
            self.close_connection = True
            self.server.reset(self.connection)
            return
        payload = answer.payload
        if answer.manner == "cut":
            payload = payload[: len(payload) // 2]
            self.close_connection = True
        request.ended = time.monotonic()
        try:
            self.wfile.write(self._head(answer) + payload)
        except OSError:
            request.status = None
            self.close_connection = True

    def _head(self, answer: Answer) -> bytes:
        lines = [
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
            "Date: " + self.date_time_string(),
            "Content-Type: " + answer.content_type,
            f"Content-Length: {len(answer.payload)}",
        ]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        if self.close_connection and answer.manner == "send":
            lines.append("Connection: close")
        return "\r\n".join(lines + ["", ""]).encode("latin-1")

    def _hold(self, seconds: float) -> None:
        """Say nothing until the client hangs up, the time is over, or the sandbox closes."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            while time.monotonic() < deadline and not self.server.closing.wait(0.02):
                if not selector.select(0):
                    continue
                try:
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        return
                except OSError:
                    return


class Server(ThreadingHTTPServer):
    """Threads and sockets: knows every open connection, so that it can close them all."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"

    def __init__(self, sandbox: "Sandbox", port: int) -> None:
        self.sandbox = sandbox
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._open: Set[socket.socket] = set()
        self._abandoned: Set[socket.socket] = set()
        self.accepted = 0
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who 127.0.0.1 is."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection and remember it."""
        connection, address = super().get_request()
        with self._lock:
            self._open.add(connection)
            self.accepted += 1
        return connection, address

    def reset(self, connection: socket.socket) -> None:
        """Let the connection end with RST rather than with FIN."""
        with self._lock:
            self._abandoned.add(connection)
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection; one to be reset gets no orderly farewell."""
        with self._lock:
            self._open.discard(request)
            abandoned = request in self._abandoned
            self._abandoned.discard(request)
        if abandoned:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a mistake in the sandbox."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def close_all(self) -> None:
        """Stop listening and hang up on everyone."""
        self.closing.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            remaining = list(self._open)
        for connection in remaining:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Sandbox:
    """An organisation, served on 127.0.0.1 for as long as the `with` block lasts.

    `gone` says how rev-users.get answers for a contact that was merged: "404", "301" (Location: the
    primary), "state" (200, state deleted) or "primary" (200, the primary's record). `quota` is a
    limit and a window in seconds. `faults`, `gone`, `latency`, `merge_delay` and `token` may be
    changed while it runs. `on_request(stage, request)` is called "before" and "after" each act.
    """

    GONE = ("404", "301", "state", "primary")

    def __init__(
        self,
        organisation: Organisation,
        token: str = "sandbox-token",
        port: int = 0,
        latency: float = 0.0,
        merge_delay: float = 0.3,
        gone: str = "404",
        quota: Optional[Tuple[int, float]] = None,
        faults: Iterable[Fault] = (),
        max_ids: Optional[int] = None,
        seed: int = 0,
        on_request: Optional[Callable[[str, Request], None]] = None,
    ) -> None:
        if gone not in self.GONE:
            raise ValueError("gone: one of {}".format(", ".join(self.GONE)))
        self.organisation = organisation
        self.token = token
        self.latency = latency
        self.merge_delay = merge_delay
        self.gone = gone
        self.moved_to = ""  # another base of the Location that a 301 names
        self.faults: List[Fault] = list(faults)
        self.max_ids = max_ids
        self.on_request = on_request
        self.requests: List[Request] = []
        self.over_quota = 0
        self.url = ""
        self._port = port
        self._quota = Quota(*quota) if quota else None
        self._chance = random.Random(seed)
        self._books = threading.Lock()
        self._api = Api(self)

    def __enter__(self) -> "Sandbox":
        self._server = Server(self, self._port)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.merge_queue = MergeQueue(self.organisation)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="sandbox", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.close_all()
        self._thread.join()
        self.merge_queue.close()

    @property
    def connections(self) -> int:
        """How many connections were accepted."""
        return self._server.accepted

    def count(self, endpoint: Optional[str] = None) -> int:
        """How many requests were made, in all or to an endpoint."""
        with self._books:
            return sum(1 for r in self.requests if endpoint is None or r.endpoint == endpoint)

    def environment(self) -> Dict[str, str]:
        """The environment variables that point the tool at this sandbox."""
        return {"DEVREV_API_TOKEN": self.token, "DEVREV_BASE_URL": self.url}

    def settle(self) -> None:
        """Carry out all pending merges now."""
        self.merge_queue.settle()

    def record(self, endpoint: str, body: Dict[str, Any], started: float) -> Request:
        """Enter a request into the books."""
        with self._books:
            request = Request(len(self.requests) + 1, endpoint, body, started)
            self.requests.append(request)
            return request

    def answer(self, request: Request, authorization: Optional[str], problem: Optional[Refused]) -> Answer:
        """Decide what comes back. The quota comes first, then faults, the token and the request."""
        self._tell("before", request)
        if self.latency:
            time.sleep(self.latency)
        headers, answer = self._quota.take() if self._quota else ({}, None)
        if answer is None:
            answer = self._decide(request, authorization, problem)
        else:
            with self._books:
                self.over_quota += 1
        if request.fault != "429-bare":
            answer.headers.update(headers)
        request.status = answer.status if answer.manner in ("send", "cut") else None
        self._tell("after", request)
        return answer

    def _decide(self, request: Request, authorization: Optional[str], problem: Optional[Refused]) -> Answer:
        fault = self._pick_fault(request)
        if fault is not None and fault.kind in BEFORE_THE_ACT:
            return struck_before(fault)
        if authorization != "Bearer " + self.token:
            answer = Refused(401, "unauthenticated", "The token is not valid.").answer
        elif problem is not None:
            answer = problem.answer
        else:
            answer = self._api.act(request, fault)
        if fault is not None and fault.kind in AFTER_THE_ACT:
            return struck_after(fault, answer)
        return answer

    def _pick_fault(self, request: Request) -> Optional[Fault]:
        with self._books:
            for fault in list(self.faults):
                if fault.strikes(request, self._chance):
                    request.fault = fault.kind
                    return fault
        return None

    def _tell(self, stage: str, request: Request) -> None:
        if self.on_request is not None:
            self.on_request(stage, request)


# --------------------------------------------------------------------------------------------------
# Command line: serve
# --------------------------------------------------------------------------------------------------


def fault_option(text: str) -> Fault:
    """`KIND[:ENDPOINT[:CHANCE]]`, e.g. `503:works.*:0.2`."""
    kind, _, rest = text.partition(":")
    endpoint, _, chance = rest.partition(":")
    try:
        return Fault(kind, endpoint or "*", float(chance or 1.0))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def quota_option(text: str) -> Tuple[int, float]:
    """`LIMIT/SECONDS`, e.g. `1000/300`."""
    limit, _, window = text.partition("/")
    try:
        quota = int(limit), float(window)
    except ValueError:
        quota = 0, 0.0
    if min(quota) <= 0:
        raise argparse.ArgumentTypeError("LIMIT/SECONDS is wanted, e.g. 1000/300")
    return quota


def arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sandbox",
        description="A DevRev organisation on loopback: nothing ever leaves this computer.",
        epilog="Without a command, runs the demo: merges the sample export and checks the result.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("demo", help="merge a sample export and show what happened (the default)")
    serve_parser = commands.add_parser(
        "serve",
        help="stay up until Ctrl-C, to try the tool by hand",
        description="Serve the organisation that an export came from, until Ctrl-C.",
        epilog="Faults: " + ", ".join(FAULTS),
    )
    option = serve_parser.add_argument
    option("--port", type=int, default=0, metavar="N", help="default: any free port")
    option("--csv", type=Path, default=SAMPLE_CSV, metavar="PATH", help="default: the sample")
    option(
        "--merge-delay",
        type=float,
        default=0.3,
        metavar="S",
        help="seconds from a merge's acknowledgement until it is carried out (default: 0.3)",
    )
    option("--latency", type=float, default=0.0, metavar="S", help="seconds each request takes longer")
    option(
        "--gone",
        choices=Sandbox.GONE,
        default="404",
        help="how a merged contact answers: 404, a redirect, its state, or as the primary",
    )
    option("--quota", type=quota_option, metavar="LIMIT/SECONDS", help="e.g. 1000/300; default: none")
    option(
        "--fault",
        type=fault_option,
        action="append",
        default=[],
        metavar="KIND[:ENDPOINT[:CHANCE]]",
        help="misbehave, e.g. 503:works.*:0.2 (may be repeated; the kinds are listed below)",
    )
    return parser.parse_args(argv)


def say(text: str = "") -> None:
    """Print at once, so that the lines of this process and of the tool stay in order."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    try:
        organisation = Organisation.from_csv(options.csv)
        sandbox = Sandbox(
            organisation,
            port=options.port,
            latency=options.latency,
            merge_delay=options.merge_delay,
            gone=options.gone,
            quota=options.quota,
            faults=options.fault,
        )
        with sandbox:
            introduce(sandbox)
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                say()
    except (OSError, OverflowError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"{sandbox.count()} requests, {len(organisation.merges)} merges")
    return 0


def introduce(sandbox: Sandbox) -> None:
    """Say where the sandbox is and how to point the tool at it."""
    organisation = sandbox.organisation
    say(f"Organisation {organisation.key} at {sandbox.url}")
    sizes = len(organisation.contacts), len(organisation.works), len(organisation.conversations)
    say("{} contacts, {} works, {} conversations".format(*sizes))
    variables = sorted(sandbox.environment().items())
    say("\nIn another shell, sh:")
    for name, value in variables:
        say(f"  export {name}={value}")
    say("PowerShell:")
    for name, value in variables:
        say(f'  $env:{name} = "{value}"')
    say("\nCtrl-C ends it.")


# --------------------------------------------------------------------------------------------------
# Demo
# --------------------------------------------------------------------------------------------------


class Demo:
    """Runs the real tool against the sample export and checks what it did against the truth."""

    def __init__(self) -> None:
        self.organisation = Organisation.from_csv(SAMPLE_CSV)
        self.references = {
            contact_id: contact["external_ref"] for contact_id, contact in self.organisation.contacts.items()
        }
        self.folder = Path(tempfile.mkdtemp(prefix="merge-demo-"))
        self.all_true = True

    def run(self) -> int:
        """Preview, merge, merge again; then look."""
        say(f"Working in {self.folder}")
        with Sandbox(self.organisation) as sandbox:
            self._step("A preview: no request, nothing changed", sandbox, "--preview")
            self._check("the preview made no request", sandbox.count() == 0)
            self._step("The run", sandbox, "--yes")
            first = sandbox.count("rev-users.merge")
            self._step("The same run again", sandbox, "--yes")
            again = sandbox.count("rev-users.merge") - first
        self._title("What happened, from the organisation's point of view")
        self._show_merges()
        self._show_files()
        self._check("the second run made no merge request", again == 0)
        self._check("one merge request for each merge", first == len(self.organisation.merges))
        counted = sum(map(reported_merges, self.folder.glob("reports/*.json")))
        self._check("the reports count as many", counted == len(self.organisation.merges))
        say("\n" + ("All of that is true." if self.all_true else "NOT all of that is true."))
        return 0 if self.all_true else 1

    def _step(self, title: str, sandbox: Sandbox, *options: str) -> None:
        script = str(REPOSITORY / "merge_contacts.py")
        command = [sys.executable, script, "--csv", str(SAMPLE_CSV)] + list(options)
        self._title(title)
        say("$ " + " ".join(quoted(part) for part in command))
        environment = dict(os.environ, **sandbox.environment())
        environment.update(DEVREV_RATE_LIMIT_CALLS="100000", no_proxy="127.0.0.1")
        done = subprocess.run(command, cwd=str(self.folder), env=environment, stdin=subprocess.DEVNULL, check=False)
        self._check("it ended with exit code 0", done.returncode == 0)

    def _show_merges(self) -> None:
        merges = self.organisation.merges
        for primary, secondary in merges:
            one, other = self.organisation.contacts[primary], self.organisation.contacts[secondary]
            say("  {:<28} {} into {}".format(one["email"], other["display_id"], one["display_id"]))
        self._check(f"{len(merges)} contacts were merged", bool(merges))
        for primary in dict.fromkeys(primary for primary, _ in merges):
            group = [primary] + [other for one, other in merges if one == primary]
            wanted = [ref for ref in map(self.references.get, group) if is_user(ref)]
            reference = self.organisation.contacts[primary]["external_ref"]
            name = self.organisation.contacts[primary]["display_id"]
            self._check(f"{name} now holds {reference}", wanted == [reference])

    def _show_files(self) -> None:
        backups = sorted(self.folder.glob("backups/*/*"))
        say()
        for name, found in (
            ("reports", sorted(self.folder.glob("reports/*.json"))),
            ("logs", sorted(self.folder.glob("logs/*.log"))),
            ("backups", backups),
        ):
            self._check(f"{len(found)} in {self.folder / name}", bool(found))
        if backups:
            say(f"\nOne backup, {backups[0]}:")
            for file in sorted(path for path in backups[0].rglob("*") if path.is_file()):
                place = file.relative_to(backups[0])
                say(f"  {file.stat().st_size:>9,} bytes  {place.as_posix()}")

    def _title(self, text: str) -> None:
        say(f"\n--- {text} ---")

    def _check(self, claim: str, true: bool) -> None:
        self.all_true = self.all_true and true
        say("{} {}".format("[ok]" if true else "[NO]", claim))


def is_user(reference: Optional[str]) -> bool:
    """Whether the reference is one of the customer's own application."""
    return bool(reference) and str(reference).startswith("user_")


def reported_merges(report: Path) -> int:
    """How many merges a report claims."""
    try:
        summary = json.loads(report.read_text(encoding="utf-8"))["summary"]
        return int(summary["successful_merges"])
    except (KeyError, TypeError, ValueError):
        return 0


def quoted(text: str) -> str:
    """A word of a command line, as one would type it."""
    return f'"{text}"' if " " in text else text


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demo, or serve."""
    options = arguments(argv)
    return serve(options) if options.command == "serve" else Demo().run()


if __name__ == "__main__":
    sys.exit(main())
