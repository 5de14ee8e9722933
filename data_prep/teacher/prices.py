"""What teachers.yaml tells of each teacher: prices, context, terms on what it writes."""

from functools import cache
from pathlib import Path

import yaml

PRICES = Path(__file__).with_name("teachers.yaml")


@cache
def load_prices() -> dict[str, dict]:
    """Teacher -> what is known of it; the comments in teachers.yaml say what each field is."""
    return yaml.safe_load(PRICES.read_text())


def teacher_terms(model: str) -> str:
    """What a card says of the terms on a teacher's answers."""
    unknown = "See the model's licence and the provider's terms."
    return load_prices().get(model, {}).get("outputs", unknown)
