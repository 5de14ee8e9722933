"""Show the scores of a run: sentences, tables, a plot, one self-contained page; record them.

Reads outputs/RUN/eval/judge.json where it is of the answers that were scored; writes scores.md,
scores.png and report.html beside it (no network, every text escaped), and adds the scores to
results/ledger.csv. `just scores RUN` (eval/evaluate.py) runs it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import pandas as pd

from common.cli import UserError, one_line
from common.files import locked, read_json, replacing, write_text
from common.pages import render
from common.stats import drawing, markdown, paired_bootstrap
from eval.conclusion import chief_figure, conclusions, gains_in, headlines, without_cut
from eval.measures import CHIEF, COMPARED, COUNTS, FIGURES, linearize_shares
from eval.report_page import gain_picture, page_texts
from prompts.task import Task

LEDGER, DIFFERENCE = Path("results/ledger.csv"), "difference [95% interval]"
REFERENCE = "teacher (the references)"
FEW = 30  # texts, under which a reader is warned
LEAST_OF_SOURCE = 10  # texts of a source that has a line of its own


def table_of(rows: dict[str, dict], figures: Iterable[str], corner: str | None) -> pd.DataFrame:
    """A line a row, a column a figure that any row has, under the figures' titles."""
    columns = {}
    for name in figures:
        title = FIGURES[name].title if name in FIGURES else name
        if any(name in row for row in rows.values()):
            columns[title] = [row.get(name, "") for row in rows.values()]
    return pd.DataFrame(columns, index=list(rows)).rename_axis(corner)


def tables(scores: dict, task: Task) -> list[pd.DataFrame]:
    """Chief scores, chief differences, all other scores, and all differences a row a figure."""
    measured, gained = {}, {}
    figures_by_title = {task.title(system): found for system, found in scores["systems"].items()}
    if "reference" in scores:  # not in scores of 0.5.0
        figures_by_title[REFERENCE] = scores["reference"]
    counted = [figure.name for figure in COUNTS]
    for title, values in figures_by_title.items():
        shown = {name: FIGURES[name].format(value) for name, value in values.items()}
        of_all = {name: f"{shown[name]} of {scores['n']}" for name in counted if name in shown}
        measured[title] = shown | of_all | {"n": scores["n"]}
    target = task.title(scores["target"])
    for other, gains in scores["differences"].items():
        shown = {name: FIGURES[name].format_gain(*gain) for name, gain in gains.items()}
        gained[f"{target} minus {task.title(other)}"] = shown
    others = [name for name in FIGURES if name not in CHIEF]
    return [
        table_of(measured, [*CHIEF, "n"], "system"),
        table_of(gained, COMPARED, DIFFERENCE),
        table_of(measured, [*others, "n"], "system"),
        table_of(gained, FIGURES, None).T.rename_axis(DIFFERENCE),
    ]


def source_table(scores: dict, rows: list[dict], task: Task) -> pd.DataFrame | None:
    """The target's figures by the texts' source, and its gains over the others in the chief one.

    None unless several sources have LEAST_OF_SOURCE texts or more; others have no line.
    """
    sources = pd.Series([row["source"] for row in rows])
    counts = sources.value_counts()
    enough = counts[counts >= LEAST_OF_SOURCE].index
    if len(enough) < 2:
        return None
    chief = chief_figure(scores)
    values = {system: pd.DataFrame(found) for system, found in scores["per_text"].items()}
    ours = values.pop(scores["target"])
    lines = {}
    for source in sorted(enough):
        is_here = (sources == source).to_numpy()
        means = linearize_shares(ours[is_here]).mean()
        line = {"n": f"{counts[source]}"}
        for name in [name for name in [*COMPARED, "words"] if name in means]:
            line[FIGURES[name].title] = FIGURES[name].format(means[name])
        for system, theirs in values.items():
            gain = paired_bootstrap(ours.loc[is_here, chief.name], theirs.loc[is_here, chief.name])
            line[f"{chief.title} minus {task.title(system)}"] = chief.format_gain(*gain)
        lines[source] = line
    return pd.DataFrame(lines).T.rename_axis(f"{task.title(scores['target'])}, by source")


def glossary(names: Iterable[str]) -> list[tuple[str, str]]:
    """(title, what it says) of figures, in the order of the tables."""
    names = set(names)
    return [(figure.title, figure.says) for name, figure in FIGURES.items() if name in names]


def table(scores: dict, task: Task) -> str:
    """The chief scores and differences as Markdown, and what the chief figures say."""
    parts = [markdown(frame) for frame in tables(scores, task)[:2]]
    if scores["n"] < FEW:
        parts.append("n is under 30: read the intervals with care.")
    lines = [f"- {line}" for line in without_cut(scores, task)]
    if lines:
        parts.append("\n".join(lines))
    measured = set(scores["systems"][scores["target"]])
    said = [f"- {title}: {says}" for title, says in glossary(measured.intersection(CHIEF))]
    return "\n\n".join([*parts, "\n".join(said)])


def draw_intervals(axes, intervals: dict[str, tuple], label: str) -> None:
    """(mean, low, high) of each name, the first on top."""
    for name, (mean, low, high) in reversed(intervals.items()):
        reach = [[max(0, mean - low)], [max(0, high - mean)]]
        axes.errorbar(mean, fill(name, 60), xerr=reach, fmt="o", capsize=4)
    axes.set_xlabel(f"{label}\nbars: 95% interval", loc="right")


def draw_gains(gains: dict[str, tuple], label: str, path: Path) -> None:
    """Intervals with a line at 0."""
    with drawing(path, (10, 1 + 0.45 * len(gains))) as axes:
        draw_intervals(axes, gains, label)
        axes.axvline(0, color="0.6", linewidth=1)


def draw_panels(panels: dict[str, dict[str, tuple]], path: Path) -> None:
    """label -> intervals of the same names, side by side."""
    height = 1 + 0.45 * max(len(intervals) for intervals in panels.values())
    with drawing(path, (5 + 5 * len(panels), height), len(panels)) as all_axes:
        row = all_axes if len(panels) > 1 else [all_axes]
        for axes, (label, intervals) in zip(row, panels.items(), strict=True):
            draw_intervals(axes, intervals, label)


def chief_values(scores: dict) -> pd.DataFrame:
    """A line a text, a column a system: the chief figure."""
    chief = chief_figure(scores).name
    return pd.DataFrame({s: found[chief] for s, found in scores["per_text"].items()})


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


@dataclass(frozen=True)
class Contrast:
    """A text to whose answer another system adds a name or number that the text lacks, and the
    target does not; and how many such texts there are, and of the other way round."""

    place: int
    system: str
    n_texts: int
    n_reverse: int


def find_contrast(scores: dict) -> Contrast | None:
    """Of the other systems that invent, the one that does so least, which is the hardest to be
    better than; None where it never does so alone."""
    invents = {system: found.get("invented") for system, found in scores["per_text"].items()}
    ours = invents.pop(scores["target"], None)
    counts = {system: sum(theirs) for system, theirs in invents.items() if theirs and any(theirs)}
    if ours is None or not counts:
        return None
    system = min(counts, key=counts.get)
    pairs = list(zip(invents[system], ours, strict=True))
    places = [place for place, (theirs, our) in enumerate(pairs) if theirs and not our]
    if not places:
        return None
    n_reverse = sum(1 for theirs, our in pairs if our and not theirs)
    return Contrast(places[0], system, len(places), n_reverse)


def contrast_title(contrast: Contrast, scores: dict, task: Task) -> str:
    other, target = task.title(contrast.system), task.title(scores["target"])
    return (
        f"A text where {other} invents a name or number and {target} does not "
        f"({contrast.n_texts} of {scores['n']} texts; the other way round {contrast.n_reverse})"
    )


def is_judged(verdicts: dict, settings: dict) -> bool:
    """Whether verdicts are of the very answers that were scored."""
    about = ("generation", "answers")  # 0.3.7 kept the first alone
    return bool(verdicts) and all(verdicts.get(name) == settings.get(name) for name in about)


def judge_rows(verdicts: dict, scores: dict, task: Task) -> list[dict[str, str]]:
    """A line of the judge's table for each system: title -> what stands there."""
    figure, target = FIGURES["invented"], scores["target"]
    lines = []
    for system, verdict in verdicts["systems"].items():
        mean, low, high = verdict["win_rate"]
        line = {"against": task.title(system)}
        line["win rate [95% interval]"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        line["first shown wins"] = str(verdict["first_wins"])
        line["depends on the order"] = str(len(verdict["disagreements"]))
        shares = [scores["systems"][name].get(figure.name) for name in (target, system)]
        if None not in shares:
            line[figure.title] = " against ".join(figure.format(share) for share in shares)
        lines.append(line | {"n": str(verdict["n"])})
    return lines


def head_of_page(scores: dict, task: Task) -> dict[str, str]:
    """The page's title: what of which model, by its base."""
    answers, made = task.hub.get("answers", "answers"), scores["settings"]["generation"]
    settings = made.get("base") or made.get("instructed") or {}
    base = (settings.get("model") or scores["settings"]["config"]).strip("/").split("/")[-1]
    tuned = ", tuned" if scores["target"] == "tuned" else ""
    return {"title": f"{answers[0].upper()}{answers[1:]} by {base}{tuned}"}


def write_report(folder: Path, scores: dict, rows: list[dict], answers: dict, task: Task) -> None:
    """Write scores.md, scores.png and report.html into `folder`."""
    chief, target = chief_figure(scores), scores["target"]
    gains = {f"over {task.title(s)}": gain for s, gain in gains_in(scores, chief).items()}
    label = f"gain of {task.title(target)}, {chief.title}"
    draw_gains(gains, label, folder / "scores.png")
    frames = tables(scores, task)
    by_source = source_table(scores, rows, task)
    if by_source is not None:
        frames.insert(2, by_source)
    example, example_title = find_example(chief_values(scores), target, task)
    texts = page_texts(scores, rows, answers, chief, task)
    verdicts = read_json(folder / "judge.json")
    is_current = is_judged(verdicts, scores["settings"])
    contrast = find_contrast(scores)
    shown = {
        "scores": scores,
        "task": task,
        "contrast": contrast,
        "contrast_title": contrast_title(contrast, scores, task) if contrast else "",
        "conclusions": conclusions(scores, task),
        "glossary": glossary(scores["systems"][target]),
    }
    in_markdown = {
        "table": table(scores, task),
        "more": [markdown(frame) for frame in frames[2:]],
        "example": texts[example],
        "example_title": example_title,
        "contrast_text": texts[contrast.place] if contrast else None,
    }
    on_page = head_of_page(scores, task) | {
        "chief": chief,
        "pictures": [gain_picture(scores, figure, task) for figure in headlines(scores)],
        "tables": [frame.reset_index().to_html(border=0, index=False) for frame in frames],
        "n_open": len(frames) - 2,  # all but the last two, which are long
        "texts": texts,
        "others": [task.title(system) for system in scores["differences"]],
        "judge": verdicts if is_current else None,
        "judge_rows": judge_rows(verdicts, scores, task) if is_current else [],
        "without_cut": without_cut(scores, task),
        "few": scores["n"] < FEW,
    }
    write_text(folder / "scores.md", render("eval/scores.md.jinja", **shown, **in_markdown) + "\n")
    write_text(folder / "report.html", render("eval/report.html.jinja", **shown, **on_page))


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
    """Add a run's chief figures and differences to the ledger."""
    lines, settings = [], scores["settings"]
    for system, values in scores["systems"].items():
        lines += [(system, name, values[name], None, None) for name in CHIEF if name in values]
    for other, gains in scores["differences"].items():
        name = f"{scores['target']} - {other}"
        lines += [(name, figure, *gains[figure]) for figure in COMPARED if figure in gains]
    about = {key: settings[key] for key in ("date", "commit", "config")} | {"command": note}
    append_ledger(lines, about | {"encoder": settings["hash"], "n": scores["n"]}, ledger)
