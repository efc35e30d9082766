"""Reads the journal of `every_row.py`: how much slower or faster moetune's choices are than the engine's tactics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetune.spec.tactic import Tactic
from moetune.stats import Ratio, geomean, noise_floor, paired_ratio

NUM_ROW_COUNTS = 40
WITHIN = 0.01
"""A cell is slower if the 95 % interval of the choice's time over the other's lies wholly above 1 + this."""
LEAST_GAIN = 1.06
"""The least geometric mean of the gains over a backend's default."""
OTHERS = ("default", "shipped", "own")
NAMES = {"default": "the default", "shipped": "vLLM's file", "own": "FlashInfer's autotune"}

Line = Mapping[str, Any]
GROUP = ("model", "ep", "load", "backend", "kernel", "ladder", "device")


def slowdown(line: Line, other: str) -> Ratio | None:
    """Returns the choice's time over another tactic's on the same draws, with the bounds of its 95 % interval.

    It is infinite if the choice failed. It is None if there is no such tactic in the cell, or if that one failed.
    """
    if other not in line["tactics"] or other in line["failed"]:
        return None
    if "choice" in line["failed"]:
        return Ratio(math.inf, math.inf, math.inf)
    if Tactic(line["tactics"][other]) == Tactic(line["tactics"]["choice"]):
        return Ratio(1.0, 1.0, 1.0)
    pair = line["pairs"][other]
    return paired_ratio(pair["choice_us"], pair["other_us"])


@dataclass(frozen=True, slots=True)
class Against:
    """A deployment's choices against one of the other tactics: the slowdown of each cell, by rows."""

    slowdowns: Mapping[int, Ratio]

    @property
    def worst(self) -> int:
        """The row count of the cell with the largest slowdown."""
        return max(self.slowdowns, key=lambda rows: self.slowdowns[rows].value)

    @property
    def slower(self) -> list[int]:
        """The row counts of the cells whose interval lies wholly beyond 1 % slower."""
        return [rows for rows, ratio in self.slowdowns.items() if ratio.low > 1 + WITHIN]

    @property
    def gains(self) -> list[float]:
        """The other's time over the choice's in each cell in which the choice ran."""
        return [1 / ratio.value for ratio in self.slowdowns.values() if math.isfinite(ratio.value)]


@dataclass(frozen=True, slots=True)
class Deployed:
    """The cells of one deployment, measured with its last profile, by rows."""

    key: tuple[Any, ...]
    cells: Mapping[int, Line]

    @property
    def name(self) -> str:
        """The deployment's name."""
        model, ep, load, backend, kernel, *_ = self.key
        return f"{model} EP{ep} {load}, {backend}" + (f" ({kernel})" if kernel else "")

    def against(self, other: str) -> Against | None:
        """Returns the comparison with another tactic; None if no cell has it."""
        found = {rows: ratio for rows, line in self.cells.items() if (ratio := slowdown(line, other))}
        return Against(found) if found else None

    @property
    def noises(self) -> list[float]:
        """The A/A noise of each cell."""
        return [noise_floor(*line["again"]) for line in self.cells.values() if line["again"]]


def deployed(lines: Sequence[Line]) -> list[Deployed]:
    """Returns the deployments in the order of their first cells. Only cells of a deployment's last profile count."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        if line["kind"] == "cell":
            groups.setdefault(tuple(line[name] for name in GROUP), []).append(line)
    found = []
    for key, cells in groups.items():
        last = [line for line in cells if line["profile"] == cells[-1]["profile"]]
        found.append(Deployed(key, {line["rows"]: line for line in sorted(last, key=lambda line: line["rows"])}))
    return found


def gains_over_default(found: Sequence[Deployed]) -> dict[tuple[Any, ...], list[float]]:
    """Returns the gains over the default in all cells of each backend, kernel, ladder and device."""
    gains: dict[tuple[Any, ...], list[float]] = {}
    for each in found:
        if against := each.against("default"):
            gains.setdefault(each.key[3:], []).extend(against.gains)
    return gains


def holds(lines: Sequence[Line], least_gain: float = LEAST_GAIN) -> bool:
    """Returns whether all cells are there, none is slower, and each backend's gain over its default is large enough."""
    found = deployed(lines)
    return (
        bool(found)
        and all(len(each.cells) >= NUM_ROW_COUNTS for each in found)
        and not any(_slower(found))
        and all(gains and geomean(gains) >= least_gain for gains in gains_over_default(found).values())
    )


def markdown(lines: Sequence[Line], least_gain: float = LEAST_GAIN) -> str:
    """Returns a table with a line for each deployment, the geometric means, and the cells that are slower."""
    found = deployed(lines)
    if not found:
        return "The journal has no cell."
    compared = [other for other in OTHERS if any(each.against(other) for each in found)]
    head = [f"over {NAMES[other]} | worst cell | slower" for other in compared]
    text = [
        " | ".join(["| deployment | ladder | device | buckets | cells", *head, "A/A noise: median / most |"]),
        "|---" * (6 + 3 * len(compared)) + "|",
        *(_row(each, compared) for each in found),
        "",
        "*over*: the other's time over the choice's, geometric mean of the cells. *worst cell*: how much slower the "
        "choice is there, with its 95 % interval. "
        f"*slower*: cells whose interval lies wholly beyond {WITHIN:.0%} slower.",
        "",
    ]
    for (backend, kernel, ladder, device), gains in gains_over_default(found).items():
        mean = f"{geomean(gains):.4f}×" if gains else "–"
        of = f"{backend} {kernel}".strip()
        text.append(
            f"- {of}, ladder {ladder}, {device}: {mean} over the default, {len(gains)} cells; goal {least_gain}×"
        )
    slower = list(_slower(found))
    text += ["", "## Slower cells", "", *(slower or [f"No cell's interval lies wholly beyond {WITHIN:.0%} slower."])]
    if failed := list(_failed(found)):
        text += ["", "## Failed tactics", "", *failed]
    return "\n".join(text)


def _row(each: Deployed, compared: Sequence[str]) -> str:
    *_, ladder, device = each.key
    buckets = next(iter(each.cells.values()))["buckets"]
    cells = [each.name, ladder, device, str(buckets), f"{len(each.cells)} of {NUM_ROW_COUNTS}"]
    for other in compared:
        against = each.against(other)
        if against is None:
            cells += ["–", "–", "–"]
            continue
        mean = f"{geomean(against.gains):.3f}×" if against.gains else "–"
        cells += [mean, f"{_ratio(against.slowdowns[against.worst])} at {against.worst}", str(len(against.slower))]
    noises = each.noises
    cells.append(f"{statistics.median(noises):.2%} / {max(noises):.2%}" if noises else "–")
    return f"| {' | '.join(cells)} |"


def _ratio(ratio: Ratio) -> str:
    if math.isinf(ratio.value):
        return "failed"
    return f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"


def _slower(found: Sequence[Deployed]) -> Iterator[str]:
    for each in found:
        for other in OTHERS:
            against = each.against(other)
            for rows in against.slower if against else ():
                assert against is not None
                line = each.cells[rows]
                chosen, compared = (Tactic(line["tactics"][name]) for name in ("choice", other))
                noise = f", A/A {noise_floor(*line['again']):.1%}" if line["again"] else ""
                yield (
                    f"- {each.name}, {rows} rows: {_ratio(against.slowdowns[rows])} against {NAMES[other]}{noise}; "
                    f"`{chosen}` against `{compared}`"
                )


def _failed(found: Sequence[Deployed]) -> Iterator[str]:
    for each in found:
        for rows, line in each.cells.items():
            for name, reason in line["failed"].items():
                yield f"- {each.name}, {rows} rows, {name}: {reason}"
