"""`just serve`: two adapters over the tiny student, asked with OpenAI's own client."""

import json
import queue
import shlex
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import QWEN2_TEMPLATE, make_run, one_error_line, read_jsonl, run_stage, start_stage
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from inference import serving_engine
from inference.chat_api import LARGEST_BODY, make_app
from inference.generate import build_prompt, generate_batch
from inference.serve import find_served
from inference.serving_engine import Engine, Job, settled_part
from inference.weights import Weights, load_model

pytestmark = pytest.mark.slow
STAGE, LONGEST = "inference.serve", 24
TEXTS = [f"Lakes freeze from the top, number {i} too. " * (1 + i % 3) for i in range(8)]


@pytest.fixture(scope="module")
def expected(adapters) -> dict:
    """(name, text) -> the record that the evaluation and `just run` make, one text at a time."""
    found = {}
    for name, folder in adapters.items():
        model, tokenizer = load_model(str(folder))
        for text in TEXTS:
            prompt, _ = build_prompt(tokenizer, text, None, 4000)
            (found[name, text],) = generate_batch(model, tokenizer, [prompt], LONGEST)
    return found


@pytest.fixture(scope="module")
def ask(served_url):
    client = openai.OpenAI(base_url=f"{served_url}/v1", api_key="none", max_retries=0)

    def ask(model: str, text: str, **options):
        options = {"max_tokens": LONGEST, "temperature": 0} | options
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=model, messages=messages, **options)

    return ask


def test_answers_are_those_of_run_task_token_for_token(adapters, expected, ask, tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS[0])
    said = set()
    for name in adapters:
        answer, record = ask(name, TEXTS[0]), expected[name, TEXTS[0]]
        text = answer.choices[0].message.content
        assert (text, answer.choices[0].finish_reason) == (record["text"], record["finish_reason"])
        assert answer.usage.prompt_tokens == record["n_prompt_tokens"]
        assert answer.usage.completion_tokens == record["n_new_tokens"]
        assert answer.timings["predicted_n"] == record["n_new_tokens"]
        assert answer.timings["prompt_ms"] > 0 and answer.timings["predicted_ms"] > 0
        options = ("--model", adapters[name], "--max-new-tokens", LONGEST)
        ran = run_stage("inference.run_task", "summarize", tmp_path / "text.txt", *options).stdout
        assert ran.strip() == text
        said.add(text)
    assert len(said) == 3


def test_32_requests_at_once_none_answered_by_another_adapter(adapters, expected, ask):
    wanted = [(name, text) for text in TEXTS for name in ("title", "summarize", "tiny-qwen2")]
    wanted += wanted[:8]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda one: ask(*one), wanted))
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts == [expected[one]["text"] for one in wanted] and len(texts) == 32
    assert [answer.model for answer in answers] == [name for name, _ in wanted]


def test_streams_at_the_same_time_each_as_long_as_it_asked_for(expected, ask):
    def parts(length: int) -> list:
        return list(ask("title", TEXTS[length % 8], stream=True, max_tokens=length))

    with ThreadPoolExecutor(4) as pool:
        streams = dict(zip((24, 3, 10), pool.map(parts, (24, 3, 10)), strict=True))
    for length, chunks in streams.items():
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        whole = expected["title", TEXTS[length % 8]]["text"]
        assert text and whole.startswith(text.rstrip("\ufffd")) and len(chunks) > 2
        assert "".join(c.choices[0].delta.content or "" for c in streams[24]) == whole_of(
            expected, 24
        )
    assert {chunks[-1].choices[0].finish_reason for chunks in streams.values()} <= {
        "stop",
        "length",
    }


def whole_of(expected: dict, length: int) -> str:
    return expected["title", TEXTS[length % 8]]["text"]


def test_what_cannot_be_answered_is_refused_and_the_others_go_on(served_url, expected, ask):
    with pytest.raises(openai.NotFoundError, match="no model other; there are summarize, title"):
        ask("other", TEXTS[0])
    with pytest.raises(openai.BadRequestError, match="beyond the context"):
        ask("title", "ice " * 5000)
    with pytest.raises(openai.BadRequestError, match="beyond the context"):
        ask("title", TEXTS[0], max_tokens=4096)
    endpoint = f"{served_url}/v1/chat/completions"
    assert httpx.post(endpoint, content=b"{").status_code == 400
    assert httpx.post(endpoint, json={"model": "title", "messages": []}).status_code == 400
    body = {"model": "title", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx.stream("POST", endpoint, json=body | {"max_tokens": 3000}) as left:
        next(left.iter_lines())
    assert ask("title", TEXTS[1]).choices[0].message.content == expected["title", TEXTS[1]]["text"]
    there = httpx.get(f"{served_url}/v1/models").json()["data"]
    assert [model["id"] for model in there] == ["summarize", "title", "tiny-qwen2"]


def test_an_evaluation_of_what_is_served_equals_that_of_the_adapter(adapters, served_url, tmp_path):
    config = make_run(tmp_path, adapters["tiny-qwen2"])
    systems = ("--systems", "endpoint-bare:title", adapters["title"], "--max-new-tokens", 16)
    run_stage("eval.answer_texts", config, *systems, TOGETHER_BASE_URL=served_url)
    served, adapted = (
        {record["id"]: record["text"] for record in read_jsonl(path)}
        for path in (tmp_path / "out/eval/answers").glob("*[!d].jsonl")
    )
    assert served == adapted and len(served) == 4


@pytest.fixture(scope="module")
def engine(adapters):
    engine = Engine(find_served([str(adapters["summarize"]), str(adapters["title"])], []), 4, None)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def client(engine):
    """The endpoint inside this process, as it is reached on this machine."""
    return TestClient(make_app(engine), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def url(engine):
    """The endpoint inside this process, on a port of its own."""
    config = uvicorn.Config(make_app(engine), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@contextmanager
def held_up(engine, monkeypatch):
    """The engine takes a batch and does not begin it before the gate is open."""
    gate, original = threading.Event(), engine.model.generate

    def generate(**options):
        assert gate.wait(60)
        return original(**options)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", generate)
        try:
            yield gate
        finally:
            gate.set()
            wait_for(lambda: all(job.done for job in engine.running))


def wait_for(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def body(model: str = "title", **fields) -> dict:
    messages = [{"role": "user", "content": TEXTS[0]}]
    return {"model": model, "messages": messages, "max_tokens": LONGEST} | fields


def test_two_tasks_of_41_requests_waiting_and_the_list_of_models_answers(
    engine, url, expected, monkeypatch
):
    wanted = [(name, TEXTS[i % 8]) for name in ("title", "summarize") for i in range(41)]

    limits = httpx.Limits(max_connections=100)
    connections = httpx.Client(base_url=url, timeout=60, limits=limits)  # one, for each is dear

    def ask(one: tuple) -> httpx.Response:
        sent = body(one[0], messages=[{"role": "user", "content": one[1]}])
        return connections.post("/v1/chat/completions", json=sent)

    with connections, ThreadPoolExecutor(82) as pool, held_up(engine, monkeypatch) as gate:
        answers = pool.map(ask, wanted)
        wait_for(lambda: len(engine.waiting) >= 78)
        for path in ("/v1/models", "/v1/models/title", "/health"):
            assert connections.get(path, timeout=1).status_code == 200
        gate.set()
        texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [expected[one]["text"] for one in wanted]


def test_requests_of_one_adapter_together_and_few_do_not_wait_for_many(engine, url, monkeypatch):
    batches = []

    def ask(model: str) -> int:
        sent = body(model, max_tokens=1)
        return httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=60).status_code

    def waiting_for(model: str) -> int:
        return sum(job.answerer is engine.answerers[model] for job in engine.waiting)

    with held_up(engine, monkeypatch) as gate, ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, "title") for _ in range(12)]
        wait_for(lambda: waiting_for("title") >= 8)
        answers.append(pool.submit(ask, "summarize"))  # the last to come
        wait_for(lambda: waiting_for("summarize"))
        held = engine.model.generate

        def generate(**options):
            batches.append([job.answerer for job in engine.running])
            return held(**options)

        monkeypatch.setattr(engine.model, "generate", generate)
        gate.set()
        assert {one.result() for one in answers} == {200}
    assert batches[0] == [engine.answerers["summarize"]]
    assert all(batch == [engine.answerers["title"]] * len(batch) for batch in batches[1:])
    assert max(map(len, batches)) == engine.batch


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_frees_its_place_at_once(engine, url, monkeypatch, stream):
    def give_up() -> None:
        with pytest.raises(httpx.TimeoutException):
            long = body(max_tokens=3000, stream=stream)
            httpx.post(f"{url}/v1/chat/completions", json=long, timeout=1)

    with ThreadPoolExecutor(8) as pool, held_up(engine, monkeypatch) as gate:
        pool.submit(give_up)
        wait_for(lambda: engine.running and not engine.running[0].done)
        list(pool.map(lambda _: give_up(), range(6)))  # behind the one that is being answered
        wait_for(lambda: not engine.waiting)
        wait_for(lambda: engine.running[0].gone)
        gate.set()
        started = time.monotonic()
        assert httpx.post(f"{url}/v1/chat/completions", json=body(max_tokens=2), timeout=30)
        assert time.monotonic() - started < 5 and len(engine.running[0].ids) <= 2


def test_more_requests_than_can_wait_are_told_to_come_again(engine, client, monkeypatch):
    monkeypatch.setattr(serving_engine, "MOST_WAITING", 0)
    answer = client.post("/v1/chat/completions", json=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert int(answer.headers["Retry-After"]) > 0


def streamed(answer: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_names_the_role_once_and_the_usage_where_asked(client, expected):
    record = expected["title", TEXTS[0]]
    for options in ({}, {"stream_options": {"include_usage": True}}):
        answer = client.post("/v1/chat/completions", json=body(stream=True, **options))
        chunks = streamed(answer)
        assert sum("usage" in chunk and chunk["usage"] is not None for chunk in chunks) == len(
            options
        )
        assert len({chunk["id"] for chunk in chunks}) == 1
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        assert [i for i, one in enumerate(choices) if "role" in one["delta"]] == [0]
        assert "".join(one["delta"].get("content", "") for one in choices) == record["text"]
        reasons = [one["finish_reason"] for one in choices if one["finish_reason"]]
        assert reasons == [record["finish_reason"]]
    assert [chunk["timings"]["predicted_n"] for chunk in chunks if "timings" in chunk] == [
        record["n_new_tokens"]
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == record["n_new_tokens"]


def test_stop_ends_an_answer_before_it_also_across_tokens_and_in_a_stream(client, expected):
    text = expected["title", TEXTS[0]]["text"]
    middle = len(text) // 2
    for stop in (text[middle : middle + 7], ["never said, this", text[3:9]]):
        first = stop if isinstance(stop, str) else stop[1]
        before = text[: text.find(first)].strip()
        whole = client.post("/v1/chat/completions", json=body(stop=stop)).json()
        assert whole["choices"][0]["message"]["content"] == before
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] < LONGEST
        chunks = streamed(client.post("/v1/chat/completions", json=body(stop=stop, stream=True)))
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(pieces) == before
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_may_yet_be_a_stop_or_a_character_is_held_back():
    assert settled_part("A lake\n", ["\n\nQ:"]) == "A lake"
    assert settled_part("A lake. ST", ["STOP", "TO"]) == "A lake. "
    assert settled_part("caf\ufffd", []) == "caf"
    assert settled_part("A lake", ["x" * 10**6]) == "A lake"


def test_fields_as_clients_send_them(client, expected):
    text = TEXTS[0]
    plain = expected["title", text]["text"]

    def answer(**fields) -> dict:
        got = client.post("/v1/chat/completions", json=body(**fields))
        assert got.status_code == 200, got.text
        return got.json()

    def said(**fields) -> str:
        return answer(**fields)["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": text}]
    assert said(messages=[{"role": "user", "content": parts, "name": "ann"}]) == plain
    few = answer(max_tokens=None, max_completion_tokens=3)
    assert few["usage"]["completion_tokens"] <= 3
    neutral = {
        "n": 1,
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "seed": 1,
        "user": "u",
    }
    neutral |= {"response_format": {"type": "text"}, "temperature": 1.5, "top_p": 0.1, "stop": None}
    assert said(**neutral, presence_penalty=0, unheard_of=[1], stream=None) == plain
    system, developer = (
        said(messages=[{"role": role, "content": "Be brief."}, *body()["messages"]])
        for role in ("system", "developer")
    )
    assert system == developer
    ids = {answer(max_tokens=1)["id"] for _ in range(3)}
    assert len(ids) == 3


def one_error(answer: httpx.Response, status: int) -> dict:
    """The error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


REFUSED = {
    "n": 2,
    "best_of": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "logit_bias": {"5": 1},
    "frequency_penalty": 0.5,
    "max_tokens": 0,
    "max_completion_tokens": 5.5,
    "stop": ["a"] * 5,
    "model": ["a"],
    "messages": [],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_cannot_be_done_is_refused_by_its_name(client, field):
    answer = client.post("/v1/chat/completions", json=body(**{field: REFUSED[field]}))
    error = one_error(answer, 400)
    assert field in error["message"] and error["param"] == field


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [["text", "x"]]},
        {"role": "tool", "content": "x"},
        {"role": "\ud83d", "content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        "x",
    ],
)
def test_odd_messages_are_refused_and_where_is_said(client, message):
    sent = json.dumps(body(messages=[message])).encode()
    error = one_error(client.post("/v1/chat/completions", content=sent), 400)
    assert error["param"].startswith("messages[0]")


WHOLE = json.dumps(body()).encode()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"model": "\xff"}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        WHOLE.replace(str(LONGEST).encode() + b"}", b"9" * 5000 + b"}"),
        WHOLE.replace(str(LONGEST).encode() + b"}", b"9" * 4000 + b"}"),
        WHOLE.replace(str(LONGEST).encode() + b"}", b"NaN}"),
        WHOLE.replace(str(LONGEST).encode() + b"}", b"1e999}"),
    ],
    ids=range(10),
)
def test_no_body_is_an_error_of_the_server(client, sent):
    one_error(client.post("/v1/chat/completions", content=sent), 400)


def test_half_a_character_and_a_zero_are_text(client):
    sent = json.dumps(body(messages=[{"role": "user", "content": "\ud83d \0 ice"}])).encode()
    assert client.post("/v1/chat/completions", content=sent).status_code == 200
    sent = json.dumps(body("\ud83d")).encode()
    assert one_error(client.post("/v1/chat/completions", content=sent), 404)["code"]


def test_routes_that_are_not_there_and_a_body_that_is_too_large(client):
    for path in ("/v1/completions", "/docs", "/openapi.json", "/v1/models/none"):
        one_error(client.get(path), 404)
    one_error(client.get("/v1/chat/completions"), 405)
    one_error(client.options("/v1/chat/completions"), 405)
    one_error(client.post("/v1/chat/completions", content=b" " * (LARGEST_BODY + 1)), 413)
    assert client.get("/v1/models/title").json()["parent"] == "tiny-qwen2"


def test_web_pages_of_elsewhere_are_refused(engine, client):
    def asked(**headers: str) -> httpx.Response:
        return client.post("/v1/chat/completions", json=body(max_tokens=1), headers=headers)

    one_error(asked(host="evil.example"), 400)
    for origin in ("http://evil.example", "null", "http://["):
        answer = asked(origin=origin)
        one_error(answer, 403)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    kinds = {"content-type": "text/plain"}
    one_error(client.post("/v1/chat/completions", content=WHOLE, headers=kinds), 403)
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert asked(host=host, origin=f"http://{host}").status_code == 200
    open_to_all = TestClient(make_app(engine, None), base_url="http://models.example")
    assert open_to_all.get("/v1/models").status_code == 200
    evil = {"origin": "http://evil.example"}
    answer = open_to_all.post("/v1/chat/completions", json=body(max_tokens=1), headers=evil)
    one_error(answer, 403)


def test_the_cards_tell_what_is_served(client, adapters):
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert cards["title"]["root"] == Path(adapters["title"]).name
    assert cards["tiny-qwen2"]["parent"] is None
    assert len({card["fingerprint"] for card in cards.values()}) == 3


def test_too_little_memory_for_a_batch_splits_it_and_what_fails_does_not_stop_the_next(
    engine, client, monkeypatch
):
    original, sizes = engine.model.generate, []

    def generate(**options):
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(**options)

    with held_up(engine, monkeypatch) as gate, ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/v1/chat/completions", json=body(max_tokens=2))
        wait_for(lambda: engine.running and not engine.running[0].done)
        monkeypatch.setattr(engine.model, "generate", generate)
        others = [
            pool.submit(client.post, "/v1/chat/completions", json=body(max_tokens=2))
            for _ in range(3)
        ]
        wait_for(lambda: len(engine.waiting) == 3)
        gate.set()
        assert [one.result().status_code for one in (first, *others)] == [200] * 4
    assert sizes == [3, 2, 1, 1, 1]
    monkeypatch.setattr(engine.model, "generate", None)
    one_error(client.post("/v1/chat/completions", json=body()), 500)
    stream = client.post("/v1/chat/completions", json=body(stream=True)).text
    assert '"server_error"' in stream and "[DONE]" not in stream
    monkeypatch.setattr(engine.model, "generate", original)
    assert client.post("/v1/chat/completions", json=body(max_tokens=1)).status_code == 200


def test_ctrl_c_ends_it_at_once_and_those_who_wait_are_told(adapters):
    process = start_stage(STAGE, adapters["title"], "--port", 18999)
    process.stdout.readline()
    url = "http://127.0.0.1:18999"
    wait_for(lambda: not refused_connection(url))
    with ThreadPoolExecutor(1) as pool:
        endpoint, long = f"{url}/v1/chat/completions", body(max_tokens=4000)
        answer = pool.submit(httpx.post, endpoint, json=long, timeout=60)
        time.sleep(1)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - started < 5
        assert (process.returncode, "Traceback" in err) == (0, False)
        assert answer.result().status_code in (200, 503)


def test_the_address_is_told_once_it_listens(adapters):
    first = start_stage(STAGE, adapters["title"], "--port", 0)
    try:
        url = first.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/models").status_code == 200
        taken = url.removesuffix("/v1").rpartition(":")[2]
        second = start_stage(STAGE, adapters["title"], "--port", taken)
        out, err = second.communicate(timeout=60)
        assert second.returncode > 0 and "address already in use" in err
        assert out == "" and "Traceback" not in err
    finally:
        first.terminate()


@pytest.mark.parametrize("port", [-1, 65536, "http"])
def test_what_is_no_port_is_refused_at_once(port):
    said = run_stage(STAGE, "a-run", f"--port={port}", code=2).stderr
    assert "argument --port" in said


def refused_connection(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code != 200
    except httpx.TransportError:
        return True


def test_a_model_without_adapters_in_bf16(tiny_qwen2):
    engine = Engine(find_served([str(tiny_qwen2)], ["teacher"]), 4, "bfloat16")
    client = TestClient(make_app(engine), base_url="http://localhost")
    answer = client.post("/v1/chat/completions", json=body("teacher", max_tokens=4)).json()
    assert answer["usage"]["completion_tokens"] <= 4 and answer["model"] == "teacher"


def other_ends(folder: Path, copy: Path) -> Path:
    """A copy of an adapter that learned to end its turn with another token than its base."""
    shutil.copytree(folder, copy)
    template = QWEN2_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    (copy / "chat_template.jinja").write_text(template)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    return copy


def test_each_request_ends_with_its_own_adapters_turn(adapters, tmp_path):
    folder = other_ends(adapters["title"], tmp_path / "own")
    served = find_served([str(adapters["summarize"]), str(folder)], ["one", "own"])
    engine, got = Engine(served, 4, None), queue.SimpleQueue()
    ids = dict(zip(("<|endoftext|>", "<|im_end|>"), (0, 2), strict=True))
    own, one = engine.answerers["own"], engine.answerers["one"]
    assert ids["<|endoftext|>"] in own.ends - one.ends
    job = Job(own, [5], 9, got.put, ids=[40])
    job.take(ids["<|endoftext|>"])
    assert job.finish == "stop" and job.ids == [40]
    engine.stop()


def test_an_adapter_of_dora_is_answered_with(adapters, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    settings = {"target_modules": "all-linear", "init_lora_weights": False}
    base = AutoModelForCausalLM.from_pretrained(adapters["tiny-qwen2"])
    adapted = get_peft_model(base, LoraConfig(r=4, use_dora=True, **settings))
    folder = shutil.copytree(adapters["title"], tmp_path / "dora")
    adapted.save_pretrained(folder)
    engine = Engine(find_served([str(folder), str(adapters["summarize"])], []), 4, None)
    client = TestClient(make_app(engine), base_url="http://localhost")
    model, tokenizer = load_model(str(folder))
    prompt, _ = build_prompt(tokenizer, TEXTS[0], None, 4000)
    (record,) = generate_batch(model, tokenizer, [prompt], LONGEST)
    answer = client.post("/v1/chat/completions", json=body()).json()
    assert answer["choices"][0]["message"]["content"] == record["text"]
    engine.stop()


def changed(folder, path, **settings):
    """A copy of an adapter with other words in its adapter_config.json."""
    shutil.copytree(folder, path)
    own = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(own | settings))
    return path


def test_the_line_of_vllm(adapters, tmp_path):
    one, two = adapters["summarize"], changed(adapters["title"], tmp_path / "two", revision="v1")
    said = run_stage(STAGE, one, two, "--name", "a", "b", "--print", "--port", 81).stdout
    line = f"vllm serve {adapters['tiny-qwen2']} --host 127.0.0.1 --port 81 --served-model-name "
    line += "tiny-qwen2 --generation-config vllm --revision v1 --enable-lora --max-loras 2 "
    line += f"--max-lora-rank 8 --lora-modules a={one} b={two}"
    assert shlex.split(said) == shlex.split(line)
    for changes, reason in (({"r": 1024}, "rank 1024"), ({"use_dora": True}, "DoRA")):
        unfit = changed(one, tmp_path / reason, **changes)
        assert reason in one_error_line(run_stage(STAGE, unfit, "--print", code=1))


def test_adapters_that_need_unlike_bases(adapters, tmp_path):
    def refused(path, *options) -> str:
        return one_error_line(run_stage(STAGE, adapters["title"], path, *options, code=1))

    shutil.copytree(adapters["summarize"], tmp_path / "rounded")
    base = json.loads((adapters["summarize"] / "config.json").read_text())
    base["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (tmp_path / "rounded/config.json").write_text(json.dumps(base))
    line = refused(tmp_path / "rounded")
    assert "unlike bases: title " in line and "summarize " in line and "4 bits" in line
    other = changed(adapters["summarize"], tmp_path / "o", base_model_name_or_path="another/base")
    assert "summarize another/base" in refused(other)
    one = changed(adapters["summarize"], tmp_path / "one", revision="v1")
    two = changed(adapters["summarize"], tmp_path / "two", revision="v2")
    line = one_error_line(run_stage(STAGE, one, two, "--name", "a", "b", code=1))
    assert " v1, " in line and " v2" in line
    assert "a name of its own by --name" in refused(adapters["title"])
    assert "a name of its own by --name" in refused(adapters["summarize"], "--name", "one")


def renamed(folder: Path, copy: Path) -> Path:
    """A copy of an adapter with its keys as another trainer names them."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "adapter_model.safetensors")
    weights = {f"net.{key.rpartition('model.')[2]}": tensor for key, tensor in weights.items()}
    save_file(weights, copy / "adapter_model.safetensors")
    return copy


def diverged(folder: Path, copy: Path) -> Path:
    """A copy of an adapter of which one tensor is NaN."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "adapter_model.safetensors")
    weights[max(weights)] *= float("nan")
    save_file(weights, copy / "adapter_model.safetensors")
    return copy


FAULTY_FILES = (
    ("adapter_model.safetensors", b"{}", "does not fit its base"),
    ("chat_template.jinja", b"{% for", "the chat template of title fails"),
    ("chat_template.jinja", b"{{ messages[0].content.a.b }}", "the chat template of title fails"),
    ("chat_template.jinja", b"", "title has no chat template"),
    ("chat_template.jinja", b"\xff\xfe", "is faulty"),
    ("tokenizer.json", b"{", "is faulty"),
    ("tokenizer_config.json", b"[]", "is faulty"),
)


def test_adapters_that_could_not_be_answered_are_refused_before_anything_is_served(
    adapters, tmp_path
):
    def refused(folder: Path) -> str:
        return one_error_line(run_stage(STAGE, folder, "--port", 9, code=1))

    own = adapters["title"]
    assert "biases" in refused(changed(own, tmp_path / "bias", bias="all"))
    assert "no place" in refused(renamed(own, tmp_path / "foreign"))
    assert "does not fit its base" in refused(changed(own, tmp_path / "rank", r=7))
    assert "changes nothing" in refused(changed(own, tmp_path / "zero", lora_alpha=0))
    assert "does not fit its base" in refused(changed(own, tmp_path / "null", lora_alpha=None))
    assert "diverged" in refused(diverged(own, tmp_path / "diverged"))
    for number, (file, text, said) in enumerate(FAULTY_FILES):
        folder = shutil.copytree(own, tmp_path / f"faulty{number}")
        (folder / file).write_bytes(text)
        assert said in refused(folder)
    half = shutil.copytree(own, tmp_path / "half")
    (half / "made.json").unlink(missing_ok=True)
    (half / "inputs/made.json").rename(half / "kept.json")
    (half / "inputs").mkdir(exist_ok=True)
    (half / "kept.json").rename(half / "inputs/made.json")
    assert "has not ended" in refused(half)


def trained_on_4_bits(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    base = json.loads((copy / "config.json").read_text())
    base["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (copy / "config.json").write_text(json.dumps(base))
    return copy


def test_an_adapter_trained_on_4_bits_is_served_on_the_base_as_it_was_rounded(adapters, tmp_path):
    folder = trained_on_4_bits(adapters["title"], tmp_path / "rounded")
    served = find_served([str(folder)], [])
    assert list(served) == ["title"]  # the base that is in memory is not the published one
    client = TestClient(make_app(Engine(served, 4, None)), base_url="http://localhost")
    answer = client.post("/v1/chat/completions", json=body()).json()
    model, tokenizer = load_model(str(folder))
    prompt, _ = build_prompt(tokenizer, TEXTS[0], None, 4000)
    (record,) = generate_batch(model, tokenizer, [prompt], LONGEST)
    assert answer["choices"][0]["message"]["content"] == record["text"]


def test_the_line_of_vllm_for_4_bits_names_the_base_as_training_rounded_it(adapters, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = trained_on_4_bits(adapters["title"], tmp_path / "rounded")
    first = run_stage(STAGE, folder, "--print", cwd=tmp_path)
    line = shlex.split(first.stdout)
    base = tmp_path / line[2]
    assert line[2].startswith("outputs/bases/tiny-qwen2-nf4-") and f"title={folder}" in line
    assert line[line.index("--served-model-name") + 1] == base.name
    assert "GiB" in first.stderr
    again = run_stage(STAGE, folder, "--print", cwd=tmp_path)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert "quantization_config" not in json.loads((base / "config.json").read_text())
    saved = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert saved.dtype == torch.bfloat16
    as_trained, tokenizer = load_model(
        Weights(str(adapters["tiny-qwen2"]), four_bits=True), "bfloat16"
    )
    published, _ = load_model(str(adapters["tiny-qwen2"]), "bfloat16")
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = [model(input_ids=ids).logits for model in (saved, as_trained, published)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_the_line_of_vllm_names_the_template_and_the_ends_that_the_base_lacks(adapters, tmp_path):
    own = other_ends(adapters["title"], tmp_path / "own")
    thinking = "{% if enable_thinking %}<think>{% endif %}"
    template = own / "chat_template.jinja"
    template.write_text(template.read_text() + thinking)
    line = shlex.split(run_stage(STAGE, own, "--print", cwd=tmp_path).stdout)
    options = dict(pairwise(line))
    told = tmp_path / options["--generation-config"]
    assert json.loads((told / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}
    assert (tmp_path / options["--chat-template"]).read_text() == template.read_text()
    switch = json.loads(options["--default-chat-template-kwargs"])
    assert switch["enable_thinking"] is False
    both = (own, adapters["summarize"], "--name", "a", "b", "--print")
    assert "unlike ones" in one_error_line(run_stage(STAGE, *both, code=1))
