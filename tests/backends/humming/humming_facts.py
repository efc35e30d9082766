"""Compares moetune's rules with the installed package humming-kernels, on a machine without a GPU.

Run as a program in a process of its own, in which it plants the facts of an H200 and a CUDA version of torch. It prints
what it found as JSON.
"""

from __future__ import annotations

import json
import os
from itertools import chain, product
from types import SimpleNamespace

import torch

from moetune.backends.device import Device
from moetune.backends.humming import package
from moetune.backends.humming.config import Config
from moetune.backends.humming.gemm import Gemm
from moetune.backends.humming.layer_fields import layer_fields
from moetune.backends.humming.space import configs
from moetune.backends.marlin.formats import FORMATS
from moetune.spec.enums import Precision

HOPPER = (9, 0)
SIZES = ((4096, 7168, 48), (7168, 2048, 48), (5760, 2880, 16), (2880, 2880, 32), (384, 192, 8))
"""N, K and L: both GEMMs of Kimi-K2 at EP 8, gpt-oss's, which are padded, and small ones."""
ODD = (
    "wgmma-48x256x64-24x32x64-s3-b1-producer-streamk",
    "wgmma-48x256x64-16x32x64-s4-b1",
    "wgmma-64x64x64-64x32x64-s4-b1",
    "wgmma-256x256x64-256x32x64-s4-b1-producer",
    "wgmma-64x128x64-64x32x64-s2-b1",
    "wgmma-64x1024x64-64x32x64-s4-b1-producer",
    "wgmma-192x256x64-192x32x64-s4-b2-producer",
    "wgmma-16x128x64-16x32x32-s4-b2-r4",
    "mma-64x128x64-64x64x32-s4-b1",
    "mma-48x128x64-16x64x32-s4-b1",
    "mma-8x128x256-8x64x32-s4-b1",
)
LEGAL = (
    "mma-8x128x64-8x64x32-s4-b4-streamk",
    "wgmma-16x256x128-16x64x64-s4-b2",
    "wgmma-48x256x64-48x32x64-s4-b1-producer-streamk-r4",
)
ILLEGAL = "wgmma-64x256x128-64x32x128-s4-b1"
"""It passes the checks in Python, and its code fails a static assertion."""
H200 = {
    "name": "NVIDIA H200",
    "sm_count": 132,
    "max_threads_per_sm": 2048,
    "l2_cache_size": 60 * 2**20,
    "max_smem_size": 232_448,
    "memory_bandwidth_gbps": 4800.0,
    "tensorcore_tops": {"float16": 989.0, "bfloat16": 989.0},
}


def main() -> None:
    torch.version.cuda = "13.0"
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"
    with package.without_gpu(HOPPER):
        found = {"version": package.version(), "compiler": package.without_compiler()}
    found |= differences()
    print(json.dumps({**found, **compiled(), **heuristic()}))


def differences() -> dict[str, object]:
    """Returns the configurations of which the package says something else, and how many it was asked for."""
    from humming.kernel.humming import HummingKernel

    class Checked(HummingKernel):
        def prepare(self) -> None:
            pass

        def register_kernel(self) -> None:
            pass

    asked, other = 0, []
    formats = {FORMATS[precision].name: FORMATS[precision] for precision in FORMATS}
    for (N, K, count), fmt, kind, bias in product(
        SIZES, formats.values(), ("indexed", "grouped_contiguous"), (False, True)
    ):
        gemm = Gemm(N, K, count, fmt, bias, kind)
        for config in chain(configs(kind), map(Config.parse, ODD)):
            asked += 1
            fields = layer_fields(gemm, HOPPER) | {"gemm_type": kind} | config.fields(kind)
            reason, size = None, None
            with package.without_gpu(HOPPER):
                try:
                    size = Checked(**fields).estimated_smem_size
                except (AssertionError, ValueError) as error:
                    reason = repr(error)
            if size is not None:
                limits = Device()
                most = min(limits.shared_bytes // size, 2048 // config.threads)
                reason = f"{most} blocks fit" if most < config.blocks_per_sm else None
                if size != gemm.shared_bytes(config):
                    other.append([str(gemm), str(config), size, gemm.shared_bytes(config)])
            mine = gemm.obstacle(config, Device())
            if (reason is None) != (mine is None):
                other.append([str(gemm), str(config), reason, mine])
    return {"asked": asked, "other": other}


def compiled() -> dict[str, object]:
    """Returns which configurations compile, and whether a launch would find what was compiled ahead."""
    from humming.config import LayerConfig

    gemm = Gemm(4096, 7168, 48, FORMATS[Precision.MXINT4], False, "grouped_contiguous")
    fields = layer_fields(gemm, HOPPER)
    sizes, same = {}, []
    for spelled in LEGAL:
        own = {"gemm_type": gemm.type, **Config.parse(spelled).fields(gemm.type)}
        path = package.compile_kernel(fields | own, HOPPER)
        sizes[spelled] = os.path.getsize(path)
        with package.without_gpu(HOPPER):
            of_launch = json.loads(LayerConfig(**fields).to_str())
        same.append(package.compile_kernel(of_launch | own, HOPPER) == path)
    try:
        own = {"gemm_type": gemm.type, **Config.parse(ILLEGAL).fields(gemm.type)}
        refused = package.compile_kernel(fields | own, HOPPER)
    except RuntimeError as error:
        refused = f"refused: {error}"
    return {"sizes": sizes, "same": same, "refused": refused}


def heuristic() -> dict[str, object]:
    """Returns what the heuristic chooses for both types of Kimi-K2's first GEMM, at some numbers of slots."""
    from humming import device
    from humming.config import LayerConfig
    from humming.tune import _get_heuristics_config

    rows = {}
    with package.without_gpu(HOPPER):
        facts = vars(device.current_device._value) | H200
        device.current_device._value = SimpleNamespace(**facts)
        device.DeviceInfo._instances[0] = device.current_device
        for kind in ("indexed", "grouped_contiguous"):
            gemm = Gemm(4096, 7168, 48, FORMATS[Precision.MXINT4], False, kind)
            config = LayerConfig(**layer_fields(gemm, HOPPER))
            rows[kind] = [
                _get_heuristics_config(config, slots, False, False, False, kind, 0, False) for slots in (64, 1000, 4000)
            ]
    return {"heuristic": rows}


if __name__ == "__main__":
    main()
