import asyncio
import gzip
import itertools
import sys
import time
import zlib
from io import BytesIO
from ipaddress import ip_address

import brotli
import pytest
from page_server import PageServer
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from common.cli import UserError
from data_prep import fetch_page
from data_prep import read_document as module
from data_prep.fetch_page import Page, is_private
from data_prep.parse_document import join_words
from data_prep.read_document import read_document

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


@pytest.mark.slow
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


@pytest.mark.slow
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


GERMAN = "Flüsse fließen ins Meer, „überall“ auf der Welt. Über Brücken führen Straßen. "
POLISH = "Zażółć gęślą jaźń. Wszystkie rzeki płyną do morza, a jeziora zamarzają od góry. "
RUSSIAN = "Реки текут к морю и по пути проходят города, поля и леса. "
JAPANESE = "川は海に流れ、その途中で町や野原、森を通り過ぎます。誰も長くは止められません。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((GERMAN, encoding) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        *((GERMAN, encoding) for encoding in ("utf-32-le", "utf-32-be", "cp1252", "utf-8-sig")),
        *((POLISH, encoding) for encoding in ("utf-16-le", "cp1250")),
        *((RUSSIAN, encoding) for encoding in ("utf-16", "cp1251", "koi8-r")),
        *((JAPANESE, encoding) for encoding in ("utf-16", "shift_jis", "iso2022_jp")),
    ],
)
def test_text_is_decoded_as_its_bytes_say(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes((text * 9).encode(encoding))
    assert read_document(str(tmp_path / "a.txt")) == text * 9


def test_a_guess_is_told_and_a_short_text_is_read(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("Café “quoted”, naïve".encode("cp1252"))
    assert read_document(str(tmp_path / "a.txt")) == "Café “quoted”, naïve"
    assert "nothing says its encoding; it is read as cp1252" in capsys.readouterr().err
    (tmp_path / "a.txt").write_bytes((RUSSIAN * 9).encode("cp1251"))
    read_document(str(tmp_path / "a.txt"))
    assert "nothing says its encoding; it is read as cp1251" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("漢字".encode()[:-1], "漢"),  # cut within a letter
        (b"\xed\xa0\xbd alone", " alone"),
        (b"\xed\xa0\xbd\xed\xb8\x80 whole", "\U0001f600 whole"),  # as Java writes it
        ("naïve café, déjà vu, \xff".encode() + b"\xff", "naïve café, déjà vu, ÿ"),
        (b"a\x1b[2Jb\x1b]0;title\x07c\x07d x\x08y", "abcd y"),
        ("\u202ea\u2066b\ufeffc\rd\r\ne\x0c".encode(), "abc\nd\r\ne\n"),
    ],
)
def test_what_a_terminal_would_obey_is_left_out(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_document(str(tmp_path / "a.txt")) == text


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\x03\x04\x14\0\0\0word/document.xml", "a Word document"),
        (b"PK\x03\x04\x14\0\0\0mimetypeapplication/epub+zip", "an EPUB book"),
        (b"PK\x03\x04\x14\0\0\0a.txt", "a zip archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document"),
        (b"{\\rtf1 Text.}", "an RTF document"),
        (b"\x89PNG\r\n\x1a\n\0\0", "an image"),
        (gzip.compress(b"text", mtime=0), "a gzip archive"),
        (b"\0\x05\x16\x07\0", "a side file of macOS"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path, data, kind):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"it is {kind}.*; save it as PDF or text$"):
        read_document(str(tmp_path / "a.txt"))


PARAGRAPHS = "".join(f"<p>{line}</p>\n" for line in PROSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("a.txt", f"<!-- saved from url=(0014)about:internet -->\n{ARTICLE}"),
        ("a.txt", f"<?xml version='1.0' encoding='utf-8'?>\n<!-- a -->\n{ARTICLE}"),
        ("a", ARTICLE.upper()),
        ("a.txt", f"<body>{PARAGRAPHS}</body>\n"),
        ("a.HTM", f"On rivers<br>{PARAGRAPHS}The end"),
        ("a.html", f"<div class='x'>{PARAGRAPHS}</div>"),
        ("a.html", ARTICLE.encode("utf-16")),
        ("a.html", ARTICLE.encode("utf-16-le")),
        (
            "a.html",
            ARTICLE.replace("<head>", "<head><meta charset=koi8-r>").encode(
                "koi8-r", "xmlcharrefreplace"
            ),
        ),
        ("a.html", ARTICLE.encode().replace(b"Rivers", b"Ri\0vers")),
    ],
)
def test_a_page_is_known_whatever_stands_before_it(tmp_path, name, page):
    (tmp_path / name).write_bytes(page if isinstance(page, bytes) else page.encode())
    text = read_document(str(tmp_path / name))
    assert all(line.lower() in text.lower() for line in PROSE) and "<" not in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "<p align=center>A readme</p>\n\n# Title\n<br>"),
        ("a.txt", "<div>is a tag, and this is a text on tags"),
        ("a.html", "no tag at all in it, 1 < 2"),
        ("a.txt", "A PDF begins with %PDF-1.4, which makes this none"),
    ],
)
def test_a_text_that_names_tags_is_no_page(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_document(str(tmp_path / name)) == text


def test_the_headers_of_a_server_are_heeded(serve, monkeypatch):
    body, deflated = GERMAN.encode(), zlib.compress(GERMAN.encode())
    bare = zlib.compressobj(wbits=-15)

    def page(body: bytes, media_type="text/plain", **headers) -> tuple:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return 200, {"Content-Type": media_type} | named, body

    server = serve(
        koi=page(RUSSIAN[:9].encode("koi8-r"), "text/plain; charset=KOI8-R"),
        lies=page(body, "text/plain; charset=ISO-8859-1"),
        latin=page("Café “à”".encode("cp1252"), "text/plain; charset=iso-8859-1"),
        unknown=page(body, "text/plain; charset=hex"),
        fragment=page(f"Rivers<br>{PARAGRAPHS}".encode(), "text/html; charset=utf-8"),
        markdown=page(b"<p>A</p>", "text/markdown"),
        gzip=page(gzip.compress(body, mtime=0), Content_Encoding="gzip"),
        deflate=page(deflated, Content_Encoding="deflate"),
        bare=page(bare.compress(body) + bare.flush(), Content_Encoding="deflate"),
        twice=page(gzip.compress(gzip.compress(body, mtime=0)), Content_Encoding="gzip, gzip"),
        bomb=page(gzip.compress(b"a" * 2_000_000, mtime=0), Content_Encoding="gzip"),
        part=page(gzip.compress(body, mtime=0)[:60], Content_Encoding="gzip"),
        br=page(brotli.compress(body), Content_Encoding="br"),
        other=page(body, Content_Encoding="aes128gcm"),
        wrong=page(b"\xff\xff" + body, Content_Encoding="gzip"),
    )

    def read(path: str) -> str:
        return read_document(f"{server.url}/{path}", private=True)

    assert (read("koi"), read("latin")) == (RUSSIAN[:9], "Café “à”")
    assert read("markdown") == "<p>A</p>" and "<p>" not in read("fragment")
    for path in ("lies", "unknown", "gzip", "deflate", "bare", "twice", "br"):
        assert read(path) == GERMAN, path
    monkeypatch.setattr(fetch_page, "MOST_BYTES", 1_000_000)
    assert refusal(f"{server.url}/bomb", private=True) == "it is over 1 MB"
    assert "packs its answer as aes128gcm" in refusal(f"{server.url}/other", private=True)
    for path in ("wrong", "part"):
        assert "is cut, or is not the gzip it says" in refusal(f"{server.url}/{path}", private=True)


def test_of_a_pdf_the_letters_are_those_one_reads():
    joined = join_words(
        "The \ufb01rst \ufb02ow is e\ufb00-\nicient, of C-\n3PO and T-\nshirt. é-\nté"
    )
    assert joined == "The first flow is efficient, of C-\n3PO and T-\nshirt. été"


def test_an_odd_pdf_is_read_as_far_as_it_can_be(tmp_path, capsys):
    path, whole = tmp_path / "a.pdf", make_pdf("Page one", "Page two")
    path.write_bytes(b"HTTP/1.1 200 OK\n\n" + whole)
    assert read_document(str(path)).split() == ["Page", "one", "Page", "two"]
    path.write_bytes(whole[: whole.index(b"xref")])
    assert read_document(str(path)).split() == ["Page", "one", "Page", "two"]
    assert "its end is missing" in capsys.readouterr().err
    path.write_bytes(make_pdf("Page one", "[" * 5000, "Page three"))
    path.write_bytes(path.read_bytes().replace(b"(" + b"[" * 5000 + b")", b"[" * 5002))
    assert read_document(str(path)).split() == ["Page", "one", "Page", "three"]
    assert "1 of 3 pages cannot be read and are left out" in capsys.readouterr().err
    path.write_bytes(make_pdf("Page one", "", ""))
    assert read_document(str(path)).split() == ["Page", "one"]
    assert "2 of 3 pages hold no text" in capsys.readouterr().err


def repeat_a_page(times: int) -> bytes:
    """A PDF of which one page stands as often as told."""
    data = make_pdf("word word" + "\n" * 3000)  # slow to read, and little text
    start = data.index(b"/Kids [") + 7
    end = data.index(b"]", start)
    return data[:start] + data[start:end] * times + data[end:]


@pytest.mark.slow
def test_what_takes_too_long_is_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MOST_SECONDS", 6)
    (tmp_path / "a.pdf").write_bytes(repeat_a_page(10_000))
    assert read_document(str(tmp_path / "a.pdf")).startswith("word word")
    assert "reading it took over 6 s; pages 1 to " in capsys.readouterr().err
    monkeypatch.setattr(module, "MOST_SECONDS", 1)
    deep = "<!doctype html><html><body><table>" + "<tr><td>" * 100_000
    (tmp_path / "a.html").write_text(deep)
    assert refusal(tmp_path / "a.html") == "reading it took over 1 s"


@pytest.mark.slow
def test_what_takes_too_much_memory_is_ended(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text(ARTICLE)
    child = "import sys; from data_prep import parse_document as p; p.MOST_MEMORY = 90 << 20; "
    child += "sys.argv = ['', 'html', '20']; p.main()"
    monkeypatch.setattr(module, "PARSER", (sys.executable, "-c", child))
    (tmp_path / "a.html").write_text("<html><p>" + "<b>a</b> " * 300_000)
    assert "reading it took over" in refusal(tmp_path / "a.html")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "100.64.0.1", "169.254.169.254", "192.168.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fec0::1", "fd00::1"),
        *("::127.0.0.1", "::10.0.0.1", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "ff02::1"),
        *("2002:7f00:1::", "2002:a00:1::1", "64:ff9b::127.0.0.1", "64:ff9b::a00:1"),
        *("64:ff9b:1::808:808", "2001:0:7f00:1::", "2001:0:808:808:0:0:f5ff:fffe"),
        *("2a00:1450::5efe:10.0.0.1", "2a00:1450::200:5efe:127.0.0.1"),
    ],
)
def test_every_form_of_an_own_address_is_known(address):
    assert is_private(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_public_addresses_are_public(address):
    assert not is_private(address)


def test_a_host_that_goes_past_the_proxy_is_checked_when_connected(serve, monkeypatch):
    server, look_up = serve(page=(200, {}, b"inside")), asyncio.BaseEventLoop.getaddrinfo
    answers = ["8.8.8.8", "127.0.0.1"]

    async def rebind(loop, host, port, **options):
        named = host in ("name.example", b"name.example")
        return await look_up(loop, answers.pop(0) if named else host, port, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rebind)
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "name.example")
    assert "it leads to 127.0.0.1" in refusal(f"http://name.example:{server.port}/page")
    assert server.seen == [] and answers == []
