"""Gradients in reentrant gradient checkpointing, for blocks that follow frozen layers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from disha.errors import ArgumentError
from disha.model import ModelView, require_model

__all__ = ["InputGradients", "enable_input_gradients"]


def enable_input_gradients(
    model: nn.Module, after: nn.Module | Sequence[nn.Module] | None = None
) -> InputGradients:
    """Make the inputs of a model's layers require gradients, for reentrant checkpointing.

    With `torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`, parameters get gradients only
    if one of the inputs requires gradients. If the first layers of a model are frozen, no input
    does: torch warns, and the blocks in the checkpointed part get no gradients. After this call,

    - the output of every `nn.Embedding` and `nn.EmbeddingBag` of the model, and
    - every floating-point tensor that is passed to the model itself

    require gradients whenever gradients are enabled. No value and no `requires_grad` flag changes,
    and nothing is stored in `.grad`. With `after=`, the outputs of those modules require gradients
    instead. Use it for a model that does not start with an embedding, or that starts with frozen
    layers that the backward pass should skip (such as a convolution that cuts images into patches).

    Non-reentrant checkpointing does not need this. If the model is compiled, call this before the
    first forward.

    Args:
        model: any model.
        after: the module, or several, just before the checkpointed part.

    Returns:
        A handle. `handle.remove()` undoes the call, and so does the end of `with handle:`.

    Raises:
        ArgumentTypeError: the model or one of the modules is not an `nn.Module`.
        ArgumentError: a module is not in the model.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.checkpoint import checkpoint
        >>> import disha
        >>> embedding, linear = nn.Embedding(10, 8), nn.Linear(8, 8)
        >>> model = disha.inject_adapters(nn.Sequential(embedding, linear), "1", r=4)
        >>> with disha.enable_input_gradients(model):
        ...     hidden = embedding(torch.tensor([1, 2]))
        ...     checkpoint(linear, hidden, use_reentrant=True).sum().backward()
        >>> [block.grad is not None for block in disha.adapter_parameters(model)]
        [True]
        >>> embedding.weight.grad is None
        True
    """
    view = ModelView(model)
    if after is None:
        return InputGradients([m for m in view.names if isinstance(m, _EMBEDDINGS)], model)
    chosen: list[Any] = list(after) if isinstance(after, (list, tuple)) else [after]
    for module in chosen:
        if require_model(module, "after") not in view.names:
            raise ArgumentError(
                f"after={type(module).__name__} is not a module of the model; give one of its "
                "modules, such as model.embed_tokens"
            )
    return InputGradients(chosen, None)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class InputGradients:
    """The handle from `enable_input_gradients`: call `remove`, or use it as a context manager.

    Args:
        modules: the modules whose outputs require gradients.
        model: the model whose own inputs require gradients too, or None.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model, tokens = nn.Embedding(10, 8).requires_grad_(False), torch.tensor([1, 2])
        >>> handle = disha.enable_input_gradients(model)
        >>> model(tokens).requires_grad
        True
        >>> handle.remove()
        >>> model(tokens).requires_grad
        False
    """

    def __init__(self, modules: Sequence[nn.Module], model: nn.Module | None) -> None:
        self._hooks = [module.register_forward_hook(_mark_output) for module in modules]
        if model is not None:
            self._hooks.append(model.register_forward_pre_hook(_mark_inputs, with_kwargs=True))

    def remove(self) -> None:
        """Undo `enable_input_gradients`. Further calls do nothing."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> InputGradients:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _mark_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    return _marked(output)


def _mark_inputs(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return _marked((inputs, named))


def _marked(value: Any) -> Any:
    """Mark all tensors in lists, dicts, named tuples, and outputs of models of transformers."""
    return tree_map_only(Tensor, _marked_tensor, value)


def _marked_tensor(value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.requires_grad:
        return value
    if not torch.is_grad_enabled() or value.is_inference():
        return value
    anchor = torch.empty((), device=value.device, requires_grad=True)
    marked: Tensor = _Marked.apply(value, anchor)  # type: ignore[no-untyped-call]
    return marked


class _Marked(torch.autograd.Function):
    """The identity, with a result that requires gradients.

    `value.requires_grad_()` does not suffice: it changes the caller's tensor, stores a gradient in
    it, and forbids in-place operations on it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, anchor: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing for backward."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None
