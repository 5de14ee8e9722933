import gzip
import json
import re

import pytest
from conftest import make_tokenizer, one_error_line, read_jsonl, run_stage, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sample_extracts import cut_passages, parse_meta, share_of, to_document

STAGE = "data_prep.sample_extracts"
META = {"arxiv_id": "0704.0001", "language": "en", "url": "https://arxiv.org/abs/0704.0001"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def document(number: int, words: int, **meta) -> dict:
    text = "\n\n".join(f"Paragraph {i} of {number} says it." for i in range(words // 6))
    return {"text": text, "meta": {"title": f"t{number}", "url": f"u{number}", **meta}}


@pytest.mark.parametrize("shape", [lambda m: m, json.dumps, repr])
def test_meta_in_every_shape_it_is_met_in(shape):
    assert parse_meta(shape(META)) == META
    found = to_document({"text": "words", "meta": shape(META)})
    assert (found["source"], found["url"]) == ("arxiv", META["url"])


def test_the_subset_is_inferred_where_meta_has_no_source():
    assert to_document({"text": "w", "meta": {"title": "T"}})["source"] == "wikipedia"
    assert to_document({"text": "w", "meta": {"question_score": "3"}})["source"] == "stackexchange"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": ""}, "no text"),
        ({"text": 7}, "no text"),
        ({"text": "mots", "meta": {"language": "fr"}}, "not English"),
    ],
)
def test_what_is_left_out_has_a_reason(record, reason):
    assert to_document(record) == reason


def test_ids_are_stable_and_differ_by_key_not_by_text():
    def of(text, url):
        return to_document({"text": text, "meta": {"url": url}})["id"]

    assert of("a", "u") == of("b", "u") != of("a", "v")


paragraphs = st.lists(st.text(alphabet="ab \n", min_size=0, max_size=30), max_size=12)


@given(paragraphs, st.integers(0, 30), st.integers(1, 60))
def test_passages_are_runs_of_whole_paragraphs_inside_the_window(parts, low, high):
    text = "\n\n".join(parts)
    passages = cut_passages(text, len, low, high)
    assert all(low < len(p) < high for p in passages)
    kept = [p for passage in passages for p in passage.split("\n\n")]
    source = iter(filter(None, map(str.strip, re.split(r"\n\s*\n", text))))
    assert all(paragraph in source for paragraph in kept)  # in order, none twice


@given(st.text(), st.integers(0, 5))
def test_shares_depend_on_key_and_seed_alone(key, seed):
    assert 0 <= share_of(key, seed) < 1
    assert share_of(key, seed) == share_of(key, seed)


def sample(tmp_path, tokenizer, *options, **kwargs):
    return run_stage(
        STAGE, "--output", tmp_path / "out", "--tokenizer", tokenizer, *options, **kwargs
    )


def test_whole_documents_fall_into_their_windows(tmp_path, tokenizer):
    rows = [document(n, words) for n, words in enumerate([30, 120, 120, 300, 4000, 9000])]
    rows += [rows[1], {**rows[2], "meta": {"url": "copy"}}, document(7, 120, language="de")]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    with path.open("ab") as file:
        file.write(b'{"text": "torn\n')
    result = sample(
        tmp_path,
        tokenizer,
        "--input",
        path,
        "--min-tokens",
        200,
        "--max-tokens",
        2000,
        "--min-chars",
        10_000,
        "--max-chars",
        30_000,
    )
    train, test = (read_jsonl(tmp_path / "out" / f"{s}.jsonl") for s in ("train", "test"))
    assert {r["url"] for r in train} == {"u1", "u2", "u3"}
    assert {r["url"] for r in test} == {"u4"}
    assert all(200 < r["n_tokens"] < 2000 and r["n_chars"] == len(r["text"]) for r in train)
    assert set(train[0]) == {"id", "source", "url", "text", "n_chars", "n_tokens"}
    assert f"{path}:10: not valid JSON" in result.stderr
    for reason in (
        "2: outside the windows",
        "1: repeated document",
        "1: repeated text",
        "1: not English",
        "1: broken line",
    ):
        assert f"dropped {reason}" in result.stdout, result.stdout


def test_passages_split_by_document_in_a_seeded_order(tmp_path, tokenizer):
    rows = [document(n, 600) for n in range(30)]
    plain = write_jsonl(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    options = [
        "--passages",
        "--min-tokens",
        100,
        "--max-tokens",
        300,
        "--min-chars",
        200,
        "--max-chars",
        800,
    ]
    sample(tmp_path, tokenizer, "--input", plain, *options)
    train, test = (read_jsonl(tmp_path / "out" / f"{s}.jsonl") for s in ("train", "test"))
    assert train and test
    assert not {r["url"] for r in train} & {r["url"] for r in test}
    assert len({r["id"] for r in train + test}) == len(train + test)
    assert all(200 <= r["n_chars"] <= 800 for r in test)

    again = sample(tmp_path, tokenizer, "--input", plain, *options)
    assert "is done with these settings" in again.stdout
    other = sample(tmp_path, tokenizer, "--input", plain, "--passages", code=1)
    assert "made with other settings" in one_error_line(other)
    sample(tmp_path / "z", tokenizer, "--input", tmp_path / "in.jsonl.gz", *options, "--train", 5)
    assert read_jsonl(tmp_path / "z/out/train.jsonl") == train[:5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--input", "*.nothing"], "no file matches"),
        (["--input", "/"], "cannot read /"),
        (["--input", "http://127.0.0.1:9/x.jsonl"], "cannot read http://127.0.0.1:9/x.jsonl"),
        (["--input", "hf://datasets/me/x/y.jsonl"], "cannot read"),
        (["--input", __file__], "no document falls into the windows"),
        (["--input", __file__, "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, tokenizer, options, said):
    assert said in one_error_line(sample(tmp_path, tokenizer, *options, code=1))


def test_wrong_usage_exits_with_2(tmp_path, tokenizer):
    assert "--frobnicate" in sample(tmp_path, tokenizer, "--frobnicate", code=2).stderr
