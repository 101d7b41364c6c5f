"""Requests, answers in all their forms, and what goes wrong: single requests, and the quota."""

from __future__ import annotations

import fnmatch
import json
import math
import random
from collections import deque
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Callable, Collection

from tests.fake.organisation import HALF_EMOJI

TYPES = {  # of a refusal, by its status
    400: "bad_request", 401: "unauthenticated", 403: "forbidden", 404: "not_found",
    409: "conflict", 410: "gone", 413: "request_entity_too_large", 423: "locked", 425: "too_early",
    429: "too_many_requests", 500: "internal_error", 503: "service_unavailable",
}  # fmt: skip
TOKENS = {
    "401-expired": "token_expired",
    "401-revoked": "token_revoked",
    "401-deactivated": "dev_org_deactivated",
}
REFUSALS = (*map(str, TYPES), *TOKENS, "429-bare", "429-body", "429-header")
PAGES = ("502", "html-200", "html-403")  # of a gateway in front of the API, in HTML
BEFORE_THE_ACT = (*REFUSALS, *PAGES, "route-404", "redirect", "reset-before", "hang", "other")
AFTER_THE_ACT = (
    "reset-after", "cut", "500-after", "hang-after", "slow", "drip", "nested", "changed", "endless",
    "half-emoji", "odd-quota", "other-after",
)  # fmt: skip
OF_A_MERGE = ("merge-never", "merge-leaves", "merge-slow", "merge-refused-late", "merge-doubled")
FAULTS = (*BEFORE_THE_ACT, *AFTER_THE_ACT, "doubled", *OF_A_MERGE)
QUOTA_HEADERS = ("X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset")
WRITTEN = ("display_name", "full_name", "title", "body", "description", "message", "detail")
SECONDS = {"hang": 60.0, "hang-after": 60.0, "slow": 1.0, "drip": 0.5}


@dataclass
class Fault:
    """One misbehaviour: which requests it strikes, and how often.

    A request is struck by the first fault of the world's list that wants it; the ones behind it
    don't get to see the request. What `detail` says, where a kind takes one:

    429: seconds to wait; other refusals: the message
    half-emoji: names of fields that get a lone surrogate at their end (else those people write)
    odd-quota: a value for each header
    hang, hang-after, slow (the answer comes late), drip (a byte each time), merge-slow: seconds
    doubled, merge-doubled: seconds until the same request arrives again (else at once, and what
        is answered is the second)
    merge-refused-late: the status, and seconds until it is carried out all the same
    merge-leaves: ids (else the first work); changed: a function of the answer
    other, other-after: a status and what comes with it, as JSON, or as HTML where it is text

    A 429 says in the header and in the body how long to wait, 429-body and 429-header in one of
    them, 429-bare nowhere. A new kind needs a name in one of the lists above, and what
    struck_before or struck_after makes of it.
    """

    kind: str
    endpoint: str = "*"
    chance: float = 1.0
    skip: int = 0
    times: int | None = None
    match: Callable[[dict[str, Any]], bool] | None = None
    detail: Any = None
    seen: int = field(default=0, init=False)
    struck: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"unknown fault {self.kind!r}: one of {', '.join(FAULTS)}")

    def strikes(self, request: Request, chance: random.Random) -> bool:
        """Whether this request is to go wrong; counts it."""
        endpoint = request.endpoint
        if (
            (self.kind in OF_A_MERGE and endpoint != "rev-users.merge")
            or (self.kind == "endless" and not endpoint.endswith(".list"))
            or not fnmatch.fnmatchcase(endpoint, self.endpoint)
            or (self.match is not None and not self.match(request.body))
        ):
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
    number: int
    endpoint: str
    body: dict[str, Any]
    started: float
    status: int | None = None
    fault: str | None = None


@dataclass
class Answer:
    """What goes back, and how.

    `send` (after some seconds), `cut` in half, `reset`, `hang` for some seconds, `drip` a byte
    every so many.
    """

    status: int
    payload: bytes
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    manner: str = "send"
    seconds: float = 0.0


class Instead(Exception):
    """An answer of any form, in place of the one that an endpoint would give."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class Refused(Instead):
    """An answer other than 200, in DevRev's form: message, type, and what the type calls for."""

    def __init__(self, status: int, message: str, kind: str = "", **more: Any) -> None:
        content = dict(more, message=message, type=kind or TYPES[status])
        super().__init__(json_answer(status, content))


def json_answer(status: int, content: Any) -> Answer:
    """An answer as the API itself gives it; half an emoji is the JSON escape that it was."""
    text = json.dumps(content, ensure_ascii=False)
    return Answer(status, text.encode("utf-8", "backslashreplace"))


def html_answer(status: int) -> Answer:
    phrase = HTTPStatus(status).phrase
    page = f"<html><head><title>{phrase}</title></head><body><h1>{phrase}</h1></body></html>"
    return other_answer(status, page)


def other_answer(status: int, content: Any) -> Answer:
    if isinstance(content, str):
        return Answer(status, content.encode("utf-8"), content_type="text/html; charset=utf-8")
    return json_answer(status, content)


def too_many(seconds: float, text: str, message: str) -> Answer:
    """A 429 that says how long to wait, in the header as `text` and in the body rounded up."""
    answer = Refused(429, message, retry_after=math.ceil(seconds)).answer
    answer.headers["Retry-After"] = text
    return answer


def struck_before(fault: Fault) -> Answer:
    """The answer to a request that a fault keeps from being carried out."""
    kind, detail = fault.kind, fault.detail
    if kind in ("429", "429-body", "429-header"):
        seconds = 0.2 if detail is None else float(detail)
        answer = too_many(seconds, f"{seconds:g}", "Slow down.")
        return answer if kind == "429" else wait_told(answer, kind[4:])
    if kind in REFUSALS:
        status = int(kind[:3])
        return Refused(status, detail or HTTPStatus(status).phrase, TOKENS.get(kind, "")).answer
    if kind == "other":
        return other_answer(*detail)
    if kind == "route-404":
        return route_not_found()
    if kind == "redirect":
        return moved("/elsewhere")
    if kind in PAGES:
        return html_answer(int(kind[-3:]))
    return struck_after(fault, Answer(0, b""))


def moved(place: str) -> Answer:
    """301: the object has another id now, and this is where it is."""
    answer = Refused(301, "The object has another id now.", "moved_permanently").answer
    answer.headers["Location"] = place
    return answer


def wait_told(answer: Answer, where: str) -> Answer:
    """Let a 429 say how long to wait in the "header", the "body", "both" or "neither"."""
    if where in ("body", "neither"):
        answer.headers.pop("Retry-After", None)
    if where in ("header", "neither") and answer.content_type == "application/json":
        content = json.loads(answer.payload.decode("utf-8"))
        content.pop("retry_after", None)
        answer.payload = json_answer(429, content).payload
    return answer


def route_not_found() -> Answer:
    """404 of an address that leads nowhere: it says nothing about any object."""
    return json_answer(404, {"message": "route not found"})


def struck_after(fault: Fault, answer: Answer) -> Answer:
    """What becomes of the answer to a request that was carried out."""
    kind, detail = fault.kind, fault.detail
    if kind == "other-after":
        return other_answer(*detail)
    if kind == "500-after":
        return Refused(500, "Something broke.").answer
    if kind == "nested":
        return Answer(200, b'{"a":' * 100_000 + b"{}" + b"}" * 100_000)
    if kind == "odd-quota":
        if detail is not None:
            answer.headers.update(dict.fromkeys(QUOTA_HEADERS, detail))
        return answer
    if kind in ("changed", "endless", "half-emoji"):
        if not answer.payload or answer.content_type != "application/json":
            return answer
        content = json.loads(answer.payload.decode("utf-8"))
        if kind == "half-emoji":
            return json_answer(answer.status, halved(content, detail or WRITTEN))
        if kind == "endless":
            # A page that claims that more comes, under a cursor never seen before.
            return json_answer(answer.status, {**content, "next_cursor": f"more-{fault.struck}"})
        return json_answer(answer.status, detail(content))
    if kind in SECONDS:
        answer.seconds = SECONDS[kind] if detail is None else float(detail)
    answer.manner = "send" if kind == "slow" else kind.split("-")[0]
    return answer


def halved(content: Any, names: Collection[str]) -> Any:
    """The same content, in which every text of these names ends with half an emoji."""
    if isinstance(content, list):
        return [halved(one, names) for one in content]
    if not isinstance(content, dict):
        return content
    cut = {name for name in names if isinstance(content.get(name), str)}
    found = {name: halved(value, names) for name, value in content.items()}
    return {**found, **{name: content[name] + HALF_EMOJI for name in cut}}


def merge_acknowledged(form: str, content: Any) -> Answer:
    if form == "200-other":
        content = {"status": "accepted", "rev_user": None, "jobs": [{"state": "queued"}]}
    answer = json_answer(int(form[:3]), [] if form == "200-list" else content)
    if form in ("204", "200-empty", "202-empty"):
        answer.payload = b""
    return answer


STATES_LEFT = {  # of a merged contact
    "locked": "locked", "shadow": "shadow", "archived": "archived", "deactivated": "deactivated",
    **dict.fromkeys(
        ("stale", "no-email", "no-reference", "own-reference", "bare", "as-before"), "active"
    ),
}  # fmt: skip
STAYS = ("", *(one for one in STATES_LEFT if one != "stale"))
ODD_POLLS = (
    "404-route", "404-other", "400", "403", "410", "500", "502", "503", "shape", "empty", "hang",
    "drip",
)  # fmt: skip
MERGE_MANNERS = ("works", "never", "400", "403", "409")


def odd_poll(manner: str) -> Answer:
    """An answer for a contact that was merged, from which nobody can tell that it was."""
    if manner == "404-other":
        return Refused(404, "There is nothing to see here.", "object_hidden").answer
    if manner == "shape":
        return json_answer(200, {"rev_user": {"id": 7, "state": ["deleted"]}})
    if manner == "empty":
        return Answer(200, b"")
    if manner == "drip":
        return struck_after(Fault("drip"), json_answer(200, {"rev_user": {}}))
    return struck_before(Fault("route-404" if manner == "404-route" else manner))


class Quota:
    """So many units in a window; the windows follow each other from the first request on, or roll.

    `others` is what other clients spend of each window, at its start. With `rolls` every window
    ends with the moment that it is asked at, and the reset is always a window away.
    """

    def __init__(
        self, epoch: Any, limit: int, window: float, others: int = 0, rolls: bool = False
    ) -> None:
        self.limit = limit
        self.window = window
        self.others = others
        self.rolls = rolls
        self._epoch = epoch
        self._first: float | None = None
        self._current = -1
        self._used = 0
        self._spent: deque[float] = deque()  # when each unit of a rolling window was

    def take(self) -> tuple[dict[str, str], Answer | None]:
        """The headers for one more request, and its 429 if there is nothing left."""
        now, reset = self._turn()
        granted = self._used < self.limit
        self._use(now, int(granted))
        values = str(self.limit), str(self.limit - self._used), self._number(reset)
        headers = dict(zip(QUOTA_HEADERS, values))
        if granted:
            return headers, None
        if self._spent:
            reset = self._spent[0] + self.window
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

    def _turn(self) -> tuple[float, float]:
        now = self._epoch()
        if self.rolls:
            while self._spent and self._spent[0] <= now - self.window:
                self._spent.popleft()
            self._used = min(self.limit, self.others + len(self._spent))
            return now, now + self.window
        self._first = now if self._first is None else self._first
        current = int((now - self._first) // self.window)
        if current != self._current:
            self._current, self._used = current, min(self.limit, self.others)
        return now, self._first + (current + 1) * self.window

    def _number(self, seconds: float) -> str:
        if self.window >= 60:
            return str(math.ceil(seconds))
        return f"{math.ceil(seconds * 1000) / 1000:.3f}"
