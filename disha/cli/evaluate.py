"""``disha evaluate``: measure a model on rows, with and without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from disha.cli.noted import parsed_with_base
from disha.cli.output import show, with_progress
from disha.finetune.settings import EvaluateSettings
from disha.tables import table
from disha.text import counted

if TYPE_CHECKING:
    from disha.finetune.evaluating import Measured
    from disha.finetune.scales import AtScale

__all__ = ["run"]

DESCRIPTION = """Measure a model on rows: loss, perplexity, answers that are exactly right.

examples:
  disha evaluate --adapter out/adapter.safetensors --data held_out.jsonl --compare
  disha evaluate --base model.gguf --data test.jsonl --exact_match
  disha evaluate --adapter out/adapter.safetensors --data held_out.jsonl \\
      --scales 0,0.25,0.5,0.75,1 --retain other.jsonl --plot scales.png"""


def run(arguments: Sequence[str]) -> None:
    """Measure, with the given command-line arguments."""
    settings, suiting = parsed_with_base(EvaluateSettings, "evaluate", arguments, DESCRIPTION)
    settings.check()
    from disha.finetune.evaluating import evaluate  # takes seconds to import
    from disha.finetune.scales import best_scale
    from disha.finetune.training.machine import FEWER_BITS, explaining_lack_of_memory

    remedy = f"lower --per_device_eval_batch_size or --max_seq_length, or {FEWER_BITS}"
    with suiting, explaining_lack_of_memory(remedy):
        found = evaluate(settings, with_progress)
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
    best = best_scale(found.scales) if found.scales else None
    parts = [
        table(("", "loss", "perplexity", "exact"), rows),
        *_by_scale(found.scales, best),
        counts,
    ]
    show(
        settings.json,
        "\n".join(parts),
        {
            "model": _fields(found.model),
            "base": found.base and _fields(found.base),
            "scales": [asdict(one) for one in found.scales],
            "best_scale": best and best.scale,
            "rows": tally.used,
            "cut": tally.cut,
            "dropped": tally.dropped,
            "bad": tally.bad,
        },
    )
    if settings.plot is not None:
        from disha.finetune.report import plot_scales, write_figure

        write_figure(settings.plot, plot_scales(found.scales))


def _by_scale(found: Sequence[AtScale], best: AtScale | None) -> list[str]:
    """Return the losses at each scale as a table, and the best scale; nothing without scales."""
    if best is None:
        return []
    rows = [
        (
            f"{one.scale:g}",
            *(f"{loss:.4f}" for loss in (one.loss, one.retained) if loss is not None),
        )
        for one in found
    ]
    header = ("scale", "loss", "loss on --retain")[: len(rows[0])]
    what = "loss" if best.retained is None else "sum of both losses"
    return [table(header, rows), f"best scale: {best.scale:g}, with the lowest {what}"]


def _fields(found: Measured) -> dict[str, Any]:
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "exact": found.exact,
    }
