"""Proof that the saved adapter is the trained one: a fresh process recomputes the loss.

It gets only the settings and the adapter file. It measures the loss with the adapter loaded, and
again with the adapter merged into the weights. Both must agree with the trained model.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

import disha
from disha.finetune.errors import VerificationError
from disha.finetune.inputs import Inputs, load_inputs
from disha.finetune.report import peak_memory
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.objectives import objective_for

__all__ = ["Tolerance", "Verification", "verify_in_fresh_process"]


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences from the trained model's loss, in nats per token.

    Loading may change the order of sums. Merging also rounds the weights once.
    """

    loaded: float
    merged: float


EXACT = Tolerance(loaded=1e-4, merged=1e-3)
ROUNDED = Tolerance(loaded=1e-3, merged=5e-2)
"""For products or weights that have fewer bits than float32."""


@dataclass(frozen=True)
class Verification:
    """Losses of the same rows, in nats per token.

    Args:
        trained: the loss in the process that trained.
        loaded: the loss in a fresh process, with the adapter loaded from its file.
        merged: the loss in that process, with the adapter merged into the weights.
        tolerance: how much `loaded` and `merged` may differ from `trained`.
        peak_memory_bytes: the peak resident memory of the fresh process; None if unknown.
    """

    trained: float
    loaded: float
    merged: float
    tolerance: Tolerance
    peak_memory_bytes: int | None

    @property
    def loaded_difference(self) -> float:
        """How much the loss with the loaded adapter differs."""
        return abs(self.loaded - self.trained)

    @property
    def merged_difference(self) -> float:
        """How much the loss with the merged adapter differs."""
        return abs(self.merged - self.trained)

    @property
    def agrees(self) -> bool:
        """Whether both differences are within their tolerance."""
        is_loaded_close = self.loaded_difference <= self.tolerance.loaded
        return is_loaded_close and self.merged_difference <= self.tolerance.merged

    def to_json(self) -> dict[str, Any]:
        """Return the losses and their differences, ready for JSON. What is not finite is None."""
        found = {
            **asdict(self),
            "loaded_difference": self.loaded_difference,
            "merged_difference": self.merged_difference,
            "agrees": self.agrees,
        }
        return {
            name: None if isinstance(one, float) and not isfinite(one) else one
            for name, one in found.items()
        }

    def require_agreement(self, adapter: Path) -> None:
        """Raise `VerificationError` if a difference exceeds its tolerance."""
        if not self.agrees:
            raise VerificationError(
                f"{adapter}, loaded in a new process, does not give the trained model's loss "
                f"{self.trained:.6f}: loaded {self.loaded:.6f} (tolerance "
                f"{self.tolerance.loaded:g}), merged {self.merged:.6f} (tolerance "
                f"{self.tolerance.merged:g}); do not use this file, and report this as a bug"
            )


def verify_in_fresh_process(
    settings: FinetuneSettings, adapter: Path, inputs: Inputs, trained_loss: float
) -> Verification:
    """Recompute the loss of the run's checked rows in a new Python process.

    Args:
        settings: the settings of the run.
        adapter: the adapter file that the run saved.
        inputs: the inputs of the run, with the rows to compare losses on.
        trained_loss: the trained model's loss on them.

    Raises:
        VerificationError: the process failed, or found other rows.
    """
    request = pickle.dumps((settings, adapter, inputs.now, torch.get_num_threads()))
    module = "disha.finetune.verification"
    finished = subprocess.run([sys.executable, "-m", module], input=request, capture_output=True)
    if finished.returncode != 0:
        said = finished.stderr.decode(errors="replace")
        last_words = said.strip().splitlines()[-1:] or ["no message"]
        raise VerificationError(
            f"the new process that verifies {adapter} failed with code {finished.returncode}: "
            f"{last_words[0]}"
        )
    found = json.loads(finished.stdout.splitlines()[-1])
    if found.pop("rows") != inputs.checked.rows.digest():
        raise VerificationError(
            f"{adapter} can't be verified: the data have changed since training began; do not "
            "change the files during a run"
        )
    in_float32 = settings.model.bits == "fp32" and not settings.training.bf16
    tolerance = EXACT if in_float32 else ROUNDED
    return Verification(trained=trained_loss, tolerance=tolerance, **found)


def _measured(settings: FinetuneSettings, adapter: Path, now: float | None) -> dict[str, Any]:
    """Return the losses that the fresh process measures."""
    inputs = load_inputs(settings, now)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = inputs.base.load(device)
    disha.load_adapter(model, adapter)
    objective = objective_for(model, has_tokenizer=inputs.base.tokenizer is not None)

    def loss() -> float:
        training, batches = settings.training, inputs.checked.batches()
        return mean_loss(objective, batches, bf16=training.bf16, tf32=training.tf32).loss

    loaded = loss()
    disha.merge_adapters(model, untie=True, dense=settings.model.quantised)
    return {
        "rows": inputs.checked.rows.digest(),
        "loaded": loaded,
        "merged": loss(),
        "peak_memory_bytes": peak_memory(),
    }


if __name__ == "__main__":
    *asked, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # a user's own model may print
    print(json.dumps(_measured(*asked)), file=answers)
