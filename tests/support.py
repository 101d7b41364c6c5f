"""What the tests share: a folder to run the real script in, an organisation to run it against, a look at the disk."""

import csv
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from tests.process.forked import can_fork
from tests.process.forked import run as run_forked
from tests.sandbox import Organisation, Sandbox

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "merge_contacts.py"
# Python keeps the bytecode of a module, never of a script: as a module the same program starts in two thirds of the CPU.
PROGRAM = (sys.executable, "-m", SCRIPT.stem)
SAMPLE = ROOT / "tests" / "data" / "contacts.csv"
COLUMNS = (
    "REV_USER_ID",
    "DISPLAY_NAME",
    "EMAIL",
    "EXTERNAL_REF",
    "FULL_NAME",
    "TICKET_COUNT",
    "CREATED_AT",
    "UPDATED_AT",
)
Row = Dict[str, Any]


class Result:
    """What one call of the script left: exit code, output, and the reports and logs it wrote."""

    def __init__(
        self, code: int, out: str, err: str, folder: Path, reports_before: Iterable[Path]
    ) -> None:
        self.code, self.out, self.err = code, out, err
        new = sorted(set((folder / "reports").glob("*.json")) - set(reports_before))
        self.report: Dict[str, Any] = json.loads(new[-1].read_text(encoding="utf-8")) if new else {}

    @property
    def codes(self) -> Dict[str, str]:
        """email -> code of what failed or is unfinished, as the report has it."""
        lists = self.report["failed_merges"], self.report["unfinished_merges"]
        return {entry["email"]: entry["code"] for entries in lists for entry in entries}

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


# Modes in which nothing is to be confirmed.
UNCONFIRMED = {
    "--preview",
    "--check",
    "--status",
    "--verify-backups",
    "--export",
    "--help",
    "--version",
}


class Workplace:
    """A scratch folder in which the script runs as a user would run it."""

    def __init__(self, folder: Path, forks: bool = True) -> None:
        self.folder = folder
        self.forks = forks  # where the time of a start is not what is measured
        self.csv = folder / "contacts.csv"

    def environment(self, sandbox: Optional[Sandbox], extra: Mapping[str, str]) -> Dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DEVREV_")}
        kept.update(
            PYTHONDONTWRITEBYTECODE="1", DEVREV_RATE_LIMIT_CALLS="0", PYTHONIOENCODING="utf-8"
        )
        kept["PYTHONPATH"] = str(ROOT)
        return {**kept, **(sandbox.environment() if sandbox else {}), **extra}

    def command(self, *options: str, program: Sequence[str] = PROGRAM) -> List[str]:
        """The command line, with `--yes` where it merges or undoes: no terminal is there to confirm it on."""
        names_files = any(option.partition("=")[0] in ("--csv", "--export") for option in options)
        csv_option = () if names_files else ("--csv", str(self.csv))
        confirmed = () if UNCONFIRMED & set(options) else ("--yes",)
        return [*program, *csv_option, *confirmed, *options]

    def start(
        self, sandbox: Optional[Sandbox], *options: str, python: Sequence[str] = (), **extra: str
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(*options, program=[*python, str(SCRIPT)] if python else PROGRAM),
            cwd=str(self.folder),
            env=self.environment(sandbox, extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(
        self,
        sandbox: Optional[Sandbox],
        *options: str,
        timeout: float = 60,
        python: Sequence[str] = (),
        check: Optional[int] = None,
        **extra: str,
    ) -> Result:
        """Run the script to its end; `check` is the exit code that is expected."""
        before = list((self.folder / "reports").glob("*.json"))
        command = self.command(*options, program=[*python, str(SCRIPT)] if python else PROGRAM)
        if self.forks and command[0] == sys.executable and len(python) != 1 and can_fork(extra):
            code, out, err, late = run_forked(
                command[1:], str(self.folder), self.environment(sandbox, extra), timeout
            )
        else:
            process, late = self.start(sandbox, *options, python=python, **extra), False
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                late = True
                process.send_signal(signal.SIGABRT if os.name != "nt" else signal.SIGTERM)
                out, err = process.communicate()
            code = process.returncode
        if late:
            raise AssertionError(f"still running after {timeout} s\n{out}\n{err}\n{self.logs()}")
        result = Result(code, out, err, self.folder, before)
        assert "Traceback" not in err, result
        assert check is None or result.code == check, f"{result}\n{self.logs()}"
        return result

    def export(
        self,
        organisation: Organisation,
        changes: Mapping[str, Row] = {},
        leave_out: Iterable[str] = (),
    ) -> Path:
        """Write the CSV that the warehouse would hold of an organisation; `changes` by contact id."""
        gone = set(leave_out)
        return self.write(
            {**export_row(organisation, one), **changes.get(one, {})}
            for one in organisation.contacts
            if one not in gone
        )

    def write(self, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> Path:
        with open(self.csv, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        return self.csv

    def logs(self) -> str:
        return "\n".join(
            path.read_text(encoding="utf-8") for path in sorted((self.folder / "logs").glob("*"))
        )[-6000:]

    def files(self) -> List[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class Terminal:
    """The script on a real (pseudo) terminal of some width; `stdout` may be a file."""

    def __init__(
        self,
        place: Workplace,
        sandbox: Any,
        *options: str,
        columns: int = 80,
        stdout: str = "",
        **extra: str,
    ) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.text = ""
        environment = {**place.environment(sandbox, {"TERM": "xterm", **extra})}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        environment.update(extra)
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have it ignore
            os.chdir(str(place.folder))
            if stdout:
                os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT, 0o600), 1)
            os.execve(sys.executable, [*PROGRAM, *options], environment)
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def read_until(self, wanted: str = "", seconds: float = 20) -> str:
        """Read until `wanted` has come, or to the end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (wanted and wanted in self.text):
            try:
                data = os.read(self.handle, 65536)
            except OSError:
                break
            if not data:
                break
            self.text += data.decode("utf-8")
        return self.text

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode("utf-8"))

    def end(self) -> int:
        self.read_until()
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.handle)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def export_row(organisation: Organisation, contact: str) -> Row:
    user = organisation.contacts[contact]
    return {
        "REV_USER_ID": contact,
        "DISPLAY_NAME": user.get("display_name", ""),
        "EMAIL": user["email"],
        "EXTERNAL_REF": user["external_ref"],
        "FULL_NAME": user.get("full_name", ""),
        "TICKET_COUNT": ticket_count(organisation, contact),
        "CREATED_AT": user["created_date"],
        "UPDATED_AT": user["modified_date"],
    }


def roles_of(organisation: Organisation, contact: str) -> Dict[str, set]:
    """Ids of the works that a contact owns, has created, has reported, and of its conversations."""

    def names(people: Any) -> set:
        return {one["id"] for one in (people if isinstance(people, list) else [people]) if one}

    works = organisation.works.items()
    return {
        "owned": {one for one, work in works if contact in names(work["owned_by"])},
        "created": {one for one, work in works if contact in names(work.get("created_by"))},
        "reported": {one for one, work in works if contact in names(work.get("reported_by", []))},
        "conversations": {
            one
            for one, talk in organisation.conversations.items()
            if contact in names(talk["members"])
        },
    }


def ticket_count(organisation: Organisation, contact: str) -> int:
    roles = roles_of(organisation, contact)
    return max(len(roles[role]) for role in ("owned", "created", "reported"))


def pair(
    organisation: Organisation, number: int, tickets: Tuple[int, int] = (2, 1), **fields: Any
) -> Tuple[str, str]:
    """Add the two contacts of one person, with tickets, comments and a conversation; returns primary and duplicate."""
    email = f"person{number}@example.com"
    primary = organisation.add_contact(
        f"P{number}", email, display_name=f"Person {number}", **fields
    )
    duplicate = organisation.add_contact(
        f"D{number}", email, f"user_{number}", display_name=f"P. {number}", **fields
    )
    for contact, count in zip((primary, duplicate), tickets):
        for index in range(count):
            organisation.add_work(
                owned_by=[contact] if index % 3 == 0 else [],
                created_by=contact if index % 2 else None,
                reported_by=[contact],
                kind="issue" if index % 7 == 6 else "ticket",
                title=f"Ticket {index}",
                comments=1 + index % 3,
            )
    organisation.add_conversation(members=[duplicate], comments=2)
    return primary, duplicate


def organisation_of_pairs(
    count: int, tickets: Tuple[int, int] = (2, 1)
) -> Tuple[Organisation, List[Tuple[str, str]]]:
    organisation = Organisation()
    return organisation, [pair(organisation, number, tickets) for number in range(1, count + 1)]


class Backup:
    """A backup as it lies on the disk, read without any of the tool's own code."""

    def __init__(self, folder: Path, forks: bool = True) -> None:
        self.folder = folder
        self.forks = forks  # where the time of a start is not what is measured
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.contacts: Dict[str, Dict[str, Any]] = {}
        for name, facts in self.manifest["files"].items():
            data = (folder / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (
                facts["bytes"],
                facts["sha256"],
            )
        for part in folder.iterdir():
            if part.is_dir():
                files = {
                    file.stem: json.loads(file.read_text(encoding="utf-8"))
                    for file in part.iterdir()
                }
                self.contacts[files["contact"]["id"]] = files


def backups_of(folder: Path, contact: str) -> List[Backup]:
    """Every whole backup that holds a contact."""
    found = (Backup(path.parent) for path in (folder / "backups").glob("*/[0-9]*/manifest.json"))
    return [backup for backup in found if contact in backup.contacts]


def assert_backed_up(folder: Path, organisation: Organisation, contacts: Iterable[str]) -> None:
    """All that the organisation holds of these contacts right now lies in whole backups."""
    held: Dict[str, set] = {
        "contacts": set(),
        "works": set(),
        "conversations": set(),
        "entries": set(),
    }
    for path in (folder / "backups").glob("*/[0-9]*"):
        for contact, files in Backup(path).contacts.items():
            held["contacts"].add(contact)
            held["works"].update(work["id"] for work in files["works"])
            held["conversations"].update(talk["id"] for talk in files["conversations"])
            held["entries"].update(
                entry["id"] for entries in files["timelines"].values() for entry in entries
            )
    for contact in contacts:
        roles = roles_of(organisation, contact)
        talks = roles.pop("conversations")
        works = set().union(*roles.values())
        entries = {
            entry["id"] for one in works | talks for entry in organisation.timelines.get(one, [])
        }
        missing = (
            {contact} - held["contacts"]
            | works - held["works"]
            | talks - held["conversations"]
            | entries - held["entries"]
        )
        assert not missing, f"not in a whole backup: {sorted(missing)}"


def assert_merged(organisation: Organisation, pairs: Iterable[Tuple[str, str]]) -> None:
    """Exactly these merges were carried out, once each, and each `user_` reference is on its primary."""
    pairs = list(pairs)
    assert sorted(organisation.merges) == sorted(pairs)
    for primary, _ in pairs:
        assert organisation.contacts[primary]["external_ref"].startswith("user_"), (
            organisation.contacts[primary]
        )


def watch_merges(sandbox: Sandbox, folder: Path) -> List[Union[AssertionError, None]]:
    """Check, as each merge request arrives, that the backup of both contacts is whole; returns the findings."""
    findings: List[Union[AssertionError, None]] = []

    def look(stage: str, request: Any) -> None:
        if stage == "before" and request.endpoint == "rev-users.merge":
            try:
                both = [request.body["primary_user"], request.body["secondary_user"]]
                assert_backed_up(folder, sandbox.organisation, both)
                findings.append(None)
            except AssertionError as error:
                findings.append(error)

    sandbox.on_request = look
    return findings


def diagonal(*lists: Sequence[Any]) -> List[Any]:
    """Every combination, for `parametrize`: the fast run takes a diagonal, in which each value comes up; the rest is slow."""
    import pytest  # the benchmark does without

    shortest = min(map(len, lists))
    return [
        pytest.param(
            *(values[index] for values, index in zip(lists, place)),
            marks=[pytest.mark.slow] if sum(place) % shortest else [],
        )
        for place in itertools.product(*map(range, map(len, lists)))
    ]


def the_rest_is_slow(values: Iterable[Any], *fast: Any) -> List[Any]:
    """All of these, for `parametrize`; the fast run takes those that are named."""
    import pytest

    return [
        value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


def shuffled(items: Iterable[Any], seed: int = 0) -> List[Any]:
    found = list(items)
    random.Random(seed).shuffle(found)
    return found
