"""`CallAnswers`: what moetune's store says of the calls of an engine's function that runs whole experts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, Final

from moetune.engine.session import AskedShape, Session
from moetune.errors import MoetuneError
from moetune.spec.tactic import Tactic
from moetune.tuning.refine import tuned_choice

if TYPE_CHECKING:
    from moetune.store.match import Match

_UNKNOWN: Final[Any] = object()


class CallAnswers(ABC):
    """The answers to one engine's calls of a function, by the shapes of its arguments.

    Args:
        session: the question, and the log.
        rank: as in `Question.of`.
        spelled: the value of `MOETUNE_REGIME`, for the command in the log.

    Attributes:
        kernels: what the function runs, for the log.
        own: what happens to a call that moetune does not answer, for the log.
        command: the options of `moetune tune` beside the regime's.
    """

    kernels: str
    own: str
    command: str

    def __init__(self, session: Session, rank: Any = None, spelled: str = "") -> None:
        self.session = session
        self._rank, self._spelled = rank, spelled
        self._shapes: dict[Hashable, AskedShape] = {}
        self._chosen: dict[tuple[Hashable, int], Tactic | None] = {}
        self._failed = False

    @abstractmethod
    def rows(self, call: Mapping[str, Any]) -> int | None:
        """Returns the rows of a call; None if the engine must answer it, whatever is stored."""

    @abstractmethod
    def key(self, call: Mapping[str, Any]) -> Hashable:
        """Returns what two calls with the same answer have in common, the rows left out."""

    @abstractmethod
    def name(self, call: Mapping[str, Any]) -> str:
        """Returns a call's shape, for the log."""

    @abstractmethod
    def is_other(self, call: Mapping[str, Any]) -> bool:
        """Returns whether a call is not of the session's layer on one of the regime's ranks."""

    @abstractmethod
    def obstacle(self) -> str | None:
        """Returns why the engine must choose itself, or moetune does not tune the layer."""

    @abstractmethod
    def match(self) -> Match | None:
        """Returns the stored profile that answers, or None."""

    def note(self, match: Match) -> str:
        """Returns what the log says of a profile beside its layer and regime."""
        return ""

    def local_experts(self) -> set[int]:
        """Returns the numbers of experts that ranks of the session's regime have."""
        layer, regime = self.session.layer, self.session.regime
        return {regime.shard(layer, rank).num_local for rank in (0, regime.ep_size - 1)}

    def find(self, call: Mapping[str, Any]) -> Tactic | None:
        """Returns the tactic for one call; None if the engine's own formula chooses. It raises nothing.

        Args:
            call: the function's arguments by name.
        """
        try:
            rows = self.rows(call)
            if rows is None:
                return None
            key = self.key(call)
            shape = self._shapes.get(key)
            if shape is None:
                began = time.perf_counter()
                shape = self._shapes[key] = self._looked_up(call)
                self.session.spent_s += time.perf_counter() - began
            tactic: Tactic | None = self._chosen.get((key, rows), _UNKNOWN)
            if tactic is _UNKNOWN:
                self._chosen[key, rows] = None  # also if the next line raises
                tactic = self._chosen[key, rows] = self._choice(shape, rows)
            if tactic is None:
                shape.misses += 1
                shape.same += rows in shape.own_rows
            else:
                shape.hits += 1
            return tactic
        except Exception as error:  # the engine must go on
            self._log_failure(error)
            return None

    def _looked_up(self, call: Mapping[str, Any]) -> AskedShape:
        """Returns a shape that is asked for the first time, and logs what answers it."""
        shape = AskedShape(self.name(call))
        self.session.asked.append(shape)
        try:
            if self.is_other(call):
                self._log(f"{shape.name}: not {self.session.layer.name} under {self.session.regime.slug}, {self.own}")
                return shape
            if reason := self.obstacle():
                self._log(f"{shape.name}: {reason}, {self.own}")
                return shape
            match = self.match()
            if match is None or not match.profile.choices:
                command = f"moetune tune {self._spelled} {self.command}"
                self._log(f"{shape.name}: no profile, {self.own}; `{command}` makes one")
                return shape
            shape.profile = match.profile
            count = len(match.profile.choices)
            self._log(
                f"{shape.name}: profile of {match.profile.layer.name} under {match.profile.regime.slug}, "
                f"{count} bucket{'' if count == 1 else 's'}{self.note(match)}"
            )
        except Exception as error:  # the engine must go on
            self._log_failure(error)
        return shape

    def _choice(self, shape: AskedShape, rows: int) -> Tactic | None:
        """Returns the tactic for a number of rows; None for the engine's own.

        The engine's own runs if the bucket is not tuned, and if its formula is the profile's choice.
        """
        profile = shape.profile
        choice = None if profile is None else tuned_choice(profile, rows)
        if choice is None:
            return None
        if choice.tactic != choice.default_tactic:
            return choice.tactic
        shape.own_rows.add(rows)
        return None

    def _log(self, line: str) -> None:
        self.session.logger.info("moetune: %s", line)

    def _log_failure(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            kind = "" if isinstance(error, MoetuneError) else f"{type(error).__name__}: "
            self.session.logger.warning("moetune: %s are left to the engine: %s%s", self.kernels, kind, error)
