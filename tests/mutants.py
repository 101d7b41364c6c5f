"""Estimate how many faults the tests notice: a test has to fail where the module is changed.

    python -m tests.mutants --random 40 --seed 3 --jobs 2
    python -m tests.mutants --random 10 --section Undo

Judges of a mutant: the tests of its section, all other fast tests, then simulated scenarios. The
first that notices it is the last to be asked, and all of them have to pass the module as it is.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
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
LEAST = 0.6  # of the mutants have to be noticed
TESTS = {  # files in tests/sections, by the first words of a section's title
    "What": "requests merge",
    "Text": "detection report",
    "Environment": "environment",
    "Contacts": "csv",
    "Detection": "detection choices live",
    "API: quota": "quota",
    "API: requests": "requests",
    "API: one": "requests detection",
    "Backup": "merge undo",
    "Savepoint": "savepoint",
    "Merge": "pair_merge merge",
    "Export": "export",
    "Undo": "undo",
    "Report": "report page",
    "Estimate": "estimate",
    "Console": "command_line",
    "Preview": "detection choices command_line",
    "Command line": "command_line",
    "Page": "page",
}
PYTEST = ("pytest", "-x", "-n", "0", "-p", "no:cacheprovider")
SCENARIOS = ("tests.simulate", "--seeds", "30")
COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
LEAVING = (ast.Raise, ast.Return, ast.Continue, ast.Break)  # what a guard ends with
SILENT = ("log", "debug", "info", "warning", "error", "print", "status")  # they only say something


class Change(NamedTuple):
    """What one place of a text may become."""

    kind: str
    first: int  # of the bytes that are replaced
    last: int
    instead: str = ""


class Mutant(NamedTuple):
    """The module, changed in one place."""

    section: str
    line: int
    name: str
    change: Change


class Source:
    """The module's text, and what its syntax tree says of places in it."""

    def __init__(self, text: str) -> None:
        self.text, self.lines, self.data = text, text.splitlines(), text.encode("utf-8")
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        titles = re.finditer(r"^# -{90,}\n# (\w.*)\n# -{90,}$", text, re.M)
        self.titles = [(text.count("\n", 0, one.start()) + 1, one.group(1)) for one in titles]

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return the bytes from and to."""
        first = self.starts[node.lineno - 1] + node.col_offset
        return first, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        return self.data[slice(*self.span(node))].decode("utf-8")

    def changed_by(self, mutant: Mutant) -> str:
        _, first, last, instead = mutant.change
        return (self.data[:first] + instead.encode("utf-8") + self.data[last:]).decode("utf-8")

    def mutants(self) -> Iterator[Mutant]:
        """Yield all mutants, those that can't be compiled included."""
        tree = ast.parse(self.text)
        silent = set()
        for node in ast.walk(tree):
            # What stands in an f-string is for people, and before Python 3.12 has no position.
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and only_says(node)):
                silent.update(map(id, ast.walk(node)))
        for node in ast.walk(tree):
            line = getattr(node, "lineno", 0)
            titles = [title for start, title in self.titles if start <= line]
            if titles and id(node) not in silent:
                name = self.lines[line - 1].strip()[:70]
                for change in (*self.of_expressions(node), *self.of_statements(node)):
                    yield Mutant(titles[-1], line, f"{change.kind}: {name}", change)

    def of_expressions(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.Compare):
            values = [node.left, *node.comparators]
            for operator, left, right in zip(node.ops, values, values[1:]):
                kind = "boundary" if isinstance(operator, ORDER) else "opposite"
                yield self._sign(kind, left, right, *COMPARISONS[type(operator)])
        elif isinstance(node, ast.BoolOp):
            signs = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield self._sign("and/or", *node.values[-2:], *signs)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            other = not node.value if isinstance(node.value, bool) else node.value * 2 + 1
            yield Change("constant", *self.span(node), repr(other))
        elif isinstance(node, ast.Call):
            for left, right in zip(node.args, node.args[1:]):
                swapped = f"{self.of(right)}, {self.of(left)}"
                yield Change("swapped", self.span(left)[0], self.span(right)[1], swapped)
            before = node.args[-1] if node.args else node.func
            kept = "" if node.args else "("
            for value in (one.value for one in node.keywords):
                yield Change("no keyword", self.span(before)[1], self.span(value)[1], kept)
                before, kept = value, ""
        elif isinstance(node, ast.Dict):
            yield from self._dropped(node.values)
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)) and len(node.elts) > 2:
            yield from self._dropped(node.elts)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Change("opposite", *self.span(node), f"({self.of(node.operand)})")

    def of_statements(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield Change("opposite", *self.span(node.test), f"(not ({self.of(node.test)}))")
        if isinstance(node, ast.If) and isinstance(node.body[-1], LEAVING):
            yield Change("no guard", *self.span(node.test), "False")
        elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await)):
            yield Change("no call", *self.span(node), "pass")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield Change("no assignment", *self.span(node), "pass")
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            for test in node.generators[0].ifs:
                yield Change("opposite", *self.span(test), f"(not ({self.of(test)}))")

    def _dropped(self, values: list[ast.expr]) -> Iterator[Change]:
        for before, value in zip(values, values[1:]):
            yield Change("no field", self.span(before)[1], self.span(value)[1])

    def _sign(self, kind: str, left: ast.AST, right: ast.AST, sign: str, other: str) -> Change:
        first, last = self.span(left)[1], self.span(right)[0]
        between = self.data[first:last].decode("utf-8").replace(sign, other)
        return Change(kind, first, last, between)


def only_says(node: ast.Expr) -> bool:
    """Return whether a statement only tells people something."""
    call = node.value.value if isinstance(node.value, ast.Await) else node.value
    function = call.func if isinstance(call, ast.Call) else None
    return isinstance(function, ast.Attribute) and function.attr in SILENT


def draw(source: Source, number: int, seed: int, section: str = "") -> list[Mutant]:
    """Draw so many mutants, of each section and within it of each kind as many as of any other."""
    found: dict[str, dict[str, list[Mutant]]] = {}
    for mutant in source.mutants():
        if mutant.section.startswith(section):
            kinds = found.setdefault(mutant.section, {})
            kinds.setdefault(mutant.change.kind, []).append(mutant)
    chance = random.Random(seed)
    titles = sorted(found)
    chance.shuffle(titles)
    chosen: list[Mutant] = []
    while titles and len(chosen) < number:
        kinds = found[titles[0]]
        mutant = chance.choice(kinds[chance.choice(sorted(kinds))])
        with contextlib.suppress(SyntaxError):
            compile(source.changed_by(mutant), SOURCE.name, "exec")
            chosen.append(mutant)
            titles.append(titles.pop(0))
    return chosen


def judges_of(section: str, quick: bool) -> dict[str, tuple[str, ...]]:
    """Return the commands that judge a section's mutants, by name, the quickest first."""
    (names,) = (names for start, names in TESTS.items() if section.startswith(start))
    files = [f"tests/sections/test_{name}.py" for name in names.split()]
    judges = {
        "its tests": (*PYTEST, *files),
        "another test": (*PYTEST, "tests"),
        "the simulation": SCENARIOS,
    }
    if quick:
        del judges["another test"]
    return judges


def passes(text: str, command: tuple[str, ...]) -> bool:
    """Return whether a command ends well with this text of the module, in a copy of the project."""
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mutant-", dir=room) as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        (copy / SOURCE.name).write_text(text, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=str(copy),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                timeout=1200,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return not done.returncode


def hunt(text: str, judges: dict[str, tuple[str, ...]]) -> str:
    """Return the name of the first judge that a text of the module does not pass; "" for none."""
    for name, command in judges.items():
        if not passes(text, command):
            return name
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=str(__doc__).splitlines()[0]
    )
    option = parser.add_argument
    option("--random", metavar="N", type=int, default=10, help="so many mutants (default 10)")
    option("--seed", metavar="S", type=int, default=1, help="that draws them (default 1)")
    option("--section", metavar="TITLE", default="", help="only of sections that begin so")
    option("--jobs", metavar="J", type=int, default=1, help="in so many processes")
    option("--quick", action="store_true", help="without the tests of other sections")
    options = parser.parse_args()
    source = Source(SOURCE.read_text(encoding="utf-8"))
    chosen = draw(source, options.random, options.seed, options.section)
    judges = [judges_of(mutant.section, options.quick) for mutant in chosen]
    each = {" ".join(command): command for one in judges for command in one.values()}
    with multiprocessing.Pool(options.jobs) as pool:
        baseline = [(source.text, {name: command}) for name, command in each.items()]
        failing = [name for name in pool.starmap(hunt, baseline, chunksize=1) if name]
        if failing:
            print("the module as it is fails:", *failing, sep="\n  python -m ")
            return 2
        texts = map(source.changed_by, chosen)
        fates = [pool.apply_async(hunt, one) for one in zip(texts, judges)]
        noticed = 0
        for mutant, fate in zip(chosen, fates):
            noticed_by = fate.get()
            noticed += bool(noticed_by)
            place = f"{mutant.section.partition(':')[0]} {mutant.line}"
            print(f"{place:22} {mutant.name:90} {noticed_by or 'ALIVE'}", flush=True)
    print(f"{noticed} of {len(chosen)} mutants are noticed")
    return 0 if noticed >= LEAST * len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
