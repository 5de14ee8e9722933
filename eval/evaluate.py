"""Evaluate a run: merge its adapter, answer the test documents, score, report, record.

Answers that are there are kept. `--scores-only` reports on those, and records only with --record.

    python -m eval.evaluate smollm2-135m-dpo-sft-lora --n 32
"""

import shlex
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.cli import run, script_parser
from eval.answer_texts import (
    add_endpoint_options,
    add_generation_options,
    answer_all,
    answer_options,
)
from eval.bertscore import check_encoder
from eval.entailment import check_entailment_model
from eval.report import LEDGER, record, write_report
from eval.score_answers import add_scoring_options, score_all, scoring_options
from eval.systems import add_run_options, load_test_rows, run_of
from inference.merge_adapter import merge_run
from training.config import check_model_folder


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    add_run_options(parser)
    add_generation_options(parser)
    add_endpoint_options(parser)
    add_scoring_options(parser)
    option("--scores-only", action="store_true", help="score the answers that are there")
    option("--record", metavar="NOTE", help="add the scores to the ledger, with this note")
    option("--ledger", type=Path, default=LEDGER, help="file of all runs")
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    config = run_of(args)
    check_model_folder(args.encoder)
    if "bertscore" in config.task.measures:
        check_encoder(args.encoder, args.encoder_layers)
    if "faithfulness" in config.task.measures and args.nli:
        check_entailment_model(args.nli)
    rows = load_test_rows(config, args.n)
    note = args.record
    if not args.scores_only:
        merge_run(config)
        answer_all(config, rows, args.systems, answer_options(args))
        note = note or shlex.join(["just", "eval", *sys.argv[1:]])
    scores, answers = score_all(config, rows, args.systems, scoring_options(args))
    write_report(config.eval_dir, scores, rows, answers, config.task)
    print((config.eval_dir / "scores.md").read_text().split("## More")[0])
    print(f"more in {config.eval_dir / 'report.html'}")
    if note is not None:
        record(scores, note, args.ledger)


if __name__ == "__main__":
    run(main)
