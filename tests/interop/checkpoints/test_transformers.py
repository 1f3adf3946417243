"""Merged checkpoints of `transformers`, whose names and experts are stored in other ways."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
)

import disha
from disha import AdapterFileError, MergeError
from disha.interop.checkpoints import merge_into_checkpoint, misfits
from disha.interop.checkpoints.reading import open_checkpoint
from tests.base_checkpoints import base_state, tensors_in
from tests.conftest import assert_same, perturb
from tests.language_models import SIZES, gpt2, llama
from tests.reference import METHODS
from tests.whole.test_experts import build


def merge_in(folder):
    merge_into_checkpoint(folder / "base", folder / "adapter.safetensors", folder / "merged")


TOWER = {**SIZES, "image_size": 8, "patch_size": 4}


ROTATED = {"rope_type": "default", "mrope_section": [1, 1, 0]}  # which of a head's pairs turn


VISION = {  # text, tower
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **TOWER}),
    "gemma3": ({"head_dim": 4}, {"vision_use_head": False, **TOWER}),
    "qwen2_vl": ({"rope_scaling": ROTATED}, {"depth": 1, "embed_dim": 16, "hidden_size": 16}),
}


class TestTransformers:
    def merged(self, tmp_path, model, save, adapt, target, dtype=torch.float32, **arguments):
        """Merge into what `save` writes, in memory into `adapt`; return both, as one class."""
        model.to(dtype)
        save.save_pretrained(tmp_path / "base", max_shard_size="3KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        perturb(disha.inject_adapters(adapt, target, 5, **arguments))
        disha.save_adapter(adapt, tmp_path / "adapter.safetensors")
        merge_in(tmp_path)
        loaded = type(save).from_pretrained(tmp_path / "merged", dtype=dtype)
        disha.merge_adapters(adapt)
        return loaded, save

    def assert_same_model(self, loaded, model):
        assert_same(loaded.state_dict(), base_state(model))
        tokens = torch.arange(8).view(1, 8)
        model.eval()
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])

    @pytest.mark.parametrize(
        ("name", "method", "dtype"),
        [
            ("llama", "bone", torch.bfloat16),
            ("llama", "bat", torch.float32),
            ("gpt2", "bone", torch.float32),
            ("gpt2", "bat", torch.bfloat16),
        ],
    )
    def test_from_pretrained_reads_the_merged_model(self, tmp_path, name, method, dtype):
        model = {"gpt2": gpt2, "llama": llama}[name]()
        target = "all-linear"
        self.assert_same_model(
            *self.merged(tmp_path, model, model, model, target, dtype, method=method)
        )

    def test_an_adapter_of_the_inner_model(self, tmp_path):
        model = llama()
        self.assert_same_model(*self.merged(tmp_path, model, model, model.model, "proj"))

    def test_the_checkpoint_of_the_inner_model(self, tmp_path):
        model = llama()
        self.assert_same_model(*self.merged(tmp_path, model, model.model, model, "proj"))

    @pytest.mark.parametrize("name", VISION)
    def test_text_layers_that_have_other_names_in_the_model(self, tmp_path, name):
        text, tower = VISION[name]
        config = AutoConfig.for_model(name, text_config=SIZES | text, vision_config=tower)
        model = AutoModelForImageTextToText.from_config(config)
        merged = self.merged(tmp_path, model, model, model, "all-linear", also_train="norm")
        self.assert_same_model(*merged)

    @pytest.mark.parametrize("method", METHODS)
    def test_stacks_of_experts_that_have_other_names_in_the_model(self, tmp_path, method):
        sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = GraniteMoeForCausalLM(GraniteMoeConfig(**sizes))
        merged = self.merged(tmp_path, model, model, model, "experts|q_proj|router", method=method)
        stored = open_checkpoint(tmp_path / "base").files
        assert "model.layers.0.block_sparse_moe.input_linear.weight" in stored
        self.assert_same_model(*merged)

    def test_a_tied_embedding(self, tmp_path):
        model = llama(tie_word_embeddings=True, pad_token_id=None)
        self.assert_same_model(*self.merged(tmp_path, model, model, model, "embed_tokens"))

    def test_a_tied_embedding_without_its_head_is_refused(self, tmp_path):
        model = llama(tie_word_embeddings=True, pad_token_id=None)
        with pytest.raises(MergeError, match="tied to an output head"):
            self.merged(tmp_path, model, model, model, "embed_tokens", exclude="lm_head")


SINGLE_EXPERTS = {"Mixtral": "bone", "Qwen3-MoE": "bat", "DeepSeek-V3": "bone", "OLMoE": "bat"}
"""Models whose checkpoints store experts one by one."""


class TestExpertsStoredOneByOne:
    """`transformers` joins them as it loads the model, so the adapter names their stacks."""

    @staticmethod
    def saved(tmp_path, name, dtype=torch.float32, **arguments):
        """A model of which the base and an adapter are saved."""
        model = build(name, "eager").to(dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        stored = open_checkpoint(tmp_path / "base").files
        assert any(".experts.0." in key for key in stored)
        perturb(disha.inject_adapters(model, r"experts\.\w+_proj$|o_proj", 3, **arguments))
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        return model

    @pytest.mark.parametrize(("name", "method"), SINGLE_EXPERTS.items())
    def test_merging_writes_what_transformers_writes(self, tmp_path, name, method):
        dtype = torch.bfloat16 if name == "Mixtral" else torch.float32
        model = self.saved(tmp_path, name, dtype, method=method)
        assert misfits(tmp_path / "base", tmp_path / "adapter.safetensors") == []
        merge_in(tmp_path)
        disha.merge_adapters(model)
        model.save_pretrained(tmp_path / "expected", state_dict=base_state(model))
        assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "expected"))
        assert not torch.equal(*(
            next(value for key, value in tensors_in(tmp_path / folder).items() if ".1.w3" in key
                 or ".1.up_proj" in key)
            for folder in ("base", "merged")
        ))  # fmt: skip

    def test_a_stack_that_is_saved_beside_the_blocks(self, tmp_path):
        model = self.saved(tmp_path, "Qwen3-MoE")
        disha.remove_adapters(model)
        disha.inject_adapters(model, "o_proj", 3, also_train=r"experts\.gate_up_proj")
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj.add_(1)
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        merge_in(tmp_path)
        before, after = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "merged")
        for key, value in before.items():
            expected = value + (".experts." in key and "down" not in key)
            torch.testing.assert_close(after[key], expected, rtol=0, atol=0)

    def test_other_experts_are_another_base(self, tmp_path):
        self.saved(tmp_path, "OLMoE")
        state = tensors_in(tmp_path / "base")
        key = next(key for key in state if ".experts.3.gate_proj" in key)
        save_file(state | {key: state[key] + 1}, tmp_path / "other.safetensors")
        [wrong] = misfits(tmp_path / "other.safetensors", tmp_path / "adapter.safetensors")
        assert wrong.startswith("model.layers.0.mlp.experts.gate_up_proj: has other values")

    def test_quantized_and_missing_experts_are_named(self, tmp_path):
        self.saved(tmp_path, "Qwen3-MoE")
        path, adapter = tmp_path / "other.safetensors", tmp_path / "adapter.safetensors"
        state = {
            key: value.to(torch.float8_e4m3fn) if ".experts." in key else value
            for key, value in tensors_in(tmp_path / "base").items()
        }
        save_file(state, path)
        found = misfits(path, adapter)
        assert [one.partition(": is quantised")[0].rpartition(".")[2] for one in found] == [
            "gate_up_proj",
            "down_proj",
        ]
        del state[next(key for key in state if ".experts.0.down_proj" in key)]
        save_file(state, path)
        with pytest.raises(AdapterFileError, match=r"lacks model\.layers\.0\.mlp\.experts\.down_"):
            misfits(path, adapter)
