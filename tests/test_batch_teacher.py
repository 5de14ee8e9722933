"""The batch API against a local server that speaks its protocol, cut off at every step."""

import json
import os
import re
import signal
from collections import Counter

import pytest
from conftest import one_error_line, read_jsonl, run_stage, start_stage, teacher_reply, write_jsonl
from quiet_server import QuietHandler, Stub

STAGE = "data_prep.generate_replies"
KEY = "sk-secret-0123456789"


class BatchServer(Stub):
    """Files and batches as Together serves them; `refuse` are the ids that end in the errors file.

    Kills the client after it did what was asked in a step of `kill_at`, before it answers.
    """

    def __init__(self, refuse=(), kill_at=(), status="COMPLETED", refuse_for_good=()):
        self.files, self.batches, self.names, self.steps = {}, {}, {}, Counter()
        self.kill_at, self.client = set(kill_at), None
        server = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"

            def send(self, step: str, status: int, body=None, **headers: str) -> None:
                server.steps[step] += 1
                if step in server.kill_at:
                    server.kill_at.remove(step)
                    os.kill(server.client.pid, signal.SIGKILL)
                data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client was killed

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_POST(self) -> None:
                data = self.body()
                if self.path == "/v1/files":
                    checksum = re.search(rb"[0-9a-f]{64}", data)[0]
                    if checksum in server.names:
                        return self.send("again", 409, {"file_id": server.names[checksum]})
                    name = server.names[checksum] = f"file-{len(server.names)}"
                    url = f"http://{self.headers['Host']}/store/{name}"
                    return self.send("upload", 302, Location=url, X_Together_File_Id=name)
                if self.path.endswith("/preprocess"):
                    return self.send("preprocess", 200, server.file(self.path.split("/")[3]))
                job = {"id": f"batch-{len(server.batches)}", "status": "VALIDATING"}
                job |= {"input_file_id": json.loads(data)["input_file_id"], "progress": 0.0}
                server.batches[job["id"]] = job
                return self.send("create", 201, {"job": job})

            def do_PUT(self) -> None:
                server.files[self.path.split("/")[-1]] = self.body()
                self.send("put", 200)

            def do_GET(self) -> None:
                parts = self.path.split("/")
                if parts[2] == "files" and parts[-1] == "content":
                    return self.send("content", 200, server.files[parts[3]])
                if parts[2] == "files":
                    return self.send("file", 200, server.file(parts[3]))
                if len(parts) == 3:
                    return self.send("list", 200, list(server.batches.values()))
                job = server.batches[parts[3]]
                if job["status"] == "IN_PROGRESS":
                    job |= server.finish(job) | {"status": status, "progress": 100.0}
                elif job["status"] == "VALIDATING":
                    job |= {"status": "IN_PROGRESS", "progress": 50.0}
                return self.send("poll", 200, job)

        self.refuse, self.refuse_for_good = refuse, refuse_for_good
        self.odd, self.more_lines = {}, b""  # what is odd in a reply by its id; in the output
        self.serve(Handler)

    def file(self, name: str) -> dict:
        known = {"id": name, "bytes": len(self.files[name]), "created_at": 1, "filename": name}
        return known | {"FileType": "jsonl", "object": "file", "purpose": "batch-api"}

    def finish(self, job: dict) -> dict:
        """Answer the requests, last first; write the output and the errors file."""
        lines = [json.loads(line) for line in self.files[job["input_file_id"]].splitlines()]
        out, errors = [], []
        for line in reversed(lines):
            name, model = line["custom_id"], line["body"]["model"]
            key = "a" + re.search(r"text number (\d+)", line["body"]["messages"][0]["content"])[1]
            if key in self.refuse:
                errors.append({"custom_id": name, "error": {"message": "too hot"}})
                continue
            if key in self.refuse_for_good:
                body = {"error": {"message": "content filter"}}
                errors.append({"custom_id": name, "response": {"status_code": 400, "body": body}})
                continue
            choice = {"message": {"content": teacher_reply()}, "finish_reason": "stop"}
            choice |= self.odd.get(key, {})
            usage = {"prompt_tokens": 1000, "completion_tokens": 100}
            body = {"choices": [choice], "usage": usage, "model": model}
            out.append({"custom_id": name, "response": {"status_code": 200, "body": body}})
        for kind, rows in (("output", out), ("error", errors)):
            data = "".join(json.dumps(row) + "\n" for row in rows)
            self.files[f"{job['id']}-{kind}"] = data.encode() + self.more_lines
        return {f"{kind}_file_id": f"{job['id']}-{kind}" for kind in ("output", "error")}


@pytest.fixture
def folder(tmp_path):
    rows = [{"id": f"a{i}", "text": f"text number {i}"} for i in range(30)]
    write_jsonl(tmp_path / "extracts/train.jsonl", rows)
    return tmp_path


def ask(folder, server, *more, code=0):
    where = ["--data", folder]
    options = [*where, "--splits", "train", "--poll-seconds", 0.05, *more]
    environment = {"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": KEY, "BUDGET_USD": "1000"}
    if not server.kill_at:
        return run_stage(STAGE, *options, code=code, **environment)
    server.client = start_stage(STAGE, *options, **environment)
    out, err = server.client.communicate(timeout=120)
    assert "Traceback" not in err and KEY not in err
    assert server.client.returncode == code, out + err
    return server.client


def test_a_batch_ends_as_ordinary_replies_and_the_errors_are_told(folder):
    server = BatchServer(refuse=["a3"])
    model = "meta-llama/Llama-3.3-70B-Instruct-Turbo"  # half price in a batch
    result = ask(folder, server, "--batch", "--model", model, code=1)
    assert "29 replies" in result.stdout and "1 still to ask" in result.stdout
    replies = read_jsonl(folder / "summarize/replies/train.jsonl")
    assert {r["id"] for r in replies} == {f"a{i}" for i in range(30)} - {"a3"}
    assert replies[0]["cost_usd"] == pytest.approx(1100 * 1.04 / 2 / 1e6)
    assert {r["longer"] for r in replies} == {1, 2} and replies[0]["usage"]["prompt_tokens"] == 1000
    assert "1 without a reply, the last with: too hot" in result.stdout
    server.refuse = ()
    ask(folder, server, "--batch", "--model", model)  # asks for the one that is missing
    assert (
        len(read_jsonl(folder / "summarize/replies/train.jsonl")) == 30 and len(server.batches) == 2
    )
    ask(folder, server, "--batch", "--model", model)
    assert len(server.batches) == 2  # nothing was missing
    assert sorted(p.name for p in (folder / "summarize/replies").glob("*batch*")) == []


def test_what_a_batch_refuses_for_good_is_remembered(folder):
    server = BatchServer(refuse_for_good=["a3"])
    for _ in range(2):
        ask(folder, server, "--batch")
    (refusal,) = read_jsonl(folder / "summarize/replies/train.refused.jsonl")
    assert (refusal["id"], refusal["reason"]) == ("a3", "content filter")
    assert len(server.batches) == 1
    spent = float((folder / "summarize/replies/.spent_usd").read_text())
    costs = [r["cost_usd"] for r in read_jsonl(folder / "summarize/replies/train.jsonl")]
    assert spent == pytest.approx(sum(costs))  # the worst case was given back


@pytest.mark.slow
def test_cut_off_between_any_two_steps_the_same_batch_goes_on(folder):
    steps = ["upload", "put", "preprocess", "list", "create", "poll", "content"]
    server = BatchServer(kill_at=steps)
    for _ in steps:
        ask(folder, server, "--batch", code=-signal.SIGKILL)
    refused = ask(folder, server, code=1)  # asking singly would pay twice
    (line,) = re.findall("error: .*", refused.stderr)
    assert "a batch is under way" in line and "--batch" in line
    ask(folder, server, "--batch")
    assert not server.kill_at and len(server.batches) == 1
    assert list((folder / "summarize/replies").glob("*batch*")) == []
    replies = read_jsonl(folder / "summarize/replies/train.jsonl")
    assert sorted(r["id"] for r in replies) == sorted(f"a{i}" for i in range(30))


def test_a_batch_stays_within_the_budget_at_its_worst_case(folder):
    server = BatchServer()
    options = ("--batch", "--max-tokens", 4096)
    result = ask(folder, server, *options, "--budget-usd", 0.03, code=1)
    assert "which is over the budget" in result.stderr and not server.batches
    ask(folder, server, *options, "--budget-usd", 0.03, "--limit", 9)
    assert len(server.batches) == 1
    for line in map(json.loads, list(server.files.values())[-1].splitlines()):
        assert line["body"]["max_tokens"] == 4096 and len(line["custom_id"]) <= 64


@pytest.mark.parametrize("content", ['{"price": ', "[]"])
def test_a_torn_file_of_a_batch_that_is_paid_for_is_kept(folder, content):
    server, state = BatchServer(), folder / "summarize/replies/train.batch.json"
    state.parent.mkdir(parents=True)
    state.write_text(content)
    line = one_error_line(ask(folder, server, "--batch", code=1))
    assert "tells the batch that is paid for" in line and "delete" not in line
    assert state.read_text() == content and not server.batches


@pytest.mark.parametrize("status", ["FAILED", "EXPIRED", "CANCELLED"])
def test_a_batch_that_failed_leaves_the_way_free(folder, status):
    server = BatchServer(status=status, refuse=[f"a{i}" for i in range(30)])
    result = ask(folder, server, "--batch", code=1)
    assert f"ended as {status}" in result.stdout
    assert not (folder / "summarize/replies/train.batch.json").exists()
    assert "30 without a reply, the last with: too hot" in result.stdout


def test_odd_lines_of_a_batch_lose_nothing_and_replies_are_read_as_elsewhere(folder):
    server = BatchServer()
    server.more_lines = b'{"custom_id": "x-99"}\n[1]\n{"custom_id": 7}\n{torn\n\n'
    half = {"message": {"content": "Half \ud83d an emoji."}}
    server.odd = {"a1": {"finish_reason": "content_filter"}, "a2": {"message": {}}, "a3": half}
    server.odd["a4"] = {"message": {"content": [{"type": "text", "text": "Parts."}]}}
    result = ask(folder, server, "--batch")
    replies = {r["id"]: r for r in read_jsonl(folder / "summarize/replies/train.jsonl")}
    assert len(replies) == 30 and "8 without a reply" in result.stdout
    assert (replies["a1"]["unusable"], replies["a2"]["unusable"]) == ("filtered", "empty")
    assert (replies["a3"]["text"], replies["a4"]["text"]) == ("Half \ufffd an emoji.", "Parts.")
    ask(folder, server, "--batch")
    assert len(server.batches) == 1
    server.odd = {}
    ask(folder, server, "--batch", "--retry-unusable")
    records = read_jsonl(folder / "summarize/replies/train.jsonl")
    assert len(server.batches) == 2 and len(records) == 32


def test_a_request_answered_twice_is_one_reply_and_a_lost_one_costs_its_worst_case(folder):
    server, finish = BatchServer(), BatchServer.finish

    def doubled(job: dict) -> dict:
        names = finish(server, job)
        lines = [json.loads(line) for line in server.files[names["output_file_id"]].splitlines()]
        filtered = {"status_code": 400, "body": {"error": {"message": "filtered"}}}
        empty = {"status_code": 200, "body": {"choices": []}}
        lines += [lines[0], lines[1] | {"response": filtered}]
        lines[2]["response"] = empty
        data = "".join(json.dumps(line) + "\n" for line in lines)
        server.files[names["output_file_id"]] = data.encode()
        return names

    server.finish = doubled
    result = ask(folder, server, "--batch", code=1)
    replies = read_jsonl(folder / "summarize/replies/train.jsonl")
    assert (
        len(replies) == len({r["id"] for r in replies}) == 29 and "1 still to ask" in result.stdout
    )
    assert not read_jsonl(folder / "summarize/replies/train.refused.jsonl")
    spent = float((folder / "summarize/replies/.spent_usd").read_text())
    assert spent > sum(r["cost_usd"] for r in replies) + 4096 * 0.6e-6


@pytest.mark.slow
def test_a_batch_in_a_state_that_is_not_its_end_is_waited_for(folder):
    server = BatchServer(status="FINALIZING")
    process = start_stage(
        *(STAGE, "--data", folder, "--splits", "train", "--poll-seconds", 0.05, "--batch"),
        **{"TOGETHER_BASE_URL": server.url, "TOGETHER_API_KEY": KEY, "BUDGET_USD": "1000"},
    )
    while server.steps["poll"] < 6:
        assert process.poll() is None
    server.batches["batch-0"]["status"] = "COMPLETED"
    assert process.wait(60) == 0
    assert len(read_jsonl(folder / "summarize/replies/train.jsonl")) == 30


def test_a_batch_complete_without_a_file_yet_is_not_given_up(folder):
    server = BatchServer()
    finish, server.finish = server.finish, lambda job: {}
    result = ask(folder, server, "--batch", code=1)
    assert "names no file of replies yet" in result.stderr
    server.batches["batch-0"] |= finish(server.batches["batch-0"])
    ask(folder, server, "--batch")
    assert len(server.batches) == 1
