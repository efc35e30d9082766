"""What `moetune tune` measured for FlashInfer's trtllm-gen ops before the engine started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moetune.errors import UnsupportedError
from moetune.export.flashinfer_keys import VERSIONS, trtllm_keys
from moetune.spec.environment import Environment
from moetune.store.profile import Choice, Profile

if TYPE_CHECKING:
    from moetune.engine.stored import Answers

OF_A_CALL = ("op", "call")
"""Strict fields that only an engine's own answers have: which op was called, and how."""
BACKENDS = ("flashinfer-trtllm", "flashinfer-trtllm-routed")


def load(asked: Answers, file_keys: Mapping[int, str]) -> dict[int, Choice]:
    """The choices by rows of profiles that were tuned without an engine, on this machine, for the same calls.

    A call is the same if FlashInfer's key of it is one of those under which the profile would be exported: so shapes,
    weight formats and layouts agree. What was timed with the op may differ (whether activations arrive quantized, a
    cast of the output): it is the same for every tactic.

    Args:
        asked: the engine's question.
        file_keys: FlashInfer's `ProfilingCacheKey.file_key` of the engine's call, by rows.
    """
    if asked.backend not in BACKENDS:
        return {}
    return {
        choice.rows: choice
        for _, profile in asked.store.profiles()
        if isinstance(profile, Profile) and _is_asked(asked, profile)
        for choice in profile.choices
        if file_keys.get(choice.rows) in _keys(profile, choice.rows)
    }


def _is_asked(asked: Answers, profile: Profile) -> bool:
    return (
        profile.backend == asked.backend
        and not asked.regime.differing(profile.regime)
        and profile.layer.shape == asked.layer.shape
        and _same_machine(asked.environment, profile.environment)
    )


def _same_machine(engine: Environment, offline: Environment) -> bool:
    wanted = {name: value for name, value in engine.strict.items() if name not in OF_A_CALL}
    return (
        offline.device == engine.device
        and wanted.items() <= offline.strict.items()
        and not offline.strict.keys() & set(OF_A_CALL)
    )


def _keys(profile: Profile, rows: int) -> frozenset[str]:
    strict = profile.environment.strict
    version = VERSIONS.get(strict["flashinfer"].partition("+")[0])
    options = {name: strict[name] for name in ("mxfp4_activations", "fp8_block_layout") if name in strict}
    if version is None:
        return frozenset()
    routed = profile.backend.endswith("-routed")
    try:
        return frozenset(trtllm_keys(version, profile.layer, profile.regime, rows, routed, **options))
    except UnsupportedError:
        return frozenset()
