from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from disha.finetune.errors import CheckpointError
from disha.finetune.models.folder import FolderCheckpoint
from tests.finetune import tiny_checkpoints

TOKENS = torch.arange(80).reshape(2, 40)


def load(path, dtype=torch.float32):
    return FolderCheckpoint(path).load_model(dtype)


def change_tensors(folder, without=(), **tensors):
    """Rewrite the weights of a folder; names have "/" in place of dots."""
    path = folder / "model.safetensors"
    named = {name.replace("/", "."): values for name, values in tensors.items()}
    state = {name: v for name, v in load_file(path).items() if name not in without}
    save_file({**state, **named}, path)
    return folder


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoints.write_folder(tmp_path / "model", "llama2")


@pytest.fixture
def tied_folder(tmp_path):
    return tiny_checkpoints.write_folder(tmp_path / "tied", "smollm2")


@pytest.mark.parametrize("family", tiny_checkpoints.FAMILIES)
@torch.inference_mode()
def test_shards_hold_what_one_file_does(tmp_path, tiny_folder, family):
    path = tiny_checkpoints.write_folder(tmp_path / "model", family, shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    reference = tiny_checkpoints.random_model(family)(TOKENS).logits
    torch.testing.assert_close(load(path)(TOKENS), reference, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(load(path)(TOKENS), load(tiny_folder(family))(TOKENS))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_once_to_the_dtype_asked_for(tmp_path, folder, stored, asked):
    path = folder / "model.safetensors"
    state = {name: values.to(stored) for name, values in load_file(path).items()}
    save_file(state, path)
    for name, values in load(folder, asked).state_dict().items():
        assert values.dtype == asked
        assert torch.equal(values, state[name].to(asked)), name


def test_nothing_refers_to_the_file_after_loading(folder):
    path = folder / "model.safetensors"
    model, state = load(folder), {name: v.clone() for name, v in load_file(path).items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())


def test_the_folder_is_where_the_tokenizer_comes_from(folder):
    checkpoint = FolderCheckpoint(folder)
    assert (checkpoint.folder, checkpoint.fields, checkpoint.title) == (folder, None, "model")


def test_missing_unexpected_and_misshapen_tensors_are_named_together(folder):
    change_tensors(
        folder,
        without=["model.norm.weight"],
        **{"model/layers/0/self_attn/q_proj/bias": torch.ones(64), "lm_head/weight": torch.ones(2)},
    )
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert (
        "missing: model.norm.weight; not expected: model.layers.0.self_attn.q_proj.bias; "
        "of another shape: lm_head.weight (2,) instead of (266, 64)"
    ) in str(caught.value)


@torch.inference_mode()
def test_constants_that_older_libraries_stored_are_harmless(folder):
    expected = load(folder)(TOKENS)
    old = "model/layers/1/self_attn/rotary_emb/inv_freq"
    change_tensors(folder, **{old: torch.ones(8), "model/rotary_emb/inv_freq": torch.ones(8)})
    torch.testing.assert_close(load(folder)(TOKENS), expected, rtol=0.0, atol=0.0)


def test_a_stored_head_that_is_the_embedding_is_harmless(tied_folder):
    embedding = load(tied_folder).model.embed_tokens.weight.detach()
    model = load(change_tensors(tied_folder, **{"lm_head/weight": embedding.clone()}))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("place", [0, 265])
def test_a_stored_head_that_is_not_the_embedding_is_refused(tied_folder, place):
    head = load(tied_folder).model.embed_tokens.weight.detach().clone()
    head[place, 5] += 1e-3
    change_tensors(tied_folder, **{"lm_head/weight": head})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings = true, but holds a lm_head"):
        load(tied_folder)


def test_a_stored_head_of_another_shape_is_refused(tied_folder):
    change_tensors(tied_folder, **{"lm_head/weight": torch.ones(3, 64)})
    with pytest.raises(CheckpointError, match=r"set tie_word_embeddings to false in config\.json"):
        load(tied_folder)


def test_weights_quantised_by_others_are_refused(folder):
    change_tensors(folder, **{"lm_head/weight": torch.ones(266, 64).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="dtype F8_E4M3; supported are F16, BF16, F32, F64"):
        load(folder)


def test_a_folder_without_config_is_named(tmp_path):
    (tmp_path / "small.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds no config\.json; .*such as .*small\.gguf"):
        FolderCheckpoint(tmp_path)


def test_pickles_are_refused_with_the_remedy(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*safetensors"):
        FolderCheckpoint(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        FolderCheckpoint(folder)


def test_a_missing_shard_is_named(tmp_path):
    path = tiny_checkpoints.write_folder(tmp_path / "model", "qwen3", shard_size="60KB")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        FolderCheckpoint(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1, "a": 2}', "\x00"])
def test_a_damaged_config_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FolderCheckpoint(folder)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FolderCheckpoint(folder)


def test_weights_that_vanish_after_opening_are_named(folder):
    checkpoint = FolderCheckpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load_model(torch.float32)


def test_what_the_config_asks_for_is_checked_before_weights_are_read(folder):
    tiny_checkpoints.edit_config(folder, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(CheckpointError, match=r"config\.json asks for rope_parameters = .*yarn"):
        FolderCheckpoint(folder).config()


def test_the_older_spelling_of_rope_settings_gives_the_same_model(tmp_path):
    path = tiny_checkpoints.write_folder(tmp_path / "model", "llama3")
    expected = load(path)(TOKENS)
    rope = json.loads((path / "config.json").read_text())["rope_parameters"]
    base = rope.pop("rope_theta")
    tiny_checkpoints.edit_config(
        path, without=("rope_parameters",), rope_theta=base, rope_scaling=rope
    )
    torch.testing.assert_close(load(path)(TOKENS), expected, rtol=0.0, atol=0.0)


def test_no_more_layers_are_made_than_there_are_tensors(folder):
    tiny_checkpoints.edit_config(folder, num_hidden_layers=10**6)
    with pytest.raises(CheckpointError, match="claims 1000000 layers, but holds 21 tensors"):
        load(folder)
