"""Count the tokens of texts, exactly as tokenizing each whole would, several times faster."""

import os
import re
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from common.cli import UserError
from common.files import read_json

WORD_BEGINS = re.compile(r"(?<=\S)(?= \S)")  # before a single space
PROBE = ' Two words, a (b) "c" 1 22 x. Y é ß 漢 字 -- ; \'s $x$ \\foo {a} _b_ 3.5 % ﬁ end'


class TokenCounter:
    """Remembers the counts of words, unless its tokenizer looks across single spaces."""

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.no_truncation()
        self.tokenizer, cutter = tokenizer, tokenizer.pre_tokenizer
        pieces = cutter.pre_tokenize_str(PROBE) if cutter else [(PROBE, (0, len(PROBE)))]
        plain = not tokenizer.normalizer or tokenizer.normalizer.normalize_str(PROBE) == PROBE
        self.by_words = plain and all(" " not in PROBE[a + 1 : b] for _, (a, b) in pieces)
        self.count_word = lru_cache(1 << 17)(self.count_whole)

    def count_whole(self, text: str) -> int:
        return len(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def count(self, text: str, enough: int = sys.maxsize) -> int:
        """The number of tokens; of a text with `enough` or more, any number from there up."""
        if not self.by_words:
            return self.count_whole(text)
        *words, rest = WORD_BEGINS.split(text, enough)
        number = sum(map(self.count_word, words))
        return number if number >= enough else number + self.count_whole(rest)


@lru_cache
def load_counter(name: str) -> TokenCounter:
    """The counter of a model folder's tokenizer, or of one on the Hub. Raises UserError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core per task
    file = Path(name) / "tokenizer.json"
    try:
        if file.exists():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except Exception:  # the tokenizers package raises plain Exception
        why = "it is no model's folder, and the Hub does not have it or does not answer"
        raise UserError(f"no tokenizer at {name}: {why}; name another, --tokenizer") from None
    return TokenCounter(tokenizer)


def context_of(name: str) -> int | None:
    """The most tokens that the model of a folder, or on the Hub, reads; None if it is not told."""
    from huggingface_hub import hf_hub_download

    file = Path(name) / "config.json"
    with suppress(Exception):  # what the Hub, a proxy and a broken cache raise is of many kinds
        if not Path(name).is_dir():
            file = Path(hf_hub_download(name, "config.json"))
        return int(read_json(file)["max_position_embeddings"])
    return None
