"""A teacher on loopback that answers each request with whatever bytes a test wants."""

import json
from collections import Counter
from collections.abc import Callable

from quiet_server import QuietHandler, Stub

TEXT = "Lakes freeze from the top because ice floats on the water below it."


def body(message: dict | None = None, choice: dict | None = None, **more: object) -> dict:
    """A whole reply in the OpenAI dialect, with what a test changes in it."""
    message = {"role": "assistant", "content": TEXT} | (message or {})
    choice = {"index": 0, "finish_reason": "stop", "message": message} | (choice or {})
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    return {"id": "x", "choices": [choice], "usage": usage} | more


class OddTeacher(Stub):
    """`answer(prompt, n)` gives the n-th answer to a prompt: JSON, bytes, or (status, either)."""

    def __init__(self, answer: Callable[[str, int], object]) -> None:
        self.answer, self.asked, self.requests, self.paths = answer, Counter(), [], []
        teacher = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = request["messages"][-1]["content"]
                teacher.requests.append(request)
                teacher.paths.append(self.path)
                teacher.asked[prompt] += 1
                found = teacher.answer(prompt, teacher.asked[prompt])
                status, found = found if isinstance(found, tuple) else (200, found)
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.serve(Handler)
