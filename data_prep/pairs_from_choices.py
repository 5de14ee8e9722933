"""Pairs of what a person chose: `just play` keeps clicks on "better" in DATA/TASK/choices.jsonl.

A record is {"id": digest of the text, "text", "chosen", "rejected", "chosen_by": {"model", ...},
"rejected_by": {"model", ...}, "created"}. Of clicks on the same two answers to a text the last one
counts. A click on a test text makes no pair, as nothing is trained on those.
"""

from collections.abc import Iterator
from pathlib import Path

from common.cli import warn
from common.files import digest, load_records
from data_prep.candidates import Candidate, Checks, new_pair

FIELDS = ("id", "text", "chosen", "rejected", "chosen_by", "rejected_by")
MADE_BY = "just play"


def maker_of(about: object) -> str:
    """Who made an answer that a person was shown, by what a record tells: MODEL:choices."""
    model = about.get("model") if isinstance(about, dict) else about
    return f"{model or 'unknown'}:choices"


def load_choices(path: Path) -> list[dict]:
    """The records whose texts are texts, in their order. Raises UserError if there are none."""
    choices, faulty = [], 0
    for record in load_records(path, FIELDS, MADE_BY):
        texts = [record["text"], record["chosen"], record["rejected"]]
        if all(isinstance(text, str) for text in texts):
            choices.append(record)
        else:
            faulty += 1
    if faulty:
        warn(f"{path}: {faulty:,} choices whose text or answers are no text, passed over")
    return choices


def choice_key(choice: dict) -> str:
    """Tells a text with two answers from others, whichever of the two was chosen."""
    return digest(choice["text"], *sorted((choice["chosen"], choice["rejected"])))


def pairs_of_choices(
    choices: list[dict], checks: Checks, test_texts: set[str]
) -> Iterator[Candidate]:
    """What becomes of each choice; `test_texts` without blanks around them."""
    last_by_key = {choice_key(choice): choice for choice in choices}
    for choice in choices:
        key, by = choice_key(choice), maker_of(choice["chosen_by"])
        made_of = {"id": key, "model": by, "created": choice.get("created")}
        candidate = Candidate("choices", "train", made_of)
        last = last_by_key[key]
        if choice["text"].strip() in test_texts:  # what was pasted may end in a blank line
            yield candidate.dropped("its text is a test text")
        elif choice["chosen"] == choice["rejected"]:
            yield candidate.dropped("the two answers are the same")
        elif choice is not last and choice["chosen"] == last["chosen"]:
            yield candidate.dropped("chosen once more later")
        elif choice is not last:
            yield candidate.dropped("the other answer was chosen later")
        else:
            extract = {"id": key, "source": "choices", "url": "", "text": choice["text"]}
            pair = new_pair(extract, "choices")
            pair |= {"chosen": choice["chosen"], "rejected": choice["rejected"]}
            pair |= {"chosen_by": by, "rejected_by": maker_of(choice["rejected_by"])}
            yield checks.passed(Candidate("choices", "train", made_of, pair))
