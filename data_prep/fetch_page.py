"""A page or file of the web, of bounded size and time, and of no host in one's own network."""

import asyncio
import zlib
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import httpx

from common.cli import UserError

MOST_BYTES, MOST_SECONDS, MOST_REDIRECTS = 20_000_000, 30, 5


@dataclass(frozen=True)
class Page:
    """A body, and what its headers say of it: a media type, such as text/html, and an encoding."""

    body: bytes
    media_type: str = ""
    charset: str | None = None


def within(address: IPv6Address) -> list[IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to through a translator or a tunnel."""
    number = int(address)
    last = IPv4Address(number & 0xFFFFFFFF)
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    # ::a.b.c.d, ::ffff:0:a.b.c.d (SIIT), 64:ff9b::a.b.c.d (NAT64, RFC 6052)
    if number >> 32 in (0, 0xFFFF0000, 0x64FF9B << 64):
        inner.append(last)
    if (number >> 32) & 0xFDFFFFFF == 0x5EFE:  # ISATAP, RFC 5214
        inner.append(last)
    return [one for one in inner if one]


def is_private(address: str) -> bool:
    """Whether an address is one's own machine's or network's, in whatever form it is written."""
    ip = ip_address(address)
    if ip.version == 6 and (ip.is_site_local or any(is_private(str(one)) for one in within(ip))):
        return True
    if ip.version == 6 and ip.ipv4_mapped:
        return False
    # The network of translators in one's own network (RFC 8215), which Python takes for global.
    local_translator = ip.version == 6 and int(ip) >> 80 == 0x64FF9B0001
    return ip.is_multicast or local_translator or not ip.is_global


def check_address(address: str) -> None:
    """Raise UserError for an address in the machine's own network."""
    if is_private(address):
        raise UserError(f"it leads to {address}, in your own network; --private allows that")


async def check_host(request: httpx.Request) -> None:
    """Raise UserError, before anything is sent, for a host in the machine's own network."""
    host = request.url.raw_host.decode()
    for *_, address in await asyncio.get_running_loop().getaddrinfo(host, None):
        check_address(address[0])
    connects_to = ""

    # The name may mean another address by now. What a proxy connects to, only the proxy knows;
    # where a request goes past the proxy (NO_PROXY), its own host is connected to, and checked.
    async def check_peer(event: str, info: dict) -> None:
        nonlocal connects_to
        if event.endswith("connect_tcp.started"):
            connects_to = info["host"]
        if event.endswith("connect_tcp.complete") and connects_to == host:
            check_address(info["return_value"].get_extra_info("server_addr")[0])

    request.extensions["trace"] = check_peer


def inflate(body: bytes, window: int) -> bytes:
    """At most a byte over MOST_BYTES of what zlib packed. Raises zlib.error, also for a part."""
    packed = zlib.decompressobj(window)
    data = packed.decompress(body, MOST_BYTES + 1)
    if not packed.eof and len(data) <= MOST_BYTES:
        raise zlib.error("its end is missing")
    return data


def unpack(body: bytes, coding: str) -> bytes:
    """A body as it was before its Content-Encoding, at most a byte over MOST_BYTES of it.

    Raises UserError for a coding that is not known and for a body that is not of it.
    """
    most = MOST_BYTES + 1
    try:
        if coding == "br":
            import brotli

            packed = brotli.Decompressor()
            data = packed.process(body, output_buffer_limit=most)
            if packed.is_finished() or len(data) >= most:
                return data[:most]
            raise ValueError
        if coding == "zstd":
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                return reader.read(most)
        if coding in ("gzip", "x-gzip"):
            return inflate(body, zlib.MAX_WBITS | 16)
        if coding == "deflate":  # with zlib's header, or as some servers have it without
            with suppress(zlib.error):
                return inflate(body, zlib.MAX_WBITS)
            return inflate(body, -zlib.MAX_WBITS)
    except ImportError:
        raise UserError(f"the server packs its answer as {coding}; save it as text") from None
    except Exception:  # the error of each package
        raise UserError(f"the server's answer is cut, or is not the {coding} it says") from None
    raise UserError(f"the server packs its answer as {coding[:20]}, though none was asked for")


async def fetch(url: str, private: bool) -> Page:
    """Raises UserError, and what httpx raises; `private` allows one's own network."""
    body = bytearray()
    hooks = {"request": [] if private else [check_host]}
    client = httpx.AsyncClient(event_hooks=hooks, max_redirects=MOST_REDIRECTS, timeout=None)
    headers = {"User-Agent": "task-lora", "Accept-Encoding": "identity"}
    get = client.stream("GET", url, headers=headers, follow_redirects=True)
    async with asyncio.timeout(MOST_SECONDS), client, get as response:
        status = response.status_code
        if status != 200:
            why = "it wants a login" if status in (401, 403) else response.reason_phrase
            raise UserError(f"the server answers {status} ({why})")
        async for part in response.aiter_raw():
            body += part
            if len(body) > MOST_BYTES:  # read_document refuses it
                break
    data = bytes(body)
    codings = response.headers.get("content-encoding", "").lower().replace(" ", "").split(",")
    for coding in reversed([one for one in codings if one not in ("", "identity")]):
        if len(data) <= MOST_BYTES:
            data = unpack(data, coding)
    media_type = response.headers.get("content-type", "").split(";")[0].strip().lower()
    return Page(data, media_type, response.charset_encoding)
