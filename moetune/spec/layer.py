"""`MoELayer`, one mixture-of-experts layer, with its activation and routing method."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from moetune.errors import UsageError
from moetune.spec.bounds import MOST_EXPERTS, MOST_SIZE, MOST_TOP_K, Name, require_between
from moetune.spec.enums import Precision
from moetune.spec.model import FrozenModel, digest_of


class Activation(StrEnum):
    """The function between the two GEMMs. A gated one reads the gate and up halves of the first GEMM's output."""

    SILU = "silu"  # silu(gate) · up
    GELU = "gelu"  # gelu_tanh(gate) · up
    SWIGLU_CLAMPED = "swiglu_clamped"  # gpt-oss: clamped gate·sigmoid(1.702·gate)·(up + 1)
    SILU_CLAMPED = "silu_clamped"  # DeepSeek-V4: silu(gate) · up, gate and up clamped first
    SITU = "situ"  # Kimi-K3: a smoothly bounded gate · up
    RELU2 = "relu2"  # Nemotron: relu(up)², no gate

    @property
    def gated(self) -> bool:
        """Returns whether the first GEMM has 2·I outputs, a gate and an up half, instead of I."""
        return self is not Activation.RELU2

    @property
    def halves(self) -> int:
        """Returns the first GEMM's outputs in units of I: 2 with a gate, 1 without."""
        return 2 if self.gated else 1


SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT = 1.702, 1.0, 7.0
"""The constants of `Activation.SWIGLU_CLAMPED`: gate·sigmoid(α·gate)·(up + β), gate ≤ limit, |up| ≤ limit.

gpt-oss's `swiglu_limit`; the slope α makes x·sigmoid(αx) a GELU (arXiv 1606.08415, section 2).
"""


class RoutingMethod(FrozenModel):
    """How the router turns logits `[tokens, num_experts]` into `top_k` experts and weights.

    `scoring`: softmax over all experts, an independent sigmoid, or an independent sqrt(softplus) (DeepSeek-V4), which
    orders experts as the sigmoid does. `bias`: a per-expert correction that is
    added to the scores for the selection only (DeepSeek-V3, arXiv 2412.19437, eq. 16).
    `num_groups`/`top_k_groups`: only experts of the best groups can be chosen; a group is as good as its
    two best experts (`group_score="top2"`, DeepSeek-V3) or its best one (`"max"`, DeepSeek-V2).
    `renormalize`: the chosen weights are divided by their sum; then all are multiplied by `scaling`.
    """

    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    bias: bool = False
    num_groups: Annotated[int, Field(le=MOST_EXPERTS)] = 1
    top_k_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    renormalize: bool = True
    scaling: Annotated[float, Field(allow_inf_nan=False, gt=0)] = 1.0

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if not 1 <= self.top_k_groups <= self.num_groups:
            raise UsageError(f"top_k_groups must be 1 … num_groups = {self.num_groups}, given {self.top_k_groups}.")
        return self

    @property
    def grouped(self) -> bool:
        """Returns whether the group limit can exclude an expert."""
        return self.top_k_groups < self.num_groups


_BOUNDS: Final = (
    ("num_experts", 1, MOST_EXPERTS),
    ("top_k", 1, MOST_TOP_K),
    ("hidden_size", 1, MOST_SIZE),
    ("intermediate_size", 1, MOST_SIZE),
    ("num_shared_experts", 0, MOST_TOP_K),
)


class MoELayer(FrozenModel):
    """One MoE layer. Sizes are those of one whole expert, before any sharding."""

    name: Name = "custom"
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    precision: Precision = Precision.BF16
    activation: Activation = Activation.SILU
    expert_bias: bool = False
    weight_on_input: bool = False
    num_shared_experts: int = 0
    routing: RoutingMethod = RoutingMethod()

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        for field, least, most in _BOUNDS:
            require_between(field, getattr(self, field), least, most)
        if self.top_k > self.num_experts:
            raise UsageError(f"top_k = {self.top_k} exceeds num_experts = {self.num_experts}.")
        groups = self.routing.num_groups
        if self.num_experts % groups:
            raise UsageError(f"num_experts = {self.num_experts} is not divisible by num_groups = {groups}.")
        if self.top_k > self.num_experts // groups * self.routing.top_k_groups:
            raise UsageError(
                f"top_k = {self.top_k} exceeds the {self.num_experts // groups * self.routing.top_k_groups} experts "
                f"of top_k_groups = {self.routing.top_k_groups} groups."
            )
        return self

    @property
    def weights_per_expert(self) -> int:
        """Returns the number of weights of one expert: 3·H·I with a gate, 2·H·I without."""
        return (self.activation.halves + 1) * self.hidden_size * self.intermediate_size

    @property
    def shape(self) -> dict[str, Any]:
        """Returns all fields but the name: those that a kernel's speed can depend on."""
        return self.model_dump(mode="json", exclude={"name"})

    @property
    def digest(self) -> str:
        """Returns 16 hex digits over `shape`, so layers of equal shape have equal digests."""
        return digest_of(self.shape)

    @property
    def slug(self) -> str:
        """Returns a readable folder name, equal for equal shapes: `e128-k8-h2048-i768-bf16-<digest>`."""
        return (
            f"e{self.num_experts}-k{self.top_k}-h{self.hidden_size}-i{self.intermediate_size}"
            f"-{self.precision.value}-{self.digest}"
        )

    def __repr__(self) -> str:
        sizes = f"{self.num_experts} experts, top-{self.top_k}, {self.hidden_size}x{self.intermediate_size}"
        return f"MoELayer({self.name}: {sizes}, {self.precision.value})"
