"""AdapterConfig: the settings of an adapter, checked once, then frozen; to and from JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from inspect import signature
from operator import index
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from disha.checks import (
    BLOCK_DTYPES,
    check_dtype,
    check_positive_int,
    check_regexes,
    check_scale,
    check_type,
    compile_regex,
)
from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import Method, layout_of, method_names, method_of
from disha.functional.layouts import OutputRanges
from disha.functional.method import ALL_GROUPS, Groups
from disha.text import brief

Patterns = str | Sequence[str] | None
"""One regex, several, or none."""

Target = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""One regex, several, `"all-linear"`, or a predicate (name, module) -> whether to adapt it."""

MethodName = Literal["bone", "miss", "bat", "lora"] | str
"""A method of the library, or one that a user has registered."""

Init = Literal["zeros", "kaiming"]
INITS = get_args(Init)

ALL_LINEAR = "all-linear"
"""The target that means every linear layer except an output head tied to an embedding."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter: everything but its name and the values in its blocks.

    Args:
        r: shard size, at least 1.
        target: the regex, or several, that is searched in names, or `"all-linear"`. A predicate
            that chooses the targets is recorded as None.
        method: `"bone"` (also called `"miss"`), `"bat"`, `"lora"`, or a method that
            `register_method` has added.
        r_out: size of the output shard, which makes Bone a tile, or None.
        groups: number of groups of shards, or `"all"` for one group for each shard: each
            output sees the shards of its own group. It becomes a part of the method's name, where
            to read it.
        exclude: a regex, or several, of names to leave out, or None.
        rank_pattern: regex of names -> r, or None. The first match wins.
        layouts: regex of parameter names -> layout, if none is known; the name of a module means
            its `weight`.
        rows: regex of names -> ranges (first, stop) of the outputs to adapt.
        dropout: probability of zeroing each input of the adapter in training.
        scale: factor on the update when the adapter is injected.
        dtype: dtype of the blocks; None for float32, or float64 over a float64 weight. Over a
            complex weight, it is always complex64.
        init: `"zeros"` (injection changes nothing) or `"kaiming"` (uniform, as in `nn.Linear`).
        also_train: a regex, or several, of parameters to train and save with the adapter.

    Raises:
        ArgumentError: a value is out of range, or a regex does not compile.
        ArgumentTypeError: a value is of the wrong type.

    Examples:
        >>> from disha.config import AdapterConfig
        >>> config = AdapterConfig(r=8, target="attn", rank_pattern={"v_proj": 4})
        >>> config.rank_of("layers.0.attn.v_proj"), config.rank_of("layers.0.attn.q_proj")
        (4, 8)
        >>> AdapterConfig.from_json(config.to_json()) == config
        True
    """

    r: int
    _: KW_ONLY
    target: str | tuple[str, ...] | None = ALL_LINEAR
    method: str = "bone"
    r_out: int | None = None
    groups: InitVar[Groups] = 1
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    layouts: Mapping[str, str] = field(default_factory=dict, hash=False)
    rows: Mapping[str, OutputRanges] = field(default_factory=dict, hash=False)
    dropout: float = 0.0
    scale: float = 1.0
    dtype: torch.dtype | None = None
    init: str = "zeros"
    also_train: tuple[str, ...] = ()

    def __post_init__(self, groups: Groups) -> None:
        self._check(groups)
        regexes = vars(self) | {"target": check_regexes("target", self.target)}
        for name in ("target", "exclude", "also_train", "rank_pattern", "layouts", "rows"):
            for regex in regexes[name]:
                compile_regex(name, regex)

    def _check(self, groups: Groups) -> None:
        """Check every setting, and store it in its final type."""
        check_positive_int("r", self.r)
        method = _method_with_groups(method_of(self.method), groups)
        if self.r_out is not None:
            check_positive_int("r_out", self.r_out)
            if not method.tiles:
                tiles = method_names(lambda known: known.tiles)
                leave_out = "r_out" if groups == 1 else "r_out or groups"
                raise ArgumentError(
                    f"leave {leave_out} out: only {tiles} has an output shard, and the method is "
                    f"{method.name!r}"
                )
        if self.init not in INITS:
            raise ArgumentError(f"unknown init {brief(self.init)}; allowed are {INITS}")
        check_type("dropout", self.dropout, (int, float), "a number")
        if not 0.0 <= self.dropout < 1.0:
            raise ArgumentError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        check_dtype(self.dtype)
        final: dict[str, Any] = {"method": method.name, "scale": check_scale(self.scale)}
        if callable(self.target):
            final["target"] = None
        elif not isinstance(self.target, str | None):
            final["target"] = check_regexes("target_regex", self.target)
        for name in ("exclude", "also_train"):
            final[name] = check_regexes(name, getattr(self, name))
        for name, check in _ITEM_CHECKS.items():
            final[name] = check_items(name, getattr(self, name), check)
        vars(self).update(final)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], **others: Any) -> AdapterConfig:
        """Return the configuration that a function got as arguments, and others: its `locals()`."""
        given = {name: arguments[name] for name in SETTINGS if name in arguments}
        return cls(**(given | others))

    def __reduce__(self) -> tuple[Any, ...]:
        return (AdapterConfig.from_json, (self.to_json(),))

    def rank_of(self, *names: str) -> int:
        """Return the r of the module with these dotted names: from `rank_pattern`, or else `r`."""
        pattern = find_first_match(self.rank_pattern, names)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a dict of plain JSON values."""
        return as_json(vars(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Return the configuration from the result of `to_json`.

        Its regexes are only a record of how targets were chosen. They are not compiled, because a
        regex in a file from a stranger can take hours to compile.

        Args:
            values: the dict; absent fields take their defaults. Fields of later versions are left
                out, and so is an `init` that is unknown here: blocks have their values already.

        Raises:
            ArgumentError: a field has a value that is not allowed.
            ArgumentTypeError: a field is of the wrong type, or `values` is not a dict.
        """
        check_type("an adapter configuration", values, Mapping, "a JSON object")
        settings = {name: values.get(name, default) for name, default in DEFAULTS.items()}
        if settings["init"] not in INITS:
            settings["init"] = DEFAULTS["init"]
        dtype = settings["dtype"]
        if isinstance(dtype, str):
            settings["dtype"] = BLOCK_DTYPES.get(dtype, dtype)
        config = object.__new__(cls)
        vars(config).update(settings)
        config._check(groups=1)
        return config

    def changed(self, **values: Any) -> AdapterConfig:
        """Return the configuration with some fields changed; values are as for `from_json`."""
        return AdapterConfig.from_json({**self.to_json(), **values})


def _method_with_groups(method: Method, groups: Any) -> Method:
    """Return a method with groups of shards, or raise if it can't have them."""
    if groups != ALL_GROUPS:
        check_type("groups", groups, int, f"an int of at least 1, or {ALL_GROUPS!r}")
        check_positive_int("groups", groups)
    grouped = method.with_groups(groups)
    if grouped is None:
        with_groups = method_names(lambda known: known.with_groups(groups) is not None)
        raise ArgumentError(
            f"leave groups out: only {with_groups} takes them, and the method is {method.name!r}"
        )
    return grouped


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: lists for tuples, and dicts for mappings."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def find_matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the patterns that are found in any of the names, in order."""
    found = []
    for pattern in patterns:
        for name in names:
            if re.search(pattern, name):
                found.append(pattern)
                break
    return found


def find_first_match(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the first pattern that is found in any of the names, or None."""
    for pattern in patterns:
        for name in names:
            if re.search(pattern, name):
                return pattern
    return None


def check_items(name: str, value: Any, check: Callable[[str, Any], Any]) -> Mapping[str, Any]:
    """Return a read-only copy of a dict from regexes to items, each checked."""
    if value is None:
        value = {}
    check_type(name, value, Mapping, "a dict of regex -> value")
    items = {key: check(f"{name}[{brief(key)}]", item) for key, item in value.items()}
    return MappingProxyType(items)


def check_ranges(name: str, ranges: Any) -> OutputRanges:
    """Return ranges (first, stop) of rows in order; a single pair is one range."""
    return _check_rows(name, ranges, _read_ranges, "pairs (first, stop) such as (0, 768)")


def check_row_numbers(name: str, numbers: Any) -> OutputRanges:
    """Return numbers of rows, and ranges (first, stop) of them, as ranges in order."""
    return _check_rows(
        name, numbers, _read_numbers, "a list of row numbers, or of pairs (first, stop)"
    )


def _check_rows(
    name: str, rows: Any, read: Callable[[Any], Iterable[tuple[int, int]]], expected: str
) -> OutputRanges:
    try:
        ranges = tuple(sorted(read(rows)))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} must be {expected}, got {brief(rows)}") from error
    if not ranges or not _are_apart(ranges):
        raise ArgumentError(
            f"{name} must have rows from 0, each once (0 <= first < stop), got {brief(rows)}"
        )
    return ranges


def _read_ranges(ranges: Any) -> list[tuple[int, int]]:
    items = list(ranges)  # an iterator gives them once
    try:
        return _read_pairs(items)
    except TypeError:  # numbers can't be unpacked
        return _read_pairs([items])


def _read_numbers(numbers: Any) -> list[tuple[int, int]]:
    pairs = []
    for item in numbers:
        try:
            number = index(item)  # an integer of Python, numpy or torch
            pairs.append((number, number + 1))
        except (TypeError, ValueError):
            pairs += _read_pairs([item])
    return pairs


def _read_pairs(pairs: Any) -> list[tuple[int, int]]:
    return [(index(first), index(stop)) for first, stop in pairs]


def _are_apart(ranges: OutputRanges) -> bool:
    """Whether ranges in order start at 0 or later, are not empty, and do not overlap."""
    end = 0
    for first, stop in ranges:
        if first < end or stop <= first:
            return False
        end = stop
    return True


_ITEM_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "rank_pattern": check_positive_int,
    "layouts": lambda name, layout: layout_of(layout).pattern,
    "rows": check_ranges,
}
"""Setting that is a dict of regexes -> the check of each of its items."""

SETTINGS = tuple(signature(AdapterConfig).parameters)
"""The names of all settings, as arguments."""

DEFAULTS = {**AdapterConfig(r=1).to_json(), "r": None}
"""The settings that are in no file, because they are the defaults; r has none."""
