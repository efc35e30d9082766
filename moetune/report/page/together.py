"""The figures of several profiles: together, regime against regime, and gain by skew."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from moetune.report.page.figure import Figure, NumberTable, Style, label, lines, number, rows_axis, time_axis
from moetune.report.page.numbers import Shown
from moetune.spec.distribution import skew_of
from moetune.stats import geomean
from moetune.store.profile import Choice

_NOT_OF_THE_LOAD = ("distribution", "draws", "seed", "eplb", "rank")
"""Fields in which regimes may differ whose profiles are compared by distribution."""


def figures_together(profiles: Sequence[Shown]) -> list[Figure]:
    """Returns the figures of all profiles with a choice: none if there is one profile only."""
    numbered = [(each, Style(at)) for at, each in enumerate(profiles) if each.profile.choices]
    if len(numbered) < 2:
        return []
    found = [_all_times(numbered), _all_gains(numbered)]
    for group in _groups([each for each, _ in numbered], _of_layer):
        if len({each.profile.regime.digest for each in group}) > 1 and _shared(group):
            found.append(regime_figure(group))
    for group in _groups([each for each, _ in numbered], _of_load):
        if len({each.profile.regime.distribution for each in group}) > 1 and _shared(group):
            found.append(skew_figure(group))
    return found


def _all_times(numbered: Sequence[tuple[Shown, Style]]) -> Figure:
    layout = {"xaxis": _axis(numbered), "yaxis": _times(numbered)}
    table = _table(numbered, "time (µs)", lambda choice: choice.time_us)
    text = "Time of the choices of every profile. Layers, devices and regimes are those of the labels."
    return Figure("Time of all profiles", text, _traces(numbered, lambda choice: choice.time_us), layout, table)


def _all_gains(numbered: Sequence[tuple[Shown, Style]]) -> Figure:
    layout = {"xaxis": _axis(numbered), "yaxis": {"title": {"text": "gain"}}}
    table = _table(numbered, "gain", lambda choice: choice.gain)
    text = "Gain of the choices of every profile over its own default. Their bounds are in each profile's figure."
    return Figure("Gain of all profiles", text, _traces(numbered, lambda choice: choice.gain), layout, table)


def _traces(numbered: Sequence[tuple[Shown, Style]], value: Callable[[Choice], float]) -> list[dict[str, object]]:
    return [
        lines([c.rows for c in each.profile.choices], [value(c) for c in each.profile.choices], each.label, style)
        for each, style in numbered
    ]


def _table(numbered: Sequence[tuple[Shown, Style]], title: str, value: Callable[[Choice], float]) -> NumberTable:
    """Returns a table with a column for each profile and a row for each bucket of any."""
    columns = [{choice.rows: value(choice) for choice in each.profile.choices} for each, _ in numbered]
    rows = sorted({row for column in columns for row in column})
    titles = ("rows", *(f"{each.label}: {title}" for each, _ in numbered))
    return NumberTable(titles, [[str(row), *(number(column.get(row)) for column in columns)] for row in rows])


def _axis(numbered: Sequence[tuple[Shown, Style]]) -> dict[str, object]:
    return rows_axis([choice.rows for each, _ in numbered for choice in each.profile.choices])


def _times(numbered: Sequence[tuple[Shown, Style]]) -> dict[str, object]:
    return time_axis([choice.time_us for each, _ in numbered for choice in each.profile.choices])


def regime_figure(group: Sequence[Shown]) -> Figure:
    """Returns each profile's time over the first one's, at the buckets that all have, and where tactics agree.

    Args:
        group: profiles of one layer, backend and device.
    """
    first, *others = group
    shared = _shared(group)
    by_rows = [{choice.rows: choice for choice in each.profile.choices} for each in group]
    traces = [
        lines(shared, [found[rows].time_us / by_rows[0][rows].time_us for rows in shared], each.label, Style(at))
        for at, (each, found) in enumerate(zip(group, by_rows, strict=True))
    ]
    titles = ["rows", *(f"{each.label}: time (µs)" for each in group), *(f"{each.label}: tactic" for each in others)]
    cells = [
        [
            str(rows),
            *(number(found[rows].time_us) for found in by_rows),
            *("same" if found[rows].tactic == by_rows[0][rows].tactic else "other" for found in by_rows[1:]),
        ]
        for rows in shared
    ]
    same = [sum(found[rows].tactic == by_rows[0][rows].tactic for rows in shared) for found in by_rows[1:]]
    agree = "; ".join(f"{each.label}: {count} of {len(shared)}" for each, count in zip(others, same, strict=True))
    text = (
        f"{group[0].profile.layer.name}: time of the choice over that of “{first.label}”, at equal rows. Buckets with "
        f"the same tactic as there: {agree}."
    )
    layout = {"xaxis": rows_axis(shared), "yaxis": {"title": {"text": "time over the first"}}}
    return Figure("Regime against regime", text, traces, layout, NumberTable(tuple(titles), cells))


def skew_figure(group: Sequence[Shown]) -> Figure:
    """Returns the gain by distribution: the geometric mean over the buckets that all have, the least and the greatest.

    Args:
        group: profiles that differ in the distribution only.
    """
    shared = set(_shared(group))
    ordered = sorted(group, key=lambda each: _order(each.profile.regime.distribution))
    gains = [[choice.gain for choice in each.profile.choices if choice.rows in shared] for each in ordered]
    means = [geomean(each) for each in gains]
    style = Style(0)
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [max(each) - mean for each, mean in zip(gains, means, strict=True)],
        "arrayminus": [mean - min(each) for each, mean in zip(gains, means, strict=True)],
        "color": style.color,
    }
    names = [each.profile.regime.distribution for each in ordered]
    trace = lines([label(name) for name in names], means, "gain", style, mode="markers", error_y=bars)
    table = NumberTable(
        ("distribution", "profile", "buckets", "geometric mean", "least", "greatest"),
        [
            [name, each.label, str(len(found)), number(mean), number(min(found)), number(max(found))]
            for name, each, found, mean in zip(names, ordered, gains, means, strict=True)
        ],
    )
    text = (
        f"{group[0].profile.layer.name}: gain over the default under each distribution, tuned and measured under it. "
        f"Points are geometric means over {len(shared)} buckets, bars reach from the least to the greatest gain."
    )
    layout = {"xaxis": {"type": "category"}, "yaxis": {"title": {"text": "gain"}}, "showlegend": False}
    return Figure("Gain by skew", text, [trace], layout, table)


def _groups(profiles: Sequence[Shown], key: Callable[[Shown], Hashable]) -> list[list[Shown]]:
    """Returns the profiles with equal keys together, in their order; groups of one are left out."""
    found: dict[Hashable, list[Shown]] = {}
    for each in profiles:
        found.setdefault(key(each), []).append(each)
    return [group for group in found.values() if len(group) > 1]


def _of_layer(shown: Shown) -> Hashable:
    profile = shown.profile
    return profile.layer.model_dump_json(), profile.backend, profile.environment.device


def _of_load(shown: Shown) -> Hashable:
    regime = shown.profile.regime.model_dump(mode="json")
    return _of_layer(shown), str({name: regime[name] for name in regime if name not in _NOT_OF_THE_LOAD})


def _shared(group: Sequence[Shown]) -> list[int]:
    """Returns the buckets for which all profiles have a choice, ascending."""
    return sorted(set.intersection(*({choice.rows for choice in each.profile.choices} for each in group)))


def _order(distribution: str) -> tuple[int, str, float]:
    """Returns the place of a distribution: equal loads, random ones, then by kind and parameter, then recordings."""
    if skew := skew_of(distribution):
        return 2, skew.kind, skew.parameter
    return {"balanced": 0, "random": 1}.get(distribution, 3), distribution, 0.0
