"""The functions of BAT alone: its update in wide dtypes, and its product in several slabs."""

import pytest
import torch

from disha.functional import bat
from tests import reference
from tests.functional.matrices import close_to_exact, delta_weight
from tests.functional.test_linear import case_of, check


@pytest.mark.parametrize(
    ("weight_dtype", "block_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_bat_delta_weight_is_never_rounded_to_16_bits(weight_dtype, block_dtype, expected):
    weight, block = torch.randn(4, 4).to(weight_dtype), torch.randn(2, 2, 2).to(block_dtype)
    delta = delta_weight("bat", weight, block)
    assert delta.dtype == expected
    close_to_exact(delta, reference.bat_delta_weight(weight.double(), block.double()), 1e-5)


@pytest.mark.parametrize("blocks_each", [1, 2])
@pytest.mark.parametrize("sizes", [(10, 9, 4, 1), (8, 10, 2, 1), (5, 6, 1, 1)], ids=str)
def test_a_bat_layer_of_several_slabs(monkeypatch, sizes, blocks_each):
    in_features, out_features, r, _ = sizes
    monkeypatch.setattr(bat, "SLAB_BYTES", blocks_each * r * in_features * 8)
    case = case_of("bat", sizes, lead=(9,))
    slabs = list(bat._cut_into_slabs(case[1], case[3]))
    assert len(slabs) == -(-case[3].shape[0] // blocks_each) > 1
    assert [row for _, rows in slabs for row in range(out_features)[rows]] == [*range(out_features)]
    for bias in (case[2], None):
        check("bat", (*case[:2], bias, case[3]), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bat_layer_of_several_slabs_in_sixteen_bits(monkeypatch, dtype):
    x, weight, bias, block = case_of("bat", (10, 9, 4, 1), dtype, lead=(9,))
    whole = bat.bat_linear(x, weight, bias, block)
    monkeypatch.setattr(bat, "SLAB_BYTES", 1)
    several = bat.bat_linear(x, weight, bias, block)
    limit = 4 * torch.finfo(dtype).eps
    assert (several.double() - whole.double()).norm() <= limit * whole.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_block_acts_beside_a_large_weight_of_sixteen_bits(dtype):
    weight, block = torch.zeros(4, 4, dtype=dtype), torch.zeros(1, 4, 4, dtype=dtype)
    weight[1, 0] = weight[1, 2] = 16.0
    block[0, 1, 0] = 2.0**-8  # 16 and this is 16 in either
    x = torch.tensor([[1.0, 0.0, -1.0, 0.0]] * 5, dtype=dtype)
    output = bat.bat_linear(x, weight, None, block)
    assert torch.equal(output, torch.tensor([[0.0, 2.0**-8, 0.0, 0.0]] * 5, dtype=dtype))
