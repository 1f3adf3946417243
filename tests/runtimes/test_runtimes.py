"""vLLM and SGLang read and check what is exported: `python -m tests.runtimes`.

Each of them turns a folder into the factors of its own layers. The updates that these stand for
must be the adapter's.
"""

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from disha.interop import lora
from disha.interop.low_rank import SERVED_RANKS
from disha.layers.adapted import AdaptedLayer
from tests.interop.test_experts import EXPERTS, ONLY_EXPERTS, WITH_ATTENTION, adapted, build
from tests.language_models import SIZES, llama
from tests.runtimes.sources import from_sources

FOLDER = Path(os.environ["RUNTIMES"])
MODELS = {
    "Mixtral": ("mixtral", "MixtralForCausalLM"),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "GPT-OSS": ("gpt_oss", "GptOssForCausalLM"),
    "Llama": ("llama", "LlamaForCausalLM"),
}
EXPERT_NAMES = {"Mixtral": ("w1", "w2", "w3")}
"""What vLLM's mixtral.py names as `ckpt_names`."""

USUAL_NAMES = ("gate_proj", "down_proj", "up_proj")
"""The default of `ckpt_names`."""


def vllm(module: str) -> Any:
    found = from_sources(FOLDER, f"vllm.{module}")
    if hasattr(found, "PIN_MEMORY"):
        found.PIN_MEMORY = False  # there is no GPU to pin memory for
    return found


def sglang(module: str) -> Any:
    return from_sources(FOLDER, f"sglang.srt.{module}")


def updates(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of an adapter with their updates."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            own = module.disha["default"]
            stacks = [one for one in ("gate_up_proj", "down_proj") if hasattr(own, one)]
            blocks = {f"{name}.{one}": getattr(own, one) for one in stacks} or {name: own}
            for weight, block in blocks.items():
                yield weight, module.delta_weight(block).detach() * block.scale


def halves(name: str, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of gate and up in the update of a stack."""
    if name == "GPT-OSS":
        return gate_up[:, ::2], gate_up[:, 1::2]
    gate, up = gate_up.chunk(2, dim=1)
    return gate, up


def stacks(name: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The updates of both stacks, as (expert, out, in)."""
    found = dict(updates(model))
    both = (found[f"model.layers.0.mlp.experts.{one}"] for one in ("gate_up_proj", "down_proj"))
    gate_up, down = (one.mT if name == "GPT-OSS" else one for one in both)
    return gate_up, down


# --- vLLM ----------------------------------------------------------------------------------------


def in_vllm(folder: Path, name: str, max_rank: int = 16) -> dict[str, Any]:
    """Read a folder as vLLM's `WorkerLoRAManager._load_adapter` does; name -> factors."""
    file, cls = MODELS[name]
    model = getattr(vllm(f"model_executor.models.{file}"), cls)
    settings = vllm("lora.peft_helper").PEFTHelper.from_local_dir(str(folder), None)
    settings.validate_legal(SimpleNamespace(max_lora_rank=max_rank))
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    loaded = vllm("lora.lora_model").LoRAModel.from_local_checkpoint(
        str(folder),
        expected_by_vllm(name, model),
        peft_helper=settings,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
        model_vocab_size=SIZES["vocab_size"],
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    return loaded.loras


def expected_by_vllm(name: str, model: Any) -> set[str]:
    """The modules that vLLM accepts for a model: its linear layers, packed ones by their parts."""
    expected = {"o_proj", "down_proj", *getattr(model, "embedding_modules", {})}
    for parts in model.packed_modules_mapping.values():
        expected.update(parts)
    if name != "Llama":
        expected.add("experts")
    if name in ("Mixtral", "Qwen3-MoE"):
        assert getattr(model, "is_3d_moe_weight", False) is not True
        names = EXPERT_NAMES.get(name, USUAL_NAMES)
        expected.update(f"experts.{i}.{one}" for i in range(EXPERTS) for one in names)
    return expected


def check_dense_in_vllm(loaded: dict[str, Any], model: nn.Module) -> None:
    checked = 0
    for name, delta in updates(model):
        if ".experts." in name:
            continue
        found = loaded[name] if name in loaded else loaded[name.replace(".self_attn.", ".attn.")]
        expected = delta.T if "embed" in name else delta
        torch.testing.assert_close(found.scaling * found.lora_b @ found.lora_a, expected)
        checked += 1
    assert checked == sum("experts" not in name for name in loaded)


def test_the_ranks_to_pad_to_are_those_of_vllm():
    allowed = get_args(vllm("config.lora").MaxLoRARanks)
    assert set(SERVED_RANKS) == set(allowed) - {1}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_a_llama_in_vllm(tmp_path, tied, pad):
    base = llama(tie_word_embeddings=tied).eval()
    options: dict[str, Any] = {"rank_pattern": {"q_proj": 3, "o_proj": 9}, "scale": 0.5}
    ours = adapted(base, "all-linear" if tied else "layers|embed_tokens|lm_head", 4, **options)
    lora.export(ours, tmp_path, pad=pad)
    check_dense_in_vllm(in_vllm(tmp_path, "Llama"), ours)


def test_ranks_above_16_need_the_flag_in_vllm(tmp_path):
    base = llama(hidden_size=32, num_attention_heads=8).eval()
    ours = adapted(base, "q_proj", 18)
    lora.export(ours, tmp_path)
    with pytest.raises(ValueError, match="rank 18 is greater than max_lora_rank 16"):
        in_vllm(tmp_path, "Llama")
    check_dense_in_vllm(in_vllm(tmp_path, "Llama", max_rank=32), ours)


def test_what_was_trained_beside_is_refused_by_vllm(tmp_path):
    ours = adapted(llama().eval(), "q_proj", 4, also_train="norm")
    lora.export(ours, tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        in_vllm(tmp_path, "Llama")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize("pad", [False, True])
def test_separate_experts_in_vllm(tmp_path, name, pad):
    ours = adapted(build(name, "eager"), rank_pattern={"down": 5}, scale=0.5)
    lora.export(ours, tmp_path, experts="separate", pad=pad)
    loaded = in_vllm(tmp_path, name)
    check_dense_in_vllm(loaded, ours)
    block = "block_sparse_moe" if name == "Mixtral" else "mlp"
    owner = f"model.layers.0.{block}.experts"
    names = EXPERT_NAMES.get(name, USUAL_NAMES)
    each = [loaded[f"{owner}.{i}.{one}"] for i in range(EXPERTS) for one in names]
    packed = vllm("lora.lora_weights").PackedLoRALayerWeights.pack_moe(each, owner).optimize()
    gate_up, down = stacks(name, ours)
    gate, up = halves(name, gate_up)
    for a, b, delta in zip(packed.lora_a, packed.lora_b, (gate, down, up), strict=True):
        torch.testing.assert_close(b @ a, delta)


def test_stacked_experts_are_refused_for_other_models_by_vllm(tmp_path, monkeypatch):
    lora.export(adapted(build("Mixtral", "eager"), ONLY_EXPERTS), tmp_path)
    loaded = in_vllm(tmp_path, "Mixtral")
    layers = vllm("lora.model_manager")
    manager = SimpleNamespace(
        _enable_mixed_moe_lora_format=False,
        modules={"model.layers.0.mlp.experts": layers.FusedMoEWithLoRA},
        _get_lora_layer_weights=lambda lora_model, name: lora_model.loras.get(name),
    )
    # The kinds of layers that its models have: this is one of separate experts.
    monkeypatch.setattr(layers, "FusedMoEWithLoRA", type)
    monkeypatch.setattr(layers, "FusedMoE3DWithLoRA", tuple)
    found = SimpleNamespace(id=1, loras=loaded)
    with pytest.raises(ValueError, match="contains fused 3D MoE weights"):
        layers.LoRAModelManager._validate_moe_lora_format(manager, found)


def test_stacked_experts_of_gpt_oss_in_vllm(tmp_path):
    ours = adapted(build("GPT-OSS", "eager"), rank_pattern={"down": 5}, scale=0.5)
    lora.export(ours, tmp_path)
    loaded = in_vllm(tmp_path, "GPT-OSS")
    check_dense_in_vllm(loaded, ours)
    manager = SimpleNamespace(
        _is_3d_moe_model=True,
        _get_lora_layer_weights=lambda lora_model, name: lora_model.loras.get(name),
    )
    module = SimpleNamespace(
        w13_lora_a_stacked=[torch.empty(1, EXPERTS)], global_num_experts=EXPERTS, ep_rank=0
    )
    owner = "model.layers.0.mlp.experts"
    scales = [loaded[one].scaling for one in (f"{owner}.base_layer", owner)]
    stack = vllm("lora.model_manager").LoRAModelManager._stack_moe_lora_weights
    stack(manager, SimpleNamespace(loras=loaded), module, owner)
    both = zip(loaded[owner].lora_a, loaded[owner].lora_b, stacks("GPT-OSS", ours), strict=True)
    for scale, (a, b, delta) in zip(scales, both, strict=True):
        torch.testing.assert_close(scale * b @ a, delta)


# --- SGLang --------------------------------------------------------------------------------------


def in_sglang(folder: Path, base: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a folder as SGLang does; the name of each of its layers -> scaled B, and A."""
    config = sglang("lora.lora_config").LoRAConfig(str(folder))
    assert isinstance(config.target_modules, list)
    targets = sglang("lora.utils").get_normalized_target_modules(config.target_modules)
    assert targets <= sglang("lora.utils")._KNOWN_LORA_TARGET_MODULES
    adapter = sglang("lora.lora").LoRAAdapter("a", config, base.config, None, None)
    file = folder / "adapter_model.safetensors"
    adapter.initialize_weights_from_tensors(safetensors.torch.load_file(file))
    tensors = {key: one for layer in adapter.layers for key, one in layer.weights.items()}
    tensors |= adapter.embedding_layers
    found = {}
    for key, a in tensors.items():
        kind = sglang("lora.utils").get_target_module_name(key, targets)  # raises if there is none
        if "_A" not in key:
            continue
        parts = sglang("lora.utils").get_stacked_multiply(kind)
        assert a.shape[0] == parts * config.r  # as the memory pool asserts
        name = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", key)
        b = tensors[key.replace("lora_A", "lora_B").replace("_embedding_A", "_embedding_B")]
        found[name.removeprefix("base_model.model.")] = (adapter.scaling * b, a)
    return found


def product(factors: tuple[Tensor, Tensor], sizes: list[int]) -> Tensor:
    """The update of a layer of SGLang whose outputs have these parts, each with its own A."""
    b, a = factors
    parts = zip(b.split(sizes), a.chunk(len(sizes)), strict=True)
    return torch.cat([each_b @ each_a for each_b, each_a in parts])


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_in_sglang(tmp_path, tied):
    base = llama(tie_word_embeddings=tied).eval()
    target = "layers" if tied else "layers|embed_tokens|lm_head"
    ours = adapted(base, target, 4, rank_pattern={"q_proj": 3, "o_proj": 9}, scale=0.5)
    lora.export(ours, tmp_path, pad=True)
    found, expected = in_sglang(tmp_path, base), dict(updates(ours))
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, factors in found.items():
        owner, _, last = name.rpartition(".")
        parts = [expected.pop(f"{owner}.{one}") for one in joined[last]] if last in joined else []
        parts = parts or [expected.pop(name)]
        delta = parts[0].T if "embed" in name else torch.cat(parts)
        sizes = [len(one) for one in parts] if last in joined else [len(factors[0])]
        torch.testing.assert_close(product(factors, sizes), delta)
    assert not expected


def test_sglang_reads_one_rank_for_all_layers(tmp_path):
    base = llama().eval()
    ours = adapted(base, r"q_proj|k_proj|v_proj|o_proj", 4, rank_pattern={"o_proj": 9})
    lora.export(ours, tmp_path)
    with pytest.raises(AssertionError):
        in_sglang(tmp_path, base)


def test_sglang_needs_v_where_q_is_adapted(tmp_path):
    base = llama().eval()
    lora.export(adapted(base, "q_proj", 4), tmp_path)
    with pytest.raises(KeyError, match="v_proj"):
        in_sglang(tmp_path, base)


def test_sglang_finds_no_place_for_stacked_experts(tmp_path):
    base = build("Mixtral", "eager")
    lora.export(adapted(base, ONLY_EXPERTS), tmp_path)
    with pytest.raises(ValueError, match="Cannot find target module"):
        in_sglang(tmp_path, base)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_separate_experts_in_sglang(tmp_path, name):
    base = build(name, "eager")
    ours = adapted(copy.deepcopy(base), WITH_ATTENTION, rank_pattern={"down": 5}, scale=0.5)
    lora.export(ours, tmp_path, experts="separate", pad=True)
    found = in_sglang(tmp_path, base)
    gate_up, down = stacks(name, ours)
    halved = torch.cat(halves(name, gate_up), dim=1)
    block = "block_sparse_moe" if name == "Mixtral" else "mlp"
    layer = SimpleNamespace(
        intermediate_size_per_partition=down.shape[2],
        _uses_interleaved_gate_up=name == "GPT-OSS",
        base_layer=SimpleNamespace(moe_runner_config=SimpleNamespace(is_gated=True)),
    )
    rows = sglang("lora.layers").FusedMoEWithLoRA._slice_moe_b_2d
    for expert in range(EXPERTS):
        owner = f"model.layers.0.{block}.experts.{expert}"
        b, a = found[f"{owner}.down_proj"]
        torch.testing.assert_close(b @ a, down[expert])
        b, a = found[f"{owner}.gate_up_proj"]
        torch.testing.assert_close(product((b, a), [down.shape[2]] * 2), halved[expert])
        first = a.chunk(2)[0]  # both halves have the same A
        stacked = rows(layer, b, 0, "gate_up_proj_moe") @ first
        torch.testing.assert_close(stacked, gate_up[expert])
