"""What a student's chat template makes of a conversation: one way for training, answers, serving.

Everything that writes a prompt for a student, or asks where its turn ends, goes through here.
"""

from common.text import control_tokens, plain_text

ANSWER = "An answer."
CONVERSATION = [{"role": "user", "content": "A text."}, {"role": "assistant", "content": ANSWER}]
# A student that reasons by default answers at once: Qwen3, SmolLM3 and GLM read the first,
# DeepSeek the second; other templates pass both over.
NO_THINKING = {"enable_thinking": False, "thinking": False}
# The same within a template, for training, which passes no options to it.
SILENCED = "".join(f"{{% set {name} = false %}}" for name in NO_THINKING)


def build_chat(tokenizer, messages: list[dict[str, str]]) -> str:
    """The prompt of a conversation, up to where the student's answer begins; not to think first."""
    tokens = control_tokens(tokenizer)
    plain = [one | {"content": plain_text(one["content"], tokens)} for one in messages]
    return sent_prompt(tokenizer, plain)


def sent_prompt(tokenizer, messages: list[dict[str, str]]) -> str:
    """The prompt of messages that hold no control tokens any more."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **NO_THINKING
    )


def trained_prompt(tokenizer, messages: list[dict[str, str]]) -> str:
    """The prompt as axolotl's preference strategies write it, with no options of the template."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def trained_conversation(tokenizer, messages: list[dict[str, str]]) -> str:
    """A whole conversation as axolotl writes it, with no options of the template."""
    return tokenizer.apply_chat_template(messages, tokenize=False)


def answer_lead(tokenizer) -> str | None:
    """What training reads between the prompt as it is sent and an answer: nothing, or a space.

    None where it reads another prompt than the one that is sent.
    """
    before, _, _ = trained_conversation(tokenizer, CONVERSATION).rpartition(ANSWER)
    sent = sent_prompt(tokenizer, CONVERSATION[:1])
    return before[len(sent) :] if before.startswith(sent) else None


def answer_tail(tokenizer, **options: bool) -> str:
    """What a template writes behind an answer, such as `<|im_end|>` and a line break."""
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, **options)
    _, answer, tail = whole.rpartition(ANSWER)
    return tail if answer else ""  # of a template that leaves answers out


def turn_end(tokenizer) -> str:
    """The token that ends a student's turn in its template; its eos where that has none."""
    end = template_end(tokenizer)
    return tokenizer.eos_token if end is None else end


def template_end(tokenizer) -> str | None:
    """The first token of its own that the template writes behind an answer, None for none."""
    tail = answer_tail(tokenizer, **NO_THINKING)
    special = tokenizer.added_tokens_decoder
    for token_id in tokenizer(tail, add_special_tokens=False).input_ids:
        if token_id in special and special[token_id].content.strip():
            return tokenizer.convert_ids_to_tokens(token_id)
    return None


def stop_ids(tokenizer, generation_config=None) -> list[int]:
    """Ids of the tokens that end an answer: the turn's end, the tokenizer's and the model's eos."""
    of_model = getattr(generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    ids = [tokenizer.convert_tokens_to_ids(turn_end(tokenizer)), tokenizer.eos_token_id, *of_model]
    return [i for i in dict.fromkeys(ids) if i is not None]
