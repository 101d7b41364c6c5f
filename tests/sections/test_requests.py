"""The client of DevRev's API against a server on loopback that answers what a test tells it to."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Coroutine, Dict, List, Optional, Tuple

import pytest

import merge_contacts as tool
from tests.sandbox import Organisation, Sandbox
from tests.simulation.scene import Scene
from tests.simulation.world import EPOCH, Clock, Headers, Loop, run_to_the_end
from tests.support import ROOT, Workplace, organisation_of_pairs

Answer = Any  # status, JSON or raw bytes, perhaps headers
Respond = Callable[[str, Dict[str, Any]], Answer]
Work = Callable[["tool.DevRevAPI"], Coroutine[Any, Any, Any]]
ORG = "don:identity:dvrv-us-1:devo/TEST"
ONE, TWO, THREE = (f"{ORG}:revu/{key}" for key in ("ONE", "TWO", "THREE"))
OPTIONS = tool.RequestOptions(tool.FINISH)


class Scripted(tool.Environment):
    """Answers each request with what `respond(endpoint, body)` returns, in simulated time."""

    def __init__(self, respond: Respond, retries: int) -> None:
        super().__init__(tool.ApiSettings("a-token-of-some-length", calls=0, retries=retries))
        self.respond = respond
        self.requests: List[Tuple[str, Dict[str, Any]]] = []
        self.times: List[float] = []
        self.clock = Clock()

    def now(self) -> "tool.Timestamp":
        return tool.Timestamp(self.clock.wall, self.clock.steady)

    async def post(
        self, endpoint: str, body: Dict[str, Any], deadline: Optional[float] = None
    ) -> "tool.HttpResponse":
        body = json.loads(json.dumps(body))
        self.requests.append((endpoint, body))
        self.times.append(self.clock.now)
        self.clock.last_progress = self.clock.now
        await asyncio.sleep(0.001)
        status, content, *headers = self.respond(endpoint, body)
        if status is None:
            return tool.HttpResponse(None, {}, None, "no connection", sent=content)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        data, problem = tool.parse_body(status, raw, self.settings)
        return tool.HttpResponse(status, Headers(headers[0] if headers else {}), data, problem)

    def run(self, work: Work) -> Any:
        """Do some work with a client of it."""

        async def main() -> Any:
            return await work(tool.DevRevAPI(self.settings, self, tool.CancelToken()))

        return run_to_the_end(Loop(self.clock), main())


def ask(respond: Respond, work: Work, retries: int = 1) -> Tuple[Any, Scripted]:
    scripted = Scripted(respond, retries)
    return scripted.run(work), scripted


def answering(*answer: Any) -> Respond:
    return lambda _endpoint, _body: answer


def user(identity: str = ONE, **fields: Any) -> Dict[str, Any]:
    known = {"id": identity, "state": "active", "email": "ada@example.com"}
    return {**known, "external_ref": "REVU-1", **fields}


# -- a deadline for the complete answer ------------------------------------------------------------


def raw_server(first: bytes, piece: bytes, pause: float) -> Tuple[str, socket.socket]:
    """A server that says `first`, and then a piece again and again, without an end."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(first)
            while piece:
                connection.sendall(piece)
                time.sleep(pause)
            time.sleep(600)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ENDLESS = {
    "silence": (b"", b"", 0.0),
    "dripping headers": (HEAD, b"X-Padding: x\r\n", 0.1),
    "one endless header": (HEAD + b"X: ", b"x", 0.1),
    "a dripping body": (HEAD + b"Content-Length: 1000000\r\n\r\n", b" ", 0.1),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("deadline", [None, 0.4])
def test_an_answer_without_an_end_ends_at_the_deadline(
    name: str, deadline: Optional[float]
) -> None:
    url, listener = raw_server(*ENDLESS[name])
    settings = tool.ApiSettings("token", url, timeout=0.3)
    begun = time.monotonic()
    with listener:
        response = asyncio.run(
            tool.Environment(settings).post("rev-users.get", {"id": ONE}, deadline)
        )
    assert response.data is None and response.problem and response.sent
    assert time.monotonic() - begun < 60, "nothing but the deadline would have ended it"


def test_a_thread_that_hangs_delays_no_exit() -> None:
    url, listener = raw_server(*ENDLESS["dripping headers"])
    program = (
        "import asyncio, sys, merge_contacts as tool\n"
        "settings = tool.ApiSettings('token', sys.argv[1], timeout=300)\n"
        "print(asyncio.run(tool.Environment(settings).post('x', {}, 0.3)).problem)\n"
    )
    command = [sys.executable, "-c", program, url]
    with listener:
        assert b"within 0.3 s" in subprocess.check_output(command, cwd=str(ROOT), timeout=60)


def test_an_answer_that_breaks_off_after_its_status_still_acknowledges_a_merge() -> None:
    url, listener = raw_server(HEAD + b"Content-Length: 1000\r\n\r\n{", b"", 0.0)
    settings = tool.ApiSettings("a-token", url, 0, timeout=0.2, retries=1)
    environment = tool.Environment(settings)
    with listener:
        asyncio.run(merge(tool.DevRevAPI(settings, environment, tool.CancelToken())))


# -- repeating -------------------------------------------------------------------------------------


def get(api: "tool.DevRevAPI") -> Any:
    return api.contact(ONE)


@pytest.mark.parametrize("retries", [0, 1, 5, 8])
def test_a_request_is_repeated_so_often_after_pauses_that_grow(retries: int) -> None:
    scripted = Scripted(answering(408, {"type": "timeout", "message": "?"}), retries)
    with pytest.raises(tool.NoUsableResponse):
        scripted.run(get)
    assert len(scripted.requests) == 1 + retries
    gaps = [later - earlier for earlier, later in zip(scripted.times, scripted.times[1:])]
    for number, gap in enumerate(gaps):
        longest = min(8.0, 0.2 * 2**number)
        assert longest / 2 <= gap - 0.001 <= longest + 0.001


def create(api: "tool.DevRevAPI") -> Any:
    return api.create_contact({"email": "x"}, OPTIONS)


def poll_once(api: "tool.DevRevAPI") -> Any:
    return api.poll_duplicate(TWO, ADA, OPTIONS._replace(deadline=0.2))


def set_reference_once(api: "tool.DevRevAPI") -> Any:
    options = OPTIONS._replace(deadline=0.2)
    return api.update_contact(ONE, {"external_ref": "user_1"}, options)


@pytest.mark.parametrize("work, writes", [(create, 1), (poll_once, 0), (set_reference_once, 1)])
@pytest.mark.parametrize("sent", [True, False])
def test_what_is_sent_once_is_sent_again_only_where_it_did_not_leave(
    work: Work, writes: int, sent: bool
) -> None:
    async def lose(api: "tool.DevRevAPI") -> None:
        with pytest.raises(tool.NoUsableResponse):
            await work(api)
        assert api.writes == (writes if sent else 0)

    assert len(ask(answering(None, sent), lose)[1].requests) == (1 if sent else 2)


def test_whether_devrev_is_down_shows_a_request_that_names_no_object() -> None:
    def respond(endpoint: str, _body: Dict[str, Any]) -> Answer:
        return (200, {"dev_user": {}}) if endpoint == "dev-users.self" else (500, {"message": "?"})

    async def work(api: "tool.DevRevAPI") -> None:
        for _ in range(4):
            with pytest.raises(tool.NoUsableResponse):
                await get(api)
        assert api.cancel_token.stop is None

    names = [endpoint for endpoint, _ in ask(respond, work, retries=5)[1].requests]
    assert names[:5] == ["rev-users.get"] * 3 + ["dev-users.self", "rev-users.get"]
    assert names.count("rev-users.get") == 4 * 6


# -- what acknowledges a merge ---------------------------------------------------------------------


async def merge(api: "tool.DevRevAPI") -> None:
    await api.merge(ONE, TWO, OPTIONS)


@pytest.mark.parametrize(
    "answer",
    [(200, {}), (204, b""), (202, b"[]"), (201, {"rev_user": None}), (200, b"{"),
     (200, {"rev_user": user(TWO)})],
)  # fmt: skip
def test_any_2xx_acknowledges_a_merge_and_other_endpoints_need_their_object(answer: Answer) -> None:
    assert len(ask(answering(*answer), merge)[1].requests) == 1
    with pytest.raises(tool.NoUsableResponse):
        ask(answering(*answer), set_reference_once)


@pytest.mark.parametrize("status, writes", [(400, 1), (401, 0), (403, 0), (409, 1), (500, 1)])
def test_what_the_token_may_not_do_has_changed_nothing(status: int, writes: int) -> None:
    async def work(api: "tool.DevRevAPI") -> None:
        with pytest.raises((tool.PairError, tool.FatalError)):
            await merge(api)
        assert api.writes == writes

    assert len(ask(answering(status, {"type": "x", "message": "No."}), work)[1].requests) == 1


# -- lists -----------------------------------------------------------------------------------------


def timeline(api: "tool.DevRevAPI") -> Any:
    return api.timeline("don:core:x:ticket/1")


def pages_of(*pages: Any) -> Respond:
    """Pages of timeline entries, each a list of keys, with cursors 1, 2, …, none on the last."""

    def respond(_endpoint: str, body: Dict[str, Any]) -> Answer:
        number = int(body.get("cursor", 0))
        found = {"timeline_entries": [{"id": str(key)} for key in pages[number]]}
        return 200, {**found, "next_cursor": str(number + 1)} if number + 1 < len(pages) else found

    return respond


@pytest.mark.parametrize(
    "pages, ids, readings",
    [
        ([[1, 2], [3]], "123", 1),
        ([[], [], [], [], [1], [], [2]], "12", 1),
        ([[], []], "", 1),
        ([[1], *[[]] * 99, [2], *[[]] * 99, [3]], "123", 1),
        ([[1, 2], [2, 3], [3, 4]], "1234", 2),
    ],
)
def test_only_the_absence_of_a_cursor_ends_a_list(pages: Any, ids: str, readings: int) -> None:
    items, server = ask(pages_of(*pages), timeline)
    assert "".join(item["id"] for item in items) == ids
    assert len(server.requests) == readings * len(pages)


def test_a_list_is_as_old_as_its_first_page() -> None:
    def read(api: "tool.DevRevAPI") -> Any:
        return api.pages("timeline-entries.list", "timeline_entries", {})

    listing, server = ask(pages_of([1], [2]), read)
    assert listing.since.wall == EPOCH + server.times[0] < EPOCH + server.times[1]


def readings_of(*readings: Any) -> Respond:
    """A list that shows other pages each time that it is read from its beginning."""
    number = -1

    def respond(endpoint: str, body: Dict[str, Any]) -> Any:
        nonlocal number
        number += "cursor" not in body
        return pages_of(*readings[min(number, len(readings) - 1)])(endpoint, body)

    return respond


@pytest.mark.parametrize(
    "readings, ids, requests",
    [
        ([[[1, 2], [2, 4]], [[1, 2], [3, 4]], [[1, 2], [3, 4]]], "1243", 6),
        ([[[1, 2], [2, 4]], [[1, 2], [4]]], "124", 4),
        ([[[1], [1], [1], [2]], [[1], [2]]], "12", 6),
        ([[[1], [1]], [[1], [2]], [[1], [3]], [[1], [2], [3]]], "123", 9),
        ([[[1], [1]], [[1], [2]], [[1], [3]], [[1], [4]]], None, 8),
        ([[[1], [1], [3]]], None, 12),  # in place of 2, each time
    ],
)
def test_a_list_that_shifts_is_read_again_until_a_reading_adds_nothing(
    readings: Any, ids: Optional[str], requests: int
) -> None:
    scripted = Scripted(readings_of(*readings), 1)
    if ids is None:
        with pytest.raises(tool.NoUsableResponse, match="its items move"):
            scripted.run(timeline)
    else:
        assert "".join(item["id"] for item in scripted.run(timeline)) == ids
    assert len(scripted.requests) == requests
    limits = [body["limit"] for _, body in scripted.requests if "cursor" not in body]
    assert limits == [100, 50, 33, 25][: len(limits)]


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("times", [1, 4])
def test_a_list_whose_cursor_expires_is_read_again(status: int, times: int) -> None:
    left = times

    def respond(endpoint: str, body: Dict[str, Any]) -> Any:
        nonlocal left
        if body.get("cursor") == "2" and left:
            left -= 1
            return status, {"type": "bad_request", "message": "bad cursor"}
        return pages_of([1], [2], [3])(endpoint, body)

    if times == 1:
        items, server = ask(respond, timeline)
        assert [item["id"] for item in items] == ["1", "2", "3"] and len(server.requests) == 9
    else:
        with pytest.raises(tool.NoUsableResponse, match="its cursors expire"):
            ask(respond, timeline)


def test_a_refused_first_page_is_no_matter_of_cursors() -> None:
    with pytest.raises(tool.ApiError, match="answered 400"):
        ask(answering(400, {"type": "bad_request", "message": "?"}), timeline)


NUMBERS = itertools.count()


def same_cursor(_endpoint: str, _body: Dict[str, Any]) -> Answer:
    return 200, {"timeline_entries": [{"id": str(next(NUMBERS))}], "next_cursor": "same"}


NEVER_ENDING = [
    (pages_of([1], *[[]] * 300), 101),
    (pages_of([1], [2], *[[1]] * 300), 5),
    (pages_of([1], *[[1], []] * 150), 6),
    (same_cursor, 2),
]


@pytest.mark.parametrize("respond, most", NEVER_ENDING)
def test_a_list_that_never_ends_is_an_error(respond: Respond, most: int) -> None:
    scripted = Scripted(respond, 1)
    with pytest.raises(tool.NoUsableResponse, match="bring nothing new"):
        scripted.run(timeline)
    assert len(scripted.requests) == most


SHAPES = [None, {}, ["x"], [{}], [{"id": 7}], [{"id": ""}]]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_list_of_another_shape_fails_its_request_alone(shape: Any) -> None:
    with pytest.raises(tool.NoUsableResponse):
        ask(answering(200, {"timeline_entries": shape}), timeline)


# -- polls -----------------------------------------------------------------------------------------

EXISTS, CHANGED, NOT_FOUND, DELETED, IN_PRIMARY = tool.DuplicateStatus
ADA = tool.Contact(ONE, "Ada", "Ada@Example.com", "REVU-1", "", 0, "", "")
MOVED = f"https://api.example.com/rev-users.get?id={TWO}"
POLLS = [
    ((404, {"type": "not_found", "message": "no such user"}), NOT_FOUND),
    ((404, {"message": "route not found"}), tool.ApiError),  # which says nothing of any contact
    ((404, {"type": "gone_fishing", "message": "?"}), tool.ApiError),
    ((404, b"<html>"), tool.NoUsableResponse),
    ((301, {}, {"Location": MOVED}), IN_PRIMARY),
    ((301, {}, {"Location": MOVED.replace(":", "%3A").replace("/", "%2F")}), IN_PRIMARY),
    ((301, {}, {"Location": MOVED.replace("TWO", "THREE")}), tool.PairError),
    ((301, {}, {"Location": MOVED.replace("TWO", "ONE")}), tool.ApiError),
    ((301, {}, {"Location": "::not a URL%%%"}), tool.ApiError),
    ((302, {}, {"Location": "https://login.example.com/"}), tool.ApiError),
    ((301, {}), tool.ApiError),
    ((200, {"rev_user": user(state="deleted")}), DELETED),
    ((200, {"rev_user": user()}), EXISTS),
    *(((200, {"rev_user": user(state=one)}), CHANGED) for one in ("locked", "shadow", "x")),
    ((200, {"rev_user": user(email="bob@example.com")}), CHANGED),
    ((200, {"rev_user": user(email=None)}), CHANGED),
    ((200, {"rev_user": user(external_ref="user_1")}), CHANGED),
    ((200, {"rev_user": user(state="shadow", primary_identity={"id": TWO})}), IN_PRIMARY),
    ((200, {"rev_user": user(state="shadow", primary_identity={"id": THREE})}), tool.PairError),
    ((200, {"rev_user": user(TWO)}), IN_PRIMARY),
    ((200, {"rev_user": user(THREE)}), tool.PairError),
    ((200, {"rev_user": user(state="active", display_name="\ud83d")}), EXISTS),
    ((200, {"rev_user": user(state=7)}), CHANGED),
    ((200, {"rev_user": {"id": 7, "state": "active"}}), tool.NoUsableResponse),
    ((200, {"rev_user": []}), tool.NoUsableResponse),
    ((200, b"<html>"), tool.NoUsableResponse),
    ((200, b"[" * 100_000), tool.NoUsableResponse),
    ((400, {"type": "bad_request", "message": "?"}), tool.ApiError),
    ((403, {"type": "forbidden", "message": "?"}), tool.ApiError),
    ((410, {"type": "gone", "message": "?"}), tool.ApiError),
    ((403, b"<html>"), tool.NoUsableResponse),
    ((408, b"<html>"), tool.NoUsableResponse),
    ((408, {"type": "timeout", "message": "?"}), tool.NoUsableResponse),
    ((500, {"type": "internal_error", "message": "?"}), tool.NoUsableResponse),
]


@pytest.mark.parametrize("answer, expected", POLLS, ids=lambda value: str(value)[:60])
def test_a_poll_shows_what_has_become_of_the_duplicate_or_nothing(
    answer: Any, expected: Any
) -> None:
    def poll(api: "tool.DevRevAPI") -> Any:
        return api.poll_duplicate(TWO, ADA, OPTIONS)

    if isinstance(expected, tool.DuplicateStatus):
        assert ask(answering(*answer), poll)[0] is expected
    else:
        with pytest.raises(expected) as raised:
            ask(answering(*answer), poll)
        assert type(raised.value) is expected


@pytest.mark.parametrize(
    "answer",
    [(404, {"type": "not_found", "message": "?"}), (200, {"rev_user": user(TWO)}), POLLS[4][0]],
)
def test_a_contact_that_is_gone_or_has_become_another_is_none(answer: Any) -> None:
    assert ask(answering(*answer), get)[0] is None


# -- refusals --------------------------------------------------------------------------------------


def test_a_dead_token_says_what_is_wrong_and_asks_for_a_new_one() -> None:
    with pytest.raises(tool.PermissionDenied, match=r"Expired.*create a new one"):
        ask(answering(401, {"type": "token_expired", "message": "Expired."}), get)


CORE = "don:core:dvrv-us-1:devo/TEST"
SCOPES = [
    ("rev-users.merge", {"primary_user": ONE, "secondary_user": TWO}, "rev_user:all"),
    ("rev-users.update", {"id": ONE}, "rev_user:write"),
    ("rev-users.create", {}, "rev_user:write"),
    ("rev-users.get", {"id": ONE}, "rev_user:read"),
    ("rev-users.list", {}, "rev_user:read"),
    ("works.list", {"type": ["ticket", "issue"]}, "ticket:read and issue:read"),
    ("works.get", {"id": f"{CORE}:task/7"}, "task:read"),
    ("works.update", {"id": f"{CORE}:issue/7", "type": "issue"}, "issue:write"),
    ("conversations.list", {"members": [ONE]}, "conversation:read"),
    ("conversations.update", {"id": f"{CORE}:conversation/7"}, "conversation:write"),
    ("timeline-entries.list", {"object": f"{CORE}:ticket/7"}, "ticket:read"),
    ("timeline-entries.list", {"object": f"{CORE}:conversation/7"}, "conversation:read"),
    ("dev-users.self", {}, ""),
]


@pytest.mark.parametrize("endpoint, body, scopes", SCOPES)
def test_the_scope_is_the_one_that_the_request_needs(endpoint: str, body: Any, scopes: str) -> None:
    assert tool.scopes_needed(endpoint, body) == scopes


@pytest.mark.parametrize("ids, named", [([f"{CORE}:ticket/77"], True), ("x", False), ([7], False)])
def test_a_403_names_the_objects_and_the_scope(ids: Any, named: bool) -> None:
    content = {"type": "forbidden", "message": "No.", "object_ids": ids}
    with pytest.raises(tool.ApiError, match="ticket:read") as raised:
        ask(answering(403, content), lambda api: api.timeline(f"{CORE}:ticket/77"))
    assert ("(77)" in str(raised.value)) is named


@pytest.mark.parametrize("text", ["\ud83d", ["\ud83d"], {"a": 1}, 10**400, "x" * 10_000], ids=repr)
@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_every_message_of_an_error_can_be_stored(status: int, text: Any) -> None:
    content = {"type": text, "message": text, "detail": text, "object_ids": [text]}
    with pytest.raises((tool.PairError, tool.FatalError)) as raised:
        ask(answering(status, content), lambda api: api.holders_of("user_1", OPTIONS))
    assert len(tool.to_json(str(raised.value))) < 24_000


# -- one call for many contacts --------------------------------------------------------------------

SILENT = tool.NoUsableResponse("x.list", "?")
OVER_QUOTA = tool.ApiError("x.list", 429, "?", {})
# Keys and how many items are expected of each, what the calls for several raise, and the calls.
BATCHES: List[Tuple[Dict[str, int], Any, List[str]]] = [
    ({"a": 1, "b": 1, "c": 1}, None, ["abc"]),
    ({"a": 100, "b": 1, "c": 100, "d": 100}, None, ["bac", "d"]),
    ({"a": 125, "b": 125, "c": 1}, None, ["ab", "c"]),
    ({"a": 300, "b": 0}, None, ["a", "b"]),
    ({"a": 1, "b": 1, "c": 1}, SILENT, ["abc", "ab", "c", "a", "b"]),
    ({"a": 1, "b": 1, "c": 1}, OVER_QUOTA, ["abc"]),
    ({"a": 1, "b": 1, "c": 1}, "somebody else's", ["abc", "a", "b", "c"]),
    (dict.fromkeys("abcdefghijklmnop", 1), SILENT, [""] * 13),
]


@pytest.mark.parametrize("weights, trouble, expected", BATCHES)
def test_keys_share_a_call_and_one_that_fails_is_halved(
    weights: Dict[str, int], trouble: Any, expected: List[str]
) -> None:
    calls: List[str] = []

    async def lister(keys: Any, options: "tool.RequestOptions") -> "tool.ListResult":
        assert options.priority == tool.MERGE
        calls.append("".join(keys))
        if isinstance(trouble, Exception) and len(keys) > 1:
            raise trouble
        owners = [trouble] if isinstance(trouble, str) else keys
        return tool.ListResult([{"id": owner} for owner in owners], tool.Timestamp(0.0, 0.0))

    async def main() -> Any:
        loader = tool.BatchLoader(lister, tool.CancelToken(), lambda item: {item["id"]})
        loads = [loader.load(key, weight, tool.MERGE) for key, weight in weights.items()]
        return await asyncio.gather(*loads, return_exceptions=True)

    found = dict(zip(weights, run_to_the_end(Loop(Clock()), main())))
    if expected[0]:
        assert calls == expected
    assert len(calls) == len(expected)
    for key, listing in found.items():
        if trouble and key not in calls:
            assert listing is trouble
        else:
            assert listing.items == [{"id": trouble if isinstance(trouble, str) else key}]


def people(count: int) -> Dict[str, Dict[str, Any]]:
    emails = [f"person{number}@example.com" for number in range(count)]
    return {email: user(f"{ORG}:revu/{number}", email=email) for number, email in enumerate(emails)}


async def load_each(api: "tool.DevRevAPI", emails: Any) -> Dict[str, Any]:
    found = await asyncio.gather(
        *(api.contacts_by_email([email]) for email in emails), return_exceptions=True
    )
    return dict(zip(emails, found))


NO = {"type": "x", "message": "No.", "max_bytes": 7}


@pytest.mark.parametrize(
    "status, content, error, words, most",
    [
        (400, NO, tool.ApiError, "400", 12),
        (403, NO, tool.ApiError, "rev_user:read", 12),
        (413, NO, tool.ApiError, "413", 12),
        (403, b"<html>", tool.NoUsableResponse, "403 .*firewall", 20),
    ],
)
def test_a_refused_list_is_halved_until_the_contact_is_found(
    status: int, content: Any, error: Any, words: str, most: int
) -> None:
    everybody = people(32)
    bad = "person20@example.com"

    def respond(_endpoint: str, body: Dict[str, Any]) -> Answer:
        if bad in body["email"]:
            return status, content
        return 200, {"rev_users": [everybody[email] for email in body["email"]]}

    found, server = ask(respond, lambda api: load_each(api, everybody))
    assert [email for email, one in found.items() if isinstance(one, Exception)] == [bad]
    assert type(found[bad]) is error and re.search(words, str(found[bad]))
    assert all(found[email].items == [everybody[email]] for email in everybody if email != bad)
    assert len(server.requests) <= most


@pytest.mark.parametrize("content, most", [(NO, 5), (b"<html>", 40)])
def test_a_403_for_everybody_costs_few_requests(content: Any, most: int) -> None:
    found, server = ask(answering(403, content), lambda api: load_each(api, people(60)))
    assert all(isinstance(one, tool.PairError) for one in found.values())
    assert len(server.requests) <= most  # the list, and four of its sixty contacts


def test_a_429_that_never_ends_for_one_endpoint_ends_with_true_words() -> None:
    async def poll(api: "tool.DevRevAPI") -> Any:
        api.MOST_OVER_QUOTA = 3
        with pytest.raises(tool.ApiError, match="429: over quota, however long one waits"):
            await asyncio.gather(timeline(api), *(get(api) for _ in range(10)))
        assert api.cancel_token.stop is None

    def respond(endpoint: str, _body: Dict[str, Any]) -> Answer:
        if endpoint == "timeline-entries.list":
            return 429, {"type": "too_many_requests", "message": "No.", "retry_after": 0}
        return 200, {"rev_user": user()}

    requests = ask(respond, poll)[1].requests
    assert [endpoint for endpoint, _ in requests].count("timeline-entries.list") == 4


@pytest.mark.parametrize("status", [400, 403])
def test_a_refused_filter_tells_nothing_and_is_not_tried_again(status: int) -> None:
    async def twice(api: "tool.DevRevAPI") -> Any:
        many = [f"person{number}@example.com" for number in range(20)]
        return [await api.unverified_ids(many), await api.unverified_ids(many)]

    found, server = ask(answering(status, {"type": "bad_request", "message": "No."}), twice)
    assert found == [None, None] and len(server.requests) == 2


@pytest.mark.parametrize("is_ignored", [False, True])
def test_unverified_contacts_are_those_that_the_filter_lists(is_ignored: bool) -> None:
    everybody = people(6)
    if is_ignored:
        everybody["person0@example.com"]["is_verified"] = True

    def respond(_endpoint: str, body: Dict[str, Any]) -> Answer:
        assert body["is_verified"] is False
        if len(body["email"]) > 3:
            return 400, {"type": "bad_request", "message": "too many"}
        return 200, {"rev_users": [everybody[one] for one in body["email"] if one < "person3"]}

    found, _ = ask(respond, lambda api: api.unverified_ids(everybody))
    expected = {everybody[f"person{number}@example.com"]["id"] for number in range(3)}
    assert found == (None if is_ignored else expected)


def works_of(kinds: Any, most: int = 100, status: int = 400) -> Respond:
    """Lists of works of these kinds, for so many contacts."""

    def respond(_endpoint: str, body: Dict[str, Any]) -> Answer:
        (name,) = (name for name in body if name in tool.ROLES.values())
        ids = body[name]
        if not set(body["type"]) <= set(kinds) or len(ids) > most:
            return status, {"type": "bad_request", "message": "No."}
        return 200, {"works": [{"id": f"{one}:work", name: [{"id": one}]} for one in ids]}

    return respond


EVERY_KIND = ("ticket", "issue", "task", "incident", "opportunity")
BASE = EVERY_KIND[:2]


KINDS = [  # that are listed, calls to find that out, the status that refuses the others
    (EVERY_KIND, 0, 400),
    (BASE, 5, 400),
    (BASE, 5, 403),
    ((*BASE, "task", "opportunity"), 5, 403),
]


@pytest.mark.parametrize("kinds, extra, status", KINDS)
def test_works_of_every_kind_are_listed_but_those_that_are_refused(
    kinds: Any, extra: int, status: int
) -> None:
    async def load(api: "tool.DevRevAPI") -> Any:
        await asyncio.gather(*(api.objects[role].load(ONE) for role in tool.ROLES.values()))
        await api.objects["owned_by"].load(TWO)
        named = " ".join(api.warnings)
        assert all((kind in named) is (kind not in kinds) for kind in EVERY_KIND[2:])
        return tuple(api.work_kinds)

    found, server = ask(works_of(kinds, status=status), load)
    assert found == kinds and len(server.requests) == 4 + extra


def no_incidents(endpoint: str, body: Dict[str, Any]) -> Answer:
    status = 409 if body["type"] == [*BASE, "incident"] else 400
    return works_of((*BASE, "opportunity"), status=status)(endpoint, body)


@pytest.mark.parametrize(
    "respond, words, kinds",
    [
        (works_of((), status=403), "ticket:read", EVERY_KIND),
        (no_incidents, "409", (*BASE, "incident", "opportunity")),
    ],
)
def test_only_a_400_or_403_leaves_a_kind_of_works_other_than_tickets_out_of_the_backup(
    respond: Respond, words: str, kinds: Any
) -> None:
    async def load(api: "tool.DevRevAPI") -> Any:
        for _ in range(2):
            with pytest.raises(tool.ApiError, match=words):
                await api.objects["owned_by"].load(ONE)
        return tuple(api.work_kinds)

    assert ask(respond, load)[0] == kinds


def test_a_list_of_too_many_contacts_does_not_hide_the_other_kinds() -> None:
    async def load(api: "tool.DevRevAPI") -> Any:
        found = await asyncio.gather(
            *(api.objects["owned_by"].load(f"{ORG}:revu/{number}") for number in range(8))
        )
        assert all(len(one.items) == 1 for one in found)
        return tuple(api.work_kinds)

    assert ask(works_of(EVERY_KIND, 2), load)[0] == EVERY_KIND


# -- this machine's settings -----------------------------------------------------------------------


@pytest.fixture
def organisation(place: Workplace) -> Organisation:
    found, _ = organisation_of_pairs(1)
    place.export(found)
    return found


PROXIES = ("NO_PROXY", "HTTPS_PROXY", "ALL_PROXY", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


def run_with(place: Workplace, url: str, **environment: str) -> Any:
    names = [name for name in os.environ if name.upper() in PROXIES]
    cleared = dict.fromkeys(names, "")  # an empty https_proxy hides HTTPS_PROXY
    settings = {"DEVREV_API_TOKEN": "sandbox-token", "DEVREV_BASE_URL": url}
    settings["DEVREV_MAX_RETRIES"] = "1"
    result = place.run(None, "--yes", **{**cleared, **settings, **environment})
    assert "bug" not in result.err and not (place.folder / "savepoint.db-journal").exists()
    return result


UNUSABLE = [
    ({"REQUESTS_CA_BUNDLE": "nowhere.pem"}, "invalid path: nowhere.pem"),
    ({"REQUESTS_CA_BUNDLE": "contacts.csv"}, "no certificate or crl found"),
    ({"all_proxy": "ftp://name:secret@127.0.0.1:9"}, "Proxy URL had unsupported scheme ftp"),
    ({"HTTPS_PROXY": "http://name:sec/ret@127.0.0.1:9"}, "Failed to parse"),
]


@pytest.mark.parametrize("environment, reason", UNUSABLE)
def test_a_setting_of_this_machine_that_can_not_be_used_gets_the_librarys_reason(
    place: Workplace, organisation: Organisation, environment: Dict[str, str], reason: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = run_with(place, f"https://127.0.0.1:{listener.getsockname()[1]}", **environment)
    assert result.code == 3 and reason in result.err, result
    assert "HTTPS_PROXY" in result.err and "REQUESTS_CA_BUNDLE" in result.err
    assert not re.search("secret|sec/", result.err + place.logs())


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_company_that_inspects_tls_is_told_of_its_bundle(
    place: Workplace, organisation: Organisation
) -> None:
    own, key = str(place.folder / "own.pem"), str(place.folder / "key.pem")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    made = ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, "-keyout", key, "-out", own], check=True, stderr=subprocess.DEVNULL)
    with Sandbox(organisation) as sandbox:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(own, key)
        sandbox._server.socket = context.wrap_socket(sandbox._server.socket, server_side=True)
        url = sandbox.url.replace("http:", "https:")
        result = run_with(place, url)
        assert result.code == 3 and "REQUESTS_CA_BUNDLE" in result.err, result
        assert "certificate verify failed: self" in result.err, "OpenSSL's own words"
        assert sandbox.requests == []
        assert run_with(place, url, REQUESTS_CA_BUNDLE=own).code == 0
    assert len(organisation.merges) == 1


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.85, 0.9])
def test_where_another_program_takes_most_of_each_window_pairs_are_merged_all_the_same(
    scene: Scene, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    scene.settings["calls"] = None
    pairs = scene.pairs(3)
    scene.world.set_quota(100, 60.0, int(100 * share))
    assert scene.merge().code == 0 and scene.merged(*pairs)
    assert "only a twentieth is left to them" in caplog.text


@pytest.mark.parametrize("answer", ["400", "400-bare", "403"])
def test_kinds_of_works_that_are_refused_are_left_out_and_named(scene: Scene, answer: str) -> None:
    pairs = scene.pairs(2)
    scene.world.unknown_kinds = ("task",)
    scene.world.unknown_kinds_answer = answer
    scene.world.long_work_types = True
    check = scene.run("--check")
    assert check.code == 0 and "task" in check.out
    run = scene.merge()
    manifest = json.loads(next(Path("backups").rglob("manifest.json")).read_text(encoding="utf-8"))
    assert run.code == 0 and scene.merged(*pairs)
    assert manifest["work_kinds"] == ["ticket", "issue", "incident", "opportunity"]
    assert "task" in run.report["run"]["warnings"][0]


def test_half_an_emoji_is_in_the_backup_and_restored_as_it_is(scene: Scene) -> None:
    organisation = scene.organisation
    half = {"display_name": "x\ud83d", "description": "\udc00"}
    pairs = scene.pairs(2)
    organisation.change(organisation.contacts[pairs[1][1]], **half)
    assert scene.merge().code == 0 and scene.merged(*pairs)
    assert scene.undo().code == 0
    created = organisation.contacts[scene.holder("user_2")]
    assert created["id"] != pairs[1][1] and {name: created[name] for name in half} == half
