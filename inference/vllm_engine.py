"""Greedy answers through vLLM, for many texts: started for one model, asked, and stopped again.

`vllm serve` runs beside us with the line that `just serve` makes of the weights (an adapter as a
LoRA module over its base, or a whole model), on a free port of this machine. It gets the tokens of
the very prompts that transformers would get and the same tokens to stop at, and its tokens are
decoded as transformers' are. It ends with us, however we end.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType

import httpx

from common.cli import UserError, one_line
from inference.vllm_line import unfit_for_vllm, vllm_line
from inference.weights import Weights, base_of, ends_of, load_tokenizer, model_ends

ENGINES = ("auto", "transformers", "vllm")
NAME = "asked"  # what the model is called between us and it
AT_ONCE = 256  # requests; vLLM itself decides how many it works on
PATIENCE = 900  # seconds until it must be up: a large model is read, and compiled for
END_PATIENCE = 15  # seconds until it must have ended by itself
OF_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; where asked


def find_vllm() -> str | None:
    """The command of the vLLM that is installed beside us, or on the PATH."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.is_file() else shutil.which("vllm")


def choose_engine(asked: str, weights: Weights) -> str:
    """What answers: `auto` takes vLLM where it and a GPU are there and it can take the adapter.

    Raises UserError for `vllm` where it cannot be had.
    """
    import torch

    if asked == "transformers":
        return asked
    reason = None if find_vllm() else "it is neither installed here nor on the PATH"
    if not reason and weights.adapter:
        reason = unfit_adapter(weights.adapter)
    if asked == "auto":
        return "transformers" if reason or not torch.cuda.is_available() else "vllm"
    if reason:
        raise UserError(f"vLLM cannot answer: {reason}; --engine transformers can")
    return "vllm"


def unfit_adapter(folder: str) -> str | None:
    from peft import PeftConfig

    return unfit_for_vllm(PeftConfig.from_pretrained(folder))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end_with_parent() -> None:
    """In the new process: be told to end when the one that started it is gone, even if killed."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def serving_line(weights: Weights, port: int, dtype: str, context: int) -> list[str]:
    """The command line of a server for these weights alone, of prompts and answers of `context`
    tokens together. Raises UserError for an adapter that vLLM cannot take."""
    import torch

    served = {NAME: weights}
    base = base_of(served)
    if weights.adapter and not weights.four_bits:
        served["base"] = base
    line = vllm_line(served, base, "127.0.0.1", port)
    line += ["--dtype", dtype, "--max-model-len", str(context)]
    if not torch.cuda.is_available():
        line += ["--enforce-eager"]  # or it compiles for minutes
    return line


def environment() -> dict[str, str]:
    """Ours, less what is of our Python alone."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return OF_CPU | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"} | kept


class VllmServer:
    """A running `vllm serve` for one model; within `with`.

    `context`: most tokens of a prompt and its answer; `log`: where its output goes. Raises
    UserError in one line if it does not start, fails or is killed.
    """

    def __init__(self, weights: Weights, dtype: str, context: int, log: Path):
        self.command, self.log = find_vllm(), log
        port = free_port()
        self.line = serving_line(weights, port, dtype, context)
        tokenizer = load_tokenizer(weights)
        name = weights.adapter or weights.model
        self.ends = ends_of(tokenizer, model_ends(base_of({NAME: weights})), name)
        self.tokenizer = tokenizer
        limits = httpx.Limits(max_connections=AT_ONCE)
        url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=url, timeout=None, trust_env=False, limits=limits)

    def __enter__(self) -> "VllmServer":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        print(f"starting vLLM, which tells {self.log} what it does", file=sys.stderr)
        with self.log.open("wb") as log:
            # In a session of its own, so that Ctrl-C reaches us alone, and we end all of it.
            self.process = subprocess.Popen(
                [self.command, *self.line[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_up(self) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            self._check_alive()
            try:
                if self.client.get("/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise UserError(f"vLLM was not up after {PATIENCE} s; {self.log} says what it did")

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise UserError(self._why_ended())

    def _why_ended(self) -> str:
        """A line: the last error that its output names, or the signal that ended it."""
        code = self.process.poll()
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with {code}"
        text = self.log.read_text(errors="replace")
        errors = [line for line in text.splitlines() if "Error: " in line or "Killed" in line]
        said = f" ({one_line(errors[-1].rpartition('] ')[2], 200)})" if errors else ""
        hint = "--engine transformers goes without it; what was answered is kept"
        return f"vLLM {how}{said}; {self.log} says more; {hint}"

    def answer(self, prompt_ids: list[int], n_new: int) -> dict:
        """The record of a greedy answer. Raises UserError if vLLM has gone, or refuses."""
        asked = {
            "model": NAME,
            "prompt": prompt_ids,
            "max_tokens": n_new,
            "temperature": 0,
            "stop_token_ids": self.ends,
            "return_token_ids": True,
        }
        try:
            response = self.client.post("/v1/completions", json=asked)
            response.raise_for_status()
            (choice,) = response.json()["choices"]
            ids = choice["token_ids"]
        except httpx.HTTPStatusError:
            said = one_line(response.text, 200)
            raise UserError(f"vLLM answers {response.status_code}: {said}") from None
        except httpx.TransportError as error:
            time.sleep(1)  # until the system tells that it ended
            self._check_alive()
            raise UserError(f"vLLM does not answer: {one_line(error) or type(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError("vLLM's answer lacks its tokens; 0.11 or later gives them") from None
        kept = list(takewhile(lambda token: token not in self.ends, ids))
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        ended = "length" if choice["finish_reason"] == "length" else "stop"
        counts = {"n_prompt_tokens": len(prompt_ids), "n_new_tokens": len(kept)}
        return {"text": text, "finish_reason": ended, **counts}

    def answer_prompts(self, prompts: list[str], n_new: int) -> Iterator[tuple[int, dict]]:
        """(index of a prompt, its record) as they come. Raises UserError."""
        encoded = self.tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = {pool.submit(self.answer, ids, n_new): i for i, ids in enumerate(encoded)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                # Ctrl-C, too: what is on its way would hold the pool up until it is answered.
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def stop(self) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.client.close()
