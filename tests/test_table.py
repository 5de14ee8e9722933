"""The resumable table: results of any settings live side by side, and each is found again."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from common.files import append_record, appending
from common.table import load, missing

KEY = ("id", "settings")
ids = st.sampled_from("abcd")
settings = st.sampled_from([None, {"n": 1}, {"n": 2, "m": [1, 2]}, {"m": [1, 2], "n": 2}])
steps = st.lists(st.tuples(settings, st.sets(ids)), max_size=8)


def wanted(made_by: object, which="abcd") -> list[dict]:
    return [{"id": i, "settings": made_by} for i in which]


def complete(path: Path, made_by: object, which) -> list[str]:
    """As a stage does it: append what is missing. Returns what was missing."""
    todo = [one["id"] for one in missing(path, wanted(made_by, which), KEY)]
    with appending(path) as file:
        append_record(file, *({**one, "by": str(made_by)} for one in wanted(made_by, todo)))
    return todo


@given(steps)
def test_nothing_is_made_twice_and_everything_asked_for_is_found(asked):
    with TemporaryDirectory() as folder:
        path, done = Path(folder) / "table.jsonl", set()
        for made_by, which in asked:
            key = json.dumps(made_by, sort_keys=True)
            todo = complete(path, made_by, sorted(which))
            assert set(todo) == {i for i in which if (i, key) not in done}
            done |= {(i, key) for i in which}
        for made_by in (None, {"n": 1}, {"n": 2, "m": [1, 2]}):
            found = load(path, wanted(made_by), KEY)
            key = json.dumps(made_by, sort_keys=True)
            assert list(found) == [i for i in "abcd" if (i, key) in done]
            assert all(r["settings"] == made_by for r in found.values())


def test_a_half_made_table_of_other_settings_is_in_nobodys_way(tmp_path):
    path = tmp_path / "table.jsonl"
    complete(path, {"n": 1}, "abcd")
    complete(path, {"n": 2}, "ab")
    assert len(load(path, wanted({"n": 1}), KEY)) == 4
    assert [one["id"] for one in missing(path, wanted({"n": 2}), KEY)] == ["c", "d"]


def test_the_latest_record_counts_and_broken_lines_do_not(tmp_path, capsys):
    records = [{"id": "a", "settings": 1, "text": text} for text in ("old", "new")]
    path = write_jsonl(tmp_path / "table.jsonl", [*records, {"id": "b"}])
    with path.open("a") as file:
        file.write("{torn")
    assert load(path, wanted(1), KEY)["a"]["text"] == "new"
    assert "lacks settings" in capsys.readouterr().err
    assert len(missing(path, wanted(1), KEY)) == 3


def test_a_file_that_is_not_there_lacks_everything(tmp_path):
    assert missing(tmp_path / "none", wanted(1), KEY) == wanted(1)
    assert load(tmp_path / "none", wanted(1), KEY) == {}
