"""One model in memory with its adapters, and a thread that answers what waits, batch by batch.

Requests that wait at the same time are answered in one batch, whichever adapters they name (peft's
mixed batches), greedily, each up to the end of the turn of its own adapter. Knows nothing of HTTP:
inference/chat_api.py puts requests in, and gets text back piece by piece.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from common.cli import UserError, one_line, warn
from inference.weights import Weights, add_adapter, ends_of, load_model, load_tokenizer
from training.chat import build_chat
from training.config import check_finished

GATHER = 0.02  # seconds; requests that come within them are answered together
MOST_WAITING = 1000  # requests; more are told to come again
FAILED = "it could not be answered; the server says why"
TOO_LITTLE_MEMORY = "the server has too little memory for it"
STOPPING = "the server is stopping"
BASE = "__base__"  # as peft calls the rows of a batch that no adapter answers


def settled_part(text: str, stops: list[str]) -> str:
    """The part of an unfinished text that no later token can change or cut off: without half a
    character at its end, and without what may be the beginning of one of `stops`."""
    text = text.rstrip("\ufffd")
    held = 0
    for stop in stops:
        for length in range(1, min(len(stop), len(text) + 1)):
            if text.endswith(stop[:length]):
                held = max(held, length)
    return text[: len(text) - held]


@dataclass(eq=False)
class Job:
    """A request on its way: what it asks, and what it has got so far.

    `send` is called in the engine's thread, with each new piece of text and at last with None;
    `finish` then says why: stop, length, or error, which `error` puts in words.
    """

    adapter: str  # as peft calls it
    tokenizer: object
    prompt_ids: list[int]
    longest: int  # most tokens of the answer
    ends: frozenset[int]  # tokens that end the turn
    send: Callable[[str | None], None]
    stops: list[str] = field(default_factory=list)
    streams: bool = False
    ids: list[int] = field(default_factory=list)
    sent: str = ""
    finish: str | None = None
    error: str = ""
    gone: bool = False  # the client gave up

    @property
    def done(self) -> bool:
        return self.gone or self.finish is not None

    def take(self, token: int) -> None:
        """Add the newest token, and send what is certain of the text."""
        if token in self.ends:
            self.finish = "stop"
        else:
            self.ids.append(token)
            self.finish = "length" if len(self.ids) == self.longest else None
        if self.finish or self.streams or self.stops:
            self._send_text()

    def fail(self, error: str) -> None:
        if not self.done:
            self.finish, self.error = "error", error
            self.send(None)

    def _send_text(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        places = [text.find(stop) for stop in self.stops if stop in text]
        if places:
            self.finish, text = "stop", text[: min(places)]
        elif not self.finish:
            text = settled_part(text, self.stops)
        piece = text.strip()[len(self.sent) :]
        if piece and (self.finish or self.streams):
            self.sent += piece
            self.send(piece)
        if self.finish:
            self.send(None)


def model_ends(weights: Weights) -> GenerationConfig:
    """The generation settings that a model is published with; those of its config without a file.
    Raises OSError where the model cannot be had."""
    try:
        return GenerationConfig.from_pretrained(weights.model, revision=weights.revision)
    except OSError:
        config = AutoConfig.from_pretrained(weights.model, revision=weights.revision)
        return GenerationConfig.from_model_config(config)


def base_of(served: dict[str, Weights]) -> Weights:
    """The base that all of them share, at the revision that one of them names."""
    first = next(iter(served.values()))
    revisions = [one.revision for one in served.values() if one.revision]
    return replace(first, adapter=None, revision=next(iter(revisions), None))


def check_adapter(name: str, folder: str) -> None:
    """Raise UserError for an adapter that cannot be served from a batch with others."""
    from peft import PeftConfig

    check_finished(Path(folder))
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is no adapter of peft: {one_line(error, 200)}") from None
    merge = f"merge it (`just merge`) and serve the folder merged/ in {folder}"
    if getattr(config, "use_dora", False):
        raise UserError(f"{name} is a DoRA adapter, which is not served as it is; {merge}")
    if getattr(config, "bias", "none") != "none":
        raise UserError(f"{name} changes the base's biases, so it needs a base of its own; {merge}")


class Engine:
    """A base with its adapters in memory, and a thread that answers what waits.

    `served`: name -> weights, the adapters first, all of one base. Raises UserError for what could
    not be answered, before any request comes.
    """

    def __init__(self, served: dict[str, Weights], batch: int, dtype: str | None):
        for name, weights in served.items():
            if weights.adapter:
                check_adapter(name, weights.adapter)
        base = base_of(served)
        self.model, _ = load_model(base, dtype)
        generation_config = model_ends(base)
        # Each request ends by its own adapter's tokens (Job.ends), so generate has none to end by.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        self.served = served
        self.context = self.model.config.get_text_config().max_position_embeddings
        self.tokenizers = {name: load_tokenizer(weights) for name, weights in served.items()}
        # Asking for the ends also uses each tokenizer once, which sets its padding and truncation
        # to none; from then on it is only read, and threads may share it.
        self.ends = {
            name: frozenset(ends_of(tokenizer, generation_config, name))
            for name, tokenizer in self.tokenizers.items()
        }
        self._check_vocabulary()
        self.adapters = {}  # name -> what peft calls it
        for number, (name, weights) in enumerate(served.items()):
            self.adapters[name] = f"adapter{number}" if weights.adapter else BASE
            if weights.adapter:
                self.model = add_adapter(self.model, weights.adapter, self.adapters[name])
        self.model.eval()
        self._try_all()
        self.batch, self.closing = batch, False
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()  # guards what waits and what runs
        threading.Thread(target=self._work, daemon=True).start()

    def _check_vocabulary(self) -> None:
        rows = self.model.get_input_embeddings().num_embeddings
        for name, tokenizer in self.tokenizers.items():
            if len(tokenizer) > rows:
                said = f"{name} has {len(tokenizer)} tokens, its base has {rows}"
                raise UserError(f"{said}; merge it (`just merge`) and serve the merged folder")

    def _try_all(self) -> None:
        """One token of every adapter in one batch, so that what fails there fails now."""
        ids = torch.ones(len(self.adapters), 2, dtype=torch.long, device=self.model.device)
        try:
            self._generate(ids, torch.ones_like(ids), list(self.adapters.values()), 1)
        except Exception as error:  # whatever peft or the model cannot do
            names = ", ".join(self.adapters)
            raise UserError(f"{names} cannot be answered in a batch: {one_line(error)}") from None

    def prompt_ids(self, name: str, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as tokens. Raises jinja's TemplateError as the chat template does."""
        tokenizer = self.tokenizers[name]
        prompt = build_chat(tokenizer, messages)
        return tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids

    def submit(self, job: Job) -> None:
        """Queue a request. Raises queue.Full where too many wait, or the server ends."""
        with self.changed:
            if self.closing or len(self.waiting) >= MOST_WAITING:
                raise queue.Full
            self.waiting.append(job)
            self.changed.notify()

    def drop(self, job: Job) -> None:
        """Forget a request whose client gave up; one that is being answered ends at its next
        token."""
        job.gone = True
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        """Tell all whom it has not answered that it ends; the batch ends at its next token."""
        with self.changed:
            self.closing = True
            for job in [*self.waiting, *self.running]:
                job.fail(STOPPING)
            self.waiting.clear()
            self.changed.notify()

    def _next_batch(self) -> list[Job]:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closing)
        time.sleep(GATHER)
        with self.changed:
            n = min(self.batch, len(self.waiting))
            self.running = [self.waiting.popleft() for _ in range(n)]
            return self.running

    def _work(self) -> None:
        """Answer batch after batch; what fails in one does not stop the next."""
        while not self.closing:
            self._answer(self._next_batch())

    def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.done]
        if not jobs:
            return
        try:
            self._run(jobs)
            return
        except Exception as error:  # too little memory, or what no one foresaw
            short = isinstance(error, MemoryError | torch.OutOfMemoryError)
            short = short or "not enough memory" in str(error)  # torch's RuntimeError on a CPU
            reason = one_line(error)
        warn(f"{len(jobs)} requests failed together: {reason}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # In halves, from their beginning; but not what was read in part, or has nothing to halve.
        again = [job for job in jobs if short and len(jobs) > 1 and not job.sent]
        for job in jobs:
            if job not in again:
                job.fail(TOO_LITTLE_MEMORY if short else FAILED)
        for job in again:
            job.ids.clear()
        half = (len(again) + 1) // 2
        self._answer(again[:half])
        self._answer(again[half:])

    def _run(self, jobs: list[Job]) -> None:
        """Answer a batch; every job gets its tokens as they come."""
        width = max(len(job.prompt_ids) for job in jobs)
        missing = [width - len(job.prompt_ids) for job in jobs]
        padded = [[0] * n + job.prompt_ids for n, job in zip(missing, jobs, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in missing]
        device = self.model.device
        self._generate(
            torch.tensor(padded, device=device),
            torch.tensor(mask, device=device),
            [job.adapter for job in jobs],
            max(job.longest for job in jobs),
            stopping_criteria=[partial(self._hand_out, jobs)],
        )

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, adapters: list[str], n: int, **how):
        if hasattr(self.model, "peft_config"):
            how["adapter_names"] = adapters
        self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, **how)

    def _hand_out(self, jobs: list[Job], ids: torch.Tensor, *_, **__) -> torch.Tensor:
        """Give each request of a batch its newest token; which of them are done."""
        for job, token in zip(jobs, ids[:, -1].tolist(), strict=True):
            if not job.done:
                job.take(token)
        ended = [job.done or self.closing for job in jobs]
        return torch.tensor(ended, device=ids.device)
