import jinja2
import pytest

import prompts
from common.cli import UserError
from prompts import FOLDER, load_task, render, student_messages, template_sha


def test_a_missing_variable_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render("summarize/teacher.jinja")


@pytest.mark.parametrize("text", ["plain", "{{ 7 * 7 }} {% raw %}", "<b>&amp;</b>\n\nÉ 文"])
def test_a_text_is_data_in_every_prompt(text):
    assert text in render("summarize/teacher.jinja", text=text, longer=1)
    assert text in render("summarize/instructed.jinja", text=text)
    assert text in render("summarize/teacher.jinja", text=text, longer=2)


def test_the_student_gets_the_bare_text_or_the_text_in_a_template():
    assert student_messages("a text") == [{"role": "user", "content": "a text"}]
    instructed = student_messages("a text", "summarize/instructed.jinja")[0]["content"]
    assert instructed.endswith("a text") and instructed != "a text"


def test_the_hash_tells_templates_apart():
    shas = {template_sha(p.relative_to(FOLDER).as_posix()) for p in FOLDER.rglob("*.jinja")}
    assert len(shas) == len(list(FOLDER.rglob("*.jinja"))) >= 3


def test_a_task_is_read_from_its_folder(tmp_path, monkeypatch):
    task = load_task()
    assert (task.label, task.lowest_score, task.highest_score) == ("Summary", 4, 18)
    assert load_task() is task and task.template("teacher") == "summarize/teacher.jinja"
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"cannot read the task .*titles"):
        load_task("titles")
    (tmp_path / "titles").mkdir()
    (tmp_path / "titles/task.yaml").write_text("label: Title\ncolour: red\n")
    with pytest.raises(UserError, match=r"colour, criteria, .* missing or unknown"):
        load_task("titles")
