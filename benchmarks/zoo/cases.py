"""The parts of every library's list of models: a case, and the model that it builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Built", "Case", "NotRun", "building", "run", "seed", "tensors", "wake"]

SEED = 1234
FAINT = 1e-3
"""A smaller constant parameter (a layer scale, a gate) would hide what it multiplies."""


class NotRun(Exception):
    """The plain model can't be built or run in a tiny form. This says nothing about adapters."""


@dataclass
class Built:
    """A model in eval mode, and inputs that it runs with.

    Attributes:
        model: the model.
        args: positional inputs.
        kwargs: inputs by name.
        note: which class it is, in short.
    """

    model: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One architecture of a library.

    Attributes:
        library: `"transformers"`, say.
        name: the architecture's name there.
        build: builds it; raises `NotRun` if that can't be done.
    """

    library: str
    name: str
    build: Callable[[], Built]


def seed() -> None:
    """Seed all random choices that follow."""
    torch.manual_seed(SEED)


def run(built: Built) -> Any:
    """Run the model with its inputs, and the same random numbers each time."""
    seed()
    return built.model(*built.args, **built.kwargs)


@contextmanager
def building() -> Iterator[None]:
    """Turn any error of a plain model into `NotRun`."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise NotRun(f"{type(error).__name__}: {text[:200]}") from None


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
