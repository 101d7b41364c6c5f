"""What `--undo` invariants, held against what is true in tests.fake_devrev, by a second opinion as in tests.invariants."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, DefaultDict, Dict, List, Mapping, Optional, Set, Tuple

from tests.fake_devrev import USER_LISTS, Request, Table, Thing
from tests.simulated import InvariantBroken, Sent, short

Ids = Tuple[str, str]  # primary, duplicate
WRITES = ("rev-users.create", "rev-users.update", "rev-users.merge", "works.update", "conversations.update")
OLDEST = 60.0  # seconds that a work may be older than what is written to it
TRAVEL = 100.0  # seconds that a request may be on its way
TWO = "never two contacts made for one pair"
STAYS = "an undo moves nobody but whom the merge has moved"
TRUE = "a finished undo is true in the world"


class Made:
    """A contact that an undo has made."""

    def __init__(self, identity: str, email: str, reference: Optional[str], at: float) -> None:
        self.id, self.email, self.reference, self.at = identity, email, reference, at


def handed_on(entry: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """What of a contact in a manifest a merge hands on: object id and role."""
    items = [(one, "owned_by") for one in entry["works"]["owned"]]
    items += [(one, "reported_by") for one in entry["works"]["reported"]]
    return items + [(one, "members") for one in entry["conversations"]]


class UndoChecker:
    """The undos of a life. `books` are those of its merges."""

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.organisation = checker.organisation
        self.active = self.preview = False  # of the run that goes on
        self.made: List[Made] = []
        self.began = 0.0
        self.was: Dict[str, Dict[str, List[str]]] = {}  # before the write that is being carried out
        self.contacts_before: Set[str] = set()
        self.true: Set[Ids] = set()  # undone pairs that were judged
        self.reports: Dict[str, Any] = {}
        self.last: Optional[Dict[str, Any]] = None

    def begin(self, options: Any) -> None:
        self.active, self.preview = bool(options.undo), bool(options.undo and options.preview)
        self.began = self.checker.clock.now

    def events(self, ids: Ids) -> List[str]:
        return [event for event, _ in self.checker.journal[ids]]

    def open(self) -> Set[Ids]:
        """Pairs whose undo has begun and is not finished, by the journal."""
        return {ids for ids in list(self.checker.journal) if self.events(ids)[-1:] == ["undo begun"]}

    # ----- requests --------------------------------------------------------------------------------

    def asked(self, sent: Sent) -> None:
        """A request leaves."""
        if self.preview and sent.endpoint in WRITES:
            raise InvariantBroken("a preview only reads", sent.endpoint)
        if not self.active and sent.endpoint in WRITES[-2:]:
            raise InvariantBroken("a merge run changes contacts alone", sent.endpoint)
        if sent.endpoint == "rev-users.create":
            self._judge_create(sent)
        elif self.active and sent.endpoint == "rev-users.update":
            self._judge_update(sent)
        elif sent.body.get("owned_by", {}) == {"set": []}:
            raise InvariantBroken("owned_by is never emptied", short(sent.body["id"]))

    def judge_merge(self, ids: Ids) -> None:
        for other in self.open():
            if set(other) & set(ids):
                what = f"{short(ids[1])} into {short(ids[0])}, and the undo of {short(other[1])} is not finished"
                raise InvariantBroken("a merge run refuses a group whose undo is not finished", what)

    def _judge_create(self, sent: Sent) -> None:
        email, reference = str(sent.body.get("email")), sent.body.get("external_ref")
        self.checker.read_journal()
        rows = self.checker.rows_now()
        begun = [ids for ids in self.open() if rows.get(ids, {}).get("state") == "undoing"]
        mine = [ids for ids in begun if "asked" in json.loads(rows[ids]["details"])["undo"]]
        mine = [ids for ids in mine if rows[ids]["email"] == email.strip().casefold()]
        if not self.active or not mine:
            raise InvariantBroken(
                "a step of an undo is durable before its request leaves", f"{email} {reference} is made"
            )
        given = {json.loads(row["details"]).get("undo", {}).get("contact") for row in rows.values()}
        for one in self.made:
            if one.id in given:
                continue  # made for another pair
            now = self.organisation.contacts.get(one.id)
            there = now is not None and self.organisation.alive(one.id) and one.email == now.get("email")
            same = there and one.email == email and one.reference == reference == (now or {}).get("external_ref")
            # Where it has a reference, DevRev makes no second one.
            if (
                same
                and reference is None
                and self.checker.clock.now > one.at + self.checker.lag + 1
                and not self.checker.lies
            ):
                raise InvariantBroken(TWO, f"{short(one.id)} is there already, with {email} and {reference}")

    def _judge_update(self, sent: Sent) -> None:
        self.checker.read_journal()
        mine = [ids for ids in self.open() if ids[0] == sent.body["id"]]
        if not mine:
            raise InvariantBroken(
                "a step of an undo is durable before its request leaves", f"update of {short(sent.body['id'])}"
            )
        rows = self.checker.known
        allowed = {row for ids, wanted in rows.items() if ids[0] == sent.body["id"] for one in wanted
                   for row in (one.primary.ref, one.duplicate.ref)}  # fmt: skip
        if sent.body["external_ref"] not in allowed:
            raise InvariantBroken(
                "an undo gives references back", f"{sent.body['external_ref']} to {short(sent.body['id'])}"
            )

    # ----- what is carried out ---------------------------------------------------------------------

    def heard(self, stage: str, request: Request) -> None:
        """DevRev carries a request out: `before` and `after`."""
        if request.endpoint == "rev-users.create":
            if stage == "before":
                self.contacts_before = set(self.organisation.contacts)
            for one in set(self.organisation.contacts) - self.contacts_before if stage == "after" else ():
                email, reference = str(request.body.get("email")), request.body.get("external_ref")
                self.made.append(Made(one, email, reference, self.organisation.now()))
        elif request.endpoint in ("works.update", "conversations.update"):
            table = self.table(request.body["id"])
            thing = table.get(request.body["id"])
            now = {role: [one["id"] for one in (thing or {}).get(role, ())] for role in USER_LISTS}
            if stage == "before":
                self.was[request.body["id"]] = now
            elif thing is not None and self.was.get(request.body["id"]) not in (None, now):
                self._judge_write(table, thing, self.was[request.body["id"]], now)

    def _own(self, primary: str) -> Set[Tuple[str, str]]:
        """What a primary had before its first merge, by the backup that this rests on."""
        asked = [backup for ids, lines in list(self.checker.journal.items()) if ids[0] == primary
                 for event, backup in lines if event == "asked"]  # fmt: skip
        first = min(asked, key=lambda backup: Path(backup).name)
        manifest = json.loads((Path(first) / "manifest.json").read_bytes())
        (entry,) = (one for one in manifest["contacts"] if one["csv"]["id"] == primary)
        return set(handed_on(entry))

    def contacts_of(self, groups: Set[str]) -> Set[str]:
        """Whom undos have made, and who came by himself and has had a reference that a duplicate had."""
        references = {one.duplicate.ref for ids, all_wanted in self.checker.known.items() for one in all_wanted
                      if ids[1] in groups}  # fmt: skip
        times = self.organisation.reference_times
        came = {one for one in times if one not in groups and any(ref in references for _, ref in times[one])}
        return came.union(one.id for one in self.made)

    def table(self, identity: str) -> Table:
        found: Table = self.organisation.conversations if ":conversation/" in identity else self.organisation.works
        return found

    def _judge_write(self, table: Table, thing: Thing, was: Dict[str, List[str]], now: Dict[str, List[str]]) -> None:
        groups = {one for ids in self.checker.journal if "undo begun" in self.events(ids) for one in ids}
        mine = self.contacts_of(groups)
        since = self.checker.clock.now - OLDEST - TRAVEL - self.checker.lag
        for role in USER_LISTS:
            if was[role] and not now[role]:
                raise InvariantBroken("owned_by is never emptied", f"{role} of {short(thing['id'])}")
            for person in {*was[role]} - {*now[role]} - groups - mine:
                if not self._came_lately(table, thing["id"], role, person, since):
                    raise InvariantBroken(STAYS, f"{short(person)} leaves {role} of {short(thing['id'])}")
            for primary in {ids[0] for ids in self.open()} & ({*was[role]} - {*now[role]}):
                if (thing["id"], role) in self._own(primary):
                    raise InvariantBroken(STAYS, f"{short(primary)} leaves its own {role} of {short(thing['id'])}")
            for person in {*now[role]} - {*was[role]} - mine:
                if not self._was_there(table, thing["id"], role, person, since):
                    raise InvariantBroken(STAYS, f"{short(person)} gets {role} of {short(thing['id'])}")

    def _came_lately(self, table: Table, identity: str, role: str, person: str, since: float) -> bool:
        versions = self.checker.versions(table, identity, since)[1:]
        return not all(self.checker.held(one, role, person) for one in versions)

    def _was_there(self, table: Table, identity: str, role: str, person: str, since: float) -> bool:
        return any(self.checker.held(one, role, person) for one in self.checker.versions(table, identity, since)[1:])

    # ----- what a run has left -------------------------------------------------------------------------

    def after_run(self, rows: Mapping[Ids, Mapping[str, Any]], path: Optional[Path], code: Optional[int]) -> None:
        for ids, row in rows.items():
            event = {"undoing": "undo begun", "undone": "undone"}.get(row["state"])
            known = event == "undo begun" and (self.checker.disk_was_full or self.events(ids)[-1:] == ["undone"])
            if event and self.events(ids)[-1:] != [event] and not known:
                raise InvariantBroken(
                    "the journal knows how far an undo is", f"{short(ids[1])} is {row['state']}, not {event}"
                )
            if row["state"] == "undone" and ids not in self.true:
                self.true.add(ids)
                self._judge_undone(ids, row)
        if not self.active or self.preview or path is None:
            return
        if not path.exists():
            raise InvariantBroken("the report is written, also when the run stops early", f"{path.name} is not there")
        self.last = report = json.loads(path.read_bytes())
        if "(a bug" in str(report["run"].get("stopped")):
            raise InvariantBroken("no run ends with a bug", report["run"]["stopped"])
        self.reports[path.name] = report
        for state, title in (("undone", "undone"), ("undoing", "unfinished")):
            for entry in report[title]:
                ids = entry["primary"]["id"], entry["duplicate"]["id"]
                if ids in rows and rows[ids]["state"] != state:
                    raise InvariantBroken(
                        "a report says what is true", f"{short(ids[1])} is {rows[ids]['state']}, not {state}"
                    )
        bad = len(report["failed"]) + len(report["unfinished"])
        if code in (0, 1) and (code == 0) != (bad == 0):
            raise InvariantBroken("the exit code says how it went", f"{code}, and {bad} failed or unfinished")

    def _judge_undone(self, ids: Ids, row: Mapping[str, Any]) -> None:
        undo = json.loads(row["details"])["undo"]
        contact = undo.get("contact")
        if contact in ids or contact not in self.contacts_of(set(ids)):
            raise InvariantBroken(TRUE, f"{short(ids[1])} is undone, and {contact} was never made")
        folder = Path(row["backup"])
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (entry,) = (one for one in manifest["contacts"] if one["csv"]["id"] == ids[1])
        reference = json.loads((folder / entry["folder"] / "contact.json").read_bytes())["external_ref"]
        had = [one for _, one in self.organisation.reference_times[contact]]
        if reference not in had and "external_ref" not in undo["left_out"]:
            raise InvariantBroken(TRUE, f"{short(contact)} never had the reference {reference}")
        left = {(item["id"], item["role"]) for item in undo.get("left", ())}
        for identity, role in handed_on(entry):
            table = self.table(identity)
            versions = self.checker.versions(table, identity, self.began)
            if self.checker.lies or any(self.checker.held(one, role, contact) for one in versions):
                continue
            primary = all(self.checker.held(one, role, ids[0]) for one in versions)
            if (identity, role) not in left or primary:
                raise InvariantBroken(TRUE, f"{short(contact)} has not got {role} of {short(identity)} back")

    # ----- a life ends -----------------------------------------------------------------------------

    def after_life(self, rows: Mapping[Ids, Mapping[str, Any]]) -> None:
        named: DefaultDict[str, List[str]] = defaultdict(list)  # reference -> codes
        last: Dict[Ids, Any] = {}
        for report in self.reports.values():
            for entry in (*report["failed"], *report["unfinished"]):
                named[entry["duplicate"]["old_external_ref"]].append(entry["code"])
                last[entry["primary"]["id"], entry["duplicate"]["id"]] = entry
        for ids in list(self.checker.journal):
            if "undo begun" not in self.events(ids):
                continue
            state = rows[ids]["state"] if ids in rows else "nothing"
            if state == "undoing" and not (ids in last and self._is_true(ids, last[ids])):
                why = last[ids]["code"] + ": " + last[ids]["error"] if ids in last else "nothing is said of it"
                raise InvariantBroken("an undo is finished by the same command", f"{short(ids[1])} is undoing: {why}")
            for one in self.checker.known[ids]:
                reference = one.duplicate.ref
                times = self.organisation.reference_times
                moved = any(ref == reference for _, ref in times[ids[0]][1:]) and self.events(ids)[-1:] != ["undone"]
                ever = moved or any(ref == reference for c in times if c not in ids for _, ref in times[c])
                if reference.startswith("user_") and not named[reference] and not ever:
                    raise InvariantBroken(
                        "no reference is left on nobody that no report names", f"{reference}, after an undo"
                    )

    @staticmethod
    def is_open(rows: Mapping[Ids, Mapping[str, Any]], contacts: Set[str]) -> bool:
        """Whether the undo of one of these contacts has begun and is not finished."""
        return any(set(ids) & contacts and row["state"] == "undoing" for ids, row in rows.items())

    def _is_true(self, ids: Ids, entry: Mapping[str, Any]) -> bool:
        """Whether the reason for which an undo can't be finished is so in the world."""
        organisation, code = self.organisation, entry["code"]
        primary = organisation.contacts.get(ids[0]) if organisation.alive(ids[0]) else None
        reference = entry["duplicate"]["old_external_ref"]
        if code == "not_found":
            return primary is None
        if code == "merged_into_another":
            return bool(organisation.survivor(ids[1]) != ids[0])
        if code == "not_active":
            return primary is not None and primary["state"] != "active"
        if code == "external_ref_changed":
            known = {row for one in self.checker.known[ids] for row in (one.primary.ref, one.duplicate.ref)}
            return primary is not None and primary["external_ref"] not in known
        if code in ("external_ref_conflict", "contact_refused"):
            # A group is refused as a whole, for any of its references, or where nobody may have an email twice.
            refs = {
                one.duplicate.ref
                for other in self.checker.known
                if other[0] == ids[0]
                for one in self.checker.known[other]
            }
            holders = organisation.contacts.find([("external_ref", sorted({reference, *refs}))])
            stuck = not organisation.stuck_references.isdisjoint(refs) or self.checker.fake_devrev.unique_emails
            return stuck or any(one["id"] not in ids for one in holders)
        if code == "not_handed_back":
            things = [self.table(item["id"]).get(item["id"]) for item in entry["left"]]
            people = [one["id"] for thing in things if thing for role in USER_LISTS for one in thing.get(role, ())]
            return any(":revu/" in one and not organisation.alive(one) for one in people)
        return False
