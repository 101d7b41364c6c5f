"""What DevRev does, without sockets, threads or a clock of its own.

One implementation for two uses: `tests.sandbox` speaks it over HTTP on loopback, and a simulation
calls it in simulated time. It misbehaves on demand, and knows the truth afterwards: what was merged
and when, which references moved, and what every single request was. The same seed and the same
calls give the same world.

    organisation = Organisation()
    primary = organisation.add_contact("1", "ada@example.com")
    secondary = organisation.add_contact("2", "ada@example.com", external_ref="user_2")
    world = World(organisation, clock=lambda: now)
    body = {"primary_user": primary, "secondary_user": secondary}
    answer = world.respond("rev-users.merge", body, world.token)

What is known of DevRev only either way is a switch, off by default: a line in World, below, or in
Organisation, and no more than a few where tests.fake.api answers; `tests.sandbox serve --set` takes
those of World. What strikes single requests, once, often or always, is a Fault of
tests.fake.trouble. Any text may hold half an emoji (HALF_EMOJI).
"""

from __future__ import annotations

import fnmatch
import functools
import heapq
import itertools
import random
from collections import Counter
from typing import Any, Callable, Collection, Iterable, Mapping

from tests.fake.api import SHAPES, Api
from tests.fake.organisation import Organisation, Thing
from tests.fake.trouble import (
    AFTER_THE_ACT,
    BEFORE_THE_ACT,
    MERGE_MANNERS,
    ODD_POLLS,
    STAYS,
    Answer,
    Fault,
    Quota,
    Refused,
    Request,
    route_not_found,
    struck_after,
    struck_before,
    wait_told,
)


class Choice:
    """A switch that has one of a few values; the first is as usual."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name
        owner.CHOICES[name] = self.values

    def __get__(self, world: Any, owner: Any) -> Any:
        return vars(world).get(self.name, self.values[0]) if world else self.values[0]

    def __set__(self, world: Any, value: Any) -> None:
        if value not in self.values:
            raise ValueError(f"{self.name}: {value!r} is none of {self.values}")
        vars(world)[self.name] = value


class World:
    """An organisation, how DevRev serves it, and the books of who asked what.

    `clock` gives the seconds that everything here happens at, `epoch` (else the clock too) those of
    the quota's headers. `on_request(stage, request)` is called "before" and "after" each act.
    Everything else is a switch: it may be given by name here and be changed at any time.
    """

    GONE = ("404", "301", "state", "primary", "shadow", "unassigned")
    ODD = ("locked", "stale", *ODD_POLLS)
    CHOICES: dict[str, tuple[Any, ...]] = {}  # the values of each Choice
    # Merges
    merge_delay = 0.3  # seconds from a merge's acknowledgement until it is carried out
    # The acknowledgement; -empty: no body, -other and -list: another one.
    merge_answer = Choice("200", "200-empty", "200-other", "200-list", "202", "202-empty", "204")
    in_progress = Choice(200, 400, 403, 409)  # status of a request for a merge that is pending
    unverified_merge = Choice(*MERGE_MANNERS)  # of an unverified contact into a verified one
    verified_merge = Choice(*MERGE_MANNERS)  # of a verified contact into an unverified one
    # How rev-users.get answers for a merged contact, while lists tell the truth: 301 names the
    # primary, primary is its record, shadow and unassigned have a primary_identity, stays is what
    # `stays` leaves; those of ODD tell nothing.
    gone = Choice(*GONE, *ODD, "stays")
    gone_of: Mapping[str, str] = {}  # the same for single contacts, by id
    moved_to = ""  # the base of the Location that a 301 names
    stays = Choice(*STAYS)  # what is left of it in lists and, with gone="stays", by its id
    merge_jobs: int | None = None  # at a time; another merge is refused with "try again later"
    busy_status = Choice(409, 400, 423, 425)  # of that
    # Contacts
    verified_shown = Choice("hidden", "shown", "null", "mixed")  # is_verified; mixed: one by one
    verified_filter = Choice("accepted", "400", "403")  # is_verified as a filter
    hidden_fields: Collection[str] = ()  # that answers leave out, e.g. tags
    # Fields that can't be set, everywhere or e.g. as rev-users.update.email.
    refused_fields: Collection[str] = ()
    refused_status = 400  # of that; 400 names the field
    reference_updates = Choice("works", "400", "403", "409")  # the answer to an update of one
    unchanged_updates = Choice(200, 400)  # status of an update that changes nothing
    reference_lag = 0.0  # seconds for which answers, but an update's own, show the former reference
    puts_back = 0.0  # how often something puts a former reference back after an update
    puts_back_after = 0.0  # so many seconds later
    vanished: Collection[str] = ()  # contacts that are as if they did not exist; "*" for all
    account_rev_orgs = False  # whether a contact can be made in a rev org that is an account
    unique_emails = False  # whether a contact can't be made with an email that another has
    email_ignores_case = False  # whether the filter email does
    deleted_listed = False  # whether lists show deleted and merged contacts
    deleted_contacts = Choice("404", "state")  # how a deleted contact answers
    # Lists
    list_lag = 0.0  # seconds that lists of contacts, works and conversations lag behind
    max_ids: int | None = None  # that a filter may name
    empty_pages = 0  # that come before each page with items
    largest_page: int | None = None  # the most items of a page, whatever the limit
    trailing_page = False  # whether a list ends with an empty page
    # again: a page comes a second time in place of the next; overlap: each begins with the last
    # item of the one before; offset: a list that changes while it is read shifts
    paging = Choice("cursor", "again", "overlap", "offset")
    paging_times: int | None = None  # how often that goes wrong; None: always
    cursor_life: float | None = None  # seconds after which a cursor is refused
    # Works
    long_work_types = False  # whether there are tasks, incidents and opportunities
    unknown_kinds: Collection[str] = ()  # that `type` does not know all the same
    # The answer to a list that names one; 400 has allowed_values and value.
    unknown_kinds_answer = Choice("400", "400-bare", "403")
    hidden_kinds: Collection[str] = ()  # that the token may not read: of works, or conversation
    hidden_kinds_answer = Choice("403", "left out")  # to a list that asks for one
    # Refusals
    forbidden: Collection[str] = ()  # patterns of endpoints that the token may not use
    restricted: Collection[str] = ()  # ids for which every request that names them is 403
    restricted_timelines: Collection[str] = ()  # whose timeline is
    restricted_writes: Collection[str] = ()  # whose change is
    restricted_in_lists = Choice("shown", "left out", "403")  # a list that would show one
    names_object_ids = True  # whether such a 403 does
    firewall: Collection[str] = ()  # words; a request with one of them is refused in HTML
    firewall_status = 403  # of that
    # Quota
    quota_headers = True  # whether answers carry X-Ratelimit-…
    retry_after = Choice("both", "header", "body", "neither")  # where a 429 tells the wait

    def __init__(
        self,
        organisation: Organisation,
        clock: Callable[[], float],
        epoch: Callable[[], float] | None = None,
        *,
        token: str = "sandbox-token",
        quota: tuple[Any, ...] | None = None,
        faults: Iterable[Fault] = (),
        seed: int = 0,
        on_request: Callable[[str, Request], None] | None = None,
        **switches: Any,
    ) -> None:
        self.organisation = organisation
        self.clock = organisation.clock = clock
        self.token = token
        self.faults: list[Fault] = list(faults)
        self._epoch = epoch or clock
        self.quota: Quota | None = None
        if quota:
            self.set_quota(*quota)
        self.on_request = on_request
        self.gone_of = {}
        for name, value in switches.items():
            if name not in SWITCHES:
                raise TypeError(f"{name} is no switch: one of {sorted(SWITCHES)}")
            setattr(self, name, value)
        self.requests: list[Request] = []
        self.over_quota = 0
        self._chance = random.Random(seed)
        self._api = Api(self)
        self._pending: set[tuple[str, str]] = set()
        # Of each cursor: the place that it stands for, the empty pages served there, when given.
        self.cursors: dict[str, tuple[int, int, float]] = {}
        self._put_back: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], Any]]] = []  # by when they are due
        self._numbers = itertools.count()

    # ----- requests -------------------------------------------------------------------------------

    def respond(self, endpoint: str, body: Thing, token: str | None) -> Answer:
        return self.answer(self.record(endpoint, body), token)

    def record(self, endpoint: str, body: Thing, started: float | None = None) -> Request:
        self.catch_up()
        with self.organisation.lock:
            begun = self.clock() if started is None else started
            request = Request(len(self.requests) + 1, endpoint, body, begun)
            self.requests.append(request)
        self._tell("before", request)
        return request

    def answer(self, request: Request, token: str | None, problem: Refused | None = None) -> Answer:
        """Decide what comes back. The quota comes first, then faults, the token and the request."""
        self.catch_up()
        with self.organisation.lock:
            headers, answer = self.quota.take() if self.quota else ({}, None)
            if answer is None:
                answer = self._decide(request, token, problem)
            else:
                self.over_quota += 1
            if self.quota_headers and request.fault != "429-bare":
                answer.headers = {**headers, **answer.headers}
            if answer.status == 429:
                wait_told(answer, self.retry_after)
        request.status = answer.status if answer.manner in ("send", "cut", "drip") else None
        self._tell("after", request)
        return answer

    def count(self, endpoint: str | None = None) -> int:
        return sum(endpoint in (None, request.endpoint) for request in self.requests)

    def _decide(self, request: Request, token: str | None, problem: Refused | None) -> Answer:
        faults = (one for one in list(self.faults) if one.strikes(request, self._chance))
        fault = next(faults, None)
        request.fault = fault.kind if fault else None
        if fault is not None and fault.kind in BEFORE_THE_ACT:
            return struck_before(fault)
        if token != self.token:
            answer = Refused(401, "The token is not valid.").answer
        elif problem is not None:
            answer = problem.answer
        elif request.endpoint not in SHAPES:
            answer = route_not_found()
        elif any(fnmatch.fnmatchcase(request.endpoint, pattern) for pattern in self.forbidden):
            answer = Refused(403, "The token may not do that.").answer
        else:
            answer = self._act(request, fault)
        if fault is not None and fault.kind in AFTER_THE_ACT:
            return struck_after(fault, answer)
        return answer

    def _act(self, request: Request, fault: Fault | None) -> Answer:
        body = request.body
        if fault is not None and fault.kind == "endless":
            body = {name: value for name, value in body.items() if name != "cursor"}
        answer = self._api.act(request.endpoint, body, fault)
        if fault is not None and fault.kind in ("doubled", "merge-doubled"):
            again = functools.partial(self._api.act, request.endpoint, body)
            if fault.detail is None:
                return again()
            self.later(float(fault.detail), again)
        return answer

    def _tell(self, stage: str, request: Request) -> None:
        if self.on_request is not None:
            self.on_request(stage, request)

    # ----- what happens later ---------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], Any]) -> None:
        """Let something happen at its time: a merge, or what others do."""
        with self.organisation.lock:
            due = self.organisation.now() + seconds
            heapq.heappush(self._events, (due, next(self._numbers), action))

    def next_due(self) -> float | None:
        """When the next thing happens of which is known already that it will."""
        return self._events[0][0] if self._events else None

    def catch_up(self) -> None:
        """Let everything happen that is due, each at the moment it was due."""
        with self.organisation.lock:
            while self._events and self._events[0][0] <= self.clock():
                self._happen(self._events[0][0])

    def settle(self) -> None:
        """Let everything happen that is pending, without waiting for its time."""
        with self.organisation.lock:
            while self._events:
                self._happen(min(self.clock(), self._events[0][0]))

    def plan_merge(self, primary: str, secondary: str, fault: Fault | None) -> None:
        """Take a merge on, unless the same one is pending or too many are."""
        kind, detail = (fault.kind, fault.detail) if fault else ("", None)
        pending = (primary, secondary) in self._pending
        status = self.in_progress if pending else 200
        delay = float(detail) if kind == "merge-slow" else self.merge_delay
        if kind == "merge-refused-late":
            status, delay = detail
        if not pending:
            if self.merge_jobs is not None and len(self._pending) >= self.merge_jobs:
                raise Refused(self.busy_status, "another merge is in progress, try again later")
            if kind != "merge-never":
                self._pending.add((primary, secondary))
                left = detail if kind == "merge-leaves" else ()
                self.later(delay, lambda: self._carry_out(primary, secondary, left))
        if status != 200:
            problem = "a merge of these contacts is in progress already"
            raise Refused(status, problem if pending else "this can't be merged")

    def put_back(self, contact_id: str, reference: str | None) -> None:
        """Let something put a contact's former reference back, where the switches say so."""
        if self._put_back[contact_id] >= self.puts_back:
            return
        self._put_back[contact_id] += 1

        def act() -> None:
            if self.organisation.alive(contact_id):
                contact = self.organisation.contacts[contact_id]
                self.organisation.change(contact, external_ref=reference)

        self.later(self.puts_back_after, act)

    def set_quota(self, *quota: Any) -> None:
        self.quota = Quota(self._epoch, *quota)

    def _happen(self, moment: float) -> None:
        _, _, action = heapq.heappop(self._events)
        self.organisation.moment = moment
        try:
            action()
        finally:
            self.organisation.moment = None

    def _carry_out(self, primary: str, secondary: str, left: Collection[str] | None) -> None:
        self._pending.discard((primary, secondary))
        if self.organisation.alive(primary) and self.organisation.alive(secondary):
            if left is None:
                works = self.organisation.works.find([("anyone", [secondary])])
                left = [one["id"] for one in works[:1]]
            self.organisation.merge(primary, secondary, left)


SWITCHES = frozenset(
    name
    for name, value in vars(World).items()
    if name.islower() and name[0] != "_" and not callable(value)
)
