from __future__ import annotations

import platform

import pytest
import torch

from disha.finetune.training.machine import (
    computing_in_tf32,
    emulates_bf16,
)


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_on_meanwhile_and_as_before_afterwards():
    before = switches()
    with computing_in_tf32(True):
        assert switches() == (True, True)
    assert switches() == before
    with computing_in_tf32(False):
        assert switches() == before


def test_tf32_is_as_before_after_an_error():
    before = switches()
    with pytest.raises(KeyError), computing_in_tf32(True):
        raise KeyError
    assert switches() == before


@pytest.mark.parametrize(
    ("device", "machine", "capability", "emulates"),
    [
        ("cpu", "x86_64", "AVX2", True),
        ("cpu", "AMD64", "DEFAULT", True),
        ("cpu", "x86_64", "AVX512", False),
        ("cpu", "aarch64", "DEFAULT", False),
        ("cuda", "x86_64", "AVX2", False),
    ],
)
def test_bf16_is_emulated_on_processors_without_it(
    monkeypatch, device, machine, capability, emulates
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert emulates_bf16(torch.device(device)) is emulates
