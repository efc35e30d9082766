"""Formats the journal of `run.py` as Markdown, and decides whether moetune's arms hold.

A cell is a case, a kind of step and its size. An arm's time in a repetition is the median over the process's passes.
Two arms are compared by the repetitions that both have: a repetition of all arms runs on one GPU. The bounds are
bootstrapped (`moetune.stats.paired_ratio`). The noise is that between the passes of the stock arm's processes.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from arms import ARMS, telling_lines
from cases import CASES

from moetune import stats

Line = Mapping[str, Any]
KINDS = {"decode": "running sequences", "prefill": "prompt tokens"}
REFERENCE = "default"


class Comparison(NamedTuple):
    """One arm against another in one cell.

    Attributes:
        ratio: the arm's time over the other's, with its bounds; None with fewer than two common repetitions.
        single: that ratio of the only common repetition.
        noise: how much two passes of one process of the other arm differ, relative.
    """

    ratio: stats.Ratio | None
    single: float | None
    noise: float | None

    @property
    def is_slower(self) -> bool:
        """Whether the arm is slower beyond the noise."""
        return self.ratio is not None and self.ratio.low > 1 + (self.noise or 0.0)

    @property
    def text(self) -> str:
        """The ratio as a gain in percent, with its bounds."""
        if self.ratio is None:
            return "–" if self.single is None else f"{1 / self.single - 1:+.1%} (one run)"
        return f"{1 / self.ratio.value - 1:+.1%} [{1 / self.ratio.high - 1:+.1%}, {1 / self.ratio.low - 1:+.1%}]"


class Runs:
    """The last run of each arm and repetition of one case."""

    def __init__(self, lines: Sequence[Line], case: str) -> None:
        mine = [line for line in lines if line["kind"] == "run" and line["case"] == case]
        found = {(line["arm"], line["rep"]): line for line in mine}
        self.runs: list[Line] = [found[key] for key in sorted(found)]
        self.arms = [arm for arm in ARMS if any(run["arm"] == arm for run in self.runs)]

    def of(self, arm: str) -> list[Line]:
        """Returns an arm's runs by repetition."""
        return [run for run in self.runs if run["arm"] == arm]

    def passes(self, run: Line, kind: str, at: int) -> list[float]:
        """Returns the times in ms of a run's passes, each of the slowest rank."""
        times: dict[int, float] = {}
        for rank in run["ranks"]:
            for line in rank:
                if line["what"] == kind and line["at"] == at and "ms" in line:
                    times[line["number"]] = max(times.get(line["number"], 0.0), line["ms"])
        return [times[number] for number in sorted(times)]

    def times(self, arm: str, kind: str, at: int) -> dict[int, float]:
        """Returns an arm's time in ms in each repetition."""
        found = ((run["rep"], self.passes(run, kind, at)) for run in self.of(arm))
        return {rep: statistics.median(passes) for rep, passes in found if passes}

    def sizes(self, kind: str) -> list[int]:
        """Returns the measured sizes of a kind of step."""
        return sorted(
            {line["at"] for run in self.runs for rank in run["ranks"] for line in rank if line["what"] == kind}
        )

    def profile(self, arm: str, kind: str, at: int) -> Line | None:
        """Returns the profile of an arm's step, of the rank whose grouped GEMMs take longest."""
        found = [
            line
            for run in self.of(arm)
            for rank in run["ranks"]
            for line in rank
            if line["what"] == f"profile {kind}" and line["at"] == at and "moe_ms" in line
        ]
        return max(found, key=lambda line: float(line["moe_ms"]), default=None)

    def stock(self, arm: str) -> str | None:
        """Returns the arm that this one is compared with, or the default where vLLM ships no file.

        The default runs Triton experts. So an arm of other experts is not compared with it.
        """
        wanted = ARMS[arm].stock
        alike = ARMS[arm].moe_backend == ARMS[REFERENCE].moe_backend
        if wanted is None or wanted in self.arms:
            return wanted
        return REFERENCE if alike and REFERENCE in self.arms else None

    def compare(self, arm: str, other: str, kind: str, at: int) -> Comparison:
        """Returns an arm against another one."""
        mine, theirs = self.times(arm, kind, at), self.times(other, kind, at)
        common = sorted(mine.keys() & theirs.keys())
        if len(common) < 2:
            return Comparison(None, mine[common[0]] / theirs[common[0]] if common else None, None)
        ratio = stats.paired_ratio([mine[rep] for rep in common], [theirs[rep] for rep in common])
        passes = [self.passes(run, kind, at) for run in self.of(other)]
        pairs = [times[:2] for times in passes if len(times) >= 2]
        noise = stats.noise_floor(*zip(*pairs, strict=True)) if len(pairs) >= 2 else None
        return Comparison(ratio, None, noise)


def report(lines: Sequence[Line]) -> tuple[str, bool]:
    """Returns the Markdown, and whether a moetune arm is slower beyond the noise, or something is missing."""
    parts: list[str] = []
    problems: list[str] = []
    for case in CASES:
        runs = Runs(lines, case)
        if runs.runs:
            left_out = [line for line in lines if line["kind"] == "left_out" and line["case"] == case]
            parts += _case(case, runs, left_out)
            problems += _problems(case, runs)
    if not parts:
        problems.append("The journal has no run.")
    parts += [
        "## Verdict",
        *([f"- {problem}" for problem in problems] or ["No moetune arm is slower beyond the noise."]),
    ]
    return "\n".join(parts), bool(problems)


def _case(case: str, runs: Runs, left_out: Sequence[Line]) -> Iterator[str]:
    first = runs.runs[0]
    devices = ", ".join(sorted({run["device"] for run in runs.runs}))
    starts = [line for run in runs.runs for rank in run["ranks"] for line in rank if line["what"] == "start"]
    versions = (
        ", ".join(f"{name} {version}" for name, version in starts[0]["versions"].items()) if starts else "unknown"
    )
    dates = sorted(run["date"][:10] for run in runs.runs)
    yield f"## {case}: {first['layers']} layers on {devices}"
    yield f"`{CASES[case].launch}`, dummy weights, {dates[0]} … {dates[-1]}. {versions}."
    yield ""
    yield from (f"- `{arm}`: {ARMS[arm].words}; {len(runs.of(arm))} runs" for arm in runs.arms)
    yield from (f"- `{line['arm']}` is left out: {line['why']}" for line in left_out)
    for kind, of in KINDS.items():
        if not runs.sizes(kind):
            continue
        yield from ["", f"**{kind}, ms a step** (tokens/s)", ""]
        yield from _table(
            [of, *runs.arms], ([at, *(_time(runs, arm, kind, at) for arm in runs.arms)] for at in runs.sizes(kind))
        )
        yield from _gains(runs, kind, of)
    yield from _bounds(runs)
    yield from _proofs(runs)


def _time(runs: Runs, arm: str, kind: str, at: int) -> str:
    times = list(runs.times(arm, kind, at).values())
    if not times:
        return "–"
    middle = statistics.median(times)
    ranks = len(runs.of(arm)[0]["ranks"])
    return f"{middle:.2f} ({at * ranks / middle * 1e3:,.0f})"


def _gains(runs: Runs, kind: str, of: str) -> Iterator[str]:
    stock = [(arm, other) for arm in runs.arms if (other := runs.stock(arm))]
    rest = [(arm, REFERENCE) for arm in runs.arms if arm != REFERENCE and REFERENCE in runs.arms]
    compared = list(dict.fromkeys(stock + rest))
    if not compared:
        return
    yield from [
        "",
        f"**{kind}, gain in speed** with 95 % bounds over the repetitions; in parentheses the other arm's noise",
        "",
    ]
    header = [of, *(f"{arm} against {other}" for arm, other in compared)]
    yield from _table(
        header,
        ([at, *(_gain(runs.compare(arm, other, kind, at)) for arm, other in compared)] for at in runs.sizes(kind)),
    )


def _gain(comparison: Comparison) -> str:
    """Returns the gain as the table shows it."""
    noise = "" if comparison.noise is None else f" ({comparison.noise:.1%})"
    return f"{comparison.text}{noise}{' **slower**' if comparison.is_slower else ''}"


def _bounds(runs: Runs) -> Iterator[str]:
    """Yields, for each moetune arm, the gain of a step that the gain of its grouped GEMMs allows."""
    for arm, kind in itertools.product(runs.arms, KINDS):
        other = runs.stock(arm)
        rows = []
        for at in runs.sizes(kind) if other else ():
            row = bound(runs, arm, str(other), kind, at)
            if row is not None:
                numbers = [f"{row[0]:.2f}", f"{row[1]:.0%}", f"{row[2]:+.1%}", f"{row[3]:+.1%}"]
                rows.append([at, *numbers, runs.compare(arm, str(other), kind, at).text])
        if rows:
            yield from ["", f"**the bound: {arm} against {other}**, {kind}; grouped GEMMs by PyTorch's profiler", ""]
            header = ["their ms", "share of the step", "their gain", "bound of the step's gain", "seen"]
            yield from _table([KINDS[kind], *header], rows)


def bound(runs: Runs, arm: str, other: str, kind: str, at: int) -> tuple[float, float, float, float] | None:
    """Returns the other arm's grouped GEMMs in ms, their share of its step, their gain, and the gain that they allow.

    A share s of the step that becomes 1 + g times as fast makes the step 1 / (1 − s + s / (1 + g)) times as fast.
    """
    mine, theirs, step = runs.profile(arm, kind, at), runs.profile(other, kind, at), runs.times(other, kind, at)
    if mine is None or theirs is None or not step:
        return None
    share = float(theirs["moe_ms"]) / statistics.median(step.values())
    gain = float(theirs["moe_ms"]) / float(mine["moe_ms"])
    return float(theirs["moe_ms"]), share, gain - 1, 1 / (1 - share + share / gain) - 1


def _proofs(runs: Runs) -> Iterator[str]:
    yield from ["", "**start and proof**", ""]
    for arm in runs.arms:
        for run in runs.of(arm):
            starts = [f"{line['seconds']:.0f} s" for rank in run["ranks"] for line in rank if line["what"] == "start"]
            words = [f"start {', '.join(starts) or 'failed'}", f"process {run['seconds']:.0f} s"]
            words += [
                ", ".join(f"{number} {word}" for word, number in count.items()) for count in run["counts"] if count
            ]
            words += _tactics(run)
            yield f"- `{arm}` {run['rep']} on GPU {run['gpus']}: {'; '.join(words)}"
        for lines in runs.of(arm)[0]["lines"]:
            yield from ["  ```", *(f"  {line}" for line in telling_lines("\n".join(lines))), "  ```"]


def _tactics(run: Line) -> Iterator[str]:
    """Yields whether the ranks' FlashInfer tuners hold the same tactics."""
    found = [(line["count"], line["digest"]) for rank in run["ranks"] for line in rank if line["what"] == "tactics"]
    if any(count for count, _ in found):
        equal = len(found) == len(run["ranks"]) and len(set(found)) == 1
        word = "" if len(found) == 1 else ", equal on all ranks" if equal else ", **different on the ranks**"
        yield f"{found[0][0]} tactics in FlashInfer's tuner{word}"


def _problems(case: str, runs: Runs) -> Iterator[str]:
    for run in runs.runs:
        name = f"{case}, `{run['arm']}` {run['rep']}"
        yield from (f"{name}: no proof: {missing}" for missing in run["missing"])
        if not run["ok"]:
            yield f"{name}: exit codes {run['exit_codes']}, and no result to the end"
        for rank in run["ranks"]:
            yield from (f"{name}: {line['what']} {line['at']}: {line['error']}" for line in rank if "error" in line)
    for arm in runs.arms:
        other = runs.stock(arm)
        if ARMS[arm].stock and other is None:
            yield f"{case}, `{arm}`: no stock arm to compare it with"
        for kind in KINDS if other else ():
            for at in runs.sizes(kind):
                comparison = runs.compare(arm, str(other), kind, at)
                if comparison.is_slower:
                    yield f"{case}, `{arm}`: slower than `{other}` at {at} {KINDS[kind]}: {comparison.text}"


def _table(header: Sequence[Any], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(map(str, header))} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)
