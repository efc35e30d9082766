"""Shows a plan as tables for a terminal. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.report.format import count, human_bytes, human_flops
from moetune.report.lines import layer_line, reason_lines, regime_line, skipped_lines
from moetune.report.table import add_numbers, new_table

if TYPE_CHECKING:
    from moetune.tuning.plan import Plan


def plan_report(plan: Plan) -> list[RenderableType]:
    """Returns a plan as text and tables: the question, the load of each bucket, and the bytes on the wire."""
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
    below += reason_lines(
        "tactics left out, per bucket:", [bucket.excluded_tactics.values() for bucket in plan.buckets]
    )
    below += skipped_lines(plan.regime)
    reported += [Text(line, style="dim") for line in below]
    if plan.wire:
        reported += [*([Text()] if below else []), wire_table(plan)]
    return reported


def plan_table(plan: Plan) -> Table:
    """Returns a table with a row for each bucket: the kernel's load, the bytes on the wire, and the GEMMs' work."""
    table = new_table()
    table.padding = (0, 0)  # eleven columns fit into a terminal of 80
    same = all(bucket.tokens_per_rank == bucket.rows for bucket in plan.buckets)
    other = any(bucket.met_rows != bucket.rows for bucket in plan.buckets)
    typical = ["typ-\nical\nrows"] if other else []
    add_numbers(table, *(["rows =\ntokens\na rank"] if same else ["rows", *typical, "tokens\na rank"]))
    add_numbers(table, "local\nslots", "slots/\nexpert", "active\nexperts")
    for title in (*(("re-\nceived", "com-\nbined") if plan.wire else ()), "weight\nbytes", "activ.\nbytes"):
        table.add_column(title, justify="right", overflow="fold")
    add_numbers(table, "GEMMs\n(FLOP)", *([] if plan.tactics_unknown else ["tactics"]))
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
    """Returns a table with a row for each format in which a token can travel.

    It has the bytes per token, and how many times fewer these are than with bf16 activations.
    """
    table = new_table()
    table.add_column("before the\nexchange")
    table.add_column("routing\nthat travels", no_wrap=True)
    add_numbers(table, "bytes\nper token", "fewer\nby")
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


def _rank_line(plan: Plan) -> str:
    last = plan.first_expert + plan.num_local_experts - 1
    return (
        f"rank {plan.rank} of {plan.regime.ep_size}: experts {plan.first_expert} … {last}, "
        f"{human_bytes(plan.resident_bytes)} of weights"
    )


def _load_line(plan: Plan) -> str:
    source = "simulated with the layer's own router" if plan.simulated else "in closed form"
    return f"numbers are means, {source}: {100 * plan.hit_fraction:.1f} % of all tokens have a slot on this rank"
