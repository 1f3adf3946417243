"""Adapted linear layers: what `inject_adapters` makes of an `nn.Linear`, and two from birth.

y = (W + sum of s dW over the BAT blocks) x + b + sum of s S(x) D over the Bone blocks.

Each dW comes from the original W, so several adapters add up in any order.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha import functional
from disha.config import AdapterConfig, check_adapter_name
from disha.errors import ArgumentError, ArgumentTypeError
from disha.freezing import set_requires_grad
from disha.layers.adapted import (
    CHILD_NAME,
    AdaptedLayer,
    Adapters,
    Geometry,
    attach,
    read_weight,
    refuse_merged,
)
from disha.layers.blocks import Bat, Block, Bone
from disha.layers.quantised import dense_linear, is_dense
from disha.layers.routing import Route

__all__ = ["AdaptedLinear", "AdaptedTransposedLinear", "BatLinear", "BoneLinear"]


def _block_shape(geometry: Geometry, method: str, r: int, r_out: int | None) -> tuple[int, ...]:
    if method == Bat.method:
        return (functional.shard_count(geometry.out_features, r), r, r)
    return (r, geometry.out_features if r_out is None else r_out)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """An `nn.Linear` with adapters; `inject_adapters` turns linear layers into it."""

    base_class = nn.Linear
    original_class = nn.Linear
    methods = ("bone", "bat")
    linear = True
    weight_layout = "linear"

    _plain: ClassVar[bool] = True
    """Whether weight and bias are what nn.Module keeps, not what the class makes of that."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        computes = hasattr(cls, "weight") or hasattr(cls, "bias")
        looks_elsewhere = cls.__getattr__ is not nn.Module.__getattr__
        asks = cls.quantisation.__func__ is not AdaptedLayer.quantisation.__func__  # type: ignore[attr-defined]
        cls._plain = not (computes or looks_elsewhere or asks)

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return in_features and out_features."""
        assert isinstance(module, nn.Linear)
        return Geometry(module.in_features, module.out_features)

    @classmethod
    def obstacle(cls, module: nn.Module, method: str) -> str | None:
        """Return why `method` can't adapt `module`, or None if it can."""
        obstacle = super().obstacle(module, method)
        if obstacle is not None or cls.quantisation(module) is not None:
            return obstacle  # a quantised weight may be packed into any shape
        geometry = cls.geometry(module)
        expected = (geometry.out_features, geometry.in_features)
        shape = tuple(read_weight(module, cls.weight_name).shape)
        return None if shape == expected else f"its weight is {shape}, not (out, in) = {expected}"

    @classmethod
    def block_shape(
        cls, module: nn.Module, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return (r, out) for Bone, (r, r_out) for a tile, (ceil(out / r), r, r) for BAT."""
        return _block_shape(cls.geometry(module), method, r, r_out)

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW (out, in) of a block of this layer, without its scale."""
        if isinstance(block, Bat):
            return functional.bat_delta_weight(self.base_weight, block.block)
        return functional.bone_delta_weight(block.block, self.in_features, self.out_features)

    def delta_output(self, block: Block, input: Tensor, *more: Any) -> Tensor:
        """Return what a block adds to the output for `input`, scaled and with its dropout."""
        x, scale = block.dropped(input), block.current_scale()
        if isinstance(block, Bat):
            delta = self.delta_weight(block)
            return F.linear(x.to(delta.dtype), delta) * scale
        return functional.bone_delta(x, block.block, self.out_features, scale)

    def routed(self, output: Tensor, route: Route, input: Tensor, *more: Any) -> Tensor:
        """Return the output plus, for each sample, the update of its own adapter."""
        adapters = [adapter for adapter in route.adapters if adapter in self.disha]
        delta = self._routed_in_one(adapters, route, input)
        if delta is None:
            return super().routed(output, route, input, *more)
        return output + delta.to(output.dtype)

    def _routed_in_one(self, adapters: list[str], route: Route, input: Tensor) -> Tensor | None:
        """Return the updates of all samples from one product, or None if blocks are not alike."""
        blocks = [self.disha[adapter] for adapter in adapters]
        alike = {(type(block), block.block.shape, block.block.dtype) for block in blocks}
        if len(blocks) < 2 or len(alike) > 1 or any(block.drops for block in blocks):
            return None
        values = [block.block for block in blocks]
        scales = [block.current_scale() for block in blocks]
        route.parts(input)
        choices = route.choices(adapters, input.device)
        if isinstance(blocks[0], Bone):
            if blocks[0].r_out is not None:
                return None
            return functional.routed_bone_delta(input, values, scales, choices)
        if self.quantisation(self) is not None:
            return None
        return functional.routed_bat_delta(input, self.weight, values, scales, choices)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output (..., out) for an input (..., in), adapters applied."""
        # Here and in _kept, from where nn.Module keeps it: as an attribute it takes as long to find
        # as a small product takes.
        adapters: Adapters = self._modules[CHILD_NAME]  # type: ignore[assignment]
        acting = adapters.acting()
        if adapters.merged is not None and adapters.merged.dense:
            return dense_linear(input, self.weight, self.bias)
        # A BAT block changes the weight that is multiplied; one that drops a part of its input
        # can't, as its input is no longer the layer's. Nor can it where the weight is quantised:
        # the layer's own product is left to the library's kernels.
        if acting and self._is_dense():
            bones: list[tuple[Tensor, functional.Scale]] = []
            bats: list[tuple[Tensor, functional.Scale]] = []
            dropping: list[Block] = []
            for block in acting:
                if block.drops:
                    dropping.append(block)
                else:
                    folded = bats if isinstance(block, Bat) else bones
                    folded.append((block.block, block.current_scale()))
            weight, bias = self._kept("weight"), self._kept("bias")
            output = functional.adapted_linear(input, weight, bias, bones, bats)
            acting = tuple(dropping)
        elif torch.is_grad_enabled() or not self._is_dense():
            output = super().forward(input)  # as autograd, or the library of the weight, knows it
        else:
            output = functional.plain_linear(input, self._kept("weight"), self._kept("bias"))
        if acting or adapters.route is not None:
            output = self.updated(output, acting, input)
        return output

    def _is_dense(self) -> bool:
        if self._plain and is_dense(self._parameters.get("weight")):
            return True
        return self.quantisation(self) is None

    def _kept(self, name: str) -> Any:
        """Return the weight or the bias; where it is computed (a parametrization), it is so now."""
        parameters = self._parameters
        return parameters[name] if self._plain and name in parameters else getattr(self, name)

    def reset_parameters(self) -> None:
        """Draw the base weight and bias anew, and set every block to its initial values.

        Raises:
            MergeError: adapters are merged, so that unmerging would undo this.
        """
        if "disha" in self._modules:
            refuse_merged([self], "reset parameters")
        super().reset_parameters()
        adapters = self._modules.get("disha")  # not there yet while nn.Linear constructs itself
        if adapters is not None:
            for adapter in self.disha:
                self.disha[adapter].reset_parameters()


AdaptedLinear.layer_kind = AdaptedLinear


class AdaptedTransposedLinear(AdaptedLayer):
    """For linear layers that keep their weight as (in, out), such as the Conv1D of GPT-2.

    It goes in front of any such class: `register_layer_kind(MyConv1D, AdaptedTransposedLinear)`.
    """

    methods = ("bone", "bat")
    linear = True
    weight_layout = "linear_in_out"

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return the sizes by the weight, (in, out)."""
        in_features, out_features = read_weight(module, cls.weight_name).shape
        return Geometry(in_features, out_features)

    @classmethod
    def block_shape(
        cls, module: nn.Module, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return the shape of a block, as for `nn.Linear`."""
        return _block_shape(cls.geometry(module), method, r, r_out)

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW (in, out) of a block, without its scale."""
        in_features, out_features = self.base_weight.shape
        if isinstance(block, Bat):
            return functional.bat_delta_weight(self.base_weight.T, block.block).T
        return functional.bone_delta_weight(block.block, in_features, out_features).T

    def delta_output(self, block: Block, input: Tensor, *more: Any) -> Tensor:
        """Return what a block adds to the output for `input` (..., in), scaled."""
        x, scale = block.dropped(input), block.current_scale()
        if isinstance(block, Bat):
            delta = self.delta_weight(block)
            return x.to(delta.dtype) @ delta * scale
        return functional.bone_delta(x, block.block, self.base_weight.shape[1], scale)


def _give_birth(layer: AdaptedLinear, adapter: str, config: AdapterConfig, freeze: bool) -> None:
    """Attach the first adapter to a layer that is constructed with it."""
    check_adapter_name(adapter)
    misfit = type(layer).misfit(type(layer).geometry(layer), config.r, config.r_out)
    if misfit is not None:
        raise ArgumentError(f"{type(layer).__name__}: {misfit}")
    attach(layer)
    layer.disha.add(adapter, type(layer).make_block(layer, config, config.r))
    layer.disha.activate((adapter,))
    for name in ("weight", "bias") if freeze else ():
        set_requires_grad(layer, name, False)


def _require_linear(cls: type[AdaptedLinear], linear: object) -> None:
    if isinstance(linear, AdaptedLayer):
        raise ArgumentError(
            f"{cls.__name__}.from_linear got a layer that is adapted already; "
            "use inject_adapters to add another adapter"
        )
    if type(linear) is not nn.Linear:
        raise ArgumentTypeError(
            f"{cls.__name__}.from_linear takes a plain nn.Linear, got {type(linear).__name__}; "
            "inject_adapters adapts subclasses with a forward of their own"
        )
    if linear._parameters.get("weight") is None:
        raise ArgumentTypeError(
            f"{cls.__name__}.from_linear shares the weight, but this layer computes its own from "
            "other parameters (torch.nn.utils.weight_norm, say); remove that first"
        )


L = TypeVar("L", bound=AdaptedLinear)


def _share_parameters(cls: type[L], linear: nn.Linear) -> L:
    """Return an instance of `cls` around the very parameters of `linear`, no adapter yet."""
    _require_linear(cls, linear)
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = linear.in_features, linear.out_features
    layer.weight = linear.weight
    layer.register_parameter("bias", linear._parameters["bias"])  # may be None
    return layer.train(linear.training)


class BoneLinear(AdaptedLinear):
    """A linear layer with a Bone (or tile) adapter from birth: y = W x + b + s * S(x) D.

    A drop-in `nn.Linear`. The base weight and bias are frozen, unless `freeze=False`; the block
    starts at zero, so that the layer starts as the plain one.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to add b.
        device: where to create the parameters.
        dtype: what to create them in.
        r: shard size, from 1 to in_features.
        r_out: size of the output shard, which divides out_features; makes the block a tile.
        adapter: the adapter's name.
        dropout: probability of zeroing each of the adapter's inputs in training.
        scale: runtime scale s.
        block_dtype: dtype of the block; the weight's by default.
        init: `"zeros"` or `"kaiming"`.
        freeze: whether W and b stop requiring gradients.

    Shape:
        Input (..., in_features), output (..., out_features).

    Raises:
        ArgumentError: a value is out of range, or r or r_out does not fit.
        ArgumentTypeError: a value is of the wrong type.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha import BoneLinear
        >>> layer = BoneLinear(16, 32, r=4)
        >>> layer(torch.randn(8, 16)).shape
        torch.Size([8, 32])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['disha.default.bone_block']
    """

    original_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int,
        r_out: int | None = None,
        adapter: str = "default",
        dropout: float = 0.0,
        scale: float = 1.0,
        block_dtype: torch.dtype | None = None,
        init: str = "zeros",
        freeze: bool = True,
    ) -> None:
        config = AdapterConfig(
            r, None, "bone", r_out, dropout=dropout, scale=scale, dtype=block_dtype, init=init
        )
        super().__init__(in_features, out_features, bias, device, dtype)
        _give_birth(self, adapter, config, freeze)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        r_out: int | None = None,
        adapter: str = "default",
        dropout: float = 0.0,
        scale: float = 1.0,
        block_dtype: torch.dtype | None = None,
        init: str = "zeros",
        freeze: bool = True,
    ) -> BoneLinear:
        """Return a BoneLinear that shares the weight and bias of `linear`.

        Args:
            linear: a plain `nn.Linear`; its parameters are frozen too, being the same objects,
                unless `freeze=False`.
            r: shard size.
            r_out: size of the output shard.
            adapter: the adapter's name.
            dropout: probability of zeroing each of the adapter's inputs in training.
            scale: runtime scale s.
            block_dtype: dtype of the block; the weight's by default.
            init: `"zeros"` or `"kaiming"`.
            freeze: whether W and b stop requiring gradients.

        Raises:
            ArgumentTypeError: `linear` is no plain `nn.Linear`.
            ArgumentError: a value is out of range, or r or r_out does not fit.

        Examples:
            >>> from torch import nn
            >>> from disha import BoneLinear
            >>> linear = nn.Linear(16, 32)
            >>> BoneLinear.from_linear(linear, r=4).weight is linear.weight
            True
        """
        config = AdapterConfig(
            r, None, "bone", r_out, dropout=dropout, scale=scale, dtype=block_dtype, init=init
        )
        layer = _share_parameters(cls, linear)
        _give_birth(layer, adapter, config, freeze)
        return layer


class BatLinear(AdaptedLinear):
    """A linear layer with a BAT adapter from birth: y = (W + s dW) x + b, dW_ab = W_ab D_a + D_a.

    A drop-in `nn.Linear`. The base weight and bias are frozen, unless `freeze=False`; the block
    starts at zero, so that the layer starts as the plain one.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to add b.
        device: where to create the parameters.
        dtype: what to create them in.
        r: shard size, from 1 to in_features.
        adapter: the adapter's name.
        dropout: probability of zeroing each of the adapter's inputs in training. It costs a
            second product of full size, as the adapter's input is then not the layer's.
        scale: runtime scale s.
        block_dtype: dtype of the block; the weight's by default.
        init: `"zeros"` or `"kaiming"`.
        freeze: whether W and b stop requiring gradients.

    Shape:
        Input (..., in_features), output (..., out_features).

    Raises:
        ArgumentError: a value is out of range, or r does not fit.
        ArgumentTypeError: a value is of the wrong type.

    Source: arXiv 2409.15371, section 3.3.

    Examples:
        >>> import torch
        >>> from disha import BatLinear
        >>> layer = BatLinear(16, 32, r=4)
        >>> layer(torch.randn(8, 16)).shape
        torch.Size([8, 32])
        >>> layer.disha["default"].bat_block.shape
        torch.Size([8, 4, 4])
    """

    original_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int,
        adapter: str = "default",
        dropout: float = 0.0,
        scale: float = 1.0,
        block_dtype: torch.dtype | None = None,
        init: str = "zeros",
        freeze: bool = True,
    ) -> None:
        config = AdapterConfig(
            r, None, "bat", dropout=dropout, scale=scale, dtype=block_dtype, init=init
        )
        super().__init__(in_features, out_features, bias, device, dtype)
        _give_birth(self, adapter, config, freeze)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        adapter: str = "default",
        dropout: float = 0.0,
        scale: float = 1.0,
        block_dtype: torch.dtype | None = None,
        init: str = "zeros",
        freeze: bool = True,
    ) -> BatLinear:
        """Return a BatLinear that shares the weight and bias of `linear`.

        Args:
            linear: a plain `nn.Linear`; its parameters are frozen too, being the same objects,
                unless `freeze=False`.
            r: shard size.
            adapter: the adapter's name.
            dropout: probability of zeroing each of the adapter's inputs in training.
            scale: runtime scale s.
            block_dtype: dtype of the block; the weight's by default.
            init: `"zeros"` or `"kaiming"`.
            freeze: whether W and b stop requiring gradients.

        Raises:
            ArgumentTypeError: `linear` is no plain `nn.Linear`.
            ArgumentError: a value is out of range, or r does not fit.

        Examples:
            >>> from torch import nn
            >>> from disha import BatLinear
            >>> linear = nn.Linear(16, 32)
            >>> BatLinear.from_linear(linear, r=4).weight is linear.weight
            True
        """
        config = AdapterConfig(
            r, None, "bat", dropout=dropout, scale=scale, dtype=block_dtype, init=init
        )
        layer = _share_parameters(cls, linear)
        _give_birth(layer, adapter, config, freeze)
        return layer
