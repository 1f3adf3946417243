"""Train an adapter of a model that FSDP2 shards over several processes.

Inject first, then call `fully_shard`. To save, all processes call `save_adapter`: they gather the
adapter, and the first one writes it. The file equals that of one process.

    torchrun --nproc-per-node 2 docs/examples/fsdp2.py

It runs on CPUs, with gloo. For GPUs, use "nccl" instead of "gloo" and "cuda" instead of "cpu", and
put model and batch on the process's own device.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import disha


def base_model(width):
    """Return transformer layers with the same random weights on every process."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def main(argv=None):
    """Adapt, train, save, load elsewhere, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args(argv)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))

    model = base_model(options.width)
    disha.inject_adapters(model, "all-linear", r=16)
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)

    sequences = torch.randn(8 * processes, 6, options.width)  # the same on every process
    own = sequences.chunk(processes)[rank]
    optimizer, losses = torch.optim.AdamW(disha.adapter_parameters(model), lr=1e-2), []
    for _ in range(options.steps):
        loss = F.mse_loss(model(own), own.roll(1, dims=1))  # predict the previous position
        optimizer.zero_grad()
        loss.backward()  # gradients are averaged over the processes
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        output = model(sequences)

    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)  # from the first process
        path = Path(shared[0], "sharded.safetensors")
        disha.save_adapter(model, path)  # on all processes
        if rank == 0:
            print(f"loss: {losses[0]:.4f} before, {losses[-1]:.4f} after, {processes} processes")
            elsewhere = base_model(options.width)
            disha.load_adapter(elsewhere, path)
            print(f"adapter file: {path.stat().st_size:,} bytes")
            with torch.no_grad():
                difference = (elsewhere(sequences) - output).abs().max()
            print(f"reloaded: outputs differ by at most {difference:g}")
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads must free their last tensors before Python ends


if __name__ == "__main__":
    main()
