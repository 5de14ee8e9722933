"""Text that comes from outside is data: what could be read as a control token is made plain."""

import re
from collections.abc import Iterable

# <|im_end|>, <|eot_id|>, DeepSeek's with wide bars (U+FF5C), Gemma's <start_of_turn>, <bos>, ...
CONTROL_TOKEN = re.compile(
    r"<(?=[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|(?:start_of_turn|end_of_turn|bos|eos|pad)>)"
)


def plain_text(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` with a space behind the first character of every control token: `< |im_end|>`.

    A tokenizer then reads it letter by letter. Known are the forms above and, where a tokenizer
    is at hand, its own `tokens` (training.chat.control_tokens). Done twice it changes no more.
    """
    text = CONTROL_TOKEN.sub("< ", text)
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
