import pytest
from conftest import one_error_line, run_stage, write_jsonl
from datasets import Dataset, load_dataset
from hub_server import TOKEN, Hub

STAGE = "data_prep.publish_dataset"


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/README.md").write_text("---\nlicense: other\n---\n# Pairs\n")
    Dataset.from_list([{"id": str(i)} for i in range(50)]).to_parquet(
        tmp_path / "hub/data/train-00000-of-00001-aaa.parquet"
    )
    return tmp_path / "hub"


def push(hub, folder, *options, code=0, token=TOKEN, repo="me/pairs"):
    credentials = {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    return run_stage(
        STAGE,
        repo,
        "--folder",
        folder,
        *options,
        code=code,
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_HOME=str(folder.parent / "home"),
        **credentials,
    )


def test_one_private_commit_with_everything(hub, folder):
    result = push(hub, folder)
    files = hub.repos["datasets/me/pairs"]
    local = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    assert files.items() >= local.items()
    assert len(hub.commits) == 1 and hub.private["datasets/me/pairs"]
    assert f"pushed: {hub.url}/datasets/me/pairs/commit/" in result.stdout
    assert TOKEN not in result.stdout + result.stderr

    parquet = folder.parent / "back.parquet"
    parquet.write_bytes(files["data/train-00000-of-00001-aaa.parquet"])
    back = load_dataset("parquet", data_files=str(parquet), split="train")
    assert back["id"] == [str(i) for i in range(50)]


def test_what_is_published_is_not_overwritten_silently(hub, folder):
    push(hub, folder, "--public")
    assert not hub.private["datasets/me/pairs"]
    assert "pass --update" in one_error_line(push(hub, folder, code=1))
    old = next(folder.glob("data/*"))
    old.rename(old.with_name("train-00000-of-00001-bbb.parquet"))
    push(hub, folder, "--update")
    names = [n for n in hub.repos["datasets/me/pairs"] if n.endswith(".parquet")]
    assert names == ["data/train-00000-of-00001-bbb.parquet"]
    assert hub.uploads == 1 and len(hub.commits) == 2  # the same content is not sent again


def test_a_dry_run_sends_nothing(hub, folder):
    result = push(hub, folder, "--dry-run")
    assert "add README.md" in result.stdout and "private" in result.stdout
    assert not hub.repos and not hub.commits


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
    hub.server.shutdown()
    hub.server.server_close()
    assert "run again" in one_error_line(push(hub, folder, code=1))


def test_a_folder_that_is_no_dataset(hub, tmp_path):
    write_jsonl(tmp_path / "x/rows.jsonl", [])
    assert "not a staged dataset" in one_error_line(push(hub, tmp_path / "x", code=1))
