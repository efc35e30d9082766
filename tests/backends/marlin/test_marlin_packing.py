"""What Marlin reads: codes, scales and biases in its order, against what vLLM's own functions make of the same."""

import ast
import hashlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch

from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.matrices import MarlinMatrices, _loaded, _stored, group_scales
from moetune.backends.marlin.packing import pack_codes, permute_bias, permute_scales, unpack_codes, unpermute_scales
from moetune.spec.enums import Precision

UTILS = "vllm/model_executor/layers/quantization/utils"
VERSIONS = ("0.26.0", "0.33.0")


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def some_codes(K: int = 128, N: int = 192) -> torch.Tensor:
    return (torch.arange(K * N).reshape(K, N) * 7 // 3 % 16).to(torch.uint8)


def some_weights(N: int = 192, K: int = 256) -> torch.Tensor:
    weights = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.1
    weights[:, :128] *= 5  # so that groups have different scales
    weights[7] = 0
    return weights


def stored(precision: Precision, weights: torch.Tensor) -> MarlinMatrices:
    N, K = weights.shape
    matrices = MarlinMatrices.empty(FORMATS[precision], 1, N, K, torch.device("cpu"))
    matrices.store(0, weights)
    return matrices


def test_packed_codes_are_those_of_vllm():
    """The digest is of what `marlin_weights` of vLLM 0.26.0 returns for these codes."""
    packed = pack_codes(some_codes())
    assert (packed.shape, packed.dtype) == ((8, 384), torch.int32)
    assert digest(packed) == "539e714c206bdfab"


def test_permuted_scales_and_biases_are_those_of_vllm():
    """The digests are of what vLLM 0.26.0 makes of these numbers."""
    scales = (torch.arange(4 * 192).reshape(4, 192) / 16 + 1).bfloat16()
    assert digest(permute_scales(scales)) == "cc0600ac65cd60e6"
    assert digest(permute_scales(scales[:1])) == "c312bb6a1eb59dd6"
    powers = (torch.arange(4 * 192).reshape(4, 192) % 40 - 20).float().exp2()
    assert digest(_stored(FORMATS[Precision.MXFP4], powers)) == "36183bbec329d4f8"
    e4m3 = (torch.arange(8 * 192).reshape(8, 192) % 100 * 4 + 48.0).to(torch.float8_e4m3fn).float()
    assert digest(_stored(FORMATS[Precision.NVFP4], e4m3)) == "4447d7a006e40b43"
    assert digest(permute_bias(torch.arange(192.0).bfloat16())) == "ee2c82b1fcdfc603"


@pytest.mark.parametrize("shape", [(16, 64), (128, 192), (256, 64)])
def test_unpacking_undoes_packing(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)
    scales = torch.randn(shape[0] // 16, shape[1])
    for interleaved in (False, True):
        assert torch.equal(
            unpermute_scales(permute_scales(scales, interleaved=interleaved), interleaved=interleaved), scales
        )


@pytest.mark.parametrize("precision", FORMATS)
def test_stored_weights_are_near_and_what_is_on_the_grid_is_kept(precision):
    weights = some_weights()
    once = stored(precision, weights).fp32(0)
    assert float((once - weights).norm() / weights.norm()) < 0.13
    assert not once[7].any()
    again = stored(precision, once)
    assert torch.equal(again.fp32(0), once)


@pytest.mark.parametrize("precision", FORMATS)
def test_scales_are_kept_exactly(precision):
    fmt, weights = FORMATS[precision], some_weights()
    scales, _ = group_scales(fmt, weights.view(192, -1, fmt.group))
    assert torch.equal(_loaded(fmt, _stored(fmt, scales.T)), scales.T) or fmt.scale == "e8m0"
    positive = scales.T > 2.0**-126  # of an all-zero group mxfp4 keeps the least power of two
    assert torch.equal(_loaded(fmt, _stored(fmt, scales.T))[positive], scales.T[positive])


@pytest.mark.parametrize("precision", FORMATS)
def test_a_wrong_order_of_scales_would_be_seen(precision):
    weights = some_weights()
    matrices = stored(precision, weights)
    rolled = MarlinMatrices(matrices.format, matrices.codes, matrices.scales.roll(1, 2), matrices.expert_scales)
    assert float((rolled.fp32(0) - weights).norm() / weights.norm()) > 0.15


@pytest.mark.network
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", FORMATS)
def test_everything_is_what_vllm_makes_of_the_same_weights(vllm_version_sources, version, precision):
    vllm = functions(vllm_version_sources(version) / UTILS)
    fmt, weights = FORMATS[precision], some_weights()
    matrices = stored(precision, weights)
    codes = unpack_codes(matrices.codes[0])
    assert torch.equal(vllm.marlin_weights(codes.int(), 256, 192, 4, vllm.get_weight_perm(4)), matrices.codes[0])
    scales, expert_scale = group_scales(fmt, weights.view(192, -1, fmt.group))
    permuted = vllm.marlin_permute_scales(scales.T.bfloat16(), 256, 192, fmt.group)
    if fmt.scale == "e8m0":
        permuted = vllm.mxfp4_marlin_process_scales(permuted)
    if fmt.scale == "e4m3":
        permuted, factor = vllm.nvfp4_marlin_process_scales(permuted, None, torch.bfloat16)
        of_tensor = vllm.nvfp4_marlin_process_global_scale(expert_scale, torch.bfloat16) / factor
        assert torch.equal(of_tensor, matrices.expert_scales[0])
    assert torch.equal(permuted.view(torch.uint8), matrices.scales[0].view(torch.uint8))
    bias = torch.randn(192)
    assert torch.equal(vllm.marlin_permute_bias(bias), permute_bias(bias))


@pytest.mark.network
@pytest.mark.parametrize("version", VERSIONS)
def test_the_types_have_vllms_numbers(vllm_version_sources, version):
    path = vllm_version_sources(version) / "vllm/scalar_type.py"
    spec = importlib.util.spec_from_file_location("vllm_scalar_type", path)
    types_of_vllm = sys.modules["vllm_scalar_type"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(types_of_vllm)
    numbers = types_of_vllm.scalar_types
    assert FORMATS[Precision.MXINT4].scalar_type == FORMATS[Precision.INT4_G128].scalar_type == numbers.uint4b8.id
    assert FORMATS[Precision.MXFP4].scalar_type == FORMATS[Precision.NVFP4].scalar_type == numbers.float4_e2m1f.id
    del sys.modules["vllm_scalar_type"]


def functions(folder: Path) -> types.SimpleNamespace:
    """Returns vLLM's functions that prepare weights, executed from their files without importing vLLM."""
    namespace: dict[str, object] = {
        "torch": torch,
        "np": numpy,
        "numpy": numpy,
        "GPTQ_MARLIN_TILE": 16,
        "get_pack_factor": lambda bits: 32 // bits,
        "logger": types.SimpleNamespace(warning_once=lambda *_: None),
    }
    for name in ("marlin_utils", "marlin_utils_fp4", "marlin_utils_test"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _prepares(node.name)]
        tree.body = [*found]
        for function in found:
            function.returns = None
            for argument in (*function.args.args, *function.args.kwonlyargs):
                argument.annotation = None
        exec(compile(tree, name, "exec"), namespace)
    return types.SimpleNamespace(**namespace)


def _prepares(name: str) -> bool:
    return name in {
        *("marlin_weights", "marlin_permute_weights", "get_weight_perm", "get_scale_perms", "marlin_permute_scales"),
        *("marlin_permute_bias", "mxfp4_marlin_process_scales", "nvfp4_marlin_process_scales"),
        *("nvfp4_marlin_process_global_scale", "_nvfp4_compute_scale_factor"),
    }
