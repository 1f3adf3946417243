from __future__ import annotations

import pytest
import torch

from disha.finetune.errors import CheckpointError
from disha.finetune.models.checkpoint import open_model
from tests.finetune import tiny_checkpoints


@torch.inference_mode()
def test_folders_and_gguf_files_come_through_one_door(tmp_path, tiny_folder):
    folder = tiny_folder("qwen3")
    file = tiny_checkpoints.write_gguf(tmp_path / "qwen3.gguf", "qwen3")
    one, other = open_model(folder), open_model(file)
    assert (one.path, one.folder, one.fields, one.title) == (folder, folder, None, "qwen3")
    assert (other.path, other.folder, other.title) == (file, None, "qwen3")
    assert other.fields["tokenizer.ggml.model"] == "gpt2"
    first, second = one.config(), other.config()
    assert (first.layers, first.head_dim, first.head_norm) == (2, 32, True)
    assert first.norm_epsilon == pytest.approx(second.norm_epsilon)
    tokens = torch.arange(50).unsqueeze(0)
    models = [each.load_model(torch.float32, torch.device("cpu")) for each in (one, other)]
    torch.testing.assert_close(models[0](tokens), models[1](tokens), rtol=0.0, atol=1e-4)


def test_one_file_of_a_folder_is_told_what_to_name(tiny_folder):
    folder = tiny_folder("qwen3")
    with pytest.raises(CheckpointError, match=f"name its folder, {folder}, "):
        open_model(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["absent", "absent.gguf", "absent.safetensors"])
def test_what_is_not_there_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"there is no file .*{name}; .* GGUF file or a fold"):
        open_model(tmp_path / name)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_model(path)
