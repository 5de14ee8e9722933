"""Pairs that differ in quality alone: a fact exchanged, a run's own samples, a person's choices."""

import json

import pytest
from conftest import one_error_line, read_jsonl, run_stage, write_jsonl
from datasets import load_dataset
from test_build_pairs import build, extract, pairs_in, prompt_of, single, squeezed

from common.files import digest
from data_prep.audit_pairs import audit, measure
from data_prep.candidates import NoPair
from data_prep.find_facts import invented_facts
from data_prep.pairs_from_samples import pick_sides

RUN = "smollm2-135m-sft"
NAMED = {
    "a": "In 1951 the team of Anna Weber counted trees.",
    "b": "Then Karl Braun came in 1962.",
    "c": "It was Maria Rossi who left in 1888.",
}


def telling(key: str, answer: str) -> dict:
    """An extract that says what an answer says, not in its first sentence."""
    return extract(key) | {"text": f"Text {key}. {answer} It says more about lakes and rivers."}


def extracts_of(folder, *keys: str) -> None:
    """Extracts of the training split beside those that have a reply, each with facts of its own."""
    there = read_jsonl(folder / "data/extracts/train.jsonl")
    more = [telling(key, NAMED[key]) for key in keys]
    write_jsonl(folder / "data/extracts/train.jsonl", there + more)


def samples_of(folder, samples: dict[str, list[str]], run=RUN, end="stop") -> None:
    """A run's samples, as `just answers --split unseen` leaves them."""
    there = folder / f"outputs/{run}/eval/answers"
    texts = {row["id"]: row for row in read_jsonl(folder / "data/extracts/train.jsonl")}
    records = []
    for key, answers in samples.items():
        found = [{"text": text, "finish_reason": end, "n_new_tokens": 9} for text in answers]
        about = {"id": key, "prompt": prompt_of(texts[key], run, "samples"), "settings": {"n": 1}}
        records.append(about | {"samples": found})
    write_jsonl(there / "samples.jsonl", records)
    (there / "asked.json").write_text(json.dumps({"samples": {"n": 1}}))


def choice(text: str, chosen: str, rejected: str, **more) -> dict:
    record = {"id": digest(text), "text": text, "chosen": chosen, "rejected": rejected}
    record |= {"chosen_by": {"model": "one"}, "rejected_by": {"model": "other"}}
    return record | {"created": "2026-11-30T01:00:00+00:00"} | more


def test_a_corrupted_answer_differs_in_one_fact_and_asks_nobody(tmp_path):
    train = [single(key, answer) for key, answer in NAMED.items()]
    train.append(single("plain", "Lakes and rivers go on and on."))
    texts = [telling(r["id"], r["text"]) for r in train]
    options = ("--rejected", "corrupted")
    built = []
    for _ in range(2):
        result = build(tmp_path, train, [single("t", "Lakes.")], *options, texts=texts)
        built.append(pairs_in(tmp_path))
    assert built[0] == built[1] and [pair["id"] for pair in built[0]] == ["a", "b", "c"]
    for pair in built[0]:
        assert pair["chosen"] == NAMED[pair["id"]] and pair["rejected"] != pair["chosen"]
        assert not invented_facts(pair["chosen"], pair["prompt"])
        assert invented_facts(pair["rejected"], pair["prompt"])  # so alike that teachers' would go
        assert (pair["kind"], pair["rejected_by"], pair["ratings"]) == ("corrupted",) * 2 + (None,)
    assert "| dropped: no name or number to exchange | 1 | 0 |" in squeezed(result.stdout)
    (test,) = pairs_in(tmp_path, "test")
    assert (test["chosen"], test["kind"], test["rejected"]) == ("Lakes.", "teacher", "")
    run_stage("data_prep.build_dataset", cwd=tmp_path)
    card = (tmp_path / "data/summarize/hub/README.md").read_text()
    assert "with one name or number exchanged" in card and "from other texts" in card
    assert "not checked for difference, similarity" in card and "Levenshtein" not in card


def test_an_exchange_within_the_text_takes_what_is_there(tmp_path):
    text = "Then Anna Weber met Karl Otto Braun in 1951 and in 1962."
    texts = [extract("a") | {"text": text * 3}]
    train = [single("a", "It was Anna Weber in 1951.")]
    options = ("--rejected", "corrupted", "--exchange", "text")
    build(tmp_path, train, [single("t", "Lakes.")], *options, texts=texts)
    (pair,) = pairs_in(tmp_path)
    expected = ("It was Karl Otto Braun in 1951.", "It was Anna Weber in 1962.")
    assert pair["rejected"] in expected


def test_of_samples_the_supported_one_that_is_most_like_all_is_chosen():
    text = "In 1951 Anna Weber counted trees at Lake Baikal."
    samples = [
        "Trees were counted.",  # says nothing that could be wrong
        "In 1951 she counted trees.",
        "There Anna Weber counted trees in 1951.",
        "There Anna Weber counted trees in 1952.",
        "There Anna Weber counted all of the many trees in 1953 and then some more of them.",
    ]
    chosen, rejected = pick_sides(text, samples)
    assert (chosen, rejected) == (samples[2], samples[3])
    with pytest.raises(NoPair, match="its text lacks"):
        pick_sides(text, samples[:3])
    with pytest.raises(NoPair, match="supports"):
        pick_sides(text, [samples[0], *samples[3:]])


def test_of_samples_a_rejected_one_is_not_longer_where_there_is_such_a_one():
    text = "In 1951 Anna Weber counted trees at Lake Baikal."
    chosen = "There Anna Weber counted trees in 1951."
    longer = "There Anna Weber counted many trees in 1952."
    shorter = "Anna Weber counted in 1953."
    assert pick_sides(text, [chosen, longer, shorter]) == (chosen, shorter)
    longest = "There Anna Weber and others counted many trees in 1954."
    assert pick_sides(text, [longest, chosen, longer]) == (chosen, longer)


def test_pairs_of_samples_need_no_reply_to_their_texts(tmp_path):
    build(tmp_path, [single("seen", "Lakes.")], [single("t", "Lakes.")], "--rejected", "none")
    extracts_of(tmp_path, *NAMED)
    other = "There Otto Frank came in 1962."
    samples = {"a": [NAMED["a"], other], "b": [NAMED["b"]], "seen": [NAMED["a"], other]}
    samples_of(tmp_path, samples)
    options = ("--rejected", "samples", "--student", RUN)
    result = run_stage("data_prep.build_pairs", *options, cwd=tmp_path)
    (pair,) = pairs_in(tmp_path)
    by = f"{RUN}:samples"
    expected = {"id": "a", "kind": "samples", "chosen": NAMED["a"], "rejected": other}
    expected |= {"chosen_by": by, "rejected_by": by, "teacher": None, "prompt_sha": None}
    assert pair.items() >= expected.items()
    for row in (
        "| pairs kept | 1 | 1 |",
        f"| dropped: no samples by {by} | 1 | 0 |",
        "| dropped: no sample with a name or number that its text lacks | 1 | 0 |",
        "| all | 3 | 1 |",
    ):
        assert row in squeezed(result.stdout)
    (tmp_path / "data/summarize/replies/train.jsonl").unlink()
    run_stage("data_prep.build_pairs", *options, cwd=tmp_path)
    assert [pair["id"] for pair in pairs_in(tmp_path)] == ["a"]  # of "seen" none is supported
    run_stage("data_prep.build_dataset", cwd=tmp_path)
    rows = load_dataset(str(tmp_path / "data/summarize/hub"))
    assert rows["train"][0]["chosen_by"] == by and rows["train"][0]["teacher"] is None
    assert rows["test"][0]["reference"] == "Lakes."
    card = (tmp_path / "data/summarize/hub/README.md").read_text()
    assert f"(the run `{RUN}`) sampled" in card and "For each test document a teacher" in card
    samples_of(tmp_path, samples, end="length")
    error = run_stage("data_prep.build_pairs", *options, cwd=tmp_path, code=1)
    assert "no train pair is left" in one_error_line(error)
    gone = run_stage("data_prep.build_pairs", *options[:3], "gone", cwd=tmp_path, code=1)
    assert "no samples answers in outputs/gone" in one_error_line(gone)
    assert "--split unseen" in one_error_line(gone)


def test_choices_become_pairs_and_the_later_of_two_contrary_ones_counts(tmp_path):
    lakes, rivers = "Text about lakes. " * 9, "Text about rivers. " * 9
    choices = [
        choice(lakes, "Lakes freeze.", "Lakes melt."),
        choice(rivers, "Rivers run.", "Rivers stand."),
        choice(lakes, "Lakes melt.", "Lakes freeze."),
        choice(rivers, "Rivers run.", "I cannot do that."),
        choice(rivers, "Rivers run.", "Rivers stand."),
    ]
    train, test = [single("a", NAMED["a"])], [single("t", "Lakes.")]
    missing = build(tmp_path, train, test, "--rejected", "choices", code=1)
    assert "just play" in one_error_line(missing)
    path = write_jsonl(tmp_path / "data/summarize/choices.jsonl", choices)
    result = build(tmp_path, train, test, "--rejected", "choices")
    pairs = pairs_in(tmp_path)
    sides = [(pair["chosen"], pair["rejected"]) for pair in pairs]
    assert sides == [
        ("Lakes melt.", "Lakes freeze."),
        ("Rivers run.", "I cannot do that."),
        ("Rivers run.", "Rivers stand."),
    ]
    assert {(pair["chosen_by"], pair["rejected_by"]) for pair in pairs} == {
        ("one:choices", "other:choices")
    }
    assert len({pair["id"] for pair in pairs}) == 3
    for reason in ("the other answer was chosen later", "chosen once more later"):
        assert f"| dropped: {reason} | 1 | 0 |" in squeezed(result.stdout)
    run_stage("data_prep.build_dataset", "--licence", "CC0", cwd=tmp_path)
    card = (tmp_path / "data/summarize/hub/README.md").read_text()
    assert "A person was shown two models' answers" in card
    write_jsonl(path, [*choices, choice(lakes, None, "x"), {"id": "torn"}])
    assert "passed over" in build(tmp_path, train, test, "--rejected", "choices").stderr


def test_a_choice_about_a_test_text_is_no_training_pair(tmp_path):
    test_text = extract("t")["text"]
    choices = [
        choice(text, "Lakes freeze.", "Lakes melt.")
        for text in (test_text, f"{test_text}\n", "Text about lakes. " * 9)
    ]
    write_jsonl(tmp_path / "data/summarize/choices.jsonl", choices)
    train, test = [single("a", NAMED["a"])], [single("t", "Lakes.")]
    result = build(tmp_path, train, test, "--rejected", "choices")
    prompts = {pair["prompt"] for pair in pairs_in(tmp_path)}
    assert prompts == {choices[2]["text"]}
    assert prompts.isdisjoint(pair["prompt"] for pair in pairs_in(tmp_path, "test"))
    said = squeezed(result.stdout)
    assert "| dropped: its text is a test text | 2 | 0 |" in said and "| all | 3 | 1 |" in said


def test_several_kinds_stand_together(tmp_path):
    train = [single("a", NAMED["a"]), single("b", "Lakes."), single("c", NAMED["c"])]
    write_jsonl(
        tmp_path / "data/summarize/choices.jsonl",
        [choice("Text about lakes. " * 9, "Lakes freeze.", "Lakes melt.")],
    )
    texts = [telling(r["id"], r["text"]) for r in train]
    options = ("--rejected", "corrupted", "choices")
    result = build(tmp_path, train, [single("t", "Lakes.")], *options, texts=texts)
    assert [pair["kind"] for pair in pairs_in(tmp_path)] == ["corrupted", "corrupted", "choices"]
    said = squeezed(result.stdout)
    assert "| reason | train, corrupted | train, choices | test |" in said
    assert "| pairs kept | 2 | 1 | 1 |" in said and "| all | 3 | 1 | 1 |" in said
    (dropped,) = read_jsonl(tmp_path / "data/summarize/pairs/dropped.jsonl")
    assert (dropped["id"], dropped["kind"]) == ("b", "corrupted")
    run_stage("data_prep.build_dataset", "--licence", "CC0", cwd=tmp_path)
    card = (tmp_path / "data/summarize/hub/README.md").read_text()
    assert "- `corrupted`:" in card and "- `choices`:" in card
    wrong = build(tmp_path, train, None, "--rejected", "none", "choices", code=1)
    assert "no other kind" in one_error_line(wrong)


def test_a_length_that_hardly_any_pair_differs_in_is_no_signal():
    """Corrupted answers are as long as the chosen ones, but for a few."""
    pairs = [
        {"source": "a", "chosen": "one two three", "rejected": "one two" if i < 9 else "two one it"}
        | {"chosen_position": None}
        for i in range(100)
    ]
    assert "may learn" not in audit(measure(pairs))
    pairs[9:40] = pairs[:1] * 31
    assert "may learn" in audit(measure(pairs))
