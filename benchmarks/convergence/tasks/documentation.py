"""Language model: the documentation of scientific packages, in a longer training."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from benchmarks.convergence.tasks.language import LanguageTask, Row, demo_tokenizer, encoded
from benchmarks.convergence.tasks.task import Rows, held_out
from disha.finetune.forgetting import write_texts

PACKAGES = ("matplotlib", "numpy", "pandas", "scipy", "sklearn")
LONGEST, LONGEST_PROMPT, SHORTEST_ANSWER = 64, 32, 16
"""In tokens. A longer docstring is cut."""
CHARACTERS = 400
"""More than the longest answer needs."""
OWN_TEXTS = 32
TRAINING_ROWS, VALIDATION_ROWS, TEST_ROWS = 2400, 48, 96

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Documentation(LanguageTask):
    """The beginning of the docstring for a name and its arguments."""

    name = "documentation"
    title = "Language model: a longer training"
    r = 64
    steps, batch, evaluate_every = 600, 4, 50
    rates = (2e-5, 1e-4, 3e-4, 1e-3)
    precision: ClassVar[torch.dtype] = torch.bfloat16
    scales = (0.0, 0.25, 0.5, 0.75, 1.0)

    @cached_property
    def rows(self) -> Rows:
        """Return rows of different docstrings. A training sees each training row once."""
        found = (_row(prompt, answer) for prompt, answer in _distinct())
        rows = islice(filter(None, found), TRAINING_ROWS + VALIDATION_ROWS + TEST_ROWS)
        return held_out(list(rows), VALIDATION_ROWS, TEST_ROWS)

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the losses of both models on text that the base has written.

        On its own text, no model is expected to have a lower loss than the base. On other text,
        the study's base gets better with any training on documentation.
        """
        return self._loss_of_base, self.score(model, self._own_text)

    @cached_property
    def _loss_of_base(self) -> float:
        return self.score(self.base(), self._own_text)

    @cached_property
    def _own_text(self) -> list[Row]:
        """Return texts drawn from the base's own probabilities, with a fixed seed."""
        start = demo_tokenizer().eos_token_id
        with self.products():  # a cache would round otherwise, and so draw other texts
            texts = write_texts(self.base(), start, OWN_TEXTS, LONGEST, use_cache=False)
        return [(text, 1) for text in texts]


def _row(prompt: str, answer: str) -> Row | None:
    """Return a row; None if it does not fit."""
    whole, first = encoded(prompt, answer)
    fits = first <= LONGEST_PROMPT and len(whole) - first >= SHORTEST_ANSWER
    return (whole[:LONGEST], first) if fits else None


def _distinct() -> list[tuple[str, str]]:
    """Return prompts and answers, each answer once, in an order that only the texts decide."""
    found = {
        answer.casefold(): (prompt, answer)
        for name in PACKAGES
        for prompt, answer in _documented(name)
    }
    return sorted(
        found.values(), key=lambda pair: hashlib.sha256("\0".join(pair).encode()).digest()
    )


def _documented(package: str) -> Iterator[tuple[str, str]]:
    folder = Path(importlib.util.find_spec(package).origin).parent
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        if {"test", "tests"}.isdisjoint(parts):
            yield from _in_file(path, ".".join(part for part in parts if part != "__init__"))


def _in_file(path: Path, module: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Documented) and (text := ast.get_docstring(node, clean=False)):
            answer = inspect.cleandoc(text)[:CHARACTERS]
            yield f"Document {module}.{node.name}{_arguments(node)}.\n", answer


def _arguments(node: Documented) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [one.arg for one in found if one.arg not in ("self", "cls")]
    return f"({', '.join(names)})"
