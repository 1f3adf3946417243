"""AdapterConfig: the settings of an adapter, checked once, then frozen; to and from JSON."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from operator import index
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch

from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import layout_of, method_names, method_of
from disha.functional.layouts import Rows
from disha.text import brief

Patterns = str | Sequence[str] | None
"""One regex, several, or none."""

MethodName = Literal["bone", "miss", "bat"] | str
"""A method of the library, or one that a user has registered."""

Init = Literal["zeros", "kaiming"]
INITS = get_args(Init)
LARGEST_SCALE = Fraction(torch.finfo(torch.float32).max)  # numpy would round a float to compare
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
        target: the regex, or several, that is searched in names, or `"all-linear"`. A predicate
            that chooses the targets is recorded as None.
        method: a key of `disha.functional.METHODS`, such as `"bone"` (also called `"miss"`) or
            `"bat"`.
        r_out: size of the output shard, which makes Bone a tile, or None.
        exclude: a regex, or several, of names to leave out, or None.
        rank_pattern: regex of names -> r, or None. The first match wins.
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
        >>> from disha.config import AdapterConfig
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
        for name in ("target", "exclude", "also_train", "rank_pattern", "layouts", "rows"):
            patterns = vars(self)[name]
            for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
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
                tiles = method_names(lambda known: known.tiles)
                raise ArgumentError(f"leave r_out out: only {tiles} has an output shard")
        if self.init not in INITS:
            raise ArgumentError(f"unknown init {brief(self.init)}; allowed are {INITS}")
        values["scale"] = check_scale(self.scale)
        check_type("dropout", self.dropout, (int, float), "a number")
        if not 0.0 <= self.dropout < 1.0:
            raise ArgumentError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        check_dtype(self.dtype)
        if callable(self.target):
            values["target"] = None
        elif self.target is not None and not isinstance(self.target, str):
            values["target"] = as_tuple("target_regex", self.target)
        for name in ("exclude", "also_train"):
            values[name] = as_tuple(name, values[name])
        values["rank_pattern"] = _as_dict("rank_pattern", self.rank_pattern, check_positive_int)
        values["layouts"] = _as_dict(
            "layouts", self.layouts, lambda _, layout: layout_of(layout).pattern
        )
        values["rows"] = _as_dict("rows", self.rows, checked_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return (AdapterConfig.from_json, (self.to_json(),))

    def rank_of(self, *names: str) -> int:
        """Return the r of the module with these dotted names: from `rank_pattern`, or else `r`."""
        return next((self.rank_pattern[p] for p in matching(self.rank_pattern, names)), self.r)

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
        fields = {name: values.get(name, usual) for name, usual in USUAL.items()}
        if fields["init"] not in INITS:
            fields["init"] = cls.init
        dtype = fields["dtype"]
        if isinstance(dtype, str):
            fields["dtype"] = BLOCK_DTYPES.get(dtype, dtype)
        config = object.__new__(cls)
        vars(config).update(fields)
        config._settle()
        return config

    def changed(self, **values: Any) -> AdapterConfig:
        """Return the configuration with some fields changed; values are as for `from_json`."""
        return AdapterConfig.from_json({**self.to_json(), **values})


HINTS = {
    "target": "target_regex",
    "target_modules": "target_regex",
    "lora_alpha": "scale, which is lora_alpha / r",
    "lora_dropout": "dropout",
    "modules_to_save": "also_train",
    "adapter_name": "adapter",
    "trainable_token_indices": "also_train_rows",
}
"""Names of arguments that users of PEFT expect -> those of this library."""

P = ParamSpec("P")
T = TypeVar("T")


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: lists for tuples, and dicts for mappings."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def with_hints(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function say what an argument of another library is called here."""

    @functools.wraps(function)
    def checked(*args: P.args, **named: P.kwargs) -> T:
        for name in HINTS.keys() & named.keys():
            raise ArgumentTypeError(f"there is no argument {name}; write {HINTS[name]}")
        return function(*args, **named)

    return checked


def matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the patterns that are found in any of the names, in order."""
    return [p for p in patterns if any(re.search(p, name) for name in names)]


def check_type(name: str, value: object, types: Any, wanted: str) -> None:
    """Raise unless a value is of one of the types; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, types):
        raise ArgumentTypeError(
            f"{name} must be {wanted}, got {brief(value)} of type {type(value).__name__}"
        )


def check_positive_int(name: str, value: Any) -> int:
    """Return a value that is an int of at least 1."""
    check_type(name, value, int, "an int of at least 1")
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value}")
    return value


def check_scale(scale: Any, name: str = "scale") -> float:
    """Return a number that is finite in float32, its dtype in compiled graphs."""
    check_type(name, scale, Real, "a number")
    if not abs(scale) <= LARGEST_SCALE:
        raise ArgumentError(
            f"{name} must be finite and at most {float(LARGEST_SCALE):.3g}, got {brief(scale)}"
        )
    return float(scale)


def check_dtype(dtype: object) -> None:
    """Raise unless `dtype` is None or one that a block can have."""
    if dtype is not None and dtype not in BLOCK_DTYPES.values():
        allowed = ", ".join(map(str, BLOCK_DTYPES.values()))
        raise ArgumentError(f"a block can't be trained in {brief(dtype)}; allowed are {allowed}")


def as_tuple(name: str, patterns: Any) -> tuple[str, ...]:
    """Return one regex, several, or None as a tuple."""
    if isinstance(patterns, str):
        return (patterns,)
    found = () if patterns is None else patterns
    check_type(name, found, Sequence, "a regex (str) or a list of them")
    for item in found:
        check_type(name, item, str, "a regex (str) or a list of them")
    return tuple(found)


def _as_dict(name: str, value: Any, checked: Callable[[str, Any], Any]) -> Mapping[str, Any]:
    """Return a read-only copy of a dict from regexes to items, which are checked."""
    found = {} if value is None else value
    check_type(name, found, Mapping, "a dict of regex -> value")
    items = {key: checked(f"{name}[{brief(key)}]", item) for key, item in found.items()}
    return MappingProxyType(items)


def checked_rows(name: str, ranges: Any) -> Rows:
    """Check numbers of rows, or ranges of them, and return ranges in order."""
    pairs = []
    try:
        for item in ranges:
            first, stop = (item, item + 1) if isinstance(item, int) else item
            pairs.append((index(first), index(stop)))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"{name} must be a list of row numbers, or of pairs (first, stop) such as (0, 768), "
            f"got {brief(ranges)}"
        ) from error
    rows = tuple(sorted(pairs))
    ends = [end for pair in rows for end in pair]
    if not rows or ends[0] < 0 or ends != sorted(ends) or any(a == b for a, b in rows):
        raise ArgumentError(
            f"{name} must have rows from 0, each once (0 <= first < stop), got {brief(ranges)}"
        )
    return rows


def compile_regex(argument: str, pattern: str) -> re.Pattern[str]:
    """Compile a regex."""
    check_type(argument, pattern, str, "a regex (str)")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(f"{argument} {brief(pattern)} is not a valid regex: {error}") from error


USUAL = {**AdapterConfig(r=1).to_json(), "r": None}
"""The settings that are in no file, because they are the defaults; r has none."""
