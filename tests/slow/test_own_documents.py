"""One's own documents: a folder of all that is read, and an address, through the stage."""

import random

import pytest
from conftest import one_error_line, read_jsonl, run_stage, write_jsonl
from page_server import PageServer
from pyarrow import Table, parquet
from test_read_document import make_pdf

STAGE = "data_prep.sample_extracts"
pytestmark = pytest.mark.slow


def prose(name: str, sentences: int) -> list[str]:
    """Sentences that say which document they are of, and that no other text has."""
    draw = random.Random(name)
    return [
        f"The {name} says {draw.randrange(10**9):x} to {draw.random()}." for _ in range(sentences)
    ]


def pages_of(sentences: list[str]) -> bytes:
    """A PDF of ten sentences a page under a header, with the page's number below."""
    starts = range(0, len(sentences), 10)
    pages = ["\n".join(["Annals", *sentences[i : i + 10], f"- {i // 10 + 1} -"]) for i in starts]
    return make_pdf(*pages)


def html_of(sentences: list[str]) -> bytes:
    body = "".join(f"<p>{sentence}</p>" for sentence in sentences)
    return f"<!doctype html><html><body><article>{body}</article></body></html>".encode()


@pytest.fixture(scope="module")
def server():
    headers = {"Content-Type": "text/html"}
    server = PageServer({"/page": (200, headers, html_of(prose("page", 40)))})
    yield server
    server.close()


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tokenizer, server):
    """(the folder of documents, that of the data, the options, what the stage said)."""
    folder, data = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("data")
    (folder / "papers").mkdir()
    paper = pages_of(prose("paper", 200))
    (folder / "papers/paper.pdf").write_bytes(paper)
    (folder / "papers/broken.pdf").write_bytes(paper[:100])
    (folder / "site.html").write_bytes(html_of(prose("site", 40)))
    (folder / "readme.md").write_text("# Title\n\n" + "\n\n".join(prose("readme", 30)))
    (folder / "note.txt").write_text(" ".join(prose("note", 5)))
    (folder / "short.txt").write_text("Call back.")
    rows = [{"raw_content": " ".join(prose(f"row{i}", 5)), "url": f"u{i}"} for i in range(9)]
    write_jsonl(folder / "rows.jsonl", rows)
    options = ["--input", folder, f"{server.url}/page", "--private", "--source-name", "mine"]
    options += ["--data", data, "--tokenizer", tokenizer]
    return folder, data, options, run_stage(STAGE, *options, "--licence", "CC0")


def test_all_that_can_be_read_is_taken(sampled):
    _, data, _, result = sampled
    splits = {s: read_jsonl(data / f"extracts/{s}.jsonl") for s in ("train", "test")}
    names = {s: {row["text"].split("The ")[1].split()[0] for row in splits[s]} for s in splits}
    documents = {"paper", "site", "readme", "note", "page"}
    assert names["train"] | names["test"] == documents | {f"row{i}" for i in range(9)}
    assert not names["train"] & names["test"] and names["test"] & documents
    rows = splits["train"] + splits["test"]
    assert {row["source"] for row in rows} == {"mine"}
    paper = [row["text"] for row in rows if "The paper" in row["text"]]
    assert len(paper) > 1 and all(text.endswith(".") for text in paper)
    assert sum(text.count("The paper") for text in paper) == 200
    assert not any("Annals" in text or "\n- " in text for text in paper)
    assert next(row["url"] for row in rows if "The page" in row["text"]).endswith("/page")
    assert "taken: texts of 51 to 1,799 tokens of" in result.stdout


def test_what_is_refused_or_too_short_is_a_line(sampled):
    _, data, _, result = sampled
    lines = result.stderr.splitlines()
    (line,) = [line for line in lines if "broken.pdf" in line]
    assert "it is cut: the end of the PDF is missing" in line
    assert "1 of 8 files could not be read" in result.stderr
    assert "short.txt: nothing of it is kept: outside the windows" in result.stderr
    report = (data / "extracts/report.md").read_text()
    assert "broken.pdf" in report and "cannot be read" in report


def test_a_finished_folder_is_not_read_again_nor_touched_by_another_input(sampled, server):
    folder, data, options, _ = sampled
    before = len(server.seen)
    again = run_stage(STAGE, *options)
    assert "is done with these settings" in again.stdout and len(server.seen) == before
    assert (data / "extracts/licence.txt").read_text() == "CC0\n"
    run_stage(STAGE, *options, "--licence", "CC BY")  # told later, or better
    assert (data / "extracts/licence.txt").read_text() == "CC BY\n"
    (folder / "note.txt").write_text(" ".join(prose("note", 6)))
    changed = run_stage(STAGE, *options, code=1)
    assert "was made with other settings or input" in one_error_line(changed)


def test_the_field_of_the_text_is_told(tmp_path, tokenizer):
    rows = [{"body": " ".join(prose(f"row{i}", 5)), "title": f"T{i}"} for i in range(9)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = ["--tokenizer", tokenizer, "--data", tmp_path / "data"]
    for name in ("rows.jsonl", "rows.parquet"):
        where = ["--input", tmp_path / name, *options]
        missing = one_error_line(run_stage(STAGE, *where, "--text-field", "content", code=1))
        assert f"{name}: none of its 9 records is kept" in missing
        assert "not JSON with a text in content (fields: body, title)" in missing
    run_stage(STAGE, *where, "--text-field", "body")
    texts = [
        row["text"]
        for s in ("train", "test")
        for row in read_jsonl(tmp_path / f"data/extracts/{s}.jsonl")
    ]
    assert sorted(texts) == sorted(row["body"] for row in rows)


def test_where_nothing_can_be_read_it_is_an_error(tmp_path, tokenizer, server):
    where = ["--data", tmp_path, "--tokenizer", tokenizer]
    result = run_stage(STAGE, "--input", f"{server.url}/page", *where, code=1)
    assert "no document could be read" in one_error_line(result)
    assert f"warning: cannot read {server.url}/page: " in result.stderr
    assert "--private" in result.stderr
    assert not (tmp_path / "extracts/train.jsonl").exists()
