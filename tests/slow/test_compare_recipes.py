"""The comparison is like for like, scores no stale answers, and says how sure it is.

The other stages' command lines are noted and answered by small stand-ins on disk.
"""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from conftest import one_error_line, read_jsonl, run_stage, write_jsonl
from safetensors.torch import load_file, save_file

from common.cli import UserError
from common.files import mark_made
from eval import compare_recipes
from eval.compare_recipes import RECIPES, steps_of
from training.config import Overlay, load_methods, load_run_config, resolve_config

pytestmark = pytest.mark.slow

OF_A_RUN = {"seed", "output_dir", "dataset_prepared_path", "datasets", "lora_model_dir", "plugins"}
TEXTS = {"teacher": range(6), "student": range(1, 8), "previous": range(4)}  # that have pairs
ROUNDS = ("sft", "sft+sft-then-dpo@previous", "sft+sft-then-dpo@previous+sft-then-dpo@previous")


class Scorer:
    """In the place of BERTScore: every answer is worth its number of words."""

    def __init__(self, *options):
        self.scorer, self.baseline = SimpleNamespace(hash="words"), None

    def __call__(self, answers, rows):
        return {"bertscore_f1": [float(len(answer.split())) for answer in answers]}


class Stages:
    """What a comparison asks of other stages; `data`, `outputs` are made as they would make them.

    Every training gives the adapter in `adapter`.
    """

    def __init__(self, folder, adapter):
        self.folder, self.adapter, self.asked, self.second = folder, adapter, [], "Ice, again."

    def __call__(self, command):
        module, *options = command[2:]
        self.asked.append((module, *options))
        getattr(self, module.split(".")[-1])(options)
        return subprocess.CompletedProcess(command, 0)

    def of(self, module):
        return [" ".join(options) for name, *options in self.asked if name == module]

    def answer_texts(self, options):
        pass

    def build_pairs(self, options):
        rejected = value(options, "--rejected")
        texts = TEXTS.get(rejected, TEXTS["previous"])
        folder = self.folder / f"data/{value(options, '--task')}/pairs-{value(options, '--name')}"
        write_jsonl(folder / "train.jsonl", [{"id": f"t{i}", "by": rejected} for i in texts])

    def build_dataset(self, options):
        data, name = self.folder / f"data/{value(options, '--task')}", value(options, "--name")
        rows = [
            {"id": f"e{i}", "prompt": say(f"Ice floats. {i}"), "chosen": say("Ice.")}
            for i in range(4)
        ]
        rows = [row | {"rejected": say(self.second)} for row in rows]
        write_jsonl(data / f"hub-{name}/test.jsonl", rows)

    def train_adapter(self, options):
        run = self.folder / "outputs" / value(options, "--name")
        if not run.exists():
            shutil.copytree(self.adapter, run)
            mark_made(run / "inputs", {"task": value(options, "--task")})
            mark_made(run, {"task": value(options, "--task")})  # it ended
        settings = resolved(options).settings
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        (run / "train.log").write_text("{'train_runtime': '7.25', 'epoch': 1}\n")


def say(text):
    return [{"role": "user", "content": text}]


def value(options, name):
    return options[options.index(name) + 1]


def resolved(options):
    """What a train command would train."""
    keys = tuple(key for key in options[options.index("--set") + 1 :] if "=" in key)
    method, run = value(options, "--method"), value(options, "--name")
    return resolve_config(options[0], Overlay(method=method, run=run, keys=keys))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_qwen2):
    """An untrained adapter of the tiny student."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "run"
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def compare(tmp_path, tiny_qwen2, adapter, monkeypatch):
    """Run a comparison of a tiny student in an empty folder; `.stages` notes what it asks for."""
    shutil.copytree("axolotl_configs", tmp_path / "axolotl_configs")
    path = tmp_path / "axolotl_configs/smollm2-135m-dpo-sft-lora.yaml"
    settings = yaml.safe_load(path.read_text()) | {"base_model": str(tiny_qwen2)}
    (tmp_path / "axolotl_configs/tiny-lora.yaml").write_text(yaml.safe_dump(settings))
    stages = Stages(tmp_path, adapter)
    monkeypatch.setattr(compare_recipes.subprocess, "run", stages)
    monkeypatch.setattr("eval.score_answers.commit", lambda: "abc1234")
    monkeypatch.setattr("eval.score_answers.BertScore", Scorer)
    monkeypatch.setattr("eval.score_answers.is_entailment_model", lambda encoder: False)

    def run(*options, code=0):
        arguments = ("tiny-lora", "--seeds", 42, "--max-new-tokens", 8, *options)
        return run_stage("eval.compare_recipes", *arguments, cwd=tmp_path, code=code)

    run.stages, run.folder = stages, tmp_path
    return run


def test_every_recipe_sees_the_same_texts_and_differs_in_its_method_alone(compare):
    """The same examples, passes, lengths, precision of the adapter; nothing dropped (B4)."""
    compare()
    trainings = {value(o, "--name"): list(o) for m, *o in compare.stages.asked if "train" in m}
    assert len(trainings) == 7 and len(compare.stages.of("training.train_adapter")) == 10
    base = load_run_config("axolotl_configs/smollm2-135m-dpo-sft-lora.yaml").settings
    of_methods = {key for method in load_methods().values() for key in method}
    for name, options in trainings.items():
        settings = resolved_in(compare.folder, options)
        changed = {k for k in settings | base if settings.get(k) != base.get(k)}
        assert changed <= OF_A_RUN | of_methods | {"learning_rate", "base_model"}
        assert not {"num_epochs", "sequence_len", "max_steps"} & changed
        first = ["training.plugins.FirstAdapter"] if "lora_model_dir" in settings else []
        assert settings["plugins"] == [*base["plugins"], *first]
        assert settings["excess_length_strategy"] == "raise" and settings["seed"] == 42
        assert "--cpu" in options and name.startswith("compare/tiny-lora-")
        hub = settings["datasets"][0]["path"]
        pairs = read_jsonl(compare.folder / hub.replace("/hub-", "/pairs-") / "train.jsonl")
        ids = [pair["id"] for pair in pairs]
        assert ids == (["t1", "t2", "t3"] if "previous" in name else [f"t{i}" for i in range(1, 6)])
    assert {pair["by"] for pair in pairs} == {"compare/tiny-lora-sft-sft-then-dpo-previous-42"}
    said = (compare.folder / "results/recipes.md").read_text()
    assert "5 training texts, the same for all (rounds lacked 2, 2, 2 of them)" in said


def resolved_in(folder, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return resolved(options).settings


def test_a_round_goes_on_from_the_run_whose_answers_it_rejects(compare):
    compare("--recipes", *ROUNDS[2:], "--seeds", 7)
    first, second = "compare/tiny-lora-sft", "compare/tiny-lora-sft-sft-then-dpo-previous"
    answers = compare.stages.of("eval.answer_texts")
    common = "--split train --systems {} --max-new-tokens 8 --task summarize"
    for run, command in zip((first, second), answers, strict=True):
        assert command.startswith(f"{run}-7 {common.format('tuned')}")
    sft, one, two = compare.stages.of("training.train_adapter")
    assert "lora_model_dir" not in sft and "hub-compare-tiny-lora-none" in sft
    assert f"lora_model_dir=outputs/{first}-7" in one and "--method sft-then-dpo" in one
    assert f"lora_model_dir=outputs/{second}-7" in two
    assert "hub-compare-tiny-lora-sft-sft-then-dpo-previous-7" in two


def test_options_reach_every_training_and_keys_of_a_recipe_its_own(compare):
    recipes = ("sft", "ipo@student:rl_beta=0.3:warmup_ratio=0.2")
    compare("--recipes", *recipes, "--set", "num_epochs=2", "--examples", 2)
    sft, ipo = (o for m, *o in compare.stages.asked if m == "training.train_adapter")
    assert value(sft, "--name") == "compare/tiny-lora-num_epochs=2-sft-42"
    assert "rl_beta=0.3" in ipo and "warmup_ratio=0.2" in ipo and "rl_beta=0.3" not in sft
    assert resolved_in(compare.folder, ipo)["num_epochs"] == 2
    said = (compare.folder / "results/recipes.md").read_text()
    assert "2 training texts" in said and f"| {recipes[1]}" in said
    assert "DPO+SFT" not in said and f"{recipes[1]} minus SFT" in said


def test_another_base_by_a_key_is_that_of_all_systems(compare, tiny_qwen2):
    """The rejected answers and the instructed base's are of the base that is trained."""
    path = compare.folder / "axolotl_configs/tiny-lora.yaml"
    path.write_text(path.read_text().replace(str(tiny_qwen2), "elsewhere"))
    compare("--recipes", "dpo-sft@student", "--set", f"base_model={tiny_qwen2}")
    (answers,) = compare.stages.of("eval.answer_texts")
    run = compare.folder / "outputs" / answers.split()[0]
    assert load_run_config(run / "config.yaml").base_model == str(tiny_qwen2)
    record = read_jsonl(run / "eval/answers/instructed.jsonl")[0]
    assert record["settings"]["model"] == str(tiny_qwen2)
    (pairs,) = (list(o) for m, *o in compare.stages.asked if m == "data_prep.build_pairs")
    assert value(pairs, "--student") == answers.split()[0]
    assert value(pairs, "--tokenizer") == str(tiny_qwen2)


def test_the_table_holds_all_that_was_asked_with_its_caveats(compare):
    said = compare("--recipes", "sft", "dpo-sft@student", "--seeds", 1, 2, "--n", 3).stdout
    text = (compare.folder / "results/recipes.md").read_text()
    assert text in said and "n = 3 held-out texts" in text and "commit abc1234" in text
    for part in (
        "independent",
        "picked on these same texts",
        "F1 by seed",
        "length ratio",
        "density",
    ):
        assert part in text
    for name in ("base, bare text", "base, instructed to summarize", "the teacher's second answer"):
        assert f"| {name}" in text and f"DPO+SFT against the student minus {name}" in text
    sft = next(line for line in text.splitlines() if line.startswith("| SFT "))
    assert sft.split("|")[-2].strip() == "7"  # seconds of training
    assert (compare.folder / "results/recipes.png").read_bytes()[:4] == b"\x89PNG"
    ledger = pd.read_csv(compare.folder / "results/ledger.csv")
    assert list(ledger) == list(pd.read_csv("results/ledger.csv"))
    assert len(ledger) == 2 * 6 and set(ledger["n"]) == {3} and set(ledger["encoder"]) == {"words"}


def test_a_row_of_second_answers_stands_where_there_are_any(compare):
    compare.stages.second = ""
    said = compare("--recipes", "sft", "--output", "small").stdout
    assert "second answer" not in said and (compare.folder / "results/small.md").exists()
    assert "SFT minus base, bare text" in said  # with no preference recipe, the best there is


def test_another_task_has_runs_data_and_a_table_of_its_own(compare):
    compare("--task", "title", "--recipes", "sft")
    (pairs,) = compare.stages.of("data_prep.build_pairs")
    assert "--rejected none" in pairs and not compare.stages.of("eval.answer_texts")
    path = compare.folder / "outputs/title-compare/tiny-lora/eval/scores.json"
    assert json.loads(path.read_text())["settings"]["task"] == "title"
    assert (compare.folder / "outputs/title-compare/tiny-lora-sft-42").exists()
    assert "base, instructed to title" in (compare.folder / "results/recipes-title.md").read_text()


def test_a_teacher_of_one_answer_has_no_pairs_of_its_own(compare):
    compare("--task", "title")
    assert not any("teacher" in command for command in compare.stages.of("data_prep.build_pairs"))


def test_after_a_retraining_the_old_answers_are_not_scored(compare):
    """And what is answered is not answered again (B2)."""
    run = compare.folder / "outputs/compare/tiny-lora-sft-42"
    path = run / "eval/answers/tuned.jsonl"
    for _ in range(2):
        compare("--recipes", "sft")
    assert len(read_jsonl(path)) == 4
    weights = load_file(run / "adapter_model.safetensors")
    torch.manual_seed(1)
    weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in weights.items()}
    save_file(weights, run / "adapter_model.safetensors")
    compare("--recipes", "sft")
    records = read_jsonl(path)
    assert len(records) == 8 and len({r["settings"]["fingerprint"] for r in records}) == 2


def test_a_stage_that_fails_stops_the_comparison(compare, monkeypatch):
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(compare_recipes.subprocess, "run", lambda command: failed)
    line = one_error_line(compare("--recipes", "sft", code=1))
    assert (
        "python -m data_prep.build_pairs --name compare-tiny-lora-none" in line and "failed" in line
    )


def test_a_recipe_is_read_or_named():
    assert steps_of("sft") == [("sft", "", "")]
    assert steps_of("sft+ipo@previous:rl_beta=0.3") == [
        ("sft", "", ""),
        ("ipo", "previous", "rl_beta=0.3"),
    ]
    assert all(steps_of(recipe) for recipe in RECIPES)
    for faulty in ("dpo@nobody", "dpo@", "sft+"):
        with pytest.raises(UserError, match="METHOD@REJECTED"):
            steps_of(faulty)
