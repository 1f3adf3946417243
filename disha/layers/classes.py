"""Move a module to the class in which its adapted parameters are properties, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from disha.contexts import entered
from disha.errors import ArgumentError
from disha.layers import opaque
from disha.layers.adapted import AdaptedLayer, refuse_merged
from disha.layers.adapters import CHILD_NAME, Adapters
from disha.layers.blocks import Slot
from disha.layers.hooks import remove_hook
from disha.layers.reading import linear_forward, was_written, weight_property

_Key = tuple[type[nn.Module], tuple[str, ...], bool]
_CLASSES: dict[_Key, type[AdaptedLayer]] = {}


def adapted_class(
    original: type[nn.Module], parameters: tuple[str, ...], is_opaque: bool
) -> type[AdaptedLayer]:
    """Return the adapted class for `original`. Each combination of arguments has one class."""
    key = (original, parameters, is_opaque)
    if key not in _CLASSES:
        namespace: dict[str, Any] = {
            "__module__": AdaptedLayer.__module__,
            "__doc__": f"{original.__qualname__}, adapted by disha.",
            "made_on_the_fly": True,
            "original_class": original,
            "adapted_parameters": parameters,
            "is_opaque": is_opaque,
            "__reduce_ex__": _reduced,
        }
        if hasattr(original, "reset_parameters"):
            namespace["reset_parameters"] = reset_parameters
        if is_opaque:
            bases: tuple[type, ...] = (*opaque.leading_bases(original), AdaptedLayer, original)
        else:
            namespace |= {name: weight_property(original, name) for name in parameters}
            bases = (AdaptedLayer, original)
            if issubclass(original, nn.RNNBase):
                bases = (_Recurrent, *bases)
        _CLASSES[key] = type(f"Adapted{original.__name__}", bases, namespace)
    return _CLASSES[key]


def _reduced(layer: Any, protocol: Any) -> Any:
    """Pickle a layer with the arguments that make its class, which no Python module contains."""
    made: Any = next(cls for cls in type(layer).__mro__ if "made_on_the_fly" in vars(cls))
    reduced = super(made, layer).__reduce_ex__(protocol)
    if made is not type(layer):
        return reduced
    return (
        _new_instance,
        (made.original_class, made.adapted_parameters, made.is_opaque),
        *reduced[2:],
    )


def _new_instance(
    original: type[nn.Module], parameters: tuple[str, ...], is_opaque: bool
) -> nn.Module:
    cls = adapted_class(original, parameters, is_opaque)
    return cls.__new__(cls)


def reset_parameters(layer: AdaptedLayer) -> None:
    """Draw the base weights again, and set every block to its initial values."""
    adapters = layer._modules.get(CHILD_NAME)  # not there yet while a layer constructs itself
    original: Any = layer.original_class
    reset: Callable[[nn.Module], None] = original.reset_parameters
    if not isinstance(adapters, Adapters):
        reset(layer)
        return
    refuse_merged([layer], "reset parameters")
    # The layer must read W: of a computed weight, `weight[padding_idx].fill_(0)` changes a copy.
    with entered(frozenset([adapters.group]), None):
        reset(layer)
    for block in adapters.blocks().values():
        block.reset_parameters()


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """An `nn.Linear` with adapters; `inject_adapters` gives this class to linear layers."""

    has_own_reading: ClassVar[bool] = False
    """Whether a user's subclass computes the weight or the bias."""

    original_class = nn.Linear
    adapted_parameters = ("weight",)
    reset_parameters = reset_parameters
    forward = linear_forward

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.has_own_reading = cls.weight is not AdaptedLinear.weight or hasattr(cls, "bias")


AdaptedLinear.weight = weight_property(nn.Linear, "weight")  # type: ignore[assignment]
_CLASSES[nn.Linear, ("weight",), False] = AdaptedLinear


class _Recurrent(nn.Module):
    """The first base of adapted recurrent layers: their class keeps a list of the plain weights."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights as they are read now; torch's own list has the plain parameters."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        parameters = self._parameters
        self.__dict__["_flat_weights"] = [parameters.get(name) for name in self._flat_weights_names]

    def __setattr__(self, name: str, value: Any) -> None:
        if not was_written(self, name, value):
            nn.Module.__setattr__(self, name, value)  # torch's would write into the list as well

    def _update_flat_weights(self) -> None:
        """Do nothing: no list of weights is kept that could be out of date."""

    def flatten_parameters(self) -> None:
        """Do nothing: a computed weight can't be part of a flat one."""


def adapt(module: nn.Module, slots: Iterable[Slot]) -> None:
    """Move a module to the class that adapts the slots' parameters, and give it `Adapters`.

    Parameters that were adapted before stay adapted.
    """
    slots, before = list(slots), type(module)
    names = [slot.parameter for slot in slots]
    original, is_opaque = before, any(slot.opaque for slot in slots)
    if isinstance(module, AdaptedLayer):
        original, is_opaque = before.original_class, before.is_opaque  # type: ignore[attr-defined]
        names = [*before.adapted_parameters, *names]  # type: ignore[attr-defined]
        if set(names) <= set(before.adapted_parameters):  # type: ignore[attr-defined]
            return
        refuse_changed_class(module, "it")
    try:
        _set_class(module, adapted_class(original, tuple(dict.fromkeys(names)), is_opaque))
    except TypeError as error:
        raise ArgumentError(
            f"{original.__name__} can't be adapted: Python does not let its class change "
            f"({error}); leave it out with exclude="
        ) from error
    if CHILD_NAME in module._modules:
        return
    adapters = Adapters()
    vars(adapters)["training"] = module.training
    # Written to _modules, because the user's class may guard its attributes.
    module._modules[CHILD_NAME] = adapters
    if is_opaque:
        opaque.attach_hook(module)


def restore(layer: nn.Module) -> None:
    """Give a module its original class back, and remove its adapters."""
    if not isinstance(layer, AdaptedLayer):
        return
    layer._modules.pop(CHILD_NAME, None)
    remove_hook(layer, opaque.add_updates)
    _set_class(layer, type(layer).original_class)
    if isinstance(layer, nn.RNNBase):
        layer.__dict__["_flat_weights"] = [
            layer._parameters.get(name) for name in layer._flat_weights_names
        ]


def readapt(
    module: nn.Module,
    cls: type[nn.Module],
    adapters: Adapters,
    blocks: Mapping[str, nn.Module | None],
) -> None:
    """Give a module back its adapted class, its adapters and their blocks."""
    if CHILD_NAME not in module._modules and cls.is_opaque:  # type: ignore[attr-defined]
        opaque.attach_hook(module)
    _set_class(module, cls)
    module._modules[CHILD_NAME] = adapters
    adapters._modules.clear()
    adapters._modules.update(blocks)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # Not by assignment: the user's class may guard its attributes.
    object.__setattr__(module, "__class__", cls)


def refuse_changed_class(layer: nn.Module, name: str) -> None:
    """Raise if a module got another class after its adapted one: restoring would undo that too."""
    if "original_class" not in type(layer).__dict__:
        raise ArgumentError(
            f"{name or 'the model'} has become a {type(layer).__name__} since it was adapted, for "
            "example by a parametrization, so its original class can't be restored; undo that "
            "change first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
