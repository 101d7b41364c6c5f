"""What the world does that the tool has to live with, so that a test which relies on it relies on something."""

import json
import socket
import urllib.request
from typing import Any, Dict, List, Tuple

import pytest

from tests.fake import world as fake_world
from tests.fake.organisation import ALL_WORK_KINDS, HALF_EMOJI, LONG_AGO, Organisation, Rules
from tests.fake.trouble import ODD_POLLS, PAGES, Answer, Fault
from tests.fake.world import SWITCHES, World
from tests.sandbox import Sandbox, page
from tests.support import pair

DUPLICATE_REFERENCE = "user_1"


class Played:
    """A world of one pair, whose clock a test sets by hand."""

    def __init__(self, **world: Any) -> None:
        self.now = 1000.0
        self.organisation = Organisation()
        self.primary, self.duplicate = pair(self.organisation, 1)
        self.world = World(self.organisation, lambda: self.now, **world)

    def answer(self, endpoint: str, **body: Any) -> Answer:
        return self.world.respond(endpoint, body, self.world.token)

    def ask(self, endpoint: str, **body: Any) -> Tuple[int, Dict[str, Any]]:
        answer = self.answer(endpoint, **body)
        return answer.status, json.loads(answer.payload)

    def pages(self, endpoint: str, name: str, **body: Any) -> List[List[str]]:
        """The ids of each page of a list, up to its end."""
        found = []
        cursors = set()
        while True:
            content = self.ask(endpoint, **body)[1]
            found.append([one["id"] for one in content[name]])
            if "next_cursor" not in content:
                return found
            assert content["next_cursor"] not in cursors
            cursors.add(content["next_cursor"])
            body["cursor"] = content["next_cursor"]

    def merge(self) -> int:
        return self.ask(
            "rev-users.merge", primary_user=self.primary, secondary_user=self.duplicate
        )[0]

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
    assert played.organisation.reference_times[played.primary] == [
        (LONG_AGO, "REVU-P1"),
        (1005.0, "user_1"),
    ]
    assert [(request.started, request.status) for request in played.world.requests][-2:] == [
        (1005.0, 200)
    ] * 2


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
    assert played.organisation.merges == (
        [] if delay is None else [(played.primary, played.duplicate)]
    )


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
    assert (
        played.ask("rev-users.merge", primary_user=played.primary, secondary_user=played.duplicate)[
            0
        ]
        == 404
    )


def test_lists_lag_behind_everything_that_changes(played: Played) -> None:
    organisation, world = played.organisation, played.world
    owned = [
        work["id"] for work in played.ask("works.list", owned_by=[played.duplicate])[1]["works"]
    ]
    talks = len(played.ask("conversations.list", members=[played.duplicate])[1]["conversations"])
    assert owned and talks == 1
    world.list_lag = 12
    played.merge()
    world.settle()
    organisation.delete_work(owned[0])
    new = organisation.visit("person1@example.com", DUPLICATE_REFERENCE)
    assert played.listed() == [played.primary, played.duplicate]
    assert [
        work["id"] for work in played.ask("works.list", owned_by=[played.duplicate])[1]["works"]
    ] == owned
    assert (
        len(played.ask("conversations.list", members=[played.duplicate])[1]["conversations"])
        == talks
    )
    assert (
        played.ask("works.get", id=owned[0])[0] == 404
        and played.ask("rev-users.get", id=played.duplicate)[0] == 404
    )
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
    assert (
        played.listed() == [played.primary]
        and played.ask("rev-users.get", id=played.duplicate)[0] == 404
    )


def test_pages_continue_where_they_were_while_objects_come_and_go() -> None:
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


def test_the_application_makes_a_contact_only_where_no_contact_holds_the_reference(
    played: Played,
) -> None:
    organisation = played.organisation
    assert organisation.visit("person1@example.com", DUPLICATE_REFERENCE) == played.duplicate
    played.merge()
    played.world.later(1, lambda: organisation.visit("person1@example.com", DUPLICATE_REFERENCE))
    played.now += 2
    assert len(played.listed()) == 2 and played.take_reference() == 409
    new = played.listed()[1]
    assert organisation.reference_times[new] == [(1001.0, DUPLICATE_REFERENCE)]
    assert organisation.visit("person1@example.com", DUPLICATE_REFERENCE) == new


def test_a_contact_is_made_unless_its_reference_its_email_or_a_field_is_refused(
    played: Played,
) -> None:
    given = {
        "email": "person1@example.com",
        "external_ref": "user_new",
        "phone_numbers": ["+4930123456"],
    }
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
    assert (
        played.world.respond("nothing.get", {}, played.world.token).payload
        == b'{"message": "route not found"}'
    )
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
    assert (
        first["rev_users"] == second["rev_users"] and first["next_cursor"] != second["next_cursor"]
    )
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
def test_an_organisation_grows_from_an_export_of_either_form(
    tmp_path: Any, header: str, values: str
) -> None:
    path = tmp_path / "contacts.csv"
    path.write_text(f"{header}\n{values}\n", encoding="utf-8")
    organisation = Organisation.from_csv(path)
    (contact,) = organisation.contacts.values()
    assert (
        contact["id"] == "don:identity:dvrv-us-1:devo/ORG:revu/7"
        and contact["external_ref"] == "user_7"
    )
    assert contact["created_date"] == "2023-01-09T09:30:00.000Z"
    assert contact["phone_numbers"] and contact["description"]
    if "FULL_NAME" in header:
        assert (
            contact["rev_org"]["display_id"] == "REV-ACME" and contact["full_name"] == "Ada Reyes"
        )
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


# --------------------------------------------------------------------------------------------------
# What is known of DevRev either way
# --------------------------------------------------------------------------------------------------


def test_switches_are_known_by_name_and_take_no_value_that_means_nothing(played: Played) -> None:
    with pytest.raises(TypeError, match="merge_anser"):
        Played(merge_anser="204")
    for name in World.CHOICES:
        assert name in SWITCHES
        with pytest.raises(ValueError, match=name):
            setattr(played.world, name, "perhaps")
        with pytest.raises(ValueError, match=name):
            Played(**{name: "perhaps"})


@pytest.mark.parametrize(
    ("form", "is_verified"), [("hidden", ()), ("shown", (True, False)), ("null", (None, None))]
)
def test_answers_show_who_is_verified_or_do_not(form: str, is_verified: Any) -> None:
    played = Played(verified_shown=form)
    played.organisation.unverified.add(played.duplicate)
    (listed,) = (played.ask("rev-users.list")[1]["rev_users"],)
    got = [
        played.ask("rev-users.get", id=one)[1]["rev_user"]
        for one in (played.primary, played.duplicate)
    ]
    assert listed == got and [one["is_verified"] for one in got if "is_verified" in one] == list(
        is_verified
    )
    made = played.ask("rev-users.create", email="new@example.com")[1]["rev_user"]
    assert made.get("is_verified") is (True if form == "shown" else None)
    assert "is_verified" not in played.organisation.contacts[played.primary]


def test_answers_may_show_it_contact_by_contact() -> None:
    played = Played(verified_shown="mixed")
    played.organisation.add_contact("3", "three@example.com", verified=False)
    shown = [
        one.get("is_verified", "hidden") for one in played.ask("rev-users.list")[1]["rev_users"]
    ]
    assert shown == [True, "hidden", None]


def test_the_list_of_the_unverified(played: Played) -> None:
    widget = played.organisation.new_contact("person1@example.com", "user_w", verified=False)
    both = {True: [played.primary, played.duplicate], False: [widget]}
    for value, ids in both.items():
        assert played.pages("rev-users.list", "rev_users", is_verified=value, limit=1) == [
            [one] for one in ids
        ]
    assert played.ask("rev-users.list", is_verified="no")[1]["type"] == "unexpected_json_type"
    for status in ("400", "403"):
        played.world.verified_filter = status
        assert played.ask("rev-users.list", is_verified=False)[0] == int(status)
        assert played.ask("rev-users.list")[0] == 200


@pytest.mark.parametrize("manner", World.CHOICES["unverified_merge"])
@pytest.mark.parametrize("unverified", ["neither", "duplicate", "primary", "both"])
def test_an_unverified_contact_may_not_be_merged_into_a_verified_one(
    manner: str, unverified: str
) -> None:
    played = Played(**{"verified_merge" if unverified == "primary" else "unverified_merge": manner})
    ids = {"primary": played.primary, "duplicate": played.duplicate}
    played.organisation.unverified = {
        one for name, one in ids.items() if unverified in (name, "both")
    }
    free = unverified in ("neither", "both") or manner == "works"
    assert played.merge() == (200 if free or manner == "never" else int(manner))
    played.now += 1000
    played.world.catch_up()
    assert played.organisation.merges == ([(played.primary, played.duplicate)] if free else [])


def test_what_an_unverified_contact_was_known_by_may_be_no_other_contacts() -> None:
    played = Played()
    organisation = played.organisation
    organisation.unverified = {played.duplicate}
    organisation.unverified_keep_references = True
    played.merge()
    played.now += 1
    assert played.take_reference() == 409
    organisation.unverified_keep_references = False
    assert played.take_reference() == 200
    organisation.unverified_keep_references = True
    widget = organisation.new_contact("w@example.com", "user_w", verified=False)
    organisation.change(organisation.contacts[widget], external_ref="user_w2")
    for reference in ("user_w", "user_w2"):
        assert played.ask("rev-users.create", external_ref=reference)[0] == 409
    played.ask("rev-users.delete", id=widget)
    assert played.ask("rev-users.create", external_ref="user_w")[0] == 201


def test_whom_the_application_makes_is_verified_or_not(played: Played) -> None:
    first = played.organisation.visit("a@example.com", "user_a")
    played.organisation.visitors_verified = False
    second = played.organisation.visit("b@example.com", "user_b")
    assert first not in played.organisation.unverified and second in played.organisation.unverified


@pytest.mark.parametrize(
    ("form", "status", "payload"),
    [
        ("200", 200, b"{}"), ("200-empty", 200, b""), ("202", 202, b"{}"), ("202-empty", 202, b""), ("204", 204, b""),
        ("200-list", 200, b"[]"),
    ],
)  # fmt: skip
def test_a_merge_is_acknowledged_in_several_forms(form: str, status: int, payload: bytes) -> None:
    played = Played(merge_answer=form)
    answer = played.answer(
        "rev-users.merge", primary_user=played.primary, secondary_user=played.duplicate
    )
    assert (answer.status, answer.payload) == (status, payload)
    played.world.settle()
    assert len(played.organisation.merges) == 1


@pytest.mark.parametrize("manner", World.ODD)
def test_a_poll_may_tell_nothing_for_good_while_lists_tell_the_truth(manner: str) -> None:
    played = Played(gone=manner)
    contact = played.ask("rev-users.get", id=played.duplicate)[1]["rev_user"]
    played.merge()
    played.world.settle()
    for _ in range(2):
        answer = played.answer("rev-users.get", id=played.duplicate)
        played.now += 1000
        if manner in ("locked", "stale"):
            expected = {**contact, "state": "locked" if manner == "locked" else "active"}
            assert (answer.status, json.loads(answer.payload)["rev_user"]) == (200, expected)
        elif manner in ("hang", "drip"):
            assert answer.manner == manner and answer.seconds > 0
        else:
            assert answer.status == {"shape": 200, "empty": 200}.get(
                manner
            ) or answer.status == int(manner[:3])
            assert b"not_found" not in answer.payload
    assert played.ask("rev-users.get", id=played.primary)[0] == 200
    assert played.listed() == [played.primary] and played.take_reference() == 200


def test_each_merged_contact_may_answer_in_a_way_of_its_own(played: Played) -> None:
    other = played.organisation.new_contact("person1@example.com", "user_o")
    played.world.gone_of[played.duplicate] = "403"
    for one in (played.duplicate, other):
        played.organisation.merge(played.primary, one)
    assert [played.answer("rev-users.get", id=one).status for one in (played.duplicate, other)] == [
        403,
        404,
    ]
    assert set(ODD_POLLS) < set(World.ODD)


def test_a_redirect_may_lead_nowhere() -> None:
    played = Played(gone="301", location="http://[nowhere")
    played.organisation.merge(played.primary, played.duplicate)
    assert (
        played.answer("rev-users.get", id=played.duplicate).headers["Location"] == "http://[nowhere"
    )
    played.world.faults = [Fault("redirect", detail="\\\\")]
    answer = played.answer("rev-users.get", id=played.primary)
    assert (answer.status, answer.headers["Location"]) == (301, "\\\\")


def test_pages_without_items_are_no_end(played: Played) -> None:
    work = played.organisation.add_work(comments=5)
    entries = [one["id"] for one in played.organisation.timelines[work]]
    ask = ("timeline-entries.list", "timeline_entries")
    assert played.pages(*ask, object=work, limit=2) == [entries[:2], entries[2:4], entries[4:]]
    played.world.empty_pages = 2
    assert played.pages(*ask, object=work, limit=3) == [[], [], entries[:3], [], [], entries[3:]]
    assert [] not in played.pages("works.list", "works", limit=1)
    played.world.thin_lists, played.world.empty_pages = (
        ("works.*",),
        lambda endpoint, position: position % 2,
    )
    works = list(played.organisation.works)
    assert played.pages(*ask, object=work) == [entries]
    pages = played.pages("works.list", "works", limit=1)
    assert [one for page in pages for one in page] == works and pages.count([]) == len(works) // 2


def test_pages_may_be_short_and_the_last_one_empty(played: Played) -> None:
    everybody = [played.primary, played.duplicate]
    played.world.largest_page = 1
    assert played.pages("rev-users.list", "rev_users", limit=100) == [[one] for one in everybody]
    played.world.trailing_page = True
    assert played.pages("rev-users.list", "rev_users") == [[everybody[0]], [everybody[1]], []]
    played.world.largest_page = None
    assert played.pages("rev-users.list", "rev_users") == [everybody, []]
    assert played.pages("rev-users.list", "rev_users", email=["nobody@example.com"]) == [[]]


def test_a_list_without_an_end_may_have_one_cursor(played: Played) -> None:
    played.world.faults = [Fault("endless", detail="repeated")]
    first = played.ask("rev-users.list")[1]
    assert (
        first == played.ask("rev-users.list", cursor=first["next_cursor"])[1] and first["rev_users"]
    )


def test_a_rolling_window_announces_a_reset_that_is_always_a_window_away() -> None:
    played = Played(quota=(3, 4.0), quota_rolls=True)
    for second in (0, 1, 2):
        played.now = 1000.0 + second
        headers = played.answer("dev-users.self").headers
        assert headers["X-Ratelimit-Reset"] == f"{played.now + 4:.3f}"
        assert headers["X-Ratelimit-Remaining"] == str(2 - second)
    refused = played.answer("dev-users.self")
    assert refused.status == 429 and refused.headers["Retry-After"] == "2.000"
    played.now = 1004.0
    assert (
        played.answer("dev-users.self").status == 200
        and played.answer("dev-users.self").status == 429
    )
    quota = played.world.quota
    assert quota is not None
    played.now, quota.others = 1050.0, 1
    quota.spend(1)
    assert played.answer("dev-users.self").headers["X-Ratelimit-Remaining"] == "0"
    assert played.ask("dev-users.self")[0] == 429
    played.world.quota_whole_seconds, played.now = True, 1050.5
    headers = played.answer("dev-users.self").headers
    assert headers == {
        "X-Ratelimit-Limit": "3", "X-Ratelimit-Remaining": "0", "X-Ratelimit-Reset": "1055", "Retry-After": "4",
    }  # fmt: skip
    played.now = 1054.0
    assert played.ask("dev-users.self")[0] == 200


@pytest.mark.parametrize("rolls", [False, True])
def test_a_quota_may_be_as_large_as_any_that_was_seen(rolls: bool) -> None:
    played = Played(quota=(8000, 60.0), quota_rolls=rolls)
    statuses = [played.answer("dev-users.self").status for _ in range(8001)]
    assert statuses == [200] * 8000 + [429]
    played.now += 60
    assert played.answer("dev-users.self").status == 200


@pytest.mark.parametrize("source", ["quota", "fault"])
@pytest.mark.parametrize("where", World.CHOICES["retry_after"])
def test_a_429_says_how_long_to_wait_here_there_or_nowhere(where: str, source: str) -> None:
    played = Played(quota=(1, 60.0), retry_after=where)
    if source == "fault":
        played.world.quota, played.world.faults = None, [Fault("429", skip=1, detail=60)]
    played.answer("dev-users.self")
    answer = played.answer("dev-users.self")
    assert answer.status == 429
    assert ("Retry-After" in answer.headers) == (where in ("both", "header"))
    assert (json.loads(answer.payload).get("retry_after") == 60) == (where in ("both", "body"))
    for kind in ("429-body", "429-header", "429-bare"):
        other = Played(faults=[Fault(kind)]).answer("dev-users.self")
        said = "Retry-After" in other.headers, "retry_after" in json.loads(other.payload)
        assert said == (kind == "429-header", kind == "429-body")


def test_headers_of_the_quota_may_be_missing_or_odd() -> None:
    played = Played(quota=(5, 60.0), quota_headers=False)
    assert played.answer("dev-users.self").headers == {}
    played.world.quota_headers = True
    for odd in ("-1", "1" + "0" * 400, "soon"):
        played.world.faults = [Fault("odd-quota", detail=odd)]
        assert list(played.answer("dev-users.self").headers.values()) == [odd] * 3
    played.world.faults = [Fault("odd-quota", detail={"X-Ratelimit-Remaining": "-1"})]
    played.now += 60
    headers = played.answer("dev-users.self").headers
    assert headers["X-Ratelimit-Remaining"] == "-1" and headers["X-Ratelimit-Limit"] == "5"


def test_tokens_end_in_several_ways() -> None:
    for kind in World.CHOICES["bad_token"]:
        played = Played(bad_token=kind)
        answer = played.world.respond("dev-users.self", {}, "another")
        assert (answer.status, json.loads(answer.payload)["type"]) == (401, kind)
    for fault, kind in (
        ("expired", "token_expired"),
        ("revoked", "token_revoked"),
        ("deactivated", "dev_org_deactivated"),
    ):
        status, content = Played(faults=[Fault("401-" + fault)]).ask("dev-users.self")
        assert (status, content["type"]) == (401, kind)


def test_a_request_may_be_too_large(played: Played) -> None:
    played.world.max_bytes = 100
    status, content = played.ask("rev-users.list", email=["person1@example.com"] * 10)
    assert (status, content["type"], content["max_bytes"]) == (413, "request_entity_too_large", 100)
    assert played.ask("rev-users.list", email=["person1@example.com"])[0] == 200
    assert Played(faults=[Fault("413", detail=7)]).ask("dev-users.self")[1]["max_bytes"] == 7


@pytest.mark.parametrize(("kind", "status"), PAGES.items())
def test_gateways_answer_in_html(kind: str, status: int) -> None:
    answer = Played(faults=[Fault(kind)]).answer("dev-users.self")
    assert (answer.status, answer.payload[:6]) == (
        status,
        b"<html>",
    ) and answer.content_type.startswith("text/html")


def test_single_objects_may_be_out_of_reach(played: Played) -> None:
    work = next(iter(played.organisation.works))
    talk = played.organisation.add_conversation([played.primary])
    refused: List[Tuple[str, Dict[str, Any], str]] = [
        ("rev-users.get", {"id": played.duplicate}, played.duplicate),
        ("works.list", {"owned_by": [played.primary, played.duplicate]}, played.duplicate),
        ("conversations.list", {"members": [played.duplicate, played.primary]}, played.duplicate),
        (
            "rev-users.merge",
            {"primary_user": played.primary, "secondary_user": played.duplicate},
            played.duplicate,
        ),
        ("works.get", {"id": work}, work),
        ("timeline-entries.list", {"object": work}, work),
        ("conversations.update", {"id": talk, "title": "Another"}, talk),
    ]
    for endpoint, body, object_id in refused:
        played.world.restricted = {object_id}
        status, content = played.ask(endpoint, **body)
        assert (status, content["type"], content["object_ids"]) == (403, "forbidden", [object_id])
        played.world.names_object_ids = False
        assert "object_ids" not in played.ask(endpoint, **body)[1]
        played.world.names_object_ids, played.world.restricted = True, ()
        assert played.ask(endpoint, **body)[0] == 200
    assert Played(faults=[Fault("403", detail=[work])]).ask("dev-users.self")[1]["object_ids"] == [
        work
    ]


def test_lists_show_leave_out_or_fail_at_what_is_out_of_reach(played: Played) -> None:
    works = list(played.organisation.works)
    played.world.restricted = {works[0]}
    assert [one["id"] for one in played.ask("works.list")[1]["works"]] == works
    played.world.restricted_in_lists = "left out"
    assert [one["id"] for one in played.ask("works.list")[1]["works"]] == works[1:]
    played.world.restricted_in_lists = "403"
    status, content = played.ask("works.list")
    assert (status, content["object_ids"]) == (403, [works[0]])
    played.world.restricted = {played.duplicate}
    assert played.ask("rev-users.list", email=["person1@example.com"])[0] == 403
    assert played.ask("rev-users.list", external_ref=["REVU-P1"])[0] == 200


def test_a_timeline_or_a_change_alone_may_be_out_of_reach(played: Played) -> None:
    work = next(iter(played.organisation.works))
    played.world.restricted_timelines, played.world.restricted_writes = {work}, {played.primary}
    assert (
        played.ask("works.get", id=work)[0] == 200
        and played.ask("timeline-entries.list", object=work)[0] == 403
    )
    assert played.ask("rev-users.get", id=played.primary)[0] == 200
    assert played.take_reference() == 403 and played.merge() == 403


def test_half_an_emoji_comes_as_it_was_cut(played: Played) -> None:
    organisation = played.organisation
    organisation.change(organisation.contacts[played.primary], display_name="Ada " + HALF_EMOJI)
    answer = played.answer("rev-users.get", id=played.primary)
    assert b'"Ada \\ud83d"' in answer.payload
    assert json.loads(answer.payload)["rev_user"]["display_name"] == "Ada " + HALF_EMOJI
    work = organisation.add_work(title="T" + HALF_EMOJI, comments=1)
    organisation.add_comment(work, "C" + HALF_EMOJI)
    assert played.ask("works.get", id=work)[1]["work"]["title"] == "T" + HALF_EMOJI
    assert (
        played.ask("timeline-entries.list", object=work)[1]["timeline_entries"][1]["body"]
        == "C" + HALF_EMOJI
    )
    odd = organisation.add_contact("X", f"x{HALF_EMOJI}@example.com", "user_x" + HALF_EMOJI)
    found = played.pages(
        "rev-users.list", "rev_users", external_ref=["user_x" + HALF_EMOJI], limit=1
    )
    assert found == [[odd]]
    assert played.ask("rev-users.get", id=HALF_EMOJI)[0] == 400
    played.world.faults = [Fault("half-emoji", "rev-users.get")]
    assert played.ask("rev-users.get", id=played.duplicate)[1]["rev_user"]["display_name"].endswith(
        HALF_EMOJI
    )
    assert played.ask("rev-users.get", id="none")[1]["message"].endswith(HALF_EMOJI)
    played.world.faults = [Fault("half-emoji", detail=("email", "external_ref", "state"))]
    (first, *_) = played.ask("rev-users.list")[1]["rev_users"]
    assert all(first[name].endswith(HALF_EMOJI) for name in ("email", "external_ref", "state"))
    played.world.faults = [Fault("409", detail="held " + HALF_EMOJI)]
    assert played.ask("rev-users.get", id=played.primary)[1]["message"] == "held " + HALF_EMOJI


def test_contacts_have_more_fields_which_answers_may_hide(played: Played) -> None:
    more = {
        "external_refs": ["user_m", "crm_m"], "tags": [{"tag": {"id": "TAG-1", "name": "vip"}}],
        "custom_fields": {"tnt__plan": "gold"}, "phone_numbers": ["+49301"], "description": "Text", "full_name": "M. M.",
    }  # fmt: skip
    contact = played.organisation.add_contact("M", "m@example.com", "user_m", **more)
    got = played.ask("rev-users.get", id=contact)[1]["rev_user"]
    assert {name: got[name] for name in more} == more
    for reference in more["external_refs"]:
        assert played.pages("rev-users.list", "rev_users", external_ref=[reference]) == [[contact]]
        assert played.ask("rev-users.create", external_ref=reference)[0] == 409
    assert played.pages("rev-users.list", "rev_users", phone_numbers=["+49301"]) == [[contact]]
    answer = played.ask(
        "rev-users.update", id=contact, external_ref="user_n", phone_numbers=["+49302", "+49303"]
    )[1]
    assert answer["rev_user"]["external_refs"] == ["user_n", "crm_m"]
    assert answer["rev_user"]["phone_numbers"] == ["+49302", "+49303"]
    played.world.hidden_fields = ("external_refs", "tags", "custom_fields")
    got = played.ask("rev-users.get", id=contact)[1]["rev_user"]
    assert "phone_numbers" in got and not {"external_refs", "tags", "custom_fields"} & set(got)


@pytest.mark.parametrize("status", [400, 403, 409])
def test_single_fields_may_be_refused(status: int) -> None:
    played = Played(
        refused_fields=("rev-users.update.phone_numbers", "description"), refused_status=status
    )
    for name, value in (("phone_numbers", ["+49301"]), ("description", "Text")):
        got, content = played.ask(
            "rev-users.update", id=played.primary, external_ref="user_n", **{name: value}
        )
        assert got == status and content.get("field_name") == (name if status == 400 else None)
    assert played.organisation.contacts[played.primary]["external_ref"] == "REVU-P1"
    assert played.ask("rev-users.update", id=played.primary, display_name="Ada")[0] == 200
    assert played.ask("rev-users.create", phone_numbers=["+49301"])[0] == 201
    assert played.ask("rev-users.create", description="Text")[0] == status


def test_merges_may_join_what_has_several_values(played: Played) -> None:
    contacts = played.organisation.contacts
    other = played.organisation.new_contact(
        "person1@example.com", "user_o", phone_numbers=["+49302", "+49303"]
    )
    contacts[played.primary]["phone_numbers"] = ["+49301", "+49302"]
    contacts[played.duplicate]["phone_numbers"] = ["+49304"]
    played.organisation.merge(played.primary, played.duplicate)
    assert contacts[played.primary]["phone_numbers"] == ["+49301", "+49302"]
    played.organisation.merge_joins = ("phone_numbers", "tags")
    played.organisation.merge(played.primary, other)
    assert contacts[played.primary]["phone_numbers"] == ["+49301", "+49302", "+49303"]
    assert "tags" not in contacts[played.primary]


def test_a_rev_org_may_be_an_account_and_may_be_missing(played: Played) -> None:
    organisation = played.organisation
    contact = organisation.add_contact("A", "a@example.com", "user_a", rev_org="account/NORTH")
    account = organisation.contacts[contact]["rev_org"]["id"]
    assert account.endswith(":account/NORTH")
    assert played.pages("rev-users.list", "rev_users", associations=[account]) == [[contact]]
    status, content = played.ask("rev-users.create", external_ref="user_b", rev_org=account)
    assert (status, content["type"], content["field_name"]) == (
        400,
        "unexpected_id_type",
        "rev_org",
    )
    played.world.account_rev_orgs = True
    status, content = played.ask("rev-users.create", external_ref="user_b", rev_org=account)
    assert status == 201 and content["rev_user"]["rev_org"]["id"] == account
    assert played.ask("rev-users.create", external_ref="user_b", rev_org=account)[0] == 409
    alone = organisation.add_contact("L", "l@example.com", "user_l", rev_org=None)
    assert "rev_org" not in played.ask("rev-users.get", id=alone)[1]["rev_user"]
    assert played.ask("rev-users.update", id=alone, external_ref="user_a")[0] == 200
    assert organisation.visit("l@example.com", "user_a", rev_org=None) == alone


def test_references_may_be_unique_in_the_whole_organisation(played: Played) -> None:
    organisation = played.organisation
    elsewhere = organisation.add_contact("E", "e@example.com", "user_e", rev_org="OTHER")
    assert played.ask("rev-users.update", id=played.primary, external_ref="user_e")[0] == 200
    played.ask("rev-users.update", id=played.primary, external_ref="REVU-P1")
    organisation.unique_references = "organisation"
    assert played.ask("rev-users.update", id=played.primary, external_ref="user_e")[0] == 409
    assert played.ask("rev-users.update", id=elsewhere, external_ref="user_e")[0] == 200
    assert organisation.visit("e@example.com", "user_e") == elsewhere


@pytest.mark.parametrize("gone", World.GONE)
def test_lists_may_show_who_was_deleted_or_merged(gone: str) -> None:
    played = Played(deleted_listed=True, gone=gone)
    other = played.organisation.add_contact("O", "person1@example.com", "user_o")
    played.merge()
    played.world.settle()
    played.ask("rev-users.delete", id=other)
    found = played.ask("rev-users.list", email=["person1@example.com"])[1]["rev_users"]
    assert [one["id"] for one in found] == [played.primary, played.duplicate, other]
    named = gone in ("shadow", "unassigned")
    assert [one["state"] for one in found] == ["active", gone if named else "deleted", "deleted"]
    assert ("primary_identity" in found[1]) == named
    assert played.ask("rev-users.list", email=["nobody@example.com"])[1] == {"rev_users": []}
    assert played.ask("rev-users.get", id=other)[0] == 404
    played.world.deleted_contacts = "state"
    assert played.ask("rev-users.get", id=other)[1]["rev_user"]["state"] == "deleted"
    played.world.deleted_listed = False
    assert played.listed() == [played.primary]


def test_the_filter_by_email_may_ignore_case(played: Played) -> None:
    body = {"email": ["Person1@Example.com"]}
    assert played.ask("rev-users.list", **body)[1]["rev_users"] == []
    played.world.email_ignores_case = True
    assert played.pages("rev-users.list", "rev_users", **body, limit=1) == [
        [played.primary],
        [played.duplicate],
    ]


@pytest.mark.parametrize("state", ["locked", "deactivated"])
def test_people_lock_contacts_and_deactivate_them(state: str) -> None:
    played = Played()
    contact = played.organisation.add_contact("S", "s@example.com", "user_s", state=state)
    assert played.ask("rev-users.get", id=contact)[1]["rev_user"]["state"] == state
    assert (
        played.ask("rev-users.list", email=["s@example.com"])[1]["rev_users"][0]["state"] == state
    )
    assert played.organisation.alive(contact)


def test_works_of_every_kind_where_the_longer_list_is_taken(played: Played) -> None:
    organisation = played.organisation
    contact = organisation.add_contact("K", "k@example.com", "user_k")
    works = [organisation.add_work([contact], kind=kind, comments=1) for kind in ALL_WORK_KINDS]
    usual, everything = ["issue", "ticket"], list(ALL_WORK_KINDS)
    ask = ("works.list", "works")
    status, content = played.ask("works.list", type=everything)
    assert (status, content["type"]) == (400, "invalid_enum_value")
    assert played.pages(*ask, owned_by=[contact]) == [works[:2]]
    assert played.ask("works.count", owned_by=[contact])[1] == {"count": 2, "has_more": False}
    played.world.long_work_types = True
    assert played.pages(*ask, owned_by=[contact], type=everything) == [works]
    assert played.pages(*ask, owned_by=[contact], type=usual) == [works[:2]]
    assert played.pages(*ask, owned_by=[contact]) == [works]
    assert played.ask("works.count", owned_by=[contact])[1] == {"count": 5, "has_more": False}
    assert played.ask("works.get", id=works[2])[1]["work"]["type"] == "task"
    assert (
        played.ask("works.update", id=works[2], type="task", owned_by={"set": [played.primary]})[0]
        == 200
    )
    organisation.merge(played.primary, contact)
    assert played.pages(*ask, owned_by=[played.primary], type=everything)[0][-5:] == works


def test_a_token_may_lack_a_kind(played: Played) -> None:
    organisation = played.organisation
    contact = organisation.add_contact("K", "k@example.com", "user_k")
    ticket, issue = (
        organisation.add_work([contact], kind=kind, comments=1) for kind in ("ticket", "issue")
    )
    talk = organisation.add_conversation([contact], comments=1)
    body: Dict[str, Any] = {"owned_by": [contact], "type": ["issue", "ticket"]}
    played.world.hidden_kinds = ("issue",)
    assert (
        played.ask("works.list", **body)[0] == 403 and played.ask("works.count", **body)[0] == 403
    )
    assert played.pages("works.list", "works", owned_by=[contact]) == [[ticket]]
    assert played.ask("works.list", owned_by=[contact], type=["ticket"])[0] == 200
    assert (
        played.ask("works.get", id=issue)[0] == 403
        and played.ask("timeline-entries.list", object=issue)[0] == 403
    )
    played.world.hidden_kinds_answer = "left out"
    assert played.pages("works.list", "works", **body) == [[ticket]]
    assert played.ask("conversations.list")[0] == 200
    played.world.hidden_kinds = ("conversation",)
    assert (
        played.ask("conversations.list")[0] == 403
        and played.ask("timeline-entries.list", object=talk)[0] == 403
    )
    assert played.ask("timeline-entries.list", object=ticket)[0] == 200


def test_the_other_switches_over_http() -> None:
    """What only a socket shows: answers without a body, half an emoji, and queries of a GET."""
    organisation = Organisation()
    primary, duplicate = pair(organisation, 1)
    organisation.unverified.add(duplicate)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, body: Any = None) -> Tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {sandbox.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with opener.open(
            urllib.request.Request(f"{sandbox.url}/{path}", data, headers), timeout=30
        ) as answer:
            return answer.status, answer.read()

    with Sandbox(organisation, verified_shown="shown", merge_delay=60) as sandbox:
        for sandbox.merge_answer, status in (("204", 204), ("200-empty", 200), ("202", 202)):
            assert (
                ask("rev-users.merge", {"primary_user": primary, "secondary_user": duplicate})[0]
                == status
            )
            (one,) = json.loads(ask("rev-users.list?is_verified=false")[1])["rev_users"]
            assert one["id"] == duplicate and one["is_verified"] is False
        organisation.change(organisation.contacts[primary], display_name=HALF_EMOJI)
        assert b'"\\ud83d"' in ask(f"rev-users.get?id={primary}")[1]
        sandbox.faults = [Fault("odd-quota", detail="\N{SNOWMAN}")]
        assert ask("dev-users.self")[0] == 200


def test_the_docstring_names_every_switch() -> None:
    assert fake_world.__doc__ is not None
    assert [name for name in sorted(SWITCHES) if name not in fake_world.__doc__] == []
    assert [name for name in vars(Rules()) if name not in fake_world.__doc__] == []


@pytest.mark.parametrize(
    ("stays", "listed", "shown"),
    [
        ("", 1, None),
        ("locked", 2, ("locked", "user_1")),
        ("archived", 2, ("archived", "user_1")),
        ("no-email", 1, ("active", "user_1")),
        ("no-reference", 2, ("active", None)),
        ("own-reference", 2, ("active", "REVU-D1")),
        ("as-before", 2, ("active", "user_1")),
    ],
)
def test_a_merged_contact_may_stay(played: Played, stays: str, listed: int, shown: Any) -> None:
    played.world.stays, played.world.gone = stays, "stays" if stays else "404"
    played.merge()
    played.now += 1
    status, content = played.ask("rev-users.get", id=played.duplicate)
    assert len(played.listed()) == listed and (status == 200) == (shown is not None)
    if shown:
        found = content["rev_user"]
        assert (found["state"], found.get("external_ref")) == shown
        assert ("email" in found) == (stays != "no-email")


def test_references_may_stay_come_back_lag_or_move_by_themselves(played: Played) -> None:
    world, primary = played.world, played.primary

    def shown() -> Any:
        return played.ask("rev-users.get", id=primary)[1]["rev_user"]["external_ref"]

    played.organisation.merge_moves_reference, world.reference_lag = True, 5.0
    played.merge()
    played.now += 1
    assert shown() == "REVU-P1"
    played.now += 5
    world.unchanged_updates = 400
    assert shown() == "user_1" and played.take_reference() == 400
    world.reference_lag, world.puts_back = 0.0, 1
    assert played.ask("rev-users.update", id=primary, external_ref="x")[0] == 200
    assert shown() == "user_1"
    assert played.ask("rev-users.update", id=primary, external_ref="x")[0] == 200
    assert shown() == "x"
    world.reference_updates = "409"
    assert played.ask("rev-users.update", id=primary, external_ref="y")[0] == 409


def test_merges_go_one_at_a_time_where_another_is_refused(played: Played) -> None:
    other = pair(played.organisation, 2)
    played.world.merge_jobs, played.world.busy_status = 1, 423
    body = {"primary_user": other[0], "secondary_user": other[1]}
    played.merge()
    status, content = played.ask("rev-users.merge", **body)
    assert status == 423 and "try again later" in content["message"]
    played.now += 1
    assert played.ask("rev-users.merge", **body)[0] == 200


@pytest.mark.parametrize(
    ("paging", "times", "pages"),
    [
        ("cursor", None, ["AB", "CD", "E"]),
        ("again", 1, ["AB", "AB", "E"]),
        ("overlap", None, ["AB", "BC", "CD", "DE"]),
        ("offset", None, ["AB", "CD", "E"]),
    ],
)
def test_pages_may_come_again_or_overlap(paging: str, times: Any, pages: List[str]) -> None:
    organisation = Organisation()
    for key in "ABCDE":
        organisation.add_contact(key, "a@example.com")
    played = Played()
    played.world = World(organisation, lambda: played.now, paging=paging, paging_times=times)
    found = played.pages("rev-users.list", "rev_users", limit=2)
    assert ["".join(one[-1] for one in page) for page in found] == pages
    played.world.cursor_life = 10
    cursor = played.ask("rev-users.list", limit=2)[1]["next_cursor"]
    played.now += 11
    assert played.ask("rev-users.list", limit=2, cursor=cursor)[0] == 400


def test_contacts_vanish_and_a_firewall_refuses_a_word(played: Played) -> None:
    played.world.vanished = "*"
    assert played.ask("rev-users.get", id=played.primary)[0] == 404 and played.listed() == []
    assert played.merge() == 404
    played.world.vanished, played.world.firewall = (), ["person1@"]
    answer = played.answer("rev-users.list", email=["person1@example.com"])
    assert (answer.status, answer.content_type[:9]) == (403, "text/html")


@pytest.mark.parametrize(
    ("answer", "status", "known"),
    [
        ("400", 400, ["issue", "ticket", "task", "opportunity"]),
        ("400-bare", 400, None),
        ("403", 403, None),
    ],
)
def test_works_may_have_no_incidents(played: Played, answer: str, status: int, known: Any) -> None:
    played.world.long_work_types, played.world.unknown_kinds = True, ["incident"]
    played.world.unknown_kinds_answer = answer
    body = {"type": list(ALL_WORK_KINDS), "owned_by": [played.primary]}
    found, content = played.ask("works.list", **body)
    assert (found, content.get("allowed_values")) == (status, known)
    body["type"].remove("incident")
    assert played.ask("works.list", **body)[0] == 200


def test_another_program_takes_a_share_of_each_window(played: Played) -> None:
    played.world.set_quota(20, 60.0)
    played.world.quota_share = 0.85
    assert played.answer("dev-users.self").headers["X-Ratelimit-Remaining"] == "2"


def test_a_page_shows_contacts_and_their_tickets_and_escapes_what_they_hold(played: Played) -> None:
    played.organisation.change(played.organisation.contacts[played.primary], display_name="<b>&")
    played.organisation.merge(played.primary, played.duplicate)
    text = page(played.organisation)
    assert "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert "merged into REVU-P1" in text and "TKT-3" in text
