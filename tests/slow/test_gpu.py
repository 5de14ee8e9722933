"""What waits for a GPU: the benchmark's lines, and keys that only a GPU would try."""

import json
import subprocess
import sys

import pytest
import yaml
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT, one_error_line, read_jsonl, run_stage

from benchmarks import gpu
from training.config import Overlay, load_run_config, resolve_config, set_key

pytestmark = pytest.mark.slow

BENCH = "benchmarks.gpu"
HOPPER = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
MODAL = ROOT / "axolotl_configs/launch/modal.yaml"
LIGER = [f"plugins=[{gpu.LIGER}]", "liger_fused_linear_cross_entropy=true"]
# As docs/gpu.md and the benchmark have them: config, method, keys.
KEYS = {
    "Liger": (gpu.SFT, "", [*LIGER, "liger_rope=true", "liger_rms_norm=true"]),
    "cut cross-entropy": (gpu.SFT, "", [f"plugins=[{gpu.CUT}]", "cut_cross_entropy=true"]),
    "Liger's DPO": (gpu.DPO, "dpo", ["dpo_use_liger_kernel=true"]),
    "the benchmark's": (gpu.SFT, "", [f"plugins=[{gpu.METER}]", "save_steps=1000000"]),
    "TensorBoard": (gpu.SFT, "", ["use_tensorboard=true"]),
    "W&B": (gpu.SFT, "", ["use_wandb=true", "wandb_project=summaries", "wandb_name=sft"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_keys_of_the_page_are_accepted_as_on_a_gpu(name):
    config, method, keys = KEYS[name]
    settings = resolve_config(config, Overlay(method=method, keys=tuple(keys))).settings
    prepare_plugins(DictDefault(settings))
    accepted = validate_config(
        DictDefault(settings), capabilities=HOPPER, env_capabilities={"torch_version": "2.13.0"}
    )
    told = {}
    for assignment in keys:
        set_key(told, assignment)
    assert all(accepted[key] == value for key, value in told.items())


# In a process of its own: axolotl.cli wraps stdout when it is imported, also that of pytest.
ASK_MODAL = """
import json, sys
from pathlib import Path
from axolotl.cli.cloud import load_cloud_cfg
from axolotl.cli.cloud.modal_ import ModalCloud

cloud = ModalCloud(load_cloud_cfg(Path(sys.argv[1])))
print(json.dumps({
    "gpu": cloud.get_train_gpu().gpu_type,
    "timeout": cloud.get_train_timeout(),
    "memory": cloud.get_train_memory(),
    "env": cloud.get_env(),
    "volumes": list(cloud.volumes),
}))
"""


def test_modal_is_asked_for_what_the_file_says():
    told = yaml.safe_load(MODAL.read_text())
    command = [sys.executable, "-c", ASK_MODAL, MODAL]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    asked = json.loads(said.splitlines()[-1])
    assert asked["gpu"] == "A100-80GB"
    assert asked["timeout"] == told["timeout"]
    assert asked["memory"] == told["memory"] * 1024
    assert asked["env"]["AXOLOTL_DO_NOT_TRACK"] == "1"
    assert asked["volumes"] == ["/workspace/data"]
    pins = (ROOT / "requirements.txt").read_text()
    assert f"axolotl=={told['docker_tag']} " in pins


def test_parts_that_cannot_run_say_why_and_the_others_go_on(tmp_path, tiny_qwen2):
    told = [tiny_qwen2, "--parts", "attention", "merge", "answers-8k", "--into", "gpu.jsonl"]
    said = run_stage(BENCH, *told, cwd=tmp_path).stdout.splitlines()[1:]
    reasons = ["needs a GPU", "the part sft trains it", "the model reads 4096 tokens"]
    assert all(reason in line for reason, line in zip(reasons, said, strict=True))
    records = read_jsonl(tmp_path / "gpu.jsonl")
    assert [record["part"] for record in records] == ["attention", "merge", "answers-8k"]
    assert all(record["results"] is None and record["gpu"] is None for record in records)
    late = run_stage(BENCH, *told, "--minutes", 0.001, "--parts", "sft", cwd=tmp_path, code=None)
    assert "no time is left" in late.stdout
    assert "no model folder" in one_error_line(run_stage(BENCH, tmp_path, code=1))


def test_two_ways_are_compared_in_a_line():
    bench = gpu.Bench("m", 256, 32, 4, "sdpa", False, "vllm", 0.0)
    one = {"tokens_a_second": 200.0, "tflops": 1.0, "peak_gib": 2.0}
    one |= {"first_loss": 2.5, "last_loss": 2.25}

    def fails() -> dict:
        raise gpu.CannotRun("no package")

    ways = {"axolotl": lambda: one, "other": fails, "TRL": lambda: one | {"tokens_a_second": 100.0}}
    line, results = gpu.compare(bench, ways)
    assert "other cannot run: no package; TRL 100" in line
    assert line.endswith("(axolotl 2.00 times as fast)") and results.keys() == {"axolotl", "TRL"}
    assert json.dumps(results)


def test_rows_are_as_long_as_asked(tiny_qwen2, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.chdir(ROOT)
    bench = gpu.Bench(str(tiny_qwen2), 256, 32, 4, "sdpa", False, "vllm", 0.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    rows = gpu.make_rows(bench, 4)
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        turns.append({"role": "assistant", "content": row["chosen"]})
        written = tokenizer.apply_chat_template(turns, tokenize=False)
        assert 224 < len(tokenizer(written, add_special_tokens=False).input_ids) <= 256
        assert row["chosen"] != row["rejected"]
    assert len({row["prompt"] for row in rows}) == 4
    assert load_run_config(gpu.SFT).settings["gradient_accumulation_steps"] == 4
