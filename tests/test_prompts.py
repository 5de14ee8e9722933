import hashlib
import os

import pytest
from conftest import one_error_line, run_stage

from common.cli import UserError
from prompts.task import FOLDER, SHARED, load_task

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
    assert task.title("outputs/my/sft/merged") == "adapter my/sft (merged)"
    assert load_task("title").title("base") == task.title("base") == "base, bare text"


@pytest.mark.parametrize(
    "text, said",
    [
        ("label: X", r"mine/task.yaml: hub missing; the keys are"),
        (f"label: X\ncolour: red\n{WORDS}", r"mine/task.yaml: colour unknown"),
        (f"label: X\n{WORDS}\ncriteria: {{truth: yes}}", r"criteria: truth needs a scale"),
        (f"label: X\n{WORDS}", r"mine/task.yaml: criteria are missing"),
        (f"label: 3\nanswers: 1\n{WORDS}", r"mine/task.yaml: label is text.* it is 3"),
        (f"label: '***'\nanswers: 1\n{WORDS}", r"label: holds no letter or digit"),
        (f"label: X\nanswers: 3\n{WORDS}", r"answers: is 1 or 2"),
        (f"label: X\nanswers: true\n{WORDS}", r"answers is a whole number"),
        (
            f"label: X\nanswers: 1\nmax_new_tokens: '64'\n{WORDS}",
            r"max_new_tokens is a whole number",
        ),
        (f"label: X\nanswers: 1\ntitles: []\n{WORDS}", r"titles is a mapping"),
        (f"label: X\nanswers: 1\nsystems: base\n{WORDS}", r"systems is a list"),
        (f"label: X\nanswers: 1\nsystems: [base, base]\n{WORDS}", r"systems: names one twice"),
        (f"label: X\nanswers: 1\nchecks: {{lead: maybe}}\n{WORDS}", r"checks: lead: a limit is"),
        (f"label: X\nanswers: 1\nchecks: {{longer: .nan}}\n{WORDS}", r"checks: longer: a limit is"),
        (f"label: X\ncriteria: [a]\n{WORDS}", r"criteria is a mapping"),
        (f"label: X\ncriteria: {{total: 5}}\n{WORDS}", r"total cannot be told from the total"),
        (f"label: X\ncriteria: {{a_b: 5, A b: 5}}\n{WORDS}", r"A b and a_b cannot be told apart"),
        (f"label: X\nlabel: Y\n{WORDS}", r"mine/task.yaml is not YAML: label stands twice"),
        ("label: X\nanswers: 1\nhub: null", r"hub is a mapping.* left empty"),
        ("label: X\nanswers: 1\nhub: {tags: [5]}", r"hub: tags: 0 is text"),
        ("label: X\nanswers: !!int x", r"mine/task.yaml is not YAML"),
        ("label: " + "[" * 5000, r"mine/task.yaml is not YAML"),
        ("[label, hub]", r"mine/task.yaml holds no keys"),
        ("5: x", r"mine/task.yaml: 5 unknown"),
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


def test_a_task_that_is_not_utf_8_and_a_name_that_is_a_path_are_refused(tmp_path):
    task_in(tmp_path, f"label: X\nanswers: 1\n{WORDS}")
    for name in ("../x", "mine/", "mine/../mine", "", ".", "/etc", "x\0y", "x" * 5000):
        with pytest.raises(UserError, match="no task"):
            load_task(name, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/task.yaml").write_bytes(b"label: \xff")
    with pytest.raises(UserError, match=r"other/task.yaml is not UTF-8"):
        load_task("other", tmp_path)


ONE = f"label: X\nanswers: 1\n{WORDS}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ ''|attr('__class__') }}", "unsafe"),
        ("{{ task._environment }}", "no attribute"),
        ("{{ task.folder }}", "no attribute"),
        ("{{ rows.to_csv('x') }}{{ text }}", "may not call to_csv"),
        ("{% set f = rows.to_csv %}{{ f('x') }}{{ text }}", "may not call to_csv"),
        ("{% include '../../etc/passwd' %}", "TemplateNotFound"),
        ("{% include 'out.jinja' %}", "a link that leads out"),
        ("{% include 'teacher.jinja' %}", "includes or calls itself without end"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "includes or calls itself"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "SecurityError"),
        (
            "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than",
        ),
        ("{{ 'a' * 10 ** 10 }}", "SecurityError"),
        ("{{ 10 ** 10 ** 10 }}", "SecurityError"),
        ("{{ 'a' | center(10 ** 9) }}", "SecurityError"),
        ("{{ '{:999999999}'.format(1) }}", "SecurityError"),
        ("{{ '%999999999d' % 1 }}", "SecurityError"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "SecurityError",
        ),
        ("{{ ('a' * 1000000).replace('a', 'b' * 300) | length }}", "more than 20,000,000"),
        ("{{ ('a' * 1000000) | replace('a', 'b' * 300) | length }}", "more than 20,000,000"),
        (
            "{% autoescape true %}{{ ('&' * 1000000) | replace('a', ('b' * 300) | safe) | length }}"
            "{% endautoescape %}",
            "more than 20,000,000",
        ),
        ("{{ ('b' * 1000).join(['c'] * 99999) | length }}", "more than 20,000,000"),
        ("{{ (['c'] * 99999) | join('b' * 1000) | length }}", "more than 20,000,000"),
        ("{{ (['c' * 99999] * 999) | map('upper') | join | length }}", "more than 20,000,000"),
        ("{{ ([{'x': 'c' * 99999}] * 999) | join(attribute='x') | length }}", "more than 20,"),
        ("{{ ('a' * 1000000).translate({97: 'b' * 300}) }}", "may not call translate"),
        ("{{ ('{0}' * 300).format('b' * 1000000) }}", "more than 20,000,000"),
        ("{{ ('%s' * 300) | format(*(['b' * 1000000] * 300)) }}", "more than 20,000,000"),
        ("{{ ('%(x)s' * 300) % {'x': 'b' * 1000000} }}", "more than 20,000,000"),
        ("{{ ('\t' * 1000).expandtabs(300000) }}", "more than 20,000,000"),
        ("{{ ('a\n' * 1000) | indent(300000) }}", "more than 20,000,000"),
        ("{{ ('a\n' * 1000) | indent('b' * 300000) }}", "more than 20,000,000"),
        (
            "{% set l = [1] %}{% for i in range(40) %}{{ l.extend(l) or '' }}{% endfor %}",
            "SecurityError",
        ),
        ("{{ text | random }}", "No filter named 'random'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ text + 5 }}", "TypeError"),
        ("{{ " + "(" * 5000, "teacher.jinja"),
        ("{{ 'Write.' }}", r"does not show {{ text }}"),
        ("{# {{ text }} #}", r"does not show {{ text }}"),
        ("{{ text | length }}", r"does not show {{ text }}"),
    ],
)
def test_a_template_of_a_stranger_can_do_no_harm(tmp_path, monkeypatch, template, said):
    class Rows:
        def to_csv(self, path):
            raise AssertionError("it was called")

    monkeypatch.setattr("prompts.sandbox.SECONDS", 0.3)
    (tmp_path / "outside.txt").write_text("secret")
    (tmp_path / "tasks").mkdir()
    task = task_in(tmp_path / "tasks", ONE, teacher=template)
    (task.folder / "out.jinja").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError) as told:
        task.render("teacher", text="A text.", rows=Rows())
    assert said in str(told.value) and "\n" not in str(told.value)
    assert "teacher.jinja" in str(told.value)


def test_templates_do_what_they_did(tmp_path):
    source = (
        "{% set ns = namespace(n=0) %}{% for w in text.split() %}{% set ns.n = ns.n + 1 %}"
        "{{ loop.index }}/{{ loop.length }} {{ w | upper }}{{ ', ' if not loop.last }}{% endfor %} "
        "{{ ns.n ~ ' words' }} {{ '%d' % ns.n }} {{ '{:,}'.format(12345678) }} "
        "{{ task.hub.answer }} "
        "{% for w in ['a-b'] %}{{ w.replace('-', '+') }} {{ '/'.join(w) }} {% endfor %}"
        "{{ text.replace('s', '', 1) }} {{ text | replace(' ', '_', count=1) }} "
        "{{ [1, 2] | join(', ') }} {{ [{'x': 3}, {'x': 4}] | join(d='; ', attribute='x') }} "
        "{{ [1, 2] | max }} {{ task.name }} {{ given('x') }} {{ text[:3] * 2 }}"
    )
    task = task_in(tmp_path, ONE, teacher=source)
    written = task.render("teacher", text="so it is", given=lambda word: f"<{word}>")
    assert written == (
        "1/3 SO, 2/3 IT, 3/3 IS 3 words 3 12,345,678 x "
        "a+b a/-/b o it is so_it is 1, 2 3; 4 2 mine <x> so so "
    )


def test_a_prompt_that_shows_its_text_at_times_only_is_refused(tmp_path):
    task = task_in(tmp_path, ONE, teacher="{% if longer == 1 %}{{ text }}{% endif %}")
    assert task.render("teacher", text="A text.", longer=1) == "A text."
    with pytest.raises(UserError, match="does not show"):
        task.render("teacher", text="A text.", longer=2)


def test_includes_of_includes_count_in_the_hash(tmp_path):
    task = task_in(tmp_path, ONE, teacher="{% include 'a.jinja' %}{{ text }}", a="x", b="1")
    flat = task.sha("teacher")
    (task.folder / "a.jinja").write_text("{% include 'b.jinja' %}")
    nested = task.sha("teacher")
    (task.folder / "b.jinja").write_text("2")
    assert len({flat, nested, task.sha("teacher")}) == 3
    (task.folder / "b.jinja").write_text("{% include 'a.jinja' %}")
    assert task.sha("teacher")  # they include each other: it ends
    assert load_task("title").sha("judge_pair") == "232f585b80d7"  # as in 0.3.7


def test_a_students_template_is_told_by_what_it_writes_and_gives_the_text_back(tmp_path):
    assert load_task().student_sha() is None and load_task().text_of("a text") == "a text"
    source = "{% include 'say.jinja' %} a {{ task.label }}:\n{{ text }}\nEnd"
    task = task_in(tmp_path, ONE, student=source, say="Write")
    before = task.student_sha()
    prompt = task.student_messages("a\ntext", "student")[0]["content"]
    assert prompt == "Write a X:\na\ntext\nEnd" and task.text_of(prompt) == "a\ntext"
    assert task.text_of("Write a X:\n\nEnd") == ""
    (task.folder / "say.jinja").write_text("Say")
    load_task.cache_clear()
    edited = load_task("mine", tmp_path)
    assert edited.student_sha() != before
    with pytest.raises(UserError, match=r"student.jinja is not what the dataset's prompts"):
        edited.text_of(prompt)


@pytest.mark.parametrize(
    "source",
    [
        "In {{ text.split() | length }} words: {{ text }}",
        "{{ text }} {{ text }}",
        "{% if 'http' in text %}A link. {% endif %}{{ text }}",
        "{{ text | truncate(2000) }}",
        "{{ text | e }}",
        "Nothing.",
    ],
)
def test_a_students_template_that_depends_on_the_text_is_refused(tmp_path, source):
    with pytest.raises(UserError, match=r"student.jinja must hold {{ text }} once and as it is"):
        task_in(tmp_path, ONE, student=source)


def test_what_others_wrote_does_not_act_in_a_card(tmp_path):
    template = "{{ text | quoted }}\n`{{ text | in_line }}`\n{{ text | fence(4) }}"
    task = task_in(tmp_path, ONE, teacher=template)
    text = "a < b <script>x</script> <!-- y\r![p](http://x)\n`````\nend"
    quoted, name, fence = task.render("teacher", text=text).rsplit("\n", 2)
    assert "&lt;script>" in quoted and "&lt;!-- y" in quoted and "a < b" in quoted
    assert "!\\[p]" in quoted and all(line.startswith(">") for line in quoted.split("\n"))
    assert name.count("`") == 2 and fence == "``````"


def test_a_task_file_without_an_end_is_not_read(tmp_path):
    for name in ("pipe", "zeros", "large"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe/task.yaml")
    (tmp_path / "zeros/task.yaml").symlink_to("/dev/zero")
    (tmp_path / "large/task.yaml").write_text("# a comment\n" * 100_000)
    for name in ("pipe", "zeros", "large"):
        with pytest.raises(UserError, match="no regular file of at most"):
            load_task(name, tmp_path)
