"""Take a picture of the page of `just play`, answers and all, or of a report, by chromium.

python -m demo.take_screenshots http://127.0.0.1:7860 play.png --width 390 --dark
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, sync_playwright

from common.cli import UserError, one_line, positive, run, script_parser

QUIET = ("--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
MOST_SECONDS = 300


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's chromium, never a downloaded one. Raises UserError if there is none."""
    if not (chromium := shutil.which("chromium")):
        raise UserError("there is no chromium; install it, e.g. apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        try:
            yield started
        finally:
            started.close()


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("page", help="an address, or an HTML file")
    option("output", type=Path, help="the PNG")
    option("--width", type=positive, default=1200, help="of the window, in pixels")
    option("--height", type=positive, help="only so much of the page, in pixels (default: all)")
    option("--dark", action="store_true", help="as in a dark colour scheme")
    option("--text", help="for the page of `just play` (default: its first example)")
    args = parser.parse_args()
    address = args.page if "://" in args.page else Path(args.page).resolve().as_uri()
    scheme = "dark" if args.dark else "light"
    viewport = {"width": args.width, "height": args.height or 800}
    try:
        with browser() as started:
            page = started.new_page(viewport=viewport, color_scheme=scheme)
            page.goto(address)
            if page.query_selector("#run"):
                page.click(".examples button")
                if args.text:
                    page.fill("#text", args.text)
                page.click("#run")
                page.wait_for_selector("#run:enabled", timeout=1000 * MOST_SECONDS)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=args.output, full_page=not args.height)
    except Error as error:
        raise UserError(f"no picture of {args.page}: {one_line(error)}") from None


if __name__ == "__main__":
    run(main)
