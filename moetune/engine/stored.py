"""Stored choices for one op of the engine, from an earlier engine run or from `moetune tune`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moetune.errors import MissError, StoreError, UnsupportedError
from moetune.export.flashinfer_keys import trtllm_keys
from moetune.inputs.flashinfer_versions import VERSIONS
from moetune.spec.environment import Environment
from moetune.spec.ladder import Ladder
from moetune.spec.layer import MoELayer
from moetune.spec.model import digest_of
from moetune.spec.regime import Regime
from moetune.spec.tactic import UNTUNED, Tactic
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

if TYPE_CHECKING:
    from moetune.backends.base import Backend

OF_A_CALL = ("op", "call")
"""Strict fields that only profiles measured in an engine have."""
OFFLINE_BACKENDS = ("flashinfer-trtllm", "flashinfer-trtllm-routed")


@dataclass(frozen=True, slots=True)
class Answers:
    """The stored choices of a layer under a regime, by one of FlashInfer's ops as this engine calls it."""

    store: Store
    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment

    def load(self) -> dict[int, Choice]:
        """Returns the choices by rows; none if the store has no profile."""
        try:
            profile = self.store.load(self.layer, self.regime, self.backend, self.environment)
        except MissError:
            return {}
        return {choice.rows: choice for choice in profile.choices}

    def save(self, choices: Sequence[Choice]) -> str | None:
        """Saves the choices. Returns why they could not be saved, or None."""
        profile = Profile(
            layer=self.layer,
            regime=self.regime,
            backend=self.backend,
            environment=self.environment,
            choices=tuple(sorted(choices, key=lambda choice: choice.rows)),
        )
        try:
            self.store.save(profile)
        except StoreError as error:
            return str(error)
        return None


def offline_choices(asked: Answers, file_keys: Mapping[int, str]) -> dict[int, Choice]:
    """Returns the choices, by rows, that `moetune tune` measured on this machine for the same calls.

    Two calls are the same if FlashInfer's key of the engine's call is one under which the profile would be exported.
    Then shapes, weight formats and layouts agree. Costs that are equal for every tactic may differ: quantizing the
    activations, a cast of the output.

    Args:
        asked: the stored answers of the engine's op.
        file_keys: FlashInfer's `ProfilingCacheKey.file_key` of the engine's call, by rows.
    """
    if asked.backend not in OFFLINE_BACKENDS:
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


def regime_of_buckets(regime: Regime, buckets: Sequence[int]) -> Regime:
    """`regime` with the ladder of the engine's op: its own if that has these buckets, else FlashInfer's, else a list.

    Under the layout pool only the buckets that ep divides are a regime's.
    """
    largest = max(buckets)
    ladders: list[tuple[Ladder | tuple[int, ...], int]] = [
        (regime.ladder, regime.tune_max_num_tokens),
        (Ladder(name="hybrid"), regime.tune_max_num_tokens),
        (Ladder(name="hybrid"), largest),
        (tuple(sorted(set(buckets))), largest),
    ]
    fields = {name: getattr(regime, name) for name in Regime.model_fields}
    for ladder, maximum in ladders:
        sizes = ladder.buckets(maximum) if isinstance(ladder, Ladder) else ladder
        if set(buckets) <= set(sizes):
            return Regime(**{**fields, "ladder": ladder, "tune_max_num_tokens": maximum})
    raise AssertionError("a list holds its own buckets")


def environment_of(backend: str, device: str, flashinfer_version: str, op: str, signature: object) -> Environment:
    """Where a choice for `op` holds: on this machine, in this FlashInfer, for the same call but for the rows.

    Args:
        backend: the name that the profile has.
        device: a torch device.
        flashinfer_version: the library's.
        op: the tuner's name of it.
        signature: all else in FlashInfer's own key: shapes without rows, dtypes, options.
    """
    from moetune.measure.probe import environment

    @dataclass
    class Called:
        name: str = backend

        def environment(self) -> dict[str, str]:
            return {"flashinfer": flashinfer_version, "op": op, "call": digest_of(str(signature))}

    return environment(cast("Backend", Called()), device)


def tolerance_of(layer: MoELayer) -> float:
    """How far two tactics of an op may be apart: the trtllm-gen backend's tolerance of the layer's precision.

    The activations are the engine's own choice, so it is that of the coarsest; bf16's where there is no such backend.
    """
    from moetune.backends.flashinfer_trtllm.activations import BF16
    from moetune.backends.flashinfer_trtllm.formats import FORMATS

    fmt = FORMATS.get(layer.precision)
    return max(activations.tolerance for activations in (fmt.choices if fmt else (BF16,)))


def tactic_of(native: Any) -> Tactic:
    """FlashInfer's tactic as a `Tactic`: trtllm-gen's `[tile_n, config]` by name, any other as its JSON."""
    if native == UNTUNED:
        return Tactic(tile_n=UNTUNED, config=UNTUNED)
    from flashinfer.autotuner import _tactic_to_json

    plain = _tactic_to_json(native)
    match plain:
        case [int(tile_n), int(config)]:
            return Tactic(tile_n=tile_n, config=config)
        case _:
            return Tactic(tactic=json.dumps(plain))


def native_of(tactic: Tactic) -> Any:
    """FlashInfer's tactic that `tactic_of` read; a pair comes back as a tuple, as FlashInfer's files give it."""
    if tactic.get("config") == UNTUNED:
        return UNTUNED
    if "tile_n" in tactic:
        return (tactic["tile_n"], tactic["config"])
    from flashinfer.autotuner import _json_to_tactic

    return _json_to_tactic(json.loads(str(tactic["tactic"])))
