"""People and programs that change things in DevRev while a run is in progress."""

from __future__ import annotations

import itertools
import random
from typing import Any

from tests.fake.organisation import Record, Thing, org_id_of
from tests.simulation.world import short

CHANCES = {
    "email": 0.4, "reference": 0.3, "lock": 0.3, "delete": 0.3, "merge": 0.3, "newcomer": 0.4,
    "visit": 0.4, "delete_ticket": 0.3, "give": 0.3, "unlock": 0.4, "new_name": 0.3, "phone": 0.3,
    "describe": 0.3,
}  # fmt: skip
OF_NOBODY = ("visit", "unlock", "give")
OF_A_WORK = ("comment", "delete_ticket")


class ConcurrentEdits:
    """What others do; each method does one thing and says what, or nothing where it can't."""

    def __init__(self, scenario: Any) -> None:
        self.scenario = scenario
        self.chance = random.Random(scenario.seed + 1)
        self.organisation = scenario.organisation
        self.numbers = itertools.count(1)

    def act(self) -> None:
        draws = self.scenario.draws
        drawn = [kind for kind, chance in CHANCES.items() if draws.has(f"others: {kind}", chance)]
        kind = self.chance.choice(["comment", "ticket", *drawn])
        act = getattr(self, kind)
        if kind in OF_NOBODY:
            done = act()
        else:
            subject = self._work() if kind in OF_A_WORK else self._contact()
            done = act(subject) if subject else ""
        if done:
            self.scenario.counts["edits"] += 1
            self.scenario.trace(f"OTHERS {done}")

    def _alive(self, contacts: Any) -> list[str]:
        return [one for one in contacts if self.organisation.alive(one)]

    def _contact(self) -> Record | None:
        """Return a contact that exists; mostly one that the run is about to merge."""
        there = self._alive(self.scenario.of_interest())
        if not there or self.chance.random() < 0.2:
            there = self._alive(self.organisation.contacts)
        return self.organisation.contacts[self.chance.choice(there)] if there else None

    def _work(self) -> str | None:
        one = self._contact()
        found = self.organisation.works.find([("anyone", [one["id"]])]) if one else []
        return str(self.chance.choice(found)["id"]) if found else None

    def _change(self, one: Thing, **fields: Any) -> str:
        self.organisation.change(one, **fields)
        shown = ", ".join(f"{field} {value}" for field, value in fields.items())
        return f"give {short(one['id'])} {shown}"

    def email(self, one: Thing) -> str:
        return self._change(one, email=f"changed{next(self.numbers)}@example.com")

    def reference(self, one: Thing) -> str:
        return self._change(one, external_ref=f"hand-{next(self.numbers)}")

    def new_name(self, one: Thing) -> str:
        return self._change(one, display_name="Another Name")

    def phone(self, one: Thing) -> str:
        number = f"+4940{next(self.numbers):07}"
        return self._change(one, phone_numbers=[*one.get("phone_numbers", ()), number])

    def describe(self, one: Thing) -> str:
        return self._change(one, description=f"Described {next(self.numbers)}.")

    def lock(self, one: Thing) -> str:
        return self._change(one, state=self.chance.choice(("locked", "deactivated")))

    def unlock(self) -> str:
        contacts = self.organisation.contacts.values()
        shut = [one for one in contacts if one["state"] in ("locked", "deactivated")]
        for one in shut:
            self.organisation.change(one, state="active")
        return f"unlock {len(shut)} contacts" if shut else ""

    def delete(self, one: Thing) -> str:
        if any(one["id"] in pair for pair in self.organisation.merges):
            return ""
        self.organisation.delete_contact(one["id"])
        return f"delete {short(one['id'])}"

    def merge(self, one: Thing) -> str:
        other = self._contact()
        if other is None or one is other:
            return ""
        self.organisation.merge(one["id"], other["id"])
        return f"merge {short(other['id'])} into {short(one['id'])}"

    def newcomer(self, one: Thing) -> str:
        reference = self.chance.choice((None, f"user_n{next(self.numbers)}"))
        key = f"Y{next(self.numbers)}"
        org = (org_id_of(one) or "").rpartition("/")[2] or None
        made = self.organisation.add_contact(key, one.get("email"), reference, rev_org=org)
        return f"make {short(made)} with the email and rev org of {short(one['id'])}"

    def visit(self) -> str:
        wanted = [ids for ids, one in self.scenario.checker.plan.items() if one.new_ref]
        return self.scenario.visit(self.chance.choice(wanted)) if wanted else ""

    def ticket(self, one: Thing) -> str:
        work = self.organisation.add_work(owned_by=[one["id"]])
        return f"open {short(work)} for {short(one['id'])}"

    def comment(self, work: str) -> str:
        self.organisation.add_comment(work, f"later {next(self.numbers)}")
        self.organisation.change(self.organisation.works[work])
        return f"comment on {short(work)}"

    def delete_ticket(self, work: str) -> str:
        self.organisation.delete_work(work)
        return f"delete {short(work)}"

    def give(self) -> str:
        work, one = self._work(), self._contact()
        if work is None or one is None:
            return ""
        self.organisation.give(work, self.chance.choice(("owned_by", "reported_by")), [one["id"]])
        return f"give {short(work)} to {short(one['id'])}"
