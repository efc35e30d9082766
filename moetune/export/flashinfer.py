"""Cache files (v1) of FlashInfer's tuner, as `autotune(False, cache=…)` and `AutoTuner.load_configs` read them.

A file is `{"_metadata": {…}, KEY: [runner, tactic] or [runner, tactic, policy], …}` (`save_configs`, `load_configs`).
FlashInfer checks the metadata and no tactic; a tactic is a place in a list that each version builds anew. So a file is
written only for the release of FlashInfer that the profile was measured with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from moetune.errors import UnsupportedError, UsageError
from moetune.export.base import FOLDER, Export
from moetune.export.flashinfer_keys import RUNNER, cutlass_keys, trtllm_keys
from moetune.inputs.flashinfer_versions import VERSIONS, Version
from moetune.spec.ladder import Ladder
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile

BACKENDS: Final = ("flashinfer-cutlass", "flashinfer-trtllm", "flashinfer-trtllm-routed")
TRTLLM_POLICY: Final = ("cuda_graph_profile_replays", 1, "l2_cache_policy", "cold")
"""How the trtllm ops measure; an entry that says so is a hit in tuning mode too."""
WILDCARD: Final = "*"

_USAGE: Final = f"""
One file serves every bucket and rank of this deployment, and this deployment only: FlashInfer's keys do not say how
tokens reach the experts, so a file of another regime would be found just as well.

In your own engine, around the whole time that it serves:

```python
from flashinfer.autotuner import autotune

with autotune(False, cache="{FOLDER}/FILE.json"):
    ...
```

`autotune(False, …)` looks up and never measures. vLLM and SGLang read no such file (their cache paths are hashes, and
a file with MoE entries alone would leave their other ops untuned): use moetune's plugin there.
"""


def export(profile: Profile, version: str | None = None) -> Export:
    """One cache file for every bucket and every rank of the profile's regime.

    FlashInfer's buckets (`hybrid`) that were not measured get the tactic that the profile's own ladder looks up for
    that many rows.

    Args:
        profile: of one of `BACKENDS`.
        version: of FlashInfer; the one that the profile was measured with when not given.

    Raises:
        UsageError: a version that moetune does not know.
        UnsupportedError: another backend, a layer that the op's tuner does not know, another version than was
            measured with, or a tactic that the backend cannot have listed.
    """
    target = _version(profile, version)
    tactics = {rows: _tactic(profile, rows) for rows in buckets(profile)}
    entries = dict(
        sorted(entry for rows, tactic in tactics.items() for entry in _entries(profile, target, rows, tactic))
    )
    text = json.dumps({"_metadata": _metadata(profile, target), **entries}, indent=2) + "\n"
    measured = {choice.rows for choice in profile.choices}
    guessed = [rows for rows in tactics if rows not in measured]
    notes = [f"{len(entries)} entries for {len(tactics)} buckets."]
    if guessed:
        notes.append(
            f"Not measured, so taken from the ladder {profile.regime.ladder}: {', '.join(map(str, guessed))} rows; "
            "tune with --ladder hybrid to measure FlashInfer's buckets."
        )
    name = f"{profile.backend}-{target.name}-{profile.layer.slug}.json"
    return Export({name: text}, _USAGE, notes=tuple(notes))


def buckets(profile: Profile) -> tuple[int, ...]:
    """Every value that FlashInfer's look-up can map rows to, ascending.

    That is one more than its own buckets where the maximum is no power of two and at most 256: it rounds up past it.
    """
    maximum = profile.regime.tune_max_num_tokens
    hybrid = Ladder(name="hybrid")
    return tuple(sorted({*hybrid.buckets(maximum), hybrid.lookup(max(1, maximum - 1), maximum)}))


def _version(profile: Profile, version: str | None) -> Version:
    if profile.backend not in BACKENDS:
        raise UnsupportedError(
            f"FlashInfer takes tactics of {', '.join(BACKENDS)}; the profile's are of {profile.backend}.",
            f"Tune with --backend {BACKENDS[0]}.",
        )
    measured = profile.environment.strict.get("flashinfer", "")
    wanted = version or measured
    if wanted not in VERSIONS:
        raise UsageError(
            f"moetune does not know the cache keys of FlashInfer {wanted or 'of an unknown version'}.",
            f"It knows {', '.join(VERSIONS)}.",
        )
    if _release(wanted) != _release(measured):
        raise UnsupportedError(
            f"The profile's tactics are of FlashInfer {measured or 'of an unknown version'}, and {wanted} numbers its "
            "kernels anew.",
            f"Tune with flashinfer-python {wanted}.",
        )
    return VERSIONS[wanted]


def _release(version: str) -> list[str]:
    """`0.7.2.post1` → `0.7.2`: a post-release has the same kernels."""
    return version.split(".")[:3]


def _tactic(profile: Profile, rows: int) -> Tactic:
    """The profile's tactic for `rows` rows in the kernel; FlashInfer does not divide them as some ladders do."""
    return profile.tactic(rows * profile.regime.ladder.divisor)


def _entries(profile: Profile, version: Version, rows: int, tactic: Tactic) -> Iterator[tuple[str, list[Any]]]:
    layer, regime = profile.layer, profile.regime
    if profile.backend == "flashinfer-cutlass":
        first, second = cutlass_pair(profile, tactic)
        capability = profile.environment.strict.get("compute_capability", "9.0")
        early = int(capability.partition(".")[0]) >= 9
        for keys in cutlass_keys(version, layer, regime, rows, early):
            yield keys[0], [RUNNER, first]
            yield keys[1], [RUNNER, second]
        return
    policy = [list(TRTLLM_POLICY)] if version.policies else []
    routed, strict = profile.backend.endswith("-routed"), profile.environment.strict
    mxfp4, fp8_block = strict.get("mxfp4_activations", "bf16"), strict.get("fp8_block_layout", "blocked")
    for key in trtllm_keys(version, layer, regime, rows, routed, mxfp4, fp8_block):
        yield key, [RUNNER, list(trtllm_pair(profile, tactic)), *policy]


def cutlass_pair(profile: Profile, tactic: Tactic) -> tuple[int, int]:
    """The numbers of both GEMMs' tactics, −1 for the op's own.

    Raises:
        UnsupportedError: other names, no integers, or numbers that cannot stand in the op's list, in which all of
            GEMM1's tactics come before all of GEMM2's.
    """
    pair = _integers(profile, tactic, ("gemm1", "gemm2"))
    seen = [choice.tactic for choice in profile.choices] + [choice.default_tactic for choice in profile.choices]
    numbers = [_integers(profile, other, ("gemm1", "gemm2")) for other in seen]
    last_first = max(first for first, _ in numbers)
    first_second = min((second for _, second in numbers if second >= 0), default=last_first + 1)
    if last_first >= first_second:
        raise UnsupportedError(
            f"GEMM1's tactic {last_first} and GEMM2's {first_second} cannot be of one list: "
            "GEMM1's tactics all come before GEMM2's.",
            "Tune again; the profile was not written by moetune.",
        )
    return pair


def trtllm_pair(profile: Profile, tactic: Tactic) -> tuple[int, int]:
    """`(tile_n, config)`, −1 for the op's own choice.

    Raises:
        UnsupportedError: other names, or no integers.
    """
    return _integers(profile, tactic, ("tile_n", "config"))


def _integers(profile: Profile, tactic: Tactic, names: tuple[str, str]) -> tuple[int, int]:
    values = [tactic.get(name) for name in names]
    first, second = values
    if set(tactic) != set(names) or type(first) is not int or type(second) is not int or min(first, second) < -1:
        raise UnsupportedError(
            f"A tactic of {profile.backend} has {' and '.join(names)}, integers from −1; the profile has {tactic}.",
            "Tune again; the profile was not written by moetune.",
        )
    return first, second


def _metadata(profile: Profile, version: Version) -> dict[str, str]:
    """What FlashInfer compares with its process; what does not change MoE tactics is a wildcard."""
    cuda = profile.environment.strict.get("cuda", WILDCARD)
    return {
        "flashinfer_version": version.name,
        "cuda_version": cuda,
        "cublas_version": WILDCARD,
        "cudnn_version": WILDCARD,
        "cudnn_frontend_version": WILDCARD,
        "cutlass_dsl_version": WILDCARD,
        "gpu": profile.environment.device,
    }
