"""Tests of benchmarks/wider_space.py on planted times."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import wider_space

from moetune.backends.grouped_triton.space import VALUES
from moetune.measure.bench import Bench, Series
from moetune.spec.tactic import Tactic

CHOICE = Tactic(BLOCK_SIZE_M=16, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128, GROUP_SIZE_M=1, num_warps=4, num_stages=3)


def cell(model: str, rows: int, **changed: Any) -> dict[str, Any]:
    return {"kind": "cell", "backend": "triton", "load": "allgather", "model": model, "ep": 8, "rows": rows, **changed}


class PlantedBench:
    """A bench whose tactics take 100 µs, the one with `fast` 80 µs, and the one with `broken` fails."""

    def __init__(self, fast: Tactic, broken: Tactic) -> None:
        self.fast, self.broken = fast, broken
        self.failures: dict[Tactic, str] = {}

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int], limit_us: float = 0.0) -> Series:
        self.failures[self.broken] = "does not run"
        return [
            None if tactic == self.broken else tuple(80.0 if tactic == self.fast else 100.0 for _ in draws)
            for tactic in tactics
        ]


@pytest.mark.parametrize("fp8", [False, True])
def test_each_variant_is_outside_the_engines_space_or_pairs_values(fp8: bool) -> None:
    found = wider_space.variants(CHOICE, fp8=fp8)
    assert len(set(found)) == len(found)
    for tactic in found:
        changed = {name: value for name, value in tactic.items() if CHOICE.get(name) != value}
        assert changed
        assert any(value not in VALUES.get(name, ()) for name, value in changed.items())
        assert not (fp8 and "BLOCK_SIZE_K" in changed)


def test_cells_are_those_of_triton_under_all_gather_at_the_steps() -> None:
    lines = [cell(model, rows) for model in ("one", "two") for rows in range(40, 0, -1)]
    lines += [cell("one", 500, backend="flashinfer-cutlass"), cell("one", 600, load="deduplicated")]
    found = [(line["model"], line["rows"]) for line in wider_space.cells(lines)]
    assert found == [(model, step + 1) for step in wider_space.STEPS for model in ("one", "two")]


def test_the_fastest_comes_first_and_a_failed_tactic_has_its_reason() -> None:
    slow, fast, broken = wider_space.variants(CHOICE, fp8=False)[:3]
    bench = PlantedBench(fast, broken)
    found = wider_space.compare(cast("Bench", bench), CHOICE, [slow, fast, broken])
    assert found["results"] == [(0.8, dict(fast)), (1.0, dict(slow))]
    assert (found["us"], found["again"]) == (100.0, 1.0)
    assert found["failed"] == {str(broken): "does not run"}


def test_the_report_says_what_the_fastest_changes_and_what_all_would_save() -> None:
    fast = {**CHOICE, "maxnreg": 64}
    line = {"model": "one", "ep": 8, "rows": 9, "choice": dict(CHOICE), "us": 50.0, "again": 0.99, "failed": {}}
    text = wider_space.markdown([{**line, "results": [[0.9, fast]]}, {**line, "results": [[1.1, fast]]}])
    assert "| one | 8 | 9 | 50 | 0.9900 | 0.9000 | maxnreg 64 |" in text
    assert "If each cell had its fastest tactic: 0.9487" in text
    assert "| maxnreg 64 | 2 | 0.995 | 0.900 | 1.100 |" in text
