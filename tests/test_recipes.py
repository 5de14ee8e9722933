"""Recipes are read, named and set side by side."""

import numpy as np
import pandas as pd
import pytest
from conftest import run_stage

from common.cli import UserError
from eval.compare_recipes import (
    DEFAULTS,
    TITLES,
    Step,
    by_seed,
    difference_table,
    inside,
    score_table,
    seconds_of,
    steps_of,
    title_of,
)


def test_a_recipe_is_read_or_named():
    assert steps_of("sft") == [Step("sft")]
    assert steps_of("sft+ipo@previous:rl_beta=0.3:seed=1") == [
        Step("sft"),
        Step("ipo", ("previous",), ("rl_beta=0.3", "seed=1")),
    ]
    both = steps_of("sft+sft-then-dpo@corrupted,samples:learning_rate=1e-4")[1]
    assert both.kinds == ("corrupted", "samples")
    assert both.name == "sft-then-dpo-corrupted_samples-learning_rate=1e_4"
    assert all(steps_of(recipe) for recipe in TITLES) and set(DEFAULTS) <= set(TITLES)
    for faulty in ("dpo@nobody", "dpo@", "sft+", "dpo@teacher,nobody", "dpo@,teacher"):
        with pytest.raises(UserError, match="METHOD@KINDS"):
            steps_of(faulty)
    with pytest.raises(UserError, match="needs a training before it"):
        steps_of("dpo@samples")


def test_a_faulty_recipe_ends_before_anything_is_done(tmp_path):
    said = run_stage("eval.compare_recipes", "--recipes", "dpo@me", cwd=tmp_path, code=1).stderr
    assert "no recipe dpo@me" in said and not list(tmp_path.iterdir())
    twice = ("--recipes", "sft:seed=1", "sft", "sft:seed=1")
    said = run_stage("eval.compare_recipes", *twice, cwd=tmp_path, code=1).stderr
    assert "two recipes would both be called" in said and not list(tmp_path.iterdir())


def test_an_option_that_nothing_reads_is_none():
    """A comparison asks no endpoint, so it takes no budget."""
    said = run_stage("eval.compare_recipes", "--budget-usd", "3", code=2).stderr
    assert "unrecognized arguments: --budget-usd" in said


def test_a_recipe_with_keys_of_its_own_says_so_in_its_title():
    assert title_of("sft+sft-then-dpo@samples") == "SFT, then DPO on its samples"
    keyed = "sft+sft-then-dpo@samples:learning_rate=1e-4:rl_beta=0.2"
    assert title_of(keyed) == "SFT, then DPO on its samples (learning_rate=1e-4, rl_beta=0.2)"
    assert title_of("ipo@student") == "ipo@student"
    keyed = "sft:learning_rate=1e-4+sft-then-dpo@samples:rl_beta=0.2"
    assert title_of(keyed) == "SFT, then DPO on its samples (sft learning_rate=1e-4, rl_beta=0.2)"


def test_pairs_of_other_texts_than_the_shared_ones_stay():
    pairs = [{"id": "a"}, {"id": "b"}, {"id": "c", "kind": "corrupted"}]
    pairs += [{"id": "d", "kind": "samples"}, {"id": "e", "kind": "choices"}]
    assert [pair["id"] for pair in inside(pairs, frozenset("a"))] == ["a", "d", "e"]


def test_the_seconds_of_a_training_that_was_resumed_are_not_known():
    assert seconds_of("{'train_runtime': '7.25', 'epoch': 1}\n") == 7.25
    assert np.isnan(seconds_of("Using auto-resume\n{'train_runtime': 7.25}\n"))
    assert np.isnan(seconds_of(""))


def scores_of(**systems: tuple[float, float]) -> pd.DataFrame:
    """Of two seeds and three texts: F1 and invented of each system."""
    frames = {}
    for name, (f1, invented) in systems.items():
        for seed in (1, 2):
            values = pd.DataFrame({"bertscore_f1": [f1] * 3, "invented": [invented] * 3}, [*"abc"])
            values = values.assign(words=20.0, length_ratio=1.1, pairs=90.0 + seed)
            frames[name, seed] = values.assign(training_seconds=np.nan if f1 < 0.5 else 60.0)
    return pd.concat(frames, names=["system", "seed", "text"]).sort_index()


def test_every_recipe_stands_against_the_first_and_the_best_against_the_untrained():
    scores = scores_of(sft=(0.6, 0.1), lead=(0.4, 0.0), dpo=(0.7, 0.02), orpo=(0.5, 0.1))
    order = ["dpo", "sft", "orpo", "lead"]
    table = difference_table(scores, ["sft", "dpo", "orpo"], order)
    assert list(table.index) == ["dpo minus sft", "orpo minus sft", "dpo minus lead"]
    assert table["answers that invent"].iloc[0] == "-8.0 [-8.0, -8.0] points"
    assert table["BERTScore F1"].iloc[2] == "+0.300 [+0.300, +0.300]"
    alone = difference_table(scores, ["sft"], ["sft", "lead"])
    assert list(alone.index) == ["sft minus lead"]
    table = score_table(scores, order)
    assert table.loc["sft", "answers that invent [95%]"] == "10.0% [10.0%, 10.0%]"
    assert table.loc["sft", "training seconds"] == "60" and table.loc["lead"].iloc[-1] == ""
    assert table.loc["sft", "pairs"] == "91, 92" and table.loc["sft", "F1 by seed"] == "0.600"


def test_what_is_the_same_for_all_seeds_stands_once():
    assert by_seed(pd.Series([184.0, 184.0]), "{:.0f}") == "184"
    assert by_seed(pd.Series([np.nan]), "{:.0f}") == ""
