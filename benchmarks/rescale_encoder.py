"""Compute the rescale baseline of an encoder: its mean BERTScore of unrelated sentences.

As bert-score's own baselines (Zhang et al. 2020, section 5): sentences of different articles are
paired at random. Reads articles ({"text"} a line), adds a row to results/rescale_baselines.csv.

    python -m benchmarks.rescale_encoder data/demo/wikipedia.jsonl --encoder models/minilm --layer 6
"""

import random
from pathlib import Path

import numpy as np
import pandas as pd

from common.cli import positive, run, script_parser
from common.files import load_records, replacing
from eval.bertscore import BASELINES, PARTS, BertScore, encoder_key
from eval.sentences import split_sentences


def unrelated_pairs(texts: list[str], n: int, seed: int = 0) -> list[tuple[str, str]]:
    """`n` pairs of sentences, each of two different texts."""
    rng = random.Random(seed)
    articles = [found for text in texts if (found := split_sentences(text[:20_000]))]
    return [tuple(rng.choice(a) for a in rng.sample(articles, 2)) for _ in range(n)]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("articles", type=Path, help="JSON Lines with a text each")
    parser.add_argument("--encoder", required=True, help="Hub id or folder")
    parser.add_argument("--layer", type=positive, required=True, help="layer to compare")
    parser.add_argument("--n", type=positive, default=10_000, help="pairs")
    args = parser.parse_args()
    texts = [record["text"] for record in load_records(args.articles, ("text",))]
    scorer = BertScore(args.encoder, args.layer, batch_size=64)
    answers, references = zip(*unrelated_pairs(texts, args.n), strict=True)
    found = scorer(list(answers), [{"reference": reference} for reference in references])
    means = [round(float(np.mean(found[part])), 6) for part in PARTS]
    row = {"encoder": Path(args.encoder).name, "weights": encoder_key(args.encoder)}
    row |= {"layer": args.layer, **dict(zip("PRF", means, strict=True)), "pairs": args.n}
    rows = [pd.read_csv(BASELINES)] if BASELINES.is_file() else []
    with replacing(BASELINES) as temporary:
        pd.concat([*rows, pd.DataFrame([row])]).to_csv(temporary, index=False)
    print(f"{BASELINES}: {row}")


if __name__ == "__main__":
    run(main)
