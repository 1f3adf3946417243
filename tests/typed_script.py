"""A user's script. `make lint` gives it to mypy; `tests/test_types.py` to pyright, and runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn

import disha
from disha.interop import lora, peft


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = disha.BoneLinear(8, 16, r=4)
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(assert_type(self.first(x), Tensor).relu(), self.last.weight)

    def size(self) -> int:
        return self.first.disha["default"].r


def main(method: str = "bone") -> None:
    model = disha.inject_adapters(Net(), "last", r=4, adapter="b", method="miss", init="kaiming")
    assert_type(model, Net)
    disha.inject_adapters(model, "last", r=2, adapter="c", method=method)
    assert_type(disha.remove_adapters(model, "c"), Net)
    disha.set_active_adapters(model, ["default", "b"])
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model), lr=1e-3)
    report = disha.check_adapters(model, torch.ones(1, 8), optimizer=optimizer)
    checked: list[disha.CheckedWeight] = [*report.weights]
    planned: list[disha.BlockSpec] = [*disha.plan_adapters(model, "last", r=2, adapter="c").layers]
    rows: list[disha.BlockSpec] = [*disha.summary(model).layers]
    print(model.size(), [one.ok for one in checked], [one.r for one in rows], planned[0].name)
    disha.save_adapter(model, "adapter.safetensors", metadata={"task": "dialogue"})
    if not disha.load_adapter(model, "adapter.safetensors", replace=True).complete:
        raise SystemExit("the adapter has not been loaded")
    with disha.adapters_disabled(model):
        assert_type(model.first.disha["default"].block, nn.Parameter)
    exported: lora.LoraReport = lora.export(model, "as-lora", rank=8, experts="stacked")
    print(exported.error, peft.export(model, "as-miss").path)
    print(peft.load(model, "as-miss", replace=True).matched)


if __name__ == "__main__":
    main()
