"""Show what is here and what is missing (python -m inference.doctor); asks nothing that costs."""

import os
import platform
import re
import shutil
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import torch
from huggingface_hub import get_token

from common.cli import run, script_parser
from inference.vllm_line import find_vllm
from training.config import cpu_has_bf16

PATIENCE = 15  # seconds for all looks together, however slowly an address answers


def models_url(base: str) -> str:
    """Where an endpoint lists its models: below its version, as in .../v1, .../v1beta/openai and
    .../paas/v4, and below /v1 where the address names none."""
    base = re.sub(r"/(chat/completions|models)?/*$", "", base)
    try:
        path = urlsplit(base).path
    except ValueError:  # httpx will say so
        path = ""
    versioned = re.search(r"/v\d\w*(/openai)?$|/openai$", path)
    return f"{base}/models" if versioned else f"{base}/v1/models"


def look(url: str, secret: str | None) -> str:
    """What is known of an address after one request; begins with "no" if it cannot be used. Never
    tells the address or the key."""
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        with httpx.stream("GET", url, headers=headers, timeout=10) as answer:
            status = answer.status_code
    except Exception as error:  # whatever is set: no address, no certificate, a key of two lines
        return f"no answer ({type(error).__name__}); check network, proxy and address"
    if status in (401, 403):
        return f"no: {status}; check the key" if secret else "answers"
    if status >= 500:
        return f"no: {status}; it is out of order, try later"
    if status >= 400:
        return f"no: {status}; check the address"
    return "answers"


def look_at_all(addresses: dict[str, tuple[str, str | None]]) -> dict[str, str]:
    """name -> what is known of its (address, key), all looked at together, in PATIENCE seconds."""
    states = dict.fromkeys(addresses, f"no answer within {PATIENCE} s; check network and proxy")

    def look_at(name: str) -> None:
        states[name] = look(*addresses[name])

    threads = [threading.Thread(target=look_at, args=(name,), daemon=True) for name in addresses]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(states)


def describe_key(name: str, otherwise: str) -> str:
    """Whether a key is set, and could be one: it goes into a header, so it is plain letters."""
    key = os.getenv(name)
    if not key:
        return otherwise
    plain = key.isascii() and key.isprintable() and " " not in key
    return "set" if plain else "not usable: it holds a space, a line break or an odd letter"


def describe_address(address: str | None) -> str:
    if not address:
        return "not set; Together is asked"
    parts = [part.strip() for part in address.split(",")]  # several endpoints as one teacher
    whole = all(part.isprintable() and re.match(r"https?://[^/\s]", part) for part in parts)
    return "set" if whole else "not usable: it must begin with http:// or https://"


def describe_gpus() -> str:
    try:
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        named = ", ".join(f"{gpu.name}, {gpu.total_memory >> 30} GiB" for gpu in gpus)
    except RuntimeError as error:  # a driver that does not fit
        return f"none for torch ({type(error).__name__}; check the driver)"
    return named or "none for torch"


def main() -> None:
    script_parser(__doc__).parse_args()
    key, base, token = os.getenv("TOGETHER_API_KEY"), os.getenv("TOGETHER_BASE_URL"), None
    with suppress(OSError, ValueError):  # a file of the token that cannot be read
        token = get_token()
    bf16 = "bf16" if cpu_has_bf16() else "no bf16"
    here = {  # what is missing begins with "no"
        "Python, torch": f"{platform.python_version()}, {torch.__version__} ({bf16} on this CPU)",
        "GPU": describe_gpus(),
        "vLLM": "here" if find_vllm() else "not here; `just serve` goes without",
        "disk": f"{shutil.disk_usage('.').free >> 30} GiB free; a full run takes some 20",
        "TOGETHER_API_KEY": describe_key(
            "TOGETHER_API_KEY", "unset; yours may need none" if base else "not set"
        ),
        "TOGETHER_BASE_URL": describe_address(base),
        "HF_TOKEN": "set" if token else "not set; `hf auth login` does as well",
    }
    hub = os.getenv("HF_ENDPOINT") or "https://huggingface.co"
    addresses = {"Hub": (hub.rstrip("/") + "/api/whoami-v2", token)}
    for number, address in enumerate((base or "https://api.together.ai").split(","), 1):
        name = "teacher" if number == 1 else f"teacher {number}"
        addresses[name] = (models_url(address.strip()), key)
    here |= look_at_all(addresses)
    for recipe, *needs in (
        ("just demo",),
        ("just dataset", "Hub", "teacher", "TOGETHER_API_KEY"),
        ("just train (QLoRA)", "Hub", "GPU"),
        ("just serve (vLLM)", "GPU", "vLLM"),
        ("just publish-*", "Hub", "HF_TOKEN"),
    ):
        lacking = [f"lacks {need}" for need in needs if here[need].startswith("no")]
        here[recipe] = ", ".join(lacking) or "can run"
    print("\n".join(f"{name:<20}{state}" for name, state in here.items()))


if __name__ == "__main__":
    run(main)
