"""What the trainer reads equals what inference sends, and every answer ends its turn once."""

import shutil
from pathlib import Path

import axolotl.utils.chat_templates
import pytest
from axolotl.loaders.tokenizer import load_tokenizer
from axolotl.prompt_strategies.chat_template import load as load_sft
from axolotl.prompt_strategies.dpo.chat_template import default
from axolotl.prompt_strategies.orpo import load as load_orpo
from axolotl.utils.dict import DictDefault
from conftest import QWEN2_TEMPLATE, make_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from data_prep.build_dataset import to_row, to_sft_row
from eval.generate_answers import build_prompt
from prompts import load_task

pytestmark = pytest.mark.slow

NO_SYSTEM_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = DictDefault(
    {
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "field_messages": "prompt",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
                "type": "chat_template.default",
            }
        ],
    }
)
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
words = texts.map(str.strip).filter(bool).filter(lambda t: "<|" not in t)
# axolotl finds the answer by searching a dummy conversation for it, so an answer that is itself a
# part of that conversation ("You are") is cut wrongly; no summary is.
answers = words.map(lambda t: f"Summary: {t}")


@pytest.fixture(scope="module", params=["qwen2", "smollm2", "no system turn"])
def tokenizer(request, tmp_path_factory, demo_parts):
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(demo_parts / "models/smollm2-135m-instruct")
    template = QWEN2_TEMPLATE if request.param == "qwen2" else NO_SYSTEM_TEMPLATE
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)


def trained_rows(tokenizer, pair: dict) -> dict:
    """A pair as axolotl's strategy renders it."""
    transform, _ = default(CONFIG)
    return transform(to_row(pair, "train"), tokenizer=tokenizer)


def pair_of(text: str, chosen: str, rejected: str) -> dict:
    return {
        "id": "a",
        "source": "s",
        "url": "u",
        "prompt": text,
        "chosen": chosen,
        "rejected": rejected,
        "rejected_by": "teacher",
        "chosen_position": 1,
        "ratings": [9, 5],
        "teacher": "t",
        "prompt_sha": "p",
    }


@given(words, answers, answers)
def test_prompt_and_answers_character_for_character(tokenizer, text, chosen, rejected):
    rows = trained_rows(tokenizer, pair_of(text, chosen, rejected))
    sent, cut = build_prompt(tokenizer, text, None, 10**6)
    assert rows["prompt"] == sent and cut == 0
    assert rows["chosen"] == chosen + "<|im_end|>"
    assert rows["rejected"] == rejected + "<|im_end|>"
    full = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}, {"role": "assistant", "content": chosen}],
        tokenize=False,
    )
    assert rows["prompt"] + rows["chosen"] == full.rstrip("\n")


def test_a_tasks_own_template_stands_around_the_text_on_both_sides(tokenizer, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/task.yaml").write_text("{label: X, answers: 1, hub: {}}")
    (tmp_path / "plain/student.jinja").write_text("Plainly:\n\n{{ text }}")
    task = load_task("plain", tmp_path)
    row = to_row(pair_of("A text.", "Short.", "Longer one."), "train", task)
    trained = default(CONFIG)[0](row, tokenizer=tokenizer)["prompt"]
    sent, _ = build_prompt(tokenizer, "A text.", task.student_template(), 4096, task)
    assert trained == sent and "Plainly:\n\nA text." in sent


def test_token_for_token_through_the_trainer(tokenizer):
    """The ids TRL trains on: the prompt as generation sends it, then answer and one end of turn."""
    rows = trained_rows(tokenizer, pair_of("A text.\n\nOf two parts.", "Short. ", "Longer one."))
    sent = tokenizer(
        build_prompt(tokenizer, "A text.\n\nOf two parts.", None, 4096)[0], add_special_tokens=False
    ).input_ids
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer, trainer._is_vlm, trainer.ref_model = tokenizer, False, None
    trainer._is_vision_dataset = False
    ids = tokenized(trainer, tokenizer, rows)
    end = tokenizer.eos_token_id
    assert ids["prompt_ids"] == sent
    for side in ("chosen", "rejected"):
        answer = ids[f"{side}_ids"]
        assert answer.count(end) == 1 and answer[-1] == end
        assert tokenizer.decode(answer) == rows[side]


def tokenized(trainer, tokenizer, rows: dict) -> dict:
    from trl import DPOConfig

    dataset = Dataset.from_list([rows])
    return trainer._prepare_dataset(
        dataset, tokenizer, DPOConfig(output_dir="x", bf16=False, use_cpu=True), "train"
    )[0]


@pytest.mark.parametrize("trainer_class", [ORPOTrainer, CPOTrainer])
def test_token_for_token_through_the_trainers_without_a_reference(tokenizer, trainer_class):
    pair = pair_of("A text.\n\nOf two parts.", "Short. ", "Longer one.")
    strategy = load_orpo(".dpo.chat_template.default", CONFIG, dataset_idx=0)[0]
    assert strategy(to_row(pair, "train"), tokenizer=tokenizer) == trained_rows(tokenizer, pair)
    trainer = trainer_class.__new__(trainer_class)
    trainer.processing_class, trainer.is_encoder_decoder = tokenizer, False
    trainer.max_length = 4096
    ids = trainer.tokenize_row(trained_rows(tokenizer, pair))
    sent = tokenizer(build_prompt(tokenizer, pair["prompt"], None, 4096)[0]).input_ids
    for side in ("chosen", "rejected"):
        answer = [token for token in ids[f"{side}_labels"] if token != -100]
        assert ids[f"{side}_input_ids"] == sent + answer
        assert tokenizer.decode(answer) == pair[side] + "<|im_end|>"


def test_sft_trains_on_the_answer_and_its_end_alone(tokenizer):
    pair = pair_of("A text.\n\nOf two parts.", "Short one.", "Longer one.")
    entry = DictDefault({"type": "chat_template", "field_messages": "messages"})
    config = DictDefault({**CONFIG, "datasets": [entry], "sequence_len": 4096})
    row = load_sft(tokenizer, config, ds_cfg=entry).tokenize_prompt(to_sft_row(pair))
    sent = tokenizer(build_prompt(tokenizer, pair["prompt"], None, 4096)[0]).input_ids
    answer = [token for token in row["labels"] if token != -100]
    assert row["input_ids"][: len(sent) + len(answer)] == sent + answer
    assert tokenizer.decode(answer) == "Short one.<|im_end|>"


def test_a_long_text_is_cut_at_its_end_to_fit(tokenizer):
    text = " ".join(f"word{i}" for i in range(500))
    whole, _ = build_prompt(tokenizer, text, None, 10**6)
    prompt, cut = build_prompt(tokenizer, text, None, 300)
    length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert cut > 0 and 290 <= length <= 300
    assert prompt.endswith(whole[-20:]) and "word0 word1" in prompt


def test_a_template_that_thinks_is_replaced_on_both_sides_by_chatml(tmp_path, tiny_qwen2):
    """As axolotl_configs/README.md says of Qwen3: the run keeps the template it trained with."""
    base = shutil.copytree(tiny_qwen2, tmp_path / "base")
    thinking = Path(axolotl.utils.chat_templates.__file__).with_name("templates") / "qwen3.jinja"
    (base / "chat_template.jinja").write_text(thinking.read_text())
    names = {"base_model": str(base), "base_model_config": str(base), "tokenizer_config": str(base)}
    config = DictDefault({**CONFIG, **names, "chat_template": "chatml", "sequence_len": 4096})
    trained = load_tokenizer(config)
    trained.save_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    pair = pair_of("A text.\n\nOf two parts.", "Short one.", "Longer one.")
    sent, _ = build_prompt(tokenizer, pair["prompt"], None, 4096)
    transform, _ = default(config)
    rows = transform(to_row(pair, "train"), tokenizer=trained)
    assert rows["prompt"] == sent and rows["chosen"] == "Short one.<|im_end|>"
    entry = DictDefault({"type": "chat_template", "field_messages": "messages"})
    row = load_sft(trained, config | {"datasets": [entry]}, ds_cfg=entry).tokenize_prompt(
        to_sft_row(pair)
    )
    assert tokenizer.decode(row["input_ids"]).rstrip() == sent + rows["chosen"]
    assert "<think>" in AutoTokenizer.from_pretrained(base).apply_chat_template(
        to_sft_row(pair)["messages"], tokenize=False
    )
