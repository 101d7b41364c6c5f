"""The main job through the front door: what is merged, what lies on the disk, what the report says."""

import json
import os
import re
import stat
import sys
import time
from typing import Any, Dict, List, Set

import pytest

from tests.sandbox import Fault, Organisation, Sandbox
from tests.support import (
    SAMPLE,
    Workplace,
    assert_merged,
    backups_of,
    organisation_of_pairs,
    pair,
    roles_of,
    watch_merges,
)


@pytest.fixture
def seeded() -> Organisation:
    """Twenty pairs with up to 130 tickets, and decoys that nobody may touch."""
    organisation, _ = organisation_of_pairs(18, (3, 2))
    pair(organisation, 19, (130, 7))
    pair(organisation, 20, (0, 104))
    for number in range(5):
        organisation.add_contact(f"S{number}", f"single{number}@example.com")
        organisation.add_contact(f"M{number}", "shared@example.com", f"user_m{number}")
    organisation.add_contact("A1", "ambiguous@example.com")
    organisation.add_contact("A2", "ambiguous@example.com", "user_a2")
    organisation.add_contact("A3", "ambiguous@example.com", "user_a3")
    organisation.add_contact("N1", "nouser@example.com")
    organisation.add_contact("N2", "nouser@example.com")
    organisation.add_contact("O1", "person1@example.com", "other-system-1")
    return organisation


def pairs_of(organisation: Organisation) -> List:
    dvrv = "don:identity:dvrv-us-1:devo/SANDBOX1:revu/"
    return [
        (f"{dvrv}P{n}", f"{dvrv}D{n}")
        for n in range(1, 100)
        if f"{dvrv}P{n}" in organisation.contacts
    ]


def test_everything_is_backed_up_merged_moved_and_proved_and_a_second_run_merges_nothing(
    place: Workplace, seeded: Organisation
) -> None:
    place.export(seeded)
    pairs = pairs_of(seeded)
    untouched = {
        one: dict(user)
        for one, user in seeded.contacts.items()
        if one not in {c for both in pairs for c in both}
    }
    with Sandbox(seeded) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        result = place.run(sandbox, check=0)
        assert findings == [None] * 20
        assert_merged(seeded, pairs)
        assert {one: seeded.contacts[one] for one in untouched} == untouched
        assert result.report["summary"] == {
            "contacts_read": len(seeded.contacts),
            "invalid_rows": 0,
            "pairs_planned": 20,
            "already_merged": 0,
            "total_merges_attempted": 20,
            "successful_merges": 20,
            "failed_merges": 0,
            "unfinished_merges": 0,
            "unfinished_but_merged": 0,
            "settled": 0,
            "cancelled": 0,
            "left": 0,
            "skipped_groups": 3,
        }
        assert result.report["run"]["requests"]["rev-users.merge"] == 20
        assert result.report["run"]["requests_total"] == len(sandbox.requests)
        entry = next(
            one
            for one in result.report["successful_merges"]
            if one["email"] == "person19@example.com"
        )
        assert (entry["primary"]["old_external_ref"], entry["new_external_ref"]) == (
            "REVU-P19",
            "user_19",
        )
        assert (entry["primary"]["tickets"], entry["duplicate"]["tickets"]) == (130, 7)
        assert (place.folder / entry["backup"] / "manifest.json").is_file()
        before = len(sandbox.requests)
        again = place.run(
            sandbox, python=[sys.executable], check=0
        )  # as a script, like in the README
        assert again.report["summary"]["already_merged"] == 20
        assert not [one for one in sandbox.requests[before:] if one.endpoint == "rev-users.merge"]


def test_a_group_with_several_revu_contacts_ends_as_one_contact_with_the_user_reference(
    place: Workplace,
) -> None:
    organisation = Organisation.from_csv(SAMPLE)
    place.csv.write_bytes(SAMPLE.read_bytes())
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
    group = [
        (p, d)
        for p, d in organisation.merges
        if organisation.contacts[p]["email"].startswith("jonas.")
    ]
    assert len(group) == 2 and len({p for p, _ in group}) == 1
    assert organisation.contacts[group[0][0]]["external_ref"].startswith("user_")


def test_preview_makes_no_request_needs_no_token_and_names_everything(
    place: Workplace, seeded: Organisation
) -> None:
    place.export(seeded)
    with Sandbox(seeded) as sandbox:
        result = place.run(sandbox, "--preview", check=0, DEVREV_API_TOKEN="")
        assert sandbox.requests == [] and sandbox.connections == 0
    assert {path.parent.name for path in place.files()} == {place.folder.name, "logs"}
    lines = result.out.splitlines()
    assert lines[-1] == "20 pairs to merge, 3 groups skipped"
    for number in range(1, 21):
        (line,) = (one for one in lines if one.startswith(f"person{number}@"))
        assert {f"REVU-P{number}", f"user_{number}"} <= set(line.split())
    (line,) = (one for one in lines if one.startswith("person19@"))
    assert {"130", "7"} <= set(line.split())
    for code, email in (
        ("several_user_refs", "shared@"),
        ("several_user_refs", "ambiguous@"),
        ("no_user_ref", "nouser@"),
    ):
        assert code in result.out and email in result.out


def test_a_count_that_the_backup_does_not_match_refuses_that_group_alone(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation, {pairs[0][0]: {"TICKET_COUNT": 1}, pairs[1][1]: {"TICKET_COUNT": 9}})
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=1)
        assert_merged(organisation, pairs[2:])
        assert result.codes == {
            "person1@example.com": "count_mismatch",
            "person2@example.com": "count_mismatch",
        }
        result = place.run(sandbox, "--count-policy", "at-least", check=1)
        assert sorted(organisation.merges) == sorted([pairs[0], *pairs[2:]])
        assert result.codes == {"person2@example.com": "count_mismatch"}
        assert result.report["summary"]["already_merged"] == 2


@pytest.mark.parametrize(
    "options, merged",
    [
        (["--email", " Person2@EXAMPLE.com", "--email", "person3@example.com"], {2, 3}),
        (["--limit", "1"], {1}),
    ],
)
def test_a_canary_merges_only_what_was_named(
    place: Workplace, options: List[str], merged: Set[int]
) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, *options, check=0)
        assert_merged(organisation, [pairs[number - 1] for number in merged])
        place.run(sandbox, "--limit", "10", check=0)
        assert_merged(organisation, pairs)


def test_an_email_in_no_row_is_an_error_and_another_plan_too(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    (line,) = [
        one
        for one in place.run(None, "--preview", check=0).out.splitlines()
        if one.startswith("plan ")
    ]
    plan = line.split()[1]
    with Sandbox(organisation) as sandbox:
        assert (
            "nobody@example.com" in place.run(sandbox, "--email", "nobody@example.com", check=2).err
        )
        for options in (
            ["--plan", "0123456789ab"],
            ["--preview", "--plan", "0123456789ab"],
            ["--plan", plan[:-1]],
        ):
            assert plan in place.run(sandbox, *options, check=2).err
        assert organisation.merges == [] and not list((place.folder / "reports").glob("*.json"))
        place.run(sandbox, "--plan", plan, "--limit", "1", check=0)
        result = place.run(sandbox, "--plan", plan, check=0)
        assert result.report["run"]["plan_id"] == plan
    assert_merged(organisation, pairs)


def test_a_server_that_takes_few_ids_at_a_time_is_served_in_halves(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(20)
    place.export(organisation)
    with Sandbox(organisation, max_ids=7) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        place.run(sandbox, check=0)
        assert findings == [None] * 20
        assert_merged(organisation, pairs)


def without_names(answer: Dict[str, Any]) -> Dict[str, Any]:
    for item in [*answer.get("works", ()), *answer.get("conversations", ())]:
        item.pop("created_by", None)
        item.update({role: [] for role in ("owned_by", "reported_by", "members") if role in item})
    return answer


def test_items_that_name_none_of_the_contacts_are_requested_contact_by_contact(
    place: Workplace,
) -> None:
    """An API may leave out who a work belongs to; the filter still knows."""
    organisation, pairs = organisation_of_pairs(3)
    place.export(organisation)
    expected = {one: roles_of(organisation, one) for both in pairs for one in both}
    with Sandbox(organisation) as sandbox:
        sandbox.faults.append(Fault("changed", "works.list", detail=without_names))
        sandbox.faults.append(Fault("changed", "conversations.list", detail=without_names))
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)
    for contact, roles in expected.items():
        (backup,) = backups_of(place.folder, contact)
        (entry,) = (one for one in backup.manifest["contacts"] if one["csv"]["id"] == contact)
        assert {role: set(ids) for role, ids in entry["works"].items()} == {
            r: roles[r] for r in ("owned", "created", "reported")
        }


def test_without_timelines_the_manifest_says_so(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, "--no-timelines", check=0)
        assert sandbox.count("timeline-entries.list") == 0
    assert_merged(organisation, pairs)
    (backup,) = backups_of(place.folder, pairs[0][0])
    assert backup.manifest["timelines"] is False and backup.contacts[pairs[0][0]]["timelines"] == {}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_what_a_run_leaves_is_readable_by_its_owner_alone(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    mine = {place.csv}
    with Sandbox(organisation) as sandbox:
        place.run(sandbox, check=0)
    for path in place.folder.rglob("*"):
        if path not in mine:
            assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_settings_come_from_env_files_and_the_environment_wins(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(1)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        lines = [f"{name}={value}" for name, value in sandbox.environment().items()]
        (place.folder / ".env").write_text("\n".join(lines), encoding="utf-8")
        place.run(None, check=2, DEVREV_API_TOKEN="another")
        assert organisation.merges == []
        place.run(None, check=0)
        assert_merged(organisation, pairs)


@pytest.mark.parametrize(
    "url, word",
    [
        ("http://api.example.com", "https"),
        ("https://name:secret@api.example.com", "host"),
    ],  # more of them: test_detection
)
def test_the_token_is_never_sent_where_others_could_read_it(
    place: Workplace, url: str, word: str
) -> None:
    organisation, _ = organisation_of_pairs(1)
    place.export(organisation)
    result = place.run(None, check=2, DEVREV_API_TOKEN="sandbox-token", DEVREV_BASE_URL=url)
    assert word in result.err and "secret" not in result.err


@pytest.mark.parametrize(
    "kind, endpoint, word, code",
    [
        ("401", "dev-users.self", "DEVREV_API_TOKEN", 2),
        ("403", "rev-users.merge", "rev_user:all", 2),
    ],
)
def test_a_token_that_may_not_is_told_so_changes_nothing_and_has_a_report(
    place: Workplace, kind: str, endpoint: str, word: str, code: int
) -> None:
    organisation, _ = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault(kind, endpoint)]) as sandbox:
        result = place.run(sandbox, check=code)
        assert word in result.out + result.err
        assert organisation.merges == []
        assert result.report["run"]["exit_code"] == code
        assert (
            result.report["summary"]["pairs_planned"] == 3
            and result.report["summary"]["successful_merges"] == 0
        )
        # An attempt is a merge that was requested.
        assert result.report["summary"]["total_merges_attempted"] == (endpoint == "rev-users.merge")
        sandbox.faults.clear()
        place.run(sandbox, "--merge-timeout", "1", check=0)
        assert len(organisation.merges) == 3


@pytest.mark.parametrize(
    "endpoint, scope",
    [
        ("rev-users.list", "rev_user:read"),
        ("timeline-entries.list", "ticket:read"),
        ("works.list", "ticket:read and issue:read"),
        ("conversations.list", "conversation:read"),
    ],
)
def test_what_the_token_may_not_read_fails_its_pairs_and_names_the_scope(
    place: Workplace, endpoint: str, scope: str
) -> None:
    organisation, _ = organisation_of_pairs(3)
    place.export(organisation)
    with Sandbox(organisation, faults=[Fault("403", endpoint)]) as sandbox:
        result = place.run(sandbox, check=1)
        assert set(result.codes.values()) == {"forbidden"} and organisation.merges == []
        assert all(scope in entry["error"] for entry in result.report["failed_merges"])
        assert "timeline:" not in result.out + place.logs()
        sandbox.faults.clear()
        place.run(sandbox, "--merge-timeout", "1", check=0)
        assert len(organisation.merges) == 3


def test_the_token_is_in_no_file_and_no_output(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(3)
    place.export(organisation)
    token = "dvrv-test-token-A1b2C3"
    with Sandbox(
        organisation,
        token=token,
        faults=[Fault("500", chance=0.1), Fault("reset-after", chance=0.1)],
    ) as sandbox:
        outputs = [place.run(sandbox, "-v"), place.run(sandbox)]
        sandbox.token = "another"
        outputs.append(place.run(sandbox, "--check"))
    assert all(token not in result.out + result.err for result in outputs)
    assert all(token.encode() not in path.read_bytes() for path in place.files())


def test_the_report_page_holds_the_report(place: Workplace) -> None:
    organisation, _ = organisation_of_pairs(1)
    user = next(iter(organisation.contacts.values()))
    user["display_name"] = "</script><script>alert(1)</script><!--"
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        result = place.run(sandbox, check=0)
    (page,) = (place.folder / "reports").glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert '<p class="lead">1 of 1 pair merged</p>' in text
    embedded = text.partition('<script type="application/json" id="report">')[2].partition(
        "</script>"
    )[0]
    assert "<" not in embedded and json.loads(embedded) == result.report


def test_the_log_tells_every_step_with_the_address_and_each_request_with_whom_it_is_for(
    place: Workplace,
) -> None:
    organisation, _ = organisation_of_pairs(2)
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        report = place.run(sandbox, "--limit", "1", check=0).report
    (log,) = (place.folder / "logs").iterdir()
    lines = log.read_text(encoding="utf-8").splitlines()
    assert all(
        re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (INFO|DEBUG) ", line)
        for line in lines
    )
    steps = [
        line.partition("INFO person1@example.com: ")[2]
        for line in lines
        if "INFO person1@example.com: " in line
    ]
    backup = report["successful_merges"][0]["backup"]
    assert [step.replace(backup, "BACKUP") for step in steps] == [
        "the live check of 2 contacts has passed",
        "backed up in BACKUP: 3 works, 1 conversations, 6 timeline entries",
        "the integrity check of BACKUP has passed",
        "requesting the merge of REVU-D1 into REVU-P1",
        "DevRev has acknowledged the merge",
        "confirmed, REVU-D1 no longer exists",
        "REVU-P1 has the reference user_1",
        "verified, all 2 objects belong to the primary",
    ]
    assert report["successful_merges"][0]["backed_up"] == {
        "works": 3,
        "conversations": 1,
        "timeline_entries": 6,
    }
    assert report["successful_merges"][0]["proved"] == 2
    requests = [line.split("DEBUG ")[1].split(" -> ")[0] for line in lines if " -> 200 in " in line]
    assert len(requests) >= report["run"]["requests_total"] - 5
    assert {"rev-users.list for person1@example.com", "rev-users.merge for P1, D1"} <= set(requests)
    assert {"works.list for P1, D1", "works.list for D1, P1"} & set(requests)
    assert [line for line in lines if "rev-users.update for P1, user_1 -> 200" in line]


def test_an_interrupted_run_tells_the_unfinished_from_what_was_not_started_and_a_canary_from_all(
    place: Workplace,
) -> None:
    organisation, pairs = organisation_of_pairs(4)
    place.export(organisation)
    never = [pairs[1][1], pairs[2][1]]
    fault = Fault(
        "merge-never", "rev-users.merge", match=lambda body: body.get("secondary_user") in never
    )
    with Sandbox(organisation, faults=[fault]) as sandbox:
        place.run(sandbox, "--email", "person1@example.com", check=0)
        process = place.start(sandbox, "--limit", "2", "--merge-timeout", "3")
        polled = set()
        # A poll comes after the acknowledgement is in the savepoint.
        while len(polled) < 2:
            time.sleep(0.02)
            polled = {
                one.body["id"] for one in list(sandbox.requests) if one.endpoint == "rev-users.get"
            } & set(never)
        process.terminate()
        out, err = process.communicate(timeout=30)
    words = "0 of 3 pairs finished, 2 unfinished, 1 remaining, 1 merged before"
    assert words in out
    todo = "accepted by DevRev, not yet confirmed; still to do: confirm the merge, set the ref"
    assert len(re.findall(f"UNFINISHED .*{todo}", out)) == 2
    path = max((place.folder / "reports").glob("*.json"))
    report = json.loads(path.read_text(encoding="utf-8"))
    summary = report["summary"]
    assert (summary["unfinished_merges"], summary["failed_merges"], summary["left"]) == (2, 0, 1)
    for entry in report["unfinished_merges"]:
        assert entry["so_far"] == "accepted by DevRev, not yet confirmed" and entry[
            "to_do"
        ].startswith("confirm the merge")
    assert f'<p class="lead">{words}</p>' in path.with_suffix(".html").read_text(encoding="utf-8")


def test_the_estimate_is_what_the_run_takes(place: Workplace) -> None:
    place.csv.write_bytes(SAMPLE.read_bytes())
    with Sandbox(Organisation.from_csv(SAMPLE)) as sandbox:
        expected = json.loads(place.run(sandbox, "--preview", "--json", check=0).out)["summary"][
            "estimated_requests"
        ]
        taken = place.run(sandbox, check=0).report["run"]["requests_total"]
    assert taken / 2 <= expected <= taken * 2
