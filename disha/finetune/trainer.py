"""trl's trainer, with batches of rows of similar length, a table of losses, and cut rows told."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from disha.errors import ArgumentError

TILE = 2048
"""How many columns of the head trl multiplies at a time on a CPU, so that a tile stays in its
cache. trl's own tiles of 32,768 columns suit its kernel for a GPU."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on rows, which may be grouped by length, and tells how many it has to cut."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.args.device.type == "cpu":
            set_scored_positions(True)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.args.process_index == 0:
            self.add_callback(LossTable)

    def create_model_card(self, *given: Any, **named: Any) -> None:
        """Write none: trl's shows how to load a complete model."""

    def _prepare_dataset(self, rows: Any, words: Any, args: Any, *others: Any) -> Any:
        """Prepare complete rows first, so that those that trl then cuts can be counted."""
        limit = args.max_length
        packing = others[0]
        if packing or limit is None:
            return super()._prepare_dataset(rows, words, args, *others)
        whole = copy.copy(args)
        whole.max_length = None
        complete = super()._prepare_dataset(rows, words, whole, *others)
        fitting = super()._prepare_dataset(complete, words, args, *others)
        if not fitting:
            raise ArgumentError(f"no row has something to learn in {limit} tokens")
        cut = sum(len(ids) > limit for ids in complete["input_ids"])
        if cut and args.process_index == 0:
            left_out = len(complete) - len(fitting)
            print(
                f"of {len(complete):,} rows, {cut:,} are cut to {limit} tokens, and "
                f"{left_out:,} are left out, because nothing to learn is in them",
                file=sys.stderr,
            )
        return fitting

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        size = batch * self.args.world_size
        sampler = _ByLength(size, lengths=lengths, generator=torch.Generator())
        sampler.seed = self.args.seed
        sampler.set_epoch(0)
        return sampler


def set_scored_positions(only_learned: bool) -> None:
    """Let trl score on a CPU as it does with its kernel: what is learned, and nothing else.

    These names are private in trl 1.16. A trl without them has the same losses, in more time.
    """
    trl_utils._use_triton = lambda device: only_learned
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = TILE


class _ByLength(LengthGroupedSampler):
    """Draws in an order of seed and epoch alone, which a resumed run sees too."""

    seed: int

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class LossTable(ProgressCallback):
    """Prints a line for each loss, above the only bar, which is shown on a terminal."""

    def on_train_begin(self, args: Any, state: Any, *given: Any, **named: Any) -> None:
        """Start the table and the bar."""
        self.current_step = self.first_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, disable=args.disable_tqdm or None)
        tqdm.write("      step      loss  measured      rate      left")
        self.began = time.monotonic()

    def on_prediction_step(self, *given: Any, **named: Any) -> None:
        """Show no second bar."""

    def on_log(self, args: Any, state: Any, *given: Any, logs: Any = None, **named: Any) -> None:
        """Print a line."""
        names = ("loss", "eval_loss", "learning_rate")
        loss, measured, rate = (f"{logs[name]:.4g}" if name in logs else "" for name in names)
        if self.training_bar is None or not loss + measured:
            return
        step = state.global_step
        left = ""
        if step > self.first_step:
            each = (time.monotonic() - self.began) / (step - self.first_step)
            left = tqdm.format_interval(each * (state.max_steps - step))
        line = f"{step:>10}{loss:>10}{measured:>10}{rate:>10}{left:>10}"
        tqdm.write(line.rstrip())
        sys.stdout.flush()
