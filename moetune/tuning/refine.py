"""Decides which buckets a profile with the ladder `adaptive` still needs between those that it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from moetune.spec.ladder import ADAPTIVE_STEP
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile


def further_bucket(choices: Sequence[Choice]) -> int | None:
    """Returns the next bucket to tune, or None if the choices of every two neighbors differ by a small step only.

    Two neighbors need a bucket between them if no tactic serves both and they are more than `ADAPTIVE_STEP` apart. The
    crossover between their choices lies somewhere between them. Halving the gap, by the ratio, finds it.

    Args:
        choices: all choices of the profile so far, ascending by rows.
    """
    for lower, upper in pairwise(choices):
        if upper.rows > ADAPTIVE_STEP * lower.rows and not _share_a_tactic(lower, upper):
            between = _between(lower.rows, upper.rows)
            if between is not None:
                return between
    return None


def missing_buckets(regime: Regime, stored: Profile | None) -> tuple[int, ...]:
    """Returns the buckets of a regime that are still to be tuned.

    If all buckets of the ladder `adaptive` are stored, this is the next one that it adds.
    """
    choices = stored.choices if stored else ()
    known = {choice.rows for choice in choices}
    missing = tuple(rows for rows in regime.buckets if rows not in known)
    if missing or regime.ladder.name != "adaptive":
        return missing
    added = further_bucket(choices)
    return () if added is None else (added,)


def tuned_choice(profile: Profile, rows: int) -> Choice | None:
    """Returns the choice by which an engine's call with `rows` rows on this rank runs; None if its bucket is not tuned.

    Another bucket's choice is none: it may be much slower there.
    """
    rows_of_all = rows * profile.regime.ladder.divisor
    bucket = profile.regime.ladder.lookup(rows_of_all, profile.regime.tune_max_num_tokens)
    return None if bucket in missing_buckets(profile.regime, profile) else profile.choice(rows_of_all)


def all_buckets(regime: Regime, stored: Profile | None) -> tuple[int, ...]:
    """Returns the buckets to tune if all are tuned again: those of a regime, and those that earlier tunes added."""
    known = tuple(choice.rows for choice in stored.choices) if stored else ()
    return (*regime.buckets, *(rows for rows in known if rows not in regime.buckets))


def _share_a_tactic(one: Choice, other: Choice) -> bool:
    return one.tactic == other.tactic or one.tactic in other.equally_fast or other.tactic in one.equally_fast


def _between(lower: int, upper: int) -> int | None:
    """Returns the row count in the middle by ratio; from 64 rows on a multiple of 8, as engines' batches are."""
    middle = math.sqrt(lower * upper)
    rounded = round(middle / 8) * 8 if lower >= 64 else round(middle)
    return rounded if lower < rounded < upper else None
