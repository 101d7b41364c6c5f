"""The states of a pair against what DevRev can answer: a table, without a server, in milliseconds.

What a script names is answered by it instead of by a fake DevRev with two contacts and one ticket:
`poll=there,404` shows the duplicate once, then a 404 for good. A write is carried out at 200, and
at an answer that ends in `!`.
"""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import pytest

import merge_contacts as tool
from merge_contacts import HttpResponse, Pair, State
from tests.simulation.world import Clock, Loop, run_to_the_end

DON = "don:identity:dvrv-us-1:devo/ORG:revu/"
P, D, Z, TICKET = DON + "P", DON + "D", DON + "Z", "don:core:dvrv-us-1:devo/ORG:ticket/1"
EMAIL = "person@example.com"


def user(identity: str, **fields: Any) -> dict[str, Any]:
    short = "REVU-" + identity[-1]
    reference = "user_1" if identity == D else short
    about = {"id": identity, "display_id": short, "email": EMAIL, "external_ref": reference}
    return {**about, "state": "active", "is_verified": True, **fields}


# What a script may show in place of a contact, or answer.
SHOWN = {
    "there": user(D, description="prefers email"),
    "locked": user(D, state="locked"),
    "deleted": user(D, state="deleted"),
    "shadow": user(D, state="shadow", primary_identity={"id": P}),
    "elsewhere": user(D, state="shadow", primary_identity={"id": Z}),
    "unverified": user(D, is_verified=False),
    "unknown": user(D, is_verified=None),
    "old": user(P),
    "moved": user(P, external_ref="user_1"),
    "hand": user(P, external_ref="hand"),
    "another": user(Z, external_ref="user_1", email="another@example.com"),
    "second": user(Z, external_ref="user_2"),
}
ANSWERS = {str(status): HttpResponse(status, {}, {}, str(status)) for status in range(400, 505)}
ANSWERS["404"] = HttpResponse(404, {}, {"type": "not_found"}, "404")
ANSWERS["route"] = HttpResponse(404, {}, {"message": "route not found"}, "route not found")
ANSWERS["301"] = HttpResponse(301, {"Location": f"/{P}"}, None)
ANSWERS["odd"] = HttpResponse(200, {}, {})
ANSWERS["lost"] = HttpResponse(None, {}, None, "the connection broke")
# How requests are called here, and what their answers hold.
NAMES = {
    "rev-users.merge": ("merge", ""),
    "rev-users.update": ("set", "rev_user"),
    "rev-users.get": ("read", "rev_user"),
    "rev-users.list": ("emails", "rev_users"),
    "works.list": ("works", "works"),
    "works.get": ("work", "work"),
    "conversations.list": ("talks", "conversations"),
    "timeline-entries.list": ("timeline", "timeline_entries"),
    "dev-users.self": ("probe", "dev_user"),
}


class FakeDevRev(tool.Environment):
    """Two contacts, a ticket of the duplicate's, a clock that jumps, and a savepoint in memory."""

    run, failure = "20260101_000000", None  # of the savepoint

    def __init__(self) -> None:
        super().__init__(tool.ApiSettings(token="token", calls=0, retries=2))
        self.random = random.Random(1)
        self.clock = Clock()
        self.script: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.contacts = {P: user(P), D: SHOWN["there"]}
        self.reporter = D
        self.forget: Any = None
        self.saved: dict[str, Any] = {}
        self.api = tool.DevRevAPI(self.settings, self, tool.CancelToken())

    def now(self) -> Any:
        return tool.Timestamp(self.clock.wall, self.clock.steady)

    def run_event_loop(self, work: Any) -> Any:
        return run_to_the_end(Loop(self.clock), work)

    async def run_in_thread(self, job: Any, *args: Any) -> Any:
        return job(*args)

    def fsync_file(self, file: Any) -> None:
        file.flush()

    async def save(self, pair: Pair, **_: Any) -> None:
        self.saved = pair.to_json()
        if "save" in self.script:
            self.failure = tool.FatalError(3, "one of the files can't be written any more")

    async def post(self, endpoint: str, body: Any, deadline: float | None = None) -> Any:
        name, key = NAMES[endpoint]
        if endpoint == "rev-users.get" and body["id"] == D:
            name = "poll"
        elif "is_verified" in body:
            name = "unverified"
        elif endpoint == "rev-users.list" and "external_ref" in body:
            name = "holders"
        self.asked.append(name)
        if len(self.asked) > 1000:
            raise AssertionError(f"without an end: {self.asked[-9:]}")
        self.clock.last_progress = self.clock.now
        await asyncio.sleep(0.05)
        if name == "merge":
            self.check_intent(body)
        told = self.script.get(name, ["200"])
        answer = told.pop(0) if len(told) > 1 else told[0]
        if answer == "stop":
            self.api.cancel_token.cancel(tool.Cancelled())
        elif answer == "forget":
            self.forget()
        elif answer.startswith("nap"):
            self.clock.nap(float(answer[3:]))
        bare = answer.rstrip("!")
        shown = [SHOWN[one] for one in bare.split("+") if one in SHOWN]
        is_scripted = bare in ANSWERS or bare == "nobody" or shown
        if answer != bare or not is_scripted:
            self.act(name, body)
        if bare in ANSWERS:
            return ANSWERS[bare]
        if not is_scripted:
            shown = self.there(name, body)
        if key.endswith("s"):
            return HttpResponse(200, {}, {key: shown})
        return HttpResponse(200, {}, {key: shown[0]}) if shown else ANSWERS["404"]

    def act(self, name: str, body: Any) -> None:
        if name == "merge":
            self.contacts.pop(D, None)
            self.reporter = P
        elif name == "set":
            assert body["id"] == P
            self.contacts[P].update(body)

    def there(self, name: str, body: Any) -> list[Any]:
        """What there is of what a request asks for."""
        contacts = [*self.contacts.values()]
        ticket = {"id": TICKET, "type": "ticket", "reported_by": [{"id": self.reporter}]}
        if name in ("poll", "read", "set"):
            return [one for one in contacts if one["id"] == body["id"]]
        if name == "holders":
            return [one for one in contacts if one["external_ref"] in body["external_ref"]]
        if name == "works":
            return [ticket] if self.reporter in body.get("reported_by", ()) else []
        found = {"emails": contacts, "work": [ticket], "probe": [{"id": P}], "merge": [{}]}
        return found.get(name, [])

    def check_intent(self, body: Any) -> None:
        """What is requested is in the savepoint, and its backup whole and not too old."""
        assert body == {"primary_user": P, "secondary_user": D}
        row = self.saved
        assert row["state"] == "requested" and abs(row["requested_at"] - self.clock.wall) < 0.1
        backup = tool.verify_backup(row["backup"])
        assert backup.sha256 == row["manifest_sha256"] and backup.holdings == row["backed_up"]
        assert backup.manifest["created"] > tool.iso(self.clock.wall - 120)


class Played:
    """One pair, played to the end of a run."""

    def __init__(self, text: str) -> None:
        parts = [part.partition("=") for part in text.split()]
        script = {name: answers.split(",") for name, _, answers in parts}
        (left,) = script.pop("from", ["planned"])
        given = script.pop("with", [])
        self.devrev = devrev = FakeDevRev()
        rows = [{"id": one, "email": EMAIL, **user(one)} for one in (P, D)]
        primary, duplicate = (tool.Contact.from_json(row) for row in rows)
        duplicate.tickets = 1
        self.pair = pair = Pair(primary, duplicate, None if "no-reference" in given else "user_1")
        names = [one for one in given if one != "no-reference"]
        options = tool.MergeOptions("ORG", merge_timeout=20.0, **dict.fromkeys(names, True))
        plan = tool.Plan(wanted={} if "wanted" in script else {pair.ids: pair})
        self.merger = merger = tool.ContactMerger(devrev.api, devrev, options, lambda _: None, plan)
        run = tool.GroupRun(merger, tool.Group(EMAIL, [pair]), [pair], resumed=left != "planned")
        devrev.forget = run.forget_preconditions  # as another pair of the group does

        async def play() -> None:
            if left != "planned":
                await run.preconditions.ensure_fresh()
                run.preconditions.note_backup(pair)
                run.forget_preconditions()
                pair.requested_at = pair.first_requested_at = devrev.now().wall
                pair.move_to(State(left.rstrip("!")))
                if left.endswith("!"):
                    devrev.act("merge", {})
                if pair.state is State.VERIFYING:
                    devrev.act("set", {"id": P, "external_ref": "user_1"})
                devrev.clock.advance(1.0)
                devrev.asked.clear()
            devrev.script = script
            merger.start(run.run(), run.pairs)
            await merger.wait_all()

        merger.total = 1
        self.code = devrev.run_event_loop(merger.run(play()))

    def __str__(self) -> str:
        """State, code, exit code, and the requests; what comes again and again stands once."""
        lists = ("emails", "works", "talks", "timeline", "unverified")
        names = (one for one in self.devrev.asked if one != "probe")
        asked = "".join("lists " if one in lists else f"{one} " for one in names)
        asked = re.sub(r"\b(\w+ )\1+", r"\1", asked)
        asked = re.sub(r"\b((?:\w+ ){2,6}?)\1+", lambda found: f"({found[1].strip()})+ ", asked)
        words = [self.pair.state.value, *{self.pair.code} - {self.pair.state.value, ""}]
        words += [f"exit {self.code}"] if self.code > 1 else []
        return f"{' '.join(words)}: {asked.strip()}"


# script -> state, code, and the exit code where it is neither 0 nor 1: requests
CASES = """
# the request
                         -> done: lists merge poll set lists
merge=odd!               -> done: lists merge poll set lists
merge=400                -> requested merge_refused: lists merge poll
merge=400!               -> done: lists merge poll set lists
merge=403                -> requested interrupted exit 2: lists merge poll
merge=403 poll=400       -> requested interrupted exit 3: lists merge poll
merge=403!               -> done: lists merge poll set lists
merge=404                -> requested merge_refused: lists merge read poll
merge=404!               -> done: lists merge read poll work lists poll set lists
merge=404! poll=301      -> done: lists merge read poll set lists
merge=404 poll=elsewhere -> merged_elsewhere: lists merge read poll
merge=404 poll=deleted   -> merged_elsewhere: lists merge read poll work
merge=route poll=elsewhere -> requested merged_into_another: lists merge poll
merge=409                -> requested merge_refused: lists (merge poll)+
merge=409,423,200        -> done: lists (merge poll)+ set lists
merge=422,200            -> requested merge_refused: lists merge poll
merge=429,200            -> done: lists merge poll set lists
merge=429                -> failed stale: (lists merge)+
merge=500 -> requested merge_not_confirmed: lists (merge poll lists read lists poll)+ merge poll
merge=500!               -> done: lists merge poll set lists
merge=500,200            -> done: lists merge poll lists read lists poll merge poll set lists
merge=lost -> requested merge_not_confirmed: lists (merge poll lists read lists poll)+ merge poll
merge=lost,200           -> done: lists merge poll lists read lists poll merge poll set lists
merge=lost!              -> done: lists merge poll set lists
merge=stop               -> proving interrupted exit 3: lists merge poll set
timeline=stop            -> planned exit 3: lists
save=fails               -> planned exit 3: lists
# the polls
poll=there               -> acknowledged merge_not_confirmed: lists merge poll
poll=there,there,404     -> done: lists merge poll set lists
poll=deleted             -> done: lists merge poll set lists
poll=301                 -> done: lists merge poll set lists
poll=old             -> done: lists merge poll set lists
poll=shadow              -> done: lists merge poll set lists
poll=elsewhere           -> acknowledged merged_into_another: lists merge poll
poll=locked              -> done: lists merge poll work lists set lists
merge=lost! poll=locked  -> done: lists merge poll work lists set lists
merge=lost poll=locked -> requested not_active: lists merge (poll work)+ lists read lists poll work
merge=odd poll=locked    -> acknowledged merge_not_confirmed: lists merge (poll work)+
poll=route               -> acknowledged api_error: lists merge poll
poll=400                 -> done: lists merge poll lists holders work lists set lists
poll=odd                 -> done: lists merge poll lists holders work lists set lists
poll=403                 -> done: lists merge poll lists holders work lists set lists
poll=500                 -> done: lists merge poll lists holders work lists set lists
poll=lost                -> done: lists merge poll lists holders work lists set lists
poll=500,500,404         -> done: lists merge poll set lists
merge=lost poll=400      -> requested api_error: lists merge (poll lists)+
poll=400 emails=there+old,nobody -> acknowledged api_error: lists merge (poll lists)+
poll=400 holders=there   -> acknowledged api_error: lists merge (poll lists holders)+
poll=401                 -> acknowledged interrupted exit 3: lists merge poll
poll=stop,there,404      -> proving interrupted exit 3: lists merge poll set
# the reference
set=400               -> merged external_ref_not_set: lists merge poll set read
set=400!              -> done: lists merge poll set read lists
set=403               -> merged forbidden: lists merge poll set read
set=404               -> acknowledged not_found: lists merge poll set read poll
set=409 -> merged external_ref_conflict: lists merge poll (set read poll holders)+
set=409!              -> done: lists merge poll set read lists
set=409,200 holders=another -> merged external_ref_conflict: lists merge poll set read poll holders
emails=there+old     -> proving still_listed: lists merge poll set (lists poll)+ read
emails=there+old,old read=old -> merged reference_reverted: lists merge poll set lists read set read
set=409,200 holders=500 -> done: lists merge poll set read poll holders set lists
merge=odd poll=404,there set=409 -> acknowledged merge_not_confirmed: lists merge poll set read poll
set=429,200           -> done: lists merge poll set lists
set=500               -> merged api_error: lists merge poll (set read)+
set=500,200           -> done: lists merge poll set read set lists
set=lost!             -> done: lists merge poll set read lists
set=old,200       -> merged external_ref_not_set: lists merge poll set
set=400 read=404      -> acknowledged not_found: lists merge poll set read poll
set=400 read=deleted  -> acknowledged not_found: lists merge poll set read poll
set=400 read=hand  -> merged external_ref_changed: lists merge poll set read
set=400 read=500      -> merged external_ref_not_set: lists merge poll set read
emails=old+there,hand read=hand -> proving external_ref_changed: lists merge poll set lists read
emails=there+old,nobody read=404 -> acknowledged not_found: lists merge poll set lists read poll
emails=there+old,nobody read=404 with=no-reference -> acknowledged not_found: \
lists merge poll lists read poll
# left by an earlier run
from=requested           -> done: poll lists read lists poll merge poll set lists
from=requested!          -> done: poll read set lists
from=requested merge=400 -> requested merge_refused: poll lists read lists poll merge poll
from=requested poll=400  -> requested api_error: (poll lists)+
from=requested poll=elsewhere -> requested merged_into_another: poll
from=requested poll=locked -> requested not_active: (poll work)+ lists read lists poll work
from=requested wanted=no -> requested plan_changed: poll
from=requested! wanted=no -> done: poll read set lists
from=requested works=500 -> requested api_error: poll lists read lists poll
from=acknowledged        -> done: poll lists read lists poll merge poll set lists
from=acknowledged!       -> done: poll read set lists
from=acknowledged poll=500 -> acknowledged api_error: (poll lists)+
from=acknowledged! poll=500 -> done: poll lists holders work lists read set lists
from=acknowledged! poll=locked -> done: poll work lists read set lists
from=merged!             -> done: read set lists
from=merged! read=moved  -> done: read lists read
from=merged! read=hand -> merged external_ref_changed: read
from=merged! read=404    -> merged not_found: read
from=merged! read=400    -> merged api_error: read
from=merged! read=403    -> merged forbidden: read
from=merged! read=500    -> merged api_error: read
from=proving!            -> done: lists
from=proving             -> done: lists poll lists read lists poll merge poll set lists
from=proving! works=500  -> proving api_error: lists
# the check and the backup
emails=unverified+old -> failed unverified: lists
emails=unverified+old,old with=try_unverified -> done: lists merge poll set lists read
emails=unknown+old unverified=unverified -> failed unverified: lists
emails=unknown+old,old unverified=400 -> done: lists merge poll set lists read
emails=locked+old    -> failed not_active: lists
emails=there poll=404 read=404 -> failed not_found: lists read
emails=old poll=404 holders=nobody -> failed reference_unheld: lists poll holders
emails=old poll=404 holders=another -> failed not_found: lists poll holders
emails=there+old+second -> failed several_user_refs: lists
emails=there+moved       -> failed external_ref_changed: lists
works=403                -> failed forbidden: lists
works=500                -> failed api_error: lists
works=nobody             -> failed count_mismatch: lists
timeline=500             -> failed api_error: lists
timeline=forget,200      -> done: lists merge poll set lists
timeline=404             -> failed api_error: lists
# other options
with=no-reference        -> done: lists merge poll lists
with=no-reference poll=404 emails=old -> skipped already_gone: lists poll
with=no-reference merge=odd poll=there -> acknowledged merge_not_confirmed: lists merge poll
with=carry_fields        -> done: lists merge poll set lists read set
with=carry_fields set=200,400 -> done: lists merge poll set lists read set
with=carry_fields set=200,500 -> proving stale: lists merge poll set lists (read set)+
"""


@pytest.mark.parametrize("case", [line for line in CASES.splitlines() if "->" in line])
def test_what_becomes_of_a_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    script, expected = case.split(" -> ")
    assert str(Played(script)) == expected


@pytest.mark.parametrize(
    "nap, checks, backups", [(0, 1, 1), (59, 1, 1), (61, 2, 1), (119, 2, 1), (121, 2, 2)]
)
def test_a_check_lasts_for_a_minute_the_lists_for_two_and_a_timeline_until_its_object_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nap: int, checks: int, backups: int
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Played(f"timeline=nap{nap}").devrev.asked
    before = asked[: asked.index("merge")]
    assert [before.count(one) for one in ("emails", "talks", "timeline")] == [checks, backups, 1]


def test_a_run_requests_a_merge_three_times_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Played("merge=lost").devrev.asked.count("merge") == 3


STOPS = {
    "ffff": False, "fffff": True, "ffffsffff": False, "ffffsfffff": True,
    "ffffoff": True, "ooooo": False, "rrrrr": False,
}  # fmt: skip


@pytest.mark.parametrize("outcomes, stops", STOPS.items())
def test_five_systemic_failures_without_a_success_between_them_stop_a_run(
    outcomes: str, stops: bool
) -> None:
    """f: failed for a reason that may be everybody's, o: for one of its own, r: failed before."""
    devrev = FakeDevRev()
    merger = tool.ContactMerger(
        devrev.api, devrev, tool.MergeOptions("ORG"), lambda _: None, tool.Plan()
    )
    for number, outcome in enumerate(outcomes):
        primary, duplicate = (
            tool.Contact.from_json({"id": f"{DON}{kind}{number}", "email": EMAIL}) for kind in "PD"
        )
        code = "count_mismatch" if outcome == "o" else "api_error"
        problem = None if outcome == "s" else tool.PairError(code, "why")
        pair = Pair(primary, duplicate, None)
        asyncio.run(merger.record_outcome(pair, problem, outcome != "r"))
    assert bool(merger.draining) is stops


def test_the_objects_that_prove_a_merge_spend_its_units_and_count_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spending = []
    there = FakeDevRev.there

    def watched(devrev: FakeDevRev, name: str, body: Any) -> list[Any]:
        if name == "work":
            spending.append(set(devrev.api.scheduler.proving))
        return there(devrev, name, body)

    monkeypatch.setattr(FakeDevRev, "there", watched)
    played = Played("poll=locked")
    assert spending == [{(P, D)}] and [polls for _, polls in played.merger.recent_merges] == [5]
    assert not played.devrev.api.scheduler.proving
