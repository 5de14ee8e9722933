"""Replies as they lie in their append-only table: found by content, read as whole or unusable.

Records of 0.3.7 do not tell their prompt. REPLIES.adopted.json beside the table says of which of
them it was shown, once, or vouched for; the table itself, which was paid for, is never rewritten.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.cli import UserError
from common.files import digest, locked, read_json, read_records, write_text
from common.table import Key, key_of
from data_prep.teacher.read_reply import read_content, unusable_reason, without_surrogates
from data_prep.teacher.teacher_prompts import TeacherPrompts, moment

KEY = ("id", "model", "prompt")  # what tells a reply from others, unless another key is given
ADOPTED = ".adopted.json"  # in place of the .jsonl of the replies


def record_digest(record: dict) -> str:
    return digest(json.dumps(record, sort_keys=True))


def read_adopted(path: Path) -> dict[str, dict]:
    """Digest of an old record -> what is known of its prompt. Raises UserError."""
    file = path.with_suffix(ADOPTED)
    try:
        adopted = read_json(file)
    except UserError:
        raise UserError(f"{file} is not valid JSON; delete it, it is made anew") from None
    return {key: known for key, known in adopted.items() if isinstance(known, dict)}


def fill_in(records: Iterable[dict], path: Path) -> Iterator[dict]:
    """Records of `path` as they would be written today: the id a string, what is known of the
    prompt of an old one beside it, and `unusable` where they are no answer. A field that was edited
    into what it cannot be is a text, or a cost that nobody knows."""
    adopted = read_adopted(path)
    for record in records:
        known = {}
        if "prompt" not in record and adopted:
            known = adopted.get(record_digest(record), {})
        record = without_surrogates(record | known)
        record["id"] = str(record.get("id"))
        for name in ("model", "prompt_sha", "created"):
            if not isinstance(record.get(name, ""), str):
                record[name] = str(record[name] or "")
        if not isinstance(record.get("cost_usd"), int | float):
            record["cost_usd"] = None
        if isinstance(record.get("text"), list):  # parts, which 0.3.7 kept as they came
            record["text"] = read_content({"content": record["text"]})[0]
        if unusable := why_unusable(record):
            record["unusable"] = unusable
        yield record


def why_unusable(record: dict) -> str:
    """Why a record's text is no answer, "" if it is one; what 0.3.7 kept is read alike."""
    if "sampling" in record or record.get("unusable"):  # it was decided as the reply came
        return record.get("unusable") or ""
    text, fault = read_content({"content": record.get("text")})
    return unusable_reason(text, record.get("finish_reason", "stop"), fault)


def find_replies(path: Path, wanted: Iterable[dict], key: Key = KEY) -> dict[str, dict]:
    """id -> the record of each of `wanted` that `path` has: the latest whole one, else the latest
    unusable one."""
    ids_by_key = {key_of(request, key): str(request["id"]) for request in wanted}
    records = read_records(path) if path.exists() else ()
    records_by_id: dict[str, dict] = {}
    for record in fill_in(records, path):
        request_id = ids_by_key.get(key_of(record, key))
        if request_id is None or not all(field in record for field in key):
            continue
        before = records_by_id.get(request_id)
        if not before or before.get("unusable") or not record.get("unusable"):
            records_by_id[request_id] = record
    return records_by_id


def adopt_old(path: Path, extracts: Path, prompts: TeacherPrompts, vouched: bool = False) -> None:
    """Find out to which prompts the old records of `path` reply, and keep that beside it.

    Shown is a record that came after the extracts' file was last written, of which nothing that
    its template takes in was changed since. With `vouched` the user says that it is so. What
    cannot be shown is named in one line. Raises UserError.
    """
    records = read_records(path) if path.exists() else ()
    old_records = [r for r in records if "prompt" not in r and {"id", "prompt_sha"} <= r.keys()]
    if not old_records:
        return
    with locked(path.with_suffix(ADOPTED)):
        adopted, left = read_adopted(path), Counter()
        before, texts_since, task_since = dict(adopted), extracts.stat().st_mtime, {}
        for record in old_records:
            sha, came = str(record["prompt_sha"]), moment(record.get("created"))
            old = record | {"id": str(record["id"]), "prompt_sha": sha}
            known = adopted.get(record_digest(record), {})
            is_known = "prompt" in known or (known and sha not in prompts.template_by_sha)
            if is_known or old["id"] not in prompts.extracts:
                continue
            if sha not in task_since:
                task_since[sha] = prompts.changed_at(sha)
            if not vouched and came < texts_since:
                left[f"{extracts} was written later"] += 1
            elif not vouched and came < task_since[sha]:
                left["their task's folder was changed later"] += 1
            else:
                known = {"text_digest": prompts.text_digest(old["id"])}
                if prompt := prompts.digest_for(old):
                    known["prompt"] = prompt
                adopted[record_digest(record)] = known
        if adopted != before:
            write_text(path.with_suffix(ADOPTED), json.dumps(adopted))
    if left:
        reasons = ", ".join(f"{n:,} as {reason}" for reason, n in left.items())
        told = "replies of an earlier version are not shown to be of today's prompts"
        print(f"{path}: {left.total():,} {told} ({reasons}); --adopt-old vouches for them")
