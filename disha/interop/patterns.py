"""Regexes of strangers, matched in bounded time.

`re` backtracks: `(a*)*b` takes for ever on a long enough name, and nothing can stop it. Here a
pattern gives, for every position where it may start, the set of positions where it may end, each
computed once; and what takes too many steps is refused. That is enough to tell whether it matches,
and what `re` says is what this says (the tests compare them).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Pattern", "PatternError"]

LONGEST = 250_000
"""Characters in a pattern."""

MOST_SETS = 200
"""Sets such as `[a-z]` in a pattern: compiling one can take five thousandths of a second."""

STEPS, STEPS_PER_NAME = 300_000, 1_000
"""What a pattern may cost: at least this, and more if it is matched with many names."""


class PatternError(Exception):
    """A pattern is no valid regex, has something that is not matched here, or takes too long."""


class Pattern:
    r"""A regex, compiled.

    Args:
        text: the regex.

    Raises:
        PatternError: it is not valid, or has a backreference, a look behind, an inline flag, a
            possessive quantifier or an atomic group.

    Examples:
        >>> from disha.interop.patterns import Pattern
        >>> pattern = Pattern(r".*\.(q|v)_proj")
        >>> pattern.fullmatch("layers.0.q_proj"), pattern.fullmatch("layers.0.k_proj")
        (True, False)
        >>> Pattern("(a*)*b").fullmatch("a" * 100)
        False
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"a regex of {len(text):,} characters, of {LONGEST:,} allowed")
        if text.count("[") > MOST_SETS:
            raise PatternError(f"a regex of {text.count('['):,} sets, of {MOST_SETS:,} allowed")
        try:
            re.compile(text)
            self._root = _Parser(text).parse()
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"no valid regex: {error}") from error
        self._steps, self._allowed = 0, STEPS

    def fullmatch(self, name: str) -> bool:
        """Whether the regex matches all of a name, as `re.fullmatch`.

        Raises:
            PatternError: that takes too long to find out.
        """
        self._allowed += STEPS_PER_NAME
        run = _Run(name, self._allowed - self._steps)
        try:
            return len(name) in run.ends(self._root, 0)
        except RecursionError as error:
            raise PatternError("a regex that is nested too deep") from error
        finally:
            self._steps += run.steps


@dataclass
class _Run:
    """One matching with one name: what is known so far, and what it may still cost."""

    name: str
    allowed: int
    steps: int = 0
    known: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)

    def ends(self, node: _Node, start: int) -> frozenset[int]:
        """Return the positions where `node` may end if it starts at `start`."""
        key = (id(node), start)
        if key not in self.known:
            found = node.ends(self, start)
            self.count(1 + len(found))
            self.known[key] = found
        return self.known[key]

    def after(self, node: _Node, starts: frozenset[int]) -> frozenset[int]:
        """Return the positions where `node` may end if it starts at any of `starts`."""
        return frozenset().union(*(self.ends(node, start) for start in starts))

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.allowed:
            raise PatternError("a regex that takes too long to match")


class _Node:
    def ends(self, run: _Run, start: int) -> frozenset[int]:
        raise NotImplementedError


@dataclass(eq=False)
class _Character(_Node):
    r"""One character of a set: `.`, `\d`, `[a-z]`."""

    allows: Callable[[str], object]

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        fits = start < len(run.name) and self.allows(run.name[start])
        return frozenset((start + 1,)) if fits else frozenset()


@dataclass(eq=False)
class _Words(_Node):
    """One of several texts."""

    words: frozenset[str]

    def __post_init__(self) -> None:
        self.lengths = sorted({len(word) for word in self.words})

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        stops = (start + length for length in self.lengths)
        return frozenset(
            stop for stop in stops if stop <= len(run.name) and run.name[start:stop] in self.words
        )


@dataclass(eq=False)
class _Edge(_Node):
    r"""A place between characters: `^`, `$`, `\b`."""

    regex: re.Pattern[str]

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        return frozenset((start,)) if self.regex.match(run.name, start) else frozenset()


@dataclass(eq=False)
class _Look(_Node):
    """`(?=...)`, or `(?!...)` where not `wanted`."""

    node: _Node
    wanted: bool

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        return frozenset((start,)) if bool(run.ends(self.node, start)) == self.wanted else _NOWHERE


@dataclass(eq=False)
class _Sequence(_Node):
    nodes: list[_Node]

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        reached = frozenset((start,))
        for node in self.nodes:
            reached = run.after(node, reached)
            run.count(len(reached))
            if not reached:
                break
        return reached


@dataclass(eq=False)
class _Choice(_Node):
    nodes: list[_Node]

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        return frozenset().union(*(run.ends(node, start) for node in self.nodes))


@dataclass(eq=False)
class _Repeat(_Node):
    """`node` from `least` to `most` times; as often as one likes where `most` is None."""

    node: _Node
    least: int
    most: int | None

    def ends(self, run: _Run, start: int) -> frozenset[int]:
        # After as many rounds as there are places to be, another one changes nothing more: each
        # moves on, or is empty, and then is so again.
        rounds = len(run.name) + 1
        reached = frozenset((start,))
        for _ in range(min(self.least, rounds)):
            reached = run.after(self.node, reached)
            run.count(len(reached))
        found = new = reached
        optional = rounds if self.most is None else min(self.most - self.least, rounds)
        for _ in range(optional):
            new = run.after(self.node, new) - found
            run.count(len(new))
            if not new:
                break
            found |= new
        return found


_NOWHERE: frozenset[int] = frozenset()
_QUANTIFIER = re.compile(r"[*+?]|\{(?!\})(\d*)(,?)(\d*)\}")
_ESCAPES = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDsSwWafnrtv]|[^a-zA-Z0-9])", re.S)
_SET = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.S)


class _Parser:
    """Reads a regex that `re` has found valid."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def parse(self) -> _Node:
        """Return the regex as nodes."""
        return self._choice()

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        if all(isinstance(option, _Words) for option in options):
            return _Words(frozenset().union(*(option.words for option in options)))  # type: ignore[attr-defined]
        return options[0] if len(options) == 1 else _Choice(options)

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        literal = ""
        while self.position < len(self.text) and self.text[self.position] not in "|)":
            character = self._literal()
            if character is not None:
                literal += character
                continue
            if literal:
                nodes.append(_Words(frozenset((literal,))))
                literal = ""
            node = self._atom()
            if node is not None:
                nodes.append(self._quantified(node))
        if literal or not nodes:
            nodes.append(_Words(frozenset((literal,))))
        return nodes[0] if len(nodes) == 1 else _Sequence(nodes)

    def _literal(self) -> str | None:
        """Take a character that stands for itself, once; None if there is none here."""
        here = self.text[self.position]
        width = 1
        if here == "\\":
            here, width = self.text[self.position + 1], 2
            if here.isalnum():
                return None
        elif here in ".^$[(":
            return None
        if _QUANTIFIER.match(self.text, self.position + width):
            return None
        self.position += width
        return here

    def _atom(self) -> _Node | None:
        here = self.text[self.position]
        if here == "(":
            return self._group()
        if here in "^$":
            self.position += 1
            return _Edge(re.compile(here))
        if here == "\\" and self.text[self.position + 1] in "AbBZ":
            self.position += 2
            return _Edge(re.compile(self.text[self.position - 2 : self.position]))
        return _Character(re.compile(self._one_character()).fullmatch)

    def _one_character(self) -> str:
        """Take what matches one character."""
        here = self.text[self.position]
        known = {"[": _SET, "\\": _ESCAPES}.get(here)
        if known is None:
            self.position += 1
            return here if here == "." else re.escape(here)
        found = known.match(self.text, self.position)
        if found is None:
            raise self._refused(self.text[self.position : self.position + 2])
        self.position = found.end()
        return found.group()

    def _group(self) -> _Node | None:
        start = self.position
        self.position += 1
        look = None
        if self._take("?"):
            if self._take("#"):
                self.position = self.text.index(")", self.position) + 1
                return None
            if self._take("P<"):
                self.position = self.text.index(">", self.position) + 1
            elif self._take("=") or self._take("!"):
                look = self.text[self.position - 1]
            elif not self._take(":"):
                raise self._refused(self.text[start : start + 4])
        node = self._choice()
        assert self._take(")")
        return node if look is None else _Look(node, look == "=")

    def _quantified(self, node: _Node) -> _Node:
        found = _QUANTIFIER.match(self.text, self.position)
        if found is None:
            return node
        self.position = found.end()
        if self._take("+"):
            raise self._refused(found.group() + "+")
        self._take("?")  # which of its matches is found first makes no difference here
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found.group(), (0, None))
        if found.group().startswith("{"):
            low, comma, high = found.groups()
            least = int(low or 0)
            most = int(high) if high else None if comma else least
        return _Repeat(node, least, most)

    def _take(self, text: str) -> bool:
        if not self.text.startswith(text, self.position):
            return False
        self.position += len(text)
        return True

    def _refused(self, part: str) -> PatternError:
        return PatternError(f"a regex with {part!r}, which can't be matched in bounded time")
