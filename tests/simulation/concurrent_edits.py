"""People and programs that change things in DevRev while a run is in progress."""

import itertools
import random
from typing import Any, List, Optional

from tests.fake.organisation import Record, org_id_of
from tests.simulation.world import short


class ConcurrentEdits:
    """What others do; each method does one thing and says what, or returns nothing where there is nothing to do it to."""

    def __init__(self, scenario: Any) -> None:
        self.scenario = scenario
        self.chance = random.Random(scenario.seed + 1)
        self.organisation = scenario.organisation
        self.numbers = itertools.count(1)

    def act(self) -> None:
        """Do one thing, if there is something to do it to."""
        kind = self.chance.choice(self.kinds())
        done = getattr(self, kind)()
        if done:
            self.scenario.counts["edits"] += 1
            self.scenario.trace(f"OTHERS {done}")

    def kinds(self) -> List[str]:
        kinds = ["comment", "ticket"]
        for kind, chance in (
            ("email", 0.4), ("reference", 0.3), ("lock", 0.3), ("delete", 0.3), ("merge", 0.3), ("newcomer", 0.4),
            ("visit", 0.4), ("delete_ticket", 0.3), ("give", 0.3), ("unlock", 0.4), ("new_name", 0.3),
            ("phone", 0.3), ("describe", 0.3),
        ):  # fmt: skip
            if self.scenario.draws.has(f"others: {kind}", chance):
                kinds.append(kind)
        return kinds

    def contact(self) -> Optional[Record]:
        """Return a contact that exists; mostly one that the run is about to merge."""
        there = [one for one in self.scenario.of_interest() if self.organisation.alive(one)]
        if not there or self.chance.random() < 0.2:
            there = [one for one in self.organisation.contacts if self.organisation.alive(one)]
        return self.organisation.contacts[self.chance.choice(there)] if there else None

    def work(self) -> Optional[str]:
        one = self.contact()
        found = self.organisation.works.find([("anyone", [one["id"]])]) if one else []
        return str(self.chance.choice(found)["id"]) if found else None

    def email(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, email=f"changed{next(self.numbers)}@example.com")
        return f"change the email of {short(one['id'])}"

    def reference(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, external_ref=f"hand-{next(self.numbers)}")
        return f"change the reference of {short(one['id'])}"

    def new_name(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, display_name="Another Name")
        return f"change the name of {short(one['id'])}"

    def phone(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        number = f"+4940{next(self.numbers):07}"
        self.organisation.change(one, phone_numbers=[*one.get("phone_numbers", ()), number])
        return f"give {short(one['id'])} the number {number}"

    def describe(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, description=f"Described {next(self.numbers)}.")
        return f"describe {short(one['id'])}"

    def lock(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        self.organisation.change(one, state=self.chance.choice(("locked", "deactivated")))
        return f"make {short(one['id'])} {one['state']}"

    def unlock(self) -> str:
        shut = [
            one
            for one in self.organisation.contacts.values()
            if one["state"] in ("locked", "deactivated")
        ]
        for one in shut:
            self.organisation.change(one, state="active")
        return f"unlock {len(shut)} contacts" if shut else ""

    def delete(self) -> str:
        one = self.contact()
        if one is None or any(one["id"] in pair for pair in self.organisation.merges):
            return ""
        self.organisation.delete_contact(one["id"])
        return f"delete {short(one['id'])}"

    def merge(self) -> str:
        one, other = self.contact(), self.contact()
        if one is None or other is None or one is other:
            return ""
        self.organisation.merge(one["id"], other["id"])
        return f"merge {short(other['id'])} into {short(one['id'])}"

    def newcomer(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        reference = self.chance.choice((None, f"user_n{next(self.numbers)}"))
        key = f"Y{next(self.numbers)}"
        org = (org_id_of(one) or "").rpartition("/")[2] or None
        made = self.organisation.add_contact(key, one.get("email"), reference, rev_org=org)
        return f"make {short(made)} with the email and rev org of {short(one['id'])}"

    def visit(self) -> str:
        wanted = [one for one in self.scenario.checker.plan.values() if one.new_ref]
        if not wanted:
            return ""
        return self.scenario.visit(self.chance.choice(wanted).ids)

    def comment(self) -> str:
        work = self.work()
        if work is None:
            return ""
        self.organisation.add_comment(work, f"later {next(self.numbers)}")
        self.organisation.change(self.organisation.works[work])
        return f"comment on {short(work)}"

    def ticket(self) -> str:
        one = self.contact()
        if one is None:
            return ""
        return (
            f"open {short(self.organisation.add_work(owned_by=[one['id']]))} for {short(one['id'])}"
        )

    def delete_ticket(self) -> str:
        work = self.work()
        if work is None:
            return ""
        self.organisation.delete_work(work)
        return f"delete {short(work)}"

    def give(self) -> str:
        work, one = self.work(), self.contact()
        if work is None or one is None:
            return ""
        self.organisation.give(work, self.chance.choice(("owned_by", "reported_by")), [one["id"]])
        return f"give {short(work)} to {short(one['id'])}"
