"""AdapterConfig: the settings of an adapter, checked once, then frozen; to and from JSON."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypedDict

import torch

from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import Rows, layout_of, method_names, method_of
from disha.text import brief

__all__ = [
    "ALL_LINEAR",
    "BLOCK_DTYPES",
    "INITS",
    "AdapterConfig",
    "AdapterOptions",
    "check_dtype",
    "check_names",
    "check_number",
    "check_positive_int",
    "check_scale",
    "checked_rows",
    "compile_regex",
    "matching",
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
    """The settings of an adapter: everything but its name and the values in its blocks.

    Args:
        r: shard size, at least 1.
        target: the regex, or several, that is searched in names, or `"all-linear"`; None if a
            predicate chose the targets.
        method: a key of `disha.functional.METHODS`, such as `"bone"` (also called `"miss"`) or
            `"bat"`.
        r_out: size of the output shard, which makes Bone a tile, or None.
        exclude: a regex, or several, of module names to leave out, or None.
        rank_pattern: regex of module names -> r, or None. The first match wins.
        layouts: regex of parameter names -> layout; the name of a module means its `weight`.
        rows: regex of names -> ranges (first, stop) of the outputs to adapt.
        dropout: probability of zeroing each input of the adapter in training.
        scale: factor on the update when the adapter is injected.
        dtype: dtype of the blocks; None for float32, or float64 over a float64 weight.
        init: `"zeros"` (injection changes nothing) or `"kaiming"` (uniform, as in `nn.Linear`).
        also_train: a regex, or several, of parameters to train and save with the adapter.

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
    target: str | Sequence[str] | None = ALL_LINEAR
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
        self._settle()
        targets = (self.target,) if isinstance(self.target, str) else self.target or ()
        for pattern in targets:
            compile_regex("target_regex", pattern)
        for name in ("exclude", "also_train", "rank_pattern", "layouts", "rows"):
            for pattern in vars(self)[name]:
                compile_regex(name, pattern)

    def _settle(self) -> None:
        """Check every field, and convert it to its final type."""
        values = vars(self)
        check_positive_int("r", self.r)
        method = method_of(self.method)
        values["method"] = method.name
        if self.r_out is not None:
            check_positive_int("r_out", self.r_out)
            if not method.tiles:
                raise ArgumentError(
                    f"r_out={self.r_out} was given with method {self.method!r}; only "
                    f"{method_names(lambda one: one.tiles)} has an output shard: leave r_out out, "
                    "or change the method"
                )
        if self.init not in INITS:
            raise ArgumentError(f"unknown init {brief(self.init)}; allowed are {_listing(INITS)}")
        check_scale(self.scale)
        check_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ArgumentError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        check_dtype(self.dtype)
        if self.target is not None and not isinstance(self.target, str):
            values["target"] = _as_tuple("target_regex", self.target)
        for name in ("exclude", "also_train"):
            values[name] = _as_tuple(name, values[name])
        for name, item in (("rank_pattern", "r"), ("layouts", "layout"), ("rows", "row ranges")):
            values[name] = _as_dict(name, values[name], item)
        for pattern, r in self.rank_pattern.items():
            check_positive_int(f"rank_pattern[{brief(pattern)}]", r)
        for pattern, layout in self.layouts.items():
            values["layouts"][pattern] = layout_of(layout).pattern
        for pattern, ranges in self.rows.items():
            values["rows"][pattern] = checked_rows(pattern, ranges)
        for name in ("rank_pattern", "layouts", "rows"):
            values[name] = MappingProxyType(values[name])

    def __reduce__(self) -> tuple[Any, ...]:
        return (AdapterConfig.from_json, (self.to_json(),))

    def rank_of(self, *names: str) -> int:
        """Return the r of the module with these names: from `rank_pattern`, or else `r`.

        Args:
            names: the dotted names of the module; a shared module has several.
        """
        if not self.rank_pattern:
            return self.r
        return next((self.rank_pattern[p] for p in matching(self.rank_pattern, names)), self.r)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a dict of plain JSON values."""
        return {
            **vars(self),
            "target": list(self.target) if isinstance(self.target, tuple) else self.target,
            "exclude": list(self.exclude),
            "also_train": list(self.also_train),
            "rank_pattern": dict(self.rank_pattern),
            "layouts": dict(self.layouts),
            "rows": {key: [list(one) for one in rows] for key, rows in self.rows.items()},
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Return the configuration from the result of `to_json`.

        Its regexes are only a record of how targets were chosen. They are not compiled, because a
        regex in a file from a stranger can take hours to compile.

        Args:
            values: the dict; absent fields take their defaults.

        Raises:
            ArgumentError: a field is unknown or has a value that is not allowed.
            ArgumentTypeError: a field is of the wrong type, or `values` is not a dict.
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
            raise ArgumentError(
                "the adapter configuration lacks the field 'r'; give the shard size"
            )
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
        vars(config).update(vars(cls(r=1)), **arguments)
        config._settle()
        return config

    def changed(self, **values: Any) -> AdapterConfig:
        """Return the configuration with some fields changed.

        Args:
            values: field -> value, as in the result of `to_json`.

        Raises:
            ArgumentError: a field is unknown or has a value that is not allowed.
            ArgumentTypeError: a field is of the wrong type.
        """
        return AdapterConfig.from_json({**self.to_json(), **values})


class AdapterOptions(TypedDict, total=False):
    """The arguments of `inject_adapters` besides the model, the target and r."""

    adapter: str
    freeze: bool
    method: str
    layouts: Mapping[str, str] | None
    rows: Mapping[str, Sequence[tuple[int, int]]] | None
    r_out: int | None
    exclude: str | Sequence[str] | None
    rank_pattern: Mapping[str, int] | None
    dropout: float
    scale: float
    dtype: torch.dtype | None
    init: str
    also_train: str | Sequence[str] | None


HINTS = {
    "target_modules": "target_regex",
    "lora_alpha": "scale, which is lora_alpha / r",
    "lora_dropout": "dropout",
    "modules_to_save": "also_train",
    "adapter_name": "adapter",
}
"""PEFT's names of arguments -> those of this library."""


def check_names(options: Iterable[str]) -> None:
    """Raise if an option is unknown; say what PEFT's options are called here."""
    for name in options:
        if name not in AdapterOptions.__annotations__:
            known = HINTS.get(name, f"one of {', '.join(AdapterOptions.__annotations__)}")
            raise ArgumentTypeError(f"there is no argument {name}; write {known}")


def matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the patterns that are found in any of the names, in order."""
    return [p for p in patterns if any(re.search(p, name) for name in names)]


def _listing(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))


def _wrong_type(name: str, wanted: str, value: object) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"{name} must be {wanted}, got {brief(value)} of type {type(value).__name__}"
    )


def check_positive_int(name: str, value: object) -> None:
    """Raise unless a value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, "an int of at least 1", value)
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value}")


def check_number(name: str, value: object) -> None:
    """Raise unless a value is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong_type(name, "a number", value)


def check_scale(scale: Any, name: str = "scale") -> None:
    """Raise unless `scale` is a number that is finite in float32, its dtype in compiled graphs."""
    check_number(name, scale)
    if not abs(scale) <= LARGEST_SCALE:
        raise ArgumentError(
            f"{name} must be finite and at most {LARGEST_SCALE:.3g}, got {brief(scale)}"
        )


def check_dtype(dtype: object) -> None:
    """Raise unless `dtype` is None or one that a block can have."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise _wrong_type("dtype", "a torch.dtype such as torch.float32", dtype)
    if dtype not in BLOCK_DTYPES.values():
        raise ArgumentError(
            f"a block can't be trained in {dtype}; allowed are {_listing(BLOCK_DTYPES)}"
        )


def _dtype_named(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in BLOCK_DTYPES:
        raise ArgumentError(f"unknown dtype {brief(name)}; allowed are {_listing(BLOCK_DTYPES)}")
    return BLOCK_DTYPES[name]


def _as_tuple(name: str, patterns: object) -> tuple[str, ...]:
    """Return one regex, several, or None as a tuple."""
    if patterns is None:
        return ()
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise _wrong_type(name, "a regex (str) or a list of them", patterns)
    return tuple(patterns)


def _as_dict(name: str, value: object, item: str) -> dict[Any, Any]:
    """Return a copy of a mapping from regexes to items; an empty one for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value):
        raise _wrong_type(name, f"a dict of regex -> {item}", value)
    return dict(value)


def checked_rows(name: str, ranges: object) -> Rows:
    """Check ranges of rows and return them in order."""
    if not isinstance(ranges, (list, tuple)) or not ranges or not all(map(_is_pair, ranges)):
        raise ArgumentTypeError(
            f"rows of {brief(name)} must be a list of pairs (first, stop) of ints, such as "
            f"[(0, 768)], got {brief(ranges)}"
        )
    ordered: Rows = tuple(sorted((first, stop) for first, stop in ranges))
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


def _is_pair(value: object) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(isinstance(end, int) and not isinstance(end, bool) for end in value)  # type: ignore[attr-defined]


def compile_regex(argument: str, pattern: str) -> re.Pattern[str]:
    """Compile a regex."""
    if not isinstance(pattern, str):
        raise _wrong_type(argument, "a regex (str)", pattern)
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(f"{argument} {brief(pattern)} is not a valid regex: {error}") from error
