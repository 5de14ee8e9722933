"""The text of a file, a web page or a paper on arXiv; nothing in it is executed or fetched."""

import asyncio
import re
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from urllib.request import getproxies

import httpx
from pypdf import PdfReader
from tqdm import tqdm
from trafilatura import extract

from common.cli import UserError, one_line

MOST_BYTES, MOST_SECONDS, MOST_REDIRECTS, FEWEST_CHARS = 20_000_000, 30, 5, 60
ARXIV = r"(?i)^(?:arxiv:|(?:https?://)?(?:\w+\.)?arxiv\.org/(?:abs|pdf)/)([\w./-]+?)(?:\.pdf)?$"
HTML = rb"(?i)[^a-z]*(<\?xml[^>]*>\s*)?<(!doctype html|html)\b"


async def check_host(request: httpx.Request, host: str = "") -> None:
    """Raise UserError, before anything is sent, for a host in the machine's own network."""
    for *_, address in await asyncio.get_running_loop().getaddrinfo(host or request.url.host, None):
        ip = ip_address(address[0].removeprefix("::ffff:"))
        if ip.is_multicast or not ip.is_global:
            raise UserError(f"it leads to {ip}, in your own network; --private allows that")

    async def check_peer(event: str, info: dict) -> None:  # the name may mean another by now
        if event.endswith("connect_tcp.complete") and getproxies().keys() <= {"no"}:
            await check_host(request, info["return_value"].get_extra_info("server_addr")[0])

    request.extensions["trace"] = check_peer


async def fetch(url: str, private: bool) -> bytes:
    body, hooks = bytearray(), {"request": [] if private else [check_host]}
    client = httpx.AsyncClient(event_hooks=hooks, max_redirects=MOST_REDIRECTS, timeout=None)
    headers = {"User-Agent": "task-lora", "Accept-Encoding": "identity"}
    get = client.stream("GET", url, headers=headers, follow_redirects=True)
    async with asyncio.timeout(MOST_SECONDS), client, get as response:
        if (status := response.status_code) != 200:
            why = "it wants a login" if status in (401, 403) else response.reason_phrase
            raise UserError(f"the server answers {status} ({why})")
        async for part in response.aiter_raw():
            body += part
            if len(body) > MOST_BYTES:  # to_text refuses it
                break
    return bytes(body)


def to_text(data: bytes) -> str:
    if len(data) > MOST_BYTES:
        raise UserError(f"it is over {MOST_BYTES // 10**6} MB")
    if data.startswith(b"%PDF-"):
        pages = tqdm(PdfReader(BytesIO(data)).pages, "reading", unit="page", delay=2, leave=False)
        text = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", "\n".join(p.extract_text() for p in pages))
    elif re.match(HTML, data):
        text = extract(data, include_comments=False, favor_precision=True) or ""
        text = text if len(text) >= FEWEST_CHARS else ""
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
        if re.search("[\0\udc80-\udcff]", text):
            raise UserError("it is neither text in UTF-8 nor HTML nor PDF")
    if not text.strip():
        raise UserError("no text in it (a scan without OCR? a page that wants a login?)")
    return text.replace("\0", "").encode(errors="ignore").decode()


def is_address(source: str) -> bool:
    return "://" in source or bool(re.match(ARXIV, source))


def read_document(source: str, private: bool = False) -> str:
    """Raises UserError; `private` allows addresses of the machine's own network."""
    url = re.sub(ARXIV, r"https://arxiv.org/pdf/\1", source)
    try:
        if "://" in url:
            return to_text(asyncio.run(fetch(url, private)))
        with Path(url).open("rb") as file:
            return to_text(file.read(MOST_BYTES + 1))
    except Exception as error:  # what network, disk and parsers raise is of many kinds
        reason = getattr(error, "strerror", "") or one_line(error) or f"no end in {MOST_SECONDS} s"
        raise UserError(f"cannot read {source}: {reason}; check it, or save it as text") from None
