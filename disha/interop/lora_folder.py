"""Read and write LoRA folders in PEFT's layout without a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from disha.config import AdapterConfig, check_scale
from disha.errors import AdapterFileError, ArgumentError, ArgumentTypeError, ConversionError
from disha.files import AdapterHeader, LayerRecord
from disha.files.atomic import PathLike, checked_path
from disha.files.contents import records_of
from disha.files.json_files import is_size
from disha.functional import Layout
from disha.interop import experts as expert_forms
from disha.interop.low_rank import (
    BaseWeight,
    LoraReport,
    LowRankUpdate,
    Progress,
    commonest,
    is_stack,
    layer_of_factors,
    listed,
    low_rank_updates,
)
from disha.interop.peft_files import (
    Fields,
    anchored,
    exact_targets,
    has_saved,
    name_ends,
    read_peft_files,
    refuse_to_load,
    unusable,
    write_peft_files,
)
from disha.interop.peft_view import other_buffers, refuse_to_write
from disha.text import brief, counted

__all__ = [
    "CANT_EXPRESS",
    "CONV",
    "MATRIX",
    "Alphas",
    "alpha_of",
    "as_peft",
    "checked_alpha",
    "contents_of_layers",
    "expert_updates",
    "factors_of",
    "factors_of_all",
    "read_lora",
    "scaling_of",
    "write_lora",
]

LOOKUP, IN_OUT, CONV = "index out", "in out", "out in *kernel"
"""The layouts that have their own names, fields or shapes in a LoRA folder."""

MATRIX = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_FACTORS = (*MATRIX, *_EMBEDDING)
"""The ends of the keys of factors."""

CANT_EXPRESS = "PEFT's LoRA would not compute what this adapter does"


# --- writing -------------------------------------------------------------------------------------


def write_lora(
    folder: PathLike,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    pad: bool = False,
    experts: str = "stacked",
    model_type: str | None = None,
    base: BaseWeight | None = None,
    progress: Progress = iter,
) -> LoraReport:
    """Write an adapter without its model as LoRA, as `export` does.

    Two checks of `export` need the model and are left out: whether PEFT's layers act in it, and
    whether `also_train` names every parameter of each module, as PEFT requires when it loads.
    Convolutions are refused, because their groups and padding are unknown.

    Args:
        folder: the folder to write.
        header: the adapter's header.
        tensors: its tensors.
        rank: largest rank of a layer.
        max_error: largest relative error of a layer.
        pad: pad the rank of every layer as `export` does.
        experts: `"stacked"` or `"separate"`, as for `export`.
        model_type: type of the model, `model_type` of its configuration; needed for experts that
            are written separately.
        base: returns the base weights; only BAT needs it.
        progress: receives the layers, and yields each before it is converted.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: LoRA can't express the adapter, its error is above `max_error`, a layer
            is a convolution, `pad` is set and a rank is above 512, or the names of separate
            experts of this `model_type` are unknown.
        ArgumentError: `rank`, `max_error` or `experts` is out of range, or BAT lacks `rank` or
            `base`.
        ArgumentTypeError: one of them is not a number.
        AdapterStateError: the adapter holds values that are not finite.
        AdapterIOError: the folder can't be written; what was there is unchanged.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.files.contents import adapter_contents
        >>> from disha.interop import lora
        >>> from disha.model import ModelView
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = lora.write_lora(folder, *adapter_contents(ModelView(model)))
        >>> report.layers
        (LoraLayer(name='0', method='bone', r=4, rank=4, error=0.0),)
    """
    target, form = checked_path(folder), expert_forms.checked_form(experts)
    problems = []
    for layer in header.layers:
        if layer.layout.pattern == CONV:
            problems.append(
                f"{layer.name} is a convolution, and its groups and padding are unknown here: load "
                "the adapter into the model, and export from there (disha.interop.lora.export)"
            )
        if not layer.name:
            problems.append("(the model): PEFT adapts layers within a model, not the model itself")
    stacks = [one for one in header.layers if is_stack(one)]
    if form == "separate" and stacks:
        expert_forms.refuse_beside(header.also_train)
    if form == "stacked":
        layouts = {one.name: one.layout for one in stacks}
        problems += expert_forms.misread_unseen(layouts, model_type)
    if form == "stacked" and any(one.layout == expert_forms.SEPARATE_BEFORE for one in stacks):
        problems += expert_forms.taken_for_experts(
            one.name for one in header.layers if one not in stacks
        )
    problems += [
        f"{name}: it belongs to the model itself, not to a module in it"
        for name in header.also_train
        if "." not in name
    ]
    refuse_to_write(CANT_EXPRESS, problems)
    updates = low_rank_updates(
        header,
        tensors,
        rank=rank,
        max_error=max_error,
        pad=pad,
        stacks=True,
        base=base,
        progress=progress,
    )
    beside = {name: tensors[name] for name in header.also_train}
    modules = {name.rpartition(".")[0] for name in beside}
    written = expert_updates(updates, form, model_type)
    files = as_peft(header, written, targets_of(written), beside, modules)
    write_peft_files(target, *files)
    return LoraReport.of(target, updates, beside)


def expert_updates(
    updates: Sequence[LowRankUpdate], form: expert_forms.ExpertForm, model_type: str | None
) -> Sequence[LowRankUpdate]:
    """Return the updates with experts in one of the two forms.

    Raises:
        ConversionError: the names of separate experts of this `model_type` are unknown.
    """
    if form == "stacked" or not any(is_stack(update.record) for update in updates):
        return updates
    family = expert_forms.family_of(model_type, "what separate experts are called")
    return expert_forms.separated(updates, family)


@dataclass(frozen=True)
class Targets:
    """How PEFT finds the layers of a LoRA.

    Attributes:
        modules: `target_modules`.
        parameters: `target_parameters`.
    """

    modules: list[str] | str
    parameters: list[str]


def targets_of(
    updates: Sequence[LowRankUpdate],
    modules: Collection[str] | None = None,
    parameters: Collection[str] | None = None,
) -> Targets:
    """Return what selects the layers of these updates.

    SGLang refuses a regex, so modules of an unknown model are a list of full names. PEFT reads them
    as endings of names: if one is the ending of a longer name, PEFT adapts that module too, with an
    update of zero. Many names end with a number, so if one of the full names is only a number, the
    result is a regex. SGLang knows single experts by the usual names of their projections, whatever
    their keys are.

    Args:
        updates: the updates, as they are written.
        modules: names of all modules of the model, if it is known.
        parameters: names of all its parameters.
    """
    names = [update.record.name for update in updates]
    stacks = {update.record.name for update in updates if is_stack(update.record)}
    single = {name for name in names if expert_forms.single_expert(name)}
    others = [name for name in names if name not in stacks | single]
    found: list[str] | str = sorted(others)
    if single:
        found = sorted({*others, *expert_forms.SERVED_TARGETS})
    elif others and (modules is not None or any(map(str.isdecimal, others))):
        found = exact_targets(others, modules)
    ends = exact_targets(stacks, parameters) if stacks and parameters is not None else []
    return Targets(found, ends if isinstance(ends, list) and ends else sorted(stacks))


def as_peft(
    header: AdapterHeader,
    updates: Sequence[LowRankUpdate],
    targets: Targets,
    beside: Mapping[str, Tensor],
    modules_to_save: Iterable[str],
    base_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a LoRA as PEFT's configuration, and its tensors by PEFT's keys without the prefix.

    Args:
        header: the adapter's header.
        updates: the factors of its layers.
        targets: what selects the layers.
        beside: the tensors that are saved besides the factors.
        modules_to_save: the modules that these belong to.
        base_name: the name or path of the base, if it is known.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        **scaling_of(updates),
        "target_modules": targets.modules,
        **({"target_parameters": targets.parameters} if targets.parameters else {}),
        "modules_to_save": sorted(modules_to_save) or None,
        # PEFT has no dropout for parameters.
        "lora_dropout": 0.0 if targets.parameters else header.config.dropout,
        "fan_in_fan_out": any(update.record.layout.pattern == IN_OUT for update in updates),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    return config, {**factors_of_all(updates), **beside}


def scaling_of(
    updates: Sequence[LowRankUpdate], key_of: Callable[[str], str] = anchored
) -> dict[str, Any]:
    """Return the fields of PEFT's configuration that set the rank and the scale of every layer.

    Args:
        updates: the factors of the layers.
        key_of: returns the key of `rank_pattern` and `alpha_pattern` for the name of a layer.
    """
    ranks = {update.record.name: update.rank for update in updates}
    alphas = {update.record.name: alpha_of(update) for update in updates}
    # The values of most layers are the default; the patterns list the other layers.
    r, alpha = commonest((ranks[name], alphas[name]) for name in ranks)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {key_of(name): own for name, own in ranks.items() if own != r},
        "alpha_pattern": {key_of(name): own for name, own in alphas.items() if own != alpha},
    }


def alpha_of(update: LowRankUpdate) -> float:
    """Return lora_alpha = s * rank, so that PEFT scales by s.

    Some runtimes read 0 as 1, so a scale of 0 makes B zero instead.
    """
    alpha = (update.record.scale or 1.0) * update.rank
    return int(alpha) if alpha == int(alpha) else alpha


def factors_of_all(updates: Sequence[LowRankUpdate]) -> dict[str, Tensor]:
    """Return the factors of all layers by their keys in a folder, without PEFT's prefix."""
    stacks = expert_forms.stack_names(one.record.name for one in updates if is_stack(one.record))
    return {
        stacks.get(update.record.name, update.record.name) + end: factor
        for update in updates
        for end, factor in factors_of(update).items()
    }


def factors_of(update: LowRankUpdate) -> dict[str, Tensor]:
    """Return A and B of a layer by the ends of their keys, as PEFT's layer of that class has them.

    Args:
        update: the update of the layer.
    """
    a, b = update.a, update.b
    if is_stack(update.record):
        a, b = expert_forms.stack_factors(update)
    if not update.record.scale:
        b = b.new_zeros(b.shape)
    if update.record.layout.pattern == LOOKUP:
        return dict(zip(_EMBEDDING, (a, b), strict=True))
    b = b.reshape(*b.shape, *(1 for _ in a.shape[2:]))
    return dict(zip(MATRIX, (a, b), strict=True))


# --- reading -------------------------------------------------------------------------------------


def read_lora(
    folder: PathLike,
    *,
    layouts: Mapping[str, Layout] | None = None,
    model_type: str | None = None,
    also_train: bool = True,
    buffers: Mapping[str, Tensor] | None = None,
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Read a LoRA that is a Bone adapter, without a model.

    The folder's tensors say which layers are adapted, and with which rank. The scale comes from
    `lora_alpha` and `alpha_pattern`, whose keys must be names or endings of names, not regexes.

    Args:
        folder: the folder.
        layouts: the layouts of the model's weights, by the names of their modules. A folder with
            `fan_in_fan_out` needs them, because the field applies to only some of its layers.
        model_type: type of the model, `model_type` of its configuration. Experts need it, because a
            LoRA does not say how the model stacks them; for experts that are stacked in the folder
            too, `layouts` will do.
        also_train: also return the parameters that the folder holds besides the factors.
        buffers: the model's buffers. Those of the folder must have the same values, and are left
            out.

    Returns:
        The adapter's header, and its tensors by key.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it does not hold a LoRA in PEFT's layout, or has other buffers than the
            model, or values that are not finite.
        ConversionError: the LoRA is not a Bone adapter, or its layouts, or how its experts are
            stacked, are unknown.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import lora
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lora.export(model, folder)
        ...     header, tensors = lora.read_lora(folder)
        >>> block = model[0].disha["default"].block
        >>> header.layers[0].method, torch.equal(tensors["0.bone_block"], block)
        ('bone', True)
    """
    path, fields, tensors = read_peft_files(folder)
    _check_settings(fields)
    pairs, beside = _paired(path, tensors, fields.modules_to_save())
    known = buffers or {}
    kept = {key: tensor for key, tensor in beside.items() if also_train and key not in known}
    factors = {key: tensor for key, tensor in tensors.items() if key.endswith(_FACTORS)}
    refuse_to_load(path, other_buffers(known, beside if also_train else {}))
    refuse_to_load(path, unusable({**factors, **kept}))
    found = [
        (layer.name, layer_of_factors(layer.name, layer.a, layer.b, layer.layout, layer.scale))
        for layer in _layers(fields, pairs, layouts, model_type)
    ]
    without = [name for name, one in found if one is None]
    if without:
        raise ConversionError(
            f"{path} is not a Bone adapter: lora_A must be [I I ... I], and it is not in "
            f"{len(without)} of {counted(len(found), 'layer')} ({listed(without)}); use this LoRA "
            "with PEFT, or merge it there"
        )
    return contents_of_layers(fields, [one for _, one in found if one is not None], kept)


@dataclass(frozen=True)
class _Layer:
    """What a folder says of one layer: its factors, as `layer_of_factors` takes them."""

    name: str
    a: Tensor
    b: Tensor
    layout: Layout
    scale: float


def _layers(
    fields: Fields,
    pairs: Mapping[str, _Pair],
    layouts: Mapping[str, Layout] | None,
    model_type: str | None,
) -> Iterator[_Layer]:
    """Yield every layer of a folder, experts as stacks.

    Raises:
        ConversionError: how experts are stacked is unknown.
        AdapterFileError: experts are missing, or differ in shape or scale.
    """
    alphas, parameters = Alphas(fields), fields.names("target_parameters")
    ranks = NamedValues(fields, "r", "rank_pattern", PEFT_RANK) if parameters else None
    stacks: list[tuple[str, expert_forms.Matrices]] = []
    single: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in pairs.items():
        stack = expert_forms.stacked(name, parameters)
        if stack is not None and ranks is not None:
            rank = _rank(fields, ranks, stack)
            stacks.append((stack, expert_forms.matrices_of(stack, pair.a, pair.b, rank)))
        elif expert_forms.single_expert(name):
            single[name] = (pair.a, pair.b)
        else:
            scale = alphas.scale(name, pair.a.shape[0] if pair.a.dim() else 0)
            layout = pair.layout or _matrix_layout(fields, name, layouts)
            own = expert_forms.in_model(name, model_type)
            yield _Layer(own, pair.a, pair.b, layout, scale)
    for name, found in (*stacks, *expert_forms.joined(single, model_type).items()):
        scales = {alphas.scale(key, found.a.shape[1]) for key in found.keys}
        if len(scales) > 1:
            raise AdapterFileError(
                f"{fields.path}: the experts of {name} have {len(scales)} scales, and an adapter "
                "has one for all of them; use this LoRA with PEFT, or merge it there"
            )
        known = (layouts or {}).get(name)
        if known is None:
            known = expert_forms.family_of(model_type, "the layout of stacked experts").layout
        yield _Layer(name, found.a, found.b, known, scales.pop())


def contents_of_layers(
    fields: Fields, found: Sequence[tuple[LayerRecord, Tensor]], kept: Mapping[str, Tensor]
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return the header and the tensors of an adapter that was a LoRA.

    Args:
        fields: the configuration of the LoRA.
        found: its layers with their blocks.
        kept: the parameters besides its blocks, by name.

    Raises:
        AdapterFileError: the configuration has a wrong value, or there are two updates of a layer.
    """
    layers = [layer for layer, _ in found]
    keys = Counter([*(layer.key for layer in layers), *kept])
    twice = [key for key, times in keys.items() if times > 1]
    if twice:
        raise AdapterFileError(
            f"{fields.path} has several tensors, under different names, for {listed(twice)}; get "
            "another version of the LoRA"
        )
    contents = {layer.key: block for layer, block in found} | dict(kept)
    header = AdapterHeader(
        config=_config(fields, layers, kept),
        layers=tuple(layers),
        also_train=tuple(kept),
        tensors=records_of(contents),
        metadata={},
    )
    return header, contents


@dataclass(frozen=True)
class _Pair:
    """The factors of one layer. Their keys show whether it is an embedding."""

    a: Tensor
    b: Tensor
    embedding: bool

    @property
    def layout(self) -> Layout | None:
        """The layout of the weight; None for a linear layer, because A does not show its layout.

        The padding row of an embedding gets no update, so it is the only zero column of A.
        """
        if self.embedding:
            empty = (self.a == 0).all(dim=0).nonzero().flatten().tolist()
            return Layout(LOOKUP, padding_idx=empty[0] if len(empty) == 1 else None)
        return Layout(CONV) if self.a.dim() > 2 else None


_BASE_WEIGHT = ".base_layer.weight"
"""The end of the key of an embedding's frozen weight, which PEFT may save beside its factors."""


def _paired(
    path: Path, tensors: Mapping[str, Tensor], saved: Sequence[str]
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """Return the factors of each layer, and the tensors besides them."""
    factors: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        end = next((end for end in _FACTORS if key.endswith(end)), None)
        if end is not None:
            factors.setdefault(key.removesuffix(end), {})[end] = tensor
        elif has_saved(key, saved):
            beside[key] = tensor
        elif not key.endswith(_BASE_WEIGHT):
            raise AdapterFileError(
                f"{path}: tensor {key!r} is neither lora_A nor lora_B, nor in a module that "
                "modules_to_save names; a LoRA with other tensors is not a Bone adapter"
            )
    if not factors:
        raise AdapterFileError(
            f"{path} holds no lora_A and lora_B; name a folder in which PEFT has saved a LoRA"
        )
    pairs = {}
    for name, found in factors.items():
        if set(found) not in (set(MATRIX), set(_EMBEDDING)):
            raise AdapterFileError(
                f"{path}: {name} has {', '.join(sorted(found))}; a layer has "
                f"{' and '.join(MATRIX)}, an embedding {' and '.join(_EMBEDDING)}. Save the LoRA "
                "again"
            )
        ends = MATRIX if MATRIX[0] in found else _EMBEDDING
        pairs[name] = _Pair(found[ends[0]], found[ends[1]], ends is _EMBEDDING)
    return pairs, beside


# --- the configuration ---------------------------------------------------------------------------


PEFT_ALPHA, PEFT_RANK = 8, 8
"""PEFT's lora_alpha and r if a configuration has none."""

_CHANGE_THE_SUM = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)
"""PEFT's settings that make a layer compute something other than W x + s B A x."""


_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq")
"""Starts of the values of `init_lora_weights` that let PEFT change W, also when it loads a LoRA."""


def _check_settings(fields: Fields) -> None:
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        raise AdapterFileError(
            f"{fields.path} has the peft_type {peft_type!r}, not 'LORA'; "
            "disha.interop.peft.load reads PEFT's MiSS and Bone"
        )
    more = [name for name in _CHANGE_THE_SUM if fields.get(name)]
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        more.append(f"init_lora_weights={brief(init)}")
    if fields.get("bias", "none") != "none":
        more.append("bias")
    if more:
        raise ConversionError(
            f"{fields.path} uses {', '.join(more)}, which a Bone adapter can't express; use this "
            "LoRA with PEFT"
        )


def _matrix_layout(fields: Fields, name: str, layouts: Mapping[str, Layout] | None) -> Layout:
    """Return the layout of a linear layer's weight."""
    if not fields.get("fan_in_fan_out"):
        return Layout("out in")
    if layouts is None:
        raise ConversionError(
            f"{fields.path} has fan_in_fan_out, but does not say for which layers; load the folder "
            "into the model (disha.interop.lora.load), and save the adapter from there"
        )
    return layouts.get(name, Layout(IN_OUT))


def _config(fields: Fields, layers: Sequence[LayerRecord], beside: Iterable[str]) -> AdapterConfig:
    values = {
        "r": commonest(layer.r for layer in layers),
        "target": None,
        "method": layers[0].method,
        "scale": layers[0].scale,
        "dropout": fields.get("lora_dropout", 0.0),
        "also_train": [f"^{re.escape(name)}$" for name in beside],
    }
    try:
        return AdapterConfig.from_json(values)
    except (ArgumentError, ArgumentTypeError) as error:
        raise AdapterFileError(f"{fields.path}: {error}") from error


_PLAIN_NAME = re.compile(r"\^?((?:[\w\-.]|\\\W)+)")
"""A regex that matches one name: an anchor, letters, dots, and escaped characters."""


class NamedValues:
    """A setting of each layer, as PEFT finds it: a field, and patterns with other values.

    PEFT reads the keys of patterns as regexes for the end of a name. Only those that are plain
    names are read here.

    Args:
        fields: the configuration.
        field: the field.
        pattern: the field with the patterns.
        default: PEFT's value if a configuration has none.
    """

    def __init__(self, fields: Fields, field: str, pattern: str, default: int) -> None:
        self._default = fields.get(field, default)
        patterns = fields.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise fields.wrong(pattern, f"an object of name -> {field}")
        self._ends: dict[str, tuple[int, Any]] = {}
        self._anchored: dict[str, tuple[int, Any]] = {}
        for number, (key, value) in enumerate(patterns.items()):
            name = _PLAIN_NAME.fullmatch(key)
            if name is None:
                raise fields.wrong(
                    pattern, f"an object of plain names, not regexes such as {key[:80]!r}"
                )
            values = self._anchored if key.startswith("^") else self._ends
            values.setdefault(re.sub(r"\\(\W)", r"\1", name[1]), (number, value))

    def of(self, name: str) -> Any:
        """Return the value of a layer, unchecked."""
        known = [self._ends[end] for end in name_ends(name) if end in self._ends]
        known += [self._anchored[name]] if name in self._anchored else []
        # As in PEFT, the first key that matches applies.
        return min(known, key=lambda one: one[0], default=(0, self._default))[1]


class Alphas:
    """The scale of each layer, by its lora_alpha."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self._values = NamedValues(fields, "lora_alpha", "alpha_pattern", PEFT_ALPHA)

    def scale(self, name: str, rank: int) -> float:
        """Return the scale s of a layer. Rank 0, of an empty A that is no factor, counts as 1."""
        rank = max(rank, 1)
        alpha = checked_alpha(f"{self.fields.path}: lora_alpha", self._values.of(name))
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)


def checked_alpha(where: str, alpha: Any) -> float:
    """Return an alpha from a file.

    Args:
        where: where it comes from, for the error.
        alpha: any value.

    Raises:
        AdapterFileError: it is not a number, or too large.
    """
    try:
        check_scale(alpha)
    except (ArgumentError, ArgumentTypeError) as error:
        raise AdapterFileError(f"{where}: {error}") from error
    return float(alpha)


def _rank(fields: Fields, ranks: NamedValues, name: str) -> int:
    """Return the rank of a stack, which the shapes of its factors do not tell."""
    rank: int = ranks.of(name)
    if not is_size(rank):
        raise AdapterFileError(
            f"{fields.path}: the rank of {name} must be an integer of at least 1; it is {rank!r}"
        )
    return rank
