"""trl's trainer, with batches of rows of similar length, a table of losses, and cut rows told."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from disha.errors import ArgumentError


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on rows, which may be grouped by length, and tells how many it has to cut.

    Args:
        given: as in trl.
        is_held_out: whether the rows to measure on are no rows to train on.
        notes: what an adapter file says of the rows.
        named: as in trl.
    """

    def __init__(
        self, *given: Any, is_held_out: bool = False, notes: Any = None, **named: Any
    ) -> None:
        super().__init__(*given, **named)
        self.is_held_out, self.notes = is_held_out, notes
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.is_world_process_zero():
            self.add_callback(LossTable)

    def create_model_card(self, *given: Any, **named: Any) -> None:
        """Write none: trl's shows how to load a complete model."""

    def _prepare_dataset(
        self, rows: Dataset, words: Any, args: Any, packing: bool, *others: Any
    ) -> Dataset:
        """Prepare complete rows first, so that those that trl then cuts can be counted."""
        if packing or args.max_length is None:
            return super()._prepare_dataset(rows, words, args, packing, *others)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        complete = super()._prepare_dataset(rows, words, whole, packing, *others)
        fitting = super()._prepare_dataset(complete, words, args, packing, *others)
        if not len(fitting):
            raise ArgumentError(f"no row has something to learn in {args.max_length} tokens")
        cut = sum(len(ids) > args.max_length for ids in complete["input_ids"])
        if cut and args.process_index == 0:
            left_out = len(complete) - len(fitting)
            print(
                f"of {len(complete):,} rows, {cut:,} are cut to {args.max_length} tokens, and "
                f"{left_out:,} are left out, because nothing to learn is in them",
                file=sys.stderr,
            )
        return fitting

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return _ByLength(batch * self.args.world_size, lengths, self.args.seed)


class _ByLength(LengthGroupedSampler):
    """Draws in an order of seed and epoch alone, which a resumed run sees too."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class LossTable(ProgressCallback):
    """Prints a line for each loss, above the only bar, which is shown on a terminal."""

    def on_train_begin(self, args: Any, state: Any, *given: Any, **named: Any) -> None:
        """Start the table and the bar."""
        self.current_step = self.first_step = state.global_step
        self.began = time.monotonic()
        self._print("step", "loss", "measured", "rate", "left")
        disable = args.disable_tqdm or None
        self.training_bar = tqdm(total=state.max_steps, disable=disable, dynamic_ncols=True)

    def on_prediction_step(self, *given: Any, **named: Any) -> None:
        """Show a bar for a measurement after training only."""
        if self.training_bar is None:
            super().on_prediction_step(*given, **named)  # type: ignore[no-untyped-call]
            self.prediction_bar.leave = False  # type: ignore[attr-defined]

    def on_log(self, args: Any, state: Any, *given: Any, logs: Any = None, **named: Any) -> None:
        """Print a line."""
        names = ("loss", "eval_loss", "learning_rate")
        cells = [f"{logs[name]:.4g}" if name in logs else "" for name in names]
        if self.training_bar is None or not any(cells):
            return
        step, left = state.global_step, ""
        if step > self.first_step:
            each = (time.monotonic() - self.began) / (step - self.first_step)
            left = tqdm.format_interval(each * (state.max_steps - step))
        self._print(step, *cells, left)

    def _print(self, *cells: object) -> None:
        with tqdm.external_write_mode():
            print("".join(f"{cell!s:>10}" for cell in cells).rstrip(), flush=True)
