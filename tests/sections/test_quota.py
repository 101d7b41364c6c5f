"""The request scheduler against servers that count a quota in different ways, in simulated time."""

import asyncio
import contextlib
import math
import random
import re
from collections import deque
from email.utils import formatdate
from typing import Any, Dict, List, Optional, Tuple

import pytest

import merge_contacts as tool
from tests.fake.trouble import QUOTA_HEADERS, Quota
from tests.simulation.world import EPOCH, Clock, Headers, Loop, run_to_the_end


class Server:
    """Answers as far as its quota goes; `skew`: how far its clock is off."""

    def __init__(self, clock: Clock, *quota: Any, skew: float = 0.0, **more: Any) -> None:
        self.time = lambda: EPOCH + clock.now + skew
        self.quota = Quota(self.time, *quota, **more)
        self.least_remaining = self.quota.limit
        self.refused = 0

    def answer(self) -> "tool.HttpResponse":
        headers, refusal = self.quota.take()
        headers["Date"] = formatdate(self.time(), usegmt=True)
        self.least_remaining = min(self.least_remaining, int(headers["X-Ratelimit-Remaining"]))
        if not refusal:
            return tool.HttpResponse(200, Headers(headers), {})
        self.refused += 1
        return tool.HttpResponse(429, Headers(headers), None)


class Told:
    """A server that answers as it is told, then well, or as the last answer `for_ever`."""

    def __init__(self, clock: Clock, *answers: Any, for_ever: bool = False) -> None:
        self.clock, self.answers, self.for_ever = clock, deque(answers), for_ever
        self.arrived: List[float] = []

    def answer(self) -> "tool.HttpResponse":
        self.arrived.append(self.clock.now)
        if not self.answers:
            return tool.HttpResponse(200, {}, {})
        status, headers, data = self.answers[0] if self.for_ever else self.answers.popleft()
        return tool.HttpResponse(status, Headers(headers), data)


class World:
    """A scheduler in simulated time."""

    def __init__(self, calls: Optional[int] = 0, workers: int = 8, period: float = 60.0) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        asyncio.set_event_loop(self.loop)
        settings = tool.ApiSettings("token", calls=calls, workers=workers, period=period)
        environment = tool.Environment(settings)
        environment.now = lambda: tool.Timestamp(self.clock.wall, self.clock.steady)  # type: ignore[method-assign]
        self.token = tool.CancelToken()
        self.scheduler = tool.RequestScheduler(environment, self.token, settings)
        self.random = random.Random(1)

    def run(self, main: Any) -> Any:
        return run_to_the_end(self.loop, main)

    async def request(
        self, server: Any, options: "tool.RequestOptions" = tool.ANY_OPTIONS, latency: float = 0.02
    ) -> Any:
        """Send one request when its turn has come; the server counts it somewhere on its way."""
        await self.scheduler.acquire(options)
        self.clock.last_progress = self.clock.now
        await asyncio.sleep(latency * self.random.random())
        response = server.answer()
        await asyncio.sleep(latency * self.random.random())
        self.scheduler.on_response(response, response.status == 200)
        return response

    def send(self, server: Any, count: int, latency: float = 0.02) -> float:
        """Send so many requests, and return the seconds that they took."""

        async def all_of_them() -> None:
            await self.request(server)
            await asyncio.gather(*(self.request(server, latency=latency) for _ in range(count - 1)))

        self.run(all_of_them())
        return self.clock.now


@pytest.mark.parametrize("rolling", [False, True], ids=["fixed", "rolling"])
@pytest.mark.parametrize(
    "limit, window, latency",  # from a minute on, a reset is in whole seconds
    [(40, 4.0, 0.02), (40, 4.0, 0.5), (100, 10.0, 0.05), (6, 2.0, 0.01), (800, 60.0, 0.01),
     (40, 60.0, 0.02), (40, 60.0, 0.5), (6, 60.0, 0.01)],
)  # fmt: skip
def test_a_window_is_never_overdrawn_and_used_a_fixed_one_fully_a_rolling_one_by_half(
    limit: int, window: float, latency: float, rolling: bool
) -> None:
    world = World()
    server = Server(world.clock, limit, window, rolls=rolling)
    count = limit * 3 if limit > 100 else limit * 6
    seconds = world.send(server, count, latency)
    assert server.refused == 0
    floor = (count / limit - 1) * window
    each = 4 * latency + 0.1 + (1.0 if window >= 60 else 0.0)  # that a window may be longer
    share = 1.1 if limit > 10 else 1.25
    if rolling:
        share = 2.0
    assert seconds <= share * floor + count / limit * each + 8 * latency
    seen = world.scheduler.quota_seen()
    assert seen and seen["limit"] == limit and window <= seen["window_seconds"] <= window + 1.1


@pytest.mark.parametrize("skew", [-3600.0, -30.0, 30.0, 7200.0])
@pytest.mark.parametrize("rolling", [False, True])
def test_a_clock_that_is_off_costs_seconds_at_most(rolling: bool, skew: float) -> None:
    world = World()
    server = Server(world.clock, 40, 60.0, rolls=rolling, skew=skew)
    assert world.send(server, 200) < 4 * 60 + 5 * 3
    assert server.refused <= 8


TEXTS = ["-1", "", "none", "1" + "0" * 400, "1e400", "nan", "\u0663", "0x10", "12.5.1"]
# Some gateways send seconds from now, by which nothing is known of a window.
ODD = [("X-Ratelimit-Reset", "60"), ("X-Ratelimit-Limit", "0")]
ODD += [(name, text) for name in QUOTA_HEADERS for text in TEXTS]


@pytest.mark.parametrize("name, text", ODD)
def test_odd_headers_are_ignored(name: str, text: str) -> None:
    world = World()
    headers = {**dict(zip(QUOTA_HEADERS, ("1000", "999", str(EPOCH + 60)))), name: text}
    assert world.send(Told(world.clock, (200, headers, {}), for_ever=True), 50) < 1.0
    assert world.scheduler.quota_seen() is None and world.scheduler.quota.room(0) == math.inf


def test_the_answer_with_the_latest_reset_counts_and_none_for_more_than_ten_minutes() -> None:
    window = tool.QuotaWindow()
    for remaining, reset, room in (
        (50, 60.25, 49), (60, 60.25, 49), (5, 30.25, 49), (90, 90.25, 89), (95, 91, 89)
    ):  # fmt: skip
        values = ("100", str(remaining), str(EPOCH + reset))
        answer = tool.HttpResponse(200, Headers(zip(QUOTA_HEADERS, values)), {})
        window.on_response(answer, 0.0, EPOCH)
        assert window.room(1) == room
    assert not window.has_ended(90.25)
    values = ("100", "0", str(EPOCH + 7200))
    window.on_response(tool.HttpResponse(200, Headers(zip(QUOTA_HEADERS, values)), {}), 0.0, EPOCH)
    assert not window.has_ended(600) and window.has_ended(600.02) and window.room(1) == math.inf


@pytest.mark.parametrize("nap, waits, is_fresh", [(0, 0.2, True), (1, 0, False), (0, 0.3, False)])
def test_a_write_rests_on_a_read_of_this_moment(nap: float, waits: float, is_fresh: bool) -> None:
    world = World()
    environment = world.scheduler.environment
    sent = environment.now()
    world.clock.nap(nap)  # while its answer was on its way
    read = tool.FreshRead(environment, sent)
    world.clock.advance(waits)
    stops = contextlib.nullcontext() if is_fresh else pytest.raises(tool.PreconditionsExpired)
    with stops:
        read.require()


@pytest.mark.parametrize("calls, period, limit", [(None, 60.0, 200), (10, 2.0, 10), (0, 60.0, 450)])
def test_the_client_side_limit_holds_where_no_quota_is_announced(
    calls: Optional[int], period: float, limit: int
) -> None:
    world = World(calls, period=period)
    least = period * (math.ceil(450 / limit) - 1)
    assert least - 0.1 <= world.send(Told(world.clock), 450) < least + 3


def test_with_nothing_set_the_announced_quota_is_followed_and_a_fifth_left_to_others() -> None:
    world = World(None)
    server = Server(world.clock, 4000, 60.0)
    assert world.send(server, 3000) < 20, "not held to 200 a minute"
    world = World(None)
    server = Server(world.clock, 50, 5.0)
    world.send(server, 200)
    assert server.refused == 0 and server.least_remaining == 10
    assert world.scheduler.others == world.scheduler.OTHERS, "its own requests are no other's"


@pytest.mark.parametrize("used, count, left", [(85, 30, 5), (96, 3, 3)])
def test_where_others_leave_less_than_their_share_a_twentieth_is_left_to_them(
    used: int, count: int, left: int
) -> None:
    world = World(None)
    server = Server(world.clock, 100, 10.0, others=used)
    seconds = world.send(server, count)
    assert server.refused == 0 and server.least_remaining == left
    assert seconds < 55 or used == 96, "even a twentieth is more than what is there"
    world.scheduler.waiting_for = world.scheduler.QUOTA
    world.scheduler.wait_ends = world.clock.steady + 7
    words = "waiting 7 s .*other programs use; a twentieth is left"
    assert re.match(words, tool.describe_wait(world.scheduler))
    world.scheduler.waiting_for = world.scheduler.FAILURES
    assert tool.describe_wait(world.scheduler) == "waiting 7 s (DevRev fails)"


def test_what_finishes_a_merge_is_no_sign_that_others_leave_enough() -> None:
    world = World(None)
    server = Server(world.clock, 100, 10.0, others=85)

    async def main() -> None:
        await world.request(server)
        held = [asyncio.ensure_future(world.request(server)) for _ in range(2)]
        await asyncio.sleep(11)  # the first has found out that the second window is no better
        await world.request(server, tool.RequestOptions(tool.FINISH))
        await asyncio.gather(*held)

    world.run(main())
    assert world.scheduler.others == world.scheduler.FEWER


def test_an_interrupted_wait_counts_and_failures_are_no_wait_for_quota() -> None:
    world = World(0, workers=1)
    server = Told(world.clock, (429, {"Retry-After": "100"}, None))

    async def main() -> None:
        waits = asyncio.ensure_future(world.request(server))
        waits_too = asyncio.ensure_future(world.request(server))
        await asyncio.sleep(13)
        waits.cancel()
        waits_too.cancel()

    world.run(main())
    assert 12 <= world.scheduler.quota_wait_seconds() <= 13.1
    world = World(0)
    world.send(Told(world.clock, *[(503, {}, None)] * 10), 40)
    assert world.clock.now > 2 and world.scheduler.quota_wait_seconds() == 0


ONE, TWO = ("primary", "one"), ("primary", "two")
MERGES = [tool.RequestOptions(tool.MERGE, 5, one) for one in (ONE, TWO)]
FINISHES = tool.RequestOptions(tool.FINISH, 5, ONE)


def test_only_what_finishes_a_merge_goes_into_the_share_of_others() -> None:
    world = World(None, workers=1)
    server = Server(world.clock, 50, 100.0)

    async def main() -> Tuple[float, float]:
        await asyncio.gather(*(world.request(server) for _ in range(39)))
        await world.request(server, MERGES[0])
        held = asyncio.ensure_future(world.request(server))
        begun = world.clock.now
        for _ in range(3):
            await world.request(server, FINISHES)
        world.scheduler.end_merge(ONE)
        await world.request(server, tool.RequestOptions(tool.FINISH))
        finished = world.clock.now
        await held
        return finished - begun, world.clock.now - begun

    seconds, until_released = world.run(main())
    assert seconds < 1 and until_released > 90


@pytest.mark.parametrize("calls, units", [(0, 5), (3, 3)])
def test_what_a_merge_in_flight_needs_is_spent_by_no_other_request(calls: int, units: int) -> None:
    world = World(calls, workers=1, period=1.0)
    server = Server(world.clock, 20, 50.0)

    async def main() -> float:
        await asyncio.gather(*(world.request(server) for _ in range(20 - units)))
        await world.request(server, MERGES[0])
        kinds = [tool.ANY_OPTIONS] * 5 + [tool.RequestOptions(tool.FINISH)]
        others = [asyncio.ensure_future(world.request(server, one)) for one in kinds]
        await asyncio.sleep(0)  # they queue up
        begun = world.clock.now
        for _ in range(units - 1):
            await world.request(server, FINISHES)
        finished = world.clock.now - begun
        world.scheduler.end_merge(ONE)
        await asyncio.gather(*others)
        return finished

    assert world.run(main()) < 1 and server.refused == 0


def test_what_proves_a_merge_spends_the_units_that_it_holds() -> None:
    world = World(0, workers=1)
    server = Server(world.clock, 20, 50.0)

    async def main() -> float:
        await asyncio.gather(*(world.request(server) for _ in range(15)))
        await world.request(server, MERGES[0])
        world.scheduler.proving.add(ONE)
        begun = world.clock.now
        for _ in range(4):
            await world.request(server, tool.RequestOptions(tool.FINISH))
        return world.clock.now - begun

    assert world.run(main()) < 1


def test_a_merge_is_sent_only_where_the_window_covers_it_and_those_in_flight() -> None:
    world = World(0, workers=4)
    server = Server(world.clock, 40, 50.0)

    async def main() -> List[float]:
        await asyncio.gather(*(world.request(server) for _ in range(31)))
        sent = []
        for merge in MERGES:
            await world.request(server, merge)
            sent.append(world.clock.now)
        return sent

    first, second = world.run(main())
    assert first < 5 and second > 45 and server.refused == 0


def test_lists_leave_a_worker_to_what_finishes_a_merge() -> None:
    world = World(0, workers=2)
    server = Told(world.clock)

    async def main() -> float:
        await world.request(server, MERGES[0])
        lists = [asyncio.ensure_future(world.request(server, latency=99)) for _ in range(2)]
        await asyncio.sleep(0)  # they queue up
        begun = world.clock.now
        await world.request(server, FINISHES)
        finished = world.clock.now - begun
        world.scheduler.end_merge(ONE)
        await asyncio.gather(*lists)
        return finished

    assert world.run(main()) < 1


def test_the_more_urgent_request_goes_first() -> None:
    world = World(0, workers=1)
    order: List[int] = []

    async def one(priority: int) -> None:
        await world.request(Told(world.clock), tool.RequestOptions(priority))
        order.append(priority)

    async def main() -> None:
        await asyncio.gather(*map(one, (4, 3, 4, 2, 0, 1, 0)))

    world.run(main())
    assert order == [4, 0, 0, 1, 2, 3, 4]  # the first had left before the others came


@pytest.mark.parametrize(
    "headers, data, least, most",
    [
        ({"Retry-After": "7"}, None, 7, 7.5),
        ({"Retry-After": "86400"}, None, 3600, 3601),
        ({}, {"retry_after": 7}, 7, 7.5),
        ({"Retry-After": "soon"}, {"retry_after": 7}, 7, 7.5),
        ({"Retry-After": "7"}, {"retry_after": 70}, 7, 7.5),
        ({"Retry-After": "-5"}, {"retry_after": -5}, 0.1, 1),
        ({"Retry-After": "1" + "0" * 400}, {"retry_after": 10**400}, 0.1, 1),
        ({}, {"retry_after": {"seconds": 7}}, 0.1, 1),
        ({}, None, 0.1, 1),
    ],
)
def test_a_429_says_how_long_to_wait(
    headers: Dict[str, str], data: Any, least: float, most: float
) -> None:
    world = World(0)
    server = Told(world.clock, (429, headers, data))
    world.send(server, 3)
    assert least <= server.arrived[1] - server.arrived[0] <= most


def test_after_failures_in_a_row_one_probe_at_a_time_finds_out() -> None:
    world = World(0)
    server = Told(world.clock, *[(503, {}, None)] * 10)
    world.send(server, 40)
    assert world.token.stop is None
    gaps = [later - earlier for earlier, later in zip(server.arrived[7:10], server.arrived[8:11])]
    assert all(gap >= 0.5 for gap in gaps), gaps


@pytest.mark.parametrize(
    "answer, word, seconds", [((503, {}, None), "keeps failing", 60), ((429, {}, None), "429", 600)]
)
def test_a_server_that_is_down_for_good_ends_the_run(answer: Any, word: str, seconds: int) -> None:
    world = World(0)
    server = Told(world.clock, answer, for_ever=True)
    with pytest.raises(tool.Cancelled):
        world.send(server, 200)
    assert world.token.stop and word in str(world.token.stop) and len(server.arrived) < 60
    assert world.clock.now < seconds


# After so many answers, for how long each of them opens the breaker; the next ends the run.
PAUSES = [
    (0, None, [0.0, 0.0, 0.5]),
    (5, 503, [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]),
    (5, 429, [min(30.0, 0.5 * 2**number) for number in range(20)]),
]


@pytest.mark.parametrize("retries, status, pauses", PAUSES)
def test_failures_open_the_breaker_for_ever_longer_and_a_good_answer_closes_it(
    retries: int, status: Optional[int], pauses: List[float]
) -> None:
    breaker = tool.CircuitBreaker(retries)
    now = 0.0
    for pause in pauses:
        assert breaker.on_response(status, 0.0, now) == ""
        assert max(0.0, breaker.open_until - now) == pytest.approx(pause)
        now = max(now, breaker.open_until)
    assert breaker.on_response(status, 0.0, now) != ""
    breaker.on_response(200, 0.0, breaker.open_until)
    assert not breaker.is_tripped


def test_what_had_left_before_a_429_tells_nothing_but_a_longer_wait() -> None:
    breaker = tool.CircuitBreaker(5)
    for now, status, pause in ((0, 429, 5), (1, 429, 9), (2, 429, 1), (3, 503, 0), (3, 200, 0)):
        assert breaker.on_response(status, pause, now) == ""
    assert breaker.open_until == 10 and breaker.is_tripped
    assert (breaker.over_quota_in_a_row, breaker.failures_in_a_row) == (1, 0)


def test_a_request_that_is_not_sent_gives_its_slot_back() -> None:
    world = World(0, workers=1)

    async def main() -> None:
        for _ in range(20):
            await world.scheduler.acquire(tool.ANY_OPTIONS)
            world.scheduler.give_back()
        await world.request(Told(world.clock))

    world.run(main())


def test_what_is_left_of_the_quota_is_told() -> None:
    world = World(None)
    server = Server(world.clock, 1000, 100.0)
    world.send(server, 300)
    assert tool.requests_per_minute(world.scheduler) == 800
    assert tool.requests_per_minute(World(10, period=30.0).scheduler) == 20
    assert tool.describe_wait(world.scheduler) == "700 of 1000 units left"
