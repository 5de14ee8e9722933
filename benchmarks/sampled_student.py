"""A small model with a LoRA adapter that is sampled from and trained many times, in its own loop.

Axolotl trains one adapter a process; `benchmarks.self_consistency` samples and trains in turns. A
prompt is read once for all its answers, in decoding as in training.
"""

import copy
import math
import random
from itertools import chain

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.shared_prompt import SharedPrompt
from prompts import load_task

STUDENT = "models/smollm2-135m-instruct"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA, BATCH = 0.1, 256 if DEVICE == "cpu" else 6000  # answers that are decoded at once
AT_ONCE = 4 if DEVICE == "cpu" else 16  # rows that are trained on at once; 16 take 24 GiB


class Student:
    """The small model with a LoRA adapter on it, and its answers as lists of token ids."""

    def __init__(self, n_new: int, chosen: int = 2, sft_weight: float = 0.1):
        """`chosen`: of a text's answers, as many are rejected; `sft_weight`: beside DPO's loss."""
        self.chosen, self.sft_weight = chosen, sft_weight
        self.tokenizer = AutoTokenizer.from_pretrained(STUDENT)
        self.base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16).to(DEVICE)
        self.end, self.pad, self.n_new = self.base.config.eos_token_id, 0, n_new

    def reset(self, seed: int) -> None:
        torch.manual_seed(seed)
        lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(copy.deepcopy(self.base), lora)  # the adapter in 32 bits

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
    def answer(self, prompts: list, samples: int = 1, temperature: float = 1.0) -> list:
        """For each prompt `samples` sampled answers, or the greedy one, as lists of token ids."""
        model = copy.deepcopy(self.model).merge_and_unload()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers, size = [[] for _ in prompts], max(1, min(128, BATCH // samples))
        for start in tqdm(range(0, len(order), size), "answers", disable=None):
            part = order[start : start + size]
            found = self.decode(model, [prompts[i] for i in part], samples, temperature)
            for i, rows in zip(part, found, strict=True):
                ends = [row.index(self.end) + 1 if self.end in row else self.n_new for row in rows]
                answers[i] = [row[:end] for row, end in zip(rows, ends, strict=True)]
        return answers

    def decode(self, model, prompts: list, samples: int, temperature: float) -> list:
        """(prompts, samples, n_new) token ids; what follows an answer's end is the end again."""
        state = SharedPrompt(model, self.padded(prompts, left=True), samples, self.n_new)
        answers = torch.full((len(prompts), samples, self.n_new), self.end, device=DEVICE)
        ended = torch.zeros(answers.shape[:2], dtype=torch.bool, device=DEVICE)
        for place in range(self.n_new):
            drawn = state.logits.argmax(-1)
            if samples > 1:
                odds = (state.logits / temperature).softmax(-1).flatten(0, 1)
                drawn = odds.multinomial(1).view(ended.shape)
            answers[:, :, place] = drawn = drawn.masked_fill(ended, self.end)
            ended |= drawn == self.end
            if place + 1 == self.n_new or ended.all():
                break
            state.read(drawn)
        return answers.tolist()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def log_probabilities(self, rows: list[tuple[list[int], list[list[int]]]]) -> tuple:
        """(summed log-probability of each answer to its prompt, the answers' lengths).

        A row is a prompt and its answers, in one sequence: each answer sees the prompt and itself.
        """
        inputs = self.padded([[*prompt, *chain(*answers)] for prompt, answers in rows])
        whose, place = torch.zeros_like(inputs["input_ids"]), torch.zeros_like(inputs["input_ids"])
        before, target, owner, lengths = [], [], [], []
        for row, (prompt, answers) in enumerate(rows):
            at = len(prompt)
            place[row, :at] = torch.arange(at)
            for number, answer in enumerate(answers, 1):
                end = at + len(answer)
                whose[row, at:end] = number
                place[row, at:end] = torch.arange(len(prompt), len(prompt) + len(answer))
                before += [(row, len(prompt) - 1), *((row, i) for i in range(at, end - 1))]
                target, owner, at = target + answer, owner + [len(lengths)] * len(answer), end
                lengths.append(len(answer))
        if max(len(answers) for _, answers in rows) > 1:
            seen = (whose[:, None] == 0) | (whose[:, None] == whose[:, :, None])
            inputs["attention_mask"] = seen.tril()[:, None]  # nobody sees the padding behind
            inputs["position_ids"] = place
        decoder = self.model.get_base_model()
        with torch.autocast(DEVICE, torch.bfloat16):  # logits of the answers' tokens alone
            hidden = decoder.model(**inputs).last_hidden_state
            logits = decoder.lm_head(hidden[tuple(torch.tensor(before, device=DEVICE).T)])
        target, owner, lengths = (torch.tensor(x, device=DEVICE) for x in (target, owner, lengths))
        found = -cross_entropy(logits.float(), target, reduction="none")
        return torch.zeros(len(lengths), device=DEVICE).index_add(0, owner, found), lengths

    def train(self, rows: list, loss_of, rate: float, batch: int, passes: int = 1) -> None:
        """AdamW, a tenth of warm-up, then a cosine."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
        draw, batches = random.Random(0), []
        for _ in range(passes):
            rows = draw.sample(rows, len(rows))
            batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
        for step, part in enumerate(tqdm(batches, loss_of.__name__, disable=None)):
            warm = min(1.0, (step + 1) / (0.1 * len(batches)))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            optimizer.zero_grad()
            for few in (part[i : i + AT_ONCE] for i in range(0, len(part), AT_ONCE)):
                (loss_of(few) * len(few) / len(part)).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

    def sft_loss(self, part: list[dict]) -> torch.Tensor:
        found, lengths = self.log_probabilities([(r["prompt"], [r["chosen"]]) for r in part])
        return -found.sum() / lengths.sum()

    def chosen_loss(self, part: list[dict]) -> torch.Tensor:
        rows = [(r["prompt"], r["answers"][: self.chosen]) for r in part]
        found, lengths = self.log_probabilities(rows)
        return -found.sum() / lengths.sum()

    def answers_of(self, part: list[dict]) -> list[torch.Tensor]:
        """Log-probabilities and lengths of the rows' answers, (rows, answers a row) each."""
        found = self.log_probabilities([(r["prompt"], r["answers"]) for r in part])
        return [one.view(len(part), -1) for one in found]

    def preference_loss(self, part: list[dict]) -> torch.Tensor:
        """DPO (arXiv:2305.18290) of each chosen against each rejected answer, with the SFT model as
        the reference, and the SFT loss of the chosen."""
        found, lengths = self.answers_of(part)
        gains = found - torch.tensor([r["reference"] for r in part], device=DEVICE)
        chosen = self.chosen
        margins = BETA * (gains[:, :chosen, None] - gains[:, None, chosen:])
        sft = -found[:, :chosen].sum() / lengths[:, :chosen].sum()
        return -logsigmoid(margins).mean() + self.sft_weight * sft

    @torch.no_grad()
    def add_references(self, rows: list[dict]) -> None:
        for start in tqdm(range(0, len(rows), 16), "references", disable=None):
            part = rows[start : start + 16]
            for row, found in zip(part, self.answers_of(part)[0].tolist(), strict=True):
                row["reference"] = found
