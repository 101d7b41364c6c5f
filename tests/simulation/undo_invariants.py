"""The invariants of `--undo`, held against what is true in tests.fake.organisation."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, Dict, NamedTuple, Set

from tests.fake.organisation import USER_LISTS, kind_of, own_reference
from tests.fake.trouble import Request
from tests.simulation import expected
from tests.simulation.expected import Document, Ids, Rows, email_key, entries_of, held, versions
from tests.simulation.report_invariants import ids_of, judge_code, read_report
from tests.simulation.world import Sent, broken, name_of, short

OF_OBJECTS = ("works.update", "conversations.update")
WRITES = ("rev-users.create", "rev-users.update", "rev-users.merge", *OF_OBJECTS)
OLDEST = 60.0  # seconds that an object may be older than what is written to it
TRAVEL = 100.0  # seconds that a request may be on its way
TWO = "never two contacts are created for one pair"
STAYS = "an undo moves no one but whom the merge has moved"
TRUE = "a finished undo is true in DevRev"
LOST = "nobody's edit is lost but within one round trip"
DURABLE = "a step of an undo is in both files before its request leaves"


People = Dict[str, Set[str]]  # by role


class Created(NamedTuple):
    """A contact that an undo has created."""

    id: str
    email: str
    reference: str | None
    at: float


def record_of(row: Document) -> Document:
    """Return what a pair's backup has of the duplicate itself; nothing where it is not there."""
    entries = entries_of(row["backup"])
    if not entries:
        return {}
    folder = Path(row["backup"]) / entries[row["duplicate_id"]]["folder"]
    found: Document = json.loads((folder / "contact.json").read_bytes())
    return found


class UndoChecker:
    """The undos of a scenario. `checker` has its merges."""

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.organisation = checker.organisation
        self.active = self.preview = False  # of the run in progress
        self.created: list[Created] = []
        self.began = 0.0
        self.begun: set[Ids] = set()  # pairs whose undo has begun at any time
        self.was: dict[str, People] = {}  # objects before the write that is being carried out
        self.contacts_before: set[str] = set()
        self.true: set[Ids] = set()  # undone pairs that were judged
        self.reports: dict[str, Any] = {}
        self.in_flight: list[Sent] = []  # writes of this run without an answer
        self.rests_on: defaultdict[str, list[float]] = defaultdict(list)  # the reads before writes

    def begin(self, options: Any) -> None:
        self.active, self.preview = bool(options.undo), bool(options.undo and options.preview)
        self.began, self.in_flight = self.checker.clock.now, []

    def wrote(self, ids: Ids, row: Document) -> None:
        if row["state"] in ("undoing", "undone", "undo_settled"):
            self.begun.add(ids)

    def forget(self, rows: Rows) -> None:
        known = {ids for ids, row in rows.items() if row["undo"]}  # also one in vain
        self.begun &= known
        self.true &= known

    def open(self) -> set[Ids]:
        """Return the pairs whose undo has begun and is not finished."""
        return expected.pairs_in(self.checker.latest, ["undoing"])

    def is_open(self, contacts: set[str]) -> bool:
        return any(set(ids) & contacts for ids in self.open())

    def stand_in(self, contact: str) -> str:
        """Return the contact that undos have created in place of one, or the contact itself."""
        created = {}
        for row in sorted(self.checker.latest.values(), key=lambda row: row["revision"]):
            is_begun = row["state"] in ("undoing", "undone", "undo_settled")
            if is_begun and row["undo"] and row["undo"]["contact"]:
                created[row["duplicate_id"]] = row["undo"]["contact"]
        seen = set()
        while contact in created and contact not in seen:
            seen.add(contact)
            contact = created[contact]
        return contact

    def may_finish(self, sent: Sent) -> bool:
        """Whether a request may leave after a stop: no reference must be left on no contact."""
        if not self.active or not sent.endpoint.startswith("rev-users."):
            return False
        return any(not self.checker.latest[ids]["undo"]["contact"] for ids in self.open())

    def lacks_reference(self, ids: Ids) -> bool:
        """Whether an undo has left its reference on no contact, and has to be finished."""
        row = self.checker.latest[ids]
        is_held = row["new_ref"] and expected.holders(self.organisation, row["new_ref"])
        return row["state"] == "undoing" and not is_held

    def asked(self, sent: Sent) -> None:
        if self.preview and sent.endpoint in WRITES:
            broken("a preview only reads", sent.endpoint)
        if not self.active and sent.endpoint in OF_OBJECTS:
            broken("a merge run changes contacts alone", sent.endpoint)
        if self.active and sent.endpoint in WRITES:
            if self.in_flight:
                broken("an undo writes one object after the other", sent.endpoint)
            self.in_flight.append(sent)
        if sent.endpoint == "rev-users.create":
            self._judge_create(sent)
        elif self.active and sent.endpoint == "rev-users.update":
            self._judge_update(sent)
        elif sent.endpoint in OF_OBJECTS:
            if sent.body.get("owned_by", {}) == {"set": []}:
                broken("owned_by is never emptied", short(sent.body["id"]))
            self.rests_on[sent.body["id"]].append(self.checker.rests_since(sent.body["id"]))

    def answered(self, sent: Sent) -> None:
        self.in_flight = [one for one in self.in_flight if one is not sent]

    def judge_merge(self, ids: Ids) -> None:
        for other in self.open():
            if set(other) & set(ids):
                broken("a merge run refuses a group whose undo is not finished", name_of(ids))

    def _saved(self, ids: Ids) -> list[Document]:
        rows = (
            self.checker.committed[path.name].get(ids) for path in (expected.MAIN, expected.COPY)
        )
        return [row["undo"] for row in rows if row and row["state"] == "undoing"]

    def _judge_create(self, sent: Sent) -> None:
        email, reference = str(sent.body.get("email")), sent.body.get("external_ref")
        mine = [ids for ids in self.open() if email_key(email) in self._emails(ids)]
        if not self.active or not any(map(self._may_create, mine)):
            broken(DURABLE, f"{email} {reference} is created")
        given = {row["undo"]["contact"] for row in self.checker.latest.values() if row["undo"]}
        for one in self.created:
            if one.id in given:
                continue  # created for another pair
            now = self.organisation.contacts.get(one.id) or {}
            exists = self.organisation.alive(one.id) and one.email == now.get("email") == email
            # Where it has a reference that was given, DevRev creates no second one.
            references = {one.reference, reference, now.get("external_ref")}
            is_nameless = references <= {None, own_reference(one.id)}
            seen = self.checker.clock.now > one.at + self.checker.lag + 1 and not self.checker.lies
            if exists and is_nameless and seen:
                broken(TWO, f"{short(one.id)} exists already, with {email}")

    def _emails(self, ids: Ids) -> set[str]:
        """Return the emails that the duplicate of a pair had, by its backup and its row."""
        row = self.checker.latest[ids]
        return {email_key(row["email"]), email_key(str(record_of(row).get("email")))}

    def _may_create(self, ids: Ids) -> bool:
        """Return whether both files know who was there before; one is enough to finish it."""
        noted = [one["contacts_before"] is not None for one in self._saved(ids)]
        finishes = self.checker.full_now and self.lacks_reference(ids)
        return noted == [True, True] or (finishes and True in noted)

    def _judge_update(self, sent: Sent) -> None:
        primary = sent.body["id"]
        mine = [ids for ids in self.open() if primary in (ids[0], self.stand_in(ids[0]))]
        if not mine or any(len(self._saved(ids)) != 2 for ids in mine):
            broken(DURABLE, f"update of {short(primary)}")
        self._judge_fields(sent, mine)
        if "external_ref" not in sent.body:
            return
        allowed = {own_reference(primary)}
        for ids in mine:
            allowed |= {own_reference(ids[0]), *self._references(ids)}
        been = self.checker.lately(primary)
        if not any(one and one.get("external_ref") in {None, *allowed} for one in been):
            broken(LOST, f"the reference of {short(primary)} becomes {sent.body['external_ref']}")
        if sent.body["external_ref"] not in allowed:
            broken("an undo restores references", f"{sent.body['external_ref']} is new")

    def _judge_fields(self, sent: Sent, mine: list[Ids]) -> None:
        """An undo takes back what the merge has added, and nothing that others have set since."""
        primary = sent.body["id"]
        been = self.checker.lately(primary)
        carried = [self.checker.latest[ids]["fields_to_carry"] or {} for ids in mine]
        for field in set(sent.body) - {"id", "external_ref"}:
            if field == "phone_numbers":
                added = chain.from_iterable(one.get(field, ()) for one in carried)
                is_lost = not (expected.kept_numbers(been) - set(sent.body[field])).issubset(added)
            else:
                written = [one.get(field) for one in carried]
                is_lost = not any(one and one.get(field) in written for one in been)
            if is_lost and not self.checker.lies:
                broken(LOST, f"{field} of {short(primary)} becomes {sent.body[field]!r}")

    def heard(self, stage: str, request: Request) -> None:
        contacts, body = self.organisation.contacts, request.body
        if request.endpoint == "rev-users.create" and stage == "before":
            self.contacts_before = set(contacts)
        elif request.endpoint == "rev-users.create":
            for one in contacts.keys() - self.contacts_before:
                email, reference = str(body.get("email")), body.get("external_ref")
                self.created.append(Created(one, email, reference, self.organisation.now()))
        elif request.endpoint in OF_OBJECTS:
            thing = expected.now_of(self.organisation, body["id"])
            now = {role: set(expected.people_of(thing, [role])) for role in USER_LISTS}
            if stage == "before":
                self.was[body["id"]] = now
            elif thing is not None and self.was.get(body["id"]) not in (None, now):
                self._judge_write(body["id"], self.was[body["id"]], now)

    def _own(self, primary: str) -> set[tuple[str, str]]:
        """Return what a primary had before its first merge, by the backup that this rests on."""
        backups: list[str] = []
        for ids, found in self.checker.backups.items():
            if ids[0] == primary:
                backups += found
        entries = entries_of(min(backups, key=lambda backup: Path(backup).name, default=None))
        return set(expected.in_backup(entries[primary])) if entries else set()

    def contacts_of(self, groups: set[str]) -> set[str]:
        """Return whom undos have created, and who came since with a reference of a duplicate."""
        references = set()
        for ids, known in self.checker.known.items():
            if ids[1] in groups:
                references |= {one.duplicate.ref for one in known}
        found = {one.id for one in self.created}
        for one, times in self.organisation.reference_times.items():
            if one not in groups and any(ref in references for _, ref in times):
                found.add(one)
        return found

    def _judge_write(self, identity: str, was: People, now: People) -> None:
        groups = set(chain(*self.begun))
        mine = self.contacts_of(groups)
        groups |= set(map(self.stand_in, groups))
        primaries = {ids[0] for ids in self.open()}
        oldest = self.checker.clock.now - OLDEST - TRAVEL
        since = min(self.rests_on[identity], default=oldest) - 0.001
        before = versions(self.organisation, identity, since)[1:]
        lately = versions(self.organisation, identity, oldest - self.checker.lag)[1:]
        for role in USER_LISTS:
            what = f"{role} of {short(identity)}"
            gone, new = was[role] - now[role], now[role] - was[role]
            if was[role] and not now[role]:
                broken("owned_by is never emptied", what)
            for person in gone - groups - mine:
                if all(held(one, role, person) for one in before):
                    broken(STAYS, f"{short(person)} leaves {what}")
            for primary in gone & primaries:
                if (identity, role) in self._own(primary):
                    broken(STAYS, f"{short(primary)} leaves its own {what}")
            for person in new - mine:
                if not any(held(one, role, person) for one in lately):
                    broken(STAYS, f"{short(person)} gets {what}")

    def after_run(self, rows: Rows, path: Path, code: int | None, needed: bool) -> None:
        for ids, row in rows.items():
            if row["state"] == "undone" and ids not in self.true:
                self.true.add(ids)
                self._judge_undone(ids, row)
        if not self.active or self.preview or not needed:
            return
        report = self.reports[path.name] = read_report(path)
        self._judge_interrupted()
        for state, title in (("undone", "undone"), ("undoing", "unfinished")):
            for ids in map(ids_of, report[title]):
                if ids in rows and rows[ids]["state"] != state:
                    broken("a report says what is true", f"{name_of(ids)} is not {state}")
        judge_code(code, *report["failed"], *report["unfinished"])

    def _judge_interrupted(self) -> None:
        """An interruption leaves no reference on no contact, where the network is undisturbed."""
        if not self.checker.stopped or self.checker.slowest() is None or self.checker.full_now:
            return
        for ids in self.open():
            for one in self.checker.known[ids]:
                if one.new_ref and not expected.holders(self.organisation, one.duplicate.ref):
                    broken("an interruption leaves no reference on no contact", one.new_ref)

    def _judge_undone(self, ids: Ids, row: Document) -> None:
        undo = row["undo"]
        contact = undo["contact"]
        if contact in ids or contact not in self.contacts_of(set(ids)):
            broken(TRUE, f"{short(ids[1])} is undone, and {contact} was never created")
        entries = entries_of(row["backup"])
        if not entries:
            return
        reference = record_of(row)["external_ref"]
        had = [one for _, one in self.organisation.reference_times[contact]]
        if reference not in had and "external_ref" not in undo["left_out"]:
            broken(TRUE, f"{short(contact)} never had the reference {reference}")
        left = {(item["id"], item["role"]) for item in undo["left"]}
        for identity, role in expected.in_backup(entries[ids[1]]):
            been = versions(self.organisation, identity, self.began)
            if self.checker.lies or any(held(one, role, contact) for one in been):
                continue
            stays = False  # with the primary, or who stands in for it
            for primary in (self.stand_in(ids[0]), ids[0]):
                stays |= all(held(one, role, primary) for one in been)
            if (identity, role) not in left or (stays and self._may_be_written(identity)):
                broken(TRUE, f"{short(contact)} has not got {role} of {short(identity)} back")

    def _may_be_written(self, identity: str) -> bool:
        """Return whether an undo can give an object back: of a documented kind, not forbidden."""
        world = self.checker.fake_devrev
        hidden = (*world.restricted, *world.restricted_writes)
        return kind_of(identity) in ("ticket", "issue", "conversation") and identity not in hidden

    def after_life(self, rows: Rows) -> None:
        named = set()  # references
        last: dict[Ids, Document] = {}  # entries of reports
        for report in self.reports.values():
            for entry in (*report["failed"], *report["unfinished"]):
                named.add(entry["duplicate"]["old_external_ref"])
                last[ids_of(entry)] = entry
        for ids in self.begun:
            state = rows[ids]["state"] if ids in rows else "nothing"
            if state == "undoing" and not (ids in last and self._is_true(ids, last[ids])):
                why = f"{last[ids]['code']}: {last[ids]['error']}" if ids in last else "unnamed"
                what = f"{short(ids[1])} is undoing: {why}"
                broken("an undo is finished by the same command", what)
            had = set()  # references that others had, or the primary since
            for contact, times in self.organisation.reference_times.items():
                if contact not in ids:
                    had |= {reference for _, reference in times}
                elif contact == ids[0] and state != "undone":
                    had |= {reference for _, reference in times[1:]}
            for one in self.checker.known[ids]:
                reference = one.duplicate.ref
                if reference.startswith("user_") and reference not in named | had:
                    invariant = "no reference is left on no contact that no report names"
                    broken(invariant, f"{reference}, after an undo")

    def _references(self, ids: Ids) -> set[str]:
        found = set()
        for one in self.checker.known[ids]:
            found |= {one.primary.ref, one.duplicate.ref}
        return found

    def _is_true(self, ids: Ids, entry: Document) -> bool:
        organisation, code = self.organisation, entry["code"]
        identity = self.stand_in(ids[0])
        primary = organisation.contacts.get(identity) if organisation.alive(identity) else None
        reference = entry["duplicate"]["old_external_ref"]
        if code == "not_found":
            return primary is None
        if code in ("merged_into_another", "merged_onward"):
            return bool(organisation.survivor(ids[1]) != ids[0]) or primary is None
        if code == "not_active":
            return primary is None or primary["state"] != "active"
        if code == "external_ref_changed":
            return primary is not None and primary["external_ref"] not in self._references(ids)
        if code == "email_changed":
            return primary is not None and email_key(primary["email"]) != entry["email"]
        world = self.checker.fake_devrev
        if code == "stale":  # a read and the write that rests on it do not fit into a window
            return world.quota is not None and world.quota.limit < 2
        refused = ("external_ref_conflict", "contact_refused", "contact_not_confirmed")
        if code in refused or (code == "forbidden" and world.refused_fields):
            # A group is refused as a whole, for any of its references, or for an email used twice.
            refs = {one.duplicate.ref for one in self.checker.known_of(ids[0])}
            found = organisation.contacts.find([("external_ref", sorted({reference, *refs}))])
            return bool(
                not organisation.stuck_references.isdisjoint(refs)
                or world.unique_emails
                or world.refused_fields
                or organisation.unverified_keep_references
                or any(one["id"] not in ids for one in found)
            )
        if code == "not_restored":
            objects = [item["id"] for item in entry["left"]]
            people: list[str] = []
            for one in objects:
                people += expected.people_of(expected.now_of(organisation, one), USER_LISTS)
            is_gone = any(":revu/" in one and not organisation.alive(one) for one in people)
            # So is the contact that the undo made, or took for its own, where others merged it on.
            is_gone |= not organisation.alive((entry["contact"] or {}).get("id", ""))
            return is_gone or not all(map(self._may_be_written, objects))
        return code in ("forbidden", "api_error") and bool(
            {*ids, identity} & self.checker.reasons.trouble
        )
