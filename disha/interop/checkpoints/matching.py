"""Whether a checkpoint has the weights of an adapter's layers, and is the adapter's base.

Merging, verifying and converting all use this module, so they find each layer in the same tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from disha.errors import AdapterFileError
from disha.files.atomic import PathLike, checked_path
from disha.files.contents import unread_contents
from disha.files.header import AdapterFile, AdapterHeader, LayerRecord
from disha.files.tensors import DTYPES, HELD, StoredTensor, opened
from disha.fingerprint import fingerprint, fingerprint_of, same_base
from disha.interop.checkpoints.names import Renaming, nearest, possible_keys, renaming
from disha.interop.checkpoints.reading import (
    Checkpoint,
    may_tie,
    open_checkpoint,
    vocabulary_sizes,
)
from disha.interop.checkpoints.stacks import Stack, stacks_of
from disha.model import join
from disha.state import finite_as
from disha.text import counted, printable, table

__all__ = [
    "BaseReport",
    "Finding",
    "Matching",
    "base_shapes",
    "base_weights",
    "matched",
    "refuse_tied",
    "stored_twice",
    "verify_against",
]

SAME_BASE = "same base"
FITS = "fits"
OTHER_BASE = "other base"
MISSING = "missing"
MISFIT = "does not fit"
NOT_FINITE = "not finite"

FINE = (SAME_BASE, FITS)

HINTS = 5
"""For how many missing names a report lists similar ones."""

MOST_COPIES = 4
"""How many tensors can be one parameter: the embeddings of encoder and decoder, and output heads.
More tensors of one shape belong to the layers of a model."""


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """The result for one layer, or for one parameter that is saved with the blocks.

    Attributes:
        name: its name in the adapter file.
        key: the tensor of the checkpoint, or None if there is none. For a stack of experts that
            the checkpoint stores one by one, the name of the stack in the model.
        state: `"same base"`, `"fits"` (there is no fingerprint to compare), `"other base"`,
            `"missing"`, `"does not fit"` or `"not finite"`.
        remark: the details; empty if all is well.

    Examples:
        >>> from disha.interop.checkpoints import Finding
        >>> Finding("0", key="0.weight", state="same base")
        Finding(name='0', key='0.weight', state='same base', remark='')
    """

    name: str
    key: str | None
    state: str
    remark: str = ""


@dataclass(frozen=True)
class BaseReport:
    """Whether an adapter file fits a base checkpoint; printable.

    Attributes:
        adapter: the adapter file.
        base: the checkpoint.
        layers: the result for each layer.
        also_train: the result for each parameter that is saved with the blocks.

    Examples:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import verify_against
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, path = pathlib.Path(folder, "base.safetensors"), pathlib.Path(folder, "a")
        ...     save_file(nn.Sequential(nn.Linear(8, 16)).state_dict(), base)
        ...     other = nn.Sequential(nn.Linear(8, 16))  # other random weights
        ...     disha.save_adapter(disha.inject_adapters(other, "0", r=4), path)
        ...     report = verify_against(base, path)
        >>> report.ok, [layer.name for layer in report.other_base]
        (False, ['0'])
    """

    adapter: Path
    base: Path
    layers: tuple[Finding, ...]
    also_train: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is found and fits, and no fingerprint shows another base."""
        return all(one.state in FINE for one in self.layers + self.also_train)

    @property
    def missing(self) -> tuple[Finding, ...]:
        """What the checkpoint lacks."""
        return self._of(MISSING)

    @property
    def misfits(self) -> tuple[Finding, ...]:
        """What has another shape or is quantised there, or is not finite in the adapter."""
        return self._of(MISFIT, NOT_FINITE)

    @property
    def other_base(self) -> tuple[Finding, ...]:
        """The layers whose weights are not those that the adapter was saved from."""
        return self._of(OTHER_BASE)

    def _of(self, *states: str) -> tuple[Finding, ...]:
        return tuple(one for one in self.layers + self.also_train if one.state in states)

    def __str__(self) -> str:
        wrong = [one for one in self.layers + self.also_train if one.state not in FINE]
        rows = [(one.name or "(the model)", one.state, one.remark) for one in wrong]
        lines = [table(("name", "found", "remark"), rows)] if rows else []
        known = sum(one.state == SAME_BASE for one in self.layers)
        fine = sum(one.state in FINE for one in self.layers)
        compared = printable(f"{self.adapter} against {self.base}")
        lines.append(
            f"{compared}: {fine} of {counted(len(self.layers), 'layer')} fit, "
            f"{known} of them with the same fingerprint"
        )
        if self.also_train:
            fine = sum(one.state in FINE for one in self.also_train)
            lines[-1] += f"; {fine} of {counted(len(self.also_train), 'further parameter')} fit"
        return "\n".join(lines)


@dataclass(frozen=True)
class Matching:
    """The tensors of a checkpoint that an adapter changes.

    Attributes:
        report: whether they fit.
        weights: layer -> the tensor, or the stack, that has its weight.
        keys: parameter that is saved with the blocks -> the tensor, or the stack, that it replaces.
        stacks: the stacks of the checkpoint.
    """

    report: BaseReport
    weights: Mapping[str, str]
    keys: Mapping[str, str]
    stacks: Mapping[str, Stack]


def verify_against(
    base: PathLike, adapter_path: PathLike, *, also_train: bool = True
) -> BaseReport:
    """Return whether an adapter file fits a base checkpoint and was saved from its weights.

    The fingerprint of a weight consists of 64 of its values, so only a tiny part of the base is
    read.

    Args:
        base: one safetensors file, or a folder as Hugging Face libraries write it.
        adapter_path: the adapter file.
        also_train: also compare the parameters saved with the blocks.

    Raises:
        AdapterIOError: a file can't be read.
        AdapterFileError: the adapter file or the checkpoint is damaged, or it is unclear which
            tensors of the checkpoint are the adapter's.

    Examples:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import verify_against
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, path = pathlib.Path(folder, "base.safetensors"), pathlib.Path(folder, "a")
        ...     save_file(model.state_dict(), base)
        ...     disha.save_adapter(disha.inject_adapters(model, "0", r=4), path)
        ...     report = verify_against(base, path)
        >>> report.ok, report.layers[0]
        (True, Finding(name='0', key='0.weight', state='same base', remark=''))
    """
    path = checked_path(adapter_path)
    with opened(path) as file:
        return matched(open_checkpoint(base), *unread_contents(file, also_train=also_train)).report


def matched(
    checkpoint: Checkpoint, adapter: AdapterFile, tensors: Mapping[str, Tensor]
) -> Matching:
    """Find the weights of an adapter's layers in a checkpoint, and check that they fit.

    Args:
        checkpoint: the base.
        adapter: the adapter's header.
        tensors: its tensors. None is read before one of them fits.
    """
    base = _Base(checkpoint, adapter.layers, adapter.also_train)
    beside = [
        base.parameter(name, adapter.tensors[name].shape, tensors) for name in adapter.also_train
    ]
    keys = {one.name: one.key for one in beside if one.key and one.state == FITS}
    # A layer may adapt one of the parameters that are saved with the blocks.
    values = {key: tensors[name] for name, key in keys.items()}
    layers = []
    for record in adapter.layers:
        found = base.layer(record, adapter.tensors[record.key].shape, values)
        if found.state not in (MISSING, MISFIT):
            block = tensors[record.key]
            if not finite_as(block, block.dtype):
                found = replace(found, state=NOT_FINITE, remark="the adapter's block")
        layers.append(found)
    return Matching(
        report=BaseReport(adapter.path, checkpoint.path, tuple(layers), tuple(beside)),
        weights={one.name: one.key for one in layers if one.key},
        keys=keys,
        stacks=base.stacks,
    )


class _Base:
    """A checkpoint in which the weights of one adapter are looked up.

    Args:
        checkpoint: the base.
        layers: the adapter's layers.
        also_train: names of its further parameters.

    Raises:
        AdapterFileError: it is unclear which tensors of the checkpoint are the adapter's.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[LayerRecord], also_train: Iterable[str]
    ) -> None:
        self.checkpoint = checkpoint
        # A stack that is stored as one tensor too is that tensor. Its single matrices stay.
        stacks = stacks_of(checkpoint)
        self.stacks = {name: stacks[name] for name in stacks if name not in checkpoint.tensors}
        self.stored: Mapping[str, StoredTensor | Stack] = {**self.stacks, **checkpoint.tensors}
        wanted = [*map(possible_keys, layers), *((key,) for key in also_train)]
        self.rename: Renaming = renaming(checkpoint.path, self.stored, wanted)
        self._hints = HINTS

    def layer(
        self, record: LayerRecord, block: tuple[int, ...], values: Mapping[str, Tensor]
    ) -> Finding:
        """Find the weight of a layer and check it.

        Args:
            record: the layer.
            block: the shape of its block.
            values: tensors that replace some of the checkpoint's.
        """
        renamed = (self.rename(key) for key in possible_keys(record) if key)
        key = next((key for key in renamed if key and key in self.stored), None)
        if key is None:
            return self._missing(record.name, join(record.name, "weight"))
        stored = self.stored[key]
        if stored.dtype not in DTYPES:
            return Finding(record.name, key, MISFIT, _packed(stored))
        problem = record.weight_misfit(block, stored.shape)
        if problem is not None:
            return Finding(record.name, key, MISFIT, problem)
        now = self._fingerprint(record, key, values)
        if now is None or record.base is None:
            return Finding(record.name, key, FITS)
        if same_base(now, record.base):
            return Finding(record.name, key, SAME_BASE)
        remark = "has other values than the weight that the adapter was saved from"
        return Finding(record.name, key, OTHER_BASE, remark)

    def _fingerprint(
        self, record: LayerRecord, key: str, values: Mapping[str, Tensor]
    ) -> str | None:
        if key in values or record.rows:
            weight = values[key] if key in values else self.tensor(key)
            return fingerprint(record.adapted_part(weight))
        stored = self.stored[key]
        if isinstance(stored, Stack):
            return fingerprint_of(stored.shape, partial(stored.values_at, self.checkpoint))
        return _fingerprint(self.checkpoint, key)

    def tensor(self, key: str) -> Tensor:
        """Return a tensor or a stack of the checkpoint.

        Args:
            key: its name.
        """
        stored = self.stored[key]
        if isinstance(stored, Stack):
            return stored.tensor(self.checkpoint)
        return self.checkpoint.tensor(key)

    def parameter(
        self, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
    ) -> Finding:
        """Find a parameter that is saved with the blocks and check it.

        Args:
            name: the parameter.
            shape: its shape in the adapter.
            tensors: the adapter's tensors.
        """
        key = self.rename(name)
        if key is None or key not in self.stored:
            return self._missing(name, name)
        stored = self.stored[key]
        if stored.dtype not in HELD:
            return Finding(name, key, MISFIT, _packed(stored))
        if stored.shape != shape:
            remark = f"is {stored.shape} there and {shape} in the adapter"
            return Finding(name, key, MISFIT, remark)
        if not finite_as(tensors[name], HELD[stored.dtype]):
            return Finding(name, key, NOT_FINITE, f"the adapter's values, as {stored.dtype}")
        return Finding(name, key, FITS)

    def _missing(self, name: str, key: str) -> Finding:
        wanted = self.rename(key) or key
        remark = f"there is no {wanted!r}"
        if self._hints:  # each compares with all names
            self._hints -= 1
            near = ", ".join(nearest(wanted, self.checkpoint.tensors))
            remark += f"; similar names: {near or 'none'}"
        return Finding(name, None, MISSING, remark)


def _fingerprint(checkpoint: Checkpoint, key: str) -> str | None:
    """Return the fingerprint of a tensor in the files."""
    with checkpoint.file_of(key) as file:
        return fingerprint_of(checkpoint.tensors[key].shape, partial(file.values_at, key))


def _packed(stored: StoredTensor | Stack) -> str:
    return (
        f"is stored as {stored.dtype} {stored.shape}: quantised or packed; give the original "
        "checkpoint"
    )


# --- parameters that are stored twice ------------------------------------------------------------


def stored_twice(checkpoint: Checkpoint, changed: Collection[str]) -> list[tuple[str, str]]:
    """Return matrices that merging changes, each with an equal matrix that it does not change.

    Args:
        checkpoint: the base.
        changed: the names of the tensors that merging changes.
    """
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, stored in checkpoint.tensors.items():
        if len(stored.shape) == 2:
            alike[stored.dtype, stored.shape].append(name)
    found: list[tuple[str, str]] = []
    for names in alike.values():
        ours = [name for name in names if name in changed]
        if ours and len(names) <= MOST_COPIES:
            values = {name: _fingerprint(checkpoint, name) for name in names}
            others = [name for name in names if name not in changed]
            found += [(a, b) for a in ours for b in others if values[a] == values[b]]
    return found


# --- for conversions -----------------------------------------------------------------------------


def base_shapes(
    checkpoint: Checkpoint, names: Iterable[str]
) -> Callable[[str], tuple[int, ...] | None]:
    """Return a function from the name of a parameter in the adapter's model to its shape, or None.

    Args:
        checkpoint: the base.
        names: all parameters that will be asked for.

    Raises:
        AdapterFileError: it is unclear which tensors of the checkpoint are meant.

    Examples:
        >>> import tempfile, pathlib
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from disha.interop.checkpoints import base_shapes, open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     save_file({"model.0.weight": torch.zeros(2, 3)}, path)
        ...     shape = base_shapes(open_checkpoint(path), ["0.weight"])
        >>> shape("0.weight"), shape("1.weight")
        ((2, 3), None)
    """
    base = _Base(checkpoint, (), names)

    def shape(name: str) -> tuple[int, ...] | None:
        stored = base.stored.get(base.rename(name) or "")
        return None if stored is None else stored.shape

    return shape


def base_weights(checkpoint: Checkpoint, header: AdapterHeader) -> Callable[[str], Tensor]:
    """Return a function from the name of a layer to its base weight, as the model stores it.

    The function raises `AdapterFileError` if the checkpoint has no weight for the layer, or if the
    weight is quantised or differs from the one that the adapter was saved from.

    Args:
        checkpoint: the base.
        header: the adapter's header.

    Raises:
        AdapterFileError: it is unclear which tensors of the checkpoint are the adapter's.

    Examples:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import base_weights, open_checkpoint
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, path = pathlib.Path(folder, "base.safetensors"), pathlib.Path(folder, "a")
        ...     save_file(model.state_dict(), base)
        ...     disha.save_adapter(disha.inject_adapters(model, "0", r=4), path)
        ...     weight = base_weights(open_checkpoint(base), disha.inspect_adapter(path))
        ...     bool((weight("0") == model[0].weight).all())
        True
    """
    base = _Base(checkpoint, header.layers, ())
    records = {record.name: record for record in header.layers}

    def weight(name: str) -> Tensor:
        record = records[name]
        found = base.layer(record, header.tensors[record.key].shape, {})
        if found.key is None or found.state not in FINE:
            raise AdapterFileError(
                f"{checkpoint.path} has no weight for layer {name!r}: "
                f"{f'{found.key}: ' if found.key else ''}{found.remark}. Give the base that the "
                "adapter was trained on"
            )
        return base.tensor(found.key)

    return weight


def refuse_tied(checkpoint: Checkpoint, source: Path, names: Iterable[str]) -> None:
    """Raise if parameters that PEFT saves beside an adapter may be tied to others in the model.

    PEFT trains a copy of such a parameter and leaves the other unchanged. An adapter file sets the
    parameter that both share.

    Args:
        checkpoint: the base.
        source: the adapter's folder, for errors.
        names: the parameters.

    Raises:
        AdapterFileError: one has the shape of an embedding that may be tied.
    """
    config, names = checkpoint.config(), list(names)
    sizes = vocabulary_sizes(config)
    shape = base_shapes(checkpoint, names)
    shapes = {name: shape(name) or () for name in names}
    tied = [name for name in names if len(shapes[name]) == 2 and shapes[name][0] in sizes]
    if tied and may_tie(config):
        raise AdapterFileError(
            f"{source} can't be converted: {', '.join(tied)} may be tied to another parameter of "
            f"the base, which PEFT does not change, because config.json of {checkpoint.path} does "
            "not set tie_word_embeddings to false. Load the folder into a model where they are "
            "untied (disha.interop), or pass also_train=False"
        )
