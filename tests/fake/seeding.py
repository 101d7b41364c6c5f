"""An organisation that grows from an export: each contact has its tickets."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Sequence

from tests.fake.organisation import ID, ROLES, Organisation


class ExportRow(NamedTuple):
    """A usable row of an export."""

    partition: str
    organisation: str
    key: str
    name: str
    email: str
    reference: str
    rev_org: str
    created: str
    tickets: int
    more: dict[str, Any]


def seed(organisation_type: type[Organisation], path: str | Path, key: str = "") -> Organisation:
    """Build the organisation an export came from, or one like it that has another key.

    Of each contact, greatest(owned, created, reported) equals its TICKET_COUNT. Bad rows are left
    out and the first row of an id counts, since an export is not always clean.
    """
    rows = list(read_export(path))
    rows = [row for row in rows if row.organisation == rows[0].organisation]
    if not rows:
        raise ValueError(f"{path} holds no usable row")
    organisation = organisation_type(key or rows[0].organisation, rows[0].partition)
    groups: dict[str, list[Seedling]] = {}
    for number, row in enumerate(rows):
        details: dict[str, Any] = {
            "phone_numbers": [f"+4930{number:07}"],
            "description": f"Customer since {row.created[:4]}.",
        }
        try:
            contact = organisation.add_contact(
                row.key,
                row.email,
                row.reference,
                row.name,
                row.rev_org,
                created=row.created,
                **details,
                **row.more,
            )
        except ValueError:
            continue
        seedling = Seedling(organisation, contact, row.tickets, number)
        groups.setdefault(row.email.casefold(), []).append(seedling)
        seedling.grow()
    for group in groups.values():
        for one, other in zip(group, group[1:]):
            one.share_with(other)
    return organisation


def read_export(path: str | Path) -> Iterable[ExportRow]:
    """The rows of an export that make sense."""
    with open(str(path), newline="", encoding="utf-8-sig") as file:
        for record in csv.DictReader(line for line in file if "\0" not in line):
            row = usable(record)
            if row is not None:
                yield row


def usable(record: dict[str, str]) -> ExportRow | None:
    """The row, or None where an id, the email, the reference or the count is no good."""
    values = {
        (name or "").strip().upper(): value.strip()
        for name, value in record.items()
        if isinstance(value, str)
    }
    user = ID.fullmatch(values.get("REV_USER_ID", ""))
    org = ID.fullmatch(values.get("REV_ORG_ID", "don:identity:dvrv-us-1:devo/ANY:revo/ACME"))
    email, reference = values.get("EMAIL"), values.get("EXTERNAL_REF")
    created = values.get("CREATED_AT", values.get("CREATED_DATE"))
    try:
        tickets = int(re.sub(r"\.0+$", "", values["TICKET_COUNT"]))
    except (KeyError, ValueError):
        return None
    if user is None or org is None or created is None or tickets < 0 or not email or not reference:
        return None
    where = user.group("partition"), user.group("org"), user.group("key")
    more: dict[str, Any] = {
        "full_name": values.get("FULL_NAME", ""),
        "modified_date": api_time(values.get("UPDATED_AT", "")),
    }
    more = {name: value for name, value in more.items() if value}
    name = values.get("DISPLAY_NAME", "")
    return ExportRow(
        *where, name, email, reference, org.group("key"), api_time(created), tickets, more
    )


def api_time(text: str) -> str:
    """A warehouse's time as the API writes it; what is no time stays as it is."""
    found = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(\.\d{3})?", text, re.ASCII)
    return (
        "{}T{}{}Z".format(found.group(1), found.group(2), found.group(3) or ".000")
        if found
        else text
    )


class Seedling:
    """Gives one contact its works: `tickets` in a leading role, fewer in the others."""

    def __init__(self, organisation: Organisation, contact: str, tickets: int, number: int) -> None:
        self.organisation = organisation
        self.contact = contact
        self.tickets = tickets
        self.number = number
        self.roles = Counter()  # type: Counter[str]
        self.works: list[str] = []

    def grow(self) -> None:
        """Add the works, and for every other contact a conversation."""
        lead = ROLES[self.number % 3]
        second = ROLES[(self.number + 1) % 3]
        for n in range(self.tickets):
            self._add((lead, second) if n % 3 == 0 else (lead,), n)
        for n in range(self.tickets // 3):
            self._add((second,), n)
        if self.number % 2 == 0:
            people = [self.contact, self.organisation.dev_user["id"]]
            self.organisation.add_conversation(people, comments=self.number % 4)

    def share_with(self, other: Seedling) -> None:
        """Let the other have a role on a work of this one, where its count leaves room."""
        spare = [role for role in ROLES[:2] if other.roles[role] < other.tickets]
        if not (self.works and spare):
            return
        work = self.organisation.works[self.works[0]]
        ids = [person["id"] for person in work[spare[0]]]
        people = self.organisation.people(ids + [other.contact])
        self.organisation.change(work, **{spare[0]: people})
        other.roles[spare[0]] += 1

    def _add(self, roles: Sequence[str], n: int) -> None:
        self.roles.update(roles)
        people: dict[str, Any] = {role: [self.contact] for role in roles}
        if "created_by" in people:
            people["created_by"] = self.contact
        kind = "issue" if n % 5 == 4 else "ticket"
        self.works.append(self.organisation.add_work(kind=kind, comments=n % 4, **people))
