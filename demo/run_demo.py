"""Run the whole pipeline on this machine: real text, a small real student, a recorded teacher.

`just demo` goes from the articles to the scores, `just demo-preferences` (--preferences) on from
its adapter. Every step is the command line of a stage. The student is the packaged
SmolLM2-135M-Instruct or another one, a folder or a Hub id, whose pairs and runs have names of their
own. The texts are the same for each: what was recorded is of passages that the packaged student's
tokenizer measured. Only the first step may use a network, and only to get a student from the Hub.

    python -m demo.run_demo summarize --student Qwen/Qwen2.5-0.5B-Instruct
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, run, script_parser, usable_cores
from demo.replies import run_to_its_end
from prompts.task import Task, load_task
from training.config import OUTPUTS, is_local, name_of_run

PACKAGED = "models/smollm2-135m-instruct"  # demo/prepare_parts.py makes it
CONFIG = "smollm2-135m-dpo-sft-lora"
DATA = "data/demo"
N_PAIRS, N_TEXTS = 192, 96
N_SAMPLED, SAMPLES = 120, 8  # texts without a reply, and how many answers of the adapter to each
# Of these passages the teacher's replies were recorded.
WINDOWS = "--min-tokens 100 --max-tokens 220 --min-chars 450 --max-chars 950"
AMOUNTS = "--train 600 --test 128"
NOT_FOR_STAGES = ("HF_TOKEN", "HF_ENDPOINT", "TOGETHER_API_KEY", "TOGETHER_BASE_URL")


@dataclass(frozen=True)
class Demo:
    """A task and a student, and the names of all that is made of them."""

    task: Task
    student: str

    @property
    def of_task(self) -> list[str]:
        """The options by which a stage knows task and data."""
        return ["--task", self.task.name, "--data", DATA]

    @property
    def is_packaged(self) -> bool:
        return Path(self.student).resolve() == Path(PACKAGED).resolve()

    @property
    def run(self) -> str:
        """TASK-STUDENT-sft, without the task where it is summarize."""
        student = "smollm2-135m" if self.is_packaged else self.own_name()
        return name_of_run(self.task, student, "sft")

    def own_name(self, kind: str = "") -> str:
        """Of the pairs and the dataset: of another student's with its name."""
        student = "" if self.is_packaged else Path(self.student).resolve().name.lower()
        return "-".join(part for part in (student, kind) if part)

    def hub(self, kind: str = "") -> str:
        """The folder of the dataset."""
        name = self.own_name(kind)
        return f"{DATA}/{self.task.name}/hub-{name}" if name else f"{DATA}/{self.task.name}/hub"


@dataclass(frozen=True)
class Step:
    """What a step is said to be, and the stages that it runs, each a module and its options."""

    title: str
    stages: list[list[object]]
    may_use_network: bool = False


def data_stages(demo: Demo, rejected: str, *more: object, kind: str = "") -> list[list[object]]:
    """Pairs with such rejected answers and `more` options, named by `kind`, and their dataset."""
    named = ["--name", demo.own_name(kind)] if demo.own_name(kind) else []
    control_tokens = [] if demo.is_packaged else ["--tokenizer", demo.student]
    pairs = [*demo.of_task, *named, "--rejected", rejected, *more, "--tokenizer", demo.student]
    return [
        ["data_prep.build_pairs", *pairs],
        ["data_prep.build_dataset", *demo.of_task, *named, *control_tokens],
    ]


def training_stage(demo: Demo, method: str, name: str, keys: list[str]) -> list[object]:
    base = [] if demo.is_packaged else [f"base_model={demo.student}"]
    on_cpu = ["--cpu", "--num_cpu_threads_per_process", usable_cores()]
    named = [CONFIG, "--method", method, "--name", name, *demo.of_task]
    return ["training.train_adapter", *named, "--set", *base, *keys, *on_cpu]


def evaluation_stage(run_name: str, systems: list[str]) -> list[object]:
    encoder = ["--encoder", "models/minilm", "--encoder-layers", 6]
    options = ["--n", N_TEXTS, "--max-new-tokens", 64, "--ledger", OUTPUTS / "ledger.csv", *encoder]
    return ["eval.evaluate", run_name, *options, "--systems", *systems]


def prepare_step(demo: Demo) -> Step:
    student = [] if demo.is_packaged else ["--student", demo.student]
    title = f"parts: articles shipped by gensim, {Path(demo.student).name}, MiniLM"
    from_hub = not is_local(demo.student)
    return Step(title, [["demo.prepare_parts", *student]], may_use_network=from_hub)


def steps_of_demo(demo: Demo) -> list[Step]:
    """From the articles to the scores."""
    extracts = ["data_prep.sample_extracts", "--input", f"{DATA}/wikipedia.jsonl", "--data", DATA]
    extracts += ["--tokenizer", PACKAGED, "--passages", *WINDOWS.split(), *AMOUNTS.split()]
    extracts += ["--licence", "CC BY-SA"]
    teacher = "Qwen2.5-Coder-1.5B-Instruct"
    asking = [sys.executable, "-m", "data_prep.generate_replies", *demo.of_task, "--single"]
    asking += ["--model", teacher, "--temperature", 0, "--concurrency", 8, "--limit", N_PAIRS]
    pairs, dataset = data_stages(demo, "none")
    keys = ["group_by_length=true", f"datasets.0.path={demo.hub()}"]
    n_words = demo.task.lead_words
    as_short = f"instructed:{n_words}-words" if n_words else "lead-1"
    systems = ["instructed", "tuned", "lead", as_short]
    return [
        prepare_step(demo),
        Step("extracts: passages from inside the articles", [extracts]),
        Step(
            f"replies of the teacher, {teacher}, from the recording",
            [["demo.replies", "serve", "--", *asking]],
        ),
        Step("pairs, with nothing rejected: for SFT, which does better here than DPO+SFT", [pairs]),
        Step("dataset", [dataset]),
        Step("training: SFT on the chosen answers", [training_stage(demo, "sft", demo.run, keys)]),
        Step(
            "evaluation: merge, answers to held-out texts, scores",
            [evaluation_stage(demo.run, systems)],
        ),
    ]


def steps_of_preferences(demo: Demo) -> list[Step]:
    """On from the demo's adapter: pairs of its own answers, by what their text says."""
    name = f"{demo.run}-then-dpo"
    keys = [f"lora_model_dir={OUTPUTS / demo.run}", f"datasets.0.path={demo.hub('samples')}"]
    keys += ["learning_rate=1e-4", "micro_batch_size=4"]
    sampling = ["eval.answer_texts", demo.run, "--split", "unseen", "--n", N_SAMPLED]
    sampling += ["--data", DATA, "--samples", SAMPLES, "--max-new-tokens", 64]
    systems = ["instructed", str(OUTPUTS / demo.run / "merged"), "tuned", "lead"]
    return [
        Step(f"{SAMPLES} sampled answers of the adapter to each of {N_SAMPLED} texts", [sampling]),
        Step(
            "pairs: a sample that its text supports, and one with what the text lacks",
            data_stages(demo, "samples", "--student", demo.run, kind="samples"),
        ),
        Step(
            "training: DPO with a little SFT, on from the adapter of just demo",
            [training_stage(demo, "sft-then-dpo-sft", name, keys)],
        ),
        Step(
            "evaluation: SFT and SFT then preferences, side by side",
            [evaluation_stage(name, systems)],
        ),
    ]


def run_steps(steps: list[Step]) -> None:
    """Run all stages one after the other; the first that fails has said why, and ends it all."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_FOR_STAGES}
    for number, step in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {step.title}", flush=True)
        environment = dict(os.environ) if step.may_use_network else kept | {"HF_HUB_OFFLINE": "1"}
        for stage in step.stages:
            command = [sys.executable, "-m", *map(str, stage)]
            if code := run_to_its_end(command, environment):
                sys.exit(code)


def say_what_is_next(demo: Demo) -> None:
    task, run_name = demo.task.name, demo.run
    again = "" if demo.is_packaged else f" --student {demo.student}"
    print(
        f"""Where things are:
  {DATA}/extracts, {DATA}/{task}   what each stage wrote, JSON Lines
  {demo.hub()}   the dataset as it would stand on the Hub
  outputs/{run_name}   the adapter; merged/ the merged model; eval/ answers and scores
Next: just run {task} FILE (what is longer than it was taught on is read in parts; --show-parts),
  or just serve {run_name} and, beside it, just play;
  just demo-preferences{again}: pairs of its own answers, one that the text supports and one that
  it does not, trained on from this adapter (summaries);
  the same with a large teacher on RedPajama: TOGETHER_API_KEY=... just dataset"""
    )


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("task", nargs="?", default="summarize", help="summarize or title, which were recorded")
    option("--student", default=PACKAGED, help="a folder or a Hub id")
    option("--preferences", action="store_true", help="go on from the demo's adapter")
    args = parser.parse_args()
    demo = Demo(load_task(args.task), args.student)
    if not args.preferences:
        run_steps(steps_of_demo(demo))
        say_what_is_next(demo)
        return
    if args.task != "summarize":
        raise UserError("the demo's preferences are of summaries: titles hold few names or numbers")
    run_steps(steps_of_preferences(demo))


if __name__ == "__main__":
    run(main)
