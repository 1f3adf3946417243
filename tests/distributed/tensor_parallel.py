"""Tensor parallelism on two ranks: it equals one process, or it raises."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint

import disha
from disha import AdaptedLayer, ArgumentError, MergeError, ModeError, TargetError
from tests.conftest import perturb
from tests.distributed.harness import (
    assert_same,
    assert_same_on_all_ranks,
    blocks,
    close,
    gradients_of,
    rank,
    saved,
    whole,
)
from tests.reference import METHODS

NO_PLAN = "parameter name can.*t contain|no attribute 'weight'"
"""What torch says of a plan for an adapted weight: the style by columns, and that by rows."""
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


class Feedforward(nn.Module):
    """What tensor parallelism is for: one product cut by columns, the next by rows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def fresh() -> Feedforward:
    torch.manual_seed(0)
    return Feedforward().double()


def adapted(target: str, method: str = "bone") -> Feedforward:
    return perturb(disha.inject_adapters(fresh(), target, 2, method=method))


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh(), {name: style() for name, style in PLAN.items()})


def inputs() -> torch.Tensor:
    return torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pair(
    r: int, *, target: str = "all-linear", plan=PLAN, make=fresh, **options
) -> tuple[nn.Module, nn.Module]:
    """Return a plain and a tensor-parallel model with the same adapter; no block is zero."""
    models = make(), parallelize_module(make(), mesh(), {name: own() for name, own in plan.items()})
    for model in models:
        perturb(disha.inject_adapters(model, target, r, **options))
    return models


TRAINED = {
    "bone": {"r": 2},
    "of parts that r does not divide": {"r": 5},
    "tile": {"r": 3, "r_out": 2},
    "groups": {"r": 1, "groups": 2},
    "groups that no rank's part keeps": {"r": 2, "groups": "all"},
    "bat": {"r": 3, "method": "bat"},
    "lora": {"r": 3, "method": "lora"},
}
"""Of `up`, each rank has some of 12 outputs; of `down`, some of 12 inputs; `head` is not cut."""


def check_training_equals_one_process(folder):
    """For 20 steps, with the norm of all gradients, which clips them; and so does the file."""
    for case, options in TRAINED.items():
        models = pair(**options)
        trained = [disha.adapter_parameters(model) for model in models]
        optimizers = [torch.optim.AdamW(parameters, lr=0.05) for parameters in trained]
        for _ in range(20):
            losses, gradients, norms = [], [], []
            for model, parameters, optimizer in zip(models, trained, optimizers, strict=True):
                x = inputs().requires_grad_()
                optimizer.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                found = [gradient.clone() for gradient in gradients_of(model)]
                gradients.append([x.grad, *found])
                norms.append(whole(nn.utils.clip_grad_norm_(parameters, 1.0)))
                optimizer.step()
                losses.append(loss.detach())
            close(losses[1], losses[0])
            close(gradients[1], gradients[0])
            close(norms[1], norms[0])
        close(blocks(models[1]), blocks(models[0]))
        for index, model in enumerate(models):
            disha.save_adapter(model, folder / f"{case}{index}")
        files = [disha.inspect_adapter(folder / f"{case}{index}") for index in (0, 1)]
        assert files[0].layers == files[1].layers
        assert files[0].config == files[1].config


def check_each_rank_holds_its_part_of_a_block(folder):
    """Of cut outputs: columns of D, or slabs of BAT. A LoRA is one tensor, which is not cut."""
    for method, held in (("bone", 1), ("bat", 1), ("lora", dist.get_world_size())):
        model = pair(1, method=method)[1]
        up, down = (layer.disha["default"].block for layer in (model.up, model.down))
        assert up.to_local().numel() * dist.get_world_size() == up.numel() * held
        assert down.to_local().numel() == down.numel()


def check_merging(folder):
    """Each rank merges its part; un-merging restores every bit, or says that W has changed."""
    for options in TRAINED.values():
        plain, model = pair(**options)
        expected = plain(inputs())
        original = model.up.base_weight.full_tensor().clone()
        close(disha.merge_adapters(model)(inputs()), expected)
        disha.merge_adapters(plain)
        for name in ("up", "down", "head"):
            merged = getattr(model, name).weight
            close(whole(merged), getattr(plain, name).weight)
        disha.unmerge_adapters(model)
        assert torch.equal(model.up.base_weight.full_tensor(), original)
        close(model(inputs()), expected)
        assert disha.check_adapters(model, inputs()).ok
    disha.merge_adapters(model)
    with torch.no_grad():
        model.up.weight.to_local().add_(dist.get_rank())  # on some ranks only
    with pytest.raises(MergeError, match="changed after adapters were merged"):
        disha.unmerge_adapters(model)
    plain, model = pair(2)
    close(disha.merge_adapters(model, unload=True)(inputs()), plain(inputs()))
    assert type(model.up) is nn.Linear


def check_dropout(folder):
    """Ranks with the same inputs drop the same ones; in backward, checkpointing drops them again.

    With r = 1, D = 1 and W = 0, an output is the sum of the inputs that are kept, times two.
    """
    styles = {
        "columns": ColwiseParallel(output_layouts=Replicate()),
        "rows": RowwiseParallel(input_layouts=Replicate()),
    }
    for name, style in styles.items():
        layer = nn.Linear(12, 12, bias=False).double()
        nn.init.zeros_(layer.weight)
        model = parallelize_module(nn.Sequential(layer), mesh(), {"0": style})
        disha.inject_adapters(model, "0", 1, dropout=0.5)
        with torch.no_grad():
            disha.adapter_parameters(model)[0].fill_(1.0)
        torch.manual_seed(dist.get_rank() if name == "columns" else 0)
        x = torch.linspace(1, 2, 30 * 12, dtype=torch.float64).view(30, 12).requires_grad_()
        output = checkpoint(model, x, use_reentrant=False)
        output.sum().backward()
        is_kept = x.grad != 0
        assert 0 < is_kept.sum() < is_kept.numel()
        close(output, (x * is_kept * 2).sum(-1, keepdim=True).expand(-1, 12))
        first, *others = is_kept.chunk(dist.get_world_size(), -1)
        assert not any(torch.equal(first, other) for other in others)
        model.eval()
        close(model(x), x.sum(-1, keepdim=True).expand(-1, 12))


def check_files_are_those_of_one_process(folder):
    """One goes into a plain model and back; an adapter drawn at random is the same on all ranks."""
    for method in METHODS:
        plain, model = pair(3, method=method)
        together, alone = folder / f"{method}-parallel", folder / f"{method}-{rank()}"
        assert saved(model, together) == saved(plain, alone)
        loaded = parallel(fresh())
        disha.load_adapter(loaded, together)
        close(loaded(inputs()), plain(inputs()))
        with torch.no_grad():
            disha.adapter_parameters(loaded)[0].zero_()
        disha.load_adapter(loaded, alone, replace=True)
        close(loaded(inputs()), plain(inputs()))


def check_random_numbers_are_those_of_all_ranks(folder):
    """Of cut weights, of others, and of the rows that make a LoRA wider; all seeds differ."""
    disha.save_adapter(adapted("all-linear", "lora"), folder / f"{rank()}")
    for options in ({"init": "kaiming"}, {"method": "lora"}):
        model = parallel(fresh())
        torch.manual_seed(rank())
        disha.inject_adapters(model, "all-linear", 3, **options)
        assert_same_on_all_ranks(model)
    disha.load_adapter(model, folder / f"{rank()}", replace=True)
    assert_same_on_all_ranks(model)


def check_checkpoints_of_torch(folder):
    """Every rank has all of a block, so the checkpoint is that of a plain model."""
    plain, model = pair(2)
    dcp.save(disha.adapter_state_dict(model), checkpoint_id=folder / "checkpoint")
    for other in (adapted("all-linear"), disha.inject_adapters(parallel(fresh()), "all-linear", 2)):
        with torch.no_grad():
            for block in disha.adapter_parameters(other):
                block.zero_()
        dcp.load(disha.adapter_state_dict(other), checkpoint_id=folder / "checkpoint")
        assert_same(blocks(other), blocks(plain))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=7)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.out(self.down(torch.tanh(self.up(self.norm(self.embed(tokens))))))


def check_sequence_parallel_and_embeddings(folder):
    """The norm gets a part of each sequence. The table is cut along the inputs or the outputs."""

    def make() -> Sequence:
        torch.manual_seed(0)
        return Sequence().double()

    tokens = torch.randint(12, (2, 4), generator=torch.Generator().manual_seed(1))
    tokens[0, 0] = 7
    for embedding in (RowwiseParallel, ColwiseParallel):
        plan = {
            "embed": lambda style=embedding: style(
                input_layouts=Replicate(), output_layouts=Shard(1)
            ),
            "norm": SequenceParallel,
            "up": lambda: ColwiseParallel(input_layouts=Shard(1)),
            "down": lambda: RowwiseParallel(output_layouts=Shard(1)),
            "out": lambda: ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        for r, method in ((4, "bone"), (2, "bat")):
            plain, model = pair(r, target="embed|up|down|out", plan=plan, make=make, method=method)
            expected, output = plain(tokens), model(tokens)
            close(output, expected)
            for one in (expected, output):
                one.square().sum().backward()
            close(gradients_of(model), gradients_of(plain))


class Tied(Feedforward):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, tokens):
        return super().forward(self.embed(tokens))


def check_rows_and_tied_tables(folder):
    """Also rows that are all on one rank: the other one adds nothing to their gradient."""
    plan = {
        "embed": lambda: RowwiseParallel(input_layouts=Replicate()),
        "head": lambda: ColwiseParallel(output_layouts=Replicate()),
        **PLAN,
    }
    tokens = torch.tensor([[1, 11, 0, 1], [6, 5, 10, 7]])
    cases = [{"also_train_rows": {"embed": rows}} for rows in ([1, 7], [10, 11])]
    cases += [{"target_regex": "embed", **own} for own in ({}, {"r_out": 4}, {"method": "bat"})]
    cases += [{"rows": {"up": [(6, 12)]}, "method": method} for method in METHODS]
    for options in cases:
        torch.manual_seed(0)
        plain = Tied().double()
        model = parallelize_module(
            copy.deepcopy(plain), mesh(), {name: style() for name, style in plan.items()}
        )
        for one in (plain, model):
            one.head.weight = one.embed.weight  # a plan unties them
            disha.inject_adapters(one, **{"target_regex": "up|down", "r": 3, **options})
            perturb(one)
        expected, output = plain(tokens), model(tokens)
        close(output, expected)
        for one in (expected, output):
            one.square().sum().backward()
        close(gradients_of(model), gradients_of(plain))


def check_shards_of_other_sizes(folder):
    """Two ranks have 4 and 3 of 7 outputs, and 3 and 2 of 5 inputs."""
    for shape, placement in (((7, 6), Shard(0)), ((6, 5), Shard(1))):
        torch.manual_seed(0)
        weight = torch.randn(shape, dtype=torch.float64)
        x = torch.randn(4, shape[1], dtype=torch.float64)
        models = [nn.Linear(shape[1], shape[0], bias=False).double() for _ in range(2)]
        models[0].weight = nn.Parameter(weight)
        models[1].weight = nn.Parameter(distribute_tensor(weight, mesh(), [placement]))
        for model in models:
            perturb(disha.inject_adapters(model, "", 3))
        expected = models[0](x)
        output = models[1](DTensor.from_local(x, mesh(), [Replicate()])).full_tensor()
        close(output, expected)
        for one in (expected, output):
            one.square().sum().backward()
        close(gradients_of(models[1]), gradients_of(models[0]))


def check_whatever_reads_a_parallel_weight_sees_the_update(folder):
    """Experts as DTensors: code takes the local part, the whole, or computes with the DTensor."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for method, dim in (("bone", 0), ("bone", 1), ("bone", 2), ("bat", 0)):
        owner = nn.Module()
        owner.experts = nn.Parameter(distribute_tensor(weight, mesh(), [Shard(dim)]))
        layouts = {"experts": "expert out in"}
        perturb(disha.inject_adapters(owner, "experts", 2, layouts=layouts, method=method))
        plain = nn.Module()
        plain.experts = nn.Parameter(weight)
        perturb(disha.inject_adapters(plain, "experts", 2, layouts=layouts, method=method))
        dense = (plain.experts * 1).detach()
        close(owner.experts.full_tensor(), dense)
        assert isinstance(owner.experts, DTensor)  # as code asks that takes the local part
        local = owner.experts.to_local()
        take = torch.compile(lambda owner: owner.experts.to_local() * 1, backend="eager")
        close(take(owner), local * 1)
        close(local * 1, dense.chunk(dist.get_world_size(), dim)[dist.get_rank()])
        if dim == 0:
            products = [x @ local[index].T for index in range(2)]
            sum(product.square().sum() for product in products).backward()
            everything = [x @ plain.experts[index].T for index in range(4)]
            sum(product.square().sum() for product in everything).backward()
            close(gradients_of(owner), gradients_of(plain))


def check_states_and_copies(folder):
    plain, model = pair(2)
    x = inputs()
    disha.set_adapter_scale(model, 0.5)
    disha.set_adapter_scale(plain, 0.5)
    close(model(x), plain(x))
    with disha.adapters_disabled(model), disha.adapters_disabled(plain):
        close(model(x), plain(x))
    assert disha.check_adapters(model, x).ok
    with torch.no_grad():
        close(model(x), plain(x))
    close(checkpoint(model, x, use_reentrant=False), plain(x))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), plain(x))
    disha.remove_adapters(model)
    close(model(x), fresh()(x))


def check_a_forward_communicates_as_without_adapters(folder):
    counts = []
    for model in (pair(3)[1], parallel(fresh())):
        with CommDebugMode() as communication:
            model(inputs())
        counts.append(communication.get_comm_counts())
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 1


def check_new_adapters_change_no_bit(folder):
    """Also with a bias of a sum over the ranks, of which each adds a share; and it can train."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for method in METHODS:
            frozen, model = parallel(fresh().to(dtype)), parallel(fresh().to(dtype))
            disha.inject_adapters(model, "all-linear", 2, method=method)
            x = inputs().to(dtype)
            assert torch.equal(model(x), frozen(x))
            batched = x.view(2, 2, 8)
            assert torch.equal(model(batched), frozen(batched))
    plain, model = pair(2, also_train="bias")
    for one in (plain, model):
        one(inputs()).square().sum().backward()
    close(gradients_of(model), gradients_of(plain))
    trained = [whole(one.down.bias.grad) for one in (model, plain)]
    close(*trained)


def check_what_can_not_act_is_refused(folder):
    uneven = r"a 'bat' block of r=4 can't be cut at the edges of a rank's part \(0:6 and 0:8\)"
    refused = {
        uneven: {"r": 4, "method": "bat"},
    }
    for message, options in refused.items():
        model = parallel(fresh())
        expected = model(inputs())
        with pytest.raises(ArgumentError, match=message):
            disha.inject_adapters(model, "up|down", **options)
        assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
        close(model(inputs()), expected)
    weight = nn.Linear(4, 4)
    weight.weight = nn.Parameter(
        DTensor.from_local(torch.zeros(2, 4), mesh(), [_StridedShard(0, split_factor=2)])
    )
    with pytest.raises(TargetError, match="placed as Shard or Replicate"):
        disha.inject_adapters(nn.Sequential(weight), "0", 2)


def check_parallelizing_beside_adapted_weights(folder):
    for method in METHODS:
        model, plain = parallel(adapted("head", method)), adapted("head", method)
        close(model(inputs()), plain(inputs()))


def check_parallelizing_adapted_weights_raises(folder):
    """Torch refuses a plan for them. It has cut W by then, and the forward refuses that."""
    for method in METHODS:
        for target in ("up", "down", "up|down"):
            model = adapted(target, method)
            with pytest.raises((KeyError, AttributeError), match=NO_PLAN):
                parallel(model)
            with pytest.raises(ModeError, match="merge the adapter first"):
                model(inputs())
            with pytest.raises(MergeError, match="sharded parameters"):
                disha.merge_adapters(model)


def check_replicated_weights_act(folder):
    """`distribute_module` makes DTensors of blocks too: products compute with both."""
    for method in METHODS:
        model, plain = adapted("all-linear", method), adapted("all-linear", method)
        distribute_module(model, mesh())
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            one.requires_grad_(other.requires_grad)  # torch 2.8 makes all of them train
        weight = model.up.weight
        assert weight.shape == (12, 8)
        assert weight.device.type == "cpu"
        x = DTensor.from_local(inputs(), mesh(), [Replicate()])
        expected, output = plain(inputs()), model(x)
        close(output.full_tensor(), expected)
        output.full_tensor().square().sum().backward()
        expected.square().sum().backward()
        close(gradients_of(model), gradients_of(plain))
        assert_same(blocks(model), blocks(plain))
        with disha.adapters_disabled(model):
            close(model(x).full_tensor(), fresh()(inputs()))
        assert saved(model, folder / method) == saved(plain, folder / f"{method}-{rank()}")


def check_routed_samples(folder):
    """Of cut weights, and of those that `distribute_module` has put whole on each rank."""
    for method in METHODS:
        cut = pair(2, method=method)
        whole = (
            adapted("all-linear", method),
            distribute_module(adapted("all-linear", method), mesh()),
        )
        for plain, model in (cut, whole):
            x = inputs()
            names = ["default", None] * 2
            with disha.route_adapters(plain, names), disha.route_adapters(model, names):
                expected = plain(x)
                if model is whole[1]:
                    x = DTensor.from_local(x, mesh(), [Replicate()])
                output = model(x)
                close(output.full_tensor() if model is whole[1] else output, expected)
