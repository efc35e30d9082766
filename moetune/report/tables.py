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
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile

if TYPE_CHECKING:
    from moetune.backends.registry import Diagnosis
    from moetune.plan import Plan

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
        profile_table(profile),
    ]
    reported += [Text(line, style="dim") for line in _behind(profile)]
    if path:
        reported.append(_where(path, served, packaged))
    return reported


def profile_table(profile: Profile) -> Table:
    """A row for each bucket: rows, tactic, its time, the default's time, the gain and its 95 % bounds."""
    times = [time for choice in profile.choices for time in (choice.time_us, choice.default_time_us)]
    scale, unit = (1e3, "ms") if times and min(times) >= MILLISECONDS_FROM_US else (1.0, "µs")
    table = _table()
    _add_numbers(table, "rows")
    table.add_column("tactic")
    _add_numbers(table, f"time ({unit})", f"default ({unit})", "gain")
    table.add_column("95 % bounds", justify="center", no_wrap=True)
    for choice in profile.choices:
        kept = choice.tactic == choice.default_tactic
        table.add_row(
            f"{choice.rows:,}",
            Text(str(choice.tactic), style="dim" if kept else ""),
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
    defaults = sorted({str(choice.default_tactic) for choice in choices})
    lines = [
        f"{_span([choice.tried for choice in choices])} of {_span([choice.candidates for choice in choices])} "
        f"tactics tried a bucket; the default is {' or '.join(defaults)}",
        f"A/A noise {_span([round(100 * choice.noise, 1) for choice in choices])} %; "
        f"a tactic wins only where its whole interval lies beyond that",
    ]
    if max(choice.noise for choice in choices) > NOISY:
        lines.append("this machine was busy: smaller gains could not be told; tune again with --again where it is idle")
    missing = [rows for rows in profile.regime.buckets if rows not in {choice.rows for choice in choices}]
    return [*lines, *([f"not tuned yet: {', '.join(map(str, missing))}"] if missing else []), *_skipped(profile.regime)]


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
        plan_table(plan),
    ]
    if plan.tactics_unknown:
        reported.append(Text(f"tactics unknown: {plan.tactics_unknown}", style="dim"))
    reported += [Text(line, style="dim") for line in _skipped(plan.regime)]
    if plan.wire:
        reported += [Text(), wire_table(plan)]
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
    _add_numbers(table, "rows", "tokens\na rank", "local\nslots", "slots an\nexpert", "active\nexperts")
    _add_numbers(table, "received", "combined", "weights", "activations", "GEMMs", "tactics")
    for bucket in plan.buckets:
        table.add_row(
            f"{bucket.rows:,}",
            count(bucket.tokens_per_rank),
            count(bucket.local_slots),
            count(bucket.slots_per_expert),
            f"{bucket.active_experts:,.1f}",
            human_bytes(bucket.received_bytes) if plan.wire else "–",
            human_bytes(bucket.combine_bytes) if plan.wire else "–",
            human_bytes(bucket.weight_bytes),
            human_bytes(bucket.activation_bytes),
            human_flops(bucket.flops),
            "–" if bucket.tactics is None else str(bucket.tactics),
        )
    return table


def wire_table(plan: Plan) -> Table:
    """A row for each way in which a token can travel: its bytes, and how many times less than the plain way."""
    table = _table()
    table.add_column("before the exchange")
    table.add_column("routing that travels")
    _add_numbers(table, "bytes a token", "less by")
    table.add_column("tensors", style="dim")
    for payload in plan.wire:
        table.add_row(
            payload.activation,
            payload.routing,
            f"{payload.payload_bytes_per_token:,}",
            f"{payload.ratio:.2f}×",
            " + ".join(f"{name} {size:,}" for name, size in payload.tensors.items()),
        )
    return table


def models_table(models: Iterable[tuple[MoELayer, str]]) -> Table:
    """A row for each named layer, and where its values stand."""
    table = _table()
    table.add_column("model")
    _add_numbers(table, "experts", "top-k", "hidden", "intermediate")
    for title in ("precision", "routing"):
        table.add_column(title)
    table.add_column("source", style="dim", overflow="fold")
    for layer, source in models:
        sizes = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
        routing = routing_line(layer.routing)
        table.add_row(layer.name, *(f"{size:,}" for size in sizes), layer.precision.value, routing, escape(source))
    return table


def backends_table(diagnoses: Iterable[Diagnosis]) -> Table:
    """A row for each backend: whether it can run here and, if not, why and what to do."""
    table = _table()
    for title in ("backend", "runs here", "why not", "what to do"):
        table.add_column(title)
    for diagnosis in diagnoses:
        runs = Text("yes", style="green") if diagnosis.available else Text("no", style="yellow")
        table.add_row(diagnosis.name, runs, escape(diagnosis.reason), escape(diagnosis.hint))
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a header."""
    table = _table()
    table.show_header = False
    table.add_column(style="dim")
    table.add_column()
    for name, value in facts:
        table.add_row(name, escape(value))
    return table


def store_table(entries: Iterable[tuple[Path, Profile]], root: Path) -> Table:
    """A row for each stored profile: layer, regime, backend, device, buckets, day, file below `root`."""
    table = _table()
    for title in ("layer", "regime", "backend", "device"):
        table.add_column(title)
    _add_numbers(table, "buckets")
    table.add_column("measured")
    table.add_column("file", style="cyan", overflow="fold")
    for path, profile in entries:
        measured = max((choice.measured_at for choice in profile.choices), default="–")
        table.add_row(
            profile.layer.name,
            profile.regime.slug,
            profile.backend,
            profile.environment.device,
            f"{len(profile.choices)}/{len(profile.regime.buckets)}",
            measured[:10],
            escape(str(path.relative_to(root) if path.is_relative_to(root) else path)),
        )
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")


def _add_numbers(table: Table, *titles: str) -> None:
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"
