"""Generation by vLLM, for those who have it installed: `generate_summaries --backend vllm`."""

import argparse
from pathlib import Path

from common.cli import UserError
from eval.systems import System, base_of_adapter, model_config, precision

CHUNK = 256  # prompts that vLLM is given at once, and so the most that a kill can lose


def vllm_engine(system: System, overrides: dict, args: argparse.Namespace) -> tuple:
    """As `transformers_engine`; vLLM packs the memory itself."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UserError("--backend vllm needs the package vllm; pip install vllm") from None
    if base_of_adapter(Path(system.model)):
        raise UserError(f"--backend vllm takes {system.model} merged (`just merge CONFIG`)")
    config = model_config(system.model, system.revision, overrides)
    context = min(config.max_position_embeddings, args.max_prompt_tokens + args.max_new_tokens)
    llm = LLM(
        system.model,
        revision=system.revision,
        max_model_len=context,
        dtype=precision(),
        hf_overrides={"rope_parameters": config.rope_parameters} if overrides else None,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)

    def generate(prompts: list[str]) -> list[dict]:
        ids = llm.get_tokenizer()(prompts, add_special_tokens=False).input_ids
        outputs = llm.generate([{"prompt_token_ids": i} for i in ids], greedy, use_tqdm=False)
        return [
            {
                "text": output.outputs[0].text.strip(),
                "finish_reason": output.outputs[0].finish_reason,
                "n_prompt_tokens": len(output.prompt_token_ids),
                "n_new_tokens": len(output.outputs[0].token_ids),
            }
            for output in outputs
        ]

    def batches(lengths: list[int]) -> list[list[int]]:
        return [[*range(len(lengths))][i : i + CHUNK] for i in range(0, len(lengths), CHUNK)]

    return llm.get_tokenizer(), context, batches, generate
