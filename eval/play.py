"""A page to try adapters on: a text goes to several systems, whose answers stream side by side.

python -m eval.play --url http://127.0.0.1:8000
"""

import asyncio
from contextlib import suppress

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from common.cli import UserError, one_line, run, script_parser
from eval.build_report import render
from eval.read_document import is_address, read_document, to_text
from prompts import FOLDER, Task, load_task


def find_models(url: str) -> dict[str, bool]:
    """What is served, and whether it is an adapter, which has a parent; nothing if none answers."""
    with suppress(httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
        answer = httpx.get(f"{url}/v1/models", timeout=10, trust_env=False).raise_for_status()
        return {model["id"]: bool(model.get("parent")) for model in answer.json()["data"]}
    return {}


def describe(task: Task) -> dict:
    """What the page knows of it; \\0 in the messages, bare and instructed, is the text."""
    templates = {name: task.student_template(name != "base") for name in ("base", "instructed")}
    asked = [[task.title(n), task.student_messages("\0", t)] for n, t in templates.items()]
    return {"name": task.name, "longest": task.max_new_tokens, "asked": asked}


def make_app(url: str) -> FastAPI:
    app, client = FastAPI(), httpx.AsyncClient(timeout=None, trust_env=False)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.exception_handler(HTTPException)
    def refuse(_, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        tasks = [describe(load_task(p.parent.name)) for p in sorted(FOLDER.glob("*/task.yaml"))]
        return render("play.html.jinja", url=url, tasks=tasks, models=find_models(url))

    @app.post("/read")
    async def read(request: Request) -> dict:
        try:
            if request.headers.get("content-type") != "application/json":
                return {"text": await asyncio.to_thread(to_text, await request.body())}
            if not is_address(address := (await request.json())["address"]):
                raise UserError(f"{address} is no address; https://... or arXiv:ID is one")
            return {"text": await asyncio.to_thread(read_document, address)}
        except Exception as error:  # what parsers raise is of many kinds
            raise HTTPException(400, one_line(error).split("; --private")[0]) from None

    @app.post("/v1/chat/completions")
    async def chat(asked: dict) -> StreamingResponse:
        question = client.build_request("POST", f"{url}/v1/chat/completions", json=asked)
        try:
            got = await client.send(question, stream=True)
        except httpx.TransportError:
            raise HTTPException(502, f"{url} is gone; start `just serve RUN` again") from None

        async def parts():
            with suppress(httpx.TransportError):  # the page sees that the answer has no end
                async for part in got.aiter_bytes():
                    yield part

        return StreamingResponse(parts(), got.status_code, media_type=got.headers["content-type"])

    return app


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of `just serve`")
    parser.add_argument("--port", type=int, default=7860, help="of the page, on 127.0.0.1")
    args = parser.parse_args()
    url = args.url.rstrip("/").removesuffix("/v1")
    if not find_models(url):
        raise UserError(f"no endpoint at {url}; start one with `just serve RUN`")
    uvicorn.run(make_app(url), host="127.0.0.1", port=args.port, access_log=False)


if __name__ == "__main__":
    run(main)
