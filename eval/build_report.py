"""Show the scores of a run: a sentence, tables, a plot, one self-contained page; record them.

Reads outputs/RUN/eval/scores.json, the answers and, where it is of them, judge.json; writes
scores.md, scores.png and report.html beside it (no network, every text escaped). With a note the
scores are added to results/ledger.csv. `just scores RUN` (eval/evaluate.py) runs it.
"""

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


def render(name: str, /, **variables: object) -> str:
    """A template of this folder; in HTML every text is escaped."""
    loader, html = FileSystemLoader(Path(__file__).parent), ".html." in name
    environment = Environment(loader=loader, autoescape=html, undefined=StrictUndefined)
    return environment.get_template(name).render(**variables)


def score_table(scores: dict, task: Task, titles: dict[str, str]) -> pd.DataFrame:
    """Systems by measures, formatted."""
    frame = pd.DataFrame(scores["systems"]).reindex(titles).dropna(how="all").T
    frame = frame.map(lambda value: f"{value:.3f}" if value % 1 else f"{value:.0f}")
    frame = frame.rename(index=task.title, columns=titles).assign(n=scores["n"])
    return frame.rename_axis("system")


def difference_table(scores: dict, task: Task, titles: dict[str, str]) -> pd.DataFrame:
    """The target's gains over the other systems with their intervals."""
    target, lines = task.title(scores["target"]), {}
    for other, gains in scores["differences"].items():
        shown = {titles[m]: format_interval(*gains[m]) for m in titles if m in gains}
        lines[f"{target} minus {task.title(other)}"] = shown
    return pd.DataFrame(lines).T.rename_axis("difference [95% interval]")


def chief_tables(scores: dict, task: Task) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The chief scores and differences."""
    compared = {measure: TITLES[measure] for measure in COMPARED}
    return score_table(scores, task, TITLES), difference_table(scores, task, compared)


def table(scores: dict, task: Task) -> str:
    """The chief scores and differences as Markdown."""
    few = "\n\nn is under 30: read the intervals with care." if scores["n"] < 30 else ""
    return "\n\n".join(map(markdown, chief_tables(scores, task))) + few


def draw_intervals(intervals: dict[str, tuple], label: str, path: Path, zero=False) -> None:
    """(mean, low, high) of each name, the first on top; `zero`: with a line at 0."""
    with drawing(path, (10, 1 + 0.45 * len(intervals))) as axes:
        for name, (mean, low, high) in reversed(intervals.items()):
            reach = [[max(0, mean - low)], [max(0, high - mean)]]
            axes[0, 0].errorbar(mean, name, xerr=reach, fmt="o", capsize=4)
        if zero:
            axes[0, 0].axvline(0, color="0.6", linewidth=1)
        axes[0, 0].set_xlabel(f"{label}; bars: 95% interval")


def write_report(
    folder: Path, scores: dict, rows: list[dict], answers: dict[str, dict], task: Task
) -> None:
    """Write scores.md, scores.png and report.html into `folder`."""
    more, everything = score_table(scores, task, MORE_TITLES), TITLES | MORE_TITLES
    gained = difference_table(scores, task, everything).T
    more = [more, gained.rename_axis("difference [95% interval]").rename_axis(columns=None)]
    measured, target = scores["per_text"], scores["target"]
    chief = next(measure for measure in (*COMPARED, "words") if measure in measured[target])
    values = pd.DataFrame({system: found[chief] for system, found in measured.items()})
    gains = values[target] - values.iloc[:, min(1, len(values.columns) - 1)]
    plot, judged = folder / "scores.png", folder / "judge.json"
    intervals = {f"over {task.title(s)}": g[chief] for s, g in scores["differences"].items()}
    draw_intervals(intervals, f"gain of {task.title(target)}, {TITLES[chief]}", plot, zero=True)
    verdicts = json.loads(judged.read_text()) if judged.exists() else {}
    shown = {
        "scores": scores,
        "rows": rows,
        "answers": answers,
        "task": task,
        "table": table(scores, task),
        "more": [markdown(frame) for frame in more],
        "row": rows[gains.argsort().iloc[len(gains) // 2]],  # of median gain over the second system
        "values": values.to_dict("list"),
        "measure": chief,
        "titles": everything,
        "verdicts": verdicts,
        "current": verdicts.get("generation") == scores["settings"]["generation"],
    }
    write_text(folder / "scores.md", render("scores.md.jinja", **shown) + "\n")
    frames = *chief_tables(scores, task), *more
    tables = [frame.reset_index().to_html(border=0, index=False) for frame in frames]
    page = render("report.html.jinja", **shown, tables=tables)
    write_text(folder / "report.html", page)


def append_ledger(lines: list[tuple], about: dict, ledger: Path) -> None:
    """Add lines (system, metric, value, low, high); `about`: the columns that they share."""
    frame = pd.DataFrame(lines, columns=["system", "metric", "value", "low", "high"]).round(3)
    frame = frame.assign(**about)[[*about, *frame]]
    old = [pd.read_csv(ledger, dtype=str)] if ledger.exists() else []
    with replacing(ledger) as temporary:
        pd.concat([*old, frame]).to_csv(temporary, index=False)
    print(f"recorded in {ledger}")


def report(config: RunConfig, note: str | None, ledger: Path) -> None:
    """Write a scored run's files, print the chief tables and an example, record the scores."""
    scores, rows, answers = load_evaluation(config)
    write_report(config.eval_dir, scores, rows, answers, config.task)
    print((config.eval_dir / "scores.md").read_text().split("## More")[0])
    print(f"more in {config.eval_dir / 'report.html'}")
    lines, settings = [], scores["settings"]
    for system, values in scores["systems"].items():
        lines += [(system, m, values[m], None, None) for m in (*COMPARED, "words") if m in values]
    for other, gains in scores["differences"].items():
        lines += [(f"{scores['target']} - {other}", m, *gains[m]) for m in COMPARED if m in gains]
    about = {key: settings[key] for key in ("date", "commit", "config")} | {"command": note}
    if note is not None:
        append_ledger(lines, about | {"encoder": settings["hash"], "n": scores["n"]}, ledger)
