"""Summarize the test documents with every system and score them: two stages, one command.

python -m eval.evaluate axolotl_configs/smollm2-135m-dpo-sft-lora.yaml --n 32
"""

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.cli import run, script_parser
from eval.generate_summaries import add_generation_options, summarize_all
from eval.score_summaries import add_scoring_options, score_all
from eval.systems import add_run_options, load_test_rows, systems_of
from training.run_config import check_model_folder, load_run_config


def main() -> None:
    parser = script_parser(__doc__)
    for add_options in (add_run_options, add_generation_options, add_scoring_options):
        add_options(parser)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    config = load_run_config(args.config)
    check_model_folder(args.encoder)
    systems_of(config, args.systems)
    rows = load_test_rows(config, args.n)
    summarize_all(config, rows, args)
    score_all(config, rows, args)


if __name__ == "__main__":
    run(main)
