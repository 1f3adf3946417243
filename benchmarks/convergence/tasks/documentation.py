"""Language model: the documentation of scientific packages, in a longer training."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.convergence.tasks.language import LanguageTask, Rows, demo_tokenizer

__all__ = ["Documentation"]

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
    about = (
        "SmolLM2-135M learns to write the beginning of a docstring from the full name of a "
        "function or class and its arguments. The docstrings are those of Matplotlib, NumPy, "
        "pandas, SciPy and scikit-learn. Prompt and answer have at most 64 tokens. Frozen "
        "weights are bfloat16, adapters are float32, and products are computed in bfloat16 "
        "(autocast)."
    )
    exact_name = "correct tokens"
    forgetting_name = "loss on text that the base wrote"
    r = 64
    steps, batch, evaluate_every = 600, 4, 50
    precision: ClassVar[torch.dtype] = torch.bfloat16
    whole_answers = False
    scales = (0.0, 0.25, 0.5, 0.75, 1.0)

    def rows(self) -> Rows:
        """Return rows of different docstrings. A training sees each training row once."""
        return _rows()

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the losses of both models on text that the base has written.

        On its own text, no model is expected to have a lower loss than the base. On other text,
        the study's base gets better with any training on documentation.
        """
        return _loss_of_base(self, base), self._loss_on_own_text(model)

    def _loss_on_own_text(self, model: nn.Module) -> float:
        return self._score(model, [(ids, 1) for ids in own_text(self)]).loss


@lru_cache(maxsize=1)
def _loss_of_base(task: Documentation, base: nn.Module) -> float:
    return task._loss_on_own_text(base)


@lru_cache(maxsize=1)
def own_text(task: LanguageTask) -> list[list[int]]:
    """Return the tokens of texts drawn from the base's own probabilities, with a fixed seed."""
    model: Any = task.base()
    generator = torch.Generator().manual_seed(0)
    texts = torch.full((OWN_TEXTS, 1), demo_tokenizer().eos_token_id)
    with torch.inference_mode(), task.products(texts.device):
        for _ in range(LONGEST):
            logits = model(texts, use_cache=False, logits_to_keep=1).logits[:, -1]
            chances = logits.float().softmax(-1).cpu()
            texts = torch.cat((texts, torch.multinomial(chances, 1, generator=generator)), dim=1)
    return texts.tolist()  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _rows() -> Rows:
    rows = []
    for prompt, answer in _distinct():
        if (row := _row(prompt, answer)) is not None:
            rows.append(row)
        if len(rows) == TRAINING_ROWS + VALIDATION_ROWS + TEST_ROWS:
            break
    held_out = VALIDATION_ROWS + TEST_ROWS
    return Rows(rows[held_out:], rows[:VALIDATION_ROWS], rows[VALIDATION_ROWS:held_out])


def _row(prompt: str, answer: str) -> tuple[list[int], int] | None:
    """Return token ids and the number of prompt tokens; None if it does not fit."""
    tokenizer = demo_tokenizer()
    first = tokenizer.encode(prompt)
    if len(first) > LONGEST_PROMPT:
        return None
    whole = [*first, *tokenizer.encode(answer), tokenizer.eos_token_id]
    return (whole[:LONGEST], len(first)) if len(whole) - len(first) >= SHORTEST_ANSWER else None


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
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"The study needs the package {package}; `pip install -e '.[dev]'` has it")
    folder = Path(spec.origin).parent
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
