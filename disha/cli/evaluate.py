"""Measure a model on rows: loss, perplexity, and answers that are exactly right.

Several files are measured one by one, and together. --forgetting measures the loss on text that
the base itself has written too, and by how much the adapter raises it.

Examples:
  disha evaluate --adapter output/adapter.safetensors --data held_out.jsonl --compare
  disha evaluate --adapter output/adapter.safetensors --data held_out.jsonl --scale 0.25 0.5 0.75
  disha evaluate --base model.gguf --data test.jsonl other.jsonl --exact_match
"""

from __future__ import annotations

from collections.abc import Sequence

from disha.cli.dispatcher import Parser
from disha.cli.models import add_answer_flags, add_model_flags
from disha.cli.output import show
from disha.errors import ArgumentError
from disha.finetune.flags import COUNT, SCALE


def main(words: Sequence[str]) -> None:
    """Measure a model."""
    flags = _parser().parse(words)
    flags.forgetting = flags.forgetting or bool(flags.scale)
    if "" in flags.data:
        raise ArgumentError("a --data is empty; name a file, a folder or a data set")
    if flags.forgetting and flags.adapter is None:
        raise ArgumentError("only an adapter forgets; name it with --adapter")
    from disha.cli.measuring import measure_model  # imports what takes seconds

    text, lines = measure_model(flags)
    show(flags.json, text, lines)


def _parser() -> Parser:
    parser = Parser("evaluate", __doc__)
    add_model_flags(parser)
    add_answer_flags(parser)
    parser.add_argument(
        "--data",
        "--data_path",
        nargs="+",
        action="extend",
        required=True,
        help="as for disha finetune",
    )
    parser.add_argument("--dataset_split", default="train", help="such as train[:1000]")
    parser.add_argument("--dataset_field", nargs="+", default=[], help="question and answer")
    parser.add_argument(
        "--max_length", "--max_seq_length", type=COUNT, default=512, help="tokens of a row"
    )
    parser.add_argument(
        "--per_device_eval_batch_size", type=COUNT, default=8, help="rows of a batch"
    )
    parser.add_argument("--exact_match", action="store_true", help="generate answers, and compare")
    parser.add_argument("--compare", action="store_true", help="measure the base without it too")
    parser.add_argument(
        "--forgetting", action="store_true", help="measure the loss on text of the base too"
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        type=SCALE,
        default=[],
        help="measure loss and forgetting at these scales too (1: as trained), and plot them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
