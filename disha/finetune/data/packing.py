"""Several short examples in one row, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

from disha.finetune.data.examples import Example

__all__ = ["first_fit", "packed"]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into as few boxes as is easy: the longest first, each into the first with room.

    That is never more than 11/9 of the fewest boxes possible, plus one.

    Args:
        lengths: of the things, each at most `capacity`.
        capacity: of a box.

    Returns:
        The numbers of the things in each box.

    Raises:
        ValueError: a thing is longer than a box.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a length of {max(lengths)} does not fit into {capacity}")
    boxes: list[list[int]] = []
    room: list[int] = []
    for thing in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[thing]
        box = next((i for i, left in enumerate(room) if left >= length), len(boxes))
        if box == len(boxes):
            boxes.append([])
            room.append(capacity)
        boxes[box].append(thing)
        room[box] -= length
    return boxes


def packed(examples: Sequence[Example], capacity: int) -> list[tuple[Example, ...]]:
    """Put examples into rows of at most `capacity` tokens to predict from.

    An example needs a place less than it has tokens: nothing is predicted from its last.
    """
    boxes = first_fit([len(example.tokens) - 1 for example in examples], capacity)
    return [tuple(examples[index] for index in box) for box in boxes]
