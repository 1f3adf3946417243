"""Lets pages link to code and to files outside of docs/, by paths that hold in the repository too.

`../CHANGELOG.md` is a page of the site; any other such file that a page links to is put on the
site as text, under `source/`. A link to what is not there is left as it is, so that a strict build
fails.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""What stands for a file of the repository's root on the site."""
WRITTEN = ("changelog.md", "contributing.md")
"""Those that are made of the file itself."""
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and sources that stand for files outside of docs/."""
    for path, page in PAGES.items():
        if page in WRITTEN and (ROOT / path).is_file():
            files.append(_standing_in(config, page, path))
    linked = {path for file in files.documentation_pages() for path in _outside(file)}
    for path in sorted(linked - PAGES.keys()):
        files.append(_standing_in(config, _source(path), path))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ lead to what stands for their file on the site."""
    folder = _folder(page.file)

    def on_site(match: re.Match[str]) -> str:
        path = _path(folder, match[2])
        if path is None:
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return match[1] + posixpath.relpath(_place(path), start) + match[3]

    return LINK.sub(on_site, markdown)


def _standing_in(config: MkDocsConfig, page: str, path: str) -> File:
    """Return a file of the site that is a file of the repository; it may be missing in the nav."""
    return File.generated(
        config, page, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
    )


def _outside(file: File) -> Iterator[str]:
    """Find the files that a page links to and that are no part of the site by themselves."""
    for _, target, _ in LINK.findall(file.content_string):
        path = _path(_folder(file), target)
        if path is not None and not _is_part(path):
            yield path


def _path(folder: str, target: str) -> str | None:
    """Return a link's path in the repository, or None if nothing has to be done about it."""
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith(("/", "../")):
        return None  # nothing outside of the repository comes onto the site
    holds = folder.startswith("docs") and _is_part(path)
    return path if not holds and (ROOT / path).is_file() else None


def _folder(file: File) -> str:
    """Return the folder in the repository that a page's links start from."""
    return posixpath.dirname(f"docs/{file.src_uri}") if file.src_uri not in WRITTEN else ""


def _is_part(path: str) -> bool:
    """Whether a file of the repository is a part of the site by itself."""
    return path.startswith("docs/") and not path.endswith(".py")


def _place(path: str) -> str:
    """Return where a file of the repository stands on the site."""
    return path.removeprefix("docs/") if _is_part(path) else PAGES.get(path, _source(path))


def _source(path: str) -> str:
    return f"source/{path}.txt"
