"""Serve adapters over one copy of their base, on an OpenAI-compatible endpoint.

`model` picks the adapter, by its task or name, or the base. On a GPU with vLLM this is `vllm serve`.
Elsewhere requests that wait at the same time are answered in one batch, greedily, whichever adapters
they name (peft's mixed batches); the answers are those of eval/run_task.py.

    python -m eval.serve smollm2-135m-dpo-sft-lora title-smollm2-135m-dpo-sft-lora
"""

import asyncio
import json
import os
import queue
import shlex
import shutil
import threading
import time
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from peft import PeftConfig, PeftModel
from pydantic import BaseModel
from transformers import StoppingCriteria

from common.cli import UserError, one_line, positive, run, script_parser
from eval.generate_answers import generate_batch
from eval.load_model import Weights, find_weights, load_model, load_tokenizer, trained_for
from training.run_config import is_local

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM serves
GATHER = 0.02  # seconds in which requests that come together are put into one batch


def name_weights(names: list[str], aliases: list[str]) -> dict[str, Weights]:
    """What is served by name, the base last. Raises UserError if not all are of one base."""
    if aliases and len(aliases) != len(names):
        raise UserError(f"{len(aliases)} --name for {len(names)} models; give one for each")
    found: dict[str, Weights] = {}
    for i, name in enumerate(names):
        weights = find_weights(name)
        alias = aliases[i] if aliases else trained_for(weights) or Path(name).name
        if alias in found:
            raise UserError(f"two are called {alias}; give each its own name by --name")
        found[alias] = weights
    (first, base), *others = sorted(found.items(), key=lambda item: not item[1].adapter)
    for alias, other in others:
        for what in ("model", "revision", "four_bits", "overrides"):
            ours, theirs = getattr(base, what), getattr(other, what)
            if ours != theirs and (what != "revision" or (ours and theirs)):
                raise UserError(f"{first} needs {what} {ours}, {alias} {theirs}; serve them apart")
    if base.adapter and not base.four_bits:  # else the base that is served is not the published one
        found.setdefault(Path(base.model).name if is_local(base.model) else base.model, Weights(base.model))
    return found


def vllm_line(served: dict[str, Weights], host: str, port: int) -> list[str]:
    """The command line of vLLM. Raises UserError for what it cannot serve."""
    base = next(iter(served.values()))
    adapters = {name: w.adapter for name, w in served.items() if w.adapter}
    if base.four_bits:
        raise UserError("vLLM has no base rounded to 4 bits as in training; merge the adapters")
    line = ["vllm", "serve", base.model, "--host", host, "--port", str(port)]
    line += ["--generation-config", "vllm", "--served-model-name"]
    line += [n for n, w in served.items() if not w.adapter]
    line += ["--revision", base.revision] if base.revision else []
    line += ["--hf-overrides", json.dumps(base.overrides)] if base.overrides else []
    if adapters:
        rank = max(PeftConfig.from_pretrained(path).r for path in adapters.values())
        if rank > RANKS[-1]: raise UserError
        line += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(min(r for r in RANKS if r >= rank))]
        line += ["--lora-modules", *(f"{n}={p}" for n, p in adapters.items())]
        template = Path(base.adapter) / "chat_template.jinja"
        line += ["--chat-template", str(template)] if template.is_file() else []
    return line


class Chat(BaseModel):
    model: str
    messages: list[dict]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: dict = {}


class Job:
    """A request in its batch: its prompt, the tokens so far, and the queue of its text's parts."""

    def __init__(self, ...)
