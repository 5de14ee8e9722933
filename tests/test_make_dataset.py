"""`just dataset`: one command whose options reach the stages; it asks for a ceiling first."""

import random

import pytest
from conftest import one_error_line, read_jsonl, run_stage, write_jsonl
from odd_teacher import TEXT, OddTeacher, body

from data_prep import build_dataset, build_pairs, generate_replies
from data_prep.make_dataset import route
from prompts.task import load_task

STAGE = "data_prep.make_dataset"


def routed(*arguments: str) -> dict[str, list[str]]:
    parsers = {
        "replies": generate_replies.make_parser(),
        "pairs": build_pairs.make_parser(),
        "stage": build_dataset.make_parser(),
    }
    return route(list(arguments), parsers, parsers["replies"])


def test_an_option_reaches_the_stages_that_know_it():
    found = routed(
        "--data", "d", "--task=title", "--budget-usd", "5", "--train", "9", "--temperature", "0",
        "--licence", "MIT", "--extracts-max-tokens", "700", "--pairs-max-tokens=99", "--single",
        "--adopt-old", "--batch",
    )  # fmt: skip
    assert found == {
        "extracts": ["--data", "d", "--train", "9", "--licence", "MIT", "--max-tokens", "700"],
        "replies": [
            *("--data", "d", "--task=title", "--budget-usd", "5", "--temperature", "0", "--single"),
            *("--adopt-old", "--batch"),
        ],
        "pairs": [
            *("--data", "d", "--task=title", "--budget-usd", "5", "--max-tokens=99", "--adopt-old")
        ],
        "stage": ["--data", "d", "--task=title", "--licence", "MIT"],
    }


@pytest.mark.parametrize(
    "options",
    [("--bogus", 1), ("--max-tokens", 9), ("--plan",), ("x",), ("--budget-usd", "nan"),
     ("--train", "many"), ("--prompts-dir",)],
)  # fmt: skip
def test_wrong_usage_ends_before_anything_runs(tmp_path, options):
    result = run_stage(STAGE, *options, cwd=tmp_path, code=2)
    assert str(options[0]) in result.stderr and not list(tmp_path.iterdir())


def test_key_and_ceiling_are_asked_for_before_anything_is_sampled(tmp_path):
    line = one_error_line(run_stage(STAGE, cwd=tmp_path, code=1))
    assert "set TOGETHER_API_KEY" in line
    line = one_error_line(run_stage(STAGE, cwd=tmp_path, code=1, TOGETHER_API_KEY="k"))
    assert "--budget-usd" in line and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dataset_is_made_within_a_budget(tmp_path, tiny_qwen2):
    """From texts to the staged files, with the options of all stages on one line."""
    words, rng = load_task().render("teacher", text="", longer=1).split(), random.Random(0)
    rows = [
        {"text": " ".join(rng.choices(words, k=60 if i % 3 else 300)), "meta": {}}
        for i in range(45)
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    teacher = OddTeacher(lambda prompt, n: body({"content": f"{TEXT} It says so {n} times."}))
    options = (
        *("--input", tmp_path / "in.jsonl", "--data", tmp_path / "data", "--train", 20),
        *("--test", 5, "--tokenizer", tiny_qwen2, "--min-tokens", 20, "--workers", 1),
        *("--extracts-max-tokens", 2000, "--min-chars", 200, "--max-chars", 9000),
        *("--single", "--rejected", "none", "--licence", "MIT", "--budget-usd", 1),
        *("--keep", "language", "lead", "length"),
    )
    env = {"TOGETHER_BASE_URL": teacher.url, "TOGETHER_API_KEY": "k"}
    result = run_stage(STAGE, *options, fresh=True, code=None, **env)
    teacher.close()
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "data/summarize/hub/README.md").exists()
    assert read_jsonl(tmp_path / "data/summarize/pairs/train.jsonl")
