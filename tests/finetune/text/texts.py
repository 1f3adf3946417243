"""Texts for property-based tests: what tokenizers are known to trip over, mixed."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = (
    *("the ", " answer", "there", "assistant", "question:", "it's", "WE'LL", "12345", " 678"),
    *(
        " ",
        "   ",
        "\n",
        "\n\n  ",
        "\r\n",
        "\t",
        "e\u0301",
        "é",
        "東京",
        "Київ",
        "😀",
        "👩‍🚀",
        "▁",
        "▁▁",
    ),
    *("<s>", "</s>", "<unk>", "<|im_end|>", "<think>", "<|eot_id|>", "[INST]", "<0x41>", "\ufffd"),
)


def texts() -> st.SearchStrategy[str]:
    """Text of familiar pieces and of any characters."""
    alphabet = st.characters(exclude_categories=["Cs"])
    piece = st.one_of(st.sampled_from(PIECES), st.text(alphabet, max_size=5))
    return st.lists(piece, max_size=8).map("".join)
