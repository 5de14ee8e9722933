"""One model in memory with its adapters, and a thread that answers what waits, batch by batch.

Requests of one adapter that wait at the same time are answered in one batch, greedily; then it is
the turn of the adapter that has waited longest for its own. Knows nothing of HTTP:
inference/chat_api.py puts requests in, and gets text back piece by piece.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import GenerationConfig

from common.cli import UserError, one_line, warn
from inference.adapters import add_adapter, check_adapter
from inference.weights import Weights, base_of, ends_of, load_model, load_tokenizer, model_ends
from training.chat import build_chat

GATHER = 0.02  # seconds; requests that come within them are answered together
MOST_WAITING = 1000  # requests; more are told to come again
FAILED = "it could not be answered; the server says why"
TOO_LITTLE_MEMORY = "the server has too little memory for it"
STOPPING = "the server is stopping"


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


@dataclass(frozen=True, eq=False)
class Answerer:
    """One of the models that an engine serves."""

    tokenizer: object
    ends: frozenset[int]  # tokens that end its turn
    adapter: str | None  # as peft calls it; None for the base alone


@dataclass(eq=False)
class Job:
    """A request on its way: what it asks, and what it has got so far.

    `send` is called in the engine's thread, with each new piece of text and at last with None;
    `finish` then says why: stop, length, or error, which `error` puts in words.
    """

    answerer: Answerer
    prompt_ids: list[int]
    longest: int  # most tokens of the answer
    send: Callable[[str | None], None]
    stops: list[str] = field(default_factory=list)
    streams: bool = False
    ids: list[int] = field(default_factory=list)
    sent: str = ""
    finish: str | None = None
    error: str = ""
    gone: bool = False  # the client gave up
    # By the clock `time.monotonic`, in seconds: its batch began, its first and its newest token.
    began_at: float = 0.0
    first_at: float = 0.0
    newest_at: float = 0.0

    @property
    def done(self) -> bool:
        return self.gone or self.finish is not None

    @property
    def timings(self) -> dict[str, float]:
        """What the answer took once it was its turn, by the names that llama.cpp's server has for
        it: reading the prompt up to the first token, and from there to the last."""
        return {
            "prompt_n": len(self.prompt_ids),
            "prompt_ms": round(1000 * (self.first_at - self.began_at), 1),
            "predicted_n": len(self.ids),
            "predicted_ms": round(1000 * (self.newest_at - self.first_at), 1),
        }

    def begin(self) -> None:
        """Its batch begins; of one that is tried again, anew."""
        self.ids.clear()
        self.began_at, self.first_at = time.monotonic(), 0.0

    def take(self, token: int) -> None:
        """Add the newest token, and send what is certain of the text."""
        self.newest_at = time.monotonic()
        self.first_at = self.first_at or self.newest_at
        if token in self.answerer.ends:
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
        text = self.answerer.tokenizer.decode(self.ids, skip_special_tokens=True)
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


class Engine:
    """A base with its adapters in memory, and a thread that answers what waits.

    `served`: name -> weights, the adapters first, all of one base; `batch`: most requests that are
    answered together. Raises UserError for what could not be answered, before any request comes.
    """

    def __init__(self, served: dict[str, Weights], batch: int, dtype: str | None):
        for name, weights in served.items():
            if weights.adapter:
                check_adapter(name, weights.adapter)
        base = base_of(served)
        self.model, _ = load_model(base, dtype)
        published = model_ends(base)
        # Each request ends by its own adapter's tokens, so generate has none to end by.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        self.context = self.model.config.get_text_config().max_position_embeddings
        self.served, self.batch = served, batch
        self.answerers: dict[str, Answerer] = {}
        for name, weights in served.items():
            self.answerers[name] = self._add(name, weights, published)
        self.model.eval()
        self._try_all()
        self.waiting: list[Job] = []  # in the order in which they came
        self.running: list[Job] = []
        self.last_turn = dict.fromkeys(self.answerers.values(), 0.0)  # time.monotonic()
        self.closing = False
        self.changed = threading.Condition()  # guards what waits and what runs
        threading.Thread(target=self._work, daemon=True).start()

    def _add(self, name: str, weights: Weights, published: GenerationConfig) -> Answerer:
        tokenizer = load_tokenizer(weights)
        rows = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            said = f"{name} has {len(tokenizer)} tokens, its base has {rows}"
            raise UserError(f"{said}; merge it (`just merge`) and serve the merged folder")
        # Asking for the ends also uses the tokenizer once, which sets its padding and truncation
        # to none; from then on it is only read, and threads may share it.
        ends = frozenset(ends_of(tokenizer, published, name))
        if not weights.adapter:
            return Answerer(tokenizer, ends, None)
        adapter = f"adapter{len(self.answerers)}"  # peft takes no dots, which a name may hold
        self.model = add_adapter(self.model, weights.adapter, adapter)
        return Answerer(tokenizer, ends, adapter)

    def _try_all(self) -> None:
        """One token of every model, so that what fails there fails now."""
        ids = torch.ones(1, 2, dtype=torch.long, device=self.model.device)
        for name, answerer in self.answerers.items():
            try:
                with self._answering_as(answerer):
                    self._generate(ids, torch.ones_like(ids), 1)
            except Exception as error:  # whatever peft or the model cannot do
                raise UserError(f"{name} cannot be answered with: {one_line(error)}") from None

    @contextmanager
    def _answering_as(self, answerer: Answerer) -> Iterator[None]:
        """The model with this adapter alone, or without any."""
        if answerer.adapter:
            self.model.set_adapter(answerer.adapter, inference_mode=True)
            yield
        elif hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield

    def prompt_ids(self, name: str, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as tokens. Raises jinja's TemplateError as the chat template does."""
        tokenizer = self.answerers[name].tokenizer
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
        """As many requests of one model as wait, of the one whose turn is longest ago: so one with
        few requests waits for at most a batch of each other, however many those have."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closing)
        time.sleep(GATHER)
        with self.changed:
            self.running = []
            if self.waiting:  # those who waited may be gone
                answerers = [job.answerer for job in self.waiting]
                chosen = min(answerers, key=self.last_turn.get)
                self.last_turn[chosen] = time.monotonic()
                self.running = [job for job in self.waiting if job.answerer is chosen][: self.batch]
                self.waiting = [job for job in self.waiting if job not in self.running]
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
        half = (len(again) + 1) // 2
        self._answer(again[:half])
        self._answer(again[half:])

    def _run(self, jobs: list[Job]) -> None:
        """Answer a batch of one model; every job gets its tokens as they come."""
        width = max(len(job.prompt_ids) for job in jobs)
        ids, mask = [], []
        for job in jobs:
            job.begin()
            n_missing = width - len(job.prompt_ids)
            ids.append([0] * n_missing + job.prompt_ids)
            mask.append([0] * n_missing + [1] * len(job.prompt_ids))
        device = self.model.device
        longest = max(job.longest for job in jobs)
        hand_out = partial(self._hand_out, jobs)
        with self._answering_as(jobs[0].answerer):
            self._generate(
                torch.tensor(ids, device=device),
                torch.tensor(mask, device=device),
                longest,
                stopping_criteria=[hand_out],
            )

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, n_new: int, **options) -> None:
        self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_new, **options)

    def _hand_out(self, jobs: list[Job], ids: torch.Tensor, *_, **__) -> torch.Tensor:
        """Give each request of a batch its newest token; which of them are done."""
        for job, token in zip(jobs, ids[:, -1].tolist(), strict=True):
            if not job.done:
                job.take(token)
        ended = [job.done or self.closing for job in jobs]
        return torch.tensor(ended, device=ids.device)
