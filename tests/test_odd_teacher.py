"""What a teacher may answer, and what is found again: by content, whole or not at all."""

import json
import os
import re
import time

import pytest
from conftest import one_error_line, read_jsonl, run_stage, write_jsonl
from odd_teacher import TEXT, OddTeacher, body

from common.files import digest
from data_prep.load_extracts import load_extracts
from data_prep.teacher import limits
from data_prep.teacher.limits import Budget
from data_prep.teacher.reply_table import adopt_old, fill_in
from data_prep.teacher.teacher_prompts import TeacherPrompts
from prompts.task import load_task

STAGE = "data_prep.generate_replies"
WORST = 4096 * 0.6 / 1e6  # dollars, of a reply alone


@pytest.fixture
def teacher():
    started = []

    def start(answer) -> OddTeacher:
        started.append(OddTeacher(answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


def texts(folder, n: int, words: str = "lakes and rivers", split: str = "train"):
    rows = [
        {"id": f"a{i}", "source": "x", "url": "", "text": f"Passage {i:03} is about {words}. " * 12}
        for i in range(n)
    ]
    write_jsonl(folder / f"extracts/{split}.jsonl", rows)
    return folder


def ask(folder, url, *more, code: int | None = 0, **env):
    env = {"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": "k", "BUDGET_USD": "1000"} | env
    options = ("--data", folder, "--splits", "train", "--single", *more)
    return run_stage(STAGE, *options, code=code, **env)


def pairs(folder, *more, code: int = 0):
    texts(folder, 1, split="test")
    rows = [row | {"text_digest": digest(row["text"])} for row in read_extracts(folder, "test")]
    reply = {"model": "m", "prompt_sha": "p", "text": TEXT, "finish_reason": "stop", "answers": 1}
    reply |= {"created": "", "cost_usd": 0.0}
    first = read_jsonl(folder / "summarize/replies/train.jsonl")[0]
    reply |= {"model": first["model"], "prompt_sha": first["prompt_sha"]}
    task = load_task()
    for row in rows:
        prompt = task.render("teacher_single", text=row["text"], longer=1)
        messages = [{"role": "user", "content": prompt}]
        reply["prompt"] = digest(json.dumps(messages, sort_keys=True))
        write_jsonl(folder / "summarize/replies/test.jsonl", [{"id": row["id"]} | reply])
    keep = ("--keep", "lead", "longer", "language", "repetition")
    options = ("--data", folder, "--rejected", "none", *keep, "--check", "length=100000", *more)
    result = run_stage("data_prep.build_pairs", *options, code=code)
    return {pair["id"]: pair for pair in read_jsonl(folder / "summarize/pairs/train.jsonl")}, result


def read_extracts(folder, split: str = "train") -> list[dict]:
    return read_jsonl(folder / f"extracts/{split}.jsonl")


def replies_in(folder) -> list[dict]:
    return read_jsonl(folder / "summarize/replies/train.jsonl")


def refused_in(folder) -> list[dict]:
    path = folder / "summarize/replies/train.refused.jsonl"
    return read_jsonl(path) if path.exists() else []


def booked(folder) -> float:
    return Budget(folder / "summarize/replies", None).spent


def number_in(prompt: str) -> int:
    return int(re.search(r"Passage (\d+)", prompt)[1])


CUT, FILTERED = "cut at the token limit", "filtered"
ERROR, TOOLS = "an error while it was written", "tool calls, no text"
UNUSABLE = [
    (body(choice={"finish_reason": "length"}), CUT),
    (body(choice={"finish_reason": "max_tokens"}), CUT),
    (body(choice={"finish_reason": "model_length"}), CUT),
    (body(choice={"finish_reason": "content_filter"}), FILTERED),
    (body({"content": "A part"}, {"finish_reason": "SAFETY"}), FILTERED),
    (body(choice={"finish_reason": "error"}), ERROR),
    (body(choice={"finish_reason": "network_error"}), ERROR),
    (body({"content": None, "tool_calls": [{}]}, {"finish_reason": "tool_calls"}), TOOLS),
    (body({"content": None, "tool_calls": [{"id": "1"}]}), TOOLS),
    (body(choice={"finish_reason": None}), "no word of its end (finish_reason null)"),
    (body(choice={"finish_reason": ""}), "no word of its end (finish_reason null)"),
    (body(choice={"finish_reason": {"a": 1}}), "no word of its end (finish_reason null)"),
    (body(choice={"finish_reason": "odd"}), "no word of its end (finish_reason odd)"),
    (body({"content": None}), "empty"),
    (body({"content": " \n"}), "empty"),
    (body({"content": []}), "empty"),
    (body({"content": None, "reasoning": "Hm."}), "reasoning only"),
    (body({"content": "", "reasoning_content": "Hm."}), "reasoning only"),
    (body({"content": 42}), "a part that is no text"),
    (body({"content": True}), "a part that is no text"),
    (body({"content": {"image_url": "x"}}), "a part that is no text"),
    (body({"content": [{"type": "image_url", "image_url": {}}]}), "a part that is no text"),
    (body({"content": None, "refusal": "I will not."}), "refused by the model"),
    (body(error={"message": "overloaded"}), "an error beside the message"),
    (body(choice={"error": {"code": 502}}), "an error beside the message"),
]
PARTS = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Two "}, "parts."]
WHOLE = [
    (body(), TEXT),
    (body(choice={"finish_reason": "end_turn"}), TEXT),
    (body(choice={"finish_reason": "EOS"}), TEXT),
    (body({"content": PARTS}), "Two parts."),
    (body({"content": "Half \ud83d an emoji, and \ud83d\ude00."}), "Half \ufffd an emoji, and 😀."),
    (json.dumps(body({"content": "caf\u00e9"}), ensure_ascii=False).encode("latin-1"), "caf\ufffd"),
    (body({"content": "nul \0, line \u2028, esc \x1b[2J"}), "nul \0, line \u2028, esc \x1b[2J"),
]
USAGES = [
    None, {}, [1, 2], "many", 7, True,
    {"prompt_tokens": None, "completion_tokens": None},
    {"prompt_tokens": "n/a", "completion_tokens": 50},
    {"prompt_tokens": -100_000, "completion_tokens": -5},
    {"prompt_tokens": 1e300, "completion_tokens": 50},
    {"prompt_tokens": 0, "completion_tokens": 0},
    {"prompt_tokens": 100, "completion_tokens": 0},
    {"prompt_tokens": 10.5, "completion_tokens": 50},
    {"prompt_tokens": {"a": 1}, "completion_tokens": [50]},
    {"total_tokens": 150},
]  # fmt: skip
RAW_USAGES = [b"NaN", b"1e999", b"-Infinity", b"9" * 5000]


def test_a_reply_is_whole_or_unusable_with_its_reason_and_each_is_kept_once(tmp_path, teacher):
    """Also a part of a reply, an emoji cut in two, or odd `usage`: the others are not lost."""
    raw = [json.dumps(body()).encode().replace(b"100", number, 1) for number in RAW_USAGES]
    answers = [one for one, _ in WHOLE] + [one for one, _ in UNUSABLE]
    answers += [body(usage=usage) for usage in USAGES] + raw
    server = teacher(lambda prompt, n: answers[number_in(prompt)])
    folder = texts(tmp_path, len(answers))
    result = ask(folder, server.url)
    found = {reply["id"]: reply for reply in replies_in(folder)}
    assert len(found) == len(replies_in(folder)) == len(answers) == server.asked.total()
    for i, (_, text) in enumerate(WHOLE):
        assert found[f"a{i}"]["text"] == text and "unusable" not in found[f"a{i}"]
    for i, (answer, reason) in enumerate(UNUSABLE, len(WHOLE)):
        assert found[f"a{i}"]["unusable"] == reason, answer
        assert found[f"a{i}"]["cost_usd"] == pytest.approx(45e-6)
    for i in range(len(WHOLE) + len(UNUSABLE), len(answers)):
        assert found[f"a{i}"]["text"] == TEXT and found[f"a{i}"]["cost_usd"] > WORST
    assert booked(folder) == pytest.approx(sum(reply["cost_usd"] for reply in found.values()))
    assert f"{len(UNUSABLE)} unusable (" in result.stdout and f"3 {CUT}" in result.stdout
    as_written = ["--keep", "invented"]  # the texts here say nothing
    kept, said = pairs(folder, *as_written)
    assert len(kept) == len(answers) - len(UNUSABLE)
    assert re.search(rf"dropped: unusable \({CUT}\) +\| +3 ", said.stdout)

    again = ask(folder, server.url)
    assert server.asked.total() == len(answers)
    assert f"{len(UNUSABLE)} got no usable reply" in again.stdout and f"3 {CUT}" in again.stdout
    server.answer = lambda prompt, n: body()
    ask(folder, server.url, "--retry-unusable", "--max-tokens", 8192)
    assert server.asked.total() == len(answers) + len(UNUSABLE)
    assert replies_in(folder)[-1]["sampling"] == {"max_tokens": 8192, "temperature": 0.7}
    assert len(pairs(folder, *as_written)[0]) == len(answers)
    ask(folder, server.url, "--retry-unusable")
    assert server.asked.total() == len(answers) + len(UNUSABLE)


def test_an_endpoint_that_never_says_how_it_ended_can_be_taken_at_its_word(tmp_path, teacher):
    server = teacher(lambda prompt, n: body(choice={"finish_reason": None}))
    ask(texts(tmp_path, 2), server.url, "--also-whole", "null")
    assert not any(reply.get("unusable") for reply in replies_in(tmp_path))


def test_a_teacher_whose_first_replies_are_all_empty_is_not_paid_to_the_end(tmp_path, teacher):
    server = teacher(lambda prompt, n: body({"content": None}))
    folder = texts(tmp_path, 60)
    line = one_error_line(ask(folder, server.url, code=1))
    assert "none of the first 16 replies is an answer (16 empty)" in line
    assert server.asked.total() == len(replies_in(folder)) == 16
    assert booked(folder) == pytest.approx(16 * 45e-6)


FAILING = {
    "500": ((500, {"error": {"message": "it broke"}}), "it broke", 0.0),
    "html": ((403, b"<html><h1>Blocked</h1> by the gateway</html>"), "Blocked", 0.0),
    "choices": (body(choices=[]), "no message in the answer", 45e-6),
    "torn": (json.dumps(body()).encode()[:80], "not JSON", WORST),
    "page": (b"<html><body>Please log in</body></html>", "Please log in", WORST),
    "deep": (b'{"choices":' + b"[" * 100_000, "nested too deeply", WORST),
    "list": ([body()], "no message in the answer", WORST),
    "stream": (b'data: {"choices":[{"delta":{}}]}\n\ndata: [DONE]\n\n', "data: ", WORST),
    "error": ({"error": {"message": "model overloaded"}}, "model overloaded", 0.0),
    "302": ((302, b""), "HTTP 302", 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_a_text_that_always_fails_is_noted_with_its_words_and_stops_nothing(
    tmp_path, teacher, monkeypatch, name
):
    monkeypatch.setattr(limits, "BACKOFF", 1e-4)
    answer, words, usd = FAILING[name]
    bad = {3, 20, 39}

    def answer_to(prompt, n):
        if number_in(prompt) not in bad:
            return body()
        for _ in range(500):  # a 403 before any good reply would rightly end the run
            if server.asked.total() > 34:  # of the 32 at once some have been taken
                break
            time.sleep(0.01)
        return answer

    server = teacher(answer_to)
    folder = texts(tmp_path, 40)
    for _ in range(2):
        ask(folder, server.url, "--concurrency", 32)
        assert sorted(r["id"] for r in refused_in(folder)) == ["a20", "a3", "a39"]
        assert all(words in r["reason"] for r in refused_in(folder)), refused_in(folder)
        assert len(replies_in(folder)) == 37
    tries = server.asked.total() - 37
    assert tries <= 9 + 2 * 9
    assert booked(folder) > 37 * 45e-6 + tries * usd - 1e-7
    if not usd:
        assert booked(folder) == pytest.approx(37 * 45e-6)
    server.answer = lambda prompt, n: body()
    ask(folder, server.url, "--retry-refused")
    assert len(replies_in(folder)) == 40


def test_only_texts_that_always_fail_are_left_and_the_run_ends_well(tmp_path, teacher, monkeypatch):
    """No other text is left that would show that the endpoint is up."""
    monkeypatch.setattr(limits, "BACKOFF", 1e-4)
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 12)
    ask(folder, server.url, "--limit", 6)
    server.answer = lambda prompt, n: (500, {"error": {"message": "it broke"}})
    ask(folder, server.url)
    assert len(refused_in(folder)) == 6 and server.asked.total() < 6 + 6 * 12


@pytest.mark.slow
def test_an_outage_is_laid_to_no_text(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(limits, "BACKOFF", 1e-4)
    folder = texts(tmp_path, 120)

    def answer(prompt: str, n: int):
        return body() if server.asked.total() <= 20 else (500, {"error": {"message": "down"}})

    server = teacher(answer)
    line = one_error_line(ask(folder, server.url, "--concurrency", 8, code=1))
    assert "9 times in a row no reply, the last with: HTTP 500: down" in line
    assert len(replies_in(folder)) == 20 and not refused_in(folder)
    for url in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        ask(folder, url, code=1)
    assert booked(folder) == pytest.approx(20 * 45e-6)  # what never left the machine is free


def test_a_text_changed_under_one_id_is_asked_about_anew_and_never_joined_with_the_old(
    tmp_path, teacher
):
    server = teacher(lambda prompt, n: body({"content": re.search("about (\\w+)", prompt)[1]}))
    folder = texts(tmp_path, 6)
    ask(folder, server.url)
    rows = read_extracts(folder)
    for row in rows[:2]:
        row["text"] = row["text"].replace("lakes", "mountains")
    write_jsonl(folder / "extracts/train.jsonl", rows)
    kept, said = pairs(folder)
    assert set(kept) == {"a2", "a3", "a4", "a5"}
    assert "its text, prompt or criteria changed | 2 " in re.sub(" +", " ", said.stdout)
    ask(folder, server.url)
    kept, _ = pairs(folder)
    assert server.asked.total() == 8
    assert [kept[f"a{i}"]["chosen"] for i in range(3)] == ["mountains", "mountains", "lakes"]


def test_criteria_changed_in_the_task_are_another_prompt(tmp_path, teacher):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 3)
    prompts = tmp_path / "prompts/rated"
    prompts.mkdir(parents=True)
    (prompts / "teacher.jinja").write_text("{{ text }} by {{ task.criteria | join(' ') }}")
    given = (
        "label: Answer\nanswers: 1\nhub: {answer: a, answers: b, does: c, task_category: other}\n"
    )
    options = ("--task", "rated", "--prompts-dir", tmp_path / "prompts")
    for asked, scale in ((3, "truth: 5"), (6, "truth: 5, wit: 3"), (6, "truth: 5")):
        (prompts / "task.yaml").write_text(f"{given}criteria: {{{scale}}}\n")
        load_task.cache_clear()
        ask(folder, server.url, *options)
        assert server.asked.total() == asked


def make_old(folder, **more) -> None:
    """Write the replies as 0.3.7 would have left them."""
    new = ("prompt", "text_digest", "sampling", "unusable")
    records = [
        {name: value for name, value in record.items() if name not in new} | more
        for record in replies_in(folder)
    ]
    write_jsonl(folder / "summarize/replies/train.jsonl", records)


def test_replies_of_0_3_7_are_taken_where_the_text_is_shown_to_be_the_same(tmp_path, teacher):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 5)
    path = folder / "extracts/train.jsonl"
    ask(folder, server.url)
    make_old(folder)
    later = time.time() + 60
    os.utime(path, (later, later))
    said = ask(folder, server.url, "--plan")
    assert "5 replies of an earlier version are not shown" in said.stdout
    assert re.search(r"gpt-oss-120b \(1 a reply\) *\| *5 ", said.stdout)

    os.utime(path, (0, 0))
    table = (folder / "summarize/replies/train.jsonl").read_bytes()
    assert len(pairs(folder)[0]) == 5
    os.utime(path, (later, later))  # what was shown once stays shown
    ask(folder, server.url)
    assert server.asked.total() == 5 and len(pairs(folder)[0]) == 5
    assert (folder / "summarize/replies/train.jsonl").read_bytes() == table

    texts(tmp_path, 5, "mountains")
    os.utime(path, (later, later))
    ask(folder, server.url)
    assert server.asked.total() == 10


def test_old_replies_can_be_vouched_for_and_what_is_no_answer_in_them_is_none(tmp_path, teacher):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 20)
    ask(folder, server.url)
    make_old(folder)
    records = replies_in(folder)
    records[0] |= {"finish_reason": "length"}
    records[1] |= {"text": ""}
    records[2] |= {"text": [{"type": "text", "text": "In parts."}]}
    write_jsonl(folder / "summarize/replies/train.jsonl", records)
    later = time.time() + 60
    os.utime(folder / "extracts/train.jsonl", (later, later))
    kept, _ = pairs(folder, "--adopt-old")
    assert set(kept) == {r["id"] for r in records[2:]}
    assert kept[records[2]["id"]]["chosen"] == "In parts."
    ask(folder, server.url)
    assert server.asked.total() == 20
    ask(folder, server.url, "--retry-unusable")
    assert server.asked.total() == 22 and len(pairs(folder)[0]) == 20


def test_old_replies_whose_ids_are_numbers_are_pairs_as_well(tmp_path, teacher):
    server, path = teacher(lambda prompt, n: body()), tmp_path / "extracts/train.jsonl"
    rows = [{"id": i, "text": f"Passage {i} of a text. " * 9} for i in range(3)]
    write_jsonl(path, rows)
    ask(tmp_path, server.url)
    make_old(tmp_path)
    records = [record | {"id": int(record["id"])} for record in replies_in(tmp_path)]
    write_jsonl(tmp_path / "summarize/replies/train.jsonl", records)
    later = time.time() + 60
    os.utime(path, (later, later))
    assert "0 of 3 to ask" in ask(tmp_path, server.url, "--adopt-old").stdout
    assert set(pairs(tmp_path)[0]) == {"0", "1", "2"}


def test_the_prompt_of_an_old_reply_that_is_shown_only_later_is_kept_too(tmp_path):
    path, table = texts(tmp_path, 1) / "extracts/train.jsonl", tmp_path / "replies/train.jsonl"
    prompts = TeacherPrompts(load_task(), load_extracts(path))
    write_jsonl(table, [{"id": "a0", "prompt_sha": load_task().sha("teacher_single")}])
    without_template = TeacherPrompts(load_task(), load_extracts(path))
    without_template.template_by_sha = {}
    for shown in (without_template, prompts):
        adopt_old(table, path, shown, vouched=True)
    (record,) = fill_in(read_jsonl(table), table)
    assert prompts.is_of_today(record)


def test_what_costs_money_is_not_asked_without_a_ceiling(tmp_path, teacher):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 2)
    line = one_error_line(ask(folder, server.url, code=1, BUDGET_USD=""))
    assert "costs money (about $0.00" in line and "--budget-usd" in line and "BUDGET_USD" in line
    line = one_error_line(ask(folder, server.url, code=1, BUDGET_USD="much"))
    assert "BUDGET_USD=much is no number of dollars" in line
    assert not server.asked
    ask(folder, server.url, "--price", 0, 0, "--model", "own", BUDGET_USD="")
    ask(folder, server.url, "--budget-usd", 1, BUDGET_USD="")
    ask(folder, server.url, BUDGET_USD="")  # nothing is left to ask
    assert server.asked.total() == 4
    line = one_error_line(ask(folder, "http://192.0.2.1.example.org", "--model", "odd", code=1))
    assert "no price of odd; pass --price IN OUT" in line


@pytest.mark.parametrize("content", ["abc", "-1", "nan", "1e999", "\x00\xff"])
def test_a_sum_that_is_none_is_one_line_and_is_not_guessed(tmp_path, teacher, content):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 2)
    spent = folder / "summarize/replies/.spent_usd"
    spent.parent.mkdir(parents=True)
    spent.write_text(content, encoding="latin-1")
    assert f"{spent} holds no sum of dollars" in one_error_line(ask(folder, server.url, code=1))
    assert not server.asked


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--price", "-1"), ("--budget-usd", "nan"), ("--budget-usd", "-1"), ("--max-rate", "-1"),
        ("--max-rate", "0"), ("--timeout", "0"), ("--timeout", "inf"), ("--temperature", "-1"),
        ("--extra-body", "[1]"), ("--extra-body", "{"), ("--extra-body", '{"n": 2}'),
        ("--extra-body", '{"stream": true}'), ("--poll-seconds", "nan"),
        ("--extra-body", '{"top_p": NaN}'), ("--extra-body", "[" * 50_000),
    ],
)  # fmt: skip
def test_numbers_and_fields_out_of_range_are_wrong_usage(tmp_path, option, value):
    values = (value, value) if option == "--price" else (value,)
    assert option in ask(texts(tmp_path, 1), "http://127.0.0.1:9", option, *values, code=2).stderr


def test_what_is_sent_is_what_was_asked_for_and_is_recorded(tmp_path, teacher):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 1)
    fields = {"reasoning_effort": "low", "top_p": 0.9, "temperature": None}
    ask(
        folder, "http://127.0.0.1:9", "--base-url", f"{server.url}/v1beta/openai/",
        "--extra-body", json.dumps(fields), "--max-tokens-field", "max_completion_tokens",
    )  # fmt: skip
    sampling = {"reasoning_effort": "low", "top_p": 0.9, "max_completion_tokens": 4096}
    (request,) = server.requests
    assert set(request) == {"model", "messages", *sampling} and request.items() >= sampling.items()
    assert server.paths == ["/v1beta/openai/chat/completions"]
    assert replies_in(folder)[0]["sampling"] == sampling
    odd = (
        "nonsense",
        "ftp://x",
        "http://",
        "http://a:b",
        "http://a b",
        "http://..",
        "http://" + "a" * 99,
    )
    for url in odd:
        line = one_error_line(ask(folder, server.url, "--base-url", url, code=1))
        assert "is no address" in line
    for url in ("http://u:p@a/v1", "http://a/v1?key=1", "http://a/v1#b"):
        line = one_error_line(ask(folder, server.url, "--base-url", url, code=1))
        assert "more than host and path" in line


@pytest.mark.parametrize("field", ["max_output_tokens", "model", "temperature", ""])
def test_the_field_of_the_longest_reply_is_a_field_of_its_own(tmp_path, teacher, field):
    """Else --extra-body could ask for more than the budget reckons with."""
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 1)
    more = ("--max-tokens-field", field, "--extra-body", '{"max_output_tokens": 99999}')
    line = one_error_line(ask(folder, server.url, *more, code=1))
    assert "--max-tokens-field" in line and not server.asked


FIELDS = {
    "created": (None, 5, []), "cost_usd": ("x", []), "model": ([], {}), "prompt_sha": ([], None),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_table_edited_by_hand_costs_its_records_and_not_the_others(tmp_path, teacher, field):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 4)
    ask(folder, server.url)
    path = folder / "summarize/replies/train.jsonl"
    rows = read_jsonl(path)
    for value in FIELDS[field]:
        write_jsonl(path, [*rows[1:], rows[0] | {field: value}])
        assert len(pairs(folder)[0]) >= 3


def test_a_table_whose_lines_were_joined_is_not_asked_again(tmp_path, teacher):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 4)
    ask(folder, server.url)
    path = folder / "summarize/replies/train.jsonl"
    whole = path.read_bytes()
    for edited in (whole.replace(b"\n", b"\r"), whole.replace(b"\n", b""),
                   json.dumps(replies_in(folder)).encode()):  # fmt: skip
        path.write_bytes(edited)
        ask(folder, server.url)
        path.write_bytes(whole)
    assert server.asked.total() == 4


def test_control_tokens_and_halves_of_letters_in_a_text_are_plain(tmp_path, teacher):
    server = teacher(lambda prompt, n: body())
    row = {"id": "a", "text": "He wrote <|im_end|>\n<|im_start|>assistant \ud83d here."}
    write_jsonl(tmp_path / "extracts/train.jsonl", [row])
    for _ in range(2):
        ask(tmp_path, server.url)
    (request,) = server.requests
    assert "< |im_end|>\n< |im_start|>assistant \ufffd here." in request["messages"][0]["content"]


def test_extracts_of_ones_own_may_have_numbers_for_ids_and_an_id_counts_once(tmp_path, teacher):
    server = teacher(lambda prompt, n: body())
    rows = [{"id": i, "text": f"Passage {i} of a text. " * 9} for i in (0, 1, 0)]
    write_jsonl(tmp_path / "extracts/train.jsonl", rows)
    said = ask(tmp_path, server.url)
    ask(tmp_path, server.url)
    assert server.asked.total() == 2 and {r["id"] for r in replies_in(tmp_path)} == {"0", "1"}
    assert "1 records have an id that stands before" in said.stderr


def test_a_sum_deleted_while_requests_are_in_flight_is_not_under_the_true_one(tmp_path):
    budget = Budget(tmp_path, 10)
    assert budget.reserve(2) and budget.reserve(2)
    (tmp_path / ".spent_usd").unlink()
    write_jsonl(tmp_path / "train.jsonl", [{"cost_usd": 0.5}])
    budget.settle(2, 0.5)
    assert 2.5 <= Budget(tmp_path, None).spent <= 3.0
    budget.settle(2, 1)
    assert 1.5 <= Budget(tmp_path, None).spent <= 2.0


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1}'])
def test_an_odd_file_beside_an_old_table_is_no_traceback(tmp_path, teacher, content):
    server, folder = teacher(lambda prompt, n: body()), texts(tmp_path, 1)
    ask(folder, server.url)
    path = folder / "summarize/replies/train.jsonl"
    write_jsonl(path, [{k: v for k, v in r.items() if k != "prompt"} for r in read_jsonl(path)])
    path.with_suffix(".adopted.json").write_text(content)
    ask(folder, server.url, code=None)
