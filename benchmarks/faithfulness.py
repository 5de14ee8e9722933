"""Hold the measure of faithfulness against human ratings of consistency.

Reads a JSON Lines file in SummEval's shape (Fabbri et al. 2021), one answer a line:

    {"text": the document, "decoded": the summary, "expert_annotations": [{"consistency": 1 to 5}]}

and prints the rank correlations with the mean rating.

    python -m benchmarks.faithfulness RATINGS.jsonl --nli microsoft/deberta-xlarge-mnli
"""

from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, spearmanr
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import load_records
from eval.measures import Entailment


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("ratings", type=Path, help="JSON Lines in SummEval's shape")
    parser.add_argument("--nli", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    parser.add_argument("--batch-size", type=positive, default=32, help="pairs at once")
    args = parser.parse_args()
    records = load_records(args.ratings, ("text", "decoded", "expert_annotations"))
    entailment = Entailment(args.nli, args.batch_size)
    ours, humans = [], []
    for record in tqdm(records, desc="answers", unit="text"):
        ours += entailment([record["decoded"]], [record])["faithfulness"]
        humans.append(np.mean([note["consistency"] for note in record["expert_annotations"]]))
    if len(set(humans)) < 2 or len(set(ours)) < 2:
        raise UserError(f"{args.ratings}: all ratings or all scores are equal, nothing to compare")
    print(
        f"faithfulness by {args.nli} against human consistency, n = {len(ours)}: "
        f"Spearman {spearmanr(ours, humans)[0]:+.3f}, Kendall {kendalltau(ours, humans)[0]:+.3f}"
    )


if __name__ == "__main__":
    run(main)
