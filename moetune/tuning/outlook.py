"""Defines what a plan says beside the load: the kernels that run it, and the nearest stored profile."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moetune.errors import Difference, MissError, Plain
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning.question import Question


class Kernels(FrozenModel):
    """The kernels that run a plan's experts: those of `Plan.backend`.

    `engine`: the engine whose launch line or dispatcher was given. `selected`: whether the command selects the backend;
    if not, moetune chose it. `computing`: the backends that compute the layer, on any machine. `runs_here`: whether the
    backend can run on this machine. `flags`: what selects the backend, by engine. `preferred`: what the engine prefers
    to these kernels if nothing selects them, by GPU generation.
    """

    engine: str | None
    selected: bool
    computing: tuple[str, ...]
    runs_here: bool
    flags: dict[str, str]
    preferred: dict[str, str]


class NearestProfile(FrozenModel):
    """The stored profile that answers a question, or the nearest one.

    `path`: its file. `packaged`: whether it comes with moetune. `layer`: its layer's name. `backend`, `device`: what
    was measured, and on what. `differing`: the fields in which it differs from the question, each with `wanted` and
    `stored`; empty if it answers the question.
    """

    path: str
    packaged: bool
    layer: str
    backend: str
    device: str
    differing: dict[str, dict[str, Plain]]

    @property
    def answers(self) -> bool:
        """Whether it is used for the question."""
        return not self.differing

    @property
    def other_layer(self) -> bool:
        """Whether its layer has another shape."""
        return not self.differing.keys().isdisjoint(MoELayer.model_fields)

    @property
    def other_deployment(self) -> tuple[str, ...]:
        """The regime's fields in which it differs."""
        return tuple(name for name in self.differing if name in Regime.model_fields)


def nearest_profile(questions: Iterable[Question]) -> NearestProfile | None:
    """Returns the stored profile that answers one of the questions, or the nearest to the first of them.

    Args:
        questions: the questions, one for each backend that may have a profile.

    Returns:
        The profile; None if nothing is stored.

    Raises:
        StoreError: a profile that answers is damaged or was written by a newer moetune.
    """
    nearest: NearestProfile | None = None
    for question in questions:
        try:
            path, profile = question.store.find(
                question.layer, question.regime, question.backend.name, question.environment
            )
        except MissError as miss:
            if nearest is None and miss.nearest is not None:
                nearest = _described(question, miss.nearest, question.store.read(miss.nearest), miss.differences)
        else:
            return _described(question, path, profile)
    return nearest


def _described(
    question: Question, path: Path, profile: Profile, differences: tuple[Difference, ...] = ()
) -> NearestProfile:
    return NearestProfile(
        path=str(path),
        packaged=question.store.is_packaged(path),
        layer=profile.layer.name,
        backend=profile.backend,
        device=profile.environment.device,
        differing={each.field: each.plain() for each in differences},
    )
