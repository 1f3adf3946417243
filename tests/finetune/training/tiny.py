"""What the training tests share: rows of all lengths, sources of them, and a tiny decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import disha
from disha.finetune.data.batches import TextBatches, TokenBatch, collate
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.order import permutation
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.settings import TrainingSettings
from disha.finetune.training.objectives import TextObjective

PLAN = TrainingSettings(
    gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.01, warmup_ratio=0.1
)

CONFIG = DecoderConfig(
    vocabulary=200,
    hidden=32,
    feed_forward=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    context=128,
    rope_base=5000.0,
    norm_epsilon=1e-5,
    tied_head=True,
)


def plan(**changes) -> TrainingSettings:
    return dataclasses.replace(PLAN, **changes)


def examples(count: int = 12) -> list[Example]:
    """Prompts and responses of all lengths."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        tokens = torch.randint(3, 200, (6 + 3 * (index % 5),), generator=generator).tolist()
        made.append(Example(tuple(tokens), ((2 + index % 3, len(tokens)),)))
    return made


def batch_of(examples: Sequence[Example]) -> TokenBatch:
    return collate([[example] for example in examples])


def source(count: int = 12, size: int = 2, seed: int = 0) -> TextBatches:
    return TextBatches(StoredExamples(examples(count)), size, seed)


@dataclass(frozen=True)
class PackedPairs:
    """Two texts a row, in shuffled order: packing at its plainest."""

    examples: Sequence[Example]
    size: int
    seed: int

    def batches(self, epoch: int) -> Iterator[list[list[Example]]]:
        order = permutation(len(self.examples), self.seed + epoch)
        rows = [[self.examples[i] for i in order[j : j + 2]] for j in range(0, len(order), 2)]
        for start in range(0, len(rows), self.size):
            yield rows[start : start + self.size]

    def batches_per_epoch(self) -> int:
        return -(-len(self.examples) // (2 * self.size))

    def weight(self, batch: Sequence[list[Example]]) -> int:
        return sum(example.supervised for row in batch for example in row)

    def collate(self, batch: Sequence[list[Example]]) -> TokenBatch:
        return collate(batch, positions=True)


def decoder(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> Decoder:
    """A decoder without adapters, of other weights for another seed."""
    torch.manual_seed(seed)
    model = Decoder(dataclasses.replace(CONFIG, layers=layers))
    with torch.no_grad():
        model.model.embed_tokens.weight *= 0.3
    return model.to(dtype)


def objective(
    *,
    dropout: float = 0.0,
    method: str = "bone",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    target: str = "_proj$",
) -> TextObjective:
    """A decoder with adapters in float32, whose blocks are not zero."""
    model = disha.inject_adapters(
        decoder(seed, dtype, layers),
        target,
        4,
        method=method,
        dropout=dropout,
        dtype=torch.float32,
    )
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.normal_(std=0.05)
    return TextObjective(model)


def blocks(model: torch.nn.Module) -> list[torch.Tensor]:
    return [block.detach().clone() for block in disha.adapter_parameters(model)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))
