"""The block over four processes computes what one process computes, with each dispatcher and format on the wire."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from block_program import LAYER, LOADS, TOKENS, WIRES, regime_of
from processes import GIVE_UP_S

from moetune.dep_bench.dispatchers import dispatcher_for
from moetune.dep_bench.payload import Format
from moetune.dep_bench.process_group import Ranks
from moetune.errors import UnsupportedError
from moetune.spec.regime import Regime
from moetune.workload.wire import wire

PROGRAM = Path(__file__).with_name("block_program.py")
RANKS = 4
CASES = [f"{load} {activation} {routing}" for load in LOADS for activation, routing in WIRES]


def run(folder, size, backend, **variables):
    """What the program has found on `size` ranks."""
    paths = [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(size), str(folder), backend]
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=GIVE_UP_S)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), RANKS, "torch")


def holders(rank):
    shard = regime_of("allgather", RANKS).shard(LAYER, rank)
    return range(shard.first, shard.first + shard.num_local)


def arriving(of_ranks, rank, load):
    """The rows that each rank sends to `rank`, counted from the ids."""
    mine = holders(rank)
    if load in ("allgather", "pool"):
        return [TOKENS] * RANKS
    local = [[[one in mine for one in token] for token in each["ids"]] for each in of_ranks]
    return [sum(sum(token) if load == "slot" else any(token) for token in tokens) for tokens in local]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_computes_what_one_process_computes(found, case):
    assert [each["error"] < 1e-5 for each in found[case]] == [True] * RANKS, found[case]


@pytest.mark.parametrize("case", CASES)
def test_the_rows_and_bytes_that_arrive_are_those_of_the_layout(found, case):
    load, activation, routing = case.split()
    regime = regime_of(load, RANKS)
    form = Format.of(LAYER, regime, activation, None if routing == "None" else routing)
    # `wire` has bf16 where this layer's fp32 travels, and k ids a row where a slot has one
    payload = wire(LAYER, regime, 1, activation, form.routing).payload_bytes_per_token
    payload += 2 * LAYER.hidden_size if activation == "bf16" else 0
    if load == "slot":
        payload -= (LAYER.top_k - 1) * (4 if form.routing == "packed_topk" else 8)
    for rank, each in enumerate(found[case]):
        rows = arriving(found[case], rank, load)
        assert each["rows"] == sum(rows)
        assert each["received"] == payload * (sum(rows) - rows[rank])


@pytest.mark.slow
def test_the_triton_kernel_computes_what_one_process_computes(tmp_path):
    found = run(tmp_path, 2, "triton", TRITON_INTERPRET="1")
    errors = [each["error"] for of_ranks in found.values() for each in of_ranks]
    assert len(errors) == 2 * len(CASES)
    assert 1e-4 < max(errors) < 1e-2  # its outputs are rounded to bf16


def test_the_top_k_is_computed_where_the_ids_are_first_needed(found):
    after = ["router", "dispatch", "top-k", "unpack", "experts", "combine"]
    assert found["allgather bf16 None"][0]["parts"] == after
    assert found["allgather fp4 None"][0]["parts"] == ["router", "quantize", *after[1:]]
    before = ["pack", "dispatch", "unpack", "experts", "combine"]
    assert found["allgather fp4 packed_topk"][0]["parts"] == ["router", "top-k", "quantize", *before]
    assert found["pool bf16 None"][0]["parts"] == ["router", "top-k", *before]
    assert found["slot fp4 packed_topk"][0]["parts"] == ["router", "top-k", "quantize", "counts", *before]


@pytest.mark.parametrize("load", LOADS)
def test_a_rank_that_gets_no_rows_computes_nothing(found, load):
    of_ranks = found[f"{load} sparse"]
    assert [each["error"] < 1e-5 for each in of_ranks] == [True] * RANKS
    if load in ("deduplicated", "slot"):
        assert sum(each["rows"] for each in of_ranks) == RANKS
        empty = [each["parts"] for each in of_ranks if not each["rows"]]
        assert empty
        assert all("unpack" not in parts and "experts" in parts for parts in empty)


def test_graphs_capture_what_has_fixed_shapes():
    static = {}
    for load in LOADS:
        regime = regime_of(load, RANKS)
        ranks = Ranks(0, RANKS, "cpu")
        static[load] = dispatcher_for(ranks, Format.of(LAYER, regime), LAYER, regime).is_static
    assert static == {"allgather": True, "deduplicated": False, "slot": False, "pool": True}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": "packed"}, "no dispatcher for the layout packed"),
        ({"ep_size": 2}, "4 ranks run ep 4 and tp 1, given ep 2 and tp 1"),
        ({"redundant_experts": 2}, "places no redundant experts"),
    ],
)
def test_what_no_ranks_can_run_is_refused(changed, message):
    regime = Regime(**{"ep_size": RANKS, "layout": "deduplicated", "uneven_shards": True, **changed})
    with pytest.raises(UnsupportedError, match=message):
        dispatcher_for(Ranks(0, RANKS, "cpu"), Format.of(LAYER, regime), LAYER, regime)
