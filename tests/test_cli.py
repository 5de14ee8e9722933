"""How every script ends: in a line for what a user can mend."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common.cli import usable_cores

SCRIPT = """
from common.cli import UserError, run
class OutOfMemoryError(RuntimeError): pass
def main(): raise {error}
run(main)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("UserError('a line')", 1, "error: a line"),
        ("OutOfMemoryError('CUDA out of memory. Tried')", 1, "error: out of memory;"),
        ("MemoryError()", 1, "error: out of memory;"),
        ("KeyboardInterrupt", 130, "stopped;"),
        ("OSError(28, 'No space left on device', 'x.jsonl')", 1, "error: No space left"),
    ],
)
def test_what_a_user_can_mend_ends_in_a_line(error, code, said):
    command = [sys.executable, "-c", SCRIPT.format(error=error)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert result.stderr.strip().startswith(said) and "Traceback" not in result.stderr


def test_a_mistake_of_ours_is_not_hidden():
    command = [sys.executable, "-c", SCRIPT.format(error="RuntimeError('a bug')")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" in result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone keeps it to cores")
def test_cores_are_those_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
