"""`moetune dep-bench` over two GPUs with NCCL, and on one. Without GPUs the same commands run over gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
from moetune.dep_bench.device_clock import DeviceClock
from moetune.dep_bench.process_group import Ranks
from moetune.dep_bench.result import DepBench

BF16 = {"hidden_size": 256, "moe_intermediate_size": 128, "torch_dtype": "bfloat16"}
TOKENS = 24
DISPATCHES = {
    "allgather": ("--dispatch", "allgather"),
    "allgather-topk": ("--dispatch", "allgather", "--wire-routing", "topk"),
    "allgather-fp4": ("--dispatch", "allgather", "--wire", "fp4"),
    "allgather-fp4-packed": ("--dispatch", "allgather", "--wire", "fp4", "--wire-routing", "packed_topk"),
    "pool": ("--dispatch", "alltoall", "--layout", "pool"),
    "pool-fp4-packed": ("--dispatch", "alltoall", "--layout", "pool", "--wire", "fp4", "--wire-routing", "packed_topk"),
    "deduplicated": ("--dispatch", "alltoall", "--layout", "deduplicated"),
    "slot": ("--dispatch", "alltoall", "--layout", "slot"),
}
STATIC = ("allgather", "pool")
NO_GRAPH = "its shapes depend on the routing"


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def measured(tiny, store):
    """Runs a dep-bench of a tiny layer in one bucket, and returns its document. Profiles are tuned once."""

    def run(device, backend, *options, processes=1):
        if device == "cuda" and torch.cuda.device_count() < processes:
            pytest.skip(f"needs {processes} GPUs")
        shared = ("--model", tiny(**BF16) if device == "cuda" else tiny(), "--backend", backend, "--device", device)
        shared += ("--ladder", "48", "--draws", "2", "--tokens", TOKENS, "--store", store, "--json")
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        ran = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else ()), "-m", "moetune", "dep-bench"]
            + [str(word) for word in (*shared, *options)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert "runs without torch.compile" not in ran.stderr
        return DepBench.model_validate(json.loads(ran.stdout))

    return run


def require_right(found, device, eager):
    assert [point.routing for point in found.points] == ["random", "zipf:0.5"]
    for point in found.points:
        assert max(arm.error for arm in point.arms) < (1e-2 if device == "cuda" else 1e-5)
        assert point.eager == (eager if device == "cuda" else "")
        assert all(part.fastest_us >= 0.0 for part in point.parts)
        assert all(arm.experts_us > 0.0 for arm in point.arms)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_two_ranks_measure_every_dispatch_and_end(measured, device, dispatch):
    backend = "triton" if device == "cuda" else "torch"
    found = measured(device, backend, "--ep", "2", *DISPATCHES[dispatch], processes=2)
    require_right(found, device, "" if dispatch.startswith(STATIC) else NO_GRAPH)
    for point in found.points:
        assert len(point.fidelity_by_rank) == 2
        if device == "cuda" or "fp4" in dispatch:  # the CPU's tiny layer is in fp32
            if dispatch.startswith("allgather"):
                assert point.received_bytes == point.plan_bytes > 0
            elif dispatch.startswith("pool"):  # the unused rows travel too
                assert point.received_bytes > point.plan_bytes > 0


@pytest.mark.gpu
def test_two_ranks_measure_flashinfers_kernel_and_its_own_choice(measured):
    if obstacle := FlashInferCutlassBackend().unavailable():
        pytest.skip(obstacle[0])
    found = measured("cuda", "flashinfer-cutlass", "--ep", "2", *DISPATCHES["allgather"], processes=2)
    require_right(found, "cuda", "")
    assert [arm.arm for arm in found.points[0].arms] == ["default", "engine", "pure_ep", "dispatcher"]


def test_one_process_is_one_rank_of_many(measured, device):
    backend = "triton" if device == "cuda" else "torch"
    found = measured(device, backend, "--ep", "4", *DISPATCHES["deduplicated"])
    require_right(found, device, "")
    assert [part.part for part in found.points[0].parts] == ["router", "top-k", "experts"]


@pytest.mark.gpu
def test_the_parts_of_a_graph_have_their_own_times():
    source = torch.randn(1 << 27, device="cuda")
    clock = DeviceClock(Ranks(device="cuda"), lambda: None)

    def call(mark):
        doubled = source * 2
        mark("long")
        doubled[: 1 << 20] *= 2
        mark("short")

    call(lambda part: None)
    takes = clock.takes([call, call], static=True)
    assert clock.eager == ""
    for take in takes:
        take.start()
        take.start()
        parts = take.read()
        assert list(parts) == ["long", "short"]
        assert parts["long"] > 50.0  # 1 GiB is read and written
        assert 0.0 < parts["short"] < parts["long"] / 4

    def waiting(mark):
        source[0].item()
        mark("short")

    (graph, eager) = clock.takes([call, waiting], static=True)
    assert "captur" in clock.eager
    for take in (graph, eager):
        take.start()
        assert min(take.read().values()) > 0.0
