"""The keys by which TensorRT-LLM's tuner finds a tactic of its six trtllm-gen MoE runners.

A key is `str((op, runner class, str(unique_id), nearest profile))` (`AutoTunerProfilingCache.get_cache_key`), the
profile being the shapes of the op's inputs with the bucket in place of the rows and −1 in each dimension that follows
from them; an input that is None has the shape `(0,)`. Read in `tensorrt_llm/_torch/autotuner.py`,
`custom_ops/trtllm_gen_custom_ops.py` and `modules/fused_moe/fused_moe_trtllm_gen.py`, from TensorRT-LLM #13667 to
#17328 (August 2026); of the change after it, #18189, what its review shows. `Spelling` says what differs.
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
"""`1.3.0rc25` is (1, 3, 0, 25); a release has ∞ for the candidate."""
FUSED: Final[tuple[Version, Version]] = ((1, 3, 0, 21), (1, 3, 0, 26))
"""#15297 was in review in July 2026, before candidate 22; #17328 opened on 6 August, and 26 is of September."""
DEPLOYMENT: Final[tuple[Version, Version]] = ((1, 3, 0, 24), (1, 3, 0, 27))
"""#18189 was in review on 27 August 2026, between candidates 24 and 25; 27 is of the middle of September."""
ABSENT: Final[Shape] = (0,)
FOLLOWS: Final = -1
"""A dimension that the tuner derives from the rows."""
SWIGLU: Final = 0
"""`ActType_TrtllmGen.SwiGlu`."""
HIDDEN_MULTIPLE: Final = 512
WEIGHT_MULTIPLE: Final = 128
"""`MXFP4WeightTRTLLMGenFusedMoEMethod` pads what the first GEMM reads, and all else, to multiples of these."""


@dataclass(frozen=True, slots=True)
class Runner:
    """One of the six runners.

    `activation`: what its weights are multiplied with. `hidden_width`, `weight_width`: values in one element.
    `scale`: values that share a scale of the activation, where the tuner gets such scales. `weight_scale`: values
    along K that share a weight scale (fp8 blocks: along N too). `mxfp4`: padded, with bias and swiglu parameters, and
    a unique_id that holds the valid sizes. `biases`: whether bias and swiglu parameters are inputs. `scalars`: whether
    three output scales are. `hashed`: whether the unique_id is a hash. `after_deployment`: the runners that follow in
    the source the one that #18189 is known to change; whether it changes them too is not known.
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
    """What a version's unique_id holds beside the sizes.

    `fused`: the number of shared experts that are fused into the routed ones, 0 unless
    `TLLM_MOE_ENABLE_SHARED_EXPERT_FUSION=1`; fp8 blocks alone (#15297, #17328). `deployment`: whether attention DP is
    on, and ep (#18189).
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
    """The runner of these weights on these activations.

    Raises:
        UnsupportedError: there is none.
    """
    for known in RUNNERS:
        if (known.precision, known.activation) == (precision, activation):
            return known
    pairs = ", ".join(f"{known.precision.value} × {known.activation}" for known in RUNNERS)
    raise UnsupportedError(
        f"TensorRT-LLM has no tuned trtllm-gen runner for {precision.value} experts on {activation} activations.",
        f"It has for {pairs}.",
    )


def spellings(known: Runner, version: Version | None) -> tuple[Spelling, ...]:
    """How the unique_id of `known` may be spelled in `version`: one way, or several where moetune cannot tell.

    None is a version that is not given. A file with all serves each: the engine finds the ones that it spells.
    """
    fused = _may_have(version, FUSED) if known.precision is Precision.FP8_BLOCK else (False,)
    deployment: tuple[bool, ...] = (False,)
    if known.mxfp4 and known.activation == "mxfp8":
        deployment = _may_have(version, DEPLOYMENT)
    elif known.after_deployment and True in _may_have(version, DEPLOYMENT):
        deployment = (False, True)
    return tuple(Spelling(one, other) for one in fused for other in deployment)


def _may_have(version: Version | None, change: tuple[Version, Version]) -> tuple[bool, ...]:
    """Whether a version has a change that came after the first of two versions and no later than the second."""
    first, last = change
    if version is None or first < version < last:
        return (False, True)
    return (version >= last,)


def keys(
    known: Runner, layer: MoELayer, regime: Regime, rank: int, bucket: int, spelling: Spelling = Spelling()
) -> Iterator[str]:
    """The two keys of one expert-parallel rank at one bucket: where ids are given, and where the kernel routes.

    Args:
        known: which of the runners.
        layer: the whole layer.
        regime: gives the shard.
        rank: the expert-parallel rank.
        bucket: the rows that TensorRT-LLM looks up, after its division by ep under attention DP.
        spelling: of the version.

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
    """The shapes of everything between the activations and the ids."""
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
    hint = "Use another engine's format."
    if layer.activation is Activation.GELU:
        raise UnsupportedError(f"moetune knows no key of TensorRT-LLM for {layer.activation.value}.", hint)
    if not known.biases and (layer.expert_bias or layer.activation is not Activation.SILU):
        raise UnsupportedError(f"{known.name} takes no expert bias and no clamps.", hint)
    if not known.mxfp4 and (layer.hidden_size % WEIGHT_MULTIPLE or inner % WEIGHT_MULTIPLE):
        raise UnsupportedError(
            f"H = {layer.hidden_size} and I/tp = {inner} must be multiples of {WEIGHT_MULTIPLE} for {known.name}.", hint
        )


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
