"""Systems of every kind, summaries that survive a kill, and wrong input in one line."""

import json
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import one_error_line, read_jsonl, run_stage, start_stage, write_jsonl

from common.cli import UserError
from eval.generate_summaries import load_model, tokens, transformers_engine
from eval.systems import System, model_config, systems_of
from training.run_config import load_run_config

STAGE = "eval.generate_summaries"


def summaries(config, name):
    return read_jsonl(config.parent / f"out/eval/summaries/{name}.jsonl")


@pytest.fixture
def adapter(tmp_path, tiny_qwen2):
    """A folder with an adapter of the tiny student whose matrices are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_qwen2),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_endpoints_and_lead_sentences_stand_beside_the_base(
    finished_run, adapter, endpoint, tiny_qwen2
):
    server = endpoint(content=" A summary from afar. ")
    systems = ("base", adapter, "endpoint:some/model", "lead")
    options = ("--systems", *systems, "--max-new-tokens", 8)
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": "k"}
    run_stage(STAGE, finished_run, *options, **environment)
    run_stage(STAGE, finished_run, *options, **environment)
    names = {p.stem: p for p in (finished_run.parent / "out/eval/summaries").glob("*.jsonl")}
    assert {"base", "lead", "endpoint_some_model"} < set(names) and len(names) == 4
    (adapted,) = set(names) - {"base", "lead", "endpoint_some_model"}
    texts = {name: [r["text"] for r in summaries(finished_run, name)] for name in names}
    assert texts[adapted] != texts["base"]
    assert texts["endpoint_some_model"] == ["A summary from afar."] * 4
    assert texts["lead"] == ["Ice floats."] * 4
    assert all("Ice floats." in prompt for prompt in server.ledger)
    assert sum(server.ledger.values()) == 4  # the second run asked for nothing
    loaded, _ = load_model(str(adapter), None)
    base, _ = load_model(str(tiny_qwen2), None)
    ids = torch.arange(3, 13)[None]
    assert (loaded(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_a_killed_generation_goes_on_and_makes_no_document_twice(finished_run):
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows = [{**rows[i % 4], "id": f"k{i}"} for i in range(60)]
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    path = finished_run.parent / "out/eval/summaries/base.jsonl"
    options = ("--systems", "base", "--batch-size", 1, "--max-new-tokens", 200)
    process = start_stage(STAGE, finished_run, *options)
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = path.read_bytes()
    done = first.count(b"\n")
    assert 3 < done < 60, "killed too late to tell"
    run_stage(STAGE, finished_run, *options)
    assert path.read_bytes().startswith(first[: first.rfind(b"\n") + 1])
    assert sorted(r["id"] for r in read_jsonl(path)) == sorted(f"k{i}" for i in range(60))


def test_a_context_is_lengthened_by_yarn_where_the_config_says_so(tiny_qwen2):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    plain = model_config(str(tiny_qwen2), None, None)
    longer = model_config(str(tiny_qwen2), None, {"rope_scaling": yarn})
    assert (plain.max_position_embeddings, longer.max_position_embeddings) == (4096, 16384)
    assert longer.rope_parameters["rope_theta"] == plain.rope_parameters["rope_theta"]
    model, _ = load_model(str(tiny_qwen2), None, {"rope_scaling": yarn})
    own, _ = load_model(str(tiny_qwen2), None)
    assert not torch.equal(model.model.rotary_emb.inv_freq, own.model.rotary_emb.inv_freq)


def test_a_cache_over_the_budget_is_refused_and_lengths_are_read_in_k(tiny_qwen2):
    args = SimpleNamespace(max_new_tokens=8, kv_cache_gib=1e-6, batch_size=4)
    _, context, batches, _ = transformers_engine(System(str(tiny_qwen2)), {}, args)
    assert context == 4096
    with pytest.raises(UserError, match="--kv-cache-gib"):
        list(batches([100]))
    assert (tokens("16K"), tokens("700")) == (16384, 700)


def test_what_cannot_be_summarized_is_said_in_a_line(finished_run, adapter, tiny_qwen2):
    config = load_run_config(finished_run)
    with pytest.raises(UserError, match="no system nowhere: --systems takes base"):
        systems_of(config, ["nowhere"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = {**settings, "base_model_name_or_path": "another/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"an adapter of another/base, not of .*tiny-qwen2"):
        systems_of(config, [str(adapter)])
    line = one_error_line(run_stage(STAGE, finished_run, "--backend", "vllm", code=1))
    assert "--backend vllm needs the package vllm" in line
    (finished_run.parent / "out/merged").unlink()
    assert "just merge run" in one_error_line(run_stage(STAGE, finished_run, code=1))


def test_weights_and_references_that_are_none(finished_run, tiny_qwen2, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.model.norm.weight.data[0] = float("nan")
    shutil.copytree(tiny_qwen2, tmp_path / "diverged")
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(UserError, match="NaN or infinite"):
        load_model(str(tmp_path / "diverged"), None)
    rows = read_jsonl(finished_run.parent / "hub/test.jsonl")
    rows[2]["chosen"][0]["content"] = " "
    write_jsonl(finished_run.parent / "hub/test.jsonl", rows)
    line = one_error_line(run_stage(STAGE, finished_run, code=1))
    assert "1 test documents" in line and "t2" in line
    (finished_run.parent / "hub/test.jsonl").write_text("")
    assert "test split" in one_error_line(run_stage(STAGE, finished_run, code=1))
