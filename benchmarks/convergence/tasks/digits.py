"""Vision: a small ViT is trained on upright digits, then adapted to rotated, inverted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.convergence.tasks.task import Rows, Task, batch_order

PRETRAINING_ROWS, PRETRAINING_STEPS = 600, 600
TRAINING_ROWS, VALIDATION_ROWS = 500, 250

Row = tuple[Tensor, Tensor]


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
        return self.o_proj(rearrange(mixed, "b h n d -> b n (h d)"))


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
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


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
        return self.head(self.norm(x).mean(1))


class Digits(Task):
    """Handwritten digits of scikit-learn: rotated and inverted ones, to a model of upright ones."""

    name = "digits"
    title = "Vision: rotated digits"
    r, r_out = 8, 32
    steps, batch, evaluate_every = 150, 32, 5
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    width, depth = 64, 4
    layers: ClassVar[Mapping[str, str]] = {
        "all": r"^blocks\.\d+\.(attention\..*|up|down)$",
        "attention": r"^blocks\.\d+\.attention\.",
        "feed-forward": r"^blocks\.\d+\.(up|down)$",
    }

    def pretrained(self) -> nn.Module:
        """Return a ViT that reads upright digits."""
        upright = self._upright[:PRETRAINING_ROWS]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ViT(self.width, self.depth)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, PRETRAINING_STEPS)
        for rows in batch_order(PRETRAINING_ROWS, self.batch, PRETRAINING_STEPS, seed=0):
            self.loss(model, self.batch_of([upright[row] for row in rows])).backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        return model

    @cached_property
    def _upright(self) -> list[Row]:
        """Return images and labels: those of pretraining, training, validation and test."""
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32) / 16
        labels = torch.tensor(found.target, dtype=torch.int64)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return list(zip(images[order], labels[order], strict=True))

    @cached_property
    def rows(self) -> Rows:
        """Return rotated, inverted digits, all of images that pretraining has not."""
        turned = [(1 - torch.rot90(image), label) for image, label in self._upright]
        first, second, third = accumulate((PRETRAINING_ROWS, TRAINING_ROWS, VALIDATION_ROWS))
        return Rows(turned[first:second], turned[second:third], turned[third:])

    def batch_of(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return images (batch, 8, 8) and labels (batch,)."""
        images, labels = zip(*rows, strict=True)
        return torch.stack(images), torch.stack(labels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the losses of both models on upright digits that are in no training set."""
        upright = self._upright[-len(self.rows.test) :]
        return self.score(base, upright), self.score(model, upright)


def resized_digits(name: str, **settings: int) -> Digits:
    """Return the task with another width, depth or number of steps; only its end is measured."""
    resized = type("ResizedDigits", (Digits,), {"name": name, "evaluate_every": 10**6, **settings})
    return resized()
