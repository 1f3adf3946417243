"""Vision: a small ViT is trained on upright digits, then adapted to rotated, inverted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.convergence.tasks.task import Batch, Score, Task, batch_order

__all__ = ["Digits", "ViT"]

PRETRAINING_ROWS, PRETRAINING_STEPS = 600, 600
TRAINING_ROWS, VALIDATION_ROWS = 500, 250


class Attention(nn.Module):
    """Attention of every patch to all patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, patches, width) to the same shape."""
        q, k, v = (
            rearrange(part(x), "b n (h d) -> b h n d", h=self.heads)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(rearrange(mixed, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, patches, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """A vision transformer for images of 8 x 8, in 16 patches of 2 x 2."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, 10) of images (batch, 8, 8)."""
        cut = rearrange(images, "b (h p) (w q) -> b (h w) (p q)", p=2, q=2)
        x = self.blocks(self.patches(cut) + self.positions)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


class Digits(Task):
    """Handwritten digits of scikit-learn."""

    name = "digits"
    title = "Vision: rotated digits"
    about = (
        "The study trains a vision transformer (width 64, 4 blocks) on upright digits of "
        "scikit-learn. Then it adapts the model to other digits, which are rotated by 90 degrees "
        "and inverted."
    )
    exact_name = "correct digits"
    forgetting_name = "loss on upright digits"
    r, r_out = 8, 32
    steps, batch, evaluate_every = 150, 32, 5
    layers: ClassVar[Mapping[str, str]] = {
        "all": r"^blocks\.\d+\.(attention\..*|up|down)$",
        "attention": r"^blocks\.\d+\.attention\.",
        "feed-forward": r"^blocks\.\d+\.(up|down)$",
    }

    def pretrained(self) -> nn.Module:
        """Return a ViT that reads upright digits."""
        upright = _digits()["pretraining"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ViT()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, PRETRAINING_STEPS)
        for rows in batch_order(PRETRAINING_ROWS, self.batch, PRETRAINING_STEPS, seed=0):
            images, labels = upright[0][rows], upright[1][rows]
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        return model

    def training_rows(self) -> Sequence[Any]:
        """Return rotated, inverted digits with their labels."""
        images, labels = _digits()["training"]
        return list(zip(images, labels, strict=True))

    def batch_of(self, rows: Sequence[Any], device: torch.device) -> Batch:
        """Return images (batch, 8, 8) and labels (batch,)."""
        images, labels = zip(*rows, strict=True)
        return torch.stack(images).to(device), torch.stack(labels).to(device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def validation_loss(self, model: nn.Module) -> float:
        """Return the loss on rotated, inverted digits."""
        return self._score(model, "validation").loss

    def test(self, model: nn.Module) -> Score:
        """Return loss and accuracy on rotated, inverted digits."""
        return self._score(model, "test")

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the losses of both models on upright digits that are in no training set."""
        return self._score(base, "upright").loss, self._score(model, "upright").loss

    def _score(self, model: nn.Module, part: str) -> Score:
        device = next(model.parameters()).device
        images, labels = (tensor.to(device) for tensor in _digits()[part])
        with torch.inference_mode():
            logits = model(images)
        right = (logits.argmax(1) == labels).float().mean()
        return Score(float(F.cross_entropy(logits, labels)), float(right))


@lru_cache(maxsize=1)
def _digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Return part -> (images, labels); all but the first are of images that it has not."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    turned = 1 - torch.rot90(images, 1, (1, 2))
    bounds = [PRETRAINING_ROWS, TRAINING_ROWS, VALIDATION_ROWS]
    first, second, third = (sum(bounds[: part + 1]) for part in range(3))
    return {
        "pretraining": (images[:first], labels[:first]),
        "training": (turned[first:second], labels[first:second]),
        "validation": (turned[second:third], labels[second:third]),
        "test": (turned[third:], labels[third:]),
        "upright": (images[third:], labels[third:]),
    }
