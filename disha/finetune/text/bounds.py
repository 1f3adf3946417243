"""Checks that a tokenizer from a stranger takes bounded time and memory for a text.

A tokenizer.json is like a program: its steps rewrite a text and cut it by regexes. Each step can
make the text longer. A bad regex never ends, because it tries too many ways to match. So each step
is checked once, when the tokenizer is opened:

- Replacing makes a text at most 16 times as long. No other step that lengthens a text comes twice.
- In a regex, only one repetition can be tried at all its lengths before something that may fail.
  So the number of tries grows with the length of the text, and not with its square or faster.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from disha.finetune.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["is_bounded", "require_bounded"]

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
INSIDE = ("normalizers", "pretokenizers", "processors", "decoders")
"""Where a sequence of steps holds its steps."""

ONCE = ("ByteLevel", "Metaspace", "Precompiled", "TemplateProcessing")
"""Steps that lengthen a text by a factor that is not computed here."""

MOST_STEPS, LARGEST_GROWTH, LONGEST_TEMPLATE, LONGEST_CHARACTER = 32, 16, 16, 64
"""Most steps; how many times as long replacing may make a text; most tokens that a template may put
around it; most bytes that may replace a character."""


def require_bounded(backend: BackendTokenizer, source: object) -> None:
    """Check all steps of a tokenizer.

    Args:
        backend: the tokenizer.
        source: where the tokenizer came from; for messages.

    Raises:
        TokenizerError: a step may take time or memory without bound.
    """
    for name in PARTS:
        part = getattr(backend, name)
        steps = [] if part is None else list(_steps(json.loads(part.__getstate__())))
        problem = _problem(steps)
        if problem is not None:
            raise TokenizerError(
                f"the {name} of {source} {problem}, so a text could take all time or memory; if "
                "you trust it, open it yourself in a function for --model module:function"
            )


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    inside = next((state[key] for key in INSIDE if key in state), None)
    if inside is None:
        yield state
    else:
        for one in inside:
            yield from _steps(one)


def _problem(steps: list[Mapping[str, Any]]) -> str | None:
    """Return why steps are not bounded, or None if they are."""
    if len(steps) > MOST_STEPS:
        return f"has {len(steps)} steps, more than {MOST_STEPS}"
    growth = 1.0
    kinds = Counter(step["type"] for step in steps)
    for step in steps:
        growth *= _growth(step)
        pattern = _regex(step)
        if kinds[step["type"]] > 1 and step["type"] in ONCE:
            return f"has {step['type']} {kinds[step['type']]} times"
        if pattern is not None and not is_bounded(pattern):
            return f"has the regex {pattern!r:.200}, which may try too many ways to match"
        if step["type"] == "TemplateProcessing" and _template_length(step) > LONGEST_TEMPLATE:
            return f"puts {_template_length(step)} tokens around every text"
        if step["type"] == "Precompiled" and _longest_replacement(step) > LONGEST_CHARACTER:
            return f"replaces a character by more than {LONGEST_CHARACTER} bytes"
    return f"makes a text {growth:.0f} times as long" if growth > LARGEST_GROWTH else None


def _regex(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) else None


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times as long replacing makes a text."""
    if step["type"] == "Prepend":
        return 1 + len(step["prepend"]) / 2
    if step["type"] != "Replace":
        return 1
    # A regex may match an empty text before each character.
    replaced = 0 if _regex(step) is not None else len(step["pattern"]["String"])
    return max(1.0, len(step["content"]) / replaced if replaced else 1 + len(step["content"]))


def _template_length(step: Mapping[str, Any]) -> int:
    """Return how many tokens a template puts around a text. A second text counts as 16."""
    length = 0
    texts = 0
    for piece in step["single"]:
        if "SpecialToken" in piece:
            length += len(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
        else:
            texts += 1
    return length + LONGEST_TEMPLATE * max(0, texts - 1)


def _longest_replacement(step: Mapping[str, Any]) -> int:
    """Return the length of the longest text that replaces a character.

    The map holds the size of an index, the index, and the texts, each with a zero byte after it.
    """
    content = base64.b64decode(step["precompiled_charsmap"])
    first = 4 + int.from_bytes(content[:4], "little")
    return max(map(len, content[first:].split(b"\0")))


# --- regexes -------------------------------------------------------------------------------------

MOST_CHOICES = 6
"""Most optional parts, alternatives and short ranges before something that may fail."""

PLAIN = "dDwWsShHnrtfvae"
"""Letters that mean one character after a backslash."""

ANCHORS = "bBAzZG"
"""Letters that mean a place in the text after a backslash."""

GROUPS = ("?:", "?i:", "?>", "?=", "?!", "?<=", "?<!")
"""How a group begins that only groups, or that looks ahead or back."""


def is_bounded(pattern: str) -> bool:
    """Return whether a regex tries few ways to match; False if the regex is not understood."""
    try:
        parser = _Parser(pattern)
        shapes = parser.alternatives()
    except (ValueError, IndexError, RecursionError):
        return False
    return (
        parser.place == len(pattern)
        and all(shape.tried <= 1 for shape in shapes)
        and all(shape.chosen <= MOST_CHOICES for shape in shapes)
    )


@dataclass(frozen=True)
class _Shape:
    """What a part of a regex can do.

    Args:
        optional: it may match nothing, so it never fails.
        fixed: it is one character after another.
        repeats: repetitions in it.
        tried: the repetitions that are tried at all their lengths, because something in the part
            may fail after them.
        choices: other choices in it.
        chosen: the choices that are tried in all ways, for the same reason.
    """

    optional: bool = False
    fixed: bool = True
    repeats: int = 0
    tried: int = 0
    choices: int = 0
    chosen: int = 0


class _Parser:
    """Reads a regex of Oniguruma. A part that is not understood raises `ValueError`."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.place = pattern, 0

    def alternatives(self) -> list[_Shape]:
        shapes = [self._sequence()]
        while self._skip("|"):
            shapes.append(self._sequence())
        return shapes

    def _sequence(self) -> _Shape:
        parts: list[_Shape] = []
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            parts.append(self._repeated(self._atom()))
        last = max((at for at, part in enumerate(parts) if not part.optional), default=-1)
        return _Shape(
            optional=last < 0,
            fixed=all(part.fixed for part in parts),
            repeats=sum(part.repeats for part in parts),
            tried=sum(p.repeats if at < last else p.tried for at, p in enumerate(parts)),
            choices=sum(part.choices for part in parts),
            chosen=sum(p.choices if at < last else p.chosen for at, p in enumerate(parts)),
        )

    def _atom(self) -> _Shape:
        first = self._next()
        if first == "(":
            return self._group()
        if first == "[":
            self._class()
        elif first == "\\":
            return self._escape()
        elif first in "*+?{":
            raise ValueError(first)
        elif first in "^$":
            return _Shape(fixed=False)
        return _Shape()

    def _group(self) -> _Shape:
        kind = next((kind for kind in GROUPS if self._skip(kind)), "")
        if self.pattern[self.place] == "?":
            raise ValueError("another kind of group")
        shapes = self.alternatives()
        if self._next() != ")":
            raise ValueError("a group without an end")
        several = len(shapes) > 1
        looks = kind[-1:] in ("=", "!")
        return _Shape(
            optional=not looks and any(shape.optional for shape in shapes),
            fixed=not several and not looks and shapes[0].fixed,
            repeats=max(shape.repeats for shape in shapes),
            tried=max(shape.tried for shape in shapes),
            choices=max(shape.choices for shape in shapes) + several,
            chosen=max(shape.chosen for shape in shapes),
        )

    def _class(self) -> None:
        self._skip("^")
        self._skip("]")  # first in a class, it is a character
        while (character := self._next()) != "]":
            if character == "\\":
                self._next()
            elif character == "[":
                self._class()

    def _escape(self) -> _Shape:
        kind = self._next()
        if kind in "pPx" and self._skip("{"):
            self.place = self.pattern.index("}", self.place) + 1
        elif kind.isalnum() and kind not in PLAIN + ANCHORS + "xu":
            raise ValueError(f"\\{kind}")
        return _Shape(fixed=kind not in ANCHORS)

    def _repeated(self, atom: _Shape) -> _Shape:
        least, most = self._times()
        if (least, most) == (1, 1):
            return atom
        if least == most and atom.fixed:
            return atom
        if (least, most) != (0, 1) and not atom.fixed:
            raise ValueError("a repetition in a repetition")
        longer = most is None or most - least > 3
        times = 1 + (self._skip("+") and most is not None and most > 1)
        self._skip("?")  # tries the same lengths in another order
        return _Shape(
            optional=least == 0 or atom.optional,
            fixed=False,
            repeats=atom.repeats + (times if longer or times > 1 else 0),
            tried=atom.tried + (times - 1),
            choices=atom.choices + (not longer),
            chosen=atom.chosen,
        )

    def _times(self) -> tuple[int, int | None]:
        for sign, times in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._skip(sign):
                self._skip("+")  # possessive: it tries less
                return times
        if not self._skip("{"):
            return 1, 1
        end = self.pattern.index("}", self.place)
        least, comma, most = self.pattern[self.place : end].partition(",")
        self.place = end + 1
        if not comma:
            return int(least), int(least)
        return int(least or 0), int(most) if most else None

    def _next(self) -> str:
        self.place += 1
        return self.pattern[self.place - 1]

    def _skip(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.place)
        self.place += len(text) * found
        return found
