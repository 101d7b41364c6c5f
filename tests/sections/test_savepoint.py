"""The savepoint: two files with one content, whatever is lost, old, damaged or can't be written, and whenever it is killed."""

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

import merge_contacts as tool
from merge_contacts import (
    SAVEPOINT,
    SAVEPOINT_COPY,
    ApiSettings,
    Contact,
    Environment,
    FatalError,
    Pair,
    SavePoint,
    State,
    StoredPair,
    winning_row,
)
from tests.sandbox import Fault, Organisation, Sandbox
from tests.simulation.scene import Scene
from tests.support import ROOT, Workplace, assert_merged, organisation_of_pairs

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals or mounts")
odd_machine = [sys.executable, str(ROOT / "tests" / "process" / "odd_machine.py")]
ORGANISATION = "don:identity:dvrv-us-1:devo/ACME:revu/"


def pair_of(
    number: int, state: State = State.PLANNED, organisation: str = ORGANISATION, **fields: Any
) -> Pair:
    email = f"person{number}@example.com"
    primary, duplicate = (
        Contact(f"{organisation}{kind}{number}", "", email, reference, "", 1, "", "")
        for kind, reference in (("P", f"REVU-P{number}"), ("D", f"user_{number}"))
    )
    return Pair(primary, duplicate, f"user_{number}", state, **fields)


def row(revision: int, state: State, **fields: Any) -> StoredPair:
    return StoredPair(revision, "20250131_120000", pair_of(1, state, **fields).to_json())


# -- which of two rows is believed --------------------------------------------------------------------

REQUESTED = row(5, State.REQUESTED, requested_at=100.0)


@pytest.mark.parametrize(
    "one, other, winner",
    [
        # The higher revision wins, whatever the clock says.
        (row(5, State.DONE, requested_at=100.0, updated="2030"), row(6, State.UNDONE, requested_at=100.0), 1),
        (row(7, State.VERIFYING, requested_at=100.0), row(6, State.MERGED, requested_at=100.0), 0),
        # At equal revisions the one that says more was requested.
        (row(5, State.PLANNED), REQUESTED, 1),
        (REQUESTED, row(5, State.ACKNOWLEDGED, requested_at=100.0), 1),
        (row(5, State.DONE, requested_at=100.0), row(5, State.VERIFYING, requested_at=100.0), 0),
        # Among ended ones the one that a person has decided.
        *((row(5, State.DONE, requested_at=1.0), row(5, state, requested_at=1.0), 1)
          for state in (State.UNDONE, State.UNDO_SETTLED, State.CANCELLED)),
        # A row with a request never loses to one without.
        (REQUESTED, row(9, State.PLANNED), 0),
        (REQUESTED, row(9, State.FAILED), 0),
        # But the withdrawal of that very request is believed.
        (REQUESTED, row(9, State.PLANNED, withdrawn_at=100.0), 1),
        (REQUESTED, row(9, State.FAILED, withdrawn_at=50.0), 0),
    ],
)  # fmt: skip
def test_which_row_wins(one: StoredPair, other: StoredPair, winner: int) -> None:
    for found in (winning_row(one, other), winning_row(other, one)):
        assert found.document == (one, other)[winner].document
        assert found.revision == max(one.revision, other.revision)


# -- two files, one content ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def opened(run: str = "20250131_120000", readonly: bool = False) -> Iterator[SavePoint]:
    with contextlib.closing(
        SavePoint(Environment(ApiSettings(token="")), run, readonly)
    ) as savepoint:
        yield savepoint


def rows_of(path: Path) -> List[Any]:
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        pairs = db.execute("SELECT * FROM pairs ORDER BY primary_id").fetchall()
        return [*pairs, *db.execute("SELECT * FROM runs ORDER BY id").fetchall()]


def states(savepoint: SavePoint) -> Dict[str, str]:
    return {pair.email.partition("@")[0]: pair.state.value for pair in savepoint.pairs(*State)}


def fill() -> None:
    with opened() as savepoint:
        savepoint.save_now([pair_of(1, State.DONE, requested_at=1.0)])
        shutil.copy(str(SAVEPOINT), "old-savepoint.db")
        shutil.copy(str(SAVEPOINT_COPY), "old-copy.db")
        savepoint.save_now([pair_of(2, State.MERGED, requested_at=2.0)])
        savepoint.write({}, {"20250131_120000": {"reported": True}})
        savepoint.save_now([pair_of(3, State.FAILED)])


@pytest.mark.parametrize(
    "happen",
    [
        lambda: SAVEPOINT.unlink(),
        lambda: SAVEPOINT_COPY.unlink(),
        lambda: shutil.copy("old-savepoint.db", str(SAVEPOINT)),
        lambda: shutil.copy("old-copy.db", str(SAVEPOINT_COPY)),
        lambda: (shutil.copy(str(SAVEPOINT_COPY), "aside"), shutil.copy(str(SAVEPOINT), str(SAVEPOINT_COPY)),
                 shutil.copy("aside", str(SAVEPOINT))),
        lambda: SAVEPOINT.write_bytes(b""),
        lambda: SAVEPOINT_COPY.write_bytes(b""),
        lambda: (SAVEPOINT.unlink(), sqlite3.connect(str(SAVEPOINT)).execute("PRAGMA user_version = 0")),
        lambda: None,
    ],
    ids=["deleted", "copy deleted", "old", "copy old", "swapped", "empty", "copy empty", "without tables", "nothing"],
)  # fmt: skip
@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_that_is_lost_or_old_loses_nothing(
    folder: Path, happen: Callable[[], Any], readonly: bool
) -> None:
    fill()
    happen()
    before = {path: path.read_bytes() for path in (SAVEPOINT, SAVEPOINT_COPY) if path.exists()}
    with opened("20250131_130000", readonly) as savepoint:
        assert states(savepoint) == {"person1": "done", "person2": "merged", "person3": "failed"}
        assert list(savepoint.runs()) == ["20250131_120000"]
        assert savepoint.warnings == []
    if readonly:
        assert before == {
            path: path.read_bytes() for path in (SAVEPOINT, SAVEPOINT_COPY) if path.exists()
        }
    else:
        assert rows_of(SAVEPOINT) == rows_of(SAVEPOINT_COPY) and len(rows_of(SAVEPOINT)) == 4


def test_rows_that_disagree_at_one_revision_are_named_and_the_one_that_says_more_is_taken(
    folder: Path,
) -> None:
    with opened() as savepoint:
        savepoint.save_now(
            [
                pair_of(1, State.DONE, requested_at=1.0),
                pair_of(2, State.REQUESTED, requested_at=1.0),
            ]
        )
    document = json.dumps(pair_of(1, State.UNDONE, requested_at=1.0).to_json())
    with contextlib.closing(sqlite3.connect(str(SAVEPOINT_COPY))) as db:
        db.execute(
            "UPDATE pairs SET state = 'undone', document = ? WHERE primary_id LIKE '%P1'",
            [document],
        )
        db.commit()
    with opened("20250131_130000") as savepoint:
        assert states(savepoint) == {"person1": "undone", "person2": "requested"}
        (warning,) = savepoint.warnings
        assert "person1@example.com" in warning and "undone" in warning
    assert rows_of(SAVEPOINT) == rows_of(SAVEPOINT_COPY)


def test_a_write_stands_in_both_files_before_it_returns_and_rows_know_their_run(
    folder: Path,
) -> None:
    with opened() as savepoint:
        asyncio.run(savepoint.save(pair_of(1, State.REQUESTED, requested_at=1.0)))
        for path in (SAVEPOINT, SAVEPOINT_COPY):
            shutil.copy(str(path), "aside.db")
            ((_, duplicate, organisation, email, state, _, run, revision, _),) = rows_of(
                Path("aside.db")
            )
            assert (duplicate, organisation, email) == (
                f"{ORGANISATION}D1",
                "dvrv-us-1:devo/ACME",
                "person1@example.com",
            )
            assert (state, run, revision) == (
                "requested",
                "20250131_120000",
                savepoint.write_number,
            )


def test_rows_of_another_organisation_are_neither_read_nor_lost(folder: Path) -> None:
    other = "don:identity:dvrv-us-1:devo/OTHER:revu/"
    with opened() as savepoint:
        savepoint.save_now([pair_of(1, State.MERGED, requested_at=1.0)])
        savepoint.save_now([pair_of(2, State.MERGED, organisation=other, requested_at=1.0)])
        savepoint.organisation = "dvrv-us-1:devo/ACME"
        assert [pair.email for pair in savepoint.unfinished()] == ["person1@example.com"]
        assert savepoint.other_organisations() == 1
    with opened("20250131_130000") as savepoint:
        assert len(savepoint.unfinished()) == 2


# -- files that can't be used -------------------------------------------------------------------------


def refusal() -> FatalError:
    with pytest.raises(FatalError) as refused, opened("20250131_130000"):
        pass
    return refused.value


@pytest.mark.parametrize("path, other", [(SAVEPOINT, SAVEPOINT_COPY), (SAVEPOINT_COPY, SAVEPOINT)])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"not a database at all" * 50,
        lambda data: data[:5000],
        lambda data: data[:50],
        lambda data: data[:4096] + os.urandom(4096) + data[8192:],
        # Only a check of all pages finds one that belongs to nothing.
        lambda data: (
            data[:28]
            + (int.from_bytes(data[28:32], "big") + 1).to_bytes(4, "big")
            + data[32:]
            + bytes(4096)
        ),
    ],
)
def test_a_damaged_file_is_left_as_it_is_and_the_other_named(
    folder: Path, path: Path, other: Path, damage: Callable[[bytes], bytes]
) -> None:
    fill()
    path.write_bytes(damage(path.read_bytes()))
    before = {one: one.read_bytes() for one in (path, other)}
    stop = refusal()
    assert (
        stop.exit_code == 2
        and f"{path} is damaged" in str(stop)
        and f"{other} has everything" in str(stop)
    )
    assert before == {one: one.read_bytes() for one in (path, other)}
    path.unlink()
    with opened("20250131_130000") as savepoint:
        assert len(states(savepoint)) == 3


@pytest.mark.parametrize("version", [1, 2, 5])
def test_state_of_another_format_is_refused(folder: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(str(SAVEPOINT))) as db:
        db.execute("CREATE TABLE pairs (email TEXT)")
        db.execute("PRAGMA application_id = 0x4D434F4E")
        db.execute(f"PRAGMA user_version = {version}")
    before = SAVEPOINT.read_bytes()
    stop = refusal()
    assert stop.exit_code == 2 and f"format {version}" in str(stop) and "savepoint.db" in str(stop)
    assert SAVEPOINT.read_bytes() == before


def test_another_programs_database_is_refused(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(str(SAVEPOINT))) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    assert refusal().exit_code == 2


def test_a_run_id_that_a_run_has_already_is_not_given_again(folder: Path) -> None:
    fill()
    with opened("20250131_120000") as savepoint:
        assert savepoint.run != "20250131_120000"


# -- through the front door ---------------------------------------------------------------------------


@contextlib.contextmanager
def made_readonly(path: Path) -> Iterator[None]:
    """Nobody can write to a file; root only where this machine lets us mount it so."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root:
        if not sys.platform.startswith("linux") or subprocess.call(
            ["mount", "--bind", str(path), str(path)]
        ):
            pytest.skip("a file can't be mounted here")
        subprocess.check_call(["mount", "-o", "remount,ro,bind", str(path)])
    else:
        path.chmod(0o400)
    try:
        yield
    finally:
        if is_root:
            subprocess.check_call(["umount", str(path)])
        else:
            path.chmod(0o600)


def reports_of(place: Workplace) -> List[Dict[str, Any]]:
    paths = sorted((place.folder / "reports").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def assert_each_in_one_report(place: Workplace, pairs: List[Tuple[str, str]]) -> None:
    entries = [entry for report in reports_of(place) for entry in report["successful_merges"]]
    assert sorted((one["primary"]["id"], one["duplicate"]["id"]) for one in entries) == sorted(
        pairs
    )


@pytest.mark.parametrize(
    "step, stored",
    [
        ("before the commit of savepoint.db", False),
        ("after the commit of savepoint.db", True),
        ("after the commit of savepoint-copy.db", True),
    ],
)
def test_a_request_that_was_killed_while_it_was_written_is_polled_for(
    scene: Scene, step: str, stored: bool
) -> None:
    """The copy's commit is the second one; only after it the request may have been sent."""
    pair = scene.pair(1)
    scene.kill(step, 5)  # opening, organisation, the run, its backup, and the request
    assert scene.merge().code is None and scene.count("rev-users.merge") == 0
    run = scene.merge()
    asked = [one.endpoint for one in run.requests]
    before = asked[: asked.index("rev-users.merge")]
    assert run.code == 0 and ("rev-users.get" in before) is stored
    assert scene.merged(pair) and scene.count("rev-users.merge") == 1


@posix
@pytest.mark.parametrize("path", ["savepoint.db", "backups/savepoint-copy.db"])
def test_a_file_that_can_not_be_written_is_exit_3_before_the_first_request_and_can_be_read(
    place: Workplace, path: str
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--limit", "1", check=0)
        requests = len(sandbox.requests)
        with made_readonly(place.folder / path):
            assert path in place.run(sandbox, check=3).err
            assert len(sandbox.requests) == requests
            assert "1 merged and verified" in place.run(None, "--status", check=0).out
            assert (
                place.run(None, "--preview", check=0)
                .out.splitlines()[-1]
                .startswith("1 pair to merge")
            )
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


@pytest.mark.parametrize("path", ["savepoint.db", "savepoint-copy.db"])
def test_where_one_file_can_not_be_written_any_more_nothing_more_is_requested_and_the_rest_is_finished(
    place: Workplace, path: str
) -> None:
    organisation, pairs = organisation_of_pairs(6)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        # Opening, the organisation and the run's row are a write each, then come the intents.
        result = place.run(sandbox, python=[*odd_machine, f"disk={path}:6"], check=3)
        requested = sandbox.count("rev-users.merge")
        assert 0 < requested < 6 and "can't be written any more" in result.err
        for primary, _ in organisation.merges:
            assert organisation.contacts[primary]["external_ref"].startswith("user_")
        place.run(sandbox, "--merge-timeout", "4", check=0)
    assert_merged(organisation, pairs)
    assert_each_in_one_report(place, pairs)


@pytest.mark.parametrize("name", ["savepoint.db", "savepoint-copy.db"])
@pytest.mark.parametrize("number", [1, 6])
def test_what_a_kill_tears_is_read_without_being_touched(
    scene: Scene, name: str, number: int
) -> None:
    scene.pair(1)
    scene.kill(f"in the middle of the commit of {name}", number)
    scene.merge()
    before = {path: path.read_bytes() for path in Path().rglob("savepoint*")}
    assert any(path.name.endswith("-journal") for path in before) or number == 1
    assert scene.run("--status").code == 0
    assert before == {path: path.read_bytes() for path in Path().rglob("savepoint*")}
    assert scene.merge().code == 0


def test_a_second_run_in_the_folder_is_told_who_holds_it_and_status_and_preview_work_meanwhile(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("hang", "works.list", times=1, detail=30)]) as sandbox:
        first = place.start(sandbox)
        while not sandbox.count("works.list"):
            time.sleep(0.01)
        assert f"process {first.pid}" in place.run(sandbox, check=11).err
        out = place.run(None, "--status", check=0).out
        assert (
            f"a run is in progress: process {first.pid}" in out
            and "merge of 2 pairs: 0 ended" in out
        )
        assert json.loads(place.run(None, "--status", "--json", check=0).out)["running"] is True
        assert (
            place.run(None, "--preview", check=0)
            .out.splitlines()[-1]
            .startswith("2 pairs to merge")
        )
        first.kill()
        first.communicate()
        out = place.run(None, "--status", check=0).out
        assert "a run is in progress" not in out and "was killed" in out
        place.run(None, "--preview", check=0)
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def test_rows_of_another_organisation_stay_and_one_line_says_so(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("merge-never", "rev-users.merge")]) as sandbox:
        place.run(sandbox, "--merge-timeout", "0.5", check=1)
        sandbox.faults.clear()
        swap(place, "SANDBOX1", "SANDBOX2")
        result = place.run(sandbox, "--merge-timeout", "0.5", check=0)
        assert "1 pair of another organisation" in result.err
    assert_merged(organisation, pairs)
    with contextlib.closing(sqlite3.connect(str(place.folder / "savepoint.db"))) as db:
        assert sorted(db.execute("SELECT organisation, state FROM pairs")) == [
            ("dvrv-us-1:devo/SANDBOX1", "done"), ("dvrv-us-1:devo/SANDBOX2", "acknowledged"),
        ]  # fmt: skip


def test_settling_pairs_of_two_organisations_reports_both(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("merge-never", "rev-users.merge")]) as sandbox:
        place.run(sandbox, "--merge-timeout", "0.5", "--email", "person1@example.com", check=1)
        swap(place, "SANDBOX1", "SANDBOX2")
        place.run(sandbox, "--merge-timeout", "0.5", "--email", "person2@example.com", check=1)
        result = place.run(
            sandbox, "--settle", "person1@example.com", "person2@example.com", check=0
        )
    assert sorted(one["email"] for one in result.report["cancelled"]) == [
        "person1@example.com",
        "person2@example.com",
    ]
    assert result.report["summary"]["cancelled"] == 2 and result.report["unfinished_merges"] == []


def swap(place: Workplace, organisation: str, other: str) -> None:
    """Let the stored pairs belong to another organisation."""
    for path in (place.folder / "savepoint.db", place.folder / "backups" / "savepoint-copy.db"):
        with contextlib.closing(sqlite3.connect(str(path))) as db:
            for column in ("primary_id", "duplicate_id", "organisation", "document"):
                db.execute(
                    f"UPDATE pairs SET {column} = replace({column}, ?, ?)", [organisation, other]
                )
            db.commit()


@pytest.mark.parametrize("seconds", [-86400.0, 86400.0])
def test_a_clock_that_was_set_is_no_reason_to_wait_longer_than_the_merge_timeout(
    scene: Scene, seconds: float
) -> None:
    """The first request lies a day ahead or back of the second run."""
    pair = scene.pair(1)
    scene.fault("merge-never", "rev-users.merge", times=1)
    scene.merge("--merge-timeout", "20")
    scene.clock.set_by += seconds
    begun = scene.clock.now
    assert scene.merge("--merge-timeout", "20").code == 0 and scene.merged(pair)
    assert scene.clock.now - begun < 60


def test_a_savepoint_that_is_lost_with_its_copy_is_not_taken_for_a_new_folder(
    scene: Scene,
) -> None:
    pairs = scene.pairs(2)
    files = ("savepoint.db", "savepoint-copy.db")
    scene.merge("--limit", "1")
    scene.keep(*files)
    scene.merge()
    requests = len(scene.world.requests)
    for is_older in (True, False):
        for name in files:
            scene.lose(name)
        if is_older:
            scene.put_back(*files)
        run = scene.merge()
        assert run.code == 2 and "put back from an older copy" in run.refusal
        assert len(scene.world.requests) == requests
    scene.lose("merge_report_*.json")  # who knows better moves the reports away
    assert scene.merge().code == 0 and scene.merged(*pairs)


# -- a report for each run ----------------------------------------------------------------------------


def test_a_killed_run_gets_its_report_from_the_next_and_each_pair_stands_in_one(
    scene: Scene,
) -> None:
    pairs = scene.pairs(4)
    scene.kill("sending rev-users.merge", 3)
    assert scene.merge("--workers", "1").code is None
    assert not list(Path("reports").iterdir())
    assert scene.merge().code == 0 and scene.merged(*pairs)
    first, second = (
        json.loads(path.read_bytes()) for path in sorted(Path().glob("reports/*.json"))
    )
    ended = [first["run"][name] for name in ("exit_code", "stopped", "end")]
    assert ended == [None, "killed", None] and second["run"]["exit_code"] == 0
    for name in ("plan_id", "csv", "token_owner"):
        assert first["run"][name] == second["run"][name]
    # What only the CSV could give is not known.
    assert [first[name] for name in ("skipped", "look_alikes", "invalid_rows")] == [None] * 3
    assert first["summary"]["pairs_planned"] is None and first["summary"]["left"] is None
    assert {entry["in_csv"] for entry in first["successful_merges"]} <= {None}
    assert len([*first["successful_merges"], *second["successful_merges"]]) == 4
    assert (
        len(list(Path("reports").glob("*.csv"))) == len(list(Path("reports").glob("*.html"))) == 2
    )
    # A report that the user has deleted is not written again.
    scene.lose("merge_report_*.json")
    third = scene.merge()
    assert third.report["summary"]["already_merged"] == 4 and not third.report["successful_merges"]
    assert len(list(Path("reports").glob("*.json"))) == 1


@pytest.mark.parametrize("step", ["before", "after"])
@pytest.mark.parametrize("suffix", ["json", "html", "csv"])
def test_a_kill_while_the_report_is_written_leaves_each_pair_in_one_report(
    scene: Scene, step: str, suffix: str
) -> None:
    pair = scene.pair(1)
    scene.kill(f"{step} naming merge_report_20")
    scene.merge()
    scene.merge()
    scene.end()
    assert scene.merged(pair)


UNDO = {"path": "x", "state_before": "done", "merge_run": "", "merge_revision": 1}


def change_documents(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the documents of the rows that are done, as another version may have written them."""
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        ((document,),) = db.execute("SELECT document FROM pairs WHERE state = 'done'").fetchall()
        changed = json.dumps(change(json.loads(document)))
        db.execute("UPDATE pairs SET document = ? WHERE state = 'done'", (changed,))


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("path", [SAVEPOINT, SAVEPOINT_COPY])
@pytest.mark.parametrize(
    "change, word",
    [
        ({"state": "paused"}, "'paused'"),
        ({"undo": {**UNDO, "state_before": "paused"}}, "'paused'"),
        ({"undo": {"path": "x"}}, "state_before"),
        ([], "list"),
    ],
    ids=["state", "state before an undo", "an undo without its fields", "no object"],
)
def test_what_this_version_does_not_understand_is_refused_and_left_as_it_is(
    folder: Path, change: Any, word: str, path: Path, readonly: bool
) -> None:
    fill()
    change_documents(path, lambda document: {**document, **change} if change else change)
    before = [file.read_bytes() for file in (SAVEPOINT, SAVEPOINT_COPY)]
    with pytest.raises(FatalError) as refused, opened("20250131_120001", readonly):
        pass
    assert refused.value.exit_code == 2
    assert word in str(refused.value) and f"{path} was left as it is" in str(refused.value)
    assert [file.read_bytes() for file in (SAVEPOINT, SAVEPOINT_COPY)] == before


def test_fields_of_another_version_are_kept_and_missing_ones_have_their_default(
    folder: Path,
) -> None:
    fill()

    def other_version(document: Any) -> Any:
        document.update(mood="good", undo={**UNDO, "mood": "better"})
        del document["fields_lost"], document["seconds"]
        return document

    for path in (SAVEPOINT, SAVEPOINT_COPY):
        change_documents(path, other_version)
    with opened("20250131_120001") as savepoint:
        (pair,) = savepoint.pairs(State.DONE)
        assert pair.fields_lost == [] and pair.seconds == 0
        pair.error = "changed by this version"
        savepoint.save_now([pair])
    for path in (SAVEPOINT, SAVEPOINT_COPY):
        (stored,) = (json.loads(row[-1]) for row in rows_of(path) if "changed by" in row[-1])
        assert (stored["mood"], stored["undo"]["mood"]) == ("good", "better")
        assert stored["fields_lost"] == []


@pytest.mark.parametrize("behind", [[SAVEPOINT], [SAVEPOINT_COPY], [SAVEPOINT, SAVEPOINT_COPY]])
@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_that_is_behind_is_migrated_in_its_first_transaction(
    folder: Path, behind: List[Path], readonly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill()
    for path in behind:
        with contextlib.closing(sqlite3.connect(str(path))) as db:
            db.execute(f"PRAGMA user_version = {tool.FIRST_FORMAT}")

    def rename(db: sqlite3.Connection) -> None:
        assert db.in_transaction or readonly
        db.execute("UPDATE pairs SET email = 'migrated'")

    monkeypatch.setattr(tool, "MIGRATIONS", (rename, *tool.MIGRATIONS[1:]))
    with opened("20250131_120001", readonly) as savepoint:
        assert len(states(savepoint)) == 3
    for path in (SAVEPOINT, SAVEPOINT_COPY):
        with contextlib.closing(sqlite3.connect(str(path))) as db:
            ((version,),) = db.execute("PRAGMA user_version").fetchall()
            emails = {email for (email,) in db.execute("SELECT email FROM pairs")}
        assert (version == tool.FIRST_FORMAT) is (readonly and path in behind)
        assert (emails == {"migrated"}) is (path in behind and not readonly)


# -- folders that version 3.0.0 has left --------------------------------------------------------------

FOLDERS_OF_3_0_0 = ROOT / "tests" / "data" / "3.0.0"


def left_by_3_0_0(
    place: Workplace, name: str, count: int, references: int
) -> Tuple[Organisation, List[Tuple[str, str]]]:
    """Put the folder in place, and the organisation as that run has left it: all merged, so many
    references set."""
    organisation, pairs = organisation_of_pairs(count)
    place.export(organisation)
    shutil.copytree(str(FOLDERS_OF_3_0_0 / name), str(place.folder), dirs_exist_ok=True)
    for number, ids in enumerate(pairs):
        organisation.merge(*ids)
        if number < references:
            contact = organisation.contacts[ids[0]]
            organisation.change(contact, external_ref=f"user_{number + 1}")
    return organisation, pairs


def add_unknown_field(place: Workplace) -> None:
    for path in (place.folder / SAVEPOINT, place.folder / SAVEPOINT_COPY):
        with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
            for rowid, document in db.execute("SELECT rowid, document FROM pairs").fetchall():
                changed = json.dumps({**json.loads(document), "mood": "good"})
                db.execute("UPDATE pairs SET document = ? WHERE rowid = ?", (changed, rowid))


def assert_unknown_field_is_kept(place: Workplace) -> None:
    for path in (place.folder / SAVEPOINT, place.folder / SAVEPOINT_COPY):
        documents = [json.loads(row[-1]) for row in rows_of(path) if len(row) == 9]
        assert documents and all(one["mood"] == "good" for one in documents)


@pytest.mark.parametrize("references", [1, 2], ids=["before", "after"])
@pytest.mark.parametrize("lost", [None, SAVEPOINT, SAVEPOINT_COPY])
def test_a_run_of_3_0_0_killed_between_merge_and_reference_is_finished(
    place: Workplace, references: int, lost: Optional[Path]
) -> None:
    organisation, pairs = left_by_3_0_0(place, "killed_in_merge", 3, references)
    add_unknown_field(place)
    if lost:
        (place.folder / lost).unlink()
    with Sandbox(organisation) as sandbox:
        out = place.run(None, "--status", check=0).out
        assert "was killed" in out
        place.run(sandbox, "--merge-timeout", "8", check=0)
        assert sandbox.count("rev-users.merge") == 0
    assert_merged(organisation, pairs)
    assert_each_in_one_report(place, pairs)
    assert_unknown_field_is_kept(place)


@pytest.mark.parametrize("created", [False, True])
def test_an_undo_of_3_0_0_killed_while_it_created_a_contact_is_finished(
    place: Workplace, created: bool
) -> None:
    organisation, pairs = left_by_3_0_0(place, "killed_in_undo", 2, 2)
    organisation.change(organisation.contacts[pairs[0][0]], external_ref="REVU-P1")
    if created:  # and the answer never heard
        organisation.add_contact("N9", "person1@example.com", "user_1")
    add_unknown_field(place)
    (report,) = (place.folder / "reports").glob("*.json")
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--undo", f"reports/{report.name}", check=0)
        assert sandbox.count("rev-users.create") == (1 if created else 2)
    alive = [
        one["external_ref"] for one in organisation.contacts.values() if one["state"] == "active"
    ]
    assert sorted(alive) == ["REVU-P1", "REVU-P2", "user_1", "user_2"]
    with contextlib.closing(sqlite3.connect(str(place.folder / SAVEPOINT))) as db:
        assert db.execute("SELECT DISTINCT state FROM pairs").fetchall() == [("undone",)]
    assert_unknown_field_is_kept(place)


def test_a_finished_folder_of_3_0_0_is_known_and_can_be_undone(place: Workplace) -> None:
    organisation, pairs = left_by_3_0_0(place, "finished", 2, 2)
    (report,) = (place.folder / "reports").glob("*.json")
    with Sandbox(organisation) as sandbox:
        assert "2 complete backups" in place.run(None, "--verify-backups", check=0).out
        result = place.run(sandbox, check=0)
        assert (
            result.report["summary"]["already_merged"] == 2
            and sandbox.count("rev-users.merge") == 0
        )
        place.run(sandbox, "--undo", f"reports/{report.name}", check=0)
    alive = [
        one["external_ref"] for one in organisation.contacts.values() if one["state"] == "active"
    ]
    assert sorted(alive) == ["REVU-P1", "REVU-P2", "user_1", "user_2"]
