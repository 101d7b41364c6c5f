"""The CSV made from DevRev itself: what the warehouse would give, at little cost, whole or not."""

import csv
import errno
import io
import json
import os
import random
import re
import signal
import tempfile
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any, Dict, List, Sequence
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_contacts as tool
from tests.sandbox import Fault, Organisation, Sandbox
from tests.simulation.scene import Scene
from tests.support import COLUMNS, Row, Workplace, diagonal, export_row, pair

posix = pytest.mark.skipif(os.name == "nt", reason="Windows sends programs no such signals")
ORG = "example.org"
NEW = Path("new.csv")
GONE = ("/G0", "/G1", "/H0", "/H1")


def seed(organisation: Organisation) -> Organisation:
    """388 contacts of two domains: 30 pairs in example.com, 10 in example.org, and other kinds."""
    chance = random.Random(11)
    for number in range(1, 31):
        pair(organisation, number, (chance.randint(0, 4), chance.randint(0, 4)))
    for number in range(31, 41):
        email = f"person{number}@{ORG}"
        both = (
            organisation.add_contact(f"P{number}", email.upper()),
            organisation.add_contact(f"D{number}", email, f"user_{number}"),
        )
        for one in both * chance.randint(0, 2):
            organisation.add_work([one], both[0], both, kind="issue")
    for _ in range(120):  # more than a page, in one role
        organisation.add_work(reported_by=[organisation.don("identity", "revu", "P7")])
    for number in range(6):
        organisation.add_contact(f"M{number}", "front.desk@example.com", f"user_m{number}")
    organisation.add_contact("L1", "gone@example.com", "user_l1", state="locked")
    organisation.add_contact("L2", "Gone@Example.com", "user_l2", state="deactivated")
    organisation.add_contact("L3", f"gone@{ORG}", "user_l3", state="shadow")
    for number, name in enumerate(("person1", "ada")):  # they no longer exist: Ada has one contact
        organisation.add_contact(f"G{number}", f"{name}@example.com", state="deleted")
        organisation.add_contact(f"H{number}", f"{name}@example.com", primary_identity={"id": "x"})
    organisation.add_contact("G3", "ada@example.com")
    for number in range(4):  # nobody's email, and references that take no part
        organisation.add_contact(f"O{number}", "other@example.com", f"other-{number}")
        organisation.add_contact(f"E{number}", None, f"user_e{number}")
        organisation.add_contact(f"U{number}", "upper@example.com", f"User_{number}")
    organisation.add_contact("O9", "other@example.com")
    organisation.add_contact("X1", "person1@example.com.elsewhere.net", "user_x1")
    while len(organisation.contacts) < 388:
        number = len(organisation.contacts)
        domain = ORG if number % 3 else "example.com"
        reference = f"user_s{number}" if number % 2 else None
        organisation.add_contact(f"S{number}", f"single{number}@{domain}", reference)
    return organisation


@pytest.fixture
def seeded(scene: Scene) -> Scene:
    seed(scene.organisation)
    return scene


def warehouse(organisation: Organisation, domains: Sequence[str] = ()) -> Dict[str, Row]:
    """What the README's query selects, of emails that recur among what it selects."""
    users = organisation.contacts.items()
    there = [one for one, user in users if user.get("email") and not one.endswith(GONE)]
    rows = [export_row(organisation, one) for one in there]
    endings = tuple(f"@{domain}" for domain in domains) or ("",)
    rows = [row for row in rows if row["EXTERNAL_REF"].startswith(("REVU-", "user_"))]
    rows = [row for row in rows if row["EMAIL"].lower().endswith(endings)]
    times = Counter(row["EMAIL"].lower() for row in rows)
    return {
        row["REV_USER_ID"]: {name: str(row[name]) for name in COLUMNS}
        for row in rows
        if times[row["EMAIL"].lower()] > 1
    }


def rows_of(path: Path = NEW) -> Dict[str, Dict[str, str]]:
    """What a spreadsheet shows: no byte order mark, and no apostrophe before a formula."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, cell in row.items():
            row[name] = re.sub(r"^'(?='*[=+\-@\t\r])", "", cell)
    assert len({row["REV_USER_ID"] for row in rows}) == len(rows)
    return {row["REV_USER_ID"]: row for row in rows}


def test_an_export_is_what_the_warehouse_gives_and_a_run_on_it_merges_every_pair(
    seeded: Scene,
) -> None:
    seeded.world.set_quota(100, 3.0)
    domains = ("--domain", "example.com", "--domain", "@Example.ORG ")
    run = seeded.run("--export", "contacts.csv", *domains)
    rows = rows_of(Path("contacts.csv"))
    assert run.code == 0 and len(rows) == 88
    assert rows == warehouse(seeded.organisation, ["example.com", ORG])
    assert len(run.requests) <= 60
    assert {one.endpoint for one in run.requests} == {"rev-users.list", "works.list"}
    emails = [row["EMAIL"].lower() for row in rows.values()]
    assert emails == sorted(emails) and "--csv contacts.csv --preview" in run.err
    assert {"88", "42"} <= set(re.findall(r"\d+", run.out))
    assert os.name == "nt" or Path("contacts.csv").stat().st_mode & 0o777 == 0o600
    summary = seeded.merge().report["summary"]
    assert (summary["successful_merges"], summary["skipped_groups"]) == (40, 2)


@pytest.mark.parametrize("domains", [[], [ORG], ["example.com"], ["com"], ["nowhere.example"]])
def test_only_emails_of_the_domains_are_exported(seeded: Scene, domains: List[str]) -> None:
    options = [word for domain in domains for word in ("--domain", domain)]
    run = seeded.run("--export", "new.csv", *options)
    expected = warehouse(seeded.organisation, domains)
    assert run.code == 0 and rows_of() == expected
    assert NEW.read_bytes().splitlines()[0] == b"\xef\xbb\xbf" + ",".join(COLUMNS).encode()


HARMLESS: Dict[str, Dict[str, Any]] = {
    "a small quota": {"quota": (4, 0.3)},
    "few ids a call": {"max_ids": 7},
    "faults": {"faults": ["503", "429", "cut", "reset-after"]},
    "a request that arrives twice": {"faults": ["doubled"]},
    "pages that overlap": {"paging": "overlap"},
    "a page that comes again twice": {"paging": "again", "paging_times": 2},
    "cursors that expire once": {"cursor_life": 0.05, "until": 1.0},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_an_export_is_the_same_whatever_it_has_to_go_through(seeded: Scene, name: str) -> None:
    switches = dict(HARMLESS[name])
    for kind in switches.pop("faults", ()):
        seeded.fault(kind, "*" if kind != "doubled" else "rev-users.list", chance=0.1)
    if "quota" in switches:
        seeded.world.set_quota(*switches.pop("quota"))
    if switches.pop("until", None):
        seeded.after("rev-users.list", lambda _: vars(seeded.world).update(cursor_life=None), n=2)
    vars(seeded.world).update(switches)
    assert seeded.run("--export", "new.csv").code == 0
    assert rows_of() == warehouse(seeded.organisation)


FATAL = [
    ({"paging": "again"}, {}, 3, "its items move"),
    ({"cursor_life": 0.05}, {}, 3, "its cursors expire"),
    ({"firewall": ["limit"]}, {}, 3, "firewall"),
    ({}, {"kind": "401", "endpoint": "works.list"}, 2, "DEVREV_API_TOKEN"),
    ({}, {"kind": "403", "endpoint": "works.list"}, 2, "ticket:read"),
    ({}, {"kind": "route-404"}, 2, "DEVREV_BASE_URL"),
    ({}, {"kind": "503", "skip": 3}, 3, "keeps failing"),
    ({}, {"kind": "endless", "endpoint": "rev-users.list"}, 3, "bring nothing new"),
    ({}, {"kind": "429"}, 3, "429"),
]


@pytest.mark.parametrize("switches, fault, code, says", FATAL)
def test_an_export_that_can_not_be_read_to_its_end_leaves_nothing(
    seeded: Scene, switches: Dict[str, Any], fault: Dict[str, Any], code: int, says: str
) -> None:
    vars(seeded.world).update(switches)
    if fault:
        seeded.fault(**fault)
    run = seeded.run("--export", "new.csv")
    assert run.code == code and says in run.err and "Traceback" not in run.err
    assert not NEW.exists()


def test_half_an_emoji_in_a_name_does_not_keep_a_file_from_being_written() -> None:
    content = b"".join(tool.csv_chunks(["name"], [["\ud83d x"]]))
    assert content.decode("utf-8-sig").splitlines()[1].endswith(" x")


ODD = st.sampled_from("'=+-@\t\r\n\"")
# U+FDD0, a code point that is no character, stands for a NUL while a file is read.
CELLS = st.text(
    st.one_of(st.characters(blacklist_characters="\0\ufdd0", blacklist_categories=["Cs"]), ODD),
    max_size=6,
)
EMAILS = ["ada@example.com", "=1@example.com", "-ada@example.com", "'=x@example.com", "straße@x"]
SPLIT = r"([;\t\r\n])(?=[\"']*[=+\-@\t\r])"  # where a spreadsheet may begin a cell, with a formula
PEOPLE = st.builds(
    tool.Contact,
    id=st.integers(0, 99).map("don:identity:dvrv-us-1:devo/SANDBOX1:revu/{}".format),
    display_name=CELLS,
    email=st.sampled_from(EMAILS),
    external_ref=st.sampled_from(["REVU-1", "user_1", "=cmd", "'+1", "@x"]),
    full_name=CELLS,
    tickets=st.integers(0, 10**9),
    created=st.sampled_from(["2024-01-01T00:00:00.000Z", "", "-"]),
    updated=CELLS,
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(PEOPLE, min_size=1, max_size=5, unique_by=lambda one: one.id))
def test_what_an_export_writes_reads_back_as_it_was(rows: List[tool.Contact]) -> None:
    content = b"".join(tool.csv_chunks(COLUMNS, (map(str, astuple(one)) for one in rows)))
    assert content.startswith(b"\xef\xbb\xbf")
    for line in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")):
        assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in line), "a formula"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        path.write_bytes(content)
        contents = tool.ContactReader([path]).read([one.email for one in rows])
    assert contents.invalid_rows == []
    for row in rows:
        row.display_name = re.sub(SPLIT, r"\1 ", row.display_name).strip()
        row.full_name = re.sub(SPLIT, r"\1 ", row.full_name).strip()
        row.updated = row.updated.strip()
    assert contents.contacts == rows


def test_addresses_that_look_alike_recur_too(scene: Scene) -> None:
    emails = ["strasse@example.com", "stra\u00dfe@example.com"]
    for key, email in zip("AB", emails):
        scene.organisation.add_contact(key, email)
    assert scene.run("--export", "new.csv").code == 0 and len(rows_of()) == 2
    (found,) = json.loads(scene.run("--csv", "new.csv", "--preview", "--json").out)["look_alikes"]
    assert found["emails"] == emails


def test_an_export_counts_what_the_integrity_check_counts(scene: Scene) -> None:
    """Tasks and the like are in the backup, and TICKET_COUNT leaves them out."""
    both = scene.pair(1)
    scene.world.long_work_types = True
    for _ in range(5):
        scene.organisation.add_work([both[0]], kind="task")
    assert scene.run("--export", "contacts.csv").code == 0
    counts = [row["TICKET_COUNT"] for row in rows_of(Path("contacts.csv")).values()]
    assert sorted(counts) == ["1", "2"] and scene.merge().code == 0 and scene.merged(both)


@pytest.mark.parametrize("can_link", [True, False])
def test_a_new_file_never_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    if not can_link:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.ENOTSUP, "x")))
    environment, path = tool.Environment(tool.ApiSettings(token="")), tmp_path / ("x" * 250)
    flushed = Mock()
    monkeypatch.setattr(environment, "fsync_dir", flushed)
    tool.write_new_file(environment, path, [b"one"])
    flushed.assert_called_with(tmp_path)
    with pytest.raises(tool.FatalError, match="already exists"):
        tool.write_new_file(environment, path, [b"two"])
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"")  # as a kill may have left it
    tool.write_new_file(environment, path, [b"three"])
    assert path.read_bytes() == b"three" and list(tmp_path.iterdir()) == [path]


@posix
@pytest.mark.parametrize(
    "path",
    ["taken/file.csv", "taken", "link", "dangling", "missing/new.csv", "taken/file.csv/new.csv"],
)
def test_a_path_that_can_not_be_written_is_refused_before_any_request(
    scene: Scene, path: str
) -> None:
    scene.pair(1)
    Path("taken").mkdir()
    Path("taken/file.csv").write_text("mine", encoding="utf-8")
    Path("empty").touch()
    Path("link").symlink_to("empty")
    Path("dangling").symlink_to("nowhere")
    run = scene.run("--export", path)
    assert run.code == 2 and run.requests == [] and f"error: {path} " in run.err
    assert Path("taken/file.csv").read_text(encoding="utf-8") == "mine"
    assert Path("empty").stat().st_size == 0 and not Path("nowhere").exists()


def test_a_file_that_appears_meanwhile_is_left_as_it_is(seeded: Scene) -> None:
    seeded.before("works.list", lambda _: NEW.write_text("somebody's", encoding="utf-8"))
    assert seeded.run("--export", "new.csv").code == 2
    assert NEW.read_text(encoding="utf-8") == "somebody's"


@posix
@pytest.mark.parametrize(
    "name, at",
    diagonal(("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"), ("rev-users.list", "works.list")),
)
def test_an_interrupted_export_leaves_nothing(place: Workplace, name: str, at: str) -> None:
    code = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}[name]
    process: List[Any] = []

    def look(stage: str, request: Any) -> None:
        if stage == "before" and request.endpoint == at and process:
            process.pop().send_signal(getattr(signal, name))

    faults = [Fault("hang", at, skip=1, detail=30)]
    with Sandbox(seed(Organisation()), on_request=look, latency=0.1, faults=faults) as sandbox:
        started = place.start(sandbox, "--export", "contacts.csv")
        process.append(started)
        _, err = started.communicate(timeout=20)
        assert started.returncode == code and "Traceback" not in err, err
    assert [path for path in place.files() if "logs" not in path.parts] == []
