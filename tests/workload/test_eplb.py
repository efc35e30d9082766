import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.spec.distribution import Skew
from moetune.spec.enums import Eplb
from moetune.workload.eplb import placement
from moetune.workload.skew import shares

ENGINES: tuple[Eplb, ...] = ("vllm", "sglang", "trtllm")
brief = settings(max_examples=80)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """Loads, the number of physical experts and ep_size, which divides it. Some loads are equal."""
    ep_size, room = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    num_experts = draw(st.integers(1, ep_size * room))
    loads = draw(st.lists(st.integers(1, 50).map(float), min_size=num_experts, max_size=num_experts))
    return loads, ep_size * room, ep_size


def rank_loads(loads: list[float], placed: tuple[int, ...], ep_size: int) -> list[float]:
    counts, room = Counter(placed), len(placed) // ep_size
    each = [loads[expert] / counts[expert] for expert in placed]
    return [sum(each[start : start + room]) for start in range(0, len(placed), room)]


@pytest.mark.parametrize("engine", ENGINES)
@brief
@given(case=cases())
def test_every_expert_has_a_copy_and_no_other_expert_deserves_the_last_one_more(engine, case):
    loads, num_physical, ep_size = case
    placed = placement(loads, num_physical, ep_size, engine)
    counts = Counter(placed)
    assert len(placed) == num_physical
    assert counts.keys() == set(range(len(loads)))
    busiest = max(loads[expert] / counts[expert] for expert in counts)
    assert all(loads[expert] / (counts[expert] - 1) >= busiest - 1e-9 for expert in counts if counts[expert] > 1)
    assert placement(loads, num_physical, ep_size, engine) == placed


@brief
@given(case=cases())
def test_the_loads_of_the_ranks_depend_on_the_engine_only_through_ties(case):
    loads, num_physical, ep_size = case
    # no two of these tie, also when each is divided by its copies
    distinct = [load + 0.001 * random.Random(expert).random() for expert, load in enumerate(loads)]
    placed = [placement(distinct, num_physical, ep_size, engine) for engine in ENGINES]
    found = [sorted(rank_loads(distinct, each, ep_size)) for each in placed]
    assert found[0] == pytest.approx(found[1])
    assert Counter(placed[0]) == Counter(placed[2])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spelled", [Skew("zipf", 0.8), Skew("ddist", 4.0), Skew("powerlaw", 1.01)])
def test_redundant_experts_even_out_the_ranks(engine, spelled):
    loads = list(shares(spelled, 128, 8, 0).values)
    contiguous = max(rank_loads(loads, tuple(range(128)), 8)) * 8
    balanced = max(rank_loads(loads, placement(loads, 160, 8, engine), 8)) * 8
    assert contiguous > 1.2
    assert balanced < 1.02


def test_ties_go_to_the_lower_expert_and_in_tensorrt_llm_to_the_higher():
    assert Counter(placement([1.0, 1.0, 1.0], 4, 2, "vllm")) == {0: 2, 1: 1, 2: 1}
    assert Counter(placement([1.0, 1.0, 1.0], 4, 2, "trtllm")) == {0: 1, 1: 1, 2: 2}


def test_an_expert_a_rank_keeps_its_place_and_in_tensorrt_llm_goes_by_load():
    assert placement([1.0, 3.0, 2.0], 4, 4, "sglang") == (0, 1, 2, 1)
    assert placement([1.0, 3.0, 2.0], 4, 4, "trtllm") == (2, 1, 1, 0)


def test_ranks_with_unequal_numbers_of_experts_have_no_balancer():
    with pytest.raises(UsageError, match="ep_size = 3 does not divide the 10 physical experts"):
        placement([1.0] * 8, 10, 3, "vllm")


def of_vllm(sources: Path) -> Any:
    """`DefaultEplbPolicy` of the engine's own file, without the imports of the rest of the engine."""
    text = (sources / "vllm/distributed/eplb/policy/default.py").read_text()
    scope: dict[str, Any] = {"AbstractEplbPolicy": object}
    exec(re.sub(r"^from \.abstract import .*$", "", text, flags=re.M), scope)

    def rebalance(loads: list[float], num_physical: int, ep_size: int) -> list[int]:
        weight = torch.tensor([loads])
        return scope["DefaultEplbPolicy"].rebalance_experts(weight, num_physical, 1, 1, ep_size)[0].tolist()

    return rebalance


def of_sglang(sources: Path) -> Any:
    """`rebalance_experts` of the engine's own file."""
    text = (sources / "sglang/srt/eplb/eplb_algorithms/deepseek.py").read_text()
    scope: dict[str, Any] = {"__name__": "deepseek"}
    exec(re.sub(r"^from sglang.*$", "", text, flags=re.M), scope)

    def rebalance(loads: list[float], num_physical: int, ep_size: int) -> list[int]:
        found = scope["rebalance_experts"](
            torch.tensor([loads]), num_physical, 1, 1, ep_size, enable_hierarchical=False
        )
        return found[0][0].tolist()

    return rebalance


@pytest.mark.parametrize(("engine", "load"), [("vllm", of_vllm), ("sglang", of_sglang)])
def test_the_engines_own_code_places_the_same_copies(engine, load, engine_sources):
    rebalance = load(engine_sources(engine))
    generator = np.random.default_rng(0)
    for _ in range(40):
        ep_size, room = int(generator.integers(1, 9)), int(generator.integers(1, 13))
        num_physical = ep_size * room
        num_experts = int(generator.integers(1, num_physical + 1))
        loads = (generator.pareto(1.2, num_experts) + 0.1).astype(np.float32).tolist()
        ours, theirs = placement(loads, num_physical, ep_size, engine), rebalance(loads, num_physical, ep_size)
        assert Counter(ours) == Counter(theirs)
        one, other = (rank_loads(loads, tuple(each), ep_size) for each in (ours, theirs))
        assert one == pytest.approx(other, rel=1e-5), (loads, num_physical, ep_size)
