"""What the world does that the tool has to live with, so that a test which relies on it relies on something."""

import json
import socket
import urllib.request
from typing import Any, Dict, List, Tuple

import pytest

from tests.fake_devrev import LONG_AGO, Fault, Organisation, World
from tests.sandbox import Sandbox
from tests.support import pair

DUPLICATE_REFERENCE = "user_1"


class Played:
    """A world of one pair, whose clock a test sets by hand."""

    def __init__(self, **world: Any) -> None:
        self.now = 1000.0
        self.organisation = Organisation()
        self.primary, self.duplicate = pair(self.organisation, 1)
        self.world = World(self.organisation, lambda: self.now, **world)

    def ask(self, endpoint: str, **body: Any) -> Tuple[int, Dict[str, Any]]:
        answer = self.world.respond(endpoint, body, self.world.token)
        return answer.status, json.loads(answer.payload)

    def merge(self) -> int:
        return self.ask("rev-users.merge", primary_user=self.primary, secondary_user=self.duplicate)[0]

    def take_reference(self) -> int:
        return self.ask("rev-users.update", id=self.primary, external_ref=DUPLICATE_REFERENCE)[0]

    def listed(self) -> List[str]:
        found = self.ask("rev-users.list", email=["person1@example.com"])[1]["rev_users"]
        return [contact["id"] for contact in found]


@pytest.fixture
def played() -> Played:
    return Played()


def test_a_merge_happens_at_its_time_and_the_reference_is_free_from_then_on(played: Played) -> None:
    assert played.merge() == 200 and played.world.next_due() == 1000.3
    played.now += 0.25
    assert played.take_reference() == 409 and played.listed() == [played.primary, played.duplicate]
    played.now += 4.75
    assert played.take_reference() == 200 and played.listed() == [played.primary]
    assert played.organisation.merge_times == {played.duplicate: 1000.3}
    assert played.organisation.reference_times[played.primary] == [(LONG_AGO, "REVU-P1"), (1005.0, "user_1")]
    assert [(request.started, request.status) for request in played.world.requests][-2:] == [(1005.0, 200)] * 2


def test_a_reference_may_be_let_go_late_or_never(played: Played) -> None:
    played.organisation.ref_release = 10
    played.merge()
    played.now += 10
    assert played.take_reference() == 409
    played.organisation.stuck_references = {DUPLICATE_REFERENCE}
    played.now += 1000
    assert played.take_reference() == 409
    played.organisation.stuck_references = set()
    assert played.take_reference() == 200


@pytest.mark.parametrize(
    ("fault", "status", "delay"),
    [
        (Fault("merge-refused-late"), 400, 0.3),
        (Fault("merge-refused-late", detail=403), 403, 0.3),
        (Fault("merge-refused-late", detail=(409, 60)), 409, 60),
        (Fault("merge-slow", detail=90), 200, 90),
        (Fault("merge-doubled"), 200, 0.3),
        (Fault("merge-doubled", detail=1), 200, 0.3),
        (Fault("500-after"), 500, 0.3),
        (Fault("merge-never"), 200, None),
        (Fault("409"), 409, None),
        (Fault("404"), 404, None),
    ],
)
def test_what_a_merge_request_is_told_and_what_becomes_of_it(
    played: Played, fault: Fault, status: int, delay: Any
) -> None:
    played.world.faults = [fault]
    assert played.merge() == status
    assert played.world.next_due() == (None if delay is None else 1000 + delay)
    played.world.faults = []
    played.now += 600
    played.world.catch_up()
    assert played.organisation.merges == ([] if delay is None else [(played.primary, played.duplicate)])


def test_a_request_for_a_merge_that_is_pending_may_be_refused(played: Played) -> None:
    played.merge()
    assert played.merge() == 200
    played.world.in_progress = 409
    assert played.merge() == 409
    played.world.settle()
    assert played.organisation.merges == [(played.primary, played.duplicate)]


@pytest.mark.parametrize("gone", World.GONE)
def test_who_a_merged_contact_is(gone: str) -> None:
    played = Played(gone=gone)
    played.merge()
    played.world.settle()
    status, answer = played.ask("rev-users.get", id=played.duplicate)
    contact = answer.get("rev_user", {})
    assert status == {"404": 404, "301": 301}.get(gone, 200)
    if gone in ("shadow", "unassigned"):
        assert contact["id"] == played.duplicate and contact["state"] == gone
        assert contact["primary_identity"]["id"] == played.primary
    elif status == 200:
        assert (contact["id"], contact["state"]) == {
            "state": (played.duplicate, "deleted"), "primary": (played.primary, "active")
        }[gone]  # fmt: skip
    assert played.ask("rev-users.merge", primary_user=played.primary, secondary_user=played.duplicate)[0] == 404


def test_lists_lag_behind_everything_that_changes(played: Played) -> None:
    organisation, world = played.organisation, played.world
    owned = [work["id"] for work in played.ask("works.list", owned_by=[played.duplicate])[1]["works"]]
    talks = len(played.ask("conversations.list", members=[played.duplicate])[1]["conversations"])
    assert owned and talks == 1
    world.list_lag = 12
    played.merge()
    world.settle()
    organisation.delete_work(owned[0])
    new = organisation.visit("person1@example.com", DUPLICATE_REFERENCE)
    assert played.listed() == [played.primary, played.duplicate]
    assert [work["id"] for work in played.ask("works.list", owned_by=[played.duplicate])[1]["works"]] == owned
    assert len(played.ask("conversations.list", members=[played.duplicate])[1]["conversations"]) == talks
    assert played.ask("works.get", id=owned[0])[0] == 404 and played.ask("rev-users.get", id=played.duplicate)[0] == 404
    played.now += 12
    assert played.listed() == [played.primary, new]
    assert played.ask("works.list", owned_by=[played.duplicate])[1] == {"works": []}
    assert played.ask("conversations.list", members=[played.duplicate])[1] == {"conversations": []}


def test_a_list_is_found_whatever_way_an_object_was_changed(played: Played) -> None:
    contact = played.organisation.contacts[played.duplicate]
    contact["email"] = "moved@example.com"
    assert played.listed() == [played.primary]
    contact.update(email="person1@example.com")
    assert played.listed() == [played.primary, played.duplicate]
    del contact["email"]
    assert played.listed() == [played.primary]
    del played.organisation.contacts[played.duplicate]
    contact["email"] = "person1@example.com"
    assert played.listed() == [played.primary] and played.ask("rev-users.get", id=played.duplicate)[0] == 404


def test_pages_go_on_where_they_were_while_objects_come_and_go() -> None:
    played = Played()
    people = [played.organisation.add_contact(f"X{n}", f"x{n}@example.com") for n in range(30)]
    seen: List[str] = []
    body: Dict[str, Any] = {"limit": 4}
    while True:
        answer = played.ask("rev-users.list", **body)[1]
        seen += [one["id"] for one in answer["rev_users"]]
        if "next_cursor" not in answer:
            break
        body["cursor"] = answer["next_cursor"]
        played.organisation.delete_contact(seen[-1])
    assert seen == [played.primary, played.duplicate, *people]


def test_the_application_makes_a_contact_only_where_nobody_holds_the_reference(played: Played) -> None:
    organisation = played.organisation
    assert organisation.visit("person1@example.com", DUPLICATE_REFERENCE) == played.duplicate
    played.merge()
    played.world.later(1, lambda: organisation.visit("person1@example.com", DUPLICATE_REFERENCE))
    played.now += 2
    assert len(played.listed()) == 2 and played.take_reference() == 409
    new = played.listed()[1]
    assert organisation.reference_times[new] == [(1001.0, DUPLICATE_REFERENCE)]
    assert organisation.visit("person1@example.com", DUPLICATE_REFERENCE) == new


def test_a_contact_is_made_unless_its_reference_its_email_or_a_field_is_refused(played: Played) -> None:
    given = {"email": "person1@example.com", "external_ref": "user_new", "phone_numbers": ["+4930123456"]}
    status, answer = played.ask("rev-users.create", **given)
    assert status == 201 and {**answer["rev_user"], **given} == answer["rev_user"]
    assert played.ask("rev-users.create", **given)[0] == 409
    assert played.ask("rev-users.create", email="person1@example.com")[0] == 201
    played.world.unique_emails = True
    assert played.ask("rev-users.create", email="person1@example.com")[0] == 409
    played.world.refused_fields = ("description",)
    status, answer = played.ask("rev-users.create", description="Text")
    assert (status, answer["field_name"]) == (400, "description")
    status, answer = played.ask("rev-users.create", phone_numbers=["030 123456"])
    assert (status, answer["field_name"]) == (400, "phone_numbers")


def test_a_token_may_not_do_everything() -> None:
    played = Played(forbidden=("*.update", "rev-users.create"))
    assert played.take_reference() == 403 and played.ask("rev-users.create")[0] == 403
    assert played.merge() == 200
    assert played.world.respond("nothing.get", {}, played.world.token).payload == b'{"message": "route not found"}'
    assert played.world.respond("rev-users.list", {}, "another").status == 401


def test_others_spend_of_the_quota_too() -> None:
    played = Played(quota=(10, 60))
    quota = played.world.quota
    assert quota is not None
    quota.others = 4
    left = [played.world.respond("dev-users.self", {}, played.world.token) for _ in range(3)]
    assert [answer.headers["X-Ratelimit-Remaining"] for answer in left] == ["5", "4", "3"]
    quota.spend(3)
    assert played.ask("dev-users.self")[0] == 429 and played.world.over_quota == 1
    played.now += 60
    assert played.ask("dev-users.self")[0] == 200


def test_lists_without_an_end_bring_nothing_new(played: Played) -> None:
    played.world.faults = [Fault("endless")]
    first = played.ask("rev-users.list")[1]
    second = played.ask("rev-users.list", cursor=first["next_cursor"])[1]
    assert first["rev_users"] == second["rev_users"] and first["next_cursor"] != second["next_cursor"]
    played.world.faults = [Fault("endless", detail="empty")]
    assert played.ask("rev-users.list")[1]["rev_users"] == []


def test_answers_over_http_that_drip_come_late_or_lie_deep() -> None:
    with Sandbox(Organisation()) as sandbox:
        request = urllib.request.Request(
            sandbox.url + "/dev-users.self", b"{}", {"Authorization": f"Bearer {sandbox.token}", "Content-Type": "application/json"}
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        sandbox.faults = [Fault("drip", detail=0.001)]
        with opener.open(request, timeout=30) as answer:
            assert "dev_user" in json.loads(answer.read())
        sandbox.faults = [Fault("nested")]
        with opener.open(request, timeout=30) as answer:
            assert answer.read().startswith(b'{"a":{"a":')
        sandbox.faults = [Fault("slow", detail=30)]
        with pytest.raises((socket.timeout, TimeoutError)):
            opener.open(request, timeout=0.1)


@pytest.mark.parametrize(
    ("header", "values"),
    [
        (
            "REV_USER_ID,DISPLAY_NAME,EMAIL,EXTERNAL_REF,REV_ORG_ID,CREATED_DATE,TICKET_COUNT",
            "don:identity:dvrv-us-1:devo/ORG:revu/7,Ada,ada@example.com,user_7,"
            "don:identity:dvrv-us-1:devo/ORG:revo/NORTH,2023-01-09T09:30:00.000Z,2",
        ),
        (
            "REV_USER_ID,DISPLAY_NAME,EMAIL,EXTERNAL_REF,FULL_NAME,TICKET_COUNT,CREATED_AT,UPDATED_AT",
            "don:identity:dvrv-us-1:devo/ORG:revu/7,Ada,ada@example.com,user_7,"
            "Ada Reyes,2.0,2023-01-09 09:30:00.000 +0000,2024-01-09 09:30:00",
        ),
    ],
)
def test_an_organisation_grows_from_an_export_of_either_form(tmp_path: Any, header: str, values: str) -> None:
    path = tmp_path / "contacts.csv"
    path.write_text(f"{header}\n{values}\n", encoding="utf-8")
    organisation = Organisation.from_csv(path)
    (contact,) = organisation.contacts.values()
    assert contact["id"] == "don:identity:dvrv-us-1:devo/ORG:revu/7" and contact["external_ref"] == "user_7"
    assert contact["created_date"] == "2023-01-09T09:30:00.000Z"
    assert contact["phone_numbers"] and contact["description"]
    if "FULL_NAME" in header:
        assert contact["rev_org"]["display_id"] == "REV-ACME" and contact["full_name"] == "Ada Reyes"
        assert contact["modified_date"] == "2024-01-09T09:30:00.000Z"
    else:
        assert contact["rev_org"]["display_id"] == "REV-NORTH"


def test_the_same_calls_make_the_same_world() -> None:
    def play() -> List[Any]:
        played = Played(faults=[Fault("503", chance=0.3)], seed=7)
        asked = [played.ask("rev-users.list", limit=1) for _ in range(20)] + [played.merge()]
        played.now += 1
        return [*asked, played.take_reference(), played.listed(), played.organisation.works]

    assert play() == play()
