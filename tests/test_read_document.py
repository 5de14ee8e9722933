import asyncio
import itertools
import time
from io import BytesIO
from ipaddress import ip_address

import pytest
from page_server import PageServer
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from common.cli import UserError
from eval import fetch_page
from eval import read_document as module
from eval.fetch_page import Page
from eval.read_document import read_document

PROSE = (
    "Rivers flow down to the sea, and on their way they pass towns, fields and woods.",
    "Nobody can stop them for long: a dam holds the water for a while, and then it goes on.",
    "In the café by the bridge they say that the river was there before the town was.",
)
NAVIGATION = "".join(f"<li><a href='/{i}'>Menu item {i}</a></li>" for i in range(20))
MENU = f"<html><body><nav><ul>{NAVIGATION}</ul></nav></body></html>"
ARTICLE = (
    f"<!DOCTYPE html><html><head><title>t</title><script>alert('script')</script></head><body>"
    f"<nav><ul>{NAVIGATION}</ul></nav><article><h1>On rivers</h1>"
    f"{''.join(f'<p>{line}</p>' for line in PROSE)}<img src='http://127.0.0.1:1/x.png'></article>"
    "<footer>Imprint and privacy</footer></body></html>"
)


def name(**names: object) -> DictionaryObject:
    return DictionaryObject({NameObject(f"/{key}"): value for key, value in names.items()})


def make_pdf(*pages: str, password: str | None = None) -> bytes:
    """A page for each text, of a line for each of its lines; an empty text leaves a page blank."""
    writer = PdfWriter()
    font = name(
        Type=NameObject("/Font"), Subtype=NameObject("/Type1"), BaseFont=NameObject("/Helvetica")
    )
    for text in pages:
        page = writer.add_blank_page(600, 800)
        page[NameObject("/Resources")] = name(Font=name(F1=font))
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in text.splitlines())
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 700 Td {lines} ET".encode())
        page[NameObject("/Contents")] = content
    if password is not None:
        writer.encrypt(password, "owner", algorithm="AES-256")
    writer.write(file := BytesIO())
    return file.getvalue()


def refusal(source: object, **options) -> str:
    """The one line that says why a document cannot be read, less its usual beginning and end."""
    with pytest.raises(UserError) as caught:
        read_document(str(source), **options)
    line = str(caught.value)
    begin, end = f"cannot read {source}: ", "; check it, or save it as text"
    assert "\n" not in line and line.startswith(begin) and line.endswith(end)
    return line.removeprefix(begin).removesuffix(end)


@pytest.fixture
def serve(monkeypatch):
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    started = []

    def start(**pages) -> PageServer:
        started.append(PageServer({f"/{path}": page for path, page in pages.items()}))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.pdf"])
def test_a_text_is_read_as_it_is(tmp_path, name):
    text = "# Ice\n\nIce floats: it is 9 % lighter — naïve <html> here.\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_document(str(tmp_path / name)) == text


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("name", ["a.html", "a.txt"])
def test_of_a_page_the_article_is_read(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(ARTICLE.encode(encoding))
    text = read_document(str(tmp_path / name))
    assert all(line in text for line in PROSE)
    assert not any(word in text for word in ("Menu", "Imprint", "<p>", "script"))


def test_a_pdf_is_read_whatever_its_name_and_words_are_joined(tmp_path, capsys):
    path = tmp_path / "paper.txt"
    path.write_bytes(make_pdf("The ice cap is melt-\ning away.", "A second page, of C-\n3PO."))
    assert read_document(str(path)).split() == [
        *("The", "ice", "cap", "is", "melting", "away."),
        *("A", "second", "page,", "of", "C-", "3PO."),
    ]
    assert capsys.readouterr().err == ""


def test_two_hundred_pages_and_an_empty_password_are_no_trouble(tmp_path):
    path = tmp_path / "long.pdf"
    path.write_bytes(make_pdf(*(f"This is page {i}" for i in range(200)), password=""))
    text = read_document(str(path))
    assert text.split("\n\n") == [*(f"This is page {i}" for i in range(199)), "This is page 199\n"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no text in it"),
        (b" \n", "no text in it"),
        (b"\x93PNG\r\n\x1a\n\0\0", "neither text nor HTML nor PDF"),
        (b"all\0but text", "neither text nor HTML nor PDF"),
        (bytes(range(256)) * 9, "neither text nor HTML nor PDF"),
        (make_pdf("", ""), "no text in it; its pages, 2, are pictures (a scan without OCR?)"),
        (make_pdf("secret", password="x"), "it is locked with a password; save it without one"),
        (make_pdf("whole")[:100], "it is cut: the end of the PDF is missing"),
        (b"%PDF-1.7 and then nothing", "it is cut: the end of the PDF is missing"),
        (MENU.encode(), "a page that wants a login?"),
        (b"<html><body><p>Please log in to go on.</p></body></html>", "that wants a login?"),
        (b"a" * 2001, "it is over 0 MB"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_a_line(tmp_path, monkeypatch, content, why):
    monkeypatch.setattr(fetch_page, "MOST_BYTES", 2000 if content[:2] == b"aa" else 20_000_000)
    (tmp_path / "a.txt").write_bytes(content)
    assert why in refusal(tmp_path / "a.txt")


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    assert refusal(tmp_path / "none.txt") == "No such file or directory"
    assert refusal(tmp_path) == "Is a directory"
    assert "protocol 'ftp://'" in refusal("ftp://example.com/a.txt", private=True)
    assert "protocol" in refusal("file:///etc/passwd", private=True)


@pytest.mark.parametrize(
    ("source", "paper"),
    [
        ("arXiv:2404.14219", "2404.14219"),
        ("arxiv:hep-th/9901001v2", "hep-th/9901001v2"),
        ("https://arxiv.org/abs/2404.14219v1", "2404.14219v1"),
        ("http://www.arxiv.org/pdf/2404.14219.pdf", "2404.14219"),
        ("arxiv.org/abs/2404.14219", "2404.14219"),
    ],
)
def test_of_a_paper_on_arxiv_the_pdf_is_read(monkeypatch, source, paper):
    async def fetch(url: str, private: bool) -> Page:
        assert (url, private) == (f"https://arxiv.org/pdf/{paper}", False)
        return Page(b"Attention")

    monkeypatch.setattr(fetch_page, "fetch", fetch)
    assert read_document(source).strip() == "Attention"


def test_pages_are_fetched_and_redirects_followed(serve):
    server = serve(
        page=(200, {"Content-Type": "text/html"}, ARTICLE.encode()),
        paper=(200, {"Content-Type": "text/html"}, make_pdf("Attention")),
        r5=(301, {"Location": "r4"}, b""),
        **{f"r{i}": (302, {"Location": f"/r{i - 1}"}, b"") for i in range(1, 5)},
        r0=(200, {}, b"the end"),
        r6=(302, {"Location": "/r5"}, b""),
        ftp=(302, {"Location": "ftp://127.0.0.1/x"}, b""),
    )
    assert PROSE[0] in read_document(f"{server.url}/page", private=True)
    assert server.seen == ["/page"]  # and nothing that the page names
    assert "task-lora" in server.headers[0]["User-Agent"]
    assert read_document(f"{server.url}/paper", private=True).strip() == "Attention"
    assert read_document(f"{server.url}/r5", private=True) == "the end"
    assert "maximum allowed redirects" in refusal(f"{server.url}/r6", private=True)
    assert "protocol 'ftp://'" in refusal(f"{server.url}/ftp", private=True)


def hang_up(request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of")


def drip(request) -> None:
    """Headers without end."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(30):
        request.wfile.write(b"X-%d: 1\r\n" % i)
        time.sleep(0.05)


def test_what_a_server_answers_is_told_in_a_line(serve, monkeypatch):
    endless = itertools.repeat(b"a" * 100_000)
    statuses = {f"s{status}": (status, {}, b"no") for status in (401, 403, 404, 503)}
    server = serve(**statuses, big=(200, {}, endless), cut=hang_up, drip=drip)
    why = {path: refusal(f"{server.url}/{path}", private=True) for path in statuses}
    assert why == {
        "s401": "the server answers 401 (it wants a login)",
        "s403": "the server answers 403 (it wants a login)",
        "s404": "the server answers 404 (Not Found)",
        "s503": "the server answers 503 (Service Unavailable)",
    }
    assert "closed connection" in refusal(f"{server.url}/cut", private=True)
    monkeypatch.setattr(fetch_page, "MOST_BYTES", 1_000_000)
    assert refusal(f"{server.url}/big", private=True) == "it is over 1 MB"
    monkeypatch.setattr(fetch_page, "MOST_SECONDS", 0.2)
    assert refusal(f"{server.url}/drip", private=True) == "no end in 0.2 s"
    server.close()
    assert refusal(f"{server.url}/s404", private=True) == "All connection attempts failed"


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "localhost", "0.0.0.0", "10.0.0.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:100.64.0.1]"),
        *("[fe80::1]", "[fd00::1]", "2130706433"),
    ],
)
def test_the_own_network_is_left_alone(serve, host):
    server = serve(page=(200, {}, b"inside"))
    assert "in your own network; --private allows that" in refusal(
        f"http://{host}:{server.port}/page"
    )
    assert server.seen == []


def test_a_redirect_into_the_own_network_is_not_followed(serve, monkeypatch):
    as_public = {"127.0.0.1": "8.8.8.8"}
    monkeypatch.setattr(fetch_page, "ip_address", lambda ip: ip_address(as_public.get(ip, ip)))
    server = serve(page=(200, {}, b"outside"))
    server.pages["/in"] = (302, {"Location": f"http://127.0.0.2:{server.port}/page"}, b"")
    assert read_document(f"{server.url}/page") == "outside"
    assert "it leads to 127.0.0.2" in refusal(f"{server.url}/in")
    assert server.seen == ["/page", "/in"]


@pytest.mark.parametrize(
    "answers", [[["8.8.8.8", "127.0.0.1"]], [["8.8.8.8"], ["127.0.0.1"]]], ids=["two", "rebound"]
)
def test_a_name_with_an_address_in_the_own_network_is_refused(serve, monkeypatch, answers):
    server, look_up = serve(page=(200, {}, b"inside")), asyncio.BaseEventLoop.getaddrinfo

    async def lie(loop, host, port, **options):
        named = host in ("name.example", b"name.example")
        found = [look_up(loop, ip, port, **options) for ip in (answers.pop(0) if named else [host])]
        return [entry for entries in await asyncio.gather(*found) for entry in entries]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lie)
    monkeypatch.setenv("no_proxy", "localhost")  # which is no proxy
    assert "it leads to 127.0.0.1" in refusal(f"http://name.example:{server.port}/page")
    assert server.seen == []


def test_a_proxy_may_be_in_the_own_network_but_not_what_it_is_asked_for(serve, monkeypatch):
    server = serve()
    server.pages["http://8.8.8.8/page"] = (200, {}, b"through the proxy")
    monkeypatch.setenv("http_proxy", server.url)
    assert read_document("http://8.8.8.8/page") == "through the proxy"
    assert "it leads to 10.0.0.1" in refusal("http://10.0.0.1/page")
    assert server.seen == ["http://8.8.8.8/page"]
