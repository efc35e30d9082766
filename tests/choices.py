"""A choice with plausible numbers, for tests to change."""

from __future__ import annotations

from typing import Any

from moetune.store.profile import Choice


def make_choice(rows: int, **changed: Any) -> Choice:
    given: dict[str, Any] = {
        "rows": rows,
        "tactic": {"tile": rows},
        "time_us": 10.0 + rows,
        "default_tactic": {"tile": 0},
        "default_time_us": 12.5 + rows,
        "gain": 1.25,
        "gain_low": 1.1,
        "gain_high": 1.4,
        "noise": 0.01,
        "stress_us": {"2": 11.5},
        "default_stress_us": {"2": 12.5},
        "tried": 5,
        "candidates": 6,
        "rejected": ({"tactic": {"tile": -1}, "reason": "does not compile"},),
        "load": (rows, 0),
        "max_load": rows,
        "measured_at": "2026-01-01T00:00:00Z",
    }
    return Choice(**{**given, **changed})
