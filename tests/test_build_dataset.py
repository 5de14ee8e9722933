import pytest
import yaml
from conftest import one_error_line, run_stage, write_jsonl
from datasets import load_dataset

from prompts import template_sha

STAGE = "data_prep.build_dataset"


def pair(key: str, chosen: str = "Better.") -> dict:
    return {
        "id": key,
        "source": "arxiv",
        "url": "u",
        "prompt": f"Text {key}\n\nwith é",
        "chosen": chosen,
        "rejected": "Worse one.",
        "chosen_position": 2,
        "ratings": [16, 11],
        "teacher": "some/teacher",
        "prompt_sha": template_sha("summarize/teacher.jinja"),
    }


@pytest.fixture
def stage(tmp_path):
    def run(train, test, **kwargs):
        for split, pairs in (("train", train), ("test", test)):
            write_jsonl(tmp_path / f"pairs/{split}.jsonl", pairs)
            write_jsonl(
                tmp_path / f"replies/{split}.jsonl",
                [{"id": p["id"], "cost_usd": 0.25} for p in pairs],
            )
        write_jsonl(
            tmp_path / "pairs/made.json",
            [
                {
                    "max_similarity": 0.75,
                    "min_difference": 1,
                    "n_replies": 9,
                    "dropped": [["scores too close", 4]],
                }
            ],
        )
        result = run_stage(
            STAGE,
            "--pairs",
            tmp_path / "pairs",
            "--replies",
            tmp_path / "replies",
            "--output",
            tmp_path / "hub",
            **kwargs,
        )
        return tmp_path / "hub", result

    return run


def test_it_loads_as_conversations_and_the_card_is_valid(stage):
    hub, _ = stage([pair("a"), pair("b")], [pair("t")])
    rows = load_dataset(str(hub))
    assert {split: len(part) for split, part in rows.items()} == {"train": 2, "test": 1}
    row = rows["train"][0]
    assert row["prompt"] == [{"role": "user", "content": "Text a\n\nwith é"}]
    assert row["chosen"] == [{"role": "assistant", "content": "Better."}]
    assert row["ratings"] == [16.0, 11.0]
    card = (hub / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["task_categories"] == ["summarization", "text-generation"]
    assert metadata["size_categories"] == ["n<1K"]
    for said in (
        "2 training pairs and 1 test",
        "some/teacher",
        "| scores too close | 4 |",
        "$0.75",
        "longer one in 0.0%",
        "Best summary: (1 or 2)",
    ):
        assert said in card
    for column in row:
        assert f"`{column}`" in card


def test_a_changed_dataset_is_never_served_stale(stage):
    hub, _ = stage([pair("a", "Older.")], [pair("t")])
    assert load_dataset(str(hub), split="train")[0]["chosen"][0]["content"] == "Older."
    stage([pair("a", "Newer.")], [pair("t")])
    assert load_dataset(str(hub), split="train")[0]["chosen"][0]["content"] == "Newer."
    assert len(list((hub / "data").iterdir())) == 2


def test_no_pairs_says_how_to_make_them(tmp_path):
    result = run_stage(STAGE, "--pairs", tmp_path, "--output", tmp_path / "hub", code=1)
    assert "just pairs" in one_error_line(result)
