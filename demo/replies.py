"""The recorded replies of the demo's teacher: packed from a folder of replies, served on loopback.

A small open model (Qwen2.5-Coder-1.5B-Instruct) really wrote them; docs/demo.md says how to make
them again. demo/recordings/TASK.jsonl.gz holds a line a reply, found by the hash of its prompt,
behind a first line of what made them. With a command after `--`, answers from the recordings only
while the command runs, which finds the endpoint in TOGETHER_BASE_URL and a placeholder key; keys
and endpoints of the surrounding environment are not passed on. A prompt that was not recorded is
refused.

    python -m demo.replies serve -- python -m data_prep.generate_replies --data data/demo --single
    python -m demo.replies pack --task title --data data/demo --model-file models/teacher.gguf
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from common.cli import UserError, run, script_parser
from common.files import digest, file_sha, read_records, replacing
from data_prep.load_extracts import load_extracts
from data_prep.teacher.reply_table import fill_in
from data_prep.teacher.teacher_prompts import TeacherPrompts
from demo.endpoint import Endpoint
from prompts.task import add_task_options, data_folder, task_of

RECORDINGS = Path(__file__).parent / "recordings"
KEPT = ("id", "prompt_sha", "answers", "longer", "text", "finish_reason", "usage")


def load_recordings() -> tuple[set[str], dict[str, dict]]:
    """(the models that wrote them, digest of the prompt -> the recorded reply)."""
    models, replies = set(), {}
    for path in sorted(RECORDINGS.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            models.add(json.loads(next(file))["model"])
            replies |= {reply["prompt"]: reply for reply in map(json.loads, file)}
    if not replies:
        raise UserError(f"no recording in {RECORDINGS}")
    return models, replies


def prompt_of(prompts: TeacherPrompts, reply: dict) -> str:
    """The prompt that a reply answers, found by the hash of its template. Raises UserError."""
    template = prompts.template_by_sha.get(reply["prompt_sha"])
    if not template:
        folder = prompts.task.folder
        raise UserError(f"reply {reply['id']} answers a prompt that is no longer in {folder}")
    return prompts.messages(template, reply["id"], reply.get("longer") or 1)[-1]["content"]


def pack(args) -> None:
    """Write the task's recording from its replies."""
    task, lines, models = task_of(args), [], set()
    for split in ("train", "test"):
        extracts = load_extracts(data_folder(args, "extracts") / f"{split}.jsonl")
        prompts, path = TeacherPrompts(task, extracts), data_folder(args, "replies")
        path = path / f"{split}.jsonl"
        for reply in fill_in(read_records(path, ("text",)), path):
            is_whole = not reply.get("unusable")
            if reply["id"] in prompts.extracts and prompts.is_of_today(reply) and is_whole:
                models.add(reply["model"])
                prompt = digest(prompt_of(prompts, reply))
                kept = {name: reply[name] for name in KEPT if name in reply}
                lines.append({"prompt": prompt} | kept)
    if len(models) != 1:
        raise UserError(f"the replies to today's texts are of {len(models)} models, not of one")
    (model,) = models
    made_by = {"model": model, "model_sha256": file_sha(args.model_file), "temperature": 0}
    path = RECORDINGS / f"{task.name}.jsonl.gz"
    with replacing(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        for line in [made_by, *sorted(lines, key=lambda line: line["prompt"])]:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{path}: {len(lines):,} replies, {path.stat().st_size:,} bytes")


def serve(args) -> None:
    """Answer from the recordings, while a command runs if there is one."""
    models, replies = load_recordings()

    def tokens(prompt: str, reply: str, most: int) -> tuple[int, int]:
        usage = replies[digest(prompt)]["usage"] or {}
        return usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)

    endpoint = Endpoint(
        lambda prompt: replies[digest(prompt)]["text"],
        status=lambda prompt: 200 if digest(prompt) in replies else 400,
        message="this prompt was not recorded",
        finish=lambda prompt: replies[digest(prompt)]["finish_reason"],
        model=models.pop(),
        count_tokens=tokens,
        port=args.port,
    )
    if not args.command:
        reach = f"TOGETHER_BASE_URL={endpoint.url} TOGETHER_API_KEY=local"
        print(f"serving {len(replies):,} recorded replies; {reach}", flush=True)
        endpoint.thread.join()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TOGETHER_")}
    environment |= {"TOGETHER_BASE_URL": endpoint.url, "TOGETHER_API_KEY": "local"}
    sys.exit(run_to_its_end(args.command, environment))


def run_to_its_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command; return its exit code as a shell tells it."""
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code  # which a signal ended
        except KeyboardInterrupt:
            continue  # the command gets the same signal and ends in its own way


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("action", choices=("serve", "pack"), help="answer from the recordings, or write one")
    option("command", nargs="*", help="serve: what to run against the endpoint, after --")
    option("--port", type=int, default=0, help="serve: 0 takes a free one")
    option("--model-file", type=Path, help="pack: of the teacher's weights")
    add_task_options(parser)
    args = parser.parse_args()
    if args.action == "serve":
        serve(args)
    elif not args.model_file:
        raise UserError("pack needs --model-file, whose hash tells the teacher")
    else:
        pack(args)


if __name__ == "__main__":
    run(main)
