from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import disha
from disha.finetune.errors import CheckpointError
from disha.finetune.models.decoder import IGNORED, KeyValueCache, generate_greedily
from disha.finetune.models.gguf import GGUFCheckpoint
from tests.finetune import tiny_gguf

TEXT = "def greet(name):\n    # says hello, 12 times\n    return 'hello ' + name\n"


def reference(path):
    """The model that transformers reads from the same file."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def smollm_reference(smollm_path):
    return reference(smollm_path)


def cache_for(model, capacity):
    return KeyValueCache(
        model.config, batch=1, capacity=capacity, dtype=torch.float32, device=torch.device("cpu")
    )


@torch.inference_mode()
def test_logits_equal_transformers_on_the_demos_model(smollm, smollm_reference, smollm_tokenizer):
    tokens = torch.tensor([smollm_tokenizer.encode(TEXT * 4)])
    assert tokens.shape[1] > 80
    torch.testing.assert_close(smollm(tokens), smollm_reference(tokens).logits, rtol=0.0, atol=1e-3)


def test_names_equal_transformers_on_the_demos_model(smollm, smollm_reference):
    expected = {name: tuple(v.shape) for name, v in smollm_reference.state_dict().items()}
    assert {name: tuple(v.shape) for name, v in smollm.state_dict().items()} == expected


@torch.inference_mode()
def test_generation_equals_transformers_on_the_demos_model(
    smollm, smollm_reference, smollm_tokenizer
):
    prompt = smollm_tokenizer.encode(TEXT)
    expected = smollm_reference.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0
    )[0, len(prompt) :]
    assert list(generate_greedily(smollm, prompt, max_new_tokens=12)) == expected.tolist()


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_logits_equal_transformers_on_a_tiny_model(tmp_path, tied):
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=tied))
    tokens = torch.arange(60).reshape(2, 30)
    ours = GGUFCheckpoint.open(path).load_model(torch.float32)
    torch.testing.assert_close(ours(tokens), reference(path)(tokens).logits, rtol=0.0, atol=1e-5)


@torch.inference_mode()
def test_cached_steps_give_the_logits_of_one_pass(tiny_model):
    tokens = torch.arange(3, 23).unsqueeze(0)
    cache = cache_for(tiny_model, 20)
    pieces = [tiny_model(piece, cache) for piece in tokens.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), tiny_model(tokens))
    assert cache.length == 20


@torch.inference_mode()
def test_generation_equals_recomputing_every_prefix(tiny_model):
    prompt = [5, 6, 7, 8]
    expected = list(prompt)
    for _ in range(10):
        expected.append(int(tiny_model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate_greedily(tiny_model, prompt, max_new_tokens=10)) == expected[4:]


def test_generation_ends_before_the_stop_token(tiny_model):
    free = list(generate_greedily(tiny_model, [5, 6, 7], max_new_tokens=8))
    stopped = list(generate_greedily(tiny_model, [5, 6, 7], max_new_tokens=8, stop=free[3]))
    assert stopped == free[: free.index(free[3])]


@torch.inference_mode()
def test_padding_on_the_right_changes_no_real_position(tiny_model):
    tokens = torch.arange(10, 22).unsqueeze(0)
    padded = nn.functional.pad(tokens, (0, 9))
    torch.testing.assert_close(tiny_model(padded)[:, :12], tiny_model(tokens))


@torch.inference_mode()
def test_summed_loss_counts_labelled_positions_only(tiny_model):
    tokens = torch.arange(40).reshape(2, 20)
    labels = torch.full_like(tokens, IGNORED)
    labels[0, 3:7] = torch.tensor([9, 8, 7, 6])
    labels[1, 19] = 11
    chances = tiny_model(tokens).log_softmax(-1)
    expected = -sum(
        chances[row, place, labels[row, place]]
        for row, place in (labels != IGNORED).nonzero().tolist()
    )
    torch.testing.assert_close(tiny_model.summed_loss(tokens, labels), expected)


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
        ({"rope_base": float("nan")}, "rope_base must be greater than 0, got nan"),
    ],
)
def test_sizes_that_make_no_model_are_refused(tiny_checkpoint, change, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        dataclasses.replace(tiny_checkpoint.config(), **change)
    assert isinstance(caught.value, (disha.DishaError, ValueError))
