"""Preferences with no teacher: what a model says most often against what it says least often.

Trains the small student by SFT, draws 12 answers to passages that no teacher answered, takes the
two most like the others (mean ROUGE-L) as chosen and the two least like them as rejected, and goes
on with DPO and a small SFT term (self-consistency preferences, arXiv:2411.04109). Beside it, from
the same SFT: SFT on the chosen alone. Scores held-out passages, with paired intervals to SFT. Made
for a GPU: a loop of its own, since here the samples are many and the model is small. Answers are
kept in outputs/self_consistency.json, so that it goes on where it stopped, and can be scored
(--score) where the measures are installed.

    python -m benchmarks.self_consistency --data data/wide --seeds 42 43 44
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from prompts import load_task

STUDENT, KEPT = "models/smollm2-135m-instruct", Path("outputs/self_consistency.json")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA, SFT_WEIGHT, GAP = 0.1, 0.1, 0.05
RATES = {"SFT": 1e-3, "preferences": 3e-4, "SFT on the chosen": 3e-4}
BATCHES = {"SFT": 16, "preferences": 32, "SFT on the chosen": 32}


def read_texts(data: Path, split: str) -> list[dict]:
    """[{id, text, reply}] of the extracts, `reply` empty where there is no whole one."""
    lines = map(json.loads, (data / f"summarize/replies/{split}.jsonl").open())
    replies = {one["id"]: one["text"] for one in lines if one["finish_reason"] == "stop"}
    extracts = map(json.loads, (data / f"extracts/{split}.jsonl").open())
    return [
        {"id": one["id"], "text": one["text"], "reply": replies.get(one["id"], "").strip()}
        for one in extracts
    ]


class Student:
    """The small model with a LoRA adapter on it, and its answers as lists of token ids."""

    def __init__(self, n_new: int):
        self.tokenizer = AutoTokenizer.from_pretrained(STUDENT)
        self.base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).to(DEVICE)
        self.end, self.pad, self.n_new = self.base.config.eos_token_id, 0, n_new

    def reset(self, seed: int) -> None:
        torch.manual_seed(seed)
        lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(copy.deepcopy(self.base), lora)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt(self, text: str) -> list[int]:
        task = load_task()
        messages = task.student_messages(text, task.student_template())
        return self.ids(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def padded(self, rows: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        gaps = [[self.pad] * (longest - len(row)) for row in rows]
        filled = [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g)
                for g, r in zip(gaps, rows, strict=True)]  # fmt: skip
        tensors = {"input_ids": filled, "attention_mask": mask}
        return {name: torch.tensor(value, device=DEVICE) for name, value in tensors.items()}

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], samples: int = 1, batch: int = 3500) -> list[list]:
        """For each prompt a list of `samples` answers at temperature 1, or the greedy one."""
        model = copy.deepcopy(self.model).merge_and_unload().to(torch.bfloat16)
        how = {"do_sample": samples > 1, "max_new_tokens": self.n_new, "pad_token_id": self.pad}
        how |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples > 1 else {}
        order = sorted([*range(len(prompts))] * samples, key=lambda i: len(prompts[i]))
        answers = [[] for _ in prompts]
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = self.padded([prompts[i] for i in part], left=True)
            new = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
            for i, ids in zip(part, new.tolist(), strict=True):
                ended = ids[: ids.index(self.end) + 1] if self.end in ids else ids
                answers[i].append(ended)
        return answers

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def log_probabilities(self, rows: list[tuple[list[int], list[int]]]) -> tuple:
        """(summed log-probability of each answer to its prompt, the answers' lengths)."""
        inputs = self.padded([prompt + answer for prompt, answer in rows])
        place = torch.arange(inputs["input_ids"].shape[1], device=DEVICE)[None]
        first = torch.tensor([[len(prompt) - 1] for prompt, _ in rows], device=DEVICE)
        lengths = torch.tensor([len(answer) for _, answer in rows], device=DEVICE)
        where = (place >= first) & (place < first + lengths[:, None])
        decoder = self.model.get_base_model()
        with torch.autocast(DEVICE, torch.bfloat16):  # logits of the answers' tokens alone
            logits = decoder.lm_head(decoder.model(**inputs).last_hidden_state[where])
        target = inputs["input_ids"].roll(-1, 1)[where]
        found = -cross_entropy(logits.float(), target, reduction="none")
        owner = torch.arange(len(rows), device=DEVICE)[:, None].expand_as(where)[where]
        return torch.zeros(len(rows), device=DEVICE).index_add(0, owner, found), lengths

    def train(self, rows: list, loss_of, rate: float, batch: int, passes: int = 1) -> None:
        """AdamW, a tenth of warm-up, then a cosine."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer, draw, batches = (
            torch.optim.AdamW(weights, weight_decay=0.0),
            random.Random(0),
            [],
        )
        for _ in range(passes):
            rows = draw.sample(rows, len(rows))
            batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
        for step, part in enumerate(batches):
            warm = min(1.0, (step + 1) / (0.1 * len(batches)))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            loss = loss_of(part)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

    def sft_loss(self, part: list[dict]) -> torch.Tensor:
        found, lengths = self.log_probabilities([(r["prompt"], r["chosen"]) for r in part])
        return -found.sum() / lengths.sum()

    def sides(self, part: list[dict]) -> tuple:
        sides = [(r["prompt"], r[side]) for side in ("chosen", "rejected") for r in part]
        return self.log_probabilities(sides)

    def preference_loss(self, part: list[dict]) -> torch.Tensor:
        """DPO (arXiv:2305.18290) against the SFT model, and the SFT loss of the chosen."""
        found, lengths = self.sides(part)
        reference = [r["reference"][side] for side in (0, 1) for r in part]
        gains, n = found - torch.tensor(reference, device=DEVICE), len(part)
        margins = BETA * (gains[:n] - gains[n:])
        return -logsigmoid(margins).mean() - SFT_WEIGHT * found[:n].sum() / lengths[:n].sum()

    @torch.no_grad()
    def add_references(self, pairs: list[dict]) -> None:
        for start in range(0, len(pairs), 64):
            part = pairs[start : start + 64]
            found = self.sides(part)[0].tolist()
            for number, pair in enumerate(part):
                pair["reference"] = found[number], found[len(part) + number]


def consensus_pairs(student: Student, prompts: list[list[int]], samples: int) -> list[dict]:
    """Of each prompt's samples the two most and the two least like the others, crosswise."""
    pairs = []
    for prompt, answers in zip(prompts, student.answer(prompts, samples), strict=True):
        words = [student.text(answer).lower().split() or [""] for answer in answers]
        # 2 LCS / (both lengths) is the F1 of ROUGE-L.
        likeness = cdist(words, words, scorer=Indel.normalized_similarity).sum(axis=1)
        agreed = (likeness - 1) / (samples - 1)
        whole = np.array([answer[-1] == student.end for answer in answers])
        order = np.argsort(-(agreed - ~whole))
        for best, worst in zip(order[:2], order[::-1][:2], strict=True):
            if whole[best] and agreed[best] - agreed[worst] > GAP:
                chosen, rejected = answers[best], answers[worst]
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def run_seed(student: Student, seed: int, texts: dict, args, kept: dict) -> None:
    """Train and answer by all three ways; their answers to the test texts go into `kept`."""
    started = time.monotonic()

    def keep(way: str, note: str = "") -> None:
        greedy = student.answer([one["prompt"] for one in texts["test"]])
        kept[f"{way}, {seed}"] = [student.text(answers[0]) for answers in greedy]
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(kept))
        print(f"seed {seed}: {way} {note} {time.monotonic() - started:.0f} s", flush=True)

    student.reset(seed)
    student.train(texts["train"], student.sft_loss, RATES["SFT"], BATCHES["SFT"], passes=3)
    keep("SFT", f"on {len(texts['train'])} texts")
    tuned = copy.deepcopy(student.model.state_dict())
    pairs = consensus_pairs(student, [one["prompt"] for one in texts["free"]], args.samples)
    student.add_references(pairs)
    losses = {"preferences": student.preference_loss, "SFT on the chosen": student.sft_loss}
    for way, loss in losses.items():
        student.model.load_state_dict(tuned)
        student.train(pairs, loss, RATES[way], BATCHES[way])
        keep(way, f"on {len(pairs)} pairs")


def score(kept: dict, test: list[dict]) -> None:
    """Print F1, ROUGE-L, words and repetition of every way, and its intervals to SFT."""
    from common.report import format_interval, paired_bootstrap
    from eval.measures import BertScore, basics, rouge

    rows = [{"reference": one["reply"]} for one in test]
    measures, found = (BertScore("models/minilm", 6, 64), rouge, basics), {}
    for name, answers in kept.items():
        columns = {k: v for m in measures for k, v in m(answers, rows).items()}
        means = {k: np.mean(columns[k]) for k in ("bertscore_f1", "rouge_l", "words", "repetition")}
        print(name, *(f"{k} {v:.4f}" for k, v in means.items()), flush=True)
        way = name.rsplit(", ", 1)[0]
        found.setdefault(way, []).append([columns["bertscore_f1"], columns["rouge_l"]])
    for way in found.keys() - {"SFT"}:
        ours, sft = (np.array(found[name]).transpose(1, 0, 2) for name in (way, "SFT"))
        gains = [format_interval(*paired_bootstrap(*both)) for both in zip(ours, sft, strict=True)]
        print(f"{way} minus SFT, n {len(rows)}: F1 {gains[0]}, ROUGE-L {gains[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/wide"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--samples", type=int, default=12, help="answers drawn for each text")
    parser.add_argument("--texts", type=int, help="only the first so many of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--score", action="store_true", help="only score the answers that are kept")
    args = parser.parse_args()
    test = [one for one in read_texts(args.data, "test") if one["reply"]][: args.texts]
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if not args.score:
        train = read_texts(args.data, "train")
        student = Student(args.max_new_tokens)
        texts = {"train": [one for one in train if one["reply"]][: args.texts], "test": test}
        texts["free"] = [one for one in train if not one["reply"]][: args.texts]
        for one in (one for part in texts.values() for one in part):
            one["prompt"] = student.prompt(one["text"])
            one["chosen"] = [*student.ids(one["reply"]), student.end]
        for seed in args.seeds:
            if f"SFT on the chosen, {seed}" not in kept:
                run_seed(student, seed, texts, args, kept)
    if args.score or DEVICE == "cpu":
        score(kept, test)


if __name__ == "__main__":
    main()
