"""Random inputs, matrices and blocks of them, for comparing with the loops of reference.py."""

import torch
from hypothesis import strategies as st

from disha.functional import Layout, method_of
from tests import reference
from tests.conftest import seed_torch

MATRIX = Layout("out in")

# in, out, r, r_out: r divides both; neither; the columns only; the rows only; r above out; r = 1;
# r = in; one row
SIZES = (
    (8, 12, 4, 3),
    (10, 9, 4, 3),
    (8, 10, 4, 5),
    (10, 8, 4, 2),
    (7, 2, 5, 1),
    (5, 6, 1, 2),
    (6, 4, 6, 4),
    (5, 1, 2, 1),
)


def close_to_exact(actual, expected, tolerance=1e-10):
    """Compare with exact values, in the dtype of what was computed."""
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def make_block(method, sizes, dtype=torch.float64):
    _, out_features, r, r_out = sizes
    shape = {
        "bone": (r, out_features),
        "bone_groups2": (r, out_features),
        "bone_groups_all": (r, out_features),
        "tile": (r, r_out),
        "lora": (r, sizes[0] + out_features),
        "bat": ((out_features + r - 1) // r, r, r),
    }[method]
    return torch.randn(shape, dtype=dtype)


def make_case(method, sizes, dtype=torch.float64, lead=(3,), seed=0):
    """Return x, W, b and a block, all different and all requiring gradients."""
    seed_torch(seed)
    in_features, out_features, *_ = sizes
    tensors = (
        torch.randn(*lead, in_features, dtype=dtype),
        torch.randn(out_features, in_features, dtype=dtype),
        torch.randn(out_features, dtype=dtype),
        make_block(method, sizes, dtype),
    )
    return [tensor.requires_grad_() for tensor in tensors]


@st.composite
def random_sizes(draw):
    in_features = draw(st.integers(1, 11))
    r = draw(st.integers(1, in_features))
    r_out = draw(st.integers(1, 4))
    return in_features, r_out * draw(st.integers(1, 3)), r, r_out


def strided_copy(tensor):
    """The same values with gaps between them in memory."""
    spaced = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    spaced[..., ::2] = tensor.detach()
    return spaced[..., ::2].requires_grad_()


def delta_weight(method, weight, block):
    return method_of(reference.method_of_kind(method)).delta_weight(MATRIX, block, weight)
