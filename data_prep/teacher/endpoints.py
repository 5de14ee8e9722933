"""Where a teacher is asked: its address, and a client of it."""

import ipaddress
import os
from urllib.parse import urljoin, urlsplit

from common.cli import UserError
from data_prep.teacher.read_reply import clean

TOGETHER = "https://api.together.ai/v1"
NO_TEACHER = "no teacher to ask; set TOGETHER_API_KEY, or TOGETHER_BASE_URL to another"


def endpoint_url(base_url: str | None = None) -> str:
    """The address to which `/chat/completions` is added: `base_url` as it is, or
    TOGETHER_BASE_URL with /v1 where it lacks that, or Together's. Raises UserError."""
    set_there = os.environ.get("TOGETHER_BASE_URL")
    url, name = base_url, "--base-url"
    if not base_url and set_there:
        url, name = set_there.rstrip("/").removesuffix("/v1") + "/v1", "TOGETHER_BASE_URL"
    url = (url or TOGETHER).rstrip("/")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # UnicodeError, a ValueError: no name of a host
    except ValueError:
        is_address = False
    if not is_address or not url.isprintable() or " " in url:
        raise UserError(f"{name} {clean(url)!r} is no address such as http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        hint = "the key goes into TOGETHER_API_KEY, and no ? or # can stand in it"
        raise UserError(f"{name} is an address with more than host and path: {hint}")
    return url


def is_own(url: str) -> bool:
    """Whether an endpoint is on this machine or network, and so costs nothing that we know of."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local")) or "." not in host


def make_client(options, retries: int = 0):
    """A client of the endpoint. Raises UserError if there is none, or no key."""
    import httpx
    import together

    key, url = os.environ.get("TOGETHER_API_KEY"), endpoint_url(options.base_url)
    if not key and url == TOGETHER:
        raise UserError(NO_TEACHER)
    if key and not (key.isascii() and key.isprintable()):
        raise UserError("TOGETHER_API_KEY holds characters that no key has; set it again")
    if options.batch and not url.endswith("/v1"):
        raise UserError(f"--batch is for Together's API, which {url} is not")
    # aiohttp underneath: httpx's own pool looks at all its connections for each request, and stalls
    # for seconds with 128 of them on a busy machine (seen in `just bench replies`).
    limits = httpx.Limits(max_connections=options.concurrency)
    return together.AsyncTogether(
        api_key=key or "none",
        base_url=url.removesuffix("/v1"),  # the client adds it, for files and batches
        timeout=options.timeout,
        max_retries=retries,
        http_client=together.DefaultAioHttpClient(limits=limits),
    )


async def post(endpoint, url: str, body: dict) -> bytes:
    """The endpoint's answer to a request. Raises what the client raises."""
    import httpx
    import together

    for tries_left in (2, 1, 0):
        try:
            answer = await endpoint.post(
                url, cast_to=httpx.Response, body=body, options={"follow_redirects": False}
            )
            return answer.content
        except together.APIStatusError as error:
            # 307 and 308 say to send the same again. Any other redirect would turn the request
            # into a GET, and what answers that has never seen the prompt.
            there = urljoin(url, error.response.headers.get("location", ""))
            is_same_host = urlsplit(there).hostname == urlsplit(url).hostname
            if error.status_code not in (307, 308) or not is_same_host or not tries_left:
                raise
            url = there
