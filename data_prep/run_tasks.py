"""Run the numbered tasks of a stage by datatrove: on this machine, on a Slurm cluster, or on Ray.

What is complete is marked under WORK/logs, so that a run which a kill ended anywhere is finished by
the same command, also in another of the three places. A cluster's machines see WORK and this
folder's Python under the same paths.
"""

import getpass
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from loguru import logger
from tqdm import tqdm

from common.cli import UserError, one_line, usable_cores
from common.files import digest, write_text

logger.disable("datatrove")  # in every worker: what goes wrong is reported by us, in one line
ROOT = Path(__file__).parents[1]
POLL = 10  # seconds between two looks at a Slurm queue
SLURM_TIME = "04:00:00"  # of a task; SBATCH_TIMELIMIT sets another, SBATCH_ACCOUNT an account, ...


@dataclass(frozen=True)
class Place:
    """Where tasks run: on this machine, on a partition of Slurm's, or at the address of a Ray."""

    workers: int | None = None  # tasks at a time; None: as many as cores here, all of them there
    slurm: str | None = None
    ray: str | None = None


def run_tasks(step: Callable, tasks: int, place: Place, work: Path) -> None:
    """Run those of `tasks` tasks, `step(None, rank, tasks)`, that are not yet complete.

    Raises UserError if any is left, with the reason of one of them.
    """
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

    faults = work / "faults"
    for fault in faults.glob("*.txt"):  # of an earlier run
        fault.unlink()
    pipeline = [partial(run_step, step=step, faults=faults)]
    common = {"tasks": tasks, "logging_dir": f"{work}/logs"}
    if place.slurm:
        executor = SlurmPipelineExecutor(
            pipeline,
            **common,
            partition=place.slurm,
            workers=place.workers or -1,
            job_name=f"tasks-{digest(work)}",
            time=SLURM_TIME,
            env_command=environment_of_a_job(),
            qos=None,
            # The job that sums up datatrove's statistics must not wait for ever for a failed one.
            sbatch_args={"kill-on-invalid-dep": "yes"},
        )
        run_on_slurm(executor, place.slurm, work)
    elif place.ray:
        executor = RayPipelineExecutor(pipeline, **common, workers=place.workers or -1)
        run_on_ray(executor, place.ray)
    else:
        workers = min(place.workers or usable_cores(), tasks)
        executor = LocalPipelineExecutor(pipeline, **common, workers=workers)
        executor.run()
    if left := len(executor.get_incomplete_ranks(skip_completed=True)):
        reasons = [path.read_text("utf-8") for path in sorted(faults.glob("*.txt"))]
        reason = one_line(reasons[0]) if reasons else f"see {work}/logs"
        raise UserError(f"{left} of {tasks} tasks are left: {reason}; then run this again")


def run_step(data: object, rank: int, world_size: int, *, step: Callable, faults: Path) -> None:
    """A step of datatrove's that leaves in `faults` why it failed: of a task on another machine
    nothing else comes back."""
    try:
        step(data, rank, world_size)
    except UserError as error:
        write_text(faults / f"{rank}.txt", str(error))
        raise
    except Exception:
        write_text(faults / f"{rank}.txt", traceback.format_exc())
        raise


def environment_of_a_job() -> str:
    """The line of shell by which a job finds this Python: `just` activates no environment, and a
    job starts with a command of datatrove's."""
    commands = Path(sys.executable).parent
    return f'export PATH={quote(str(commands))}:"$PATH" PYTHONPATH={quote(str(ROOT))}'


def run_on_slurm(executor, partition: str, work: Path) -> None:
    """Submit the tasks that are left, unless an earlier run's are still in the queue; wait for
    their end. Ctrl-C ends the waiting and not the job. Raises UserError."""
    if any(map(str.isspace, str(work))):
        raise UserError(f"--slurm: {work} has a space in it, which datatrove's scripts cannot hold")
    if not is_in_queue(executor.job_name):
        try:
            executor.run()
        except subprocess.CalledProcessError as error:  # sbatch has said why
            raise UserError(f"sbatch refuses the job (exit code {error.returncode})") from None
    if is_in_queue(executor.job_name):
        told = "Ctrl-C leaves it at work, and the same command waits for it"
        print(f"job {executor.job_name} is in the queue of {partition}; {told}", flush=True)
    with tqdm(total=executor.tasks, desc=f"tasks on {partition}") as bar:
        while is_in_queue(executor.job_name):
            time.sleep(POLL)
            bar.update(executor.tasks - len(executor.get_incomplete_ranks()) - bar.n)


def is_in_queue(job_name: str) -> bool:
    """Whether Slurm has a job of that name and this user, waiting or at work. Raises UserError."""
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", f"--name={job_name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"squeue does not answer: {one_line(result.stderr)}; run this again")
    return bool(result.stdout.strip())


def run_on_ray(executor, address: str) -> None:
    """Run the tasks at a Ray cluster, which tries those again whose machine is lost. UserError."""
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install ray, of the cluster's version") from None
    variables = {"PYTHONPATH": str(ROOT)}
    try:
        ray.init(address, log_to_driver=False, runtime_env={"env_vars": variables})
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray to reach at {address}: {one_line(error)}") from None
    try:
        executor.run()
    finally:
        ray.shutdown()
