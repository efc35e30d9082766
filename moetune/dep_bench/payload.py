"""What travels with a token: its hidden state and its routing, in the formats of `workload.wire`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetune.backends.base import Inputs
from moetune.dep_bench import fp4
from moetune.errors import UnsupportedError
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.fused import Fused
from moetune.workload.packing import pack_eager, unpack_topk
from moetune.workload.wire import WireActivation, WireRouting, wire

_quantize, _dequantize = Fused(fp4.quantize, on_cpu=False), Fused(fp4.dequantize, on_cpu=False)
_pack = Fused(pack_eager, on_cpu=False)


@dataclass(frozen=True, slots=True)
class Format:
    """The formats in which tokens travel.

    Attributes:
        activation: `bf16` stands for the dtype of the experts' inputs, `fp4` for NVFP4.
        routing: router logits, or top-k ids and weights, or both in one int32 each.
    """

    activation: WireActivation
    routing: WireRouting

    @classmethod
    def of(
        cls, layer: MoELayer, regime: Regime, activation: WireActivation = "bf16", routing: WireRouting | None = None
    ) -> Format:
        """Returns the formats that are asked for, with `wire`'s default for the routing.

        Raises:
            UsageError: as `wire`.
            UnsupportedError: hidden states of this layer cannot be quantized before they travel.
        """
        found = wire(layer, regime, 1, activation, routing)
        if activation == "fp8":
            raise UnsupportedError("dep-bench has no fp8 on the wire.", "Use --wire bf16 or fp4.")
        if activation == "fp4" and layer.precision is Precision.FP8_TENSOR:
            raise UnsupportedError(
                "Rows of an fp8_tensor layer cannot be quantized before they travel: their scale is that of all ranks' "
                "rows together, and each rank has only its own (vLLM #54683).",
                "Use --wire bf16.",
            )
        if activation == "fp4" and layer.hidden_size % fp4.BLOCK:
            raise UnsupportedError(
                f"NVFP4 needs a hidden size that is a multiple of {fp4.BLOCK}, given {layer.hidden_size}.",
                "Use --wire bf16.",
            )
        return cls(activation, found.routing)

    @property
    def in_one_buffer(self) -> bool:
        """Whether hidden state and routing travel in one tensor of bytes."""
        return self.activation == "fp4" and self.routing == "packed_topk"

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Returns hidden states `[T, H]` as they travel, `[T, H]` or uint8 `[T, H/2 + H/16]`."""
        return _quantize(x) if self.activation == "fp4" else x

    def routed(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the routing of rows as it travels: int32 `[M, k]`, or `[M, 2k]`, the ids before the weights' bits.

        Args:
            ids: int32 `[M, k]`.
            weights: float32 `[M, k]`.
        """
        if self.routing == "packed_topk":
            return _pack(ids, weights)
        return torch.cat((ids, weights.contiguous().view(torch.int32)), dim=1)

    def fill(self, inputs: Inputs, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Writes what arrived into a runner's inputs. Hidden states that lie there already are not copied."""
        if self.activation == "fp4":
            inputs.x.copy_(_dequantize(hidden, inputs.x.dtype))
        elif hidden.data_ptr() != inputs.x.data_ptr():
            inputs.x.copy_(hidden)
        inputs.topk_ids.copy_(ids)
        inputs.topk_weights.copy_(weights)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states that the experts get, given those that are sent."""
        return fp4.dequantize(fp4.quantize(x), x.dtype) if self.activation == "fp4" else x

    def unrouted(self, routing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and weights of what `routed` made."""
        if self.routing == "packed_topk":
            return unpack_topk(routing)
        ids, bits = routing.chunk(2, dim=1)
        return ids, bits.contiguous().view(torch.float32)


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns rows with the bytes of the same rows of several contiguous tensors: uint8 `[M, bytes]`."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], dim=1)


def parted(rows: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors that `joined` put together, with the dtypes and widths of `like`."""
    widths = [tensor.shape[1] * tensor.element_size() for tensor in like]
    parts = torch.split(rows, widths, dim=1)
    return [part.contiguous().view(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
