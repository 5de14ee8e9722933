"""Show what is here and what is missing (python -m training.doctor); asks nothing that costs."""

import os
import platform
import shutil

import httpx
import torch
from huggingface_hub import get_token

from common.cli import run, script_parser
from training.resolve_config import cpu_has_bf16


def main() -> None:
    script_parser(__doc__).parse_args()
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    bf16 = "bf16" if cpu_has_bf16() else "no bf16"
    key, base, token = os.getenv("TOGETHER_API_KEY"), os.getenv("TOGETHER_BASE_URL"), get_token()
    here = {  # what is missing begins with "no"
        "Python, torch": f"{platform.python_version()}, {torch.__version__} ({bf16} on this CPU)",
        "GPU": ", ".join(f"{g.name}, {g.total_memory >> 30} GiB" for g in gpus) or "none for torch",
        "vLLM": "here" if shutil.which("vllm") else "not here; `just serve` goes without",
        "disk": f"{shutil.disk_usage('.').free >> 30} GiB free; a full run takes some 20",
        "TOGETHER_API_KEY": "set" if key else "unset; yours may need none" if base else "not set",
        "TOGETHER_BASE_URL": "set" if base else "not set; Together is asked",
        "HF_TOKEN": "set" if token else "not set; `hf auth login` does as well",
    }
    hub = os.getenv("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/api/whoami-v2"
    api = (base or "https://api.together.ai").rstrip("/") + "/v1/models"
    for name, url, secret in ("Hub", hub, token), ("teacher", api, key):
        try:
            status = httpx.get(url, headers={"Authorization": f"Bearer {secret}"}).status_code
            here[name] = f"no: {status}; check the key" if secret and status >= 400 else "answers"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # may quote the key
            here[name] = f"no answer ({type(error).__name__}); check network, proxy and address"
    for recipe, *needs in (
        ("just demo",),
        ("just dataset", "Hub", "teacher", "TOGETHER_API_KEY"),
        ("just train (QLoRA)", "Hub", "GPU"),
        ("just serve (vLLM)", "GPU", "vLLM"),
        ("just publish-*", "Hub", "HF_TOKEN"),
    ):
        here[recipe] = ", ".join(f"lacks {n}" for n in needs if here[n][:2] == "no") or "can run"
    print("\n".join(f"{name:<20}{state}" for name, state in here.items()))


if __name__ == "__main__":
    run(main)
