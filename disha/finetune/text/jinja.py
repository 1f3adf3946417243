"""Runs chat templates, which are Jinja programs, in a process with limits on time and memory.

A template comes with a model, so it may be from a stranger. Jinja's sandbox keeps it from files and
from Python's internals, but not from computing without end. So a small process of its own renders
templates (`rendering`), and the system ends it at its limits. Otherwise it ends with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.spawn import get_executable
from typing import Any, TypeAlias

import disha
from disha.finetune.errors import DataError, TokenizerError
from disha.finetune.text import rendering

__all__ = ["Form", "Rendered", "end_renderer", "run_template"]

Form: TypeAlias = tuple[int, bool]
"""A form of a conversation: the number of its messages, and whether it asks for an answer."""

SECONDS, SECONDS_FOR_MEGABYTE = 1.0, 5.0
"""Processor time for one text, and more for each megabyte of variables: the template of Llama 3.2
looks at each character. On Windows, it is time on the clock."""

MEBIBYTES = 256
"""Memory of the process, where the system limits it: on Linux. Elsewhere only time is limited."""

FREE_BYTES, TIMES_VARIABLES = 1 << 18, 16
"""The largest size of a text in bytes, and what each byte of variables adds to it."""


@dataclass(frozen=True)
class Rendered:
    """What a chat template made of a conversation.

    Args:
        text: the text.
        others: a form -> the length of its text, and the length of the beginning that it shares
            with this text.
    """

    text: str
    others: Mapping[Form, tuple[int, int]]


def run_template(
    template: str,
    variables: Mapping[str, Any],
    source: object,
    others: Sequence[Form] = (),
    now: float | None = None,
) -> Rendered:
    """Render a chat template.

    Args:
        template: the template.
        variables: the template's variables, by name.
        source: where the template came from; for messages.
        others: other forms of the conversation to compare the text with.
        now: the time that the template sees, in seconds since 1970; by default, the present.

    Raises:
        TokenizerError: the template itself is damaged, or passes a limit.
        DataError: the template refuses the messages, or fails on them.
        MissingPackageError: jinja2 is not installed.
    """
    try:
        given = pickle.dumps(variables)
    except Exception as error:  # the messages may hold any objects
        raise DataError(f"the model's chat template can't take the messages: {error}") from error
    lengths = rendering.LENGTHS.size * len(others)
    limits = _Limits(
        SECONDS + SECONDS_FOR_MEGABYTE * len(given) / 1e6,
        FREE_BYTES + TIMES_VARIABLES * len(given) + lengths,
    )
    renderer = _renderers.setdefault(os.getpid(), _Renderer())
    try:
        moment = time.time() if now is None else now
        kind, content = renderer.ask((template, given, others, moment), limits)
    except _LimitError as error:
        raise TokenizerError(
            f"the chat template of {source} {error}; use --template auto or a text with {{query}} "
            "in it, or a --tokenizer with another chat template"
        ) from error
    if kind == rendering.RENDERED:
        found = rendering.LENGTHS.iter_unpack(content[:lengths])
        return Rendered(content[lengths:].decode(), dict(zip(others, found, strict=True)))
    message = content.decode()
    if kind == rendering.DAMAGED:
        raise TokenizerError(f"the model's chat template is damaged: {message}")
    raise DataError(f"the model's chat template can't take the messages: {message}")


@dataclass(frozen=True)
class _Limits:
    """The seconds that one text may take, and the bytes that it may have."""

    seconds: float
    size: int


class _LimitError(Exception):
    """A template passed a limit."""


class _Renderer:
    """The process that renders templates for this process. It starts when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: tuple[object, ...], limits: _Limits) -> tuple[bytes, bytes]:
        """Return the letter and the content of the answer to a request."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._process = _started()
                return _asked(self._process, request, limits)
            except BaseException:  # the next request must not get the answer to this one
                self._end()
                raise

    def end(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # waits, and closes the pipes
            self._process = None


_renderers: dict[int, _Renderer] = {}
"""The number of the process that asks -> its renderer. A forked process must not use its parent's
pipes."""


@atexit.register
def end_renderer() -> None:
    """End the process that renders for this one, if there is one."""
    if (renderer := _renderers.get(os.getpid())) is not None:
        renderer.end()


def _started() -> subprocess.Popen[bytes]:
    if importlib.util.find_spec("jinja2") is None:
        raise disha.MissingPackageError(
            "chat templates need jinja2; run: pip install 'disha-torch[finetune]'"
        )
    # The executable of a frozen program is no interpreter. It would start the program again.
    python = None if getattr(sys, "frozen", False) else get_executable()
    if not python:
        raise TokenizerError(
            "chat templates run in a Python process of their own, and there is no interpreter to "
            "start; name one with multiprocessing.set_executable"
        )
    try:
        process = subprocess.Popen(
            [python, "-S", rendering.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone
        )
    except OSError as error:
        raise TokenizerError(
            f"chat templates run in a process of their own, which can't be started: {error}"
        ) from error
    _write(process, (sys.path, MEBIBYTES << 20))
    return process


def _asked(
    process: subprocess.Popen[bytes], request: tuple[object, ...], limits: _Limits
) -> tuple[bytes, bytes]:
    _write(process, (*request, limits.seconds))
    try:
        kind, length = rendering.HEADER.unpack(_read(process, rendering.HEADER.size))
        if kind == rendering.NO_MEMORY:
            raise _LimitError(f"needs more than {MEBIBYTES} MiB for one text")
        if length > limits.size:
            raise _LimitError(f"writes more than {limits.size:,} bytes for one text")
        return kind, _read(process, length)
    except EOFError:
        code = process.wait()
    # On Windows, the process ends itself with code 1.
    if code == (-signal.SIGPROF if hasattr(signal, "SIGPROF") else 1):
        raise _LimitError(f"takes more than {limits.seconds:.3g} s for one text")
    raise _LimitError(f"makes the process that renders it end with code {code}")


def _read(process: subprocess.Popen[bytes], length: int) -> bytes:
    assert process.stdout is not None
    content = process.stdout.read(length)
    if len(content) < length:
        raise EOFError
    return content


def _write(process: subprocess.Popen[bytes], content: object) -> None:
    assert process.stdin is not None
    # If the process has ended, reading its answer finds that out, with the exit code.
    with contextlib.suppress(OSError):
        pickle.dump(content, process.stdin)
        process.stdin.flush()
