"""What commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from disha.text import printable


def show(as_json: bool, text: str, fields: Mapping[str, Any]) -> None:
    """Print a result: text for people, or one JSON object for scripts."""
    print(json.dumps(fields, indent=2) if as_json else fit(text))


def fit(text: str) -> str:
    """Return a text with everything escaped that a terminal can't show."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = printable(text.expandtabs(4), len(text) * 4, lines=True)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
