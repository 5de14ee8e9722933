import re
import subprocess
import sys

import pytest
import yaml
from conftest import clean_environment, make_tokenizer, one_error_line, run_stage, write_jsonl
from datasets import load_dataset
from huggingface_hub import DatasetCard

from common.cli import UserError
from data_prep.audit_pairs import audit, measure
from data_prep.filter_pairs import CHECKS
from prompts.task import FOLDER, load_task
from training.check_rows import check_template

STAGE = "data_prep.build_dataset"
UNRATED = dict.fromkeys(("ratings", "criteria", "chosen_position"))
BY_STUDENT = {**UNRATED, "rejected_by": "title-q:instructed"}


def pair(key: str, chosen: str = "Better.", **other: object) -> dict:
    return {
        "id": key,
        "source": "arxiv",
        "url": "u",
        "prompt": f"Text {key}\n\nwith é",
        "chosen": chosen,
        "rejected": "Worse one.",
        "rejected_by": "teacher",
        "chosen_position": 2,
        "ratings": [16, 11],
        "teacher": "openai/gpt-oss-120b",
        "criteria": [{"fluency": 3}, {"fluency": 2}],
        "prompt_sha": load_task().sha("teacher"),
        **other,
    }


@pytest.fixture
def stage(tmp_path):
    def run(train, test, *options, task="summarize", made=None, **kwargs):
        folder = tmp_path / "data" / task / "pairs"
        frame = measure(train)
        facts = {
            "limits": load_task(task).checks if task in ("summarize", "title") else {},
            "rejected": "teacher",
            "verify": False,
            "length_match": False,
            "audit": audit(frame),
            "funnel": "| dropped: difference | 4 | 4 |",
            "dates": ["2026-10-01", "2026-10-02"],
            "teacher_prompt": "Best summary: (1 or 2)",
        }
        for split, pairs in (("train", train), ("test", test)):
            write_jsonl(folder / f"{split}.jsonl", pairs)
        write_jsonl(folder / "made.json", [facts | (made or {})])
        data = ("--data", tmp_path / "data")
        result = run_stage(STAGE, "--task", task, *data, *options, **kwargs)
        return tmp_path / "data" / task / "hub", result

    return run


def test_it_loads_as_conversations_and_the_card_is_valid(stage):
    hub, _ = stage([pair("a"), pair("b")], [pair("t")])
    rows = load_dataset(str(hub))
    assert {split: len(part) for split, part in rows.items()} == {"train": 2, "test": 1}
    row = rows["train"].sort("id")[0]
    assert row["prompt"] == [{"role": "user", "content": "Text a\n\nwith é"}]
    assert row["chosen"] == [{"role": "assistant", "content": "Better."}]
    assert row["rejected"] == [{"role": "assistant", "content": "Worse one."}]
    assert row["ratings"] == [16.0, 11.0] and row["rejected_by"] == "teacher"
    assert row["reference"] is None and rows["test"][0]["reference"] == "Better."
    card = (hub / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert DatasetCard(card).data.to_dict() == metadata
    assert metadata["task_categories"] == ["summarization", "text-generation"]
    assert metadata["size_categories"] == ["n<1K"]
    for said in (
        "2 training pairs and 1 test",
        "openai/gpt-oss-120b",
        "consistency (1 to 5), fluency (1 to 3)",
        "4 to 18 points",
        "The rejected one is the worse of the teacher's two.",
        "| dropped: difference | 4 | 4 |",
        "Levenshtein similarity over 0.75",
        "Apache-2.0",
        "Best summary: (1 or 2)",
        "2026-10-01 to 2026-10-02",
        "each paper under the licence",
        "4 to 4 words (half of them at most 4) in `train`, 4 to 4 (4) in `test`",
        "Made with task-lora ",
        "The shortest text of `train`.",
    ):
        assert said in re.sub(" +", " ", card)
    for column in row:
        assert f"`{column}`" in card


def test_every_check_has_its_sentence_on_the_card(stage):
    limits = dict.fromkeys(CHECKS, 1.0) | {"length": 3072.0, "lead": 0.0}
    hub, _ = stage([pair("a")], [pair("t")], made={"limits": limits})
    card = (hub / "README.md").read_text()
    for name, check in CHECKS.items():
        sentence = check.sentence_for(limits[name], load_task())
        assert (f"- `{name}`: {sentence}\n" in card) == (name != "lead")  # which is off
        assert "{" not in sentence
    assert "more than 3,072 tokens" in card and "over 100% of the summary's 4-grams" in card


def test_the_card_and_the_rows_of_a_task_with_the_students_answers_rejected(stage):
    test = pair("t", rejected="", **{**UNRATED, "rejected_by": None})
    made = {"rejected": "student"}
    hub, _ = stage([pair("a", **BY_STUDENT)], [test], task="title", made=made)
    rows = load_dataset(str(hub))
    assert rows["train"][0]["rejected_by"] == "title-q:instructed"
    assert rows["train"][0]["ratings"] is rows["test"][0]["rejected_by"] is None
    assert rows["test"][0]["rejected"] is None
    card = (hub / "README.md").read_text()
    assert "wrote one title, which is the chosen one" in card and "writes titles" in card
    assert "the student's own answer" in card and "2507.06187" in card and "`title-q`" in card
    assert "title-generation" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "summar" not in card.split("## The teacher's prompt")[0].split("---")[2]
    assert " points" not in card
    made = {"rejected": "round-1", "verify": True, "length_match": True}
    train = [pair("a", **{**BY_STUDENT, "rejected_by": "round-1:tuned"})]
    hub, _ = stage(train, [pair("t")], made=made)
    card = (hub / "README.md").read_text()
    assert "2401.01335" in card and "run `round-1`" in card and "in both orders" in card
    assert "drawn by the text's `id`" in card and "equally long in distribution" in card


def test_chosen_answers_alone_are_no_pairs_and_the_card_says_so(stage):
    alone = {"rejected": "", **{**UNRATED, "rejected_by": None}}
    hub, _ = stage([pair("a", **alone)], [pair("t", **alone)], made={"rejected": "none"})
    (row,) = load_dataset(str(hub))["train"]
    assert row["chosen"][0]["content"] == "Better." and row["rejected"] is None
    assert load_dataset(str(hub), "sft")["train"][0]["messages"][1]["content"] == "Better."
    card = (hub / "README.md").read_text()
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    assert "sft" in tags and not {"dpo", "preference"} & set(tags)
    assert "for supervised fine-tuning" in card and "# A teacher's summaries for a model" in card
    for of_pairs in ("DPOTrainer", "Rejected", "Levenshtein", "of the pairs", "training pairs"):
        assert of_pairs not in card


def test_the_rows_hold_what_the_student_gets(stage, tmp_path):
    folder = tmp_path / "prompts/own"
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text((FOLDER / "title/task.yaml").read_text())
    (folder / "student.jinja").write_text("In short: {{ text }}")
    options = ("--prompts-dir", tmp_path / "prompts")
    hub, _ = stage([pair("a")], [pair("t")], *options, task="own")
    for name, column in (("default", "prompt"), ("sft", "messages")):
        content = load_dataset(str(hub), name)["train"][0][column][0]["content"]
        assert content == "In short: Text a\n\nwith é"
    card = (hub / "README.md").read_text()
    assert "the text in its instruction" in card and "| `student_sha` | the hash" in card


@pytest.mark.parametrize("now", ["Shorter: {{ text }}", "In short: {{ text }}", "{{ text }}", None])
def test_rows_tell_whose_student_template_they_are_of(stage, tmp_path, now):
    """Of one that was shortened or deleted since then the prompts themselves cannot tell."""
    folder = tmp_path / "prompts/own"
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text((FOLDER / "title/task.yaml").read_text())
    template = folder / "student.jinja"
    template.write_text("In short: {{ text }}\n\nAt most twelve words.")
    hub, _ = stage([pair("a")], [pair("t")], "--prompts-dir", folder.parent, task="own")
    rows = load_dataset(str(hub), "sft")["train"]
    if now:
        template.write_text(now)
    else:
        template.unlink()
    load_task.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"student.jinja is not what .* made with; `just stage`"):
        check_template(rows, None, load_task("own", folder.parent))


def test_no_folder_of_this_machine_is_in_the_rows(stage):
    of_folders = pair("a") | {"teacher": "/home/me/qwen-72b", "rejected_by": "~/models/small"}
    hub, _ = stage([of_folders], [pair("t")])
    (row,) = load_dataset(str(hub))["train"]
    assert (row["teacher"], row["rejected_by"]) == ("qwen-72b", "small")


def test_the_same_rows_staged_again_leave_their_files_where_a_training_reads_them(stage):
    def files_of(hub):
        return {path: path.stat().st_ino for path in hub.rglob("*.parquet")}

    hub, _ = stage([pair("a")], [pair("t")])
    first = files_of(hub)
    (hub / "data/train-0123456789ab.parquet").write_text("of an earlier state")
    stage([pair("a")], [pair("t")])
    assert files_of(hub) == first
    stage([pair("b")], [pair("t")])
    assert len(files_of(hub)) == 4 and len(files_of(hub).keys() & first.keys()) == 2
    assert load_dataset(str(hub))["train"]["id"][:] == ["b"]


def test_no_licence_is_claimed_for_texts_of_ones_own(stage):
    own = pair("b", source="minutes")
    hub, result = stage([pair("a"), own], [pair("t")])
    card = (hub / "README.md").read_text()
    assert "arxiv, each paper" in card and "minutes, under a licence that is not known" in card
    assert "CC BY-SA" not in card and "--licence" in result.stderr
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"
    hub, result = stage([pair("a"), own], [pair("t")], "--licence", "CC0")
    card = (hub / "README.md").read_text()
    assert "minutes, CC0" in card and "--licence" not in result.stderr
    assert yaml.safe_load(card.split("---")[1])["license_name"] == "mixed-see-card"
    extracts = hub.parents[1] / "extracts"
    extracts.mkdir()
    (extracts / "licence.txt").write_text("CC BY\n")  # as `just extracts --licence` was told it
    hub, result = stage([pair("a"), own], [pair("t")])
    assert "minutes, CC BY" in (hub / "README.md").read_text()
    assert "--licence" not in result.stderr


def test_staging_needs_no_client_of_a_teacher():
    slow = {"together", "httpx", "torch", "datatrove"}
    code = f"import sys, data_prep.build_dataset; print({slow} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert found.stdout.strip() == "set()", found


def test_sft_holds_the_chosen_answers(stage):
    hub, _ = stage([pair("a"), pair("b")], [pair("t")])
    rows = load_dataset(str(hub), "sft")
    assert {split: len(part) for split, part in rows.items()} == {"train": 2, "test": 1}
    assert rows["test"].column_names == ["id", "source", "messages"]
    assert rows["test"][0]["messages"] == [
        {"role": "user", "content": "Text t\n\nwith é"},
        {"role": "assistant", "content": "Better."},
    ]


def test_the_rows_of_all_configs_are_in_one_seeded_order(stage):
    hub, _ = stage([pair(f"p{i}") for i in range(27)], [pair("t")])
    ids = [[*load_dataset(str(hub), name, split="train")["id"]] for name in ("default", "sft")]
    assert ids[0] == ids[1] != sorted(ids[0])
    assert sorted(ids[0]) == sorted(f"p{i}" for i in range(27))


@pytest.mark.slow
def test_trl_reads_it_as_it_stands(stage, tmp_path):
    from trl import DPOConfig, DPOTrainer

    hub, _ = stage([pair("a")], [pair("t")])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer, trainer._is_vlm, trainer._is_vision_dataset = tokenizer, False, False
    config = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    dataset = load_dataset(str(hub), split="train")
    (row,) = trainer._prepare_dataset(dataset, tokenizer, config, "train")
    assert tokenizer.decode(row["prompt_ids"]).endswith("with é<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]).startswith("Better.<|im_end|>")


def test_a_changed_dataset_is_never_served_stale(stage):
    hub, _ = stage([pair("a", "Older.")], [pair("t")])
    assert load_dataset(str(hub), split="train")[0]["chosen"][0]["content"] == "Older."
    stage([pair("a", "Newer.")], [pair("t")])
    assert load_dataset(str(hub), split="train")[0]["chosen"][0]["content"] == "Newer."
    assert len(list((hub / "data").iterdir())) == len(list((hub / "sft").iterdir())) == 2


def test_no_pairs_says_how_to_make_them(tmp_path):
    assert "just pairs" in one_error_line(run_stage(STAGE, cwd=tmp_path, code=1))
