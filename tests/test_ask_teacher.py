"""The engine that asks the teacher, through its command line, against a misbehaving endpoint."""

import random
import signal
import time

import pytest
from conftest import one_error_line, read_jsonl, run_stage, start_stage, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.endpoint import serving
from data_prep import pace
from data_prep.teacher.limits import Pace, Purse, wanted_wait

STAGE = "data_prep.generate_replies"
KEY = "sk-secret-0123456789"


@pytest.fixture
def extracts(tmp_path):
    def write(n: int):
        rows = [{"id": f"a{i}", "text": f"text number {i}"} for i in range(n)]
        write_jsonl(tmp_path / "extracts/train.jsonl", rows)
        return tmp_path

    return write


def command(folder, *more):
    where = ("--extracts", folder / "extracts", "--output", folder / "replies")
    return [*where, "--splits", "train", *more]


def environment(url: str) -> dict[str, str]:
    return {"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": KEY}


def replied(folder) -> list[str]:
    path = folder / "replies/train.jsonl"
    return [r["id"] for r in read_jsonl(path)] if path.exists() else []


def written(folder) -> str:
    return "".join(p.read_text() for p in folder.rglob("*") if p.is_file())


def test_ten_kills_at_random_moments_lose_and_double_nothing(extracts):
    folder, concurrency, n = extracts(250), 8, 250
    options = command(folder, "--concurrency", concurrency, "--budget-usd", 100)
    rng = random.Random(0)
    with serving("--latency", 0.1) as (url, ledger):
        for kill in range(1, 11):
            process = start_stage(STAGE, *options, **environment(url))
            before = sum(ledger()["prompts"].values())
            while sum(ledger()["prompts"].values()) == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            time.sleep(0.2)  # what was in flight is still answered, and paid for
            whole = (folder / "replies/train.jsonl").read_bytes().count(b"\n")
            assert sum(ledger()["prompts"].values()) - whole <= concurrency * kill
        run_stage(STAGE, *options, **environment(url))
        assert sorted(replied(folder)) == sorted(f"a{i}" for i in range(n))
        seen = ledger()
    assert len(seen["prompts"]) == n and kill == 10
    assert sum(seen["prompts"].values()) - n <= concurrency * 10
    # What the kills left unaccounted for was set aside: no dollar is missing.
    assert seen["charged"] <= Purse(folder / "replies/train.jsonl", None).spent


def test_every_extract_ends_with_a_reply_or_a_reason_whatever_the_endpoint_does(extracts):
    folder, n = extracts(80), 80
    faults = ["429=0.2", "500=0.03", "503=0.02", "hang=0.01", "truncate=0.05", "garbage=0.05"]
    options = command(folder, "--concurrency", 16, "--timeout", 2)
    with serving("--latency", 0.02, "--retry-after", 0.05, "--faults", *faults) as (url, ledger):
        result = run_stage(STAGE, *options, code=None, **environment(url))
        outcomes = ledger()["outcomes"]
    reasons = folder / "replies/train.missing.jsonl"
    without = [r["id"] for r in read_jsonl(reasons) if r["reason"]] if reasons.exists() else []
    assert sorted(replied(folder) + without) == sorted(f"a{i}" for i in range(n))
    assert outcomes["200"] == len(replied(folder)) > 0.9 * n
    assert result.returncode == bool(without)
    assert sum(outcomes.values()) < 2 * n  # no storm
    assert KEY not in result.stdout + result.stderr + written(folder)


def test_the_budget_is_never_passed_by_what_the_endpoint_charges(extracts):
    folder = extracts(500)
    options = command(folder, "--concurrency", 64, "--timeout", 2)
    faults = ["garbage=0.05", "truncate=0.05", "500=0.02"]  # charged, or nobody knows
    with serving("--latency", 0.05, "--faults", *faults) as (url, ledger):
        for budget in (0.1, 0.3):
            more = ("--budget-usd", budget)
            result = run_stage(STAGE, *options, *more, code=1, **environment(url))
            charged = ledger()["charged"]
            assert 0.5 * budget < charged <= budget
            left = 500 - len(replied(folder))
            assert (
                f"the budget is spent; {left} are left for a larger --budget-usd" in result.stdout
            )
            assert f"of ${budget:.2f} spent" in result.stdout
        assert run_stage(STAGE, *options, *more, code=1, **environment(url)).returncode == 1
        assert ledger()["charged"] == charged  # nothing more was asked
        run_stage(STAGE, *options, "--budget-usd", 100, **environment(url))
    assert len(replied(folder)) == len(set(replied(folder))) == 500


def test_a_budget_without_a_price_is_an_error_that_says_what_to_pass(extracts):
    folder = extracts(3)
    options = command(folder, "--budget-usd", 1, "--model", "some/model")
    with serving() as (url, ledger):
        result = run_stage(STAGE, *options, code=1, **environment(url))
        assert "pass --price IN OUT" in one_error_line(result)
        assert not ledger()["outcomes"]
        run_stage(STAGE, *options, "--price", 1, 2, **environment(url))
    assert read_jsonl(folder / "replies/train.jsonl")[0]["cost_usd"] > 0


def test_what_does_not_fit_the_window_is_skipped_unpaid_with_a_reason(extracts):
    folder = extracts(3)
    rows = read_jsonl(folder / "extracts/train.jsonl")
    rows.append({"id": "long", "text": "word " * 30_000})
    write_jsonl(folder / "extracts/train.jsonl", rows)
    with serving() as (url, ledger):
        model = ("--model", "Qwen/Qwen2-72B-Instruct")
        run_stage(STAGE, *command(folder, *model), **environment(url))
        assert sum(ledger()["prompts"].values()) == 3
    (skipped,) = read_jsonl(folder / "replies/train.missing.jsonl")
    assert skipped["id"] == "long" and "over the context of 32,768" in skipped["reason"]


def test_a_reply_cut_off_is_kept_and_marked(extracts, endpoint):
    folder = extracts(2)
    result = run_stage(STAGE, *command(folder), **environment(endpoint(finish="length").url))
    assert [r["finish_reason"] for r in read_jsonl(folder / "replies/train.jsonl")] == [
        "length"
    ] * 2
    assert "2, 2 of them cut at the token limit" in result.stdout


def test_an_endpoint_that_is_down_or_never_was_ends_the_run(extracts):
    folder = extracts(50)
    started = time.monotonic()
    result = run_stage(STAGE, *command(folder), code=1, **environment("http://127.0.0.1:9"))
    assert "requests in a row failed, the last with: Cannot connect to host" in one_error_line(
        result
    )
    assert time.monotonic() - started < 60
    with serving("--faults", "429=1", "--retry-after", 9999) as (url, ledger):
        result = run_stage(STAGE, *command(folder), code=1, **environment(url))
        assert "asks to wait 9,999 s" in one_error_line(result)
        assert sum(ledger()["outcomes"].values()) <= 50


def test_the_rate_keeps_under_a_cap_it_is_not_told(extracts):
    folder = extracts(200)
    with serving("--cap", 20, "--latency", 0.1) as (url, ledger):
        run_stage(STAGE, *command(folder, "--concurrency", 32), **environment(url))
        outcomes = ledger()["outcomes"]
    assert outcomes["200"] == 200 and outcomes.get("429", 0) < 40


def test_a_prompt_or_model_that_changed_is_asked_anew_beside_the_old(extracts):
    folder = extracts(5)
    with serving() as (url, _):
        for more in ((), ("--no-balance",), ("--model", "other/model"), ()):
            run_stage(STAGE, *command(folder, *more), **environment(url))
    replies = read_jsonl(folder / "replies/train.jsonl")
    assert len(replies) == 15 and len({(r["model"], r["prompt_sha"]) for r in replies}) == 3


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


def offered(clock, rates: Pace, cap: float, seconds: float) -> tuple[int, int]:
    """(taken, refused) of an endpoint that takes `cap` requests in any second."""
    taken, refused, window, end = 0, 0, [], clock.now + seconds
    while clock.now < end:
        clock.now += max(rates.wait(), 0.0001)
        sent = rates.go()
        window = [t for t in window if t > clock.now - 1]
        if len(window) < cap:
            window.append(clock.now)
            rates.replied(sent)
            taken += 1
        else:
            rates.refused(sent, 1.0)
            refused += 1
    return taken, refused


@pytest.mark.parametrize("cap", [5, 50, 300])
def test_the_pace_finds_a_cap_and_a_new_one(monkeypatch, cap):
    clock = Clock(monkeypatch)
    rates = Pace(64)
    taken, refused = offered(clock, rates, cap, 60)
    assert taken > 0.85 * cap * 60 and refused < 0.05 * taken
    offered(clock, rates, cap / 4, 30)
    taken, refused = offered(clock, rates, cap / 4, 60)
    assert taken > 0.75 * cap / 4 * 60 and refused < 60  # after each it waits its second


def test_one_moment_of_refusals_counts_once_and_a_server_error_leaves_the_rate(monkeypatch):
    clock = Clock(monkeypatch)
    rates = Pace(64)
    sent = [rates.go() for _ in range(10)]
    clock.now += 0.1
    for moment in sent:
        rates.refused(moment, 0)
    assert rates.strikes == 1 and rates.room() == 32
    rate = rates.rate
    for strike in range(2, 9):
        clock.now += 200
        rates.failed(rates.go(), 0)
        assert rates.strikes == strike
    assert rates.room() == 1 and rates.wait() > 10  # single requests, far apart
    clock.now += 200
    rates.replied(rates.go())
    assert rates.room() == 64 and rates.rate >= rate


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:17:10 GMT"}, 30),
        ({"retry-after": "soon"}, 0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1.5"}, 1.5),
        ({"x-ratelimit-remaining": "3", "x-ratelimit-reset": "1.5"}, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}, 90),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12ms"}, 0.012),
        ({"x-ratelimit-remaining": "0"}, 0),
    ],
)
def test_what_the_endpoint_asks_to_wait(headers, seconds):
    assert wanted_wait(headers, 1000) == pytest.approx(seconds)


@given(st.text(), st.text())
def test_no_header_breaks_the_wait(after, reset):
    headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}
    assert wanted_wait(headers | {"retry-after": after}, 0) >= 0
    assert wanted_wait(headers, 0) >= 0
