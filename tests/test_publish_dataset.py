import json
import re
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import clean_environment, one_error_line, run_here, write_jsonl
from datasets import Dataset
from hub_server import TOKEN
from huggingface_hub import RepoCard

from common.files import file_sha

STAGE = "data_prep.publish_dataset"
A, B = "a" * 12, "b" * 12  # hashes of content, as `just stage` puts them into names


CARD = """---
license: other
configs: [{config_name: default, data_files: FILES}]
size_categories: [n<1K]
---

<!-- generated: begin. -->
# TITLE
<!-- generated: end -->
"""


def write_folder(folder, key: str = A, title: str = "Pairs", rows: int = 50):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for old in folder.glob("data/*"):
        old.unlink()
    name = f"data/train-0-{key}.parquet"
    (folder / "README.md").write_text(CARD.replace("FILES", name).replace("TITLE", title))
    Dataset.from_list([{"id": str(i)} for i in range(rows)]).to_parquet(folder / name)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "summarize/hub")


def push(hub, folder, *options, code=0, token=TOKEN, repo="me/pairs"):
    token = {"HF_TOKEN": token} if token else {}
    with hub.here(folder.parent):
        result = run_here(STAGE, repo, "--data", folder.parent.parent, *options, **token)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result


@pytest.mark.slow
def test_one_private_commit_with_everything_read_back_row_for_row(hub, folder):
    result = push(hub, folder)
    files = hub.repos["datasets/me/pairs"]
    local = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    card = RepoCard(local.pop("README.md").decode())
    assert files.items() >= local.items()
    assert RepoCard(files["README.md"].decode()).data.to_dict() == card.data.to_dict()
    assert len(hub.commits) == 1 and hub.private["datasets/me/pairs"]
    assert f"is at {hub.url}/datasets/me/pairs/commit/" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    lock = json.loads((folder.parent / "hub.lock").read_text())
    hashes = [file_sha(path) for path in folder.glob("data/*.parquet")]
    revision = hub.sha("datasets/me/pairs")
    names = sorted([*local, "README.md"])
    assert lock == {"repo": "me/pairs", "revision": revision, "files": names, "hashes": hashes}

    script = (
        "import sys; from datasets import load_dataset; "
        "print(list(load_dataset('me/pairs', split='train', revision=sys.argv[1])['id']))"
    )
    back = subprocess.run(
        [sys.executable, "-c", script, lock["revision"]],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=clean_environment(**hub.environment(folder.parent)),
    )
    assert back.stdout.strip() == str([str(i) for i in range(50)]), back.stderr


def test_pushing_again_sends_only_what_changed(hub, folder):
    push(hub, folder)
    write_folder(folder, B, "Pairs, renewed", rows=50)
    result = push(hub, folder)
    files = hub.repos["datasets/me/pairs"]
    assert [n for n in files if n.endswith(".parquet")] == ["data/train-0-bbbbbbbbbbbb.parquet"]
    assert "delete data/train-0-aaaaaaaaaaaa.parquet" in result.stdout
    assert b"Pairs, renewed" in files["README.md"]
    assert hub.uploads == 1 and len(hub.commits) == 2  # the same rows are not sent again


@pytest.mark.parametrize("locked", [True, False])
def test_only_files_that_a_push_from_here_made_are_deleted(hub, folder, locked):
    (folder / "extra.txt").write_text("ours")
    push(hub, folder)
    files = hub.repos["datasets/me/pairs"]
    by_hand = {"data/validation.parquet": b"rows", "data/train-more.parquet": b"rows"}
    files.update(by_hand)
    (folder / "extra.txt").unlink()
    if not locked:  # as on another machine, which cannot know what is ours
        (folder.parent / "hub.lock").unlink()
    result = push(hub, write_folder(folder, B), *([] if locked else ["--update"]))
    ours = {f"data/train-0-{B}.parquet", "README.md", ".gitattributes"}
    earlier = {f"data/train-0-{A}.parquet", "extra.txt"}
    assert files.keys() == by_hand.keys() | ours | (set() if locked else earlier)
    assert "validation" not in result.stdout


def test_a_fault_of_ours_is_not_taken_for_one_of_the_connection(hub, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fail)
    with hub.here(folder.parent):
        result = run_here(STAGE, "me/pairs", "--data", folder.parent.parent, HF_TOKEN=TOKEN)
    assert "RuntimeError: a fault of ours" in result.stderr and "connection" not in result.stderr


def test_a_repo_of_others_is_not_overwritten_silently(hub, folder):
    push(hub, folder, "--public")
    assert not hub.private["datasets/me/pairs"]
    (folder.parent / "hub.lock").unlink()
    assert "pass --update" in one_error_line(push(hub, folder, code=1))
    (folder / "extra.txt").write_text("new")
    push(hub, folder, "--update")
    assert len(hub.commits) == 2


def test_what_did_not_change_makes_no_commit(hub, folder):
    push(hub, folder)
    push(hub, folder)
    assert len(hub.commits) == 1 and hub.uploads == 1
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("Pairs", "New"))
    changed = push(hub, folder, "--dry-run").stdout
    assert re.search(r"README.md \(\d+ bytes\)", changed) and len(hub.commits) == 1
    push(hub, folder)
    assert len(hub.commits) == 2 and hub.uploads == 1 and hub.sent[-1] == ["README.md"]


def test_what_was_written_by_hand_on_the_hub_stays(hub, folder):
    push(hub, folder)
    files = hub.repos["datasets/me/pairs"]
    card = files["README.md"].decode().replace("license: other", "license: cc-by-4.0")
    files["README.md"] = f"{card}\n## A note by hand\n".encode()
    hub.move_on("datasets/me/pairs")
    push(hub, write_folder(folder, B, "New title"))
    card = files["README.md"].decode()
    for said in ("license: cc-by-4.0", "train-0-bbbbbbbbbbbb", "# New title", "## A note by hand"):
        assert said in card
    assert "train-0-aaaaaaaaaaaa" not in card and "# Pairs" not in card

    files["README.md"] = b"# All by hand\n"
    hub.move_on("datasets/me/pairs")
    assert "delete it there" in one_error_line(push(hub, folder, code=1))
    assert files["README.md"] == b"# All by hand\n"


def test_a_dry_run_sends_nothing(hub, folder):
    result = push(hub, folder, "--dry-run")
    assert "README.md (" in result.stdout and "private" in result.stdout
    assert not hub.repos and not hub.commits and not (folder.parent / "hub.lock").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": None}, "no Hub token"),
        ({"token": "hf_wrong"}, "refuses the token"),
        ({"repo": "other/pairs"}, "may not write to other/pairs"),
        ({"repo": "not a name"}, "is not a repo name"),
    ],
)
def test_what_the_hub_refuses_ends_in_one_line(hub, folder, options, said):
    assert said in one_error_line(push(hub, folder, code=1, **options))
    assert not hub.commits


def test_a_dropped_upload_is_finished_by_running_again(hub, folder):
    hub.drop_uploads = 100
    line = one_error_line(push(hub, folder, code=1))
    assert "run again" in line and not hub.commits
    hub.drop_uploads = 0
    push(hub, folder)
    assert len(hub.commits) == 1


def test_a_hub_that_is_not_there(hub, folder):
    hub.close()
    assert "run again" in one_error_line(push(hub, folder, code=1))


def test_every_task_and_name_has_its_own_folder_and_lock(hub, folder):
    write_folder(folder.parents[1] / "title/hub-student", B)
    push(hub, folder, "--task", "title", "--name", "student")
    assert f"data/train-0-{B}.parquet" in hub.repos["datasets/me/pairs"]
    assert (folder.parents[1] / "title/hub-student.lock").is_file()
    assert "pass --update" in one_error_line(push(hub, folder, code=1))  # the repo is another's


def test_a_folder_that_is_no_dataset(hub, tmp_path):
    write_jsonl(tmp_path / "summarize/hub/rows.jsonl", [])
    line = one_error_line(push(hub, tmp_path / "summarize/hub", code=1))
    assert "not a staged dataset" in line


def test_what_another_pushes_meanwhile_is_not_pushed_over(hub, folder):
    push(hub, folder)
    files = hub.repos["datasets/me/pairs"]

    def change():
        files["README.md"] += b"by another"
        hub.move_on("datasets/me/pairs")

    hub.before_commit.append(change)
    write_folder(folder, B)
    assert "run again" in one_error_line(push(hub, folder, code=1))
    assert files["README.md"].endswith(b"by another") and len(hub.commits) == 1
    push(hub, folder)
    assert files["README.md"].endswith(b"by another") and f"train-0-{B}" in str(files["README.md"])


OF_DATASETS = """---
dataset_info:
  features: [{name: text, dtype: string}]
  splits: [{name: train, num_bytes: 1, num_examples: 1}]
configs: [{config_name: default, data_files: [{split: train, path: data/train-*}]}]
tags: [mine]
---
"""


@pytest.mark.parametrize(
    "body", ["", "# By hand\n<!-- generated: begin. -->\n<!-- generated: end -->"]
)
def test_a_card_that_datasets_wrote_itself_is_made_ours(hub, folder, body):
    card = (OF_DATASETS + body).encode()
    hub.put("datasets/me/pairs", {"README.md": card, "data/train-0.parquet": b"old"})
    push(hub, folder, "--update")
    card = RepoCard(hub.repos["datasets/me/pairs"]["README.md"].decode())
    front = card.data.to_dict()
    assert "dataset_info" not in front and front["tags"] == ["mine"]
    assert front["configs"][0]["data_files"] == f"data/train-0-{A}.parquet"
    assert "# Pairs" in card.text and body[:9] in card.text


def test_marks_in_a_text_do_not_end_our_part(hub, folder):
    def write(title):
        card = CARD.replace("FILES", "x").replace("TITLE", title)
        (folder / "README.md").write_text(card)
        return push(hub, folder)

    write("One <!-- generated: end --> <!-- generated: begin --> two")
    write("Three <!-- generated: end --> four")
    files = hub.repos["datasets/me/pairs"]
    text = RepoCard(files["README.md"].decode()).text
    assert "One" not in text and "two" not in text and text.count("four") == 1
    assert text.count("<!-- generated: end -->") == text.count("<!-- generated: begin") == 1
    # As 0.3.7 left it: the mark of the text is as good as ours.
    files["README.md"] = CARD.replace("TITLE", "Old <!-- generated: end --> rest").encode()
    files["README.md"] += b"by hand\n"
    hub.move_on("datasets/me/pairs")
    write("New")
    text = RepoCard(files["README.md"].decode()).text
    assert "rest" not in text and "# New" in text and text.endswith("by hand\n")


def test_a_dry_run_needs_no_token(hub, folder):
    result = push(hub, folder, "--dry-run", token=None)
    assert "only what is public" in result.stderr and "README.md (" in result.stdout
    assert "me/pairs is not there, or not for this token" in result.stdout
    hub.put("datasets/me/pairs", {"data/x.parquet": b"1"})
    assert "pass --update" in one_error_line(push(hub, folder, "--dry-run", token=None, code=1))
    push(hub, folder, "--dry-run", "--update", token=None)
    assert not hub.commits


@pytest.mark.parametrize(
    "card", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"---\nmodel-index: 5\n---\nx"]
)
def test_a_card_on_the_hub_that_is_none_is_told_in_one_line(hub, folder, card):
    hub.put("datasets/me/pairs", {"README.md": card})
    line = one_error_line(push(hub, folder, "--update", code=1))
    assert "the card" in line and not hub.commits


def test_a_lock_or_a_card_of_ours_that_is_not_readable(hub, folder):
    (folder.parent / "hub.lock").write_text("{")
    line = one_error_line(push(hub, folder, code=1))
    assert "hub.lock is no longer readable; delete it, and push with --update" in line
    (folder.parent / "hub.lock").unlink()
    (folder / "README.md").write_text("---\na: [\n---\n")
    assert "our own card cannot be read" in one_error_line(push(hub, folder, code=1))


def test_a_branch_and_a_tag_are_made_and_the_main_branch_stays(hub, folder):
    name = "datasets/me/pairs"
    push(hub, folder)
    before = dict(hub.repos[name])
    write_folder(folder, B, "Second")
    told = push(hub, folder, "--revision", "v2", "--dry-run").stdout
    assert "the branch v2 is not there; it would be made from main" in told
    assert f"{name}@v2" not in hub.repos
    push(hub, folder, "--revision", "v2", "--tag", "v2.0")
    branch = hub.repos[f"{name}@v2"]
    assert hub.repos[name] == before and f"data/train-0-{B}.parquet" in branch
    assert f"data/train-0-{A}.parquet" not in branch and b"# Second" in branch["README.md"]
    lock = json.loads((folder.parent / "hub.lock").read_text())
    assert lock["revision"] == hub.sha(f"{name}@v2") == hub.tags[name]["v2.0"]
    assert lock["branch"] == "v2"

    push(hub, folder)  # what was pushed to main by us is still known to be ours
    assert hub.repos[name].keys() == branch.keys()


def test_a_tag_never_moves(hub, folder):
    push(hub, folder, "--tag", "v1")
    revision = hub.sha("datasets/me/pairs")
    write_folder(folder, B)
    line = one_error_line(push(hub, folder, "--tag", "v1", code=1))
    assert f"has a tag v1, at {revision[:12]}; choose another name" in line
    assert len(hub.commits) == 1 and hub.tags["datasets/me/pairs"] == {"v1": revision}


def test_what_another_pushes_to_a_branch_meanwhile_is_not_pushed_over(hub, folder):
    push(hub, folder, "--revision", "v2")
    branch = hub.repos["datasets/me/pairs@v2"]

    def change():
        branch["README.md"] += b"by another"
        hub.move_on("datasets/me/pairs@v2")

    hub.before_commit.append(change)
    write_folder(folder, B)
    line = one_error_line(push(hub, folder, "--revision", "v2", "--tag", "v1", code=1))
    assert "run again" in line and branch["README.md"].endswith(b"by another")
    assert len(hub.commits) == 1 and not hub.tags
    push(hub, folder, "--revision", "v2", "--tag", "v1")
    assert branch["README.md"].endswith(b"by another") and f"data/train-0-{B}.parquet" in branch
