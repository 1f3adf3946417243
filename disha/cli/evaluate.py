"""``disha evaluate``: measure a model on rows, with and without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from disha.cli.noted import parsed_with_base
from disha.cli.output import show, shown
from disha.finetune.settings import EvaluateSettings
from disha.tables import table
from disha.text import counted

if TYPE_CHECKING:
    from disha.finetune.evaluating import Measured

__all__ = ["run"]

DESCRIPTION = """Measure a model on rows: loss, perplexity, answers that are exactly right.

examples:
  disha evaluate --adapter out/adapter.safetensors --data held_out.jsonl --compare
  disha evaluate --base model.gguf --data test.jsonl --exact_match"""


def run(arguments: Sequence[str]) -> None:
    """Measure, with the given command-line arguments."""
    settings, suiting = parsed_with_base(EvaluateSettings, "evaluate", arguments, DESCRIPTION)
    settings.check()
    from disha.finetune.evaluating import evaluate  # takes seconds to import

    with suiting:
        found = evaluate(settings, shown)
    tally = found.tally
    measured = [("model", found.model)]
    if found.base is not None:
        measured = [("base model", found.base), ("with the adapter", found.model)]
    rows = [
        (
            name,
            f"{one.loss:.4f}",
            f"{one.perplexity:.4g}",
            "-" if one.exact is None else f"{one.exact} of {tally.used}",
        )
        for name, one in measured
    ]
    tokens = counted(found.model.tokens, "token")
    counts = f"{counted(tally.used, 'row')}, {tokens} to predict{tally.remarks}"
    show(
        settings.json,
        "\n".join([table(("", "loss", "perplexity", "exact"), rows), counts]),
        {
            "model": _fields(found.model),
            "base": found.base and _fields(found.base),
            "rows": tally.used,
            "cut": tally.cut,
            "dropped": tally.dropped,
            "bad": tally.bad,
        },
    )


def _fields(found: Measured) -> dict[str, Any]:
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "exact": found.exact,
    }
