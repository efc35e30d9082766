"""`MarlinAnswers`: what moetune's store says of Marlin's block size and tiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moetune.engine.call_answers import CallAnswers
from moetune.engine.marlin_engines import OVERRIDE, SGLANG, VLLM, MarlinEngine
from moetune.engine.session import Session
from moetune.errors import MissError

if TYPE_CHECKING:
    from moetune.store.match import Match


class MarlinAnswers(CallAnswers):
    """The answers to one engine's calls of `fused_marlin_moe`, by shape.

    Args:
        session: the question, and the log.
        engine: the engine.
        rank: as in `Question.of`.
        spelled: the value of `MOETUNE_REGIME`, for the command in the log.
    """

    kernels = "Marlin experts"

    def __init__(self, session: Session, engine: MarlinEngine, rank: Any = None, spelled: str = "") -> None:
        super().__init__(session, rank, spelled)
        self.engine = engine
        self.own = f"{engine.name}'s formula chooses the block size"
        self.command = f"--backend marlin{' --backend-option formula=sglang' if engine is SGLANG else ''}"

    def rows(self, call: Mapping[str, Any]) -> int | None:
        """Returns M. SGLang aligns a single row by another function, so it answers that itself."""
        rows: int = call["topk_ids"].shape[0]
        return rows if rows >= (2 if self.engine is SGLANG else 1) else None

    def key(self, call: Mapping[str, Any]) -> Hashable:
        """Returns the shapes of weights, scales and ids, the types, and which of the excluded arguments are given."""
        scale = call["w1_scale"]
        shapes = (call["w1"].shape, call["w2"].shape, scale.shape, call["topk_ids"].shape[1])
        excluded = tuple(call.get(name) is None for name in self.engine.excludes)
        return (shapes, scale.dtype, call["hidden_states"].dtype, excluded)

    def name(self, call: Mapping[str, Any]) -> str:
        """Returns the local experts and I/tp."""
        return f"Marlin experts E={call['w1'].shape[0]}, N={call['w2'].shape[1] * 16}"

    def is_other(self, call: Mapping[str, Any]) -> bool:
        """Returns whether a call is not of the session's layer on one of the regime's ranks, in bf16."""
        from moetune.backends.marlin.formats import FORMATS
        from moetune.backends.marlin.space import gemms

        layer, regime = self.session.layer, self.session.regime
        fmt = FORMATS.get(layer.precision)
        if fmt is None or fmt.padded(layer.hidden_size, regime.intermediate_size(layer)) is None:
            return True
        first, second = gemms(layer, regime, fmt)
        count, scale = call["w1"].shape[0], call["w1_scale"]
        dtypes = {"bf16": "torch.bfloat16", "e8m0": "torch.float8_e8m0fnu", "e4m3": "torch.float8_e4m3fn"}
        return (
            count not in self.local_experts()
            or tuple(call["w1"].shape) != (count, first.K // 16, 2 * first.N)
            or tuple(call["w2"].shape) != (count, second.K // 16, 2 * second.N)
            or (tuple(scale.shape), str(scale.dtype)) != ((count, first.K // fmt.group, first.N), dtypes[fmt.scale])
            or call["topk_ids"].shape[1] != regime.row_top_k(layer)
            or str(call["hidden_states"].dtype) != "torch.bfloat16"
            or any(call.get(name) is not None for name in self.engine.excludes)
        )

    def obstacle(self) -> str | None:
        """Returns the variable that decides instead, or why the backend does not tune the layer."""
        from moetune.backends.marlin.backend import MarlinBackend

        if self.engine is VLLM:
            envs = sys.modules.get("vllm.envs")
            if getattr(envs, "VLLM_BATCH_INVARIANT", False):
                return "VLLM_BATCH_INVARIANT is set"
            if os.environ.get(OVERRIDE) and hasattr(envs, OVERRIDE):
                return f"{OVERRIDE} is set"
        reason = MarlinBackend(self.engine.name).unsupported(self.session.layer, self.session.regime)  # type: ignore[arg-type]
        return None if reason is None else f"moetune's backend marlin {reason}"

    def match(self) -> Match | None:
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

    def note(self, match: Match) -> str:
        """Returns the vLLM with which a profile was measured, if that is another one."""
        return f", measured with vLLM {match.profile.environment.strict['vllm']}" if match.near else ""
