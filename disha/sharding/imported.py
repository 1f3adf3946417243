"""Classes of libraries that may not be imported."""

from __future__ import annotations

import sys
from typing import Any


def imported_class(module: str, name: str) -> Any:
    """Return a class for `isinstance`; () if its module is not imported: then it has no object."""
    return getattr(sys.modules.get(module), name, ())
