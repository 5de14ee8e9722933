"""An adapter meets the base that it was trained on, whichever way it is named."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import one_error_line, read_jsonl, run_stage

from common.cli import UserError
from common.files import mark_made
from eval.systems import system_of
from inference.weights import Weights, find_weights, load_model
from training.config import RunConfig, load_run_config, weights_fingerprint

pytestmark = pytest.mark.slow
IDS = torch.arange(3, 40)[None]


def logits(*name) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(*name)[0](IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_qwen2):
    """A run that trained on 4 bits, as training leaves it, its adapter large; and merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("run") / "out"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(folder)
    write_config(folder, tiny_qwen2, load_in_4bit=True)
    run_stage("inference.merge_adapter", folder / "config.yaml")
    return folder


def write_config(folder, base, **settings) -> None:
    settings |= {"base_model": str(base), "datasets": [{"path": "x"}], "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture
def unmerged(trained, tmp_path):
    """The adapter's folder alone, as it is right after training or on the Hub."""
    ignored = shutil.ignore_patterns("merged", "README.md")
    return shutil.copytree(trained, tmp_path / "adapter", ignore=ignored)


def test_an_adapter_trained_on_4_bits_gives_what_its_merge_gives(trained, unmerged, tiny_qwen2):
    merged = logits(str(trained / "merged"))
    assert torch.equal(logits(str(unmerged)), merged)
    published = logits(Weights(str(tiny_qwen2), None, str(unmerged)))
    assert (published - merged).abs().max() > 0.1


def test_what_axolotl_leaves_beside_an_adapter_tells_too(trained, unmerged, tiny_qwen2, capsys):
    (unmerged / "config.yaml").unlink()
    own = json.loads((tiny_qwen2 / "config.json").read_text())
    own["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (unmerged / "config.json").write_text(json.dumps(own))
    merged = logits(str(trained / "merged"))
    assert torch.equal(logits(str(unmerged)), merged)
    assert "warning" not in capsys.readouterr().err
    (unmerged / "config.json").unlink()
    assert not torch.equal(logits(str(unmerged)), merged)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("warning: nothing tells whether ") and "4 bits" in line


def test_what_a_name_stands_for(trained, unmerged, tiny_qwen2, monkeypatch):
    base = Weights(str(tiny_qwen2))
    assert find_weights(str(unmerged), base=True) == find_weights(str(tiny_qwen2)) == base
    adapter = Weights(str(tiny_qwen2), None, str(unmerged), True)
    assert find_weights(str(unmerged)) == adapter
    monkeypatch.setattr("inference.weights.OUTPUTS", unmerged.parent)
    assert find_weights("adapter") == adapter
    with pytest.raises(UserError, match="names no base"):
        find_weights(str(tiny_qwen2), base=True)
    with pytest.raises(UserError, match="no run and no folder nothing"):
        find_weights("nothing")


def test_tuned_is_the_merge_where_it_is_up_to_date(trained, unmerged, tiny_qwen2):
    config = load_run_config(trained / "config.yaml")
    assert system_of(config, "tuned").model == Weights(str(trained / "merged"))
    write_config(unmerged, tiny_qwen2, load_in_4bit=True)
    mark_made(unmerged / "merged", {"adapter": "another one"})
    config = load_run_config(unmerged / "config.yaml")
    assert system_of(config, "tuned").model == find_weights(str(unmerged))
    write_config(unmerged, "another/base")
    with pytest.raises(UserError, match=r"no adapter in .*, or it is not of another/base"):
        system_of(load_run_config(unmerged / "config.yaml"), "tuned")


def test_the_base_of_an_adapter_has_the_revision_that_it_was_trained_on(unmerged, tiny_qwen2):
    settings = {"base_model": str(tiny_qwen2), "revision_of_model": "of the evaluation"}
    settings["datasets"] = [{"path": "none"}]
    evaluation = RunConfig(unmerged, settings | {"output_dir": str(unmerged)})

    def revision() -> str:
        return system_of(evaluation, str(unmerged)).model.revision

    assert revision() == "of the evaluation"
    own = json.loads((unmerged / "adapter_config.json").read_text())
    (unmerged / "adapter_config.json").write_text(json.dumps(own | {"revision": "published"}))
    assert revision() == "published"
    write_config(unmerged, tiny_qwen2, revision_of_model="trained")
    assert revision() == find_weights(str(unmerged), base=True).revision == "trained"
    plain = Weights("base", None, str(unmerged))
    for other in (replace(plain, revision="r"), replace(plain, four_bits=True)):
        assert other.settings != plain.settings


def test_the_evaluation_and_run_task_use_the_rounded_base(
    finished_run, trained, unmerged, tmp_path
):
    systems = ("--systems", "base", unmerged, trained / "merged", "--max-new-tokens", 16)
    run_stage("eval.answer_texts", finished_run, *systems)
    folder = finished_run.parent / "out/eval/answers"
    made = [read_jsonl(p) for p in sorted(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)]
    base, adapter, merged = ([r["text"] for r in records] for records in made)
    assert adapter == merged != base
    assert all(r["settings"]["four_bits"] for r in made[1])
    text = tmp_path / "text.txt"
    text.write_text("Ice floats on water.")
    said = [
        run_stage("inference.run_task", "summarize", text, "--model", model, *systems[4:]).stdout
        for model in (unmerged, trained / "merged")
    ]
    assert said[0] == said[1]


def test_an_adapter_trained_on_16_bits_is_used_as_it_is(unmerged, tiny_qwen2, tmp_path):
    write_config(unmerged, tiny_qwen2)
    plain = logits(str(unmerged))
    run_stage("inference.merge_adapter", unmerged / "config.yaml")
    assert torch.equal(logits(str(unmerged / "merged")), plain)
    assert "is up to date" in run_stage("inference.merge_adapter", unmerged / "config.yaml").stdout


def test_a_model_that_cannot_be_used(tiny_qwen2, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.model.norm.weight.data[0] = float("nan")
    shutil.copytree(tiny_qwen2, tmp_path / "diverged")
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(UserError, match="NaN or infinite"):
        load_model(str(tmp_path / "diverged"))
    (tmp_path / "diverged/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_model(str(tmp_path / "diverged"))


def test_an_adapter_that_is_not_there(finished_run):
    line = one_error_line(run_stage("inference.merge_adapter", finished_run, code=1))
    assert "no adapter in" in line and "just train" in line


def edited(folder, change):
    """The tensors of an adapter's file replaced by what `change` makes of them."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


FAULTS = {
    "foreign": (
        lambda tensors: {k.removeprefix("base_model.model."): v for k, v in tensors.items()},
        r"its base, which has no place for 28 \(model.layers.0.* and gets nothing for 28",
    ),
    "twice named": (
        lambda tensors: {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()},
        "has no place for 28 .*default.default",
    ),
    "half": (
        lambda tensors: {k: v for k, v in tensors.items() if "q_proj" not in k},
        "gets nothing for 4 .*q_proj",
    ),
    "one more": (
        lambda tensors: tensors | {"base_model.model.model.layers.9.x.lora_A.weight": IDS.float()},
        "has no place for 1 .*layers.9",
    ),
    "another shape": (
        lambda tensors: {k: v[:, :3].contiguous() for k, v in tensors.items()},
        "size mismatch",
    ),
    "zero": (
        lambda tensors: {k: v * ("lora_A" in k) for k, v in tensors.items()},
        "changes nothing in its base",
    ),
    "too small": (lambda tensors: {k: v * 1e-12 for k, v in tensors.items()}, "changes nothing"),
    "diverged": (lambda tensors: {k: v * float("nan") for k, v in tensors.items()}, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_is_taken_whole_or_not_at_all(unmerged, tiny_qwen2, fault):
    change, said = FAULTS[fault]
    write_config(edited(unmerged, change), tiny_qwen2)
    with pytest.raises(UserError, match=said):
        load_model(str(unmerged))
    line = one_error_line(run_stage("inference.merge_adapter", unmerged / "config.yaml", code=1))
    assert str(unmerged) in line and not (unmerged / "merged").exists()


def test_an_adapter_that_changes_only_what_is_never_reached(unmerged, tiny_qwen2, monkeypatch):
    """A merge after which the model says what its base says."""
    monkeypatch.setattr("inference.adapters.changes_base", lambda *_: True)
    write_config(edited(unmerged, lambda found: {k: v * 0 for k, v in found.items()}), tiny_qwen2)
    line = one_error_line(run_stage("inference.merge_adapter", unmerged / "config.yaml", code=1))
    assert "changes nothing in its base" in line


def make_adapter(folder, base, **options):
    """An adapter of another kind on the tiny student, all of its tensors moved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    write_config(folder, base)
    with torch.inference_mode():
        return model.eval()(IDS.to(model.device)).logits


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},  # which the base shares with its embedding
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_adapters_of_other_kinds_merge_to_what_they_are(tmp_path, tiny_qwen2, options):
    expected = make_adapter(tmp_path / "out", tiny_qwen2, **options)
    torch.testing.assert_close(logits(str(tmp_path / "out")), expected, atol=1e-3, rtol=0)
    run_stage("inference.merge_adapter", tmp_path / "out/config.yaml")
    merged = logits(str(tmp_path / "out/merged"))
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=0)


def test_a_kind_of_adapter_that_cannot_be_merged_is_named(tmp_path, tiny_qwen2):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompts).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of type PROMPT_TUNING, which cannot be merged"):
        load_model(str(tmp_path))


def test_a_base_published_in_4_bits_is_put_back_into_16(tmp_path, tiny_qwen2):
    """As Unsloth names it in its adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base = tmp_path / "tiny-bnb-4bit"
    rounding = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(tiny_qwen2, quantization_config=rounding)
    packed.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(base)
    expected = make_adapter(tmp_path / "out", base)
    found = logits(str(tmp_path / "out"))
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    run_stage("inference.merge_adapter", tmp_path / "out/config.yaml")
    assert torch.equal(logits(str(tmp_path / "out/merged")), found)


def test_half_a_training_is_used_by_nobody(unmerged, tiny_qwen2, finished_run, tmp_path):
    write_config(unmerged, tiny_qwen2)
    mark_made(unmerged / "inputs", {"task": "summarize"})
    text = tmp_path / "text.txt"
    text.write_text("Ice floats.")
    config = unmerged / "config.yaml"
    for stage, *options in (
        ("inference.merge_adapter", config),
        ("eval.answer_texts", finished_run, "--systems", unmerged),
        ("inference.run_task", "summarize", text, "--model", unmerged),
        ("inference.serve", unmerged),
    ):
        line = one_error_line(run_stage(stage, *options, code=1))
        assert "has not ended" in line and "just train" in line
    mark_made(unmerged, {"task": "summarize"})
    find_weights(str(unmerged))


NO_BASES = ["{", "[]", "{}", *(f'{{"base_model_name_or_path": {x}}}' for x in ("null", '["a"]'))]


@pytest.mark.parametrize("text", NO_BASES)
def test_an_adapter_of_nothing(unmerged, text):
    (unmerged / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config.json does not say what it is an adapter"):
        find_weights(str(unmerged))


def test_weights_as_a_pickle_that_are_no_tensors(unmerged):
    (unmerged / "adapter_model.safetensors").unlink()
    for content in (b"", b"\x80\x04cos\nsystem\n(S'true'\ntR."):
        (unmerged / "adapter_model.bin").write_bytes(content)
        with pytest.raises(UserError, match="does not fit its base"):
            load_model(str(unmerged))


def test_a_student_without_a_pad_token_answers_in_batches_as_alone(tiny_qwen2, tmp_path):
    from inference.generate import generate_batch

    folder = shutil.copytree(tiny_qwen2, tmp_path / "padless")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_model(str(folder), "float32")
    prompts = ["Ice", "Lakes freeze from the top and ice floats on them."]
    alone = [generate_batch(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert generate_batch(model, tokenizer, prompts, 12) == alone


def test_a_merge_of_0_3_7_is_kept_where_nothing_was_written_since(unmerged, tiny_qwen2):
    write_config(unmerged, tiny_qwen2)
    config = unmerged / "config.yaml"
    run_stage("inference.merge_adapter", config)
    settings = json.loads((unmerged / "merged/made.json").read_text())
    old = {"fingerprint": weights_fingerprint(str(unmerged))}
    old["base_fingerprint"] = weights_fingerprint(str(tiny_qwen2))
    mark_made(unmerged / "merged", settings | old)
    assert "is up to date" in run_stage("inference.merge_adapter", config).stdout
    assert json.loads((unmerged / "merged/made.json").read_text()) == settings
    mark_made(unmerged / "merged", settings | old)
    os.utime(unmerged / "adapter_config.json", (2e9, 2e9))
    assert "merged model in" in run_stage("inference.merge_adapter", config).stdout
