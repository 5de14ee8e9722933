"""What every script's command line shares: its parser, its warnings, and its way to end."""

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """What the user can mend; printed as one line: what, where, what to do."""


def script_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the first line of the script's docstring and all defaults."""
    return argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def positive(text: str) -> int:
    """A whole number over 0, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0")
    return number


def count(text: str) -> int:
    """A whole number from 0 up, for argparse."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is under 0")
    return number


def port(text: str) -> int:
    """A port's number, for argparse; 0 is any that is free."""
    if not 0 <= (number := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port, from 0 to 65535")
    return number


def share(text: str) -> float:
    """A number over 0 and up to 1, for argparse."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and up to 1")
    return number


def not_negative(text: str) -> float:
    """A finite number from 0 up, such as a price or a budget in dollars, for argparse."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return number


def over_zero(text: str) -> float:
    """A finite number over 0, such as a rate or seconds, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number over 0")
    return number


def usable_cores() -> int:
    """Cores this process may use: taskset or a cpuset may allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_line(error: object, most: int = 300) -> str:
    """What an error says, white space made single, in at most `most` characters."""
    return " ".join(str(error).split())[:most]


def tell_errors(*messages: str) -> None:
    """Say at once what failed, a line each, where the script goes on with something else."""
    for message in messages:
        print(f"error: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; what a user can cause ends in one line and exit code 1, or 130."""
    for chatty in ("torchao", "torch.utils._pytree", "bitsandbytes", "pypdf", "trafilatura"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes")
    if hasattr(sys.stdout, "reconfigure"):  # a file name need not be text to be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; all is saved, the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):  # torch's of a GPU
            raise
        advice = "smaller batches, shorter texts or a smaller model need less"
        sys.exit(f"error: out of memory; {advice}; what was finished is kept")
    except OSError as error:  # the disk, the network, a model that cannot be loaded
        where = f": {error.filename}" if error.filename else ""
        reason = error.strerror or one_line(error) or type(error).__name__
        sys.exit(f"error: {reason}{where}; what was finished is kept, mend this and run again")
