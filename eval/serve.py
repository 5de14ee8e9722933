"""Serve adapters over one copy of their base, on an OpenAI-compatible endpoint.

`model` picks the adapter, by its run's task or its folder's name, or the base. With vLLM on a GPU
this is `vllm serve`. Elsewhere requests that wait at the same time are answered in one batch,
whichever adapters they name (peft's mixed batches), greedily, as eval/run_task.py answers.

    python -m eval.serve smollm2-135m-dpo-sft-lora title-smollm2-135m-dpo-sft-lora
"""

import json
import os
import queue
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from common.cli import UserError, one_line, positive, run, script_parser, warn
from eval.generate_answers import generate_batch
from eval.load_model import Weights, find_weights, load_model, load_tokenizer, trained_for

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
GATHER = 0.02  # seconds; requests that come within them are answered together


def find_served(models: list[str], names: list[str]) -> dict[str, Weights]:
    """name -> weights, the adapters first, then their base. Raises UserError if it is not one."""
    found = [find_weights(model) for model in models]
    own = [trained_for(one.adapter) or Path(m).name for one, m in zip(found, models, strict=True)]
    served = dict(zip(names or own, found, strict=False))
    if len(served) < len(models) or len(names) not in (0, len(models)):
        raise UserError(f"{', '.join(names or own)}: give every model a name of its own by --name")
    bases = {(one.model, bool(one.four_bits)) for one in found}
    revisions = {one.revision for one in found if one.revision}
    if len(bases) > 1 or len(revisions) > 1:
        needed = [
            " ".join(filter(None, [name, one.model, one.revision, one.four_bits and "in 4 bits"]))
            for name, one in served.items()
        ]
        raise UserError(f"serve them apart, they need unlike bases: {', '.join(needed)}")
    base = Weights(found[0].model, next(iter(revisions), None), four_bits=found[0].four_bits)
    if not base.four_bits and all(one.adapter for one in found):
        served[Path(base.model).name if Path(base.model).exists() else base.model] = base
    return dict(sorted(served.items(), key=lambda item: not item[1].adapter))


def vllm_line(served: dict[str, Weights], args) -> list[str]:
    """The command line of vLLM. Raises UserError for adapters that it cannot take."""
    from peft import PeftConfig  # late, for what it says on a CPU comes before ours otherwise

    *_, base = served.values()
    adapters = {name: one.adapter for name, one in served.items() if one.adapter}
    rank = max((PeftConfig.from_pretrained(path).r for path in adapters.values()), default=1)
    if base.four_bits or rank > RANKS[-1]:
        reason = f"their rank {rank} is too large, or their base is to be rounded to 4 bits"
        raise UserError(f"vLLM cannot serve {', '.join(adapters)}: {reason}")
    line = ["vllm", "serve", base.model, "--host", args.host, "--port", str(args.port)]
    line += ["--served-model-name", *(name for name in served if name not in adapters)]
    line += ["--generation-config", "vllm"]  # not the model's own sampling
    line += ["--revision", base.revision] if base.revision else []
    if adapters:
        fitting = next(most for most in RANKS if most >= rank)
        line += f"--enable-lora --max-loras {len(adapters)} --max-lora-rank {fitting}".split()
        line += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    return line


class Chat(BaseModel):
    """What a client asks; all else that the API knows is passed over."""

    model: str
    messages: list[dict[str, str]] = Field(min_length=1)
    max_tokens: int | None = Field(None, gt=0)
    stream: bool = False


def hand_out(jobs: list[SimpleNamespace], ends: list[int], ids: torch.Tensor, *_) -> torch.Tensor:
    """Give each request of a batch its newest token; which of them are done."""
    for job, token in zip(jobs, ids[:, -1].tolist(), strict=True):
        if job.finish:
            continue
        if token in ends:
            job.finish = "stop"
        else:
            job.ids.append(token)
            job.finish = "length" if len(job.ids) == job.longest else None
        job.news.put(job.finish)
    return torch.tensor([bool(job.finish) for job in jobs], device=ids.device)


class Server:
    """One model in memory with its adapters, and a thread that answers what waits."""

    def __init__(self, served: dict[str, Weights], batch: int, dtype: str | None):
        from peft import PeftModel

        *_, base = served.values()
        # The batch's tokenizer pads, and must not be used by a request's thread meanwhile.
        self.model, self.tokenizer = load_model(replace(base, adapter=None), dtype)
        self.tokenizers = {name: load_tokenizer(one) for name, one in served.items()}
        # Name -> what peft calls it; the adapters come first.
        self.adapters = {}
        for number, (name, one) in enumerate(served.items()):
            if one.adapter and not number:
                self.model = PeftModel.from_pretrained(self.model, one.adapter, "0").eval()
            elif one.adapter:
                self.model.load_adapter(one.adapter, str(number))
            self.adapters[name] = str(number) if one.adapter else "__base__"
        self.waiting, self.batch = queue.Queue(), batch
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        """Answer batch after batch; what fails in one does not stop the next."""
        while True:
            jobs = [self.waiting.get()]
            time.sleep(GATHER)
            while len(jobs) < self.batch and not self.waiting.empty():
                jobs.append(self.waiting.get())
            ends = self.model.generation_config.eos_token_id
            how = {"stopping_criteria": [partial(hand_out, jobs, ends)]}
            if hasattr(self.model, "peft_config"):
                how["adapter_names"] = [job.adapter for job in jobs]
            prompts, longest = [job.prompt for job in jobs], max(job.longest for job in jobs)
            try:
                generate_batch(self.model, self.tokenizer, prompts, longest, **how)
            except Exception as error:  # such as too little memory
                warn(f"{len(jobs)} requests failed: {one_line(error)}")
                for job in jobs:
                    job.news.put("error")

    def accept(self, asked: Chat) -> SimpleNamespace:
        """Queue a request, whose `news` gets a word on each of its tokens: None, or why it was the
        last one. Raises HTTPException for a request that cannot be answered."""
        if asked.model not in self.adapters:
            there = ", ".join(self.adapters)
            raise HTTPException(404, f"no model {asked.model}; there are {there}")
        tokenizer = self.tokenizers[asked.model]
        to_prompt = tokenizer.apply_chat_template
        prompt = to_prompt(asked.messages, tokenize=False, add_generation_prompt=True)
        n_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        room = self.model.config.max_position_embeddings - n_prompt
        if room < (asked.max_tokens or 1):
            raise HTTPException(400, f"{n_prompt} tokens and the answer are beyond the context")
        job = SimpleNamespace(adapter=self.adapters[asked.model], prompt=prompt, n_prompt=n_prompt)
        job.longest, job.finish = asked.max_tokens or min(512, room), None
        job.ids, job.news, job.tokenizer = [], queue.Queue(), tokenizer
        self.waiting.put(job)
        return job

    def parts(self, job: SimpleNamespace) -> Iterator[str]:
        """The answer's text, piece by piece as it comes. Raises HTTPException if it fails."""
        sent, finish = "", None
        try:
            while not finish:
                if (finish := job.news.get()) == "error":
                    raise HTTPException(500, "it could not be answered; the server says why")
                text = job.tokenizer.decode(job.ids, skip_special_tokens=True).strip()
                if finish or not text.endswith("\ufffd"):  # half a character
                    yield text[len(sent) :]
                    sent = text
        finally:
            job.finish = job.finish or "gone"  # where the client reads no further


def make_app(server: Server) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(HTTPException)
    def refuse(_, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    @app.get("/v1/models")
    def models() -> dict:
        about = {"object": "model", "created": 0, "owned_by": "local"}
        base = {key: name for name, key in server.adapters.items()}.get("__base__", "in 4 bits")
        parents = {name: base if name != base else None for name in server.adapters}
        cards = [{"id": name, "parent": parent, **about} for name, parent in parents.items()]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions")
    def chat(asked: Chat):
        job, created = server.accept(asked), int(time.time())

        def reply(kind: str, **choice: object) -> dict:
            about = {"id": f"chatcmpl-{id(job)}", "created": created, "model": asked.model}
            usage = {"prompt_tokens": job.n_prompt, "completion_tokens": len(job.ids)}
            usage["total_tokens"] = job.n_prompt + len(job.ids)
            choices = [{"index": 0, "finish_reason": None, **choice}]
            return {**about, "object": kind, "choices": choices, "usage": usage}

        def events() -> Iterator[str]:
            for part in server.parts(job):
                delta = {"role": "assistant", "content": part}
                yield f"data: {json.dumps(reply('chat.completion.chunk', delta=delta))}\n\n"
            last = reply("chat.completion.chunk", delta={}, finish_reason=job.finish)
            yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"

        if asked.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        message = {"role": "assistant", "content": "".join(server.parts(job))}
        return reply("chat.completion", message=message, finish_reason=job.finish)

    return app


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("models", nargs="+", help="runs, folders or Hub ids: adapters of one base, or a model")
    option("--name", nargs="+", default=[], help="what to call them, one for each")
    option("--host", default="127.0.0.1", help="0.0.0.0 for all networks; there is no key")
    option("--port", type=int, default=8000, help="of the endpoint")
    option("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: by machine)")
    option("--batch", type=positive, default=16, help="most requests that are answered together")
    option("--print", action="store_true", help="only print the line of vLLM")
    args = parser.parse_args()
    served = find_served(args.models, args.name)
    vllm = shutil.which("vllm") if torch.cuda.is_available() else None
    if args.print or (vllm and not any(one.four_bits for one in served.values())):
        line = vllm_line(served, args)
        print(shlex.join(line), flush=True)
        return None if args.print else os.execv(vllm, line)
    app = make_app(Server(served, args.batch, args.dtype))
    print(f"{', '.join(served)} on http://{args.host}:{args.port}/v1", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    run(main)
