"""Fixtures of the fine-tuning tests: nothing is downloaded, and a tiny model is made once."""

import gc
import json
from pathlib import Path
from unittest.mock import patch

import datasets
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from disha.finetune import main
from tests.finetune.tiny_models import write_model, write_rows

EXACT = ["--max_steps", 8, "--num_train_epochs", 2, "--save_steps", 2, "--dropout", 0.2]
EXACT += ["--gradient_accumulation_steps", 2, "--logging_steps", 1]
"""The flags of a run whose losses depend on what a checkpoint must keep."""


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_offline(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations on several threads wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setenv("HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache))
        datasets.disable_progress_bars()
        yield
    datasets.enable_progress_bars()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny Llama without a chat template."""
    return write_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def chatty(tmp_path_factory) -> Path:
    """A tiny Llama with a chat template."""
    return write_model(tmp_path_factory.mktemp("chatty") / "llama", chat=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


class Result:
    """A finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.adapter = folder, folder / "adapter.safetensors"
        self.report = json.loads((folder / "report.json").read_text())
        self.losses = {int(step): loss for step, loss in self.report["losses"].items()}

    def blocks(self) -> dict[str, torch.Tensor]:
        return load_file(self.adapter)


@pytest.fixture
def _empty_plots(monkeypatch):
    """Draw no losses, which takes a third of a short run."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: path.touch())


@pytest.fixture(scope="session")
def finetune(tiny, data):
    """Run the command with a few steps of the tiny model; other flags replace these.

    The plot is left empty, as by `_empty_plots`: runs in processes of their own draw it.
    """
    import disha.finetune.train  # noqa: F401

    gc.freeze()  # trainers ask for collections, which would search the modules again and again

    def run(folder: Path, *words: object, base: Path | None = tiny) -> Result:
        flags = ["--r", 8, "--max_steps", 6, "--learning_rate", 0.01]
        flags += [] if "--data" in words else ["--data", data]
        flags += ["--samples", 0, "--disable_tqdm", True, "--output_dir", folder]
        flags += [] if base is None else ["--base", base]
        with patch.object(Figure, "savefig", lambda figure, path: path.touch()):
            assert main([str(word) for word in [*flags, *words]]) == 0
        return Result(folder)

    return run
