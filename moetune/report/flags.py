"""Shows which flag of an engine selects the fastest kernels: by row count, for one process, and for separate pools."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.report.table import add_numbers, new_table
from moetune.spec.enums import ENGINE_TITLES
from moetune.tuning.comparison import FlagAnswer, FlagCost, FlagRange


def flags_report(answers: dict[str, FlagAnswer], engine: str | None = None) -> list[RenderableType]:
    """Returns the answers of all engines, or of `engine` alone, for those that can choose between two flags or more."""
    shown = {name: answer for name, answer in answers.items() if name == engine or engine is None}
    reported: list[RenderableType] = []
    for name, answer in shown.items():
        if len(answer.flags) > 1:
            reported += ["", *_answer(ENGINE_TITLES[name], answer)]
    return reported


def _answer(title: str, answer: FlagAnswer) -> list[RenderableType]:
    lines: list[RenderableType] = [Text(f"{title} by rows: {', '.join(_ranges(answer.ranges))}"), flags_table(answer)]
    lines += [Text(line) for line in _advice(title, answer)]
    if not answer.interleaved:
        lines.append(Text("some times come from separate runs, so small differences decide nothing", style="yellow"))
    return lines


def flags_table(answer: FlagAnswer) -> Table:
    """Returns a row for each flag: how much slower it is than the fastest flag, in decode and in prefill."""
    table = new_table()
    table.add_column("flag", overflow="fold")
    phases = [f"decode, up to\n{answer.decode_rows:,} rows", "prefill"]
    add_numbers(table, *(f"{phase}:\nslower by" for phase in phases), "at worst")
    for result in answer.flags:
        costs = (result.decode, result.prefill)
        worst = max((cost for cost in costs if cost), key=lambda cost: cost.worst, default=None)
        table.add_row(result.flag, *map(_mean, costs), _worst(worst))
    return table


def _ranges(ranges: tuple[FlagRange, ...]) -> Iterable[str]:
    """Yields `up to 256 --moe-backend triton`, and `from 512 --moe-backend cutlass` for the last range."""
    for at, each in enumerate(ranges):
        if len(ranges) == 1:
            yield f"{each.flag} at every row count"
        elif at == len(ranges) - 1:
            yield f"from {each.first_rows:,} {each.flag}"
        else:
            yield f"up to {each.last_rows:,} {each.flag}"


def _advice(title: str, answer: FlagAnswer) -> Iterable[str]:
    """Yields the flag for one process, the flags for separate pools, and what runs without a flag."""
    if result := answer.result(answer.one_flag):
        costs = {"decode": result.decode, "prefill": result.prefill}
        slower = [f"{_percent(cost.mean)} in {phase}" for phase, cost in costs.items() if cost]
        yield f"one flag for all: {result.flag}, slower than the fastest by {' and '.join(slower)} on average"
    else:
        yield "one flag for all: no flag has a time at every row count"
    pools = {"decode": answer.decode_flag, "prefill": answer.prefill_flag}
    if all(pools.values()):
        yield f"separate pools: {', '.join(f'{phase} {flag}' for phase, flag in pools.items())}"
    for result in answer.flags:
        if result.backend == answer.default:
            yield f"without a flag {title} runs {result.backend} on Hopper, as with {result.flag}"


def _mean(cost: FlagCost | None) -> str:
    return "–" if cost is None else _percent(cost.mean)


def _worst(cost: FlagCost | None) -> str:
    return "–" if cost is None else f"{_percent(cost.worst)} ({cost.worst_rows:,} rows)"


def _percent(slowdown: float) -> str:
    """Returns `3.2 %`, or `120 %` without decimals from 100 % on."""
    percent = 100 * (slowdown - 1)
    return f"{percent:.0f} %" if percent >= 100 else f"{percent:.1f} %"
