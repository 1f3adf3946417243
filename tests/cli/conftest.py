"""A command line run in this process, and small files to run it on."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import disha
from disha.cli import main
from tests.cli.model_files import ADAPTER_FLAGS, write_files
from tests.conftest import perturb


@dataclass(frozen=True)
class Done:
    """What a command has left: its exit code and what it has printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, which must be one JSON object as the standard has it."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def complaint(self) -> str:
        """The one line on stderr; nothing else may have been printed."""
        assert self.out == ""
        assert self.err.startswith("disha")
        assert self.err.count("\n") == 1, self.err
        return self.err


@pytest.fixture
def run(capsys):
    """Run `disha` with arguments."""

    def run_main(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run_main


def model(seed: int = 0) -> nn.Module:
    """Return the base: layers whose names llama.cpp knows, and a norm."""
    torch.manual_seed(seed)
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.q_proj = nn.Linear(16, 8, bias=False)
    layer.mlp = nn.Module()
    layer.mlp.down_proj = nn.Linear(16, 12, bias=False)
    whole = nn.Module()
    whole.layers = nn.ModuleList([layer])
    whole.norm = nn.LayerNorm(12)
    return whole


Q, DOWN = "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"


@dataclass(frozen=True)
class Folder:
    """Where files are made as tests need them."""

    path: Path

    def base(self, name: str = "base", seed: int = 0, config: dict[str, Any] | None = None) -> Path:
        """Write the base as a folder of one safetensors file."""
        folder = self.path / name
        folder.mkdir()
        save_file(model(seed).state_dict(), folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def adapter(
        self, name: str = "a.safetensors", *, seed: int = 1, base: int = 0, **injected: Any
    ) -> Path:
        """Write an adapter with random values, for the base of that seed."""
        metadata = injected.pop("metadata", None)
        adapted = disha.inject_adapters(
            model(base), **{"target_regex": "_proj$", "r": 4, **injected}
        )
        perturb(adapted, seed)
        disha.save_adapter(adapted, self.path / name, metadata=metadata)
        return self.path / name

    def names(self) -> set[str]:
        """Return what is there."""
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*")}


@pytest.fixture
def files(tmp_path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with `model`, `train.jsonl`, `held_out.jsonl`, and the adapter trained on them.

    Not to be changed.
    """
    folder = tmp_path_factory.mktemp("models")
    write_files(folder)
    model, data = folder / "model", folder / "train.jsonl"
    flags = ("--base_model_name_or_path", model, "--data_path", data, "--output_dir", folder)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*("finetune", *map(str, flags)), *ADAPTER_FLAGS]) == 0
    return folder
