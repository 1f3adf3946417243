"""LoRA folders in PEFT's layout, from an adapter away from its model and to one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disha.config import AdapterConfig, check_scale
from disha.errors import (
    AdapterFileError,
    ArgumentError,
    ArgumentTypeError,
    ConversionError,
)
from disha.files import AdapterHeader, LayerRecord, TensorRecord
from disha.files.atomic import PathLike, checked_path
from disha.files.tensors import DTYPES
from disha.functional import Layout
from disha.interop.folder import anchored, read_folder, target_modules, write_folder
from disha.interop.low_rank import (
    BaseWeight,
    LoraReport,
    LowRankUpdate,
    Progress,
    block_of_factors,
    commonest,
    few,
    low_rank_updates,
)
from disha.interop.patterns import Pattern, PatternError
from disha.interop.saved_modules import other_buffers

__all__ = ["Lora", "ModelFacts", "converted", "read_lora", "write_lora"]

LOOKUP, IN_OUT, CONV = "index out", "in out", "out in *kernel"
"""The layouts that PEFT's configuration or tensors tell from others."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model tells of itself, and an adapter's file does not.

    Attributes:
        base: gives the base weights.
        name: where the model came from, or None.
        modules: the names of its modules.
        kept: the tensors of the modules that PEFT saves whole, by their names.
    """

    base: BaseWeight | None = None
    name: str | None = None
    modules: tuple[str, ...] | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)


# --- writing -------------------------------------------------------------------------------------


def write_lora(
    folder: PathLike,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    base: BaseWeight | None = None,
    progress: Progress = iter,
) -> LoraReport:
    """Write an adapter away from its model as LoRA, as `export` does.

    What only a model can tell stays unchecked: whether PEFT's layers act there (`export` says where
    they would not), and whether `also_train` names all of each module, as PEFT wants on loading.
    Convolutions are refused, for their groups and padding are not known.

    Args:
        folder: the folder to write.
        header: what describes the adapter.
        tensors: its tensors.
        rank: largest rank of a layer.
        max_error: largest relative error that a layer may have.
        base: gives the base weights; needed for BAT only.
        progress: passes the layers on while they are converted.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: LoRA can't express the adapter, or not with an error below `max_error`; or
            a layer is a convolution.
        ArgumentError: `rank` or `max_error` is out of range, or BAT lacks `rank` or `base`.
        ArgumentTypeError: one of them is no number.
        AdapterStateError: the adapter holds values that are not finite.
        AdapterIOError: the folder can't be written; what was there is still there.

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
    target = checked_path(folder)
    convolutions = [layer.name for layer in header.layers if layer.layout.pattern == CONV]
    if convolutions:
        raise ConversionError(
            f"{convolutions[0]} is a convolution, and its adapter does not tell the groups and "
            "padding that LoRA depends on; load it into the model and export it from there "
            "(disha.interop.lora.export)"
        )
    lora = converted(
        header,
        tensors,
        rank=rank,
        max_error=max_error,
        facts=ModelFacts(base=base),
        progress=progress,
    )
    write_folder(target, lora.config, lora.tensors)
    return lora.report(target)


@dataclass(frozen=True)
class Lora:
    """An adapter in PEFT's terms."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    updates: tuple[LowRankUpdate, ...]
    kept: tuple[str, ...]

    def report(self, path: Path) -> LoraReport:
        """Return what was written to a folder."""
        return LoraReport.of(path, self.updates, self.kept)


def converted(
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    *,
    rank: int | None,
    max_error: float | None,
    facts: ModelFacts,
    progress: Progress = iter,
) -> Lora:
    """Return an adapter in PEFT's terms.

    Args:
        header: what describes the adapter.
        tensors: its tensors.
        rank: largest rank of a layer.
        max_error: largest relative error that a layer may have.
        facts: what is known of the model.
        progress: passes the layers on while they are converted.

    Raises:
        ConversionError: LoRA can't express the adapter, or not with an error below `max_error`.
        ArgumentError: `rank` or `max_error` is out of range, or BAT lacks `rank` or a base.
        ArgumentTypeError: one of them is no number.
        AdapterStateError: the adapter holds values that are not finite.
    """
    if any(not layer.name for layer in header.layers):
        raise ConversionError(
            "the adapted layer is the whole model, and PEFT replaces modules within one; adapt it "
            "as a part of a model"
        )
    updates = low_rank_updates(
        header,
        tensors,
        rank=rank,
        max_error=max_error,
        base=facts.base,
        progress=progress,
    )
    kept = facts.kept or {name: tensors[name] for name in header.also_train}
    config = _config(header, updates, kept, facts)
    factors = {key: factor for update in updates for key, factor in _factors(update)}
    return Lora(config, {**factors, **kept}, updates, tuple(kept))


def _factors(update: LowRankUpdate) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the keys and factors of a layer, as PEFT's layer of that kind has them."""
    name, a, b = update.record.name, update.a, update.b
    if not update.record.scale:
        b = torch.zeros_like(b)
    if update.record.layout.pattern == LOOKUP:
        yield f"{name}.lora_embedding_A", a
        yield f"{name}.lora_embedding_B", b
    else:
        yield f"{name}.lora_A.weight", a
        yield f"{name}.lora_B.weight", b.reshape(*b.shape, *(1 for _ in a.shape[2:]))


def _config(
    header: AdapterHeader,
    updates: Sequence[LowRankUpdate],
    kept: Mapping[str, Tensor],
    facts: ModelFacts,
) -> dict[str, Any]:
    """Return what PEFT calls LoraConfig."""
    ranks = {update.record.name: update.rank for update in updates}
    alphas = {update.record.name: _alpha(update) for update in updates}
    # Most layers share both: the rest are exceptions.
    r, alpha = commonest((ranks[name], alphas[name]) for name in ranks)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": facts.name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {anchored(name): own for name, own in ranks.items() if own != r},
        "alpha_pattern": {anchored(name): own for name, own in alphas.items() if own != alpha},
        "target_modules": target_modules(ranks, facts.modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in kept}) or None,
        "lora_dropout": header.config.dropout,
        "fan_in_fan_out": any(update.record.layout.pattern == IN_OUT for update in updates),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _alpha(update: LowRankUpdate) -> float:
    """Return lora_alpha = s r, for which PEFT multiplies by s.

    0 means 1 to some runtimes, so where s is 0, B is instead.
    """
    alpha = (update.record.scale or 1.0) * update.rank
    return int(alpha) if alpha == int(alpha) else alpha


# --- reading -------------------------------------------------------------------------------------


def read_lora(
    folder: PathLike,
    *,
    layouts: Mapping[str, Layout] | None = None,
    also_train: bool = True,
    buffers: Mapping[str, Tensor] | None = None,
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return a LoRA that is a Bone adapter, as an adapter away from its model.

    Args:
        folder: the folder.
        layouts: the layouts of the model's weights, by the names of their modules. Only a folder
            with `fan_in_fan_out`, which holds for some of its layers, does not tell them.
        also_train: also return the parameters that the folder holds beside the factors.
        buffers: the model's buffers; the folder's must have their values, and are left out.

    Returns:
        What describes the adapter, and its tensors by key.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it holds no LoRA in PEFT's layout, or has other buffers than the model.
        ConversionError: the LoRA is not a Bone adapter, or does not tell its layouts.

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
    path, config, tensors = read_folder(folder)
    settings = _Settings(path, config)
    pairs, beside = _paired(path, tensors, settings.saved_modules())
    records = {name: settings.record(name, pair, layouts) for name, pair in pairs.items()}
    blocks = {name: block_of_factors(records[name], pair.a, pair.b) for name, pair in pairs.items()}
    without = [name for name, block in blocks.items() if block is None]
    if without:
        raise ConversionError(
            f"{path} is no Bone adapter: in {len(without)} of {len(pairs)} layers "
            f"({few(without)}) lora_A is not [I I ... I], and another A has no block; use this "
            "LoRA with PEFT, or merge it there"
        )
    layers = tuple(records.values())
    contents = {layer.key: block for layer in layers if (block := blocks[layer.name]) is not None}
    kept = _parameters(path, beside, buffers or {}) if also_train else {}
    contents |= kept
    header = AdapterHeader(
        config=settings.config(layers, kept),
        layers=layers,
        also_train=tuple(kept),
        tensors={key: TensorRecord(tuple(t.shape), t.dtype) for key, t in contents.items()},
        metadata={},
    )
    return header, contents


PEFT_ALPHA = 8
"""What lora_alpha is where a configuration does not say."""

_CHANGE_THE_SUM = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT's with which a layer computes more than W x + s B A x."""


class _Settings:
    """What an `adapter_config.json` says, each part checked as it is read."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.fields = path, config
        kind = config.get("peft_type")
        if kind != "LORA":
            raise AdapterFileError(
                f"{path} holds an adapter of peft_type {kind!r}, not 'LORA'; "
                "disha.interop.peft.load reads PEFT's MiSS and Bone"
            )
        beyond = [name for name in _CHANGE_THE_SUM if config.get(name)]
        if config.get("bias", "none") != "none":
            beyond.append("bias")
        if beyond:
            raise ConversionError(
                f"{path} uses {', '.join(beyond)}, and a Bone adapter has nothing like that; use "
                "this LoRA with PEFT"
            )
        self.patterns = self._alpha_pattern()

    def record(self, name: str, pair: _Pair, layouts: Mapping[str, Layout] | None) -> LayerRecord:
        """Return the layer that a pair of factors belongs to if they are those of a block.

        Args:
            name: its name.
            pair: the factors.
            layouts: those of the model's weights, where the model is known.
        """
        a, b = pair.a, pair.b
        rank, *sizes = a.shape or (0,)
        inputs, kernel = (sizes[0], sizes[1:]) if sizes else (0, [])
        return LayerRecord(
            name=name,
            method="bone",
            r=rank // max(math.prod(kernel), 1),
            r_out=None,
            in_features=inputs,
            out_features=b.shape[0] if b.dim() else 0,
            scale=self._scale(name, max(rank, 1)),
            base=None,
            layout=pair.layout or self._matrix_layout(name, layouts),
        )

    def _matrix_layout(self, name: str, layouts: Mapping[str, Layout] | None) -> Layout:
        if not self.fields.get("fan_in_fan_out"):
            return Layout("out in")
        if layouts is None:
            raise ConversionError(
                f"{self.path} has fan_in_fan_out, and does not tell for which of its layers; load "
                "it into the model (disha.interop.lora.load), and save the adapter from there"
            )
        return layouts.get(name, Layout(IN_OUT))

    def config(self, layers: Sequence[LayerRecord], beside: Iterable[str]) -> AdapterConfig:
        """Return the adapter's configuration."""
        dropout = self._number("lora_dropout", self.fields.get("lora_dropout", 0.0))
        patterns = [f"^{re.escape(name)}$" for name in beside]
        fields = {
            "r": commonest(layer.r for layer in layers),
            "target": None,
            "scale": layers[0].scale,
            "dropout": dropout,
            "also_train": patterns,
        }
        try:
            return AdapterConfig.from_json(fields)
        except ArgumentError as error:
            raise AdapterFileError(f"{self.path}: {error}") from error

    def _scale(self, name: str, rank: int) -> float:
        """Return s of a layer, as PEFT finds it."""
        default = self.fields.get("lora_alpha", PEFT_ALPHA)
        alpha = next((own for pattern, own in self.patterns if self._fits(pattern, name)), default)
        root = math.sqrt(rank) if self.fields.get("use_rslora") else rank
        return self._number("lora_alpha", alpha) / root

    def saved_modules(self) -> tuple[str, ...]:
        """Return the names, or the ends of names, of modules that are saved whole."""
        names = self.fields.get("modules_to_save") or []
        if not isinstance(names, list) or not all(isinstance(one, str) and one for one in names):
            raise AdapterFileError(
                f"{self.path}: modules_to_save must be a list of names, none of them empty, or null"
            )
        return tuple(names)

    def _alpha_pattern(self) -> list[tuple[Pattern, Any]]:
        patterns = self.fields.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{self.path}: alpha_pattern must be an object of name -> alpha")
        try:
            return [(Pattern(rf"(.*\.)?({key})"), alpha) for key, alpha in patterns.items()]
        except PatternError as error:
            raise AdapterFileError(f"{self.path}: alpha_pattern has {error}") from error

    def _fits(self, pattern: Pattern, name: str) -> bool:
        try:
            return pattern.fullmatch(name)
        except PatternError as error:
            raise AdapterFileError(f"{self.path}: alpha_pattern has {error}") from error

    def _number(self, field: str, value: Any) -> float:
        try:
            check_scale(value)
        except (ArgumentError, ArgumentTypeError) as error:
            raise AdapterFileError(f"{self.path}: {field}: {error}") from error
        return float(value)


@dataclass(frozen=True)
class _Pair:
    """The factors of one layer, and whether their keys are those of an embedding."""

    a: Tensor
    b: Tensor
    embedding: bool

    @property
    def layout(self) -> Layout | None:
        """The layout of the weight; None for that of a linear layer, which the pair does not tell.

        The row of an embedding that its update leaves out is the one zero column of A.
        """
        if self.embedding:
            empty = (self.a == 0).all(dim=0).nonzero().flatten().tolist()
            return Layout(LOOKUP, padding_idx=empty[0] if len(empty) == 1 else None)
        return Layout(CONV) if self.a.dim() > 2 else None


_FACTORS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
"""The ends of keys -> which factor it is, and whether it is an embedding's."""

_BASE_WEIGHT = ".base_layer.weight"
"""The end of the key of an embedding's frozen weight, which PEFT may save beside its factors."""


def _paired(
    path: Path, tensors: Mapping[str, Tensor], saved: Sequence[str]
) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """Return the factors of each layer, and the tensors beside them."""
    factors: dict[tuple[str, bool], dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _FACTORS if key.endswith(suffix)), None)
        if suffix is not None:
            factor, embedding = _FACTORS[suffix]
            _check_dtype(path, key, tensor, "save the LoRA again in one of these")
            factors.setdefault((key.removesuffix(suffix), embedding), {})[factor] = tensor
        elif key.rpartition(".")[0].endswith(tuple(saved)):
            beside[key] = tensor
        elif not key.endswith(_BASE_WEIGHT):
            raise AdapterFileError(
                f"{path}: tensor {key!r} is neither lora_A nor lora_B, nor in a module that "
                "modules_to_save names; a LoRA with more to it is no Bone adapter"
            )
    if not factors:
        raise AdapterFileError(f"{path} holds no lora_A and lora_B")
    twice = [name for name, embedding in factors if embedding and (name, False) in factors]
    if twice:
        raise AdapterFileError(
            f"{path}: {few(twice)} has factors of an embedding (lora_embedding_A and _B) and of "
            "another kind of layer (lora_A and _B) too; save the LoRA again"
        )
    halves = [name for (name, _), found in factors.items() if len(found) < 2]
    if halves:
        raise AdapterFileError(f"{path}: {few(halves)} lacks lora_A or lora_B")
    pairs = {
        name: _Pair(found["a"], found["b"], embedding)
        for (name, embedding), found in factors.items()
    }
    return pairs, beside


def _parameters(
    path: Path, beside: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is beside the factors without buffers, which must be the model's."""
    problems = other_buffers(buffers, beside)
    if problems:
        raise AdapterFileError(f"{path} does not fit the model:\n" + "\n".join(problems[:20]))
    kept = {key: tensor for key, tensor in beside.items() if key not in buffers}
    for key, tensor in kept.items():
        remedy = (
            "if it is a buffer of a module that was saved whole, load the folder into the model "
            "(disha.interop.lora.load), or leave out what is beside the blocks (also_train=False)"
        )
        _check_dtype(path, key, tensor, remedy)
    return kept


def _check_dtype(path: Path, key: str, tensor: Tensor, remedy: str) -> None:
    """Raise unless a tensor has a dtype that a parameter has."""
    if tensor.dtype not in DTYPES.values():
        allowed = ", ".join(map(str, DTYPES.values()))
        raise AdapterFileError(
            f"{path}: tensor {key!r} has dtype {tensor.dtype}; allowed are {allowed}: {remedy}"
        )
