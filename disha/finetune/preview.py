"""``--dry_run``: describes a run without training: layers, an example, steps, memory and time."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import disha
from disha.finetune.adapting import plan
from disha.finetune.data.batches import Batch, TokenBatch
from disha.finetune.estimate import estimate, operations_per_second
from disha.finetune.inputs import Inputs
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.loop import planned_steps
from disha.tables import table
from disha.text import counted, first_few, printable

__all__ = ["collapsed", "preview"]

WIDTH = 100
LONGEST_NAME = 50
"""How many characters of a name are shown, the last ones."""

LONGEST_EXAMPLE = 600
"""About how many characters of the example are shown."""

MOST_GROUPS, MOST_REMARKS, MOST_RUNS, MOST_SPANS = 14, 4, 3, 6
"""How many of these are shown: groups of layers, remarks on layers, runs of numbers, spans."""

SAMPLED_BATCHES = 16
"""How many batches are looked at to find out how long rows are."""


def preview(inputs: Inputs, settings: FinetuneSettings, processes: int = 1) -> str:
    """Return a text on what would be adapted and learned, and on the steps, memory and time.

    The text fits a screen of 40 lines of 100 columns.

    Args:
        inputs: the inputs of the run.
        settings: the settings of the run.
        processes: how many processes train together.

    Raises:
        DishaError: the adapter does not fit the model.
    """
    model = inputs.base.load(torch.device("meta"))
    planned = plan(model, settings.adapter)
    training, batches = settings.training, inputs.source.batches_per_epoch()
    accumulated = training.gradient_accumulation_steps * processes
    steps = planned_steps(training, batches, accumulated)
    rows = counted(training.per_device_train_batch_size * accumulated, "row")
    passes = f"{steps * accumulated / batches:.2f} passes over the data"
    remarks = [
        f"{counted(len(inputs.dataset.training), 'row')} to train on; "
        f"{len(inputs.dataset.held_out):,} held out{inputs.tally.remarks}",
        f"{counted(steps, 'step')} of {rows}, {passes}",
        *_costs(model, inputs, settings, steps),
    ]
    return "\n".join([*_layers(planned), *_example(inputs), *itertools.chain(*map(_fit, remarks))])


def _fit(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, max_lines=3, placeholder=" ...", subsequent_indent="  ")


# --- layers --------------------------------------------------------------------------------------


def _layers(planned: disha.Plan) -> Iterator[str]:
    groups: dict[Any, list[Any]] = {}
    for one in planned.layers:
        name = tuple("#" if part.isdigit() else part for part in one.name.split("."))
        groups.setdefault((name, one.r, one.in_features, one.out_features), []).append(one)
    rows = [
        (
            _last(collapsed([one.name for one in group]) or "(the model)"),
            f"{len(group):,}",
            f"{r:,}",
            f"{in_features} -> {out_features}",
            f"{sum(one.parameters for one in group):,}",
        )
        for (_, r, in_features, out_features), group in groups.items()
    ]
    yield table(("layers", "number", "r", "in -> out", "parameters"), rows[:MOST_GROUPS])
    if len(rows) > MOST_GROUPS:
        yield f"and {counted(len(rows) - MOST_GROUPS, 'more group')} of layers"
    remarks = [
        *(f"skipped {one.name} ({one.type_name}): {one.reason}" for one in planned.skipped),
        *(f"not adapted {one.name} {one.shape}: its layout is unknown" for one in planned.unknown),
        *(f"one shared parameter: {', '.join(names)}" for names in planned.tied),
        *(f"also trained: {name}" for name in planned.also_train),
    ]
    if remarks:
        yield first_few([textwrap.shorten(remark, WIDTH) for remark in remarks], MOST_REMARKS)
    yield (
        f"{counted(len(planned.layers), 'layer')}, {counted(planned.added, 'parameter')}; "
        f"trainable {planned.trainable:,} of {planned.total:,} ({planned.percent:.3f}%)"
    )


def _last(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"


def collapsed(names: Sequence[str]) -> str:
    """Return one name for names that differ in numbers only.

    Args:
        names: names of layers.

    Examples:
        >>> from disha.finetune.preview import collapsed
        >>> collapsed(["layers.0.q", "layers.1.q", "layers.2.q", "layers.5.q"])
        'layers.0-2,5.q'
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else _ranges(parts) for parts in columns)


def _ranges(parts: Iterable[str]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(map(int, parts))):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ["-".join(map(str, run)) for run in runs]
    return ",".join(shown if len(runs) <= MOST_RUNS else [*shown[:2], "...", shown[-1]])


# --- an example ----------------------------------------------------------------------------------


def _example(inputs: Inputs) -> Iterator[str]:
    """Show the first row as the model gets it, with what it learns in double brackets."""
    usable = map(inputs.encoder.encode, inputs.dataset.training) if inputs.encoder else iter(())
    example = next(filter(None, usable), None)
    if example is None or inputs.encoder is None:
        return
    tokens = counted(len(example.tokens), "token")
    yield f"the first row, {tokens}; the {example.supervised:,} in [[ ]] are learned:"
    pieces = []
    bounds = [0, *itertools.chain(*example.learned[:MOST_SPANS]), len(example.tokens)]
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        ids = list(example.tokens[first:end])
        text = inputs.encoder.tokenizer.backend.decode(ids, skip_special_tokens=False)
        text = printable(text, LONGEST_EXAMPLE // len(bounds))
        pieces.append(f"[[{text}]]" if number % 2 else text)
    yield textwrap.indent(textwrap.fill("".join(pieces), WIDTH - 2, drop_whitespace=False), "  ")


# --- memory and time -----------------------------------------------------------------------------


def _costs(
    model: nn.Module, inputs: Inputs, settings: FinetuneSettings, steps: int
) -> Iterator[str]:
    batch, part, shape = _batch(inputs, settings)
    found = estimate(model, settings, batch, has_tokenizer=inputs.encoder is not None)
    if isinstance(found, str):
        yield f"memory and time: not known, because the model needs values to run: {found}"
        return
    yield (
        f"memory of each process: about {_gib(found.total)}: base model {_gib(found.base)}, "
        f"adapter {_gib(found.adapter)}, optimizer {_gib(found.optimizer)}, and at most "
        f"{_gib(found.batch)} for a batch of {shape}"
    )
    operations = found.operations * part * settings.training.gradient_accumulation_steps
    if operations:
        speed = operations_per_second(settings)
        yield (
            f"time: about {operations / speed:.2g} s a step, "
            f"{_duration(steps * operations / speed)} in all: {operations / 1e9:,.3g} billion "
            f"operations, at {speed / 1e9:,.0f} billion/s, the speed of a matrix product just now"
        )


def _batch(inputs: Inputs, settings: FinetuneSettings) -> tuple[Batch, float, str]:
    """Return the largest batch, the average size as a part of it, and its shape in words."""
    batches = itertools.islice(inputs.source.batches(1), SAMPLED_BATCHES)
    sampled: list[Any] = [inputs.source.collate(batch) for batch in batches]
    if inputs.encoder is None:
        return sampled[0], 1.0, f"shape {tuple(sampled[0].inputs.shape)}"
    rows, time = settings.training.per_device_train_batch_size, settings.data.max_seq_length
    tokens = torch.zeros(rows, time, dtype=torch.int64)
    places = torch.arange(time).expand(rows, time) if settings.data.packing else None
    mean = statistics.mean(batch.tokens.numel() for batch in sampled)
    full = TokenBatch(tokens, tokens, places, rows * time, rows * time)
    return full, mean / (rows * time), f"{counted(rows, 'row')} of {time} tokens"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
