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
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import merge_contacts as tool
from tests.support import COLUMNS, Workplace

HEADER = ",".join(COLUMNS)
INVISIBLE = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # controls, bidi marks and the like, lone surrogates, line ends
PairIds = Tuple[str, str, str]  # email, primary, duplicate


def row(
    key: str, email: str, reference: str, name: str = "Ada", tickets: str = "1", **cells: str
) -> str:
    """One line of a CSV, put together without the csv module: what is in a cell stands in the file as it is."""
    values = {
        "REV_USER_ID": key,
        "DISPLAY_NAME": name,
        "EMAIL": email,
        "EXTERNAL_REF": reference,
        "FULL_NAME": "Ada Reyes",
        "TICKET_COUNT": tickets,
        "CREATED_AT": "2024-01-01",
        "UPDATED_AT": "2024-06-01",
        **cells,
    }
    return ",".join(values[column] for column in COLUMNS)


def text(*rows: str, header: str = HEADER, end: str = "\n") -> str:
    return end.join((header, *rows)) + end


ADA = (row("1", "ada@example.com", "REVU-1"), row("2", "ada@example.com", "user_2"))
EVE = (row("3", "eve@example.com", "REVU-3"), row("4", "eve@example.com", "user_4"))
ADA_PAIR, EVE_PAIR = ("ada@example.com", "1", "2"), ("eve@example.com", "3", "4")


class Case(NamedTuple):
    """A file and what has to come of it. `says` stands in the one line of an error."""

    content: Union[str, bytes]
    pairs: Iterable[PairIds] = ()
    skips: Dict[str, str] = {}
    bad_lines: Iterable[int] = ()
    code: int = 0
    says: str = ""


def good(content: Union[str, bytes], *pairs: PairIds) -> Case:
    return Case(content, pairs or (ADA_PAIR,))


def refused(content: Union[str, bytes], says: str) -> Case:
    return Case(content, code=2, says=says)


def spoilt(bad: str, *before: str, line: int = 2, email: str = "ada@example.com") -> Case:
    """A bad row in front of two groups: the one whose email it has is skipped, the other is merged."""
    own = (
        ADA
        if email == "ada@example.com"
        else (row("1", email, "REVU-1"), row("2", email, "user_2"))
    )
    return Case(text(*before, bad, *own, *EVE), [EVE_PAIR], {email: "invalid_row"}, [line])


def without(column: str, *more: str) -> str:
    """The two rows of a pair in a file that lacks a column; `more` columns are there instead."""
    place = COLUMNS.index(column)
    lines = [line.split(",") for line in text(*ADA).splitlines()]
    for number, cells in enumerate(lines):
        del cells[place]
        cells += more if number == 0 else ["something"] * len(more)
    return "\n".join(map(",".join, lines))


def reordered(line: str, order: Iterable[int] = (7, 3, 0, 5, 4, 2, 6, 1)) -> str:
    cells = line.split(",")
    return ",".join(cells[place] for place in order)


def named(name: str) -> str:
    return text(row("1", "ada@example.com", "REVU-1", name=name), ADA[1])


def addressed(email: str) -> Case:
    """Both contacts of an odd email: it is an address like any other."""
    rows = text(row("1", email, "REVU-1"), row("2", email, "user_2"), *EVE)
    return Case(rows, [(email.strip('"').strip(), "1", "2"), EVE_PAIR])


def zipped(name: str, content: str = "") -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(name, content)
    return whole.getvalue()


def bad_email(cell: str) -> Case:
    """A row whose EMAIL is no plain address, in a file that is good otherwise."""
    return Case(text(row("7", f'"{cell}"', "user_7"), *ADA), [ADA_PAIR], {}, [2])


def bad_address(bad: str) -> Case:
    """A bad row that names Ada, and spoils nothing."""
    return Case(text(bad, *ADA, *EVE), [ADA_PAIR, EVE_PAIR], {}, [2])


def spoils_ada(cell: str) -> Case:
    """A row with a bad count whose EMAIL is Ada's but for how it is written."""
    return Case(
        text(row("7", f'"{cell}"', "user_7", tickets="x"), *ADA, *EVE),
        [EVE_PAIR],
        {"ada@example.com": "invalid_row"},
        [2],
    )


def swallowing(first: str, last: str) -> str:
    """A name that opens a quote and, rows later, one that ends with one: csv takes all between for one name.

    Together they are a row of eight columns: contact 7 with the email and the reference of 8.
    """
    return text(
        row("7", "ada@example.com", "REVU-7", name='"Ann'),
        first,
        row("8", "eve@example.com", "user_8", name='Bob"'),
        last,
        *ADA,
        *EVE,
    )


FILES: Dict[str, Case] = {
    "plain": good(text(*ADA)),
    "nothing in it": refused("", "empty"),
    "only a BOM": refused(b"\xef\xbb\xbf", "empty"),
    "only blank lines": refused("\n\r\n\n", "empty"),
    "header only": Case(HEADER),
    "header and blank lines": Case(HEADER + "\n\n\n"),
    "one invalid row alone": refused(text(row("7", "ada@example.com", "user_7", tickets="x")), "line 2: TICKET_COUNT is not"),
    "invalid rows alone": refused(
        text(*(row(str(n), "ada@example.com", f"user_{n}", tickets="?") for n in range(55))), "no usable row, 55 invalid rows: contacts.csv, line 2: "
    ),
    **{f"without {column}": refused(without(column), column) for column in COLUMNS},
    **{f"something else in place of {column}": refused(without(column, "NOTES"), column) for column in COLUMNS},
    **{
        f"{alias} in place of {column}": refused(without(column, alias), f"no column {column} ")
        for column, alias in (
            ("REV_USER_ID", "ID"), ("DISPLAY_NAME", "NAME"), ("EMAIL", "EMAIL_ADDRESS"), ("TICKET_COUNT", "TOTAL_TICKETS"),
            ("EXTERNAL_REF", "EXTERNAL_REFERENCE"), ("CREATED_AT", "CREATED_DATE"), ("UPDATED_AT", "MODIFIED_DATE"),
            ("FULL_NAME", "DISPLAY_ID"),
        )
    },
    "no header": refused("\n".join(ADA), "no column REV_USER_ID, "),
    **{
        f"separated by {mark!r}": good(text(*ADA).replace(",", mark)) for mark in (";", "\t")
    },
    "semicolons and quotes": good('"' + text(*ADA).replace(",", '";"').replace("\n", '"\n"')[:-1]),
    "semicolons behind a BOM, and a blank": good(b"\xef\xbb\xbf" + text(*ADA).replace(",", "; ").encode()),
    "semicolons, and a quoted name with one and commas": good(named("SOMEBODY").replace(",", ";").replace("SOMEBODY", '"a;b,c,d,e,f,g,h,i"')),
    "semicolons in a file of commas": good(named("Ana;B")),
    "a stray quote that swallows a row between semicolons": Case(
        text(row("7", "ada@example.com", "REVU-7", name='"Ann'), row("8", "eve@example.com", "user_8", name='Bob"'),
             *ADA, *EVE).replace(",", ";"), [], {"ada@example.com": "invalid_row", "eve@example.com": "invalid_row"}, [3]),
    "sep= before the header": refused("sep=,\r\n" + text(*ADA), "found: SEP="),
    "sep= of semicolons behind a BOM": refused(b"\xef\xbb\xbfSEP=;\n" + text(*ADA).replace(",", ";").encode(), "found: SEP="),
    "an Excel workbook": refused(zipped("xl/workbook.xml"), "a ZIP archive or an Excel workbook"),
    "an old Excel workbook": refused(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512), "Excel workbook"),
    "an empty ZIP": refused(b"PK\x05\x06" + bytes(18), ": a ZIP archive"),
    "a Parquet file": refused(b"PAR1\x15\x04\x15" + bytes(99) + b"PAR1", "Parquet"),
    "an SQLite database": refused(b"SQLite format 3\0" + bytes(99), "a binary file"),
    "a Zstandard archive": refused(b"\x28\xb5\x2f\xfd\x04\x58", "a binary file"),
    "gzip": good(gzip.compress(text(*ADA).encode())),
    "gzip with a BOM": good(gzip.compress(b"\xef\xbb\xbf" + text(*ADA).encode())),
    "gzip in two members": good(gzip.compress(text(ADA[0]).encode()) + gzip.compress((ADA[1] + "\n").encode())),
    "gzip inside gzip": refused(gzip.compress(gzip.compress(text(*ADA).encode())), "gzip inside gzip"),
    "a ZIP inside gzip": refused(gzip.compress(zipped("contacts.csv")), "in the gzip file: a ZIP archive"),
    "gzip of nothing": refused(gzip.compress(b""), "empty"),
    **{
        f"gzip that ends after {share:.0%}": refused(whole[: int(len(whole) * share)], "cut off or damaged")
        for whole in [gzip.compress(text(*ADA, *(row(f"x{n}", f"x{n}@example.com", f"REVU-{n}") for n in range(9000))).encode())]
        for share in (0.001, 0.5, 0.99, 0.99999)
    },
    "gzip with a wrong checksum": refused(gzip.compress(text(*ADA).encode())[:-8] + bytes(8), "cut off or damaged"),
    "a web page": refused("<!DOCTYPE html>\n<html><head>", "a web page"),
    "a column twice": refused(text(*(line + ",x" for line in ADA), header=HEADER + ",EMAIL"), "EMAIL is there twice"),
    "a column twice, in another case": refused(text(*(line + ",x" for line in ADA), header=HEADER + ", email "), "EMAIL is"),
    "a stray quote in the header": refused(
        text(*(line + ',"' for line in ADA), *(line + ",x" for line in EVE), header=HEADER + ',"NOTES'), "header"
    ),
    "columns in another order": good("\n".join(map(reordered, text(*ADA).splitlines()))),
    "columns in another case": good(text(*ADA, header=HEADER.lower())),
    "spaces around the columns": good(text(*ADA, header=HEADER.replace(",", " , "))),
    "a comma and a blank between cells": good(text(*ADA).replace(",", ", ")),
    "extra columns": good(text(*(f"x,{line},y" for line in ADA), header=f"NOTES,{HEADER},NOTES")),
    "extra columns that are called much like them": good(
        text(*(f"9,x,x@example.com,user_9,{line}" for line in ADA), header=f"ID,NAME,EMAIL_ADDRESS,EXTERNAL_REFERENCE,{HEADER}")
    ),
    "BOM": good(b"\xef\xbb\xbf" + text(*ADA).encode()),
    "CRLF": good(text(*ADA, end="\r\n")),
    "CR alone": good(text(*ADA, end="\r")),
    "no line end at the end": good(text(*ADA).rstrip()),
    "UTF-16": refused(text(*ADA).encode("utf-16"), "UTF-16"),
    "UTF-16, big-endian": refused(b"\xfe\xff" + text(*ADA).encode("utf-16-be"), "UTF-16"),
    "UTF-16 without BOM": refused(text(*ADA).encode("utf-16-le"), "UTF-16"),
    "UTF-16 without BOM, big-endian": refused(text(*ADA).encode("utf-16-be"), "UTF-16"),
    "UTF-32": refused(text(*ADA).encode("utf-32"), "UTF-"),
    "Latin-1": refused(named("Zo\u00eb").encode("latin-1"), "not UTF-8"),
    "Latin-1 in the last line": refused(text(*EVE * 9000, named("Zo\u00eb")).encode("latin-1"), "not UTF-8"),
    "not text at all": refused(bytes(range(256)) * 8, ""),
    "a blank line in between": good(text(ADA[0], "", ADA[1])),
    "a name with line breaks": good(named('"Ada\nB.\r\n\r\nReyes"')),
    "a name with commas and quotes": good(named('"Reyes, Ada ""A"", B, C, D"')),
    "a quote inside a name": good(named('Ada "A" Reyes')),
    "a quote that never ends": refused(text(row("7", "eve@example.com", "REVU-7", name='"Ann'), *ADA), "line "),
    "text behind a quoted field": refused(named('"Ada" Reyes'), "line 2"),
    "a name of 300 kB": good(named("x" * 300_000)),
    "a name of 3 MB": good(named("x" * 3_000_000)),
    "a name of 3 MB in a column that is not read": good(
        text(f"{ADA[0]},{'x' * 3_000_000}", f"{ADA[1]},", header=HEADER + ",NOTES")
    ),
    "a row of very many fields": spoilt("x," * 50_000 + "ada@example.com"),
    # rows
    "too few fields": spoilt("7,REVU-7,Ada,ada@example.com,user_7"),
    "the email in another place, for a comma in a name": spoilt(row("7", "ada@example.com", "user_7", name="Reyes, Ada")),
    "one field": spoilt("ada@example.com"),
    "one field too many, filled in": spoilt(row("7", "ada@example.com", "user_7") + ",x"),
    "too few fields, of an address with an apostrophe": spoilt("7,x,x,o'dell@example.com", email="o'dell@example.com"),
    "empty id": spoilt(row("", "ada@example.com", "user_7")),
    "blank id": spoilt(row("  ", "ada@example.com", "user_7")),
    **{f"an id like {word}": spoilt(row(word, "ada@example.com", "user_7")) for word in ("NULL", "\\N", " null ", "NaN")},
    "empty reference": spoilt(row("7", "ada@example.com", "")),
    "empty email": Case(text(row("7", " ", "user_7"), *ADA), [ADA_PAIR], bad_lines=[2]),
    "a bad row of somebody else": Case(text(*ADA, row("7", "x@example.com", "user_7", tickets="?")), [ADA_PAIR], {}, [4]),
    **{
        f"a count like {count[:20]!r}": spoilt(row("7", "Ada@Example.com ", "user_7", tickets=count))
        for count in (
            "", "x", "-1", "+1", "1.5", "4.01", "4.", ".0", "4.0.0", "4 .0", "-0.0", "1e3", "0x1", "1_000", "NaN", "\u00b2", "NULL",
            "1.000", "4.000", "0.000", "1 204", "1\u00a0204", "1\u202f204", "1'204", '"1,204"', '"4,0"', "\u0664", "4.0000",
            "9" * 40, "9" * 5000,
        )
    },
    **{
        f"a count like {count!r}": good(text(row("1", "ada@example.com", "REVU-1", tickets=count), ADA[1]))
        for count in ("4.0", "4.00", "4", " 4 ", "4.0\t", "007", "0.0", "123456789.00")
    },
    "NUL in the name": spoilt(row("7", "ada@example.com", "user_7", name="A\0a")),
    "NUL in the email": spoilt(row("7", "a\0da@example.com", "user_7")),
    "NUL in the count": spoilt(row("7", "ada@example.com", "user_7", tickets="1\0")),
    "NUL alone in a line": Case(text("\0", *ADA), [ADA_PAIR], {}, [2]),
    "a bad line behind others": spoilt("7,,,ada@example.com", *EVE, line=4),
    "a stray quote that swallows a part of two rows": Case(
        text(
            row("7", "ada@example.com", "REVU-7", name='"Ann'), row("8", "eve@example.com", "user_8", name='Bob"'),
            *ADA, *EVE, row("5", "fay@example.com", "REVU-5"), row("6", "fay@example.com", "user_6"),
        ),
        [("fay@example.com", "5", "6")],
        {"ada@example.com": "invalid_row", "eve@example.com": "invalid_row"},
        [3],
    ),
    "a stray quote that swallows whole rows": Case(
        swallowing(row("9", "o'dell@example.com", "user_9"), row("10", "o'dell@example.com", "REVU-10")),
        [],
        {"ada@example.com": "invalid_row", "eve@example.com": "invalid_row", "o'dell@example.com": "invalid_row"},
        [4],
    ),
    "a stray quote that swallows a row into the last field": Case(
        text(*(line + ',"' for line in ADA), *(line + ",x" for line in EVE), header=HEADER + ",NOTES"),
        [EVE_PAIR],
        {},
        [3],
    ),
    # contacts
    "the same row twice": good(text(*ADA, *ADA)),
    "the same row twice, apart": good(text(ADA[0], *EVE, ADA[1], ADA[0]), ADA_PAIR, EVE_PAIR),
    "the same row with its count in two spellings": good(text(*ADA, row("1", "ada@example.com", "REVU-1", tickets="1.0"))),
    "one id with two counts": Case(
        text(*ADA, row("1", "ada@example.com", "REVU-1", tickets="2"), *EVE), [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2, 4]
    ),
    "one id with two counts and the first row once more": Case(
        text(*ADA, *EVE, ADA[0], row("1", "ada@example.com", "REVU-1", tickets="2")),
        [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2, 7],
    ),
    "one id with two dates of its last change": Case(
        text(*ADA, row("1", "ada@example.com", "REVU-1", UPDATED_AT="2025-01-01"), *EVE),
        [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2, 4],
    ),
    "one id with two emails": Case(
        text(*ADA, row("1", "eve@example.com", "REVU-1"), *EVE),
        [],
        {"ada@example.com": "invalid_row", "eve@example.com": "invalid_row"},
        [2, 4],
    ),
    "one id with two references, the odd one last": Case(
        text(row("1", "ada@example.com", "user_1"), row("1", "ada@example.com", "crm")),
        [], {"ada@example.com": "invalid_row"}, [2, 3],
    ),
    "one id with two references, the odd one first": Case(
        text(row("1", "ada@example.com", "crm"), row("1", "ada@example.com", "user_1")),
        [], {"ada@example.com": "invalid_row"}, [2, 3],
    ),
    "conflicting rows between invalid ones and behind a name with line breaks": Case(
        text(
            row("7", "x@example.com", "user_7", tickets="x"), row("8", "y@example.com", "REVU-8", name='"Y\n\nZ"'), *ADA,
            row("9", "x@example.com", "user_9", tickets="x"), row("1", "ada@example.com", "REVU-1", tickets="2"), *EVE,
        ),
        [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2, 6, 8, 9],
    ),
    "several user_": Case(text(*ADA, row("3", " ADA@example.com", "user_3")), [], {"ada@example.com": "several_user_refs"}),
    "no user_": Case(text(ADA[0], row("3", "ada@example.com", "REVU-3")), [], {"ada@example.com": "no_user_ref"}),
    **{
        f"look-alike {reference!r}": Case(text(row("1", "ada@example.com", other), row("2", "ada@example.com", reference)))
        for other, reference in (
            ("REVU-1", "userX2"), ("REVU-1", "User_2"), ("REVU-1", "user-2"), ("user_1", "revu-2"), ("user_1", "REVU_2"),
            ("REVU-1", "\u200buser_2"),
        )
    },
    # padding
    **{
        f"padded {column} {blank!r}": good(
            text(
                row("1", "ada@example.com", "REVU-1", tickets="0", **{column: f"{blank}{cell}{blank}"}),
                row("2", "ada@example.com", "user_2", tickets="1"),
            )
        )
        for column, cell in (
            ("REV_USER_ID", "1"), ("EMAIL", "ada@example.com"), ("EXTERNAL_REF", "REVU-1"), ("TICKET_COUNT", "3"),
            ("CREATED_AT", "2024-01-01"),
        )
        for blank in (" ", "\t", "\u00a0", "\u3000", "\x0b")
    },
    "one contact with and without a blank behind its id": good(text(*ADA, row("2 ", "ada@example.com", "user_2"))),
    "one contact with and without a blank, and with two counts": Case(
        text(*ADA, row("2 ", "ada@example.com", "user_2", tickets="9")), [], {"ada@example.com": "invalid_row"}, [3, 4],
    ),
    # words and addresses
    **{
        f"EMAIL is {word!r}": Case(
            text(row("7", word, "REVU-7"), row("8", word, "user_8"), *ADA), [ADA_PAIR], {}, [2, 3],
        )
        for word in ("\\N", "NULL", "null", "nan", "None", "N/A", "-", "(null)", "<NA>")
    },
    **{
        f"EMAIL is {cell!r}": bad_email(cell)
        for cell in (
            "eve@example.com, eve@example.org", "eve@example.com;fay@example.com", "Eve <eve@example.com>", "<eve@example.com>",
            "eve@@example.com", "eve@", "@example.com", "eve@a@b", "eve example.com", "e ve@example.com", "eve@exam ple.com",
            "eve\u00a0x@example.com", "e\u200bve@example.com", "eve@example.com\ufeff", "\u202eeve@example.com", "eve\x07@example.com",
            "eve\u00ad@example.com", "eve\ufe0f@example.com", "eve\u115f@example.com", "eve\u1160@example.com", "eve\u3164@example.com",
            "eve\uffa0@example.com", "eve\u2800@example.com", "eve\U000e0101@example.com", '""eve""@example.com',
            "eve\uff20example.com", "eve\u180b@example.com",
        )
    },
    **{
        f"Ada's group is spoilt by {cell!r}": spoils_ada(cell)
        for cell in (
            "Ada <ADA@example.com>", "ada@example.com, eve@example.org", "a\u200bda@example.com", "ada\uff20example.com",
            "\uff41da@example.com", "mailto:ada@example.com", "(ada@example.com)", "ada@example.com\ufeff", "x;ada@example.com",
            "[ada@example.com]", "ada @example.com", "\u00a0ada@example.com",
        )
    },
    # A customer chooses their own name: where everything else is in its place, EMAIL alone counts.
    **{
        f"a bad address beside others' as a name, with {column} {cell!r}": (spoilt if in_any_cell else bad_address)(
            row("7", "x", "user_7", name="ada@example.com", **{column: cell})
        )
        for column, cell, in_any_cell in (
            ("FULL_NAME", "", False), ("CREATED_AT", "1/31/2024 12:00", False), ("UPDATED_AT", "2024-06-01 12:00:00.000 Z", False),
            ("REV_USER_ID", "", True), ("REV_USER_ID", "NULL", True), ("REV_USER_ID", "x@y", True), ("EXTERNAL_REF", " ", True),
            ("TICKET_COUNT", "x", True), ("CREATED_AT", "", True), ("CREATED_AT", "204", True), ("UPDATED_AT", "Ada", True),
        )
    },
    "a NUL in a name with others' addresses": bad_address(row("7", "x@example.com", "user_7", name="A\0 ada@example.com")),
    # what spreadsheets do with the end of a row
    "rows of blank cells": good(text(",,,,,,,", ADA[0], ", ,\t, ,,,,", ADA[1], ",", '"",""')),
    "cells of further columns left out": good(text(ADA[0], ADA[1] + ",x", header=HEADER + ",NOTES,MORE,")),
    "further columns in between, filled in for some": good(
        text(*(f"{line[0]},,{line[2:]}" for line in ADA), header=HEADER.replace(",", ",NOTES,", 1) + ",MORE")
    ),
    "blank cells behind the last column": good(text(ADA[0] + ",, ", ADA[1] + ",")),
    "the last of the eight columns left out": spoilt("7,Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01"),
    "the last of the eight columns left out beside notes": Case(
        text("7,Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01", *ADA, *EVE, header=HEADER + ",NOTES"),
        [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2]),
    **{
        f"shifted by a comma, and a blank last cell: {line}": spoilt(line)
        for line in (
            "7,Reyes, Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01,", "7,Ada,ada@example.com,user_7,Reyes, Ada,1,2024-01-01,",
            "7,Ada,ada@example.com,user_7,Ada Reyes,1,204,2024-01-01,", "7,Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01,9,",
        )
    },
    "a name of two lines and blank cells behind it": spoilt(
        row("7", "ada@example.com", "user_7", name='"A\nB"') + ",", line=3
    ),
    "a row swallowed by a quote where further columns are left out": Case(
        text(row("7", "ada@example.com", "REVU-7", UPDATED_AT='"x'), row("8", "ada@example.com", "user_8", UPDATED_AT='y"'),
             *ADA, *EVE, header=HEADER + ",NOTES,MORE"),
        [EVE_PAIR], {"ada@example.com": "invalid_row"}, [3]),
    "a quote that a backslash escapes": refused(text(*ADA, row("7", "x@x", "user_7", name='"Ann \\"A\\""'), *EVE), "line 4: a backslash"),
    "one behind others, in plain text": refused(
        text(row("8", "y@x", "user_8", name='Ann \\"A\\"'), row("7", "x@x", "user_7", name='"Ann" A'), *ADA), "line 3: "),
    "one at the end of a name": refused(
        text(*ADA, row("7", "x@x", "user_7", name='"5\\""'), row("8", "y@x", "user_8", name='"B"')), "line 4: a backslash"),
    "a backslash at the end of a name": good(named('"Ada\\"')),
    # length
    "an address of 1,000 characters": addressed("x" * 988 + "@example.com"),
    "one of 1,001": bad_email("x" * 989 + "@example.com"),
    "a bad row with an address behind very many": Case(
        text(row("7", "x " * 3000 + "ada@example.com", "user_7"), *ADA, *EVE), [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2]),
    "two mailboxes that case folding makes one": Case(
        text(row("1", "stra\u00dfe@example.com", "REVU-1"), row("2", "strasse@example.com", "user_2"))
    ),
    "a letter that is upper case and no ASCII": Case(
        text(row("1", "\u00c9va@example.com", "REVU-1"), row("2", "\u00e9va@example.com", "user_2"))
    ),
    "a Kelvin sign": Case(text(row("1", "\u212aate@example.com", "REVU-1"), row("2", "kate@example.com", "user_2"))),
    # spreadsheets
    "an apostrophe before what looks like a formula": Case(
        text(row("1", "'=ada@example.com", "REVU-1"), row("2", "=ada@example.com", "user_2")), [("=ada@example.com", "1", "2")]
    ),
    "an apostrophe that is part of a name": Case(
        text(row("1", "'ada@example.com", "REVU-1"), row("2", "ada@example.com", "user_2"))
    ),
    # addresses
    "an email that is a path": addressed("../../../etc/passwd@example.com"),
    "an absolute path": addressed("/tmp/x@example.com"),
    "a path of Windows": addressed("..\\..\\c:\\x@example.com"),
    "a device of Windows": addressed("nul@example.com"),
    "a device with an extension": addressed("con.txt@example.com"),
    "an email of 1,001 characters": Case(
        text(*(row(key, "x" * 989 + "@example.com", ref) for key, ref in (("1", "REVU-1"), ("2", "user_2"))), *EVE),
        [EVE_PAIR], bad_lines=(2, 3),
    ),
    "rows of blank cells above the header": good(",,,\n,,,,,,,\n" + text(*ADA)),
    "a missing time that a further column has moved up to": Case(
        text("7,Ada,ada@example.com,user_7,Ada Reyes,1,2024-01-01,vip", *ADA, *EVE, header=HEADER + ",NOTES"),
        [EVE_PAIR], {"ada@example.com": "invalid_row"}, [2],
    ),
    "an email of 300 characters": addressed("x" * 288 + "@example.com"),
    "an email that looks like an option": addressed("--yes@example.com"),
    "an email that looks like a formula": addressed("=1+1@example.com"),
}  # fmt: skip

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m", "title of the window": "\x1b]0;title\x07", "back and over": "\b\b\b\x7f\r",
    "eight-bit escape": "\x9b31m\x85\x90", "text turned round": "\u202egro.elpmaxe\u2066\u2069\u200f\u061c",
    "line breaks of Unicode": "a\u2028b\u2029c\x0bd\x0ce", "invisible": "\u200b\u200d\u00ad\ufeff\U000e0041",
    "line breaks": "one\r\ntwo\nthree", "a line of the log": "x\n2024-01-01 00:00:00,000 INFO all merged",
}  # fmt: skip


def assert_as_said(case: Case, plan: Any, said: str) -> None:
    if case.code:
        (line,) = said.splitlines()
        assert case.says in line and "contacts.csv" in line and plan is None
        return
    assert pairs_of(plan) == set(case.pairs)
    assert {skip["email"]: skip["code"] for skip in plan["skipped"]} == case.skips
    assert [bad["line"] for bad in plan["invalid_rows"]] == list(case.bad_lines)
    for counted, listed in (
        ("pairs_to_merge", "pairs"),
        ("skipped_groups", "skipped"),
        ("invalid_rows", "invalid_rows"),
    ):
        assert plan["summary"][counted] == len(plan[listed])
    assert case.says in said and len(said.splitlines()) == bool(case.says)


@pytest.mark.parametrize("case", FILES.values(), ids=list(FILES))
def test_a_file_gives_the_right_plan_or_one_clear_line(
    front_door: Any, place: Workplace, case: Case
) -> None:
    content = case.content.encode("utf-8") if isinstance(case.content, str) else case.content
    code, plan, said = front_door(content)
    assert code == case.code and place.csv.read_bytes() == content
    assert_as_said(case, plan, said)


def hostile_rows(number: int, marks: str) -> Iterator[str]:
    """A pair, a group with several user_ and one with bad rows, with the marks wherever text goes."""
    odd = dict.fromkeys(("DISPLAY_NAME", "FULL_NAME", "CREATED_AT", "UPDATED_AT"), f'"{marks}"')
    for key, email, reference, tickets in (
        ("1", "pair", "REVU-1", "1"),
        ("2", "pair", "user_{}", "1"),
        ("3{}x", "users", "user_{}", "1"),
        ("4", "users", "user_4{}", "1"),
        ("5", "bad", "REVU-{}", "{}"),
        ("6", "bad", "REVU-{}", "1"),
    ):
        cells = (
            f"{number}{key}",
            f"{number}{email}{'{}' if email == 'bad' else ''}@example.com",
            reference,
        )
        yield row(
            *(f'"{cell.format(marks)}"' for cell in cells),
            TICKET_COUNT=f'"{tickets.format(marks)}"',
            **odd,
        )


def test_nothing_that_acts_on_a_terminal_gets_through(place: Workplace) -> None:
    """As `--json` does in the tests of files: here the lines for people."""
    lines: List[str] = []
    for number, marks in enumerate(HOSTILE.values()):
        lines += hostile_rows(number, marks)
    place.csv.write_bytes(text(*lines).encode("utf-8"))
    result = place.run(None, "--preview", "-v", check=0)
    assert result.out.count("user_") >= len(HOSTILE)
    parts = {part for marks in HOSTILE.values() for part in re.split(r"[\r\n]", marks)[1:] if part}
    emails = [f"--email={marks}" for marks in HOSTILE.values()]
    unknown = place.run(None, "--preview", *emails, check=2)
    assert_nothing_raw(result.out, result.err, unknown.out, unknown.err, logged(place))
    for line in (result.out + result.err + logged(place)).splitlines():
        assert not line.startswith(tuple(parts)), "data has begun a line of its own"


@pytest.mark.parametrize(
    ("header", "line"),
    [("\x1b[31mNAME,\u202ex,\x9b1m", "x"), ("EMAIL,email,\u202e", "x"), (HEADER, '"\x1b[31m\u202e')],
    ids=["missing columns", "a doubled column", "not well-formed"],
)  # fmt: skip
def test_an_error_is_one_harmless_line(place: Workplace, header: str, line: str) -> None:
    place.csv.write_bytes(f"{header}\n{line}\n".encode())
    result = place.run(None, "--preview", check=2)
    assert_nothing_raw(result.out, result.err, logged(place))
    assert len(result.err.splitlines()) == 1 and result.out == ""


def test_a_path_is_a_file_that_can_be_read_or_one_clear_line(place: Workplace) -> None:
    place.csv.write_text(text(*ADA), encoding="utf-8")
    (place.folder / "a folder").mkdir()
    for path in (
        "a folder",
        "missing.csv",
        "missing/contacts.csv",
        "",
        "x" * 5000,
        os.devnull,
        "miss\x1b[31m\u202e\ning",
    ):
        result = place.run(None, "--preview", f"--csv={path}", check=2)
        assert len(result.err.splitlines()) == 1 and result.out == "", result
        assert_nothing_raw(result.err, logged(place))
    for name in ("-x.csv", "--yes", "\u5c71 \u7530.csv"):
        (place.folder / name).write_text(text(*EVE), encoding="utf-8")
        result = place.run(None, "--preview", "--json", f"--csv={name}", check=0)
        assert pairs_of(json.loads(result.out)) == {EVE_PAIR}
    assert not list(place.folder.glob("**/*.db")) and not (place.folder / "backups").exists()


def test_the_preview_can_be_narrowed(place: Workplace) -> None:
    third = row("5", "eve@example.com", "REVU-5")
    place.csv.write_text(
        text(*ADA, *EVE, third, row("6", "fay@example.com", "user_6")), encoding="utf-8"
    )

    def pairs(*options: str) -> Set[PairIds]:
        return pairs_of(json.loads(place.run(None, "--preview", "--json", *options, check=0).out))

    eve = {EVE_PAIR, ("eve@example.com", "3", "5")}
    assert pairs() == {ADA_PAIR, *eve}
    assert pairs("--email", " Ada@EXAMPLE.com") == {ADA_PAIR}
    assert pairs("--email", "eve@example.com", "--email", "fay@example.com") == eve
    assert (
        "nobody@example.com"
        in place.run(None, "--preview", "--email", "nobody@example.com", check=2).err
    )
    assert len(pairs("--limit", "1")) == 1
    assert len(pairs("--limit", "2")) <= 2
    assert pairs("--limit", "3") == pairs("--limit", "99999") == {ADA_PAIR, *eve}


def test_an_export_in_parts_is_read_as_one(place: Workplace) -> None:
    parts = (
        text(ADA[0], EVE[1]),
        text(EVE[0], header=HEADER.lower()),
        text(ADA[1], row("9", "x@example.com", "crm")),
        HEADER,
    )
    for number, part in enumerate(parts):
        content = part.encode()
        (place.folder / f"part_{number}.csv").write_bytes(
            gzip.compress(content) if number % 2 else content
        )
    names = [f"part_{number}.csv" for number in range(len(parts))]
    for options in (
        ["--csv", *names],
        ["--csv", *names[::-1]],
        [f"--csv={name}" for name in names],
        ["--csv", *names[:2], "--csv", *names[2:], "--csv", names[0]],
    ):
        plan = json.loads(place.run(None, *options, "--preview", "--json", check=0).out)
        assert pairs_of(plan) == {ADA_PAIR, EVE_PAIR} and plan["summary"]["contacts_read"] == 5
        assert plan["summary"]["other_references"] == 1 and plan["schema"] == tool.SCHEMA
    (place.folder / "part_4.csv").write_text(
        text(row("7", "ada@example.com", "user_7", tickets="1,2")), encoding="utf-8"
    )
    result = place.run(None, "--csv", *names, "part_4.csv", "--preview", check=0)
    assert (
        "part_4.csv, line 2: 9 fields instead of 8" in result.out
        and "1 pair to merge" in result.out
    )
    (place.folder / "part_5.csv").write_text("\n".join(ADA), encoding="utf-8")
    assert (
        "part_5.csv: no column REV_USER_ID, "
        in place.run(None, "--csv", *names, "part_5.csv", "--preview", check=2).err
    )


def test_of_several_parts_an_empty_one_is_passed_over(place: Workplace) -> None:
    place.csv.write_text(text(*ADA), encoding="utf-8")
    for name, content in (
        ("a.csv", b""),
        ("b.csv", b"\xef\xbb\xbf\n"),
        ("c.csv.gz", gzip.compress(b"")),
    ):
        (place.folder / name).write_bytes(content)
    names = ("contacts.csv", "a.csv", "b.csv", "c.csv.gz")
    result = place.run(None, "--csv", *names, "--preview", "--json", check=0)
    assert pairs_of(json.loads(result.out)) == {ADA_PAIR}
    for name in names[1:]:
        assert f"{name}: the file is empty; it was passed over" in result.err
    assert "is empty" in place.run(None, "--csv", *names[1:], "--preview", check=2).err


def test_a_folder_is_refused_with_how_to_give_its_files(place: Workplace) -> None:
    (place.folder / "export").mkdir()
    said = place.run(None, "--csv", "export", "--preview", check=2).err.replace(os.sep, "/")
    assert "a folder, not a file; name the files in it: export/part-1.csv" in said


def test_very_many_invalid_rows_are_counted_and_a_thousand_named(tmp_path: Path) -> None:
    path = tmp_path / "contacts.csv"
    many = [row(f"x{n}", f"x{n}", f"REVU-x{n}") for n in range(3000)]
    few = [row(f"y{n}", f"y{n}@x", f"REVU-y{n}", tickets="?") for n in range(30)]
    late = [row(f"z{n}", "ada@example.com", f"user_z{n}", tickets="?") for n in range(3)]
    path.write_text(text(*many, *few, *ADA, *EVE, *late), encoding="utf-8")
    contents = tool.ContactReader([path]).read()
    assert contents.invalid_counts == {"email": 3000, "count": 33}
    assert len(contents.invalid_rows) <= 1000
    named = [bad.line for bad in contents.invalid_rows if bad.code == "count"]
    assert named == list(range(3002, 3022)), "of each reason twenty, however many come before"
    plan = tool.detect(contents, {}, "revu")
    assert {skip.email: skip.code for skip in plan.skipped} == {"ada@example.com": "invalid_row"}
    assert [group.email for group in plan.groups] == ["eve@example.com"]
    tool.keep_emails(plan, ["y29@x"])


def test_invalid_rows_are_printed_by_reason(place: Workplace) -> None:
    bad = [row(f"x{n}", f"x{n}", f"REVU-x{n}") for n in range(25)]
    place.csv.write_text(text(*EVE, *bad, row("7", "f@x", "REVU-7", tickets="x")), encoding="utf-8")
    out = place.run(None, "--preview", check=0).out
    assert "LEFT OUT: 26 invalid rows" in out and "1 pair to merge" in out
    assert re.search(r"not one plain address: 25 rows\n(.*\n){20} +not a count: 1 row\n", out)


@pytest.mark.parametrize("mark", ("\u0301", "\u0345", "\uff21"))
def test_a_name_or_address_of_very_many_marks_takes_no_time(mark: str) -> None:
    """Where they were normalised as a whole, this would take hours."""
    marks = mark * 3_000_000
    assert len(tool.loose_key(marks + "@x")) <= 20_000
    ones = [tool.Contact(str(n), f"{n}{marks}", "a@x", f"REVU-{n}", "", 1, "", "") for n in (1, 2)]
    assert len(tool.different_names("a@x", ones)) == 2
    assert not tool.is_address(marks + "@x")
    assert list(tool.loose_keys_in([marks + "@x", f"{marks} ada@x"])) == ["ada@x"]


@pytest.mark.parametrize(
    ("cell", "safe"),
    [
        ("Ana;=1+1", "Ana; =1+1"), ("Ana\t@x", "Ana\t @x"), ("Ana;;-1", "Ana;; -1"), ("Ana;\"=1", "Ana; \"=1"),
        ("Ana\n+1", "Ana\n +1"), ("Ana\r\n=1", "Ana\r\n =1"), ("Ana;'=1", "Ana; '=1"), ("=1;=1", "'=1; =1"),
        ("Ana; B", "Ana; B"), ("Ana;B", "Ana;B"), ("Ana=1", "Ana=1"), ("a-b", "a-b"),
    ],
)  # fmt: skip
def test_no_part_of_a_name_is_a_formula(cell: str, safe: str) -> None:
    assert tool.guard_name(cell) == safe
    written = b"".join(tool.csv_chunks(("EMAIL", "DISPLAY_NAME", "NOTES"), [("a", cell, cell)]))
    (found,) = list(csv.reader(io.StringIO(written.decode("utf-8-sig"), newline="")))[1:]
    assert found == ["a", safe, tool.guard_cell(cell)]


def test_the_prefix_of_references_is_read_from_a_file_too(place: Workplace) -> None:
    place.csv.write_text(text(ADA[0], row("2", "ada@example.com", "usr_2")), encoding="utf-8")
    result = place.run(None, "--preview", check=0)
    assert "1 contact with other references, for example usr_2, takes no part" in result.out
    (place.folder / ".env").write_text("DEVREV_USER_REF_PREFIX=usr_\n", encoding="utf-8")
    plan = json.loads(place.run(None, "--preview", "--json", check=0).out)
    assert pairs_of(plan) == {ADA_PAIR} and plan["pairs"][0]["new_external_ref"] == "usr_2"
    assert (
        pairs_of(
            json.loads(
                place.run(None, "--preview", "--json", check=0, DEVREV_USER_REF_PREFIX="user_").out
            )
        )
        == set()
    )
    assert (
        "overlaps with REVU-"
        in place.run(None, "--preview", check=2, DEVREV_USER_REF_PREFIX="REVU").err
    )


def test_without_rights_to_write_the_preview_still_shows_the_plan(place: Workplace) -> None:
    place.csv.write_text(text(*ADA), encoding="utf-8")
    (place.folder / "logs").write_text("in the way", encoding="utf-8")
    result = place.run(None, "--preview", "--json", check=0)
    assert pairs_of(json.loads(result.out)) == {ADA_PAIR}
    assert place.files() == [place.csv, place.folder / "logs"]


def pairs_of(plan: Dict[str, Any]) -> Set[PairIds]:
    found = [
        (pair["email"], pair["primary"]["id"], pair["duplicate"]["id"]) for pair in plan["pairs"]
    ]
    assert len(found) == len(set(found))
    return set(found)


def logged(place: Workplace) -> str:
    return "".join(
        path.read_text(encoding="utf-8") for path in sorted((place.folder / "logs").iterdir())
    )


def assert_nothing_raw(*texts: str) -> None:
    for one in texts:
        assert not {
            char for char in one if char != "\n" and unicodedata.category(char) in INVISIBLE
        }


# -- files that nobody thought of ------------------------------------------------------------------------


def examples(count: int) -> settings:
    """So many in CI; fewer in the fast run (see conftest)."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count * settings.default.max_examples // 100,
        deadline=None,
        database=None,
        suppress_health_check=quiet,
    )


@pytest.fixture
def front_door(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`main(["--preview", "--json", ...])` in this process, in a folder of its own: a file in; exit code, plan, stderr out."""
    monkeypatch.chdir(place.folder)
    for name in [name for name in os.environ if name.startswith("DEVREV_")]:
        monkeypatch.delenv(name)
    umask, lost = os.umask(0o077), logging.raiseExceptions

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
    logging.raiseExceptions = lost


def close_log(place: Workplace) -> str:
    """Take the log's handlers off, and its file away; returns what was in it."""
    for handler in list(tool.log.handlers):
        tool.log.removeHandler(handler)
        handler.close()
    tool.log.propagate = True
    log = logged(place)
    for path in (place.folder / "logs").iterdir():
        path.unlink()
    return log


@examples(150)
@given(
    st.one_of(
        st.binary(max_size=400),
        st.binary(max_size=200).map(lambda tail: text(*ADA).encode() + tail),
    )
)
def test_any_bytes_are_refused_or_planned(front_door: Any, content: bytes) -> None:
    code, plan, _ = front_door(content)
    assert code in (0, 2)
    assert_pairs_stand_in(content, plan)


NAMES = ("Ada", "Okafor Chidi", "\u5c71\u7530", "O'Dell", "")
people = st.lists(
    st.builds(
        row,
        key=st.integers(1, 60).map(
            lambda number: f"don:identity:dvrv-us-1:devo/SANDBOX1:revu/{number}"
        ),
        email=st.sampled_from(
            ["ada@example.com", "eve@example.com", "o'dell@example.com", "Ada@example.com"]
        ),
        reference=st.sampled_from(["REVU-1", "REVU-2", "user_1", "user_2", "crm"]),
        name=st.sampled_from(NAMES),
        tickets=st.sampled_from(["0", "1", "12"]),
    ),
    min_size=2,
    max_size=8,
    unique_by=lambda line: line.split(",")[0],
)
PIECES = (
    '"', '""', '","', ",", "\n", '"\n', "\r", "\0", "\ufeff", " ", "-", "user_", "@", "x", "\u2028", "\x1b[0m",
    ",,,,,,,",
)  # fmt: skip


@st.composite
def mutated(draw: Any) -> bytes:
    """A right file in which some cells have got, lost or changed something, mostly at their ends."""
    lines = text(*draw(people)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, len(lines) - 1))
        cells = lines[number].split(",")
        place = draw(st.integers(0, len(cells) - 1))
        cell = cells[place]
        piece = draw(st.sampled_from(PIECES))
        at = draw(st.sampled_from([0, len(cell), len(cell) // 2]))
        change = draw(
            st.sampled_from(
                ["insert", "insert", "insert", "replace", "cut", "remove", "again", "drop"]
            )
        )
        if change == "insert":
            cells[place] = cell[:at] + piece + cell[at:]
        elif change == "replace":
            cells[place] = piece
        elif change == "cut":
            cells[place] = cell[:at]
        elif change == "remove":
            del cells[place]
        lines[number] = ",".join(cells)
        if change == "again":
            lines.insert(draw(st.integers(1, len(lines))), lines[number])
        elif change == "drop" and len(lines) > 2:
            del lines[number]
    content: bytes = draw(st.sampled_from(["\n", "\r\n"])).join(lines).encode("utf-8")
    return (
        content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content
    )


TWO_QUOTES = text(
    row("7", "ada@example.com", "REVU-7", name='"Ann'),
    row("8", "eve@example.com", "user_8", name='Bob"'),
    *EVE,
).encode()


@examples(400)
@given(mutated())
@example(TWO_QUOTES)
def test_a_damaged_export_never_gives_a_wrong_pair(front_door: Any, content: bytes) -> None:
    code, plan, _ = front_door(content)
    assert code in (0, 2)
    assert_pairs_stand_in(content, plan)


def assert_pairs_stand_in(content: bytes, plan: Optional[Dict[str, Any]]) -> None:
    """Both contacts of every pair stand in the file with its email, in rows that hold nothing else; and no row that
    is not whole has that email in it."""
    if plan is None or not plan["pairs"]:
        return
    rows = rows_of(content)
    header = [name.strip().upper() for name in rows.pop(0)]
    identity, email, reference = (
        header.index(name) for name in ("REV_USER_ID", "EMAIL", "EXTERNAL_REF")
    )
    whole = [
        cells
        for cells in rows
        if len(cells) == len(header) and not any(map(holds_rows, cells)) and "\0" not in str(cells)
    ]
    stand = {
        (ascii_lower(cells[email]), cells[identity].strip(), cells[reference].strip())
        for cells in whole
    }
    broken = {
        ascii_lower(part)
        for cells in rows
        if cells not in whole
        for cell in cells
        for part in re.split(r"[,\r\n]", cell)
    }
    for pair in plan["pairs"]:
        assert pair["primary"]["id"] != pair["duplicate"]["id"]
        for one in (pair["primary"], pair["duplicate"]):
            assert (pair["email"], one["id"], one["external_ref"]) in stand
        assert pair["email"] not in broken


def ascii_lower(cell: str) -> str:
    """An address as groups compare it, without any of the tool's own code."""
    return "".join(char.lower() if "A" <= char <= "Z" else char for char in cell.strip())


def rows_of(content: bytes) -> List[List[str]]:
    """The rows as csv has them; a NUL, which it can't read before Python 3.11, is a private character."""
    lines = content.decode("utf-8-sig").replace("\0", "\ue000").splitlines(keepends=True)
    found = csv.reader(io.StringIO("".join(lines), newline=""))
    return [[cell.replace("\ue000", "\0") for cell in cells] for cells in found if cells]


def holds_rows(cell: str) -> bool:
    """Whether a field with line breaks has as many commas as a row: a quote has swallowed another row, or parts of two."""
    return ("\n" in cell or "\r" in cell) and cell.count(",") >= len(COLUMNS) - 1
