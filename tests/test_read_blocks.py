"""Byte ranges: every line once, only what is drawn is transferred, no bad answer read as data."""

import gzip
import io
import json
import random
from collections import Counter
from itertools import pairwise

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
    AHEAD,
    Unit,
    block_lines,
    draw_units,
    file_size,
    open_unit,
    parse_record,
    subset_of,
)

STAGE = "data_prep.sample_extracts"
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
LINES = st.lists(st.tuples(st.text(max_size=9).map(str.encode), ENDS), max_size=12)


def lines_of_blocks(file: io.BufferedReader, size: int, block: int) -> list[tuple[int, bytes]]:
    borders = [*range(0, size, block), size]
    return [one for start, end in pairwise(borders) for one in block_lines(file, start, end)]


@settings(deadline=None)
@given(LINES, st.binary(max_size=5), st.integers(1, 40), st.integers(1, 7))
def test_over_all_blocks_every_line_is_read_once(lines, last, block, buffer):
    content = b"".join(line + end for line, end in lines) + last.replace(b"\n", b"")
    file = io.BufferedReader(io.BytesIO(content), buffer)
    expected = io.BytesIO(content).readlines()
    offsets = [sum(map(len, expected[:i])) for i in range(len(expected))]
    found = lines_of_blocks(file, len(content), block)
    assert found == list(zip(offsets, expected, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 50), st.integers(1, 40))
def test_too_long_lines_are_named_and_no_others_are_lost(lengths, block, longest):
    lines = [b"7" * n + b"\n" for n in lengths]
    content = b"".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_blocks, "LONGEST_LINE", longest)
        found = lines_of_blocks(io.BufferedReader(io.BytesIO(content), 4), len(content), block)
        reasons = [parse_record(line) for _, line in found]
    assert [reason == "line too long" for reason in reasons] == [n >= longest for n in lengths]
    short = [line for line in lines if len(line) <= longest]
    assert [line for _, line in found if len(line) <= longest] == short


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


def test_the_subset_is_known_by_the_published_names():
    base = "https://data.together.xyz/redpajama-data-1T/v1.0.0"
    assert subset_of(f"{base}/arxiv/arxiv_0.jsonl") == "arxiv"
    assert subset_of(f"{base}/wikipedia/wiki.jsonl") == "wikipedia"
    assert subset_of("hf://datasets/t/RedPajama-Data-1T-Sample/stackexchange_sample.jsonl") == (
        "stackexchange"
    )
    assert subset_of("/home/book/github/a/my/docs/notes.jsonl") == "other"
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
        (b"x" * (read_blocks.LONGEST_LINE + 1), "line too long"),
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


def unit_of(server: RangeServer, retries: int = 6, ahead: int = 1 << 12) -> io.BufferedReader:
    size = file_size(f"{server.url}/x", 0)
    return open_unit(Unit(f"{server.url}/x", size, 0, size), ahead, retries)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(read_blocks.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("faults", [["503", "502"], ["cut"], ["429"], ["cut", "500", "cut"]])
def test_what_may_pass_is_tried_again(serve, faults, no_pauses):
    server = serve({"/x": CONTENT})
    file = unit_of(server)
    server.faults = list(faults)
    file.seek(1000)
    assert file.read(60_000) == CONTENT[1000:61_000]
    assert not server.faults


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (["ignore"], "the server ignores Range; download the file"),
        (["404"], "HTTP status 404"),
        (["403"], "HTTP status 403"),
        (["503", "always"], "HTTP status 503"),
        (["cut", "always"], "Not enough data"),
    ],
)
def test_no_bad_answer_is_read_as_data(serve, faults, reason, no_pauses):
    server = serve({"/x": CONTENT})
    file = unit_of(server, retries=1)
    server.faults = list(faults)
    file.seek(5000)
    with pytest.raises(UserError, match=r"cannot read http://127") as error:
        file.read(5)
    assert reason in str(error.value)


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(serve):
    size = 4_000_000_000
    server = serve({"/x": (size, lambda start, end: b"7\n" * (min(end - start, 9 << 20) // 2))})
    server.faults = ["ignore", "always"]
    with pytest.raises(UserError, match="ignores Range"):
        list(block_lines(unit_of(server), 1 << 30, (1 << 30) + 9))


def test_a_file_that_changes_its_size_is_refused(serve, no_pauses):
    server = serve({"/x": CONTENT, "/empty": b""})
    file = unit_of(server, retries=1)
    assert file_size(f"{server.url}/empty", 0) == 0
    server.files["/x"] = (50, lambda start, end: CONTENT[start:end])
    with pytest.raises(UserError, match="has the file changed"):
        file.read(10)


def test_a_200_mb_line_is_passed_over_in_little_memory(serve):
    size = 200_000_000
    server = serve({"/x": (size, lambda start, end: b"x" * (end - start))})
    file = unit_of(server, ahead=AHEAD)
    ((offset, line),) = block_lines(file, 0, 1 << 20)
    assert offset == 0 and parse_record(line) == "line too long"
    assert server.sent < 2 * read_blocks.LONGEST_LINE
    assert not list(block_lines(file, 5 << 20, 6 << 20))  # no line starts in there


def test_a_block_is_transferred_once_and_little_beyond_it(serve):
    lines = [b"%09d\n" % i for i in range(400_000)]
    server = serve({"/x": b"".join(lines)})
    for number in (0, 1, 3):
        start, before = number << 20, server.sent
        unit = Unit(f"{server.url}/x", 4_000_000, start, min(4_000_000, start + (1 << 20)))
        with open_unit(unit, AHEAD, 0) as file:
            found = [line for _, line in block_lines(file, start, unit.end)]
        assert found == lines[-(-start // 10) : unit.end // 10 + (unit.end < 4_000_000)]
        assert server.sent - before <= unit.end - start + AHEAD
    assert len(server.ranges) == 3


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


@pytest.mark.slow
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
    counts = json.loads((tmp_path / "out/report.json").read_text())["sources"]["other"]
    assert counts["documents read"] == 14 * 300
    assert counts["train kept"] == 300
    assert counts["train dropped: repeated document"] == 13 * 300
    texts = {r["url"]: r["text"] for r in read_jsonl(tmp_path / "out/train.jsonl")}
    assert texts == {row["meta"]["url"]: row["text"] for row in rows}


@pytest.mark.slow
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
        part = f"bytes {start}-{start + len(content) - 1}/{len(files[path])}"
        request.send_header("Content-Range", part)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert report["MB drawn"] == pytest.approx(0.01 * size / 1e6, rel=0.01)
    whole = sum(map(len, lines)) / len(lines)
    assert report["documents read"] == pytest.approx(0.01 * size / whole, rel=0.2)
    assert not [row for row in report if "JSON" in row or "UTF" in row]  # no torn line was read
    starts = sorted(start for start, end in server.ranges if end - start > 500_000)
    assert len(set(starts)) == len(starts) == 20 and starts[-1] - starts[0] > size / 2
