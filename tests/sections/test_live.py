"""`--preview --live` foretells with which code a run refuses each group, and costs little."""

import json
from typing import Any, Callable, Dict, Tuple

import pytest

from tests.sandbox import Organisation
from tests.simulation.scene import Scene

Pair = Tuple[str, str]
OTHER_ORG = {"id": "don:identity:dvrv-us-1:devo/SANDBOX1:revo/OTHER"}


def change(which: int, **fields: Any) -> Callable[[Organisation, Pair], None]:
    return lambda organisation, pair: organisation.change(
        organisation.contacts[pair[which]], **fields
    )


def more(count: int, reference: str = "") -> Callable[[Organisation, Pair], None]:
    def add(organisation: Organisation, pair: Pair) -> None:
        for number in range(count):
            email = organisation.contacts[pair[0]]["email"]
            key = f"M{pair[0][-1]}{number}"
            organisation.add_contact(key, email, (reference and reference + key) or None)

    return add


def merged_elsewhere(organisation: Organisation, pair: Pair) -> None:
    reference = organisation.contacts[pair[1]]["external_ref"]
    organisation.merge(*pair)
    organisation.change(organisation.contacts[pair[1]], external_ref="gone")
    organisation.change(organisation.contacts[pair[0]], external_ref=reference)


def half_merged(organisation: Organisation, pair: Pair) -> None:
    organisation.merge(*pair)
    organisation.change(organisation.contacts[pair[1]], external_ref="gone")


def without_a_ticket(organisation: Organisation, pair: Pair) -> None:
    works = [one for one, work in organisation.works.items() if pair[1] in str(work["reported_by"])]
    organisation.delete_work(works[0])


# What happens to a pair after the export -> the code with which a run refuses it or leaves it out.
TROUBLE: Dict[str, Callable[[Organisation, Pair], None]] = {
    "ready": lambda organisation, pair: None,
    "not_found": lambda organisation, pair: organisation.delete_contact(pair[0]),
    "not_active": change(1, state="locked"),
    "email_changed": change(0, email="another@example.com"),
    "external_ref_changed": change(1, external_ref="user_changed"),
    "several_external_refs": change(1, external_refs=["user_5", "crm_5"]),
    "several_user_refs": more(1, "user_"),
    "shared_mailbox": more(3),
    "unverified": lambda organisation, pair: organisation.unverified.add(pair[1]),
    "different_rev_org": change(1, rev_org=OTHER_ORG),
    "count_mismatch": without_a_ticket,
    "already_merged": merged_elsewhere,
    "reference_unheld": half_merged,
}


@pytest.mark.parametrize(
    "options", [(), ("--across-workspaces", "--try-unverified"), ("--primary", "user")], ids=str
)
def test_a_run_does_what_the_live_preview_foretells(scene: Scene, options: Tuple[str, ...]) -> None:
    pairs = scene.pairs(len(TROUBLE))
    scene.export()
    for pair, befall in zip(pairs, TROUBLE.values()):
        befall(scene.organisation, pair)
    scene.world.verified_shown = "mixed"
    seen = scene.run("--csv", "contacts.csv", "--preview", "--live", "--json", *options)
    verbs = {one.endpoint.split(".")[1] for one in seen.requests}
    assert seen.code == 0 and verbs <= {"list", "get", "self"}
    plan = json.loads(seen.out)
    foretold = {one["email"]: one["code"] or "ready" for one in plan["live"]}
    if not options:
        emails = [f"person{number}@example.com" for number in range(1, len(pairs) + 1)]
        assert [foretold[email] for email in emails] == [*TROUBLE]
    run = scene.merge("--merge-timeout", "5", *options)
    met = {one["email"]: "ready" for one in run.report["successful_merges"]}
    for name in ("failed_merges", "unfinished_merges", "skipped"):
        met.update({one["email"]: one["code"] for one in run.report[name]})
    assert met == foretold and run.code == 1
    summary = plan["summary"]
    refused = sum(summary["live_refused"].values())
    assert summary["live_ready"] + summary["live_done"] + refused == len(pairs)


@pytest.mark.parametrize("shown", ["hidden", "shown"])
def test_a_live_preview_of_25_pairs_costs_eight_requests(scene: Scene, shown: str) -> None:
    scene.pairs(25)
    scene.export()
    scene.world.verified_shown = shown
    seen = scene.run("--csv", "contacts.csv", "--preview", "--live")
    # Others find out what it may list.
    answered = [one for one in seen.requests if one.status == 200]
    assert "25 ready" in seen.out and len(answered) <= 10
    assert len(scene.merge().report["successful_merges"]) == 25


@pytest.mark.parametrize("which", [0, 1], ids=["primary", "duplicate"])
def test_an_unverified_contact_is_merged_with_no_other_unless_that_is_tried(
    scene: Scene, which: int
) -> None:
    pair = scene.pair(1)
    scene.organisation.unverified.add(pair[which])
    side = ("primary", "duplicate")[which]
    other = f"REVU-{'DP'[which]}1"
    seen = scene.run("--csv", (scene.export() or "contacts.csv"), "--preview", "--live")
    assert f"1 pair whose {side} is unverified" in seen.out and other in seen.out
    assert scene.merge().codes == {"person1@example.com": "unverified"}
    tried = scene.run("--csv", "contacts.csv", "--preview", "--live", "--try-unverified")
    assert ("person1@example.com: REVU-D1 into REVU-P1" in tried.out) == (side == "primary")
    assert scene.merge("--try-unverified").code == 0


def test_a_reference_does_not_move_from_an_unverified_contact(scene: Scene) -> None:
    scene.organisation.unverified.update(scene.pair(1))
    assert scene.merge().codes == {"person1@example.com": "unverified"}
    assert scene.merge("--primary", "user").code == 0, "both are unverified, and none has to move"


@pytest.mark.parametrize("minds_case", [True, False])
def test_devrev_is_asked_with_the_spelling_of_its_own_answers(
    scene: Scene, minds_case: bool
) -> None:
    """The warehouse lower-cases addresses; DevRev's spelling alone leads to two more contacts."""
    scene.world.email_ignores_case = not minds_case
    ids = {}
    for key, reference in (("P1", "REVU-P1"), ("D1", "user_1"), ("D2", "user_2"), ("D3", "user_3")):
        ids[key] = scene.organisation.add_contact(key, "Ada@Example.com", reference)
    rows = {one: {"email": "ada@example.com"} for one in ids.values()}
    scene.export(rows, leave_out=[ids["D2"], ids["D3"]])
    run = scene.merge()
    assert not scene.organisation.merges and run.codes == {"ada@example.com": "shared_mailbox"}


def test_a_reference_that_ends_in_a_blank_is_compared_without_it(scene: Scene) -> None:
    primary, duplicate = scene.pair(1)
    scene.organisation.change(scene.organisation.contacts[duplicate], external_ref="user_1 ")
    scene.export({duplicate: {"ref": "user_1"}})
    why = "the second opinion compares untrimmed"
    scene.waive("a request rests on what was true a minute ago", why)
    scene.waive("savepoint and reports say what is true", why)
    assert scene.merge().code == 0
    assert scene.reference(primary) == "user_1 ", "DevRev's own is written"
