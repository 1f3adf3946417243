"""Why a weight can't be adapted, or a parameter can't be trained with an adapter."""

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

import disha
from disha import AdapterFileError, ArgumentError, TargetError
from tests.conftest import needs_complex_files, refused


def test_sparse_weights_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)
    with pytest.raises(TargetError, match="its weight is sparse"):
        disha.inject_adapters(nn.Sequential(layer), "0", 2)


def test_weights_of_sparse_kernels_are_skipped():
    """They are strided by their own account, but no operation of ours works on them."""
    packed = torch.ones(4, 4).half()
    weight = SparseSemiStructuredTensorCUTLASS(packed.shape, packed, *[None] * 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    [skipped] = disha.plan_adapters(model, ".", 2).skipped
    assert (skipped.name, skipped.reason.split(";")[0]) == ("1", "its weight is sparse")
    with pytest.warns(UserWarning, match="1: its weight is sparse"):
        disha.inject_adapters(model, ".", 2)


def test_a_parameter_that_another_adapter_trains(model):
    disha.inject_adapters(model, "head", 2, adapter="a", also_train="norm.weight")
    with refused(model, ArgumentError, r"norm.weight: it is already trained with another"):
        disha.inject_adapters(model, "head", 2, adapter="b", also_train="norm")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128])
def test_a_parameter_that_can_not_train(model, dtype):
    model.odd = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    with pytest.raises(ArgumentError, match=f"odd: it has dtype {dtype}"):
        disha.inject_adapters(model, "head", 2, also_train="odd")


@needs_complex_files
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(torch.complex64, torch.float32), (torch.float32, torch.complex64)],
)
def test_complex_and_real_blocks_do_not_act_on_each_others_weights(saved, loaded, tmp_path):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 3, dtype=saved)), "0", 2)
    disha.save_adapter(model, tmp_path / "adapter")
    other = nn.Sequential(nn.Linear(4, 3, dtype=loaded))
    says = "0: of its block and the weight in the model, one is complex and the other real"
    with refused(other, AdapterFileError, says):
        disha.load_adapter(other, tmp_path / "adapter")
