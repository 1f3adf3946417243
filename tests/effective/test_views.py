"""Views of an effective weight are effective weights, and parts that can't be cut are computed."""

import pytest
import torch

from tests.conftest import (
    freshly_compiled,
    merged_weight,
)
from tests.effective.weights import adapted_weight


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.t(),
        lambda w: w.transpose(0, 1),
        lambda w: w.transpose(-1, -2),
        lambda w: w.swapaxes(axis0=0, axis1=1),
        lambda w: w.swapdims(dim0=0, dim1=1),
        lambda w: torch.t(input=w),
        lambda w: torch.transpose(input=w, dim0=0, dim1=1),
        lambda w: w[1:3],
        lambda w: w.chunk(3)[1],
        lambda w: w.split([1, 2])[1],
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w.to(torch.float64),
        lambda w: w.double(),
        lambda w: w.contiguous(),
    ],
)
def test_views_stay_effective_weights(view):
    layer, weight = adapted_weight()
    dense = merged_weight(layer)
    seen = view(weight)
    assert type(seen) is type(weight)
    torch.testing.assert_close(seen + 0, view(dense))


@pytest.mark.parametrize("view", [lambda w: w.transpose(0, 3), lambda w: w.swapaxes(-3, 1)])
def test_an_axis_that_a_weight_lacks_raises_as_in_torch(view):
    _, weight = adapted_weight()
    with pytest.raises(IndexError, match="Dimension out of range"):
        view(weight)


def test_compiled_code_reads_the_data():
    layer, _ = adapted_weight()
    x = torch.randn(2, 4)
    compiled = freshly_compiled(lambda x: x @ layer.weight.data.T)
    torch.testing.assert_close(compiled(x), x @ merged_weight(layer).T)


@pytest.mark.parametrize(
    "cut",
    [
        lambda w: w.split([1, 3], dim=1),
        lambda w: w.split([3, 1], dim=-1),
        lambda w: torch.split(w, 2, 1),
        lambda w: w.chunk(2, dim=1),
    ],
)
def test_columns_are_computed(cut):
    layer, weight = adapted_weight()
    dense = merged_weight(layer)
    torch.testing.assert_close(cut(weight), cut(dense))
