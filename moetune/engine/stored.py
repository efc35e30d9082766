"""What the moetune store knows of one op of the engine, bucket by bucket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moetune.errors import MissError, StoreError
from moetune.spec.environment import Environment
from moetune.spec.ladder import Ladder
from moetune.spec.layer import MoELayer
from moetune.spec.model import digest_of
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

if TYPE_CHECKING:
    from moetune.backends.base import Backend

DEFAULT_CONFIG = -1
"""FlashInfer's own tactic of every runner: its built-in heuristic."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The stored choices of a layer under a regime, by one of FlashInfer's ops as this engine calls it."""

    store: Store
    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment

    def load(self) -> dict[int, Choice]:
        """The choices by rows; empty where the store has none."""
        try:
            profile = self.store.load(self.layer, self.regime, self.backend, self.environment)
        except MissError:
            return {}
        return {choice.rows: choice for choice in profile.choices}

    def save(self, choices: Sequence[Choice]) -> str | None:
        """Adds the choices; why they could not be kept, or None."""
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
    from moetune.backends.flashinfer_trtllm.formats import FORMATS, INTERMEDIATE_TOLERANCES

    fmt = FORMATS.get(layer.precision)
    return max(INTERMEDIATE_TOLERANCES[of] for of in (fmt.activations if fmt else ("bf16",)))


def tactic_of(native: Any) -> Tactic:
    """FlashInfer's tactic as a `Tactic`: trtllm-gen's `[tile_n, config]` by name, any other as its JSON."""
    if native == DEFAULT_CONFIG:
        return Tactic(tile_n=DEFAULT_CONFIG, config=DEFAULT_CONFIG)
    from flashinfer.autotuner import _tactic_to_json

    plain = _tactic_to_json(native)
    match plain:
        case [int(tile_n), int(config)]:
            return Tactic(tile_n=tile_n, config=config)
        case _:
            return Tactic(tactic=json.dumps(plain))


def native_of(tactic: Tactic) -> Any:
    """FlashInfer's tactic that `tactic_of` read; a pair comes back as a tuple, as FlashInfer's files give it."""
    if tactic.get("config") == DEFAULT_CONFIG:
        return DEFAULT_CONFIG
    if "tile_n" in tactic:
        return (tactic["tile_n"], tactic["config"])
    from flashinfer.autotuner import _json_to_tactic

    return _json_to_tactic(json.loads(str(tactic["tactic"])))
