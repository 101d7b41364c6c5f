"""The report page: every value is shown, none is executed, and it stays usable with many rows.

The page is opened in a headless Chromium, spoken to over its debugging pipe (no package needed for that).
"""

import base64
import hashlib
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

import pytest

from merge_contacts import CODES, Contact, Pair, plural, undo_entry

TEMPLATE = Path(__file__).resolve().parents[2] / "reports" / "template.html"
TOKEN = "__REPORT_JSON__"
CHROMIUM = next(
    (
        found
        for found in map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        if found
    ),
    None,
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or os.name != "posix",
    reason="no chromium, chromium-browser or google-chrome on PATH, or no POSIX pipes to speak to it",
)

HOSTILE = [
    "</script><script>document.title='pwned';console.log('pwned')</script>",
    "<!--",
    "<!--<script>",
    "]]><img src=x onerror=\"document.title='pwned'\">",
    "<img src=https://leak.example.com/i.png onerror=alert(1)>",
    "<svg onload=alert(1)><style>@import 'https://leak.example.com/s.css'</style>",
    "javascript:alert(1)",
    "\"'`><b onmouseover=alert(1)>",
    "&lt;b&gt; &amp; %3Cscript%3E ${1+1} {{1+1}} $& \\u003c \\",
    "__proto__",
    "constructor",
    "__REPORT" + "_JSON__",
    "\u202egnp.exe",
    "nul\x00 esc\x1b[31m bell\x07 line\nnext\u2028para\u2029zero\u200bwidth\ufeff tag\U000e0041",
    "lone \ud800 half",
    "W" * 300,
]
# What has to be seen instead of characters that are invisible or turn the text round.
SEEN = {
    "\u202egnp.exe": "\\u202egnp.exe",
    HOSTILE[13]: (
        "nul\\u0000 esc\\u001b[31m bell\\u0007 line\\nnext\\u2028para\\u2029zero\\u200bwidth\\ufeff tag\\u{e0041}"
    ),
    "lone \ud800 half": "lone \\ud800 half",
}


def embed(report, template=None):
    """The page for this report, as bytes, made the way the tool makes it."""
    text = json.dumps(report)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    template = template or TEMPLATE.read_text(encoding="utf-8")
    assert template.count(TOKEN) == 1
    return template.replace(TOKEN, text).encode("utf-8")


def moment(seconds):
    return f"2025-01-31T{12 + seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}+01:00"


def contact(number, reference):
    return {
        "id": f"don:identity:dvrv-us-1:devo/ACME:revu/{number}",
        "display_id": f"REVU-{number}",
        "display_name": f"Person {number}",
        "old_external_ref": reference,
        "tickets": number % 7,
    }


def pair(number):
    return {
        "email": f"person{number}@example.com",
        "primary": contact(2 * number, f"REVU-{2 * number}"),
        "duplicate": contact(2 * number + 1, f"user_{number}"),
        "new_external_ref": f"user_{number}",
        "backup": f"backups/person{number}@example.com/20250131_120000",
        "seconds": 1 + number % 13 / 10,
        "finished": moment(number),
    }


def sample(merged=5, failed=(), skipped=(), invalid=()):
    failed, skipped, invalid = list(failed), list(skipped), list(invalid)
    return {
        "run": {
            "kind": "merge",
            "version": "3.0.0",
            "headline": f"{merged} of {plural(merged + len(failed), 'pair')} merged",
            "plan_id": "c0ffee123456",
            "csv": [{"path": "contacts.csv", "sha256": "0123456789abcdef" * 4}],
            "quota": None,
            "base_url": "https://api.devrev.ai",
            "organisation": "dvrv-us-1:devo/ACME",
            "token_owner": {
                "id": "don:identity:1",
                "display_name": "Robin Example",
                "email": "robin@example.com",
            },
            "options": {"count_policy": "exact", "limit": None, "yes": True},
            "start": moment(0),
            "end": moment(merged + 30),
            "exit_code": 1 if failed else 0,
            "stopped": None,
            "requests": {"rev-users.get": 4 * merged, "rev-users.merge": merged},
            "requests_total": 5 * merged,
            "quota_wait_seconds": 12.5,
            "quota_waits": [{"start": moment(2), "end": moment(14)}],
        },
        "summary": {
            "contacts_read": 2 * merged,
            "invalid_rows": len(invalid),
            "pairs_planned": merged + len(failed),
            "already_merged": 0,
            "total_merges_attempted": merged + len(failed),
            "successful_merges": merged,
            "failed_merges": len(failed),
            "settled": 0,
            "cancelled": 0,
            "skipped_groups": len(skipped),
        },
        "successful_merges": [pair(number) for number in range(merged)],
        "failed_merges": failed,
        "unfinished_merges": [],
        "settled": [],
        "cancelled": [],
        "skipped": skipped,
        "look_alikes": [],
        "invalid_rows": invalid,
    }


def failure(number, code, **more):
    return {
        **pair(number),
        "state": "failed",
        "code": code,
        "error": f"said for pair {number}",
        "advice": CODES[code].advice if code in CODES else None,
        "reason": CODES[code].meaning if code in CODES else None,
        "left_behind": [],
        **more,
    }


def hostile():
    """Every hostile value in every text of a report."""
    report = sample(merged=0)
    for number, value in enumerate(HOSTILE):
        who = dict.fromkeys(
            ("id", "display_id", "display_name", "old_external_ref", "external_ref"), value
        )
        who["tickets"] = number
        merge = dict(
            pair(number), email=value, primary=who, duplicate=who, new_external_ref="to " + value
        )
        merge["backup"] = value
        left = [{"id": value, "display_id": value, "kind": value, "role": value}]
        report["successful_merges"].append(merge)
        report["failed_merges"].append(
            dict(merge, state=value, code=value, error=value, left_behind=left)
        )
        report["skipped"].append(
            {"email": value, "code": value, "reason": value, "contacts": [who]}
        )
        report["settled"].append(
            dict(merge, state="settled", code=value, error=value, accepted=value)
        )
        report["look_alikes"].append({"emails": [value, value]})
        report["invalid_rows"].append({"line": number, "reason": value, "email": value})
        report["run"]["options"][value] = value
        report["run"]["requests"][value] = number
    report["summary"] = {}
    everything = " ".join(HOSTILE)
    report["run"].update(stopped=everything, organisation=everything, version=everything)
    report["run"]["csv"] = [{"path": everything, "sha256": everything}]
    return report


LOUD = (
    "Runtime.consoleAPICalled",
    "Runtime.exceptionThrown",
    "Log.entryAdded",
    "Page.javascriptDialogOpening",
)


class Browser:
    """A headless Chromium on its debugging pipe, and what its page said and asked for since it was opened."""

    def __init__(self, profile):
        # The browser reads from descriptor 3 and writes to 4.
        launch = (
            "import fcntl, os, sys\n"
            "high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3]]\n"
            "os.dup2(high[0], 3); os.dup2(high[1], 4)\n"
            "os.execv(sys.argv[3], sys.argv[3:])\n"
        )
        child_in, self.out = os.pipe()
        self.back, child_out = os.pipe()
        command = [sys.executable, "-c", launch, str(child_in), str(child_out), CHROMIUM]
        command += [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(child_in, child_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait(10)
        os.close(self.out)
        os.close(self.back)

    def message(self, deadline):
        while b"\0" not in self.buffer:
            ready = select.select([self.back], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, "no answer from the browser in time"
            chunk = os.read(self.back, 1 << 20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message.decode("utf-8"))

    def call(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
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

    def open(self, path):
        self.call("Page.navigate", url="about:blank")
        self.events = []
        self.url = path.as_uri()
        self.call("Page.navigate", url=self.url)
        deadline = time.monotonic() + 30
        ready = f"location.href === {json.dumps(self.url)} && document.readyState === 'complete'"
        while not self.js(ready):
            assert time.monotonic() < deadline, "the page was not loaded in time"
            time.sleep(0.02)

    def js(self, expression):
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self):
        return self.js("document.body.innerText")

    def noise(self):
        """Console messages, errors, dialogs, and requests for anything but the page itself."""
        self.js("new Promise(done => setTimeout(done, 50))")
        found = [event for event in self.events if event.get("method") in LOUD]
        for event in self.events:
            asked = (
                event["params"]["request"]["url"]
                if event.get("method") == "Network.requestWillBeSent"
                else None
            )
            if asked not in (None, self.url, "about:blank"):
                found.append(event)
        return found


@pytest.fixture(scope="module")
def browser():
    profile = tempfile.mkdtemp()
    browser = Browser(profile)
    yield browser
    browser.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def show(browser, tmp_path):
    def show(report, name="merge_report_20250131_120000.html"):
        path = tmp_path / name
        path.write_bytes(report if isinstance(report, bytes) else embed(report))
        browser.open(path)
        return browser

    return show


def search(page, text):
    page.js(f"find = document.querySelector('input[type=search]'), find.value = {json.dumps(text)}")
    page.js("find.dispatchEvent(new Event('input')), new Promise(done => setTimeout(done, 250))")


OPEN_ALL = "document.querySelectorAll('summary, .tog').forEach(e => e.click()), new Promise(d => setTimeout(d, 100))"
MERGED = "[...document.querySelectorAll('#merged tbody tr:not(.det)')]"


UNDO_CODES = {
    "merged_again",
    "not_merged",
    "contact_refused",
    "contact_not_confirmed",
    "not_restored",
    "merged_onward",
}


def test_template_is_self_contained_and_strict():
    raw = TEMPLATE.read_bytes()
    text = raw.decode("ascii")  # so that no default encoding on any platform can spoil it
    assert len(raw) < 40000
    assert text.count(TOKEN) == 1
    assert f'<script type="application/json" id="report">{TOKEN}</script>' in text
    assert '<meta name="robots" content="noindex">' in text
    assert set(re.findall(r"https?://[^'\"\s]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\b|new Function|@import|url\(",
        text,
    )
    assert not re.search(r"<(link|img|iframe|object|embed|form|base)\b|\ssrc=|\son\w+=[\"']", text)
    scripts = re.findall(r"<script>(.*?)</script>", text.replace("\r\n", "\n"), re.S)
    assert len(scripts) == 1 and text.count("<script") == 2
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode("ascii")).digest()).decode("ascii")
    policy = re.search(
        r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text
    ).group(1)
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy, (
        "the script was changed: put this hash into the policy"
    )


@needs_browser
def test_hash_of_the_policy_survives_windows_line_ends(show):
    assert "1 of 1 pair merged" in show(embed(sample(1)).replace(b"\n", b"\r\n")).text()


@needs_browser
def test_hostile_values_are_shown_and_nothing_runs(show):
    page = show(hostile())
    page.js(OPEN_ALL)
    assert page.js("document.title").startswith("Contact merge report")
    assert page.js("document.scripts.length") == 2
    assert (
        page.js(
            "document.querySelectorAll('img, iframe, object, embed, link, base, form, b').length"
        )
        == 0
    )
    attributes = page.js("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert attributes and not [attribute for attribute in attributes if attribute.startswith("on")]
    links = page.js("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert links and all(re.match(r"#\w+$|\./merge_report_\d+_\d+\.json$", link) for link in links)
    for place in (
        ".banner",
        "#failed summary p",
        "#failed .facts",
        "#failed .left",
        "#merged td",
        "#merged .facts",
        "#skipped",
        "#skipped td",
        "#invalid td",
        "#run dt",
        "#run dd",
    ):
        text = "\n".join(
            page.js(f"[...document.querySelectorAll('{place}')].map(e => e.textContent)")
        )
        for value in HOSTILE:
            assert SEEN.get(value, value) in text, (place, value)
    body = page.js("document.querySelector('main').textContent")
    assert not re.search(
        "[\0-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]", body
    )
    assert page.noise() == []


@needs_browser
def test_the_checks_above_would_notice(show):
    page = show(
        b"<!doctype html><meta charset=utf-8><body><script>document.body.innerHTML = "
        + json.dumps("".join(HOSTILE[3:6]))
        .replace("<", "\\u003c")
        .replace("alert", "console.log")
        .encode()
        + b"</script>"
    )
    noise = json.dumps(page.noise())
    assert (
        "leak.example.com/i.png" in noise
        and "leak.example.com/s.css" in noise
        and "consoleAPICalled" in noise
    )
    assert page.js("document.title") == "pwned"


@needs_browser
def test_policy_blocks_a_script_that_would_get_in(show):
    template = TEMPLATE.read_text(encoding="utf-8")
    evil = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    spoilt = template.replace("</main>", "</main>" + evil)
    page = show(embed(sample(1), spoilt))
    assert page.js("document.title").endswith("1 of 1 pair merged")
    assert "violates the following Content Security Policy" in json.dumps(page.noise())


@needs_browser
def test_content_and_order(show):
    left = [
        {
            "id": "don:core:t12",
            "display_id": "TKT-12",
            "title": "A title",
            "kind": "ticket",
            "role": "owned_by",
        }
    ]
    report = sample(
        140,
        [
            failure(200, "count_mismatch"),
            failure(201, "count_mismatch"),
            failure(202, "brand_new_code"),
            dict(
                failure(203, "left_behind"),
                left_behind=left,
                state="proving",
                backup=None,
                seconds=None,
            ),
        ],
        [
            {
                "email": "two@example.com",
                "code": "several_user_refs",
                "reason": "It has user_1 and user_2.",
                "contacts": [
                    dict(contact(1, ""), external_ref="user_1"),
                    dict(contact(2, ""), external_ref="user_2"),
                ],
            }
        ],
        [{"line": 1017, "reason": "TICKET_COUNT is not a number", "email": None}],
    )
    report["summary"]["pairs_planned"] += 3
    report["run"]["stopped"] = "The token was revoked."
    verdict = report["run"]["headline"] = (
        "140 of 147 pairs merged, 4 failed, 3 left, 1 group skipped"
    )
    report["choices"] = [
        {
            "email": "three@example.com",
            "kept": "user_5",
            "lost": [dict(contact(3, ""), external_ref="user_6")],
            "warnings": ["joins 4 contacts"],
        }
    ]
    names = "joins different names: Ada, Bo"
    report["warnings"] = [
        {"email": "three@example.com", "code": "shared_mailbox", "warning": "joins 4 contacts"},
        {"email": "four@example.com", "code": "names_differ", "warning": names},
    ]
    page = show(report)
    text = page.text()
    assert verdict in text and "c0ffee123456" in text
    for words in (
        "three@example.com keeps user_5",
        "Lost: user_6",
        "joins 4 contacts",
        f"four@example.com {names}",
    ):
        assert words in text
    assert page.js("document.title") == "Contact merge report 2025-01-31: " + verdict
    assert "The run stopped early: The token was revoked." in text
    order = ["Contact merge report", verdict, "Contacts read"]
    order += [
        "Failed pairs",
        "Merged pairs",
        "Warnings",
        "Choices",
        "Skipped groups",
        "Invalid rows",
        "Progress",
        "Run details",
    ]
    headings = page.js(
        "[...document.querySelectorAll('h1, .lead, .cards, h2')].map(e => e.textContent)"
    )
    assert [want in have for want, have in zip(order, headings)] == [True] * len(order), headings
    groups = page.js("[...document.querySelectorAll('#failed h3')].map(e => e.textContent)")
    assert groups == [
        "brand_new_code1",
        "Merged, but something was left behind1left_behind",
        "Ticket count differs2count_mismatch",
    ]
    for want in (
        "TKT-12 A title, ticket, owned by",
        "Merged; not everything is verified to belong to the primary.",
        "Export again.",
        "Said for pair 200. Nothing was merged.",
        "It has user_1 and user_2.",
        "1017",
        "TICKET_COUNT is not a number",
        "Robin Example",
        "0123456789abcdef" * 4,
        "rev-users.merge",
        "waiting for quota (12.5 s)",
        "2025-01-31 12:00:00 (UTC+01:00)",
        "merge_report_20250131_120000.json",
    ):
        assert want in text, want
    assert page.js("document.querySelectorAll('#progress svg path').length") == 3
    assert page.js("document.querySelectorAll('#progress svg .c-wait').length") == 1
    assert page.noise() == []


@needs_browser
def test_what_was_backed_up_and_proved_and_what_is_left_stands_there(show):
    report = sample(2)
    report["successful_merges"][0].update(
        backed_up={"works": 41, "timeline_entries": 43}, proved=37
    )
    unfinished = dict(
        failure(7, "interrupted"),
        state="merged",
        so_far="merged, for good",
        to_do="set the reference",
    )
    report["unfinished_merges"] = [unfinished]
    report["summary"].update(unfinished_merges=1, total_merges_attempted=3, pairs_planned=5)
    page = show(report)
    page.js(OPEN_ALL)
    text = page.text()
    for words in (
        "41 works, 43 timeline entries",
        "37 objects",
        "Merged, for good; still to do: set the reference",
    ):
        assert words in text
    assert (
        page.js("[...document.querySelectorAll('.cards dt')].map(e => e.textContent)").count("Left")
        == 1
    )
    assert page.js("document.querySelectorAll('#progress').length") == 1
    report["run"].update(start=moment(0), end=moment(1))
    assert show(report).js("document.querySelectorAll('#progress').length") == 0
    assert page.noise() == []


@needs_browser
def test_settled_and_cancelled_pairs_lost_fields_and_look_alikes_have_their_place(show):
    report = sample(1)
    report["successful_merges"][0]["fields_lost"] = [
        {"field": "phone_numbers", "value": "+15550100"}
    ]
    accepted = "left_behind: TKT-7 does not belong to REVU-8"
    report["settled"] = [
        dict(
            failure(4, "left_behind"),
            state="settled",
            accepted=accepted,
            reference_not_set="user_4",
        )
    ]
    report["cancelled"] = [dict(failure(5, "merge_refused"), state="cancelled")]
    report["unfinished_merges"] = [
        dict(failure(6, "after_cancel"), state="merged", after_cancel=True)
    ]
    report["look_alikes"] = [{"emails": ["a@example.com", "\uff41@example.com"]}]
    report["summary"].update(
        successful_merges=2, settled=1, failed_merges=1, cancelled=1, unfinished_merges=1, pairs_planned=4,
        total_merges_attempted=4,
    )  # fmt: skip
    page = show(report)
    page.js(OPEN_ALL)
    text = page.text()
    for words in (
        "phone_numbers +15550100", accepted, "user_4", "Settled pairs", "Cancelled pairs", "Merged after it was cancelled",
        "Look-alikes", "\uff41@example.com",
    ):  # fmt: skip
        assert words in text, words
    cards = page.js("[...document.querySelectorAll('.cards div')].map(e => e.textContent)")
    assert {"Merged1", "Settled1", "Cancelled1", "Failed0", "Unfinished1"} <= set(cards)
    assert "contradicts itself" not in text
    assert page.noise() == []


@needs_browser
def test_what_is_left_is_what_the_report_says_and_what_does_not_apply_is_left_out(show):
    cards = "[...document.querySelectorAll('.cards dt')].map(e => e.textContent)"
    report = sample(2, [failure(3, "count_mismatch")])
    report["run"]["options"]["rate_limit"] = [None, 60]
    report["summary"].update(total_merges_attempted=2, left=0)  # one failed before its request
    page = show(report)
    assert "Left" not in page.js(cards) and "DevRev's quota" in page.text()
    assert page.js("document.querySelectorAll('.bar span').length") == 2
    report.update(dict.fromkeys(("skipped", "look_alikes", "warnings", "invalid_rows", "choices")))
    report["run"]["kind"] = "settle"
    report["summary"].update(
        dict.fromkeys(("contacts_read", "invalid_rows", "pairs_planned", "skipped_groups", "left"))
    )
    page = show(report)
    assert page.js(cards) == ["Merged", "Failed"] and "Every row of the CSV" not in page.text()
    assert (
        not page.js("[...document.querySelectorAll('#skipped, #invalid')].length")
        and page.noise() == []
    )


@needs_browser
def test_what_a_killed_run_could_not_tell_is_said_to_be_unknown(show):
    report = sample(2)
    report.update(skipped=None, look_alikes=None, warnings=None, invalid_rows=None, choices=None)
    report["run"].update(
        end=None, exit_code=None, stopped="killed", requests=None, quota_waits=None
    )
    report["summary"].update(
        contacts_read=None, invalid_rows=None, pairs_planned=None, skipped_groups=None, left=None
    )
    page = show(report)
    text = page.text()
    assert (
        "What only the CSV shows is not known" in text and "The run stopped early: killed." in text
    )
    assert not re.search(r"undefined|NaN|null|contradicts", text)
    assert page.noise() == []


@needs_browser
def test_the_page_of_an_undo_shows_what_came_back_and_runs_nothing(show):
    template = TEMPLATE.with_name("undo_template.html")
    script = re.findall(r"<script>(.*?)</script>", template.read_text(encoding="ascii"), re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode("ascii")).digest()).decode("ascii")
    assert f"script-src 'sha256-{digest}';" in template.read_text(encoding="ascii")
    thing = {
        "id": "1",
        "display_id": "TKT-1",
        "title": HOSTILE[0],
        "role": "owned_by",
        "why": HOSTILE[4],
    }
    entry = {
        "email": "a@example.com", "primary": contact(1, "REVU-1"), "duplicate": contact(2, "user_2"), "code": "", "error": "",
        "contact": {"id": "3", "display_id": "REVU-3"}, "backup": HOSTILE[12], "restored": [thing], "left": [thing],
        "fields_left": [{"field": "phone_numbers", "value": [], "why": "changed since"}],
        "not_restored": [{"what": "created_by", "value": ["x"], "why": "the primary stays the creator"}],
    }  # fmt: skip
    undo = {
        "run": {"undo": "backups/x"},
        "summary": {},
        "undone": [entry],
        "unfinished": [],
        "failed": [],
    }
    page = show(
        embed(undo, template.read_text(encoding="ascii")), "undo_report_20250131_120000.html"
    )
    text = page.text()
    for words in (
        "Undone (1)",
        "Created again as REVU-3",
        "Restored (1)",
        "TKT-1, " + HOSTILE[0],
        "because the primary stays the creator: created by",
        "phone_numbers: changed since",
        "\\u{202e}",
    ):
        assert words in text, words
    undo["summary"] = {"undone_before": 1}
    again = show(
        embed(undo, template.read_text(encoding="ascii")), "undo_report_20250131_120001.html"
    ).text()
    assert "Undone before (1)" in again and "Undone (" not in again
    assert page.noise() == []


def test_the_page_of_an_undo_reads_fields_that_an_undo_report_has():
    script = TEMPLATE.with_name("undo_template.html").read_text(encoding="ascii")
    someone = Contact("id", "", "a@example.com", "REVU-1", "", 0, "", "")
    assert set(re.findall(r"\be\.(\w+)", script)) <= undo_entry(Pair(someone, someone, None)).keys()


@needs_browser
def test_every_code_is_explained(show):
    codes = sorted(CODES.keys() - UNDO_CODES)
    page = show(sample(0, [failure(number, code) for number, code in enumerate(codes)]))
    assert (
        page.js("[...document.querySelectorAll('#failed h3 .mono')].map(e => e.textContent).sort()")
        == codes
    )
    assert page.js(
        "[...document.querySelectorAll('#failed .group > p')].filter(e => e.textContent).length"
    ) == 2 * len(codes)
    assert page.noise() == []


@needs_browser
def test_details_and_sorting(show):
    page = show(sample(30))
    emails = MERGED + ".map(r => r.cells[1].textContent)"
    assert "backups/person3@" not in page.js("document.querySelector('#merged').textContent")
    page.js(MERGED + "[3].querySelector('.tog').click()")
    assert page.js(MERGED + "[3].querySelector('.tog').getAttribute('aria-expanded')") == "true"
    details = page.js("document.querySelector('#merged .det').textContent")
    for want in (
        "backups/person3@example.com/20250131_120000",
        "don:identity:dvrv-us-1:devo/ACME:revu/6",
        "REVU-6 \u2192 user_3",
        "1.3 s",
    ):
        assert want in details, want
    email = "document.querySelector('#merged th:nth-child(2) button')"
    seconds = "document.querySelector('#merged th:nth-child(7) button')"
    page.js(email + ".click()")
    assert page.js(emails) == [f"person{number}@example.com" for number in range(30)]
    page.js(email + ".click()")
    assert page.js(emails)[0] == "person29@example.com"
    assert page.js(email + ".parentNode.getAttribute('aria-sort')") == "descending"
    page.js(seconds + ".click()")
    assert page.js("document.querySelectorAll('#merged [aria-sort]').length") == 1
    shown = page.js(MERGED + ".map(r => +r.cells[6].textContent)")
    assert shown == sorted(shown) and len(shown) == 30
    page.js(MERGED + ".find(r => r.textContent.includes('person3@')).querySelector('.tog').click()")
    assert page.js("document.querySelectorAll('#merged .det').length") == 0
    # Keys reach the headers and the details as ordinary buttons.
    page.js(email + ".focus()")
    for kind in ("keyDown", "keyUp"):
        page.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key="Enter",
            code="Enter",
            windowsVirtualKeyCode=13,
            text="\r",
        )
    assert page.js(email + ".parentNode.getAttribute('aria-sort')") == "ascending"


@needs_browser
def test_five_thousand_merges(show):
    report = sample(5000, [failure(9000 + number, "count_mismatch") for number in range(250)])
    began = time.monotonic()
    page = show(report)
    assert time.monotonic() - began < 10
    rows = MERGED + ".length"
    assert page.js(rows) == 200
    assert page.js("document.querySelectorAll('#failed .items > li').length") == 200
    page.js("document.querySelector('#merged .more button').click()")
    assert page.js(rows) == 400
    assert "400 of 5,000 shown" in page.text()
    search(page, "PERSON4321@ user_4321")
    assert page.js(rows) == 1
    assert "1 found" in page.text()
    assert page.js("document.querySelector('#failed .group').hidden")
    search(page, "person4321@ user_17")
    assert page.js(rows) == 0
    search(page, "backups/person9007@")
    assert page.js(rows) == 0 and "Nothing here matches the search." in page.text()
    assert page.js("document.querySelectorAll('#failed .items > li').length") == 1
    search(page, "")
    assert page.js(rows) == 200
    page.js("document.querySelector('#merged th:nth-child(2) button').click()")
    page.js("document.querySelector('#merged th:nth-child(2) button').click()")
    assert "person4999@example.com" in page.js(MERGED + "[0].textContent")
    assert len(page.js("document.querySelector('#progress .c-ok').getAttribute('d')")) < 40000
    assert page.noise() == []


@needs_browser
def test_print_holds_everything(show):
    skip = {"email": "a@example.com", "code": "x", "contacts": [contact(1, "user_1")]}
    page = show(sample(205, [failure(900, "api_error")], [skip]))
    page.js(
        "addEventListener('beforeprint', () => { printed = document.querySelectorAll('#merged .det').length;"
        "closed = document.querySelectorAll('details:not([open])').length; });"
    )
    assert page.js(MERGED + ".length") == 200
    pdf = base64.b64decode(page.call("Page.printToPDF")["data"])
    assert pdf.count(b"/Type /Page\n") > 5
    assert page.js("[printed, closed]") == [205, 0]
    assert page.js(MERGED + ".length") == 200
    assert page.js("document.querySelectorAll('.det, details[open]').length") == 0


@needs_browser
@pytest.mark.parametrize(
    "report",
    [
        {},
        [],
        {"run": None, "summary": {"successful_merges": None}, "successful_merges": None},
        {
            "successful_merges": [{}, None, 7],
            "failed_merges": [{}],
            "skipped": [{}],
            "invalid_rows": [{}],
        },
    ],
)
def test_missing_fields_show_nothing(show, report):
    page = show(report)
    page.js(OPEN_ALL)
    text = page.text()
    assert "Merged pairs" in text and "Run details" in text
    assert not re.search(
        r"undefined|NaN|null|Infinity|\[object|Invalid", re.sub("Invalid( rows| 0| 1)", "", text)
    )
    assert page.noise() == []


@needs_browser
def test_no_sideways_scrolling_on_a_phone(show):
    report = hostile()
    report["successful_merges"] += sample(40)["successful_merges"]
    page = show(report)
    try:
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=800,
            deviceScaleFactor=1,
            mobile=True,
        )
        page.js(OPEN_ALL)
        assert page.js("innerWidth") == 360
        assert page.js("document.scrollingElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_without_javascript_without_report_and_saved_again(show, browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        assert "merge_report_\u2026.json" in show(sample(3)).text()
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "no report is in it" in show(TEMPLATE.read_bytes()).text()
    assert "cannot be read" in show(embed(sample(3)).replace(b'"summary"', b'"summary')).text()
    first = show(sample(3))
    text, saved = first.text(), first.js("document.documentElement.outerHTML")
    assert show(("<!doctype html>" + saved).encode("utf-8")).text() == text
