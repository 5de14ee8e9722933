"""Push files to a repo on the Hub in one commit, private unless --public is given.

A repo that was not pushed to from here before is left alone unless --update is given. Of a card on
the Hub only the "generated" lines and the keys in OWNED are renewed. Files are deleted only if an
earlier push from here made them, as the lock file tells. The token: HF_TOKEN or `hf auth login`.
"""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from common.cli import UserError
from common.files import read_json, write_text

CARD = "README.md"
GENERATED = re.compile(r"<!-- generated: begin.*?<!-- generated: end -->", re.DOTALL)
OWNED = ("base_model", "base_model_relation", "datasets", "library_name", "model-index")
OWNED += ("configs", "size_categories")
ANSWERS = {  # by status
    401: "the Hub refuses the token; check HF_TOKEN",
    403: "this token may not write to {repo}; check the name and the token's rights",
    404: "{repo} is not on the Hub, not at this revision, or not for this token",
}


def add_hub_options(parser: ArgumentParser) -> None:
    option = parser.add_argument
    option("repo", help="where to, as NAMESPACE/NAME")
    option("--public", action="store_true", help="make a new repo public")
    option("--update", action="store_true", help="push over what others put into the repo")
    option("--dry-run", action="store_true", help="only show what would be pushed and deleted")


def merge_cards(ours: RepoCard, theirs: RepoCard) -> RepoCard:
    """The Hub's card with our generated lines and OWNED keys in it. Raises UserError."""
    if not GENERATED.search(theirs.text):
        hint = "paste them into it where our part may stand, or delete it there"
        raise UserError(f"the card on the Hub lacks the two 'generated' lines; {hint}")
    for key in OWNED:
        theirs.data[key] = ours.data.get(key)  # None is left out of the card
    theirs.text = GENERATED.sub(lambda _: GENERATED.search(ours.text)[0], theirs.text, count=1)
    return theirs


@contextmanager
def hub_session(repo: str) -> Iterator[HfApi]:
    """A Hub client whose token is good. Raises UserError for what the Hub refuses in the block."""
    try:
        api = HfApi()
        api.whoami()
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
            said = ANSWERS.get(status, f"the Hub answered {status}; run again").format(repo=repo)
        elif isinstance(cause, httpx.HTTPError):
            said = f"the connection to the Hub failed ({type(cause).__name__}); run again to finish"
        else:
            raise
    raise UserError(said)


def publish(args: Namespace, kind: str, files: dict, lock: Path, obsolete=(), **more) -> None:
    """Show what is pushed to a repo of a `kind` and, unless --dry-run is given, push it.

    `files`: path in the repo -> a Path or bytes; the card as bytes. `lock` gets repo, revision,
    the files' names and what `more` gives. Of the files in the repo that are not in `files` those
    are deleted that `lock` names, or `obsolete`. Raises UserError.
    """
    known = read_json(lock)
    mine, of = known.get("repo") == args.repo, {"repo_id": args.repo, "repo_type": kind}
    with hub_session(args.repo) as api:
        held = api.list_repo_files(**of) if api.repo_exists(**of) else []
        if not mine and not args.update and set(held) - {".gitattributes"}:
            hint = "pass --update to push over them (the old state stays in its history)"
            raise UserError(f"{args.repo} holds {len(held)} files not pushed from here; {hint}")
        card = RepoCard(files[CARD].decode())
        if CARD in held:
            card = merge_cards(card, RepoCard.load(args.repo, repo_type=kind))
        files = files | {CARD: str(card).encode()}
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        deletable = {*(known.get("files", ()) if mine else ()), *obsolete} - files.keys()
        stale = [CommitOperationDelete(name) for name in held if name in deletable]
        for one in additions:
            print(f"  {one.path_in_repo} ({one.upload_info.size:,} bytes)")
        for one in stale:
            print(f"  delete {one.path_in_repo}")
        if args.dry_run:
            print(f"dry run: nothing sent; a new repo is {'public' if args.public else 'private'}")
            return
        api.create_repo(**of, private=not args.public, exist_ok=True)
        message = f"Publish the {kind}"  # what has not changed is not sent again
        commit = api.create_commit(**of, operations=[*additions, *stale], commit_message=message)
    state = {"repo": args.repo, "revision": commit.oid, "files": sorted(files), **more}
    write_text(lock, json.dumps(state) + "\n")
    print(f"pushed: {args.repo} is at {commit.commit_url}; the revision is also in {lock}")
