"""What each endpoint does: shapes of requests, pages of lists, contacts, works, timelines."""

from __future__ import annotations

import hashlib
import json
import math
import re
import urllib.parse
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from tests.fake.organisation import (
    ALL_WORK_KINDS,
    DEFAULT_PAGE,
    LARGEST_PAGE,
    OTHER_WORK_KINDS,
    ROLES,
    USER_KINDS,
    USER_LISTS,
    WORK_KINDS,
    Filter,
    Record,
    Table,
    Thing,
    contact_keys,
    kind_of,
    org_id_of,
    own_reference,
)
from tests.fake.trouble import (
    ODD_POLLS,
    STATES_LEFT,
    Answer,
    Fault,
    Instead,
    Refused,
    html_answer,
    json_answer,
    merge_acknowledged,
    moved,
    odd_poll,
)


class Field(NamedTuple):
    """A property of a request. `allowed` are the kinds of an id or the values of an enumeration."""

    kind: str
    allowed: tuple[str, ...] = ()
    required: bool = False


JSON_TYPES = {"bool": bool, "id": str, "text": str, "enum": str, "int": int, "set": dict}
JSON_NAMES = {
    bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object",
    type(None): "null",
}  # fmt: skip

TEXT = Field("text")
TEXTS = Field("texts")
USERS = Field("ids", USER_KINDS)
USER_SET = Field("set", USER_KINDS)
CONTACT = Field("id", ("revu",), required=True)
CONVERSATION = Field("id", ("conversation",), required=True)
WORK = Field("id", ALL_WORK_KINDS, required=True)
ORG = Field("id", ("revo", "account"))
OBJECT = Field("id", (*ALL_WORK_KINDS, "conversation", "revu"), required=True)
PAGING = {"cursor": TEXT, "limit": Field("int"), "mode": Field("enum", ("after",))}
OF_A_CONTACT = {
    "external_ref": TEXT,
    "display_name": TEXT,
    "description": TEXT,
    "email": TEXT,
    "phone_numbers": TEXTS,
    "display_picture": TEXT,
}

# The properties that the world acts on and no others: a filter that was accepted and then ignored
# would answer a question nobody asked. Which kinds of works there are, the world says.
SHAPES: dict[str, dict[str, Field]] = {
    "dev-users.self": {},
    "rev-users.get": {"id": CONTACT},
    "rev-users.list": dict(
        PAGING, email=TEXTS, external_ref=TEXTS, is_verified=Field("bool")
    ),
    "rev-users.merge": {"primary_user": CONTACT, "secondary_user": CONTACT},
    "rev-users.create": dict(OF_A_CONTACT, rev_org=ORG),
    "rev-users.update": dict(OF_A_CONTACT, id=CONTACT),
    "works.list": dict(PAGING, type=Field("enums"), **dict.fromkeys(ROLES, USERS)),
    "works.get": {"id": WORK},
    "works.update": dict(
        id=WORK, type=Field("enum"), owned_by=USER_SET, reported_by=USER_SET, title=TEXT, body=TEXT
    ),
    "conversations.list": dict(PAGING, members=USERS),
    "conversations.get": {"id": CONVERSATION},
    "conversations.update": dict(
        id=CONVERSATION, members=USER_SET, owned_by=USER_SET, title=TEXT, description=TEXT
    ),
    "timeline-entries.list": dict(PAGING, object=OBJECT),
}  # fmt: skip
MEMBERS = ("members",)
NOT_PERMITTED = "value_not_permitted"


def bad(kind: str, name: str, problem: str, **more: Any) -> Refused:
    """400 of one of DevRev's types, which names the property."""
    return Refused(400, f"{name}: {problem}", kind, field_name=name, **more)


def check_shape(shape: dict[str, Field], body: Thing, max_ids: int | None) -> None:
    for name in body:
        if name not in shape:
            raise bad("invalid_field", name, "unknown property")
    for name, wanted in shape.items():
        if name in body:
            check_value(name, wanted, body[name], max_ids)
        elif wanted.required:
            raise bad("missing_required_field", name, "missing property")


def check_value(name: str, wanted: Field, value: Any, max_ids: int | None) -> None:
    kind, allowed = wanted.kind, wanted.allowed
    if kind.endswith("s"):
        check_type(name, value, list)
        if kind == "ids" and max_ids is not None and len(value) > max_ids:
            raise bad(NOT_PERMITTED, name, f"names more than {max_ids} ids")
        for item in value:
            check_value(name, Field(kind[:-1], allowed), item, max_ids)
        return
    check_type(name, value, JSON_TYPES[kind])
    if kind == "id" and kind_of(value) is None:
        raise bad("invalid_id", name, f"{value!r} is not an id")
    if kind == "id" and kind_of(value) not in allowed:
        raise unexpected_id(name, value)
    if kind == "enum" and value not in allowed:
        more = {"value": value, "allowed_values": list(allowed)}
        raise bad("invalid_enum_value", name, f"{value!r} is not permitted", **more)
    if kind == "set":
        for key in value:
            if key != "set":
                raise bad("invalid_field", f"{name}.{key}", "unknown property")
        check_value(f"{name}.set", Field("ids", allowed), value.get("set", []), None)


def check_type(name: str, value: Any, wanted: type) -> None:
    if type(value) is not wanted:
        expected, actual = JSON_NAMES[wanted], JSON_NAMES[type(value)]
        problem = f"expected {expected}, got {actual}"
        raise bad("unexpected_json_type", name, problem, actual=actual, expected=expected)


def unexpected_id(name: str, value: str) -> Refused:
    problem = f"the id of a {kind_of(value)} is not wanted here"
    return bad("unexpected_id_type", name, problem, value=value)


def not_found(object_id: str) -> Refused:
    return Refused(404, f"{object_id} was not found")


def existing(object_id: str, *tables: Table) -> Record:
    for table in tables:
        if object_id in table:
            return table[object_id]
    raise not_found(object_id)


def cursor(name: str, body: Thing, place: int, served: int) -> str:
    """A cursor that is good for the same filters only, and says nothing to a client."""
    filters = {key: value for key, value in body.items() if key not in PAGING}
    text = json.dumps([name, filters, place, served], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:28]


def fits(contact: Thing, filters: Sequence[Filter]) -> bool:
    """Whether a contact has a value of every filter."""
    keys = set(contact_keys(contact))
    return all(any((name, value) in keys for value in values) for name, values in filters)


class Api:
    """What each endpoint does. Every method runs while the organisation's lock is held."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.organisation = organisation = world.organisation
        works, talks = organisation.works, organisation.conversations
        self._endpoints: dict[str, Callable[[Thing], Thing]] = {
            "dev-users.self": lambda body: {"dev_user": organisation.dev_user},
            "rev-users.get": lambda body: {"rev_user": self._shown(self._polled(body["id"]))},
            "rev-users.list": self._list_contacts,
            "rev-users.merge": self._merge,
            "rev-users.create": self._create_contact,
            "rev-users.update": self._update_contact,
            "works.list": self._list_works,
            "works.get": lambda body: {"work": existing(body["id"], works)},
            "works.update": self._update_work,
            "conversations.list": lambda body: self._list("conversations", talks, body, MEMBERS),
            "conversations.get": lambda body: {"conversation": existing(body["id"], talks)},
            "conversations.update": lambda body: {"conversation": self._changed(talks, body)},
            "timeline-entries.list": self._list_entries,
        }
        self._endpoint = ""
        self._fault: Fault | None = None

    def act(self, endpoint: str, body: Thing, fault: Fault | None = None) -> Answer:
        """Carry a request out. Whatever it says is serialised before anyone else can change it."""
        world = self.world
        try:
            if any(word in json.dumps(body, ensure_ascii=False) for word in world.firewall):
                raise Instead(html_answer(world.firewall_status))
            check_shape(self._shape(endpoint, body), body, world.max_ids)
            with self.organisation.lock:
                self._endpoint, self._fault = endpoint, fault
                self._check_restricted(body)
                content = self._endpoints[endpoint](body)
                if endpoint == "rev-users.merge":
                    return merge_acknowledged(world.merge_answer, content)
                return json_answer(201 if endpoint == "rev-users.create" else 200, content)
        except Instead as other:
            return other.answer

    def _shape(self, endpoint: str, body: Thing) -> dict[str, Field]:
        """The shape of a request, with the kinds of works that this organisation knows."""
        shape, world = SHAPES[endpoint], self.world
        if "type" not in shape:
            return shape
        kinds = ALL_WORK_KINDS if world.long_work_types else WORK_KINDS
        known = tuple(kind for kind in kinds if kind not in world.unknown_kinds)
        asked = body.get("type")
        if isinstance(asked, list) and any(kind not in known for kind in asked):
            if world.unknown_kinds_answer == "403":
                raise self._forbidden()
            if world.unknown_kinds_answer == "400-bare":
                raise Refused(400, "Bad request.")
        return {**shape, "type": shape["type"]._replace(allowed=known)}

    # ----- what the token may not see, and pages --------------------------------------------------

    def _check_restricted(self, body: Thing) -> None:
        """Refuse a request that names what the token may not see, or not change."""
        world = self.world
        objects = [body[name] for name in ("id", "object") if name in body]
        named = objects + [body[n] for n in ("primary_user", "secondary_user") if n in body]
        for name in (*ROLES, "members"):
            named += body.get(name, ())
        hidden = set(world.restricted)
        if self._endpoint == "timeline-entries.list":
            hidden.update(world.restricted_timelines)
        if self._endpoint.endswith((".update", ".merge")):
            hidden.update(world.restricted_writes)
        refused = [one for one in named if one in hidden]
        if refused:
            raise self._forbidden(refused)
        kinds = {kind_of(one) for one in objects} | {self._endpoint.partition(".")[0].rstrip("s")}
        if kinds.intersection(world.hidden_kinds):
            raise self._forbidden(objects)

    def _forbidden(self, ids: Sequence[str] = ()) -> Refused:
        """403, naming the objects where the world names them."""
        named = list(dict.fromkeys(ids)) if self.world.names_object_ids else []
        more = {"object_ids": named} if named else {}
        return Refused(403, "The token may not do that.", **more)

    def _list(
        self, name: str, table: Table, body: Thing, filters: Sequence[str], hidden: Any = ()
    ) -> Thing:
        wanted = [(one, body[one]) for one in filters if body.get(one)]
        found = table.find(wanted, self.world.list_lag)
        shown = [one for one in found if one.get("type") not in hidden]
        return self._page(name, [(table.numbers[one["id"]], one) for one in shown], body)

    def _page(self, name: str, things: Sequence[tuple[int, Thing]], body: Thing) -> Thing:
        """One page of a list, with a cursor where there is more, as the world serves lists.

        Each thing comes with its number, which stays the same whatever comes and goes: the number
        is where the next page starts.
        """
        world = self.world
        if world.restricted_in_lists == "left out":
            things = [one for one in things if one[1]["id"] not in world.restricted]
        limit = body.get("limit", DEFAULT_PAGE)
        if not 1 <= limit <= LARGEST_PAGE:
            raise bad(NOT_PERMITTED, "limit", f"from 1 to {LARGEST_PAGE}")
        size = min(limit, world.largest_page or limit)
        start, served = self._start(name, body)
        paging = self._paging(body)
        if paging == "offset":
            things = [(place, thing) for place, (_, thing) in enumerate(things)]
        rest = [one for one in things if one[0] >= start][: size + 1]
        before = [one for one in things if one[0] < start] if "cursor" in body else []
        if rest and served < world.empty_pages:
            return {name: [], "next_cursor": self._next(name, body, start, served + 1)}
        if paging == "overlap" and size > 1:
            rest = [*before[-1:], *rest][: size + 1]
        items = before[-size:] if paging == "again" and before else rest[:size]
        found: Thing = {name: [thing for _, thing in items]}
        if len(rest) > size:
            found["next_cursor"] = self._next(name, body, rest[size][0])
        elif world.trailing_page and rest:
            found["next_cursor"] = self._next(name, body, rest[-1][0] + 1)
        refused = [one["id"] for one in found[name] if one["id"] in world.restricted]
        if refused and world.restricted_in_lists == "403":
            raise self._forbidden(refused)
        return found

    def _paging(self, body: Thing) -> str:
        """How this page is made: where `paging_times` are over, as it should be."""
        world, counts = self.world, self.world.paging_times is not None
        if counts and world.paging in ("again", "overlap") and "cursor" in body:
            world.paging_times -= 1
            return str(world.paging) if world.paging_times >= 0 else "cursor"
        return str(world.paging)

    def _next(self, name: str, body: Thing, place: int, served: int = 0) -> str:
        found = cursor(name, body, place, served)
        self.world.cursors[found] = place, served, self.organisation.now()
        return found

    def _start(self, name: str, body: Thing) -> tuple[int, int]:
        """The place that a cursor stands for, and how many empty pages were served there."""
        if "cursor" not in body:
            return 0, 0
        life, unknown = self.world.cursor_life, (-1, 0, 0.0)
        place, served, given = self.world.cursors.get(body["cursor"], unknown)
        if cursor(name, body, place, served) != body["cursor"]:
            raise bad(NOT_PERMITTED, "cursor", "it is not one of this list")
        if life is not None and self.organisation.now() - given > life:
            raise bad(NOT_PERMITTED, "cursor", "it has expired")
        return place, served

    # ----- contacts -------------------------------------------------------------------------------

    def _polled(self, contact_id: str) -> Thing:
        """What a contact is known as by its id, whatever has become of it."""
        world, organisation, contacts = self.world, self.organisation, self.organisation.contacts
        if self._has_vanished(contact_id) or organisation.alive(contact_id):
            return self._contact(contact_id)
        if contact_id not in contacts:
            if world.deleted_contacts == "state" and contact_id in organisation.deleted:
                return {**organisation.deleted[contact_id], "state": "deleted"}
            raise not_found(contact_id)
        survivor = organisation.survivor(contact_id)
        gone = world.gone_of.get(contact_id, world.gone)
        if gone in ODD_POLLS:
            raise Instead(odd_poll(gone))
        if gone == "404" or (survivor not in contacts and gone not in world.ODD):
            raise not_found(contact_id)
        if gone == "301":
            place = urllib.parse.quote(survivor, safe="")
            raise Instead(moved(f"{world.moved_to}/rev-users.get?id={place}"))
        if gone == "primary":
            return contacts[survivor]
        return self._left_over(contact_id, (world.stays or "locked") if gone == "stays" else gone)

    def _left_over(self, contact_id: str, gone: str) -> Thing:
        """What is left of a contact that was merged, where something is shown of it."""
        contact = self.organisation.contacts[contact_id]
        if gone in ("shadow", "unassigned") and gone != self.world.stays:
            (primary,) = self.organisation.people([self.organisation.survivor(contact_id)])
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
        numbers = organisation.contacts.numbers
        if "is_verified" in body and world.verified_filter == "403":
            raise self._forbidden()
        if "is_verified" in body and world.verified_filter == "400":
            raise bad("invalid_field", "is_verified", "unknown property")
        wanted = {name: body[name] for name in ("email", "external_ref") if body.get(name)}
        if world.email_ignores_case and "email" in wanted:
            wanted["email_lower"] = [one.lower() for one in wanted.pop("email")]
        filters: list[Filter] = list(wanted.items())
        contacts = {one["id"]: one for one in organisation.contacts.find(filters, world.list_lag)}
        if world.deleted_listed:
            for object_id, one in organisation.deleted.items():
                if kind_of(object_id) == "revu" and fits(one, filters):
                    contacts.setdefault(object_id, {**one, "state": "deleted"})
        seen_at = organisation.now() - world.list_lag
        found = []
        for contact_id in sorted(contacts, key=numbers.__getitem__):
            contact: Thing | None = contacts[contact_id]
            if organisation.merge_times.get(contact_id, math.inf) <= seen_at:
                contact = self._listed_left_over(contact_id)
            if contact is None or self._has_vanished(contact_id) or not fits(contact, filters):
                continue
            verified = contact_id not in organisation.unverified
            if body.get("is_verified", verified) == verified:
                found.append((numbers[contact_id], contact))
        answer = self._page("rev_users", found, body)
        return {**answer, "rev_users": [self._shown(one) for one in answer["rev_users"]]}

    def _listed_left_over(self, contact_id: str) -> Thing | None:
        """What lists show of a contact that was merged; None for nothing."""
        world = self.world
        if world.stays:
            return self._left_over(contact_id, world.stays)
        gone = world.gone_of.get(contact_id, world.gone)
        state = gone if gone in ("shadow", "unassigned") else "state"
        return self._left_over(contact_id, state) if world.deleted_listed else None

    def _shown(self, contact: Thing, is_own_answer: bool = False) -> Thing:
        """A contact as answers show it; an update's own answer never lags."""
        world, contact_id = self.world, contact["id"]
        found = {name: value for name, value in contact.items() if name not in world.hidden_fields}
        if world.reference_lag and not is_own_answer:
            seen_at = self.organisation.now() - world.reference_lag
            times = self.organisation.reference_times[contact_id]
            former = [reference for at, reference in times if at <= seen_at]
            if former and contact.get("external_ref") == times[-1][1]:
                found["external_ref"] = former[-1]
        form = world.verified_shown
        if form == "mixed":
            form = ("shown", "hidden", "null")[self.organisation.contacts.numbers[contact_id] % 3]
        if form != "hidden":
            verified = contact_id not in self.organisation.unverified
            found["is_verified"] = verified if form == "shown" else None
        return found

    def _merge(self, body: Thing) -> Thing:
        primary, secondary = body["primary_user"], body["secondary_user"]
        if primary == secondary:
            raise bad(NOT_PERMITTED, "secondary_user", "it can't be merged into itself")
        for contact_id in (primary, secondary):
            self._contact(contact_id)
        unverified = tuple(one in self.organisation.unverified for one in (primary, secondary))
        world = self.world
        manners = {(False, True): world.unverified_merge, (True, False): world.verified_merge}
        manner = manners.get(unverified, "works")
        if manner == "works":
            world.plan_merge(primary, secondary, self._fault)
        elif manner != "never":
            raise Refused(int(manner), "Unverified users cannot be merged into verified users.")
        return {}

    def _create_contact(self, body: Thing) -> Thing:
        self._check_fields(body)
        organisation = self.organisation
        email, reference = body.get("email"), body.get("external_ref")
        org_id = body.get("rev_org") or organisation.don("identity", "revo", "ACME")
        if kind_of(org_id) == "account" and not self.world.account_rev_orgs:
            raise unexpected_id("rev_org", org_id)
        if "rev_org" in body and org_id not in organisation.rev_orgs:
            raise bad(NOT_PERMITTED, "rev_org", "there is no such rev org")
        if email is not None and self.world.unique_emails:
            contacts = organisation.contacts.find([("email", [email])])
            if any(organisation.alive(one["id"]) for one in contacts):
                raise Refused(409, f"{email!r} is the email of another contact")
        self._check_free(body, org_id)
        more = set_fields(body, ("description", "phone_numbers", "display_picture"))
        rev_org = ("account/" if kind_of(org_id) == "account" else "") + org_id.rpartition("/")[2]
        contact_id = organisation.new_contact(
            email, reference, rev_org, display_name=body.get("display_name"), **more
        )
        return {"rev_user": self._shown(organisation.contacts[contact_id], True)}

    def _update_contact(self, body: Thing) -> Thing:
        contact, world = self._contact(body["id"]), self.world
        self._check_fields(body)
        former = contact.get("external_ref")
        reference = body.get("external_ref", former)
        if world.unchanged_updates != 200 and body.items() <= contact.items():
            raise Refused(world.unchanged_updates, "nothing would be changed")
        if reference != former and world.reference_updates != "works":
            status = int(world.reference_updates)
            raise Refused(status, "this reference can't be used for another user")
        self._check_free(body, org_id_of(contact))
        changes = set_fields(body, OF_A_CONTACT)
        if contact.get("external_refs") and "external_ref" in changes:
            references = [reference if one == former else one for one in contact["external_refs"]]
            changes["external_refs"] = list(dict.fromkeys(references))
        self.organisation.change(contact, **changes)
        if reference != former:
            world.put_back(contact["id"], former)
        return {"rev_user": self._shown(contact, is_own_answer=True)}

    def _contact(self, contact_id: str) -> Record:
        if not self.organisation.alive(contact_id) or self._has_vanished(contact_id):
            raise not_found(contact_id)
        return self.organisation.contacts[contact_id]

    def _check_fields(self, body: Thing) -> None:
        names, status = self.world.refused_fields, self.world.refused_status
        for name in body:
            if name in names or f"{self._endpoint}.{name}" in names:
                if status == 400:
                    raise bad(NOT_PERMITTED, name, "this is not permitted")
                raise Refused(status, f"{name}: this is not permitted")
        for number in body.get("phone_numbers", ()):
            if not re.fullmatch(r"\+[1-9][0-9]{1,14}", number):
                raise bad(NOT_PERMITTED, "phone_numbers", "this is not permitted")

    def _check_free(self, body: Thing, org_id: str | None) -> None:
        """Refuse a reference that another contact of the rev org holds."""
        reference = body.get("external_ref")
        holder = None if reference is None else self.organisation.holder(org_id, reference)
        if holder not in (None, body.get("id")):
            raise Refused(409, f"{reference!r} is held by another contact")

    # ----- works, conversations, timelines --------------------------------------------------------

    def _list_works(self, body: Thing) -> Thing:
        hidden = set(self.world.hidden_kinds)
        if hidden.intersection(body.get("type", ())) and self.world.hidden_kinds_answer == "403":
            raise self._forbidden()
        if not self.world.long_work_types:
            hidden.update(OTHER_WORK_KINDS)
        return self._list("works", self.organisation.works, body, ("type", *ROLES), hidden)

    def _update_work(self, body: Thing) -> Thing:
        works = self.organisation.works
        work = existing(body["id"], works)
        if body.get("type", work["type"]) != work["type"]:
            raise bad(NOT_PERMITTED, "type", f"{work['display_id']} is no {body['type']}")
        if body.get("owned_by", {}).get("set") == []:
            raise bad(NOT_PERMITTED, "owned_by", "the set must not be empty")
        if not 1 <= len(body.get("title", "as it was")) <= 256:
            raise bad(NOT_PERMITTED, "title", "from 1 to 256 characters")
        return {"work": self._changed(works, body)}

    def _list_entries(self, body: Thing) -> Thing:
        organisation, object_id = self.organisation, body["object"]
        existing(object_id, organisation.works, organisation.conversations, organisation.contacts)
        entries = list(enumerate(organisation.timelines.get(object_id, ())))
        return self._page("timeline_entries", entries, body)

    def _changed(self, table: Table, body: Thing) -> Record:
        thing, changes = existing(body["id"], table), dict(body)
        for role in USER_LISTS:
            ids = changes.pop(role, {}).get("set")
            if ids is None:
                continue
            for user_id in ids:
                if user_id != self.organisation.dev_user["id"]:
                    self._contact(user_id)
            changes[role] = self.organisation.people(ids)
        self.organisation.change(thing, **changes)
        return thing


def set_fields(body: Thing, names: Iterable[str]) -> Thing:
    """The fields that a request sets, as answers show them."""
    fields = {name: body[name] for name in names if body.get(name) is not None}
    if "display_picture" in fields:
        fields["display_picture"] = {"id": fields["display_picture"]}
    return fields
