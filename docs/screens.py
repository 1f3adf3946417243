"""The built site in headless Chromium.

`python -m docs.screens FOLDER` builds the site and takes pictures of pages, at two widths, light
and dark.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).parent.parent
DESK, PHONE = WIDTHS = 1400, 400
"""Widths of screens, in pixels."""
HEIGHT, TALLEST = 844, 2600
PAGES = ("about/", "", "choosing/", "evidence/", "guides/custom-model/")
SCHEMES = ("light", "dark")
PROGRAMS = ("chromium", "chromedriver")


def build(folder: Path) -> None:
    """Build the site into a folder; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    """Start a browser that logs the addresses that it asks for."""
    chromium, driver = map(shutil.which, PROGRAMS)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in ("headless=new", "no-sandbox", "disable-gpu", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options=options, service=Service(driver))
        yield browser
        browser.quit()


def resize(browser: webdriver.Chrome, width: int, height: int = HEIGHT) -> None:
    """Make the screen as large as this, in pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(browser: webdriver.Chrome, scheme: str) -> None:
    """Ask pages for their light or their dark colours."""
    preferred = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preferred]})


def forget(browser: webdriver.Chrome, address: str) -> None:
    """Let the browser forget the colours that a page has chosen before."""
    browser.execute_cdp_cmd(
        "Storage.clearDataForOrigin", {"origin": address, "storageTypes": "local_storage"}
    )


def main() -> None:
    """Take the pictures, and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m docs.screens", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    if None in map(shutil.which, PROGRAMS):
        sys.exit(f"no browser: install {' and '.join(PROGRAMS)}, and put both on the PATH")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary))
        with served(Path(temporary)) as address, chrome() as browser:
            for page in PAGES:
                for width, scheme in itertools.product(WIDTHS, SCHEMES):
                    browser.get("about:blank")  # an open page would note the change of colours
                    resize(browser, width)
                    prefer(browser, scheme)
                    forget(browser, address)
                    browser.get(urljoin(address, page))
                    tall = browser.execute_script("return document.documentElement.scrollHeight")
                    resize(browser, width, min(tall, TALLEST))
                    name = page.strip("/").replace("/", "-") or "home"
                    path = folder / f"{name}-{width}-{scheme}.png"
                    browser.save_screenshot(str(path))
                    print(path)


if __name__ == "__main__":
    main()
