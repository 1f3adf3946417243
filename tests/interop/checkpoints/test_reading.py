"""What a base checkpoint is, and what is none."""

import pytest
import torch
from safetensors.torch import save_file

from disha import AdapterFileError, AdapterIOError
from disha.interop.checkpoints.reading import open_checkpoint


class TestReading:
    def test_one_file_goes_before_shards_as_in_transformers(self, setting):
        save_file({"only": torch.ones(2)}, setting.base / "model.safetensors")
        assert list(open_checkpoint(setting.base).files) == ["only"]

    def test_what_is_no_checkpoint(self, setting):
        gguf = setting.folder / "model.gguf"
        gguf.write_bytes(b"GGUF")
        for path in (setting.folder, setting.folder / "nowhere", gguf):
            with pytest.raises(AdapterIOError, match=r"holds neither|can't read"):
                open_checkpoint(path)
        config = setting.base / "config.json"
        config.write_text("[")
        with pytest.raises(AdapterFileError, match=r"config.json is no JSON object"):
            open_checkpoint(setting.base).config()
        config.unlink()
        shard = next(setting.base.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(AdapterFileError, match="not a complete safetensors file"):
            setting.merge()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{", "is no JSON object"),
            ("[5]", "is no JSON object"),
        ],
    )
    def test_a_damaged_index(self, tmp_path, text, says):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(AdapterFileError, match=says):
            open_checkpoint(tmp_path)
