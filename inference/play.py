"""A page to try adapters on: a text goes to several systems, whose answers stream side by side.

A click on the better one of several answers is kept in data/TASK/choices.jsonl, of which
`just pairs --rejected choices` makes preference pairs.

    python -m inference.play --url http://127.0.0.1:8000
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from common.cli import UserError, one_line, port, run, script_parser
from common.pages import render
from data_prep.decode_text import without_commands
from data_prep.fetch_page import MOST_BYTES, Page
from data_prep.read_document import Document, is_address, load, parse
from inference.choices import Choice, keep_records, records_of
from inference.http_requests import Refusal, read_body, read_object, validate
from prompts.task import FOLDER, Task, load_task

MOST_JSON_BYTES = 1_000_000  # of a conversation, or of a choice
MOST_PARSERS, MOST_WAITING = 2, 8
FORM_TYPES = ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class PlayOptions:
    """What a page is of."""

    url: str  # of the endpoint, without /v1
    tasks: tuple[Task, ...]  # that the page shows
    task_names: frozenset[str]  # of all that there are, after which adapters are named
    data: Path  # choices are kept in DATA/TASK

    @property
    def main_task(self) -> str:
        """Of the adapters that are named after no task."""
        shown = [task.name for task in self.tasks]
        return "summarize" if "summarize" in shown else shown[0]


def find_models(url: str) -> dict[str, dict]:
    """id -> {adapter, fingerprint} of each model that is served: whether it is an adapter, which
    has a parent, and what tells its weights, if it says so. Nothing if no endpoint answers."""
    models = {}
    odd = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    with suppress(httpx.HTTPError, httpx.InvalidURL, *odd):
        answer = httpx.get(f"{url}/v1/models", timeout=10, trust_env=False).raise_for_status()
        for card in answer.json()["data"]:
            fingerprint = card.get("fingerprint")
            told = fingerprint if isinstance(fingerprint, str) else None
            models[card["id"]] = {"adapter": bool(card.get("parent")), "fingerprint": told}
    return models


def ways_of(task: Task) -> list[dict]:
    """How a task's text is asked: bare, as its adapters were trained, and instructed.

    \\0 in the messages is the text, `template` the digest of the template around it.
    """
    ways = []
    for name in ("base", "instructed"):
        template = task.student_template(name == "instructed")
        way = {"title": task.title(name), "messages": task.student_messages("\0", template)}
        ways.append(way | {"template": task.sha(template) if template else None})
    return ways


def systems_of(task: Task, models: dict[str, dict], options: PlayOptions) -> list[dict]:
    """What a task's text can go to: its adapters, bare, and every other model in both ways.

    An adapter is of the task that it is named after, else of the page's main task.
    """
    ways = ways_of(task)
    of_task = {"task": task.name, "longest": task.max_new_tokens}
    adapters, bases = [], []
    for name, model in models.items():
        if not model["adapter"]:
            for way in ways:
                bases.append({"id": name, "about": name, **model, **way, **of_task})
            continue
        home = name if name in options.task_names else options.main_task
        if home == task.name:
            titled = {"id": name, "about": "adapter", **model, **ways[0], "title": name}
            adapters.append(titled | of_task)
    return adapters + bases


def describe(task: Task, models: dict[str, dict], options: PlayOptions) -> dict:
    """What the page knows of a task."""
    return {"name": task.name, "systems": systems_of(task, models, options)}


def media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def refuse_strangers(request: Request, call_next) -> Response:
    """Refuse with 403 what another site's page lets a browser post here, without being asked.

    A browser says where a request comes from. Types that a form can send need no permission of
    this server's, and its own page sends none of them.
    """
    headers = request.headers
    own = f"http://{headers.get('host', '')}"
    is_foreign = (
        headers.get("origin", own) != own
        or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        or media_type_of(request) in FORM_TYPES
    )
    if request.method not in ("GET", "HEAD") and is_foreign:
        return told("this page takes texts from itself alone, not from other sites", 403)
    return await call_next(request)


def told(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)


def tell_refusal(_: Request, error: HTTPException) -> JSONResponse:
    return told(error.detail, error.status_code)


def field_of(body: bytes, name: str, kind: type) -> object:
    """A field of the JSON object that a body is. Raises Refusal if it is of another kind."""
    asked = read_object(body)
    if not isinstance(asked.get(name), kind):
        what = {str: "a string", list: "a list"}[kind]
        raise Refusal(400, f"the request must be a JSON object with {name}, {what}")
    return asked[name]


async def read_text(body: bytes, media_type: str) -> Document:
    """The document that a request's body is, or names as JSON. Raises Refusal."""
    try:
        if media_type != "application/json":
            return await asyncio.to_thread(parse, Page(body))
        address = field_of(body, "address", str)
        if not is_address(address):
            raise UserError(f"{address} is no address; https://... or arXiv:ID is one")
        return await asyncio.to_thread(load, address)
    except UserError as error:
        said = one_line(without_commands(str(error))).split("; --private")[0]
        raise Refusal(400, said) from None


async def pieces_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    with suppress(httpx.HTTPError):  # the page sees that the answer has no end
        async for piece in answer.aiter_bytes():
            yield piece


class PlayServer:
    """What the page asks for, an address a method."""

    def __init__(self, options: PlayOptions):
        self.options = options
        self.client = httpx.AsyncClient(timeout=None, trust_env=False)
        self.n_reading = 0  # requests whose documents are being read, or wait for it
        self.turns = asyncio.Semaphore(MOST_PARSERS)

    def page(self) -> HTMLResponse:
        url = self.options.url
        models = find_models(url)
        tasks = [describe(task, models, self.options) for task in self.options.tasks]
        return HTMLResponse(render("inference/play.html.jinja", url=url, tasks=tasks))

    async def read(self, request: Request) -> dict:
        if self.n_reading >= MOST_WAITING:
            raise Refusal(503, "other documents are being read; try again in a while")
        self.n_reading += 1
        try:
            body = await read_body(request, MOST_BYTES)
            async with self.turns:
                document = await read_text(body, media_type_of(request))
        finally:
            self.n_reading -= 1
        return {"text": document.text, "notes": document.notes}

    async def chat(self, request: Request) -> StreamingResponse:
        """Pass a conversation on to the endpoint, and its answer back as it comes."""
        body = await read_body(request, MOST_JSON_BYTES)
        field_of(body, "messages", list)
        headers = {"Content-Type": "application/json"}
        address = f"{self.options.url}/v1/chat/completions"
        question = self.client.build_request("POST", address, content=body, headers=headers)
        try:
            answer = await self.client.send(question, stream=True)
        except httpx.TransportError:
            said = f"{self.options.url} is gone; start `just serve RUN` again"
            raise Refusal(502, said) from None
        kind = answer.headers.get("content-type", "application/json")
        return StreamingResponse(pieces_of(answer), answer.status_code, media_type=kind)

    async def choose(self, request: Request) -> dict:
        """Keep which answer is the better one; tells how many pairs that makes, and where."""
        choice = validate(Choice, read_object(await read_body(request, MOST_JSON_BYTES)))
        if choice.task not in [task.name for task in self.options.tasks]:  # it is part of a path
            raise Refusal(400, "task: there is no such task on this page", "task")
        records = records_of(choice, self.options.url)
        if not records:
            raise Refusal(400, "the answers beside it say the same; there is nothing to choose")
        path = self.options.data / choice.task / "choices.jsonl"
        try:
            await asyncio.to_thread(keep_records, path, records)
        except (UserError, OSError) as error:
            raise Refusal(500, f"it could not be kept: {one_line(error)}") from None
        return {"pairs": len(records), "path": str(path)}


def make_app(options: PlayOptions) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(refuse_strangers)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app.exception_handler(HTTPException)(tell_refusal)
    server = PlayServer(options)
    app.get("/")(server.page)
    app.post("/read")(server.read)
    app.post("/v1/chat/completions")(server.chat)
    app.post("/choices")(server.choose)
    return app


def make_options(url: str, task: str | None, prompts_dir: Path, data: Path) -> PlayOptions:
    """A page of one task, or of all of a folder. Raises UserError for a faulty one."""
    names = sorted(path.parent.name for path in prompts_dir.glob("*/task.yaml"))
    shown = [task] if task else names
    tasks = tuple(load_task(name, prompts_dir) for name in shown)
    if not tasks:
        raise UserError(f"{prompts_dir} holds no task; `just new-task NAME` makes one")
    return PlayOptions(url, tasks, frozenset(names), data)


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--url", default="http://127.0.0.1:8000", help="of `just serve`")
    option("--port", type=port, default=7860, help="of the page, on 127.0.0.1")
    option("--task", help="show this one alone (default: all in --prompts-dir)")
    option("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    option("--data", type=Path, default=Path("data"), help="where choices are kept: DATA/TASK")
    args = parser.parse_args()
    url = args.url.rstrip("/").removesuffix("/v1")
    options = make_options(url, args.task, args.prompts_dir, args.data)
    if not find_models(url):
        raise UserError(f"no endpoint at {url}; start one with `just serve RUN`")
    uvicorn.run(make_app(options), host="127.0.0.1", port=args.port, access_log=False)


if __name__ == "__main__":
    run(main)
