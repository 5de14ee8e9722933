"""A long text in parts: nothing lost, no part too long, cut where a reader would; condensed."""

import json
from dataclasses import asdict

import pytest
from tokenizers import AddedToken

from common.cli import UserError
from data_prep.cut_text import cut_text
from inference.parts import Cutter, condense, make_cutter, show_parts
from training.lengths import Lengths, lengths_of, read_lengths, write_lengths

PARAGRAPHS = "\n\n".join(f"Paragraph {i} says a word. It says {i} more. " * 4 for i in range(9))
TABLE = "\n".join(f"| row {i} | {i * i} | cell |" for i in range(40))
CJK = "一句很长的话。又一句！他說：「好。」後來呢？" * 20  # noqa: RUF001
FAR = 8192  # tokens of a prompt, which none of these texts has
UNCUT = ("x" * 700, " \n\n ", "", "word", "a b", "\ufeff\u0301" * 50)


def words(text: str) -> int:
    return len(text.split())


def rounded(text: str) -> int:
    """Of a whole it is more than of its pieces together."""
    return len(text) // 4


def glued(text: str, parts) -> bool:
    """Whether the parts are the text, in order, but for white space between them."""
    position = 0
    for part in parts:
        if text[position : part.start].strip() or not text.startswith(part.text, part.start):
            return False
        position = part.start + len(part.text)
    return not text[position:].strip()


@pytest.mark.parametrize("text", [PARAGRAPHS, TABLE, CJK, *UNCUT, PARAGRAPHS + CJK + "x" * 300])
@pytest.mark.parametrize(
    ("count", "most"), [(len, 3), (len, 64), (len, 4000), (words, 40), (rounded, 9)]
)
def test_nothing_is_lost_and_no_part_is_too_long(text, count, most):
    parts = cut_text(text, count, most)
    assert glued(text, parts)
    assert all(count(part.text) <= most for part in parts)
    assert all(part.text.strip() for part in parts)


def test_parts_are_about_equal_and_end_with_paragraphs():
    parts = cut_text(PARAGRAPHS, words, 120)  # nine paragraphs of 36 words
    assert [words(part.text) for part in parts] == [108, 108, 108]
    assert all(part.text.startswith("Paragraph") for part in parts)
    even = [words(part.text) for part in cut_text(PARAGRAPHS, words, 200)]
    assert len(even) == 2 and min(even) >= 144


def test_a_long_paragraph_is_cut_at_sentences_and_a_table_at_rows():
    sentences = "He came (late.) Then approx. three left. " * 20
    for part in cut_text(sentences, words, 20):
        assert part.text.startswith(("He", "Then")) and part.text.rstrip().endswith((".", ")"))
    assert all(part.text.startswith("| row") for part in cut_text(TABLE, len, 100))
    assert {part.text[-1] for part in cut_text(CJK, len, 30)} <= set("。！？」")  # noqa: RUF001


class OfWords:
    """A tokenizer whose tokens are words, with no chat template around a prompt."""

    chat_template, added_tokens_decoder = None, {}

    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": text.split()})

    def apply_chat_template(self, messages, **_):
        return "<user> " + messages[-1]["content"]


class BareTask:
    def student_messages(self, text, template):
        return [{"role": "user", "content": text}]


@pytest.fixture
def cutter() -> Cutter:
    lengths = Lengths(n=9, least=5, median=20, most_of_95_percent=37, most=40)
    return make_cutter(OfWords(), BareTask(), None, lengths, None, FAR)


def test_only_what_is_longer_than_what_was_taught_is_cut(cutter):
    assert not cutter.parts_of("word " * 49)  # 50 with what stands around it, 1.25 of 40
    parts = cutter.parts_of("word " * 50)
    assert [words(part.text) for part in parts] == [25, 25]
    assert make_cutter(OfWords(), BareTask(), None, None, None, FAR) is None
    asked = make_cutter(OfWords(), BareTask(), None, None, 11, FAR)
    assert [words(part.text) for part in asked.parts_of("word " * 20)] == [10, 10]
    with pytest.raises(UserError, match="parts of 1 tokens leave no room"):
        make_cutter(OfWords(), BareTask(), None, None, 1, FAR).parts_of("a b")


@pytest.mark.parametrize("asked", [None, 45])
def test_what_a_prompt_may_not_hold_is_read_in_parts_that_it_may(asked):
    lengths = Lengths(n=9, least=5, median=20, most_of_95_percent=37, most=40)
    cutter = make_cutter(OfWords(), BareTask(), None, lengths, asked, 26)
    assert not cutter.is_long("word " * 25)  # 26 with what stands around it
    parts = cutter.parts_of("word " * 26)  # within what was taught, or asked for
    assert [cutter.size(part.text) for part in parts] == [14, 14]
    assert {cutter.size(part.text) for part in cutter.parts_of("word " * 75)} == {26}
    assert cutter.bound == "over the 26 that are read at once"


class OfWordsAndEnds(OfWords):
    """With a token for the end of a turn, which a prompt's text has as two words."""

    chat_template, added_tokens_decoder = None, {1: AddedToken("<|im_end|>", special=True)}


def test_no_part_is_too_long_where_a_prompt_has_more_tokens_than_its_text():
    cutter = make_cutter(OfWordsAndEnds(), BareTask(), None, None, 11, FAR)
    parts = cutter.parts_of("<|im_end|> " * 40)
    assert all(cutter.size(part.text) <= 11 for part in parts)
    assert "".join(part.text for part in parts) == "<|im_end|> " * 40


def test_answers_are_answered_until_they_are_short_enough(cutter, capsys):
    texts = []

    def first_words(parts: list[str]) -> list[str]:
        texts.append(parts)
        return [" ".join(part.split()[:12]) for part in parts]

    condensed = condense("a.txt", PARAGRAPHS, cutter, first_words)
    assert [len(parts) for parts in texts] == [9, 3]
    assert condensed.text == "\n\n".join(answer for _, answer in condensed.steps[1])
    assert words(condensed.text) == 36
    said = capsys.readouterr().err
    assert "a.txt: 325 tokens, and it was taught on 5 to 40; read in 9 parts" in said
    assert "a.txt, the answers to its parts: 109 tokens" in said and "read in 3 parts" in said
    show_parts(condensed)
    shown = capsys.readouterr().out
    assert '-- part 2 of 9, from "Paragraph 1 says a word. It says 1"' in shown
    assert shown.count("-- answers to parts, part ") == 3


@pytest.mark.parametrize("answer", ["", "as many words as there were in the text " * 9])
def test_answers_that_get_nowhere_are_told(cutter, capsys, answer):
    condensed = condense("a.txt", PARAGRAPHS, cutter, lambda parts: [answer] * len(parts))
    assert condensed.text == PARAGRAPHS and condensed.steps == []
    assert "read in one" in capsys.readouterr().err


def test_what_is_kept_of_lengths(tmp_path):
    assert lengths_of([]) is None and read_lengths(tmp_path) is None
    write_lengths(tmp_path, None)
    assert not list(tmp_path.iterdir())
    lengths = lengths_of([*range(1, 101)])
    assert lengths == Lengths(n=100, least=1, median=50, most_of_95_percent=95, most=100)
    assert lengths_of([7]) == Lengths(n=1, least=7, median=7, most_of_95_percent=7, most=7)
    write_lengths(tmp_path, lengths)
    assert read_lengths(tmp_path) == lengths
    for odd in ("many", 1e999):
        content = asdict(lengths) | {"most": odd}
        (tmp_path / "lengths.json").write_text(json.dumps(content))
        assert read_lengths(tmp_path) is None
