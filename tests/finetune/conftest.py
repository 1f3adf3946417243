"""Fixtures of the fine-tuning tests: the demo's model, read once, and a tiny model."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Callable
from html.entities import html5
from pathlib import Path

import pytest
import torch

from disha.finetune import command
from disha.finetune.base_model import demo_model
from disha.finetune.models.decoder import Decoder
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.text.from_gguf import tokenizer_from_gguf
from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune import tiny_gguf
from tests.finetune.command_line import Runner


@pytest.fixture(scope="session", autouse=True)
def _offline():
    """Nothing here may fetch a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny operations on several threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def without_plots_and_samples():
    """They take most of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_samples", lambda *arguments: [])
        patch.setattr(command, "_write_results", lambda *arguments: None)
        yield


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    return demo_model()


@pytest.fixture(scope="session")
def smollm_checkpoint(smollm_path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(smollm_path)


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_checkpoint: GGUFCheckpoint) -> Tokenizer:
    return tokenizer_from_gguf(smollm_checkpoint.fields, smollm_checkpoint.path)


@pytest.fixture(scope="session")
def smollm(smollm_checkpoint: GGUFCheckpoint) -> Decoder:
    return smollm_checkpoint.load_model(torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a head of its own."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return tiny_gguf.write_gguf(path, tiny_gguf.random_state(tied=False))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(tiny_path)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: GGUFCheckpoint) -> Tokenizer:
    return tokenizer_from_gguf(tiny_checkpoint.fields, tiny_checkpoint.path)


@pytest.fixture
def tiny_model(tiny_checkpoint: GGUFCheckpoint) -> Decoder:
    return tiny_checkpoint.load_model(torch.float32)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with tiny models, by family; not to be changed."""
    from tests.finetune import tiny_checkpoints  # transformers takes seconds to import

    @functools.cache
    def folder(family: str) -> Path:
        return tiny_checkpoints.write_folder(tmp_path_factory.mktemp("tiny") / family, family)

    return folder


@pytest.fixture(scope="session")
def library_lines() -> list[str]:
    """Lines of the standard library's source, and of its tables of characters, mixed."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = (
        line
        for path in sorted(folder.glob("*.py"))[:60]
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    characters = (f"&{name} is {character}" for name, character in html5.items())
    alphabets = (
        bytes(range(first, first + 16)).decode(codec, errors="replace")
        for codec in ("cp1251", "cp1253", "cp1255", "cp1256", "cp874", "cp437", "koi8_u")
        for first in range(128, 256, 16)
    )
    chosen = {line for line in (*source, *characters, *alphabets) if line.strip()}
    return sorted(chosen, key=_digest)


def _digest(line: str) -> bytes:
    return hashlib.sha256(line.encode()).digest()


@pytest.fixture
def finetune(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_path: Path) -> Runner:
    """Runs the command on a tiny model and some rows."""
    return Runner(capsys, tmp_path, tiny_path)
