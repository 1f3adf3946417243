"""The effective weight of the part of a weight that a rank holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from disha.effective.weight import EffectiveWeight, make_effective
from disha.errors import ModeError
from disha.functional import Layout, Update
from disha.functional.new_rows import NewRows
from disha.functional.parts import update_of_part
from disha.functional.weight_updates import Updates
from disha.sharding.tensor_parallel import Split


def make_effective_part(
    local: Tensor, split: Split, layout: Layout, updates: Updates
) -> EffectiveWeight:
    """Return the effective weight of this rank's part of a weight with these updates."""

    def cut_blocks(whole: Sequence[Update]) -> Sequence[Update] | None:
        updates_of_part: list[Update] = []
        for update in whole:
            if update.dropout:
                raise ModeError(
                    "the adapter's dropout can't act here: each rank would drop different inputs "
                    "of a tensor-parallel weight; use dropout=0"
                )
            update = update.replace(block=split.with_all_reduced_gradient(update.block))
            cut = update_of_part(update, layout, split.shape, split.part)
            if cut is None:
                return None
            updates_of_part.extend(cut)
        return updates_of_part

    def cut_rows(rows: NewRows) -> NewRows:
        # A rank that has none of the rows takes part in the sum of their gradients too.
        return rows.replace(block=split.with_all_reduced_gradient(rows.block)).of_part(split.part)

    of_rank = updates.map(cut_blocks, cut_rows)
    if of_rank is None:
        raise ModeError(
            f"an adapter can't act: its weight is placed as {split.placements}, and its block "
            "can't be cut in the same way; inject after the weight is placed"
        )
    return make_effective(local, layout.of_part(split.part), of_rank)
