"""`HummingOps`: what a layer needs of Humming, on one GPU: prepared weights, its heuristic and its kernels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from moetune.backends.humming.config import Config
from moetune.backends.humming.gemm import PADDED_K, PADDED_N, Gemm
from moetune.backends.humming.layer_fields import CODE_DTYPES, SCALE_DTYPES
from moetune.backends.humming.slots import Grouped, Indexed, SlotSorter, combine
from moetune.backends.humming.space import AUTO
from moetune.backends.humming.weights import StoredMatrices
from moetune.backends.reference import CLAMPED
from moetune.spec.layer import Activation
from moetune.spec.regime import Shard

_LOCKS_PER_SM: Final = 8
"""The engines' locks for stream-K (`create_humming_locks` of vLLM)."""
_SILU: Final = "a / (1.f + expf(-a)) * b"
_GELU: Final = "a / (1.f + expf(-1.5957691216057308f * (a + 0.044715f * a * a * a))) * b"
"""tanh-gelu(a) = a · sigmoid(2 · sqrt(2 / π) · (a + 0.044715 · a³))"""
_CLAMPED: Final = """[](float a, float b) {{
    float gate = fminf(a, {limit}f), up = fmaxf(fminf(b, {limit}f), -{limit}f);
    return gate / (1.f + expf(-{alpha}f * gate)) * (up + {beta}f);
}}(a, b)"""


def activation_code(activation: Activation) -> str:
    """Returns the activation as Humming inserts it into a kernel: an expression of the floats a (gate) and b (up)."""
    if activation in CLAMPED:
        alpha, beta, limit = (float(value) for value in CLAMPED[activation])
        return _CLAMPED.format(alpha=alpha, beta=beta, limit=limit)
    return _GELU if activation is Activation.GELU else _SILU


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One GEMM's weights in Humming's order.

    Attributes:
        gemm: the GEMM.
        config: Humming's `LayerConfig`.
        tensors: `weight`, `weight_scale`, and `weight_scale_2` and `bias` if there are any.
        kernels: what the launcher reads for each spelled configuration that has run: int64 `[4]` on the CPU.
    """

    gemm: Gemm
    config: Any
    tensors: dict[str, torch.Tensor]
    kernels: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)


class HummingOps:
    """Runs Humming 0.1.19 on one CUDA device as vLLM 0.33 does. No method waits for the GPU but `prepared`."""

    def __init__(self, device: str) -> None:
        from humming import ops, schema, transform, tune

        self._ops, self._schema, self._transform, self._tune = ops, schema, transform, tune
        self._device = torch.device(device)
        sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._locks = torch.zeros(sms * _LOCKS_PER_SM, dtype=torch.int32, device=self._device)

    def prepared(self, gemm: Gemm, stored: StoredMatrices) -> Prepared:
        """Returns stored weights in Humming's order, padded as vLLM pads them."""
        fmt = gemm.format
        schema = self._schema.HummingWeightSchema(
            b_dtype=CODE_DTYPES[fmt.scale],
            bs_dtype=SCALE_DTYPES[fmt.scale],
            weight_scale_group_size=fmt.group,
            weight_scale_2_type=None if stored.expert_scales is None else "tensor",
        )
        tensors = {
            "weight": stored.codes,
            "weight_scale": stored.scales,
            "weight_scale_2": stored.expert_scales,
            "bias": stored.bias,
        }
        with torch.cuda.device(self._device):
            config, made = self._transform.prepare_and_transform_humming_tensors(
                {name: tensor for name, tensor in tensors.items() if tensor is not None},
                shape_n=gemm.columns,
                shape_k=gemm.depth,
                weight_schema=schema,
                num_experts=gemm.num_experts,
                pad_n_to_multiple=PADDED_N,
                pad_k_to_multiple=PADDED_K,
                has_bias=gemm.bias,
                torch_dtype=torch.bfloat16,
                device=self._device,
            )
        return Prepared(gemm, config, made)

    def fields(self, weights: Prepared, spelled: str, slots: int) -> dict[str, Any]:
        """Returns the fields of a configuration; for `AUTO` what Humming's heuristic chooses for `slots` slots."""
        if spelled != AUTO:
            return Config.parse(spelled).fields(weights.gemm.type)
        table = self._tune.get_heuristics_config(weights.config, gemm_type=weights.gemm.type, device=self._device)
        return of_interval(table, slots)

    def block_m(self, weights: Prepared, spelled: str, slots: int) -> int:
        """Returns the size of a configuration's block along M."""
        if spelled != AUTO:
            return Config.parse(spelled).block[0]
        return int(self.fields(weights, spelled, slots)["block_shape"][0])

    def multiply(
        self,
        weights: Prepared,
        spelled: str,
        inputs: torch.Tensor,
        out: torch.Tensor,
        rows: Indexed | Grouped,
        top_k: int,
        slots: int,
    ) -> None:
        """Runs one GEMM. The first run of a configuration compiles it, unless it is in Humming's cache.

        Args:
            weights: the weights.
            spelled: a configuration or `AUTO`.
            inputs: bf16; one row a slot if they are grouped, else one row for `top_k` slots.
            out: bf16, one row a slot.
            rows: where each expert's rows are.
            top_k: the slots that share a row of `inputs`.
            slots: the slots for which the heuristic chooses.
        """
        key = spelled, slots if spelled == AUTO else 0
        kernel = weights.kernels.get(key)
        if kernel is None:
            kernel = weights.kernels[key] = self._compiled(weights, self.fields(weights, spelled, slots))
        where: dict[str, Any] = (
            {"expert_layout": rows.offsets}
            if isinstance(rows, Grouped)
            else {"sorted_ids": rows.slots, "expert_ids": rows.experts, "num_tokens_padded": rows.num_padded}
        )
        self._ops.launch_kernel(
            configs=kernel,
            inputs=inputs,
            outputs=out,
            locks=self._locks,
            top_k=top_k,
            valid_shape_m=slots,
            **weights.tensors,
            **where,
        )

    def _compiled(self, weights: Prepared, fields: dict[str, Any]) -> torch.Tensor:
        from humming.kernel.humming import HummingKernel

        compute = json.dumps({"gemm_type": weights.gemm.type})
        return HummingKernel.prepare_kernels(  # type: ignore[no-any-return]
            weights.config.to_str(), compute, json.dumps(fields), self._device
        )

    def sorter(self, rows: int, top_k: int, shard: Shard) -> SlotSorter:
        """Returns a sorter of the slots of `rows` rows."""
        return SlotSorter(rows, top_k, shard, str(self._device))

    def scatter(self, inputs: torch.Tensor, out: torch.Tensor, rows: Grouped) -> None:
        """Copies each row to the places of its slots: bf16 `[M, H]` to `[M·k, H]`."""
        self._ops.process_input(
            inputs, outputs=out, layout="scatter", scatter_idx=rows.places, num_valid_tokens=rows.num_rows
        )

    def activate(
        self, activation: Activation, gate_up: torch.Tensor, out: torch.Tensor, num_rows: torch.Tensor | None
    ) -> None:
        """Writes the activation of the first `num_rows` rows, or of all: bf16 `[S, 2·I]` to `[S, I]`."""
        self._ops.process_input(
            gate_up,
            outputs=out,
            activation_type="binary_split",
            activation_impl=activation_code(activation),
            num_valid_tokens=num_rows,
        )

    def combine(self, products: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the weighted sum of each row's products; see `slots.combine`."""
        combine(products, places, weights, out)


def of_interval(table: Sequence[Sequence[Any]], slots: int) -> dict[str, Any]:
    """Returns the entry of a table `[(lower, upper, fields), …]` with lower < slots ≤ upper, as Humming looks it up.

    Raises:
        LookupError: there is none.
    """
    for lower, upper, fields in table:
        if lower < slots <= upper:
            return dict(fields)
    raise LookupError(f"Humming's heuristic has no configuration for {slots} slots")
