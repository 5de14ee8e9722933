"""A student as training meets it: its tokenizer and chat template, and the keys that these need.

Training writes a conversation without options of the chat template, answering tells a student that
thinks by default not to (training/chat.py). Both must come out alike, and the token that ends an
answer must be among those that are trained.
"""

import copy

from jinja2 import TemplateError

from common.cli import UserError, one_line
from training.chat import (
    CONVERSATION,
    SILENCED,
    answer_lead,
    answer_tail,
    sent_prompt,
    template_end,
    trained_prompt,
)

# The dataset types that write prompts with the student's chat template.
SFT_TYPE = "chat_template"
PREFERENCE_TYPES = ("chat_template.default", ".dpo.chat_template.default")
MOST_TOKENS_TO_END = 3  # between an answer and its end, where axolotl looks for it
WAY_OUT = "--set chat_template=chatml replaces the template, in use as well"


def load_student_tokenizer(settings: dict):
    """The base's tokenizer with the chat template that the config trains. Raises UserError."""
    from transformers import AutoTokenizer

    base, revision = settings["base_model"], settings.get("revision_of_model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{base} has no tokenizer to load: {one_line(error, 200)}") from None
    entry = settings["datasets"][0]
    source = settings if not entry.get("chat_template") else entry
    choice = source.get("chat_template") or "tokenizer_default"
    if choice != "tokenizer_default":
        from axolotl.utils.chat_templates import get_chat_template

        try:
            template = get_chat_template(choice, source.get("chat_template_jinja"), tokenizer)
        except (ValueError, OSError) as error:
            raise UserError(f"chat_template: {one_line(error, 200)}") from None
        tokenizer.chat_template = template
    for name, token in (settings.get("special_tokens") or {}).items():
        if name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            setattr(tokenizer, name, token)
    return tokenizer


def writes_with_template(settings: dict) -> bool:
    """Whether all datasets are of the types that our checks know."""
    known = (SFT_TYPE, *PREFERENCE_TYPES)
    return all(entry.get("type") in known for entry in settings["datasets"])


def written_alike(tokenizer, preference: bool) -> bool:
    """Whether what is trained begins with the prompt that is sent in use, up to the answer.

    Mistral's templates write a space before an answer, which a student then writes itself.
    """
    if preference:
        prompt = CONVERSATION[:1]
        return trained_prompt(tokenizer, prompt) == sent_prompt(tokenizer, prompt)
    lead = answer_lead(tokenizer)
    return lead is not None and not lead.strip()


def fit_student(settings: dict, tokenizer) -> dict:
    """`settings` with the keys that this student needs; as they are for most.

    May change the chat template of `tokenizer` to the one that will be trained. Raises UserError
    for a template that cannot be trained as it is used.
    """
    if not writes_with_template(settings):
        return settings
    base, preference = settings["base_model"], bool(settings.get("rl"))
    if not tokenizer.chat_template:
        raise UserError(f"{base} has no chat template; name one, as --set chat_template=chatml")
    try:
        settings = settings | template_keys(base, tokenizer, preference)
        settings = settings | end_keys(base, settings, tokenizer, preference)
        return settings | pad_keys(settings, tokenizer)
    except TemplateError as error:
        reason = f"the chat template of {base} fails: {one_line(error, 200)}"
        raise UserError(f"{reason}; {WAY_OUT}") from None


def template_keys(base: str, tokenizer, preference: bool) -> dict:
    """A template that does not think, where training would write another prompt than use does."""
    if written_alike(tokenizer, preference):
        return {}
    silenced = copy.deepcopy(tokenizer)
    silenced.chat_template = SILENCED + tokenizer.chat_template
    if not written_alike(silenced, preference):
        reason = f"the chat template of {base} writes an answer otherwise than its prompt in use"
        raise UserError(f"{reason}; {WAY_OUT}")
    tokenizer.chat_template = silenced.chat_template
    return {"chat_template": "jinja", "chat_template_jinja": silenced.chat_template}


def end_keys(base: str, settings: dict, tokenizer, preference: bool) -> dict:
    """`eot_tokens` where SFT would not train the token that ends an answer.

    Preference training keeps all that the template writes behind an answer, and ends with the eos.
    """
    if preference or settings.get("eot_tokens") or settings.get("train_on_inputs"):
        return {}
    end, tail = template_end(tokenizer), answer_tail(tokenizer)
    if end is None:
        raise UserError(f"the chat template of {base} ends an answer with no token; {WAY_OUT}")
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    if ids.index(tokenizer.convert_tokens_to_ids(end)) > MOST_TOKENS_TO_END:
        raise UserError(f"the chat template of {base} ends an answer too far behind; {WAY_OUT}")
    if end == tokenizer.eos_token:
        return {}
    if end not in tokenizer.chat_template:  # axolotl trains no end that it does not find there
        raise UserError(f"the chat template of {base} hides the end {end} from axolotl; {WAY_OUT}")
    return {"eot_tokens": [end]}


def pad_keys(settings: dict, tokenizer) -> dict:
    """A token to pad with, of those there are, where axolotl would choose one that is not.

    It takes the eos, but for Llama's classes `</s>`, whatever their vocabulary is.
    """
    llama = "Llama" in type(tokenizer).__name__
    if tokenizer.pad_token or not llama or "</s>" in tokenizer.get_vocab():
        return {}
    tokenizer.pad_token = tokenizer.eos_token
    told = settings.get("special_tokens") or {}
    return {"special_tokens": {**told, "pad_token": tokenizer.eos_token}}
