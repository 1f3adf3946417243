"""What a view finds in a model: its blocks, its parameters and its buffers, with their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock
from disha.layers.memory import NOWHERE, PLACES, ModelMemory
from disha.layers.spec import BlockSpec
from disha.text import join


class ModelBlock(NamedTuple):
    """A block of a model: the clean name of its weight, the layer, and the name of the adapter."""

    name: str
    layer: AdaptedLayer
    adapter: str
    block: AdapterBlock

    @property
    def spec(self) -> BlockSpec:
        """The spec under the name of today; `tied` and `names` are those of the injection."""
        spec = self.block.spec
        module = self.name.removesuffix(spec.own_name).removesuffix(".")
        return spec.but(name=self.name, module=module, adapter=self.adapter, scale=self.block.scale)

    @property
    def values(self) -> nn.Parameter:
        """The trainable values D of the block."""
        return self.block.block


@dataclass(eq=False)
class ModelTensor:
    """A parameter or a buffer of a model, with all of its clean names; a tied one has several."""

    module: nn.Module  # the first that holds it
    attribute: str  # its name in that module
    table: str  # the table of a state that remembers it: `flags` or `buffers`
    is_statistic: bool = False  # whether it is one of the running statistics of a norm
    names: tuple[str, ...] = ()
    holders: tuple[tuple[nn.Module, str], ...] = ()  # all modules that hold it, and its names there

    @property
    def name(self) -> str:
        """Its main name."""
        return self.names[0]

    @property
    def value(self) -> Any:
        """The tensor as the module holds it now."""
        held = self.module._parameters if self.table == "flags" else self.module._buffers
        return held[self.attribute]

    def names_in_memory(self) -> list[tuple[ModelMemory, str]]:
        """Return what memories call it."""
        found = []
        for module, attribute in self.holders:
            memory, names = PLACES.get(module, NOWHERE)
            found += [(memory, join(name, attribute)) for name in names]
        return found

    @property
    def former(self) -> Any:
        """What a memory knows of it, a `Flag` or a `FormerBuffer`, or None."""
        for memory, name in self.names_in_memory():
            known = vars(memory.state)[self.table].get(name)
            if known is not None:
                return known
        return None

    @property
    def claimant(self) -> str | None:
        """The adapter whose `also_train` has named it, if there is one."""
        former = self.former
        return None if former is None else former.claimant


def persistent_buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module, not those of its children, that are in state dicts."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None
        and not is_lazy(buffer)
        and name not in module._non_persistent_buffers_set
    }
