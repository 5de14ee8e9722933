"""A web server on loopback that answers each path as told, and knows what it was asked."""

from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler

from quiet_server import QuietHandler, Stub


class PageServer(Stub):
    """`pages`: path -> (status, headers, body); a body made of parts may be endless.

    In the place of all that a function may stand, which is given the handler.
    """

    def __init__(self, pages: dict[str, tuple[int, dict, bytes | Iterable[bytes]] | Callable]):
        self.pages, self.seen, self.headers = pages, [], []
        server = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                server.seen.append(self.path)
                server.headers.append(dict(self.headers))
                server.answer(self)

        self.serve(Handler)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        page = self.pages.get(request.path, (404, {}, b""))
        if callable(page):
            return page(request)
        status, headers, body = page
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        for part in [body] if isinstance(body, bytes) else body:
            request.wfile.write(part)
