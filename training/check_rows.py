"""Rows that training would read otherwise than they are: found and named before it starts.

Too long, empty, with a control token in them, or misread by axolotl. Its preference strategies find
an answer by searching for it in a dummy conversation (axolotl.prompt_strategies.dpo.chat_template):
an answer that stands in what the template writes before it ("user", "AI") is cut wrongly.
"""

from dataclasses import dataclass
from functools import partial

from jinja2 import TemplateError

from common.cli import UserError, one_line, warn
from common.text import control_tokens
from prompts.task import OTHER_TEMPLATE, Task
from training.chat import (
    answer_lead,
    answer_tail,
    sent_prompt,
    trained_conversation,
    trained_prompt,
)
from training.config import RunConfig, load_entry
from training.student import PREFERENCE_TYPES, SFT_TYPE

DUMMY = [{"role": "user", "content": "[[dummy_message]]"}]  # axolotl's
EMPTY = "have an empty answer, which teaches nothing; take them out"
CHANGED = "have an answer that the student's chat template changes; write it otherwise"
IN_DUMMY = "have an answer that axolotl misreads, for it stands in what the chat template writes"
IN_DUMMY += "; --method sft reads it right, or take them out"
FAILS = "make the student's chat template fail"
NO_CONVERSATION = "are no conversation of roles and contents that ends with an assistant's answer"


@dataclass(frozen=True)
class Reader:
    """How a row of one dataset is written for a student: the fields, tokens and ends at work."""

    tokenizer: object
    tokens: list[str]  # that must not stand in a text
    lead: str  # before an answer, in SFT
    tail: str  # behind an answer
    prompt_field: str
    answer_fields: tuple[str, ...]  # of preferences; none for SFT, whose field holds a conversation

    def parts(self, row: dict) -> tuple[list[dict], list[str]]:
        """The messages of the prompt, and the answers to it."""
        messages = row[self.prompt_field]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        messages = [{"role": said["role"], "content": said["content"]} for said in messages]
        if not self.answer_fields:
            if messages[-1]["role"] != "assistant":
                raise ValueError
            return messages[:-1], [messages[-1]["content"]]
        return messages, [answer_of(row[field]) for field in self.answer_fields]

    def written(self, messages: list[dict], answer: str) -> str:
        """What training reads of a prompt and an answer."""
        said = [{"role": "assistant", "content": answer}]
        if not self.answer_fields:
            return trained_conversation(self.tokenizer, messages + said)
        dummy = trained_conversation(self.tokenizer, DUMMY + said)
        kept = dummy[dummy.find(answer) :].rstrip()
        return trained_prompt(self.tokenizer, messages) + kept

    def fault(self, messages: list[dict], answer: str) -> str:
        """What is wrong with an answer or its prompt; "" for nothing."""
        texts = [answer, *(message["content"] for message in messages)]
        for token in self.tokens:
            if any(token in text for text in texts):
                return f"hold the student's control token {token}"
        if not answer.strip():
            return EMPTY
        try:
            written = self.written(messages, answer)
            sent = sent_prompt(self.tokenizer, messages)
        except TemplateError as error:
            return f"{FAILS} ({one_line(error, 99)})"
        whole = sent + self.lead + answer + self.tail
        if self.answer_fields:
            whole = (sent + answer + self.tail).rstrip()
        if written == whole:
            return ""
        said = [{"role": "assistant", "content": answer}]
        in_conversation = trained_conversation(self.tokenizer, messages + said)
        return IN_DUMMY if in_conversation.endswith(answer + self.tail) else CHANGED


def answer_of(value: str | dict | list) -> str:
    """An answer as axolotl takes it from a row: text, a message, or the last of a conversation."""
    if isinstance(value, list):
        value = value[-1]
    return value if isinstance(value, str) else value["content"]


def reader_of(entry: dict, rl: str | None, tokenizer) -> Reader | None:
    """The reader of a dataset's rows; None for types that are axolotl's alone to check."""
    kind = entry.get("type")
    if entry.get("message_property_mappings") or entry.get("roles"):
        return None
    answer_fields = ()
    if rl and kind in PREFERENCE_TYPES:
        chosen, rejected = entry.get("field_chosen"), entry.get("field_rejected")
        answer_fields = (chosen or "chosen", rejected or "rejected")
    elif rl or kind != SFT_TYPE:
        return None
    return Reader(
        tokenizer=tokenizer,
        tokens=control_tokens(tokenizer),
        lead=answer_lead(tokenizer) or "",
        tail=answer_tail(tokenizer),
        prompt_field=entry.get("field_messages") or "messages",
        answer_fields=answer_fields,
    )


def check_rows(config: RunConfig, tokenizer) -> list[int]:
    """Raise UserError with the ids of rows that would be trained otherwise than they are.

    Rows that are too long are left out, with a warning, where the config says so. `tokenizer` is
    the student's with the template that is trained (training/student.py). Returns the tokens of the
    prompts that are trained; none if those of a dataset cannot be told.
    """
    lengths: list[int] = []
    all_told = True
    for entry in config.settings["datasets"]:
        rows = load_entry(entry)
        reader = reader_of(entry, config.settings.get("rl"), tokenizer)
        if not reader:
            warn(f"rows of {entry['path']}, of type {entry.get('type')}, are axolotl's to check")
            all_told = False
            continue
        check_columns(rows, reader, entry["path"])
        check_template(rows, reader, config.task)
        lengths += check_entry(rows, reader, config.settings, entry["path"])
    return lengths if all_told else []


def check_columns(rows, reader: Reader, path: str) -> None:
    """Raise UserError if the rows lack a column that the config names, or what must stand in it."""
    fields = (reader.prompt_field, *reader.answer_fields)
    lacking = [field for field in fields if field not in rows.column_names]
    if lacking:
        raise UserError(f"{path} has no column {', '.join(lacking)}, which its entry names")
    if reader.answer_fields and any(answer is None for answer in rows[reader.answer_fields[1]]):
        raise UserError(f"{path} lacks rejected answers: --method sft, or `just pairs`")


def check_template(rows, reader: Reader, task: Task) -> None:
    """Raise UserError if prompts were made with another student template than the task has now.

    It would be applied in use, and never have been trained.
    """
    # Datasets of version 0.7.0 and before do not tell it, and it is looked up in their prompts.
    told = set(rows["student_sha"]) if "student_sha" in rows.column_names else set()
    if told - {task.student_sha()}:
        raise UserError(OTHER_TEMPLATE.format(task.folder / "student.jinja"))
    if not task.student_template():
        return
    for row in rows:
        try:
            prompt = reader.parts(row)[0][-1]["content"]
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            continue  # it is named below
        task.text_of(prompt)


def check_entry(rows, reader: Reader, settings: dict, path: str) -> list[int]:
    """Raise UserError with the ids of the faulty rows of one dataset. Returns the tokens of the
    prompts of those that are trained."""
    options = {"remove_columns": rows.column_names, "load_from_cache_file": False}
    examined = rows.map(partial(examine, reader), desc="checking rows", **options)
    row_ids = rows["id"] if "id" in rows.column_names else range(len(rows))
    row_ids = [str(row_id) for row_id in row_ids]

    ids_by_fault: dict[str, list[str]] = {}
    for row_id, fault in zip(row_ids, examined["fault"], strict=True):
        if fault:
            ids_by_fault.setdefault(fault, []).append(row_id)
    for fault, ids in sorted(ids_by_fault.items()):
        refuse(f"{len(ids)} of {len(rows)} rows of {path} {fault}", ids, settings)
    report_long(row_ids, examined["length"], settings)
    limit = longest_row(settings)
    pairs = zip(examined["prompt_length"], examined["length"], strict=True)
    return [prompt for prompt, whole in pairs if whole <= limit]


def longest_row(settings: dict) -> int:
    """Tokens of a row that is trained; 512 is axolotl's default."""
    return settings.get("sequence_len") or 512


def examine(reader: Reader, row: dict) -> dict:
    """A row's fault, its tokens as trained on, of the longer of its conversations, and those of its
    prompt as it is sent."""
    try:
        messages, answers = reader.parts(row)
        faults = [reader.fault(messages, answer) for answer in answers]
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return {"fault": NO_CONVERSATION, "length": 0, "prompt_length": 0}
    if any(faults):
        return {"fault": max(faults), "length": 0, "prompt_length": 0}
    texts = [reader.written(messages, answer) for answer in answers]
    eos = reader.tokenizer.eos_token or ""
    if reader.answer_fields:  # TRL ends with the eos whatever the template ends with
        texts = [text if text.endswith(eos) else text + eos for text in texts]
    texts.append(sent_prompt(reader.tokenizer, messages))
    *whole, prompt = map(len, reader.tokenizer(texts, add_special_tokens=False).input_ids)
    return {"fault": "", "length": max(whole), "prompt_length": prompt}


def refuse(reason: str, ids: list[str], settings: dict) -> None:
    """Raise UserError with the first ids and, for control tokens, the way out."""
    if "control token" in reason:
        reason += f"; `just stage --tokenizer {settings['base_model']}` writes it as plain text"
    raise UserError(f"{reason}: {', '.join(ids[:5])}")


def report_long(row_ids: list[str], lengths: list[int], settings: dict) -> None:
    """Raise UserError for rows over sequence_len; warn where the config leaves them out."""
    limit = longest_row(settings)
    too_long = [row_id for row_id, length in zip(row_ids, lengths, strict=True) if length > limit]
    if not too_long:
        return
    reason = f"{len(too_long)} of {len(row_ids)} rows are longer than sequence_len {limit}"
    reason += f" (the longest {max(lengths)} tokens): {', '.join(too_long[:5])}"
    if settings.get("excess_length_strategy") == "raise":
        raise UserError(f"{reason}; raise it, or `just pairs --check length={limit}` drops them")
    warn(f"{reason}; the config leaves them out")
