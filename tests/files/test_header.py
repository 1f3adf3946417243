"""What the header of a file says, against the blocks of the file."""

import pytest
import torch

from disha.config import AdapterConfig
from disha.files import AdapterContents, BlockSpec
from disha.files.header import reasons_against_blocks
from disha.functional import Layout


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        (Layout("out in"), (2, 7), "(2, 6)"),
        (Layout("out in *kernel"), (6, 3, 3), "(6, 2, 3)"),
        (Layout("in out *kernel", groups=2), (5, 6, 3), "(4, 6, 3)"),
        (Layout("in out *kernel", groups=2), (2, 6, 3), "(4, 6, 3)"),
        (Layout("expert in out"), (4, 2, 7), "(4, 2, 6)"),
        (Layout("out in"), (), None),
        (Layout("out in"), (1, 2, 6), None),
        (Layout("out in *kernel"), (), None),
        (Layout("out in *kernel"), (6, 2), None),
        (Layout("in out *kernel"), (), None),
        (Layout("expert in out"), (2, 6), None),
    ],
)
def test_which_shape_a_block_must_have(layout, shape, expected):
    record = BlockSpec.of_block(
        "", shape, method="bone", r=2, in_features=8, out_features=6, layout=layout
    )
    contents = AdapterContents(
        config=AdapterConfig(r=2, target=None),
        layers=(record,),
        also_train=(),
        tensors={record.key: torch.empty(shape, device="meta")},
        metadata={},
    )
    says = f"expected a block of shape {expected}, found {shape}"
    if expected is None:
        says = f"a block of shape {shape} does not fit the layout {layout.pattern!r}"
    assert reasons_against_blocks(contents) == [f"(the model): {says}"]
