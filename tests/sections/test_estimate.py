"""Estimate: a preview says about how many requests a run takes."""

from __future__ import annotations

import json

import pytest

from tests.simulation.scene import Scene


@pytest.mark.parametrize("tickets", [(0, 0), (2, 1), (6, 6)])
@pytest.mark.parametrize("options", [(), ("--no-timelines",)])
@pytest.mark.parametrize("pairs", [1, 25])
def test_a_run_takes_about_as_many_requests_as_the_preview_says(
    scene: Scene, pairs: int, options: tuple[str, ...], tickets: tuple[int, int]
) -> None:
    scene.pairs(pairs, tickets=tickets)
    scene.export()
    plan = json.loads(scene.run("--csv", "contacts.csv", "--preview", "--json", *options).out)
    assert scene.merge(*options).code == 0
    estimate = plan["summary"]["estimated_requests"]
    assert estimate == pytest.approx(len(scene.world.requests), rel=0.25)
