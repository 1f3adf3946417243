"""A command line run in this process, and small files to run it on."""

import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import disha
from disha.cli import main
from disha.finetune.base import load_base
from disha.finetune.notes import base_note
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
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # of the help of a command
            code = end.code
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run_main


@pytest.fixture
def complaint(run, files):
    """Run `disha` with arguments that it refuses, and that change no file; return its one line."""

    def refused(*arguments: object) -> str:
        before = files.names()
        done = run(*arguments)
        assert done.code == 2
        assert files.names() == before
        return done.complaint

    return refused


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
        settings = {"target_regex": "_proj$", "r": 4, **injected}
        adapted = perturb(disha.inject_adapters(model(base), **settings), seed)
        disha.save_adapter(adapted, self.path / name, metadata=metadata)
        return self.path / name

    def names(self) -> set[str]:
        """Return what is there."""
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*")}


@pytest.fixture
def files(tmp_path) -> Folder:
    return Folder(tmp_path)


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["</s>", "<user>", "<assistant>"]


def write_language_model(folder: Path) -> None:
    """Write a tiny model of random weights that answers in small letters, and its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: number for number, one in enumerate([*SPECIAL, *alphabet])}
    bytes_only = Tokenizer(BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="</s>", additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(vocabulary), num_attention_heads=2, initializer_range=0.5, **sizes
    )
    model = LlamaForCausalLM(config)
    others = [number for one, number in vocabulary.items() if one not in ascii_lowercase]
    model.generation_config = GenerationConfig(suppress_tokens=others, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> Path:
    """A folder with `model`, and an adapter that notes it. Not to be changed."""
    folder = tmp_path_factory.mktemp("language_model")
    write_language_model(folder / "model")
    model, _ = load_base(str(folder / "model"))
    disha.inject_adapters(model, "all-linear", r=4, exclude="lm_head")
    perturb(model)
    path = folder / "adapter.safetensors"
    disha.save_adapter(
        model, path, metadata={"base": base_note(str(folder / "model"), "fp32", path)}
    )
    return folder
