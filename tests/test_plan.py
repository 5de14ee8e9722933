"""What a run would cost before it starts: the teacher's share and the GPU's."""

import argparse
import json
import re

import pytest
from conftest import one_error_line, run_stage, write_jsonl

from eval import answer_texts
from training import estimate, plan
from training.config import Overlay, load_run_config, resolve_config

PLAN = "training.plan"
SFT, DPO = "qwen2-1.5b-sft-qlora", "qwen2-1.5b-dpo-sft-qlora"
THEN_DPO = "qwen2-1.5b-sft-then-dpo-qlora"


def rows_of(text: str) -> dict[str, list[str]]:
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def training_of(name: str, method: str = "") -> estimate.Training:
    return estimate.training_of(resolve_config(name, Overlay(method=method)), 1000, 1000.0, 200.0)


def test_a_fresh_clone_is_reckoned_with_the_defaults_and_says_so(tmp_path):
    said = run_stage(PLAN, "--data", tmp_path / "data").stdout
    assert said.startswith(f"No extracts in {tmp_path}/data/extracts")
    assert "train: 20,500 texts of 1,350 tokens" in said and "An estimate" in said
    rows = rows_of(said)
    assert rows["openai/gpt-oss-120b (2 a reply)"][0] == "20,700"
    assert not (tmp_path / "data").exists()
    assert rows[""] == ["RTX 4090", "A100 80GB", "H100 80GB"]
    assert "passes (forward 1, backward 1" in said and "0.4 of the card's peak" in said


def test_extracts_are_counted_and_a_price_is_taken(tmp_path):
    texts = [{"id": str(i), "text": "Ice floats. " * 40, "n_tokens": 120} for i in range(8)]
    write_jsonl(tmp_path / "extracts/train.jsonl", texts)
    write_jsonl(tmp_path / "extracts/test.jsonl", texts[:2])
    told = ["--data", tmp_path, "--usd-per-hour", 2, "--config", DPO]
    said = run_stage(PLAN, *told).stdout
    assert "No extracts" not in said
    assert "tokens: 8 rows x 2 x 400 x 2 epochs" in said  # 120, the template's and the answer's
    rows = rows_of(said)
    hours, dollars = float(rows["all"][0].split()[0]), float(rows["$"][0])
    assert rows["$ an hour"][0] == "2.00" and dollars == pytest.approx(2 * hours, abs=0.11)
    replies = float(rows["openai/gpt-oss-120b (2 a reply)"][3])
    assert float(rows["$ with the replies"][0]) == pytest.approx(dollars + replies, abs=0.011)
    limited = run_stage(PLAN, *told, "--limit", 3, "--splits", "train").stdout
    assert "tokens: 3 rows x 2" in limited and "answers: 0 documents" in limited


def test_a_whole_run_is_reckoned_with_its_samples_and_both_trainings(tmp_path):
    run = ["--config", SFT, THEN_DPO, "--limit", 18_000, "--data", tmp_path]
    said = run_stage(PLAN, *run).stdout
    rows = rows_of(said)
    steps = [f"training {SFT}", "samples of 2,500 texts", f"training {THEN_DPO}", "answers"]
    hours = [float(rows[step][0].split()[0]) for step in [*steps, "scores"]]
    assert float(rows["all"][0].split()[0]) == pytest.approx(sum(hours), abs=0.3)
    assert "tokens: 18,000 rows x 1 x" in said and "tokens: 2,500 rows x 2 x" in said
    # Where no text is left over, the second one learns from the texts of the first.
    assert "samples" not in run_stage(PLAN, *run[:3], "--data", tmp_path).stdout


def test_a_title_is_reckoned_shorter_than_a_summary(tmp_path):
    said = run_stage(PLAN, "--task", "title", "--data", tmp_path).stdout
    assert "out 32 tokens an answer" in said
    free_of_thought = rows_of(said)["meta-llama/Llama-3.3-70B-Instruct-Turbo (1 a reply)"]
    assert free_of_thought[2] == f"{20_700 * 32 / 1e6:.2f}"


def test_configs_of_unlike_bases_are_one_line(tmp_path):
    told = ["--config", SFT, "smollm2-135m-dpo-sft-lora", "--data", tmp_path]
    assert "unlike base models" in one_error_line(run_stage(PLAN, *told, code=1))
    twice = ["--config", SFT, SFT, "--data", tmp_path]
    assert "given twice" in one_error_line(run_stage(PLAN, *twice, code=1))


def test_the_weights_are_those_of_the_published_model():
    shape = estimate.shape_of("Qwen/Qwen2-1.5B-Instruct")
    assert shape.layer_weights + shape.head_weights == pytest.approx(1.5436e9, rel=1e-3)
    assert shape.adapter_weights(32) == 36_929_536  # as peft counts them, all linear modules


def test_a_folder_tells_the_sizes_of_its_model(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes}))
    shape = estimate.shape_of(str(tmp_path))
    assert (shape.num_hidden_layers, shape.hidden_size, shape.head_dim) == (2, 64, 16)


def test_a_frozen_base_takes_six_operations_a_weight_and_the_reference_two_more():
    shape = estimate.shape_of("Qwen/Qwen2-1.5B-Instruct")
    sft, dpo = (estimate.operations_a_token(shape, training_of(name)) for name in (SFT, DPO))
    weights = shape.layer_weights + shape.head_weights
    assert 6 * weights < sft < 6.6 * weights
    assert dpo - sft == pytest.approx(2 * weights, rel=0.1)
    assert training_of(DPO).tokens_read == 2 * training_of(SFT).tokens_read
    orpo = training_of(DPO, "orpo")
    assert orpo.texts_a_row == 2 and not orpo.reference


def test_more_texts_a_slower_card_and_a_smaller_share_take_longer():
    shape, cards = estimate.shape_of("Qwen/Qwen2-1.5B-Instruct"), estimate.load_cards()
    small = estimate.training_seconds(shape, training_of(SFT), cards["H100 80GB"], 0.4)
    assert small < estimate.training_seconds(shape, training_of(DPO), cards["H100 80GB"], 0.4)
    assert small < estimate.training_seconds(shape, training_of(SFT), cards["RTX 4090"], 0.4)
    assert small < estimate.training_seconds(shape, training_of(SFT), cards["H100 80GB"], 0.1)
    assert estimate.memory_gb(shape, training_of(SFT)) < 24


def test_the_defaults_of_the_evaluation_are_the_evaluations_own():
    parser = argparse.ArgumentParser()
    answer_texts.add_generation_options(parser)
    assert parser.get_default("max_prompt_tokens") == plan.MOST_PROMPT_TOKENS


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["--config", "nothing"], "no config named nothing"),
        (["--method", "nothing"], "no method nothing"),
        (["--task", "nothing"], "nothing"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, told, words):
    result = run_stage(PLAN, "--data", tmp_path, *told, code=1)
    assert words in one_error_line(result)


def test_a_student_whose_sizes_nobody_knows_is_one_line(tmp_path):
    config = tmp_path / "other.yaml"
    text = load_run_config(SFT).path.read_text()
    (tmp_path / "empty").mkdir()
    config.write_text(text.replace("Qwen/Qwen2-1.5B-Instruct", str(tmp_path / "empty")))
    result = run_stage(PLAN, "--data", tmp_path, "--config", config, code=1)
    assert "no config.json with the sizes" in one_error_line(result)
