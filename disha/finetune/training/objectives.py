"""The loss to minimise, summed over a batch, for each type of model.

A loss is summed and not averaged, so that a step can divide by the terms of all batches, on all
processes. An objective is a module around its model, so that DDP and FSDP wrap one call per batch.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from disha.finetune.data.batches import TokenBatch
from disha.finetune.errors import SettingsError
from disha.finetune.models.decoder import Decoder
from disha.finetune.models.factory import tensor_of
from disha.finetune.training.cross_entropy import output_head, summed_cross_entropy

__all__ = ["Objective", "TensorObjective", "TextObjective", "objective_for"]

T = TypeVar("T", bound="Objective")


class Objective(nn.Module):
    """The summed loss of a model's batches.

    Args:
        model: the model, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self: T, mode: bool = True) -> T:
        """Set training mode, or evaluation mode, but leave running statistics as they were.

        An adapter file holds no statistics of normalisation layers, so training uses those of the
        base model. If each batch used its own statistics, several small batches would also not give
        the same gradient as one large batch.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                module.training = False
        return self

    def forward(self, batch: Any) -> Tensor:
        """Return the loss summed over all `batch.weight` terms of `batch`, a float32 scalar."""
        raise NotImplementedError


class TextObjective(Objective):
    """Cross-entropy of the tokens to learn, for any causal language model.

    The model is called with token ids (batch, time) and returns logits (batch, time, vocabulary),
    or an object that has them as `logits`. It gets no mask: padding is on the right, where no real
    token of a causal model sees it. If its output head is known, the logits are not kept.

    Args:
        model: the model, with or without adapters, not yet compiled or distributed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        taken = inspect.signature(model.forward).parameters
        # By default, transformers models keep keys and values for generation.
        self._options = {"use_cache": False} if "use_cache" in taken else {}
        self._head = output_head(model, self._options)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the loss summed over the positions that have a label, in nats.

        Raises:
            SettingsError: the batch is packed, or the model returns no such logits.
        """
        options: dict[str, Any] = dict(self._options)
        if batch.positions is not None:
            if not isinstance(self.model, Decoder):
                raise SettingsError(
                    "--packing needs a model that keeps the texts of a row apart, as the built-in "
                    "Llama, Mistral, Qwen2 and Qwen3 do; leave it out"
                )
            options["positions"] = batch.positions
        if self._head is not None:
            hidden, trained = self._head.hidden(batch.tokens, options), self._head.trained
            return summed_cross_entropy(hidden, batch.labels, self._head.logits, trained).float()
        logits = tensor_of(self.model(batch.tokens, **options))
        if logits.shape[:-1] != batch.labels.shape:
            raise SettingsError(
                f"the model returns shape {tuple(logits.shape)} for tokens of "
                f"shape {tuple(batch.labels.shape)}; logits (batch, time, vocabulary) are expected"
            )
        return summed_cross_entropy(logits, batch.labels, lambda logits: logits).float()


class TensorObjective(Objective):
    """The loss of a model that maps tensors to tensors.

    If the model has a method `summed_loss(inputs, targets)`, that is the loss. Otherwise the model
    is called with the inputs, and returns a tensor, or an object that has one as `logits`:

    - integer targets: cross-entropy, of outputs (batch, classes, ...) for targets (batch, ...)
    - floating-point targets: squared error, of outputs of the targets' shape

    Floating-point inputs are given to the model in its own dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # A layer's own parameters come before its adapter's, which may be of another type.
        types = (p.dtype for p in model.parameters() if p.is_floating_point())
        self._dtype = next(types, torch.float32)

    def forward(self, batch: Any) -> Tensor:
        """Return the summed loss of `batch.inputs` and `batch.targets`.

        Raises:
            SettingsError: the model's outputs don't fit the targets, or a target is not one of the
                model's classes.
        """
        inputs, targets = batch.inputs, batch.targets
        if inputs.is_floating_point():
            inputs = inputs.to(self._dtype)
        own = getattr(self.model, "summed_loss", None)
        if callable(own):
            loss: Tensor = own(inputs, targets)
            return loss.float()
        outputs = tensor_of(self.model(inputs))
        if targets.is_floating_point():
            _require_shape(outputs, targets, tuple(targets.shape))
            return F.mse_loss(outputs.float(), targets.float(), reduction="sum")
        classes = tuple(outputs.shape[1:2]) or ("classes",)
        _require_shape(outputs, targets, (*targets.shape[:1], *classes, *targets.shape[1:]))
        if batch.classes > outputs.shape[1]:
            raise SettingsError(
                f"the model has outputs for {outputs.shape[1]} classes, but there "
                f"is a target {batch.classes - 1}; classes are numbered from 0"
            )
        return F.cross_entropy(outputs.float(), targets, reduction="sum")


def objective_for(model: nn.Module, has_tokenizer: bool) -> Objective:
    """Return the objective of a model. A model with a tokenizer learns from text."""
    is_of_text = has_tokenizer or isinstance(model, Decoder)
    return TextObjective(model) if is_of_text else TensorObjective(model)


def _require_shape(outputs: Tensor, targets: Tensor, expected: tuple[Any, ...]) -> None:
    if tuple(outputs.shape) != expected:
        shape = ", ".join(map(str, expected))
        raise SettingsError(
            f"the model returns shape {tuple(outputs.shape)} where targets of "
            f"shape {tuple(targets.shape)} and type {targets.dtype} need ({shape}); give it a "
            "method summed_loss(inputs, targets) to use a loss of its own"
        )
