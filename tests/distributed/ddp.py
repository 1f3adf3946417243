"""DDP on two ranks: training, files, control, and what is refused."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import disha
from disha import AdapterStateError, MergeError, TargetError
from tests.distributed.harness import (
    ADAPTERS,
    adapted,
    assert_same,
    assert_same_on_all_ranks,
    assert_trains_alike,
    assert_trains_alike_while_routed,
    batch,
    blocks,
    close,
    loss_of,
    own_part,
    rank,
    saved,
    train,
)


def wrapped(model, **options):
    return DistributedDataParallel(model, **options)


def check_training(folder):
    for case in ADAPTERS:
        assert_trains_alike(adapted(case), wrapped(adapted(case)))


def check_a_lora_starts_alike_with_unlike_seeds(folder):
    model = disha.remove_adapters(adapted())
    torch.manual_seed(rank())
    disha.inject_adapters(model, "all-linear", 3, method="lora")
    assert_same_on_all_ranks(wrapped(model))


def check_an_adapter_that_is_not_active(folder):
    """It requires gradients and gets none, which DDP has to be told of."""
    plain = adapted("two at once")
    model = wrapped(adapted("two at once"), find_unused_parameters=True)
    for of in (plain, model):
        disha.set_active_adapters(of, "second")
    _, expected = train(plain, batch())
    _, gradients = train(model, own_part(batch()))
    assert not any("default" in name for name in expected[-1])
    close({name: gradients[-1][name] for name in expected[-1]}, expected[-1])


def check_saving(folder):
    for case in ADAPTERS:
        expected = saved(adapted(case), folder / f"plain{rank()}")
        model = wrapped(adapted(case))
        assert saved(model, folder / case) == expected  # all ranks at once
        if rank() == 0:  # rank 0 alone, through the wrapper, past it, and of a model without one
            assert saved(model, folder / "a") == expected
            assert saved(model.module, folder / "b") == expected
            assert saved(adapted(case), folder / "c") == expected
        dist.barrier()
    assert len(list(folder.iterdir())) == len(ADAPTERS) + 2 + 3  # no left-overs


def check_loading(folder):
    source = adapted(seed=5)
    if rank() == 0:
        disha.save_adapter(source, folder / "a")
    dist.barrier()
    base = disha.remove_adapters(adapted())
    disha.load_adapter(base, folder / "a")
    assert_trains_alike(adapted(seed=5), wrapped(base))

    model = wrapped(adapted())
    disha.load_adapter(model, folder / "a", replace=True)
    assert_same(blocks(model), blocks(source))
    assert_trains_alike(source, model)

    state = disha.adapter_state_dict(model)
    assert all(key.startswith("module.") for key in state)
    other = wrapped(adapted())
    disha.load_adapter_state_dict(other, state)
    assert_same(blocks(other), blocks(model))
    disha.load_adapter_state_dict(other, disha.adapter_state_dict(adapted()))
    assert_same(blocks(other), blocks(adapted()))


def check_control(folder):
    plain, model, tokens = adapted("two at once"), wrapped(adapted("two at once")), batch()
    assert disha.summary(model) == disha.summary(plain)
    for of in (plain, model):
        disha.set_adapter_scale(of, 0.5, "second")
    close(model(tokens), plain(tokens))
    with disha.adapters_disabled(model), disha.adapters_disabled(plain), torch.no_grad():
        close(model(tokens), plain(tokens))
    names = ["default", "second", None, "default"]
    with disha.route_adapters(model, names), disha.route_adapters(plain, names):
        close(model(tokens), plain(tokens))


def check_merging(folder):
    model = wrapped(adapted())
    expected = model(batch()).detach()
    weights = [p.clone() for p in model.parameters()]
    disha.merge_adapters(model)
    close(model(batch()), expected)
    disha.unmerge_adapters(model)
    assert_same(list(model.parameters()), weights)
    assert_trains_alike(adapted(), model)


def check_training_while_routed(folder):
    assert_trains_alike_while_routed(wrapped(adapted("two at once")))


def check_refusals(folder):
    model = wrapped(adapted())
    with pytest.raises(TargetError, match="inject first, then wrap"):
        disha.inject_adapters(model, "all-linear", 2, adapter="new")
    with pytest.raises(TargetError, match="of DDP, from the module inside"):
        disha.remove_adapters(model)
    with pytest.raises(TargetError, match="combine first, then wrap"):
        disha.combine_adapters(model, {"default": 1.0}, into="new")
    assert_trains_alike(adapted(), model)
    disha.remove_adapters(model.module)


def check_compiled(folder):
    expected = saved(adapted(), folder / f"plain{rank()}")
    before = wrapped(torch.compile(adapted(compiled=True), backend="eager"))
    after = torch.compile(wrapped(adapted()), backend="eager")
    for model in (before, after):
        assert saved(model, folder / "a") == expected
        assert_trains_alike(adapted(), model)
    # Two forwards before one backward: DDP writes to buffers in between. In its first supported
    # releases autograd sees that, and any compiled model with buffers has to do without.
    if "preserve_version" not in inspect.getsource(DistributedDataParallel._sync_buffers):
        before.broadcast_buffers = after.broadcast_buffers = False
    for of in (before, after):
        (loss_of(of, own_part(batch())) + loss_of(of, own_part(batch()))).backward()


def check_flattened_parameters_act_but_are_no_files(folder):
    """The older FullyShardedDataParallel flattens blocks, and keeps views of them for forward."""
    model = FullyShardedDataParallel(
        adapted("tile"), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(AdapterStateError, match="use fully_shard"):
        disha.save_adapter(model, folder / "a")
    with pytest.raises(AdapterStateError, match="use fully_shard"):
        disha.load_adapter_state_dict(model, {})
    with pytest.raises(MergeError, match="in a model with sharded parameters"):
        disha.merge_adapters(model)
    assert not list(folder.iterdir())
    with FullyShardedDataParallel.summon_full_params(model):
        disha.save_adapter(model, folder / "a")
    assert (folder / "a").read_bytes() == saved(adapted("tile"), folder / "b")
    torch.testing.assert_close(model(batch()), adapted("tile")(batch()))
