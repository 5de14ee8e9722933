"""The request queue that asks the teacher, through its command line, against a bad endpoint."""

import errno
import itertools
import random
import re
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import one_error_line, read_jsonl, run_stage, start_stage, teacher_reply, write_jsonl

from common.files import append_record
from data_prep.teacher import ask, client, limits, request_queue
from data_prep.teacher.failures import retry_after
from data_prep.teacher.limits import Budget, RateLimiter

STAGE = "data_prep.generate_replies"
KEY = "sk-secret-0123456789"


@pytest.fixture
def extracts(tmp_path):
    def write(n: int, split: str = "train"):
        rows = [{"id": f"a{i}", "text": f"text number {i}"} for i in range(n)]
        write_jsonl(tmp_path / f"extracts/{split}.jsonl", rows)
        return tmp_path

    return write


def command(folder, *more, split="train"):
    where = ("--data", folder)
    return [*where, "--splits", split, *more]


def environment(url: str) -> dict[str, str]:
    return {"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": KEY, "BUDGET_USD": "1000"}


def replied(folder) -> list[str]:
    path = folder / "summarize/replies/train.jsonl"
    return [r["id"] for r in read_jsonl(path)] if path.exists() else []


def refused(folder) -> list[str]:
    path = folder / "summarize/replies/train.refused.jsonl"
    return [r["id"] for r in read_jsonl(path)] if path.exists() else []


def written(folder) -> str:
    return "".join(p.read_text() for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(extracts, endpoint):
    """With refusals, faults, empty replies and replies that are cut among the whole ones."""
    folder, concurrency, n = extracts(150), 8, 150
    options = command(folder, "--concurrency", concurrency, "--budget-usd", 100)
    rng, odd = random.Random(0), {2: "refused", 5: "empty", 8: "cut"}

    def kind(prompt: str) -> str:
        return odd.get(int(re.search(r"text number (\d+)", prompt)[1]) % 15, "whole")

    server = endpoint(
        delay=0.1,
        status=lambda prompt: 400 if kind(prompt) == "refused" else 200,
        finish=lambda prompt: "length" if kind(prompt) == "cut" else "stop",
        faults={"500": 0.03, "503": 0.02},
    )
    server.reply = lambda prompt: None if kind(prompt) == "empty" else teacher_reply()
    for kill in range(1, 6):
        before = server.ledger.total()
        process = start_stage(STAGE, *options, **environment(server.url))
        while server.ledger.total() == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.2)  # what was in flight is still answered, and paid for
        whole = (folder / "summarize/replies/train.jsonl").read_bytes().count(b"\n")
        assert server.ledger.total() - whole <= concurrency * kill
    run_stage(STAGE, *options, **environment(server.url))
    assert sorted(replied(folder) + refused(folder)) == sorted(f"a{i}" for i in range(n))
    assert len(refused(folder)) == 10 and len(server.ledger) == 140 and kill == 5
    assert server.ledger.total() - 140 <= concurrency * 5
    replies = read_jsonl(folder / "summarize/replies/train.jsonl")
    unusable = Counter(r["unusable"] for r in replies if r.get("unusable"))
    assert unusable == {"empty": 10, "cut at the token limit": 10}
    # What was in flight at the kills still counts as spent: no dollar is missing.
    spent = Budget(folder / "summarize/replies", None).spent
    in_flight = 5 * concurrency * ((2000 + 256) * 0.15 + 4096 * 0.6) / 1e6
    assert server.charged <= spent <= 1.1 * server.charged + in_flight


@pytest.mark.slow
def test_every_extract_ends_with_a_reply_or_a_reason_whatever_the_endpoint_does(extracts, endpoint):
    folder, n = extracts(60), 60
    faults = {"429": 0.2, "500": 0.03, "503": 0.02, "hang": 0.01, "truncate": 0.05, "garbage": 0.05}
    options = command(folder, "--concurrency", 16, "--timeout", 1)
    server = endpoint(delay=0.02, retry_after=0.05, faults=faults)
    result = run_stage(STAGE, *options, code=None, **environment(server.url))
    (left,) = re.findall(r"(\d+) still to ask", result.stdout)
    assert len(set(replied(folder))) == len(replied(folder)) == n - int(left)
    assert server.outcomes["200"] == len(replied(folder)) > 0.9 * n
    assert result.returncode == (left != "0")
    assert server.outcomes.total() < 2 * n  # no storm
    assert KEY not in result.stdout + result.stderr + written(folder)


@pytest.mark.slow
@pytest.mark.parametrize("percent", [5, 15, 30, 50])
def test_what_the_teacher_refuses_never_stops_the_others(extracts, endpoint, percent):
    folder, n = extracts(203), 203
    rng = random.Random(percent)
    bad = {f"a{i}" for i in range(n) if rng.random() < percent / 100}
    good = {f"a{i}" for i in range(n)} - bad

    def status(prompt: str) -> int:
        return 400 if "a" + re.search(r"text number (\d+)", prompt)[1] in bad else 200

    server = endpoint(status=status, message="content filter", delay=0.4)
    result = run_stage(STAGE, *command(folder), **environment(server.url))
    assert set(replied(folder)) == good and len(replied(folder)) == len(good)
    assert sorted(refused(folder)) == sorted(bad)
    refusal = read_jsonl(folder / "summarize/replies/train.refused.jsonl")[0]
    assert refusal["reason"] == "content filter" and refusal["created"] and refusal["prompt_sha"]
    assert f"{len(bad)} refused (*.refused.jsonl)" in result.stdout

    asked = len(server.headers)
    again = run_stage(STAGE, *command(folder), **environment(server.url))
    assert len(server.headers) == asked == n
    assert f"{len(bad)} refused before" in again.stdout

    run_stage(STAGE, *command(folder, "--retry-refused"), code=None, **environment(server.url))
    assert asked < len(server.headers) <= asked + len(bad) and set(replied(folder)) == good
    server.status = lambda prompt: 200
    run_stage(STAGE, *command(folder, "--retry-refused"), **environment(server.url))
    assert len(replied(folder)) == n and set(replied(folder)) == good | bad


def test_an_option_that_refuses_everything_stops_the_run_and_is_not_remembered(extracts, endpoint):
    folder = extracts(203)
    server = endpoint(status=400, message="temperature is out of range")
    for more in ((), ("--limit", 3)):
        result = run_stage(STAGE, *command(folder, *more), code=1, **environment(server.url))
        line = one_error_line(result)
        assert "requests sent were refused, the last with: temperature is out of range" in line
        assert not refused(folder)
    assert len(server.headers) <= 64 + 10 + 3
    server.status = lambda prompt: 200
    run_stage(STAGE, *command(folder, "--limit", 3), **environment(server.url))
    # The endpoint has answered before, so now it is the texts; each run gets on.
    server.status = lambda prompt: 400
    run_stage(STAGE, *command(folder, "--limit", 8), **environment(server.url))
    assert len(refused(folder)) == 5


def test_a_text_refused_for_good_does_not_keep_the_run_from_ending_well(extracts, endpoint):
    folder = extracts(3)
    server = endpoint(status=lambda prompt: 422 if "number 1" in prompt else 200)
    for _ in range(2):
        run_stage(STAGE, *command(folder), **environment(server.url))
    assert refused(folder) == ["a1"] and len(server.headers) == 3


@pytest.mark.slow
def test_the_budget_is_never_passed_by_what_the_endpoint_charges(extracts, endpoint):
    folder = extracts(300)
    options = command(folder, "--concurrency", 64, "--timeout", 2)
    faults = {"garbage": 0.05, "truncate": 0.05, "500": 0.02}  # charged, or nobody knows
    server = endpoint(delay=0.05, faults=faults, count_tokens=None)
    for budget in (0.1, 0.25):
        more = ("--budget-usd", budget)
        result = run_stage(STAGE, *options, *more, code=1, **environment(server.url))
        charged = server.charged
        assert 0.5 * budget < charged <= budget
        left = 300 - len(replied(folder))
        assert f"the budget is spent; {left} are left for a larger --budget-usd" in result.stdout
    run_stage(STAGE, *options, *more, code=1, **environment(server.url))
    assert server.charged == charged  # nothing more was asked
    run_stage(STAGE, *options, "--budget-usd", 100, **environment(server.url))
    assert len(replied(folder)) == len(set(replied(folder))) == 300


@pytest.mark.slow
def test_two_processes_in_one_folder_share_the_budget(extracts, endpoint):
    folder = extracts(300)
    extracts(300, "test")
    server, budget = endpoint(delay=0.1, count_tokens=None), 0.3
    options = ("--concurrency", 16, "--budget-usd", budget)
    processes = [
        start_stage(STAGE, *command(folder, *options, split=split), **environment(server.url))
        for split in ("train", "test")
    ]
    out = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all("the budget is spent" in text for text in out)
    assert 0.5 * budget < server.charged <= budget
    for split in ("train", "test"):
        assert len(read_jsonl(folder / f"summarize/replies/{split}.jsonl")) > 10


def test_a_folder_without_a_sum_has_spent_what_its_files_say(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"cost_usd": 1.5}, {"cost_usd": None}])
    write_jsonl(tmp_path / "judge.jsonl", [{"cost_usd": 0.25}])
    budget = Budget(tmp_path, 3)
    assert budget.spent == 1.75 and not budget.reserve(1.5) and budget.reserve(1)
    other = Budget(tmp_path, 3)  # another process
    assert other.spent == 2.75 and not other.reserve(0.5)
    budget.settle(1, 0.5)
    assert other.reserve(0.5) and Budget(tmp_path, None).spent == pytest.approx(2.75)


def test_a_budget_without_a_price_is_an_error_that_says_what_to_pass(extracts, endpoint):
    folder, server = extracts(3), endpoint()
    options = command(folder, "--budget-usd", 1, "--model", "some/model")
    result = run_stage(STAGE, *options, code=1, **environment(server.url))
    assert "pass --price IN OUT" in one_error_line(result)
    assert not server.outcomes
    run_stage(STAGE, *options, "--price", 1, 2, **environment(server.url))
    assert read_jsonl(folder / "summarize/replies/train.jsonl")[0]["cost_usd"] > 0


def test_a_reply_cut_off_is_kept_and_marked(extracts, endpoint):
    folder = extracts(2)
    cutting = endpoint(finish=lambda prompt: "length")
    result = run_stage(STAGE, *command(folder), **environment(cutting.url))
    replies = read_jsonl(folder / "summarize/replies/train.jsonl")
    assert [r["finish_reason"] for r in replies] == ["length"] * 2
    assert "0 replies, 2 unusable (2 cut at the token limit)" in result.stdout


@pytest.mark.slow
def test_an_endpoint_that_is_down_or_never_was_ends_the_run(extracts, endpoint, monkeypatch):
    monkeypatch.setattr(limits, "BACKOFF", 1e-4)
    folder = extracts(50)
    for url in ("http://127.0.0.1:9", endpoint(faults={"429": 1}, retry_after=0).url):
        result = run_stage(STAGE, *command(folder), code=1, **environment(url))
        assert "9 times in a row no reply, the last with: " in one_error_line(result)
        assert "50 are left for another run" in one_error_line(result)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_own_error(extracts, endpoint, monkeypatch):
    """A second reason to stop, the wrong key that comes later, does not take its place."""
    folder, server = extracts(50), endpoint(delay=0.05)

    def append(file, *records):
        if file.tell() > 2000:
            server.status, server.message = lambda prompt: 401, "bad key"
            time.sleep(0.2)
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        append_record(file, *records)

    monkeypatch.setattr(request_queue, "append_record", append)
    options = command(folder, "--concurrency", 8)
    result = run_stage(STAGE, *options, code=1, **environment(server.url))
    assert "No space left on device" in one_error_line(result)
    kept = len(replied(folder))
    monkeypatch.undo()
    server.status = lambda prompt: 200
    run_stage(STAGE, *options, **environment(server.url))
    assert 0 < kept < 50 == len(set(replied(folder)))


@pytest.mark.slow
def test_ctrl_c_after_another_reason_to_stop_leaves_that_reason(extracts, endpoint):
    folder = extracts(50)
    asked = itertools.count(1)
    # So that others are in flight when the 401 comes, which is at once.
    status = lambda _: 401 if next(asked) == 10 else 200  # noqa: E731
    server = endpoint(delay=4, status=status, message="bad key")
    process = start_stage(STAGE, *command(folder, "--concurrency", 16), **environment(server.url))
    while not server.outcomes["401"]:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "refuses the key (bad key)" in err, out + err
    assert "waiting for " in out + err
    assert len(replied(folder)) == server.outcomes["200"] >= 3


@pytest.mark.slow
def test_the_rate_keeps_under_a_cap_it_is_not_told(extracts, endpoint):
    folder = extracts(120)
    server = endpoint(cap=20, delay=0.1)
    run_stage(STAGE, *command(folder, "--concurrency", 32), **environment(server.url))
    assert server.outcomes["200"] == 120 and server.outcomes["429"] < 24


def test_another_model_is_asked_beside_the_old(extracts, endpoint):
    folder, server = extracts(5), endpoint()
    for more in ((), ("--model", "other/model"), ()):
        run_stage(STAGE, *command(folder, *more), **environment(server.url))
    replies = read_jsonl(folder / "summarize/replies/train.jsonl")
    assert len(replies) == 10 and len({(r["model"], r["prompt_sha"]) for r in replies}) == 2


def test_other_settings_are_asked_anew_by_a_key_of_ones_own(tmp_path, endpoint):
    """As evaluation asks: what tells its answers apart stands in `settings`."""
    import argparse

    server, path = endpoint(), tmp_path / "replies.jsonl"
    parser = argparse.ArgumentParser()
    ask.teacher_options(parser)
    args = parser.parse_args(["--model", "m", "--price", "1", "1", "--budget-usd", "1"])
    options = client.ask_options(args)

    def wanted(limit):
        message = {"role": "user", "content": "text"}
        settings = {"model": "m", "limit": limit}
        return [{"id": f"t{i}", "messages": [message], "settings": settings} for i in range(3)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOGETHER_BASE_URL", server.url)
        for limit in (1, 2, 1):
            assert ask.ask_all(wanted(limit), path, options, "answers", ("id", "settings")) == 0
    records = read_jsonl(path)
    assert [r["settings"]["limit"] for r in records] == [1] * 3 + [2] * 3
    assert "prompt_sha" not in records[0] and records[0]["text"] == teacher_reply()


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(limits.time, "monotonic", lambda: self.now)


def offered(clock, limiter: RateLimiter, cap: float, seconds: float) -> tuple[int, int]:
    """(taken, refused) of an endpoint that takes `cap` requests in any second."""
    taken, refused, window, end = 0, 0, [], clock.now + seconds
    while clock.now < end:
        clock.now += max(limiter.wait(), 0.0001)
        sent = limiter.sent()
        window = [t for t in window if t > clock.now - 1]
        if len(window) < cap:
            window.append(clock.now)
            limiter.replied()
            taken += 1
        else:
            limiter.failed(sent, 1.0, True)
            refused += 1
    return taken, refused


@pytest.mark.parametrize("cap", [5, 50, 300])
def test_the_rate_finds_a_cap_and_a_new_one(monkeypatch, cap):
    clock = Clock(monkeypatch)
    limiter = RateLimiter(64)
    taken, refused = offered(clock, limiter, cap, 60)
    assert taken > 0.85 * cap * 60 and refused < 0.05 * taken
    offered(clock, limiter, cap / 4, 30)
    taken, refused = offered(clock, limiter, cap / 4, 60)
    assert taken > 0.75 * cap / 4 * 60 and refused < 60  # after each it waits its second


def test_one_moment_of_refusals_counts_once_and_a_server_error_leaves_the_rate(monkeypatch):
    clock = Clock(monkeypatch)
    limiter = RateLimiter(64)
    sent = [limiter.sent() for _ in range(10)]
    clock.now += 0.1
    for moment in sent:
        limiter.failed(moment, 0, True)
    assert limiter.failures == 1
    rate = limiter.rate
    for failures in range(2, 9):
        clock.now += 200
        limiter.failed(limiter.sent(), 0, False)
        assert limiter.failures == failures
    assert limiter.wait() > 10  # far apart
    clock.now += 200
    limiter.replied()
    assert limiter.failures == 0 and limiter.rate >= rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("9999", 600), ("soon", 0)]
)
def test_what_the_endpoint_asks_to_wait(text, seconds):
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": text}))
    assert retry_after(error) == seconds and retry_after(ValueError("no answer")) == 0
