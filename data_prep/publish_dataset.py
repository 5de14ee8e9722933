"""Push the staged dataset folder to the Hub in one commit, private unless told otherwise.

Reads data/hub. A repo that already holds files is left alone unless --update is given; running
again after a dropped connection finishes. The token is the one of HF_TOKEN or `hf auth login`.

    python -m data_prep.publish_dataset me/summarize-dpo --dry-run
"""

import argparse
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from data_prep.records import UserError, run, script_parser

# The client wraps a failed upload in a RuntimeError.
HUB_ERRORS = (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    httpx.HTTPError,
    RuntimeError,
)


def files_of(folder: Path) -> dict[str, int]:
    """Path in the repo -> bytes. Raises UserError if the folder is not a staged dataset."""
    files = {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }
    if "README.md" not in files or not any(name.endswith(".parquet") for name in files):
        raise UserError(
            f"{folder} is not a staged dataset (README.md and Parquet files); "
            "make it with `just stage`"
        )
    return files


def published_files(api: HfApi, repo: str) -> list[str] | None:
    """The files a repo holds, or None if there is no such repo."""
    if not api.repo_exists(repo, repo_type="dataset"):
        return None
    return [f for f in api.list_repo_files(repo, repo_type="dataset") if f != ".gitattributes"]


def publish(api: HfApi, repo: str, args: argparse.Namespace) -> str:
    """Make the repo if needed and push the folder. Returns the commit's URL."""
    api.create_repo(repo, repo_type="dataset", private=not args.public, exist_ok=True)
    return api.upload_folder(
        repo_id=repo,
        repo_type="dataset",
        folder_path=args.folder,
        ignore_patterns=".*",
        delete_patterns="data/*.parquet",  # the names of earlier content
        commit_message="Update the dataset" if args.update else "Add the dataset",
    ).commit_url


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
        return f"the Hub answered {status} for {repo}; run again to finish"
    cause = type(error.__cause__ or error).__name__
    return f"the connection to the Hub failed ({cause}); run again to finish"


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("repo", help="where to, as NAMESPACE/NAME")
    parser.add_argument("--folder", type=Path, default=Path("data/hub"), help="the staged dataset")
    parser.add_argument("--public", action="store_true", help="make a new repo public")
    parser.add_argument("--update", action="store_true", help="push over what the repo holds")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be pushed")
    args = parser.parse_args()
    files = files_of(args.folder)
    api = HfApi()
    try:
        api.whoami()
        held = published_files(api, args.repo)
        for name, size in files.items():
            print(f"  {'replace' if name in (held or ()) else 'add'} {name} ({size:,} bytes)")
        if held and not args.update:
            raise UserError(
                f"{args.repo} already holds {len(held)} files; pass --update to push over "
                "them (the old state stays in its history)"
            )
        if args.dry_run:
            visibility = "public" if args.public else "private"
            print(
                f"dry run: nothing sent to {args.repo}"
                + ("" if held is not None else f" (it would be made, {visibility})")
            )
            return
        print(f"pushed: {publish(api, args.repo, args)}")
    except HUB_ERRORS as error:
        raise UserError(explain(error, args.repo)) from None


if __name__ == "__main__":
    run(main)
