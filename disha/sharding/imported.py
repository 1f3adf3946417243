"""Classes of libraries that may not be imported."""

from __future__ import annotations

import sys
from typing import Any


def imported_class(module: str, name: str) -> Any:
    """Return a class for `isinstance`, or () if its module is not imported.

    Nothing is an instance of (), and a class that is not imported has no instances.
    """
    return getattr(sys.modules.get(module), name, ())
