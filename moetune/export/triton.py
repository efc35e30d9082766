"""Reads a profile for vLLM's and SGLang's grouped Triton GEMM, and warns if the engine would run another load.

Both engines look rows M up by the nearest key of a file; `engine_files` has the files' names. Source:
`get_moe_configs` and `try_get_optimal_moe_config` in vLLM's `fused_moe.py` and SGLang's `fused_moe_triton_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from moetune.backends.grouped_triton.engine_files import DTYPES, ConfigFile
from moetune.backends.grouped_triton.kernel_versions import NEWEST, KernelVersion, kernel_version, numbers
from moetune.backends.grouped_triton.space import VALUES, effective_block_size_k, has_remote_slots, swaps_operands
from moetune.errors import UnsupportedError
from moetune.export.fewest import fewest
from moetune.inputs.dispatcher import dispatchers, matching
from moetune.spec.enums import ENGINE_TITLES, Precision
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile

FP8 = (Precision.FP8_BLOCK, Precision.FP8_TENSOR)
Config = tuple[tuple[str, int], ...]
"""The tunables by name, in the engines' order."""


@dataclass(frozen=True, slots=True)
class TritonProfile:
    """Contains what both engines need of a profile.

    `num_experts`: E of rank 0, and E of the last rank if shards are uneven. `configs`: rows M → the six tunables. Of
    equally fast tactics that the engine's version runs as they were measured, those are taken that make the fewest
    configurations. `num_moved`: for how many rows M the choice's own runs in another way there, and another is taken.
    `num_replaced`: for how many other rows M another is taken. `capability`: the device's compute capability. `triton`:
    Triton's version. `remote`: what the kernel did with non-local slots, `drop` or `zero`. `version`: what the measured
    kernel does otherwise.
    """

    profile: Profile
    num_experts: tuple[int, ...]
    configs: dict[int, dict[str, int]]
    num_replaced: int
    capability: tuple[int, ...]
    triton: str
    remote: str
    version: KernelVersion = NEWEST
    num_moved: int = 0

    @classmethod
    def of(cls, profile: Profile, engine: str, target: KernelVersion | None = None) -> TritonProfile:
        """Reads a profile for `engine`.

        Args:
            profile: the profile.
            engine: `vllm` or `sglang`.
            target: what the kernel of the engine's version does. By default what the measured one did. Where it runs
                the choice in another way, an equally fast tactic is taken that it runs as measured; if there is none,
                the choice.

        Raises:
            UnsupportedError: the profile is of another backend, precision or set of tunables, or was not measured on
                a GPU.
        """
        if profile.backend != "triton":
            raise UnsupportedError(
                f"{ENGINE_TITLES[engine]} reads tactics of the backend triton; the profile's are of {profile.backend}.",
                "Tune with --backend triton.",
            )
        layer, regime, strict = profile.layer, profile.regime, profile.environment.strict
        if layer.precision not in DTYPES:
            raise UnsupportedError(
                f"{ENGINE_TITLES[engine]}'s grouped Triton GEMM has no file for {layer.precision.value} experts.",
                f"It has files for {', '.join(DTYPES)}.",
            )
        named = [name for name in ("compute_capability", "triton") if numbers(strict.get(name, ""))]
        named += ["remote"] if strict.get("remote") in ("drop", "zero") else []
        if missing := ", ".join(sorted({"compute_capability", "triton", "remote"} - set(named))):
            raise UnsupportedError(
                f"The profile was measured on {profile.environment.device} and does not say {missing}.",
                "Tune on the GPU that will serve.",
            )
        blocks = layer.precision is Precision.FP8_BLOCK
        capability = numbers(strict["compute_capability"])
        version = kernel_version("vllm", strict["kernel_version"]) if "kernel_version" in strict else NEWEST
        swaps = partial(swaps_operands, fp8=layer.precision in FP8, capability=capability)

        def holds(config: Config) -> bool:
            return target is None or swaps(dict(config), version=version) == swaps(dict(config), version=target)

        options = [_options(choice, blocks, engine) for choice in profile.choices]
        holding = [list(filter(holds, each)) or each[:1] for each in options]
        taken = fewest(holding)
        moved = [option != each[0] and not holds(each[0]) for option, each in zip(taken, options, strict=True)]
        experts = {regime.shard(layer, rank).num_local: None for rank in (0, regime.ep_size - 1)}
        return cls(
            profile,
            tuple(experts),
            {choice.rows: dict(config) for choice, config in zip(profile.choices, taken, strict=True)},
            sum(config != each[0] for config, each in zip(taken, options, strict=True)) - sum(moved),
            capability,
            strict["triton"],
            strict["remote"],
            version,
            sum(moved),
        )

    def file(self, num_experts: int) -> ConfigFile:
        """Returns what names the file of ranks with `num_experts` experts."""
        return ConfigFile.of(self.profile.layer, self.profile.regime, self.profile.environment.device, num_experts)

    @property
    def has_remote_slots(self) -> bool:
        """Whether rows in the kernel have non-local slots (or empty ones: −1)."""
        return has_remote_slots(self.profile.layer, self.profile.regime)

    def warnings(self, engine: str, remote: str) -> Iterator[str]:
        """Yields a sentence for each reason why `engine`, which treats non-local slots by `remote` has another load."""
        regime, title = self.profile.regime, ENGINE_TITLES[engine]
        if regime.dispatch != "none":
            found = [word for word in matching(regime.dispatch, regime.layout) if word.startswith(f"{engine}:")]
            load = regime.layout or regime.dispatch
            if not found:
                yield (
                    f"No dispatcher of {title} produces the {load} load that these tactics were measured under. "
                    f"Tune with --no-dp, or with --dispatch {' or '.join(_reaching_triton(engine))}."
                )
            elif regime.layout == "pool":
                yield (
                    f"With {', '.join(found)} {title} runs FlashInfer's kernels, which do not read this file. "
                    "Tune with a FlashInfer backend."
                )
        if self.has_remote_slots and remote != self.remote:
            does = {
                "drop": "skips non-local slots",
                "zero": "runs blocks of zeros for non-local slots",
            }
            yield (
                f"{title} {does[remote]}; these tactics were measured with a kernel that {does[self.remote]}. "
                f"Tune with --remote {remote}."
            )
        if regime.ladder.divisor > 1:
            yield (
                f"The ladder {regime.ladder} divides run-time rows by {regime.ladder.divisor} and {title} does not. "
                "The file's keys are the rows that were measured."
            )

    def notes(self, engine: str) -> Iterator[str]:
        """Yields a sentence for each difference that needs no action."""
        regime, title = self.profile.regime, ENGINE_TITLES[engine]
        distinct = len({tuple(config.items()) for config in self.configs.values()})
        counts = f"{_counted(distinct, 'configuration')} for {_counted(len(self.configs), 'row count')}"
        replaced = f"; for {self.num_replaced} of these an equally fast tactic stands in, so that there are fewer"
        yield f"The file has {counts}{replaced if self.num_replaced else ''}."
        if self.num_moved:
            yield (
                f"For {_counted(self.num_moved, 'row count')} an equally fast tactic stands in, because this version "
                f"of {title} runs the choice in another way than it was measured."
            )
        if regime.ladder.rounding != "nearest":
            rounds = {"floor": "down", "ceil": "up"}[regime.ladder.rounding]
            yield (
                f"{title} takes the nearest bucket (the smaller of two equally near ones); the ladder {regime.ladder} "
                f"rounds {rounds}. Rows between two buckets can run another tactic than moetune's own look-up gives."
            )
        if missing := [rows for rows in regime.buckets if rows not in self.configs]:
            yield f"Not measured, so not in the file: {', '.join(map(str, missing))} rows."
        if len(self.num_experts) > 1:
            first, last = self.num_experts
            yield f"Shards are uneven: what was measured on {first} experts is written for {last} too."


def _reaching_triton(engine: str) -> list[str]:
    """Returns one dispatcher of the engine for each load that its grouped Triton kernel can get."""
    by_load: dict[str, str] = {}
    for known in dispatchers():
        if known.engine == engine and known.tunable and known.regime.get("layout") not in ("pool", "batched"):
            by_load.setdefault(str(known.regime), str(known))
    return list(by_load.values())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _options(choice: Choice, block_scales: bool, engine: str) -> list[Config]:
    """Returns the configurations that may serve a bucket: its choice's, and those of the equally fast tactics."""
    return [engine_config(tactic, block_scales, engine) for tactic in (choice.tactic, *choice.equally_fast)]


def engine_config(tactic: Tactic, block_scales: bool, engine: str) -> Config:
    """Returns the six tunables in the engines' order. BLOCK_SIZE_K is clamped to the scale block."""
    if set(tactic) != set(VALUES) or not all(type(value) is int and value > 0 for value in tactic.values()):
        raise UnsupportedError(
            f"{ENGINE_TITLES[engine]}'s kernel has the tunables {', '.join(VALUES)}, positive integers; the profile "
            f"has {tactic}.",
            "Tune with --backend triton.",
        )
    return tuple(
        (name, effective_block_size_k(tactic, block_scales) if name == "BLOCK_SIZE_K" else int(tactic[name]))
        for name in VALUES
    )
