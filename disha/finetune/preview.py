"""What a dry run shows: the layers, an example, and whether the run fits on this machine."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import disha
from disha.finetune.memory import free_memory, run_memory
from disha.finetune.ranks import is_sharded
from disha.text import counted

GIB = 2**30
ROOMY = 0.9
"""The share of a machine's memory that a run may take."""


def show(trainer: Any, bits: str) -> None:
    """Print what a trainer would do, and last whether it fits."""
    summary = disha.summary(trainer.model)
    print("\n".join(fold(summary.layers)))
    row = trainer.train_dataset[0]
    print(f"\none of {counted(len(trainer.train_dataset), 'row')}; [[ ]] marks what is learned:")
    print(mark_learned(row["input_ids"], row["labels"], trainer.processing_class))
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    found = run_memory(trainer, bits)
    print(f"\n{str(summary).splitlines()[-1]}, {counted(steps, 'step')}")
    print("\n".join(judge(found, free_memory(trainer.args.runs_on), trainer.args, bits)))


def fold(layers: Sequence[disha.BlockSpec]) -> Iterator[str]:
    """Give a line for layers that differ in the numbers of their names alone."""
    groups: dict[tuple[Any, ...], list[list[str]]] = {}
    for layer in layers:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", layer.name)
        name = re.sub(r"(?<=\.)\d+(?=\.)", "{}", layer.name)
        sizes = f"{layer.in_features} -> {layer.out_features}"
        facts = (name, sizes, layer.method, layer.r, layer.parameters)
        groups.setdefault(facts, []).append(numbers)
    for (name, sizes, method, r, parameters), found in groups.items():
        spans = [dict.fromkeys(numbers) for numbers in zip(*found)]
        text = name.format(*map(_span, spans))
        yield f"{text}: {len(found)} x {sizes}, {method}, r = {r}, {parameters:,} parameters each"


def _span(numbers: Sequence[str] | dict[str, None]) -> str:
    """Return numbers in order, as `0-29` if none is left out."""
    listed = list(map(int, numbers))
    if listed == list(range(listed[0], listed[-1] + 1)) and len(listed) > 1:
        return f"{listed[0]}-{listed[-1]}"
    return ",".join(map(str, listed))


def mark_learned(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a row, with `[[ ]]` around what is learned."""
    text = ""
    pairs = zip(ids, labels, strict=True)
    for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[[{part}]]" if learned else part
    return text


def judge(found: dict[str, int], free: int, args: Any, bits: str) -> Iterator[str]:
    """Give the lines that say what a run needs, and whether a device has as much.

    On an accelerator, the program itself takes none of its memory.
    """
    parts = {
        "program": found["program"] if args.runs_on.type == "cpu" else 0,
        "base": found["weights"],
        "blocks": found["adapter"],
        "gradients and optimizer": found["gradients"] + found["optimizer"],
        "activations": found["activations"],
    }
    needed = sum(parts.values())
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    rows = counted(args.train_batch_size, "row")
    yield f"it needs {needed / GIB:.2f} GiB with the {rows} that are longest: {told}"
    if is_sharded(args):
        yield "sharding divides base, gradients and optimizer by the number of devices"
    has = f"{args.runs_on.type} has {free / GIB:.2f} GiB"
    if needed <= ROOMY * free:
        yield f"it fits: {has}"
        return
    advice = ["a smaller --per_device_train_batch_size or --max_length"]
    if not args.gradient_checkpointing:
        advice.insert(0, "--gradient_checkpointing")
    if bits != "4":
        advice.append("--bits 4")
    yield f"it does not fit: {has}; try {', '.join(advice)}"
