"""`just run` on the tiny student: what is read, which model it takes, where it writes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, clean_environment, one_error_line, read_jsonl, run_stage, start_stage

from common.cli import UserError
from common.files import mark_made
from inference.answer_documents import Job, stream, write
from inference.answers import AnswerOptions, System
from inference.generate import build_prompt, generate_batch, sample_batch
from inference.parts import Cutter
from inference.run_task import newest_adapter
from inference.sources import Document, Source, answer_name, find_sources, make_unique, page_name
from inference.weights import OutOfMemory, find_weights, load_model
from prompts.task import load_task
from training.lengths import Lengths, write_lengths

pytestmark = pytest.mark.slow
STAGE = "inference.run_task"
CAPTURED = {"capture_output": True, "text": True}
TEXTS = {"a.txt": "Ice floats on water.", "sub/b.md": "Lakes freeze from the top. " * 3}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_qwen2):
    """An adapter folder as axolotl leaves it, with a config that names it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("run") / "out"
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model.save_pretrained(folder)  # axolotl leaves the quantized base beside its adapter
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(folder)
    settings = {"base_model": str(tiny_qwen2), "datasets": [{"path": "x"}]}
    settings["output_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def texts(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    return tmp_path / "texts"


def summarize(*args, code=0, **env):
    return run_stage(STAGE, "summarize", *args, "--max-new-tokens", 16, code=code, **env)


def evaluated(folder, text: str, template: str | None = None, task=None) -> list[str]:
    """The words that the evaluation's own functions give."""
    model, tokenizer = load_model(str(folder))
    prompt, _ = build_prompt(tokenizer, text, template, 4000, task)
    return generate_batch(model, tokenizer, [prompt], 16)[0]["text"].split()


def test_a_run_and_its_instructed_base_say_what_the_evaluation_says(adapter, texts, tiny_qwen2):
    config, text = adapter, TEXTS["a.txt"]
    tuned = summarize(texts / "a.txt", "--model", config)
    assert tuned.stdout.split() == evaluated(adapter, text) != evaluated(tiny_qwen2, text)
    assert "a.txt: " in tuned.stderr and "tokens read, " in tuned.stderr
    told = summarize(texts / "a.txt", "--model", config, "--instructed")
    assert told.stdout.split() == evaluated(tiny_qwen2, text, "instructed")


def pipe(shell: str, **env) -> subprocess.CompletedProcess:
    """Run `shell`, in which $RUN stands for the stage."""
    run = f"{sys.executable} -m {STAGE} --max-new-tokens 16 summarize"
    environment = clean_environment(RUN=run, **env)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"], cwd=ROOT, env=environment, **CAPTURED
    )


def test_stdin_beside_a_folder_and_a_text_that_is_too_long(adapter, texts):
    long = " ".join(map(str, range(500)))
    result = pipe(f"echo {long} | $RUN - {texts} --model {adapter} --max-prompt-tokens 200")
    heads = [line for line in result.stdout.splitlines() if line.startswith("==>")]
    called = ("stdin", texts / "a.txt", texts / "sub/b.md")  # as the user called them
    assert heads == [f"==> {name} <==" for name in called]
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert "stdin: its last" in warning and "do not fit into 200" in warning


@pytest.mark.parametrize(
    ("text", "repeats"), [("It loops and it loops. " * 9, True), ("1 2", False)]
)
def test_an_answer_that_goes_round_in_circles_is_told(adapter, texts, monkeypatch, text, repeats):
    record = {"text": text, "finish_reason": "length", "n_prompt_tokens": 9, "n_new_tokens": 16}
    monkeypatch.setattr("inference.answer_documents.generate_batch", lambda *_, **__: [record])
    said = summarize(texts / "a.txt", "--model", adapter).stderr
    assert "stopped at --max-new-tokens" in said
    assert ("a.txt: the answer repeats itself" in said) is repeats


def test_of_a_folder_too_what_is_cut_or_goes_round_in_circles_is_told(
    adapter, texts, tmp_path, monkeypatch
):
    def generate(model, tokenizer, prompts, **_) -> list[dict]:
        record = {"finish_reason": "length", "n_prompt_tokens": 9, "n_new_tokens": 16}
        whole = {"text": "Ice.", "finish_reason": "stop"}
        circles = record | {"text": "It loops and it loops. " * 9}
        return [circles | (whole if "Ice" in prompt else {}) for prompt in prompts]

    monkeypatch.setattr("inference.answers.generate_batch", generate)
    (texts / "long.txt").write_text(" ".join(map(str, range(500))))
    options = ("--model", adapter, "--max-prompt-tokens", 200, "--output-dir", tmp_path / "out")
    for _ in range(2):  # also of what the table has already
        said = summarize(texts, *options).stderr
        assert re.search(r"long\.txt: its last [\d,]+ tokens do not fit into 200", said)
        assert f"{texts / 'sub/b.md'}: 9 tokens read, 16 written, stopped at --max-new" in said
        assert f"{texts / 'sub/b.md'}: the answer repeats itself" in said
        assert "a.txt: " not in said


def test_a_reader_that_leaves_early_is_no_failure(adapter, texts):
    result = pipe(f"$RUN {texts} --model {adapter} --max-new-tokens 2000 | head -c 5")
    assert result.returncode == 0 and "Error" not in result.stderr
    assert "error" not in result.stderr


def test_ctrl_c_ends_quietly(adapter, texts):
    process = start_stage(STAGE, "summarize", texts, "--model", adapter, "--max-new-tokens", 4000)
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "error" not in errors


def test_a_folder_of_answers_is_completed(adapter, texts, tmp_path):
    def write(*options):
        summarize(texts, "--model", adapter, "--output-dir", tmp_path / "out", *options)
        return {name: (tmp_path / "out" / name).read_text() for name in TEXTS}

    table = tmp_path / "out/answers.jsonl"
    first = write()
    assert {name: text.split() for name, text in first.items()} == {
        name: evaluated(adapter, text) for name, text in TEXTS.items()
    }
    (tmp_path / "out/a.txt").unlink()
    assert write() == first and len(read_jsonl(table)) == 2
    instructed = write("--instructed")
    assert all(instructed[name] != first[name] for name in TEXTS)
    assert write() == first and len(read_jsonl(table)) == 4
    (texts / "a.txt").write_text("Salt melts ice.")
    changed = write()
    assert changed["a.txt"].split() == evaluated(adapter, "Salt melts ice.")
    assert changed["sub/b.md"] == first["sub/b.md"] and len(read_jsonl(table)) == 5


def test_the_answer_that_several_agree_on(adapter, texts, tmp_path):
    options = ("--model", adapter, "--samples", 4)
    told = summarize(texts / "a.txt", *options)
    model, tokenizer = load_model(str(adapter))
    prompt, _ = build_prompt(tokenizer, TEXTS["a.txt"], None, 4000)
    (made,) = generate_batch(model, tokenizer, [prompt], 16, samples=4)
    assert told.stdout.split() == made["text"].split()  # the draws are the same each time
    summarize(texts, *options, "--output-dir", tmp_path / "out")
    made = read_jsonl(tmp_path / "out/answers.jsonl")
    assert [record["settings"]["samples"] for record in made] == [4, 4]
    assert {record["text"] + "\n" for record in made} == {
        (tmp_path / "out" / name).read_text() for name in TEXTS
    }


def test_no_prompt_makes_a_copy_of_the_output_layer(adapter):
    """torch does so for a slice of the hidden states and a frozen matrix: gigabytes, by `bmm`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, tokenizer = load_model(str(adapter))
    assert not model.lm_head.weight.requires_grad
    logits_made_by = set()

    class SeeLogits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if getattr(made, "shape", ())[-1:] == (model.config.vocab_size,):
                logits_made_by.add(function.__name__)
            return made

    prompts = [build_prompt(tokenizer, text, None, 4000)[0] for text in TEXTS.values()]
    with SeeLogits():
        generate_batch(model, tokenizer, prompts, 2)
        sample_batch(model, tokenizer, prompts, 2, samples=2)
    assert "mm.default" in logits_made_by and "bmm.default" not in logits_made_by


def test_what_a_kill_leaves_of_a_folder_is_not_made_again(adapter, texts, tmp_path):
    options = (texts, "--model", adapter, "--output-dir", tmp_path / "out")
    summarize(*options)
    table = tmp_path / "out/answers.jsonl"
    first = table.read_bytes().splitlines(keepends=True)[0]
    table.write_bytes(first + b'{"id": "torn')
    for name in TEXTS:
        (tmp_path / "out" / name).unlink()
    summarize(*options)
    assert table.read_bytes().startswith(first) and len(read_jsonl(table)) == 2
    assert all((tmp_path / "out" / name).is_file() for name in TEXTS)


def test_a_text_that_the_memory_does_not_hold_stops_no_other(adapter, texts, tmp_path, monkeypatch):
    def generate(model, tokenizer, prompts, *args, **options):
        if any(TEXTS["a.txt"] in prompt for prompt in prompts):
            raise OutOfMemory("out of memory; lower it")
        return generate_batch(model, tokenizer, prompts, *args, **options)

    for module in ("answers", "answer_documents"):
        monkeypatch.setattr(f"inference.{module}.generate_batch", generate)
    for options in ((), ("--output-dir", tmp_path / "out")):
        result = summarize(texts, "--model", adapter, *options, code=1)
        assert one_error_line(result) == f"error: {texts / 'a.txt'}: out of memory; lower it"
    assert [path.name for path in (tmp_path / "out/sub").iterdir()] == ["b.md"]


@pytest.fixture
def taught(adapter, tmp_path) -> Path:
    """The adapter, that knows it was taught on prompts of 50 to 120 tokens."""
    run = shutil.copytree(adapter, tmp_path / "taught")
    write_lengths(run, Lengths(n=9, least=50, median=90, most_of_95_percent=110, most=120))
    return run


def test_a_long_text_is_read_in_parts_and_a_kill_loses_none(taught, texts, tmp_path):
    long = "\n\n".join(f"Lake {i} freezes in year {i * i}." for i in range(60))
    (texts / "long.txt").write_text(long)
    options = ("--model", taught, "--output-dir", tmp_path / "out")
    told = summarize(texts, *options, "--show-parts")
    assert re.search(
        r"long.txt: [\d,]+ tokens, and it was taught on 50 to 120; read in", told.stderr
    )
    assert not re.search(r"a\.txt: .*; read in", told.stderr)
    parts = [one for one in told.stdout.split("\n-- ") if "part" in one]
    assert "-- part 1 of" in parts[0] and 'from "Lake 0 freezes in year 0. Lake' in parts[0]
    table = tmp_path / "out/answers.jsonl"
    records = read_jsonl(table)
    assert len(records) == len(parts) + 3  # and the last answer, and those to the short texts
    assert all(one["n_prompt_tokens"] <= 150 and not one["n_cut_tokens"] for one in records)

    answer = (tmp_path / "out/long.txt").read_text()
    streamed = summarize(texts / "long.txt", "--model", taught)
    assert streamed.stdout.split() == answer.split() != evaluated(taught, long)
    lines = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(b"".join(lines[:4]) + b'{"id": "torn')
    (tmp_path / "out/long.txt").unlink()
    summarize(texts, *options)
    assert (tmp_path / "out/long.txt").read_text() == answer
    assert table.read_bytes().startswith(b"".join(lines[:4]))
    assert len(read_jsonl(table)) == len(lines)


def test_a_long_text_is_read_in_one_where_that_is_asked_for(taught, adapter, texts):
    long = " ".join(map(str, range(100)))
    (texts / "long.txt").write_text(long)

    def answer(model, *options):
        return summarize(texts / "long.txt", "--model", model, *options)

    whole = answer(taught, "--whole")
    assert whole.stdout.split() == evaluated(adapter, long)
    assert "taught on 50 to 120; read in one" in whole.stderr
    assert "its last" in answer(taught, "--max-prompt-tokens", 200).stderr
    unknown = answer(adapter)
    assert (
        unknown.stdout == whole.stdout and "nothing tells on texts of what length" in unknown.stderr
    )
    assert "read in" not in answer(taught, "--base").stderr
    assert "over --parts 150; read in" in answer(taught, "--base", "--parts", 150).stderr
    assert "over --parts 150; read in" in answer(adapter, "--parts", 150).stderr


def test_parts_are_no_longer_than_what_is_read_at_once(adapter, texts, tmp_path):
    (texts / "long.txt").write_text(" ".join(map(str, range(200))))
    options = ("--model", adapter, "--parts", 5000, "--max-prompt-tokens", 200)
    streamed = summarize(texts / "long.txt", *options)
    assert "over the 200 that are read at once; read in" in streamed.stderr
    assert "left out" not in streamed.stderr
    summarize(texts / "long.txt", *options, "--output-dir", tmp_path / "out")
    records = read_jsonl(tmp_path / "out/answers.jsonl")
    assert len(records) > 2 and not any(record["n_cut_tokens"] for record in records)


def test_what_is_left_out_of_a_part_is_told(adapter, tmp_path, capsys):
    """As of a cutter that reckons otherwise than the limit."""
    system, task = System(find_weights(str(adapter))), load_task()
    options = AnswerOptions(max_new_tokens=4, max_prompt_tokens=100, engine="transformers")
    cutter = Cutter(load_model(str(adapter))[1], task, None, 150, 150, "over 150")
    job = Job(system, task, options, 100, cutter)
    documents = [Document("a.txt", "a.txt", " ".join(map(str, range(100))))]
    for answer in (stream, partial(write, folder=tmp_path)):
        assert answer(job, documents) == 0
        told = capsys.readouterr().err
        assert re.search(r"part 1 of \d: its last \d+ tokens do not fit into 100", told)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n", "no text in it"),
        (b"\xff\xfe\x00", "neither text nor HTML nor PDF"),
        (b"%PDF-1.7\0", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_text(tmp_path, tiny_qwen2, content, said):
    path = tmp_path / "paper.txt"
    if content is not None:
        path.write_bytes(content)
    assert said in one_error_line(summarize(path, "--model", tiny_qwen2, code=1))


def test_a_model_that_is_not_there(texts, tmp_path, tiny_qwen2):
    def refused(*options, cwd=ROOT) -> str:
        stage = (STAGE, "summarize", texts / "a.txt", *options)
        return one_error_line(run_stage(*stage, cwd=cwd, code=1))

    assert "outputs/ holds no adapter for summarize" in refused(cwd=tmp_path)
    assert "is not a model folder" in refused("--model", tmp_path)
    assert "no run and no folder nothing" in refused("--model", "nothing")
    assert "cannot load nobody/nothing" in refused("--model", "nobody/nothing")
    assert "names no base" in refused("--base", "--model", tiny_qwen2)
    assert "would be overwritten" in refused("--model", tiny_qwen2, "--output-dir", texts)
    room = refused("--model", tiny_qwen2, "--max-new-tokens", 10**6)
    assert "--max-new-tokens 1000000 leaves no room in a context" in room


def test_the_adapter_is_the_task_s_newest_and_the_template_the_task_s(
    adapter, texts, tmp_path, capsys
):
    for i, task in enumerate(("title", "summarize", "title", "title")):
        run = shutil.copytree(adapter, tmp_path / f"outputs/run{i}")
        os.utime(run / "adapter_model.safetensors", (i, i))
        mark_made(run / "inputs", {"task": task})
        mark_made(run, {})
    (tmp_path / "outputs/run3/adapter_model.safetensors").unlink()

    def answer(task, *options) -> list[str]:
        stage = (STAGE, task, texts / "a.txt", "--max-new-tokens", 16, *options)
        return run_stage(*stage, cwd=tmp_path).stdout.split()

    expected = evaluated(adapter, TEXTS["a.txt"])
    assert answer("title") == answer("summarize") == expected
    with chdir(tmp_path):
        assert newest_adapter(load_task("title")) == "outputs/run2"
        (Path("outputs/run2/made.json")).unlink()
        assert newest_adapter(load_task("title")) == "outputs/run0"
        assert "run2 is passed over, for its training has not" in capsys.readouterr().err
        (Path("outputs/run0/made.json")).unlink()
        with pytest.raises(UserError, match="run2 has not ended"):
            newest_adapter(load_task("title"))
        mark_made(Path("outputs/run2"), {})
    base = find_weights(str(adapter), base=True).model
    told = evaluated(base, TEXTS["a.txt"], "instructed", load_task("title"))
    assert answer("title", "--instructed") == told


def test_an_adapter_taught_with_another_template_is_refused(adapter, texts, tmp_path):
    run = shutil.copytree(adapter, tmp_path / "run")
    command = (STAGE, "title", texts / "a.txt", "--model", run, "--max-new-tokens", 4)
    mark_made(run, {})
    for taught_with in (None, "0123456789ab"):
        mark_made(run / "inputs", {"task": "title", "student": taught_with})
        result = run_stage(*command, code=int(taught_with is not None))
    assert "was trained with another student.jinja" in one_error_line(result)


def test_an_adapter_from_the_hub(hub, adapter, texts, tiny_qwen2, tmp_path):
    base = {path.name: path.read_bytes() for path in tiny_qwen2.iterdir()}
    revision = hub.put("models/other/base", base)
    told = json.loads((adapter / "adapter_config.json").read_text())
    told |= {"base_model_name_or_path": "other/base", "revision": revision}
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    files = {"adapter_config.json": json.dumps(told).encode(), "adapter_model.safetensors": weights}
    write_lengths(tmp_path, Lengths(n=9, least=9, median=9, most_of_95_percent=9, most=9))
    files["lengths.json"] = (tmp_path / "lengths.json").read_bytes()
    hub.put("models/other/adapter", files)
    environment = hub.environment(tmp_path)
    result = summarize(texts / "a.txt", "--model", "other/adapter", "--whole", **environment)
    assert "tokens, and it was taught on 9 to 9; read in one" in result.stderr
    assert result.stdout.split() == evaluated(adapter, TEXTS["a.txt"])


def make_files(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_bad_file_is_told_before_the_others_are_answered_and_counted_at_the_end(
    adapter, tmp_path
):
    bad = {"bad.pdf": "%PDF-1.7\n", "c.docx": b"PK\3\4", ".DS_Store": b"\0", "._a.txt": b"\0\5"}
    good = {"A.TXT": "Ice floats on water.", "b.htm": "Lakes freeze.", "d.markdown": "Salt melts."}
    folder = make_files(tmp_path / "texts", **bad, **good)
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    out = tmp_path / "texts/out"
    for _ in range(2):  # the second reads none of the answers of the first
        result = summarize(folder, "--model", adapter, "--output-dir", out, code=1)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 2 and "bad.pdf: it is cut" in errors[0]
        assert "gone.txt: No such file or directory" in errors[1]
        # The bar of the answers stands between.
        told, counted = result.stderr.split("2 of 5 texts failed; the lines above say why")
        assert told.rindex("error: ") < told.index("answers:") and not counted.strip()
        assert "2 other files, such as c.docx, pipe.txt, are passed over" in result.stderr
        answers = sorted(path.name for path in out.iterdir())
        assert answers == ["A.TXT", "answers.jsonl", "b.htm.txt", "d.markdown"]
    shutil.rmtree(out)
    shown = run_stage(STAGE, "summarize", "--show-text", folder, code=1)
    assert shown.stdout.split("\n\n") == ["Ice floats on water.", "Lakes freeze.", "Salt melts.\n"]
    nothing = make_files(tmp_path / "other", **{"c.docx": b"PK\3\4"})
    line = one_error_line(summarize(nothing, "--model", adapter, code=1))
    assert "there is no .txt, " in line and "but 1 other files, such as c.docx" in line


def names_of(*inputs: object, output_dir: Path | None = None) -> list[str]:
    sources, failures = find_sources([str(one) for one in inputs], output_dir)
    assert not failures
    return [source.name for source in sources]


def test_no_answer_takes_the_name_of_another_or_of_the_table(tmp_path):
    files = (
        "a.txt",
        "A.txt",
        "a.pdf",
        "a.pdf.txt",
        "answers.jsonl.txt",
        "answers.JSONL",
        "b/a.txt",
    )
    folder = make_files(tmp_path / "x", **dict.fromkeys((*files, "b/a.txt", "b/c"), "text"))
    given = (folder, folder / "answers.JSONL", folder / "b/a.txt", folder / "b/c", "-", "-")
    names = names_of(*given)  # a document that is given twice is answered once
    assert len(names) == 9 and len({name.casefold() for name in names}) == 9
    assert {"A.txt", "a.pdf.txt", "b/a.txt", "stdin"} <= set(names)
    assert "answers.jsonl" not in [name.lower() for name in names]
    assert names == names_of(*given)
    under = make_unique([Source("1", "b"), Source("2", "b/a.txt")])
    assert under[1].name.startswith("a-") and "/" not in under[1].name


def test_what_is_no_path_does_not_stop_the_others(tmp_path):
    (tmp_path / "good.txt").write_text("A good text.")
    odd = ("", "x" * 5000, "good.txt")
    result = run_stage("inference.run_task", "summarize", "--show-text", *odd, cwd=tmp_path, code=1)
    assert result.stdout == "A good text.\n" and "an empty name" in result.stderr
    assert result.stderr.count("error: ") == 2 and "File name too long" in result.stderr


def test_names_can_be_written_anywhere():
    long = "https://example.com/" + "a/" * 300 + "?q=../../etc"
    names = [page_name(long), page_name(long + "2"), answer_name("ü" * 120 + ".pdf")]
    assert len(set(names)) == 3
    for name in names:
        assert len(name.encode()) <= 200 and name.endswith(".txt")
        assert not re.search(r"[/\0]|\.\.", name)
    assert page_name("https://example.com/../..") == "https-example-com.txt"
    assert page_name("://") == "page.txt" and answer_name("a\nb.txt") == "a-b.txt"


@pytest.mark.parametrize("link", ["none", "symbolic", "folder"])
def test_no_document_is_overwritten(adapter, tmp_path, link):
    texts, out = make_files(tmp_path / "x", **{"answers.jsonl": "Ice floats."}), tmp_path / "out"
    if link == "none":
        out = texts
    elif link == "symbolic":
        out.mkdir()
        (out / "answers.jsonl").symlink_to(texts / "answers.jsonl")
    else:
        out.symlink_to(texts)
    options = (texts / "answers.jsonl", "--model", adapter, "--output-dir", out)
    assert "would be overwritten, and is read" in one_error_line(summarize(*options, code=1))
    assert (texts / "answers.jsonl").read_text() == "Ice floats."
