"""What the world does that the tool has to live with, as a table of requests and answers."""

import json
import socket
import urllib.error
import urllib.request
from typing import Any, Dict, List, Optional, Tuple

import pytest

from tests.fake.organisation import ALL_WORK_KINDS, HALF_EMOJI, LONG_AGO, Organisation
from tests.fake.trouble import PAGES, STATES_LEFT, Answer, Fault
from tests.fake.world import SWITCHES, World
from tests.sandbox import Sandbox, page
from tests.support import pair

EMAIL = "person1@example.com"
ME = "dev-users.self"
Row = Tuple[Dict[str, Any], str, Dict[str, Any], str]


class Played:
    """A world of one pair, whose clock a test sets by hand.

    Its objects are P, D and W: primary, duplicate, and a ticket of the primary's.
    """

    def __init__(self, **switches: Any) -> None:
        self.now = 1000.0
        self.organisation = Organisation()
        primary, duplicate = pair(self.organisation, 1)
        self.ids = {"P": primary, "D": duplicate, "W": next(iter(self.organisation.works))}
        self.primary, self.duplicate = primary, duplicate
        switches = self._with_ids(switches)
        for name in {*switches} & {*dir(self.organisation)}:
            value = switches.pop(name)
            setattr(self.organisation, name, set(value) if isinstance(value, list) else value)
        self.world = World(self.organisation, lambda: self.now, **switches)

    def _with_ids(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._with_ids(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._with_ids(one) for one in value]
        return self.ids.get(value, value) if isinstance(value, str) else value

    def answer(self, endpoint: str = ME, **body: Any) -> Answer:
        return self.world.respond(endpoint, self._with_ids(body), self.world.token)

    def content(self, endpoint: str, **body: Any) -> Any:
        return json.loads(self.answer(endpoint, **body).payload)

    def told(self, endpoint: str, **body: Any) -> str:
        """An answer in a few words: its status, and what it refuses, shows or lists."""
        answer = self.answer(endpoint, **body)
        if answer.manner != "send":
            return answer.manner
        if answer.content_type != "application/json" or not answer.payload:
            return f"{answer.status} {'HTML' if answer.payload else 'nothing'}"
        content = json.loads(answer.payload)
        if isinstance(content, list):
            return f"{answer.status} []"
        words: List[Any] = [answer.status]
        if answer.status >= 300:
            words += [content.get("type"), *map(self.name, content.get("object_ids", ()))]
        for name, value in content.items():
            if name == "rev_user" and value:
                words += [self.name(value["id"]), value["state"], value.get("external_ref")]
                words += [value["is_verified"]] if "is_verified" in value else []
            elif isinstance(value, list) and name != "object_ids" and answer.status == 200:
                words += [self.name(one["id"]) for one in value if "id" in one]
        return " ".join(map(str, words))

    def name(self, object_id: str) -> str:
        names = {value: name for name, value in self.ids.items()}
        return names.get(object_id, str(object_id).rpartition("/")[2])

    def pages(self, **body: Any) -> List[str]:
        """The contacts of each page of a list, up to its end."""
        found = []
        while True:
            content = self.content(LIST, **body)
            found.append("".join(self.name(one["id"]) for one in content["rev_users"]))
            if "next_cursor" not in content:
                return found
            body["cursor"] = content["next_cursor"]

    def merge(self) -> str:
        return self.told("rev-users.merge", primary_user="P", secondary_user="D")

    def take_reference(self) -> str:
        return self.told("rev-users.update", id="P", external_ref="user_1")

    def listed(self) -> str:
        return self.told("rev-users.list", email=[EMAIL])


@pytest.fixture
def played() -> Played:
    return Played()


def label(row: Any) -> str:
    return str(row)[:70]


# -- what single requests are answered -------------------------------------------------------------

GET, LIST, MERGE = "rev-users.get", "rev-users.list", "rev-users.merge"
UPDATE, CREATE = "rev-users.update", "rev-users.create"
WORKS, TIMELINE = "works.list", "timeline-entries.list"
P, D, MAIL = {"id": "P"}, {"id": "D"}, {"email": [EMAIL]}
PAIR = {"primary_user": "P", "secondary_user": "D"}
TAKE = {"id": "P", "external_ref": "user_1"}
MINE, KINDS = {"owned_by": ["P"]}, {"type": list(ALL_WORK_KINDS), "owned_by": ["P"]}
UNSEEN: Dict[str, Any] = {"hidden_kinds": ("ticket",), "hidden_kinds_answer": "left out"}
NO_TASKS: Dict[str, Any] = {"long_work_types": True, "unknown_kinds": ("task",)}
NEW = {"email": EMAIL, "external_ref": "user_new", "phone_numbers": ["+4930123456"]}
BEFORE: List[Row] = [
    ({}, LIST, MAIL, "200 P D"),
    ({}, LIST, {"email": [EMAIL.title()]}, "200"),
    ({"email_ignores_case": True}, LIST, {"email": [EMAIL.title()]}, "200 P D"),
    ({"vanished": "*"}, LIST, MAIL, "200"),
    ({"vanished": ["D"]}, LIST, MAIL, "200 P"),
    ({"vanished": ["D"]}, GET, D, "404 not_found"),
    ({"firewall": ["person1@"]}, LIST, MAIL, "403 HTML"),
    ({"firewall": ["person1@"], "firewall_status": 406}, LIST, MAIL, "406 HTML"),
    ({"forbidden": ("*.update",)}, UPDATE, TAKE, "403 forbidden"),
    ({"max_ids": 1}, WORKS, {"owned_by": ["P", "D"]}, "400 value_not_permitted"),
    ({}, "nothing.get", {}, "404 None"),
    ({}, GET, {"id": HALF_EMOJI}, "400 invalid_id"),
    # References and fields
    ({}, UPDATE, TAKE, "409 conflict"),
    ({}, UPDATE, {"id": "P", "external_ref": "REVU-P1"}, "200 P active REVU-P1"),
    ({"unchanged_updates": 400}, UPDATE, {"id": "P", "external_ref": "REVU-P1"}, "400 bad_request"),
    ({"reference_updates": "403"}, UPDATE, {"id": "P", "external_ref": "x"}, "403 forbidden"),
    ({"reference_updates": "403"}, UPDATE, {"id": "P", "description": "x"}, "200 P active REVU-P1"),
    ({"hidden_fields": ("external_ref",)}, GET, D, "200 D active None"),
    ({}, CREATE, NEW, "201 N1 active user_new"),
    ({}, CREATE, {"external_ref": "user_1"}, "409 conflict"),
    ({"unique_emails": True}, CREATE, NEW, "409 conflict"),
    ({"refused_fields": ("email",)}, CREATE, NEW, "400 value_not_permitted"),
    ({"refused_fields": ("email",), "refused_status": 403}, CREATE, NEW, "403 forbidden"),
    # Verified and unverified contacts
    ({"unverified": ["D"], "verified_shown": "shown"}, GET, D, "200 D active user_1 False"),
    ({"unverified": ["D"], "verified_shown": "shown"}, GET, P, "200 P active REVU-P1 True"),
    ({"verified_shown": "null"}, GET, D, "200 D active user_1 None"),
    ({"verified_shown": "mixed"}, GET, P, "200 P active REVU-P1 True"),
    ({"verified_shown": "mixed"}, GET, D, "200 D active user_1"),
    ({"unverified": ["D"]}, LIST, {"is_verified": False}, "200 D"),
    ({"unverified": ["D"]}, LIST, {"is_verified": True}, "200 P"),
    ({"verified_filter": "400"}, LIST, {"is_verified": False}, "400 invalid_field"),
    ({"verified_filter": "403"}, LIST, {"is_verified": False}, "403 forbidden"),
    # What the token may not see
    ({"restricted": ["D"]}, GET, D, "403 forbidden D"),
    ({"restricted": ["D"], "names_object_ids": False}, GET, D, "403 forbidden"),
    ({"restricted": ["D"]}, MERGE, PAIR, "403 forbidden D"),
    ({"restricted": ["W"]}, WORKS, MINE, "200 W"),
    ({"restricted": ["W"], "restricted_in_lists": "left out"}, WORKS, MINE, "200"),
    ({"restricted": ["W"], "restricted_in_lists": "403"}, WORKS, MINE, "403 forbidden W"),
    ({"restricted_timelines": ["W"]}, TIMELINE, {"object": "W"}, "403 forbidden W"),
    ({"restricted_timelines": ["W"]}, WORKS, MINE, "200 W"),
    ({"restricted_writes": ["P"]}, MERGE, PAIR, "403 forbidden P"),
    ({"restricted_writes": ["P"]}, GET, P, "200 P active REVU-P1"),
    ({"hidden_kinds": ("ticket",)}, WORKS, {"type": ["ticket"]}, "403 forbidden"),
    ({"hidden_kinds": ("ticket",)}, WORKS, MINE, "200"),
    (UNSEEN, WORKS, {"type": ["ticket"]}, "200"),
    ({"hidden_kinds": ("conversation",)}, "conversations.list", {}, "403 forbidden"),
    ({}, WORKS, KINDS, "400 invalid_enum_value"),
    ({"long_work_types": True}, WORKS, KINDS, "200 W"),
    ({**NO_TASKS, "unknown_kinds_answer": "400-bare"}, WORKS, KINDS, "400 bad_request"),
    ({**NO_TASKS, "unknown_kinds_answer": "403"}, WORKS, KINDS, "403 forbidden"),
    *(({"merge_answer": form}, MERGE, PAIR, form) for form in ("200", "202")),
    ({"merge_answer": "200-empty"}, MERGE, PAIR, "200 nothing"),
    ({"merge_answer": "202-empty"}, MERGE, PAIR, "202 nothing"),
    ({"merge_answer": "204"}, MERGE, PAIR, "204 nothing"),
    ({"merge_answer": "200-list"}, MERGE, PAIR, "200 []"),
    ({"unverified": ["D"], "unverified_merge": "403"}, MERGE, PAIR, "403 forbidden"),
    ({"unverified": ["P", "D"], "unverified_merge": "403"}, MERGE, PAIR, "200"),
    ({"unverified": ["P"], "unverified_merge": "403"}, MERGE, PAIR, "200"),
    ({"unverified": ["P"], "verified_merge": "409"}, MERGE, PAIR, "409 conflict"),
    *(({"faults": [Fault(kind)]}, GET, P, f"{kind[-3:]} HTML") for kind in PAGES),
    ({"faults": [Fault("401-revoked")]}, GET, P, "401 token_revoked"),
    ({"faults": [Fault("route-404")]}, GET, P, "404 None"),
    ({"faults": [Fault("redirect")]}, GET, P, "301 moved_permanently"),
    ({"faults": [Fault("hang-after")]}, GET, P, "hang"),
    ({"faults": [Fault("404", LIST)]}, GET, P, "200 P active REVU-P1"),
    ({"faults": [Fault("404", skip=1)]}, GET, P, "200 P active REVU-P1"),
]  # fmt: skip
GONE: List[Tuple[str, str]] = [  # what rev-users.get says of a merged contact
    ("404", "404 not_found"), ("301", "301 moved_permanently"), ("state", "200 D deleted user_1"),
    ("primary", "200 P active REVU-P1"), ("shadow", "200 D shadow user_1"),
    ("unassigned", "200 D unassigned user_1"), ("locked", "200 D locked user_1"),
    ("stale", "200 D active user_1"), ("404-route", "404 None"), ("404-other", "404 object_hidden"),
    ("400", "400 bad_request"), ("403", "403 forbidden"), ("410", "410 gone"), ("502", "502 HTML"),
    ("500", "500 internal_error"), ("503", "503 service_unavailable"), ("empty", "200 nothing"),
    ("shape", "200 7 ['deleted'] None"), ("hang", "hang"), ("drip", "drip"),
]  # fmt: skip
AFTER: List[Row] = [
    ({}, LIST, MAIL, "200 P"),
    ({}, MERGE, PAIR, "404 not_found"),
    ({}, UPDATE, TAKE, "200 P active user_1"),
    ({"ref_release": 10.0}, UPDATE, TAKE, "409 conflict"),
    ({"stuck_references": ["user_1"]}, UPDATE, TAKE, "409 conflict"),
    ({"unverified": ["D"], "unverified_keep_references": True}, UPDATE, TAKE, "409 conflict"),
    ({"merge_moves_reference": True}, GET, P, "200 P active user_1"),
    ({"merge_moves_reference": True, "reference_lag": 5.0}, GET, P, "200 P active REVU-P1"),
    ({"list_lag": 12.0}, LIST, MAIL, "200 P D"),
    ({"list_lag": 12.0}, GET, D, "404 not_found"),
    ({"deleted_listed": True}, LIST, MAIL, "200 P D"),
    *(({"gone": gone}, GET, D, told) for gone, told in GONE),
    *(({"gone": gone}, LIST, MAIL, "200 P") for gone, _ in GONE),
    ({"stays": "locked"}, LIST, MAIL, "200 P D"),
    ({"stays": "no-email"}, LIST, MAIL, "200 P"),
    ({"stays": "bare", "gone": "stays"}, GET, D, "200 D active None"),
    ({"stays": "own-reference", "gone": "stays"}, GET, D, "200 D active REVU-D1"),
    ({"stays": "archived", "gone": "stays"}, GET, D, "200 D archived user_1"),
]  # fmt: skip


@pytest.mark.parametrize("row", BEFORE, ids=label)
def test_a_request_is_answered_as_the_switches_say(row: Row) -> None:
    switches, endpoint, body, expected = row
    assert Played(**switches).told(endpoint, **body) == expected


@pytest.mark.parametrize("row", AFTER, ids=label)
def test_what_is_so_after_a_merge(row: Row) -> None:
    switches, endpoint, body, expected = row
    played = Played(**switches)
    assert played.merge() == "200"
    played.now += 1
    assert played.told(endpoint, **body) == expected


def test_each_way_of_a_merged_contact_is_in_a_table() -> None:
    assert {gone for gone, _ in GONE} == {*World.GONE, *World.ODD}
    assert set(STATES_LEFT) < {*World.CHOICES["stays"], "stale"}


def test_tokens_and_switches_are_known_and_take_no_value_that_means_nothing(played: Played) -> None:
    with pytest.raises(TypeError, match="merge_anser"):
        Played(merge_anser="204")
    assert played.world.respond(LIST, {}, "another token").status == 401
    for name in World.CHOICES:
        assert name in SWITCHES
        with pytest.raises(ValueError, match=name):
            setattr(played.world, name, "perhaps")


# -- merges ----------------------------------------------------------------------------------------


def test_a_merge_happens_at_its_time_and_the_reference_is_free_from_then_on(played: Played) -> None:
    assert played.merge() == "200" and played.world.next_due() == 1000.3
    played.now += 0.25
    assert played.take_reference() == "409 conflict" and played.listed() == "200 P D"
    played.now += 4.75
    assert played.take_reference() == "200 P active user_1" and played.listed() == "200 P"
    assert played.organisation.merge_times == {played.duplicate: 1000.3}
    times = played.organisation.reference_times[played.primary]
    assert times == [(LONG_AGO, "REVU-P1"), (1005.0, "user_1")]
    assert [one.status for one in played.world.requests] == [200, 409, 200, 200, 200]


@pytest.mark.parametrize(
    ("fault", "status", "delay"),
    [
        (Fault("merge-refused-late", detail=(409, 60)), "409", 60),
        (Fault("merge-slow", detail=90), "200", 90),
        (Fault("merge-doubled", detail=1), "200", 0.3),
        (Fault("doubled"), "200", 0.3),
        (Fault("500-after"), "500", 0.3),
        (Fault("merge-never"), "200", None),
        (Fault("409"), "409", None),
    ],
)
def test_what_a_merge_request_is_told_and_what_becomes_of_it(
    played: Played, fault: Fault, status: str, delay: Optional[float]
) -> None:
    played.world.faults = [fault]
    assert played.merge()[:3] == status
    assert played.world.next_due() == (None if delay is None else 1000 + delay)
    played.world.settle()
    done = [] if delay is None else [(played.primary, played.duplicate)]
    assert played.organisation.merges == done


def test_a_merge_may_be_refused_while_it_or_another_is_pending(played: Played) -> None:
    primary, duplicate = pair(played.organisation, 2)
    other = {"primary_user": primary, "secondary_user": duplicate}
    played.world.merge_jobs, played.world.busy_status = 1, 423
    assert played.merge() == "200" and played.merge() == "200"
    assert played.told(MERGE, **other) == "423 locked"
    played.world.in_progress = 409
    assert played.merge() == "409 conflict"
    played.now += 1
    assert played.told(MERGE, **other) == "200"
    assert played.organisation.merges == [(played.primary, played.duplicate)]


def test_a_merge_joins_what_has_several_values(played: Played) -> None:
    organisation, numbers = played.organisation, ["+49302", "+49301"]
    other = organisation.add_contact("O", EMAIL, "user_o", phone_numbers=numbers)
    contact = organisation.contacts[played.primary]
    organisation.change(contact, phone_numbers=["+49301"])
    organisation.merge_joins = ("phone_numbers", "tags")
    organisation.merge(played.primary, other)
    assert contact["phone_numbers"] == ["+49301", "+49302"] and "tags" not in contact


def test_the_application_makes_a_contact_where_none_holds_the_reference(played: Played) -> None:
    organisation = played.organisation
    assert organisation.visit(EMAIL, "user_1") == played.duplicate
    played.merge()
    played.world.later(1, lambda: organisation.visit(EMAIL, "user_1"))
    played.now += 2
    assert played.listed() == "200 P N1" and played.take_reference() == "409 conflict"
    new = organisation.visit(EMAIL, "user_1")
    assert organisation.reference_times[new] == [(1001.0, "user_1")]
    organisation.visitors_verified = False
    assert organisation.visit("b@example.com", "user_b") in organisation.unverified - {new}


def test_a_rev_org_may_be_an_account_or_missing_and_has_its_references(played: Played) -> None:
    organisation, body = played.organisation, {"external_ref": "user_b"}
    contact = organisation.add_contact("A", "a@example.com", "user_a", rev_org="account/NORTH")
    account = organisation.contacts[contact]["rev_org"]["id"]
    assert played.told(CREATE, **body, rev_org=account) == "400 unexpected_id_type"
    played.world.account_rev_orgs = True
    assert played.told(CREATE, **body, rev_org=account) == "201 N1 active user_b"
    assert played.told(CREATE, **body, rev_org=account) == "409 conflict"
    alone = organisation.add_contact("L", "l@example.com", "user_l", rev_org=None)
    assert played.told(UPDATE, id=alone, external_ref="user_a") == "200 L active user_a"
    organisation.unique_references = "organisation"
    assert played.told(UPDATE, id="P", external_ref="user_a") == "409 conflict"


def test_who_was_deleted_may_be_shown(played: Played) -> None:
    played.organisation.delete_contact(played.duplicate)
    assert played.listed() == "200 P" and played.told(GET, id="D") == "404 not_found"
    played.world.deleted_listed, played.world.deleted_contacts = True, "state"
    assert played.listed() == "200 P D" and played.told(GET, id="D") == "200 D deleted user_1"


# -- lists -----------------------------------------------------------------------------------------


def test_lists_lag_behind_everything_that_changes(played: Played) -> None:
    organisation, world = played.organisation, played.world
    asks = [(WORKS, {"owned_by": ["D"]}), ("conversations.list", {"members": ["D"]}), (LIST, MAIL)]
    before = [played.told(endpoint, **body) for endpoint, body in asks]
    world.list_lag = 12
    played.merge()
    world.settle()
    organisation.delete_work(next(iter(organisation.works)))
    organisation.visit(EMAIL, "user_1")
    assert [played.told(endpoint, **body) for endpoint, body in asks] == before
    played.now += 12
    assert [played.told(endpoint, **body) for endpoint, body in asks] == ["200", "200", "200 P N1"]


@pytest.mark.parametrize(
    ("switches", "pages"),
    [
        ({}, ["AB", "CD", "E"]),
        ({"paging": "again", "paging_times": 1}, ["AB", "AB", "E"]),
        ({"paging": "overlap"}, ["AB", "BC", "CD", "DE"]),
        ({"paging": "offset"}, ["AB", "CD", "E"]),
        ({"largest_page": 1}, ["A", "B", "C", "D", "E"]),
        ({"trailing_page": True}, ["AB", "CD", "E", ""]),
        ({"empty_pages": 2}, ["", "", "AB", "", "", "CD", "", "", "E"]),
        ({"cursor_life": 10.0}, ["AB", "CD", "E"]),
    ],
    ids=label,
)
def test_pages_come_as_the_switches_say(switches: Dict[str, Any], pages: List[str]) -> None:
    played = Played(**switches)
    for key in "ABCDE":
        played.organisation.add_contact(key, "a@example.com")
    body: Dict[str, Any] = {"email": ["a@example.com"], "limit": 2}
    assert played.pages(**body) == pages
    body["cursor"] = played.content(LIST, **body)["next_cursor"]
    assert played.told(LIST, limit=2, cursor=body["cursor"]) == "400 value_not_permitted"
    played.now += 11
    assert (played.answer(LIST, **body).status == 400) == ("cursor_life" in switches)


def test_pages_continue_where_they_were_while_objects_come_and_go(played: Played) -> None:
    for key in "ABC":
        played.organisation.add_contact(key, "a@example.com")
    cursor = played.content(LIST, limit=2)["next_cursor"]
    played.organisation.delete_contact(played.primary)
    assert played.told(LIST, cursor=cursor) == "200 A B C"


# -- quota -----------------------------------------------------------------------------------------


def test_others_spend_of_the_quota_too() -> None:
    played = Played(quota=(10, 60, 4))
    left = [played.answer().headers["X-Ratelimit-Remaining"] for _ in range(3)]
    assert left == ["5", "4", "3"] and played.world.quota is not None
    played.world.quota.spend(3)
    assert played.answer().status == 429 and played.world.over_quota == 1
    played.now += 60
    assert played.answer().status == 200


def test_a_rolling_window_announces_a_reset_that_is_always_a_window_away() -> None:
    played = Played(quota=(3, 4.0, 0, True))
    for second in (0, 1, 2):
        played.now = 1000.0 + second
        headers = played.answer().headers
        assert headers["X-Ratelimit-Reset"] == f"{played.now + 4:.3f}"
        assert headers["X-Ratelimit-Remaining"] == str(2 - second)
    assert played.answer().headers["Retry-After"] == "2.000"
    played.now = 1004.0
    assert [played.answer().status for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("fault", ["", "429", "429-header", "429-body", "429-bare"])
@pytest.mark.parametrize("where", World.CHOICES["retry_after"])
def test_a_429_says_how_long_to_wait_here_there_or_nowhere(where: str, fault: str) -> None:
    played = Played(quota=(9 if fault else 0, 60.0), retry_after=where)
    played.world.faults = [Fault(fault, detail=60)] if fault else []
    answer = played.answer()
    told = fault[4:] or "both"
    assert answer.status == 429
    assert ("Retry-After" in answer.headers) == ({told, where} <= {"both", "header"})
    in_body = json.loads(answer.payload).get("retry_after") == 60
    assert in_body == ({told, where} <= {"both", "body"})
    assert ("X-Ratelimit-Limit" in answer.headers) == (told != "bare")


def test_what_only_a_socket_shows(played: Played) -> None:
    """Answers that drip, come late, have no body or break off; and the page."""
    organisation = played.organisation
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, body: Any = None, timeout: float = 30) -> Tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {sandbox.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{sandbox.url}/{path}", data, headers)
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.read()

    with Sandbox(organisation, merge_delay=60, merge_answer="204") as sandbox:
        both = {"primary_user": played.primary, "secondary_user": played.duplicate}
        assert ask(MERGE, both) == (204, b"")
        organisation.change(organisation.contacts[played.primary], display_name="<b>&")
        sandbox.pages["/"] = lambda: page(organisation)
        assert b"REVU-P1" in ask("")[1] and b"&lt;b&gt;&amp;" in ask("")[1]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask("rev-users.get?id=1")
        sandbox.faults = [Fault("drip", detail=0.001)]
        assert b"dev_user" in ask(ME, {})[1]
        sandbox.faults = [Fault("slow", detail=30)]
        with pytest.raises((socket.timeout, TimeoutError)):
            ask(ME, {}, timeout=0.1)
        sandbox.faults = [Fault("reset-before")]
        with pytest.raises((ConnectionResetError, urllib.error.URLError)):
            ask(ME, {})
