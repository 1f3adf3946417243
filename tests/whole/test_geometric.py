"""Graph networks of PyTorch Geometric, whose layers have a linear layer of their own kind."""

import copy
import itertools

import pytest
import torch
from torch import nn

import disha
from disha import TargetError
from disha.effective.weight import EffectiveWeight
from tests.conftest import perturb, seed_torch
from tests.every_pair import Case, DtypeTests, PairTests, numbers
from tests.reference import METHODS

geometric = pytest.importorskip("torch_geometric.nn", reason="PyTorch Geometric is not installed")

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])


class Network(nn.Module):
    """Two convolutions with an activation between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x):
        return self.second(torch.tanh(self.first(x, EDGES)), EDGES)


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(geometric.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs))


NETWORKS = {
    "GCN": (
        lambda: Network(geometric.GCNConv(8, 6), geometric.GCNConv(6, 4)),
        ["first.lin", "second.lin"],
    ),
    "GAT": (
        lambda: Network(geometric.GATConv(8, 3, heads=2), geometric.GATConv(6, 4)),
        ["first.lin", "second.lin"],
    ),
    "GATv2": (
        lambda: Network(geometric.GATv2Conv(8, 3, heads=2), geometric.GATv2Conv(6, 4)),
        ["first.lin_l", "first.lin_r", "second.lin_l", "second.lin_r"],
    ),
    "SAGE": (
        lambda: Network(geometric.SAGEConv(8, 6), geometric.SAGEConv(6, 4)),
        ["first.lin_l", "first.lin_r", "second.lin_l", "second.lin_r"],
    ),
    "GIN": (
        lambda: Network(
            geometric.GINConv(mlp(8, 6), train_eps=True),
            geometric.GINConv(geometric.MLP([6, 7, 4])),
        ),
        ["first.nn.0", "first.nn.2", "second.nn.lins.0", "second.nn.lins.1"],
    ),
    "transformer": (
        lambda: Network(geometric.TransformerConv(8, 3, heads=2), geometric.GCNConv(6, 4)),
        ["first.lin_key", "first.lin_query", "first.lin_value", "first.lin_skip", "second.lin"],
    ),
}
FIRST, *OTHERS = NETWORKS
CASES = [
    *((FIRST, method) for method in METHODS),
    *zip(OTHERS, itertools.cycle(METHODS), strict=False),
]
"""Every method in the first network; in the others, which have the same layers, they take turns."""

TABLE = {
    name: Case(
        lambda make=make: make().eval(),
        numbers(6, 8),
        settings={"target_regex": "all-linear"},
    )
    for name, (make, _) in NETWORKS.items()
}


def fresh(name: str) -> nn.Module:
    seed_torch(0)
    return NETWORKS[name][0]().double().eval()


def adapted(name: str, method: str) -> nn.Module:
    return perturb(disha.inject_adapters(fresh(name), "all-linear", 3, method=method))


def nodes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_linear_reaches_every_linear_layer(name):
    plan = disha.plan_adapters(fresh(name), "all-linear", 3)
    assert [layer.name for layer in plan.layers] == NETWORKS[name][1]
    assert not plan.skipped


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize(("name", "kind"), CASES)
class TestDtypes(DtypeTests):
    table = TABLE


@pytest.mark.parametrize(("name", "kind"), CASES)
class TestNetworks:
    table = TABLE
    test_several_adapters = PairTests.test_several_adapters_add_up_and_switch_off

    def test_every_block_trains(self, name, kind):
        model = disha.inject_adapters(fresh(name), "all-linear", 3, method=kind).train()
        target = torch.randn(6, 4, dtype=torch.float64)
        optimizer = torch.optim.Adam(disha.adapter_parameters(model), lr=0.02)
        losses = []
        for _ in range(20):
            loss = (model(nodes()) - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        assert all(block.abs().sum() > 0 for block in disha.adapter_parameters(model))
        own = dict(model.named_parameters())
        assert all(torch.equal(own[key], value) for key, value in fresh(name).named_parameters())

    def test_its_state_dict_has_the_plain_weights(self, name, kind, tmp_path):
        """The linear layer saves by itself, and reads its weight to do so."""
        model, plain = adapted(name, kind), fresh(name).state_dict()
        for keep in (False, True):
            state = model.state_dict(keep_vars=keep)
            assert not any(isinstance(value, EffectiveWeight) for value in state.values())
            assert all(torch.equal(state[key], value) for key, value in plain.items())
            for key, parameter in model.named_parameters():
                assert state[key].data_ptr() == parameter.data_ptr()
        torch.save(model.state_dict(), tmp_path / "model.pt")
        other = disha.inject_adapters(fresh(name), "all-linear", 3, method=kind)
        other.load_state_dict(torch.load(tmp_path / "model.pt"))
        assert torch.equal(other(nodes()), model(nodes()))
        assert torch.equal(copy.deepcopy(model)(nodes()), model(nodes()))

    def test_check_adapters_finds_all_of_them_acting(self, name, kind):
        report = disha.check_adapters(adapted(name, kind), nodes())
        assert report.ok, str(report)


def test_a_lazy_layer_is_adapted_once_it_has_its_size():
    model = Network(geometric.GCNConv(-1, 6), geometric.GCNConv(6, 4)).eval()
    with pytest.raises(TargetError, match="run the model once before injecting"):
        disha.inject_adapters(model, "first", 3)
    x = nodes().float()
    before = model(x)
    disha.inject_adapters(model, "first", 3)
    assert torch.equal(model(x), before)
    perturb(model)
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_weights_of_relations_need_a_layout():
    """RGCN keeps one matrix per relation in a parameter of its own, and uses it as x @ W."""
    model = nn.ModuleDict({"conv": geometric.RGCNConv(8, 4, 2)}).double().eval()
    kinds = torch.tensor([0, 1, 0, 1, 0, 1, 0])

    def output() -> torch.Tensor:
        return model["conv"](nodes(), EDGES, kinds)

    before = output()
    (weight, _root) = disha.plan_adapters(
        nn.Sequential(model["conv"], nn.Linear(4, 4)), "all-linear", 3
    ).unknown
    assert weight.remedy == r"layouts={'^0\\.weight$': 'expert out in'}"
    layouts = {r"conv\.weight$": "expert in out"}
    with pytest.warns(UserWarning, match=r"can't be adapted: conv\.root: the layout"):
        disha.inject_adapters(model, "conv$", 3, layouts=layouts)
    assert torch.equal(output(), before)
    perturb(model)
    adapted = output()
    assert not torch.allclose(adapted, before, atol=1e-3)
    disha.merge_adapters(model)
    torch.testing.assert_close(output(), adapted, rtol=0, atol=1e-10)
