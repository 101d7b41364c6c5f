"""What each endpoint does: shapes of requests, lists in pages, contacts, works, conversations and timelines."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import json
import math
import re
import urllib.parse
from typing import (
    Any,
    Callable,
    Collection,
    Iterable,
    NamedTuple,
    Sequence,
)

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
    REFUSALS,
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

SHAPES: dict[str, dict[str, Field]] = {
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


def check_shape(shape: dict[str, Field], body: dict[str, Any], max_ids: int | None) -> None:
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


def check_value(name: str, wanted: Field, value: Any, max_ids: int | None) -> None:
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

    def __init__(self, world: Any) -> None:
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

    def _page(self, name: str, things: Sequence[tuple[int, Thing]], body: Thing) -> Thing:
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

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self._endpoints: dict[str, Callable[[Thing], Thing]] = {
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
        self._fault: Fault | None = None

    def act(self, endpoint: str, body: Thing, fault: Fault | None = None) -> Answer:
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
        filters: list[Filter] = [(name, body[name]) for name in CONTACT_FILTERS if body.get(name)]
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

    def _listed_left_over(self, contact_id: str) -> Thing | None:
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
        self, reference: str | None, org_id: str | None, contact_id: str | None = None
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

    def _works(self, body: Thing) -> list[tuple[int, Thing]]:
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

    def _found(self, table: Table, body: Thing, names: Iterable[str]) -> list[tuple[int, Thing]]:
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
    things: Sequence[tuple[int, Thing]],
    body: Thing,
    empty: int = 0,
    largest: int | None = None,
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


def cursor(name: str, body: dict[str, Any], position: int, served: int = 0) -> str:
    """A cursor that is good for the same filters only, and says nothing to a client.

    It stands for a position, and for how many empty pages were served there.
    """
    filters = {key: value for key, value in body.items() if key not in PAGING}
    digest = hashlib.sha256(json.dumps([name, filters], sort_keys=True).encode()).hexdigest()[:16]
    return base64.urlsafe_b64encode(f"{digest}:{position}:{served}".encode()).decode()


def start_of(name: str, body: dict[str, Any]) -> tuple[int, int]:
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
