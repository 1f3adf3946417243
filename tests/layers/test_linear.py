"""BoneLinear, BatLinear and adapted linear layers as drop-in nn.Linear."""

import copy
import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import disha
from disha import BatLinear, BoneLinear, DishaError, MergeError
from disha.layers.adapted import AdaptedLinear
from tests import reference
from tests.conftest import COPIES, kept_by, merged_weight, perturb, seed_torch
from tests.functional.matrices import close_to_exact

KINDS = reference.KINDS
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def born(kind, in_features=10, out_features=9, *args, r=4, **kwargs):
    if kind == "bat":
        return BatLinear(in_features, out_features, *args, r=r, **kwargs)
    if kind == "lora":
        return born_by_injection(in_features, out_features, *args, r=r, **kwargs)
    settings = reference.settings_of(kind, 3)
    settings.pop("method", None)
    return BoneLinear(in_features, out_features, *args, r=r, **settings, **kwargs)


def born_by_injection(*args, dtype=None, block_dtype=None, freeze=True, **settings):
    """A LoRA has no layer of its own."""
    layer = nn.Linear(*args, **({} if dtype is None else {"dtype": dtype}))
    disha.inject_adapters(layer, "all-linear", method="lora", dtype=block_dtype, **settings)
    for parameter in (layer.base_weight, layer.bias):
        if parameter is not None:
            parameter.requires_grad_(not freeze)
    return layer


def inject(model, kind, r=4, **kwargs):
    settings = reference.settings_of(kind, 3)
    return disha.inject_adapters(model, "all-linear", r, **settings, **kwargs)


def fill(model):
    """Give every block random values, so that adapters act."""
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.normal_(0, 0.5)
    return model


def oracle(layer, x, adapters=("default",)):
    """The float64 output of the layer with these adapters, in this order."""
    blocks = [layer.disha[adapter] for adapter in adapters]
    triples = [(block.method.name, block.block.detach().double(), block.scale) for block in blocks]
    bias = None if layer.bias is None else layer.bias.detach().double()
    return reference.linear(x.double(), layer.base_weight.detach().double(), bias, triples)


class Doubling(nn.Linear):
    """Its forward reaches that of nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x + 1)


def subclass_layer(cls, kind):
    return fill(inject(cls(10, 9, dtype=torch.float64), kind, scale=0.5))


# --- a drop-in nn.Linear -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_positional_arguments_are_those_of_linear(kind):
    layer = born(kind, 10, 9, False, "meta", torch.float64)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert "bias" in layer._parameters
    assert layer.weight.shape == (9, 10)
    for tensor in layer.state_dict().values():
        assert tensor.device.type == "meta"
        assert tensor.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_layer_from_birth_draws_what_linear_draws(kind):
    seed_torch(3)
    plain = nn.Linear(10, 9)
    seed_torch(3)
    layer = born(kind)
    assert torch.equal(layer.base_weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_from_birth_computes_the_formula(kind, bias):
    layer = fill(born(kind, 10, 9, bias, dtype=torch.float64, scale=0.7))
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    close_to_exact(layer(x), oracle(layer, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [BoneLinear, BatLinear])
def test_from_linear_shares_the_parameter_objects_and_mode(cls, bias):
    linear = nn.Linear(10, 9, bias).eval()
    layer = cls.from_linear(linear, r=4, adapter="mine", scale=0.5, dropout=0.1)
    assert type(layer) is cls
    assert layer._parameters["weight"] is linear.weight
    assert layer.bias is linear.bias
    assert "bias" in layer._parameters
    assert not layer.training
    assert not layer.disha["mine"].training
    assert layer.disha["mine"].scale == 0.5
    assert layer.disha["mine"].dropout == 0.1
    fill(layer)
    x = torch.randn(3, 10)
    close_to_exact(layer(x), oracle(layer, x, ("mine",)), 1e-5)


@pytest.mark.parametrize("cls", [BoneLinear, BatLinear])
def test_base_is_frozen_unless_asked_not_to(cls):
    frozen, free = cls(10, 9, r=4), cls(10, 9, r=4, freeze=False)
    assert [n for n, p in frozen.named_parameters() if p.requires_grad] == [
        f"disha.default.{frozen.disha['default'].parameter_name}"
    ]
    assert all(p.requires_grad for p in free.parameters())
    linear = nn.Linear(10, 9)
    cls.from_linear(linear, r=4, freeze=False)
    assert linear.weight.requires_grad
    cls.from_linear(linear, r=4)
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_block_shapes_and_names(kind):
    block = born(kind, adapter="mine").disha["mine"]
    expected = {"tile": (4, 3), "bat": (3, 4, 4), "lora": (4, 19)}.get(kind, (4, 9))
    assert block.block.shape == expected
    name = "lora_block" if kind == "lora" else ("bat_block" if kind == "bat" else "bone_block")
    assert set(born(kind, adapter="mine").state_dict()) == {"weight", "bias", f"disha.mine.{name}"}


@pytest.mark.parametrize("kind", KINDS)
def test_printout_shows_method_sizes_adapter_and_scale(kind):
    text = repr(born(kind, scale=0.5, adapter="mine"))
    for part in ("in_features=10, out_features=9", "active=['mine']", "r=4", "scale=0.5"):
        assert part in text
    assert f"method={reference.method_of_kind(kind)}, " in text
    assert ("r_out=3" in text) == (kind == "tile")
    layer = born(kind)
    with disha.adapters_disabled(layer):
        assert "disabled" in repr(layer)
    assert "disabled" not in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters_draws_the_base_and_zeroes_the_block(kind):
    layer = fill(born(kind))
    before, block = layer.base_weight.clone(), layer.disha["default"].block
    filled = block.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.base_weight, before)
    if kind == "lora":  # A is drawn anew, and B is zero
        assert (block[:, :10] != filled[:, :10]).all()
        block = block[:, 10:]
    assert not block.any()


@pytest.mark.parametrize("kind", KINDS)
def test_kaiming_init_acts_at_once_and_again_after_reset(kind):
    layer = born(kind, init="kaiming")
    assert layer.disha["default"].block.any()
    layer.disha["default"].block.data.zero_()
    layer.reset_parameters()
    assert layer.disha["default"].block.any()
    x = torch.randn(2, 10)
    assert not torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_materialised_from_meta_is_the_plain_layer(kind):
    layer = born(kind, 10, 9, True, "meta", scale=0.25).to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))
    assert layer.disha["default"].scale_tensor.item() == 0.25
    fill(layer)
    close_to_exact(layer(x), oracle(layer, x), 1e-5)


# --- identity, dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("block_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_injection_changes_no_bit_of_output_and_input_gradient(kind, block_dtype):
    dtype = torch.bfloat16
    model = nn.Sequential(nn.Linear(10, 9), nn.GELU(), nn.Linear(9, 6, False)).to(dtype)
    x = torch.randn(5, 10, dtype=dtype, requires_grad=True)
    before = model(x)
    (gradient,) = torch.autograd.grad(before.square().sum(), x)
    inject(model, kind, dtype=block_dtype)
    after = model(x)
    assert after.dtype == dtype
    assert torch.equal(after, before)
    assert torch.equal(torch.autograd.grad(after.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_at_least_float32_or_has_its_own_dtype(kind, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = born(kind, dtype=dtype)
    assert layer.disha["default"].block.dtype == wide
    assert layer.weight.dtype == dtype
    assert fill(layer)(torch.randn(2, 10, dtype=dtype)).dtype == dtype
    layer = born(kind, dtype=dtype, block_dtype=torch.bfloat16)
    assert layer.disha["default"].block.dtype == torch.bfloat16
    assert fill(layer)(torch.randn(2, 10, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("own_dtype", "x_dtype", "dropout"),
    [
        (torch.float32, torch.float32, 0.5),
        (torch.float32, torch.bfloat16, 0.0),
        (torch.bfloat16, torch.float32, 0.0),
        (torch.bfloat16, torch.bfloat16, 0.5),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_output_dtype_under_autocast_is_that_of_the_plain_layer(kind, own_dtype, x_dtype, dropout):
    plain = nn.Linear(10, 9, dtype=own_dtype)
    layer = fill(inject(copy.deepcopy(plain), kind, dropout=dropout))
    x = torch.randn(3, 10, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
        layer(x).sum().backward()
    assert layer.disha["default"].block.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_changing_dtype_never_rounds_the_scale(kind):
    model = nn.Sequential(born(kind, scale=0.1))
    block = model[0].disha["default"]
    model.to(torch.bfloat16)
    assert block.block.dtype == torch.bfloat16
    assert block.scale_tensor.dtype == torch.float32
    assert block.scale_tensor.item() == torch.tensor(0.1, dtype=torch.float32).item()
    model.half().double()
    assert block.scale_tensor.dtype == torch.float64
    assert block.scale_tensor.item() == block.scale == 0.1
    fill(model)
    x = torch.randn(2, 10, dtype=torch.float64)
    close_to_exact(model(x), oracle(model[0], x))


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_unfrozen_base_are_those_of_the_formula(kind):
    layer = fill(born(kind, dtype=torch.float64, freeze=False, scale=0.5))
    x = torch.randn(4, 10, dtype=torch.float64)
    block = layer.disha["default"].block
    leaves = (layer._parameters["weight"], layer.bias, block)
    y = reference.linear(x, layer.base_weight, layer.bias, [(kind, block, 0.5)])
    expected = torch.autograd.grad(y.square().sum(), leaves)
    found = torch.autograd.grad(layer(x).square().sum(), leaves)
    for actual, wanted in zip(found, expected, strict=True):
        close_to_exact(actual, wanted)


@pytest.mark.parametrize("kind", reference.BONE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bone_keeps_only_its_shard_sums_for_backward(kind, dtype):
    tokens, r, sizes = 10, 4, (62, 45)
    layer = born(kind, *sizes, r=r, dtype=dtype, scale=0.5)
    x = torch.randn(tokens, sizes[0], dtype=dtype, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = kept_by(lambda: layer(x))
    block = layer.disha["default"].block
    cast = 0 if block.dtype == dtype else block.numel()  # the product takes the block in x's dtype
    extra = [size for address, size in kept.items() if address not in parameters]
    assert sum(extra) == (tokens * r + cast) * dtype.itemsize


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_leaves_the_base_path_alone(kind):
    layer = born(kind, dropout=0.9).train()
    x = torch.randn(5, 10)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))


def test_dropout_follows_train_and_eval_of_the_model_for_adapters_added_later():
    model = inject(nn.Sequential(nn.Linear(8, 8)).eval(), "bone", dropout=0.5)
    fill(model)
    x = torch.randn(50, 8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_inside_adapters_disabled_does_not_disturb_backward(kind):
    layer = fill(born(kind, dtype=torch.float64, scale=0.5))
    block = layer.disha["default"].block
    x = torch.randn(4, 10, dtype=torch.float64)
    policy = layer(x)
    with disha.adapters_disabled(layer):
        base = layer(x)
    assert torch.equal(base, F.linear(x, layer.base_weight, layer.bias))
    (gradient,) = torch.autograd.grad((policy - base).square().sum(), block)
    y = reference.linear(x, layer.base_weight, layer.bias, [(kind, block, 0.5)])
    close_to_exact(gradient, torch.autograd.grad((y - base).square().sum(), block)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_layer_injected_in_inference_mode_trains_later(kind):
    model = nn.Sequential(nn.Linear(10, 9))
    with torch.inference_mode():
        inject(model, kind)
        disha.set_adapter_scale(model, 0.5)
        model(torch.randn(2, 10))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(4, 10)
    losses = []
    for _ in range(2):
        losses.append(model(x).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_sees_the_adapter(kind):
    layer = fill(born(kind, dtype=torch.float64))
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = oracle(layer, x)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for training in (True, False):
            with mode():
                close_to_exact(layer.train(training)(x), expected)


# --- scale, several adapters ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_runtime_scale_multiplies_the_update(kind):
    layer = fill(born(kind, dtype=torch.float64))
    x = torch.randn(4, 10, dtype=torch.float64)
    base = F.linear(x, layer.base_weight, layer.bias)
    whole = layer(x) - base
    for scale in (0.0, 1, -2.5, 0.1):
        disha.set_adapter_scale(layer, scale)
        close_to_exact(layer(x), oracle(layer, x))
        close_to_exact(layer(x) - base, scale * whole)


def three_adapters(linear):
    inject(linear, "bone", r=3, adapter="bone")
    inject(linear, "bat", r=4, adapter="bat")
    inject(linear, "tile", r=2, adapter="tile")
    inject(linear, "bat", r=5, adapter="bat2")
    fill(linear)
    for scale, adapter in enumerate(("bone", "bat", "tile", "bat2"), start=1):
        disha.set_adapter_scale(linear, scale / 3, adapter)
    return linear


@pytest.mark.parametrize("training", [True, False])
def test_adapters_add_up_from_the_original_weight_in_any_order(training):
    layer = three_adapters(nn.Linear(10, 9, dtype=torch.float64)).train(training)
    x = torch.randn(4, 10, dtype=torch.float64)
    for count in range(5):
        for names in itertools.permutations(("bone", "bat", "tile", "bat2"), count):
            disha.set_active_adapters(layer, list(names))
            close_to_exact(layer(x), oracle(layer, x, sorted(names)))


def test_plain_layer_takes_its_input_by_keyword_as_before():
    layer = inject(nn.Linear(10, 9), "bone")
    x = torch.randn(3, 10)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(born, kind, dtype=torch.float64, scale=0.3) for kind in KINDS),
        functools.partial(subclass_layer, Doubling, "bat"),
        lambda: three_adapters(nn.Linear(10, 9, dtype=torch.float64)),
    ],
    ids=[*KINDS, "subclass", "several adapters"],
)
def test_copy_acts_alike_and_shares_nothing(make, duplicate):
    layer = fill(make()).eval()
    twin = duplicate(layer)
    x = torch.randn(3, 10, dtype=torch.float64)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert not twin.training
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in layer.named_parameters()
    }
    # what acts in the copy is what is trained and scaled there, and nowhere else
    before = layer(x)
    adapter = twin.disha.active[0]
    assert twin.disha.active_blocks["weight"][0] is twin.disha[adapter]
    disha.set_adapter_scale(twin, 7.0, adapter)
    twin.disha[adapter].block.data.add_(1.0)
    assert torch.equal(layer(x), before)
    assert not torch.allclose(twin(x), before)
    disha.remove_adapters(twin)
    assert not isinstance(twin, AdaptedLinear) or type(twin) in (BoneLinear, BatLinear)


# --- torch's transformations ---------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield functools.partial(torch.compile, fullgraph=True, backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_dropout_equals_eager(kind, compiler):
    model = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 6))
    fill(inject(model, kind, scale=0.3, dropout=0.3))
    blocks = list(disha.adapter_parameters(model))
    x = torch.randn(4, 10)
    results = []
    for call in (model, compiler(model)):
        seed_torch(5)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), blocks)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_block_it_is_given(kind):
    layer = fill(born(kind, dtype=torch.float64))
    x = torch.randn(4, 10, dtype=torch.float64)
    (name,) = (n for n, p in layer.named_parameters() if p.requires_grad)
    block = torch.randn_like(layer.disha["default"].block)
    y = torch.func.functional_call(layer, {name: block}, (x,))
    expected = reference.linear(x, layer.base_weight, layer.bias, [(kind, block, 1.0)])
    close_to_exact(y, expected)

    def loss(block):
        return torch.func.functional_call(layer, {name: block}, (x,)).square().sum()

    leaf = block.clone().requires_grad_()
    y = reference.linear(x, layer.base_weight, layer.bias, [(kind, leaf, 1.0)])
    close_to_exact(torch.func.grad(loss)(block), torch.autograd.grad(y.square().sum(), leaf)[0])


# --- wrong arguments -----------------------------------------------------------------------------

WRONG = (
    ({"r": 0}, ValueError, "at least 1"),
    ({"r": 11}, ValueError, "in_features=10"),
    ({"r": 2.0}, TypeError, "int"),
    ({"adapter": "a.b"}, ValueError, "dot"),
    ({"block_dtype": torch.int8}, ValueError, "int8"),
    ({"init": "gauss"}, ValueError, "gauss"),
    ({"r_out": 2}, ValueError, "r_out"),
)
"""Of each kind one; `tests/test_config.py` has all that a configuration refuses."""


@pytest.mark.parametrize(("arguments", "kind", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_argument_raises_a_disha_error_of_its_kind(arguments, kind, text):
    arguments = {"r": 4} | arguments
    linear = nn.Linear(10, 9)
    for make in (
        functools.partial(BatLinear, 10, 9),
        functools.partial(BoneLinear.from_linear, linear),
    ):
        with pytest.raises(DishaError, match=text) as caught:
            make(**arguments)
        assert isinstance(caught.value, kind)
    assert linear.weight.requires_grad  # a refused call froze nothing


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "other",
    [
        nn.Conv1d(4, 4, 1),
        None,
        Doubling(10, 9),
        BoneLinear(10, 9, r=4),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(10, 9)),
        torch.nn.utils.weight_norm(nn.Linear(10, 9)),
    ],
    ids=lambda other: type(other).__name__,
)
def test_from_linear_takes_plain_linear_layers_only(other):
    with pytest.raises(DishaError, match="from_linear") as caught:
        BoneLinear.from_linear(other, r=4)
    assert isinstance(caught.value, TypeError)


def test_block_over_a_weight_of_an_untrainable_dtype_is_float32():
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    inject(layer, "bone")
    assert layer.disha["default"].block.dtype == torch.float32


class Cast(nn.Module):
    """Casts the weight of its layer."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(16, 8, bias=False)
        weight = self.layer.weight.detach().to(dtype)
        self.layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.layer.weight.to(x.dtype))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float8_e4m3fn, "bone"), (torch.float8_e5m2, "bat")]
)
def test_a_weight_of_eight_bits_that_is_cast_where_it_is_read(dtype, kind, tmp_path):
    model, x = Cast(dtype), torch.randn(3, 16)
    plain, layer = copy.deepcopy(model), model.layer
    before = layer.weight.float()
    fill(inject(model, kind))
    close_to_exact(model(x), oracle(layer, x), 1e-5)
    with warnings.catch_warnings(action="error"):  # the file has the fingerprint of these 8 bits
        disha.save_adapter(model, tmp_path / "a.safetensors")
        disha.load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(plain(x), model(x))
    merged = merged_weight(layer)
    assert merged.dtype == dtype
    disha.merge_adapters(model)
    assert torch.equal(layer.weight.float(), merged.float())
    disha.unmerge_adapters(model)
    assert torch.equal(layer.base_weight.float(), before)
    layer.disha["default"].block.data.fill_(float("nan"))
    with pytest.raises(MergeError, match="not finite"):
        disha.merge_adapters(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_agree_under_autocast(kind):
    layer = fill(inject(nn.Linear(40, 36), kind))
    x = torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        unmerged = layer(x)
        disha.merge_adapters(layer)
        merged = layer(x)
    # both round products of their own to bfloat16 and add them
    close_to_exact(merged, unmerged, 2**-7 * unmerged.abs().max().item())


class NoSynchronisation(TorchDispatchMode):
    """Refuse what a CUDA graph can't record: waiting for a value, and shapes that depend on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not waits, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "cast"), [(torch.float32, True), (torch.float16, False)], ids=str
)
@pytest.mark.parametrize("method", reference.KINDS)
def test_a_training_step_waits_for_no_value(method, cast, dtype):
    make = disha.BatLinear if method == "bat" else disha.BoneLinear
    options = {"r_out": 6} if method == "tile" else {}
    layer = make(8, 12, r=4, dtype=dtype, init="kaiming", scale=0.5, dropout=0.1, **options)
    for mode in (layer.train, layer.eval):
        mode()
        x = torch.randn(2, 3, 8, dtype=dtype).requires_grad_()
        with NoSynchronisation(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            layer(x).float().sum().backward()
        assert x.grad.any()
        assert layer.disha["default"].block.grad.any()


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_forward_of_a_layer_is_the_product_with_its_weight(dtype, tiles):
    r_out = None if tiles == 1 else 12 // tiles
    layer = disha.BoneLinear(8, 12, r=4, r_out=r_out, dtype=dtype, init="kaiming", scale=0.5)
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    dense = F.linear(x.double(), layer.weight.double() * 1, layer.bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x).double(), dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_adapter_changes_no_bit_for_inputs_of_any_strides(dtype, method):
    layer = nn.Linear(1024, 32, dtype=dtype)
    inputs = [
        torch.randn(2, 1024, 3, dtype=dtype).transpose(1, 2),
        torch.randn(3, 2, 1024, dtype=dtype).transpose(0, 1),
        torch.randn(2, 3, 2048, dtype=dtype)[..., ::2],
        torch.randn(1, 1, 1024, dtype=dtype).expand(2, 3, -1),
        torch.randn(2, 2, 3, 1024, dtype=dtype).transpose(0, 2),
        torch.randn(2, 2, 3, 1024, dtype=dtype),
    ]
    before = [layer(x) for x in inputs]
    disha.inject_adapters(layer, "", 16, method=method)
    for x, expected in zip(inputs, before, strict=True):
        assert torch.equal(layer(x), expected)
    perturb(layer)
    for x in inputs:
        close = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(layer(x), layer(x.contiguous()), **close)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_subclass_that_computes_a_parameter_computes_it_in_its_forward(name):
    layer, x = disha.BoneLinear(8, 4, r=4), torch.randn(3, 8)
    parameters = {**dict(layer.named_parameters()), name: 3.0 * layer._parameters[name]}
    expected = F.linear(x, parameters["weight"], parameters["bias"])
    computed = {name: property(lambda self: 3.0 * self._parameters[name])}
    own_forward = {"forward": lambda self, x: type(layer).__base__.forward(self, x)}
    for members in (computed, computed | own_forward):
        layer.__class__ = type("Computes", (disha.BoneLinear,), members)
        torch.testing.assert_close(layer(x), expected)


def test_symbolic_tracing_of_a_layer_sees_its_update():
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4, init="kaiming")
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_model_that_was_traced_first_reads_adapted_weights():
    """A trace of an adapted model has what it reads as constants."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.layer = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.mix @ self.layer.weight.T

    traced = torch.fx.symbolic_trace(Reads())
    layouts = {"mix": "in out", "layer.weight": "out in"}
    disha.inject_adapters(traced, "all-linear", r=4, layouts=layouts)
    report = disha.check_adapters(traced, torch.randn(3, 8))
    assert report.ok
    assert [one.name for one in report.weights] == ["mix", "layer"]


def test_a_traced_model_calls_its_adapted_layers():
    """So it switches, casts, copies and trains as the model, as a traced plain layer would."""
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4, init="kaiming")
    disha.inject_adapters(model, "0", r=2, init="kaiming", adapter="other")
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 8)
    assert [*traced.state_dict()] == [*model.state_dict()]
    for active in ("default", ()):
        disha.set_active_adapters(model, active)
        assert torch.equal(traced(x), model(x))
        assert torch.equal(copy.deepcopy(traced)(x), model(x))
    assert traced.double()(x.double()).dtype == torch.float64
