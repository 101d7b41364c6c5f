"""A DevRev organisation on loopback that speaks real HTTP.

Merging contacts cannot be undone, so nothing here ever talks to DevRev. The sandbox answers the
same requests on 127.0.0.1: `tests.fake.organisation` says what, with its misbehaviour and its books.

    python -m tests.sandbox                      export a sample, merge it, and show what happened
    python -m tests.sandbox serve --port 8123    stay up, to practise with a new organisation

In a test:

    organisation = Organisation()
    primary = organisation.add_contact("1", "ada@example.com")
    secondary = organisation.add_contact("2", "ada@example.com", external_ref="user_2")
    with Sandbox(organisation, faults=[Fault("503", "works.list", times=2)]) as sandbox:
        ...                                      # run the tool with sandbox.environment()
    assert organisation.merges == [(primary, secondary)]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import html
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, Sequence

from tests.fake.organisation import ROLES, Organisation
from tests.fake.seeding import organisation_of
from tests.fake.server import Sandbox
from tests.fake.trouble import FAULTS, Fault, Request
from tests.fake.world import SWITCHES

__all__ = ["Fault", "Organisation", "Request", "Sandbox"]  # what tests use
REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "tests" / "data" / "contacts.csv"
COLUMNS = (
    "REV_USER_ID", "DISPLAY_NAME", "EMAIL", "EXTERNAL_REF", "FULL_NAME", "TICKET_COUNT", "CREATED_AT", "UPDATED_AT",
)  # fmt: skip
FACTS = (
    "id", "display_name", "email", "external_ref", "full_name", "tickets", "created_date", "modified_date"
)  # fmt: skip


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
    """`NAME=VALUE`, e.g. `verified_shown=shown`; a value that is JSON (a number, true, a list) is taken as that."""
    name, _, value = text.partition("=")
    if name not in SWITCHES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(SWITCHES))}")
    choices = Sandbox.CHOICES.get(name, ())
    try:
        return name, value if value in choices else json.loads(value)
    except ValueError:
        return name, value


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
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
        help="stay up until Ctrl-C, to practise by hand",
        description="Serve a new organisation until Ctrl-C.",
        epilog="Faults: " + ", ".join(FAULTS),
    )
    option = serve_parser.add_argument
    option("--port", type=int, default=0, metavar="N", help="default: any free port")
    option(
        "--set",
        type=switch_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="behave in another way, e.g. merge_delay=20 (may be repeated; tests/fake/world.py has all)",
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
        organisation = organisation_of(SAMPLE, "PRACTICE" + secrets.token_hex(3).upper())
        settings = {"port": options.port, "quota": (1000, 60.0), **dict(options.set)}
        sandbox = Sandbox(organisation, faults=options.fault, **settings)
        Practice(sandbox).prepare()
        with sandbox:
            introduce(sandbox)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    except (OSError, OverflowError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"\n{sandbox.count()} requests, {len(organisation.merges)} merges")
    return 0


class Practice:
    """What there is to learn from: an export of some hours ago, after which DevRev has changed."""

    CSV = Path("practice.csv")

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.organisation = sandbox.organisation

    def prepare(self) -> None:
        """Write the export; then let one contact be locked and one change its email, and a ticket stay behind."""
        self._write_export()
        pairs = self._pairs()
        if len(pairs) >= 3:
            refused, stale, left_behind = pairs[:3]
            self.organisation.change(self.organisation.contacts[refused], state="locked")
            self.organisation.change(
                self.organisation.contacts[stale], email="new.address@example.com"
            )
            match = lambda body: body.get("secondary_user") == left_behind  # noqa: E731
            ticket = self._works(left_behind)[0]["id"]
            self.sandbox.faults.append(Fault("merge-leaves", match=match, detail=[ticket]))
        self.sandbox.pages["/"] = lambda: page(self.organisation)

    def _pairs(self) -> list[str]:
        """Return the `user_` contact of each address that has one REVU- contact besides, most tickets first."""
        groups = defaultdict(list)
        for contact in self.organisation.contacts.values():
            groups[contact["email"]].append(contact["id"])
        found = []
        for members in groups.values():
            users = [one for one in members if is_user(self._reference(one))]
            if len(users) == 1 and len(members) == 2 and self._works(users[0]):
                found.append(users[0])
        return sorted(found, key=lambda one: (-len(self._works(one)), one))

    def _reference(self, contact: str) -> str:
        return str(self.organisation.contacts[contact]["external_ref"])

    def _works(self, contact: str) -> list[Any]:
        """Return what a contact owns or has reported: that is what a merge has to move."""
        roles = ("owned_by", "reported_by")
        return [one for role in roles for one in self.organisation.works.find([(role, [contact])])]

    def _write_export(self) -> None:
        with open(self.CSV, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for one in self.organisation.contacts.values():
                find = self.organisation.works.find
                tickets = max(len(find([(role, [one["id"]])])) for role in ROLES)
                facts = {**one, "tickets": tickets}
                writer.writerow(facts.get(name, "") for name in FACTS)


STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;"
    "padding:.3em .6em;border-bottom:1px solid #ccc}.gone{color:#888}"
)


def page(organisation: Organisation) -> str:
    """Show the contacts of an organisation and their tickets as they are now, as HTML."""
    rows = []
    contacts = sorted(organisation.contacts.values(), key=lambda one: (one["email"], one["id"]))
    with organisation.lock:
        for one in contacts:
            merged = one["id"] in organisation.merged_into
            state = one["state"]
            if merged:
                survivor = organisation.contacts.get(organisation.survivor(one["id"]))
                state = f"merged into {survivor['display_id']}" if survivor else "merged"
            things = [
                *organisation.works.find([("anyone", [one["id"]])]),
                *organisation.conversations.find([("members", [one["id"]])]),
            ]
            titles = [f"{thing['display_id']} {thing['title']}" for thing in things]
            reference = "" if merged else one.get("external_ref", "")
            cells = (one["email"], one["display_id"], one["display_name"], reference, state)
            texts = [html.escape(str(cell)) for cell in cells]
            texts.append("<br>".join(map(html.escape, titles)))
            shade = " class=gone" if merged else ""
            rows.append(f"<tr{shade}><td>{'</td><td>'.join(texts)}</td></tr>")
    names = ("Email", "Contact", "Name", "External reference", "State", "Tickets, conversations")
    head = "".join(f"<th>{name}</th>" for name in names)
    title = html.escape(f"Organisation {organisation.key}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1><p>This page stands for DevRev: reload it to see "
        f"what has become of the contacts.</p><table><tr>{head}</tr>{''.join(rows)}</table></html>"
    )


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
    say(f"\nThen merge what {Practice.CSV}, an export of some hours ago, asks for:")
    say(f"  {typed(sys.executable)} merge_contacts.py --csv {Practice.CSV} --preview --live")
    say(f"  {typed(sys.executable)} merge_contacts.py --csv {Practice.CSV}")
    say("One pair is refused, one changed after the export, one ticket stays behind:")
    say("read the report, look the contacts up on the page above, and settle or undo.")
    say("\nCtrl-C ends it.")


# -- the demo --------------------------------------------------------------------------------------


class Demo:
    """Runs the real tool against the organisation of the sample and checks what it did against the truth."""

    CSV = ("--csv", "contacts.csv")
    CHOICE = ("luca.ferri@example.com", "REVU-D401")

    def __init__(self) -> None:
        self.organisation = organisation_of(SAMPLE)
        self.references = {
            contact_id: contact["external_ref"]
            for contact_id, contact in self.organisation.contacts.items()
        }
        self.had = {one: self._things_of(one) for one in self.organisation.contacts}
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
        say("\nA report to open in a browser:")
        say(f"  {max(pages, key=os.path.getsize)}")
        say("Next: copy .env.example to .env, put your token into it, and read your own contacts:")
        say(f"  {typed(sys.executable)} merge_contacts.py --export contacts.csv")
        return 0 if self.all_true else 1

    def _things_of(self, contact: str) -> set[str]:
        """Return the works and conversations in which a contact has a role."""
        tables = (self.organisation.works, self.organisation.conversations)
        return {one["id"] for table in tables for one in table.find([("anyone", [contact])])}

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
        groups: dict[str, list[str]] = defaultdict(list)
        for primary, duplicate in merges:
            groups[self.organisation.survivor(primary)].append(duplicate)
        wrong = []
        for primary, duplicates in groups.items():
            group = [primary, *duplicates]
            users = [ref for ref in map(self.references.get, group) if is_user(ref)]
            wanted = users or [self.references[primary]]
            if wanted != [self.organisation.contacts[primary]["external_ref"]]:
                wrong.append(self.organisation.contacts[primary]["display_id"])
        claim = "each primary has the reference that the application knows the person by"
        self._check(" ".join([claim, *wrong]), not wrong)
        moved, lost = 0, 0
        for primary, duplicates in groups.items():
            wanted_things = set().union(*(self.had[one] for one in duplicates))
            moved += len(wanted_things)
            lost += len(wanted_things - self._things_of(primary))
        claim = (
            f"all {moved} tickets and conversations of the merged contacts are the primaries' now"
        )
        self._check(f"{claim}; {lost} are lost", not lost)
        reported = sum(map(reported_merges, self.folder.glob("reports/*.json")))
        self._check(f"the reports name all {reported} merges", reported == len(merges))
        saved = set()
        for manifest in self.folder.glob("backups/*/*/manifest.json"):
            content = json.loads(manifest.read_text(encoding="utf-8"))
            saved.update(one["csv"]["id"] for one in content["contacts"])
        members = {one for pair in merges for one in pair}
        claim = f"the backups hold all {len(members)} contacts that were merged or merged into"
        self._check(f"{claim}, one folder for each of {len(groups)} addresses", members <= saved)
        last = "Nothing was lost." if self.all_true else "Something is NOT as it should be."
        say(last)

    def _check(self, claim: str, true: bool) -> None:
        self.all_true = self.all_true and true
        say("{} {}".format("[ok]" if true else "[NO]", claim))


def count_lists(sandbox: Sandbox) -> int:
    """How many requests were for lists, which change nothing."""
    return sum(request.endpoint.endswith(".list") for request in sandbox.requests)


def is_user(reference: str | None) -> bool:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, or serve."""
    options = arguments(argv)
    return serve(options) if options.command == "serve" else Demo().run()


if __name__ == "__main__":
    sys.exit(main())
