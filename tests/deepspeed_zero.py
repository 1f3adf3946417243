"""`python -m tests.deepspeed_zero FOLDER`: DeepSpeed ZeRO-1 to ZeRO-3 in one process, on the CPU.

ZeRO-3 partitions parameters in one process too. `tests/test_deepspeed.py` runs this in a process of
its own, because DeepSpeed replaces functions of torch.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1"}

import deepspeed
import pytest
import torch
from torch import nn

import disha


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def config(stage: int) -> dict[str, object]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def engine_of(model: nn.Module, stage: int) -> nn.Module:
    parameters = list(disha.adapter_parameters(model))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=torch.optim.SGD(parameters, lr=0.5),
        config=config(stage),
    )
    return engine


def trains_with(stage: int, folder: Path) -> None:
    plain = disha.inject_adapters(fresh(), "all-linear", 4)
    engine = engine_of(copy.deepcopy(plain), stage)
    optimizer = torch.optim.SGD(disha.adapter_parameters(plain), lr=0.5)
    x, target = torch.randn(8, 16), torch.randint(4, (8,))
    for _ in range(3):
        expected = nn.functional.cross_entropy(plain(x), target)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        loss = nn.functional.cross_entropy(engine(x), target)
        engine.backward(loss)
        engine.step()
        torch.testing.assert_close(loss, expected)
    with pytest.raises(disha.TargetError, match="is wrapped by DeepSpeedEngine"):
        disha.remove_adapters(engine)
    path = folder / "adapter.safetensors"
    disha.save_adapter(engine, path)
    loaded = fresh()
    disha.load_adapter(loaded, path)
    torch.testing.assert_close(loaded(x), plain(x))
    disha.load_adapter(engine, path, replace=True)
    torch.testing.assert_close(engine(x), plain(x))


def refused_inside_zero_init(folder: Path) -> None:
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = fresh()
    with pytest.raises(disha.TargetError, match="partitioned by DeepSpeed ZeRO-3"):
        disha.inject_adapters(model, "all-linear", 4)


def refused_with_zero_3(folder: Path) -> None:
    model = disha.inject_adapters(fresh(), "all-linear", 4, init="kaiming")
    expected = folder / "expected.safetensors"
    disha.save_adapter(model, expected)
    engine = engine_of(model, 3)
    path = folder / "none.safetensors"
    for one in (engine, model):
        with pytest.raises(disha.AdapterStateError, match=r"flattened.*ZeRO-3"):
            disha.save_adapter(one, path)
        with pytest.raises(disha.AdapterStateError, match=r"flattened.*ZeRO-3"):
            disha.load_adapter(one, expected, replace=True)
        with pytest.raises(disha.MergeError, match="sharded parameters"):
            disha.merge_adapters(one)
    assert not path.exists()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        disha.save_adapter(engine, path)
    assert path.read_bytes() == expected.read_bytes()
    with pytest.raises(disha.ModeError, match="DeepSpeed ZeRO-3 partitions its block"):
        engine(torch.randn(8, 16))


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    trains_with(1, Path(sys.argv[1]))
    trains_with(2, Path(sys.argv[1]))
    refused_inside_zero_init(Path(sys.argv[1]))
    refused_with_zero_3(Path(sys.argv[1]))
    print("all of it passed")
