"""A run's answers as `just answers` left them in outputs/RUN/eval/answers, read to make pairs."""

from pathlib import Path

from common.cli import UserError
from common.files import read_json
from common.table import load
from data_prep.teacher.teacher_prompts import prompt_digest
from prompts.task import Task

OUTPUTS = Path("outputs")
ANSWER = ("id", "prompt", "settings")  # as inference/answers.py keeps them


def load_answers(name: str, system: str, extracts: dict[str, dict], task: Task) -> dict[str, dict]:
    """id -> record of a system's answers asked for last, to the very texts of `extracts` (by id)
    and in the template of today. Raises UserError if the run was never asked for them."""
    folder = OUTPUTS / name / "eval/answers"
    settings = read_json(folder / "asked.json").get(system)
    if not settings:
        split = "unseen" if system == "samples" else "train"
        hint = f"make them: `just answers` --split {split}"
        raise UserError(f"no {system} answers in {folder}; {hint}")
    template = task.student_template(instructed=system == "instructed")
    wanted = []
    for key, extract in extracts.items():
        prompt = prompt_digest(task.student_messages(extract["text"], template))
        wanted.append({"id": key, "prompt": prompt, "settings": settings})
    return load(folder / f"{system}.jsonl", wanted, ANSWER)


def run_name(name: str, task_name: str) -> str:
    """The run that the name of a config or a run stands for in a task: for titles `title-NAME`, or
    NAME itself where that one alone has answers."""
    of_task = name if task_name == "summarize" else f"{task_name}-{name}"
    names = (of_task, name)
    return next((one for one in names if (OUTPUTS / one / "eval/answers").is_dir()), of_task)
