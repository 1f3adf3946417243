"""Exported programs, ONNX files and compiled packages compute what the adapted model computes."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.export import Dim, export

import disha
from disha import functional
from tests.conftest import Made, seed_torch
from tests.reference import GROUPS, METHODS

BATCH = {0: Dim("batch", max=64)}


def experts():
    """A stack of matrices, one product for each."""

    def run(self, x):
        return torch.bmm(x.expand(3, *x.shape), self.experts.transpose(1, 2)).sum(0)

    return Made(run, experts=nn.Parameter(torch.randn(3, 6, 8)))


def linear():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def conv():
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2))


def embedding():
    return nn.Sequential(nn.Embedding(10, 8, padding_idx=1), nn.Linear(8, 4))


INPUTS = {
    linear: lambda size: torch.randn(size, 8),
    conv: lambda size: torch.randn(size, 4, 5, 5),
    embedding: lambda size: torch.randint(10, (size, 5)),
    experts: lambda size: torch.randn(size, 8),
}


def adapted(make, method="bone", **options):
    seed_torch(0)
    model = make()
    r = 3 if method == "bone" else 2
    options = {"method": method, "init": "kaiming", **options}
    return disha.inject_adapters(model, ".", r, **options).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def as_onnx(program, path):
    """Convert a program to ONNX, and return what runs it in onnxruntime."""
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_inputs()]

    def run(*inputs):
        values = [one.detach().numpy() for one in inputs]
        found = session.run(None, dict(zip(names, values, strict=True)))
        return [torch.from_numpy(one) for one in found]

    return run


def test_a_script_says_what_to_do():
    with pytest.raises(disha.ModeError, match=r"torch\.jit\.trace or torch\.export, or merge"):
        torch.jit.script(adapted(linear))


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_is_the_same_where_gradients_are_off(method):
    model, x = adapted(linear, method), torch.randn(4, 8)
    traced = torch.jit.trace(model, x)  # torch traces again without gradients, and compares
    close(traced(x), model(x))


class Several(nn.Module):
    """Models beside each other, each with an input: torch exports them faster than one by one."""

    def __init__(self, makes):
        super().__init__()
        self.models = nn.ModuleList(make() for make in makes)

    def forward(self, *inputs):
        return [model(x) for model, x in zip(self.models, inputs, strict=True)]


EVERYTHING = (linear, conv, embedding, experts)
EXPORTED = [
    *((EVERYTHING, method) for method in functional.METHODS),
    *(((linear,), method) for method in GROUPS),
]
"""Groups of shards are exported in one kind of product."""


@pytest.mark.parametrize(("makes", "method"), EXPORTED)
def test_an_unmerged_model_is_exported(makes, method, tmp_path):
    layouts = {"experts": "expert out in"} if experts in makes else None
    model = adapted(lambda: Several(makes), method, layouts=layouts)
    example, other = (tuple(INPUTS[make](size) for make in makes) for size in (4, 7))
    expected = [output.detach() for output in model(*other)]
    for output, plain in zip(expected, undone(model)(*other), strict=True):
        assert not torch.allclose(output, plain, atol=1e-3)
    shapes = ((BATCH,) * len(makes),)
    for strict in (False, True):
        program = export(model, example, dynamic_shapes=shapes, strict=strict)
        close(program.module()(*other), expected)
    close(as_onnx(program, tmp_path / "model.onnx")(*other), expected)


def undone(model):
    return disha.remove_adapters(copy.deepcopy(model))


@pytest.mark.parametrize("strict", [False, True])
def test_a_merged_model_is_exported_as_a_plain_one(strict, tmp_path):
    model = adapted(linear)
    example, other = INPUTS[linear](4), INPUTS[linear](7)
    expected = model(other).detach()
    disha.merge_adapters(model)
    program = export(model, (example,), dynamic_shapes=(BATCH,), strict=strict)
    plain = export(undone(adapted(linear)), (example,), dynamic_shapes=(BATCH,), strict=strict)
    assert operations(program) == operations(plain)
    close(program.module()(other), expected)
    close(as_onnx(program, tmp_path / "model.onnx")(other), [expected])


def operations(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_export_computes_no_dense_weight():
    model = adapted(linear)
    sizes = {tuple(one.shape) for one in model.state_dict().values() if one.dim() == 2}
    weights = {tuple(model[0].weight.shape), tuple(model[2].weight.shape)}
    assert weights < sizes
    for strict in (True, False):
        program = export(model, (INPUTS[linear](5),), strict=strict)
        made = {
            tuple(node.meta["val"].shape)
            for node in program.graph.nodes
            if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        }
        assert not weights & made


def test_stages_of_a_pipeline_hold_their_weights():
    model, x = adapted(linear), torch.randn(4, 8)
    whole = pipeline(model, (x,), split_spec={"2": SplitPoint.BEGINNING})
    close(whole(x)[0], model(x))
    held = {name for stage in whole.split_gm.children() for name, _ in stage.named_parameters()}
    assert held == {name for name, _ in model.named_parameters()}


class WithAdapter(nn.Module):
    """A model whose blocks are inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.names = list(disha.adapter_state_dict(model))

    def forward(self, x, *blocks):
        return torch.func.functional_call(self.model, dict(zip(self.names, blocks, strict=True)), x)


class TestBlocksAsInputs:
    MODEL = staticmethod(lambda method: adapted(linear, method))

    def program(self, method, strict=True):
        model = self.MODEL(method)
        blocks = tuple(disha.adapter_state_dict(model).values())
        shapes = (BATCH, (None,) * len(blocks))
        example = (INPUTS[linear](4), *blocks)
        return export(WithAdapter(model), example, dynamic_shapes=shapes, strict=strict)

    def cases(self, method):
        """Return pairs of the inputs and the output, for three adapters and one batch."""
        model, x = self.MODEL(method), INPUTS[linear](7)
        state = disha.adapter_state_dict(model)
        found = []
        for values in (torch.clone, torch.randn_like, torch.zeros_like):
            own = {name: values(block) for name, block in state.items()}
            other = copy.deepcopy(model)
            disha.load_adapter_state_dict(other, own)
            found.append(((x, *own.values()), other(x).detach()))
        return found

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("strict", [False, True])
    def test_one_program_serves_any_adapter(self, method, strict):
        run = self.program(method, strict).module()
        for inputs, expected in self.cases(method):
            close(run(*inputs), expected)

    def test_one_onnx_file_serves_any_adapter(self, tmp_path):
        run = as_onnx(self.program("bone"), tmp_path / "model.onnx")
        for inputs, expected in self.cases("bone"):
            close(run(*inputs), [expected])

    def test_one_compiled_package_serves_any_adapter(self, tmp_path):
        """AOTInductor, with settings that compile fast."""
        fast = {
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,  # which pays for more than one package
            "cpp.simdlen": 0,
        }
        path = torch._inductor.aoti_compile_and_package(
            self.program("bone"), package_path=str(tmp_path / "model.pt2"), inductor_configs=fast
        )
        run = torch._inductor.aoti_load_package(path)
        for inputs, expected in self.cases("bone"):
            close(run(*inputs), expected)


class TestInsideContexts:
    def model(self):
        return disha.inject_adapters(
            adapted(linear), "all-linear", 3, adapter="second", init="kaiming"
        )

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_program_keeps_what_acted(self, strict):
        model, x = self.model(), INPUTS[linear](4)
        contexts = (
            lambda: disha.adapters_disabled(model),
            lambda: disha.adapters_active(model, ["default", "second"]),
        )
        for context in contexts:
            with context():
                program, expected = export(model, (x,), strict=strict), model(x)
            close(program.module()(x), expected)
            assert not torch.allclose(model(x), expected, atol=1e-3)

    @pytest.mark.parametrize("strict", [False, True])
    def test_routed_samples_are_kept(self, strict, tmp_path):
        model, x = self.model(), INPUTS[linear](4)
        with disha.route_adapters(model, ["default", "second", None, "second"]):
            program, expected = export(model, (x,), strict=strict), model(x)
        close(program.module()(x), expected)
        close(as_onnx(program, tmp_path / "model.onnx")(x), [expected])
