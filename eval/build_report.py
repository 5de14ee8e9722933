"""Show the scores of a run: tables, an example, a plot, one self-contained page; record them.

Reads outputs/RUN/eval/scores.json, the answers and, where it is of them, judge.json; writes
scores.md, scores.png and report.html beside it (no network, every text escaped). With a note the
scores are added to results/ledger.csv. `just scores RUN` (eval/evaluate.py) runs it.
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


def chief_tables(scores: dict, task: Task) -> list[pd.DataFrame]:
    compared = {measure: TITLES[measure] for measure in COMPARED}
    return [score_table(scores, task, TITLES), difference_table(scores, task, compared)]


def table(scores: dict, task: Task) -> str:
    """The chief scores and differences as Markdown."""
    n = scores["n"]
    warning = [f"n is {n}: under 30, read the intervals with care."] if n < 30 else []
    return "\n\n".join([*map(markdown, chief_tables(scores, task)), *warning])


def draw_plot(scores: dict, task: Task, measure: str, path: Path) -> None:
    """The differences with their intervals."""
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
    more, everything = score_table(scores, task, MORE_TITLES), TITLES | MORE_TITLES
    more = [more, difference_table(scores, task, everything).T.rename_axis("measure")]
    measured = scores["systems"][scores["target"]]
    chief = next(measure for measure in (*COMPARED, "words") if measure in measured)
    values = pd.DataFrame({s: found[chief] for s, found in scores["per_text"].items()})
    gains = values[scores["target"]] - values.iloc[:, min(1, len(values.columns) - 1)]
    shared = {"scores": scores, "task": task, "answers": answers}
    text = render(
        "scores.md.jinja",
        **shared,
        table=table(scores, task),
        row=rows[gains.argsort().iloc[len(gains) // 2]],  # the median gain over the second system
        more=list(map(markdown, more)),
        settings=json.dumps(scores["settings"], indent=1),
    )
    write_text(folder / "scores.md", text + "\n")
    plot, judged = folder / "scores.png", folder / "judge.json"
    draw_plot(scores, task, chief, plot)
    verdicts = json.loads(judged.read_text()) if judged.exists() else {}
    page = render(
        "report.html.jinja",
        **shared,
        rows=rows,
        tables=[frame.reset_index() for frame in (*chief_tables(scores, task), *more)],
        plot=base64.b64encode(plot.read_bytes()).decode(),
        values=values.to_dict("list"),
        current=verdicts.get("generation") == scores["settings"]["generation"],
        verdicts=verdicts,
    )
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
