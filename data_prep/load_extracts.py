"""Read extracts, of `sample_extracts` or one's own: {"id", "text"}, and as it may be source, url.

One's own need nothing beside the two fields. An id may be a number, which is its string from here
on; a source that is not told is "other".
"""

from pathlib import Path

from common.cli import UserError, one_line, warn
from common.files import id_text, load_records, read_records

MADE_BY = "just extracts"
LICENCE = "licence.txt"  # of one's own texts, where `just extracts --licence` was told it


def load_extracts(path: Path) -> list[dict]:
    """[{id, text, source, url, ...}] of a file in its order, ids and texts strings, no id twice.

    What has no id or text is passed over, and so is a second record of an id: one line says how
    many. Raises UserError if the file is not there, not finished, or holds nothing of use.
    """
    folder = path.parent
    if (folder / "unfinished/made.json").exists() and not (folder / "made.json").exists():
        raise UserError(f"{folder} is not finished; go on with `{MADE_BY}` and the same options")
    extracts, lacking, repeated = {}, 0, 0
    for record in load_records(path, ("id", "text"), MADE_BY):
        text = record["text"]
        if not record["id"] or not isinstance(text, str) or not text.strip():
            lacking += 1
        elif record["id"] in extracts:
            repeated += 1
        else:
            for name, untold in (("source", "other"), ("url", "")):
                if not isinstance(record.get(name), str):
                    record[name] = untold
            extracts[record["id"]] = record
    if lacking:
        warn(f"{path}: {lacking:,} records without an id or a text, passed over")
    if repeated:
        warn(
            f"{path}: {repeated:,} records have an id that stands before; the first of it is taken"
        )
    if not extracts:
        raise UserError(f"{path} holds no record with an id and a text; make it with `{MADE_BY}`")
    return list(extracts.values())


def without_reply(extracts: dict[str, dict], replies: Path) -> dict[str, dict]:
    """Those of `extracts`, by id, to which the table `replies` has no reply, whoever gave it: no
    run was trained on them by what a teacher wrote."""
    records = read_records(replies, ("id",)) if replies.exists() else ()
    replied = {id_text(reply["id"]) for reply in records}
    return {key: extract for key, extract in extracts.items() if key not in replied}


def licence_of(folder: Path) -> str:
    """The licence of one's own texts that was told with the extracts; "" if none was."""
    path = folder / LICENCE
    return one_line(path.read_text("utf-8")) if path.is_file() else ""
