import importlib
import socket
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import run_here
from page_server import PageServer

from training import config as training_config

NOWHERE = "http://127.0.0.1:9"  # the port that discards, where nobody listens
H100 = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Stands in for torch, so that no test takes long to load it: a CPU; GPUs to be put in."""
    gpus = []
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(training_config, "CPUINFO", tmp_path / "cpuinfo")
    training_config.CPUINFO.write_text("flags : fpu avx2 avx512_bf16 amx_bf16")
    cuda = SimpleNamespace(device_count=lambda: len(gpus), get_device_properties=lambda i: gpus[i])
    torch = SimpleNamespace(__version__="2.13.0+cu130", cuda=cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "inference.doctor", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if gpus else None)
    yield SimpleNamespace(gpus=gpus)
    sys.modules.pop("inference.doctor", None)


@pytest.fixture
def server():
    server = PageServer({"/api/whoami-v2": (200, {}, b"{}"), "/v1/models": (200, {}, b"[]")})
    yield server
    server.close()


def diagnose(**env: str) -> dict[str, str]:
    """The doctor's lines as told on the command line: name -> what is said of it."""
    nowhere = {"https_proxy": NOWHERE, "no_proxy": "", "HF_ENDPOINT": NOWHERE}
    result = run_here("inference.doctor", **{**nowhere, **env})
    assert (result.returncode, result.stderr) == (0, "")
    for secret in ("hf_secret", "tg_secret", "secret.example"):
        assert secret not in result.stdout
    return {line[:20].rstrip(): line[20:] for line in result.stdout.splitlines()}


def test_all_that_is_here_is_told_and_all_recipes_can_run(machine, server):
    machine.gpus += [H100, H100]
    told = diagnose(
        HF_ENDPOINT=f"{server.url}/",
        HF_TOKEN="hf_secret",
        TOGETHER_API_KEY="tg_secret",
        TOGETHER_BASE_URL=server.url,
    )
    assert told["GPU"] == "NVIDIA H100, 80 GiB, NVIDIA H100, 80 GiB"
    assert told["Python, torch"].endswith("2.13.0+cu130 (bf16 on this CPU)")
    assert [told[key] for key in ("TOGETHER_API_KEY", "TOGETHER_BASE_URL", "HF_TOKEN")] == 3 * [
        "set"
    ]
    assert told["Hub"] == told["teacher"] == "answers"
    assert "GiB free" in told["disk"]
    recipes = {told[name] for name in told if name.startswith("just ")}
    assert recipes == {"can run"}
    assert sorted(server.seen) == ["/api/whoami-v2", "/v1/models"]
    assert sorted(asked["Authorization"] for asked in server.headers) == [
        "Bearer hf_secret",
        "Bearer tg_secret",
    ]


def test_all_that_is_missing_is_told_with_what_to_do(machine, monkeypatch):
    training_config.CPUINFO.write_text("flags : fpu avx2")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    told = diagnose()
    assert told["GPU"] == "none for torch" and "(no bf16 on this CPU)" in told["Python, torch"]
    assert told["TOGETHER_API_KEY"] == "not set" and "hf auth login" in told["HF_TOKEN"]
    assert told["Hub"] == "no answer (ConnectError); check network, proxy and address"
    assert told["teacher"].startswith("no answer")
    assert told["just demo"] == "can run"
    assert told["just dataset"] == "lacks Hub, lacks teacher, lacks TOGETHER_API_KEY"
    assert told["just train (QLoRA)"] == "lacks Hub, lacks GPU"
    assert told["just serve (vLLM)"] == "lacks GPU, lacks vLLM"
    assert told["just publish-*"] == "lacks Hub, lacks HF_TOKEN"


def test_an_endpoint_of_ones_own_needs_no_key(machine, server):
    told = diagnose(HF_ENDPOINT=server.url, TOGETHER_BASE_URL=server.url)
    assert (told["TOGETHER_API_KEY"], told["teacher"]) == ("unset; yours may need none", "answers")
    assert told["just dataset"] == "can run"


def test_each_of_several_endpoints_is_looked_at(machine, server):
    told = diagnose(HF_ENDPOINT=server.url, TOGETHER_BASE_URL=f"{server.url}, {NOWHERE}")
    assert told["TOGETHER_BASE_URL"] == "set" and told["teacher"] == "answers"
    assert told["teacher 2"].startswith("no answer")


def test_a_key_that_is_refused_or_broken_is_told_and_never_shown(machine, server):
    server.pages["/api/whoami-v2"] = (401, {}, b"hf_secret")
    server.pages["/v1/models"] = (503, {}, b"tg_secret")
    keys = {"HF_TOKEN": "hf_secret", "TOGETHER_API_KEY": "tg_secret"}
    told = diagnose(HF_ENDPOINT=server.url, TOGETHER_BASE_URL=server.url, **keys)
    assert told["Hub"] == "no: 401; check the key"
    assert told["teacher"] == "no: 503; it is out of order, try later"
    for key in ("tg_secret\nX: y", "tg_secret-é"):
        told = diagnose(TOGETHER_API_KEY=key, TOGETHER_BASE_URL=server.url)
        assert told["teacher"].startswith("no answer (")
    for address in ("http://user:tg_secret@secret.example", "tg_secret", "http://[tg_secret"):
        told = diagnose(TOGETHER_BASE_URL=address, http_proxy=NOWHERE)
        assert told["teacher"].startswith("no answer (")


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", "/v1/models"),
        ("/", "/v1/models"),
        ("/v1", "/v1/models"),
        ("/v1/", "/v1/models"),
        ("/v1/chat/completions", "/v1/models"),
        ("/v1beta/openai", "/v1beta/openai/models"),
        ("/api/paas/v4", "/api/paas/v4/models"),
        ("/gateway", "/gateway/v1/models"),
    ],
)
def test_the_models_are_looked_for_below_the_version_that_an_address_names(machine, base, path):
    doctor = importlib.import_module("inference.doctor")
    assert doctor.models_url(f"http://host:8{base}") == f"http://host:8{path}"


def test_an_address_with_a_version_is_asked_as_it_is(machine, server):
    told = diagnose(HF_ENDPOINT=server.url, TOGETHER_BASE_URL=f"{server.url}/v1/")
    assert told["teacher"] == "answers" and server.seen.count("/v1/models") == 1
    told = diagnose(HF_ENDPOINT=server.url, TOGETHER_BASE_URL=f"{server.url}/other/v9")
    assert told["teacher"] == "no: 404; check the address"


def test_what_cannot_be_a_key_or_an_address_is_told(machine):
    odd = {"TOGETHER_API_KEY": "tg_secret\nX: y", "TOGETHER_BASE_URL": "api.secret.example/v1"}
    told = diagnose(**odd, SSL_CERT_FILE="/nowhere", HF_TOKEN="hf_secret\x07")
    assert told["TOGETHER_API_KEY"].startswith("not usable")
    assert told["TOGETHER_BASE_URL"].startswith("not usable")
    assert told["just dataset"] == "lacks Hub, lacks teacher, lacks TOGETHER_API_KEY"


def test_an_address_that_never_ends_its_answer_is_given_up(machine, monkeypatch):
    doctor = importlib.import_module("inference.doctor")
    monkeypatch.setattr(doctor, "PATIENCE", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        told = diagnose(HF_ENDPOINT=url, TOGETHER_BASE_URL=url)
    assert told["Hub"].startswith("no answer within") and told["teacher"] == told["Hub"]


def test_an_address_has_all_the_time_however_many_are_looked_at(machine, monkeypatch):
    doctor = importlib.import_module("inference.doctor")
    monkeypatch.setattr(doctor, "PATIENCE", 2)
    monkeypatch.setattr(doctor, "look", lambda seconds, _: time.sleep(seconds) or "answers")
    quick = {f"quick {number}": (0, None) for number in range(5)}
    started = time.monotonic()
    states = doctor.look_at_all(quick | {"late": (1, None), "never": (60, None)})
    assert 2 <= time.monotonic() - started < 4
    assert states.pop("never").startswith("no answer within 2 s")
    assert set(states.values()) == {"answers"}
