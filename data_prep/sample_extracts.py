"""Sample extracts for training and documents for testing from RedPajama, 1% of it by default.

Reads JSON Lines or Parquet records {"text", "meta"} from files, globs, URLs, or .txt lists of such.
Writes data/extracts/{train,test}.jsonl: documents in the token window for training and in the
character window for testing, English, clean, no near duplicates, in a seeded order; report.md,
report.json, lengths.png beside them. datatrove runs the tasks: kills and workers change nothing.

    python -m data_prep.sample_extracts --fraction 0.001 --sources wikipedia --max-per-source 3000
"""

import argparse
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import orjson
from loguru import logger
from tabulate import tabulate
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import is_made, mark_made, replacing, write_records
from data_prep.clean_documents import SelectExtracts, load_counter
from data_prep.find_duplicates import Duplicates
from data_prep.read_blocks import RangeFile, ReadBlocks, draw_units, expand_paths, subset_of

RED_PAJAMA = ["https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"]  # lists 2,084 files
WAYS = ("executor", "tasks", "workers", "retries", "partition", "time")  # of no effect on extracts
ROWS = ("documents", "MB", "seconds", "mended", "dropped", "test", "train")  # of the report
FIELDS = {"n_tokens": "tokens", "n_chars": "characters"}
INDEX = [("split", "S5"), ("order", "S32"), ("source", "S16"), ("file", "u4"), ("offset", "u8")]


def make_plan(options: argparse.Namespace, settings: dict, work: Path) -> dict:
    """{settings, units, tasks}, kept in `work`/plan.json; a run begun there keeps its tasks."""
    load_counter(options.tokenizer)  # fails before anything is transferred
    wanted = {*options.sources, "other"} if options.sources else {}
    paths = expand_paths(options.input, options.retries)
    paths = [path for path in paths if not wanted or subset_of(path) in wanted]
    paths = tqdm(paths, desc="sizes of the files", unit="file")
    sizes = [(path, RangeFile(path, retries=options.retries).size) for path in paths]
    units = draw_units(sizes, options.fraction, options.seed)
    plan = {"settings": settings, "units": units, "tasks": min(options.tasks, len(units) or 1)}
    path, plan = work / "plan.json", json.loads(json.dumps(plan))
    if path.exists():
        begun = json.loads(path.read_bytes())
        if begun | {"tasks": 0} != plan | {"tasks": 0}:
            raise UserError(f"{work} holds a run begun with other settings or input; delete it")
        return begun
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan))
    return plan


def make_executor(options: argparse.Namespace, **common):
    """datatrove's executor of that name. Raises UserError where it is not to be had."""
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split()])
    if options.executor == "slurm":
        if not shutil.which("sbatch"):
            raise UserError("sbatch is not found; run --executor slurm where slurm takes jobs")
        from datatrove.executor.slurm import SlurmPipelineExecutor

        where = {"time": options.time, "partition": options.partition}
        return SlurmPipelineExecutor(**common, **where, mail_type="NONE", qos=None)
    if options.executor == "ray":
        try:
            import ray
        except ImportError:
            raise UserError("no ray here; pip install -r requirements-ray.txt") from None
        from datatrove.executor.ray import RayPipelineExecutor

        cores = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": options.workers}
        found = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
        ray.init(runtime_env=found, log_to_driver=False, logging_level="ERROR", **cores)
        return RayPipelineExecutor(**common, mem_per_cpu_gb=1)
    from datatrove.executor.local import LocalPipelineExecutor
    from multiprocess import forkserver

    # What is forked from here on ignores Ctrl-C: the parent alone answers, and ends the others.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    return LocalPipelineExecutor(**common)


def run_tasks(options: argparse.Namespace, plan: dict, work: Path) -> None:
    """Run the tasks that are not yet complete. Raises UserError if any is left."""
    from datatrove.pipeline.writers import JsonlWriter

    progress = work / "progress"
    progress.mkdir(exist_ok=True)
    logger.disable("datatrove")
    steps = [
        ReadBlocks(plan["units"], options, progress),
        SelectExtracts(options),
        JsonlWriter(str(work / "candidates"), "${rank}.jsonl", None, expand_metadata=True),
    ]
    tasks, logs = plan["tasks"], str(work / "logs")
    ways = {"tasks": tasks, "workers": min(options.workers, tasks), "logging_dir": logs}
    executor = make_executor(options, pipeline=steps, **ways)
    stop, total = threading.Event(), sum(end - start for _, _, start, end in plan["units"])

    def watch() -> None:
        with tqdm(desc="reading", total=total, unit="B", unit_scale=True) as bar:
            ended = False
            while not ended:
                ended = stop.wait(0.5)
                bar.update(sum(int(p.read_text() or 0) for p in progress.iterdir()) - bar.n)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        executor.run()
    finally:
        stop.set()
        watcher.join()
    if left := len(executor.get_incomplete_ranks(skip_completed=True)):
        then = "are with slurm" if options.executor == "slurm" else f"failed, see {work}/logs"
        raise UserError(f"{left} of {plan['tasks']} tasks {then}; afterwards run the same again")


def task_counts(work: Path) -> Counter:
    """The tasks' statistics named source|row, added up."""
    counts = Counter()
    steps = (s for p in (work / "logs/stats").glob("*.json") for s in json.loads(p.read_bytes()))
    for label, number in (pair for step in steps for pair in step["stats"].items()):
        if "|" in label:
            counts[label] += number["total"] if isinstance(number, dict) else number
    return counts


def index_candidates(paths: list[Path]) -> dict[str, np.ndarray]:
    """For each split where its candidates are, in seeded order; 60 bytes a candidate."""
    parts = [np.empty(0, INDEX)]
    for number, path in enumerate(paths):
        rows, offset = [], 0
        with path.open("rb") as file:
            for line in file:
                one = orjson.loads(line)
                names = (one["split"].encode(), one["order"].encode(), one["source"].encode())
                rows.append((*names, number, offset))
                offset += len(line)
        parts.append(np.array(rows, INDEX))
    found = np.sort(np.concatenate(parts))
    return {split: found[found["split"] == split.encode()] for split in ("test", "train")}


def choose(work: Path, options: argparse.Namespace, counts: Counter) -> dict[str, list[dict]]:
    """The first candidates of each split that repeat nothing kept before, up to the caps."""
    counter, duplicates, ids = load_counter(options.tokenizer), Duplicates(), set()
    paths, splits = sorted((work / "candidates").glob("*.jsonl")), {}
    for split, rows in index_candidates(paths).items():
        kept, per_source, done = [], Counter(), 0
        for row in tqdm(rows, desc=f"choosing for {split}", unit="document"):
            if len(kept) == getattr(options, split):
                break
            done += 1
            with paths[row["file"]].open("rb") as file:
                file.seek(row["offset"])
                one = orjson.loads(file.readline())
            if per_source[one["source"]] == options.max_per_source:
                reason = "over the cap"
            elif one["id"] in ids:
                reason = "repeated document"
            else:
                reason = duplicates.reason(one["text"])
            counts[f"{one['source']}|{split} " + (f"dropped: {reason}" if reason else "kept")] += 1
            if reason:
                continue
            ids.add(one["id"])
            per_source[one["source"]] += 1
            tokens = one.get("n_tokens") or counter.count(one["text"])
            lengths = {"n_chars": len(one["text"]), "n_tokens": tokens}
            kept.append({k: one[k] for k in ("id", "source", "url", "text")} | lengths)
        for source, number in Counter(rows["source"][done:].tolist()).items():
            counts[f"{source.decode()}|{split} dropped: over the cap"] += number
        if split == "test":  # chosen first, for long documents are the rarer
            duplicates.forbid_runs(extract["text"] for extract in kept)
        splits[split] = kept
    return splits


def plot_lengths(splits: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    sources = sorted({extract["source"] for split in splits.values() for extract in split})
    for axes, (split, extracts) in zip(figure.subplots(2, 2), splits.items(), strict=True):
        for panel, (field, unit) in zip(axes, FIELDS.items(), strict=True):
            lengths = [[e[field] for e in extracts if e["source"] == s] for s in sources]
            panel.hist(lengths, bins=20, stacked=True, label=sources)
            panel.set(xlabel=unit, ylabel="extracts", title=f"{split}, n {len(extracts):,}")
        axes[0].legend()
    figure.savefig(path, dpi=100)


def write_report(folder: Path, splits: dict, counts: Counter, facts: dict) -> None:
    """Write report.json, report.md and lengths.png, and print the table."""
    table = defaultdict(dict)
    for label, number in counts.items():
        source, row = label.split("|")
        table[source][row] = table[source].get(row, 0) + number
        table["all"][row] = table["all"].get(row, 0) + number
    for column in table.values():
        if column.get("seconds"):
            column["MB a second"] = column["MB transferred"] / column["seconds"]
        column |= {row: round(number, 2) for row, number in column.items()}
    (folder / "report.json").write_text(json.dumps({**facts, "sources": table}, indent=1) + "\n")
    sources = sorted(table, key=lambda source: (source == "all", source))
    names = sorted(table["all"], key=lambda row: (ROWS.index(re.match(r"\w+", row)[0]), row))
    rows = [[name, *(f"{table[s].get(name, 0):,}" for s in sources)] for name in names]
    text = tabulate(rows, ["", *sources], "pipe", colalign=["left", *["right"] * len(sources)])
    notes = f"{facts['MB drawn']:,.1f} MB drawn, {facts['seconds']:,.0f} seconds"
    (folder / "report.md").write_text(f"{text}\n\n{notes}\n")
    plot_lengths(splits, folder / "lengths.png")
    print(f"{text}\n{notes}; see {folder}/report.md and lengths.png")


def fraction(text: str) -> float:
    """A number over 0 and up to 1, for argparse."""
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and up to 1")
    return number


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--input", nargs="+", default=RED_PAJAMA, help="files, globs, URLs, .txt lists of them")
    option("--fraction", type=fraction, help="to read: 0.01 of RedPajama, all of another --input")
    option("--sources", nargs="+", help="arxiv wikipedia stackexchange, all of another --input")
    option("--output", type=Path, default=Path("data/extracts"), help="folder")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: id or folder")
    option("--min-tokens", type=int, default=900, help="train: more than this")
    option("--max-tokens", type=int, default=1800, help="train: fewer than this")
    option("--min-chars", type=int, default=16_000, help="test: at least this")
    option("--max-chars", type=int, default=100_000, help="test: at most this")
    option("--train", type=positive, default=20_500, help="at most so many training extracts")
    option("--test", type=positive, default=200, help="at most so many test documents")
    option("--max-per-source", type=positive, help="at most so many of a source in each split")
    option("--passages", action="store_true", help="cut documents at paragraphs into the windows")
    option("--test-share", type=float, default=0.3, help="with --passages: documents for test")
    option("--seed", type=int, default=0, help="draws, orders and splits")
    option("--executor", choices=("local", "slurm", "ray"), default="local", help="datatrove's")
    option("--tasks", type=positive, default=16, help="what a kill can lose: one task a worker")
    option("--workers", type=positive, default=os.cpu_count(), help="tasks at a time")
    option("--retries", type=int, default=6, help="of a failed transfer, with growing pauses")
    option("--partition", default="cpu", help="with slurm")
    option("--time", default="04:00:00", help="with slurm: limit of a task")
    options = parser.parse_args(arguments)
    ours = options.input == RED_PAJAMA
    options.fraction = options.fraction or (0.01 if ours else 1.0)
    options.sources = options.sources or (["arxiv", "wikipedia", "stackexchange"] if ours else [])
    return options


def main() -> None:
    options = parse_options()
    output, started = options.output.absolute(), time.monotonic()
    settings = {k: str(v) for k, v in vars(options).items() if k not in WAYS}
    work = output / "unfinished"
    if is_made(output, settings):
        print(f"{options.output} is done with these settings; delete it to sample again")
        return
    if any(output.glob("*.jsonl")) and not work.exists():
        raise UserError(f"{options.output} was made with other settings; delete it")
    plan = make_plan(options, settings, work)
    run_tasks(options, plan, work)
    counts = task_counts(work)
    splits = choose(work, options, counts)
    if not any(splits.values()):
        shutil.rmtree(work)
        raise UserError(f"no document falls into the windows; counted: {dict(counts)}")
    for split, extracts in splits.items():
        write_records(output / f"{split}.jsonl", extracts)
    drawn = sum(end - start for _, _, start, end in plan["units"])
    facts = {"settings": settings, "MB drawn": drawn / 1e6, "seconds": time.monotonic() - started}
    write_report(output, splits, counts, facts)
    mark_made(output, settings)
    shutil.rmtree(work)


if __name__ == "__main__":
    run(main)
