"""A DevRev organisation on loopback that speaks real HTTP.

Merging contacts cannot be undone, so nothing here ever talks to DevRev. The sandbox answers the
same requests on 127.0.0.1: `tests.fake.organisation` says what, with its misbehaviour and its books.

    python -m tests.sandbox                      export a sample, merge it, and show what happened
    python -m tests.sandbox serve --port 8123    stay up, to try the tool by hand

In a test:

    organisation = Organisation()
    primary = organisation.add_contact("1", "ada@example.com")
    secondary = organisation.add_contact("2", "ada@example.com", external_ref="user_2")
    with Sandbox(organisation, faults=[Fault("503", "works.list", times=2)]) as sandbox:
        ...                                      # run the tool with sandbox.environment()
    assert organisation.merges == [(primary, secondary)]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

from tests.fake.organisation import Organisation
from tests.fake.server import Sandbox
from tests.fake.trouble import FAULTS, Fault, Request
from tests.fake.world import SWITCHES

__all__ = ["Fault", "Organisation", "Request", "Sandbox"]  # what tests use
REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_CSV = Path(__file__).resolve().parent / "data" / "contacts.csv"

# --------------------------------------------------------------------------------------------------
# Command line: serve
# --------------------------------------------------------------------------------------------------


def fault_option(text: str) -> Fault:
    """`KIND[:ENDPOINT[:CHANCE]]`, e.g. `503:works.*:0.2`."""
    kind, _, rest = text.partition(":")
    endpoint, _, chance = rest.partition(":")
    try:
        return Fault(kind, endpoint or "*", float(chance or 1.0))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def quota_option(text: str) -> Tuple[int, float]:
    """`LIMIT/SECONDS`, e.g. `1000/300`."""
    limit, _, window = text.partition("/")
    try:
        quota = int(limit), float(window)
    except ValueError:
        quota = 0, 0.0
    if min(quota) <= 0:
        raise argparse.ArgumentTypeError("LIMIT/SECONDS is wanted, e.g. 1000/300")
    return quota


def switch_option(text: str) -> Tuple[str, Any]:
    """`NAME=VALUE`, e.g. `verified_shown=shown`; a value that is JSON (a number, true, a list) is taken as that."""
    name, _, value = text.partition("=")
    if name not in SWITCHES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(SWITCHES))}")
    choices = Sandbox.CHOICES.get(name, ())
    try:
        return name, value if value in choices else json.loads(value)
    except ValueError:
        return name, value


def arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sandbox",
        description="A DevRev organisation on loopback: nothing ever leaves this computer.",
        epilog="Without a command, runs the demo: exports a sample organisation, merges it, and checks the result.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "demo", help="export a sample, merge it, and show what happened (the default)"
    )
    serve_parser = commands.add_parser(
        "serve",
        help="stay up until Ctrl-C, to try the tool by hand",
        description="Serve the organisation that an export came from, until Ctrl-C.",
        epilog="Faults: " + ", ".join(FAULTS),
    )
    option = serve_parser.add_argument
    option("--port", type=int, default=0, metavar="N", help="default: any free port")
    option("--csv", type=Path, default=SAMPLE_CSV, metavar="PATH", help="default: the sample")
    option(
        "--merge-delay",
        type=float,
        default=0.3,
        metavar="S",
        help="seconds from a merge's acknowledgement until it is carried out (default: 0.3)",
    )
    option(
        "--latency", type=float, default=0.0, metavar="S", help="seconds each request takes longer"
    )
    option(
        "--gone",
        choices=(*Sandbox.GONE, *Sandbox.ODD),
        default="404",
        metavar="MANNER",
        help="how a merged contact answers (default: 404): "
        + ", ".join((*Sandbox.GONE, *Sandbox.ODD)),
    )
    option(
        "--set",
        type=switch_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="behave in another way that is known of DevRev, e.g. merge_answer=204 (may be repeated; tests/fake/organisation.py "
        "lists all)",
    )
    option(
        "--quota", type=quota_option, metavar="LIMIT/SECONDS", help="e.g. 1000/300; default: none"
    )
    option(
        "--fault",
        type=fault_option,
        action="append",
        default=[],
        metavar="KIND[:ENDPOINT[:CHANCE]]",
        help="misbehave, e.g. 503:works.*:0.2 (may be repeated; the kinds are listed below)",
    )
    return parser.parse_args(argv)


def say(text: str = "") -> None:
    """Print at once, so that the lines of this process and of the tool stay in order."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    try:
        organisation = Organisation.from_csv(options.csv)
        sandbox = Sandbox(
            organisation,
            port=options.port,
            latency=options.latency,
            merge_delay=options.merge_delay,
            gone=options.gone,
            quota=options.quota,
            faults=options.fault,
            **dict(options.set),
        )
        with sandbox:
            introduce(sandbox)
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                say()
    except (OSError, OverflowError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"{sandbox.count()} requests, {len(organisation.merges)} merges")
    return 0


def introduce(sandbox: Sandbox) -> None:
    """Say where the sandbox is and how to point the tool at it."""
    organisation = sandbox.organisation
    say(f"Organisation {organisation.key} at {sandbox.url}")
    sizes = len(organisation.contacts), len(organisation.works), len(organisation.conversations)
    say("{} contacts, {} works, {} conversations".format(*sizes))
    variables = sorted(sandbox.environment().items())
    say("\nIn another shell, sh:")
    for name, value in variables:
        say(f"  export {name}={value}")
    say("PowerShell:")
    for name, value in variables:
        say(f'  $env:{name} = "{value}"')
    say("\nCtrl-C ends it.")


# --------------------------------------------------------------------------------------------------
# Demo
# --------------------------------------------------------------------------------------------------


class Demo:
    """Runs the real tool against the organisation of the sample and checks what it did against the truth."""

    CSV = ("--csv", "contacts.csv")
    CHOICE = ("luca.ferri@example.com", "REVU-D401")

    def __init__(self) -> None:
        self.organisation = Organisation.from_csv(SAMPLE_CSV)
        self.references = {
            contact_id: contact["external_ref"]
            for contact_id, contact in self.organisation.contacts.items()
        }
        self.folder = Path(tempfile.mkdtemp(prefix="merge-demo-"))
        self.all_true = True

    def run(self) -> int:
        """Export, preview, merge, merge again and choose; then check what the organisation and the disk hold."""
        say(f"An invented DevRev organisation on this machine. Working in {self.folder}")
        with Sandbox(self.organisation) as sandbox:
            self._step("Export: only reads", sandbox, "--export", "contacts.csv", head=1)
            reads = sandbox.count()
            self._check(f"{reads} requests, all of them for lists", reads == count_lists(sandbox))
            self._step("Preview: no request", sandbox, *self.CSV, "--preview", head=4, tail=2)
            self._check("no request was made", sandbox.count() == reads)
            self._step("Merge", sandbox, *self.CSV, "--yes", head=3, tail=6)
            first = sandbox.count("rev-users.merge")
            self._step(
                "The same command again: nothing is merged twice",
                sandbox,
                *self.CSV,
                "--yes",
                head=1,
            )
            again = sandbox.count("rev-users.merge") - first
            self._check("no merge was requested", again == 0)
            (self.folder / "choices.csv").write_text(
                f"EMAIL,EXTERNAL_REF\n{','.join(self.CHOICE)}\n", encoding="utf-8"
            )
            chosen = ("--choices", "choices.csv")
            self._step(
                "A skipped group, with a choice", sandbox, *self.CSV, *chosen, "--yes", head=2
            )
            requested = sandbox.count("rev-users.merge")
            self._check("one more merge was requested", requested == first + again + 1)
        say("\n--- Summary ---")
        self._check_result(requested)
        pages = self.folder.glob("reports/*.html")
        say(
            f"\n{'All of that is true.' if self.all_true else 'NOT all of that is true.'} A report to open in a browser:"
        )
        say(f"  {max(pages, key=os.path.getsize)}")
        say("Next: copy .env.example to .env, put your token into it, and read your own contacts:")
        say(f"  {typed(sys.executable)} merge_contacts.py --export contacts.csv")
        return 0 if self.all_true else 1

    def _step(self, title: str, sandbox: Sandbox, *options: str, head: int, tail: int = 0) -> None:
        """Run the tool; show the first `head` and the last `tail` lines of its output, or all where it fails."""
        say(f"\n--- {title} ---")
        say("$ " + " ".join(["python", "merge_contacts.py", *options]))
        environment = dict(os.environ, **sandbox.environment())
        environment.update(
            DEVREV_RATE_LIMIT_CALLS="0",
            no_proxy="127.0.0.1",
            PYTHONIOENCODING="utf-8",
            COLUMNS="100",
        )
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "merge_contacts.py"), *options],
            cwd=str(self.folder), env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            check=False,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line]
        left_out = len(lines) - head - tail
        if done.returncode:
            say(done.stdout + done.stderr)
            self._check(f"exit code 0, not {done.returncode}", False)
            return
        shown = (
            lines[:head]
            + [f"  [{left_out} more lines]"] * (left_out > 0)
            + lines[max(head, len(lines) - tail) :]
        )
        say("\n".join(shown))

    def _check_result(self, requested: int) -> None:
        merges = self.organisation.merges
        self._check(
            f"{len(merges)} contacts were merged, each with one request",
            0 < len(merges) == requested,
        )
        wrong = []
        for primary in dict.fromkeys(primary for primary, _ in merges):
            group = [primary] + [other for one, other in merges if one == primary]
            wanted = [ref for ref in map(self.references.get, group) if is_user(ref)] or [
                self.references[primary]
            ]
            if wanted != [self.organisation.contacts[primary]["external_ref"]]:
                wrong.append(self.organisation.contacts[primary]["display_id"])
        self._check(
            " ".join(["each primary has the reference that it should have", *wrong]), not wrong
        )
        reported = sum(map(reported_merges, self.folder.glob("reports/*.json")))
        self._check(f"the reports name {reported} merges", reported == len(merges))
        backups = len(list(self.folder.glob("backups/*/*/manifest.json")))
        emails = len({primary for primary, _ in merges})
        self._check(f"{backups} backups, one for each address", backups == emails)

    def _check(self, claim: str, true: bool) -> None:
        self.all_true = self.all_true and true
        say("{} {}".format("[ok]" if true else "[NO]", claim))


def count_lists(sandbox: Sandbox) -> int:
    """How many requests were for lists, which change nothing."""
    return sum(request.endpoint.endswith(".list") for request in sandbox.requests)


def is_user(reference: Optional[str]) -> bool:
    """Whether the reference is one of the customer's own application."""
    return bool(reference) and str(reference).startswith("user_")


def reported_merges(report: Path) -> int:
    """How many merges a report claims."""
    try:
        summary = json.loads(report.read_text(encoding="utf-8"))["summary"]
        return int(summary["successful_merges"])
    except (KeyError, TypeError, ValueError):
        return 0


def typed(path: str) -> str:
    """A path as one would type it in the current folder."""
    with contextlib.suppress(ValueError):
        path = str(Path(path).relative_to(Path.cwd()))
    return f'"{path}"' if " " in path else path


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demo, or serve."""
    options = arguments(argv)
    return serve(options) if options.command == "serve" else Demo().run()


if __name__ == "__main__":
    sys.exit(main())
