"""Where a teacher is asked: its address, and a client of it."""

import ipaddress
import os
from urllib.parse import urljoin, urlsplit

from common.cli import UserError
from data_prep.teacher.read_reply import without_surrogates

TOGETHER = "https://api.together.ai/v1"
USUAL_PORTS = {"http": 80, "https": 443}
NO_TEACHER = "no teacher to ask; set TOGETHER_API_KEY, or TOGETHER_BASE_URL to another"


def endpoint_urls(base_url: str | None = None) -> list[str]:
    """The addresses to which `/chat/completions` is added, each once: those of `base_url` as they
    are, or of TOGETHER_BASE_URL with /v1 where it lacks that, or Together's. Several are parted by
    commas. Raises UserError.
    """
    from_environment = os.environ.get("TOGETHER_BASE_URL")
    if base_url:
        name, urls = "--base-url", [url.strip().rstrip("/") for url in base_url.split(",")]
    elif from_environment:
        name, urls = "TOGETHER_BASE_URL", []
        for url in from_environment.split(","):
            urls.append(url.strip().rstrip("/").removesuffix("/v1") + "/v1")
    else:
        name, urls = "", [TOGETHER]
    for url in urls:
        check_url(url, name)
    return list(dict.fromkeys(urls))


def endpoint_url(base_url: str | None = None) -> str:
    """The address of the only endpoint. Raises UserError if several are named."""
    url, *others = endpoint_urls(base_url)
    if others:
        raise UserError(f"{1 + len(others)} endpoints are named where one is wanted: {url}, ...")
    return url


def check_url(url: str, name: str) -> None:
    """Raise UserError if what the option or variable `name` holds is no address."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # UnicodeError, a ValueError: no name of a host
    except ValueError:
        is_address = False
    if not is_address or not url.isprintable() or " " in url:
        hint = "is no address such as http://localhost:8000/v1"
        raise UserError(f"{name} {without_surrogates(url)!r} {hint}")
    if parts.username is not None or parts.query or parts.fragment:
        hint = "the key goes into TOGETHER_API_KEY, and no ? or # can stand in it"
        raise UserError(f"{name} is an address with more than host and path: {hint}")


def name_of(url: str) -> str:
    """An endpoint as records and messages name it: host, port and path."""
    parts = urlsplit(url)
    return f"{parts.netloc}{parts.path}"


def is_own(url: str) -> bool:
    """Whether an endpoint is on this machine or network, and so costs nothing that we know of."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local")) or "." not in host


def check_endpoints(base_url: str | None, batch: bool) -> list[str]:
    """The addresses to ask. Raises UserError if there is none, or no key, or none for a batch."""
    urls, key = endpoint_urls(base_url), os.environ.get("TOGETHER_API_KEY")
    if not key and TOGETHER in urls:
        raise UserError(NO_TEACHER)
    if key and not (key.isascii() and key.isprintable()):
        raise UserError("TOGETHER_API_KEY holds characters that no key has; set it again")
    if batch:
        url = endpoint_url(base_url)
        if not url.endswith("/v1"):
            raise UserError(f"--batch is for Together's API, which {url} is not")
    return urls


def make_client(url: str, concurrency: int, timeout: float, retries: int = 0):
    """A together.AsyncTogether of an endpoint, which `check_endpoints` has seen."""
    import httpx
    import together

    # aiohttp underneath: httpx's own pool looks at all its connections for each request, and stalls
    # for seconds with 128 of them on a busy machine (seen in `just bench replies`).
    limits = httpx.Limits(max_connections=concurrency)
    return together.AsyncTogether(
        api_key=os.environ.get("TOGETHER_API_KEY") or "none",
        base_url=url.removesuffix("/v1"),  # the client adds it, for files and batches
        timeout=timeout,
        max_retries=retries,
        http_client=together.DefaultAioHttpClient(limits=limits),
    )


def place_of(url: str) -> tuple[str, str | None, int | None]:
    """(scheme, host, port) of an address. Raises ValueError where it is none."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or USUAL_PORTS.get(parts.scheme)


def redirected(url: str, location: str) -> str | None:
    """Where a redirect sends a request, with its key and prompt; None where these may not go: to
    another host or port, or from https to http."""
    try:
        there = urljoin(url, location)
        scheme, host, port = place_of(url)
        new_scheme, new_host, new_port = place_of(there)
    except ValueError:
        return None
    becomes_safe = (scheme, new_scheme) == ("http", "https")
    if new_host != host or (new_scheme != scheme and not becomes_safe):
        return None
    usual = becomes_safe and (port, new_port) == (80, 443)
    return there if new_port == port or usual else None


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
            there = redirected(url, error.response.headers.get("location", ""))
            if error.status_code not in (307, 308) or not there or not tries_left:
                raise
            url = there
