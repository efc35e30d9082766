"""Shows a profile as a table and lines for a terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from moetune.report.command import command
from moetune.report.format import gain_digits, significant
from moetune.report.lines import (
    counted,
    ladder_line,
    layer_line,
    near_line,
    neutral_line,
    reason_lines,
    recording_line,
    regime_line,
    skipped_lines,
    span,
)
from moetune.report.table import FittedTable, add_numbers, new_table, time_unit
from moetune.report.tactics import tactic_columns, tactic_line, torch_lines
from moetune.spec.enums import ENGINE_TITLES
from moetune.spec.environment import Environment
from moetune.stats import geomean
from moetune.store.match import Differing
from moetune.store.profile import Choice, Profile
from moetune.tuning.verdict import NOISY

_VERSIONS = ("torch", "cuda", "triton", "flashinfer", "vllm", "sglang")
_BOUNDS = "95 % bounds"
_TRITON_COLUMNS = {"M×N×K", "group", "warps", "stages"}


def profile_report(
    profile: Profile,
    path: Path | str | None = None,
    *,
    served: bool = False,
    packaged: bool = False,
    exported: bool = False,
    near: Differing | None = None,
    neutral: Differing | None = None,
    measured_ladder: str | None = None,
    engine: str | None = None,
) -> list[RenderableType]:
    """Returns a profile as text and a table: the question, the choices, their gain, and the command to run next.

    Args:
        profile: the profile to show.
        path: the profile's file.
        served: whether the profile was stored before, so that nothing was measured.
        packaged: whether the profile comes with moetune.
        exported: whether the profile was also written for an engine. Then the report names no next command.
        near, neutral, measured_ladder: in what the profile differs from the question; see `store.match.Match`.
        engine: the engine that the question names. The report says if the profile is not for it.
    """
    from moetune.export.fitting import fitting_line

    reported: list[RenderableType] = [
        Text(layer_line(profile.layer), style="bold"),
        Text(regime_line(profile.regime)),
        *([Text(recording_line(profile.recording), style="dim")] if profile.recording else []),
        Text(f"backend {profile.backend} on {profile.environment.device}", style="dim"),
        Text(),
        profile_table(profile),
        Text(),
    ]
    reported += [Text(line, style="dim") for line in _details(profile)]
    if profile.choices:
        reported += [Text(gain_line(profile), style="bold"), Text(_measured_line(profile))]
    reported += [Text(near_line(near), style="yellow")] if near else []
    reported += [Text(line, style="dim")] if neutral and (line := neutral_line(neutral)) else []
    reported += [Text(ladder_line(measured_ladder))] if measured_ladder else []
    if line := fitting_line(profile, engine):
        reported.append(Text(line, style="yellow" if engine else "dim"))
    if path:
        reported.append(_where(path, served, packaged))
    if path and profile.choices and not exported:
        reported.append(_next_command(profile, path, engine))
    return reported


def profile_table(profile: Profile) -> FittedTable:
    """Returns a table with a row for each bucket: tactic, its time, the default's time, gain and 95 % bounds.

    A narrow terminal has the rows, the tile, the time and the gain.
    """
    scale, unit = time_unit([time for choice in profile.choices for time in (choice.time_us, choice.default_time_us)])
    tactics = tactic_columns([choice.tactic for choice in profile.choices])
    table = new_table()
    add_numbers(table, "rows")
    for title in tactics:
        if title == "tactic":
            table.add_column(title, overflow="fold")
        else:
            add_numbers(table, title)
    add_numbers(table, f"time\n({unit})", f"default\n({unit})", "gain")
    table.add_column(_BOUNDS, justify="center", no_wrap=True)
    for choice, *cells in zip(profile.choices, *tactics.values(), strict=True):
        kept = choice.tactic == choice.default_tactic
        table.add_row(
            f"{choice.rows:,}",
            *(Text(cell, style="dim" if kept else "") for cell in cells),
            significant(choice.time_us / scale),
            significant(choice.default_time_us / scale),
            *_gain(choice),
        )
    return FittedTable(table, (_BOUNDS, f"default\n({unit})", "group", "stages", "warps"))


def _gain(choice: Choice) -> tuple[Text, Text]:
    if choice.tactic == choice.default_tactic:
        return Text("kept", style="dim"), Text("–", style="dim")
    beyond_noise = choice.gain_low > 1 + choice.noise
    digits = gain_digits(choice.gain)
    bounds = f"{choice.gain_low:.{digits}f}–{choice.gain_high:.{digits}f}"
    return Text(f"{choice.gain:.{digits}f}×", style="bold green" if beyond_noise else "dim"), Text(bounds)


def gain_line(profile: Profile) -> str:
    """Returns a line with the profile's gain and the bucket of the smallest gain. The profile must have a choice."""
    worst = min(profile.choices, key=lambda choice: choice.gain)
    buckets, rows = counted(len(profile.choices), "bucket"), counted(worst.rows, "row")
    return f"geometric mean gain {profile.gain:.2f}× over {buckets}; worst {worst.gain:.2f}× at {rows}"


def _measured_line(profile: Profile) -> str:
    day = max(choice.measured_at for choice in profile.choices)[:10]
    return f"measured {day} on {profile.environment.device}{_versions(profile.environment)}"


def _versions(environment: Environment) -> str:
    found = [f"{name} {environment.strict[name]}" for name in _VERSIONS if name in environment.strict]
    found += [f"driver {driver}"] if (driver := environment.informative.get("driver")) else []
    return "".join(f" · {version}" for version in found)


def _details(profile: Profile) -> list[str]:
    """Returns the lines below the table: tactics tried, noise, typical rows, failures and missing buckets."""
    choices = profile.choices
    if not choices:
        return ["no bucket is tuned yet"]
    lines = [
        *_column_lines(profile),
        f"{span([choice.tried for choice in choices])} of {span([choice.candidates for choice in choices])} "
        "tactics tried per bucket",
        _default_line(profile),
        f"A/A noise {span([round(100 * choice.noise, 1) for choice in choices])} %; "
        "a tactic replaces the default only if its gain lies beyond the noise",
    ]
    lines += _noisy_lines(choices)
    lines += _at_row_counts(choices)
    lines += _by_distribution(choices)
    if typical := [f"{choice.rows:,} ({choice.met_rows:,})" for choice in choices if choice.met_rows]:
        lines.append(f"half of the draws have the typical rows (in parentheses): {', '.join(typical)}")
    if profile.backend == "torch":
        lines += torch_lines(choice.tactic for choice in choices)
    lines += reason_lines(
        "tactics that could not win, per bucket:", [[reject.reason for reject in c.rejected] for c in choices]
    )
    lines += reason_lines(
        "tactics timed without a CUDA graph, launch overhead included, per bucket:",
        [[choice.eager] if choice.eager else [] for choice in choices],
    )
    missing = [rows for rows in profile.regime.buckets if rows not in {choice.rows for choice in choices}]
    lines += [f"not tuned yet: {', '.join(map(str, missing))}"] if missing else []
    return [*lines, *skipped_lines(profile.regime)]


def _column_lines(profile: Profile) -> list[str]:
    """Returns what the columns of the table mean."""
    triton = tactic_columns([choice.tactic for choice in profile.choices]).keys() >= _TRITON_COLUMNS
    kept = any(choice.tactic == choice.default_tactic for choice in profile.choices)
    return [
        *(["M×N×K: a block's tile; group: the blocks of rows that are computed side by side"] if triton else []),
        *(["warps, stages: Triton's num_warps and num_stages"] if triton else []),
        "time: one run of this rank's experts, without the exchange between ranks",
        "default: the same with the default tactic" + ("; kept: the default stays" if kept else ""),
    ]


def _noisy_lines(choices: Sequence[Choice]) -> list[str]:
    """Returns a line about the buckets that were too noisy, or none."""
    noisy = [choice for choice in choices if choice.noise > NOISY]
    if not noisy:
        return []
    rows = ", ".join(f"{choice.rows:,}" for choice in noisy)
    kept = "" if any(choice.tactic != choice.default_tactic for choice in noisy) else ", so the default is kept there"
    return [
        f"this machine was busy: A/A noise beyond {100 * NOISY:g} % at {rows} rows{kept}; run --again when it is idle"
    ]


def _at_row_counts(choices: Sequence[Choice]) -> list[str]:
    """Returns lines on the smallest gain at any row count, and on the regret; none for profiles without `by_rows`."""
    compared = [each for choice in choices for each in choice.by_rows]
    if not compared:
        return []
    worst = min(compared, key=lambda each: each.gain)
    lines = [
        f"compared at {counted(len(compared), 'row count')}; the smallest gain is {worst.gain:.2f}× "
        f"at {counted(worst.rows, 'row')}"
    ]
    if regrets := [choice.regret_high for choice in choices if choice.regret_high is not None]:
        lines.append(f"another finalist may be faster by at most {100 * max(regrets):.1f} % (95 % bound)")
    return lines


def _by_distribution(choices: Sequence[Choice]) -> list[str]:
    """Returns the gain and the largest slowdown under each distribution; nothing if there is one."""
    compared = [each for choice in choices for each in choice.by_rows if each.distribution]
    lines = []
    for name in dict.fromkeys(each.distribution for each in compared):
        mine = [each for each in compared if each.distribution == name]
        gains = [each.gain for each in mine]
        worst = max(mine, key=lambda each: each.slowdown or 1.0)
        slower = 100 * (worst.slowdown or 1.0) - 100
        lines.append(
            f"under {name}: gain {geomean(gains):.2f}×, worst {min(gains):.2f}×; at most {slower:.1f} % slower than "
            f"the fastest tactic, at {counted(worst.rows, 'row')}"
        )
    return lines


def _default_line(profile: Profile) -> str:
    """Returns the default tactic if all buckets have the same, otherwise the number of defaults; and their sources."""
    defaults = {choice.default_tactic for choice in profile.choices}
    sources = Counter(choice.default_source for choice in profile.choices)
    triton = profile.backend == "triton"
    number = f"the default depends on the rows: {len(defaults)} {'configurations' if triton else 'tactics'}"
    shown = f"the default: {tactic_line(*defaults)}" if len(defaults) == 1 else number
    if len(sources) > 1:
        named = (f"{source or 'not recorded'} ({counted(count, 'bucket')})" for source, count in sources.most_common())
        return f"{shown}: {', '.join(named)}"
    (source,) = sources
    is_heuristic = triton and source.partition(" ")[0] in ("", "heuristic")
    if is_heuristic and (source or len(defaults) > 1):
        engine = "sglang" if profile.environment.strict.get("kernel") == "sglang" else "vllm"
        source = f"{ENGINE_TITLES[engine]}'s {source or 'heuristic'}"
    return f"{shown} of {source}" if source else shown


def _where(path: Path | str, served: bool, packaged: bool) -> Text:
    source = "the profiles that come with moetune" if packaged else "the store"
    kept = "profile that comes with moetune: " if packaged else "profile: "
    title = f"served from {source}, nothing was measured: " if served else kept
    return Text(title, style="bold" if served else "", no_wrap=True).append(str(path), style="cyan")


def _next_command(profile: Profile, path: Path | str, engine: str | None) -> Text:
    """Returns the command that writes the profile for an engine, or that shows it if no engine reads it."""
    from moetune.export.fitting import export_words

    options = export_words(profile, engine)
    words = ["export", str(path), *options, "--out", "tuned"] if options else ["show", str(path)]
    return Text("next: ", no_wrap=True).append(command(*words), style="bold")
