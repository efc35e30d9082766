"""Shows a dep-bench as tables for a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.dep_bench.result import ArmName, ArmTime, DepBench, Point
from moetune.report.format import human_bytes
from moetune.report.lines import counted, layer_line, regime_line
from moetune.report.table import add_numbers, new_table
from moetune.stats import geomean

TITLES: dict[ArmName, str] = {
    "default": "default",
    "engine": "engine's",
    "pure_ep": "pure EP",
    "dispatcher": "dispatcher",
}


def dep_bench_report(result: DepBench) -> list[RenderableType]:
    """Returns what was measured, and for each routing the table of tokens/s, of the parts, and of the wire."""
    shown: list[RenderableType] = [
        Text(layer_line(result.layer), style="bold"),
        Text(regime_line(result.regime)),
        Text(f"backend {result.backend} on {result.environment.device}; {_processes(result)}", style="dim"),
    ]
    for routing in dict.fromkeys(point.routing for point in result.points):
        points = [point for point in result.points if point.routing == routing]
        shown += [Text(), Text(f"{routing} routing, tokens/s per GPU of the slowest rank", style="bold")]
        shown += [speed_table(points), Text(), parts_table(points)]
    shown += [Text(), *_notes(result)]
    return shown


def speed_table(points: Sequence[Point]) -> Table:
    """Returns a row for each batch size: tokens/s of each arm, and how far the dispatcher's profile is ahead of it."""
    names = [name for name in TITLES if any(point.arm(name) for point in points)]
    table = new_table()
    add_numbers(table, "tokens\nper GPU", "rows", *(TITLES[name] for name in names))
    add_numbers(table, *(f"ahead of\n{TITLES[name]}" for name in names if name != "dispatcher"), "noise")
    for point in points:
        arms = [point.arm(name) for name in names]
        table.add_row(
            f"{point.tokens:,}",
            f"{point.rows_low:,}" if point.rows_low == point.rows_high else f"{point.rows_low:,}–{point.rows_high:,}",
            *("–" if arm is None else f"{arm.tokens_per_s:,.0f}" for arm in arms),
            *(_ahead(arm) for arm, name in zip(arms, names, strict=True) if name != "dispatcher"),
            f"{100 * point.noise:.2f} %",
        )
    return table


def parts_table(points: Sequence[Point]) -> Table:
    """Returns a row for each batch size: the parts in µs, the wire's bytes, and the kernel against its dummy."""
    names = list(dict.fromkeys(part.part for point in points for part in point.parts))
    wired = any(point.plan_bytes for point in points)
    compared = any(point.fidelity is not None for point in points)
    table = new_table()
    add_numbers(table, "tokens\nper GPU", *(f"{name}\nµs" for name in names))
    if wired:
        add_numbers(table, "planned", "received", "GB/s")
    if compared:
        add_numbers(table, "kernel ÷\ndummy")
        table.add_column("best by\ndummy")
    for point in points:
        times = {part.part: (part.fastest_us if _waits(part.part) else part.slowest_us) for part in point.parts}
        cells = [f"{point.tokens:,}", *(f"{times[name]:,.1f}" if name in times else "–" for name in names)]
        if wired:
            speed = point.received_bytes / times["dispatch"] / 1e3
            cells += [human_bytes(point.plan_bytes), human_bytes(point.received_bytes), f"{speed:,.1f}"]
        if compared:
            cells += ["–" if point.fidelity is None else f"{point.fidelity:.3f}", _agreement(point)]
        table.add_row(*cells)
    return table


def _waits(part: str) -> bool:
    """Returns whether a rank that is early waits in this part, so that the fastest rank has the part's own time."""
    return part in ("counts", "dispatch", "combine")


def _ahead(arm: ArmTime | None) -> Text:
    """Returns how far the dispatcher's profile is ahead of an arm, with its bounds: `+5.2 % (4.9 … 5.6)`."""
    if arm is None:
        return Text("–")
    if arm.gain == arm.gain_low == arm.gain_high == 1.0:
        return Text("same tactics", style="dim")
    value, low, high = (100 * (gain - 1) for gain in (arm.gain, arm.gain_low, arm.gain_high))
    style = "green" if low > 0 else "red" if high < 0 else ""
    return Text(f"{value:+.1f} % ({low:+.1f} … {high:+.1f})", style=style)


def _agreement(point: Point) -> str:
    return "–" if point.dummy_agrees is None else "same" if point.dummy_agrees else "another"


def _processes(result: DepBench) -> str:
    if result.ranks == 1:
        return f"one rank of {result.regime.ep_size}, without the wire"
    return f"{counted(result.ranks, 'rank')}, {result.wire} and {result.wire_routing} on the wire"


def _notes(result: DepBench) -> list[Text]:
    lines = [f"{TITLES[name]}: {source}" for name, source in result.sources.items()]
    lines += [f"{TITLES[name]}: none, because {reason}" for name, reason in result.missing.items()]
    lines.append("ahead: the arm's time over that of the dispatcher's profile, minus one, with 95 % bounds")
    if any(point.plan_bytes for point in result.points):
        lines.append("counts, dispatch and combine: the fastest rank's time, because the others wait for the last")
    if ratios := [ratio for point in result.points for ratio in point.fidelity_by_rank]:
        worst = max(ratios, key=lambda ratio: max(ratio, 1.0 / ratio))
        lines.append(
            "kernel ÷ dummy: the kernel's time in the block over its time on sampled routings; of all ranks and batch "
            f"sizes {geomean(ratios):.3f} (geometric mean), {worst:.3f} at worst"
        )
    lines += [
        f"timed without a CUDA graph: {reason}" for reason in dict.fromkeys(p.eager for p in result.points) if reason
    ]
    if result.left_out:
        left = ", ".join(f"{tokens} tokens under {routing}" for tokens, routing in result.left_out)
        lines.append(f"not measured for lack of time: {left}")
    return [Text(line, style="dim") for line in lines]
