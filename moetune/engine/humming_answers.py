"""`HummingAnswers`: what moetune's store says of Humming's configurations, as the tables that vLLM reads.

vLLM 0.33 asks Humming's heuristic once for each layer and each GEMM. The answer is a table `[lower, upper, fields]` by
the estimated slots of the rank, which is passed to every call. So a profile becomes such a table, and no call is
touched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from moetune.engine.session import AskedShape, Session
from moetune.errors import MissError, MoetuneError
from moetune.tuning.refine import missing_buckets

if TYPE_CHECKING:
    from moetune.backends.humming.gemm import Gemm
    from moetune.store.match import Match
    from moetune.store.profile import Choice, Profile

Row = list[Any]
"""One row of a table: the fields hold for lower < slots ≤ upper."""
ENDLESS: Final = 1 << 30
"""The last row's upper end, as Humming writes it."""
_OWN: Final = "vLLM's table is used"


@dataclass(frozen=True, slots=True)
class Answer:
    """What holds for lower < slots ≤ upper: the fields of each GEMM, None for the engine's own.

    `is_default`: whether the profile chose the engine's own configurations.
    """

    lower: int
    upper: int
    fields: tuple[dict[str, Any] | None, dict[str, Any] | None]
    is_default: bool = False


class HummingAnswers:
    """The answers to one engine's experts.

    Args:
        session: the question, and the log.
        rank: as in `Question.of`.
        spelled: the value of `MOETUNE_REGIME`, for the command in the log.
    """

    def __init__(self, session: Session, rank: Any = None, spelled: str = "") -> None:
        self.session = session
        self._rank, self._spelled = rank, spelled
        self._known: dict[Any, tuple[AskedShape, tuple[Answer, ...]]] = {}
        self._failed = False

    def of(self, experts: Any) -> tuple[AskedShape, tuple[Answer, ...]] | None:
        """Returns the shape of an engine's experts and its answers, ascending; None after an error. Raises nothing.

        Args:
            experts: a `HummingExpertsBase` of vLLM after its `init_humming_moe`.
        """
        try:
            configs = (experts.humming_configs["w13"], experts.humming_configs["w2"])
            asked = [_asked(config) for config in configs]
            key = (str(asked), experts.compute_config_str, experts.global_num_experts)
            if key not in self._known:
                name = f"Humming experts E={configs[0].num_experts}, N={configs[1].shape_k - configs[1].pad_shape_k}"
                shape = AskedShape(name)
                self.session.asked.append(shape)
                self._known[key] = shape, ()  # also if the next line raises
                self._known[key] = shape, self._looked_up(shape, experts, asked)
            return self._known[key]
        except Exception as error:  # the engine must go on
            self._log_failure(error)
            return None

    def _looked_up(self, shape: AskedShape, experts: Any, asked: list[dict[str, Any]]) -> tuple[Answer, ...]:
        """Returns the answers for a shape that is asked for the first time, and logs what answers it."""
        from moetune.backends.humming.backend import HummingBackend

        layer, regime = self.session.layer, self.session.regime
        if reason := HummingBackend().unsupported(layer, regime):
            self._log(f"{shape.name}: moetune's backend humming {reason}, {_OWN}")
            return ()
        if self._is_other(experts, asked):
            self._log(f"{shape.name}: not {layer.name} under {regime.slug}, {_OWN}")
            return ()
        if reason := _obstacle(experts):
            self._log(f"{shape.name}: {reason}, {_OWN}")
            return ()
        match = self._match()
        if match is None or not match.profile.choices:
            command = f"moetune tune {self._spelled} --backend humming"
            self._log(f"{shape.name}: no profile, {_OWN}; `{command}` makes one")
            return ()
        shape.profile = profile = match.profile
        count = len(profile.choices)
        self._log(
            f"{shape.name}: profile of {profile.layer.name} under {profile.regime.slug}, "
            f"{count} bucket{'' if count == 1 else 's'}"
        )
        return answers(profile)

    def _is_other(self, experts: Any, asked: list[dict[str, Any]]) -> bool:
        """Returns whether experts are not those of the session's layer on one of the regime's ranks."""
        from moetune.backends.humming.gemm import gemms

        layer, regime = self.session.layer, self.session.regime
        both = gemms(layer, regime)
        if experts.global_num_experts != regime.shard(layer).num_physical:
            return True
        if experts.humming_gemm_type().value != both[0].type:
            return True
        counts = {regime.shard(layer, rank).num_local for rank in (0, regime.ep_size - 1)}
        return not any(asked == [_wanted(gemm, count) for gemm in both] for count in counts)

    def _match(self) -> Match | None:
        from moetune.backends.humming.backend import HummingBackend
        from moetune.tuning.question import Question

        session = self.session
        with suppress(MissError):
            return Question.of(session.layer, session.regime, HummingBackend(), session.store, rank=self._rank).match()
        return None

    def _log(self, line: str) -> None:
        self.session.logger.info("moetune: %s", line)

    def _log_failure(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            kind = "" if isinstance(error, MoetuneError) else f"{type(error).__name__}: "
            self.session.logger.warning("moetune: Humming experts are left to the engine: %s%s", kind, error)


def _asked(config: Any) -> dict[str, Any]:
    """Returns the fields of a `LayerConfig` that tell one layer from another."""
    return {
        "shape": (config.shape_n - config.pad_shape_n, config.shape_k - config.pad_shape_k),
        "padded": (config.shape_n, config.shape_k),
        "experts": config.num_experts,
        "dtypes": tuple(str(getattr(config, f"{name}_dtype")) for name in ("a", "b", "c", "bs")),
        "group": config.weight_scale_group_size,
        "bias": config.has_bias,
        "zero points": config.has_zero_point,
    }


def _wanted(gemm: Gemm, num_experts: int) -> dict[str, Any]:
    """Returns what `_asked` returns for a GEMM that moetune tunes."""
    from moetune.backends.humming.layer_fields import CODE_DTYPES, SCALE_DTYPES

    scale = gemm.format.scale
    return {
        "shape": (gemm.columns, gemm.depth),
        "padded": (gemm.padded_columns, gemm.padded_depth),
        "experts": num_experts,
        "dtypes": ("bfloat16", CODE_DTYPES[scale], "bfloat16", SCALE_DTYPES[scale]),
        "group": gemm.format.group,
        "bias": gemm.bias,
        "zero points": False,
    }


def _obstacle(experts: Any) -> str | None:
    """Returns why the engine's own table must stay."""
    envs = sys.modules.get("vllm.envs")
    for name in ("VLLM_BATCH_INVARIANT", "VLLM_HUMMING_USE_F16_ACCUM"):
        if getattr(envs, name, False):
            return f"{name} is set"
    quantized = getattr(experts, "quant_config", None)
    for name in ("w1_hadamard_block_size", "w2_hadamard_block_size"):
        if (getattr(quantized, name, 1) or 1) > 1:
            return "its weights are rotated by a Hadamard matrix"
    return None


def answers(profile: Profile) -> tuple[Answer, ...]:
    """Returns what a profile says of each number of slots that vLLM can estimate.

    The estimate grows with the rows, so the rows of a bucket are one interval of estimates. A row count without a tuned
    bucket keeps the engine's own configurations.
    """
    from moetune.backends.humming.config import Config
    from moetune.backends.humming.formulas import estimated_slots
    from moetune.backends.humming.gemm import gemm_type
    from moetune.backends.humming.space import AUTO, GEMMS

    layer, regime = profile.layer, profile.regime
    last = -(-max(profile.choices[-1].rows, *regime.buckets) // regime.ladder.divisor)
    missing = frozenset(missing_buckets(regime, profile))
    found: list[Answer] = []
    lower = 0
    for choice, group in groupby(range(1, last + 1), lambda rows: _choice(profile, missing, rows)):
        (*_, end) = group
        upper = ENDLESS if end == last else estimated_slots(layer, regime, end)
        if choice is not None and upper > lower:
            spelled = [str(choice.tactic[gemm]) for gemm in GEMMS]
            made = [None if each == AUTO else Config.parse(each).fields(gemm_type(regime)) for each in spelled]
            found.append(Answer(lower, upper, (made[0], made[1]), choice.tactic == choice.default_tactic))
        lower = max(lower, upper)
    return tuple(found)


def _choice(profile: Profile, missing: frozenset[int], rows: int) -> Choice | None:
    """Returns what `tuned_choice` returns, for many row counts."""
    rows_of_all = rows * profile.regime.ladder.divisor
    bucket = profile.regime.ladder.lookup(rows_of_all, profile.regime.tune_max_num_tokens)
    return None if bucket in missing else profile.choice(rows_of_all)


def merged(own: Sequence[Row], found: Sequence[Answer], gemm: int) -> list[Row]:
    """Returns the engine's table of one GEMM with the answers in place of its rows.

    Args:
        own: the engine's table, ascending and without gaps.
        found: the answers, ascending.
        gemm: 0 or 1.
    """
    table: list[Row] = []
    for answer in (each for each in found if each.fields[gemm] is not None):
        table += _between(own, table[-1][1] if table else 0, answer.lower)
        table.append([answer.lower, answer.upper, answer.fields[gemm]])
    return table + _between(own, table[-1][1] if table else 0, ENDLESS)


def _between(own: Sequence[Row], first: int, last: int) -> list[Row]:
    """Returns the rows of a table for first < slots ≤ last."""
    cut = ([max(lower, first), min(upper, last), fields] for lower, upper, fields in own)
    return [row for row in cut if row[0] < row[1]]
