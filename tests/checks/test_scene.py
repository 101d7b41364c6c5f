"""Scripted scenes: each thing that a script can let happen does happen, and an invariant that is broken is said."""

import pytest

from tests.simulation.scene import Scene
from tests.simulation.world import InvariantBroken, broken


def test_a_run_leaves_code_output_report_rows_and_requests(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    run = scene.merge("--limit", "1")
    assert run.code == 0 and "1" in run.out + run.err
    assert run.report["summary"]["successful_merges"] == 1 and run.codes == {}
    assert run.rows[duplicate]["state"] == "done" and run.count("rev-users.merge") == 1
    assert scene.reference(primary) == "user_1" and scene.holder("user_1") == primary
    assert scene.works_of(primary) and not scene.works_of(duplicate)
    scene.end()


def test_what_others_do_comes_at_its_request_or_its_moment(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    scene.export()
    scene.before("rev-users.list", lambda devrev: devrev.delete_contact(duplicate))
    scene.at(3600, lambda devrev: devrev.delete_contact(primary))
    scene.merge()
    assert not scene.organisation.alive(duplicate) and scene.organisation.alive(primary)
    scene.clock.advance(3600)
    assert not scene.organisation.alive(primary) and scene.organisation.merges == []


def test_answers_are_lost_late_or_others(scene: Scene) -> None:
    pairs = scene.pairs(4)
    scene.lose_answer("rev-users.merge")
    scene.lose_request("rev-users.update")
    scene.delay("rev-users.get", 7.0, skip=1)
    scene.answer("rev-users.merge", 406, "<h1>No</h1>", times=1, skip=2)
    scene.answer("rev-users.update", 500, {"message": "broken"}, done=True, times=1)
    scene.merge()
    scene.end()
    assert scene.merged(*pairs)


@pytest.mark.parametrize(
    "step", ["sending rev-users.update", "in the middle of the commit of savepoint.db"]
)
def test_a_killed_run_is_resumed(scene: Scene, step: str) -> None:
    pairs = scene.pairs(2)
    scene.kill(step, 2)
    assert scene.merge().killed
    assert scene.merge().code == 0 and scene.merged(*pairs)


def test_ctrl_c_ends_a_run(scene: Scene) -> None:
    scene.pairs(2)
    scene.after("rev-users.merge", scene.ctrl_c)
    assert scene.merge().code == 130


def test_files_are_lost_and_put_back(scene: Scene) -> None:
    pairs = scene.pairs(2)
    scene.merge("--limit", "1")
    scene.keep("savepoint.db")
    scene.merge()
    scene.put_back("savepoint.db")
    scene.lose("savepoint-copy.db")
    assert scene.merge().code == 2  # the reports know better
    scene.lose("merge_report_*.json")
    assert scene.merge().code == 0 and scene.merged(*pairs)


def test_merges_are_undone_and_settled(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    scene.merge()
    assert scene.undo(None, "--preview").code == 0 and scene.undo().code == 0
    assert scene.holder("user_1") not in (primary, duplicate, None)
    scene.pair(2)
    scene.export()
    scene.fault("merge-never")
    scene.merge("--merge-timeout", "2")
    settled = scene.settle("person2@example.com")
    assert settled.rows[scene.holder("user_2")]["state"] == "cancelled"
    assert "cancelled" in scene.run("--status").out


def test_an_invariant_that_is_broken_is_said_unless_it_is_waived(scene: Scene) -> None:
    with pytest.raises(InvariantBroken):
        broken("an invariant", "what broke it")
    scene.waive("an invariant", "to show that it can be waived")
    broken("an invariant", "what broke it")
