"""Describes layers, regimes and counts in one line each. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moetune.errors import Plain
from moetune.report.tactics import reasons_counted
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.recording import RecordingSummary
from moetune.spec.regime import Regime
from moetune.store.match import Differing
from moetune.store.miss import FIELD_TITLES

_LADDERS = {
    "vllm": " (the batch sizes of vLLM's and SGLang's tuned files)",
    "adaptive": " (the batch sizes of vLLM's and SGLang's tuned files and more)",
    "hybrid": " (the buckets of FlashInfer's tuner)",
}


def layer_line(layer: MoELayer) -> str:
    """Returns the layer as `qwen3-30b-a3b: 128 experts, top-8, hidden 2,048, intermediate 768, bf16`."""
    return (
        f"{layer.name}: {layer.num_experts} experts, top-{layer.top_k}, hidden {layer.hidden_size:,}, "
        f"intermediate {layer.intermediate_size:,}, {layer.precision.value}"
    )


def regime_line(regime: Regime) -> str:
    """Returns the regime as `ep 8, tp 1, attention DP, alltoall packed, random × 16 draws, ladder pow2`.

    A ladder with an engine's name says where its buckets come from, because other engines have the same buckets.
    """
    parts = [f"ep {regime.ep_size}", f"tp {regime.tp_size}"]
    parts += ["attention DP" if regime.attention_dp else "no attention DP"]
    parts += [f"{regime.dispatch} {regime.layout}" if regime.layout else f"dispatch {regime.dispatch}"]
    parts += [f"{regime.redundant_experts} redundant experts"] if regime.redundant_experts else []
    parts += [f"{regime.spelled_distributions} × {regime.draws} draw{'s' if regime.draws > 1 else ''}"]
    parts += [f"objective {regime.objective}"] if regime.objective else []
    parts += [f"seed {regime.seed}"] if regime.seed else []
    return ", ".join([*parts, f"ladder {regime.ladder}{_LADDERS.get(regime.ladder.name, '')}"])


def recording_line(recording: RecordingSummary) -> str:
    """Returns a recording as `recording traffic.npz: 12,000 tokens of 3 layers, with the router's weights`."""
    layers = counted(recording.layers, "layer") if recording.layer is None else f"layer {recording.layer}"
    weights = "with the router's weights" if recording.weights else "weights are random"
    return f"recording {recording.name}: {counted(recording.tokens, 'token')} of {layers}, {weights}"


def routing_line(routing: RoutingMethod) -> str:
    """Returns the routing method as `sigmoid + bias, 4 of 8 groups, × 2.5`."""
    parts = [routing.scoring + (" + bias" if routing.bias else "")]
    parts += [f"{routing.top_k_groups} of {routing.num_groups} groups"] if routing.grouped else []
    parts += [] if routing.renormalize else ["not renormalized"]
    parts += [f"× {routing.scaling:g}"] if routing.scaling != 1.0 else []
    return ", ".join(parts)


def neutral_line(neutral: Differing) -> str:
    """Returns `measured with torch 2.11 (here 2.14); torch does not change what this kernel runs`.

    Empty if the versions are those of another machine, which are not known.
    """
    if unknown(neutral):
        return ""
    verb = "does" if len(neutral) == 1 else "do"
    return f"measured with {versions(neutral)}; {listed(neutral)} {verb} not change what this kernel runs"


def near_line(near: Differing) -> str:
    """Returns `near: measured with triton 3.6.0 (here 3.8.0); other tactics may be fastest here`.

    For another machine, whose versions are not known: `measured with triton 3.6.0; check that the engine has the same`.
    """
    if unknown(near):
        measured = listed(f"{name} {each['stored']}" for name, each in near.items())
        return f"measured with {measured}; check that the engine has the same"
    return f"near: measured with {versions(near)}; other tactics may be fastest here"


def unknown(differing: Differing) -> bool:
    """Returns whether all versions are those of another machine, which nobody knows here. See `Question.elsewhere`."""
    return all(each["wanted"] is None for each in differing.values())


def ladder_line(measured_ladder: str) -> str:
    """Returns `measured on the ladder vllm; ...` with the command that also measures the row counts between."""
    return (
        f"measured on the ladder {measured_ladder}; `moetune tune --again` with the same options measures the row "
        "counts between too"
    )


def versions(differing: Differing) -> str:
    """Returns `torch 2.11 (here 2.14) and cuda 13.0 (here 13.1)`."""
    return listed(
        f"{name} {each['stored'] or 'none'} (here {each['wanted'] or 'none'})" for name, each in differing.items()
    )


def field_line(name: str, value: Plain) -> str:
    """Returns a field that deployments differ in, and its value: `ep 8`, `no attention DP`, `largest bucket 8192`."""
    if name == "attention_dp":
        return "attention DP" if value else "no attention DP"
    title = FIELD_TITLES.get(name, name)
    return f"no {title}" if value is None else f"{title} {value}"


def counted(count: int, noun: str) -> str:
    """Returns `1 row` or `2 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(words: Iterable[str]) -> str:
    """Returns `a`, `a and b` or `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def span(values: Sequence[float]) -> str:
    """Returns the least and the greatest value as `1–6`, or one number if they are equal."""
    low, high = min(values), max(values)
    return f"{low:,g}" if low == high else f"{low:,g}–{high:,g}"


def reason_lines(title: str, groups: Sequence[Iterable[str]]) -> list[str]:
    """Returns `title` and a line for each kind of reason, or an empty list if there are no reasons.

    A line has the least and the greatest number of reasons of its kind in one bucket.

    Args:
        title: the first line.
        groups: the reasons of each bucket, one for each tactic.
    """
    counted = {reason: span(counts) for reason, counts in reasons_counted(groups).items()}
    width = max(map(len, counted.values()), default=0)
    return [title, *(f"{counts:>{width + 2}}  {reason}" for reason, counts in counted.items())] if counted else []


def skipped_lines(regime: Regime) -> list[str]:
    """Returns a line about the buckets that a pool cannot have, or an empty list if there are none."""
    if not regime.skipped_buckets:
        return []
    skipped = ", ".join(map(str, regime.skipped_buckets))
    return [f"left out, because a pool has {regime.ep_size} equal blocks: {skipped} rows"]
