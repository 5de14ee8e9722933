"""An adapter and its merged model, pushed to the loopback Hub and used from there by its card."""

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import clean_environment, one_error_line, run_here, run_stage, write_jsonl
from datasets import Dataset
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard

from common.files import digest, mark_made
from data_prep.publish_dataset import row_hashes
from data_prep.teacher.teacher_prompts import prompt_digest
from eval.publish_adapter import for_others
from eval.systems import load_test_rows
from inference.weights import weights_of_run
from prompts.task import FOLDER, load_task
from training.config import fingerprint, load_run_config
from training.lengths import Lengths, write_lengths
from training.train_adapter import inputs_of

STAGE = "eval.publish_adapter"
pytestmark = pytest.mark.slow
BASE, REPO = "other/tiny-base", "me/tiny-summarize"
BASE_CARD = b"---\nlicense: other\nlicense_name: tiny-1\n---\n# A base\n"
RUN = "tiny-dpo-lora"
TEXT = "The text, and nothing else."
NASTY = "```\n# Mine\n<script>x</script> ![x](http://e.x/p)\n<!-- generated: end -->\n| a |"


def write_dataset(folder):
    rows = [
        {
            "id": str(i),
            "source": "wikipedia",
            "prompt": [{"role": "user", "content": f"{TEXT} {i}"}],
            "chosen": [{"role": "assistant", "content": "A text."}],
            "rejected_by": "tiny-dpo-lora:instructed",
            "teacher": "openai/gpt-oss-120b",
        }
        for i in range(3)
    ]
    for split in ("train", "test"):
        Dataset.from_list(rows).to_parquet(folder / f"data/{split}-0.parquet")
    card = "## Licences\n\nThe texts: wikipedia, CC BY-SA. The teacher's summaries: all yours."
    (folder / "README.md").write_text(card)


def write_models(base, folder, name: str) -> None:
    """What axolotl and the merge leave: adapter, tokenizer, placeholder card, base beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.save_pretrained(folder)
    torch.manual_seed(1)
    linear = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    lora = LoraConfig(r=12, target_modules=linear, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder, save_embedding_layers=False)
    model.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "merged")
    (folder / "README.md").write_text(f"a placeholder that tells {folder}")


def write_scores(run) -> None:
    scores = {"bertscore_f1": 0.71234, "rouge_l": 0.5, "words": 9.0, "invented": 0.02}
    interval = {"bertscore_f1": [0.1, 0.05, 0.15], "rouge_l": [0.2, 0.1, 0.3]}
    rows = load_test_rows(run, None)
    settings = {"fingerprint": fingerprint(str(run.merged)), "max_new_tokens": 64}
    for system in ("base", "tuned"):
        made = {"finish_reason": "stop", "settings": settings, "text": f"{NASTY} by {system}"}
        records = [
            {"id": row["id"], "prompt": prompt_digest(run.task.student_messages(row["text"], None))}
            | {"n_prompt_tokens": 20 + number}
            | made
            for number, row in enumerate(rows)
        ]
        write_jsonl(run.eval_dir / f"answers/{system}.jsonl", records)
    result = {
        "n": 3,
        "target": "tuned",
        "systems": {"base": {**scores, "bertscore_f1": 0.6}, "tuned": scores},
        "differences": {"base": interval},
        "per_text": {
            "base": {"bertscore_f1": [0.1, 0.1, 0.1]},
            "tuned": {"bertscore_f1": [0.6, 0.2, 0.4]},
        },
        "settings": {
            "hash": "/srv/models/tiny_L6",
            "documents": digest(*rows),
            "generation": {"base": settings, "tuned": settings},
        },
    }
    (run.eval_dir / "scores.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_qwen2):
    """(loopback Hub with the base, config of a run that is trained, merged and scored)."""
    folder = tmp_path_factory.mktemp("run")
    hub = Hub()
    files = {path.name: path.read_bytes() for path in tiny_qwen2.iterdir()}
    revision = hub.put(f"models/{BASE}", {**files, "README.md": BASE_CARD})
    write_dataset(folder / "data/hub")
    config = folder / "tiny-dpo-lora.yaml"
    settings = {
        "base_model": BASE,
        "revision_of_model": revision,
        "rl": "dpo",
        "lora_r": 12,
        "plugins": ["training.plugins.AnswerLogits"],
        "datasets": [{"path": str(folder / "data/hub"), "split": "train[:2]"}],
        "dataset_prepared_path": str(folder / "outputs/tiny-dpo-lora/prepared"),
        "output_dir": str(folder / "outputs/tiny-dpo-lora"),
    }
    config.write_text(yaml.safe_dump(settings))
    run = load_run_config(config)
    write_models(tiny_qwen2, run.output_dir, BASE)
    write_lengths(run.output_dir, Lengths(3, 1020, 1030, 1038, 1040))
    mark_made(run.output_dir, inputs_of(run))
    mark_made(run.merged, weights_of_run(run).settings)
    write_scores(run)
    yield hub, config
    hub.close()


def push(finished, *options, repo=REPO, code=0, token=TOKEN, config=None):
    hub, own = finished
    token = {"HF_TOKEN": token} if token else {}
    with hub.here(own.parent):
        result = run_here(STAGE, config or own, repo, *options, **token)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result


@pytest.fixture(scope="module")
def pushed(finished):
    push(finished)
    push(finished, "--merged", "--unevaluated", repo=f"{REPO}-merged")
    return finished


def run_code(finished, *programs: str) -> list[str]:
    """What each program prints, run one after the other on a machine that only has the Hub."""
    hub, config = finished
    code = f"for part in {programs!r}: exec(part, {{}}); print('\\0')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=config.parent,
        env=clean_environment(**hub.environment(config.parent / "elsewhere")),
    )
    assert result.returncode == 0, result.stderr
    return [" ".join(part.split()) for part in result.stdout.split("\0\n")[:-1]]


def card_of(finished, repo: str) -> str:
    return finished[0].repos[f"models/{repo}"]["README.md"].decode()


def snippets(finished, repo: str) -> list[str]:
    card = card_of(finished, repo).replace("max_new_tokens=512", "max_new_tokens=64")
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def local_summary(finished) -> str:
    from inference.generate import build_prompt, generate_batch
    from inference.weights import load_model

    model, tokenizer = load_model(str(load_run_config(finished[1]).merged))
    prompt, _ = build_prompt(tokenizer, TEXT, None, 4000)
    return " ".join(generate_batch(model, tokenizer, [prompt], 64)[0]["text"].split())


def test_the_cards_code_gives_the_local_summary(pushed):
    with_peft, in_4_bits, _ = snippets(pushed, REPO)
    whole, whole_in_4_bits, _ = snippets(pushed, f"{REPO}-merged")
    assert "peft" in in_4_bits and "peft" not in whole + whole_in_4_bits
    found_by_adapter = whole.replace(f"{REPO}-merged", REPO)  # transformers then finds the base
    exact = local_summary(pushed)
    said = run_code(pushed, with_peft, whole, found_by_adapter, in_4_bits, whole_in_4_bits)
    assert said[:3] == [exact] * 3 and len(exact) > 20
    assert all(len(text) > 20 for text in said[3:])


@pytest.mark.parametrize("repo", [REPO, f"{REPO}-merged"])
def test_the_vllm_code(pushed, repo):
    code = snippets(pushed, repo)[2]
    revision = pushed[0].sha(f"models/{BASE}")
    adapted = f'"{BASE}", revision="{revision}", enable_lora=True, max_lora_rank=16'
    compile(code, repo, "exec")
    assert (adapted if repo == REPO else f'LLM("{repo}")') in code
    pytest.importorskip("vllm", reason="vLLM is not installed here; the code was compiled only")
    run_code(pushed, code)


def test_what_is_pushed_is_whole_private_and_tells_of_no_machine(pushed):
    hub, config = pushed
    files = hub.repos[f"models/{REPO}"]
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    adapter = {"adapter_model.safetensors", "adapter_config.json", "lengths.json"}
    ours = {"README.md", config.name, ".gitattributes"}
    assert files.keys() == tokenizer | adapter | ours
    merged = hub.repos[f"models/{REPO}-merged"]
    assert merged.keys() == tokenizer | ours | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    told = json.loads(files["adapter_config.json"])
    assert told["base_model_name_or_path"] == BASE
    assert told["revision"] == hub.sha(f"models/{BASE}")
    assert hub.private[f"models/{REPO}"] and len(hub.commits) == 2
    for content in (*files.values(), *merged.values()):
        assert str(config.parent).encode() not in content and b"local_files_only" not in content
        assert b"/srv/" not in content
    uploaded = files[config.name].decode()
    assert yaml.safe_load(uploaded)["output_dir"] == RUN and b"datasets:" in files["README.md"]


def test_the_card_tells_data_recipe_results_and_licences(pushed):
    card = ModelCard(card_of(pushed, REPO))
    assert "1,020 to 1,040 tokens long (half of them at most 1,030, 95% at most 1,038)" in card.text
    front = card.data
    assert (front.base_model, front.library_name, front.license) == (BASE, "peft", "other")
    scores = {r.metric_type: (r.metric_value, r.metric_name) for r in front.eval_results}
    assert scores["bertscore"] == (0.7123, "BERTScore F1, n = 3") and scores["rouge"][0] == 0.5
    for said in (
        "2 rows (`train[:2]`; texts from wikipedia)",
        "not on the Hub in this state",
        "told what to do and not yet trained for it (`tiny-dpo-lora:instructed`)",
        "max_new_tokens=512",
        "lora_r: 12",
        "+0.100 [+0.050, +0.150]",
        "under 30",
        "other, tiny-1",
        "Apache-2.0, which sets no terms on outputs",
        "that were scored 2.0% held a name or number that their text lacks",
        "- answers that invent: share of answers",
        "Made with task-lora ",
        "which axolotl alone does not have: `training.plugins.AnswerLogits`.",
        "BERTScore by `tiny_L6`. Their prompts have 20 to 22 tokens (half of them at most 21), "
        "an answer at most 64.",
        "The texts it learned from: wikipedia, CC BY-SA. The teacher's terms",
        "The text of median gain over base, bare text, of the 3;",
        f"> {TEXT} 2\n\nThe teacher's summary:\n\n> A text.\n",
        "> ```\n> # Mine\n> &lt;script>",
    ):
        assert said in card.content, said
    assert "<script" not in card.content and "](http://e.x/p)" in card.content
    assert "> | a | by tuned" in card.content and "by base" not in card.content
    assert card.content.count("generated: end -->") == 2  # the one in the answer is text


def test_the_data_is_named_by_repo_and_revision_where_exactly_it_was_pushed(pushed):
    folder, run = pushed[1].parent / "data/hub", load_run_config(pushed[1])
    lock = {"repo": "me/pairs", "revision": "f" * 40, "hashes": row_hashes(folder)}
    (folder.parent / "hub.lock").write_text(json.dumps(lock))
    push(pushed, "--dry-run")
    card = ModelCard((run.output_dir / "model_card.md").read_text())
    (folder.parent / "hub.lock").unlink()
    assert card.data.datasets == "me/pairs" and f"at revision `{'f' * 40}`" in card.content
    assert card.data.eval_results[0].dataset_revision == "f" * 40


def test_a_second_push_sends_what_changed_and_keeps_what_was_written_by_hand(pushed):
    hub, _ = pushed
    files, commits = hub.repos[f"models/{REPO}"], len(hub.commits)
    push(pushed)
    assert len(hub.commits) == commits
    files["README.md"] += b"\n## By hand\n"
    hub.move_on(f"models/{REPO}")
    dry = push(pushed, "--dry-run", "--unevaluated").stdout
    assert "README.md (" in dry and len(hub.commits) == commits
    push(pushed, "--unevaluated")
    assert hub.sent[-1] == ["README.md"]
    card = ModelCard(files["README.md"].decode())
    assert "## By hand" in card.content and "Not evaluated" in card.content
    assert card.data.eval_results is None
    line = one_error_line(push(pushed, "--merged", "--unevaluated", repo=REPO, code=1))
    assert "pass --update" in line  # the merged model has a repo of its own
    push(pushed, "--merged", "--update", "--unevaluated", repo=REPO)
    assert not files.keys() & {"adapter_model.safetensors", "adapter_config.json"}


def changed(finished, tmp_path, **settings):
    """A config like the run's, with other settings."""
    config = tmp_path / finished[1].name
    config.write_text(yaml.safe_dump(load_run_config(finished[1]).settings | settings))
    return config


def test_what_cannot_be_published_ends_in_one_line(finished, tmp_path):
    def refused(*options, **kwargs) -> str:
        return one_error_line(push(finished, *options, code=1, **kwargs))

    hub, config = finished
    run, before = load_run_config(config), len(hub.commits)
    assert "is not a repo name" in refused("--unevaluated", repo="not a name")
    assert "may not write to stranger/x" in refused("--unevaluated", repo="stranger/x")
    assert "no Hub token" in refused("--unevaluated", token=None)
    nowhere = changed(finished, tmp_path, output_dir=str(tmp_path))
    assert "no adapter in" in refused(config=nowhere)
    other = changed(finished, tmp_path, base_model="other/large-base")
    assert "or it is not of other/large-base" in refused(config=other)
    assert "was not made of" in refused(config=changed(finished, tmp_path, lora_r=8))
    scores, made = run.eval_dir / "scores.json", run.merged / "made.json"
    scores.rename(tmp_path / "scores.json")
    assert "just scores tiny-dpo-lora" in refused()
    stale = json.loads((tmp_path / "scores.json").read_text())
    stale["settings"]["generation"]["tuned"]["fingerprint"] = "0" * 12
    scores.write_text(json.dumps(stale))
    assert "are of another adapter" in refused()
    (tmp_path / "scores.json").rename(scores)
    kept = made.read_text()
    made.write_text(kept.replace('"adapter": "', '"adapter": "0'))
    assert "are of another adapter" in refused()
    assert "run `just merge tiny-dpo-lora`" in refused("--merged", "--unevaluated")
    made.write_text(kept)
    assert len(hub.commits) == before


def test_a_dry_run_without_the_hub_writes_the_card_all_the_same(finished):
    _, config = finished
    card = load_run_config(config).output_dir / "model_card.md"
    card.unlink(missing_ok=True)
    options = ("--unevaluated", "--dry-run")
    result = run_stage(STAGE, config, REPO, *options, cwd=config.parent, code=1, HF_HUB_OFFLINE="1")
    assert "the card is written without what the page of" in result.stderr
    assert "HF_HUB_OFFLINE is set" in one_error_line(result) and card.exists()


def test_a_base_that_others_cannot_get(finished, tmp_path, tiny_qwen2):
    hub, _ = finished
    base = shutil.copytree(tiny_qwen2, tmp_path / "base")
    local = changed(finished, tmp_path, base_model=str(base), output_dir=str(tmp_path))
    write_models(base, tmp_path, str(base))
    assert "was not made of" in one_error_line(push(finished, config=local, code=1))
    mark_made(tmp_path, inputs_of(load_run_config(local)))
    options = ("--unevaluated", "--dry-run")
    assert "--base NAME" in one_error_line(push(finished, *options, config=local, code=1))
    revision = hub.sha(f"models/{BASE}")
    missing = push(finished, *options, "--base", f"{BASE}@v9", config=local, code=1)
    assert f"{BASE} is not on the Hub, not at this revision" in one_error_line(missing)
    result = push(finished, *options, "--base", f"{BASE}@{revision}", config=local, repo="me/new")
    assert "dry run: nothing sent" in result.stdout
    card = (tmp_path / "model_card.md").read_text()
    assert "a local copy of the base" in card and str(tmp_path) not in card

    (base / "origin.json").write_text(json.dumps({"base": BASE, "weights": "its values in 4 bits"}))
    line = one_error_line(push(finished, *options, config=local, code=1))
    assert f"say where others find it with --base {BASE}" in line
    push(finished, *options, "--base", BASE, config=local, repo="me/new")
    card = (tmp_path / "model_card.md").read_text()
    assert f"a copy of `{BASE}` that holds its values in 4 bits, not on the Hub's own" in card
    assert "with those its scores were not measured" in card and "local copy" not in card


def test_a_task_with_a_template_of_its_own_for_the_student(finished, tmp_path):
    tasks = tmp_path / "prompts"
    shutil.copytree(FOLDER / "title", tasks / "title")
    (tasks / "title/student.jinja").write_text("<text>\n{{ text }}\n</text>\nIt's titled:")
    shutil.copytree(load_run_config(finished[1]).output_dir, tmp_path / "title-run")
    config = changed(finished, tmp_path, output_dir=str(tmp_path / "title-run"))
    task = load_task("title", tasks)
    inputs = inputs_of(replace(load_run_config(config), asked_task=task))
    mark_made(tmp_path / "title-run/inputs", inputs)
    mark_made(tmp_path / "title-run", inputs)
    push(finished, "--unevaluated", "--dry-run", config=config, repo="me/titles")
    card = ModelCard((tmp_path / "title-run/model_card.md").read_text())
    assert "title-generation" in card.data.tags and "that writes titles" in card.content
    assert card.content.count("max_new_tokens=32") == 2 and "max_tokens=32" in card.content
    shown = re.findall(r"^messages = (.*)$", card.content, re.MULTILINE)
    assert [ast.literal_eval(one) for one in shown] == 3 * [task.student_messages(TEXT, "student")]
    assert "summar" not in card.content.replace("summarization", "")


def test_places_on_this_machine_are_cut_out_wherever_they_stand():
    told = {"a": "/home/me too/x/base", "b": [{"path": "~/data/hub"}], "c": "org/name", "d": "/"}
    told |= {"e": "file:///home/me/x", "f": "../me/hub", "/home/me/merged": 1}
    cut = {"a": "base", "b": [{"path": "hub"}], "c": "org/name", "d": "/"}
    cut |= {"e": "x", "f": "hub", "merged": 1}
    assert for_others({**told, "_name_or_path": "x", "is_local": True}) == cut


def test_keys_of_services_stay_out_of_what_is_published():
    kept = {"special_tokens": {"pad_token": "<pad>"}, "wandb_project": "summaries"}
    secrets = {"comet_api_key": "k", "swanlab": {"swanlab_lark_secret": "s"}}
    assert for_others(kept | secrets) == kept | {"swanlab": {}}
