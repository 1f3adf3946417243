"""A model as PEFT sees it: which layers PEFT would adapt with the same results, and what it saves.

PEFT replaces each target by a layer of its own, which adds to the output of the target. This has
no effect if the target is never called, or is called under another name. The result differs if the
target's class changes the output of its base class. This module can't detect user code that reads
a layer's weight instead of calling the layer.

PEFT saves complete modules, buffers included, for parameters that were trained with an adapter.
An adapter sets parameters only, so the buffers must equal the model's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disha.errors import ConversionError
from disha.files.contents import Contents, narrowed
from disha.files.tensors import DTYPES
from disha.interop.peft_files import SHOWN, is_inside, is_saved, refuse_to_load
from disha.layers import FOREIGN_KINDS, LAYER_KINDS, is_library_forward, original_class
from disha.model import ModelView, join
from disha.sharding import gathered
from disha.text import first_few

__all__ = ["PeftView", "Saved", "other_buffers", "refuse_to_write"]

READ_IN_EVALUATION = ("linear1", "linear2")
"""The layers of an `nn.TransformerEncoderLayer` whose weights its fast path reads."""


def refuse_to_write(what: str, problems: Sequence[str]) -> None:
    """Raise `ConversionError` with all problems of an adapter, if there are any."""
    if problems:
        raise ConversionError(
            f"{what}, so nothing was written:\n{first_few(problems, SHOWN)}\n"
            "Leave these layers out (`exclude`), or use the merged model (merge_adapters)"
        )


@dataclass(frozen=True)
class Saved:
    """How PEFT saves what was trained with the blocks.

    Attributes:
        bias: `"none"`, `"all"`, or `"only"` for biases of the adapted layers.
        modules: names of the modules that are saved completely.
        tensors: name in the model -> values. They include more than was trained: buffers of the
            modules, and one copy of a shared parameter for each module that shares it.
        problems: why PEFT can't save some of the parameters.
    """

    bias: str = "none"
    modules: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the tensors on the CPU; collective if sharded."""
        return {
            name: gathered(tensor.detach()).to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors.items()
        }


class PeftView:
    """A model under the names that its modules have in PEFT.

    Args:
        view: the model, adapted or not, wrapped or not.
    """

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self._places = Counter(child for module in view.names for child in module._modules.values())
        self._read = self._children(nn.MultiheadAttention, ("out_proj",))
        self._fused = self._children(nn.TransformerEncoderLayer, READ_IN_EVALUATION)

    def _children(
        self, owner: type[nn.Module], children: Sequence[str]
    ) -> dict[nn.Module | None, str]:
        """Return these children of all modules of a class -> the name of their owner's class."""
        return {
            module._modules[child]: original_class(module).__name__
            for module in self.view.names
            if isinstance(module, owner)
            for child in children
            if child in module._modules
        }

    @property
    def modules(self) -> list[str]:
        """The names under which PEFT looks at modules: the first name of each."""
        return [names[0] for names in self.view.names.values() if names[0]]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter, or None if the model has none of that name.

        A linear layer's weight has the shape (out, in), even if it is quantised and packed.
        """
        module = self.view.modules.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and isinstance(module, nn.Linear):
            return (module.out_features, module.in_features)
        parameter = self.view.parameters_by_name.get(name)
        return None if parameter is None else tuple(parameter.value.shape)

    # --- layers ----------------------------------------------------------------------------------

    def obstacles(
        self,
        layers: Iterable[str],
        why_unknown: Callable[[nn.Module], str | None],
        *,
        exporting: bool,
    ) -> list[str]:
        """Return the layers where PEFT would compute something else, each with the reason.

        Args:
            layers: names of the layers.
            why_unknown: returns why a PEFT format can't adapt a module, or None if it can.
            exporting: True to export an adapter from this model, False to load one into it.
        """
        found = []
        for name in layers:
            module = self.view.modules.get(name)
            if module is None:
                why: str | None = self._why_no_module(name)
            elif exporting and module in self._fused:
                why = f"{self._fused[module]} reads its weight in evaluation, without PEFT's update"
            else:
                why = self._obstacle(name, module) or why_unknown(module)
            if why is not None:
                found.append(f"{name or '(the model)'}: {why}")
        return found

    def _obstacle(self, name: str, module: nn.Module) -> str | None:
        """Return why PEFT's layer would not act as an adapted module does, or None."""
        if not name:
            return "PEFT adapts layers within a model, not the model itself"
        if module in self._read:
            return f"{self._read[module]} reads its weight, without PEFT's update"
        if self._places[module] > 1:
            names = ", ".join(self.view.names[module])
            return f"it is one module with the names {names}, and PEFT adapts only the first"
        if "parametrizations" in module._modules:
            return "its weight is computed (a parametrization), which PEFT can't merge into"
        if _has_own_forward(module):
            return (
                f"{original_class(module).__name__} has a forward of its own; PEFT adds to its "
                "output, or replaces it (BAT), and disha adds to the output of its base class"
            )
        return None

    def _why_no_module(self, name: str) -> str:
        above, _, last = name.rpartition(".")
        owner = self.view.modules.get(above)
        if isinstance(owner, nn.MultiheadAttention):
            return "it is a part of an nn.MultiheadAttention's packed weight, not a module"
        if owner is not None and last in owner._parameters:
            return "it is a parameter, and PEFT can only replace modules"
        return "the model has no such layer"

    # --- exporting what was trained with the layers ----------------------------------------------

    def saved(self, also_train: Sequence[str], layers: Sequence[str], *, biases: bool) -> Saved:
        """Return how PEFT saves parameters that were trained with an adapter.

        Args:
            also_train: names of the parameters.
            layers: names of the adapted layers.
            biases: whether biases can be saved alone, without the rest of their modules.
        """
        known = self.view.parameters_by_name
        trained = {alias for name in also_train if name in known for alias in known[name].names}
        adapted = {self.view.modules[name]: name for name in layers if name in self.view.modules}
        problems: list[str] = []
        modules: list[str] = []
        bias: list[str] = []
        tensors: dict[str, Tensor] = {}
        inside_saved = set[nn.Module]()
        for module, names in self.view.names.items():
            own = [one for one in module._parameters if join(names[0], one) in trained]
            if not own or module in inside_saved:
                continue
            first = join(names[0], own[0])
            inside = self.view.inside(module)
            state = _state(inside)
            parameters = [key for key, value in state.items() if isinstance(value, nn.Parameter)]
            complete = trained.issuperset(join(names[0], key) for key in parameters)
            layer = next((adapted[one] for one in inside if one in adapted), None)
            if biases and own == ["bias"] and (layer is not None or not complete):
                bias += [join(name, "bias") for name in names]
            elif not names[0]:
                problems.append(f"{first}: it belongs to the model itself, not to a module in it")
            elif layer is not None:
                problems.append(f"{first}: PEFT can't save {names[0]}, because {layer} is adapted")
            elif isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                problems.append(f"{first}: PEFT can't save a {type(module).__name__}")
            else:
                modules += names
                inside_saved.update(inside)
                tensors |= {join(name, key): state[key] for name in names for key in state}
        tensors |= {key: known[key].value for key in bias}
        problems += [
            f"{name}: PEFT saves running statistics only with a module whose parameters all train"
            for name in also_train
            if name not in known and name not in tensors
        ]
        of_layers = {join(layer, "bias") for layer in layers}
        return Saved(
            bias="none" if not bias else "only" if of_layers.issuperset(bias) else "all",
            modules=tuple(sorted(modules)),
            tensors=tensors,
            problems=(*problems, *self._ambiguous(modules, layers)),
        )

    def _ambiguous(self, saved: Sequence[str], layers: Sequence[str]) -> list[str]:
        """Return why PEFT would save other modules than these, or not adapt all layers."""
        problems = [
            f"{name}: PEFT reads names of modules_to_save as regexes"
            for name in saved
            if re.fullmatch(r"[\w.\-]+", name) is None
        ]
        problems += [
            f"{name}: PEFT would save and train it too, because its name ends like that of a "
            "module in modules_to_save"
            for name in self.view.modules
            if name not in saved and is_saved(name, saved)
        ]
        return problems + [
            f"{name}: PEFT would not adapt it, because it takes it for a part of a module in "
            "modules_to_save"
            for name in layers
            if is_inside(name, saved)
        ]

    # --- loading what was trained with the layers ------------------------------------------------

    def buffers(self) -> dict[str, Tensor]:
        """Return the values of every buffer in a state dict, under each of its names."""
        return {
            join(above, name): buffer
            for module, names in self.view.names.items()
            for name, buffer in _own_buffers(module).items()
            for above in names
        }

    def under_first_names(self, path: Path, contents: Contents) -> Contents:
        """Return an adapter that has each shared parameter once, under its first name.

        Args:
            path: the folder, for errors.
            contents: the adapter.

        Raises:
            AdapterFileError: the values of a shared parameter differ, or some are missing. In
                PEFT, the modules would no longer share it.
        """
        header, tensors = contents
        problems, kept = [], []
        for name in header.also_train:
            parameter = self.view.parameters_by_name.get(name)
            names = (name,) if parameter is None else parameter.names
            missing = [alias for alias in names if alias not in tensors]
            if missing:
                problems.append(
                    f"{name}: the model shares it with {', '.join(missing)}, which PEFT leaves as "
                    "it is; untie them first"
                )
            elif not torch.equal(tensors[names[0]], tensors[name]):
                problems.append(
                    f"{name}: the model shares it with {names[0]}, which has other values; untie "
                    "them first"
                )
            elif names[0] == name:
                kept.append(name)
        refuse_to_load(path, problems)
        header = narrowed(header, header.layers, kept)
        return header, {key: tensors[key] for key in header.tensors}


def other_buffers(buffers: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each buffer of a folder that differs from the model's.

    Args:
        buffers: the model's.
        tensors: the folder's tensors, under their names in the model.
    """
    return [
        f"{name}: this buffer differs from the model's, and an adapter sets parameters only; copy "
        "it into the model first"
        for name in sorted(tensors.keys() & buffers.keys())
        if not _same(gathered(buffers[name]).cpu(), tensors[name])
    ]


def _same(buffer: Tensor, value: Tensor) -> bool:
    """Whether a buffer has these values, compared in the buffer's dtype."""
    castable = value.dtype == buffer.dtype or value.dtype in DTYPES.values()
    return castable and torch.equal(value.to(buffer.dtype), buffer)


def _state(inside: Mapping[nn.Module, str]) -> dict[str, Tensor]:
    """Return the parameters and buffers that the state dict of a module has, by clean names."""
    return {
        join(above, name): tensor
        for module, above in inside.items()
        for name, tensor in [*module._parameters.items(), *_own_buffers(module).items()]
        if tensor is not None
    }


def _own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own buffers that a state dict has."""
    temporary = module._non_persistent_buffers_set
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in temporary
    }


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the class overrides the forward of the layer class that it inherits from."""
    cls: Any = original_class(module)
    for known in cls.__mro__:
        if known in LAYER_KINDS or (known.__module__, known.__qualname__) in FOREIGN_KINDS:
            return cls.forward is not known.forward and not is_library_forward(cls)
    return False
