"""Push files to a repo on the Hub in one commit, private unless --public is given.

A repo that was not pushed to from here before is left alone unless --update is given. Of a card on
the Hub only the "generated" lines and the keys in OWNED are renewed. Files are deleted only if an
earlier push from here made them, as the lock file tells. What another pushed meanwhile is never
pushed over: a commit says which state it was made for. --revision pushes to a branch, made from
main where it is new, and --tag gives the pushed state a name that never moves. The token: HF_TOKEN
or `hf auth login`.
"""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoCard,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from common.cli import UserError, one_line, warn
from common.files import read_json, write_text

CARD, MAIN = "README.md", "main"
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


class HubIsAway(UserError):
    """The Hub cannot be reached; nothing is known of what stands there."""


@dataclass(frozen=True)
class HubOptions:
    """Where to push, and what may be done there; see `add_hub_options`."""

    repo: str
    revision: str = MAIN  # a branch
    tag: str | None = None
    public: bool = False
    update: bool = False
    dry_run: bool = False


def add_hub_options(parser: ArgumentParser) -> None:
    """Add what `hub_options` reads from a command line."""
    option = parser.add_argument
    option("repo", help="where to, as NAMESPACE/NAME")
    option("--revision", metavar="BRANCH", default=MAIN, help="push to it; a new one is from main")
    option("--tag", help="name for the state that is pushed, e.g. v1.0; it never moves")
    option("--public", action="store_true", help="make a new repo public")
    option("--update", action="store_true", help="push over what others put into the repo")
    option("--dry-run", action="store_true", help="only show what would be pushed and deleted")


def hub_options(args: Namespace) -> HubOptions:
    return HubOptions(**{name: vars(args)[name] for name in HubOptions.__dataclass_fields__})


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


def refusal(error: httpx.HTTPError, repo: str) -> UserError:
    """What is told of the Hub's answer, or of none."""
    if not isinstance(error, HfHubHTTPError):
        failed = f"the connection to the Hub failed ({type(error).__name__})"
        return HubIsAway(f"{failed}; run again to finish")
    status = error.response.status_code
    reason = one_line(error.server_message or "run again", 200)
    return UserError(ANSWERS.get(status, f"the Hub answered {status}: {reason}").format(repo=repo))


@contextmanager
def hub_session(repo: str, may_lack_token: bool = False) -> Iterator[HfApi]:
    """A Hub client whose token is good, or that has none if it may lack one.

    Raises UserError for what the Hub refuses in the block, HubIsAway where there is none.
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
        if not isinstance(cause, httpx.HTTPError):
            raise
        raise refusal(cause, repo) from None
    except OfflineModeIsEnabled:
        raise HubIsAway("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it") from None
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        said = f"the Hub refuses the card: {one_line(error)}; mend its first lines"
    raise UserError(said)


def read_lock(lock: Path) -> dict:
    """What the last push from here left. Raises UserError if it is not readable."""
    try:
        return read_json(lock)
    except UserError:
        raise UserError(
            f"{lock} is no longer readable; delete it, and push with --update"
        ) from None


@dataclass(frozen=True)
class State:
    """What stands in a repo where a push goes to: the commit `sha`, None if there is no repo."""

    sha: str | None = None
    files: tuple[str, ...] = ()
    is_new_branch: bool = False  # then it is what stands in main
    tags: dict[str, str] | None = None  # name -> commit

    def others(self) -> set[str]:
        """The files that somebody put there; the Hub itself makes .gitattributes."""
        return {*self.files} - {".gitattributes"}


def read_state(api: HfApi, options: HubOptions, kind: str) -> State:
    """What is looked up is all of one commit, which the push then names as its parent."""
    repo = {"repo_id": options.repo, "repo_type": kind}
    if not api.repo_exists(**repo):
        return State()
    refs = api.list_repo_refs(**repo)
    is_new = options.revision not in {branch.name for branch in refs.branches}
    info = api.repo_info(**repo, revision=MAIN if is_new else options.revision)
    files = tuple(file.rfilename for file in info.siblings or ())
    return State(info.sha, files, is_new, {tag.name: tag.target_commit for tag in refs.tags})


def merged_card(card: RepoCard, options: HubOptions, kind: str, state: State) -> RepoCard:
    """Our card with what was written by hand into the one of that state. Raises UserError."""
    if CARD not in state.files:
        return card
    path = hf_hub_download(options.repo, CARD, repo_type=kind, revision=state.sha)
    place = f"the card of {options.repo} on the Hub"
    return merge_cards(card, read_card(Path(path).read_bytes(), place))


def check_state(options: HubOptions, state: State, is_ours: bool) -> None:
    """Raise UserError where a push would overwrite what others made, or move a tag."""
    if state.others() and not is_ours and not options.update:
        hint = "pass --update to push over them (the old state stays in its history)"
        number = len(state.files)
        raise UserError(f"{options.repo} holds {number} files not pushed from here; {hint}")
    if options.tag in (state.tags or {}):
        sha = state.tags[options.tag][:12]
        raise UserError(f"{options.repo} has a tag {options.tag}, at {sha}; choose another name")


def show(additions: list, deletions: list, options: HubOptions, state: State) -> None:
    """Print what a push would send."""
    for addition in additions:
        print(f"  {addition.path_in_repo} ({addition.upload_info.size:,} bytes)")
    for deletion in deletions:
        print(f"  delete {deletion.path_in_repo}")
    if not options.dry_run:
        return
    visibility = "public" if options.public else "private"
    if not state.sha:
        print(f"{options.repo} is not there, or not for this token; it would be {visibility}")
    elif state.is_new_branch:
        print(f"the branch {options.revision} is not there; it would be made from {MAIN}")
    print(f"dry run: nothing sent; a new repo is {visibility}")


def make_place(api: HfApi, options: HubOptions, kind: str, state: State) -> State:
    """Make the repo and the branch where they are not there. Raises UserError if another made the
    repo meanwhile."""
    repo = {"repo_id": options.repo, "repo_type": kind}
    if not state.sha:
        api.create_repo(**repo, private=not options.public)
        state = read_state(api, options, kind)
        if others := state.others():
            raise UserError(f"{options.repo} holds {len(others)} files by now; run again")
    if state.is_new_branch:
        api.create_branch(**repo, branch=options.revision, revision=state.sha)
    return state


def write_lock(lock: Path, options: HubOptions, revision: str, names: set[str], more: dict) -> None:
    """Keep what was pushed: repo, commit, the files' names, the branch where it is not main."""
    pushed = {"repo": options.repo, "revision": revision, "files": sorted(names)}
    if options.revision != MAIN:
        pushed["branch"] = options.revision
    write_text(lock, json.dumps(pushed | more) + "\n")


def commit(
    api: HfApi, options: HubOptions, kind: str, state: State, operations: list
) -> CommitInfo:
    """Push in one commit that names the state it was made for; the place is made where it lacks."""
    state = make_place(api, options, kind, state)
    return api.create_commit(
        repo_id=options.repo,
        repo_type=kind,
        revision=options.revision,
        operations=operations,  # what has not changed is not sent again
        commit_message=f"Publish the {kind}",
        parent_commit=state.sha,
    )


def publish(
    options: HubOptions,
    kind: str,
    files: dict[str, Path | bytes],
    lock: Path,
    obsolete: Iterable[str] = (),
    **more: object,
) -> None:
    """Show what is pushed to a repo of a `kind` and, unless --dry-run is given, push it.

    `files`: path in the repo -> a Path or bytes; the card as bytes. `lock` gets repo, revision,
    the files' names and what `more` gives. Of the files in the repo that are not in `files` those
    are deleted that `lock` names, or `obsolete`. Raises UserError.
    """
    known = read_lock(lock)
    is_ours = known.get("repo") == options.repo
    pushed_before = set(known.get("files", ())) if is_ours else set()
    card = sealed(read_card(files[CARD], "our own card"))
    with hub_session(options.repo, may_lack_token=options.dry_run) as api:
        state = read_state(api, options, kind)
        check_state(options, state, is_ours)
        card = merged_card(card, options, kind, state)
        files = files | {CARD: str(card).encode()}
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        deletable = {*pushed_before, *obsolete} - files.keys()
        deletions = [CommitOperationDelete(name) for name in state.files if name in deletable]
        show(additions, deletions, options, state)
        if options.dry_run:
            return
        pushed = commit(api, options, kind, state, [*additions, *deletions])
        names = set(files)
        if known.get("branch", MAIN) != options.revision:
            names |= pushed_before  # in another branch they are still to be deleted
        # The lock before the tag: a push that fails between the two is ours when it is run again.
        write_lock(lock, options, pushed.oid, names, more)
        if options.tag:
            api.create_tag(
                repo_id=options.repo, repo_type=kind, tag=options.tag, revision=pushed.oid
            )
    tagged = f", tagged {options.tag}" if options.tag else ""
    print(
        f"pushed: {options.repo} is at {pushed.commit_url}{tagged}; the revision is also in {lock}"
    )
