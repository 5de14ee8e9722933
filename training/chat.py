"""What a student's chat template makes of a conversation: one way for training, answers, serving.

Everything that writes a prompt for a student, or asks where its turn ends, goes through here.
"""

import re

from common.text import plain_text

BRACKETED = re.compile(r"[<\[].+[>\]]")
ANSWER = "An answer."
# A student that reasons by default answers at once: Qwen3, SmolLM3 and GLM read the first,
# DeepSeek the second; other templates pass both over.
NO_THINKING = {"enable_thinking": False, "thinking": False}


def control_tokens(tokenizer) -> list[str]:
    """The tokens that mean something to the model and must not be read out of a text."""
    template = str(tokenizer.chat_template or "")
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or token.content in template) and BRACKETED.fullmatch(token.content)
    ]


def build_chat(tokenizer, messages: list[dict[str, str]]) -> str:
    """The prompt of a conversation, up to where the student's answer begins; not to think first."""
    tokens = control_tokens(tokenizer)
    plain = [one | {"content": plain_text(one["content"], tokens)} for one in messages]
    return tokenizer.apply_chat_template(
        plain, tokenize=False, add_generation_prompt=True, **NO_THINKING
    )


def turn_end(tokenizer) -> str:
    """The token that ends a student's turn in its template; its eos where that has none."""
    conversation = [
        {"role": "user", "content": "A text."},
        {"role": "assistant", "content": ANSWER},
    ]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False, **NO_THINKING)
    ids = tokenizer(whole.rpartition(ANSWER)[2], add_special_tokens=False).input_ids
    ends = [i for i in ids if i in tokenizer.added_tokens_decoder]
    ends = [i for i in ends if tokenizer.decode([i]).strip()]
    return tokenizer.convert_ids_to_tokens(ends[0]) if ends else tokenizer.eos_token


def stop_ids(tokenizer, generation_config=None) -> list[int]:
    """Ids of the tokens that end an answer: the turn's end, the tokenizer's and the model's eos."""
    of_model = getattr(generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    ids = [tokenizer.convert_tokens_to_ids(turn_end(tokenizer)), tokenizer.eos_token_id, *of_model]
    return [i for i in dict.fromkeys(ids) if i is not None]
