"""What the tool asks and the sandbox answers, held against DevRev's published OpenAPI description.

It is not part of the project: DEVREV_OPENAPI says where it is, else it is looked for beside it.
"""

import asyncio
import copy
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import pytest

import merge_contacts as tool
from tests.fake.api import SHAPES
from tests.fake.organisation import ALL_WORK_KINDS, OTHER_WORK_KINDS
from tests.fake.seeding import organisation_of
from tests.fake.world import World
from tests.sandbox import Fault, Organisation, Sandbox
from tests.support import ROOT, SAMPLE, Workplace

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

BESIDE = ROOT.parent / "shared" / "openapi" / "devrev-public.json"
DESCRIPTION = Path(os.environ.get("DEVREV_OPENAPI") or BESIDE)
pytestmark = pytest.mark.skipif(
    not DESCRIPTION.is_file(),
    reason="DevRev's OpenAPI description is not at hand (DEVREV_OPENAPI names the file)",
)
# Beta fields of a contact, and what DevRev's pages on errors have: the description lacks them.
NOT_PUBLIC = {"is_verified", "external_refs", "tags", "custom_fields", "object_ids"}
ME, GET, LIST, UPDATE = "dev-users.self", "rev-users.get", "rev-users.list", "rev-users.update"
CREATE, MERGE, WORKS, WORK = "rev-users.create", "rev-users.merge", "works.list", "works.get"
GIVE, TALKS, TALK, JOIN = (
    "works.update", "conversations.list", "conversations.get", "conversations.update",
)  # fmt: skip
TIMELINE = "timeline-entries.list"


class Description:
    """The description as JSON Schema, in which a property that it does not know is an error."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        self.paths = document["paths"]
        self.responses = document["components"].get("responses", {})
        schemas = document["components"]["schemas"]
        self.schemas = {name: opened(schema) for name, schema in schemas.items()}
        self._validators: Dict[int, Any] = {}  # by schema of the document, which stays as long
        self.formats = jsonschema.FormatChecker(formats=())
        time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
        self.formats.checks("date-time")(lambda text: bool(re.fullmatch(time, str(text))))

    def request(self, endpoint: str, body: Any) -> List[str]:
        """What is wrong with the body of a request."""
        content = self.paths[f"/{endpoint}"]["post"]["requestBody"]["content"]
        return self._flaws(content["application/json"]["schema"], body)

    def answer(self, endpoint: str, status: int, body: Any) -> List[str]:
        """What is wrong with an answer; a status that is not documented is."""
        answer = self.paths[f"/{endpoint}"]["post"]["responses"].get(str(status))
        if answer is None:
            return ["not documented"]
        if "$ref" in answer:
            answer = self.responses[answer["$ref"].rpartition("/")[2]]
        return self._flaws(answer["content"]["application/json"]["schema"], body)

    def _flaws(self, schema: Any, value: Any) -> List[str]:
        if id(schema) not in self._validators:
            whole = {**closed(copy.deepcopy(schema)), "components": {"schemas": self.schemas}}
            validator = jsonschema.Draft202012Validator(whole, format_checker=self.formats)
            self._validators[id(schema)] = validator
        errors = self._validators[id(schema)].iter_errors(value)
        return [f"{list(error.absolute_path)}: {error.message[:300]}" for error in errors]


def closed(schema: Any) -> Any:
    """A schema of a value that stands by itself: everything in the value has to be known."""
    found = opened(schema)
    if not isinstance(found, dict) or "unevaluatedProperties" in found:
        return found
    is_free = found.get("type") == "object"
    if is_free and not {"properties", "allOf", "anyOf", "$ref"} & set(found):
        return found
    return {**found, "unevaluatedProperties": False}


def opened(schema: Any) -> Any:
    """OpenAPI 3.0 as JSON Schema: one part of another, by allOf or as one of several kinds."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    if found.get("additionalProperties") is False:
        # It is what is known of this part, and says nothing of the others.
        found["properties"] = found.get("properties", {})
        del found["additionalProperties"]
    if "properties" in found:
        found["properties"] = {name: closed(one) for name, one in found["properties"].items()}
    for key in {"items", "additionalProperties"} & set(found):
        found[key] = closed(found[key])
    if "allOf" in found:
        found["allOf"] = [opened(one) for one in found["allOf"]]
    kinds = found.pop("oneOf", None)
    discriminator = found.pop("discriminator", None) or {}
    if kinds is not None:
        found["anyOf"] = [opened(one) for one in kinds]
        if "mapping" in discriminator:
            name = discriminator["propertyName"]
            found["anyOf"] = [
                {"properties": {name: {"const": value}}, "$ref": reference}
                for value, reference in discriminator["mapping"].items()
            ]
    if found.pop("nullable", False):
        return {"anyOf": [found, {"type": "null"}]}
    return found


@pytest.fixture(scope="module")
def description() -> Description:
    return Description(DESCRIPTION)


def test_every_request_is_one_that_the_description_knows(
    description: Description, place: Workplace
) -> None:
    organisation = organisation_of(SAMPLE)
    place.csv.write_bytes(SAMPLE.read_bytes())
    with Sandbox(organisation, merge_delay=0.02) as sandbox:
        place.run(sandbox, "--check", check=0)
        place.run(sandbox, "--yes", check=0)
        (report,) = (place.folder / "reports").glob("*.json")
        place.run(sandbox, "--undo", str(report), check=0)
        settings = tool.ApiSettings(token=sandbox.token, base_url=sandbox.url, calls=0)

        async def who_holds() -> None:
            api = tool.DevRevAPI(settings, tool.Environment(settings), tool.CancelToken())
            await api.holders_of("user_a102", tool.RequestOptions())

        asyncio.run(who_holds())
        requests = list(sandbox.requests)
    assert len(organisation.merges) > 10
    for request in requests:
        # It does not promise tasks and the like.
        if (request.endpoint, request.status) != (WORKS, 400):
            assert description.request(request.endpoint, request.body) == [], request
    assert {request.endpoint for request in requests} == set(SHAPES)
    assert any("cursor" in request.body for request in requests), "no list was paged"


class Asked(NamedTuple):
    """A request, the status it has to get, and with which fault, token and raw body."""

    endpoint: str
    body: Dict[str, Any]
    status: int = 200
    fault: str = ""
    token: str = ""
    raw: Optional[bytes] = None


def refused(organisation: Organisation) -> Iterator[Asked]:
    """What to ask so that all endpoints refuse in all ways."""
    one, _, third = list(organisation.contacts)[:3]
    taken = organisation.contacts[one]["external_ref"]
    work = next(one for one, work in organisation.works.items() if work["type"] == "ticket")
    talk = next(iter(organisation.conversations))
    nobody = organisation.don("identity", "revu", "NOBODY")
    nothing = organisation.don("core", "ticket", "999999")
    nowhere = organisation.don("identity", "revo", "NONE")
    malformed = [
        (GET, {}), (GET, {"id": "REVU-1"}), (GET, {"id": work}), (GET, {"id": 7}),
        (LIST, {"who": "all"}), (LIST, {"email": "ada@example.com"}), (LIST, {"limit": 0}),
        (LIST, {"cursor": "none"}), (LIST, {"mode": "sideways"}),
        (MERGE, {"primary_user": one, "secondary_user": one}), (WORKS, {"type": ["task"]}),
        (WORKS, {"owned_by": [work]}), (GIVE, {"id": work, "type": "issue"}),
        (GIVE, {"id": work, "owned_by": {"set": []}}), (GIVE, {"id": work, "title": ""}),
        (JOIN, {"id": talk, "members": {"add": [third]}}),
        (CREATE, {"phone_numbers": ["030 123456"]}), (CREATE, {"rev_org": nowhere}),
        (ME, {"who": "me"}), *((endpoint, {"nonsense": 1}) for endpoint in SHAPES),
    ]  # fmt: skip
    missing = [
        (GET, {"id": nobody}), (MERGE, {"primary_user": one, "secondary_user": nobody}),
        (UPDATE, {"id": nobody, "external_ref": "user_x"}), (WORK, {"id": nothing}),
        (GIVE, {"id": nothing, "type": "ticket"}), (TIMELINE, {"object": nothing}),
    ]  # fmt: skip
    conflicts = [(UPDATE, {"id": third, "external_ref": taken}), (CREATE, {"external_ref": taken})]
    for status, questions in ((400, malformed), (404, missing), (409, conflicts)):
        for endpoint, body in questions:
            yield Asked(endpoint, body, status)
    for endpoint in SHAPES:
        for raw in (b"", b"{", b"[]", b"\xff"):
            yield Asked(endpoint, {}, 400, raw=raw)
        yield Asked(endpoint, {}, 401, token="another-token")
        for kind in (
            "400", "401", "401-expired", "401-revoked", "401-deactivated", "403", "429", "429-bare",
            "429-body", "429-header", "500", "500-after", "503",
        ):  # fmt: skip
            yield Asked(endpoint, {}, int(kind[:3]), fault=kind)


def test_every_refusal_is_one_that_the_description_knows(description: Description) -> None:
    organisation = organisation_of(SAMPLE)
    seen = set()
    with Sandbox(organisation) as sandbox:
        for question in refused(organisation):
            sandbox.faults = [Fault(question.fault)] if question.fault else []
            status, answer = ask(sandbox, question)
            assert status == question.status, (question, answer)
            assert description.answer(question.endpoint, status, answer) == [], question
            seen.add((status, answer.get("type")))
    assert {kind for status, kind in seen if status == 400} == {
        "bad_request", "invalid_content_type", "invalid_enum_value", "invalid_field", "invalid_id",
        "missing_required_field", "parse_error", "unexpected_id_type", "unexpected_json_type",
        "value_not_permitted",
    }  # fmt: skip
    assert {kind for status, kind in seen if status == 401} == {
        "unauthenticated", "token_expired", "token_revoked", "dev_org_deactivated"
    }  # fmt: skip


def public(value: Any) -> Any:
    """An answer without what the description leaves out; works of every kind as tickets."""
    if isinstance(value, list):
        return [public(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: public(one) for name, one in value.items() if name not in NOT_PUBLIC}
    for name in ("type", "object_type"):
        if value.get(name) in OTHER_WORK_KINDS:
            found[name] = "ticket"
    return found


def each(name: str, forms: Any, **more: Any) -> List[Dict[str, Any]]:
    return [{name: form, **more} for form in forms]


CHOICES = World.CHOICES
SWITCHES: List[Dict[str, Any]] = [
    {},
    *each("verified_shown", CHOICES["verified_shown"]),
    *each("verified_filter", CHOICES["verified_filter"]),
    {"hidden_fields": ("phone_numbers", "description")},
    {"refused_fields": ("rev-users.update.phone_numbers", "display_name"), "refused_status": 400},
    {"refused_fields": ("phone_numbers",), "refused_status": 409},
    {"account_rev_orgs": True},
    {"unique_emails": True, "email_ignores_case": True},
    *each("gone", {*World.GONE} - {"301"}, deleted_listed=True, deleted_contacts="state"),
    {"empty_pages": 2, "largest_page": 3, "trailing_page": True},
    {"long_work_types": True},
    *each("hidden_kinds_answer", ("403", "left out"), hidden_kinds=("issue", "conversation")),
    *each("restricted_in_lists", CHOICES["restricted_in_lists"]),
    *each("retry_after", CHOICES["retry_after"], quota=(20, 60)),
    {"quota": (20, 4.0, 0, True)},
    *each("unverified_merge", {*CHOICES["unverified_merge"]} - {"409"}),
    {"unverified_keep_references": True},
    {"unique_references": "organisation"},
    {"merge_joins": ("phone_numbers", "tags", "external_refs")},
    {"visitors_verified": False},
]


def quarter(cases: List[Any]) -> List[Any]:
    """For `parametrize`: the fast run takes every fourth."""
    found = sorted(cases, key=lambda case: (len(case), str(case)))
    for number, case in enumerate(found):
        if number % 4:
            found[number] = pytest.param(case, marks=pytest.mark.slow)
    return found


@pytest.mark.parametrize("switches", quarter(SWITCHES), ids=str)
def test_no_switch_makes_an_answer_that_the_description_does_not_know(
    description: Description, switches: Dict[str, Any]
) -> None:
    organisation = Organisation()
    rules = {name: value for name, value in switches.items() if hasattr(organisation, name)}
    for name, value in rules.items():
        setattr(organisation, name, value)
    add, contacts = organisation.add_contact, organisation.contacts
    one, other, third = (add(key, "ada@example.com", f"user_{key}") for key in "123")
    talk = organisation.add_conversation([one, other], comments=2)
    more: Dict[str, Any] = {
        "external_refs": ["user_m", "crm_m"], "tags": [{"tag": {"id": "TAG-1", "name": "vip"}}],
        "custom_fields": {"tnt__plan": "gold"}, "phone_numbers": ["+49301"], "description": "Text",
    }  # fmt: skip
    full = add("M", "m@example.com", "user_m", verified=False, rev_org=None, **more)
    account = add("N", "m@example.com", "user_n", rev_org="account/NORTH", state="locked")
    organisation.visit("visitor@example.com", "user_visitor")
    works = [organisation.add_work([full], kind=kind, comments=2) for kind in ALL_WORK_KINDS]
    ticket = organisation.add_work([full])
    kinds = list(ALL_WORK_KINDS if "long_work_types" in switches else ("issue", "ticket"))
    fields = {"display_name": "M", "phone_numbers": ["+49302"], "description": "New"}
    made = {"email": "m@example.com", "external_ref": "user_c", "phone_numbers": ["+49303"]}
    roles = {"owned_by": {"set": [third]}, "reported_by": {"set": [third]}}
    questions: List[Any] = [
        (LIST, {"limit": 3}), (LIST, {"is_verified": False}), (LIST, {"email": ["m@example.com"]}),
        (GET, {"id": full}), (UPDATE, {"id": full, **fields}),
        (UPDATE, {"id": third, "external_ref": "user_new"}), (CREATE, made),
        (CREATE, {"external_ref": "user_d", "rev_org": contacts[account]["rev_org"]["id"]}),
        (CREATE, {"external_ref": "user_e", "rev_org": contacts[one]["rev_org"]["id"]}),
        (MERGE, {"primary_user": account, "secondary_user": full}),
        (MERGE, {"primary_user": one, "secondary_user": other}),
        (WORKS, {"type": kinds, "owned_by": [full], "limit": 2}), (WORKS, {"limit": 5}),
        *((WORK, {"id": work}) for work in works),
        *((TIMELINE, {"object": item, "limit": 1}) for item in (works[1], works[2], talk)),
        (GIVE, {"id": ticket, "type": "ticket", "title": "Another", **roles}),
        (TALKS, {"limit": 2}), (TALK, {"id": talk}),
        (JOIN, {"id": talk, "members": {"set": [third]}}),
        (ME, {}), (ME, {}, 401, "", "another"),
    ]  # fmt: skip
    after = [(GET, {"id": third}), (LIST, {}), (GET, {"id": other}), (LIST, {})]
    settings = {name: value for name, value in switches.items() if name not in rules}
    settings["restricted"] = works[0], works[1]
    with Sandbox(organisation, merge_delay=60, **settings) as sandbox:
        for question in questions:
            follow(description, sandbox, Asked(*question))
        accepted = {one.endpoint for one in sandbox.requests if one.status in (200, 201)}
        assert switches or accepted == set(SHAPES)
        sandbox.settle()
        organisation.delete_contact(third)
        for question in after:
            follow(description, sandbox, Asked(*question))


def follow(description: Description, sandbox: Sandbox, question: Asked) -> None:
    """Ask, a list to its end; judge each request that was accepted, and each answer."""
    body = dict(question.body)
    for _ in range(1000):
        status, answer = ask(sandbox, question._replace(body=body))
        assert description.answer(question.endpoint, status, public(answer)) == [], (body, answer)
        if status in (200, 201):
            assert description.request(question.endpoint, as_tickets(body)) == [], body
        if "next_cursor" not in answer:
            return
        body = {**question.body, "cursor": answer["next_cursor"]}
    raise AssertionError(f"{question} has no end")


def as_tickets(body: Dict[str, Any]) -> Dict[str, Any]:
    """A request without the kinds of works that the description does not promise."""
    kinds = body.get("type", [])
    if isinstance(kinds, list):
        return {**body, "type": ["ticket"]} if {*kinds} & {*OTHER_WORK_KINDS} else body
    return {**body, "type": "ticket"} if kinds in OTHER_WORK_KINDS else body


def test_the_check_itself_sees_what_is_wrong(description: Description) -> None:
    """A validator that lets everything through would prove nothing."""
    for endpoint, body in (
        (GET, {}), (GET, {"id": 1}), (GET, {"id": "x", "ids": ["x"]}),
        (MERGE, {"primary": "x", "secondary_user": "y"}), (WORKS, {"type": "ticket"}),
        (WORKS, {"type": ["chore"]}), (WORKS, {"ticket": {"a": 1}}), (WORKS, {"members": []}),
    ):  # fmt: skip
        assert description.request(endpoint, body), body
    user = {"id": "x", "state": "active", "external_ref": "y"}
    assert description.answer(GET, 200, {"rev_user": user}) == []
    org = {"type": "rev_org", "id": "x", "nickname": "y"}
    for problem in (
        {"state": "gone"}, {"external_ref": None}, {"nickname": "y"}, {"created_date": "now"},
        {"rev_org": org},
    ):  # fmt: skip
        assert description.answer(GET, 200, {"rev_user": {**user, **problem}}), problem
    assert description.answer(GET, 404, {"message": "x"})
    assert description.answer(GET, 404, {"message": "x", "type": "gone"})


def ask(sandbox: Sandbox, question: Asked) -> Any:
    """POST; returns the status and the JSON that came."""
    token = f"Bearer {question.token or sandbox.token}"
    request = urllib.request.Request(
        f"{sandbox.url}/{question.endpoint}",
        data=json.dumps(question.body).encode() if question.raw is None else question.raw,
        headers={"Authorization": token, "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())
