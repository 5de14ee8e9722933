"""Tables, plots and one self-contained page of an evaluation.

`score_summaries` and `judge_summaries` write them: scores.md, plots/*.png and report.html in
outputs/<config>/eval. The page needs no network; every text in it is escaped.
"""

import base64
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.cli import UserError
from common.files import replacing
from common.report import format_interval, markdown
from training.run_config import RunConfig

NAMES = {
    "base": "base, bare text",
    "instructed": "base, instructed",
    "tuned": "tuned adapter",
    "lead": "the text's first sentences (no model)",
}
TITLES = {
    "bertscore_p": "BERTScore P",
    "bertscore_r": "R",
    "bertscore_f1": "BERTScore F1",
    "bertscore_f1_rescaled": "F1 rescaled",
    "rouge_l": "ROUGE-L",
    "faithfulness": "faithfulness",
    "words": "mean words",
}
MORE_TITLES = {
    "bertscore_p_rescaled": "P rescaled",
    "bertscore_r_rescaled": "R rescaled",
    "bertscore_f1_segments": "F1 by segments",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_lsum": "ROUGE-Lsum",
    "compression": "compression",
    "coverage": "coverage",
    "density": "density",
    "novel_bigrams": "novel bigrams",
    "repetition": "repetition",
}
COUNTS = {
    "empty": "empty",
    "stopped_at_limit": "cut at the longest",
    "documents_cut": "documents cut",
    "over_512_tokens": "over 512 tokens",
}
COMPARED = ("bertscore_f1", "rouge_l", "faithfulness")
PLAIN = {"words": ".1f", "compression": ".1f", **dict.fromkeys(COUNTS, ".0f")}


def load_scores(config: RunConfig) -> dict:
    """scores.json of a run. Raises UserError if it was not made."""
    path = config.eval_dir / "scores.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        hint = f"make it with `just scores {config.path.stem}`"
        raise UserError(f"cannot read {path}: {error.strerror}; {hint}") from None


def title(system: str) -> str:
    return NAMES.get(system, system)


def score_table(result: dict, titles: dict[str, str]) -> pd.DataFrame:
    """Systems by measures, formatted."""
    rows = {
        title(system): {t: format(v[m], PLAIN.get(m, ".3f")) for m, t in titles.items() if m in v}
        | {"n": result["n"]}
        for system, v in result["systems"].items()
    }
    return pd.DataFrame(rows).T.rename_axis("system")


def difference_table(result: dict, measures: dict[str, str]) -> pd.DataFrame:
    """The target's gains over the other systems with their intervals."""
    target = title(result.get("target", "tuned")).removesuffix(" adapter")
    return pd.DataFrame(
        {
            f"{target} minus {title(other)}": {
                t: format_interval(*values[m]) for m, t in measures.items() if m in values
            }
            for other, values in result["differences"].items()
        }
    ).T.rename_axis("difference [95% interval]")


def group_table(result: dict, kind: str) -> pd.DataFrame:
    """F1 of the target by source or length, and its gains over the other systems."""
    target = result["target"]
    return pd.DataFrame(
        {
            label: {"n": group["n"], f"F1 of {target}": f"{group['mean']:.3f}"}
            | {f"minus {o}": format_interval(*gain) for o, gain in group["differences"].items()}
            for label, group in result["groups"][kind].items()
        }
    ).T.rename_axis(kind)


def seed_table(result: dict) -> pd.DataFrame:
    """Mean and range, over the systems that differ in a last -SEED alone, of what is compared."""
    runs = defaultdict(list)
    for system, values in result["systems"].items():
        stem, _, seed = system.rstrip("/").rpartition("-")
        if seed.isdigit():
            runs[stem].append(values)
    return pd.DataFrame(
        {
            stem: {"seeds": len(seeds)}
            | {
                TITLES[m]: f"{np.mean(v):.3f} [{min(v):.3f} to {max(v):.3f}]"
                for m in COMPARED
                if (v := [values[m] for values in seeds if m in values])
            }
            for stem, seeds in runs.items()
            if len(seeds) > 1
        }
    ).T.rename_axis("mean [lowest to highest seed]")


def tables(result: dict) -> dict[str, pd.DataFrame]:
    """All tables of scores.md and report.html by their heading."""
    seeds = seed_table(result)
    return {
        "Scores": score_table(result, TITLES),
        "Differences": difference_table(result, {m: TITLES[m] for m in COMPARED}),
        **({} if seeds.empty else {"Over seeds": seeds}),
        "More measures": score_table(result, MORE_TITLES | COUNTS),
        "All differences": difference_table(result, TITLES | MORE_TITLES).T.rename_axis("measure"),
        "By length": group_table(result, "characters"),
        "By source": group_table(result, "source"),
    }


def table(result: dict) -> str:
    """The chief scores and differences as Markdown."""
    chief = score_table(result, TITLES), difference_table(result, {m: TITLES[m] for m in COMPARED})
    return "\n\n".join([*(markdown(frame) for frame in chief), small_n(result)]).strip()


def small_n(result: dict) -> str:
    n = result["n"]
    return f"n is {n}: under 30, read the intervals with care." if n < 30 else ""


def example(result: dict, rows: list[dict], summaries: dict[str, dict[str, dict]]) -> str:
    """The text whose gain over the second system is the median one, with every summary under it."""
    f1 = [np.array(values["bertscore_f1"]) for values in result["per_text"].values()]
    gains = np.array(result["per_text"][result["target"]]["bertscore_f1"]) - f1[min(1, len(f1) - 1)]
    row = rows[int(np.argsort(gains)[len(gains) // 2])]
    parts = [f"The text of median gain ({row['id']}):", row["text"]]
    parts += ["-- reference (teacher)", row["reference"]]
    for system, records in summaries.items():
        parts += [f"-- {title(system)}", records[row["id"]]["text"]]
    return "\n\n".join(parts)


def plot_all(result: dict, rows: list[dict], folder: Path) -> dict[str, str]:
    """Write the plots. Returns caption -> data URI."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    images = {}

    def save(figure, name: str, caption: str) -> None:
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        plt.close(figure)
        data = base64.b64encode((folder / name).read_bytes()).decode()
        images[caption] = f"data:image/png;base64,{data}"

    target, others = result["target"], list(result["differences"])
    figure, axes = plt.subplots(figsize=(6, 1 + 0.45 * len(others)))
    for place, other in enumerate(others):
        mean, low, high = result["differences"][other]["bertscore_f1"]
        reach = np.maximum(0, [[mean - low], [high - mean]])
        axes.errorbar(mean, place, xerr=reach, fmt="o", capsize=4)
    axes.set_yticks(range(len(others)), [f"minus {title(other)}" for other in others])
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel(f"gain in BERTScore F1 of {target}, 95% interval, n = {result['n']}")
    save(figure, "differences.png", "Differences with their intervals")

    lengths = [len(row["text"]) for row in rows]
    for measure, label, name in (
        (None, "document length, characters", "score_by_length.png"),
        ("words", "summary length, words", "length_against_score.png"),
    ):
        figure, axes = plt.subplots(figsize=(6, 4))
        for system, values in result["per_text"].items():
            across = values[measure] if measure else lengths
            axes.scatter(across, values["bertscore_f1"], s=12, alpha=0.6, label=title(system))
        axes.set(xlabel=label, ylabel="BERTScore F1")
        axes.legend(fontsize=8)
        save(figure, name, f"Score by {label}")
    return images


def documents(result: dict, rows: list[dict], summaries: dict[str, dict[str, dict]]) -> list[dict]:
    """What the page shows of every document: text, reference, and each system's summary.

    A summary is a list of [sentence, support]; where support was not measured it is one piece.
    """
    shown = []
    for i, row in enumerate(rows):
        f1 = {system: values["bertscore_f1"][i] for system, values in result["per_text"].items()}
        pieces = {
            system: result["support"][system][i]
            if result["support"][system]
            else [(records[row["id"]]["text"], None)]
            for system, records in summaries.items()
        }
        gains = [f1[result["target"]] - f1[other] for other in result["differences"]]
        shown.append({**row, "f1": f1, "pieces": pieces, "gains": gains})
    return shown


def write_report(
    folder: Path, result: dict, rows: list[dict], summaries: dict, verdicts: dict | None = None
) -> None:
    """Write scores.md, the plots and report.html, with the judge's verdicts, into `folder`."""
    images = plot_all(result, rows, folder / "plots")
    parts = [f"## {heading}\n\n{markdown(frame)}" for heading, frame in tables(result).items()]
    settings = f"```json\n{json.dumps(result['settings'], indent=1)}\n```"
    parts = [f"# {result['settings']['config']}", small_n(result), *parts, settings]
    with replacing(folder / "scores.md") as temporary:
        temporary.write_text("\n\n".join([*parts, example(result, rows, summaries)]) + "\n")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        result=result,
        tables={heading: frame.reset_index() for heading, frame in tables(result).items()},
        small_n=small_n(result),
        images=images,
        documents=documents(result, rows, summaries),
        titles={system: title(system) for system in result["systems"]},
        verdicts=verdicts,
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
