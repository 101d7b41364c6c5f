"""Estimate how many faults the tests notice: the module is changed in one place, by its syntax, and tests have to fail.

    python -m tests.mutants --random 40 --seed 3     draw 40 mutants from all sections
    python -m tests.mutants --random 10 --section Undo --all

A mutant is played against scenarios of the simulation and the test files of its section; with --all against all fast
tests, if these do not notice it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "merge_contacts.py"
LEAST = 0.6  # of the mutants have to be noticed; nine of ten with --all and the slow tests
SCENARIOS = "30"
TESTS = {  # by the first words of a section's title
    "What": ("sections/test_requests.py",),
    "Text": ("sections/test_environment.py", "sections/test_report.py"),
    "Environment": ("sections/test_environment.py", "process/test_machines.py"),
    "Contacts": ("sections/test_csv.py",),
    "Detection": (
        "sections/test_detection.py",
        "sections/test_choices.py",
        "sections/test_live.py",
    ),
    "API: quota": ("sections/test_quota.py",),
    "API: requests": ("sections/test_requests.py",),
    "API: one": ("sections/test_requests.py", "sections/test_detection.py"),
    "Backup": ("sections/test_undo.py", "process/test_scenes.py"),
    "Savepoint": ("sections/test_savepoint.py",),
    "Merge": ("sections/test_merge.py", "process/test_way_out.py", "checks/test_once_found.py"),
    "Export": ("sections/test_export.py",),
    "Undo": ("sections/test_undo.py",),
    "Report": ("sections/test_report.py", "sections/test_page.py"),
    "Estimate": ("sections/test_report.py", "process/test_run.py"),
    "Console": ("process/test_terminal.py", "process/test_run.py"),
    "Preview": ("sections/test_detection.py", "sections/test_choices.py", "process/test_run.py"),
    "Command line": ("sections/test_command_line.py", "process/test_run.py"),
    "Page": ("sections/test_page.py",),
}
BOUNDARIES = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OPERATORS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
SILENT = (
    "log",
    "debug",
    "info",
    "warning",
    "print",
    "print_err",
    "status",
)  # calls that only say something


class Mutant(NamedTuple):
    """The module, changed in one place."""

    section: str
    line: int
    name: str
    text: str


class Fate(NamedTuple):
    """What noticed a mutant; "" where nothing did."""

    mutant: Mutant
    noticed_by: str


# --------------------------------------------------------------------------------------------------
# Making mutants
# --------------------------------------------------------------------------------------------------


class Source:
    """The module's text, and what its syntax tree says of places in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.data = text.encode("utf-8")
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        titles = re.finditer(r"^# -{90,}\n# (\w.*)\n# -{90,}$", text, re.M)
        self.titles = [(text.count("\n", 0, one.start()) + 1, one.group(1)) for one in titles]

    def section(self, line: int) -> str:
        return [title for start, title in self.titles if start <= line][-1]

    def span(self, node: ast.AST) -> tuple[int, int]:
        first = self.starts[node.lineno - 1] + node.col_offset
        return first, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        first, last = self.span(node)
        return self.data[first:last].decode("utf-8")

    def with_span(self, first: int, last: int, instead: str) -> str:
        return (self.data[:first] + instead.encode("utf-8") + self.data[last:]).decode("utf-8")


def mutants(text: str) -> Iterator[Mutant]:
    """Yield all mutants of the module."""
    source = Source(text)
    first_section = source.titles[0][0]
    tree = ast.parse(text)
    silent = set()  # in what is only said
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and is_silent(node):
            silent.update(id(one) for one in ast.walk(node))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if line <= first_section or id(node) in silent:
            continue
        for what, first, last, instead in changes(source, node):
            changed = source.with_span(first, last, instead)
            name = f"{what}: {text.splitlines()[line - 1].strip()[:70]}"
            yield Mutant(source.section(line), line, name, changed)


def changes(source: Source, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
    """Yield what a place may be changed to: what is done, the bytes from and to, and what stands there then."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        sign = OPERATORS[type(node.ops[0])]
        first, last = source.span(node.left)[1], source.span(node.comparators[0])[0]
        between = source.data[first:last].decode("utf-8")
        yield f"{sign} is {BOUNDARIES[sign]}", first, last, between.replace(sign, BOUNDARIES[sign])
    elif isinstance(node, ast.BoolOp):
        first, last = source.span(node.values[0])[1], source.span(node.values[1])[0]
        between = source.data[first:last].decode("utf-8")
        one, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        if len(node.values) == 2:
            yield f"{one} is {other}", first, last, between.replace(one, other)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield ("no not", *source.span(node), f"bool({source.of(node.operand)})")
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        other = not node.value if isinstance(node.value, bool) else node.value * 2 + 1
        yield (f"{node.value} is {other}", *source.span(node), repr(other))
    elif isinstance(node, ast.Call) and len(node.args) == 2 and not starred(node):
        one, other = map(source.of, node.args)
        first, last = source.span(node.args[0])[0], source.span(node.args[1])[1]
        if one != other:
            yield "swapped arguments", first, last, f"{other}, {one}"
    elif (
        isinstance(node, ast.Dict) and len(node.keys) > 1 and isinstance(node.keys[0], ast.Constant)
    ):
        first, last = source.span(node.keys[0])[0], source.span(node.values[0])[1]
        rest = source.data[last:].decode("utf-8")
        comma = re.match(r"\s*,", rest)
        if comma:
            yield "a field is dropped", first, last + len(comma.group().encode("utf-8")), ""
    elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await)):
        yield ("no call", *source.span(node), "pass")
    elif isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse:
        yield ("no guard", *source.span(node.test), "False")


def starred(node: ast.Call) -> bool:
    return any(isinstance(one, ast.Starred) for one in node.args)


def is_silent(node: ast.Expr) -> bool:
    """Return whether a statement only tells people something."""
    call = node.value.value if isinstance(node.value, ast.Await) else node.value
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in SILENT
    )


# --------------------------------------------------------------------------------------------------
# Hunting them
# --------------------------------------------------------------------------------------------------


def tests_of(section: str) -> list[str]:
    found = [files for start, files in TESTS.items() if section.startswith(start)]
    return [f"tests/{one}" for one in found[0]] if found else []


def hunt(mutant: Mutant, everything: bool = False) -> Fate:
    """Try a mutant in a copy of the project; return what noticed it."""
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mutant-", dir=room) as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "backups", "logs", "*.pyc")
        shutil.copytree(ROOT, copy, ignore=ignored)
        (copy / SOURCE.name).write_text(mutant.text, encoding="utf-8")
        python = [sys.executable, "-m"]
        quiet = ["pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        commands = {"the simulation": ["tests.simulate", "--seeds", SCENARIOS]}
        files = [one for one in tests_of(mutant.section) if (copy / one).exists()]
        commands.update({file: [*quiet, file] for file in files})
        if everything:
            commands["another test"] = [*quiet, "tests"]
        for name, command in commands.items():
            try:
                done = subprocess.run(
                    [*python, *command],
                    cwd=str(copy),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                    timeout=600,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Fate(mutant, f"{name}, which did not end")
            if done.returncode:
                return Fate(mutant, name)
    return Fate(mutant, "")


def draw(number: int, seed: int, section: str = "") -> list[Mutant]:
    """Draw so many mutants: first a section, then one of its mutants, so that each section counts."""
    by_section: dict[str, list[Mutant]] = {}
    for mutant in mutants(SOURCE.read_text(encoding="utf-8")):
        if mutant.section.startswith(section) and tests_of(mutant.section):
            by_section.setdefault(mutant.section, []).append(mutant)
    chance = random.Random(seed)
    titles = sorted(by_section)
    return [chance.choice(by_section[chance.choice(titles)]) for _ in range(number)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=str(__doc__).splitlines()[0]
    )
    option = parser.add_argument
    option("--random", metavar="N", type=int, default=10, help="so many mutants (default 10)")
    option("--seed", metavar="S", type=int, default=1, help="that draws them (default 1)")
    option("--section", metavar="TITLE", default="", help="only of sections that begin so")
    option("--all", action="store_true", help="try all fast tests, too")
    option("--jobs", metavar="J", type=int, default=1, help="in so many processes")
    options = parser.parse_args()
    chosen = draw(options.random, options.seed, options.section)
    noticed = 0
    with multiprocessing.Pool(options.jobs) as pool:
        work = functools.partial(hunt, everything=options.all)
        for fate in pool.imap_unordered(work, chosen, chunksize=1):
            noticed += bool(fate.noticed_by)
            place = f"{fate.mutant.section.partition(':')[0]} {fate.mutant.line}"
            print(f"{place:22} {fate.mutant.name:80} {fate.noticed_by or 'ALIVE'}", flush=True)
    print(f"{noticed} of {len(chosen)} mutants are noticed")
    return 0 if noticed >= LEAST * len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
