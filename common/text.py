"""Text from outside is data: decoded as its bytes say, its control tokens plain, its words found.

A control token is what a model's template writes around turns; a text that quotes one is no turn.
"""

import codecs
import re
from collections.abc import Iterable

import regex

# <|im_end|>, <|eot_id|>, DeepSeek's with wide bars (U+FF5C), Gemma's <start_of_turn>, <bos>, ...
CONTROL_TOKEN = re.compile(
    r"<(?=[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|(?:start_of_turn|end_of_turn|bos|eos|pad)>)"
)
BRACKETED = re.compile(r"[<\[].+[>\]]")


def control_tokens(tokenizer) -> list[str]:
    """The tokens that mean something to the model and must not be read out of a text."""
    template = str(tokenizer.chat_template or "")
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or token.content in template) and BRACKETED.fullmatch(token.content)
    ]


def plain_text(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` with a space behind the first character of every control token: `< |im_end|>`.

    A tokenizer then reads it letter by letter. Known are the forms above and, where a tokenizer
    is at hand, its own `tokens` (`control_tokens`). Done twice it changes no more.
    """
    text = CONTROL_TOKEN.sub("< ", text)
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, which begins alike
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
NULS_OF_ASCII = {  # where the NULs lie in the first four bytes of a text that begins in ASCII
    (0, 1, 0, 1): "utf-16-le",
    (1, 0, 1, 0): "utf-16-be",
    (0, 1, 1, 1): "utf-32-le",
    (1, 1, 1, 0): "utf-32-be",
}


def encoding_of(head: bytes) -> str:
    """The encoding of a text by its first four bytes: UTF-16 or UTF-32 of either order, or UTF-8.

    A byte order mark tells; without one the NULs beside its first two characters do, which are
    ASCII in any JSON.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    nuls = tuple(int(byte == 0) for byte in head[:4])
    return NULS_OF_ASCII.get(nuls, "utf-8")


def decode(line: bytes) -> str:
    """A line in UTF-8 as text; one in which nothing but ASCII is UTF-8 is read as Windows-1252.

    What is neither becomes U+FFFD, so that a torn character costs itself and not its line.
    """
    try:
        return line.decode()
    except UnicodeDecodeError:
        text = line.decode("utf-8", "replace")
    beyond_ascii = set(re.findall(r"[^\x00-\x7f]", text))
    return line.decode("cp1252", "replace") if beyond_ascii == {"\ufffd"} else text


def utf8(text: str) -> bytes:
    """`text` in UTF-8. Half a surrogate pair (half an emoji), which UTF-8 lacks, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        in_pairs = text.encode("utf-16-le", "surrogatepass")  # two halves side by side are one
        return in_pairs.decode("utf-16-le", "replace").encode()


def whole(text: str) -> str:
    """`text` as it is read again once it was written: with no half of a surrogate pair in it."""
    return utf8(text).decode()


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


def likeness(texts: list[str]) -> list[float]:
    """How like a text is to all of them, itself among them, 0 to 1: the mean of ROUGE-L's F1 of
    words (Lin 2004)."""
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import cdist

    words = [words_of(text) or [""] for text in texts]
    return cdist(words, words, scorer=Indel.normalized_similarity).mean(axis=1).tolist()


def without_folder(name: str) -> str:
    """The name of a model; of one that is a path of some machine the last part."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", "~/")) else name
