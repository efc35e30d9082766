"""What vLLM's and SGLang's files for the grouped Triton GEMM have in common, and what keeps an engine from them.

Both engines name a file by E (experts on one rank), N (intermediate size on one rank), the device, the dtype and the
scale block, and look rows M up by the nearest key; the experts per token, the hidden size, ep and the dispatch are not
in the name (vLLM `fused_moe.py`, SGLang `fused_moe_triton_config.py`: `get_config_file_name`, `get_moe_configs`,
`try_get_optimal_moe_config`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moetune.backends.grouped_triton.space import SCALE_BLOCK, VALUES, effective_block_size_k
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.dispatcher import dispatchers, matching
from moetune.spec.enums import Precision
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile

_DTYPES = {
    Precision.BF16: None,
    Precision.FP16: None,
    Precision.FP32: "float32",
    Precision.FP8_BLOCK: "fp8_w8a8",
    Precision.FP8_TENSOR: "fp8_w8a8",
}
"""`get_config_dtype_str` of both engines; the other precisions do not reach this kernel with these names."""


@dataclass(frozen=True, slots=True)
class TritonProfile:
    """A profile as both engines need it.

    `num_experts`: E of rank 0, then of the last rank where shards are uneven. `intermediate_size`: N, I / tp.
    `dtype`, `block_shape`: as in the file's name, None where they are left out. `configs`: rows M → the six tunables.
    `capability`: compute capability of the device. `triton`: Triton's version; `remote`: `drop` or `zero`.
    """

    profile: Profile
    num_experts: tuple[int, ...]
    intermediate_size: int
    dtype: str | None
    block_shape: tuple[int, int] | None
    configs: dict[int, dict[str, int]]
    capability: tuple[int, ...]
    triton: str
    remote: str

    @classmethod
    def of(cls, profile: Profile, engine: str) -> TritonProfile:
        """Reads a profile for `engine`.

        Raises:
            UnsupportedError: of another backend or precision, not measured on a GPU, or with other tunables.
        """
        if profile.backend != "triton":
            raise UnsupportedError(
                f"{engine} takes tactics of the backend triton, the profile's are of {profile.backend}.",
                "Tune with --backend triton.",
            )
        layer, regime, strict = profile.layer, profile.regime, profile.environment.strict
        if layer.precision not in _DTYPES:
            raise UnsupportedError(
                f"{engine}'s grouped Triton GEMM has no file for {layer.precision.value} experts.",
                f"It has for {', '.join(_DTYPES)}.",
            )
        if missing := ", ".join(sorted({"compute_capability", "triton", "remote"} - strict.keys())):
            raise UnsupportedError(
                f"The profile was measured on {profile.environment.device} and does not say {missing}.",
                "Tune on the GPU that will serve.",
            )
        blocks = layer.precision is Precision.FP8_BLOCK
        experts = {regime.shard(layer, rank).num_local: None for rank in (0, regime.ep_size - 1)}
        return cls(
            profile,
            tuple(experts),
            regime.intermediate_size(layer),
            _DTYPES[layer.precision],
            (SCALE_BLOCK, SCALE_BLOCK) if blocks else None,
            {choice.rows: _config(choice.tactic, blocks, engine) for choice in profile.choices},
            _numbers(strict["compute_capability"]),
            strict["triton"],
            strict["remote"],
        )

    @property
    def has_remote_slots(self) -> bool:
        """Whether rows that the kernel sees have slots of other ranks' experts (or none: −1)."""
        layer, regime = self.profile.layer, self.profile.regime
        shard = regime.shard(layer)
        if shard.num_local == shard.num_physical or regime.layout == "slot":
            return False
        return regime.layout != "packed" or shard.num_local < layer.top_k

    def warnings(self, engine: str, remote: str) -> Iterator[str]:
        """Where `engine`, which treats remote slots by `remote`, does not bring what was measured."""
        regime = self.profile.regime
        if regime.dispatch != "none":
            found = [word for word in matching(regime.dispatch, regime.layout) if word.startswith(f"{engine}:")]
            load = regime.layout or regime.dispatch
            if not found:
                yield (
                    f"No dispatcher of {engine} brings the {load} load that these tactics were measured under; "
                    f"tune with --no-dp, or with --dispatch {' or '.join(_reaching_triton(engine))}."
                )
            elif regime.layout == "pool":
                yield (
                    f"Under {', '.join(found)} {engine} runs FlashInfer's kernels, which read no such file; "
                    "tune with a FlashInfer backend."
                )
        if self.has_remote_slots and remote != self.remote:
            does = {
                "drop": "drops slots of other ranks' experts",
                "zero": "runs blocks of zeros for other ranks' experts",
            }
            yield (
                f"{engine} {does[remote]}; these tactics were measured with a kernel that {does[self.remote]}. "
                f"Tune with --remote {remote}."
            )
        if regime.ladder.divisor > 1:
            yield (
                f"The ladder {regime.ladder} divides run-time rows by {regime.ladder.divisor} and {engine} does not; "
                "the keys are the rows that were measured."
            )

    def notes(self, engine: str) -> Iterator[str]:
        """What else is good to know."""
        regime = self.profile.regime
        if regime.ladder.rounding != "nearest":
            rounds = {"floor": "down", "ceil": "up"}[regime.ladder.rounding]
            yield (
                f"{engine} takes the nearest bucket (of two equally near ones the smaller), the ladder {regime.ladder} "
                f"rounds {rounds}: rows between two buckets can run another tactic than moetune's own look-up gives."
            )
        if missing := [rows for rows in regime.buckets if rows not in self.configs]:
            yield f"Not measured, so not in the file: {', '.join(map(str, missing))} rows."
        if len(self.num_experts) > 1:
            first, last = self.num_experts
            yield f"Shards are uneven: what was measured on {first} experts is written for {last} as well."


def _reaching_triton(engine: str) -> list[str]:
    """The engine's dispatchers before its Triton kernel, one for each load that they bring."""
    by_load: dict[str, str] = {}
    for known in dispatchers():
        if known.engine == engine and known.tunable and known.regime.get("layout") != "pool":
            by_load.setdefault(str(known.regime), str(known))
    return list(by_load.values())


def parse_version(version: str | None, newest: tuple[int, ...]) -> tuple[int, ...]:
    """`0.20.2` → (0, 20, 2); `newest` where none is given.

    Raises:
        UsageError: no version.
    """
    if version is None:
        return newest
    if not (numbers := _numbers(version)):
        raise UsageError(f"Not a version: {version!r}.", "Write it like 0.20.2.")
    return numbers


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `3.6.0+git12ab` → (3, 6, 0)."""
    found: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def release(version: str) -> str:
    """The leading numbers of a version, as text: `3.6.0+git12ab` → `3.6.0`."""
    return ".".join(map(str, _numbers(version)))


def _config(tactic: Tactic, block_scales: bool, engine: str) -> dict[str, int]:
    """The six tunables in the engines' order, BLOCK_SIZE_K as the measured kernel clamped it to the scale block."""
    if set(tactic) != set(VALUES) or not all(type(value) is int and value > 0 for value in tactic.values()):
        raise UnsupportedError(
            f"{engine}'s kernel has the tunables {', '.join(VALUES)}, positive integers; the profile has {tactic}.",
            "Tune with --backend triton.",
        )
    return {
        name: effective_block_size_k(tactic, block_scales) if name == "BLOCK_SIZE_K" else int(tactic[name])
        for name in VALUES
    }
