"""Defines a search: a generator that yields batches, receives their times and returns its finalists."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from moetune.spec.tactic import Tactic


@dataclass(frozen=True, slots=True)
class Batch:
    """Names tactics to time together, in interleaved rounds, each `rounds` times.

    `likely_next` are the tactics that the search would propose next if it learned nothing from these, the likeliest
    first. They can be compiled meanwhile.
    """

    tactics: tuple[Tactic, ...]
    rounds: int = 1
    likely_next: tuple[Tactic, ...] = ()


Times = Mapping[Tactic, float]
"""Mean time in µs of each tactic of a batch that ran; one that failed is absent."""

Search = Generator[Batch, Times, tuple[Tactic, ...]]
"""Yields batches, receives their times, returns the finalists, the most promising first."""
