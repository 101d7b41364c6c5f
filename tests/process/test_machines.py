"""The machines that people have: shares and foreign folders, broken packages, pipes, cron, closed terminals, programs."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

import merge_contacts as tool
from tests.sandbox import Fault, Sandbox
from tests.support import ROOT, SCRIPT, Terminal, Workplace, assert_merged, organisation_of_pairs

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


def machine(folder: Path, code: str) -> Dict[str, str]:
    """The environment of a machine on which `code` runs before any program does."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import errno, os, stat, sys\n" + code, encoding="utf-8"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def exactly(
    place: Workplace, sandbox: Any, *options: str, **extra: str
) -> "subprocess.CompletedProcess[str]":
    """Run exactly these options, with nothing on stdin."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], cwd=str(place.folder), env=place.environment(sandbox, extra),
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=60,
        check=False,
    )  # fmt: skip


def reports(place: Workplace, kind: str = "merge") -> List[Path]:
    return sorted((place.folder / "reports").glob(f"{kind}_report_*.json"))


# ----- nothing is changed without being asked -----------------------------------------------------


def test_without_a_terminal_nothing_is_merged_or_undone_unless_yes_is_given(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        done = exactly(place, sandbox, "--csv", "contacts.csv")
        assert (
            done.returncode == 2
            and "Add --yes" in done.stderr
            and "2 pairs to merge" in done.stderr
        )
        assert organisation.merges == []
        assert exactly(place, sandbox, "--csv", "contacts.csv", "--yes").returncode == 0
        assert_merged(organisation, pairs)
        assert exactly(place, sandbox, "--csv", "contacts.csv").returncode == 0, (
            "nothing is left to be confirmed"
        )
        report, before = f"reports/{reports(place)[0].name}", len(sandbox.requests)
        done = exactly(place, sandbox, "--undo", report)
        assert done.returncode == 2 and "2 pairs to undo" in done.stderr
        assert {one.endpoint for one in sandbox.requests[before:]} == {"dev-users.self"}
        assert exactly(place, sandbox, "--undo", report, "--yes").returncode == 0
        assert exactly(place, sandbox, "--undo", report).returncode == 0, (
            "a second undo does nothing"
        )


# ----- programs that read JSON --------------------------------------------------------------------


def test_json_of_a_run_and_an_undo_is_their_report_and_nothing_else_is_on_stdout(
    place: Workplace,
) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        done = exactly(place, sandbox, "--csv", "contacts.csv", "--yes", "--json")
        (path,) = reports(place)
        assert done.returncode == 0 and json.loads(done.stdout) == json.loads(path.read_bytes())
        assert (
            json.loads(done.stdout)["schema"] == tool.SCHEMA
            and json.loads(done.stdout)["run"]["exit_code"] == 0
        )
        assert "merged  person1@" in done.stderr and "2 of 2 pairs merged" in done.stderr
        done = exactly(place, sandbox, "--undo", f"reports/{path.name}", "--yes", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["summary"]["undone"] == 2
        assert "undone  person1@" in done.stderr


NO_REPORT = {
    "--csv contacts.csv": "Add --yes",
    "--csv contacts.csv --yes --email persn1@example.com": "in no row of the CSV: persn1@",
    "--csv nowhere.csv --yes": "nowhere.csv",
    "--csv contacts.csv --undo reports/none.json --limit x": "is not a whole number",
    "--csv contacts.csv --no-such-option": "unrecognized arguments",
}


@pytest.mark.parametrize("options, says", NO_REPORT.items())
def test_json_of_a_run_without_a_report_says_why(place: Workplace, options: str, says: str) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        done = exactly(place, sandbox, "--json", *options.split())
    found = json.loads(done.stdout)
    assert (
        done.returncode == 2
        and set(found) == {"schema", "exit_code", "error"}
        and found["exit_code"] == 2
    )
    assert says in found["error"] and says in done.stderr


@posix
def test_with_json_the_question_is_on_the_terminal_and_the_report_in_the_file(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        out = str(place.folder / "out.json")
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--json", stdout=out)
        terminal.read_until("Type merge")
        terminal.type("merge\n")
        assert terminal.end() == 0
    assert_merged(organisation, pairs)
    assert json.loads(Path(out).read_bytes())["summary"]["successful_merges"] == 1


# ----- options ------------------------------------------------------------------------------------


# ----- disks --------------------------------------------------------------------------------------

NO_FOLDER_FLUSH = """
flush = os.fsync
def fsync(handle):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "as this file system says")
    flush(handle)
os.fsync = fsync
"""
NO_FILE_FLUSH = """
flush = os.fsync
def fsync(handle):
    if stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    flush(handle)
os.fsync = fsync
"""


@posix
def test_a_folder_that_can_not_be_flushed_is_warned_of_once(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        extra = machine(place.folder / "site", NO_FOLDER_FLUSH)
        result = place.run(sandbox, check=0, **extra)
    assert_merged(organisation, pairs)
    assert result.err.count("warning: ") == result.err.count("can't flush a folder") == 1
    assert "a power cut may lose new names" in result.err


@posix
def test_a_file_that_can_not_be_flushed_is_an_error_before_any_merge(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=3, **machine(place.folder / "site", NO_FILE_FLUSH))
    assert organisation.merges == []


NO_LOCKS = """
import sqlite3
connect = sqlite3.connect
def without_locks(database, *args, **kwargs):
    if "lock_trial" in database:
        raise sqlite3.OperationalError("{words}")
    return connect(database, *args, **kwargs)
sqlite3.connect = without_locks
"""
LOCKING_PROTOCOL = """
import sqlite3
def connect(*args, **kwargs):
    raise sqlite3.OperationalError("locking protocol")
sqlite3.connect = connect
"""


@posix
@pytest.mark.parametrize("words", ["database is locked", "disk I/O error", ""])
def test_a_file_system_without_locks_is_named_and_another_run_is_not(
    place: Workplace, words: str
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    extra = machine(place.folder / "site", NO_LOCKS.format(words=words)) if words else {}
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--limit", "1", check=0)
        with contextlib.closing(
            sqlite3.connect(str(place.folder / "savepoint.db"), isolation_level=None)
        ) as other:
            other.execute("BEGIN EXCLUSIVE")
            result = place.run(sandbox, check=2 if words else 11, **extra)
            assert ("no working locks" in result.err) is bool(words)
            assert ("another run is using" in result.err) is not bool(words)
        if words:
            assert "no working locks" in place.run(sandbox, "--check", check=2, **extra).out
    assert not list(place.folder.glob(".lock_trial*"))


@posix
def test_a_locking_protocol_error_is_not_called_damage(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=2, **machine(place.folder / "site", LOCKING_PROTOCOL))
    assert (
        "no working locks" in result.err
        and "local disk" in result.err
        and "damaged" not in result.err
    )


def test_locks_work_here(tmp_path: Path) -> None:
    assert tool.locks_work(tmp_path / "savepoint.db") and tool.locks_work(
        tmp_path / "nowhere" / "savepoint.db"
    )
    assert list(tmp_path.iterdir()) == []


# ----- .env ---------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("is_pipe", [False, True])
def test_settings_come_from_a_file_or_a_pipe_with_or_without_a_byte_order_mark(
    place: Workplace, mark: bytes, is_pipe: bool
) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    path = place.folder / ".env"
    with Sandbox(organisation) as sandbox:
        lines = mark + "".join(
            f"{name}={value}\n" for name, value in sandbox.environment().items()
        ).encode("ascii")
        if is_pipe:
            os.mkfifo(str(path))
            threading.Thread(target=path.write_bytes, args=(lines,), daemon=True).start()
        else:
            path.write_bytes(lines)
        place.run(None, check=0)
    assert_merged(organisation, pairs)


@posix
def test_ctrl_c_ends_the_wait_for_a_pipe_that_gives_nothing(place: Workplace) -> None:
    place.export(organisation_of_pairs(1)[0])
    os.mkfifo(str(place.folder / ".env"))
    process = place.start(None, "--preview")
    while "is a pipe" not in place.logs():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert process.communicate()[1].startswith("error: interrupted")


@pytest.mark.parametrize(
    "token, says",
    [
        ("abc def", "contains a space"),
        ("", "is not set"),
    ],
)
def test_a_token_that_can_not_be_one_is_refused(token: str, says: str) -> None:
    with pytest.raises(tool.FatalError, match=says) as stopped:
        tool.check_token(token)
    assert stopped.value.exit_code == 2 and "abc" not in str(stopped.value)


def test_an_env_file_of_another_encoding_is_named(place: Workplace) -> None:
    (place.folder / ".env").write_bytes("DEVREV_API_TOKEN=abc\n".encode("utf-16"))
    place.export(organisation_of_pairs(1)[0])
    assert ".env can't be read as UTF-8" in place.run(None, "--preview", check=2).err


def test_a_quote_that_is_not_closed_and_the_file_of_the_token_are_named(place: Workplace) -> None:
    path, organisation = place.folder / ".env", organisation_of_pairs(1)[0]
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        path.write_text('# ours\nDEVREV_API_TOKEN="sandbox-token\n', encoding="utf-8")
        result = place.run(sandbox, "--check", check=2, DEVREV_API_TOKEN="")
        assert "could not parse statement starting at line 2" in result.err
        assert "only a merge shows" not in result.out
        path.write_text('DEVREV_API_TOKEN="sandbox-token"\n', encoding="utf-8")
        result = place.run(sandbox, "--check", check=0, DEVREV_API_TOKEN="")
        assert f"(from {path})" in result.out and "line 2" not in result.err
        assert "(from the environment)" in place.run(sandbox, "--check", check=0).out


def settings_of(**values: str) -> tool.ApiSettings:
    return tool.load_settings(tool.RawSettings(values), 8)


PREFIXES = {
    "": "user_",
    "  ": "user_",
    "usr_": "usr_",
    "REVU": None,
    "REVU-x": None,
    "R": None,
    "revu-": "revu-",
}


@pytest.mark.parametrize("text, prefix", PREFIXES.items())
def test_the_prefix_of_the_application_must_not_overlap_with_devrevs(
    text: str, prefix: Any
) -> None:
    with (
        contextlib.nullcontext()
        if prefix
        else pytest.raises(tool.FatalError, match="DEVREV_USER_REF_PREFIX")
    ):
        assert settings_of(DEVREV_USER_REF_PREFIX=text).user_ref_prefix == prefix


def test_an_empty_limit_is_no_limit_that_was_set() -> None:
    assert settings_of(DEVREV_RATE_LIMIT_CALLS=" ").calls == tool.ApiSettings.calls
    assert settings_of(DEVREV_RATE_LIMIT_CALLS="0").calls == 0
    assert settings_of(DEVREV_RATE_LIMIT_CALLS="7").calls == 7


# ----- packages -----------------------------------------------------------------------------------

PACKAGES = {
    "requests is broken": ("requests.py", "raise RuntimeError('half installed')\n", "requests can't be imported: RuntimeError: half"),
    "requests needs a package": ("requests.py", "import no_such_package\n", "No module named 'no_such_package'"),
    "requests is missing": ("sitecustomize.py", "import sys\nsys.modules['requests'] = None\n", "requests can't be imported: Mod"),
    "dotenv is missing": ("sitecustomize.py", "import sys\nsys.modules['dotenv'] = None\n", "dotenv can't be imported: Mod"),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKAGES)
def test_a_package_that_can_not_be_used_is_named_in_one_line(place: Workplace, case: str) -> None:
    name, content, says = PACKAGES[case]
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    (place.folder / ".env").write_text("DEVREV_TIMEOUT=30\n", encoding="utf-8")
    (place.folder / ".env").chmod(0o600)
    path = place.folder / "site" / name
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    extra = {
        "PYTHONPATH": f"{place.folder / 'site'}{os.pathsep}{ROOT}",
        "DEVREV_RATE_LIMIT_CALLS": "100",
    }
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=2, **extra)
        assert [
            line for line in result.err.splitlines() if says in line and line.startswith("error: ")
        ], result
        assert len(result.err.splitlines()) == 1 and sandbox.requests == []


def test_a_preview_needs_no_package_for_requests(place: Workplace) -> None:
    place.export(organisation_of_pairs(1)[0])
    code = "sys.modules['requests'] = sys.modules['ratelimit'] = None\n"
    assert (
        "1 pair to merge"
        in place.run(None, "--preview", check=0, **machine(place.folder / "site", code)).out
    )


NAMES = [
    "queue.py",
    "random.py",
    "simplejson.py",
    "chardet.py",
    "socks.py",
    "brotli.py",
    "dotenv.py",
]


@pytest.mark.parametrize("as_module", [False, True])
def test_nothing_is_imported_from_the_scripts_folder(place: Workplace, as_module: bool) -> None:
    """requests tries simplejson and chardet, urllib3 brotli and socks."""
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    shutil.copy(str(SCRIPT), str(place.folder / SCRIPT.name))
    for name in NAMES:
        code = f"open('imported {name}', 'w')\nraise RuntimeError\n"
        (place.folder / name).write_text(code, encoding="utf-8")
    program = ["-m", SCRIPT.stem] if as_module else [SCRIPT.name]
    with Sandbox(organisation) as sandbox:
        done = subprocess.run(
            [sys.executable, *program, "--csv", "contacts.csv", "--yes"],
            cwd=str(place.folder),
            env=place.environment(sandbox, {"PYTHONPATH": ""}),
            check=False,
        )
    assert done.returncode == 0 and not list(place.folder.glob("imported*"))
    assert_merged(organisation, pairs)


# ----- signals and terminals ----------------------------------------------------------------------


@posix
def test_a_closed_terminal_loses_no_report_though_two_signals_come(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    never = Fault(
        "merge-never", "rev-users.merge", match=lambda body: body["secondary_user"] == pairs[-1][1]
    )
    with Sandbox(organisation, faults=[never]) as sandbox:
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes")
        terminal.read_until("merged  person1@")
        os.close(terminal.handle)  # for which the kernel sends one
        with contextlib.suppress(ProcessLookupError):
            for _ in range(3):
                os.kill(terminal.pid, signal.SIGHUP)
                time.sleep(0.01)
        status = os.waitpid(terminal.pid, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 129
    (path,) = reports(place)
    assert json.loads(path.read_bytes())["run"]["exit_code"] == 129


@posix
def test_nothing_is_rewritten_on_a_dumb_terminal(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation, latency=0.05) as sandbox:
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes", TERM="dumb")
        assert terminal.end() == 0
    assert_merged(organisation, pairs)
    assert "\x1b" not in terminal.text and "\r" not in terminal.text.replace("\r\n", "\n")


# ----- cron, other folders, clocks ----------------------------------------------------------------


def test_names_of_files_are_in_utc(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        before = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
        place.run(sandbox, check=0, TZ="Etc/GMT+7")
        after = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
    (backup,) = (place.folder / "backups").glob("*/[0-9]*")
    assert before <= reports(place)[0].stem[-15:] <= after and before <= backup.name <= after


def test_names_sort_also_in_the_hour_that_autumn_has_twice() -> None:
    hour = 1761438600  # 2025-10-26 00:30 UTC, the first 02:30 in Berlin
    names = [tool.timestamp_name(hour + step) for step in (0, 1800, 3600, 5400)]
    assert names == sorted(names) and names[0] == "20251026_003000"


def test_history_of_another_folder_is_refused_with_the_folder_to_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    for folder in (here, other):
        (folder / "backups" / "a@example.com" / "20250101_000000").mkdir(parents=True)
        (folder / "reports").mkdir()
    monkeypatch.chdir(here)
    fine = [
        "backups/a@example.com",
        "backups/a@example.com/20250101_000000",
        "reports/x.json",
        "./reports/../reports/x.json",
    ]
    for path in [*fine, str(here / "reports" / "x.json")]:
        assert tool.history_folder_error(Path(path)) is None, path
    for path in ["../other/reports/x.json", str(other / "backups" / "a@example.com")]:
        assert f"run --undo in {other}" in str(tool.history_folder_error(Path(path))), path
    for path in ["x.json", "backups", "../x.json", "savepoint.db"]:
        assert tool.history_folder_error(Path(path)), path


@posix
def test_backups_on_another_disk_are_this_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "a@example.com").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("backups").symlink_to(tmp_path / "disk")
    assert tool.history_folder_error(Path("backups/a@example.com")) is None
    assert tool.history_folder_error(tmp_path / "disk" / "a@example.com") is None


def test_an_undo_from_another_folder_is_refused_before_any_request(
    place: Workplace, tmp_path: Path
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
        before, report = len(sandbox.requests), reports(place)[0]
        (tmp_path / "elsewhere").mkdir()
        elsewhere = Workplace(tmp_path / "elsewhere")
        done = exactly(elsewhere, sandbox, "--undo", str(report), "--yes")
        assert done.returncode == 2 and f"run --undo in {place.folder}" in done.stderr
        assert len(sandbox.requests) == before


# ----- what a new user reads ----------------------------------------------------------------------


def test_each_step_names_the_next_one_as_it_would_be_typed(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(3)
    script = os.path.relpath(str(SCRIPT), str(place.folder))

    def step(*options: str) -> List[str]:
        done = subprocess.run(
            [sys.executable, script, *options], cwd=str(place.folder), env=place.environment(sandbox, {}),
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
        lines = done.stderr.splitlines()
        return [
            lines[index + 1].strip()
            for index, line in enumerate(lines)
            if line.startswith("next: ")
        ]

    with Sandbox(organisation) as sandbox:
        (preview,) = step("--export", "my contacts.csv")
        wanted = f"{script} --csv 'my contacts.csv' --preview --live"
        assert preview.endswith(wanted) or os.name == "nt"
        csv = ("--csv", "my contacts.csv", "--count-policy", "at-least")
        (live,) = step(*csv, "--preview")
        assert live.endswith("--count-policy at-least --preview --live")
        (canary,) = step(*csv, "--preview", "--live")
        assert canary.endswith("--count-policy at-least --limit 1")
        (rest,) = step(*csv, "--limit", "1", "--yes")
        assert rest == canary.replace(" --limit 1", "")
        (really,) = step("--undo", str(reports(place)[0]), "--preview")
        assert really.endswith(".json")
        assert step(*csv, "--yes") == []


def test_after_a_declined_question_the_organisation_is_known(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        assert exactly(place, sandbox, "--csv", "contacts.csv").returncode == 2
    assert "SANDBOX1" in place.run(None, "--status", check=0).out
