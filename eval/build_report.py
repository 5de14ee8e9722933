"""Show the scores of a run as tables, a plot and one self-contained page; record them.

Reads outputs/RUN/eval/scores.json, the answers and, where it is of them, judge.json; writes
scores.md, scores.png and report.html beside it (no network, every text escaped) and prints the
chief tables. With a note the scores are added to results/ledger.csv. `just scores RUN` runs it.
"""

import base64
import json
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import replacing, write_text
from common.report import drawing, format_interval, markdown
from eval.score_answers import COMPARED, MORE_TITLES, TITLES, load_evaluation
from prompts import Task
from training.run_config import RunConfig

LEDGER = Path("results/ledger.csv")
CHIEF = {measure: TITLES[measure] for measure in COMPARED}


def chief(scores: dict) -> str:
    """The measure that the example and the plot go by."""
    return next(m for m in (*COMPARED, "words") if m in scores["systems"][scores["target"]])


def score_table(scores: dict, task: Task, titles: dict[str, str]) -> pd.DataFrame:
    """Systems by measures, formatted."""
    lines = {}
    for system, values in scores["systems"].items():
        shown = {titles[measure]: values[measure] for measure in titles if measure in values}
        lines[task.title(system)] = {
            title: str(v) if isinstance(v, int) else f"{v:.3f}" if v < 10 else f"{v:.1f}"
            for title, v in shown.items()
        }
    return pd.DataFrame(lines).T.assign(n=scores["n"]).rename_axis("system")


def difference_table(scores: dict, task: Task, titles: dict[str, str]) -> pd.DataFrame:
    """The target's gains over the other systems with their intervals."""
    target, lines = task.title(scores["target"]), {}
    for other, gains in scores["differences"].items():
        shown = {titles[m]: format_interval(*gains[m]) for m in titles if m in gains}
        lines[f"{target} minus {task.title(other)}"] = shown
    return pd.DataFrame(lines).T.rename_axis("difference [95% interval]")


def tables(scores: dict, task: Task) -> list[pd.DataFrame]:
    """The chief scores and differences, then the others."""
    return [
        score_table(scores, task, TITLES),
        difference_table(scores, task, CHIEF),
        score_table(scores, task, MORE_TITLES),
        difference_table(scores, task, TITLES | MORE_TITLES).T.rename_axis("measure"),
    ]


def table(scores: dict, task: Task) -> str:
    """The chief scores and differences as Markdown."""
    n = scores["n"]
    warning = [f"n is {n}: under 30, read the intervals with care."] if n < 30 else []
    return "\n\n".join([*map(markdown, tables(scores, task)[:2]), *warning])


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


def draw_plot(scores: dict, task: Task, path: Path) -> None:
    """The differences with their intervals."""
    measure = chief(scores)
    with drawing(path, (6, 1 + 0.45 * len(scores["differences"]))) as axes:
        for other, gains in scores["differences"].items():
            mean, low, high = gains[measure]
            reach = [[max(0, mean - low)], [max(0, high - mean)]]
            axes[0, 0].errorbar(mean, f"minus {task.title(other)}", xerr=reach, fmt="o", capsize=4)
        axes[0, 0].axvline(0, color="grey", linewidth=0.8)
        axes[0, 0].set_xlabel(f"gain of {scores['target']} in {measure}, 95%, n = {scores['n']}")


def write_report(
    folder: Path, scores: dict, rows: list[dict], answers: dict[str, dict], task: Task
) -> None:
    """Write scores.md, scores.png and report.html into `folder`."""
    plot, judged = folder / "scores.png", folder / "judge.json"
    draw_plot(scores, task, plot)
    frames, settings = tables(scores, task), scores["settings"]
    parts = [f"# {settings['config']}", table(scores, task), *map(markdown, frames[2:])]
    parts += [f"```json\n{json.dumps(settings, indent=1)}\n```"]
    write_text(folder / "scores.md", "\n\n".join([*parts, example(scores, rows, answers, task)]))
    verdicts = json.loads(judged.read_text()) if judged.exists() else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        scores=scores,
        rows=rows,
        answers=answers,
        task=task,
        tables=[frame.reset_index() for frame in frames],
        plot=base64.b64encode(plot.read_bytes()).decode(),
        values={system: found[chief(scores)] for system, found in scores["per_text"].items()},
        verdicts=verdicts if verdicts.get("generation") == settings["generation"] else None,
    )
    write_text(folder / "report.html", page)


def append_ledger(lines: list[tuple], about: dict, ledger: Path) -> None:
    """Add lines (system, metric, value, low, high); `about`: the columns that they share."""
    frame = pd.DataFrame(lines, columns=["system", "metric", "value", "low", "high"]).round(3)
    old = [pd.read_csv(ledger, dtype=str)] if ledger.exists() else []
    with replacing(ledger) as temporary:
        columns = [*about, *frame]
        pd.concat([*old, frame.assign(**about)[columns]]).to_csv(temporary, index=False)
    print(f"recorded in {ledger}")


def record(scores: dict, note: str, ledger: Path) -> None:
    """Add a run's scores to the ledger: a line for each mean, then one for each difference."""
    lines, settings = [], scores["settings"]
    for system, values in scores["systems"].items():
        lines += [(system, m, values[m], None, None) for m in (*COMPARED, "words") if m in values]
    for other, gains in scores["differences"].items():
        lines += [(f"{scores['target']} - {other}", m, *gains[m]) for m in CHIEF if m in gains]
    about = {key: settings[key] for key in ("date", "commit", "config")} | {"command": note}
    append_ledger(lines, about | {"encoder": settings["hash"], "n": scores["n"]}, ledger)


def report(config: RunConfig, note: str | None, ledger: Path) -> None:
    """Write a scored run's files, print the chief tables and an example, record the scores."""
    scores, rows, answers = load_evaluation(config)
    write_report(config.eval_dir, scores, rows, answers, config.task)
    print(f"\n{table(scores, config.task)}\n\n{example(scores, rows, answers, config.task)}\n")
    settings = f"BERTScore by {scores['settings']['hash']}; ROUGE stemmed"
    print(f"{settings}; more in {config.eval_dir / 'report.html'}")
    if note is not None:
        record(scores, note, ledger)
