"""The layer refuses what cannot be, and its key is its shape."""

import pytest

from moetune.errors import UsageError
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer, RoutingMethod

SIZES = {"num_experts": 64, "top_k": 4, "hidden_size": 256, "intermediate_size": 128}
OTHER_VALUES = {
    "num_experts": 128,
    "top_k": 5,
    "hidden_size": 512,
    "intermediate_size": 256,
    "precision": Precision.FP8_BLOCK,
    "activation": Activation.GELU,
    "expert_bias": True,
    "weight_on_input": True,
    "num_shared_experts": 1,
    "routing": RoutingMethod(scoring="sigmoid"),
}


def test_every_field_but_the_name_is_tested_for_the_digest():
    assert set(OTHER_VALUES) == set(MoELayer.model_fields) - {"name"}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_each_field_of_the_shape_changes_the_digest_and_the_slug(field):
    layer = MoELayer(**SIZES)
    other = MoELayer(**{**SIZES, field: OTHER_VALUES[field]})
    assert other.digest != layer.digest
    assert other.slug != layer.slug


@pytest.mark.parametrize(
    "routing",
    [
        {"bias": True},
        {"num_groups": 8, "top_k_groups": 4},
        {"num_groups": 8, "top_k_groups": 4, "group_score": "max"},
        {"renormalize": False},
        {"scaling": 2.5},
    ],
)
def test_each_part_of_the_routing_changes_the_digest(routing):
    assert MoELayer(**SIZES, routing=routing).digest != MoELayer(**SIZES).digest


def test_a_name_is_no_part_of_the_shape():
    assert MoELayer(**SIZES, name="a").digest == MoELayer(**SIZES, name="b").digest
    assert MoELayer(**SIZES).slug == f"e64-k4-h256-i128-bf16-{MoELayer(**SIZES).digest}"


def test_json_gives_the_same_layer_back():
    layer = MoELayer(**SIZES, precision="nvfp4", routing={"scoring": "sigmoid", "bias": True})
    assert MoELayer.model_validate_json(layer.model_dump_json()) == layer


@pytest.mark.parametrize("groups", [(8, 4), (8, 1), (2, 1)])
def test_fewer_groups_than_all_are_a_limit(groups):
    assert RoutingMethod(num_groups=groups[0], top_k_groups=groups[1]).grouped
    assert not RoutingMethod(num_groups=groups[0], top_k_groups=groups[0]).grouped


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": -8}, "num_experts"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 65}, "exceeds num_experts = 64"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
        ({"num_experts": "many"}, "num_experts"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"precision": "fp9"}, "precision"),
        ({"activation": "relu3"}, "activation"),
        ({"routing": {"scoring": "argmax"}}, "scoring"),
        ({"routing": {"num_groups": 0}}, "top_k_groups"),
        ({"routing": {"num_groups": 4, "top_k_groups": 5}}, "top_k_groups"),
        ({"routing": {"num_groups": 7}}, "num_groups = 7"),
        ({"routing": {"num_groups": 32, "top_k_groups": 1}}, "exceeds the 2 experts"),
        ({"experts": 3}, "experts"),
    ],
)
def test_a_bad_value_is_a_one_line_usage_error_that_names_it(given, named):
    with pytest.raises(UsageError) as error:
        MoELayer(**{**SIZES, **given})
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_size_is_named():
    with pytest.raises(UsageError, match="top_k"):
        MoELayer(num_experts=8, hidden_size=8, intermediate_size=8)  # type: ignore[call-arg]
