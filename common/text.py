"""Text that comes from outside is data: its control tokens are made plain, its words found.

A control token is what a model's template writes around turns; a text that quotes one is no turn.
"""

import re
from collections.abc import Iterable

import regex

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


# Scripts that put no space between words are read letter by letter; a letter keeps its marks.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})[\w\p{{M}}])+")


def words_of(text: str) -> list[str]:
    """The words of a text in any script, in lower case; of English those that `\\w+` finds."""
    return WORD.findall(text.lower())


def count_words(text: str) -> int:
    """How many words a text has: parts between spaces, or letters of a script without spaces."""
    unspaced = regex.search(UNSPACED, text)
    return len(words_of(text)) if unspaced else len(text.split())
