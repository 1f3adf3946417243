"""Show the version of the library at the foot of every page."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

FILE = Path(__file__).resolve().parents[2] / "disha" / "version.py"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the version where the theme shows a copyright."""
    found = re.search(r'__version__ = "(.+)"', FILE.read_text(encoding="utf-8"))
    assert found is not None, FILE
    config.copyright = f"{config.site_name} {found[1]}, Apache-2.0"
    return config
