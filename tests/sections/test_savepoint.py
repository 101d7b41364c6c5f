"""The savepoint: two files with one content, whatever is lost, old, damaged or killed."""

import contextlib
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

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
    RunRecord,
    SavePoint,
    State,
    StoredRow,
    winning_row,
)
from tests.sandbox import Fault, Sandbox
from tests.simulation.scene import Scene
from tests.support import ROOT, Pairs, Workplace, assert_merged, organisation_of_pairs

REVU = "don:identity:dvrv-us-1:devo/ACME:revu/"


def pair_of(number: int, state: State = State.PLANNED, **fields: Any) -> Pair:
    primary, duplicate = (
        Contact(f"{REVU}{kind}{number}", "", f"p{number}@x.com", reference, "", 1, "", "")
        for kind, reference in (("P", f"REVU-P{number}"), ("D", f"user_{number}"))
    )
    return Pair(primary, duplicate, f"user_{number}", state, **fields)


# -- which of two rows is believed -----------------------------------------------------------------

REQUESTED = (5, State.REQUESTED, {"requested_at": 100.0})


@pytest.mark.parametrize(
    "one, other, winner",
    [
        # The higher revision wins, whatever the clock says.
        ((5, State.DONE, {"updated": "2030"}), (6, State.UNDONE, {}), 1),
        ((7, State.VERIFYING, {}), (6, State.MERGED, {}), 0),
        # At equal revisions the one that says more was requested.
        ((5, State.PLANNED, {}), REQUESTED, 1),
        (REQUESTED, (5, State.ACKNOWLEDGED, {"requested_at": 100.0}), 1),
        ((5, State.DONE, {}), (5, State.VERIFYING, {}), 0),
        # Among ended ones the one that a person has decided.
        ((5, State.DONE, {}), (5, State.UNDONE, {}), 1),
        ((5, State.DONE, {}), (5, State.UNDO_SETTLED, {}), 1),
        ((5, State.DONE, {}), (5, State.CANCELLED, {}), 1),
        # A row with a request never loses to one without.
        (REQUESTED, (9, State.PLANNED, {}), 0),
        (REQUESTED, (9, State.FAILED, {}), 0),
    ],
)
def test_which_row_wins(one: Any, other: Any, winner: int) -> None:
    rows = [
        StoredRow(revision, "", pair_of(1, state, **fields).to_json())
        for revision, state, fields in (one, other)
    ]
    for found in (winning_row(*rows), winning_row(*rows[::-1])):
        assert found.document == rows[winner].document
        assert found.revision == max(one[0], other[0])


# -- two files, one content ------------------------------------------------------------------------


@contextlib.contextmanager
def opened(run: str = "20250131_130000", readonly: bool = False) -> Iterator[SavePoint]:
    environment = Environment(ApiSettings(token=""))
    with contextlib.closing(SavePoint(environment, run, readonly)) as savepoint:
        yield savepoint


@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        yield db


def rows_of(path: Path) -> List[Any]:
    with database(path) as db:
        pairs = db.execute("SELECT * FROM pairs ORDER BY primary_id").fetchall()
        return [*pairs, *db.execute("SELECT * FROM runs ORDER BY id").fetchall()]


def states(savepoint: SavePoint) -> Dict[str, str]:
    return {pair.email.partition("@")[0]: pair.state.value for pair in savepoint.pairs(*State)}


def contents() -> Dict[Path, bytes]:
    return {path: path.read_bytes() for path in (SAVEPOINT, SAVEPOINT_COPY) if path.exists()}


def fill() -> None:
    with opened("20250131_120000") as savepoint:
        savepoint.save_now([pair_of(1, State.VERIFYING, requested_at=1.0)])
        shutil.copy(str(SAVEPOINT), "old-savepoint.db")
        shutil.copy(str(SAVEPOINT_COPY), "old-copy.db")
        savepoint.save_now([pair_of(1, State.DONE, requested_at=1.0)])
        savepoint.save_now([pair_of(3, State.FAILED)])
        savepoint.save_run(RunRecord("20250131_120000"))
        savepoint.write({}, organisation="ACME")
        savepoint.save_now([pair_of(2, State.MERGED, requested_at=2.0)])


def swap() -> None:
    ours, theirs = contents().values()
    SAVEPOINT.write_bytes(theirs)
    SAVEPOINT_COPY.write_bytes(ours)


LOSSES = [
    SAVEPOINT.unlink,
    SAVEPOINT_COPY.unlink,
    lambda: shutil.copy("old-savepoint.db", str(SAVEPOINT)),
    lambda: shutil.copy("old-copy.db", str(SAVEPOINT_COPY)),
    swap,
    lambda: SAVEPOINT.write_bytes(b""),
    lambda: SAVEPOINT_COPY.write_bytes(b""),
    lambda: None,
]


@pytest.mark.parametrize("happen", LOSSES, ids=range(len(LOSSES)))
@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_that_is_lost_or_old_loses_nothing(
    folder: Path, happen: Callable[[], Any], readonly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fill()
    happen()
    before = contents()
    with opened("20250131_130000", readonly) as savepoint:
        # What changed last comes last.
        assert list(states(savepoint).items()) == [
            ("p1", "done"),
            ("p3", "failed"),
            ("p2", "merged"),
        ]
        assert list(savepoint.runs()) == ["20250131_120000"]
        assert savepoint.meta["organisation"] == "ACME"
        assert not caplog.records and savepoint.write_number == 5  # of the newer file
    if readonly:
        assert before == contents()
    else:
        assert rows_of(SAVEPOINT) == rows_of(SAVEPOINT_COPY) and len(rows_of(SAVEPOINT)) == 4


def test_rows_that_disagree_at_one_revision_are_named_and_the_one_that_says_more_is_taken(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.log, "propagate", True)
    pairs = [pair_of(n, State.DONE, requested_at=1.0) for n in (1, 2)]
    with opened() as savepoint:
        savepoint.save_now(pairs)
    undone = pair_of(1, State.UNDONE, requested_at=1.0)
    with database(SAVEPOINT_COPY) as db:
        change = "UPDATE pairs SET state = 'undone', document = ? WHERE primary_id = ?"
        db.execute(change, [json.dumps(undone.to_json()), undone.primary.id])
    with opened() as savepoint:
        assert states(savepoint) == {"p1": "undone", "p2": "done"}
    (record,) = caplog.records
    assert "p1@x.com" in record.getMessage() and "'undone'" in record.getMessage()
    assert rows_of(SAVEPOINT) == rows_of(SAVEPOINT_COPY)


def leave_hot_journal(path: Path) -> None:
    """Leave the file as a killed process does: pages written, and their journal beside it."""
    with database(path) as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE pairs SET state = 'nonsense', document = '{}'")
        db.execute("CREATE TABLE junk (text TEXT)")
        db.executemany("INSERT INTO junk VALUES (?)", [("x" * 3000,)] * 200)
        for tail in ("", "-journal"):
            shutil.copy(f"{path}{tail}", f"hot{tail}")
        db.execute("ROLLBACK")
    for tail in ("", "-journal"):
        os.replace(f"hot{tail}", f"{path}{tail}")


@pytest.mark.parametrize("path", [SAVEPOINT, SAVEPOINT_COPY])
def test_what_a_kill_tears_is_read_without_being_touched(folder: Path, path: Path) -> None:
    fill()
    leave_hot_journal(path)
    journal = Path(f"{path}-journal")
    before = (contents(), journal.read_bytes())
    for readonly in (True, False):
        with opened("20250131_130000", readonly) as savepoint:
            assert states(savepoint) == {"p1": "done", "p2": "merged", "p3": "failed"}
        assert not readonly or before == (contents(), journal.read_bytes())
    assert rows_of(SAVEPOINT) == rows_of(SAVEPOINT_COPY)


def test_a_write_that_neither_file_takes_is_an_error(folder: Path) -> None:
    with opened() as savepoint:
        for file in savepoint.files:
            file.db.execute("PRAGMA query_only = ON")
        with pytest.raises(FatalError) as stopped:
            savepoint.save_now([pair_of(1)])
    assert stopped.value.exit_code == 3


# -- files that can't be used ----------------------------------------------------------------------


def refusal(readonly: bool = False) -> FatalError:
    """Open the files, which is refused and leaves them as they are."""
    before = contents()
    with pytest.raises(FatalError) as refused, opened(readonly=readonly):
        pass
    assert before == contents() and refused.value.exit_code == 2
    return refused.value


DAMAGES = [
    lambda data: b"not a database at all" * 50,
    lambda data: data[:5000],
    lambda data: data[:50],
    lambda data: data[:4096] + os.urandom(4096) + data[8192:],
    lambda data: data[:47] + b"\x05" + data[48:],  # a schema that SQLite does not know
    # Only a check of all pages finds one that belongs to nothing.
    lambda data: data[:31] + bytes([data[31] + 1]) + data[32:] + bytes(4096),
]


@pytest.mark.parametrize("path, other", [(SAVEPOINT, SAVEPOINT_COPY), (SAVEPOINT_COPY, SAVEPOINT)])
@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_is_left_as_it_is_and_the_other_named(
    folder: Path, path: Path, other: Path, damage: Callable[[bytes], bytes]
) -> None:
    fill()
    path.write_bytes(damage(path.read_bytes()))
    stop = str(refusal())
    assert f"{path} is damaged" in stop and f"{other} has everything" in stop
    path.unlink()
    with opened() as savepoint:
        assert len(states(savepoint)) == 3


@pytest.mark.parametrize("version", [1, 2, 5])
def test_state_of_another_format_is_refused(folder: Path, version: int) -> None:
    fill()
    with database(SAVEPOINT) as db:
        db.execute(f"PRAGMA user_version = {version}")
    assert f"savepoint.db was left as it is: it has format {version}" in str(refusal())


def test_another_programs_database_is_refused(folder: Path) -> None:
    with database(SAVEPOINT) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    assert "has everything" not in str(refusal())


def test_a_run_id_that_a_run_has_already_is_not_given_again(folder: Path) -> None:
    fill()
    with opened("20250131_120000") as savepoint:
        assert savepoint.run != "20250131_120000"


# -- through the front door ------------------------------------------------------------------------


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


@pytest.mark.parametrize("path", ["savepoint.db", "savepoint-copy.db"])
def test_where_one_file_can_not_be_written_nothing_more_is_requested(
    scene: Scene, path: str
) -> None:
    pairs = scene.pairs(6)
    scene.fill_disk(f"commit of {path}", 1)
    refused = scene.merge()
    assert refused.code == 3 and path in refused.refusal and not refused.requests
    # Opening, the organisation and the run's row are a write each, then come the intents.
    scene.fill_disk(f"commit of {path}", 6)
    run = scene.merge()
    assert run.code == 3 and f"{path} can't be written any more" in str(run.report["run"])
    assert 0 < run.count("rev-users.merge") < 6
    for primary, _ in scene.organisation.merges:
        assert scene.reference(primary).startswith("user_")
    assert scene.merge().code == 0 and scene.merged(*pairs)


def test_a_second_run_in_the_folder_is_told_who_holds_it_and_status_and_preview_work_meanwhile(
    place: Workplace,
) -> None:
    hanging = Fault("hang", "works.list", times=1, detail=30)
    with place.serving(2, faults=[hanging]) as (sandbox, pairs):
        first = place.start(sandbox)
        while not sandbox.count("works.list"):
            time.sleep(0.01)
        assert f"process {first.pid}" in place.run(sandbox, check=11).err
        assert f"in progress: process {first.pid}" in place.run(None, "--status", check=0).out
        assert len(list((place.folder / "logs").iterdir())) == 2  # and none of --status
        assert "2 pairs to merge" in place.run(None, "--preview", check=0).out
        first.kill()
        first.communicate()
        assert "was killed" in place.run(None, "--status", check=0).out
        place.run(sandbox, check=0)
    assert_merged(sandbox.organisation, pairs)


def test_rows_of_another_organisation_stay_and_one_line_says_so(place: Workplace) -> None:
    with place.serving(faults=[Fault("merge-never", "rev-users.merge")]) as (sandbox, pairs):
        place.run(sandbox, "--merge-timeout", "0.5", check=1)
        sandbox.faults.clear()
        for path in (place.folder / SAVEPOINT, place.folder / SAVEPOINT_COPY):
            with database(path) as db:
                for name in ("primary_id", "duplicate_id", "organisation", "document"):
                    db.execute(f"UPDATE pairs SET {name} = replace({name}, 'BOX1', 'BOX2')")
        result = place.run(sandbox, "--merge-timeout", "0.5", check=0)
        assert "1 pair of another organisation" in result.err
    assert_merged(sandbox.organisation, pairs)
    with database(place.folder / SAVEPOINT) as db:
        assert sorted(db.execute("SELECT organisation, state FROM pairs")) == [
            ("dvrv-us-1:devo/SANDBOX1", "done"), ("dvrv-us-1:devo/SANDBOX2", "acknowledged"),
        ]  # fmt: skip


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


def test_a_savepoint_that_is_lost_with_its_copy_is_not_taken_for_a_new_folder(scene: Scene) -> None:
    pairs = scene.pairs(2)
    files = (SAVEPOINT.name, SAVEPOINT_COPY.name)
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


# -- a report for each run -------------------------------------------------------------------------


def test_a_killed_run_gets_its_report_from_the_next_and_each_pair_stands_in_one(
    scene: Scene,
) -> None:
    pairs = scene.pairs(4)
    scene.kill("sending rev-users.merge", 3)
    assert scene.merge("--workers", "1").killed and not list(Path("reports").iterdir())
    assert scene.merge().code == 0 and scene.merged(*pairs)
    paths = sorted(Path("reports").glob("*.json"))
    first, second = (json.loads(path.read_bytes()) for path in paths)
    ended = [first["run"][name] for name in ("exit_code", "stopped", "end")]
    assert ended == [None, "killed", None] and second["run"]["exit_code"] == 0
    assert first["run"]["plan_id"] == second["run"]["plan_id"]
    # What only the CSV could give is not known.
    assert [first[name] for name in ("skipped", "look_alikes", "invalid_rows")] == [None] * 3
    assert first["summary"]["pairs_planned"] is None and first["summary"]["left"] is None
    assert len([*first["successful_merges"], *second["successful_merges"]]) == 4
    for path in paths:
        assert path.with_suffix(".csv").exists() and path.with_suffix(".html").exists()
    # A report that the user has deleted is not written again.
    scene.lose("merge_report_*.json")
    assert not scene.merge().report["successful_merges"]
    assert len(list(Path("reports").glob("*.json"))) == 1


UNDO = {"path": "x", "state_before": "done", "merge_run": "", "merge_revision": 1}


def change_documents(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the documents of the rows that are done, as another version may have written them."""
    with database(path) as db:
        ((document,),) = db.execute("SELECT document FROM pairs WHERE state = 'done'").fetchall()
        changed = json.dumps(change(json.loads(document)))
        db.execute("UPDATE pairs SET document = ? WHERE state = 'done'", (changed,))


UNKNOWN = [
    ({"state": "paused"}, "'paused'"),
    ({"undo": {**UNDO, "state_before": "paused"}}, "'paused'"),
    ({"undo": {"path": "x"}}, "state_before"),
    ([], "list"),
]


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("path", [SAVEPOINT, SAVEPOINT_COPY])
@pytest.mark.parametrize("change, word", UNKNOWN)
def test_what_this_version_does_not_understand_is_refused_and_left_as_it_is(
    folder: Path, change: Any, word: str, path: Path, readonly: bool
) -> None:
    fill()
    change_documents(path, lambda document: {**document, **change} if change else change)
    stop = str(refusal(readonly))
    assert word in stop and f"{path} was left as it is" in stop


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
    with opened() as savepoint:
        (pair,) = savepoint.pairs(State.DONE)
        assert pair.fields_lost == [] and pair.seconds == 0
        pair.error = "changed by this version"
        savepoint.save_now([pair])
    for path in (SAVEPOINT, SAVEPOINT_COPY):
        (stored,) = (json.loads(row[-1]) for row in rows_of(path) if "changed by" in row[-1])
        assert (stored["mood"], stored["undo"]["mood"]) == ("good", "better")
        assert stored["fields_lost"] == []


@pytest.mark.parametrize("behind", [[SAVEPOINT], [SAVEPOINT_COPY], [SAVEPOINT, SAVEPOINT_COPY]])
def test_a_file_that_is_behind_is_migrated(
    folder: Path, behind: List[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill()
    monkeypatch.setattr(tool, "MIGRATIONS", (("CREATE TABLE moods (name TEXT)",),))
    for path in behind:
        with database(path) as db:
            db.execute(f"PRAGMA user_version = {tool.FIRST_FORMAT}")
    for readonly in (True, False):
        with opened("20250131_120001", readonly) as savepoint:
            assert len(states(savepoint)) == 3
        for path in (SAVEPOINT, SAVEPOINT_COPY):
            with database(path) as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            is_behind = readonly and path in behind
            assert version == (tool.FIRST_FORMAT if is_behind else tool.FORMAT)
            assert ("moods" in tables) is (path in behind and not is_behind)


# -- folders that version 3.0.0 has left -----------------------------------------------------------

DATA = ROOT / "tests" / "data" / "3.0.0"
FILES = (SAVEPOINT, SAVEPOINT_COPY)


@contextlib.contextmanager
def left_by_3_0_0(place: Workplace, name: str, references: int, count: int = 2) -> Iterator[Any]:
    """The folder of a run of 3.0.0, and the organisation as it has left it: all merged, so many
    references set. A field that no version knows is kept."""
    organisation, pairs = organisation_of_pairs(count)
    place.export(organisation)
    shutil.copytree(str(DATA / name), str(place.folder), dirs_exist_ok=True)
    for number, ids in enumerate(pairs):
        organisation.merge(*ids)
        if number < references:
            contact = organisation.contacts[ids[0]]
            organisation.change(contact, external_ref=f"user_{number + 1}")
    for path in FILES:
        with database(place.folder / path) as db:
            db.execute("UPDATE pairs SET document = json_set(document, '$.mood', 'good')")
    with Sandbox(organisation) as sandbox:
        yield sandbox, pairs
    for path in FILES:
        documents = [json.loads(row[-1]) for row in rows_of(place.folder / path) if len(row) == 9]
        assert documents and all(one["mood"] == "good" for one in documents)


def assert_two_are_undone(sandbox: Sandbox) -> None:
    alive = [one for one in sandbox.organisation.contacts.values() if one["state"] == "active"]
    references = sorted(one["external_ref"] for one in alive)
    assert references == ["REVU-P1", "REVU-P2", "user_1", "user_2"]


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("lost", [None, *FILES])
def test_a_run_of_3_0_0_killed_between_merge_and_reference_is_finished(
    place: Workplace, references: int, lost: Optional[Path]
) -> None:
    with left_by_3_0_0(place, "killed_in_merge", references, 3) as (sandbox, pairs):
        if lost:
            (place.folder / lost).unlink()
        assert "was killed" in place.run(None, "--status", check=0).out
        place.run(sandbox, "--merge-timeout", "8", check=0)
        assert sandbox.count("rev-users.merge") == 0
    assert_merged(sandbox.organisation, pairs)
    found: Pairs = []
    for path in (place.folder / "reports").glob("*.json"):
        entries = json.loads(path.read_bytes())["successful_merges"]
        found += [(one["primary"]["id"], one["duplicate"]["id"]) for one in entries]
    assert sorted(found) == sorted(pairs)


@pytest.mark.parametrize("created", [False, True])
def test_an_undo_of_3_0_0_killed_while_it_created_a_contact_is_finished(
    place: Workplace, created: bool
) -> None:
    with left_by_3_0_0(place, "killed_in_undo", 2) as (sandbox, pairs):
        organisation = sandbox.organisation
        organisation.change(organisation.contacts[pairs[0][0]], external_ref="REVU-P1")
        if created:  # and the answer never heard
            organisation.add_contact("N9", "person1@example.com", "user_1")
        (report,) = (place.folder / "reports").glob("*.json")
        place.run(sandbox, "--undo", f"reports/{report.name}", check=0)
        assert sandbox.count("rev-users.create") == (1 if created else 2)
    assert_two_are_undone(sandbox)
    assert {row[4] for row in rows_of(place.folder / SAVEPOINT) if len(row) == 9} == {"undone"}


def test_a_finished_folder_of_3_0_0_is_known_and_can_be_undone(place: Workplace) -> None:
    with left_by_3_0_0(place, "finished", 2) as (sandbox, _):
        (report,) = (place.folder / "reports").glob("*.json")
        assert "2 complete backups" in place.run(None, "--verify-backups", check=0).out
        assert place.run(sandbox, check=0).report["summary"]["already_merged"] == 2
        place.run(sandbox, "--undo", f"reports/{report.name}", check=0)
        assert sandbox.count("rev-users.merge") == 0
    assert_two_are_undone(sandbox)
