from __future__ import annotations

import pytest
import torch

from disha.finetune.training.precision import computing_in_bf16, computing_in_tf32

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16(enabled, dtype):
    with computing_in_bf16(CPU, enabled):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
