"""Writes cache files that TensorRT-LLM's AutoTuner reads (`autotune(cache_path=…)`, `TLLM_AUTOTUNER_CACHE_PATH`).

A file is `{"metadata": {…}, "shared": {}, "rank_0": {KEY: {"runner_id", "tactic", "min_time"}, …}, …}`. Each rank tunes
its MoE ops alone, so every rank has its own entries. `tactic` is the `repr` of `[tile_n, config]`, `min_time` is in
milliseconds (`AutoTunerProfilingCache`). TensorRT-LLM does not compare the metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final

from moetune.backends.grouped_triton.kernel_versions import numbers
from moetune.errors import UnsupportedError, UsageError
from moetune.export.base import FOLDER, Export
from moetune.export.flashinfer import trtllm_pair
from moetune.export.trtllm_keys import Runner, Spelling, Version, keys, runner, spellings
from moetune.quoting import quoted
from moetune.spec.enums import Precision
from moetune.spec.ladder import Ladder
from moetune.store.profile import Choice, Profile

BACKENDS: Final = ("flashinfer-trtllm", "flashinfer-trtllm-routed")
OLDEST: Final = (1, 2)
"""The first release whose files have one object per rank."""
NEWEST: Final = "1.3.0"
_ACTIVATIONS: Final = {Precision.NVFP4: "nvfp4", Precision.FP8_BLOCK: "fp8_block"}

_USAGE: Final = f"""
Set `TLLM_AUTOTUNER_CACHE_PATH={FOLDER}/FILE.json` for every rank of `trtllm-serve`, or use `autotune(cache_path=…)`
around your own warm-up. The MoE backend must be `TRTLLM`. Give the engine a copy of the file: it measures the entries
that are missing and writes them into the file.

Use the file for this deployment only: the keys of most versions contain neither ep nor attention DP.
"""
_NUMBERING: Final = (
    "`config` is a kernel's number in FlashInfer's trtllm-gen build. The file is right only if TensorRT-LLM was built "
    "with the same kernels in the same order. TensorRT-LLM does not check the tactics that it loads."
)


def export(profile: Profile, version: str | None = None) -> Export:
    """Returns one cache file for all buckets and ranks of the profile's regime.

    TensorRT-LLM's buckets are the powers of two up to 8192, or up to the maximum if that is larger. Under attention DP
    it divides the rows by ep first. Each bucket gets the tactic that `lookups` returns. If moetune does not know how a
    version spells its keys, the file contains every spelling and a note says so.

    Args:
        profile: a profile of one of `BACKENDS`.
        version: TensorRT-LLM's version, which decides the keys' spelling, such as `1.3.0rc25` or `1.3.0`.

    Raises:
        UsageError: `version` is no version, or its files have another format.
        UnsupportedError: the backend is not one of `BACKENDS`, the rows have one slot, no runner computes the layer,
            or the backend cannot list such a tactic.
    """
    if profile.backend not in BACKENDS:
        raise UnsupportedError(
            f"TensorRT-LLM reads tactics of {' and '.join(BACKENDS)}; the profile's are of {profile.backend}.",
            f"Tune with --backend {BACKENDS[1]}.",
        )
    regime = profile.regime
    if regime.layout == "slot":
        raise UnsupportedError(
            "No dispatcher of TensorRT-LLM gives these kernels rows of one slot.",
            "Tune with --dispatch trtllm:attention_dp, or the name of your TRTLLM_FORCE_COMM_METHOD.",
        )
    known, wanted = _runner(profile), _version(version)
    spelled = spellings(known, None if version is None else _parsed(wanted))
    ranks = {
        f"rank_{rank}": dict(_entries(profile, known, rank % regime.ep_size, spelled))
        for rank in range(regime.ep_size * regime.tp_size)
    }
    document = {"metadata": _metadata(profile, wanted), "shared": {}, **ranks}
    count = len(ranks["rank_0"])
    notes = [f"{known.name}: {count} entries for each of {len(ranks)} ranks."]
    if len(spelled) > 1:
        notes.append(
            f"The keys of {known.name} are spelled in {len(spelled)} ways (#15297, #17328, #18189), and moetune does "
            f"not know {f'the one of {version}' if version else 'yours without --for-version'}. The file has them all."
        )
    name = f"trtllm-{known.op}-{profile.layer.slug}.json"
    return Export(
        {name: json.dumps(document, indent=2) + "\n"},
        _USAGE,
        variables={"TLLM_AUTOTUNER_CACHE_PATH": f"{FOLDER}/{name}"},
        warnings=(_NUMBERING,),
        notes=tuple(notes),
    )


def lookups(profile: Profile) -> dict[int, Choice]:
    """Returns the choice of each of TensorRT-LLM's buckets: that for the fewest rows which are looked up there.

    All slots of a packed row are local, and ep rows of a real step have as many local slots in the mean. So the
    tuner's bucket, the rows divided by ep, is a bucket of packed rows (#13667). Other layouts and an all-gather count
    real rows.
    """
    regime = profile.regime
    real_rows = regime.attention_dp and regime.layout != "packed"
    factor = regime.ep_size if real_rows else regime.ladder.divisor
    largest = regime.tune_max_num_tokens * regime.ladder.divisor // factor
    buckets = Ladder(name="pow2").buckets(max(largest, 8192))
    return {bucket: profile.choice(bucket * factor) for bucket in buckets}


def _runner(profile: Profile) -> Runner:
    precision, strict = profile.layer.precision, profile.environment.strict
    if precision is Precision.FP8_BLOCK and strict.get("fp8_block_layout", "blocked") != "plain":
        raise UnsupportedError(
            "TensorRT-LLM multiplies fp8 blocks in the layout of the checkpoint; the profile's tactics are of the "
            "kernels for shuffled blocks.",
            f"Tune with --backend {profile.backend} --backend-option fp8_block_layout=plain.",
        )
    measured = strict.get("mxfp4_activations", "bf16") if precision is Precision.MXFP4 else _ACTIVATIONS.get(precision)
    return runner(precision, strict.get("activations") or measured or precision.value)


def _entries(
    profile: Profile, known: Runner, ep_rank: int, spelled: tuple[Spelling, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for bucket, choice in lookups(profile).items():
        tactic = repr(list(trtllm_pair(profile, choice.tactic)))
        for spelling in spelled:
            for key in keys(known, profile.layer, profile.regime, ep_rank, bucket, spelling):
                yield key, {"runner_id": 0, "tactic": tactic, "min_time": choice.time_us / 1000}


def _version(version: str | None) -> str:
    wanted = version or NEWEST
    parts = wanted.split(".")
    if len(parts) < 2 or not all(part.isdecimal() and len(part) <= 9 for part in parts[:2]):
        raise UsageError(f"Not a version of TensorRT-LLM: {quoted(wanted)}.", "Write it like 1.3.0.")
    if tuple(map(int, parts[:2])) < OLDEST:
        raise UsageError(
            f"moetune does not write cache files for TensorRT-LLM {wanted}: its keys contain hashes of a process.",
            f"Give --for-version {'.'.join(map(str, OLDEST))} or newer.",
        )
    return wanted


def _parsed(version: str) -> Version:
    """Returns `1.3.0rc25` as (1, 3, 0, 25). A release has ∞ for the candidate; a missing part is 0."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(?:rc(\d{1,9}))?", version)
    assert found is not None
    major, minor, patch, candidate = found.groups()
    return int(major), int(minor), int(patch or 0), math.inf if candidate is None else int(candidate)


def _metadata(profile: Profile, version: str) -> dict[str, Any]:
    capability = profile.environment.strict.get("compute_capability", "10.0")
    return {
        "lib_version": version,
        "creation_timestamp": max(choice.measured_time.timestamp() for choice in profile.choices),
        "device_name": profile.environment.device,
        "device_capability": list(numbers(capability)),
    }
