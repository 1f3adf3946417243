from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import disha
from disha.finetune.base_model import open_base_model
from disha.finetune.errors import CheckpointError, SettingsError, TokenizerError
from disha.finetune.models.decoder import Decoder
from disha.finetune.settings import FinetuneSettings, ModelSettings
from tests.finetune import tiny_gguf

CPU = torch.device("cpu")

SOURCE = """
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune import tiny_checkpoints

def tokenizer():
    return Tokenizer(tiny_checkpoints.tokenizer(begin=False), end=2, begin=None)

def make_llama():
    return tiny_checkpoints.random_model("llama3"), tokenizer()

def make_gpt2(vocabulary=len(tiny_checkpoints.TOKENS)):
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=48, vocab_size=vocabulary,
        bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), tokenizer()

def make_small():
    return make_gpt2(100)

def make_numbers():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """How a user's functions are named."""
    monkeypatch.chdir(tmp_path)
    Path("factories_of_a_user.py").write_text(SOURCE)
    yield "factories_of_a_user:make_{}".format
    sys.modules.pop("factories_of_a_user", None)


def opened(**settings):
    return open_base_model(ModelSettings(**settings))


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_function_s_model_is_not_quantised_silently(factory, bits):
    settings = FinetuneSettings().changed(model=factory("gpt2"), bits=bits)
    with pytest.raises(SettingsError, match=f"--bits {bits} quantises models given by --base_mod"):
        settings.model.check()
    with pytest.raises(SettingsError, match=f"--bits {bits} quantises"):
        settings.changed(demo=True, output_dir=Path("out")).check()


@torch.inference_mode()
def test_a_function_s_model_in_bfloat16_keeps_what_it_computed_exactly(factory):
    """As transformers does where it makes a model in bfloat16."""
    from tests.finetune import tiny_checkpoints

    reference = tiny_checkpoints.random_model("llama3")
    frequencies = reference.model.rotary_emb.inv_freq.clone()
    model = opened(model=factory("llama"), bits="bf16").load(CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_a_function_s_model_is_rounded_with_its_statistics(factory):
    model = opened(model=factory("numbers"), bits="bf16").load(CPU)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert model(torch.zeros(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_function_s_model_is_kept_as_it_was_made(factory):
    model = opened(model=factory("numbers")).load(CPU)
    assert isinstance(model, nn.Sequential)
    assert model[0].weight.dtype == torch.float32


def test_the_longest_sequence_is_what_generation_takes_it_for(factory):
    assert opened(model=factory("gpt2")).context == 48
    assert opened(model=factory("llama")).context == tiny_gguf.CONTEXT
    assert opened(model=factory("numbers")).context is None


def test_a_tokenizer_of_a_larger_model_is_refused(factory, tiny_folder, tmp_path):
    from tests.finetune.text import tiny_tokenizers

    larger = tiny_tokenizers.qwen2().write(tmp_path / "tokenizer")
    assert opened(base_model_name_or_path=tiny_folder("llama2")).tokenizer is not None
    with pytest.raises(TokenizerError, match=r"the tokenizer has \d+ tokens, but llama2 knows 266"):
        opened(base_model_name_or_path=tiny_folder("llama2"), tokenizer=larger)
    with pytest.raises(TokenizerError, match=r"has 266 tokens, but .*make_small knows 100"):
        opened(model=factory("small"))


@pytest.mark.parametrize(("bits", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_checkpoint_is_read_in_the_dtype_asked_for(tiny_path, bits, dtype):
    base = opened(base_model_name_or_path=tiny_path, bits=bits)
    assert (base.folder, base.title) == (None, "tiny")
    model = base.load(CPU)
    assert isinstance(model, Decoder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        opened(base_model_name_or_path=tmp_path / "absent")
    assert issubclass(CheckpointError, disha.DishaError)
