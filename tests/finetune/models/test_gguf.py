from __future__ import annotations

import os
import shutil

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from disha import DishaError
from disha.finetune.errors import CheckpointError, UnsupportedModelError
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.models.gguf_header import read_header
from tests.finetune import tiny_checkpoints, tiny_gguf


def load(path, dtype=torch.float32):
    return GGUFCheckpoint(path).load_model(dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_weights_come_back_as_they_were_stored(tmp_path, kind, tied):
    state = tiny_gguf.random_state(tied=tied)
    model = load(tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state, kind=kind))
    loaded = model.state_dict()
    for name, values in state.items():
        stored = kind if values.ndim == 2 else Kind.F32
        # Rounding is by rows, so the order of rows makes no difference to it.
        torch.testing.assert_close(
            loaded[name], tiny_gguf.as_read(values, stored), rtol=0.0, atol=0.0, msg=name
        )
    assert model.config.tied_head is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_configuration_is_the_files(tiny_checkpoint):
    config = tiny_checkpoint.config()
    assert (config.hidden, config.feed_forward, config.layers) == (64, 96, 2)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.context, config.vocabulary) == (128, len(tiny_gguf.TOKENS))
    assert config.rope_base == 5000.0
    assert config.norm_epsilon == pytest.approx(1e-5)


def test_a_title_is_text_whatever_the_bytes_of_the_name(tiny_path, tmp_path):
    path = shutil.copy(tiny_path, tmp_path / os.fsdecode(b"m\xff\x1b.gguf"))
    assert GGUFCheckpoint(path).title == r"m\udcff\x1b"


def test_weights_are_in_the_dtype_asked_for(tiny_checkpoint):
    model = tiny_checkpoint.load_model(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_nothing_refers_to_the_file_after_loading(tmp_path):
    state = tiny_gguf.random_state(tied=True)
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state)
    model = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    torch.testing.assert_close(model.model.norm.weight.data, state["model.norm.weight"])


def test_defaults_of_keys_that_may_be_absent(tmp_path):
    absent = {"llama.rope.freq_base": None, "llama.rope.dimension_count": None}
    path = tiny_gguf.write_gguf(
        tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=absent
    )
    config = GGUFCheckpoint(path).config()
    assert (config.rope_base, config.head_dim) == (10000.0, 16)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_header_is_read_as_by_the_package(tmp_path, kind):
    metadata = {
        "a.flag": True,
        "a.number": 1.1,
        "a.text": "é\n",
        "a.numbers": [1, -(2**31), 2**31 - 1],
        "a.parts": [0.5, -1e30],
        "a.flags": [True, False],
    }
    state = tiny_gguf.random_state(tied=False)
    path = tiny_gguf.write_gguf(tmp_path / "a.gguf", state, kind=Kind[kind], metadata=metadata)
    header, reader = read_header(path), GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert header.values == {k: v for k, v in values.items() if not k.startswith("GGUF.")}
    assert {name: (t.kind, t.shape, t.start, t.nbytes) for name, t in header.tensors.items()} == {
        t.name: (t.tensor_type, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no file .*absent\.gguf"):
        GGUFCheckpoint(tmp_path / "absent.gguf")


def test_a_folder_is_told_from_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder; the base model must be one GGUF"):
        GGUFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a GGUF file: it begins with b''"),
        (b"PK\x03\x04 and more", r"is not a GGUF file: it begins with b'PK"),
        (b"GGUF", "damaged or cut short"),
        (b"GGUF" + b"\xff" * 60, "damaged or cut short"),
    ],
)
def test_what_is_not_gguf_is_refused(tmp_path, content, complaint):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        GGUFCheckpoint(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, DishaError)


@pytest.mark.parametrize("kept", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, tiny_path, kept):
    content = tiny_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged or cut short"):
        load(path)


@pytest.mark.parametrize("place", [8, 12, 16, 20, 24, 31, 40])
def test_a_damaged_header_is_refused(tmp_path, tiny_path, place):
    content = bytearray(tiny_path.read_bytes())
    content[place : place + 4] = b"\xff\xff\xff\x7f"
    path = tmp_path / "damaged.gguf"
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"damaged\.gguf"):
        load(path)


def test_another_architecture_is_named(tmp_path):
    path = tiny_gguf.write_gguf(
        tmp_path / "other.gguf", tiny_gguf.random_state(tied=True), architecture="gemma2"
    )
    with pytest.raises(CheckpointError, match=r"architecture 'gemma2'.*--model module:function"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn', which is not supported"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor = 1.2.*, which is not supported"),
        ({"llama.expert_count": 8}, "expert_count = 8, which is not supported"),
        ({"llama.attention.sliding_window": 64}, "sliding_window = 64, which is not supported"),
        ({"llama.attention.scale": 1.0}, "attention.scale = 1.0, which is not supported"),
        ({"llama.attention.sliding_window": 1}, "sliding_window = 1, which is not supported"),
        ({"llama.attention.causal": False}, "attention.causal = False, which is not supported"),
        ({"llama.final_logit_softcapping": 30.0}, "softcapping = 30.0, which is not supported"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_what_would_change_the_model_is_not_ignored(tmp_path, metadata, complaint):
    path = tiny_gguf.write_gguf(
        tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=metadata
    )
    with pytest.raises(CheckpointError, match=complaint):
        GGUFCheckpoint(path).config()


def test_neutral_values_of_such_keys_are_fine(tmp_path):
    neutral = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "llama.attention.scale": 0.0,
        "llama.residual_scale": 1.0,
    }
    path = tiny_gguf.write_gguf(
        tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=neutral
    )
    assert GGUFCheckpoint(path).config().layers == 2


@pytest.mark.parametrize("family", tiny_checkpoints.FAMILIES)
@torch.inference_mode()
def test_a_converted_model_of_every_family_computes_the_same(tmp_path, family):
    plain = {"sliding_window": None} if family == "mistral" else {}
    path = tiny_checkpoints.write_gguf(tmp_path / "tiny.gguf", family, **plain)
    reference = tiny_checkpoints.random_model(family, **plain)
    tokens = torch.arange(120).reshape(2, 60)
    model = GGUFCheckpoint(path).load_model(torch.float32)
    torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=0.0, atol=1e-4)


def test_biases_that_the_decoder_has_not_are_refused(tmp_path):
    biased = {"attention_bias": True, "mlp_bias": True}
    path = tiny_checkpoints.write_gguf(tmp_path / "tiny.gguf", "smollm2", **biased)
    with pytest.raises(CheckpointError, match=r"not expected: blk\.0\.attn_k\.bias"):
        GGUFCheckpoint(path).load_model(torch.float32)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "factor = 4.0"),
        ({"llama.rope.scaling.factor": 4.0}, "factor = 4.0"),
        ({"llama.rope.scale_linear": 2.0}, "scale_linear = 2.0"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
    ],
)
def test_linear_scaling_of_rotary_frequencies_is_refused(tmp_path, metadata, complaint):
    path = tiny_gguf.write_gguf(
        tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=metadata
    )
    if complaint is None:
        assert GGUFCheckpoint(path).config().rope_factors is None
        return
    with pytest.raises(UnsupportedModelError, match=f"{complaint}, which is not supported"):
        GGUFCheckpoint(path).config()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"extra": {"rope_freqs.weight": torch.ones(5)}}, r"rope_freqs\.weight has shape \(5,\)"),
        ({"extra": {"rope_freqs.weight": torch.zeros(8)}}, "numbers greater than 0"),
        (
            {
                "extra": {"rope_freqs.weight": torch.ones(8)},
                "metadata": {"llama.rope.scaling.factor": 2.0},
            },
            r"factor = 2\.0, which is not supported",
        ),
    ],
)
def test_listed_frequency_factors_that_make_no_sense(tmp_path, change, complaint):
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), **change)
    with pytest.raises(CheckpointError, match=complaint):
        GGUFCheckpoint(path).config()


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"llama.attention.head_count": None}, r"lacks the key llama\.attention\.head_co"),
        ({"llama.block_count": "two"}, "block_count must be one integer, found 'tw"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv must be one integer.*\[2, 1\]"),
        ({"llama.rope.freq_base": "big"}, "freq_base must be a number, found 'big'"),
        ({"llama.rope.dimension_count": 8}, "dimension_count = 8 but heads of width 16"),
        (
            {"llama.attention.head_count": 0, "llama.attention.key_length": 16},
            "heads must be greater than 0, got 0",
        ),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, complaint):
    path = tiny_gguf.write_gguf(
        tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=metadata
    )
    with pytest.raises(CheckpointError, match=complaint):
        GGUFCheckpoint(path).config()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"without": ["blk.1.ffn_up.weight"]},
            r"calls for; missing: blk\.1\.ffn_up\.weight\. It is damaged",
        ),
        ({"extra": {"blk.0.attn_k.bias": torch.ones(64)}}, r"not expected: blk\.0\.attn_k\.bias"),
        ({"without": ["token_embd.weight"]}, r"no tensor token_embd\.weight"),
        (
            {"without": ["token_embd.weight"], "extra": {"token_embd.weight": torch.ones(64)}},
            r"no tensor token_embd\.weight with a row for each token",
        ),
        ({"metadata": {"llama.block_count": 10**6}}, "1000000 layers, but holds 20 tensors only"),
        ({"metadata": {"llama.block_count": 3}}, r"missing: blk\.2\..* and 5 more"),
        (
            {
                "without": ["blk.1.ffn_norm.weight"],
                "extra": {"blk.7.ffn_norm.weight": torch.ones(64)},
                "metadata": {"llama.feed_forward_length": 128},
            },
            r"missing: blk\.1\.ffn_norm.*; not expected: blk\.7\.ffn_norm.*; of another shape: ",
        ),
        (
            {"metadata": {"llama.feed_forward_length": 128}},
            r"of another shape: .*blk\.0\.ffn_gate\.weight \(96, 64\) instead of \(128, 64\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, complaint):
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True), **change)
    with pytest.raises(CheckpointError, match=complaint):
        load(path)


def test_a_file_that_vanishes_before_it_is_read_is_named(tmp_path):
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", tiny_gguf.random_state(tied=True))
    checkpoint = GGUFCheckpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"can't read .*tiny\.gguf: No such file"):
        checkpoint.load_model(torch.float32)


def test_a_type_that_can_not_be_dequantised_is_named(tiny_checkpoint, monkeypatch):
    def refuse(stored, kind):
        raise NotImplementedError

    monkeypatch.setattr("gguf.quants.dequantize", refuse)
    with pytest.raises(CheckpointError, match=r"is of type F32, which can't be dequantised; use a"):
        tiny_checkpoint.load_model(torch.float32)


def test_a_file_that_can_not_be_read_is_named(tiny_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("disha.files.reading.open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"can't read .*\.gguf: Permission denied"):
        GGUFCheckpoint(tiny_path)
