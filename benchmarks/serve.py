"""Two adapters served over one base beside two merged models, and requests together beside one
after the other.

SmolLM2-135M with random adapters of rank 32, in 32 bits on a CPU. Waves of requests, half of them
for each adapter, wait at the same time, and are answered in a batch for each adapter; then each is
asked alone. Prints the ratios, and how many answers are the same.

    python -m benchmarks.serve
"""

import argparse
import multiprocessing
import queue
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

BASE = "models/smollm2-135m-instruct"


def make_adapters(folder: Path) -> list[str]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=32, target_modules="all-linear")
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        model.save_pretrained(folder / f"adapter{seed}")
    return [str(folder / f"adapter{seed}") for seed in (1, 2)]


def measure_memory(together: bool, adapters: list[str]) -> float:
    """GiB that the models take, in a process of its own."""
    from inference.serve import Engine, find_served
    from inference.weights import load_model

    before = psutil.Process().memory_info().rss
    kept = [Engine(find_served(adapters, []), 16, None)] if together else []
    kept += [] if together else [load_model(adapter) for adapter in adapters]
    return (psutil.Process().memory_info().rss - before) / 2**30


def measure_speed(adapters: list[str], args: argparse.Namespace) -> None:
    from inference.serve import Engine, find_served
    from inference.serving_engine import Job

    prose = "\n\n".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
    texts = [part for part in prose.split("\n\n") if 200 < len(part) < 900]
    names = [Path(adapter).name for adapter in adapters]
    engine = Engine(find_served(adapters, []), args.wave, None)

    def ask(model: str, i: int) -> tuple[str, int]:
        content = texts[i % len(texts)]
        ids = engine.prompt_ids(model, [{"role": "user", "content": content}])
        pieces = queue.SimpleQueue()
        job = Job(engine.answerers[model], ids, args.max_new_tokens, pieces.put)
        engine.submit(job)
        return "".join(iter(pieces.get, None)), len(job.ids)

    def run(requests: list[tuple], at_once: int) -> tuple[dict, float]:
        """The answers to requests, so many of them waiting at a time, and the seconds."""
        started = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(lambda one: ask(*one), requests))
        return dict(zip(requests, answers, strict=True)), time.monotonic() - started

    requests = [(name, i) for i in range(args.n) for name in names]
    run(requests[: args.wave], args.wave)  # warm
    (ours, fast), (theirs, slow) = run(requests, args.wave), run(requests, 1)
    made = sum(count for _, count in ours.values())
    same = sum(ours[one][0] == theirs[one][0] for one in ours)
    unlike = sum(ours[names[0], i] != ours[names[1], i] for i in range(args.n))
    print(
        f"{len(ours)} requests, {args.wave} at a time, {made} tokens: {made / fast:.1f} a second, "
        f"one at a time {made / slow:.1f}, {slow / fast:.2f} times; {same} of {len(ours)} answers "
        f"the same; the two adapters answer {unlike} of {args.n} unlike"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=24, help="texts for each adapter")
    parser.add_argument("--wave", type=int, default=8, help="requests that wait at the same time")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            one, two = (pool.apply(measure_memory, (kind, adapters)) for kind in (True, False))
        print(
            f"memory: two adapters over one base {one:.2f} GiB, two merged models {two:.2f} GiB, "
            f"{two / one:.2f} times",
            flush=True,
        )
        measure_speed(adapters, args)


if __name__ == "__main__":
    main()
