"""Defines what a plan says beside the load: the kernels that run it, and the nearest stored profile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from moetune.errors import MissError, Plain
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.store.match import Match
from moetune.store.versions import KERNEL_FIELDS
from moetune.tuning.question import Question


class Kernels(FrozenModel):
    """The kernels that run a plan's experts: those of `Plan.backend`.

    `engine`: the engine whose launch line or dispatcher was given. `selected`: whether the command selects the backend;
    if not, moetune chose it. `computing`: the backends that tune the layer, on any machine, and the selected one if
    it is a rival that computes it. `runs_here`: whether the backend can run on this machine. `flags`: what selects the
    backend, by engine. `preferred`: what the engine prefers to these kernels if nothing selects them, by GPU
    generation. `routed_by`: whether the `engine` chooses the experts of a token and passes their ids, or the `kernel`
    chooses them from the router's logits.
    """

    engine: str | None
    selected: bool
    computing: tuple[str, ...]
    runs_here: bool
    flags: dict[str, str]
    preferred: dict[str, str]
    routed_by: Literal["engine", "kernel"] = "engine"


class NearestProfile(FrozenModel):
    """The stored profile that answers a question, or the nearest one.

    `path`: its file. `packaged`: whether it comes with moetune. `layer`: its layer's name. `backend`, `device`: what
    was measured, and on what. `differing`: the fields in which it differs from the question, each with `wanted` and
    `stored`; empty if it answers the question. `near`: if it differs in versions only, those that can change
    the rank of a tactic. `neutral`: the versions in which it differs that cannot. `measured_ladder`: its ladder, if it
    answers (or would, but for versions) with fewer buckets than the question's ladder has. `taken_with`: the options
    with which `moetune show` and `export` take it; empty if it answers, or if there are none.
    """

    path: str
    packaged: bool
    layer: str
    backend: str
    device: str
    differing: dict[str, dict[str, Plain]]
    near: dict[str, dict[str, Plain]] = {}
    neutral: dict[str, dict[str, Plain]] = {}
    measured_ladder: str | None = None
    taken_with: tuple[str, ...] = ()

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
        """The fields in which it differs, of what one backend's kernel does and then of the regime."""
        kernel = () if "backend" in self.differing else KERNEL_FIELDS
        names = sorted(self.differing, key=lambda name: name not in kernel)
        return tuple(name for name in names if name in kernel or name in Regime.model_fields)


def nearest_profile(questions: Iterable[Question], *, any_backend: bool = True) -> NearestProfile | None:
    """Returns the stored profile that answers one of the questions, or the nearest to the first of them.

    Args:
        questions: the questions, one for each backend that may have a profile.
        any_backend: whether a profile of another backend than the questions' may be the nearest.

    Returns:
        The profile; None if none is stored.

    Raises:
        StoreError: a profile that answers is damaged or was written by a newer moetune.
    """
    nearest: NearestProfile | None = None
    for question in questions:
        try:
            return _described(question, question.match(), answers=True)
        except MissError as miss:
            if miss.nearest is not None and (nearest is None or (miss.near and not nearest.near)):
                stored = Match(miss.nearest, question.store.read(miss.nearest), miss.differences)
                if not any_backend and stored.profile.backend != question.backend.name:
                    continue
                nearest = _described(question, stored, near=miss.near, taken_with=miss.taken_with)
    return nearest


def _described(
    question: Question,
    match: Match,
    *,
    answers: bool = False,
    near: bool = False,
    taken_with: tuple[str, ...] = (),
) -> NearestProfile:
    return NearestProfile(
        path=str(match.path),
        packaged=question.store.is_packaged(match.path),
        layer=match.profile.layer.name,
        backend=match.profile.backend,
        device=match.profile.environment.device,
        differing={} if answers else {each.field: each.plain() for each in match.differences},
        near=match.near if answers or near else {},
        neutral=match.neutral if answers or near else {},
        measured_ladder=match.measured_ladder if answers or near else None,
        taken_with=taken_with,
    )
