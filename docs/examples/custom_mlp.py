"""Adapt your own network, whose code knows nothing of adapters.

A small network reads handwritten digits. An adapter teaches it to read them upside down too, while
its weights stay frozen. Another copy of the network loads the adapter from a file.

    python docs/examples/custom_mlp.py

Needs scikit-learn for its digits (1,797 images of 8 x 8).
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import disha


class Reader(nn.Module):
    """Three linear layers: 64 grey values in, logits for ten digits out."""

    def __init__(self, width=128):
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        """Return logits (n, 10) of images (n, 8, 8)."""
        return self.head(F.relu(self.second(F.relu(self.first(images.flatten(1))))))


def train(model, images, labels, steps):
    """Train all parameters that require gradients, on all images at once."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")


def main(argv=None):
    """Adapt, train, save, load elsewhere, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    turned, known, fresh = images.flip(1), slice(0, 1400), slice(1400, None)

    def right(images):
        return f"{(model(images[fresh]).argmax(1) == labels[fresh]).float().mean():.1%} read right"

    model = Reader()
    train(model, images[known], labels[known], steps)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    print("upside down, before:", right(turned))

    disha.inject_adapters(model, "all-linear", r=32)
    train(model, turned[known], labels[known], steps)
    print("upside down, after:", right(turned))
    with disha.adapters_disabled(model):
        print("upright, adapter off:", right(images))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "upside-down.safetensors")
        disha.save_adapter(model, path)
        elsewhere = Reader()
        elsewhere.load_state_dict(base)
        disha.load_adapter(elsewhere, path)
        print(f"adapter file: {path.stat().st_size:,} bytes")
    difference = (elsewhere(turned) - model(turned)).abs().max()
    print(f"reloaded: outputs differ by at most {difference:g}")


if __name__ == "__main__":
    main()
