from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from disha.finetune.errors import CheckpointError
from disha.finetune.models import assembly
from disha.finetune.models.assembly import assemble, check_fit
from disha.finetune.models.decoder import Decoder, DecoderConfig
from tests.finetune import tiny_gguf

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]

BIG = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 2048, "heads": 32}
CONFIG = {
    "model_type": "llama",
    "vocab_size": BIG["vocab_size"],
    "hidden_size": BIG["hidden_size"],
    "intermediate_size": BIG["intermediate_size"],
    "num_hidden_layers": 2,
    "num_attention_heads": BIG["heads"],
    "num_key_value_heads": BIG["heads"],
}


@pytest.fixture(scope="module")
def big_state():
    """Some 160 MiB in float32, most of it in embedding and head, which peaks are made of."""
    config = DecoderConfig(
        vocabulary=BIG["vocab_size"],
        hidden=BIG["hidden_size"],
        feed_forward=BIG["intermediate_size"],
        layers=2,
        heads=BIG["heads"],
        kv_heads=BIG["heads"],
        head_dim=16,
        context=128,
        rope_base=1e4,
        norm_epsilon=1e-5,
        tied_head=False,
    )
    return Decoder(config).state_dict()


def write_folder(path, state, dtype, shards=1):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: values.to(dtype).contiguous() for name, values in state.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    places = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def test_loading_takes_hardly_more_memory_than_the_model(tmp_path, big_state):
    metadata = {
        "llama.embedding_length": BIG["hidden_size"],
        "llama.feed_forward_length": BIG["intermediate_size"],
        "llama.attention.head_count": BIG["heads"],
        "llama.attention.head_count_kv": BIG["heads"],
    }
    half = write_folder(tmp_path / "half", big_state, torch.bfloat16)
    whole = write_folder(tmp_path / "whole", big_state, torch.float32, shards=3)
    gguf = tiny_gguf.write_gguf(
        tmp_path / "model.gguf", big_state, kind=Kind.Q8_0, metadata=metadata
    )
    cases = [
        {"path": str(half), "dtype": "float32", "bits": None},
        {"path": str(half), "dtype": "bfloat16", "bits": None},
        {"path": str(whole), "dtype": "float32", "bits": None},
        {"path": str(whole), "dtype": "bfloat16", "bits": None},
        {"path": str(gguf), "dtype": "float32", "bits": None},
        {"path": str(gguf), "dtype": "bfloat16", "bits": None},
        {"path": str(whole), "dtype": "float32", "bits": 4},
        {"path": str(whole), "dtype": "float32", "bits": 8},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.finetune.models.memory", json.dumps(cases)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for case, measured in zip(cases, json.loads(done.stdout), strict=True):
        assert measured["size"] > 70 * 2**20, case
        # A weight that is to be quantised is dense first, and copied on the way.
        dense = 0 if case["bits"] is None else 4 * BIG["hidden_size"] * BIG["intermediate_size"]
        assert measured["peak"] <= 1.2 * measured["size"] + 3 * dense, (case, measured)


class Stored:
    """Weights in memory that remember what was asked for."""

    def __init__(self, state):
        self.state, self.asked = state, []

    def rows(self, name, first, last):
        self.asked.append((name, first, last))
        return self.state[name][first:last]


@pytest.mark.parametrize("size", [1, 64, 1000, 10**9])
def test_slices_of_any_size_make_the_same_model(monkeypatch, tiny_checkpoint, size):
    monkeypatch.setattr(assembly, "SLICE", size)
    stored = Stored(tiny_gguf.random_state(tied=False))
    model = assemble(tiny_checkpoint.config(), stored, torch.float32, CPU)
    for name, values in stored.state.items():
        assert torch.equal(model.state_dict()[name], values), name
    rows = [(name, row) for name, first, last in stored.asked for row in range(first, last)]
    assert len(rows) == len(set(rows)), "a row was read twice"
    sizes = [(last - first) * stored.state[name][0].numel() for name, first, last in stored.asked]
    assert max(sizes) <= max(size, 96), "96 is the width of the widest row"


def test_weights_are_trainable_parameters_of_the_dtype(tiny_checkpoint):
    stored = Stored(tiny_gguf.random_state(tied=False))
    model = assemble(tiny_checkpoint.config(), stored, torch.bfloat16, CPU)
    assert all(one.dtype == torch.bfloat16 and one.is_leaf for one in model.parameters())
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_every_kind_of_misfit_is_in_one_message(tmp_path):
    expected = {"a": (1,), "b": (2,), "c": (3,), "d": (4,)}
    found = {"b": (2,), "c": (5,), "x": (1,)}
    with pytest.raises(CheckpointError) as caught:
        check_fit(tmp_path, expected, found)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "missing: a, d; not expected: x; of another shape: c (5,) instead of (3,)" in message


def test_long_lists_are_cut(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: 0, 1, 2, 3, and 5 more\. It"):
        check_fit(tmp_path, {str(name): (1,) for name in range(9)}, {})


def test_what_fits_is_fine(tmp_path):
    check_fit(tmp_path, {"a": (1, 2)}, {"a": (1, 2)})
