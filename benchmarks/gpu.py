"""Train, merge, serve and answer at full size on a GPU, beside plain TRL, in fifteen minutes.

For a machine with a GPU and no network: the model's folder, the packages and this repo are all that
it needs. Each part runs in processes of its own, prints its line as it ends and appends it to
results/gpu.jsonl; a part that cannot run says why, and the others go on. Every step trains on the
same rows, made of this repo's prose, each as long as --length: so the losses of two ways can be
compared, whatever order they take the rows in. Without a GPU it runs on a CPU, to be tried.

    python -m benchmarks.gpu models/qwen2.5-1.5b-instruct --parts sft dpo attention
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import httpx
import pyarrow as pa
import yaml

from common.cli import UserError, one_line, over_zero, positive, run, script_parser
from common.files import append_record, appending, read_json, write_text
from data_prep.build_dataset import to_row, to_sft_row, write_parquet
from training.config import load_run_config
from training.estimate import operations_a_token, shape_of, training_of

ROOT = Path(__file__).parent.parent
WORK, RESULTS = Path("outputs/bench-gpu"), Path("results/gpu.jsonl")
SFT, DPO = "qwen2-1.5b-sft-qlora", "qwen2-1.5b-dpo-sft-qlora"
METER = "benchmarks.gpu_ways.Meter"
LIGER = "axolotl.integrations.liger.LigerPlugin"
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
PORT, PROMPTS, NEW_TOKENS = 8765, 32, 128
SHORTEST = 20  # seconds in which nothing can be measured any more


@dataclass(frozen=True)
class Bench:
    """What is measured, and until when."""

    model: str
    length: int  # tokens of a row
    answer: int  # of these, those of its answer
    steps: int
    attention: str
    on_gpu: bool
    vllm: str  # the program
    ends: float  # on the monotonic clock

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Recipe:
    """A config of the book, with the keys that make one way of training with it."""

    name: str  # of the way, and of its folder
    config: str
    method: str = ""
    plugins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


class CannotRun(UserError):
    """Why a part or a way is left out, in a line."""


def prose(characters: int) -> str:
    """So many characters of this repo's own English, repeated if there are not enough."""
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    return (text * (characters // len(text) + 1))[:characters]


def make_rows(bench: Bench, number: int) -> list[dict]:
    """Pairs whose text and either answer are --length tokens together, but for a few."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    turns = [{"role": role, "content": ""} for role in ("user", "assistant")]
    around = tokenizer.apply_chat_template(turns, tokenize=False)
    # Tokens may join otherwise where texts were cut.
    size = bench.length - len(tokenizer(around, add_special_tokens=False).input_ids) - 8
    ids = tokenizer(prose((size + bench.answer) * number * 12), add_special_tokens=False).input_ids
    rows = []
    for i in range(number):
        start = i * (size + bench.answer)
        cuts = [start, start + size - bench.answer, start + size, start + size + bench.answer]
        text, chosen, rejected = (tokenizer.decode(ids[a:b]).strip() for a, b in pairwise(cuts))
        row = {"id": f"row{i}", "source": "repo", "url": "", "rejected_by": "repo"}
        rows.append(row | {"prompt": text, "chosen": chosen, "rejected": rejected})
    return rows


def stage_rows(bench: Bench) -> Path:
    """The data folder of a dataset of exactly one step, which every epoch trains on."""
    data = WORK / f"data-{Path(bench.model).name}-{bench.length}"
    hub = data / "summarize/hub"
    if (hub / "README.md").is_file():
        return data
    settings = load_run_config(SFT, trained=False).settings
    pairs = make_rows(bench, settings["micro_batch_size"] * settings["gradient_accumulation_steps"])
    subsets = {"default": [to_row(p) for p in pairs], "sft": [to_sft_row(p) for p in pairs]}
    configs = []
    for name, rows in subsets.items():
        # The hash in its name keeps `load_dataset` from serving another dataset's cached rows.
        file = write_parquet(hub / name, "train", pa.Table.from_pylist(rows))
        subset = {"config_name": name, "data_files": file}
        configs.append(subset | {"default": name == "default"})
    write_text(hub / "README.md", f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return data


def run_way(bench: Bench, *command: str) -> str:
    """What a process of this Python says. Raises CannotRun with its last error."""
    if bench.seconds_left < SHORTEST:
        raise CannotRun("no time is left")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    told = [sys.executable, "-m", *command]
    try:
        done = subprocess.run(
            told,
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=bench.seconds_left,
        )
    except subprocess.TimeoutExpired:
        raise CannotRun("the time ran out in it") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line] or lines or ["no word"]
        raise CannotRun(one_line(errors[-1], 200))
    return done.stdout


def train_with_axolotl(bench: Bench, recipe: Recipe) -> dict:
    """Train a recipe as `just train` does; what the meter measured."""
    folder = WORK / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    keys = [
        f"base_model={bench.model}",
        "revision_of_model=null",
        f"sequence_len={bench.length}",
        f"num_epochs={bench.steps}",
        f"attn_implementation={bench.attention}",
        f"output_dir={folder}",
        "save_steps=1000000",
    ]
    if not bench.on_gpu:
        keys += [f"lora_{name}_kernel=false" for name in ("mlp", "qkv", "o", "embedding")]
        keys += ["bf16=false", "tf32=false"]
    plugins = load_run_config(recipe.config, trained=False).settings.get("plugins", [])
    keys += [f"plugins=[{', '.join([*plugins, *recipe.plugins, METER])}]", *recipe.keys]
    told = [recipe.config, "--data", str(stage_rows(bench)), "--set", *keys]
    told += ["--method", recipe.method] if recipe.method else []
    told += [] if bench.on_gpu else ["--cpu"]
    run_way(bench, "training.train_adapter", *told)
    return measured(bench, folder)


def train_with_trl(bench: Bench, like: Recipe) -> dict:
    """Train what axolotl trained by `like`, in plain TRL."""
    folder = WORK / f"{like.name}-trl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = WORK / like.name / "config.yaml"
    run_way(bench, "benchmarks.gpu_ways", "trl", str(config), str(folder))
    return measured(bench, folder, config)


def measured(bench: Bench, folder: Path, config: Path | None = None) -> dict:
    """The meter's numbers of a training, with tokens and operations a second."""
    found = read_json(folder / "meter.json")
    run_config = load_run_config(config or folder / "config.yaml")
    settings = run_config.settings
    rows = settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
    training = training_of(run_config, rows, bench.length - bench.answer, bench.answer)
    tokens = rows * training.texts_a_row * bench.length
    found["tokens_a_second"] = tokens / found["seconds_a_step"]
    operations = operations_a_token(shape_of(bench.model), training)
    return found | {"tflops": found["tokens_a_second"] * operations / 1e12}


def compare(bench: Bench, ways: dict[str, Callable[[], dict]]) -> tuple[str, dict]:
    """Run the ways of a part: (their line, what each measured). The first is what the others are
    compared with; one that cannot run is told and the others go on."""
    results, said = {}, []
    for name, way in ways.items():
        try:
            results[name] = way()
        except UserError as reason:
            said.append(f"{name} cannot run: {reason}")
            continue
        one = results[name]
        words = (
            f"{name} {one['tokens_a_second']:,.0f} tokens a second ({one['tflops']:.1f} TFLOP/s), "
            f"{one['peak_gib']:.2f} GiB, loss {one['first_loss']:.3f} to {one['last_loss']:.3f}"
        )
        first = next(iter(results.values()))
        if one is not first:
            times = first["tokens_a_second"] / one["tokens_a_second"]
            words += f" ({next(iter(results))} {times:.2f} times as fast)"
        said.append(words)
    return "; ".join(said), results


SFT_RUN = Recipe("sft", SFT)
DPO_RUN = Recipe("dpo", DPO)


def beside_trl(recipe: Recipe) -> Callable[[Bench], tuple[str, dict]]:
    """A part: a recipe in axolotl, and the same in plain TRL."""

    def part(bench: Bench) -> tuple[str, dict]:
        ours = train_with_axolotl(bench, recipe)  # its resolved config is what TRL is given
        return compare(
            bench, {"axolotl": lambda: ours, "plain TRL": lambda: train_with_trl(bench, recipe)}
        )

    return part


def kernels(bench: Bench) -> tuple[str, dict]:
    """SFT with axolotl's plain loss, with Liger's kernels and with cut cross-entropy."""
    flags = ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")
    liger = tuple(f"liger_{flag}=true" for flag in flags)
    cut = ("cut_cross_entropy=true",)
    ways = {
        "plain": Recipe("sft-plain", SFT),
        "Liger": Recipe("sft-liger", SFT, plugins=(LIGER,), keys=liger),
        "cut cross-entropy": Recipe("sft-cut", SFT, plugins=(CUT,), keys=cut),
    }
    return compare(bench, in_axolotl(bench, ways))


def dpo_kernels(bench: Bench) -> tuple[str, dict]:
    """DPO without an SFT term, with which Liger's loss does not go, with and without that loss."""
    ways = {
        "plain": Recipe("dpo-plain", DPO, method="dpo"),
        "Liger": Recipe("dpo-liger", DPO, method="dpo", keys=("dpo_use_liger_kernel=true",)),
    }
    return compare(bench, in_axolotl(bench, ways))


def in_axolotl(bench: Bench, ways: dict[str, Recipe]) -> dict[str, Callable[[], dict]]:
    return {
        name: lambda recipe=recipe: train_with_axolotl(bench, recipe)
        for name, recipe in ways.items()
    }


def attention(bench: Bench) -> tuple[str, dict]:
    """SFT with torch's own attention and with flash attention 2."""
    if not bench.on_gpu:
        raise CannotRun("flash attention needs a GPU")
    ways = {}
    for name in ("sdpa", "flash_attention_2"):
        of_way, recipe = replace(bench, attention=name), Recipe(f"sft-{name}", SFT)
        ways[name] = lambda of_way=of_way, recipe=recipe: train_with_axolotl(of_way, recipe)
    return compare(bench, ways)


def trained_run(name: str) -> str:
    """The config of a run that another part has trained. Raises CannotRun."""
    folder = WORK / name
    if not (folder / "made.json").is_file():
        raise CannotRun(f"there is no run to take; the part {name} trains it")
    return str(folder / "config.yaml")


def merge(bench: Bench) -> tuple[str, dict]:
    """Merge the adapter of `sft` into its base."""
    config = trained_run("sft")
    shutil.rmtree(WORK / "sft/merged", ignore_errors=True)
    started = time.monotonic()
    said = run_way(bench, "inference.merge_adapter", config)
    seconds = time.monotonic() - started
    (gap,) = [line for line in said.splitlines() if line.startswith("mean logit gap")]
    return f"{seconds:.0f} s with loading; {gap}", {"seconds": seconds, "gap": gap}


def answers_at(context: int) -> Callable[[Bench], tuple[str, dict]]:
    """A part: one text that fills a context, read and answered."""

    def part(bench: Bench) -> tuple[str, dict]:
        room = read_json(Path(bench.model) / "config.json").get("max_position_embeddings", context)
        if room < context:
            raise CannotRun(f"the model reads {room} tokens")
        path = WORK / f"answers-{context}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        run_way(bench, "benchmarks.gpu_ways", "answers", bench.model, str(path), str(context))
        found = read_json(path)
        line = (
            f"{found['read_tokens']:,} tokens read in {found['read_seconds']:.2f} s, "
            f"{found['new_tokens_a_second']:.1f} written a second, {found['peak_gib']:.2f} GiB"
        )
        return line, found

    return part


def wait_for(process: subprocess.Popen, bench: Bench, log: Path) -> None:
    """Return once the server answers. Raises CannotRun if it ends, or the time does."""
    while bench.seconds_left > SHORTEST:
        if process.poll() is not None:
            lines = [line for line in log.read_text().splitlines() if "rror" in line] or ["no word"]
            raise CannotRun(f"vLLM ended: {one_line(lines[-1], 200)}")
        try:
            httpx.get(f"http://127.0.0.1:{PORT}/v1/models").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(1)
    raise CannotRun("vLLM was not up in time")


def ask_vllm(texts: list[str], model: str) -> tuple[list[str], int, float]:
    """(answers, tokens of them, seconds) of a served model, asked for all at once."""
    url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
    body = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0}

    def ask(text: str) -> dict:
        messages = [{"role": "user", "content": text}]
        answer = httpx.post(url, json=body | {"messages": messages}, timeout=600)
        return answer.raise_for_status().json()

    ask(texts[0])  # warm
    started = time.monotonic()
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(ask, texts))
    seconds = time.monotonic() - started
    told = [answer["choices"][0]["message"]["content"].strip() for answer in answers]
    return told, sum(answer["usage"]["completion_tokens"] for answer in answers), seconds


def vllm(bench: Bench) -> tuple[str, dict]:
    """The adapter of `sft` by vLLM, over its base as 4-bit training rounded it, beside our own."""
    trained_run("sft")
    if not shutil.which(bench.vllm):
        raise CannotRun(f"there is no program {bench.vllm}; --vllm names it")
    told = ["--name", "sft", "--port", str(PORT), "--print"]
    said = run_way(bench, "inference.serve", str(WORK / "sft"), *told)
    line = shlex.split(said.strip().splitlines()[-1])
    size = bench.length * 2  # characters: half as many tokens or fewer
    whole = prose(size * PROMPTS)
    texts = [whole[i * size : (i + 1) * size].strip() for i in range(PROMPTS)]
    log = WORK / "vllm.log"
    options = ["--max-model-len", str(bench.length + NEW_TOKENS)]
    with log.open("w") as file:
        server = subprocess.Popen(
            [bench.vllm, *line[1:], *options],
            stdout=file,
            stderr=file,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )
        try:
            wait_for(server, bench, log)
            theirs, tokens, seconds = ask_vllm(texts, "sft")
        finally:
            server.terminate()
            server.wait()
    prompts, path = WORK / "prompts.json", WORK / "batch.json"
    write_text(prompts, json.dumps(texts))
    run_way(bench, "benchmarks.gpu_ways", "batch", str(WORK / "sft"), str(prompts), str(path))
    ours = read_json(path)
    same = sum(a == b for a, b in zip(theirs, ours["answers"], strict=True))
    rates = [tokens / seconds, ours["new_tokens"] / ours["seconds"]]
    words = (
        f"{PROMPTS} prompts at once: vLLM {rates[0]:,.0f} tokens a second, `just answers` "
        f"{rates[1]:,.0f}, {rates[0] / rates[1]:.1f} times; {same} of {PROMPTS} answers the same"
    )
    return words, {"vllm": rates[0], "ours": rates[1], "same": same, "prompts": PROMPTS}


PARTS = {
    "sft": beside_trl(SFT_RUN),
    "dpo": beside_trl(DPO_RUN),
    "attention": attention,
    "kernels": kernels,
    "dpo-kernels": dpo_kernels,
    "merge": merge,
    "vllm": vllm,
    "answers-8k": answers_at(8192),
    "answers-16k": answers_at(16384),
}


def describe_machine() -> dict:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "axolotl", "trl", "transformers")}
    return {"gpu": gpu, **versions}


def measure(bench: Bench, part: str, about: dict, into: Path) -> None:
    """Run a part, print its line and append it."""
    started = time.monotonic()
    try:
        if bench.seconds_left < SHORTEST:
            raise CannotRun("no time is left")
        line, results = PARTS[part](bench)
    except UserError as reason:
        line, results = f"cannot run: {reason}", None
    except Exception as error:  # whatever it is: the machine is rented, and other parts may run
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        line, results = f"cannot run: {reason}", None
    seconds = round(time.monotonic() - started)
    print(f"{part} ({seconds} s): {line}", flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"part": part, "when": when, "seconds": seconds, "line": line, "results": results}
    with appending(into) as file:
        append_record(file, record | about)


def make_bench(args: argparse.Namespace) -> Bench:
    import torch

    on_gpu = torch.cuda.is_available()
    if not (Path(args.model) / "config.json").is_file():
        raise UserError(f"{args.model} is no model folder; bring one along, there is no network")
    return Bench(
        model=args.model,
        length=args.length,
        answer=args.length // 8,
        steps=args.steps,
        attention="sdpa",
        on_gpu=on_gpu,
        vllm=args.vllm,
        ends=time.monotonic() + args.minutes * 60,
    )


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("model", help="a folder, of the student that is trained")
    option("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="what to measure")
    option("--length", type=positive, default=2048, help="tokens of a row, its answer an eighth")
    option("--steps", type=positive, default=8, help="of each training, the first two not timed")
    option("--minutes", type=over_zero, default=15, help="what is not begun by then is left out")
    option("--vllm", default="vllm", help="the program, which may lie in another environment")
    option("--into", type=Path, default=RESULTS, help="where the lines are kept")
    args = parser.parse_args()
    bench = make_bench(args)
    about = {"model": Path(args.model).name, "length": args.length, "steps": args.steps}
    about |= describe_machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    for part in args.parts:
        measure(bench, part, about, args.into)


if __name__ == "__main__":
    run(main)
