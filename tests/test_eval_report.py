"""Figures, sentences, tables and pictures of an evaluation, of scores written by hand."""

import numpy as np
import pandas as pd
import pytest

from common.stats import paired_bootstrap
from eval.answer_texts import first_words
from eval.conclusion import conclude, conclusions, headlines
from eval.measures import (
    CHIEF,
    COMPARED,
    COUNTS,
    FIGURES,
    MEASURES,
    extractiveness,
    inventions,
    linearize_shares,
)
from eval.report import glossary, judge_rows, source_table, table, tables
from eval.report_page import gain_picture, invented_places, page_texts
from eval.score_answers import differences_without_cut
from prompts.task import cut_to_words, load_task

BETTER, UNCLEAR, WORSE = (0.17, 0.12, 0.22), (0.01, -0.02, 0.04), (-0.1, -0.2, -0.01)


def scores_of(n: int = 64, figure: str = "bertscore_f1", **gains: tuple) -> dict:
    """Scores of the tuned system and the gains of its figure over others."""
    systems = {name: {figure: 0.5} for name in ("tuned", *gains)}
    differences = {other: {figure: gain} for other, gain in gains.items()}
    return {"target": "tuned", "n": n, "systems": systems, "differences": differences}


def said(task: str = "title", figure: str = "bertscore_f1", n: int = 64, **gains: tuple) -> str:
    return conclude(scores_of(n, figure, **gains), FIGURES[figure], load_task(task))


def test_the_conclusion_tells_better_from_unclear_and_worse():
    assert said(instructed=BETTER) == (
        "The titles of the tuned adapter are nearer to the teacher's than those of the base, "
        "instructed to title (+0.170 [+0.120, +0.220]): "
        "BERTScore F1 on 64 held-out texts, 95% intervals over texts."
    )
    text = said("summarize", lead=UNCLEAR, n=1)
    assert "show no clear difference from those of the text's first sentences (+0.010" in text
    assert "on 1 held-out text," in text and "nearer" not in text and "worse" not in text
    assert "adapter are worse than those of the base, bare text (-0.1" in said(base=WORSE)
    text = said(base=BETTER, lead=WORSE, instructed=UNCLEAR, **{"models/other": BETTER})
    assert text.index("nearer") < text.index("no clear difference") < text.index("; are worse")
    assert "[+0.120, +0.220]) and models/other (+0.170" in text
    assert "no clear difference" in said(base=(0.1, 0.0, 0.2))
    assert "stand alone: BERTScore F1" in said()
    assert "are longer than those" in said(figure="words", base=BETTER)
    assert "are less true than those" in said(figure="faithfulness", base=WORSE)


def test_of_what_is_invented_less_is_better_and_it_has_a_sentence_of_its_own():
    text = said("summarize", "invented", base=BETTER, lead=WORSE)
    assert text.index("invent less than those of the text's") < text.index("; invent more than")
    assert "(-10.0 [-20.0, -1.0] points)" in text
    scores = scores_of(base=BETTER)
    scores["systems"]["tuned"]["invented"] = 0.02
    scores["differences"]["base"]["invented"] = WORSE
    assert [figure.name for figure in headlines(scores)] == ["bertscore_f1", "invented"]
    likeness, truth = conclusions(scores, load_task())
    assert "nearer to the teacher's" in likeness and "invent less than" in truth


def test_every_figure_says_what_it_is_and_no_two_are_called_alike():
    titles = [figure.title for figure in FIGURES.values()]
    assert len(set(titles)) == len(titles) == sum(len(m.figures) for m in MEASURES) + len(COUNTS)
    assert all(figure.says and not figure.says.endswith(".") for figure in FIGURES.values())
    assert set(COMPARED) <= set(CHIEF)
    assert all((m.function is None) != (m.load is None) for m in MEASURES)
    assert all(figure.per in FIGURES for figure in FIGURES.values() if figure.per)


def test_a_small_n_is_said_and_the_chief_figures_are_explained():
    values = {"bertscore_f1": 0.3, "rouge_l": 0.4, "words": 51.26, "empty": 2, "invented": 0.25}
    gains = {"bertscore_f1": (0.1, 0.0, 0.2), "rouge_l": (0, 0, 0), "invented": (-0.05, -0.1, 0)}
    scores = {"n": 8, "target": "tuned", "systems": {"base": values, "tuned": values}}
    scores["differences"] = {"base": gains}
    text = table(scores, load_task("title"))
    assert "+0.100 [+0.000, +0.200]" in text and "| tuned adapter minus base, bare text |" in text
    assert "51.3" in text and "0.300" in text and "under 30" in text
    assert "25.0%" in text and "-5.0 [-10.0, +0.0] points" in text
    assert f"{FIGURES['invented'].title}: {FIGURES['invented'].says}" in text
    assert "answers without a word" not in text  # no chief figure
    assert "under 30" not in table({**scores, "n": 30}, load_task())
    assert ("empty", "answers without a word") in glossary(values)
    assert "empty" in tables(scores, load_task())[2]


def test_the_tables_tell_what_was_cut_and_what_the_teacher_did():
    values = {"rouge_l": 0.4, "words": 20.0, "invented": 0.25, "stopped_at_limit": 3, "empty": 1}
    scores = {"n": 40, "target": "tuned", "systems": {"instructed": values, "tuned": values}}
    gains = {"rouge_l": (0.05, 0.01, 0.09)}
    scores |= {"differences": {"instructed": gains}, "reference": {"words": 9.0, "invented": 0.01}}
    scores["without_cut"] = {"instructed": {"n": 37, "differences": {"rouge_l": BETTER}}}
    chief, _, others, _ = tables(scores, load_task())
    assert chief["cut"].tolist() == ["3 of 40", "3 of 40", ""]
    assert chief.loc["teacher (the references)"].tolist() == ["", "1.0%", "9.0", "", 40]
    assert others["empty"].tolist()[:2] == ["1 of 40", "1 of 40"]
    line = "tuned adapter minus base, instructed to summarize, without the 3 texts where one was "
    line += "cut, n = 37: ROUGE-L +0.170 [+0.120, +0.220].\n"
    assert f"\n- {line}" in table(scores, load_task())
    scores["without_cut"]["instructed"] = {"n": 0, "differences": {}}
    assert "40 texts where one was cut, n = 0: too few to tell." in table(scores, load_task())


def test_differences_without_cut_answers_are_of_texts_where_neither_was_cut():
    tuned = pd.DataFrame({"rouge_l": [0.5] * 20, "words": [9.0] * 20})
    values = {"tuned": tuned, "base": tuned - 0.1, "lead": tuned}
    none = np.zeros(20, bool)
    one, many = none.copy(), none.copy()
    one[0], many[:8] = True, True
    found = differences_without_cut("tuned", values, {"tuned": one, "base": many, "lead": none})
    assert set(found) == {"base"} and found["base"]["n"] == 12  # one in twenty is few
    assert found["base"]["differences"] == {"rouge_l": pytest.approx((0.1, 0.1, 0.1))}
    cut = {"tuned": many, "base": ~many, "lead": none}
    found = differences_without_cut("tuned", values, cut)
    assert found["base"] == {"n": 0, "differences": {}} and found["lead"]["n"] == 12


def test_a_system_may_be_cut_to_its_first_words():
    assert cut_to_words("instructed:12-words") == ("instructed", 12)
    assert cut_to_words("endpoint:a/b:3-words") == ("endpoint:a/b", 3)
    for name in ("endpoint:12-words-b", f"base:{'1' * 5000}-words"):
        assert cut_to_words(name) == (name, None)
    title = load_task("title").title("instructed:12-words")
    assert title == "base, instructed to title, cut to 12 words"
    record = {"text": "Ice floats\non water.", "finish_reason": "length"}
    assert first_words(record, 3) == {"text": "Ice floats on", "finish_reason": "stop"}
    assert first_words(record, 4) == record


def test_inventions_are_counted_by_answer_and_by_fact():
    rows = [{"text": "In 1903 Anna Weber saw Rome."}] * 3
    answers = ["In 1904 she, Anna Weber, saw Bonn.", "It was Rome.", ""]
    found = inventions(answers, rows)
    assert found["invented"] == [1, 0, 0] and found["invented_facts"] == [2, 0, 0]
    assert found["facts"] == [4, 1, 0]
    means = linearize_shares(pd.DataFrame(found)).mean()
    assert means["invented"] == pytest.approx(1 / 3)
    assert means["invented_facts"] == pytest.approx(2 / 5)  # of all facts
    assert linearize_shares(pd.DataFrame(inventions([""], rows[:1]))).mean().tolist() == [0, 0, 0]


def test_the_interval_of_a_share_of_all_is_that_of_resampled_ratios():
    draw = np.random.default_rng(1)
    facts = draw.integers(1, 8, 300).astype(float)
    invented = draw.binomial(facts.astype(int), 0.1).astype(float)
    frame = pd.DataFrame({"facts": facts, "invented_facts": invented})
    mean, low, high = paired_bootstrap(linearize_shares(frame)["invented_facts"], 0)
    places = draw.integers(0, 300, (2000, 300))
    ratios = invented[places].sum(axis=1) / facts[places].sum(axis=1)
    assert mean == pytest.approx(invented.sum() / facts.sum())
    assert (low, high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=3e-3)


def test_extractiveness_of_an_empty_answer_is_nothing():
    assert extractiveness([""], [{"text": "Ice floats."}]) == {"coverage": [0], "density": [0]}


def test_sources_with_enough_texts_have_a_line_each():
    n = 24
    names = ["arxiv"] * 12 + ["wikipedia"] * 10 + ["own"] * 2
    rows = [{"source": name} for name in names]
    tuned = {"bertscore_f1": [0.6] * 12 + [0.8] * 12, "invented": [1.0] * 6 + [0.0] * 18}
    scores = {"target": "tuned", "n": n, "differences": {}, "systems": {"tuned": tuned}}
    scores["per_text"] = {"tuned": tuned, "base": {**tuned, "bertscore_f1": [0.5] * n}}
    frame = source_table(scores, rows, load_task())
    assert list(frame.index) == ["arxiv", "wikipedia"] and frame["n"].tolist() == ["12", "10"]
    assert frame["BERTScore F1"].tolist() == ["0.600", "0.800"]
    assert frame[FIGURES["invented"].title].tolist() == ["50.0%", "0.0%"]
    gains = frame["BERTScore F1 minus base, bare text"]
    assert gains.tolist() == ["+0.100 [+0.100, +0.100]", "+0.300 [+0.300, +0.300]"]
    assert source_table(scores, [{"source": "own"}] * n, load_task()) is None


def test_the_picture_holds_all_intervals_and_says_its_sides():
    picture = gain_picture(scores_of(base=WORSE, lead=BETTER), FIGURES["invented"], load_task())
    assert picture is None  # of another figure
    picture = gain_picture(scores_of(base=WORSE, lead=BETTER), FIGURES["bertscore_f1"], load_task())
    worse, better = picture.bars
    assert 0 < worse.low < worse.mean < 100 - worse.high_from_right < picture.zero
    assert picture.zero < better.low < better.mean < 100 - better.high_from_right < 100
    assert worse.low == pytest.approx(better.high_from_right, abs=0.02)  # the margins
    assert (picture.left, picture.right) == ("\u2190 worse", "0 \u00b7 better \u2192")
    assert not worse.holds_zero and better.text == "+0.170 [+0.120, +0.220]"
    picture = gain_picture(scores_of(base=BETTER), FIGURES["bertscore_f1"], load_task())
    assert 0 < picture.zero < picture.bars[0].low and picture.left == ""  # 0 is always in it
    (bar,) = gain_picture(
        scores_of(figure="words", base=(0, 0, 0)), FIGURES["words"], load_task()
    ).bars
    assert bar.holds_zero and bar.mean == 50


def test_places_are_those_that_a_browser_counts():
    assert invented_places("\U0001f600 and Weber", "") == [(7, 12)]
    rows = [
        {
            "id": "a",
            "source": "s",
            "text": "It is.",
            "reference": "It was made by Rossi in\r\n1951.",
        }
    ]
    scores = {"target": "tuned", "differences": {}, "systems": {"tuned": {"invented": 1}}}
    scores["per_text"] = {"tuned": {"bertscore_f1": [0.5]}}
    answers = {"tuned": {"a": {"text": "By Weber."}}}
    (one,) = page_texts(scores, rows, answers, FIGURES["bertscore_f1"], load_task())
    assert one.reference.invented_words == ["Rossi", "1951"]
    assert one.reference.invented == [(15, 20), (24, 28)]
    assert one.cells[0].invented_words == ["Weber"] and one.cells[0].is_best


def test_the_judge_stands_beside_what_is_invented():
    verdict = {"n": 4, "win_rate": (0.5, 0.4, 0.6), "first_wins": 0.6, "disagreements": ["a"]}
    scores = {
        "target": "tuned",
        "systems": {"tuned": {"invented": 0.02}, "base": {"invented": 0.2}},
    }
    (line,) = judge_rows({"systems": {"base": verdict}}, scores, load_task())
    assert line[FIGURES["invented"].title] == "2.0% against 20.0%" and line["n"] == "4"
    scores["systems"]["tuned"] = {}
    (line,) = judge_rows({"systems": {"base": verdict}}, scores, load_task())
    assert FIGURES["invented"].title not in line
