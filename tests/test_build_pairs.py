import pytest
from conftest import one_error_line, read_jsonl, run_stage, teacher_reply, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build_pairs import reason_to_drop, similarity

STAGE = "data_prep.build_pairs"
ONE, TWO = "Lakes freeze from the top because ice floats.", "Rivers carry silt to the sea."


def extract(key: str) -> dict:
    return {"id": key, "source": "wikipedia", "url": f"u/{key}", "text": f"The text of {key}."}


def reply(key: str, text: str, model: str = "m", finish: str = "stop", created: str = "1") -> dict:
    return {
        "id": key,
        "model": model,
        "prompt_sha": "p",
        "text": text,
        "finish_reason": finish,
        "created": created,
        "cost_usd": 0.5,
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
    assert pairs[0] == {
        "id": "good",
        "source": "wikipedia",
        "url": "u/good",
        "prompt": "The text of good.",
        "chosen": TWO,
        "rejected": ONE,
        "chosen_position": 2,
        "ratings": [16, 11],
        "teacher": "m",
        "prompt_sha": "p",
    }
    assert [p["id"] for p in pairs] == ["good", "edge"]
    assert {d["id"]: d["reason"] for d in dropped} == {
        "close": "scores too close",
        "alike": "summaries too alike",
        "refused": "not readable",
        "cut": "not readable",
        "gone": "its extract is gone",
        "good": "a second reply to the same extract",
    }
    assert "8 replies in, 2 pairs kept, 6 dropped" in result.stdout
    assert "1: not readable (cut off at the token limit)" in result.stdout
    assert len(read_jsonl(tmp_path / "pairs/test.jsonl")) == 1  # a tie serves as a reference


def test_the_filters_are_options(tmp_path):
    train = [
        reply("close", teacher_reply(ONE, TWO, (15, 14))),
        reply("alike", teacher_reply(ONE, ONE + "!", (16, 12))),
    ]
    build(tmp_path, train, None, "--min-difference", 0, "--max-similarity", 1)
    assert len(read_jsonl(tmp_path / "pairs/train.jsonl")) == 2


def test_several_teachers_need_a_choice(tmp_path):
    train = [reply("a", teacher_reply(ONE, TWO)), reply("a", teacher_reply(TWO, ONE), "other")]
    assert "m, other; choose one with --model" in one_error_line(build(tmp_path, train, code=1))
    test = [reply("t", teacher_reply(ONE, TWO), "other")]
    build(tmp_path, train, test, "--model", "other")
    assert read_jsonl(tmp_path / "pairs/train.jsonl")[0]["chosen"] == TWO
    missing = build(tmp_path, train, test, "--model", "third", code=1)
    assert "no reply by third" in one_error_line(missing)


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
def test_the_filters_by_their_definitions(a, b, high, low, most, least):
    pair = {"chosen": a, "rejected": b, "ratings": [high, low]}
    alike = 1 - plain_levenshtein(a, b) / max(len(a), len(b))
    assert similarity(pair) == pytest.approx(alike)
    kept = high - low > least and similarity(pair) <= most
    assert (reason_to_drop(pair, most, least) is None) == kept
