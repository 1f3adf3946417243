"""A model as PEFT sees it: which layers PEFT would adapt with the same results, and what it saves.

PEFT replaces each target by a layer of its own, which adds to the output of the target. This has
no effect if the target is never called, or is called under another name. The result differs if the
target's class changes the output of its base class.

PEFT saves complete modules, buffers included, for parameters that were trained with an adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disha.files.contents import Contents, narrowed
from disha.interop.peft_format import THE_MODEL_ITSELF, is_inside, refuse_to_load
from disha.layers.adapters import original_class
from disha.layers.bitsandbytes import is_library_forward
from disha.layers.kinds import FOREIGN_KINDS, LAYER_KINDS
from disha.model import ModelView, join
from disha.running_statistics import statistics
from disha.sharding import gathered

READ_BY = {nn.MultiheadAttention: ("out_proj",)}
"""Classes that read the weights of their children, without PEFT's update."""

READ_IN_EVALUATION = {nn.TransformerEncoderLayer: ("linear1", "linear2")}
"""Classes that do so on a fast path for inference."""


def module_names(view: ModelView) -> list[str]:
    """Return the names under which PEFT looks at modules: the first name of each."""
    return [names[0] for names in view.names.values() if names[0]]


# --- layers --------------------------------------------------------------------------------------


def obstacles(
    view: ModelView,
    layers: Iterable[str],
    why_unknown: Callable[[nn.Module], str | None],
    *,
    exporting: bool,
) -> list[str]:
    """Return the layers where PEFT would compute something else, each with the reason.

    `why_unknown` returns why a format can't adapt a module, or None if it can. With `exporting`,
    the adapter was trained in this model, and PEFT shall compute the same.
    """
    places = Counter(child for module in view.names for child in module._modules.values())
    readers = READ_BY | READ_IN_EVALUATION if exporting else READ_BY
    read = {
        module._modules.get(child): original_class(module).__name__
        for module in view.names
        for cls, children in readers.items()
        if isinstance(module, cls)
        for child in children
    }
    found = []
    for name in layers:
        module = view.modules.get(name)
        if module is None:
            why: str | None = "there is no such module, and PEFT can only replace modules"
        elif not name:
            found.append(THE_MODEL_ITSELF)
            continue
        elif module in read:
            why = f"{read[module]} reads its weight, without PEFT's update"
        elif places[module] > 1:
            names = ", ".join(view.names[module])
            why = f"it is one module with the names {names}, and PEFT adapts only the first"
        elif "parametrizations" in module._modules:
            why = "its weight is computed (a parametrization), which PEFT can't merge into"
        elif _has_own_forward(module):
            why = f"{original_class(module).__name__} has a forward of its own, which PEFT wraps"
        else:
            why = why_unknown(module)
        found += [] if why is None else [f"{name}: {why}"]
    return found


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the class overrides the forward of the layer class that it inherits from."""
    cls: Any = original_class(module)
    for known in cls.__mro__:
        if known in LAYER_KINDS or (known.__module__, known.__qualname__) in FOREIGN_KINDS:
            return cls.forward is not known.forward and not is_library_forward(cls)
    return False


# --- what was trained with the layers ------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """How PEFT saves what was trained with the layers: whole modules, and why it can't save some.

    The tensors include more than was trained: buffers of the modules, and one copy of a tied
    parameter for each module that has it.
    """

    modules: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    problems: tuple[str, ...]

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the tensors on the CPU; collective if sharded."""
        return {
            name: gathered(tensor.detach()).to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors.items()
        }


def saved_modules(view: ModelView, also_train: Sequence[str], layers: Sequence[str]) -> Saved:
    """Return how PEFT saves the parameters that were trained with an adapter of these layers."""
    known = view.parameters_by_name
    trained = {one for name in also_train if name in known for one in known[name].names}
    adapted = {view.modules[name] for name in layers if name in view.modules}
    problems: list[str] = []
    modules: list[str] = []
    tensors: dict[str, Tensor] = {}
    inside_saved = set[nn.Module]()
    for module, names in view.names.items():
        own = [one for one in module._parameters if join(names[0], one) in trained]
        if not own or module in inside_saved:
            continue
        inside = view.inside(module)
        if not names[0]:
            why = "it belongs to the model itself, not to a module in it"
        elif not adapted.isdisjoint(inside):
            why = f"PEFT can't save {names[0]}, because a layer in it is adapted"
        elif isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            why = f"PEFT can't save a {type(module).__name__}"
        else:
            modules += names
            inside_saved.update(inside)
            state = _state(inside)
            tensors |= {join(name, key): state[key] for name in names for key in state}
            continue
        problems.append(f"{join(names[0], own[0])}: {why}")
    problems += [
        f"{name}: PEFT would not adapt it, as a part of a module in modules_to_save"
        for name in layers
        if is_inside(name, modules)
    ]
    problems += [
        f"{name}: PEFT saves running statistics only with a module whose parameters train"
        for name in also_train
        if name not in known and name not in tensors
    ]
    return Saved(tuple(modules), tensors, tuple(problems))


def _state(inside: Mapping[nn.Module, str]) -> dict[str, Tensor]:
    """Return the parameters and buffers that the state dict of a module has, by clean names."""
    return {
        join(above, name): tensor
        for module, above in inside.items()
        for name, tensor in [*module._parameters.items(), *_buffers(module).items()]
        if tensor is not None
    }


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own buffers that a state dict has."""
    temporary = module._non_persistent_buffers_set
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in temporary
    }


def without_buffers(
    view: ModelView, path: Path, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a folder without buffers that the model has already.

    An adapter holds running statistics, and no other buffers, so other values of these are refused.
    """
    buffers = {
        join(above, name): buffer
        for module, names in view.names.items()
        for name, buffer in _buffers(module).items()
        for above in names
        if join(above, name) in tensors
    }
    equal = {
        name
        for name, buffer in buffers.items()
        if torch.equal(tensors[name].to(buffer.dtype), gathered(buffer).cpu())
    }
    problems = [
        f"{name}: this buffer differs from the model's; copy it into the model first"
        for name in buffers.keys() - equal - statistics(view).keys()
    ]
    refuse_to_load(path, problems)
    return {name: tensor for name, tensor in tensors.items() if name not in equal}


def under_first_names(view: ModelView, path: Path, contents: Contents) -> Contents:
    """Return an adapter that has each tied parameter once, under its first name.

    PEFT trains a copy for each module. If they differ, or one is missing, the modules no longer
    share the parameter in PEFT, so this raises.
    """
    header, tensors = contents
    kept, problems = [], []
    for name in header.also_train:
        known = view.parameters_by_name.get(name)
        names = (name,) if known is None else known.names
        same = [one in tensors and torch.equal(tensors[one], tensors[name]) for one in names]
        if not all(same):
            other = names[same.index(False)]
            problems.append(f"{name}: the model ties it to {other}, which differs; untie them")
        elif names[0] == name:
            kept.append(name)
    refuse_to_load(path, problems)
    return narrowed(header, tensors, header.layers, kept)
