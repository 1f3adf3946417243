"""Which layers a PEFT configuration means, and how to name given layers so that it means no other.

PEFT looks at every module of a model, under the first name that it is reached by. A list of
targets means the modules with these names or with names that end in a dot and one of them; a regex
has to match the whole name. What `exclude_modules` means in the same way, and what is in a module
of `modules_to_save`, is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from disha.interop.patterns import Pattern, PatternError

__all__ = ["Targets", "exact_regex", "exact_targets", "is_plain", "saved_by"]

ALL_LINEAR = "all-linear"
"""What PEFT takes for every linear layer but the output; it saves the names of those instead."""


class Targets:
    """The layers that a configuration selects, by name.

    Args:
        target: `target_modules`; None or "all-linear" where the model decides.
        exclude: `exclude_modules`.
        saved: `modules_to_save`.
        layers: `layers_to_transform`: the numbers of the layers that a list of targets means.
        layers_pattern: what is in front of that number; any name where it is empty.

    Raises:
        PatternError: a regex can't be matched in bounded time; the message names its field.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None = None,
        saved: Sequence[str] = (),
        layers: Sequence[int] = (),
        layers_pattern: Sequence[str] = (),
    ) -> None:
        self.decided_by_model = target is None or (
            isinstance(target, str) and target.lower() == ALL_LINEAR
        )
        self._target = _Names("target_modules", target or ())
        self._exclude = _Names("exclude_modules", exclude or ())
        self._saved = frozenset(saved)
        self._layers = frozenset(layers)
        # Without a pattern, any name stands in front of the number, and something before that.
        self._before: list[list[str] | None] = [one.split(".") for one in layers_pattern] or [None]

    def selects(self, name: str) -> bool:
        """Whether PEFT adapts the module of that name, if the model does not decide it."""
        if self.leaves_out(name) or not self._target.means(name):
            return False
        numbered = not self._layers or self._target.is_regex or self._target.lists(name)
        return numbered or self._number(name) in self._layers

    def leaves_out(self, name: str) -> bool:
        """Whether the module of that name is excluded, or in one that is saved whole."""
        # PEFT reads a saved module's name as a regex, to find it anywhere in the other. Its dots
        # are taken for dots here: that they stand for any character was hardly meant.
        return self._exclude.means(name) or any(run in self._saved for run in _runs(name))

    def _number(self, name: str) -> int | None:
        """Return the number of the layer that a module is in, or None."""
        parts = name.split(".")
        for before in self._before:
            first = 2 if before is None else len(before)
            for place in range(first, len(parts) - 1):
                fits = before is None or parts[place - len(before) : place] == before
                if fits and re.fullmatch(r"\d+", parts[place]):
                    return int(parts[place])
        return None


class _Names:
    """Module names, as a regex or as a list of their ends."""

    def __init__(self, field: str, names: str | Sequence[str]) -> None:
        self.is_regex = isinstance(names, str)
        self._pattern = _compiled(field, names) if isinstance(names, str) else None
        self._ends = frozenset() if isinstance(names, str) else frozenset(names)

    def lists(self, name: str) -> bool:
        """Whether it is in the list as it is."""
        return name in self._ends

    def means(self, name: str) -> bool:
        """Whether the module of that name is meant."""
        if self._pattern is not None:
            return self._pattern.fullmatch(name)
        return any(end in self._ends for end in _ends(name))


def _compiled(field: str, regex: str) -> Pattern:
    try:
        return Pattern(regex)
    except PatternError as error:
        raise PatternError(f"{field} is {error}") from error


def _ends(name: str) -> Iterable[str]:
    """Return the name and everything in it that follows a dot."""
    places = [-1, *(place for place, character in enumerate(name) if character == ".")]
    return (name[place + 1 :] for place in places)


def _runs(name: str) -> Iterable[str]:
    """Return all parts of a name between dots, one or several together."""
    parts = name.split(".")
    places = itertools.combinations(range(len(parts) + 1), 2)
    return (".".join(parts[start:stop]) for start, stop in places)


def saved_by(modules_to_save: Iterable[str], name: str) -> bool:
    """Whether PEFT trains and saves the module of that name: by the end of it, dot or not."""
    return name.endswith(tuple(modules_to_save))


def is_plain(name: str) -> bool:
    """Whether a name means itself where PEFT reads it as a regex."""
    return re.fullmatch(r"[\w.\-]+", name) is not None


def exact_targets(adapted: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    r"""Return `target_modules` that select the adapted layers and no other module.

    The last parts of their names where that does it, as PEFT's users write it, else a regex.

    Args:
        adapted: names of the layers to select.
        modules: names of all modules of the model.

    Examples:
        >>> from disha.interop.targets import exact_targets
        >>> exact_targets(["0.q", "1.q"], ["0", "0.q", "0.k", "1", "1.q", "1.k"])
        ['q']
        >>> exact_targets(["0.q"], ["0", "0.q", "0.k", "1", "1.q", "1.k"])
        '0\\.q'
    """
    wanted = set(adapted)
    ends = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    means = _Names("target_modules", ends).means
    if {name for name in modules if name and means(name)} == wanted:
        return ends
    return exact_regex(wanted)


def exact_regex(names: Iterable[str]) -> str:
    r"""Return a regex that matches these names in full, and no others.

    Examples:
        >>> from disha.interop.targets import exact_regex
        >>> exact_regex(["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"])
        'layers\\.(0|1)\\.(q|v)'
    """
    return _regex(sorted(name.split(".") for name in set(names)))


def _regex(names: list[list[str]]) -> str:
    """Return the regex of names that are cut at their dots."""
    below: dict[str, list[list[str]]] = {}
    for first, *rest in names:
        below.setdefault(first, []).append(rest)
    alike: dict[str, list[str]] = {}
    for first, rests in below.items():
        alike.setdefault(_tail(rests), []).append(first)
    options = [
        _any([re.escape(first) for first in firsts]) + tail for tail, firsts in alike.items()
    ]
    return _any(options)


def _tail(rests: list[list[str]]) -> str:
    """Return the regex of what follows a part of a name."""
    longer = [rest for rest in rests if rest]
    if not longer:
        return ""
    tail = r"\." + _regex(longer)
    return tail if len(longer) == len(rests) else f"({tail})?"


def _any(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"
