"""The stage through its command line: windows, caps, resuming, executors, its report, bad input."""

import gzip
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, one_error_line, read_jsonl, run_stage, write_jsonl
from range_server import RangeServer

from common.files import mark_made
from data_prep import extract_options, read_blocks
from data_prep.sample_extracts import parse_options, settings_of

STAGE = "data_prep.sample_extracts"


WIKI = "https://en.wikipedia.org/wiki/"


def document(number: int, words: int, **meta) -> dict:
    text = "\n\n".join(f"Paragraph {i} of {number} says it." for i in range(words // 6))
    url = f"{WIKI}u{number}"
    return {"text": text, "meta": {"title": f"t{number}", "url": url, **meta}}


def names(records: list[dict]) -> set[str]:
    return {record["url"].removeprefix(WIKI) for record in records}


def sample(tmp_path, tokenizer, *options, **kwargs):
    return run_stage(STAGE, "--data", tmp_path, "--tokenizer", tokenizer, *options, **kwargs)


def report_of(folder: Path) -> dict[str, dict[str, int]]:
    """The numbers over 0 in a folder's report.md, by source and row."""
    rows = (folder / "report.md").read_text().split("\n\n")[0].splitlines()
    (_, *sources), _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    numbers = {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows}
    return {
        source: {name: cells[i] for name, cells in numbers.items() if cells[i]}
        for i, source in enumerate(sources)
    }


WINDOWS = [
    "--whole",
    "--min-tokens",
    200,
    "--max-tokens",
    2000,
    "--min-chars",
    10_000,
    "--max-chars",
    30_000,
]


@pytest.mark.slow
def test_whole_documents_fall_into_their_windows(tmp_path, tokenizer):
    rows = [document(n, words) for n, words in enumerate([30, 120, 120, 300, 4000, 9000])]
    rows += [
        rows[1],
        {**rows[2], "meta": {**rows[2]["meta"], "url": f"{WIKI}copy"}},
        document(7, 120, language="de"),
    ]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    with path.open("ab") as file:
        file.write(b'{"text": "torn\n')
    sample(tmp_path, tokenizer, "--input", path, *WINDOWS, fresh=True)
    train, test = (read_jsonl(tmp_path / "extracts" / f"{s}.jsonl") for s in ("train", "test"))
    assert names(train) in ({"u1", "u2", "u3"}, {"u1", "copy", "u3"})
    assert names(test) == {"u4"}
    assert all(200 < r["n_tokens"] < 2000 and r["n_chars"] == len(r["text"]) for r in train)
    assert set(train[0]) == set(test[0]) == {"id", "source", "url", "text", "n_chars", "n_tokens"}
    counts = report_of(tmp_path / "extracts")
    assert counts["wikipedia"] == {
        "dropped: not English": 1,
        "dropped: outside the windows": 2,
        "dropped: near duplicate": 2,  # one by its id
        "train": 3,
        "test": 1,
    }
    assert counts["other"] == {"dropped: not JSON with a text": 1}
    assert not (tmp_path / "extracts/unfinished").exists()


def prose(draw: random.Random, words: int) -> str:
    """Sentences no other document has, in paragraphs."""
    sentences = (
        f"{draw.randrange(10**9):x} says {draw.randrange(10**6)}." for _ in range(words // 3)
    )
    return "\n\n".join(" ".join(sentence) for sentence in zip(*[iter(sentences)] * 5, strict=False))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """400 documents of three sources, near duplicates and leaks among them."""
    draw, rows = random.Random(4), []
    metas = {
        WIKI: {"title": "t"},
        "arxiv": {"arxiv_id": "1", "source": "arxiv"},
        "stackexchange": {"question_score": "2", "source": "stackexchange"},
    }
    for number in range(400):
        meta = metas[draw.choice([WIKI, WIKI, "arxiv", "stackexchange"])]
        text = prose(draw, 2400 if number % 8 == 0 else 160)
        rows.append({"text": text, "meta": {**meta, "url": f"{WIKI * ('title' in meta)}u{number}"}})
    for number in (1, 2, 3):  # nearly the same, and a passage of a test document
        rows.append({**rows[number], "text": rows[number]["text"] + " Mirror."})
        rows[-1]["meta"] = {**rows[number]["meta"], "url": f"{WIKI}mirror{number}"}
    leak = " ".join(rows[8]["text"].split()[500:560])
    rows.append({"text": f"{prose(draw, 160)}\n\n{leak}", "meta": {"url": "leak"}})
    rows.append({"text": "\\input{a}\n" * 70, "meta": {"arxiv_id": "2", "url": "shell"}})
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "in.jsonl", rows)


@pytest.fixture(scope="module")
def reference(corpus, tokenizer, tmp_path_factory) -> Path:
    """The folder that a plain run on the corpus makes."""
    folder = tmp_path_factory.mktemp("reference")
    sample(folder, tokenizer, "--input", corpus, *WINDOWS, "--workers", 2)
    return folder / "extracts"


def texts_of(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.jsonl").read_bytes() for split in ("train", "test")]


@pytest.mark.slow
def test_nothing_kept_repeats_or_leaks(reference):
    train, test = (read_jsonl(reference / f"{split}.jsonl") for split in ("train", "test"))
    urls = names(train)
    assert (len(train), len(test)) == (350, 50)
    assert all(len({f"u{n}", f"mirror{n}"} & urls) == 1 for n in (1, 2, 3))
    assert "leak" not in urls and "shell" not in urls
    counts = report_of(reference)["all"]
    assert counts["dropped: near duplicate"] == 3
    assert counts["dropped: shares a run of words with a test document"] == 1
    assert counts["dropped: no prose"] == 1
    assert sum(counts.values()) == 405 and counts["train"] + counts["test"] == 400
    assert set(report_of(reference)) == {"all", "arxiv", "other", "stackexchange", "wikipedia"}


def test_the_report_lies_beside_the_extracts(reference):
    table = (reference / "report.md").read_text()
    assert re.search(r"\| train +\|", table) and "of 405 records" in table


@pytest.mark.slow
def test_workers_do_not_change_the_extracts(tmp_path, tokenizer, corpus, reference):
    sample(tmp_path, tokenizer, "--input", corpus, *WINDOWS, "--workers", 1)
    assert texts_of(tmp_path / "extracts") == texts_of(reference)
    again = sample(tmp_path, tokenizer, "--input", corpus, *WINDOWS, "--workers", 3)
    assert "is done with these settings" in again.stdout


@pytest.mark.slow
def test_caps_keep_the_first_of_the_seeded_order(tmp_path, tokenizer, corpus, reference):
    options = ["--input", corpus, *WINDOWS, "--train", 60, "--test", 9, "--max-per-source", 25]
    sample(tmp_path, tokenizer, *options)
    train = read_jsonl(tmp_path / "extracts/train.jsonl")
    expected = read_jsonl(reference / "train.jsonl")
    per_source = Counter(r["source"] for r in train)
    for source, number in per_source.items():
        firsts = [r["id"] for r in expected if r["source"] == source][:number]
        assert [r["id"] for r in train if r["source"] == source] == firsts
    assert len(train) == 60 and max(per_source.values()) == 25
    assert len(read_jsonl(tmp_path / "extracts/test.jsonl")) == 9
    assert report_of(tmp_path / "extracts")["all"]["dropped: over the cap"] > 300


@pytest.mark.slow
def test_own_files_are_of_a_source_of_their_own(tmp_path, tokenizer, corpus):
    rows = [{"text": row["text"]} for row in read_jsonl(corpus)[:60]]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    caps = ["--max-per-source", 20, "--source-name", "mail"]
    sample(tmp_path, tokenizer, "--input", path, corpus, *WINDOWS, *caps)
    counts = report_of(tmp_path / "extracts")["mail"]
    assert sum(counts.values()) == 62 and counts["train"] == 20  # the corpus has two
    assert counts["dropped: over the cap"] > 0
    train = read_jsonl(tmp_path / "extracts/train.jsonl")
    sources = ("arxiv", "mail", "stackexchange", "wikipedia")
    assert Counter(r["source"] for r in train) == dict.fromkeys(sources, 20)


def test_a_changed_input_is_not_reported_as_done(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "in.jsonl", [document(n, 120) for n in range(3)])
    options = ["--input", tmp_path / "*.jsonl", *WINDOWS]
    sample(tmp_path, tokenizer, *options)
    assert "is done" in sample(tmp_path, tokenizer, *options).stdout
    write_jsonl(path, [document(n, 120) for n in range(4)])
    changed = sample(tmp_path, tokenizer, *options, code=1)
    assert "was made with other settings or input; delete it" in one_error_line(changed)


def command(folder: Path, tokenizer: Path, *options: object) -> list[str]:
    stage = [sys.executable, "-m", STAGE, "--data", folder, "--tokenizer", tokenizer]
    return list(map(str, [*stage, *options]))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, tokenizer, corpus, reference, how):
    server = RangeServer({"/in.jsonl": corpus.read_bytes()}, delay=0.1)
    options = ["--input", f"{server.url}/in.jsonl", *WINDOWS, "--workers", 2]  # 20 blocks
    marks = tmp_path / "extracts/unfinished/logs/completions"
    process = subprocess.Popen(
        command(tmp_path, tokenizer, *options),
        cwd=ROOT,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(list(marks.glob("*"))) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, how)
    message = process.communicate()[1]
    done, before = len(list(marks.glob("*"))), len(server.ranges)
    assert 3 <= done < 20 and not (tmp_path / "extracts/train.jsonl").exists()
    if how == signal.SIGINT:
        assert "the same command goes on from here" in message and "Traceback" not in message
        assert process.returncode == 130
    sample(tmp_path, tokenizer, *options, "--workers", 1)
    assert texts_of(tmp_path / "extracts") == texts_of(reference)
    assert len(server.ranges) - before <= 2 * (20 - done) + 2  # what was complete is not read again
    server.close()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, tokenizer, corpus, reference):
    options = ["--input", corpus, *WINDOWS, "--workers", 1]

    def allow_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    full = subprocess.run(
        command(tmp_path, tokenizer, *options),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        preexec_fn=allow_small_files,
    )
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert re.search(r"error: File too large.*what was finished is kept", full.stderr)
    other = sample(tmp_path, tokenizer, *options, "--seed", 5, code=1)
    assert "was made with other settings or input" in one_error_line(other)
    sample(tmp_path, tokenizer, *options)
    assert texts_of(tmp_path / "extracts") == texts_of(reference)


@pytest.mark.slow
def test_passages_split_by_document_in_a_seeded_order(tmp_path, tokenizer):
    rows = [document(n, 600) for n in range(30)]
    plain = write_jsonl(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    window = ["--min-tokens", 100, "--max-tokens", 300, "--min-chars", 200, "--max-chars", 800]
    options = ["--passages", *window]
    sample(tmp_path, tokenizer, "--input", plain, *options)
    train, test = (read_jsonl(tmp_path / "extracts" / f"{s}.jsonl") for s in ("train", "test"))
    assert train and test
    assert not {r["url"] for r in train} & {r["url"] for r in test}
    assert len({r["id"] for r in train + test}) == len(train + test)
    assert all(200 <= r["n_chars"] <= 800 for r in test)
    other = sample(tmp_path, tokenizer, "--input", plain, "--passages", code=1)
    assert "was made with other settings" in one_error_line(other)
    sample(tmp_path / "z", tokenizer, "--input", tmp_path / "in.jsonl.gz", *options, "--train", 5)
    assert read_jsonl(tmp_path / "z/extracts/train.jsonl") == train[:5]


def test_a_broken_file_or_a_dead_url_is_one_line(tmp_path, tokenizer, corpus):
    packed = gzip.compress(corpus.read_bytes(), mtime=0)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "no.parquet").write_bytes(b"no parquet")
    server = RangeServer({"/good.jsonl": corpus.read_bytes()})
    (tmp_path / "list.txt").write_text(f"{server.url}/good.jsonl\n{server.url}/dead.jsonl\n")
    for name, message in (
        ("cut.jsonl.gz", "cut.jsonl.gz: broken, "),
        ("no.parquet", "no.parquet: broken, "),
        ("list.txt", f"cannot read {server.url}/dead.jsonl: 404, message='Not Found'"),
    ):
        result = sample(tmp_path / name[:2], tokenizer, "--input", tmp_path / name, code=1)
        assert message in one_error_line(result)
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "nowhere.jsonl"], "no file matches nowhere.jsonl"),
        (["--input", "*.nothing"], "no file matches *.nothing"),
        (["--input", __file__, "nowhere.jsonl"], "no file matches nowhere.jsonl"),
        (["--input", "http://127.0.0.1:9/x.jsonl"], "cannot read http://127.0.0.1:9/x"),
        (["--input", "hf://datasets/me/x/y.jsonl"], "hf://datasets/me/x/y.jsonl"),
        (["--input", "odd.jsonl"], "no document falls into the windows"),
        (["--input", "odd.jsonl"], ": not JSON with a text"),
        (["--input", os.devnull], "it is no regular file"),
        (["--input", __file__, "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, tokenizer, options, message, monkeypatch):
    monkeypatch.setattr(read_blocks, "PAUSES", (0, 0))
    (tmp_path / "odd.jsonl").write_text("It is no JSON.\n")
    assert message in one_error_line(sample(tmp_path, tokenizer, *options, code=1, cwd=tmp_path))


@pytest.mark.slow
def test_of_red_pajama_only_the_folders_asked_for_are_read(
    tmp_path, tokenizer, corpus, monkeypatch
):
    part = b"".join(corpus.read_bytes().splitlines(True)[1:60])
    server = RangeServer({f"/v1/{name}/x.jsonl": part for name in ("arxiv", "wikipedia", "c4")})
    urls = "\n".join(f"{server.url}{path}" for path in [*server.files, "/v1/book/missing.jsonl"])
    (tmp_path / "urls.txt").write_text(urls)
    monkeypatch.setattr(extract_options, "RED_PAJAMA", [str(tmp_path / "urls.txt")])
    options = ["--sources", "wikipedia", "arxiv", "--fraction", 1]
    sample(tmp_path / "data", tokenizer, *WINDOWS, *options)
    assert "of 118 records" in (tmp_path / "data/extracts/report.md").read_text()
    server.close()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--frobnicate",),
        *(("--fraction", value) for value in (-1, 0, 1.5, "nan", "inf")),
        ("--min-tokens", -1),
        ("--min-tokens", 1800),  # as many as the default of --max-tokens
        ("--min-tokens", 1799),
        ("--max-tokens", "nan"),
        ("--min-chars", -5),
        ("--max-chars", 5),
        ("--train", 0),
        ("--max-per-source", -1),
        ("--workers", 0),
        ("--seed", 1.5),
    ],
)
def test_wrong_usage_exits_with_2(tmp_path, tokenizer, wrong):
    assert wrong[0] in sample(tmp_path, tokenizer, *wrong, code=2).stderr


@pytest.mark.slow
def test_long_texts_are_trained_on_where_the_windows_overlap(tmp_path, tokenizer):
    draw = random.Random(1)
    rows = [{"text": prose(draw, 900), "meta": {"url": f"u{n}"}} for n in range(30)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    windows = ["--min-tokens", 200, "--max-tokens", 90_000, "--min-chars", 5000, "--input", path]
    windows += ["--whole"]
    sample(tmp_path, tokenizer, *windows)
    train, test = (read_jsonl(tmp_path / "extracts" / f"{s}.jsonl") for s in ("train", "test"))
    assert len(train) + len(test) == 30 and len(train) > len(test) > 0
    assert min(record["n_chars"] for record in train) >= 5000
    made = tmp_path / "extracts/made.json"
    made.write_text(made.read_text().replace(', "in_both_windows": "split by id"', ""))
    said = sample(tmp_path, tokenizer, *windows)  # as 0.3.7 left it, for testing alone
    assert "is done with these settings" in said.stdout and "delete it" in said.stderr


def test_own_records_of_one_title_or_address_are_all_kept(tmp_path, tokenizer):
    draw = random.Random(2)
    metas = [{"title": "Minutes"}, {"url": "https://example.org/"}] * 10
    rows = [{"text": prose(draw, 160), "meta": meta} for meta in metas]
    path = write_jsonl(tmp_path / "in.jsonl", [*rows, rows[0], *rows[:2]])
    turned = write_jsonl(tmp_path / "turned.jsonl", [*rows[:3], *reversed(rows)])
    for name, file in (("a", path), ("b", turned)):
        sample(tmp_path / name, tokenizer, "--input", file, *WINDOWS, "--workers", 1)
    train, other = (read_jsonl(tmp_path / f"{name}/extracts/train.jsonl") for name in "ab")
    assert len(train) == len({record["id"] for record in train}) == 20
    assert train == other  # the order of the input changes no id
    assert report_of(tmp_path / "a/extracts")["other"]["dropped: near duplicate"] == 3


@pytest.mark.slow
def test_a_file_that_is_lost_is_named_with_the_commonest_reason(tmp_path, tokenizer, corpus):
    write_jsonl(tmp_path / "body.jsonl", [{"body": "a"}, {"body": "b"}])
    write_jsonl(tmp_path / "german.jsonl", [document(n, 120, language="de") for n in range(3)])
    (tmp_path / "table.csv").write_text("text,url\na,b\n")
    result = sample(tmp_path, tokenizer, "--input", corpus, f"{tmp_path}/*.*", *WINDOWS)
    assert "body.jsonl: none of its 2 records is kept, 2: not JSON with a text (fields: body)" in (
        result.stderr
    )
    assert "german.jsonl: none of its 3 records is kept, 3: not English" in result.stderr
    assert "table.csv: a CSV table" in result.stderr and "in.jsonl" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a candidate file", "before it is said what it is of"])
def test_what_a_kill_leaves_is_in_nobodys_way(tmp_path, tokenizer, corpus, reference, moment):
    work = tmp_path / "extracts/unfinished"
    (work / "candidates").mkdir(parents=True)
    if moment == "in a candidate file":
        options = parse_options(list(map(str, ["--input", corpus, *WINDOWS, "--workers", 1])))
        options = replace(options, tokenizer=str(tokenizer), data=tmp_path)
        mark_made(work, settings_of(options, [str(corpus)]))
        half = (reference / "train.jsonl").read_bytes()[:5000]
        (work / "candidates/.0.jsonl.4194303.tmp").write_bytes(half)
    else:
        (work / "candidates/0.jsonl").write_text("{}")
        (work / ".made.json.4194303.tmp").write_text("{")
    sample(tmp_path, tokenizer, "--input", corpus, *WINDOWS, "--workers", 1)
    assert texts_of(tmp_path / "extracts") == texts_of(reference)
    assert not work.exists()


@pytest.mark.slow
def test_a_folder_that_was_moved_is_still_done(tmp_path, tokenizer, corpus):
    path = tmp_path / "here/in.jsonl"
    path.parent.mkdir()
    path.write_bytes(corpus.read_bytes())
    options = ["--input", "here/in.jsonl", "--data", "here", "--tokenizer", tokenizer, *WINDOWS]
    run_stage(STAGE, *options, cwd=tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "here").rename(tmp_path / "there/here")
    assert "is done" in run_stage(STAGE, *options, cwd=tmp_path / "there").stdout


def test_what_red_pajama_does_not_have_is_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/v1/arxiv/x.jsonl")
    monkeypatch.setattr(extract_options, "RED_PAJAMA", [str(tmp_path / "urls.txt")])
    result = sample(tmp_path / "data", tokenizer, "--sources", "arxive", "arxiv", code=1)
    assert one_error_line(result).endswith("has no arxive; --sources of arxiv")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command = ["--input", corpus, *WINDOWS]
    result = sample(tmp_path, tokenizer, *command, "--slurm", "cpu", code=1)
    assert "No such file or directory: squeue" in one_error_line(result)
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    result = sample(tmp_path, tokenizer, *command, "--ray", "auto", code=1)
    assert "--ray needs Ray: pip install ray" in one_error_line(result)
    both = sample(tmp_path, tokenizer, *command, "--ray", "auto", "--slurm", "cpu", code=2)
    assert "not allowed with" in both.stderr
