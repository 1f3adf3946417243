"""A trial of the chat template that comes with an adapter, in a process that can be ended.

A template is a program. transformers keeps it away from files and from Python, but not from time
and memory: two nested loops can run for days.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from disha.errors import AdapterFileError
from disha.finetune.notes import TEMPLATE_KEY
from disha.text import brief, printable

SECONDS = 5
"""How long the processor may work on the trial of a template."""

START = 120
"""Seconds until a trial is ended whatever it does; Python and transformers take most of them."""

TRIAL = """
import sys
from transformers.utils.chat_template_utils import render_jinja_template
template = sys.stdin.read()
roles = ("system", "user", "assistant", "user", "assistant")
turns = [{"role": role, "content": role} for role in roles]
try:
    import resource
except ImportError:  # on Windows, only the time is limited
    pass
else:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
conversations = (turns[1:3], turns[1:5], turns[:3])
errors = []
for conversation in conversations:
    try:
        [text], _ = render_jinja_template([conversation], chat_template=template)
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
    else:
        if len(text) > 100_000:
            sys.exit(f"it makes {len(text):,} characters of {len(conversation)} words")
# Some refuse a system message, or a second question, and some want a system message first.
if len(errors) == len(conversations):
    sys.exit(errors[0])
"""


def try_template(adapter: str | Path, notes: Mapping[str, str]) -> None:
    """Name the chat template that an adapter brings, and raise if it can't be used."""
    if TEMPLATE_KEY not in notes:
        return
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"{adapter} brings its own chat template"), file=sys.stderr)
    command = [sys.executable, "-P", "-c", TRIAL, str(SECONDS)]
    try:
        done = subprocess.run(
            command,
            input=notes[TEMPLATE_KEY],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=START,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _error(adapter, f"it does not end in {START} s") from error
    if done.returncode:
        # A trial that the system ends has said nothing.
        too_much = f"it takes more than {SECONDS} s or 2 GiB for three short turns"
        *_, reason = done.stderr.strip().splitlines() or [too_much]
        raise _error(adapter, brief(reason))


def _error(adapter: str | Path, reason: str) -> AdapterFileError:
    return AdapterFileError(
        f"the chat template of {adapter} can't be used: {reason}; get the file again, or train "
        "with --chat_template_path"
    )
