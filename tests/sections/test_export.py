"""The CSV made from DevRev itself: it is what the warehouse would give, it costs little, and it leaves nothing half done."""

import csv
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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_contacts as tool
from tests.sandbox import Fault, Organisation, Sandbox
from tests.support import COLUMNS, Row, Workplace, assert_merged, diagonal, export_row, pair

posix = pytest.mark.skipif(
    os.name == "nt", reason="signals are not sent to Windows programs like this"
)
ORG = "example.org"


@pytest.fixture
def seeded() -> Organisation:
    """388 contacts of two domains: 40 pairs, 30 in example.com and 10 in example.org, and others of many kinds."""
    organisation, chance = Organisation(), random.Random(11)
    for number in range(1, 31):
        pair(organisation, number, (chance.randint(0, 4), chance.randint(0, 4)))
    for number in range(31, 41):
        email = f"person{number}@{ORG}"
        both = (
            organisation.add_contact(f"P{number}", email.upper()),
            organisation.add_contact(f"D{number}", email, f"user_{number}"),
        )
        for one in both * chance.randint(0, 2):
            organisation.add_work(
                owned_by=[one], created_by=both[0], reported_by=both, kind="issue"
            )
    for index in range(120):  # more than a page, in one role
        organisation.add_work(
            reported_by=[organisation.don("identity", "revu", "P7")], title=f"More {index}"
        )
    for number in range(6):
        organisation.add_contact(f"M{number}", "front.desk@example.com", f"user_m{number}")
    organisation.add_contact("L1", "gone@example.com", "user_l1", state="locked")
    organisation.add_contact("L2", "Gone@Example.com", "user_l2", state="deactivated")
    organisation.add_contact("L3", f"gone@{ORG}", "user_l3", state="shadow")
    for number in range(4):  # nobody's email, and references that take no part
        organisation.add_contact(f"O{number}", "other@example.com", f"other-{number}")
        organisation.add_contact(f"E{number}", None, f"user_e{number}")
        organisation.add_contact(f"U{number}", "upper@example.com", f"User_{number}")
    organisation.add_contact("O9", "other@example.com")
    organisation.add_contact("X1", "person1@example.com.elsewhere.net", "user_x1")
    while len(organisation.contacts) < 388:
        number = len(organisation.contacts)
        domain = ORG if number % 3 else "example.com"
        organisation.add_contact(
            f"S{number}", f"single{number}@{domain}", f"user_s{number}" if number % 2 else None
        )
    return organisation


def warehouse(organisation: Organisation, domains: Sequence[str] = ()) -> List[Row]:
    """What the README's query selects, of emails that recur among what it selects."""
    rows = [
        export_row(organisation, one)
        for one, user in organisation.contacts.items()
        if user.get("email")
    ]
    endings = tuple(f"@{domain}" for domain in domains) or ("",)
    rows = [row for row in rows if row["EXTERNAL_REF"].startswith(("REVU-", "user_"))]
    rows = [row for row in rows if row["EMAIL"].lower().endswith(endings)]
    times = Counter(row["EMAIL"].lower() for row in rows)
    return [
        {name: str(row[name]) for name in COLUMNS}
        for row in rows
        if times[row["EMAIL"].lower()] > 1
    ]


def rows_of(path: Path) -> List[Dict[str, str]]:
    """What a spreadsheet shows of a file: the byte order mark and the apostrophe before a formula are not in the cells."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: re.sub(r"^'(?='*[=+\-@\t\r])", "", cell) for name, cell in row.items()}
        for row in rows
    ]


def by_id(rows: Sequence[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    assert len({row["REV_USER_ID"] for row in rows}) == len(rows)
    return {row["REV_USER_ID"]: row for row in rows}


def test_an_export_is_what_the_warehouse_gives_and_a_run_on_it_merges_every_pair(
    place: Workplace, seeded: Organisation
) -> None:
    expected = warehouse(seeded, ["example.com", ORG])
    with Sandbox(seeded, quota=(100, 3.0)) as sandbox:
        domains = ["--domain", "example.com", "--domain", "@Example.ORG "]
        result = place.run(sandbox, "--export", "contacts.csv", *domains, check=0)
        assert by_id(rows_of(place.csv)) == by_id(expected) and len(expected) == 88
        assert len(sandbox.requests) <= 60
        assert {one.endpoint for one in sandbox.requests} == {"rev-users.list", "works.list"}
        emails = [row["EMAIL"].lower() for row in rows_of(place.csv)]
        assert emails == sorted(emails)
        assert {"388", "88", "42", str(len(sandbox.requests))} <= set(
            re.findall(r"\d+", result.out)
        )
        assert "--csv contacts.csv --preview" in result.err
        if os.name != "nt":
            assert place.csv.stat().st_mode & 0o777 == 0o600
        report = place.run(sandbox, "--yes", check=0).report
    assert (report["summary"]["successful_merges"], report["summary"]["skipped_groups"]) == (40, 2)
    don = seeded.don
    assert_merged(
        seeded,
        [
            (don("identity", "revu", f"P{n}"), don("identity", "revu", f"D{n}"))
            for n in range(1, 41)
        ],
    )


@pytest.mark.parametrize("domains", [[], [ORG], ["example.com"], ["com"], ["nowhere.example"]])
def test_only_emails_of_the_domains_are_exported(
    place: Workplace, seeded: Organisation, domains: List[str]
) -> None:
    options = [word for domain in domains for word in ("--domain", domain)]
    with Sandbox(seeded) as sandbox:
        result = place.run(sandbox, "--export", "contacts.csv", *options, check=0)
    expected = warehouse(seeded, domains)
    assert by_id(rows_of(place.csv)) == by_id(expected)
    assert ("--preview" in result.err) == bool(expected)
    assert place.csv.read_bytes().splitlines()[0] == b"\xef\xbb\xbf" + ",".join(COLUMNS).encode()


@pytest.mark.parametrize(
    "conditions",
    [
        {"quota": (4, 0.3)},
        {"max_ids": 7},
        {"faults": [Fault("503", "*", 0.2), Fault("429", "*", 0.1), Fault("cut", "*", 0.1), Fault("reset-after", "*", 0.1)]},
        {"faults": [Fault("doubled", "rev-users.list", skip=1, times=1)]},
    ],
    ids=["a small quota", "few ids a call", "faults", "doubled"],
)  # fmt: skip
def test_an_export_is_the_same_whatever_it_has_to_go_through(
    place: Workplace, seeded: Organisation, conditions: Dict[str, Any]
) -> None:
    with Sandbox(seeded, **conditions) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=0)
    assert by_id(rows_of(place.csv)) == by_id(warehouse(seeded))


def test_a_contact_that_the_list_shows_twice_is_one_contact(
    place: Workplace, seeded: Organisation
) -> None:
    def again(content: Any) -> Any:
        shown = content["rev_users"]
        return {
            **content,
            "rev_users": [
                *shown,
                *({**user, "modified_date": "2026-01-01T00:00:00.000Z"} for user in shown),
            ],
        }

    expected = [{**row, "UPDATED_AT": "2026-01-01T00:00:00.000Z"} for row in warehouse(seeded)]
    with Sandbox(seeded, faults=[Fault("changed", "rev-users.list", detail=again)]) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=0)
    assert by_id(rows_of(place.csv)) == by_id(expected)


def test_whatever_a_contact_is_called_comes_back_from_the_file(place: Workplace) -> None:
    names = [
        'a "quoted", name',
        "two\r\nlines",
        "a\rreturn",
        "tab\tand\x1b[31m",
        "=1+1",
        "'=1+1",
        "+44 20",
        "-",
        "@SUM(A1)",
        "\t=1",
        "'Ada'",
        "\u202eevil",
        "名前",
        "\ud800 alone",
        " ",
    ]
    organisation = Organisation()
    for number, name in enumerate(names):
        pair(organisation, number, full_name=name)
    with Sandbox(organisation, merge_delay=0.05) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=0)
        found = {row["FULL_NAME"] for row in rows_of(place.csv)}
        assert found >= set(names) - {"\ud800 alone"} and len(found) == len(names)
        place.run(sandbox, check=0)
    assert len(organisation.merges) == len(names)


cells = st.text(
    st.one_of(
        st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]),
        st.sampled_from("'=+-@\t\r\n\""),
    ),
    max_size=6,
)
people = st.builds(
    tool.Contact,
    id=st.integers(0, 99).map("don:identity:dvrv-us-1:devo/SANDBOX1:revu/{}".format),
    display_name=cells,
    email=st.sampled_from(
        [
            "ada@example.com",
            "=1@example.com",
            "-ada@example.com",
            "'=x@example.com",
            "stra\u00dfe@x",
        ]
    ),
    external_ref=st.sampled_from(["REVU-1", "user_1", "=cmd", "'+1", "@x"]),
    full_name=cells,
    tickets=st.integers(0, 10**9),
    created=st.sampled_from(["2024-01-01T00:00:00.000Z", "", "-"]),
    updated=cells,
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(people, min_size=1, max_size=5, unique_by=lambda one: one.id))
def test_what_an_export_writes_reads_back_as_it_was(rows: List[tool.Contact]) -> None:
    content = b"".join(tool.csv_chunks(COLUMNS, (map(str, astuple(one)) for one in rows)))
    assert content.startswith(b"\xef\xbb\xbf")
    for line in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")):
        assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in line), (
            "a spreadsheet takes it for a formula"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        path.write_bytes(content)
        contents = tool.read_contacts([path], [one.email for one in rows])
    assert contents.contacts == rows and contents.invalid_rows == []


def test_deleted_and_merged_contacts_are_left_out_and_look_alikes_are_not(place: Workplace) -> None:
    made = Organisation()
    for key, email, fields in (
        ("A1", "ada@example.com", {}), ("A2", "Ada@Example.com", {}), ("A3", "ada@example.com", {"state": "deleted"}),
        ("E1", "eve@example.com", {}), ("E2", "eve@example.com", {"state": "deleted"}),
        ("F1", "fay@example.com", {}), ("F2", "fay@example.com", {"primary_identity": {"id": "x"}}),
        ("S1", "stra\u00dfe@example.com", {}), ("S2", "strasse@example.com", {}), ("L1", "ada@example.com", {"state": "locked"}),
    ):  # fmt: skip
        made.add_contact(key, email, **fields)
    with Sandbox(made) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=0)
    assert sorted(row["REV_USER_ID"].rpartition("/")[2] for row in rows_of(place.csv)) == [
        "A1",
        "A2",
        "L1",
        "S1",
        "S2",
    ]
    plan = json.loads(place.run(None, "--preview", "--json", check=0).out)
    (found,) = plan["look_alikes"]
    assert (
        found["emails"] == ["strasse@example.com", "stra\u00dfe@example.com"]
        and len(found["lines"]) == 2
    )


def test_an_export_counts_what_the_integrity_check_counts(place: Workplace) -> None:
    """Tasks and the like are in the backup, and TICKET_COUNT leaves them out; the manifest names the kinds."""
    organisation = Organisation()
    both = pair(organisation, 1, (2, 1))
    for _ in range(5):
        organisation.add_work([both[0]], kind="task")
    with Sandbox(organisation, long_work_types=True) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=0)
        assert sorted(row["TICKET_COUNT"] for row in rows_of(place.csv)) == ["1", "2"]
        (entry,) = place.run(sandbox, check=0).report["successful_merges"]
    manifest = json.loads(
        (place.folder / entry["backup"] / "manifest.json").read_text(encoding="utf-8")
    )
    assert {"ticket", "issue", "task"} <= set(manifest["work_kinds"])
    assert_merged(organisation, [both])


def test_an_empty_file_that_a_kill_has_left_is_replaced(
    place: Workplace, seeded: Organisation
) -> None:
    place.csv.write_bytes(b"")
    with Sandbox(seeded) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=0)
        assert len(rows_of(place.csv)) == 88 and set(left(place)) == {"contacts.csv"}
        place.run(sandbox, "--export", "contacts.csv", check=2)


@pytest.mark.parametrize(
    "error", [PermissionError(1, "x"), OSError(95, "x"), NotImplementedError(), None]
)
def test_a_new_file_never_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def link(*_: Any) -> None:
        raise error

    if error:
        monkeypatch.setattr(os, "link", link)
    environment, path = tool.Environment(tool.ApiSettings(token="")), tmp_path / ("x" * 250)
    tool.write_new_file(environment, path, [b"one"])
    with pytest.raises(FileExistsError):
        tool.write_new_file(environment, path, [b"two"])
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"")
    tool.write_new_file(environment, path, [b"three"])
    assert path.read_bytes() == b"three" and list(tmp_path.iterdir()) == [path]


def in_the_way(place: Workplace, what: str) -> str:
    (place.folder / "taken").mkdir()
    (place.folder / "taken" / "file.csv").write_text("mine", encoding="utf-8")
    if what == "link":
        (place.folder / "link").symlink_to("nowhere")
    if what == "locked/new.csv":
        (place.folder / "locked").mkdir(mode=0o500)
    return what


@posix
@pytest.mark.parametrize(
    "path",
    [
        "taken/file.csv",
        "taken",
        "link",
        "missing/new.csv",
        "taken/file.csv/new.csv",
        "locked/new.csv",
    ],
)
def test_a_path_that_can_not_be_written_is_refused_before_any_request(
    place: Workplace, seeded: Organisation, path: str
) -> None:
    if path.startswith("locked") and os.geteuid() == 0:
        pytest.skip("nothing is locked to root")
    with Sandbox(seeded) as sandbox:
        result = place.run(sandbox, "--export", in_the_way(place, path), check=2)
        assert sandbox.requests == []
    assert f"error: {path} " in result.err
    assert left(place) == {"taken/file.csv": "mine"}


def left(place: Workplace) -> Dict[str, str]:
    """All files but the logs."""
    files = {path.relative_to(place.folder).as_posix(): path for path in place.files()}
    return {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if not name.startswith("logs/")
    }


def test_a_file_that_appears_meanwhile_is_left_as_it_is(
    place: Workplace, seeded: Organisation
) -> None:
    def look(stage: str, request: Any) -> None:
        if request.endpoint == "works.list":
            place.csv.write_text("somebody's", encoding="utf-8")

    with Sandbox(seeded, on_request=look) as sandbox:
        place.run(sandbox, "--export", "contacts.csv", check=2)
    assert left(place) == {"contacts.csv": "somebody's"}


@posix
@pytest.mark.parametrize(
    "name, at",
    diagonal(("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"), ("rev-users.list", "works.list")),
)
def test_an_interrupted_export_leaves_nothing(
    place: Workplace, seeded: Organisation, name: str, at: str
) -> None:
    code = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}[name]
    process: List[Any] = []

    def look(stage: str, request: Any) -> None:
        if stage == "before" and request.endpoint == at and process:
            process.pop().send_signal(getattr(signal, name))

    with Sandbox(
        seeded, on_request=look, latency=0.1, faults=[Fault("hang", at, skip=1, detail=30)]
    ) as sandbox:
        started = place.start(sandbox, "--export", "contacts.csv")
        process.append(started)
        _, err = started.communicate(timeout=20)
        assert started.returncode == code, err
    assert left(place) == {} and "Traceback" not in err


@pytest.mark.parametrize(
    "faults, code, says",
    [
        ([Fault("401")], 2, "DEVREV_API_TOKEN"),
        ([Fault("401", "works.list")], 2, "DEVREV_API_TOKEN"),
        ([Fault("403", "rev-users.list")], 2, "rev_user:read"),
        ([Fault("403", "works.list")], 2, "ticket:read"),
        ([Fault("route-404")], 2, "DEVREV_BASE_URL"),
        ([Fault("503", skip=3)], 3, "can't be reached"),
        ([Fault("reset-before", "works.list")], 3, "can't be reached"),
        ([Fault("endless", "rev-users.list")], 3, "bring nothing new"),
        (
            [Fault("changed", "rev-users.list", detail=lambda _: {"rev_users": [{"email": "x"}]})],
            3,
            "objects with an id",
        ),
    ],
)
def test_an_export_that_can_not_be_read_to_its_end_leaves_nothing(
    place: Workplace, seeded: Organisation, faults: List[Fault], code: int, says: str
) -> None:
    with Sandbox(seeded, faults=faults) as sandbox:
        result = place.run(sandbox, "--export", "contacts.csv", check=code, DEVREV_MAX_RETRIES="1")
    assert says in result.err and left(place) == {}


@pytest.mark.parametrize(
    "options",
    ["--csv contacts.csv", "--preview", "--check", "--status", "--verify-backups", "--json", "--email ada@example.com",
     "--limit 1", "--choices choices.csv", "--undo backups", "--settle ada@example.com", "--domain", "--domain a@b", "--domain @"],
)  # fmt: skip
def test_an_export_goes_with_no_other_mode(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: str
) -> None:
    monkeypatch.chdir(place.folder)
    with pytest.raises(SystemExit) as end:
        tool.main(["--export", "new.csv", *options.split()])
    _, err = capsys.readouterr()
    assert end.value.code == 2 and "Traceback" not in err
    assert re.search(r"^error: .*\S$", err, re.MULTILINE)
    assert place.files() == []


def test_a_domain_without_an_export_and_an_export_without_a_token_do_nothing(
    place: Workplace,
) -> None:
    assert "--domain goes with --export" in place.run(None, "--domain", "example.com", check=2).err
    assert (
        "DEVREV_API_TOKEN"
        in place.run(None, "--export", "new.csv", check=2, DEVREV_API_TOKEN="").err
    )
    assert left(place) == {}


def test_a_quiet_export_says_what_it_did_and_no_more(
    place: Workplace, seeded: Organisation
) -> None:
    with Sandbox(seeded) as sandbox:
        result = place.run(sandbox, "--export", "contacts.csv", "--quiet", check=0)
    assert result.err == "" and "--preview" not in result.out and len(result.out.splitlines()) == 3
