"""Several endpoints as one teacher: one that is down, busy or wrong holds up none of the others."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import httpx
import pytest
import together
from conftest import ROOT, clean_environment, make_tokenizer, one_error_line, read_jsonl, run_stage
from test_ask_teacher import command, environment, extracts, refused, replied  # noqa: F401
from test_sample_extracts import document, write_jsonl

from data_prep.teacher import limits
from data_prep.teacher.endpoints import endpoint_url, endpoint_urls, post
from data_prep.teacher.limits import Budget

STAGE = "data_prep.generate_replies"


def records_of(folder, table: str = "train.jsonl") -> list[dict]:
    return read_jsonl(folder / "summarize/replies" / table)


def ask(folder, servers, *more, code: int | None = 0):
    url = ",".join(server.url for server in servers)
    return run_stage(STAGE, *command(folder, *more), code=code, **environment(url))


def name_of(server) -> str:
    return f"{server.url.removeprefix('http://')}/v1"


def test_both_are_asked_each_text_once_and_a_record_tells_which(extracts, endpoint):  # noqa: F811
    folder, servers = extracts(40), [endpoint(delay=0.02), endpoint(delay=0.02)]
    result = ask(folder, servers)
    assert sorted(replied(folder)) == sorted(f"a{i}" for i in range(40))
    by_endpoint = Counter(record["endpoint"] for record in records_of(folder))
    assert by_endpoint == {name_of(one): one.outcomes["200"] for one in servers}
    assert min(by_endpoint.values()) > 10
    assert f"  {name_of(servers[0])}: {by_endpoint[name_of(servers[0])]} replies" in result.stdout


def test_one_that_dies_midway_stops_nothing(extracts, endpoint):  # noqa: F811
    folder, dying, other = extracts(50), endpoint(delay=0.02), endpoint(delay=0.02)

    def close_after_ten(prompt: str) -> int:
        if dying.ledger.total() >= 10:
            dying.loop.call_soon_threadsafe(dying.server.close)
            for task in dying_tasks(dying):
                dying.loop.call_soon_threadsafe(task.cancel)
        return 200

    dying.status = close_after_ten
    ask(folder, [dying, other])
    assert sorted(replied(folder)) == sorted(f"a{i}" for i in range(50)) and not refused(folder)
    by_endpoint = Counter(record["endpoint"] for record in records_of(folder))
    assert by_endpoint[name_of(other)] >= 30 and by_endpoint[name_of(dying)] >= 8


def dying_tasks(server) -> set:
    return asyncio.all_tasks(server.loop)


def test_one_that_is_busy_for_long_holds_up_nothing(extracts, endpoint):  # noqa: F811
    folder, busy, other = extracts(30), endpoint(status=429), endpoint()
    busy.retry_after = 600
    result = ask(folder, [busy, other])
    assert len(set(replied(folder))) == 30 == other.outcomes["200"]
    assert "0 replies, 0 refused" in result.stdout and "30 replies" in result.stdout


@pytest.mark.parametrize(
    ("status", "told"), [(401, "refuses the key (no)"), (404, "does not know"), (403, "forbids it")]
)
def test_one_that_refuses_the_key_or_the_model_is_left_out(
    extracts,  # noqa: F811
    endpoint,
    status,
    told,
):
    folder, wrong, other = extracts(30), endpoint(status=status), endpoint(delay=0.01)
    result = ask(folder, [wrong, other])
    assert len(set(replied(folder))) == 30 and not refused(folder)
    assert f"{name_of(wrong)}: the endpoint " in result.stdout and told in result.stdout
    assert "the others go on" in result.stdout and wrong.outcomes[str(status)] <= 10
    line = one_error_line(ask(folder, [wrong, wrong], "--model", "other/one", code=1))
    assert told in line and "30 are left for another run" in line  # twice the same is one


@pytest.mark.parametrize("number", [3, 60])
def test_what_only_one_refuses_the_other_is_asked(extracts, endpoint, number):  # noqa: F811
    """As where one takes no more than a short context, or was started with other options."""
    folder = extracts(number)
    refusing, other = endpoint(status=400, message="too long"), endpoint(delay=0.05)
    result = ask(folder, [refusing, other])
    assert len(set(replied(folder))) == number and not refused(folder)
    assert "requests sent were refused, the last with: too long" in result.stdout
    assert f"{number} replies, 0 refused" in result.stdout
    line = one_error_line(ask(folder, [refusing], "--model", "other/one", code=1))
    assert "requests sent were refused, the last with: too long" in line


def test_what_the_teacher_refuses_is_refused_by_the_endpoint_that_answers_others(
    extracts,  # noqa: F811
    endpoint,
):
    def status(prompt: str) -> int:
        return 400 if re.search(r"text number \d*5\b", prompt) else 200

    folder = extracts(40)
    servers = [endpoint(status=status, delay=0.01), endpoint(status=status, delay=0.01)]
    result = ask(folder, servers)
    assert sorted(refused(folder)) == sorted(f"a{n}" for n in (5, 15, 25, 35))
    assert "36 replies, 4 refused" in result.stdout
    names = {record["endpoint"] for record in records_of(folder, "train.refused.jsonl")}
    assert names <= {name_of(server) for server in servers}


def test_the_run_stops_where_all_are_down(extracts, endpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr(limits, "BACKOFF", 1e-4)
    folder, servers = extracts(30), [endpoint(), endpoint()]
    for server in servers:
        server.close()
    line = one_error_line(ask(folder, servers, code=1))
    assert line.count("times in a row no reply, the last with: ") == 2
    assert all(name_of(server) in line for server in servers) and "30 are left" in line
    for server in servers:  # whose fixture closes it again
        server.close = lambda: None


@pytest.mark.slow
def test_one_budget_is_for_all(extracts, endpoint):  # noqa: F811
    folder = extracts(200)
    servers = [endpoint(delay=0.05, count_tokens=None) for _ in range(3)]
    result = ask(folder, servers, "--budget-usd", 0.1, code=1)
    charged = sum(server.charged for server in servers)
    assert 0.05 < charged <= 0.1 and "the budget is spent" in result.stdout
    assert Budget(folder / "summarize/replies", None).spent == pytest.approx(charged)


def test_how_several_are_named(monkeypatch):
    monkeypatch.setenv("TOGETHER_BASE_URL", "http://a:1/, http://b:2/v1,http://a:1/v1")
    assert endpoint_urls() == ["http://a:1/v1", "http://b:2/v1"]
    assert endpoint_urls("http://c/x,http://d") == ["http://c/x", "http://d"]
    with pytest.raises(Exception, match="2 endpoints are named where one is wanted"):
        endpoint_url()


@pytest.mark.parametrize("url", ["http://a:1,", ",", "http://a:1,ftp://b", "http://a:1 http://b:2"])
def test_a_list_with_what_is_no_address_is_one_line(extracts, url):  # noqa: F811
    result = run_stage(STAGE, *command(extracts(1)), code=1, **environment(url))
    assert "is no address such as" in one_error_line(result)


class RedirectingClient:
    """Sends what comes to its first address on to another, and answers there."""

    def __init__(self, location: str) -> None:
        self.location, self.urls = location, []

    async def post(self, url: str, **_) -> httpx.Response:
        self.urls.append(url)
        request = httpx.Request("POST", url)
        if len(self.urls) > 1:
            return httpx.Response(200, content=b"{}", request=request)
        response = httpx.Response(307, headers={"Location": self.location}, request=request)
        raise together.APIStatusError("moved", response=response, body=None)


@pytest.mark.parametrize(
    ("url", "location", "follows"),
    [
        ("https://api.x.ai/v1/chat", "/v2/chat", True),
        ("https://api.x.ai/v1/chat", "https://api.x.ai:443/v2/chat", True),
        ("http://api.x.ai/v1/chat", "https://api.x.ai/v1/chat", True),
        ("http://api.x.ai:8000/v1/chat", "https://api.x.ai:8000/v1/chat", True),
        ("https://api.x.ai/v1/chat", "http://api.x.ai/v1/chat", False),
        ("https://api.x.ai/v1/chat", "http://api.x.ai:8080/v1/chat", False),
        ("https://api.x.ai/v1/chat", "http://api.x.ai:443/v1/chat", False),
        ("https://api.x.ai/v1/chat", "https://api.x.ai:8443/v1/chat", False),
        ("http://api.x.ai:8000/v1/chat", "https://api.x.ai/v1/chat", False),
        ("https://api.x.ai/v1/chat", "https://api.y.ai/v1/chat", False),
        ("https://api.x.ai/v1/chat", "https://api.x.ai:port/v1/chat", False),
    ],
)
def test_key_and_prompt_follow_no_redirect_to_another_place_or_in_plain_text(
    url, location, follows
):
    client = RedirectingClient(location)
    if follows:
        assert asyncio.run(post(client, url, {})) == b"{}"
    else:
        with pytest.raises(together.APIStatusError):
            asyncio.run(post(client, url, {}))
    assert len(client.urls) == 1 + follows


def test_a_batch_is_for_one_endpoint(extracts, endpoint):  # noqa: F811
    line = one_error_line(ask(extracts(1), [endpoint(), endpoint()], "--batch", code=1))
    assert "2 endpoints are named where one is wanted" in line


@pytest.mark.slow
def test_the_second_ctrl_c_stops_at_once_and_what_is_in_flight_stays_booked(tmp_path, endpoint):
    """In a group of its own, as a terminal gives to a command: each signal reaches all of it."""
    make_tokenizer(tmp_path / "student")
    rows = [document(n, 120) for n in range(20)] + [document(99, 4000)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    server = endpoint(delay=600)
    windows = ["--whole", "--min-tokens", 200, "--extracts-max-tokens", 2000, "--min-chars", 10_000]
    options = ["--input", path, "--data", tmp_path, *windows, "--tokenizer", tmp_path / "student"]
    options += ["--concurrency", 4, "--timeout", 900, "--budget-usd", 5]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.make_dataset", *map(str, options)],
        cwd=ROOT,
        env=clean_environment(**environment(server.url)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while len(server.headers) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits for the replies in flight
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "waiting for 4 replies in flight; Ctrl-C again gives them up" in said
    assert "4 requests in flight are given up, booked at their worst case" in said
    replies = tmp_path / "summarize/replies"
    in_flight = 4 * 4096 * 0.6 / 1e6
    assert in_flight < Budget(replies, None).spent < 1.2 * in_flight
    assert (replies / "train.jsonl").read_bytes() == b""
