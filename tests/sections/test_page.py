"""The page of a report: it shows what is true of each pair, and nothing in a report is executed.

It is opened in a headless Chromium.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

import merge_contacts as tool
from merge_contacts import ADVICE, REPORT_PAGE, STATE_WORDS, State
from tests.sections.test_savepoint import pair_of

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason=f"none of {', '.join(NAMES)} on PATH")
HOSTILE = [
    "</script><script>document.title='pwned';console.log('pwned')</script>",
    "<!--<script>",
    "]]><img src=x onerror=\"document.title='pwned'\">",
    "<img src=https://leak.example.com/i.png onerror=alert(1)>",
    "<svg onload=alert(1)><style>@import 'https://leak.example.com/s.css'</style>",
    "javascript:alert(1)",
    "\"'`><b onmouseover=alert(1)>",
    "&lt;b&gt; &amp; %3Cscript%3E ${1+1} {{1+1}} $& \\u003c \\",
    "__proto__",
    "__REPORT" + "__ __HEADLINE__ __HASH__",
    "\u202egnp.exe",
    "nul\x00 esc\x1b[31m\u2028para zero\u200bwidth\ufeff tag\U000e0041",
    "lone \ud800 half",
    "W" * 300,
]
# What has to be seen instead of characters that are invisible or turn the text round.
SEEN = {
    HOSTILE[10]: "\\u{202e}gnp.exe",
    HOSTILE[11]: "nul\\u{0} esc\\u{1b}[31m\\u{2028}para zero\\u{200b}width\\u{feff} tag\\u{e0041}",
    HOSTILE[12]: "lone \\u{d800} half",
}
Report = Dict[str, Any]


# -- reports, made of the module's own entries ---------------------------------------------------


def entry(number: int, state: State, code: str = "", **fields: Any) -> Report:
    error = f"said for pair {number}" if code else ""
    return tool.merge_entry(pair_of(number, state, code=code, error=error, **fields), None)


def report_of(merged: int = 1, kind: str = "merge", **lists: List[Report]) -> Report:
    run = {"kind": kind, "headline": f"{merged} of {merged} merged"}
    run["start"] = "2025-01-31T12:00:00Z"
    names = ("failed_merges", "unfinished_merges", "settled", "cancelled", "skipped_groups")
    summary = {"successful_merges": merged, **dict.fromkeys(names, 0)}
    merges = [entry(number, State.DONE, seconds=number % 13) for number in range(merged)]
    return {"run": run, "summary": summary, "successful_merges": merges, **lists}


def page_of(report: Report) -> bytes:
    run = report["run"]
    return b"".join(tool.page_chunks(run["kind"], run["headline"], [tool.to_json(report)]))


def with_texts(value: Any, text: str) -> Any:
    """Return a report in which every text but a code and a time is another one."""
    if isinstance(value, dict):
        return {name: one if name in KEPT else with_texts(one, text) for name, one in value.items()}
    if isinstance(value, list):
        return [with_texts(one, text) for one in value]
    return text if isinstance(value, str) else value


KEPT = {"code", "kind", "start", "requested", "finished", "state", "headline"}
LEFT = [{"id": "i", "display_id": "TKT-7", "title": "A title", "role": "owned_by"}]
ANA = {"display_name": "Ana", "external_ref": "user_a"}
EVERY_LIST = {
    "failed_merges": [entry(20, State.FAILED, "count_mismatch")],
    "unfinished_merges": [
        entry(21, State.MERGED, "external_ref_conflict"),
        entry(22, State.VERIFYING, "left_behind", left_behind=LEFT),
        entry(23, State.ACKNOWLEDGED, "merge_not_confirmed"),
    ],
    "settled": [entry(24, State.SETTLED, "left_behind", reference_not_set="user_24")],
    "cancelled": [entry(25, State.CANCELLED, "merge_refused")],
    "skipped": [
        {
            "email": "two@example.com", "code": "several_user_refs", "reason": "Two references.",
            "advice": "Choose.", "contacts": [ANA],
        }
    ],
    "look_alikes": [{"emails": ["a@example.com", "\uff41@example.com"]}],
    "warnings": [{"email": "w@example.com", "code": "names_differ", "warning": "Ada, Bo"}],
    "choices": [{"email": "c@example.com", "kept": "user_5", "lost": [{"external_ref": "user_6"}]}],
    "invalid_rows": [{"file": "contacts.csv", "line": 1017, "reason": "no count", "email": None}],
}  # fmt: skip


# -- without a browser ---------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing_and_makes_no_markup_of_data() -> None:
    assert len(REPORT_PAGE.splitlines()) <= 400 and REPORT_PAGE.isascii()
    assert max(map(len, REPORT_PAGE.splitlines())) <= 100
    for never in (
        r"https?://|@import|url\(",
        r"(inner|outer)HTML|insertAdjacent|\.write\b|\beval\b|Function",
        r"<(link|img|iframe|object|embed|form|base)\b|\s(src|on\w+)=",
    ):
        assert not re.search(never, REPORT_PAGE)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_the_page_holds_the_report_and_its_headline_and_no_text_ends_the_data(hostile: str) -> None:
    report = with_texts(report_of(**EVERY_LIST), hostile)
    report["run"]["headline"] = HOSTILE[0]
    text = page_of(report).decode("utf-8")
    data = text.partition('id="report">')[2].partition("</script>")[0]
    assert json.loads(data) == report and "<" not in data
    assert '<p class="lead">&lt;/script&gt;' in text and text.count("<script") == 2


# -- in a browser --------------------------------------------------------------------------------


class Shown:
    """A page in a headless Chromium, and what it has said and requested."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.path = page, path
        self.noise: List[str] = []
        page.on("console", lambda message: self.noise.append(message.text))
        page.on("pageerror", lambda error: self.noise.append(str(error)))
        page.on("dialog", lambda dialog: self.noise.append(dialog.message))
        page.on("request", self._note_request)

    def _note_request(self, request: Any) -> None:
        """Nothing but the page itself is to be requested."""
        if request.url != self.path.as_uri():
            self.noise.append(request.url)

    def open(self, page: Any) -> "Shown":
        self.path.write_bytes(page if isinstance(page, bytes) else page_of(page))
        self.noise.clear()
        self.page.goto(self.path.as_uri())
        return self

    def js(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def open_rows(self) -> None:
        self.js("document.querySelectorAll('.toggle button').forEach(one => one.click())")

    def texts(self, selector: str) -> List[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(self.js(f"{found}.filter(e => e.offsetParent).map(e => e.textContent)"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as one:
        yield one.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Shown]:
    page = browser.new_page()
    yield Shown(page, tmp_path / "merge_report_20250131_120000.html")
    page.close()


@needs_browser
def test_hostile_texts_are_shown_and_nothing_runs(shown: Shown) -> None:
    for text in HOSTILE:
        shown.open(with_texts(report_of(**EVERY_LIST), text)).open_rows()
        assert shown.js("document.title").startswith("Contact merge report 2025-01-31")
        assert shown.js("document.querySelectorAll('script').length") == 2
        made = "document.querySelectorAll('img, svg, link, base, form, iframe').length"
        assert not shown.js(made)
        names = shown.js("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
        assert names and not [name for name in names if name.startswith("on")]
        for section in ("#merged", "#failed", "#skipped", "#invalid-rows", "#choices", "#warnings"):
            assert SEEN.get(text, text) in shown.texts(section)[0], (section, text)
        assert shown.noise == []


@needs_browser
def test_these_checks_would_notice_and_the_policy_blocks_what_gets_in(shown: Shown) -> None:
    data = json.dumps("".join(HOSTILE[2:5])).replace("<", "\\u003c").replace("alert", "console.log")
    shown.open(f"<!doctype html><body><script>document.body.innerHTML = {data}</script>".encode())
    shown.page.wait_for_function("document.title === 'pwned'")
    assert "https://leak.example.com/i.png" in shown.noise and "1" in shown.noise
    evil = b"<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    shown.open(page_of(report_of()).replace(b"</main>", b"</main>" + evil))
    assert shown.js("document.title").endswith("1 of 1 merged")
    assert "violates the following Content Security Policy" in str(shown.noise)


@needs_browser
def test_each_list_has_its_section_with_what_happened_and_what_to_do(shown: Shown) -> None:
    shown.open(report_of(2, **EVERY_LIST)).open_rows()
    headings = [re.sub(r"\d+$", "", one) for one in shown.texts("h2")]
    assert headings == [
        "Unfinished", "Failed", "Cancelled", "Merged", "Settled", "Warnings", "Choices", "Skipped",
        "Look-alikes", "Invalid rows", "Run",
    ]  # fmt: skip
    for section, words in (
        ("failed", ADVICE["count_mismatch"]), ("failed", "said for pair 20failed, not merged"),
        ("cancelled", ADVICE["cancelled"]), ("unfinished", "TKT-7 A title owned by"),
        ("unfinished", "still to do: confirm the merge, set the reference, verify"),
        ("skipped", "Two references. Choose."), ("choices", "user_5"), ("invalid-rows", "1,017"),
        ("look-alikes", "\uff41@example.com"),
    ):  # fmt: skip
        assert words in shown.texts(f"#{section}")[0], (section, words)
    assert shown.noise == []


@needs_browser
def test_a_pair_is_called_what_it_is_and_its_reference_set_only_where_it_is(shown: Shown) -> None:
    pairs = [entry(number, state, "left_behind") for number, state in enumerate(STATE_WORDS)]
    shown.open(report_of(0, failed_merges=pairs)).open_rows()
    found = shown.texts("#failed .details")
    assert len(found) == len(STATE_WORDS)
    for (number, state), details in zip(enumerate(STATE_WORDS), found):
        assert f"State{STATE_WORDS[state]}" in details
        is_set = state in (State.VERIFYING, State.DONE, State.SETTLED)
        assert (f"REVU-P{number} \u2192 user_{number}" in details) == is_set
        assert (f"user_{number}not set" in details) == (not is_set)


@needs_browser
def test_two_thousand_rows_sort_and_search_and_all_are_printed(shown: Shown) -> None:
    shown.open(report_of(2000, failed_merges=[entry(9000, State.FAILED, "not_found")]))
    emails = "#merged tbody .email"
    assert len(shown.texts(emails)) == 200
    shown.page.click("#merged .more button")
    assert len(shown.texts(emails)) == 400 and "400 of 2,000 shown" in shown.texts("#merged")[0]
    for order, first in (("ascending", "p0@"), ("descending", "p1999@")):
        shown.page.click("#merged th.email button")
        assert shown.texts(emails)[0].startswith(first)
        assert shown.js("document.querySelector('#merged th.email').ariaSort") == order
    shown.page.locator("#merged th button").nth(5).click()
    seconds = [float(one) for one in shown.texts("#merged td:nth-child(7)")]
    assert seconds == sorted(seconds) and len(seconds) == 200
    for words, found in (("P1234@ user_1234", 1), ("p9000@", 1), ("no such thing", 0)):
        shown.page.fill("input", words)
        assert len(shown.texts("tbody .email")) == found
        assert f"{found} found" in shown.texts(".tools")[0]
    shown.page.fill("input", "")
    shown.js("addEventListener('beforeprint', () => { n = document.querySelectorAll('td.email') })")
    assert shown.page.pdf().count(b"/Type /Page\n") > 5
    assert shown.js("n.length") == 2001 and len(shown.texts(emails)) == 200
    assert shown.noise == []


@needs_browser
def test_a_phone_scrolls_in_one_direction(shown: Shown) -> None:
    shown.page.set_viewport_size({"width": 360, "height": 800})
    shown.open(with_texts(report_of(**EVERY_LIST), "W" * 300)).open_rows()
    assert shown.js("document.scrollingElement.scrollWidth") <= 360


@needs_browser
def test_the_page_of_an_undo_shows_what_came_back(shown: Shown) -> None:
    progress = tool.UndoProgress("reports/x", "done", "", 0, contact="new", display_id="REVU-900")
    undone = tool.undo_entry(pair_of(1, State.UNDONE, undo=progress))
    undone["restored"] = LEFT
    undone["left"] = [{**LEFT[0], "display_id": "TKT-8", "why": "given to others"}]
    undone["not_restored"] = [{"what": "created_by", "why": "the primary stays the creator"}]
    refused = pair_of(2, State.DONE, code="external_ref_changed", error="set by others")
    report = {**report_of(0, "undo"), "undone": [undone], "failed": [tool.undo_entry(refused)]}
    report["summary"] = {"undone": 1, "failed": 1}
    shown.open(report).open_rows()
    (text,) = shown.texts("#undone")
    for words in ("REVU-900", "TKT-7 A title", "TKT-8", "given to others", "Created by: the pri"):
        assert words in text, words
    assert f"set by others{STATE_WORDS[State.DONE]}" in shown.texts("#failed")[0]
    assert shown.texts("h1") == ["Contact undo report"] and shown.noise == []


@needs_browser
def test_without_javascript_the_headline_is_there(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.set_content(page_of(report_of(3)).decode("utf-8"))
    text = page.inner_text("main")
    page.close()
    assert "3 of 3 merged" in text and "needs JavaScript" in text


@needs_browser
def test_what_a_killed_run_did_not_know_is_left_out(shown: Shown) -> None:
    report = {**report_of(2), **dict.fromkeys(("skipped", "look_alikes", "warnings", "choices"))}
    report["run"].update(stopped="killed", end=None, exit_code=None, requests=None)
    report["run"]["warnings"] = ["the token may not list incidents"]
    report["summary"].update(dict.fromkeys(("contacts_read", "invalid_rows", "left")))
    (text,) = shown.open(report).texts("main")
    assert "Stopped early: killed" in text and "may not list incidents" in text
    assert not re.search(r"undefined|NaN|null|\[object", text)
    assert shown.noise == []
