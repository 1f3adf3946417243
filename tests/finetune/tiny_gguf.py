"""A Llama small enough to train in a second, and GGUF files of it and its kin, from scratch.

The file is made the way converters make them, from a state dict under the usual names: q and k
rows of a Llama are put into GGUF's order here, independently of the code under test.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 64, 96, 2, 4, 2, 16, 128
ROPE_BASE, EPSILON = 5000.0, 1e-5

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġ Ġ")
TOKENS = (*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES))
METADATA: Mapping[str, object] = {
    "llama.block_count": LAYERS,
    "llama.context_length": CONTEXT,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": EPSILON,
    "llama.rope.freq_base": ROPE_BASE,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": list(TOKENS),
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": list(MERGES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def random_state(*, tied: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the usual names; a tied model has no head of its own."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    state = {"model.embed_tokens.weight": weight(len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        state |= {
            f"{prefix}self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}mlp.gate_proj.weight": weight(FEED_FORWARD, HIDDEN),
            f"{prefix}mlp.up_proj.weight": weight(FEED_FORWARD, HIDDEN),
            f"{prefix}mlp.down_proj.weight": weight(HIDDEN, FEED_FORWARD),
            f"{prefix}input_layernorm.weight": 1 + weight(HIDDEN),
            f"{prefix}post_attention_layernorm.weight": 1 + weight(HIDDEN),
        }
    state["model.norm.weight"] = 1 + weight(HIDDEN)
    if not tied:
        state["lm_head.weight"] = weight(len(TOKENS), HIDDEN)
    return state


def write_gguf(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    architecture: str = "llama",
    experts: int = 0,
    kind: str = "F32",
) -> Path:
    """Write weights under the usual names as a GGUF file, with matrices quantised to a kind."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in METADATA.items():
        _add(writer, _under(architecture, key), value)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for name, values in state.items():
        rows = _gguf_rows(name, values) if architecture == "llama" else values
        stored = gguf.GGMLQuantizationType[kind if rows.dim() == 2 else "F32"]
        quantized = gguf.quants.quantize(rows.contiguous().numpy(), stored)
        writer.add_tensor(_gguf_name(name), quantized, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _under(architecture: str, key: str) -> str:
    prefix = "llama."
    return f"{architecture}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def _gguf_rows(name: str, values: Tensor) -> Tensor:
    """GGUF's row 2i + half of a head is the usual row half * head_dim / 2 + i."""
    if not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return values
    rows = torch.empty_like(values)
    for head in range(values.shape[0] // HEAD_DIM):
        for half in range(2):
            for i in range(HEAD_DIM // 2):
                source = head * HEAD_DIM + half * HEAD_DIM // 2 + i
                rows[head * HEAD_DIM + 2 * i + half] = values[source]
    return rows
