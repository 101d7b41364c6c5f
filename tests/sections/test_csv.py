"""CSVs of all kinds through `main`: one clear line or a right plan, never a wrong pair."""

import contextlib
import csv
import gzip
import io
import json
import logging
import os
import re
import unicodedata
import zipfile
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import merge_contacts as tool
from tests.sections.test_detection import cells_of, examples, people
from tests.simulation.expected import email_key
from tests.support import COLUMNS, Workplace

HEADER = ",".join(COLUMNS)
# Controls, bidi marks and the like, lone surrogates, ends of lines.
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
PairIds = Tuple[str, str, str]  # email, primary, duplicate
Content = Union[str, bytes]


def row(
    key: str, email: str, reference: str, name: str = "Ada", tickets: str = "1", **cells: str
) -> str:
    """One line of a CSV, put together without the csv module: cells stand in it as they are."""
    times = {"CREATED_AT": "2024-01-01", "UPDATED_AT": "2024-06-01", **cells}
    values = (key, name, email, reference, "Ada Reyes", tickets, *times.values())
    return ",".join({**dict(zip(COLUMNS, values)), **cells}[column] for column in COLUMNS)


def text(*rows: str, header: str = HEADER, end: str = "\n") -> str:
    return end.join((header, *rows)) + end


ADA_EMAIL, EVE_EMAIL = "ada@example.com", "eve@example.com"
ADA = (row("1", ADA_EMAIL, "REVU-1"), row("2", ADA_EMAIL, "user_2"))
EVE = (row("3", EVE_EMAIL, "REVU-3"), row("4", EVE_EMAIL, "user_4"))
ADA_PAIR, EVE_PAIR = (ADA_EMAIL, "1", "2"), (EVE_EMAIL, "3", "4")
PLAIN = text(*ADA)


class Case(NamedTuple):
    """A file and what has to come of it. `says` stands in the one line of an error."""

    content: Content
    pairs: Iterable[PairIds] = ()
    skips: Dict[str, str] = {}
    bad_lines: Iterable[int] = ()
    says: str = ""


def good(content: Content, *pairs: PairIds) -> Case:
    return Case(content, pairs or (ADA_PAIR,))


def refused(content: Content, says: str) -> Case:
    return Case(content, says=says)


def spoils(*emails: str, content: str, lines: Iterable[int], pairs: Iterable[PairIds] = ()) -> Case:
    return Case(content, pairs, dict.fromkeys(emails, "invalid_row"), lines)


def spoilt(bad: str, *before: str, line: int = 2, header: str = HEADER) -> Case:
    """A bad row in front of two groups: Ada's, which it names, is skipped, the other is merged."""
    content = text(*before, bad, *ADA, *EVE, header=header)
    return spoils(ADA_EMAIL, content=content, lines=[line], pairs=[EVE_PAIR])


def harmless(bad: str) -> Case:
    """A bad row in front of two groups, both of which are merged."""
    return Case(text(bad, *ADA, *EVE), [ADA_PAIR, EVE_PAIR], {}, [2])


def without(column: str, *more: str) -> str:
    """The two rows of a pair in a file that lacks a column; `more` columns are there instead."""
    place = COLUMNS.index(column)
    lines = [line.split(",") for line in PLAIN.splitlines()]
    for number, cells in enumerate(lines):
        del cells[place]
        cells += more if number == 0 else ["something"] * len(more)
    return "\n".join(map(",".join, lines))


def named(name: str, **cells: str) -> str:
    return text(row("1", ADA_EMAIL, "REVU-1", name=name, **cells), ADA[1])


def addressed(email: str) -> Case:
    """Both contacts of an odd email: it is an address like any other."""
    rows = text(row("1", email, "REVU-1"), row("2", email, "user_2"), *EVE)
    return Case(rows, [(email, "1", "2"), EVE_PAIR])


def zipped(name: str) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(name, "")
    return whole.getvalue()


def bad(**cells: str) -> str:
    """A row of Ada's in which some cell is bad."""
    return row(**{"key": "7", "email": ADA_EMAIL, "reference": "user_7", **cells})  # type: ignore


def swallowing(*between: str) -> str:
    """A name opens a quote and, rows later, one ends with one: csv takes all between for one name.

    Together they are a row of eight columns: contact 7 with the email and the reference of 8.
    """
    last = row("8", EVE_EMAIL, "user_8", name='Bob"')
    return text(bad(reference="REVU-7", name='"Ann'), *between, last, *ADA, *EVE)


BLANKS = (" ", "\t", "\u00a0", "\u3000", "\x0b")
ARCHIVE = gzip.compress(
    text(*ADA, *(row(f"x{n}", f"x{n}@example.com", f"REVU-{n}") for n in range(9000))).encode()
)
OTHER_ORDER = [
    ",".join(line.split(",")[place] for place in (7, 3, 0, 5, 4, 2, 6, 1))
    for line in PLAIN.splitlines()
]
BAD_COUNTS = (
    "", "x", "-1", "+1", "1.5", "4.01", "4.", ".0", "4.0.0", "4 .0", "-0.0", "1e3", "0x1", "1_000",
    "NaN", "\u00b2", "NULL", "1.000", "4.000", "0.000", "1 204", "1\u00a0204", "1\u202f204",
    "1'204", '"1,204"', '"4,0"', "\u0664", "4.0000", "9" * 40, "9" * 5000,
)  # fmt: skip
BAD_EMAILS = (
    "fay@example.com, fay@example.org", "eve@x;fay@x", "Eve <eve@x>", "<eve@x>", "eve@@x", "eve@",
    "@example.com", "eve@a@b", "eve example.com", "e ve@x", "fay@exam ple.com", "eve\u00a0x@x",
    "e\u200bve@x", "eve@x\ufeff", "\u202eeve@x", "eve\x07@x", "eve\u00ad@x", "eve\ufe0f@x",
    "eve\u115f@x", "eve\u1160@x", "eve\u3164@x", "eve\uffa0@x", "eve\u2800@x", "eve\U000e0101@x",
    '""eve""@example.com', "fay\uff20example.com", "eve\u180b@x", "x" * 989 + "@example.com",
    "\\N", "NULL", "null", "nan", "None", "N/A", "-", "(null)", "<NA>", " ",
)  # fmt: skip
OF_ADA = (  # how Ada's address may be written in a bad row
    "Ada <ADA@example.com>", "ada@example.com, eve@example.org", "a\u200bda@example.com",
    "ada\uff20example.com", "\uff41da@example.com", "mailto:ada@example.com", "(ada@example.com)",
    "ada@example.com\ufeff", "x;ada@example.com", "[ada@example.com]", "ada @example.com",
    "\u00a0ada@example.com", "x " * 3000 + "ada@example.com",
)  # fmt: skip
# A customer chooses their own name: where everything else is in its place, EMAIL alone counts.
IN_ANY_CELL = (
    ("FULL_NAME", "", False), ("CREATED_AT", "1/31/2024 12:00", False), ("REV_USER_ID", "", True),
    ("FULL_NAME", ADA_EMAIL, False),
    ("UPDATED_AT", "2024-06-01 12:00:00.000 Z", False), ("REV_USER_ID", "NULL", True),
    ("REV_USER_ID", "x@y", True), ("EXTERNAL_REF", " ", True), ("TICKET_COUNT", "x", True),
    ("CREATED_AT", "", True), ("CREATED_AT", "204", True), ("UPDATED_AT", "Ada", True),
)  # fmt: skip
NOT_OURS = (
    ("", "empty"), (b"\xef\xbb\xbf", "empty"), ("\n\r\n\n", "empty"), (gzip.compress(b""), "empty"),
    ("sep=,\r\n" + PLAIN, "found: SEP="), (zipped("xl/workbook.xml"), "a ZIP archive or an Excel"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512), "Excel"), (b"PK\x05\x06\0", ": a ZIP"),
    (b"PAR1\x15\x04\x15" + bytes(99) + b"PAR1", "Parquet"), (b"SQLite format 3\0\0", "a binary"),
    (b"\x28\xb5\x2f\xfd\x04\x58", "a binary file"), (bytes(range(256)) * 8, ""),
    (gzip.compress(gzip.compress(PLAIN.encode())), "gzip inside gzip"),
    (gzip.compress(zipped("contacts.csv")), "in the gzip file: a ZIP archive"),
    (gzip.compress(PLAIN.encode())[:-8] + bytes(8), "cut off or damaged"),
    *((ARCHIVE[: int(len(ARCHIVE) * share)], "cut off") for share in (0.001, 0.5, 0.9999)),
    ("<!DOCTYPE html>\n<html><head>", "a web page"), ("\n".join(ADA), "no column REV_USER_ID, "),
    *((PLAIN.encode(name), "UTF-") for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
    (named("Zo\u00eb").encode("latin-1"), "not UTF-8"),
    (text(*EVE * 9000, named("Zo\u00eb")).encode("latin-1"), "not UTF-8"),
    *((without(column), f"no column {column} ") for column in COLUMNS),
    *((without(column, "NOTES"), f"no column {column} ") for column in COLUMNS),
    (without("EMAIL", "EMAIL_ADDRESS"), "no column EMAIL "),
    (text(*(line + ",x" for line in ADA), header=HEADER + ", email "), "EMAIL is there twice"),
    (text(ADA[0] + ',"', ADA[1] + ",x", header=HEADER + ',"NOTES'), "a line break in the header"),
    (text(bad(name='"Ann'), *ADA), "line "), (named('"Ada" Reyes'), "line 2"),
    (text(*ADA, bad(name='"Ann \\"A\\""'), *EVE), "line 4: a backslash"),
    (text(bad(name='Ann \\"A\\"'), bad(name='"Ann" A'), *ADA), "line 3: "),
    (text(*ADA, bad(name='"5\\""'), bad(name='"B"')), "line 4: a backslash"),
    (text(bad(tickets="x")), "line 2: TICKET_COUNT is not"),
    (text(*(bad(key=str(n), tickets="?") for n in range(55))), "no usable row, 55 invalid rows: "),
)  # fmt: skip
FILES: Dict[str, Case] = {
    "plain": good(PLAIN),
    "header only": Case(HEADER),
    "header and blank lines": Case(HEADER + "\n\n\n"),
    **{f"refused {n} {says}": refused(content, says) for n, (content, says) in enumerate(NOT_OURS)},
    # how a file is written
    **{f"separated by {mark!r}": good(PLAIN.replace(",", mark)) for mark in (";", "\t", ", ")},
    "semicolons and quotes": good('"' + PLAIN.replace(",", '";"').replace("\n", '"\n"')[:-1]),
    "semicolons behind a BOM": good(b"\xef\xbb\xbf" + PLAIN.replace(",", "; ").encode()),
    "semicolons in a file of commas": good(named("Ana;B")),
    "a semicolon in a header of commas": good(
        text(*(line + ",x" for line in ADA), header=HEADER + ",NOTES;MORE")
    ),
    "commas in a file of semicolons": good(
        named("SOMEBODY").replace(",", ";").replace("SOMEBODY", '"a;b,c,d,e,f,g,h,i"')
    ),
    "gzip": good(gzip.compress(b"\xef\xbb\xbf" + PLAIN.encode())),
    "gzip in two members": good(
        gzip.compress(text(ADA[0]).encode()) + gzip.compress((ADA[1] + "\n").encode())
    ),
    "columns in another order": good("\n".join(OTHER_ORDER)),
    "columns in another case": good(text(*ADA, header=HEADER.lower().replace(",", " , "))),
    "extra columns": good(text(*(f"x,{line},y" for line in ADA), header=f"ID,{HEADER},NOTES")),
    "BOM": good(b"\xef\xbb\xbf" + PLAIN.encode()),
    "CRLF": good(text(*ADA, end="\r\n")),
    "CR alone": good(text(*ADA, end="\r")),
    "no line end at the end": good(PLAIN.rstrip()),
    "a blank line in between": good(text(ADA[0], "", ADA[1])),
    "a name with line breaks": good(named('"Ada\nB.\r\n\r\nReyes"')),
    "a name with commas and quotes": good(named('"Reyes, Ada ""A"", B, C, D"')),
    "a quote inside a name": good(named('Ada "A" Reyes')),
    "a backslash at the end of a name": good(named('"Ada\\"')),
    "a name of 3 MB": good(named("x" * 3_000_000)),
    # what spreadsheets do with the ends of rows
    "rows of blank cells": good(text(",,,,,,,", ADA[0], ", ,\t, ,,,,", ADA[1], ",", '"",""')),
    "rows of blank cells above the header": good(",,,\n,,,,,,,\n" + PLAIN),
    "further cells left out": good(text(ADA[0], ADA[1] + ",x", header=HEADER + ",NOTES,MORE,")),
    "blank cells behind the last column": good(text(ADA[0] + ",, ", ADA[1] + ",")),
    "the last of the eight columns left out": spoilt(bad().rpartition(",")[0]),
    "the last of the eight columns left out beside notes": spoilt(
        bad().rpartition(",")[0], header=HEADER + ",NOTES"
    ),
    "a missing time that a further column has moved up to": spoilt(
        bad(UPDATED_AT="vip"), header=HEADER + ",NOTES"
    ),
    "a name of two lines and blank cells behind it": spoilt(bad(name='"A\nB"') + ",", line=3),
    # bad rows
    **{
        f"shifted: {line[:50]}": spoilt(line)
        for line in (
            "7,REVU-7,Ada,ada@example.com,user_7", bad(name="Reyes, Ada"), ADA_EMAIL, bad() + ",x",
            "7,Reyes, Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01,",
            "7,Ada,ada@example.com,user_7,Reyes, Ada,1,2024-01-01,",
            "7,Ada,ada@example.com,user_7,Ada Reyes,1,204,2024-01-01,",
            "7,Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01,9,", "x," * 50_000 + ADA_EMAIL,
        )
    },
    **{f"an id {key!r}": spoilt(bad(key=key)) for key in ("", "  ", "NULL", "\\N", " null ")},
    "empty reference": spoilt(bad(reference="")),
    "a bad row beside the only good one": spoils(
        ADA_EMAIL, content=text(bad(tickets="x"), ADA[1], *EVE), lines=[2], pairs=[EVE_PAIR]
    ),
    "a bad row of somebody else": harmless(bad(email="x@example.com", tickets="?")),
    **{f"a count {cell[:20]!r}": spoilt(bad(tickets=cell)) for cell in BAD_COUNTS},
    **{
        f"a good count {cell!r}": good(named("Ada", TICKET_COUNT=cell))
        for cell in ("4.0", "4.00", " 4 ", "4.0\t", "007", "0.0", "123456789.00")
    },
    **{f"EMAIL is {cell[:40]!r}": harmless(bad(email=f'"{cell}"')) for cell in BAD_EMAILS},
    **{f"Ada is {cell[-40:]!r}": spoilt(bad(email=f'"{cell}"', tickets="x")) for cell in OF_ADA},
    **{
        f"an address as a name, with {column} {cell!r}": (spoilt if any_cell else harmless)(
            bad(email="x", name=ADA_EMAIL, **{column: cell})
        )
        for column, cell, any_cell in IN_ANY_CELL
    },
    "NUL in the name": spoilt(bad(name="A\0a")),
    "NUL in the email": spoilt(bad(email="a\0da@example.com")),
    "NUL in the count": spoilt(bad(tickets="1\0")),
    "NUL alone in a line": harmless("\0"),
    "NUL in a name with others' addresses": harmless(bad(email="x@x", name="A\0 ada@example.com")),
    "a bad line behind others": spoilt("7,,,ada@example.com", *EVE, line=4),
    "a stray quote that swallows a part of two rows": spoils(
        ADA_EMAIL, EVE_EMAIL, content=swallowing(), lines=[3]
    ),
    "the same between semicolons": spoils(
        ADA_EMAIL, EVE_EMAIL, content=swallowing().replace(",", ";"), lines=[3]
    ),
    "a stray quote that swallows whole rows": spoils(
        ADA_EMAIL, EVE_EMAIL, "o'dell@example.com", lines=[4],
        content=swallowing(row("9", "o'dell@example.com", "user_9"))
        + row("10", "o'dell@example.com", "REVU-10"),
    ),
    "a row swallowed where further columns are left out": spoilt(
        bad(UPDATED_AT='"x') + "\n" + bad(UPDATED_AT='y"'), line=3, header=HEADER + ",NOTES,MORE"
    ),
    # one contact in several rows
    "the same row twice, apart": good(text(ADA[0], *EVE, ADA[1], ADA[0]), ADA_PAIR, EVE_PAIR),
    "the same count in two spellings": good(text(*ADA, ADA[0].replace(",1,", ",1.0,"))),
    "a blank behind an id": good(text(*ADA, row("2 ", ADA_EMAIL, "user_2"))),
    "one id with two counts, and the first row once more": spoils(
        ADA_EMAIL, content=text(*ADA, *EVE, ADA[0], ADA[0].replace(",1,", ",2,")),
        lines=[2, 7], pairs=[EVE_PAIR],
    ),
    "one id with two dates": spoils(
        ADA_EMAIL, content=text(*ADA, ADA[0][:-1] + "2", *EVE), lines=[2, 4], pairs=[EVE_PAIR]
    ),
    "one id with two emails": spoils(
        ADA_EMAIL, EVE_EMAIL, content=text(*ADA, row("1", EVE_EMAIL, "REVU-1"), *EVE), lines=[2, 4]
    ),
    **{
        f"one id with two references, {one} first": spoils(
            ADA_EMAIL, lines=[2, 3],
            content=text(row("1", ADA_EMAIL, one), row("1", ADA_EMAIL, other)),
        )
        for one, other in (("user_1", "crm"), ("crm", "user_1"))
    },
    "conflicting rows between invalid ones and behind a name with line breaks": spoils(
        ADA_EMAIL,
        content=text(
            bad(email="x@x", tickets="x"), row("8", "y@x", "REVU-8", name='"Y\n\nZ"'), *ADA,
            bad(email="x@x", tickets="x"), ADA[0].replace(",1,", ",2,"), *EVE,
        ),
        lines=[2, 6, 8, 9], pairs=[EVE_PAIR],
    ),
    # cells
    **{
        f"padded {column} {blank!r}": good(named("Ada", **{column: f"{blank}{cell}{blank}"}))
        for column, cell in zip(COLUMNS, ("1", "", ADA_EMAIL, "REVU-1", "", "3", "2024-01-01"))
        for blank in BLANKS
        if cell
    },
    "an apostrophe that is part of a name": Case(
        text(row("1", "'ada@x", "REVU-1"), row("2", "ada@x", "user_2"))
    ),
    "an apostrophe before what looks like a formula": Case(
        text(row("1", "'=ada@x", "REVU-1"), row("2", "=ada@x", "user_2")), [("=ada@x", "1", "2")]
    ),
    **{
        f"an email like {email[:30]}": addressed(email)
        for email in (
            "x" * 988 + "@example.com", "../../../etc/passwd@example.com", "/tmp/x@example.com",
            "..\\..\\c:\\x@example.com", "nul@example.com", "--yes@example.com", "=1+1@example.com",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", FILES.values(), ids=list(FILES))
def test_a_file_gives_the_right_plan_or_one_clear_line(
    front_door: Any, place: Workplace, case: Case
) -> None:
    content = case.content.encode("utf-8") if isinstance(case.content, str) else case.content
    code, plan, said = front_door(content)
    assert place.csv.read_bytes() == content
    if plan is None:
        assert code == 2 and case.says in said and "contacts.csv" in said and not case.pairs
        return
    assert code == 0 and not case.says and said == ""
    assert pairs_of(plan) == set(case.pairs)
    assert {skip["email"]: skip["code"] for skip in plan["skipped"]} == case.skips
    assert [row["line"] for row in plan["invalid_rows"]] == list(case.bad_lines)
    assert plan["summary"]["invalid_rows"] == len(plan["invalid_rows"])


HOSTILE = (
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\b\b\b\x7f\r", "\x9b31m\x85\x90",
    "\u202egro.elpmaxe\u2066\u2069\u200f\u061c", "a\u2028b\u2029c\x0bd\x0ce",
    "\u200b\u200d\u00ad\ufeff\U000e0041", "one\r\ntwo\nthree",
    "x\n2024-01-01 00:00:00,000 INFO all merged",
)  # fmt: skip


def hostile_rows(number: int, marks: str) -> Iterator[str]:
    """A pair, a group with two user_ and a bad row; the marks are wherever text is."""
    odd = dict.fromkeys(("DISPLAY_NAME", "FULL_NAME", "CREATED_AT", "UPDATED_AT"), f'"{marks}"')
    for key, email, reference, tickets in (
        ("1", "pair", "REVU-1", "1"), ("2", "pair", "user_{}", "1"), ("5", "bad{}", "x{}", "{}"),
        ("3{}x", "two", "user_{}", "1"), ("4", "two", "user_4{}", "1"),
    ):  # fmt: skip
        cells = (f"{number}{key}", f"{number}{email}@example.com", reference, tickets)
        one, address, ref, count = (f'"{cell.format(marks)}"' for cell in cells)
        yield row(one, address, ref, tickets=count, **odd)


def test_nothing_that_acts_on_a_terminal_gets_through(place: Workplace) -> None:
    """As `--json` does in the tests of files: here the lines for people."""
    lines: List[str] = []
    for number, marks in enumerate(HOSTILE):
        lines += hostile_rows(number, marks)
    place.csv.write_bytes(text(*lines).encode("utf-8"))
    result = place.run(None, "--preview", "-v", check=0)
    assert result.out.count("user_") >= len(HOSTILE)
    unknown = place.run(None, "--preview", *(f"--email={marks}" for marks in HOSTILE), check=2)
    said = [result.out, result.err, unknown.out, unknown.err]
    for header, line in (("\x1b[31mNAME,\u202ex,\x9b1m", "x"), (HEADER, '"\x1b[31m\u202e')):
        place.csv.write_bytes(f"{header}\n{line}\n".encode())
        result = place.run(None, "--preview", check=2)
        assert len(result.err.splitlines()) == 1 and result.out == ""
        said.append(result.err)
    parts = {part for marks in HOSTILE for part in re.split(r"[\r\n]", marks)[1:] if part}
    assert_nothing_raw(*said, logged(place))
    for line in "\n".join([*said, logged(place)]).splitlines():
        assert not line.startswith(tuple(parts)), "data has begun a line of its own"


def test_a_path_is_a_file_that_can_be_read_or_one_clear_line(place: Workplace) -> None:
    (place.folder / "export").mkdir()
    folder = "a folder, not a file; name the files in it: export/part-1.csv"
    for path, says in (
        ("export", folder), ("missing.csv", ""), ("missing/contacts.csv", ""), ("", ""),
        ("x" * 5000, ""), (os.devnull, ""), ("miss\x1b[31m\u202e\ning", ""),
    ):  # fmt: skip
        result = place.run(None, "--preview", f"--csv={path}", check=2)
        assert len(result.err.splitlines()) == 1 and result.out == "", result
        assert says in result.err.replace(os.sep, "/")
        assert_nothing_raw(result.err, logged(place))
    for name in ("-x.csv", "--yes", "\u5c71 \u7530.csv"):
        (place.folder / name).write_text(text(*EVE), encoding="utf-8")
        assert pairs_of(preview(place, f"--csv={name}")) == {EVE_PAIR}
    assert not list(place.folder.glob("**/*.db")) and not (place.folder / "backups").exists()


def preview(place: Workplace, *options: str, **extra: str) -> Any:
    return json.loads(place.run(None, "--preview", "--json", *options, check=0, **extra).out)


def test_the_preview_can_be_narrowed_and_takes_a_prefix_from_a_file_too(place: Workplace) -> None:
    third = row("5", EVE_EMAIL, "REVU-5")
    fay = row("6", "fay@example.com", "user_6")
    place.csv.write_text(text(*ADA, *EVE, third, fay), encoding="utf-8")
    eve = {EVE_PAIR, (EVE_EMAIL, "3", "5")}
    for options, pairs in (
        ([], {ADA_PAIR, *eve}),
        (["--email", " Ada@EXAMPLE.com"], {ADA_PAIR}),
        (["--email", EVE_EMAIL, "--email", "fay@example.com"], eve),
        (["--limit", "1"], {ADA_PAIR}),
        (["--limit", "3"], {ADA_PAIR, *eve}),
    ):
        assert pairs_of(preview(place, *options)) == pairs
    place.csv.write_text(text(ADA[0], row("2", ADA_EMAIL, "usr_2")), encoding="utf-8")
    (place.folder / ".env").write_text("DEVREV_USER_REF_PREFIX=usr_\n", encoding="utf-8")
    assert pairs_of(preview(place)) == {ADA_PAIR}
    assert pairs_of(preview(place, DEVREV_USER_REF_PREFIX="user_")) == set()


def test_an_export_in_parts_is_read_as_one_and_an_empty_one_passed_over(place: Workplace) -> None:
    lower = HEADER.lower()
    parts = (
        text(ADA[0], EVE[1]), text(EVE[0], header=lower), text(ADA[1], row("9", "x@x", "crm")),
        HEADER, "", "\ufeff\n",
    )  # fmt: skip
    names = [f"part_{number}.csv" for number in range(len(parts))]
    for number, (name, part) in enumerate(zip(names, parts)):
        content = part.encode()
        (place.folder / name).write_bytes(gzip.compress(content) if number % 2 else content)
    for options in (
        ["--csv", *names],
        ["--csv", *names[::-1]],
        [f"--csv={name}" for name in names],
        ["--csv", *names[:2], "--csv", *names[2:], "--csv", names[2]],
    ):
        plan = preview(place, *options)
        assert pairs_of(plan) == {ADA_PAIR, EVE_PAIR} and plan["summary"]["contacts_read"] == 5
        assert plan["summary"]["other_references"] == 1 and plan["schema"] == tool.SCHEMA
    bad_part, no_header = "part_6.csv", "part_7.csv"
    (place.folder / bad_part).write_text(text(bad(tickets="1,2")), encoding="utf-8")
    (place.folder / no_header).write_text("\n".join(ADA), encoding="utf-8")
    result = place.run(None, "--csv", *names, bad_part, "--preview", check=0)
    assert f"{bad_part}, line 2: 9 fields instead of 8" in result.out
    assert "1 pair to merge" in result.out
    for name in names[4:]:
        assert f"{name}: the file is empty; it was passed over" in result.err
    refusal = place.run(None, "--csv", *names, no_header, "--preview", check=2).err
    assert f"{no_header}: no column REV_USER_ID, " in refusal
    assert "is empty" in place.run(None, "--csv", *names[4:], "--preview", check=2).err


def test_very_many_invalid_rows_are_counted_and_a_thousand_named(place: Workplace) -> None:
    many = [row(f"x{n}", f"x{n}", f"REVU-x{n}") for n in range(3000)]
    few = [row(f"y{n}", f"y{n}@x", f"REVU-y{n}", tickets="?") for n in range(30)]
    late = [row(f"z{n}", ADA_EMAIL, f"user_z{n}", tickets="?") for n in range(3)]
    place.csv.write_text(text(*many, *few, *ADA, *EVE, *late), encoding="utf-8")
    contents = tool.ContactReader([place.csv]).read()
    assert contents.invalid_counts == {"email": 3000, "count": 33}
    assert len(contents.invalid_rows) <= 1000
    listed = [one.line for one in contents.invalid_rows if one.code == "count"]
    assert listed == list(range(3002, 3022)), "of each reason twenty, however many come before"
    plan = tool.detect(contents, {}, "revu")
    assert {skip.email: skip.code for skip in plan.skipped} == {ADA_EMAIL: "invalid_row"}
    assert [group.email for group in plan.groups] == [EVE_EMAIL]
    out = place.run(None, "--preview", check=0).out
    assert "LEFT OUT: 3,033 invalid rows" in out and "1 pair to merge" in out
    assert re.search(
        r"not one plain address: 3,000 rows\n(.*, line \d+: .*\n){20}.* a count: 33", out
    )


@pytest.mark.parametrize("mark", ("\u0301", "\u0345", "\uff21"))
def test_a_name_or_address_of_very_many_marks_takes_no_time(mark: str) -> None:
    """Where they were normalised as a whole, this would take hours."""
    marks = mark * 3_000_000
    assert len(tool.loose_key(marks + "@x")) <= 20_000
    ones = [tool.Contact(str(n), f"{n}{marks}", "a@x", f"REVU-{n}", "", 1, "", "") for n in (1, 2)]
    assert len(tool.different_names("a@x", ones)) == 2
    assert not tool.is_address(marks + "@x")
    assert list(tool.loose_keys_in([marks + "@x", f"{marks} ada@x"])) == ["ada@x"]


FORMULAS = [
    ("Ana;=1+1", "Ana; =1+1"), ("Ana\t@x", "Ana\t @x"), ("Ana;;-1", "Ana;; -1"),
    ('Ana;"=1', 'Ana; "=1'), ("Ana\n+1", "Ana\n +1"), ("Ana\r\n=1", "Ana\r\n =1"),
    ("Ana;'=1", "Ana; '=1"), ("=1;=1", "'=1; =1"), ("Ana; B", "Ana; B"), ("Ana=1", "Ana=1"),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "safe"), FORMULAS)
def test_no_part_of_a_name_is_a_formula(cell: str, safe: str) -> None:
    written = b"".join(tool.csv_chunks(("EMAIL", "DISPLAY_NAME", "NOTES"), [("a", cell, cell)]))
    (found,) = list(csv.reader(io.StringIO(written.decode("utf-8-sig"), newline="")))[1:]
    assert found == ["a", safe, tool.guard_cell(cell)]


def test_without_rights_to_write_the_preview_still_shows_the_plan(place: Workplace) -> None:
    place.csv.write_text(PLAIN, encoding="utf-8")
    (place.folder / "logs").write_text("in the way", encoding="utf-8")
    assert pairs_of(preview(place)) == {ADA_PAIR}
    assert place.files() == [place.csv, place.folder / "logs"]


def pairs_of(plan: Dict[str, Any]) -> Set[PairIds]:
    pairs = plan["pairs"]
    found = [(one["email"], one["primary"]["id"], one["duplicate"]["id"]) for one in pairs]
    assert len(found) == len(set(found)) == plan["summary"]["pairs_to_merge"]
    return set(found)


def logged(place: Workplace) -> str:
    logs = sorted((place.folder / "logs").iterdir())
    return "".join(path.read_text(encoding="utf-8") for path in logs)


def assert_nothing_raw(*texts: str) -> None:
    marks = set("".join(texts)) - {"\n"}
    assert not {char for char in marks if unicodedata.category(char) in INVISIBLE}


# -- files that nobody thought of ------------------------------------------------------------------


@pytest.fixture
def front_door(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`main(["--preview", "--json", ...])` in this process: a file in; code, plan, stderr out."""
    monkeypatch.chdir(place.folder)
    for name in [name for name in os.environ if name.startswith("DEVREV_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    umask = os.umask(0o077)

    def call(content: bytes) -> Tuple[int, Optional[Dict[str, Any]], str]:
        place.csv.write_bytes(content)
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = tool.main(["--csv", "contacts.csv", "--preview", "--json"])
        finally:
            log = close_log(place)
        shown, said = (stream.detach().getvalue().decode("utf-8") for stream in (out, err))
        assert_nothing_raw(shown, said, log)
        assert sorted(path.name for path in place.folder.iterdir()) == ["contacts.csv", "logs"]
        if code == 0:
            return code, json.loads(shown), said
        assert shown == "" and len(said.splitlines()) == 1
        return code, None, said

    yield call
    os.umask(umask)


def close_log(place: Workplace) -> str:
    """Take the log's handlers off, and its file away; returns what was in it."""
    for handler in list(tool.log.handlers):
        tool.log.removeHandler(handler)
        handler.close()
    log = logged(place)
    for path in (place.folder / "logs").iterdir():
        path.unlink()
    return log


PIECES = (
    '"', '""', '","', ",", "\n", '"\n', "\r", "\0", "\ufeff", " ", "-", "user_", "@", "x", "\u2028",
    "\x1b[0m", ",,,,,,,",
)  # fmt: skip
KINDS = ("insert", "insert", "insert", "replace", "cut", "remove", "again", "drop")


@st.composite
def mutated(draw: Any) -> bytes:
    """A right file in which some cells have got, lost or changed something."""
    some = draw(st.lists(people, min_size=2, max_size=8, unique_by=lambda one: one.id))
    lines = text(*(",".join(cells_of(one)) for one in some)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, len(lines) - 1))
        cells = lines[number].split(",")
        place = draw(st.integers(0, len(cells) - 1))
        cell = cells[place]
        piece = draw(st.sampled_from(PIECES))
        at = draw(st.sampled_from([0, len(cell), len(cell) // 2]))
        kind = draw(st.sampled_from(KINDS))
        changed = {"insert": cell[:at] + piece + cell[at:], "replace": piece, "cut": cell[:at]}
        cells[place] = changed.get(kind, cell)
        if kind == "remove":
            del cells[place]
        lines[number] = ",".join(cells)
        if kind == "again":
            lines.insert(draw(st.integers(1, len(lines))), lines[number])
        elif kind == "drop" and len(lines) > 2:
            del lines[number]
    content: bytes = draw(st.sampled_from(["\n", "\r\n"])).join(lines).encode("utf-8")
    if draw(st.integers(0, 9)) == 0:
        return content[: draw(st.integers(0, len(content)))]
    return content


@examples(500)
@given(st.one_of(mutated(), mutated(), mutated(), st.binary(max_size=400)))
@example(text(*ADA, header=f"{HEADER},,").encode())
@example(text(bad(name='"Ann'), row("8", EVE_EMAIL, "user_8", name='Bob"'), *EVE).encode())
def test_a_damaged_export_never_gives_a_wrong_pair(front_door: Any, content: bytes) -> None:
    """Both contacts of every pair stand in the file with its email, in rows that hold nothing else;
    and no row that is not whole has that email in it."""
    code, plan, _ = front_door(content)
    assert code in (0, 2)
    if not plan or not plan["pairs"]:
        return
    rows = rows_of(content)
    header = [name.strip().upper() for name in rows.pop(0)]
    places = [header.index(name) for name in ("EMAIL", "REV_USER_ID", "EXTERNAL_REF")]
    # Columns without a name at the end of the header may be left out of a row.
    least = max(place for place, name in enumerate(header) if name) + 1
    stand = set()
    broken = set()
    for cells in rows:
        has_all = least <= len(cells) <= len(header)
        if has_all and not any(map(holds_rows, cells)) and "\0" not in str(cells):
            email, identity, reference = (cells[place].strip() for place in places)
            stand.add((email_key(email), identity, reference))
        else:
            for cell in cells:
                broken.update(email_key(part) for part in re.split(r"[,\r\n]", cell))
    for pair in plan["pairs"]:
        assert pair["primary"]["id"] != pair["duplicate"]["id"] and pair["email"] not in broken
        for one in (pair["primary"], pair["duplicate"]):
            assert (pair["email"], one["id"], one["external_ref"]) in stand


def rows_of(content: bytes) -> List[List[str]]:
    """The rows as csv has them; NUL, which Python 3.10 can't read, is a private character."""
    lines = content.decode("utf-8-sig").replace("\0", "\ue000").splitlines(keepends=True)
    found = csv.reader(io.StringIO("".join(lines), newline=""))
    return [[cell.replace("\ue000", "\0") for cell in cells] for cells in found if cells]


def holds_rows(cell: str) -> bool:
    """Whether a field with line breaks has as many commas as a row: it has swallowed others."""
    return ("\n" in cell or "\r" in cell) and cell.count(",") >= len(COLUMNS) - 1
