"""An organisation that grows from an export, and the export of an organisation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tests.fake.organisation import ID, ROLES, Organisation

COLUMNS = (
    "REV_USER_ID", "DISPLAY_NAME", "EMAIL", "EXTERNAL_REF", "FULL_NAME", "TICKET_COUNT",
    "CREATED_AT", "UPDATED_AT",
)  # fmt: skip


def write_export(organisation: Organisation, path: Path) -> None:
    """Write the CSV that the warehouse would hold of an organisation."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(export_row(organisation, one) for one in organisation.contacts)


def export_row(organisation: Organisation, contact: str) -> dict[str, Any]:
    user = organisation.contacts[contact]
    return {
        "REV_USER_ID": contact,
        "DISPLAY_NAME": user.get("display_name", ""),
        "EMAIL": user["email"],
        "EXTERNAL_REF": user["external_ref"],
        "FULL_NAME": user.get("full_name", ""),
        "TICKET_COUNT": max(len(organisation.works.find([(role, [contact])])) for role in ROLES),
        "CREATED_AT": user["created_date"],
        "UPDATED_AT": user["modified_date"],
    }


def organisation_of(path: Path, key: str = "") -> Organisation:
    """Build the organisation an export came from, or one like it that has another key.

    Of each contact, greatest(owned, created, reported) equals its TICKET_COUNT. Rows without one
    are left out, and the first row of an id counts.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    where = ID.fullmatch(rows[0]["REV_USER_ID"])
    assert where is not None
    organisation = Organisation(key or where["org"], where["partition"])
    for number, row in enumerate(rows):
        more = {"full_name": row["FULL_NAME"]} if row["FULL_NAME"] else {}
        try:
            tickets = int(row["TICKET_COUNT"])
            contact = organisation.add_contact(
                row["REV_USER_ID"].rpartition("/")[2],
                row["EMAIL"],
                row["EXTERNAL_REF"],
                row["DISPLAY_NAME"],
                created=row["CREATED_AT"],
                modified_date=row["UPDATED_AT"],
                phone_numbers=[f"+4930{number:07}"],
                description=f"Customer since {row['CREATED_AT'][:4]}.",
                **more,
            )
        except ValueError:
            continue
        add_works(organisation, contact, tickets, number)
    return organisation


def add_works(organisation: Organisation, contact: str, tickets: int, number: int) -> None:
    """Give a contact so many works in one role, fewer in another, and perhaps a conversation."""
    lead, second = ROLES[number % 3], ROLES[(number + 1) % 3]
    for n in range(tickets + tickets // 3):
        roles = {lead} if n < tickets else {second}
        if n % 3 == 0:
            roles.add(second)
        people: dict[str, Any] = {role: [contact] for role in roles}
        if "created_by" in people:
            people["created_by"] = contact
        organisation.add_work(kind="issue" if n % 5 == 4 else "ticket", comments=n % 4, **people)
    if number % 2 == 0:
        organisation.add_conversation([contact, organisation.dev_user["id"]], comments=number % 4)
