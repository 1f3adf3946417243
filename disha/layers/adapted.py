"""AdaptedLayer: a module whose adapted parameters read as effective weights.

Adapting keeps the module. The same object moves to a subclass of its own class, which has one
property for each adapted parameter. So hooks, other references, `isinstance` checks, parameter
objects and state-dict keys do not change. The module's own forward runs unchanged, but reads an
effective weight (`disha.effective`). Only `nn.Linear` has a shorter forward that returns the same
(`linear_forward`). The module has one more child, `disha`, which holds the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from disha import functional
from disha.effective import EffectiveWeight, called_from
from disha.errors import MergeError, ModeError
from disha.functional import Geometry
from disha.layers import opaque
from disha.layers.adapters import Adapters
from disha.layers.blocks import Block, Slot
from disha.layers.reading import TO_COMPUTED, refuse_change, weight_property
from disha.layers.weights import read_weight, stored_weight, weight_shape

__all__ = [
    "AdaptedLayer",
    "AdaptedWeight",
    "refuse_merged",
]


class AdaptedLayer(nn.Module):
    """Base class of the classes that adapted modules get.

    Attributes:
        original_class: the class that the module had.
        adapted_parameters: the parameters that read as effective weights.
        disha: the layer's blocks by adapter; `active` names those that act.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> layer = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, init="kaiming")
        >>> isinstance(layer, disha.AdaptedLayer), isinstance(layer, nn.Linear)
        (True, True)
        >>> layer.delta_weight(layer.disha["default"]).shape
        torch.Size([4, 8])
        >>> torch.equal(layer.weight + 0, layer.base_weight)
        False
    """

    original_class: ClassVar[type[nn.Module]]
    adapted_parameters: ClassVar[tuple[str, ...]] = ()
    is_opaque: ClassVar[bool] = False

    disha: Adapters

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "made_on_the_fly" in vars(cls):
            return
        # If a user's class computes a weight, the computed weight is adapted.
        for name in cls.adapted_parameters:
            if name in vars(cls):
                setattr(cls, name, weight_property(cls, name))

    @property
    def base_weight(self) -> Tensor:
        """The original of `weight`, also while merged; dequantised if it is quantised.

        Raises:
            AttributeError: the layer's `weight` is not adapted.
        """
        return self._own_weight().base

    def _own_weight(self) -> AdaptedWeight:
        """Return the adapted `weight` of the layer.

        Raises:
            AttributeError: it is not adapted, or the layer has none.
        """
        names = dict.fromkeys(name for _, name in self.disha.blocks())
        if "" not in names:
            raise AttributeError(
                f"the adapted weights of this {self.original_class.__qualname__} are "
                f"{', '.join(names)}, not `weight`; their blocks are in layer.disha[adapter]"
            )
        return AdaptedWeight(self, "")

    def geometry(self) -> Geometry:
        """Return the sizes of `weight` that its blocks depend on.

        Raises:
            AttributeError: the layer's `weight` is not adapted.
        """
        return self._own_weight().geometry

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block of this layer, without its scale: a tensor of the weight's shape.

        Args:
            block: one of the layer's blocks; `block.block` is D, `block.r` its shard size.
        """
        return AdaptedWeight(self, block.slot.name).delta_weight(block)

    def merged_weight(self, adapters: Iterable[str]) -> Tensor:
        """Return `weight` + sum of s * dW of the named adapters, merged or not.

        Args:
            adapters: their names; an adapter that the layer lacks adds nothing.

        Raises:
            AttributeError: the layer's `weight` is not adapted.
        """
        return self._own_weight().merged(adapters)

    def __delattr__(self, name: str) -> None:
        replaced = name in self.adapted_parameters and name in self._parameters
        # FullyShardedDataParallel replaces parameters by views of one flat parameter.
        if replaced and not called_from("torch.distributed.fsdp"):
            refuse_change(self, name, TO_COMPUTED)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as nn.Module does, but without reading the current weight.

        FSDP sets one parameter at a time; meanwhile, some are gathered and others are not.

        Args:
            name: the parameter's name.
            param: the parameter, or None.
        """
        if name in self.adapted_parameters and name in self._parameters:
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A class that saves in its own way (as in PyTorch Geometric) may read an effective weight.
        for name in self.adapted_parameters:
            parameter = self._parameters.get(name)
            saved = destination.get(prefix + name)
            if isinstance(saved, EffectiveWeight) and parameter is not None:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.disha.merged is not None:
            for name in self.adapted_parameters:
                if prefix + name in state_dict:
                    refuse_merged([self], f"load {prefix}{name}, which unmerging would undo,")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise ModeError(
            "nn.DataParallel can't run adapted layers on several devices, because its replicas "
            "have no parameters; use torch.nn.parallel.DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        """Return the layer's description in a model's printout."""
        state = f"active={list(self.disha.active)}"
        if self.disha.merged is not None:
            state += f", merged={list(self.disha.merged.adapters)}"
        elif self.disha.acts() == ():
            state += ", disabled"
        return ", ".join(filter(None, (super().extra_repr(), state)))


@dataclass(frozen=True)
class AdaptedWeight:
    """An adapted weight of a layer, with W and the blocks of all adapters.

    Attributes:
        layer: the module.
        name: the weight's name below the module; empty for `weight`.
    """

    layer: AdaptedLayer
    name: str

    @property
    def blocks(self) -> dict[str, Block]:
        """The weight's blocks by adapter."""
        found = self.layer.disha.blocks()
        return {adapter: block for (adapter, name), block in found.items() if name == self.name}

    def block(self, adapter: str) -> Block:
        """Return the weight's block of an adapter, without looking at the others.

        Args:
            adapter: the adapter's name.

        Raises:
            KeyError: the weight has none.
        """
        return self.layer.disha.blocks(adapter)[adapter, self.name]

    @cached_property
    def slot(self) -> Slot:
        """The place of the weight, from its first adapter."""
        adapters = self.layer.disha
        found = (adapters.blocks(one).get((one, self.name)) for one in list(adapters))
        return next(block for block in found if block is not None).slot

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter, or None if it is computed from others (a parametrization)."""
        return self.layer._parameters.get(self.slot.parameter)

    @property
    def base(self) -> Tensor:
        """The original parameter with all of its rows, also while merged; dequantised."""
        name, merged = self.slot.parameter, self.layer.disha.merged
        original = None if merged is None else merged.originals.get(name)
        if original is not None and original.data is not None:
            return original.data
        stored = self.parameter
        if self.slot.opaque:
            return opaque.dequantised(self.layer, stored_weight(self.layer, name))
        if original is not None and original.parameter is not None:
            stored = original.parameter
        weight: Tensor = read_weight(self.layer, name) if stored is None else stored
        return weight

    @property
    def base_rows(self) -> Tensor:
        """The adapted part of the original."""
        return self.slot.layout.part(self.base, self.slot.rows)

    @property
    def geometry(self) -> Geometry:
        """The sizes that blocks depend on."""
        return self.slot.layout.geometry(weight_shape(self.layer, self.slot), self.slot.rows)

    @property
    def quantisation(self) -> opaque.Quantisation | None:
        """How the weight is quantised, or None if it is not."""
        return opaque.quantisation_of(self.layer, stored_weight(self.layer, self.slot.parameter))

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block, without its scale: a tensor of the parameter's shape."""
        slot, values = block.slot, block.block
        if slot.opaque:
            stored = stored_weight(self.layer, slot.parameter)
            base = opaque.weight_for(block.method, self.layer, slot, stored, values)
        else:
            base = self.base
        return block.method.delta_weight(slot.layout, values, base, slot.rows)

    def merged(self, adapters: Iterable[str]) -> Tensor:
        """Return W + sum of s * dW of the named adapters, with all rows of the parameter."""
        own = self.layer.disha.blocks()
        name = self.slot.parameter
        deltas = [
            (self.delta_weight(block), block.scale)
            for adapter in adapters
            for (other, _), block in own.items()
            if other == adapter and block.slot.parameter == name
        ]
        return functional.merged_weight(self.base, deltas)


def refuse_merged(layers: Iterable[AdaptedLayer], action: str) -> None:
    """Raise if any of the layers is merged.

    Raises:
        MergeError: adapters are merged, so `action` would mix merged and unmerged ones.
    """
    merged = [layer.disha.merged for layer in layers if layer.disha.merged is not None]
    if merged:
        names = dict.fromkeys(repr(name) for one in merged for name in one.adapters)
        raise MergeError(
            f"can't {action} while adapters are merged (now: {', '.join(names)}); "
            "call unmerge_adapters(model) first"
        )
