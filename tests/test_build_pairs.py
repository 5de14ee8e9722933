import dataclasses
import json
import re
from argparse import Namespace
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from conftest import one_error_line, read_jsonl, run_stage, teacher_reply, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import digest
from data_prep.audit_pairs import SIDES, audit, length_match, measure
from data_prep.filter_pairs import CHECKS, language, limits_of, pair_faults, repetition
from data_prep.teacher.teacher_prompts import prompt_digest
from prompts.task import FOLDER, load_task

STAGE = "data_prep.build_pairs"
ONE, TWO = "Lakes freeze from the top because ice floats.", "Rivers carry silt to the sea."
LONG_ENGLISH = (
    "The lakes of the north freeze in the winter, and the ice on the water is thick. " * 2
)
FRENCH = (
    "Les lacs du nord gèlent en hiver, et la glace y est si épaisse que l'on peut y marcher. " * 2
)
STUDENT = "qwen2-1.5b-dpo-sft-qlora"
few = settings(max_examples=30, deadline=None)


def extract(key: str) -> dict:
    text = f"The text of {key}. " + "It goes on and on about lakes and rivers. " * 5
    return {"id": key, "source": "wikipedia", "url": f"u/{key}", "text": text, "n_tokens": 60}


def reply(key: str, text: str, model: str = "m", finish: str = "stop", sha: str = "p") -> dict:
    return {
        "id": key,
        "model": model,
        "prompt_sha": sha,
        "text": text,
        "finish_reason": finish,
        "created": "2026-10-01",
        "cost_usd": 0.5,
        "usage": {"prompt_tokens": 90, "completion_tokens": 10},
    }


def single(key: str, text: str) -> dict:
    return reply(key, text) | {"answers": 1}


def build(folder, train, test=None, *options, code=0, task="summarize", texts=(), **env):
    test = test or [reply("t", teacher_reply(ONE, TWO, (12, 12)))]
    given = {one["id"]: one for one in texts}
    for split, replies in (("train", train), ("test", test)):
        keys = {r["id"] for r in replies} - {"gone"} or {"x"}
        extracts = [given.get(key) or extract(key) for key in sorted(keys)]
        write_jsonl(folder / f"data/extracts/{split}.jsonl", extracts)
        by_id = {one["id"]: one["text"] for one in extracts}
        known = [{"text_digest": digest(by_id.get(r["id"], ""))} | r for r in replies]
        write_jsonl(folder / f"data/{task}/replies/{split}.jsonl", known)
    return run_stage(STAGE, "--task", task, *options, cwd=folder, code=code, **env)


def pairs_in(folder, split="train", name="pairs", task="summarize") -> list[dict]:
    return read_jsonl(folder / f"data/{task}/{name}/{split}.jsonl")


def prompt_of(row: dict, run: str, system: str) -> str:
    """What the answer of a run to an extract is found again by."""
    task = load_task("title" if run.startswith("title-") else "summarize")
    template = task.student_template(instructed=system == "instructed")
    return prompt_digest(task.student_messages(row["text"], template))


def answers_of(folder, answers: dict[str, str], run=STUDENT, system="instructed") -> None:
    """Write a model's answers, after those of other settings, as `just answers` leaves them."""
    there = folder / f"outputs/{run}/eval/answers"
    stale = [{"id": key, "settings": {"n": 1}, "text": "stale"} for key in [*answers, "stale"]]
    records = [
        {"id": key, "prompt": prompt_of(extract(key), run, system), "settings": {"n": 2}}
        | {"text": text}
        for key, text in answers.items()
    ]
    write_jsonl(there / f"{system}.jsonl", stale + records)
    (there / "asked.json").write_text(json.dumps({system: {"n": 2}}, indent=1))


def squeezed(text: str) -> str:
    """A Markdown table without its padding."""
    return re.sub(r" +", " ", text)


def test_every_reply_is_in_exactly_one_of_pairs_and_dropped(tmp_path):
    train = [
        reply("good", teacher_reply(ONE, TWO, (11, 16))),
        reply("close", teacher_reply(ONE, TWO, (15, 14))),
        reply("edge", teacher_reply(ONE, TWO, (16, 14))),
        reply("alike", teacher_reply(ONE, ONE + "!", (16, 12))),
        reply("refused", "I would rather not."),
        reply("cut", teacher_reply(ONE, TWO), finish="length"),
        reply("gone", teacher_reply(ONE, TWO)),
        reply("good", teacher_reply(ONE, TWO)),
    ]
    result = build(tmp_path, train)
    dropped = read_jsonl(tmp_path / "data/summarize/pairs/dropped.jsonl")
    pairs = pairs_in(tmp_path)
    expected = {
        "id": "good",
        "source": "wikipedia",
        "url": "u/good",
        "chosen": TWO,
        "rejected": ONE,
        "rejected_by": "teacher",
        "chosen_position": 2,
        "ratings": [16, 11],
        "teacher": "m",
        "prompt_sha": "p",
        "prompt": extract("good")["text"],
    }
    assert pairs[0].items() >= expected.items()
    assert [sum(criteria.values()) for criteria in pairs[0]["criteria"]] == [16, 11]
    assert [p["id"] for p in pairs] == ["good", "edge"]
    assert {d["id"]: d["reason"].split(" (")[0] for d in dropped} == {
        "close": "difference",
        "alike": "similarity",
        "refused": "not readable",
        "cut": "unusable",
        "gone": "its extract is gone",
        "good": "a second reply to the same extract",
    }
    assert dropped[0]["detail"] == "scores 15 and 14" and dropped[0]["split"] == "train"
    for row in (
        "| reason | train | test |",
        "| replies | 8 | 1 |",
        "| pairs kept | 2 | 1 |",
        "| dropped: unusable (cut at the token limit) | 1 | 0 |",
        "The replies cost $4.50, $1.50000 for each pair that was kept.",
    ):
        assert row in squeezed(result.stdout)
    (test,) = pairs_in(tmp_path, "test")  # a tie serves as a reference
    assert {test["chosen"], test["rejected"]} == {ONE, TWO} and test["ratings"] == [12, 12]
    made = json.loads((tmp_path / "data/summarize/pairs/made.json").read_text())
    assert made["dates"] == ["2026-10-01"] * 2 and made["limits"]["similarity"] == 0.75


def test_an_unknown_cost_is_no_number(tmp_path):
    train = [reply("a", teacher_reply(ONE, TWO)) | {"cost_usd": None}]
    assert "The replies cost an unknown sum" in build(tmp_path, train).stdout


def pair_of(chosen: str, rejected: str = TWO, text: str = LONG_ENGLISH, **other) -> dict:
    pair = {"prompt": text, "chosen": chosen, "rejected": rejected, "ratings": [16, 11]}
    return pair | {"rejected_by": "teacher"} | other


FAULTS = {
    "longer": pair_of("word " * 80),
    "refusal": pair_of("I'm sorry, but I cannot do that."),
    "repetition": pair_of("It is so and it is so and it is so and it is so."),
    "lead": pair_of("The lakes of the north freeze in the winter,"),
    "language": pair_of(FRENCH[:110], text=LONG_ENGLISH * 3),
    "length": pair_of(ONE, text=LONG_ENGLISH * 20),
}


def faults_of(pair: dict, split: str = "train", without: str = "", **limits) -> set[str]:
    limits = {k: v for k, v in (load_task().checks | limits).items() if k != without}
    args = Namespace(limits=limits, tokenizer="any")
    found = list(pair_faults(pair, split, args, load_task()))
    assert all(detail for _, detail in found)  # every fault says by how much, or what
    return {name for name, _ in found}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault_and_is_made_only_if_named(name, monkeypatch):
    counter = SimpleNamespace(count=len)
    monkeypatch.setattr("data_prep.filter_pairs.load_counter", lambda tokenizer: counter)
    bad = FAULTS[name]
    assert name in faults_of(bad) and name not in faults_of(bad, without=name)
    assert faults_of(pair_of(ONE)) == set()
    assert (name in faults_of(bad, "test")) == (name != "length")
    swapped = {**bad, "chosen": TWO, "rejected": bad["chosen"]}
    assert name in faults_of(swapped) and not faults_of(swapped, "test")
    by_student = {**swapped, "rejected_by": "run:instructed", "ratings": None}
    assert (name in faults_of(by_student)) == (name == "length")


def test_plain_english_french_and_short_texts_are_told_apart():
    assert language(LONG_ENGLISH) == "en" and language(FRENCH) == "fr" and language("Eis.") == ""


@few
@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30))
def test_repetition_is_the_share_of_repeated_four_grams(words):
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(" ".join(words)) == pytest.approx(repeats / len(grams) if grams else 0)


def test_length_is_that_of_the_students_prompt_with_the_answer(tmp_path, monkeypatch):
    counter = SimpleNamespace(count=len)
    monkeypatch.setattr("data_prep.filter_pairs.load_counter", lambda tokenizer: counter)
    prompts = tmp_path / "prompts/summarize"
    prompts.mkdir(parents=True)
    for name in ("task.yaml", "teacher.jinja"):
        (prompts / name).write_text((FOLDER / "summarize" / name).read_text())
    train = [reply("a", teacher_reply(ONE, TWO)), reply("b", teacher_reply(TWO, ONE))]
    whole = len(extract("a")["text"] + ONE) + 48
    options = ["--prompts-dir", tmp_path / "prompts", "--check", f"length={whole}"]
    build(tmp_path, train, None, *options)
    (prompts / "student.jinja").write_text("In short: {{ text }}")
    result = build(tmp_path, train, None, *options, code=1)
    assert "no train pair is left" in one_error_line(result)
    assert "| dropped: length | 2 | 0 |" in squeezed(result.stdout)
    build(tmp_path, train, None, *options, "--keep", "length")


def test_limits_are_options_and_an_unknown_check_is_one_line(tmp_path):
    train = [
        reply("close", teacher_reply(ONE, TWO, (15, 14))),
        reply("alike", teacher_reply(ONE, ONE + "!", (16, 12))),
    ]
    build(tmp_path, train, None, "--check", "difference=0", "similarity=1")
    assert len(pairs_in(tmp_path)) == 2
    build(tmp_path, train, None, "--keep", "difference", "similarity")
    assert len(pairs_in(tmp_path)) == 2
    for option in ("--check=colour=1", "--keep=colour"):
        error = one_error_line(build(tmp_path, train, None, option, code=1))
        assert option[:6] in error and "no check colour" in error and "repetition" in error
    error = one_error_line(build(tmp_path, train, None, "--check", "similarity=high", code=1))
    assert "a number" in error and "high" in error
    for option in (
        "similarity=nan",
        "repetition=2",
        "length=inf",
        "difference=-1",
        "lead=0.5",
        "lead",
    ):
        error = one_error_line(build(tmp_path, train, None, "--check", option, code=1))
        assert f"--check: {option.partition('=')[0]} is " in error
    task = dataclasses.replace(load_task(), checks={"lead": True})
    assert limits_of(task, ["refusal=true", "longer=2"], []) == {
        "lead": 1.0,
        "refusal": 1.0,
        "longer": 2.0,
    }
    folder = tmp_path / "prompts/odd"
    folder.mkdir(parents=True)
    given_task = yaml.safe_load((FOLDER / "summarize/task.yaml").read_text())
    (folder / "task.yaml").write_text(yaml.safe_dump({**given_task, "checks": {"colour": 1}}))
    options = ("--prompts-dir", tmp_path / "prompts")
    error = one_error_line(build(tmp_path, train, None, *options, task="odd", code=1))
    assert "odd/task.yaml: no check colour" in error


def test_of_several_prompts_the_one_with_most_replies_is_taken_in_both_splits(tmp_path):
    train = [reply(key, teacher_reply(ONE, TWO)) for key in "abc"]
    train.append(reply("a", teacher_reply(TWO, ONE), sha="newer"))
    test = [reply("t", teacher_reply(ONE, TWO)), reply("t", teacher_reply(TWO, ONE), sha="newer")]
    test.append(reply("u", teacher_reply(TWO, ONE), sha="newer"))
    result = build(tmp_path, train, test)
    assert "3 by m with prompt p, 1 by m with prompt newer; taking p" in result.stdout
    assert "--prompt-sha" in result.stdout
    for split, kept in (("train", 3), ("test", 1)):
        pairs = pairs_in(tmp_path, split)
        assert {pair["prompt_sha"] for pair in pairs} == {"p"} and len(pairs) == kept
    build(tmp_path, train, test, "--prompt-sha", "newer")
    assert pairs_in(tmp_path)[0]["chosen"] == TWO
    missing = build(tmp_path, train, test, "--prompt-sha", "gone", code=1)
    assert "there are 3 by m with prompt p" in one_error_line(missing)


def test_of_several_teachers_one_is_taken_or_chosen(tmp_path):
    train = [reply(key, teacher_reply(ONE, TWO)) for key in "ab"]
    train.append(reply("a", teacher_reply(TWO, ONE), "other"))
    test = [reply("t", teacher_reply(ONE, TWO), model) for model in ("m", "other")]
    assert "2 by m with prompt p, 1 by other" in build(tmp_path, train, test).stdout
    assert [pair["teacher"] for pair in pairs_in(tmp_path)] == ["m", "m"]
    build(tmp_path, train, test, "--model", "other")
    assert [pair["chosen"] for pair in pairs_in(tmp_path)] == [TWO]
    missing = build(tmp_path, train, test, "--model", "third", code=1)
    assert "no such replies" in one_error_line(missing)


def test_a_failed_run_leaves_the_old_pairs_with_their_audit_or_none_that_a_stage_takes(
    tmp_path, monkeypatch
):
    build(tmp_path, [reply("a", teacher_reply(ONE, TWO))])
    made = tmp_path / "data/summarize/pairs/made.json"
    before = made.read_text()
    newer = [reply(key, teacher_reply(ONE, TWO)) for key in "bc"]
    build(tmp_path, newer, [reply("t", "no")], code=1)
    assert [pair["id"] for pair in pairs_in(tmp_path)] == ["a"] and made.read_text() == before

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_prep.build_pairs.audit", full_disk)
    assert "No space left" in one_error_line(build(tmp_path, newer, code=1))
    result = run_stage("data_prep.build_dataset", cwd=tmp_path, code=1)
    assert "just pairs" in one_error_line(result)


def test_a_split_without_pairs_is_an_error(tmp_path):
    result = build(tmp_path, [reply("a", "no")], code=1)
    assert "no train pair is left" in one_error_line(result)


def test_no_replies_says_how_to_get_them(tmp_path):
    assert "just replies" in one_error_line(run_stage(STAGE, cwd=tmp_path, code=1))


def test_the_students_answers_are_rejected_and_only_those_asked_for_last(tmp_path):
    train = [single(key, ONE) for key in ("a", "refusal", "alike", "stale", "silent")]
    answers_of(tmp_path, {"a": TWO, "refusal": "I cannot.", "alike": ONE + "!", "silent": " \n"})
    test = [single("t", TWO)]
    result = build(tmp_path, train, test, "--rejected", "student")
    pairs = pairs_in(tmp_path)
    assert {pair["id"]: pair["rejected"] for pair in pairs} == {"a": TWO, "refusal": "I cannot."}
    expected = {"chosen": ONE, "rejected_by": f"{STUDENT}:instructed", "ratings": None}
    assert pairs[0].items() >= expected.items() and pairs[0]["chosen_position"] is None
    reasons = (f"no answer by {STUDENT}:instructed", "similarity", "the rejected answer is empty")
    for reason in reasons:
        assert f"| dropped: {reason} | 1 " in squeezed(result.stdout)
    (reference,) = pairs_in(tmp_path, "test")
    assert (reference["chosen"], reference["rejected"]) == (TWO, "")
    assert "first wins" not in result.stdout


def test_a_run_or_a_student_of_another_task_is_found(tmp_path):
    answers_of(tmp_path, {"a": TWO}, "round-1", "tuned")
    build(tmp_path, [single("a", ONE)], [single("t", TWO)], "--rejected", "round-1")
    assert pairs_in(tmp_path)[0]["rejected_by"] == "round-1:tuned"
    answers_of(tmp_path, {"a": TWO}, f"title-{STUDENT}")
    options = ("--rejected", "student")
    build(tmp_path, [single("a", ONE)], [single("t", TWO)], *options, task="title")
    assert pairs_in(tmp_path, task="title")[0]["rejected"] == TWO
    result = build(tmp_path, [single("a", ONE)], None, *options, "--student", "none", code=1)
    error = one_error_line(result)
    assert "no instructed answers in outputs/none/eval/answers; make them: `just answers" in error


def test_of_two_answers_that_tie_one_is_drawn_by_the_id_where_a_student_is_rejected(tmp_path):
    keys = [f"k{i}" for i in range(20)]
    unrated = f"Summary 1:\n{ONE}\n\nSummary 2:\n{TWO}\n"
    train = [reply(key, unrated if i % 2 else teacher_reply(ONE, TWO, (14, 14)))
             for i, key in enumerate(keys)]  # fmt: skip
    train.append(reply("better", teacher_reply(ONE, TWO, (12, 16))))
    answers_of(tmp_path, dict.fromkeys([*keys, "better"], "A student wrote this."))
    drawn = []
    for _ in range(2):
        build(tmp_path, train, None, "--rejected", "student")
        drawn.append({pair["id"]: pair["chosen"] for pair in pairs_in(tmp_path)})
    assert drawn[0] == drawn[1] and drawn[0].pop("better") == TWO
    assert len(drawn[0]) == 20 and {*drawn[0].values()} == {ONE, TWO}


def test_single_answers_have_no_worse_one_of_the_teachers(tmp_path):
    result = build(tmp_path, [single("a", ONE)], [single("t", TWO)], code=1)
    assert "--rejected student" in one_error_line(result)


def test_chosen_answers_alone_for_sft_need_no_other_model(tmp_path):
    train = [single("a", ONE), single("b", "I cannot."), reply("c", teacher_reply(ONE, TWO))]
    options = ("--rejected", "none")
    result = build(tmp_path, [train[0], train[1]], [single("t", TWO)], *options)
    (kept,) = pairs_in(tmp_path)
    assert (kept["chosen"], kept["rejected"], kept["rejected_by"]) == (ONE, "", None)
    assert "| dropped: refusal | 1 " in squeezed(result.stdout)
    assert "wins" not in result.stdout and "words, rejected" not in result.stdout
    build(tmp_path, [train[2]], None, *options)
    assert [(p["chosen"], p["rejected"]) for p in pairs_in(tmp_path)] == [(ONE, "")]
    for other in ("--verify", "--length-match"):
        result = build(tmp_path, train, None, *options, other, code=1)
        assert "need a rejected answer" in one_error_line(result)


def test_named_pairs_stand_beside_others(tmp_path):
    build(tmp_path, [reply("a", teacher_reply(ONE, TWO))])
    answers_of(tmp_path, {"a": "A student wrote this."})
    options = ("--rejected", "student", "--name", "student")
    build(tmp_path, [reply("a", teacher_reply(ONE, TWO))], None, *options)
    assert pairs_in(tmp_path)[0]["rejected"] == TWO
    assert pairs_in(tmp_path, name="pairs-student")[0]["rejected"] == "A student wrote this."
    run_stage("data_prep.build_dataset", "--name", "student", cwd=tmp_path)
    assert (tmp_path / "data/summarize/hub-student/README.md").exists()
    assert not (tmp_path / "data/summarize/hub").exists()


def test_verify_keeps_what_the_teacher_confirms_in_both_orders_and_asks_once(tmp_path, endpoint):
    def verdict(prompt: str) -> str:
        one = prompt.split("<summary-1>\n")[1]
        if "text of biased" in prompt:
            return "Better: 1"
        if "text of unread" in prompt:
            return "I do not know."
        return f"Better: {1 if one.startswith(ONE) != ('text of wrong' in prompt) else 2}"

    teacher = endpoint()
    teacher.reply = verdict
    train = [reply(key, teacher_reply(ONE, TWO)) for key in ("right", "wrong", "biased", "unread")]
    env = {"TOGETHER_BASE_URL": teacher.url}
    options = ["--verify", "--price", 1, 1, "--budget-usd"]
    poor = build(tmp_path, train, None, *options, 2.500001, code=1, **env)
    assert "8 verdicts are still to come" in one_error_line(poor) and not teacher.ledger
    result = build(tmp_path, train, None, *options, 3, **env)
    assert [pair["id"] for pair in pairs_in(tmp_path)] == ["right"]
    assert "| dropped: not confirmed by the teacher | 3 | 0 |" in squeezed(result.stdout)
    assert teacher.ledger.total() == 8
    assert len(read_jsonl(tmp_path / "data/summarize/replies/verdicts.jsonl")) == 8
    build(tmp_path, train, None, *options, 3, "--check", "similarity=0.9", **env)
    assert teacher.ledger.total() == 8


def plain_levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@few
@given(
    st.text(max_size=20),
    st.text(min_size=1, max_size=20),
    st.integers(4, 18),
    st.integers(4, 18),
    st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    st.integers(0, 3),
)
def test_the_two_filters_by_their_definitions(a, b, high, low, most, least):
    alike = 1 - plain_levenshtein(a, b) / max(len(a), len(b))
    faulty = {"similarity"} if alike > most else set()
    faulty |= {"difference"} if high - low <= least else set()
    limits = {"similarity": most, "difference": least}
    args = Namespace(limits=limits, tokenizer="any")
    pair = pair_of(a, b, ratings=[high, low])
    assert {name for name, _ in pair_faults(pair, "train", args, load_task())} == faulty


def audited(n: int, longer: float, first: float) -> list[dict]:
    """`n` pairs of which these shares are won by the longer and by the first answer."""

    def one(i: int) -> dict:
        sides = ["word " * (10 + i % 7), "word " * 5]
        chosen, rejected = sides if i < longer * n else sides[::-1]
        return {
            "id": str(i),
            "source": ("arxiv", "wikipedia")[i % 2],
            "chosen": chosen,
            "rejected": rejected,
            "chosen_position": 1 if i < first * n else 2,
        }

    return [one(i) for i in range(n)]


def test_the_audit_counts_what_it_says():
    said = squeezed(audit(measure(audited(100, 0.9, 0.5))))
    assert "| all | 100 |" in said and "| arxiv | 50 |" in said
    assert "| 90.0% [82.6%, 94.5%] | 50.0% [40.4%, 59.6%] |" in said  # Wilson's
    assert "the longer answer wins in 90% of the pairs" in said and "the first" not in said
    assert "the first answer wins in 10%" in audit(measure(audited(100, 0.5, 0.1)))
    assert "**" not in audit(measure(audited(100, 0.5, 0.5)))


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=60)


@few
@given(lengths)
def test_length_matching_leaves_two_equal_histograms(sizes):
    sides = pd.DataFrame(sizes, columns=SIDES)
    kept = length_match(sides.assign(id=sides.index))
    bins = sides.loc[sorted(kept)] // 5
    assert sorted(bins["chosen"]) == sorted(bins["rejected"])
    assert kept == length_match(sides.assign(id=sides.index))
    assert kept >= set(sides.index[sides["chosen"] == sides["rejected"]])
    counts = sides.floordiv(5).value_counts()
    most = sum(min(n, counts.get(lengths[::-1], 0)) for lengths, n in counts.items())
    assert len(kept) == most


def test_length_match_accounts_for_what_it_leaves_out(tmp_path):
    train = [reply(f"a{i}", teacher_reply(ONE + " And so on, and on.", TWO)) for i in range(3)]
    train += [
        reply(f"b{i}", teacher_reply(ONE + " And so on, and on.", TWO, (10, 15))) for i in range(2)
    ]
    result = build(tmp_path, train, None, "--length-match")
    assert "| pairs kept | 4 | 1 |" in squeezed(result.stdout)
    assert "| dropped: left out to match lengths | 1 | 0 |" in squeezed(result.stdout)
    (dropped,) = read_jsonl(tmp_path / "data/summarize/pairs/dropped.jsonl")
    assert dropped["model"] == "m" and dropped["split"] == "train"
    made = json.loads((tmp_path / "data/summarize/pairs/made.json").read_text())
    assert made["length_match"] and "50.0%" in made["audit"]


def test_checks_are_those_that_tasks_name():
    assert set(load_task().checks) == set(CHECKS) > set(load_task("title").checks)
