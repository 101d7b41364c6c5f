"""What the simulation has found once: each a scene that fails without what was done about it.

The comments name the seeds that found it, of the simulation as it was then.
"""

import pytest

from tests.simulation.scene import Scene

QUICK = ("--merge-timeout", "2")


@pytest.mark.parametrize("delay", [0.11, 0.12, 0.13])
def test_a_403_to_the_first_merge_request_lets_no_other_leave(scene: Scene, delay: float) -> None:
    """Seeds 253 and 455: a pair was saved before the run stopped, and a request left meanwhile."""
    scene.pairs(3, talk=False, tickets=(0, 1))
    scene.kill("hearing of rev-users.merge")
    scene.merge()  # its merge is carried out, which confirms the next run
    scene.clock.advance(10)
    scene.world.forbidden = ["rev-users.merge"]
    scene.fault("slow", "timeline-entries.list", skip=1, times=1, detail=delay)
    assert scene.merge().code in (2, 3)
    scene.end()


@pytest.mark.parametrize("n", range(1, 12))
def test_no_contact_is_created_whose_undo_the_copy_could_not_note(scene: Scene, n: int) -> None:
    """Seed 50554: the copy's write had failed, and the contact was created all the same."""
    primary, duplicate = scene.pair(1)
    scene.merge()
    scene.fill_disk("commit of savepoint-copy.db", n)
    scene.undo()
    assert scene.holder("user_1") is not None
    scene.undo()
    assert scene.holder("user_1") not in (None, primary, duplicate)


def test_a_cancelled_pair_whose_primary_was_merged_onward_stays_cancelled(scene: Scene) -> None:
    """Seed 8886927: nothing leads to this primary any more, and no reference moves."""
    primary, duplicate = scene.pair(1)
    other = scene.organisation.add_contact("Z", "another@example.com")
    scene.world.gone = "unassigned"
    scene.after(
        "rev-users.merge", lambda devrev: scene.at(1.0, lambda _: devrev.merge(other, primary))
    )
    scene.world.merge_delay = 0.5
    scene.merge(*QUICK)
    scene.settle("person1@example.com")
    scene.end()
    assert scene.reference(other) == "REVU-Z"


def test_what_is_requested_again_and_what_waits_to_be_alone_both_go_on(scene: Scene) -> None:
    """Seed 184 of a later simulation: a lost request, and another that DevRev refused meanwhile."""
    pairs = scene.pairs(3)
    scene.fault("hang", "rev-users.merge", skip=1, times=1)
    scene.fault("400", "rev-users.merge", skip=1, times=1)
    assert scene.merge().code == 0 and scene.merged(*pairs)


def test_a_token_that_is_revoked_while_devrev_fails_stops_the_run_at_once(scene: Scene) -> None:
    """Seeds 96, 239 and 252 of a later simulation: a probe's 401 was not heard."""
    scene.pair(1)
    scene.fault("500", "rev-users.get")

    def revoke(_: object) -> None:
        scene.world.token = "another"

    scene.before("dev-users.self", revoke, 2)
    assert scene.merge("--merge-timeout", "20").code == 3


def test_a_contact_that_is_locked_while_lists_lag_is_not_requested_again(scene: Scene) -> None:
    """Seed 78 later: the check's lists showed it as before, and the poll did not."""
    _, duplicate = scene.pair(1)
    scene.fault("hang", "rev-users.merge", times=1)
    scene.kill("hearing of rev-users.merge")
    scene.merge()
    scene.clock.advance(60)
    scene.world.list_lag = 30.0
    scene.organisation.change(scene.organisation.contacts[duplicate], state="locked")
    assert scene.merge("--merge-timeout", "5").count("rev-users.merge") == 0


def test_a_duplicate_that_is_there_after_all_is_not_called_merged(scene: Scene) -> None:
    """Contacts vanish for half a second, from the merge request on."""
    _, duplicate = scene.pair(1)
    scene.waive("a reference is moved after the merge", "the contacts vanish before it")
    scene.before("rev-users.merge", lambda _: setattr(scene.world, "vanished", "*"))
    scene.before(
        "rev-users.merge",
        lambda _: scene.at(0.5, lambda _: setattr(scene.world, "vanished", ())),
    )
    run = scene.merge("--merge-timeout", "20")
    assert run.code == 1 and run.rows[duplicate]["state"] == "requested"
    scene.end()


def test_a_reference_that_was_moved_too_early_is_no_stale_export(scene: Scene) -> None:
    """One false 404, in an organisation whose references are unique in a workspace alone."""
    email = "person1@example.com"
    primary = scene.organisation.add_contact("P1", email, rev_org="ORG1")
    duplicate = scene.organisation.add_contact("D1", email, "user_1", rev_org="ORG2")
    scene.organisation.add_work(reported_by=[duplicate])
    scene.waive("a reference is moved after the merge", "one poll says 404, and is wrong")
    scene.fault("merge-never", times=1)
    scene.fault("404", "rev-users.get", times=1)
    options = ("--merge-timeout", "20", "--across-workspaces")
    scene.merge(*options)
    scene.clock.advance(100.0)
    run = scene.merge(*options)
    assert run.code == 0 and scene.merged((primary, duplicate))
