"""Builds the keys by which TensorRT-LLM's tuner finds a tactic of its six trtllm-gen MoE runners.

A key is `str((op, runner class, str(unique_id), nearest profile))` (`AutoTunerProfilingCache.get_cache_key`). The
nearest profile is the shapes of the op's inputs, with the bucket in place of the rows and −1 for each dimension that
follows from the rows. An input that is None has the shape `(0,)`. Source: `tensorrt_llm/_torch/autotuner.py`,
`custom_ops/trtllm_gen_custom_ops.py` and `modules/fused_moe/fused_moe_trtllm_gen.py`, from TensorRT-LLM #13667 to
#17328 (August 2026), and the review of the next change, #18189. `Spelling` describes the differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from moetune.errors import UnsupportedError
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

Shape = tuple[int, ...]
Version = tuple[int, int, int, float]
"""A version as numbers: `1.3.0rc25` is (1, 3, 0, 25). A release has ∞ for the candidate."""
FUSED: Final[tuple[Version, Version]] = ((1, 3, 0, 21), (1, 3, 0, 26))
"""A version after the first and before the second may have fused shared experts in its keys.

#15297 was in review in July 2026, before candidate 22. #17328 opened on 6 August; candidate 26 is of September.
"""
DEPLOYMENT: Final[tuple[Version, Version]] = ((1, 3, 0, 24), (1, 3, 0, 27))
"""A version after the first and before the second may have attention DP and ep in its keys.

#18189 was in review on 27 August 2026, between candidates 24 and 25. Candidate 27 is of the middle of September.
"""
ABSENT: Final[Shape] = (0,)
FOLLOWS: Final = -1
"""A dimension that the tuner derives from the rows."""
SWIGLU: Final = 0
"""`ActType_TrtllmGen.SwiGlu`."""
HIDDEN_MULTIPLE: Final = 512
"""`MXFP4WeightTRTLLMGenFusedMoEMethod` pads the first GEMM's input to a multiple of this."""
WEIGHT_MULTIPLE: Final = 128
"""`MXFP4WeightTRTLLMGenFusedMoEMethod` pads all other sizes to multiples of this."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Describes one of the six runners.

    `activation`: the activations' precision. `hidden_width`, `weight_width`: values in one element of the activations
    and of the weights. `scale`: values that share a scale of the activation, None if the tuner gets no such scales.
    `weight_scale`: values along K that share a weight scale (fp8 blocks: along N too). `mxfp4`: whether sizes are
    padded and the unique_id contains the valid sizes. `biases`: whether bias and swiglu parameters are inputs.
    `scalars`: whether three output scales are inputs. `hashed`: whether the unique_id is a hash. `after_deployment`:
    whether the runner follows, in the source, the one that #18189 changes. It is not known if #18189 changes it too.
    """

    op: str
    name: str
    precision: Precision
    activation: Literal["nvfp4", "fp8_block", "mxfp8", "fp8", "bf16"]
    hidden_width: int = 1
    weight_width: int = 2
    scale: int | None = None
    weight_scale: int = 32
    mxfp4: bool = False
    biases: bool = True
    scalars: bool = True
    hashed: bool = False
    after_deployment: bool = False

    @property
    def custom_op(self) -> str:
        """The op's name in the tuner."""
        return f"trtllm::{self.op}_runner"


@dataclass(frozen=True, slots=True)
class Spelling:
    """Says which fields a version's unique_id contains beside the sizes.

    `fused`: the number of fused shared experts, 0 unless `TLLM_MOE_ENABLE_SHARED_EXPERT_FUSION=1`; only with fp8
    blocks (#15297, #17328). `deployment`: attention DP on or off, and ep (#18189).
    """

    fused: bool = False
    deployment: bool = False


RUNNERS: Final = (
    Runner("fp4_block_scale_moe", "FP4BlockScaleMoERunner", Precision.NVFP4, "nvfp4", 2, scale=16, weight_scale=16),
    Runner(
        "fp8_block_scale_moe",
        "FP8BlockScaleMoERunner",
        Precision.FP8_BLOCK,
        "fp8_block",
        weight_width=1,
        scale=128,
        weight_scale=128,
        biases=False,
        scalars=False,
    ),
    Runner(
        "mxe4m3_mxe2m1_block_scale_moe",
        "MxE4m3MxE2m1BlockScaleMoERunner",
        Precision.MXFP4,
        "mxfp8",
        scale=32,
        mxfp4=True,
        scalars=False,
    ),
    Runner(
        "e4m3_mxe2m1_block_scale_moe",
        "E4m3MxE2m1BlockScaleMoERunner",
        Precision.MXFP4,
        "fp8",
        mxfp4=True,
        after_deployment=True,
    ),
    Runner(
        "bf16_mxe2m1_block_scale_moe",
        "Bf16MxE2m1BlockScaleMoERunner",
        Precision.MXFP4,
        "bf16",
        mxfp4=True,
        scalars=False,
        hashed=True,
        after_deployment=True,
    ),
    Runner(
        "fp8_fp4_block_scale_moe",
        "FP8FP4BlockScaleMoERunner",
        Precision.NVFP4,
        "fp8",
        biases=False,
        after_deployment=True,
    ),
)


def runner(precision: Precision, activation: str) -> Runner:
    """Returns the runner for a precision of the weights and one of the activations.

    Raises:
        UnsupportedError: there is none.
    """
    for known in RUNNERS:
        if (known.precision, known.activation) == (precision, activation):
            return known
    pairs = ", ".join(f"{known.precision.value} × {known.activation}" for known in RUNNERS)
    raise UnsupportedError(
        f"TensorRT-LLM has no tuned trtllm-gen runner for {precision.value} experts on {activation} activations.",
        f"It has runners for {pairs}.",
    )


def spellings(known: Runner, version: Version | None) -> tuple[Spelling, ...]:
    """Returns the spellings that the unique_id of `known` may have in `version`: one, or several if it is not known.

    `version` is None if the user gave none. A file with all spellings serves every version: the engine finds its own.
    """
    fused = _may_have(version, FUSED) if known.precision is Precision.FP8_BLOCK else (False,)
    deployment: tuple[bool, ...] = (False,)
    if known.mxfp4 and known.activation == "mxfp8":
        deployment = _may_have(version, DEPLOYMENT)
    elif known.after_deployment and True in _may_have(version, DEPLOYMENT):
        deployment = (False, True)
    return tuple(Spelling(one, other) for one in fused for other in deployment)


def _may_have(version: Version | None, change: tuple[Version, Version]) -> tuple[bool, ...]:
    """Returns whether a version has a change that was made between two others: one answer, or both if not known."""
    first, last = change
    if version is None or first < version < last:
        return (False, True)
    return (version >= last,)


def keys(
    known: Runner, layer: MoELayer, regime: Regime, rank: int, bucket: int, spelling: Spelling = Spelling()
) -> Iterator[str]:
    """Yields the two keys of one expert-parallel rank at one bucket: if ids are given, and if the kernel routes.

    Args:
        known: the runner.
        layer: the whole layer.
        regime: the shard is read from it.
        rank: the expert-parallel rank.
        bucket: the rows that TensorRT-LLM looks up. Under attention DP it has divided them by ep.
        spelling: the spelling of the version.

    Raises:
        UnsupportedError: the runner does not compute this layer.
    """
    experts = regime.shard(layer, rank).num_local
    hidden, inner = layer.hidden_size, regime.intermediate_size(layer)
    _check(known, layer, inner)
    padded_in, padded_out, padded_inner = (
        (_padded(hidden, HIDDEN_MULTIPLE), _padded(hidden, WEIGHT_MULTIPLE), _padded(inner, WEIGHT_MULTIPLE))
        if known.mxfp4
        else (hidden, hidden, inner)
    )
    top_k = layer.top_k
    fused = (0,) if spelling.fused else ()
    sizes = (padded_inner, hidden, inner) if known.mxfp4 else (padded_inner,)
    deployment = (regime.attention_dp, regime.ep_size) if spelling.deployment else ()
    unique = (top_k, *fused, *sizes, experts, SWIGLU, *deployment)
    identity = str(hash(unique) if known.hashed else unique)
    inputs = _inputs(known, layer, experts, padded_in, padded_out, padded_inner)
    hidden_states = ((bucket, padded_in // known.hidden_width), *_activation_scale(known, padded_in))
    ids: Shape = (FOLLOWS, top_k)
    logits: Shape = (FOLLOWS, layer.num_experts)
    bias: Shape = (layer.num_experts,) if layer.routing.bias else ABSENT
    routings = (((ABSENT, ABSENT), (ids, ids)), ((logits, bias), (ABSENT, ABSENT)))
    for routing, chosen in routings:
        yield str((known.custom_op, known.name, identity, (*routing, *hidden_states, *inputs, *chosen)))


def _inputs(
    known: Runner, layer: MoELayer, experts: int, hidden: int, hidden_out: int, inner: int
) -> tuple[Shape, ...]:
    """Returns the shapes of the inputs between the activations and the ids."""
    blocks = known.weight_scale if known.precision is Precision.FP8_BLOCK else 1
    first = (experts, 2 * inner, hidden // known.weight_width)
    first_scale = (experts, 2 * inner // blocks, hidden // known.weight_scale)
    second = (experts, hidden_out, inner // known.weight_width)
    second_scale = (experts, hidden_out // blocks, inner // known.weight_scale)
    clamped = (experts,) if layer.activation is Activation.SWIGLU_CLAMPED else ABSENT
    biases = ((experts, 2 * inner), (experts, hidden_out)) if layer.expert_bias else (ABSENT, ABSENT)
    shapes: list[Shape] = [first, first_scale]
    if known.biases:
        shapes += [biases[0], clamped, clamped, clamped]
    shapes += [second, second_scale]
    if known.biases:
        shapes.append(biases[1])
    if known.scalars:
        shapes += [(experts,)] * 3
    return tuple(shapes)


def _activation_scale(known: Runner, hidden: int) -> tuple[Shape, ...]:
    if known.scale is None:
        return ()
    return ((hidden // known.scale, FOLLOWS),) if known.precision is Precision.FP8_BLOCK else ((FOLLOWS,),)


def _check(known: Runner, layer: MoELayer, inner: int) -> None:
    hint = "Export for another engine with --to."
    if layer.activation is Activation.GELU:
        raise UnsupportedError(f"moetune does not know TensorRT-LLM's keys for {layer.activation.value}.", hint)
    if not known.biases and (layer.expert_bias or layer.activation is not Activation.SILU):
        raise UnsupportedError(f"{known.name} supports neither expert bias nor clamps.", hint)
    if not known.mxfp4 and (layer.hidden_size % WEIGHT_MULTIPLE or inner % WEIGHT_MULTIPLE):
        raise UnsupportedError(
            f"H = {layer.hidden_size} and I/tp = {inner} must be multiples of {WEIGHT_MULTIPLE} for {known.name}.", hint
        )


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
