import pytest
from shown import LAYER

from moetune.report.lines import layer_line, regime_line, routing_line
from moetune.spec.layer import RoutingMethod
from moetune.spec.regime import Regime


@pytest.mark.parametrize(
    ("routing", "line"),
    [
        (RoutingMethod(), "softmax"),
        (
            RoutingMethod(scoring="sigmoid", bias=True, num_groups=8, top_k_groups=4, scaling=2.5),
            "sigmoid + bias, 4 of 8 groups, × 2.5",
        ),
        (RoutingMethod(renormalize=False), "softmax, not renormalized"),
    ],
)
def test_a_routing_method_is_one_line(routing, line):
    assert routing_line(routing) == line


def test_a_layer_and_a_regime_are_one_line_each():
    assert layer_line(LAYER) == "small: 16 experts, top-4, hidden 64, intermediate 32, bf16"
    assert regime_line(Regime()) == "ep 1, tp 1, no attention DP, dispatch none, random × 16 draws, ladder pow2"
    assert (
        regime_line(Regime(ep_size=4, attention_dp=True, distribution="balanced", redundant_experts=4, seed=3))
        == "ep 4, tp 1, attention DP, alltoall packed, 4 redundant experts, balanced × 1 draw, seed 3, ladder pow2"
    )
