import hashlib

import pytest
from conftest import one_error_line, run_stage

from common.cli import UserError
from prompts import FOLDER, SHARED, load_task

WORDS = "hub: {answer: x, answers: xs, does: does x, task_category: text-generation, tags: []}"


def task_in(folder, text, **templates):
    (folder / "mine").mkdir()
    (folder / "mine/task.yaml").write_text(text)
    for name, source in templates.items():
        (folder / f"mine/{name}.jinja").write_text(source)
    return load_task("mine", folder)


def test_a_missing_variable_is_an_error():
    with pytest.raises(UserError, match=r"UndefinedError.*text"):
        load_task().render("teacher")


@pytest.mark.parametrize(
    "text", ["plain", "{{ 7 * 7 }} {% raw %}", "<b>&amp;</b>\n\n\u00c9 \u6587"]
)
@pytest.mark.parametrize("name", ["summarize", "title"])
def test_a_text_is_data_in_every_prompt(text, name):
    task = load_task(name)
    assert text in task.render("teacher", text=text, longer=1)
    assert text in task.render("instructed", text=text)
    assert text in task.render("judge_pair", text=text, first="a", second="b")


def test_the_student_gets_the_bare_text_or_the_text_in_a_template(tmp_path):
    task = load_task()
    bare = task.student_messages("a text", task.student_template())
    assert bare == [{"role": "user", "content": "a text"}]
    instructed = task.student_messages("a text", task.student_template(instructed=True))
    assert instructed[0]["content"].endswith("a text") and instructed != bare
    own = task_in(tmp_path, f"label: X\nanswers: 1\n{WORDS}", student="Do: {{ text }}")
    messages = own.student_messages("a text", own.student_template())
    assert messages[0]["content"] == "Do: a text"


def test_the_hash_is_of_the_source_and_of_what_it_includes(tmp_path):
    source = (FOLDER / "summarize/teacher.jinja").read_bytes()
    assert load_task().sha("teacher") == hashlib.sha256(source).hexdigest()[:12] == "cb2291cdd852"
    task = task_in(tmp_path, f"label: X\nanswers: 1\n{WORDS}", teacher="a", instructed="b")
    assert task.sha("teacher") != task.sha("instructed")
    shared = (SHARED / "judge_pair.jinja").read_bytes()
    assert task.sha("judge_pair") != hashlib.sha256(shared).hexdigest()[:12]


def test_a_task_is_read_from_its_folder():
    task = load_task()
    assert (task.name, task.label, task.lowest_score, task.highest_score) == (
        "summarize",
        "Summary",
        4,
        18,
    )
    assert load_task() is task
    assert load_task("title").title("lead").startswith("the first sentence")
    assert load_task("title").title("base") == task.title("base") == "base, bare text"


@pytest.mark.parametrize(
    "text, said",
    [
        ("label: X", r"mine/task.yaml: hub missing; the keys are"),
        (f"label: X\ncolour: red\n{WORDS}", r"mine/task.yaml: colour unknown"),
        (f"label: X\n{WORDS}\ncriteria: {{truth: yes}}", r"criteria: truth needs a scale"),
        (f"label: X\n{WORDS}", r"mine/task.yaml: criteria are missing"),
        ("label: [X", r"mine/task.yaml is not YAML"),
    ],
)
def test_a_faulty_task_is_one_line_that_names_file_and_key(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        task_in(tmp_path, text)


def test_a_broken_template_is_one_line_that_names_file_and_line(tmp_path):
    task = task_in(tmp_path, f"label: X\nanswers: 1\n{WORDS}", teacher="one\n{% if %}")
    for use in (lambda: task.render("teacher", text=""), lambda: task.sha("teacher")):
        with pytest.raises(UserError, match=r"teacher.jinja:2: TemplateSyntaxError"):
            use()
    with pytest.raises(UserError, match=r"mine/instructed.jinja: TemplateNotFound"):
        task.sha("instructed")


def test_an_unknown_task_is_told_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"no task titel .* did you mean title"):
        load_task("titel")


def test_a_new_task_works_at_once_and_is_never_overwritten(tmp_path):
    said = run_stage("prompts.new_task", "plain-english", "--prompts-dir", tmp_path).stdout
    assert "fill in task.yaml" in said
    task = load_task("plain-english", tmp_path)
    assert "A text." in task.render("teacher", text="A text.")
    assert "A text." in task.render("instructed", text="A text.")
    again = run_stage("prompts.new_task", "plain-english", "--prompts-dir", tmp_path, code=1)
    assert "is there already" in one_error_line(again)
    bad = run_stage("prompts.new_task", "../x", "--prompts-dir", tmp_path, code=1)
    assert "is no name for a task" in one_error_line(bad)
