"""AdaptedLayer: what every adapted module has in common, and the change of class that makes one.

Adapting keeps the module. The very same object moves to a subclass of its own class, so that
hooks, other references, `isinstance` checks, parameter objects and state-dict keys stay as they
were. For a base class that disha knows (`nn.Linear`) the subclass is one of ours. For a class
derived from it, a subclass is made on the fly, with ours behind the user's: the user's forward
runs and, by `super().forward`, reaches ours. Where it does not get there (bitsandbytes calls its
own kernels), the update is added to what it returns.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from disha import functional
from disha.config import AdapterConfig
from disha.errors import ArgumentError, ArgumentTypeError, MergeError
from disha.layers.blocks import BLOCKS, Block

__all__ = [
    "AdaptedLayer",
    "Adapters",
    "Geometry",
    "MergedWeight",
    "adapt",
    "attach",
    "refuse_changed_class",
    "refuse_merged",
    "restore",
]

CHILD_NAME = "disha"
"""Name of the one sub-module that adapting adds to a module."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer that its blocks depend on."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class MergedWeight:
    """What unmerging needs: the adapters that were merged, and the original weight.

    `parameter` is None where the merge changed the values of the layer's own parameter, whose
    former data is `data`; it is the former parameter where the layer was untied from it.
    """

    adapters: tuple[str, ...]
    data: Tensor
    parameter: nn.Parameter | None = None


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.live: tuple[Block, ...] = ()
        self.enabled = True
        self.merged: MergedWeight | None = None
        self.calls: dict[int, bool] = {}  # forward calls under way: have they called acting()?

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._modules

    def __getitem__(self, adapter: str) -> Block:
        block: Block = self._modules[adapter]  # type: ignore[assignment]
        return block

    def add(self, adapter: str, block: Block) -> None:
        """Add a block under a name that check_adapter_name has passed. It is not active yet."""
        self._modules[adapter] = block
        block.train(self.training)
        block.set_enabled(self.enabled)
        self.activate(self.active)

    def discard(self, adapter: str) -> None:
        """Remove a block; it is no longer active."""
        self._modules.pop(adapter, None)
        self.activate(tuple(name for name in self.active if name != adapter))

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let exactly these adapters act; a name that this layer lacks is no error."""
        self.active = adapters
        self.live = tuple(self[name] for name in adapters if name in self)

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters of the layer off or on again."""
        self.enabled = enabled
        for adapter in self:
            self[adapter].set_enabled(enabled)

    def acting(self) -> tuple[Block, ...]:
        """The blocks that forward has to apply; who calls this applies them."""
        if self.calls:
            self.calls[_caller()] = True
        if self.merged is not None:
            return ()
        # In a graph, `enabled` acts through the blocks' scale: reading it here would recompile.
        if not torch.compiler.is_compiling() and not self.enabled:
            return ()
        return self.live

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not callable: the layer that holds the adapters applies them."""
        raise ArgumentTypeError(
            "Adapters holds blocks and is not called; call the layer that it belongs to"
        )


class AdaptedLayer(nn.Module):
    """Base of all adapted layers; a layer kind derives from it and from the class it adapts.

    A layer kind declares what is its own: `base_class`, `geometry`, `obstacle`, `block_shape`,
    `delta_weight` and a `forward` that applies `self.disha.acting()`, plus `delta_output` for
    subclasses whose forward never reaches the base's.
    """

    base_class: ClassVar[type[nn.Module]]
    original_class: ClassVar[type[nn.Module]]
    layer_kind: ClassVar[type[AdaptedLayer]]
    own_forward: ClassVar[bool] = False
    weight_name: ClassVar[str] = "weight"

    disha: Adapters

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return the sizes of `module`, an instance of `base_class`."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Return why `module` can't be adapted, or None if it can."""
        raise NotImplementedError

    @classmethod
    def block_shape(
        cls, geometry: Geometry, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return the shape of a block."""
        raise NotImplementedError

    @classmethod
    def misfit(cls, geometry: Geometry, r: int, r_out: int | None) -> str | None:
        """Return why blocks of these sizes don't fit a layer of that geometry, or None."""
        if r > geometry.in_features:
            return f"r={r} is larger than in_features={geometry.in_features}"
        if r_out is not None and geometry.out_features % r_out:
            return f"r_out={r_out} does not divide out_features={geometry.out_features}"
        return None

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block of this layer, without its scale."""
        raise NotImplementedError

    def delta_output(self, block: Block, input: Tensor) -> Tensor:
        """Return what a block adds to the layer's output, scaled."""
        raise NotImplementedError

    @classmethod
    def make_block(
        cls, module: nn.Module, config: AdapterConfig, r: int, dtype: torch.dtype | None = None
    ) -> Block:
        """Return a new block that fits `module`, on its weight's device.

        Args:
            module: the module, adapted already or not yet.
            config: the adapter's configuration.
            r: shard size at this module.
            dtype: dtype of the block; by default the configuration's, or else the weight's.
        """
        shape = cls.block_shape(cls.geometry(module), config.method, r, config.r_out)
        weight: Tensor = getattr(module, cls.weight_name)
        dtype = dtype or config.dtype or weight.dtype
        return BLOCKS[config.method](shape, config=config, r=r, device=weight.device, dtype=dtype)

    @property
    def base_weight(self) -> Tensor:
        """The original weight, also while merged."""
        merged = self.disha.merged
        if merged is not None:
            return merged.data
        weight: Tensor = getattr(self, self.weight_name)
        return weight

    def merged_weight(self, adapters: Iterable[str]) -> Tensor:
        """Return W + sum of s * dW of the named adapters, whether merged now or not."""
        blocks = [self.disha[adapter] for adapter in adapters if adapter in self.disha]
        deltas = [(self.delta_weight(block), block.strength) for block in blocks]
        return functional.merged_weight(self.base_weight, deltas)

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        state = f"active={list(self.disha.active)}"
        if self.disha.merged is not None:
            state += f", merged={list(self.disha.merged.adapters)}"
        elif not self.disha.enabled:
            state += ", disabled"
        return ", ".join(filter(None, (super().extra_repr(), state)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if not _made_on_the_fly(cls):
            return reduced
        return (_new_instance, (cls.original_class, cls.layer_kind), *reduced[2:])


def _made_on_the_fly(cls: type[AdaptedLayer]) -> bool:
    return cls.__dict__.get("made_on_the_fly", False) is True


def _new_instance(original: type[nn.Module], kind: type[AdaptedLayer]) -> nn.Module:
    cls = adapted_class(original, kind)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[nn.Module], type[AdaptedLayer]], type[AdaptedLayer]] = {}


def adapted_class(original: type[nn.Module], kind: type[AdaptedLayer]) -> type[AdaptedLayer]:
    """Return the class that an `original` moves to when `kind` adapts it; one per pair."""
    if original is kind.base_class:
        return kind
    if (original, kind) not in _CLASSES:
        _CLASSES[original, kind] = _make_class(original, kind)
    return _CLASSES[original, kind]


def _make_class(original: type[nn.Module], kind: type[AdaptedLayer]) -> type[AdaptedLayer]:
    own_forward = original.forward is not kind.base_class.forward
    bases = (_OwnForward, original, kind) if own_forward else (original, kind)
    namespace = {
        "__module__": kind.__module__,
        "__doc__": f"{original.__qualname__}, adapted by disha.",
        "made_on_the_fly": True,
        "original_class": original,
        "layer_kind": kind,
        "own_forward": own_forward,
        "input_name": _first_parameter(original.forward),
    }
    return type(f"Adapted{original.__name__}", bases, namespace)


def _first_parameter(forward: Callable[..., Any]) -> str:
    """Return the name under which a forward takes its first input, or "" where it shows none."""
    try:
        _, *parameters = inspect.signature(forward).parameters.values()
    except ValueError:  # written in C, without a signature
        return ""
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named[0] if named else ""


class _OwnForward(AdaptedLayer):
    """In front of a class with a forward of its own: sees to it that the update is applied once."""

    input_name: ClassVar[str]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the user's forward; add the update if it did not get to the layer kind's forward."""
        calls = self.disha.calls
        caller = _caller()
        outer = calls.get(caller)
        calls[caller] = False
        try:
            output: Tensor = super().forward(*args, **kwargs)
            missed = () if calls[caller] else self.disha.acting()
        finally:
            del calls[caller]
            if outer is not None:
                calls[caller] = True  # a call within its own forward has applied the update
        if not missed:
            return output
        input = args[0] if args else kwargs.get(self.input_name)
        if not isinstance(output, Tensor) or not isinstance(input, Tensor):
            raise ArgumentTypeError(
                f"the adapter of {self.original_class.__name__} can't act: its forward does not "
                f"use {self.base_class.__name__}.forward, and adding to its output needs one "
                f"tensor in and one out, but it takes {type(input).__name__} and returns "
                f"{type(output).__name__}; leave it out with exclude="
            )
        for block in missed:
            output = output + self.delta_output(block, input).to(output.dtype)
        return output


def _caller() -> int:
    """Tell threads that share a module apart; a graph is traced by one of them."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def adapt(module: nn.Module, kind: type[AdaptedLayer]) -> AdaptedLayer:
    """Move `module` to its adapted class, without any adapter yet. Undone by `restore`.

    Raises:
        ArgumentError: the module's class does not allow it.
    """
    try:
        module.__class__ = adapted_class(type(module), kind)
    except TypeError as error:
        raise ArgumentError(
            f"{type(module).__name__} can't be adapted: Python does not let its class change "
            f"({error}); leave it out with exclude="
        ) from error
    assert isinstance(module, AdaptedLayer)
    attach(module)
    return module


def attach(layer: AdaptedLayer) -> None:
    """Give a layer of an adapted class its holder of adapters, empty."""
    adapters = Adapters()
    adapters.train(layer.training)
    # Straight into _modules: the user's class may guard its attributes.
    layer._modules[CHILD_NAME] = adapters


def refuse_changed_class(layer: AdaptedLayer, name: str) -> None:
    """Raise if something derived another class from the layer's adapted class.

    Raises:
        ArgumentError: giving back the original class would undo that change too.
    """
    if "original_class" not in type(layer).__dict__:
        raise ArgumentError(
            f"{name or 'the model'} has become a {type(layer).__name__} since it was adapted (by a "
            "parametrization or a wrapper, say), so its original class can't be given back; undo "
            "that change first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


def restore(layer: AdaptedLayer) -> None:
    """Give the module its original class back; its adapters are gone."""
    original = type(layer).original_class
    del layer._modules[CHILD_NAME]
    layer.__class__ = original  # type: ignore[assignment]


def refuse_merged(layers: Iterable[AdaptedLayer], action: str) -> None:
    """Raise if any of the layers is merged.

    Raises:
        MergeError: adapters are merged, so that `action` would mix merged and unmerged ones.
    """
    for layer in layers:
        if layer.disha.merged is not None:
            names = ", ".join(map(repr, layer.disha.merged.adapters))
            raise MergeError(
                f"can't {action} while adapters are merged (now: {names}); "
                "call unmerge_adapters(model) first"
            )
