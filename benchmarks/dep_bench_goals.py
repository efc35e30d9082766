"""Summarizes documents of `moetune dep-bench --json` as Markdown, and says which goals they reach.

    PYTHONPATH=. python benchmarks/dep_bench_goals.py DOCUMENT.json … [--named 256,512]
    PYTHONPATH=. python benchmarks/dep_bench_goals.py --wire BF16.json FP4-LOGITS.json FP4-PACKED.json

The goals: moetune's profile for the dispatcher is never slower than another arm, beyond the noise. It is at least 5 %
ahead of the engine's own choice in tokens/s per GPU at the batch sizes that were named before the run. The kernel's
time in the block is within 3 % of its time on sampled routings (geometric mean), and within 10 % at worst. Exits 1 if a
goal is missed.

`--wire` compares the dispatch of several formats, the first one being the plain one: bytes, times, and the batch size
from which on quantizing pays, its own time included.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from moetune.dep_bench.result import ArmName, DepBench, Point
from moetune.stats import geomean

AHEAD = 1.05
FIDELITY = 1.03
WORST_FIDELITY = 1.10
OTHERS: tuple[ArmName, ...] = ("default", "engine", "pure_ep")


def title(result: DepBench) -> str:
    regime = result.regime
    processes = f"{result.ranks} ranks" if result.ranks > 1 else f"one rank of {regime.ep_size}"
    return f"{result.layer.name}, {result.backend}, {regime.layout or regime.dispatch}, {processes}"


def faster_arms(point: Point) -> list[ArmName]:
    """Returns the arms that are faster than the dispatcher's profile, beyond the 95 % bounds and the A/A noise."""
    arms = [arm for arm in point.arms if arm.arm in OTHERS]
    return [arm.arm for arm in arms if arm.gain_high < 1.0 and 1.0 / arm.gain - 1.0 > point.noise]


def off(ratio: float) -> float:
    """Returns by which factor a ratio differs from one: 0.95 and 1/0.95 alike."""
    return math.exp(abs(math.log(ratio)))


def table(result: DepBench) -> Iterator[str]:
    """Yields a Markdown table with a row for each point."""
    yield "| routing | tokens | rows | dispatcher, tokens/s per GPU | vs default | vs engine | vs pure EP | noise | kernel ÷ dummy | best by dummy |"  # fmt: skip  # noqa: E501
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for point in result.points:
        own = point.arm("dispatcher")
        assert own is not None
        gains = [point.arm(name) for name in OTHERS]
        ahead = [
            "–" if arm is None else f"{arm.gain - 1:+.1%} ({arm.gain_low - 1:+.1%} … {arm.gain_high - 1:+.1%})"
            for arm in gains
        ]
        fidelity = "–" if point.fidelity is None else f"{point.fidelity:.3f}"
        agrees = {None: "–", True: "same", False: "another"}[point.dummy_agrees]
        rows = f"{point.rows_low}" if point.rows_low == point.rows_high else f"{point.rows_low}–{point.rows_high}"
        cells = [point.routing, point.tokens, rows, f"{own.tokens_per_s:,.0f}", *ahead, f"{point.noise:.2%}"]
        yield f"| {' | '.join(map(str, [*cells, fidelity, agrees]))} |"


def missed(result: DepBench, named: Sequence[int]) -> list[str]:
    """Returns a sentence for each goal that is missed."""
    found = [
        f"{point.routing}, {point.tokens} tokens: slower than {', '.join(faster_arms(point))}"
        for point in result.points
        if faster_arms(point)
    ]
    for point in result.points:
        engine = point.arm("engine")
        if point.tokens in named and engine is not None and engine.gain < AHEAD:
            found.append(f"{point.routing}, {point.tokens} tokens: {engine.gain - 1:+.1%} ahead of the engine's choice")
    ratios = [ratio for point in result.points for ratio in point.fidelity_by_rank]
    if ratios and off(geomean(ratios)) > FIDELITY:
        found.append(f"kernel ÷ dummy {geomean(ratios):.3f} (geometric mean)")
    if ratios and max(map(off, ratios)) > WORST_FIDELITY:
        found.append(f"kernel ÷ dummy {max(ratios, key=off):.3f} at worst")
    return found


def dispatch_us(point: Point) -> float:
    """Returns the time of the collective, and of quantizing and packing before it, in µs."""
    return sum(
        part.fastest_us if part.part == "dispatch" else part.slowest_us
        for part in point.parts
        if part.part in ("quantize", "pack", "dispatch")
    )


def wire_table(results: Sequence[DepBench]) -> Iterator[str]:
    """Yields a Markdown table of the formats' dispatches, and for each the batch size from which on it pays."""
    names = [f"{result.wire} + {result.wire_routing}" for result in results]
    points = [{point.tokens: point for point in result.points} for result in results]
    sizes = sorted(set.intersection(*map(set, points)))
    heads = [f"{name}: µs | planned, received | GB/s" for name in names]
    heads += [f"{name}: fewer bytes | faster dispatch | with quantizing" for name in names[1:]]
    yield f"| tokens | {' | '.join(heads)} |"
    yield "|---" * (1 + 3 * len(names) + 3 * (len(names) - 1)) + "|"
    for size in sizes:
        first, *others = (of_format[size] for of_format in points)
        cells = [
            f"{_collective_us(each):.1f} | {each.plan_bytes:,}, {each.received_bytes:,} | "
            f"{each.received_bytes / _collective_us(each) / 1e3:.1f}"
            for each in (first, *others)
        ]
        cells += [
            f"{first.received_bytes / each.received_bytes:.2f}× | "
            f"{_collective_us(first) / _collective_us(each):.2f}× | {dispatch_us(first) / dispatch_us(each):.2f}×"
            for each in others
        ]
        yield f"| {size} | {' | '.join(cells)} |"
    yield ""
    for name, of_format in zip(names[1:], points[1:], strict=True):
        pays = [size for size in sizes if dispatch_us(of_format[size]) < dispatch_us(points[0][size])]
        since = next((size for size in pays if set(sizes[sizes.index(size) :]) <= set(pays)), None)
        yield f"{name}: " + ("does not pay" if since is None else f"pays from {since} tokens a rank on")


def _collective_us(point: Point) -> float:
    return next(part.fastest_us for part in point.parts if part.part == "dispatch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--named", default="", help="batch sizes at which 5 %% ahead of the engine was promised")
    parser.add_argument("--wire", action="store_true")
    options = parser.parse_args()
    results = [DepBench.model_validate_json(path.read_text(encoding="utf-8")) for path in options.documents]
    if options.wire:
        print("\n".join(wire_table(results)))
        return 0
    named = [int(word) for word in options.named.split(",") if word]
    every: list[str] = []
    for result in results:
        goals = missed(result, named)
        print(f"### {title(result)}", "", *table(result), "", sep="\n")
        print(*(f"missed: {goal}" for goal in goals or []), sep="\n", end="\n" if goals else "")
        every += goals
    return 1 if every else 0


if __name__ == "__main__":
    sys.exit(main())
