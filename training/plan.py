"""What a run would cost before it starts: the teacher's replies, and a GPU's hours and dollars.

Reads DATA/extracts and the config; without extracts it reckons with as many and as long ones as
`just extracts` makes by default. Asks nothing and writes nothing. What it says of GPUs is an
estimate by a formula that it prints (training/estimate.py).

    python -m training.plan --limit 18000 --config qwen2-1.5b-sft-qlora \\
        qwen2-1.5b-sft-then-dpo-qlora
"""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from common.cli import UserError, not_negative, positive, run, share
from common.stats import markdown
from data_prep import generate_replies, sample_extracts
from data_prep.load_extracts import load_extracts
from data_prep.teacher import client
from data_prep.teacher.prices import BYTES_A_TOKEN, estimate_usd, price_of
from data_prep.teacher.teacher_prompts import TeacherPrompts
from prompts.task import Task, data_folder, task_of
from training.config import Overlay, RunConfig, resolve_config
from training.estimate import (
    PEAK_SHARE,
    Card,
    Evaluation,
    Shape,
    Training,
    answer_seconds,
    explain,
    load_cards,
    memory_gb,
    score_seconds,
    shape_of,
    training_of,
    training_seconds,
)

# What `just eval` does by default (a test holds it to that).
MOST_PROMPT_TOKENS = 8192
CONFIG = "qwen2-1.5b-sft-qlora"
PROMPT_TOKENS = 30  # that the student's chat template adds to a text


@dataclass(frozen=True)
class Texts:
    """Extracts of a split: how many, and the mean of their tokens."""

    number: int
    tokens: float


def default_texts(train_tokens: int | None) -> dict[str, Texts]:
    """What `just extracts` makes by default: at most so many, in the middle of their windows."""
    options = sample_extracts.parse_options([])
    train = train_tokens or (options.min_tokens + options.max_tokens) / 2
    # Documents are mostly short, so the middle is that of the logarithms.
    test = (options.min_chars * options.max_chars) ** 0.5 / BYTES_A_TOKEN
    return {"train": Texts(options.train, train), "test": Texts(options.test, test)}


def texts_in(folder: Path) -> dict[str, Texts]:
    """Those of a folder with extracts; a split that is not there counts as none. UserError."""
    texts = {}
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        records = load_extracts(path) if path.is_file() else []
        lengths = [tokens_of(record) for record in records]
        texts[split] = Texts(len(records), sum(lengths) / max(1, len(lengths)))
    return texts


def asked_for(texts: dict[str, Texts], splits: list[str], limit: int | None) -> dict[str, Texts]:
    """Those that --splits and --limit leave."""
    asked = {}
    for split, of_split in texts.items():
        number = min(of_split.number, limit or of_split.number) if split in splits else 0
        asked[split] = Texts(number, of_split.tokens)
    return asked


def left_over(texts: dict[str, Texts], splits: list[str], limit: int | None) -> Texts:
    """The training texts past --limit, which get no reply and are there to be sampled."""
    train = texts["train"]
    number = max(0, train.number - limit) if limit and "train" in splits else 0
    return Texts(number, train.tokens)


def tokens_of(record: dict) -> float:
    """Tokens of an extract; by its bytes where it is one's own and does not tell."""
    counted = record.get("n_tokens")
    return counted if isinstance(counted, int) else len(record["text"].encode()) / BYTES_A_TOKEN


def stand_in_requests(task: Task, answers: int, texts: dict[str, Texts]) -> list[dict]:
    """As many requests as extracts would make, each about a text of their mean length."""
    requests = []
    for split, of_split in texts.items():
        text = "x" * int(of_split.tokens * BYTES_A_TOKEN)
        prompts = TeacherPrompts(task, [{"id": split, "text": text}])
        (request,) = generate_replies.to_requests(prompts, answers, balance=False)
        requests += [request] * of_split.number
    return requests


@dataclass(frozen=True)
class GpuPlan:
    """The trainings, one after the other, on the same student; then answers of the last and scores.

    A training that goes on from another's adapter learns from its samples, at most a pair of each
    of the `unseen` texts, where there are any.
    """

    configs: list[RunConfig]
    texts: dict[str, Texts]  # by split: those with a reply
    unseen: Texts
    peak_share: float

    @property
    def task(self) -> Task:
        return self.configs[0].task

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.configs[0].base_model, self.configs[0].base_revision)

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(
            texts=self.texts["test"].number,
            tokens=min(self.texts["test"].tokens + PROMPT_TOKENS, MOST_PROMPT_TOKENS),
            systems=len([name for name in self.task.systems if name != "lead"]),
            new_tokens=self.task.max_new_tokens,
        )

    @property
    def sampling(self) -> Evaluation:
        """A text's samples are drawn at once, and take about as long as one answer."""
        tokens = self.unseen.tokens + PROMPT_TOKENS
        new_tokens = generate_replies.answer_tokens(self.task)
        return Evaluation(self.unseen.number, tokens, systems=1, new_tokens=new_tokens)

    def learns_from_samples(self, config: RunConfig) -> bool:
        return bool(config.settings.get("lora_model_dir") and self.unseen.number)

    def training(self, config: RunConfig) -> Training:
        texts = self.unseen if self.learns_from_samples(config) else self.texts["train"]
        new_tokens = generate_replies.answer_tokens(self.task)
        return training_of(config, texts.number, texts.tokens + PROMPT_TOKENS, new_tokens)

    def seconds(self, card: Card) -> dict[str, float]:
        """What each step takes of a card."""
        shape, evaluation, share = self.shape, self.evaluation, self.peak_share
        steps = {}
        for config in self.configs:
            if self.learns_from_samples(config):
                name = f"samples of {self.sampling.texts:,} texts"
                steps[name] = answer_seconds(shape, self.sampling, card, share)
            name = f"training {config.name}"
            steps[name] = training_seconds(shape, self.training(config), card, share)
        steps["answers"] = answer_seconds(shape, evaluation, card, share)
        steps["scores"] = score_seconds(evaluation, card, share)
        return steps

    def table(self, prices: list[float] | None, replies_usd: float | None) -> pd.DataFrame:
        """Hours and dollars of each card; `prices` are of an hour, one or lowest and highest."""
        needs = max(memory_gb(self.shape, self.training(config)) for config in self.configs)
        columns = {}
        for name, card in load_cards().items():
            hours = {step: seconds / 3600 for step, seconds in self.seconds(card).items()}
            low, high = (prices[0], prices[-1]) if prices else card.usd_per_hour
            total = sum(hours.values())
            column = {step: f"{of_step:.1f} h" for step, of_step in hours.items()}
            column["all"] = f"{total:.1f} h"
            column["$ an hour"] = span(low, high)
            column["$"] = span(low * total, high * total)
            if replies_usd is not None:
                both = span(low * total + replies_usd, high * total + replies_usd)
                column["$ with the replies"] = both
            column[f"holds its {needs:.0f} GB"] = holds(needs, card.gb)
            columns[name] = column
        return pd.DataFrame(columns)

    def explain(self) -> str:
        """How the table was reckoned, as text."""
        trainings = [self.training(config) for config in self.configs]
        of_trainings = "\n".join(
            f"{config.name}: {explain(self.shape, training, self.peak_share)}"
            for config, training in zip(self.configs, trainings, strict=True)
        )
        evaluation, sampling = self.evaluation, self.sampling
        of_samples = (
            f"samples: {sampling.texts:,} texts x {sampling.new_tokens} tokens, those of a text at "
            "once; at most a pair of each text\n"
        )
        return (
            "An estimate: nobody has measured it on these cards (`just bench gpu` does).\n"
            f"{of_trainings}\n"
            f"{of_samples if any(map(self.learns_from_samples, self.configs)) else ''}"
            f"answers: {evaluation.texts:,} documents of {evaluation.tokens:,.0f} tokens x "
            f"{evaluation.systems} systems x {evaluation.new_tokens} tokens, one at a time; "
            "scores: the encoder in 32 bits\n"
            "memory: of rows as long as sequence_len, "
            f"{max(training.longest for training in trainings):,} tokens; most of it logits"
        )


def holds(needed: float, there: float) -> str:
    if needed < 0.85 * there:
        return "yes"
    return "perhaps" if needed < 1.1 * there else "no"


def span(low: float, high: float) -> str:
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def make_parser() -> argparse.ArgumentParser:
    parser = generate_replies.make_parser()
    parser.description = __doc__.split("\n")[0]
    option = parser.add_argument
    of_config = "what would be trained, one after the other: of axolotl_configs, or a YAML"
    option("--config", nargs="+", default=[CONFIG], help=of_config)
    option("--method", help="preset of axolotl_configs/methods.yaml in the place of its own method")
    prices = "what a card costs you, one price or lowest and highest (default: cards.yaml)"
    option("--usd-per-hour", type=not_negative, nargs="+", metavar="USD", help=prices)
    of_peak = "what the card reaches of its peak while it works"
    option("--peak-share", type=share, default=PEAK_SHARE, help=of_peak)
    lengths = "mean of the training texts, where there are no extracts (default: their window's)"
    option("--text-tokens", type=positive, help=lengths)
    return parser


def resolve_configs(names: list[str], overlay: Overlay) -> list[RunConfig]:
    """The configs of a plan, all of one base. Raises UserError."""
    configs = [resolve_config(name, overlay) for name in names]
    if len({config.name for config in configs}) < len(configs):
        raise UserError("--config: a name is given twice")
    if overlay.method and len(configs) > 1:
        raise UserError("--method is for one --config")
    if len({config.base_model for config in configs}) > 1:
        raise UserError("--config: they have unlike base models; plan them one by one")
    return configs


def main() -> None:
    args = make_parser().parse_args()
    task = task_of(args)
    asking = client.ask_options(args, answer_tokens=generate_replies.answer_tokens(task))
    overlay = Overlay(task=task, data=args.data, method=args.method)
    configs = resolve_configs(args.config, overlay)
    folder = data_folder(args, "extracts")
    has_extracts = (folder / "train.jsonl").is_file() or (folder / "test.jsonl").is_file()
    there = texts_in(folder) if has_extracts else default_texts(args.text_tokens)
    texts = asked_for(there, args.splits, args.limit)
    if has_extracts:
        lacking = generate_replies.lacking_requests(generate_replies.reply_options(args), asking)
    else:
        print(f"No extracts in {folder}: reckoned with what `just extracts` makes by default,")
        for split, of_split in texts.items():
            print(f"  {split}: {of_split.number:,} texts of {of_split.tokens:,.0f} tokens")
        print()
        lacking = {n: stand_in_requests(task, n, texts) for n in range(task.answers, 0, -1)}
    table = generate_replies.price_table(lacking, asking)
    how = generate_replies.explain_plan(task, asking)
    print(f"The teacher's replies:\n\n{markdown(table)}\n{how}")
    answers = 1 if args.single else task.answers
    price = price_of(asking.model, asking.price, asking.batch)
    usd = estimate_usd(lacking[answers], price, asking.answer_tokens)
    unseen = left_over(there, args.splits, args.limit)
    plan = GpuPlan(configs, texts, unseen, args.peak_share)
    print(f"\nThe GPU:\n\n{markdown(plan.table(args.usd_per_hour, usd))}\n{plan.explain()}")
    if usd is not None:
        print(f"replies: of {asking.model}, {answers} a reply: ${usd:.2f}")


if __name__ == "__main__":
    run(main)
