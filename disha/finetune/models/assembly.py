"""Putting a decoder together from stored weights, with hardly more memory than it takes itself.

Every weight is read in slices of rows straight into its place, in the dtype and on the device that
were asked for; what a slice was read from is let go before the next. Layers that are quantised are
quantised one by one, so that no more than one is there as a dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from disha.finetune.errors import CheckpointError
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.models.quantised import WeightBits, is_quantised, quantise_layers, set_weight

__all__ = ["Shape", "StoredWeights", "assemble", "check_fit", "parameter_shapes"]

Shape = tuple[int, ...]

SLICE = 1 << 20
"""Values that are read at once: 4 MiB of them in float32."""

LISTED = 4


class StoredWeights(Protocol):
    """Weights on disk, under the names of our parameters."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, exclusive, of a weight, in any floating dtype on the CPU."""


def assemble(
    config: DecoderConfig,
    weights: StoredWeights,
    dtype: torch.dtype,
    device: torch.device | None = None,
    bits: WeightBits | None = None,
) -> Decoder:
    """The decoder of `config` with the stored weights.

    Args:
        config: sizes and constants.
        weights: where the values are; they fit the configuration.
        dtype: of all weights; where they are quantised, of what they are quantised from and of
            what is computed.
        device: where they go; the CPU if not given.
        bits: 8 or 4 to quantise the linear layers of the decoder layers.

    Raises:
        CheckpointError: a weight can't be read, or quantised where it is going to be.
        MissingDependencyError: bits are given, and bitsandbytes is not installed.
    """
    device = device or torch.device("cpu")
    with torch.device("meta"):
        model = Decoder(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if bits is not None:
        quantise_layers(model, bits, dtype, device)
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute == "weight" and is_quantised(module):
            set_weight(module, _whole(weights, name, shape, dtype, torch.device("cpu")), device)
        else:
            values = _whole(weights, name, shape, dtype, device)
            setattr(module, attribute, nn.Parameter(values))
    model.tie_head()
    return model


def parameter_shapes(path: Path, config: DecoderConfig, stored: int) -> dict[str, Shape]:
    """The shape of each parameter of a decoder, a tied head left out.

    Args:
        path: the file or folder that describes it; for messages.
        config: the decoder's sizes.
        stored: how many tensors there are, so that no more layers are made than can be filled.

    Raises:
        CheckpointError: there are fewer tensors than layers.
    """
    if config.layers > stored:
        raise CheckpointError(
            f"{path} is said to have {config.layers} layers, but holds {stored} tensors only; it "
            "is damaged, or was converted wrongly"
        )
    with torch.device("meta"):
        model = Decoder(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_fit(
    path: Path,
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    is_harmless: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that a file holds the tensors that its own description calls for, and no others.

    Args:
        path: the file or folder; for messages.
        expected: the shape of each tensor that must be there, by its name in the file.
        found: the shape of each tensor that is there.
        is_harmless: whether a tensor that is not expected may be there, by its name.

    Raises:
        CheckpointError: some are missing, not expected or of another shape; names all kinds.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(name for name in found.keys() - expected.keys() if not is_harmless(name))
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    found_wrong = {
        "missing": missing,
        "not expected": unexpected,
        "of another shape": misshapen,
    }
    complaints = [f"{how}: {_listed(names)}" for how, names in found_wrong.items() if names]
    if complaints:
        raise CheckpointError(
            f"{path} does not hold the tensors that its own configuration calls for; "
            f"{'; '.join(complaints)}. It is damaged, was converted wrongly, or is "
            "of a kind that is not supported"
        )


def _whole(
    weights: StoredWeights,
    name: str,
    shape: Iterable[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    values = torch.empty(tuple(shape), dtype=dtype, device=device)
    count = max(1, SLICE // max(1, values[0].numel()))
    for first in range(0, len(values), count):
        last = min(first + count, len(values))
        values[first:last] = weights.rows(name, first, last)
    return values


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
