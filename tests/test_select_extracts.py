"""Records to extracts: meta, sources, prose, exact token counts, near duplicates, shared runs."""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common.files import share_of
from data_prep import select_extracts
from data_prep.count_tokens import TokenCounter
from data_prep.sample_extracts import draw_documents, parse_options
from data_prep.select_extracts import (
    OWN_TEST_SHARE,
    RUN,
    Duplicates,
    clean_document,
    cut_evenly,
    cut_passages,
    has_prose,
    meta_of,
    select,
)

META = {"arxiv_id": "0704.0001", "language": "en", "url": "https://arxiv.org/abs/0704.0001"}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("shape", [lambda m: m, json.dumps, repr])
def test_meta_in_every_shape_it_is_met_in(shape):
    assert meta_of({"text": "words", "meta": shape(META)}) == META
    assert meta_of({"text": "words", **META}) == META  # no meta at all


@pytest.mark.parametrize(
    "meta",
    [
        '{"url": "u", "language": "de", "redirect": null, "stub": true}',
        "{'url': 'u', 'language': 'de', 'redirect': None, 'stub': True}",
        b'{"url": "u", "language": "de"}',
        [("url", "u"), ("language", "de")],  # a map in Parquet
        {"url": b"u", "language": b"de"},
    ],
)
def test_a_meta_in_any_shape_tells_url_and_language(found, meta):
    assert meta_of({"text": "words", "meta": meta})["url"] == "u"
    assert found({"text": "words", "meta": meta})["dropped"] == "not English"


@pytest.mark.parametrize(
    "meta",
    ["[" * 200_000, "-" * 100_000 + "1", "(" * 5000, "9" * 5000, "1+" * 4000 + "1", "{[]: 1}"],
)
def test_a_meta_that_is_none_ends_nothing(found, meta):
    assert found({"text": "words", "meta": meta})["split"] == "train"
    assert found({"text": "words", "meta": {"url": "http://u", "title": meta}})["url"] == "http://u"


@pytest.mark.parametrize("value", [7, ["u"], {"a": [1]}, "\ud800", float("nan"), True, [[]] * 9])
@pytest.mark.parametrize("field", ["url", "source", "title", "arxiv_id"])
def test_fields_of_odd_types_end_nothing(found, field, value):
    one = found(json.dumps({"text": "words", "meta": {field: value}}).encode())
    assert one["split"] == "train" and isinstance(one["source"], str)


@pytest.mark.parametrize(
    ("language", "is_kept"),
    [(one, True) for one in ("en", "EN", "en-US", "en_GB", "eng", "eng_Latn", "English", " en ")]
    + [(one, True) for one in ("English (UK)", "__label__en", ["en"], [], "", None)]
    + [(one, False) for one in ("de", "enm", "Engadinisch", ["de"], ["en", "de"], "deu_Latn", 7)],
)
def test_english_by_any_of_its_names(found, language, is_kept):
    for record in ({"meta": {"language": language}}, {"language": language, "meta": {"url": "u"}}):
        assert ("dropped" not in found({"text": "words", **record})) == is_kept


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "words", "score": NaN}', "words"),
        (b'{"text": "words", "id": ' + b"9" * 5000 + b"}", "words"),
        (b'{"text": "caf\xe9 words"}', "caf\xe9 words"),  # Windows-1252
        (b'{"text": "\xe6\xbc\xa2 words \xe6\xbc"}', "\u6f22 words \ufffd"),  # a torn character
        (b'\xef\xbb\xbf{"text": "words"}', "words"),
        (b'{"text": "words \\ud83d", "x": "\\ud83d"}', "words \ufffd"),
        (b'\0\0{"text": "words"}\0', "words"),
        ({"text": b"words"}, "words"),
        (b'{"raw_content": "words", "url": "u"}', "words"),  # RedPajama-V2
    ],
)
def test_odd_lines_are_read(found, line, text):
    assert found(line)["text"] == text


def test_an_old_macs_file_is_one_line_of_many_records(monkeypatch):
    monkeypatch.setattr(select_extracts, "load_counter", lambda name: Always())
    options = parse_options(["--min-tokens", "1", "--max-tokens", "9"])
    line = b'{"text": "one"}\r{"text": "two"}\r\r{"text": "three"}\r'
    assert [one["text"] for one in select(line, options)] == ["one", "two", "three"]
    assert select(b"\0" * 99, options) == select(b"\r", options) == []


def splits_of(monkeypatch, texts: list[str], *options: object) -> Counter:
    """How many of these texts, each with a URL of its own, go to which split."""
    counter = type("Counter", (), {"count": lambda self, text, enough: len(text) // 4})()
    monkeypatch.setattr(select_extracts, "load_counter", lambda name: counter)
    parsed = parse_options(list(map(str, options)))
    rows = [{"text": text, "meta": {"url": f"u{i}"}} for i, text in enumerate(texts)]
    return Counter(one.get("split") for row in rows for one in select(row, parsed))


def test_where_windows_overlap_the_id_draws_the_split(monkeypatch):
    long_texts, short_texts = ["words " * 5000] * 300, ["words " * 2000] * 10
    recipe = ("--min-tokens", 1800, "--max-tokens", 15_000)  # of the 16K recipe
    splits = splits_of(monkeypatch, [*long_texts, *short_texts, "words " * 12_000], *recipe)
    assert 60 <= splits["test"] <= 120  # 91 ± 8
    assert splits["test"] + splits["train"] == 311
    default = splits_of(monkeypatch, long_texts + ["words " * 900] * 3)
    assert default == {"test": 300, "train": 3}  # no text is in both of the default windows


def test_own_texts_of_one_url_are_split_one_by_one(monkeypatch):
    counter = type("Counter", (), {"count": lambda self, text, enough: len(text) // 4})()
    monkeypatch.setattr(select_extracts, "load_counter", lambda name: counter)
    options = parse_options(["--max-tokens", "15000"])
    rows = [{"text": f"{i} words " * 3000, "meta": {"url": "http://same"}} for i in range(60)]
    splits = Counter(select(row, options)[0]["split"] for row in rows)
    assert splits["train"] > 30 and splits["test"] > 5


WIKIPEDIA = {"title": "T", "url": "https://en.wikipedia.org/wiki/T"}


class Always:
    """A counter of tokens for which every text is as long as it is wanted."""

    def count(self, text: str, enough: int) -> int:
        return 5


@pytest.fixture
def found(monkeypatch):
    """What `select` makes of a record, in windows that hold any text."""
    monkeypatch.setattr(select_extracts, "load_counter", lambda name: Always())
    options = ["--min-tokens", "1", "--max-tokens", "9", "--source-name", "notes"]
    options = parse_options(options)
    return lambda record: select(record, options)[0]


@pytest.mark.parametrize(
    ("meta", "source"),
    [
        ({**META, "source": "arxiv"}, "arxiv"),
        ({"source": "a long name of a source"}, "a long name of a source"),
        (WIKIPEDIA, "wikipedia"),
        (repr(WIKIPEDIA), "wikipedia"),
        ({"title": "T", "url": "https://example.org/wikipedia.org/T"}, "notes"),
        ({"url": "https://en.wikipedia.org/wiki/T"}, "notes"),
        ({"title": "T"}, "notes"),
        ({}, "notes"),
        ("not a dict", "notes"),
    ],
)
def test_no_source_is_claimed_that_a_record_does_not_tell(found, meta, source):
    assert found({"text": "words", "meta": meta})["source"] == source


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": ""}, "no text"),
        ({"text": " \x00\r\n"}, "no text"),
        ({"text": "mots", "meta": {"language": "fr"}}, "not English"),
        ({"text": "12 34 56"}, "no prose"),
        (b"{", "not JSON with a text"),
        (b'{"text": "\xff"}', "no prose"),
        (b'{"text": "\\ud800"}', "no prose"),
        (b'{"text": NaN}', "not JSON with a text"),
        (b'{"text": ' + b"9" * 9000 + b"}", "not JSON with a text"),
        (b'{"text": ' + b"[" * 100_000, "not JSON with a text"),
        (b"[]", "not JSON with a text"),
        ("7", "not JSON with a text"),
        (b'{"txt": "a"}', "not JSON with a text"),
        ({"text": None}, "not JSON with a text"),
        ({"text": 7, "meta": [7]}, "not JSON with a text"),
    ],
)
def test_what_is_left_out_has_a_reason(found, record, reason):
    assert found(record)["dropped"] == reason


def test_ids_are_stable_and_differ_by_key_not_by_text(found):
    def of(text, url):
        return found({"text": text, "meta": {"url": url}})["id"]

    assert of("words", "u") == of("other words", "u") != of("words", "v")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\rc\td", "a\nb\nc\td"),
        ("a\x00b\x1b\x9f c\x0cd", "ab c\nd"),
        ("Body.\n\nReferences\n\nExternal links\n", "Body."),
        ("Body.\nSee also\nNotes\nReferences\nA.", "Body.\nReferences\nA."),
        ("Body.\n\nReferences\n\nA book.", "Body.\n\nReferences\n\nA book."),
        ("Body.\n== A ==\n\n== B ==\nText.", "Body.\n== B ==\nText."),
        ("Body.\n== A ==\n=== B ===\nText.", "Body.\n== A ==\n=== B ===\nText."),
        ("\\section{A}\n\\section*{B}\nText.", "\\section*{B}\nText."),
        ("\\section{A}\n\\subsection{B}\nText.", "\\section{A}\n\\subsection{B}\nText."),
        ("See also the Notes\nof it.", "See also the Notes\nof it."),
    ],
)
def test_control_characters_and_empty_sections_go(text, cleaned):
    assert clean_document(text) == cleaned


@settings(deadline=None, max_examples=40)
@given(st.text())
def test_cleaning_leaves_no_control_character(text):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", clean_document(text))


SHELL = "\\section{Introduction}\\label{}\n\\input{related.inc}\n\\ifCLASSOPTION\n\\newpage\n\\fi"
TABLE = "\\begin{verbatim}\n" + "O 0.274 words in here 1.149\n" * 99 + "\\end{verbatim}"
PAPER = (
    "\\section{Introduction}\nHadrons in nuclei \\cite{a} are studied at $x^2 = 4$, which % not\n"
    "is to say that we \\emph{fit} $\\alpha$ to the data.\n\\begin{equation}x=y\\end{equation}\n"
)


@pytest.mark.parametrize("text", [SHELL, TABLE, f"{SHELL}\n{TABLE}\nThe end.", "12 34 56 %$ 78"])
def test_shells_without_prose_are_found(text):
    assert not has_prose(text)


@pytest.mark.parametrize(
    "text",
    [
        PAPER,
        "A plain sentence.",
        "Q: `for i in x: print(i)`\n\nA: yes",
        "Es war spät.",
        "Мир и 平和",
    ],
)
def test_prose_is_found(text):
    assert has_prose(text)


paragraphs = st.lists(st.text(alphabet="ab \n", min_size=0, max_size=30), max_size=12)


@settings(deadline=None, max_examples=40)
@given(paragraphs, st.integers(0, 30), st.integers(1, 60))
def test_passages_are_runs_of_whole_paragraphs_inside_the_window(parts, low, high):
    text = "\n\n".join(parts)
    passages = cut_passages(text, len, low, high)
    assert all(low < len(p) < high for p in passages)
    kept = [p for passage in passages for p in passage.split("\n\n")]
    source = iter(filter(None, map(str.strip, re.split(r"\n\s*\n", text))))
    assert all(paragraph in source for paragraph in kept)  # in order, none twice


sentences = st.lists(
    st.sampled_from(["A b c. ", "D e?\n", "F g\n", "H i j k.\n\n", "l "]), max_size=40
)


@settings(deadline=None, max_examples=60)
@given(sentences.map("".join), st.integers(0, 5), st.integers(9, 60))
def test_what_is_longer_is_cut_into_parts_of_much_the_same_size(text, low, high):
    parts = cut_evenly(text, len, low, high)
    assert all(low < len(part) < high for part in parts)
    if low < len(text) < high:
        assert parts == [text]
    words = iter(text.split())
    assert all(word in words for part in parts for word in part.split())  # in order, none twice
    if len(text) >= high and low == 0:
        assert "".join("".join(parts).split()) == "".join(text.split())  # and none lost


def test_a_long_text_without_blank_lines_is_cut_where_sentences_end():
    text = "\n".join(
        f"This is line {i} and it goes\non to the next. So it\ndoes." for i in range(99)
    )
    parts = cut_evenly(text, len, 200, 1000)
    assert len(parts) == 6 and all(part.endswith(".") for part in parts)
    assert min(map(len, parts)) > 0.7 * max(map(len, parts))


def test_a_document_is_all_for_training_or_all_for_testing(monkeypatch):
    counter = type("Counter", (), {"count": lambda self, text, enough: len(text) // 4})()
    monkeypatch.setattr(select_extracts, "load_counter", lambda name: counter)
    windows = ["--min-tokens", "50", "--max-tokens", "500"]
    options = parse_options(["--input", "x", *windows])
    texts = [f"Text {i}. " + "It has words. " * (40 * i) for i in range(1, 40)]
    found = [select({"text": text}, options) for text in texts]
    splits = [{one["split"] for one in candidates} for candidates in found]
    assert all(len(split) == 1 for split in splits)
    assert 2 <= sum(split == {"test"} for split in splits) <= 14  # 7.8 ± 2.5
    assert found[0][0]["text"] == texts[0].strip() and len(found[-1]) > 10
    assert all(one["text"].startswith("Text") for one, *_ in found)  # the first part is kept
    ids = [one["id"] for candidates in found for one in candidates]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("number", "for_testing"), [(1, 0), (2, 1), (5, 1), (10, 2), (100, 20)])
def test_of_few_documents_some_are_for_testing(number, for_testing):
    documents = draw_documents([f"/a/{i}.pdf" for i in range(number)], 1.0, 3)
    assert sum(one.share < OWN_TEST_SHARE for one in documents) == for_testing
    moved = draw_documents([f"/b/{i}.pdf" for i in range(number)], 1.0, 3)
    assert [Path(one.where).name for one in moved] == [Path(one.where).name for one in documents]
    assert len(draw_documents([f"/a/{i}.pdf" for i in range(number)], 0.1, 3)) == -(-number // 10)


@settings(deadline=None, max_examples=40)
@given(st.text(), st.integers(0, 5))
def test_shares_depend_on_key_and_seed_alone(key, seed):
    assert 0 <= share_of(key, seed) < 1
    assert share_of(key, seed) == share_of(key, seed)


def byte_level(add_prefix_space: bool = False, regex: bool = True):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=regex)


def train(pre_tokenizer, normalizer=None) -> Tokenizer:
    """A BPE with these parts, trained on this repo's prose with some white space in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prose = (ROOT / "prompts/summarize/teacher.jinja").read_text()
    code = (ROOT / "benchmarks/pairs.py").read_text()
    tokenizer.train_from_iterator(
        [prose, code, "a  b   c\n\n\n\t\td .\n\n\n", "one\n the " * 99], trainer
    )
    return tokenizer


def bert() -> Tokenizer:
    """A WordPiece with BERT's normalizer, which leaves nothing of some characters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    prose = (ROOT / "prompts/summarize/teacher.jinja").read_text()
    tokenizer.train_from_iterator([prose], trainer)
    return tokenizer


TOKENIZERS = {
    "GPT-2": train(byte_level()),
    "prefix space": train(byte_level(True)),
    "Qwen2": train(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN2), "isolated"), byte_level(regex=False)]
        ),
        normalizers.NFC(),
    ),
    "SmolLM2": train(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]),
        normalizers.Sequence([]),
    ),
    "NFKC": train(byte_level(), normalizers.NFKC()),
    "space before words": train(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\s*\S+"), "isolated"), byte_level(regex=False)]
        )
    ),
    "whole text": train(byte_level(regex=False)),
    "lower case": train(byte_level(), normalizers.Lowercase()),
    "Metaspace": train(pre_tokenizers.Metaspace()),
    "words alone": train(pre_tokenizers.Whitespace()),
    "BERT": bert(),
}
COUNTERS = {name: TokenCounter(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PIECES = st.one_of(
    st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", "\xa0", "\u2003 "]),
    st.sampled_from(["the", "summary", "It's", "don't", "(a)", "...", "--", "12", "3.5", "$x$"]),
    st.sampled_from(
        ["<|im_end|>", "<x>", "é", "e\u0301", "\u0958", "漢字", "ß", "\\foo{", "\x1c", "'s"]
    ),
    st.text(max_size=5),
)
TEXTS = st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text())


def plain_count(name: str, text: str) -> int:
    return len(TOKENIZERS[name].encode(text, add_special_tokens=False).ids)


def test_only_tokenizers_that_look_at_words_alone_are_taken_apart():
    whole = [name for name, counter in COUNTERS.items() if not counter.by_words]
    assert whole == ["NFKC", "whole text", "lower case", "BERT"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(text=TEXTS, enough=st.integers(1, 40))
@example(text="the 's  12 \n (a)", enough=30)
@example(text="the one\n the", enough=30)
@example(text="\t", enough=2)  # a tokenizer that puts a space before makes two tokens of it
def test_the_count_is_that_of_tokenizing_whole_texts(name, text, enough):
    number = plain_count(name, text)
    assert COUNTERS[name].count(text) == number
    found = COUNTERS[name].count(text, enough)
    assert found == number if number < enough else enough <= found


def test_words_are_remembered_and_long_texts_are_not_read_to_the_end():
    counter, enough = TokenCounter(TOKENIZERS["Qwen2"]), 1800
    assert counter.count("Some words " * 99, enough) == counter.count("Some words " * 99)
    assert counter.count_word.cache_info().currsize == 3
    assert enough <= counter.count("word " * 1800 + "x" * 10_000_000, enough) < 9000


@pytest.mark.parametrize("name", ["GPT-2", "Qwen2", "SmolLM2"])
def test_the_window_on_real_documents(name):
    folder = os.environ.get("REDPAJAMA_SAMPLES")
    if not folder:
        pytest.skip("REDPAJAMA_SAMPLES does not name a folder of RedPajama-shaped *.jsonl")
    counter, inside = COUNTERS[name], 0
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            text = json.loads(line)["text"]
            number = plain_count(name, text)
            assert counter.count(text) == number
            found = counter.count(text, 1800)
            assert found == number if number < 1800 else found >= 1800
            inside += 900 < number < 1800
    assert inside > 20


WORDS = (ROOT / "README.md").read_text().split()


def prose(seed: int, n: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=n)


def extract(text: str | list[str], split: str = "train", name: str = "") -> dict:
    text = text if isinstance(text, str) else " ".join(text)
    return {"id": name or text, "text": text, "split": split}


def test_exact_and_near_duplicates_are_found_and_others_not():
    duplicates, first = Duplicates(), prose(1, 800)
    assert duplicates.reason(extract(first, name="one")) is None
    assert duplicates.reason(extract("  ".join(first).upper())) == "near duplicate"
    changed = [*first[:400], "changed", *first[401:], "and", "more"]
    assert duplicates.reason(extract(changed)) == "near duplicate"
    assert duplicates.reason(extract(prose(2, 800), name="one")) == "near duplicate"  # the same id
    assert duplicates.reason(extract([*first[:400], *prose(2, 400)])) is None
    assert all(duplicates.reason(extract(prose(seed, 800))) is None for seed in range(3, 60))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(0, 60))
def test_a_run_of_words_shared_with_a_test_document_is_found_wherever_it_stands(seed, n, position):
    duplicates, test = Duplicates(), [f"t{i}" for i in range(100)]
    assert duplicates.reason(extract(test, "test")) is None
    train = [f"n{seed}.{i}" for i in range(60)]
    train[position:position] = test[position : position + n]
    reason = duplicates.reason(extract(train))
    assert reason == ("shares a run of words with a test document" if n >= RUN else None)


def test_test_documents_may_share_runs_and_short_texts_have_none():
    duplicates, run = Duplicates(), [f"w{i}" for i in range(30)]
    for number in range(3):
        assert duplicates.reason(extract([*prose(number, 400), *run], "test")) is None
    assert duplicates.reason(extract("only a few words", "test")) is None
    assert duplicates.reason(extract("only a few words and more", "train")) is None
