"""AdaptedLayer: a module whose adapted parameters read as effective weights.

To adapt a module, its class is replaced by a subclass with a property for each adapted parameter.
It stays the same object, so hooks, references, `isinstance` checks, parameters and state-dict keys
do not change, and its own forward runs. A new child module, `disha`, holds the blocks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from disha.effective.contexts import open_context
from disha.errors import ArgumentError, MergeError, ModeError
from disha.layers import quantized
from disha.layers.adapters import MERGED, Adapters, LayerState
from disha.layers.blocks import AdapterBlock
from disha.layers.containers import CHILD_NAME, methods_without_child
from disha.layers.memory import ModelMemory
from disha.layers.state_dicts import watch_loading
from disha.layers.weight_property import is_weight_of, linear_forward, weight_property
from disha.layers.weights import (
    adapted_weights,
    base_of,
    delta_of,
    start_block,
    untrained_rows_kept,
)
from disha.sharding.zero import whole_shape


class AdaptedLayer(nn.Module):
    """Base class of the classes that adapted modules get.

    Attributes:
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

    # Private, so that a user's module gets three public names and no more.
    _original_class: ClassVar[type[nn.Module]]
    _adapted_parameters: ClassVar[tuple[str, ...]] = ()  # those that read as effective weights
    _is_quantized: ClassVar[bool] = False
    _has_own_reading: ClassVar[bool] = False  # whether a user's subclass computes weight or bias

    disha: Adapters

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_made_by_disha" in vars(cls):
            return
        # A user's subclass may compute a weight itself; then the computed weight is adapted.
        for name in cls._adapted_parameters:
            if name in vars(cls):
                setattr(cls, name, weight_property(cls, name))

    @property
    def base_weight(self) -> Tensor:
        """The original of `weight`, also while merged; dequantised if it is quantised.

        Raises:
            AttributeError: the layer's `weight` is not adapted.
        """
        specs = adapted_weights(self, self.disha)
        if "weight" not in specs:
            raise AttributeError("`weight` is not adapted")  # nn.Module replaces this message
        return base_of(self, specs["weight"])

    def delta_weight(self, block: AdapterBlock) -> Tensor:
        """Return dW of a block of this layer, without its scale: a tensor of the weight's shape.

        Args:
            block: one of the layer's blocks; `block.block` is D, `block.r` its shard size.
        """
        return delta_of(self, block)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            warnings.warn(QCONFIG_IS_IGNORED, stacklevel=2)
        if is_weight_of(self, name, value):
            return
        if name in self._adapted_parameters and isinstance(value, nn.Parameter):
            _refuse_other_shape(self, name, value)
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.disha.merged is not None:
            destination[prefix + MERGED] = torch.tensor(True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.disha.merged is not None:
            for name in self.disha.merged.originals:
                if prefix + name in state_dict:
                    refuse_merged([self], f"load {prefix}{name}, which unmerging would undo,")
        elif prefix + MERGED in state_dict:
            error_messages = args[-1]
            if STATE_IS_MERGED not in error_messages:  # once, and not for each layer
                error_messages.append(STATE_IS_MERGED)
            return
        loaded = [name for name in self._adapted_parameters if prefix + name in state_dict]
        # The blocks load after their layer, so those in the state dict replace these values.
        with untrained_rows_kept(self, loaded):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the arguments of `adapted_class`, because the class itself is in no module."""
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "_made_by_disha" not in vars(cls):
            return reduced
        arguments = cls._original_class, cls._adapted_parameters, cls._is_quantized
        return (_new_instance, arguments, *reduced[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch_loading()

    def __prepare_scriptable__(self) -> Any:
        raise ModeError(
            "torch.jit.script can't compile adapted layers; use torch.jit.trace or torch.export, "
            "or merge first (merge_adapters with unload=True)"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise ModeError(
            "nn.DataParallel can't run adapted layers on several devices, because its replicas "
            "have no parameters; use torch.nn.parallel.DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        """Return the layer's description in a model's printout."""
        parts = [f"active={list(self.disha.active)}"]
        of_layer = super().extra_repr()
        if of_layer:
            parts.insert(0, of_layer)
        if self.disha.merged is not None:
            parts.append(f"merged={list(self.disha.merged.adapters)}")
        elif self.disha.find_override() == ():
            parts.append("disabled")
        return ", ".join(parts)


def _refuse_other_shape(layer: Any, name: str, value: Tensor) -> None:
    """Raise if a matrix of other sizes takes the place of an adapted one: no block would fit."""
    former = layer._parameters.get(name)
    sizes = [] if former is None else [whole_shape(former), whole_shape(value)]
    if len(set(sizes)) == 2 and len(sizes[0]) == len(sizes[1]):
        raise ArgumentError(
            f"an adapted {name} of shape {tuple(sizes[0])} can't be replaced by one of shape "
            f"{tuple(sizes[1])}, which its blocks do not fit; remove the adapters, and inject again"
        )


STATE_IS_MERGED = (
    "the state was taken while adapters were merged, so their updates would act twice; take it "
    "after unmerge_adapters(model), or load it into a plain model (strict=False)"
)
"""The error of `load_state_dict` for a state with merged weights."""

QCONFIG_IS_IGNORED = (
    "torch.ao.quantization finds layers by their exact class, so it leaves adapted layers in "
    "floating point; to quantise them too, call merge_adapters(model, unload=True) first"
)
"""The warning when `quantize_dynamic`, `prepare_qat` and the like come across an adapted layer."""


def refuse_merged(layers: Iterable[AdaptedLayer], action: str) -> None:
    """Raise if any of the layers is merged, so an action would mix merged and unmerged adapters."""
    merged = [layer.disha.merged for layer in layers if layer.disha.merged is not None]
    if merged:
        names = dict.fromkeys(repr(name) for of_layer in merged for name in of_layer.adapters)
        raise MergeError(
            f"can't {action} while adapters are merged (now: {', '.join(names)}); "
            "call unmerge_adapters(model) first"
        )


# --- to an adapted class and back ----------------------------------------------------------------


@functools.cache
def adapted_class(
    original: type[nn.Module], parameters: tuple[str, ...], is_quantized: bool
) -> type[AdaptedLayer]:
    """Return the adapted class for `original`, the same one for the same arguments."""
    if (original, parameters) == (nn.Linear, ("weight",)) and not is_quantized:
        return AdaptedLinear
    namespace = {
        "__module__": original.__module__,  # torch.fx traces no layer that torch.nn defines
        "__doc__": f"{original.__qualname__}, adapted by disha.",
        "_made_by_disha": True,
        "_original_class": original,
        "_adapted_parameters": parameters,
        "_is_quantized": is_quantized,
    }
    if hasattr(original, "reset_parameters"):
        namespace["reset_parameters"] = reset_parameters
    leading: tuple[type, ...] = ()
    if is_quantized:
        leading = quantized.leading_bases(original)
    else:
        namespace |= {name: weight_property(original, name) for name in parameters}
        namespace |= methods_without_child(original)
        if issubclass(original, nn.RNNBase):
            leading = (_Recurrent,)
    bases = (*leading, AdaptedLayer, original)
    return type(f"Adapted{original.__name__}", bases, namespace)


def _new_instance(*arguments: Any) -> nn.Module:
    cls = adapted_class(*arguments)
    return cls.__new__(cls)


def reset_parameters(layer: AdaptedLayer) -> None:
    """Draw the base weights again, and set every block to its initial values."""
    adapters = layer._modules.get(CHILD_NAME)  # not there yet while a layer constructs itself
    original: Any = layer._original_class
    if not isinstance(adapters, Adapters):
        original.reset_parameters(layer)
        return
    refuse_merged([layer], "reset parameters")
    # Adapters are disabled, because `weight[padding_idx].fill_(0)` must write into W.
    with open_context(frozenset([adapters.group]), (), disables=True):
        original.reset_parameters(layer)
    for block in adapters.blocks_by_name().values():
        start_block(layer, block)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """An `nn.Linear` with adapters; `inject_adapters` gives this class to linear layers."""

    __module__ = nn.Linear.__module__  # as in `adapted_class`; pickling goes by `__reduce_ex__`
    _made_by_disha = True
    _original_class = nn.Linear
    _adapted_parameters = ("weight",)
    reset_parameters = reset_parameters
    forward = linear_forward

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # The bias of a plain layer is an attribute of the instance alone.
        cls._has_own_reading = cls.weight is not AdaptedLinear.weight or hasattr(cls, "bias")


AdaptedLinear.weight = weight_property(nn.Linear, "weight")  # type: ignore[assignment]


class _Recurrent(nn.Module):
    """The first base class of adapted recurrent layers: lets `_flat_weights` have the updates."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights with their updates; the list that torch keeps has the plain parameters."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        _list_plain_weights(self)  # and not `value`, which may have effective weights

    def __setattr__(self, name: str, value: Any) -> None:
        if not is_weight_of(self, name, value):
            # The `__setattr__` of nn.RNNBase would write into the list as well.
            nn.Module.__setattr__(self, name, value)

    def _update_flat_weights(self) -> None:
        """Do nothing: `_flat_weights` is read anew each time."""

    def flatten_parameters(self) -> None:
        """Do nothing: computed weights don't lie in one buffer, as cuDNN's flat weights do."""


def _list_plain_weights(layer: Any) -> None:
    """Update the list that torch keeps of the weights of a recurrent layer."""
    names = layer._flat_weights_names
    layer.__dict__["_flat_weights"] = [layer._parameters.get(name) for name in names]


def state_of(module: nn.Module) -> LayerState | None:
    """Return the state of an adapted layer; None of a plain module."""
    if not isinstance(module, AdaptedLayer):
        return None
    adapters = module._modules.get(CHILD_NAME)
    return adapters.state(type(module)) if isinstance(adapters, Adapters) else None


def state_with_parameters(
    module: nn.Module,
    parameters: Iterable[str],
    is_quantized: bool,
    memory: ModelMemory,
    names: tuple[str, ...],
) -> LayerState:
    """Return the state of a module in whose class these parameters are adapted too."""
    original: Any = type(module)
    known: tuple[str, ...] = ()
    if isinstance(module, AdaptedLayer):
        original = module._original_class
        known = module._adapted_parameters
        is_quantized = module._is_quantized
    former = state_of(module)
    if former is None:
        former = Adapters(memory, names, module.training).state(type(module))
    adapted = tuple(dict.fromkeys((*known, *parameters)))
    if adapted == known:
        return former
    if known:
        refuse_changed_class(module, "the module")
    try:
        return former.but(cls=adapted_class(original, adapted, is_quantized))
    except TypeError as error:
        raise _class_error(original, error) from error


def _class_error(cls: type, error: TypeError) -> ArgumentError:
    return ArgumentError(
        f"{cls.__name__} can't be adapted: Python does not let its class change ({error}); leave "
        "it out with exclude="
    )


def set_state(module: nn.Module, state: LayerState | None) -> None:
    """Give a module the class and the adapters of a state; with None, its own class again."""
    is_adapted = isinstance(module._modules.get(CHILD_NAME), Adapters)
    if state is None:
        if is_adapted:
            _restore(module)
        return
    watch_loading()
    if type(module) is not state.cls:
        try:
            set_class(module, state.cls)
        except TypeError as error:
            raise _class_error(type(module), error) from error
    # Written to _modules, because the user's class may guard its attributes.
    module._modules[CHILD_NAME] = state.adapters
    state.adapters.take(state)
    if not is_adapted and state.cls._is_quantized:  # type: ignore[attr-defined]
        quantized.attach_hook(module)


def _restore(layer: Any) -> None:
    """Remove a layer's adapters, and give it its original class back."""
    adapters = layer._modules.pop(CHILD_NAME)
    adapters.memory.members.discard(adapters)
    quantized.remove_hook(layer, quantized.add_updates)
    set_class(layer, type(layer)._original_class)
    if isinstance(layer, nn.RNNBase):
        _list_plain_weights(layer)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class."""
    # An assignment could fail, because the user's class may guard its attributes.
    object.__setattr__(module, "__class__", cls)


def refuse_changed_class(layer: nn.Module, name: str) -> None:
    """Raise if a layer's class changed after it was adapted: restoring would undo that change."""
    if "_original_class" not in type(layer).__dict__:
        raise ArgumentError(
            f"{name or 'the model'} has become a {type(layer).__name__} since it was adapted, for "
            "example by a parametrization, so its original class can't be restored; undo that "
            "change first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
