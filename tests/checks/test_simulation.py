"""A few dozen scenarios in simulated time, and the simulation itself."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.mutants import Source
from tests.simulate import play
from tests.simulation.scene import Scene
from tests.simulation.world import MODULE, InvariantBroken, broken, load

FEW = 24  # CI plays two hundred more


@pytest.fixture(scope="module")
def module() -> Any:
    return load()


@pytest.mark.parametrize("part", range(4))
def test_scenarios_keep_the_invariants(module: Any, part: int) -> None:
    for seed in range(1000 + part, 1000 + FEW, 4):
        verdict = play(seed, module)
        assert not verdict.invariant, (
            f"python -m tests.simulate --seed {seed}: {verdict.invariant}: {verdict.what}"
        )


def test_a_seed_is_always_the_same_scenario() -> None:
    command = [sys.executable, "-m", "tests.simulate", "--seed", "34"]
    scenarios = set()
    for number in "01":
        environment = {**os.environ, "PYTHONHASHSEED": number}
        shown = subprocess.check_output(command, cwd=str(MODULE.parent), env=environment)
        scenarios.add(shown.rpartition(b" in ")[0])
    assert len(scenarios) == 1


def test_a_broken_invariant_is_shown() -> None:
    module = load(name="merge_contacts_mutant")

    async def save(_savepoint: Any, _pair: Any) -> None:
        """Save nothing."""

    module.SavePoint.save = save
    found = [play(seed, module).invariant for seed in range(5)]
    assert any("file" in one or "forgotten" in one for one in found), found


def test_an_invariant_that_a_scene_does_without_is_waived(scene: Scene) -> None:
    with pytest.raises(InvariantBroken):
        broken("an invariant", "what broke it")
    scene.waive("an invariant", "to show that it can be waived")
    broken("an invariant", "what broke it")


def test_mutants_of_all_sections_and_kinds_can_be_compiled() -> None:
    source = Source(MODULE.read_text(encoding="utf-8"))
    found = list(source.mutants())
    assert len(found) > 2000 and len({mutant.section for mutant in found}) > 14
    assert {mutant.change.kind for mutant in found} == {
        "boundary", "and/or", "constant", "opposite", "swapped", "no call", "no assignment",
        "no guard", "no keyword", "no field",
    }  # fmt: skip
    for mutant in found[::511]:
        compile(source.changed_by(mutant), mutant.name, "exec")
