"""Products of rows with matrices of their own, against a row-by-row loop; and what is gathered."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import disha
from disha.functional.row_products import add_row_products
from tests.conftest import close, perturb

NEIGHBOURS = [slice(0, 2), slice(3, 6)]
SCATTERED = [torch.tensor([4, 0]), slice(1, 3)]  # row 3 and row 5 get nothing


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def row_by_row(start, x, rows, matrices, factor):
    result = list(start)
    for part, matrix in zip(rows, matrices, strict=True):
        for row in torch.arange(len(x))[part].tolist():
            result[row] = result[row] + factor * (x[row] @ matrix)
    return torch.stack(result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rows", [NEIGHBOURS, SCATTERED], ids=["neighbours", "scattered"])
class TestAgainstALoop:
    def operands(self, dtype):
        return numbers(6, 5, dtype=dtype), numbers(6, 3, dtype=dtype), [
            numbers(3, 5, dtype=dtype),
            numbers(3, 5, dtype=dtype),
        ]  # fmt: skip

    def test_values_and_gradients(self, rows, dtype):
        start, x, matrices = self.operands(dtype)
        found = add_row_products(start.clone(), x, rows, matrices, 0.5)
        expected = row_by_row(start, x, rows, matrices, 0.5)
        close(found, expected, 1e-12)
        leaves = [start, x, *matrices]
        cotangent = torch.randn_like(found)
        of_loop = torch.autograd.grad(expected, leaves, cotangent)
        close(torch.autograd.grad(found, leaves, cotangent), of_loop, 1e-12)

    def test_second_derivatives(self, rows, dtype):
        start, x, matrices = self.operands(dtype)

        def run(start, x, *matrices):
            return add_row_products(start.clone(), x, rows, matrices, 0.5)

        assert torch.autograd.gradgradcheck(run, (start, x, *matrices))


class Operations(TorchDispatchMode):
    """Records the names of operations, each with the shape of its first argument."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if args and isinstance(args[0], torch.Tensor):
            self.seen.append((name, tuple(args[0].shape)))
        elif name == "cat":
            self.seen.append((name, ()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["bone", "lora"])
def test_rows_of_neighbours_are_neither_gathered_nor_sorted(method):
    layer = nn.Linear(24, 6).double().requires_grad_(False)
    for adapter, r in (("a", 4), ("b", 4), ("c", 4)):
        disha.inject_adapters(layer, "^$", r, adapter=adapter, method=method)
    perturb(layer)
    x = numbers(6, 10, 24)
    with Operations() as operations, disha.route_adapters(layer, list("aabbcc")):
        layer(x).sum().backward()
    gathers = {"index_select", "index_add", "index_add_", "index_copy", "gather", "bmm"}
    assert gathers.isdisjoint(name for name, _ in operations.seen)
    # A block of LoRA is one tensor, of which A and B are parts; nothing else is put together.
    joined = [name for name, _ in operations.seen if name == "cat"]
    assert len(joined) == (3 if method == "lora" else 0)


def test_adapters_of_several_sizes_share_the_shard_sums():
    layer = nn.Linear(24, 6).double()
    for adapter, r in (("a", 8), ("b", 2), ("c", 4), ("d", 3)):
        disha.inject_adapters(layer, "^$", r, adapter=adapter)
    perturb(layer)
    x = numbers(4, 10, 24)
    with Operations() as operations, disha.route_adapters(layer, list("abcd")):
        found = layer(x)
    sums = [shape for name, shape in operations.seen if name == "sum"]
    # 3 does not divide 8; the sums of 4 and 2 are those of the sums of 8 and 4
    assert sorted(sums) == [(40, 2, 2), (40, 2, 4), (40, 3, 8), (40, 8, 3)]
    expected = []
    for name, sample in zip("abcd", x, strict=True):
        disha.set_active_adapters(layer, name)
        expected.append(layer(sample))
    close(found, torch.stack(expected), 1e-12)
    gradients = torch.autograd.grad(found.square().sum(), x)
    close(gradients, torch.autograd.grad(torch.stack(expected).square().sum(), x), 1e-12)
