"""`just serve`: two adapters over the tiny student, asked with OpenAI's own client."""

import json
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import make_run, one_error_line, read_jsonl, run_stage
from fastapi.testclient import TestClient

from eval.generate_answers import build_prompt, generate_batch
from eval.load_model import load_model
from eval.serve import Server, find_served, make_app

pytestmark = pytest.mark.slow
STAGE, LONGEST = "eval.serve", 24
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
        options = ("--model", adapters[name], "--max-new-tokens", LONGEST)
        ran = run_stage("eval.run_task", "summarize", tmp_path / "text.txt", *options).stdout
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
        assert chunks[-1].usage.completion_tokens <= length
    assert "".join(c.choices[0].delta.content or "" for c in streams[24]) == whole_of(expected, 24)
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
    assert httpx.post(endpoint, content=b"{").status_code == 422
    assert httpx.post(endpoint, json={"model": "title", "messages": []}).status_code == 422
    body = {"model": "title", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx.stream("POST", endpoint, json=body | {"max_tokens": 3000}) as left:
        next(left.iter_lines())
    assert ask("title", TEXTS[1]).choices[0].message.content == expected["title", TEXTS[1]]["text"]
    there = httpx.get(f"{served_url}/v1/models").json()["data"]
    assert [model["id"] for model in there] == ["summarize", "title", "tiny-qwen2"]


def test_an_evaluation_of_what_is_served_equals_that_of_the_adapter(adapters, served_url, tmp_path):
    config = make_run(tmp_path, adapters["tiny-qwen2"])
    systems = ("--systems", "endpoint-bare:title", adapters["title"], "--max-new-tokens", 16)
    run_stage("eval.generate_answers", config, *systems, TOGETHER_BASE_URL=served_url)
    served, adapted = (
        {record["id"]: record["text"] for record in read_jsonl(path)}
        for path in (tmp_path / "out/eval/answers").glob("*[!d].jsonl")
    )
    assert served == adapted and len(served) == 4


def test_a_model_without_adapters_in_bf16(tiny_qwen2):
    served = find_served([str(tiny_qwen2)], ["teacher"])
    server = Server(served, 4, "bfloat16")
    client = TestClient(make_app(server))
    body = {"model": "teacher", "messages": [{"role": "user", "content": TEXTS[0]}]}
    answer = client.post("/v1/chat/completions", json=body | {"max_tokens": 4}).json()
    assert answer["usage"]["completion_tokens"] <= 4 and answer["model"] == "teacher"
    server.model.generate = None
    assert client.post("/v1/chat/completions", json=body).status_code == 500


def test_no_request_uses_the_tokenizer_that_pads_the_batch(adapters, monkeypatch):
    """Used by two threads at once it lost its padding, and the batch its answers (seen once)."""
    server, users = Server(find_served([str(adapters["title"])], []), 4, None), {}
    kind = type(server.tokenizer)
    for name in ("__call__", "decode"):
        original = getattr(kind, name)

        def note(self, *args, original=original, **options):
            users.setdefault(id(self), set()).add(threading.current_thread().name)
            return original(self, *args, **options)

        monkeypatch.setattr(kind, name, note)
    body = {"model": "title", "messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 4}
    client = TestClient(make_app(server))
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert len(users[id(server.tokenizer)]) == 1 and len(users) == 2


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
    large = changed(one, tmp_path / "large", r=1024)
    assert "rank 1024" in one_error_line(run_stage(STAGE, large, "--print", code=1))


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


def test_an_adapter_trained_on_4_bits_is_served_on_the_base_as_it_was_rounded(adapters, tmp_path):
    folder = shutil.copytree(adapters["title"], tmp_path / "rounded")
    base = json.loads((folder / "config.json").read_text())
    base["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(base))
    served = find_served([str(folder)], [])
    assert list(served) == ["title"]  # the base that is in memory is not the published one
    client = TestClient(make_app(Server(served, 4, None)))
    body = {"model": "title", "messages": [{"role": "user", "content": TEXTS[0]}]}
    answer = client.post("/v1/chat/completions", json=body | {"max_tokens": LONGEST}).json()
    model, tokenizer = load_model(str(folder))
    prompt, _ = build_prompt(tokenizer, TEXTS[0], None, 4000)
    (record,) = generate_batch(model, tokenizer, [prompt], LONGEST)
    assert answer["choices"][0]["message"]["content"] == record["text"]
    assert "rounded to 4 bits" in one_error_line(run_stage(STAGE, folder, "--print", code=1))
