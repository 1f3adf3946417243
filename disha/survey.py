"""What of a model can be adapted, under which names, and how. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from disha.layers import AdaptedLayer, layer_kind_of
from disha.layers.adapted import CHILD_NAME
from disha.layers.attention import Projection, obstacle_to_taking_over, parts_of_attention
from disha.layers.embedding import AdaptedEmbedding
from disha.layers.fronts import ReadLayer
from disha.layers.readers import ANY_CHILD, reads_own, weight_reads
from disha.tree import ModuleNames, join, module_names

__all__ = ["Survey"]


class Survey:
    """The modules of a model, with the projections that its attention modules would get.

    Attributes:
        names: every module with its clean names, projections included.
        parts: every `nn.MultiheadAttention` that can be adapted -> its four layers.
        read: the modules whose weight is read, now or at times, instead of their being called:
            by another module, or by an embedding's own forward, which need not look up its input.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: ModuleNames = {}
        self.parts: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._stubborn: dict[nn.Module, str] = {}
        for module, names in module_names(model).items():
            self.names[module] = names
            if isinstance(module, nn.MultiheadAttention):
                self._add_attention(module, names)
        self.read = {child for module in self.names for child in _read_children(module)}
        self.read |= {module for module in self.names if _looks_up_by_itself(module)}

    def _add_attention(self, module: nn.MultiheadAttention, names: tuple[str, ...]) -> None:
        obstacle = obstacle_to_taking_over(module)
        if obstacle is not None:
            self._stubborn[module] = obstacle
            return
        parts = parts_of_attention(module)
        self.parts[module] = tuple(parts.values())
        for name, part in parts.items():
            if isinstance(part, Projection):
                self.names[part] = tuple(join(above, name) for above in names)

    def kind(self, module: nn.Module) -> type[AdaptedLayer]:
        """Return the layer kind that adapts a module which has no obstacle."""
        kind = layer_kind_of(module)
        assert kind is not None
        return kind

    def is_linear(self, module: nn.Module) -> bool:
        """Whether the module is a linear layer of any kind."""
        kind = layer_kind_of(module)
        return kind is not None and kind.linear

    def weight(self, module: nn.Module) -> nn.Parameter | None:
        """Return the weight of a module which some kind adapts; None if it is no parameter."""
        return module._parameters.get(self.kind(module).weight_name)

    def obstacle(self, module: nn.Module, method: str) -> str | None:
        """Return why `method` can't adapt a module, or None if it can."""
        if module in self._stubborn:
            return self._stubborn[module]
        kind = layer_kind_of(module)
        if kind is None:
            return f"no layer kind adapts {type(module).__name__}"
        if hasattr(module, CHILD_NAME) and not isinstance(module, AdaptedLayer):
            return f"it has an attribute {CHILD_NAME!r} of its own, where the adapters would be"
        return kind.obstacle(module, method)

    def without_effect(self, dropout: float) -> dict[nn.Module, str]:
        """Return the modules where an adapter would not act, or not as asked -> why.

        Args:
            dropout: the adapter's.
        """
        found: dict[nn.Module, str] = {}
        for owner in self.names:
            if "forward" in owner.__dict__:
                why = (
                    "a forward of its own is set on the instance, as device hooks do; remove the "
                    "hook (accelerate.hooks.remove_hook_from_module), delete the attribute that "
                    "it leaves (del module.forward), inject, then set the hook again"
                )
                found.update(dict.fromkeys((owner, *self.parts.get(owner, ())), why))
            if owner in self._stubborn:
                out = owner._modules.get("out_proj")
                if out is not None:
                    found[out] = f"{self._stubborn[owner]}, nor is out_proj called by torch's"
            for part, name in self._read_projections(owner):
                found[part] = f"the module around the attention does not call that but reads {name}"
        for module in self.read:
            found.update(self._unread(module, dropout))
        return found

    def _read_projections(self, owner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """Iterate over (projection, parameter of its attention that `owner` reads)."""
        for child, attribute in _reads_below(owner):
            for part in self.parts.get(child, ()):
                if isinstance(part, Projection) and part.weight_slot.name == attribute:
                    yield part, attribute

    def _unread(self, module: nn.Module, dropout: float) -> dict[nn.Module, str]:
        adapted_before = isinstance(module, AdaptedLayer) and not isinstance(module, ReadLayer)
        kind, why = self.kind(module), None
        if module._parameters.get(kind.weight_name) is None:
            why = "its weight, which is computed from other parameters"
        elif kind.quantisation(module) is not None:
            why = "its weight, which is quantised, so that an update can't be added to it"
        elif adapted_before:
            why = "its weight, and it was adapted on its own before; remove that adapter first"
        elif dropout:
            why = "its weight, so that dropout of the adapter's input can't act; use dropout=0"
        if why is None:
            return {}
        itself = _looks_up_by_itself(module)
        reader = "its own forward" if itself else "the module around it does not call it but"
        return {module: f"{reader} reads {why}"}


def _looks_up_by_itself(module: nn.Module) -> bool:
    """Whether it is an embedding with a forward of its own that reads the weight.

    A quantised one is not: its library reads the weight where it looks the input up.
    """
    kind = layer_kind_of(module)
    if kind is None or not issubclass(kind, AdaptedEmbedding) or kind.quantisation(module):
        return False
    return reads_own(type(module), "weight")


def _read_children(owner: nn.Module) -> list[nn.Module]:
    """Return the adaptable modules below `owner` whose weight its forward reads."""
    found = []
    for child, attribute in _reads_below(owner):
        kind = layer_kind_of(child)
        if kind is not None and kind.weight_name == attribute:
            found.append(child)
    return found


def _reads_below(owner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Iterate over (module, attribute) that the forward of `owner` reads below it."""
    for path, attribute in weight_reads(type(owner)):
        modules: list[nn.Module] = [owner]
        for name in path.split("."):
            modules = [child for module in modules for child in _children(module, name)]
        yield from ((module, attribute) for module in modules)


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    """Return the children that a step of a path may lead to."""
    found = module._modules.values() if name == ANY_CHILD else [module._modules.get(name)]
    return [child for child in found if child is not None]
