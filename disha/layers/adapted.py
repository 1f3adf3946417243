"""AdaptedLayer: a module whose adapted parameters read as effective weights.

Adapting keeps the module. The very same object moves to a subclass of its own class, which has one
property for each adapted parameter. So hooks, other references, `isinstance` checks, parameter
objects and state-dict keys stay as they were, and the module's own forward runs unchanged: what it
reads is an effective weight (`disha.effective`). The module has one more child, `disha`, which
holds the blocks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from disha import functional
from disha.config import BLOCK_DTYPES, AdapterConfig
from disha.effective import (
    MOVES,
    EffectiveWeight,
    Routed,
    asked_by,
    effective,
    effective_of_shards,
    effective_on_meta,
)
from disha.errors import ArgumentError, ArgumentTypeError, MergeError, ModeError
from disha.functional import Geometry
from disha.layers import opaque
from disha.layers.blocks import Block, Slot
from disha.routing import Route
from disha.sharding import is_sharded

__all__ = [
    "CHILD_NAME",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdaptedWeight",
    "Adapters",
    "Merged",
    "Original",
    "adapt",
    "device_of_weight",
    "make_block",
    "offloading_hooks",
    "read_weight",
    "refuse_changed_class",
    "refuse_inside",
    "refuse_merged",
    "restore",
    "stored_weight",
    "weight_shape",
]

CHILD_NAME = "disha"
"""Name of the one sub-module that adapting adds to a module."""

PLAIN = (Tensor, nn.Parameter)
BY_NAME = nn.Module.get_parameter.__code__
"""The code of `get_parameter`: it reads the attribute, and wants the parameter itself."""
DENSE_DTYPES = frozenset(BLOCK_DTYPES.values())


@dataclass(frozen=True)
class Original:
    """What unmerging needs of one parameter.

    `data` is the former data of the parameter, `parameter` the former parameter itself where it was
    replaced: where the module was untied from it, or where a dense weight stands in for a quantised
    one (`dense`).
    """

    data: Tensor | None = None
    parameter: nn.Parameter | None = None
    dense: bool = False


@dataclass(frozen=True)
class Merged:
    """The adapters that are merged into a layer, and what its parameters were.

    A layer that has none of the merged adapters is inactive while others are merged: no adapters,
    no originals.
    """

    adapters: tuple[str, ...] = ()
    originals: Mapping[str, Original] = field(default_factory=dict)


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act.

    Where an adapter has one block, of the module's `weight`, it is found under the adapter's name.
    Where it has several, they are found by the names of their weights below that.
    """

    active: tuple[str, ...]
    live: dict[str, tuple[Block, ...]]
    """Parameter -> the blocks that act on it."""
    enabled: bool
    merged: Merged | None
    route: Route | None

    def __init__(self) -> None:
        super().__init__()
        # Here and below, straight into __dict__: assigning through nn.Module is slow.
        vars(self).update(active=(), live={}, enabled=True, merged=None, route=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._modules

    def __getitem__(self, adapter: str) -> Any:
        return self._modules[adapter]

    def blocks(self, adapter: str | None = None) -> dict[tuple[str, str], Block]:
        """Return (adapter, name of the weight) -> block, of one adapter or of all."""
        found: dict[tuple[str, str], Block] = {}
        for own, child in self._modules.items():
            if adapter is not None and own != adapter:
                continue
            if isinstance(child, Block):
                found[own, child.slot.name] = child
            elif child is not None:
                for block in child.children():
                    assert isinstance(block, Block)
                    found[own, block.slot.name] = block
        return found

    def add(self, adapter: str, blocks: Iterable[Block]) -> None:
        """Add blocks under a name that check_adapter_name has passed. It is not active yet."""
        blocks = list(blocks)
        for block in blocks:
            vars(block)["training"] = self.training
            block.set_enabled(self.enabled)
        child: nn.Module = blocks[0]
        if len(blocks) > 1 or blocks[0].slot.name:
            child = nn.ModuleDict({block.slot.name or "weight": block for block in blocks})
            child.train(self.training)
        self._modules[adapter] = child
        self.activate(self.active)

    def discard(self, adapter: str) -> None:
        """Remove the blocks of an adapter; it is no longer active."""
        self._modules.pop(adapter, None)
        self.activate(tuple(name for name in self.active if name != adapter))

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let exactly these adapters act; a name that this layer lacks is no error."""
        live: dict[str, tuple[Block, ...]] = {}
        for adapter in adapters:
            for block in self.blocks(adapter).values() if adapter in self else ():
                name = block.slot.parameter
                live[name] = (*live.get(name, ()), block)
        vars(self).update(active=adapters, live=live)

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters of the layer off or on again."""
        self.enabled = enabled
        for block in self.blocks().values():
            block.set_enabled(enabled)

    def acting(self, parameter: str) -> tuple[Block, ...]:
        """The blocks that act on a parameter for all samples."""
        # In a graph, `enabled` acts through the blocks' scale: reading it here would recompile.
        if not is_compiling() and not self.enabled:
            return ()
        if self.merged is not None or self.route is not None:
            return ()
        return self.live.get(parameter, ())

    def routed(self, parameter: str) -> Routed | None:
        """The updates of single samples, or None where samples are not routed."""
        if self.route is None or self.merged is not None or not self.enabled:
            return None
        updates = {}
        for adapter in self.route.adapters:
            blocks = self.blocks(adapter).values() if adapter in self else ()
            updates[adapter] = tuple(b.update() for b in blocks if b.slot.parameter == parameter)
        return Routed(self.route, updates)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside adapters_disabled or route_adapters is outside of them.
        return {**self.__dict__, "enabled": True, "route": None}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not callable: the layer that holds the adapters applies them."""
        raise ArgumentTypeError(
            "Adapters holds blocks and is not called; call the layer that it belongs to"
        )


class AdaptedLayer(nn.Module):
    """Base of the classes that modules move to when they are adapted.

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
        # A user's class that computes a weight: what it computes is what is adapted.
        for name in cls.adapted_parameters:
            if name in vars(cls):
                setattr(cls, name, _weight_property(cls, name))

    @property
    def base_weight(self) -> Tensor:
        """The original of `weight`, also while merged; a quantised one comes dequantised.

        Raises:
            AttributeError: the layer has adapted weights, and none is its `weight`.
        """
        if not any(name == "" for _, name in self.disha.blocks()):
            raise AttributeError("this layer has other adapted weights than `weight`")
        return AdaptedWeight(self, "").base

    def geometry(self) -> Geometry:
        """Return the sizes of `weight` that its blocks depend on."""
        return AdaptedWeight(self, "").geometry

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block of this layer, without its scale: a tensor of the weight's shape.

        Args:
            block: one of the layer's; `block.block` is D, `block.r` its shard size.
        """
        return AdaptedWeight(self, block.slot.name).delta_weight(block)

    def merged_weight(self, adapters: Iterable[str]) -> Tensor:
        """Return `weight` + sum of s * dW of the named adapters, whether merged now or not.

        Args:
            adapters: their names; one that the layer lacks adds nothing.
        """
        return AdaptedWeight(self, "").merged(adapters)

    def __delattr__(self, name: str) -> None:
        replaced = name in self.adapted_parameters and name in self._parameters
        # FullyShardedDataParallel replaces parameters by views of one flat parameter.
        if replaced and not asked_by("torch.distributed.fsdp"):
            raise ArgumentError(
                f"the {name} of an adapted {self.original_class.__qualname__} can't be replaced by "
                "one that is computed (a parametrization, say): its adapters would no longer act; "
                "remove the adapters first, and add them afterwards"
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Do as nn.Module does, without reading the weight that is there.

        FSDP sets one parameter after the other, and between them not all are whole.

        Args:
            name: the parameter's name.
            param: the parameter, or None for none.
        """
        if name in self.adapted_parameters and name in self._parameters:
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A class that saves by itself may have read an effective weight (PyTorch Geometric's).
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
            "nn.DataParallel can't run adapted layers on several devices: its replicas have no "
            "parameters of their own; use torch.nn.parallel.DistributedDataParallel"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "made_on_the_fly" not in cls.__dict__:
            return reduced
        made_of = (cls.original_class, cls.adapted_parameters, cls.is_opaque)
        return (_new_instance, made_of, *reduced[2:])

    def extra_repr(self) -> str:
        """Return how the layer is described in a model's printout."""
        state = f"active={list(self.disha.active)}"
        if self.disha.merged is not None:
            state += f", merged={list(self.disha.merged.adapters)}"
        elif not self.disha.enabled:
            state += ", disabled"
        return ", ".join(filter(None, (super().extra_repr(), state)))


# --- reading a parameter -------------------------------------------------------------------------


def _weight_property(original: type[nn.Module], name: str) -> property:
    """Return the property that reads a parameter as an effective weight.

    Args:
        original: the class before, which may compute the weight itself.
        name: the parameter's name.
    """
    read_base = _base_reader(original, name)
    keeps = not hasattr(original, name) and original.__getattr__ is nn.Module.__getattr__

    def read(layer: AdaptedLayer) -> Any:
        parameters: dict[str, Any] = layer._parameters
        base = parameters[name] if keeps and name in parameters else read_base(layer)
        adapters: Any = layer._modules.get(CHILD_NAME)
        if adapters is None:
            return base
        # What `Adapters.acting` does, inline: every forward comes here.
        state = adapters.__dict__
        if state["merged"] is not None:
            return base
        # In a graph, `enabled` acts through the blocks' scale: reading it here would recompile.
        if not is_compiling() and (not state["enabled"] or sys._getframe(1).f_code is BY_NAME):
            return base
        if state["route"] is not None:
            return _routed_weight(adapters, name, base)
        blocks = state["live"].get(name)
        if blocks is None:
            return base
        try:
            if type(base) not in PLAIN:
                return _weight_of_another_type(base, blocks)
            if base.is_meta:
                return _weight_on_meta(base, blocks)
            updates = (
                (blocks[0].update(),) if len(blocks) == 1 else tuple([b.update() for b in blocks])
            )
            return effective(base, blocks[0].slot.layout, updates)
        except (KeyError, ModeError):
            # FSDP and accelerate read the weight while its block is away, to replace or to move it.
            if asked_by("torch.distributed.fsdp") or asked_by(MOVES):
                return base
            raise
        except AttributeError as error:
            # nn.Module would answer with the plain parameter: an adapter without effect.
            raise RuntimeError(f"the update of {name} failed: {error}") from error

    def write(layer: AdaptedLayer, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: AdaptedLayer) -> None:
        del layer.__dict__[name]

    return property(read, write, delete)


def _base_reader(original: type[nn.Module], name: str) -> Callable[[Any], Any]:
    """Return how instances of a class answer for a parameter."""
    computes = inspect.getattr_static(original, name, None)
    if isinstance(computes, property) and computes.fget is not None:
        return computes.fget  # itself, since compiled code can't call `property.__get__`
    if hasattr(computes, "__get__"):
        return lambda layer: computes.__get__(layer, type(layer))
    looks_up: Any = original.__getattr__
    return lambda layer: layer.__dict__[name] if name in layer.__dict__ else looks_up(layer, name)


def _routed_weight(adapters: Any, name: str, base: Any) -> Any:
    blocks = tuple(one for one in adapters.blocks().values() if one.slot.parameter == name)
    if not blocks:
        return base
    if type(base) not in PLAIN:
        weight = _weight_of_another_type(base, blocks)
        if isinstance(weight, EffectiveWeight):
            weight.routed = Routed(adapters.route, {})  # so that computing it raises
        return weight
    if base.is_meta:
        return _weight_on_meta(base, blocks)
    return effective(base, blocks[0].slot.layout, (), adapters.routed(name))


def _weight_on_meta(base: Tensor, blocks: tuple[Block, ...]) -> Any:
    """Return what to read where the weight is on meta: with the whole model, or offloaded.

    A block with a hook is left alone: accelerate reads the weight before it brings the block.
    """
    here = all("forward" not in block.__dict__ and block.block.is_meta for block in blocks)
    updates = tuple(block.update(on_meta=True) for block in blocks) if here else ()
    return effective_on_meta(base, blocks[0].slot.layout, updates, absent=not here)


def _weight_of_another_type(base: Any, blocks: tuple[Block, ...]) -> Any:
    """Return what to read where the weight is no plain tensor.

    Between its passes, FSDP keeps shards in place of parameters and looks them up by name: it gets
    W as it is. For any other type, a tensor of a trace say, W + sum of s dW is computed.
    """
    if is_sharded(base):
        if asked_by("torch.distributed.fsdp"):
            return base
        if all(is_sharded(block.block) for block in blocks):
            updates = tuple(block.update() for block in blocks)
            return effective_of_shards(base, blocks[0].slot.layout, updates)
        raise ModeError(
            "an adapter can't act on a weight that is a DTensor while its block is none: the "
            "model was sharded after the adapter was injected (parallelize_module, say); wrap it "
            "by fully_shard, or merge the adapter first"
        )
    updates = tuple(block.update() for block in blocks)
    return functional.effective_weight(base, blocks[0].slot.layout, updates)


# --- one weight ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedWeight:
    """An adapted weight of a layer: the blocks of all adapters, and W.

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

    @cached_property
    def slot(self) -> Slot:
        """Where the weight is, as its first adapter has it."""
        return next(iter(self.blocks.values())).slot

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter, or None where it is computed from others (a parametrization)."""
        return self.layer._parameters.get(self.slot.parameter)

    @property
    def base(self) -> Tensor:
        """The original of the whole parameter, also while merged; quantised ones dequantised."""
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
        """The part of the original that is adapted."""
        return self.slot.layout.part(self.base, self.slot.rows)

    @property
    def geometry(self) -> Geometry:
        """The sizes that blocks depend on."""
        return self.slot.layout.geometry(weight_shape(self.layer, self.slot), self.slot.rows)

    @property
    def quantisation(self) -> opaque.Quantisation | None:
        """How the weight is quantised; None where it is not."""
        return opaque.quantisation_of(self.layer, stored_weight(self.layer, self.slot.parameter))

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block, without its scale: a tensor of the parameter's shape."""
        slot, values = block.slot, block.block
        if slot.opaque:
            stored = stored_weight(self.layer, slot.parameter)
            base = opaque.weight_for(block.method, self.layer, slot, stored, values)
        else:
            base = self.base
        return functional.delta_weight(block.method, slot.layout, values, base, slot.rows)

    def merged(self, adapters: Iterable[str]) -> Tensor:
        """Return W + sum of s * dW of the named adapters; the whole parameter."""
        own = self.layer.disha.blocks()
        name = self.slot.parameter
        deltas = [
            (self.delta_weight(block), block.strength)
            for adapter in adapters
            for (other, _), block in own.items()
            if other == adapter and block.slot.parameter == name
        ]
        return functional.merged_weight(self.base, deltas)


def read_weight(module: nn.Module, name: str) -> Any:
    """Return a weight of a module without updates, or None if it has none of that name.

    In training, torch's spectral_norm improves its estimate at each read of the weight. Only the
    module's own forward should do that. So this reads as in evaluation, and changes no estimate.
    """
    parametrizations = module._modules.get("parametrizations")
    found = None if parametrizations is None else parametrizations._modules.get(name)
    trained = [] if found is None else [part for part in found.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        if isinstance(module, AdaptedLayer):
            return _base_reader(type(module).original_class, name)(module)
        return getattr(module, name, None)
    finally:
        for part in trained:
            part.training = True


def stored_weight(module: nn.Module, name: str) -> Tensor | None:
    """Return the weight that a module holds, or the quantised one that a dense one stands in for.

    None where it is computed from others (a parametrization), which asking for it would run.
    """
    adapters = module._modules.get(CHILD_NAME)
    merged = adapters.merged if isinstance(adapters, Adapters) else None
    original = None if merged is None else merged.originals.get(name)
    if original is not None and original.dense:
        return original.parameter
    return module._parameters.get(name, module._buffers.get(name))


def weight_shape(module: nn.Module, slot: Slot) -> tuple[int, ...]:
    """Return the shape of a slot's parameter, or of the weight that a packed one stands for."""
    if slot.shape is not None:
        return slot.shape
    return tuple(read_weight(module, slot.parameter).shape)


def make_block(
    module: nn.Module,
    slot: Slot,
    config: AdapterConfig,
    r: int,
    dtype: torch.dtype | None = None,
) -> Block:
    """Return a new block for a weight of a module, on the weight's device.

    Args:
        module: the module, adapted already or not yet.
        slot: the weight.
        config: the adapter's configuration.
        r: shard size.
        dtype: dtype of the block; by default the configuration's, or else the weight's, and float32
            over a quantised weight.
    """
    shape = functional.block_shape(
        config.method, slot.layout, weight_shape(module, slot), r, config.r_out, slot.rows
    )
    if slot.opaque:  # never read
        device, own = opaque.device_of(module), torch.float32
    else:
        weight = read_weight(module, slot.parameter)
        device, own = device_of_weight(module, weight), weight.dtype
        own = own if own in DENSE_DTYPES else torch.float32
    return Block(
        shape, slot=slot, config=config, r=r, device=device, dtype=dtype or config.dtype or own
    )


def device_of_weight(module: nn.Module, weight: Tensor) -> torch.device:
    """Return the device of a weight, or the one that accelerate brings it to for each forward.

    Args:
        module: the module of the weight.
        weight: as it is now, between forwards.
    """
    for hook in offloading_hooks(module) if weight.is_meta else ():
        if hook.execution_device is not None and not hook.place_submodules:
            return torch.device(hook.execution_device)
    return weight.device


def offloading_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate that bring weights for a forward of this module."""
    hook = module.__dict__.get("_hf_hook")
    parts = getattr(hook, "hooks", (hook,))  # of a sequence of hooks
    return [part for part in parts if getattr(part, "offload", False) is True]


# --- moving classes ------------------------------------------------------------------------------

_Key = tuple[type[nn.Module], tuple[str, ...], bool]
_CLASSES: dict[_Key, type[AdaptedLayer]] = {}


def adapted_class(
    original: type[nn.Module], parameters: tuple[str, ...], is_opaque: bool
) -> type[AdaptedLayer]:
    """Return the class that a module of class `original` moves to; one per combination."""
    key = (original, parameters, is_opaque)
    if key not in _CLASSES:
        namespace: dict[str, Any] = {
            "__module__": AdaptedLayer.__module__,
            "__doc__": f"{original.__qualname__}, adapted by disha.",
            "made_on_the_fly": True,
            "original_class": original,
            "adapted_parameters": parameters,
            "is_opaque": is_opaque,
        }
        if hasattr(original, "reset_parameters"):
            namespace["reset_parameters"] = reset_parameters
        if is_opaque:
            bases: tuple[type, ...] = (opaque.front_of(original), AdaptedLayer, original)
        else:
            namespace |= {name: _weight_property(original, name) for name in parameters}
            bases = (AdaptedLayer, original)
            if issubclass(original, nn.RNNBase):
                bases = (_Recurrent, *bases)
        _CLASSES[key] = type(f"Adapted{original.__name__}", bases, namespace)
    return _CLASSES[key]


def reset_parameters(layer: AdaptedLayer) -> None:
    """Draw the base weights anew, and set every block to its initial values.

    Raises:
        MergeError: adapters are merged, so that unmerging would undo this.
    """
    adapters = layer._modules.get(CHILD_NAME)  # not there yet while a layer constructs itself
    original: Any = layer.original_class
    reset: Callable[[nn.Module], None] = original.reset_parameters
    if not isinstance(adapters, Adapters):
        reset(layer)
        return
    refuse_merged([layer], "reset parameters")
    reset(layer)  # what it writes into an effective weight goes to W
    for block in adapters.blocks().values():
        block.reset_parameters()


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """An `nn.Linear` with adapters; `inject_adapters` turns linear layers into it."""

    original_class = nn.Linear
    adapted_parameters = ("weight",)
    reset_parameters = reset_parameters


AdaptedLinear.weight = _weight_property(nn.Linear, "weight")  # type: ignore[assignment]
_CLASSES[nn.Linear, ("weight",), False] = AdaptedLinear


class _Recurrent(nn.Module):
    """In front of `nn.RNN`, `nn.LSTM` and `nn.GRU`, which keep a list of their weights."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights as they read now; torch's own list has the plain parameters."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        parameters = self._parameters
        self.__dict__["_flat_weights"] = [parameters.get(name) for name in self._flat_weights_names]

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)  # torch's would write into the list as well

    def _update_flat_weights(self) -> None:
        """Nothing is kept that could be out of date."""

    def flatten_parameters(self) -> None:
        """Leave the weights where they are: a computed weight is not part of a larger one."""


def _new_instance(
    original: type[nn.Module], parameters: tuple[str, ...], is_opaque: bool
) -> nn.Module:
    cls = adapted_class(original, parameters, is_opaque)
    return cls.__new__(cls)


def adapt(module: nn.Module, slots: Iterable[Slot]) -> Callable[[], None]:
    """Move a module to the class in which the slots' parameters are adapted; return the way back.

    Args:
        module: the module, adapted already or not yet.
        slots: weights of it; those that were adapted before stay so.

    Raises:
        ArgumentError: the module's class does not allow it.
    """
    slots, before = list(slots), type(module)
    names = [slot.parameter for slot in slots]
    original, is_opaque = before, any(slot.opaque for slot in slots)
    if isinstance(module, AdaptedLayer):
        original, is_opaque = before.original_class, before.is_opaque  # type: ignore[attr-defined]
        names = [*before.adapted_parameters, *names]  # type: ignore[attr-defined]
        if set(names) <= set(before.adapted_parameters):  # type: ignore[attr-defined]
            return lambda: None
        refuse_changed_class(module, "it")
    cls = adapted_class(original, tuple(dict.fromkeys(names)), is_opaque)
    try:
        _set_class(module, cls)
    except TypeError as error:
        raise ArgumentError(
            f"{original.__name__} can't be adapted: Python does not let its class change "
            f"({error}); leave it out with exclude="
        ) from error
    if CHILD_NAME in module._modules:
        return lambda: _set_class(module, before)
    adapters = Adapters()
    vars(adapters)["training"] = module.training
    # Straight into _modules: the user's class may guard its attributes.
    module._modules[CHILD_NAME] = adapters
    if is_opaque:
        opaque.attach_hook(module)
    return lambda: restore(module)


def restore(layer: nn.Module) -> None:
    """Give a module its original class back; its adapters are gone."""
    del layer._modules[CHILD_NAME]
    opaque.remove_hook(layer)
    _set_class(layer, type(layer).original_class)  # type: ignore[attr-defined]
    if isinstance(layer, nn.RNNBase):
        layer.__dict__["_flat_weights"] = [
            layer._parameters.get(name) for name in layer._flat_weights_names
        ]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # Not by assignment: the user's class may guard its attributes.
    object.__setattr__(module, "__class__", cls)


def refuse_changed_class(layer: nn.Module, name: str) -> None:
    """Raise if something derived another class from the one that the module was moved to.

    Raises:
        ArgumentError: giving back the original class would undo that change too.
    """
    if "original_class" not in type(layer).__dict__:
        raise ArgumentError(
            f"{name or 'the model'} has become a {type(layer).__name__} since it was adapted (by "
            "a parametrization or a wrapper, say), so its original class can't be given back; undo "
            "that change first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


def refuse_merged(layers: Iterable[AdaptedLayer], action: str) -> None:
    """Raise if any of the layers is merged.

    Raises:
        MergeError: adapters are merged, so that `action` would mix merged and unmerged ones.
    """
    merged = [layer.disha.merged for layer in layers if layer.disha.merged is not None]
    if merged:
        names = dict.fromkeys(repr(name) for one in merged for name in one.adapters)
        raise MergeError(
            f"can't {action} while adapters are merged (now: {', '.join(names)}); "
            "call unmerge_adapters(model) first"
        )


def refuse_inside(layers: Iterable[AdaptedLayer], action: str) -> None:
    """Raise if the model is inside adapters_disabled or route_adapters, or merged.

    Raises:
        MergeError: adapters are merged.
        ModeError: leaving the context would not find the layers that it entered with.
    """
    layers = list(layers)
    refuse_merged(layers, action)
    for context, inside in (
        ("adapters_disabled", any(not layer.disha.enabled for layer in layers)),
        ("route_adapters", any(layer.disha.route is not None for layer in layers)),
    ):
        if inside:
            raise ModeError(f"can't {action} inside {context}; leave it first")
