"""A file server on loopback that answers byte ranges, and misbehaves as asked."""

import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from quiet_server import QuietHandler, Stub


class RangeServer(Stub):
    """`files`: path -> (size, read(start, end)). `sent`: bytes of bodies, `ranges`: those asked.

    `faults`: what goes wrong with the next requests, one word each: a status such as "503",
    "ignore" (status 200 and all of it), "cut" (half of the body, then the line drops). The word
    "always" at the end repeats the one before.
    """

    def __init__(self, files: dict[str, bytes | tuple[int, Callable]], delay: float = 0):
        self.files = {
            path: (len(file), lambda a, b, file=file: file[a:b])
            if isinstance(file, bytes)
            else file
            for path, file in files.items()
        }
        self.sent, self.ranges, self.faults, self.delay = 0, [], [], delay
        server = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_HEAD(self) -> None:
                size = server.files.get(self.path, (None, None))[0]
                self.send_response(404 if size is None else 200)
                self.send_header("Content-Length", str(size or 0))
                self.end_headers()

            def do_GET(self) -> None:
                server.answer(self)

        self.serve(Handler)

    def next_fault(self) -> str:
        if self.faults[1:] == ["always"]:
            return self.faults[0]
        return self.faults.pop(0) if self.faults else ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        time.sleep(self.delay)
        fault = self.next_fault()
        size, read = self.files.get(request.path, (0, None))
        if fault.isdigit() or read is None:
            return self.send(request, int(fault or 404), b"no", {})
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if fault == "ignore" or not match:
            return self.send(request, 200, read(0, size), {})
        start, end = int(match[1]), min(size, int(match[2]) + 1)
        self.ranges.append((start, end))
        if start >= size:
            return self.send(request, 416, b"", {"Content-Range": f"bytes */{size}"})
        part = {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self.send(request, 206, read(start, end), part, cut=fault == "cut")

    def send(self, request, status: int, body: bytes, headers: dict, cut: bool = False) -> None:
        try:
            request.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                request.send_header(name, value)
            request.end_headers()
            body = body[: len(body) // 2] if cut else body
            self.sent += len(body)  # before the client can have all of it and look here
            request.wfile.write(body)
            request.close_connection = request.close_connection or cut
        except (BrokenPipeError, ConnectionResetError):
            request.close_connection = True
