"""Text that is unrelated to any task: Python's language reference, which Python contains."""

from __future__ import annotations

import textwrap
from functools import lru_cache


@lru_cache(maxsize=4)
def passages(count: int, characters: int) -> tuple[str, ...]:
    """Return passages from many topics of Python's language reference."""
    from pydoc_data.topics import topics

    long = [" ".join(topics[name].split()) for name in sorted(topics)]
    long = [text for text in long if len(text) > 3 * characters]
    pieces = [
        textwrap.wrap(text, characters, break_long_words=False)[1 + turn]
        for turn in range(2)
        for text in long
    ]
    return tuple(pieces[:count])
