"""Tasks on a cluster: a stand-in for Slurm, a Ray of this machine; the set kept is the same."""

import gzip
import importlib.util
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import clean_environment, one_error_line, run_stage, start_stage
from test_sample_extracts import WINDOWS, document, prose, write_jsonl

from data_prep import run_tasks

pytestmark = pytest.mark.slow
STAGE = "data_prep.sample_extracts"
SLURM = {
    # Runs the tasks of an array one after the other, as a cluster would side by side, when the
    # command that submitted it has ended; no job finds commands but its own and the system's.
    "sbatch": """#!/bin/bash
echo 'Submitted batch job 7'
number=$(ls "$FAKE_SLURM" | grep -c job-)
script="$FAKE_SLURM/job-$number"
cp "${@: -1}" "$script"
grep -q merge_stats "$script" && exit
run() {
    export PATH="$FAKE_SLURM/bin:/usr/bin:/bin" RUN_OFFSET=0 SLURM_NODELIST=here
    for task in $(seq 0 $(grep -oP '(?<=--array=0-)[0-9]+' "$script")); do
        SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NUMBER=$number bash "$script"
    done
    rm "$FAKE_SLURM/at-work"
}
touch "$FAKE_SLURM/at-work"
run > "$FAKE_SLURM/log-$number" 2>&1 &
""",
    # Of the first job the second task is killed.
    "srun": """#!/bin/bash
shift 3  # -l -n 1
[ "$SLURM_JOB_NUMBER-$SLURM_ARRAY_TASK_ID" = 0-1 ] && exec timeout -s KILL 0.2 "$@" # while it loads
exec "$@"
""",
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": '#!/bin/bash\n[ -e "$FAKE_SLURM/at-work" ] && echo 7_0\nexit 0\n',
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three packed files, and so three tasks, of documents some of which are in two of them."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(3)
    rows = [document(n, 6) | {"text": prose(draw, 160 if n % 5 else 2400)} for n in range(60)]
    for number in range(3):
        part = rows[20 * number : 20 * number + 25]
        plain = write_jsonl(folder / "plain.jsonl", part)
        packed = gzip.compress(plain.read_bytes(), mtime=0)
        (folder / f"part{number}.jsonl.gz").write_bytes(packed)
    return f"{folder}/*.gz"


@pytest.fixture(scope="module")
def reference(corpus, tokenizer, tmp_path_factory):
    """The files that a plain run makes, by name."""
    folder = tmp_path_factory.mktemp("reference")
    run_stage(STAGE, *options(folder, tokenizer, corpus))
    return files_of(folder)


def options(folder, tokenizer, corpus, *more) -> list:
    where = ["--data", folder, "--tokenizer", tokenizer, "--input", corpus]
    return [*where, *WINDOWS, *more]


def files_of(folder) -> dict[str, bytes]:
    names = ("train.jsonl", "test.jsonl", "report.md", "made.json")
    return {name: (folder / "extracts" / name).read_bytes() for name in names}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name, script in SLURM.items():
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setattr(run_tasks, "POLL", 0.1)
    return folder


def test_on_slurm_a_job_is_waited_for_and_what_is_killed_is_submitted_again(
    tmp_path, tokenizer, corpus, reference, slurm
):
    command = options(tmp_path, tokenizer, corpus, "--slurm", "cpu")
    process = start_stage(STAGE, *command)
    while process.poll() is None and not (slurm / "job-1").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and (slurm / "at-work").exists()
    killed = run_stage(STAGE, *command, code=1)
    assert "1 of 3 tasks are left" in one_error_line(killed)
    assert "is in the queue of cpu" in killed.stdout
    assert "--partition=cpu" in (slurm / "job-0").read_text()
    assert not (slurm / "job-2").exists()  # job 1 sums up datatrove's statistics
    run_stage(STAGE, *command)
    assert "--array=0-0" in (slurm / "job-2").read_text()
    assert files_of(tmp_path) == reference


def test_why_a_task_failed_on_a_cluster_is_told(tmp_path, tokenizer, corpus, slurm):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 9999)[:30])
    command = options(tmp_path, tokenizer, tmp_path / "cut.jsonl.gz", "--slurm", "cpu")
    line = one_error_line(run_stage(STAGE, *command, code=1))
    assert "1 of 1 tasks are left: cannot read " in line and "cut.jsonl.gz: broken" in line


RAY = """
import ray, time
context = ray.init(num_cpus=2, include_dashboard=False, _memory=8 * 2**30)
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def ray_address(monkeypatch):
    """Where a Ray of two workers listens that lives as long as a test."""
    if not importlib.util.find_spec("ray"):
        pytest.skip("Ray is no requirement; pip install ray to run this")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would keep a token in the home folder
    process = subprocess.Popen(
        [sys.executable, "-c", RAY], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(timeout=60)


def test_on_ray_a_killed_run_goes_on_and_the_extracts_are_the_same(
    tmp_path, tokenizer, corpus, reference, ray_address
):
    command = options(tmp_path, tokenizer, corpus, "--ray", ray_address, "--workers", 1)
    process = start_stage(STAGE, *command)
    marks = tmp_path / "extracts/unfinished/logs/completions"
    while process.poll() is None and not list(marks.glob("*")):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert not (tmp_path / "extracts/made.json").exists()
    run_stage(STAGE, *command[:-2], fresh=True)
    assert files_of(tmp_path) == reference


def test_on_ray_a_fault_and_a_dead_address_are_one_line(tmp_path, tokenizer, ray_address):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 9999)[:30])
    broken = options(tmp_path, tokenizer, tmp_path / "cut.jsonl.gz", "--ray", ray_address)
    line = one_error_line(run_stage(STAGE, *broken, code=1, fresh=True))
    assert "1 of 1 tasks are left: cannot read " in line and "cut.jsonl.gz: broken" in line
