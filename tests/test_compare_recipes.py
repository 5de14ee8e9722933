"""The comparison is like for like, scores no stale summaries, and says how sure it is."""

import shutil
import subprocess
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from conftest import read_jsonl, run_stage
from datasets import Dataset
from safetensors.torch import load_file, save_file

from data_prep.build_dataset import to_row, to_sft_row
from eval import compare_recipes
from training.resolve_config import load_methods, resolve_config
from training.run_config import load_run_config

pytestmark = pytest.mark.slow

COMPARE = "eval.compare_recipes"
SECONDS = 1.0
OF_A_RUN = {"seed", "output_dir", "dataset_prepared_path", "datasets", "lora_model_dir"}


class Scorer:
    """In the place of BERTScore: every text is worth its number of words."""

    scorer = SimpleNamespace(hash="words")
    scored: ClassVar[list] = []

    def __init__(self, *options):
        pass

    def __call__(self, texts, references):
        Scorer.scored.append(texts)
        return [None, None, [float(len(text.split())) for text in texts]]


def resolved(command: list[str]):
    """What the train command of a comparison would train, and its options for accelerate."""
    config, rest = command[3], command[4:]
    keys = rest[rest.index("--set") + 1 :]
    keys, options = [k for k in keys if "=" in k], [k for k in keys if "=" not in k]
    method, name = (rest[rest.index(option) + 1] for option in ("--method", "--name"))
    return resolve_config(config, method, keys, None, name), options


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """[(config, options for accelerate)] of all trainings asked for; none is carried out."""
    asked = []

    def note(command):
        config, options = resolved(command)
        asked.append((config, options))
        folder = tmp_path / config.output_dir
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.settings))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare_recipes.subprocess, "run", note)
    return asked


@pytest.mark.parametrize("name", ["qwen2-1.5b-dpo-sft-qlora", "smollm2-135m-dpo-sft-lora"])
def test_recipes_differ_in_their_method_alone(trainings, monkeypatch, tmp_path, name):
    """The same examples, passes, lengths, precision of the adapter; nothing dropped (B4)."""
    shutil.copytree("axolotl_configs", tmp_path / "axolotl_configs")
    monkeypatch.chdir(tmp_path)
    base = load_run_config(name, trained=False)
    for recipe in compare_recipes.RECIPES:
        compare_recipes.train_recipe(base, recipe, 43)
    of_methods = {key for method in load_methods().values() for key in method}
    assert len(trainings) == 7 and len({config.name for config, _ in trainings}) == 7
    for config, options in trainings:
        settings = config.settings
        changed = {
            k
            for k in settings.keys() | base.settings.keys()
            if settings.get(k) != base.settings.get(k)
        }
        assert changed <= OF_A_RUN | of_methods | {"learning_rate"}
        assert settings["excess_length_strategy"] == "raise" and settings["seed"] == 43
        assert not {"num_epochs", "sequence_len", "plugins", "max_steps"} & changed
        assert ("--cpu" in options) == (not settings["bf16"])
    parts = {config.name: config.settings["datasets"][0]["split"] for config, _ in trainings}
    halves = [part for run, part in parts.items() if "half" in run]
    assert halves == ["train[:50%]", "train[50%:]"]
    assert {part for run, part in parts.items() if "half" not in run} == {"train"}
    after = next(c for c, _ in trainings if c.first_adapter)
    assert after.first_adapter == f"outputs/compare/{name}-sft-half-43"


@pytest.fixture
def comparison(finished_run, tiny_qwen2, monkeypatch, tmp_path):
    """Run a comparison whose one recipe "trains" the model that lies in the folder it returns."""
    run = tmp_path / "outputs/compare/run-sft-42"
    shutil.copytree(tiny_qwen2, run)
    trained = compare_recipes.RunConfig(finished_run, {"output_dir": str(run)})
    monkeypatch.setattr(compare_recipes, "train_recipe", lambda *_: (trained, SECONDS))
    monkeypatch.setattr(compare_recipes, "BertScore", Scorer)
    monkeypatch.setattr(Scorer, "scored", [])

    def compare(*options):
        Scorer.scored.clear()
        arguments = (finished_run, "--recipes", "SFT", "--seeds", 42, "--output", "results")
        return run_stage(COMPARE, *arguments, *options, cwd=tmp_path)

    return compare, run


def test_after_a_retraining_the_old_summaries_are_not_scored(comparison):
    compare, run = comparison
    compare()
    first = list(Scorer.scored[-1])
    compare()
    path = run.parent / "answers/run-sft-42.jsonl"
    assert Scorer.scored[-1] == first and len(read_jsonl(path)) == 4  # nothing is done twice
    weights = load_file(run / "model.safetensors")
    torch.manual_seed(1)
    weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in weights.items()}
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    compare()
    records = read_jsonl(path)
    assert len(records) == 8 and len({r["settings"]["fingerprint"] for r in records}) == 2
    assert Scorer.scored[-1] == [r["text"] for r in sorted(records[4:], key=lambda r: r["id"])]
    assert Scorer.scored[-1] != first


def test_answers_are_as_long_as_the_references_and_texts_as_long_as_the_context(
    comparison, tiny_qwen2
):
    from transformers import AutoTokenizer

    compare, run = comparison
    said = compare().stdout
    longest = len(AutoTokenizer.from_pretrained(tiny_qwen2)("Ice.").input_ids)
    settings = read_jsonl(run.parent / "answers/run-sft-42.jsonl")[0]["settings"]
    assert settings["max_new_tokens"] == longest + 1
    assert settings["max_prompt_tokens"] == 4096 - longest - 1
    assert "are cut" not in said
    assert "documents are cut to 60 prompt tokens" in compare("--max-prompt-tokens", 60).stdout


def test_the_table_says_what_its_intervals_take_for_granted(comparison):
    compare, run = comparison
    compare("--n", 3)
    results = run.parents[2] / "results"
    table = (results / "recipes.md").read_text()
    assert "independent" in table and "picked on these same texts" in table
    assert "n = 3 held-out texts" in table and "| SFT" in table and "SFT minus" in table
    assert (results / "recipes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_recipe_in_earnest(finished_run, tiny_qwen2, monkeypatch, tmp_path):
    """One recipe of two real steps: trained, answered by its adapter, scored; then kept."""
    pair = {"source": "s", "url": "u", "chosen": "Ice.", "rejected": "Water.", "teacher": "t"}
    pair |= {"chosen_position": 1, "ratings": [9, 5], "prompt_sha": "p"}
    pairs = [pair | {"id": str(i), "prompt": f"Ice floats. {i}"} for i in range(4)]
    (tmp_path / "hub/test.jsonl").rename(tmp_path / "test.jsonl")
    test = Dataset.from_json(str(tmp_path / "test.jsonl"))
    parts = {"train": [to_row(p, "train") for p in pairs], "sft": [to_sft_row(p) for p in pairs]}
    for name, rows in parts.items():
        Dataset.from_list(rows).to_parquet(tmp_path / f"hub/{name}.parquet")
    test.to_parquet(tmp_path / "hub/test.parquet")
    files = [{"split": "train", "path": "train.parquet"}, {"split": "test", "path": "test.parquet"}]
    card = [
        {"config_name": "default", "data_files": files, "default": True},
        {"config_name": "sft", "data_files": [{"split": "train", "path": "sft.parquet"}]},
    ]
    (tmp_path / "hub/README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")
    settings = load_run_config("smollm2-135m-dpo-sft-lora", trained=False).settings
    settings["datasets"][0]["path"] = str(tmp_path / "hub")
    settings |= {"base_model": str(tiny_qwen2), "output_dir": "outputs/tiny", "lora_r": 4}
    finished_run.write_text(yaml.safe_dump(settings))
    shutil.copytree("axolotl_configs", tmp_path / "axolotl_configs")
    monkeypatch.setattr(compare_recipes, "BertScore", Scorer)
    arguments = (finished_run, "--recipes", "ORPO", "--seeds", 42, "--output", "results")
    for _ in range(2):
        run_stage(COMPARE, *arguments, cwd=tmp_path)
    runs = tmp_path / "outputs/compare"
    assert (runs / "run-orpo-42/adapter_model.safetensors").is_file()
    assert len(read_jsonl(runs / "answers/run-orpo-42.jsonl")) == 4
    assert "ORPO" in (tmp_path / "results/recipes.md").read_text()
