import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
from conftest import ROOT, clean_environment, read_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from common.files import (
    append_record,
    appending,
    digest,
    is_made,
    load_records,
    mark_made,
    read_json,
    read_records,
    replacing,
    write_records,
    write_text,
)

records = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20)), max_size=8)


@settings(deadline=None)
@given(records, st.integers(0, 400), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_a_file_torn_at_any_byte_keeps_its_whole_lines(tmp_path_factory, before, cut, after):
    path = tmp_path_factory.mktemp("torn") / "log.jsonl"
    with appending(path) as log:
        for record in before:
            append_record(log, record)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    with appending(path) as log:
        append_record(log, after)
    whole = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    with suppress(ValueError):  # the last lacks its newline alone
        whole.append(json.loads(data[data.rfind(b"\n") + 1 :]))
    assert read_jsonl_bytes(path) == [*whole, after]


def read_jsonl_bytes(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@given(records)
def test_records_come_back_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_records(path, rows)
    assert list(read_records(path)) == [row for row in rows if row]


def test_broken_lines_are_named_and_the_rest_goes_on(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": \n\n[1]\n{"other": 2}\n\xff\xfe\n{"id": 3}')
    assert [row["id"] for row in read_records(path, ["id"])] == [1, 3]
    errors = capsys.readouterr().err
    for number in (2, 4, 5, 6):
        assert f"{path}:{number}:" in errors
    assert "lacks id" in errors


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"nonsense\n"])
def test_a_missing_or_empty_file_says_how_to_make_it(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl.*just extracts"):
        load_records(path, ["id"], "just extracts")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_records(path, [{"id": 1}])
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_jsonl(path) == [{"id": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_writer_is_refused(tmp_path):
    with (
        appending(tmp_path / "log.jsonl"),
        pytest.raises(UserError, match="another run"),
        appending(tmp_path / "log.jsonl"),
    ):
        pass


def test_settings_tell_a_finished_folder(tmp_path):
    assert not is_made(tmp_path, {"a": 1})
    mark_made(tmp_path, {"a": (1, 2)})
    assert is_made(tmp_path, {"a": (1, 2)})
    assert not is_made(tmp_path, {"a": (1, 3)})


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("open('/proc/version', 'w')", 1, "Permission denied: /proc/version"),
        ("(_ for _ in ()).throw(OSError(28, 'No space left on device', 'x'))", 1, "No space left"),
        ("os.kill(os.getpid(), 2)", 130, "stopped"),
    ],
)
def test_what_a_user_can_cause_ends_in_one_line(body, code, said):
    if os.getuid() == 0 and "/proc" in body:
        body = "open('/proc', 'w')"
        said = "Is a directory: /proc"
    script = f"import os, time\nfrom common.cli import run\nrun(lambda: ({body}, time.sleep(5)))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
    )
    assert (result.returncode, said in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr


HALF = "half an emoji \ud83d"  # as a reply that is cut at its limit may end
MENDED = "half an emoji \ufffd"


def test_half_a_surrogate_pair_is_written_and_read_equal_everywhere(tmp_path):
    path = tmp_path / "log.jsonl"
    with appending(path) as log:
        append_record(log, {"text": HALF, HALF: [HALF]})
    assert list(read_records(path)) == [{"text": MENDED, MENDED: [MENDED]}]
    write_records(path, [{"text": HALF}, {"text": "\ud83d\ude00"}])
    assert [row["text"] for row in read_records(path)] == [MENDED, "\U0001f600"]
    write_text(tmp_path / "page.md", HALF)
    assert (tmp_path / "page.md").read_text() == MENDED
    assert digest(HALF) == digest(MENDED) != digest("half an emoji ")
    path.write_text(json.dumps({"text": HALF}) + "\n")  # escaped, as others write it
    assert list(read_records(path)) == [{"text": MENDED}]


LINES = '{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        LINES.encode("utf-16-be"),
        LINES.encode("utf-32"),
        LINES.replace("\n", "\r\n").encode(),
        LINES.encode() + b"\0" * 4096,
        b"\0" * 99 + LINES.encode(),
        b'{"id": 1' + b"0" * 5000 + b"}\n" + LINES.encode(),
        b'{"id": ' + b"[" * 100_000 + b"\n" + LINES.encode(),
        b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + LINES.encode(),
    ],
)
def test_odd_files_are_read_as_far_as_they_can_be(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert [row["id"] for row in read_records(path, ["id"])] == ["a", "b"]


def test_thousands_of_broken_lines_are_not_all_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 3000 + LINES)
    assert len(list(read_records(path))) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 11 and "2,990 more lines skipped" in errors[-1]


@pytest.mark.parametrize(
    ("rest", "kept", "said"),
    [
        (b'{"id": "last"}', ["a", "b", "last", "new"], ""),  # an editor ended the file so
        (b'{"id": "last"}' + b"\0" * 999, ["a", "b", "last", "new"], ""),
        (b"\0" * 9 + b'{"id": "last"}', ["a", "b", "last", "new"], ""),
        (b"\0" * 999, ["a", "b", "new"], ""),
        (b'{"id": "last"}{"id": "c"}', ["a", "b", "last", "c", "new"], ""),  # joined files
        (b'{"id": "last"}\r{"id": "c"}\r', ["a", "b", "last", "c", "new"], ""),
        (b'[{"id": "last"}, {"id": "c"}]', ["a", "b", "last", "c", "new"], ""),
        (b'{"id": "last"}{"id": "c', ["a", "b", "last", "new"], "3: not valid JSON"),
        (b'{"id": "las', ["a", "b", "new"], "its last line, 11 bytes, was torn by a kill"),
    ],
)
def test_the_end_of_a_file_is_made_whole_and_no_record_lost(tmp_path, capsys, rest, kept, said):
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINES.encode() + rest)
    with appending(path) as log:
        append_record(log, {"id": "new"})
    assert [row["id"] for row in read_records(path)] == kept
    errors = capsys.readouterr().err
    assert said in errors and bool(said) == bool(errors)


def test_what_a_killed_writer_left_is_removed_and_another_writers_is_not(tmp_path):
    killed = (
        f"from common.files import replacing\nfrom pathlib import Path\nimport os\n"
        f"with replacing(Path({str(tmp_path / 'rows.jsonl')!r})) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed], cwd=ROOT, env=clean_environment())
    (stale,) = tmp_path.iterdir()
    assert stale.name.endswith(".tmp") and not list(tmp_path.glob("*.jsonl"))
    of_037 = tmp_path / ".rows.jsonl.4194303.tmp"  # a process that is not there
    running = tmp_path / f".rows.jsonl.{os.getppid()}.tmp"
    of_another_file = tmp_path / ".rows.jsonl.json.4194303.tmp"
    for path in (of_037, running, of_another_file):
        path.write_text("half")
    write_records(tmp_path / "rows.jsonl", [{"id": 1}])
    assert set(tmp_path.iterdir()) == {tmp_path / "rows.jsonl", running, of_another_file}


def test_a_broken_settings_file_is_one_line(tmp_path):
    for content in ("{", "[1]", "[" * 100_000):
        (tmp_path / "made.json").write_text(content)
        with pytest.raises(UserError, match=r"made\.json is not a JSON object"):
            read_json(tmp_path / "made.json")
        assert not is_made(tmp_path, {})
    assert read_json(tmp_path / "none.json") == {}


def test_loaded_ids_are_strings(tmp_path):
    write_records(tmp_path / "rows.jsonl", [{"id": i} for i in (0, 7, "7", 1.5, None, [1])])
    ids = [row["id"] for row in load_records(tmp_path / "rows.jsonl", ["id"])]
    assert ids == ["0", "7", "7", "1.5", "", ""]


def test_nothing_is_appended_in_another_encoding_than_the_files(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(LINES, encoding="utf-16")
    before = path.read_bytes()
    with pytest.raises(UserError, match="save it as UTF-8"), appending(path):
        pass
    assert path.read_bytes() == before and len(list(read_records(path))) == 2
