"""The page of an evaluation as a browser shows it."""

import json
import shutil
from contextlib import contextmanager

import pytest

from eval.measures import COMPARED
from eval.report import write_report
from prompts.task import load_task

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on the PATH"),
]

SYSTEMS = ("base", "instructed", "tuned", "lead", "models/another-with-a-long-name")
OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
OPTIONS += "--disable-background-networking --disable-component-update"
TEXT = "Ice floats on water, <b>as</b> it is lighter. Fish live under it all winter. "
COPIED = "Ice floats on water, they\n say. Whales sing in the autumn, says Weber."


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of 64 texts of 10 kB and five systems, one of whose sentences is unsupported."""
    folder, n = tmp_path_factory.mktemp("report"), 64
    rows = [
        {"id": f"t{i}", "source": "wiki", "text": TEXT * 130, "reference": "Ice floats."}
        for i in range(n)
    ]
    answers = {
        s: {row["id"]: {"text": COPIED if s == "base" else ""} for row in rows} for s in SYSTEMS
    }
    found = {measure: [i / n for i in range(n)] for measure in COMPARED}
    lower = {measure: [0.5] * n for measure in COMPARED}
    support = {"Ice floats on water, they say.": 0.4, "Whales sing in the autumn, says Weber.": 0.6}
    scores = {
        "n": n,
        "target": "tuned",
        "systems": {s: dict.fromkeys(COMPARED, 0.4) for s in SYSTEMS},
        "differences": {
            s: dict.fromkeys(COMPARED, (0.1, -0.1, 0.3)) for s in SYSTEMS if s != "tuned"
        },
        "per_text": {s: found if s == "tuned" else lower for s in SYSTEMS},
        "support": {s: [support if s == "base" else {}] * n for s in SYSTEMS},
        "settings": {"config": "run", "date": "2026-01-01", "hash": "encoder " * 9}
        | {"generation": {"base": {"model": "models/tiny"}}},
    }
    verdicts = {"n": n, "win_rate": (0.5, 0.4, 0.6), "first_wins": 0.6, "disagreements": []}
    judged = {"model": "judge", "target": "tuned", "systems": {"base": verdicts}}
    judged["generation"] = scores["settings"]["generation"]
    (folder / "judge.json").write_text(json.dumps(judged))
    write_report(folder, scores, rows, answers, load_task())
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())


@contextmanager
def opened(browser, report, width):
    """The page in a window of that width; nothing may be logged or asked of a network."""
    page, faults = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url))
    page.goto(report.as_uri())
    page.locator(".cells").first.scroll_into_view_if_needed()
    page.wait_for_selector("article mark")
    yield page
    assert faults == [report.as_uri()]
    page.close()


def tops(page):
    script = "cells => [...cells.children].map(cell => cell.getBoundingClientRect().top)"
    return page.eval_on_selector(".cells", script)


def test_the_columns_of_a_text_stand_in_one_row(browser, report):
    with opened(browser, report, 1200) as page:
        assert len(tops(page)) == 6 and len(set(tops(page))) == 1
        assert page.evaluate("document.querySelector('.cells').scrollWidth") <= 1200
        assert page.title() == "Summaries by tiny, tuned: evaluation"
        assert "show no clear difference from" in page.inner_text(".lead")


def test_a_narrow_window_has_one_column_and_scrolls_down_only(browser, report):
    with opened(browser, report, 390) as page:
        assert tops(page) == sorted(set(tops(page)))
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.click("text=More measures")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_what_is_copied_unsupported_or_invented_is_marked_as_it_is_reached(browser, report):
    with opened(browser, report, 1200) as page:
        base = page.locator("article >> nth=0").locator("section >> nth=1")
        assert base.locator("mark").all_inner_texts() == ["Ice floats on water"]
        assert "31% copied" in base.inner_text()
        spans = base.locator(".unsupported").all_text_contents()
        assert "".join(spans) == "Ice floats on water, they\n say."
        assert base.locator(".invented").all_inner_texts() == ["Weber"]
        assert base.locator(".text").text_content() == COPIED
        last = page.locator("article").last
        assert last.locator("mark").count() == 0
        last.scroll_into_view_if_needed()
        last.locator("mark").wait_for()


def test_the_best_of_a_row_is_bold_and_the_menu_sorts(browser, report):
    with opened(browser, report, 1200) as page:
        heading = "main > article:first-child h3"
        assert page.inner_text(heading).startswith("1. Ice floats on water, <b>as</b>")
        assert page.locator("article >> nth=0").locator(".best").all_inner_texts() == ["0.500"] * 4
        page.select_option("#sort", label="gain over base, bare text, most first")
        assert page.inner_text(heading).startswith("64.")
        assert page.locator("article >> nth=0").locator(".best").all_inner_texts() == ["0.984"]
        page.select_option("#sort", "")
        assert page.inner_text(heading).startswith("1.")
