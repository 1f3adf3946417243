"""Let pages link to files outside docs/, by paths that also work in the repository.

The files in `PAGES` are pages of the site. Any other file that a page links to is put on the site
as text, under `source/`. A link to a missing file stays as it is, so a strict build fails.
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
RESULTS = "benchmarks/results"
PAGES = {
    **{
        f"{name}.md": f"{name.lower()}.md"
        for name in ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")
    },
    **{
        f"{RESULTS}/{name}.md": f"results/{name}.md"
        for name in ("drift", "gpu", "learning", "speed")
    },
    "README.md": "about.md",
}
"""File of the repository -> its page on the site."""
WRITTEN = {page: path for path, page in PAGES.items()}
"""Page that is made from a file outside docs/ -> that file."""
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and sources for files outside docs/."""
    for page, path in WRITTEN.items():
        if (ROOT / path).is_file():
            files.append(_standing_in(config, page, path))
    linked = {path for file in files.documentation_pages() for path in _outside(file)}
    for path in sorted(linked - PAGES.keys()):
        files.append(_standing_in(config, _source(path), path))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links out of docs/ to the pages of these files."""
    folder = _folder(page.file)

    def on_site(match: re.Match[str]) -> str:
        path = _path(folder, match[2])
        if path is None:
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return match[1] + posixpath.relpath(_place(path), start) + match[3]

    return LINK.sub(on_site, markdown)


def _standing_in(config: MkDocsConfig, page: str, path: str) -> File:
    """Return a file of the repository as a file of the site, which the nav may leave out."""
    return File.generated(
        config, page, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
    )


def _outside(file: File) -> Iterator[str]:
    """Find the files that a page links to and that are not part of the site already."""
    for _, target, _ in LINK.findall(file.content_string):
        path = _path(_folder(file), target)
        if path is not None and not _is_part(path):
            yield path


def _path(folder: str, target: str) -> str | None:
    """Return a link's path in the repository, or None if the link can stay as it is."""
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith(("/", "../")):
        return None  # nothing outside the repository goes onto the site
    holds = folder.startswith("docs") and _is_part(path)
    return path if not holds and (ROOT / path).is_file() else None


def _folder(file: File) -> str:
    """Return the folder in the repository to which a page's links are relative."""
    return posixpath.dirname(WRITTEN.get(file.src_uri, f"docs/{file.src_uri}"))


def _is_part(path: str) -> bool:
    """Whether a file of the repository is part of the site already."""
    return path.startswith("docs/") and not path.endswith(".py")


def _place(path: str) -> str:
    """Return the place of a file of the repository on the site."""
    return path.removeprefix("docs/") if _is_part(path) else PAGES.get(path, _source(path))


def _source(path: str) -> str:
    return f"source/{path}.txt"
