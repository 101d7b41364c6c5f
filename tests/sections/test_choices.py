"""Choices through the front door: a chosen group becomes the one contact that was chosen, all others stay as they are."""

import json
import re
from typing import Any, Dict, List, Set, Tuple

import pytest

from tests.sandbox import Fault, Organisation, Sandbox
from tests.support import Workplace, assert_backed_up, diagonal, roles_of, watch_merges

DESK, TWINS, UNDECIDED = "front.desk@example.com", "twins@example.com", "undecided@example.com"


@pytest.fixture
def organisation() -> Organisation:
    """A group with three `user_` and a `REVU-`, one with two `REVU-`, both of these without a choice, and a pair."""
    made = Organisation()
    groups: Dict[str, List[Tuple[str, str]]] = {
        DESK: [("K1", "REVU-K1"), ("K2", "user_k2"), ("K3", "user_k3"), ("K4", "user_k4")],
        TWINS: [("T1", "REVU-T1"), ("T2", "REVU-T2")],
        UNDECIDED: [("U1", "REVU-U1"), ("U2", "user_u2"), ("U3", "user_u3")],
        "nobody@example.com": [("N1", "REVU-N1"), ("N2", "REVU-N2")],
        "pair@example.com": [("P1", "REVU-P1"), ("P2", "user_p2")],
    }
    for email, contacts in groups.items():
        for number, (key, reference) in enumerate(contacts):
            one = made.add_contact(key, email, reference, display_name=email.split("@")[0])
            for _ in range(3 - number % 3):
                made.add_work(owned_by=[one], created_by=one, reported_by=[one], comments=1)
            made.add_conversation(members=[one], comments=1)
    return made


def choose(place: Workplace, *lines: str, header: str = "EMAIL,EXTERNAL_REF") -> str:
    (place.folder / "choices.csv").write_text("\n".join([header, *lines, ""]), encoding="utf-8")
    return "choices.csv"


def keys(organisation: Organisation) -> Set[Tuple[str, str]]:
    """The merges as (primary, duplicate), by the keys of their ids."""
    return {
        (one.rpartition("/")[2], other.rpartition("/")[2]) for one, other in organisation.merges
    }


def test_a_chosen_group_is_merged_as_chosen_and_groups_without_a_choice_stay(
    place: Workplace, organisation: Organisation
) -> None:
    def don(key: str) -> str:
        return organisation.don("identity", "revu", key)

    works = {
        key: set().union(*roles_of(organisation, don(key)).values())
        for key in ("K1", "K2", "K3", "K4", "T1", "T2")
    }
    others = {
        one: dict(user)
        for one, user in organisation.contacts.items()
        if user["display_id"][5] in "UN"
    }
    place.export(organisation)
    choices = choose(place, f"{DESK.upper()} , user_k3", f"{TWINS},REVU-T2")
    with Sandbox(organisation, merge_delay=0.05) as sandbox:
        findings = watch_merges(sandbox, place.folder)
        report = place.run(sandbox, "--choices", choices, "--yes", check=0).report
        assert keys(organisation) == {
            ("K1", "K3"),
            ("K1", "K2"),
            ("K1", "K4"),
            ("T2", "T1"),
            ("P1", "P2"),
        }
        assert findings == [None] * 5 and len(organisation.merges) == 5
        place.run(sandbox, "--choices", choices, "--yes", check=0)
    assert len(organisation.merges) == 5
    references = {
        key: organisation.contacts[don(key)]["external_ref"] for key in ("K1", "T2", "P1")
    }
    assert references == {"K1": "user_k3", "T2": "REVU-T2", "P1": "user_p2"}
    assert set().union(*roles_of(organisation, don("K1")).values()) == set().union(
        *(works[f"K{n}"] for n in range(1, 5))
    )
    assert set().union(*roles_of(organisation, don("T2")).values()) == works["T1"] | works["T2"]
    assert {one: organisation.contacts[one] for one in others} == others
    assert {skip["email"] for skip in report["skipped"]} == {UNDECIDED, "nobody@example.com"}
    assert report["summary"]["successful_merges"] == 5
    plan = json.loads(
        place.run(None, "--preview", "--json", check=0).out
    )  # what was chosen before stays merged
    assert {skip["email"] for skip in plan["skipped"]} == {
        UNDECIDED,
        "nobody@example.com",
    } and plan["pairs"] == []


def test_where_no_contact_has_a_revu_reference_the_chosen_contact_itself_remains(
    place: Workplace,
) -> None:
    organisation = Organisation()
    for number in range(1, 4):
        one = organisation.add_contact(f"A{number}", DESK, f"user_a{number}", display_name="Desk")
        organisation.add_work(reported_by=[one])
    place.export(organisation)
    with Sandbox(organisation, merge_delay=0.05) as sandbox:
        place.run(sandbox, "--choices", choose(place, f"{DESK},user_a2"), "--yes", check=0)
        assert_backed_up(place.folder, organisation, [organisation.don("identity", "revu", "A2")])
    assert keys(organisation) == {("A2", "A1"), ("A2", "A3")}
    assert (
        organisation.contacts[organisation.don("identity", "revu", "A2")]["external_ref"]
        == "user_a2"
    )


def test_a_choice_is_bound_to_its_group(place: Workplace, organisation: Organisation) -> None:
    place.export(organisation)
    choices = choose(place, f"{DESK},user_k3", f"{TWINS},REVU-T2")
    organisation.add_contact("K5", DESK, "user_k5")
    with Sandbox(organisation, merge_delay=0.05) as sandbox:
        result = place.run(sandbox, "--choices", choices, "--yes", check=1)
    assert keys(organisation) == {("T2", "T1"), ("P1", "P2")}
    codes = {
        entry["duplicate"]["old_external_ref"]: entry["code"]
        for entry in result.report["failed_merges"]
    }
    assert (
        set(codes) == {"user_k2", "user_k3", "user_k4"} and codes["user_k3"] == "several_user_refs"
    )


def test_a_template_has_a_line_for_each_contact_that_could_be_kept(
    place: Workplace, organisation: Organisation
) -> None:
    for number in range(5):
        organisation.add_contact(f"S{number}", "shared@example.com", f"user_s{number}")
    organisation.add_contact("F1", "=formula@example.com", "user_f1", display_name="=1+1")
    organisation.add_contact("F2", "=formula@example.com", "user_f2", display_name="-")
    place.export(organisation)
    result = place.run(None, "--choices-template", "new.csv", check=0)
    assert (
        result.out.startswith("6 lines of 3 groups written to new.csv")
        and "3 groups that may be a shared mailbox" in result.out
    )
    assert re.search(
        r"^next: keep one line per address in new\.csv, then\n .*--choices new\.csv --preview$",
        result.err,
        re.M,
    )
    content = (place.folder / "new.csv").read_bytes()
    lines = content.decode("utf-8-sig").splitlines()
    assert content.startswith(b"\xef\xbb\xbf") and lines[0].startswith("EMAIL,EXTERNAL_REF,")
    kept = [line.split(",")[:2] for line in lines[1:]]
    assert sorted(kept) == sorted(
        [
            ["'=formula@example.com", "user_f1"], ["'=formula@example.com", "user_f2"],
            ["undecided@example.com", "user_u2"], ["undecided@example.com", "user_u3"],
            ["twins@example.com", "REVU-T1"], ["twins@example.com", "REVU-T2"],
        ]
    )  # fmt: skip
    uncut = place.run(None, "--choices", "new.csv", "--preview", check=2).err
    assert "a second choice for" in uncut and "cut the file down to one line a group" in uncut
    assert "already exists" in place.run(None, "--choices-template", "new.csv", check=2).err
    assert (place.folder / "new.csv").read_bytes() == content
    (place.folder / "new.csv").write_text("\n".join([lines[0], *lines[1::2]]), encoding="utf-8-sig")
    plan = json.loads(place.run(None, "--choices", "new.csv", "--preview", "--json", check=0).out)
    assert {skip["code"] for skip in plan["skipped"]} == {"shared_mailbox"} and len(
        plan["pairs"]
    ) == 1 + 1 + 2 + 1
    assert [path.name for path in place.files() if path.suffix == ".csv"] == [
        "contacts.csv",
        "new.csv",
    ]


def shared(size: int, email: str = "noreply@example.com") -> Organisation:
    made = Organisation()
    for number in range(size):
        made.add_contact(
            f"S{number}",
            email,
            "user_s0" if number == 0 else None,
            display_name=f"Person {'ABCDE'[number % 5]}{number}",
        )
    made.add_contact("P1", "pair@example.com")
    made.add_contact("P2", "pair@example.com", "user_p2")
    return made


@pytest.mark.parametrize(
    ("size", "email", "in_csv"),
    [
        (41, "noreply@example.com", 41),
        (6, "ada@example.com", 2),
        (2, "noreply@example.com", 2),
        (3, "info@example.com", 2),
    ],
)
def test_a_shared_mailbox_is_left_alone_by_what_the_csv_or_devrev_has(
    place: Workplace, size: int, email: str, in_csv: int
) -> None:
    made = shared(size, email)
    place.export(
        made,
        leave_out=[made.don("identity", "revu", f"S{number}") for number in range(in_csv, size)],
    )
    by_csv = in_csv == size
    with Sandbox(made, merge_delay=0.05) as sandbox:
        report = place.run(sandbox, "--yes", check=0 if by_csv else 1).report
    assert keys(made) == {("P1", "P2")}
    if by_csv:
        assert [(skip["email"], skip["code"]) for skip in report["skipped"]] == [
            (email, "shared_mailbox")
        ]
    else:
        assert {entry["email"]: entry["code"] for entry in report["failed_merges"]} == {
            email: "shared_mailbox"
        }


def test_a_shared_mailbox_that_is_chosen_is_merged_and_named(place: Workplace) -> None:
    made = shared(5)
    place.export(made)
    choices = choose(place, "noreply@example.com,user_s0")
    with Sandbox(made, merge_delay=0.05) as sandbox:
        report = place.run(sandbox, "--choices", choices, "--yes", check=0).report
        (entry,) = report["choices"]
        assert "joins 5 contacts" in entry["warnings"][0] and "names_differ" in {
            one["code"] for one in report["warnings"]
        }
    assert len(made.merges) == 5


def test_with_the_user_as_primary_nothing_is_updated(place: Workplace) -> None:
    made = shared(3, "ada@example.com")
    place.export(made)
    with Sandbox(made, merge_delay=0.05) as sandbox:
        report = place.run(sandbox, "--primary", "user", "--yes", check=0).report
        assert sandbox.count("rev-users.update") == 0
    assert keys(made) == {("S0", "S1"), ("S0", "S2"), ("P2", "P1")}
    assert {entry["new_external_ref"] for entry in report["successful_merges"]} == {None}
    assert made.contacts[made.don("identity", "revu", "S0")]["external_ref"] == "user_s0"


def test_a_third_contact_that_no_longer_exists_or_is_of_another_workspace_keeps_a_pair_from_nothing(
    place: Workplace,
) -> None:
    made = Organisation()
    for number, fields in enumerate(
        ({"state": "deleted"}, {"rev_org": "NORTH"}, {"description": "without a workspace"})
    ):
        made.add_contact(f"P{number}", f"p{number}@example.com")
        made.add_contact(f"U{number}", f"p{number}@example.com", f"user_{number}")
        made.add_contact(f"T{number}", f"p{number}@example.com", **fields)
    place.export(made)

    def without_workspace(content: Any) -> Any:
        return {
            **content,
            "rev_users": [
                {
                    name: value
                    for name, value in user.items()
                    if name != "rev_org" or "description" not in user
                }
                for user in content["rev_users"]
            ],
        }

    faults = [Fault("changed", "rev-users.list", detail=without_workspace)]
    with Sandbox(made, merge_delay=0.05, faults=faults) as sandbox:
        report = place.run(sandbox, "--yes", check=0).report
    assert keys(made) == {("P0", "U0"), ("P1", "U1"), ("P2", "U2"), ("P2", "T2")}
    assert {skip["email"]: skip["code"] for skip in report["skipped"]} == {
        "p0@example.com": "already_gone", "p1@example.com": "different_rev_org",
    }  # fmt: skip


def test_a_pair_that_another_folder_has_merged_is_no_failure(place: Workplace) -> None:
    made = shared(3, "ada@example.com")
    place.export(made)
    csv = place.csv.read_bytes()
    with Sandbox(made, merge_delay=0.05) as sandbox:
        other = Workplace(place.folder / "other")
        other.folder.mkdir()
        other.csv.write_bytes(csv)
        other.run(sandbox, "--yes", check=0)
        report = place.run(sandbox, "--yes", check=0).report
    assert {skip["code"] for skip in report["skipped"]} == {"already_merged", "already_gone"}
    assert len(made.merges) == 3 and report["failed_merges"] == []


CANNOT = [
    (
        [f"{DESK},user_k9"],
        "EMAIL,EXTERNAL_REF",
        "user_k9 for front.desk@example.com: no contact of this email has it",
    ),
    (["stranger@example.com,user_k3"], "EMAIL,EXTERNAL_REF", "user_k3 for stranger@example.com"),
    ([f"{DESK},REVU-K1"], "EMAIL,EXTERNAL_REF", "has to stay"),
    (
        [f"{DESK},user_k3", f"{DESK},user_k4"],
        "EMAIL,EXTERNAL_REF",
        "a second choice for front.desk@example.com",
    ),
    ([f"{DESK},user_k3"], "EMAIL,REFERENCE", "missing column EXTERNAL_REF"),
    ([f"{DESK},"], "EMAIL,EXTERNAL_REF", "line 2: empty EXTERNAL_REF"),
]


@pytest.mark.parametrize("cannot, mode", diagonal(CANNOT, ("--preview", "--yes")))
def test_a_choice_that_can_not_be_followed_changes_nothing(
    place: Workplace, organisation: Organisation, cannot: Tuple[List[str], str, str], mode: str
) -> None:
    lines, header, says = cannot
    place.export(organisation)
    with Sandbox(organisation) as sandbox:
        result = place.run(
            sandbox, "--choices", choose(place, *lines, header=header), mode, check=2
        )
        assert sandbox.requests == []
    assert says in result.err


def test_a_corrected_choice_is_not_overruled_by_what_was_requested_before(
    place: Workplace, organisation: Organisation
) -> None:
    place.export(organisation)
    only = ("--yes", "--email", UNDECIDED, "--merge-timeout", "1")
    with Sandbox(organisation, faults=[Fault("400", "rev-users.merge")]) as sandbox:
        place.run(sandbox, "--choices", choose(place, f"{UNDECIDED},user_u2"), *only, check=1)
        sandbox.faults.clear()
        right = choose(place, f"{UNDECIDED},user_u3")
        result = place.run(sandbox, "--choices", right, *only, check=1)
        assert (
            result.codes[UNDECIDED] in ("plan_changed", "group_incomplete")
            and not organisation.merges
        )
        assert "plan_changed" in result.out
        place.run(None, "--settle", UNDECIDED, check=0)
        place.run(sandbox, "--choices", right, *only, check=0)
    assert (
        organisation.contacts[organisation.don("identity", "revu", "U1")]["external_ref"]
        == "user_u3"
    )


def test_confirmation_report_and_preview_name_the_references_that_a_choice_loses(
    place: Workplace, organisation: Organisation
) -> None:
    place.export(organisation)
    choices = choose(place, f"{DESK},user_k3")
    seen = json.loads(place.run(None, "--choices", choices, "--preview", "--json", check=0).out)[
        "choices"
    ]
    with Sandbox(organisation) as sandbox:
        report = place.run(sandbox, "--choices", choices, "--yes", check=0).report
    assert seen == report["choices"] and report["run"]["options"]["choices"] == choices
    (entry,) = seen
    assert (entry["email"], entry["kept"]) == (DESK, "user_k3")
    lost = {one["external_ref"]: (one["tickets"], one["created"][:10]) for one in entry["lost"]}
    assert lost == {"user_k2": (2, "2024-01-01"), "user_k4": (3, "2024-01-01")}
    assert "joins 4 contacts" in entry["warnings"][0]


def test_a_chosen_group_that_has_grown_by_any_contact_is_refused(
    place: Workplace, organisation: Organisation
) -> None:
    place.export(organisation)
    organisation.add_contact("T3", TWINS)
    with Sandbox(organisation) as sandbox:
        result = place.run(
            sandbox,
            "--choices",
            choose(place, f"{TWINS},REVU-T2"),
            "--email",
            TWINS,
            "--yes",
            check=1,
        )
    assert result.codes == {TWINS: "group_changed"} and not organisation.merges
