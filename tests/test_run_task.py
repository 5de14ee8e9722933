"""`just run` on the tiny student: what is read, which model it takes, where it writes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir

import pytest
import yaml
from conftest import ROOT, clean_environment, one_error_line, read_jsonl, run_stage, start_stage

from common.files import mark_made
from eval.generate_answers import build_prompt, generate_batch
from eval.load_model import find_weights, load_model
from eval.run_task import newest_adapter
from prompts import load_task

pytestmark = pytest.mark.slow
STAGE = "eval.run_task"
CAPTURED = {"capture_output": True, "text": True}
TEXTS = {"a.txt": "Ice floats on water.", "sub/b.md": "Lakes freeze from the top. " * 3}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_qwen2):
    """An adapter folder as axolotl leaves it, with a config that names it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("run") / "out"
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.save_pretrained(folder)  # axolotl leaves the quantized base beside its adapter
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(folder)
    settings = {"base_model": str(tiny_qwen2), "datasets": [{"path": "x"}]}
    settings["output_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def texts(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    return tmp_path / "texts"


def summarize(*args, code=0, **env):
    return run_stage(STAGE, "summarize", *args, "--max-new-tokens", 16, code=code, **env)


def evaluated(folder, text: str, template: str | None = None, task=None) -> list[str]:
    """The words that the evaluation's own functions give."""
    model, tokenizer = load_model(str(folder))
    prompt, _ = build_prompt(tokenizer, text, template, 4000, task)
    return generate_batch(model, tokenizer, [prompt], 16)[0]["text"].split()


def test_a_run_and_its_instructed_base_say_what_the_evaluation_says(adapter, texts, tiny_qwen2):
    config, text = adapter, TEXTS["a.txt"]
    tuned = summarize(texts / "a.txt", "--model", config)
    assert tuned.stdout.split() == evaluated(adapter, text) != evaluated(tiny_qwen2, text)
    assert "a.txt: " in tuned.stderr and "tokens read, " in tuned.stderr
    told = summarize(texts / "a.txt", "--model", config, "--instructed")
    assert told.stdout.split() == evaluated(tiny_qwen2, text, "instructed")


def pipe(shell: str, **env) -> subprocess.CompletedProcess:
    """Run `shell`, in which $RUN stands for the stage."""
    run = f"{sys.executable} -m {STAGE} --max-new-tokens 16 summarize"
    environment = clean_environment(RUN=run, **env)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"], cwd=ROOT, env=environment, **CAPTURED
    )


def test_stdin_beside_a_folder_and_a_text_that_is_too_long(adapter, texts):
    long = " ".join(map(str, range(500)))
    result = pipe(f"echo {long} | $RUN - {texts} --model {adapter} --max-prompt-tokens 200")
    heads = [line for line in result.stdout.splitlines() if line.startswith("==>")]
    assert heads == ["==> stdin <==", "==> a.txt <==", "==> sub/b.md <=="]
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert "stdin: its last" in warning and "do not fit into 200" in warning


@pytest.mark.parametrize(
    ("text", "repeats"), [("It loops and it loops. " * 9, True), ("1 2", False)]
)
def test_an_answer_that_goes_round_in_circles_is_told(adapter, texts, monkeypatch, text, repeats):
    record = {"text": text, "finish_reason": "length", "n_prompt_tokens": 9, "n_new_tokens": 16}
    monkeypatch.setattr("eval.generate_answers.generate_batch", lambda *_, **__: [record])
    said = summarize(texts / "a.txt", "--model", adapter).stderr
    assert "stopped at --max-new-tokens" in said
    assert ("a.txt: the answer repeats itself" in said) is repeats


def test_a_reader_that_leaves_early_is_no_failure(adapter, texts):
    result = pipe(f"$RUN {texts} --model {adapter} --max-new-tokens 2000 | head -c 5")
    assert result.returncode == 0 and "Error" not in result.stderr
    assert "error" not in result.stderr


def test_ctrl_c_ends_quietly(adapter, texts):
    process = start_stage(STAGE, "summarize", texts, "--model", adapter, "--max-new-tokens", 4000)
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "error" not in errors


def test_a_folder_of_answers_is_completed(adapter, texts, tmp_path):
    def write(*options):
        summarize(texts, "--model", adapter, "--output-dir", tmp_path / "out", *options)
        return {name: (tmp_path / "out" / name).read_text() for name in TEXTS}

    table = tmp_path / "out/answers.jsonl"
    first = write()
    assert {name: text.split() for name, text in first.items()} == {
        name: evaluated(adapter, text) for name, text in TEXTS.items()
    }
    (tmp_path / "out/a.txt").unlink()
    assert write() == first and len(read_jsonl(table)) == 2
    instructed = write("--instructed")
    assert all(instructed[name] != first[name] for name in TEXTS)
    assert write() == first and len(read_jsonl(table)) == 4
    (texts / "a.txt").write_text("Salt melts ice.")
    changed = write()
    assert changed["a.txt"].split() == evaluated(adapter, "Salt melts ice.")
    assert changed["sub/b.md"] == first["sub/b.md"] and len(read_jsonl(table)) == 5


def test_the_answer_that_several_agree_on(adapter, texts, tmp_path):
    options = ("--model", adapter, "--samples", 4)
    told = summarize(texts / "a.txt", *options)
    model, tokenizer = load_model(str(adapter))
    prompt, _ = build_prompt(tokenizer, TEXTS["a.txt"], None, 4000)
    (made,) = generate_batch(model, tokenizer, [prompt], 16, samples=4)
    assert told.stdout.split() == made["text"].split()  # the draws are the same each time
    summarize(texts, *options, "--output-dir", tmp_path / "out")
    made = read_jsonl(tmp_path / "out/answers.jsonl")
    assert [record["settings"]["samples"] for record in made] == [4, 4]
    assert {record["text"] + "\n" for record in made} == {
        (tmp_path / "out" / name).read_text() for name in TEXTS
    }


def test_what_a_kill_leaves_of_a_folder_is_not_made_again(adapter, texts, tmp_path):
    options = (texts, "--model", adapter, "--output-dir", tmp_path / "out")
    summarize(*options)
    table = tmp_path / "out/answers.jsonl"
    first = table.read_bytes().splitlines(keepends=True)[0]
    table.write_bytes(first + b'{"id": "torn')
    for name in TEXTS:
        (tmp_path / "out" / name).unlink()
    summarize(*options)
    assert table.read_bytes().startswith(first) and len(read_jsonl(table)) == 2
    assert all((tmp_path / "out" / name).is_file() for name in TEXTS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n", "no text in it"),
        (b"\xff\xfe\x00", "neither text in UTF-8 nor HTML nor PDF"),
        (b"%PDF-1.7\0", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_text(tmp_path, tiny_qwen2, content, said):
    path = tmp_path / "paper.txt"
    if content is not None:
        path.write_bytes(content)
    assert said in one_error_line(summarize(path, "--model", tiny_qwen2, code=1))


def test_a_model_that_is_not_there(texts, tmp_path, tiny_qwen2):
    def refused(*options, cwd=ROOT) -> str:
        stage = (STAGE, "summarize", texts / "a.txt", *options)
        return one_error_line(run_stage(*stage, cwd=cwd, code=1))

    assert "outputs/ holds no adapter for summarize" in refused(cwd=tmp_path)
    assert "is not a model folder" in refused("--model", tmp_path)
    assert "no run and no folder nothing" in refused("--model", "nothing")
    assert "cannot load nobody/nothing" in refused("--model", "nobody/nothing")
    assert "names no base" in refused("--base", "--model", tiny_qwen2)
    assert "would be overwritten" in refused("--model", tiny_qwen2, "--output-dir", texts)


def test_the_adapter_is_the_task_s_newest_and_the_template_the_task_s(adapter, texts, tmp_path):
    for i, task in enumerate(("title", "summarize", "title", "title")):
        run = shutil.copytree(adapter, tmp_path / f"outputs/run{i}")
        os.utime(run / "adapter_model.safetensors", (i, i))
        mark_made(run / "inputs", {"task": task})
    (tmp_path / "outputs/run3/adapter_model.safetensors").unlink()

    def answer(task, *options) -> list[str]:
        stage = (STAGE, task, texts / "a.txt", "--max-new-tokens", 16, *options)
        return run_stage(*stage, cwd=tmp_path).stdout.split()

    expected = evaluated(adapter, TEXTS["a.txt"])
    assert answer("title") == answer("summarize") == expected
    with chdir(tmp_path):
        assert newest_adapter(load_task("title")) == "outputs/run2"
    base = find_weights(str(adapter), base=True).model
    told = evaluated(base, TEXTS["a.txt"], "instructed", load_task("title"))
    assert answer("title", "--instructed") == told


def test_an_adapter_from_the_hub(hub, adapter, texts, tiny_qwen2, tmp_path):
    base = {path.name: path.read_bytes() for path in tiny_qwen2.iterdir()}
    revision = hub.put("models/other/base", base)
    told = json.loads((adapter / "adapter_config.json").read_text())
    told |= {"base_model_name_or_path": "other/base", "revision": revision}
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    files = {"adapter_config.json": json.dumps(told).encode(), "adapter_model.safetensors": weights}
    hub.put("models/other/adapter", files)
    environment = hub.environment(tmp_path)
    result = summarize(texts / "a.txt", "--model", "other/adapter", **environment)
    assert result.stdout.split() == evaluated(adapter, TEXTS["a.txt"])
