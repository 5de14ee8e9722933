"""Push files to a repo on the Hub in one commit, private unless told otherwise.

A repo that was not pushed to from here before is left alone unless --update is given. Of a card on
the Hub only the part between the "generated" lines and the front matter's keys that follow from the
files are renewed. What is there already is not sent again. The token is the one of HF_TOKEN or
`hf auth login`.
"""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from common.cli import UserError
from common.files import replacing

# The client wraps a failed upload in a RuntimeError.
HUB_ERRORS = (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    httpx.HTTPError,
    RuntimeError,
)
CARD = "README.md"
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
# What follows from the pushed files: keys of the front matter, and files to delete when not pushed.
OWNED_KEYS = {
    "dataset": ("configs", "size_categories"),
    "model": ("base_model", "base_model_relation", "datasets", "library_name", "model-index"),
}
OWNED_FILES = re.compile(r"\.parquet$|\.safetensors(\.index\.json)?$|^adapter_config\.json$")
GENERATED = re.compile(r"<!-- generated: begin.*?<!-- generated: end -->", re.DOTALL)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Give a script's parser the options of a push."""
    option = parser.add_argument
    option("repo", help="where to, as NAMESPACE/NAME")
    option("--public", action="store_true", help="make a new repo public")
    option("--revision", help="branch to push to, made if needed (default: main)")
    option("--tag", help="name to give the new revision")
    option("--update", action="store_true", help="push over what others put into the repo")
    option("--overwrite-card", action="store_true", help="replace a card written by hand")
    option("--dry-run", action="store_true", help="only show what would change")


def merge_cards(ours: str, theirs: str, owned: tuple[str, ...]) -> str:
    """The Hub's card with our generated part and `owned` keys in it.

    Raises UserError if the Hub's card has no such part to renew.
    """
    fronts = FRONT.match(ours), FRONT.match(theirs)
    if not all(fronts) or not GENERATED.search(theirs):
        raise UserError(
            "the card on the Hub has no front matter or no 'generated' lines, so it was written by "
            "hand; put the lines back there, or pass --overwrite-card"
        )
    mine, front = (yaml.safe_load(match[1]) for match in fronts)
    old_front = fronts[1][0]
    kept = {key: value for key, value in front.items() if key not in owned or key in mine}
    renewed = kept | {key: mine[key] for key in owned if key in mine}
    new_front = f"---\n{yaml.safe_dump(renewed, sort_keys=False).strip()}\n---\n"
    body = GENERATED.sub(lambda _: GENERATED.search(ours)[0], theirs[fronts[1].end() :], count=1)
    return (old_front if renewed == front else new_front) + body


def published(api: HfApi, repo: str, repo_type: str, revision: str | None) -> list[str]:
    """The files a repo holds; none if there is no such repo or branch."""
    if not api.repo_exists(repo, repo_type=repo_type):
        return []
    if revision and not api.revision_exists(repo, revision, repo_type=repo_type):
        return []
    return api.list_repo_files(repo, repo_type=repo_type, revision=revision)


def unchanged(addition: CommitOperationAdd, there: RepoFile) -> bool:
    """Whether a file of the repo holds this content, by the hash that the Hub keeps of it."""
    if there.lfs:
        return addition.upload_info.sha256.hex() == there.lfs.sha256
    with addition.as_file() as file:
        return git_hash(file.read()) == there.blob_id


def plan(
    api: HfApi, args: argparse.Namespace, repo_type: str, files: dict, held: list[str]
) -> list:
    """The operations of the commit, none for what is there already. Raises UserError."""
    where = {"repo_type": repo_type, "revision": args.revision}
    additions = {name: CommitOperationAdd(name, content) for name, content in files.items()}
    if CARD in held and not args.overwrite_card:
        there = Path(api.hf_hub_download(args.repo, CARD, force_download=True, **where))
        with additions[CARD].as_file() as ours:
            card = merge_cards(ours.read().decode(), there.read_text(), OWNED_KEYS[repo_type])
        additions[CARD] = CommitOperationAdd(CARD, card.encode())
    common = [name for name in held if name in files]
    infos = api.get_paths_info(args.repo, common, **where) if common else []
    same = {info.path for info in infos if unchanged(additions[info.path], info)}
    stale = [name for name in held if OWNED_FILES.search(name) and name not in files]
    return [
        *(addition for name, addition in additions.items() if name not in same),
        *map(CommitOperationDelete, stale),
    ]


def push(api: HfApi, args: argparse.Namespace, repo_type: str, operations: list) -> str:
    """Make what is missing and commit. Returns the revision."""
    api.create_repo(args.repo, repo_type=repo_type, private=not args.public, exist_ok=True)
    where = {"repo_type": repo_type, "revision": args.revision}
    if args.revision:
        api.create_branch(args.repo, branch=args.revision, repo_type=repo_type, exist_ok=True)
    if operations:
        message = f"Publish the {repo_type}"
        commit = api.create_commit(args.repo, operations, commit_message=message, **where)
        print(f"pushed: {commit.commit_url}")
    revision = commit.oid if operations else api.repo_info(args.repo, **where).sha
    if args.tag:
        api.create_tag(args.repo, tag=args.tag, revision=revision, repo_type=repo_type)
    return revision


def explain(error: Exception, repo: str) -> str:
    """One line for what the Hub or the connection answered."""
    if isinstance(error, LocalTokenNotFoundError):
        return "no Hub token: set HF_TOKEN or run `hf auth login`"
    if isinstance(error, HFValidationError):
        return f"{repo} is not a repo name like me/summarize-dpo"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return "the Hub refuses the token; check HF_TOKEN"
        if status == 403:
            return f"this token may not write to {repo}; check the name and the token's rights"
        if status == 409:
            return f"{repo} has this tag or branch already; choose another"
        return f"the Hub answered {status} for {repo}; run again to finish"
    cause = type(error.__cause__ or error).__name__
    return f"the connection to the Hub failed ({cause}); run again to finish"


@contextmanager
def hub_session(repo: str) -> Iterator[HfApi]:
    """A Hub client whose token is good. What goes wrong in the block is raised as UserError."""
    try:
        api = HfApi()
        api.whoami()
        yield api
    except HUB_ERRORS as error:
        raise UserError(explain(error, repo)) from None


def publish(
    args: argparse.Namespace, repo_type: str, files: dict[str, bytes | Path], lock: Path, **more
) -> None:
    """Show what would change in the repo and, unless --dry-run is given, push `files` to it.

    files: path in the repo -> content, a README.md among them. `lock` gets repo, revision and
    what `more` gives. Raises UserError.
    """
    known = json.loads(lock.read_text()) if lock.exists() else {}
    with hub_session(args.repo) as api:
        held = published(api, args.repo, repo_type, args.revision)
        foreign = [name for name in held if name != ".gitattributes"]
        if foreign and not args.update and known.get("repo") != args.repo:
            raise UserError(
                f"{args.repo} already holds {len(foreign)} files that were not pushed from here; "
                "pass --update to push over them (the old state stays in its history)"
            )
        operations = plan(api, args, repo_type, files, held)
        for operation in operations:
            name = operation.path_in_repo
            if isinstance(operation, CommitOperationDelete):
                print(f"  delete {name}")
            else:
                verb = "renew" if name in held else "add"
                print(f"  {verb} {name} ({operation.upload_info.size:,} bytes)")
        if not operations and not args.tag:
            print(f"{args.repo} holds all of this already; nothing to push")
            return
        if args.dry_run:
            visibility = "public" if args.public else "private"
            print(f"dry run: nothing sent to {args.repo} ({visibility} if new)")
            return
        revision = push(api, args, repo_type, operations)
    with replacing(lock) as temporary:
        temporary.write_text(json.dumps({"repo": args.repo, "revision": revision, **more}) + "\n")
    print(f"revision {revision}, also in {lock}")
