"""Push files to a repo on the Hub in one commit, private unless --public is given.

A repo that was not pushed to from here before is left alone unless --update is given. Of a card on
the Hub only the "generated" lines and the keys in OWNED are renewed. Files are deleted only if an
earlier push from here made them, as the lock file tells. What another pushed meanwhile is never
pushed over: a commit says which state it was made for. The token: HF_TOKEN or `hf auth login`.
"""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoCard,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from common.cli import UserError, one_line, warn
from common.files import read_json, write_text

CARD = "README.md"
BEGIN, END = "<!-- generated: begin", "<!-- generated: end -->"
# To the last end before another begin: in cards of earlier versions a text may hold one, too.
GENERATED = re.compile(f"{BEGIN}(?:(?!{BEGIN}).)*{END}", re.DOTALL)
OWNED = ("base_model", "base_model_relation", "datasets", "library_name", "model-index")
# `dataset_info` is what datasets' own push_to_hub wrote of other files; with it ours do not load.
OWNED += ("configs", "size_categories", "dataset_info")
ANSWERS = {  # by status
    401: "the Hub refuses the token; check HF_TOKEN",
    403: "this token may not write to {repo}; check the name and the token's rights",
    404: "{repo} is not on the Hub, not at this revision, or not for this token",
    409: "{repo} was changed by another while this ran; run again",
    412: "{repo} was changed by another while this ran; run again",
}


def add_hub_options(parser: ArgumentParser) -> None:
    option = parser.add_argument
    option("repo", help="where to, as NAMESPACE/NAME")
    option("--public", action="store_true", help="make a new repo public")
    option("--update", action="store_true", help="push over what others put into the repo")
    option("--dry-run", action="store_true", help="only show what would be pushed and deleted")


def read_card(content: bytes, place: str) -> RepoCard:
    """A card from its file. Raises UserError if it is not one."""
    try:
        return RepoCard(content.decode())
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, no mapping, odd results
        raise UserError(f"{place} cannot be read: {one_line(error, 150)}; mend it there") from None


def sealed(card: RepoCard) -> RepoCard:
    """A card of ours in which only the first and the last of the 'generated' marks are ones.

    A text, a prompt or a setting in it may hold such a mark too, and would end our part early.
    """
    begin, end = card.text.find(BEGIN), card.text.rfind(END)
    if -1 < begin < end:
        inner = card.text[begin + 1 : end].replace("<!-- generated:", "< !-- generated:")
        card.text = card.text[: begin + 1] + inner + card.text[end:]
    return card


def merge_cards(ours: RepoCard, theirs: RepoCard) -> RepoCard:
    """The Hub's card with our generated lines and OWNED keys in it. Raises UserError."""
    if not theirs.text.strip():  # front matter alone, as datasets' push_to_hub leaves it
        theirs.text = ours.text
        for key, value in ours.data.to_dict().items():
            theirs.data[key] = theirs.data.get(key) or value
    elif not GENERATED.search(theirs.text):
        hint = "paste them into it where our part may stand, or delete it there"
        raise UserError(f"the card on the Hub lacks the two 'generated' lines; {hint}")
    for key in OWNED:
        theirs.data[key] = ours.data.get(key)  # None is left out of the card
    if part := GENERATED.search(ours.text):
        theirs.text = GENERATED.sub(lambda _: part[0], theirs.text, count=1)
    return theirs


@contextmanager
def hub_session(repo: str, may_lack_token: bool = False) -> Iterator[HfApi]:
    """A Hub client whose token is good, or that has none if it may lack one.

    Raises UserError for what the Hub refuses in the block.
    """
    try:
        api = HfApi()
        try:
            api.whoami()
        except LocalTokenNotFoundError:
            if not may_lack_token:
                raise
            warn(f"no Hub token: of {repo} only what is public can be looked up")
        yield api
        return
    except LocalTokenNotFoundError:
        said = "no Hub token: set HF_TOKEN or run `hf auth login`"
    except HFValidationError:
        said = f"{repo} is not a repo name like me/summarize-dpo"
    except (httpx.HTTPError, RuntimeError) as error:
        # The client wraps a failed upload in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            reason = one_line(cause.server_message or "run again", 200)
            said = ANSWERS.get(status, f"the Hub answered {status}: {reason}").format(repo=repo)
        elif isinstance(cause, httpx.HTTPError):
            said = f"the connection to the Hub failed ({type(cause).__name__}); run again to finish"
        else:
            raise
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        said = f"the Hub refuses the card: {one_line(error)}; mend its first lines"
    raise UserError(said)


def read_lock(lock: Path) -> dict:
    """What the last push from here left. Raises UserError if it is not readable."""
    try:
        known = read_json(lock)
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(f"{lock} is no longer readable; delete it, and push with --update")
    return known


def publish(args: Namespace, kind: str, files: dict, lock: Path, obsolete=(), **more) -> None:
    """Show what is pushed to a repo of a `kind` and, unless --dry-run is given, push it.

    `files`: path in the repo -> a Path or bytes; the card as bytes. `lock` gets repo, revision,
    the files' names and what `more` gives. Of the files in the repo that are not in `files` those
    are deleted that `lock` names, or `obsolete`. Raises UserError.
    """
    known, of = read_lock(lock), {"repo_id": args.repo, "repo_type": kind}
    mine = known.get("repo") == args.repo
    card = sealed(read_card(files[CARD], "our own card"))
    with hub_session(args.repo, may_lack_token=args.dry_run) as api:
        # What is looked up is all of one state, which the commit then names as its parent.
        state = api.repo_info(**of) if api.repo_exists(**of) else None
        held = [file.rfilename for file in state.siblings or ()] if state else []
        if not mine and not args.update and set(held) - {".gitattributes"}:
            hint = "pass --update to push over them (the old state stays in its history)"
            raise UserError(f"{args.repo} holds {len(held)} files not pushed from here; {hint}")
        if CARD in held:
            path = hf_hub_download(args.repo, CARD, repo_type=kind, revision=state.sha)
            theirs = read_card(Path(path).read_bytes(), f"the card of {args.repo} on the Hub")
            card = merge_cards(card, theirs)
        files = files | {CARD: str(card).encode()}
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        deletable = {*(known.get("files", ()) if mine else ()), *obsolete} - files.keys()
        stale = [CommitOperationDelete(name) for name in held if name in deletable]
        for one in additions:
            print(f"  {one.path_in_repo} ({one.upload_info.size:,} bytes)")
        for one in stale:
            print(f"  delete {one.path_in_repo}")
        if args.dry_run:
            if not state:
                kind_of_new = "public" if args.public else "private"
                print(f"{args.repo} is not there, or not for this token; it would be {kind_of_new}")
            print(f"dry run: nothing sent; a new repo is {'public' if args.public else 'private'}")
            return
        if not state:
            api.create_repo(**of, private=not args.public)
            state = api.repo_info(**of)
            if made := {file.rfilename for file in state.siblings or ()} - {".gitattributes"}:
                raise UserError(f"{args.repo} holds {len(made)} files by now; run again")
        commit = api.create_commit(
            **of,
            operations=[*additions, *stale],  # what has not changed is not sent again
            commit_message=f"Publish the {kind}",
            parent_commit=state.sha,
        )
    pushed = {"repo": args.repo, "revision": commit.oid, "files": sorted(files), **more}
    write_text(lock, json.dumps(pushed) + "\n")
    print(f"pushed: {args.repo} is at {commit.commit_url}; the revision is also in {lock}")
