"""A request of /v1/chat/completions from its acceptance to its last piece of text.

The answer comes from an engine's thread piece by piece, and goes out whole or as a stream of
server-sent events, in the shapes of OpenAI's API; `timings` beside them is llama.cpp's.
"""

import asyncio
import json
import queue
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError

from common.cli import one_line
from inference.chat_request import Chat
from inference.http_requests import Refusal
from inference.serving_engine import FAILED, Engine, Job

LONGEST_UNASKED = 512  # tokens of an answer whose length the client leaves open
GONE = 499  # as nginx calls it: the client closed the connection; nobody reads this answer


def error_body(status: int, message: str, param: str | None = None, code: str | None = None):
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
        yield self._event({"role": "assistant", "content": ""})
        try:
            async for part in self.parts():
                yield self._event({"content": part})
        except Refusal as error:
            yield f"data: {json.dumps(error_body(error.status_code, error.detail))}\n\n"
            return
        yield self._event({}, finish_reason=self.job.finish)
        if self.asked.counts_usage:
            yield self._write([], usage=self.usage)
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        more = {"timings": self.job.timings} if finish_reason else {}
        if self.asked.counts_usage:
            more["usage"] = None  # of all events but the last
        return self._write([choice], **more)

    def _write(self, choices: list[dict], **more: object) -> str:
        chunk = self.about | {"object": "chat.completion.chunk", "choices": choices} | more
        return f"data: {json.dumps(chunk)}\n\n"


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
