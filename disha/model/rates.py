"""suggest_rate: measure with which learning rate a model begins to train with its adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from disha.errors import ArgumentError
from disha.model.view import ModelView

MOVE = 1.5
"""How far the first step of AdamW may move log-probabilities, in nats."""
MOVE_OF_FACTORS = 0.35
"""The same where both factors of a product train, because the second begins to move later."""
PROBE = 0.1
"""How far the measuring steps move them: twice what rounding to bfloat16 does."""
PROBES = 3
FIRST_STEP = 1e-4


def suggest_rate(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any
) -> float:
    """Return a learning rate for AdamW, from one gradient and a few forward passes.

    The first step of AdamW moves every entry of a block by the rate, against the sign of its
    gradient G. Such a step changes the log-probabilities log p of the model's outputs. The rate is
    the one at which that change has the size 1.5:

        rate = 1.5 / sqrt(mean over what is learned of Var_p [d log p(D - t sign G) / dt at 0])

    For a LoRA, whose second factor begins to move later, 0.35 stands in the place of 1.5.

    Over the tasks, sizes, methods and r of the study, the best rates differ by a factor of 1000.
    Divided by this one, those of one task agree within 1.5, but tasks differ from 0.6 to 3. Higher
    rates forget more. So before a long run, try a third of it too.

    Args:
        model: a model with adapters, before it is trained. Its output, or `logits` of that, has
            logits of classes or tokens in its last axis.
        inputs: positional arguments for the model: 16 rows or more of the training data.
        loss: computes the loss from the model's output. By default it is the output's `loss`,
            which models of transformers have if they get `labels`.
        kwargs: keyword arguments for the model.

    Raises:
        ArgumentError: no adapter trains, or the output has no loss, or does not change.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> model = disha.inject_adapters(model, "all-linear", r=8)
        >>> x, labels = torch.randn(32, 64), torch.randint(10, (32,))
        >>> rate = disha.suggest_rate(
        ...     model, x, loss=lambda logits: nn.functional.cross_entropy(logits, labels)
        ... )
        >>> 1e-3 < rate < 1
        True
    """
    blocks = [
        model_block
        for model_block in ModelView(model).blocks()
        if model_block.adapter in model_block.layer.disha.active
        and model_block.values.requires_grad
    ]
    if not blocks:
        raise ArgumentError("no adapter trains; add or activate one before you ask for a rate")
    values = [model_block.values for model_block in blocks]
    starts = [value.detach().clone() for value in values]
    with ExitStack() as undo, torch.enable_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        output = model(*inputs, **kwargs)
        *gradients, of_logits = torch.autograd.grad(
            _loss_of(output, loss),
            [*values, _logits(output)],
            allow_unused=True,
            materialize_grads=True,
        )
        learned = of_logits.ne(0).any(-1)  # not prompts and padding, which move less
        before = _logits(output)[learned].detach().float().log_softmax(-1)

        def move(step: float) -> None:
            with torch.no_grad():
                for value, start, gradient in zip(values, starts, gradients, strict=True):
                    value.copy_(start - step * gradient.sign())

        undo.callback(move, 0.0)
        step = FIRST_STEP
        for _ in range(PROBES):
            move(step)
            with torch.no_grad():
                after = _logits(model(*inputs, **kwargs))[learned].float().log_softmax(-1)
            moved = _spread(after, before)
            if not 0 < moved < math.inf:
                raise ArgumentError("the model's output does not change with its adapters")
            per_rate = moved / step
            step = PROBE / per_rate
    has_factors = any(not model_block.block.method.additive for model_block in blocks)
    move_of_method = MOVE_OF_FACTORS if has_factors else MOVE
    return move_of_method / per_rate


def _loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is not None:
        return loss(output)
    found = getattr(output, "loss", None)
    if found is None:
        raise ArgumentError("the output has no loss; pass labels, or loss= that computes one")
    return found


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _spread(after: Tensor, before: Tensor) -> float:
    """Return the standard deviation of the change, over what the model itself would answer."""
    p, change = before.exp(), after - before
    variance = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
    return float(variance.clamp_min(0).mean().sqrt())
