"""Ctrl-C while training: the step under way is finished, and what was learned is kept.

A step that is cut in the middle leaves blocks half updated, so the first request only asks; the
loop stops between steps. A second one stops at once.

Under torchrun one Ctrl-C comes twice: the terminal sends it to all processes, and torchrun sends it
on to its own. So what follows within a second is not the second one.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption", "noticing_interruption"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 1.0
"""Seconds in which several requests are one."""


class Interruption:
    """Whether somebody asked to stop.

    Args:
        speaks: whether to say what follows; of several processes one does.
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self._moment: float | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody did."""
        return self._moment is not None

    def request(self, number: int, frame: FrameType | None) -> None:
        """Note a request; the second one interrupts.

        Raises:
            KeyboardInterrupt: somebody asked before.
        """
        now = time.monotonic()
        if self._moment is not None:
            if now - self._moment > TOGETHER:
                raise KeyboardInterrupt
            return
        self._moment = now
        if self._speaks:
            line = "\nstopping after this step; once more stops at once"
            print(line, file=sys.stderr, flush=True)


@contextmanager
def noticing_interruption(*, speaks: bool = True) -> Iterator[Interruption]:
    """Yield what knows whether Ctrl-C was pressed, or the process was told to end.

    Args:
        speaks: whether to say what follows; of several processes one does.
    """
    interruption = Interruption(speaks)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread hears of signals
        return
    before = {number: signal.signal(number, interruption.request) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
