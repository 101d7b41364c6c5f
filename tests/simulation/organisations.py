"""Organisations to play scenarios in, and ways in which DevRev serves them, from a seed."""

from __future__ import annotations

import math
import random
from typing import Any, Sequence

from tests.fake.organisation import ALL_WORK_KINDS, HALF_EMOJI, WORK_KINDS, Organisation
from tests.fake.trouble import STAYS
from tests.fake.world import World
from tests.simulation.expected import people_of
from tests.simulation.invariants import LISTED


class Draws:
    """Draws, of which each kind is on or off for a whole scenario, so that scenarios differ."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calm = self.random.random() < 0.1
        self._on: dict[str, bool] = {}

    def has(self, kind: str, chance: float = 0.3) -> bool:
        """Return whether this scenario knows such things."""
        if kind not in self._on:
            drawn = self.random.random() < chance
            self._on[kind] = drawn and not self.calm
        return self._on[kind]

    def drawn(self) -> list[str]:
        return [kind for kind, on in self._on.items() if on]

    def somewhen(self, least: float, most: float) -> float:
        """Draw seconds, as often short as long."""
        return float(least * (most / least) ** self.random.random())


# References of the contacts of one email: R is DevRev's, u the application's, - none of the two.
SHAPES = (
    ("Ru", 12), ("RRu", 3), ("RRRu", 1), ("RRRRu", 1), ("Ruu", 2), ("RRuu", 1), ("RR", 2),
    ("uu", 1), ("R", 1), ("u", 1), ("Ru-", 1),
)  # fmt: skip
SHARED = ("support", "Info+berlin", "noreply", "sales", "test", "billing", "N-A")


class OrganisationBuilder:
    HUGE = 600  # tickets at most: some pages, and more than fit into a call for many contacts

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.chance = draws.random
        self.organisation = Organisation()
        self.keys = iter(range(1, 1 << 20))
        self.huge = draws.has("huge", 0.02)
        self.kinds = ALL_WORK_KINDS if draws.has("works of other kinds", 0.1) else WORK_KINDS
        self.half = HALF_EMOJI if draws.has("half emojis", 0.1) else ""

    def build(self) -> Organisation:
        organisation, draws, chance = self.organisation, self.draws, self.chance
        if draws.has("references unique in the organisation", 0.15):
            organisation.unique_references = "organisation"
        if draws.has("merges join phone numbers", 0.2):
            organisation.merge_joins = ("phone_numbers",)
        keep = draws.has("unverified contacts keep references", 0.02)
        organisation.unverified_keep_references = keep
        organisation.visitors_verified = not draws.has("visitors are unverified", 0.1)
        shapes, weights = zip(*SHAPES)
        contacts: list[str] = []
        for number in range(chance.randint(3, 12)):
            (shape,) = chance.choices(shapes, weights)
            local = f"person{number}"
            if draws.has("shared mailboxes", 0.15) and chance.random() < 0.3:
                local = chance.choice(SHARED)
            contacts += self._group(f"{local}@{number}.example.com", shape)
        for _ in range(chance.randint(0, len(contacts))):
            self._shared(chance.sample(contacts, min(len(contacts), chance.randint(1, 3))))
        return organisation

    def _group(self, email: str, shape: str) -> list[str]:
        draws, chance = self.draws, self.chance
        two_orgs = draws.has("two rev orgs", 0.1) and chance.random() < 0.3
        people = []
        for place, letter in enumerate(shape):
            key = str(next(self.keys))
            reference = {"R": None, "u": f"user_{key}", "-": f"crm-{key}"}[letter]
            written = email.title() if chance.random() < 0.1 else email
            org: str | None = "OTHER" if two_orgs and place else "ACME"
            if draws.has("no rev org", 0.06) and chance.random() < 0.2:
                org = None
            state = chance.choice(("locked", "deactivated")) if chance.random() < 0.02 else "active"
            day = f"2024-01-{chance.randint(1, 28):02d}T{chance.randint(0, 23):02d}:00:00.000Z"
            where = (None, org, state, day, self._is_verified(letter))
            fields = self._fields(key)
            people.append(self.organisation.add_contact(key, written, reference, *where, **fields))
            self._works(people[-1])
        return people

    def _is_verified(self, letter: str) -> bool:
        least = 0.3 if letter == "R" else 0.1
        return not (self.draws.has("unverified contacts", 0.2) and self.chance.random() < least)

    def _fields(self, key: str) -> dict[str, Any]:
        chance, found = self.chance, {}
        half = self.half if chance.random() < 0.2 else ""
        if self.draws.has("fields", 0.4):
            if chance.random() < 0.5:
                shared = ["+49301234567"] if chance.random() < 0.3 else []
                found["phone_numbers"] = [f"+4930{int(key):07}", *shared]
            if chance.random() < 0.4:
                found["description"] = f"Customer {key}.{half}"
            if chance.random() < 0.3:
                found["full_name"] = f"Person {key}{half}"
        if self.draws.has("several references", 0.05) and chance.random() < 0.1:
            found["external_refs"] = [f"other-{key}"]
        return found

    def _works(self, contact: str) -> None:
        most = self.HUGE if self.huge else self.chance.choice((0, 0, 1, 2, 5))
        self.huge = False
        for _ in range(self.chance.randint(most // 2, most)):
            roles = self.chance.choices(
                ("owned_by", "created_by", "reported_by"), k=self.chance.randint(1, 3)
            )
            more = {role: contact if role == "created_by" else [contact] for role in roles}
            more["comments"] = self.chance.choice((0, 0, 1, 3)) if most < 100 else 0
            more["title"] = f"A title{self.half}" if self.half else None
            self.organisation.add_work(kind=self.chance.choice(self.kinds), **more)
        if self.chance.random() < 0.3:
            people = [contact, self.organisation.dev_user["id"]]
            self.organisation.add_conversation(people, comments=1)

    def _shared(self, people: Sequence[str]) -> None:
        if self.chance.random() < 0.3:
            self.organisation.add_conversation(people, comments=self.chance.randint(0, 2))
        else:
            role = self.chance.choice(("owned_by", "reported_by"))
            self.organisation.add_work(**{role: people}, comments=self.chance.randint(0, 2))


def quota_of(draws: Draws) -> Any:
    """Draw a quota of DevRev's: calls, and the seconds of a window; None for none."""
    chance = draws.random
    if chance.random() >= 0.4:
        return None
    calls = chance.choice((1, 2, 3, 5, 8, 20, 60, 200, 1000))
    window = chance.choice((6.0, 30.0, 60.0, 300.0))
    least = 1 if draws.has("tiny quota", 0.03) else math.ceil(window * 16 / LISTED)
    return max(calls, least), window


class Switches:
    """How DevRev behaves for as long as a scenario lasts."""

    def __init__(self, world: World, draws: Draws) -> None:
        self.world, self.draws, self.chance = world, draws, draws.random
        self.organisation = world.organisation

    def perhaps(self, kind: str, chance: float, **choices: Sequence[Any]) -> bool:
        """Set each of these switches to one of its values, where the scenario has such a thing."""
        if not self.draws.has(kind, chance):
            return False
        for name, values in choices.items():
            setattr(self.world, name, self.chance.choice(values))
        return True

    def set_first(self) -> None:
        chance, draws, world, perhaps = self.chance, self.draws, self.world, self.perhaps
        contacts = self.organisation.contacts
        world.in_progress = chance.choice((200, 200, 400, 409))
        world.unique_emails = draws.has("unique emails", 0.04)
        perhaps("few ids a filter", 0.1, max_ids=(1, 3, 10))
        if draws.has("others spend quota", 0.15) and world.quota:
            world.quota.others = world.quota.limit // 3
        if draws.has("windows roll", 0.1) and world.quota:
            world.quota.rolls = True
        world.quota_headers = not draws.has("no quota headers", 0.04)
        perhaps("waits told elsewhere", 0.1, retry_after=("header", "body", "neither"))
        answers = ("200-empty", "200-other", "200-list", "202", "202-empty", "204")
        perhaps("other acknowledgements", 0.15, merge_answer=answers)
        for_good = ("locked", "stale")
        odd = [one for one in world.ODD if one not in for_good]
        if draws.has("polls that tell nothing", 0.12):
            if chance.random() < 0.6:
                world.gone = chance.choice(odd)
            else:
                world.gone_of = {
                    one: chance.choice(odd) for one in contacts if chance.random() < 0.3
                }
        elif draws.has("polls that show it as before", 0.03):
            shown = {one: chance.choice(for_good) for one in contacts if chance.random() < 0.2}
            world.gone_of = shown
        is_drawn = perhaps(
            "unverified contacts",
            0.2,
            verified_shown=("hidden", "shown", "null", "mixed"),
            verified_filter=("accepted", "accepted", "400", "403"),
            unverified_merge=("works", "works", "never", "400", "403", "409"),
        )
        if is_drawn and chance.random() < 0.2:
            world.verified_merge = chance.choice(("never", "400", "403", "409"))
        perhaps("empty pages", 0.08, empty_pages=(1, 2, 3))
        if perhaps("short pages", 0.08, largest_page=(1, 3, 10)):
            world.trailing_page = chance.random() < 0.5
        long = draws.has("works of other kinds", 0.1) and chance.random() < 0.6
        world.long_work_types = long
        if perhaps("kinds that are hidden", 0.03, hidden_kinds_answer=("403", "left out")):
            world.hidden_kinds = ("issue",)
        world.email_ignores_case = draws.has("emails in any case", 0.3)
        world.deleted_listed = draws.has("deleted contacts are listed", 0.1)
        has_state = draws.has("deleted contacts have a state", 0.2)
        world.deleted_contacts = "state" if has_state else "404"
        hidden = (("phone_numbers",), ("external_refs", "description"), ("full_name",))
        perhaps("fields that are hidden", 0.05, hidden_fields=hidden)
        fields = (("phone_numbers",), ("description",), ("display_name",))
        statuses = (400, 403, 409)
        perhaps("fields that can't be set", 0.06, refused_fields=fields, refused_status=statuses)

    def set_others(self) -> set[str]:
        """Draw what organisations do with merged contacts, references, pages and kinds of works.

        Return the contacts that no request may name.
        """
        chance, draws, world, perhaps = self.chance, self.draws, self.world, self.perhaps
        stays = [one for one in STAYS if one not in ("", "as-before")]
        if perhaps("merged contacts stay", 0.1, stays=stays) and chance.random() < 0.6:
            world.gone = "stays"
        if perhaps("references come back", 0.06, puts_back=(1, 1, math.inf)):
            world.puts_back_after = chance.choice((0.0, draws.somewhen(0.01, 30.0)))
        perhaps("references never move", 0.03, reference_updates=("400", "403", "409"))
        moves = draws.has("merges move references", 0.08)
        self.organisation.merge_moves_reference = moves
        if draws.has("unchanged updates are refused", 0.08):
            world.unchanged_updates = 400
        if draws.has("replicas lag", 0.08):
            world.reference_lag = draws.somewhen(0.5, 20.0)
        busy = (400, 409, 423, 425)
        perhaps("few merges at a time", 0.1, merge_jobs=(1, 1, 2), busy_status=busy)
        if draws.has("another program", 0.06) and world.quota:
            share = chance.choice((0.5, 0.85, 0.95))
            world.quota.others = max(world.quota.others, math.ceil(share * world.quota.limit))
        if perhaps("pages that come again", 0.05, paging=("again", "overlap", "offset")):
            # A page that comes again in each reading can't be told from the list.
            world.paging_times = 1 if world.paging == "again" else chance.choice((1, 2, 10))
            world.largest_page = chance.choice((2, 3, 10))
        if draws.has("cursors that expire", 0.04):
            world.cursor_life = draws.somewhen(1.0, 300.0)
            world.largest_page = chance.choice((2, 3, 10))
        answers = ("400", "400-bare", "403")
        if perhaps("kinds that are unknown", 0.06, unknown_kinds_answer=answers):
            world.long_work_types, world.unknown_kinds = True, ("incident",)
        if not draws.has("a firewall", 0.04):
            return set()
        contacts = self.organisation.contacts
        emails = sorted(str(one.get("email")) for one in contacts.values())
        world.firewall = [chance.choice(emails)]
        world.firewall_status = chance.choice((403, 406))
        return {str(one["id"]) for one in contacts.find([("email", world.firewall)])}

    def restrict(self) -> set[str]:
        """Draw objects that the token may not read or write; return who has to do with them."""
        chance, draws, world = self.chance, self.draws, self.world
        trouble: set[str] = set()
        if draws.has("contacts that are forbidden", 0.06):
            contacts = sorted(self.organisation.contacts)
            trouble.update(chance.sample(contacts, chance.randint(1, 2)))
            world.restricted = sorted(trouble)
        elif draws.has("objects that are forbidden", 0.08):
            organisation = self.organisation
            things = [*organisation.works.values(), *organisation.conversations.values()]
            chosen = chance.sample(things, min(len(things), chance.randint(1, 2)))
            kind = chance.choice(("restricted", "restricted_timelines", "restricted_writes"))
            setattr(world, kind, sorted(str(one["id"]) for one in chosen))
            if kind != "restricted_writes":
                for thing in chosen:
                    trouble.update(people_of(thing))
        world.restricted_in_lists = "shown"
        if world.restricted:
            world.restricted_in_lists = chance.choice(("shown", "shown", "left out", "403"))
        world.names_object_ids = chance.random() < 0.7
        return trouble


def set_switches(world: World, draws: Draws) -> set[str]:
    """Draw how DevRev behaves; return the contacts that the token has trouble with for good."""
    switches = Switches(world, draws)
    switches.set_first()
    return switches.set_others() | switches.restrict()
