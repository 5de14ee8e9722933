"""Byte ranges: every line once, only what is drawn is transferred, no bad answer read as data."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import zipfile
from collections import Counter
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import read_jsonl, run_stage, write_jsonl
from hub_server import TOKEN, Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import RangeServer

from common.cli import UserError
from data_prep import read_blocks
from data_prep.find_inputs import expand, is_document
from data_prep.read_blocks import AHEAD, draw_units, read_block, read_unit
from data_prep.select_extracts import parse_line

STAGE = "data_prep.sample_extracts"
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
LINES = st.lists(st.tuples(st.text(max_size=9).map(str.encode), ENDS), max_size=12)


@settings(deadline=None, max_examples=60)
@given(LINES, st.binary(max_size=5), st.integers(1, 40), st.integers(1, 7))
def test_over_all_blocks_every_line_is_read_once(tmp_path_factory, lines, last, block, ahead):
    lines = [(b"{}", b"\n"), *lines]  # by its first bytes it is JSON Lines
    content = b"".join(line + end for line, end in lines) + last.replace(b"\n", b"")
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_bytes(content)
    borders, size = [*range(0, len(content), block), len(content)], len(content)
    units = [(str(path), size, start, end) for start, end in pairwise(borders)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_blocks, "AHEAD", ahead)
        found = [line for unit in units for line in read_unit(unit, 1.0, 0)]
    assert found == list(filter(bytes.strip, content.split(b"\n")))


@pytest.fixture
def files(tmp_path):
    """Makes sparse files of these sizes."""

    def make(*sizes: int) -> list[str]:
        for number, size in enumerate(sizes):
            with (tmp_path / f"{number}.jsonl").open("wb") as file:
                file.truncate(size)
        return [str(tmp_path / f"{number}.jsonl") for number in range(len(sizes))]

    return make


@pytest.mark.parametrize("fraction", [0.013, 0.37, 1.0])
@pytest.mark.parametrize("sizes", [(0,), (1,), (5000, 40_000_000), (200_000_000, 3 << 20, 77)])
def test_blocks_are_drawn_without_replacement_and_are_the_share_asked_for(files, fraction, sizes):
    units = draw_units(files(*sizes), fraction, 3)
    assert len(set(units)) == len(units) and units == draw_units(files(*sizes), fraction, 3)
    every = draw_units(files(*sizes), 1, 3)
    assert sum(end - start for *_, start, end in every) == sum(sizes)
    if fraction == 1:
        assert units == every
    if len(units) > 20:
        drawn = sum(end - start for *_, start, end in units) / sum(sizes)
        assert drawn == pytest.approx(fraction, rel=0.1)


def test_every_block_has_the_same_chance(files):
    paths = files(40 << 20, 10 << 20, 4000)  # the last is a single block
    drawn = Counter(unit for seed in range(400) for unit in draw_units(paths, 0.5, seed))
    assert len(drawn) == 81 and 150 < min(drawn.values()) <= max(drawn.values()) < 250  # 200 ± 10


@pytest.fixture
def serve():
    servers = []

    def start(files, **options) -> RangeServer:
        servers.append(RangeServer(files, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


NUMBERS = [b"%09d" % i for i in range(400_000)]
CONTENT = b"\n".join(NUMBERS) + b"\n"


def unit_of(server: RangeServer, start: int, end: int) -> tuple:
    return f"{server.url}/x", server.files["/x"][0], start, end


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(read_blocks, "PAUSES", (0, 0, 0, 0))


@pytest.mark.parametrize("faults", [["503", "502"], ["cut"], ["429"], ["cut", "500", "cut"]])
def test_what_may_pass_is_tried_again(serve, faults, no_pauses):
    server = serve({"/x": CONTENT})
    server.faults = list(faults)
    assert list(read_unit(unit_of(server, 1000, 61_000), 1, 0)) == NUMBERS[101:6101]
    assert not server.faults


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (["ignore", "always"], "doesn't appear to support range requests"),
        (["404"], "404, message='Not Found'"),
        (["403"], "403, message='Forbidden'"),
        (["503", "always"], "503, message='Service Unavailable'"),
        (["cut", "always"], "Not enough data"),
    ],
)
def test_no_bad_answer_is_read_as_data(serve, faults, reason, no_pauses):
    server = serve({"/x": CONTENT})
    server.faults = list(faults)
    with pytest.raises(UserError, match=r"cannot read http://127") as error:
        list(read_unit(unit_of(server, 5000, 6000), 1, 0))
    assert reason in str(error.value)


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(serve, no_pauses):
    size = 4_000_000_000
    server = serve({"/x": (size, lambda start, end: b"7\n" * (min(end - start, 9 << 20) // 2))})
    server.faults = ["ignore", "always"]
    with pytest.raises(UserError, match="range requests"):
        list(read_unit(unit_of(server, 1 << 30, (1 << 30) + 9), 1, 0))


def test_a_block_is_transferred_once_and_little_beyond_it(serve):
    server = serve({"/x": CONTENT})
    for number in (0, 1, 3):
        start, before = number << 20, server.sent
        end = min(4_000_000, start + (1 << 20))
        found = read_block(*unit_of(server, start, end))[:-1]  # nothing behind the last line's end
        assert found == NUMBERS[-(-start // 10) : end // 10 + (end < 4_000_000)]
        assert server.sent - before <= end - start + AHEAD
    assert len(server.ranges) == 3


def documents(n: int) -> list[dict]:
    words = [f"word{i}" for i in range(500)]
    draw = random.Random(3)
    return [
        {"text": " ".join(draw.choices(words, k=60)), "meta": {"url": f"u{i}", "title": f"é{i}"}}
        for i in range(n)
    ]


def sample(folder, tokenizer, *options, **kwargs):
    window = ("--whole", "--min-tokens", 1, "--max-tokens", 9999, "--min-chars", 20_000)
    return run_stage(STAGE, "--data", folder, "--tokenizer", tokenizer, *window, *options, **kwargs)


@pytest.mark.slow
def test_all_kinds_of_input_give_the_same_extracts(tmp_path, tokenizer, serve):
    rows = documents(300)
    plain = write_jsonl(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
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
    report = " ".join((tmp_path / "out/extracts/report.md").read_text().split())
    assert "| train | 300 | 300 |" in report and "of 4,200 records" in report
    assert "| dropped: near duplicate | 3,900 | 3,900 |" in report
    texts = {r["url"]: r["text"] for r in read_jsonl(tmp_path / "out/extracts/train.jsonl")}
    assert texts == {row["meta"]["url"]: row["text"] for row in rows}


@pytest.mark.slow
def test_compressed_files_are_sampled_by_line(tmp_path, tokenizer):
    lines = "".join(json.dumps(row) + "\n" for row in documents(2000))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    options = ("--input", tmp_path / "in.jsonl.gz", "--fraction", 0.2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample(tmp_path / name, tokenizer, *options, "--seed", seed)
    one, same, other = (
        {r["id"] for r in read_jsonl(tmp_path / f"{name}/extracts/train.jsonl")} for name in "abc"
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
        assert len(read_jsonl(tmp_path / f"{name}/extracts/train.jsonl")) == 50
    assert "| dropped: near duplicate | " in " ".join(result.stdout.split())
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
    report = (tmp_path / "extracts/report.md").read_text()
    (read,) = re.findall(r"of ([\d,]+) records", report)
    whole = sum(map(len, lines)) / len(lines)
    assert int(read.replace(",", "")) == pytest.approx(0.01 * size / whole, rel=0.2)
    assert "JSON" not in report  # no torn line was read
    starts = sorted(start for start, end in server.ranges if end - start > 500_000)
    assert len(set(starts)) == len(starts) == 20 and starts[-1] - starts[0] > size / 2


TAR = b"a" + b"\0" * 256 + b"ustar  " + b"\0" * 300
LINES_OF_TWO = b'{"text": "one"}\n{"text": "two"}\n'
PARQUET = pyarrow.Table.from_pylist([{"text": b"one", "x": 1}, {"text": b"two", "x": 2}])


def parquet_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(PARQUET, sink)
    return sink.getvalue().to_pybytes()


def zip_bytes(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def read_all(path) -> list[str]:
    (unit,) = draw_units([str(path)], 1, 0)
    lines = list(read_unit(unit, 1.0, 0))
    rows = [line if isinstance(line, dict) else parse_line(line) for line in lines]
    return [row["text"].decode() if isinstance(row["text"], bytes) else row["text"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES_OF_TWO.decode().encode("utf-16")),
        ("x.jsonl", LINES_OF_TWO.decode().encode("utf-16-be")),
        ("x.jsonl", LINES_OF_TWO.decode().encode("utf-32")),
        ("x.jsonl.gz", gzip.compress(LINES_OF_TWO.decode().encode("utf-16"), mtime=0)),
        ("x.JSONL.GZ", gzip.compress(LINES_OF_TWO, mtime=0)),
        (
            "x.jsonl",
            gzip.compress(LINES_OF_TWO, mtime=0),
        ),  # compressed, although its name does not say so
        ("x.jsonl.gz", LINES_OF_TWO),  # nor is this, although its name does
        ("x.bz2", bz2.compress(LINES_OF_TWO)),
        ("x.xz", lzma.compress(LINES_OF_TWO)),
        ("x.zst", zstandard.compress(LINES_OF_TWO[:16]) + zstandard.compress(LINES_OF_TWO[16:])),
        ("x.zip", zip_bytes(a=LINES_OF_TWO)),
        ("x.PARQUET", parquet_bytes()),
        ("with space [1]*?#.jsonl", LINES_OF_TWO),
        ("a::b.jsonl", LINES_OF_TWO),
    ],
)
def test_a_file_is_what_its_bytes_say(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert expand(str(path)) == [str(path)]
    assert read_all(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.csv", b"text,url\none,u\n", "a CSV table"),
        ("x.json", b'[{"text": "one"}, {"text": "two"}]', "a JSON array"),
        ("x.json", b'[\n {"text": "one"}\n]', "a JSON array"),
        ("x.json", b'{\n "text": "one"\n}\n', "JSON with an object over several lines"),
        ("x.docx", zip_bytes(a=b"x", b=b"y"), "a zip archive or an Office file"),
        ("x.pdf", b"%PDF-1.7 ...", "a PDF"),
        (
            "x.tar.gz",
            gzip.compress(b"a" + b"\0" * 256 + b"ustar  " + b"\0" * 300, mtime=0),
            "a tar archive",
        ),
        ("x.html", b"<!DOCTYPE html><p>one", "HTML or XML"),
    ],
)
def test_a_form_that_is_not_read_is_named_and_others_are_read(
    tmp_path, capsys, name, content, what
):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(LINES_OF_TWO)
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=rf"{re.escape(path)}: {what}.*not read"):
        draw_units([path], 1, 0)
    assert len(draw_units([path, str(tmp_path / "good.jsonl")], 1, 0)) == 1
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.zst", zstandard.compress(LINES_OF_TWO * 9000)[:-9]), ("x.zip", zip_bytes(a=b"x", b=b"y"))],
)
def test_a_cut_file_is_not_taken_for_a_whole_one(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"broken|archive of 2 files"):
        read_all(tmp_path / name)


def test_names_of_files_in_lists(tmp_path):
    for name in ("one", "with space", "two [1]"):
        (tmp_path / f"{name}.jsonl").write_bytes(LINES_OF_TWO)
    (tmp_path / "sub.jsonl").mkdir()
    names = [f"{tmp_path}/{name}.jsonl" for name in ("one", "with space", "two [1]")]
    lists = tmp_path / "list.txt"
    lists.write_text("\r\n".join([names[1], "", f"{names[0]} {names[0]}", names[2]]), "utf-16")
    assert expand(str(lists)) == [names[1], names[0], names[0], names[2]]
    assert expand(f"{tmp_path}/*.jsonl") == sorted(names)  # folders are passed over
    outer = tmp_path / "outer.txt"
    for content, message in (
        (f"{outer}\n", "a list that names itself"),
        (f"{tmp_path}/{'x' * 5000}.jsonl", "no file matches"),
        (
            f"{names[0]}\ngone.jsonl",
            'gone.jsonl in .*read as a list of files.*"gone.jsonl" is none',
        ),
    ):
        outer.write_text(content)
        with pytest.raises(UserError, match=message):
            expand(str(outer))


@pytest.mark.parametrize(
    ("text", "is_text"),
    [
        ("", True),
        ("A text it is.\nNo list.\n", True),
        ("https://example.org/where-it-is-from\n\nA saved page.\nIt has lines.\n", True),
        ('{"text": "one"}', False),
    ],
)
def test_a_txt_that_is_no_list_is_a_text(tmp_path, text, is_text):
    path = tmp_path / "in.txt"
    path.write_text(text)
    assert expand(str(path)) == [str(path)] and is_document(str(path)) == is_text


def test_of_a_folder_all_is_read_but_what_is_made_in_it(tmp_path):
    names = ["a.PDF", "b.md", "c.jsonl", "d/e.json.gz", "f.parquet", "g.htm"]
    for name in [*names, "h.csv", "i.txt.gz", "data/extracts/train.jsonl"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = expand(str(tmp_path), tmp_path / "data/extracts")
    assert found == [str(tmp_path / name) for name in names]
    assert [name for name in names if is_document(str(tmp_path / name))] == [
        *("a.PDF", "b.md", "g.htm")
    ]


@pytest.mark.parametrize(
    ("address", "is_text"),
    [("https://a.org/x", True), ("https://a.org/x.pdf?y=z.json", True), ("arXiv:2401.00001", True),
     ("https://a.org/x.jsonl?download=true", False), ("https://a.org/x.csv.gz", False),
     ("http://a.org/x.zst", False)],
)  # fmt: skip
def test_an_address_is_of_a_text_or_of_records(address, is_text):
    assert is_document(address) == is_text and expand(address) == [address]


def test_names_that_lead_to_no_file(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "dead.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("loop", "dead", "pipe", "folder", "[1]", "x" * 5000, "*"):
        with pytest.raises(UserError, match=r"no file matches|cannot read|there is no .* in"):
            expand(f"{tmp_path}/{name}.jsonl")
