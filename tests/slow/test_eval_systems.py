"""Systems of every kind, answers that survive a kill, and wrong input in one line."""

import json
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from conftest import one_error_line, read_jsonl, run_stage, start_stage, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from common.cli import UserError
from common.files import mark_made
from eval.answer_texts import answer_all, first_sentences, load_answers
from eval.report import append_ledger
from eval.systems import load_test_rows, system_of, systems_of
from inference.answers import AnswerOptions
from inference.draw_samples import Uniforms, draw_samples
from inference.generate import answer_prompts, generate_batch, most_alike, pack_batches
from inference.served_model import address_of
from inference.weights import load_model
from prompts.task import load_task
from training.config import load_run_config

pytestmark = pytest.mark.slow

STAGE = "eval.answer_texts"


def generate(config, *options):
    systems = ("--systems", "base", "instructed", "lead", "--max-new-tokens", 8)
    return run_stage(STAGE, config, *systems, *options)


def answers(config, name):
    return read_jsonl(config.parent / f"out/eval/answers/{name}.jsonl")


@pytest.fixture
def adapter(tmp_path, tiny_qwen2):
    """A folder with an adapter of the tiny student whose matrices are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_qwen2),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_endpoints_and_lead_sentences_stand_beside_the_base(
    finished_run, adapter, endpoint
):
    server = endpoint(content=" A summary from afar. ")
    systems = ("base", adapter, "endpoint:some/model", "endpoint-bare:some/model", "lead")
    options = ("--systems", *systems, "--max-new-tokens", 8)
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    run_stage(STAGE, finished_run, *options, **environment)
    run_stage(STAGE, finished_run, *options, **environment)
    names = {p.stem: p for p in (finished_run.parent / "out/eval/answers").glob("*[!d].jsonl")}
    plain = {"base", "endpoint_some_model", "endpoint-bare_some_model"}
    (adapted,) = set(names) - plain
    texts = {name: [r["text"] for r in answers(finished_run, name)] for name in names}
    assert texts[adapted] != texts["base"]
    assert texts["endpoint_some_model"] == [" A summary from afar. "] * 4
    run = load_run_config(finished_run)
    names = ("lead", "lead-1", "base:2-words")
    found = load_answers(run, load_test_rows(run, 4), names)
    for name in names[:2]:
        assert [record["text"] for record in found[name].values()] == ["Ice floats."] * 4
    assert all(len(record["text"].split()) <= 2 for record in found["base:2-words"].values())
    assert list(systems_of(run, ["base:2-words", "base"])) == ["base"]  # which is asked once
    bare = {"Ice floats. " * (i + 1) for i in range(4)}
    assert bare < set(server.ledger) and all("Ice floats." in prompt for prompt in server.ledger)
    assert sum(server.ledger.values()) == 8  # the second run asked for nothing


def test_a_killed_generation_goes_on_and_makes_no_document_twice(finished_run):
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows = [{**rows[i % 4], "id": f"k{i}"} for i in range(12)]
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    path = finished_run.parent / "out/eval/answers/base.jsonl"
    options = ("--systems", "base", "--batch-tokens", 1, "--max-new-tokens", 100)
    process = start_stage(STAGE, finished_run, *options)
    while process.poll() is None and not (path.exists() and b"\n" in path.read_bytes()):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = path.read_bytes()
    assert 0 < first.count(b"\n") < 12, "killed too late to tell"
    run_stage(STAGE, finished_run, *options)
    assert path.read_bytes().startswith(first[: first.rfind(b"\n") + 1])
    assert sorted(r["id"] for r in read_jsonl(path)) == sorted(f"k{i}" for i in range(12))


def test_batches_give_what_one_at_a_time_gives(finished_run):
    made = {}
    for size in (1, 200):
        generate(finished_run, "--batch-tokens", size)
        for system in ("base", "instructed"):
            made[system, size] = {r["id"]: r for r in answers(finished_run, system)}
        shutil.rmtree(finished_run.parent / "out/eval")
    assert made["base", 1] == made["base", 200] and len(made["base", 1]) == 4
    assert made["instructed", 1] == made["instructed", 200]
    prompts = {
        system: [r["n_prompt_tokens"] for r in made[system, 1].values()] for system, _ in made
    }
    assert len(set(prompts["base"])) == 4
    assert min(prompts["instructed"]) > min(prompts["base"])


def test_a_stopped_generation_goes_on_and_a_long_text_is_cut(finished_run):
    path = finished_run.parent / "out/eval/answers/base.jsonl"
    generate(finished_run, "--n", 2)
    first = path.read_bytes()
    path.write_bytes(first + b'{"id": "t2", "te')
    generate(finished_run)
    assert path.read_bytes().startswith(first)
    assert sorted(r["id"] for r in read_jsonl(path)) == ["t0", "t1", "t2", "t3"]
    generate(finished_run)
    assert len(read_jsonl(path)) == 4
    longest = max(r["n_prompt_tokens"] for r in read_jsonl(path))
    generate(finished_run, "--max-prompt-tokens", longest - 2)
    assert [r["n_cut_tokens"] for r in read_jsonl(path)[4:]] == [2, 0, 0, 0]


def asked_for(config, n: int = 4) -> dict:
    """What a scoring gets: system -> id -> record."""
    run = load_run_config(config)
    return load_answers(run, load_test_rows(run, n), ["base", "lead"])


def test_settings_asked_for_again_are_what_is_scored(finished_run):
    a, b = ("--max-new-tokens", 8), ("--max-new-tokens", 12)
    found = []
    for options in (a, b, a):
        generate(finished_run, *options)
        found.append(asked_for(finished_run))
    assert found[0] == found[2] != found[1]
    assert [f["base"]["t0"]["settings"]["max_new_tokens"] for f in found] == [8, 12, 8]
    config = load_run_config(finished_run)
    kept = {system: records["t0"]["settings"] for system, records in found[1].items()}
    rows = load_test_rows(config, 4)
    assert load_answers(config, rows, ["base", "lead"], asked=kept) == found[1]


def test_half_made_settings_are_named_and_the_earlier_ones_can_be_had_again(finished_run):
    generate(finished_run)
    whole = asked_for(finished_run)
    generate(finished_run, "--max-new-tokens", 12, "--n", 1)
    with pytest.raises(UserError, match=r"base.jsonl lacks 3 of 4 texts with the settings"):
        asked_for(finished_run)
    assert len(asked_for(finished_run, 1)["base"]) == 1
    generate(finished_run)
    assert asked_for(finished_run) == whole


@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(1, 9000))
def test_batches_hold_every_prompt_once_and_no_more_tokens_than_allowed(lengths, most):
    batches = list(pack_batches(lengths, 5, most))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * (longest + 5) <= most or len(batch) == 1
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=True)


def test_what_cannot_be_answered_is_said_in_a_line(finished_run, adapter, tiny_qwen2):
    config = load_run_config(finished_run)
    with pytest.raises(UserError, match="no system nowhere: --systems takes base"):
        systems_of(config, ["nowhere"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = {**settings, "base_model_name_or_path": "another/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"an adapter of another/base, not of .*tiny-qwen2"):
        systems_of(config, [str(adapter)])
    assert "train it with `just train`" in one_error_line(run_stage(STAGE, finished_run, code=1))
    with pytest.raises(UserError, match="no second answers"):
        load_answers(config, load_test_rows(config, 4), ["second"])


def test_references_that_are_none(finished_run):
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows[2]["chosen"][0]["content"] = " "
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    line = one_error_line(run_stage(STAGE, finished_run, "--systems", "base", code=1))
    assert "1 test texts" in line and "t2" in line
    (finished_run.parent / "hub/test.jsonl").write_text("")
    assert "test split" in one_error_line(
        run_stage(STAGE, finished_run, "--systems", "base", code=1)
    )


def test_the_text_most_like_all_of_them():
    assert most_alike(["Salt.", "Ice melts, slowly.", "Ice floats.", "ice melts slowly"]) == 1
    assert most_alike(["", "alone"]) == 0 == most_alike(["alone"])
    assert most_alike(["鱼在水里游。", "冰浮在水面上。", "冰浮在水上。"]) == 2


def test_of_several_samples_each_prompt_gets_the_one_they_agree_on(tiny_qwen2, monkeypatch):
    """A model that says greedily x, and in its samples twice the prompt's last token and once y."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2, padding_side="left")
    x, y = tokenizer("xy").input_ids

    class Agreed:
        device, config = "cpu", AutoConfig.from_pretrained(tiny_qwen2)
        generation_config = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id])

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.full((len(input_ids), 3), x)], 1)

    def drawn(_, inputs, *__):
        last = inputs["input_ids"][:, -1].tolist()
        return [[[token] * 3, [token] * 3, [y] * 3] for token in last]

    monkeypatch.setattr("inference.generate.draw_samples", drawn)
    prompts = [" Ice", "Lakes freeze from the top and"]
    last = [tokenizer(prompt).input_ids[-1] for prompt in prompts]
    expected = [tokenizer.decode([token] * 3).strip() for token in last]
    made = generate_batch(Agreed(), tokenizer, prompts, 3, samples=3)
    assert [record["text"] for record in made] == expected and expected[0] != expected[1]


def plainly_drawn(model, tokenizer, prompt: str, samples: int, n_new: int) -> list[list[int]]:
    """The same samples, each read whole at each of its tokens: no cache, no batch, no mask."""
    numbers = Uniforms([prompt], samples, n_new, "cpu").values[0]
    ends, texts = model.generation_config.eos_token_id, []
    for row in numbers:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new: list[int] = []
        for number in row:
            reached = model(ids).logits[0, -1].softmax(0).cumsum(0)
            new.append(int((reached < number * reached[-1]).sum()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
            if new[-1] in ends:
                break
        texts.append(new)
    return texts


def test_samples_read_side_by_side_are_those_of_each_alone(tiny_qwen2):
    """Whatever the others of the batch and how many: some end early, prompts are of any length."""
    model, tokenizer = load_model(str(tiny_qwen2), "float32")
    model.generation_config.eos_token_id = [*range(0, 600, 9)]  # so that they end soon
    prompts = [" Ice", "Lakes freeze from the top and", "Salt water freezes later."]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    together = draw_samples(model, inputs, 5, 12, prompts)
    with torch.inference_mode():
        alone = [plainly_drawn(model, tokenizer, prompt, 5, 12) for prompt in prompts]
    assert together == alone
    lengths = {len(ids) for of_prompt in together for ids in of_prompt}
    assert min(lengths) < 4 and max(lengths) == 12
    few = draw_samples(model, tokenizer(prompts[:1], return_tensors="pt"), 2, 12, prompts[:1])
    assert few == [together[0][:2]]


def test_samples_follow_the_model_s_probabilities_and_differ():
    """Of logits of 0.7, 0.2 and 0.1, as often as they say; what cannot come never does."""
    logits = torch.tensor([[[0.0, 0.7, 0.2, 0.1, 0.0]]]).log()
    rows, branches = torch.tensor([0]), torch.arange(20_000)[None]
    drawn, again, other = (
        Uniforms([prompt], 20_000, 1, "cpu").draw(logits, 0, rows, branches)[0] for prompt in "aab"
    )
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    assert torch.allclose(shares, torch.tensor([0.0, 0.7, 0.2, 0.1, 0.0]), atol=0.015)
    assert shares[0] == shares[4] == 0
    assert torch.equal(again, drawn) and not torch.equal(other, drawn)


def test_a_consensus_after_a_kill_is_that_of_one_run(finished_run, adapter):
    """Whichever batch a text falls into, its samples are the same."""
    shutil.copytree(adapter, finished_run.parent / "out", dirs_exist_ok=True)
    options = ("--systems", "consensus", "--max-new-tokens", 12, "--samples", 3)
    run_stage(STAGE, finished_run, *options)
    path = finished_run.parent / "out/eval/answers/consensus.jsonl"
    whole = {r["id"]: r for r in read_jsonl(path)}
    first = path.read_bytes().split(b"\n")[1]
    path.write_bytes(first + b'\n{"id": "t')  # as a kill leaves it
    run_stage(STAGE, finished_run, *options, "--batch-tokens", 200)
    assert {r["id"]: r for r in read_jsonl(path)} == whole and len(whole) == 4
    assert len({r["text"] for r in whole.values()}) > 1


def test_the_tuned_model_s_consensus_stands_beside_it(finished_run, adapter):
    shutil.copytree(adapter, finished_run.parent / "out", dirs_exist_ok=True)
    systems = ("--systems", "tuned", "consensus", "--max-new-tokens", 8)
    run_stage(STAGE, finished_run, *systems, "--samples", 2)
    run_stage(STAGE, finished_run, *systems, "--samples", 3)
    made = answers(finished_run, "consensus")
    assert [record["settings"]["samples"] for record in made] == [2] * 4 + [3] * 4
    assert "samples" not in answers(finished_run, "tuned")[0]["settings"]
    assert len(answers(finished_run, "tuned")) == 4  # made once


def test_a_batch_that_the_memory_does_not_hold_is_halved(tiny_qwen2, monkeypatch, capsys):
    model, tokenizer = load_model(str(tiny_qwen2), "float32")
    prompts, sizes, generate = ["Ice"] * 5, [], model.generate

    def little_memory(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", little_memory)
    answer_batch = partial(generate_batch, model, tokenizer, n_new=4)
    found = dict(answer_prompts(answer_batch, tokenizer, prompts, 4, 10_000))
    assert sorted(found) == [0, 1, 2, 3, 4] and sizes == [5, 2, 3, 1, 2]
    assert "--batch-tokens" in capsys.readouterr().err
    monkeypatch.setattr("torch.OutOfMemoryError", RuntimeError)

    def no_memory(**_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(model, "generate", no_memory)
    with pytest.raises(UserError, match=r"out of memory .* lower --max-prompt-tokens"):
        list(answer_prompts(answer_batch, tokenizer, prompts, 4, 10_000))


def test_answers_are_to_the_very_text_and_template(finished_run):
    """A text changed under its id, or a template's criteria, and the answers are made again."""
    plain_task(finished_run.parent / "prompts", "plain")
    task = finished_run.parent / "prompts/plain"
    (task / "instructed.jinja").write_text("{{ task.label }} this: {{ text }}")
    (task / "student.jinja").unlink()
    made = {"task": "plain", "prompts_dir": str(finished_run.parent / "prompts")}
    mark_made(finished_run.parent / "out/inputs", made)
    systems = ("--systems", "base", "instructed")
    run_stage(STAGE, finished_run, *systems)
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows[1]["prompt"][0]["content"] = "Salt water freezes later."
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    config = load_run_config(finished_run)
    with pytest.raises(UserError, match="lacks 1 of 4 texts"):
        load_answers(config, load_test_rows(config, None), ["base"])
    run_stage(STAGE, finished_run, *systems)
    assert [r["id"] for r in answers(finished_run, "base")[4:]] == ["t1"]
    settings = yaml.safe_load((task / "task.yaml").read_text())
    (task / "task.yaml").write_text(yaml.safe_dump(settings | {"label": "Shorten"}))
    load_task.cache_clear()
    run_stage(STAGE, finished_run, *systems)
    assert len(answers(finished_run, "instructed")) == 4 + 1 + 4
    assert len(answers(finished_run, "base")) == 5


def test_answers_of_an_earlier_version_stay_and_are_made_again(finished_run):
    generate(finished_run)
    path = finished_run.parent / "out/eval/answers/base.jsonl"
    old = [{k: v for k, v in r.items() if k != "prompt"} for r in read_jsonl(path)]
    write_jsonl(path, old)
    result = generate(finished_run)
    assert "4 answers are of an earlier version" in result.stdout and "lacks" not in result.stderr
    assert len(read_jsonl(path)) == 8


@pytest.mark.parametrize(
    "template", ["Plainer:\n{{ text }}", "{{ text.split() | length }}: {{ text }}"]
)
def test_a_template_edited_after_the_dataset_was_made_is_not_applied_twice(finished_run, template):
    plain_task(finished_run.parent / "prompts", "plain")
    made = {"task": "plain", "prompts_dir": str(finished_run.parent / "prompts")}
    mark_made(finished_run.parent / "out/inputs", made)
    (finished_run.parent / "prompts/plain/student.jinja").write_text(template)
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    for row in rows:
        row["prompt"][0]["content"] = f"Rewrite plainly:\n{row['prompt'][0]['content']}\nEnd."
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    line = one_error_line(run_stage(STAGE, finished_run, "--systems", "base", code=1))
    assert "student.jinja" in line
    assert "`just stage` makes them anew" in line or "must hold {{ text }} once" in line
    if "split" in template:  # which no dataset is made with
        return
    texts = [{**row, "text": f"Ice floats. {i}"} for i, row in enumerate(rows)]
    write_jsonl(finished_run.parent / "hub/test.jsonl", texts)
    run_stage(STAGE, finished_run, "--systems", "base")  # a row that holds its text says it


def test_an_endpoint_that_serves_another_model_under_the_name_is_asked_again(
    finished_run, endpoint
):
    server, cards = endpoint(content="A summary."), {"id": "m", "created": 1, "max_model_len": 99}
    with models_of(server, cards) as url:
        options = ("--systems", "endpoint:m", "--max-new-tokens", 8)
        environment = {"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": "k"}
        run_stage(STAGE, finished_run, *options, **environment)
        cards["pricing"] = {"input": 7}
        assert "0 of 4 to ask" in run_stage(STAGE, finished_run, *options, **environment).stdout
        cards["created"] = 2
        assert "4 of 4 to ask" in run_stage(STAGE, finished_run, *options, **environment).stdout
    found = answers(finished_run, "endpoint_m")
    assert [r["settings"]["served"]["created"] for r in found] == [1] * 4 + [2] * 4
    assert found[0]["settings"]["endpoint"] == f"{url.removeprefix('http://')}/v1"
    gone = run_stage(STAGE, finished_run, *options, **environment)
    assert "taken to serve what it did before" in gone.stderr and "0 of 4 to ask" in gone.stdout
    gone = run_stage(STAGE, finished_run, "--systems", "endpoint:other", code=1, **environment)
    assert "does not answer" in one_error_line(gone)


def test_the_address_of_an_endpoint_without_credentials(monkeypatch):
    monkeypatch.setenv("TOGETHER_BASE_URL", "https://models.example:81/team/v1/")
    assert address_of() == "models.example:81/team/v1"
    monkeypatch.setenv("TOGETHER_BASE_URL", "https://me:secret@models.example/v1")
    with pytest.raises(UserError, match="more than host and path"):
        address_of()
    monkeypatch.setenv("TOGETHER_BASE_URL", "models.example")
    with pytest.raises(UserError, match="no address such as"):
        address_of()
    monkeypatch.delenv("TOGETHER_BASE_URL")
    assert address_of() == "api.together.ai/v1"


@contextmanager
def models_of(server, card):
    """The address of `server` with a list of the one model `card`, as it is at the moment."""

    class Front(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(json.dumps({"object": "list", "data": [card]}).encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(httpx.post(f"{server.url}{self.path}", content=body).content)

        def answer(self, content):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    front = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    threading.Thread(target=front.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{front.server_port}"
    front.shutdown()
    front.server_close()


def test_a_reply_that_is_no_answer_counts_as_an_empty_one(finished_run, endpoint, capsys):
    environment = {"TOGETHER_BASE_URL": endpoint(content="A summary.").url, "TOGETHER_API_KEY": "k"}
    run_stage(STAGE, finished_run, "--systems", "endpoint:m", "--max-new-tokens", 8, **environment)
    path = finished_run.parent / "out/eval/answers/endpoint_m.jsonl"
    records = sorted(read_jsonl(path), key=lambda record: record["id"])
    records[1] |= {"finish_reason": "content_filter", "unusable": "filtered", "text": "I can"}
    records[2] |= {"finish_reason": "length", "unusable": "cut"}
    write_jsonl(path, records)
    config = load_run_config(finished_run)
    found = load_answers(config, load_test_rows(config, None), ["endpoint:m"])["endpoint:m"]
    assert [r["text"] for r in found.values()] == ["A summary.", "", "A summary.", "A summary."]
    assert "unusable" in found["t1"] and "unusable" not in found["t2"]
    said = capsys.readouterr().err
    assert "endpoint:m: 1 filtered of 4, no answers" in said and "--retry-unusable" in said


def test_two_processes_at_once_lose_nothing(finished_run, tmp_path):
    """Which systems were asked, and the lines of the ledger."""
    config = load_run_config(finished_run)
    rows = load_test_rows(config, None)

    def ask(number):
        options = AnswerOptions(max_new_tokens=8)
        with suppress(UserError):
            answer_all(config, rows, [f"endpoint:m{number}"], options)
        append_ledger([(f"s{number}", "f1", 0.5, None, None)], {"date": "d"}, tmp_path / "l.csv")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference.answers.describe_served", lambda _: None)
        patch.setattr("inference.answers.ask_endpoint", lambda *_: None)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(24)))
    asked = json.loads((config.eval_dir / "answers/asked.json").read_text())
    assert len(asked) == 24
    assert len((tmp_path / "l.csv").read_text().splitlines()) == 25


def test_first_sentences_come_nearest_to_the_length_or_are_cut():
    text = "One two three. Four five six.\n\nSeven eight nine. Ten."
    assert first_sentences(text, 6) == "One two three. Four five six."
    assert first_sentences(text, 1) == "One two three."
    assert first_sentences(text, 99) == "One two three. Four five six. Seven eight nine. Ten."
    assert first_sentences(text, 2, cut=True) == "One two"


@pytest.mark.parametrize("stage", ["inference.merge_adapter", "eval.answer_texts"])
def test_a_model_folder_that_is_not_one(tmp_path, stage):
    settings = {"base_model": str(tmp_path), "output_dir": str(tmp_path)}
    settings["datasets"] = [{"path": str(tmp_path)}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    line = one_error_line(run_stage(stage, tmp_path / "run.yaml", code=1))
    assert "is not a model folder" in line


def plain_task(folder, name: str) -> None:
    """A task with a template of its own around the student's text, and no criteria."""
    task = folder / name
    task.mkdir(parents=True)
    settings = {"label": "Answer", "answers": 1, "max_new_tokens": 8, "systems": ["base", "second"]}
    (task / "task.yaml").write_text(yaml.safe_dump(settings | {"hub": {}}))
    (task / "student.jinja").write_text("Rewrite plainly:\n{{ text }}\nEnd.")
    (task / "instructed.jinja").write_text("Rewrite this in plain words: {{ text }}")


def test_a_run_of_another_task_is_given_its_templates_and_its_texts(finished_run):
    plain_task(finished_run.parent / "prompts", "plain")
    made = {"task": "plain", "prompts_dir": str(finished_run.parent / "prompts")}
    mark_made(finished_run.parent / "out/inputs", made)
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    for row in rows:
        row["prompt"][0]["content"] = f"Rewrite plainly:\n{row['prompt'][0]['content']}\nEnd."
        row["rejected"] = [{"role": "assistant", "content": f"Second of {row['id']}."}]
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    run_stage(STAGE, finished_run)
    config = load_run_config(finished_run)
    rows = load_test_rows(config, None)
    assert rows[1]["text"] == "Ice floats. Ice floats. "
    answers = load_answers(config, rows, None)
    assert list(answers) == ["base", "second"]
    assert answers["second"]["t2"]["text"] == "Second of t2."
    assert answers["base"]["t1"]["settings"]["max_new_tokens"] == 8
    assert system_of(config, "base").template == system_of(config, "endpoint-bare:m").template
    assert system_of(config, "instructed").template == "instructed"


def test_training_texts_of_a_config_that_is_not_trained(finished_run, tmp_path):
    rows = [{"id": f"e{i}", "text": f"Lakes freeze. {i}"} for i in range(4)]
    write_jsonl(tmp_path / "data/extracts/train.jsonl", rows)
    plain_task(tmp_path / "prompts", "plain")
    for task, ids in {"summarize": "013", "plain": "2"}.items():
        replies = [{"id": f"e{i}"} for i in ids]
        write_jsonl(tmp_path / f"data/{task}/replies/train.jsonl", replies)
    configs = tmp_path / "axolotl_configs"
    configs.mkdir()
    settings = yaml.safe_load(finished_run.read_text()) | {"output_dir": "outputs/student"}
    (configs / "student.yaml").write_text(yaml.safe_dump(settings))
    options = ("--split", "train", "--max-new-tokens", 8)
    lead = run_stage(STAGE, "student", *options, "--systems", "lead", cwd=tmp_path, code=1)
    assert "lead: only a model answers the training texts" in lead.stderr
    run_stage(STAGE, "student", *options, cwd=tmp_path)
    made = read_jsonl(tmp_path / "outputs/student/eval/answers/instructed.jsonl")
    assert {r["id"] for r in made} == {"e0", "e1", "e3"}
    other = ("--task", "plain", "--prompts-dir", tmp_path / "prompts", "--systems", "base")
    run_stage(STAGE, "student", *options, *other, cwd=tmp_path)
    (path,) = (tmp_path / "outputs").glob("*/eval/answers/base.jsonl")
    assert path.parts[-4] == "plain-student" and [r["id"] for r in read_jsonl(path)] == ["e2"]


def test_all_samples_of_unseen_texts_are_kept_and_made_once(finished_run, adapter, tmp_path):
    """Of extracts without a reply; whatever the batch and whether the run was killed."""
    shutil.copytree(adapter, finished_run.parent / "out", dirs_exist_ok=True)
    rows = [{"id": f"e{i}", "text": "Lakes freeze. " * (i + 1)} for i in range(4)]
    write_jsonl(tmp_path / "data/extracts/train.jsonl", rows)
    options = ("--split", "unseen", "--data", tmp_path / "data", "--max-new-tokens", 12)
    options = (finished_run, *options, "--samples", 3)
    run_stage(STAGE, *options)
    path = finished_run.parent / "out/eval/answers/samples.jsonl"
    whole = {record["id"]: record for record in read_jsonl(path)}
    assert sorted(whole) == ["e0", "e1", "e2", "e3"]
    for record in whole.values():
        assert len({sample["text"] for sample in record["samples"]}) == 3
        assert record["settings"]["samples"] == 3 and "sampling" in record["settings"]
    first = path.read_bytes().split(b"\n")[0]
    path.write_bytes(first + b'\n{"id": "e')  # as a kill leaves it
    run_stage(STAGE, *options, "--batch-tokens", 200)
    again = read_jsonl(path)
    assert {record["id"]: record for record in again} == whole and len(again) == 4
    write_jsonl(tmp_path / "data/summarize/replies/train.jsonl", [{"id": f"e{i}"} for i in "03"])
    run_stage(STAGE, *options, "--samples", 2)
    fewer = read_jsonl(path)[4:]
    assert sorted(record["id"] for record in fewer) == ["e1", "e2"]
    for record in fewer:  # the first samples are the same, however many are drawn
        assert record["samples"] == whole[record["id"]]["samples"][:2]
    wrong = run_stage(STAGE, *options, "--systems", "base", code=1)
    assert "only the tuned model is sampled" in one_error_line(wrong)
    write_jsonl(tmp_path / "data/summarize/replies/train.jsonl", rows)
    wrong = run_stage(STAGE, *options, code=1)
    assert "has a reply" in one_error_line(wrong) and "just extracts" in one_error_line(wrong)
