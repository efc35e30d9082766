"""What moetune's Triton GEMMs, the grouped and the batched one, need of a machine and of a layer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Final

from moetune.errors import UnsupportedError
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

TOLERANCES: Final = {Precision.BF16: 1e-2, Precision.FP8_BLOCK: 8e-2}
"""The precisions, and the largest relative error of a right result."""
ACTIVATIONS: Final = (Activation.SILU, Activation.GELU)


def unavailable(kernel: Callable[[], object], if_too_old: str) -> tuple[str, str] | None:
    """Returns a reason and a hint if Triton, a CUDA device of compute capability 8.0 or the kernel is missing.

    Args:
        kernel: loads the kernel, and raises UnsupportedError if it cannot.
        if_too_old: the hint if the device is too old.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed", "pip install 'moetune[triton]'"
    import torch

    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            return "needs a CUDA device, and torch sees none", "Run on a GPU host with a CUDA build of torch."
        if (capability := torch.cuda.get_device_capability()) < (8, 0):
            return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}", if_too_old
    try:
        kernel()
    except UnsupportedError as error:
        return error.message, error.hint
    return None


def unsupported(layer: MoELayer, regime: Regime) -> str | None:
    """Returns why the layer cannot be computed: its precision, activation, biases, sizes or input weights."""
    if layer.precision not in TOLERANCES:
        return f"computes {' and '.join(TOLERANCES)} experts, not {layer.precision.value}"
    if layer.activation not in ACTIVATIONS:
        return f"computes {' and '.join(ACTIVATIONS)}, not {layer.activation.value}"
    if layer.expert_bias:
        return "adds no bias to an expert's GEMMs"
    if layer.weight_on_input:
        return "applies the router's weight to an expert's output, this layer to its input"
    intermediate = regime.intermediate_size(layer)
    if layer.precision is Precision.FP8_BLOCK and (layer.hidden_size % 128 or intermediate % 128):
        return (
            f"needs whole 128×128 scale blocks; H = {layer.hidden_size} and I/tp = {intermediate} "
            "are not both multiples of 128"
        )
    return None
