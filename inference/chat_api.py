"""OpenAI's dialect over an engine: /v1/chat/completions, /v1/models, /v1/models/ID and /health.

As the official client and others speak it (platform.openai.com/docs/api-reference/chat);
inference/chat_request.py says what is understood. Errors have OpenAI's shape.
"""

import time
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from common.cli import warn
from inference.chat_request import read_chat
from inference.conversation import EventStream, answer_or_give_up, error_body, start_conversation
from inference.http_requests import Refusal, read_body
from inference.serving_engine import Engine
from inference.weights import Weights
from training.config import fingerprint

LARGEST_BODY = 10 * 10**6  # bytes
LOCAL = frozenset(("127.0.0.1", "localhost", "::1"))


def host_in(address: str) -> str | None:
    """The host that an address names, None if it cannot be read."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def check_caller(request: Request, hosts: frozenset[str] | None) -> None:
    """Refuse what a web page of elsewhere makes a browser on this machine ask (DNS rebinding, and
    requests that need no permission). `hosts`: the names of this server, None for any."""
    host = host_in(f"//{request.headers.get('host', '')}") or ""
    if hosts and host not in hosts:
        raise Refusal(400, "this server answers to its own address alone; Host names another")
    origin = request.headers.get("origin")
    if origin and (host_in(origin) or "null") not in (hosts or LOCAL | {host}):
        raise Refusal(403, "a web page of another address may not ask this server")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind and not kind.endswith("json"):
        raise Refusal(403, f"send application/json, not {kind}, which any web page could send")


def model_cards(served: dict[str, Weights], created: int) -> dict[str, dict]:
    """name -> what /v1/models tells of it. `parent` is an adapter's base, `root` the folder or the
    Hub id of the weights, `fingerprint` tells them from others of that name."""
    bases = [name for name, weights in served.items() if not weights.adapter]
    cards = {}
    for name, weights in served.items():
        source = weights.adapter or weights.model
        parent = (bases or ["in 4 bits"])[0] if weights.adapter else None
        cards[name] = {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "parent": parent,
            "root": Path(source).name if Path(source).exists() else source,
            "fingerprint": fingerprint(source),
        }
    return cards


def tell_refusal(_: Request, error: HTTPException) -> JSONResponse:
    more = (getattr(error, "param", None), getattr(error, "code", None))
    body = error_body(error.status_code, error.detail, *more)
    return JSONResponse(body, error.status_code, headers=error.headers)


def tell_failure(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "it failed; the server says why"), 500)


class ChatServer:
    """What clients ask for, an address a method; `hosts` are the names that requests may use for
    it, None for any."""

    def __init__(self, engine: Engine, hosts: frozenset[str] | None):
        self.engine, self.hosts = engine, hosts
        self.cards = model_cards(engine.served, int(time.time()))
        self.warned = False

    async def check(self, request: Request) -> None:
        check_caller(request, self.hosts)

    async def health(self) -> dict:
        return {"status": "ok", "waiting": len(self.engine.waiting)}

    async def models(self) -> dict:
        return {"object": "list", "data": list(self.cards.values())}

    async def model(self, name: str) -> dict:
        if name not in self.cards:
            raise Refusal(404, f"no model {name[:200]}", "model", "model_not_found")
        return self.cards[name]

    async def chat(self, request: Request) -> Response:
        asked = read_chat(await read_body(request, LARGEST_BODY))
        if asked.temperature and not self.warned:
            self.warned = True
            warn("decoding is greedy here, whatever temperature, top_p or seed a request names")
        conversation = await start_conversation(self.engine, asked)
        if asked.stream:
            return EventStream(conversation)
        return await answer_or_give_up(conversation, request)


def make_app(engine: Engine, hosts: frozenset[str] | None = LOCAL) -> FastAPI:
    server = ChatServer(engine, hosts)
    closed = {"docs_url": None, "redoc_url": None, "openapi_url": None}  # they load from a CDN
    app = FastAPI(dependencies=[Depends(server.check)], **closed)
    app.exception_handler(HTTPException)(tell_refusal)
    app.exception_handler(Exception)(tell_failure)
    app.get("/health")(server.health)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.model)
    app.post("/v1/chat/completions")(server.chat)
    return app
