"""Serve adapters over one copy of their base, on an OpenAI-compatible endpoint.

`model` picks the adapter, by its run's task or its folder's name, or the base. With vLLM on a GPU
this is `vllm serve` (inference/vllm_line.py). Elsewhere requests of one adapter that wait at the
same time are answered in one batch (inference/serving_engine.py), greedily, as
inference/run_task.py answers; inference/chat_api.py says what the endpoint understands.

    python -m inference.serve smollm2-135m-dpo-sft-lora title-smollm2-135m-dpo-sft-lora
"""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import torch
import uvicorn

from common.cli import UserError, port, positive, run, script_parser, warn
from inference.adapters import check_adapter
from inference.chat_api import LOCAL, make_app
from inference.serving_engine import Engine
from inference.vllm_line import find_vllm, vllm_line
from inference.weights import Weights, base_of, find_weights, trained_for


def base_name(model: str) -> str:
    """A base's name for clients: the folder's, or the Hub id."""
    return Path(model).name if Path(model).exists() else model


def describe(name: str, weights: Weights) -> str:
    rounded = "in 4 bits" if weights.four_bits else None
    return " ".join(filter(None, [name, weights.model, weights.revision, rounded]))


def check_one_base(served: dict[str, Weights]) -> None:
    """Raise UserError if what is served together (name -> weights) needs unlike bases."""
    bases, revisions = set(), set()
    for weights in served.values():
        path = Path(weights.model)
        base = str(path.resolve()) if path.exists() else weights.model  # however it is written
        bases.add((base, bool(weights.four_bits)))
        if weights.revision:
            revisions.add(weights.revision)
    if len(bases) > 1 or len(revisions) > 1:
        needed = ", ".join(describe(name, weights) for name, weights in served.items())
        raise UserError(f"serve them apart, they need unlike bases: {needed}")


def find_served(models: list[str], names: list[str]) -> dict[str, Weights]:
    """name -> weights, the adapters first, then their base if it is served as published.

    Raises UserError if they need unlike bases, or a name stands twice.
    """
    weights_of_models = [find_weights(model) for model in models]
    if not names:
        pairs = zip(models, weights_of_models, strict=True)
        names = [trained_for(weights.adapter) or Path(model).name for model, weights in pairs]
    if len(names) != len(models) or len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: give every model a name of its own by --name")
    served = dict(zip(names, weights_of_models, strict=True))
    check_one_base(served)
    for name, weights in served.items():
        if weights.adapter:
            check_adapter(name, weights.adapter)
    base = base_of(served)
    if not base.four_bits and all(weights.adapter for weights in weights_of_models):
        served[base_name(base.model)] = base
    return dict(sorted(served.items(), key=lambda item: not item[1].adapter))


class Server(uvicorn.Server):
    """Says where it listens, once it does. Told to end, it first lets the engine tell those who
    wait, so that none holds it up."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        host, port = self.config.host, self.servers[0].sockets[0].getsockname()[1]
        address = f"[{host}]" if ":" in host else host
        print(f"{', '.join(self.engine.served)} on http://{address}:{port}/v1", flush=True)

    def handle_exit(self, sig, frame) -> None:
        self.engine.stop()
        super().handle_exit(sig, frame)


def serve_here(engine: Engine, host: str, port: int) -> None:
    """Answer requests in this process until it is told to end."""
    hosts = LOCAL if host in LOCAL else None
    app = make_app(engine, hosts)
    if not hosts:
        warn(f"there is no key: whoever reaches {host}:{port} can ask")
    ending = {"timeout_graceful_shutdown": 1}  # seconds for what is still on its way
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", **ending)
    with suppress(KeyboardInterrupt):  # which uvicorn raises anew when it has ended well
        Server(config, engine).run()
    # The engine's thread may be deep in a forward pass, over which Python's own end would crash.
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("models", nargs="+", help="runs, folders or Hub ids: adapters of one base, or a model")
    option("--name", nargs="+", default=[], help="what to call them, one for each")
    option("--host", default="127.0.0.1", help="0.0.0.0 for all networks; there is no key")
    option("--port", type=port, default=8000, help="of the endpoint")
    option("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: by machine)")
    option("--batch", type=positive, default=16, help="most requests that are answered together")
    option("--print", action="store_true", help="only print the line of vLLM")
    args = parser.parse_args()
    served = find_served(args.models, args.name)
    vllm = find_vllm() if torch.cuda.is_available() else None
    if not (args.print or vllm):
        return serve_here(Engine(served, args.batch, args.dtype), args.host, args.port)
    line = vllm_line(served, base_of(served), args.host, args.port)
    print(shlex.join(line), flush=True)
    if not args.print:
        os.execv(vllm, line)


if __name__ == "__main__":
    run(main)
