"""The built site, opened in headless Chromium: what a reader on a desk or a phone gets."""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
PHONE = 390
"""Width of a phone's screen, in pixels."""
SECONDS = 20
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
LOOK = """
const text = "article :is(h1, p, li, td, dd, pre code)";
const sizes = [...document.querySelectorAll(text)]
  .filter(one => one.offsetParent !== null)
  .map(one => parseFloat(getComputedStyle(one).fontSize));
return {
  width: document.documentElement.scrollWidth,
  smallest: Math.min(...sizes),
  broken: [...document.images].filter(one => !one.naturalWidth).map(one => one.src),
  images: document.images.length,
};
"""


@dataclass(frozen=True)
class Visit:
    """What was seen of a page at phone width.

    Attributes:
        width: of the whole page, in pixels.
        smallest: smallest size of its text, in pixels.
        images: how many it has.
        broken: those that did not load.
        errors: what the console says of it.
        requests: the addresses that were asked for.
    """

    width: int
    smallest: float
    images: int
    broken: list[str]
    errors: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    serve = functools.partial(Silent, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if None in (chromium, driver):
        without = "no browser: these tests need `chromium` and `chromedriver` on the PATH"
        (pytest.fail if os.environ.get("GITHUB_ACTIONS") else pytest.skip)(without)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def visits(browser, address, site) -> dict[str, Visit]:
    """Every page, seen at phone width."""
    resize(browser, PHONE)
    pages = sorted(path.parent.relative_to(site) for path in site.rglob("index.html"))
    return {str(page): visit(browser, urljoin(address, f"{page}/")) for page in pages}


@pytest.fixture
def desk(browser, address) -> webdriver.Chrome:
    resize(browser, 1280)
    browser.get(address)
    return browser


def resize(browser, width):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def visit(browser, url):
    browser.get(url)
    seen = browser.execute_script(LOOK)
    errors = [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return Visit(**seen, errors=errors, requests=requests)


def wait_for(browser, condition):
    return WebDriverWait(browser, SECONDS).until(condition)


# --- every page ----------------------------------------------------------------------------------


def test_all_pages_are_visited(visits):
    docs = ROOT / "docs"
    sources = {path.relative_to(docs) for path in docs.rglob("*.md")}
    firsts = ("index", "README")
    pages = {str(path.parent if path.stem in firsts else path.with_suffix("")) for path in sources}
    assert {".", "mathematics", "reference/injecting"} <= pages
    assert pages | {"changelog"} <= visits.keys()


def test_no_page_scrolls_sideways_on_a_phone(visits):
    assert {page: seen.width for page, seen in visits.items() if seen.width > PHONE} == {}


def test_text_is_readable_on_a_phone(visits):
    assert {page: seen.smallest for page, seen in visits.items() if seen.smallest < 12} == {}


def test_images_load(visits):
    assert {page: seen.broken for page, seen in visits.items() if seen.broken} == {}
    assert visits["mathematics"].images == 5
    assert visits["performance"].images >= 4


def test_the_console_is_silent(visits):
    assert {page: seen.errors for page, seen in visits.items() if seen.errors} == {}


def is_remote(url):
    """Whether it is more than a part of a page, or of the browser itself."""
    return urlsplit(url).scheme not in ("data", "blob", "chrome")


def test_nothing_is_asked_of_a_network(visits, address):
    asked = [url for seen in visits.values() for url in seen.requests if is_remote(url)]
    assert len(asked) > len(visits)
    assert [url for url in asked if not url.startswith(address)] == []


def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    places = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    broken = [
        f"{path.relative_to(site)}: {link}"
        for path, text in pages.items()
        for link in map(html.unescape, re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text))
        if not leads(site, places, path, link)
    ]
    assert broken == []


def leads(site, places, page, link):
    parts = urlsplit(urljoin(f"http://site/{page.relative_to(site)}", link))
    if parts.netloc != "site":
        return parts.scheme == "https"
    target = site / unquote(parts.path).lstrip("/")
    if target.is_dir():
        target /= "index.html"
    fragment = unquote(parts.fragment)
    return target.is_file() and (not fragment or html.escape(fragment) in places[target])


# --- what a page can do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "page"),
    [("fingerprint", "format/"), ("route_adapters", "controlling/"), ("MiSS", "glossary/")],
)
def test_search_finds(desk, word, page):
    links = results_of(desk, word)
    assert any(page in link.get_attribute("href") for link in links)


def test_a_found_page_opens(desk):
    results_of(desk, "glossary")[0].click()
    wait_for(desk, lambda one: "glossary" in one.current_url)
    wait_for(desk, lambda one: one.find_element(By.TAG_NAME, "h1").text.startswith("Glossary"))


def results_of(browser, word):
    """Type a word into the search, and return the links that come."""
    field = browser.find_element(By.CSS_SELECTOR, ".md-search__input")
    field.click()
    field.send_keys(word)
    found = (By.CSS_SELECTOR, "a.md-search-result__link")
    return wait_for(browser, lambda one: one.find_elements(*found))


def test_code_is_copied(desk, address):
    granted = {"origin": address.rstrip("/"), "permissions": ["clipboardReadWrite"]}
    desk.execute_cdp_cmd("Browser.grantPermissions", granted)
    code = "pip install disha-torch"
    block = next(
        one for one in desk.find_elements(By.CSS_SELECTOR, ".highlight") if one.text == code
    )
    button = wait_for(
        desk, lambda _: block.find_element(By.CSS_SELECTOR, "[data-clipboard-target]")
    )
    button.click()
    read = "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    wait_for(desk, lambda one: one.execute_async_script(read).strip() == code)


@pytest.mark.parametrize(("scheme", "ground"), [("light", "default"), ("dark", "slate")])
def test_the_theme_is_the_readers(browser, address, scheme, ground):
    chosen = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", chosen)
    browser.get(urljoin(address, "assets/favicon.svg"))  # no script there remembers the last one
    browser.execute_script("localStorage.clear()")
    browser.get(address)
    body = browser.find_element(By.TAG_NAME, "body")
    wait_for(browser, lambda _: body.get_attribute("data-md-color-scheme") == ground)
