"""A colour for each number of a block: a hue for its position in the shard, from light to dark."""

from __future__ import annotations

HUES = (
    ("#bfdbfe", "#2563eb"),  # blue
    ("#fed7aa", "#ea580c"),  # orange
    ("#a7f3d0", "#059669"),  # green
    ("#fbcfe8", "#db2777"),  # pink
    ("#ddd6fe", "#7c3aed"),  # violet
    ("#fef08a", "#ca8a04"),  # yellow
    ("#a5f3fc", "#0891b2"),  # cyan
    ("#fecaca", "#dc2626"),  # red
)
"""The lightest and the darkest of each hue. All stand out on white and on black."""


def colour(hue: int, step: int, steps: int) -> str:
    """Return step number `step` of `steps` in a hue, from light to dark, as #rrggbb."""
    light, dark = (_channels(shade) for shade in HUES[hue])
    pairs = zip(light, dark, strict=True)
    mixed = [(a * (steps - 1 - step) + b * step) // (steps - 1) for a, b in pairs]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(shade: str) -> list[int]:
    return [int(shade[start : start + 2], 16) for start in (1, 3, 5)]
