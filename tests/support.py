"""What the tests share: a folder to run the script in, an organisation, a look at the disk."""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from tests.fake.seeding import COLUMNS, export_row, write_export
from tests.process.forked import can_fork
from tests.process.forked import run as run_forked
from tests.sandbox import Organisation, Sandbox, things_of

__all__ = ["COLUMNS", "export_row"]  # besides what is defined here
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "merge_contacts.py"
# Python keeps the bytecode of a module, never of a script: as a module it starts in less CPU.
PROGRAM = (sys.executable, "-m", SCRIPT.stem)
SAMPLE = ROOT / "tests" / "data" / "contacts.csv"
# Modes in which nothing is to be confirmed.
UNCONFIRMED = {
    "--preview", "--check", "--status", "--verify-backups", "--export", "--help", "--version",
}  # fmt: skip
Row = Dict[str, Any]
Pairs = List[Tuple[str, str]]


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


class Workplace:
    """A scratch folder in which the script runs as a user would run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.csv = folder / "contacts.csv"

    def environment(self, sandbox: Optional[Sandbox], extra: Mapping[str, str]) -> Dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DEVREV_")}
        kept.update(PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8", PYTHONPATH=str(ROOT))
        kept["DEVREV_RATE_LIMIT_CALLS"] = "0"
        return {**kept, **(sandbox.environment() if sandbox else {}), **extra}

    def command(self, options: Sequence[str], python: Sequence[str]) -> List[str]:
        """The command line, with `--yes` where it merges or undoes: there is no terminal."""
        program = [*python, str(SCRIPT)] if python else PROGRAM
        names_files = any(option.partition("=")[0] in ("--csv", "--export") for option in options)
        csv_option = () if names_files else ("--csv", str(self.csv))
        confirmed = () if UNCONFIRMED & set(options) else ("--yes",)
        return [*program, *csv_option, *confirmed, *options]

    def start(
        self, sandbox: Optional[Sandbox], *options: str, python: Sequence[str] = (), **extra: str
    ) -> "subprocess.Popen[str]":
        with hangups_heard():
            return subprocess.Popen(
                self.command(options, python),
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
        command = self.command(options, python)
        if command[0] == sys.executable and len(python) != 1 and can_fork(extra):
            environment = self.environment(sandbox, extra)
            code, out, err, late = run_forked(command[1:], str(self.folder), environment, timeout)
        else:
            process, late = self.start(sandbox, *options, python=python, **extra), False
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                late = True
                process.send_signal(signal.SIGABRT if os.name != "nt" else signal.SIGTERM)
                out, err = process.communicate()
            code = process.returncode
        assert not late, f"still running after {timeout} s\n{out}\n{err}\n{self.logs()}"
        result = Result(code, out, err, self.folder, before)
        assert "Traceback" not in err, result
        assert check is None or result.code == check, f"{result}\n{self.logs()}"
        return result

    def exactly(
        self, sandbox: Optional[Sandbox], *options: str, script: str = str(SCRIPT)
    ) -> "subprocess.CompletedProcess[str]":
        """Run exactly these options, with nothing on stdin."""
        return subprocess.run(
            [sys.executable, script, *options],
            cwd=str(self.folder),
            env=self.environment(sandbox, {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    def machine(self, code: str) -> Dict[str, str]:
        """The environment of a machine on which `code` runs before any program does."""
        folder = self.folder / "site"
        folder.mkdir(exist_ok=True)
        code = "import errno, os, sqlite3, stat, sys\n" + code
        (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
        return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

    @contextlib.contextmanager
    def serving(
        self, count: int = 1, tickets: Tuple[int, int] = (2, 1), **options: Any
    ) -> Iterator[Tuple[Sandbox, Pairs]]:
        """Serve an organisation of so many pairs, whose export is in the folder."""
        organisation, pairs = organisation_of_pairs(count, tickets)
        self.export(organisation)
        with Sandbox(organisation, **options) as sandbox:
            yield sandbox, pairs

    def export(self, organisation: Organisation) -> None:
        write_export(organisation, self.csv)

    def logs(self) -> str:
        paths = sorted((self.folder / "logs").glob("*"))
        return "\n".join(path.read_text(encoding="utf-8") for path in paths)[-6000:]

    def files(self) -> List[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def hangups_heard() -> Iterator[None]:
    """Start a process that does not inherit from nohup that SIGHUP is ignored."""
    if os.name == "nt":
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


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
        environment = place.environment(sandbox, {"TERM": "xterm"})
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


def roles_of(organisation: Organisation, contact: str) -> Dict[str, Set[str]]:
    """Ids of the works that a contact owns, has created, has reported, and of its conversations."""
    works, talks = organisation.works, organisation.conversations
    found = {
        "owned": works.find([("owned_by", [contact])]),
        "created": works.find([("created_by", [contact])]),
        "reported": works.find([("reported_by", [contact])]),
        "conversations": talks.find([("members", [contact])]),
    }
    return {role: {one["id"] for one in things} for role, things in found.items()}


def pair(
    organisation: Organisation, number: int, tickets: Tuple[int, int] = (2, 1)
) -> Tuple[str, str]:
    """Add a primary and a duplicate of one person, with tickets, comments and a conversation."""
    add, email = organisation.add_contact, f"person{number}@example.com"
    primary = add(f"P{number}", email, display_name=f"Person {number}")
    duplicate = add(f"D{number}", email, f"user_{number}", display_name=f"P. {number}")
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
) -> Tuple[Organisation, Pairs]:
    organisation = Organisation()
    return organisation, [pair(organisation, number, tickets) for number in range(1, count + 1)]


def backed_up(folder: Path) -> Set[str]:
    """Ids of all that lies in whole backups, read without any of the tool's own code."""
    found: Set[str] = set()
    for manifest in (folder / "backups").glob("*/[0-9]*/manifest.json"):
        for name, facts in json.loads(manifest.read_bytes())["files"].items():
            file = manifest.parent / name
            data = file.read_bytes() if file.exists() else b""
            if (len(data), hashlib.sha256(data).hexdigest()) != (facts["bytes"], facts["sha256"]):
                continue
            content = json.loads(data)
            if file.stem == "contact":
                content = [content]
            elif file.stem == "timelines":
                content = itertools.chain.from_iterable(content.values())
            found.update(one["id"] for one in content)
    return found


def assert_merged(organisation: Organisation, pairs: Iterable[Tuple[str, str]]) -> None:
    """Exactly these merges were carried out, once each, and each `user_` reference moved."""
    pairs = list(pairs)
    assert sorted(organisation.merges) == sorted(pairs)
    for primary, _ in pairs:
        contact = organisation.contacts[primary]
        assert contact["external_ref"].startswith("user_"), contact


def watch_merges(sandbox: Sandbox, folder: Path) -> List[Any]:
    """Note of each merge that is requested what no whole backup holds of the two; None for none."""
    findings: List[Any] = []

    def look(stage: str, request: Any) -> None:
        if stage != "before" or request.endpoint != "rev-users.merge":
            return
        held = set(request.body.values())
        for contact in request.body.values():
            for one in things_of(sandbox.organisation, contact):
                entries = sandbox.organisation.timelines[one["id"]]
                held.update([one["id"], *(entry["id"] for entry in entries)])
        findings.append(tuple(held - backed_up(folder)) or None)

    sandbox.on_request = look
    return findings


def diagonal(*lists: Sequence[Any]) -> List[Any]:
    """Every combination, for `parametrize`: the fast run takes a diagonal, with each value."""
    import pytest  # the benchmark does without

    shortest = min(map(len, lists))
    return [
        pytest.param(
            *(values[index] for values, index in zip(lists, place)),
            marks=[pytest.mark.slow] if sum(place) % shortest else [],
        )
        for place in itertools.product(*map(range, map(len, lists)))
    ]
