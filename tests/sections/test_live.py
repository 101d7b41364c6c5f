"""`--preview --live` foretells with which code a run refuses each group, changes nothing, and costs little."""

import json
import re
from typing import Any, Callable, Dict, List, Tuple

import pytest

import merge_contacts as tool
from tests.sandbox import Organisation, Sandbox
from tests.support import SCRIPT, Workplace, assert_merged, organisation_of_pairs

Pair = Tuple[str, str]


def change(which: int, **fields: Any) -> Callable[[Organisation, Pair], None]:
    return lambda organisation, pair: organisation.change(
        organisation.contacts[pair[which]], **fields
    )


def unverify(organisation: Organisation, pair: Pair) -> None:
    organisation.unverified.add(pair[1])


def third_user(organisation: Organisation, pair: Pair) -> None:
    organisation.add_contact(
        f"U{pair[0][-1]}", organisation.contacts[pair[0]]["email"], f"user_u{pair[0][-1]}"
    )


def many_more(organisation: Organisation, pair: Pair) -> None:
    for number in range(3):
        organisation.add_contact(f"M{pair[0][-1]}{number}", organisation.contacts[pair[0]]["email"])


def merged_elsewhere(organisation: Organisation, pair: Pair) -> None:
    reference = organisation.contacts[pair[1]]["external_ref"]
    organisation.merge(*pair)
    organisation.change(organisation.contacts[pair[1]], external_ref="gone")
    organisation.change(organisation.contacts[pair[0]], external_ref=reference)


# What happens to a pair after the export -> the code with which a run refuses it or leaves it out.
TROUBLE: Dict[str, Callable[[Organisation, Pair], None]] = {
    "ready": lambda organisation, pair: None,
    "not_found": lambda organisation, pair: organisation.delete_contact(pair[0]),
    "not_active": change(1, state="locked"),
    "email_changed": change(0, email="another@example.com"),
    "external_ref_changed": change(1, external_ref="user_changed"),
    "several_external_refs": change(1, external_refs=["user_5", "crm_5"]),
    "several_user_refs": third_user,
    "shared_mailbox": many_more,
    "unverified": unverify,
    "different_rev_org": change(
        1, rev_org={"id": "don:identity:dvrv-us-1:devo/SANDBOX1:revo/OTHER"}
    ),
    "count_mismatch": lambda organisation, pair: organisation.delete_work(
        next(
            one
            for one, work in organisation.works.items()
            if pair[1] in [user["id"] for user in work["reported_by"]]
        )
    ),
    "already_merged": merged_elsewhere,
    # Past the index of the fake, which knows only DevRev's shapes.
    "api_error": lambda organisation, pair: dict.__setitem__(
        organisation.contacts[pair[0]], "external_refs", [{}]
    ),
}


@pytest.mark.parametrize(
    "options", [(), ("--across-workspaces", "--try-unverified"), ("--primary", "user")], ids=str
)
def test_a_run_does_what_the_live_preview_foretells(
    place: Workplace, options: Tuple[str, ...]
) -> None:
    organisation, pairs = organisation_of_pairs(len(TROUBLE))
    place.export(organisation)
    for pair, befall in zip(pairs, TROUBLE.values()):
        befall(organisation, pair)
    with Sandbox(organisation, verified_shown="mixed") as sandbox:
        plan = json.loads(
            place.run(sandbox, "--preview", "--live", "--json", *options, check=0).out
        )
        foretold = {one["email"]: one["code"] or "ready" for one in plan["live"]}
        assert not [
            one for one in sandbox.requests if not one.endpoint.endswith((".list", ".get", ".self"))
        ]
        assert len(foretold) == len(pairs) and set(foretold.values()) > {
            "ready",
            "email_changed",
            "count_mismatch",
        }
        if not options:
            assert [
                foretold[f"person{number}@example.com"] for number in range(1, len(pairs) + 1)
            ] == [*TROUBLE]
        report = place.run(sandbox, "--merge-timeout", "5", *options, check=1).report
    seen = {one["email"]: "ready" for one in report["successful_merges"]}
    for name in ("failed_merges", "unfinished_merges", "skipped"):
        seen.update({one["email"]: one["code"] for one in report[name]})
    assert seen == foretold
    summary = plan["summary"]
    refused = sum(summary["live_refused"].values())
    assert summary["live_ready"] + summary["live_done"] + refused == len(pairs)


def test_a_live_preview_of_25_pairs_costs_eight_requests(place: Workplace) -> None:
    organisation, pairs = organisation_of_pairs(25)
    place.export(organisation)
    with Sandbox(organisation, verified_shown="hidden") as sandbox:
        out = place.run(sandbox, "--preview", "--live", check=0).out
        assert "25 ready" in out and len(sandbox.requests) <= 10
        place.run(sandbox, check=0)
    assert_merged(organisation, pairs)


def test_every_code_has_its_advice() -> None:
    """A code without an entry would stop a run in the middle."""
    text = SCRIPT.read_text(encoding="utf-8")
    raised: List[str] = re.findall(
        r'(?:PairError|PairSkipped|SkippedGroup|Dropped)\((?:\w+(?:\.\w+)*, )?"([a-z_]+)"', text
    )
    assert len(set(raised)) > 20
    assert {*raised, *tool.LIVE_CODES} - tool.CODES.keys() <= {
        "bad_choice"
    }  # which ends in exit 2 before any run
