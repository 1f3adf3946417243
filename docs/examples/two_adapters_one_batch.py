"""Use two adapters in one batch: each sample has its own adapter.

A network reads handwritten digits. One adapter teaches it to read them upside down, another one
mirrored. A second copy of the network loads both files and reads a mixed batch in one forward pass.
Each sample gets the same result as alone.

    python docs/examples/two_adapters_one_batch.py

Needs scikit-learn for its digits (1,797 images of 8 x 8).
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import disha


def train(model, trained, images, labels, steps):
    """Train some parameters, on all images at once."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    tasks = {None: images, "upside-down": images.flip(1), "mirrored": images.flip(2)}
    known, fresh = slice(0, 1400), slice(1400, None)  # training images, and others

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    train(model, model.parameters(), images[known], labels[known], steps)
    elsewhere = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("upside-down", "mirrored"):
            path = Path(folder, f"{name}.safetensors")
            disha.inject_adapters(model, "all-linear", r=32, adapter=name)  # is active now
            blocks = disha.adapter_parameters(model, name)
            train(model, blocks, tasks[name][known], labels[known], steps)
            disha.save_adapter(model, path, adapter=name)
            disha.load_adapter(elsewhere, path, adapter=name)

    names = [list(tasks)[row % 3] for row in range(len(images[fresh]))]  # None: the plain network
    batch = torch.stack([tasks[name][fresh][row] for row, name in enumerate(names)])
    with torch.no_grad():
        with disha.route_adapters(elsewhere, names):
            together = elsewhere(batch)
        alone = torch.empty_like(together)
        for row, name in enumerate(names):
            disha.set_active_adapters(model, [] if name is None else name)
            alone[row] = model(batch[row : row + 1])[0]
    right = (together.argmax(1) == labels[fresh]).float()
    for place, name in enumerate(tasks):
        print(f"{name or 'no adapter'}: {right[place::3].mean():.1%} read right")
    print(f"reloaded: outputs differ by at most {(together - alone).abs().max():g}")


if __name__ == "__main__":
    main()
