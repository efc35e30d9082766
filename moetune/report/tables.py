"""Profiles, plans and lists as tables for a terminal. Pure: numbers in, rich renderables out; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moetune.report.format import count, human_bytes, human_flops, significant
from moetune.report.tactics import reasons_counted, tactic_columns, tactic_line
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile

if TYPE_CHECKING:
    from moetune.backends.registry import Diagnosis
    from moetune.tuning.plan import Plan

MILLISECONDS_FROM_US = 1000.0
"""A time column is in ms where every time in it is at least this long."""
NOISY = 0.1
"""An A/A noise floor above this is told: an idle machine stays well below."""


def layer_line(layer: MoELayer) -> str:
    """`qwen3-30b-a3b: 128 experts, top-8, hidden 2,048, intermediate 768, bf16`."""
    return (
        f"{layer.name}: {layer.num_experts} experts, top-{layer.top_k}, hidden {layer.hidden_size:,}, "
        f"intermediate {layer.intermediate_size:,}, {layer.precision.value}"
    )


def regime_line(regime: Regime) -> str:
    """`ep 8, tp 1, attention DP, alltoall packed, random × 16 draws, ladder pow2`."""
    parts = [f"ep {regime.ep_size}", f"tp {regime.tp_size}"]
    parts += ["attention DP" if regime.attention_dp else "no attention DP"]
    parts += [f"{regime.dispatch} {regime.layout}" if regime.layout else f"dispatch {regime.dispatch}"]
    parts += [f"{regime.redundant_experts} redundant experts"] if regime.redundant_experts else []
    parts += [f"{regime.distribution} × {regime.draws} draw{'s' if regime.draws > 1 else ''}"]
    parts += [f"seed {regime.seed}"] if regime.seed else []
    return ", ".join([*parts, f"ladder {regime.ladder}"])


def routing_line(routing: RoutingMethod) -> str:
    """`sigmoid + bias, 4 of 8 groups, × 2.5`."""
    parts = [routing.scoring + (" + bias" if routing.bias else "")]
    parts += [f"{routing.top_k_groups} of {routing.num_groups} groups"] if routing.grouped else []
    parts += [] if routing.renormalize else ["not renormalized"]
    parts += [f"× {routing.scaling:g}"] if routing.scaling != 1.0 else []
    return ", ".join(parts)


def profile_report(
    profile: Profile, path: Path | str | None = None, *, served: bool = False, packaged: bool = False
) -> list[RenderableType]:
    """A profile: what was asked, the table of choices, and what stands behind the numbers.

    Args:
        profile: what to show.
        path: the file it is in.
        served: say that it was there and nothing was measured.
        packaged: say that it came with moetune.
    """
    reported: list[RenderableType] = [
        Text(layer_line(profile.layer), style="bold"),
        Text(regime_line(profile.regime)),
        Text(f"backend {profile.backend} on {profile.environment.device}", style="dim"),
        Text(),
        profile_table(profile),
        Text(),
    ]
    reported += [Text(line, style="dim") for line in _behind(profile)]
    if path:
        reported.append(_where(path, served, packaged))
    return reported


def profile_table(profile: Profile) -> Table:
    """A row for each bucket: rows, tactic, its time, the default's time, the gain and its 95 % bounds."""
    times = [time for choice in profile.choices for time in (choice.time_us, choice.default_time_us)]
    scale, unit = (1e3, "ms") if times and min(times) >= MILLISECONDS_FROM_US else (1.0, "µs")
    tactics = tactic_columns([choice.tactic for choice in profile.choices])
    table = _table()
    other = any(choice.met_rows for choice in profile.choices)
    _add_numbers(table, "rows", *(["rows\nmet"] if other else []))
    for title in tactics:
        table.add_column(title, justify="left" if title == "tactic" else "right", no_wrap=True)
    _add_numbers(table, f"time\n({unit})", f"default\n({unit})", "gain")
    table.add_column("95 % bounds", justify="center", no_wrap=True)
    for choice, *cells in zip(profile.choices, *tactics.values(), strict=True):
        kept = choice.tactic == choice.default_tactic
        table.add_row(
            f"{choice.rows:,}",
            *([f"{choice.met_rows or choice.rows:,}"] if other else []),
            *(Text(cell, style="dim" if kept else "") for cell in cells),
            significant(choice.time_us / scale),
            significant(choice.default_time_us / scale),
            *_gain(choice),
        )
    return table


def _gain(choice: Choice) -> tuple[Text, Text]:
    if choice.tactic == choice.default_tactic:
        return Text("default", style="dim"), Text("–", style="dim")
    bounds = f"{choice.gain_low:.2f} … {choice.gain_high:.2f}"
    return Text(f"{choice.gain:.2f}×", style="bold green"), Text(bounds)


def _behind(profile: Profile) -> list[str]:
    """How many tactics were tried, the noise floor, which failed: the lines below the table."""
    choices = profile.choices
    if not choices:
        return ["no bucket is tuned yet"]
    lines = [
        f"{_span([choice.tried for choice in choices])} of {_span([choice.candidates for choice in choices])} "
        f"tactics tried a bucket; the default: {_default(profile)}",
        f"A/A noise {_span([round(100 * choice.noise, 1) for choice in choices])} %; "
        f"a tactic wins only where its whole interval lies beyond that",
    ]
    if max(choice.noise for choice in choices) > NOISY:
        lines.append("this machine was busy: smaller gains could not be told; tune again with --again where it is idle")
    lines += _reasons("could not win in a bucket:", [[reject.reason for reject in c.rejected] for c in choices])
    lines += _reasons(
        "timed without a CUDA graph, launch overhead included, in a bucket:",
        [[choice.eager] if choice.eager else [] for choice in choices],
    )
    missing = [rows for rows in profile.regime.buckets if rows not in {choice.rows for choice in choices}]
    return [*lines, *([f"not tuned yet: {', '.join(map(str, missing))}"] if missing else []), *_skipped(profile.regime)]


def _default(profile: Profile) -> str:
    """The tactic itself where there is one; whose heuristic it is where it changes with the rows."""
    defaults = {choice.default_tactic for choice in profile.choices}
    if len(defaults) == 1:
        return tactic_line(*defaults)
    if profile.backend == "triton":
        engine = "SGLang" if profile.environment.strict.get("kernel") == "sglang" else "vLLM"
        return f"{len(defaults)} configurations of {engine}'s heuristic"
    return f"{len(defaults)} tactics, by the rows"


def _reasons(title: str, groups: Sequence[Iterable[str]]) -> list[str]:
    """`title`, and below it how many tactics of a group each kind of reason stands for."""
    counted = {reason: _span(counts) for reason, counts in reasons_counted(groups).items()}
    width = max(map(len, counted.values()), default=0)
    return [title, *(f"{counts:>{width + 2}}  {reason}" for reason, counts in counted.items())] if counted else []


def _skipped(regime: Regime) -> list[str]:
    if not regime.skipped_buckets:
        return []
    skipped = ", ".join(map(str, regime.skipped_buckets))
    return [f"left out, because a pool has {regime.ep_size} equal blocks: {skipped} rows"]


def _where(path: Path | str, served: bool, packaged: bool) -> Text:
    source = "the packaged profiles" if packaged else "the store"
    kept = "packaged profile: " if packaged else "profile: "
    said = f"served from {source}, nothing was measured: " if served else kept
    return Text(said, style="bold" if served else "").append(str(path), style="cyan")


def plan_report(plan: Plan) -> list[RenderableType]:
    """A plan: what was asked, the load of each bucket, what stands behind the numbers, and the bytes on the wire."""
    reported: list[RenderableType] = [
        Text(layer_line(plan.layer), style="bold"),
        Text(regime_line(plan.regime)),
        Text(_rank_line(plan), style="dim"),
        Text(_load_line(plan), style="dim"),
        Text(),
        plan_table(plan),
        Text(),
    ]
    below = [f"tactics unknown: {plan.tactics_unknown}"] if plan.tactics_unknown else []
    below += _reasons("tactics left out of a bucket:", [bucket.excluded_tactics.values() for bucket in plan.buckets])
    below += _skipped(plan.regime)
    reported += [Text(line, style="dim") for line in below]
    if plan.wire:
        reported += [*([Text()] if below else []), wire_table(plan)]
    return reported


def _rank_line(plan: Plan) -> str:
    last = plan.first_expert + plan.num_local_experts - 1
    return (
        f"rank {plan.rank} of {plan.regime.ep_size}: experts {plan.first_expert} … {last}, "
        f"{human_bytes(plan.resident_bytes)} of weights"
    )


def _load_line(plan: Plan) -> str:
    law = "simulated with the layer's own router" if plan.simulated else "in closed form"
    return f"numbers are means, {law}: {100 * plan.hit_fraction:.1f} % of all tokens have something for this rank"


def plan_table(plan: Plan) -> Table:
    """A row for each bucket: what the kernel sees, what travels, what the GEMMs move and compute."""
    table = _table()
    same = all(bucket.tokens_per_rank == bucket.rows for bucket in plan.buckets)
    other = any(bucket.met_rows != bucket.rows for bucket in plan.buckets)
    met = ["rows\nmet"] if other else []
    _add_numbers(table, *(["rows =\ntokens\na rank"] if same else ["rows", *met, "tokens\na rank"]))
    _add_numbers(table, "local\nslots", "slots/\nexpert", "active\nexperts")
    for title in (*(("re-\nceived", "com-\nbined") if plan.wire else ()), "weight\nbytes", "activ.\nbytes"):
        table.add_column(title, justify="right", overflow="fold")
    _add_numbers(table, "GEMMs\n(FLOP)", *([] if plan.tactics_unknown else ["tactics"]))
    for bucket in plan.buckets:
        table.add_row(
            f"{bucket.rows:,}",
            *([f"{bucket.met_rows:,}"] if other else []),
            *([] if same else [count(bucket.tokens_per_rank)]),
            count(bucket.local_slots),
            count(bucket.slots_per_expert),
            f"{bucket.active_experts:,.1f}",
            *([human_bytes(bucket.received_bytes), human_bytes(bucket.combine_bytes)] if plan.wire else []),
            human_bytes(bucket.weight_bytes),
            human_bytes(bucket.activation_bytes),
            human_flops(bucket.flops).removesuffix("FLOP"),
            *([] if bucket.tactics is None else [f"{bucket.tactics:,}"]),
        )
    return table


def wire_table(plan: Plan) -> Table:
    """A row for each way in which a token can travel: its bytes, and how many times less than the plain way."""
    table = _table()
    table.add_column("before the\nexchange")
    table.add_column("routing\nthat travels", no_wrap=True)
    _add_numbers(table, "bytes\na token", "less\nby")
    table.add_column("tensors", style="dim", overflow="fold")
    for payload in plan.wire:
        table.add_row(
            payload.activation,
            payload.routing,
            f"{payload.payload_bytes_per_token:,}",
            f"{payload.ratio:.2f}×",
            " + ".join(f"{name} {size:,}" for name, size in payload.tensors.items()),
        )
    return table


def models_table(models: Iterable[tuple[MoELayer, str]], *, addresses: bool = True) -> Table:
    """A row for each named layer.

    Args:
        models: the layers, and where their values stand.
        addresses: a last column with that; else the name is a link to it.
    """
    table = _table()
    table.add_column("model", no_wrap=True)
    _add_numbers(table, "experts", "top-k", "hidden", "inter-\nmediate")
    table.add_column("precision", no_wrap=True)
    table.add_column("routing")
    if addresses:
        table.add_column("source", style="dim", overflow="fold")
    for layer, source in models:
        sizes = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
        table.add_row(
            Text(layer.name, style="" if addresses else f"link {source}"),
            *(f"{size:,}" for size in sizes),
            layer.precision.value,
            routing_line(layer.routing),
            *([escape(source)] if addresses else []),
        )
    return table


def backends_table(diagnoses: Iterable[Diagnosis]) -> Table:
    """A row for each backend: whether it can run here and, if not, why and what to do."""
    table = _table()
    table.add_column("backend", no_wrap=True)
    table.add_column("runs\nhere")
    table.add_column("why not, and what to do")
    for diagnosis in diagnoses:
        runs = Text("yes", style="green") if diagnosis.available else Text("no", style="yellow")
        why = Text("\n").join([Text(diagnosis.reason), Text(diagnosis.hint, style="dim")])
        table.add_row(diagnosis.name, runs, why if diagnosis.reason else "")
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a header."""
    table = _table()
    table.show_header = False
    table.add_column(style="dim")
    table.add_column()
    for name, value in facts:
        table.add_row(name.replace("_", " "), escape(value))
    return table


def store_table(entries: Iterable[tuple[Path, Profile]], root: Path, *, files: bool = True) -> Table:
    """A row for each stored profile: layer, regime, backend, device, buckets, day.

    Args:
        entries: the profiles and their files.
        root: what the files lie below.
        files: a last column with each file; else the regime is a link to it.
    """
    table = _table()
    table.add_column("layer", no_wrap=True)
    table.add_column("regime", overflow="fold")
    for title in ("backend", "device"):
        table.add_column(title)
    _add_numbers(table, "buckets")
    table.add_column("measured", no_wrap=True)
    if files:
        table.add_column("file", style="cyan", overflow="fold")
    for path, profile in entries:
        measured = max((choice.measured_at for choice in profile.choices), default="–")
        below = str(path.relative_to(root) if path.is_relative_to(root) else path)
        table.add_row(
            profile.layer.name,
            Text(profile.regime.slug, style="" if files else f"link {path.absolute().as_uri()}"),
            profile.backend,
            profile.environment.device,
            f"{len(profile.choices)}/{len(profile.regime.buckets)}",
            measured[:10],
            *([escape(below)] if files else []),
        )
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")


def _add_numbers(table: Table, *titles: str) -> None:
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,g}" if low == high else f"{low:,g}–{high:,g}"
