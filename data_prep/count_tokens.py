"""Count tokens exactly as tokenizing a whole text would, several times faster."""

import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from common.cli import UserError

WORD_BEGINS = re.compile(r"(?<=\S)(?= \S)")  # before a single space
PROBE = 'Two words, a (b) "c" 1 22 x. Y é ß 漢 字 -- ; \'s $x$ \\foo {a} _b_ 3.5 % end'
MOST_REMEMBERED = 1 << 17  # words: some 20 MB


class TokenCounter:
    """Counts the tokens of texts.

    Most tokenizers cut a text before every single space and then look at each piece alone, so the
    counts of the pieces add up. A text has few pieces that were not met before: remembering their
    counts is what makes this fast. Any other tokenizer is given whole texts.
    """

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.no_truncation()
        self.tokenizer, self.adds_up = tokenizer, cuts_at_spaces(tokenizer)
        self.count_word = lru_cache(MOST_REMEMBERED)(self._tokenize)

    def count(self, text: str, enough: int = sys.maxsize) -> int:
        """The number of tokens; of a text with `enough` or more, any number from there up."""
        *words, rest = WORD_BEGINS.split(text, enough) if self.adds_up else [text]
        number = sum(map(self.count_word, words))
        return number if number >= enough else number + self._tokenize(rest)

    def _tokenize(self, text: str) -> int:
        return len(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether `tokenizer` begins a piece at each single space, whatever stands around it."""
    settings, cutter = json.loads(tokenizer.to_str()), tokenizer.pre_tokenizer
    normalizer = settings["normalizer"] or {"normalizers": []}
    if {part["type"] for part in normalizer.get("normalizers", [normalizer])} - {"NFC"}:
        return False  # others may touch spaces; NFC composes nothing with one
    if any(" " in t["content"] or t["lstrip"] or t["rstrip"] for t in settings["added_tokens"]):
        return False  # added tokens are found before the text is cut
    starts = {start for _, (start, _) in cutter.pre_tokenize_str(PROBE)} if cutter else set()
    return starts >= {i for i, character in enumerate(PROBE) if character == " "}


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a model folder or from the Hub. Raises UserError."""
    try:
        local = Path(name) / "tokenizer.json"
        if local.exists():
            return Tokenizer.from_file(str(local))
        return Tokenizer.from_pretrained(name)
    except Exception:  # the tokenizers package raises plain Exception
        raise UserError(
            f"no tokenizer at {name}: not a folder with tokenizer.json, and not to be had from the "
            "Hub; pass --tokenizer FOLDER (`hf download NAME --local-dir FOLDER` makes one)"
        ) from None


@lru_cache
def load_counter(name: str) -> TokenCounter:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core per task
    return TokenCounter(load_tokenizer(name))
