"""Replies in random mixtures of the shapes that models really write, for benchmarks."""

import random

from prompts.task import load_task

CRITERIA = {name.capitalize(): highest for name, highest in load_task().criteria.items()}


def criteria_of(rng: random.Random) -> dict[str, int]:
    return {name: rng.randint(1, highest) for name, highest in CRITERIA.items()}


def render_reply(rng: random.Random, one: str, two: str) -> str:
    """A reply with these two summaries and random scores, the better one named."""
    mark = rng.choice(("{}:", "**{}:**", "**{}**:", "### {}", "### {}:", "- {}:", "[{}]:"))
    field = rng.choice(("{}: {}", "**{}:** {}", "- **{}**: {}", "* {}: {}"))
    number = rng.choice(("{}", "{}/18", "**{}**", "<{}>", "{} out of 18", "{} points."))
    parts, totals = (
        [rng.choice(("", "Sure, here they are.\n", "<think>\nSummary 1: no\n</think>"))],
        [],
    )
    for position, text in enumerate((one, two), 1):
        criteria = criteria_of(rng)
        totals.append(sum(criteria.values()))
        parts += [mark.format(f"Summary {position}"), text]
        if rng.random() < 0.8:
            parts += [field.format(name, score) for name, score in criteria.items()]
        parts += [
            field.format("Total score", number.format(totals[-1])),
            field.format("Explanation", "It reads well and keeps to the text."),
            rng.choice(("", "---")),
        ]
    best = 1 if totals[0] >= totals[1] else 2
    parts += [mark.format("Best summary"), rng.choice(("{}", "Summary {}", "**{}**.")).format(best)]
    reply = "\n".join(parts)
    return reply.replace("\n", "\r\n") if rng.random() < 0.2 else reply
