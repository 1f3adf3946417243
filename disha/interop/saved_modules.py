"""Parameters that were trained beside an adapter, as PEFT keeps them: in modules saved whole.

Such a module's buffers are saved too, and adapters set parameters only: a folder's buffers have to
be those that the model has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from disha.files import AdapterHeader
from disha.files.tensors import DTYPES
from disha.interop.folder import PREFIX, WEIGHTS_NAME
from disha.interop.obstacles import refuse
from disha.model import ModelView, join
from disha.sharding import whole

__all__ = [
    "modules_to_save",
    "other_buffers",
    "own_buffers",
    "saved_buffers",
    "whole_tensors",
]


def modules_to_save(view: ModelView, header: AdapterHeader) -> dict[str, nn.Module]:
    """Return the modules whose parameters the adapter trained too, by name.

    Raises:
        ConversionError: PEFT can't save one of them whole, or would take others for it.
    """
    found: list[str] = []
    modules: dict[str, nn.Module] = {}
    for key in header.also_train:
        one = view.parameters_by_name[key]
        name = key.rpartition(".")[0]
        modules[name] = one.module
        problems = _unsaveable(name, one.module, one.names, header, view)
        found += [f"{key}: {why}" for why in problems]
    refuse(found, "PEFT's modules_to_save can't hold what this adapter trained beside its blocks")
    return modules


def _unsaveable(
    name: str,
    module: nn.Module,
    aliases: Sequence[str],
    header: AdapterHeader,
    view: ModelView,
) -> Iterator[str]:
    inside = [layer.name for layer in header.layers if f"{layer.name}.".startswith(f"{name}.")]
    if not name:
        yield "it belongs to the model itself, not to a module in it"
    elif inside:
        yield f"PEFT would save all of {name}, where {inside[0]} is adapted"
    if len(aliases) > 1:
        yield f"it is one parameter under the names {', '.join(aliases)}; PEFT would part them"
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        yield f"PEFT can't save a {type(module).__name__}"
    others = [one for one in view.modules if one != name]
    taken = [one for one in others if name and one.endswith(name)]
    if taken:
        yield f"PEFT would save {taken[0]} too, whose name ends likewise"


def whole_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return copies of all tensors of the modules, by their names; collective if sharded."""
    return {
        join(name, key): whole(tensor.detach()).to("cpu", copy=True).contiguous()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


# --- their buffers -------------------------------------------------------------------------------


def own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the module's own buffers that a state dict has."""
    temporary = module._non_persistent_buffers_set
    return [
        (name, buffer)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in temporary
    ]


def saved_buffers(view: ModelView) -> dict[str, Tensor]:
    """Return every name of every buffer that a state dict has -> its values.

    Args:
        view: the model.
    """
    return {
        join(above, name): buffer
        for module, aliases in view.names.items()
        for name, buffer in own_buffers(module)
        for above in aliases
    }


def other_buffers(buffers: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong with a folder's buffers: those that are not the model's.

    Args:
        buffers: the model's.
        tensors: the folder's tensors, under their names in the model.
    """
    other = [
        key
        for key in tensors.keys() & buffers.keys()
        if not _same(whole(buffers[key]).cpu(), tensors[key])
    ]
    return [
        f"{name}: a buffer, and adapters set parameters only; copy it into the model first, "
        f"from {PREFIX + name!r} in {WEIGHTS_NAME}"
        for name in sorted(other)
    ]


def _same(buffer: Tensor, value: Tensor) -> bool:
    """Whether a buffer has these values, in its own precision."""
    castable = value.dtype == buffer.dtype or value.dtype in DTYPES.values()
    return castable and torch.equal(value.to(buffer.dtype), buffer)
