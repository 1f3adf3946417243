"""Kill saves and merges at random moments, and read what stands.

`python -m tests.killed_saves 200` kills so many of each. The reader of saves reads while they run;
the folder of a merge is read after each kill.
"""

import json
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
from disha.interop.checkpoints import merge_into_checkpoint


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
    return seen


def merge_forever(base, adapters, out):
    while True:
        for adapter in adapters:
            merge_into_checkpoint(base, adapter, out, overwrite=True, force=True)


def killed_merges(folder, kills, seed=0):
    """Kill a merger so often, and return how many merged checkpoints were read; each was whole."""
    rng, base, out = random.Random(seed), Path(folder, "base"), Path(folder, "merged")
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(3)))
    base.mkdir()
    names = {}
    for name, weight in model.state_dict().items():
        weight.zero_()
        names[name] = f"{name}.safetensors"
        safetensors.torch.save_file({name: weight}, base / names[name])
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    adapters = [Path(folder, f"{version}.adapter") for version in (1, 2)]
    disha.inject_adapters(model, "all-linear", 4)
    for version, adapter in enumerate(adapters, start=1):
        for block in disha.adapter_parameters(model):
            block.data.fill_(float(version))
        disha.save_adapter(model, adapter)
    fork, seen, absent = multiprocessing.get_context("fork"), set(), 0
    for _ in range(kills):
        merger = fork.Process(target=merge_forever, args=(base, adapters, out))
        merger.start()
        time.sleep(rng.uniform(0.0, 0.3))
        merger.kill()
        merger.join()
        if out.exists():
            [value] = {value_in(path) for path in out.glob("*.safetensors")}
            seen.add(value)
            assert len(list(out.iterdir())) == len(list(base.iterdir()))
        else:
            absent += 1
    return seen, absent


def value_in(path):
    """Return the value of all elements in the file."""
    [value] = next(iter(safetensors.torch.load_file(path).values())).unique().tolist()
    return value


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        count = int(sys.argv[1])
        print(f"{count} killed saves, whole versions read: {sorted(killed(folder, count))}")
    with tempfile.TemporaryDirectory() as folder:
        seen, absent = killed_merges(folder, count)
        print(f"{count} killed merges, whole versions: {sorted(seen)}; {absent} times none yet")
