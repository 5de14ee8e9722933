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
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import orjson
import pandas as pd
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import is_made, mark_made, write_records, write_text
from common.report import drawing, markdown
from data_prep.count_tokens import load_counter
from data_prep.find_duplicates import Duplicates
from data_prep.read_blocks import draw_units, expand_paths, file_size, subset_of
from data_prep.select_extracts import Counts, load_counts, run_task

RED_PAJAMA = ["https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"]  # lists 2,084 files
NO_EFFECT = ("executor", "tasks", "workers", "retries", "partition", "time")  # on the extracts
ROWS = ("documents", "MB", "dropped", "test", "train")  # the report's order
FIELDS = {"n_tokens": "tokens", "n_chars": "characters"}


def make_settings(options: argparse.Namespace) -> dict:
    """What the extracts depend on: options, and the sizes and times of local files."""
    settings = {k: str(v) for k, v in vars(options).items() if k not in NO_EFFECT}
    local = [path for path in options.input if "://" not in path]
    files = expand_paths(local, 0) if local else []
    states = {path: Path(path).stat() for path in files if Path(path).exists()}
    return settings | {"files": {p: [s.st_size, s.st_mtime_ns] for p, s in states.items()}}


def make_plan(options: argparse.Namespace, settings: dict, work: Path) -> dict:
    """{settings, units, tasks}, kept in `work`/plan.json; a run begun there keeps its tasks."""
    load_counter(options.tokenizer)  # fails before anything is transferred
    wanted = {*options.sources, "other"}
    paths = expand_paths(options.input, options.retries)
    paths = [path for path in paths if not options.sources or subset_of(path) in wanted]
    paths = tqdm(paths, desc="sizes of the files", unit="file")
    units = draw_units(
        [(path, file_size(path, options.retries)) for path in paths], options.fraction, options.seed
    )
    plan = {"settings": settings, "units": units, "tasks": min(options.tasks, len(units) or 1)}
    path, plan = work / "plan.json", json.loads(json.dumps(plan))
    if path.exists():
        begun = json.loads(path.read_bytes())
        if begun | {"tasks": 0} != plan | {"tasks": 0}:
            raise UserError(f"{work} holds a run begun with other settings or input; delete it")
        return begun
    write_text(path, json.dumps(plan))
    return plan


def make_executor(options: argparse.Namespace, **common):
    """datatrove's executor of that name. Raises UserError where it is not to be had."""
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split()])
    if options.executor == "slurm":
        if not shutil.which("sbatch"):
            raise UserError("sbatch is not found; run --executor slurm where slurm takes jobs")
        from datatrove.executor.slurm import SlurmPipelineExecutor

        # `just` activates no environment, and a job starts with a command of datatrove's.
        commands = shlex.quote(str(Path(sys.executable).parent))
        where = {"time": options.time, "partition": options.partition}
        where |= {"env_command": f"export PATH={commands}:$PATH"}
        return SlurmPipelineExecutor(**common, **where, mail_type="NONE", qos=None)
    from datatrove.executor.local import LocalPipelineExecutor
    from multiprocess import forkserver

    # What is forked from here on ignores Ctrl-C: the parent alone answers, and ends the others.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    return LocalPipelineExecutor(**common)


def show_progress(completions: Path, tasks: int, stop: threading.Event) -> None:
    """Follow datatrove's marks of complete tasks until `stop`."""
    with tqdm(desc="reading", total=tasks, unit="task") as bar:
        ended = False
        while not ended:
            ended = stop.wait(0.5)
            bar.update(len(list(completions.glob("*"))) - bar.n)


def run_tasks(options: argparse.Namespace, plan: dict, work: Path) -> None:
    """Run the tasks that are not yet complete. Raises UserError if any is left."""
    tasks, logs, stop = plan["tasks"], work / "logs", threading.Event()
    executor = make_executor(
        options,
        pipeline=[partial(run_task, units=plan["units"], options=options, work=work)],
        tasks=tasks,
        workers=min(options.workers, tasks),
        logging_dir=str(logs),
    )
    watcher = threading.Thread(target=show_progress, args=(logs / "completions", tasks, stop))
    watcher.start()
    try:
        executor.run()
    finally:
        stop.set()
        watcher.join()
    if left := len(executor.get_incomplete_ranks(skip_completed=True)):
        then = "are with slurm" if options.executor == "slurm" else f"failed, see {logs}"
        raise UserError(f"{left} of {tasks} tasks {then}; afterwards run the same again")


def index_candidates(folder: Path) -> dict[str, list[tuple]]:
    """For each split where its candidates are, in seeded order: (order, source, path, offset).

    Some 250 bytes a candidate, where the texts of all might not fit into memory.
    """
    found = {"test": [], "train": []}
    for path in sorted(folder.glob("*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                one = orjson.loads(line)
                place = (one["order"], sys.intern(one["source"]), path, offset)
                found[one["split"]].append(place)
                offset += len(line)
    return {split: sorted(places) for split, places in found.items()}


def read_candidate(path: Path, offset: int) -> dict:
    with path.open("rb") as file:
        file.seek(offset)
        return orjson.loads(file.readline())


def choose(work: Path, options: argparse.Namespace, counts: Counts) -> dict[str, list[dict]]:
    """The first candidates of each split that repeat nothing kept before, up to the caps."""
    counter, duplicates, ids, splits = load_counter(options.tokenizer), Duplicates(), set(), {}
    cap = options.max_per_source or sys.maxsize
    for split, places in index_candidates(work / "candidates").items():
        kept, per_source = [], Counter()
        for _, source, path, offset in tqdm(places, desc=f"choosing for {split}", unit="document"):
            if len(kept) == getattr(options, split) or per_source[source] == cap:
                counts[source, f"{split} dropped: over the cap"] += 1
                continue
            one = read_candidate(path, offset)
            repeated = "repeated document" if one["id"] in ids else duplicates.reason(one["text"])
            if repeated:
                counts[source, f"{split} dropped: {repeated}"] += 1
                continue
            counts[source, f"{split} kept"] += 1
            per_source[source] += 1
            ids.add(one["id"])
            tokens = one.get("n_tokens") or counter.count(one["text"])
            lengths = {"n_chars": len(one["text"]), "n_tokens": tokens}
            kept.append({k: one[k] for k in ("id", "source", "url", "text")} | lengths)
        if split == "test":  # chosen first, for long documents are the rarer
            duplicates.forbid_runs(extract["text"] for extract in kept)
        splits[split] = kept
    return splits


def plot_lengths(splits: dict[str, list[dict]], path: Path) -> None:
    sources = sorted({extract["source"] for split in splits.values() for extract in split})
    with drawing(path, (10, 7), 2, 2) as axes:
        for row, (split, extracts) in zip(axes, splits.items(), strict=True):
            for panel, (field, unit) in zip(row, FIELDS.items(), strict=True):
                lengths = [[e[field] for e in extracts if e["source"] == s] for s in sources]
                panel.hist(lengths, bins=20, stacked=True, label=sources)
                panel.set(xlabel=unit, ylabel="extracts", title=f"{split}, n {len(extracts):,}")
            row[0].legend()


def place_of(row: str) -> tuple[int, str]:
    """Where a row stands in the report."""
    return next((i for i, start in enumerate(ROWS) if row.startswith(start)), len(ROWS)), row


def write_report(folder: Path, splits: dict, counts: Counts, facts: dict) -> None:
    """Write report.json, report.md and lengths.png, and print the table."""
    table = defaultdict(Counter)
    for (source, row), number in counts.items():
        table[source][row] += number
        table["all"][row] += number
    rows = sorted(table["all"], key=place_of)
    sources = sorted(table, key=lambda source: (source == "all", source))
    numbers = {s: {row: round(table[s][row], 2) for row in rows} for s in sources}
    write_text(folder / "report.json", json.dumps({**facts, "sources": numbers}, indent=1) + "\n")
    text = markdown(pd.DataFrame(numbers, dtype=object).map("{:,}".format))
    notes = f"{facts['MB drawn']:,.1f} MB drawn, {facts['seconds']:,.0f} seconds"
    write_text(folder / "report.md", f"{text}\n\n{notes}\n")
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
    option("--source-name", default="other", help="source of records that are not RedPajama's")
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
    option("--executor", choices=("local", "slurm"), default="local", help="datatrove's")
    option("--tasks", type=positive, default=64, help="what a kill can lose: one task a worker")
    option("--workers", type=positive, default=os.cpu_count(), help="tasks at a time")
    option("--retries", type=int, default=6, help="of a transfer over HTTP that fails")
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
    settings, work = make_settings(options), output / "unfinished"
    if is_made(output, settings):
        print(f"{options.output} is done with these settings; delete it to sample again")
        return
    if any(output.glob("*.jsonl")) and not work.exists():
        raise UserError(f"{options.output} was made with other settings or input; delete it")
    plan = make_plan(options, settings, work)
    run_tasks(options, plan, work)
    counts = load_counts(work)
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
