import re
import signal
import time

import pytest
from conftest import one_error_line, read_jsonl, run_stage, start_stage, write_jsonl

from common.files import share_of
from prompts.task import load_task

STAGE = "data_prep.generate_replies"
TASK = load_task()
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
    return ["--data", folder, *more]


def ask(folder, url, *more, code=0, **env):
    env = {"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": KEY, "BUDGET_USD": "1000"} | env
    return run_stage(STAGE, *options(folder, *more), code=code, **env)


def test_every_extract_gets_one_reply_with_its_cost(extracts, endpoint):
    server = endpoint()
    result = ask(extracts, server.url)
    replies = read_jsonl(extracts / "summarize/replies/train.jsonl")
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
        "answers",
        "prompt",
        "text_digest",
        "sampling",
        "endpoint",
    }
    assert "$0.0126" in result.stderr  # 60 replies
    assert len(server.ledger) == 64 and set(server.ledger.values()) == {1}

    ask(extracts, server.url)  # nothing is missing, so nothing is asked
    assert set(server.ledger.values()) == {1}
    ask(extracts, server.url, "--model", "another/model", "--splits", "test")
    assert len(read_jsonl(extracts / "summarize/replies/test.jsonl")) == 8


def test_the_key_goes_to_the_endpoint_and_nowhere_else(extracts, endpoint):
    server = endpoint()
    result = ask(extracts, server.url)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    refused = ask(extracts, endpoint(status=401, message="bad key").url, "--model", "m", code=1)
    written = "".join(p.read_text() for p in extracts.rglob("*.jsonl"))
    for text in (result.stdout, result.stderr, refused.stdout, refused.stderr, written):
        assert KEY not in text


def test_a_line_torn_by_a_kill_is_asked_for_again(extracts, endpoint):
    server, path = endpoint(), extracts / "summarize/replies/train.jsonl"
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
        BUDGET_USD="1000",
    )
    while not server.ledger:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err and "the same command goes on" in err
    assert read_jsonl(extracts / "summarize/replies/train.jsonl")


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (401, "Invalid API key", "refuses the key (Invalid API key); check TOGETHER_API_KEY"),
        (403, "forbidden", "the endpoint forbids it (HTTP 403: forbidden); check the key"),
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


def test_a_base_url_may_end_in_v1(extracts, endpoint):
    ask(extracts, endpoint().url + "/v1", "--splits", "test")
    assert len(read_jsonl(extracts / "summarize/replies/test.jsonl")) == 4


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
    assert len(read_jsonl(extracts / "summarize/replies/test.jsonl")) == 4


def test_a_folder_that_cannot_be_written(extracts, endpoint):
    (data := extracts).joinpath("summarize").write_text("a file in the folder's place")
    result = ask(data, endpoint().url, code=1)
    assert str(data / "summarize") in one_error_line(result)


def test_an_unknown_price_is_said(extracts, endpoint):
    result = ask(extracts, endpoint().url, "--model", "some/model", "--limit", 2)
    assert "no price of some/model" in result.stderr
    assert read_jsonl(extracts / "summarize/replies/train.jsonl")[0]["cost_usd"] is None
    assert len(read_jsonl(extracts / "summarize/replies/train.jsonl")) == 2


def test_an_empty_reply_is_paid_for_and_so_kept(extracts, endpoint):
    server = endpoint(content=None)
    ask(extracts, server.url, "--splits", "test")
    replies = read_jsonl(extracts / "summarize/replies/test.jsonl")
    assert [r["text"] for r in replies] == [""] * 4 and replies[0]["cost_usd"] > 0
    ask(extracts, server.url, "--splits", "test")
    assert set(server.ledger.values()) == {1}


@pytest.mark.parametrize("option", ["--concurrency", "--limit", "--max-tokens"])
def test_a_number_that_makes_no_sense_is_wrong_usage(extracts, option):
    assert option in ask(extracts, "http://127.0.0.1:9", option, 0, code=2).stderr


def test_the_plan_counts_what_is_missing_both_ways_and_asks_nothing(extracts, endpoint):
    ask(extracts, endpoint().url, "--splits", "train", "--limit", 20)
    result = run_stage(STAGE, *options(extracts, "--plan"))
    rows_of = [re.split(r" *\| *", line)[1:-1] for line in result.stdout.splitlines()]
    lines = {row[0]: row[1:] for row in rows_of if row}
    assert list(lines)[2] == "openai/gpt-oss-120b (2 a reply)"  # the chosen one first
    two, one = (lines[f"openai/gpt-oss-120b ({n} a reply)"] for n in (2, 1))
    assert two[0] == "44" and one[0] == "64"  # the other prompt has no reply yet
    rows = read_jsonl(extracts / "extracts/test.jsonl")
    rows += read_jsonl(extracts / "extracts/train.jsonl")[20:]
    prompts = [TASK.render("teacher", text=row["text"], longer=1) for row in rows]
    tokens_in = sum(len(prompt.encode()) for prompt in prompts) / 4
    assert float(two[1]) == pytest.approx(tokens_in / 1e6, abs=0.006)
    assert float(two[3]) == pytest.approx((tokens_in * 0.15 + 44 * 1600 * 0.6) / 1e6, abs=0.006)
    assert float(one[3]) < float(two[3]) and "Llama" in result.stdout
    told = ["--plan", "--price", 15, 60, "--model", "meta-llama/Llama-3.3-70B-Instruct-Turbo"]
    for batch in ((), ("--batch",)):  # a price that is told holds, and is halved once
        lines = run_stage(STAGE, *options(extracts, *told, *batch)).stdout.splitlines()
        usd, in_batch = map(float, re.split(r" *\| *", lines[2])[-4:-2])
        assert usd > 1 and in_batch == pytest.approx(usd / 2, abs=0.01)


def test_one_answer_without_a_rating_is_half_the_work(extracts, endpoint):
    server = endpoint(content="One answer.")
    ask(extracts, server.url, "--splits", "test", "--single")
    replies = read_jsonl(extracts / "summarize/replies/test.jsonl")
    assert {(r["answers"], r["prompt_sha"]) for r in replies} == {(1, TASK.sha("teacher_single"))}
    assert all("answer with the summary alone" in prompt for prompt in server.ledger)
    ask(extracts, server.url, "--splits", "test")
    assert len(read_jsonl(extracts / "summarize/replies/test.jsonl")) == 8


def test_another_task_has_its_own_prompt_and_its_own_folder(extracts, endpoint):
    server = endpoint(content="A title")
    ask(extracts, server.url, "--splits", "test", "--task", "title")
    assert all("Write a title for this text" in prompt for prompt in server.ledger)
    assert len(read_jsonl(extracts / "title/replies/test.jsonl")) == 4
    assert not (extracts / "summarize").exists()


def test_the_draw_is_even_seeded_recorded_and_what_the_prompt_says(extracts, endpoint):
    server = endpoint()
    ask(extracts, server.url, "--splits", "train")
    replies = {r["id"]: r["longer"] for r in read_jsonl(extracts / "summarize/replies/train.jsonl")}
    assert 20 < sum(longer == 1 for longer in replies.values()) < 40
    for prompt in server.ledger:
        key = "train" + re.search(r"text train (\d+)", prompt)[1]
        shorter, longer = ("second", "first") if replies[key] == 1 else ("first", "second")
        assert f"Make the {shorter} summary a bit shorter than the {longer}." in prompt


def test_without_balance_the_first_is_the_longer_as_in_the_original(extracts, endpoint):
    server = endpoint()
    ask(extracts, server.url, "--splits", "test", "--no-balance")
    assert set(server.ledger) == {
        TASK.render("teacher", text=f"text test {i}", longer=1) for i in range(4)
    }
    replies = read_jsonl(extracts / "summarize/replies/test.jsonl")
    assert {(r["prompt_sha"], r["longer"]) for r in replies} == {(TASK.sha("teacher"), 1)}


def test_the_draw_is_another_than_that_of_the_extracts(tmp_path, endpoint):
    chosen = [key for key in map(str, range(400)) if share_of(key, 0) < 0.2]
    write_jsonl(tmp_path / "extracts/test.jsonl", [{"id": key, "text": key} for key in chosen])
    ask(tmp_path, endpoint().url, "--splits", "test")
    drawn = [r["longer"] for r in read_jsonl(tmp_path / "summarize/replies/test.jsonl")]
    assert 0.3 < drawn.count(1) / len(drawn) < 0.7
