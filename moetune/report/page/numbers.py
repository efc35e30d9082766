"""The numbers of several profiles, as rows that the page, its CSV and its JSON share."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from moetune.quoting import printable, shortened
from moetune.report.page.roofline import Work, work_by_bucket
from moetune.report.tactics import tactic_line
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile

_FORMULA = ("=", "+", "-", "@")
"""A spreadsheet computes a cell that begins with one of these."""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison of a bucket's tactic with the default.

    Attributes:
        profile: the profile's label.
        kind: `bucket`, a choice as a whole, or `row count`, one of the row counts at which it was compared.
        bucket: the bucket.
        rows: the row count; for `bucket` the bucket.
        tactic, default_tactic: as `Choice` or `ComparedRows` has them, each in one line.
        time_us, default_time_us: their times in µs. For a row count the second is `time_us` times the gain.
        gain, gain_low, gain_high, noise: as `Choice` or `ComparedRows` has them.
        regret_high, tried, candidates, max_load: as `Choice` has them. None for a row count.
        weight_bytes, flops, least_us: as `Work` has them. None for a row count.
        measured_at: ISO 8601, UTC.
        distribution: the distribution; for `bucket` all of the regime with their weights.
    """

    profile: str
    kind: Literal["bucket", "row count"]
    bucket: int
    rows: int
    tactic: str
    default_tactic: str
    time_us: float
    default_time_us: float
    gain: float
    gain_low: float
    gain_high: float
    noise: float
    regret_high: float | None
    tried: int | None
    candidates: int | None
    max_load: int | None
    weight_bytes: int | None
    flops: int | None
    least_us: float | None
    measured_at: str
    distribution: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A profile to show.

    Attributes:
        label: what distinguishes it from the others.
        path: its file, as it was given.
        profile: the profile.
        work: the work of its buckets, by rows; without those that are too large to compute.
    """

    label: str
    path: str
    profile: Profile
    work: dict[int, Work]

    @property
    def rows(self) -> list[Row]:
        """Returns the rows of every bucket: the bucket's own, then those of its row counts."""
        return [row for choice in self.profile.choices for row in self._of(choice)]

    def _of(self, choice: Choice) -> list[Row]:
        work = self.work.get(choice.rows)
        own = Row(
            self.label,
            "bucket",
            choice.rows,
            choice.rows,
            line(choice.tactic),
            line(choice.default_tactic),
            choice.time_us,
            choice.default_time_us,
            choice.gain,
            choice.gain_low,
            choice.gain_high,
            choice.noise,
            choice.regret_high,
            choice.tried,
            choice.candidates,
            choice.max_load,
            work.weight_bytes if work else None,
            work.flops if work else None,
            work.least_us if work else None,
            choice.measured_at,
            self.profile.regime.spelled_distributions,
        )
        return [own] + [
            Row(
                self.label,
                "row count",
                choice.rows,
                each.rows,
                own.tactic,
                line(each.default_tactic),
                each.time_us,
                each.time_us * each.gain,
                each.gain,
                each.gain_low,
                each.gain_high,
                each.noise,
                *(None,) * 7,
                choice.measured_at,
                each.distribution or self.profile.regime.distribution,
            )
            for each in choice.by_rows
        ]


def line(tactic: Tactic) -> str:
    """Returns a tactic in one short line that can be shown anywhere."""
    return shortened(printable(tactic_line(tactic))) if tactic else "–"


def shown(profiles: Sequence[tuple[str, Profile]]) -> list[Shown]:
    """Returns profiles, given with their files, each with a label and the work of its buckets."""
    names = labels([profile for _, profile in profiles])
    return [
        Shown(name, printable(path), profile, work_by_bucket(profile))
        for name, (path, profile) in zip(names, profiles, strict=True)
    ]


def labels(profiles: Sequence[Profile]) -> list[str]:
    """Returns a short label for each profile: what differs between them. No two labels are equal."""
    parts = [_parts(profile) for profile in profiles]
    same = {at for at in range(len(parts[0])) if len({each[at] for each in parts}) == 1} if parts else set()
    found: list[str] = []
    for each in parts:
        differing = [part for at, part in enumerate(each) if at not in same and part]
        label = shortened(printable(" · ".join(differing or [each[0]])))
        number = sum(other == label or other.startswith(f"{label} (") for other in found)
        found.append(f"{label} ({number + 1})" if number else label)
    return found


def _parts(profile: Profile) -> list[str]:
    layer, regime, strict = profile.layer, profile.regime, profile.environment.strict
    return [
        layer.name,
        layer.precision.value,
        f"ep {regime.ep_size}",
        f"tp {regime.tp_size}",
        "attention DP" if regime.attention_dp else "no attention DP",
        f"{regime.dispatch} {regime.layout}" if regime.layout else f"dispatch {regime.dispatch}",
        f"{regime.redundant_experts} redundant experts" if regime.redundant_experts else "",
        regime.spelled_distributions + (f" {regime.objective}" if regime.objective else ""),
        f"rank {regime.rank}" if regime.rank else "",
        f"seed {regime.seed}" if regime.seed else "",
        f"ladder {regime.ladder}",
        profile.backend,
        profile.environment.device,
        *(f"{name} {strict[name]}" if name in strict else "" for name in ("torch", "triton", "kernel", "remote")),
    ]


def csv_text(profiles: Sequence[Shown]) -> str:
    """Returns all rows as CSV (RFC 4180). A text that a spreadsheet would compute begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([field.name for field in fields(Row)])
    for profile in profiles:
        for row in profile.rows:
            writer.writerow([_cell(value) for value in asdict(row).values()])
    return text.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
