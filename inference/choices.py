"""Which of several answers a person found better, kept in data/TASK/choices.jsonl.

A line for each pair of the answer that was clicked and one beside it: `id` (the text's digest),
`text`, `chosen`, `rejected`, `chosen_by` and `rejected_by` (what made them), `created`. People
change their minds: of records with the same `id` and the same two answers, whichever is chosen, the
last counts.
"""

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field

from common.files import append_record, appending, digest, locked
from inference.http_requests import WholeText


class Answer(BaseModel):
    """An answer, and what made it as the page knows it."""

    text: WholeText = Field(min_length=1)
    model: WholeText = Field(min_length=1)  # its name at the endpoint
    fingerprint: str | None = None  # of its weights, where the endpoint tells it
    template: str | None = None  # the digest of the one around the text, None for the bare text
    finish_reason: str | None = None

    def made_by(self, endpoint: str) -> dict:
        return {"endpoint": endpoint} | self.model_dump(exclude={"text"})


class Choice(BaseModel):
    """A click."""

    task: str
    text: WholeText = Field(min_length=1)
    chosen: Answer
    others: list[Answer] = Field(min_length=1, max_length=100)


def records_of(choice: Choice, endpoint: str) -> list[dict]:
    """A record for each answer that says something else than the chosen one."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    chosen = choice.chosen.text.strip()
    records = {}
    for other in choice.others:
        rejected = other.text.strip()
        if rejected in (chosen, ""):
            continue
        records[rejected] = {
            "id": digest(choice.text),
            "text": choice.text,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_by": choice.chosen.made_by(endpoint),
            "rejected_by": other.made_by(endpoint),
            "created": created,
        }
    return list(records.values())


def keep_records(path: Path, records: list[dict]) -> None:
    """Append records; other writers wait for their turn. Raises UserError or OSError."""
    with locked(path), appending(path) as file:
        append_record(file, *records)
