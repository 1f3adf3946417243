"""The built site in headless Chromium: what a reader at a desk, a tablet or a phone gets."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from mkdocs.config import load_config
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import disha
from tests.screens import (
    DESK,
    PAGES,
    PHONE,
    PROGRAMS,
    WIDTHS,
    build,
    chrome,
    pictures,
    resize,
    served,
)

ROOT = Path(__file__).parent.parent
SECONDS = 20
LOOK = """
for (const one of document.querySelectorAll("details")) one.open = true;
const text = "article :is(h1, p, li, td, dd, pre code)";
const sizes = [...document.querySelectorAll(text)]
  .filter(one => one.offsetParent !== null)
  .map(one => parseFloat(getComputedStyle(one).fontSize));
const right = one => one.getBoundingClientRect().right;
const isCut = one => {
  for (let box = one; box.tagName !== "ARTICLE"; box = box.parentElement) {
    const flow = getComputedStyle(box).overflowX;
    if (flow === "auto" || flow === "scroll") return false;
    if (flow !== "visible" && right(one) > right(box) + 1) return true;
  }
  return right(one) > innerWidth + 1;
};
const shown = [...document.querySelectorAll("article :is(table, pre, img, .formula)")];
const scrolls = box => box !== null && box.scrollWidth > box.clientWidth + 1;
return {
  width: document.documentElement.scrollWidth,
  smallest: Math.min(...sizes),
  cut: shown.filter(isCut).map(one => one.outerHTML.slice(0, 200)),
  scrolling: shown.filter(one => scrolls(one.closest(".md-typeset__scrollwrap"))).length,
};
"""
IMAGES = """
const images = [...document.images];
return [images.length, images.filter(one => !one.naturalWidth).map(one => one.src)];
"""


@dataclass(frozen=True)
class Look:
    """What was seen of a page at one width, with all that is folded open.

    Attributes:
        width: of the whole page, in pixels.
        smallest: smallest size of its text, in pixels.
        cut: tables, code, pictures and formulas of which a part can't be seen.
        scrolling: how many tables scroll within themselves.
    """

    width: int
    smallest: float
    cut: list[str]
    scrolling: int


@dataclass(frozen=True)
class Visit:
    """What was seen of a page.

    Attributes:
        looks: width of the screen -> what was seen.
        images: how many it has.
        broken: those that did not load.
        errors: what the console says of it.
        requests: the addresses that were asked for.
    """

    looks: dict[int, Look]
    images: int
    broken: list[str]
    errors: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with served(site) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if None in map(shutil.which, PROGRAMS):
        without = "no browser: these tests need `chromium` and `chromedriver` on the PATH"
        (pytest.fail if os.environ.get("GITHUB_ACTIONS") else pytest.skip)(without)
    with chrome() as started:
        yield started


@pytest.fixture(scope="module")
def visits(browser, address, site) -> dict[str, Visit]:
    """Every page, loaded once and seen at every width."""
    pages = sorted(path.parent.relative_to(site) for path in site.rglob("index.html"))
    return {str(page): visit(browser, urljoin(address, f"{page}/")) for page in pages}


@pytest.fixture
def desk(browser, address) -> webdriver.Chrome:
    resize(browser, DESK)
    browser.get(address)
    return browser


def visit(browser, url):
    looks = {}
    for width in WIDTHS:
        resize(browser, width)
        if width == DESK:
            browser.get(url)
        looks[width] = Look(**browser.execute_script(LOOK))
    images, broken = browser.execute_script(IMAGES)
    errors = [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return Visit(looks, images, broken, errors, requests)


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


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(visits, width):
    wide = {page: seen.looks[width].width for page, seen in visits.items()}
    assert {page: found for page, found in wide.items() if found > width} == {}


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut(visits, width):
    cut = {page: seen.looks[width].cut for page, seen in visits.items()}
    assert {page: found for page, found in cut.items() if found} == {}


def test_every_table_fits_on_a_desk(visits):
    scrolling = {page: seen.looks[DESK].scrolling for page, seen in visits.items()}
    assert {page: count for page, count in scrolling.items() if count} == {}
    assert visits["features"].looks[PHONE].scrolling >= 4


def test_text_is_readable_on_a_phone(visits):
    smallest = {page: seen.looks[PHONE].smallest for page, seen in visits.items()}
    assert {page: size for page, size in smallest.items() if size < 12} == {}


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


def test_formulas_are_typeset(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert pages[site / "mathematics" / "index.html"].count("<math ") >= 30
    assert [path for path, text in pages.items() if "arithmatex" in text] == []


def test_every_page_shows_the_version(site):
    text = " ".join((site / "glossary" / "index.html").read_text(encoding="utf-8").split())
    assert f"disha {disha.__version__}, Apache-2.0" in text


def test_pictures_of_pages_are_as_wide_as_the_screens(browser, address, tmp_path):
    paths = list(pictures(browser, address, tmp_path))
    assert len({path.name for path in paths}) == len(PAGES) * len(WIDTHS)
    for path in paths:
        assert path.stem.endswith(f"-{Image.open(path).width}")
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 10


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


GROUPS = {"Start": "", "Guides": "finetuning/", "Reference": "cli/", "Evidence": "evidence/"}
"""A group of the navigation -> one of its pages, none of a group inside it."""


def test_four_groups_of_at_most_eight_entries(desk, address):
    nav = load_config(str(ROOT / "mkdocs.yml")).nav
    entries = {group: [name for entry in part for name in entry]
               for one in nav for group, part in one.items()}  # fmt: skip
    tabs = desk.find_elements(By.CSS_SELECTOR, ".md-tabs__link")
    assert [tab.text for tab in tabs] == list(entries) == list(GROUPS)
    for group, page in GROUPS.items():
        assert len(entries[group]) <= 8
        desk.get(urljoin(address, page))
        links = desk.find_elements(By.CSS_SELECTOR, ".md-sidebar--primary .md-nav__link")
        shown = [one.text for one in links if one.is_displayed() and one.text]
        assert [name for name in dict.fromkeys(shown) if name not in GROUPS] == entries[group]


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
