"""The page of a report: it shows what is true of each pair, and nothing in a report is executed.

The page is opened in a headless Chromium, spoken to over its debugging pipe.
"""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

import merge_contacts as tool
from merge_contacts import ADVICE, REPORT_PAGE, STATE_WORDS, State
from tests.sections.test_savepoint import pair_of

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or os.name != "posix",
    reason=f"none of {', '.join(NAMES)} on PATH, or no POSIX pipes to speak to it",
)
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


class Browser:
    """A headless Chromium on its debugging pipe, and what its page has said and requested."""

    def __init__(self, profile: str) -> None:
        # The browser reads from descriptor 3 and writes to 4.
        launch = (
            "import fcntl, os, sys\n"
            "high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3]]\n"
            "os.dup2(high[0], 3); os.dup2(high[1], 4)\n"
            "os.execv(sys.argv[3], sys.argv[3:])\n"
        )
        child_in, self.out = os.pipe()
        self.back, child_out = os.pipe()
        command = [sys.executable, "-c", launch, str(child_in), str(child_out), str(CHROMIUM)]
        command += [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(child_in, child_out), **quiet)
        os.close(child_in)
        os.close(child_out)
        self.buffer, self.number, self.session, self.url = b"", 0, "", ""
        self.events: List[Report] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self.out)
        os.close(self.back)

    def message(self, deadline: float) -> Any:
        while b"\0" not in self.buffer:
            patience = max(0, deadline - time.monotonic())
            assert select.select([self.back], [], [], patience)[0], "no answer from the browser"
            chunk = os.read(self.back, 1 << 20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message.decode("utf-8"))

    def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        request: Report = {"id": self.number, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        data = json.dumps(request).encode("ascii") + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        deadline = time.monotonic() + 30
        while True:
            answer = self.message(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url="about:blank")
        self.events, self.url = [], path.as_uri()
        self.call("Page.navigate", url=self.url)
        deadline = time.monotonic() + 30
        ready = f"location.href === {json.dumps(self.url)} && document.readyState === 'complete'"
        while not self.js(ready):
            assert time.monotonic() < deadline, "the page was not loaded in time"

    def js(self, expression: str) -> Any:
        how = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def texts(self, selector: str) -> List[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(self.js(f"{found}.filter(e => e.offsetParent).map(e => e.textContent)"))

    def noise(self) -> List[Report]:
        """Console messages, errors, dialogs, and requests for anything but the page itself."""
        self.js("new Promise(done => setTimeout(done, 50))")
        loud = ("consoleAPICalled", "exceptionThrown", "entryAdded", "javascriptDialogOpening")
        found = [one for one in self.events if str(one.get("method")).endswith(loud)]
        for event in self.events:
            asks = event.get("method") == "Network.requestWillBeSent"
            if asks and event["params"]["request"]["url"] not in (self.url, "about:blank"):
                found.append(event)
        return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    profile = tempfile.mkdtemp()
    browser = Browser(profile)
    yield browser
    browser.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., Browser]:
    def show(page: Any) -> Browser:
        path = tmp_path / "merge_report_20250131_120000.html"
        path.write_bytes(page if isinstance(page, bytes) else page_of(page))
        browser.open(path)
        return browser

    return show


OPEN_ALL = "document.querySelectorAll('.toggle button').forEach(one => one.click())"


@needs_browser
def test_hostile_texts_are_shown_and_nothing_runs(show: Any) -> None:
    for text in HOSTILE:
        page = show(with_texts(report_of(**EVERY_LIST), text))
        page.js(OPEN_ALL)
        assert page.js("document.title").startswith("Contact merge report 2025-01-31")
        assert page.js("document.querySelectorAll('script').length") == 2
        assert not page.js("document.querySelectorAll('img, svg, link, base, form, iframe').length")
        names = page.js("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
        assert names and not [name for name in names if name.startswith("on")]
        for section in ("#merged", "#failed", "#skipped", "#invalid-rows", "#choices", "#warnings"):
            assert SEEN.get(text, text) in page.texts(section)[0], (section, text)
        assert page.noise() == []


@needs_browser
def test_these_checks_would_notice_and_the_policy_blocks_what_gets_in(show: Any) -> None:
    data = json.dumps("".join(HOSTILE[2:5])).replace("<", "\\u003c").replace("alert", "console.log")
    page = show(f"<!doctype html><body><script>document.body.innerHTML = {data}</script>".encode())
    noise = json.dumps(page.noise())
    assert page.js("document.title") == "pwned"
    assert "leak.example.com/i.png" in noise and "consoleAPICalled" in noise
    evil = b"<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    page = show(page_of(report_of()).replace(b"</main>", b"</main>" + evil))
    assert page.js("document.title").endswith("1 of 1 merged")
    assert "violates the following Content Security Policy" in json.dumps(page.noise())


@needs_browser
def test_each_list_has_its_section_with_what_happened_and_what_to_do(show: Any) -> None:
    page = show(report_of(2, **EVERY_LIST))
    page.js(OPEN_ALL)
    headings = [re.sub(r"\d+$", "", one) for one in page.texts("h2")]
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
        assert words in page.texts(f"#{section}")[0], (section, words)
    assert page.noise() == []


@needs_browser
def test_a_pair_is_called_what_it_is_and_its_reference_set_only_where_it_is(show: Any) -> None:
    pairs = [entry(number, state, "left_behind") for number, state in enumerate(STATE_WORDS)]
    page = show(report_of(0, failed_merges=pairs))
    page.js(OPEN_ALL)
    found = page.texts("#failed .details")
    for (number, state), details in zip(enumerate(STATE_WORDS), found):
        assert f"State{STATE_WORDS[state]}" in details
        is_set = state in (State.VERIFYING, State.DONE, State.SETTLED)
        assert (f"REVU-P{number} \u2192 user_{number}" in details) == is_set
        assert (f"user_{number}not set" in details) == (not is_set)
    assert len(found) == len(STATE_WORDS)


@needs_browser
def test_two_thousand_rows_sort_and_search_and_all_are_printed(show: Any) -> None:
    page = show(report_of(2000, failed_merges=[entry(9000, State.FAILED, "not_found")]))
    emails = "#merged tbody .email"
    assert len(page.texts(emails)) == 200
    page.js("document.querySelector('#merged .more button').click()")
    assert len(page.texts(emails)) == 400 and "400 of 2,000 shown" in page.texts("#merged")[0]
    for order, first in (("ascending", "p0@"), ("descending", "p1999@")):
        page.js("document.querySelector('#merged th.email button').click()")
        assert page.texts(emails)[0].startswith(first)
        assert page.js("document.querySelector('#merged th.email').ariaSort") == order
    page.js("document.querySelectorAll('#merged th button')[5].click()")
    seconds = [float(one) for one in page.texts("#merged td:nth-child(7)")]
    assert seconds == sorted(seconds) and len(seconds) == 200
    for words, found in (("P1234@ user_1234", 1), ("p9000@", 1), ("no such thing", 0)):
        page.js(f"find = document.querySelector('input'), find.value = {json.dumps(words)}")
        page.js("find.dispatchEvent(new Event('input'))")
        assert len(page.texts("tbody .email")) == found
        assert f"{found} found" in page.texts(".tools")[0]
    page.js("find.value = '', find.dispatchEvent(new Event('input'))")
    page.js("addEventListener('beforeprint', () => { n = document.querySelectorAll('td.email') })")
    assert base64.b64decode(page.call("Page.printToPDF")["data"]).count(b"/Type /Page\n") > 5
    assert page.js("n.length") == 2001 and len(page.texts(emails)) == 200
    assert page.noise() == []


@needs_browser
def test_a_phone_scrolls_in_one_direction(show: Any) -> None:
    page = show(with_texts(report_of(**EVERY_LIST), "W" * 300))
    metrics = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **metrics)
    try:
        page.js(OPEN_ALL)
        assert page.js("innerWidth") == 360
        assert page.js("document.scrollingElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_the_page_of_an_undo_shows_what_came_back(show: Any) -> None:
    progress = tool.UndoProgress("reports/x", "done", "", 0, contact="new", display_id="REVU-900")
    undone = tool.undo_entry(pair_of(1, State.UNDONE, undo=progress))
    undone["restored"] = LEFT
    undone["left"] = [{**LEFT[0], "display_id": "TKT-8", "why": "given to others"}]
    undone["not_restored"] = [{"what": "created_by", "why": "the primary stays the creator"}]
    failed = tool.undo_entry(
        pair_of(2, State.DONE, code="external_ref_changed", error="set by others")
    )
    report = {**report_of(0, "undo"), "undone": [undone], "failed": [failed]}
    report["summary"] = {"undone": 1, "failed": 1}
    page = show(report)
    page.js(OPEN_ALL)
    (text,) = page.texts("#undone")
    for words in ("REVU-900", "TKT-7 A title", "TKT-8", "given to others", "Created by: the pri"):
        assert words in text, words
    assert f"set by others{STATE_WORDS[State.DONE]}" in page.texts("#failed")[0]
    assert page.texts("h1") == ["Contact undo report"] and page.noise() == []


@needs_browser
def test_without_javascript_the_headline_is_there_and_what_a_killed_run_did_not_know_is_not(
    show: Any, browser: Browser
) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        text = "".join(show(report_of(3)).texts("main"))
        assert "3 of 3 merged" in text and "needs JavaScript" in text
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    report = {**report_of(2), **dict.fromkeys(("skipped", "look_alikes", "warnings", "choices"))}
    report["run"].update(stopped="killed", end=None, exit_code=None, requests=None)
    report["run"]["warnings"] = ["the token may not list incidents"]
    report["summary"].update(dict.fromkeys(("contacts_read", "invalid_rows", "left")))
    (text,) = show(report).texts("main")
    assert "Stopped early: killed" in text and "may not list incidents" in text
    assert not re.search(r"undefined|NaN|null|\[object", text)
    assert browser.noise() == []
