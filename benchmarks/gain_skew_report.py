"""Reads the journal of `gain_skew.py`: what each tactic loses under each distribution, against the best known there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from moetune.stats import noise_floor, paired_ratio

TACTICS = {
    "random": "tuned for random",
    "here": "tuned there",
    "worst": "objective worst",
    "engine": "the engine's",
}
"""The tactics of a cell, and the titles of their columns."""
GROUP = ("model", "ep", "load", "backend", "device")

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """The times of one place under one distribution."""

    line: Line

    @property
    def total_us(self) -> dict[str, float]:
        """The time of each tactic, summed over the draws; infinite if it failed."""
        return {name: sum(series) if series else math.inf for name, series in self.line["us"].items()}

    @property
    def best(self) -> str:
        """The fastest tactic."""
        totals = self.total_us
        return min(totals, key=lambda name: totals[name])

    def loss(self, name: str) -> float:
        """Returns how much slower a tactic is than the best known one, relative."""
        totals = self.total_us
        return totals[name] / totals[self.best] - 1

    @property
    def noise(self) -> float:
        """The A/A noise of the tactic that was timed twice."""
        first, again = self.line["us"]["random"], self.line["again"]
        return noise_floor(first, again) if first and again else math.inf

    def is_clear(self, name: str) -> bool:
        """Returns whether the lower 95 % bound of a loss lies beyond the A/A noise."""
        mine, best = self.line["us"][name], self.line["us"][self.best]
        if not mine or not best or self.loss(name) == 0:
            return not mine
        return paired_ratio(mine, best).low > 1 + self.noise

    def shown(self, name: str) -> str:
        """Returns the loss in percent, in bold if it is clear."""
        if not self.line["us"][name]:
            return "**failed**"
        text = f"{self.loss(name):.1%}"
        return f"**{text}**" if self.is_clear(name) else text


def places(lines: Sequence[Line]) -> dict[tuple[Any, ...], dict[int, dict[str, Cell]]]:
    """Returns the last cell of each distribution, by deployment, by tokens and by distribution."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Cell]]] = {}
    for line in lines:
        if line["kind"] == "cell":
            of_deployment = found.setdefault(tuple(line[name] for name in GROUP), {})
            of_deployment.setdefault(line["tokens"], {})[line["distribution"]] = Cell(line)
    return {key: dict(sorted(of_tokens.items())) for key, of_tokens in found.items()}


def markdown(lines: Sequence[Line]) -> str:
    """Returns a table of all places, and for each deployment one of its cells."""
    found = places(lines)
    if not found:
        return "The journal has no cell."
    text = [
        "Loss: the time over that of the fastest of the four tactics under that distribution, minus one. Mean and "
        "largest are over the distributions of the place that are measured.",
        "",
        "| deployment | tokens a rank (rows) | distributions "
        + "".join(f"| {title}: mean / largest " for title in TACTICS.values())
        + "|",
        "|---" * (3 + len(TACTICS)) + "|",
    ]
    for key, of_tokens in found.items():
        text += [_place_row(key, tokens, cells) for tokens, cells in of_tokens.items()]
    text += ["", *_bottom_lines(found)]
    for key, of_tokens in found.items():
        text += ["", f"## {_name(key)}, {key[-1]}", "", *_cells_table(of_tokens)]
    return "\n".join(text)


def _name(key: Sequence[Any]) -> str:
    model, ep, load, backend, _ = key
    return f"{model} EP{ep} {load}, {backend}"


def _losses(cells: Mapping[str, Cell], name: str) -> list[float]:
    return [cell.loss(name) for cell in cells.values()]


def _place_row(key: Sequence[Any], tokens: int, cells: Mapping[str, Cell]) -> str:
    rows = next(iter(cells.values())).line["rows"]
    losses = [_losses(cells, name) for name in TACTICS]
    shown = "".join(f"| {fmean(each):.1%} / {max(each):.1%} " for each in losses)
    return f"| {_name(key)} | {tokens} ({rows}) | {len(cells)} {shown}|"


def _bottom_lines(found: Mapping[tuple[Any, ...], Mapping[int, Mapping[str, Cell]]]) -> list[str]:
    """Returns a line for each deployment: what objective `worst` gains at the worst, and costs in the mean."""
    lines = []
    for key, of_tokens in found.items():
        pairs = [(_losses(cells, "random"), _losses(cells, "worst")) for cells in of_tokens.values()]
        before, after = ([max(each[at]) for each in pairs] for at in range(2))
        cost = [fmean(worst) - fmean(random) for random, worst in pairs]
        lower = sum(worst < random for random, worst in zip(before, after, strict=True))
        lines.append(
            f"- {_name(key)}: the largest loss is {fmean(before):.1%} tuned for random and {fmean(after):.1%} with "
            f"objective worst, means over {len(pairs)} places; it is lower in {lower}. The mean loss changes by "
            f"{100 * fmean(cost):+.1f} points, at most {100 * max(cost):+.1f}."
        )
    return lines


def _cells_table(of_tokens: Mapping[int, Mapping[str, Cell]]) -> list[str]:
    text = [
        "| tokens a rank (rows) | distribution | busiest expert over the mean | best (µs) "
        + "".join(f"| {title} " for title in TACTICS.values())
        + "| A/A noise |",
        "|---" * (5 + len(TACTICS)) + "|",
    ]
    for tokens, cells in of_tokens.items():
        for name, cell in cells.items():
            best_us = cell.total_us[cell.best] / len(cell.line["us"][cell.best])
            text.append(
                f"| {tokens} ({cell.line['rows']}) | {name} | {cell.line['max_over_mean']:.2f} | {best_us:.1f} "
                + "".join(f"| {cell.shown(each)} " for each in TACTICS)
                + f"| {cell.noise:.1%} |"
            )
    noises = [cell.noise for cells in of_tokens.values() for cell in cells.values()]
    return [*text, "", f"Bold: the lower 95 % bound lies beyond the A/A noise, median {median(noises):.1%}."]
