"""Show the scores of a run: tables, plots and one self-contained page; record them in the ledger.

Reads outputs/RUN/eval/scores.json, the summaries and, where it is of them, judge.json; writes
scores.md, plots/*.png and report.html beside it (no network, every text escaped) and prints the
chief tables. With --record the scores are added to results/ledger.csv, a line a figure.

    python -m eval.build_report smollm2-135m-dpo-sft-lora --record "just demo"
"""

import argparse
import base64
import json
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.cli import run, script_parser
from common.files import replacing, write_text
from common.report import drawing, format_interval, markdown
from eval.score_summaries import COMPARED, COUNTS, MORE_TITLES, TITLES, load_evaluation
from prompts import load_task
from training.run_config import RunConfig, load_run_config

CHIEF = {measure: TITLES[measure] for measure in COMPARED}
DECIMALS = {"words": 1, "compression": 1, **dict.fromkeys(COUNTS, 0)}
PLOTS = {
    "differences.png": "Differences with their intervals",
    "score_by_length.png": "Score by document length, characters",
    "length_against_score.png": "Score by summary length, words",
}


def title(system: str) -> str:
    return load_task().titles.get(system, system)


def score_table(scores: dict, titles: dict[str, str]) -> pd.DataFrame:
    """Systems by measures, formatted."""

    def formatted(column: pd.Series) -> pd.Series:
        return column.map(f"{{:.{DECIMALS.get(column.name, 3)}f}}".format)

    frame = pd.DataFrame(scores["systems"]).T
    frame = frame[[measure for measure in titles if measure in frame]].apply(formatted)
    return frame.rename(index=title, columns=titles).assign(n=scores["n"]).rename_axis("system")


def difference_table(scores: dict, titles: dict[str, str]) -> pd.DataFrame:
    """The target's gains over the other systems with their intervals."""
    target = title(scores.get("target", "tuned")).removesuffix(" adapter")
    frame = pd.DataFrame(scores["differences"]).map(lambda gain: format_interval(*gain)).T
    frame = frame[[measure for measure in titles if measure in frame]].rename(columns=titles)
    names = [f"{target} minus {title(other)}" for other in frame.index]
    return frame.set_axis(names).rename_axis("difference [95% interval]")


def group_table(scores: dict, kind: str) -> pd.DataFrame:
    """F1 of the target by source or length, and its gains over the other systems."""
    rows = {}
    for label, group in scores["groups"][kind].items():
        rows[label] = {"n": group["n"], f"F1 of {scores['target']}": f"{group['mean']:.3f}"}
        for other, gain in group["differences"].items():
            rows[label][f"minus {other}"] = format_interval(*gain)
    return pd.DataFrame(rows).T.rename_axis(kind)


def tables(scores: dict) -> dict[str, pd.DataFrame]:
    """All tables of scores.md and report.html by their heading."""
    return {
        "Scores": score_table(scores, TITLES),
        "Differences": difference_table(scores, CHIEF),
        "More measures": score_table(scores, MORE_TITLES | COUNTS),
        "All differences": difference_table(scores, TITLES | MORE_TITLES).T.rename_axis("measure"),
        "By length": group_table(scores, "characters"),
        "By source": group_table(scores, "source"),
    }


def table(scores: dict) -> str:
    """The chief scores and differences as Markdown."""
    frames = score_table(scores, TITLES), difference_table(scores, CHIEF)
    return "\n\n".join([*map(markdown, frames), small_n(scores)]).strip()


def small_n(scores: dict) -> str:
    n = scores["n"]
    return f"n is {n}: under 30, read the intervals with care." if n < 30 else ""


def example(scores: dict, rows: list[dict], summaries: dict[str, dict[str, dict]]) -> str:
    """The text whose gain over the second system is the median one, with every summary under it."""
    f1 = [np.array(values["bertscore_f1"]) for values in scores["per_text"].values()]
    gains = np.array(scores["per_text"][scores["target"]]["bertscore_f1"]) - f1[min(1, len(f1) - 1)]
    row = rows[int(np.argsort(gains)[len(gains) // 2])]
    parts = [f"The text of median gain ({row['id']}):", row["text"]]
    parts += ["-- reference (teacher)", row["reference"]]
    for system, records in summaries.items():
        parts += [f"-- {title(system)}", records[row["id"]]["text"]]
    return "\n\n".join(parts)


def draw_plots(scores: dict, rows: list[dict], folder: Path) -> None:
    """Write the files of PLOTS."""
    gains = scores["differences"]
    with drawing(folder / "differences.png", (6, 1 + 0.45 * len(gains))) as axes:
        for place, other in enumerate(gains):
            mean, low, high = gains[other]["bertscore_f1"]
            reach = [[max(0, mean - low)], [max(0, high - mean)]]
            axes[0, 0].errorbar(mean, place, xerr=reach, fmt="o", capsize=4)
        axes[0, 0].set_yticks(range(len(gains)), [f"minus {title(other)}" for other in gains])
        axes[0, 0].invert_yaxis()
        axes[0, 0].axvline(0, color="grey", linewidth=0.8)
        measured = f"gain in BERTScore F1 of {scores['target']}, 95% interval, n = {scores['n']}"
        axes[0, 0].set_xlabel(measured)
    lengths = [len(row["text"]) for row in rows]
    for name in ("score_by_length.png", "length_against_score.png"):
        with drawing(folder / name, (6, 4)) as axes:
            for system, values in scores["per_text"].items():
                across = lengths if name == "score_by_length.png" else values["words"]
                axes[0, 0].scatter(
                    across, values["bertscore_f1"], s=12, alpha=0.6, label=title(system)
                )
            axes[0, 0].set(xlabel=PLOTS[name].removeprefix("Score by "), ylabel="BERTScore F1")
            axes[0, 0].legend(fontsize=8)


def load_verdicts(folder: Path, scores: dict) -> dict | None:
    """The judge's verdicts, if they are of the summaries that were scored."""
    path = folder / "judge.json"
    verdicts = json.loads(path.read_text()) if path.exists() else {}
    return verdicts if verdicts.get("generation") == scores["settings"]["generation"] else None


def write_report(folder: Path, scores: dict, rows: list[dict], summaries: dict) -> None:
    """Write scores.md, the plots and report.html into `folder`."""
    draw_plots(scores, rows, folder / "plots")
    shown = tables(scores)
    parts = [f"# {scores['settings']['config']}", small_n(scores)]
    parts += [f"## {heading}\n\n{markdown(frame)}" for heading, frame in shown.items()]
    parts += [f"```json\n{json.dumps(scores['settings'], indent=1)}\n```"]
    write_text(folder / "scores.md", "\n\n".join([*parts, example(scores, rows, summaries)]) + "\n")
    images = {
        caption: base64.b64encode((folder / "plots" / name).read_bytes()).decode()
        for name, caption in PLOTS.items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        scores=scores,
        rows=rows,
        summaries=summaries,
        tables={heading: frame.reset_index() for heading, frame in shown.items()},
        small_n=small_n(scores),
        images=images,
        f1={system: values["bertscore_f1"] for system, values in scores["per_text"].items()},
        title=title,
        verdicts=load_verdicts(folder, scores),
    )
    write_text(folder / "report.html", page)


def ledger_lines(scores: dict, note: str) -> pd.DataFrame:
    """What the ledger says of a run: a line for each mean, then one for each difference."""
    settings, target = scores["settings"], scores["target"]
    lines = []
    for system, values in scores["systems"].items():
        means = {m: values[m] for m in (*COMPARED, "words") if m in values}
        lines += [(system, measure, mean, None, None) for measure, mean in means.items()]
    for other, gains in scores["differences"].items():
        lines += [(f"{target} - {other}", m, *gains[m]) for m in COMPARED if m in gains]
    frame = pd.DataFrame(lines, columns=["system", "metric", "value", "low", "high"]).round(3)
    of_run = {key: settings.get(key) for key in ("date", "commit", "config")}
    of_run |= {"command": note, "encoder": settings["hash"], "n": scores["n"]}
    return frame.assign(**of_run)[[*of_run, *frame]]


def record(scores: dict, note: str, ledger: Path) -> None:
    """Add a run's scores to the ledger."""
    old = [pd.read_csv(ledger, dtype=str)] if ledger.exists() else []
    with replacing(ledger) as temporary:
        pd.concat([*old, ledger_lines(scores, note)]).to_csv(temporary, index=False)
    print(f"recorded in {ledger}")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--record", metavar="NOTE", help="add the scores to the ledger, with this note")
    option("--ledger", type=Path, default=Path("results/ledger.csv"), help="file of all runs")


def report(config: RunConfig, note: str | None, ledger: Path) -> None:
    """Write a scored run's files, print the chief tables and an example, record the scores."""
    scores, rows, summaries = load_evaluation(config)
    write_report(config.eval_dir, scores, rows, summaries)
    print(f"\n{table(scores)}\n\n{example(scores, rows, summaries)}\n")
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
