from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.config import SS1Config
from ss1_compile.errors import ConfigError
from ss1_compile.learned import LearnedStructure
from ss1_compile.structure import SS1Structure

BAD_VALUES: list[tuple[str, Any]] = [
    ("reduction", 0),
    ("reduction", -1),
    ("reduction", 2.0),
    ("reduction", True),
    ("reduction", "4"),
    ("reduction", None),
    ("num_hashes", 0),
    ("num_hashes", 1.5),
    ("num_hashes", False),
    ("block_k", 0),
    ("block_k", 4),
    ("block_k", 48),
    ("block_k", 2048),
    ("block_k", 32.0),
    ("group_size", 0),
    ("group_size", 64.0),
    ("group_size", 64),  # without projection="learned"
    ("hash_family", "sha"),
    ("hash_family", None),
    ("hash_family", ["affine"]),
    ("signed", 1),
    ("signed", None),
    ("share_sketches", 1),
    ("weigh_outputs", "output"),
    ("refit_dense", 1),
    ("seed", 0.5),
    ("seed", None),
    ("seed", 2**65),
    ("projection", "mean"),
    ("projection", 1),
    ("asymmetry", -0.1),
    ("asymmetry", 1.1),
    ("asymmetry", float("nan")),
    ("asymmetry", "half"),
    ("asymmetry", True),
    ("asymmetry", None),
    ("damping", 0),
    ("damping", -1e-3),
    ("damping", float("nan")),
    ("damping", float("inf")),
    ("damping", 10**400),
    ("damping", "1e-3"),
    ("damping", True),
    ("damping", None),
    ("quantization", "int4"),
    ("quantization", 8),
    ("quantization_group_size", 64),
    ("rounding", "up"),
    ("rounding", "calibrated"),
    ("overrides", {"a": {"seed": 1}}),
    ("overrides", {"a": {"reduction": 0}}),
    ("overrides", {"a": {"quantization": "int4"}}),
    ("overrides", {"a": {"quantization": "int8_dynamic", "quantization_group_size": 8}}),
    ("include", "encoder.*"),
    ("include", None),
    ("include", 5),
    ("include", ["a", 1]),
    ("exclude", "head"),
    ("exclude", [None]),
    ("exclude", 0.0),
    ("overrides", [("a", 2)]),
    ("overrides", None),
    ("overrides", {1: 2}),
    ("overrides", {"a": 0}),
    ("overrides", {"a": "2"}),
    ("overrides", {"a": True}),
    ("min_features", -1),
    ("min_features", 1.0),
    ("max_error", 0.0),
    ("max_error", float("nan")),
    ("max_error", "0.3"),
    ("warn_error", None),
    ("warn_error", -0.1),
    ("allow_empty", "yes"),
    ("strict", 0),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: repr(value)[:24])
def test_bad_value_names_the_field(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}\b") as caught:
        SS1Config(**{name: value})
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match=rf"^{name}\b"):
        SS1Config.from_dict({name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0.9}, "^reduction"),
        ({"reduction": float("nan")}, "^reduction"),
        ({"reduction": "2"}, "^reduction"),
        ({"overrides": {"a": 0.5}}, "^overrides"),
        ({"block_k": 32}, "^block_k"),
    ],
)
def test_bad_values_of_the_learned_projection(options, message):
    with pytest.raises(ConfigError, match=message):
        SS1Config(projection="learned", **options)


def test_the_learned_projection_takes_any_reduction_and_gives_a_learned_structure():
    config = SS1Config(
        projection="learned", reduction=1.5, group_size=48, overrides={"b": 2.5, "c": 1, "d": 90}
    )
    assert SS1Config.from_dict(config.to_dict()) == config
    for name, c in (("a", 1.5), ("b", 2.5)):
        structure = config.structure_for(name, 96, 80)
        assert structure == LearnedStructure.create(96, 80, c, group_size=48)
        assert structure.reduction >= c
    exact = config.structure_for("c", 96, 80)
    assert exact.kind == "rotation"
    assert exact.reduction == 1
    assert "no slot" in config.structure_for("d", 96, 80)


def test_every_field_has_a_bad_value_here():
    assert {f.name for f in dataclasses.fields(SS1Config)} == {name for name, _ in BAD_VALUES}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("reducton", "reduction"),
        ("blockk", "block_k"),
        ("hash_famly", "hash_family"),
        ("excludes", "exclude"),
        ("allowempty", "allow_empty"),
        ("num_hash", "num_hashes"),
    ],
)
def test_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f"'{key}'; did you mean '{nearest}'"):
        SS1Config.from_dict({"seed": 1, key: 2})


def test_unknown_key_that_is_like_no_other_lists_them():
    with pytest.raises(ConfigError, match="'zzz'; known options: reduction, num_hashes"):
        SS1Config.from_dict({"zzz": 1})
    with pytest.raises(ConfigError, match="unknown option 1"):
        SS1Config.from_dict({1: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("values", [None, 5, "reduction", [("reduction", 2)]])
def test_from_dict_needs_a_mapping(values):
    with pytest.raises(ConfigError, match="options must map names to values"):
        SS1Config.from_dict(values)


def test_misspelt_choice_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'calibrated'"):
        SS1Config(projection="calibratd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'independent'"):
        SS1Config(hash_family="independant")  # type: ignore[arg-type]


configs = st.builds(
    SS1Config,
    reduction=st.integers(1, 64),
    num_hashes=st.none() | st.integers(1, 99),
    block_k=st.none() | st.sampled_from([8, 16, 32, 64, 128, 256, 512, 1024]),
    hash_family=st.sampled_from(["independent", "affine"]),
    signed=st.booleans(),
    seed=st.integers(-(2**63), 2**63),
    projection=st.sampled_from([None, "average", "calibrated"]),
    damping=st.floats(1e-300, 1e300),
    include=st.lists(st.text(max_size=8), max_size=3),
    exclude=st.lists(st.text(max_size=8), max_size=3),
    overrides=st.dictionaries(st.text(max_size=8), st.none() | st.integers(1, 64), max_size=3),
    min_features=st.integers(0, 10**9),
    max_error=st.none() | st.floats(1e-9, 10.0),
    warn_error=st.floats(1e-9, 10.0),
    allow_empty=st.booleans(),
    strict=st.booleans(),
)


@given(configs)
@settings(max_examples=60, deadline=None)
def test_round_trips(config):
    values = config.to_dict()
    assert set(values) == {f.name for f in dataclasses.fields(SS1Config)}
    assert SS1Config.from_dict(values) == config
    parsed = SS1Config.from_dict(json.loads(json.dumps(values, allow_nan=False)))
    assert parsed == config
    assert list(parsed.overrides) == list(config.overrides)  # the first match wins: order counts
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_frozen_keyword_only_and_detached_from_its_arguments():
    overrides, include = {"a": 2}, ["a", "b"]
    config = SS1Config(overrides=overrides, include=include)  # type: ignore[arg-type]
    overrides["b"] = 3
    include.append("c")
    assert config.overrides == {"a": 2}
    assert config.include == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.reduction = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        SS1Config(2)  # type: ignore[misc]
    assert dataclasses.replace(config, reduction=8).reduction == 8
    with pytest.raises(ConfigError, match="reduction"):
        dataclasses.replace(config, reduction=0)


def test_patterns_may_come_from_an_iterator():
    assert SS1Config(exclude=(f"layer.{i}" for i in (0, 9))).exclude == (  # type: ignore[arg-type]
        "layer.0",
        "layer.9",
    )


def outcome(name: str = "encoder.layer.3.query", k: int = 768, n: int = 768, **fields: Any) -> Any:
    return SS1Config(**fields).reduction_for(name, k, n)


def test_defaults_compress_by_four():
    assert outcome() == 4


def test_include_and_exclude():
    assert outcome(include=["encoder.*"]) == 4
    assert outcome(include=["decoder.*", "*.query"]) == 4
    assert outcome(include=["*.layer.[0-3].*"]) == 4
    assert "no include pattern of ['*.key']" in outcome(include=["*.key"])
    assert "no include pattern of []" in outcome(include=[])
    assert outcome(exclude=["*.query"]) == "excluded by '*.query'"
    assert "excluded" in outcome(include=["*.query"], exclude=["encoder.*"])
    assert outcome(exclude=["query"]) == 4  # patterns match the whole qualified name
    assert outcome(exclude=["*.Query"]) == 4  # and its case, on every system


def test_overrides():
    assert outcome(overrides={"*.query": 8}) == 8
    assert outcome(overrides={"*.key": 8}) == 4
    assert outcome(overrides={"*.query": 8, "encoder.*": 2}) == 8
    assert outcome(overrides={"encoder.*": 2, "*.query": 8}) == 2
    assert outcome(overrides={"*.query": None, "encoder.*": 2}) == (
        "kept dense by overrides['*.query']"
    )
    assert "excluded" in outcome(overrides={"*.query": 8}, exclude=["*.query"])
    assert "no include" in outcome(overrides={"*.query": 8}, include=["*.key"])


def test_small_layers_and_large_reductions_stay_dense_with_a_reason():
    assert outcome(k=31, n=768) == "smaller than min_features = 32"
    assert outcome(k=768, n=31) == "smaller than min_features = 32"
    assert outcome(k=32, n=32) == 4
    assert outcome(k=2, n=768, min_features=0) == "reduction 4 exceeds in_features 2"


def test_structure_for_draws_what_the_fields_say():
    config = SS1Config(reduction=3, num_hashes=2, block_k=16, seed=9, signed=False)
    expected = SS1Structure.create(
        384, 96, 3, num_hashes=2, block_k=16, hash_family="independent", signed=False, seed=9
    )
    assert config.structure_for("a", 384, 96) == expected
    affine = SS1Config(hash_family="affine").structure_for("a", 384, 96)
    assert affine == SS1Structure.create(384, 96, 4, hash_family="affine")
    assert SS1Config(exclude=["a"]).structure_for("a", 384, 96) == "excluded by 'a'"


def test_layers_of_equal_sizes_share_their_structure():
    config = SS1Config()
    assert config.structure_for("query", 384, 384) == config.structure_for("key", 384, 384)


def test_padding_that_eats_the_gain_is_a_reason():
    reason = SS1Config(reduction=4, block_k=128).structure_for("a", 100, 64)
    assert isinstance(reason, str)
    assert re.match("padding 100 features to 512 leaves nothing .* smaller block_k", reason)
    assert isinstance(SS1Config(reduction=1, block_k=128).structure_for("a", 100, 64), SS1Structure)
