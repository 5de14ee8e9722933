"""Greedy answers through vLLM, for many texts: started for one model, asked, and stopped again.

`vllm serve` runs beside us with the line that `just serve` makes of the weights (an adapter as a
LoRA module over its base, or a whole model), on a free port of this machine. It gets the tokens of
the very prompts that transformers would get and the same tokens to stop at, and its tokens are
decoded as transformers' are. It ends with us, however we end.
"""

import ctypes
import os
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

import httpx

from common.cli import UserError, one_line
from inference.vllm_line import find_vllm, unfit_for_vllm, vllm_line
from inference.weights import Weights, base_of, ends_of, load_tokenizer, model_ends

ENGINES = ("auto", "transformers", "vllm")
NAME = "asked"  # what the model is called between us and it
AT_ONCE = 256  # requests; vLLM itself decides how many it works on
PATIENCE = 900  # seconds until it must be up: a large model is read, and compiled for
END_PATIENCE = 15  # seconds until it must have ended by itself
OF_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; where asked


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


class VllmModel:
    """A model that a `vllm serve` of its own answers with, which runs while `answer_prompts` does.

    `settings`: of its answers, as `answers.settings_of` makes them; `log`: the file for what vLLM
    says. Raises UserError for an adapter that vLLM cannot take.
    """

    def __init__(self, weights: Weights, settings: dict, log: Path):
        from transformers import AutoConfig

        self.weights, self.log = weights, log
        self.process: subprocess.Popen | None = None
        self.dtype = settings["precision"]
        config = AutoConfig.from_pretrained(weights.model, revision=weights.revision)
        self.config = config.get_text_config()
        most = settings["max_prompt_tokens"] + settings["max_new_tokens"]
        self.context = min(most, getattr(self.config, "max_position_embeddings", None) or most)
        self.tokenizer = load_tokenizer(weights)
        name = weights.adapter or weights.model
        self.ends = ends_of(self.tokenizer, model_ends(base_of({NAME: weights})), name)

    def answer_prompts(self, prompts: list[str], n_new: int) -> Iterator[tuple[int, dict]]:
        """(index of a prompt, its record) as they come. Raises UserError, in one line, where vLLM
        does not start, refuses or is killed."""
        encoded = self.tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            self._start()
            futures = {pool.submit(self._answer, ids, n_new): i for i, ids in enumerate(encoded)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # It ends first, after Ctrl-C too, or what is on its way would hold the pool up.
            self._stop()
            pool.shutdown(cancel_futures=True)

    def _start(self) -> None:
        port = free_port()
        line = serving_line(self.weights, port, self.dtype, self.context)
        limits = httpx.Limits(max_connections=AT_ONCE)
        url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=url, timeout=None, trust_env=False, limits=limits)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        print(f"starting vLLM; {self.log} says what it does", file=sys.stderr)
        with self.log.open("wb") as log:
            # In a session of its own, so that Ctrl-C reaches us alone, and we end all of it.
            self.process = subprocess.Popen(
                [find_vllm(), *line[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._wait_until_up()

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
        """Raise UserError if vLLM has ended: how, and the first error that its output names."""
        code = self.process.poll()
        if code is None:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error: " in line]
        said = f" ({one_line(errors[0].rpartition('] ')[2], 200)})" if errors else ""
        hint = "--engine transformers goes without it; what was answered is kept"
        raise UserError(f"vLLM {how}{said}; {self.log} says more; {hint}")

    def _check_ending(self) -> None:
        """As `_check_alive`, of a server that may be about to end, since it failed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_PATIENCE)
        self._check_alive()

    def _answer(self, prompt_ids: list[int], n_new: int) -> dict:
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
            if response.is_server_error:
                self._check_ending()
            said = one_line(response.text, 200)
            raise UserError(f"vLLM answers {response.status_code}: {said}") from None
        except httpx.TransportError as error:
            self._check_ending()
            raise UserError(f"vLLM does not answer: {one_line(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError("vLLM's answer lacks its tokens; 0.11 or later gives them") from None
        kept = list(takewhile(lambda token: token not in self.ends, ids))
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        ended = "length" if choice["finish_reason"] == "length" else "stop"
        counts = {"n_prompt_tokens": len(prompt_ids), "n_new_tokens": len(kept)}
        return {"text": text, "finish_reason": ended, **counts}

    def _stop(self) -> None:
        """End it and all that it started."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.client.close()
