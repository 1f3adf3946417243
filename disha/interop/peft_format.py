"""PEFT's folders, and what PEFT would do with a model: which layers it adapts, and what it saves.

The tensors say which layers are adapted, so the fields that select layers are not evaluated.
Source: PEFT 0.21; 0.18 for Bone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disha.errors import AdapterFileError, ConversionError
from disha.files.disk import (
    ADAPTER_NAME,
    PathLike,
    Writer,
    check_path,
    folder_for,
    read_json,
    read_tensors,
    save_together,
    write_tensors,
)
from disha.files.header import AdapterContents
from disha.functional import Layout
from disha.interop.experts import factors_name, stack_factors
from disha.interop.low_rank import LoraLayer, LoraReport, LowRankUpdate, is_stack, list_names
from disha.layers.adapters import original_class
from disha.layers.bitsandbytes import is_library_forward
from disha.layers.kinds import FOREIGN_LAYOUTS, LAYER_KINDS, full_name
from disha.layers.spec import BlockSpec
from disha.model.found import persistent_buffers_of
from disha.model.state import Tensors
from disha.model.view import ModelView
from disha.sharding.tensors import gather
from disha.text import brief, first_few, join

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"  # of torch.save, of which only tensors are read

PREFIX = "base_model.model."  # of every name: PEFT's wrapper, and the model in it
FROZEN = ".base_layer.weight"
"""The end of the name of the frozen weight of an adapted embedding, which PEFT may save too."""

MATRIX = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
TOKENS = ".token_adapter.trainable_tokens_delta"  # holds the new values of rows, not differences
MISS_BLOCK, BONE_BLOCK = ".miss_block", ".bone_block"
OF_LAYERS = (*MATRIX, *EMBEDDING, TOKENS, MISS_BLOCK, BONE_BLOCK)
"""The ends of the keys of what a folder has for a layer."""

LINEAR = Layout("out in")

BAT = "bat"
"""The method for which PEFT has no padding and no dropout."""

TILE = "mini"
"""PEFT's word for a tile in `init_weights`."""

THE_MODEL_ITSELF = "PEFT adapts layers within a model, not the model itself"
OF_THE_MODEL_ITSELF = "it belongs to the model itself, not to a module in it"

# --- both files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """An adapter as PEFT has it: what its two files hold, and what a report says of it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]  # by their keys in the file
    layers: tuple[LoraLayer, ...]
    also_train: tuple[str, ...]  # the names of tensors that are not of layers

    def write(self, folder: Path, writes: bool = True) -> LoraReport:
        """Write both files, if this process writes, and return the report on them.

        The configuration is replaced last, as PEFT looks for it first.
        """
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        writers: dict[Path, Writer] = {
            folder / WEIGHTS_NAME: lambda new: write_tensors(new, self.tensors),
            folder / CONFIG_NAME: lambda new: new.write_text(text, encoding="utf-8"),
        }
        if writes:
            with folder_for(folder):
                save_together(writers)
        return LoraReport(folder, self.layers, self.also_train)


def tensors_of(updates: Sequence[LowRankUpdate]) -> dict[str, Tensor]:
    """Return the factors of all layers by their keys in a folder, without PEFT's prefix."""
    stack_names = {update.record.name for update in updates if is_stack(update.record)}
    tensors = {}
    for update in updates:
        name = update.record.name
        a = update.a
        b = update.b
        if name in stack_names:
            name = factors_name(name, stack_names)
            a, b = stack_factors(update)
        if not update.record.scale:
            b = torch.zeros_like(b)
        is_embedding = update.record.layout.pattern == "index out"
        a_end, b_end = EMBEDDING if is_embedding else MATRIX
        for _ in a.shape[2:]:  # the kernel of a convolution, in which B is 1x1
            b = b.unsqueeze(-1)
        tensors[name + a_end] = a.contiguous()
        tensors[name + b_end] = whole_copy(b)
    return tensors


def whole_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, even of a block with r = 1 or one row, which is contiguous."""
    return tensor.clone(memory_format=torch.contiguous_format)


class Pair(NamedTuple):
    """The factors of a layer."""

    a: Tensor
    b: Tensor
    is_embedding: bool


@dataclass(frozen=True)
class PeftFolder:
    """A folder of PEFT: its configuration, and its tensors by their names without `PREFIX`."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Tensors

    def split(self, end: str) -> tuple[Tensors, PeftFolder]:
        """Return the tensors whose names end so, by the names of their layers, and the rest."""
        of_layers = {}
        others = {}
        for key, tensor in self.tensors.items():
            if key.endswith(end):
                of_layers[key.removesuffix(end)] = tensor
            else:
                others[key] = tensor
        return of_layers, replace(self, tensors=others)

    def split_pairs(self) -> tuple[dict[str, Pair], PeftFolder]:
        """Return the factors, by the names of their layers, and the rest. Each must have both."""
        pairs: dict[str, Pair] = {}
        rest = self
        for a_end, b_end in (MATRIX, EMBEDDING):
            a, rest = rest.split(a_end)
            b, rest = rest.split(b_end)
            alone = sorted(a.keys() ^ b.keys())
            if alone:
                raise AdapterFileError(
                    f"{self.path} has no pair of factors, lora_A and lora_B, for "
                    f"{list_names(alone)}; save the LoRA again"
                )
            pairs |= {name: Pair(a[name], b[name], a_end == EMBEDDING[0]) for name in a}
        return pairs, rest

    def saves(self, name: str) -> bool:
        """Whether PEFT saves a module around the tensor of that name, near or far."""
        modules = self.fields.get("modules_to_save") or ()
        # "head." is in the name if the name of a module around the tensor ends with "head".
        return any(f"{module}." in name for module in modules)

    def notes(self) -> dict[str, str]:
        """Return the `NOTES` that the configuration has."""
        notes = {name: self.fields.get(name) for name in NOTES}
        return {name: text for name, text in notes.items() if text and isinstance(text, str)}

    def of_layer(self, name: str, field: str, pattern: str) -> Any:
        """Return r or lora_alpha of a layer as PEFT finds it: by the first key of the pattern."""
        values = self.fields.get(pattern) or {}
        for key, value in values.items():
            if _matches(key, name, self.path):
                return value
        return self.fields.get(field, 8)  # the default of both in PEFT


def _matches(pattern: str, name: str, path: Path) -> bool:
    """Whether a regex of a file is found in a name as PEFT finds it.

    A regex that could take hours is refused: one that repeats a group, or with many repetitions.
    """
    repetitions = sum(pattern.count(sign) for sign in "*+{")
    if repetitions > 3 or re.search(r"\)[*+{]", pattern) or len(pattern) > 1000 or len(name) > 256:
        raise AdapterFileError(
            f"{path}: the pattern {brief(pattern)} could take hours to search in {brief(name)}; "
            "use names of layers, or the adapter in PEFT"
        )
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_folder(path: PathLike) -> Path | None:
    """Return the folder of PEFT that a path or a file in it names, or None if it is none.

    A folder that has an adapter file too is none, because the file is read.

    Args:
        path: a folder, or the path of its `adapter_model.safetensors`.
    """
    folder = check_path(path)
    if folder.name == WEIGHTS_NAME:
        folder = folder.parent
    is_read_as_ours = (folder / ADAPTER_NAME).exists()
    return folder if (folder / CONFIG_NAME).is_file() and not is_read_as_ours else None


def read_config(folder: PathLike) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter, which is `adapter_config.json` in its folder.

    Args:
        folder: the folder.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it does not hold a JSON object.
    """
    return read_json(check_path(folder) / CONFIG_NAME)


def read_peft_files(folder: PathLike, also_train: bool = True) -> PeftFolder:
    """Read both files. Without `also_train`, only the tensors of layers."""
    fields = read_config(folder)
    path = check_path(folder)
    file = path / WEIGHTS_NAME
    old_file = path / OLD_WEIGHTS_NAME
    if file.exists() or not old_file.exists():
        tensors, _ = read_tensors(file)
    else:
        tensors = _load_old(old_file)
    named = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in tensors.items()
        if also_train or key.endswith(OF_LAYERS)
    }
    return PeftFolder(path, fields, named)


def _load_old(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of `torch.save`, in which nothing runs."""
    try:
        tensors: dict[str, Tensor] = torch.load(file, "cpu", weights_only=True)
        checked = {str(key): tensor.detach() for key, tensor in tensors.items()}
    except Exception as error:  # torch raises what its parts do, from pickle to zip files
        reason = str(error).partition("\n")[0]
        raise AdapterFileError(
            f"{file} is no file of tensors by their names, as torch.save writes it ({reason}); get "
            "it again"
        ) from error
    return checked


def refuse_to_write(
    what: str,
    problems: Sequence[str],
    advice: str = "Leave these layers out (`exclude`), or merge (merge_adapters)",
) -> None:
    """Raise `ConversionError` with all problems of an adapter, if there are any."""
    if problems:
        raise ConversionError(
            f"{what}, so nothing was written:\n{first_few(problems, 20)}\n{advice}"
        )


# --- names ---------------------------------------------------------------------------------------


def exact_pattern(name: str) -> str:
    """Return the key of `rank_pattern` or `alpha_pattern` for this layer only."""
    return "^" + re.escape(name)


def exact_targets(adapted: Iterable[str], modules: Collection[str] | None) -> list[str] | str:
    """Return `target_modules` that select these layers and no others: their names, or a regex."""
    names = sorted(set(adapted))
    # PEFT reads the entries of a list as ends of names, which other modules may have too.
    if modules is None:
        is_exact = not any(name.isdecimal() for name in names)
    else:
        ends = tuple(f".{name}" for name in names)
        others = set(modules).difference(names)
        is_exact = not any(module.endswith(ends) for module in others)
    if is_exact:
        return names
    return "|".join(re.escape(name) for name in names)


# --- settings ------------------------------------------------------------------------------------

NOTES = ("base_model_name_or_path", "revision", "task_type")
"""Fields that say where an adapter belongs. They do not change what it computes."""


def notes_of(model: nn.Module) -> dict[str, str | None]:
    """Return the `NOTES` that a model of `transformers` gives."""
    config: Any = getattr(model, "config", None)
    # config.architectures may name another class, from which the checkpoint was saved.
    task = task_of(type(model).__name__, getattr(config, "is_encoder_decoder", False))
    base = getattr(config, "_name_or_path", None) or None
    return {"base_model_name_or_path": base, "revision": None, "task_type": task}


def model_type_of(view: ModelView) -> str | None:
    """Return the type of a model of `transformers`."""
    config = getattr(view.modules[""], "config", None)
    return getattr(config, "model_type", None)


def task_of(architecture: str, is_encoder_decoder: bool) -> str | None:
    """Return PEFT's name of the task of a class of `transformers`, if it generates text.

    Other tasks are not named: PEFT loads a folder of a task that classifies only if it has the
    whole head.
    """
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if architecture.endswith("ForConditionalGeneration") and is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return None


# --- layers --------------------------------------------------------------------------------------


def names_of_weight(view: ModelView, layer: str) -> tuple[str, ...]:
    """Return all names of the weight of a layer, which may be tied."""
    parameter = view.parameters_by_name.get(join(layer, "weight"))
    if parameter is None:
        return ()
    return parameter.names


READ_BY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),  # on a fast path for inference
}
"""Classes that read the weights of their children, without PEFT's update."""


def reasons_against(
    view: ModelView,
    layers: Iterable[str],
    reason_if_unknown: Callable[[nn.Module], str | None],
) -> list[str]:
    """Return a line for each layer where PEFT would compute something else."""
    parents = Counter(child for module in view.names for child in module._modules.values())
    readers = _find_readers(view)

    def reason_against(name: str) -> str | None:
        module = view.modules.get(name)
        if module is None:
            return "there is no such module, and PEFT can only replace modules"
        if not name:
            return THE_MODEL_ITSELF
        if module in readers:
            return f"{readers[module]} reads its weight, without PEFT's update"
        if parents[module] > 1:
            names = ", ".join(view.names[module])
            return f"it is one module with the names {names}, and PEFT adapts only the first"
        if "parametrizations" in module._modules:
            return "its weight is computed (a parametrization), which PEFT can't merge into"
        if _has_own_forward(module):
            return f"{original_class(module).__name__} has a forward of its own, which PEFT wraps"
        return reason_if_unknown(module)

    lines = []
    for name in layers:
        reason = reason_against(name)
        if reason is not None:
            lines.append(f"{name or '(the model)'}: {reason}")
    return lines


def _find_readers(view: ModelView) -> dict[nn.Module | None, str]:
    """Return the modules whose weight is read by another one, with the class of that one."""
    readers = {}
    for module in view.names:
        for cls, children in READ_BY.items():
            if isinstance(module, cls):
                for child in children:
                    readers[module._modules.get(child)] = original_class(module).__name__
    return readers


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the class overrides the forward of the layer class that it inherits from.

    An embedding that is only scaled (Gemma, BART) does not count, because PEFT scales its update
    too. It has one parameter; that of T5Gemma2 has another one, for a single token.
    """
    cls: Any = original_class(module)
    for known in cls.__mro__:
        if known in LAYER_KINDS or full_name(known) in FOREIGN_LAYOUTS:
            only_scales = hasattr(module, "embed_scale") and len(module._parameters) == 1
            is_known = cls.forward is known.forward or is_library_forward(cls)
            return not (is_known or only_scales)
    return False


def unknown_to_lora(layer: nn.Module) -> str | None:
    """Return why PEFT's LoRA can't adapt a layer with the same result, or None if it can."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if layer.groups != 1:
            return f"its convolution has groups={layer.groups}, and PEFT's LoRA can't merge these"
        if any(step != 1 for step in layer.dilation):
            return "its convolution is dilated, and the one in PEFT's LoRA is not"
        if layer.padding_mode != "zeros":
            return f"it has padding_mode={layer.padding_mode!r}, and PEFT's LoRA pads with zeros"
        return None
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            return "its embedding has max_norm, which PEFT applies to LoRA's factor too"
        return None
    # GPT-2's Conv1D is the only class with W as (in, out) that PEFT knows.
    names = map(full_name, type(layer).__mro__)
    if isinstance(layer, nn.Linear) or "transformers.pytorch_utils.Conv1D" in names:
        return None
    return f"PEFT's LoRA does not know a {original_class(layer).__name__}"


# --- what was trained with the layers ------------------------------------------------------------


@dataclass(frozen=True)
class Surroundings:
    """What PEFT has around the layers of an adapter.

    `problems` has a line for each layer that PEFT would read otherwise, and for each trained
    parameter that it has no place for.
    """

    problems: list[str]
    saved: Collection[str]  # modules that it saves whole
    tensors: Tensors  # those of these modules
    modules: Collection[str] | None  # all modules of the model, if they are known
    model_type: str | None
    notes: Mapping[str, Any]
    tables: Collection[str]  # those whose new rows it reads as they are read here

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the tensors on the CPU; collective if sharded."""
        return {
            name: gather(tensor.detach()).to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors.items()
        }

    def fields(self, target_modules: object) -> dict[str, Any]:
        """Return what the configuration of every method has."""
        return {
            "bias": "none",
            "inference_mode": True,
            "modules_to_save": sorted(self.saved) or None,
            "target_modules": target_modules,
            **self.notes,
        }


def surroundings_in_model(
    view: ModelView,
    contents: AdapterContents,
    reason_if_unknown: Callable[[nn.Module], str | None],
) -> Surroundings:
    """Return what PEFT has around the layers of an adapter of a model."""
    modules = [layer.name for layer in contents.layers if not is_stack(layer)]
    saved, tensors, unsaved = _find_saved_modules(view, contents.also_train)
    problems = reasons_against(view, modules, reason_if_unknown)
    problems += unsaved + _layers_inside(contents.names, saved)
    names = [names[0] for names in view.names.values() if names[0]]  # by which PEFT finds modules
    notes = notes_of(view.modules[""])
    tables = [layer.name for layer in contents.layers if _reads_rows_alike(view, layer)]
    return Surroundings(problems, saved, tensors, names, model_type_of(view), notes, tables)


def surroundings_alone(
    contents: AdapterContents, unknown: Iterable[str], model_type: str | None = None
) -> Surroundings:
    """Return the same without the model, of which `unknown` says what must be known.

    The notes of the adapter that PEFT knows are kept.
    """
    problems = [] if all(contents.names) else [f"(the model): {THE_MODEL_ITSELF}"]
    problems += [
        f"{name}: {OF_THE_MODEL_ITSELF}" for name in contents.also_train if "." not in name
    ]
    saved = {name.rpartition(".")[0] for name in contents.also_train}
    problems += [*_layers_inside(contents.names, saved), *unknown]
    tensors = {name: contents.tensors[name] for name in contents.also_train}
    notes = {note: contents.metadata.get(note) for note in NOTES}
    return Surroundings(problems, saved, tensors, None, model_type, notes, contents.names)


def _reads_rows_alike(view: ModelView, layer: BlockSpec) -> bool:
    """Whether PEFT would read new rows of a table as they are read here.

    That is so if the update is in all modules that are tied to the table, and none has a bias.
    """
    names = names_of_weight(view, layer.name)
    biases = {name.removesuffix("weight") + "bias" for name in names}
    return len(names) == 1 + len(layer.tied) and biases.isdisjoint(view.parameters_by_name)


def _find_saved_modules(
    view: ModelView, also_train: Sequence[str]
) -> tuple[list[str], dict[str, Tensor], list[str]]:
    """Return the modules that PEFT saves for trained parameters, and the tensors in them.

    PEFT saves the whole module of such a parameter, under each of the module's names. Return also a
    line for each parameter that PEFT has no place for.
    """
    known = view.parameters_by_name
    trained: set[str] = set()
    for name in also_train:
        if name in known:
            trained.update(known[name].names)
    problems = []
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    inside_saved = set[nn.Module]()
    for module, names in view.names.items():
        trained_here = trained.intersection(join(names[0], name) for name in module._parameters)
        if not trained_here or module in inside_saved:
            continue
        reason = OF_THE_MODEL_ITSELF
        if names[0]:
            reason = f"PEFT can't save a {type(module).__name__}"
        if not names[0] or isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            problems.append(f"{min(trained_here)}: {reason}")
            continue
        inside = view.inside(module)
        modules += names
        inside_saved.update(inside)
        for name in names:
            tensors |= _tensors_inside(name, inside)
    problems += [
        f"{name}: PEFT saves buffers only with a module whose parameters train"
        for name in also_train
        if name not in known and name not in tensors
    ]
    return modules, tensors, problems


def _tensors_inside(name: str, inside: Mapping[nn.Module, str]) -> dict[str, Tensor]:
    """Return what a state dict holds of a module, given the modules in it and their names there."""
    tensors = {}
    for inner, below in inside.items():
        held: dict[str, Tensor | None] = {**inner._parameters, **persistent_buffers_of(inner)}
        for key, tensor in held.items():
            if tensor is not None:
                tensors[join(join(name, below), key)] = tensor
    return tensors


def _layers_inside(layers: Iterable[str], modules_to_save: Collection[str]) -> list[str]:
    """Return a line for each layer inside a module that PEFT saves, and so does not adapt."""
    lines = []
    for name in layers:
        if any(f".{module}." in f".{name}." for module in modules_to_save):
            lines.append(
                f"{name}: PEFT would not adapt it, as a part of a module in modules_to_save"
            )
    return lines


def keep_for_model(view: ModelView, folder: PeftFolder) -> PeftFolder:
    """Return a folder with what a load sets: what trains, changed buffers, and tied tensors once.

    PEFT trains the copies of a tied tensor apart, so they must be equal. Collective if sharded.
    """
    buffers = {buffer.name for buffer in view.buffers}
    tensors = folder.tensors
    kept = {}
    problems = []
    for name, tensor in tensors.items():
        untrained = _find_untrained(view, folder, name)
        if untrained is not None and _are_equal_in_narrower(tensor, untrained):
            continue  # the model has it
        parameter = view.parameters_by_name.get(name)
        names = (name,) if parameter is None else parameter.names
        differing = [
            other
            for other in names
            if other not in tensors or not torch.equal(tensors[other], tensor)
        ]
        if differing:
            problems.append(
                f"{name}: the model ties it to {differing[0]}, which differs; untie them"
            )
        elif untrained is not None and name not in buffers:
            problems.append(
                f"{name}: it does not train, and differs from the model's; copy it into the model"
            )
        elif name == names[0]:
            kept[name] = tensor
    if problems:
        raise AdapterFileError(
            f"{folder.path} can't be loaded with the same results as in PEFT; nothing changed:\n"
            + first_few(problems, 20)
        )
    return replace(folder, tensors=kept)


def _find_untrained(view: ModelView, folder: PeftFolder, name: str) -> Tensor | None:
    """Return the model's tensor for one that PEFT saves untrained, or None if PEFT trains it.

    These are buffers, whole embeddings, and the frozen weights of adapted embeddings.
    """
    parameter = view.parameters_by_name.get(name.replace(FROZEN, ".weight"))
    if parameter is not None and not folder.saves(name):
        return parameter.value
    owner, _, attribute = name.rpartition(".")
    if owner not in view.modules:
        return None
    return persistent_buffers_of(view.modules[owner]).get(attribute)


def _are_equal_in_narrower(tensor: Tensor, in_model: Tensor) -> bool:
    """Whether two tensors are equal in the narrower of their dtypes."""
    dtype = min(tensor.dtype, in_model.dtype, key=attrgetter("itemsize"))
    return torch.equal(tensor.to(dtype), gather(in_model).cpu().to(dtype))
