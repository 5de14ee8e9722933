import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment, read_jsonl
from hypothesis import given
from hypothesis import strategies as st

from common.cli import UserError
from common.files import (
    append_record,
    appending,
    is_made,
    load_records,
    mark_made,
    read_records,
    replacing,
    write_records,
)

records = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20)), max_size=8)


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
