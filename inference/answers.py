"""The answers of a system to texts, kept in an append-only table, each found again by its content.

A record is of the very messages that were answered (`prompt`) and tells all that made it
(`settings`). What is there is not made again; a killed run goes on where it stopped.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common import table
from common.cli import warn
from common.files import append_record, appending, read_records
from data_prep.teacher.teacher_prompts import prompt_digest
from inference.draw_samples import SAMPLING
from inference.generate import (
    answer_prompts,
    build_prompt,
    generate_batch,
    prompt_limit,
    sample_batch,
)
from inference.served_model import NoEndpoint, address_of, describe_served
from inference.vllm_engine import VllmModel, choose_engine
from inference.weights import Weights, load_model, precision
from prompts.task import Task


@dataclass(frozen=True)
class System:
    """A model, its name behind an endpoint, or None for answers that need no model (lead, second),
    and the template around the text, None for the bare text; whether several answers are sampled
    and the one most like them all is taken, or every one."""

    model: Weights | str | None
    template: str | None = None
    consensus: bool = False
    every_sample: bool = False


@dataclass(frozen=True)
class AnswerOptions:
    """How texts are answered; all from `budget_usd` on is of models behind an endpoint."""

    max_new_tokens: int | None = None  # the task's where None
    max_prompt_tokens: int = 8192
    samples: int | None = None  # of a consensus, or all that are kept
    batch_tokens: int = 16384
    engine: str = "auto"  # or transformers, or vllm
    load: Callable[[Weights], tuple] = load_model  # (model, tokenizer)
    budget_usd: float | None = None
    concurrency: int = 64
    price: tuple[float, float] | None = None
    retry_unusable: bool = False


KEY = ("id", "prompt", "settings")


def settings_of(
    system: System, task: Task, options: AnswerOptions, known: dict | None = None
) -> dict:
    """All that tells a model's answers from those that it gives otherwise, but for what it is asked
    (see `prompt_digest`). An endpoint that does not answer is taken to serve what it did when it
    was asked last, by its `known` settings. Raises UserError if there are none."""
    settings = {"template": task.sha(system.template) if system.template else None}
    settings["max_new_tokens"] = options.max_new_tokens or task.max_new_tokens
    if isinstance(system.model, str):
        settings |= {"model": system.model, "endpoint": address_of()}
        try:
            return settings | {"served": describe_served(system.model)}
        except NoEndpoint as error:
            if not known or {key: known.get(key) for key in settings} != settings:
                raise
            warn(f"{error}; it is taken to serve what it did before")
            return settings | {"served": known.get("served")}
    settings |= {"max_prompt_tokens": options.max_prompt_tokens, "precision": precision()}
    if system.consensus or system.every_sample:
        settings |= {"samples": options.samples, "sampling": SAMPLING}
    elif choose_engine(options.engine, system.model) == "vllm":
        settings["engine"] = "vllm"  # without this field it was transformers
    return settings | system.model.settings


def ask_endpoint(system: System, requests: list[dict], path: Path, options: AnswerOptions) -> None:
    """Complete the answers of a model behind an endpoint, asked as the teacher is."""
    from data_prep.teacher.ask import ask_all
    from data_prep.teacher.client import AskOptions

    most = requests[0]["settings"]["max_new_tokens"]
    asking = AskOptions(
        model=system.model,
        sampling={"max_tokens": most, "temperature": 0.0},
        max_tokens=most,
        concurrency=options.concurrency,
        budget_usd=options.budget_usd,
        price=options.price,
        retry_refused=True,
        retry_unusable=options.retry_unusable,
        cut_counts=True,
    )
    ask_all(requests, path, asking, system.model, KEY)


def requests_of(rows: list[dict], template: str | None, task: Task, settings: dict) -> list[dict]:
    """What each of `rows` {id, text} is asked, and by what its answer is found again."""
    requests = []
    for row in rows:
        messages = task.student_messages(row["text"], template)
        request = {"id": row["id"], "prompt": prompt_digest(messages), "settings": settings}
        requests.append(request | {"messages": messages})
    return requests


def outputs_of(
    model, tokenizer, prompts: list[str], settings: dict, system: System, options: AnswerOptions
) -> Iterator[tuple[int, dict]]:
    """(index of a prompt, its output) as they come, by vLLM where the settings name it."""
    n_new = settings["max_new_tokens"]
    if isinstance(model, VllmModel):
        return model.answer_prompts(prompts, n_new)
    samples = settings.get("samples", 0)
    make = sample_batch if system.every_sample else generate_batch
    answer_batch = partial(make, model, tokenizer, n_new=n_new, samples=samples)
    most_new = n_new * max(1, samples)  # a prompt is held once for all of its samples
    return answer_prompts(answer_batch, tokenizer, prompts, most_new, options.batch_tokens)


def answer_rows(
    system: System,
    rows: list[dict],
    path: Path,
    task: Task,
    options: AnswerOptions,
    settings: dict | None = None,
) -> None:
    """Append to `path` the answers of a system with a model to those of `rows` that it lacks; with
    its `settings`, if they are known already."""
    settings = settings or settings_of(system, task, options)
    wanted = requests_of(rows, system.template, task, settings)
    if isinstance(system.model, str):
        return ask_endpoint(system, wanted, path, options)
    texts = {row["id"]: row["text"] for row in rows}
    with appending(path) as log, tqdm(desc=path.stem, unit="text") as bar:
        if not (left := table.missing(path, wanted, KEY)):
            return
        if old := sum("prompt" not in record for record in read_records(path)):
            told = "are of an earlier version and do not tell to which text they are"
            print(f"{path}: {old:,} answers {told}; they stay, and are made again", flush=True)
        if settings.get("engine") == "vllm":
            model = VllmModel(system.model, settings, path.with_suffix(".vllm.log"))
            tokenizer = model.tokenizer
        else:
            model, tokenizer = options.load(system.model)
        most = settings["max_prompt_tokens"]
        limit = prompt_limit(model.config, settings["max_new_tokens"], most)
        template = system.template
        built = [build_prompt(tokenizer, texts[r["id"]], template, limit, task) for r in left]
        bar.reset(len(left))
        prompts = [prompt for prompt, _ in built]
        outputs = outputs_of(model, tokenizer, prompts, settings, system, options)
        with closing(outputs):  # vLLM ends with it
            for i, output in outputs:
                about = {key: left[i][key] for key in KEY}
                append_record(log, about | {"n_cut_tokens": built[i][1]} | output)
                bar.update()
