"""Weights that are kept between buckets, and how many inputs a problem gets."""

import pickle
from dataclasses import replace

import pytest

from moetune.backends import prepared
from moetune.backends.base import Problem
from moetune.backends.prepared import WeightCache, num_inputs
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

LAYER = MoELayer(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)


def problem(rows: int = 4, rank: int = 0, draws: int = 1, **fields: int) -> Problem:
    regime = Regime(ep_size=2, **fields)  # type: ignore[arg-type]
    routings = tuple(realize(LAYER, regime, rows, rank, draw) for draw in range(draws))
    return Problem(LAYER, regime, rows, regime.shard(LAYER, rank), as_draws(routings))


def test_weights_are_made_once_for_all_buckets_of_a_rank() -> None:
    cache: WeightCache[str] = WeightCache()
    assert not cache.filled
    assert cache.get(problem(4), lambda: "first") == "first"
    assert cache.filled
    assert cache.get(problem(8), lambda: "again") == "first"


@pytest.mark.parametrize("changes", [{"rank": 1}, {"seed": 1}, {"tp_size": 2}, {"redundant_experts": 2}])
def test_other_weights_replace_those_that_are_kept(changes: dict[str, int]) -> None:
    cache: WeightCache[str] = WeightCache()
    cache.get(problem(), lambda: "first")
    assert cache.get(problem(**changes), lambda: "other") == "other"
    assert cache.get(problem(), lambda: "anew") == "anew"


def test_another_device_has_weights_of_its_own() -> None:
    cache: WeightCache[str] = WeightCache()
    cache.get(problem(), lambda: "cpu")
    assert cache.get(replace(problem(), device="meta"), lambda: "meta") == "meta"


def test_old_weights_are_freed_before_new_ones_are_made() -> None:
    cache: WeightCache[str] = WeightCache()
    cache.get(problem(), lambda: "first")
    freed: list[bool] = []
    cache.get(problem(rank=1), lambda: str(freed.append(not cache.filled)))
    assert freed == [True]


def test_a_cache_in_another_process_is_empty() -> None:
    cache: WeightCache[str] = WeightCache()
    cache.get(problem(), lambda: "first")
    assert not pickle.loads(pickle.dumps(cache)).filled


def test_each_draw_has_inputs_of_its_own_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(rows=4, draws=3)
    assert num_inputs(asked) == 3
    monkeypatch.setattr(prepared, "INPUT_BYTES", 2 * 2 * 4 * 64)
    assert num_inputs(asked) == 2
    monkeypatch.setattr(prepared, "INPUT_BYTES", 0)
    assert num_inputs(asked) == 1
