"""README and `--help` against the module: exit codes, options, codes, settings, states, words."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import merge_contacts as tool
from tests.support import COLUMNS, ROOT, SCRIPT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
PROSE = FENCED.sub("", README)
COMMAND = [sys.executable, str(SCRIPT), "--help"]
HELP = subprocess.run(
    COMMAND, env={**os.environ, "COLUMNS": "80"}, stdout=subprocess.PIPE, check=True
).stdout.decode("ascii")


def table(head: str, text: str = README) -> list[list[str]]:
    """Return the cells of the rows below the table's `head`."""
    assert text.count(head + "\n") == 1, f"there is no table {head}, or more than one"
    rows = []
    for line in text[text.index(head) :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def in_code(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def parser_options() -> set[str]:
    names = [name for action in tool.build_parser()._actions for name in action.option_strings]
    return {name for name in names if name[:2] == "--"}


# -- the module's tables ---------------------------------------------------------------------------


def test_exit_codes_are_those_of_the_module() -> None:
    codes = {str(code): text for code, text in tool.EXIT_CODES.items()}
    assert dict(table("| exit code | meaning |")) == codes
    listed = re.findall(r"^  (\d+) +(.+)$", HELP.partition("Exit codes:\n")[2], re.MULTILINE)
    assert dict(listed) == codes


def test_every_option_in_the_readme_is_one_of_the_parser() -> None:
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= parser_options()


def test_help_is_two_screens_of_80_columns_with_a_line_for_each_option() -> None:
    lines = HELP.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) < 80
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", HELP, re.MULTILINE)
    assert sorted(listed) == sorted(parser_options())


def test_the_table_of_error_codes_is_the_modules() -> None:
    rows = []
    for code, advice in tool.ADVICE.items():
        rows.append(f"| `{code}` | {tool.SKIP_REASONS.get(code, '')} | {advice} |")
    head = ["| code | why a group is skipped | what to do |", "|---|---|---|"]
    assert "\n".join([*head, *rows]) in TESTS


def test_error_codes_and_options_of_the_readme_exist() -> None:
    named = {word for word in in_code(README) if re.fullmatch(r"[a-z]+(_[a-z]+)+", word)}
    others = {"duplicate_id", "primary_id", "user_", "rev_user", "created_by"}
    assert named - others <= tool.ADVICE.keys() | set(tool.State.__members__)


def test_settings_are_the_same_everywhere() -> None:
    pattern = r"\bDEVREV_[A-Z_]+\b"
    from_help = set(re.findall(pattern, HELP))
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert set(re.findall(rf'"({pattern})"', SCRIPT.read_text(encoding="utf-8"))) == from_help
    assert set(re.findall(pattern, PROSE)) == from_help
    assert set(re.findall(rf"^(?:# )?({pattern})=", example, re.MULTILINE)) == from_help
    settings = tool.ApiSettings(token="")
    text = " ".join(" ".join(row) for row in table("| variable | meaning |"))
    for default in (settings.base_url, settings.user_ref_prefix):
        assert f"`{default}`" in text and f"(default: {default})" in HELP
    for number in (settings.period, settings.timeout, settings.retries):
        assert f"({number:g})" in text and f"(default: {number:g})" in HELP


def test_states_fields_and_lists_of_a_report_are_explained() -> None:
    rows = dict(table("| field of a pair | meaning |", TESTS))
    stored = {state.value for state in tool.State if state is not tool.State.SKIPPED}
    assert stored <= in_code(rows["`state`"])
    contact = tool.Contact("id", "", "a@example.com", "REVU-1", "", 0, "", "")
    entry = tool.merge_entry(tool.Pair(contact, contact, None), None)
    named = set().union(*map(in_code, rows))
    assert {"state", "in_csv", "proved", "backed_up", "fields_lost"} <= named & entry.keys()
    summary = ("already_merged", "left", "pairs_planned", "unfinished_merges", "undo_settled")
    assert {*tool.BESIDE_PAIRS, *summary} <= in_code(TESTS)


def test_the_columns_and_the_classes_are_named() -> None:
    section = README.partition("## The CSV\n")[2].partition("\n## ")[0]
    assert set(COLUMNS) <= in_code(section)
    assert {"duplicate_id", "primary_id"} <= set(tool.MERGE_COLUMNS) & in_code(README)
    jobs = re.findall(r"^- `(\w+)(?:\(\))?`: \w+", README, re.MULTILINE)
    names = {"Contact", "DevRevAPI", "SavePoint", "ContactMerger", "main"}
    assert names <= set(jobs) <= set(dir(tool))


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[?([\d.]+)", text, re.MULTILINE)[0] == tool.__version__


# -- what a reader meets ---------------------------------------------------------------------------


def test_the_readme_can_be_finished() -> None:
    assert len(README.split()) <= 3000 and len(README.splitlines()) <= 300


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else README
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}
        assert not anchor or anchor in anchors, target


def test_one_command_sets_up_and_runs_the_tests_and_one_the_demo() -> None:
    """The first line with `-m pytest` is what `.ci/run` runs."""
    for last in ("-m pytest", "-m tests.sandbox"):
        (line,) = re.findall(rf"^python3 -m venv .*{last}$", README, re.MULTILINE)
        assert "pip install" in line and "-r requirements.txt" in line
    assert README.count("-m pytest") == 1


def test_the_demo_ends_in_a_summary_and_the_next_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sandbox"], cwd=str(ROOT), encoding="utf-8", check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) < 60 and "[NO]" not in done.stdout, done.stdout
    assert "--- Summary ---" in lines[-15:]
    assert lines[-1].endswith("merge_contacts.py --export contacts.csv")


def test_the_guarantees_name_tests_that_exist() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    rows = table("| if… | then | test |", TESTS)
    names = re.findall(r"`(test_\w+)`", " ".join(row[2] for row in rows))
    assert len(rows) > 30 and len(names) >= len(rows)
    assert not [name for name in names if f"def {name}(" not in tests]
