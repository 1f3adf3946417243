"""How a setting is spelled on a command line."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import tyro
from tyro.constructors import PrimitiveConstructorSpec

__all__ = ["Switch"]

WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def _switch(words: list[str]) -> bool:
    word = words[0].lower() if words else "true"
    if word not in WORDS:
        raise ValueError(f"True or False is expected, not {words[0]!r}")
    return WORDS[word]


Switch: TypeAlias = Annotated[
    bool,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[True|False]",
        instance_from_str=_switch,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    ),
    tyro.conf.FlagConversionOff,
]
"""A bool given as `--packing`, or with a word as upstream's script takes it: `--bf16 True`."""
