"""nn.MultiheadAttention and the modules with fused paths around it, held against plain torch."""

import copy
import functools
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ArgumentError, MergeError
from disha.effective import EffectiveWeight
from disha.layers.weights import base_of
from disha.model.view import ModelView
from tests import reference
from tests.conftest import (
    assert_unchanged,
    freshly_compiled,
    perturb,
    pickled,
    seed_torch,
    snapshot,
)
from tests.conftest import near as close
from tests.every_pair import Case, DtypeTests, PairTests, numbers
from tests.reference import KINDS

WIDTH, HEADS = 6, 2

FORMS = {
    "packed": {},
    "packed, batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim, vdim": {"kdim": 5, "vdim": 4},
    "kdim, vdim, batch first": {"kdim": 5, "vdim": 4, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv, zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}
KINDS_OF = {
    "packed": KINDS,
    "packed, batch first": ("tile",),
    "no bias": ("bat",),
    "kdim, vdim": KINDS,
    "kdim, vdim, batch first": ("tile",),
    "bias_kv": ("bat",),
    "zero_attn": ("bone",),
    "bias_kv, zero_attn": ("tile",),
}
"""Packed and separate weights with every kind of block, and the other forms with one."""
PAIRS = [(name, kind) for name in FORMS for kind in KINDS_OF[name]]
CASES = [(*pair, torch.float64) for pair in PAIRS] + [
    ("packed", "bone", torch.float32),
    ("packed", "bat", torch.bfloat16),
    ("kdim, vdim", "bat", torch.float32),
    ("kdim, vdim", "tile", torch.bfloat16),
]


def tolerance(dtype):
    return {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]


def attention(form="packed", dtype=torch.float64):
    seed_torch(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **FORMS[form])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:  # torch starts most of them at zero
                parameter.normal_()
    return module.to(dtype)


def inject(model, target, method="bone", r=2, **options):
    return disha.inject_adapters(model, target, r, **reference.settings_of(method, 3), **options)


def inputs(module, samples=3, length=4, source=5, dtype=torch.float64):
    """Return query, key and value as the module wants them laid out."""
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (length, samples, module.embed_dim),
        (source, samples, module.kdim),
        (source, samples, module.vdim),
    )
    sequences = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.transpose(0, 1).to(dtype) if module.batch_first else x.to(dtype) for x in sequences]


def attend(module, x):
    """Return the output and the weights (samples, both flattened), of samples with q, k and v."""
    parts = [WIDTH, module.kdim, module.vdim]
    q, k, v = (part if module.batch_first else part.transpose(0, 1) for part in x.split(parts, -1))
    output, weights = module(q[:, :4] if module.batch_first else q[:4], k, v)
    output = output if module.batch_first else output.transpose(0, 1)
    return torch.cat([output.flatten(1), weights.flatten(1)], 1)


TABLE = {
    name: Case(
        lambda name=name: attention(name),
        numbers(3, 5, WIDTH + options.get("kdim", WIDTH) + options.get("vdim", WIDTH)),
        call=attend,
    )
    for name, options in FORMS.items()
}


def parameter_of(module, name):
    """Return the weight of a projection as a view into the parameter that plain torch reads."""
    if name == "out_proj":
        return module.out_proj.weight
    if module.in_proj_weight is None:
        return getattr(module, f"{name}_weight")
    return module.in_proj_weight.chunk(3)["qkv".index(name[0])]


def packed(module):
    """Return the original of the packed weight."""
    one = next(one for one in ModelView(module).blocks() if one.name == "q_proj")
    return base_of(one.layer, one.block.spec)


def dense(adapted, plain, scale=1.0):
    """Add to a plain module, by the oracle, what the blocks of the adapted one say."""
    with torch.no_grad():
        for method, name, block in blocks_of(adapted):
            weight = parameter_of(plain, name)
            delta = reference.delta_weight(method, weight.detach(), block)
            weight.add_(delta * scale)
    return plain


def blocks_of(module):
    """Return method, name and values of every block."""
    return [
        (found.block.method.name, found.name, found.block.block.detach())
        for found in ModelView(module).blocks("default")
    ]


def block_of(module, name, adapter="default"):
    return next(one.block for one in ModelView(module).blocks(adapter) if one.name == name)


MASKS = {
    "none": lambda n, length, source: {},
    "bool": lambda n, length, source: {"attn_mask": causal(length, source)},
    "float": lambda n, length, source: {"attn_mask": floating(causal(length, source))},
    "per head": lambda n, length, source: {
        "attn_mask": floating(causal(length, source)).repeat(n * HEADS, 1, 1)
    },
    "padding": lambda n, length, source: {"key_padding_mask": padding(n, source)},
    "both": lambda n, length, source: {
        "attn_mask": causal(length, source),
        "key_padding_mask": padding(n, source),
    },
}


def causal(length, source):
    return torch.ones(length, source, dtype=torch.bool).triu(1)


def floating(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)


def padding(samples, source):
    lengths = torch.arange(samples).remainder(3) + source - 2
    return torch.arange(source) >= lengths.unsqueeze(1)


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
class TestEveryForm(DtypeTests):
    table = TABLE

    def test_injection_changes_no_bit(self, name, kind, dtype):
        """Bit for bit where torch takes the same path: one product for q, k and v."""
        plain, module = attention(name, dtype), inject(attention(name, dtype), "^$", kind)
        q, k, v = inputs(plain, dtype=dtype)
        arguments = [(q, k, v)] if plain.kdim != WIDTH else [(q, k, v), (q, q, q), (q, k, k)]
        for tensors in arguments:
            expected, weights = plain(*tensors)
            output, found = module(*tensors)
            if kind == "bat" or tensors[0] is not tensors[1]:
                close(output, expected, tolerance(dtype))
                close(found, weights, tolerance(dtype))
            else:
                assert torch.equal(output, expected)
                assert torch.equal(found, weights)


MASKED = [
    (masks, name, kind)
    for (masks, name), kind in zip(
        itertools.product(MASKS, FORMS), itertools.cycle(KINDS), strict=False
    )
]
"""Each form with each mask; the kinds of blocks take turns."""


@pytest.mark.parametrize(("masks", "name", "kind"), MASKED)
def test_masks_and_modes(name, masks, kind):
    module = perturb(inject(attention(name), "^$", kind, scale=0.5))
    assert {name for _, name, _ in blocks_of(module)} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    plain = dense(module, attention(name), scale=0.5)
    for need_weights in (True, False):
        for training in (True, False):
            q, k, v = inputs(plain)
            options = MASKS[masks](3, 4, 5) | {"need_weights": need_weights}
            expected, weights = plain.train(training)(q, k, v, **options)
            output, found = module.train(training)(q, k, v, **options)
            close(output, expected)
            assert (found is None) == (weights is None) == (not need_weights)
            if need_weights:
                close(found, weights)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
class TestEveryFormInFloat64(PairTests):
    table = TABLE

    def test_copies_compute_the_same(self, name, kind):
        module = perturb(inject(attention(name), "^$", kind))
        tensors = inputs(module)
        expected = module(*tensors)[0]
        for copied in (copy.deepcopy(module), pickled(module)):
            assert torch.equal(copied(*tensors)[0], expected)
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.zero_()
            assert torch.equal(module(*tensors)[0], expected)
            assert not torch.equal(copied(*tensors)[0], expected)

    def test_dropout_acts_in_training_only(self, name, kind):
        module = inject(attention(name), "^$", kind, dropout=0.5)
        plain, tensors = inject(attention(name), "^$", kind), inputs(module)
        for one in (module, plain):
            perturb(one)
        close(module.eval()(*tensors)[0], plain(*tensors)[0])
        first, second = (module.train()(*tensors)[0] for _ in range(2))
        assert not torch.equal(first, second)

    def test_compiled_is_eager(self, name, kind):
        module = perturb(inject(attention(name), "^$", kind))
        tensors = inputs(module)
        compiled = freshly_compiled(module)
        close(compiled(*tensors)[0], module(*tensors)[0])


# --- every option of torch's function -------------------------------------------------------------

LENGTH, SOURCE, SAMPLES = 4, 5, 3
WEIGHTS = {
    "no weights": {"need_weights": False},
    "averaged": {"need_weights": True},
    "of each head": {"need_weights": True, "average_attn_weights": False},
}
"""Options of what is returned."""


def hidden(*shape):
    """Return a boolean mask that leaves the first key of each row."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[..., 0] = False
    return mask


ATTENTION_MASKS = {
    "no mask": lambda length: {},
    "bool": lambda length: {"attn_mask": hidden(length, SOURCE)},
    "float": lambda length: {"attn_mask": floating(hidden(length, SOURCE))},
    "bool of each head": lambda length: {"attn_mask": hidden(SAMPLES * HEADS, length, SOURCE)},
    "float of each head": lambda length: {
        "attn_mask": floating(hidden(SAMPLES * HEADS, length, SOURCE))
    },
    "causal hint": lambda length: {"attn_mask": causal(length, SOURCE), "is_causal": True},
}
PADDINGS = {
    "no padding": {},
    "bool padding": {"key_padding_mask": hidden(SAMPLES, SOURCE)},
    "float padding": {"key_padding_mask": floating(hidden(SAMPLES, SOURCE))},
}
ADDED_KEYS = {
    "nothing": {},
    "bias_kv": {"bias": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv, zero_attn": {"bias": True, "add_zero_attn": True},
    "static_k, static_v": {"static": ("k", "v")},
    "static_k, zero_attn": {"static": ("k",), "add_zero_attn": True},
}
PROJECTED = {
    "q, k, v": lambda q, k, v: (q, k, v),
    "k is v": lambda q, k, v: (q, k, k),
    "q is k is v": lambda q, k, v: (k, k, k),
    "separate weights": lambda q, k, v: (q, k, v),
}


@functools.cache
def adapted_attention(form):
    """Return a module whose weights the tests of the function read, and change nothing in."""
    return perturb(inject(attention(form), "^$"))


def function_case(projected, added, options, effective=True):
    """Return the inputs and other arguments of the function, with effective or computed weights."""
    form = "kdim, vdim" if projected == "separate weights" else "packed"
    module = adapted_attention(form)
    q, k, v = PROJECTED[projected](*inputs(module, SAMPLES, LENGTH, SOURCE))
    draw = torch.Generator().manual_seed(3)
    bias_k, bias_v = torch.randn(2, 1, 1, WIDTH, generator=draw, dtype=torch.float64)
    static = torch.randn(SAMPLES * HEADS, SOURCE, WIDTH // HEADS, generator=draw).double()
    arguments = {
        "embed_dim_to_check": WIDTH,
        "num_heads": HEADS,
        "in_proj_weight": module.in_proj_weight,
        "in_proj_bias": module.in_proj_bias,
        "bias_k": bias_k if "bias" in added else None,
        "bias_v": bias_v if "bias" in added else None,
        "add_zero_attn": added.get("add_zero_attn", False),
        "dropout_p": 0.3,
        "out_proj_weight": module.out_proj.weight,
        "out_proj_bias": module.out_proj.bias,
        "training": False,
        **{f"static_{name}": static for name in added.get("static", ())},
        **options,
    }
    if form == "kdim, vdim":
        arguments["use_separate_proj_weight"] = True
        arguments |= {f"{n}_proj_weight": getattr(module, f"{n}_proj_weight") for n in "qkv"}
    if not effective:
        for name, value in arguments.items():
            if isinstance(value, EffectiveWeight):
                arguments[name] = value.clone().detach()
    return (q, k, v), arguments


def error_of(function, *arguments, **options):
    """Return the error that torch raises for wrong arguments; some of them are by `assert`."""
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        function(*arguments, **options)
    return caught.value


def assert_as_torch(projected, added, options):
    tensors, arguments = function_case(projected, added, options)
    _, plain = function_case(projected, added, options, effective=False)
    seed_torch(5)
    output, weights = F.multi_head_attention_forward(*tensors, **arguments)
    seed_torch(5)
    expected, expected_weights = F.multi_head_attention_forward(*tensors, **plain)
    close(output, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        close(weights, expected_weights)


class TestEveryOptionOfTheFunction:
    """Against torch's own function with the computed weights: all options in all combinations."""

    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("added", ADDED_KEYS)
    @pytest.mark.parametrize("projected", PROJECTED)
    def test_masks(self, projected, added, weights):
        length = SOURCE if projected == "q is k is v" else LENGTH
        for mask, padding in itertools.product(ATTENTION_MASKS.values(), PADDINGS.values()):
            options = mask(length) | padding | WEIGHTS[weights]
            assert_as_torch(projected, ADDED_KEYS[added], options)

    @pytest.mark.parametrize("weights", ["averaged", "of each head"])
    def test_dropout_of_the_weights(self, weights):
        assert_as_torch("k is v", {}, WEIGHTS[weights] | {"training": True})

    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("projected", ["q, k, v", "separate weights"])
    def test_without_samples(self, projected, weights):
        options = WEIGHTS[weights] | {"attn_mask": hidden(HEADS, LENGTH, SOURCE)}
        results = []
        for effective in (True, False):
            tensors, arguments = function_case(projected, {}, options, effective)
            arguments["key_padding_mask"] = hidden(SOURCE)
            q, k, v = (x[:, 0] for x in tensors)
            results.append(F.multi_head_attention_forward(q, k, v, **arguments))
        torch.testing.assert_close(*results)

    def test_without_a_bias(self):
        results = []
        for effective in (True, False):
            tensors, arguments = function_case("q, k, v", {}, {}, effective)
            arguments |= {"in_proj_bias": None, "out_proj_bias": None}
            results.append(F.multi_head_attention_forward(*tensors, **arguments))
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize(
        ("added", "options"),
        [
            ({}, {"attn_mask": torch.zeros(LENGTH, LENGTH)}),
            ({}, {"attn_mask": torch.zeros(2, LENGTH, SOURCE)}),
            ({}, {"attn_mask": torch.zeros(LENGTH, SOURCE, dtype=torch.int64)}),
            ({}, {"key_padding_mask": torch.zeros(SAMPLES, 2)}),
            ({}, {"key_padding_mask": torch.zeros(2, SOURCE)}),
            ({}, {"is_causal": True}),
            ({}, {"embed_dim_to_check": 5}),
            ({"bias": True, "static": ("k",)}, {}),
            ({"bias": True, "static": ("v",)}, {}),
        ],
    )
    def test_wrong_arguments_are_refused_as_by_torch(self, added, options):
        tensors, plain = function_case("q, k, v", added, options, effective=False)
        expected = error_of(F.multi_head_attention_forward, *tensors, **plain)
        tensors, arguments = function_case("q, k, v", added, options)
        with pytest.raises(type(expected), match=f"^{re.escape(str(expected))}$"):
            F.multi_head_attention_forward(*tensors, **arguments)

    def test_an_effective_weight_as_input_is_computed(self):
        tensors, arguments = function_case("q, k, v", {}, {})
        rows = disha.BoneLinear(WIDTH, SOURCE, r=2, init="kaiming", dtype=torch.float64).weight
        keys = rows[:, None].expand(-1, SAMPLES, -1)
        plain = F.multi_head_attention_forward(tensors[0], keys, keys, **arguments)
        unbatched = tensors[0][:, 0], rows, rows
        found, _ = F.multi_head_attention_forward(*unbatched, **arguments)
        close(found, plain[0][:, 0])

    def test_exported(self):
        module = perturb(inject(attention("bias_kv, zero_attn"), "^$")).eval()
        tensors = tuple(inputs(module))
        program = torch.export.export(module, tensors)
        for found, expected in zip(program.module()(*tensors), module(*tensors), strict=True):
            close(found, expected)

    def test_a_function_that_another_library_has_wrapped(self, monkeypatch):
        original = F.multi_head_attention_forward
        monkeypatch.setattr(
            F, "multi_head_attention_forward", lambda *args, **kwargs: original(*args, **kwargs)
        )
        module = perturb(inject(attention(), "^$"))
        tensors = inputs(module)
        close(module(*tensors)[0], dense(module, attention())(*tensors)[0])


class ReadsPacked(nn.Module):
    """Hands the packed weight of its attention to a function, as WavLM in torchaudio does."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = attention()

    def forward(self, x):
        q, k, v = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        return self.attn.out_proj(F.scaled_dot_product_attention(q, k, v))


class TestAttention:
    @pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "out_proj"])
    def test_each_projection_alone(self, part):
        module = perturb(inject(attention(), part))
        assert {name for _, name, _ in blocks_of(module)} == {part}
        plain = dense(module, attention())
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for training in (True, False):
                tensors = inputs(plain)
                with mode():
                    close(module.train(training)(*tensors)[0], plain.train(training)(*tensors)[0])

    def test_autocast(self):
        module = inject(attention("packed, batch first", torch.float32), "^$")
        plain = attention("packed, batch first", torch.float32)
        x = inputs(module, dtype=torch.float32)[0]
        with torch.autocast("cpu", torch.bfloat16):
            output, expected = module(x, x, x)[0], plain(x, x, x)[0]
        close(output, expected, 0.03)
        perturb(module)
        with torch.autocast("cpu", torch.bfloat16):
            close(module(x, x, x)[0], dense(module, plain)(x, x, x)[0], 0.03)

    def test_an_input_without_batch(self):
        module = perturb(inject(attention(), "^$"))
        plain = dense(module, attention())
        q, k, v = (x[:, 0] for x in inputs(plain))
        options = {"key_padding_mask": padding(3, 5)[0], "average_attn_weights": False}
        for one, other in zip(module(q, k, v, **options), plain(q, k, v, **options), strict=True):
            close(one, other)

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_the_causal_hint(self, need_weights):
        module = perturb(inject(attention("packed, batch first"), "^$"))
        plain = dense(module, attention("packed, batch first"))
        x = inputs(plain)[0]
        options = {"attn_mask": causal(4, 4), "is_causal": True, "need_weights": need_weights}
        close(module(x, x, x, **options)[0], plain(x, x, x, **options)[0])
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            module(x, x, x, is_causal=True, need_weights=need_weights)

    def test_wrong_masks_are_refused_as_by_torch(self):
        module, plain = inject(attention(), "^$"), attention()
        tensors = inputs(module)
        for options in (
            {"attn_mask": torch.zeros(4, 4, dtype=torch.bool)},
            {"key_padding_mask": torch.zeros(3, 6, dtype=torch.bool)},
            {"attn_mask": torch.zeros(4, 5, dtype=torch.long)},
        ):
            expected = error_of(plain, *tensors, **options)
            with pytest.raises(type(expected), match=f"^{re.escape(str(expected))}$"):
                module(*tensors, **options)

    def test_a_base_checkpoint_loads_strictly_but_not_while_merged(self):
        module = perturb(inject(attention(), "^$"))
        other = attention()
        with torch.no_grad():
            other.in_proj_weight.zero_()
        module.load_state_dict(other.state_dict())
        assert not packed(module).any()
        disha.merge_adapters(module)
        with pytest.raises(MergeError, match=r"load in_proj_weight, which unmerging would undo"):
            module.load_state_dict(other.state_dict())

    def test_keys_of_the_state_dict(self):
        module = attention()
        keys = set(module.state_dict())
        inject(module, "q_proj")
        assert set(module.state_dict()) == keys | {"disha.default.q_proj.bone_block"}

    def test_merging_some_projections_leaves_the_others(self):
        module = inject(inject(attention(), "q_proj|v_proj", adapter="a"), "k_proj", adapter="b")
        perturb(module)
        original = packed(module).detach().clone()
        disha.merge_adapters(module, "a")
        changed = module.in_proj_weight != original
        assert [part.any().item() for part in changed.chunk(3)] == [True, False, True]
        assert torch.equal(packed(module), original)
        disha.unmerge_adapters(module)
        assert torch.equal(module._parameters["in_proj_weight"], original)

    def test_a_packed_weight_shared_with_another_module(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = attention(), attention()
                self.second.in_proj_weight = self.first.in_proj_weight

        model = perturb(disha.inject_adapters(Pair(), "first.[qk]_proj", 2, exclude="second"))
        tensors = inputs(model.first)
        expected, other = model.first(*tensors)[0], model.second(*tensors)[0]
        shared = model.second.in_proj_weight
        with pytest.raises(MergeError, match=r"shared with second.in_proj_weight"):
            disha.merge_adapters(model)
        disha.merge_adapters(model, untie=True)
        close(model.first(*tensors)[0], expected)
        assert torch.equal(model.second(*tensors)[0], other)
        disha.unmerge_adapters(model)
        assert model.first._parameters["in_proj_weight"] is shared is model.second.in_proj_weight

    def test_a_forward_set_on_the_instance(self):
        module = attention()
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        perturb(inject(module, "^$"))
        tensors = inputs(module)
        close(module(*tensors)[0], dense(module, attention())(*tensors)[0])

    def test_a_packed_weight_that_the_owner_reads(self):
        model = perturb(disha.inject_adapters(ReadsPacked(), "all-linear", 2))
        plain, x = ReadsPacked(), torch.randn(3, 4, WIDTH, dtype=torch.float64)
        dense(model.attn, plain.attn)
        close(model(x), plain(x))
        disha.merge_adapters(model)
        close(model(x), plain(x))

    def test_a_child_of_the_name_of_a_projection_stays(self):
        class Own(nn.MultiheadAttention):
            def __init__(self):
                super().__init__(WIDTH, HEADS)
                self.q_proj = nn.Linear(WIDTH, WIDTH)

        class Calls(Own):
            def forward(self, x):
                x = self.q_proj(x)
                return super().forward(x, x, x)[0]

        model, x = nn.Sequential(Calls()), torch.randn(4, 3, WIDTH)
        before, base = snapshot(model), model(x)
        disha.inject_adapters(model, "q_proj", 2)
        assert torch.equal(model(x), base)
        perturb(model)
        assert not torch.allclose(model(x), base)
        disha.remove_adapters(model)
        assert_unchanged(model, before)

    def test_an_own_forward_sees_the_update(self):
        class Own(nn.MultiheadAttention):
            def forward(self, x):
                return super().forward(x, x, x)[0]

        seed_torch(0)
        model = nn.Sequential(Own(WIDTH, HEADS), nn.Linear(WIDTH, WIDTH)).double()
        plain = copy.deepcopy(model)
        perturb(disha.inject_adapters(model, "all-linear", 2))
        plain.load_state_dict(merged_state(model))
        x = torch.randn(4, 3, WIDTH, dtype=torch.float64)
        close(model(x), plain(x))


PROJECTIONS = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"}


class TestNames:
    def model(self):
        return nn.ModuleDict({"attn": attention(), "ff": nn.Linear(WIDTH, WIDTH)})

    @pytest.mark.parametrize(
        ("target", "names"),
        [
            ("all-linear", {*PROJECTIONS, "ff"}),
            (r"attn$", PROJECTIONS),
            (r"\.[qv]_proj", {"attn.q_proj", "attn.v_proj"}),
            (lambda name, module: isinstance(module, nn.MultiheadAttention), PROJECTIONS),
            (lambda name, module: name == "attn.q_proj", {"attn.q_proj"}),
        ],
    )
    def test_targets(self, target, names):
        plan = disha.plan_adapters(self.model(), target, 2)
        assert sorted(one.name for one in plan.layers) == sorted(names)
        assert plan.total == sum(p.numel() for p in self.model().parameters()) + plan.added

    def test_excluding_the_attention_excludes_its_four_layers(self):
        plan = disha.plan_adapters(self.model(), ".", 2, exclude="attn$")
        assert [layer.name for layer in plan.layers] == ["ff"]
        assert {s.name for s in plan.skipped} == PROJECTIONS

    def test_ranks_of_their_own(self):
        model = disha.inject_adapters(self.model(), "attn$", 2, rank_pattern={"q_proj": 3})
        assert model["attn"].disha["default"].q_proj.r == 3
        assert model["attn"].disha["default"].k_proj.r == 2

    def test_a_module_shared_under_two_names(self, tmp_path):
        def build():
            one = attention()
            return nn.ModuleDict({"a": one, "b": one})

        model = perturb(disha.inject_adapters(build(), "b.q_proj", 2))
        disha.save_adapter(model, tmp_path / "file")
        fresh = build()
        disha.load_adapter(fresh, tmp_path / "file")
        tensors = inputs(model["a"])
        assert torch.equal(fresh["b"](*tensors)[0], model["a"](*tensors)[0])


def encoder_layer(**options):
    seed_torch(0)
    defaults = {"dropout": 0.0, "batch_first": True}
    return nn.TransformerEncoderLayer(8, 2, 12, **{**defaults, **options}).double()


def merged_state(model):
    """Return the base state dict of an adapted model with the updates in its weights."""
    copied = copy.deepcopy(model)
    disha.merge_adapters(copied)
    return {key: value for key, value in copied.state_dict().items() if ".disha." not in key}


MODES = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "no_grad": (False, torch.no_grad),
    "inference": (False, torch.inference_mode),
}
TARGETS = ["linear1", "linear2", r"self_attn.[qkv]_proj", "out_proj", "self_attn$", "all-linear"]
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4)).double()
CAUSAL, PADDING = causal(5, 5), padding(3, 5)
SEEN = {False: ~PADDING, True: ~PADDING.flip(1)}
"""Whether the padding comes first -> the positions that count. In evaluation, torch fills the
others with zeros if the encoder nests."""


def encoder(layer=None, **options):
    return nn.TransformerEncoder(layer or encoder_layer(), 2, **options)


def transformer():
    seed_torch(0)
    return nn.Transformer(8, 2, 2, 2, 12, dropout=0.0, batch_first=True).double()


def padded(build, flip=False, **options):
    seen = SEEN[flip]
    return build, lambda m: m(X, src_key_padding_mask=~seen, **options)[seen]


MODELS = {
    "norm first": (lambda: encoder_layer(norm_first=True, activation="gelu"), lambda m: m(X)),
    "norm last": (encoder_layer, lambda m: m(X)),
    "causal": (encoder_layer, lambda m: m(X, src_mask=CAUSAL, is_causal=True)),
    "padding": padded(lambda: encoder(norm=nn.LayerNorm(8).double())),
    "padding first": padded(encoder, flip=True),
    "padding, never nested": padded(lambda: encoder(enable_nested_tensor=False)),
    "no mask": (encoder, lambda m: m(X)),
    "both masks": padded(encoder, mask=CAUSAL),
    "sequence first": (
        lambda: encoder(encoder_layer(batch_first=False), enable_nested_tensor=False),
        lambda m: m(X),
    ),
    "transformer": (
        transformer,
        lambda m: m(X, X, None, None, CAUSAL, PADDING, memory_key_padding_mask=PADDING),
    ),
    "by name": (encoder_layer, lambda m: m(src=X)),
}
CHECKS = [
    (model, target, list(MODES)[(i + j) % 4])
    for i, model in enumerate(MODELS)
    for j, target in enumerate(TARGETS)
]


@pytest.mark.parametrize(("name", "target", "mode"), CHECKS)
def test_encoders_where_torch_takes_fused_paths_that_bypass_the_layers(name, target, mode):
    (build, run), (training, context) = MODELS[name], MODES[mode]
    model = disha.inject_adapters(build(), target, 2).train(training)
    plain = build().train(training)
    with context():
        before, identical = run(plain), run(model)
    perturb(model)
    plain.load_state_dict(merged_state(model))
    with context():
        expected, output = run(plain), run(model)
    assert (expected - before).abs().max() > 1e-3
    close(identical, before, 1e-8)
    close(output, expected, 1e-8)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("build", "run"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda m, x: m(x)),
        (lambda: nn.MultiheadAttention(8, 2), lambda m, x: m(x, x, x)[0]),
    ],
)
def test_the_dtype_under_autocast_is_that_of_the_base(build, run, dtype, grad):
    x, model = torch.randn(2, 3, 8), build().eval()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
        expected = run(model, x).dtype
        disha.inject_adapters(model, "all-linear", 2, dtype=torch.bfloat16)
        assert run(model, x).dtype == expected


class TestOwners:
    def model(self):
        return nn.TransformerEncoder(encoder_layer(), 2)

    def test_removal_restores_every_class_and_attribute(self):
        model = self.model()
        before = snapshot(model)
        disha.inject_adapters(model, "layers.1.linear2", 2)
        disha.remove_adapters(model)
        assert_unchanged(model, before)
        assert not model._forward_hooks

    def test_removing_one_of_two_adapters_leaves_the_encoder_guarded(self):
        model = disha.inject_adapters(self.model(), "layers.0", 2, adapter="a")
        disha.inject_adapters(model, "layers.1", 2, adapter="b")
        disha.remove_adapters(model, "b")
        assert type(model.layers[1].self_attn) is nn.MultiheadAttention
        assert type(model.layers[0].self_attn) is not nn.MultiheadAttention

    def test_copies_are_guarded_and_restore_too(self):
        model = disha.inject_adapters(self.model(), "all-linear", 2).eval()
        perturb(model)
        copied = pickled(model)
        x, mask = torch.randn(3, 5, 8, dtype=torch.float64), padding(3, 5)
        with torch.no_grad():
            assert torch.equal(
                copied(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
            )
        disha.remove_adapters(copied)
        assert type(copied) is nn.TransformerEncoder

    def test_an_encoder_made_of_an_adapted_layer(self):
        layer = perturb(disha.inject_adapters(encoder_layer(), "linear1", 2))
        encoder = nn.TransformerEncoder(layer, 2).eval()
        x, mask = torch.randn(3, 5, 8, dtype=torch.float64), padding(3, 5)
        with torch.no_grad():
            output = encoder(x, src_key_padding_mask=mask)
        expected = encoder(x.requires_grad_(), src_key_padding_mask=mask)
        close(output[~mask], expected[~mask].detach(), 1e-8)

    def test_a_layer_of_ones_own(self):
        class Own(nn.TransformerEncoderLayer):
            def forward(self, src, *args, **kwargs):
                return 2 * super().forward(src, *args, **kwargs)

        def build():
            seed_torch(0)
            return Own(8, 2, 12, dropout=0.0, batch_first=True).double().eval()

        model = perturb(disha.inject_adapters(build(), "all-linear", 2))
        plain = build()
        plain.load_state_dict(merged_state(model))
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        with torch.no_grad():
            close(model(x), plain(x), 1e-8)
        disha.remove_adapters(model)
        assert type(model) is Own

    def test_routing_samples_through_an_encoder(self):
        model = disha.inject_adapters(self.model(), "all-linear", 2, adapter="a").eval()
        perturb(disha.inject_adapters(model, "linear1|v_proj", 1, adapter="b"))
        x, mask = torch.randn(3, 5, 8, dtype=torch.float64), padding(3, 5)
        names = ["b", None, "a"]
        with torch.no_grad(), disha.route_adapters(model, names):
            routed = model(x, src_key_padding_mask=mask)
        for sample, name in enumerate(names):
            disha.set_active_adapters(model, [] if name is None else name)
            rows = slice(sample, sample + 1)
            alone = model(x[rows], src_key_padding_mask=mask[rows])
            close(routed[rows][~mask[rows]], alone[~mask[rows]].detach(), 1e-8)

    def test_routing_where_a_table_is_the_output_projection(self):
        table = nn.Embedding(8, 8, dtype=torch.float64)
        perturb(disha.inject_adapters(table, "", 2, adapter="a"))
        perturb(disha.inject_adapters(table, "", 2, adapter="b"), seed=1)
        x = torch.randn(3, 3, 8, dtype=torch.float64)  # positions, samples, width
        names = ["b", None, "a"]

        def attend(x):
            packed = torch.eye(8, dtype=torch.float64).repeat(3, 1)
            return F.multi_head_attention_forward(
                x, x, x, 8, 2, packed, None, None, None, False, 0.0, table.weight, None
            )[0]

        with disha.route_adapters(table, names):
            routed = attend(x)
        for sample, name in enumerate(names):
            disha.set_active_adapters(table, [] if name is None else name)
            close(routed[:, sample], attend(x[:, sample : sample + 1])[:, 0], 1e-10)

    def test_routing_is_refused_where_layers_see_sequences_first(self):
        model = disha.inject_adapters(encoder_layer(batch_first=False), "linear1", 2)
        with (
            pytest.raises(ArgumentError, match="self_attn has batch_first=False"),
            disha.route_adapters(model, ["default", None]),
        ):
            pass
        only_attention = disha.inject_adapters(encoder_layer(batch_first=False), r"self_attn", 2)
        with disha.route_adapters(only_attention, ["default", None]):
            assert only_attention(torch.randn(5, 2, 8, dtype=torch.float64)).shape == (5, 2, 8)

    @pytest.mark.skipif(
        torch.__version__ < "2.9", reason="torch 2.8 can't compile it, also without adapters"
    )
    def test_compiled_with_padding_in_evaluation(self):
        model = disha.inject_adapters(self.model(), "all-linear", 2).eval()
        perturb(model)
        x, mask = torch.randn(3, 5, 8, dtype=torch.float64), padding(3, 5)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            output = compiled(x, src_key_padding_mask=mask)
            # Compiled, torch itself leaves padding as it comes and does not fill it with zeros.
            close(output[~mask], model(x, src_key_padding_mask=mask)[~mask], 1e-8)
