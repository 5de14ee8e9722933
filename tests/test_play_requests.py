"""What `just play` takes from a browser and what it refuses, without a browser."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import read_jsonl
from fastapi.testclient import TestClient
from test_read_document import make_pdf

from common.files import digest
from inference.play import MOST_WAITING, make_app, make_options, systems_of
from prompts.task import FOLDER, load_task

JSON = {"Content-Type": "application/json"}
GONE = "http://127.0.0.1:9"  # where nobody listens
PATHS = ("/read", "/v1/chat/completions", "/choices")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def page(data):
    """A client of the page, over an endpoint that is gone."""
    app = make_app(make_options(GONE, None, FOLDER, data))
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield client


def refusal(page, path: str, content: object, status: int, **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = page.post(path, content=content, headers=named)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "multipart/form-data; boundary=x"},
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_another_site_is_refused(page, path, headers):
    assert "not from other sites" in refusal(page, path, b'{"messages": []}', 403, **headers)


def test_the_page_itself_is_heard(page):
    own = {"Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}
    answer = page.post("/read", content=b"Ice\x1b[2J floats", headers=own)
    assert answer.json() == {"text": "Ice floats", "notes": []}
    pdf = page.post("/read", content=make_pdf("On ice", "", ""), headers=own).json()
    assert pdf["text"].split() == ["On", "ice"] and "2 of 3 pages hold no text" in pdf["notes"][0]
    assert page.get("/docs").status_code == 404  # which would load scripts from elsewhere


@pytest.mark.parametrize(
    ("path", "most"), list(zip(PATHS, (20_000_000, 1_000_000, 1_000_000), strict=True))
)
def test_a_large_body_is_refused_before_it_is_read(page, path, most):
    told = f"it is over {most // 10**6} MB"
    assert refusal(page, path, b"{}", 413, **JSON, Content_Length=str(9 * most)) == told
    for n_parts in (1 + most // 500_000, 1 + 2 * most // 500_000):
        parts = (b"a" * 500_000 for _ in range(n_parts))
        assert refusal(page, path, parts, 413) == told


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'{"address": 5, "messages": 5}', b"[" * 100_000, b"\xff", b"{}"]
)
@pytest.mark.parametrize("path", ["/read", "/v1/chat/completions"])
def test_a_request_of_another_shape_is_refused(page, path, body):
    assert "JSON" in refusal(page, path, body, 400, **JSON)


def test_an_odd_letter_is_passed_on_and_the_endpoint_is_told_to_be_gone(page):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert "is gone" in refusal(page, "/v1/chat/completions", body, 502, **JSON)


def test_no_more_documents_wait_than_told(monkeypatch):
    monkeypatch.setattr("inference.play.MOST_WAITING", 0)
    app = make_app(make_options(GONE, "title", FOLDER, Path("nowhere")))
    with TestClient(app, base_url="http://localhost") as page:
        assert MOST_WAITING > 0 and "try again" in refusal(page, "/read", b"Ice", 503)


def a_choice(**fields: object) -> dict:
    chosen = {"text": "Ice floats.\n", "model": "summarize", "fingerprint": "f1", "template": None}
    others = [
        {"text": "Ice.", "model": "base", "template": "t1", "finish_reason": "length"},
        {"text": "Ice floats. ", "model": "copy"},
    ]
    return {"task": "title", "text": "Ice \ud83d", "chosen": chosen, "others": others} | fields


def test_a_choice_is_kept_with_what_made_it_and_a_later_one_behind_it(page, data):
    path = data / "title/choices.jsonl"
    choice = a_choice()
    turned = choice | {"chosen": choice["others"][0], "others": [choice["chosen"]]}
    for sent in (choice, turned):
        answer = page.post("/choices", content=json.dumps(sent), headers=JSON)
        assert answer.json() == {"pairs": 1, "path": str(path)}  # a copy of it is no pair
    kept, later = read_jsonl(path)
    assert kept.pop("created").endswith("+00:00")
    ours = {"endpoint": GONE, "model": "summarize", "fingerprint": "f1", "template": None}
    theirs = {"endpoint": GONE, "model": "base", "fingerprint": None, "template": "t1"}
    assert kept == {
        "id": digest(kept["text"]),
        "text": "Ice \ufffd",
        "chosen": "Ice floats.",
        "rejected": "Ice.",
        "chosen_by": ours | {"finish_reason": None},
        "rejected_by": theirs | {"finish_reason": "length"},
    }
    assert (later["id"], later["chosen"], later["rejected"]) == (kept["id"], "Ice.", "Ice floats.")


def test_clicks_at_once_are_all_kept(page, data):
    texts = [f"A text, number {i}." for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        sent = [json.dumps(a_choice(task="summarize", text=text)) for text in texts]
        answers = pool.map(lambda one: page.post("/choices", content=one, headers=JSON), sent)
        assert {answer.status_code for answer in answers} == {200}
    assert sorted(r["text"] for r in read_jsonl(data / "summarize/choices.jsonl")) == sorted(texts)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "../title"}, "no such task"),
        ({"task": 5}, "task: "),
        ({"text": ""}, "text: "),
        ({"chosen": {"text": "Ice."}}, "chosen.model: "),
        ({"others": []}, "others: "),
        ({"others": [{"text": " ", "model": "a"}]}, "say the same"),
        ({"others": ["Ice."]}, "others[0]: "),
    ],
)
def test_a_choice_that_is_none_is_refused(page, fields, said):
    assert said in refusal(page, "/choices", json.dumps(a_choice(**fields)), 400, **JSON)


def test_a_choice_that_cannot_be_kept_is_told(page, data, monkeypatch):
    monkeypatch.setattr("inference.choices.append_record", full_disk)
    said = refusal(page, "/choices", json.dumps(a_choice()), 500, **JSON)
    assert said == "it could not be kept: [Errno 28] No space left on device"


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_system_stands_below_its_task():
    names = ("title", "mine", "base")
    models = {name: {"adapter": name != "base", "fingerprint": name} for name in names}

    def shown(task: str, only: str | None = None) -> list[str]:
        options = make_options(GONE, only, FOLDER, Path("data"))
        systems = systems_of(load_task(task), models, options)
        assert all(one["fingerprint"] == one["id"] for one in systems)
        assert [one["template"] is None for one in systems][-2:] == [True, False]
        return [one["id"] for one in systems]

    assert shown("title") == ["title", "base", "base"]
    assert shown("summarize") == ["mine", "base", "base"]
    assert shown("title", only="title") == ["title", "mine", "base", "base"]
