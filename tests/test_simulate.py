"""A few dozen lives in simulated time, those that have found something once, and the simulation itself."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.mutants import MUTANTS, SEEDS, hunt, line_of
from tests.simulate import kept_seeds, play
from tests.simulated import MODULE, load

FEW = 24


@pytest.fixture(scope="module")
def module() -> Any:
    return load()


@pytest.mark.parametrize("part", range(4))
def test_lives_keep_the_promises(module: Any, part: int) -> None:
    for seed in [*range(1 + part, 1 + FEW, 4), *kept_seeds()[part::4]]:
        verdict = play(seed, module)
        assert not verdict.invariant, f"python -m tests.simulate --seed {seed}: {verdict.invariant}: {verdict.what}"


@pytest.mark.parametrize("seed", ["6", "82"])  # one with an undo; one that is killed while it writes its report
def test_a_seed_is_always_the_same_life(seed: str) -> None:
    command = [sys.executable, "-m", "tests.simulate", "--seed", seed, "--trace"]
    scenarios = {
        subprocess.run(command, cwd=str(MODULE.parent), env={**os.environ, "PYTHONHASHSEED": str(number)},
                       stdout=subprocess.PIPE, check=True).stdout
        for number in range(3)
    }  # fmt: skip
    assert len(scenarios) == 1


def test_a_broken_promise_is_shown(module: Any) -> None:
    (mutant,) = (one for one in MUTANTS if one.name == "the intent is not noted")
    draws = hunt(mutant, 40)
    assert draws.seed is not None and "durable before the request leaves" in draws.invariant


def test_each_mutant_can_be_made() -> None:
    text = MODULE.read_text(encoding="utf-8")
    for mutant in MUTANTS:
        assert mutant.old in text, f"the line of the mutant «{mutant.name}» is not in the module any more"
        compile(text.replace(mutant.old, mutant.new, 1), mutant.name, "exec")


@pytest.mark.mutants
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_no_mutant_lives(mutant: Any) -> None:
    draws = hunt(mutant, SEEDS)
    assert draws.seed is not None or mutant.covered, line_of(draws)
