"""Evaluate a run: merge its adapter, answer the test documents, score, report, record.

All stages in one process; answers that are there are not made again. With --scores-only it scores
and reports them, and records only with --record.

    python -m eval.evaluate smollm2-135m-dpo-sft-lora --n 32
"""

import shlex
import sys

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.cli import run, script_parser
from eval.build_report import add_report_options, report
from eval.generate_answers import add_generation_options, answer_all
from eval.merge_adapter import merge_run
from eval.score_answers import add_scoring_options, score_all
from eval.systems import add_run_options, load_test_rows, systems_of
from training.run_config import load_run_config


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_generation_options(parser)
    add_scoring_options(parser)
    add_report_options(parser)
    parser.add_argument("--scores-only", action="store_true", help="score the answers there are")
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    config = load_run_config(args.config)
    if not args.scores_only:
        merge_run(config)
        args.record = args.record or shlex.join(["just", "eval", *sys.argv[1:]])
    systems_of(config, args.systems)
    rows = load_test_rows(config, args.n)
    if not args.scores_only:
        answer_all(config, rows, args)
    score_all(config, rows, args)
    report(config, args.record, args.ledger)


if __name__ == "__main__":
    run(main)
