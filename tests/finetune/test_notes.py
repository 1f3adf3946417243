import json
import os

import pytest
import torch

import disha
from disha import ArgumentError
from disha.finetune.notes import BASE_KEY, base_note, read_noted_base, read_noted_bits, read_notes


class TestNote:
    def save(self, path, note):
        model = disha.inject_adapters(torch.nn.Linear(4, 4), "all-linear", r=2)
        disha.save_adapter(model, path, metadata={} if note is None else {BASE_KEY: note})
        return path

    def test_a_path_stays_right_when_both_are_moved(self, tmp_path):
        base = tmp_path / "here" / "model"
        base.mkdir(parents=True)
        adapter = tmp_path / "here" / "out" / "adapter.safetensors"
        adapter.parent.mkdir()
        self.save(adapter, base_note(str(base), "4", adapter))
        assert str(tmp_path) not in adapter.read_bytes()[:2000].decode(errors="replace")
        os.rename(tmp_path / "here", tmp_path / "there")
        moved = tmp_path / "there" / "out" / "adapter.safetensors"
        assert read_noted_base(moved, read_notes(moved)) == str(tmp_path / "there" / "model")
        assert read_noted_bits(read_notes(moved)) == "4"
        (tmp_path / "there" / "model").rmdir()
        with pytest.raises(ArgumentError, match="which is not there; give --base"):
            read_noted_base(moved, read_notes(moved))

    def test_a_base_on_another_drive_is_noted_whole(self, tmp_path, monkeypatch):
        """Simulated: on Windows, no relative path leads from one drive to another."""

        def refuse(path, start):
            raise ValueError("path is on mount 'D:', start on mount 'C:'")

        monkeypatch.setattr(os.path, "relpath", refuse)
        note = json.loads(base_note(str(tmp_path), "4", tmp_path / "adapter.safetensors"))
        assert note["base_model_name_or_path"] == str(tmp_path)

    def test_a_name(self, tmp_path):
        path = tmp_path / "adapter.safetensors"
        self.save(path, base_note("Qwen/Qwen3-0.6B", "bf16", path))
        assert read_noted_base(path, read_notes(path)) == "Qwen/Qwen3-0.6B"
        assert read_noted_bits(read_notes(path)) == "bf16"

    def test_no_note(self, tmp_path):
        path = self.save(tmp_path / "adapter.safetensors", None)
        with pytest.raises(ArgumentError, match="notes no base that can be used; name it too"):
            read_noted_base(path, read_notes(path))

    @pytest.mark.parametrize("note", ["{", "[]", "{}", '{"base_model_name_or_path": 1}'])
    def test_a_note_that_says_nothing(self, tmp_path, note):
        path = self.save(tmp_path / "adapter.safetensors", note)
        with pytest.raises(ArgumentError, match="notes no base that can be used"):
            read_noted_base(path, read_notes(path))
