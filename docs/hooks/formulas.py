"""Typeset the formulas of the pages, without JavaScript and without a network.

The Markdown extension `arithmatex` finds the formulas, which are written in LaTeX between dollars.
Here they become MathML, which browsers typeset themselves.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.+?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each formula of a page by MathML."""
    content = INLINE.sub(lambda found: _typeset(found[1], "inline"), content)
    return BLOCK.sub(
        lambda found: f'<div class="formula">{_typeset(found[1], "block")}</div>', content
    )


def _typeset(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)
