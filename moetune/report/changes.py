"""Shows what differs between two profiles as tables and lines for a terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.errors import Plain
from moetune.inputs.option_table import OPTIONS
from moetune.quoting import MOST_LISTED
from moetune.report.format import gain_digits, significant
from moetune.report.lines import counted, span
from moetune.report.table import add_numbers, new_table, time_unit
from moetune.report.tactics import tactic_line
from moetune.spec.regime import Regime
from moetune.stats import geomean
from moetune.store.miss import FIELD_TITLES
from moetune.tuning.changes import ChangedBucket, Changes, ComparedProfile

_QUESTION = {option.field or option.name: option for option in OPTIONS if option.sets}
"""The options by the field that they set."""
_FACTS_THAT_VARY = {"probed_at", "sm_clock_mhz", "memory_clock_mhz"}
"""Informative fields that differ in any two profiles."""


def changes_report(changes: Changes) -> list[RenderableType]:
    """Returns both profiles, the fields that differ, the buckets side by side, and a last line that sums up."""
    reported: list[RenderableType] = [
        Text(_profile_line("A", changes.a), no_wrap=True),
        Text(_profile_line("B", changes.b), no_wrap=True),
        *(Text(line) for line in _field_lines(changes)),
    ]
    if changes.buckets:
        reported += [Text(), buckets_table(changes), Text()]
    if any(bucket.timed for bucket in changes.buckets):
        reported += [Text(f"timed side by side on {changes.measured_on}:"), timed_table(changes), Text()]
    elif any(each.ratio is not None for bucket in changes.buckets for each in bucket.by_rows):
        reported += [Text("row counts that both compared:"), recorded_table(changes), Text()]
    reported += [Text(line, style="dim") for line in _notes(changes)]
    return [*reported, Text(bottom_line(changes), style="bold")]


def bottom_line(changes: Changes) -> str:
    """Returns what a reader has to know: `equal`, or how many buckets differ and what that costs."""
    states = Counter(bucket.state for bucket in changes.buckets)
    shared = states["same"] + states["other"]
    if changes.equal:
        return f"equal: the same tactic in {_all(len(changes.buckets))}"
    if not shared:
        return "no bucket has a choice in both profiles"
    if states["other"]:
        parts = [f"{states['other']} of {counted(shared, 'bucket')} have another tactic"]
        parts += _costs(changes) if changes.same_load else ["the loads differ, so their times are not compared"]
    else:
        parts = [f"the same tactic in {_all(shared)} that both have"]
    parts += [f"{counted(states['only_a'], 'bucket')} only in A"] if states["only_a"] else []
    parts += [f"{counted(states['only_b'], 'bucket')} only in B"] if states["only_b"] else []
    return "; ".join(parts)


def buckets_table(changes: Changes) -> Table:
    """Returns a row for each bucket: the tactics of A and B, their recorded times and gains, and how they relate."""
    times = [each for bucket in changes.buckets for each in (bucket.time_a_us, bucket.time_b_us) if each is not None]
    scale, unit = time_unit(times)
    table = new_table()
    add_numbers(table, "rows")
    table.add_column("tactic", overflow="fold")
    add_numbers(table, f"time A\n({unit})", f"time B\n({unit})", "gain A", "gain B")
    for bucket in changes.buckets:
        style = "dim" if bucket.state == "same" else ""
        table.add_row(
            f"{bucket.rows:,}",
            Text("\n".join(_tactics(bucket)), style=style),
            *(_or_dash(None if each is None else each / scale) for each in (bucket.time_a_us, bucket.time_b_us)),
            *(_gain(each) for each in (bucket.gain_a, bucket.gain_b)),
        )
    return table


def recorded_table(changes: Changes) -> Table:
    """Returns a row for each row count that both compared in a bucket with another tactic: both gains and their ratio.

    The ratio is the time of B's tactic over that of A's.
    """
    table = new_table()
    add_numbers(table, "bucket", "rows", "gain A", "95 % bounds", "gain B", "95 % bounds", "B takes", "95 % bounds")
    for bucket in changes.buckets:
        for each in bucket.by_rows:
            if each.ratio is not None:
                table.add_row(
                    f"{bucket.rows:,}",
                    _place(each.rows, each.distribution),
                    *_ratio(each.gain_a, each.gain_a_low, each.gain_a_high),
                    *_ratio(each.gain_b, each.gain_b_low, each.gain_b_high),
                    *_ratio(each.ratio, each.ratio_low, each.ratio_high),
                )
    return table


def timed_table(changes: Changes) -> Table:
    """Returns a row for each row count at which both tactics were timed."""
    times = [each for b in changes.buckets for one in b.timed for each in (one.time_a_us, one.time_b_us)]
    scale, unit = time_unit(times)
    table = new_table()
    add_numbers(table, "bucket", "rows", f"A ({unit})", f"B ({unit})", "B takes", "95 % bounds")
    table.add_column("faster")
    for bucket in changes.buckets:
        for each in bucket.timed:
            table.add_row(
                f"{bucket.rows:,}",
                _place(each.rows, each.distribution),
                significant(each.time_a_us / scale),
                significant(each.time_b_us / scale),
                *_ratio(each.ratio, each.ratio_low, each.ratio_high),
                Text(each.faster.upper(), style="bold") if each.faster else Text("too close to call", style="dim"),
            )
    return table


def _place(rows: int, distribution: str) -> str:
    return f"{rows:,} {distribution}".rstrip()


def _profile_line(name: str, profile: ComparedProfile) -> str:
    parts = [profile.path] if profile.path else []
    parts += [f"{profile.layer} by {profile.backend} on {profile.device}", counted(profile.buckets, "bucket")]
    parts += [f"gain {profile.gain:.2f}×"] if profile.gain else []
    parts += [f"measured {profile.measured_at[:10]}"] if profile.measured_at else []
    return f"{name}: {' · '.join(parts)}"


def _field_lines(changes: Changes) -> Iterator[str]:
    """Yields a line for each field of the question that differs, and one for the versions and facts that do."""
    facts: list[str] = []
    for name, each in changes.differing.items():
        if name in _QUESTION or name in Regime.model_fields:
            yield f"differs: {_written(name, each['a'])} in A, {_written(name, each['b'])} in B"
        else:
            facts.append(_fact(name, each["a"], each["b"]))
    facts += [
        _fact(name, each["a"], each["b"]) for name, each in changes.informative.items() if name not in _FACTS_THAT_VARY
    ]
    if facts:
        yield f"measured with: {'; '.join(facts)}"


def _written(name: str, value: Plain) -> str:
    """Returns a field as a user writes it: `--ep 8`, `--no-dp`, `no layout`."""
    option = _QUESTION.get(name)
    if option is None or value is None:
        title = FIELD_TITLES.get(name, name)
        return f"no {title}" if value is None else f"{title} {value}"
    if isinstance(value, bool):
        return option.flag if value else f"--no-{option.flag.removeprefix('--')}"
    return f"{option.flag} {value}"


def _fact(name: str, a: Plain, b: Plain) -> str:
    title = name.replace("_", " ")
    return f"{title} {'none' if a is None else a} in A, {'none' if b is None else b} in B"


def _tactics(bucket: ChangedBucket) -> Iterator[str]:
    """Yields the lines of a bucket's tactics."""
    if bucket.tactic_a is not None and bucket.state == "same":
        yield f"= {tactic_line(bucket.tactic_a)}"
        return
    yield f"A {'none' if bucket.tactic_a is None else tactic_line(bucket.tactic_a)}"
    yield f"B {'none' if bucket.tactic_b is None else tactic_line(bucket.tactic_b)}"
    if bucket.equally_fast_in_a:
        yield "  B's is equally fast in A"
    elif bucket.equally_fast_in_b:
        yield "  A's is equally fast in B"


def _costs(changes: Changes) -> list[str]:
    """Returns what the other tactics cost: as timed, or else as the records say."""
    others = [bucket for bucket in changes.buckets if bucket.state == "other"]
    if any(bucket.timed for bucket in others):
        return _timed_costs(others)
    as_fast = [bucket for bucket in others if bucket.equally_fast_in_a]
    parts = [f"{len(as_fast)} of these are equally fast in A"] if as_fast else []
    if regrets := [bucket.regret_high for bucket in as_fast if bucket.regret_high is not None]:
        parts.append(f"there B's may be faster by at most {100 * max(regrets):.1f} % (95 % bound, A's records)")
    ratios = [each.ratio for bucket in others for each in bucket.by_rows if each.ratio is not None]
    if ratios:
        takes = span([round(ratio, 3) for ratio in ratios])
        parts.append(f"by their gains over the default B takes {takes} times as long as A")
    elif not as_fast:
        parts.append("the records do not say what that costs: --measure times both")
    return parts


def _timed_costs(others: Sequence[ChangedBucket]) -> list[str]:
    faster = Counter(_faster(bucket) for bucket in others)
    ratios = [each.ratio for bucket in others for each in bucket.timed]
    parts = [f"B is faster in {faster['b']}, A in {faster['a']}, too close to call in {faster['close']}"]
    parts += [f"each at some rows in {faster['both']}"] if faster["both"] else []
    parts += [f"not timed in {faster['failed']}"] if faster["failed"] else []
    return [*parts, f"B takes {geomean(ratios):.3f} times as long as A (geometric mean)"]


def _faster(bucket: ChangedBucket) -> str:
    """Returns `a` or `b` if that is faster at some row count and slower at none, `both`, `close` or `failed`."""
    if bucket.failed:
        return "failed"
    found = {each.faster for each in bucket.timed if each.faster}
    return "both" if len(found) > 1 else next(iter(found), "close")


def _notes(changes: Changes) -> list[str]:
    notes = [
        f"{bucket.rows:,} rows: B's tactic could not win in A: {bucket.rejected_in_a}"
        for bucket in changes.buckets
        if bucket.rejected_in_a
    ]
    notes += [
        f"{bucket.rows:,} rows: {name.upper()}'s tactic failed: {reason}"
        for bucket in changes.buckets
        for name, reason in bucket.failed.items()
    ]
    more = len(notes) - MOST_LISTED
    return [*notes[:MOST_LISTED], *([f"and {counted(more, 'more such bucket')}"] if more > 0 else [])]


def _ratio(value: float, low: float | None, high: float | None) -> tuple[str, str]:
    digits = gain_digits(value)
    bounds = "–" if low is None or high is None else f"{low:.{digits}f}–{high:.{digits}f}"
    return f"{value:.{digits}f}×", bounds


def _gain(gain: float | None) -> str:
    return "–" if gain is None else f"{gain:.{gain_digits(gain)}f}×"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else significant(value)


def _all(buckets: int) -> str:
    return "the one bucket" if buckets == 1 else f"all {counted(buckets, 'bucket')}"
