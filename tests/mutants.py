"""The module with its safety lines taken out, one at a time: some scenario has to break an invariant.

python -m tests.mutants --random N [--seed S]         N guards and durable writes of the merge core, drawn by its syntax
"""

import argparse
import ast
import functools
import multiprocessing
import random
import re
from typing import List, NamedTuple, Optional, Sequence

from tests.simulate import kept_seeds, play
from tests.simulation.world import MODULE, load

START = 10_000


class Mutant(NamedTuple):
    """The module's text without one of its lines."""

    name: str
    text: str


class Fate(NamedTuple):
    """What happened to a mutant: the seed that broke, and the invariant."""

    mutant: Mutant
    seed: Optional[int]
    invariant: str
    played: int


def hunt(mutant: Mutant, most: int) -> Fate:
    """Play scenarios of a mutant until one breaks an invariant that the module itself keeps."""
    module = load(mutant.text, "merge_contacts_mutant")
    seeds = [*range(START, START + most), *kept_seeds()]
    for number, seed in enumerate(seeds, 1):
        verdict = play(seed, module)
        if verdict.invariant and not play(seed, load()).invariant:
            return Fate(mutant, seed, f"{verdict.invariant}: {verdict.what}", number)
    return Fate(mutant, None, "", len(seeds))


def line_of(fate: Fate) -> str:
    if fate.seed is not None:
        outcome = f"seed {fate.seed} ({fate.played}): {fate.invariant[:110]}"
    else:
        outcome = f"ALIVE after {fate.played} scenarios"
    return f"{fate.mutant.name:58} {outcome}"


CORE = ("\n# Merge\n", "\n# Export")  # the merge core begins and ends with these
SAVES = ("save", "_transition", "record_outcome")


def drawn_lines(text: str) -> List[Mutant]:
    """Return a mutant for each guard (`if … raise`) and each durable write of the merge core, without that line."""
    first, last = (text[: text.index(mark)].count("\n") + 1 for mark in CORE)
    lines = text.splitlines(keepends=True)
    found = []
    for node in ast.walk(ast.parse(text)):
        line, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) or 0
        if not first < line < last:
            continue
        is_guard = (
            isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse
        )
        if is_guard or (isinstance(node, ast.Expr) and _is_save(node)):
            found.append(_without(lines, line, end))
    return sorted(set(found), key=lambda mutant: mutant.name)


def _is_save(node: ast.Expr) -> bool:
    """Return whether a statement awaits a durable write, and nothing else with it."""
    call = node.value.value if isinstance(node.value, ast.Await) else None
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in SAVES
    ):
        return False
    return not any(
        isinstance(one, ast.Await) for argument in call.args for one in ast.walk(argument)
    )


def _without(lines: Sequence[str], first: int, last: int) -> Mutant:
    """Make the mutant without these lines."""
    line = lines[first - 1]
    indent = line[: len(line) - len(line.lstrip())]
    # An `elif` needs its test to be there.
    instead = (
        re.sub(r"elif .*", "elif False:\n", line.lstrip())
        if line.lstrip().startswith("elif")
        else "pass\n"
    )
    body = indent + "    pass\n" if instead.startswith("elif") else ""
    text = "".join([*lines[: first - 1], indent + instead + body, *lines[last:]])
    return Mutant(f"{first}: {line.strip()[:90]}", text)


def random_table(number: int, seed: int, jobs: int, most: int) -> int:
    """Draw lines of the merge core, take each out, and count how many scenarios notice; 1 where it is under six of ten."""
    lines = drawn_lines(MODULE.read_text(encoding="utf-8"))
    chosen = random.Random(seed).sample(lines, min(number, len(lines)))
    caught = 0
    with multiprocessing.Pool(jobs, maxtasksperchild=1) as pool:
        for fate in pool.imap(functools.partial(hunt, most=most), chosen, chunksize=1):
            caught += fate.seed is not None
            print(line_of(fate), flush=True)
    print(
        f"{caught} of {len(chosen)} drawn lines are missed when they are gone (there are {len(lines)})"
    )
    return 0 if 10 * caught >= 6 * len(chosen) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__.splitlines()[0]
    )  # type: ignore[union-attr]
    parser.add_argument(
        "--random",
        metavar="N",
        type=int,
        default=10,
        help="so many lines of the merge core (default 10)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=1, help="that draws them (default 1)"
    )
    parser.add_argument("--jobs", metavar="J", type=int, default=1, help="in so many processes")
    parser.add_argument(
        "--most", metavar="M", type=int, default=200, help="scenarios for each (default 200)"
    )
    options = parser.parse_args()
    return random_table(options.random, options.seed, options.jobs, options.most)


if __name__ == "__main__":
    raise SystemExit(main())
