"""Byte ranges: every line once, only what is drawn is transferred, no bad answer read as data."""

import gzip
import io
import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import make_tokenizer, read_jsonl, run_stage, write_jsonl
from hub_server import TOKEN, Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import RangeServer

from common.cli import UserError
from data_prep import read_blocks
from data_prep.read_blocks import (
    RangeFile,
    block_lines,
    draw_units,
    parse_record,
    stream_lines,
    subset_of,
)

STAGE = "data_prep.sample_extracts"
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
LINES = st.lists(st.tuples(st.text(max_size=9).map(str.encode), ENDS), max_size=12)


def fetching(content: bytes, fetched: list | None = None):
    def fetch(start: int, end: int) -> bytes:
        assert 0 <= start <= end <= len(content)
        if fetched is not None:
            fetched.append(end - start)
        return content[start:end]

    return fetch


@settings(deadline=None)
@given(LINES, st.binary(max_size=5), st.integers(1, 40), st.integers(1, 7))
def test_over_all_blocks_every_line_is_read_once(lines, last, block, ahead):
    content = b"".join(line + end for line, end in lines) + last.replace(b"\n", b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_blocks, "AHEAD", ahead)
        found = [
            one
            for start in range(0, len(content), block)
            for one in block_lines(
                fetching(content), len(content), start, min(start + block, len(content))
            )
        ]
    expected = io.BytesIO(content).readlines()
    offsets = [sum(map(len, expected[:i])) for i in range(len(expected))]
    assert found == list(zip(offsets, expected, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 50), st.integers(1, 40))
def test_too_long_lines_are_told_and_no_others_are_lost(lengths, block, longest):
    lines = [b"x" * n + b"\n" for n in lengths]
    content, fetched = b"".join(lines), []
    expected = [line if len(line) <= longest else None for line in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_blocks, "AHEAD", 4)
        found = [
            line
            for start in range(0, len(content), block)
            for _, line in block_lines(
                fetching(content, fetched),
                len(content),
                start,
                min(start + block, len(content)),
                longest,
            )
        ]
    assert found == expected
    assert max(fetched) <= max(block + 1 + 4, block + longest + 4)
    assert [line for _, line in stream_lines(io.BytesIO(content), longest)] == expected


def test_a_200_mb_line_is_passed_over_in_little_memory():
    size, fetched = 200_000_000, []

    def fetch(start: int, end: int) -> bytes:
        fetched.append(end - start)
        return b"x" * (end - start)

    (line,) = block_lines(fetch, size, 0, 1 << 20)
    assert line == (0, None) and sum(fetched) < 3 * read_blocks.LONGEST_LINE
    assert not list(block_lines(fetch, size, 5 << 20, 6 << 20))  # no line starts in there


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3 << 20), min_size=1, max_size=5),
    st.floats(0.01, 1),
    st.integers(0, 99),
)
def test_blocks_are_drawn_without_replacement_and_are_the_share_asked_for(sizes, fraction, seed):
    files = [(f"{i}.jsonl", size) for i, size in enumerate(sizes)]
    units = draw_units(files, fraction, seed)
    assert len(set(units)) == len(units) and units == draw_units(files, fraction, seed)
    every = draw_units(files, 1, seed)
    assert sum(end - start for *_, start, end in every) == sum(sizes)
    if fraction == 1:
        assert units == every
    if len(units) > 20:
        drawn = sum(end - start for *_, start, end in units) / sum(sizes)
        assert drawn == pytest.approx(fraction, abs=0.1)


def test_every_block_has_the_same_chance():
    files = [("a.jsonl", 40 << 20), ("b.jsonl", 10 << 20)]
    drawn = Counter(unit for seed in range(400) for unit in draw_units(files, 0.4, seed))
    assert len(drawn) == 50 and 100 < min(drawn.values()) <= max(drawn.values()) < 220  # 160 ± 10


def test_the_subset_is_told_by_the_published_names():
    base = "https://data.together.xyz/redpajama-data-1T/v1.0.0"
    assert subset_of(f"{base}/arxiv/arxiv_0.jsonl") == "arxiv"
    assert subset_of(f"{base}/wikipedia/wiki.jsonl") == "wikipedia"
    assert subset_of("hf://datasets/t/RedPajama-Data-1T-Sample/stackexchange_sample.jsonl") == (
        "stackexchange"
    )
    assert subset_of("my_docs/notes.jsonl") == subset_of("bookkeeping.jsonl") == "other"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b"[]", "no text"),
        (b'{"txt": "a"}', "no text"),
        (b'{"text": 7}', "text is not a string"),
        (None, "line too long"),
    ],
)
def test_lines_without_a_text_have_a_reason(line, reason):
    assert parse_record(line) == reason


@pytest.fixture
def serve():
    servers = []

    def start(files, **options) -> RangeServer:
        servers.append(RangeServer(files, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


CONTENT = bytes(random.Random(0).choices(range(256), k=100_000))


@pytest.mark.parametrize("faults", [["503", "502"], ["cut"], ["429"], ["cut", "500", "cut"]])
def test_what_may_pass_is_tried_again(serve, faults, monkeypatch):
    monkeypatch.setattr(read_blocks.time, "sleep", lambda seconds: None)
    server = serve({"/x": CONTENT})
    file = RangeFile(f"{server.url}/x")
    server.faults = list(faults)
    assert file.fetch(1000, 90_000) == CONTENT[1000:90_000]
    assert server.ranges[-1] == (1000, 90_000)
    assert file.transferred == server.sent - 2 * sum(f.isdigit() for f in faults)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["ignore"], "ignores Range"),
        (["other"], "asked for bytes 5-9, the server sent 'bytes 6-10/100000'"),
        (["404"], "HTTP status 404"),
        (["403"], "HTTP status 403"),
        (["503", "always"], "HTTP status 503 (2 tries)"),
        (["cut", "always"], "2 tries"),
    ],
)
def test_no_bad_answer_is_read_as_data(serve, faults, said, monkeypatch):
    monkeypatch.setattr(read_blocks.time, "sleep", lambda seconds: None)
    server = serve({"/x": CONTENT})
    file = RangeFile(f"{server.url}/x", retries=1)
    server.faults = list(faults)
    with pytest.raises(UserError, match=r"cannot read http://127") as error:
        file.fetch(5, 10)
    assert said in str(error.value)


def test_a_file_that_changes_its_size_is_refused(serve):
    server = serve({"/x": CONTENT, "/empty": b""})
    file = RangeFile(f"{server.url}/x")
    assert (file.size, RangeFile(f"{server.url}/empty").size) == (100_000, 0)
    server.files["/x"] = (50, lambda start, end: CONTENT[start:end])
    with pytest.raises(UserError, match="its size changed from 100,000 to 50"):
        file.fetch(0, 10)


def documents(n: int) -> list[dict]:
    words = [f"word{i}" for i in range(500)]
    draw = random.Random(3)
    return [
        {"text": " ".join(draw.choices(words, k=60)), "meta": {"url": f"u{i}", "title": f"é{i}"}}
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def sample(folder, tokenizer, *options, **kwargs):
    window = ("--min-tokens", 1, "--max-tokens", 9999, "--min-chars", 20_000)
    return run_stage(
        STAGE, "--output", folder, "--tokenizer", tokenizer, *window, *options, **kwargs
    )


def test_all_kinds_of_input_give_the_same_extracts(tmp_path, tokenizer, serve):
    rows = documents(300)
    plain = write_jsonl(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    flat = [{"text": row["text"], **row["meta"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "flat.parquet")
    names = ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.parquet", "flat.parquet"]
    server = serve({f"/{name}": (tmp_path / name).read_bytes() for name in names})
    (tmp_path / "list.txt").write_text("\n".join(f"{server.url}/{name}" for name in names[1:4]))
    inputs = [tmp_path / name for name in names] + [f"{server.url}/{name}" for name in names]
    inputs += [tmp_path / "in*.gz", tmp_path / "list.txt"]  # 14 files in all
    sample(tmp_path / "out", tokenizer, "--input", *inputs)
    counts = json.loads((tmp_path / "out/report.json").read_text())["sources"]["wikipedia"]
    assert counts["documents read"] == 14 * 300
    assert counts["train kept"] == 300
    assert counts["train dropped: repeated document"] == 13 * 300
    texts = {r["url"]: r["text"] for r in read_jsonl(tmp_path / "out/train.jsonl")}
    assert texts == {row["meta"]["url"]: row["text"] for row in rows}


def test_compressed_files_are_sampled_by_line(tmp_path, tokenizer):
    lines = "".join(json.dumps(row) + "\n" for row in documents(2000))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    options = ("--input", tmp_path / "in.jsonl.gz", "--fraction", 0.2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample(tmp_path / name, tokenizer, *options, "--seed", seed)
    one, same, other = (
        {r["id"] for r in read_jsonl(tmp_path / f"{name}/train.jsonl")} for name in "abc"
    )
    assert one == same != other and 330 < len(one) < 470  # 400 ± 18


class RangeHub(Hub):
    """The Hub that serves ranges and asks for its token."""

    def send_file(self, request, commit: str, files: dict, path: str) -> None:
        start, end = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        content = files[path][start : end + 1]
        request.send_response(206)
        told = f"bytes {start}-{start + len(content) - 1}/{len(files[path])}"
        request.send_header("Content-Range", told)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


def test_files_of_a_hub_dataset(tmp_path, tokenizer):
    hub = RangeHub()
    lines = "".join(json.dumps(row) + "\n" for row in documents(50)).encode()
    hub.put("datasets/me/docs", {"one.jsonl": lines, "two.jsonl": lines, "card.md": b""})
    hub.private["datasets/me/docs"] = True
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    for name, path in (
        ("a", "hf://datasets/me/docs/one.jsonl"),
        ("b", "hf://datasets/me/docs/*.jsonl"),
    ):
        result = sample(tmp_path / name, tokenizer, "--input", path, **environment)
        assert len(read_jsonl(tmp_path / f"{name}/train.jsonl")) == 50
    assert "| train dropped: repeated document | " in " ".join(result.stdout.split())
    assert TOKEN not in "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*.json*"))


def test_one_percent_of_a_2_gb_file_transfers_no_more_than_1_2_percent(tmp_path, tokenizer, serve):
    draw, lines, length = random.Random(5), [], 0
    while length < 4 << 20:  # lines as long as arXiv's, 60 kB in the mean, repeated 500 times
        text = "A word and another. " * int(draw.lognormvariate(7.6, 0.8))
        lines.append(json.dumps({"text": text, "meta": {"url": f"u{len(lines)}"}}).encode() + b"\n")
        length += len(lines[-1])
    page = b"".join(lines)
    size = 2_000_000_000 // len(page) * len(page)

    def read(start: int, end: int) -> bytes:
        first, last = start // len(page), -(-end // len(page))
        return (page * (last - first))[start - first * len(page) : end - first * len(page)]

    server = serve({"/wikipedia/wiki.jsonl": (size, read)})
    options = ("--input", f"{server.url}/wikipedia/wiki.jsonl", "--fraction", 0.01)
    sample(tmp_path, tokenizer, *options, "--min-chars", 1000, "--max-chars", 10_000_000)
    assert 0.0095 * size < server.sent <= 0.012 * size
    report = json.loads((tmp_path / "report.json").read_text())["sources"]["wikipedia"]
    assert report["MB transferred"] == pytest.approx(server.sent / 1e6, rel=0.001)
    whole = sum(map(len, lines)) / len(lines)
    assert report["documents read"] == pytest.approx(0.01 * size / whole, rel=0.2)
    assert not [row for row in report if "JSON" in row or "UTF" in row]  # no torn line was read
    starts = sorted(start for start, end in server.ranges if end - start > 500_000)
    assert len(set(starts)) == len(starts) == 20 and starts[-1] - starts[0] > size / 2
