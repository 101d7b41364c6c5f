"""The machines that people have: shares, broken packages, pipes, closed terminals, programs."""

import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, List

import pytest

import merge_contacts as tool
from tests.support import SCRIPT, Terminal, Workplace, assert_merged, organisation_of_pairs

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


def reports(place: Workplace) -> List[Path]:
    return sorted((place.folder / "reports").glob("merge_report_*.json"))


# ----- nothing is changed without being asked -----------------------------------------------------


def test_without_a_terminal_nothing_is_merged_or_undone_unless_yes_is_given(
    place: Workplace,
) -> None:
    merging = ("--csv", "contacts.csv")
    with place.serving(2) as (sandbox, pairs):
        done = place.exactly(sandbox, *merging)
        assert done.returncode == 2 and "Add --yes" in done.stderr
        assert sandbox.organisation.merges == []
        assert place.exactly(sandbox, *merging, "--yes").returncode == 0
        assert_merged(sandbox.organisation, pairs)
        assert place.exactly(sandbox, *merging).returncode == 0, "nothing is left"
        undoing = ("--undo", f"reports/{reports(place)[0].name}")
        before = len(sandbox.requests)
        done = place.exactly(sandbox, *undoing)
        assert done.returncode == 2 and "Add --yes" in done.stderr
        assert {one.endpoint for one in sandbox.requests[before:]} == {"dev-users.self"}
        assert place.exactly(sandbox, *undoing, "--yes").returncode == 0
        assert place.exactly(sandbox, *undoing).returncode == 0, "a second undo does nothing"


# ----- programs that read JSON --------------------------------------------------------------------


def test_json_of_a_run_and_an_undo_is_their_report_and_nothing_else_is_on_stdout(
    place: Workplace,
) -> None:
    with place.serving(2) as (sandbox, _):
        done = place.exactly(sandbox, "--csv", "contacts.csv", "--yes", "--json")
        (path,) = reports(place)
        found = json.loads(done.stdout)
        assert done.returncode == 0 and found == json.loads(path.read_bytes())
        assert found["schema"] == tool.SCHEMA and found["run"]["exit_code"] == 0
        assert "merged  person1@" in done.stderr and "2 of 2 pairs merged" in done.stderr
        done = place.exactly(sandbox, "--undo", f"reports/{path.name}", "--yes", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["summary"]["undone"] == 2
        assert "undone  person1@" in done.stderr


NO_REPORT = {
    "--csv contacts.csv": "Add --yes",
    "--csv nowhere.csv --yes": "nowhere.csv",
    "--csv contacts.csv --no-such-option": "unrecognized arguments",
}


@pytest.mark.parametrize("options, says", NO_REPORT.items())
def test_json_of_a_run_without_a_report_says_why(place: Workplace, options: str, says: str) -> None:
    with place.serving() as (sandbox, _):
        done = place.exactly(sandbox, "--json", *options.split())
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 2
    assert set(found) == {"schema", "exit_code", "error"}
    assert says in found["error"] and says in done.stderr


@posix
def test_with_json_the_question_is_on_the_terminal_and_the_report_in_the_file(
    place: Workplace,
) -> None:
    with place.serving() as (sandbox, pairs):
        out = str(place.folder / "out.json")
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--json", stdout=out)
        terminal.read_until("Type merge")
        terminal.type("merge\n")
        assert terminal.end() == 0
    assert_merged(sandbox.organisation, pairs)
    assert json.loads(Path(out).read_bytes())["summary"]["successful_merges"] == 1


# ----- disks --------------------------------------------------------------------------------------

NO_FLUSH = """
flush = os.fsync
def fsync(handle):
    if stat.{kind}(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "as this file system says")
    flush(handle)
os.fsync = fsync
"""


@posix
def test_a_folder_that_can_not_be_flushed_is_warned_of_once(place: Workplace) -> None:
    with place.serving(3) as (sandbox, pairs):
        extra = place.machine(NO_FLUSH.format(kind="S_ISDIR"))
        result = place.run(sandbox, check=0, **extra)
    assert_merged(sandbox.organisation, pairs)
    assert result.err.count("warning: ") == result.err.count("can't flush a folder") == 1
    assert "a power cut may lose new names" in result.err


@posix
def test_a_file_that_can_not_be_flushed_is_an_error_before_any_merge(place: Workplace) -> None:
    with place.serving(2) as (sandbox, _):
        place.run(sandbox, check=3, **place.machine(NO_FLUSH.format(kind="S_ISREG")))
    assert sandbox.organisation.merges == []


NO_LOCKS = """
connect = sqlite3.connect
def without_locks(database, *args, **kwargs):
    if "{name}" in database:
        raise sqlite3.OperationalError("{words}")
    return connect(database, *args, **kwargs)
sqlite3.connect = without_locks
"""


@posix
@pytest.mark.parametrize("words", ["database is locked", "disk I/O error", ""])
def test_a_file_system_without_locks_is_named_and_another_run_is_not(
    place: Workplace, words: str
) -> None:
    extra = place.machine(NO_LOCKS.format(name="lock_trial", words=words)) if words else {}
    with place.serving() as (sandbox, _):
        place.run(sandbox, "--limit", "1", check=0)
        path = str(place.folder / "savepoint.db")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            result = place.run(sandbox, check=2 if words else 11, **extra)
            assert ("no working locks" in result.err) is bool(words)
            assert ("another run is using" in result.err) is not bool(words)
        if words:
            assert "no working locks" in place.run(sandbox, "--check", check=2, **extra).out
    assert not list(place.folder.glob(".lock_trial*"))


@posix
def test_a_locking_protocol_error_is_not_called_damage(place: Workplace) -> None:
    extra = place.machine(NO_LOCKS.format(name="", words="locking protocol"))
    with place.serving() as (sandbox, _):
        result = place.run(sandbox, check=2, **extra)
    assert "no working locks" in result.err and "damaged" not in result.err


def test_locks_work_here(tmp_path: Path) -> None:
    for path in (tmp_path / "savepoint.db", tmp_path / "nowhere" / "savepoint.db"):
        assert tool.locks_work(path)
    assert list(tmp_path.iterdir()) == []


# ----- .env ---------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mark, is_pipe", [(b"", True), (b"\xef\xbb\xbf", False)])
def test_settings_come_from_a_file_or_a_pipe_with_or_without_a_byte_order_mark(
    place: Workplace, mark: bytes, is_pipe: bool
) -> None:
    path = place.folder / ".env"
    with place.serving() as (sandbox, pairs):
        lines = [f"{name}={value}\n" for name, value in sandbox.environment().items()]
        if is_pipe:
            os.mkfifo(str(path))
        content = mark + "".join(lines).encode("ascii")
        threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
        while not path.exists():
            time.sleep(0.01)
        place.run(None, check=0)
    assert_merged(sandbox.organisation, pairs)


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


@pytest.mark.parametrize("token, says", [("abc def", "contains a space"), ("", "is not set")])
def test_a_token_that_can_not_be_one_is_refused(token: str, says: str) -> None:
    with pytest.raises(tool.FatalError, match=says) as stopped:
        tool.check_token(token)
    assert stopped.value.exit_code == 2 and "abc" not in str(stopped.value)


def test_an_env_file_of_another_encoding_is_named(place: Workplace) -> None:
    (place.folder / ".env").write_bytes("DEVREV_API_TOKEN=abc\n".encode("utf-16"))
    place.export(organisation_of_pairs(1)[0])
    assert ".env can't be read as UTF-8" in place.run(None, "--preview", check=2).err


def test_a_quote_that_is_not_closed_and_the_file_of_the_token_are_named(place: Workplace) -> None:
    path = place.folder / ".env"
    with place.serving() as (sandbox, _):
        path.write_text('# ours\nDEVREV_API_TOKEN="sandbox-token\n', encoding="utf-8")
        result = place.run(sandbox, "--check", check=2, DEVREV_API_TOKEN="")
        assert "could not parse statement starting at line 2" in result.err
        assert "only a merge shows" not in result.out
        path.write_text('DEVREV_API_TOKEN="sandbox-token"\n', encoding="utf-8")
        result = place.run(sandbox, "--check", check=0, DEVREV_API_TOKEN="")
        assert f"(from {path})" in result.out and "line 2" not in result.err
        assert "(from the environment)" in place.run(sandbox, "--check", check=0).out


def settings_of(name: str, value: str) -> tool.ApiSettings:
    return tool.load_settings(tool.RawSettings({name: value}), 8)


@pytest.mark.parametrize("text, prefix", [("", "user_"), ("usr_", "usr_"), ("revu-", "revu-")])
def test_the_prefix_of_the_application_is_a_setting(text: str, prefix: str) -> None:
    assert settings_of("DEVREV_USER_REF_PREFIX", text).user_ref_prefix == prefix


@pytest.mark.parametrize("text", ["REVU", "REVU-x", "R"])
def test_the_prefix_of_the_application_must_not_overlap_with_devrevs(text: str) -> None:
    with pytest.raises(tool.FatalError, match="DEVREV_USER_REF_PREFIX"):
        settings_of("DEVREV_USER_REF_PREFIX", text)


@pytest.mark.parametrize("text, calls", [(" ", None), ("0", 0), ("7", 7)])
def test_an_empty_limit_is_no_limit_that_was_set(text: str, calls: Any) -> None:
    assert settings_of("DEVREV_RATE_LIMIT_CALLS", text).calls == calls


# ----- packages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["requests", "dotenv"])
def test_a_package_that_can_not_be_used_is_named_in_one_line(place: Workplace, name: str) -> None:
    (place.folder / ".env").write_text("DEVREV_TIMEOUT=30\n", encoding="utf-8")
    (place.folder / ".env").chmod(0o600)
    with place.serving() as (sandbox, _):
        extra = place.machine(f"sys.modules['{name}'] = None\n")
        result = place.run(sandbox, check=2, **extra)
        assert len(result.err.splitlines()) == 1 and sandbox.requests == []
    assert result.err.startswith(f"error: the package {name} can't be imported: Mod")


def test_a_preview_needs_no_package_for_requests(place: Workplace) -> None:
    place.export(organisation_of_pairs(1)[0])
    extra = place.machine("sys.modules['requests'] = sys.modules['ratelimit'] = None\n")
    assert "1 pair to merge" in place.run(None, "--preview", check=0, **extra).out


# requests tries simplejson and chardet, urllib3 brotli and socks.
NAMES = ("queue", "random", "simplejson", "chardet", "socks", "brotli", "dotenv")


@pytest.mark.parametrize("as_module", [False, True])
def test_nothing_is_imported_from_the_scripts_folder(place: Workplace, as_module: bool) -> None:
    shutil.copy(str(SCRIPT), str(place.folder / SCRIPT.name))
    for name in NAMES:
        code = f"open('imported {name}', 'w')\nraise RuntimeError\n"
        (place.folder / f"{name}.py").write_text(code, encoding="utf-8")
    with place.serving() as (sandbox, pairs):
        program = ["-m", SCRIPT.stem] if as_module else [SCRIPT.name]
        done = subprocess.run(
            [sys.executable, *program, "--csv", "contacts.csv", "--yes"],
            cwd=str(place.folder),
            env=place.environment(sandbox, {"PYTHONPATH": ""}),
            check=False,
        )
    assert done.returncode == 0 and not list(place.folder.glob("imported*"))
    assert_merged(sandbox.organisation, pairs)


# ----- signals and terminals ----------------------------------------------------------------------


@posix
def test_nothing_is_rewritten_on_a_dumb_terminal(place: Workplace) -> None:
    with place.serving(3, latency=0.05) as (sandbox, pairs):
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes", TERM="dumb")
        assert terminal.end() == 0
    assert_merged(sandbox.organisation, pairs)
    assert "\x1b" not in terminal.text and "\r" not in terminal.text.replace("\r\n", "\n")


# ----- cron, other folders, clocks ----------------------------------------------------------------


def test_names_of_files_are_in_utc(place: Workplace) -> None:
    with place.serving() as (sandbox, _):
        before = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
        place.run(sandbox, check=0, TZ="Etc/GMT+7")
        after = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d_%H%M%S")
    (backup,) = (place.folder / "backups").glob("*/[0-9]*")
    assert before <= reports(place)[0].stem[-15:] <= after and before <= backup.name <= after


def test_history_of_another_folder_is_refused_with_the_folder_to_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    for folder in (here, other):
        (folder / "backups" / "a@example.com" / "20250101_000000").mkdir(parents=True)
        (folder / "reports").mkdir()
    monkeypatch.chdir(here)
    fine = ["backups/a@example.com", "reports/x.json", "./reports/../reports/x.json"]
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


# ----- what a new user reads ----------------------------------------------------------------------


def test_each_step_names_the_next_one_as_it_would_be_typed(place: Workplace) -> None:
    script = os.path.relpath(str(SCRIPT), str(place.folder))
    reading = ("--csv", "my contacts.csv")

    def step(*options: str) -> List[str]:
        done = place.exactly(sandbox, *options, script=script)
        assert done.returncode == 0, done.stderr
        return re.findall(r"(?m)^next: .*\n\s*(.*?)\s*$", done.stderr)

    with place.serving(3) as (sandbox, _):
        (preview,) = step("--export", "my contacts.csv")
        assert preview.endswith("my contacts.csv' --preview --live") or os.name == "nt"
        (live,) = step(*reading, "--preview", "--count-policy", "at-least")
        assert live.endswith("--count-policy at-least --preview --live")
        (canary,) = step(*reading, "--preview", "--live", "--count-policy", "at-least")
        assert canary.endswith("--count-policy at-least --limit 1")
        (rest,) = step(*reading, "--limit", "1", "--yes")
        assert "--limit" not in rest and "--csv" in rest
        assert step(*reading, "--yes") == []
        undoing = "--undo", f"reports/{reports(place)[0].name}"
        assert step(*undoing, "--preview")[0].endswith(" ".join(undoing))
