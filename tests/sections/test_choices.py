"""Choices in scripted scenes: a chosen group becomes the contact that was chosen, others stay."""

import json
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import pytest

from tests.simulation.scene import Scene

DESK, TWINS, UNDECIDED = "front.desk@example.com", "twins@example.com", "undecided@example.com"
GROUPS: Dict[str, List[Tuple[str, str]]] = {
    DESK: [("K1", "REVU-K1"), ("K2", "user_k2"), ("K3", "user_k3"), ("K4", "user_k4")],
    TWINS: [("T1", "REVU-T1"), ("T2", "REVU-T2")],
    UNDECIDED: [("U1", "REVU-U1"), ("U2", "user_u2"), ("U3", "user_u3")],
    "nobody@example.com": [("N1", "REVU-N1"), ("N2", "REVU-N2")],
    "pair@example.com": [("P1", "REVU-P1"), ("P2", "user_p2")],
}


def build(scene: Scene, groups: Dict[str, List[Tuple[str, str]]] = GROUPS) -> None:
    """Add groups: each contact has one to three tickets."""
    for email, contacts in groups.items():
        for number, (key, reference) in enumerate(contacts):
            one = scene.organisation.add_contact(key, email, reference)
            for _ in range(3 - number % 3):
                scene.organisation.add_work(reported_by=[one])


def choose(*lines: str) -> Tuple[str, str]:
    Path("choices.csv").write_text("\n".join(["EMAIL,EXTERNAL_REF", *lines, ""]), encoding="utf-8")
    return "--choices", "choices.csv"


def don(scene: Scene, key: str) -> str:
    return scene.organisation.don("identity", "revu", key)


def merges(scene: Scene) -> Set[Tuple[str, str]]:
    """The merges as (primary, duplicate), by the keys of their ids."""
    pairs = scene.organisation.merges
    return {(one.rpartition("/")[2], other.rpartition("/")[2]) for one, other in pairs}


def reference(scene: Scene, key: str) -> Any:
    return scene.organisation.contacts[don(scene, key)]["external_ref"]


def test_a_chosen_group_is_merged_as_chosen_and_groups_without_a_choice_stay(scene: Scene) -> None:
    build(scene)
    choices = choose(f"{DESK},user_k3", f"{TWINS},REVU-T2")
    run = scene.merge(*choices)
    wanted = {("K1", "K3"), ("K1", "K2"), ("K1", "K4"), ("T2", "T1"), ("P1", "P2")}
    assert run.code == 0 and merges(scene) == wanted
    kept = [reference(scene, key) for key in ("K1", "T2", "P1")]
    assert kept == ["user_k3", "REVU-T2", "user_p2"]
    assert {skip["email"] for skip in run.report["skipped"]} == {UNDECIDED, "nobody@example.com"}
    (desk,) = (one for one in run.report["warnings"] if one["code"] == "shared_mailbox")
    assert desk["email"] == DESK and "joins 4 contacts" in desk["warning"]
    assert scene.merge().code == 0 and merges(scene) == wanted


def test_a_corrected_choice_is_not_overruled_by_what_was_requested_before(scene: Scene) -> None:
    build(scene)
    only = ("--email", UNDECIDED, "--merge-timeout", "1")
    refusal = scene.fault("400", "rev-users.merge")
    assert scene.merge(*choose(f"{UNDECIDED},user_u2"), *only).code == 1
    refusal.times = 0
    scene.world.faults.clear()
    run = scene.merge(*choose(f"{UNDECIDED},user_u3"), *only)
    assert run.code == 1 and run.codes[UNDECIDED] in ("plan_changed", "group_incomplete")
    assert not scene.organisation.merges
    assert scene.settle(UNDECIDED).code == 0
    assert scene.merge(*choose(f"{UNDECIDED},user_u3"), *only).code == 0
    assert reference(scene, "U1") == "user_u3"


def test_a_template_has_a_line_for_each_contact_that_could_be_kept(scene: Scene) -> None:
    shared = [(f"S{number}", f"user_s{number}") for number in range(5)]
    odd = {"=formula@x": [("F1", "user_f1"), ("F2", "user_f2")], "shared@example.com": shared}
    build(scene, {**GROUPS, **odd})
    scene.export()
    made = scene.run("--csv", "contacts.csv", "--choices-template", "new.csv")
    assert made.code == 0 and "6 lines written to new.csv" in made.out
    content = Path("new.csv").read_bytes()
    lines = content.decode("utf-8-sig").splitlines()
    assert content.startswith(b"\xef\xbb\xbf") and lines[0].startswith("EMAIL,EXTERNAL_REF,")
    assert sorted(",".join(line.split(",")[:2]) for line in lines[1:]) == [
        "'=formula@x,user_f1", "'=formula@x,user_f2", f"{TWINS},REVU-T1", f"{TWINS},REVU-T2",
        f"{UNDECIDED},user_u2", f"{UNDECIDED},user_u3",
    ]  # fmt: skip
    uncut = scene.merge("--choices", "new.csv")
    assert uncut.code == 2 and "keep one line per address" in uncut.refusal
    again = scene.run("--csv", "contacts.csv", "--choices-template", "new.csv")
    assert again.code == 2 and Path("new.csv").read_bytes() == content
    Path("new.csv").write_text("\n".join([lines[0], *lines[1::2]]), encoding="utf-8-sig")
    seen = scene.run("--csv", "contacts.csv", "--choices", "new.csv", "--preview", "--json")
    plan = json.loads(seen.out)
    assert len(plan["pairs"]) == 1 + 1 + 2 + 1
    assert {skip["code"] for skip in plan["skipped"]} == {"shared_mailbox"}


@pytest.mark.parametrize(
    ("size", "email", "in_csv"),
    [(41, "noreply@x", 41), (6, "ada@x", 2), (2, "noreply@x", 2), (3, "info@x", 2)],
)
def test_a_shared_mailbox_is_left_alone_by_what_the_csv_or_devrev_has(
    scene: Scene, size: int, email: str, in_csv: int
) -> None:
    keys = [(f"S{number}", f"REVU-S{number}" if number else "user_s0") for number in range(size)]
    build(scene, {email: keys, "pair@example.com": GROUPS["pair@example.com"]})
    scene.export(leave_out=[don(scene, f"S{number}") for number in range(in_csv, size)])
    run = scene.merge()
    assert merges(scene) == {("P1", "P2")}
    skipped = {skip["email"]: skip["code"] for skip in run.report["skipped"]}
    assert (skipped if in_csv == size else run.codes) == {email: "shared_mailbox"}
