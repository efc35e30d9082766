"""`Question`: layer, regime, backend, environment and store together, with all defaults filled in."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.errors import MissError, UnsupportedError, UsageError
from moetune.inputs.presets import layer as layer_of
from moetune.quoting import quoted
from moetune.recordings.recording import known, recording_of
from moetune.spec.enums import DISTRIBUTION_VARIABLE
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.journal import Journal
from moetune.store.key import Key
from moetune.store.match import Match
from moetune.store.miss import taken_hint
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store
from moetune.store.versions import DEPLOYED
from moetune.tuning.refine import missing_buckets

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.enums import RankWord, Strategy


_OF_DEVICE = ("compute_capability", "cpu", "threads")
"""The strict fields of an environment that belong to the device, not to a version."""
NEAR = "near"
"""Names the nearest stored profile as the one to start from."""


@dataclass(frozen=True, slots=True)
class Question:
    """The key of a stored profile, the store that may hold it, and the device that measures it.

    `near`: whether a stored profile of other versions answers it, if none matches. `elsewhere`: whether the device is
    one that was named; a profile answers whatever torch and Triton it was measured with, as nothing runs on it here.
    """

    layer: MoELayer
    regime: Regime
    backend: Backend
    environment: Environment
    store: Store
    device: str
    near: bool = False
    elsewhere: bool = False

    @classmethod
    def of(
        cls,
        layer: MoELayer | str,
        regime: Regime,
        backend: str | Backend = "auto",
        store: Store | Path | str | None = None,
        device: str | None = None,
        rank: RankWord | int | None = None,
        near: bool = False,
    ) -> Question:
        """Returns the question with all defaults filled in; the arguments are those of `load`.

        Raises:
            UsageError: the regime does not fit the layer, a name is unknown, or there is no such rank.
        """
        from moetune.backends import registry
        from moetune.measure.probe import device_for, environment

        layer, regime = resolved(layer, regime, rank)
        chosen = registry.chosen(backend, layer, regime)
        device = device_for(device)
        store = store if isinstance(store, Store) else Store(store)
        return cls(layer, regime, chosen, environment(chosen, device), store, device, near)

    def on_device(self, name: str) -> Question:
        """Returns the question for a machine with the device `name`, whose versions are not known.

        What belongs to the device, such as its compute capability, is taken from a stored profile of it.

        Raises:
            UsageError: the name is empty, or has characters that cannot be printed.
        """
        if not name.strip() or not name.isprintable():
            raise UsageError(
                f"--device-name must be a GPU's name, given {quoted(name)}.",
                "Give what torch.cuda.get_device_name() says on its machine, such as 'NVIDIA H200'.",
            )
        profiles = [profile for _, profile in self.store.profiles() if isinstance(profile, Profile)]
        devices = {profile.environment.device.lower(): profile.environment for profile in profiles}
        found = devices.get(name.lower()) or Environment(device=name, strict={})
        kernel = {field: value for field, value in self.environment.strict.items() if field not in _OF_DEVICE}
        own = {field: value for field, value in found.strict.items() if field in _OF_DEVICE}
        strict = {field: value for field, value in {**own, **kernel}.items() if field not in DEPLOYED}
        return replace(self, environment=Environment(device=found.device, strict=strict), elsewhere=True)

    def load(self) -> Profile:
        """Returns the stored profile. Raises the errors of `match`."""
        return self.match().profile

    def match(self) -> Match:
        """Returns the stored profile, its file, and the fields in which it differs.

        Raises:
            MissError: there is none; the error names every field in which the nearest stored profile differs. Its
                hint does not ask to tune on a machine on which the backend cannot run.
        """
        question = (self.layer, self.regime, self.backend.name, self.environment)
        try:
            found = self.store.match(*question, near=self.near or self.elsewhere)
            if self.elsewhere and found.near.keys() - DEPLOYED:
                found = self.store.match(*question, near=self.near)
            return found
        except MissError as miss:
            raise miss.hinting(f"{self._way_to_measure(miss)} {taken_hint(miss.taken_with)}".rstrip()) from None

    def _way_to_measure(self, miss: MissError) -> str:
        near = ", or give --near" if miss.near else ""
        if self.elsewhere:
            return f"On a machine with this GPU, run `moetune tune` with the same options, without --device-name{near}."
        if (obstacle := self.backend.unavailable()) is not None:
            return (
                f"Backend {self.backend.name} cannot run here: {obstacle[0]}. Run `moetune tune` with the same options "
                f"on a machine with the GPU that you deploy on{near}."
            )
        return miss.hint

    def found(self, *, exact: bool = False) -> Match | None:
        """Returns what answers the question as a whole; else the profile of this very environment; None if none.

        A profile of another environment or ladder answers with all its buckets or not at all. Some choices of it in a
        profile of this environment would hide what they were measured with. With `exact` it must be of this environment
        and ladder.
        """
        question = self.layer, self.regime, self.backend.name, self.environment
        with suppress(MissError):
            match = self.store.match(*question, near=self.near, exact=exact)
            if not match.differences or not missing_buckets(match.profile.regime, match.profile):
                return match
        return None

    def start(self, given: Profile | Path | str) -> Match:
        """Returns the profile whose tactics a tune of this question checks, and in what it differs from the question.

        Args:
            given: the profile, its file, or `near`: the stored profile that matches or is nearest.

        Raises:
            UsageError: there is no such file, the profile is empty, or it is of another layer or backend.
            MissError: `near`, and no stored profile differs in versions only.
        """
        key = Key(self.layer, self.regime, self.backend.name, self.environment)
        if given == NEAR:
            try:
                return self.store.match(*key, near=True)
            except MissError as miss:
                hint = "Leave out --start to search, or give it a profile's path."
                raise miss.hinting(hint) from None
        profile = given if isinstance(given, Profile) else self.store.read(given)
        path = Path() if isinstance(given, Profile) else Path(given)
        if (profile.layer.shape, profile.backend) != (self.layer.shape, self.backend.name) or not profile.choices:
            raise UsageError(
                f"--start: {profile!r} cannot start a tune of {self.layer.name} by {self.backend.name}.",
                "Give a profile with choices, of the same layer and backend; `moetune store list` shows them.",
            )
        return Match(path, profile, key.differences(profile))

    def ensure_writable(self) -> None:
        """Checks that the profile can be saved. Raises the errors of `Store.ensure_writable`."""
        self.store.ensure_writable(self.layer, self.regime, self.backend.name, self.environment)

    def journal(self) -> Journal:
        """Returns the journal of a tune of this question."""
        return self.store.journal(self.layer, self.regime, self.backend.name, self.environment)

    def profile(self, *choices: Choice) -> Profile:
        """Returns a profile with some buckets' choices."""
        return Profile(
            layer=self.layer,
            regime=self.regime,
            backend=self.backend.name,
            environment=self.environment,
            choices=choices,
            recording=None if (found := known(self.regime)) is None else found.summary,
        )

    def require_support(self) -> None:
        """Checks that the backend can measure this question.

        Raises:
            UnsupportedError: the backend does not compute the layer or cannot run on this machine.
        """
        if reason := self.backend.unsupported(self.layer, self.regime):
            raise UnsupportedError(f"Backend {self.backend.name} does not compute {self.layer.name}: {reason}.")
        if missing := self.backend.unavailable():
            raise UnsupportedError(f"Backend {self.backend.name} cannot run here: {missing[0]}.", missing[1])


def resolved(layer: MoELayer | str, regime: Regime, rank: RankWord | int | None = None) -> tuple[MoELayer, Regime]:
    """Returns the layer that is meant, and the regime with its distribution and the rank that is measured.

    The paths of recordings are replaced by the digests of their ids.

    Args:
        layer: a layer, a preset's name, or a path to a Hugging Face config.json.
        regime: takes its distribution from `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` if it was constructed without.
        rank: as in `workload.ranks.of_rank`.

    Raises:
        UsageError: the regime does not fit the layer, a name is unknown, there is no such rank, or the recording cannot
            be read or is of another layer.
    """
    from moetune.workload.ranks import of_rank

    layer = layer if isinstance(layer, MoELayer) else layer_of(layer)
    regime = regime.with_default_distribution(os.environ.get(DISTRIBUTION_VARIABLE))
    if any(replay.digest is None for replay in regime.recordings):
        from moetune.recordings.reading import with_digest  # imports torch

        regime = with_digest(regime)
        for part in regime.parts:
            if part.replay:
                recording_of(layer, part)
    return layer, of_rank(layer, regime, rank)


def check_options(
    frozen: bool,
    again: bool,
    time_budget_s: float | None,
    near: bool = False,
    start: bool = False,
    strategy: Strategy = "auto",
) -> None:
    """Checks the options of `tune` that may contradict each other.

    Raises:
        UsageError: `frozen` is given with `again`, `near` without `frozen`, `start` with `frozen` or the exhaustive
            strategy, or the time budget is not positive.
    """
    if time_budget_s is not None and not time_budget_s > 0:
        raise UsageError(f"The time budget must be positive, given {time_budget_s:g} s.")
    if frozen and again:
        raise UsageError("--frozen never measures and --again always does.", "Give one of them.")
    if start and (frozen or strategy != "auto"):
        other = "--frozen never measures" if frozen else f"--strategy {strategy} measures all"
        raise UsageError(f"--start measures a few tactics, {other}.", "Give one of them.")
    if near and not frozen:
        raise UsageError(
            "--near serves a stored profile of other versions, and nothing is measured.",
            "Add --frozen, or give --start near to check its tactics here.",
        )
