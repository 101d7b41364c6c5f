"""The main job through the front door: what is merged, and what lies on the disk."""

from __future__ import annotations

import os
import re
import stat
import sys

import pytest

from tests.sandbox import Fault, Organisation, Sandbox
from tests.support import Workplace, assert_merged, organisation_of_pairs, pair, watch_merges

DEVO = "don:identity:dvrv-us-1:devo/SANDBOX1:revu/"


@pytest.fixture
def seeded() -> Organisation:
    """Twenty pairs with up to 130 tickets, and decoys that nobody may touch."""
    organisation, _ = organisation_of_pairs(18, (3, 2))
    pair(organisation, 19, (130, 7))
    pair(organisation, 20, (0, 104))
    for number in range(5):
        organisation.add_contact(f"S{number}", f"single{number}@example.com")
        organisation.add_contact(f"M{number}", "shared@example.com", f"user_m{number}")
    organisation.add_contact("N1", "nouser@example.com")
    organisation.add_contact("N2", "nouser@example.com")
    organisation.add_contact("O1", "person1@example.com", "other-system-1")
    return organisation


def test_everything_is_backed_up_merged_moved_and_proved_and_a_second_run_merges_nothing(
    place: Workplace, seeded: Organisation
) -> None:
    place.export(seeded)
    pairs = [(f"{DEVO}P{number}", f"{DEVO}D{number}") for number in range(1, 21)]
    merged = {one for both in pairs for one in both}
    untouched = {one: dict(user) for one, user in seeded.contacts.items() if one not in merged}
    with Sandbox(seeded) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        report = place.run(sandbox, check=0).report
        assert findings == [None] * 20
        assert_merged(seeded, pairs)
        assert {one: seeded.contacts[one] for one in untouched} == untouched
        assert {name: count for name, count in report["summary"].items() if count} == {
            "contacts_read": len(seeded.contacts), "pairs_planned": 20, "skipped_groups": 2,
            "successful_merges": 20, "total_merges_attempted": 20,
        }  # fmt: skip
        assert report["run"]["requests"]["rev-users.merge"] == 20
        assert report["run"]["requests_total"] == len(sandbox.requests)
        entries = {one["email"]: one for one in report["successful_merges"]}
        entry = entries["person19@example.com"]
        assert entry["primary"]["old_external_ref"] == "REVU-P19"
        assert entry["new_external_ref"] == "user_19"
        assert (entry["primary"]["tickets"], entry["duplicate"]["tickets"]) == (130, 7)
        assert (place.folder / entry["backup"] / "manifest.json").is_file()
        before = sandbox.count("rev-users.merge")
        again = place.run(sandbox, python=[sys.executable], check=0)  # as in the README
        assert again.report["summary"]["already_merged"] == 20
        assert sandbox.count("rev-users.merge") == before


def test_preview_makes_no_request_needs_no_token_and_writes_only_a_log(
    place: Workplace, seeded: Organisation
) -> None:
    place.export(seeded)
    with Sandbox(seeded) as sandbox:
        result = place.run(sandbox, "--preview", check=0, DEVREV_API_TOKEN="")
        assert sandbox.requests == [] and sandbox.connections == 0
    assert {path.parent.name for path in place.files()} == {place.folder.name, "logs"}
    assert result.out.splitlines()[-1] == "20 pairs to merge, 2 groups skipped"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_what_a_run_leaves_is_readable_by_its_owner_alone(place: Workplace) -> None:
    with place.serving(2) as (sandbox, _):
        place.run(sandbox, check=0)
    for path in set(place.folder.rglob("*")) - {place.csv}:
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_the_token_is_in_no_file_and_no_output(place: Workplace) -> None:
    token = "dvrv-test-token-A1b2C3"
    faults = [Fault("500", chance=0.1), Fault("reset-after", chance=0.1)]
    with place.serving(3, token=token, faults=faults) as (sandbox, _):
        outputs = [place.run(sandbox, "-v"), place.run(sandbox)]
        sandbox.token = "another"
        outputs.append(place.run(sandbox, "--check"))
    assert all(token not in result.out + result.err for result in outputs)
    assert all(token.encode() not in path.read_bytes() for path in place.files())


def test_the_log_tells_each_step_and_request_with_whom_it_is_for(place: Workplace) -> None:
    with place.serving(2) as (sandbox, _):
        report = place.run(sandbox, "--limit", "1", check=0).report
    (path,) = (place.folder / "logs").iterdir()
    lines = path.read_text(encoding="utf-8").splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (INFO|DEBUG) "
    assert all(re.match(stamp, line) for line in lines)
    assert sum("INFO person1@example.com: " in line for line in lines) == 8
    assert any("DEBUG rev-users.merge {'primary_user': " in line for line in lines)
    assert report["run"]["log"].endswith(path.name)
