"""The resumable table: results of any settings live side by side, and each is found again."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from common.cli import UserError
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


@examples(deadline=None)
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


def test_ids_are_found_whatever_they_are_and_asked_for_once(tmp_path):
    path = tmp_path / "table.jsonl"
    for ids in ([0, 7, "", "a", "a"], ["0", "7", "", "a"], [0, "7"]):
        rows = [{"id": i, "settings": 1} for i in ids]
        todo = missing(path, rows, KEY)
        with appending(path) as file:
            append_record(file, *todo)
        assert not missing(path, rows, KEY)
        assert list(load(path, rows, KEY)) == list(dict.fromkeys(ids))
    assert len(path.read_text().splitlines()) == 4


def test_one_id_of_two_texts_is_named_where_it_would_join_them(tmp_path):
    rows = [{"id": "a", "prompt": "one"}, {"id": "a", "prompt": "two"}]
    path, key = write_jsonl(tmp_path / "table.jsonl", rows[:1]), ("id", "prompt")
    assert missing(path, rows, key) == rows[1:]
    assert load(path, rows[:1], key) == {"a": rows[0]} and load(path, rows[1:], key) == {}
    with pytest.raises(UserError, match="id 'a' stands for two unlike texts"):
        load(path, rows, key)


def test_a_key_with_half_an_emoji_is_found_again(tmp_path):
    rows = [{"id": "a", "prompt": "cut \ud83d"}]
    with appending(tmp_path / "table.jsonl") as file:
        append_record(file, *rows)
    assert not missing(tmp_path / "table.jsonl", rows, ("id", "prompt"))


def test_a_key_field_that_is_not_there_is_null(tmp_path):
    path = write_jsonl(tmp_path / "table.jsonl", [{"id": "a", "settings": None}, {"id": "b"}])
    assert [one["id"] for one in missing(path, [{"id": "a"}, {"id": "b"}], KEY)] == ["b"]
