"""Train several adapters at once: the base computes one batch, of which each has its own samples.

`route_adapters` gives each sample its adapter. What is here gives each adapter its own rate and its
own loss, so that it comes out as if it were trained alone with its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disha.errors import ArgumentError, ModeError
from disha.model.training import adapter_parameters
from disha.text import counted

STATISTICS_OF_BATCH = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
"""Classes that mix all samples of a batch in training."""


def adapter_groups(model: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a parameter group for each adapter with its own learning rate, for one optimizer.

    An optimizer goes parameter by parameter, so each adapter has its own state in it. One that has
    no sample in a batch gets no gradient, and the optimizers of torch leave it alone in that step.

    Args:
        model: a model with adapters, in the mode in which it trains.
        rates: the learning rate of each adapter that trains.

    Returns:
        A dict for each adapter, with "params", "lr" and its "name". Other settings of the
        optimizer, such as "weight_decay", can be added to it.

    Raises:
        ArgumentError: there is no such adapter; or several adapters would train one parameter,
            because of `also_train` or because it has `requires_grad` outside of them.
        ModeError: a layer would mix the samples of several adapters, as batch normalisation does.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b")
        >>> optimizer = torch.optim.AdamW(disha.adapter_groups(model, {"a": 1e-3, "b": 1e-4}))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('a', 0.001), ('b', 0.0001)]
    """
    groups = []
    for adapter, rate in rates.items():
        parameters = adapter_parameters(model, adapter)
        groups.append({"params": parameters, "lr": rate, "name": adapter})
        if len(rates) > 1:
            _refuse_shared(model, adapter, parameters)
    if len(rates) > 1:
        _refuse_statistics_of_batch(model)
    return groups


def adapter_losses(
    losses: Tensor, names_per_sample: Sequence[str | None], mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the mean loss of each adapter: L_a = sum of m l / sum of m, over its samples.

    Call `backward` on the sum of them. The gradient of each adapter is then that of its own mean,
    whatever the other adapters have in the batch.

    Args:
        losses: a loss for each sample (samples,), or for each of its tokens (samples, tokens).
        names_per_sample: the adapters, as `route_adapters` gets them. Samples with None count for
            no adapter.
        mask: which losses count, in the shape of `losses`; all by default.

    Returns:
        A scalar for each adapter, in the order in which they come first; 0 if none of its losses
        counts.

    Raises:
        ArgumentError: there is not one name for each sample, or the mask has another shape.

    Examples:
        >>> import torch
        >>> import disha
        >>> disha.adapter_losses(torch.tensor([1.0, 5.0, 3.0]), ["a", "b", "a"])
        {'a': tensor(2.), 'b': tensor(5.)}
    """
    if losses.dim() == 0 or len(losses) != len(names_per_sample):
        raise ArgumentError(
            f"adapter_losses got {counted(len(names_per_sample), 'name')} for losses of shape "
            f'{tuple(losses.shape)}; give one name for each sample, and losses of reduction="none"'
        )
    if mask is not None and mask.shape != losses.shape:
        raise ArgumentError(
            f"the mask has shape {tuple(mask.shape)}, and the losses have {tuple(losses.shape)}; "
            "give one number for each loss"
        )
    weights = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    masked = losses if mask is None else torch.where(mask != 0, losses, 0.0) * weights
    totals = masked.flatten(1).sum(1) if losses.dim() > 1 else masked
    counts = weights.flatten(1).sum(1) if losses.dim() > 1 else weights
    means = {}
    for adapter in dict.fromkeys(names_per_sample):
        if adapter is not None:
            mine = [sample for sample, name in enumerate(names_per_sample) if name == adapter]
            count = counts[mine].sum()
            means[adapter] = totals[mine].sum() / torch.where(count > 0, count, 1.0)
    return means


def _refuse_shared(model: nn.Module, adapter: str, parameters: Sequence[nn.Parameter]) -> None:
    """Raise if an adapter trains parameters that act on the samples of the others too."""
    trained = {id(parameter) for parameter in parameters}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained and f"disha.{adapter}." not in name:
            raise ArgumentError(
                f"{name} would train with the samples of all adapters, because {adapter!r} has no "
                "own copy of it; leave it out of also_train, or set its requires_grad to False"
            )


def _refuse_statistics_of_batch(model: nn.Module) -> None:
    """Raise if a layer mixes the samples of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, STATISTICS_OF_BATCH) and module.training:
            raise ModeError(
                f"{name} normalises by the whole batch, and so mixes the samples of all adapters; "
                "call eval() on it, or train one adapter at a time"
            )
