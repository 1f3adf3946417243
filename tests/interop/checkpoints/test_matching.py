"""The weights of an adapter in a checkpoint, and whether the two belong together."""

import pytest
import torch
from torch import nn

import disha
from disha import AdapterFileError
from disha.interop.checkpoints import misfits
from disha.interop.checkpoints.matching import base_weights_of_checkpoint, what_is_known_of
from disha.interop.checkpoints.reading import open_checkpoint
from tests.base_checkpoints import Setting, Zoo, save_sharded, tensors_in
from tests.conftest import Layered, assert_same

LAYER, HEAD = "text.layers.1.attn.q_proj.weight", "text.head.weight"


def only_one_tower(state):
    return {name[5:]: value for name, value in state.items() if name.startswith("text.")}


def with_the_layer_in_a_third_tower(state):
    third = {f"text.more.{name}": value + 0 for name, value in only_one_tower(state).items()}
    return state | {LAYER: None} | third


def with_the_layer_one_level_deeper(state):
    return state | {LAYER: None, f"{LAYER}.query": state[LAYER]}


def with_the_head_in_a_layer(state):
    return state | {HEAD: None, f"layers.0.{HEAD}": state[HEAD]}


LACKING = {
    "a tower": (only_one_tower, "image"),
    "a layer that a third tower has": (with_the_layer_in_a_third_tower, LAYER),
    "a layer that is deeper": (with_the_layer_one_level_deeper, rf"{LAYER}; it has image\.embed"),
    "a head": (with_the_head_in_a_layer, f"{HEAD}; .*If a weight is tied"),
}
"""What is changed in a checkpoint of two towers, and what it lacks then."""


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

    @pytest.mark.parametrize("case", LACKING)
    def test_what_is_missing_is_named_and_not_taken_from_another_part(self, tmp_path, case):
        change, says = LACKING[case]
        towers = nn.ModuleDict({"text": Layered(), "image": Layered()})
        setting = Setting(tmp_path, towers, "q_proj", also_train="text.head")
        stored = change(tensors_in(setting.base))
        kept = {name: value for name, value in stored.items() if value is not None}
        save_sharded(kept, setting.base, 1)
        with pytest.raises(AdapterFileError, match=f"lacks {says}"):
            setting.merge(force=True)


OTHER_VALUES = (
    "layers.1.attn.v_proj.weight: has other values than the weight that the adapter was saved from"
)


class TestBelonging:
    def test_all_is_well(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|embed|conv|up|packed|apart", also_train="norm")
        assert misfits(setting.base, setting.adapter) == []

    def test_a_base_in_another_dtype_is_the_same_base(self, setting):
        state = {name: value.bfloat16() for name, value in tensors_in(setting.base).items()}
        save_sharded(state, setting.base, 2)
        assert misfits(setting.base, setting.adapter) == []

    def test_another_value_is_seen(self, setting):
        state = tensors_in(setting.base)
        state["layers.1.attn.v_proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        assert misfits(setting.base, setting.adapter) == [OTHER_VALUES]

    def test_everything_that_is_wrong_is_listed(self, setting):
        state = tensors_in(setting.base)
        state["layers.1.attn.v_proj.weight"] += 1
        state["layers.0.attn.v_proj.weight"] = torch.zeros(8, 7)
        state["layers.1.attn.q_proj.weight"] = torch.zeros(8, 8, dtype=torch.int8)
        save_sharded(state, setting.base, 2)
        shape, quantized, other = misfits(setting.base, setting.adapter)
        assert shape.startswith("layers.0.attn.v_proj.weight: the weight has the shape (8, 7)")
        assert quantized.startswith("layers.1.attn.q_proj.weight: is quantised or packed there")
        assert other == OTHER_VALUES


class TestWithoutMerging:
    """What a conversion asks of a base whose names have one more prefix than the adapter's."""

    @pytest.fixture
    def setting(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|packed", method="bat")
        self.save(setting, tensors_in(setting.base))
        return setting

    @staticmethod
    def save(setting, state):
        save_sharded({f"model.{name}": one for name, one in state.items()}, setting.base, 2)

    @staticmethod
    def weights(setting):
        header = disha.inspect_adapter(setting.adapter)
        return base_weights_of_checkpoint(open_checkpoint(setting.base), header)

    def test_weights_by_the_names_of_the_adapter(self, setting):
        stored = tensors_in(setting.base)["model.proj.weight"]
        assert torch.equal(self.weights(setting)("proj"), stored)

    def test_shapes_by_the_names_of_the_adapter(self, setting):
        known = what_is_known_of(open_checkpoint(setting.base))
        assert known.shapes_of(["proj"]) == {"proj": (10, 8)}

    def test_a_packed_weight_has_no_lora(self, setting):
        with pytest.raises(disha.ConversionError, match="in_proj_weight is not the weight of a"):
            self.weights(setting)("packed.q_proj")

    def test_another_base_is_refused(self, setting):
        state = tensors_in(setting.base)
        state["model.proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        with pytest.raises(AdapterFileError, match=r"proj\.weight: has other values"):
            self.weights(setting)("proj")
