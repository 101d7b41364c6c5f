"""What a pair that has not been merged may say in the end: whether its reason is so."""

from __future__ import annotations

import itertools
import json
from typing import Any

from tests.fake.organisation import HALF_EMOJI, OTHER_WORK_KINDS, kind_of, org_id_of, own_reference
from tests.simulation import expected
from tests.simulation.expected import NEVER, STOPPING, TERMINAL, Document, Ids, Rows, email_key
from tests.simulation.report_invariants import ids_of
from tests.simulation.world import broken, name_of

LISTED = 120.0  # seconds for which the lists in a backup may be relied on


class ReasonChecker:
    """The reasons that reports give, held against the truth.

    `trouble`: contacts that the token has trouble with for good; it costs their own groups alone.
    """

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.organisation = checker.organisation
        self.trouble: set[str] = set()
        self.resting: Rows = {}  # entries of pairs that the last report has not ended

    def shows_verified(self, ids: Ids) -> bool:
        """Whether answers or lists tell for sure which of the two is verified."""
        world, numbers = self.checker.fake_devrev, self.organisation.contacts.numbers
        # A list of unverified contacts may leave out a deleted one that others still show.
        if self.checker.lies or not self.organisation.alive(ids[1]):
            return False
        form = world.verified_shown
        if form == "mixed":
            form = ("shown", "hidden", "null")[numbers[ids[1]] % 3]
        return bool(form == "shown" or world.verified_filter == "accepted")

    def is_listed(self, object_id: str) -> bool:
        """Whether lists show a work or a conversation to the token."""
        world, kind = self.checker.fake_devrev, kind_of(object_id)
        if kind in (*world.hidden_kinds, *world.unknown_kinds):
            return False
        if kind in OTHER_WORK_KINDS and not world.long_work_types:
            return False
        return not (world.restricted_in_lists == "left out" and object_id in world.restricted)

    def find_trouble(self) -> None:
        """Add the contacts that have had to do with a forbidden object, or hold half an emoji."""
        world = self.checker.fake_devrev
        for identity, contact in self.organisation.contacts.items():
            if HALF_EMOJI in json.dumps(contact, ensure_ascii=False):
                self.trouble.add(identity)
        if world.restricted_in_lists == "left out":
            return
        for object_id in {*world.restricted, *world.restricted_timelines}:
            for thing in expected.versions(self.organisation, object_id, NEVER):
                self.trouble.update(expected.people_of(thing))

    def judge(self, rows: Rows) -> None:
        checker = self.checker
        self.find_trouble()
        last = checker.reports.last
        entries = (*last["failed_merges"], *last["unfinished_merges"])
        self.resting = {ids_of(entry): entry for entry in entries}
        for ids in sorted({*checker.plan, *(ids for ids, asks in checker.asks.items() if asks)}):
            state = rows[ids]["state"] if ids in rows else "nothing"
            if state in (*TERMINAL, "undoing"):
                self._judge_ended(ids, state, rows.get(ids))
            elif ids in self.resting:
                entry = self.resting[ids]
                if not self._is_true(ids, entry):
                    what = f"{entry['state']}, {entry['code']}: {entry['error']}"
                    invariant = "every pair is done, or refused for a reason that is true"
                    broken(invariant, f"{name_of(ids)} is {what}")
            elif not self._is_left_out(ids, state, last):
                invariant = "a scenario that is left in peace ends with every pair done or refused"
                broken(invariant, f"{name_of(ids)} ({state}): nothing is said of it")
        self._judge_references(rows)

    def _is_left_out(self, ids: Ids, state: str, report: Document) -> bool:
        """Whether the run stopped before a pair, or its report says, truly, why it is left out."""
        if self._is_too_small() and self.checker.reports.last_code == 3:
            return True
        email = self._email_of(ids)
        skipped = [(one["code"], one["email"]) for one in report.get("skipped") or ()]
        gone = {one for code, one in skipped if code in ("already_gone", "already_merged")}
        is_said = email in gone or (gone and state == "nothing")
        is_gone = is_said and not self.organisation.alive(ids[1])
        contacts = (self.organisation.contacts.get(one) for one in ids)
        orgs = {org_id_of(one) for one in contacts if one} - {None}
        return is_gone or (("different_rev_org", email) in skipped and len(orgs) > 1)

    def _email_of(self, ids: Ids) -> str:
        """Return the address of a pair that is planned; empty where it is not planned any more."""
        return self.checker.plan[ids].primary.key if ids in self.checker.plan else ""

    def objects_tell(self, ids: Ids, row: Any) -> bool:
        """Whether a poll names the primary, or all that a backup has was moved, among it an object
        of the duplicate alone."""
        world = self.checker.fake_devrev
        form = world.gone_of.get(ids[1], world.gone)
        names_primary = form in ("301", "primary", "shadow", "unassigned")
        if names_primary and form != world.stays:  # what stays has no primary_identity
            return True
        entries = expected.entries_of(row["backup"]).items()
        items = {contact: set(dict(expected.in_backup(entry))) for contact, entry in entries}
        mine = items.pop(ids[1], set()).difference(*items.values())
        has_one = any(expected.now_of(self.organisation, one) for one in mine)
        return has_one and not self.checker.leaves_behind(ids)

    def _judge_ended(self, ids: Ids, state: str, row: Any) -> None:
        is_carried_out = state == "cancelled" and self.checker.into(ids)
        # Else polls lead to whom the primary was merged onward into.
        is_seen = self.organisation.alive(ids[0]) and not self.checker.lies
        if is_carried_out and is_seen and not self._is_hidden(ids) and self.objects_tell(ids, row):
            broken("a cancelled merge that DevRev has carried out is finished", name_of(ids))

    def _is_hidden(self, ids: Ids) -> bool:
        return self.is_odd(ids[1]) or self._cannot_be_told(ids)

    def _judge_references(self, rows: Rows) -> None:
        """No reference is left on no contact without a report that names it."""
        checker, organisation = self.checker, self.organisation
        for ids in sorted(rows.keys() & checker.asks.keys()):
            reference = rows[ids]["new_ref"]
            if not (checker.asks[ids] and reference and checker.into(ids)):
                continue
            if rows[ids]["state"] in STOPPING:
                continue  # it was restored, and others may have taken it since
            had = {ref for _, ref in organisation.reference_times[ids[0]]}
            holder = organisation.holder(org_id_of(organisation.contacts[ids[1]]), reference)
            is_held = holder and organisation.alive(holder)
            if reference not in had | checker.reports.named and not is_held:
                invariant = "no reference is left on no contact that no report names"
                broken(invariant, f"{reference} of {name_of(ids)}")

    def _is_true(self, ids: Ids, entry: Document) -> bool:
        """Return whether the reason that the last report gives for a pair is so."""
        code, group = entry["code"], self.group_of(ids)
        group |= {row.id for row in self.checker.rows if row.key == entry["email"]}
        world = self.checker.fake_devrev
        troubled = ("forbidden", "api_error", "backup_failed", "merge_refused")
        if code in troubled and group & self.trouble:
            return True
        if entry["state"] == "merged" and world.reference_updates != "works":
            return True
        if code in ("api_error", "backup_failed") and world.cursor_life is not None:
            return True  # a quota that makes pages wait for longer than their cursors live
        if code == "forbidden" and world.hidden_kinds and world.hidden_kinds_answer == "403":
            return True
        reasons = self._reasons(ids, entry)
        return any(is_so for codes, is_so in reasons.items() if code in codes.split())

    def _reasons(self, ids: Ids, entry: Document) -> dict[str, Any]:
        """Return by codes whether they are so."""
        organisation, checker = self.organisation, self.checker
        world, reference = checker.fake_devrev, entry["new_external_ref"]
        group, planned = self.group_of(ids), checker.plan.get(ids)
        there = {one: organisation.contacts[one] for one in group if organisation.alive(one)}
        primary, duplicate = map(there.get, ids)
        references = [one.new_ref for pair, one in checker.plan.items() if pair[0] == ids[0]]
        left = [(one["id"], one["role"]) for one in entry.get("left_behind") or ()]
        # A 404 tells of a deletion only where another object of its kind answers.
        is_alone = False
        for one, role in left:
            others = organisation.table_of(one).find([(role, [ids[0]])])
            is_alone |= kind_of(one) not in {kind_of(other["id"]) for other in others}
        is_missing = len(there) < len(group)
        has_another = primary is not None and primary["external_ref"] not in (reference, None)
        stays = duplicate is not None and (checker.lies or self._is_never_merged(ids))
        is_stuck = reference in organisation.stuck_references
        can_be_freed = self._can_be_freed(ids, reference)
        # Lists show the merged duplicate for good as it was before.
        is_listed = duplicate is None and world.stays == "own-reference"
        shown = organisation.contacts.get(ids[1], {}).get("external_ref")
        # A primary that was merged into another: reading it may tell nothing.
        is_untold = self._is_hidden(ids) or primary is None
        return {
            "plan_changed": planned is None or planned.new_ref != reference,
            "not_found": is_missing,
            "not_active": is_missing or any(one["state"] != "active" for one in there.values()),
            # A fresh export has the row as it is, but for what is no longer exported as a pair.
            "email_changed external_ref_changed count_mismatch": planned is None or has_another,
            "different_rev_org": len({*map(org_id_of, there.values())} - {None}) > 1,
            "several_user_refs": True,
            "shared_mailbox group_changed": self._has_too_many(ids),
            "several_external_refs": any(one.get("external_refs") for one in there.values()),
            "unverified": self._has_unverified(ids, group),
            "reference_reverted": world.puts_back,
            "reference_unheld": any(
                one and not expected.holders(organisation, one) for one in references
            ),
            "external_ref_conflict": is_stuck or not can_be_freed,
            "left_behind": not all(checker.belongs_to(*one, ids[0]) for one in left) or is_alone,
            "still_listed": is_listed and shown == own_reference(ids[1]),
            "merged_into_another": organisation.survivor(ids[1]) != ids[0],
            "backup_failed": checker.backups_lost,
            "stale": self._is_too_small(),
            "group_incomplete": any(set(other) & group for other in self.resting if other != ids),
            "undo_unfinished": checker.undo.is_open(group),
            "merge_refused merge_not_confirmed forbidden api_error": is_untold or stays,
        }

    def _has_too_many(self, ids: Ids) -> bool:
        email = self._email_of(ids)
        chosen = email in self.checker.choices
        rows = [row for row in self.checker.rows if row.key == email and row.takes_part]
        spellings = {row.email for row in self.checker.rows if row.key == email}
        in_any_case = self.checker.fake_devrev.email_ignores_case
        found = 0
        for one in self.organisation.contacts.values():
            is_listed = in_any_case or one.get("email") in spellings
            is_mine = is_listed and email_key(str(one.get("email"))) == email
            found += is_mine and expected.takes_part(one["external_ref"])
        return chosen or found > min(len(rows), expected.most_contacts(email) if email else 0)

    def _has_unverified(self, ids: Ids, group: set[str]) -> bool:
        """Whether of some pair of the group one is not verified and the other is, or may be for all
        that is shown, or a reference has to move from one that is not verified."""
        for duplicate in group - {ids[0]}:
            pair = (ids[0], duplicate)
            odd = [one in self.organisation.unverified for one in pair]
            planned = self.checker.plan.get(pair)
            moves = planned is None or planned.new_ref
            shown = self.shows_verified(pair) and self.shows_verified(pair[::-1])
            if any(odd) and not (all(odd) and shown and not moves):
                return True
        return False

    def _is_never_merged(self, ids: Ids) -> bool:
        """Whether DevRev merges no unverified contact into a verified one, or the other way."""
        world, unverified = self.checker.fake_devrev, self.organisation.unverified
        manners = {(False, True): world.unverified_merge, (True, False): world.verified_merge}
        return manners.get((ids[0] in unverified, ids[1] in unverified), "works") != "works"

    def is_odd(self, contact: str) -> bool:
        """Whether reading a merged contact shows it as before, for good."""
        world = self.checker.fake_devrev
        form = world.gone_of.get(contact, world.gone)
        references = {ref for _, ref in self.organisation.reference_times[contact]}
        if form == "stays" and world.stays == "own-reference":
            form = "stale" if references == {own_reference(contact)} else form
        return not self.organisation.alive(contact) and form in ("locked", "stale", "404-route")

    def _cannot_be_told(self, ids: Ids) -> bool:
        """Return whether neither polls nor lists tell of a merged duplicate: not all was moved, or
        the list of its email does not show the primary, which has another one now."""
        world = self.checker.fake_devrev
        form = world.gone_of.get(ids[1], world.gone)
        odd = not self.organisation.alive(ids[1]) and form in world.ODD
        is_listed = world.stays not in ("", "no-email", "bare")
        if world.stays == "no-email":  # it is still listed for its reference
            is_listed = not self.objects_tell(ids, self.checker.latest[ids])
        email = email_key(str(self.organisation.contacts.get(ids[0], {}).get("email")))
        is_apart = email not in {one.primary.key for one in self.checker.known[ids]}
        return odd and (is_listed or is_apart or self.checker.leaves_behind(ids))

    def _is_too_small(self) -> bool:
        """Return whether the quota lets too little through for lists to be fresh at their merge."""
        quota, world = self.checker.fake_devrev.quota, self.checker.fake_devrev
        works, largest = self.organisation.works, world.largest_page or 100
        contacts = set(itertools.chain(*self.checker.plan, *self.checker.asks))
        pages = sum(len(works.find([("anyone", [one])])) // largest for one in contacts)
        # Where a list has to be read contact by contact, or has empty pages:
        odd = bool(world.max_ids) + bool(world.empty_pages or world.trailing_page)
        least = 20 + 8 * pages + 40 * odd
        if quota is None:
            return False
        # Into a window of one, no read fits with the write that rests on it.
        return quota.limit == 1 or quota.limit * LISTED / quota.window < least

    def group_of(self, ids: Ids) -> set[str]:
        found = set(ids)
        for pair in (*self.checker.plan, *self.checker.asks):
            if pair[0] == ids[0]:
                found |= set(pair)
        return found

    def _can_be_freed(self, ids: Ids, reference: str) -> bool:
        """Return whether exporting and running again would have given the reference to the primary;
        not where its holder can't be merged, for a reason of its own."""
        primary = self.organisation.contacts.get(ids[0])
        if not self.organisation.alive(ids[0]) or primary["state"] != "active":
            return False
        holder = self.organisation.holder(org_id_of(primary), reference)
        pairs = self.checker.plan.keys() - self.resting.keys()
        return holder is None or not pairs.isdisjoint([(holder, ids[0]), (ids[0], holder)])
