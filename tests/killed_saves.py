"""Kill saves at random moments while this process reads: `python -m tests.killed_saves 200`."""

import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import disha


def model_of(version):
    """Return a model whose adapter has 4 MiB of one value."""
    model = disha.inject_adapters(nn.Linear(1024, 1024, bias=False), "^$", 512)
    model = disha.inject_adapters(model, "^$", 512, adapter="second")
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.fill_(version)
    return model


def save_forever(path, versions):
    while True:
        for model in versions:
            disha.save_adapter(model, path)


def killed(folder, kills, seed=0):
    """Kill a writer so often, and return how many versions were read; each was whole."""
    rng, path = random.Random(seed), Path(folder, "adapter.safetensors")
    versions = [model_of(1.0), model_of(2.0)]
    disha.save_adapter(versions[0], path)
    fork, seen = multiprocessing.get_context("fork"), set()
    for _ in range(kills):
        writer = fork.Process(target=save_forever, args=(path, versions))
        writer.start()
        end = time.monotonic() + rng.uniform(0.0, 0.1)
        while time.monotonic() < end:
            seen.add(value_in(path))
        writer.kill()
        writer.join()
        seen.add(value_in(path))
    disha.save_adapter(versions[0], path)
    assert [one.name for one in Path(folder).iterdir()] == [path.name], "a draft is left"
    return seen


def value_in(path):
    """Return the value of all elements in the file."""
    [value] = next(iter(safetensors.torch.load_file(path).values())).unique().tolist()
    return value


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        count = int(sys.argv[1])
        print(f"{count} killed saves, whole versions read: {sorted(killed(folder, count))}")
