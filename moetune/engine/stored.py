"""The stored choices for one op of an engine, from an earlier run of the engine or from `moetune tune`."""

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
from moetune.store.versions import versions_of

if TYPE_CHECKING:
    from moetune.backends.base import Backend

OF_A_CALL = ("op", "call")
"""The strict fields that only a profile measured in an engine has."""
OFFLINE_BACKENDS = ("flashinfer-trtllm", "flashinfer-trtllm-routed")
"""The backends whose profiles of `moetune tune` are compared with an engine's call by FlashInfer's keys."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Loads and saves the choices of one FlashInfer op, for a layer under a regime."""

    store: Store
    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment

    def load(self) -> dict[int, Choice]:
        """Returns the choices by rows. The result is empty if the store has no profile."""
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


def offline_choices(answers: Answers, file_keys: Mapping[int, str]) -> dict[int, Choice]:
    """Returns the choices, by rows, that `moetune tune` measured on this machine for the same calls.

    Two calls are the same if the profile would be exported under FlashInfer's key of the engine's call. Then shapes,
    weight formats and layouts are equal. Costs that are the same for every tactic may differ, such as the quantization
    of the activations.

    Args:
        answers: the stored answers of the engine's op.
        file_keys: FlashInfer's `ProfilingCacheKey.file_key` of the engine's call, by rows.
    """
    if answers.backend not in OFFLINE_BACKENDS:
        return {}
    return {
        choice.rows: choice
        for _, profile in answers.store.profiles()
        if isinstance(profile, Profile) and _matches(answers, profile)
        for choice in profile.choices
        if file_keys.get(choice.rows) in _keys(profile, choice.rows)
    }


def _matches(answers: Answers, profile: Profile) -> bool:
    """Returns whether `profile` is for the same backend, regime, shape and machine."""
    return (
        profile.backend == answers.backend
        and not answers.regime.differing(profile.regime.coarser or profile.regime)
        and profile.layer.shape == answers.layer.shape
        and _same_machine(answers.backend, answers.environment, profile.environment)
    )


def _same_machine(backend: str, engine: Environment, offline: Environment) -> bool:
    ignored = {*OF_A_CALL, *versions_of(backend).neutral}
    wanted = {name: value for name, value in engine.strict.items() if name not in ignored}
    return (
        offline.device == engine.device
        and wanted.items() <= offline.strict.items()
        and not offline.strict.keys() & set(OF_A_CALL)
    )


def _keys(profile: Profile, rows: int) -> frozenset[str]:
    """Returns FlashInfer's keys under which a bucket of `profile` would be exported, if it can be exported."""
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
    """Returns `regime` with a ladder that has the buckets of the engine's op.

    It is the regime's own ladder if that has them, otherwise FlashInfer's, otherwise a list of the buckets. No op has
    the ladder `adaptive`, whose buckets depend on the choices, so `vllm` stands for it. With the
    layout pool, a regime has only the buckets that ep divides.
    """
    regime = regime.coarser or regime
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
    raise AssertionError("the last ladder has all buckets")


def environment_of(backend: str, device: str, flashinfer_version: str, op: str, signature: object) -> Environment:
    """Returns where a choice for `op` is valid: on this machine, with this FlashInfer, for this call with any rows.

    Args:
        backend: the backend's name in the profile.
        device: a torch device.
        flashinfer_version: the version of flashinfer-python.
        op: the tuner's name of the op.
        signature: the rest of FlashInfer's key: shapes without the rows, dtypes, options.
    """
    from moetune.measure.probe import environment

    @dataclass
    class Called:
        name: str = backend

        def environment(self) -> dict[str, str]:
            return {"flashinfer": flashinfer_version, "op": op, "call": digest_of(str(signature))}

    return environment(cast("Backend", Called()), device)


def tolerance_of(layer: MoELayer) -> float:
    """Returns the largest relative error allowed between the outputs of two tactics of an op.

    It is the trtllm-gen backend's tolerance for the layer's precision. The engine may choose the format of the
    activations, so it is the tolerance of the coarsest format. For a precision that the backend does not support, it is
    that of bf16.
    """
    from moetune.backends.flashinfer_trtllm.activations import BF16
    from moetune.backends.flashinfer_trtllm.formats import FORMATS

    fmt = FORMATS.get(layer.precision)
    return max(activations.tolerance for activations in (fmt.choices if fmt else (BF16,)))


def tactic_of(native: Any) -> Tactic:
    """Returns FlashInfer's tactic as a `Tactic`: a pair as trtllm-gen's `tile_n` and `config`, any other as JSON."""
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
    """Returns the FlashInfer tactic from which `tactic_of` made `tactic`. A pair becomes a tuple."""
    if tactic.get("config") == UNTUNED:
        return UNTUNED
    if "tile_n" in tactic:
        return (tactic["tile_n"], tactic["config"])
    from flashinfer.autotuner import _json_to_tactic

    return _json_to_tactic(json.loads(str(tactic["tactic"])))
