import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import (
    make_tokenizer,
    one_error_line,
    read_jsonl,
    run_stage,
    teacher_reply,
    write_jsonl,
)
from hypothesis import given
from hypothesis import strategies as st

from data_prep.audit_pairs import audit, length_match, measure, n_words, share, wins
from data_prep.filter_pairs import CHECKS, fault, language, repetition, similarity

STAGE = "data_prep.build_pairs"
ONE, TWO = "Lakes freeze from the top because ice floats.", "Rivers carry silt to the sea."
SETTINGS = {
    "max_similarity": 0.75,
    "min_difference": 1,
    "max_repetition": 0.2,
    "max_tokens": 3072,
    "tokenizer": "any",
}
LONG_ENGLISH = (
    "The lakes of the north freeze in the winter, and the ice on the water is thick. " * 2
)
FRENCH = (
    "Les lacs du nord gèlent en hiver, et la glace y est si épaisse que l'on peut y marcher. " * 2
)


def extract(key: str) -> dict:
    text = f"The text of {key}. " + "It goes on and on about lakes and rivers. " * 5
    return {"id": key, "source": "wikipedia", "url": f"u/{key}", "text": text, "n_tokens": 60}


def reply(key: str, text: str, model: str = "m", finish: str = "stop", sha: str = "p") -> dict:
    return {
        "id": key,
        "model": model,
        "prompt_sha": sha,
        "text": text,
        "finish_reason": finish,
        "created": "1",
        "cost_usd": 0.5,
        "usage": {"prompt_tokens": 90, "completion_tokens": 10},
    }


def build(folder, train, test=None, *options, code=0):
    test = test or [reply("t", teacher_reply(ONE, TWO, (12, 12)))]
    for split, replies in (("train", train), ("test", test)):
        keys = {r["id"] for r in replies} - {"gone"} or {"x"}
        write_jsonl(folder / f"extracts/{split}.jsonl", [extract(k) for k in sorted(keys)])
        write_jsonl(folder / f"replies/{split}.jsonl", replies)
    return run_stage(
        STAGE,
        "--extracts",
        folder / "extracts",
        "--replies",
        folder / "replies",
        "--output",
        folder / "pairs",
        *options,
        code=code,
    )


def squeezed(text: str) -> str:
    """A Markdown table without its padding."""
    return re.sub(r" +", " ", text)


def test_every_reply_is_in_exactly_one_of_pairs_and_dropped(tmp_path):
    train = [
        reply("good", teacher_reply(ONE, TWO, (11, 16))),
        reply("close", teacher_reply(ONE, TWO, (15, 14))),
        reply("edge", teacher_reply(ONE, TWO, (16, 14))),
        reply("alike", teacher_reply(ONE, ONE + "!", (16, 12))),
        reply("refused", "I would rather not."),
        reply("cut", teacher_reply(ONE, TWO), finish="length"),
        reply("gone", teacher_reply(ONE, TWO)),
        reply("good", teacher_reply(ONE, TWO)),
    ]
    result = build(tmp_path, train)
    pairs = read_jsonl(tmp_path / "pairs/train.jsonl")
    dropped = read_jsonl(tmp_path / "pairs/dropped.jsonl")
    expected = {
        "id": "good",
        "source": "wikipedia",
        "url": "u/good",
        "chosen": TWO,
        "rejected": ONE,
        "chosen_position": 2,
        "ratings": [16, 11],
        "teacher": "m",
        "prompt_sha": "p",
        "n_tokens": 60,
        "prompt": extract("good")["text"],
    }
    assert pairs[0].items() >= expected.items()
    assert [sum(criteria.values()) for criteria in pairs[0]["criteria"]] == [16, 11]
    assert [p["id"] for p in pairs] == ["good", "edge"]
    assert {d["id"]: d["reason"].split(" (")[0] for d in dropped} == {
        "close": "scores too close",
        "alike": "summaries too alike",
        "refused": "not readable",
        "cut": "not readable",
        "gone": "its extract is gone",
        "good": "a second reply to the same extract",
    }
    for row in (
        "| | train | test |",
        "| replies | 8 | 1 |",
        "| pairs kept | 2 | 1 |",
        "| tokens for a kept pair | 400 | 100 |",
        "| cost of a kept pair | $2.00000 | $0.50000 |",
        "| dropped: not readable (cut off at the token limit) | 1 | 0 |",
    ):
        assert row in squeezed(result.stdout)
    assert len(read_jsonl(tmp_path / "pairs/test.jsonl")) == 1  # a tie serves as a reference


def pair_of(chosen: str, rejected: str = TWO, text: str = LONG_ENGLISH, n_tokens: int = 60) -> dict:
    return {
        "prompt": text,
        "chosen": chosen,
        "rejected": rejected,
        "ratings": [16, 11],
        "n_tokens": n_tokens,
    }


FAULTS = {
    "longer": pair_of("word " * 80),
    "refusal": pair_of("I'm sorry, but I cannot do that."),
    "repetition": pair_of("It is so and it is so and it is so and it is so."),
    "lead": pair_of("The lakes of the north freeze in the winter,"),
    "language": pair_of(FRENCH[:110], text=LONG_ENGLISH * 3),
    "length": pair_of(ONE, n_tokens=3000),
}


def fault_of(pair: dict, split: str, keep: list[str]) -> str | None:
    found = fault(pair, split, SETTINGS | {"keep": keep})
    assert found is None or found[1]  # every fault says by how much, or what
    return found and found[0]


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault_and_can_be_left_out(name, monkeypatch):
    counter = SimpleNamespace(count=len)
    monkeypatch.setattr("data_prep.filter_pairs.load_counter", lambda tokenizer: counter)
    others = [other for other in CHECKS if other != name]
    assert fault_of(FAULTS[name], "train", others) == CHECKS[name]
    assert fault_of(FAULTS[name], "train", list(CHECKS)) is None
    assert fault_of(pair_of(ONE), "train", []) is None
    on_test = fault_of(FAULTS[name], "test", others)
    assert (on_test is None) == (name == "length")
    swapped = {**FAULTS[name], "chosen": TWO, "rejected": FAULTS[name]["chosen"]}
    assert fault_of(swapped, "train", others) and not fault_of(swapped, "test", others)


def test_plain_english_french_and_short_texts_are_told_apart():
    assert language(LONG_ENGLISH) == "en" and language(FRENCH) == "fr" and language("Eis.") == ""


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30))
def test_repetition_is_the_share_of_repeated_four_grams(words):
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(" ".join(words)) == pytest.approx(repeats / len(grams) if grams else 0)


@pytest.mark.slow
def test_a_pair_over_the_training_length_is_counted_by_the_tokenizer(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    train = [reply("a", teacher_reply(ONE, TWO)), reply("b", teacher_reply(TWO, ONE))]
    options = ["--tokenizer", tmp_path / "tokenizer", "--max-tokens", 60 + 48 + 25]
    assert "no train pair is left" in one_error_line(build(tmp_path, train, None, *options, code=1))
    dropped = "| dropped: over the training length | 2 | 0 |"
    assert dropped in squeezed(build(tmp_path, train, None, *options, code=1).stdout)
    build(tmp_path, train, None, *options, "--keep", "length")


def test_the_filters_are_options(tmp_path):
    train = [
        reply("close", teacher_reply(ONE, TWO, (15, 14))),
        reply("alike", teacher_reply(ONE, ONE + "!", (16, 12))),
    ]
    build(tmp_path, train, None, "--min-difference", 0, "--max-similarity", 1)
    assert len(read_jsonl(tmp_path / "pairs/train.jsonl")) == 2


def test_several_teachers_need_a_choice(tmp_path):
    train = [reply("a", teacher_reply(ONE, TWO)), reply("a", teacher_reply(TWO, ONE), "other")]
    assert "--model, --prompt-sha; there are 1 by m with prompt p, 1 by other" in one_error_line(
        build(tmp_path, train, code=1)
    )
    test = [reply("t", teacher_reply(ONE, TWO), "other")]
    build(tmp_path, train, test, "--model", "other")
    assert read_jsonl(tmp_path / "pairs/train.jsonl")[0]["chosen"] == TWO
    missing = build(tmp_path, train, test, "--model", "third", code=1)
    assert "choose one teacher" in one_error_line(missing)


def test_of_several_prompts_the_one_with_most_replies_is_taken_in_both_splits(tmp_path):
    train = [reply(key, teacher_reply(ONE, TWO)) for key in "abc"]
    train.append(reply("a", teacher_reply(TWO, ONE), sha="newer") | {"created": "2"})
    test = [reply("t", teacher_reply(ONE, TWO)), reply("t", teacher_reply(TWO, ONE), sha="newer")]
    test.append(reply("u", teacher_reply(TWO, ONE), sha="newer"))
    result = build(tmp_path, train, test)
    assert "3 by m with prompt p, 1 by m with prompt newer; taking p" in result.stdout
    assert "--prompt-sha" in result.stdout
    for split, kept in (("train", 3), ("test", 1)):
        pairs = read_jsonl(tmp_path / f"pairs/{split}.jsonl")
        assert {pair["prompt_sha"] for pair in pairs} == {"p"} and len(pairs) == kept
    build(tmp_path, train, test, "--prompt-sha", "newer")
    assert read_jsonl(tmp_path / "pairs/train.jsonl")[0]["chosen"] == TWO
    missing = build(tmp_path, train, test, "--prompt-sha", "gone", code=1)
    assert "--prompt-sha; there are 3 by m with prompt p" in one_error_line(missing)


def test_a_failed_run_leaves_the_old_pairs_with_their_audit_or_none_that_a_stage_takes(tmp_path):
    build(tmp_path, [reply("a", teacher_reply(ONE, TWO))])
    made = (tmp_path / "pairs/made.json").read_text()
    newer = [reply(key, teacher_reply(ONE, TWO)) for key in "bc"]
    build(tmp_path, newer, [reply("t", "no")], code=1)
    assert [pair["id"] for pair in read_jsonl(tmp_path / "pairs/train.jsonl")] == ["a"]
    assert (tmp_path / "pairs/made.json").read_text() == made
    (tmp_path / "pairs/dropped.jsonl").unlink()
    (tmp_path / "pairs/dropped.jsonl").mkdir()  # what a full disk does in the midst of it
    build(tmp_path, newer, code=1)
    stage = ("--pairs", tmp_path / "pairs", "--replies", tmp_path / "replies")
    result = run_stage("data_prep.build_dataset", *stage, "--output", tmp_path / "hub", code=1)
    assert "just pairs" in one_error_line(result)


def test_a_split_without_pairs_is_an_error(tmp_path):
    result = build(tmp_path, [reply("a", "no")], code=1)
    assert "no train pair is left" in one_error_line(result)


def test_no_replies_says_how_to_get_them(tmp_path):
    write_jsonl(tmp_path / "extracts/train.jsonl", [extract("a")])
    result = run_stage(
        STAGE,
        "--extracts",
        tmp_path / "extracts",
        "--replies",
        tmp_path / "none",
        "--output",
        tmp_path / "pairs",
        code=1,
    )
    assert "just replies" in one_error_line(result)


def plain_levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(
    st.text(max_size=20),
    st.text(min_size=1, max_size=20),
    st.integers(4, 18),
    st.integers(4, 18),
    st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    st.integers(0, 3),
)
def test_the_two_filters_by_their_definitions(a, b, high, low, most, least):
    pair = {"prompt": "", "chosen": a, "rejected": b, "ratings": [high, low]}
    alike = 1 - plain_levenshtein(a, b) / max(len(a), len(b))
    assert similarity(pair) == pytest.approx(alike)
    kept = high - low > least and similarity(pair) <= most
    others = [name for name in CHECKS if name not in ("difference", "similarity")]
    settings = SETTINGS | {"max_similarity": most, "min_difference": least, "keep": others}
    assert (fault(pair, "train", settings) is None) == kept


def audited(n: int, longer: float, first: float) -> list[dict]:
    """`n` pairs of which these shares are won by the longer and by the first summary."""

    def one(i: int) -> dict:
        sides = ["word " * (10 + i % 7), "word " * 5]
        chosen, rejected = sides if i < longer * n else sides[::-1]
        return {
            "id": str(i),
            "source": ("arxiv", "wikipedia")[i % 2],
            "teacher": "m",
            "chosen": chosen,
            "rejected": rejected,
            "chosen_position": 1 if i < first * n else 2,
            "ratings": [10 + i % 5, 8],
            "criteria": [{"fluency": 3}, {"fluency": 1 + i % 2}],
            "longer": 1 + i % 2,
        }

    return [one(i) for i in range(n)]


def test_the_audit_counts_what_it_says():
    frame = measure(audited(100, 0.9, 0.5))
    found = wins(frame)
    assert found.loc["all", "longer wins"][0] == 0.9 and found.loc["all", "first wins"][0] == 0.5
    assert list(found.index[-2:]) == ["`arxiv`", "`wikipedia`"]
    assert "Length alone predicts" in audit(frame)
    assert "Position alone predicts" in audit(measure(audited(100, 0.5, 0.1)))
    assert "predicts" not in audit(measure(audited(100, 0.5, 0.5)))


def test_a_wilson_interval():
    marks = pd.Series([True] * 8 + [False] * 2 + [None])
    assert share(marks) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=60)


@given(lengths, st.integers(0, 3))
def test_length_matching_leaves_two_equal_histograms(sizes, seed):
    pairs = [
        {"id": str(i), "chosen": "w " * a, "rejected": "w " * b} for i, (a, b) in enumerate(sizes)
    ]
    kept = length_match(pairs, seed)
    sides = [sorted(n_words(pair[side]) // 5 for pair in kept) for side in ("chosen", "rejected")]
    assert sides[0] == sides[1]
    assert kept == length_match(pairs, seed)
    assert all(pair in kept for pair in pairs if pair["chosen"] == pair["rejected"])


def test_length_match_accounts_for_what_it_leaves_out(tmp_path):
    train = [reply(f"a{i}", teacher_reply(ONE + " And so on, and on.", TWO)) for i in range(3)]
    train += [
        reply(f"b{i}", teacher_reply(ONE + " And so on, and on.", TWO, (10, 15))) for i in range(2)
    ]
    result = build(tmp_path, train, None, "--length-match")
    assert "| pairs kept | 4 | 1 |" in squeezed(result.stdout)
    assert "| dropped: left out to match lengths | 1 | 0 |" in squeezed(result.stdout)
    assert read_jsonl(tmp_path / "pairs/dropped.jsonl")[0]["model"] == "m"
    made = json.loads((tmp_path / "pairs/made.json").read_text())
    assert made["length_match"] and "50.0%" in made["audit"]
    assert (tmp_path / "pairs/plots/lengths.png").stat().st_size > 5000


def test_longer_and_first_are_told_apart_by_the_recorded_draw():
    pairs = [pair | {"chosen_position": pair["longer"]} for pair in audited(100, 0.5, 0.5)]
    # The one asked to be the longer always won, so the first in half of them.
    shares = wins(measure(pairs))["first wins"].str[0]
    assert shares["all"] == 0.5
    assert shares["first asked to be the longer"] == 1
    assert shares["first asked to be the shorter"] == 0
