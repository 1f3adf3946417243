"""The parts of every library's list of models: a case, and the model that it builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SEED = 1234
FAINT = 1e-3
"""A smaller constant parameter (a layer scale, a gate) would hide what it multiplies."""


class NotRun(Exception):
    """The plain model can't be built or run in a tiny form. This says nothing about adapters."""


@dataclass
class Built:
    """A model in eval mode, inputs that it runs with, and which class it is."""

    model: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class Case(NamedTuple):
    """One architecture of a library. `build` raises `NotRun` if it can't be built."""

    library: str
    name: str
    build: Callable[[], Built]


def seed() -> None:
    torch.manual_seed(SEED)


def run(built: Built) -> Any:
    """Run the model with its inputs, and the same random numbers each time."""
    seed()
    return built.model(*built.args, **built.kwargs)


def short(error: BaseException, most: int = 150) -> str:
    """Return the kind and the beginning of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


@contextmanager
def building() -> Iterator[None]:
    """Turn any error of a plain model into `NotRun`."""
    try:
        yield
    except Exception as error:
        raise NotRun(short(error)) from None


def tensors(output: Any) -> Iterator[Tensor]:
    """Iterate over all tensors in a model's output, at any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)
    elif hasattr(output, "__dict__") and not isinstance(output, (nn.Module, type)):
        for value in vars(output).values():
            yield from tensors(value)


@torch.no_grad()
def wake(model: nn.Module) -> nn.Module:
    """Give parameters that start at a constant near zero random values.

    Many models start with gates, layer scales or last layers of zeros, so that large parts of them
    would have no effect on the output.
    """
    seed()
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel() or parameter.is_meta:
            continue
        if bool((parameter.abs() <= FAINT).all()) and bool(
            (parameter == parameter.flatten()[0]).all()
        ):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model
