"""The command line: options and what they ask for, what a run says while and after it works, the modes that only read."""

from __future__ import annotations

import collections
import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import merge_contacts as tool
from tests.simulation.scene import Scene

ADA = "person1@example.com"
STATE = tool.State


# -- options -------------------------------------------------------------------------------------------

USAGE = {
    "contacts.csv": "unrecognized arguments: contacts.csv",
    "--csv contacts.csv --check --status": "--check and --status don't go together",
    "--export new.csv --yes": "--json goes with a merge, --preview,",
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


@pytest.mark.parametrize("name", ["--csv", "--email", "--settle", "--domain"])
def test_options_that_take_several_values_may_be_repeated(name: str) -> None:
    mode = [] if name in ("--csv", "--settle") else ["--csv", "x.csv"]
    if name == "--domain":
        mode = ["--export", "x.csv"]
    options = tool.parse_options([*mode, name, "a.example", name, "b.example"])
    assert list(map(str, getattr(options, name[2:]))) == ["a.example", "b.example"]


def test_a_next_command_keeps_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["merge_contacts.py"])
    words = [
        "--csv",
        "a.csv",
        "b.csv",
        "--preview",
        "--limit",
        "5",
        "--primary=user",
        "--choices",
        "c.csv",
        "--live",
    ]
    run = tool.RunContext(tool.parse_options(words))
    command = run.retyped("--limit", "1", without=["--limit"])
    kept = "--csv a.csv b.csv --primary=user --choices c.csv"
    assert command == f"python merge_contacts.py {kept} --limit 1"


# -- which pairs ---------------------------------------------------------------------------------------


def test_a_count_that_the_backup_does_not_match_refuses_that_group_alone(scene: Scene) -> None:
    pairs = scene.pairs(4)
    scene.export({pairs[0][0]: {"tickets": 1}, pairs[1][1]: {"tickets": 9}})
    refused = {ADA: "count_mismatch", "person2@example.com": "count_mismatch"}
    assert scene.merge().codes == refused and scene.merged(*pairs[2:])
    run = scene.merge("--count-policy", "at-least")
    assert run.codes == {"person2@example.com": "count_mismatch"}
    assert scene.merged(pairs[0], *pairs[2:]) and run.report["summary"]["already_merged"] == 2


@pytest.mark.parametrize(
    "options, merged",
    [("--email Person2@EXAMPLE.com --email person3@example.com", [2, 3]), ("--limit 1", [1])],
)
def test_a_canary_merges_only_what_was_named(scene: Scene, options: str, merged: list[int]) -> None:
    pairs = scene.pairs(4)
    assert scene.merge(*options.split()).code == 0
    assert scene.merged(*(pairs[number - 1] for number in merged))
    assert scene.merge("--limit", "10").code == 0 and scene.merged(*pairs)


def test_another_plan_than_the_previewed_one_is_not_merged(scene: Scene) -> None:
    pairs = scene.pairs(2)
    scene.export()
    plan = scene.run("--csv", "contacts.csv", "--preview", "-q").out.splitlines()[-2].split()[1]
    for options in (["--plan", "0123456789ab"], ["--plan", plan[:-1]]):
        run = scene.merge(*options)
        assert run.code == 2 and plan in run.refusal
    run = scene.merge("--email", "stranger@example.com")
    assert run.code == 2 and "stranger@example.com" in run.refusal
    assert scene.world.requests == [] and not list(Path("reports").iterdir())
    assert scene.merge("--plan", plan, "--limit", "1").code == 0
    assert scene.merge("--plan", plan.upper()).report["run"]["plan_id"] == plan
    assert scene.merged(*pairs)


def test_without_timelines_the_manifest_says_so(scene: Scene) -> None:
    scene.pair(1)
    run = scene.merge("--no-timelines")
    backup = Path(run.report["successful_merges"][0]["backup"])
    assert json.loads((backup / "manifest.json").read_bytes())["timelines"] is False
    assert scene.count("timeline-entries.list") == 0


# -- what may not be ------------------------------------------------------------------------------------


def test_a_token_that_is_not_accepted_changes_nothing(scene: Scene) -> None:
    scene.pairs(3)
    scene.fault("401", "dev-users.self")
    run = scene.merge()
    assert run.code == 2 and "DEVREV_API_TOKEN" in run.refusal and not run.report
    assert len(run.requests) == 1
    scene.world.faults.clear()
    assert scene.merge().code == 0


SCOPES = {
    "rev-users.list": "rev_user:read",
    "timeline-entries.list": "ticket:read",
    "works.list": "ticket:read and issue:read",
    "conversations.list": "conversation:read",
}


@pytest.mark.parametrize("endpoint, scope", SCOPES.items())
def test_what_the_token_may_not_read_fails_its_pairs_and_names_the_scope(
    scene: Scene, endpoint: str, scope: str
) -> None:
    pairs = scene.pairs(3)
    fault = scene.fault("403", endpoint)
    run = scene.merge()
    assert run.code == 1 and set(run.codes.values()) == {"forbidden"}
    assert all(scope in entry["error"] for entry in run.report["failed_merges"])
    scene.world.faults.remove(fault)
    assert scene.merge().code == 0 and scene.merged(*pairs)


# -- settling --------------------------------------------------------------------------------------------


def test_settling_a_merge_that_devrev_has_accepted_asks_first(scene: Scene) -> None:
    scene.pair(1)
    scene.fault("merge-never", "rev-users.merge")
    assert scene.merge("--merge-timeout", "5").codes == {ADA: "merge_not_confirmed"}
    run = scene.run("--settle", ADA)
    assert run.code == 2 and "no terminal to confirm it on" in run.refusal and not run.report
    assert [row["state"] for row in run.rows.values()] == ["acknowledged"]
    run = scene.settle(ADA)
    assert run.code == 0 and len(run.report["cancelled"]) == 1


def test_settling_exits_with_1_while_a_named_pair_is_open(scene: Scene) -> None:
    (primary, _), _ = scene.pairs(2)
    scene.merge("--email", "person2@example.com")
    scene.export({primary: {"tickets": 9}})
    scene.merge()
    run = scene.settle(ADA, "person2@example.com")
    assert run.code == 1 and "not requested (count_mismatch)" in run.out
    assert "done  person2@example.com" in run.out
    assert scene.settle("person2@example.com").code == 0
    assert "no pair in savepoint.db" in scene.settle("stranger@example.com").refusal


# -- personal data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("also_rows", [False, True])
def test_one_person_can_be_removed_as_the_readme_says(scene: Scene, also_rows: bool) -> None:
    scene.pairs(2)
    report = scene.merge().report_path
    shutil.rmtree(Path("backups", ADA))
    if also_rows:
        for name in ("savepoint.db", "backups/savepoint-copy.db"):
            with contextlib.closing(sqlite3.connect(name, isolation_level=None)) as db:
                db.execute("DELETE FROM pairs WHERE email = ?", [ADA])
                db.execute("VACUUM")
            assert ADA.encode() not in Path(name).read_bytes()
        for invariant in ("what was committed is on the disk", "a request is never forgotten"):
            scene.waive(invariant, "a person has removed rows")
    run = scene.run("--verify-backups")
    assert run.code == (0 if also_rows else 1) and (ADA in run.out) is not also_rows
    scene.export()
    assert scene.merge().code == 0
    undone = scene.undo(report)
    assert undone.code == 1 and len(undone.report["undone"]) == 1
    assert [one["email"] for one in undone.report["failed"]] == [ADA]


# -- what a run says --------------------------------------------------------------------------------------


class Runner:
    """What Progress reads of a run."""

    def __init__(self, total: int) -> None:
        self.found: list[tool.Pair] = []
        self.total = total
        self.outcomes: dict[tool.Ids, tool.Pair] = {}
        self.api = SimpleNamespace(scheduler=SimpleNamespace(waiting_for=""))

    def pairs(self) -> list[tool.Pair]:
        return self.found

    @staticmethod
    def is_success(pair: tool.Pair) -> bool:
        return not pair.code

    def end(self, count: int) -> None:
        for _ in range(count):
            number = len(self.outcomes)
            pair = tool.Pair(contact(f"P{number}"), contact(f"D{number}"), None, STATE.DONE)
            self.outcomes[pair.ids] = pair
            self.found.append(pair)


def contact(name: str) -> tool.Contact:
    return tool.Contact(name, "", f"{name.lower()}@example.com", f"REVU-{name}", "", 0, "", "")


def progress_at(clock: dict[str, float], **signals: int) -> tool.Progress:
    class Environment(tool.Environment):
        def now(self) -> tool.Timestamp:
            return tool.Timestamp(1000.0 + clock["now"], clock["now"])

    run = SimpleNamespace(
        environment=Environment(tool.ApiSettings("")),
        started=tool.Timestamp(1000.0, 0.0),
        signal=signals.get("signal", 0),
    )
    return tool.Progress(run)  # type: ignore[arg-type]


def test_a_forecast_is_the_pace_of_the_last_minute_times_what_is_left() -> None:
    clock, runner = {"now": 0.0}, Runner(100)
    progress = progress_at(clock)
    lines = {}
    for second in range(91):
        clock["now"] = float(second)
        if second > 5:
            runner.end(1 if second < 40 else 0)
        lines[second] = progress.line(runner, clock["now"])  # type: ignore[arg-type]
    assert lines[5] == "0 of 100 pairs merged"
    assert lines[30] == "25 of 100 pairs merged \u00b7 90 s left"
    assert lines[75].endswith(" left")
    assert lines[7] == "2 of 100 pairs merged", "two seconds say nothing of the pace"
    assert lines[89] == "34 of 100 pairs merged \u00b7 7 min left"


def test_a_slow_merge_is_named_in_place_of_a_forecast() -> None:
    clock, runner = {"now": 0.0}, Runner(10)
    progress = progress_at(clock)
    pair = tool.Pair(contact("P"), contact("D"), None, STATE.ACKNOWLEDGED, requested_at=1001.0)
    runner.found.append(pair)
    clock["now"] = 6.0
    line = progress.line(runner, 6.0)  # type: ignore[arg-type]
    assert line == "0 of 10 pairs merged \u00b7 waiting 5 s for the first merge, of p@example.com"
    runner.end(4)
    assert progress.line(runner, 15.0) == "4 of 10 pairs merged"  # type: ignore[arg-type]
    clock["now"] = 61.0
    line = progress.line(runner, 61.0)  # type: ignore[arg-type]
    assert line == "4 of 10 pairs merged \u00b7 waiting 60 s for the merge, of p@example.com"


def test_an_interrupted_run_tells_the_unfinished_from_what_was_not_started(scene: Scene) -> None:
    scene.pairs(5)
    scene.merge("--email", ADA)
    scene.fault("merge-never", "rev-users.merge", skip=1)
    scene.at(20.0, scene.ctrl_c)
    run = scene.merge("--limit", "3", "--merge-timeout", "60")
    words = "1 of 4 pairs finished, 2 unfinished, 1 remaining, 1 merged before"
    assert run.code == 130 and words in run.out and run.report["run"]["headline"] == words
    todo = "accepted by DevRev, not yet confirmed; still to do: confirm the merge, set the ref"
    assert len(re.findall(f"UNFINISHED .*{todo}", run.out)) == 2
    summary = run.report["summary"]
    assert (summary["unfinished_merges"], summary["failed_merges"], summary["left"]) == (2, 0, 1)


def test_failures_are_grouped_with_what_to_do(scene: Scene) -> None:
    pairs = scene.pairs(4)
    scene.export({pairs[n][0]: {"tickets": 77} for n in (0, 1)})
    run = scene.merge()
    assert "2 count_mismatch: person1@example.com, person2@example.com" in run.out
    advice = tool.ADVICE["count_mismatch"]
    assert f"what to do: {advice}" in run.out and "next: do what is said above" in run.err


def test_the_estimate_is_what_the_run_takes(scene: Scene) -> None:
    scene.pairs(30, tickets=(3, 1))
    scene.export()
    preview = json.loads(scene.run("--csv", "contacts.csv", "--preview", "--json").out)
    taken = scene.merge().report["run"]["requests_total"]
    assert abs(taken - preview["summary"]["estimated_requests"]) <= 0.25 * taken


# -- modes that only read ---------------------------------------------------------------------------------


def test_the_preview_names_everything_and_makes_no_request(scene: Scene) -> None:
    scene.pairs(3)
    for number in (1, 2):
        scene.organisation.add_contact(f"S{number}", "shared@example.com", f"user_s{number}")
        scene.organisation.add_contact(f"N{number}", "nouser@example.com")
    scene.export()
    out = scene.run("--csv", "contacts.csv", "--preview").out
    assert (
        scene.world.requests == [] and out.splitlines()[-1] == "3 pairs to merge, 2 groups skipped"
    )
    assert "SKIPPED several_user_refs: 1 group" in out and "nouser@example.com" in out
    assert len(re.findall(r"person\d@example.com", out)) >= 3 and "REVU-P1" in out
    plan = json.loads(scene.run("--csv", "contacts.csv", "--preview", "--json").out)
    assert len(plan["pairs"]) == 3 and plan["summary"]["pairs_to_merge"] == 3
    assert {one["code"] for one in plan["skipped"]} == {"several_user_refs", "no_user_ref"}
    scene.merge("--limit", "2")
    lines = scene.run("--csv", "contacts.csv", "--preview").out.splitlines()
    assert lines[-1] == "1 pair to merge, 2 merged before, 2 groups skipped"


@pytest.mark.parametrize("readable", [True, False])
def test_check_says_whether_a_run_could_start_and_changes_nothing(
    scene: Scene, readable: bool
) -> None:
    scene.pairs(2)
    scene.export()
    scene.world.set_quota(1000, 300.0)
    if not readable:
        scene.fault("403", "works.list")
    run = scene.run("--check", "--csv", "contacts.csv")
    assert run.code == (0 if readable else 2)
    assert "SANDBOX1" in run.out and "2 pairs to merge" in run.out
    assert "of 1000 units left" in run.out and "only a merge shows" in run.out
    assert ("FAILED" in run.out) is not readable
    assert ("ticket:read" in run.out) is not readable
    assert run.out.splitlines()[-1] == ("ready" if readable else "not ready: 1 problem")
    assert not Path("savepoint.db").exists()


def test_status_tells_what_the_savepoint_knows(scene: Scene) -> None:
    pairs = scene.pairs(3)
    assert "no run has used this folder yet" in scene.run("--status").out
    scene.export({pairs[0][0]: {"tickets": 9}})
    never = pairs[1][1]
    scene.fault("merge-never", "rev-users.merge", match=lambda b: b["secondary_user"] == never)
    scene.merge("--merge-timeout", "5")
    out = scene.run("--status").out
    for words in (
        "1 merged and verified",
        "1 failed, not merged",
        "1 accepted by DevRev, not yet confirmed",
        "3 in all",
        "last merge: 1 of 3 pairs finished, 1 unfinished, 1 failed",
    ):
        assert words in out
    assert re.search(r"unfinished +person2@.* merge_not_confirmed", out)
    assert re.search(r"failed +person1@.* count_mismatch", out)
    found = json.loads(scene.run("--status", "--json").out)
    assert found["counts"] == {"done": 1, "failed": 1, "acknowledged": 1}
    assert (found["last_run"]["pairs"], found["last_run"]["pairs_ended"]) == (3, 2)
    assert [one["code"] for one in found["failed"]] == ["count_mismatch"]


def damage_nothing(_folder: Path) -> None:
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
    folder.rename("elsewhere")


@pytest.mark.parametrize(
    "damage, word",
    [
        (damage_nothing, "3 complete backups, 0 damaged, 0 missing"),
        (flip_a_byte, "works.json"),
        (lose_a_file, "timelines.json"),
        (lose_the_manifest, "manifest.json"),
        (lose_the_folder, "missing  "),
    ],
)
def test_verify_backups_names_what_is_damaged_or_missing(
    scene: Scene, damage: Any, word: str
) -> None:
    scene.pairs(3)
    scene.merge()
    damage(next(Path("backups", "person2@example.com").iterdir()))
    run = scene.run("--verify-backups")
    found = json.loads(scene.run("--verify-backups", "--json").out)
    assert word in run.out and run.code == (0 if damage is damage_nothing else 1)
    assert found["complete"] == (3 if damage is damage_nothing else 2)
    problems = found["damaged"] + found["missing"]
    assert len(problems) == (damage is not damage_nothing)


def test_verify_backups_of_a_folder_without_backups_is_a_mistake(scene: Scene) -> None:
    Path("reports").mkdir(exist_ok=True)
    assert "reports holds no backup" in scene.run("--verify-backups", "reports").refusal
    assert "is not a folder" in scene.run("--verify-backups", "nowhere").refusal


def test_a_summary_of_the_live_preview_counts_each_code() -> None:
    codes = [None, None, "already_gone", "unverified", "unverified", "stale"]
    found = tool.live_summary([{"code": code} for code in codes])
    refused = collections.Counter({"stale": 1, "unverified": 2})
    assert found == {"live_ready": 2, "live_done": 1, "live_refused": dict(refused)}
