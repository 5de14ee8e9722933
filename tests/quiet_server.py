"""What the stubs of servers share: one on a free port of loopback, in a thread, until it is closed.

Written out rather than taken from pytest-httpserver: half of what these servers do is what a good
one does not, such as bodies cut off, endless ones, wrong lengths and headers. respx answers within
one process and httpx's own transport; stages run in others, and the teacher's client has aiohttp's.
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class QuietServer(ThreadingHTTPServer):
    """Says nothing when a client, killed or content, hangs up on it."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class QuietHandler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class Stub:
    """A server that answers by a handler's class from `serve` to `close`."""

    def serve(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = QuietServer(("127.0.0.1", 0), handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
