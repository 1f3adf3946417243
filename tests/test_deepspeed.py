"""DeepSpeed: ZeRO-2 trains like one process, and ZeRO-3 is refused by name.

The tests of the real DeepSpeed are left out where it is not installed. The others do to parameters
what ZeRO-3 does to them: it gives them an id and a status, takes their values away, and replaces
the dictionaries that hold them.
"""

from __future__ import annotations

import importlib.util
import socket
from collections import OrderedDict

import pytest
import torch
from torch import nn

import disha
from tests.processes import ended, started

SECONDS = 240
"""DeepSpeed first compiles an extension."""


def partition(parameter):
    parameter.ds_id, parameter.ds_status = 0, "NOT_AVAILABLE"
    parameter.data = torch.empty(0)


def test_a_partitioned_weight_is_refused_at_injection():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    partition(model[0].weight)
    with pytest.raises(disha.TargetError, match=r"DeepSpeed ZeRO-3.*use ZeRO-2 or fully_shard"):
        disha.inject_adapters(model, "0", 2)
    (skipped,) = disha.plan_adapters(model, "all-linear", 2).skipped
    assert skipped.name == "0"
    assert "partitioned by DeepSpeed ZeRO-3" in skipped.reason


def test_a_partitioned_block_does_not_act_and_is_not_saved(tmp_path):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", 2)
    block = model[0].disha["default"]
    block._parameters = OrderedDict(block._parameters)
    for one in (block.block, model[0].base_weight):
        partition(one)
    with pytest.raises(disha.ModeError, match="use ZeRO-2 or fully_shard"):
        model(torch.ones(1, 8))
    with pytest.raises(disha.AdapterStateError, match="GatheredParameters"):
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(disha.MergeError, match="sharded parameters"):
        disha.merge_adapters(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason='DeepSpeed is not installed: pip install -e ".[deepspeed]"',
)
def test_the_real_one(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    done = ended(started(("-m", "tests.deepspeed_zero", str(tmp_path))), SECONDS)
    assert "all of it passed" in done.stdout, done.stdout + done.stderr
