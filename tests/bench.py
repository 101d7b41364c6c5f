"""What a run costs, each figure beside a yardstick that was measured in the same run.

    python -m tests.bench                          everything, a minute
    python -m tests.bench --only latency           one part (may be repeated)
    python -m tests.bench --only csv --rows 100000 a smaller CSV

It prints a table in Markdown. Seconds say more about a machine than about a program, so the figures
are ratios; where other work can spoil a figure, the best of a few rounds counts. A missed target is
marked and does not change the exit code.

requests    DevRev's quota is the scarce thing. Counted are the requests a pair besides the
            timelines, which cost one request a ticket and conversation whatever the client does.
            The yardstick is a client that asks for one contact, one list at a time: three reads of
            contacts, four lists of each and three to verify the merge, the merge, the reference.
quota       The last of n requests can't leave before ceil(n / limit) - 1 windows are over: that is
            the floor for the time of the whole process. A 429 was sent for nothing.
latency     n requests of one latency each over w workers can't take less than n * latency / w.
            Starting Python and one merge's delay are subtracted.
csv         `--preview` of a big export against pandas, which counts the two kinds of references
            per email: the least that any detection has to do. The targets are for a million rows.
start       What `--help` and the preview of two rows take, against a Python that does nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from tests.sandbox import Organisation, Sandbox
from tests.support import COLUMNS, SCRIPT, Workplace, pair

WORKERS = 8  # the tool's default
TIMELINES = "timeline-entries.list"
PYTHON = sys.executable


class Figure(NamedTuple):
    """One line of the main table; `target` is empty where nothing was promised."""

    name: str
    measured: str
    yardstick: str = ""
    ratio: str = ""
    target: str = ""
    met: str = ""


def at_most(
    name: str, value: float, limit: float, measured: str, yardstick: str = "", form: str = "{:.2f}x"
) -> Figure:
    met = "met" if value <= limit else "MISSED"
    target = f"<= {form.format(limit)}"
    return Figure(name, measured, yardstick, form.format(value), target, met)


# -- the tool and the yardstick ------------------------------------------------------------------


class Outcome(NamedTuple):
    """One run over an organisation: how long it took, and what the server saw of it."""

    seconds: float
    requests: Mapping[str, int]
    total: int
    connections: int
    over_quota: int


def organisation_of(pairs: int, most: int = 4, least: int = 0) -> Organisation:
    """So many pairs, each contact with a few tickets, each duplicate with a conversation."""
    organisation, chance = Organisation(), random.Random(1)
    for number in range(1, pairs + 1):
        pair(organisation, number, (chance.randint(least, most), chance.randint(least, most)))
    return organisation


def run_tool(organisation: Organisation, **conditions: Any) -> Outcome:
    """Let the tool merge a whole organisation, without a rate limit of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        place.export(organisation)
        with Sandbox(organisation, **conditions) as sandbox:
            begun = time.monotonic()
            place.run(sandbox, "--yes", python=[PYTHON], timeout=1200, check=0)
            seconds = time.monotonic() - begun
    seen = Counter(request.endpoint for request in sandbox.requests)
    assert 2 * len(organisation.merges) == len(organisation.contacts), "not all pairs were merged"
    return Outcome(seconds, seen, sum(seen.values()), sandbox.connections, sandbox.over_quota)


ONE_AT_A_TIME = {  # requests a pair
    "rev-users.get": 3, "works.list": 8, "conversations.list": 3, "rev-users.merge": 1,
    "rev-users.update": 1,
}  # fmt: skip

# -- the parts -----------------------------------------------------------------------------------


def bench_requests(_rows: int) -> Iterator[Figure]:
    pairs = 100
    tool = run_tool(organisation_of(pairs), merge_delay=0.1)
    timelines = tool.requests[TIMELINES] / pairs
    each, others = tool.total / pairs - timelines, sum(ONE_AT_A_TIME.values())
    name = f"requests a pair, besides timelines ({pairs} pairs)"
    yield at_most(name, each, 3.6, f"{each:.2f}", form="{:.2f}")
    fewer = f"{others / each:.1f}x fewer"
    yield Figure("  as the one-at-a-time client", f"{each:.2f}", f"{others:.2f}", fewer)
    for endpoint, count in sorted(tool.requests.items()):
        other = timelines if endpoint == TIMELINES else ONE_AT_A_TIME.get(endpoint, 0)
        yield Figure(f"  {endpoint}", f"{count / pairs:.2f}", f"{other:.2f}")
    yield Figure("  all", f"{each + timelines:.2f}", f"{others + timelines:.2f}")


def bench_quota(_rows: int) -> Iterator[Figure]:
    limit, window = 100, 3.0
    tool = run_tool(organisation_of(90), quota=(limit, window))
    total, refused = tool.total, tool.over_quota
    floor = (math.ceil((total - refused) / limit) - 1) * window
    name = f"time under a quota ({total} requests, {limit} in {window:g} s)"
    yield at_most(name, tool.seconds / floor, 1.15, f"{tool.seconds:.1f} s", f"{floor:.1f} s")
    yield at_most("  answered 429", refused / total, 0.01, f"{refused}", f"{total}", "{:.1%}")


def bench_latency(_rows: int) -> Iterator[Figure]:
    pairs, latency, delay = 60, 0.06, 0.3
    start = least_use([[PYTHON, str(SCRIPT), "--version"]], ".")[0].seconds
    runs = []
    for _ in range(3):
        runs.append(run_tool(organisation_of(pairs, 4, 1), latency=latency, merge_delay=delay))
    tool = min(runs, key=lambda run: run.seconds)
    timelines = tool.requests[TIMELINES]
    busy, floor = tool.seconds - start - delay, tool.total * latency / WORKERS
    what = f"{tool.total} requests of {latency * 1000:.0f} ms, {timelines} timelines"
    name = f"time under latency ({what})"
    yield at_most(name, busy / floor, 1.3, f"{busy:.2f} s", f"{floor:.2f} s")
    slow = latency * timelines + pairs * (latency * sum(ONE_AT_A_TIME.values()) + delay)
    name, faster = "  as the one-at-a-time client", f"{slow / tool.seconds:.1f}x faster"
    yield Figure(name, f"{tool.seconds:.1f} s", f"{slow:.0f} s", faster)
    yield Figure("  connections opened", str(tool.connections), f"{WORKERS} workers")


PANDAS = """
import sys
import pandas
frame = pandas.read_csv(sys.argv[1])
email, reference = frame["EMAIL"].str.strip().str.lower(), frame["EXTERNAL_REF"]
user, system = reference.str.startswith("user_"), reference.str.startswith("REVU-")
found = pandas.DataFrame({"user": user, "system": system}).groupby(email).sum()
print(((found["user"] == 1) & (found["system"] >= 1)).sum())
"""


def bench_csv(rows: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        pairs = write_big_csv(path, rows)
        commands = [[PYTHON, str(SCRIPT), "--csv", str(path), "--preview"]]
        if importlib.util.find_spec("pandas"):
            commands.append([PYTHON, "-c", PANDAS, str(path)])
        tool, *others = least_use(commands, folder, [f"{pairs:,} pairs to merge", str(pairs)])
        size = path.stat().st_size / 1e6
    name, seconds = f"preview of {rows:,} rows ({size:.0f} MB)", f"{tool.seconds:.2f} s"
    for other in others:
        ratio = tool.seconds / other.seconds
        yield at_most(name, ratio, 2.0, seconds, f"{other.seconds:.2f} s")
        ratio = tool.megabytes / max(other.megabytes, 1)
        yield at_most("  peak memory", ratio, 1 / 2, tool.memory, other.memory)
    if not others:
        yield Figure(name, seconds, "no pandas")
        yield Figure("  peak memory", tool.memory, "no pandas")
    yield Figure("  rows a second", f"{rows / tool.seconds:,.0f}")


def bench_start(_rows: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        write_big_csv(path, 2)
        tool = [PYTHON, str(SCRIPT)]
        commands = [[PYTHON, "-c", ""], [*tool, "--help"], [*tool, "--csv", str(path), "--preview"]]
        nothing, *uses = (use.seconds for use in least_use(commands, folder, rounds=5))
    for name, seconds in zip(("--help", "preview of 2 rows"), uses):
        met = "met" if seconds < 0.25 else "MISSED"
        ratio = f"{seconds / nothing:.1f}x"
        yield Figure(name, f"{seconds:.3f} s", f"{nothing:.3f} s", ratio, "< 0.25 s", met)


PARTS = {
    part.__name__[len("bench_") :]: part
    for part in (
        bench_requests, bench_quota, bench_latency, bench_csv, bench_start,
    )
}  # fmt: skip


# -- the big CSV ---------------------------------------------------------------------------------

FIRST = ("Ana", "Ben", "Chloé", "Dmitri", "Elif", "Femi", "Grace", "Hiro", "Inés", "João", "Liam")
LAST = ("Abe", "Brandt", "Costa", "Eze", "Fischer", "García", "Haddad", "Ito", "López", "Müller")


def write_big_csv(path: Path, rows: int) -> int:
    """Write an export of which a tenth are pairs, shuffled; returns the pairs."""
    pairs = max(1, rows // 20)
    numbers = list(range(rows))
    random.Random(1).shuffle(numbers)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(big_row(number, number < 2 * pairs) for number in numbers)
    return pairs


def big_row(number: int, paired: bool) -> tuple[str, ...]:
    """One contact. Numbers 2n and 2n + 1 of the paired are one person, spelt in two ways."""
    person = number // 2 if paired else number
    first, last = FIRST[person % len(FIRST)], LAST[person // len(FIRST) % len(LAST)]
    key, is_user = f"{number * 2654435761 % 2**32:08X}", bool(number % 2)
    email = f"{first}.{last}{person}@example.{('com', 'org')[person % 2]}".lower()
    day = f"0{number % 9 + 1}-{number % 28 + 1:02d}T{number % 24:02d}"
    return (
        f"don:identity:dvrv-us-1:devo/BENCH1:revu/{key}",
        f"{last}, {first}" if number % 10 == 0 else f"{first} {last}",
        email.capitalize() if paired and is_user and number % 3 == 0 else email,
        f"user_{number * 11400714819323198485 % 2**64:016x}" if is_user else f"REVU-{key}",
        f"{first} {last}",
        str(number % 7),
        f"202{number % 5}-{day}:15:00.000Z",
        f"2025-{day}:45:00.000Z",
    )


# -- measuring a process -------------------------------------------------------------------------


class Use(NamedTuple):
    """What a process took. `megabytes` is its peak, 0 where the platform does not tell."""

    seconds: float
    megabytes: float

    @property
    def memory(self) -> str:
        return f"{self.megabytes:.0f} MB" if self.megabytes else "unknown here"


# A child counts the peak of whoever started it as its own, so a small process has to start it.
MEASURE = """
import json, subprocess, sys, time
begun = time.monotonic()
quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
child = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True, **quiet)
seconds, peak = time.monotonic() - begun, 0
if sys.platform != "win32":
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6
last = child.stdout.decode("utf-8", "replace").rstrip().rpartition("\\n")[2]
print(json.dumps([last, seconds, peak]))
"""


def use_of(command: Sequence[str], folder: str, expected: str) -> Use:
    """Run a command once, the last line of whose output begins with what is expected."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEVREV_")}
    environment = {**kept, "PYTHONIOENCODING": "utf-8"}
    start = [PYTHON, "-c", MEASURE, *command]
    last, *used = json.loads(subprocess.check_output(start, cwd=folder, env=environment))
    assert last.startswith(expected), f"{command[1:4]} ended with {last!r}"
    return Use(*used)


def least_use(
    commands: Sequence[Sequence[str]], folder: str, expected: Sequence[str] = (), rounds: int = 3
) -> list[Use]:
    """The least that each command takes; they take turns, so that a busy machine hits all alike."""
    uses: list[list[Use]] = [[] for _ in commands]
    for _ in range(rounds):
        for found, command, line in zip(uses, commands, expected or [""] * len(commands)):
            found.append(use_of(command, folder, line))
    return [Use(*map(min, zip(*found))) for found in uses]


# -- showing it ----------------------------------------------------------------------------------

HEAD = Figure("what", "measured", "yardstick", "ratio", "target")


def shown(figures: Sequence[Figure]) -> str:
    widths = [max(map(len, column)) for column in zip(HEAD, *figures)]
    rows = [HEAD, ["-" * width for width in widths], *figures]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="What a run costs.")
    only = "this part alone (may be repeated)"
    parser.add_argument("--only", action="append", choices=PARTS, help=only)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the big CSV")
    options = parser.parse_args()
    figures: list[Figure] = []
    for name in options.only or PARTS:
        print(f"  {name} ...", file=sys.stderr, flush=True)
        figures += PARTS[name](options.rows)
    print(shown(figures))


if __name__ == "__main__":
    main()
