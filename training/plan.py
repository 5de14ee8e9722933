"""What a run would cost before it starts: the teacher's replies, and a GPU's hours and dollars.

Reads DATA/extracts and the config; without extracts it reckons with as many and as long ones as
`just extracts` makes by default. Asks nothing and writes nothing. What it says of GPUs is an
estimate by a formula that it prints (training/estimate.py).

    python -m training.plan --config qwen2-1.5b-dpo-sft-qlora --usd-per-hour 0.6
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from common.cli import not_negative, positive, run, share
from common.stats import markdown
from data_prep import generate_replies, sample_extracts
from data_prep.load_extracts import load_extracts
from data_prep.teacher import client
from data_prep.teacher.prices import BYTES_A_TOKEN, REPLY_TOKENS
from data_prep.teacher.teacher_prompts import TeacherPrompts
from prompts.task import Task, data_folder, task_of
from training.config import Overlay, RunConfig, resolve_config
from training.estimate import (
    PEAK_SHARE,
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


def plan_gpu(
    config: RunConfig, texts: dict[str, Texts], prices: list[float] | None, peak_share: float
) -> tuple[pd.DataFrame, str]:
    """(hours and dollars of each card, how they were reckoned). Raises UserError."""
    shape = shape_of(config.base_model, config.base_revision)
    train, test, task = texts["train"], texts["test"], config.task
    training = training_of(config, train.number, train.tokens + PROMPT_TOKENS, REPLY_TOKENS[1])
    evaluation = Evaluation(
        texts=test.number,
        tokens=min(test.tokens + PROMPT_TOKENS, MOST_PROMPT_TOKENS),
        systems=len([name for name in task.systems if name != "lead"]),
        new_tokens=task.max_new_tokens,
    )
    rows = {}
    needs = memory_gb(shape, training)
    for name, card in load_cards().items():
        seconds = [
            training_seconds(shape, training, card, peak_share),
            answer_seconds(shape, evaluation, card, peak_share),
            score_seconds(evaluation, card, peak_share),
        ]
        low, high = (prices[0], prices[-1]) if prices else card.usd_per_hour
        hours = sum(seconds) / 3600
        rows[name] = {
            "training": f"{seconds[0] / 3600:.1f} h",
            "answers": f"{seconds[1] / 3600:.1f} h",
            "scores": f"{seconds[2] / 3600:.1f} h",
            "all": f"{hours:.1f} h",
            "$ an hour": span(low, high),
            "$": span(low * hours, high * hours),
            f"holds its {needs:.0f} GB": holds(needs, card.gb),
        }
    return pd.DataFrame.from_dict(rows, orient="index"), explain_gpu(
        shape, training, evaluation, peak_share
    )


def holds(needed: float, there: float) -> str:
    if needed < 0.85 * there:
        return "yes"
    return "perhaps" if needed < 1.1 * there else "no"


def span(low: float, high: float) -> str:
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def explain_gpu(shape: Shape, training: Training, evaluation: Evaluation, peak_share: float) -> str:
    return (
        "An estimate: nobody has measured it on these cards (`just bench gpu` does).\n"
        f"{explain(shape, training, peak_share)}\n"
        f"answers: {evaluation.texts:,} documents of {evaluation.tokens:,.0f} tokens x "
        f"{evaluation.systems} systems x {evaluation.new_tokens} tokens, one at a time; "
        "scores: the encoder in 32 bits\n"
        f"memory: of rows as long as sequence_len, {training.longest:,} tokens; most of it logits"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = generate_replies.make_parser()
    parser.description = __doc__.split("\n")[0]
    option = parser.add_argument
    option("--config", default=CONFIG, help="what would be trained: of axolotl_configs, or a YAML")
    option("--method", help="preset of axolotl_configs/methods.yaml in the place of its own method")
    prices = "what a card costs you, one price or lowest and highest (default: cards.yaml)"
    option("--usd-per-hour", type=not_negative, nargs="+", metavar="USD", help=prices)
    of_peak = "what the card reaches of its peak while it works"
    option("--peak-share", type=share, default=PEAK_SHARE, help=of_peak)
    lengths = "mean of the training texts, where there are no extracts (default: their window's)"
    option("--text-tokens", type=positive, help=lengths)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    task, asking = task_of(args), client.ask_options(args)
    config = resolve_config(args.config, Overlay(task=task, data=args.data, method=args.method))
    folder = data_folder(args, "extracts")
    if (folder / "train.jsonl").is_file() or (folder / "test.jsonl").is_file():
        texts = asked_for(texts_in(folder), args.splits, args.limit)
        table = generate_replies.plan(generate_replies.reply_options(args), asking)
    else:
        texts = asked_for(default_texts(args.text_tokens), args.splits, args.limit)
        print(f"No extracts in {folder}: reckoned with what `just extracts` makes by default,")
        for split, of_split in texts.items():
            print(f"  {split}: {of_split.number:,} texts of {of_split.tokens:,.0f} tokens")
        print()
        lacking = {n: stand_in_requests(task, n, texts) for n in range(task.answers, 0, -1)}
        table = generate_replies.price_table(lacking, asking)
    print(f"The teacher's replies:\n\n{markdown(table)}\n{generate_replies.explain_plan(task)}")
    table, how = plan_gpu(config, texts, args.usd_per_hour, args.peak_share)
    print(f"\nThe GPU, {config.name}:\n\n{markdown(table)}\n{how}")


if __name__ == "__main__":
    run(main)
