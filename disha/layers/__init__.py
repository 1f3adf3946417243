"""Layers with adapters: blocks, adapted classes, the table of layer kinds, and opaque weights."""

from disha.layers.adapted import AdaptedLayer, refuse_merged
from disha.layers.adapters import CHILD_NAME, Adapters, Merged, Original, check_adapter_name
from disha.layers.bitsandbytes import is_library_forward, parameter_count
from disha.layers.blocks import Block, Slot, block_name
from disha.layers.classes import AdaptedLinear, adapt, readapt, refuse_changed_class, restore
from disha.layers.encoder import guard_encoder, is_guarded, release_encoder
from disha.layers.kinds import (
    FOREIGN_KINDS,
    LAYER_KINDS,
    PROJECTIONS,
    declared_slots,
    matrix_parameters,
    register_layer_kind,
    slot_of,
)
from disha.layers.linear import BatLinear, BoneLinear
from disha.layers.opaque import (
    ROUNDED,
    Quantisation,
    is_quantised,
    original_class,
    quantisation_of,
    takes_dense,
)
from disha.layers.weights import (
    base_of,
    delta_of,
    device_of_weight,
    geometry_of,
    make_block,
    merged_weight,
    offloading_hooks,
    read_weight,
    stored_weight,
    weight_shape,
)

__all__ = [
    "CHILD_NAME",
    "FOREIGN_KINDS",
    "LAYER_KINDS",
    "PROJECTIONS",
    "ROUNDED",
    "AdaptedLayer",
    "AdaptedLinear",
    "Adapters",
    "BatLinear",
    "Block",
    "BoneLinear",
    "Merged",
    "Original",
    "Quantisation",
    "Slot",
    "adapt",
    "base_of",
    "block_name",
    "check_adapter_name",
    "declared_slots",
    "delta_of",
    "device_of_weight",
    "geometry_of",
    "guard_encoder",
    "is_guarded",
    "is_library_forward",
    "is_quantised",
    "make_block",
    "matrix_parameters",
    "merged_weight",
    "offloading_hooks",
    "original_class",
    "parameter_count",
    "quantisation_of",
    "read_weight",
    "readapt",
    "refuse_changed_class",
    "refuse_merged",
    "register_layer_kind",
    "release_encoder",
    "restore",
    "slot_of",
    "stored_weight",
    "takes_dense",
    "weight_shape",
]
