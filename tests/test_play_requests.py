"""What `just play` takes from a browser and what it refuses, without a browser."""

import pytest
from fastapi.testclient import TestClient
from test_read_document import make_pdf

from inference.play import MOST_WAITING, make_app

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def page():
    """A client of the page, over an endpoint that is gone."""
    with TestClient(make_app("http://127.0.0.1:9"), base_url="http://127.0.0.1:7860") as client:
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
@pytest.mark.parametrize("path", ["/read", "/v1/chat/completions"])
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
    ("path", "most"), [("/read", 20_000_000), ("/v1/chat/completions", 1_000_000)]
)
def test_a_large_body_is_refused_before_it_is_read(page, path, most):
    told = f"it is over {most // 10**6} MB"
    assert refusal(page, path, b"{}", 413, **JSON, Content_Length=str(most + 1)) == told
    assert refusal(page, path, (b"a" * 500_000 for _ in range(41)), 413) == told


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
    with TestClient(make_app("http://127.0.0.1:9"), base_url="http://localhost") as page:
        assert MOST_WAITING > 0 and "try again" in refusal(page, "/read", b"Ice", 503)
