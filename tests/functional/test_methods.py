"""The table of methods, cell by cell against the loops of reference.py, and methods of users."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import disha
from disha import functional
from disha.errors import ArgumentError, DishaError
from disha.functional import METHODS, PATTERNS, Geometry, Layout, Method, Update, method_of
from disha.functional.parts import update_of_part
from tests import reference
from tests.conftest import assert_same, close, pickled, seed_torch
from tests.functional.cases import (
    BLOCKS,
    CUTS_AT,
    LAYOUTS,
    ROWS,
    case_of,
    check_same,
    on_every_layout,
    on_every_layout_with_every_block,
    stack_of,
    with_every_block,
)

MATRIX, STACK = Layout("out in"), Layout("expert out in")


def test_every_method_is_tried():
    tried = {method for method, _, _ in BLOCKS.values()}
    kinds = {reference.method_of_kind(kind) for kind in reference.KINDS}
    methods = {*METHODS, *reference.GROUPS}
    assert tried == methods, "add a row for each method to BLOCKS"
    assert kinds == methods, "add a kind for each method to reference.KINDS"
    assert set(reference.LOOPS) == methods, "add a loop for each method to reference.LOOPS"
    assert set(CUTS_AT) == set(METHODS), "say for each method in CUTS_AT where it can be cut"


@on_every_layout_with_every_block
def test_the_update_is_that_of_the_loops(kind, name):
    check_update(kind, name)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("kind", "name"), list(zip(LAYOUTS, itertools.cycle(BLOCKS))))
def test_the_update_of_rows_is_that_of_the_loops(kind, name, rows):
    check_update(kind, name, rows)


def check_update(kind, name, rows=()):
    if BLOCKS[name][2] and sum(stop - first for first, stop in rows) % BLOCKS[name][2]:
        rows = rows[:1]  # a tile has to divide them
    case = case_of(kind, name, rows)
    torch.testing.assert_close(case.delta, case.expected, rtol=1e-12, atol=1e-12)
    if "bone" in case.method:
        assert torch.equal(case.delta, case.expected)  # only copies


@on_every_layout_with_every_block
def test_gradients_are_those_of_the_loops(kind, name):
    case = case_of(kind, name, ((0, 2), (3, 5)))
    leaves = [case.block.requires_grad_()]
    if method_of(case.method).reads_weight:
        leaves.append(case.weight.requires_grad_())
    cotangent = torch.randn_like(case.weight)
    found = torch.autograd.grad(case.delta, leaves, cotangent)
    expected = torch.autograd.grad(case.expected, leaves, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@with_every_block
def test_the_update_of_16_bits_is_not_rounded(name, dtype):
    case = case_of("out in", name, dtype=dtype)
    exact = case._replace(weight=case.weight.double(), block=case.block.double()).expected
    with torch.autocast("cpu", torch.bfloat16):
        found = case.delta
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


SHAPES = {
    "out in": lambda r, out: (r, out),
    "in out": lambda r, out: (r, out),
    "index out": lambda r, out: (r, out),
    "conv1d": lambda r, out: (out, r, 3),
    "out in *kernel": lambda r, out: (out, r, 2, 3),
    "transposed 1d": lambda r, out: (r, out, 3),
    "grouped transposed 2d": lambda r, out: (2 * r, out, 2, 2),
    "expert out in": lambda r, out: (3, r, out),
    "expert in out": lambda r, out: (3, r, out),
}


def test_every_layout_has_a_shape():
    tried = {LAYOUTS[kind][0].pattern for kind in SHAPES}
    assert tried == set(PATTERNS), "add a row for each layout to SHAPES"


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_of_bone_blocks(kind):
    (layout, shape), expected = LAYOUTS[kind], SHAPES[kind]
    assert method_of("bone").block_shape(layout, shape, r=4) == expected(4, 6)
    assert method_of("bone").block_shape(layout, shape, r=4, r_out=3) == expected(4, 3)
    rows = ((0, 2), (3, 5))
    assert method_of("bone").block_shape(layout, shape, r=4, output_ranges=rows) == expected(4, 4)


@on_every_layout
def test_shapes_of_bat_blocks_have_the_stack_in_front(kind):
    layout, shape = LAYOUTS[kind]
    for rows, outputs in (((), 6), (((0, 2), (3, 6)), 5)):
        found = method_of("bat").block_shape(layout, shape, r=4, output_ranges=rows)
        assert found == (*stack_of(kind), -(-outputs // 4), 4, 4)


@on_every_layout_with_every_block
def test_a_kept_block_and_the_methods_own_are_inverse(kind, name):
    case = case_of(kind, name)
    own = method_of(case.method).matrix_block(case.layout, case.block)
    assert tuple(own.shape) == method_of(case.method).shape(case.geometry, *BLOCKS[name][1:])
    found = method_of(case.method).stack_of(case.layout, case.block.shape)
    spans_kernel = method_of(case.method).spans_kernel
    shown = case.geometry.stack_without_kernel() if spans_kernel else case.geometry.stack
    assert found == shown
    assert case.geometry.stack == stack_of(kind)
    assert torch.equal(method_of(case.method).kept_block(case.layout, own), case.block)
    again = method_of(case.method).kept_block(case.layout, own.clone())
    assert torch.equal(method_of(case.method).matrix_block(case.layout, again), own)


def has_wider_blocks(method):
    return type(method_of(method)).widen is not Method.widen


@on_every_layout_with_every_block
def test_a_wider_block_has_the_same_update(kind, name):
    case, times = case_of(kind, name), 2 + len(kind) % 2
    wider = method_of(case.method).wider_block(
        case.layout, case.block, case.geometry, case.r, times * case.r
    )
    if not has_wider_blocks(case.method):
        assert wider is None
        return
    shape = method_of(case.method).block_shape(
        case.layout, case.weight.shape, times * case.r, BLOCKS[name][2]
    )
    assert tuple(wider.shape) == shape
    check_same(case.method, case._replace(block=wider).delta, case.delta)


@with_every_block
def test_a_block_of_its_own_size_stays_and_no_other_multiple_exists(name):
    case = case_of("grouped transposed 2d", name)
    method, args = method_of(case.method), (case.layout, case.block, case.geometry, case.r)
    assert method.wider_block(*args, case.r) is case.block
    if case.r > 1 and case.method != "lora":
        assert method.wider_block(*args, case.r + 1) is None


@on_every_layout_with_every_block
def test_a_joined_block_has_the_sum_of_the_updates(kind, name):
    case = case_of(kind, name)
    other = case._replace(block=torch.randn_like(case.block))
    method = method_of(case.method)
    joined = method.join([(case.block, 1.0), (other.block, 0.5)], case.geometry)
    if type(method).join is Method.join:
        assert joined is None
        return
    close(case._replace(block=joined).delta, case.delta + 0.5 * other.delta, 1e-12)


@pytest.mark.parametrize(("pattern", "starts_at_zero"), [("out in", "B"), ("index out", "A")])
def test_a_lora_starts_as_that_of_peft(pattern, starts_at_zero):
    layout = Layout(pattern)
    geometry = layout.geometry((6, 6))
    block = torch.ones(2, 12)
    method_of("lora").start(block, geometry, layout)
    a, b = method_of("lora").factors(block, geometry)
    assert (a.any(), b.any()) == (starts_at_zero == "B", starts_at_zero == "A")


@on_every_layout_with_every_block
def test_lora_factors_multiply_to_the_update_without_loss(kind, name):
    case = case_of(kind, name)
    method = method_of(case.method)
    factors = method.lora_factors(case.layout, case.block, case.geometry)
    if not method.low_rank:
        assert factors is None
        assert method.from_factors(torch.zeros(2, 4), torch.zeros(4, 2), 2) is None
        return
    a, b = factors
    if not method.spans_kernel:
        again = method.kept_block(case.layout, method.from_factors(a, b, case.r))
        assert torch.equal(case._replace(block=again).delta, case.delta)
    if case.method == "lora":
        delta = case.layout.matrices(case.delta)
        if case.layout.padding_idx is not None:
            a[..., case.layout.padding_idx] = 0.0
        close(b @ a, delta, 1e-12)
        return
    outputs, inputs = case.geometry.out_features, case.geometry.in_features
    groups = {"bone_groups2": 2, "bone_groups_all": min(-(-inputs // case.r), outputs)}
    if case.method in groups:
        assert method.from_factors(a, torch.zeros_like(b), case.r) is None  # of any number
        assert method.from_factors(a, b, b.shape[-1] + 1) is None
    rank = groups.get(case.method, 1) * case.r
    assert tuple(a.shape) == (*stack_of(kind), rank, inputs)
    assert tuple(b.shape) == (*stack_of(kind), outputs, rank)
    assert a.is_contiguous()
    assert b.is_contiguous()
    delta = case.layout.matrices(case.delta)
    if case.layout.padding_idx is not None:
        assert not delta[..., case.layout.padding_idx].any()
        a[..., case.layout.padding_idx] = 0.0
    assert torch.equal(b @ a, delta)  # each column of A has a single 1


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 2), (2, 6), (4, 6), (1, 3), (2, 5), (0, 7), (6, 7)]
)
@pytest.mark.parametrize("name", [name for name in BLOCKS if BLOCKS[name][0] in CUTS_AT])
def test_the_block_of_a_slice_of_outputs(name, start, stop):
    method, r, _ = BLOCKS[name]
    layout, weight = Layout("out in"), torch.randn(7, 7, dtype=torch.float64)
    shape = method_of(method).block_shape(layout, weight.shape, r)
    block = torch.randn(shape, dtype=torch.float64)
    part_of_block = method_of(method).of_outputs(block, start, stop, Geometry(7, 7))
    multiple = CUTS_AT[method](r)
    can_be_cut = start % multiple == 0 and (stop % multiple == 0 or stop == 7)
    assert (part_of_block is not None) == can_be_cut
    if part_of_block is None:
        return
    whole = method_of(method).delta_weight(layout, block, weight)
    part = method_of(method).delta_weight(layout, part_of_block, weight[start:stop])
    torch.testing.assert_close(part, whole[start:stop], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", ["bat r=2", "bat r=4"])
def test_a_method_has_the_product_that_is_asked_for_or_none(name, has_bias, with_base):
    case = case_of("out in", name)
    x = torch.randn(1, 7, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64) if has_bias else None
    found = method_of(case.method).product(x, case.weight, bias, case.block, 0.5, with_base)
    if found is None:
        return
    expected = x @ (with_base * case.weight + 0.5 * case.expected).mT
    if has_bias:
        expected = expected + bias
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "layout", "block", "weight"),
    [
        ("bone", Layout("out in *kernel"), (6, 2, 5), (6, 7, 3)),
        ("bone", Layout("expert out in"), (2, 2, 6), (3, 6, 7)),
        ("bone", Layout("out in"), (2, 2, 6), (6, 7)),
        ("bone", Layout("out in"), (2, 5), (6, 7)),
        ("bat", Layout("out in *kernel"), (4, 3, 2, 2), (6, 7, 3)),
        ("bat", Layout("expert out in"), (2, 3, 2, 2), (3, 6, 7)),
        ("bat", Layout("out in"), (2, 2, 2), (6, 7)),
        ("lora", Layout("out in"), (2, 12), (6, 7)),
        ("lora", Layout("out in *kernel"), (2, 3, 13), (6, 7, 3)),
    ],
)
def test_a_block_of_another_weight_is_refused(method, layout, block, weight):
    with pytest.raises(ArgumentError, match=r"block .*shape"):
        method_of(method).delta_weight(layout, torch.zeros(block), torch.zeros(weight))


META = torch.device("meta")

ON_META = {
    "bone": lambda block: method_of("bone").delta_weight(
        MATRIX, block, torch.empty(6, 7, device=META)
    ),
    "factors": lambda block: torch.cat(
        [
            factor.flatten()
            for factor in method_of("bone").lora_factors(MATRIX, block, Geometry(7, 6))
        ]
    ),
    "bat": lambda block: method_of("bat").delta_weight(
        MATRIX, block.view(3, 2, 2), torch.empty(6, 7, device=META)
    ),
    "convolution": lambda block: method_of("bone").delta_weight(
        Layout("out in *kernel"), block.view(6, 2, 1), torch.empty(6, 7, 1, device=META)
    ),
    "embedding": lambda block: method_of("bone").delta_weight(
        Layout("index out", padding_idx=3), block, torch.empty(7, 6, device=META)
    ),
    "rows": lambda block: method_of("bone").delta_weight(
        MATRIX, block, torch.empty(9, 7, device=META), output_ranges=((1, 4), (5, 8))
    ),
    "weighted_sum": lambda block: functional.weighted_sum([(block, 0.5)]),
    "product of rows": lambda block: functional.adapted_linear(
        torch.empty(3, 7, device=META), torch.empty(9, 7, device=META), None,
        [functional.Update(method_of("bat"), block.view(3, 2, 2), 0.5, 0.5, ((1, 7),))],
    ),
    "widened": lambda block: method_of("bone").wider_block(
        MATRIX, block, Geometry(7, 6), 2, 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_META)
def test_what_is_made_of_a_block_is_on_its_device(name):
    assert ON_META[name](torch.empty(2, 6, device=META)).is_meta


# --- a name that the table does not have ---------------------------------------------------------


ASKED: dict[str, Callable[[str], object]] = {
    "method_of": method_of,
    "AdapterConfig": lambda name: disha.config.AdapterConfig(r=2, target=None, method=name),
    "inject_adapters": lambda name: disha.inject_adapters(nn.Linear(8, 4), "", 2, method=name),
    "plan_adapters": lambda name: disha.plan_adapters(nn.Linear(8, 4), "", 2, method=name),
}


@pytest.mark.parametrize("function", ASKED)
def test_an_unknown_method_is_refused_by_the_same_error_everywhere(function):
    with pytest.raises(ArgumentError) as caught:
        ASKED[function]("loha")
    assert str(caught.value) == f"unknown method 'loha'; allowed are {functional.method_names()}"


def test_a_method_that_is_no_text_is_refused():
    says = rf"unknown method \['bone'\]; allowed are {functional.method_names()}"
    with pytest.raises(DishaError, match=says):
        method_of(["bone"])


# --- a method that nobody has told the library of ------------------------------------------------


class Gained(Method):
    """Bone with a trained magnitude: dW[o, i] = D[i mod r, o] (1 + D[r, o]). Not linear in D."""

    name = "gained"

    def shape(self, geometry, r, r_out):
        return (*geometry.stack, r + 1, geometry.out_features)

    def delta(self, block, geometry, matrices):
        assert matrices is None
        shards, gains = block[..., :-1, :], 1 + block[..., -1:, :]
        places = torch.arange(geometry.in_features) % shards.shape[-2]
        return (shards * gains)[..., places, :].mT


class Sloped(Method):
    """dW[o, i] = D[i mod r, o] (i mod r + 1): its factor is no block that can be cut."""

    name = "sloped"
    low_rank = True
    additive = True

    def shape(self, geometry, r, r_out):
        return (*geometry.stack, r, geometry.out_features)

    def factors(self, block, geometry):
        # It gets the geometry of this block.
        assert block.shape == (*geometry.stack, *block.shape[-2:-1], geometry.out_features)
        slope = torch.arange(1.0, block.shape[-2] + 1, dtype=block.dtype)
        return block.shape[-2], slope.unsqueeze(1) * block


class Halves(Method):
    """dW = R^T A, where A has the first half of the rows of D, and R the other half."""

    name = "halves"
    low_rank = True
    additive = False

    def shape(self, geometry, r, r_out):
        return (*geometry.stack, 2 * r, max(geometry[:2]))

    def factors(self, block, geometry):
        a, b = block.chunk(2, -2)
        return a[..., : geometry.in_features], b[..., : geometry.out_features]


@pytest.mark.parametrize("method", [Sloped(), Halves()], ids=lambda method: method.name)
def test_a_method_of_low_rank_has_everything_by_its_factors(method):
    disha.register_method(method)
    options = {"method": method.name, "init": "kaiming", "scale": 0.1}
    for model, *shapes in [
        (nn.Sequential(nn.Linear(7, 6)), (3, 7)),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), (3, 2, 6)),
        (nn.Bilinear(7, 6, 5), (3, 7), (3, 6)),
        (nn.Sequential(nn.Conv2d(4, 6, 3)), (2, 4, 5, 5)),
    ]:
        disha.inject_adapters(model, "", 3, **options)
        assert disha.check_adapters(model, *map(torch.randn, shapes)).ok
    weight = torch.randn(3, 6, 7)
    update = Update(method, torch.randn(method.block_shape(STACK, weight.shape, 3)))
    matrices, x = [update.select_matrices(0)] * 2, torch.randn(2, 1, 7)
    found = functional.adapted_linear(x, weight[0], None, matrices)
    close(found, x @ functional.computed_weight(weight[0], MATRIX, matrices).mT, 1e-5)
    chosen = torch.tensor([2, 0])
    found = functional.adapted_stack(x, weight[chosen], [update.select_matrices(chosen)])
    close(found, x @ functional.computed_weight(weight, STACK, [update])[chosen].mT, 1e-5)
    a, b = method.lora_factors(STACK, update.block, STACK.geometry(weight.shape))
    close(b @ a, update.delta_weight(STACK, weight), 1e-5)
    for cut_at in (((1, 3), (2, 6), (3, 7)), ((1, 3), (0, 6), (2, 7))):
        (cut,) = update_of_part(update, STACK, weight.shape, cut_at)
        place = tuple(slice(*ends) for ends in cut_at)
        whole = functional.computed_weight(weight, STACK, [update])[place]
        close(functional.computed_weight(weight[place], STACK, [cut]), whole, 1e-6)


class Shift(Method):
    """dW[o, i] = D[o] + offset: its name tells its setting."""

    block_axes = 1

    def __init__(self, offset):
        self.offset = offset
        self.name = f"shift{offset}"

    def shape(self, geometry, r, r_out):
        return (*geometry.stack, geometry.out_features)

    def delta(self, block, geometry, matrices):
        return (block.unsqueeze(-1) + self.offset).expand(*block.shape, geometry.in_features)


class TestRegisterMethod:
    def test_each_setting_of_a_method_has_a_name_that_files_and_copies_keep(self, tmp_path):
        for offset in (2, 5):
            disha.register_method(Shift(offset))
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).double()
        fresh = copy.deepcopy(model)
        disha.inject_adapters(model, "0", 1, method="shift2", init="kaiming")
        disha.inject_adapters(model, "1", 1, method="shift5", init="kaiming", adapter="five")
        disha.set_active_adapters(model, ["default", "five"])
        for adapter in ("default", "five"):
            disha.save_adapter(model, tmp_path / adapter, adapter=adapter)
            disha.load_adapter(fresh, tmp_path / adapter, adapter=adapter)
        disha.set_active_adapters(fresh, ["default", "five"])
        x = torch.randn(5, 3, dtype=torch.float64)
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(pickled(model)(x), model(x))
        assert pickled(model)[1].disha["five"].method is method_of("shift5")

    def test_the_same_class_replaces_a_method_and_another_may_not(self):
        disha.register_method(Shift(2))
        again = Shift(2)
        disha.register_method(again)
        assert method_of("shift2") is again

        class Other(Shift):
            pass

        with pytest.raises(ArgumentError, match="a method 'shift2' already, of the class Shift"):
            disha.register_method(Other(2))

    def test_two_settings_may_not_have_one_name(self):
        disha.register_method(Shift(2))
        known = method_of("shift2")
        other = Shift(3)
        other.name = "shift2"
        with pytest.raises(ArgumentError, match="'shift2' already, with other settings"):
            disha.register_method(other)
        assert method_of("shift2") is known

    def test_a_class_that_was_defined_again_may_have_other_settings(self):
        disha.register_method(Shift(2))
        again = type("Shift", (Shift,), {"__module__": Shift.__module__})(3)
        again.name = "shift2"
        disha.register_method(again)
        assert method_of("shift2") is again

    @pytest.mark.parametrize("name", ["bone", "miss"])
    def test_names_and_aliases_of_the_library_are_taken(self, name):
        method = Shift(2)
        method.name = name
        with pytest.raises(ArgumentError, match=f"a method '{name}' already, of the class _Bone"):
            disha.register_method(method)
        assert type(method_of(name)).__name__ == "_Bone"

    @pytest.mark.parametrize(
        ("method", "says"),
        [
            (Shift, "needs an instance of a subclass of Method"),
            (Method(), r"must define name \(a str\), shape, delta, or low_rank"),
            (Shift("-.5"), "'shift-.5' can't name a method: use letters, digits"),
        ],
    )
    def test_what_is_no_method_is_refused(self, method, says):
        before = dict(METHODS)
        with pytest.raises(DishaError, match=says):
            disha.register_method(method)
        assert before == METHODS


class Shifted(Method):
    """W scaled per output: dW[o, i] = D[o] W[o, i]. It reads W, and its block has one axis."""

    name = "shifted"
    block_axes = 1
    reads_weight = True
    additive = True

    def shape(self, geometry, r, r_out):
        return (*geometry.stack, geometry.out_features)

    def delta(self, block, geometry, matrices):
        return block.unsqueeze(-1) * matrices


def gained_loop(weight, block):
    delta = torch.zeros_like(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            delta[o, i] = block[i % (len(block) - 1), o] * (1 + block[-1, o])
    return delta


def shifted_loop(weight, block):
    return torch.stack([block[o] * weight[o] for o in range(len(weight))])


LOOPS = {"gained": (gained_loop, 2), "shifted": (shifted_loop, 1)}


def dense_delta(method, layout, block, weight):
    """The update of one of these methods by loops."""
    return reference.layout_delta_weight(
        method, layout.pattern, block, weight, (), layout.groups, layout.padding_idx
    )


@pytest.fixture(params=[Gained, Shifted])
def third(request, monkeypatch):
    """The name of a third method in the table."""
    name = request.param.name
    disha.register_method(request.param())
    monkeypatch.setitem(reference.LOOPS, name, LOOPS[name])
    return name


class TestAThirdMethod:
    """`shape` and `delta` are enough: everything else has a default."""

    def block(self, method, layout, weight, rows=()):
        shape = method_of(method).block_shape(layout, weight.shape, 2, output_ranges=rows)
        return torch.randn(shape, dtype=weight.dtype)

    @on_every_layout
    def test_the_functions_of_the_table(self, third, kind):
        layout, shape = LAYOUTS[kind]
        weight = torch.randn(shape, dtype=torch.float64)
        block = self.block(third, layout, weight)
        geometry = layout.geometry(shape)
        assert method_of(third).stack_of(layout, block.shape) == geometry.stack
        own = method_of(third).matrix_block(layout, block)
        assert tuple(own.shape) == METHODS[third].shape(geometry, 2, None)
        assert torch.equal(method_of(third).kept_block(layout, own), block)
        assert method_of(third).wider_block(layout, block, geometry, 2, 2) is block
        assert method_of(third).wider_block(layout, block, geometry, 2, 4) is None
        assert method_of(third).lora_factors(layout, block, geometry) is None
        found = method_of(third).delta_weight(layout, block, weight)
        close(found, dense_delta(third, layout, block, weight))

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("rows", [(), ((1, 3),), ((0, 2), (3, 5))], ids=str)
    def test_linear_products(self, third, rows, dropout):
        x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 7), (6, 7), (6,)))
        block = self.block(third, MATRIX, weight, rows)
        bone = Update(method_of("bone"), torch.randn(3, 6, dtype=torch.float64), -1.0)
        update = Update(method_of(third), block, 0.5, dropout, rows)
        part = MATRIX.part(weight, rows)
        delta = torch.zeros(6, 7, dtype=torch.float64)
        chosen = [o for first, stop in rows or ((0, 6),) for o in range(first, stop)]
        delta[chosen] = 0.5 * dense_delta(third, MATRIX, block, part)
        for others in ([], [bone]):
            seed_torch(1)
            found = functional.adapted_linear(x, weight, bias, [*others, update])
            seed_torch(1)
            dropped = nn.functional.dropout(x, dropout)
            expected = x @ weight.T + bias + dropped @ delta.T
            for one in others:
                expected = expected - x @ reference.bone_delta_weight(one.block, 7, 6).T
            close(found, expected)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_stacks(self, third, dropout):
        x, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, 4, 8), (3, 6, 8)))
        block = self.block(third, STACK, weight)
        delta = 0.5 * dense_delta(third, STACK, block, weight)
        seed_torch(1)
        found = functional.adapted_stack(x, weight, [Update(method_of(third), block, 0.5, dropout)])
        seed_torch(1)
        close(found, x @ weight.mT + nn.functional.dropout(x, dropout) @ delta.mT)

    def test_grouped_products(self, third):
        x, weight = torch.randn(5, 8), torch.randn(3, 12, 8)
        block, ends = self.block(third, STACK, weight), torch.tensor([2, 2, 5], dtype=torch.int32)
        dense = weight + 0.5 * dense_delta(third, STACK, block, weight)
        expected = torch.cat([x[:2] @ dense[0].T, x[2:] @ dense[2].T])
        update = Update(method_of(third), block, 0.5)
        found = functional.adapted_grouped(torch._grouped_mm, x, weight, ends, [update])
        close(found, expected, 1e-5)

    def test_modules_through_their_whole_life(self, third, tmp_path):
        def model():
            seed_torch(3)
            return nn.ModuleDict({
                "linear": nn.Linear(7, 6),
                "embedding": nn.Embedding(7, 6, padding_idx=2),
                "conv": nn.Conv2d(4, 6, 2, groups=2, padding=1, padding_mode="circular"),
                "transposed": nn.ConvTranspose1d(4, 6, 2, groups=2),
            }).double()  # fmt: skip

        inputs = {
            "linear": torch.randn(2, 3, 7, dtype=torch.float64),
            "embedding": torch.tensor([[0, 2], [6, 3]]),
            "conv": torch.randn(2, 4, 5, 5, dtype=torch.float64),
            "transposed": torch.randn(2, 4, 5, dtype=torch.float64),
        }

        def outputs(modules):
            return [modules[name](x) for name, x in inputs.items()]

        plain = model()
        adapted = disha.inject_adapters(model(), "", 2, method=third)
        assert all(map(torch.equal, outputs(adapted), outputs(plain)))
        with torch.no_grad():
            for block in disha.adapter_parameters(adapted):
                block.normal_()
            for name, module in plain.items():
                block = adapted[name].disha["default"]
                layout = block.spec.layout
                module.weight += dense_delta(third, layout, block.block, module.weight)
        acting = outputs(adapted)
        close(acting, outputs(plain))

        sum(output.square().sum() for output in acting).backward()
        assert all(block.grad.any() for block in disha.adapter_parameters(adapted))

        path = tmp_path / "third.safetensors"
        disha.save_adapter(adapted, path)
        loaded = model()
        assert disha.load_adapter(loaded, path).complete
        assert_same(outputs(loaded), acting)

        disha.merge_adapters(adapted, "default")
        close(outputs(adapted), acting)
        for name, module in adapted.items():
            close(module._parameters["weight"], plain[name].weight)
        disha.unmerge_adapters(adapted)
        assert all(map(torch.equal, outputs(adapted), acting))
        with disha.adapters_disabled(adapted):
            assert all(map(torch.equal, outputs(adapted), outputs(model())))
