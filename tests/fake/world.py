"""What DevRev does, without sockets, threads or a clock of its own.

One implementation for two uses: `tests.sandbox` speaks it over HTTP on loopback, and a simulation calls it in
simulated time. It misbehaves on demand, and knows the truth afterwards: what was merged and when, which references
moved, and what every single request was. The same seed and the same calls give the same world.

    organisation = Organisation()
    primary = organisation.add_contact("1", "ada@example.com")
    secondary = organisation.add_contact("2", "ada@example.com", external_ref="user_2")
    world = World(organisation, clock=lambda: now)
    answer = world.respond("rev-users.merge", {"primary_user": primary, "secondary_user": secondary}, world.token)

What is known of DevRev only either way is a switch; each stands for the behaviour that most tests want. Any text may
hold half an emoji (HALF_EMOJI): answers carry it as the JSON escape that it is.

Merges (of a World, like all below unless an Organisation is named):
    merge_delay           seconds from a merge's acknowledgement until it is carried out
    merge_answer          the acknowledgement: 200, 202, 204, 200-empty and 202-empty (no body), 200-other, 200-list
    in_progress           status of a request for a merge that is pending already: 200, 400, 403 or 409
    unverified_merge      an unverified contact into a verified one: works, never (acknowledged), 400, 403, 409
    verified_merge        a verified contact into an unverified one: the same
    gone                  how rev-users.get answers for a contact that was merged, while lists tell the truth: 404, 301
                          (Location: the primary), state (deleted), primary (its record), shadow or unassigned (with a
                          primary_identity); and for good what tells nothing: locked, stale (as before the merge),
                          404-route, 404-other (of another type), 400, 403, 410, 500, 502, 503, shape, empty, hang, drip
                          stays: as what `stays` leaves
    gone_of               the same for single contacts, by id
    stays                 what a merged contact is afterwards, in lists and (with gone="stays") by its id: "" (gone),
                          locked, shadow, archived, deactivated, no-email, no-reference, own-reference, bare (neither),
                          as-before
    merge_jobs            how many merges DevRev carries out at a time; another is refused with busy_status (400, 409,
                          423, 425) and "try again later"
    gone_seconds          seconds of hang, and of each byte of drip
    moved_to, location    another base of the Location that a 301 names; the whole Location, which may be no URL
    Organisation.merge_moves_reference whether a merge gives the primary the secondary's reference (not a REVU-)
    Organisation.merge_joins           fields with several values that a merge joins, e.g. phone_numbers
Contacts:
    verified_shown        is_verified in answers: hidden, shown, null, mixed (contact by contact)
    verified_filter       is_verified as a filter: accepted, 400, 403
    hidden_fields         fields that answers leave out, e.g. external_refs, tags, custom_fields, phone_numbers
    refused_fields        fields that can't be set, everywhere or as e.g. rev-users.update.phone_numbers
    refused_status        the status of that: 400 (which names the field), 403, 409, …
    reference_updates     what an update of a reference is answered with: works, 400, 403, 409
    unchanged_updates     status of an update that changes nothing: 200, 400
    reference_lag         seconds for which answers (but an update's own) show a contact's former reference
    puts_back             how often something puts a contact's former reference back after an update (inf: always),
    puts_back_after       so many seconds later
    vanished              ids of contacts for which all is as if they did not exist; "*" for all
    account_rev_orgs      whether a contact can be made in a rev org that is an account
    unique_emails         whether a contact can't be made with an email that another has
    email_ignores_case    whether the filter email ignores case
    deleted_listed        whether lists show deleted and merged contacts
    deleted_contacts      how a deleted contact answers: 404, state
    Organisation.unverified            ids of contacts that are not verified (add_contact(verified=False))
    Organisation.visitors_verified     whether a contact that the application's widget makes is verified
    Organisation.unique_references     where a reference is unique: rev_org, organisation
    Organisation.unverified_keep_references  whether an unverified contact's reference stays its own until deleted
    Organisation.stuck_references, ref_release  references that merged contacts never, or only later, let go of
Lists:
    list_lag              seconds that lists of contacts, works and conversations lag behind
    max_ids               how many ids a filter may name
    thin_lists            patterns of the lists that have empty pages
    empty_pages           how many come before each page with items, or a function of endpoint and position
    largest_page          the most items of a page, whatever the limit that was asked for
    trailing_page         whether a list ends with an empty page
    paging                cursor; again (a page comes a second time in place of the next), overlap (each page begins with
                          the last item of the one before), offset (a list that changes while it is read shifts)
    paging_lists, paging_times   patterns of the lists of which that is so; how often it goes wrong (None: always)
    cursor_life           seconds after which a cursor is refused
Works:
    long_work_types       whether tasks, incidents and opportunities are listed and may be asked for
    unknown_kinds         kinds of these that `type` does not know all the same, e.g. incident
    unknown_kinds_answer  400 (with allowed_values and value), 400-bare, 403: of a list that names a kind it does not know
    hidden_kinds          kinds that the token may not read: of works, or conversation
    hidden_kinds_answer   a list that asks for such a kind: 403, left out
Refusals:
    bad_token             the type of the 401 for another token
    forbidden             patterns of endpoints that the token may not use
    restricted            ids of objects for which every request that names them is 403
    restricted_timelines, restricted_writes  ids whose timeline, or whose change, is 403
    restricted_in_lists   a list that would show a restricted object: shown, left out, 403
    names_object_ids      whether such a 403 names them
    firewall              words; a request with one of them is refused in HTML, with firewall_status (403, 406)
    max_bytes             of a request, more is 413
Quota:
    quota_rolls           whether the window rolls, its reset always a window after the request
    quota_whole_seconds   whether times are whole seconds (rounded up) in windows of less than a minute, too
    quota.others          what other clients spend of each window
    quota_share           the share of each window that another program of the same user takes, from 0 to 1
    quota_headers         whether answers carry X-Ratelimit-…
    retry_after           where a 429 says how long to wait: both, header, body, neither
What strikes single requests, once, often or always, is a Fault.
"""

from __future__ import annotations

import fnmatch
import functools
import heapq
import itertools
import random
from collections import Counter
from typing import (
    Any,
    Callable,
    Collection,
    Iterable,
    Mapping,
    NamedTuple,
)

from tests.fake.api import SHAPES, Api
from tests.fake.organisation import Organisation, Thing
from tests.fake.trouble import (
    AFTER_THE_ACT,
    BEFORE_THE_ACT,
    MERGE_MANNERS,
    ODD_POLLS,
    REFUSALS,
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


class Event(NamedTuple):
    """Something that is yet to happen."""

    due: float
    number: int
    action: Callable[[], Any]


class World:
    """An organisation, how DevRev serves it, and the books of who asked what.

    `clock` gives the seconds that everything here happens at, `epoch` (else the clock too) those of the quota's
    headers. `on_request(stage, request)` is called "before" and "after" each act. Everything else is a switch: an
    attribute that may be given by name here and be changed at any time. The module's docstring has them all.
    """

    GONE = ("404", "301", "state", "primary", "shadow", "unassigned")
    ODD = ("locked", "stale", *ODD_POLLS)
    CHOICES: Mapping[str, Collection[Any]] = {
        "gone": (*GONE, *ODD, "stays"),
        "stays": STAYS,
        "busy_status": (400, 409, 423, 425),
        "reference_updates": ("works", "400", "403", "409"),
        "unchanged_updates": (200, 400),
        "paging": ("cursor", "again", "overlap", "offset"),
        "unknown_kinds_answer": ("400", "400-bare", "403"),
        "merge_answer": ("200", "200-empty", "200-other", "200-list", "202", "202-empty", "204"),
        "unverified_merge": MERGE_MANNERS,
        "verified_merge": MERGE_MANNERS,
        "verified_shown": ("hidden", "shown", "null", "mixed"),
        "verified_filter": ("accepted", "400", "403"),
        "deleted_contacts": ("404", "state"),
        "retry_after": ("both", "header", "body", "neither"),
        "bad_token": ("unauthenticated", "token_expired", "token_revoked", "dev_org_deactivated"),
        "restricted_in_lists": ("shown", "left out", "403"),
        "hidden_kinds_answer": ("403", "left out"),
        "in_progress": (200, 400, 403, 409),
    }
    # Merges
    merge_delay = 0.3
    merge_answer = "200"
    in_progress = 200
    unverified_merge = "works"
    verified_merge = "works"
    gone = "404"
    stays = ""
    merge_jobs: int | None = None
    busy_status = 409
    gone_seconds: float | None = None
    moved_to = ""
    location: str | None = None
    # Contacts
    verified_shown = "hidden"
    verified_filter = "accepted"
    hidden_fields: Collection[str] = ()
    refused_fields: Collection[str] = ()
    refused_status = 400
    reference_updates = "works"
    unchanged_updates = 200
    reference_lag = 0.0
    puts_back = 0.0
    puts_back_after = 0.0
    vanished: Collection[str] = ()
    account_rev_orgs = False
    unique_emails = False
    email_ignores_case = False
    deleted_listed = False
    deleted_contacts = "404"
    # Lists
    list_lag = 0.0
    max_ids: int | None = None
    thin_lists: Collection[str] = ("timeline-entries.list",)
    empty_pages: int | Callable[[str, int], int] = 0
    largest_page: int | None = None
    trailing_page = False
    paging = "cursor"
    paging_lists: Collection[str] = ("*",)
    paging_times: int | None = None
    cursor_life: float | None = None
    # Works
    long_work_types = False
    unknown_kinds: Collection[str] = ()
    unknown_kinds_answer = "400"
    hidden_kinds: Collection[str] = ()
    hidden_kinds_answer = "403"
    # Refusals
    bad_token = "unauthenticated"
    forbidden: Collection[str] = ()
    restricted: Collection[str] = ()
    restricted_timelines: Collection[str] = ()
    restricted_writes: Collection[str] = ()
    restricted_in_lists = "shown"
    names_object_ids = True
    firewall: Collection[str] = ()
    firewall_status = 403
    max_bytes: int | None = None
    # Quota
    quota_share = 0.0
    quota_rolls = False
    quota_whole_seconds = False
    quota_headers = True
    retry_after = "both"

    def __init__(
        self,
        organisation: Organisation,
        clock: Callable[[], float],
        epoch: Callable[[], float] | None = None,
        *,
        token: str = "sandbox-token",
        quota: tuple[int, float] | None = None,
        faults: Iterable[Fault] = (),
        seed: int = 0,
        on_request: Callable[[str, Request], None] | None = None,
        **switches: Any,
    ) -> None:
        self.organisation = organisation
        self.clock = organisation.clock = clock
        self.token = token
        self.url = ""
        self.gone_of: dict[str, str] = {}
        self.faults: list[Fault] = list(faults)
        self._epoch = epoch or clock
        self.quota = Quota(*quota, self._epoch) if quota else None
        self.on_request = on_request
        for name, value in switches.items():
            if name not in SWITCHES:
                raise TypeError(f"{name} is no switch: one of {', '.join(sorted(SWITCHES))}")
            setattr(self, name, value)
        self.requests: list[Request] = []
        self.over_quota = 0
        self._chance = random.Random(seed)
        self._api = Api(self)
        self._pending: set[tuple[str, str]] = set()
        self.cursors: dict[str, float] = {}  # when each was given out
        self._put_back: Counter[str] = Counter()
        self._events: list[Event] = []
        self._numbers = itertools.count()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.CHOICES and value not in self.CHOICES[name]:
            raise ValueError(
                f"{name}: {value!r} is none of {', '.join(map(str, self.CHOICES[name]))}"
            )
        super().__setattr__(name, value)
        if name in ("quota_rolls", "quota_whole_seconds", "quota_share") and self.quota:
            setattr(self.quota, name[len("quota_") :], value)

    # ----- requests --------------------------------------------------------------------------------

    def respond(self, endpoint: str, body: Thing, token: str | None) -> Answer:
        """What comes back for a request that arrives now."""
        return self.answer(self.record(endpoint, body), token)

    def record(self, endpoint: str, body: Thing, started: float | None = None) -> Request:
        """Enter a request into the books."""
        self.catch_up()
        with self.organisation.lock:
            request = Request(
                len(self.requests) + 1, endpoint, body, self.clock() if started is None else started
            )
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
        request.ended = self.clock()
        self._tell("after", request)
        return answer

    def count(self, endpoint: str | None = None) -> int:
        """How many requests were made, in all or to an endpoint."""
        with self.organisation.lock:
            return sum(1 for r in self.requests if endpoint is None or r.endpoint == endpoint)

    def _decide(self, request: Request, token: str | None, problem: Refused | None) -> Answer:
        fault = self._pick_fault(request)
        if fault is not None and fault.kind in BEFORE_THE_ACT:
            return struck_before(fault)
        if token != self.token:
            answer = Refused(401, self.bad_token, "The token is not valid.").answer
        elif problem is not None:
            answer = problem.answer
        elif request.endpoint not in SHAPES:
            answer = route_not_found()
        elif any(fnmatch.fnmatchcase(request.endpoint, pattern) for pattern in self.forbidden):
            answer = Refused(403, "forbidden", "The token may not do that.").answer
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

    def _pick_fault(self, request: Request) -> Fault | None:
        for fault in list(self.faults):
            if fault.strikes(request, self._chance):
                request.fault = fault.kind
                return fault
        return None

    def _tell(self, stage: str, request: Request) -> None:
        if self.on_request is not None:
            self.on_request(stage, request)

    # ----- what happens later ----------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], Any]) -> None:
        """Let something happen at its time: a merge, or what others do."""
        with self.organisation.lock:
            heapq.heappush(
                self._events, Event(self.organisation.now() + seconds, next(self._numbers), action)
            )

    def next_due(self) -> float | None:
        """When the next thing happens of which is known already that it will."""
        return self._events[0].due if self._events else None

    def catch_up(self) -> None:
        """Let everything happen that is due, each at the moment it was due."""
        with self.organisation.lock:
            while self._events and self._events[0].due <= self.clock():
                self._happen(self._events[0].due)

    def settle(self) -> None:
        """Let everything happen that is pending, without waiting for its time."""
        with self.organisation.lock:
            while self._events:
                self._happen(min(self.clock(), self._events[0].due))

    def plan_merge(self, primary: str, secondary: str, fault: Fault | None) -> None:
        """Take a merge on, unless the same one is pending; Refused where a fault or `in_progress` says so."""
        kind, detail = (fault.kind, fault.detail) if fault else ("", None)
        pending = (primary, secondary) in self._pending
        status, delay = self.in_progress, self.merge_delay
        if kind == "merge-slow":
            delay = 5.0 if detail is None else float(detail)
        if kind == "merge-refused-late":
            status, delay = detail if isinstance(detail, tuple) else (detail or 400, delay)
        is_busy = self.merge_jobs is not None and len(self._pending) >= self.merge_jobs
        if is_busy and not pending:
            message = "another merge is in progress, try again later"
            raise Refused(self.busy_status, REFUSALS[str(self.busy_status)][1], message)
        if kind != "merge-never" and not pending:
            self._pending.add((primary, secondary))
            left = detail if kind == "merge-leaves" else ()
            self.later(delay, lambda: self._carry_out(primary, secondary, left))
        if status != 200 and (pending or kind == "merge-refused-late"):
            message = (
                "a merge of these contacts is in progress already"
                if pending
                else "this can't be merged"
            )
            raise Refused(status, REFUSALS[str(status)][1], message)

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

    def set_quota(self, limit: int, window: float, **more: Any) -> None:
        """Let DevRev have a quota from now on: so many units in a window of so many seconds."""
        self.quota = Quota(limit, window, self._epoch, **more)
        for name in ("quota_rolls", "quota_whole_seconds", "quota_share"):
            setattr(self, name, getattr(self, name))

    def _happen(self, moment: float) -> None:
        event = heapq.heappop(self._events)
        self.organisation.moment = moment
        try:
            event.action()
        finally:
            self.organisation.moment = None

    def _carry_out(self, primary: str, secondary: str, left: Collection[str] | None) -> None:
        self._pending.discard((primary, secondary))
        if self.organisation.alive(primary) and self.organisation.alive(secondary):
            if left is None:
                left = [self.organisation.first_work_of(secondary) or ""]
            self.organisation.merge(primary, secondary, left)


SWITCHES = frozenset(
    name
    for name, value in vars(World).items()
    if name.islower() and name[0] != "_" and not callable(value)
) | {"gone_of"}
