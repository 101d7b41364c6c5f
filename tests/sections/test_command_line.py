"""The command line: options, what a run says, the modes that only read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable
from unittest.mock import Mock

import pytest

import merge_contacts as tool
from tests.simulation.scene import Scene
from tests.support import ROOT

ADA = "person1@example.com"


# -- options ---------------------------------------------------------------------------------------

USAGE = {
    "contacts.csv": "unrecognized arguments: contacts.csv",
    "--csv contacts.csv --check --status": "--check and --status don't go together",
    "--export new.csv --yes": "--json goes with a merge, --preview,",
    "--export new.csv --csv contacts.csv": ", not with --export",
    "--export new.csv --limit 1": ", not with --export",
    "--export new.csv --settle a@example.com": "--export and --settle don't go together",
    "--export new.csv --domain": "--domain: expected one argument",
    "--csv contacts.csv --live": "--live goes with --preview, not with a merge",
    "--undo reports/x.json --live --preview": "--live goes with --preview, not with --undo",
    "--undo reports/x.json --plan 1": "--plan goes with a merge, --preview, not with --undo",
    "--settle a@example.com --primary revu": "not with --settle",
    "--csv contacts.csv --domain example.com": "--domain goes with --export",
    "--preview": "--csv PATH is needed",
    "--csv contacts.csv --limit 0": "--limit takes a number above 0, not 0",
    "--csv contacts.csv --merge-timeout nan": "--merge-timeout takes a number above 0",
    "--csv contacts.csv --workers 8 --workers=9": "--workers is given twice",
    "--csv contacts.csv --primary revu --primary revu": "--primary is given twice",
}


@pytest.mark.parametrize("options, says", USAGE.items())
def test_a_usage_error_says_what_is_wrong_also_to_a_program(
    options: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.parse_options([*options.split(), "--json"])
    out, err = capsys.readouterr()
    first, usage = err.splitlines()
    assert ended.value.code == 2 and first.startswith("error: ") and says in first
    assert usage.startswith("usage: ")
    answer = {"schema": tool.SCHEMA, "exit_code": 2, "error": first.partition(" ")[2]}
    assert json.loads(out) == answer


def test_options_that_take_several_values_may_be_repeated() -> None:
    options = tool.parse_options(["--csv", "a", "b", "--csv", "c", "--email", "x", "--email", "y"])
    assert list(map(str, [*options.csv, *options.email])) == ["a", "b", "c", "x", "y"]


def test_a_value_in_an_env_file_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVREV_API_TOKEN", "")
    Path(".env").write_text("DEVREV_API_TOKEN=a${PATH}b\n", encoding="utf-8")
    assert tool.load_settings(tool.load_environment(), 8).token == "a${PATH}b"


# -- which pairs -----------------------------------------------------------------------------------


def test_a_count_that_the_backup_does_not_match_refuses_that_group_alone(scene: Scene) -> None:
    pairs = scene.pairs(4)
    scene.export({pairs[0][0]: {"tickets": 1}, pairs[1][1]: {"tickets": 9}})
    refused = {ADA: "count_mismatch", "person2@example.com": "count_mismatch"}
    assert scene.merge().codes == refused and scene.merged(*pairs[2:])
    run = scene.merge("--count-policy", "at-least")
    assert run.codes == {"person2@example.com": "count_mismatch"}
    assert scene.merged(pairs[0], *pairs[2:]) and run.report["summary"]["already_merged"] == 2


CANARIES = [("--email Person2@EXAMPLE.com --email person3@example.com", [2, 3]), ("--limit 1", [1])]


@pytest.mark.parametrize("options, merged", CANARIES)
def test_a_canary_merges_only_what_was_named(scene: Scene, options: str, merged: list[int]) -> None:
    pairs = scene.pairs(4)
    assert scene.merge(*options.split()).code == 0
    assert scene.merged(*(pairs[number - 1] for number in merged))
    assert scene.merge("--limit", "10").code == 0 and scene.merged(*pairs)


def test_another_plan_than_the_previewed_one_is_not_merged(scene: Scene) -> None:
    pairs = scene.pairs(2)
    scene.export()
    plan = scene.run("--csv", "contacts.csv", "--preview", "-q").out.splitlines()[-2].split()[1]
    run = scene.merge("--plan", plan[:-1])
    assert run.code == 2 and plan in run.refusal
    run = scene.merge("--email", "stranger@example.com")
    assert run.code == 2 and "stranger@example.com" in run.refusal
    assert scene.world.requests == [] and not list(Path("reports").iterdir())
    assert scene.merge("--plan", plan, "--limit", "1").code == 0
    assert scene.merge("--plan", plan.upper()).report["run"]["plan_id"] == plan
    assert scene.merged(*pairs)


def test_the_plan_id_tells_what_would_be_merged_and_by_which_rules(scene: Scene) -> None:
    scene.pairs(2)
    scene.export()

    def id_with(option: str) -> Any:
        given = ("--csv", "contacts.csv", "--preview", "--json", *option.split())
        return json.loads(scene.run(*given).out)["summary"]["plan_id"]

    rules = (
        "", "--count-policy at-least", "--no-timelines", "--primary user", "--across-workspaces",
        "--try-unverified", "--carry-fields",
    )  # fmt: skip
    ids = list(map(id_with, rules))
    assert len(set(ids)) == len(rules)
    assert {id_with(option) for option in ("--limit 1", f"--email {ADA}", "--live")} == {ids[0]}


def test_without_timelines_the_manifest_says_so(scene: Scene) -> None:
    scene.pair(1)
    run = scene.merge("--no-timelines")
    backup = Path(run.report["successful_merges"][0]["backup"])
    assert json.loads((backup / "manifest.json").read_bytes())["timelines"] is False
    files = [backup / "manifest.json", *backup.glob("*/contact.json")]
    assert [path.read_text()[:3] for path in files] == ["{\n "] * 3, "people read them"
    assert scene.count("timeline-entries.list") == 0


def test_settling_a_merge_that_devrev_has_accepted_asks_first(scene: Scene) -> None:
    scene.pair(1)
    scene.fault("merge-never", "rev-users.merge")
    assert scene.merge("--merge-timeout", "5").codes == {ADA: "merge_not_confirmed"}
    run = scene.run("--settle", ADA)
    assert run.code == 2 and "no terminal to confirm it on" in run.refusal and not run.report
    assert [row["state"] for row in run.rows.values()] == ["acknowledged"]
    run = scene.settle(ADA)
    assert run.code == 0 and len(run.report["cancelled"]) == 1


def test_one_person_can_be_removed_as_the_readme_says(scene: Scene) -> None:
    scene.pairs(2)
    report = scene.merge("--email", ADA, "--email", "person2@example.com").report_path
    shutil.rmtree(Path("backups", ADA))
    assert scene.run("--verify-backups").code == 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r'^\S+ -c "(.+)" savepoint\.db "ADDRESS"$', readme, re.MULTILINE)
    for name in ("savepoint.db", "backups/savepoint-copy.db"):
        subprocess.run([sys.executable, "-c", line, name, ADA], check=True)
        assert ADA.encode() not in Path(name).read_bytes()
    for invariant in ("what was committed is on the disk", "a request is never forgotten"):
        scene.waive(invariant, "a person has removed rows")
    assert scene.run("--verify-backups").code == 0
    scene.export()
    assert scene.merge().code == 0
    undone = scene.undo(report)
    assert undone.code == 1 and len(undone.report["undone"]) == 1
    assert [one["email"] for one in undone.report["failed"]] == [ADA]


# -- what a run says -------------------------------------------------------------------------------


def contact(name: str) -> tool.Contact:
    return tool.Contact(name, "", f"{name.lower()}@example.com", f"REVU-{name}", "", 0, "", "")


def pair(number: int, state: tool.State, **facts: Any) -> tool.Pair:
    return tool.Pair(contact(f"P{number}"), contact(f"D{number}"), None, state, **facts)


LINES = [  # the second, pairs merged by then, a merge requested in second 1, what the line says
    (5, 0, False, ""),
    (7, 2, False, ""),  # two seconds say nothing of the pace
    (30, 25, False, "90 s left"),
    (89, 34, False, "7 min left"),
    (6, 0, True, "waiting 5 s for the first merge (p9@example.com)"),
    (15, 4, True, "6 min left"),
    (61, 4, True, "waiting 60 s for the merge (p9@example.com)"),
]


@pytest.mark.parametrize("at, merged, open_too, says", LINES)
def test_the_status_line_tells_the_pace_of_the_last_minute_or_what_is_slow(
    at: int, merged: int, open_too: bool, says: str
) -> None:
    now = SimpleNamespace(wall=1000.0 + at)
    clock = SimpleNamespace(now=lambda: now)
    started = SimpleNamespace(wall=1000.0)
    progress = tool.Progress(SimpleNamespace(environment=clock, started=started, signal=0))  # type: ignore[arg-type]
    runner = SimpleNamespace(total=100, outcomes={}, is_success=lambda _pair: True)
    runner.api = SimpleNamespace(scheduler=SimpleNamespace(waiting_for=""))
    slow = [pair(9, tool.State.ACKNOWLEDGED, requested_at=1001.0)] if open_too else []
    runner.pairs = lambda: [*runner.outcomes.values(), *slow]
    for second in range(at + 1):
        if second > 5 and len(runner.outcomes) < merged:
            number = 100 + second
            runner.outcomes[number] = pair(number, tool.State.DONE)
        line = progress.line(runner, float(second))  # type: ignore[arg-type]
    assert line == " \u00b7 ".join(filter(None, [f"{merged} of 100 pairs merged", says]))


def test_failures_are_grouped_with_what_to_do(scene: Scene) -> None:
    pairs = scene.pairs(4)
    scene.export({pairs[n][0]: {"tickets": 77} for n in (0, 1)})
    run = scene.merge()
    assert "2 count_mismatch: person1@example.com, person2@example.com" in run.out
    advice = tool.ADVICE["count_mismatch"]
    assert f"what to do: {advice}" in run.out and "next: do what is said above" in run.err


# -- the console -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of twenty columns."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "20")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def console_on(terminal: Terminal, **given: Any) -> tool.Console:
    with contextlib.redirect_stderr(terminal):
        return tool.Console(**given)


def test_a_status_line_is_cut_and_gives_way_to_what_comes(terminal: Terminal) -> None:
    console = console_on(terminal)
    console.status("x" * 30)
    console.print_err("done")
    console.print_err("more")
    assert terminal.getvalue() == "x" * 19 + "\r\x1b[Kdone\nmore\n"


@pytest.mark.parametrize("why", ["quiet", "dumb", "busy"])
def test_there_is_no_status_line_where_it_would_disturb(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setenv("TERM", "dumb" if why == "dumb" else "xterm")
    console = console_on(terminal, quiet=why == "quiet")
    if why == "busy":
        console._output.jobs.put((terminal, "not yet written"))
    console.status("1 of 9")
    assert terminal.getvalue() == ""


def test_a_long_line_is_wrapped_and_indented_on_a_terminal(terminal: Terminal) -> None:
    console = console_on(terminal)
    console.print_err(f"  {'x' * 18}")
    console.print_err("  ab cd ef gh ij kl mn", "bad")
    console.print("x" * 30, to=io.StringIO())
    red, end = "\x1b[31m", "\x1b[0m\n"
    lines = f"{red}  ab cd ef gh ij kl{end}{red}    mn{end}"
    assert terminal.getvalue() == f"  {'x' * 18}\n{lines}"


def test_results_as_json_are_ascii_and_apart_from_the_rest(terminal: Terminal) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        console = tool.Console(out=terminal)
    console.json([b'{"a": "\xc3\xa9\x7f~', b'"}'])
    console.print("all else")
    assert out.getvalue() == '{"a": "\\u00e9\\u007f~"}' and terminal.getvalue() == "all else\n"


def test_long_results_wait_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    console = tool.Console()
    monkeypatch.setattr(console._output, "_is_started", True)  # and nothing is ever written
    monkeypatch.setattr(tool.time, "sleep", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        for _ in range(99):
            console.stream("a piece")
    assert console._output.jobs.qsize() == 11


@pytest.mark.parametrize("error, why", [(None, ""), (BrokenPipeError, ""), (OSError, "no more")])
def test_a_pipe_is_told_all_or_why_not(error: Any, why: str) -> None:
    taken: list[bytes] = []

    def write(data: bytes) -> int | None:
        """Take five bytes at a time, and every other time none."""
        if error:
            raise error("no more")
        taken.append(b"" if len(taken) % 2 else data[:5])
        return len(taken[-1]) or None

    stream, output = Mock(encoding="ascii"), tool.Output()
    stream.buffer.raw.write = write
    output.start()
    output.put(stream, "caf\u00e9 \u00b7 closed")
    assert output.finish(lambda: 5.0) and output.failures.get(stream, "") == why
    assert b"".join(taken) == (b"" if error else b"caf\\xe9 \\xb7 closed")


@pytest.mark.parametrize(
    "stream, patience", [(Terminal(), 9.0), (io.StringIO(), 0.05)], ids=["terminal", "pipe"]
)
def test_what_takes_nothing_is_not_waited_for_longer_than_that(
    stream: Any, patience: float
) -> None:
    output, freed = tool.Output(), threading.Event()
    output.PATIENCE = 0.1  # with a terminal
    stream.write = lambda _text: freed.wait(10)
    output.start()
    output.put(stream, "never written")
    started = time.monotonic()
    assert not output.finish(lambda: patience) and time.monotonic() - started < 5
    freed.set()
    assert output.finish(lambda: 5.0)


def test_the_log_has_each_record_in_a_line_without_the_token(terminal: Terminal) -> None:
    console = console_on(terminal)
    console.mask = lambda text: text.replace("secret", "***")
    handler = tool.LogHandler(console, logging.WARNING)
    handler.file = io.StringIO()
    for level in (logging.INFO, logging.WARNING, logging.ERROR):
        handler.emit(logging.LogRecord("", level, "", 0, "a secret\n%s", ("b",), None))
    assert "".join(terminal.getvalue().split()) == r"warning:a***\nb"
    lines = handler.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["INFO", "WARNING", "ERROR"]
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("answer, code", [("merge", 0), ("no", 2), ("", 2)])
def test_what_a_question_names_is_merged_once_it_is_typed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    scene.pairs(4)
    for key, reference in (("A", "user_A"), ("B", "user_B"), ("C", "REVU-C")):
        scene.organisation.add_contact(key, "two@example.com", reference)
    Path("choices.csv").write_text("EMAIL,EXTERNAL_REF\ntwo@example.com,user_A\n")
    scene.export()
    keyboard, typed = os.pipe()
    os.write(typed, f"{answer}\n".encode())
    terminal = SimpleNamespace(isatty=lambda: True, fileno=lambda: keyboard)
    monkeypatch.setattr(sys, "stdin", terminal)
    run = scene.run("--csv", "contacts.csv", "--choices", "choices.csv")
    assert run.code == code and len(scene.organisation.merges) == (6 if code == 0 else 0)
    facts = dict(re.findall(r"^(\w+(?: of)?)  +(.+)$", run.err, re.MULTILINE))
    assert "dana.developer@" in facts["token of"] and "SANDBOX1" in facts["token of"]
    assert facts["host"] == "https://api.devrev.ai" and facts["CSV"] == "contacts.csv"
    assert facts["loses"].startswith("user_B (") and "6 pairs" in facts["plan"]
    assert re.search(r"REVU-D1 into REVU-P1, .* user_1\n(.*\n){2} +and 3 more\n", run.err)
    assert re.search(r"about \d\d requests", facts["takes"])


# -- modes that only read --------------------------------------------------------------------------


def test_the_preview_tells_what_a_run_would_do_and_makes_no_request(scene: Scene) -> None:
    pairs = scene.pairs(4)
    for number in (1, 2):
        scene.organisation.add_contact(f"S{number}", "shared@example.com", f"user_s{number}")
        scene.organisation.add_contact(f"N{number}", "nouser@example.com")
    scene.organisation.add_contact("O1", "other@example.com", "crm-1")
    scene.export()
    preview = ("--csv", "contacts.csv", "--preview")
    out = scene.run(*preview).out
    assert out.splitlines()[-1] == "4 pairs to merge, 2 groups skipped"
    assert "SKIPPED several_user_refs: 1 group" in out and "nouser@example.com" in out
    assert scene.world.requests == []
    scene.fault("merge-never", "rev-users.merge", match=lambda body: pairs[1][1] in body.values())
    scene.merge("--limit", "2", "--merge-timeout", "5")
    only = ("--email", "person3@example.com")
    assert scene.run(*preview, *only).out.splitlines()[-1] == (
        "1 pair to merge, 1 of earlier runs to finish first, 1 remaining (--email, --limit), "
        "1 merged before"
    )
    plan = json.loads(scene.run(*preview, *only, "--json").out)
    assert plan["summary"].pop("plan_id") and plan["summary"].pop("estimated_requests")
    assert plan["summary"] == {
        "contacts_read": 13, "pairs_planned": 4, "pairs_to_merge": 1, "pairs_to_finish": 1,
        "already_merged": 1, "left": 1, "skipped_groups": 0, "look_alikes": 0, "invalid_rows": 0,
        "other_references": 1, "other_reference_example": "crm-1",
    }  # fmt: skip
    (pair,), (first,) = plan["pairs"], plan["to_finish"]
    assert (pair["email"], pair["new_external_ref"]) == (only[1], "user_3")
    for one, ids in ((pair, pairs[2]), (first, pairs[1])):
        assert (one["primary"]["id"], one["duplicate"]["id"]) == ids
    keys = {"id", "display_id", "display_name", "external_ref", "tickets"}
    assert keys <= set(pair["primary"]) & set(pair["duplicate"])


@pytest.mark.parametrize("fault", ["", "403"])
def test_check_says_whether_a_run_could_start_and_changes_nothing(scene: Scene, fault: str) -> None:
    scene.pairs(2)
    scene.export()
    scene.world.set_quota(1000, 300.0)
    if fault:
        scene.fault(fault, "works.list")
    run = scene.run("--check", "--csv", "contacts.csv")
    for words in ("SANDBOX1", "2 pairs to merge", "of 1000 units left", "only a merge shows"):
        assert words in run.out
    assert run.code == (2 if fault else 0) and ("FAILED  access" in run.out) is bool(fault)
    assert ("ticket:read" in run.out) is bool(fault) and not Path("savepoint.db").exists()
    verdict = "not ready: 1 problem" if fault else "ready"
    assert run.out.splitlines()[-1] == verdict
    found = json.loads(scene.run("--check", "--csv", "contacts.csv", "--json").out)
    assert (found["verdict"], found["ready"], len(found["notes"])) == (verdict, not fault, 2)
    assert [one["ok"] for one in found["checks"]] == [True, True, not fault, True, True]
    assert all(one["says"] in run.out for one in found["checks"] if one["check"] != "savepoint")


def test_check_says_that_a_savepoint_is_held_which_no_run_has_written_yet(scene: Scene) -> None:
    with contextlib.closing(sqlite3.connect("savepoint.db")) as db:
        db.execute("BEGIN EXCLUSIVE")
        run = scene.run("--check")
    assert run.code == 2 and "another run is using savepoint.db" in run.out


def test_check_names_a_file_where_a_run_needs_a_folder(scene: Scene) -> None:
    scene.pair(1)
    Path("backups").write_text("", encoding="utf-8")
    run = scene.run("--check")
    assert run.code == 2 and "FAILED  disk: backups is no folder" in run.out


def test_status_tells_what_the_savepoint_knows(scene: Scene) -> None:
    pairs = scene.pairs(3)
    assert "no run has used this folder yet" in scene.run("--status").out
    scene.export({pairs[0][0]: {"tickets": 9}})
    scene.fault("merge-never", "rev-users.merge", match=lambda b: pairs[1][1] in b.values())
    scene.merge("--merge-timeout", "5")
    out = scene.run("--status").out
    assert "last merge: 1 of 3 pairs finished, 1 unfinished, 1 failed" in out
    counts = re.findall(r"^ +(\d) (\w+)", out, re.MULTILINE)
    assert counts == [("1", "accepted"), ("1", "merged"), ("1", "failed"), ("3", "in")]
    assert re.search(r"unfinished +person2@.* merge_not_confirmed", out)
    assert re.search(r"failed +person1@.* count_mismatch", out)
    found = json.loads(scene.run("--status", "--json").out)
    lists = {"unfinished", "failed", "cancelled", "references_to_set"}
    facts = {"schema", "savepoint", "running", "last_opened", "organisation", "counts", "last_run"}
    assert set(found) == facts | lists and "SANDBOX1" in found["organisation"]
    assert not found["running"] and found["last_opened"]["pid"]
    assert found["counts"] == {"done": 1, "failed": 1, "acknowledged": 1}
    assert (found["last_run"]["pairs"], found["last_run"]["pairs_ended"]) == (3, 2)
    assert [one["code"] for one in found["failed"]] == ["count_mismatch"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "": ("", lambda _path: None),
    "primary_*/works.json": ("works.json", flip_a_byte),
    "duplicate_*/timelines.json": ("timelines.json", Path.unlink),
    "manifest.json": ("manifest.json", Path.unlink),
    ".": ("missing  ", lambda folder: folder.rename("elsewhere")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_backups_names_what_is_damaged_or_missing(scene: Scene, name: str) -> None:
    scene.pairs(3)
    scene.merge()
    word, damage = DAMAGES[name]
    (folder,) = Path("backups", "person2@example.com").iterdir()
    damage(next(folder.glob(name)) if "*" in name else folder / name)
    partial = folder.parent / f"{tool.INCOMPLETE_BACKUP}of-a-killed-run"
    partial.mkdir()
    run = scene.run("--verify-backups")
    found = json.loads(scene.run("--verify-backups", "--json").out)
    bad = bool(name)
    assert word in run.out and run.code == bad and found["complete"] == 3 - bad
    assert len(found["damaged"] + found["missing"]) == bad
    assert found["partial"] == [str(partial)] and found["folder"] == "backups"


def test_verify_backups_of_a_folder_without_backups_is_a_mistake(scene: Scene) -> None:
    assert "reports holds no backup" in scene.run("--verify-backups", "reports").refusal
    assert "is not a folder" in scene.run("--verify-backups", "nowhere").refusal
