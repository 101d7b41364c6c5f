"""What the tool asks and what the sandbox answers, held against DevRev's published OpenAPI description.

The description is not part of the project: DEVREV_OPENAPI says where it is, else it is looked for beside the project.
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
from tests.support import ROOT, SAMPLE, Workplace, the_rest_is_slow

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

DESCRIPTION = Path(
    os.environ.get("DEVREV_OPENAPI") or ROOT.parent / "shared" / "openapi" / "devrev-public.json"
)
pytestmark = pytest.mark.skipif(
    not DESCRIPTION.is_file(),
    reason="DevRev's OpenAPI description is not at hand (DEVREV_OPENAPI names the file)",
)
SCHEMA_KEYS = ("items", "additionalProperties")
# Beta fields of a contact, and what DevRev's pages on errors have: they are not in the public description.
NOT_PUBLIC = {"is_verified", "external_refs", "tags", "custom_fields", "object_ids"}


class Description:
    """The description as JSON Schema, in which a property that it does not know is an error."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        self.paths = document["paths"]
        self.responses = document["components"].get("responses", {})
        self.schemas = {
            name: opened(schema) for name, schema in document["components"]["schemas"].items()
        }
        self._validators: Dict[
            int, Any
        ] = {}  # by schema of the document, which stays as long as this
        self.formats = jsonschema.FormatChecker(formats=())
        self.formats.checks("date-time")(
            lambda text: (
                not isinstance(text, str)
                or bool(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", text))
            )
        )

    def request(self, endpoint: str) -> Any:
        """The schema of a POST's body."""
        return self.paths[f"/{endpoint}"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]

    def answer(self, endpoint: str, status: int) -> Any:
        """The schema of an answer's body."""
        answer = self.paths[f"/{endpoint}"]["post"]["responses"][str(status)]
        if "$ref" in answer:
            answer = self.responses[answer["$ref"].rpartition("/")[2]]
        return answer["content"]["application/json"]["schema"]

    def flaws(self, schema: Any, value: Any) -> List[str]:
        if id(schema) not in self._validators:
            whole = {**closed(copy.deepcopy(schema)), "components": {"schemas": self.schemas}}
            self._validators[id(schema)] = jsonschema.Draft202012Validator(
                whole, format_checker=self.formats
            )
        validator = self._validators[id(schema)]
        return [
            f"{list(error.absolute_path)}: {error.message[:300]}"
            for error in validator.iter_errors(value)
        ]


def closed(schema: Any) -> Any:
    """A schema where a value stands by itself, so that everything in the value has to be known."""
    found = opened(schema)
    if not isinstance(found, dict) or "unevaluatedProperties" in found:
        return found
    free_form = found.get("type") == "object" and not {
        "properties",
        "allOf",
        "anyOf",
        "$ref",
    } & set(found)
    return found if free_form else {**found, "unevaluatedProperties": False}


def opened(schema: Any) -> Any:
    """A schema that may be one part of another (by allOf, or as one of several kinds): OpenAPI 3.0 as JSON Schema."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    if (
        found.get("additionalProperties") is False
    ):  # it is what is known of this part, and says nothing of the others
        found["properties"] = found.get("properties", {})
        del found["additionalProperties"]
    if "properties" in found:
        found["properties"] = {name: closed(one) for name, one in found["properties"].items()}
    for key in SCHEMA_KEYS:
        if key in found:
            found[key] = closed(found[key])
    if "allOf" in found:
        found["allOf"] = [opened(one) for one in found["allOf"]]
    kinds = found.pop("oneOf", None)
    discriminator = found.pop("discriminator", None)
    if kinds is not None:
        found["anyOf"] = [opened(one) for one in kinds]
        if discriminator and "mapping" in discriminator:
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
            await tool.DevRevAPI(
                settings, tool.Environment(settings), tool.CancelToken()
            ).holders_of("user_a102", tool.RequestOptions())

        asyncio.run(who_holds())
        requests = list(sandbox.requests)
    assert len(organisation.merges) > 10
    for request in requests:
        if (
            request.endpoint == "works.list" and request.status == 400
        ):  # tasks and the like, which it does not promise
            continue
        assert description.flaws(description.request(request.endpoint), request.body) == [], request
    assert {request.endpoint for request in requests} == {
        "dev-users.self", "rev-users.list", "rev-users.get", "rev-users.merge", "rev-users.update", "rev-users.create",
        "works.list", "works.get", "works.update", "conversations.list", "conversations.get", "conversations.update", "timeline-entries.list",
    }  # fmt: skip
    assert any("cursor" in request.body for request in requests), (
        "no list was long enough to be paged"
    )


class Asked(NamedTuple):
    """A request to the sandbox, the status it has to get, and with which fault, token and raw body."""

    endpoint: str
    body: Dict[str, Any]
    status: int = 200
    fault: str = ""
    token: str = ""
    raw: Optional[bytes] = None


def asked(organisation: Organisation) -> Iterator[Asked]:
    """What to ask so that all endpoints give all kinds of answers."""
    one, other, third = list(organisation.contacts)[:3]
    org = organisation.contacts[one]["rev_org"]["id"]
    work = next(one for one, work in organisation.works.items() if work["type"] == "ticket")
    issue = next(one for one, work in organisation.works.items() if work["type"] == "issue")
    talk = next(iter(organisation.conversations))
    nobody = organisation.don("identity", "revu", "NOBODY")
    nothing = organisation.don("core", "ticket", "999999")
    yield from (
        Asked("dev-users.self", {}),
        Asked("rev-users.get", {"id": one}),
        Asked("rev-users.list", {}),
        Asked("rev-users.list", {"email": [organisation.contacts[one]["email"]], "limit": 1}),
        Asked(
            "rev-users.list",
            {"is_verified": False, "rev_org": [org], "phone_numbers": ["+4930123456"]},
        ),
        Asked("rev-users.list", {"associations": [org], "is_verified": True, "limit": 1}),
        Asked(
            "rev-users.update",
            {"id": third, "external_ref": "user_new", "display_name": "New", "phone_numbers": []},
        ),
        Asked("rev-users.create", {}, 201),
        Asked(
            "rev-users.create",
            dict(
                {
                    "display_name": "Made",
                    "email": "made@example.com",
                    "external_ref": "user_made",
                    "rev_org": org,
                },
                description="Text",
                phone_numbers=["+4930123456"],
                display_picture="ARTIFACT-1",
            ),
            201,
        ),
        Asked(
            "rev-users.update",
            {"id": third, "display_picture": "ARTIFACT-2", "email": "new@example.com"},
        ),
        Asked("rev-users.merge", {"primary_user": one, "secondary_user": other}),
        *(
            Asked("works.list", {role: [one, other], "limit": 100})
            for role in ("owned_by", "created_by", "reported_by")
        ),
        Asked("works.list", {"type": ["ticket", "issue"], "limit": 1}),
        Asked("works.get", {"id": work}),
        Asked("works.get", {"id": issue}),
        Asked(
            "works.update",
            {
                "id": work,
                "type": "ticket",
                "owned_by": {"set": [third]},
                "reported_by": {"set": [third]},
            },
        ),
        Asked("works.update", {"id": issue, "type": "issue", "title": "Another", "body": "text"}),
        Asked("conversations.list", {}),
        Asked("conversations.get", {"id": talk}),
        Asked(
            "conversations.update", {"id": talk, "members": {"set": [third]}, "title": "Another"}
        ),
        *(
            Asked("timeline-entries.list", {"object": item, "limit": 1})
            for item in (work, issue, talk)
        ),
    )
    # What is refused: 400 of every type, 404, 409.
    yield from (
        Asked("rev-users.get", {}, 400),
        Asked("rev-users.get", {"id": "REVU-1"}, 400),
        Asked("rev-users.get", {"id": work}, 400),
        Asked("rev-users.get", {"id": 7}, 400),
        Asked("rev-users.list", {"who": "all"}, 400),
        Asked("rev-users.list", {"email": "ada@example.com"}, 400),
        Asked("rev-users.list", {"limit": 0}, 400),
        Asked("rev-users.list", {"cursor": "none"}, 400),
        Asked("rev-users.list", {"mode": "sideways"}, 400),
        Asked("rev-users.merge", {"primary_user": one, "secondary_user": one}, 400),
        Asked("works.list", {"type": ["task"]}, 400),
        Asked("works.list", {"owned_by": [work]}, 400),
        Asked("works.update", {"id": work, "type": "issue"}, 400),
        Asked("works.update", {"id": work, "owned_by": {"set": []}}, 400),
        Asked("works.update", {"id": work, "title": ""}, 400),
        Asked("conversations.update", {"id": talk, "members": {"add": [third]}}, 400),
        Asked("rev-users.create", {"phone_numbers": ["030 123456"]}, 400),
        Asked("rev-users.create", {"rev_org": organisation.don("identity", "revo", "NONE")}, 400),
        Asked("dev-users.self", {"who": "me"}, 400),
        *(
            Asked(endpoint, {}, 400, raw=raw)
            for endpoint in SHAPES
            for raw in (b"", b"{", b"[]", b"\xff")
        ),
        *(Asked(endpoint, {"nonsense": 1}, 400) for endpoint in SHAPES),
        Asked("rev-users.get", {"id": nobody}, 404),
        Asked("rev-users.merge", {"primary_user": one, "secondary_user": nobody}, 404),
        Asked("rev-users.update", {"id": nobody, "external_ref": "user_x"}, 404),
        Asked("works.get", {"id": nothing}, 404),
        Asked("works.update", {"id": nothing, "type": "ticket"}, 404),
        Asked("timeline-entries.list", {"object": nothing}, 404),
        Asked(
            "rev-users.update",
            {"id": third, "external_ref": organisation.contacts[one]["external_ref"]},
            409,
        ),
        Asked(
            "rev-users.create", {"external_ref": organisation.contacts[one]["external_ref"]}, 409
        ),
    )
    for endpoint in SHAPES:
        yield Asked(endpoint, {}, 401, token="another-token")
        for kind in (
            "400", "401", "401-expired", "401-revoked", "401-deactivated", "403", "429", "429-bare", "429-body",
            "429-header", "500", "500-after", "503",
        ):  # fmt: skip
            yield Asked(endpoint, {}, int(kind[:3]), fault=kind)


def test_every_answer_of_the_sandbox_is_one_that_the_description_knows(
    description: Description,
) -> None:
    organisation = organisation_of(SAMPLE)
    seen = set()
    with Sandbox(organisation, merge_delay=60, hidden_fields=("custom_fields",)) as sandbox:
        for question in asked(organisation):
            sandbox.faults = [Fault(question.fault)] if question.fault else []
            status, answer = ask(sandbox, question)
            assert status == question.status, (question, answer)
            assert description.flaws(description.answer(question.endpoint, status), answer) == [], (
                question
            )
            if status in (200, 201):
                # What the sandbox takes, the description has to know: else the tool could pass here and fail there.
                assert (
                    description.flaws(description.request(question.endpoint), question.body) == []
                ), question
            seen.add((question.endpoint, status, answer.get("type")))
        sandbox.faults = []
        sandbox.settle()
        ((_, other),) = organisation.merges
        for sandbox.gone in ("404", "state", "primary", "shadow", "unassigned"):
            expected = 404 if sandbox.gone == "404" else 200
            status, answer = ask(sandbox, Asked("rev-users.get", {"id": other}))
            assert (
                status == expected
                and description.flaws(description.answer("rev-users.get", status), answer) == []
            )
    assert {endpoint for endpoint, status, _ in seen if status in (200, 201)} == set(SHAPES)
    assert {kind for _, status, kind in seen if status == 400} == {
        "bad_request", "invalid_content_type", "invalid_enum_value", "invalid_field", "invalid_id",
        "missing_required_field", "parse_error", "unexpected_id_type", "unexpected_json_type", "value_not_permitted",
    }  # fmt: skip
    assert {kind for _, status, kind in seen if status == 401} == {
        "unauthenticated", "token_expired", "token_revoked", "dev_org_deactivated"
    }  # fmt: skip


def public(value: Any) -> Any:
    """An answer without what the public description leaves out; works of every kind as if they were tickets."""
    if isinstance(value, list):
        return [public(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: public(one) for name, one in value.items() if name not in NOT_PUBLIC}
    for name in ("type", "object_type"):
        if value.get(name) in OTHER_WORK_KINDS:
            found[name] = "ticket"
    return found


SWITCHES: List[Dict[str, Any]] = [
    *({"verified_shown": form} for form in World.CHOICES["verified_shown"]),
    *({"verified_filter": form} for form in World.CHOICES["verified_filter"]),
    {"hidden_fields": ("phone_numbers", "description")},
    {"refused_fields": ("rev-users.update.phone_numbers", "display_name"), "refused_status": 400},
    {"refused_fields": ("phone_numbers",), "refused_status": 409},
    {"account_rev_orgs": True},
    {"unique_emails": True, "email_ignores_case": True},
    *(
        {"deleted_listed": True, "deleted_contacts": "state", "gone": gone}
        for gone in World.GONE
        if gone != "301"
    ),
    {"empty_pages": 2, "largest_page": 3, "trailing_page": True},
    {"long_work_types": True},
    *(
        {"hidden_kinds": ("issue", "conversation"), "hidden_kinds_answer": form}
        for form in ("403", "left out")
    ),
    *({"restricted_in_lists": form} for form in World.CHOICES["restricted_in_lists"]),
    *({"quota": (20, 60), "retry_after": form} for form in World.CHOICES["retry_after"]),
    {"quota": (20, 4.0, 0, True)},
    *({"unverified_merge": form} for form in World.CHOICES["unverified_merge"] if form != "409"),
    {"unverified_keep_references": True},
    {"unique_references": "organisation"},
    {"merge_joins": ("phone_numbers", "tags", "external_refs")},
    {"visitors_verified": False},
]


@pytest.mark.parametrize(
    "switches",
    the_rest_is_slow(SWITCHES, *SWITCHES[::4]),
    ids=lambda switches: " ".join(f"{name}={value}" for name, value in switches.items()),
)
def test_no_switch_makes_an_answer_that_the_description_does_not_know(
    description: Description, switches: Dict[str, Any]
) -> None:
    organisation = Organisation()
    rules = {name: value for name, value in switches.items() if hasattr(organisation, name)}
    for name, value in rules.items():
        setattr(organisation, name, value)
    one, other, third = (
        organisation.add_contact(key, "ada@example.com", f"user_{key}") for key in "123"
    )
    talk = organisation.add_conversation([one, other], comments=2)
    org = organisation.contacts[one]["rev_org"]["id"]
    more = {
        "external_refs": ["user_m", "crm_m"], "tags": [{"tag": {"id": "TAG-1", "name": "vip"}}],
        "custom_fields": {"tnt__plan": "gold"}, "phone_numbers": ["+49301"], "description": "Text",
    }  # fmt: skip
    full = organisation.add_contact(
        "M", "m@example.com", "user_m", verified=False, rev_org=None, **more
    )
    account = organisation.add_contact(
        "N", "m@example.com", "user_n", rev_org="account/NORTH", state="locked"
    )
    organisation.visit("visitor@example.com", "user_visitor")
    works = [organisation.add_work([full], kind=kind, comments=2) for kind in ALL_WORK_KINDS]
    kinds = list(ALL_WORK_KINDS if "long_work_types" in switches else ("issue", "ticket"))
    questions = [
        Asked("rev-users.list", {"limit": 3}), Asked("rev-users.list", {"is_verified": False}),
        Asked("rev-users.list", {"email": ["m@example.com"]}), Asked("rev-users.get", {"id": full}),
        Asked("rev-users.update", {"id": full, "display_name": "M", "phone_numbers": ["+49302"], "description": "New"}),
        Asked("rev-users.update", {"id": third, "external_ref": "user_new"}),
        Asked("rev-users.create", {"email": "m@example.com", "external_ref": "user_c", "phone_numbers": ["+49303"]}),
        Asked("rev-users.create", {"external_ref": "user_d", "rev_org": organisation.contacts[account]["rev_org"]["id"]}),
        Asked("rev-users.create", {"external_ref": "user_e", "rev_org": org}),
        Asked("rev-users.merge", {"primary_user": account, "secondary_user": full}),
        Asked("rev-users.merge", {"primary_user": one, "secondary_user": other}),
        Asked("works.list", {"type": kinds, "owned_by": [full], "limit": 2}), Asked("works.list", {"limit": 5}),
        *(Asked("works.get", {"id": work}) for work in works),
        *(Asked("timeline-entries.list", {"object": item, "limit": 1}) for item in (works[1], works[2], talk)),
        Asked("works.update", {"id": works[-1], "type": kinds[-1], "title": "Another"}),
        Asked("conversations.list", {"limit": 2}),
        Asked("dev-users.self", {}, token="another"),
    ]  # fmt: skip
    settings = {name: value for name, value in switches.items() if name not in rules}
    with Sandbox(
        organisation, merge_delay=60, restricted=(works[0], works[1]), **settings
    ) as sandbox:
        for question in questions:
            follow(description, sandbox, question)
        sandbox.settle()
        organisation.delete_contact(third)
        for question in (
            Asked("rev-users.get", {"id": third}),
            Asked("rev-users.list", {}),
            Asked("rev-users.get", {"id": other}),
            Asked("rev-users.list", {}),
        ):
            follow(description, sandbox, question)


def follow(description: Description, sandbox: Sandbox, question: Asked) -> None:
    """Ask, a list to its end, and hold each request that was accepted and each answer against the description."""
    body = dict(question.body)
    for _ in range(1000):
        status, answer = ask(sandbox, question._replace(body=body))
        assert (
            description.flaws(description.answer(question.endpoint, status), public(answer)) == []
        ), (body, answer)
        if status in (200, 201):
            kinds = body.get("type")
            if kinds in OTHER_WORK_KINDS or (
                isinstance(kinds, list) and not set(kinds).isdisjoint(OTHER_WORK_KINDS)
            ):
                body = {**body, "type": "ticket" if isinstance(kinds, str) else ["ticket"]}
            assert description.flaws(description.request(question.endpoint), body) == [], body
        if "next_cursor" not in answer:
            return
        body = {**question.body, "cursor": answer["next_cursor"]}
    raise AssertionError(f"{question} has no end")


def test_an_answer_over_quota_says_how_long_to_wait(description: Description) -> None:
    with Sandbox(Organisation(), quota=(1, 60)) as sandbox:
        assert ask(sandbox, Asked("dev-users.self", {}))[0] == 200
        status, answer = ask(sandbox, Asked("dev-users.self", {}))
    assert status == 429 and 0 < answer["retry_after"] <= 60
    assert description.flaws(description.answer("dev-users.self", 429), answer) == []


def test_the_check_itself_sees_what_is_wrong(description: Description) -> None:
    """A validator that lets everything through would prove nothing."""
    get, merge, works = (
        description.request(name) for name in ("rev-users.get", "rev-users.merge", "works.list")
    )
    assert description.flaws(get, {"id": "x"}) == []
    for schema, body in (
        (get, {}), (get, {"id": 1}), (get, {"id": "x", "ids": ["x"]}), (merge, {"primary": "x", "secondary_user": "y"}),
        (works, {"type": "ticket"}), (works, {"type": ["chore"]}), (works, {"ticket": {"nothing": 1}}), (works, {"members": []}),
    ):  # fmt: skip
        assert description.flaws(schema, body), body
    user = {
        "id": "x",
        "state": "active",
        "external_ref": "y",
        "created_date": "2024-01-01T00:00:00.000Z",
    }
    answer = description.answer("rev-users.get", 200)
    assert description.flaws(answer, {"rev_user": user}) == []
    org = {"type": "rev_org", "id": "x", "nickname": "y"}
    for problem in (
        {"state": "gone"},
        {"external_ref": None},
        {"nickname": "y"},
        {"created_date": "now"},
        {"rev_org": org},
    ):
        assert description.flaws(answer, {"rev_user": {**user, **problem}}), problem
    errors = description.answer("rev-users.get", 404)
    assert description.flaws(errors, {"message": "x", "type": "not_found"}) == []
    for error in (
        {"message": "x"},
        {"message": 1, "type": "not_found"},
        {"type": "gone"},
        {"type": "not_found", "a": 1},
    ):
        assert description.flaws(errors, error), error


def ask(sandbox: Sandbox, question: Asked) -> Any:
    """POST; returns the status and the JSON that came."""
    request = urllib.request.Request(
        f"{sandbox.url}/{question.endpoint}",
        data=json.dumps(question.body).encode() if question.raw is None else question.raw,
        headers={
            "Authorization": f"Bearer {question.token or sandbox.token}",
            "Content-Type": "application/json",
        },
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())


def test_which_answers_go_beyond_the_description(description: Description) -> None:
    """What DevRev's pages, or its users, tell of and the description doesn't: each has to be asked for."""
    organisation = Organisation()
    primary = organisation.add_contact(
        "1", "ada@example.com", verified=False, external_refs=["user_1", "crm_1"]
    )
    other = organisation.add_contact("2", "ada@example.com", "user_2")
    merge = Asked("rev-users.merge", {"primary_user": primary, "secondary_user": other})
    poll = Asked("rev-users.get", {"id": other})
    with Sandbox(organisation, merge_delay=60) as sandbox:
        for sandbox.merge_answer in World.CHOICES["merge_answer"]:
            status, answer = ask(sandbox, merge)
            known = (status, answer) == (200, {})
            assert known == (sandbox.merge_answer == "200"), sandbox.merge_answer
            assert (
                not known
                or description.flaws(description.answer(merge.endpoint, status), answer) == []
            )
        for sandbox.verified_shown in ("shown", "null"):
            status, answer = ask(sandbox, Asked("rev-users.get", {"id": primary}))
            flaws = description.flaws(description.answer("rev-users.get", status), answer)
            assert (
                flaws
                and description.flaws(description.answer("rev-users.get", status), public(answer))
                == []
            )
        sandbox.settle()
        for sandbox.gone in set(World.ODD) - {"hang", "drip", "502"}:
            status, answer = ask(sandbox, poll)
            documented = str(status) in description.paths["/rev-users.get"]["post"]["responses"]
            flaws = documented and description.flaws(
                description.answer("rev-users.get", status), public(answer)
            )
            odd = sandbox.gone in ("404-route", "404-other", "410", "shape", "empty")
            assert bool(flaws or not documented) == odd, (sandbox.gone, flaws)
