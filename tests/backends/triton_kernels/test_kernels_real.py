"""The real triton_kernels, from vLLM's wheel, on a CPU: its signatures, its formula, its order of weights, its code.

Triton compiles for a device that need not be present, so each call is made as on a GPU and ends before its launch.
"""

import ast
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from test_kernels_backend import problem_of, tiny

from moetune.backends.grouped_triton.ahead import headless
from moetune.backends.triton_kernels import ahead, package
from moetune.backends.triton_kernels.backend import TritonKernelsBackend
from moetune.backends.triton_kernels.formulas import engine_flags
from moetune.backends.triton_kernels.runner import KernelsRunner
from moetune.backends.triton_kernels.space import BLOCK_N, NUM_WARPS, Flags, tactic_of
from moetune.backends.triton_kernels.weights import Mxfp4Matrices, random_experts
from moetune.spec.regime import Regime

pytestmark = pytest.mark.network
VERSIONS = ["0.26.0", "0.33.0"]
H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232_448)


@pytest.fixture(params=VERSIONS)
def sources(request, vllm_version_sources):
    return vllm_version_sources(request.param)


@pytest.fixture
def real(sources, monkeypatch):
    """The package of a vLLM, imported under its own name for one test, as if there were an H100."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package.NAME]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(package, "folder", lambda: sources / "vllm" / "third_party" / package.NAME)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with headless((9, 0)):
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == package.NAME]:
        del sys.modules[name]


@pytest.fixture
def compiled(real, monkeypatch):
    """The kernels of the calls that follow, by name. They are compiled and not launched."""
    kernels, launch = [], triton.runtime.jit.JITFunction.run

    def run(self, *given, grid, warmup, **named):
        kernels.append((self.__name__, launch(self, *given, grid=grid, warmup=True, **named)))
        return kernels[-1][1]

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return kernels


def layer():
    """K = 320 is no multiple of 128, as in gpt-oss."""
    return tiny(num_experts=8, hidden_size=320, intermediate_size=320)


@pytest.mark.parametrize(
    "tactic",
    [
        tactic_of(Flags(16, 128, 4, 1), Flags(16, 64, 6, 1)),
        tactic_of(Flags(32, 64, 3, 1), Flags(128, 128, 4, 1)),
        tactic_of(Flags(64, 64, 2, 2), Flags(16, 128, 2, 2)),
    ],
)
def test_the_kernels_compile_with_the_flags_of_a_tactic(compiled, tactic):
    problem = problem_of(layer(), Regime(ep_size=2, dispatch="allgather"), 33, 1)
    runner = KernelsRunner(problem, random_experts(problem))
    package.module(package.OPT_FLAGS).update_opt_flags_constraints({"split_k": 1})
    compiled.clear()
    runner.run(tactic)
    assert package.module(package.OPT_FLAGS)._opt_flags_constraints == {"split_k": 1}
    gemms = [kernel.metadata for name, kernel in compiled if name == "_matmul_ogs"]
    assert len(gemms) == 2
    for gemm, flags in zip(gemms, (Flags.parse(str(tactic[name])) for name in ("gemm1", "gemm2")), strict=True):
        assert (gemm.num_warps, gemm.num_stages) == (NUM_WARPS, flags.num_stages)
        assert gemm.name.startswith("_matmul_ogs_")
        assert f"_{flags.block_m}x{BLOCK_N}x{flags.block_k}x{flags.split_k}" in gemm.name
    assert gemms[0].name.endswith("swiglu") == (Flags.parse(str(tactic["gemm1"])).split_k == 1)


@pytest.mark.parametrize("rows", [1, 33, 64])
def test_what_is_compiled_ahead_is_what_a_run_needs(real, rows, monkeypatch, tmp_path):
    """The run that follows compiles no GEMM: it finds the code of both under their keys."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    regime, backend = Regime(ep_size=2, dispatch="allgather"), TritonKernelsBackend()
    flags = (Flags(16, 128, 4, 1), Flags(16, 64, 3, 2))
    problem = problem_of(layer(), regime, rows, 0)
    runner = KernelsRunner(problem, random_experts(problem))
    for part in (0, 1):
        assert ahead.compile_gemm(layer(), regime, rows, flags[part], part, (9, 0))
    assert len(backend.compile_keys(layer(), regime, rows, tactic_of(*flags))) == 2
    before = sorted(tmp_path.rglob("_matmul_ogs.cubin"))
    assert len(before) == 2
    with ahead._compiled_only() as kernels:
        runner.run(tactic_of(*flags))
    assert sum(kernel.metadata.name.startswith("_matmul_ogs") for kernel in kernels) == 2
    assert sorted(tmp_path.rglob("_matmul_ogs.cubin")) == before


def test_flags_that_do_not_compile_are_refused_ahead(real):
    with pytest.raises(Exception, match="at "):
        ahead.compile_gemm(layer(), Regime(), 16, Flags(16, 32, 4, 1), 0, (9, 0))


def test_an_error_before_the_compiler_is_left_to_the_run(real, monkeypatch):
    monkeypatch.setattr(ahead, "first_gemm", lambda *given: 1 / 0)
    assert ahead.compile_gemm(layer(), Regime(), 16, Flags(16, 128, 4, 1), 0, (9, 0)) == []


@pytest.mark.parametrize("constraint", [{"num_warps": 4}, {"block_n": 128}, {"is_persistent": True}])
def test_what_is_no_flag_is_refused(compiled, constraint):
    problem = problem_of(layer(), Regime(), 5, 0)
    runner = KernelsRunner(problem, random_experts(problem))
    refusals = (AssertionError, package.module(package.OPT_FLAGS).InapplicableConstraint)
    with package.constrained(package.module(package.OPT_FLAGS), constraint), pytest.raises(refusals):
        runner.run(tactic_of(Flags(16, 128, 4, 1), Flags(16, 128, 4, 1)))


def test_fewer_warps_cannot_read_the_order_of_the_scales(compiled, monkeypatch):
    """Scales that are stored for 4 warps run with 4 warps and 128 columns. So vLLM's choice of 8 decides both."""
    monkeypatch.setattr("moetune.backends.triton_kernels.weights.NUM_WARPS", 4)
    problem = problem_of(layer(), Regime(), 5, 0)
    runner = KernelsRunner(problem, random_experts(problem))
    compiled.clear()
    runner.run(tactic_of(Flags(16, 128, 4, 1), Flags(16, 128, 4, 1)))
    gemms = [kernel.metadata for name, kernel in compiled if name == "_matmul_ogs"]
    assert {gemm.num_warps for gemm in gemms} == {4}
    assert all("_16x128x128x1" in gemm.name for gemm in gemms)


@pytest.mark.parametrize("rows", [1, 3, 16, 57, 128, 257, 1000, 4096])
def test_the_formula_is_that_of_triton_kernels(real, rows):
    module, problem = package.module(package.OPT_FLAGS), problem_of(layer(), Regime(ep_size=2), 1, 0)
    (_, precision), tensor = random_experts(problem).swizzled1, package.module("tensor")
    routing = package.module("routing").RoutingData
    module.update_opt_flags_constraints({"split_k": 1})
    for num_local in (2, 16, 32, 128):
        slots = 4 * rows
        chosen = module.make_opt_flags(
            torch.bfloat16, torch.bfloat16, tensor.FP4, precision, slots, 5760, 2880,
            routing(None, None, num_local, 4), False, False, None,
        )  # fmt: skip
        assert Flags(chosen.block_m, chosen.block_k, chosen.num_stages, chosen.split_k) == engine_flags(
            slots, num_local
        )
        assert (chosen.num_warps, chosen.block_n, chosen.is_persistent) == (NUM_WARPS, BLOCK_N, False)


def test_weights_are_stored_as_triton_kernels_reads_them(real):
    """Its own `upcast_from_mxfp_torch` gives the weights of the plain order, and its layouts can be undone."""
    matrices = Mxfp4Matrices.empty(2, 256, 320, torch.device("cpu"))
    for expert in (0, 1):
        matrices.store(expert, torch.randn(256, 320, generator=torch.Generator().manual_seed(expert)))
    upcast = package.module("numerics_details.mxfp").upcast_from_mxfp_torch
    expected = upcast(matrices.codes, matrices.scales, torch.float32, axis=-1)
    assert torch.equal(torch.stack([matrices.fp32(expert) for expert in (0, 1)]), expected)
    values, precision = matrices.swizzled()
    assert values.shape == [2, 320, 256]
    assert torch.equal(values.storage.layout.unswizzle_data(values.storage.data), matrices.codes.mT)
    scales = precision.weight_scale.storage
    own = scales.layout.unswizzle_data(scales.data)
    assert torch.equal(own[:, :10, :256], matrices.scales.mT)
    assert own.shape[1] == 12, "to whole blocks of 128 along K"


def test_vllm_prepares_weights_and_calls_as_moetune_does(sources):
    """The lines that decide what `weights`, `routing` and `runner` do."""
    utilities = (sources / "vllm/model_executor/layers/quantization/utils/mxfp4_utils.py").read_text()
    assert "def _swizzle_mxfp4(quant_tensor, scale, num_warps=8)" in utilities
    assert "pad_k = -K % 4" in utilities
    assert ast.unparse(ast.parse('{"split_k": 1}')) in ast.unparse(ast.parse(utilities))
    experts = sources / "vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py"
    functions = {
        node.name: ast.unparse(node)
        for node in ast.walk(ast.parse(experts.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    fused = functions["triton_kernel_fused_experts"]
    assert fused.count("matmul_ogs(") == 2
    assert "swiglu_alpha: float=1.702, swiglu_limit: float=7.0" in fused
    routed = functions["make_routing_data"]
    for line in (
        "topk_ids.to(torch.int16)",
        "topk_weights.to(torch.bfloat16)",
        "torch.where(topk_ids == -1, -1.0, topk_weights)",
        "routing_from_bitmatrix(bitmatrix, topk_weights, topk_ids, num_local_experts, num_topk)",
    ):
        assert line in routed
