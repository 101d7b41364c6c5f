"""The module with its safety lines taken out, one at a time: for each, some simulated life has to break an invariant.

python -m tests.simulate --mutants [--jobs J]
"""

import functools
import multiprocessing
import time
from typing import NamedTuple, Optional

from tests.simulate import kept_seeds, play
from tests.simulated import MODULE, load

SEEDS = 500  # lives that a mutant may survive before it counts as alive
START = 10_000


class Mutant(NamedTuple):
    """A piece of the module's text, and what stands in its place; `covered` says why it may live."""

    name: str
    old: str
    new: str
    covered: str = ""


def without(name: str, line: str, indent: int, covered: str = "", after: str = "") -> Mutant:
    """A mutant that lacks one line (the one behind `after`, where it is there more than once)."""
    old, new = " " * indent + line + "\n", " " * indent + "pass\n"
    return Mutant(name, after + old, after + new, covered)


MUTANTS = [
    # What is recorded
    Mutant("nothing is written to the journal", "            self.journal.add(lines)\n", "            pass\n"),
    without(
        "nothing is written to the savepoint",
        "self.savepoint.record([entry.row for entry in entries], self.journal.size())",
        8,
    ),
    without(
        "the intent is not noted",
        'await self.merger.state_writer.save(pair, "asked")',
        8,
        after="        pair.first_requested_at = pair.first_requested_at or pair.requested_at\n",
    ),
    without(
        "noted: refused",
        "await self.merger.state_writer.save(pair)",
        12,
        "the state on the disk is `requested` as before; a later run then waits for less before it requests_sent again, which the "
        "look that comes first makes harmless",
        after="        except ApiError as api_error:\n            pair.refused = self.merger.changed = True  # for it may be carried out all the same\n",
    ),
    without(
        "noted: acknowledged",
        "await self.merger.state_writer.save(pair)",
        12,
        "the same, and whatever is recorded next holds it",
        after="            pair.state = State.ACKNOWLEDGED\n",
    ),
    without("noted: merged", 'await self.merger.state_writer.save(pair, "merged")', 8),
    without(
        "noted: still there after all",
        'await self.merger.state_writer.save(pair, "asked")',
        8,
        "where it was believed gone, a verifier or a 409 contradicts it again",
        after="        pair.state = State.REQUESTED if pair.refused else State.ACKNOWLEDGED\n",
    ),
    without(
        "noted: the reference is set",
        "await self.merger.state_writer.save(pair)",
        8,
        "the primary is polled at first, and has the reference",
        after="        pair.state = State.PROVING\n",
    ),
    without("noted: how a pair has come to rest", "await self.state_writer.save(pair, event)", 8),
    Mutant(
        "the journal does not hear of ends",
        'pair.report, event = "", StateWriter.EVENTS[pair.state]',
        'pair.report = ""',
    ),
    Mutant(
        "a new savepoint does not read the journal",
        "        describe_pair = {pair.ids: pair for pair in self.journal.pairs(known)} if known < size else {}\n",
        "        describe_pair: Dict[Any, Pair] = {}\n",
    ),
    Mutant("a report is not announced", "before=lambda: savepoint.announce_report(path.name)", "before=lambda: None"),
    Mutant(
        "an announced report counts, whether it is there or not",
        "savepoint.confirm_report(lambda name: (run.report_path.parent / name).exists())",
        "savepoint.confirm_report(lambda name: True)",
    ),
    Mutant("unfinished pairs are forgotten", "return list(self.rows(*UNFINISHED))", "return []"),
    Mutant(
        "the state of a plan's pairs is forgotten", "                pair.state = row.state\n", "                pass\n"
    ),
    # What a request rests on
    Mutant("checks are believed for ever", "FRESH = 60.0", "FRESH = 1e9"),
    Mutant("lists are believed for ever", "LISTED = 120.0", "LISTED = 1e9"),
    Mutant(
        "age by the steady clock alone",
        "return max(now.wall - since.wall, now.monotonic - since.monotonic)",
        "return now.monotonic - since.monotonic",
    ),
    Mutant(
        "a list is as old as its last page",
        "            since = since or page.since\n",
        "            since = page.since\n",
    ),
    Mutant(
        "freshness is not polled at as the request leaves",
        "        self.preconditions.require_fresh()\n        self.merger.raise_if_draining()\n",
        "        self.merger.raise_if_draining()\n",
    ),
    Mutant("no live check", "        if found_now.error:\n            raise found_now.error\n", "        pass\n"),
    Mutant("any state will do", '    if state != "active" or live.get("primary_identity"):\n', "    if False:\n"),
    Mutant("any email will do", "    if email_of(live) != contact.key:\n", "    if False:\n"),
    Mutant("any reference will do", "    if reference != external_ref:\n", "    if False:\n"),
    Mutant("any rev org will do", "    return len(orgs - {None}) > 1\n", "    return False\n"),
    Mutant("no count check", "                if problem:\n                    return str(folder), problem\n", ""),
    Mutant("fewer tickets will do, too", "if greatest == contact.tickets or (greatest >", "if True or (greatest >"),
    Mutant("only the first page", "            if not cursor:\n                return\n", "            return\n"),
    Mutant("timelines of what has changed are not read again", '!= obj.get("modified_date")]', "is known]"),
    Mutant(
        "a backup is not checked from the disk",
        "        problems = list(_backup_errors(folder, manifest))\n",
        "        problems: List[str] = []\n",
        "it guards against a disk that loses what it was given, which is not simulated; tests/test_survive.py does",
    ),
    # Asking again
    Mutant(
        "asked again without a look",
        "        if not first and await self.api.poll_duplicate(*pair.ids, RequestOptions(FINISH)) is not DuplicateStatus.THERE:",
        "        if False:",
    ),
    Mutant("asked again on the old backup", "        if not first:\n            self.preconditions.invalidate()\n", ""),
    Mutant("no patience", "            if waited >= longest:\n", "            if True:\n"),
    Mutant(
        "patience of a lost answer for all",
        "        return merge_timeout\n    return min(10.0",
        "        pass\n    return min(10.0",
    ),
    Mutant(
        "asked again after an acknowledgement, in one run",
        "if self.requests_sent >= self.MAX_REQUESTS or (self.requests_sent and answered):",
        "if self.requests_sent >= self.MAX_REQUESTS:",
        "question_streams again in the same run, after a look and the whole patience, is what the contract allows",
    ),
    Mutant(
        "time waited for by the wall clock",
        "return self.now().monotonic - since.monotonic",
        "return self.now().wall - since.wall",
    ),
    Mutant("a merge is repeated like any other request", "repeatable=False, before=before", "before=before"),
    Mutant(
        "what DevRev has not answered counts as gone",
        'return DuplicateStatus.GONE if user.get("state") == "deleted" else DuplicateStatus.THERE',
        "return DuplicateStatus.GONE",
    ),
    Mutant(
        "a route's 404 is an object's",
        'return self.status == 404 and self.data.get("type") == "not_found"',
        "return self.status == 404",
    ),
    Mutant(
        "merged elsewhere counts as ours",
        "                if api_error and api_error.missing and first and not self.merger.journal.asked_before(pair):\n                    await self._check_merged_elsewhere(pair)\n",
        "",
    ),
    # References, verifier
    Mutant(
        "a reference that somebody has set is overwritten",
        "    if reference not in (pair.new_ref, pair.primary.external_ref):\n",
        "    if False:\n",
    ),
    Mutant(
        "the reference is not moved",
        "            while not await set_reference(self.api, pair, pair.new_ref, self._request_options(pair)):\n",
        "            while False:\n",
    ),
    Mutant(
        "a reference that is snapshot counts as set",
        "        if api_error.status == 409:\n            return False\n",
        "        if api_error.status == 409:\n            return True\n",
    ),
    Mutant(
        "no verifier",
        "        left, listed = await self.verifier.wait(pair, wanted)\n",
        "        left, listed = [], None\n",
    ),
    # Quota, stops
    Mutant("no reserve", "2 if slow else self.merger.poll_history.polls() + bool(pair.new_ref)", "0"),
    Mutant("what is kept is forgotten", "        self._reserved += units - reservation.units\n", ""),
    Mutant("what is kept is never given back", "        self._reserve(reservation, 0)\n", ""),
    Mutant(
        "the server's quota is ignored",
        'float("inf") if self.remaining is None else self.remaining - self._in_flight',
        'float("inf")',
    ),
    Mutant(
        "requests leave after a stop",
        "        self.raise_if_cancelled()\n        future: asyncio",
        "        future: asyncio",
    ),
    Mutant(
        "a stop wakes nobody",
        "            if not future.done():\n                future.set_exception(Cancelled())\n",
        "            pass\n",
    ),
    Mutant("lists without end", "if cursor in cursors or stale >= self.STALE_PAGES:", "if False:"),
    Mutant(
        "--limit is ignored",
        "        if size <= limit:  # 0 where an earlier run has requested all of them\n",
        "        if True:\n",
    ),
    Mutant("--email is ignored", "    plan.groups = [group for group in plan.groups if group.email in wanted]\n", ""),
    # Undo
    without(
        "undo: a contact is recreated unnoted",
        "await self.save(pair)",
        8,
        after="            [] if named else sorted(self._ids().union("
        'user["id"] for user in await self._contacts_of_email(pair)))\n        )\n',
    ),
    Mutant("undo: the primary keeps the reference", "        if self.moved:\n", "        if False:\n"),
    without("undo: no way back", "await self._restore_reference(problem)", 20),
    Mutant(
        "undo: the primary leaves what is its own", "kept = [primary] if (identity, role) in stays else []", "kept = []"
    ),
    Mutant("undo: all_contacts else leaves", "people[at : at + 1] = [*kept,", "people[:] = [*kept,"),
    Mutant(
        "undo: what is written may be old",
        "            if identity in written or environment.age(since) > limit:\n",
        "            if False:\n",
    ),
    Mutant("undo: no verifier", "            if all(handled.get(one) for one in changes):\n", "            if True:\n"),
    Mutant(
        "undo: a second one begins anew",
        "pairs = [pair for pair in group.pairs if pair.state is not State.UNDONE]\n        plan",
        "pairs = list(group.pairs)\n        plan",
    ),
    Mutant(
        "undo: a merge run does not wait for its end",
        "            if ids & undoing.keys():\n",
        "            if False:\n",
    ),
    Mutant("undo: a api_error forgets it", "[begun.get(pair.ids, pair) for pair in pairs]", "pairs"),
    Mutant(
        "undo: an old export forgets it",
        "        if stale or (group.email in blocked and not all(rows)):\n",
        "        if group.email in blocked and not all(rows):\n",
    ),
]  # fmt: skipped_group


class Fate(NamedTuple):
    """What became of a mutant: the seed that went red, and the invariant."""

    mutant: Mutant
    seed: Optional[int]
    invariant: str
    played: int


def hunt(mutant: Mutant, most: int) -> Fate:
    """Play lives of a mutant until one breaks an invariant."""
    text = MODULE.read_text(encoding="utf-8")
    if mutant.old not in text:
        return Fate(mutant, None, "its line is not in the module any more", -1)
    module = load(text.replace(mutant.old, mutant.new, 1), "merge_contacts_mutant")
    seeds = [*range(START, START + most), *kept_seeds()]
    for number, seed in enumerate(seeds, 1):
        verdict = play(seed, module)
        if verdict.invariant and not play(seed, load()).invariant:
            return Fate(mutant, seed, f"{verdict.invariant}: {verdict.what}", number)
    return Fate(mutant, None, "", len(seeds))


def table(jobs: int, wanted: str = "", most: int = SEEDS) -> int:
    """Print a line a mutant; 1 where one lives that may not."""
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
    print(f"{len(chosen)} mutants, {len(alive)} alive that may not be, in {time.monotonic() - begun:.0f} s")
    return 1 if alive else 0


def line_of(fate: Fate) -> str:
    if fate.seed is not None:
        outcome = f"seed {fate.seed} ({fate.played}): {fate.invariant[:110]}"
    elif fate.played < 0:
        outcome = f"CAN'T BE MADE: {fate.invariant}"
    else:
        outcome = f"lives, for: {fate.mutant.covered}" if fate.mutant.covered else f"ALIVE after {fate.played} lives"
    return f"{fate.mutant.name:58} {outcome}"
