"""What must hold when things go wrong: kills, signals, lost answers, a full disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

from tests.sandbox import Fault, Organisation, Request, Sandbox
from tests.support import (
    Workplace,
    assert_merged,
    diagonal,
    organisation_of_pairs,
    watch_merges,
)

GONE = ("404", "301", "state", "primary")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals, permissions or mounts")

# A durable write is a flush to the disk, a rename, or a commit of the savepoint.
KILL = """
import signal, threading
lock = threading.Lock()
count = 0
def counted(work):
    def call(*args, **options):
        global count
        with lock:
            count += 1
            is_here = count == {number}
        if is_here and "{stage}" == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = work(*args, **options)
        if is_here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
class Connection(sqlite3.Connection):
    def execute(self, statement, *args):
        plain = super().execute
        return (counted(plain) if statement == "COMMIT" else plain)(statement, *args)
connect = sqlite3.connect
sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)
os.fsync = counted(os.fsync)
os.replace = counted(os.replace)
"""


def survive(folder: Path, kind: str, number: int, stage: str, gone: str) -> bool:
    """Kill a run at a request (before it is acted on, or after) or a durable write, and finish it.

    One of the two people has three contacts. Return whether the run got as far.
    """
    folder.mkdir(exist_ok=True)
    place = Workplace(folder)
    organisation, pairs = organisation_of_pairs(2)
    extra = organisation.add_contact("E2", "person2@example.com")
    organisation.add_work(reported_by=[extra], comments=1)
    pairs.append((pairs[1][0], extra))
    place.export(organisation)
    processes: List[Any] = []
    with Sandbox(organisation, merge_delay=0.1, gone=gone) as sandbox:
        findings = watch_merges(sandbox, folder)
        watch = sandbox.on_request

        def kill(at: str, request: Request) -> None:
            watch(at, request)
            if kind == "request" and (request.number, at) == (number, stage) and processes:
                if at == "before":
                    lost = Fault("reset-before", match=lambda body: body is request.body)
                    sandbox.faults.insert(0, lost)
                processes[0].kill()
                processes[0].wait()

        sandbox.on_request = kill
        extra = {}
        if kind == "write":
            extra = place.machine(KILL.format(number=number, stage=stage))
        processes.append(place.start(sandbox, "--merge-timeout", "8", **extra))
        processes[0].communicate(timeout=60)
        sandbox.faults.clear()
        sandbox.on_request = watch
        place.run(sandbox, "--merge-timeout", "8", check=0)
    assert_merged(organisation, pairs)
    assert set(findings) == {None}
    return processes[0].returncode == -signal.SIGKILL


@posix
@pytest.mark.slow
@pytest.mark.parametrize("kind, every, least", [("request", 1, 20), ("write", 2, 50)])
@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_any_request_or_durable_write_is_finished_by_the_next(
    tmp_path: Path, kind: str, every: int, least: int, part: int
) -> None:
    """Every request, every other write; before and after take turns.

    Every step of a life: tests/simulate.py.
    """
    number = 1 + every * part
    stages = ("before", "after")
    while survive(tmp_path / str(number), kind, number, stages[number // 8 % 2], GONE[part]):
        number += 4 * every
    assert number > least


STEPS = [
    ("request", 18, "before", "primary"),
    ("request", 20, "after", "404"),
    ("write", 42, "before", "404"),
    ("write", 45, "after", "301"),
]


@posix
@pytest.mark.parametrize("kind, number, stage, gone", STEPS)
def test_a_run_killed_at_some_steps_is_finished_by_the_next(
    tmp_path: Path, kind: str, number: int, stage: str, gone: str
) -> None:
    assert survive(tmp_path, kind, number, stage, gone)


# -- interrupted politely --------------------------------------------------------------------------


ENDPOINTS = ("timeline-entries.list", "rev-users.merge", "rev-users.get")


@posix
@pytest.mark.parametrize("number, at", diagonal((signal.SIGINT, signal.SIGTERM), ENDPOINTS))
def test_an_interrupted_run_reports_and_is_resumed(place: Workplace, number: int, at: str) -> None:
    process: List[Any] = []

    def look(stage: str, request: Request) -> None:
        if stage == "after" and request.endpoint == at and process:
            process.pop().send_signal(number)

    with place.serving(12, latency=0.01) as (sandbox, pairs):
        sandbox.on_request = look
        started = place.start(sandbox)
        process.append(started)
        _, err = started.communicate(timeout=30)
        assert started.returncode == 128 + number, err
        assert len(list((place.folder / "reports").glob("*.json"))) == 1
        sandbox.on_request = None
        place.run(sandbox, check=0)
    assert_merged(sandbox.organisation, pairs)


# -- answers gone wrong ----------------------------------------------------------------------------


MISBEHAVIOUR = (
    "reset-before", "reset-after", "cut", "hang", "hang-after", "500", "500-after", "502", "503",
    "429-bare",
)  # fmt: skip


@pytest.mark.parametrize("seed, gone", [(0, "404"), (1, "301")])
def test_every_pair_is_merged_once_with_twelve_percent_of_all_answers_gone_wrong(
    place: Workplace, seed: int, gone: str
) -> None:
    share = 1 - (1 - 0.12) ** (1 / 12)
    faults = [
        Fault("429", chance=share, detail=0.05),
        # Any 2xx acknowledges a merge, whatever its body.
        Fault("html-200", chance=share, match=lambda body: "secondary_user" not in body),
        *(Fault(kind, chance=share) for kind in MISBEHAVIOUR),
    ]
    more = {"faults": faults, "seed": seed, "gone": gone, "merge_delay": 0.1}
    with place.serving(12, **more) as (sandbox, pairs):
        findings = watch_merges(sandbox, place.folder)
        for _ in range(4):  # a last poll without a usable answer leaves a pair to the next run
            run = place.run(sandbox, "--merge-timeout", "20", timeout=150, DEVREV_TIMEOUT="1")
            if run.code == 0:
                break
        assert run.code == 0
        assert set(findings) == {None}
        assert len([one for one in sandbox.requests if one.fault]) > 0.05 * len(sandbox.requests)
    assert_merged(sandbox.organisation, pairs)


def test_a_redirect_is_never_followed_with_the_token(place: Workplace) -> None:
    elsewhere = Sandbox(Organisation("ELSEWHERE"))
    with elsewhere, place.serving(gone="301") as (sandbox, pairs):
        sandbox.moved_to = elsewhere.url
        place.run(sandbox, check=0)
        assert elsewhere.requests == [] and elsewhere.connections == 0
        redirected = {request.endpoint for request in sandbox.requests if request.status == 301}
        assert redirected == {"rev-users.get"}
    assert_merged(sandbox.organisation, pairs)


# -- the disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["backups", "backups/person1@example.com", "logs", "reports"])
def test_a_file_where_a_folder_should_be_means_no_merge_without_its_backup(
    place: Workplace, what: str
) -> None:
    path = place.folder / what
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    with place.serving(2) as (sandbox, pairs):
        findings = watch_merges(sandbox, place.folder)
        place.run(sandbox, check=3)
        assert set(findings) <= {None}
        path.unlink()
        place.run(sandbox, check=0)
        assert set(findings) == {None}
    assert_merged(sandbox.organisation, pairs)


@posix
def test_a_link_that_leads_out_of_backups_is_not_followed(place: Workplace) -> None:
    outside = place.folder / "outside"
    outside.mkdir()
    (place.folder / "backups").mkdir()
    (place.folder / "backups" / "person1@example.com").symlink_to(outside)
    with place.serving() as (sandbox, _):
        place.run(sandbox, check=3)
    assert sandbox.organisation.merges == [] and not list(outside.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """A file system of 300 kB, or a skip where this machine does not let us mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if not sys.platform.startswith("linux") or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
    ):
        pytest.skip("a small tmpfs can't be mounted here")
    yield folder
    subprocess.call(["umount", str(folder)])


def test_a_full_disk_stops_the_run_before_a_merge_without_backup(tiny_disk: Path) -> None:
    place = Workplace(tiny_disk)
    with place.serving(20, (6, 6)) as (sandbox, pairs):
        findings = watch_merges(sandbox, tiny_disk)
        result = place.run(sandbox, check=3)
        assert set(findings) <= {None} and len(findings) < 20
        assert "disk" in result.err or "full" in result.err or "space" in result.err
        subprocess.check_call(["mount", "-o", "remount,size=20m", str(tiny_disk)])
        place.run(sandbox, "--merge-timeout", "8", check=0)
        assert set(findings) == {None}
    assert_merged(sandbox.organisation, pairs)


def test_a_read_only_disk_changes_nothing(tiny_disk: Path) -> None:
    place = Workplace(tiny_disk)
    with place.serving() as (sandbox, _):
        subprocess.check_call(["mount", "-o", "remount,ro", str(tiny_disk)])
        assert place.run(sandbox).code in (2, 3)
        assert "\n1 pair to merge" in place.run(sandbox, "--preview", check=0).out
        assert sandbox.requests == []


EMAILS = (
    "../../x@example.com",
    "/etc/passwd@example.com",
    "nul@example.com",
    "a\\b@example.com",
    "c:@example.com",
    "x" * 300 + "@example.com",
)


def test_nothing_is_written_outside_backups_whatever_the_email_says(place: Workplace) -> None:
    organisation = Organisation()
    for number, email in enumerate(EMAILS):
        organisation.add_contact(f"P{number}", email)
        organisation.add_contact(f"D{number}", email, f"user_{number}")
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
    assert len(organisation.merges) == len(EMAILS)
    tops = {path.relative_to(place.folder).parts[0] for path in place.folder.rglob("*")}
    assert tops == {"contacts.csv", "backups", "logs", "reports", "savepoint.db"}
    inside = [path for path in (place.folder / "backups").iterdir() if path.is_dir()]
    assert len(inside) == len(EMAILS)


SPOIL = """
replace = os.replace
def hooked(source, target):
    replace(source, target)
    works = os.path.join(target, "primary_REVU-P1", "works.json")
    if os.path.exists(works):
        with open(works, "r+b") as file:
            file.write(b"[ ")
os.replace = hooked
"""


def test_a_damaged_backup_is_never_merged_on(place: Workplace) -> None:
    """The check reads the disk: what is damaged between writing and reading is seen."""
    with place.serving() as (sandbox, pairs):
        result = place.run(sandbox, check=1, **place.machine(SPOIL))
        assert result.codes == {"person1@example.com": "backup_failed"}
        assert sandbox.organisation.merges == [] and "works.json" in result.out
        assert "works.json" in place.run(None, "--verify-backups", check=1).out
        place.run(sandbox, check=0)
    assert_merged(sandbox.organisation, pairs)
