"""BoneLinear and BatLinear: linear layers with an adapter from the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from disha.config import AdapterConfig, Init
from disha.effective.contexts import SINGLE_LAYERS
from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional.layouts import MATRIX
from disha.functional.method import Groups
from disha.layers.adapted import AdaptedLinear, set_state, state_with_parameters
from disha.layers.adapters import check_adapter_name
from disha.layers.memory import PLACES, Flag, ModelMemory, ModelState, Place
from disha.layers.new_blocks import make_block
from disha.layers.spec import BlockSpec


class _LinearWithAdapter(AdaptedLinear):
    """The base class of BoneLinear and BatLinear; subclasses name their method."""

    method: ClassVar[str]

    if TYPE_CHECKING:  # torch annotates `nn.Module.__call__` as returning Any

        def __call__(self, input: Tensor) -> Tensor: ...

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
        groups: Groups = 1,
        adapter: str = "default",
        dropout: float = 0.0,
        scale: float = 1.0,
        block_dtype: torch.dtype | None = None,
        init: Init = "zeros",
        freeze: bool = True,
    ) -> None:
        arguments = locals()
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_first_adapter(arguments)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        r_out: int | None = None,
        groups: Groups = 1,
        adapter: str = "default",
        dropout: float = 0.0,
        scale: float = 1.0,
        block_dtype: torch.dtype | None = None,
        init: Init = "zeros",
        freeze: bool = True,
    ) -> Self:
        """Return a layer with an adapter that shares the weight and bias of `linear`.

        Args:
            linear: a plain `nn.Linear`. Its parameters are the same objects, so they are frozen
                too, unless `freeze=False`.
            r: shard size.
            r_out: size of the output shard of a tile.
            groups: number of groups of shards, or `"all"`.
            adapter: the adapter's name.
            dropout: probability of zeroing each of the adapter's inputs in training.
            scale: runtime scale s.
            block_dtype: dtype of the block.
            init: `"zeros"` or `"kaiming"`.
            freeze: whether W and b stop requiring gradients.

        Raises:
            ArgumentTypeError: `linear` is not a plain `nn.Linear` with a weight of its own.
            ArgumentError: a value is out of range, or r or r_out does not fit.

        Examples:
            >>> from torch import nn
            >>> from disha import BoneLinear
            >>> linear = nn.Linear(16, 32)
            >>> layer = BoneLinear.from_linear(linear, r=4)
            >>> next(layer.parameters()) is linear.weight
            True
        """
        if type(linear) is not nn.Linear or linear._parameters.get("weight") is None:
            raise ArgumentTypeError(
                f"{cls.__name__}.from_linear takes a plain nn.Linear that has a weight of its own, "
                f"got {type(linear).__name__}; use inject_adapters for other layers"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features = linear.in_features
        layer.out_features = linear.out_features
        layer._parameters.update(linear._parameters)  # the bias may be None
        layer.train(linear.training)
        layer._add_first_adapter(locals())
        return layer

    def _add_first_adapter(self, arguments: Mapping[str, Any]) -> None:
        """Add the adapter that the arguments of `__init__` or `from_linear` describe."""
        config = AdapterConfig.from_arguments(
            arguments, target=None, method=self.method, dtype=arguments["block_dtype"]
        )
        adapter = check_adapter_name(arguments["adapter"])
        spec = BlockSpec(
            "",
            layout=MATRIX,
            shape=(self.out_features, self.in_features),
            method=config.method,
            r=config.r,
            r_out=config.r_out,
            scale=config.scale,
            adapter=adapter,
        )
        reason = spec.reason_against_r()
        if reason is not None:
            raise ArgumentError(f"{type(self).__name__}: {reason}")
        block = make_block(self, spec, config)
        memory = ModelMemory(SINGLE_LAYERS)
        state = state_with_parameters(self, ["weight"], False, memory, ("",))
        set_state(self, state.with_adapter(adapter, [block], (), (adapter,)))
        PLACES[self] = Place(memory, ("",))
        flags = {}
        if arguments["freeze"]:
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    flags[name] = Flag(parameter.requires_grad)
                    parameter.requires_grad = False
        memory.state = ModelState({(adapter, ""): spec}, flags)


class BoneLinear(_LinearWithAdapter):
    """A linear layer with a Bone (or tile) adapter: y = W x + b + s * S(x) D.

    A drop-in `nn.Linear`. The base weight and bias are frozen, unless `freeze=False`. The block
    starts at zero, so the new layer computes the same as a plain one.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to add b.
        device: device of the parameters.
        dtype: their dtype.
        r: shard size, from 1 to in_features.
        r_out: size of the output shard, which divides out_features; makes the block a tile.
        groups: number of groups of shards, or `"all"` for one group for each shard; each output
            sees the shards of its own group.
        adapter: the adapter's name.
        dropout: probability of zeroing each of the adapter's inputs in training.
        scale: runtime scale s.
        block_dtype: dtype of the block; float32 by default, or float64 over a float64 weight.
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

    _original_class = nn.Linear  # not inherited: `refuse_changed_class` asks the class itself
    method = "bone"


class BatLinear(_LinearWithAdapter):
    """A linear layer with a BAT adapter: y = (W + s dW) x + b, dW_ab = W_ab D_a + D_a.

    A drop-in `nn.Linear`. The base weight and bias are frozen, unless `freeze=False`. The block
    starts at zero, so the new layer computes the same as a plain one.

    Arguments, shapes and errors are those of `BoneLinear`, but there is no output shard (`r_out`),
    and there are no groups of shards (`groups`).
    Dropout costs a second product of full size, because the adapter's input then differs from the
    layer's.

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

    _original_class = nn.Linear  # not inherited: `refuse_changed_class` asks the class itself
    method = "bat"
