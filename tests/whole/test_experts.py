"""Mixtures of experts whose weights are stacks: models of transformers, tiny and random.

Everything is held against dense weights that the loops of `tests.reference` merge, one expert after
another, into the plain model. Each model runs in every implementation of its experts:

- eager: a loop over the experts that were chosen, a product with one matrix of the stack each;
- batched_mm: a matrix of the stack for each token;
- grouped_mm: tokens in the order of their experts, one grouped product.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

import disha
from benchmarks.memory import kept_bytes
from disha import functional
from disha.functional import linear, products
from disha.functional.methods import METHODS
from disha.layers.adapted import AdaptedLayer
from tests import reference
from tests.conftest import (
    assert_unchanged,
    freshly_compiled,
    near,
    perturb,
    refused,
    seed_torch,
    snapshot,
)
from tests.reference import KINDS

WIDTH, INNER, EXPERTS, VOCABULARY = 16, 8, 4, 32
TOKENS = (2, 16)
ONLY_EXPERTS = r"experts\.(gate_up|down)_proj$"


def options_of(kind: str) -> dict[str, Any]:
    """Return the settings of an adapter of a kind.

    Rows of r = 3 have 12 bytes, while grouped products want multiples of 16.
    """
    return {"r": 4 if kind == "tile" else 3, **reference.settings_of(kind, 4)}


COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    "tie_word_embeddings": False,
}


def mixtral(width: int, inner: int) -> tuple[str, str, dict[str, Any]]:
    sizes = {"intermediate_size": inner, "num_local_experts": EXPERTS, "head_dim": 8}
    return "MixtralForCausalLM", "MixtralConfig", sizes


def qwen3_moe(width: int, inner: int) -> tuple[str, str, dict[str, Any]]:
    sizes = {"moe_intermediate_size": inner, "num_experts": EXPERTS, "head_dim": 8}
    return "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**sizes, "norm_topk_prob": True}


def gpt_oss(width: int, inner: int) -> tuple[str, str, dict[str, Any]]:
    """Experts with biases, and weights that keep their inputs first.

    Biases are stacks of vectors, and so count as matrix parameters that nothing reaches. Wide
    heads keep their share as small as it is in the real model.
    """
    sizes = {"intermediate_size": inner, "num_local_experts": EXPERTS, "head_dim": 2 * width}
    ropes = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return "GptOssForCausalLM", "GptOssConfig", {**sizes, **ropes, "sliding_window": 8}


def deepseek_v3(width: int, inner: int) -> tuple[str, str, dict[str, Any]]:
    """A dense layer, then one of routed experts and a shared one."""
    sizes = {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": width,
        "moe_intermediate_size": inner,
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return "DeepseekV3ForCausalLM", "DeepseekV3Config", sizes


def olmoe(width: int, inner: int) -> tuple[str, str, dict[str, Any]]:
    return "OlmoeForCausalLM", "OlmoeConfig", {"intermediate_size": inner, "num_experts": EXPERTS}


def llama4(width: int, inner: int) -> tuple[str, str, dict[str, Any]]:
    """Experts that say nothing of their layout, and a router that is a linear layer."""
    sizes = {
        "intermediate_size": inner,
        "intermediate_size_mlp": width,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8,
        "head_dim": 8,
    }
    return "Llama4ForCausalLM", "Llama4TextConfig", sizes


MODELS = {
    "Mixtral": mixtral,
    "Qwen3-MoE": qwen3_moe,
    "GPT-OSS": gpt_oss,
    "DeepSeek-V3": deepseek_v3,
    "OLMoE": olmoe,
    "Llama-4": llama4,
}
INPUTS_FIRST = ("GPT-OSS", "Llama-4")
"""Models whose experts are laid out as "expert in out"; those of all others are "expert out in"."""

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
RUNS = [
    (name, implementation)
    for name in MODELS
    for implementation in (IMPLEMENTATIONS if name != "Llama-4" else ("eager",))
]
CASES = [
    (name, implementation, method)
    for name, implementation in RUNS
    for method in KINDS
    if name in ("Mixtral", *INPUTS_FIRST)
    or KINDS.index(method) == IMPLEMENTATIONS.index(implementation)
]
"""All pairs for a model of each layout, and each implementation and method once for the others."""

IN_TURN = [
    (name, implementation, method)
    for name, implementation, method in CASES
    if name not in ("Mixtral", "GPT-OSS")
    or KINDS.index(method) % len(IMPLEMENTATIONS) == IMPLEMENTATIONS.index(implementation)
]
"""Each method once for a model: of what depends on the weights, and not on how they multiply."""


def build(
    name: str, implementation: str, *, width: int = WIDTH, inner: int = INNER, **more: Any
) -> nn.Module:
    """Return a model whose every parameter is random, in evaluation mode."""
    model, config, sizes = MODELS[name](width, inner)
    seed_torch(0)
    built = getattr(transformers, model)._from_config(
        getattr(transformers, config)(**{**COMMON, "hidden_size": width, **sizes, **more}),
        attn_implementation="eager",
        dtype=torch.float32,
        **({} if name == "Llama-4" else {"experts_implementation": implementation}),
    )
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                continue
            routes = key.endswith(("gate.weight", "router.weight"))
            size = 2.0 if routes else 0.7
            parameter.copy_(torch.randn_like(parameter) * size / parameter.shape[-1] ** 0.5)
    return built.eval()


@functools.cache
def _built(name: str, implementation: str) -> nn.Module:
    return build(name, implementation)


def plain(name: str, implementation: str) -> nn.Module:
    return copy.deepcopy(_built(name, implementation))


def adapted(name: str, implementation: str, method: str, **options: Any) -> nn.Module:
    model = plain(name, implementation)
    perturb(disha.inject_adapters(model, "all-linear", **options_of(method), **options), size=0.2)
    return model


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=tokens(), use_cache=False).logits
    return output


def cotangent(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(6))


def gradients(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the gradient of every block, by its name in a state dict."""
    blocks = block_parameters(model, adapter)
    output = logits(model)
    found = torch.autograd.grad((output * cotangent(output)).sum(), list(blocks.values()))
    return dict(zip(blocks, found, strict=True))


def block_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """Return the name of a weight -> its block, of the active or a named adapter."""
    blocks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            for (own, weight), block in layer.disha.blocks_by_name().items():
                if own == (adapter or "default"):
                    blocks[f"{name}.{weight or 'weight'}".removeprefix(".")] = block.block
    return blocks


def stacks(blocks: dict[str, Any]) -> dict[str, Any]:
    return {name: block for name, block in blocks.items() if ".experts." in name}


# --- the oracle ----------------------------------------------------------------------------------


def dense_weight(
    method: str, weight: Tensor, block: Tensor, inputs_first: bool, scale: float = 1.0
) -> Tensor:
    """Return W + s dW by the loops of the reference: one matrix, or one expert after another."""
    if weight.dim() == 2:
        return reference.merged_weight(weight, [(method, block, scale)])
    matrices = [matrix.T if inputs_first else matrix for matrix in weight]
    merged = [
        reference.merged_weight(matrix, [(method, own, scale)])
        for matrix, own in zip(matrices, block, strict=True)
    ]
    return torch.stack([matrix.T if inputs_first else matrix for matrix in merged])


@functools.cache
def oracle(name: str, method: str) -> dict[str, Any]:
    """Return what the plain model gives with dense merged weights, and gradients of the blocks."""
    source = plain(name, "eager")
    perturb(disha.inject_adapters(source, "all-linear", **options_of(method)), size=0.2)
    model = plain(name, "eager").requires_grad_(False)
    blocks, merged = {}, {}
    for key, block in block_parameters(source).items():
        parameter = model.get_parameter(key)
        blocks[key] = block.detach().double().requires_grad_()
        inputs_first = name in INPUTS_FIRST
        base = parameter.detach().double()
        merged[key] = dense_weight(method, base, blocks[key], inputs_first)
        parameter.copy_(merged[key]) if parameter.requires_grad else parameter.data.copy_(
            merged[key].detach()
        )
        parameter.requires_grad_()
    output = logits(model)
    weights = [model.get_parameter(key) for key in blocks]
    reached = torch.autograd.grad((output * cotangent(output)).sum(), weights)
    found = torch.autograd.grad(
        list(merged.values()), list(blocks.values()), [one.double() for one in reached]
    )
    return {
        "logits": output.detach(),
        "weights": {key: value.detach() for key, value in merged.items()},
        "gradients": {key: value.float() for key, value in zip(blocks, found, strict=True)},
    }


def close(actual: Tensor, expected: Tensor, limit: float = 2e-5) -> None:
    near(actual, expected, limit)


def all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        near(actual[key], value, 5e-5)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights for which a dense W + dW, or dW itself, has been computed."""
    computed: list[tuple[int, ...]] = []
    original = functional.computed_weight

    def computed_weight(weight: Tensor, layout: Any, some: Any) -> Tensor:
        if some:
            computed.append(tuple(weight.shape))
        return original(weight, layout, some)

    for module in (functional, linear, products):
        monkeypatch.setattr(module, "computed_weight", computed_weight)
    for method in METHODS.values():
        delta = type(method).delta

        def counted(
            self: Any, block: Tensor, geometry: Any, matrices: Any, delta: Any = delta
        ) -> Tensor:
            computed.append(tuple(block.shape))
            return delta(self, block, geometry, matrices)

        monkeypatch.setattr(type(method), "delta", counted)
    return computed


# --- every model, implementation and method ------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_reaches_what_is_not_an_embedding(name: str) -> None:
    model = disha.inject_adapters(build(name, "eager", width=64, inner=64), "all-linear", 4)
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    sizes = {
        key.replace(".disha", ""): parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in looked_up and "_block" not in key
    }
    reached = block_parameters(model)
    assert sum(sizes[key] for key in reached) >= 0.99 * sum(sizes.values())
    missed = sizes.keys() - reached.keys()
    assert all(key.endswith(("gate.weight", "router.weight", "_bias")) for key in missed), missed


@pytest.mark.parametrize(("name", "implementation", "method"), CASES)
def test_output_and_gradients_are_those_of_dense_weights(name, implementation, method, dense):
    model = adapted(name, implementation, method)
    expected = oracle(name, method)
    dense.clear()
    close(logits(model), expected["logits"])
    found = gradients(model)
    assert dense == []
    all_close(found, expected["gradients"])
    with torch.inference_mode():
        close(logits(model), expected["logits"])
    assert dense == []
    assert (logits(model) - logits(plain(name, implementation))).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "implementation", "method"), IN_TURN)
class TestExperts:
    def test_injection_changes_no_bit(self, name, implementation, method):
        model = plain(name, implementation)
        with_gradients = logits(model)
        with torch.no_grad():
            without = logits(model)
        disha.inject_adapters(model, "all-linear", **options_of(method))
        assert len(stacks(block_parameters(model))) == 2
        assert torch.equal(logits(model), with_gradients)
        with torch.no_grad():
            assert torch.equal(logits(model), without)

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name, implementation, method):
        model = adapted(name, implementation, method)
        expected, before = logits(model), snapshot(model)
        disha.merge_adapters(model)
        close(logits(model), expected)
        for key, weight in oracle(name, method)["weights"].items():
            close(model.get_parameter(key), weight.float(), 1e-6)
        disha.unmerge_adapters(model)
        assert_unchanged(model, before)
        assert torch.equal(logits(model), expected)

    def test_file_into_a_fresh_base_gives_equal_outputs(
        self, name, implementation, method, tmp_path
    ):
        model = adapted(name, implementation, method)
        disha.save_adapter(model, tmp_path / "a")
        fresh = plain(name, implementation)
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(logits(fresh), logits(model))


# --- one layer of experts ------------------------------------------------------------------------


def block_of(model: nn.Module) -> nn.Module:
    """Return the last layer's routers and experts."""
    layer = model.model.layers[-1]
    found: nn.Module = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    return found


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*TOKENS, WIDTH, generator=generator).to(dtype)


def routes() -> tuple[Tensor, Tensor]:
    """Return which experts each token goes to, all but the last in use, and by which weights."""
    generator = torch.Generator().manual_seed(8)
    scores = torch.rand(TOKENS[0] * TOKENS[1], EXPERTS - 1, generator=generator)
    weights, chosen = scores.topk(2)
    return chosen, weights


def run_experts(experts: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    chosen, weights = routes()
    output: Tensor = experts(hidden(dtype).flatten(0, 1), chosen, weights.to(dtype))
    return output


def dense_experts(name: str, experts: nn.Module) -> nn.Module:
    """Return the plain eager experts with the dense merged weights of adapted ones."""
    merged = copy.deepcopy(block_of(_built(name, "eager")).experts)
    for key in ("gate_up_proj", "down_proj"):
        block = experts.disha["default"][key]
        values = block.block.detach().double()
        weight = merged.get_parameter(key)
        base = weight.detach().double()
        weight.data = dense_weight(block.method.name, base, values, name in INPUTS_FIRST).float()
    return merged


RANKS: list[dict[str, Any]] = [
    *({"r": r} for r in (1, 2, 5, 8)),
    {"r": 3, "r_out": 2},
    {"r": 5, "r_out": 8},
    *({"r": r, "method": "bat"} for r in (1, 5, 8)),
]
OF_RANKS = [
    (("Mixtral", "GPT-OSS")[(place + turn) % 2], "grouped_mm", dtype, options)
    for place, options in enumerate(RANKS)
    for turn, dtype in enumerate((torch.float32, torch.bfloat16))
] + [
    (name, implementation, torch.bfloat16, options)
    for implementation in ("eager", "batched_mm")
    for name, options in (("Mixtral", {"r": 5}), ("GPT-OSS", {"r": 5, "method": "bat"}))
]


@pytest.mark.parametrize(("name", "implementation", "dtype", "options"), OF_RANKS)
def test_every_rank_and_dtype(name, implementation, dtype, options):
    """Grouped products want rows of a multiple of 16 bytes, and blocks have rows of any size."""
    experts = block_of(plain(name, implementation)).experts.to(dtype)
    perturb(disha.inject_adapters(experts, "all-linear", **options), size=0.2)
    output = run_experts(experts, dtype)
    assert output.dtype == dtype
    limit = 2e-5 if dtype == torch.float32 else 4e-2
    close(output.float(), run_experts(dense_experts(name, experts)), limit)
    output.float().square().sum().backward()
    for block in disha.adapter_parameters(experts):
        size = block.grad.flatten(1).abs().amax(1)
        assert block.grad.isfinite().all()
        assert (size[:-1] > 0).all()
        assert size[-1] == 0  # the expert that no token goes to


def three_matrices(method):
    """Return a stack with a block, and the dense weight of a block of its own, by the oracle."""
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.randn(3, 8, 10, dtype=torch.float64))
    perturb(
        disha.inject_adapters(experts, "", layouts={"^$": "expert out in"}, **options_of(method))
    )
    (block,) = disha.adapter_parameters(experts)
    own = block.detach().clone().requires_grad_()
    merged = dense_weight(method, experts.base_weight.detach(), own, inputs_first=False)
    return experts, block, merged, own


A_MATRIX_FOR_EACH_TOKEN = (torch.tensor([2, 0, -1, 2, 1]), torch.tensor([1, 1, -3, 0, 2]))
"""Indices in any order, negative ones too."""


@pytest.mark.parametrize("method", KINDS)
def test_a_matrix_for_each_token(method):
    """Also with second derivatives, and cut off by detach."""
    experts, block, merged, own = three_matrices(method)
    x = torch.randn(5, 10, 1, dtype=torch.float64, requires_grad=True)
    for index in A_MATRIX_FOR_EACH_TOKEN:
        actual, expected = experts.weight[index] @ x, merged[index] @ x
        close(actual, expected, 1e-12)
        first, wanted = (
            torch.autograd.grad(output.square().sum(), [x, one], create_graph=True)
            for output, one in ((actual, block), (expected, own))
        )
        close(first[0], wanted[0], 1e-12)
        close(first[1], wanted[1], 1e-12)
        second, wanted_second = (
            torch.autograd.grad(sum(part.square().sum() for part in parts), one, retain_graph=True)
            for parts, one in ((first, block), (wanted, own))
        )
        close(second[0], wanted_second[0], 1e-12)
        twice = torch.tensor([4, 0, 0])
        close(experts.weight[index][twice] @ x[:3], merged[index][twice] @ x[:3], 1e-12)
        frozen = experts.weight[index].detach() @ x
        assert torch.autograd.grad(frozen.sum(), block, allow_unused=True) == (None,)


@pytest.mark.parametrize("method", KINDS)
def test_a_matrix_for_each_token_under_autocast(method):
    experts, block, merged, own = three_matrices(method)
    x = torch.randn(5, 10, 1, dtype=torch.float64)
    experts.float()
    for index in A_MATRIX_FOR_EACH_TOKEN:
        expected = merged[index] @ x
        with torch.autocast("cpu", torch.bfloat16):
            output = experts.weight[index] @ x.float()
        assert output.dtype == torch.bfloat16
        close(output.float(), expected.float(), 4e-2)
        (gradient,) = torch.autograd.grad(output.sum(), block)
        (wanted,) = torch.autograd.grad(expected.sum(), own, retain_graph=True)
        close(gradient, wanted.float(), 4e-2)


OF_EACH_LAYOUT = [run for run in RUNS if run[0] in ("Mixtral", "Llama-4")]


@pytest.mark.parametrize(("name", "implementation"), OF_EACH_LAYOUT)
def test_samples_are_not_routed_through_experts(name, implementation):
    model = plain(name, implementation)
    for adapter in ("a", "b"):
        disha.inject_adapters(model, ONLY_EXPERTS, 2, adapter=adapter, init="kaiming")
    expected, routed = logits(model), disha.route_adapters(model, ["a", "b"])
    with refused(model, disha.DishaError, r"experts"), routed:
        logits(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("name", "implementation"), OF_EACH_LAYOUT)
def test_generation(name, implementation):
    model = adapted(name, implementation, "bone")
    prompt = tokens()[:, :5]

    def generate() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
            made = model.generate(
                prompt, **options, return_dict_in_generate=True, output_logits=True
            )
        return made.sequences, torch.stack(made.logits)

    sequences, steps = generate()
    disha.merge_adapters(model)
    merged_sequences, merged_steps = generate()
    assert torch.equal(sequences, merged_sequences)
    close(steps, merged_steps)
    disha.unmerge_adapters(model)
    with torch.no_grad():  # what the cache holds is what one pass over all tokens gives
        whole = model(input_ids=sequences[:, :-1]).logits[:, -4:]
    close(steps, whole.transpose(0, 1), 1e-4)


# --- compiled ------------------------------------------------------------------------------------

WHOLE_GRAPHS = [run for run in RUNS if run[1] != "eager" or run[0] == "Llama-4"]
"""The runs whose plain experts compile as one graph: a loop over the chosen experts does not."""
COMPILED = [
    *(("Mixtral", implementation, "bone") for implementation in IMPLEMENTATIONS),
    ("Mixtral", "grouped_mm", "bat"),
    ("GPT-OSS", "grouped_mm", "tile"),
    ("GPT-OSS", "batched_mm", "bat"),
    ("Llama-4", "eager", "lora"),
]
"""`tests/layers/test_layouts.py` compiles Llama-4's product, of a whole stack, with every kind."""


@pytest.mark.parametrize(("name", "implementation", "method"), COMPILED)
def test_compiled_experts(name, implementation, method):
    """Equal to eager ones; neither scale nor switching nor disabling compiles again."""
    experts = block_of(plain(name, implementation)).experts
    for adapter in ("a", "b"):
        disha.inject_adapters(experts, "all-linear", adapter=adapter, **options_of(method))
    perturb(experts, size=0.2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = (name, implementation) in WHOLE_GRAPHS
    compiled = torch.compile(experts, backend=counter, fullgraph=whole)

    def run(module: nn.Module) -> Tensor:
        if name == "Llama-4":
            output: Tensor = module(hidden().flatten(0, 1))
            return output
        return run_experts(module)

    def check() -> Tensor:
        output, expected = run(compiled), run(experts)
        close(output, expected)
        return output.detach()

    weight = cotangent(run(experts))
    blocks = list(disha.adapter_parameters(experts, "b"))
    found = torch.autograd.grad((run(compiled) * weight).sum(), blocks)
    frames = counter.frame_count
    assert frames == 1 or not whole
    expected = torch.autograd.grad((run(experts) * weight).sum(), blocks)
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted)
    outputs = {"both": check()}
    for adapter in ("a", "b"):
        disha.set_adapter_scale(experts, 0.3, adapter)
        disha.set_active_adapters(experts, adapter)
        outputs[adapter] = check()
    disha.set_active_adapters(experts, "a")
    assert torch.equal(check(), outputs["a"])
    with disha.adapters_disabled(experts):
        outputs["none"] = check()
    assert counter.frame_count == frames
    for one, other in itertools.combinations(outputs.values(), 2):
        assert (one - other).abs().max() > 1e-3


def test_compiled_model():
    model = adapted("Mixtral", "grouped_mm", "bone")
    expected = gradients(model)
    compiled = freshly_compiled(model, "aot_eager")
    output = compiled(input_ids=tokens(), use_cache=False).logits
    close(output, oracle("Mixtral", "bone")["logits"])
    found = torch.autograd.grad(
        (output * cotangent(output)).sum(), list(block_parameters(model).values())
    )
    all_close(dict(zip(expected, found, strict=True)), expected)


# --- experts that do not say how they are laid out -----------------------------------------------


class ParallelExperts(nn.Module):
    """Experts as JetMoe has them: tokens in the order of their experts, and how many each gets."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        parts = x.split(sizes, dim=0)
        products = [F.linear(part, self.weight[i]) for i, part in enumerate(parts)]
        return torch.cat(products, dim=0)


class EinsumExperts(nn.Module):
    """Experts that no rule takes apart: each product needs the dense weight of its expert."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(experts, inputs, outputs))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        parts = x.split(sizes, dim=0)
        weights = self.kernel.unbind(0)
        return torch.cat(
            [torch.einsum("ni,io->no", *pair) for pair in zip(parts, weights, strict=True)]
        )


def jet_moe(experts: int, inputs: int, outputs: int) -> nn.Module:
    module = JetMoeParallelExperts(experts, inputs, outputs)
    nn.init.normal_(module.weight)
    return module


UNDECORATED: dict[str, tuple[Callable[..., nn.Module], str, str, dict[str, Any]]] = {
    "JetMoe": (jet_moe, "weight", "expert out in", {}),
    "like JetMoe": (
        ParallelExperts,
        "weight",
        "expert out in",
        {"layouts": {"experts$": "expert out in"}},
    ),
    "einsum": (
        EinsumExperts,
        "kernel",
        "expert in out",
        {"layouts": {r"experts\.kernel$": "expert in out"}},
    ),
}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("kind", UNDECORATED)
def test_undecorated_experts(kind, method, tmp_path):
    make, parameter, pattern, options = UNDECORATED[kind]
    seed_torch(0)
    model = nn.ModuleDict({"experts": make(3, 10, 8)})
    x, sizes = torch.randn(7, 10), [4, 2, 1]
    base = model["experts"](x, sizes)
    fresh = copy.deepcopy(model)
    disha.inject_adapters(model, "experts", **options_of(method), **options)
    experts = model["experts"]
    assert torch.equal(experts(x, sizes), base)
    perturb(model)
    (block,) = disha.adapter_parameters(model)
    own = block.detach().clone().requires_grad_()
    weight = fresh["experts"].get_parameter(parameter).detach()
    merged = dense_weight(method, weight, own, inputs_first=pattern == "expert in out")
    matrices = merged if pattern == "expert in out" else merged.mT
    expected = torch.cat([part @ w for part, w in zip(x.split(sizes), matrices, strict=True)])
    output, direction = experts(x, sizes), torch.randn(7, 8)
    close(output, expected)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    close(block.grad, own.grad)
    disha.save_adapter(model, tmp_path / "a")
    disha.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh["experts"](x, sizes), output)
    disha.merge_adapters(model)
    close(experts(x, sizes), expected)
    close(experts.get_parameter(parameter), merged, 1e-6)
    disha.unmerge_adapters(model)
    assert torch.equal(experts(x, sizes), output)


def test_experts_of_unknown_layout_are_named():
    model = nn.ModuleDict({"experts": ParallelExperts(3, 10, 8), "head": nn.Linear(8, 4)})
    with pytest.warns(UserWarning, match=r"experts\.weight.*layouts="):
        disha.inject_adapters(model, ".", 2)
    model = nn.ModuleDict({"experts": ParallelExperts(3, 10, 8)})
    with pytest.raises(disha.TargetError, match=r"experts.*layouts="):
        disha.inject_adapters(model, "experts", 2)


# --- memory --------------------------------------------------------------------------------------

MEASURED_WIDTH, MEASURED_INNER, MEASURED_EXPERTS, MEASURED_TOKENS = 128, 256, 8, 256
MEASURED_R, LORA_RANK = 16, 10  # of equal size: r (2 I + H) = rank ((H + 2 I) + (I + H)), I = 2 H


def measured(implementation: str) -> nn.Module:
    sizes = {"num_local_experts": MEASURED_EXPERTS, "num_experts": MEASURED_EXPERTS}
    return build("Mixtral", implementation, width=MEASURED_WIDTH, inner=MEASURED_INNER, **sizes)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def kept(model: nn.Module, tokens: int = MEASURED_TOKENS) -> int:
    """Return the bytes kept for the backward of a training step that goes down to the embedding."""
    for parameter in trainable(model):
        nn.init.normal_(parameter, std=0.02)
    model.train()
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    ids = torch.randint(VOCABULARY, (2, tokens // 2))
    return kept_bytes(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_keeps_less_than_lora_of_peft(implementation):
    frozen = kept(measured(implementation).requires_grad_(False))
    model = disha.inject_adapters(measured(implementation), ONLY_EXPERTS, MEASURED_R)
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    lora = get_peft_model(measured(implementation), config)
    count = sum(parameter.numel() for parameter in trainable(model))
    assert count == sum(parameter.numel() for parameter in trainable(lora))
    own = kept(model)
    assert own <= kept(lora)
    # What Bone adds: r sums for every input of an expert, and at most one copy of the blocks.
    sums = 2 * 2 * MEASURED_TOKENS * MEASURED_R * 4
    assert own - frozen <= sums + count * 4 + 2**14


@pytest.mark.parametrize("name", ["Mixtral", *INPUTS_FIRST])
def test_bat_keeps_no_dense_weight(name):
    sizes = {"width": MEASURED_WIDTH, "inner": MEASURED_INNER}
    tokens = 32  # of which BAT keeps the inputs
    frozen = kept(build(name, "eager", **sizes).requires_grad_(False), tokens)
    model = build(name, "eager", **sizes)
    disha.inject_adapters(model, ONLY_EXPERTS, MEASURED_R, method="bat")
    stacks = [p for p in model.parameters() if p.dim() == 3 and not p.requires_grad]
    smallest = min(stack.numel() * stack.element_size() for stack in stacks)
    assert kept(model, tokens) - frozen < smallest


@pytest.mark.parametrize("method", reference.METHODS)
def test_no_expert_chosen(method):
    model = nn.ParameterDict({"w": torch.randn(3, 4, 6)})
    disha.inject_adapters(model, "w", 2, layouts={"w": "expert out in"}, method=method)
    chosen = model.w[torch.zeros(0, dtype=torch.long)]
    assert torch.bmm(torch.zeros(0, 1, 6), chosen.mT).shape == (0, 1, 4)
