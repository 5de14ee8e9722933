"""Show the scores of a run: tables, plots and one self-contained page; record them in the ledger.

Reads outputs/RUN/eval/scores.json, the answers and, where it is of them, judge.json; writes
scores.md, plots/*.png and report.html beside it (no network, every text escaped) and prints the
chief tables. With --record the scores are added to results/ledger.csv, a line a figure.

    python -m eval.build_report smollm2-135m-dpo-sft-lora --record "just demo"
"""

import argparse
import base64
import json
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.cli import run, script_parser
from common.files import replacing, write_text
from common.report import drawing, format_interval, markdown
from eval.score_answers import COMPARED, MORE_TITLES, TITLES, load_evaluation
from prompts import Task
from training.run_config import RunConfig, load_run_config

LEDGER = Path("results/ledger.csv")
DECIMALS = {"words": 1, "compression": 1, "empty": 0, "stopped_at_limit": 0, "documents_cut": 0}
DECIMALS["over_512_tokens"] = 0
PLOTS = {"differences.png": "Differences with their intervals", "lengths.png": "Score by length"}


def chief(scores: dict) -> str:
    """The measure that the example and the plots go by."""
    measured = next(iter(scores["systems"].values()))
    return next(m for m in (*COMPARED, "words") if m in measured)


def score_table(scores: dict, task: Task, titles: dict[str, str]) -> pd.DataFrame:
    """Systems by measures, formatted."""
    frame = pd.DataFrame(scores["systems"])
    frame = frame.loc[[measure for measure in titles if measure in frame.index]].T
    frame = frame.apply(lambda column: column.map(f"{{:.{DECIMALS.get(column.name, 3)}f}}".format))
    frame = frame.rename(index=task.title, columns=titles).assign(n=scores["n"])
    return frame.rename_axis("system")


def difference_table(scores: dict, task: Task, measures: dict[str, str]) -> pd.DataFrame:
    """The target's gains over the other systems with their intervals."""
    frame = pd.DataFrame(scores["differences"]).map(lambda gain: format_interval(*gain))
    frame = frame.loc[[measure for measure in measures if measure in frame.index]].T
    target = task.title(scores["target"])
    names = [f"{target} minus {task.title(other)}" for other in frame.index]
    return frame.rename(columns=measures).set_axis(names).rename_axis("difference [95% interval]")


def table(scores: dict, task: Task) -> str:
    """The chief scores and differences as Markdown."""
    compared = {measure: TITLES[measure] for measure in COMPARED}
    frames = score_table(scores, task, TITLES), difference_table(scores, task, compared)
    return "\n\n".join([*map(markdown, frames), small_n(scores)]).strip()


def small_n(scores: dict) -> str:
    n = scores["n"]
    return f"n is {n}: under 30, read the intervals with care." if n < 30 else ""


def example(scores: dict, rows: list[dict], answers: dict[str, dict], task: Task) -> str:
    """The text whose gain over the second system is the median one, with every answer under it."""
    values = pd.DataFrame({s: found[chief(scores)] for s, found in scores["per_text"].items()})
    gains = values[scores["target"]] - values.iloc[:, min(1, len(values.columns) - 1)]
    row = rows[gains.argsort().iloc[len(gains) // 2]]
    parts = [f"The text of median gain ({row['id']}):", row["text"]]
    parts += ["-- reference (teacher)", row["reference"]]
    for system, records in answers.items():
        parts += [f"-- {task.title(system)}", records[row["id"]]["text"]]
    return "\n\n".join(parts)


def draw_plots(scores: dict, task: Task, folder: Path) -> None:
    """Write the files of PLOTS."""
    gains, measure = scores["differences"], chief(scores)
    with drawing(folder / "differences.png", (6, 1 + 0.45 * len(gains))) as axes:
        for place, other in enumerate(gains):
            mean, low, high = gains[other][measure]
            reach = [[max(0, mean - low)], [max(0, high - mean)]]
            axes[0, 0].errorbar(mean, place, xerr=reach, fmt="o", capsize=4)
        axes[0, 0].set_yticks(range(len(gains)), [f"minus {task.title(other)}" for other in gains])
        axes[0, 0].axvline(0, color="grey", linewidth=0.8)
        axes[0, 0].set_xlabel(f"gain of {scores['target']} in {measure}, 95%, n = {scores['n']}")
    with drawing(folder / "lengths.png", (6, 4)) as axes:
        for system, values in scores["per_text"].items():
            points = values["words"], values[measure]
            axes[0, 0].scatter(*points, s=12, alpha=0.6, label=task.title(system))
        axes[0, 0].set(xlabel="words of the answer", ylabel=measure)
        axes[0, 0].legend(fontsize=8)


def write_report(
    folder: Path, scores: dict, rows: list[dict], answers: dict[str, dict], task: Task
) -> None:
    """Write scores.md, the plots and report.html into `folder`."""
    draw_plots(scores, task, folder / "plots")
    more, everything = score_table(scores, task, MORE_TITLES), TITLES | MORE_TITLES
    differences = difference_table(scores, task, everything).T.rename_axis("measure")
    parts = [f"# {scores['settings']['config']}", table(scores, task), markdown(more)]
    parts += [markdown(differences), f"```json\n{json.dumps(scores['settings'], indent=1)}\n```"]
    parts += [example(scores, rows, answers, task)]
    write_text(folder / "scores.md", "\n\n".join(parts) + "\n")
    path = folder / "judge.json"
    verdicts = json.loads(path.read_text()) if path.exists() else {}
    current = verdicts.get("generation") == scores["settings"]["generation"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    compared = {measure: TITLES[measure] for measure in COMPARED}
    shown = [score_table(scores, task, TITLES), difference_table(scores, task, compared)]
    page = environment.get_template("report.html.jinja").render(
        scores=scores,
        rows=rows,
        answers=answers,
        tables=[frame.reset_index() for frame in (*shown, more, differences)],
        small_n=small_n(scores),
        images={
            caption: base64.b64encode((folder / "plots" / name).read_bytes()).decode()
            for name, caption in PLOTS.items()
        },
        values={system: found[chief(scores)] for system, found in scores["per_text"].items()},
        task=task,
        verdicts=verdicts if current else None,
    )
    write_text(folder / "report.html", page)


def append_ledger(lines: list[tuple], about: dict, ledger: Path = LEDGER) -> None:
    """Add lines (system, measure, value, low, high) to the ledger; `about`: date, commit, config,
    command, encoder and n."""
    frame = pd.DataFrame(lines, columns=["system", "metric", "value", "low", "high"]).round(3)
    frame = frame.assign(**about)[[*about, *frame]]
    old = [pd.read_csv(ledger, dtype=str)] if ledger.exists() else []
    with replacing(ledger) as temporary:
        pd.concat([*old, frame]).to_csv(temporary, index=False)
    print(f"recorded in {ledger}")


def record(scores: dict, command: str, ledger: Path) -> None:
    """Add a run's scores to the ledger: a line for each mean, then one for each difference."""
    lines = []
    for system, values in scores["systems"].items():
        lines += [(system, m, values[m], None, None) for m in (*COMPARED, "words") if m in values]
    for other, gains in scores["differences"].items():
        lines += [(f"{scores['target']} - {other}", m, *gains[m]) for m in COMPARED if m in gains]
    about = {key: scores["settings"][key] for key in ("date", "commit", "config")}
    about |= {"command": command, "encoder": scores["settings"]["hash"], "n": scores["n"]}
    append_ledger(lines, about, ledger)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--record", metavar="NOTE", help="add the scores to the ledger, with this note")
    option("--ledger", type=Path, default=LEDGER, help="file of all runs")


def report(config: RunConfig, note: str | None, ledger: Path) -> None:
    """Write a scored run's files, print the chief tables and an example, record the scores."""
    scores, rows, answers = load_evaluation(config)
    write_report(config.eval_dir, scores, rows, answers, config.task)
    print(f"\n{table(scores, config.task)}\n\n{example(scores, rows, answers, config.task)}\n")
    settings = f"BERTScore by {scores['settings']['hash']}; ROUGE stemmed"
    print(f"{settings}; more in {config.eval_dir / 'report.html'}")
    if note is not None:
        record(scores, note, ledger)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    add_report_options(parser)
    args = parser.parse_args()
    report(load_run_config(args.config), args.record, args.ledger)


if __name__ == "__main__":
    run(main)
