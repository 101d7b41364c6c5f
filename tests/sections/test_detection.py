"""Which contacts are one person: the rules, above all against a slow and obvious reference."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import tempfile
import unicodedata
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any, Iterable, Iterator, Mapping, Tuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import merge_contacts as tool
from merge_contacts import Contact, Group, Pair, Plan, State
from tests.simulation import expected as second_opinion
from tests.simulation.expected import email_key
from tests.support import COLUMNS

ORG = "don:identity:dvrv-us-1:devo/SANDBOX1:revo/ACME"
ADA, EVE = "ada@example.com", "eve@example.com"
Cells = Tuple[str, ...]


def examples(count: int) -> settings:
    """So many in CI; fewer in the fast run (see conftest)."""
    return settings(
        max_examples=count * settings.default.max_examples // 100,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def don(key: str) -> str:
    return f"don:identity:dvrv-us-1:devo/SANDBOX1:revu/{key}" if key else ""


def contact(
    key: str, reference: str, tickets: int = 0, created: str = "2024-01-01", email: str = ADA
) -> Contact:
    return Contact(don(key), "Person", email, reference, "", tickets, created, "2025-01-01")


def key_of(one: Contact) -> str:
    return one.id.rpartition("/")[2]


def cells_of(one: Contact) -> Cells:
    return tuple(str(getattr(one, field)) for field in tool.COLUMNS)


def plan_of(
    contacts: Iterable[Contact],
    spoiled: Iterable[str] = (),
    choices: Mapping[str, str] = {},
    primary: str = "revu",
) -> Plan:
    contents = tool.CsvContents(list(contacts), emails_in_invalid_rows=set(spoiled))
    return tool.detect(contents, choices, primary)


def plan_of_file(
    rows: Iterable[Cells], choices: Mapping[str, str] = {}, cuts: Iterable[int] = ()
) -> Plan:
    """The plan of a file with these rows, or of several, where it is cut."""
    rows = list(rows)
    places = [0, *sorted(cuts), len(rows)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(number)) for number in range(1, len(places))]
        for path, start, end in zip(paths, places, places[1:]):
            write(path, rows[start:end])
        return tool.detect(tool.ContactReader(paths).read(choices), choices, "revu")


def pairs_of(plan: Plan) -> list[tuple[str, str, str | None]]:
    """(primary, duplicate, new reference) of every pair, by the keys of the ids."""
    return [(key_of(pair.primary), key_of(pair.duplicate), pair.new_ref) for pair in plan.pairs()]


def codes_of(plan: Plan) -> dict[str, str]:
    return {skip.email: skip.code for skip in plan.skipped}


SYSTEM, USER, THIRD = contact("1", "REVU-1", 3), contact("2", "user_2"), contact("3", "REVU-3")
EVERY = (SYSTEM, USER, THIRD)


# -- the rules -------------------------------------------------------------------------------------


def test_a_bad_row_spoils_its_group_and_no_other() -> None:
    eve = [contact("4", "REVU-4", email=EVE), contact("5", "user_5", email=EVE)]
    for choices in ({}, {ADA: "user_2"}, {ADA: "user_9"}):
        plan = plan_of([SYSTEM, USER, *eve], [ADA], choices)
        assert pairs_of(plan) == [("4", "5", "user_5")] and codes_of(plan) == {ADA: "invalid_row"}


def test_the_references_of_a_chosen_group_that_no_contact_keeps_are_named() -> None:
    users = [contact(key, f"user_{key}") for key in "456"]
    for others in ([], [SYSTEM]):
        (group,) = plan_of([*users, *others], choices={ADA: "user_4"}).groups
        assert {one.external_ref for one in group.lost_refs()} == {"user_5", "user_6"}


def test_a_system_made_contact_is_chosen_only_where_the_application_knows_none() -> None:
    twin = replace(THIRD, external_ref="REVU-1")
    for contacts in ([SYSTEM, USER], [SYSTEM, twin], [THIRD], []):
        with pytest.raises(tool.FatalError, match=f"--choices: REVU-1 for {ADA}"):
            plan_of(contacts, choices={ADA: "REVU-1"})


PRIMARY_USER: list[tuple[list[Contact], dict[str, str], list[Any]]] = [
    ([SYSTEM, USER], {}, [("2", "1", None)]),
    ([SYSTEM, USER, THIRD], {}, [("2", "1", None), ("2", "3", None)]),
    ([SYSTEM, USER, contact("4", "user_4")], {ADA: "user_2"}, [("2", "4", None), ("2", "1", None)]),
    ([SYSTEM, THIRD], {ADA: "REVU-3"}, [("3", "1", None)]),
]


@pytest.mark.parametrize(("contacts", "choices", "pairs"), PRIMARY_USER)
def test_with_the_user_as_primary_no_reference_moves(
    contacts: list[Contact], choices: dict[str, str], pairs: list[Any]
) -> None:
    plan = plan_of(contacts, (), choices, "user")
    assert pairs_of(plan) == pairs
    assert plan.groups[0].primary_ref() == plan.groups[0].primary.external_ref


NAMES = [  # two names, and whether they may be one person's
    ("Ada Reyes", "Ada Reyes", True), ("Ada Reyes", " ADA REYES ", True), ("Ada Reyes", "", True),
    ("Ada Reyes", "ada", True), ("Ada Reyes", "Reyes, Ada", True),
    ("Ada Reyes", "Ada M. Reyes", True), ("Ada Reyes", "Ada@Example.com", True),
    ("Eve Novak", "Ada", True), ("Eve Novak", "REVU-2", True), ("Eve Novak", "revu-2", True),
    ("Ada Reyes", "Eve Novak", False), ("Ada Reyes", "Ada Novak", False),
    ("Ada Reyes", "A. Reyes", False), ("\u5c71\u7530", "\u7530\u4e2d", False),
    ("Ada Reyes", "Adam Reyes", False),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "fits"), NAMES)
def test_different_names_are_warned_of_and_merged_all_the_same(
    one: str, other: str, fits: bool
) -> None:
    plan = plan_of([replace(SYSTEM, display_name=one), replace(USER, display_name=other)])
    assert pairs_of(plan) == [("1", "2", "user_2")]
    warnings = plan.find_warnings()
    assert [warning["code"] for warning in warnings] == ([] if fits else ["names_differ"])
    assert fits or (one in warnings[0]["warning"] and other in warnings[0]["warning"])


def test_where_a_display_name_says_nothing_the_full_name_is_compared() -> None:
    named = replace(SYSTEM, display_name=ADA, full_name="Eve")
    (warning,) = plan_of([named, replace(USER, display_name="Bob")]).find_warnings()
    assert warning["code"] == "names_differ"


LIMITS = {
    **dict.fromkeys(("ada", "information", "info.ada", "ada+info", "noreplyx", "", "test.er"), 3),
    **dict.fromkeys(("INFO", "Support", "info+ada", "info+a+b"), 2),
    **dict.fromkeys(("NoReply", "noreply+42", "None"), 1),
}


def test_an_address_with_more_contacts_than_one_person_has_is_left_alone() -> None:
    assert set(second_opinion.ROLE_ADDRESSES.split()) == tool.ROLE_ADDRESSES
    assert set(second_opinion.PLACEHOLDERS.split()) == tool.PLACEHOLDER_ADDRESSES
    for local, limit in LIMITS.items():
        email = f"{local}@example.com"
        people = [contact(str(n), f"REVU-{n}", email=email) for n in range(limit)]
        for last in ("user_9", "REVU-9"):
            plan = plan_of([*people, contact("9", last, email=email), contact("x", "crm")])
            assert list(codes_of(plan).values()) == ["shared_mailbox"], local
            assert plan.skipped[0].choice_lines() == {}
        mine = plan_of([*people[1:], contact("9", "user_9", email=email)])
        assert not mine.skipped and mine.count() == limit - 1, local


def test_another_prefix_takes_the_place_of_user_(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SYSTEM, contact("2", "usr_2"), contact("3", "user_3")]
    assert pairs_of(plan_of(rows)) == [("1", "3", "user_3")]
    monkeypatch.setattr(Contact, "user_prefix", tool.check_user_prefix(" usr_ "))
    assert pairs_of(plan_of(rows)) == [("1", "2", "usr_2")]
    assert codes_of(plan_of([*rows, contact("4", "usr_4")])) == {ADA: "several_user_refs"}
    assert "usr_ reference" in tool.skip_words("several_user_refs")[0]
    for text in ("REVU-", "REVU-x", "R", "REVU", " REV "):
        with pytest.raises(tool.FatalError, match="DEVREV_USER_REF_PREFIX"):
            tool.check_user_prefix(text)
    assert tool.check_user_prefix("") == "user_" and tool.check_user_prefix("revu-") == "revu-"


NOON = 1706702400 * 10**9  # 2024-01-31 12:00:00 UTC
INSTANTS = {
    **dict.fromkeys((
        "2024-01-31T12:00:00Z", "2024-01-31 12:00:00", "2024-01-31T12:00", "2024-01-31 13:00:00+01",
        "2024-01-31T12:00:00.000Z", "2024-01-31 12:00:00.000000000 +0000", "2024-01-31 12:00:00,0",
        "2024-01-31T14:00:00+02:00", "2024-01-31 04:00:00.000 -0800", "2024-01-31T17:30:00+0530",
        " 2024-01-31T12:00:00 Z\t", "2024-01-31T10:29:00 -01:31", "2024-02-01T01:00:00+13:00",
    ), NOON),
    "2024-01-31T12:00:00.123456789Z": NOON + 123456789, "2024-01-31T12:00:01Z": NOON + 10**9,
    "2024-01-31T12:00:00.5Z": NOON + 5 * 10**8, "2024-01-31": NOON - 12 * 3600 * 10**9,
    "1970-01-01T00:00:00Z": 0,
    **dict.fromkeys((
        "", "NULL", "2024", "2024-13-01", "2024-02-30", "0000-01-01", "2024-01-31 25:00", "12:00",
        "2024-01-31 12:00:60", "2024-01-31 12:00:00 PST", "2024-01-31 12:00:00 UTC", "2024-1-31",
        "31.01.2024", "1/31/2024 12:00", "1706702400", "2024-01-31 12:00:00.1234567890", "45322.5",
        "2024-01-31T12:00:00+1:00", "2024-01-31T12:00:00+01:60", "2024-01-31  12:00",
        "2024-01-31T12", "2024-01-31 12:00:00 PM", "\u0662024-01-31",
    ), None),
}  # fmt: skip


def test_iso_8601_is_read_and_nothing_else() -> None:
    assert {text: tool.parse_instant(text) for text in INSTANTS} == INSTANTS


AGES: list[tuple[list[str], str, bool]] = [
    # dates of contacts 1, 2 ..., who is the primary, whether age could not decide
    (["2024-01-02T00:00:00+05:00", "2024-01-01T20:00:00Z"], "1", False),
    (["2024-01-01T20:00:00Z", "2024-01-02T00:00:00+05:00"], "2", False),
    (["2024-01-01T00:00:00.2Z", "2024-01-01T00:00:00.19Z"], "2", False),
    (["2024-01-01", "2024-01-01"], "1", False),
    (["2024-01-01", ""], "1", True),
    (["1/31/2024", "2023-12-31"], "1", True),
    (["2024-01-03", "2024-01-02", "x"], "1", True),
]


@pytest.mark.parametrize(("dates", "primary", "undecided"), AGES)
def test_of_contacts_with_as_many_tickets_the_oldest_remains(
    dates: list[str], primary: str, undecided: bool
) -> None:
    system = [contact(str(n), f"REVU-{n}", 5, date) for n, date in enumerate(dates, 1)]
    system.append(contact("0", "REVU-0", 4, "?"))  # of another count: its date decides nothing
    ranked, unknown = tool.rank(system[::-1])
    assert (key_of(ranked[0]), unknown) == (primary, undecided)
    assert sorted(map(key_of, ranked)) == sorted(map(key_of, system))
    codes = [warning["code"] for warning in plan_of([*system[:2], USER]).find_warnings()]
    assert codes == (["age_undecided"] if undecided and len(dates) < 3 else [])


# -- look-alikes -----------------------------------------------------------------------------------

LOOK_ALIKES = [
    ("stra\u00dfe@x", "strasse@x"), ("\ufb01on@x", "fion@x"), ("\u00c9va@x", "\u00e9va@x"),
    ("e\u0301va@x", "\u00e9va@x"), ("\uff41da@x", "ada@x"), ("\u212aate@x", "kate@x"),
    ("\u017fam@x", "sam@x"), ("a@xn--bcher-kva.x", "a@b\u00fccher.x"),
    ("a@XN--BCHER-KVA.x", "a@B\u00fccher.x"), ("a@xn--strae-oqa.x", "a@strasse.x"),
    ("a\u200bda@x", "ada@x"), ("ada\u00ad@x", "ada@x"),
    ("ada@x\ufeff", "ada@x"), ("ada@x\u2060.x", "ada@x.x"), ("ada\ufe0f@x", "ada@x"),
    ("ada\u3164@x", "ada@x"),
]  # fmt: skip
UNLIKE = [
    (ADA, EVE), (ADA, "ada@example.org"), (ADA, "ADA@Example.com"), ("\u0430da@example.com", ADA),
    ("a.b@x", "ab@x"), ("ada+1@example.com", ADA), ("\u00e9va@x", "eva@x"), ("a@xn--!.x", "a@!.x"),
    ("xn--bcher-kva@x", "b\u00fccher@x"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKES)
def test_look_alikes_are_listed_with_their_lines_and_never_joined(one: str, other: str) -> None:
    eve = [contact("3", "REVU-3", email=EVE), contact("4", "user_4", email=EVE)]
    rows = [*eve, contact("1", "REVU-1", email=one), contact("2", "user_2", email=other)]
    plan = plan_of_file(map(cells_of, rows))
    assert pairs_of(plan) == [("3", "4", "user_4")]
    (found,) = plan.look_alikes
    assert found["emails"] == sorted(map(tool.email_key, (one, other)))
    lines = [(line["email"], line["line"]) for line in found["lines"]]
    assert sorted(lines) == sorted([(one, 4), (other, 5)])
    # A bad row spoils each group that its address looks like.
    mine = [contact("1", "REVU-1", email=other), contact("2", "user_2", email=other)]
    bad = (*cells_of(contact("3", "user_3", email=one))[:5], "x", "", "")
    plan = plan_of_file([*map(cells_of, mine), bad])
    assert pairs_of(plan) == [] and list(codes_of(plan).values()) == ["invalid_row"]


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_what_no_comparison_joins_is_no_look_alike(one: str, other: str) -> None:
    rows = [contact("1", "REVU-1", email=one), contact("2", "crm-2", email=other)]
    assert plan_of_file(map(cells_of, rows)).look_alikes == []


# -- the file of choices and the plan's id ---------------------------------------------------------

HEAD = b"EMAIL,EXTERNAL_REF\n"
CHOICES: dict[bytes, Any] = {
    HEAD + b"ada@example.com,user_1\n": {ADA: "user_1"},
    b'\xef\xbb\xbfWhy,external_ref , Email\r\n\r\nx,user_1, A@x \r\n"a\nb", REVU-2 ,c\r\n': {
        "a@x": "user_1",
        "c": "REVU-2",
    },
    HEAD: {},
    b"": "the file is empty",
    b"EMAIL,REFERENCE\na,user_1\n": "no column EXTERNAL_REF (found: EMAIL, REF",
    b"EMAIL,email,EXTERNAL_REF\na,a,user_1\n": "EMAIL is there twice",
    HEAD + b"'=a@x,'=b\n'c@x,'d\n": {"=a@x": "=b", "'c@x": "'d"},
    HEAD + b"a,user_1\neve,user_1\n A,user_2\n": "line 4: a second choice for a; keep",
    HEAD + b"a@x\n": "line 2: empty EMAIL or EXTERNAL_REF",
    HEAD + b"a,b,user_1\n": "line 2: 3 fields instead of 2",
    HEAD + b" ,user_1\n": "line 2: empty EMAIL",
    HEAD + b"a,user_1\nb,\n": "line 3: empty EMAIL",
    HEAD + b'a,"user_1\n': "line 2: unexpected end of data",
    b"EMAIL;EXTERNAL_REF;X\na;user_1\n;;\nb;user_2;c\n": {"a": "user_1", "b": "user_2"},
    b"EXTERNAL_REF\tEMAIL\nuser_1\ta\n": {"a": "user_1"},
    HEAD + b",\na,user_1,,\n": {"a": "user_1"},
    b"PK\x03\x04rest": "a ZIP archive",
    HEAD + b"\xe9va,user_1\n": "not UTF-8",
}


@pytest.mark.parametrize(("content", "expected"), CHOICES.items())
def test_a_file_of_choices_is_read_or_refused(
    tmp_path: Path, content: bytes, expected: Any
) -> None:
    path = tmp_path / "choices.csv"
    path.write_bytes(content)
    if isinstance(expected, dict):
        assert tool.read_choices(path) == expected
        return
    with pytest.raises(tool.FatalError) as stopped:
        tool.read_choices(path)
    assert str(stopped.value).startswith(f"{path}: ") and expected in str(stopped.value)


def id_of(contacts: Iterable[Contact], choices: Mapping[str, str] = {}, **options: Any) -> str:
    groups = plan_of(contacts, choices=choices).groups
    return tool.plan_id(groups, **{"count_policy": "exact", "timelines": True, **options})


def test_the_id_of_a_plan_is_of_what_is_merged_and_of_nothing_else() -> None:
    rows = [contact("1", "REVU-1", 9), contact("2", "REVU-2", 8), contact("3", "user_3", 1)]
    eve = [contact(key, f"user_{key}", email=EVE) for key in "789"]
    known = id_of([*rows, *eve])
    renamed = [replace(one, display_name="x", full_name="x", created="2020") for one in rows]
    more = [replace(one, tickets=one.tickets + 1) for one in rows]
    same = [id_of([*eve, *rows[::-1]]), id_of(rows), id_of(renamed), id_of(more)]
    assert {known, *same, id_of(rows, {ADA: "user_3"})} == {known}
    other = [
        id_of([]),
        id_of(rows, count_policy="at-least"),
        id_of(rows, timelines=False),
        id_of([replace(rows[0], tickets=0), *rows[1:]]),
        id_of([*rows[:2], replace(rows[2], external_ref="user_33")]),
        id_of([*rows, *eve], {EVE: "user_7"}),
        id_of([*rows, *eve], {EVE: "user_8"}),
    ]
    assert len({known, *other}) == len(other) + 1
    assert known == "086547bf4ab5", "a preview and a later run have to agree, on every machine"


def test_a_contact_is_read_back_as_it_was_written_and_called_by_the_first_name_it_has() -> None:
    one = contact("7", "user_7", 3)
    assert Contact.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Contact.from_json({"id": one.id}).full_name == ""
    assert set(asdict(one)) == set(tool.COLUMNS) and tuple(tool.COLUMNS.values()) == COLUMNS
    for display, full, name in ((" Ada ", "x", "Ada"), (" ", "Reyes", "Reyes"), ("", "", "REVU-7")):
        assert replace(one, display_name=display, full_name=full).name == name


# -- everything together, against a second opinion -------------------------------------------------

EMAILS = (ADA, "Ada@Example.com", " ada@example.com ", EVE, "o'b@x", "stra\u00dfe@x", "STRASSE@x",
          "info@example.com")  # fmt: skip
REFERENCES = (
    "REVU-1", "REVU-2", "REVU-3", "user_1", "user_2", "user_3", "revu-1", "User_1", "userX1",
    "REVU-", "user_", "xuser_2", "\uff55ser_2", "REVU\u20101", "crm",
)  # fmt: skip
people = st.builds(
    contact,
    st.integers(1, 14).map(str),
    st.sampled_from(REFERENCES),
    st.sampled_from([0, 1, 7, 12]),
    st.sampled_from(["2023-01-01 00:00:00", "2024-01-01 00:00:00", "2024-06-01 00:00:00"]),
    st.sampled_from(EMAILS),
)
some_choices = st.dictionaries(
    st.sampled_from(EMAILS).map(email_key), st.sampled_from(REFERENCES), max_size=2
)


def expected_of(found: Iterable[Contact], choices: Mapping[str, str], primary: str) -> Any:
    """Merges and codes of skipped groups; None where a choice can't be followed."""
    rows = [
        second_opinion.Row(one.id, one.email, one.external_ref, one.tickets, one.created)
        for one in found
    ]
    groups = second_opinion.groups_of(rows)
    codes = {}
    for email in {*groups, *choices}:
        group = groups.get(email, [])
        users = [row for row in group if row.ref.startswith("user_")]
        if email in choices:
            if [row.ref for row in users or group].count(choices[email]) != 1:
                return None
        elif len(group) > second_opinion.most_contacts(email):
            codes[email] = "shared_mailbox"
        elif len(users) > 1:
            codes[email] = "several_user_refs"
        elif len(group) > 1 and not users:
            codes[email] = "no_user_ref"
    wanted = second_opinion.plan_of(rows, choices, primary).items()
    return sorted((*ids, one.new_ref or "") for ids, one in wanted), codes


@examples(500)
@given(
    st.lists(people, max_size=10, unique_by=lambda one: one.id),
    some_choices,
    st.sampled_from(["revu", "user"]),
)
def test_every_group_is_planned_and_every_choice_followed_as_the_contract_says(
    found: list[Contact], choices: dict[str, str], primary: str
) -> None:
    for chosen in ({}, choices):
        expected = expected_of(found, chosen, primary)
        if expected is None:
            with pytest.raises(tool.FatalError, match="choices"):
                plan_of(found, (), chosen, primary)
            return
        plan = plan_of(found, (), chosen, primary)
        merges = sorted((*pair.ids, pair.new_ref or "") for pair in plan.pairs())
        assert (merges, codes_of(plan)) == expected
        for group in plan.groups:
            assert {one.key for one in group.contacts()} == {group.email}
            assert {pair.primary.id for pair in group.pairs} == {group.primary.id}
            assert not any(pair.new_ref for pair in group.pairs[1:]), "the reference moves first"


SOMEONE = cells_of(contact("99", "REVU-99", email=EVE))


def write(path: Path, rows: Iterable[Cells]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


@examples(150)
@given(st.lists(people.map(cells_of), max_size=12), st.lists(st.integers(0, 12), max_size=4))
def test_the_split_into_files_makes_no_difference(rows: list[Cells], cuts: list[int]) -> None:
    rows = [SOMEONE, *rows]
    plan, other = plan_of_file(rows, cuts=cuts), plan_of_file(rows)
    assert pairs_of(plan) == pairs_of(other) and plan.contacts_read == other.contacts_read
    assert codes_of(plan) == codes_of(other) and plan.invalid_counts == other.invalid_counts
    emails = [look["emails"] for look in plan.look_alikes]
    assert emails == [look["emails"] for look in other.look_alikes]


CHANGES = (
    ("", ""), ("a", "\u0430"), ("k", "\u212a"), ("ss", "\u00df"), ("fi", "\ufb01"),
    ("e", "e\u0301"), ("e", "\u00c9"), ("a", "\uff41"), ("i", "\u0130"), ("s", "\u017f"),
    ("@", "\uff20"),
    (".", "\u3002"), ("a", "a\u00ad"), ("a", "A"), ("e", "E"),
)  # fmt: skip
FRAMES = ("{}", " {}\t", "\u00a0{}", "{}\u200b", "\ufeff{}", "x{}")
spelled = st.builds(
    lambda email, change, frame: frame.format(email.replace(*change)),
    st.one_of(
        st.sampled_from(["kassie.fink@example.com", "ada@strasse.example"]),
        st.text(min_size=1, max_size=3).map("{}@x".format),
    ),
    st.sampled_from(CHANGES),
    st.sampled_from(FRAMES),
)


@examples(300)
@given(st.lists(st.tuples(spelled, st.sampled_from(["REVU-", "user_"])), min_size=2, max_size=6))
def test_no_pair_joins_addresses_that_differ_in_more_than_blanks_and_ascii_case(
    people: list[tuple[str, str]],
) -> None:
    rows = {}
    for n, (email, kind) in enumerate(people):
        rows[don(str(n))] = contact(str(n), f"{kind}{n}", email=email.replace("\0", ""))
    for pair in plan_of_file([SOMEONE, *map(cells_of, rows.values())]).pairs():
        written = {email_key(rows[one.id].email) for one in (pair.primary, pair.duplicate)}
        assert written == {email_key(pair.primary.email)} == {email_key(pair.duplicate.email)}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "contacts.csv"
    for content in ("", "x\n" * 9, "\xff", ",".join(COLUMNS) + "\n" + ",".join("abcdefgh") * 3):
        write(path, map(cells_of, [SYSTEM, USER]))

        def meddle(content: str = content) -> Iterator[str]:
            path.write_text(content, encoding="latin-1")
            yield ADA

        with pytest.raises(tool.FatalError, match="changed while it was being read"):
            tool.ContactReader([path]).read(meddle())


def test_of_an_email_that_is_requested_every_row_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "contacts.csv"
    others = [contact("7", "user_7", email=EVE), contact("8", "crm", email=" F@x")]
    write(path, map(cells_of, [SYSTEM, *others]))
    assert tool.ContactReader([path]).read().contacts == []
    contents = tool.ContactReader([path]).read(["f@x", EVE])
    assert [one.email for one in contents.contacts] == [EVE, "F@x"]
    plan = tool.detect(contents, {}, "revu")
    tool.keep_emails(plan, ["f@x", EVE])
    assert plan.others_line() == "1 contact with other references, for example crm, takes no part"
    with pytest.raises(tool.FatalError, match="in no row of the CSV: x@x"):
        tool.keep_emails(plan, ["f@x", "x@x"])


def test_what_no_email_names_is_not_in_the_plan() -> None:
    eve = [contact("4", "REVU-4", email=EVE), contact("5", "user_5", email=EVE)]
    for named, pairs, codes in ((EVE, 1, {}), (ADA, 0, {ADA: "no_user_ref"}), ("bad@x", 0, {})):
        plan = plan_of([SYSTEM, THIRD, *eve], ["bad@x"])
        plan.look_alikes = [{"emails": [EVE, "e@x"]}]
        tool.keep_emails(plan, [named])
        assert plan.count() == pairs == len(plan.look_alikes) and codes_of(plan) == codes


# -- what DevRev says now --------------------------------------------------------------------------


def live(one: Contact, **fields: Any) -> dict[str, Any]:
    """The rev_user that agrees with a row of the export, but for some fields."""
    user = {"id": one.id, "email": one.email, "external_ref": one.external_ref, "state": "active"}
    return {**user, "rev_org": {"type": "rev_org", "id": ORG}, **fields}


OTHER_ORG = {"rev_org": {"type": "rev_org", "id": ORG.replace("ACME", "NORTH")}}
MERGED = {"primary_identity": {"id": "x"}}
AGREES: list[tuple[dict[str, Any] | None, str]] = [
    ({}, ""),
    ({"email": " ADA@Example.com "}, ""),
    ({"display_name": "Renamed"}, ""),
    ({"external_ref": " REVU-1\t"}, ""),
    ({"external_refs": ["REVU-1", " REVU-1", None, ""]}, ""),
    ({"external_refs": "crm"}, ""),
    (None, "not_found"),
    *(({"state": state}, "not_active") for state in ("deactivated", "deleted", "locked", None)),
    (MERGED, "not_active"),
    *(({"email": email}, "email_changed") for email in ("ada@x", "\uff41da@example.com", "", None)),
    *(({"external_ref": ref}, "external_ref_changed") for ref in ("user_9", "revu-1", None)),
    *(({"external_refs": refs}, "several_external_refs") for refs in (["REVU-1", "x"], ["y"])),
]


@pytest.mark.parametrize(("fields", "code"), AGREES, ids=str)
def test_a_contact_that_is_not_as_exported_is_refused(fields: Any, code: str) -> None:
    now = None if fields is None else live(SYSTEM, **fields)
    problem = tool.live_contact_error(SYSTEM, now, SYSTEM.external_ref)
    assert (problem.code if problem else "") == code


STRANGER, NAMESAKE = contact("7", "user_7"), contact("8", "REVU-8")


def group(primary: str = "revu", chosen: str = "", alone: bool = False) -> Group:
    pairs = [Pair(SYSTEM, USER, "user_2"), Pair(SYSTEM, THIRD, None)]
    if primary == "user":
        pairs = [Pair(USER, SYSTEM, None), Pair(USER, THIRD, None)]
    return Group(ADA, pairs[:1] if alone else pairs, chosen)


def look(
    of: Group, listed: Iterable[Any] = (), unverified: str = "", unheld: Any = (), **changes: Any
) -> tool.LiveGroup:
    """The group as DevRev has it; a change of a contact (by its key, `_1`) to None: it is gone."""
    users: dict[str, dict[str, Any] | None] = {}
    for one in of.all_contacts():
        change = changes.get(f"_{key_of(one)}", {})
        users[one.id] = None if change is None else live(one, **change)
    there = [user for user in users.values() if user]
    return tool.LiveGroup(of, users, [*there, *listed], set(map(don, unverified)), unheld)


def result(now: tool.LiveGroup, **options: bool) -> Any:
    """The code of the error, or what is dropped."""
    try:
        dropped = tool.check_live(now, tool.MergeOptions(**options))
    except tool.PairError as error:
        return error.code
    return {key_of(pair.duplicate): skip.code for pair, skip in dropped}


GONE: list[dict[str, Any] | None] = [None, {"state": "deleted"}, {"state": "shadow", **MERGED}]
HAS_IT = {"external_ref": "user_2"}
# What the group is, what DevRev has, the option that is given, and what comes of it.
CHECKS: list[tuple[dict[str, Any], dict[str, Any], str, Any]] = [
    ({}, {}, "", {}),
    *(({}, {"_3": gone}, "", {"3": "already_gone"}) for gone in GONE),
    *(({"primary": "user"}, {"_3": gone}, "", {"3": "already_gone"}) for gone in GONE),
    *(({}, {"_2": gone, "_1": HAS_IT}, "", {"2": "already_merged"}) for gone in GONE),
    *(({}, {"_2": gone}, "", "not_active" if gone else "not_found") for gone in GONE),
    *(({}, {"_2": gone, "unheld": {"user_2"}}, "", "reference_unheld") for gone in GONE),
    ({}, {"_2": None, "_1": {"external_ref": "user_9"}}, "", "not_found"),
    ({}, {"_1": HAS_IT}, "", "external_ref_changed"),
    ({}, {"_1": None}, "", "not_found"),
    ({"primary": "user"}, {"_1": None}, "", {"1": "already_gone"}),
    ({}, {"_3": {"state": "locked"}}, "", "not_active"),
    ({}, {"_2": {"state": "locked"}, "_1": HAS_IT}, "", "not_active"),
    # rev orgs
    ({}, {"_3": OTHER_ORG}, "", {"3": "different_rev_org"}),
    ({}, {"_3": OTHER_ORG}, "across_workspaces", {}),
    ({}, {"_2": OTHER_ORG}, "", "different_rev_org"),
    ({}, {"_2": OTHER_ORG}, "across_workspaces", {}),
    ({}, {"_1": OTHER_ORG, "_2": OTHER_ORG}, "", {"3": "different_rev_org"}),
    ({}, {"_1": {"rev_org": None}, "_2": OTHER_ORG}, "", {}),
    ({}, {"_2": {"rev_org": None}, "_3": {"rev_org": {}}}, "", {}),
    ({}, {"_3": {**OTHER_ORG, "state": "locked"}}, "", {"3": "different_rev_org"}),
    # namesakes
    ({"alone": True}, {"listed": [live(STRANGER)]}, "", "several_user_refs"),
    *(({"alone": True}, {"listed": [live(STRANGER, **fields)]}, "", "several_user_refs")
      for fields in ({"email": " ADA@example.com"}, {"state": "locked"})),
    *(({}, {"listed": [live(STRANGER, **fields)]}, "", {}) for fields in (
        {"state": "deleted"}, MERGED, {"email": EVE}, {"external_ref": "userX7"},
        {"external_ref": None})),
    ({"alone": True}, {"listed": [live(NAMESAKE)]}, "", {}),
    ({}, {"listed": [live(NAMESAKE)]}, "", "shared_mailbox"),
    ({"alone": True}, {"listed": [live(NAMESAKE), live(STRANGER)]}, "", "shared_mailbox"),
    ({"chosen": "user_2"}, {"listed": [live(NAMESAKE)]}, "", "group_changed"),
    ({"chosen": "user_2"}, {}, "", {}),
    ({"chosen": "user_2"}, {"listed": [live(NAMESAKE), live(STRANGER)]}, "", "several_user_refs"),
    # unverified
    *(({"alone": True}, {"unverified": ids}, "", "unverified") for ids in ("1", "2", "12")),
    *(({"alone": True, "primary": "user"}, {"unverified": ids}, "", "unverified") for ids in "12"),
    ({"alone": True, "primary": "user"}, {"unverified": "12"}, "", {}),
    *(({}, {"unverified": ids}, "try_unverified", {}) for ids in ("1", "2", "12", "123")),
    ({}, {"unverified": "3"}, "", "unverified"),
    ({"alone": True}, {"unverified": "7"}, "", {}),
]  # fmt: skip


@pytest.mark.parametrize(("of", "facts", "option", "expected"), CHECKS)
def test_a_group_is_compared_with_devrev_as_it_is_now(
    of: Any, facts: Any, option: str, expected: Any
) -> None:
    assert result(look(group(**of), **facts), **({option: True} if option else {})) == expected


def test_the_first_code_in_a_fixed_order_counts() -> None:
    """Each trouble beside all those that come after it."""
    found = []
    facts: dict[str, Any] = {"chosen": "user_2", "_1": {}, "_2": {**OTHER_ORG}, "_3": {}}
    for name, more in (
        ("_2", {}), ("unverified", "1"), ("listed", [live(NAMESAKE)]),
        ("listed", [live(NAMESAKE), live(STRANGER)]), ("chosen", ""),
        ("_1", {"external_refs": ["crm"]}), ("_3", {"external_ref": "x"}), ("_1", {"email": "x"}),
        ("_3", {"state": "locked"}), ("_1", None), ("unheld", {"user_2"}),
    ):  # fmt: skip
        facts[name] = {**facts[name], **more} if name == "_2" else more
        known = {key: value for key, value in facts.items() if key != "chosen"}
        found.append(result(look(group(chosen=facts["chosen"]), **known)))
    assert tuple(found[::-1]) == tool.LIVE_CODES


def test_a_pair_that_was_requested_is_not_dropped_and_one_that_was_merged_counts_no_more() -> None:
    requested, once, elsewhere, half_done = group(), group(), group(), group()
    requested.pairs[1].is_requested_again = True
    requested.pairs[1].state = State.ACKNOWLEDGED
    once.pairs[1].first_requested_at = 1.0
    assert result(look(requested, _3=None)) == result(look(once, _3=None)) == "not_found"
    merged = {"_1": HAS_IT, "_2": None}
    ((pair, skip),) = tool.check_live(look(elsewhere, **merged), tool.MergeOptions())
    pair.move_to(State.SKIPPED, skip.code, str(skip))
    assert elsewhere.primary_ref() == "user_2" and elsewhere.contacts() == [SYSTEM, THIRD]
    half_done.pairs[0].state = State.DONE
    assert result(look(elsewhere, **merged)) == result(look(half_done, **merged)) == {}
    assert result(look(half_done, _2=None)) == "external_ref_changed"
    assert result(look(half_done, _1=HAS_IT, listed=[live(NAMESAKE)])) == {}, "lists lag"


HALF: list[tuple[dict[str, Any], bool]] = [
    ({}, False), ({"_2": None}, True), ({"_2": {"state": "deleted"}}, True), ({"_2": MERGED}, True),
    ({"_2": {"state": "locked"}}, False), ({"_2": {"state": "locked", "external_ref": "x"}}, True),
    ({"_2": None, "_1": HAS_IT}, False), ({"_2": None, "_1": None}, False),
    ({"_2": None, "_1": {"state": "deleted"}}, False), ({"_2": {"external_ref": "x"}}, False),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "may_be"), HALF)
def test_when_a_reference_may_be_on_no_contact(changes: Any, may_be: bool) -> None:
    now = look(group(), **changes)
    move, stay = now.group.pairs
    assert now.may_be_half_merged(move) == may_be and not now.may_be_half_merged(stay)
    move.first_requested_at = 1.0
    assert not now.may_be_half_merged(move), "it is polled"


def test_who_is_unverified_is_said_with_what_it_would_come_to_know_and_counted() -> None:
    move, stay = group().pairs
    for known, said in (("1", "REVU-1 is .*REVU-2$"), ("2", "REVU-2 is .*REVU-1$"), ("12", "both")):
        assert re.search(said, str(tool.unverified_error(move, set(map(don, known)))))
    assert tool.unverified_error(stay, {don("1"), don("3")}) is None
    lines = tool.unverified_lines([move, stay] * 15, {SYSTEM.id}, True)
    assert lines[0].startswith("30 pairs whose primary is unverified") and len(lines) == 22
    assert "ada@example.com: REVU-2 into REVU-1" in lines[1]
    assert len(tool.unverified_lines([move, stay], {SYSTEM.id}, False)) == 1
    (one,) = tool.unverified_lines([move, stay], {USER.id}, True)
    assert one.startswith("1 pair whose duplicate is unverified")


COMPARED = [(0, 0, 2), (3, 3, 2), (3, 4, 1), (0, 1, 1), (3, 2, 0), (1, 0, 0)]


@pytest.mark.parametrize(("exported", "found", "accepted"), COMPARED)
def test_counts_are_compared_as_the_policy_says(exported: int, found: int, accepted: int) -> None:
    one = contact("1", "REVU-1", exported)
    for policy, passes in (("exact", accepted == 2), ("at-least", accepted > 0)):
        said = f"has {found} ticket.* says {exported}"
        with contextlib.nullcontext() if passes else pytest.raises(tool.PairError, match=said):
            tool.check_count(group(), one, found, tool.MergeOptions(count_policy=policy))


def test_a_primary_that_has_absorbed_a_duplicate_may_have_more_tickets_than_the_csv_says() -> None:
    absorbed = group()
    absorbed.pairs[0].state = State.DONE
    tool.check_count(absorbed, SYSTEM, 9, tool.MergeOptions())
    for one, found in ((THIRD, 9), (SYSTEM, 2)):
        with pytest.raises(tool.PairError):
            tool.check_count(absorbed, one, found, tool.MergeOptions())


# -- what --limit and earlier runs leave -----------------------------------------------------------

LIMITED: list[tuple[str, dict[int, str], int, str]] = [
    # pairs of each group, when it was tried, the limit, which groups are kept
    ("111", {}, 1, "0"), ("111", {0: "b"}, 1, "1"), ("111", {0: "b", 1: "b"}, 1, "2"),
    ("111", {0: "b", 1: "c", 2: "a"}, 1, "2"), ("111", {0: "b"}, 2, "12"), ("213", {}, 2, "0"),
    ("213", {}, 3, "01"), ("213", {0: "a"}, 5, "12"), ("33", {}, 2, ""), ("101", {}, 1, "01"),
    ("111", {}, 9, "012"),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "tried", "limit", "kept"), LIMITED)
def test_what_no_run_has_tried_comes_before_what_was_before_the_limit_is_applied(
    sizes: str, tried: dict[int, str], limit: int, kept: str
) -> None:
    plan = plan_of([])
    for number, size in enumerate(map(int, sizes)):
        primary = contact(f"P{number}", "", email=f"{number}@x")
        pairs = [Pair(primary, contact(f"D{number}{n}", ""), None) for n in range(size or 1)]
        pairs[-1].state = State.PLANNED if size else State.REQUESTED
        plan.groups.append(Group(f"{number}@x", pairs))
        if number in tried:
            plan.tried[pairs[-1].ids] = tried[number]
    lines = tool.keep_limit(plan, limit)
    assert "".join(group.email[0] for group in plan.groups) == kept
    assert bool(lines) == (kept == "")


# Rows of earlier merges: address, ids, state, and the contact that an undo created.
HISTORY: list[tuple[list[tuple[str, str, str, str, str]], str]] = [
    ([], ""),
    ([(ADA, "8", "9", "undone", "")], "undone"),
    ([(ADA, "8", "9", "cancelled", "")], "cancelled"),
    ([(EVE, "1", "2", "undone", "")], "undone"),
    ([(EVE, "2", "1", "cancelled", "")], "cancelled"),
    ([(EVE, "2", "3", "cancelled", "")], "cancelled"),
    ([(EVE, "1", "9", "undone", "")], ""),
    ([(EVE, "9", "1", "undone", ""), (EVE, "8", "2", "undone", "")], ""),
    ([(EVE, "1", "0", "undone", "2")], "undone"),
    ([(EVE, "1", "00", "undone", "0"), (EVE, "1", "0", "undone", "2")], "undone"),
    ([(EVE, "7", "0", "undone", "2"), (EVE, "1", "0", "cancelled", "")], "cancelled"),
    ([(ADA, "1", "2", "cancelled", ""), (ADA, "1", "3", "undone", "")], "undone"),
    ([(EVE, "1", "2", "undone", "2")], "undone"),
]


@pytest.mark.parametrize(("rows", "code"), HISTORY)
def test_what_was_undone_or_cancelled_is_not_repeated_unnamed(rows: list[Any], code: str) -> None:
    found: dict[str, list[Pair]] = {"cancelled": [], "undone": []}
    for email, primary, duplicate, state, created in rows:
        people = (contact(key, "", email=email) for key in (primary, duplicate))
        pair = Pair(*people, None, State(state))
        if state == "undone":
            pair.undo = tool.UndoProgress("backups", "done", "", 1, contact=don(created))
        found[state].append(pair)
    blocked = tool.blocked_by_history([group()], *found.values())
    assert blocked == ({ADA: code} if code else {})


# Rows, whether the address is named; what becomes of the group of 1, 2 and 3.
KNOWN: list[tuple[str, bool, str]] = [
    ("", False, "planned planned"),
    ("1 2 done", False, "done planned"),
    ("1 2 done, 1 3 requested", False, "done requested"),
    ("1 2 failed", False, "planned planned"),
    ("1 2 undone", False, "undone"),
    ("1 2 undone", True, "undone"),
    ("8 9 undone", False, "undone"),
    ("8 9 undone", True, "planned planned"),
    ("1 2 undo_settled", True, "undone"),
    ("1 2 cancelled", False, "cancelled"),
    ("1 2 cancelled", True, "requested planned"),
    ("1 2 done, 1 3 done, 8 9 undone", False, "done done"),
    ("1 2 done, 8 9 undone", False, "undone"),
]


@pytest.mark.parametrize(("rows", "is_named", "expected"), KNOWN)
def test_what_the_savepoint_knows_comes_into_the_plan(
    rows: str, is_named: bool, expected: str
) -> None:
    plan = plan_of(EVERY)
    known = []
    for row in filter(None, rows.split(", ")):
        one, other, state = row.split()
        known.append(Pair(contact(one, ""), contact(other, ""), None, State(state)))
    savepoint: Any = SimpleNamespace()
    savepoint.pairs = lambda *states: [pair for pair in known if pair.state in states]
    tool.apply_savepoint(plan, savepoint, [ADA] if is_named else [])
    assert savepoint.organisation == "dvrv-us-1:devo/SANDBOX1"
    states = [pair.state.value for group in plan.groups for pair in group.pairs]
    assert " ".join([*codes_of(plan).values(), *states]) == expected
    assert plan.already_merged == states.count("done")
    assert len(plan.revived) == states.count("requested") * is_named
    assert set(plan.tried) == {pair.ids for pair in known if pair.state is State.FAILED}


# -- text ------------------------------------------------------------------------------------------

ODD = (
    "con", "NUL", "aux", "com1", "LPT9", ".", "..", "/", "\\", ":", " ", "-", "~", "%", "%2E",
    "@", "\0", "\n", "x" * 97,
)  # fmt: skip
any_text = st.one_of(
    st.text(st.characters()), st.lists(st.sampled_from(ODD), max_size=6).map("".join)
)
PORTS = {f"{port}{digit}" for port in ("com", "lpt") for digit in range(10)}
DEVICES = {"con", "prn", "aux", "nul", *PORTS}


@examples(400)
@given(any_text)
@example("")
@example("..")
@example("../../etc/passwd")
@example("C:\\Windows")
@example("nul.tar.gz")
@example("CON")
@example("\ud800")
@example("a" * 300 + "@example.com")
def test_any_text_becomes_one_harmless_name(text: str) -> None:
    name = tool.safe_name(text)
    assert 0 < len(name) <= 80 and name.isascii()
    assert not set(name) & set('/\\:*?"<>| \0') and name.isprintable()
    assert name not in (".", "..") and name[-1] not in ". " and name[0] not in ".-"
    assert name.split(".")[0].casefold() not in DEVICES
    assert PurePosixPath(name).name == PureWindowsPath(name).name == name


@examples(400)
@given(any_text, any_text)
@example("a", "A")
@example("a.", "a%2E")
@example("con", "%63on")
@example("", "%")
@example("x" * 300, "x" * 301)
@example("\u00e9", "%C3%A9")
def test_two_texts_never_share_a_name(one: str, other: str) -> None:
    """Emails come case-folded: names have to differ where a file system ignores case, too."""
    assert (tool.safe_name(one) == tool.safe_name(other)) == (one == other)
    one, other = one.casefold(), other.casefold()
    assert (tool.safe_name(one).casefold() == tool.safe_name(other).casefold()) == (one == other)


def test_an_ordinary_email_is_its_own_name_and_no_device_of_windows_is_one() -> None:
    for email in ("ada.reyes@example.com", "femi+support@example.org", "a_b-c@x.example.com"):
        assert tool.safe_name(email) == email
    assert [tool.safe_name(text) for text in ("con", "-x", "a.", "")] == [
        "%63on",
        "%2Dx",
        "a%2E",
        "%",
    ]
    for device in chain(DEVICES, map(str.upper, DEVICES)):
        for tail in ("", ".txt", ".", " ", ":"):
            assert tool.safe_name(device + tail).split(".")[0].casefold() not in DEVICES


CONTROLS = [*range(0x20), *range(0x7F, 0xA1), *range(0x200B, 0x2010), *range(0x2028, 0x202F)]


@examples(400)
@given(any_text)
@example("".join(map(chr, CONTROLS)))
@example("\u2066\u2067\u2068\u2069\ufeff\u061c\ud800\udfff\U000e0041")
def test_nothing_that_a_terminal_could_act_on_survives(text: str) -> None:
    shown = tool.escape_unprintable(text)
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert tool.escape_unprintable(shown) == shown
    plain = "".join(char for char in text if unicodedata.category(char)[0] in "LNP" or char == " ")
    assert tool.escape_unprintable(plain) == plain


TEXTS = {
    **{tool.duration(seconds): text for seconds, text in (
        (45, "45 s"), (99.4, "99 s"), (99.5, "2 min"), (5969, "99 min"), (5970, "1 h 40 min"),
        (12_000, "3 h 20 min"), (172_740, "47 h 59 min"), (187_200, "2 d 4 h"))},
    tool.plural(1, "pair"): "1 pair", tool.plural(1204, "address"): "1,204 addresses",
    tool.plural(0, "pair"): "0 pairs", tool.minute(tool.iso(0.5)): "1970-01-01 00:00 UTC",
    tool.iso(0.5): "1970-01-01T00:00:00.500+00:00", " ".join(tool.some("ab", 2)): "a b",
    " ".join(tool.some("abcd", 2)): "a b and 2 more", " ".join(tool.some("abcde")): "a b c d e",
}  # fmt: skip


def test_numbers_times_and_lists_read_well() -> None:
    assert list(TEXTS) == list(TEXTS.values())


def test_an_id_tells_its_organisation() -> None:
    for identity, organisation in (
        (don("7"), "dvrv-us-1:devo/SANDBOX1"),
        ("don:core:dvrv-eu-1:devo/1a2B:ticket/7", "dvrv-eu-1:devo/1a2B"),
        ("REVU-7", ""), ("don:identity:dvrv-us-1:devo/SANDBOX1", ""), (" " + don("7"), ""),
        ("don:identity:dvrv-us-1:revu/7", ""),
    ):  # fmt: skip
        assert tool.organisation_of(identity) == organisation


PRIVATE = (
    "https://api.devrev.ai", "https://api.devrev.ai:8443", "https://gateway.example.com/devrev",
    "HTTPS://api.devrev.ai", "http://127.0.0.1:8123", "http://127.9.8.7", "http://localhost:1",
    "http://[::1]:8123",
)  # fmt: skip
OPEN = (
    "", "api.devrev.ai", "//api.devrev.ai", "https://", "https:///path", "https://:443",
    "ftp://api.devrev.ai", "file:///etc/passwd", "http://api.devrev.ai",
    "http://localhost.example.com", "http://127.0.0.1.example.com", "http://example.com/127.0.0.1",
    "http://127.0.0.1@example.com", "http://127.999.1.1", "http://127.1", "http://0x7f.0.0.1",
    "http://127.0.0.1.", "http://[::ffff:8.8.8.8]", "http://2130706433", "http://0.0.0.0",
    "http://[2001:db8::1]", "https://name:hunter2@api.devrev.ai", "https://api.devrev.ai:port",
    "https://api.devrev.ai?key=hunter2", "https://api.devrev.ai#hunter2",
    "https://api.devrev.ai:99999", "https://[::1", "https://[hunter2",
)  # fmt: skip


def test_only_a_base_url_that_keeps_the_token_private_is_accepted() -> None:
    for url in PRIVATE:
        assert tool.check_base_url(url) == url
    for url in OPEN:
        with pytest.raises(tool.FatalError) as stopped:
            tool.check_base_url(url)
        assert stopped.value.exit_code == 2, url
        assert "DEVREV_BASE_URL" in str(stopped.value) and "hunter2" not in str(stopped.value)
