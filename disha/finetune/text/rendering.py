"""Renders chat templates, in a process that `jinja` starts. This file is its main module.

A template is a program. The system ends this process if it takes too much time, and limits its
memory. So the process must be small and start fast: it imports jinja2, and nothing of this library.

It reads pickles from its standard input: first the paths of modules and the limit on memory, then
one request after another. The answer to each is a letter, a length, and that many bytes.
"""

from __future__ import annotations

import faulthandler
import json
import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

__all__ = ["DAMAGED", "FAILED", "HEADER", "LENGTHS", "NO_MEMORY", "RENDERED", "environment"]

HEADER = struct.Struct("<cQ")
"""The letter of an answer, and the number of bytes that follow."""

LENGTHS = struct.Struct("<QQ")
"""The number of characters of a text, and of those at its beginning that another text shares."""

RENDERED, FAILED, DAMAGED, NO_MEMORY = b"r", b"f", b"d", b"m"
LONGEST_MESSAGE = 1000


def _main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.path, memory = pickle.load(requests)
    import jinja2.sandbox  # noqa: F401  before memory is limited

    _limit_memory(memory)
    if hasattr(signal, "setitimer"):
        # If the process that asks ignores or blocks the timer's signal, this one inherits that.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    while True:
        try:
            kind, content = _answer(*pickle.load(requests))
        except EOFError:
            return
        except MemoryError:
            kind, content = NO_MEMORY, b""
        _allow(0)
        answers.write(HEADER.pack(kind, len(content)) + content)
        answers.flush()


def _limit_memory(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    # Linux counts all memory that the process can write; macOS accepts the limit and ignores it.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _allow(seconds: float) -> None:
    """Let the process compute for this many seconds. With 0, let it wait for a request.

    Then the system ends it, even inside one operation.
    """
    if hasattr(signal, "setitimer"):  # processor time, so a busy machine does not count
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def _answer(
    template: str,
    variables: bytes,
    others: Sequence[tuple[int, bool]],
    now: float,
    seconds: float,
) -> tuple[bytes, bytes]:
    """Render a conversation, and measure how much of its text its other forms share.

    A form has the first messages of the conversation, and may ask for an answer after them. The
    template sees the time `now`, in seconds since 1970.
    """
    kind = DAMAGED
    try:
        _allow(seconds)
        compiled = _compiled(template)
        kind = FAILED
        given = pickle.loads(variables) | {"strftime_now": datetime.fromtimestamp(now).strftime}
        _allow(seconds)
        text = compiled.render(given)
        lengths = b""
        for count, asks in others:
            form = {"messages": given["messages"][:count], "add_generation_prompt": asks}
            _allow(seconds)
            other = text if given == given | form else compiled.render(given | form)
            lengths += LENGTHS.pack(len(other), _shared(text, other))
        return RENDERED, lengths + text.encode()
    except MemoryError:
        raise
    except Exception as error:  # a template's own code can raise anything
        return kind, _message(error)


def _shared(one: str, other: str) -> int:
    """Return the length of the beginning that two texts share."""
    shared, most = 0, min(len(one), len(other))
    while shared < most:
        middle = (shared + most + 1) // 2
        if one[shared:middle] == other[shared:middle]:
            shared = middle
        else:
            most = middle - 1
    return shared


def _message(error: Exception) -> bytes:
    said = str(error)[:LONGEST_MESSAGE] or type(error).__name__
    return said.encode(errors="backslashreplace")


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return environment().from_string(template)


def environment() -> Any:
    """Return the environment of templates, with the same functions as in transformers.

    `strftime_now` is a variable of each text, because the caller says what time it is.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Keeps the text between ``generation`` and ``endgeneration`` as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return plain JSON. Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


if __name__ == "__main__":
    # Ctrl-C is for the process that asks. This process ends when its input ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _main()
