"""How the servers here, of `just serve` and of `just play`, read the body of a request.

What cannot be read raises Refusal, with a message for the client.
"""

import json
from typing import Annotated, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ValidationError
from starlette.exceptions import HTTPException

from common.cli import one_line
from common.text import whole

Model = TypeVar("Model", bound=BaseModel)


class Refusal(HTTPException):
    """An error that the client is told; `param` is the field at fault, `code` OpenAI's word."""

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


def whole_text(value: object) -> object:
    return whole(value) if isinstance(value, str) else value


WholeText = Annotated[str, BeforeValidator(whole_text)]  # half an emoji is no error


async def read_body(request: Request, most: int) -> bytes:
    """A body of at most `most` bytes.

    Of a larger one as much again is read and dropped: a client that is still sending would find a
    broken connection in place of the refusal.
    """
    said = f"it is over {most // 10**6} MB"
    too_large = Refusal(413, said, headers={"Connection": "close"})
    told_length = request.headers.get("content-length", "0")
    if not told_length.isdecimal() or int(told_length[:20]) > 2 * most:
        raise too_large
    body, length = bytearray(), 0
    async for part in request.stream():
        length += len(part)
        if length > 2 * most:
            break
        if length <= most:
            body += part
    if length > most:
        raise too_large
    return bytes(body)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_object(body: bytes) -> dict:
    """The JSON object that a body is."""
    try:
        asked = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {one_line(error, 100)}") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "the request must be a JSON object")
    return asked


def validate(kind: type[Model], asked: dict) -> Model:
    """What is asked, checked as `kind` says; the first field at fault is named."""
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = place_of(first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    raise Refusal(400, whole(f"{param}: {said}"), param)


def place_of(keys: tuple[str | int, ...]) -> str:
    """Where a field stands: ("messages", 0, "role") is messages[0].role."""
    place = ""
    for key in keys:
        place += f"[{key}]" if isinstance(key, int) else f".{key}"
    return place.removeprefix(".")
