"""Texts to a staged dataset: extracts, replies, pairs, stage, each of which goes on where it was.

Takes the options of its stages and gives each stage those that it knows. Of one that means other
things to several stages, --max-tokens, say which: --extracts-max-tokens, --replies-max-tokens. The
key and the ceiling on the dollars are asked for first, before anything is sampled.

    TOGETHER_API_KEY=... python -m data_prep.make_dataset --budget-usd 25
"""

import argparse
import subprocess
import sys

from common.cli import UserError, run
from data_prep import build_dataset, build_pairs, generate_replies, sample_extracts
from data_prep.teacher import client
from data_prep.teacher.endpoints import check_endpoints
from data_prep.teacher.prices import price_of
from prompts.task import task_of

MODULES = {
    "extracts": "data_prep.sample_extracts",
    "replies": "data_prep.generate_replies",
    "pairs": "data_prep.build_pairs",
    "stage": "data_prep.build_dataset",
}
OF_EXTRACTS_TOO = (
    "--data",
    "--tokenizer",
    "--licence",
)  # beside the options that only the extracts know
AMBIGUOUS = ("--max-tokens",)  # of an extract, of a reply
# Of the replies alone; the verdicts of `--verify` keep their own.
OF_REPLIES_ALONE = (
    "--temperature",
    "--batch",
    "--poll-seconds",
    "--retry-refused",
    "--retry-unusable",
)


def stages_of(option: str, parsers: dict[str, argparse.ArgumentParser]) -> list[str]:
    """The stages that an option is for; one that nobody knows is left to the extracts to refuse."""
    knowing = [stage for stage in parsers if option in parsers[stage]._option_string_actions]
    if option in OF_REPLIES_ALONE:
        return ["replies"]
    if not knowing or option in OF_EXTRACTS_TOO:
        return ["extracts", *knowing]
    return knowing


def route(
    arguments: list[str], parsers: dict[str, argparse.ArgumentParser], parser
) -> dict[str, list[str]]:
    """stage -> its part of the command line. Wrong usage ends the process with exit code 2."""
    routed: dict[str, list[str]] = {stage: [] for stage in MODULES}
    receiving: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            stage = option.removeprefix("--").split("-")[0]
            if option in AMBIGUOUS:
                parser.error(f"{option}: --extracts{option[1:]} or --replies{option[1:]}?")
            elif option == "--plan":
                parser.error("--plan: `just plan` says what the replies would cost")
            elif stage in MODULES and option != f"--{stage}":
                receiving = [stage]
                argument = f"--{option.removeprefix(f'--{stage}-')}{equals}{value}"
            else:
                receiving = stages_of(option, parsers)
        if not receiving:
            parser.error(f"{argument}: options alone are taken")
        for stage in receiving:
            routed[stage].append(argument)
    return routed


def check_first(replies: argparse.Namespace, pairs: argparse.Namespace) -> None:
    """Ask for the key, for whose answers are rejected where the teacher writes one and, before
    extracts are sampled for hours, for the ceiling. Raises UserError."""
    options = client.ask_options(replies)
    one = replies.single or task_of(replies).answers == 1
    if one and "teacher" in pairs.rejected and not pairs.prompt_sha:
        raise UserError("the teacher writes one answer to each text: say whose are rejected, "
                        "--rejected none (for SFT), corrupted, student or a RUN")  # fmt: skip
    check_endpoints(options.base_url, options.batch)
    if not (replies.data / "extracts/made.json").exists():
        client.check_ceiling(options, price_of(options.model, options.price, options.batch))


def run_module(module: str, arguments: list[str]) -> int:
    """Run a stage to its end; return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the stage gets the same signal and ends in its own way


def main() -> None:
    parsers = {
        "replies": generate_replies.make_parser(),
        "pairs": build_pairs.make_parser(),
        "stage": build_dataset.make_parser(),
    }
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="The options are those of the stages: see `just extracts --help`, `just replies "
        "--help`, `just pairs --help`, `just stage --help`. --STAGE-OPTION gives one to one stage.",
    )
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        parser.parse_args(["--help"])
    routed = route(arguments, parsers, parser)
    parsed = {stage: parsers[stage].parse_args(routed[stage]) for stage in parsers}
    sample_extracts.parse_options(routed["extracts"])  # wrong usage is told before anything runs
    check_first(parsed["replies"], parsed["pairs"])
    for stage, module in MODULES.items():
        print(f"== {stage}", flush=True)
        if code := run_module(module, routed[stage]):
            sys.exit(code)


if __name__ == "__main__":
    run(main)
