"""What a client may ask of /v1/chat/completions, in OpenAI's dialect.

Decoding is greedy: temperature, top_p, seed and the like are taken and change nothing. What would
change the answer and is not done here (several answers, log-probabilities, tools, JSON, penalties)
is refused by the name of its field; what is unknown is passed over.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field

from inference.http_requests import Refusal, WholeText, read_object, validate

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


def parts_of(content: object) -> object:
    """A message's text as a list of parts, which clients may send as well."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return content
    raise ValueError("must be text, or a list of parts of the type text")


def stops_of(stops: object) -> object:
    """One text or several as a list."""
    if stops is None:
        return []
    return [stops] if isinstance(stops, str) else stops


def no_tool_calls(calls: object) -> None:
    if calls:
        raise ValueError("there are no tools here")


class Part(BaseModel):
    type: Literal["text"]
    text: WholeText


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(parts_of), Field(min_length=1)]
    tool_calls: Annotated[None, BeforeValidator(no_tool_calls)] = None

    @property
    def text(self) -> str:
        """Its parts, a line each as vLLM puts them together."""
        return "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Chat(BaseModel):
    """What a client asks."""

    model: WholeText
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    stop: Annotated[
        list[Annotated[WholeText, Field(min_length=1)]],
        BeforeValidator(stops_of),
        Field(max_length=4),
    ] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: object = None

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer, the fewer where both fields name some."""
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n]
        return min(given, default=None)

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """As chat templates know it; the developer is what they call system."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.text} for m in self.messages]


def read_chat(body: bytes) -> Chat:
    """Raises Refusal for whatever is no request that can be answered."""
    asked = read_object(body)
    for name, neutral in NEUTRAL.items():
        if asked.get(name) is not None and asked[name] not in neutral:
            said = f"{name} is not known to this server; leave it out"
            raise Refusal(400, said, name, "unsupported_parameter")
    return validate(Chat, asked)
