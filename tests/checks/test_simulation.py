"""A few dozen scenarios in simulated time, and the simulation itself."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

from tests.fake.organisation import Organisation
from tests.fake.world import World
from tests.mutants import Source
from tests.simulate import play
from tests.simulation.expected import Row, StoredFile, joined, plan_of
from tests.simulation.scene import Scene
from tests.simulation.world import (
    MODULE,
    Clock,
    Connection,
    InvariantBroken,
    Killed,
    SimulatedProcess,
    broken,
    load,
)

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
    scenarios = {
        subprocess.run(command, cwd=str(MODULE.parent), env={**os.environ, "PYTHONHASHSEED": str(number)},
                       stdout=subprocess.PIPE, check=True).stdout.rpartition(b" in ")[0]
        for number in range(2)
    }  # fmt: skip
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


def test_mutants_of_all_sections_can_be_compiled() -> None:
    source = Source(MODULE.read_text(encoding="utf-8"))
    found = list(source.mutants())
    assert len(found) > 2000 and len({mutant.section for mutant in found}) > 14
    for mutant in found[::511]:
        compile(source.changed_by(mutant), mutant.name, "exec")


class Silent:
    disk_was_full = full_now = False

    def wrote(self, _name: str, _rows: List[Any]) -> None:
        pass


@pytest.mark.parametrize("kill_at", range(1, 8))
def test_a_commit_that_is_torn_is_rolled_back(tmp_path: Path, kill_at: int) -> None:
    """Killed before, in or after a commit, a file holds what it held before, or all of it."""
    path = tmp_path / "savepoint.db"
    process = SimulatedProcess(None, Clock(), World(Organisation(), lambda: 0.0), 1)
    process.observer = Silent()
    db = sqlite3.connect(str(path), isolation_level=None, factory=Connection)
    db.process, db.path = process, path
    process.connections[path.name] = db
    process.kill_at = kill_at
    held = []
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        for statement in ("CREATE TABLE t (n INTEGER)", "INSERT INTO t VALUES (1)"):
            db.execute("BEGIN")
            db.execute(statement)
            db.execute("COMMIT")
            held.append(statement)
    except Killed:
        process.end()
    process.end()
    with sqlite3.connect(str(path)) as again:
        tables = again.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        rows = again.execute("SELECT count(*) FROM t").fetchone()[0] if tables else 0
    assert tables + rows in (len(held), len(held) + 1)
    assert process.steps >= kill_at or len(held) == 2


OLD = "2024-01-02T00:00:00.000Z"


def rows(*references: str, email: str = "ada@example.com", created: str = OLD) -> List[Row]:
    return [Row(f"don:{email}/{at}", email, ref, 0, created) for at, ref in enumerate(references)]


ADAS = rows("REVU-1", email="Ada@example.com") + rows("user_2", email="aDA@example.com ")
STREETS = rows("REVU-1", email="straße@example.com") + rows("user_2", email="strasse@example.com")


@pytest.mark.parametrize(
    ("contacts", "primary", "merges"),
    [
        (rows("REVU-1", "user_2"), "revu", [(0, 1, "user_2")]),
        (rows("REVU-1", "user_2"), "user", [(1, 0, None)]),
        (rows("REVU-1", "REVU-2", "user_3"), "revu", [(0, 2, "user_3"), (0, 1, None)]),
        (rows("REVU-1", "REVU-2", "REVU-3", "user_4"), "revu", []),
        (rows("REVU-1", "crm-2", "crm-3", "user_4"), "revu", [(0, 3, "user_4")]),
        (rows("REVU-1", "user_2", email="NoReply+x@example.com"), "revu", []),
        (rows("REVU-1", "user_2", email="support@example.com"), "revu", [(0, 1, "user_2")]),
        (rows("REVU-1", "REVU-2", "user_3", email="support@example.com"), "revu", []),
        (rows("REVU-1", "user_2", "user_3"), "revu", []),
        (ADAS, "revu", [(0, 1, "user_2")]),
        (STREETS, "revu", []),
    ],
)  # fmt: skip
def test_the_second_opinion_on_a_plan(contacts: List[Row], primary: str, merges: List[Any]) -> None:
    wanted = [(contacts[one].id, contacts[other].id, reference) for one, other, reference in merges]
    found = [(*ids, one.new_ref) for ids, one in plan_of(contacts, {}, primary).items()]
    assert sorted(found, key=str) == sorted(wanted, key=str)


def test_the_older_contact_is_primary_whatever_its_date_looks_like() -> None:
    later, older = rows("REVU-1", "REVU-2", created="2024-01-02 00:30:00")
    (user,) = rows("user_3")
    older = older._replace(created="2024-01-02 01:00:00+02:00")
    assert {ids[0] for ids in plan_of([later, older, user._replace(id="don:x")], {})} == {older.id}


def test_the_second_opinion_on_what_two_files_know() -> None:
    older, newer = (
        StoredFile({("p", "d"): {"state": state, "revision": at, "requested_at": 1.0}}, {}, at)
        for at, state in ((5, "done"), (6, "requested"))
    )
    assert joined(older, newer)["p", "d"]["revision"] == 6
