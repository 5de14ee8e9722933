import re
import signal
import time

import pytest
from conftest import one_error_line, read_jsonl, run_stage, start_stage, write_jsonl

from common.files import share_of
from data_prep.generate_replies import TEACHER, to_request
from prompts import render, template_sha

STAGE = "data_prep.generate_replies"
KEY = "sk-secret-0123456789"


@pytest.fixture
def extracts(tmp_path):
    for split, n in (("train", 60), ("test", 4)):
        write_jsonl(
            tmp_path / f"extracts/{split}.jsonl",
            [{"id": f"{split}{i}", "text": f"text {split} {i}"} for i in range(n)],
        )
    return tmp_path


def options(folder, *more):
    return ["--extracts", folder / "extracts", "--output", folder / "replies", *more]


def ask(folder, url, *more, code=0):
    return run_stage(
        STAGE, *options(folder, *more), code=code, TOGETHER_BASE_URL=url, TOGETHER_API_KEY=KEY
    )


def test_every_extract_gets_one_reply_with_its_cost(extracts, endpoint):
    server = endpoint()
    result = ask(extracts, server.url)
    replies = read_jsonl(extracts / "replies/train.jsonl")
    assert sorted(r["id"] for r in replies) == sorted(f"train{i}" for i in range(60))
    assert replies[0]["usage"] == {"prompt_tokens": 1000, "completion_tokens": 100}
    assert replies[0]["cost_usd"] == pytest.approx((1000 * 0.15 + 100 * 0.60) / 1e6)
    assert set(replies[0]) == {
        "id",
        "model",
        "prompt_sha",
        "text",
        "finish_reason",
        "usage",
        "cost_usd",
        "created",
        "longer",
    }
    assert "$0.0126" in result.stderr  # 60 replies
    assert len(server.ledger) == 64 and set(server.ledger.values()) == {1}

    ask(extracts, server.url)  # nothing is missing, so nothing is asked
    assert set(server.ledger.values()) == {1}
    ask(extracts, server.url, "--model", "another/model", "--splits", "test")
    assert len(read_jsonl(extracts / "replies/test.jsonl")) == 8


def test_the_key_goes_to_the_endpoint_and_nowhere_else(extracts, endpoint):
    server = endpoint()
    result = ask(extracts, server.url)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    refused = ask(extracts, endpoint(status=401, message="bad key").url, "--model", "m", code=1)
    written = "".join(p.read_text() for p in extracts.rglob("*.jsonl"))
    for text in (result.stdout, result.stderr, refused.stdout, refused.stderr, written):
        assert KEY not in text


def test_a_line_torn_by_a_kill_is_asked_for_again(extracts, endpoint):
    server, path = endpoint(), extracts / "replies/train.jsonl"
    ask(extracts, server.url, "--limit", 59)
    with path.open("ab") as file:
        file.write(b'{"id": "train59", "mod')
    ask(extracts, server.url)
    assert sorted(r["id"] for r in read_jsonl(path)) == sorted(f"train{i}" for i in range(60))
    assert set(server.ledger.values()) == {1}


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(extracts, endpoint):
    server = endpoint(delay=0.2)
    process = start_stage(
        STAGE,
        *options(extracts, "--concurrency", 2),
        TOGETHER_BASE_URL=server.url,
        TOGETHER_API_KEY=KEY,
    )
    while not server.ledger:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err and "the same command goes on" in err
    assert read_jsonl(extracts / "replies/train.jsonl")


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_what_is_in_flight(extracts, endpoint):
    server = endpoint(delay=20)
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": KEY}
    process = start_stage(STAGE, *options(extracts, "--concurrency", 2), **environment)
    while len(server.headers) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits for the two
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 130 and "Traceback" not in err
    assert "waiting for 2 replies in flight" in out + err
    spent = extracts / "replies/.spent_usd"
    assert float(spent.read_text()) > 0.004  # two worst cases, which may yet be charged


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (401, "Invalid API key", "refuses the key (Invalid API key); check TOGETHER_API_KEY"),
        (403, "forbidden", "were refused, the last with: forbidden; check"),
        (404, "no such model", "does not know openai/gpt-oss-120b (no such model)"),
        (402, "credit limit", "wants payment (credit limit)"),
        (400, "bad option", "requests sent were refused, the last with: bad option"),
    ],
)
def test_what_asking_again_cannot_mend_stops_the_run(extracts, endpoint, status, message, said):
    server = endpoint(status=status, message=message)
    result = ask(extracts, server.url, "--concurrency", 16, code=1)
    assert said in one_error_line(result)
    assert len(server.headers) <= 16 + 10  # at most what was in flight, no storm


def test_without_key_and_endpoint(extracts):
    result = run_stage(STAGE, *options(extracts), code=1)
    line = one_error_line(result)
    assert "TOGETHER_API_KEY" in line and "TOGETHER_BASE_URL" in line


def test_a_base_url_with_v1_is_refused(extracts):
    result = run_stage(STAGE, *options(extracts), code=1, TOGETHER_BASE_URL="http://127.0.0.1:9/v1")
    assert "leave out /v1" in one_error_line(result)


@pytest.mark.parametrize("content", [None, "", "not json\n", "folder"])
def test_missing_empty_or_unreadable_extracts_say_how_to_make_them(tmp_path, content):
    path = tmp_path / "extracts/train.jsonl"
    path.parent.mkdir()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    line = one_error_line(ask(tmp_path, "http://127.0.0.1:9", code=1))
    assert str(path) in line and "just extracts" in line


def test_a_broken_line_is_named_and_the_rest_goes_on(extracts, endpoint):
    path = extracts / "extracts/test.jsonl"
    path.write_text(path.read_text() + '{"id": "torn\n')
    result = ask(extracts, endpoint().url, "--splits", "test")
    assert f"{path}:5: not valid JSON, line skipped" in result.stderr
    assert len(read_jsonl(extracts / "replies/test.jsonl")) == 4


def test_a_folder_that_cannot_be_written(extracts, endpoint):
    result = run_stage(
        STAGE,
        "--extracts",
        extracts / "extracts",
        "--output",
        "/proc/replies",
        code=1,
        TOGETHER_BASE_URL=endpoint().url,
        TOGETHER_API_KEY=KEY,
    )
    assert "/proc/replies" in one_error_line(result)


def test_an_unknown_price_is_said(extracts, endpoint):
    result = ask(extracts, endpoint().url, "--model", "some/model", "--limit", 2)
    assert "no price for some/model" in result.stderr
    assert read_jsonl(extracts / "replies/train.jsonl")[0]["cost_usd"] is None
    assert len(read_jsonl(extracts / "replies/train.jsonl")) == 2


def test_an_empty_reply_is_paid_for_and_so_kept(extracts, endpoint):
    server = endpoint(content=None)
    ask(extracts, server.url, "--splits", "test")
    replies = read_jsonl(extracts / "replies/test.jsonl")
    assert [r["text"] for r in replies] == [""] * 4 and replies[0]["cost_usd"] > 0
    ask(extracts, server.url, "--splits", "test")
    assert set(server.ledger.values()) == {1}


@pytest.mark.parametrize("option", ["--concurrency", "--limit", "--max-tokens"])
def test_a_number_that_makes_no_sense_is_wrong_usage(extracts, option):
    assert option in ask(extracts, "http://127.0.0.1:9", option, 0, code=2).stderr


def test_the_plan_counts_what_is_missing_and_asks_nothing(extracts, endpoint):
    ask(extracts, endpoint().url, "--splits", "train", "--limit", 20)
    rows = read_jsonl(extracts / "extracts/test.jsonl")
    rows[0]["text"] = "word " * 30_000  # 150,000 bytes, about 37,500 tokens
    write_jsonl(extracts / "extracts/test.jsonl", rows)
    result = run_stage(
        STAGE, *options(extracts, "--plan", "--max-rate", 0.01, "--reply-tokens", 500)
    )
    rows_of = [re.split(r" *\| *", line)[1:-1] for line in result.stdout.splitlines()]
    lines = {row[0]: row[1:] for row in rows_of if row}
    assert list(lines)[2] == "openai/gpt-oss-120b"  # the chosen one first
    assert lines["Qwen/Qwen3.5-9B"][1] == "64"  # it has no reply yet
    default = lines["openai/gpt-oss-120b"]
    assert default[:3] == ["131,072", "44", "0"]
    prompts = [to_request(row, True, 0) for row in rows]
    prompts += [to_request(r, True, 0) for r in read_jsonl(extracts / "extracts/train.jsonl")[20:]]
    tokens_in = sum(len(p["messages"][0]["content"].encode()) for p in prompts) / 4
    assert float(default[3]) == pytest.approx(tokens_in / 1e6, abs=0.006)
    assert float(default[5]) == pytest.approx((tokens_in * 0.15 + 44 * 500 * 0.6) / 1e6, abs=0.006)
    assert default[7] == "1.2"  # 44 at one in 100 seconds
    assert lines["Qwen/Qwen2-72B-Instruct (no longer served)"][1:3] == ["63", "1"]
    assert "Llama" in result.stdout and "extractive" not in result.stdout


def test_the_draw_is_even_seeded_recorded_and_what_the_prompt_says(extracts, endpoint):
    server = endpoint()
    ask(extracts, server.url, "--splits", "train")
    replies = {r["id"]: r["longer"] for r in read_jsonl(extracts / "replies/train.jsonl")}
    assert 20 < sum(longer == 1 for longer in replies.values()) < 40
    for prompt in server.ledger:
        key = "train" + re.search(r"text train (\d+)", prompt)[1]
        shorter, longer = ("second", "first") if replies[key] == 1 else ("first", "second")
        assert f"Make the {shorter} summary a bit shorter than the {longer}." in prompt
    chosen = [key for key in map(str, range(400)) if share_of(key, 0) < 0.2]  # as extracts are
    drawn = [to_request({"id": key, "text": ""}, True, 0)["longer"] for key in chosen]
    assert 0.3 < drawn.count(1) / len(drawn) < 0.7
    other = [to_request({"id": key, "text": ""}, True, 1)["longer"] for key in replies]
    assert other != list(replies.values())


def test_without_balance_the_first_is_the_longer_as_in_the_original(extracts, endpoint):
    server = endpoint()
    ask(extracts, server.url, "--splits", "test", "--no-balance")
    assert set(server.ledger) == {
        render(TEACHER, text=f"text test {i}", longer=1) for i in range(4)
    }
    replies = read_jsonl(extracts / "replies/test.jsonl")
    assert {(r["prompt_sha"], r["longer"]) for r in replies} == {(template_sha(TEACHER), 1)}
