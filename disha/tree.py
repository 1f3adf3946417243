"""The walk through a model: every module once, under its clean name.

A clean name is what a module is called in the model as its author wrote it: what `torch.compile`,
DDP, FSDP and checkpoint wrappers put around modules is left out, so that targets match and files
come out the same, wrapped or not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from disha.errors import ArgumentError, ArgumentTypeError, TargetError
from disha.layers import CHILD_NAME, AdaptedLayer, AdaptedWeight, Adapters

__all__ = [
    "ModuleNames",
    "adapted_layers",
    "adapted_weights",
    "adapter_names",
    "imported_class",
    "join",
    "module_names",
    "named_parameters",
    "own_parameters",
    "parameter_aliases",
    "parameter_owners",
    "refuse_wrapped",
    "require_adapter",
    "require_model",
    "wrapped_for_distribution",
]

ModuleNames = dict[nn.Module, tuple[str, ...]]


def imported_class(module: str, name: str) -> type | None:
    """Return a class of a module that has been imported by now, or None.

    Whoever uses the class has imported it, and importing it here could take seconds.
    """
    cls: type | None = getattr(sys.modules.get(module), name, None)
    return cls


@dataclass(frozen=True)
class _Wrapper:
    """A class that holds the wrapped module as its child `child`."""

    module: str
    name: str
    child: str
    distributes: bool

    def imported(self) -> type | None:
        return imported_class(self.module, self.name)


_WRAPPERS = (
    _Wrapper("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod", False),
    _Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
        False,
    ),
    _Wrapper("torch.nn.parallel.distributed", "DistributedDataParallel", "module", True),
    _Wrapper("torch.nn.parallel.data_parallel", "DataParallel", "module", True),
    _Wrapper(
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
        True,
    ),
    _Wrapper("torch.distributed.fsdp", "FSDPModule", "", True),
)


def join(prefix: str, name: str) -> str:
    """Return `prefix.name`, or the one that is not empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def module_names(model: nn.Module) -> ModuleNames:
    """Return every module of the model with its clean names, first the one it goes by.

    A module that is reached by several ways has a name for each. Adapters are left out.
    """
    names: ModuleNames = {}
    _collect(model, "", names, _transparent_classes(), on_path=set())
    return names


def _transparent_classes() -> dict[type, str]:
    """Return the wrapper classes that are imported -> the child under which they hold a module."""
    classes = {wrapper.imported(): wrapper.child for wrapper in _WRAPPERS if wrapper.child}
    return {cls: child for cls, child in classes.items() if cls is not None}


def _collect(
    module: nn.Module,
    name: str,
    names: ModuleNames,
    transparent: dict[type, str],
    on_path: set[nn.Module],
) -> None:
    if isinstance(module, Adapters) or module in on_path:
        return
    names[module] = (*names.get(module, ()), name)
    if not module._modules:
        return
    children = [
        (child_name, child)
        for child_name, child in module._modules.items()
        if child is not None and not isinstance(child, Adapters)
    ]
    if not children:
        return
    on_path.add(module)
    held = next((child for cls, child in transparent.items() if isinstance(module, cls)), None)
    for child_name, child in children:
        below = name if child_name == held else join(name, child_name)
        _collect(child, below, names, transparent, on_path)
    on_path.remove(module)


def wrapped_for_distribution(names: ModuleNames) -> nn.Module | None:
    """Return a module of the model that DDP or FSDP wraps, or None."""
    imported = [wrapper.imported() for wrapper in _WRAPPERS if wrapper.distributes]
    classes = tuple(cls for cls in imported if cls is not None)
    return next((module for module in names if isinstance(module, classes)), None)


def refuse_wrapped(model: nn.Module, action: str, remedy: str) -> None:
    """Raise if DDP or FSDP wraps the model or a part of it.

    Raises:
        TargetError: they would not see that parameters come or go.
    """
    wrapped = wrapped_for_distribution(module_names(model))
    if wrapped is not None:
        raise TargetError(
            f"can't {action}: the model is wrapped by {type(wrapped).__name__}, which would not "
            f"see that parameters come or go; {remedy}"
        )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Iterate over the adapted layers of the model, each once, with its clean name."""
    for module, (name, *_) in module_names(require_model(model)).items():
        if isinstance(module, AdaptedLayer) and CHILD_NAME in module._modules:
            yield name, module


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, AdaptedWeight]]:
    """Iterate over the adapted weights of the model, each once, with its clean name."""
    for layer_name, layer in adapted_layers(model):
        for name in dict.fromkeys(name for _, name in layer.disha.blocks()):
            yield join(layer_name, name), AdaptedWeight(layer, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters in the model, in the order they are met."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.disha))


def require_adapter(model: nn.Module, adapter: str) -> list[tuple[str, AdaptedWeight]]:
    """Return the weights that have the adapter, with their clean names.

    Raises:
        ArgumentError: no weight has it.
        ArgumentTypeError: `adapter` is no str.
    """
    if not isinstance(adapter, str):
        raise ArgumentTypeError(
            f"an adapter's name must be a str, got {adapter!r} of type {type(adapter).__name__}"
        )
    weights = [(name, one) for name, one in adapted_weights(model) if adapter in one.blocks]
    if not weights:
        known = adapter_names(model)
        found = f"it has {', '.join(map(repr, known))}" if known else "it has none"
        raise ArgumentError(f"the model has no adapter {adapter!r}; {found}")
    return weights


def require_model(model: object, argument: str = "model") -> nn.Module:
    """Return `model` if it is a module, else raise."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{argument} must be an nn.Module, got {type(model).__name__}")
    return model


def parameter_owners(names: ModuleNames) -> dict[str, tuple[nn.Module, str]]:
    """Return clean parameter name -> (module, its name there), each parameter once."""
    return {aliases[0]: owner for aliases, owner in named_parameters(names)}


def parameter_aliases(names: ModuleNames) -> dict[str, str]:
    """Return every clean name of every parameter -> the one that it goes by."""
    return {alias: aliases[0] for aliases, _ in named_parameters(names) for alias in aliases}


def named_parameters(names: ModuleNames) -> list[tuple[list[str], tuple[nn.Module, str]]]:
    """Return the clean names of each parameter with its first owner; tied ones have several."""
    found: dict[int, tuple[list[str], tuple[nn.Module, str]]] = {}
    for module, name, parameter in own_parameters(names):
        aliases, _ = found.setdefault(id(parameter), ([], (module, name)))
        aliases += [join(module_name, name) for module_name in names[module]]
    return list(found.values())


def own_parameters(names: ModuleNames) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Iterate over (module, name there, parameter) of every module; tied ones come repeatedly."""
    for module in names:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter
