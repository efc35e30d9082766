"""Shows a comparison of backends as tables for a terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.report.flags import flags_report
from moetune.report.format import significant
from moetune.report.lines import counted
from moetune.report.profile import profile_report
from moetune.report.table import add_numbers, new_table, time_unit
from moetune.spec.enums import ENGINE_TITLES
from moetune.tuning.comparison import BackendResult, ComparedBucket, Comparison


def comparison_report(comparison: Comparison, engine: str | None = None) -> list[RenderableType]:
    """Returns every profile, the fastest backend of each bucket, and the engine flags that select each backend.

    Args:
        comparison: the comparison.
        engine: the engine that is deployed; by default the fastest flags of all engines are shown.
    """
    reported: list[RenderableType] = []
    for result in comparison.families:
        if result.profile is None:
            continue
        report = profile_report(
            result.profile,
            result.path,
            served=result.served,
            packaged=result.packaged,
            near=result.near,
            neutral=result.neutral,
            measured_ladder=result.measured_ladder,
        )
        reported += report[2:] if reported else report  # layer and regime are the same for all
    if len([result for result in comparison.families if result.profile]) > 1:
        reported += [comparison_table(comparison), *map(Text, _verdicts(comparison))]
    reported += [Text(_flags(result)) for result in comparison.families if result.profile]
    reported += flags_report(comparison.answers, engine)
    reported += [
        Text(f"{result.backend} failed: {result.failed}", style="yellow")
        for result in comparison.families
        if result.failed
    ]
    reported += [
        Text(f"{counted(bucket.rows, 'row')}: {backend} did not run side by side: {reason}", style="yellow")
        for bucket in comparison.buckets
        for backend, reason in bucket.failed.items()
    ]
    reported += [Text(f"not here: {name}: {why}", style="dim") for name, why in comparison.left_out.items()]
    return reported


def comparison_table(comparison: Comparison) -> Table:
    """Returns a row for each bucket: each backend's time, the fastest, and how much longer the runner-up takes."""
    scale, unit = time_unit([time_us for bucket in comparison.buckets for time_us in bucket.times_us.values()])
    backends = [result.backend for result in comparison.families if result.profile]
    table = new_table()
    add_numbers(table, "rows", *(f"{_folded(backend)}\n({unit})" for backend in backends))
    table.add_column("fastest", overflow="fold")
    add_numbers(table, "runner-\nup takes")
    table.add_column("95 %\nbounds", justify="center", no_wrap=True)
    for bucket in comparison.buckets:
        shown = [bucket.times_us.get(backend) for backend in backends]
        table.add_row(
            f"{bucket.rows:,}",
            *("–" if time_us is None else significant(time_us / scale) for time_us in shown),
            _fastest(bucket),
            "–" if bucket.ratio is None else f"{bucket.ratio:.2f}×",
            "–" if bucket.ratio_low is None else f"{bucket.ratio_low:.2f}–{bucket.ratio_high:.2f}",
        )
    return table


def _folded(backend: str) -> str:
    """Returns the name on several short lines, so that five backends fit in 80 columns."""
    return backend.replace("flashinfer-", "flash-infer-").replace("-", "-\n")


def _fastest(bucket: ComparedBucket) -> Text:
    if bucket.decided:
        return Text(bucket.winner, style="bold green")
    if bucket.runner_up is None:
        return Text(f"{bucket.winner} only")
    return Text("too close to call" if bucket.interleaved else f"{bucket.winner}, not interleaved", style="dim")


def _verdicts(comparison: Comparison) -> list[str]:
    """Returns how often each backend is the fastest, and which times decide nothing."""
    wins = Counter(bucket.winner for bucket in comparison.buckets if bucket.decided)
    close = sum(bucket.interleaved and not bucket.decided for bucket in comparison.buckets)
    apart = [bucket for bucket in comparison.buckets if not bucket.interleaved and bucket.runner_up]
    counted = [f"{backend} fastest in {count}" for backend, count in wins.most_common()]
    counted += [f"too close to call in {close}"] if close else []
    lines = [f"of {len(comparison.buckets)} buckets: {', '.join(counted)}"] if counted else []
    if apart:
        rows = ", ".join(str(bucket.rows) for bucket in apart)
        lines.append(f"at {rows} rows the times come from separate runs, so they decide nothing")
    return lines


def _flags(result: BackendResult) -> str:
    flags = [f"{ENGINE_TITLES[engine]} {flag}" for engine, flag in result.flags.items()]
    return f"{result.backend}: {' · '.join(flags) or 'no flag of an engine selects it'}"
