"""The demo's own parts: the articles, and the extractive teacher behind its endpoint."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment, read_jsonl, run_stage, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.teacher.parsing import parse_reply
from demo.prepare_parts import clean_markup
from demo.serve_teacher import MODEL, answer, rate
from eval.generate_summaries import build_prompt, generate_batch, load_model
from prompts import render

pytestmark = pytest.mark.slow  # sumy and the student take seconds

TEXT = (
    "Ice floats on water because it is less dense. Lakes therefore freeze from the top down. "
    "Fish survive the winter in the water below the ice. The ice keeps the water below it warm. "
    "Rivers freeze more slowly because their water moves. Salt lowers the freezing point of water. "
    "Sea ice is therefore rarer than lake ice. Skaters know this well."
)


def test_the_articles_are_real_and_in_redpajamas_shape(demo_parts):
    articles = read_jsonl(demo_parts / "data/wikipedia.jsonl")
    assert len([a for a in articles if a["text"]]) == 106
    assert "anarchism" in articles[0]["text"].lower()
    assert articles[0]["meta"]["url"].startswith("https://en.wikipedia.org/wiki/")


def test_the_student_ends_its_turns_as_it_was_trained_to(demo_parts):
    model, tokenizer = load_model(str(demo_parts / "models/smollm2-135m-instruct"), None)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    prompt, _ = build_prompt(tokenizer, "What is the capital of France?", None, 4096)
    (answer,) = generate_batch(model, tokenizer, [prompt], 40)
    assert answer["finish_reason"] == "stop" and "Paris" in answer["text"]


def test_laying_out_again_does_nothing_anew(demo_parts):
    weights = demo_parts / "models/smollm2-135m-instruct/model.safetensors"
    before = weights.stat().st_mtime_ns
    run_stage(
        "demo.prepare_parts", "--data", demo_parts / "data", "--models", demo_parts / "models"
    )
    assert weights.stat().st_mtime_ns == before
    assert (demo_parts / "models/minilm/config.json").is_file()


def test_markup_is_cleaned():
    text = "'''Ice''' is ''cold''.\n\n==Uses==\n* a list\n\n\nIt ( , ) floats."
    assert clean_markup(text) == "Ice is cold.\n\nIt floats."


def test_the_teacher_answers_in_the_prompts_format():
    parsed = parse_reply(answer(render("summarize/teacher.jinja", text=TEXT, longer=1)))
    assert all(sentence in TEXT for s in parsed.summaries for sentence in s.split(". ")[:1])
    assert len(parsed.summaries[0]) >= len(parsed.summaries[1])
    for score, criteria in zip(parsed.scores, parsed.criteria, strict=True):
        assert score == sum(criteria.values())
        assert criteria["consistency"] == 5


def test_the_teacher_writes_the_same_two_in_the_order_asked_for():
    first, second = (
        parse_reply(answer(render("summarize/teacher.jinja", text=TEXT, longer=longer)))
        for longer in (1, 2)
    )
    assert first.summaries == second.summaries[::-1] and first.best != second.best
    assert len(first.summaries[0]) >= len(first.summaries[1])


def test_the_scores_measure_the_summary_against_the_text():
    good = rate("Ice floats on water because it is less dense.", TEXT)
    bad = rate("the stock market rose sharply on monday", TEXT)
    for criterion in ("Consistency", "Fluency", "Relevance"):
        assert good[criterion] > bad[criterion]


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1))
def test_any_text_gets_an_answer(text):
    assert "Best summary" in answer(render("summarize/teacher.jinja", text=text, longer=1))


@pytest.fixture
def surroundings():
    return clean_environment(TOGETHER_API_KEY="a real key", TOGETHER_BASE_URL="http://127.0.0.1:9")


def serve(*command, env):
    return subprocess.run(
        [sys.executable, "-m", "demo.serve_teacher", "--", *command],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_sees_the_endpoint_and_no_key_of_the_surroundings(surroundings):
    show = "import os; print(os.environ['TOGETHER_API_KEY'], os.environ['TOGETHER_BASE_URL'])"
    result = serve(sys.executable, "-c", show, env=surroundings)
    key, url = result.stdout.split()
    assert key == "local" and url.startswith("http://127.0.0.1:") and not url.endswith(":9")
    assert serve(sys.executable, "-c", "exit(3)", env=os.environ).returncode == 3


def test_replies_through_the_real_stage(tmp_path, surroundings):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"extracts/{split}.jsonl", [{"id": split, "text": TEXT}])
    stage = [
        sys.executable,
        "-m",
        "data_prep.generate_replies",
        "--extracts",
        tmp_path / "extracts",
        "--output",
        tmp_path / "replies",
    ]
    assert serve(*map(str, stage), "--model", MODEL, env=surroundings).returncode == 0
    assert parse_reply(read_jsonl(tmp_path / "replies/train.jsonl")[0]["text"])
    other = serve(*map(str, stage), "--model", "other", env=surroundings)
    assert other.returncode == 1 and "does not know other" in other.stderr
