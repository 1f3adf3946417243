import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from disha import ArgumentError, ArgumentTypeError, DishaError
from disha.config import AdapterConfig
from disha.functional import method_names
from disha.layers.adapters import check_adapter_name
from tests.conftest import pickled

FULL = AdapterConfig(
    r=4,
    target="attn",
    r_out=2,
    exclude=["head", "norm"],
    rank_pattern={"v_proj": 2, "q": 3},
    dropout=0.1,
    scale=np.float32(0.5),
    dtype=torch.bfloat16,
    init="kaiming",
    also_train="norm",
)


@pytest.mark.parametrize(
    ("groups", "method"),
    [
        (1, "bone"),
        (3, "bone_groups3"),
        ("all", "bone_groups_all"),
        (10**8, "bone_groups100000000"),
    ],
)
def test_groups_of_shards_are_a_part_of_the_methods_name(groups, method):
    config = AdapterConfig(1, method="miss", groups=groups)
    assert config == AdapterConfig(1, method=method)
    assert config.method == method
    assert AdapterConfig.from_json(config.to_json()) == config
    assert replace(config, scale=1.0) == config


@pytest.mark.parametrize("rows", [(0, 8), [(0, 8)], np.array([0, 8]), torch.tensor([[0, 8]])])
def test_a_pair_of_numbers_is_one_range_of_rows(rows):
    assert AdapterConfig(1, rows={"qkv": rows}).rows == {"qkv": ((0, 8),)}


def test_miss_is_the_later_name_of_bone():
    assert AdapterConfig(1, method="miss") == AdapterConfig(1, method="bone")


@pytest.mark.parametrize(
    "config", [AdapterConfig(1), FULL, AdapterConfig(2, target=None, method="bat")]
)
def test_survives_json_pickle_and_copy(config):
    assert AdapterConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert pickled(config) == config
    assert copy.deepcopy(config) == config
    assert hash(copy.deepcopy(config)) == hash(config)


def test_is_frozen_all_the_way():
    with pytest.raises(AttributeError, match="cannot assign to field 'r'"):
        FULL.r = 5
    with pytest.raises(TypeError, match="does not support item assignment"):
        FULL.rank_pattern["q"] = 5
    patterns = {"q": 1}
    config = AdapterConfig(2, rank_pattern=patterns)
    patterns["q"] = 2
    assert config.rank_pattern == {"q": 1}


def test_rank_pattern_first_found_wins():
    config = AdapterConfig(9, rank_pattern={"attn": 3, "v_proj": 2})
    assert config.rank_of("attn.v_proj") == 3
    assert config.rank_of("mlp.v_proj") == 2
    assert config.rank_of("mlp.up") == 9


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"r": 0}, ArgumentError, "r must be at least 1, got 0"),
        ({"r": -3}, ArgumentError, "at least 1"),
        ({"r": 4.0}, ArgumentTypeError, "r must be an int"),
        ({"r": True}, ArgumentTypeError, "r must be an int"),
        ({"r": "8"}, ArgumentTypeError, "'8' of type str"),
        ({"method": "dora"}, ArgumentError, f"allowed are {method_names()}"),
        ({"method": ["bone"]}, ArgumentError, "allowed are"),
        ({"r_out": 0}, ArgumentError, "r_out must be at least 1"),
        ({"r_out": 3.0}, ArgumentTypeError, "r_out must be an int"),
        (
            {"r_out": 2, "method": "bat"},
            ArgumentError,
            "leave r_out out: only 'bone' has an output shard, and the method is 'bat'",
        ),
        ({"groups": 0}, ArgumentError, "groups must be at least 1"),
        ({"groups": "most"}, ArgumentTypeError, "an int of at least 1, or 'all'"),
        (
            {"groups": 2, "r_out": 2},
            ArgumentError,
            "leave r_out or groups out: only 'bone' has an output shard, .* is 'bone_groups2'",
        ),
        (
            {"groups": 2, "method": "bat"},
            ArgumentError,
            "leave groups out: only 'bone' takes them, and the method is 'bat'",
        ),
        ({"groups": 2, "method": "bone_groups3"}, ArgumentError, "the method is 'bone_groups3'"),
        ({"init": "ones"}, ArgumentError, "'zeros', 'kaiming'"),
        ({"dropout": 1.0}, ArgumentError, "below 1"),
        ({"dropout": -0.1}, ArgumentError, "at least 0"),
        ({"dropout": float("nan")}, ArgumentError, "got nan"),
        ({"dropout": "0"}, ArgumentTypeError, "must be a number"),
        ({"scale": float("inf")}, ArgumentError, "finite"),
        ({"scale": None}, ArgumentTypeError, "NoneType"),
        ({"dtype": torch.int8}, ArgumentError, "can't be trained in torch.int8"),
        ({"dtype": "float32"}, ArgumentError, "'float32'; allowed are torch.float16"),
        ({"target": "("}, ArgumentError, "target '\\(' is not a valid regex"),
        ({"target": 3}, ArgumentTypeError, "target_regex"),
        ({"exclude": ["a", "["]}, ArgumentError, "exclude '\\['"),
        ({"exclude": 3}, ArgumentTypeError, "exclude"),
        ({"also_train": [3]}, ArgumentTypeError, "also_train"),
        ({"rank_pattern": {"*": 3}}, ArgumentError, "rank_pattern '\\*'"),
        ({"rank_pattern": {"a": 0}}, ArgumentError, "rank_pattern\\['a'\\]"),
        ({"rank_pattern": [("a", 2)]}, ArgumentTypeError, "dict of regex"),
    ],
)
def test_refuses_values_that_are_not_allowed(arguments, kind, says):
    with pytest.raises(kind, match=says) as caught:
        AdapterConfig(**{"r": 2, **arguments})
    assert isinstance(caught.value, DishaError)
    assert isinstance(caught.value, TypeError if kind is ArgumentTypeError else ValueError)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "a JSON object, got .* of type list"),
        ({}, "r must be an int of at least 1, got None"),
        ({"r": 2, "dtype": "int8"}, "can't be trained in 'int8'"),
        ({"r": "2"}, "r must be an int"),
    ],
)
def test_from_json_refuses_wrong_values(values, says):
    with pytest.raises(DishaError, match=says):
        AdapterConfig.from_json(values)


@pytest.mark.parametrize("name", ["default", "keys", "train", "training", "a b", "ä", "0"])
def test_adapter_names_that_are_allowed(name):
    assert check_adapter_name(name) == name


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("", ArgumentError, "contain a dot"),
        ("a.b", ArgumentError, "contain a dot"),
        (3, ArgumentTypeError, "must be a str"),
        (None, ArgumentTypeError, "must be a str"),
    ],
)
def test_adapter_names_that_are_not(name, kind, says):
    with pytest.raises(kind, match=says):
        check_adapter_name(name)
