"""`just answers --engine vllm`, with a stand-in for the command that answers by transformers."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, read_jsonl, run_stage, start_stage

from common.cli import UserError
from inference import vllm_engine
from inference.vllm_engine import choose_engine
from inference.weights import Weights

pytestmark = pytest.mark.slow
STAGE = "eval.answer_texts"
LONGEST = ("--max-new-tokens", 16)


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """The folder of the stand-in, whose command lies in bin/, on the PATH."""
    folder = tmp_path / "vllm"
    command = folder / "bin/vllm"
    command.parent.mkdir(parents=True)
    command.write_text(
        f"#!{sys.executable}\nimport runpy\nrunpy.run_path('{ROOT}/tests/fake_vllm.py')\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VLLM", str(folder))
    return folder


def is_running(pid_file: Path) -> bool:
    with suppress(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
        return True
    return False


def wait_for(condition, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_answers_are_those_of_transformers_and_say_what_gave_them(
    adapters, finished_run, tmp_path, vllm
):
    adapter = str(adapters["title"])
    systems = ("--systems", "base", adapter, *LONGEST)
    run_stage(STAGE, finished_run, *systems, "--engine", "transformers")
    done = run_stage(STAGE, finished_run, *systems, "--engine", "vllm")
    assert done.stderr.count("starting vLLM") == 2
    paths = sorted((tmp_path / "out/eval/answers").glob("*.jsonl"))
    assert len(paths) == 2
    for path in paths:
        records = read_jsonl(path)
        ours, theirs = records[:4], records[4:]
        assert ["engine" in record["settings"] for record in records] == [False] * 4 + [True] * 4
        kept = (
            "text",
            "finish_reason",
            "n_prompt_tokens",
            "n_new_tokens",
            "n_cut_tokens",
            "prompt",
        )
        by_id = {record["id"]: [record[field] for field in kept] for record in ours}
        assert by_id == {record["id"]: [record[field] for field in kept] for record in theirs}
    asked = read_jsonl(vllm / "asked.jsonl")
    assert len(asked) == 8 and all(one["return_token_ids"] for one in asked)
    assert not is_running(vllm / "pid")
    again = run_stage(STAGE, finished_run, *systems, "--engine", "vllm")
    assert "starting vLLM" not in again.stderr


def test_vllm_that_dies_is_one_line_and_what_was_answered_is_kept(finished_run, tmp_path, vllm):
    asked = (STAGE, finished_run, "--systems", "base", *LONGEST, "--engine", "vllm")
    (vllm / "fault").write_text("start")
    line = one_error_line(run_stage(*asked, code=1))
    assert "ended with 1 (torch.OutOfMemoryError: out of memory)" in line
    assert "--engine transformers" in line
    (vllm / "fault").write_text("killed")
    line = one_error_line(run_stage(*asked, code=1))
    assert "vLLM was killed by signal 9" in line
    assert not is_running(vllm / "pid")
    n_kept = len(read_jsonl(tmp_path / "out/eval/answers/base.jsonl"))
    (vllm / "fault").unlink()
    run_stage(*asked)
    records = read_jsonl(tmp_path / "out/eval/answers/base.jsonl")
    assert 0 < n_kept < 4 and len(records) == 4


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_vllm_ends_with_us(finished_run, vllm, ended_by):
    (vllm / "fault").write_text("silent")
    asked = (STAGE, finished_run, "--systems", "base", *LONGEST, "--engine", "vllm")
    process = start_stage(*asked)
    try:
        wait_for(lambda: (vllm / "asked.jsonl").exists())
        process.send_signal(ended_by)
        _, err = process.communicate(timeout=60)
        wait_for(lambda: not is_running(vllm / "pid"))
    finally:
        process.kill()
    assert "Traceback" not in err
    if ended_by == signal.SIGINT:
        assert process.returncode == 130


def test_which_engine_answers(adapters, monkeypatch):
    title, base = Weights(str(adapters["tiny-qwen2"]), adapter=str(adapters["title"])), Weights("x")
    monkeypatch.setattr(vllm_engine, "find_vllm", lambda: None)
    assert choose_engine("auto", base) == choose_engine("transformers", base) == "transformers"
    with pytest.raises(UserError, match="neither installed here nor on the PATH"):
        choose_engine("vllm", base)
    monkeypatch.setattr(vllm_engine, "find_vllm", lambda: "/bin/vllm")
    assert choose_engine("auto", title) == "transformers"  # there is no GPU
    assert choose_engine("vllm", title) == "vllm"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_engine("auto", title) == choose_engine("auto", base) == "vllm"
    monkeypatch.setattr(vllm_engine, "unfit_for_vllm", lambda config: "its rank 1024 is too large")
    assert choose_engine("auto", title) == "transformers"
    with pytest.raises(UserError, match="its rank 1024 is too large; --engine transformers can"):
        choose_engine("vllm", title)
