"""Which contacts are one person: the rules one by one, then all of them against a slow and obvious reference."""

import contextlib
import csv
import gzip
import io
import json
import re
import tempfile
import unicodedata
from collections import Counter
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import merge_contacts as tool
from merge_contacts import Contact, Group, Pair, Plan, State
from tests.support import COLUMNS

ORG = "don:identity:dvrv-us-1:devo/SANDBOX1:revo/ACME"
Cells = Tuple[str, ...]
INVISIBLE = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # controls, bidi marks and the like, lone surrogates, line ends


def examples(count: int) -> settings:
    """So many in CI; fewer in the fast run (see conftest)."""
    count = count * settings.default.max_examples // 100
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def contact(
    key: str,
    reference: str,
    tickets: int = 0,
    created: str = "2024-01-01",
    email: str = "ada@example.com",
) -> Contact:
    return Contact(
        id=f"don:identity:dvrv-us-1:devo/SANDBOX1:revu/{key}",
        display_name="Person",
        email=email,
        external_ref=reference,
        full_name="",
        tickets=tickets,
        created=created,
        updated="2025-01-01",
    )


def key_of(one: Contact) -> str:
    return one.id.rpartition("/")[2]


def plan_of(
    contacts: Iterable[Contact],
    emails_in_invalid_rows: Iterable[str] = (),
    choices: Mapping[str, str] = {},
) -> Plan:
    found = [replace(one) for one in contacts]  # reading makes every row an object of its own
    return tool.detect(
        tool.CsvContents(
            contacts=found,
            contacts_read=len(found),
            emails_in_invalid_rows=set(emails_in_invalid_rows),
        ),
        choices,
        "revu",
    )


def plan_of_file(
    rows: Iterable[Cells], layout: Optional["Layout"] = None, choices: Mapping[str, str] = {}
) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contacts.csv"
        write(path, rows, layout or PLAIN)
        return tool.detect(tool.ContactReader([path]).read(choices), choices, "revu")


def pairs_of(plan: Plan) -> List[Tuple[str, str, Optional[str]]]:
    """(primary, duplicate, new reference) of every pair, by the keys of the ids."""
    return [(key_of(pair.primary), key_of(pair.duplicate), pair.new_ref) for pair in plan.pairs()]


# -- the rules -----------------------------------------------------------------------------------------

TOGETHER = {
    "the user_ reference moves to the system contact": (
        [("1", "REVU-1", 0), ("2", "user_2", 9)], [("1", "2", "user_2")],
    ),
    "the primary is the REVU- contact with the highest count": (
        [("1", "REVU-1", 9), ("2", "REVU-2", 10), ("3", "user_3", 99)], [("2", "3", "user_3"), ("2", "1", None)],
    ),
    "then the oldest": (
        [("1", "REVU-1", 5, "2024-03-01"), ("2", "REVU-2", 5, "2023-12-31"), ("3", "user_3", 0, "2020-01-01")],
        [("2", "3", "user_3"), ("2", "1", None)],
    ),
    "the count goes before the age": (
        [("1", "REVU-1", 5, "2019-01-01"), ("2", "REVU-2", 6, "2024-01-01"), ("3", "user_3", 0)],
        [("2", "3", "user_3"), ("2", "1", None)],
    ),
    "then the smallest id": (
        [("C", "REVU-C", 5), ("B", "REVU-B", 5), ("A", "user_A", 5)], [("B", "A", "user_A"), ("B", "C", None)],
    ),
    "what REVU- and user_ are followed by is anything, also nothing": (
        [("1", "REVU-", 0), ("2", "user_", 0)], [("1", "2", "user_")],
    ),
    "other references take no part": (
        [("1", "REVU-1", 1), ("2", "user_2", 1), ("3", "crm-3", 99), ("4", "user-4", 99), ("5", "", 99)],
        [("1", "2", "user_2")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "expected"), TOGETHER.values(), ids=list(TOGETHER))
def test_a_group_is_merged_as_the_rules_say(rows: Sequence[Any], expected: List[Any]) -> None:
    contacts = [contact(*row) for row in rows]
    for order in (contacts, contacts[::-1]):
        plan = plan_of(order)
        assert pairs_of(plan)[0] == expected[0], "the reference has to move with the first merge"
        assert sorted(pairs_of(plan), key=str) == sorted(expected, key=str)
        assert plan.skipped == []


APART = {
    "one contact alone": ([("1", "REVU-1")], None),
    "one user_ contact alone": ([("1", "user_1")], None),
    "two contacts of other references": ([("1", "crm-1"), ("2", "crm-2")], None),
    "a REVU- and another reference": ([("1", "REVU-1"), ("2", "crm-2")], None),
    "a user_ and another reference": ([("1", "user_1"), ("2", "crm-2")], None),
    "several user_ and a REVU-": (
        [("1", "REVU-1"), ("2", "user_2"), ("3", "user_3")],
        "several_user_refs",
    ),
    "several user_ and no REVU-": ([("2", "user_2"), ("3", "user_3")], "several_user_refs"),
    "several REVU- and no user_": ([("1", "REVU-1"), ("2", "REVU-2")], "no_user_ref"),
    **{
        f"{reference!r} is no user_ reference": ([("1", "REVU-1"), ("2", reference)], None)
        for reference in (
            "User_2",
            "USER_2",
            "userX2",
            "user-2",
            "user2",
            " user_2",
            "\tuser_2",
            "xuser_2",
            "ｕser_2",
        )
    },
    **{
        f"{reference!r} is no REVU- reference": ([("1", reference), ("2", "user_2")], None)
        for reference in (
            "revu-1",
            "Revu-1",
            "REVU_1",
            "REVU1",
            "REVU\u20101",
            " REVU-1",
            "XREVU-1",
        )
    },
}


@pytest.mark.parametrize(("rows", "code"), APART.values(), ids=list(APART))
def test_whatever_is_not_certain_is_not_merged(rows: Sequence[Any], code: Optional[str]) -> None:
    contacts = [contact(*row) for row in rows]
    plan = plan_of(contacts)
    assert plan.groups == []
    assert [(skip.email, skip.code) for skip in plan.skipped] == (
        [("ada@example.com", code)] if code else []
    )
    if code:
        assert sorted(map(key_of, plan.skipped[0].contacts)) == sorted(map(key_of, contacts))
    # A group that is not known whole is skipped for that reason, whatever else may be wrong with it.
    takes_part = any(one.external_ref.startswith(("user_", "REVU-")) for one in contacts)
    broken = plan_of(contacts, ["ada@example.com"])
    assert [skip.code for skip in broken.skipped] == ["invalid_row"] * takes_part
    assert not broken.groups


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("ada@example.com", "ada@example.com", True), ("Ada@Example.COM", " ada@example.com\t", True),
        ("\u00e9VA@example.com", "\u00a0\u00e9va@EXAMPLE.com\u3000", True),
        ("stra\u00dfe@example.com", "STRASSE@example.com", False),
        ("\u00c9va@example.com", "\u00e9va@example.com", False), ("\ufb01@example.com", "fi@example.com", False),
        ("\u212aate@example.com", "kate@example.com", False), ("\u017fam@example.com", "sam@example.com", False),
        ("\u0130ris@example.com", "iris@example.com", False),
        ("e\u0301va@example.com", "\u00e9va@example.com", False), ("\uff41da@example.com", "ada@example.com", False),
        ("a\u200bda@example.com", "ada@example.com", False),
        ("ada@xn--strae-oqa.example", "ada@stra\u00dfe.example", False),
        ("ada@example.com", "ada@example.org", False), ("ada@example.com", "a da@example.com", False),
        ("ada+1@example.com", "ada@example.com", False), ("a.da@example.com", "ada@example.com", False),
        ("\u00e9va@example.com", "eva@example.com", False),
    ],
)  # fmt: skip
def test_emails_are_compared_trimmed_and_without_the_case_of_ascii_letters(
    one: str, other: str, together: bool
) -> None:
    plan = plan_of([contact("1", "REVU-1", email=one), contact("2", "user_2", email=other)])
    assert pairs_of(plan) == ([("1", "2", "user_2")] if together else [])
    assert plan.skipped == []


SYSTEM, USER = contact("1", "REVU-1", 3), contact("2", "user_2")
AGAIN = contact("1", "REVU-1", 4)
EVE = "eve@example.com"


def test_a_conflict_says_what_differs() -> None:
    """That it spoils its groups is in the reference below."""
    (first, second) = plan_of_file(
        map(cells_of, [SYSTEM, replace(AGAIN, updated="2020")])
    ).invalid_rows
    assert re.match("one REV_USER_ID with different data: .*, line 2; .*, line 3$", first.reason)
    assert second.reason == first.reason


def cells_of(one: Contact) -> Cells:
    return tuple(str(getattr(one, field)) for field in tool.COLUMNS)


def test_a_bad_row_spoils_its_group_and_no_other() -> None:
    rows = [
        SYSTEM,
        USER,
        contact("3", "REVU-3", email="eve@example.com"),
        contact("4", "user_4", email="eve@example.com"),
    ]
    plan = plan_of(rows, emails_in_invalid_rows=["ada@example.com"])
    assert pairs_of(plan) == [("3", "4", "user_4")]
    assert [(skip.email, skip.code) for skip in plan.skipped] == [
        ("ada@example.com", "invalid_row")
    ]


# -- choices -------------------------------------------------------------------------------------------

TWO_USERS = [("1", "REVU-1", 9), ("2", "REVU-2", 10), ("3", "user_3", 1), ("4", "user_4", 2), ("5", "crm-5", 99)]  # fmt: skip
NO_SYSTEM = [("3", "user_3", 1), ("4", "user_4", 2), ("6", "user_6", 3)]
NO_USER = [("1", "REVU-1", 9), ("2", "REVU-2", 10), ("6", "REVU-6", 10, "2020-01-01")]
CHOSEN: Dict[str, Tuple[Sequence[Any], str, List[Any], List[str]]] = {
    "a user_ of several: the REVU- of the first rule gets its reference": (
        TWO_USERS, "user_3", [("2", "3", "user_3"), ("2", "4", None), ("2", "1", None)], ["4"],
    ),
    "the other": (TWO_USERS, "user_4", [("2", "4", "user_4"), ("2", "3", None), ("2", "1", None)], ["3"]),
    "a user_ where there is no REVU-: itself": (NO_SYSTEM, "user_3", [("3", "6", None), ("3", "4", None)], ["6", "4"]),
    "a REVU- where there is no user_: itself, whatever the counts": (
        NO_USER, "REVU-1", [("1", "6", None), ("1", "2", None)], [],
    ),
    "the only user_": ([("1", "REVU-1", 0), ("2", "user_2", 9)], "user_2", [("1", "2", "user_2")], []),
    "of one contact alone": ([("2", "user_2", 9)], "user_2", [], []),
    "of one REVU- alone": ([("1", "REVU-1", 9)], "REVU-1", [], []),
    "of one contact that matters": ([("1", "REVU-1", 9), ("2", "crm", 9)], "REVU-1", [], []),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "choice", "expected", "lost"), CHOSEN.values(), ids=list(CHOSEN))
def test_a_chosen_reference_is_what_the_one_contact_has_in_the_end(
    rows: Sequence[Any], choice: str, expected: List[Any], lost: List[str]
) -> None:
    contacts = [contact(*row) for row in rows]
    for order in (contacts, contacts[::-1]):
        plan = plan_of(order, choices={"ada@example.com": choice})
        assert pairs_of(plan) == expected and plan.skipped == []
        for group in plan.groups:
            assert list(map(key_of, group.lost_refs())) == lost
            references = {pair.new_ref for pair in group.pairs if pair.new_ref} or {
                group.primary.external_ref
            }
            assert references == {choice}


FOLLOWED_NOT = {
    "nobody's reference": (TWO_USERS, "user_9", "user_9 for ada@example.com is not the reference of one contact to choose from (user_4, "),
    "in another case": (TWO_USERS, "USER_3", "choose from (user_4"),
    "of a contact that takes no part": (TWO_USERS, "crm-5", "choose from (user_4"),
    "a REVU- beside a user_": (
        TWO_USERS, "REVU-2", "choose from (user_4, user_3)",
    ),
    "a REVU- of a plain group": ([("1", "REVU-1", 0), ("2", "user_2", 9)], "REVU-1", "choose from (user_2)"),
    "a reference of two contacts": ([*NO_SYSTEM, ("7", "user_3", 0)], "user_3", "not the reference of one contact"),
    "a reference of two REVU- contacts": ([*NO_USER, ("7", "REVU-1", 0)], "REVU-1", "not the reference of one contact"),
    "an email with no contact": ([], "user_3", "choose from (nothing)"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "choice", "says"), FOLLOWED_NOT.values(), ids=list(FOLLOWED_NOT))
def test_a_choice_that_can_not_be_followed_stops_everything(
    rows: Sequence[Any], choice: str, says: str
) -> None:
    others = [contact("11", "REVU-11", email=EVE), contact("12", "user_12", email=EVE)]
    with pytest.raises(tool.FatalError) as stopped:
        plan_of([*others, *(contact(*row) for row in rows)], choices={"ada@example.com": choice})
    assert stopped.value.exit_code == 2 and f"{choice} for ada@example.com " in str(stopped.value)
    assert says in str(stopped.value)


def test_a_group_that_is_not_completely_known_is_skipped_whatever_is_chosen() -> None:
    for choice in ("user_3", "user_9", "REVU-1"):
        plan = plan_of(
            [contact(*row) for row in TWO_USERS], ["ada@example.com"], {"ada@example.com": choice}
        )
        assert [(skip.email, skip.code) for skip in plan.skipped] == [
            ("ada@example.com", "invalid_row")
        ]
        assert plan.groups == [] and plan.skipped[0].choice_lines() == {}
    assert plan_of([SYSTEM, USER], ["x@example.com"], {"x@example.com": "user_1"}).count() == 1


# Two names, and whether they may be one person's.
NAMES: List[Tuple[str, str, bool]] = [
    ("Ada Reyes", "Ada Reyes", True),
    ("Ada Reyes", " ADA REYES ", True),
    ("Ada Reyes", "", True),
    ("Ada Reyes", "ada", True),
    ("Ada Reyes", "Reyes, Ada", True),
    ("Ada Reyes", "Ada M. Reyes", True),
    ("Ada Reyes", "Ada@Example.com", True),
    ("Eve Novak", "Ada", True),  # which is the local part of the address
    ("Eve Novak", "REVU-2", True),
    ("Eve Novak", "revu-2", True),
    ("Ada Reyes", "Eve Novak", False),
    ("Ada Reyes", "Ada Novak", False),
    ("Ada Reyes", "A. Reyes", False),
    ("\u5c71\u7530", "\u7530\u4e2d", False),
    ("Ada Reyes", "Adam Reyes", False),
]


@pytest.mark.parametrize(("one", "other", "fits"), NAMES)
def test_different_names_are_warned_of_and_merged_all_the_same(
    one: str, other: str, fits: bool
) -> None:
    people = [replace(SYSTEM, display_name=one), replace(USER, display_name=other)]
    for order in (people, people[::-1]):
        plan = plan_of(order)
        assert pairs_of(plan) == [("1", "2", "user_2")]
        assert [warning["code"] for warning in plan.find_warnings()] == (
            [] if fits else ["names_differ"]
        )
        for warning in plan.find_warnings():
            assert (
                warning["email"] == "ada@example.com"
                and one in warning["warning"]
                and other in warning["warning"]
            )


def test_where_a_display_name_says_nothing_the_full_name_is_compared() -> None:
    people = [
        replace(SYSTEM, display_name="ada@example.com", full_name="Eve"),
        replace(USER, display_name="Bob"),
    ]
    assert [warning["code"] for warning in plan_of(people).find_warnings()] == ["names_differ"]


def test_a_chosen_group_of_many_is_warned_of() -> None:
    for email, size, warned in (
        ("ada@example.com", 3, False),
        ("ada@example.com", 4, True),
        ("info@example.com", 3, True),
    ):
        people = [contact(str(number), f"user_{number}", email=email) for number in range(size)]
        plan = plan_of(people, choices={email: "user_1"})
        assert [warning["code"] for warning in plan.find_warnings()] == ["shared_mailbox"] * warned
        assert not warned or f"joins {size} contacts" in plan.find_warnings()[0]["warning"]


ROLES = [
    "info", "support", "help", "helpdesk", "service", "sales", "contact", "hello", "office", "team", "admin",
    "administrator", "billing", "accounts", "accounting", "finance", "hr", "jobs", "careers", "marketing", "press",
    "media", "legal", "privacy", "security", "abuse", "postmaster", "hostmaster", "webmaster", "root", "mail",
    "email", "reception", "orders", "booking", "bookings", "customerservice", "customer-service", "customercare",
    "feedback",
]  # fmt: skip
PLACEHOLDERS = [
    "noreply", "no-reply", "no_reply", "donotreply", "do-not-reply", "none", "null", "nobody", "unknown", "anonymous",
    "test", "na", "n-a", "noemail", "no-email", "invalid",
]  # fmt: skip
LIMITS = {
    **dict.fromkeys(("ada", "information", "info.ada", "ada+info", "noreplyx", "xtest", "", "test.er"), 3),
    **dict.fromkeys((*ROLES, "INFO", "Support", "info+ada", "info+a+b"), 2),
    **dict.fromkeys((*PLACEHOLDERS, "NoReply", "noreply+42", "None"), 1),
}  # fmt: skip


@pytest.mark.parametrize(("local", "limit"), LIMITS.items(), ids=list(LIMITS))
def test_an_address_with_more_contacts_than_one_person_has_is_left_alone(
    local: str, limit: int
) -> None:
    email = f"{local}@example.com"
    for kinds in ("RRRRR", "URRRR", "UUUUU", "UURRR"):
        people = [
            contact(str(number), f"{'user_' if kind == 'U' else 'REVU-'}{number}", email=email)
            for number, kind in enumerate(kinds)
        ]
        others = [contact(f"x{number}", f"crm-{number}", email=email) for number in range(5)]
        for size in range(2, 6):
            plan = plan_of([*people[:size], *others])
            codes = [skip.code for skip in plan.skipped]
            assert (codes == ["shared_mailbox"]) == (size > limit), (kinds, size)
            assert size <= limit or (not plan.groups and plan.skipped[0].choice_lines() == {})
            chosen = plan_of(
                [*people[:size], *others], choices={email.lower(): people[0].external_ref}
            )
            assert [len(group.pairs) for group in chosen.groups] == [
                size - 1
            ] and not chosen.skipped


def test_other_references_are_counted_with_an_example() -> None:
    others = [
        contact(str(number), reference)
        for number, reference in enumerate(("usr_b", "usr_a", "crm", "REVU-1"))
    ]
    plan = plan_of_file(map(cells_of, [*others, others[0]]))
    assert (plan.other_refs, plan.other_ref) == (3, "usr_b")
    assert plan.others_line() == "3 contacts with other references, for example usr_b, take no part"
    assert plan_of_file(map(cells_of, [SYSTEM, USER])).others_line() == ""


@pytest.fixture
def prefix() -> Iterator[None]:
    before = Contact.user_prefix
    yield
    Contact.user_prefix = before


def test_another_prefix_takes_the_place_of_user_(prefix: None) -> None:
    rows = [SYSTEM, contact("2", "usr_2"), contact("3", "user_3")]
    assert pairs_of(plan_of(rows)) == [("1", "3", "user_3")]
    Contact.user_prefix = tool.check_user_prefix(" usr_ ")
    assert pairs_of(plan_of(rows)) == [("1", "2", "usr_2")]
    two = plan_of([*rows, contact("4", "usr_4", email="ada@example.com")])
    assert (
        two.skipped[0].code == "several_user_refs"
        and "usr_ reference" in tool.skip_words("several_user_refs")[0]
    )


@pytest.mark.parametrize("text", ["REVU-", "REVU-x", "R", "REVU", " REV "])
def test_a_prefix_that_overlaps_with_the_systems_is_refused(text: str) -> None:
    with pytest.raises(tool.FatalError) as stopped:
        tool.check_user_prefix(text)
    assert stopped.value.exit_code == 2 and "DEVREV_USER_REF_PREFIX" in str(stopped.value)
    assert tool.check_user_prefix("") == tool.check_user_prefix("  ") == "user_"
    assert tool.check_user_prefix("revu-") == "revu-" and tool.check_user_prefix("usr") == "usr"


# -- age -----------------------------------------------------------------------------------------------

NOON = 1706702400 * 10**9  # 2024-01-31 12:00:00 UTC
INSTANTS = {
    **dict.fromkeys(
        (
            "2024-01-31T12:00:00Z", "2024-01-31 12:00:00", "2024-01-31T12:00", "2024-01-31T12:00:00.000Z",
            "2024-01-31 12:00:00.000000000 +0000", "2024-01-31T14:00:00+02:00", "2024-01-31 04:00:00.000 -0800",
            "2024-01-31T17:30:00+0530", "2024-01-31 13:00:00+01", " 2024-01-31T12:00:00 Z\t", "2024-01-31T10:29:00 -01:31",
            "2024-02-01T01:00:00+13:00", "2024-01-31 12:00:00,0",
        ),
        NOON,
    ),
    "2024-01-31T12:00:00.123456789Z": NOON + 123456789, "2024-01-31T12:00:00.5Z": NOON + 5 * 10**8,
    "2024-01-31T12:00:01Z": NOON + 10**9, "2024-01-31": NOON - 12 * 3600 * 10**9, "1970-01-01T00:00:00Z": 0,
    **dict.fromkeys(
        (
            "", "NULL", "2024", "2024-13-01", "2024-02-30", "0000-01-01", "2024-01-31 25:00", "2024-01-31 12:00:60",
            "2024-01-31 12:00:00 PST", "2024-01-31 12:00:00 UTC", "2024-1-31", "31.01.2024", "1/31/2024 12:00", "1706702400",
            "2024-01-31 12:00:00.1234567890", "2024-01-31T12:00:00+1:00", "2024-01-31T12:00:00+01:60", "45322.5", "12:00",
            "2024-01-31  12:00", "2024-01-31T12", "2024-01-31 12:00:00 PM", "\u0662024-01-31",
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "instant"), INSTANTS.items(), ids=list(INSTANTS))
def test_iso_8601_is_read_and_nothing_else(text: str, instant: Optional[int]) -> None:
    assert tool.parse_instant(text) == instant


AGES: List[Tuple[List[str], str, bool]] = [
    # dates of contacts 1, 2 ..., who is the primary, whether age could not decide
    (["2024-01-02T00:00:00+05:00", "2024-01-01T20:00:00Z"], "1", False),
    (["2024-01-01T20:00:00Z", "2024-01-02T00:00:00+05:00"], "2", False),
    (["2024-01-01T00:00:00.2Z", "2024-01-01T00:00:00.19Z"], "2", False),
    (["2024-01-01", "2024-01-01"], "1", False), (["2024-01-01", ""], "1", True), (["", "2024-01-01"], "1", True),
    (["1/31/2024", "2023-12-31"], "1", True), (["2024-01-03", "2024-01-02", "x"], "1", True),
]  # fmt: skip


@pytest.mark.parametrize(("dates", "primary", "undecided"), AGES)
def test_of_contacts_with_as_many_tickets_the_oldest_remains(
    dates: List[str], primary: str, undecided: bool
) -> None:
    system = [contact(str(n), f"REVU-{n}", 5, date) for n, date in enumerate(dates, 1)]
    system.append(contact("0", "REVU-0", 4, "?"))  # of another count: its date decides nothing
    ranked, unknown = tool.rank(system[::-1])
    assert (key_of(ranked[0]), unknown) == (primary, undecided)
    assert sorted(map(key_of, ranked)) == sorted(map(key_of, system))
    codes = [warning["code"] for warning in plan_of([*system[:2], USER]).find_warnings()]
    assert codes == (["age_undecided"] if undecided and len(dates) < 3 else [])


PRIMARY_USER: Dict[str, Tuple[Sequence[Any], Dict[str, str], List[Any]]] = {
    "a pair": ([("1", "REVU-1", 9), ("2", "user_2", 0)], {}, [("2", "1", None)]),
    "several REVU-": (
        [("1", "REVU-1", 1), ("2", "user_2", 0), ("3", "REVU-3", 2)], {}, [("2", "3", None), ("2", "1", None)],
    ),
    "a chosen user_": (
        [("1", "REVU-1", 1), ("2", "user_2", 0), ("3", "user_3", 2)], {"ada@example.com": "user_2"},
        [("2", "3", None), ("2", "1", None)],
    ),
    "a chosen REVU-": ([("1", "REVU-1", 1), ("3", "REVU-3", 2)], {"ada@example.com": "REVU-1"}, [("1", "3", None)]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "choices", "pairs"), PRIMARY_USER.values(), ids=list(PRIMARY_USER)
)
def test_with_the_user_as_primary_no_reference_moves(
    rows: Sequence[Any], choices: Dict[str, str], pairs: List[Any]
) -> None:
    contents = tool.CsvContents([contact(*row) for row in rows])
    plan = tool.detect(contents, choices, "user")
    assert pairs_of(plan) == pairs
    for group in plan.groups:
        assert {pair.new_ref for pair in group.pairs} == {
            None
        } and group.primary_ref() == group.primary.external_ref


# -- look-alikes -----------------------------------------------------------------------------------------

LOOK_ALIKES = [
    ("stra\u00dfe@example.com", "strasse@example.com"), ("\ufb01on@example.com", "fion@example.com"),
    ("\u00c9va@example.com", "\u00e9va@example.com"), ("e\u0301va@example.com", "\u00e9va@example.com"),
    ("\uff41da@example.com", "ada@example.com"), ("\u212aate@example.com", "kate@example.com"),
    ("\u017fam@example.com", "sam@example.com"), ("ada@xn--bcher-kva.example", "ada@b\u00fccher.example"),
    ("ada@XN--BCHER-KVA.example", "ada@B\u00fccher.example"), ("ada@xn--strae-oqa.example", "ada@strasse.example"),
    ("a\u200bda@example.com", "ada@example.com"), ("ada\u00ad@example.com", "ada@example.com"),
    ("ada@example.com\ufeff", "ada@example.com"), ("ada@exam\u2060ple.com", "ada@example.com"),
    ("ada\ufe0f@example.com", "ada@example.com"), ("ada\u3164@example.com", "ada@example.com"),
]  # fmt: skip
UNLIKE = [
    ("ada@example.com", "eve@example.com"),
    ("ada@example.com", "ada@example.org"),
    ("ada@example.com", "ADA@Example.com"),
    ("\u0430da@example.com", "ada@example.com"),  # a Cyrillic letter: nothing folds it
    ("ada.reyes@example.com", "adareyes@example.com"),
    ("ada+1@example.com", "ada@example.com"),
    ("\u00e9va@example.com", "eva@example.com"),
    ("ada@xn--!.example", "ada@!.example"),
    ("xn--bcher-kva@example.com", "b\u00fccher@example.com"),
]


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKES)
def test_look_alikes_are_listed_with_their_lines_and_never_joined(one: str, other: str) -> None:
    eve = [contact("3", "REVU-3", email=EVE), contact("4", "user_4", email=EVE)]
    rows = [*eve, contact("1", "REVU-1", email=one), contact("2", "user_2", email=other)]
    plan = plan_of_file(map(cells_of, rows))
    assert pairs_of(plan) == [("3", "4", "user_4")]
    (found,) = plan.look_alikes
    assert found["emails"] == sorted(map(tool.email_key, (one, other)))
    assert sorted((line["email"], line["line"]) for line in found["lines"]) == sorted(
        [(one, 4), (other, 5)]
    )
    assert not [skip for skip in plan.skipped if skip.code != "invalid_row"]


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_what_no_comparison_joins_is_no_look_alike(one: str, other: str) -> None:
    rows = [
        contact("1", "REVU-1", email=one),
        contact("2", "crm-2", email=other),
        contact("3", "crm-3", email="STRA\u00dfE@x"),
    ]
    assert (
        plan_of_file(map(cells_of, [*rows, contact("4", "crm-4", email="strasse@x")])).look_alikes
        == []
    )


def test_every_group_that_a_bad_row_looks_like_is_left_alone() -> None:
    for one, other in LOOK_ALIKES:
        rows = [contact("1", "REVU-1", email=other), contact("2", "user_2", email=other)]
        bad = (*cells_of(contact("3", "user_3", email=one))[:5], "x", "", "")
        plan = plan_of_file([*map(cells_of, rows), bad])
        assert pairs_of(plan) == [] and [skip.code for skip in plan.skipped] == ["invalid_row"]


CHOICES: Dict[str, Tuple[bytes, Any]] = {
    "plain": (b"EMAIL,EXTERNAL_REF\nada@example.com,user_1\n", {"ada@example.com": "user_1"}),
    "BOM, CRLF, another case, another order, more columns, blank lines": (
        b'\xef\xbb\xbfWhy,external_ref , Email\r\n\r\nx,user_1, Ada@Example.com \r\n\r\n"a\nb", REVU-2 ,"c,d"\r\n',
        {"ada@example.com": "user_1", "c,d": "REVU-2"},
    ),
    "a header alone": (b"EMAIL,EXTERNAL_REF\n", {}), "nothing": (b"", "the file is empty"),
    "one column missing": (
        b"EMAIL,REFERENCE\nada@example.com,user_1\n", "no column EXTERNAL_REF (found: EMAIL, REF",
    ),
    "both columns missing": (b"ada@example.com,user_1\n", "no column EMAIL, EXTERNAL_REF"),
    "a column twice": (b"EMAIL,email,EXTERNAL_REF\na,a,user_1\n", "EMAIL is there twice"),
    "an apostrophe before what looks like a formula": (
        b"EMAIL,EXTERNAL_REF\n'=a@x,'=b\n'c@x,'d\n", {"=a@x": "=b", "'c@x": "'d"},
    ),
    "two choices": (
        b"EMAIL,EXTERNAL_REF\nada@example.com,user_1\neve@example.com,user_1\n Ada@example.com,user_2\n",
        "line 4: a second choice for ada@example.com; cut",
    ),
    "the same choice twice": (b"EMAIL,EXTERNAL_REF\na,user_1\na,user_1\n", "line 3: a second choice for a"),
    "too few fields": (b"EMAIL,EXTERNAL_REF\nada@example.com\n", "line 2: empty EMAIL or EXTERNAL_REF"),
    "too many fields": (b"EMAIL,EXTERNAL_REF\na,b,user_1\n", "line 2: 3 fields instead of 2"),
    "no email": (b"EMAIL,EXTERNAL_REF\n ,user_1\n", "line 2: empty EMAIL or"),
    "no reference": (b"EMAIL,EXTERNAL_REF\na,user_1\nb,\n", "line 3: empty EMAIL or EXTERNAL_REF"),
    "an open quote": (b'EMAIL,EXTERNAL_REF\na,"user_1\n', "line 2: unexpected end of data"),
    "semicolons": (b"EMAIL;EXTERNAL_REF;X\na;user_1\n;;\nb;user_2;c\n", {"a": "user_1", "b": "user_2"}),
    "tabs": (b"EXTERNAL_REF\tEMAIL\nuser_1\ta\n", {"a": "user_1"}),
    "blank cells": (b"EMAIL,EXTERNAL_REF\n,\na,user_1,,\n", {"a": "user_1"}),
    "a ZIP": (b"PK\x03\x04rest", "a ZIP archive"), "Latin-1": (b"EMAIL,EXTERNAL_REF\n\xe9va,user_1\n", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), CHOICES.values(), ids=list(CHOICES))
def test_a_file_of_choices_is_read_or_refused(
    tmp_path: Path, content: bytes, expected: Any
) -> None:
    path = tmp_path / "choices.csv"
    path.write_bytes(content)
    if isinstance(expected, dict):
        assert tool.read_choices(path) == expected
        return
    for where, says in (
        (path, expected),
        (tmp_path, "a folder, not a file"),
        (tmp_path / "missing", "can't be read"),
    ):
        with pytest.raises(tool.FatalError) as stopped:
            tool.read_choices(where)
        assert (
            stopped.value.exit_code == 2
            and str(stopped.value).startswith(f"{where}: ")
            and says in str(stopped.value)
        )


# -- the plan's id -------------------------------------------------------------------------------------

GROUP = [("1", "REVU-1", 9), ("2", "REVU-2", 8), ("3", "user_3", 1)]


def id_of(contacts: Iterable[Contact], options: Mapping[str, Any] = {}, **choices: str) -> str:
    plan = plan_of(
        contacts, choices={f"{name}@example.com": reference for name, reference in choices.items()}
    )
    return tool.plan_id(plan.groups, **{"count_policy": "exact", "timelines": True, **options})


def test_the_id_of_a_plan_is_of_what_is_merged_and_of_nothing_else() -> None:
    contacts = [contact(*row) for row in GROUP]
    eve = [
        contact("7", "user_7", email=EVE),
        contact("8", "user_8", email=EVE),
        contact("9", "REVU-9", email=EVE),
    ]
    known = id_of([*contacts, *eve])
    assert len(known) == 12 and int(known, 16) >= 0 and known == known.lower()
    same = [
        id_of([*eve, *contacts[::-1]]),
        id_of(contacts),  # what is skipped is not merged
        id_of(
            replace(one, display_name="Renamed", full_name="x", updated="", created="2020")
            for one in contacts
        ),
        id_of(replace(one, tickets=one.tickets + 1) for one in contacts),
        id_of(contacts, ada="user_3"),
    ]
    assert set(same) == {known}
    other = [
        id_of([]),
        id_of(contacts, {"count_policy": "at-least"}),
        id_of(contacts, {"timelines": False}),
        id_of([replace(contacts[0], tickets=0), *contacts[1:]]),
        id_of([*contacts[:2], replace(contacts[2], external_ref="user_33")]),
        id_of([*contacts, *eve], eve="user_7"),
        id_of([*contacts, *eve], eve="user_8"),
    ]
    assert len({known, *other}) == len(other) + 1
    assert known == "086547bf4ab5", (
        "a preview and a later run of the same version have to agree, on every machine"
    )


# -- contacts --------------------------------------------------------------------------------------------


def test_a_contact_is_read_back_as_it_was_written() -> None:
    one = contact("7", "user_7", 3)
    assert Contact.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Contact.from_json({"id": one.id}).full_name == ""
    assert set(asdict(one)) == set(tool.COLUMNS) and tuple(tool.COLUMNS.values()) == COLUMNS


@pytest.mark.parametrize(
    ("display_name", "full_name", "name"),
    [("Ada", "Ada Reyes", "Ada"), (" ", "Ada Reyes", "Ada Reyes"), ("", "", "REVU-1"), (" Ada ", "", "Ada")],
)  # fmt: skip
def test_what_a_contact_is_called(display_name: str, full_name: str, name: str) -> None:
    assert replace(SYSTEM, display_name=display_name, full_name=full_name).name == name


# -- reading and detection together, against a reference that holds everything in memory ----------------

ID, EMAIL, REFERENCE, CREATED, COUNT = (
    COLUMNS.index(name)
    for name in ("REV_USER_ID", "EMAIL", "EXTERNAL_REF", "CREATED_AT", "TICKET_COUNT")
)


class Outcome(NamedTuple):
    """What detection has to say of a file."""

    pairs: Dict[
        str, Tuple[str, Set[Tuple[str, Optional[str]]]]
    ]  # email -> primary, {(duplicate, new reference)}
    skips: Dict[str, str]
    invalid_rows: int
    contacts_read: int


def normal(email: str) -> str:
    return "".join(char.lower() if char.isascii() else char for char in email.strip())


def reference_of(rows: Iterable[Cells], choices: Mapping[str, str] = {}) -> Optional[Outcome]:
    """The contract's Detection section, rule by rule; None where a choice can't be followed."""
    rows = [row for row in rows if row]
    good = [row for row in rows if is_good(row)]
    bad = [row for row in rows if not is_good(row)]
    trimmed = [tuple(cell.strip() for cell in row) for row in good]
    distinct = {(*row[:COUNT], str(int(float(row[COUNT]))), *row[COUNT + 1 :]) for row in trimmed}
    conflicting = {one for one, times in Counter(row[ID] for row in distinct).items() if times > 1}
    invalid = len(bad) + sum(row[ID] in conflicting for row in distinct)
    pairs: Dict[str, Tuple[str, Set[Tuple[str, Optional[str]]]]] = {}
    skips: Dict[str, str] = {}
    spoilt_emails = {email for row in bad for email in addresses(row) if "@" in email}
    folded = {email.casefold() for email in spoilt_emails}
    conflicting_emails = {row[EMAIL].casefold() for row in distinct if row[ID] in conflicting}
    for email in {normal(row[EMAIL]) for row in distinct} | {
        one for one in choices if one.casefold() not in folded
    }:
        group = [row for row in distinct if normal(row[EMAIL]) == email]
        users = [row for row in group if row[REFERENCE].startswith("user_")]
        system = [row for row in group if row[REFERENCE].startswith("REVU-")]
        if email.casefold() in conflicting_emails | folded:
            if users or system:
                skips[email] = "invalid_row"
        elif email in choices:
            kept = [row for row in users or system if row[REFERENCE].strip() == choices[email]]
            if len(kept) != 1:
                return None
            primary = first_of(system)[ID] if users and system else kept[0][ID]
            others = {
                (row[ID], row[REFERENCE] if row == kept[0] else None)
                for row in users + system
                if row[ID] != primary
            }
            if others:
                pairs[email] = primary, others
        elif not users and not system:
            continue
        elif len(users) + len(system) > (2 if email.startswith("info@") else 3):
            skips[email] = "shared_mailbox"
        elif len(users) > 1:
            skips[email] = "several_user_refs"
        elif len(system) > 1 and not users:
            skips[email] = "no_user_ref"
        elif system and users:
            primary = first_of(system)[ID]
            others = {(row[ID], None) for row in system if row[ID] != primary}
            pairs[email] = primary, {(users[0][ID], users[0][REFERENCE]), *others}
    return Outcome(pairs, skips, invalid, len(distinct))


def first_of(rows: Iterable[Cells]) -> Cells:
    """The row with the most tickets; of several the oldest; of several the one with the smallest id."""
    most = max(int(row[COUNT]) for row in rows)
    best = [row for row in rows if int(row[COUNT]) == most]
    oldest = min(row[CREATED] for row in best)
    return min((row for row in best if row[CREATED] == oldest), key=lambda row: row[ID])


def is_good(row: Cells) -> bool:
    return (
        len(row) == len(COLUMNS)
        and not any("\0" in cell for cell in row)
        and all(row[place].strip() for place in (ID, EMAIL, REFERENCE))
        and row[EMAIL].strip() not in BAD_EMAILS
        and row[COUNT].strip() in COUNTS
    )


def addresses(row: Cells) -> Set[str]:
    """Whose group a bad row may belong to: its email may be in any cell unless all others are in their place."""
    is_whole = len(row) == len(COLUMNS) and row[ID].strip() and row[REFERENCE].strip()
    is_whole = is_whole and row[COUNT].strip() in COUNTS and row[COUNT + 2].startswith("20")
    cells = row[EMAIL : EMAIL + 1] if is_whole else row
    return {
        normal(part)
        for cell in cells
        for part in (cell, *cell.split(","))
        for part in (part.replace("\0", ""),)
    }


COUNTS = ("0", "1", "7", "12", "007", "7.0", "12.00")
BAD_EMAILS = ("front desk", "c,d@example.com", "NULL", "b@@example.com")
EMAILS = (
    "a@example.com", "A@Example.com", " a@example.com ", "b@example.com", "o'b@example.com", "stra\u00dfe@example.com",
    "STRASSE@example.com", "info@example.com", *BAD_EMAILS,
)  # fmt: skip
REFERENCES = (
    "REVU-1", "REVU-2", "REVU-3", "user_1", "user_2", "user_3", "revu-1", "User_1", "userX1", " user_1", "user_2 ",
    "crm",
)  # fmt: skip
BAD_COUNTS = ("", " ", "-1", "x", "1.5", "1e3", "0x1", "\u00b2", "nan", "1 2", "9" * 30, "1.000", "1,204")  # fmt: skip

contacts = st.tuples(
    st.sampled_from([f"don:identity:dvrv-us-1:devo/SANDBOX1:revu/{number}" for number in range(1, 15)]),
    st.sampled_from(["Ada", "Okafor, Chidi", 'Ben "B" Novak', "two\nlines", "\u5c71\u7530 \u592a\u90ce", ""]),
    st.sampled_from(EMAILS), st.sampled_from(REFERENCES), st.sampled_from(["", "Ada Reyes"]), st.sampled_from(COUNTS),
    st.sampled_from(["2023-01-01", "2024-01-01", "2024-06-01"]), st.sampled_from(["2025-01-01", ""]),
)  # fmt: skip


SOMEONE = ("don:identity:dvrv-us-1:devo/SANDBOX1:revu/99", "Eve", EVE, "REVU-99", "", "0", "2024-01-01", "")  # fmt: skip


@st.composite
def files(draw: Any) -> List[Cells]:
    """Rows of contacts; some are there again, changed or spoilt, in any order, and lines may be blank."""
    people = draw(st.lists(contacts, min_size=1, max_size=10, unique_by=lambda row: row[ID]))
    again = st.sampled_from(people)
    odd = draw(
        st.lists(
            st.one_of(again, again.flatmap(changed), again.flatmap(spoilt), st.just(())), max_size=3
        )
    )
    return draw(st.permutations([*people, *odd, SOMEONE]))  # type: ignore[no-any-return]


def changed(row: Cells) -> "st.SearchStrategy[Cells]":
    """One id with other data."""
    return contacts.map(lambda other: (row[ID], *other[1:]))


def spoilt(row: Cells) -> "st.SearchStrategy[Cells]":
    def put(place: int, *values: str) -> "st.SearchStrategy[Cells]":
        return st.sampled_from(values).map(lambda value: (*row[:place], value, *row[place + 1 :]))

    return st.one_of(
        put(COUNT, *BAD_COUNTS),
        *(put(place, "", "  ") for place in (ID, EMAIL, REFERENCE)),
        *(put(place, row[place][:2] + "\0" + row[place][2:]) for place in (ID, 1, EMAIL)),
        st.integers(1, len(row) - 1).map(lambda size: row[:size]),
        st.integers(0, len(row)).map(lambda place: (*row[:place], "stray", *row[place:])),
    )


class Layout(NamedTuple):
    """How a file is written, which has to make no difference."""

    columns: Sequence[int]
    line_end: str
    bom: bool
    quote_all: bool
    delimiter: str = ","


layouts = st.builds(
    Layout, columns=st.permutations(range(len(COLUMNS))), line_end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(),
    quote_all=st.booleans(), delimiter=st.sampled_from([",", ";", "\t"]),
)  # fmt: skip
PLAIN = Layout(range(len(COLUMNS)), "\n", False, False)


def write(path: Path, rows: Iterable[Cells], layout: Layout) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(
        text,
        delimiter=layout.delimiter,
        lineterminator=layout.line_end,
        quoting=csv.QUOTE_ALL if layout.quote_all else csv.QUOTE_MINIMAL,
    )
    for row in (COLUMNS, *rows):
        writer.writerow(
            [row[place] for place in layout.columns] if len(row) == len(COLUMNS) else row
        )
    path.write_bytes(text.getvalue().encode("utf-8-sig" if layout.bom else "utf-8"))


def outcome_of(
    rows: Sequence[Cells], layout: Layout = PLAIN, choices: Mapping[str, str] = {}
) -> Outcome:
    plan = plan_of_file(rows, layout, choices)
    ids = Counter(one.id for group in plan.groups for one in group.contacts())
    assert not ids or max(ids.values()) == 1, "a contact is in two groups, or twice in one"
    for group in plan.groups:
        assert {normal(one.email) for one in group.contacts()} == {group.email}
        assert {key_of(pair.primary) for pair in group.pairs} == {key_of(group.primary)}
    emails = [group.email for group in plan.groups] + [skip.email for skip in plan.skipped]
    assert len(emails) == len(set(emails))
    for skip in plan.skipped:
        assert {normal(one.email) for one in skip.contacts} == {skip.email}
    for one in plan.look_alikes:
        assert len(one["emails"]) > 1
    starts = list(accumulate((1 + "".join(row).count("\n") for row in (("",), *rows)), initial=1))[
        1:
    ]
    at = {
        line: row
        for first, last, row in zip(starts, starts[1:], rows)
        for line in range(first, last)
    }
    named = [at[bad.line] for bad in plan.invalid_rows]
    assert [row for row in named if not is_good(row)] == [
        row for row in rows if row and not is_good(row)
    ]
    assert [bad.line for bad in plan.invalid_rows] == sorted(bad.line for bad in plan.invalid_rows)
    return Outcome(
        {
            group.email: (
                group.primary.id,
                {(pair.duplicate.id, pair.new_ref) for pair in group.pairs},
            )
            for group in plan.groups
        },
        {skip.email: skip.code for skip in plan.skipped},
        len(plan.invalid_rows),
        plan.contacts_read,
    )


@examples(400)
@given(rows=files(), layout=layouts)
def test_every_file_is_read_as_the_contract_says(rows: List[Cells], layout: Layout) -> None:
    assert outcome_of(rows, layout) == reference_of(rows)


@examples(150)
@given(rows=files(), cuts=st.lists(st.integers(0, 14), max_size=4), packed=st.booleans())
def test_the_split_into_files_makes_no_difference(
    rows: List[Cells], cuts: List[int], packed: bool
) -> None:
    places = [0, *sorted(cuts), len(rows)]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, (start, end) in enumerate(zip(places, places[1:])):
            paths.append(Path(folder) / f"part_{number}")
            write(
                paths[-1],
                rows[start:end],
                PLAIN._replace(columns=range(len(COLUMNS))[:: 1 - 2 * (number % 2)]),
            )
            if packed:
                paths[-1].write_bytes(gzip.compress(paths[-1].read_bytes()))
        plan = tool.detect(tool.ContactReader(paths).read(), {}, "revu")
    other = plan_of_file(rows)
    assert pairs_of(plan) == pairs_of(other) and plan.contacts_read == other.contacts_read
    assert [(skip.email, skip.code) for skip in plan.skipped] == [
        (skip.email, skip.code) for skip in other.skipped
    ]
    assert sorted(row.code for row in plan.invalid_rows) == sorted(
        row.code for row in other.invalid_rows
    )
    assert [one["emails"] for one in plan.look_alikes] == [
        one["emails"] for one in other.look_alikes
    ]
    assert tool.plan_id(plan.groups) == tool.plan_id(other.groups)


SPELLINGS: Sequence[Callable[[str], str]] = (
    str, str, str.upper, str.title, " {}\t".format, "\u00a0{}".format, "{}\u200b".format, "\ufeff{}".format, "x{}".format,
    lambda text: text.replace("a", "\u0430"), lambda text: text.replace("k", "\u212a"), lambda text: text.replace("ss", "\u00df"),
    lambda text: text.replace("fi", "\ufb01"), lambda text: text.replace("e", "e\u0301"), lambda text: text.replace("e", "\u00c9"),
    lambda text: text.replace("a", "\uff41"), lambda text: text.replace("i", "\u0130"), lambda text: text.replace("s", "\u017f"),
    lambda text: text.replace("@", "\uff20"), lambda text: text.replace(".", "\u3002"), lambda text: text.replace("a", "a\u00ad"),
)  # fmt: skip
spelled = st.tuples(
    st.one_of(
        st.sampled_from(["kassie.fink@example.com", "ada@strasse.example"]),
        st.text(min_size=1, max_size=3).map("{}@x".format),
    ),
    st.sampled_from(SPELLINGS),
    st.sampled_from(SPELLINGS),
).map(lambda one: one[2](one[1](one[0])))


@examples(300)
@given(st.lists(st.tuples(spelled, st.sampled_from(["REVU-", "user_"])), min_size=2, max_size=6))
def test_no_pair_joins_addresses_that_differ_in_more_than_blanks_and_ascii_case(
    people: List[Tuple[str, str]],
) -> None:
    rows = [
        contact(str(n), f"{kind}{n}", email=email.replace("\0", ""))
        for n, (email, kind) in enumerate(people)
    ]
    plan = plan_of_file([SOMEONE, *map(cells_of, rows)])
    for pair in plan.pairs():
        mine = [one for one in rows if one.id in (pair.primary.id, pair.duplicate.id)]
        assert len(mine) == 2 and len({normal(one.email) for one in mine}) == 1
        assert {normal(one.email) for one in (pair.primary, pair.duplicate)} == {
            normal(mine[0].email)
        }
    for one in plan.look_alikes:
        assert len(set(one["emails"])) > 1


@examples(400)
@given(
    rows=files(),
    choices=st.dictionaries(
        st.sampled_from(EMAILS).map(normal), st.sampled_from(REFERENCES).map(str.strip), max_size=2
    ),
)
def test_every_choice_is_followed_or_refused_as_the_contract_says(
    rows: List[Cells], choices: Dict[str, str]
) -> None:
    expected = reference_of(rows, choices)
    if expected is not None:
        assert outcome_of(rows, PLAIN, choices) == expected
        return
    with pytest.raises(tool.FatalError) as stopped:
        outcome_of(rows, PLAIN, choices)
    assert stopped.value.exit_code == 2


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "contacts.csv"
    for content in ("", "x\n" * 9, "\xff", ",".join(COLUMNS) + "\n" + ",".join("abcdefgh") * 3):
        write(path, map(cells_of, [SYSTEM, USER]), PLAIN)

        def meddle(content: str = content) -> Iterator[str]:
            path.write_text(content, encoding="latin-1")
            yield "ada@example.com"

        with pytest.raises(tool.FatalError) as stopped:
            tool.ContactReader([path]).read(meddle())
        assert stopped.value.exit_code == 2 and "changed while it was being read" in str(
            stopped.value
        )


def test_of_an_email_that_is_requested_every_row_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "contacts.csv"
    write(
        path,
        map(
            cells_of, [SYSTEM, contact("7", "user_7", email=EVE), contact("8", "crm", email=" F@x")]
        ),
        PLAIN,
    )
    assert tool.ContactReader([path]).read().contacts == []
    assert [one.email for one in tool.ContactReader([path]).read(["f@x", EVE]).contacts] == [
        EVE,
        "F@x",
    ]


# -- what DevRev says now --------------------------------------------------------------------------------


def live(one: Contact, **fields: Any) -> Dict[str, Any]:
    """The rev_user that agrees with a row of the export, but for some fields."""
    user = {"id": one.id, "email": one.email, "external_ref": one.external_ref, "state": "active"}
    return {**user, "rev_org": {"type": "rev_org", "id": ORG}, **fields}


OTHER_ORG = {"rev_org": {"type": "rev_org", "id": ORG.replace("ACME", "NORTH")}}
MERGED = {"primary_identity": {"id": "x"}}
AGREES: List[Tuple[Optional[Dict[str, Any]], str]] = [
    ({}, ""), ({"email": " ADA@Example.com "}, ""), ({"display_name": "Renamed"}, ""), (None, "not_found"),
    ({"state": "deactivated"}, "not_active"), ({"state": "deleted"}, "not_active"), ({"state": "locked"}, "not_active"),
    ({"state": "shadow"}, "not_active"), ({"state": "Active"}, "not_active"), ({"state": None}, "not_active"),
    (MERGED, "not_active"), ({"email": "ada@example.org"}, "email_changed"), ({"email": "\uff41da@example.com"}, "email_changed"),
    ({"email": ""}, "email_changed"), ({"email": None}, "email_changed"), ({"external_ref": "user_9"}, "external_ref_changed"),
    ({"external_ref": "revu-1"}, "external_ref_changed"), ({"external_ref": None}, "external_ref_changed"),
    ({"external_ref": " REVU-1\t"}, ""), ({"external_refs": ["REVU-1", " REVU-1", None, ""]}, ""), ({"external_refs": "crm"}, ""),
    ({"external_refs": ["REVU-1", "crm-1"]}, "several_external_refs"), ({"external_refs": ["user_9"]}, "several_external_refs"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code"), AGREES, ids=str)
def test_a_contact_that_is_not_as_exported_is_refused(fields: Any, code: str) -> None:
    now = None if fields is None else live(SYSTEM, **fields)
    problem = tool.live_contact_error(SYSTEM, now, SYSTEM.external_ref)
    assert (problem.code if problem else "") == code
    for name in set(fields or ()) & {"email", "external_ref", "state"}:
        without = {key: value for key, value in live(SYSTEM).items() if key != name}
        assert tool.live_contact_error(SYSTEM, without, SYSTEM.external_ref) is not None


THIRD = contact("3", "REVU-3")
STRANGER, NAMESAKE = contact("7", "user_7"), contact("8", "REVU-8")
EVERY = (SYSTEM, USER, THIRD)


def group(primary: str = "revu", **fields: Any) -> Group:
    pairs = [Pair(SYSTEM, USER, "user_2"), Pair(SYSTEM, THIRD, None)]
    if primary == "user":
        pairs = [Pair(USER, SYSTEM, None), Pair(USER, THIRD, None)]
    return Group("ada@example.com", pairs, **fields)


def look(
    of: Group, listed: Iterable[Any] = (), facts: Mapping[str, Any] = {}, **changes: Any
) -> Any:
    """The group's contacts as DevRev has them; a change of one (by its key, `_1`) to None: there is none."""
    users: Dict[str, Optional[Dict[str, Any]]] = {}
    for one in EVERY:
        change = changes.get(f"_{key_of(one)}", {})
        users[one.id] = None if change is None else live(one, **change)
    there = [user for user in users.values() if user]
    return tool.LiveGroup(of, users, [*there, *listed], **facts)


def result(live: tool.LiveGroup, **options: bool) -> Any:
    """The code of the error, or what is dropped."""
    try:
        dropped = tool.check_live(live, tool.MergeOptions(**options))
    except tool.PairError as error:
        return error.code
    return {key_of(pair.duplicate): skip.code for pair, skip in dropped}


GONE: List[Optional[Dict[str, Any]]] = [
    None,
    {"state": "deleted"},
    MERGED,
    {"state": "shadow", "email": None, **MERGED},
]
HAS_IT = {"external_ref": "user_2"}
ACROSS, TRY = {"across_workspaces": True}, {"try_unverified": True}
# What is so, and what comes of it: a code, or the duplicates that leave the group.
CHECKS: List[Tuple[Any, Any, Any]] = [
    # what there is besides, the options, the result
    ({}, {}, {}),
    *(({"_3": gone}, {}, {"3": "already_gone"}) for gone in GONE),
    *(({"_3": gone, "of": "user"}, {}, {"3": "already_gone"}) for gone in GONE),
    *(({"_2": gone, "_1": HAS_IT}, {}, {"2": "already_merged"}) for gone in GONE),
    *(({"_2": gone, "_1": {"external_ref": " user_2 "}, "_3": None}, {}, {"2": "already_merged", "3": "already_gone"}) for gone in GONE),
    *(({"_2": gone}, {}, "not_found" if gone is None else "not_active") for gone in GONE),
    *(({"_2": gone, "unheld": {"user_2"}}, {}, "reference_unheld") for gone in GONE),
    ({"_2": None, "_1": {"external_ref": "user_9"}}, {}, "not_found"), ({"_1": HAS_IT}, {}, "external_ref_changed"),
    ({"_1": None}, {}, "not_found"), ({"_1": None, "of": "user"}, {}, {"1": "already_gone"}), ({"_3": {"state": "locked"}}, {}, "not_active"),
    ({"_2": {"state": "locked"}, "_1": HAS_IT}, {}, "not_active"),
    # rev orgs
    ({"_3": OTHER_ORG}, {}, {"3": "different_rev_org"}), ({"_3": OTHER_ORG}, ACROSS, {}), ({"_2": OTHER_ORG}, {}, "different_rev_org"),
    ({"_2": OTHER_ORG}, ACROSS, {}), ({"_1": OTHER_ORG, "_2": OTHER_ORG}, {}, {"3": "different_rev_org"}),
    ({"_1": {"rev_org": None}, "_2": OTHER_ORG}, {}, {}), ({"_2": {"rev_org": None}, "_3": {"rev_org": {}}}, {}, {}),
    ({"_3": {**OTHER_ORG, "state": "locked"}}, {}, {"3": "different_rev_org"}),
    # namesakes
    ({"listed": [live(STRANGER)], "alone": True}, {}, "several_user_refs"),
    ({"listed": [live(STRANGER, email=" ADA@example.com", external_ref=" user_7")], "alone": True}, {}, "several_user_refs"),
    ({"listed": [live(STRANGER, state="locked")], "alone": True}, {}, "several_user_refs"),
    ({"listed": [live(STRANGER, **fields) for fields in (
        {"state": "deleted"}, MERGED, {"email": "eve@example.com"}, {"email": "\u017ft@example.com"}, {"external_ref": "userX7"},
        {"external_ref": None})]}, {}, {}),
    ({"listed": [live(NAMESAKE)], "alone": True}, {}, {}), ({"listed": [live(NAMESAKE)]}, {}, "shared_mailbox"),
    ({"listed": [live(NAMESAKE), live(STRANGER)], "alone": True}, {}, "shared_mailbox"),
    ({"listed": [live(NAMESAKE)], "chosen": "user_2"}, {}, "group_changed"), ({"chosen": "user_2"}, {}, {}),
    ({"listed": [live(NAMESAKE), live(STRANGER)], "chosen": "user_2"}, {}, "several_user_refs"),
    # unverified
    *(({"unverified": found, "alone": True}, {}, "unverified") for found in ("1", "2", "12")),
    *(({"unverified": found, "alone": True, "of": "user"}, {}, code) for found, code in (("1", "unverified"), ("2", "unverified"), ("12", {}))),
    *(({"unverified": found}, TRY, {}) for found in ("1", "2", "12", "123")), ({"unverified": "3"}, {}, "unverified"),
    ({"unverified": "7", "alone": True}, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "options", "expected"), CHECKS)
def test_a_group_is_compared_with_devrev_as_it_is_now(
    facts: Any, options: Any, expected: Any
) -> None:
    facts = dict(facts)
    of = group(facts.pop("of", "revu"), chosen=facts.pop("chosen", ""))
    if facts.pop("alone", False):
        of.pairs = of.pairs[:1]
    known = {"unheld": facts.pop("unheld", ())}
    known["unverified"] = {contact(key, "").id for key in facts.pop("unverified", "")}
    now = look(of, facts.pop("listed", ()), known, **facts)
    if len(of.pairs) == 1:
        now.users.pop(THIRD.id)
        now = replace(now, listed=[user for user in now.listed if user["id"] != THIRD.id])
    assert result(now, **options) == expected


def test_the_first_code_in_a_fixed_order_counts() -> None:
    """Each trouble beside all those that come after it."""
    changes: Dict[str, Any] = {"_1": {}, "_2": {**OTHER_ORG}, "_3": {}}
    strangers: List[Any] = []
    known: Dict[str, Any] = {}
    chosen = "user_2"
    found = []

    def judge() -> None:
        found.append(result(look(group(chosen=chosen), strangers, known, **changes)))

    judge()
    known["unverified"] = {SYSTEM.id}
    judge()
    strangers.append(live(NAMESAKE))
    judge()
    strangers.append(live(STRANGER))
    judge()
    chosen = ""
    judge()
    for name, change in (
        ("_1", {"external_refs": ["crm"]}), ("_3", {"external_ref": "x"}), ("_1", {"email": "x"}), ("_3", {"state": "locked"}),
    ):  # fmt: skip
        changes[name] = change
        judge()
    changes["_1"] = None
    judge()
    known["unheld"] = {"user_2"}
    judge()
    assert tuple(found[::-1]) == tool.LIVE_CODES


def test_a_pair_that_was_requested_is_not_dropped_and_one_that_was_merged_counts_no_more() -> None:
    requested = group()
    requested.pairs[1].is_requested_again = True
    requested.pairs[1].state = State.ACKNOWLEDGED
    assert result(look(requested, _3=None)) == "not_found"
    once = group()
    once.pairs[1].first_requested_at = 1.0
    assert result(look(once, _3=None)) == "not_found"
    elsewhere = group()
    now = look(elsewhere, _1=HAS_IT, _2=None)
    for pair, skip in tool.check_live(now, tool.MergeOptions()):
        pair.move_to(State.SKIPPED, skip.code, str(skip))
    assert elsewhere.primary_ref() == "user_2" and elsewhere.contacts() == [SYSTEM, THIRD]
    assert result(look(elsewhere, _1=HAS_IT, _2=None)) == {}
    half_done = group()
    half_done.pairs[0].state = State.DONE
    assert result(look(half_done, _1=HAS_IT, _2=None)) == {}
    assert result(look(half_done, _2=None)) == "external_ref_changed"


@pytest.mark.parametrize(
    ("changes", "may_be"),
    [
        ({}, False), ({"_2": None}, True), ({"_2": {"state": "deleted"}}, True), ({"_2": {"state": "locked"}}, False),
        ({"_2": {"state": "locked", "external_ref": "x"}}, True), ({"_2": MERGED}, True), ({"_2": None, "_1": HAS_IT}, False),
        ({"_2": None, "_1": None}, False), ({"_2": None, "_1": {"state": "deleted"}}, False),
        ({"_2": {"external_ref": "x"}}, False),
    ],
)  # fmt: skip
def test_when_a_reference_may_be_on_no_contact(changes: Any, may_be: bool) -> None:
    of = group()
    assert look(of, **changes).may_be_half_merged(of.pairs[0]) == may_be
    assert not look(of, **changes).may_be_half_merged(of.pairs[1])
    of.pairs[0].first_requested_at = 1.0
    assert not look(of, **changes).may_be_half_merged(of.pairs[0]), "it is polled"


def test_who_is_unverified_is_said_with_what_it_would_come_to_know_and_counted_by_direction() -> (
    None
):
    move, stay = group().pairs
    both = {SYSTEM.id, USER.id, THIRD.id}
    said = {
        side: str(tool.unverified_error(pair, known))
        for side, pair, known in (
            ("primary", move, {SYSTEM.id}), ("duplicate", move, {USER.id}), ("both", move, both), ("none", stay, both),
        )
    }  # fmt: skip
    assert "REVU-1 is unverified" in said["primary"]
    assert (
        "conversations of REVU-2" in said["primary"] and "REVU-2 is unverified" in said["duplicate"]
    )
    assert "conversations of REVU-1" in said["duplicate"] and said["none"] == "None"
    assert "both are unverified" in said["both"] and "user_2 has to move" in said["both"]
    lines = tool.unverified_lines([move, stay], {SYSTEM.id}, True)
    assert lines[0].startswith("2 pairs whose primary is unverified") and len(lines) == 3
    assert "ada@example.com: REVU-2 into REVU-1" in lines[1]
    assert len(tool.unverified_lines([move, stay], {SYSTEM.id}, False)) == 1
    assert tool.unverified_lines([move, stay], (), True) == []
    assert len(tool.unverified_lines([move] * 30, {SYSTEM.id}, True)) == 22
    (one,) = tool.unverified_lines([move, stay], {USER.id}, True)
    assert one.startswith("1 pair whose duplicate is unverified")


# -- what --limit leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "tried", "limit", "kept"),
    [
        ("111", {}, 1, "0"), ("111", {0: "b"}, 1, "1"), ("111", {0: "b", 1: "b"}, 1, "2"), ("111", {0: "b", 1: "c", 2: "a"}, 1, "2"),
        ("111", {0: "b"}, 2, "12"), ("213", {}, 2, "0"), ("213", {}, 3, "01"), ("213", {0: "a"}, 5, "12"), ("33", {}, 2, ""),
        ("101", {}, 1, "01"), ("111", {}, 9, "012"),
    ],
)  # fmt: skip
def test_what_no_run_has_tried_comes_before_what_was_before_the_limit_is_applied(
    sizes: str, tried: Dict[int, str], limit: int, kept: str
) -> None:
    plan = plan_of([])
    for number, size in enumerate(map(int, sizes)):
        pairs = [
            Pair(contact(f"P{number}", "", email=f"{number}@x"), contact(f"D{number}{n}", ""), None)
            for n in range(max(1, size))
        ]
        pairs[-1].state = State.PLANNED if size else State.REQUESTED
        plan.groups.append(Group(f"{number}@x", pairs))
        if number in tried:
            plan.tried[pairs[-1].ids] = tried[number]
    lines = tool.keep_limit(plan, limit)
    assert "".join(group.email[0] for group in plan.groups) == kept
    assert bool(lines) == (kept == "")


# -- what was undone or cancelled ------------------------------------------------------------------------

HISTORY: List[Tuple[List[Tuple[Any, ...]], Optional[str]]] = [
    ([], None),
    ([("ada@example.com", ("8", "9"), "undone")], "undone"),
    ([("ada@example.com", ("8", "9"), "cancelled")], "cancelled"),
    ([("eve@example.com", ("1", "2"), "undone")], "undone"),
    ([("eve@example.com", ("2", "1"), "cancelled")], "cancelled"),
    ([("eve@example.com", ("2", "3"), "cancelled")], "cancelled"),
    ([("eve@example.com", ("1", "9"), "undone")], None),
    ([("eve@example.com", ("9", "1"), "undone"), ("eve@example.com", ("8", "2"), "undone")], None),
    ([("eve@example.com", ("1", "0"), "undone", "2")], "undone"),  # 2 was created by the undo
    (
        [
            ("eve@example.com", ("1", "00"), "undone", "0"),
            ("eve@example.com", ("1", "0"), "undone", "2"),
        ],
        "undone",
    ),
    (
        [
            ("eve@example.com", ("7", "0"), "undone", "2"),
            ("eve@example.com", ("1", "0"), "cancelled"),
        ],
        "cancelled",
    ),
    (
        [("ada@example.com", ("1", "2"), "cancelled"), ("ada@example.com", ("1", "3"), "undone")],
        "undone",
    ),
]


@pytest.mark.parametrize(("rows", "code"), HISTORY)
def test_what_was_undone_or_cancelled_is_not_repeated_unnamed(
    rows: List[Tuple[Any, ...]], code: Optional[str]
) -> None:
    def don(key: str) -> str:
        return contact(key, "").id if key else ""

    history = []
    for email, (primary, duplicate), what, *new in rows:
        pair = Pair(
            contact(primary, "", email=email),
            contact(duplicate, "", email=email),
            None,
            State(what),
        )
        if what == "undone":
            pair.undo = tool.UndoProgress(
                "backups", "done", "", 1, contact=don(new[0] if new else "")
            )
        history.append(pair)
    cancelled = [pair for pair in history if pair.state is State.CANCELLED]
    undone = [pair for pair in history if pair.state is not State.CANCELLED]
    found = tool.blocked_by_history([group()], cancelled, undone)
    assert found == ({"ada@example.com": code} if code else {})


class Savepoint:
    """Rows by state, as `apply_savepoint` asks for them."""

    def __init__(self, rows: Sequence[Pair]) -> None:
        self.rows = rows
        self.organisation = ""

    def pairs(self, *states: State) -> List[Pair]:
        return [pair for pair in self.rows if pair.state in states]


# Rows (primary, duplicate, state), whether the address is named; what becomes of the group of 1, 2 and 3.
KNOWN: List[Tuple[List[Tuple[str, str, str]], bool, str]] = [
    ([], False, "planned planned"), ([("1", "2", "done")], False, "done planned"),
    ([("1", "2", "done"), ("1", "3", "requested")], False, "done requested"), ([("1", "2", "failed")], False, "planned planned"),
    ([("1", "2", "undone")], False, "undone"), ([("1", "2", "undone")], True, "undone"), ([("8", "9", "undone")], False, "undone"),
    ([("8", "9", "undone")], True, "planned planned"), ([("1", "2", "undo_settled")], True, "undone"),
    ([("1", "2", "cancelled")], False, "cancelled"), ([("1", "2", "cancelled")], True, "requested planned"),
    ([("1", "2", "done"), ("1", "3", "done"), ("8", "9", "undone")], False, "done done"),
    ([("1", "2", "done"), ("8", "9", "undone")], False, "undone"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "is_named", "expected"), KNOWN)
def test_what_the_savepoint_knows_comes_into_the_plan(
    rows: List[Tuple[str, str, str]], is_named: bool, expected: str
) -> None:
    plan = plan_of(EVERY)
    known = [
        Pair(contact(one, ""), contact(other, ""), None, State(state)) for one, other, state in rows
    ]
    savepoint: Any = Savepoint(known)
    tool.apply_savepoint(plan, savepoint, ["ada@example.com"] if is_named else [])
    assert savepoint.organisation == "dvrv-us-1:devo/SANDBOX1"
    skipped = " ".join(skip.code for skip in plan.skipped)
    states = [pair.state.value for group in plan.groups for pair in group.pairs]
    assert (skipped or " ".join(states)) == expected and bool(skipped) != bool(states)
    assert plan.already_merged == states.count("done")
    assert len(plan.revived) == states.count("requested") * is_named
    assert set(plan.tried) == {pair.ids for pair in known if pair.state is State.FAILED}


@pytest.mark.parametrize(
    ("exported", "found", "exact", "at_least"),
    [
        (0, 0, True, True), (3, 3, True, True), (3, 4, False, True), (0, 1, False, True), (3, 2, False, False),
        (1, 0, False, False),
    ],
)  # fmt: skip
def test_counts_are_compared_as_the_policy_says(
    exported: int, found: int, exact: bool, at_least: bool
) -> None:
    one = contact("1", "REVU-1", exported)
    for policy, passes in (("exact", exact), ("at-least", at_least)):
        with contextlib.nullcontext() if passes else pytest.raises(tool.PairError, match="ticket"):
            tool.check_count(group(), one, found, tool.MergeOptions(count_policy=policy))


# -- text ------------------------------------------------------------------------------------------------

any_text = st.one_of(
    st.text(st.characters()),
    st.lists(
        st.sampled_from(
            [
                "con", "NUL", "aux", "com1", "LPT9", ".", "..", "/", "\\", ":", " ", "-", "~", "%", "%2E", "@", "\0",
                "\n", "x" * 97,
            ],
        ),
        max_size=6,
    ).map("".join),
)  # fmt: skip
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}  # fmt: skip


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
    assert 0 < len(name) <= 120 and name.isascii()
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
    """Emails come case-folded, so that their names have to differ on a file system that ignores case, too."""
    assert (tool.safe_name(one) == tool.safe_name(other)) == (one == other)
    one, other = one.casefold(), other.casefold()
    assert (tool.safe_name(one).casefold() == tool.safe_name(other).casefold()) == (one == other)


def test_no_device_of_windows_is_a_name() -> None:
    for device in DEVICES:
        for text in (
            device,
            device.upper(),
            f"{device}.txt",
            f"{device}.",
            f"{device}.tar.gz",
            f"{device} ",
            f"{device}:",
        ):
            assert tool.safe_name(text).split(".")[0].casefold() not in DEVICES


def test_an_ordinary_email_is_its_own_name() -> None:
    for email in ("ada.reyes@example.com", "femi+support@example.org", "a_b-c@x.example.com"):
        assert tool.safe_name(email) == email


@examples(400)
@given(any_text)
@example(
    "".join(
        map(chr, [*range(0x20), *range(0x7F, 0xA1), *range(0x200B, 0x2010), *range(0x2028, 0x202F)])
    )
)
@example("\u2066\u2067\u2068\u2069\ufeff\u061c\ud800\udfff\U000e0041")
def test_nothing_that_a_terminal_could_act_on_survives(text: str) -> None:
    shown = tool.escape_unprintable(text)
    assert not [char for char in shown if unicodedata.category(char) in INVISIBLE]
    assert tool.escape_unprintable(shown) == shown
    plain = "".join(char for char in text if unicodedata.category(char)[0] in "LNP" or char == " ")
    assert tool.escape_unprintable(plain) == plain


@pytest.mark.parametrize(
    ("don", "organisation"),
    [
        ("don:identity:dvrv-us-1:devo/SANDBOX1:revu/7", "dvrv-us-1:devo/SANDBOX1"),
        ("don:core:dvrv-eu-1:devo/1a2B:ticket/7", "dvrv-eu-1:devo/1a2B"),
        ("don:identity:dvrv-us-1:devo/SANDBOX1:devu/1", "dvrv-us-1:devo/SANDBOX1"), ("REVU-7", ""), ("", ""),
        ("don:identity:dvrv-us-1:devo/SANDBOX1", ""), (" don:identity:dvrv-us-1:devo/SANDBOX1:revu/7", ""),
        ("don:identity:dvrv-us-1:revu/7", ""),
    ],
)  # fmt: skip
def test_an_id_tells_its_organisation(don: str, organisation: str) -> None:
    assert tool.organisation_of(don) == organisation


@pytest.mark.parametrize(
    "url",
    [
        "https://api.devrev.ai", "https://api.devrev.ai:8443", "https://gateway.example.com/devrev", "HTTPS://api.devrev.ai",
        "http://127.0.0.1:8123", "http://127.9.8.7", "http://localhost:1", "http://[::1]:8123",
    ],
)  # fmt: skip
def test_a_base_url_that_keeps_the_token_private_is_accepted(url: str) -> None:
    assert tool.check_base_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "", "api.devrev.ai", "//api.devrev.ai", "https://", "https:///path", "https://:443", "ftp://api.devrev.ai",
        "file:///etc/passwd", "http://api.devrev.ai", "http://localhost.example.com", "http://127.0.0.1.example.com",
        "http://example.com/127.0.0.1", "http://127.0.0.1@example.com", "http://127.999.1.1",
        "http://127.1", "http://0x7f.0.0.1", "http://127.0.0.1.", "http://[::ffff:8.8.8.8]", "http://2130706433", "http://0.0.0.0", "http://[2001:db8::1]",
        "https://name:hunter2@api.devrev.ai", "https://api.devrev.ai?key=hunter2", "https://api.devrev.ai#hunter2",
        "https://api.devrev.ai:99999", "https://api.devrev.ai:port", "https://[::1", "https://[hunter2",
    ],
)  # fmt: skip
def test_a_base_url_that_would_give_the_token_away_is_refused(url: str) -> None:
    with pytest.raises(tool.FatalError) as stopped:
        tool.check_base_url(url)
    assert stopped.value.exit_code == 2
    assert "DEVREV_BASE_URL" in str(stopped.value) and "hunter2" not in str(stopped.value)
