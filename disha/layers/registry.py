"""Which layer kind adapts which class."""

from __future__ import annotations

from torch import nn

from disha.errors import ArgumentTypeError
from disha.layers.adapted import AdaptedLayer
from disha.layers.conv import CONV_KINDS
from disha.layers.embedding import AdaptedEmbedding
from disha.layers.linear import AdaptedLinear, AdaptedTransposedLinear

__all__ = ["LAYER_KINDS", "SHARD_DIMS", "layer_kind_of", "register_layer_kind"]

_KINDS: tuple[type[AdaptedLayer], ...] = (AdaptedLinear, AdaptedEmbedding, *CONV_KINDS)

LAYER_KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {
    kind.base_class: kind for kind in _KINDS if kind.base_class is not None
}

FOREIGN_KINDS: dict[tuple[str, str], type[AdaptedLayer]] = {
    ("transformers.pytorch_utils", "Conv1D"): AdaptedTransposedLinear,
}
"""Classes from elsewhere, by module and name, so that they need not be imported here."""

SHARD_DIMS: dict[str, int] = {
    kind.weight_layout: kind.shard_dim
    for kind in (*_KINDS, *FOREIGN_KINDS.values())
    if kind.weight_layout is not None
}
"""Layout of a weight -> the dimension of a Bone block along which the inputs' shards run."""

REQUIRED = ("geometry", "block_shape", "delta_weight", "delta_output")


def register_layer_kind(cls: type[nn.Module], kind: type[AdaptedLayer]) -> None:
    """Teach the walker to adapt layers of a class, and of its subclasses.

    Args:
        cls: the class of the layers.
        kind: a subclass of `AdaptedLayer` that declares `geometry`, `block_shape`, `delta_weight`
            and `delta_output`.

    Raises:
        ArgumentTypeError: `cls` is no class of modules, or `kind` no complete layer kind.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> class Gain(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(size))
        ...
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> class AdaptedGain(disha.AdaptedLayer):  # dW[i] = D[i mod r]
        ...     @classmethod
        ...     def geometry(cls, module):
        ...         size = module.weight.shape[0]
        ...         return disha.Geometry(in_features=size, out_features=size)
        ...
        ...     @classmethod
        ...     def block_shape(cls, module, method, r, r_out):
        ...         return (r,)
        ...
        ...     def delta_weight(self, block):
        ...         size = self.base_weight.shape[0]
        ...         return block.block.repeat(-(-size // block.r))[:size]
        ...
        ...     def delta_output(self, block, input):
        ...         return block.dropped(input) * self.delta_weight(block) * block.current_scale()
        >>> disha.register_layer_kind(Gain, AdaptedGain)
        >>> model = disha.inject_adapters(nn.Sequential(Gain(6)), "0", r=4)
        >>> [tuple(block.shape) for block in disha.adapter_parameters(model)]
        [(4,)]
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ArgumentTypeError(f"cls must be a class of nn.Modules, got {cls!r}")
    if not isinstance(kind, type) or not issubclass(kind, AdaptedLayer):
        raise ArgumentTypeError(f"kind must be a subclass of disha.AdaptedLayer, got {kind!r}")
    if kind.base_class is not None and not issubclass(cls, kind.base_class):
        raise ArgumentTypeError(
            f"{kind.__name__} adapts subclasses of {kind.base_class.__name__}, and {cls.__name__} "
            "is none"
        )
    lacking = [name for name in REQUIRED if not _declares(kind, name)]
    if lacking:
        raise ArgumentTypeError(
            f"{kind.__name__} is no complete layer kind: it does not declare {', '.join(lacking)}"
        )
    LAYER_KINDS[cls] = kind


def _declares(kind: type[AdaptedLayer], name: str) -> bool:
    """Whether the kind, or a kind that it derives from, has its own attribute of that name."""
    owner = next(cls for cls in kind.__mro__ if name in cls.__dict__)
    return owner is not AdaptedLayer


def layer_kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return the layer kind that adapts `module`, or None where there is none."""
    if isinstance(module, AdaptedLayer):
        return type(module).layer_kind
    for cls in type(module).__mro__:
        kind = LAYER_KINDS.get(cls) or FOREIGN_KINDS.get((cls.__module__, cls.__qualname__))
        if kind is not None:
            return kind
    return None
