"""A model's answers to prompts: batches, greedy or sampled, cut at the end of the turn."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import takewhile

from common.cli import UserError, one_line, warn
from common.text import control_tokens, likeness, plain_text
from inference.draw_samples import draw_samples
from inference.weights import OutOfMemory, memory_told
from prompts.task import Task, load_task
from training.chat import build_chat

LESS_MEMORY = "lower --max-prompt-tokens, --max-new-tokens or --samples"


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
    """Index of the text that is most like all of them: minimum Bayes risk decoding (Kumar and Byrne
    2004) where they are samples of one model."""
    alike = likeness(texts)
    return alike.index(max(alike))


def to_answer(ids: list[int], tokenizer, ends: list[int]) -> dict:
    """The record of a continuation, cut at the end of the turn, if that came."""
    kept = list(takewhile(lambda token: token not in ends, ids))
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    end = "length" if len(kept) == len(ids) else "stop"
    return {"text": text, "finish_reason": end, "n_new_tokens": len(kept)}


def encode(model, tokenizer, prompts: list[str]):
    """The prompts as tensors of shape (prompts, tokens), padded on the left, and their lengths."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    return inputs.to(model.device), inputs.attention_mask.sum(1).tolist()


def generate_batch(
    model, tokenizer, prompts: list[str], n_new: int, samples: int = 0, **options
) -> list[dict]:
    """A record for each greedy continuation of a batch, cut at the end of the turn; or, of it and
    as many `samples`, for the one that is most like them all. Raises OutOfMemory."""
    inputs, lengths = encode(model, tokenizer, prompts)
    drawn = [[] for _ in prompts]
    with memory_told(LESS_MEMORY):
        outputs = model.generate(**inputs, max_new_tokens=n_new, **options)
        if samples:
            drawn = draw_samples(model, inputs, samples, n_new, prompts)
    ends = model.generation_config.eos_token_id
    results = []
    greedy = outputs[:, inputs["input_ids"].shape[1] :].tolist()
    for n_prompt, ids, sampled in zip(lengths, greedy, drawn, strict=True):
        answers = [to_answer(one, tokenizer, ends) for one in (ids, *sampled)]
        best = answers[most_alike([answer["text"] for answer in answers])]
        counts = {"n_prompt_tokens": n_prompt, "n_new_tokens": best.pop("n_new_tokens")}
        results.append(best | counts)
    return results


def sample_batch(model, tokenizer, prompts: list[str], n_new: int, samples: int) -> list[dict]:
    """A record for each prompt that holds all of its `samples`, each with its text and how it
    ended. Raises OutOfMemory."""
    inputs, lengths = encode(model, tokenizer, prompts)
    with memory_told(LESS_MEMORY):
        drawn = draw_samples(model, inputs, samples, n_new, prompts)
    ends = model.generation_config.eos_token_id
    results = []
    for n_prompt, sampled in zip(lengths, drawn, strict=True):
        answers = [to_answer(ids, tokenizer, ends) for ids in sampled]
        results.append({"samples": answers, "n_prompt_tokens": n_prompt})
    return results


def pack_batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of like length, the longest first; a batch, padded and
    with its answers, holds at most `batch_tokens`, or a single prompt."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        yield order[:size]
        order = order[size:]


def prompt_limit(config, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt that leaves room for an answer in the context of a model's config. Raises
    UserError if there is none."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None:  # a model without such a limit
        return max_prompt_tokens
    room = context - max_new_tokens
    if room < 1:
        asked = f"--max-new-tokens {max_new_tokens}"
        raise UserError(f"{asked} leaves no room in a context of {context} tokens")
    return min(max_prompt_tokens, room)


def answer_prompts(
    answer_batch: Callable[[list[str]], list[dict]],
    tokenizer,
    prompts: list[str],
    most_new: int,
    batch_tokens: int,
) -> Iterator[tuple[int, dict]]:
    """(index of a prompt, its record) batch by batch; a batch that the memory does not hold is
    halved. `answer_batch` gives the records of a batch (`generate_batch`, `sample_batch`), and
    `most_new` tokens are all that the answers to one prompt may have. Raises OutOfMemory for a
    prompt that is too large alone."""
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in prompts]
    batches = deque(pack_batches(lengths, most_new, batch_tokens))
    while batches:
        batch = batches.popleft()
        of_batch = [prompts[i] for i in batch]
        try:
            outputs = answer_batch(of_batch)
        except OutOfMemory as error:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            batches.extendleft([batch[half:], batch[:half]])
            warn(f"{one_line(error, 80)}: batches of {half}, as with a smaller --batch-tokens")
            continue
        yield from zip(batch, outputs, strict=True)
