"""What commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disha.text import printable


def show(as_json: bool, text: str, fields: Mapping[str, Any]) -> None:
    """Print a result: text for people, or one JSON object for scripts."""
    if as_json:
        print(json.dumps(fields, indent=2))
    else:
        print(fit(text))


def fit(text: str) -> str:
    """Return a text with everything escaped that a terminal can't show."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = printable(text.expandtabs(4), len(text) * 4, lines=True)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def tell_noted_base(adapter: Path, notes: Mapping[str, str]) -> str:
    """Return the base that an adapter has in its notes, and print which it is."""
    from disha.finetune.notes import read_noted_base, read_noted_bits  # they import torch

    base = read_noted_base(adapter, notes)
    bits = read_noted_bits(notes)
    print(fit(f"the base is {base}, with --bits {bits}, as {adapter} notes"), file=sys.stderr)
    return base
