"""AdapterConfig: what an adapter is, validated once, frozen, to and from JSON."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import Rows, layout_of, method_of
from disha.text import brief

__all__ = [
    "ALL_LINEAR",
    "BLOCK_DTYPES",
    "INITS",
    "AdapterConfig",
    "as_patterns",
    "check_adapter_name",
    "check_dtype",
    "check_scale",
    "checked_rows",
]

INITS = ("zeros", "kaiming")
LARGEST_SCALE = torch.finfo(torch.float32).max
BLOCK_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
ALL_LINEAR = "all-linear"
"""The target that means every linear layer except an output head tied to an embedding."""


@dataclass(frozen=True)
class AdapterConfig:
    """Everything that describes an adapter, apart from its numbers and its name.

    Args:
        r: shard size; a block has r rows. At least 1.
        target: the regex searched in module names, or `"all-linear"`; None where the targets
            were chosen by a predicate.
        method: `"bone"` (which `"miss"` means too) or `"bat"`.
        r_out: size of the output shard; turns Bone into a tile. None for none.
        exclude: regexes of module names to leave out.
        rank_pattern: regex of module names -> r, the first that is found wins.
        layouts: regex of names of parameters, or of modules for their `weight` -> layout.
        rows: regex of names -> ranges (first, stop) of the outputs to adapt, the others stay.
        dropout: probability with which the adapter's input is zeroed in training.
        scale: factor on the adapter's update when it is injected.
        dtype: dtype of the blocks; None for the weight's own.
        init: `"zeros"` (injection changes nothing) or `"kaiming"` (uniform, as `nn.Linear`'s).
        also_train: regexes of parameter names that are trained and saved with the adapter.

    Raises:
        ArgumentError: a value is out of range, or a regex does not compile.
        ArgumentTypeError: a value is of the wrong type.

    Examples:
        >>> from disha import AdapterConfig
        >>> config = AdapterConfig(r=8, target="attn", rank_pattern={"v_proj": 4})
        >>> config.rank_of("layers.0.attn.v_proj"), config.rank_of("layers.0.attn.q_proj")
        (4, 8)
        >>> AdapterConfig.from_json(config.to_json()) == config
        True
    """

    r: int
    target: str | None = ALL_LINEAR
    method: str = "bone"
    r_out: int | None = None
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    layouts: Mapping[str, str] = field(default_factory=dict, hash=False)
    rows: Mapping[str, Rows] = field(default_factory=dict, hash=False)
    dropout: float = 0.0
    scale: float = 1.0
    dtype: torch.dtype | None = None
    init: str = "zeros"
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._settle(compile_regex)

    def _settle(self, check_regex: Callable[[str, object], object]) -> None:
        """Check every field, and let none of them change any more."""
        _check_positive_int("r", self.r)
        if self.method == "miss":
            object.__setattr__(self, "method", "bone")
        method = method_of(self.method)
        if self.r_out is not None:
            _check_positive_int("r_out", self.r_out)
            if not method.tiles:
                raise ArgumentError(
                    f"r_out={self.r_out} was given with method {self.method!r}; an output shard "
                    "exists for 'bone' only: leave r_out out, or use method='bone'"
                )
        if self.init not in INITS:
            raise ArgumentError(f"unknown init {brief(self.init)}; allowed are {_listing(INITS)}")
        _check_dropout(self.dropout)
        check_scale(self.scale)
        check_dtype(self.dtype)
        _check_rank_pattern(self.rank_pattern, check_regex)
        if self.target is not None:
            check_regex("target_regex", self.target)
        for name in ("exclude", "also_train"):
            object.__setattr__(self, name, as_patterns(name, getattr(self, name), check_regex))
        object.__setattr__(self, "rank_pattern", MappingProxyType(dict(self.rank_pattern)))
        layouts = _checked_layouts(self.layouts, check_regex)
        object.__setattr__(self, "layouts", MappingProxyType(layouts))
        object.__setattr__(self, "rows", MappingProxyType(_checked_rows(self.rows, check_regex)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (AdapterConfig.from_json, (self.to_json(),))

    def rank_of(self, *names: str) -> int:
        """Return the r of the module with these names, by `rank_pattern` or else `r`.

        Args:
            names: the dotted name of the module; several where it is shared.
        """
        for pattern, r in self.rank_pattern.items():
            if any(re.search(pattern, name) for name in names):
                return r
        return self.r

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a dict of plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["exclude"], values["also_train"] = list(self.exclude), list(self.also_train)
        values["rank_pattern"] = dict(self.rank_pattern)
        values["layouts"] = dict(self.layouts)
        values["rows"] = {key: [list(one) for one in rows] for key, rows in self.rows.items()}
        values["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Return the configuration that `to_json` gave.

        Its regexes say what once was asked for. They are not compiled: in a file from a stranger,
        one can be such that compiling it takes hours.

        Args:
            values: the dict; absent fields take their defaults.

        Raises:
            ArgumentError: a field is unknown or has a value that is not allowed.
            ArgumentTypeError: a field is of the wrong type, or `values` is no dict.
        """
        if not isinstance(values, Mapping):
            raise ArgumentTypeError(
                f"an adapter configuration must be a JSON object, got {type(values).__name__}"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ArgumentError(
                f"unknown fields in the adapter configuration: {_listing(unknown)}; "
                f"known are {_listing(sorted(known))}"
            )
        if "r" not in values:
            raise ArgumentError("the adapter configuration lacks the field 'r'")
        for name in ("exclude", "also_train"):
            if not isinstance(values.get(name, []), list):
                raise ArgumentTypeError(
                    f"the field {name!r} of an adapter configuration must be a JSON array, "
                    f"got {type(values[name]).__name__}"
                )
        arguments = dict(values)
        if arguments.get("dtype") is not None:
            arguments["dtype"] = _dtype_named(arguments["dtype"])
        config = object.__new__(cls)
        for name, value in {**vars(cls(r=1)), **arguments}.items():
            object.__setattr__(config, name, value)
        config._settle(_check_regex_type)
        return config

    def changed(self, **values: Any) -> AdapterConfig:
        """Return the configuration with some fields changed.

        Args:
            values: field -> value, as `to_json` has it.

        Raises:
            ArgumentError: a field is unknown or has a value that is not allowed.
            ArgumentTypeError: a field is of the wrong type.
        """
        return AdapterConfig.from_json({**self.to_json(), **values})


def _listing(values: Sequence[str]) -> str:
    return ", ".join(map(repr, values))


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(
            f"{name} must be an int of at least 1, got {brief(value)} of type "
            f"{type(value).__name__}"
        )
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_scale(scale: object, name: str = "scale") -> None:
    """Raise unless `scale` is a number that is finite as float32, which graphs read it in."""
    if not _is_number(scale):
        raise ArgumentTypeError(
            f"{name} must be a number, got {brief(scale)} of type {type(scale).__name__}"
        )
    if not abs(scale) <= LARGEST_SCALE:  # type: ignore[arg-type]
        raise ArgumentError(
            f"{name} must be finite and at most {LARGEST_SCALE:.3g}, got {str(scale)[:40]}"
        )


def _check_dropout(dropout: object) -> None:
    if not _is_number(dropout):
        raise ArgumentTypeError(
            f"dropout must be a number, got {brief(dropout)} of type {type(dropout).__name__}"
        )
    if not 0.0 <= dropout < 1.0:  # type: ignore[operator]
        raise ArgumentError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_dtype(dtype: object) -> None:
    """Raise unless `dtype` is None or one that a block can have."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(
            f"dtype must be a torch.dtype such as torch.float32, got {dtype!r} "
            f"of type {type(dtype).__name__}"
        )
    if dtype not in BLOCK_DTYPES.values():
        raise ArgumentError(
            f"a block can't be trained in {dtype}; allowed are {_listing(list(BLOCK_DTYPES))}"
        )


def _dtype_named(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in BLOCK_DTYPES:
        raise ArgumentError(
            f"unknown dtype {brief(name)}; allowed are {_listing(list(BLOCK_DTYPES))}"
        )
    return BLOCK_DTYPES[name]


def _require_mapping(name: str, value: object, item: str) -> Mapping[Any, Any]:
    """Return a mapping from regexes, or raise and say what it maps them to."""
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(
            f"{name} must be a dict of regex -> {item}, "
            f"got {brief(value)} of type {type(value).__name__}"
        )
    return value


def _check_rank_pattern(rank_pattern: object, check_regex: Callable[[str, object], object]) -> None:
    for pattern, r in _require_mapping("rank_pattern", rank_pattern, "r").items():
        check_regex("rank_pattern", pattern)
        _check_positive_int(f"rank_pattern[{brief(pattern)}]", r)


def _checked_layouts(
    layouts: object, check_regex: Callable[[str, object], object]
) -> dict[str, str]:
    given = _require_mapping("layouts", layouts, "layout")
    for pattern in given:
        check_regex("layouts", pattern)
    return {pattern: layout_of(layout).pattern for pattern, layout in given.items()}


def _checked_rows(rows: object, check_regex: Callable[[str, object], object]) -> dict[str, Rows]:
    given = _require_mapping("rows", rows, "list of (first, stop)")
    for pattern in given:
        check_regex("rows", pattern)
    return {pattern: checked_rows(pattern, ranges) for pattern, ranges in given.items()}


def checked_rows(name: str, ranges: object) -> Rows:
    """Return ranges of rows in their order, each of them checked.

    Raises:
        ArgumentError: a range is empty or negative, or two overlap.
        ArgumentTypeError: they are no list of pairs of ints.
    """
    pairs = isinstance(ranges, (list, tuple)) and all(
        isinstance(one, (list, tuple))
        and len(one) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in one)
        for one in ranges
    )
    if not pairs or not ranges:
        raise ArgumentTypeError(
            f"rows of {brief(name)} must be a list of pairs (first, stop) of ints, such as "
            f"[(0, 768)], got {brief(ranges)}"
        )
    ordered: Rows = tuple(sorted((first, stop) for first, stop in ranges))  # type: ignore[attr-defined]
    for first, stop in ordered:
        if not 0 <= first < stop:
            raise ArgumentError(
                f"rows of {brief(name)} must have 0 <= first < stop, got {(first, stop)}"
            )
    for before, after in itertools.pairwise(ordered):
        if after[0] < before[1]:
            raise ArgumentError(
                f"rows of {brief(name)} must not overlap, and {before} and {after} do"
            )
    return ordered


def compile_regex(argument: str, pattern: object) -> re.Pattern[str]:
    """Compile `pattern`, or raise an error that names the argument it came from."""
    text = _check_regex_type(argument, pattern)
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(f"{argument} {brief(text)} is not a valid regex: {error}") from error


def _check_regex_type(argument: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise ArgumentTypeError(
            f"{argument} must be a regex (str), got {brief(pattern)} of type "
            f"{type(pattern).__name__}"
        )
    return pattern


def as_patterns(
    argument: str,
    patterns: str | Sequence[str] | None,
    check_regex: Callable[[str, object], object] = compile_regex,
) -> tuple[str, ...]:
    """Return one regex, several or None as a tuple of regexes, each of them checked."""
    if patterns is None:
        return ()
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not isinstance(patterns, Sequence):
        raise ArgumentTypeError(
            f"{argument} must be a regex or a list of them, "
            f"got {brief(patterns)} of type {type(patterns).__name__}"
        )
    for pattern in patterns:
        check_regex(argument, pattern)
    return tuple(patterns)


def check_adapter_name(adapter: object) -> str:
    """Return `adapter` if it can name an adapter, else raise.

    An adapter's name becomes a part of state-dict keys and a sub-module's name, so it must be a
    non-empty str without a dot, and none that `nn.Module` uses itself, such as "train".
    """
    if not isinstance(adapter, str):
        raise ArgumentTypeError(
            f"an adapter's name must be a str, got {adapter!r} of type {type(adapter).__name__}"
        )
    if not adapter:
        raise ArgumentError("an adapter's name must not be empty")
    if "." in adapter:
        raise ArgumentError(
            f"adapter name {adapter!r} has a dot, which separates names in state-dict keys; "
            f"use {adapter.replace('.', '_')!r}, say"
        )
    # asked anew each time: other libraries add attributes to nn.Module
    if adapter in _RESERVED_NAMES or hasattr(nn.Module, adapter):
        raise ArgumentError(
            f"adapter name {adapter!r} is an attribute of nn.Module; use {adapter + '_'!r}, say"
        )
    return adapter


_RESERVED_NAMES = frozenset(dir(nn.Module())) | {
    # what the holder of a layer's adapters has besides
    "acting",
    "activate",
    "active",
    "add",
    "blocks",
    "discard",
    "enabled",
    "live",
    "merged",
    "route",
    "routed",
    "set_enabled",
    "__contains__",
    "__getitem__",
    "__iter__",
    "__len__",
}
