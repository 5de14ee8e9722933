"""Run `just demo` from nothing in a copy of this repo; print its time and peak memory.

The copy holds the tracked files and shares this repo's .venv, so set-up is not measured and nothing
of an earlier demo is reused. Peak memory is the sum of the resident memory of all its processes,
sampled twice a second: an upper bound, since shared pages count once per process.

    python -m benchmarks.demo
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from common.cli import script_parser

ROOT = Path(__file__).parent.parent


def copy_tracked(target: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    (target / ".venv").symlink_to(ROOT / ".venv")


def resident_bytes(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    script_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_tracked(Path(folder))
        started, peak = time.monotonic(), 0
        demo = psutil.Popen([Path(sys.executable).with_name("just"), "demo"], cwd=folder)
        while demo.poll() is None:
            peak = max(peak, resident_bytes(demo))
            time.sleep(0.5)
    minutes = (time.monotonic() - started) / 60
    print(
        f"just demo: exit code {demo.returncode}, {minutes:.1f} minutes, "
        f"peak memory {peak / 2**30:.2f} GiB on {psutil.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
