"""Processes that start at once: all are forked from one that has imported everything."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.processes import FORKED

__all__ = ["in_child"]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own, to which it may do anything.

    Args:
        function: a function of a module.
        arguments: its arguments.

    Raises:
        AssertionError: it raised, or the process died.
    """
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_report, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        result, failure = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process died, exit code {process.exitcode}") from None
    process.join()
    assert not failure, failure
    return result


def _report(results: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        results.send((function(*arguments), ""))
    except BaseException:
        results.send((None, traceback.format_exc()))
