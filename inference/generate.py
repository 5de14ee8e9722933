"""A model's answers to prompts: batches, greedy or sampled, cut at the end of the turn."""

from collections import deque
from collections.abc import Iterator
from itertools import takewhile

from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

from common.cli import UserError, one_line, warn
from common.files import digest
from common.text import control_tokens, plain_text, words_of
from inference.weights import OutOfMemory, memory_told
from prompts.task import Task, load_task
from training.chat import build_chat

# Part of what tells a consensus' answers from others: how its samples are drawn.
SAMPLING = "Gumbel noise, seeded by the prompt"


def build_prompt(
    tokenizer, text: str, template: str | None, max_tokens: int, task: Task | None = None
) -> tuple[str, int]:
    """(prompt, number of tokens cut off the text's end so that the prompt fits)."""
    task = task or load_task()

    def prompt_of(part: str) -> str:
        return build_chat(tokenizer, task.student_messages(part, template))

    def tokens_over(prompt: str) -> int:
        return len(tokenizer(prompt, add_special_tokens=False).input_ids) - max_tokens

    prompt = prompt_of(text)
    over = tokens_over(prompt)
    if over <= 0:
        return prompt, 0
    ids = tokenizer(plain_text(text, control_tokens(tokenizer)), add_special_tokens=False).input_ids
    cut = 0
    while over > 0:  # once more where the template makes more of a shorter text
        cut += over
        if cut >= len(ids):
            raise UserError(f"--max-prompt-tokens {max_tokens} leaves no room for any text")
        prompt = prompt_of(tokenizer.decode(ids[:-cut]))
        over = tokens_over(prompt)
    return prompt, cut


def most_alike(texts: list[str]) -> int:
    """Index of the text that is most like all of them, by ROUGE-L's F1 of words: minimum Bayes risk
    decoding (Kumar and Byrne 2004) where they are samples of one model."""
    words = [words_of(text) or [""] for text in texts]
    return int(cdist(words, words, scorer=Indel.normalized_similarity).mean(axis=1).argmax())


class SeededNoise:
    """Makes greedy decoding draw samples at temperature 1: Gumbel noise on the logits (Gumbel-max,
    Maddison et al. 2014, arXiv:1411.0030), of a generator for each prompt.

    So the samples of a prompt do not depend on the batch that it falls into, but for the rounding
    of the logits: in bfloat16 a batch of another width may turn a close choice.
    """

    def __init__(self, prompts: list[str], samples: int, device):
        import torch

        self.samples, self.generators = samples, []
        for prompt in prompts:
            seed = int(digest(prompt), 16) % 2**63
            self.generators.append(torch.Generator(device).manual_seed(seed))

    def __call__(self, input_ids, logits):
        """Logits of shape (prompts * samples, vocabulary), the samples of a prompt side by side."""
        import torch

        noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        of_prompts = noise.unflatten(0, (-1, self.samples))
        for drawn, generator in zip(of_prompts, self.generators, strict=True):
            drawn.exponential_(generator=generator)
        # Minus the log of an exponential is Gumbel's. A 0, which 24 bits of chance round a small
        # one to, would be infinite.
        return logits.float() - noise.clamp_(min=2**-25).log_()


def draw_samples(model, inputs: dict, samples: int, n_new: int, prompts: list[str]):
    """(prompts * samples, tokens): as many sampled continuations of each prompt, side by side. A
    prompt is read once for all of its samples; generate alone would read it for each. The texts of
    the `prompts` seed the samples."""
    from transformers import DynamicCache, LogitsProcessorList

    cache, read = DynamicCache(config=model.config), {k: v[:, :-1] for k, v in inputs.items()}
    model.generate(**read, max_new_tokens=1, past_key_values=cache)
    cache.batch_repeat_interleave(samples)
    noise = LogitsProcessorList([SeededNoise(prompts, samples, model.device)])
    inputs = {k: v.repeat_interleave(samples, 0) for k, v in inputs.items()}
    return model.generate(
        **inputs, max_new_tokens=n_new, past_key_values=cache, logits_processor=noise
    )


def generate_batch(
    model, tokenizer, prompts: list[str], n_new: int, samples: int = 0, **options
) -> list[dict]:
    """A record for each greedy continuation of a batch, cut at the end of the turn; or, of it and
    as many `samples`, for the one that is most like them all. Raises OutOfMemory."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = inputs.to(model.device)
    with memory_told("lower --max-prompt-tokens, --max-new-tokens or --samples"):
        made = [model.generate(**inputs, max_new_tokens=n_new, **options)]
        if samples:
            made.append(draw_samples(model, inputs, samples, n_new, prompts))
    # (prompts, one or `samples`, tokens)
    made = [m[:, inputs.input_ids.shape[1] :].unflatten(0, (len(prompts), -1)) for m in made]
    results, ends = [], model.generation_config.eos_token_id
    for i, n_prompt in enumerate(inputs.attention_mask.sum(1).tolist()):
        rows = [ids for part in made for ids in part[i].tolist()]
        answers = [list(takewhile(lambda token: token not in ends, ids)) for ids in rows]
        texts = [one.strip() for one in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        best = most_alike(texts)
        end = "length" if len(answers[best]) == len(rows[best]) else "stop"
        counts = {"n_prompt_tokens": n_prompt, "n_new_tokens": len(answers[best])}
        results.append({"text": texts[best], "finish_reason": end, **counts})
    return results


def pack_batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of like length, the longest first; a batch, padded and
    with its answers, holds at most `batch_tokens`, or a single prompt."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        yield order[:size]
        order = order[size:]


def prompt_limit(model, settings: dict) -> int:
    """The longest prompt that leaves room for an answer. Raises UserError if there is none."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:  # a model without such a limit
        return settings["max_prompt_tokens"]
    room = context - settings["max_new_tokens"]
    if room < 1:
        asked = f"--max-new-tokens {settings['max_new_tokens']}"
        raise UserError(f"{asked} leaves no room in a context of {context} tokens")
    return min(settings["max_prompt_tokens"], room)


def answer_prompts(
    model, tokenizer, prompts: list[str], n_new: int, batch_tokens: int, samples: int
) -> Iterator[tuple[int, dict]]:
    """(index of a prompt, its record) batch by batch; a batch that the memory does not hold is
    halved. Raises OutOfMemory for a prompt that is too large alone."""
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in prompts]
    batches = deque(pack_batches(lengths, n_new, batch_tokens))
    while batches:
        batch = batches.popleft()
        of_batch = [prompts[i] for i in batch]
        try:
            outputs = generate_batch(model, tokenizer, of_batch, n_new, samples)
        except OutOfMemory as error:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            batches.extendleft([batch[half:], batch[:half]])
            warn(f"{one_line(error, 80)}: batches of {half}, as with a smaller --batch-tokens")
            continue
        yield from zip(batch, outputs, strict=True)
