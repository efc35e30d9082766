"""`RankStrategy`: how the ranks of a group share the tuning of an op."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Final

from moetune.errors import UsageError

VARIABLE: Final = "MOETUNE_STRATEGY"


class RankStrategy(StrEnum):
    """How the ranks of a group share the tuning, named as `DistributedTuningStrategy` of TensorRT-LLM names it.

    Source: `tensorrt_llm/_torch/autotuner.py`. There, `merge` and `parallel` gather the winner of each rank and take
    the one with the least time on its own rank. moetune takes the largest time of each tactic over the ranks instead,
    because an all-to-all ends when its slowest rank has ended.
    """

    INDEPENDENT = "independent"
    """Each rank tunes for itself. The ranks may choose different tactics."""
    BROADCAST = "broadcast"
    """The first rank looks up and tunes, and all ranks take its choices."""
    MERGE = "merge"
    """All ranks time all tactics. A tactic's time is the one on its slowest rank."""
    PARALLEL = "parallel"
    """In the sweep, each rank times every n-th tactic. All ranks time those of the final comparison, as in `merge`."""


def strategy_of(given: str, name: str) -> RankStrategy:
    """Returns the strategy that is spelled `given`.

    Args:
        given: the value.
        name: where it was given, for the error.

    Raises:
        UsageError: there is no such strategy.
    """
    try:
        return RankStrategy(given)
    except ValueError:
        raise UsageError(f"{name}={given} is not a strategy.", f"Use one of {', '.join(RankStrategy)}.") from None


def strategy_of_variable() -> RankStrategy:
    """Returns the strategy that `MOETUNE_STRATEGY` names; `merge` if it is not set.

    Raises:
        UsageError: there is no such strategy.
    """
    return strategy_of(os.environ.get(VARIABLE) or RankStrategy.MERGE, VARIABLE)
