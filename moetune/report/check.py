"""Shows a check as a table and lines for a terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.errors import Difference
from moetune.report.format import gain_digits
from moetune.report.lines import layer_line, regime_line, versions
from moetune.report.table import add_numbers, new_table
from moetune.report.tactics import tactic_line
from moetune.tuning.checked import Check, CheckedBucket

_STYLES = {"holds": "green", "noisy": "yellow"}


def check_report(check: Check, path: Path | str) -> list[RenderableType]:
    """Returns what was checked, a row for each bucket, the reasons of those that do not hold, and a bottom line.

    Args:
        check: the check.
        path: the profile's file.
    """
    reported: list[RenderableType] = [
        Text(layer_line(check.layer), style="bold"),
        Text(regime_line(check.regime)),
        Text(f"backend {check.backend} on {check.environment.device}; {_since(check)}", style="dim"),
        Text(),
        check_table(check),
        Text(),
        Text("gain: the default's time over the choice's, the smallest of the bucket's row counts", style="dim"),
        Text("lag: the choice's time over that of what a new search chose, the largest of them", style="dim"),
    ]
    if any(bucket.cliff_at for bucket in check.buckets):
        reported.append(Text("cliff: the multiple of the busiest expert's load from which it is slow", style="dim"))
    several = len({bucket.distribution for bucket in check.buckets}) > 1
    reported += [Text(_reason(bucket, several), style="yellow") for bucket in check.buckets if bucket.reason]
    reported += [Text(_bottom_line(check), style="bold"), Text(f"profile: {path}", no_wrap=True)]
    return reported


def _since(check: Check) -> str:
    """Returns in which versions this machine differs from the one on which the profile was measured."""
    differing = check.environment.differing(check.measured)
    differences = [Difference(field, here, then) for field, (here, then) in differing.items()]
    if not differences:
        return "measured with the same versions"
    return f"measured with {versions({each.field: each.plain() for each in differences})}"


def check_table(check: Check) -> Table:
    """Returns a row for each bucket and distribution: recorded gain, gain, lag, cliff and finding."""
    several = len({bucket.distribution for bucket in check.buckets}) > 1
    table = new_table()
    add_numbers(table, "rows")
    if several:
        table.add_column("distribution")
    add_numbers(table, "recorded\ngain", "gain", "lag", "cliff")
    table.add_column("finding")
    for bucket in check.buckets:
        cells = [f"{bucket.rows:,}"]
        if several:
            cells.append(bucket.distribution)
        gain = min((each.gain for each in bucket.by_rows), default=None)
        lag = max((each.lag for each in bucket.by_rows), default=None)
        table.add_row(
            *cells,
            _times(bucket.recorded_gain),
            _times(gain),
            _times(lag),
            f"{bucket.cliff_at}×" if bucket.cliff_at else "–",
            Text(bucket.finding, style=_STYLES.get(bucket.finding, "bold red")),
        )
    return table


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.{gain_digits(ratio)}f}×"


def _reason(bucket: CheckedBucket, several: bool) -> str:
    """Returns why a choice does not hold; with its distribution if there are several."""
    under = f", {bucket.distribution}" if several else ""
    by = f": {tactic_line(bucket.rival)}" if bucket.finding == "beaten" and bucket.rival else ""
    return f"{bucket.rows:,} rows{under}: {tactic_line(bucket.tactic)}: {bucket.reason}{by}"


def _bottom_line(check: Check) -> str:
    counts = Counter(bucket.finding for bucket in check.buckets)
    allowed = f"within {100 * check.within:g} %"
    if counts["holds"] == len(check.buckets):
        return f"all {len(check.buckets)} choices hold {allowed}"
    others = ", ".join(f"{count} {finding}" for finding, count in counts.items() if finding != "holds")
    return f"of {len(check.buckets)} choices {counts['holds']} hold {allowed}: {others}"
