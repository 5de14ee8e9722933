"""Push the staged dataset folder to the Hub in one commit, private unless told otherwise.

Reads data/hub, writes data/hub.lock (repo and revision, for a training config to pin). A repo that
this folder was not pushed to before is left alone unless --update is given. Of a card on the Hub
only the part between the "generated" lines and the file list are renewed. What is there already is
not sent again. The token is the one of HF_TOKEN or `hf auth login`.

    python -m data_prep.publish_dataset me/summarize-dpo --dry-run
"""

import hashlib
import json
import re
from pathlib import Path

import httpx
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile

from data_prep.records import UserError, replacing, run, script_parser

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
GENERATED = re.compile(r"<!-- generated: begin.*?<!-- generated: end -->", re.DOTALL)
OWNED = ("configs", "size_categories")  # the front matter's keys that follow from the data


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """Path in the repo -> content. Raises UserError if the folder is not a staged dataset."""
    files = {
        p.relative_to(folder).as_posix(): p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }
    if CARD not in files or not any(name.endswith(".parquet") for name in files):
        raise UserError(
            f"{folder} is not a staged dataset (README.md and Parquet files); "
            "make it with `just stage`"
        )
    return files


def merge_cards(ours: str, theirs: str) -> str:
    """The Hub's card with our generated part and file list in it.

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
    renewed = front | {key: mine[key] for key in OWNED}
    new_front = f"---\n{yaml.safe_dump(renewed, sort_keys=False).strip()}\n---\n"
    body = GENERATED.sub(lambda _: GENERATED.search(ours)[0], theirs[fronts[1].end() :], count=1)
    return (old_front if renewed == front else new_front) + body


def published(api: HfApi, repo: str, revision: str | None) -> list[str]:
    """The files a repo holds; none if there is no such repo or branch."""
    if not api.repo_exists(repo, repo_type="dataset"):
        return []
    if revision and not api.revision_exists(repo, revision, repo_type="dataset"):
        return []
    return api.list_repo_files(repo, repo_type="dataset", revision=revision)


def unchanged(content: Path | bytes, there: RepoFile) -> bool:
    """Whether a file of the repo holds this content, by the hash that the Hub keeps of it."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    if there.lfs:
        return hashlib.sha256(data).hexdigest() == there.lfs.sha256
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest() == there.blob_id


def plan(api: HfApi, args, files: dict[str, Path], held: list[str]) -> list:
    """The operations of the commit, none for what is there already. Raises UserError."""
    where = {"repo_type": "dataset", "revision": args.revision}
    content: dict[str, Path | bytes] = dict(files)
    if CARD in held and not args.overwrite_card:
        there = api.hf_hub_download(args.repo, CARD, force_download=True, **where)
        content[CARD] = merge_cards(files[CARD].read_text(), Path(there).read_text()).encode()
    common = [name for name in held if name in content]
    infos = api.get_paths_info(args.repo, common, **where) if common else []
    same = {info.path for info in infos if unchanged(content[info.path], info)}
    stale = [name for name in held if name.endswith(".parquet") and name not in files]
    return [
        *(CommitOperationAdd(name, data) for name, data in content.items() if name not in same),
        *(CommitOperationDelete(name) for name in stale),
    ]


def push(api: HfApi, args, operations: list) -> str:
    """Make what is missing and commit. Returns the revision."""
    api.create_repo(args.repo, repo_type="dataset", private=not args.public, exist_ok=True)
    if args.revision:
        api.create_branch(args.repo, branch=args.revision, repo_type="dataset", exist_ok=True)
    if operations:
        commit = api.create_commit(
            args.repo,
            operations,
            repo_type="dataset",
            revision=args.revision,
            commit_message="Publish the staged dataset",
        )
        print(f"pushed: {commit.commit_url}")
    where = {"repo_type": "dataset", "revision": args.revision}
    revision = commit.oid if operations else api.repo_info(args.repo, **where).sha
    if args.tag:
        api.create_tag(args.repo, tag=args.tag, revision=revision, repo_type="dataset")
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


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("repo", help="where to, as NAMESPACE/NAME")
    option("--folder", type=Path, default=Path("data/hub"), help="the staged dataset")
    option("--public", action="store_true", help="make a new repo public")
    option("--revision", help="branch to push to, made if needed (default: main)")
    option("--tag", help="name to give the new revision")
    option("--update", action="store_true", help="push over what others put into the repo")
    option("--overwrite-card", action="store_true", help="replace a card written by hand")
    option("--dry-run", action="store_true", help="only show what would change")
    args = parser.parse_args()
    files = files_of(args.folder)
    lock = args.folder.with_name(args.folder.name + ".lock")
    known = json.loads(lock.read_text()) if lock.exists() else {}
    api = HfApi()
    try:
        api.whoami()
        held = published(api, args.repo, args.revision)
        foreign = [name for name in held if name != ".gitattributes"]
        if foreign and not args.update and known.get("repo") != args.repo:
            raise UserError(
                f"{args.repo} already holds {len(foreign)} files that were not pushed from here; "
                "pass --update to push over them (the old state stays in its history)"
            )
        operations = plan(api, args, files, held)
        for operation in operations:
            name = operation.path_in_repo
            if isinstance(operation, CommitOperationDelete):
                print(f"  delete {name}")
            else:
                verb = "renew" if name in held else "add"
                print(f"  {verb} {name} ({operation.upload_info.size:,} bytes)")
        if not operations and not args.tag:
            print(f"{args.repo} holds all of {args.folder} already; nothing to push")
            return
        if args.dry_run:
            visibility = "public" if args.public else "private"
            print(f"dry run: nothing sent to {args.repo} ({visibility} if new)")
            return
        revision = push(api, args, operations)
    except HUB_ERRORS as error:
        raise UserError(explain(error, args.repo)) from None
    with replacing(lock) as temporary:
        temporary.write_text(json.dumps({"repo": args.repo, "revision": revision}) + "\n")
    print(f"revision {revision}, also in {lock}")


if __name__ == "__main__":
    run(main)
