"""Forgetting: how much the loss rises on text that the base itself has written.

On such a text no model is expected to have a lower loss than the base, so the rise is what an
adapter has taken from it, whatever the base was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import GenerationConfig

import disha
from disha.errors import AdapterIOError
from disha.files import save

OWN_TEXT, CURVE = "own-text.json", "forgetting.png"
TEXTS, TOKENS, SEED = 32, 64, 0
AT_ONCE = 8
SAME_LOSS = 0.01
"""How much the loss of one base may differ between devices and dtypes, in nats per token."""


@dataclass(frozen=True)
class OwnText:
    """Texts that a base has written, each with its start token, and the base's loss on them."""

    seed: int
    texts: list[list[int]]
    loss: float

    def forgotten(self, model: Any) -> float:
        """Return how much higher the loss of an adapted model is, in nats per token."""
        return loss_on(model, self.texts) - self.loss


def own_text(base: Any, tokenizer: Any, path: Path) -> OwnText:
    """Return the text that a file keeps; if it is of another base or there is none, write it."""
    vocabulary = base.get_input_embeddings().num_embeddings
    if path.exists():
        kept = OwnText(**json.loads(path.read_text()))
        if max(map(max, kept.texts)) < vocabulary:
            loss = loss_on(base, kept.texts)
            if abs(loss - kept.loss) <= SAME_LOSS:
                return replace(kept, loss=loss)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = write_texts(base, start, TEXTS, TOKENS)
    written = OwnText(SEED, texts, loss_on(base, texts))
    with suppress(AdapterIOError):  # it can be written again where nothing can be kept
        save(path, lambda new: new.write_text(json.dumps(asdict(written)) + "\n"))
    return written


def write_texts(model: Any, start: int, count: int, tokens: int, **options: Any) -> list[list[int]]:
    """Return texts drawn from a model's own probabilities, each with the start token first.

    `options` are further ones of `generate`. The process's random numbers go on as if without it.
    """
    begun = torch.full((count, 1), start, device=model.device)
    usual = model.generation_config
    # Settings of the model would leave out unlikely tokens, or stop where a text ends.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, top_k=0, pad_token_id=start
    )
    devices = [] if model.device.type == "cpu" else [model.device]
    try:
        with torch.random.fork_rng(devices, device_type=model.device.type):
            torch.manual_seed(SEED)
            written = model.generate(
                begun, attention_mask=torch.ones_like(begun), max_new_tokens=tokens, **options
            )
    finally:
        model.generation_config = usual
    texts: list[list[int]] = written.tolist()
    return texts


def loss_on(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """Return the mean loss of the tokens after the first of each text, in nats per token."""
    rows = torch.tensor(texts, device=model.device)
    summed = 0.0
    with torch.no_grad():
        for batch in torch.split(rows, AT_ONCE):
            summed += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
    return summed / len(rows)


class Point(NamedTuple):
    """What an adapter does at a scale: 1 as trained, 0 for no effect."""

    scale: float
    forgetting: float
    loss: float


class Scales:
    """Scales an adapted model, in proportion to the scales that its layers were trained with."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = {
            block: block.scale
            for layer in model.modules()
            if isinstance(layer, disha.AdaptedLayer)
            for block in layer.disha.blocks_by_name("default").values()
        }

    def set(self, factor: float) -> None:
        """Multiply the trained scales: with 1, the adapter is as trained."""
        for block, scale in self._trained.items():
            block.scale = factor * scale


def advise(points: Sequence[Point]) -> str:
    """Return a sentence on the largest scale that forgets at most half, or else on the smallest.

    The first point is that of the adapter as trained.
    """
    trained, *others = points
    others.sort()
    halves = [point for point in others if point.forgetting <= trained.forgetting / 2]
    chosen = halves[-1] if halves else others[0]
    return (
        f"scaled to {chosen.scale:g}, its forgetting goes from {trained.forgetting:.3f} to "
        f"{chosen.forgetting:.3f}, and its loss from {trained.loss:.3f} to {chosen.loss:.3f}"
    )


def plot(points: Sequence[Point]) -> Figure:
    """Return the curve of loss against forgetting, with the scale at each point."""
    figure, axes = make_axes("forgetting (nats per token)")
    scales, forgetting, losses = zip(*sorted(points), strict=True)
    axes.plot(forgetting, losses, marker="o")
    for scale, x, y in zip(scales, forgetting, losses, strict=True):
        axes.annotate(f"{scale:g}", (x, y), xytext=(6, 6), textcoords="offset points")
    return figure


def make_axes(across: str) -> tuple[Figure, Any]:
    """Return an empty figure of a loss, and its axes."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=across, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    return figure, axes
