"""What a person sees: the preview, the question before the first merge, check, status, verify, help."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

import merge_contacts as tool
from tests.sandbox import Fault, Sandbox
from tests.support import (
    SAMPLE,
    SCRIPT,
    Terminal,
    Workplace,
    assert_merged,
    diagonal,
    organisation_of_pairs,
)

posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX terminal")


@posix
@pytest.mark.parametrize(
    "typed, code, merged",
    [("merge\n", 0, 2), ("yes\n", 2, 0), ("\n", 2, 0), ("\x04", 2, 0), ("\x03", 130, 0)],
)
def test_on_a_terminal_only_a_typed_merge_continues(
    place: Workplace, typed: str, code: int, merged: int
) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv")
        text = terminal.read_until("Type merge")
        plan = place.run(None, "--preview", "-q", check=0).out.splitlines()[-2]
        for fact in (
            "SANDBOX1", "Dana Developer", "contacts.csv of 20", plan.partition(" ")[2], "2 pairs", "Person 1 / P. 1", "REVU-D1",
            "token owner", "requests", "DevRev can't undo a merge", "backups",
        ):  # fmt: skip
            assert fact in text
        assert sandbox.count("rev-users.merge") == 0
        terminal.type(typed)
        assert terminal.end() == code, terminal.text
    assert_merged(organisation, pairs[:merged])


@posix
def test_yes_asks_nothing_and_a_status_line_tells_how_far_it_is(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(6)
    place.export(organisation)
    with Sandbox(organisation, latency=0.02, quota=(20, 2)) as sandbox:
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes")
        assert terminal.end() == 0
    assert "Type merge" not in terminal.text
    assert re.search(
        r"\d of 6 pairs merged \u00b7 (.* \u00b7 )?\d backed up, \d verified", terminal.text
    )
    assert re.search(r"waiting .* \(quota", terminal.text)
    assert_merged(organisation, pairs)


@posix
@pytest.mark.parametrize("columns, colour", diagonal((50, 80, 200), (True, False)))
def test_the_preview_fits_the_terminal(place: Workplace, columns: int, colour: bool) -> None:
    organisation, _ = organisation_of_pairs(3)
    organisation.add_contact("N1", "nouser@example.com")
    organisation.add_contact("N2", "nouser@example.com")
    place.export(organisation)
    terminal = Terminal(
        place,
        None,
        "--csv",
        "contacts.csv",
        "--preview",
        columns=columns,
        **({} if colour else {"NO_COLOR": "1"}),
    )
    assert terminal.end() == 0
    assert ("\x1b[" in terminal.text) is colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text)
    lines = plain.splitlines()
    commands = [
        line for line in lines if SCRIPT.name in line
    ]  # to be copied, and therefore not wrapped
    assert len(commands) == 1 and all(
        len(line) <= columns for line in lines if line not in commands
    )
    for word in ("REVU-P1", "user_1", "3 pairs to merge, 1 group skipped"):
        assert word in plain


def test_the_plan_as_json_is_nothing_but_json(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    organisation.add_contact("N1", "nouser@example.com")
    organisation.add_contact("N2", "nouser@example.com")
    place.export(organisation)
    plan = json.loads(place.run(None, "--preview", "--json", check=0).out)
    assert [(one["primary"]["id"], one["duplicate"]["id"]) for one in plan["pairs"]] == pairs
    assert [one["code"] for one in plan["skipped"]] == ["no_user_ref"]
    assert plan["summary"]["pairs_to_merge"] == 3 and plan["summary"]["estimated_requests"] > 9


def test_the_preview_knows_what_is_done_already(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--limit", "2", check=0)
    lines = place.run(None, "--preview", check=0).out.splitlines()
    assert lines[-1] == "1 pair to merge"
    assert "2 pairs merged by earlier runs" in lines


def test_quiet_says_only_errors_and_the_summary_and_verbose_each_request(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        loud = place.run(sandbox, "-v", "--limit", "1", check=0)
        assert loud.err.count(" -> 200 in ") >= 8 and "merged  person1@" in loud.out
        quiet = place.run(sandbox, "-q", check=0)
        assert quiet.err == "" and "person2@" not in quiet.out and "1 of 1 pair" in quiet.out


def test_failures_are_grouped_with_what_to_do_next(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(4)
    changes: Dict[str, Dict[str, Any]] = {pairs[n][0]: {"TICKET_COUNT": 77} for n in (0, 1)}
    place.export(organisation, changes)
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=1)
    assert "2 count_mismatch: person1@example.com, person2@example.com" in result.out
    # An export counts with the same token: it must not replace what the warehouse has counted.
    assert "what to do: Where DevRev shows fewer tickets than the CSV" in result.out
    assert "--export" not in result.err


@pytest.mark.parametrize("readable", [True, False])
def test_check_says_whether_a_run_could_start_and_changes_nothing(
    place: Workplace, readable: bool
) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(
        organisation, quota=(1000, 300), faults=[] if readable else [Fault("403", "works.list")]
    ) as sandbox:
        result = place.run(sandbox, "--check", check=0 if readable else 2)
        assert {one.endpoint for one in sandbox.requests} <= {
            "dev-users.self", "rev-users.list", "works.list", "conversations.list", "timeline-entries.list",
        }  # fmt: skip
        assert len(sandbox.requests) <= 5
    assert "Dana Developer" in result.out and "SANDBOX1" in result.out and "2 pairs" in result.out
    assert "of 1000 units left" in result.out and "only a merge shows" in result.out
    assert ("FAILED" in result.out) is not readable and (
        "ticket:read" in result.out
    ) is not readable
    assert not (place.folder / "savepoint.db").exists()


def test_check_names_the_limit_that_holds_until_devrev_announces_a_quota_and_no_plan_foretells_time(
    place: Workplace,
) -> None:
    organisation, _ = organisation_of_pairs(90)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        for calls, limit in (
            ("", "the client-side rate limit is 200 requests in 60 s"),
            ("0", "there is no client-side rate limit"),
        ):
            out = place.run(sandbox, "--check", check=0, DEVREV_RATE_LIMIT_CALLS=calls).out
            assert f"note    quota: DevRev has not announced one yet; {limit}" in out
    out = place.run(None, "--preview", check=0, DEVREV_RATE_LIMIT_CALLS="").out
    assert re.search(r"^about \d+ requests$", out, re.MULTILINE)


def test_check_names_a_token_that_is_not_accepted_and_a_csv_of_another_organisation(
    place: Workplace,
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(
        organisation,
        {one: {"REV_USER_ID": one.replace("SANDBOX1", "OTHER")} for one in organisation.contacts},
    )
    with Sandbox(organisation) as sandbox:
        assert "another organisation" in place.run(sandbox, "--check", check=2).out
        assert "401" in place.run(sandbox, "--check", check=2, DEVREV_API_TOKEN="wrong").out


def test_status_tells_what_the_savepoint_knows(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation, {pairs[0][0]: {"TICKET_COUNT": 9}})
    assert "no run has used this folder yet" in place.run(None, "--status", check=0).out
    never = Fault(
        "merge-never", "rev-users.merge", match=lambda body: body["secondary_user"] == pairs[1][1]
    )
    with Sandbox(organisation, faults=[never]) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
    result = place.run(None, "--status", check=0)
    out = result.out
    assert "next: finish these pairs" in result.err and result.err.rstrip().endswith("contacts.csv")
    assert (
        "1 merged and verified" in out
        and "1 failed, not merged" in out
        and "3 pairs in all" in out
        and "1 accepted by DevRev, not yet confirmed" in out
    )
    assert re.search(r"unfinished +person2@.* merge_not_confirmed", out)
    assert re.search(r"failed +person1@.* count_mismatch", out)


def damage_nothing(folder: Path) -> None:
    pass


def flip_a_byte(folder: Path) -> None:
    file = next(folder.glob("primary_*/works.json"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def lose_a_file(folder: Path) -> None:
    next(folder.glob("duplicate_*/timelines.json")).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def lose_the_folder(folder: Path) -> None:
    folder.rename(folder.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage, word",
    [
        (damage_nothing, "3 complete backups, 0 damaged, 0 missing"),
        (flip_a_byte, "works.json"),
        (lose_a_file, "timelines.json"),
        (lose_the_manifest, "manifest.json"),
        (lose_the_folder, "MISSING"),
    ],
)
def test_verify_backups_names_what_is_damaged_or_missing(
    place: Workplace, damage: Any, word: str
) -> None:
    organisation, _ = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
    damage(next((place.folder / "backups" / "person2@example.com").iterdir()))
    result = place.run(None, "--verify-backups", check=0 if damage is damage_nothing else 1)
    assert word in result.out


def test_verify_backups_of_a_folder_without_backups_is_a_mistake(place: Workplace) -> None:
    (place.folder / "reports").mkdir()
    assert "reports holds no backup" in place.run(None, "--verify-backups", "reports", check=2).err


@pytest.mark.parametrize(
    "created, says",
    [
        ("2023-02-09T08:30:00Z", ", since 2023-02-09"),
        ("2023-02-09 08:30:00", ", since 2023-02-09"),
        ("2/9/2023 08:30:00", ", since 2/9/2023 08:30:00"),
        ("", "1 ticket"),
    ],
)
def test_only_dates_of_iso_lose_their_time(created: str, says: str) -> None:
    contact = tool.Contact("id", "Ada", "ada@example.com", "REVU-1", "", 1, created, "")
    assert tool.describe_contact(contact).endswith(says)


@pytest.mark.parametrize(
    "options, word", [(["--help"], "Exit codes:"), (["--version"], "merge_contacts ")]
)
def test_help_and_version_write_nothing(place: Workplace, options: List[str], word: str) -> None:
    as_a_script = [sys.executable]  # as the README has it
    assert word in place.run(None, *options, python=as_a_script, check=0).out
    assert place.files() == []


def test_output_that_is_not_read_any_more_does_not_stop_a_run(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation, latency=0.02) as sandbox:
        process = place.start(sandbox)
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(timeout=30) == 0
        process.stderr.close()
    assert_merged(organisation, pairs)


@posix
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_first_signal_says_what_it_waits_for_and_the_second_how_to_continue(
    place: Workplace, name: str, code: int
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("hang", "rev-users.get", detail=30)]) as sandbox:
        terminal = Terminal(place, sandbox, "--csv", "contacts.csv", "--yes")
        while not sandbox.count("rev-users.get"):
            time.sleep(0.02)
        os.kill(terminal.pid, getattr(signal, name))
        assert "stopping: waiting up to 10 s for requests under way" in terminal.read_until(
            "stop at once)"
        )
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
    organisation, pairs = organisation_of_pairs(30)
    place.export(organisation)
    never = Fault(
        "merge-never", "rev-users.merge", match=lambda body: body["secondary_user"] == pairs[0][1]
    )
    with Sandbox(organisation, faults=[never]) as sandbox:
        terminal = Terminal(
            place, sandbox, "--csv", "contacts.csv", "--yes", "-v"
        )  # which nobody reads
        deadline = time.monotonic() + 60
        while len(organisation.merges) < 29 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(organisation.merges) == 29
        begun = time.monotonic()
        os.kill(terminal.pid, signal.SIGTERM)
        status = 0
        while not status and time.monotonic() - begun < 20:
            status = os.waitpid(terminal.pid, os.WNOHANG)[1]
            time.sleep(0.02)
        os.close(terminal.handle)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 143
    assert len(list((place.folder / "reports").glob("*.json"))) == 1


@posix
@pytest.mark.parametrize(
    "options", ["--preview", "--preview --json", "--check --json", "--status --json"]
)
def test_results_that_can_not_be_written_make_the_exit_code_3(
    place: Workplace, options: str
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox, open("/dev/full", "w") as full:
        command = place.command(*options.split())
        environment = place.environment(sandbox, {})
        done = subprocess.run(
            command, cwd=str(place.folder), env=environment, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 3 and b"No space left" in done.stderr


USAGE = {
    "contacts.csv": "did you mean --csv contacts.csv?",
    "--csv contacts.csv --preveiw": "did you mean --preview?",
    "--csv contacts.csv --dry-run": "did you mean --preview?",
    "--csv contacts.csv.gz contacts.csv --rollback x": "did you mean --undo?",
    "--csv contacts.csv --check --status": "--check and --status don't go together",
    "--export new.csv --json": "--json goes with a merge, --preview,",
    "--csv contacts.csv --live": "--live goes with --preview",
    "--undo reports/x.json --live --preview": "--live goes with --preview",
    "--undo reports/x.json --plan 1": "--plan goes with a merge or --preview",
    "--undo reports/x.json --carry-fields": "not with --undo",
    "--settle a@example.com --primary user": "not with --settle",
    "--status --limit 1": "not with --status",
    "--choices-template choices.csv": "--csv PATH is needed",
    "--csv contacts.csv --domain example.com": "--domain goes with --export",
    "--preview": "--csv PATH is needed",
}


@pytest.mark.parametrize("options, says", USAGE.items())
def test_a_usage_error_says_what_is_wrong_first_and_what_was_meant(
    place: Workplace, options: str, says: str
) -> None:
    command = [sys.executable, str(SCRIPT), *options.split()]
    done = subprocess.run(command, cwd=str(place.folder), stderr=subprocess.PIPE, encoding="utf-8")
    first, *others = done.stderr.splitlines()
    assert done.returncode == 2 and first.startswith("error: ") and says in first
    assert len(others) <= 1 and place.files() == []


@pytest.mark.parametrize("mode", ["--check", "--status", "--verify-backups"])
def test_check_status_and_verify_say_the_same_as_json(place: Workplace, mode: str) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation, {pairs[0][0]: {"TICKET_COUNT": 9}})
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=1)
        found = json.loads(place.run(sandbox, mode, "--json", check=0).out)
    if mode == "--check":
        assert (
            found["ready"]
            and found["verdict"] == "ready"
            and all(one["ok"] for one in found["checks"])
        )
    elif mode == "--status":
        assert found["counts"] == {"done": 1, "failed": 1} and found["running"] is False
        assert [one["code"] for one in found["failed"]] == ["count_mismatch"] and found[
            "unfinished"
        ] == []
    else:
        assert (found["complete"], found["damaged"], found["missing"], found["partial"]) == (
            2,
            [],
            [],
            [],
        )


def test_check_ends_in_a_verdict_and_reads_the_csv_even_where_no_server_answers(
    place: Workplace,
) -> None:
    place.csv.write_text("REV_USER_ID\n", encoding="utf-8")
    nowhere = {
        "DEVREV_API_TOKEN": "sandbox-token",
        "DEVREV_BASE_URL": "http://127.0.0.1:9",
        "DEVREV_MAX_RETRIES": "0",
    }
    out = place.run(None, "--check", check=2, **nowhere).out
    assert "127.0.0.1:9 can't be reached" in out and "DEVREV_BASE_URL" in out
    assert "missing columns DISPLAY_NAME" in out and out.splitlines()[-1] == "not ready: 2 problems"


def test_status_while_a_run_is_in_progress_says_what_is_worked_on_and_leaves_no_log(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(23)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("merge-never", skip=1)]) as sandbox:
        process = place.start(sandbox, "--merge-timeout", "60")
        while sandbox.count("rev-users.merge") < 23:
            time.sleep(0.05)
            assert process.poll() is None
        time.sleep(0.5)
        out = place.run(None, "--status", check=0).out
        assert len(list((place.folder / "logs").iterdir())) == 1
        process.terminate()
        assert process.communicate(timeout=30) and process.returncode == 143
    assert f"a run is in progress: process {process.pid} on " in out
    assert "merge of 23 pairs: " in out and " ended" in out
    assert (
        len(
            re.findall(
                r"^in progress +person\d+@.* accepted by DevRev, not yet confirmed$",
                out,
                re.MULTILINE,
            )
        )
        >= 18
    )
    assert "more (--status --json has them all)" in out


def test_the_preview_names_people_and_lines_and_obeys_quiet(place: Workplace) -> None:
    place.csv.write_bytes(SAMPLE.read_bytes())
    out = place.run(None, "--preview", check=0).out
    assert (
        "umar.siddiq@example.com (line 51, line 52): " in out
        and "line 51: the REV_USER_ID of line 52 with another" in out
    )
    assert re.search(r"^jonas\.lind@.* unchanged +Jonas Lind$", out, re.MULTILINE)
    quiet = place.run(None, "--preview", "-q", check=0)
    assert quiet.out.splitlines() == out.splitlines()[-4:] and quiet.err == ""


def test_what_a_run_takes_over_is_listed_beside_the_plan(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    never = Fault("merge-never", match=lambda body: body["secondary_user"] == pairs[0][1])
    with Sandbox(organisation, faults=[never]) as sandbox:
        place.run(sandbox, "--merge-timeout", "1", check=1)
        out = place.run(None, "--preview", check=0).out
        assert (
            "TO FINISH FIRST, from earlier runs: 1 pair" in out
            and "(accepted by DevRev, not yet confirmed)" in out
        )
        assert out.splitlines()[-1] == "0 pairs to merge, 1 of earlier runs to finish first"
        if os.name != "nt":
            terminal = Terminal(place, sandbox, "--csv", "contacts.csv", columns=200)
            question = terminal.read_until("Type merge")
            assert "first         finish 1 pair of earlier runs: Person 1 / P. 1" in question
            terminal.type("no\n")
            assert terminal.end() == 2


PLAIN_WORDS = {
    "--verify-backups": (2, "error: backups does not exist: no run has made a backup in it yet"),
    "--preview --email single@example.com": (
        0,
        "single@example.com: nothing to merge: 1 contact with a REVU- or user_ reference",
    ),
    "--preview --email two@example.com": (
        0,
        "two@example.com: skipped: Several contacts have a user_ reference. The CSV can't tell",
    ),
    "--check": (2, "warning: {folder}/.env, line 2 is not NAME=value and is ignored"),
}


@pytest.mark.parametrize("options, expected", PLAIN_WORDS.items())
def test_messages_are_plain_and_name_the_problem(
    place: Workplace, options: str, expected: Any
) -> None:
    organisation, _ = organisation_of_pairs(1)
    organisation.add_contact("S1", "single@example.com")
    for number in (1, 2):
        organisation.add_contact(f"T{number}", "two@example.com", f"user_t{number}")
    place.export(organisation)
    (place.folder / ".env").write_text(
        "DEVREV_API_TOKEN='\u201ctoken\u201d'\na line\n", encoding="utf-8"
    )
    code, says = expected
    result = place.run(None, *options.split(), check=code)
    assert [
        line
        for line in result.err.splitlines()
        if line.startswith(says.format(folder=place.folder))
    ], result.err
    if options == "--check":
        assert "DEVREV_API_TOKEN is in quotes" in result.out
