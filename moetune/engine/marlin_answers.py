"""`MarlinAnswers`: what moetune's store says of Marlin's block size and tiles."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from moetune.engine.marlin_engines import OVERRIDE, SGLANG, VLLM, MarlinEngine
from moetune.engine.session import AskedShape, Session
from moetune.errors import MissError, MoetuneError
from moetune.spec.tactic import Tactic
from moetune.tuning.refine import tuned_choice

if TYPE_CHECKING:
    from moetune.store.match import Match

_UNKNOWN: Final[Any] = object()


class MarlinAnswers:
    """The answers to one engine's calls of `fused_marlin_moe`, by shape.

    Args:
        session: the question, and the log.
        engine: the engine.
        rank: as in `Question.of`.
        spelled: the value of `MOETUNE_REGIME`, for the command in the log.
    """

    def __init__(self, session: Session, engine: MarlinEngine, rank: Any = None, spelled: str = "") -> None:
        self.session, self.engine = session, engine
        self._rank, self._spelled = rank, spelled
        self._shapes: dict[Any, AskedShape] = {}
        self._chosen: dict[tuple[Any, int], Tactic | None] = {}
        self._failed = False

    def find(self, call: Mapping[str, Any]) -> Tactic | None:
        """Returns the tactic for one call; None if the engine's own formula chooses. It raises nothing.

        Args:
            call: the arguments of `fused_marlin_moe` by name.
        """
        try:
            w1, w2, scale, ids = call["w1"], call["w2"], call["w1_scale"], call["topk_ids"]
            rows = ids.shape[0]
            if rows < (2 if self.engine is SGLANG else 1):  # SGLang aligns a single row by another function
                return None
            key = (w1.shape, w2.shape, scale.shape, scale.dtype, call["hidden_states"].dtype, ids.shape[1])
            key = (*key, *(call.get(name) is None for name in self.engine.excludes))
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
        w1, w2 = call["w1"], call["w2"]
        shape = AskedShape(f"Marlin experts E={w1.shape[0]}, N={w2.shape[1] * 16}")
        self.session.asked.append(shape)
        own = f"{self.engine.name}'s formula chooses the block size"
        try:
            if self._is_other(call):
                self._log(f"{shape.name}: not {self.session.layer.name} under {self.session.regime.slug}, {own}")
                return shape
            if reason := self._obstacle():
                self._log(f"{shape.name}: {reason}, {own}")
                return shape
            match = self._match()
            if match is None or not match.profile.choices:
                option = " --backend-option formula=sglang" if self.engine is SGLANG else ""
                command = f"moetune tune {self._spelled} --backend marlin{option}"
                self._log(f"{shape.name}: no profile, {own}; `{command}` makes one")
                return shape
            shape.profile = match.profile
            count = len(match.profile.choices)
            note = f", measured with vLLM {match.profile.environment.strict['vllm']}" if match.near else ""
            self._log(
                f"{shape.name}: profile of {match.profile.layer.name} under {match.profile.regime.slug}, "
                f"{count} bucket{'' if count == 1 else 's'}{note}"
            )
        except Exception as error:  # the engine must go on
            self._log_failure(error)
        return shape

    def _is_other(self, call: Mapping[str, Any]) -> bool:
        """Returns whether a call is not of the session's layer on one of the regime's ranks, in bf16."""
        from moetune.backends.marlin.formats import FORMATS
        from moetune.backends.marlin.space import gemms

        layer, regime = self.session.layer, self.session.regime
        fmt = FORMATS.get(layer.precision)
        if fmt is None or fmt.padded(layer.hidden_size, regime.intermediate_size(layer)) is None:
            return True
        first, second = gemms(layer, regime, fmt)
        count, scale = call["w1"].shape[0], call["w1_scale"]
        experts = {regime.shard(layer, rank).num_local for rank in (0, regime.ep_size - 1)}
        dtypes = {"bf16": "torch.bfloat16", "e8m0": "torch.float8_e8m0fnu", "e4m3": "torch.float8_e4m3fn"}
        return (
            count not in experts
            or tuple(call["w1"].shape) != (count, first.K // 16, 2 * first.N)
            or tuple(call["w2"].shape) != (count, second.K // 16, 2 * second.N)
            or (tuple(scale.shape), str(scale.dtype)) != ((count, first.K // fmt.group, first.N), dtypes[fmt.scale])
            or call["topk_ids"].shape[1] != regime.row_top_k(layer)
            or str(call["hidden_states"].dtype) != "torch.bfloat16"
            or any(call.get(name) is not None for name in self.engine.excludes)
        )

    def _obstacle(self) -> str | None:
        """Returns why the engine must choose itself, or moetune does not tune the layer."""
        from moetune.backends.marlin.backend import MarlinBackend

        if self.engine is VLLM:
            envs = sys.modules.get("vllm.envs")
            if getattr(envs, "VLLM_BATCH_INVARIANT", False):
                return "VLLM_BATCH_INVARIANT is set"
            if os.environ.get(OVERRIDE) and hasattr(envs, OVERRIDE):
                return f"{OVERRIDE} is set"
        reason = MarlinBackend(self.engine.name).unsupported(self.session.layer, self.session.regime)  # type: ignore[arg-type]
        return None if reason is None else f"moetune's backend marlin {reason}"

    def _match(self) -> Match | None:
        """Returns the stored profile. SGLang's own may be of any vLLM, as its kernel is none of vLLM's versions."""
        from moetune.backends.marlin.backend import MarlinBackend
        from moetune.tuning.question import Question

        session, backend = self.session, MarlinBackend(self.engine.name)  # type: ignore[arg-type]
        near = self.engine is SGLANG
        with suppress(MissError):
            question = Question.of(session.layer, session.regime, backend, session.store, rank=self._rank, near=near)
            match = question.match()
            if match.near.keys() <= {"vllm"}:
                return match
        return None

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
            self.session.logger.warning("moetune: Marlin experts are left to the engine: %s%s", kind, error)
