"""A page to try adapters on: a text goes to several systems, whose answers stream side by side.

python -m inference.play --url http://127.0.0.1:8000
"""

import asyncio
import json
from argparse import ArgumentTypeError
from contextlib import suppress

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from common.cli import UserError, one_line, run, script_parser
from common.pages import render
from data_prep.decode_text import clean
from data_prep.fetch_page import MOST_BYTES, Page
from data_prep.read_document import Document, is_address, load, parse
from prompts.task import FOLDER, Task, load_task

MOST_CHAT_BYTES = 1_000_000
MOST_PARSERS, MOST_WAITING = 2, 8
FORM_TYPES = ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded")


def find_models(url: str) -> dict[str, bool]:
    """What is served, and whether it is an adapter, which has a parent; nothing if none answers."""
    odd = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    with suppress(httpx.HTTPError, httpx.InvalidURL, *odd):
        answer = httpx.get(f"{url}/v1/models", timeout=10, trust_env=False).raise_for_status()
        return {model["id"]: bool(model.get("parent")) for model in answer.json()["data"]}
    return {}


def describe(task: Task) -> dict:
    """What the page knows of it; \\0 in the messages, bare and instructed, is the text."""
    templates = {name: task.student_template(name != "base") for name in ("base", "instructed")}
    asked = [[task.title(n), task.student_messages("\0", t)] for n, t in templates.items()]
    return {"name": task.name, "longest": task.max_new_tokens, "asked": asked}


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


async def read_body(request: Request, most: int) -> bytes:
    """A body of at most `most` bytes. Raises HTTPException, before it is read where it can be."""
    too_large = HTTPException(413, f"it is over {most // 10**6} MB")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


def read_object(body: bytes, needed: str, kind: type) -> dict:
    """A JSON object whose field `needed` is of a kind. Raises HTTPException."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not JSON") from None
    if not isinstance(asked, dict) or not isinstance(asked.get(needed), kind):
        what = {str: "a string", list: "a list"}[kind]
        raise HTTPException(400, f"the request must be a JSON object with {needed}, {what}")
    return asked


async def read(body: bytes, media_type: str) -> Document:
    """The document that a request's body is, or names as JSON. Raises HTTPException."""
    try:
        if media_type != "application/json":
            return await asyncio.to_thread(parse, Page(body))
        address = read_object(body, "address", str)["address"]
        if not is_address(address):
            raise UserError(f"{address} is no address; https://... or arXiv:ID is one")
        return await asyncio.to_thread(load, address)
    except UserError as error:
        raise HTTPException(400, one_line(clean(str(error))).split("; --private")[0]) from None


def make_app(url: str) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    client = httpx.AsyncClient(timeout=None, trust_env=False)
    app.middleware("http")(refuse_strangers)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    waiting = []  # requests whose documents are being read
    turns = asyncio.Semaphore(MOST_PARSERS)

    @app.exception_handler(HTTPException)
    def refuse(_, error: HTTPException) -> JSONResponse:
        return told(error.detail, error.status_code)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        tasks = [describe(load_task(p.parent.name)) for p in sorted(FOLDER.glob("*/task.yaml"))]
        return render("inference/play.html.jinja", url=url, tasks=tasks, models=find_models(url))

    @app.post("/read")
    async def read_one(request: Request) -> dict:
        if len(waiting) >= MOST_WAITING:
            raise HTTPException(503, "other documents are being read; try again in a while")
        waiting.append(request)
        try:
            body = await read_body(request, MOST_BYTES)
            async with turns:
                document = await read(body, media_type_of(request))
        finally:
            waiting.remove(request)
        return {"text": document.text, "notes": document.notes}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await read_body(request, MOST_CHAT_BYTES)
        read_object(body, "messages", list)
        headers = {"Content-Type": "application/json"}
        address = f"{url}/v1/chat/completions"
        question = client.build_request("POST", address, content=body, headers=headers)
        try:
            got = await client.send(question, stream=True)
        except httpx.TransportError:
            raise HTTPException(502, f"{url} is gone; start `just serve RUN` again") from None

        async def parts():
            with suppress(httpx.HTTPError):  # the page sees that the answer has no end
                async for part in got.aiter_bytes():
                    yield part

        kind = got.headers.get("content-type", "application/json")
        return StreamingResponse(parts(), got.status_code, media_type=kind)

    return app


def port(text: str) -> int:
    """A port's number, for argparse; 0 is any that is free."""
    if not 0 <= (number := int(text)) < 2**16:
        raise ArgumentTypeError(f"{text} is no port, from 0 to 65535")
    return number


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of `just serve`")
    parser.add_argument("--port", type=port, default=7860, help="of the page, on 127.0.0.1")
    args = parser.parse_args()
    url = args.url.rstrip("/").removesuffix("/v1")
    if not find_models(url):
        raise UserError(f"no endpoint at {url}; start one with `just serve RUN`")
    uvicorn.run(make_app(url), host="127.0.0.1", port=args.port, access_log=False)


if __name__ == "__main__":
    run(main)
