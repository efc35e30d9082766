"""Formats the journal of `sglang_module.py` as Markdown, and decides whether moetune's arm holds.

The samples of a cell are its draws: the median of each draw's rounds. Two arms are compared by the same draws, with
bootstrapped bounds (`moetune.stats.paired_ratio`). The noise is that between two series of moetune's arm.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from moetune import stats

ARMS: Final = ("default", "shipped", "moetune")
OTHERS: Final = ARMS[:2]
MOST_ERROR: Final = 1e-2
"""The largest relative error of a bf16 output, as for moetune's own kernel."""
MOST_NOISE: Final = 0.05
"""With more noise a cell says nothing."""

Line = Mapping[str, Any]


def cells(lines: Sequence[Line]) -> dict[tuple[str, str, str], dict[int, Line]]:
    """Returns the last line of each row count by case, device and SGLang's version. Earlier exports do not count."""
    last = {(line["case"], line["device"], line["sglang"]): line["tuned"] for line in lines if line["kind"] == "cell"}
    found: dict[tuple[str, str, str], dict[int, Line]] = {key: {} for key in last}
    for line in lines:
        if line["kind"] == "cell":
            key = (line["case"], line["device"], line["sglang"])
            if line["tuned"] == last[key]:
                found[key][line["rows"]] = line
    return {key: dict(sorted(of.items())) for key, of in found.items()}


def noise(line: Line) -> float:
    """Returns how much two series of moetune's arm differ, relative."""
    return stats.noise_floor(line["arms"]["moetune"]["us"], line["again_us"])


def is_same(line: Line, other: str) -> bool:
    """Returns whether another arm runs the same configurations as moetune's."""
    mine, theirs = line["arms"]["moetune"], line["arms"][other]
    return (mine["config"], mine["down"] or mine["config"]) == (theirs["config"], theirs["down"] or theirs["config"])


def slowdown(line: Line, other: str) -> stats.Ratio | None:
    """Returns the time of moetune's arm over another arm's; None if there is no such arm."""
    if other not in line["arms"]:
        return None
    return stats.paired_ratio(line["arms"]["moetune"]["us"], line["arms"][other]["us"])


def is_slower(line: Line, other: str) -> bool:
    """Returns whether moetune's arm is slower than another arm beyond the noise."""
    ratio = slowdown(line, other)
    return ratio is not None and not is_same(line, other) and ratio.low > 1 + noise(line)


def problems(lines: Sequence[Line], cases: Sequence[str], rows: Sequence[int]) -> Iterator[str]:
    """Yields a sentence for each slower cell, each unproved arm, each wrong or noisy cell, and what is missing.

    Args:
        lines: the journal.
        cases, rows: the cases and row counts that must be there, on each device that has the case.
    """
    found = cells(lines)
    yield from (f"{case}: not measured" for case in cases if not any(key[0] == case for key in found))
    for (case, device, _), by_rows in found.items():
        if absent := [str(count) for count in rows if case in cases and count not in by_rows]:
            yield f"{case}, {device}: not measured at {', '.join(absent)} rows"
        for count, line in by_rows.items():
            at = f"{case}, {count} rows"
            for other in OTHERS:
                if is_slower(line, other):
                    yield f"{at}: moetune's arm is slower than `{other}`: {_gain(line, other)}, noise {noise(line):.1%}"
            for arm, of in line["arms"].items():
                yield from (f"{at}, `{arm}`: not proved: {missing}" for missing in of["missing"])
                if not of["error"] <= MOST_ERROR:
                    yield f"{at}, `{arm}`: relative error {of['error']:.1e}, allowed {MOST_ERROR:.0e}"
            if noise(line) > MOST_NOISE:
                yield f"{at}: the A/A noise is {noise(line):.1%}, allowed {MOST_NOISE:.0%}; measure it again"
            yield from (f"{at}: timed without a CUDA graph: {reason}" for reason in line["eager"])


def markdown(lines: Sequence[Line], found_problems: Sequence[str]) -> str:
    """Returns a table for each case, the geometric means, the proof and the problems."""
    found = cells(lines)
    if not found:
        return "The journal has no cell."
    text = [
        "# SGLang's MoE module with moetune's file",
        "",
        "This is the module and not the engine: `fused_experts` of SGLang's wheel, which looks its files up itself. "
        "Times are ms of one layer, means over the draws, in CUDA graphs with a cold L2 cache, all arms interleaved. "
        "A gain is the other arm's time over moetune's, with 95 % bounds; *same*: both run one configuration.",
        "",
        "These compiled ops are replaced, in all arms alike:",
        "",
        *(f"- {replaced}" for replaced in next(iter(next(iter(found.values())).values()))["replaced"]),
    ]
    for (case, device, sglang), by_rows in found.items():
        first = next(iter(by_rows.values()))
        text += [
            "",
            f"## {case}, {device}",
            f"SGLang {sglang}, torch {first['torch']}, Triton {first['triton']}, measured {first['measured_at']}.",
            "",
            "| rows | default, ms | shipped, ms | moetune, ms | over default | over shipped | A/A noise | error |",
            "|---" * 8 + "|",
            *(_row(rows, line) for rows, line in by_rows.items()),
            "",
            *_means(list(by_rows.values())),
            *([] if "shipped" in first["arms"] else ["- SGLang ships no file for this shape and GPU."]),
            "",
            "What SGLang logged, and its own `get_moe_configs` returned the same rows:",
            "",
            *_proof(list(by_rows.values())),
        ]
    text += ["", "## Problems", "", *(f"- {problem}" for problem in found_problems or ["none"])]
    return "\n".join(text)


def _row(rows: int, line: Line) -> str:
    arms = line["arms"]
    times = [f"{statistics.fmean(arms[arm]['us']) / 1e3:.4f}" if arm in arms else "–" for arm in ARMS]
    gains = [_gain(line, other) for other in OTHERS]
    errors = max(of["error"] for of in arms.values())
    return f"| {rows} | {' | '.join([*times, *gains])} | {noise(line):.1%} | {errors:.1e} |"


def _gain(line: Line, other: str) -> str:
    ratio = slowdown(line, other)
    if ratio is None:
        return "–"
    if is_same(line, other):
        return f"{1 / ratio.value - 1:+.1%}, same"
    slower = " **slower**" if is_slower(line, other) else ""
    return f"{1 / ratio.value - 1:+.1%} [{1 / ratio.high - 1:+.1%}, {1 / ratio.low - 1:+.1%}]{slower}"


def _means(lines: Sequence[Line]) -> Iterator[str]:
    for other in OTHERS:
        ratios = [ratio for line in lines if (ratio := slowdown(line, other))]
        if ratios:
            yield f"- geometric mean over `{other}`: {stats.geomean([1 / ratio.value for ratio in ratios]):.3f}×"


def _proof(lines: Sequence[Line]) -> Iterator[str]:
    for arm in ARMS:
        logs = dict.fromkeys(entry for line in lines if arm in line["arms"] for entry in line["arms"][arm]["log"])
        yield from (f"- `{arm}`: {entry}" for entry in logs)
