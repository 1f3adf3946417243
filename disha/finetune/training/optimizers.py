"""The optimizers of torch that the command offers, and how much memory each keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disha.finetune.errors import SettingsError
from disha.finetune.settings import OptimizerName, TrainingSettings

__all__ = ["make_optimizer", "state_bytes", "trained"]

KINDS: Mapping[OptimizerName, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
OPTIONS: Mapping[OptimizerName, Mapping[str, Any]] = {
    "adamw": {"fused": True},
    "sgd": {"momentum": 0.9},
    # Blocks begin at zero. With torch's own eps, their steps would be a thousandth of the rate.
    "adafactor": {"eps": (None, 1.0)},
}


def make_optimizer(objective: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters that require gradients. Call it after `distribute`.

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


def state_bytes(name: OptimizerName, parameter: Tensor) -> int:
    """Return how many bytes an optimizer keeps for a parameter."""
    count = parameter.numel() * (2 if name == "adamw" else 1)
    if name == "adafactor" and parameter.dim() > 1:  # the means of rows and of columns
        *_, rows, columns = parameter.shape
        count = parameter.numel() // columns + parameter.numel() // rows
    return count * parameter.element_size()
