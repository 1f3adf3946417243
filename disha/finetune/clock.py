"""What is being done, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Says what is being done, and how long it took.

    Args:
        speaks: whether to say it; of several processes one does.
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        """Print a line."""
        if self._speaks:
            print(line, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what is done meanwhile, and then how long it took."""
        self.say(f"{name} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.say(f"  {self.seconds[name]:.1f} s")
