"""Stands in for the command `vllm serve`: answers tokens greedily, by transformers.

FAKE_VLLM in the environment names a folder; there the file `fault` says what goes wrong: `start`
(no memory), `killed` (at the third request), `silent` (no request is answered); the file `pid` gets
the server's, `asked.jsonl` what it is asked.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["FAKE_VLLM"])
FAULT = (FOLDER / "fault").read_text() if (FOLDER / "fault").exists() else None
LOCK = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--host")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--lora-modules")
    parser.add_argument("--enforce-eager", action="store_true")
    args, _ = parser.parse_known_args()
    (FOLDER / "pid").write_text(str(os.getpid()))
    if FAULT == "start":
        print("(EngineCore pid=7) ERROR 11-30 [core.py:1] torch.OutOfMemoryError: out of memory")
        sys.exit("RuntimeError: Engine core initialization failed.")
    names = list(args.served_model_name)
    model = None if FAULT == "silent" else load_model(args, names)
    handle = handler(model, names, args.max_model_len)
    ThreadingHTTPServer((args.host, args.port), handle).serve_forever()


def load_model(args, names: list[str]):
    """The model that answers; an adapter's name is added to `names`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    if args.lora_modules:
        name, _, folder = args.lora_modules.partition("=")
        model = PeftModel.from_pretrained(model, folder)
        names.append(name)
    return model


def handler(model, names: list[str], longest: int) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with LOCK:
                with (FOLDER / "asked.jsonl").open("a+") as file:
                    file.write(json.dumps(asked) + "\n")
                    file.seek(0)
                    n_asked = len(file.readlines())
                if FAULT == "killed" and n_asked == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                while FAULT == "silent":
                    time.sleep(1)
                assert asked["model"] in names and asked["temperature"] == 0
                assert len(asked["prompt"]) + asked["max_tokens"] <= longest
                self.reply({"choices": [answer(model, asked)]})

        def reply(self, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def answer(model, asked: dict) -> dict:
    """As vLLM's: the tokens, the one that ended them among them, and why they ended."""
    import torch

    prompt, ends = torch.tensor([asked["prompt"]]), asked["stop_token_ids"]
    options = {"max_new_tokens": asked["max_tokens"], "eos_token_id": ends, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    ids = model.generate(input_ids=prompt, attention_mask=mask, do_sample=False, **options)
    new = ids[0, prompt.shape[1] :].tolist()
    return {"token_ids": new, "finish_reason": "stop" if new[-1] in ends else "length"}


main()
