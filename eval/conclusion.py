"""What the scores say, in a sentence a figure: which systems the target is ahead of, how surely."""

from eval.measures import COMPARED, FIGURES, Figure
from prompts.task import Task

Gains = dict[str, tuple[float, float, float]]  # system -> mean, low, high


def chief_figure(scores: dict) -> Figure:
    """The figure that the report is about: the first one that was measured and is compared."""
    measured = scores["systems"][scores["target"]]
    return FIGURES[next((name for name in COMPARED if name in measured), "words")]


def headlines(scores: dict) -> list[Figure]:
    """The figures that have a sentence and a picture of their own."""
    measured = scores["systems"][scores["target"]]
    others = [f for f in FIGURES.values() if f.headline and f.name in measured]
    return list(dict.fromkeys([chief_figure(scores), *others]))


def gains_in(scores: dict, figure: Figure) -> Gains:
    """system -> how much more the target has, with its interval; the least first."""
    gains = {
        system: tuple(differences[figure.name])
        for system, differences in scores["differences"].items()
        if figure.name in differences
    }
    return dict(sorted(gains.items(), key=lambda item: item[1][0]))


def in_sentence(system: str, task: Task) -> str:
    """A system's title as it stands in a sentence: the base, bare text."""
    title = task.title(system).split(" (")[0]
    return title if title == system else "the " + title.removeprefix("the ")


def listed(parts: list[str]) -> str:
    """a, b and c."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def clause(verdict: str, gains: Gains, figure: Figure, task: Task) -> str:
    """How the target's answers compare with those of some systems."""
    others = [
        f"{in_sentence(system, task)} ({figure.format_gain(*gain)})"
        for system, gain in gains.items()
    ]
    return f"{verdict} those of {listed(others)}"


def conclude(scores: dict, figure: Figure, task: Task) -> str:
    """One sentence: those it is ahead of first, then the unclear, then those it is behind.

    An interval that holds 0 tells no difference.
    """
    gains = gains_in(scores, figure)
    lower, higher = figure.verdicts
    above = {system: gain for system, gain in gains.items() if gain[1] > 0}
    below = {system: gain for system, gain in gains.items() if gain[2] < 0}
    unclear = {s: gain for s, gain in gains.items() if s not in above and s not in below}
    groups = [(higher, above), ("show no clear difference from", unclear), (lower, below)]
    if figure.better < 0:
        groups.reverse()
    clauses = [clause(verdict, group, figure, task) for verdict, group in groups if group]
    answers = task.hub.get("answers", "answers")
    n, several = scores["n"], "s" if scores["n"] > 1 else ""
    intervals = ", 95% intervals over texts" if gains else ""
    return (
        f"The {answers} of {in_sentence(scores['target'], task)} "
        f"{'; '.join(clauses) or 'stand alone'}: "
        f"{figure.title} on {n} held-out text{several}{intervals}."
    )


def without_cut(scores: dict, task: Task) -> list[str]:
    """A line for each difference that rests on answers cut at the limit: what it is without them.

    Scores of 0.5.0 and before do not tell.
    """
    lines = []
    for system, whole in scores.get("without_cut", {}).items():
        gains = []
        for name, gain in whole["differences"].items():
            gains.append(f"{FIGURES[name].title} {FIGURES[name].format_gain(*gain)}")
        pair = f"{task.title(scores['target'])} minus {task.title(system)}"
        n_cut = scores["n"] - whole["n"]
        several = "s" if n_cut > 1 else ""
        told = ", ".join(gains) or "too few to tell"
        texts = f"without the {n_cut} text{several} where one was cut, n = {whole['n']}"
        lines.append(f"{pair}, {texts}: {told}.")
    return lines


def conclusions(scores: dict, task: Task) -> list[str]:
    """A sentence for every headline."""
    return [conclude(scores, figure, task) for figure in headlines(scores)]
