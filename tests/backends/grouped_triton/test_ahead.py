"""Compiling for Hopper on a machine that need not have a GPU."""

from dataclasses import replace

import pytest
import torch
import triton
from triton_numerics import compile_tactic

from moetune.backends.grouped_triton import ahead
from moetune.backends.grouped_triton.align import Alignment
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.gemm import BuiltinKernel, Operands, two_gemms
from moetune.backends.grouped_triton.space import VALUES, Shapes, shared_bytes
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

BF16 = Shapes(256, 8, 512, 256, 4, 32, fp8=False)
FP8 = replace(BF16, fp8=True)
HOPPER = (9, 0)


def tactic(*values):
    return Tactic(dict(zip(VALUES, values, strict=True)))


SMALL, SWAPPED, LARGE = tactic(16, 32, 64, 1, 4, 3), tactic(16, 128, 128, 1, 4, 3), tactic(128, 128, 64, 16, 8, 3)


@pytest.mark.parametrize(("shapes", "chosen"), [(BF16, SMALL), (BF16, LARGE), (FP8, SWAPPED), (FP8, LARGE)])
def test_a_compiled_tactic_takes_the_shared_memory_that_the_space_expects(shapes, chosen):
    usage = compile_tactic(shapes, chosen, capability=HOPPER)
    assert set(usage) == {"registers", "spill_bytes", "shared_bytes"}
    expected = shared_bytes(chosen, shapes.fp8, HOPPER)
    assert expected <= usage["shared_bytes"] <= expected + (4 * chosen["BLOCK_SIZE_N"] if shapes.fp8 else 0)
    assert 16 < usage["registers"] <= 255
    assert usage["spill_bytes"] == 0


def test_accumulators_past_the_registers_spill():
    assert compile_tactic(FP8, tactic(128, 128, 64, 1, 4, 2), capability=HOPPER)["spill_bytes"] > 0


def test_swapped_operands_use_hoppers_wgmma():
    compiled = {}
    for chosen in (SWAPPED, SMALL):
        with ahead.headless(HOPPER):
            gemm = two_gemms(FP8, False, HOPPER)[0]
            compiled[chosen] = ahead._compile(BuiltinKernel(), gemm, FP8, chosen, False).asm["ptx"]
    assert "wgmma.mma_async" in compiled[SWAPPED]
    assert "wgmma.mma_async" not in compiled[SMALL]


@pytest.mark.parametrize("shapes", [BF16, FP8])
@pytest.mark.parametrize("rows", [1, 13])
def test_the_key_in_tritons_cache_is_that_of_a_launch_on_real_tensors(shapes, rows):
    shapes, builtin = replace(shapes, rows=rows), BuiltinKernel()
    for gemm in two_gemms(shapes, False, HOPPER):
        num_rows = shapes.num_slots // gemm.slots_per_row
        value = torch.float8_e4m3fn if gemm.fp8 else torch.bfloat16
        a_scales = torch.empty(num_rows, gemm.K // 128) if gemm.fp8 else None
        w_scales = torch.empty(gemm.num_local, gemm.N // 128, gemm.K // 128) if gemm.fp8 else None
        operands = Operands(
            torch.empty(num_rows, gemm.K, dtype=value),
            torch.empty(gemm.num_local, gemm.N, gemm.K, dtype=value),
            torch.empty(shapes.num_slots, gemm.N, dtype=torch.bfloat16),
            torch.empty(shapes.num_slots),
            a_scales,
            w_scales,
        )
        slots, experts, padded = (torch.empty(64, dtype=torch.int32) for _ in range(3))
        alignment = Alignment(slots, experts, padded, 999, shapes.num_slots)
        with ahead.headless(HOPPER):
            arguments = builtin.arguments(gemm, operands, alignment, SMALL)
            launched = builtin.function.warmup(grid=(1,), **arguments)
            compiled = ahead._compile(builtin, gemm, shapes, SMALL, False)
        assert compiled.hash == launched.hash


def test_the_driver_that_was_active_is_active_again():
    before = triton.runtime.driver._active
    compile_tactic(BF16, SMALL, capability=HOPPER)
    assert triton.runtime.driver._active is before


@pytest.mark.parametrize(
    ("model", "chosen"), [("qwen3-235b-a22b", SMALL), ("deepseek-r1", tactic(64, 128, 128, 1, 4, 3))]
)
@pytest.mark.parametrize(("ep_size", "rows"), [(8, 64), (1, 1)])
def test_the_kernel_of_an_engines_own_file_compiles(engine, model, chosen, ep_size, rows):
    backend, layer, regime = TritonBackend(engine), preset(model), Regime(ep_size=ep_size)
    for each in (chosen, backend.default(layer, regime, rows)):
        shapes = Shapes.of(layer, regime, rows, kernel=engine)
        usage = compile_tactic(shapes, each, capability=HOPPER, kernel=engine, zero_remote=engine == "sglang")
        assert usage["shared_bytes"] >= shared_bytes(each, shapes.fp8, HOPPER)
        assert usage["spill_bytes"] == 0
