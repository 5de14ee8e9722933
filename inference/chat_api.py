"""OpenAI's dialect over an engine: /v1/chat/completions, /v1/models, /v1/models/ID and /health.

As the official client and others speak it (platform.openai.com/docs/api-reference/chat). Decoding
is greedy: temperature, top_p, seed and the like are taken and change nothing. What would change
the answer and is not done here (several answers, log-probabilities, tools, JSON, penalties) is
refused by the name of its field; what is unknown is passed over. Errors have OpenAI's shape.
"""

import asyncio
import json
import queue
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.exceptions import HTTPException

from common.cli import one_line, warn
from common.text import whole
from inference.serving_engine import FAILED, Engine, Job
from inference.weights import Weights
from training.config import fingerprint

LARGEST_BODY = 10 * 2**20  # bytes
LONGEST_UNASKED = 512  # tokens of an answer whose length the client leaves open
LOCAL = frozenset(("127.0.0.1", "localhost", "::1"))
GONE = 499  # as nginx calls it: the client closed the connection; nobody reads this answer
# Fields that would change the answer, and the values of each that ask for nothing of the kind.
NEUTRAL = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
}


class Refusal(HTTPException):
    """An error that the client is told in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None):
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_content(content: object) -> object:
    """A message's text; of a list of parts, theirs, a line each as vLLM puts them together."""
    if isinstance(content, str):
        return whole(content)
    if not isinstance(content, list) or not content:
        raise ValueError("must be text, or a list of parts of the type text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = kind if isinstance(kind, str) else "another kind"
            raise ValueError(f"only parts of the type text are read here, not {what[:40]}")
    return whole("\n".join(part["text"] for part in content))


def read_name(name: object) -> object:
    return whole(name) if isinstance(name, str) else name


def read_stops(stops: object) -> object:
    if stops is None:
        return []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4:
        raise ValueError("must be a text or up to 4 texts")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be texts that are not empty")
    return [whole(stop) for stop in stops]


def read_tool_calls(calls: object) -> None:
    if calls:
        raise ValueError("there are no tools here")


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(read_content)]
    tool_calls: Annotated[None, BeforeValidator(read_tool_calls)] = None


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Chat(BaseModel):
    """What a client asks."""

    model: Annotated[str, BeforeValidator(read_name)]
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    stop: Annotated[list[str], BeforeValidator(read_stops)] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: object = None

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer, the fewer where both fields name some."""
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n]
        return min(given, default=None)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """As chat templates know it; the developer is what they call system."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages]


async def read_body(request: Request) -> bytes:
    """Raises Refusal for a body that is too large, before the whole of it is read."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            said = f"the request has more than {LARGEST_BODY >> 20} MB"
            raise Refusal(413, said, headers={"Connection": "close"})
    return bytes(body)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_chat(body: bytes) -> Chat:
    """Raises Refusal for whatever is no request that can be answered."""
    try:
        asked = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {one_line(error, 100)}") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "the request is no JSON object")
    for name, neutral in NEUTRAL.items():
        if asked.get(name) is not None and asked[name] not in neutral:
            said = f"{name} is not known to this server; leave it out"
            raise Refusal(400, said, name, "unsupported_parameter")
    try:
        return Chat.model_validate(asked)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = ""
    for key in first["loc"]:
        param += f"[{key}]" if isinstance(key, int) else f".{key}"
    param = param.removeprefix(".")
    said = first["msg"].removeprefix("Value error, ")
    raise Refusal(400, whole(f"{param}: {said}"), param)


def check_caller(request: Request, hosts: frozenset[str] | None) -> None:
    """Refuse what a web page of elsewhere makes a browser on this machine ask (DNS rebinding, and
    requests that need no permission). `hosts`: the names of this server, None for any."""

    def name_in(address: str) -> str | None:
        try:
            return urlsplit(address).hostname
        except ValueError:
            return None

    host = name_in(f"//{request.headers.get('host', '')}") or ""
    if hosts and host not in hosts:
        raise Refusal(400, "this server answers to its own address alone; Host names another")
    origin = request.headers.get("origin")
    if origin and (name_in(origin) or "null") not in (hosts or LOCAL | {host}):
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


class Conversation:
    """One request from its acceptance to its last piece of text."""

    def __init__(self, engine: Engine, asked: Chat, prompt_ids: list[int]):
        self.engine, self.asked = engine, asked
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        room = engine.context - len(prompt_ids)
        if room < (asked.longest or 1):
            said = f"{len(prompt_ids)} tokens and the answer are beyond the context"
            said += f" of {engine.context}"
            raise Refusal(400, said, "messages", "context_length_exceeded")
        self.job = Job(
            engine.answerers[asked.model],
            prompt_ids,
            asked.longest or min(LONGEST_UNASKED, room),
            self._receive,
            stops=asked.stop,
            streams=bool(asked.stream),
        )
        self.about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def _receive(self, piece: str | None) -> None:
        """Called in the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: the server has ended
            self.job.gone = True

    @property
    def usage(self) -> dict[str, int]:
        n_prompt, n_new = len(self.job.prompt_ids), len(self.job.ids)
        counts = {"prompt_tokens": n_prompt, "completion_tokens": n_new}
        return counts | {"total_tokens": n_prompt + n_new}

    async def parts(self) -> AsyncIterator[str]:
        """The answer piece by piece. Raises Refusal if it fails."""
        while (piece := await self.pieces.get()) is not None:
            yield piece
        if self.job.finish == "error":
            raise Refusal(500 if self.job.error == FAILED else 503, self.job.error)

    async def whole(self) -> dict:
        text = "".join([part async for part in self.parts()])
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = self.job.finish
        kind = {"object": "chat.completion", "choices": [choice]}
        return self.about | kind | {"usage": self.usage, "timings": self.job.timings}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: the role once, the pieces, why it ended, and the usage if asked."""
        options = self.asked.stream_options
        counted = bool(options and options.include_usage)

        def event(choices: list[dict], usage: dict | None = None, **more: object) -> str:
            chunk = self.about | {"object": "chat.completion.chunk", "choices": choices} | more
            if counted:
                chunk["usage"] = usage
            return f"data: {json.dumps(chunk)}\n\n"

        def choice(delta: dict, finish: str | None = None) -> list[dict]:
            return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

        yield event(choice({"role": "assistant", "content": ""}))
        try:
            async for part in self.parts():
                yield event(choice({"content": part}))
        except Refusal as error:
            yield f"data: {json.dumps(error_body(error.status_code, error.detail))}\n\n"
            return
        yield event(choice({}, self.job.finish), timings=self.job.timings)
        if counted:
            yield event([], self.usage)
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A conversation's events; it gives up the request as soon as the client is gone, also before
    its first event."""

    def __init__(self, conversation: Conversation):
        super().__init__(conversation.events(), media_type="text/event-stream")
        self.conversation = conversation

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.conversation.engine.drop(self.conversation.job)


async def start_conversation(engine: Engine, asked: Chat) -> Conversation:
    """Queue a request. Raises Refusal for one that cannot be answered."""
    if asked.model not in engine.answerers:
        there = ", ".join(engine.answerers)
        said = f"no model {asked.model[:200]}; there are {there}"
        raise Refusal(404, said, "model", "model_not_found")
    try:
        # In a thread, for a long text takes seconds and others are to be answered meanwhile.
        ids = await asyncio.to_thread(engine.prompt_ids, asked.model, asked.conversation)
    except (TemplateError, TypeError, ValueError) as error:
        said = f"the chat template of {asked.model} does not take them: {one_line(error, 200)}"
        raise Refusal(400, said, "messages") from None
    conversation = Conversation(engine, asked, ids)
    try:
        engine.submit(conversation.job)
    except queue.Full:
        said = "too many requests wait here; come again"
        raise Refusal(503, said, code="overloaded", headers={"Retry-After": "5"}) from None
    return conversation


async def until_gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer_or_give_up(conversation: Conversation, request: Request) -> Response:
    """The whole answer, or nothing as soon as nobody waits for it."""
    answer = asyncio.create_task(conversation.whole())
    gone = asyncio.create_task(until_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answer.result()) if answer.done() else Response(status_code=GONE)
    finally:
        answer.cancel()
        gone.cancel()
        conversation.engine.drop(conversation.job)


def make_app(engine: Engine, hosts: frozenset[str] | None = LOCAL) -> FastAPI:
    """The endpoint; `hosts` are the names that requests may use for it, None for any."""

    async def guard(request: Request) -> None:
        check_caller(request, hosts)

    closed = {"docs_url": None, "redoc_url": None, "openapi_url": None}  # they load from a CDN
    app = FastAPI(dependencies=[Depends(guard)], **closed)
    cards = model_cards(engine.served, int(time.time()))
    told = set()

    @app.exception_handler(HTTPException)
    async def refuse(_, error: HTTPException) -> JSONResponse:
        more = (getattr(error, "param", None), getattr(error, "code", None))
        body = error_body(error.status_code, error.detail, *more)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fail(_, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "it failed; the server says why"), 500)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "waiting": len(engine.waiting)}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        if name not in cards:
            raise Refusal(404, f"no model {name[:200]}", "model", "model_not_found")
        return cards[name]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read_chat(await read_body(request))
        if asked.temperature and not told:
            told.add("greedy")
            warn("decoding is greedy here, whatever temperature, top_p or seed a request names")
        conversation = await start_conversation(engine, asked)
        if asked.stream:
            return EventStream(conversation)
        return await answer_or_give_up(conversation, request)

    return app
