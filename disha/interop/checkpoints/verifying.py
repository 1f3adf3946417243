"""Whether an adapter file fits a base checkpoint, and is of that base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from disha.files.atomic import PathLike, checked_path
from disha.files.contents import read_contents
from disha.files.header import AdapterFile, LayerRecord
from disha.files.pieces import StoredTensor
from disha.files.tensors import DTYPES
from disha.fingerprint import fingerprint, same_base
from disha.interop.checkpoints.names import Renaming, key_of, nearest, renaming
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint
from disha.model import join
from disha.state import finite_as
from disha.tables import table
from disha.text import printable

__all__ = ["BaseReport", "Finding", "Matching", "matched", "verify_against"]

SAME_BASE = "same base"
FITS = "fits"
OTHER_BASE = "other base"
MISSING = "missing"
MISFIT = "does not fit"
NOT_FINITE = "not finite"

FINE = (SAME_BASE, FITS)

HINTS = 5
"""For how many of what is missing the nearest names are looked up."""


@dataclass(frozen=True)
class Finding:
    """What was found of one layer, or of one parameter that is saved beside the blocks.

    Attributes:
        name: its name in the adapter file.
        key: the tensor of the checkpoint, or None where there is none.
        state: `"same base"`, `"fits"` (there is no fingerprint to compare), `"other base"`,
            `"missing"`, `"does not fit"` or `"not finite"`.
        remark: more about it; empty where all is well.

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
        layers: what was found of each layer.
        also_train: what was found of each parameter that is saved beside the blocks.

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
        """Whether everything is there, fits, and is of this base as far as can be told."""
        return all(one.state in FINE for one in self.layers + self.also_train)

    @property
    def missing(self) -> tuple[Finding, ...]:
        """What the checkpoint lacks."""
        return self._of(MISSING)

    @property
    def misfits(self) -> tuple[Finding, ...]:
        """What is there in another shape, or quantised, or is not finite in the adapter."""
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
            f"{compared}: {fine} of {len(self.layers)} layers fit, "
            f"{known} of them by the fingerprint of their weight too"
        )
        if self.also_train:
            fine = sum(one.state in FINE for one in self.also_train)
            lines[-1] += f"; {fine} of {len(self.also_train)} further parameters fit"
        return "\n".join(lines)


def verify_against(
    base: PathLike, adapter_path: PathLike, *, also_train: bool = True
) -> BaseReport:
    """Return whether an adapter file fits a base checkpoint and was saved from its weights.

    The fingerprint of a weight is made of 64 of its values: nearly nothing of the base is read.

    Args:
        base: one safetensors file, or a folder as Hugging Face libraries write it.
        adapter_path: the adapter file.
        also_train: also look at the parameters saved beside the blocks.

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
    return matched(open_checkpoint(base), *read_contents(path, also_train=also_train)).report


@dataclass(frozen=True)
class Matching:
    """An adapter beside a checkpoint.

    Attributes:
        report: what was found.
        weights: the tensor that has each layer's weight, by the layer's name.
        keys: the tensors that take the values of the parameters saved beside the blocks, by their
            names.
    """

    report: BaseReport
    weights: Mapping[str, str]
    keys: Mapping[str, str]


def matched(
    checkpoint: Checkpoint, adapter: AdapterFile, tensors: Mapping[str, Tensor]
) -> Matching:
    """Find the weights of an adapter's layers in a checkpoint, and check that they fit.

    Args:
        checkpoint: the base.
        adapter: the header of the adapter.
        tensors: its tensors.
    """
    names = renaming(checkpoint.path, adapter.layers, adapter.also_train, checkpoint.tensors)
    compared = _Comparison(checkpoint, names)
    beside = [compared.parameter(name, tensors[name]) for name in adapter.also_train]
    layers = [compared.layer(record, tensors[record.key]) for record in adapter.layers]
    return Matching(
        report=BaseReport(adapter.path, checkpoint.path, tuple(layers), tuple(beside)),
        weights=compared.weights,
        keys=compared.keys,
    )


class _Comparison:
    """A checkpoint, and what of an adapter has been found in it so far.

    Args:
        checkpoint: the base.
        names: how the adapter's names become the checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint, names: Renaming) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.weights: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self._values: dict[str, Tensor] = {}
        self._hints = HINTS

    def parameter(self, name: str, value: Tensor) -> Finding:
        """Check a parameter that is saved beside the blocks."""
        key = self.names(name)
        if key is None or key not in self.checkpoint.tensors:
            return self._missing(name, name)
        stored = self.checkpoint.tensors[key]
        if stored.dtype not in DTYPES:
            return Finding(name, key, MISFIT, _packed(stored))
        if stored.shape != tuple(value.shape):
            remark = f"is {stored.shape} there and {tuple(value.shape)} in the adapter"
            return Finding(name, key, MISFIT, remark)
        if not finite_as(value, DTYPES[stored.dtype]):
            return Finding(name, key, NOT_FINITE, f"the adapter's values, as {stored.dtype}")
        self.keys[name], self._values[key] = key, value
        return Finding(name, key, FITS)

    def layer(self, record: LayerRecord, block: Tensor) -> Finding:
        """Check a layer; parameters come before, as it may be one of them that it adapts."""
        key = key_of(record, self.checkpoint.tensors, self.names)
        if key is None:
            return self._missing(record.name, join(record.name, "weight"))
        self.weights[record.name] = key
        stored = self.checkpoint.tensors[key]
        if stored.dtype not in DTYPES:
            return Finding(record.name, key, MISFIT, _packed(stored))
        problem = record.weight_misfit(tuple(block.shape), stored.shape)
        if problem is not None:
            return Finding(record.name, key, MISFIT, problem)
        if not finite_as(block, block.dtype):
            return Finding(record.name, key, NOT_FINITE, "the adapter's block")
        return self._by_fingerprint(record, key)

    def _by_fingerprint(self, record: LayerRecord, key: str) -> Finding:
        value = self._values.get(key)
        weight = self.checkpoint.tensor(key) if value is None else value
        now = fingerprint(record.adapted_part(weight))
        if now is None or record.base is None:
            return Finding(record.name, key, FITS)
        if not same_base(now, record.base):
            return Finding(record.name, key, OTHER_BASE, "its values are others")
        return Finding(record.name, key, SAME_BASE)

    def _missing(self, name: str, key: str) -> Finding:
        wanted = self.names(key) or key
        remark = f"there is no {wanted!r}"
        if self._hints:  # each takes a walk through all names
            self._hints -= 1
            near = ", ".join(nearest(wanted, self.checkpoint.tensors))
            remark += f"; near it: {near or 'nothing'}"
        return Finding(name, None, MISSING, remark)


def _packed(stored: StoredTensor) -> str:
    return (
        f"is stored as {stored.dtype} {stored.shape}: quantised or packed; take the checkpoint "
        "that it was made from"
    )
