from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import disha
from disha.finetune.errors import CheckpointError
from disha.finetune.models.decoder import KeyValueCache
from disha.finetune.models.folder import FolderCheckpoint
from disha.finetune.models.gguf import GGUFCheckpoint
from tests.finetune import tiny_checkpoints, tiny_gguf
from tests.finetune.models.conftest import transformers_model

TEXT = "def greet(name):\n    # says hello, 12 times\n    return 'hello ' + name\n"


def random_tokens(batch, time, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(tiny_gguf.TOKENS), (batch, time), generator=generator)


@torch.inference_mode()
def test_logits_equal_transformers_on_the_demos_model(smollm, smollm_reference, smollm_tokenizer):
    tokens = torch.tensor([smollm_tokenizer.encode(TEXT * 4)])
    assert tokens.shape[1] > 80
    torch.testing.assert_close(smollm(tokens), smollm_reference(tokens).logits, rtol=0.0, atol=1e-3)


def test_names_equal_transformers_on_the_demos_model(smollm, smollm_reference):
    expected = {name: tuple(v.shape) for name, v in smollm_reference.state_dict().items()}
    assert {name: tuple(v.shape) for name, v in smollm.state_dict().items()} == expected


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_logits_equal_transformers_on_a_tiny_model(tmp_path, tied):
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=tied))
    tokens = torch.arange(60).reshape(2, 30)
    ours = GGUFCheckpoint(path).load_model(torch.float32)
    torch.testing.assert_close(
        ours(tokens), transformers_model(path)(tokens).logits, rtol=0.0, atol=1e-5
    )


@pytest.mark.parametrize("family", tiny_checkpoints.FAMILIES)
@torch.inference_mode()
def test_logits_and_names_of_every_family_equal_transformers(tiny_folder, family):
    reference = tiny_checkpoints.random_model(family)
    model = FolderCheckpoint(tiny_folder(family)).load_model(torch.float32)
    assert list(model.state_dict()) == list(reference.state_dict())
    tokens = random_tokens(2, 100)
    torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama2", {"head_dim": 24}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 1}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"layer_types": ["full_attention", "full_attention"]}),
    ],
)
@torch.inference_mode()
def test_what_configurations_may_ask_for_equals_transformers(tmp_path, family, changes):
    reference = tiny_checkpoints.random_model(family, **changes)
    path = tiny_checkpoints.write_folder(tmp_path / "model", family, **changes)
    model = FolderCheckpoint(path).load_model(torch.float32)
    tokens = random_tokens(2, 60)
    torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("family", tiny_checkpoints.FAMILIES)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), cached=st.booleans())
@settings(max_examples=8, deadline=None)
def test_packed_rows_compute_what_separate_rows_do(tiny_folder, family, lengths, cached):
    model = FolderCheckpoint(tiny_folder(family)).load_model(torch.float32)
    texts = [random_tokens(1, length, seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    cache = KeyValueCache() if cached else None
    with torch.inference_mode():
        packed = model(torch.cat(texts, dim=1), cache, positions)
        separate = torch.cat([model(text) for text in texts], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_packed_rows_of_different_cuts_lie_in_one_batch(tiny_folder):
    model = FolderCheckpoint(tiny_folder("mistral")).load_model(torch.float32)
    tokens = random_tokens(2, 40)
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(15), torch.arange(25)])])
    packed = model(tokens, None, positions)
    torch.testing.assert_close(packed[:1], model(tokens[:1]), rtol=1e-4, atol=1e-4)
    separate = torch.cat([model(tokens[1:, :15]), model(tokens[1:, 15:])], dim=1)
    torch.testing.assert_close(packed[1:], separate, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_packed_rows_do_not_go_on_from_a_cache(tiny_model):
    cache = KeyValueCache()
    tiny_model(torch.arange(4).unsqueeze(0), cache)
    with pytest.raises(ValueError, match="can't continue a cache"):
        tiny_model(torch.arange(4).unsqueeze(0), cache, torch.arange(4).unsqueeze(0))


@pytest.mark.parametrize(
    ("family", "length"), [("llama3", 60), ("qwen2", 60), ("mistral", tiny_checkpoints.WINDOW)]
)
@torch.inference_mode()
def test_plain_rows_need_no_mask(tiny_folder, monkeypatch, family, length):
    model = FolderCheckpoint(tiny_folder(family)).load_model(torch.float32)
    masks, attend = [], nn.functional.scaled_dot_product_attention

    def watched(*inputs, attn_mask, is_causal, **options):
        masks.append((attn_mask, is_causal))
        return attend(*inputs, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    model(random_tokens(1, length))
    model(random_tokens(1, length), KeyValueCache())
    assert masks == [(None, True)] * 4


@pytest.mark.parametrize("family", ["mistral", "llama3", "qwen3"])
def test_the_compiler_sees_one_graph(tiny_folder, family):
    model = FolderCheckpoint(tiny_folder(family)).load_model(torch.float32)
    tokens, positions = random_tokens(2, 30), torch.arange(30).expand(2, 30)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    packed = compiled(tokens, None, positions)
    torch.testing.assert_close(packed, model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "llama3", "qwen3"])
@torch.inference_mode()
def test_cached_steps_of_other_families(tiny_folder, family):
    model = FolderCheckpoint(tiny_folder(family)).load_model(torch.float32)
    tokens = random_tokens(1, 50)
    cache = KeyValueCache()
    pieces = [model(piece, cache) for piece in tokens.split([7, 1, 1, 20, 1, 14, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_cached_steps_give_the_logits_of_one_pass(tiny_model):
    tokens = torch.arange(3, 23).unsqueeze(0)
    cache = KeyValueCache()
    pieces = [tiny_model(piece, cache) for piece in tokens.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), tiny_model(tokens))
    assert cache.length == 20


@torch.inference_mode()
def test_padding_on_the_right_changes_no_real_position(tiny_model):
    tokens = torch.arange(10, 22).unsqueeze(0)
    padded = nn.functional.pad(tokens, (0, 9))
    torch.testing.assert_close(tiny_model(padded)[:, :12], tiny_model(tokens))


def test_a_tied_head_is_the_embedding(smollm):
    assert smollm.lm_head.weight is smollm.model.embed_tokens.weight


@torch.inference_mode()
def test_bfloat16_stays_close_to_float32(tiny_checkpoint):
    tokens = torch.arange(30).unsqueeze(0)
    exact = tiny_checkpoint.load_model(torch.float32)(tokens).log_softmax(-1)
    rounded = tiny_checkpoint.load_model(torch.bfloat16)(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float().log_softmax(-1) - exact).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kv_heads": 3}, "3 key/value heads must divide its 4 heads"),
        ({"head_dim": 15}, "even width, got 15"),
        ({"layers": 0}, "layers must be greater than 0, got 0"),
        ({"window": 0}, "sliding window must be greater than 0 tokens, got 0"),
        ({"rope_base": float("nan")}, "rope_base must be greater than 0, got nan"),
    ],
)
def test_sizes_that_make_no_model_are_refused(tiny_checkpoint, change, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        dataclasses.replace(tiny_checkpoint.config(), **change)
    assert isinstance(caught.value, (disha.DishaError, ValueError))
