"""Writes cache files (v1) that FlashInfer's tuner reads with `autotune(False, cache=…)` or `AutoTuner.load_configs`.

A file is `{"_metadata": {…}, KEY: [runner, tactic] or [runner, tactic, policy], …}` (`save_configs`, `load_configs`).
FlashInfer checks the metadata but not the tactics. A tactic is an index into a list that differs between versions, so
a file is written only for the release of FlashInfer that the profile was measured with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from moetune.backends.flashinfer_cutlass.formats import OPTIONS as CUTLASS_OPTIONS
from moetune.backends.grouped_triton.kernel_versions import numbers
from moetune.errors import UnsupportedError, UsageError
from moetune.export.base import FOLDER, Export
from moetune.export.flashinfer_keys import RUNNER, cutlass_keys, trtllm_keys
from moetune.inputs.flashinfer_versions import VERSIONS, Version
from moetune.spec.ladder import Ladder
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile

BACKENDS: Final = ("flashinfer-cutlass", "flashinfer-trtllm", "flashinfer-trtllm-routed")
TRTLLM_POLICY: Final = ("cuda_graph_profile_replays", 1, "l2_cache_policy", "cold")
"""The policy that the trtllm ops measure with. FlashInfer uses an entry with this policy in tuning mode too."""
WILDCARD: Final = "*"

_USAGE: Final = f"""
One file serves every bucket and rank of this deployment. Do not use it for another deployment: FlashInfer's keys do
not contain the dispatch, so FlashInfer would read the file there too.

In your own engine, keep this context open as long as it serves:

```python
from flashinfer.autotuner import autotune

with autotune(False, cache="{FOLDER}/FILE.json"):
    ...
```

`autotune(False, …)` looks tactics up and never measures. vLLM and SGLang do not read this file: their cache paths are
hashes, and a file with MoE entries alone would leave their other ops untuned. Use moetune's plugin for them.
"""


def export(profile: Profile, version: str | None = None) -> Export:
    """Returns one cache file for all buckets and ranks of the profile's regime.

    A bucket of FlashInfer (`hybrid`) that was not measured gets the tactic that the profile's own ladder looks up for
    its rows.

    Args:
        profile: a profile of one of `BACKENDS`.
        version: FlashInfer's version. [default: the one that the profile was measured with]

    Raises:
        UsageError: moetune does not know the version.
        UnsupportedError: the backend is not one of `BACKENDS`, the op does not tune this layer, the version is not
            the measured one, or the backend cannot list such a tactic.
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
            f"Not measured, so taken from the ladder {profile.regime.ladder}: {', '.join(map(str, guessed))} rows. "
            "Tune with --ladder hybrid to measure FlashInfer's buckets."
        )
    name = f"{profile.backend}-{target.name}-{profile.layer.slug}.json"
    return Export({name: text}, _USAGE, notes=tuple(notes))


def buckets(profile: Profile) -> tuple[int, ...]:
    """Returns every bucket that FlashInfer's look-up can map rows to, in ascending order.

    It has one bucket more than the ladder if the maximum is at most 256 and no power of two, because the look-up
    rounds up past the maximum.
    """
    maximum = profile.regime.tune_max_num_tokens
    hybrid = Ladder(name="hybrid")
    return tuple(sorted({*hybrid.buckets(maximum), hybrid.lookup(max(1, maximum - 1), maximum)}))


def _version(profile: Profile, version: str | None) -> Version:
    if profile.backend not in BACKENDS:
        raise UnsupportedError(
            f"FlashInfer reads tactics of {', '.join(BACKENDS)}; the profile's are of {profile.backend}.",
            f"Tune with --backend {BACKENDS[0]}.",
        )
    measured = profile.environment.strict.get("flashinfer", "")
    wanted = version or measured
    if wanted not in VERSIONS:
        raise UsageError(
            f"moetune does not know the cache keys of FlashInfer {wanted or '(unknown version)'}.",
            f"It knows {', '.join(VERSIONS)}.",
        )
    if _release(wanted) != _release(measured):
        raise UnsupportedError(
            f"The profile's tactics are of FlashInfer {measured or '(unknown version)'}, and {wanted} numbers its "
            "kernels differently.",
            f"Tune with flashinfer-python {wanted}.",
        )
    return VERSIONS[wanted]


def _release(version: str) -> list[str]:
    """Returns the first three parts of a version (`0.7.2.post1` → `0.7.2`): a post-release has the same kernels."""
    return version.split(".")[:3]


def _tactic(profile: Profile, rows: int) -> Tactic:
    """Returns the tactic for `rows` rows in the kernel. FlashInfer does not divide rows; some ladders do."""
    return profile.tactic(rows * profile.regime.ladder.divisor)


def _entries(profile: Profile, version: Version, rows: int, tactic: Tactic) -> Iterator[tuple[str, list[Any]]]:
    layer, regime = profile.layer, profile.regime
    if profile.backend == "flashinfer-cutlass":
        first, second = cutlass_pair(profile, tactic)
        capability = profile.environment.strict.get("compute_capability", "9.0")
        early = numbers(capability)[:1] >= (9,)
        options = {name: value for name, value in profile.environment.strict.items() if name in CUTLASS_OPTIONS}
        for keys in cutlass_keys(version, layer, regime, rows, early, **options):
            yield keys[0], [RUNNER, first]
            yield keys[1], [RUNNER, second]
        return
    policy = [list(TRTLLM_POLICY)] if version.policies else []
    routed, strict = profile.backend.endswith("-routed"), profile.environment.strict
    mxfp4, fp8_block = strict.get("mxfp4_activations", "bf16"), strict.get("fp8_block_layout", "blocked")
    for key in trtllm_keys(version, layer, regime, rows, routed, mxfp4, fp8_block):
        yield key, [RUNNER, list(trtllm_pair(profile, tactic)), *policy]


def cutlass_pair(profile: Profile, tactic: Tactic) -> tuple[int, int]:
    """Returns the numbers of both GEMMs' tactics; −1 is the op's own choice.

    Raises:
        UnsupportedError: the names differ, a value is no integer, or the op's list cannot have these numbers: it has
            all of GEMM1's tactics first and then all of GEMM2's.
    """
    pair = _integers(profile, tactic, ("gemm1", "gemm2"))
    seen = [choice.tactic for choice in profile.choices] + [choice.default_tactic for choice in profile.choices]
    numbers = [_integers(profile, other, ("gemm1", "gemm2")) for other in seen]
    last_first = max(first for first, _ in numbers)
    first_second = min((second for _, second in numbers if second >= 0), default=last_first + 1)
    if last_first >= first_second:
        raise UnsupportedError(
            f"GEMM1's tactic {last_first} and GEMM2's {first_second} cannot be of one list: "
            "each of GEMM1's has a smaller number than any of GEMM2's.",
            "Tune again; the profile was not written by moetune.",
        )
    return pair


def trtllm_pair(profile: Profile, tactic: Tactic) -> tuple[int, int]:
    """Returns `(tile_n, config)`; −1 is the op's own choice.

    Raises:
        UnsupportedError: the names differ, or a value is no integer.
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
    """Returns the metadata that FlashInfer compares; a field that does not change MoE tactics is a wildcard."""
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
