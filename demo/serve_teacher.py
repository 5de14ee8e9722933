"""An extractive teacher behind an OpenAI-compatible endpoint on loopback, for the demo.

LexRank writes one summary and Luhn's method another (both by sumy); which is the longer one, the
prompt says. Each is rated by measures of it against the text. The answer has the format that
prompts/summarize/teacher.jinja asks for. With a command after `--`, serves only while the command
runs, which finds the endpoint in TOGETHER_BASE_URL and a placeholder key; keys and endpoints of
the surrounding environment are not passed on.

    python -m demo.serve_teacher -- python -m data_prep.generate_replies --help
"""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pysbd
from sumy.evaluation import cosine_similarity
from sumy.models import TfDocumentModel
from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence
from sumy.nlp.stemmers import Stemmer
from sumy.summarizers.lex_rank import LexRankSummarizer
from sumy.summarizers.luhn import LuhnSummarizer
from sumy.utils import get_stop_words

from common.cli import run, script_parser
from demo.endpoint import Endpoint

MODEL = "extractive-lexrank"
STOP_WORDS = get_stop_words("english")
LONG, SHORT = 60, 45  # words a summary aims at


class Tokenizer:
    """What sumy needs of a tokenizer, without the data that its own would download."""

    def to_sentences(self, text: str) -> list[str]:
        return [s.strip() for s in pysbd.Segmenter(language="en").segment(text) if s.strip()]

    def to_words(self, text: str) -> list[str]:
        return [w for w in map(_bare, text.split()) if w]


def _bare(word: str) -> str:
    return word.strip(".,;:!?()[]\"'").lower()


def pick_sentences(document, summarizer, words: int) -> str:
    """The best sentences in the order of the text, as many as bring it nearest to `words`."""
    summarizer.stop_words = STOP_WORDS
    sentences = [str(s) for s in document.sentences]
    best = sentences
    for count in range(1, len(sentences)):
        with np.errstate(invalid="ignore"):  # LexRank on sentences that share no word
            chosen = [str(s) for s in summarizer(document, count)]
        if chosen and abs(_n_words(chosen) - words) < abs(_n_words(best) - words):
            best = chosen
    return " ".join(best)


def _n_words(sentences: list[str]) -> int:
    return sum(len(s.split()) for s in sentences)


def rate(summary: str, text: str) -> dict[str, int]:
    """The four criteria, each a measure of the summary's words or sentences against the text's."""
    tokenizer = Tokenizer()

    def content(part: str) -> TfDocumentModel:
        words = [w for w in tokenizer.to_words(part) if w not in STOP_WORDS]
        return TfDocumentModel(words or ["-"])

    def grade(share: float, highest: int) -> int:
        return 1 + round((highest - 1) * share)

    def share(marks: list[bool]) -> float:
        return sum(marks) / len(marks)

    sentences = tokenizer.to_sentences(summary) or [summary]
    # Sentences that follow one another in the text hang together; of one alone, half is said.
    joins = [f"{a} {b}" in text for a, b in pairwise(sentences)] or [True, False]
    whole = [s[:1].isupper() and s.endswith((".", "!", "?")) for s in sentences]
    return {
        "Coherence": grade(share(joins), 5),
        "Consistency": grade(share([s in text for s in sentences]), 5),
        "Fluency": grade(share(whole), 3),
        "Relevance": grade(cosine_similarity(content(summary), content(text)), 5),
    }


def answer(prompt: str) -> str:
    """Two summaries with ratings of the text that the teacher's prompt encloses."""
    text = prompt.partition("<text>\n")[2].rpartition("\n</text>")[0].strip()
    flat = " ".join(text.split())
    tokenizer = Tokenizer()
    sentences = [Sentence(s, tokenizer) for s in tokenizer.to_sentences(flat) or [flat]]
    document = ObjectDocumentModel([Paragraph(sentences)])
    summaries = [
        pick_sentences(document, LexRankSummarizer(Stemmer("english")), LONG),
        pick_sentences(document, LuhnSummarizer(Stemmer("english")), SHORT),
    ]
    asked = prompt.rpartition("</text>")[2]
    summaries.sort(key=len, reverse="Make the first summary a bit shorter" not in asked)
    parts, totals = [], []
    for number, summary in enumerate(summaries, 1):
        scores = rate(summary, flat)
        totals.append(sum(scores.values()))
        lines = [f"{label}: {score}" for label, score in scores.items()]
        parts.append(
            "\n".join(
                [
                    f"Summary {number}:",
                    summary,
                    *lines,
                    f"Total score: {totals[-1]}",
                    "Explanation: computed from the words and sentences it shares with the text.",
                ]
            )
        )
    # Of two with the same total, the longer, wherever it stands.
    best = max((0, 1), key=lambda i: (totals[i], len(summaries[i])))
    parts.append(f"Best summary: {best + 1}")
    return "\n\n".join(parts)


def count_words(prompt: str, reply: str, most: int) -> tuple[int, int]:
    return len(prompt.split()), len(reply.split())


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("command", nargs="*", help="what to run against the endpoint, after --")
    args = parser.parse_args()
    endpoint = Endpoint(answer, model=MODEL, count_tokens=count_words, port=args.port)
    if not args.command:
        reach = f"TOGETHER_BASE_URL={endpoint.url} TOGETHER_API_KEY=local"
        print(f"serving {MODEL}; {reach}", flush=True)
        endpoint.thread.join()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TOGETHER_")}
    environment |= {"TOGETHER_BASE_URL": endpoint.url, "TOGETHER_API_KEY": "local"}
    process = subprocess.Popen(args.command, env=environment)
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:
            continue  # the command gets the same signal and ends in its own way


if __name__ == "__main__":
    run(main)
