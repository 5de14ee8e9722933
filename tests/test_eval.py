import pytest
import yaml
from conftest import one_error_line, read_jsonl, run_stage
from hypothesis import given
from hypothesis import strategies as st

from eval.generate_summaries import pack_batches
from eval.systems import lead_sentences


def test_lead_sentences_come_nearest_to_the_length():
    text = "One two three. Four five six.\n\nSeven eight nine. Ten."
    assert lead_sentences(text, 6) == "One two three. Four five six."
    assert lead_sentences(text, 1) == "One two three."
    assert lead_sentences(text, 99) == "One two three. Four five six. Seven eight nine. Ten."


@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(1, 9))
def test_batches_hold_every_prompt_once_and_stay_in_the_budget(lengths, largest):
    budget = 10 * (900 + 5) * 2
    batches = list(pack_batches(lengths, 5, 10, budget, largest))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) <= largest
        assert len(batch) * (10 * (longest + 5) + 4 * longest**2) <= budget or len(batch) == 1
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=True)


def generate(config, *options, **kwargs):
    return run_stage("eval.generate_summaries", config, "--max-new-tokens", 8, *options, **kwargs)


def test_batches_give_what_one_at_a_time_gives(finished_run):
    folder = finished_run.parent / "out/eval/summaries"
    generate(finished_run, "--batch-size", 1)
    single = {
        s: {r["id"]: r for r in read_jsonl(folder / f"{s}.jsonl")} for s in ("base", "instructed")
    }
    for path in folder.iterdir():
        path.unlink()
    generate(finished_run, "--batch-size", 3)
    for system, records in single.items():
        batched = {r["id"]: r for r in read_jsonl(folder / f"{system}.jsonl")}
        assert batched == records and len(records) == 4
    prompts = [r["n_prompt_tokens"] for r in single["base"].values()]
    assert len(set(prompts)) == 4
    assert single["instructed"]["t0"]["n_prompt_tokens"] > single["base"]["t0"]["n_prompt_tokens"]


def test_a_stopped_generation_goes_on_and_other_settings_start_anew(finished_run):
    path = finished_run.parent / "out/eval/summaries/base.jsonl"
    generate(finished_run, "--n", 2)
    first = path.read_bytes()
    path.write_bytes(first + b'{"id": "t2", "te')
    again = generate(finished_run)
    assert path.read_bytes().startswith(first)
    assert sorted(r["id"] for r in read_jsonl(path)) == ["t0", "t1", "t2", "t3"]
    assert "all summaries are there" in generate(finished_run).stdout
    assert "all summaries are there" not in again.stdout
    longest = max(r["n_prompt_tokens"] for r in read_jsonl(path))
    generate(finished_run, "--max-prompt-tokens", longest - 2)
    assert [r["n_cut_tokens"] for r in read_jsonl(path)[4:]] == [2, 0, 0, 0]


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


def test_an_adapter_that_is_not_there(finished_run):
    line = one_error_line(run_stage("eval.merge_adapter", finished_run, code=1))
    assert "no adapter in" in line and "just train" in line
