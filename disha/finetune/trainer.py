"""trl's trainer, which also batches rows of similar length and says how many rows it has cut."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from disha.errors import ArgumentError, DishaError
from disha.text import counted

COLUMNS = ("loss", "eval_loss", "learning_rate")
"""What is shown of a step, in this order."""

TILE = 2048
"""How many columns of the head trl multiplies at a time on a CPU, so that a tile stays in its
cache. trl's own tiles of 32,768 columns suit its kernel for a GPU."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """An `SFTTrainer` that can group rows by length, and says how many rows it has to cut."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.rows = {
            "train": len(named["train_dataset"]),
            "eval": len(named.get("eval_dataset", ())),
        }
        """How many rows are left to train on and to measure, before they are packed."""
        super().__init__(*given, **named)
        self.add_callback(StopWithoutLoss)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Losses)

    def create_model_card(self, *given: Any, **named: Any) -> None:
        """Do nothing, because trl's card shows how to load a complete model."""

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        """Return the loss; on a processor, only learned positions are scored."""
        on_processor = self.args.device.type == "cpu"
        with score_learned_positions() if on_processor else nullcontext():
            return super().compute_loss(*given, **named)

    def scored(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch without values, of which nobody knows what is learned."""
        fused = {"fused_lm_head": True} if hasattr(trl_utils, "add_fused_lm_head") else {}
        with self.compute_loss_context_manager(), score_learned_positions(triton=False):
            return self.model(**batch, use_cache=False, **fused).loss

    def _prepare_dataset(
        self, rows: Any, tokenizer: Any, args: Any, packing: bool, formatting: Any, name: str
    ) -> Any:
        """Prepare rows, cut them and pack them, step by step, to say how many of them are cut."""
        prepare = partial(
            super()._prepare_dataset,
            processing_class=tokenizer,
            formatting_func=formatting,
            dataset_name=name,
        )
        limit = args.max_length
        whole = copy.copy(args)
        whole.max_length = None
        whole.shuffle_dataset = False
        complete = prepare(rows, args=whole, packing=False)
        fitting = complete
        cut = 0
        if not packing or args.packing_strategy == "bfd":  # the other strategies lose no token
            # trl does not do again what is done in these rows: it only cuts them.
            fitting = prepare(complete, args=args, packing=False)
            cut = sum(len(ids) > limit for ids in complete["input_ids"])
        if not fitting:
            raise ArgumentError(f"none of the {name} rows has something to learn in {limit} tokens")
        self.rows[name] = len(fitting)
        if cut and args.process_index == 0:
            left_out = len(complete) - len(fitting)
            print(
                f"of {counted(len(complete), 'row')}, {cut:,} cut to {limit} tokens, and "
                f"{left_out:,} left out, because nothing to learn is in what is left",
                file=sys.stderr,
            )
        return prepare(fitting, args=args, packing=True) if packing else fitting

    def _run_epoch(self, *given: Any, **named: Any) -> None:
        # transformers asks whether a run is complete after a step, and so trains one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*given, **named)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows_of_rank = self.args.train_batch_size * self.args.gradient_accumulation_steps
        rows_of_step = rows_of_rank * self.args.world_size
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        sampler = _ByLength(rows_of_step, lengths=lengths, generator=torch.Generator())
        sampler.trainer = self
        return sampler


def score_learned_positions(triton: bool = True) -> AbstractContextManager[Any]:
    """Let trl score on a processor as it does with its kernel: what is learned, and nothing else.

    Without `triton`, all positions are scored, in the same tiles. These names are private in trl
    1.16. A trl without them has the same losses, in more time.
    """
    return patch.multiple(
        trl_utils, create=True, _use_triton=lambda device: triton, _CHUNKED_LOGPROB_CHUNK_SIZE=TILE
    )


class _ByLength(LengthGroupedSampler):
    """Draws rows in an order that depends on seed and epoch only, so that a run can resume.

    accelerate does not tell the epoch to the sampler of a run that resumes on several ranks.
    """

    trainer: Trainer

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        self.generator.manual_seed(seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()  # type: ignore[no-untyped-call]


class StopWithoutLoss(TrainerCallback):
    """Stops a run whose loss is no longer a number, on all processes in the same step."""

    def on_log(self, args: Any, state: Any, *given: Any, logs: Any = None, **named: Any) -> None:
        """Raise if a loss is not finite."""
        for name in ("loss", "eval_loss"):
            loss = logs.get(name, 0.0)
            if math.isfinite(loss):
                continue
            raise DishaError(
                f"the loss is {loss} at step {state.global_step}, with a --learning_rate of "
                f"{args.learning_rate:g}; take a lower one, and start over with "
                "--overwrite_output_dir. If it is so at step 0, check --base and --bits"
            )


class Losses(ProgressCallback):
    """Prints a line for each step with a loss, above the only bar, which is shown on a terminal.

    Elsewhere, such as in a log file, the line has what the bar would show.
    """

    def on_train_begin(self, args: Any, state: Any, *given: Any, **named: Any) -> None:
        """Note when the run begins, or goes on."""
        super().on_train_begin(args, state, *given, **named)  # type: ignore[no-untyped-call]
        self._begin = time.monotonic(), state.global_step

    def on_prediction_step(self, *given: Any, **named: Any) -> None:
        """Show no second bar."""

    def on_log(self, args: Any, state: Any, *given: Any, logs: Any = None, **named: Any) -> None:
        """Print the losses and the rate, with the step."""
        shown = {name: logs[name] for name in COLUMNS if name in logs}
        if not shown or self.training_bar is None:
            return
        shown = {"step": state.global_step, **shown}
        if self.training_bar.disable:
            shown |= self._course(state)
        super().on_log(args, state, *given, logs=shown, **named)

    def _course(self, state: Any) -> dict[str, Any]:
        """Return of how many steps this is one, the time so far, and the time that is left."""
        began, first = self._begin
        elapsed = time.monotonic() - began
        left = "?"
        if state.global_step > first:
            each = elapsed / (state.global_step - first)
            left = tqdm.format_interval(each * (state.max_steps - state.global_step))
        return {"of": state.max_steps, "elapsed": tqdm.format_interval(elapsed), "left": left}
