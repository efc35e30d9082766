"""Engine sources for tests: an installed engine, or a pinned wheel from the index that pip is configured with."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "MOETUNE_ENGINE_SOURCES"
"""Environment variable: a folder that contains the package of an engine."""
TIMEOUT_S = 300


@dataclass(frozen=True)
class Wheel:
    """One wheel by its version and hash, and the members and folders that tests read; and its name on the index."""

    version: str
    sha256: str
    members: tuple[str, ...]
    folders: tuple[str, ...]
    name: str = ""


_MARLIN = (
    "vllm/scalar_type.py",
    "vllm/model_executor/layers/fused_moe/experts/marlin_moe.py",
    *(f"vllm/model_executor/layers/quantization/utils/marlin_utils{suffix}.py" for suffix in ("", "_fp4", "_test")),
)
"""Where vLLM chooses Marlin's block size and prepares its weights."""
_GPT_OSS = (
    "vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py",
    "vllm/model_executor/layers/quantization/utils/mxfp4_utils.py",
)
"""Where vLLM calls triton_kernels and prepares its weights."""
_VLLM_FOLDERS = ("vllm/model_executor/layers/fused_moe/configs/", "vllm/third_party/triton_kernels/")
_RIVALS = (
    "vllm/envs.py",
    *(f"vllm/model_executor/layers/fused_moe/{name}.py" for name in ("config", "utils", "modular_kernel")),
    *(
        f"vllm/model_executor/layers/fused_moe/experts/{name}.py"
        for name in ("cutlass_moe", "deep_gemm_moe", "batched_deep_gemm_moe", "triton_deep_gemm_moe")
    ),
    "vllm/model_executor/layers/quantization/utils/fp8_utils.py",
)
"""The experts classes that moetune times, and what makes them."""
WHEELS = {
    "vllm": Wheel(
        "0.33.0",
        "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa",
        (
            "vllm/plugins/__init__.py",
            "vllm/v1/worker/gpu_worker.py",
            "vllm/model_executor/layers/fused_moe/fused_moe.py",
            "vllm/model_executor/layers/fused_moe/experts/triton_moe.py",
            "vllm/model_executor/layers/fused_moe/experts/fused_batched_moe.py",
            "vllm/model_executor/layers/fused_moe/experts/fused_humming_moe.py",
            *_MARLIN,
            *_GPT_OSS,
            *_RIVALS,
            "vllm/distributed/eplb/policy/default.py",
            "vllm/model_executor/layers/fused_moe/router/base_router.py",
            "vllm/utils/serial_utils.py",
        ),
        _VLLM_FOLDERS,
    ),
    "sglang": Wheel(
        "0.5.23",
        "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937",
        (
            "sglang/srt/plugins/__init__.py",
            "sglang/srt/managers/scheduler.py",
            "sglang/srt/eplb/eplb_algorithms/deepseek.py",
            "sglang/srt/eplb/expert_distribution.py",
            "sglang/srt/layers/moe/topk.py",
            "sglang/srt/layers/moe/fused_moe_triton/fused_marlin_moe.py",
            "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
            "sglang/kernels/ops/moe/moe_align_small_numel.py",
            "sglang/srt/layers/moe/moe_runner/base.py",
            "sglang/srt/layers/moe/moe_runner/triton_utils/__init__.py",
            "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe.py",
            "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py",
            "sglang/srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py",
        ),
        ("sglang/srt/layers/moe/moe_runner/triton_utils/configs/",),
    ),
}
"""The engine versions that moetune was checked against. The hashes are of the Linux x86-64 wheels for Python 3.11."""
OLDER_VLLM = {
    version: Wheel(
        version,
        sha256,
        (
            "vllm/v1/worker/gpu_worker.py",
            *(f"vllm/model_executor/layers/fused_moe/{name}.py" for name in ("fused_moe", *others)),
            *((*_MARLIN, *_GPT_OSS, *_RIVALS) if version == "0.26.0" else ()),
        ),
        _VLLM_FOLDERS,
    )
    for version, sha256, *others in (
        ("0.20.2", "22a7dd06eb03371298e13d6100f3dedbf307352342aaf08e87c929c60aae9b4d"),
        (
            "0.26.0",
            "adb1e4c9b46d0dfdb094121ae5aad670a42412dd813ed4e5db069ed6a15006de",
            "experts/triton_moe",
            "experts/fused_batched_moe",
            "router/base_router",
        ),
    )
}
"""Versions of vLLM whose kernel or its default is not the newest's."""
FLASHINFER = {
    version: Wheel(
        version,
        sha256,
        (f"flashinfer/{tuner}.py", "flashinfer/fused_moe/core.py"),
        ("flashinfer/autotuner/",),
        "flashinfer-python",
    )
    for version, sha256, tuner in (
        ("0.6.8.post1", "818f9b8cc2fe66c42a1f6264be4841ac8821ada703685a02cfccb2b5124a710b", "autotuner"),
        ("0.6.14", "d124369346a3d48eac67e31c42f7a3c813bcc0abc10e2e36db413b7b3dfd97df", "autotuner"),
        ("0.6.16.post3", "caf686b9b079abe1c9d65ab505698bd325e8072de40afd822f2c74f2ac3bc601", "autotuner/autotuner"),
        ("0.6.17", "ab7ce3aec42faf2f6079aa840c2407ac00ecd277a0524cdb708a8ff4a64dad90", "autotuner/autotuner"),
        ("0.6.18", "d5d26edb48f8def0bf28b2c94415aef7f0754e2cd9e3cb3d6e7081262d068aad", "autotuner/autotuner"),
        ("0.6.18.post1", "adb6d2952b47131138e108bd2999b1fe18b71f1a4c0b2684f168753db9563991", "autotuner/autotuner"),
        ("0.7.0", "11e564820cde80ec13d351b68fc44cb54a537268bca135204abafc5fadd50240", "autotuner/autotuner"),
        ("0.7.0.post1", "c7adf826568d61fc1b7d3aadd4cae387a35a138bfc08e2deca2f34ecfa280716", "autotuner/autotuner"),
    )
}
"""Versions of FlashInfer that vLLM 0.20 … 0.32 pin, and the releases of their post-releases."""


def local_sources(engine: str) -> Path | None:
    """Returns a folder that contains the engine's package: that of `MOETUNE_ENGINE_SOURCES`, else the installed one."""
    given, spec = os.environ.get(VARIABLE), find_spec(engine)
    if given and (Path(given) / engine).is_dir():
        return Path(given)
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]).parent
    return None


def download(engine: str, folder: Path, wheel: Wheel | None = None) -> Path:
    """Downloads a wheel of the engine (by default that of `WHEELS`) with pip and unpacks what tests read into `folder`.

    Raises:
        RuntimeError: pip finds no such wheel, or its hash is another one.
    """
    wheel = wheel or WHEELS[engine]
    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.name or engine}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    target = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11"]
    target += ["--abi", "cp311", "--abi", "abi3"]
    for glibc in ("2_28", "2_34", "2_35"):
        target += ["--platform", f"manylinux_{glibc}_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += [*target, "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"pip cannot download {engine} {wheel.version}: {done.stderr.strip()}")
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        in_folder = [member for member in archive.namelist() if member.startswith(wheel.folders)]
        for member in (*wheel.members, *in_folder):
            archive.extract(member, folder)
    path.unlink()
    (folder / engine / "__init__.py").touch()
    return folder
