"""Processes that start at once: all are forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["CONTEXT", "in_child"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.fuzzing.workers", "tests.fuzzing.saving", "tests.fuzzing.doors"]
)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own, to which it may do anything.

    Args:
        function: a function of a module.
        arguments: its arguments.

    Raises:
        AssertionError: it raised, or the process died.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_report, args=(theirs, function, arguments))
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
