"""AdaptedLayer: a module whose adapted parameters read as effective weights.

The same object moves to a subclass of its own class, with one property for each adapted parameter.
So hooks, other references, `isinstance` checks, parameters and state-dict keys do not change, and
the module's own forward runs. Its new child `disha` holds the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from disha.effective import EffectiveWeight
from disha.errors import MergeError, ModeError
from disha.functional import Geometry
from disha.layers.adapters import Adapters
from disha.layers.blocks import Block, Slot
from disha.layers.reading import was_written, weight_property
from disha.layers.weights import base_of, delta_of, geometry_of, merged_weight


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
        return base_of(self, self._own_slot())

    def _own_slot(self) -> Slot:
        """Return the slot of the adapted `weight`, or raise AttributeError."""
        slots = {block.slot.name: block.slot for block in self.disha.blocks().values()}
        if "" not in slots:
            raise AttributeError(
                f"the adapted weights of this {self.original_class.__qualname__} are "
                f"{', '.join(slots)}, not `weight`; their blocks are in layer.disha[adapter]"
            )
        return slots[""]

    def geometry(self) -> Geometry:
        """Return the sizes of `weight` that its blocks depend on.

        Raises:
            AttributeError: the layer's `weight` is not adapted.
        """
        return geometry_of(self, self._own_slot())

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block of this layer, without its scale: a tensor of the weight's shape.

        Args:
            block: one of the layer's blocks; `block.block` is D, `block.r` its shard size.
        """
        return delta_of(self, block)

    def merged_weight(self, adapters: Iterable[str]) -> Tensor:
        """Return `weight` + sum of s * dW of the named adapters, merged or not.

        Args:
            adapters: their names; an adapter that the layer lacks adds nothing.

        Raises:
            AttributeError: the layer's `weight` is not adapted.
        """
        return merged_weight(self, self._own_slot(), adapters)

    def __setattr__(self, name: str, value: Any) -> None:
        if not was_written(self, name, value):
            super().__setattr__(name, value)

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


def refuse_merged(layers: Iterable[AdaptedLayer], action: str) -> None:
    """Raise if any of the layers is merged, so an action would mix merged and unmerged adapters."""
    merged = [layer.disha.merged for layer in layers if layer.disha.merged is not None]
    if merged:
        names = dict.fromkeys(repr(name) for one in merged for name in one.adapters)
        raise MergeError(
            f"can't {action} while adapters are merged (now: {', '.join(names)}); "
            "call unmerge_adapters(model) first"
        )
