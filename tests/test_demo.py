"""The demo's own parts: the articles, the student, and the teacher's recorded replies."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment, read_jsonl, run_stage, write_jsonl

from demo.prepare_parts import clean_markup
from demo.replies import RECORDINGS, load_recordings

TASKS = ("summarize", "title")


@pytest.mark.slow
def test_the_articles_are_real_and_in_redpajamas_shape(demo_parts):
    articles = read_jsonl(demo_parts / "data/wikipedia.jsonl")
    assert len([a for a in articles if a["text"]]) > 100
    assert "anarchism" in articles[0]["text"].lower()
    assert articles[0]["meta"]["url"].startswith("https://en.wikipedia.org/wiki/")


@pytest.mark.slow
def test_the_student_ends_its_turns_as_it_was_trained_to(demo_parts):
    from inference.generate import generate_batch
    from inference.weights import load_model

    model, tokenizer = load_model(str(demo_parts / "models/smollm2-135m-instruct"), None)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert {*model.generation_config.eos_token_id} == {tokenizer.eos_token_id} == {2}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (answer,) = generate_batch(model, tokenizer, [prompt], 40)
    assert answer["finish_reason"] == "stop" and "Paris" in answer["text"]


@pytest.mark.slow
def test_laying_out_again_does_nothing_anew(demo_parts):
    weights = demo_parts / "models/smollm2-135m-instruct/model.safetensors"
    before = weights.stat().st_mtime_ns
    run_stage(
        "demo.prepare_parts", "--data", demo_parts / "data", "--models", demo_parts / "models"
    )
    assert weights.stat().st_mtime_ns == before
    assert (demo_parts / "models/minilm/config.json").is_file()


def test_prose_is_kept_and_markup_goes():
    prose = "Ice floats on water because it is less dense than water."
    items = "==Uses==\n* a list of things that is long enough, as one sees.\n\n\nA caption"
    text = f"'''{prose}'''\n\n{items}\n{prose}"
    assert clean_markup(text) == f"{prose}\n\n{prose}"


@pytest.mark.parametrize("task", TASKS)
def test_a_recording_says_what_made_it_and_is_small(task):
    path = RECORDINGS / f"{task}.jsonl.gz"
    with gzip.open(path, "rt") as file:
        made_by, *replies = map(json.loads, file)
    assert made_by.keys() >= {"model", "model_sha256", "temperature"} and len(replies) > 200
    assert path.stat().st_size < 1_000_000
    assert all(reply["text"] and reply["prompt_sha"] for reply in replies)


def serve(*command, env):
    return subprocess.run(
        [sys.executable, "-m", "demo.replies", "serve", "--", *map(str, command)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def surroundings():
    return clean_environment(TOGETHER_API_KEY="a real key", TOGETHER_BASE_URL="http://127.0.0.1:9")


def test_the_command_sees_the_endpoint_and_no_key_of_the_surroundings(surroundings):
    show = "import os; print(os.environ['TOGETHER_API_KEY'], os.environ['TOGETHER_BASE_URL'])"
    result = serve(sys.executable, "-c", show, env=surroundings)
    key, url = result.stdout.split()
    assert key == "local" and url.startswith("http://127.0.0.1:") and not url.endswith(":9")
    assert serve(sys.executable, "-c", "exit(3)", env=os.environ).returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_demos_extracts_are_those_that_were_recorded(demo_parts, tmp_path, surroundings, task):
    """As the Justfile has it: the same extracts, the same prompts, a reply to each."""
    windows = "--min-tokens 100 --max-tokens 220 --min-chars 450 --max-chars 950"
    amounts = "--train 600 --test 128"
    assert f"{windows.split(' --min-chars')[0]} " in (ROOT / "Justfile").read_text()
    assert amounts in (ROOT / "Justfile").read_text()
    student = demo_parts / "models/smollm2-135m-instruct"
    where = ("--input", demo_parts / "data/wikipedia.jsonl", "--data", tmp_path, "--passages")
    options = (*where, "--tokenizer", student, *windows.split(), *amounts.split())
    run_stage("data_prep.sample_extracts", *options)
    model = ("--single", "--model", load_recordings()[0].pop(), "--limit", 192)
    stage = (sys.executable, "-m", "data_prep.generate_replies", "--task", task, *model)
    result = serve(*stage, "--data", tmp_path, env=surroundings)
    assert result.returncode == 0, result.stderr
    replies = {s: read_jsonl(tmp_path / f"{task}/replies/{s}.jsonl") for s in ("train", "test")}
    assert {split: len(found) for split, found in replies.items()} == {"train": 192, "test": 128}
    recorded = {(r["id"], r["prompt_sha"]): r for r in load_recordings()[1].values()}
    for reply in replies["train"] + replies["test"]:
        of = recorded[reply["id"], reply["prompt_sha"]]
        assert all(reply[name] == of[name] for name in ("text", "finish_reason"))


@pytest.mark.slow
def test_what_was_not_recorded_is_refused_with_its_reason(tmp_path, surroundings):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"extracts/{split}.jsonl", [{"id": split, "text": "Not there."}])
    model = ("--single", "--model", load_recordings()[0].pop())
    stage = (sys.executable, "-m", "data_prep.generate_replies", *model, "--data", tmp_path)
    result = serve(*stage, env=surroundings)
    assert result.returncode == 1 and "this prompt was not recorded" in result.stderr
