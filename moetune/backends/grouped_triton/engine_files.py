"""Names the configuration files that vLLM and SGLang read for their grouped Triton GEMM.

Both engines name a file by E (experts on one rank), N (intermediate size on one rank), the device, the dtype and the
scale block. The name contains neither top-k, H, ep nor the dispatch. Source: `get_config_file_name` in vLLM's
`fused_moe.py` and SGLang's `fused_moe_triton_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from moetune.backends.grouped_triton.kernel_versions import numbers
from moetune.backends.grouped_triton.space import SCALE_BLOCK
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

DTYPES: Final[Mapping[Precision, str | None]] = {
    Precision.BF16: None,
    Precision.FP16: None,
    Precision.FP32: "float32",
    Precision.FP8_BLOCK: "fp8_w8a8",
    Precision.FP8_TENSOR: "fp8_w8a8",
}
"""The result of `get_config_dtype_str` in both engines, for the precisions that run this kernel."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What the engines name a file by.

    Attributes:
        num_experts: E, the experts of one rank.
        intermediate_size: N, I/tp.
        device: the device's name, as torch reports it.
        dtype: one of `DTYPES`.
        block_shape: the scale block; None if there is none.
    """

    num_experts: int
    intermediate_size: int
    device: str
    dtype: str | None
    block_shape: tuple[int, int] | None

    @classmethod
    def of(cls, layer: MoELayer, regime: Regime, device: str, num_experts: int) -> Self:
        """Returns what names the file of a layer for ranks with `num_experts` experts; its precision has a dtype."""
        block = (SCALE_BLOCK, SCALE_BLOCK) if layer.precision is Precision.FP8_BLOCK else None
        return cls(num_experts, regime.intermediate_size(layer), device, DTYPES[layer.precision], block)

    @property
    def vllm_name(self) -> str:
        """The name that vLLM looks for."""
        block = f",block_shape=[{','.join(map(str, self.block_shape))}]" if self.block_shape else ""
        return f"{self._stem(vllm_device_name(self.device))}{block}.json"

    def sglang_name(self, *, down: bool = False) -> str:
        """Returns the name that SGLang looks for; `down` for the file of the second GEMM alone."""
        block = f",block_shape={list(self.block_shape)}" if self.block_shape else ""
        return f"{self._stem(self.device.replace(' ', '_'))}{block}{'_down' if down else ''}.json"

    def _stem(self, device: str) -> str:
        dtype = f",dtype={self.dtype}" if self.dtype else ""
        return f"E={self.num_experts},N={self.intermediate_size},device_name={device}{dtype}"


def vllm_device_name(device: str) -> str:
    """Returns the device's name as vLLM writes it in a file's name. All H200s have one name."""
    name = re.sub(r"[\s/]+", "_", device)
    return "NVIDIA_H200" if "H200" in name.split("_") else name


def sglang_folder(triton: str) -> str:
    """Returns the name of the folder with SGLang's files for a version of Triton: `3.6.0` → `triton_3_6_0`."""
    return f"triton_{triton.replace('.', '_')}"


def release(version: str) -> str:
    """Returns the leading numbers of a version as text: `3.6.0+git12ab` → `3.6.0`."""
    return ".".join(map(str, numbers(version)))
