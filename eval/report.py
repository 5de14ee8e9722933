"""Show the scores of a run: a sentence, tables, a plot, one self-contained page; record them.

Reads outputs/RUN/eval/judge.json where it is of the answers that were scored; writes scores.md,
scores.png and report.html beside it (no network, every text escaped), and adds the scores to
results/ledger.csv. `just scores RUN` (eval/evaluate.py) runs it.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from common.cli import UserError, one_line
from common.files import locked, read_json, replacing, write_text
from common.pages import render
from common.stats import drawing, format_interval, markdown
from eval.score_answers import COMPARED, MORE_TITLES, TITLES
from prompts.task import Task

LEDGER, DIFFERENCE = Path("results/ledger.csv"), "difference [95% interval]"
ALL_TITLES = TITLES | MORE_TITLES


def tables(scores: dict, task: Task) -> list[pd.DataFrame]:
    """Chief scores, chief differences, all other scores, and all differences a row a measure."""
    measured, gained, target = {}, {}, task.title(scores["target"])
    for system, values in scores["systems"].items():
        shown = {m: f"{v:.3f}" if v % 1 else f"{v:.0f}" for m, v in values.items()}
        measured[task.title(system)] = shown | {"n": scores["n"]}
    for other, gains in scores["differences"].items():
        shown = {measure: format_interval(*gain) for measure, gain in gains.items()}
        gained[f"{target} minus {task.title(other)}"] = shown

    def part(rows: dict[str, dict], measures: Iterable[str], name: str | None) -> pd.DataFrame:
        frame = pd.DataFrame(rows).T
        frame = frame[[measure for measure in measures if measure in frame]]
        return frame.rename(columns=ALL_TITLES).rename_axis(name)

    return [
        part(measured, [*TITLES, "n"], "system"),
        part(gained, COMPARED, DIFFERENCE),
        part(measured, [*MORE_TITLES, "n"], "system"),
        part(gained, ALL_TITLES, None).T.rename_axis(DIFFERENCE),
    ]


def table(scores: dict, task: Task) -> str:
    """The chief scores and differences as Markdown."""
    few = "\n\nn is under 30: read the intervals with care." if scores["n"] < 30 else ""
    return "\n\n".join(map(markdown, tables(scores, task)[:2])) + few


def draw_intervals(intervals: dict[str, tuple], label: str, path: Path, zero=False) -> None:
    """(mean, low, high) of each name, the first on top; `zero`: with a line at 0."""
    with drawing(path, (10, 1 + 0.45 * len(intervals))) as axes:
        for name, (mean, low, high) in reversed(intervals.items()):
            reach = [[max(0, mean - low)], [max(0, high - mean)]]
            axes.errorbar(mean, name, xerr=reach, fmt="o", capsize=4)
        if zero:
            axes.axvline(0, color="0.6", linewidth=1)
        axes.set_xlabel(f"{label}; bars: 95% interval", loc="right")


def find_example(values: pd.DataFrame, target: str, task: Task) -> tuple[int, str]:
    """(place of a text to show, what it is): that of median gain of the target over the instructed
    base, or the first other system; `values` has a line a text and a column a system."""
    others = [system for system in values if system != target]
    if others:
        other = "instructed" if "instructed" in others else others[0]
        gains = values[target] - values[other]
        if gains.any():
            place = int(gains.argsort().iloc[len(gains) // 2])
            return place, f"The text of median gain over {task.title(other)}"
    return 0, "The first text"


def is_judged(verdicts: dict, settings: dict) -> bool:
    """Whether verdicts are of the very answers that were scored."""
    about = ("generation", "answers")  # 0.3.7 kept the first alone
    return bool(verdicts) and all(verdicts.get(name) == settings.get(name) for name in about)


def write_report(folder: Path, scores: dict, rows: list[dict], answers: dict, task: Task) -> None:
    """Write scores.md, scores.png and report.html into `folder`."""
    frames, measured, target = tables(scores, task), scores["per_text"], scores["target"]
    chief = next(measure for measure in (*COMPARED, "words") if measure in measured[target])
    values = pd.DataFrame({system: found[chief] for system, found in measured.items()})
    example, example_title = find_example(values, target, task)
    intervals = {f"over {task.title(s)}": g[chief] for s, g in scores["differences"].items()}
    label = f"gain of {task.title(target)}, {TITLES[chief]}"
    draw_intervals(intervals, label, folder / "scores.png", zero=True)
    verdicts = read_json(folder / "judge.json")
    shown = {"scores": scores, "rows": rows, "answers": answers, "task": task}
    shown |= {
        "table": table(scores, task),
        "more": list(map(markdown, frames[2:])),
        "tables": [frame.reset_index().to_html(border=0, index=False) for frame in frames],
        "row": rows[example],
        "example_title": example_title,
        "values": values.to_dict("list"),
        "measure": chief,
        "titles": ALL_TITLES,
        "verdicts": verdicts,
        "current": is_judged(verdicts, scores["settings"]),
    }
    write_text(folder / "scores.md", render("eval/scores.md.jinja", **shown) + "\n")
    write_text(folder / "report.html", render("eval/report.html.jinja", **shown))


def append_ledger(lines: list[tuple], about: dict, ledger: Path) -> None:
    """Add lines (system, metric, value, low, high); `about`: the columns that they share."""
    frame = pd.DataFrame(lines, columns=["system", "metric", "value", "low", "high"]).round(3)
    frame = frame.assign(**about)[[*about, *frame]]
    with locked(ledger):  # of all runs, some of which may end at the same time
        try:
            old = [pd.read_csv(ledger, dtype=str)] if ledger.exists() else []
        except ValueError as error:  # no table, or no UTF-8
            reason = f"{ledger} cannot be read as CSV ({one_line(error, 100)})"
            raise UserError(f"{reason}; mend it or move it away") from None
        with replacing(ledger) as temporary:
            pd.concat([*old, frame]).to_csv(temporary, index=False)
    print(f"recorded in {ledger}")


def record(scores: dict, note: str, ledger: Path) -> None:
    """Add a run's scores and differences to the ledger."""
    lines, settings = [], scores["settings"]
    for system, values in scores["systems"].items():
        lines += [(system, m, values[m], None, None) for m in (*COMPARED, "words") if m in values]
    for other, gains in scores["differences"].items():
        lines += [(f"{scores['target']} - {other}", m, *gains[m]) for m in COMPARED if m in gains]
    about = {key: settings[key] for key in ("date", "commit", "config")} | {"command": note}
    append_ledger(lines, about | {"encoder": settings["hash"], "n": scores["n"]}, ledger)
