"""The updates of a part of a weight compute that part of the whole."""

import pytest
import torch

from disha import functional
from disha.functional import Geometry, Layout, Update, method_of
from disha.functional.parts import update_of_part, updates_of_outputs
from tests.conftest import close
from tests.functional.cases import BLOCKS, CUTS_AT
from tests.functional.updates import MATRIX, look_up


@pytest.mark.parametrize("rows", [(), ((0, 4),), ((2, 4), (6, 8)), ((1, 3), (4, 8))], ids=str)
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 8), (0, 4), (2, 4), (3, 4), (4, 6), (5, 8), (3, 7)]
)
def test_the_updates_of_a_slice_of_outputs(rows, start, stop):
    for name in BLOCKS:
        check_slice(name, rows, start, stop)


def check_slice(name, rows, start, stop):
    (method, r, r_out), layout = BLOCKS[name], Layout("out in")
    weight = torch.randn(8, 7, dtype=torch.float64)
    shape = method_of(method).block_shape(layout, weight.shape, r, r_out, rows)
    update = Update(method_of(method), torch.randn(shape, dtype=torch.float64), output_ranges=rows)
    found = updates_of_outputs([update], start, stop, Geometry(7, 8))
    if found is None:
        assert CUTS_AT[method](r) > 1  # of methods with groups, R can be cut anywhere
        return
    assert bool(found) == any(first < stop and start < last for first, last in rows or [(0, 8)])
    whole = functional.computed_weight(weight, layout, [update])
    part = functional.computed_weight(weight[start:stop], layout, found)
    torch.testing.assert_close(part, whole[start:stop], rtol=1e-12, atol=1e-12)
    if update.output_ranges == ((start, stop),):
        assert found[0].output_ranges == ()


@pytest.mark.parametrize("part", [((0, 3), (0, 4), (0, 7)), ((1, 3), (4, 8), (2, 4)), None])
@pytest.mark.parametrize("pattern", ["out in", "in out", "index out", "expert in out"])
def test_the_updates_of_a_part_of_a_weight(pattern, part):
    """None stands for a part whose edges are multiples of r, where every method can be cut."""
    for name in BLOCKS:
        check_part(name, pattern, part)


def check_part(name, pattern, part):
    method, r, r_out = BLOCKS[name]
    layout = Layout(pattern, padding_idx=3 if pattern == "index out" else None)
    shape = (3, 8, 8)[3 - len(layout.axes) :]
    part = ((1, 2), (0, r), (r, 8)) if part is None else part
    part = tuple(
        (start, min(stop, size))
        for (start, stop), size in zip(part[-len(shape) :], shape, strict=True)
    )
    weight = torch.randn(shape, dtype=torch.float64)
    block = torch.randn(method_of(method).block_shape(layout, shape, r, r_out), dtype=weight.dtype)
    update = Update(method_of(method), block)
    found = update_of_part(update, layout, shape, part)
    if found is None:
        assert CUTS_AT[method](r) > 1
        assert part[-1] != (r, 8)
        return
    own = tuple(slice(*ends) for ends in part)
    whole = functional.computed_weight(weight, layout, [update])
    cut = functional.computed_weight(weight[own], layout.of_part(part), found)
    torch.testing.assert_close(cut, whole[own], rtol=1e-12, atol=1e-12)


def test_a_kernel_is_not_cut():
    update, layout = Update(method_of("bone"), torch.zeros(4, 2, 3)), Layout("out in *kernel")
    whole = ((0, 4), (0, 6), (0, 3))
    assert update_of_part(update, layout, (4, 6, 3), whole) == [update]
    for part in (((0, 2), *whole[1:]), (*whole[:2], (0, 1))):
        assert update_of_part(update, layout, (4, 6, 3), part) is None
    with pytest.raises(ValueError, match=r"zip\(\)"):
        update_of_part(update, Layout("out in"), (4, 6, 3), whole)


@pytest.mark.parametrize(
    ("method", "shape", "rows"),
    [("bone", (2, 3), (0, 3)), ("bat", (2, 2, 2), (0, 3))],
)
def test_a_part_without_the_adapted_rows_takes_part_in_backward(method, shape, rows):
    """Else the ranks that have these rows would wait for its gradient."""
    block = torch.randn(shape).requires_grad_()
    update = Update(method_of(method), block, output_ranges=(rows,))
    part, x, indices = torch.randn(4, 4), torch.randn(3, 4), torch.tensor([0, 3])
    updates = update_of_part(update, MATRIX, (8, 4), ((4, 8), (0, 4)))
    for found, expected in (
        (functional.adapted_linear(x, part, None, updates), x @ part.mT),
        (functional.adapted_product(look_up, indices, part, None, MATRIX, updates), part[indices]),
    ):
        close(found, expected, 1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), block)
        assert not gradient.any()
