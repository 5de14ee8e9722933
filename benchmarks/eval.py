"""Generate and score beside the one-at-a-time ways, the same outputs checked.

Generation: 32 of the demo's test texts with SmolLM2-135M, our packed batches against the published
snippet (README, "Use an adapter"): one text at a time. Sampling: 8 answers to each of 8 texts, a
prompt read once, against generate, which reads it for each. Scoring: 1,000 pairs with MiniLM
against `bert_score.score` called once a pair. Prints the ratios and the peak memory.

    python -m benchmarks.eval
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import load_records
from eval.measures import PARTS, BertScore, split_sentences
from eval.systems import load_test_rows
from inference.draw_samples import draw_samples
from inference.generate import build_prompt, generate_batch, pack_batches
from inference.weights import load_model
from prompts.task import load_task
from training.config import load_run_config

STUDENT, ENCODER, LAYERS = "models/smollm2-135m-instruct", "models/minilm", 6
CONFIG = Path("axolotl_configs/smollm2-135m-dpo-sft-lora.yaml")


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def now() -> np.ndarray:
    """Seconds on the wall and of this process's CPU time, which other programs disturb less."""
    return np.array([time.monotonic(), time.process_time()])


def snippet(texts: list[str], n_new: int) -> tuple[list[str], np.ndarray]:
    """The README's snippet, text by text: (summaries, wall and CPU seconds without loading)."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    summaries, started = [], now()
    for text in texts:
        inputs = tokenizer.apply_chat_template(
            load_task().student_messages(text, None),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, max_new_tokens=n_new, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        summaries.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return summaries, now() - started


def batched(texts: list[str], n_new: int, batch_tokens: int) -> tuple[list[str], np.ndarray]:
    """Our generation: (summaries, wall and CPU seconds without loading)."""
    model, tokenizer = load_model(STUDENT, "float32")  # as the snippet, so that the texts agree
    started = now()
    prompts = [build_prompt(tokenizer, text, None, 8192)[0] for text in texts]
    lengths = [len(tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
    summaries = [""] * len(texts)
    for batch in pack_batches(lengths, n_new, batch_tokens):
        outputs = generate_batch(model, tokenizer, [prompts[i] for i in batch], n_new)
        for i, output in zip(batch, outputs, strict=True):
            summaries[i] = output["text"]
    return summaries, now() - started


def bench_generation(args: argparse.Namespace) -> None:
    texts = [row["text"] for row in load_test_rows(load_run_config(CONFIG), args.n)]
    ours, fast = batched(texts, args.max_new_tokens, args.batch_tokens)
    theirs, slow = snippet(texts, args.max_new_tokens)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(
        f"generation, {len(texts)} texts, up to {args.max_new_tokens} new tokens: one at a time "
        f"{slow[0]:.1f} s, batched {fast[0]:.1f} s, {slow[0] / fast[0]:.1f} times as fast "
        f"({slow[1] / fast[1]:.1f} in CPU time); {same} of {len(texts)} summaries the same; "
        f"peak memory {peak_gib():.2f} GiB",
        flush=True,
    )


def bench_sampling(args: argparse.Namespace) -> None:
    """Tokens a second, since what is sampled is not the same; batches of 8 texts."""
    model, tokenizer = load_model(STUDENT)
    texts = [row["text"] for row in load_test_rows(load_run_config(CONFIG), args.n // 4)]
    prompts = [build_prompt(tokenizer, text, None, 8192)[0] for text in texts]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    n_prompt, started = inputs["input_ids"].shape[1], now()
    ours = draw_samples(model, inputs, 8, args.max_new_tokens, prompts)
    fast, started = now() - started, now()
    theirs = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=8,
        max_new_tokens=args.max_new_tokens,
    )
    slow = now() - started
    n_ours = sum(len(ids) for of_prompt in ours for ids in of_prompt)
    n_theirs = int((theirs[:, n_prompt:] != tokenizer.pad_token_id).sum())
    rates = n_ours / fast, n_theirs / slow
    print(
        f"8 samples of each of {len(texts)} texts, up to {args.max_new_tokens} new tokens, in "
        f"{model.dtype}: generate {rates[1][0]:.0f} tokens a second, a prompt read once and ended "
        f"samples left out {rates[0][0]:.0f}, {rates[0][0] / rates[1][0]:.1f} times as fast "
        f"({rates[0][1] / rates[1][1]:.1f} in CPU time)",
        flush=True,
    )


def bench_scoring(args: argparse.Namespace) -> None:
    import bert_score

    articles = load_records(Path("data/demo/wikipedia.jsonl"), ("text",))
    found = [s for a in articles[:40] for s in split_sentences(a["text"][:6000])]
    texts = [" ".join(found[i : i + 3]) for i in range(len(found) - 3)][: args.pairs + 1]
    candidates, references = texts[:-1], texts[1:]
    options = {"model_type": ENCODER, "num_layers": LAYERS}
    bert_score.score(candidates[:1], references[:1], **options)  # what both import is not timed
    started = now()
    found = BertScore(ENCODER, LAYERS, 64)(candidates, [{"reference": r} for r in references])
    fast = now() - started
    ours = np.array([found[part] for part in PARTS])
    few = min(args.sample, len(candidates))
    started, theirs = now(), []
    for candidate, reference in zip(candidates[:few], references[:few], strict=True):
        score = bert_score.score([candidate], [reference], **options)
        theirs.append([float(part) for part in score])
    slow = (now() - started) * len(candidates) / few
    gap = float(np.abs(ours[:, :few].T - np.array(theirs)).max())
    print(
        f"scoring, {len(candidates)} pairs: bert_score.score called per pair {slow[0]:.0f} s (from "
        f"{few} calls), ours {fast[0]:.1f} s with loading, {slow[0] / fast[0]:.0f} times as fast "
        f"({slow[1] / fast[1]:.0f} in CPU time); largest difference {gap:.1e}; "
        f"peak memory {peak_gib():.2f} GiB",
        flush=True,
    )


WAYS = {"generation": bench_generation, "sampling": bench_sampling, "scoring": bench_scoring}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=32, help="texts to summarize")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--pairs", type=int, default=1000, help="pairs to score")
    parser.add_argument("--sample", type=int, default=100, help="pairs for the per-pair way")
    parser.add_argument("--parts", nargs="+", choices=WAYS, default=[*WAYS], help="what to measure")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    for part in args.parts:
        WAYS[part](args)


if __name__ == "__main__":
    main()
