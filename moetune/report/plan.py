"""Shows a plan as tables for a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.inputs.engine_flags import TRITON, WITH_IDS, preferred_to_triton
from moetune.inputs.hopper_kernels import on_hopper
from moetune.report.command import command, shortest
from moetune.report.format import count, human_bytes, human_flops
from moetune.report.lines import (
    counted,
    field_line,
    ladder_line,
    layer_line,
    listed,
    near_line,
    neutral_line,
    reason_lines,
    recording_line,
    regime_line,
    skipped_lines,
    span,
    versions,
)
from moetune.report.table import FittedTable, add_numbers, new_table
from moetune.spec.enums import ENGINE_TITLES
from moetune.store.miss import taken_hint

if TYPE_CHECKING:
    from moetune.tuning.outlook import Kernels, NearestProfile
    from moetune.tuning.plan import Plan


_NAMED = 3
"""Number of fields of the deployment that are named; all are in the JSON document."""


def plan_report(plan: Plan, *, wire: bool = False, flags: Sequence[str] = ()) -> list[RenderableType]:
    """Returns a plan as text and tables: the question, each bucket's load, and what to run.

    Args:
        plan: the plan to show.
        wire: whether to show the formats in which a token can travel, too.
        flags: the flags of a launch line that decide the deployment.
    """
    reported: list[RenderableType] = [
        Text(layer_line(plan.layer), style="bold"),
        Text(regime_line(plan.regime)),
        *([Text(recording_line(plan.recording), style="dim")] if plan.recording else []),
        *([Text(f"read from the line: {', '.join(flags)}", style="dim")] if flags else []),
        Text(_rank_line(plan), style="dim"),
        Text(_load_line(plan), style="dim"),
        *(Text(line, style="dim") for line in (*_skew_lines(plan), *_several_lines(plan))),
        Text(),
        plan_table(plan),
        Text(),
        columns_table(plan),
    ]
    below = [_tactics_line(plan)]
    below += reason_lines(
        "tactics left out, per bucket:", [bucket.excluded_tactics.values() for bucket in plan.buckets]
    )
    below += skipped_lines(plan.regime)
    reported += [Text(), *(Text(line, style="dim") for line in below)]
    if wire and plan.wire:
        reported += [Text(), wire_table(plan), Text(), wire_columns_table(plan), Text(_unknown_row(plan), style="dim")]
    if plan.kernels:
        reported += [Text(), *_outlook(plan, plan.kernels)]
    return reported


def plan_table(plan: Plan) -> FittedTable:
    """Returns a table with a row for each bucket: the kernel's load, the bytes on the wire, and the GEMMs' work.

    In a narrow terminal columns of bytes and operations are left out.
    """
    table = new_table()
    table.padding = (0, 0)  # eleven columns fit into a terminal of 80
    same, other = _tokens_are_rows(plan), _has_typical_rows(plan)
    add_numbers(table, "rows", *(["typ.\nrows"] if other else []), *([] if same else ["tokens\na rank"]))
    add_numbers(table, "local\nslots", "slots/\nexpert", "active\nexperts")
    spare = (*(("bytes\nback", "bytes\nin") if plan.wire else ()), "activ.\nbytes", "weight\nbytes", "GEMMs\n(FLOP)")
    add_numbers(table, *(("bytes\nin", "bytes\nback") if plan.wire else ()), *spare[-2:-4:-1], spare[-1])
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
        )
    return FittedTable(table, spare)


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


def columns_table(plan: Plan) -> Table:
    """Returns what ep, tp and the columns of the bucket table mean."""
    last = f"{plan.buckets[-1].rows:,}"
    bucket = f"the bucket: the row count by which the engine looks a tactic up. Above {last} it uses that of {last}"
    if plan.regime.layout == "batched":
        bucket = "the capacity of the expert-major buffer, by which the engine looks a tactic up in every step"
    entries = {"ep, tp": "ranks that share the experts, and ranks that share each expert"}
    if _tokens_are_rows(plan):
        bucket += ". Each rank has as many tokens"
    entries["rows"] = bucket
    if _has_typical_rows(plan):
        near = "within 12 % of" if plan.regime.ladder.name == "adaptive" else "that maps to"
        entries["typ. rows"] = f"the typical (most likely) row count {near} the bucket; the other columns are for it"
    if not _tokens_are_rows(plan):
        entries["tokens a rank"] = "the tokens of each rank that produce these rows"
    entries |= {
        "local slots": "(token, expert) pairs whose expert is on this rank",
        "slots/expert": "local slots divided by this rank's experts",
        "active experts": "this rank's experts that have a slot",
    }
    if plan.wire:
        entries["bytes in"] = "what other ranks send before the experts run: tokens in bf16, and their routing"
        entries["bytes back"] = (
            "what other ranks send after the experts have run: results of this rank's tokens. Both are for a whole "
            "number of tokens a rank, at least 1"
        )
    entries |= {
        "weight bytes": "weights of the active experts",
        "activ. bytes": "activations that both GEMMs read and write",
        "GEMMs (FLOP)": "floating-point operations of both GEMMs",
    }
    return _legend(entries)


def _tokens_are_rows(plan: Plan) -> bool:
    return all(bucket.tokens_per_rank == bucket.rows for bucket in plan.buckets)


def _has_typical_rows(plan: Plan) -> bool:
    return any(bucket.met_rows != bucket.rows for bucket in plan.buckets)


def _tactics_line(plan: Plan) -> str:
    """Returns how many tactics a tune could try, or what is missing to count them: that is no failure of the plan."""
    counts = [bucket.tactics for bucket in plan.buckets if bucket.tactics is not None]
    known = f"{span(counts)} per bucket" if counts else plan.tactics_unknown.rpartition(" cannot run here: ")[2]
    return f"number of tactics (ways to run the kernel): {known}"


def wire_columns_table(plan: Plan) -> Table:
    """Returns what the rows and columns of the wire table mean."""
    return _legend(
        {
            "each row": "one way in which a token can travel",
            "before the exchange": "the type to which its hidden states are converted before they are sent",
            "packed_topk": "an expert's id and its weight, as bf16, in one int32",
            "fewer by": "the bytes of the first row divided by those of this row",
        }
    )


def _legend(entries: Mapping[str, str]) -> Table:
    """Returns a table of titles and their meaning, without a header."""
    table = new_table()
    table.show_header = False
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for title, meaning in entries.items():
        table.add_row(title, meaning)
    return table


def _unknown_row(plan: Plan) -> str:
    """Returns that no row can be marked: `inputs/dispatchers.json` does not record what engines send."""
    engine = plan.kernels and plan.kernels.engine
    return f"Which row {ENGINE_TITLES[engine] if engine else 'an engine'} sends is not recorded in moetune."


def _outlook(plan: Plan, kernels: Kernels) -> list[Text]:
    """Returns which kernels run the experts, which profile is nearest, and what to run next."""
    profile = plan.profile
    lines = [Text(line) for line in (_kernels_line(plan, kernels), _routing_line(plan, kernels)) if line]
    if plan.backend not in kernels.computing and not (profile and profile.answers):
        return lines
    if plan.profile_unknown:
        lines.append(Text(f"profile: none can be looked up here. {plan.profile_unknown}"))
    elif profile is None and (kernels.selected or kernels.engine):
        lines.append(Text(f"profile: none measured with {plan.backend} is stored."))
    else:
        lines.append(Text(_profile_line(profile)))
    if profile:
        lines.append(Text("A profile holds the fastest tactic of each bucket for one deployment.", style="dim"))
    if profile and not profile.answers:
        lines += [Text(taken_hint(profile.taken_with))] if profile.taken_with else []
        lines.append(
            Text("view the nearest: ", no_wrap=True).append(command("show", shortest(profile.path)), style="bold")
        )
    if plan.next_command:
        here = kernels.runs_here or (profile is not None and profile.answers)
        title = Text("next: ", no_wrap=True)
        if not here:
            minutes = " (Triton takes about 2 minutes on an H200)" if plan.backend == "triton" else ""
            lines.append(Text(f"next, on one GPU of the kind that you deploy on{minutes}:"))
            title = Text(no_wrap=True)
        lines.append(title.append(plan.next_command, style="bold"))
    return lines


def _kernels_line(plan: Plan, kernels: Kernels) -> str:
    backend = plan.backend
    if backend not in kernels.computing:
        if kernels.computing:
            able = f"Choose one that does with --backend: {', '.join(kernels.computing)}."
        else:
            known = on_hopper(kernels.engine, plan.layer, plan.regime) if kernels.engine else None
            able = "No backend of moetune does."
            able += f" On Hopper {ENGINE_TITLES[kernels.engine]} runs {known.name}." if kernels.engine and known else ""
        return f"kernels: {backend} does not compute this layer. {able}"
    engine = kernels.engine
    if engine is None:
        flags = " · ".join(f"{ENGINE_TITLES[name]} {flag}" for name, flag in kernels.flags.items())
        chosen = "as the command selects" if kernels.selected else "moetune's first choice here"
        return f"kernels: {backend}, {chosen}. " + (f"An engine's flag: {flags}." if flags else "No engine runs them.")
    name, flag = ENGINE_TITLES[engine], kernels.flags.get(engine)
    if flag is None:
        return f"kernels: {backend}. {name} does not run them."
    if kernels.selected:
        return f"kernels: {backend}, as the command selects. {name} runs them with {flag}."
    without = [f"prefers {other} on {generation}" for generation, other in kernels.preferred.items()]
    regime = plan.regime
    other = preferred_to_triton(engine, plan.layer.precision, regime.ep_size, 9, regime.layout)
    if backend in TRITON and other is None:
        without.insert(0, "runs these on Hopper")
    chosen = f"kernels: {backend}. The command selects none: start {name} with {flag}."
    return f"{chosen} Without it {name} {listed(without)}." if without else chosen


def _routing_line(plan: Plan, kernels: Kernels) -> str:
    """Returns what chooses the experts of a token, for the two backends that differ in it; else an empty string."""
    if kernels.routed_by == "kernel":
        recorded = " For a recording, logits are made from which it chooses the recorded experts."
        return (
            "routing: the kernel chooses the experts itself, from the router's logits."
            + (recorded if plan.regime.recordings else "")
            + " Where the engine must choose them, as for rollouts whose routing is returned or replayed, it runs "
            f"{WITH_IDS}, which is tuned apart: --backend {WITH_IDS}."
        )
    if plan.backend != WITH_IDS:
        return ""
    return (
        "routing: the engine chooses the experts and passes their ids, so the kernel runs any routing, also a "
        "recorded one: --distribution replay:PATH."
    )


def _profile_line(profile: NearestProfile | None) -> str:
    if profile is None:
        return "profile: none is stored."
    origin = "comes with moetune" if profile.packaged else "is in your store"
    if profile.answers:
        line = f"profile: one that {origin} answers this question."
        lines = [near_line(profile.near)] if profile.near else []
        lines += [neutral_line(profile.neutral)]
        lines += [ladder_line(profile.measured_ladder)] if profile.measured_ladder else []
        return " ".join([line, *(f"{text[0].upper()}{text[1:]}." for text in lines if text)])
    if profile.near:
        return f"profile: none for these versions. The nearest {origin}; it was measured with {versions(profile.near)}."
    measured = f"{origin} and was measured with {profile.backend} on {profile.device}"
    if profile.other_layer:
        precision = f" in {profile.differing['precision']['stored']}" if "precision" in profile.differing else ""
        return f"profile: none of this layer. The nearest is of {profile.layer}{precision}; it {measured}."
    if names := profile.other_deployment:
        its, yours = (
            listed(field_line(name, profile.differing[name][side]) for name in names[:_NAMED])
            for side in ("stored", "wanted")
        )
        more = len(names) - _NAMED
        others = f" --json lists {counted(more, 'more difference')}." if more > 0 else ""
        return (
            f"profile: none for this deployment. The nearest {measured}. It is for a deployment with {its}; yours has "
            f"{yours}.{others}"
        )
    wanted = profile.differing["device"]["wanted"] if "device" in profile.differing else "this machine"
    return f"profile: none for {wanted}. One of the same layer and deployment {measured}."


def _rank_line(plan: Plan) -> str:
    last = plan.first_expert + plan.num_local_experts - 1
    return (
        f"rank {plan.rank} of {plan.regime.ep_size}: experts {plan.first_expert} … {last}, "
        f"{human_bytes(plan.resident_bytes)} of weights"
    )


def _load_line(plan: Plan) -> str:
    on_rank = f"{100 * plan.hit_fraction:.1f} % of all tokens have a slot on this rank"
    if plan.regime.replay:
        return f"numbers are means over the recorded tokens: {on_rank}"
    way = "simulated" if plan.simulated else "in closed form"
    load = {"random": "random logits", "balanced": "experts with equal loads"}.get(
        plan.regime.distribution, f"the shares of {plan.regime.distribution}"
    )
    rule = "" if plan.regime.distribution == "balanced" else " through the model's routing rule"
    return f"numbers are means for {load}{rule}, {way}: {on_rank}"


def _several_lines(plan: Plan) -> list[str]:
    """Returns under what else tactics are measured; nothing if there is one distribution."""
    regime = plan.regime
    if not regime.also:
        return []
    others = listed(each.distribution for each in regime.distributions[1:])
    aim = "the weighted mean of its slowdowns" if regime.objective == "mean" else "its worst slowdown"
    numbers = f"the numbers are for {regime.distribution}"
    return [f"tactics are measured under {others} too, and a choice minimizes {aim}; {numbers}"]


def _skew_lines(plan: Plan) -> list[str]:
    """Returns the asked and the achieved skew, and that of the rank; nothing if the distribution is not skewed."""
    skew = plan.skew
    if skew is None:
        return []
    where = "all experts" if skew.num_experts == plan.layer.num_experts else "a rank's experts"
    peak = f", busiest {skew.asked_max_over_mean:.3g} × the mean" if skew.asked_max_over_mean else ""
    rank = f"this rank: {skew.rank_load:.3g} × the mean load of a rank; " if plan.regime.ep_size > 1 else "this rank: "
    achieved = f"{skew.effective_experts:.4g}, busiest {skew.max_over_mean:.3g} × the mean"
    asked = f"asked {skew.asked_effective_experts:.4g} effective experts of {skew.num_experts}{peak}; achieved "
    if plan.regime.replay:
        asked, achieved = "recorded ", achieved.replace(",", f" effective experts of {skew.num_experts},", 1)
    return [
        f"skew over {where}: {asked}{achieved}",
        f"{rank}{skew.rank_effective_experts:.3g} effective experts of {plan.num_local_experts}, busiest "
        f"{skew.rank_max_over_mean:.3g} × their mean; in draws of {skew.drawn_rows:,} rows "
        f"{skew.drawn_effective_experts:.3g} and {skew.drawn_max_over_mean:.3g} ×",
    ]
