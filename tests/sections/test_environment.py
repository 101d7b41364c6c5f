"""The machine: whom the tool trusts on it, what it writes in which order, what it sends where."""

import contextlib
import errno
import gzip
import io
import json
import os
import shutil
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest
import requests

import merge_contacts as tool
from tests.sections.test_requests import raw_server
from tests.support import SCRIPT, Workplace, assert_merged, organisation_of_pairs

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")


# ----- where the token goes -----------------------------------------------------------------------

TOKEN, URL = "DEVREV_API_TOKEN", "DEVREV_BASE_URL"
OTHER, DEFAULT = "https://gateway.example.com", "https://api.devrev.ai/"
# The environment, `.env` in the current folder, `.env` beside the script; what happens.
DESTINATIONS = [
    ({}, {URL: OTHER, TOKEN: "t"}, {}, "named"),
    ({}, {URL: OTHER}, {TOKEN: "t"}, "refused"),
    ({}, {TOKEN: "t"}, {URL: OTHER}, "refused"),
    ({TOKEN: "t"}, {URL: OTHER}, {}, "refused"),
    ({TOKEN: "t"}, {URL: OTHER, TOKEN: "other"}, {}, "refused"),
    ({TOKEN: "t"}, {URL: "http://127.0.0.1:9"}, {}, "refused"),
    ({URL: OTHER, TOKEN: "t"}, {URL: "https://evil.example.com"}, {}, "named"),
    ({TOKEN: "t"}, {URL: DEFAULT}, {}, ""),
    ({TOKEN: "t", URL: "http://localhost:9"}, {}, {}, ""),
    ({}, {URL: OTHER}, {}, "named"),  # and then the token is missing
]


@pytest.mark.parametrize("environment, here, beside, outcome", DESTINATIONS)
def test_a_file_sends_no_token_but_its_own_to_another_host(
    environment: Dict[str, str],
    here: Dict[str, str],
    beside: Dict[str, str],
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "tool" / "merge_contacts.py"
    (tmp_path / "here").mkdir()
    script.parent.mkdir()
    for folder, values in ((tmp_path / "here", here), (script.parent, beside)):
        lines = "".join(f"{name}={value}\n" for name, value in values.items())
        (folder / ".env").write_text(lines, encoding="utf-8")
        (folder / ".env").chmod(0o600)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tool, "__file__", str(script))
    for name in (TOKEN, URL):
        monkeypatch.setenv(name, environment.get(name, ""))
    settings = tool.load_settings(tool.load_environment(), 8)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console = tool.Console()
    if outcome == "refused":
        with pytest.raises(tool.FatalError) as stopped:
            tool.check_destination(settings, console)
        assert stopped.value.exit_code == 2
        for place in (settings.url_file, settings.token_file or "the environment"):
            assert place in str(stopped.value)
    else:
        tool.check_destination(settings, console)
    named = console.err.getvalue()  # type: ignore[attr-defined]
    assert named == (f"requests go to {OTHER}\n" if outcome == "named" else "")


FOREIGN = ["--check", "--csv contacts.csv", "--export new.csv", "--preview --live"]


@pytest.mark.parametrize("mode", FOREIGN)
def test_a_foreign_base_url_stops_whatever_makes_requests_and_nothing_else(
    place: Workplace, mode: str
) -> None:
    place.export(organisation_of_pairs(1)[0])
    path = place.folder / ".env"
    path.write_text(f"{URL}={OTHER}\n", encoding="utf-8")
    result = place.run(None, *mode.split(), check=2, DEVREV_API_TOKEN="token")
    assert f"{URL} is from {path}, and {TOKEN} from the environment" in result.err
    assert not (place.folder / "savepoint.db").exists()
    place.run(None, "--preview", check=0, DEVREV_API_TOKEN="token")


@posix
@pytest.mark.parametrize("mode, warns", [(0o644, True), (0o640, True), (0o600, False)])
def test_an_env_file_that_others_may_read_is_named_with_the_chmod(
    place: Workplace, mode: int, warns: bool
) -> None:
    place.export(organisation_of_pairs(1)[0])
    path = place.folder / ".env"
    path.write_text("DEVREV_TIMEOUT=30\n", encoding="utf-8")
    path.chmod(mode)
    assert place.run(None, "--preview", check=0).err.count(f"chmod 600 {path}") == int(warns)


# ----- strangers, links and modes -----------------------------------------------------------------


def owned_by(monkeypatch: pytest.MonkeyPatch, owners: Dict[str, int], me: int) -> None:
    """Let these paths of the current folder belong to these users; all else to user 1000."""

    def found(path: Path, result: os.stat_result, kind: str = "") -> os.stat_result:
        name = os.path.relpath(str(path))
        owner = owners.get(f"{kind}{name}", owners.get(name, 1000))
        return os.stat_result((*result[:4], owner, *result[5:]))

    monkeypatch.setattr(Path, "stat", lambda path, **_: found(path, os.stat(str(path))))  # noqa: PTH116
    monkeypatch.setattr(Path, "lstat", lambda path: found(path, os.lstat(str(path)), "link "))
    monkeypatch.setattr(os, "geteuid", lambda: me)


# The owners of the current folder and of what is in it, who runs, and whether that is accepted.
OWNERS = [
    ({}, 1000, True),
    ({"savepoint.db": 0}, 1000, True),
    ({"savepoint.db": 1001}, 1000, False),
    ({"savepoint.db-journal": 1001}, 1000, False),
    ({"backups": 1001}, 1000, False),
    ({"link backups": 1001}, 1000, False),  # made by a stranger, to a folder of one's own
    ({"logs": 1001}, 1000, False),
    ({"backups/savepoint-copy.db": 1001}, 1000, False),
    ({}, 0, True),  # root over a volume with another owner, or sudo
    ({"savepoint.db": 1001}, 0, False),
    ({".": 1001, "savepoint.db": 1001, "backups": 1001, "logs": 1001}, 1000, True),
]


@posix
@pytest.mark.parametrize("owners, me, accepted", OWNERS)
def test_no_file_of_a_stranger_is_taken_over(
    owners: Dict[str, int],
    me: int,
    accepted: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = tool.Environment(tool.ApiSettings(token=""))
    with contextlib.closing(tool.SavePoint(environment)):
        pass
    for name in ("logs", "reports"):
        environment.make_private_dir(Path(name))
    Path("savepoint.db-journal").touch()

    def use() -> None:
        for name in ("backups", "logs", "reports"):
            environment.make_private_dir(Path(name))
        for path in (tool.SAVEPOINT, tool.SAVEPOINT_COPY):
            tool.SavePointFile(path, environment).check_header()

    owned_by(monkeypatch, owners, me)
    if accepted:
        use()
        return
    with pytest.raises(tool.FatalError, match=f"chown -h {me} ") as stopped:
        use()
    (path,) = (one.rpartition(" ")[2] for one in owners)
    assert stopped.value.exit_code == 2 and f"{path} belongs to another user" in str(stopped.value)


@posix
def test_an_env_file_of_a_stranger_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".env").touch()
    owned_by(monkeypatch, {".env": 1001}, 1000)
    with pytest.raises(tool.FatalError, match=r"\.env belongs to another user"):
        tool.load_environment()


@posix
def test_nothing_is_written_through_a_link(place: Workplace) -> None:
    victim = place.folder / "victim"
    victim.write_text("mine", encoding="utf-8")
    for name in ("logs", "reports", "backups"):
        (place.folder / name).mkdir(mode=0o700)
    with place.serving() as (sandbox, pairs):
        place.run(sandbox, check=0, **place.machine(LINKS))
    assert victim.read_text(encoding="utf-8") == "mine"
    assert_merged(sandbox.organisation, pairs)
    for link in ("savepoint.db", "backups/savepoint-copy.db"):
        path = place.folder / link
        path.unlink()
        path.symlink_to(victim)
        assert "symbolic link" in place.run(None, "--status").err
        path.unlink()
    assert victim.read_text(encoding="utf-8") == "mine"


# Links under the names that a run is about to use, each made at the start of that very process.
LINKS = """
import time
names = [f"reports/.trial.{os.getpid()}", f".lock_trial.{os.getpid()}"]
for second in range(3):
    stamp = time.strftime("%Y%m%d_%H%M%S", time.gmtime(time.time() + second))
    names.append(f"logs/contact_merge_{stamp}.log")
    names.append(f"reports/.merge_report_{stamp}.json.{os.getpid()}")
for name in names:
    os.symlink(os.path.abspath("victim"), name)
"""


@posix
@pytest.mark.parametrize("name, mode, after", [
    ("reports", 0o775, 0o700), ("logs", 0o757, 0o700), ("backups", 0o777, 0o700),
    ("reports", 0o755, 0o755), ("logs", 0o750, 0o750), ("backups", 0o755, 0o700),
])  # fmt: skip
def test_folders_that_others_may_write_are_closed_with_one_line(
    place: Workplace, name: str, mode: int, after: int
) -> None:
    place.folder.chmod(0o777)
    (place.folder / name).mkdir()
    (place.folder / name).chmod(mode)
    with place.serving() as (sandbox, _):
        result = place.run(sandbox, check=0)
    assert (place.folder / name).stat().st_mode & 0o777 == after
    said = result.err.count(f"others could write to {name}; it is open to you alone now")
    assert said == bool(mode & 0o022)
    assert place.folder.stat().st_mode & 0o777 == 0o777, "the current folder is nobody's to change"


@posix
def test_backups_that_are_a_link_to_a_larger_disk_are_used_as_they_are(place: Workplace) -> None:
    disk = place.folder / "disk"
    disk.mkdir()
    disk.chmod(0o775)
    (place.folder / "backups").symlink_to(disk)
    with place.serving() as (sandbox, pairs):
        assert "warning" not in place.run(sandbox, check=0).err
    assert_merged(sandbox.organisation, pairs)
    assert disk.stat().st_mode & 0o777 == 0o775 and list(disk.glob("*/*/manifest.json"))


@posix
@pytest.mark.parametrize("is_refused", [False, True])
def test_where_modes_do_not_stick_one_warning_says_so(
    is_refused: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def chmod(*_: Any) -> None:
        if is_refused:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(tool.log, "propagate", True)
    for name in ("backups", "logs", "reports"):
        Path(name).mkdir()
        Path(name).chmod(0o777)
    monkeypatch.setattr(Path, "chmod", chmod)
    environment = tool.Environment(tool.ApiSettings(token=""))
    for name in ("backups", "logs", "reports"):
        environment.make_private_dir(Path(name))
    (record,) = caplog.records
    assert "permissions can't be set" in record.getMessage()


def test_calls_in_the_same_second_have_a_log_each(folder: Path) -> None:
    contexts = [tool.RunContext(tool.parse_options(["--check"])) for _ in range(3)]
    try:
        for one in contexts:
            one.open_log()
    finally:
        tool.log.handlers.clear()
        tool.log.propagate = True
    assert len({one.log_path for one in contexts}) == len(list(Path("logs").iterdir())) == 3


# ----- files that are read ------------------------------------------------------------------------


@posix
def test_only_regular_files_are_opened_and_nothing_is_waited_for(folder: Path) -> None:
    Path("file").write_bytes(b"x")
    Path("link").symlink_to("file")
    os.mkfifo("pipe")
    with tool.open_regular(Path("file")) as file:
        assert file.read() == b"x"
    for name in ("link", "pipe", "/dev/zero", ".", "nothing"):
        with pytest.raises(OSError):
            tool.open_regular(Path(name))
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            tool.create_anew(Path(name))


# ----- bodies that are compressed -----------------------------------------------------------------

BODY = json.dumps({"rev_users": []}).encode()
BOMB = BODY[:-1] + b" " * tool.HttpTransport.MAX_BODY + b"}"
ENCODINGS = [
    ("", BODY, True),
    ("identity", BODY, True),
    ("GZIP ", gzip.compress(BODY), True),
    ("deflate", zlib.compress(BODY), True),
    ("gzip", BODY, False),
    ("gzip", gzip.compress(BODY)[:-14], False),
    ("gzip, gzip", gzip.compress(gzip.compress(BODY)), False),
    ("br", BODY, False),
    ("gzip", gzip.compress(BOMB), False),
    ("", BOMB, False),
]


@pytest.mark.parametrize("encoding, body, is_usable", ENCODINGS, ids=range(len(ENCODINGS)))
def test_a_compressed_body_has_the_limit_of_a_plain_one(
    encoding: str, body: bytes, is_usable: bool
) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"
    url, listener = raw_server(head.encode() + body, b"", 0.0)
    transport = tool.HttpTransport(tool.ApiSettings(token="token", base_url=url))
    tracemalloc.start()
    try:
        answer = transport.post("rev-users.list", {}, 30)
        assert tracemalloc.get_traced_memory()[1] < 3 * transport.MAX_BODY
    finally:
        tracemalloc.stop()
        listener.close()
    assert transport._headers["Accept-Encoding"] == "identity"
    assert (answer.data == {"rev_users": []}) is is_usable
    assert bool(answer.problem) is not is_usable and answer.sent


def test_the_body_of_a_redirect_is_never_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would do so, before any limit counts, though redirects are not followed."""
    head = (
        b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/\r\nContent-Length: 2\r\n\r\n"
    )
    read_whole: List[int] = []
    content = property(lambda answer: read_whole.append(answer.status_code))
    monkeypatch.setattr(requests.Response, "content", content)
    url, listener = raw_server(head + b"{}", b"", 0.0)
    with listener:
        answer = tool.HttpTransport(tool.ApiSettings(token="token", base_url=url)).post("x", {}, 30)
    assert answer.status == 302 and not read_whole


def test_a_request_that_has_no_connection_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be sent again, whatever it is; after a silence it may have reached DevRev."""
    silent, listener = raw_server(b"", b"", 0.0)
    proxy, refusing = raw_server(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", b"", 0.0)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    places = {"http://127.0.0.1:9": False, "https://api.example.com": False, silent: True}
    with listener, refusing:
        for url, is_sent in places.items():
            transport = tool.HttpTransport(tool.ApiSettings(token="token", base_url=url))
            answer = transport.post("rev-users.merge", {}, 0.5)
            assert answer.status is None and answer.problem and answer.sent is is_sent, url


# ----- folder names that are not UTF-8 ------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs names of any bytes")
def test_a_folder_whose_name_is_no_utf_8_is_a_folder_like_any_other(place: Workplace) -> None:
    odd = Workplace(Path(os.fsdecode(os.fsencode(place.folder) + b"/caf\xe9 \xff")))
    odd.folder.mkdir()
    script = odd.folder / SCRIPT.name
    shutil.copy(str(SCRIPT), str(script))
    with odd.serving(2) as (sandbox, pairs):

        def run(*options: str) -> str:
            done = odd.exactly(sandbox, *options, script=str(script))
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
            return done.stdout

        csv_path = str(odd.folder / "contacts.csv")
        run("--csv", csv_path, "--preview")
        run("--csv", csv_path, "--yes", "--json")
        assert_merged(sandbox.organisation, pairs)
        for mode in ("--status", "--check", "--verify-backups"):
            json.loads(run(mode, "--json"))
        report = min((odd.folder / "reports").glob("*.json"))
        run("--undo", str(report), "--yes")
        run("--export", str(odd.folder / "new.csv"))


# ----- a power cut --------------------------------------------------------------------------------


RECORDER = """
import http.client
events = open("events.txt", "w", buffering=1)
flush = os.fsync
def tell(*words):
    events.write(" | ".join(str(word) for word in words) + chr(10))
def recording_fsync(handle):
    flush(handle)
    tell("flush", os.readlink(f"/proc/self/fd/{handle}"))
os.fsync = recording_fsync
def record(event, given):
    is_new = event == "open" and given[2] & os.O_CREAT and not isinstance(given[0], int)
    if is_new or event in ("os.mkdir", "os.rename", "os.remove"):
        paths = given[: 2 if event == "os.rename" else 1]
        tell(event, *[os.path.abspath(path) for path in paths])
sys.addaudithook(record)
putrequest = http.client.HTTPConnection.putrequest
def recording_putrequest(self, method, url, *args, **options):
    tell("request", url)
    return putrequest(self, method, url, *args, **options)
http.client.HTTPConnection.putrequest = recording_putrequest
"""


def lost_in_a_power_cut(events: List[List[str]]) -> Dict[str, Set[str]]:
    """Return what a power cut could lose at each merge request, and at the end of a run.

    A file is on the disk once it is flushed, its name or a folder's once the folder is that it is
    in. A rename of what is not on the disk yet is an error at once.
    """
    contents: Set[str] = set()  # files whose content may be lost
    names: Set[str] = set()  # paths that may be lost
    found: Dict[str, Set[str]] = {}
    for number, (what, path, *more) in enumerate(events):
        if what == "open":
            contents.add(path)
        if what in ("open", "os.mkdir"):
            names.add(path)
        if what == "flush":
            contents.discard(path)
            names = {one for one in names if str(Path(one).parent) != path}
        if what == "os.remove":
            contents.discard(path)
            names.discard(path)
        if what == "os.rename":
            inside = {one for one in contents | names if one.startswith(f"{path}/")}
            assert not inside and path not in contents, f"{path} is renamed before it is flushed"
            names.discard(path)
            names.add(more[0])
        if what == "request" and path.endswith("rev-users.merge"):
            found[str(number)] = contents | names
    found["the end"] = contents | names
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_power_cut_loses_no_backup_of_a_requested_merge_and_no_report(place: Workplace) -> None:
    with place.serving() as (sandbox, pairs):
        place.run(sandbox, check=0, **place.machine(RECORDER))
    lines = (place.folder / "events.txt").read_text(encoding="utf-8").splitlines()
    moments = lost_in_a_power_cut([line.split(" | ") for line in lines])
    assert len(moments) == len(pairs) + 1
    for moment, lost in moments.items():
        assert [path for path in lost if "/logs/" not in path] == [], moment
    assert sum("manifest.json" in line and line.startswith("open") for line in lines) == 1
    assert sum("/reports/" in line and line.startswith("os.rename") for line in lines) == 3


def test_each_write_of_the_savepoint_is_flushed_by_sqlite(folder: Path) -> None:
    with contextlib.closing(tool.SavePoint(tool.Environment(tool.ApiSettings("")))) as savepoint:
        for file in savepoint.files:
            ((synchronous,),) = file.db.execute("PRAGMA synchronous").fetchall()
            ((journal,),) = file.db.execute("PRAGMA journal_mode").fetchall()
            assert synchronous in (2, 3) and journal == "delete"  # FULL or EXTRA
