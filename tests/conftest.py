"""Shared tools: run a stage as a user does, an OpenAI-compatible endpoint, a tiny Qwen2."""

import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import httpx
import pytest
import yaml
from hub_server import Hub

from common.cli import run
from demo.endpoint import Endpoint as FakeEndpoint

ROOT = Path(__file__).parent.parent
# Two workers share two cores: more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# 32 bits on every machine: in bf16 a batch rounds otherwise than each of its texts alone.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment without keys and endpoints, offline; what `extra` gives on top."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOGETHER_", "HF_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **extra}


def start_stage(module: str, *args: object, cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=cwd,
        text=True,
        env=clean_environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@contextmanager
def environment(cwd: Path, arguments: list[str], **env: str):
    """This process as a new one would find itself: folder, command line, variables, no keys."""
    kept, there, command = dict(os.environ), Path.cwd(), sys.argv
    wanted = clean_environment(**env)
    os.environ.clear()
    os.environ.update(wanted)
    os.chdir(cwd)
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = command
        os.chdir(there)
        os.environ.clear()
        os.environ.update(kept)


def run_here(module: str, *args: object, cwd: Path = ROOT, **env: str):
    """Run a stage's own command line inside this process, which has the heavy imports already."""
    stage = importlib.import_module(module)
    out, err = io.StringIO(), io.StringIO()
    arguments, code = [stage.__file__, *map(str, args)], 0
    with environment(cwd, arguments, **env), redirect_stdout(out), redirect_stderr(err):
        try:
            run(stage.main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end.code if isinstance(end.code, str) else "", file=err)
        except Exception:
            traceback.print_exc(file=err)
            code = 1
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_stage(
    module: str, *args: object, cwd: Path = ROOT, code: int | None = 0, fresh=False, **env: str
) -> subprocess.CompletedProcess:
    """Run a stage's command line; assert its exit code and that no traceback is shown.

    In this process, which is quick, unless `fresh` or a variable that is read at import asks for a
    new one.
    """
    if fresh or any(name.startswith(("HF_", "PATH", "PYTHON")) for name in env):
        process = start_stage(module, *args, cwd=cwd, **env)
        out, err = process.communicate(timeout=600)
        result = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    else:
        result = run_here(module, *args, cwd=cwd, **env)
    said = result.stdout + result.stderr
    assert "Traceback" not in said, said
    assert code is None or result.returncode == code, said
    return result


def one_error_line(result: subprocess.CompletedProcess) -> str:
    """The only line in which a failed stage says what is wrong."""
    (line,) = re.findall(r"error: .*", result.stderr)
    return line


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    # By bytes: a text may hold U+2028, at which Python splits lines too.
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def criteria_for(total: int) -> dict[str, int]:
    """Scores on the four criteria that add up to `total`."""
    criteria, left = {}, total - 4
    for name, highest in (("Coherence", 5), ("Consistency", 5), ("Fluency", 3), ("Relevance", 5)):
        criteria[name] = 1 + min(left, highest - 1)
        left -= criteria[name] - 1
    return criteria


def teacher_reply(
    one: str = "A first summary of it all.",
    two: str = "Another one.",
    scores: tuple[int, int] = (16, 12),
    best: int | None = None,
) -> str:
    """A reply in exactly the format the teacher's prompt asks for."""
    parts = []
    for number, text, score in zip((1, 2), (one, two), scores, strict=True):
        lines = [f"{name}: {value}" for name, value in criteria_for(score).items()]
        parts += [
            f"Summary {number}:",
            text,
            *lines,
            f"Total score: {score}",
            "Explanation: it reads well.",
            "",
        ]
    best = best or (1 if scores[0] >= scores[1] else 2)
    return "\n".join([*parts, f"Best summary: {best}"])


class Endpoint(FakeEndpoint):
    """The fake endpoint as tests want it: the same answer to every prompt, always as dear.

    `status` is of all answers, or a function of the prompt; other options as in demo/endpoint.py.
    """

    def __init__(self, delay: float = 0.0, status=200, **options: object):
        content = options.pop("content", teacher_reply())
        options = {"reply": lambda prompt: content, "latency": delay} | options
        options |= {"status": status if callable(status) else lambda prompt: status}
        super().__init__(**{"count_tokens": lambda *_: (1000, 100), **options})


@pytest.fixture
def endpoint():
    started = []

    def start(**options) -> Endpoint:
        started.append(Endpoint(**options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def make_tokenizer(folder: Path, template: str = QWEN2_TEMPLATE):
    """A byte-level BPE with the chatml special tokens, trained on this repo's own prose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([(ROOT / "prompts/summarize/teacher.jinja").read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory) -> Path:
    """A random two-layer Qwen2 with a chatml tokenizer, as a model folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tiny_qwen2) -> dict:
    """Two runs' folders, of unlike tasks and ranks, and the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.files import mark_made

    found = {}
    for seed, task in enumerate(("summarize", "title"), 1):
        folder = found[task] = tmp_path_factory.mktemp("runs") / f"run-1.{seed}"
        torch.manual_seed(seed)
        lora = LoraConfig(r=4 * seed, target_modules="all-linear", init_lora_weights=False)
        model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
        get_peft_model(model, lora).save_pretrained(folder)
        model.config.save_pretrained(folder)  # axolotl leaves its base's
        AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(folder)
        mark_made(folder / "inputs", {"task": task})
        mark_made(folder, {"task": task})  # its training ended
    return found | {"tiny-qwen2": tiny_qwen2}


@contextmanager
def listening(module: str, *args: object):
    """The address of a server that a stage starts on a free port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start_stage(module, *args, "--port", port)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{url}/v1/models")
            break
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
    yield url
    process.terminate()
    print(process.communicate(timeout=30)[1], file=sys.stderr)  # which pytest shows of a failure


@pytest.fixture(scope="session")
def served_url(adapters):
    """Where `just serve` serves the adapters."""
    with listening("inference.serve", adapters["summarize"], adapters["title"]) as url:
        yield url


@pytest.fixture(scope="session")
def demo_parts(tmp_path_factory) -> Path:
    """The demo's articles (data/) and models (models/), laid out by its own script."""
    folder = tmp_path_factory.mktemp("parts")
    run_stage("demo.prepare_parts", "--data", folder / "data", "--models", folder / "models")
    return folder


@pytest.fixture(scope="session")
def tiny_nli(tmp_path_factory) -> Path:
    """A random two-layer DebertaV2 classifier with the three labels of MNLI."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-nli"
    tokenizer = make_tokenizer(folder)
    labels = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_run(folder: Path, model: Path) -> Path:
    """A config in `folder` whose base and merged model are `model`, with four test documents."""
    message = [{"role": "user", "content": ""}]
    rows = [
        {
            "id": f"t{i}",
            "source": "wikipedia",
            "prompt": [{**message[0], "content": "Ice floats. " * (i + 1)}],
            "chosen": [{"role": "assistant", "content": "Ice."}],
        }
        for i in range(4)
    ]
    (folder / "hub").mkdir()
    write_jsonl(folder / "hub/test.jsonl", rows)
    (folder / "out").mkdir()
    (folder / "out/merged").symlink_to(model)
    config = folder / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(model),
                "datasets": [{"path": str(folder / "hub")}],
                "output_dir": str(folder / "out"),
            }
        )
    )
    return config


@pytest.fixture
def finished_run(tmp_path, tiny_qwen2):
    """A run whose base and merged model are the tiny student, with four test documents."""
    return make_run(tmp_path, tiny_qwen2)
