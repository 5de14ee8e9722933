"""Records to extracts: meta, sources, prose, exact token counts, near duplicates, shared runs."""

import json
import os
import random
import re
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from common.files import share_of
from data_prep.clean_documents import (
    clean,
    cut_passages,
    has_prose,
    meta_of,
    source_of,
    to_document,
)
from data_prep.count_tokens import TokenCounter
from data_prep.find_duplicates import RUN, Duplicates

META = {"arxiv_id": "0704.0001", "language": "en", "url": "https://arxiv.org/abs/0704.0001"}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("shape", [lambda m: m, json.dumps, repr])
def test_meta_in_every_shape_it_is_met_in(shape):
    assert meta_of({"text": "words", "meta": shape(META)}) == META
    assert meta_of({"text": "words", **META}) == META  # no meta at all


WIKIPEDIA = {"title": "T", "url": "https://en.wikipedia.org/wiki/T"}


@pytest.mark.parametrize(
    ("meta", "path", "source"),
    [
        (META, "in.jsonl", "arxiv"),
        ({"source": "a long name of a source"}, "/arxiv/arxiv_0.jsonl", "a long name of a source"),
        ({"question_score": "3"}, "in.jsonl", "stackexchange"),
        (WIKIPEDIA, "in.jsonl", "wikipedia"),
        ({"title": "T"}, "http://h/v1.0.0/wikipedia/wiki.jsonl", "wikipedia"),
        ({"title": "T"}, "hf://datasets/t/Sample/wikipedia_sample.jsonl", "wikipedia"),
        ({"title": "T", "url": "https://example.org/wikipedia.org/T"}, "in.jsonl", "other"),
        ({"title": "T"}, "my/notes.jsonl", "other"),
        ({}, "my/notes.jsonl", "other"),
    ],
)
def test_no_source_is_claimed_that_a_record_or_its_file_does_not_show(meta, path, source):
    assert source_of(meta, path) == source
    assert source_of(meta, path, "notes") == ("notes" if source == "other" else source)


@pytest.mark.parametrize(
    ("text", "meta", "reason"),
    [
        ("", {}, "no text"),
        (" \x00\r\n", {}, "no text"),
        ("mots", {"language": "fr"}, "not English"),
    ],
)
def test_what_is_left_out_has_a_reason(text, meta, reason):
    assert to_document(text, meta, "other") == reason


def test_ids_are_stable_and_differ_by_key_not_by_text():
    def of(text, url):
        return to_document(text, {"url": url}, "other")["id"]

    assert of("a", "u") == of("b", "u") != of("a", "v")


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
    assert clean(text) == cleaned


@settings(deadline=None)
@given(st.text())
def test_cleaning_leaves_no_control_character(text):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", clean(text))


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


@settings(deadline=None)
@given(paragraphs, st.integers(0, 30), st.integers(1, 60))
def test_passages_are_runs_of_whole_paragraphs_inside_the_window(parts, low, high):
    text = "\n\n".join(parts)
    passages = cut_passages(text, len, low, high)
    assert all(low < len(p) < high for p in passages)
    kept = [p for passage in passages for p in passage.split("\n\n")]
    source = iter(filter(None, map(str.strip, re.split(r"\n\s*\n", text))))
    assert all(paragraph in source for paragraph in kept)  # in order, none twice


@settings(deadline=None)
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


def add_token(token) -> Tokenizer:
    tokenizer = train(byte_level())
    tokenizer.add_tokens([token])
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
    "SmolLM2": train(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    "space before words": train(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\s*\S+"), "isolated"), byte_level(regex=False)]
        )
    ),
    "whole text": train(byte_level(regex=False)),
    "lower case": train(byte_level(), normalizers.Lowercase()),
    "Metaspace": train(pre_tokenizers.Metaspace()),
    "words alone": train(pre_tokenizers.Whitespace()),
    "added with a space": add_token("the summary"),
    "added, eats spaces": add_token(AddedToken("<x>", rstrip=True)),
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


def test_only_tokenizers_that_cut_at_single_spaces_are_taken_apart():
    fast = [name for name, counter in COUNTERS.items() if counter.adds_up]
    assert fast == ["GPT-2", "prefix space", "Qwen2", "SmolLM2", "space before words", "Metaspace"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
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


def test_exact_and_near_duplicates_are_found_and_others_not():
    duplicates, first = Duplicates(), prose(1, 800)
    assert duplicates.reason(" ".join(first)) is None
    assert duplicates.reason("  ".join(first).upper()) == "repeated text"
    changed = [*first[:400], "changed", *first[401:], "and", "more"]
    assert duplicates.reason(" ".join(changed)) == "near duplicate"
    assert duplicates.reason(" ".join([*first[:400], *prose(2, 400)])) is None
    assert all(duplicates.reason(" ".join(prose(seed, 800))) is None for seed in range(3, 60))


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(0, 60))
def test_a_run_of_words_shared_with_a_test_document_is_found_wherever_it_stands(seed, n, position):
    duplicates = Duplicates()
    test = [f"t{i}" for i in range(100)]
    duplicates.forbid_runs([" ".join(test)])
    train = [f"n{seed}.{i}" for i in range(60)]
    train[position:position] = test[position : position + n]
    reason = duplicates.reason(" ".join(train))
    assert reason == ("shares a run of words with a test document" if n >= RUN else None)


def test_short_texts_have_no_run_to_share():
    duplicates = Duplicates()
    duplicates.forbid_runs(["only a few words", " ".join(WORDS)])
    assert duplicates.reason("only a few words") is None
