"""The optimisers of torch that the command offers, and what each keeps of a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disha.finetune.errors import SettingsError
from disha.finetune.settings import OptimizerName, TrainingSettings

__all__ = ["expected_state", "make_optimizer", "state_bytes", "trained"]

KINDS: Mapping[OptimizerName, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
OPTIONS: Mapping[OptimizerName, Mapping[str, Any]] = {
    "adamw": {"fused": True},
    "sgd": {"momentum": 0.9},
    # Blocks begin at zero. With torch's own eps, a step would be a thousandth of the rate there.
    "adafactor": {"eps": (None, 1.0)},
}


def make_optimizer(objective: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return an optimiser of the parameters that require gradients. Call it after `distribute`.

    Raises:
        SettingsError: no parameter requires gradients.
    """
    parameters = trained(objective)
    if not parameters:
        raise SettingsError(
            "no parameter of the model requires gradients; there is nothing to train"
        )
    kind: Any = KINDS[settings.optimizer]
    optimizer: torch.optim.Optimizer = kind(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        **OPTIONS[settings.optimizer],
    )
    return optimizer


def trained(objective: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]


def expected_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor that an optimiser keeps of a parameter.

    Args:
        optimizer: from `make_optimizer`.
        parameter: the parameter.
    """
    name = next(name for name, kind in KINDS.items() if type(optimizer) is kind)
    shapes = _moments(name, parameter.shape)
    state = {key: (torch.Size(shape), parameter.dtype) for key, shape in shapes.items()}
    return state if name == "sgd" else {"step": (torch.Size(), torch.float32), **state}


def state_bytes(name: OptimizerName, parameter: Tensor) -> int:
    """Return how many bytes an optimiser keeps of a parameter."""
    count = sum(math.prod(shape) for shape in _moments(name, parameter.shape).values())
    return count * parameter.element_size()


def _moments(name: OptimizerName, shape: Sequence[int]) -> dict[str, Sequence[int]]:
    if name == "sgd":
        return {"momentum_buffer": shape}
    if name == "adamw":
        return {"exp_avg": shape, "exp_avg_sq": shape}
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
