"""What a run costs, each figure beside a yardstick that was measured in the same run.

    python -m tests.bench                          everything, some two minutes
    python -m tests.bench --only latency           one part (may be repeated)
    python -m tests.bench --only csv --rows 100000 a smaller CSV
    python -m tests.bench --markdown               tables for the README

Seconds say more about a machine than about a program, so the figures are ratios. Where other work on the machine can
spoil a figure, the best of a few rounds counts. A bench informs: a missed target is marked and
does not change the exit code.

requests    DevRev's quota is the scarce thing, and each request is one unit of it. Counted are the requests a pair
            besides the timelines, which cost one request a ticket and conversation whatever the client does. The
            yardstick is a client that works the way the API's reference reads: one contact, one list at a time.
quota       The server grants so many requests a window. The last of n requests can't leave before ceil(n / limit) - 1
            windows are over, counted from the first: that is the floor, beside which stands the whole process's time.
            A request answered 429 was sent for nothing.
latency     With nothing in short supply but time, n requests of one latency each over w workers can't take less than
            n * latency / w. Starting Python and one merge's delay are subtracted, since no order of requests saves
            them.
gap         Between DevRev's merge and the new reference the customer's application has no contact for it. The yardstick is
            the window of the quota, or of the client-side rate limit: what a request may have to wait for.
cpu         Processor time a request, of the whole process. The yardstick is a loop that sends as many requests of the
            same kind with `requests`, parses the answers, and does nothing else.
csv         `--preview` of a big export against pandas, which reads the same file and counts the two kinds of
            references per email: the least that any detection has to do. Time and peak memory of the whole process.
            The targets are for a million rows and more: below that, starting either is what counts.
export      What `--export` costs, of an organisation in which a tenth of the contacts have an email that recurs.
start       What `--help` and the preview of two rows take, against a Python that does nothing.
projection  What the measured requests a pair come to for many pairs, and the hours that a quota gives them.
"""

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
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import requests

from tests.sandbox import Organisation, Sandbox
from tests.support import COLUMNS, SCRIPT, Workplace, pair

WORKERS = 8  # the tool's default
TIMELINES = "timeline-entries.list"


class Figure(NamedTuple):
    """One line of the table. `met` is None where nothing was promised."""

    name: str
    measured: str
    yardstick: str = ""
    ratio: str = ""
    target: str = ""
    met: Optional[bool] = None


class Table(NamedTuple):
    """Rows of text under a title; what has to be said about them stands below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Cost(NamedTuple):
    """What a pair costs, in requests, and how many tickets and conversations it has."""

    requests: float
    timelines: float
    tickets: float
    conversations: float


class Findings:
    """What the parts of the bench have found so far."""

    def __init__(self) -> None:
        self.figures: List[Figure] = []
        self.tables: List[Table] = []

    def add(self, *figures: Figure) -> None:
        """Add lines to the main table."""
        self.figures.extend(figures)

    def all_tables(self) -> List[Table]:
        """The main table, then those with the details."""
        head = ("what", "measured", "yardstick", "ratio", "target", "")
        rows = [
            (*figure[:5], {True: "met", False: "MISSED", None: ""}[figure.met])
            for figure in self.figures
        ]
        return [Table("Bench", head, rows), *self.tables]


def at_most(
    name: str, value: float, limit: float, measured: str, yardstick: str = "", unit: str = "x"
) -> Figure:
    """A figure that is promised to be no more than `limit`."""
    scale = 100 if unit == "%" else 1
    said = f"{value * scale:.2f} {unit}".replace(" x", "x").strip()
    return Figure(name, measured, yardstick, said, f"<= {limit * scale:.3g}{unit}", value <= limit)


# -- running the tool and the yardstick --------------------------------------------------------------


class Outcome(NamedTuple):
    """One run over an organisation: how long it took, and what the server saw of it."""

    seconds: float
    requests: Dict[str, int]
    connections: int
    over_quota: int

    @property
    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())

    @property
    def besides_timelines(self) -> int:
        """All requests but those that fetch the comments of one ticket or conversation."""
        return self.total - self.requests.get(TIMELINES, 0)


def organisation_of(pairs: int, tickets: Tuple[int, int], seed: int) -> Organisation:
    """So many pairs; each contact has a number of tickets between the two, each duplicate a conversation."""
    organisation, chance = Organisation(), random.Random(seed)
    for number in range(1, pairs + 1):
        pair(organisation, number, (chance.randint(*tickets), chance.randint(*tickets)))
    return organisation


def run_tool(
    organisation: Organisation, environment: Optional[Dict[str, str]] = None, **conditions: Any
) -> Outcome:
    """Let the tool merge a whole organisation, with its defaults but for its own ceiling, of which there is none."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder), forks=False)
        place.export(organisation)
        with Sandbox(organisation, **conditions) as sandbox:
            begun = time.monotonic()
            place.run(sandbox, "--yes", timeout=1200, check=0, **(environment or {}))
            return outcome(sandbox, begun)


def run_yardstick(organisation: Organisation, **conditions: Any) -> Outcome:
    """Let the one-contact-at-a-time client merge the same."""
    pairs = pairs_of(organisation)
    with Sandbox(organisation, **conditions) as sandbox:
        begun = time.monotonic()
        with requests.Session() as session:
            client = OneAtATime(sandbox, session)
            for primary, duplicate in pairs:
                client.merge(primary, duplicate)
        return outcome(sandbox, begun)


def outcome(sandbox: Sandbox, begun: float) -> Outcome:
    """Sum a run up; RuntimeError where it has not merged everybody."""
    seconds = time.monotonic() - begun
    organisation = sandbox.organisation
    if 2 * len(organisation.merges) != len(organisation.contacts):
        raise RuntimeError(
            f"only {len(organisation.merges)} pairs of {len(organisation.contacts) // 2} were merged"
        )
    seen = Counter(request.endpoint for request in sandbox.requests)
    return Outcome(seconds, dict(seen), sandbox.connections, sandbox.over_quota)


def pairs_of(organisation: Organisation) -> List[Tuple[str, str]]:
    """Primary and duplicate of each email."""
    by_email: Dict[str, List[str]] = {}
    for identity, contact in organisation.contacts.items():
        by_email.setdefault(contact["email"], []).append(identity)
    return [(primary, duplicate) for primary, duplicate in by_email.values()]


class OneAtATime:
    """The straightforward client: correct, on one kept-alive connection, and a request for every question.

    It writes nothing to the disk and is told how long merges take, so it looks once: no real client is that lucky.
    """

    def __init__(self, sandbox: Sandbox, session: requests.Session) -> None:
        self.sandbox = sandbox
        self.session = session
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {sandbox.token}"

    def merge(self, primary: str, duplicate: str) -> None:
        """Back both contacts up, merge, look, move the reference, prove."""
        self.back_up(primary)
        kept = self.back_up(duplicate)
        self.call("rev-users.merge", primary_user=primary, secondary_user=duplicate)
        while True:
            time.sleep(self.sandbox.merge_delay + 0.01)
            if self.call("rev-users.get", id=duplicate) is None:
                break
        self.call("rev-users.update", id=primary, external_ref=kept["external_ref"])
        self.prove(primary, kept)

    def back_up(self, contact: str) -> Dict[str, Any]:
        """Fetch everything of one contact: itself, three lists of works, its conversations, each timeline."""
        user = (self.call("rev-users.get", id=contact) or {})["rev_user"]
        works = {
            role: self.works(role, contact) for role in ("owned_by", "created_by", "reported_by")
        }
        talks = self.conversations(contact)
        for one in set(talks).union(*works.values()):
            self.pages(TIMELINES, "timeline_entries", object=one)
        return {"external_ref": user["external_ref"], "members": talks, **works}

    def prove(self, primary: str, kept: Dict[str, Any]) -> None:
        """Look whether what the duplicate had is on the primary."""
        for role in ("owned_by", "reported_by"):
            assert set(kept[role]) <= set(self.works(role, primary))
        assert set(kept["members"]) <= set(self.conversations(primary))

    def works(self, role: str, contact: str) -> List[str]:
        """Ids of the works that a contact has in a role."""
        return self.pages("works.list", "works", type=["ticket", "issue"], **{role: [contact]})

    def conversations(self, contact: str) -> List[str]:
        """Ids of the conversations of a contact."""
        return self.pages("conversations.list", "conversations", members=[contact])

    def pages(self, endpoint: str, key: str, **body: Any) -> List[str]:
        """Ids of all items of a list."""
        found: List[str] = []
        while True:
            answer = self.call(endpoint, **body) or {}
            found.extend(item["id"] for item in answer[key])
            if not answer.get("next_cursor"):
                return found
            body["cursor"] = answer["next_cursor"]

    def call(self, endpoint: str, **body: Any) -> Optional[Dict[str, Any]]:
        """The answer; None where there is no such object (any more)."""
        answer = self.session.post(f"{self.sandbox.url}/{endpoint}", json=body, timeout=30)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        found: Dict[str, Any] = answer.json()
        return found


# -- the parts ---------------------------------------------------------------------------------------


def bench_requests(options: argparse.Namespace, findings: Findings) -> None:
    """How many requests a pair costs."""
    pairs, tickets = 100, (0, 4)
    organisation = organisation_of(pairs, tickets, options.seed)
    works, talks = len(organisation.works) / pairs, len(organisation.conversations) / pairs
    tool = run_tool(organisation, merge_delay=0.1)
    other = run_yardstick(organisation_of(pairs, tickets, options.seed), merge_delay=0.1)
    each, others = tool.besides_timelines / pairs, other.besides_timelines / pairs
    findings.add(
        at_most(
            f"requests a pair, besides timelines ({pairs} pairs)", each, 3.6, f"{each:.2f}", unit=""
        ),
        Figure(
            "  as the one-at-a-time client",
            f"{each:.2f}",
            f"{others:.2f}",
            f"{others / each:.1f}x fewer",
        ),
    )
    findings.tables.append(by_endpoint(tool, other, pairs))
    timelines = tool.requests.get(TIMELINES, 0) / pairs
    findings.tables.append(projection(Cost(each, timelines, works, talks)))


def by_endpoint(tool: Outcome, other: Outcome, pairs: int) -> Table:
    """Requests a pair of both clients, endpoint by endpoint."""
    endpoints = sorted(
        {*tool.requests, *other.requests}, key=lambda name: (name == TIMELINES, name)
    )
    rows = [
        [name, *(f"{run.requests.get(name, 0) / pairs:.2f}" for run in (tool, other))]
        for name in endpoints
    ]
    rows.append(["all", f"{tool.total / pairs:.2f}", f"{other.total / pairs:.2f}"])
    return Table(
        "Requests a pair, by endpoint", ("endpoint", "merge_contacts", "one at a time"), rows
    )


def bench_quota(options: argparse.Namespace, findings: Findings) -> None:
    """How much of a server's quota is used, and how much is asked for in vain."""
    limit, window = 100, 3.0
    tool = run_tool(organisation_of(90, (0, 4), options.seed), quota=(limit, window))
    granted = tool.total - tool.over_quota
    floor = (math.ceil(granted / limit) - 1) * window
    findings.add(
        at_most(
            f"time under a quota ({tool.total} requests, {limit} in {window:g} s)",
            tool.seconds / floor, 1.15, f"{tool.seconds:.1f} s", f"{floor:.1f} s",
        ),
        at_most("  answered 429", tool.over_quota / tool.total, 0.01, f"{tool.over_quota}", f"{tool.total}", "%"),
    )  # fmt: skip


def bench_gap(options: argparse.Namespace, findings: Findings) -> None:
    """How long a reference is on nobody."""
    limit, window = 60, 6.0
    ceiling = {"DEVREV_RATE_LIMIT_CALLS": f"{limit}", "DEVREV_RATE_LIMIT_PERIOD": f"{window:g}"}
    cases: Dict[str, Dict[str, Any]] = {
        f"a quota of {limit} in {window:g} s": {"quota": (limit, window)},
        f"a ceiling of {limit} in {window:g} s": {"environment": ceiling},
        "neither": {},
        "that ceiling, merges of 2 s": {"environment": ceiling, "merge_delay": 2.0},
    }
    for name, conditions in cases.items():
        organisation = organisation_of(40, (0, 4), options.seed)
        run_tool(organisation, latency=0.02, **conditions)
        gaps = sorted(
            organisation.reference_times[primary][-1][0] - organisation.merge_times[duplicate]
            for primary, duplicate in organisation.merges
        )
        median, worst = gaps[len(gaps) // 2], gaps[-1]
        findings.add(
            Figure(
                f"reference gap under {name}, median",
                f"{median:.2f} s",
                f"{window:g} s",
                f"{median / window:.2f}x",
            ),
            at_most("  worst", worst / window, 1 / window, f"{worst:.2f} s", f"{window:g} s"),
        )


LOOP = """
import json, sys, requests
url, token, count = sys.argv[1:]
session = requests.Session()
for _ in range(int(count)):
    answer = session.post(url + "/timeline-entries.list", json={"object": OBJECT, "limit": 100},
                          headers={"Authorization": "Bearer " + token}, timeout=30)
    json.loads(answer.content)
"""


def bench_cpu(options: argparse.Namespace, findings: Findings) -> None:
    """What a request costs the processor."""
    if os.name == "nt":
        return
    import resource

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begun = spent()
    tool = run_tool(organisation_of(200, (0, 4), options.seed))
    each = (spent() - begun) / tool.total
    organisation = organisation_of(1, (1, 1), options.seed)
    script = LOOP.replace("OBJECT", repr(next(iter(organisation.works))))
    with Sandbox(organisation) as sandbox:
        begun = spent()
        subprocess.check_call(
            [sys.executable, "-c", script, sandbox.url, sandbox.token, str(tool.total)]
        )
    loop = (spent() - begun) / tool.total
    what = f"processor time a request ({tool.total} requests)"
    findings.add(at_most(what, each / loop, 2.0, f"{each * 1000:.2f} ms", f"{loop * 1000:.2f} ms"))


def bench_latency(options: argparse.Namespace, findings: Findings) -> None:
    """How well the workers are kept busy."""
    pairs, few, tickets = 60, 4, (1, 4)
    conditions = {"latency": 0.06, "merge_delay": 0.3}
    start = fastest([[sys.executable, str(SCRIPT), "--version"]], rounds=3)[0]
    runs = [run_tool(organisation_of(pairs, tickets, options.seed), **conditions) for _ in range(3)]
    tool = min(runs, key=lambda run: run.seconds)
    other = run_yardstick(organisation_of(few, tickets, options.seed), **conditions)
    busy = tool.seconds - start - conditions["merge_delay"]
    floor = tool.total * conditions["latency"] / WORKERS
    slow = other.seconds / few * pairs
    what = f"{tool.total} requests of {conditions['latency'] * 1000:.0f} ms, {tool.requests[TIMELINES]} timelines"
    findings.add(
        at_most(
            f"time under latency ({what})", busy / floor, 1.3, f"{busy:.2f} s", f"{floor:.2f} s"
        ),
        Figure(
            "  as the one-at-a-time client",
            f"{tool.seconds:.1f} s",
            f"{slow:.0f} s",
            f"{slow / tool.seconds:.1f}x faster",
        ),
        Figure("  connections opened", str(tool.connections), f"{WORKERS} workers"),
    )


def bench_csv(options: argparse.Namespace, findings: Findings) -> None:
    """What reading and detecting costs for a big export."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        progress(f"writing {options.rows:,} rows")
        pairs = write_big_csv(path, options.rows, options.seed)
        preview = [sys.executable, str(SCRIPT), "--csv", str(path), "--preview"]
        commands = [preview]
        if importlib.util.find_spec("pandas"):
            commands.append([sys.executable, "-c", PANDAS, str(path)])
        uses = least_use(commands, folder, [f"{pairs:,} pairs to merge", str(pairs)])
        size = path.stat().st_size / 1e6
    findings.add(*csv_figures(options.rows, size, uses))


def csv_figures(rows: int, size: float, uses: "Sequence[Use]") -> List[Figure]:
    """Time and memory of the preview (first of `uses`), beside those of pandas where it is there."""
    tool = uses[0]
    what, seconds = f"preview of {rows:,} rows ({size:.0f} MB)", f"{tool.seconds:.2f} s"
    memory = f"{tool.megabytes:.0f} MB" if tool.megabytes else "unknown here"
    pace = Figure("  rows a second", f"{rows / tool.seconds:,.0f}")
    if len(uses) == 1:
        none = "no pandas"
        return [Figure(what, seconds, none), pace, Figure("  peak memory", memory, none)]
    other = uses[1]
    figures = [
        at_most(what, tool.seconds / other.seconds, 2.0, seconds, f"{other.seconds:.2f} s"),
        pace,
    ]
    if tool.megabytes and other.megabytes:
        ratio = tool.megabytes / other.megabytes
        figures.append(at_most("  peak memory", ratio, 1 / 2, memory, f"{other.megabytes:.0f} MB"))
    return (
        figures
        if rows >= 1_000_000
        else [figure._replace(target="", met=None) for figure in figures]
    )


def bench_export(options: argparse.Namespace, findings: Findings) -> None:
    """What the CSV costs when DevRev itself is read for it, and what that comes to for many contacts."""
    pairs, contacts = 500, 10_000
    organisation = organisation_of(pairs, (0, 4), options.seed)
    for number in range(contacts - 2 * pairs):
        organisation.add_contact(f"S{number}", f"single{number}@example.org")
    with tempfile.TemporaryDirectory() as folder, Sandbox(organisation) as sandbox:
        environment = dict(sandbox.environment(), DEVREV_RATE_LIMIT_CALLS="0")
        command = [sys.executable, str(SCRIPT), "--export", "contacts.csv"]
        use = use_of(command, folder, "cost", environment)
        seen = Counter(request.endpoint for request in sandbox.requests)
    each = seen["works.list"] / (2 * pairs) * 100
    memory = f"{use.megabytes:.0f} MB" if use.megabytes else "unknown here"
    findings.add(
        at_most(
            f"list calls for 100 of the contacts whose email recurs ({2 * pairs:,} of {contacts:,})",
            each, 10, f"{each:.1f}", unit="",
        ),
        Figure(f"  for the list of all {contacts:,} contacts", str(seen["rev-users.list"]), str(contacts // 100)),
        Figure("  peak memory", memory),
    )  # fmt: skip
    findings.tables.append(export_projection(each))


def export_projection(each: float) -> Table:
    """What an export comes to, from what a hundred contacts of recurring emails were measured to cost."""
    rows = []
    for contacts in (10_000, 100_000):
        for share in (0.1, 0.5):
            units = contacts / 100 + contacts * share / 100 * each
            hours = (units / 1_000 * 300 / 3600, units / 5_000 * 60 / 3600)
            rows.append(
                [f"{contacts:,}", f"{share:.0%}", f"{units:,.0f}", *map("{:,.2f}".format, hours)]
            )
    return Table(
        "Projection of an export",
        ("contacts", "email recurs", "units", "hours at 1,000 in 5 min", "hours at 5,000 a min"),
        rows,
    )


def bench_start(options: argparse.Namespace, findings: Findings) -> None:
    """What calling the tool costs before it does anything."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        write_big_csv(path, 2, options.seed)
        tool = [sys.executable, str(SCRIPT)]
        commands = [
            [sys.executable, "-c", "pass"],
            [*tool, "--help"],
            [*tool, "--csv", str(path), "--preview"],
        ]
        nothing, *times = fastest(commands, 5, folder)
    for name, seconds in zip(("--help", "preview of 2 rows"), times):
        ratio = f"{seconds / nothing:.1f}x"
        findings.add(
            Figure(name, f"{seconds:.3f} s", f"{nothing:.3f} s", ratio, "< 0.25 s", seconds < 0.25)
        )


PARTS: Dict[str, Callable[[argparse.Namespace, Findings], None]] = {
    "requests": bench_requests,
    "quota": bench_quota,
    "latency": bench_latency,
    "gap": bench_gap,
    "cpu": bench_cpu,
    "csv": bench_csv,
    "export": bench_export,
    "start": bench_start,
}


def projection(cost: Cost) -> Table:
    """What many pairs come to, from what one pair was measured to cost."""
    rows = []
    for pairs in (1_000, 100_000):
        for name, each in (("with", cost.requests + cost.timelines), ("without", cost.requests)):
            units = pairs * each
            hours = (units / 1_000 * 300 / 3600, units / 5_000 * 60 / 3600)
            rows.append([f"{pairs:,}", name, f"{units:,.0f}", *map("{:,.2f}".format, hours)])
    return Table(
        "Projection",
        ("pairs", "timelines", "units", "hours at 1,000 in 5 min", "hours at 5,000 a min"),
        rows,
        f"A pair has {cost.tickets:.1f} tickets and {cost.conversations:.1f} conversations; a request is a unit.",
    )


# -- the big CSV -------------------------------------------------------------------------------------

PANDAS = """
import sys
import pandas
frame = pandas.read_csv(sys.argv[1])
email, reference = frame["EMAIL"].str.strip().str.lower(), frame["EXTERNAL_REF"]
kinds = pandas.DataFrame({"user": reference.str.startswith("user_"), "system": reference.str.startswith("REVU-")})
found = kinds.groupby(email).sum()
print(((found["user"] == 1) & (found["system"] >= 1)).sum())
"""
FIRST = (
    "Ana",
    "Ben",
    "Chloé",
    "Dmitri",
    "Elif",
    "Femi",
    "Grace",
    "Hiro",
    "Inés",
    "João",
    "Kavya",
    "Liam",
    "Maya",
)
LAST = (
    "Abe",
    "Brandt",
    "Costa",
    "Eze",
    "Fischer",
    "García",
    "Haddad",
    "Ito",
    "López",
    "Müller",
    "Novak",
    "Patel",
)
DOMAINS = ("example.com", "mail.example.org", "corp.example.net", "example.co.uk")


def write_big_csv(path: Path, rows: int, seed: int) -> int:
    """Write an export of which a tenth are pairs and the rest single contacts, shuffled; returns the pairs."""
    pairs = max(1, rows // 20)
    numbers = list(range(rows))
    chance = random.Random(seed)
    chance.shuffle(numbers)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(big_row(number, number < 2 * pairs, chance) for number in numbers)
    return pairs


def big_row(number: int, paired: bool, chance: random.Random) -> Tuple[str, ...]:
    """One contact. Numbers 2n and 2n + 1 of the paired are one person, spelt in two ways."""
    person = number // 2 if paired else number
    first, last = FIRST[person % len(FIRST)], LAST[person // len(FIRST) % len(LAST)]
    key = f"{number * 2654435761 % 2**32:08X}"
    email = f"{first}.{last}{person}@{DOMAINS[person % len(DOMAINS)]}".lower()
    is_user = bool(number % 2)
    return (
        f"don:identity:dvrv-us-1:devo/BENCH1:revu/{key}",
        f"{last}, {first}" if number % 10 == 0 else f"{first} {last}",
        email.capitalize() if paired and is_user and number % 3 == 0 else email,
        f"user_{number * 11400714819323198485 % 2**64:016x}" if is_user else f"REVU-{key}",
        f"{first} {last}",
        str(min(int(chance.expovariate(0.4)), 200)),
        f"202{number % 5}-0{number % 9 + 1}-{number % 28 + 1:02d}T{number % 24:02d}:15:00.000Z",
        f"2025-0{number % 9 + 1}-{number % 28 + 1:02d}T{number % 24:02d}:45:00.000Z",
    )


# -- measuring a process -----------------------------------------------------------------------------


class Use(NamedTuple):
    """What a process took. `megabytes` is its peak, 0 where the platform does not tell."""

    seconds: float
    megabytes: float


# A child counts the peak of whoever started it as its own, so a small process has to start it.
MEASURE = """
import json, os, subprocess, sys, time
with open(sys.argv[1], "wb") as out:
    begun = time.monotonic()
    child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=out)
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        failed, peak = bool(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        failed, peak = bool(child.wait()), 0
print(json.dumps([failed, time.monotonic() - begun, peak / 1e6]))
"""


def use_of(
    command: Sequence[str], folder: str, expected: str, settings: Mapping[str, str] = {}
) -> Use:
    """Run a command once; RuntimeError where it fails or its last line of output is not what is expected."""
    out = Path(folder) / "output"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(out), *command],
        cwd=folder, env={**plain_environment(), **settings}, stdout=subprocess.PIPE, check=True, encoding="utf-8",
    )  # fmt: skip
    failed, seconds, megabytes = json.loads(done.stdout)
    with open(out, "rb") as file:
        file.seek(max(0, out.stat().st_size - 200))
        last = file.read().decode("utf-8", "replace").rstrip().rpartition("\n")[2]
    if failed or not last.startswith(expected):
        raise RuntimeError(f"{command[1:4]} ended with {last!r} instead of {expected!r}")
    return Use(seconds, megabytes)


def least_use(
    commands: Sequence[Sequence[str]], folder: str, expected: Sequence[str], rounds: int = 3
) -> List[Use]:
    """The least time and the least memory of each command; they take turns, so that a busy machine hits all alike."""
    uses: List[List[Use]] = [[] for _ in commands]
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        for found, command, line in zip(uses, commands, expected):
            found.append(use_of(command, folder, line))
    return [
        Use(min(use.seconds for use in found), min(use.megabytes for use in found))
        for found in uses
    ]


def fastest(
    commands: Sequence[Sequence[str]], rounds: int, folder: Optional[str] = None
) -> List[float]:
    """The best time of each command; they take turns."""
    times: List[List[float]] = [[] for _ in commands]
    for _ in range(rounds):
        for found, command in zip(times, commands):
            begun = time.monotonic()
            subprocess.run(
                command, cwd=folder, env=plain_environment(), check=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            found.append(time.monotonic() - begun)
    return [min(found) for found in times]


def plain_environment() -> Dict[str, str]:
    """The environment without settings of the tool."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEVREV_")}
    return dict(kept, PYTHONIOENCODING="utf-8")


# -- showing it --------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """A table with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(table.head, *table.rows)]
    rows = (table.head, ["-" * width for width in widths], *table.rows)
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([table.title, "", *lines, *([table.note] if table.note else [])])


def as_markdown(table: Table) -> str:
    """A table for the README."""
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    lines = ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    return "\n".join([f"### {table.title}", "", *lines, *(["", table.note] if table.note else [])])


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(f"  {text} ...", file=sys.stderr, flush=True)


def arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure what a run costs."
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="this part alone (may be repeated)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=1_000_000,
        metavar="N",
        help="of the big CSV (default 1,000,000)",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of everything random (default 1)"
    )
    options = parser.parse_args(argv)
    if options.rows < 2:
        parser.error("--rows: at least 2")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure and print; always 0, unless something breaks."""
    options = arguments(argv)
    findings = Findings()
    for name, part in PARTS.items():
        if not options.only or name in options.only:
            progress(name)
            part(options, findings)
    show = as_markdown if options.markdown else as_text
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print("\n\n".join(map(show, findings.all_tables())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
