from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from disha.finetune.errors import CheckpointError, UnsupportedModelError
from disha.finetune.models.families import config_from_json
from disha.finetune.models.rope import llama3_factors

PATH = Path("model/config.json")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The keys of well-known models' files, as they were published.
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
LLAMA_3_1 = {
    **TINY_LLAMA,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "eos_token_id": [128001, 128008, 128009],
}
MISTRAL = {**TINY_LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {
    **TINY_LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "max_window_layers": 21,
    "model_type": "qwen2",
    "sliding_window": 32768,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3 = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "model_type": "qwen3",
    "sliding_window": None,
}
ALL = (TINY_LLAMA, LLAMA_3_1, MISTRAL, QWEN2, QWEN3)


def config(fields, *without, **changes):
    kept = {key: value for key, value in fields.items() if key not in without}
    return config_from_json(json.loads(json.dumps({**kept, **changes})), PATH)


@pytest.mark.parametrize("fields", ALL, ids=lambda fields: fields["model_type"])
def test_sizes_are_what_transformers_takes_them_for(fields):
    """Also where keys are left out, and defaults step in."""
    optional = ("num_key_value_heads", "max_position_embeddings", "rope_theta", "head_dim")
    for left_out in ((), optional, ("rms_norm_eps", "tie_word_embeddings", "sliding_window")):
        ours = config(fields, *left_out, num_attention_heads=32)
        kept = {key: value for key, value in fields.items() if key not in left_out}
        theirs = AutoConfig.for_model(**json.loads(json.dumps(kept)))
        assert ours.kv_heads == theirs.num_key_value_heads
        assert ours.context == theirs.max_position_embeddings
        assert ours.norm_epsilon == theirs.rms_norm_eps
        assert ours.tied_head == theirs.tie_word_embeddings
        assert ours.rope_base == theirs.rope_parameters["rope_theta"]
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // 32
        assert ours.head_dim == head_dim
        window = getattr(theirs, "sliding_window", None)
        assert ours.window == window


def test_rope_settings_in_the_older_and_the_newer_spelling():
    factors = llama3_factors(128, 5e5, 8.0, 1.0, 4.0, 8192)
    older = config(LLAMA_3_1)
    newer = config(
        LLAMA_3_1, "rope_scaling", "rope_theta", rope_parameters={**LLAMA3, "rope_theta": 5e5}
    )
    assert older.rope_factors == newer.rope_factors == factors
    assert older.rope_base == newer.rope_base == 5e5
    oldest = config(LLAMA_3_1, rope_scaling={**LLAMA3, "type": "llama3", "rope_type": "llama3"})
    assert oldest == older


def test_the_unscaled_context_may_be_outside_or_left_out():
    left_out = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    outside = config(LLAMA_3_1, rope_scaling=left_out, original_max_position_embeddings=4096)
    assert outside.rope_factors == llama3_factors(128, 5e5, 8.0, 1.0, 4.0, 4096)
    nowhere = config(LLAMA_3_1, rope_scaling=left_out)
    assert nowhere.rope_factors == llama3_factors(128, 5e5, 8.0, 1.0, 4.0, 131072)


def test_only_qwen2_has_biases_and_only_qwen3_normalises_heads():
    found = [(one.qkv_bias, one.head_norm) for one in map(config, ALL)]
    assert found == [(False, False)] * 3 + [(True, False), (False, True)]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "smollm3", None, 3])
def test_another_architecture_is_named_with_the_way_out(name):
    with pytest.raises(CheckpointError) as caught:
        config(TINY_LLAMA, model_type=name)
    message = str(caught.value)
    assert f"architecture {name!r}" in message
    extra = "pip install 'disha-torch[transformers]'"
    for supported in ("llama", "mistral", "qwen2", "qwen3", "SmolLM2", "--model module:", extra):
        assert supported in message


@pytest.mark.parametrize(
    ("fields", "changes", "complaint"),
    [
        (TINY_LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (TINY_LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        (TINY_LLAMA, {"logit_scale": 0.1}, r"logit_scale = 0\.1"),
        (TINY_LLAMA, {"attention_multiplier": 0.5}, r"attention_multiplier = 0\.5"),
        (TINY_LLAMA, {"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0"),
        (TINY_LLAMA, {"attention_dropout": 0.1}, r"attention_dropout = 0\.1"),
        (TINY_LLAMA, {"num_local_experts": 8}, "num_local_experts = 8"),
        (QWEN2, {"use_mrope": True}, "use_mrope = True"),
        (TINY_LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "ForSequenceClassif"),
        (TINY_LLAMA, {"architectures": True}, "architectures = True"),
        (TINY_LLAMA, {"quantization_config": {"bits": 4}}, "quantised already.*--bits 8 or --bit"),
        (TINY_LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = .*dyna"),
        (QWEN2, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling = .*yarn"),
        (QWEN2, {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters = .*longrope"),
        (QWEN3, {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 22}, "layer_types = .*chunked_attention"),
        (
            QWEN2,
            {"layer_types": ["sliding_attention"] * 22},
            "supported is 'full_attention' in all",
        ),
        (QWEN2, {"layer_types": "full_attention"}, "supported is 'full_attention' in all"),
        (
            MISTRAL,
            {"layer_types": ["full_attention"] * 21 + ["sliding_attention"]},
            "supported is 'sliding_attention' in all layers",
        ),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN3, {"attention_bias": True}, "attention_bias = True"),
        (TINY_LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
        (TINY_LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*lin"),
    ],
)
def test_what_would_change_the_model_is_not_ignored(fields, changes, complaint):
    with pytest.raises(UnsupportedModelError, match=complaint) as caught:
        config(fields, **changes)
    assert str(PATH) in str(caught.value)
    assert "pip install 'disha-torch[transformers]'" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 2},
        {"attention_dropout": 0.0},
        {"partial_rotary_factor": 1.0},
        {"hidden_act": "swish"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"something_new": [1, {"two": 3}]},
        {"layer_types": ["full_attention"] * 22},
    ],
)
def test_what_changes_nothing_is_fine(changes):
    assert config(TINY_LLAMA, **changes) == config(TINY_LLAMA)


@pytest.mark.parametrize(
    ("without", "changes", "complaint"),
    [
        (["hidden_size"], {}, "lacks the key hidden_size"),
        ([], {"num_hidden_layers": "22"}, "num_hidden_layers must be one integer, found '22'"),
        ([], {"num_hidden_layers": True}, "num_hidden_layers must be one integer, found True"),
        ([], {"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number, found 'tiny'"),
        ([], {"rope_theta": float("inf")}, "rope_theta must be finite"),
        ([], {"rope_theta": 10**400}, "rope_theta must be finite"),
        ([], {"hidden_size": 32 * 10**30}, "hidden must be at most 1048576, got 32000"),
        ([], {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for all layers"),
        ([], {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ([], {"rope_scaling": "llama3"}, "rope_scaling = 'llama3'.*one object for"),
        ([], {"rope_scaling": {"type": "llama3"}}, "lacks the key factor"),
        ([], {"rope_scaling": {**LLAMA3, "factor": -1}}, "must be greater than 0"),
        ([], {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor below high"),
        ([], {"num_attention_heads": 30}, "can't be divided among its 30 heads"),
        ([], {"num_attention_heads": 0}, "can't be divided among its 0 heads"),
        ([], {"head_dim": 33}, "heads of even width, got 33"),
        ([], {"num_key_value_heads": 5}, "5 key/value heads must divide its 32 heads"),
        ([], {"vocab_size": -1}, "vocabulary must be greater than 0"),
        ([], {"num_hidden_layers": 10**12}, "layers must be at most 1048576"),
        ([], {"num_hidden_layers": 10**400}, "layers must be at most 1048576"),
    ],
)
def test_keys_that_are_missing_or_wrong_are_named(without, changes, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        config(TINY_LLAMA, *without, **changes)


def test_a_number_of_layers_beyond_reason_makes_no_list_of_them():
    """Mistral has a window in all of its layers."""
    with pytest.raises(CheckpointError, match="layers must be at most 1048576"):
        config(MISTRAL, num_hidden_layers=10**12)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 3, 10**12, 10**400, "", "llama", "silu"]),
    st.floats(),
    st.lists(st.sampled_from(["full_attention", 1, None, []]), max_size=2),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor"]),
        st.sampled_from(["llama3", "linear", None, -1, 2.0, {}]),
        max_size=3,
    ),
)
KEYS = sorted({key for fields in ALL for key in fields} | {"layer_types", "rope_parameters"})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ALL), st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=3))
def test_whatever_stands_in_the_file_is_understood_or_refused(fields, changes):
    """Never anything but a decoder or one line that says what is wrong."""
    with contextlib.suppress(CheckpointError):
        config(fields, **changes)
