"""The demo's own parts: the articles, the student, and the teacher's recorded replies."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    clean_environment,
    make_tokenizer,
    one_error_line,
    read_jsonl,
    run_stage,
    write_jsonl,
)

from common.cli import UserError
from demo.prepare_parts import clean_markup, find_student
from demo.replies import RECORDINGS, load_recordings
from demo.run_demo import (
    AMOUNTS,
    N_PAIRS,
    PACKAGED,
    WINDOWS,
    Demo,
    steps_of_demo,
    steps_of_preferences,
)
from prompts.task import load_task

TASKS = ("summarize", "title")


def options_by_stage(student: str, task: str = "summarize") -> dict[str, list[str]]:
    """module -> its options, of the demo and of what goes on from it (DEMO, THEN)."""
    demo = Demo(load_task(task), student)
    both = {"demo": steps_of_demo(demo), "then": steps_of_preferences(demo)}
    found = {}
    for name, steps in both.items():
        for step in steps:
            found |= {f"{name} {stage[0]}": list(map(str, stage[1:])) for stage in step.stages}
    return found


def test_another_student_has_the_same_texts_and_replies_and_names_of_its_own():
    packaged, other = options_by_stage(PACKAGED), options_by_stage("Qwen/Qwen2.5-0.5B-Instruct")
    differ = {stage for stage in packaged if packaged[stage] != other[stage]}
    assert set(packaged) - differ == {"demo data_prep.sample_extracts", "demo demo.replies"}
    training = packaged["demo training.train_adapter"]
    assert "smollm2-135m-sft" in training and "datasets.0.path=data/demo/summarize/hub" in training
    assert not any(option.startswith("base_model=") for option in training)
    training = other["demo training.train_adapter"]
    assert "base_model=Qwen/Qwen2.5-0.5B-Instruct" in training
    assert "datasets.0.path=data/demo/summarize/hub-qwen2.5-0.5b-instruct" in training
    assert other["demo eval.evaluate"][0] == "qwen2.5-0.5b-instruct-sft"
    assert other["then eval.answer_texts"][0] == "qwen2.5-0.5b-instruct-sft"
    assert other["then eval.evaluate"][0] == "qwen2.5-0.5b-instruct-sft-then-dpo"
    pairs = other["then data_prep.build_pairs"]
    assert "qwen2.5-0.5b-instruct-samples" in pairs and pairs[-1] == "Qwen/Qwen2.5-0.5B-Instruct"
    titles = options_by_stage(PACKAGED, "title")["demo eval.evaluate"]
    assert titles[0] == "title-smollm2-135m-sft" and "instructed:12-words" in titles


def test_only_a_student_of_the_hub_asks_for_a_network():
    for student, asks in ((PACKAGED, False), ("models/mine", False), ("Qwen/Qwen2.5-0.5B", True)):
        first, *others = steps_of_demo(Demo(load_task(), student))
        assert first.may_use_network is asks
        assert not any(step.may_use_network for step in others)


def test_a_student_that_cannot_be_had_is_named_before_anything_is_made(tmp_path):
    where = ("--data", tmp_path / "data", "--models", tmp_path / "models")
    for student, said in (("org/none", "the Hub must be reached"), (tmp_path, "not a model")):
        result = run_stage("demo.prepare_parts", "--student", student, *where, code=1)
        assert said in one_error_line(result) and not list(tmp_path.iterdir())


def test_a_student_of_the_hub_needs_no_network_afterwards(hub, tmp_path):
    from data_prep.count_tokens import load_counter

    make_tokenizer(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    hub.put("models/me/tiny", files | {"pytorch_model.bin": b"of no use"})
    with hub.here(tmp_path):
        find_student("me/tiny")
        with pytest.raises(UserError, match="no student me/other: the Hub must be reached"):
            find_student("me/other")
        hub.close()
        load_counter.cache_clear()
        assert load_counter("me/tiny").count("Ice floats.") > 1
        assert not list(tmp_path.rglob("*.bin"))


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
    """The same extracts, the same prompts, a reply to each."""
    student = demo_parts / "models/smollm2-135m-instruct"
    where = ("--input", demo_parts / "data/wikipedia.jsonl", "--data", tmp_path, "--passages")
    options = (*where, "--tokenizer", student, *WINDOWS.split(), *AMOUNTS.split())
    run_stage("data_prep.sample_extracts", *options)
    model = ("--single", "--model", load_recordings()[0].pop(), "--limit", N_PAIRS)
    stage = (sys.executable, "-m", "data_prep.generate_replies", "--task", task, *model)
    result = serve(*stage, "--data", tmp_path, env=surroundings)
    assert result.returncode == 0, result.stderr
    replies = {s: read_jsonl(tmp_path / f"{task}/replies/{s}.jsonl") for s in ("train", "test")}
    assert {split: len(found) for split, found in replies.items()} == {
        "train": N_PAIRS,
        "test": 128,
    }
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
