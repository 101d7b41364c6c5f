"""What needs a terminal, a pipe or a signal: question, status line, widths, closed output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Callable

import pytest

from tests.sandbox import Fault, Organisation, Sandbox
from tests.support import (
    SCRIPT,
    Terminal,
    Workplace,
    assert_merged,
    diagonal,
    organisation_of_pairs,
)

posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX terminal")


def wait_until(is_so: Callable[[], bool], pid: int = 0) -> None:
    """Wait for something; fail where it takes too long, or where the process has ended."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it takes too long"
        assert not pid or os.waitpid(pid, os.WNOHANG)[0] == 0, "the process has ended"
        time.sleep(0.02)


def pairs_without_a_group(count: int) -> Organisation:
    organisation, _ = organisation_of_pairs(count)
    for number in (1, 2):
        organisation.add_contact(f"N{number}", "nouser@example.com")
    return organisation


@posix
@pytest.mark.parametrize(
    "typed, code, merged",
    [("merge\n", 0, 2), ("yes\n", 2, 0), ("\n", 2, 0), ("\x04", 2, 0), ("\x03", 130, 0)],
)
def test_on_a_terminal_only_a_typed_merge_continues(
    place: Workplace, typed: str, code: int, merged: int
) -> None:
    with place.serving(2) as (sandbox, pairs):
        plan = place.run(None, "--preview", "-q", check=0).out.splitlines()[-2]
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv")
        text = terminal.read_until("Type merge")
        for fact in (
            "SANDBOX1", "Dana Developer", "contacts.csv", plan.partition(" ")[2], "2 pairs",
            "Person 1 / P. 1", "REVU-D1", "http://127.0.0.1", "DevRev can't undo a merge",
        ):  # fmt: skip
            assert fact in text
        assert sandbox.count("rev-users.merge") == 0
        terminal.type(typed)
        assert terminal.end() == code, terminal.text
    assert_merged(sandbox.organisation, pairs[:merged])


@posix
def test_what_earlier_runs_left_is_in_the_question(place: Workplace) -> None:
    with place.serving(2) as (sandbox, pairs):
        match = {"primary_user": pairs[0][0], "secondary_user": pairs[0][1]}.__eq__
        sandbox.faults.append(Fault("merge-never", match=match))
        place.run(sandbox, "--merge-timeout", "1", check=1)
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--limit", "1", columns=200)
        words = "first         finish 1 pair of earlier runs: Person 1 / P. 1"
        assert words in terminal.read_until("Type merge")
        terminal.type("no\n")
        assert terminal.end() == 2


@posix
def test_yes_asks_nothing_and_a_status_line_tells_what_is_merged(place: Workplace) -> None:
    with place.serving(6, latency=0.02, quota=(20, 2)) as (sandbox, pairs):
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes")
        assert terminal.end() == 0
    assert "Type merge" not in terminal.text
    assert re.search(r"\d of 6 pairs merged", terminal.text)
    assert re.search(r"\d of 6 pairs merged \u00b7 waiting .* \(quota", terminal.text)
    assert_merged(sandbox.organisation, pairs)


@posix
@pytest.mark.parametrize("columns, colour", diagonal((50, 80, 200), (True, False)))
def test_the_preview_fits_the_terminal(place: Workplace, columns: int, colour: bool) -> None:
    place.export(pairs_without_a_group(3))
    extra = {} if colour else {"NO_COLOR": "1"}
    terminal = Terminal(place, None, "--csv", "contacts.csv", "--preview", columns=columns, **extra)
    assert terminal.end() == 0 and ("\x1b[" in terminal.text) is colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text)
    # A command is to be copied, and therefore not wrapped.
    lines = [line for line in plain.splitlines() if SCRIPT.name not in line]
    assert max(map(len, lines)) <= columns
    for word in ("REVU-P1", "user_1", "3 pairs to merge, 1 group skipped"):
        assert word in plain


def test_quiet_says_only_errors_and_the_summary_and_verbose_each_request(place: Workplace) -> None:
    place.export(pairs_without_a_group(2))
    preview = place.run(None, "--preview", check=0).out.splitlines()
    quiet = place.run(None, "--preview", "-q", check=0)
    assert quiet.out.splitlines() == preview[-4:] and quiet.err == ""
    with Sandbox(pairs_without_a_group(2)) as sandbox:
        loud = place.run(sandbox, "-v", "--limit", "1", check=0)
        assert loud.err.count(" -> 200 in ") >= 8 and "merged  person1@" in loud.out
        quiet = place.run(sandbox, "-q", check=0)
    assert quiet.err == "" and "person2@" not in quiet.out and "1 of 1 pair" in quiet.out


@pytest.mark.parametrize("option, word", [("--help", "Exit codes:"), ("--version", "3.")])
def test_help_and_version_write_nothing(place: Workplace, option: str, word: str) -> None:
    as_a_script = [sys.executable]  # as the README has it
    assert word in place.run(None, option, python=as_a_script, check=0).out
    assert place.files() == []


def test_output_that_is_not_read_any_more_does_not_stop_a_run(place: Workplace) -> None:
    with place.serving(2, latency=0.02) as (sandbox, pairs):
        process = place.start(sandbox)
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(timeout=60) == 0
        process.stderr.close()
    assert_merged(sandbox.organisation, pairs)


@posix
@pytest.mark.parametrize("options", [["--preview"], ["--status", "--json"]])
def test_results_that_can_not_be_written_are_exit_3(place: Workplace, options: list[str]) -> None:
    place.export(organisation_of_pairs(1)[0])
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            place.command(options, ()), cwd=str(place.folder), check=False,
            env=place.environment(None, {}), stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == 3 and b"No space left" in done.stderr


@posix
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_first_signal_says_what_it_waits_for_and_the_second_how_to_continue(
    place: Workplace, name: str, code: int
) -> None:
    with place.serving(faults=[Fault("hang", "rev-users.get", detail=60)]) as (sandbox, _):
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes")
        wait_until(lambda: sandbox.count("rev-users.get") > 0, terminal.pid)
        os.kill(terminal.pid, getattr(signal, name))
        said = "stopping: waiting up to 10 s for requests under way"
        assert said in terminal.read_until("stop at once)")
        if name == "SIGHUP":  # the kernel and the shell each send one where a terminal is closed
            os.kill(terminal.pid, signal.SIGHUP)
            name = "SIGTERM"
        os.kill(terminal.pid, getattr(signal, name))
        assert terminal.end() == code
    assert "ended at once; run the same command again to resume" in terminal.text
    assert not list((place.folder / "reports").glob("*.json"))


@posix
def test_a_terminal_that_takes_nothing_more_holds_up_neither_a_merge_nor_a_signal(
    place: Workplace,
) -> None:
    with place.serving(30, latency=0.1) as (sandbox, _):
        # which nobody reads
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes", "-v")
        wait_until(lambda: len(sandbox.organisation.merges) >= 10, terminal.pid)
        os.kill(terminal.pid, signal.SIGTERM)
        ended = []
        wait_until(lambda: bool(ended.append(os.waitpid(terminal.pid, os.WNOHANG)) or ended[-1][0]))
        os.close(terminal.handle)
    status = ended[-1][1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 143
    assert len(list((place.folder / "reports").glob("*.json"))) == 1


def test_a_closed_terminal_loses_no_report_though_two_signals_come(place: Workplace) -> None:
    with place.serving(20, latency=0.1) as (sandbox, _):
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes")
        wait_until(lambda: sandbox.count("rev-users.merge") >= 3, terminal.pid)
        os.close(terminal.handle)  # for which the kernel sends one
        with contextlib.suppress(ProcessLookupError):
            for _ in range(3):
                os.kill(terminal.pid, signal.SIGHUP)
                time.sleep(0.01)
        status = os.waitpid(terminal.pid, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 129
    (path,) = place.folder.glob("reports/*.json")
    assert json.loads(path.read_bytes())["run"]["exit_code"] == 129
