"""llama.cpp itself computes with LoRA folders that its own script has converted.

`python -m tests.llamacpp` runs these tests.

On tiny float32 models it must come to the numbers of `transformers`. On the quantised SmolLM2 its
kernels round activations too, so there its change of the logits is compared with ours, and its text
with what `transformers` finds likely.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import disha
from disha.finetune.base import load_base
from disha.interop import lora
from docs.demo import demo_words
from tests.conftest import perturb
from tests.finetune import tiny_gguf
from tests.finetune.tiny_gguf import HEAD_DIM

PROMPTS = (
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Water boils at a temperature of one hundred",
)
TOKENS = [5, 17, 100, 42, 7, 7, 201, 33]
SCRIPT = Path(os.environ["LLAMA_CPP"], "convert_lora_to_gguf.py")


def served(path: Path, adapter: Path | None = None, scale: float = 1.0) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path),
        lora_path=None if adapter is None else str(adapter),
        lora_scale=scale,
        n_ctx=128,
        n_threads=2,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # or else keys and values are rounded to 16 bits
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def converted(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    """Write an adapter as the guide says: as a LoRA folder, which llama.cpp's script converts."""
    lora.export(model, folder / "lora", pad=True, **options)
    # A GGUF file does not say the class of its model.
    model.config.architectures = model.config.architectures or ["LlamaForCausalLM"]
    model.config.save_pretrained(folder / "base")
    words = [folder / "lora", "--base", folder / "base", "--outfile", folder / "lora.gguf"]
    subprocess.run([sys.executable, SCRIPT, *words], check=True)
    return folder / "lora.gguf"


def their_logits(model: llama_cpp.Llama, tokens: list[int]) -> torch.Tensor:
    """Logits (time, vocabulary) by llama.cpp."""
    model.reset()
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)]))


def our_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def adapted(base, target, r, **options):
    return perturb(disha.inject_adapters(copy.deepcopy(base), target, r, **options))


# --- tiny models, in float32 ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return tiny_gguf.write_gguf(path, tiny_gguf.random_state(tied=False))


@pytest.fixture(scope="module")
def tiny_base(tiny):
    return load_base(str(tiny))[0]


def check_equal(path, adapter, ours, base, scale=1.0):
    expected, plain = our_logits(ours, TOKENS), our_logits(base, TOKENS)
    found = their_logits(served(path, adapter, scale), TOKENS)
    assert (expected - plain).norm() > 0.05 * plain.norm()
    assert (found - expected).norm() < 1e-4 * (expected - plain).norm()


def test_without_an_adapter_the_numbers_are_ours(tiny, tiny_base):
    expected = our_logits(tiny_base, TOKENS)
    assert (their_logits(served(tiny), TOKENS) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("all-linear", {}),
        ("self_attn", {"rank_pattern": {"q_proj": 3, "o_proj": 5}}),
        ("layers", {"r_out": 8}),
        ("mlp|k_proj", {"scale": -0.5, "rank_pattern": {"down": 12}}),
        ("lm_head|embed_tokens", {}),
        ("embed_tokens", {"r": 5, "scale": 3.0}),
    ],
    ids=["bone", "ranks", "tile", "scale", "head-and-embedding", "embedding"],
)
def test_adapters_act_as_ours(tmp_path, tiny, tiny_base, target, options):
    ours = adapted(tiny_base, target, **{"r": 8, **options})
    check_equal(tiny, converted(ours, tmp_path), ours, tiny_base)


def test_bat_of_full_rank_acts_as_ours(tmp_path, tiny, tiny_base):
    ours = adapted(tiny_base, "all-linear", 8, method="bat")
    for block in disha.adapter_parameters(ours):
        block.data.mul_(0.2)
    check_equal(tiny, converted(ours, tmp_path, rank=64), ours, tiny_base)


def test_llamas_own_scale_multiplies_ours(tmp_path, tiny, tiny_base):
    ours = adapted(tiny_base, "all-linear", 8, scale=0.5)
    path = converted(ours, tmp_path)
    disha.set_adapter_scale(ours, 0.25)
    check_equal(tiny, path, ours, tiny_base, scale=0.5)


def test_an_adapter_of_scale_zero_is_silent(tmp_path, tiny, tiny_base):
    path = converted(adapted(tiny_base, "all-linear", 8, scale=0.0), tmp_path)
    found = their_logits(served(tiny, path), TOKENS)
    torch.testing.assert_close(found, our_logits(tiny_base, TOKENS), atol=1e-2, rtol=1e-3)


def test_qwen2_keeps_the_usual_rows(tmp_path, tiny_base):
    """Without biases, Qwen2 is a Llama whose q and k stay as they are."""
    path = tmp_path / "qwen2.gguf"
    tiny_gguf.write_gguf(path, tiny_gguf.random_state(tied=False), architecture="qwen2")
    ours = adapted(tiny_base, "all-linear", HEAD_DIM // 2)
    ours.config.architectures = ["Qwen2ForCausalLM"]
    check_equal(path, converted(ours, tmp_path), ours, tiny_base)


def mixture(path):
    """A tiny Mixtral, and its GGUF file."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny_gguf.TOKENS),
        hidden_size=tiny_gguf.HIDDEN,
        intermediate_size=tiny_gguf.FEED_FORWARD,
        num_hidden_layers=tiny_gguf.LAYERS,
        num_attention_heads=tiny_gguf.HEADS,
        num_key_value_heads=tiny_gguf.KV_HEADS,
        num_local_experts=4,
        rms_norm_eps=tiny_gguf.EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": tiny_gguf.ROPE_BASE},
        initializer_range=0.2,
        architectures=["MixtralForCausalLM"],
    )
    model = MixtralForCausalLM(config).eval()
    state = dict(model.state_dict())
    for layer in range(tiny_gguf.LAYERS):
        stack = f"model.layers.{layer}.mlp.experts."
        gate, up = state.pop(f"{stack}gate_up_proj").chunk(2, dim=1)
        state |= {f"{stack}gate_proj.weight": gate, f"{stack}up_proj.weight": up}
        state[f"{stack}down_proj.weight"] = state.pop(f"{stack}down_proj")
    return model, tiny_gguf.write_gguf(path, state, experts=4)


def test_separate_experts_act_as_ours(tmp_path):
    base, path = mixture(tmp_path / "mixtral.gguf")
    ours = adapted(base, r"experts\.\w+_proj$|self_attn", 8, scale=0.5)
    check_equal(path, converted(ours, tmp_path, experts="separate"), ours, base)


# --- SmolLM2, quantised --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    return Path(demo_words()[1])


@pytest.fixture(scope="module")
def loaded(smollm):
    return load_base(str(smollm))


@pytest.fixture(scope="module")
def base(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def prompts(loaded):
    return [loaded[1](text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def ours(base):
    """A Bone adapter on every projection that changes the logits by about half their norm."""
    return perturb(disha.inject_adapters(copy.deepcopy(base), "layers", 16), size=0.02)


@pytest.fixture(scope="module")
def adapter(ours, tmp_path_factory):
    return converted(ours, tmp_path_factory.mktemp("smollm"))


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_the_next_token_moves_as_ours_does(smollm, adapter, base, ours, prompts):
    plain, with_adapter = served(smollm), served(smollm, adapter)
    for tokens in prompts:
        before, after = our_logits(base, tokens)[-1], our_logits(ours, tokens)[-1]
        expected = after - before
        found = their_logits(with_adapter, tokens)[-1] - their_logits(plain, tokens)[-1]
        size = (expected.norm() / before.norm()).item()
        print(f"change {size:.2f} of the logits, cosine {cosine(found, expected):.4f}")
        assert size > 0.1
        assert cosine(found, expected) > 0.98
        assert found.norm() == pytest.approx(expected.norm().item(), rel=0.1)


def test_greedy_text_agrees_up_to_quantization(smollm, adapter, base, ours, prompts):
    """llama.cpp's next token is ours, or one that ours holds as likely up to its own noise."""
    plain, with_adapter = served(smollm), served(smollm, adapter)
    same, total = 0, 0
    for tokens in prompts:
        noise = (their_logits(plain, tokens)[-1] - our_logits(base, tokens)[-1]).abs().max().item()
        text = list(tokens)
        for _ in range(12):
            text.append(int(their_logits(with_adapter, text)[-1].argmax()))
        likely = our_logits(ours, text)
        for position in range(len(tokens), len(text)):
            logits = likely[position - 1]
            assert logits.max() - logits[text[position]] < 2 * noise
            same += int(logits.argmax()) == text[position]
            total += 1
    print(f"{same} of {total} tokens are ours")
    assert same > 0.6 * total
