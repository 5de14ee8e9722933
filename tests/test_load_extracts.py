"""Extracts one makes oneself: numbers for ids, repeated ids, no text, an unfinished folder."""

import pytest
from conftest import write_jsonl

from common.cli import UserError
from data_prep.load_extracts import load_extracts


def test_own_extracts_need_an_id_and_a_text_alone(tmp_path, capsys):
    rows = [{"id": 0, "text": "a"}, {"id": "0", "text": "b"}, {"id": 1, "text": None}]
    rows += [{"id": None, "text": "c"}, {"id": "x", "text": "d", "url": "u"}, {"id": "y"}]
    extracts = load_extracts(write_jsonl(tmp_path / "train.jsonl", rows))
    assert extracts == [
        {"id": "0", "text": "a", "source": "other", "url": ""},
        {"id": "x", "text": "d", "source": "other", "url": "u"},
    ]
    errors = capsys.readouterr().err
    assert "2 records without an id or a text" in errors
    assert "1 records have an id that stands before" in errors and "lacks text" in errors


def test_a_source_and_a_url_are_texts(tmp_path):
    odd = [None, 5, [], {}]
    rows = [{"id": i, "text": "a", "source": x, "url": x} for i, x in enumerate(odd)]
    extracts = load_extracts(write_jsonl(tmp_path / "train.jsonl", rows))
    assert {(one["source"], one["url"]) for one in extracts} == {("other", "")}


def test_without_a_record_of_use_it_says_so(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"id": "", "text": "a"}, {"id": "b", "text": 3}])
    with pytest.raises(UserError, match="no record with an id and a text"):
        load_extracts(path)


def test_a_folder_half_made_is_not_read(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"id": "a", "text": "b"}])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/made.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        load_extracts(path)
    (tmp_path / "made.json").write_text("{}")
    assert len(load_extracts(path)) == 1
