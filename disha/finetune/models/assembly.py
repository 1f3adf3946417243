"""Base models on disk, and how to build a decoder from their weights.

Building takes hardly more memory than the weights themselves. Each weight is allocated in the
requested dtype on the requested device, and its rows are read straight into it, a slice at a time.
Layers are quantised one by one, so at most one of them is dense at any time.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disha.finetune.errors import CheckpointError
from disha.finetune.hashing import add_tensor
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.models.quantised import WeightBits, is_quantised, quantise_layers, set_weight
from disha.text import first_few

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

__all__ = ["ModelCheckpoint", "Shape", "assemble", "check_fit"]

Shape = tuple[int, ...]

MOST_LAYERS = 1000
"""Real models have up to 130 layers. A layer takes time and memory even without weights."""

SLICE = 1 << 20
"""How many values are read at a time: 4 MiB in float32."""

LISTED = 4
"""How many names an error lists before it only counts the rest."""


class ModelCheckpoint(ABC):
    """A base model on disk. It is open, but its weights are not read yet.

    Attributes:
        path: the folder or file.
        title: the name of the model.
        folder: the folder with the model's and the tokenizer's files; None for a GGUF file.
        fields: the metadata of a GGUF file, which describe the tokenizer too; None for a folder.
    """

    path: Path
    title: str
    folder: Path | None = None
    fields: Mapping[str, Any] | None = None

    @abstractmethod
    def config(self) -> DecoderConfig:
        """Return the model's sizes and constants.

        Raises:
            CheckpointError: one is missing, of the wrong type, or not supported.
        """

    @abstractmethod
    def check_tensors(self, config: DecoderConfig) -> None:
        """Check that the file holds the tensors that its configuration calls for.

        Raises:
            CheckpointError: the tensors don't match it, or are of an unsupported type.
        """

    @abstractmethod
    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) of a weight, in any float dtype, on the CPU.

        Args:
            name: the name of the decoder's parameter.
            first: the first row.
            last: the row after the last one.
        """

    def load_model(
        self,
        dtype: torch.dtype,
        device: torch.device | None = None,
        bits: WeightBits | None = None,
        digest: Hash | None = None,
    ) -> Decoder:
        """Return the model, with its weights read one after another.

        Args:
            dtype: the number format of weights that are not quantised, and of products.
            device: where the weights go; the CPU by default. On the meta device, no weight is read.
            bits: 8 or 4 to quantise the linear layers of the decoder layers.
            digest: a hash to add the model to: its constants, and its weights before they are
                quantised. The place and the format of the file do not change the hash.

        Raises:
            CheckpointError: the weights don't fit the configuration, or can't be read.
            MissingPackageError: `bits` is given, but bitsandbytes is not installed.
        """
        config = self.config()
        self.check_tensors(config)
        return assemble(config, self, dtype, device or torch.device("cpu"), bits, digest)

    def parameter_shapes(self, config: DecoderConfig, stored: int) -> dict[str, Shape]:
        """Return the shape of each parameter of the decoder, without a tied head.

        Args:
            config: the decoder's sizes.
            stored: how many tensors the file holds. A damaged file may claim far more layers than
                it has tensors; such a decoder is refused before it is made.

        Raises:
            CheckpointError: there are fewer tensors than layers, or far more layers than any model
                has.
        """
        if config.layers > stored:
            raise CheckpointError(
                f"{self.path} claims {config.layers} layers, but holds {stored} tensors only; it "
                "is damaged, or was converted wrongly"
            )
        if config.layers > MOST_LAYERS:
            raise CheckpointError(
                f"{self.path} claims {config.layers} layers; at most {MOST_LAYERS} are allowed"
            )
        with torch.device("meta"):
            model = Decoder(config)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def assemble(
    config: DecoderConfig,
    weights: ModelCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    bits: WeightBits | None = None,
    digest: Hash | None = None,
) -> Decoder:
    """Return the decoder of `config` with stored weights. They must fit; see `load_model`."""
    if digest is not None:
        digest.update(repr(_unusual(config)).encode())
    with torch.device("meta"):
        model = Decoder(config)
    if device.type == "meta":
        return model.to(dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if bits is not None:
        quantise_layers(model, bits, dtype, device)
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        quantised = attribute == "weight" and is_quantised(module)
        place = torch.device("cpu") if quantised else device
        values = torch.empty(shape, dtype=dtype, device=place)
        count = max(1, SLICE // max(1, values[0].numel()))
        for first in range(0, len(values), count):
            last = min(first + count, len(values))
            rows = weights.rows(name, first, last)
            values[first:last] = rows
            if digest is not None:
                add_tensor(digest, rows)
        if quantised:
            set_weight(module, values, device)
        else:
            setattr(module, attribute, nn.Parameter(values))
    model.tie_head()
    return model


def _unusual(config: DecoderConfig) -> dict[str, Any]:
    """Return a decoder's sizes and constants that differ from their defaults.

    So a new constant does not change the hashes of older models.
    """
    given = ((one, getattr(config, one.name)) for one in dataclasses.fields(config))
    return {one.name: value for one, value in given if value != one.default}


def check_fit(path: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Check that a file holds the tensors that its own description calls for, and no other tensors.

    Args:
        path: the file or folder; for messages.
        expected: the shape of each tensor that must be there, by its name in the file.
        found: the shape of each tensor that is there.

    Raises:
        CheckpointError: some are missing, not expected or of another shape.
    """
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "not expected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in sorted(expected.items())
            if name in found and found[name] != shape
        ],
    }
    complaints = [
        f"{what}: {first_few(names, LISTED, ', ')}" for what, names in problems.items() if names
    ]
    if complaints:
        raise CheckpointError(
            f"{path} does not hold the tensors that its own configuration calls for; "
            f"{'; '.join(complaints)}. It is damaged, was converted wrongly, or is "
            "of a kind that is not supported"
        )
