"""The kinds of layers: which weights of a module can be adapted, and in which layouts.

The layouts of a class are declared, and never guessed. To add a kind of layer:
`register_layer_kind(MyLayer, {"weight": "out in"})`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.errors import ArgumentTypeError
from disha.functional import Layout, layout_of
from disha.layers.adapters import original_class
from disha.layers.quantized import quantized_weight
from disha.layers.spec import BlockSpec
from disha.layers.weights import matrix_weights, read_weight
from disha.sharding.zero import whole_shape

Kind = Callable[[Any], Iterable[BlockSpec]]
"""Takes a module, and returns the weights of it that can be adapted, with their layouts.

Their names are those below the module, and their shapes are filled in later.
"""


def declare(parameter: str, layout: Layout) -> BlockSpec:
    """Return the spec of a whole parameter of a module."""
    name = "" if parameter == "weight" else parameter
    return BlockSpec(name, layout=layout, parameter=parameter)


def _kind_with(layouts: Mapping[str, str]) -> Kind:
    """Return the kind of modules with these parameters in these layouts."""
    weights = [declare(name, layout_of(layout)) for name, layout in layouts.items()]
    return lambda module: weights


def _weights_of_embedding(module: Any) -> list[BlockSpec]:
    return [declare("weight", Layout("index out", padding_idx=module.padding_idx))]


def _weights_of_transposed_conv(module: Any) -> list[BlockSpec]:
    return [declare("weight", Layout("in out *kernel", groups=module.groups))]


def _weights_of_recurrent(module: Any) -> list[BlockSpec]:
    """Return the weights of an `nn.RNN`, `nn.LSTM`, `nn.GRU` or cell.

    Each weight has the rows of all gates, and is one matrix.
    """
    return [
        declare(name, Layout("out in")) for name in module._parameters if name.startswith("weight_")
    ]


PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Names in targets and files for the rows of q, k and v of a packed weight."""


def _weights_of_attention(module: Any) -> list[BlockSpec]:
    """Return the weights of an `nn.MultiheadAttention`: q, k and v, in one weight or in three."""
    width = module.embed_dim
    layout = Layout("out in")
    if module.in_proj_weight is None:
        return [BlockSpec(name, layout=layout, parameter=f"{name}_weight") for name in PROJECTIONS]
    return [
        BlockSpec(
            name,
            layout=layout,
            parameter="in_proj_weight",
            outputs=((i * width, (i + 1) * width),),
        )
        for i, name in enumerate(PROJECTIONS)
    ]


def _weights_of_experts(module: Any) -> list[BlockSpec]:
    """Return the weights of fused experts of transformers, which declare their layout.

    Any other module has none.
    """
    if not all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias")):
        return []
    pattern = "expert in out" if module.is_transposed else "expert out in"
    layout = Layout(pattern)
    return [
        declare(name, layout)
        for name, weight in matrix_weights(module).items()
        if len(whole_shape(weight)) == 3
    ]


_CONV = _kind_with({"weight": "out in *kernel"})
LAYER_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: _kind_with({"weight": "out in"}),
    nn.Bilinear: _kind_with({"weight": "expert out in"}),
    nn.Embedding: _weights_of_embedding,
    nn.EmbeddingBag: _weights_of_embedding,
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _weights_of_transposed_conv,
    nn.ConvTranspose2d: _weights_of_transposed_conv,
    nn.ConvTranspose3d: _weights_of_transposed_conv,
    nn.RNNBase: _weights_of_recurrent,
    nn.RNNCellBase: _weights_of_recurrent,
    nn.MultiheadAttention: _weights_of_attention,
}
"""Class -> the kind of its instances and of those of its subclasses."""

_IN_OUT_STACKS = {"gate_up_proj": "expert in out", "down_proj": "expert in out"}
_OUT_IN_STACKS = {"gate_up_proj": "expert out in", "down_proj": "expert out in"}
_OUT_IN_STACK = {"weight": "expert out in"}
FOREIGN_LAYOUTS = {
    "transformers.pytorch_utils.Conv1D": {"weight": "in out"},
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": _IN_OUT_STACKS,
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": _OUT_IN_STACKS,
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": _OUT_IN_STACKS,
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": _OUT_IN_STACK,
    "transformers.models.granitemoe.modeling_granitemoe.GraniteMoeParallelExperts": _OUT_IN_STACK,
    "torch_geometric.nn.dense.linear.Linear": {"weight": "out in"},
    "torch_geometric.nn.dense.linear.HeteroLinear": {"weight": "expert in out"},
}
"""The layouts of classes of other libraries, by their full names: nothing is imported here."""


def register_layer_kind(cls: type[nn.Module], layouts: Mapping[str, str]) -> None:
    """Declare which parameters of a class can be adapted, and their layouts.

    Args:
        cls: the class of the layers; its subclasses are included.
        layouts: parameter name -> layout, such as `{"weight": "out in"}`.

    Raises:
        ArgumentTypeError: `cls` is not a class of modules, or `layouts` not a mapping of names.
        ArgumentError: a layout is unknown.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> class Mixer(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.mix = nn.Parameter(torch.eye(size))
        ...
        ...     def forward(self, x):
        ...         return x @ self.mix
        >>> disha.register_layer_kind(Mixer, {"mix": "in out"})
        >>> model = disha.inject_adapters(nn.Sequential(Mixer(6)), "all-linear", r=4)
        >>> [tuple(block.shape) for block in disha.adapter_parameters(model)]
        [(4, 6)]
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ArgumentTypeError(f"cls must be a class of nn.Modules, got {cls!r}")
    if not isinstance(layouts, Mapping) or not all(isinstance(name, str) for name in layouts):
        raise ArgumentTypeError(
            f"layouts must be a dict of parameter name -> layout, got {layouts!r}"
        )
    LAYER_KINDS[cls] = _kind_with(layouts)


def full_name(cls: type) -> str:
    """Return the name of a class with its Python module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _kind_of(module: nn.Module) -> Kind:
    """Return the kind of a module, by the nearest of its base classes that has one."""
    for cls in original_class(module).__mro__:
        if cls in LAYER_KINDS:
            return LAYER_KINDS[cls]
        foreign = FOREIGN_LAYOUTS.get(full_name(cls))
        if foreign is not None:
            return _kind_with(foreign)
    return _weights_of_experts


def declared_weights(module: nn.Module) -> list[BlockSpec]:
    """Return the weights of a module whose layouts are known, by their names below the module."""
    if not (module._parameters or module._buffers or hasattr(module, "parametrizations")):
        return []  # a container, as most modules are
    quantized = quantized_weight(module)
    if quantized is not None:
        return [quantized]
    kind = _kind_of(module)
    return [*kind(module)]


def list_weights(module: nn.Module) -> list[BlockSpec]:
    """Return the weights of a module: those of known layouts, and its other matrices."""
    if isinstance(module, torch.jit.ScriptModule):  # its code is compiled and can't change
        return []
    weights = declared_weights(module)
    if weights and weights[0].quantized:
        return weights
    declared = {weight.parameter for weight in weights}
    return weights + [
        BlockSpec(name, parameter=name) for name in matrix_weights(module) if name not in declared
    ]


def shape_of(module: nn.Module, spec: BlockSpec) -> tuple[int, ...]:
    """Return the whole shape of a weight; empty if it is absent, or has no size yet."""
    if spec.quantized:
        return spec.shape
    weight = read_weight(module, spec.parameter)
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return ()
    return tuple(whole_shape(weight))
