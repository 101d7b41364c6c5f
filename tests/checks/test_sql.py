"""The README's query, run over a small warehouse: it exports and counts what the tool does."""

import csv
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.sandbox import Organisation, Sandbox
from tests.support import COLUMNS, ROOT, Workplace, roles_of

duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")

PLACEHOLDER, DOMAIN = "your-domain.example", "example.com"
USERS = "ANALYTICS.DBT_BASE_DEVREV.DEVREV_REV_USERS"
WORKS = "ANALYTICS.DBT_BASE_DEVREV.DEVREV_WORKS"
SELECTED = [column for column in COLUMNS if column != "TICKET_COUNT"]
Table = List[Dict[str, Any]]


@pytest.fixture(scope="module")
def query() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^ *```sql\n(.*?)^ *```$", readme, re.DOTALL | re.MULTILINE)
    assert found, "README.md has no ```sql block"
    sql = found.group(1)
    assert sql.count(PLACEHOLDER) == 1, f"exactly one thing to replace: {PLACEHOLDER}"
    return sql.replace(PLACEHOLDER, DOMAIN)


@pytest.fixture
def organisation() -> Organisation:
    """Pairs whose counts come from each of the three roles, and contacts to be left out."""
    made = Organisation()
    dev = made.dev_user["id"]

    def two(number: int, domain: str = DOMAIN) -> Tuple[str, str]:
        email = f"p{number}@{domain}"
        system = made.add_contact(f"R{number}", email)
        return system, made.add_contact(f"U{number}", email.title(), f"user_{number}")

    one, other = two(1)  # owned 3, created 1, reported 2; owned together with others
    made.add_work(owned_by=[one, dev, other], created_by=one)
    for _ in range(2):
        made.add_work(owned_by=[one, dev, other], reported_by=[one, other])
    one, other = two(2)  # created 4, the rest by others
    for _ in range(4):
        made.add_work(owned_by=[dev], created_by=one, reported_by=[other])
    one, other = two(3)  # three roles on the same work count once; issues count too
    made.add_work(owned_by=[one], created_by=one, reported_by=[one], kind="issue")
    made.add_work(owned_by=[one, other], created_by=other, reported_by=[one, other])
    two(4)  # no work at all
    one, other = two(5)  # many reporters and owners: a row for each combination
    made.add_work(owned_by=[one, other, dev], reported_by=[one, other, dev], created_by=other)
    made.add_work(owned_by=[dev], reported_by=[one, other])
    one, other = two(6, "elsewhere.org")
    made.add_work(owned_by=[one], reported_by=[other])
    for number, reference in enumerate(("userX1", "revu-4", "REVUX4")):
        made.add_contact(f"X{number}", "p4@example.com", reference)
    made.add_contact("X4", f"p4@{DOMAIN}.elsewhere.org", "user_x4")
    made.add_contact("X5", None, "user_x5")
    return made


def users_table(organisation: Organisation) -> Table:
    fields = ("id", "display_id", "display_name", "email", "external_ref", "full_name", "state")
    rows = []
    for one in organisation.contacts.values():
        row = {name.upper(): one.get(name) for name in fields}
        row["REV_USER_ID"] = row.pop("ID")
        row["REV_ORG_ID"] = one["rev_org"]["id"]
        row["CREATED_AT"] = one["created_date"].rstrip("Z")
        row["UPDATED_AT"] = one["modified_date"].rstrip("Z")
        rows.append(row)
    return rows


def works_table(organisation: Organisation) -> Table:
    """A row for each combination of owner and reporter, and works that are none of the tool's."""
    rows = []
    for work in organisation.works.values():
        for owner in work["owned_by"] or [{}]:
            for reporter in work["reported_by"] or [{}]:
                row = {"WORK_ID": work["id"], "TYPE": work["type"]}
                row["CREATED_BY_ID"] = work["created_by"]["id"]
                rows.append({**row, "OWNED_BY_ID": owner.get("id")})
                rows[-1]["REPORTED_BY_ID"] = reporter.get("id")
    tickets = [row for row in rows if row["TYPE"] == "ticket"]
    for kind in ("task", "opportunity", "Ticket "):
        rows += [{**row, "WORK_ID": f"{row['WORK_ID']}-{kind}", "TYPE": kind} for row in tickets]
    return rows


@pytest.fixture
def warehouse(organisation: Organisation) -> Iterator[Any]:
    connection = duckdb.connect()
    connection.execute("ATTACH ':memory:' AS ANALYTICS")
    connection.execute("CREATE SCHEMA ANALYTICS.DBT_BASE_DEVREV")
    for name, rows in ((USERS, users_table(organisation)), (WORKS, works_table(organisation))):
        kinds = ["TIMESTAMP" if column.endswith("_AT") else "VARCHAR" for column in rows[0]]
        columns = ", ".join(map(" ".join, zip(rows[0], kinds)))
        connection.execute(f"CREATE TABLE {name} ({columns})")
        marks = ", ".join("?" * len(rows[0]))
        values = [list(row.values()) for row in rows]
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", values)
    yield connection
    connection.close()


def export(warehouse: Any, query: str, path: Path) -> Table:
    """Run the query and save what it gives, as one does from a worksheet; returns the rows."""
    result = warehouse.execute(query)
    columns = [column[0] for column in result.description]
    rows = result.fetchall()
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return [dict(zip(columns, row)) for row in rows]


def test_the_query_exports_the_contacts_of_one_domain_with_either_reference(
    query: str, warehouse: Any, organisation: Organisation, place: Workplace
) -> None:
    rows = export(warehouse, query, place.csv)
    assert sorted(rows[0]) == sorted(COLUMNS)
    assert re.findall(r"^ {4}r\.(\w+),$", query, re.MULTILINE) == SELECTED
    assert "COALESCE(t.total_tickets, 0) AS TICKET_COUNT\n" in query
    wanted = []
    for one in organisation.contacts.values():
        is_of_domain = (one.get("email") or "").lower().endswith("@" + DOMAIN)
        if is_of_domain and one["external_ref"].startswith(("REVU-", "user_")):
            wanted.append(one["id"])
    assert len(wanted) == 10 and sorted(row["REV_USER_ID"] for row in rows) == sorted(wanted)
    assert [row["EMAIL"] for row in rows] == sorted(row["EMAIL"] for row in rows)


def test_the_query_counts_what_the_tool_counts(
    query: str, warehouse: Any, organisation: Organisation, place: Workplace
) -> None:
    rows = export(warehouse, query, place.csv)
    counts = {row["REV_USER_ID"]: row["TICKET_COUNT"] for row in rows}
    for one, count in counts.items():
        roles = roles_of(organisation, one)
        assert count == max(len(roles[role]) for role in ("owned", "created", "reported")), one
    assert sorted(counts.values()) == [0, 0, 1, 2, 2, 2, 3, 3, 4, 4]
    with Sandbox(organisation, merge_delay=0.05) as sandbox:  # by default counts have to be equal
        result = place.run(sandbox, check=0)
    assert result.report["summary"]["successful_merges"] == 5 and result.report["skipped"] == []


def test_the_query_gives_nothing_for_tables_without_works_or_contacts(
    query: str, warehouse: Any, place: Workplace
) -> None:
    warehouse.execute(f"DELETE FROM {WORKS}")
    assert {row["TICKET_COUNT"] for row in export(warehouse, query, place.csv)} == {0}
    assert len(json.loads(place.run(None, "--preview", "--json", check=0).out)["pairs"]) == 5
    warehouse.execute(f"DELETE FROM {USERS}")
    assert export(warehouse, query, place.csv) == []
    assert place.run(None, "--preview", check=0).out.splitlines()[-1] == "0 pairs to merge"


def test_deleted_contacts_are_left_out_and_a_table_may_have_no_state(
    query: str, warehouse: Any, place: Workplace
) -> None:
    warehouse.execute(f"UPDATE {USERS} SET STATE = 'deleted' WHERE EXTERNAL_REF = 'user_3'")
    warehouse.execute(f"UPDATE {USERS} SET STATE = NULL WHERE EXTERNAL_REF = 'user_4'")
    references = {row["EXTERNAL_REF"] for row in export(warehouse, query, place.csv)}
    assert "user_3" not in references and {"user_4", "REVU-R3"} <= references
    hint = "delete this line if the table has no STATE column"
    (marked,) = (line for line in query.splitlines() if hint in line)
    warehouse.execute(f"ALTER TABLE {USERS} DROP COLUMN STATE")
    assert len(export(warehouse, query.replace(marked + "\n", ""), place.csv)) == 10
