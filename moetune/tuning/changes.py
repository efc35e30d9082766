"""Defines `Changes`, what differs between two profiles A and B by their records, and `changes`, which finds it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from moetune.errors import Plain, UsageError
from moetune.inputs.option_table import OPTIONS
from moetune.quoting import enumerated
from moetune.spec.model import FrozenModel
from moetune.spec.tactic import Tactic
from moetune.spec.under import Under
from moetune.store.key import Key
from moetune.store.profile import Choice, ComparedRows, Profile

Finite = Annotated[float, Field(allow_inf_nan=False)]
State = Literal["same", "other", "only_a", "only_b"]
_FLAGS = {option.field: option.flag for option in OPTIONS if option.owner == "layer" and option.field}
OF_LADDER = ("ladder", "tune_max_num_tokens")
"""The fields that decide which buckets there are, and change nothing in any of them."""


class ComparedProfile(FrozenModel):
    """One of the two profiles.

    `path`: its file. `layer`: its layer's name. `backend`, `device`: what was measured, and on what. `buckets`: how
    many have a choice. `gain`: the geometric mean of their gains; None if there are none. `measured_at`: when the
    latest was measured.
    """

    path: str
    layer: str
    backend: str
    device: str
    buckets: int
    gain: Finite | None
    measured_at: str | None


class RecordedRows(Under):
    """What both records say of one row count that both compared.

    `time_a_us`, `time_b_us`: the times of A's and of B's tactic. `gain_a`, `gain_b`: their gains over the default, each
    with its 95 % bounds. `same_default`: whether both gains are over the same tactic. `ratio`: the time of B's tactic
    over that of A's, as the quotient of the gains, with 95 % bounds. It is None if the tactics are the same, or if
    layer, regime, backend, device or default differ.
    """

    rows: int
    time_a_us: Finite
    time_b_us: Finite
    gain_a: Finite
    gain_a_low: Finite
    gain_a_high: Finite
    gain_b: Finite
    gain_b_low: Finite
    gain_b_high: Finite
    same_default: bool
    ratio: Finite | None = None
    ratio_low: Finite | None = None
    ratio_high: Finite | None = None


class TimedRows(Under):
    """Both tactics of a bucket, timed in interleaved rounds at one row count.

    `time_a_us`, `time_b_us`: their mean times. `ratio`: the time of B's tactic over that of A's, with 95 % bounds.
    `noise`: the A/A noise. `faster`: `a` or `b` if the bounds lie beyond the noise, else None.
    """

    rows: int
    time_a_us: Finite
    time_b_us: Finite
    ratio: Finite
    ratio_low: Finite
    ratio_high: Finite
    noise: Finite
    faster: Literal["a", "b"] | None


class ChangedBucket(FrozenModel):
    """One bucket of either profile.

    `state`: whether both have the same tactic, another one, or only one has a choice. The fields of a profile that has
    none are None. `equally_fast_in_a`: A's record says that B's tactic serves as well; `equally_fast_in_b` the other
    way. `regret_high`: in the first case, by how much B's tactic may be faster by A's record, at 95 %, relative; None
    if that is not recorded. `rejected_in_a`: why B's tactic could not win in A; empty if it is not among the rejected.
    `by_rows`: the row counts that both compared. `timed`: the row counts at which `--measure` timed both tactics.
    `failed`: why it could not, by `a` and `b`.
    """

    rows: int
    state: State
    tactic_a: Tactic | None = None
    tactic_b: Tactic | None = None
    time_a_us: Finite | None = None
    time_b_us: Finite | None = None
    gain_a: Finite | None = None
    gain_b: Finite | None = None
    equally_fast_in_a: bool = False
    equally_fast_in_b: bool = False
    regret_high: Finite | None = None
    rejected_in_a: str = ""
    by_rows: tuple[RecordedRows, ...] = ()
    timed: tuple[TimedRows, ...] = ()
    failed: dict[Literal["a", "b"], str] = {}


class Changes(FrozenModel):
    """What differs between two profiles of one layer.

    `equal`: they answer the same question with the same tactic in each bucket. `differing`: the fields of the regime,
    the backend and its kernel, the device and the versions that differ, each with its values in `a` and `b`; None if
    one of them lacks the field. `informative`: the same of fields that may always differ, such as the driver.
    `same_load`: a bucket's load is the same in both, so that times can be compared. `measured_on`: the device of
    `--measure`; None without it.
    """

    schema_version: Literal[1] = 1
    a: ComparedProfile
    b: ComparedProfile
    equal: bool
    differing: dict[str, dict[str, Plain]]
    informative: dict[str, dict[str, str | None]]
    same_load: bool
    measured_on: str | None = None
    buckets: tuple[ChangedBucket, ...]


def changes(a: Profile, b: Profile, path_a: str = "", path_b: str = "") -> Changes:
    """Returns what differs between two profiles, from their records alone.

    Args:
        a, b: the profiles; A is usually the older one.
        path_a, path_b: their files.

    Raises:
        UsageError: they are of layers of different shapes, which have no load and no kernel in common.
    """
    shape_a, shape_b = a.layer.shape, b.layer.shape
    if shape_a != shape_b:
        fields = [
            f"{_FLAGS[name]} {shape_a[name]} and {shape_b[name]}" if name in _FLAGS else f"another {name}"
            for name in shape_a
            if shape_a[name] != shape_b[name]
        ]
        raise UsageError(
            f"The profiles are of different layers, {a.layer.name} and {b.layer.name}: {enumerated(fields)}.",
            "Give two profiles of one layer; `moetune store list` shows them.",
        )
    differing = {
        each.field: {"a": each.plain()["wanted"], "b": each.plain()["stored"]} for each in Key.of(a).differences(b)
    }
    same_load = not (a.regime.differing(b.regime).keys() - set(OF_LADDER))
    comparable = same_load and a.backend == b.backend and a.environment.device == b.environment.device
    choices_a, choices_b = ({choice.rows: choice for choice in profile.choices} for profile in (a, b))
    buckets = tuple(
        _bucket(rows, choices_a.get(rows), choices_b.get(rows), comparable)
        for rows in sorted(choices_a.keys() | choices_b.keys())
    )
    same_question = same_load and not (differing.keys() & {"backend", *OF_LADDER})
    return Changes(
        a=_compared(a, path_a),
        b=_compared(b, path_b),
        equal=same_question and all(bucket.state == "same" for bucket in buckets),
        differing=differing,
        informative=_informative(a, b),
        same_load=same_load,
        buckets=buckets,
    )


def _compared(profile: Profile, path: str) -> ComparedProfile:
    return ComparedProfile(
        path=path,
        layer=profile.layer.name,
        backend=profile.backend,
        device=profile.environment.device,
        buckets=len(profile.choices),
        gain=profile.gain if profile.choices else None,
        measured_at=max((choice.measured_at for choice in profile.choices), default=None),
    )


def _informative(a: Profile, b: Profile) -> dict[str, dict[str, str | None]]:
    mine, theirs = a.environment.informative, b.environment.informative
    return {
        name: {"a": mine.get(name), "b": theirs.get(name)}
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    }


def _bucket(rows: int, a: Choice | None, b: Choice | None, comparable: bool) -> ChangedBucket:
    """Returns what differs in one bucket. `comparable`: times of the two profiles may be set in relation."""
    fields_a = {} if a is None else {"tactic_a": a.tactic, "time_a_us": a.time_us, "gain_a": a.gain}
    fields_b = {} if b is None else {"tactic_b": b.tactic, "time_b_us": b.time_us, "gain_b": b.gain}
    if a is None or b is None:
        return ChangedBucket(rows=rows, state="only_b" if a is None else "only_a", **fields_a, **fields_b)
    same = a.tactic == b.tactic
    rows_a, rows_b = ({(each.rows, each.distribution): each for each in choice.by_rows} for choice in (a, b))
    by_rows = tuple(
        _recorded(rows_a[place], rows_b[place], comparable and not same)
        for place in sorted(rows_a.keys() & rows_b.keys())
    )
    as_fast = not same and b.tactic in a.equally_fast
    return ChangedBucket(
        rows=rows,
        state="same" if same else "other",
        **fields_a,
        **fields_b,
        equally_fast_in_a=as_fast,
        equally_fast_in_b=not same and a.tactic in b.equally_fast,
        regret_high=a.regret_high if as_fast else None,
        rejected_in_a=next((each.reason for each in a.rejected if each.tactic == b.tactic), ""),
        by_rows=by_rows,
    )


def _recorded(a: ComparedRows, b: ComparedRows, comparable: bool) -> RecordedRows:
    same_default = a.default_tactic == b.default_tactic
    recorded = RecordedRows(
        rows=a.rows,
        distribution=a.distribution,
        time_a_us=a.time_us,
        time_b_us=b.time_us,
        gain_a=a.gain,
        gain_a_low=a.gain_low,
        gain_a_high=a.gain_high,
        gain_b=b.gain,
        gain_b_low=b.gain_low,
        gain_b_high=b.gain_high,
        same_default=same_default,
    )
    if not (comparable and same_default and min(a.gain_low, b.gain_low) > 0):
        return recorded
    ratio = a.gain / b.gain
    # Independent errors add in quadrature: of B's time over A's, the lower bound is A's low gain and B's high one.
    low = math.hypot(math.log(a.gain / a.gain_low), math.log(b.gain_high / b.gain))
    high = math.hypot(math.log(a.gain_high / a.gain), math.log(b.gain / b.gain_low))
    bounds = {"ratio": ratio, "ratio_low": ratio * math.exp(-low), "ratio_high": ratio * math.exp(high)}
    return recorded.model_copy(update=bounds)
