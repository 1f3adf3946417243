"""Classes of libraries that may not be imported."""

from __future__ import annotations

import sys


def imported_class(module: str, name: str) -> type | None:
    """Return a class if its module is imported, else None: no object of it can exist then."""
    return getattr(sys.modules.get(module), name, None)
