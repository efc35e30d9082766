"""The batched backend without a launch: its space, its default, what it refuses, and its compiled kernels."""

import ast
import pickle
from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import MockTensor
from triton_numerics import _resource_usage as resource_usage

from moetune.backends.batched_triton import ahead, gemm, kernel, space
from moetune.backends.batched_triton.backend import BatchedTritonBackend
from moetune.backends.grouped_triton import shipped
from moetune.backends.grouped_triton.ahead import headless
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.space import Limits
from moetune.backends.registry import able, backend, backends, backends_computing, of_environment
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LAYER = preset("qwen3-235b-a22b")
FP8 = preset("deepseek-r1")
REGIME = Regime(ep_size=8, layout="batched")
HOPPER = Limits((9, 0), 232_448, 255, 65_536)
SMALL = space.Shapes(64, 512, 256, 4, fp8=False)


def tactic(*values):
    return Tactic(dict(zip(space.VALUES, values, strict=True)))


@pytest.mark.parametrize(("layer", "legal"), [(LAYER, 68), (FP8, 42)])
def test_most_of_80_configurations_can_run_on_hopper(layer, legal):
    shapes = space.Shapes.of(layer, REGIME)
    found = space.candidates(shapes, HOPPER, space.heuristic(shapes))
    assert len(found.tactics) + len(found.excluded) == 80
    assert len(found.tactics) == legal
    assert found.tactics[0] == space.heuristic(shapes)
    assert not set(found.tactics) & set(found.excluded)
    assert all(found.excluded.values())


@pytest.mark.parametrize(
    ("values", "fp8", "reason"),
    [
        ((128, 256, 64), False, "256 registers a thread"),
        ((256, 256, 256), False, "needs 262144 bytes of shared memory"),
        ((64, 128, 256), True, "exceeds the scale block of 128"),
        ((128, 128, 128), True, "256 registers a thread"),
    ],
)
def test_what_a_device_cannot_run_is_excluded_with_the_reason(values, fp8, reason):
    shapes = replace(SMALL, fp8=fp8)
    assert reason in (space.illegal(tactic(*values), shapes, HOPPER) or "")
    assert space.illegal(tactic(64, 128, 64), shapes, HOPPER) is None


def test_a_grid_that_no_launch_may_have_is_excluded():
    large = space.Shapes.of(FP8, Regime(ep_size=32, layout="batched"))
    assert space.illegal(tactic(16, 32, 64), large, None) == "has 114688 tiles an expert, a launch may have 65535"
    assert space.illegal(tactic(32, 32, 64), large, None) is None


def test_without_a_device_only_wrong_tiles_are_excluded():
    shapes = space.Shapes.of(FP8, REGIME)
    found = space.candidates(shapes, None, space.heuristic(shapes))
    assert {each["BLOCK_SIZE_K"] for each in found.excluded} == {256}
    assert len(found.excluded) == 20


def test_the_default_is_vllms_heuristic_at_the_capacity_for_every_row_count():
    chosen = BatchedTritonBackend()
    assert {chosen.default(LAYER, REGIME, rows) for rows in (1, 32, 512, 2048)} == {tactic(128, 128, 64)}
    small = Regime(ep_size=8, layout="batched", ladder=[64])
    assert chosen.default(LAYER, small, 8) == tactic(32, 64, 128)
    assert chosen.default(FP8, REGIME, 8) == tactic(64, 128, 128)
    assert chosen.explained_default(LAYER, REGIME, 8).source == "heuristic"


def test_the_default_on_a_gpu_is_the_row_of_the_grouped_kernels_file_that_is_nearest_the_capacity(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shipped, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: HOPPER))
    name = ConfigFile.of(LAYER, REGIME, "NVIDIA H200", 16).vllm_name
    rows = ", ".join(
        f'"{key}": {{"BLOCK_SIZE_M": {m}, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 16, "num_warps": 8}}'
        for key, m in ((1, 16), (2048, 64), (4096, 3))
    )
    (tmp_path / name).write_text(f"{{{rows}}}")
    chosen = BatchedTritonBackend(engine_configs=tmp_path)
    found = chosen.explained_default(LAYER, REGIME, 32)
    assert found.tactic == tactic(64, 64, 128)
    assert name in found.source
    wide = Regime(ep_size=16, layout="batched", ladder=[4096], redundant_experts=128)
    broken = chosen.explained_default(LAYER, wide, 32)
    assert (broken.tactic, broken.warning) == (tactic(128, 128, 64), broken.warning)
    assert "BLOCK_SIZE_M is 3" in broken.warning
    assert "no E=8" in chosen.explained_default(LAYER, Regime(ep_size=16, layout="batched"), 32).source


@pytest.mark.parametrize(
    ("layer", "regime", "reason"),
    [
        (LAYER, Regime(ep_size=8), "layout batched, not those of none"),
        (LAYER, Regime(ep_size=8, layout="deduplicated"), "layout batched, not those of deduplicated"),
        (LAYER.model_copy(update={"precision": Precision.NVFP4}), REGIME, "bf16 and fp8_block"),
        (LAYER.model_copy(update={"expert_bias": True}), REGIME, "no bias"),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused(layer, regime, reason):
    assert reason in (BatchedTritonBackend().unsupported(layer, regime) or "")


@pytest.mark.parametrize("name", [name for name in backends() if not name.startswith("batched-")])
def test_no_other_backend_than_the_batched_ones_computes_expert_major_rows(name):
    assert "expert-major rows" in (backend(name).unsupported(LAYER, REGIME) or "")


def test_the_layout_decides_between_the_two_triton_kernels():
    assert backends_computing(LAYER, REGIME) == ["batched-triton"]
    assert "batched-triton" not in backends_computing(LAYER, Regime(ep_size=8))
    assert "layout batched" in able(LAYER, Regime(ep_size=8))[1]["batched-triton"]


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no kernel 'sglang'"):
        BatchedTritonBackend("sglang")
    with pytest.raises(UsageError, match="must be a folder"):
        BatchedTritonBackend(engine_configs=tmp_path / "none")


def test_the_backend_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(gemm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="not installed"):
        gemm.batched_kernel("vllm")


def test_an_environment_gives_the_backend_back():
    environment = BatchedTritonBackend().environment()
    assert environment.keys() == {"triton", "kernel", "kernel_source"}
    assert environment["kernel_source"] != TritonBackend().environment()["kernel_source"]
    assert of_environment("batched-triton", environment).environment() == environment
    assert pickle.loads(pickle.dumps(BatchedTritonBackend())).environment() == environment


def test_row_counts_share_the_compiled_kernels_and_precisions_do_not():
    chosen = BatchedTritonBackend()
    keys = {tuple(chosen.compile_keys(LAYER, REGIME, rows, tactic(16, 64, 64))) for rows in (32, 512, 2048)}
    assert len(keys) == 1
    fp8 = LAYER.model_copy(update={"precision": Precision.FP8_BLOCK})
    assert chosen.compile_keys(fp8, REGIME, 32, tactic(16, 64, 64)) not in [list(each) for each in keys]


@pytest.mark.parametrize(
    ("fp8", "values"), [(False, (16, 32, 64)), (False, (64, 64, 64)), (True, (16, 64, 128)), (True, (64, 64, 64))]
)
def test_a_compiled_tactic_takes_the_shared_memory_that_the_space_expects(fp8, values):
    shapes = replace(SMALL, fp8=fp8)
    for part in (0, 1):
        compiled = ahead.compile_gemm(shapes, tactic(*values), part, (9, 0), "builtin")
        expected = space.shared_bytes(tactic(*values), fp8)
        assert expected / 2 <= compiled.metadata.shared <= expected
        assert "cp.async" not in compiled.asm["ptx"], "no pipeline, as in vLLM's kernel"
        assert (compiled.metadata.num_warps, compiled.metadata.num_stages) == (4, 3)


def operands_of(one, fp8):
    value = torch.float8_e4m3fn if fp8 else torch.bfloat16
    return gemm.Operands(
        torch.empty(one.num_local, one.capacity, one.K, dtype=value),
        torch.empty(one.num_local, one.N, one.K, dtype=value),
        torch.empty(one.num_local, one.capacity, one.N, dtype=torch.bfloat16),
        torch.empty(one.num_local, dtype=torch.int32),
        torch.empty(one.num_local, one.capacity, one.K // 128) if fp8 else None,
        torch.empty(one.num_local, one.N // 128, one.K // 128) if fp8 else None,
    )


def assert_compiled_ahead(name, fp8):
    shapes, chosen = replace(SMALL, fp8=fp8), tactic(16, 32, 64)
    batched = gemm.batched_kernel(name)
    for part, one in enumerate(gemm.two_gemms(shapes)):
        with headless((9, 0)):
            arguments = batched.arguments(one, operands_of(one, fp8), chosen)
            launched = batched.function.warmup(grid=(1,), **arguments)
        assert ahead.compile_gemm(shapes, chosen, part, (9, 0), name).hash == launched.hash


@pytest.mark.parametrize("fp8", [False, True])
def test_the_key_in_tritons_cache_is_that_of_a_launch_on_real_tensors(fp8):
    assert_compiled_ahead("builtin", fp8)


@pytest.mark.network
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_vllms_own_kernel_compiles_ahead_too(version, fp8, vllm_version_sources, monkeypatch):
    monkeypatch.syspath_prepend(str(vllm_version_sources(version)))
    assert_compiled_ahead("vllm", fp8)


@pytest.mark.network
@pytest.mark.parametrize("values", [(16, 64, 128), (64, 64, 64), (128, 128, 64), (32, 64, 32)])
@pytest.mark.parametrize(("model", "ep_size"), [("qwen3-235b-a22b", 8), ("deepseek-r1", 16)])
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_the_builtin_kernel_takes_what_vllms_takes(version, model, ep_size, values, vllm_version_sources, monkeypatch):
    monkeypatch.syspath_prepend(str(vllm_version_sources(version)))
    shapes = space.Shapes.of(preset(model), Regime(ep_size=ep_size, layout="batched"))
    used = []
    for name in ("builtin", "vllm"):
        compiled = ahead.compile_gemm(shapes, tactic(*values), 0, (9, 0), name)
        used.append(resource_usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared})
        assert "cp.async" not in compiled.asm["ptx"], "no pipeline"
    assert used[0]["shared"] == used[1]["shared"]
    assert used[0]["registers"] == pytest.approx(used[1]["registers"], abs=10)
    assert used[0]["spill_bytes"] == pytest.approx(used[1]["spill_bytes"], rel=0.1, abs=64)


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_vllm_takes_the_block_sizes_alone_and_looks_them_up_by_the_capacity(version, vllm_version_sources):
    folder = vllm_version_sources(version) / "vllm" / "model_executor" / "layers" / "fused_moe"
    text = (folder / "experts" / "fused_batched_moe.py").read_text()
    tree = ast.parse(text)
    launcher = next(node for node in tree.body if getattr(node, "name", "") == "invoke_moe_batched_triton_kernel")
    read = [
        ast.literal_eval(node.slice)
        for node in ast.walk(launcher)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "config"
    ]
    assert read == list(space.VALUES)
    assert "num_warps" not in text
    assert "num_stages" not in text
    experts = next(node for node in tree.body if getattr(node, "name", "") == "BatchedTritonExperts")
    looked_up = next(
        node
        for node in ast.walk(experts)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "try_get_optimal_moe_config"
    )
    assert ast.unparse(looked_up.args[4]) == "max_num_tokens"


@pytest.mark.parametrize("gelu", [False, True])
def test_the_activation_compiles_for_hopper(gelu):
    bf16, counts = MockTensor(torch.bfloat16), MockTensor(torch.int32)
    with headless((9, 0)):
        compiled = kernel._activate_filled.warmup(bf16, bf16, counts, 2048, 1536, COLUMNS=1024, GELU=gelu, grid=(1,))
    assert "bra" in compiled.asm["ptx"], "a loop over the rows"
    assert compiled.metadata.shared == 0
