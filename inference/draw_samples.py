"""Several sampled answers to each prompt of a batch, at temperature 1, each seeded by its content.

The samples of a prompt are branches of one sequence. A step reads the newest token of every branch,
side by side, and a mask lets each see the prompt and its own branch alone (tree attention, as in
SpecInfer, arXiv:2305.09781). So the prompt is read, kept and attended to once for all of its
samples; what has ended is read no further.
"""

from common.files import digest

# Part of what tells sampled answers from others: how they are drawn.
SAMPLING = "one number a token, seeded by the prompt and the sample's number"
OF_PROMPT, PADDING = -1, -2  # owners of what lies in the cache, beside the numbers of the branches


class Uniforms:
    """Random numbers from 0 to 1, a row for each sample of each prompt; a number draws a token.

    So a sample depends neither on the batch that its prompt falls into nor on how many others are
    drawn, but for the rounding of the logits: in bfloat16 a batch of another width may turn a
    close choice. Drawn on the CPU, they are the same on every device.
    """

    def __init__(self, prompts: list[str], samples: int, n_new: int, device):
        import torch

        rows = []
        for prompt in prompts:
            for number in range(samples):
                seed = int(digest(prompt, number), 16) % 2**63
                rows.append(torch.rand(n_new, generator=torch.Generator().manual_seed(seed)))
        # Of shape (prompts, samples, tokens). No 0, which would draw a token that cannot come.
        numbers = torch.stack(rows).clamp_(min=2**-25)
        self.values = numbers.unflatten(0, (len(prompts), samples)).to(device)

    def draw(self, logits, step: int, rows, branches):
        """Tokens of shape (rows, branches) for the `step`th of some branches of some prompts, by
        logits of shape (rows, branches or 1, vocabulary): the inverse of the distribution."""
        import torch

        cumulative = logits.float().softmax(-1).cumsum(-1)
        numbers = self.values[rows[:, None], branches, step]
        if cumulative.shape[1] == 1:  # the first token, of the same logits for all branches
            total = cumulative[:, 0, -1:]
            return torch.searchsorted(cumulative[:, 0], numbers * total)
        # Rounding leaves the total a little off 1.
        totals = cumulative[..., -1]
        return torch.searchsorted(cumulative, (numbers * totals)[..., None])[..., 0]


class Branches:
    """The samples that have not ended, of each prompt that has any, and what each may see."""

    def __init__(self, attention_mask, samples: int):
        import torch

        n_prompts, device = len(attention_mask), attention_mask.device
        self.rows = torch.arange(n_prompts, device=device)  # of which prompt, a row each
        self.ids = torch.arange(samples, device=device).repeat(n_prompts, 1)
        self.lengths = attention_mask.sum(1)
        # Whose each place of the cache is: (rows, places).
        self.owners = torch.where(attention_mask.bool(), OF_PROMPT, PADDING)

    def extend(self, dtype):
        """Add a token of each branch to the cache's places; return the mask of what these may see,
        of shape (rows, 1, branches, places), as it is added to the scores of attention."""
        import torch

        self.owners = torch.cat([self.owners, self.ids], 1)
        owners = self.owners[:, None]
        seen = (owners == OF_PROMPT) | (owners == self.ids[..., None])
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    def keep(self, running, tokens, cache):
        """Leave out branches that have ended, by `running` (rows, branches); return the tokens of
        those that stay, and whether each of them runs: a row with fewer than the others keeps
        ended ones beside them."""
        alive = running.any(1)
        # Leaving prompts out copies the cache of those that stay: only where half of them ended.
        if 2 * alive.sum() <= len(alive):
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            self.rows, self.ids = self.rows[kept], self.ids[kept]
            self.lengths, self.owners = self.lengths[kept], self.owners[kept]
            running, tokens = running[kept], tokens[kept]
        width = int(running.sum(1).max())
        order = running.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        self.ids = self.ids.gather(1, order)
        return tokens.gather(1, order), running.gather(1, order)


def draw_samples(model, inputs, samples: int, n_new: int, prompts: list[str]) -> list[list]:
    """For each prompt the token ids of as many sampled continuations, up to the end of the turn or
    of `n_new` tokens. `inputs`: the prompts as tensors (prompts, tokens), padded on the left; their
    texts seed the samples."""
    import torch
    from transformers import DynamicCache

    mask, ends = inputs["attention_mask"], model.generation_config.eos_token_id
    ends = torch.tensor(ends, device=mask.device)
    uniforms, branches = Uniforms(prompts, samples, n_new, mask.device), Branches(mask, samples)
    drawn = torch.full((len(prompts), samples, n_new), -1, device=mask.device)
    cache = DynamicCache()  # without windows: the mask alone says what is seen
    with torch.inference_mode():
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        running = torch.ones_like(branches.ids, dtype=torch.bool)
        for step in range(n_new):
            tokens = uniforms.draw(logits, step, branches.rows, branches.ids)
            place = branches.rows[:, None].expand_as(tokens)[running], branches.ids[running]
            drawn[(*place, step)] = tokens[running]
            running = running & ~torch.isin(tokens, ends)
            if step == n_new - 1 or not running.any():
                break
            tokens, running = branches.keep(running, tokens, cache)
            positions = (branches.lengths[:, None] + step).expand_as(tokens)
            logits = model(
                input_ids=tokens,
                attention_mask=branches.extend(model.dtype),
                position_ids=positions,
                past_key_values=cache,
            ).logits
    ids = drawn.tolist()
    return [[[token for token in one if token >= 0] for one in of_prompt] for of_prompt in ids]
