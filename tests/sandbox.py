"""A DevRev organisation on loopback that speaks real HTTP.

Merging contacts cannot be undone, so nothing here ever talks to DevRev. The sandbox answers the
same requests on 127.0.0.1; `tests.fake.world` says how, with its misbehaviour and its books.

    python -m tests.sandbox                      export a sample, merge it, and show what happened
    python -m tests.sandbox serve --port 8123    stay up, to practise with a new organisation
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Sequence

from tests.fake.organisation import Organisation
from tests.fake.seeding import organisation_of, write_export
from tests.fake.server import Sandbox
from tests.fake.trouble import FAULTS, Fault, Request
from tests.fake.world import SWITCHES

__all__ = ["Fault", "Organisation", "Request", "Sandbox"]  # what tests use
REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "tests" / "data" / "contacts.csv"
PRACTICE = Path("practice.csv")

# -- serve -----------------------------------------------------------------------------------------


def fault_option(text: str) -> Fault:
    """`KIND[:ENDPOINT[:CHANCE]]`, e.g. `503:works.*:0.2`."""
    kind, _, rest = text.partition(":")
    endpoint, _, chance = rest.partition(":")
    try:
        return Fault(kind, endpoint or "*", float(chance or 1.0))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def switch_option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`; a value that is JSON (a number, true, a list) is taken as that."""
    name, _, value = text.partition("=")
    if name not in SWITCHES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(SWITCHES))}")
    if value not in Sandbox.CHOICES.get(name, ()):
        with contextlib.suppress(ValueError):
            return name, json.loads(value)
    return name, value


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sandbox",
        description="A DevRev organisation on loopback: nothing ever leaves this computer.",
        epilog="Without a command, runs the demo.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("demo", help="export a sample, merge it, and show what happened")
    serve_parser = commands.add_parser(
        "serve",
        help="stay up until Ctrl-C, to practise by hand",
        description="Serve a new organisation until Ctrl-C.",
        epilog="Faults: " + ", ".join(FAULTS),
    )
    option = serve_parser.add_argument
    option("--port", type=int, default=0, metavar="N", help="default: any free port")
    several = {"action": "append", "default": []}
    help_text = "behave in another way, e.g. merge_delay=20 (tests/fake/world.py has them all)"
    option("--set", type=switch_option, metavar="NAME=VALUE", help=help_text, **several)
    form, help_text = "KIND[:ENDPOINT[:CHANCE]]", "misbehave, e.g. 503:works.*:0.2"
    option("--fault", type=fault_option, metavar=form, help=help_text, **several)
    return parser.parse_args(argv)


def say(text: str = "") -> None:
    """Print at once, so that the lines of this process and of the tool stay in order."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def serve(options: argparse.Namespace) -> int:
    try:
        organisation = organisation_of(SAMPLE, "PRACTICE" + secrets.token_hex(3).upper())
        settings = {"port": options.port, "quota": (1000, 60.0), **dict(options.set)}
        sandbox = Sandbox(organisation, faults=options.fault, **settings)
        prepare(sandbox)
        with sandbox:
            introduce(sandbox)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    except (OSError, OverflowError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"\n{sandbox.count()} requests, {len(organisation.merges)} merges")
    return 0


def prepare(sandbox: Sandbox) -> None:
    """Write an export; then lock a contact, change an email, and let a ticket stay behind."""
    organisation = sandbox.organisation
    write_export(organisation, PRACTICE)
    refused, stale, left_behind = (
        organisation.don("identity", "revu", key) for key in ("A116", "A114", "A112")
    )
    organisation.change(organisation.contacts[refused], state="locked")
    organisation.change(organisation.contacts[stale], email="new.address@example.com")
    ticket = organisation.works.find([("reported_by", [left_behind])])[0]["id"]
    match = lambda body: body.get("secondary_user") == left_behind  # noqa: E731
    sandbox.faults.append(Fault("merge-leaves", match=match, detail=[ticket]))
    sandbox.pages["/"] = lambda: page(organisation)


STYLE = "body{font:15px system-ui;margin:2em}td{padding:.3em 1em;border-bottom:1px solid #ccc}"
HEAD = ("Email", "Contact", "Name", "External reference", "State", "Tickets, conversations")


def page(organisation: Organisation) -> str:
    """Show the contacts of an organisation and their tickets as they are now, as HTML."""
    rows = [HEAD]
    with organisation.lock:
        contacts = organisation.contacts.values()
        for one in sorted(contacts, key=lambda one: (one["email"], one["id"])):
            state, reference = one["state"], one.get("external_ref", "")
            survivor = organisation.survivor(one["id"])
            if survivor != one["id"]:
                state, reference = f"merged into REVU-{survivor.rpartition('/')[2]}", ""
            things = things_of(organisation, one["id"])
            titles = ", ".join(f"{thing['display_id']} {thing['title']}" for thing in things)
            names = one["email"], one["display_id"], one["display_name"]
            rows.append((*names, reference, state, titles))
    table = ["<tr><td>" + "<td>".join(map(html.escape, row)) for row in rows]
    title = html.escape(f"Organisation {organisation.key}")
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>This page stands for DevRev: reload it to see what has become of the "
        f"contacts.</p><table>{''.join(table)}</table>"
    )


def things_of(organisation: Organisation, contact: str) -> list[Any]:
    tables = (organisation.works, organisation.conversations)
    return [one for table in tables for one in table.find([("anyone", [contact])])]


def introduce(sandbox: Sandbox) -> None:
    """Say where the sandbox is, how to point the tool at it, and what to try."""
    organisation = sandbox.organisation
    say(f"A new organisation, {organisation.key}. Look at its contacts: {sandbox.url}/")
    sizes = len(organisation.contacts), len(organisation.works), len(organisation.conversations)
    say("{} contacts, {} works, {} conversations".format(*sizes))
    variables = sorted(sandbox.environment().items())
    say("\nIn another shell, in this folder; sh:")
    for name, value in variables:
        say(f"  export {name}={value}")
    say("PowerShell:")
    for name, value in variables:
        say(f'  $env:{name} = "{value}"')
    say(f"\nThen merge what {PRACTICE}, an export of some hours ago, asks for:")
    say(f"  {typed(sys.executable)} merge_contacts.py --csv {PRACTICE} --preview --live")
    say(f"  {typed(sys.executable)} merge_contacts.py --csv {PRACTICE}")
    say("One pair is refused, one changed after the export, one ticket stays behind,")
    say("for which the run waits two minutes. Then read the report, look the contacts")
    say("up on the page above, and settle or undo.")
    say("\nCtrl-C ends it.")


# -- the demo --------------------------------------------------------------------------------------


class Demo:
    """Runs the real tool against the sample's organisation, and checks what it did."""

    CHOICE = "EMAIL,EXTERNAL_REF\nluca.ferri@example.com,REVU-D401\n"

    def __init__(self) -> None:
        self.organisation = organisation_of(SAMPLE)
        contacts = self.organisation.contacts
        self.references = {one: contacts[one]["external_ref"] for one in contacts}
        self.had = {one: self._ids_of(one) for one in contacts}
        self.folder = Path(tempfile.mkdtemp(prefix="merge-demo-"))
        self.all_true = True

    def run(self) -> int:
        """Export, preview, merge, merge again, choose; then check the organisation and the disk."""
        say(f"An invented DevRev organisation on this machine. Working in {self.folder}")
        csv_file, choices = ("--csv", "contacts.csv"), ("--choices", "choices.csv")
        (self.folder / choices[1]).write_text(self.CHOICE, encoding="utf-8")
        with Sandbox(self.organisation) as sandbox:
            self._step("Export: only reads", sandbox, "--export", csv_file[1], head=1)
            reads = sandbox.count()
            lists = sum(request.endpoint.endswith(".list") for request in sandbox.requests)
            self._check(f"{reads} requests, all of them for lists", reads == lists)
            self._step("Preview: no request", sandbox, *csv_file, "--preview", head=4, tail=2)
            self._check("no request was made", sandbox.count() == reads)
            self._step("Merge", sandbox, *csv_file, "--yes", head=3, tail=6)
            first = sandbox.count("rev-users.merge")
            title = "The same command again: nothing is merged twice"
            self._step(title, sandbox, *csv_file, "--yes", head=1)
            self._check("no merge was requested", sandbox.count("rev-users.merge") == first)
            title = "A skipped group, with a choice"
            self._step(title, sandbox, *csv_file, *choices, "--yes", head=2)
            requested = sandbox.count("rev-users.merge")
            self._check("one more merge was requested", requested == first + 1)
        say("\n--- Summary ---")
        self._check_result(requested)
        say("Nothing was lost." if self.all_true else "Something is NOT as it should be.")
        say("\nA report to open in a browser:")
        say(f"  {max(self.folder.glob('reports/*.html'), key=os.path.getsize)}")
        say("Next: copy .env.example to .env, put your token into it, and read your own contacts:")
        say(f"  {typed(sys.executable)} merge_contacts.py --export contacts.csv")
        return 0 if self.all_true else 1

    def _ids_of(self, contact: str) -> set[str]:
        return {one["id"] for one in things_of(self.organisation, contact)}

    def _step(self, title: str, sandbox: Sandbox, *options: str, head: int, tail: int = 0) -> None:
        """Run the tool; show the first and the last lines of its output, or all where it fails."""
        say(f"\n--- {title} ---")
        say("$ " + " ".join(["python", "merge_contacts.py", *options]))
        settings = {"DEVREV_RATE_LIMIT_CALLS": "0", "no_proxy": "127.0.0.1", "COLUMNS": "100"}
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "merge_contacts.py"), *options],
            cwd=str(self.folder),
            env={**os.environ, **sandbox.environment(), **settings, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            say(done.stdout + done.stderr)
            self._check(f"exit code 0, not {done.returncode}", False)
            return
        lines = [line for line in done.stdout.splitlines() if line]
        if len(lines) > head + tail:
            last = len(lines) - tail
            lines = [*lines[:head], f"  [{last - head} more lines]", *lines[last:]]
        say("\n".join(lines))

    def _check_result(self, requested: int) -> None:
        merges, contacts = self.organisation.merges, self.organisation.contacts
        claim = f"{len(merges)} contacts were merged, each with one request"
        self._check(claim, 0 < len(merges) == requested)
        wrong: list[str] = []
        moved: set[str] = set()
        lost: set[str] = set()
        for primary, duplicate in merges:
            reference = self.references[duplicate]
            if reference.startswith("user_") and reference != contacts[primary]["external_ref"]:
                wrong.append(contacts[primary]["display_id"])
            moved |= self.had[duplicate]
            lost |= self.had[duplicate] - self._ids_of(primary)
        claim = "each primary has the reference that the application knows the person by"
        self._check(" ".join([claim, *wrong]), not wrong)
        claim = "tickets and conversations of the merged contacts are the primaries' now"
        self._check(f"all {len(moved)} {claim}; {len(lost)} are lost", not lost)
        reports = [json.loads(path.read_bytes()) for path in self.folder.glob("reports/*.json")]
        reported = sum(report["summary"]["successful_merges"] for report in reports)
        self._check(f"the reports name all {reported} merges", reported == len(merges))
        saved = set()
        for path in self.folder.glob("backups/*/*/manifest.json"):
            saved.update(one["csv"]["id"] for one in json.loads(path.read_bytes())["contacts"])
        members = {one for pair in merges for one in pair}
        claim = f"the backups hold all {len(members)} contacts that were merged or merged into"
        self._check(claim, members <= saved)

    def _check(self, claim: str, true: bool) -> None:
        self.all_true = self.all_true and true
        say(f"[{'ok' if true else 'NO'}] {claim}")


def typed(path: str) -> str:
    """A path as one would type it in the current folder."""
    with contextlib.suppress(ValueError):
        path = str(Path(path).relative_to(Path.cwd()))
    return f'"{path}"' if " " in path else path


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    return serve(options) if options.command == "serve" else Demo().run()


if __name__ == "__main__":
    sys.exit(main())
