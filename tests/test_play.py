"""The page of `just play`, in a real browser, over `just serve` and over an endpoint that fails."""

import json
import re
import shutil
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from conftest import ROOT, listening, one_error_line, read_jsonl, run_stage
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from page_server import PageServer
from playwright.sync_api import expect
from test_read_document import make_pdf

from demo.take_screenshots import browser as start_browser
from inference.play import make_app, make_options, ways_of
from prompts.task import FOLDER, load_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium, which is not here"),
]
TEXT = "The ice of a lake floats on it. It freezes from the top, and <b>fish</b> live below."
COPIED = "it freezes from the top"


@contextmanager
def serving(app: FastAPI):
    """The address of an app in a thread of this process, and a function that ends it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def end() -> None:
        server.should_exit = server.force_exit = True
        thread.join(10)

    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", end
    end()


def fake_endpoint(asked: list, left: threading.Event) -> FastAPI:
    """Adapters of no task of their own, which copy, break off, refuse, fail or never end."""
    app = FastAPI()
    names = ("copies", "breaks", "refuses", "fails", "endless", "timed")

    @app.get("/v1/models")
    def models() -> dict:
        return {"data": [{"id": name, "parent": "base"} for name in names]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        asked.append(body)
        if (model := body["model"]) == "refuses":
            return JSONResponse({"error": {"message": "<i>beyond</i> the context"}}, 400)
        if model == "fails":
            return JSONResponse(None, 503)

        def chunk(text: str, end: str | None = None) -> str:
            choice = {"delta": {"content": text}, "finish_reason": end}
            return f"data: {json.dumps({'choices': [choice]})}\n\n"

        def events():
            try:
                while model == "endless":
                    time.sleep(0.02)
                    yield chunk("more ")
            finally:
                left.set()
            yield chunk("Fish: ")
            if model == "breaks":
                raise ConnectionError
            if model == "timed":
                time.sleep(0.5)
                timings = {"prompt_ms": 50, "predicted_ms": 150, "predicted_n": 40}
                last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": timings}
                yield chunk("shoals.") + f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
                return
            time.sleep(0.3)
            yield chunk(f"{COPIED} <script>.") + chunk("", "length")
            counted = {"choices": [], "usage": {"completion_tokens": 7}}
            yield f"data: {json.dumps(counted)}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def chromium():
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def play_url(served_url):
    with listening("inference.play", "--url", f"{served_url}/v1") as url:
        yield url


@pytest.fixture
def fake(tmp_path):
    """(the page's address, what the endpoint was asked, whether it was left, its end)."""
    asked, left = [], threading.Event()
    with serving(fake_endpoint(asked, left)) as (url, end):
        options = make_options(url, None, FOLDER, tmp_path / "data")
        with serving(make_app(options)) as (page, _):
            yield page, asked, left, end


@pytest.fixture
def visit(chromium):
    """Opens a page, and sees to it that nothing but its origin is asked and no script fails."""
    contexts, seen, failed = [], [], []

    def visit(url: str, width: int = 1200):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 800}))
        contexts[-1].on("request", lambda request: seen.append((url, request.url)))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.set_default_timeout(20_000)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert seen and all(there.startswith((f"{own}/", "data:")) for own, there in seen)
    assert not failed


def answers(page) -> dict:
    """{(task, title): (answer, figures, failure)} once all are done."""
    page.wait_for_selector("#run:enabled", timeout=120_000)
    return {
        (group.query_selector("xpath=preceding-sibling::h2[1]").inner_text(), title): tuple(
            card.query_selector(f".{part}").text_content()
            for part in ("answer", "figures", "failure")
        )
        for group in page.query_selector_all(".cards")
        for card in group.query_selector_all("article")
        for title in [card.query_selector("h3").inner_text()]
    }


def alert(page) -> str:
    page.wait_for_selector("#problem:not(:empty)")
    return page.inner_text("#problem[role=alert]")


def test_answers_are_those_of_the_endpoint(visit, play_url, served_url):
    page = visit(play_url)
    page.fill("#text", TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stop:enabled")
    found = answers(page)
    assert page.inner_text("#progress") == "6 of 6 answers done"
    for task in map(load_task, ("summarize", "title")):
        for model, title, told in (
            (task.name, task.name, False),
            ("tiny-qwen2", task.title("base"), False),
            ("tiny-qwen2", task.title("instructed"), True),
        ):
            messages = task.student_messages(TEXT, task.student_template(told))
            body = {"model": model, "messages": messages, "max_tokens": task.max_new_tokens}
            url = f"{served_url}/v1/chat/completions"
            (choice,) = httpx.post(url, json=body, timeout=60).json()["choices"]
            answer, figures, failure = found.pop((task.name, title))
            assert (answer, failure) == (choice["message"]["content"], "")
            assert " word" in figures and " % copied" in figures
            assert re.search(r" · waited \d+\.\d s · answered in \d+\.\d s · [\d.]+ tok", figures)
            assert ("cut off" in figures) == (choice["finish_reason"] == "length")
    assert not found


def test_only_what_is_picked_is_asked_and_by_the_keyboard(visit, fake):
    url, asked, _, _ = fake
    page = visit(url)
    for name in ("breaks", "refuses", "fails", "endless", "timed"):
        page.get_by_label(name).focus()
        page.keyboard.press("Space")
    page.fill("#text", TEXT)
    page.focus("#run")
    page.keyboard.press("Enter")
    (found,) = answers(page).values()
    assert found[0] == f"Fish: {COPIED} <script>." and found[2] == ""
    assert page.locator("article mark").all_inner_texts() == [COPIED]
    assert "7 words" in found[1] and "71 % copied" in found[1] and "cut off at 512" in found[1]
    (body,) = asked
    assert body["messages"] == [{"role": "user", "content": TEXT}]
    assert (body["model"], body["stream"], body["temperature"]) == ("copies", True, 0)
    page.get_by_label("summarize").uncheck()
    page.click("#run")
    assert alert(page) == "Pick a task and a system."


def test_what_fails_is_told_in_its_card_and_stop_reaches_the_endpoint(visit, fake):
    url, _, left, end = fake
    page = visit(url)
    page.click("#run")
    assert "no text yet" in alert(page)
    page.click("text=Bees and street trees")
    page.click("#run")
    expect(page.locator("#progress")).to_have_text("5 of 6 answers done")
    expect(page.locator("body")).to_contain_text("more more")  # the endless one goes on
    left.clear()
    page.click("#stop")
    found = {title: one for (_, title), one in answers(page).items()}
    assert found["refuses"] == ("", "waiting", "<i>beyond</i> the context")
    assert found["fails"][2] == "the server answers 503 Service Unavailable"
    assert found["breaks"][0] == "Fish: " and "broke off" in found["breaks"][2]
    assert "more more" in found["endless"][0] and found["endless"][1].endswith("stopped")
    assert left.wait(10)
    end()
    page.click("#run")
    assert all("is gone; start `just serve RUN`" in one[2] for one in answers(page).values())
    page.reload()
    assert "just serve RUN" in alert(page) and page.is_disabled("#run")


def test_an_answer_tells_its_own_time_apart_from_waiting(visit, fake):
    page = visit(fake[0])
    for name in ("breaks", "refuses", "fails", "endless"):
        page.get_by_label(name).uncheck()
    page.fill("#text", TEXT)
    page.click("#run")
    found = {title: figures for (_, title), (_, figures, _) in answers(page).items()}
    # 40 tokens in the 0.2 s that the endpoint tells, of which the page saw another time.
    assert "answered in 0.2 s · 200 tokens/s" in found["timed"]
    assert float(re.search(r"waited ([\d.]+) s", found["timed"])[1]) >= 0.3
    # Of the other endpoint the page sees 6 tokens after the first one, in 0.3 s or so.
    seen = re.search(r"answered in ([\d.]+) s · ([\d.]+) tokens/s", found["copies"])
    assert 4 < float(seen[1]) * float(seen[2]) < 8


def test_the_better_answer_is_kept_and_another_click_changes_it(visit, fake, tmp_path):
    page = visit(fake[0])
    for name in ("breaks", "endless"):
        page.get_by_label(name).uncheck()
    page.fill("#text", TEXT)
    page.click("#run")
    answers(page)
    buttons, note = page.locator("button.better"), page.locator(".note")
    expect(buttons).to_have_count(2)  # what failed is no answer
    expect(note).to_contain_text("Which one is better?")
    page.fill("#text", "Another text, which no one answered.")
    path = tmp_path / "data/summarize/choices.jsonl"
    for name, other in (("copies", "timed"), ("timed", "copies")):
        button = page.get_by_role("button", name=f"{name} is better")
        button.focus()
        page.keyboard.press("Enter")
        expect(button).to_have_attribute("aria-pressed", "true")
        expect(note).to_contain_text(f"Kept in {path}: {name} is better (1 pair).")
        assert page.locator("button.better[aria-pressed=true]").count() == 1
        button.hover()  # which changes the colours of other buttons
        style = button.evaluate("one => [getComputedStyle(one)].map(s => [s.color, s.background])")
        assert style[0][0] not in style[0][1]
        last = read_jsonl(path)[-1]
        assert (last["chosen_by"]["model"], last["rejected_by"]["model"]) == (name, other)
        assert last["text"] == TEXT
    assert [record["chosen"] for record in read_jsonl(path)] == [
        f"Fish: {COPIED} <script>.",
        "Fish: shoals.",
    ]
    path.write_bytes("\ufeff".encode("utf-16"))
    page.get_by_role("button", name="copies is better").click()
    expect(note).to_contain_text("it could not be kept: ")
    assert page.locator("button.better[aria-pressed=true]").count() == 1


def test_files_are_read_and_their_errors_told(visit, play_url):
    page = visit(play_url)
    pdf = {"name": "a.pdf", "mimeType": "application/pdf", "buffer": make_pdf("On ice", "and sea")}
    page.set_input_files("#file", pdf)
    expect(page.locator("#text")).to_have_value(re.compile("On ice\\s+and sea"))
    expect(page.locator("#size")).to_have_text("4 words read from a.pdf")
    page.set_input_files("#file", pdf | {"name": "b.pdf", "buffer": b"\x89PNG\r\n\0"})
    assert alert(page) == "b.pdf: it is an image, which is not read; save it as PDF or text"
    page.set_input_files("#file", pdf | {"name": "c.pdf", "buffer": b"%PDF-1.7 and then nothing"})
    expect(page.locator("#problem")).to_have_text(re.compile(r"c\.pdf: \w+"))
    assert "On ice" in page.input_value("#text")
    page.evaluate(
        """() => { const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["# Dropped"], "d.md"));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true })); }"""
    )
    expect(page.locator("#text")).to_have_value("# Dropped")
    assert page.inner_text("#problem") == ""


def test_no_address_leads_to_this_machine(visit, play_url):
    page, inside = visit(play_url), PageServer({"/": (200, {}, b"inside")})
    page.fill("#address", inside.url)
    page.click("#read")
    line = f"cannot read {inside.url}: it leads to 127.0.0.1, in your own network"
    assert alert(page) == line and page.input_value("#text") == ""
    inside.close()
    assert inside.seen == []
    for source in ("file:///etc/hostname", "/etc/hostname", "Justfile", str(ROOT / "Justfile"), 1):
        answer = httpx.post(f"{play_url}/read", json={"address": source})
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert "no address" in httpx.post(f"{play_url}/read", json={"address": "Justfile"}).text
    large = httpx.post(f"{play_url}/read", content=b"a" * 20_000_001)
    assert large.json() == {"error": {"message": "it is over 20 MB"}}


def test_strangers_are_refused(play_url):
    for host, status in (("evil.example", 400), ("localhost:1", 200), ("127.0.0.1", 200)):
        assert httpx.get(play_url, headers={"Host": host}).status_code == status
    plain = {"Content-Type": "text/plain"}  # which another site may send
    chat = httpx.post(f"{play_url}/v1/chat/completions", content=b"{}", headers=plain)
    assert chat.status_code == 403
    assert "default-src 'none'; connect-src 'self'" in httpx.get(play_url).text


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_runs_over_the_side(visit, fake, width):
    page = visit(fake[0], width)
    page.get_by_label("endless").uncheck()
    page.fill("#text", "a" * 500)
    page.click("#run")
    assert len(answers(page)) == 5
    expect(page.locator("button.better")).to_have_count(2)
    page.locator("button.better").first.click()
    expect(page.locator(".note")).to_contain_text("Kept in")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    lefts = page.evaluate("[...document.querySelectorAll('article')].map(one => one.offsetLeft)")
    assert (len(set(lefts)) == 1) == (width == 390)
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(one => "
    unnamed += "!one.labels?.length && !one.ariaLabel).length"
    assert page.evaluate(unnamed) == 0


def test_without_an_endpoint_one_line():
    line = one_error_line(run_stage("inference.play", "--url", "http://127.0.0.1:9/v1", code=1))
    assert line == "error: no endpoint at http://127.0.0.1:9; start one with `just serve RUN`"


def test_where_the_text_stands_in_a_message():
    for task in map(load_task, ("summarize", "title")):
        for way, told in zip(ways_of(task), (False, True), strict=True):
            made = task.student_messages(TEXT, task.student_template(told))
            (message,) = way["messages"]
            assert [message | {"content": message["content"].replace("\0", TEXT)}] == made


def test_pictures_of_the_page_and_of_a_report(play_url, tmp_path):
    def take(source: object, *options: object, code: int = 0):
        output = ("demo.take_screenshots", source, tmp_path / "made/a.png", *options)
        return run_stage(*output, code=code, fresh=True)  # away from the loop of `chromium`

    (tmp_path / "report.html").write_text("<p>A report")
    for source, options in ((tmp_path / "report.html", ()), (play_url, ("--text", TEXT, "--dark"))):
        take(source, "--width", 390, *options)
        header = (tmp_path / "made/a.png").read_bytes()[:24]
        width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
        assert header.startswith(b"\x89PNG") and width == 390
        assert height > 2000 if source == play_url else height == 800
    line = one_error_line(take("http://127.0.0.1:9", code=1))
    assert line.startswith("error: no picture of http://127.0.0.1:9: ") and "ERR_" in line
