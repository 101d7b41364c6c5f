"""What becomes of a pair: requested, polled for, given its reference, verified, or settled."""

from __future__ import annotations

from typing import Any

import pytest

import merge_contacts as tool
from tests.fake.organisation import Organisation
from tests.simulation.scene import Scene

QUICK = ("--merge-timeout", "8")
FIRST = "person1@example.com"
UPDATE = "rev-users.update"


def of(*contacts: str) -> Any:
    """Match the requests whose body names one of these contacts."""
    return lambda body: any(one in map(str, body.values()) for one in contacts)


def works_of(organisation: Organisation, contact: str) -> list[str]:
    return sorted(one["id"] for one in organisation.works.find([("reported_by", [contact])]))


def lock(organisation: Organisation, contact: str) -> None:
    organisation.change(organisation.contacts[contact], state="locked")


# -- what a merge leaves behind --------------------------------------------------------------------

HUSKS = ("locked", "shadow", "archived", "no-email", "no-reference", "bare", "own-reference")


@pytest.mark.parametrize("stays", HUSKS)
def test_objects_prove_at_once_that_what_stays_was_merged(scene: Scene, stays: str) -> None:
    pairs = scene.pairs(3)
    scene.world.gone, scene.world.stays = "stays", stays
    run = scene.merge(*QUICK)
    assert run.code == 0 and scene.merged(*pairs)
    assert run.count("rev-users.merge") == 3
    for primary, duplicate in pairs:
        merged = scene.organisation.merge_times[duplicate]
        assert scene.organisation.reference_times[primary][-1][0] - merged < 2


@pytest.mark.parametrize("stays", ["bare", "no-reference", "own-reference"])
def test_without_objects_lists_decide_of_what_stays(scene: Scene, stays: str) -> None:
    pair = scene.pair(1, (1, 0), talk=False)
    scene.world.gone, scene.world.stays = "stays", stays
    assert scene.merge("--merge-timeout", "40").code == 0 and scene.merged(pair)


def test_who_was_given_another_reference_and_is_still_active_is_not_called_merged(
    scene: Scene,
) -> None:
    _, duplicate = scene.pair(1, (1, 0), talk=False)
    scene.fault("merge-never")
    give = {"external_ref": "user_by_hand"}
    scene.after("rev-users.merge", lambda devrev: devrev.contacts[duplicate].update(give))
    assert scene.merge(*QUICK).codes == {FIRST: "merge_not_confirmed"}


def test_what_both_contacts_had_proves_nothing(scene: Scene) -> None:
    primary, duplicate = scene.pair(1, (0, 0), talk=False)
    scene.organisation.add_work(reported_by=[primary, duplicate])
    scene.world.merge_delay = 9e9
    scene.after("rev-users.merge", lambda devrev: lock(devrev, duplicate))
    scene.fault("500-after", "rev-users.merge")
    assert scene.merge(*QUICK).code == 1 and scene.count("rev-users.update") == 0


def test_an_object_that_still_names_the_duplicate_proves_nothing(scene: Scene) -> None:
    primary, duplicate = scene.pair(1, (0, 1), talk=False)
    scene.world.merge_delay = 9e9

    def look_merged(devrev: Organisation) -> None:
        devrev.give(works_of(devrev, duplicate)[0], "reported_by", [duplicate, primary])
        lock(devrev, duplicate)

    scene.after("rev-users.merge", look_merged)
    assert scene.merge(*QUICK).code == 1 and scene.count("rev-users.update") == 0


def test_one_object_of_two_proves_nothing(scene: Scene) -> None:
    primary, duplicate = scene.pair(1, (0, 2), talk=False)
    scene.world.merge_delay = 9e9

    def look_merged(devrev: Organisation) -> None:
        devrev.give(works_of(devrev, duplicate)[0], "reported_by", [primary])
        lock(devrev, duplicate)

    scene.after("rev-users.merge", look_merged)
    assert scene.merge(*QUICK).code == 1 and scene.count("rev-users.update") == 0


def test_an_answer_that_is_not_understood_says_which_error_it_raised() -> None:
    problem = tool.odd_answer(FIRST, KeyError("rev_org"))
    assert problem.code == "api_error" and "KeyError: 'rev_org'" in str(problem)


# -- the last read decides -------------------------------------------------------------------------


def test_a_ticket_that_the_token_may_not_see_is_not_taken_for_a_deleted_one(scene: Scene) -> None:
    primary, duplicate = scene.pair(1, (0, 1), talk=False)
    (ticket,) = works_of(scene.organisation, duplicate)
    other = scene.organisation.add_contact("Z", "another@example.com")
    scene.after("rev-users.update", lambda devrev: devrev.give(ticket, "reported_by", [other]))
    scene.fault("404", "works.get")
    run = scene.merge(*QUICK)
    assert run.codes == {FIRST: "left_behind"} and not run.rows[duplicate]["deleted"]


def test_a_ticket_that_was_deleted_is_named_and_holds_nothing_up(scene: Scene) -> None:
    _, duplicate = scene.pair(1, (0, 2))
    ticket = works_of(scene.organisation, duplicate)[0]
    scene.after("rev-users.update", lambda devrev: devrev.delete_work(ticket))
    run = scene.merge(*QUICK)
    (entry,) = run.report["successful_merges"]
    assert run.code == 0 and entry["deleted"] == [ticket]


# -- conflicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [{"reference_updates": "409"}, {"forbidden": [UPDATE]}], ids=str)
def test_no_more_than_five_references_are_on_no_contact(scene: Scene, switch: Any) -> None:
    scene.pairs(12)
    vars(scene.world).update(switch)
    run = scene.merge("--merge-timeout", "3")
    assert run.code == 3 and len(scene.organisation.merges) <= 5
    assert set(run.codes.values()) <= {"external_ref_conflict", "forbidden"}
    vars(scene.world).update(reference_updates="works", forbidden=())
    scene.end()


def test_a_conflict_that_another_contact_explains_holds_up_no_other_pair(scene: Scene) -> None:
    pairs = scene.pairs(8)
    steal = lambda devrev: devrev.add_contact("THIEF", "thief@example.com", "user_1")  # noqa: E731
    scene.before("rev-users.update", steal, match=of(pairs[0][0]))
    run = scene.merge(*QUICK)
    assert run.codes == {FIRST: "external_ref_conflict"} and "REVU-THIEF" in run.out
    assert len(scene.organisation.merges) == 8
    thief = scene.organisation.contacts[scene.holder("user_1")]
    scene.organisation.change(thief, external_ref="REVU-THIEF")
    scene.end()
    assert scene.merged(*pairs)


def test_merges_that_devrev_carries_out_into_others_stop_a_run(scene: Scene) -> None:
    scene.pairs(12)
    other = scene.organisation.add_contact("Z", "another@example.com")
    merge = scene.organisation.merge
    scene.organisation.merge = lambda _, *rest: merge(other, *rest)  # type: ignore
    scene.world.gone = "primary"
    run = scene.merge(*QUICK)
    assert run.code == 3 and set(run.codes.values()) == {"merged_into_another"}
    assert len(scene.organisation.merges) <= 5


def test_one_list_call_serves_many_pairs(scene: Scene) -> None:
    scene.pairs(25, talk=False)
    run = scene.merge()
    lists = [one for one in run.requests if one.endpoint in ("works.list", "rev-users.list")]
    assert run.code == 0 and len(lists) <= 13 and run.count("rev-users.get") <= 26


# -- busy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 409, 423, 425])
def test_what_merges_one_pair_at_a_time_is_served_so(scene: Scene, status: int) -> None:
    pairs = scene.pairs(8)
    scene.world.merge_jobs, scene.world.busy_status = 1, status
    scene.world.merge_delay = 0.5
    run = scene.merge("--merge-timeout", "60")
    assert run.code == 0 and scene.merged(*pairs)


# -- the first merge -------------------------------------------------------------------------------


def test_merges_go_one_at_a_time_until_one_is_confirmed(scene: Scene) -> None:
    pairs, seen = scene.pairs(6), []
    scene.world.merge_delay = 1.0
    for n in range(1, 7):
        scene.before("rev-users.merge", lambda devrev: seen.append(len(devrev.merges)), n)
    assert scene.merge().code == 0 and scene.merged(*pairs)
    assert seen[0] == 0 and min(seen[1:]) >= 1


def test_a_token_that_may_not_merge_ends_the_run_at_its_first_request(scene: Scene) -> None:
    scene.pairs(7)
    scene.world.forbidden = ("rev-users.merge",)
    run = scene.merge()
    assert run.code == 2 and run.count("rev-users.merge") == 1 and "rev_user:all" in run.err
    assert scene.organisation.merges == []


def test_it_ends_there_too_where_the_first_answer_was_lost(scene: Scene) -> None:
    scene.pairs(2)
    scene.world.forbidden = ("rev-users.merge",)
    scene.fault("reset-before", "rev-users.merge", times=1)
    assert scene.merge(*QUICK).code == 3  # the lost one may be carried out
    assert len({one.body["secondary_user"] for one in scene.requests("rev-users.merge")}) == 1


# -- how long is waited ----------------------------------------------------------------------------


@pytest.mark.parametrize("timeout, wait", [("120", 10.0), ("20", 5.0)])
def test_a_lost_request_is_polled_for_and_sent_again(
    scene: Scene, timeout: str, wait: float
) -> None:
    scene.pair(1)
    scene.fault("reset-before", "rev-users.merge", times=1)
    assert scene.merge("--merge-timeout", timeout).code == 0
    first, second = (one.started for one in scene.requests("rev-users.merge"))
    assert wait <= second - first < wait + 2
    polls = [one.started for one in scene.requests("rev-users.get") if one.started < second]
    assert max(after - before for before, after in zip(polls, polls[1:])) < 1.0


@pytest.mark.parametrize("kind", ["merge-never", "400"])
def test_what_devrev_has_answered_is_requested_again_after_the_whole_timeout(
    scene: Scene, kind: str
) -> None:
    scene.pair(1)
    scene.fault(kind, "rev-users.merge", times=1)
    assert scene.merge(*QUICK).code == 1
    assert scene.merge("--merge-timeout", "60").code == 0
    first, second = (one.started for one in scene.requests("rev-users.merge"))
    assert 60 <= second - first < 75


def test_lists_that_lag_are_read_ever_less_often(scene: Scene) -> None:
    pair = scene.pair(1, (0, 40), talk=False)  # more than are read one by one
    scene.clock.advance(100.0)
    scene.world.list_lag = 90.0
    assert scene.merge().code == 0 and scene.merged(pair)
    (update,) = scene.requests(UPDATE)
    reads = [one.started for one in scene.requests("works.list") if one.started > update.started]
    gaps = [after - before for before, after in zip(reads, reads[1:])]
    assert gaps[0] < 2 and gaps[3:] == sorted(gaps[3:]) and 19 < gaps[-1] < 22


def test_an_interrupted_run_waits_ten_seconds_for_requests_under_way(scene: Scene) -> None:
    scene.pair(1)
    scene.fault("hang", UPDATE)
    scene.before(UPDATE, scene.ctrl_c)
    assert scene.merge().code == 130
    (update, *_) = scene.requests(UPDATE)
    assert 10 <= scene.clock.now - update.started < 13


# -- settling, and what was cancelled --------------------------------------------------------------


def cancel(scene: Scene) -> None:
    """Let a merge never come, and give it up."""
    never = scene.fault("merge-never")
    assert scene.merge(*QUICK).code == 1
    assert scene.settle(FIRST).code == 0
    scene.world.faults.remove(never)


@pytest.mark.parametrize("gone", ["404", "state", "301", "primary", "shadow"])
@pytest.mark.parametrize("by", ["merged into another", "deleted"])
def test_a_pair_that_is_gone_in_another_way_stays_cancelled(
    scene: Scene, by: str, gone: str
) -> None:
    primary, duplicate = scene.pair(1)
    other = scene.organisation.add_contact("Z", "another@example.com")
    scene.world.gone = gone
    cancel(scene)
    if by == "deleted":
        scene.organisation.delete_contact(duplicate)
    else:
        scene.organisation.merge(other, duplicate)
    for _ in range(3):
        run = scene.merge(*QUICK)
        assert run.rows[duplicate]["state"] == "cancelled"
    assert scene.reference(primary) == "REVU-P1" and scene.organisation.alive(other)
    (warning,) = [one for one in run.report["warnings"] if one["code"] == "reference_unheld"]
    assert "user_1" in warning["warning"] and "REVU-P1" in warning["warning"]
    assert "user_1" in scene.run("--status").out


def test_without_objects_a_pair_stays_cancelled_unless_its_primary_is_named(scene: Scene) -> None:
    pair = scene.pair(1, (1, 0), talk=False)
    cancel(scene)
    scene.organisation.merge(*pair)
    assert scene.merge(*QUICK).rows[pair[1]]["state"] == "cancelled"
    scene.world.gone = "301"
    run = scene.merge(*QUICK)
    assert run.rows[pair[1]]["state"] == "done" and not run.report["references_to_set"]


def test_a_pair_whose_duplicate_another_merge_has_taken_stays_cancelled(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    cancel(scene)
    other = scene.organisation.add_contact("Z", FIRST)
    scene.export(leave_out=[primary])
    assert scene.merge("--email", FIRST).code == 0 and scene.merged((other, duplicate))
    scene.organisation.merge(primary, other)  # so that all objects are its primary's
    scene.merge()
    assert scene.rows[primary, duplicate]["state"] == "cancelled"


def test_a_cancelled_merge_that_is_named_has_the_whole_wait_again(scene: Scene) -> None:
    pair = scene.pair(1)
    cancel(scene)
    assert scene.merge("--merge-timeout", "200", "--email", FIRST).code == 0
    assert scene.merged(pair) and scene.count("rev-users.merge") == 2


def test_a_lost_backup_keeps_a_merged_pair_open_until_it_is_settled(scene: Scene) -> None:
    _, duplicate = scene.pair(1)
    scene.fault("500", "rev-users.update")
    scene.merge(*QUICK)
    scene.world.faults.clear()
    scene.lose("backups")
    assert scene.merge(*QUICK).codes == {FIRST: "backup_failed"}
    assert scene.settle("Person1@example.com").rows[duplicate]["state"] == "settled"


# -- once asked, never forgotten -------------------------------------------------------------------


def test_a_merge_that_never_finishes_holds_up_no_other_and_is_polled_first(scene: Scene) -> None:
    pairs = scene.pairs(5)
    scene.fault("merge-never", "rev-users.merge", match=of(pairs[2][1]))
    run = scene.merge(*QUICK)
    assert run.codes == {"person3@example.com": "merge_not_confirmed"}
    assert scene.merged(*pairs[:2], *pairs[3:])
    scene.organisation.merge(*pairs[2])
    run = scene.merge(*QUICK)
    asked = [request.endpoint for request in run.requests][:2]
    assert run.code == 0 and asked == ["dev-users.self", "rev-users.get"]


def test_while_a_merge_is_open_no_other_of_its_contacts_is_requested(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    second = scene.organisation.add_contact("B", FIRST)
    scene.fault("merge-never", "rev-users.merge")
    scene.merge(*QUICK)
    assert scene.rows[primary, second]["code"] == "group_incomplete"
    for _ in range(3):  # that makes it the primary of the next export
        scene.organisation.add_work(reported_by=[second])
    scene.export()
    scene.merge(*QUICK)
    assert scene.rows[second, primary]["code"] == "group_incomplete"
    asked = [one.body["secondary_user"] for one in scene.requests("rev-users.merge")]
    assert set(asked) == {duplicate} and scene.rows[primary, duplicate]["state"] == "acknowledged"


@pytest.mark.parametrize("deleted", [True, False])
def test_a_duplicate_that_somebody_has_merged_or_deleted_first_is_not_called_ours(
    scene: Scene, deleted: bool
) -> None:
    primary, duplicate = scene.pair(1)
    other = scene.organisation.add_contact("Z", "another@example.com")
    delete = lambda devrev: devrev.delete_contact(duplicate)  # noqa: E731
    merge = lambda devrev: devrev.merge(other, duplicate)  # noqa: E731
    scene.before("rev-users.merge", delete if deleted else merge)
    run = scene.merge(*QUICK)
    assert run.codes == {FIRST: "merged_elsewhere"} and scene.reference(primary) == "REVU-P1"
    assert "user_1" in run.report["failed_merges"][0]["error"]
    assert scene.merge(*QUICK).code == 0


def test_what_was_started_is_finished_before_anything_new_is_backed_up(scene: Scene) -> None:
    pairs = scene.pairs(6)
    scene.world.reference_updates = "400"
    scene.merge(*QUICK, "--limit", "3")
    scene.world.reference_updates = "works"
    run = scene.merge(*QUICK)
    endpoints = [request.endpoint for request in run.requests]
    first = endpoints.index("timeline-entries.list")
    assert endpoints[:first].count("rev-users.update") == 3 and scene.merged(*pairs)


def test_what_a_merge_leaves_behind_is_named_and_verified_again(scene: Scene) -> None:
    primary, duplicate = scene.pair(1, (1, 3))
    left = works_of(scene.organisation, duplicate)[:2]
    scene.fault("merge-leaves", "rev-users.merge", detail=set(left))
    run = scene.merge(*QUICK)
    (entry,) = run.report["unfinished_merges"]
    assert entry["code"] == "left_behind" and {one["id"] for one in entry["left_behind"]} == {*left}
    assert scene.reference(primary) == "user_1"
    for one in left:
        scene.organisation.give(one, "reported_by", [primary])
    assert scene.merge(*QUICK).code == 0 and scene.count("rev-users.merge") == 1


def test_five_failures_in_a_row_stop_the_run_before_more_is_started(scene: Scene) -> None:
    pairs = scene.pairs(30, talk=False)
    scene.fault("400", "rev-users.merge")
    run = scene.merge(*QUICK)
    assert run.code == 3 and run.count("rev-users.merge") == 5
    assert set(run.codes.values()) == {"merge_refused"}
    scene.end()
    assert scene.merged(*pairs)


def test_pairs_that_can_not_be_verified_never_stop_a_run(scene: Scene) -> None:
    pairs = scene.pairs(12)
    scene.fault("merge-leaves", "rev-users.merge", match=of(*(one for _, one in pairs[:11])))
    run = scene.merge(*QUICK)
    assert run.code == 1 and len(scene.organisation.merges) == 12
    assert set(run.codes.values()) == {"left_behind"}


def test_what_no_run_has_tried_comes_before_what_always_fails(scene: Scene) -> None:
    pairs = scene.pairs(8)
    bad: list[str] = []
    for _, duplicate in pairs[:6]:
        bad += works_of(scene.organisation, duplicate)
    scene.world.restricted_timelines = bad
    scene.merge(*QUICK, "--limit", "6")
    scene.merge(*QUICK)
    assert set(scene.organisation.merges) == set(pairs[6:])


@pytest.mark.parametrize("endpoint", ["rev-users.update", "rev-users.merge"])
def test_a_contact_that_the_token_may_not_touch_costs_its_own_pair_alone(
    scene: Scene, endpoint: str
) -> None:
    pairs = scene.pairs(4)
    scene.fault("403", endpoint, match=of(*pairs[1]))
    scene.merge(*QUICK, "--email", FIRST)
    for _ in range(3):  # where its merge is the first of a run, that shows what the token may
        run = scene.merge(*QUICK)
    assert {pairs[0], *pairs[2:]} <= set(scene.organisation.merges)
    assert run.codes["person2@example.com"] in ("forbidden", "merge_refused")


@pytest.mark.parametrize(
    "gone", ("403", "410", "400", "404-other", "500", "502", "hang", "shape", "empty")
)
def test_lists_decide_where_polls_of_a_merged_contact_tell_nothing(scene: Scene, gone: str) -> None:
    pairs = [*scene.pairs(3), scene.pair(9, (0, 0), talk=False)]  # the last one has no objects
    scene.world.gone = gone
    assert scene.merge("--merge-timeout", "60").code == 0
    assert scene.merged(*pairs) and scene.count("rev-users.merge") == 4


def test_lists_do_not_decide_while_they_show_the_duplicate(scene: Scene) -> None:
    scene.pair(1)
    scene.world.merge_delay = 3600
    scene.fault("500", "rev-users.get")
    assert scene.merge(*QUICK).codes == {FIRST: "api_error"}
    assert scene.count("rev-users.update") == 0


def test_a_poll_that_hangs_does_not_hold_up_the_reference(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    scene.fault("hang", "rev-users.get", times=1)
    assert scene.merge("--merge-timeout", "60").code == 0
    merged = scene.organisation.merge_times[duplicate]
    assert scene.organisation.reference_times[primary][-1][0] - merged < 12


def respelled(scene: Scene) -> tuple[str, str]:
    """Add a pair without objects whose address DevRev spells in another way than the CSV."""
    pair = scene.pair(1, (0, 0), talk=False)
    for one in pair:
        scene.organisation.change(scene.organisation.contacts[one], email="Person1@Example.com")
    scene.export({one: {"email": FIRST} for one in pair})
    return pair


def test_lists_that_were_asked_with_another_spelling_prove_no_absence(scene: Scene) -> None:
    pair = respelled(scene)
    scene.world.merge_delay = 9e9
    scene.fault("400", "rev-users.get", match=of(pair[1]))
    run = scene.merge("--merge-timeout", "60")
    assert run.code in (1, 3) and scene.count("rev-users.update") == 0


def test_lists_are_asked_with_the_spelling_that_devrev_has(scene: Scene) -> None:
    pair = respelled(scene)
    scene.world.gone = "400"
    scene.world.email_ignores_case = True
    scene.before("rev-users.merge", lambda _: setattr(scene.world, "email_ignores_case", False))
    assert scene.merge("--merge-timeout", "60").code == 0 and scene.merged(pair)


# -- fields ----------------------------------------------------------------------------------------


def with_fields(scene: Scene) -> tuple[str, str]:
    pair = scene.pair(1, phone_numbers=["+15550100"])
    duplicate = scene.organisation.contacts[pair[1]]
    duplicate.update(phone_numbers=["+15550100", "+15550101"], description="prefers email")
    return pair


def lost(run: Any) -> set[Any]:
    (entry,) = run.report["successful_merges"]
    return {(one["field"], one["value"]) for one in entry["fields_lost"]}


def test_fields_are_carried_by_themselves_after_the_reference(scene: Scene) -> None:
    primary, _ = with_fields(scene)
    run = scene.merge("--carry-fields")
    bodies = [set(one.body) - {"id"} for one in scene.requests("rev-users.update")]
    assert bodies == [{"external_ref"}, {"phone_numbers", "description"}]
    contact = scene.organisation.contacts[primary]
    assert contact["phone_numbers"] == ["+15550100", "+15550101"]
    assert contact["description"] == "prefers email" and run.code == 0
    assert not {"phone_numbers", "description"} & {name for name, _ in lost(run)}


def test_a_refused_field_is_lost_and_holds_up_nothing(scene: Scene) -> None:
    pair = with_fields(scene)
    scene.world.refused_fields = ("rev-users.update.phone_numbers",)
    run = scene.merge("--carry-fields")
    assert run.code == 0 and scene.merged(pair)
    assert ("phone_numbers", "+15550101") in lost(run)


@pytest.mark.parametrize("moment", ["rev-users.merge", "rev-users.update", "works.list"])
def test_carried_fields_overwrite_nothing_that_was_written_meanwhile(
    scene: Scene, moment: str
) -> None:
    primary, _ = with_fields(scene)

    def edit(devrev: Organisation) -> None:
        contact = devrev.contacts[primary]
        phones = [*contact["phone_numbers"], "+15550199"]
        devrev.change(contact, description="by hand", phone_numbers=phones)

    scene.after(moment, edit)
    assert scene.merge("--carry-fields").code == 0
    contact = scene.organisation.contacts[primary]
    assert contact["description"] == "by hand"
    assert set(contact["phone_numbers"]) == {"+15550100", "+15550101", "+15550199"}


def test_a_reference_that_is_put_back_while_fields_are_carried_is_set_again(scene: Scene) -> None:
    primary, _ = with_fields(scene)

    def put_back(devrev: Organisation) -> None:
        devrev.change(devrev.contacts[primary], external_ref="REVU-P1")

    scene.before("rev-users.update", put_back, match=lambda body: "external_ref" not in body)
    assert scene.merge("--carry-fields").code == 0 and scene.reference(primary) == "user_1"


@pytest.mark.parametrize("calls", [6, 7, 8, 9])
def test_between_a_read_and_carried_fields_nothing_is_waited_for(scene: Scene, calls: int) -> None:
    primary, _ = with_fields(scene)
    scene.settings.update(calls=calls, period=60.0)
    assert scene.merge("--carry-fields").code == 0
    asked = [one for one in scene.world.requests if one.body.get("id") == primary]
    *_, read, write = asked
    assert (read.endpoint, write.endpoint) == ("rev-users.get", "rev-users.update")
    assert write.started - read.started < 1


# -- preconditions ---------------------------------------------------------------------------------


def test_a_laptop_that_sleeps_between_check_and_merge_checks_again(scene: Scene) -> None:
    pairs = scene.pairs(3)

    def sleep(devrev: Organisation) -> None:
        scene.clock.nap(28_800.0)
        for _, duplicate in pairs:
            devrev.change(devrev.contacts[duplicate], email="somebody.else@example.com")

    scene.after("timeline-entries.list", sleep)
    assert set(scene.merge().codes.values()) == {"email_changed"}
    assert scene.organisation.merges == []


def test_with_lists_that_are_too_old_only_changed_timelines_are_read_again(scene: Scene) -> None:
    _, duplicate = scene.pair(1, (2, 2))
    ticket = works_of(scene.organisation, duplicate)[0]

    def comment(devrev: Organisation) -> None:
        scene.clock.nap(130.0)
        devrev.add_comment(ticket, "One more thing.")
        devrev.change(devrev.works[ticket])

    objects = len(scene.organisation.works) + len(scene.organisation.conversations)
    scene.after("timeline-entries.list", comment, n=objects)
    assert scene.merge().code == 0
    read = [one.body["object"] for one in scene.requests("timeline-entries.list")]
    assert read.count(ticket) == 2 and len(read) == objects + 1


# -- lost and false answers ------------------------------------------------------------------------

LOST_BEFORE = ("reset-before", "500", "502", "503", "429", "429-bare")


@pytest.mark.parametrize("kind", [*LOST_BEFORE, "reset-after", "cut", "hang-after", "500-after"])
def test_every_pair_is_merged_once_whatever_happens_to_a_merge_answer(
    scene: Scene, kind: str
) -> None:
    pairs = scene.pairs(3)
    scene.fault(kind, "rev-users.update", times=2)
    scene.fault(kind, "rev-users.merge", times=2)
    assert scene.merge("--merge-timeout", "40").code == 0 and scene.merged(*pairs)
    assert scene.count("rev-users.merge") == (5 if kind in LOST_BEFORE else 3)


@pytest.mark.parametrize("after", ["timeline-entries.list", "rev-users.merge", "rev-users.update"])
@pytest.mark.parametrize("kind", ["503", "401", "502", "reset-before"])
def test_an_api_that_goes_down_is_not_hammered_and_the_run_resumes(
    scene: Scene, kind: str, after: str
) -> None:
    pairs = scene.pairs(8)
    scene.after(after, lambda _: scene.fault(kind))
    run = scene.merge()
    assert run.code == 3 and run.report["run"]["stopped"]
    (down, *_) = (n for n, one in enumerate(run.requests) if one.endpoint == after)
    assert len(run.requests) - down <= 1 + 8 + 12
    scene.world.faults.clear()
    scene.end()
    assert scene.merged(*pairs)


def test_one_ticket_that_can_not_be_read_costs_only_its_own_group(scene: Scene) -> None:
    pairs = scene.pairs(4)
    (ticket, *_) = works_of(scene.organisation, pairs[1][0])
    scene.fault("500", "timeline-entries.list", match=of(ticket))
    assert scene.merge().codes == {"person2@example.com": "api_error"}
    assert scene.merged(pairs[0], *pairs[2:])


@pytest.mark.parametrize("shape", ["403", "left out"])
def test_three_restricted_tickets_cost_one_pair_on_each_of_several_days(
    scene: Scene, shape: str
) -> None:
    pairs = [scene.pair(1, (1, 4)), *(scene.pair(number) for number in range(2, 6))]
    scene.export()
    scene.world.restricted = works_of(scene.organisation, pairs[0][1])[:3]
    scene.world.restricted_in_lists = shape
    for _ in range(3):
        assert list(scene.merge(*QUICK).codes) == [FIRST]
    assert set(scene.organisation.merges) == set(pairs[1:])


def test_a_csv_of_another_organisation_stops_everything(scene: Scene) -> None:
    scene.pairs(3)
    other = Organisation("OTHERORG")
    pair = [other.add_contact("P1", FIRST), other.add_contact("D1", FIRST, "user_1")]
    rows = scene.export_rows()
    scene.write_csv(row._replace(id=one) for row, one in zip(rows, pair))
    run = scene.merge()
    assert run.code == 2 and [one.endpoint for one in run.requests] == ["dev-users.self"]
    assert "another organisation" in run.err


def test_it_does_so_too_where_it_has_nothing_to_merge_and_the_folder_has(scene: Scene) -> None:
    scene.pair(1)
    scene.fault("merge-never")
    assert scene.merge(*QUICK).code == 1
    other = Organisation("OTHERORG")
    ids = [other.add_contact(f"P{n}", FIRST, f"user_{n}") for n in (1, 2)]
    ids.append(other.add_contact("P3", "person3@example.com"))
    (row, _) = scene.export_rows()
    rows = [row._replace(id=ids[0]), row._replace(id=ids[1], ref="user_1")]
    scene.write_csv([*rows, row._replace(id=ids[2], email="person3@example.com")])
    assert scene.merge("--email", "person3@example.com").code == 2
