"""Rows to examples: a template around the query, then the response and an end token.

Only the response and that end token are learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from disha.finetune.data.examples import Example
from disha.finetune.data.rows import Pair
from disha.finetune.text.tokenizer import Tokenizer

__all__ = ["Encoded", "Template", "encode_pairs", "encode_prompt", "template_for"]


@dataclass(frozen=True)
class Template:
    """What surrounds a query: `before` + query + `after`, then the response."""

    before: str
    after: str


CHAT = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
PLAIN = Template("### Instruction:\n", "\n\n### Response:\n")


@dataclass(frozen=True)
class Encoded:
    """Rows as token ids.

    Args:
        examples: the rows that can be used, in their order.
        cut: how many of them had the end of their query cut off to fit.
        dropped: how many rows were left out, as even without a query they don't fit.
    """

    examples: tuple[Example, ...]
    cut: int
    dropped: int


def template_for(tokenizer: Tokenizer) -> Template:
    """The chat template if the model knows its special tokens, else a plain one."""
    knows_chat = tokenizer.knows("<|im_start|>") and tokenizer.knows("<|im_end|>")
    return CHAT if knows_chat else PLAIN


def encode_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Turn rows into token ids of at most `max_length` each.

    A response is never cut: a row too long loses the end of its query, and a row whose response
    leaves no room for a query is left out and counted.
    """
    examples: list[Example] = []
    cut = dropped = 0
    for pair in pairs:
        response = [*tokenizer.encode(pair.response, special=False), tokenizer.end]
        before, query, after = _prompt_parts(pair.query, tokenizer)
        room = max_length - len(before) - len(after) - len(response)
        if room < min(1, len(query)):
            dropped += 1
            continue
        cut += len(query) > room
        prompt = [*before, *query[:room], *after]
        tokens = (*prompt, *response)
        examples.append(Example(tokens, ((len(prompt), len(tokens)),)))
    return Encoded(tuple(examples), cut, dropped)


def encode_prompt(query: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a query in the template, ready for a response."""
    before, tokens, after = _prompt_parts(query, tokenizer)
    return [*before, *tokens, *after]


def _prompt_parts(query: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    template = template_for(tokenizer)
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    return (
        begin + tokenizer.encode(template.before),
        tokenizer.encode(query, special=False),
        tokenizer.encode(template.after),
    )
