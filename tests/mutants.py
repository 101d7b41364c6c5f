"""The module with its safety lines taken out, one at a time: for each, some scenario has to break an invariant.

python -m tests.simulate --mutants [--jobs J]         the list below
python -m tests.mutants --random N [--seed S]         N guards and durable writes of the merge core, drawn by its syntax
"""

import argparse
import ast
import functools
import multiprocessing
import random
import re
import time
from typing import List, NamedTuple, Optional, Sequence

from tests.simulate import kept_seeds, play
from tests.simulated import MODULE, load

SEEDS = 500  # scenarios that a mutant may survive before it counts as alive
START = 10_000


class Mutant(NamedTuple):
    """A piece of the module's text, and what stands in its place; `covered` says why it may survive."""

    name: str
    old: str
    new: str
    covered: str = ""


MUTANTS = [
    # The savepoint
    Mutant("the copy is not written", "            for file in self.files:\n                if file.failure is None:", "            for file in self.files[:1]:\n                if file.failure is None:"),
    Mutant("savepoint.db is not written", "            for file in self.files:\n                if file.failure is None:", "            for file in self.files[1:]:\n                if file.failure is None:"),
    Mutant("a file learns nothing from the other", "news = {ids: row for ids, row in pairs.items() if mine.get(ids) != row}", "news: Dict[Ids, StoredPair] = {}"),
    Mutant("the older row wins", "sorted((one, other), key=authority, reverse=True)", "sorted((one, other), key=authority)"),
    Mutant("an intent that was never sent counts as sent", "            if one_ahead and is_last and is_new and", "            if False and"),
    Mutant("what stands in the last write counts as never sent", "        one_ahead = self.main.last_run == self.copy.last_run and", "        one_ahead = True or"),
    Mutant("the copy is written first", "self.files = (self.main, self.copy)", "self.files = (self.copy, self.main)"),
    Mutant(
        "the intent is not saved",
        "            await context.savepoint.save(pair)\n            # The disk may be slow",
        "            # The disk may be slow",
    ),
    Mutant(
        "requested although a file can't be written",
        "            if context.savepoint.failure:\n                raise Cancelled()\n",
        "",
    ),
    Mutant(
        "a withdrawal is not saved",
        "            pair.withdrawn_at = withdrawn_at\n            await context.savepoint.save(pair)\n",
        "            pair.withdrawn_at = withdrawn_at\n",
        "the savepoint then says that the merge was requested, so that the next run polls and waits for nothing",
    ),
    Mutant("a transition is not saved", "        await self.context.savepoint.save(pair)\n        if state is State.VERIFYING:", "        if state is State.VERIFYING:"),
    Mutant(
        "a rejection is not saved",
        "        pair.rejected, pair.forbidden = True, pair.forbidden or error.status == 403\n        await self.context.savepoint.save(pair)\n",
        "        pair.rejected, pair.forbidden = True, pair.forbidden or error.status == 403\n",
        "the transition that follows saves it",
    ),
    Mutant("an outcome is not saved", "            if not isinstance(problem, PairSkipped):\n                await self.savepoint.save(pair)\n", ""),
    Mutant("unfinished pairs are forgotten", "return list(self.pairs(*UNFINISHED))", "return []"),
    Mutant("an older savepoint is not noticed", "            check_not_restored(savepoint)\n        trial", "            pass\n        trial"),
    Mutant("killed runs get no report", "        for path in report_killed_runs(run.environment, savepoint):\n", "        for path in []:\n"),
    Mutant("a report is written again and again", '    document["reported"] = True\n', "    pass\n"),
    Mutant("pairs of all runs are in each report", "        for name, value in columns.items():\n", "        columns.pop(\"run\", None)\n        for name, value in columns.items():\n"),
    # What a request rests on
    Mutant("checks are believed for ever", "FRESH = 60.0", "FRESH = 1e9"),
    Mutant("lists are believed for ever", "LISTED = 120.0", "LISTED = 1e9"),
    Mutant(
        "age by the monotonic clock alone",
        "return max(now.wall - since.wall, now.monotonic - since.monotonic)",
        "return now.monotonic - since.monotonic",
    ),
    Mutant("a list is as old as its last page", "            since = since or page.since\n", "            since = page.since\n"),
    Mutant("nothing expires", "            raise PreconditionsExpired()\n", "            pass\n"),
    Mutant(
        "any state will do",
        '    if state != "active" or live.get("primary_identity"):\n',
        "    if False:\n",
    ),
    Mutant("any email will do", "    if email_of(live) != contact.key:\n", "    if False:\n"),
    Mutant("unverified contacts are merged", "if is_unverified[pair.duplicate.id] and not is_unverified[primary.id] and not try_unverified:", "if False:"),
    Mutant("an undone or cancelled group is merged again", "if is_stale or (group.email in blocked and not all(rows)):", "if False:"),
    Mutant("no count check", "            if problem:\n                raise problem\n\n\ndef oldest", "\n\ndef oldest"),
    Mutant("fewer tickets will do, too", "if greatest == contact.tickets or (greatest >", "if True or (greatest >"),
    Mutant("only the first page", "            if not cursor:\n                return\n", "            return\n"),
    Mutant("timelines of what has changed are not read again", '!= obj.get("modified_date")]', "is known]"),
    Mutant(
        "a backup is not checked from the disk",
        "    if problems:\n        raise PairError(\"backup_failed\", f\"{folder}: \"",
        "    if False:\n        raise PairError(\"backup_failed\", f\"{folder}: \"",
        "it guards against a disk that loses what it was given, which is not simulated; tests/test_survive.py does",
    ),
    # The first merge, order, failures
    Mutant("the first merge does not go alone", "                    await self.context.first_merge.acquire(pair.ids)\n", ""),
    Mutant(
        "an acknowledgement confirms the first merge",
        "                self.timer.start()\n",
        "                self.timer.start()\n                self.context.first_merge.confirmed = True\n",
    ),
    Mutant("failures in a row stop nothing", "if self._failures_in_a_row >= self.MAX_FAILURES_IN_A_ROW and not self.draining:", "if False:"),
    # Requesting again
    Mutant(
        "requested again without a poll",
        "                if again and await poll(*pair.ids, RequestOptions(FINISH)) is not DuplicateStatus.EXISTS:",
        "                if False:",
        "the merge has to come within that moment, which test_invariants.py chooses",
    ),
    Mutant(
        "requested again with the old backup",
        "            self.preconditions.invalidate()\n        async with",
        "        async with",
    ),
    Mutant("no patience", "            if waited >= longest:\n", "            if True:\n"),
    Mutant(
        "patience of a lost answer for all",
        "        return merge_timeout\n    return min(10.0",
        "        pass\n    return min(10.0",
    ),
    Mutant(
        "requested again whatever the plan says",
        "            wanted = self.shared.wanted.get(pair.ids)\n            if wanted is None or wanted.new_ref != pair.new_ref:\n",
        "            wanted = self.shared.wanted.get(pair.ids) or pair\n            if False:\n",
    ),
    Mutant(
        "requested again after an acknowledgement, in one run",
        "if self.requests_sent >= self.MAX_REQUESTS or (self.requests_sent and answered):",
        "if self.requests_sent >= self.MAX_REQUESTS:",
        "again in the same run, after a poll and the complete wait, is allowed",
    ),
    Mutant(
        "time waited for by the wall clock",
        "return self.now().monotonic - since.monotonic",
        "return self.now().wall - since.wall",
    ),
    Mutant(
        "what DevRev has not answered counts as merged",
        'return DuplicateStatus.GONE if user.get("state") == "deleted" else DuplicateStatus.EXISTS',
        "return DuplicateStatus.GONE",
    ),
    Mutant(
        "a route's 404 is an object's",
        'return self.status == 404 and self.data.get("type") == "not_found"',
        "return self.status == 404",
    ),
    Mutant(
        "merged elsewhere counts as ours",
        "elif error.missing and first and await self.verifier.is_merged_elsewhere(pair, self.timer.pause):",
        "elif False:",
    ),
    Mutant("three polls that tell nothing count as merged", "and await self.verifier.lists_show_merged(pair):", "and True:"),
    Mutant("lists never decide", "and await self.verifier.lists_show_merged(pair):", "and False:"),
    # References, verification, cancelled pairs
    Mutant(
        "a reference that another user has set is overwritten",
        "    if pair.new_ref and reference not in (pair.new_ref, pair.primary.external_ref):\n",
        "    if False:\n",
    ),
    Mutant("the reference is not moved", "        updates = [body] if body else []\n", "        updates: List[Json] = []\n"),
    Mutant(
        "a refused reference counts as set",
        "                elif error.status != 409:\n                    code =",
        "                elif error.status == 409:\n                    return True\n                elif True:\n                    code =",
    ),
    Mutant(
        "no verification",
        "        missing, status = await self.verifier.wait(checked, expected, self.timer.pause)\n",
        "        missing, status = [], None\n",
    ),
    Mutant("cancelled pairs are not polled", "        for pair in list(self.savepoint.pairs(State.CANCELLED)):\n", "        for pair in []:\n"),
    # Quota, stops
    Mutant("no reserve", "        return RequestOptions(priority, self.shared.reservation, reserve)", "        return RequestOptions(priority, self.shared.reservation, 0)"),
    Mutant("what is reserved is forgotten", "                self._reserved += units - options.reservation.units\n", ""),
    Mutant("what is reserved is never released", "        self._reserved, reservation.units = self._reserved - reservation.units, 0\n", ""),
    Mutant(
        "the server's quota is ignored",
        "return math.inf if self.remaining is None else self.remaining - in_flight",
        "return math.inf",
    ),
    Mutant("lists without end", "if cursor in cursors or stale >= self.STALE_PAGES or empty >= self.EMPTY_PAGES:", "if False:"),
    Mutant("--limit is ignored", "        if size <= limit:  # 0 where an earlier run has requested all of them\n", "        if True:\n"),
    Mutant("--email is ignored", "    plan.groups = [group for group in plan.groups if group.email in wanted]\n", ""),
    # Undo
    Mutant(
        "undo: the primary's old reference is set before that is saved",
        '        pair.state, pair.code, pair.error = State.UNDOING, "", ""\n        await self.savepoint.save(pair)\n',
        '        pair.state, pair.code, pair.error = State.UNDOING, "", ""\n',
    ),
    Mutant(
        'undo: a contact is created before that is saved',
        '            await self.savepoint.save(pair)\n            try:\n                user = await self.api.create_contact(',
        '            try:\n                user = await self.api.create_contact(',
    ),
    Mutant(
        'undo: the primary keeps the reference',
        '                if undo.reference_free and has_moved:\n',
        '                if False:\n',
        "DevRev then refuses the contact, as it may; test_undo.py sees it",
    ),
    Mutant("undo: an interruption leaves the reference on no contact", "        with self.context.cancel_token.shield():\n", "        if True:\n"),
    Mutant(
        'undo: no way back',
        '                        await self._return_reference(problem)\n',
        '',
    ),
    Mutant(
        "undo: the primary leaves what is its own",
        "[primary, contact] if obj and (obj[\"id\"], role) in stays else [contact]",
        "[contact]",
    ),
    Mutant("undo: everyone else leaves", "people[at : at + 1] = [", "people[:] = ["),
    Mutant(
        "undo: a second one starts again",
        "        if pair.undo and pair.state is State.UNDOING:\n            self.undo = pair.undo",
        "        if False:\n            self.undo = pair.undo",
    ),
    Mutant("undo: the end is not saved", 'State.UNDONE, "", ""\n        await self.savepoint.save(pair)\n', 'State.UNDONE, "", ""\n'),
    Mutant("undo: a merge run does not wait for its end", "for one in sorted(ids) if one in undoing), None)", "for one in () if one in undoing), None)"),
]  # fmt: skip


class Fate(NamedTuple):
    """What happened to a mutant: the seed that broke, and the invariant."""

    mutant: Mutant
    seed: Optional[int]
    invariant: str
    played: int


def hunt(mutant: Mutant, most: int) -> Fate:
    """Play scenarios of a mutant until one breaks an invariant that the module itself keeps."""
    text = MODULE.read_text(encoding="utf-8")
    if mutant.old not in text:
        return Fate(mutant, None, "its line is not in the module any more", -1)
    return hunt_in(mutant, text.replace(mutant.old, mutant.new, 1), most)


def hunt_in(mutant: Mutant, text: str, most: int) -> Fate:
    module = load(text, "merge_contacts_mutant")
    seeds = [*range(START, START + most), *kept_seeds()]
    for number, seed in enumerate(seeds, 1):
        verdict = play(seed, module)
        if verdict.invariant and not play(seed, load()).invariant:
            return Fate(mutant, seed, f"{verdict.invariant}: {verdict.what}", number)
    return Fate(mutant, None, "", len(seeds))


def table(jobs: int, wanted: str = "", most: int = SEEDS) -> int:
    """Print a line a mutant; return 1 where one survives that may not."""
    begun, alive = time.monotonic(), []  # type: float, List[str]
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.name]
    if not chosen:
        print(f"no mutant has «{wanted}» in its name")
        return 1
    with multiprocessing.Pool(jobs, maxtasksperchild=1) as pool:
        for fate in pool.imap(functools.partial(hunt, most=most), chosen, chunksize=1):
            print(line_of(fate), flush=True)
            if fate.seed is None and (fate.played < 0 or not fate.mutant.covered):
                alive.append(fate.mutant.name)
    print(
        f"{len(chosen)} mutants, {len(alive)} alive that may not be, in {time.monotonic() - begun:.0f} s"
    )
    return 1 if alive else 0


def line_of(fate: Fate) -> str:
    if fate.seed is not None:
        outcome = f"seed {fate.seed} ({fate.played}): {fate.invariant[:110]}"
    elif fate.played < 0:
        outcome = f"CAN'T BE MADE: {fate.invariant}"
    else:
        covered = f"survives, because: {fate.mutant.covered}"
        outcome = covered if fate.mutant.covered else f"ALIVE after {fate.played} scenarios"
    return f"{fate.mutant.name:58} {outcome}"


# --------------------------------------------------------------------------------------------------
# Lines that are drawn
# --------------------------------------------------------------------------------------------------

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
    """Make the mutant without these lines; `old` and `new` are the complete text, because a line may occur twice."""
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
    return Mutant(f"{first}: {line.strip()[:90]}", "".join(lines), text)


def hunt_drawn(mutant: Mutant, most: int) -> Fate:
    return hunt_in(mutant, mutant.new, most)


def random_table(number: int, seed: int, jobs: int, most: int) -> int:
    """Draw lines of the merge core, take each out, and count how many scenarios notice; 1 where it is under six of ten."""
    lines = drawn_lines(MODULE.read_text(encoding="utf-8"))
    chosen = random.Random(seed).sample(lines, min(number, len(lines)))
    caught = 0
    with multiprocessing.Pool(jobs, maxtasksperchild=1) as pool:
        for fate in pool.imap(functools.partial(hunt_drawn, most=most), chosen, chunksize=1):
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
