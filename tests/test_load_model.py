"""An adapter meets the base that it was trained on, whichever way it is named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import one_error_line, read_jsonl, run_stage

from common.cli import UserError
from common.files import mark_made
from eval.load_model import Weights, find_weights, load_model
from eval.systems import system_of
from training.run_config import RunConfig, load_run_config

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
    run_stage("eval.merge_adapter", folder / "config.yaml")
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
    monkeypatch.setattr("eval.load_model.OUTPUTS", unmerged.parent)
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
    run_stage("eval.generate_answers", finished_run, *systems)
    folder = finished_run.parent / "out/eval/answers"
    made = [read_jsonl(p) for p in sorted(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)]
    base, adapter, merged = ([r["text"] for r in records] for records in made)
    assert adapter == merged != base
    assert all(r["settings"]["four_bits"] for r in made[1])
    text = tmp_path / "text.txt"
    text.write_text("Ice floats on water.")
    said = [
        run_stage("eval.run_task", "summarize", text, "--model", model, *systems[4:]).stdout
        for model in (unmerged, trained / "merged")
    ]
    assert said[0] == said[1]


def test_an_adapter_trained_on_16_bits_is_used_as_it_is(unmerged, tiny_qwen2, tmp_path):
    write_config(unmerged, tiny_qwen2)
    plain = logits(str(unmerged))
    run_stage("eval.merge_adapter", unmerged / "config.yaml")
    assert torch.equal(logits(str(unmerged / "merged")), plain)
    assert "is up to date" in run_stage("eval.merge_adapter", unmerged / "config.yaml").stdout


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
    line = one_error_line(run_stage("eval.merge_adapter", finished_run, code=1))
    assert "no adapter in" in line and "just train" in line
