"""PEFT's folders, names and notes; and a model as PEFT sees it: what it would adapt, and save.

The tensors say which layers are adapted, so the fields that select layers are not evaluated.
Source: PEFT 0.21; 0.18 for Bone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from disha.checks import check_type
from disha.errors import AdapterFileError, AdapterIOError, ArgumentError, ConversionError
from disha.files.disk import PathLike, checked_path, save, save_tensors
from disha.layers.bitsandbytes import is_library_forward
from disha.layers.blocks import original_class
from disha.layers.kinds import FOREIGN_KINDS, LAYER_KINDS, full_name
from disha.model.records import Tensors
from disha.model.view import ModelView, persistent_buffers_of
from disha.sharding.tensors import gathered
from disha.text import brief, first_few, join

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PREFIX = "base_model.model."  # of every name: PEFT's wrapper, and the model in it
FROZEN = ".base_layer.weight"  # the end of a name: PEFT may save the weight of an adapted embedding

_CHARACTER = r"(?:\\[\Wdw]|\[[\w-]+\]|[^][\\(){}*+?|^$])"  # as it is, escaped, or one of a set
_CHOICE = rf"(?:{_CHARACTER}[*+?]|\((?:\?:)?(?:{_CHARACTER}|\|)*\))"  # repeated, or (this|that)
ORDINARY = re.compile(rf"\^?{_CHARACTER}*(?:{_CHOICE}{_CHARACTER}*){{0,3}}\$?")
"""The regexes that are run, with few choices: the regex of a stranger could take forever."""

THE_MODEL_ITSELF = "PEFT adapts layers within a model, not the model itself"

# --- both files ----------------------------------------------------------------------------------


def write_peft_files(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write both files. The configuration comes last, because PEFT looks for it first."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if folder.is_file():
        raise ArgumentError(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = {PREFIX + key: tensor for key, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS_NAME, prefixed)
    save(folder / CONFIG_NAME, lambda new: new.write_text(text, encoding="utf-8"))


@dataclass
class PeftFolder:
    """A folder of PEFT: its configuration, and its tensors by their names without `PREFIX`."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def saves(self, name: str) -> bool:
        """Whether a tensor of that name is in a module that PEFT saves, at any depth."""
        # "head." is in the name if the name of a module around the tensor ends with "head".
        return any(f"{module}." in name for module in self.fields.get("modules_to_save") or ())

    def of_layer(self, name: str, field: str, pattern: str) -> Any:
        """Return r or lora_alpha of a layer as PEFT finds it: by the first key of the pattern."""
        values = self.fields.get(pattern) or {}
        check_type(pattern, values, dict, "a JSON object")
        for key, value in values.items():
            if not ORDINARY.fullmatch(key) or len(key + name) > 500:
                raise AdapterFileError(
                    f"{self.path}: the key {brief(key)} of {pattern} is too long or repeats too "
                    "much; name layers, or the ends of their names"
                )
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return self.fields.get(field, 8)  # the default of both in PEFT


def read_peft_files(folder: PathLike, ends: tuple[str, ...], also_train: bool) -> PeftFolder:
    """Read both files; without `also_train`, only the tensors whose names end so."""
    path = checked_path(folder)
    if (path / "adapter_model.bin").exists() and not (path / WEIGHTS_NAME).exists():
        raise AdapterFileError(
            f"{path} holds adapter_model.bin, a pickle, which can run any code; save it in PEFT as "
            "safetensors"
        )
    try:
        fields = dict(json.loads((path / CONFIG_NAME).read_bytes()))
        tensors = load_file(path / WEIGHTS_NAME)
    except OSError as error:
        raise AdapterIOError(f"can't read a folder of PEFT: {error}") from error
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no complete folder of PEFT: {error}") from error
    named = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in tensors.items()
        if also_train or key.endswith(ends)
    }
    return PeftFolder(path, fields, named)


def refuse_to_write(what: str, problems: Sequence[str]) -> None:
    """Raise `ConversionError` with all problems of an adapter, if there are any."""
    if problems:
        raise ConversionError(
            f"{what}, so nothing was written:\n{first_few(problems, 20)}\n"
            "Leave these layers out (`exclude`), or merge (merge_adapters)"
        )


def refuse_to_load(path: Path, problems: Sequence[str]) -> None:
    """Raise `AdapterFileError` with all problems of a folder, if there are any."""
    if problems:
        raise AdapterFileError(
            f"{path} can't be loaded with the same results as in PEFT; nothing changed:\n"
            + first_few(problems, 20)
        )


# --- names ---------------------------------------------------------------------------------------


def is_inside(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether PEFT skips the layer of that name because it sees it as part of a saved module."""
    return any(f".{module}." in f".{name}." for module in modules_to_save)


def anchored(name: str) -> str:
    """Return the key of `rank_pattern` or `alpha_pattern` for this layer only."""
    return "^" + re.escape(name)


def exact_targets(
    adapted: Iterable[str], modules: Collection[str] | None = None
) -> list[str] | str:
    """Return `target_modules` that select these layers: their full names, or a regex."""
    # PEFT reads the entries of a list as endings of names, which other modules may have too.
    wanted = set(adapted)
    if modules is None:
        is_exact = not any(map(str.isdecimal, wanted))
    else:
        ends = tuple(f".{name}" for name in wanted)
        is_exact = not any(module.endswith(ends) for module in modules if module not in wanted)
    return sorted(wanted) if is_exact else "|".join(map(re.escape, sorted(wanted)))


# --- settings ------------------------------------------------------------------------------------

NOTES = ("base_model_name_or_path", "revision", "task_type")
"""Fields that say where an adapter belongs. They do not change what it computes."""


def notes_of(model: nn.Module | None) -> dict[str, str | None]:
    """Return the `NOTES` that the class and the configuration of a model of `transformers` give.

    PEFT's tasks that classify are left out: PEFT loads them only if the folder has the whole head.
    """
    config: Any = getattr(model, "config", None)
    name, task = type(model).__name__, None  # the configuration may name the class of a checkpoint
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        task = "CAUSAL_LM"
    elif name.endswith("ForConditionalGeneration") and config.is_encoder_decoder:
        task = "SEQ_2_SEQ_LM"
    base = getattr(config, "_name_or_path", None) or None
    return {"base_model_name_or_path": base, "task_type": task}


# --- layers --------------------------------------------------------------------------------------

READ_BY = {nn.MultiheadAttention: ("out_proj",)}
"""Classes that read the weights of their children, without PEFT's update."""

READ_IN_EVALUATION = {nn.TransformerEncoderLayer: ("linear1", "linear2")}
"""Classes that do so on a fast path for inference."""


def module_names(view: ModelView) -> list[str]:
    """Return the names under which PEFT looks at modules: the first name of each."""
    return [names[0] for names in view.names.values() if names[0]]


def reasons_against(
    view: ModelView,
    layers: Iterable[str],
    why_unknown: Callable[[nn.Module], str | None],
    *,
    exporting: bool,
) -> list[str]:
    """Return the layers where PEFT would compute something else, each with the reason."""
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
            why = THE_MODEL_ITSELF
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
        found += [] if why is None else [f"{name or '(the model)'}: {why}"]
    return found


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the class overrides the forward of the layer class that it inherits from.

    Not if it only scales an embedding (Gemma, BART): PEFT scales its update too. T5Gemma2 has the
    embedding of one token in a parameter of its own.
    """
    cls: Any = original_class(module)
    for known in cls.__mro__:
        if known in LAYER_KINDS or full_name(known) in FOREIGN_KINDS:
            only_scales = hasattr(module, "embed_scale") and len(module._parameters) == 1
            is_known = cls.forward is known.forward or is_library_forward(cls)
            return not (is_known or only_scales)
    return False


# --- what was trained with the layers ------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """What PEFT saves besides the layers: whole modules, with buffers; and why not the rest."""

    modules: list[str]
    tensors: dict[str, Tensor]
    problems: list[str]

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the tensors on the CPU; collective if sharded."""
        return {
            name: gathered(tensor.detach()).to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors.items()
        }


def saved_modules(view: ModelView, also_train: Sequence[str], layers: Sequence[str]) -> Saved:
    """Return how PEFT saves the parameters that were trained with an adapter of these layers."""
    known = view.parameters_by_name
    trained = {alias for name in also_train if name in known for alias in known[name].names}
    adapted = {view.modules.get(name) for name in layers}
    problems = []
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    inside_saved = set[nn.Module]()
    for module, names in view.names.items():
        trained_here = [
            attribute for attribute in module._parameters if join(names[0], attribute) in trained
        ]
        if not trained_here or module in inside_saved:
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
            for inner, below in inside.items():
                held = {**inner._parameters, **persistent_buffers_of(inner)}
                tensors |= {
                    join(join(name, below), key): tensor
                    for name in names
                    for key, tensor in held.items()
                    if tensor is not None
                }
            continue
        problems.append(f"{join(names[0], trained_here[0])}: {why}")
    problems += [
        f"{name}: PEFT would save it too, because its name ends like one in modules_to_save"
        for name in module_names(view)
        if name.endswith(tuple(modules)) and not is_inside(name, modules)
    ]
    problems += layers_inside(layers, modules)
    problems += [
        f"{name}: PEFT saves buffers only with a module whose parameters train"
        for name in also_train
        if name not in known and name not in tensors
    ]
    return Saved(modules, tensors, problems)


def layers_inside(layers: Iterable[str], modules_to_save: Collection[str]) -> list[str]:
    """Return why PEFT can't adapt the layers that are in modules which it saves."""
    return [
        f"{name}: PEFT would not adapt it, as a part of a module in modules_to_save"
        for name in layers
        if is_inside(name, modules_to_save)
    ]


def keep_for_model(view: ModelView, folder: PeftFolder) -> None:
    """Take what is in the model and does not train out of a folder; leave tied tensors once."""
    parameters = view.parameters_by_name
    tensors = folder.tensors
    buffers = {
        join(above, name): buffer
        for above, module in view.modules.items()
        for name, buffer in persistent_buffers_of(module).items()
    }
    loadable = {buffer.name for buffer in view.buffers}
    kept = {}
    problems = []
    for name, tensor in tensors.items():
        buffer = buffers.get(name)
        # Whole embeddings, and the frozen weights of adapted ones.
        frozen = parameters.get(name.replace(FROZEN, ".weight"))
        if frozen and not folder.saves(name):
            buffer = frozen.value
        if buffer is not None:
            narrower = min(tensor.dtype, buffer.dtype, key=attrgetter("itemsize"))
            if torch.equal(tensor.to(narrower), gathered(buffer).cpu().to(narrower)):
                continue
        # PEFT trains a copy for each module. If one differs or is missing, they are not tied now.
        names = parameters[name].names if name in parameters else (name,)
        differ = [
            other
            for other in names
            if other not in tensors or not torch.equal(tensors[other], tensor)
        ]
        if differ:
            problems.append(f"{name}: the model ties it to {differ[0]}, which differs; untie them")
        elif buffer is not None and name not in loadable:
            problems.append(
                f"{name}: it does not train, and differs from the model's; copy it into the model"
            )
        elif name == names[0]:
            kept[name] = tensor
    refuse_to_load(folder.path, problems)
    folder.tensors = kept
