"""The weights of an adapter in a checkpoint, and whether the two belong together."""

import pytest
import torch
from torch import nn

import disha
from disha import AdapterFileError
from disha.interop.checkpoints import misfits
from disha.interop.checkpoints.matching import base_shapes, base_weights
from disha.interop.checkpoints.reading import open_checkpoint
from tests.base_checkpoints import Setting, Zoo, save_sharded, tensors_in
from tests.conftest import Layered, assert_same


class TestNames:
    def merged_under(self, tmp_path, old, new, beside=(), **arguments):
        """Merge into a checkpoint whose names have another prefix than the adapter's model."""
        model = nn.ModuleDict({"net": Layered(), **dict(beside)})
        setting = Setting(tmp_path, model, **arguments)
        state = {
            f"{new}{name.removeprefix(old)}": value
            for name, value in tensors_in(setting.base).items()
        }
        save_sharded(state, setting.base, 2)
        setting.merge()
        expected = setting.merged_in_memory()
        moved = {f"{new}{name.removeprefix(old)}": value for name, value in expected.items()}
        assert_same(tensors_in(setting.out), moved)
        return setting

    def test_the_checkpoint_has_a_prefix_more(self, tmp_path):
        inner = Layered().named_children()  # which end as those of the net do
        setting = self.merged_under(tmp_path, "", "model.", inner, also_train="norm")
        assert misfits(setting.base, setting.adapter) == []

    def test_the_checkpoint_has_a_prefix_less(self, tmp_path):
        self.merged_under(tmp_path, "net.", "")

    def test_names_as_they_are_come_first(self, tmp_path):
        setting = Setting(tmp_path, Layered())
        state = tensors_in(setting.base)
        twin = {f"twin.{name}": torch.zeros_like(value) for name, value in state.items()}
        save_sharded(state | twin, setting.base, 2)
        setting.merge()
        assert_same(tensors_in(setting.out), setting.merged_in_memory() | twin)

    def test_two_prefixes_that_lead_to_all_are_refused(self, tmp_path):
        setting = Setting(tmp_path, Layered())
        state = tensors_in(setting.base)
        save_sharded(
            {f"{p}.{n}": v.clone() for p in "ab" for n, v in state.items()}, setting.base, 2
        )
        with pytest.raises(AdapterFileError, match=r"several prefixes; it has a\.embed"):
            setting.merge()
        assert not setting.out.exists()

    def test_what_is_missing_is_named_and_not_taken_from_another_part(self, tmp_path):
        towers = nn.ModuleDict({"text": Layered(), "image": Layered()})
        setting = Setting(tmp_path, towers, "q_proj", also_train="text.head")
        state = tensors_in(setting.base)
        one_tower = {name[5:]: value for name, value in state.items() if name.startswith("text.")}
        layer, head = "text.layers.1.attn.q_proj.weight", "text.head.weight"
        lacks = {
            "image": one_tower,
            layer: state | {layer: None} | {f"text.more.{n}": v + 0 for n, v in one_tower.items()},
            rf"{layer}; it has image\.embed": state | {layer: None, f"{layer}.query": state[layer]},
            f"{head}; .*If a weight is tied": state | {head: None, f"layers.0.{head}": state[head]},
        }
        for absent, stored in lacks.items():
            save_sharded({n: v for n, v in stored.items() if v is not None}, setting.base, 1)
            with pytest.raises(AdapterFileError, match=f"lacks {absent}"):
                setting.merge(force=True)


class TestBelonging:
    def test_all_is_well(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|embed|conv|up|packed|apart", also_train="norm")
        assert misfits(setting.base, setting.adapter) == []

    def test_a_base_in_another_dtype_is_the_same_base(self, setting):
        state = {name: value.bfloat16() for name, value in tensors_in(setting.base).items()}
        save_sharded(state, setting.base, 2)
        assert misfits(setting.base, setting.adapter) == []

    def test_everything_that_is_wrong_is_listed(self, setting):
        state = tensors_in(setting.base)
        state["layers.1.attn.v_proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        key = "layers.1.attn.v_proj.weight"
        values = f"{key}: has other values than the weight that the adapter was saved from"
        assert misfits(setting.base, setting.adapter) == [values]
        state["layers.0.attn.v_proj.weight"] = torch.zeros(8, 7)
        state["layers.1.attn.q_proj.weight"] = torch.zeros(8, 8, dtype=torch.int8)
        save_sharded(state, setting.base, 2)
        shape, quantized, other = misfits(setting.base, setting.adapter)
        assert shape.startswith("layers.0.attn.v_proj.weight: the weight has the shape (8, 7)")
        assert quantized.startswith("layers.1.attn.q_proj.weight: is quantised or packed there")
        assert other == values

    def test_weights_and_shapes_by_the_names_of_the_adapter(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|packed", method="bat")
        state = {f"model.{name}": one for name, one in tensors_in(setting.base).items()}
        save_sharded(state, setting.base, 2)
        checkpoint, header = open_checkpoint(setting.base), disha.inspect_adapter(setting.adapter)
        weight = base_weights(checkpoint, header)
        assert torch.equal(weight("proj"), state["model.proj.weight"])
        with pytest.raises(disha.ConversionError, match="in_proj_weight is not the weight of a"):
            weight("packed.q_proj")
        shapes = base_shapes(checkpoint, ["proj.weight", "proj.bias"])
        assert shapes == {"proj.weight": (10, 8), "proj.bias": (10,)}
        state["model.proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        with pytest.raises(AdapterFileError, match=r"proj\.weight: has other values"):
            base_weights(open_checkpoint(setting.base), header)("proj")
