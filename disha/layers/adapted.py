"""AdaptedLayer: what every adapted layer has in common.

An adapted layer is a module moved to a subclass of its own class (`disha.layers.classes`). It holds
its adapters in one child, `disha`, and its layer kind says what a block is and does there. A class
with a forward of its own gets one of ours in front (`disha.layers.fronts`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from disha import functional
from disha.config import BLOCK_DTYPES, AdapterConfig
from disha.errors import ArgumentError, ArgumentTypeError, MergeError, ModeError
from disha.layers import quantised
from disha.layers.blocks import BLOCKS, Bat, Block
from disha.layers.classes import Moved, move_back
from disha.layers.quantised import Quantisation
from disha.layers.routing import Route

__all__ = [
    "CHILD_NAME",
    "AdaptedLayer",
    "Adapters",
    "Geometry",
    "MergedWeight",
    "WeightSlot",
    "attach",
    "current_caller",
    "read_weight",
    "refuse_inside",
    "refuse_merged",
    "restore",
]

CHILD_NAME = "disha"
"""Name of the one sub-module that adapting adds to a module."""

DENSE_DTYPES = frozenset(BLOCK_DTYPES.values())
"""A set, since torch 2.6 can't compile a look into the values of a dict."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer that its blocks depend on.

    Attributes:
        in_features: what r cuts into shards: a linear layer's inputs, the input channels of one
            group of a convolution, the rows of an embedding.
        out_features: what r_out cuts: its outputs, output channels, or the size of a row.

    Examples:
        >>> import disha
        >>> layer = disha.BoneLinear(8, 16, r=4)
        >>> layer.geometry(layer)
        Geometry(in_features=8, out_features=16)
    """

    in_features: int
    out_features: int


@dataclass(frozen=True)
class MergedWeight:
    """What unmerging needs: the adapters that were merged, and the original weight.

    `data` is the former data of the parameter that holds the weight, `parameter` the former
    parameter itself where the layer was untied from it, else None. Where `dense`, a dense weight
    stands in for the quantised `parameter`. A layer that has none of the merged adapters falls
    silent with the others: no adapters, no data.
    """

    adapters: tuple[str, ...] = ()
    data: Tensor | None = None
    parameter: nn.Parameter | None = None
    dense: bool = False


@dataclass(frozen=True)
class WeightSlot:
    """Where a layer's weight is kept: a parameter of a module, or some rows of one."""

    module: nn.Module
    name: str
    rows: slice | None = None

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter, or None where the weight is computed from others (a parametrization)."""
        return self.module._parameters.get(self.name)

    def of(self, whole: Tensor) -> Tensor:
        """Return the layer's part of the parameter, or of a tensor in place of it."""
        return whole if self.rows is None else whole[self.rows]


def read_weight(module: nn.Module, name: str) -> Any:
    """Return the weight of a module, or None; where it is computed, without a step of training.

    In training, the spectral_norm of torch improves its estimate whenever the weight is read: that
    is for the module's own forward to do. What is returned is the weight that this read last.
    """
    parametrizations = module._modules.get("parametrizations")
    computed = None if parametrizations is None else parametrizations._modules.get(name)
    trained = [] if computed is None else [part for part in computed.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        return getattr(module, name, None)
    finally:
        for part in trained:
            part.training = True


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act."""

    active: tuple[str, ...]
    live: tuple[Block, ...]
    enabled: bool
    merged: MergedWeight | None
    route: Route | None
    calls: dict[int, bool]
    """Forward calls under way -> whether they have called acting()."""

    def __init__(self) -> None:
        super().__init__()
        # Here and below, straight into __dict__: nn.Module looks at what it is given for long.
        vars(self).update(active=(), live=(), enabled=True, merged=None, route=None, calls={})

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
        vars(block)["training"] = self.training
        block.set_enabled(self.enabled)
        self.activate(self.active)

    def discard(self, adapter: str) -> None:
        """Remove a block; it is no longer active."""
        self._modules.pop(adapter, None)
        self.activate(tuple(name for name in self.active if name != adapter))

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let exactly these adapters act; a name that this layer lacks is no error."""
        live = tuple(self[name] for name in adapters if name in self)
        vars(self).update(active=adapters, live=live)

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters of the layer off or on again."""
        self.enabled = enabled
        for adapter in self:
            self[adapter].set_enabled(enabled)

    def acting(self) -> tuple[Block, ...]:
        """The blocks that forward has to apply to all samples; who calls this applies them."""
        if self.calls:
            self._note_call()
        if self.merged is not None or self.route is not None:
            return ()
        # In a graph, `enabled` acts through the blocks' scale: reading it here would recompile.
        if not torch.compiler.is_compiling() and not self.enabled:
            return ()
        return self.live

    def _note_call(self) -> None:
        """Tell the call under way that the update has been asked for where it belongs."""
        caller = current_caller()
        if caller not in self.calls:
            # Inside of a graph's gap, or in a thread that the user's forward has started.
            caller = GRAPH if GRAPH in self.calls else next(iter(self.calls))
        self.calls[caller] = True

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside adapters_disabled or route_adapters is outside of them.
        return {**self.__dict__, "enabled": True, "route": None, "calls": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not callable: the layer that holds the adapters applies them."""
        raise ArgumentTypeError(
            "Adapters holds blocks and is not called; call the layer that it belongs to"
        )


class AdaptedLayer(Moved):
    """Base of all adapted layers; a layer kind derives from it and declares what is its own.

    What a kind must have: `geometry`, `block_shape`, `delta_weight` and `delta_output`. What it may
    have: any of the attributes below, `obstacle`, `misfit`, `has_samples` and `example_input`.

    A kind that also derives from the class it adapts, its `base_class`, has a `forward` that
    returns `self.updated(output, self.disha.acting(), input)`; subclasses of that class then keep a
    forward of their own. Any other kind goes in front of the class, and the update is added to what
    its forward returns. `register_layer_kind` shows a whole kind.

    Attributes:
        layer_kind: the kind itself, on the classes that are made of it.
        own_forward: whether the class that was adapted has another forward than `base_class`.
        library_forward: whether that forward is bitsandbytes' own, for quantised weights.
        input_name: the name of that forward's first parameter.
        weight_name: the name of the parameter that holds W.
        methods: the methods that the kind knows, `"bone"` or both.
        linear: whether `"all-linear"` means layers of this kind.
        weight_layout: how W is laid out where files can do without the module, or None.
        shard_dim: the dimension of a Bone block along which the inputs' shards run.
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
        >>> torch.equal(layer.merged_weight(["default"]), layer.weight)
        False
    """

    layer_kind: ClassVar[type[AdaptedLayer]]
    own_forward: ClassVar[bool] = False
    library_forward: ClassVar[bool] = False
    input_name: ClassVar[str] = ""
    weight_name: ClassVar[str] = "weight"
    methods: ClassVar[tuple[str, ...]] = ("bone",)
    linear: ClassVar[bool] = False
    weight_layout: ClassVar[str | None] = None
    shard_dim: ClassVar[int] = 0

    disha: Adapters

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return the sizes of `module`, which this kind adapts or has adapted.

        Args:
            module: the layer, adapted already or not yet.
        """
        raise NotImplementedError

    @classmethod
    def layout(cls, module: nn.Module) -> str | None:
        """Return the kind's `weight_layout`, by which dW follows from a block without the module.

        None where it does not: a kind that declares a `delta_weight` of its own has no layout
        unless it declares that too.

        Args:
            module: the layer, adapted already or not yet.
        """
        for owner in getattr(cls, "layer_kind", cls).__mro__:
            if "weight_layout" in vars(owner):
                declared: str | None = vars(owner)["weight_layout"]
                return declared
            if "delta_weight" in vars(owner):
                return None
        return None

    @classmethod
    def obstacle(cls, module: nn.Module, method: str) -> str | None:
        """Return why `method` can't adapt `module`, or None if it can.

        Args:
            module: the layer, adapted already or not yet.
            method: `"bone"` or `"bat"`.
        """
        weight = read_weight(module, cls.weight_name)
        if isinstance(weight, UninitializedParameter):
            return "its weight is not initialised yet; run the model once before injecting"
        quantisation = cls.quantisation(module)
        dense = isinstance(weight, Tensor) and weight.is_floating_point()
        if quantisation is None and not dense:
            return "its weight is not a floating-point tensor"
        if method not in cls.methods:
            return f"{method!r} does not adapt {type(module).__name__}, {cls.methods[0]!r} does"
        if quantisation is not None and quantisation.read is None and method == Bat.method:
            return (
                f"its weight is quantised ({quantisation.name}) and can't be read as numbers; "
                f"{method!r} needs to, 'bone' does not"
            )
        return None

    @classmethod
    def quantisation(cls, module: nn.Module) -> Quantisation | None:
        """Return how the weight of `module`, adapted or not, is quantised; None where it is not.

        Args:
            module: the layer, adapted already or not yet.
        """
        weight = _stored_weight(module, cls.weight_name)
        if quantised.is_dense(weight):
            return None
        found = quantised.quantisation_of(module, weight)
        if found is not None or cls.base_class is None or not isinstance(weight, Tensor):
            return found
        original = getattr(type(module), "original_class", type(module))
        dense = weight.dtype in DENSE_DTYPES or weight.is_complex()
        if dense or original.forward is cls.base_class.forward:
            return None
        return quantised.UNKNOWN

    @classmethod
    def block_shape(
        cls, module: nn.Module, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return the shape of a block for `module`.

        Args:
            module: the layer, adapted already or not yet.
            method: `"bone"` or `"bat"`.
            r: shard size.
            r_out: size of the output shard of a tile, or None.
        """
        raise NotImplementedError

    @classmethod
    def misfit(cls, geometry: Geometry, r: int, r_out: int | None) -> str | None:
        """Return why blocks of these sizes don't fit a layer of that geometry, or None.

        Args:
            geometry: the layer's sizes.
            r: shard size.
            r_out: size of the output shard of a tile, or None.
        """
        if r > geometry.in_features:
            return f"r={r} is larger than in_features={geometry.in_features}"
        if r_out is not None and geometry.out_features % r_out:
            return f"r_out={r_out} does not divide out_features={geometry.out_features}"
        return None

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW of a block of this layer, without its scale: a tensor of the weight's shape.

        Args:
            block: one of the layer's; `block.block` is D, `block.r` its shard size.
        """
        raise NotImplementedError

    def delta_output(self, block: Block, input: Tensor, *more: Any) -> Tensor:
        """Return what a block adds to the layer's output, scaled and with its dropout.

        Args:
            block: one of the layer's; `block.dropped(input)` is its input, and
                `block.current_scale()` its scale s.
            input: the layer's input.
            more: what else the kind's forward passes to `updated`.
        """
        raise NotImplementedError

    @classmethod
    def example_input(cls, module: nn.Module, generator: torch.Generator) -> Tensor:
        """Return a small random input that `module` takes, in float32 on the CPU if not integer.

        Args:
            module: the layer, adapted already or not yet.
            generator: where the numbers come from.
        """
        return torch.randn(2, cls.geometry(module).in_features, generator=generator)

    def widened(self, block: Block, r: int) -> Tensor:
        """Return the values of a Bone block for a larger shard size, a multiple of its own.

        D'[j] = D[j mod r], which gives the same dW.

        Args:
            block: a Bone block of this layer, or a tile.
            r: the larger shard size.
        """
        return functional.widened_block(block.block, block.r, r, self.shard_dim)

    @classmethod
    def has_samples(cls, module: nn.Module, input: Tensor) -> bool:
        """Return whether the leading dimension of an input of `module` counts samples.

        Args:
            module: the layer, adapted already or not yet.
            input: what it is called with.
        """
        return input.dim() >= 2

    def updated(self, output: Tensor, acting: Iterable[Block], input: Tensor, *more: Any) -> Tensor:
        """Return the output plus the update of every acting block, or of the routed ones.

        Args:
            output: what the layer returns without them.
            acting: the blocks that act on all samples.
            input: the layer's input.
            more: further arguments of `delta_output`.

        Raises:
            ArgumentError: samples are routed, and the input has none.
        """
        for block in acting:
            output = output + self.delta_output(block, input, *more).to(output.dtype)
        route = self.disha.route
        if route is None or not self.disha.enabled:
            return output
        if not self.has_samples(self, input):
            raise ArgumentError(
                f"route_adapters needs one sample per entry of the leading dimension, and "
                f"{self.original_class.__name__} got an input of shape {tuple(input.shape)}"
            )
        return self.routed(output, route, input, *more)

    def updated_in_place(
        self, fresh: Tensor, acting: Iterable[Block], input: Tensor, *more: Any
    ) -> Tensor:
        """Return what `updated` does, written into a result that nobody else has where it may be.

        Args:
            fresh: what the layer returns without them, of an operation that does not keep it.
            acting: the blocks that act on all samples.
            input: the layer's input.
            more: further arguments of `delta_output`.
        """
        for block in acting:
            fresh = functional.added(fresh, self.delta_output(block, input, *more))
        return self.updated(fresh, (), input, *more)

    def routed(self, output: Tensor, route: Route, input: Tensor, *more: Any) -> Tensor:
        """Return the output plus, for each sample, the update of its own adapter.

        Args:
            output: what the layer returns without adapters.
            route: the adapter of each sample.
            input: the layer's input, samples first.
            more: further arguments of `delta_output`, which each adapter is given whole: a kind
                whose further inputs have samples too picks theirs in a `routed` of its own.
        """
        for adapter in route.adapters:
            rows = route.rows(adapter, input)
            if adapter in self.disha:
                delta = self.delta_output(self.disha[adapter], input.index_select(0, rows), *more)
                output = output.index_add(0, rows, delta.to(output.dtype))
        return output

    @classmethod
    def make_block(
        cls, module: nn.Module, config: AdapterConfig, r: int, dtype: torch.dtype | None = None
    ) -> Block:
        """Return a new block that fits `module`, on its weight's device.

        Args:
            module: the module, adapted already or not yet.
            config: the adapter's configuration.
            r: shard size at this module.
            dtype: dtype of the block; by default the configuration's, or else the weight's, and
                float32 over a quantised weight.
        """
        shape = cls.block_shape(module, config.method, r, config.r_out)
        weight = read_weight(module, cls.weight_name)
        dense = weight.dtype in BLOCK_DTYPES.values() and cls.quantisation(module) is None
        own = weight.dtype if dense else torch.float32
        dtype = dtype or config.dtype or own
        return BLOCKS[config.method](shape, config=config, r=r, device=weight.device, dtype=dtype)

    @classmethod
    def facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return class attributes for a class that is made of `original` and this kind.

        Args:
            original: the class of the layers before they are adapted.
        """
        base = cls.base_class
        return {
            "own_forward": base is not None and original.forward is not base.forward,
            "library_forward": quantised.is_library_forward(original),
            "input_name": _first_parameter(original.forward),
        }

    @property
    def weight_slot(self) -> WeightSlot:
        """Where the weight is kept."""
        return WeightSlot(self, self.weight_name)

    @property
    def base_weight(self) -> Tensor:
        """The original weight, also while merged; a quantised one comes dequantised."""
        slot, merged = self.weight_slot, self.disha.merged
        if merged is not None and merged.data is not None:
            return slot.of(merged.data)
        stored = slot.parameter
        if merged is not None and merged.parameter is not None:
            stored = merged.parameter
        weight: Tensor = read_weight(self, self.weight_name) if stored is None else slot.of(stored)
        return quantised.dequantised(self, weight)

    def merged_weight(self, adapters: Iterable[str]) -> Tensor:
        """Return W + sum of s * dW of the named adapters, whether merged now or not.

        Args:
            adapters: their names; one that the layer lacks adds nothing.

        Raises:
            MergeError: the kind's `delta_weight` gives a tensor of another shape than W's.
        """
        blocks = [self.disha[adapter] for adapter in adapters if adapter in self.disha]
        deltas = [(self.delta_weight(block), block.strength) for block in blocks]
        weight = self.base_weight
        for delta, _ in deltas:
            if delta.shape != weight.shape:
                raise MergeError(
                    f"{type(self).layer_kind.__name__}.delta_weight gives an update of shape "
                    f"{tuple(delta.shape)}, not that of the weight, {tuple(weight.shape)}"
                )
        return functional.merged_weight(weight, deltas)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.disha.merged is not None and prefix + self.weight_name in state_dict:
            refuse_merged([self], f"load {prefix}{self.weight_name}, which unmerging would undo,")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise ModeError(
            "nn.DataParallel can't run adapted layers on several devices: its replicas have no "
            "parameters of their own; use torch.nn.parallel.DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        """Return how the layer is described in a model's printout."""
        state = f"active={list(self.disha.active)}"
        if self.disha.merged is not None:
            state += f", merged={list(self.disha.merged.adapters)}"
        elif not self.disha.enabled:
            state += ", disabled"
        return ", ".join(filter(None, (super().extra_repr(), state)))


def _stored_weight(module: nn.Module, name: str) -> Tensor | None:
    """Return the weight that a module holds, or the quantised one that a dense one stands in for.

    None where it is computed from others (a parametrization), which asking for it would run.
    """
    adapters = module._modules.get(CHILD_NAME)
    merged = adapters.merged if isinstance(adapters, Adapters) else None
    if merged is not None and merged.dense:
        return merged.parameter
    return module._parameters.get(name, module._buffers.get(name))


def _first_parameter(forward: Callable[..., Any]) -> str:
    """Return the name under which a forward takes its first input, or "" where it shows none."""
    try:
        _, *parameters = inspect.signature(forward).parameters.values()
    except ValueError:  # written in C, without a signature
        return ""
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named[0] if named else ""


GRAPH = 0


def current_caller() -> int:
    """Tell threads that share a module apart; a graph is traced by one of them."""
    return GRAPH if torch.compiler.is_compiling() else threading.get_ident()


def attach(layer: AdaptedLayer) -> None:
    """Give a layer of an adapted class its holder of adapters, empty."""
    adapters = Adapters()
    vars(adapters)["training"] = layer.training
    # Straight into _modules: the user's class may guard its attributes.
    layer._modules[CHILD_NAME] = adapters


def restore(layer: AdaptedLayer) -> None:
    """Give the module its original class back; its adapters are gone."""
    del layer._modules[CHILD_NAME]
    move_back(layer)


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
