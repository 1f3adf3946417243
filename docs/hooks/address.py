"""Give the site the address of the repository, which stands in `setup.py` alone.

While `ADDRESS` there is empty, the site has no link to a repository and no links to edit a page.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
TEXT = SETUP.read_text(encoding="utf-8")
ADDRESS, SITE = re.findall(r'^(?:ADDRESS|SITE) = "([^"]*)"', TEXT, re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set what links to the repository."""
    config.site_url = SITE
    if ADDRESS:
        config.repo_url = ADDRESS
        config.edit_uri = "edit/main/docs/"
    return config
