import os
from types import SimpleNamespace

import pytest
from torch import nn

from disha.finetune import ranks


@pytest.mark.parametrize(
    ("base", "loads_once"), [(nn.Linear(2, 2), True), (nn.BatchNorm1d(2), False)]
)
def test_one_rank_reads_a_base_of_parameters_alone_for_fsdp(monkeypatch, base, loads_once):
    """accelerate gives the other ranks no buffers."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ranks, "make_on_meta", lambda name: base)
    training = SimpleNamespace(
        fsdp=True, fsdp_config={}, fsdp_plugin_args={}, local_process_index=0, device="cpu"
    )
    ranks.loading_device("base", "fp32", training)
    assert training.fsdp_plugin_args.get("cpu_ram_efficient_loading", False) is loads_once
