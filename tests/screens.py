"""The site in headless Chromium, and pictures of its pages.

`python -m tests.screens FOLDER` builds the site and takes a picture of the home page, a guide, the
evidence and the performance, at three widths. With `--revision NAME`, the pictures show the site of
that commit, so that two folders show a page before and after a change.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

__all__ = ["DESK", "PAGES", "PHONE", "PROGRAMS", "WIDTHS", "build", "chrome", "main", "pictures",
           "resize", "served"]  # fmt: skip

ROOT = Path(__file__).parent.parent
DESK, TABLET, PHONE = WIDTHS = 1400, 1024, 390
"""Widths of screens, in pixels."""
HEIGHT, TALLEST = 844, 2600
PAGES = ("", "guides/custom-model/", "evidence/", "performance/")
PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def build(source: Path, folder: Path) -> None:
    """Build the site of a checkout into a folder; a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine, and give its address."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    serve = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def chrome() -> Iterator[webdriver.Chrome]:
    """Start a browser that logs its requests and the messages of its console."""
    chromium, driver = map(shutil.which, PROGRAMS)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        yield browser
        browser.quit()


def resize(browser: webdriver.Chrome, width: int, height: int = HEIGHT) -> None:
    """Make the screen as large as this, in pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def pictures(browser: webdriver.Chrome, address: str, folder: Path) -> Iterator[Path]:
    """Write a picture of each of `PAGES` at each width, and give its path."""
    for page in PAGES:
        for width in WIDTHS:
            resize(browser, width)
            browser.get(urljoin(address, page))
            height = browser.execute_script("return document.documentElement.scrollHeight")
            resize(browser, width, min(height, TALLEST))
            name = page.strip("/").replace("/", "-") or "home"
            path = folder / f"{name}-{width}.png"
            browser.save_screenshot(str(path))
            yield path


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the pictures, and print their paths.

    Args:
        arguments: of the command line; the process's by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.screens", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--revision", help="a commit to show, in place of the files as they are")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source, site = ROOT, Path(temporary) / "site"
        if asked.revision is not None:
            source = Path(temporary) / "source"
            _check_out(asked.revision, source)
        build(source, site)
        with served(site) as address, chrome() as browser:
            for path in pictures(browser, address, asked.folder):
                print(path)
    return 0


def _check_out(revision: str, folder: Path) -> None:
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)


if __name__ == "__main__":
    sys.exit(main())
