"""What teachers.yaml, whose comments say what each field is, tells of each teacher."""

from pathlib import Path

import yaml

PRICES = Path(__file__).with_name("teachers.yaml")


def load_prices() -> dict[str, dict]:
    return yaml.safe_load(PRICES.read_text())


def teacher_terms(model: str) -> str:
    unknown = "See the model's licence and the provider's terms."
    return load_prices().get(model, {}).get("outputs", unknown)
