"""Every state has a way out, and one contact's trouble stays its own: scenes through the front door."""

from typing import Any, Dict

import pytest

from tests.sandbox import Fault, Organisation, Sandbox
from tests.simulation.scene import Scene
from tests.support import Workplace, assert_merged, organisation_of_pairs

QUICK = ("--merge-timeout", "2")
HALF_EMOJI = "\ud83d"


def merges_of(sandbox: Sandbox, duplicate: str) -> int:
    return sum(request.body.get("secondary_user") == duplicate for request in sandbox.requests)


# -- polls that tell nothing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gone", ("403", "410", "400", "404-other", "500", "502", "503", "shape", "empty")
)
def test_lists_decide_where_polls_of_a_merged_contact_tell_nothing(scene: Scene, gone: str) -> None:
    pairs = [*scene.pairs(3), scene.pair(9, (0, 0), talk=False)]  # the last one has no objects
    scene.world.gone = gone
    assert scene.merge("--merge-timeout", "20").code == 0
    assert scene.merged(*pairs) and scene.count("rev-users.merge") == 4


def test_lists_do_not_decide_while_they_show_the_duplicate(scene: Scene) -> None:
    scene.pair(1)
    scene.world.merge_delay = 3600
    scene.fault("500", "rev-users.get")
    assert scene.merge(*QUICK).codes == {"person1@example.com": "api_error"}
    assert scene.count("rev-users.update") == 0


def test_a_poll_that_hangs_is_given_up_soon_and_a_slow_organisation_is_served_all_the_same(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    hung = Fault("hang", "rev-users.get", times=1)
    with Sandbox(organisation, faults=[hung]) as sandbox:
        place.run(sandbox, "--merge-timeout", "60", check=0, DEVREV_TIMEOUT="25", timeout=120)
        (update,) = [
            request for request in sandbox.requests if request.endpoint == "rev-users.update"
        ]
        (merge,) = [
            request for request in sandbox.requests if request.endpoint == "rev-users.merge"
        ]
        assert update.started - merge.started < 24, (
            "the reference waited for an answer that never came"
        )
    assert_merged(organisation, pairs)


# -- a merge that never comes ------------------------------------------------------------------------


def cancelled(place: Workplace, sandbox: Sandbox) -> Dict[str, Any]:
    """Have a merge acknowledged and not carried out, and give it up."""
    assert place.run(sandbox, *QUICK, check=1).codes == {
        "person1@example.com": "merge_not_confirmed"
    }
    settled = place.run(None, "--settle", "person1@example.com", check=0)
    assert "DevRev may still carry out a cancelled merge: every run polls for it" in settled.out
    report = settled.report
    (entry,) = report["cancelled"]
    assert entry["email"] == "person1@example.com" and report["summary"]["failed_merges"] == 1
    assert "DevRev may still carry it out: every run polls for it" in entry["advice"]
    assert report["successful_merges"] == []
    return report


def test_a_merge_that_was_given_up_is_never_requested_again_unnamed(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    never = Fault("merge-never", match=lambda body: body["secondary_user"] == pairs[0][1])
    with Sandbox(organisation, faults=[never]) as sandbox:
        cancelled(place, sandbox)
        before = merges_of(sandbox, pairs[0][1])
        organisation.add_contact("NEW", "person1@example.com")  # a third one joins the group
        place.export(organisation, leave_out=organisation.merged_into)
        result = place.run(sandbox, *QUICK, check=0)
        assert [(one["email"], one["code"]) for one in result.report["skipped"]] == [
            ("person1@example.com", "cancelled")
        ]
        assert merges_of(sandbox, pairs[0][1]) == before
        status = place.run(None, "--status", check=0)
        assert "cancelled, not merged" in status.out
    assert_merged(organisation, pairs[1:])


def test_a_merge_that_was_given_up_can_be_named(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("merge-never", times=1)]) as sandbox:
        cancelled(place, sandbox)
        place.run(sandbox, "--email", "person1@example.com", check=0)
    assert_merged(organisation, pairs)


def test_a_merge_that_devrev_carries_out_after_it_was_given_up_is_finished_and_said(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(
        organisation,
        faults=[Fault("merge-never", match=lambda body: body["secondary_user"] == pairs[0][1])],
    ) as sandbox:
        cancelled(place, sandbox)
        organisation.merge(*pairs[0])
        result = place.run(sandbox, check=1)
        entries = [
            entry for entry in result.report["successful_merges"] if entry.get("after_cancel")
        ]
        assert [entry["email"] for entry in entries] == ["person1@example.com"]
        assert "--undo" in result.out + result.err
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def test_a_pair_whose_primary_was_merged_onward_and_can_not_be_read_can_be_settled(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    primary, _ = pairs[0]
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("500", "rev-users.update")]) as sandbox:
        place.run(sandbox, *QUICK, check=1, DEVREV_MAX_RETRIES="0")
        sandbox.faults.clear()
        sandbox.gone_of = {primary: "400"}
        organisation.merge(organisation.add_contact("Z", "another@example.com"), primary)
        assert place.run(sandbox, *QUICK, check=1).codes == {"person1@example.com": "not_found"}
        place.run(None, "--settle", "person1@example.com", check=0)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_cancelled_merge_is_told_from_a_deletion_by_what_its_objects_name(
    place: Workplace, deleted: bool
) -> None:
    """Carried out after all, and its objects given to others before any run could poll it; or deleted by a person."""
    organisation, pairs = organisation_of_pairs(1, (0, 1))
    other = organisation.add_contact("Z", "another@example.com")
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("merge-never")]) as sandbox:
        cancelled(place, sandbox)
        if deleted:
            organisation.delete_contact(pairs[0][1])
        else:
            organisation.merge(*pairs[0])
            for one in [*organisation.works, *organisation.conversations]:
                roles = ("owned_by", "reported_by") if one in organisation.works else ("members",)
                for role in roles:
                    organisation.give(one, role, [other])
        report = place.run(sandbox, *QUICK, "--email", "another@example.com").report
    assert bool([*report["unfinished_merges"], *report["successful_merges"]]) is not deleted


# -- one contact's trouble ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["display_name", "email", "external_ref", "state", "message"])
def test_half_an_emoji_in_one_answer_fails_one_pair_at_most(place: Workplace, where: str) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation)
    victim = organisation.contacts[pairs[0][1]]
    if where == "message":
        faults = [
            Fault(
                "409",
                "rev-users.merge",
                detail=f"no {HALF_EMOJI}",
                match=lambda body: body["secondary_user"] == pairs[0][1],
            )
        ]
    else:
        faults = []
        organisation.change(victim, **{where: f"{victim.get(where)}{HALF_EMOJI}"})
    with Sandbox(organisation, faults=faults) as sandbox:
        result = place.run(sandbox, *QUICK)
        assert result.code in (0, 1), result
    assert set(pairs[1:]) <= set(organisation.merges)


@pytest.mark.parametrize("shape", ["403", "left out"])
def test_three_restricted_tickets_cost_one_pair_on_each_of_several_days(
    place: Workplace, shape: str
) -> None:
    organisation, pairs = organisation_of_pairs(6)
    mine = [
        one
        for one, work in organisation.works.items()
        if pairs[0][1] in [u["id"] for u in work["reported_by"]]
    ]
    place.export(organisation)
    with Sandbox(organisation, restricted=mine[:3], restricted_in_lists=shape) as sandbox:
        for day in range(3):
            result = place.run(sandbox, *QUICK, check=1)
            assert list(result.codes) == ["person1@example.com"], day
            assert set(organisation.merges) == set(pairs[1:])


@pytest.mark.parametrize("values", [-1, 10**400, "many"])
def test_odd_quota_headers_say_nothing(place: Workplace, values: Any) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("odd-quota", detail=values)]) as sandbox:
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def test_what_no_run_has_tried_comes_before_what_always_fails(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(8)
    place.export(organisation)
    bad = {duplicate for _, duplicate in pairs[:6]}
    refused = Fault("400", "rev-users.list", match=lambda body: False)
    broken = Fault("500", "timeline-entries.list", match=lambda body: True, times=0)
    with Sandbox(organisation, faults=[refused, broken]) as sandbox:
        theirs = [
            one
            for one, work in organisation.works.items()
            if bad & {user["id"] for user in work["reported_by"]}
        ]
        sandbox.restricted_timelines = theirs
        place.run(sandbox, *QUICK, "--limit", "6")
        place.run(sandbox, *QUICK, check=1)
        assert set(organisation.merges) == set(pairs[6:])


# -- the first merge ---------------------------------------------------------------------------------


def test_merges_go_one_at_a_time_until_one_is_confirmed(scene: Scene) -> None:
    pairs, seen = scene.pairs(6), []
    scene.world.merge_delay = 1.0
    for n in range(1, 7):
        scene.before("rev-users.merge", lambda devrev: seen.append(len(devrev.merges)), n)
    assert scene.merge().code == 0 and scene.merged(*pairs)
    assert seen[0] == 0 and min(seen[1:]) >= 1


def test_a_token_that_may_not_merge_ends_the_run_at_its_first_request(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(7)
    place.export(organisation)
    with Sandbox(organisation, forbidden=["rev-users.merge"]) as sandbox:
        result = place.run(sandbox, check=2)
        assert sandbox.count("rev-users.merge") == 1
        assert "rev_user:all" in result.err


# -- fields ------------------------------------------------------------------------------------------


def organisation_with_fields() -> Organisation:
    organisation, pairs = organisation_of_pairs(1)
    primary, duplicate = (organisation.contacts[one] for one in pairs[0])
    organisation.change(primary, phone_numbers=["+15550100"])
    organisation.change(
        duplicate, phone_numbers=["+15550100", "+15550101"], description="prefers email"
    )
    return organisation


def test_what_only_the_duplicate_had_is_named(place: Workplace) -> None:
    organisation = organisation_with_fields()
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        (entry,) = place.run(sandbox, check=0).report["successful_merges"]
    lost = {(one["field"], one["value"]) for one in entry["fields_lost"]}
    assert {("phone_numbers", "+15550101"), ("description", "prefers email")} <= lost


def test_fields_go_with_the_reference(place: Workplace) -> None:
    organisation = organisation_with_fields()
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        (entry,) = place.run(sandbox, "--carry-fields", check=0).report["successful_merges"]
        assert sandbox.count("rev-users.update") == 1
    primary = organisation.contacts[entry["primary"]["id"]]
    assert primary["external_ref"] == "user_1"
    assert (
        primary["phone_numbers"] == ["+15550100", "+15550101"]
        and primary["description"] == "prefers email"
    )
    assert not {"phone_numbers", "description"} & {one["field"] for one in entry["fields_lost"]}


def test_a_refused_field_does_not_hold_up_the_reference(place: Workplace) -> None:
    organisation = organisation_with_fields()
    place.export(organisation)
    with Sandbox(organisation, refused_fields=["rev-users.update.phone_numbers"]) as sandbox:
        (entry,) = place.run(sandbox, "--carry-fields", check=0).report["successful_merges"]
        bodies = [
            request.body for request in sandbox.requests if request.endpoint == "rev-users.update"
        ]
    assert [set(body) - {"id"} for body in bodies] == [
        {"external_ref", "phone_numbers", "description"}, {"external_ref"}, {"phone_numbers", "description"},
    ]  # fmt: skip
    assert ("phone_numbers", "+15550101") in {
        (one["field"], one["value"]) for one in entry["fields_lost"]
    }
