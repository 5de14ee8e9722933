"""Push files to a repo on the Hub in one commit, private unless --public is given.

A repo that was not pushed to from here before is left alone unless --update is given. Of a card on
the Hub only the part between the "generated" lines and the front matter's keys that follow from the
files are renewed. Files are deleted only if an earlier push made them. The token is the one of
HF_TOKEN or `hf auth login`.
"""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from common.cli import UserError
from common.files import write_text

HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, httpx.HTTPError)
CARD = "README.md"
GENERATED = re.compile(r"<!-- generated: begin.*?<!-- generated: end -->", re.DOTALL)
ANSWERS = {  # by status
    401: "the Hub refuses the token; check HF_TOKEN",
    403: "this token may not write to {repo}; check the name and the token's rights",
    409: "{repo} has this tag already; choose another",
}


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Give a script's parser the options of a push."""
    option = parser.add_argument
    option("repo", help="where to, as NAMESPACE/NAME")
    option("--public", action="store_true", help="make a new repo public")
    option("--tag", help="name to give the new revision")
    option("--update", action="store_true", help="push over what others put into the repo")
    option("--dry-run", action="store_true", help="only show what would be pushed and deleted")


def merge_cards(ours: str, theirs: str, owned: tuple[str, ...]) -> str:
    """The Hub's card with our generated part and our `owned` keys of the front matter in it.

    Raises UserError if the Hub's card has no such part to renew.
    """
    if not (theirs.startswith("---\n") and GENERATED.search(theirs)):
        raise UserError(
            "the card on the Hub has no front matter or no 'generated' lines, so it was written by "
            "hand; put the lines back there, or delete that card"
        )
    mine, card = RepoCard(ours).data, RepoCard(theirs)
    front = theirs.removesuffix(card.text)
    changed = [key for key in owned if mine.get(key) != card.data.get(key)]
    card.text = GENERATED.sub(lambda _: GENERATED.search(ours)[0], card.text, count=1)
    for key in changed:
        card.data[key] = mine.get(key)  # None is left out of the card
    return str(card) if changed else front + card.text  # as it was, comments and all


def explain(error: Exception, repo: str) -> str:
    """One line for what the Hub or the connection answered."""
    if isinstance(error, LocalTokenNotFoundError):
        return "no Hub token: set HF_TOKEN or run `hf auth login`"
    if isinstance(error, HFValidationError):
        return f"{repo} is not a repo name like me/summarize-dpo"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        other = f"the Hub answered {status} for {{repo}}; run again to finish"
        return ANSWERS.get(status, other).format(repo=repo)
    cause = type(error.__cause__ or error).__name__
    return f"the connection to the Hub failed ({cause}); run again to finish"


@contextmanager
def hub_session(repo: str) -> Iterator[HfApi]:
    """A Hub client whose token is good. Raises UserError for what the Hub refuses in the block."""
    huggingface_hub.logging.set_verbosity_error()  # a commit of nothing is told by us
    try:
        api = HfApi()
        api.whoami()
        yield api
    except HUB_ERRORS as error:
        raise UserError(explain(error, repo)) from None


def push(api: HfApi, args: argparse.Namespace, repo_type: str, operations: list) -> str:
    """Make the repo if it is missing, and commit; files that have not changed are not sent.

    Returns the revision. Raises UserError if an upload fails.
    """
    api.create_repo(args.repo, repo_type=repo_type, private=not args.public, exist_ok=True)
    before = api.repo_info(args.repo, repo_type=repo_type).sha
    try:
        message = f"Publish the {repo_type}"
        commit = api.create_commit(
            args.repo, operations, commit_message=message, repo_type=repo_type
        )
    except RuntimeError as error:  # in which the client wraps a failed upload
        raise UserError(explain(error, args.repo)) from None
    same = commit.oid == before
    print(f"{args.repo} holds all of this already" if same else f"pushed: {commit.commit_url}")
    if args.tag:
        api.create_tag(args.repo, tag=args.tag, revision=commit.oid, repo_type=repo_type)
    return commit.oid


def publish(
    args: argparse.Namespace,
    repo_type: str,
    files: dict[str, bytes | Path],
    lock: Path,
    owned_keys: tuple[str, ...],
    ours: str = "(?!)",
    **more: object,
) -> None:
    """Show what is pushed and, unless --dry-run is given, push it.

    files: path in the repo -> content, a README.md with front matter and "generated" lines among
    them. `owned_keys` of the front matter are ours. `lock` gets repo, revision, the files' names
    and what `more` gives. Of the files that are in the repo and no longer in `files`, those are
    deleted that `lock` names or that match the regular expression `ours`. Raises UserError.
    """
    known = json.loads(lock.read_text()) if lock.exists() else {}
    mine = known.get("repo") == args.repo
    with hub_session(args.repo) as api:
        try:
            held = api.list_repo_files(args.repo, repo_type=repo_type)
        except RepositoryNotFoundError:
            held = []
        foreign = [name for name in held if name != ".gitattributes"]
        if foreign and not args.update and not mine:
            raise UserError(
                f"{args.repo} already holds {len(foreign)} files that were not pushed from here; "
                "pass --update to push over them (the old state stays in its history)"
            )
        if CARD in held:
            there = api.hf_hub_download(args.repo, CARD, repo_type=repo_type, force_download=True)
            card = files[CARD] if isinstance(files[CARD], bytes) else files[CARD].read_bytes()
            merged = merge_cards(card.decode(), Path(there).read_text(), owned_keys)
            files = {**files, CARD: merged.encode()}
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        earlier = known.get("files", []) if mine else []
        stale = [n for n in held if n not in files and (n in earlier or re.fullmatch(ours, n))]
        for addition in additions:
            print(f"  {addition.path_in_repo} ({addition.upload_info.size:,} bytes)")
        print("".join(f"  delete {name}\n" for name in stale), end="")
        if args.dry_run:
            visibility = "public" if args.public else "private"
            print(f"dry run: nothing sent to {args.repo} ({visibility} if new)")
            return
        revision = push(api, args, repo_type, [*additions, *map(CommitOperationDelete, stale)])
    state = {"repo": args.repo, "revision": revision, "files": sorted(files), **more}
    write_text(lock, json.dumps(state) + "\n")
    print(f"revision {revision}, also in {lock}")
