"""What an endpoint says that it serves, so that answers of another model are not taken for its.

The address is TOGETHER_BASE_URL's, or Together's own. What is told of a model differs: vLLM names
the folder (`root`) and, of an adapter, the base (`parent`); Ollama when it was made; `just serve`
its fingerprint; many tell its name alone.
"""

import os
import time
from pathlib import Path
from urllib.parse import urlsplit

from common.cli import UserError, one_line
from data_prep.teacher.endpoints import endpoint_url
from training.config import fingerprint

# What tells one model from another; prices, permissions and states change while it stays the same.
TELLING = ("id", "created", "fingerprint", "digest", "root", "parent", "max_model_len", "meta")


class NoEndpoint(UserError):
    """An endpoint does not answer."""


def address_of() -> str:
    """Host, port and path of the endpoint, without credentials. Raises UserError."""
    parts = urlsplit(endpoint_url())
    return f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def describe_served(model: str) -> dict | None:
    """What the endpoint says of `model` that tells it from others, None if it lists no such.

    Raises NoEndpoint if it does not answer.
    """
    card = find_card(model)
    if card is None:
        return None
    # vLLM and llama.cpp give the moment of asking as the one when the model was made.
    created = card.get("created")
    if isinstance(created, int | float) and abs(time.time() - created) < 60:
        time.sleep(1.1)
        if (find_card(model) or {}).get("created") != created:
            del card["created"]
    told = {field: card[field] for field in TELLING if card.get(field) is not None}
    root = told.get("root")
    if isinstance(root, str) and Path(root).is_dir():  # it is served from this machine
        told["weights"] = fingerprint(root)
    return told


def find_card(model: str) -> dict | None:
    """The endpoint's entry on a model, None if it has no list or no such model. NoEndpoint."""
    import httpx

    key = os.environ.get("TOGETHER_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(f"{endpoint_url()}/models", headers=headers, timeout=60)
        body = response.json() if response.is_success else None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = one_line(error) or type(error).__name__
        raise NoEndpoint(f"the endpoint {address_of()} does not answer: {said}") from None
    except ValueError:
        body = None
    cards = body.get("data") if isinstance(body, dict) else body
    for card in cards if isinstance(cards, list) else []:
        if isinstance(card, dict) and card.get("id") == model:
            return card
    return None
