"""Adapt a vision transformer of timm, and train its head together with the adapter.

All linear layers in the transformer's blocks get a Bone adapter. The head is new for every task: it
trains completely (`also_train`) and is saved in the same file. The weights are random here, so
nothing is downloaded; with `pretrained=True` the code is the same.

    python docs/examples/vit.py

Needs timm, and scikit-learn for its digits (1,797 images of 8 x 8).
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import disha


def base_model(depth):
    """Return a ViT-Tiny for small grey images, with the same random weights each time."""
    torch.manual_seed(0)
    sizes = {"depth": depth, "img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10}
    pooling = {"global_pool": "avg", "class_token": False}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **pooling)


def main(argv=None):
    """Adapt, train, save, load elsewhere, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--depth", type=int, default=2)
    options = parser.parse_args(argv)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = F.interpolate((images.float().view(-1, 1, 8, 8) - 5) / 6, size=32)

    model = base_model(options.depth)
    disha.inject_adapters(model, r"blocks\.", r=16, also_train=r"^(head|fc_norm)\.")
    found = disha.summary(model)
    print(f"trainable {found.trainable:,} of {found.total:,} parameters ({found.percent:.1f}%)")

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for step in range(options.steps):
        rows = torch.arange(64 * step, 64 * step + 64) % len(images)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.safetensors")
        disha.save_adapter(model, path)
        elsewhere = base_model(options.depth)
        disha.load_adapter(elsewhere, path)
        print(f"adapter file: {path.stat().st_size:,} bytes, head included")
    with torch.no_grad():
        difference = (elsewhere.eval()(images[:64]) - model.eval()(images[:64])).abs().max()
    print(f"reloaded: outputs differ by at most {difference:g}")


if __name__ == "__main__":
    main()
