"""Whole forwards by the kernels in vLLM's and SGLang's own files, under Triton's interpreter."""

import sys

import pytest
from test_runner import REGIMES, TACTICS, assert_right, layer_of, runner_of

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.spec.regime import Regime

NOT_SWAPPED = (TACTICS[0], TACTICS[4])
"""In a swapped tile of at most 128 columns SGLang 0.5.23 indexes a scalar scale; Triton 3.6 compiles that, 3.9 not."""


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
@pytest.mark.parametrize("name", ["none", "packed, L < k", "pool"])
def test_right_in_every_kind_of_regime(engine, name, precision):
    layer, regime = layer_of(precision), REGIMES[name]
    runner = runner_of(layer, regime, 18, kernel=engine)
    default = TritonBackend(engine).default(layer, regime, 18)
    assert_right(runner, NOT_SWAPPED[0] if engine == "sglang" and precision == "fp8_block" else default, precision)
    assert engine not in sys.modules


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_right_for_every_kind_of_tile(engine, precision):
    runner = runner_of(layer_of(precision), REGIMES["packed"], 21, kernel=engine)
    for tactic in NOT_SWAPPED if engine == "sglang" and precision == "fp8_block" else TACTICS:
        assert_right(runner, tactic, precision)


@pytest.mark.parametrize(("rows", "is_sorted"), [(1, False), (3, True)])
def test_few_slots_of_a_whole_layer_skip_the_sort_where_the_engine_does(engine, rows, is_sorted):
    runner = runner_of(layer_of("bf16", num_experts=16), Regime(), rows, kernel=engine)
    assert runner._shapes.sorted == (is_sorted or engine == "sglang")
    assert_right(runner, TACTICS[1], "bf16")
