"""The arms of the comparison: each is a tuner, and the tactic that it has chosen for each number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moetune.backends.base import Backend
from moetune.dep_bench.block import TacticOf
from moetune.dep_bench.flashinfer_choice import LADDER, flashinfer_choices
from moetune.dep_bench.process_group import Ranks
from moetune.dep_bench.result import ArmName
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile
from moetune.workload.ranks import of_rank

Tune = Callable[[Regime], Profile]
"""Returns moetune's profile of a regime, stored or tuned now."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One tuner and its choices. `source` says where the tactics are from."""

    name: ArmName
    source: str
    tactic_of: TacticOf


def arms_of(
    backend: Backend, layer: MoELayer, regime: Regime, ranks: Ranks, tune: Tune
) -> tuple[list[Arm], dict[ArmName, str]]:
    """Returns the arms, and for those that there are not, the reason. It is a collective: only the first rank tunes.

    Args:
        backend: the backend.
        layer, regime: the deployment, with the dispatcher's layout.
        ranks: the ranks.
        tune: is called on the first rank.
    """
    arms = [Arm("default", "no tuner", lambda rows: backend.heuristic(layer, regime, rows))]
    missing: dict[ArmName, str] = {}
    engine = _engine_arm(backend, layer, regime, ranks)
    if isinstance(engine, Arm):
        arms.append(engine)
    else:
        missing["engine"] = engine
    plain = pure_ep(layer, regime)
    of_arm: dict[ArmName, Regime] = {"pure_ep": plain, "dispatcher": regime}
    for name, tuned in of_arm.items():
        profile = ranks.of_first(partial(tune, tuned))
        arms.append(Arm(name, f"moetune, {profile.regime.slug}", profile.tactic))
    return arms, missing


def pure_ep(layer: MoELayer, regime: Regime) -> Regime:
    """Returns the regime without attention DP: its dummy has the same rows on all ranks, routed over all experts."""
    plain = Regime(
        ep_size=regime.ep_size,
        tp_size=regime.tp_size,
        redundant_experts=regime.redundant_experts,
        seed=regime.seed,
        draws=regime.draws,
        ladder=str(regime.ladder).partition("/")[0],
        tune_max_num_tokens=regime.tune_max_num_tokens,
        uneven_shards=regime.uneven_shards,
    )
    return of_rank(layer, plain)


def _engine_arm(backend: Backend, layer: MoELayer, regime: Regime, ranks: Ranks) -> Arm | str:
    """Returns the arm of the engine's own tuner, or why there is none."""
    match backend.name:
        case "triton":
            source = backend.explained_default(layer, regime, 64).source
            return Arm("engine", source or "the engine's", lambda rows: backend.default(layer, regime, rows))
        case "flashinfer-cutlass":
            chosen = ranks.of_first(lambda: flashinfer_choices(backend, layer, regime, ranks.device))
            maximum = regime.tune_max_num_tokens

            def tactic_of(rows: int) -> Tactic:
                found = chosen.get(LADDER.lookup(rows, maximum))  # where it finds none, FlashInfer runs the default
                return backend.default(layer, regime, rows) if found is None else found

            return Arm("engine", "FlashInfer's autotune", tactic_of)
    return f"no engine tunes the kernels of {backend.name}"
