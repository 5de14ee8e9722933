"""Many answers to one prompt by a Llama-like model, the prompt's keys and values kept once.

transformers copies a prompt's cache for each of its answers, and the whole cache at each token.
Here attention to the prompt and to the answer are two products under one softmax (as in Hydragen,
arXiv:2402.05099).
"""

import torch
from transformers import DynamicCache


def normalize(states: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """RMSNorm in float32."""
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(states.dtype)


class SharedPrompt:
    """Prompts that are read, with `samples` answers of at most `most` tokens to each."""

    def __init__(self, model, inputs: dict[str, torch.Tensor], samples: int, most: int):
        config, cache, mask = (
            model.config,
            DynamicCache(config=model.config),
            inputs["attention_mask"],
        )
        self.model, self.core, self.n = model, model.model, 0
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(**inputs, position_ids=places, past_key_values=cache, logits_to_keep=1)
        self.logits = found.logits[:, -1:].float().expand(-1, samples, -1)
        self.prompt = [(layer.keys, layer.values) for layer in cache.layers]
        self.lengths = mask.sum(1)
        self.hidden = (mask == 0)[:, None, None, None]  # (prompts, groups, samples, heads, tokens)
        shape = (len(mask), samples, self.groups, most, self.prompt[0][0].shape[-1])
        self.answer = [
            tuple(torch.empty(shape, dtype=kv[0].dtype, device=mask.device) for _ in kv)
            for kv in self.prompt
        ]

    def attend(self, q: torch.Tensor, prompt: tuple, answer: tuple) -> torch.Tensor:
        """(prompts, samples, groups, heads a group, size) of queries -> as many of values."""
        n, samples, groups, heads, size = q.shape
        to_prompt = q.transpose(1, 2).reshape(n, groups, samples * heads, size)
        to_prompt = (to_prompt @ prompt[0].transpose(2, 3)).view(n, groups, samples, heads, -1)
        to_prompt = to_prompt.float().masked_fill(self.hidden, -torch.inf).transpose(1, 2)
        keys, values = (kv[:, :, :, : self.n + 1] for kv in answer)
        to_answer = (q @ keys.transpose(3, 4)).float()
        weights = (torch.cat((to_prompt, to_answer), -1) / size**0.5).softmax(-1).to(q.dtype)
        of_prompt, of_answer = weights.tensor_split([to_prompt.shape[-1]], -1)
        of_prompt = of_prompt.transpose(1, 2).reshape(n, groups, samples * heads, -1) @ prompt[1]
        of_prompt = of_prompt.view(n, groups, samples, heads, size).transpose(1, 2)
        return of_prompt + of_answer @ values

    def read(self, tokens: torch.Tensor) -> None:
        """Put a token behind each answer, (prompts, samples); `logits` are then the next ones'."""
        states = self.core.embed_tokens(tokens)
        cos, sin = self.core.rotary_emb(states[:, :1], (self.lengths + self.n)[:, None])
        cos, sin = cos[:, :, None], sin[:, :, None]

        def turned(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        for layer, prompt, answer in zip(self.core.layers, self.prompt, self.answer, strict=True):
            own, shape = layer.self_attn, (*tokens.shape, self.groups, -1)
            found = normalize(states, layer.input_layernorm)
            q = turned(own.q_proj(found).view(*tokens.shape, self.heads, -1))
            answer[0][:, :, :, self.n] = turned(own.k_proj(found).view(shape))
            answer[1][:, :, :, self.n] = own.v_proj(found).view(shape)
            found = self.attend(q.unflatten(2, (self.groups, -1)), prompt, answer)
            states = states + own.o_proj(found.flatten(2))
            states = states + layer.mlp(normalize(states, layer.post_attention_layernorm))
        self.logits = self.model.lm_head(normalize(states, self.core.norm)).float()
        self.n += 1
