"""The sentences of a text."""

import re

from pysbd import Segmenter

SEGMENTER = Segmenter(language="en", clean=False)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, paragraph by paragraph, white space made single."""
    sentences = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        whole = " ".join(paragraph.split())
        found = [sentence.strip() for sentence in SEGMENTER.segment(whole)]
        # pysbd loses a character of some odd punctuation; such a paragraph stays in one piece.
        complete = "".join(found).replace(" ", "") == whole.replace(" ", "")
        sentences += filter(None, found if complete else [whole])
    return sentences
