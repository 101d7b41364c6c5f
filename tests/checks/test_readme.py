"""The README and `--help` against the module's tables: exit codes, options, error codes, environment, states, words."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Set

import pytest

import merge_contacts as tool
from tests.support import COLUMNS, ROOT, SCRIPT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARANTEES = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
# Words of our own that a reader has to learn, and what one says instead: requested, no longer exists, fix, again, ...
HOUSE_WORDS = (
    "anew", "hangs on", "hang on", "has gone", "have gone", "taken back", "takes back", "take back", "given back",
    "gives back", "handed back", "mend", "mended", "flaw", "somebody", "nobody", "asked for", "asks for",
    "comes to rest", "at rest", "lets go", "let go", "looked at", "look at", "looks at", "goes on", "go on", "begun",
    "at its end", "at their end", "at an end", "the disk refuses", "ceiling",
)  # fmt: skip
PAGES = ("README.md", "CHANGELOG.md", "tests/README.md", ".env.example")


def help_text() -> str:
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, str(SCRIPT), "--help"]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True
    ).stdout.decode("ascii")


HELP = help_text()


def table(head: str, text: str = README) -> List[List[str]]:
    """Return the cells of the rows below the table's `head`."""
    assert text.count(head + "\n") == 1, f"there is no table {head}, or more than one"
    lines = text[text.index(head) :].splitlines()[2:]
    rows = lines[
        : next(index for index, line in enumerate([*lines, ""]) if not line.startswith("|"))
    ]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def in_code(text: str) -> Set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def parser_options() -> Set[str]:
    return {
        name
        for action in tool.build_parser()._actions
        for name in action.option_strings
        if name[:2] == "--"
    }


# -- the reference against the module's tables ---------------------------------------------------------


def test_exit_codes_are_those_of_the_module() -> None:
    rows = table("| exit code | meaning |")
    assert dict(rows) == {str(code): text for code, text in tool.EXIT_CODES.items()}
    listed = re.findall(r"^  (\d+) +(.+)$", HELP.partition("Exit codes:\n")[2], re.MULTILINE)
    assert {int(code): meaning for code, meaning in listed} == tool.EXIT_CODES


def test_every_option_in_the_readme_is_one_of_the_parser() -> None:
    of_others = {"--port"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert not named - parser_options() - of_others


def test_help_has_a_line_for_each_option_and_no_other() -> None:
    listed = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", HELP, re.MULTILINE))
    assert listed == parser_options()


def test_help_is_two_screens_of_80_columns() -> None:
    lines = HELP.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) < 80


def test_every_error_code_is_in_the_readme_once_and_no_other() -> None:
    found = [
        code
        for codes, _ in table("| error code | what to do |")
        for code in re.findall(r"`([a-z_]+)`", codes)
    ]
    assert sorted(found) == sorted(tool.CODES)


def test_the_advice_of_the_readme_does_not_contradict_the_module() -> None:
    """An option that the README advises for one of the codes is one that the module advises for it."""
    for codes, advice in table("| error code | what to do |"):
        modules = " ".join(tool.CODES[code].advice for code in re.findall(r"`([a-z_]+)`", codes))
        assert set(re.findall(r"--[a-z-]+", advice)) <= set(re.findall(r"--[a-z-]+", modules)), (
            codes
        )


def test_the_full_table_of_error_codes_is_the_modules() -> None:
    rows = [f"| `{code}` | {one.why} | {one.advice} |" for code, one in tool.CODES.items()]
    head = ["| code | why a group is skipped | what to do |", "|---|---|---|"]
    assert "\n".join([*head, *rows]) in GUARANTEES


def test_environment_variables_are_the_same_everywhere() -> None:
    pattern = r"\bDEVREV_[A-Z_]+\b"
    from_help = set(re.findall(pattern, HELP))
    in_module = set(re.findall(rf'"({pattern})"', SCRIPT.read_text(encoding="utf-8")))
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert from_help == in_module
    assert set(re.findall(pattern, PROSE)) == from_help
    assert set(re.findall(rf"^(?:# )?({pattern})=", example, re.MULTILINE)) == from_help


def test_defaults_of_settings_are_the_modules() -> None:
    settings = tool.ApiSettings(token="")
    text = " ".join(" ".join(row) for row in table("| variable | meaning |"))
    for default in (settings.base_url, settings.user_ref_prefix):
        assert f"`{default}`" in text and f"(default: {default})" in HELP
    for number in (settings.period, settings.timeout, settings.retries):
        assert f"({number:g})" in text and f"(default: {number:g})" in HELP


def test_states_fields_and_lists_of_a_report_are_explained() -> None:
    rows = dict(table("| field of a pair | meaning |"))
    assert {state.value for state in tool.State} <= in_code(rows["`state`"])
    contact = tool.Contact("id", "", "a@example.com", "REVU-1", "", 0, "", "")
    entry = tool.merge_entry(tool.Pair(contact, contact, None), None)
    named = set().union(*map(in_code, rows))
    assert {"state", "in_csv", "proved", "backed_up", "fields_lost"} <= named & entry.keys()
    lists = {
        "successful_merges",
        "failed_merges",
        "unfinished_merges",
        "settled",
        "cancelled",
        "undo_settled",
    }
    assert {*lists, *tool.BESIDE_PAIRS, "already_merged", "left", "pairs_planned"} <= in_code(
        README
    )


def test_the_columns_are_the_eight_of_the_query() -> None:
    section = README.partition("## The CSV\n")[2].partition("\n## ")[0]
    assert set(COLUMNS) <= in_code(section)


def test_the_classes_and_their_jobs_are_named() -> None:
    section = README.partition("**Architecture.**")[2]
    for name in ("Contact", "DevRevAPI", "SavePoint", "ContactMerger", "main"):
        assert re.search(rf"^- `{name}(\(\))?`: \w+", section, re.MULTILINE) and hasattr(
            tool, name
        ), name


# -- what a reader meets -------------------------------------------------------------------------------


def test_the_readme_can_be_finished() -> None:
    assert len(README.split()) <= 2800 and len(README.splitlines()) <= 300


def test_the_status_is_in_the_first_screen() -> None:
    assert any(
        "not yet run against a production organisation" in line for line in README.splitlines()[:24]
    )


def test_the_links_lead_somewhere() -> None:
    def anchors(text: str) -> Set[str]:
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert not path or (ROOT / path).exists(), target
            text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else README
            assert not anchor or anchor in anchors(text), target


def test_one_command_sets_up_and_runs_the_tests_and_one_the_demo() -> None:
    """The first line with `-m pytest` is what `.ci/run` runs."""
    for last in ("-m pytest", "-m tests.sandbox"):
        (line,) = (
            one
            for one in README.splitlines()
            if one.startswith("python3 -m venv") and one.endswith(last)
        )
        assert "pip install" in line and "-r requirements.txt" in line
    assert README.count("-m pytest") == 1


def test_the_demo_ends_in_a_summary_and_the_next_step() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "tests.sandbox"]
    done = subprocess.run(
        command,
        cwd=str(ROOT),
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) < 60 and "[NO]" not in done.stdout, done.stdout
    assert "--- Summary ---" in lines[-15:] and lines[-1].endswith(
        "merge_contacts.py --export contacts.csv"
    )


def test_the_guarantees_name_tests_that_exist() -> None:
    tests = "".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))
    )
    rows = table("| if… | then | test |", GUARANTEES)
    names = re.findall(r"`(test_\w+)`", " ".join(row[2] for row in rows))
    assert len(rows) > 30 and len(names) >= len(rows)
    assert not [name for name in names if f"def {name}(" not in tests]


@pytest.mark.parametrize("page", [*PAGES, "--help"])
def test_no_house_words(page: str) -> None:
    text = HELP if page == "--help" else (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".md"):  # names of tests and output of the tool are judged elsewhere
        text = re.sub(
            r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        )
    words = re.sub(r"\s+", " ", text)
    found: Dict[str, str] = {}
    for word in HOUSE_WORDS:
        match = re.search(rf"\b{word}\b", words, re.IGNORECASE)
        if match:
            found[word] = words[max(0, match.start() - 40) : match.end() + 40]
    assert not found


def test_no_page_speaks_of_an_earlier_format() -> None:
    """State of another format is refused, so nothing may tell how to use it."""
    for name in ("README.md", "tests/README.md", ".env.example"):
        assert "journal" not in Path(ROOT / name).read_text(encoding="utf-8"), name
