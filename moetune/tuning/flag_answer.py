"""Says which flag of an engine selects the fastest kernels by row count, and what one flag for all costs.

A process of vLLM or SGLang has one flag for its MoE kernels. It serves decode steps, whose rows fit in a CUDA graph,
and prefills, which have more. In a deployment with separate pools for these, each pool has a flag of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from moetune.inputs.engine_flags import ENGINES, flags_of
from moetune.inputs.hopper_kernels import on_hopper
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.stats import geomean
from moetune.tuning.comparison import ComparedBucket, FlagAnswer, FlagCost, FlagRange, FlagResult

DECODE_TOKENS: Final = 512
"""The most tokens of a rank in a decode step: the largest CUDA graph that engines capture by default on H100 and H200.

vLLM 0.33: `_set_cudagraph_sizes` in `config/vllm.py`, with `max_num_seqs` of 256 or more. SGLang 0.5.23:
`arg_groups/memory_hook.py`, on GPUs of 90 GB or more, and at tp 4 on smaller ones.
"""


def flag_answers(
    layer: MoELayer, regime: Regime, backends: Iterable[str], buckets: Sequence[ComparedBucket], on_a_hopper: bool
) -> dict[str, FlagAnswer]:
    """Returns the answer for each engine that can run one of the backends, by the engine's name.

    Args:
        layer: the layer.
        regime: the deployment.
        backends: the backends that were compared.
        buckets: the comparison's buckets, ascending.
        on_a_hopper: whether the device has compute capability 9.0, for which it is known what an engine runs by itself.
    """
    names, rows = tuple(backends), decode_rows(layer, regime)
    answers = {}
    for engine in ENGINES:
        kernel = on_hopper(engine, layer, regime) if on_a_hopper else None
        default = kernel.backend if kernel else None
        answer = flag_answer(buckets, flags_of(engine, names, layer, regime), rows, default)
        if answer is not None:
            answers[engine] = answer
    return answers


def decode_rows(layer: MoELayer, regime: Regime) -> int:
    """Returns the most rows of a decode step: those that a rank gets if every rank has `DECODE_TOKENS` tokens.

    Engines use the layout `batched` for decode steps only, so there it is the capacity at least.
    """
    from moetune.workload.dispatch import rows_for_tokens

    rows = math.ceil(rows_for_tokens(layer, regime, DECODE_TOKENS))
    return max(rows, *regime.buckets) if regime.layout == "batched" else rows


def flag_answer(
    buckets: Sequence[ComparedBucket], flags: Mapping[str, str], decode_rows: int, default: str | None = None
) -> FlagAnswer | None:
    """Returns the answer for one engine; None if no bucket has a time of a backend that a flag selects.

    Args:
        buckets: the comparison's buckets, ascending.
        flags: by backend, the flag of the engine that selects it. No flag stands twice.
        decode_rows: the largest row count of a decode step.
        default: the backend that the engine runs without a flag, if it is known.
    """
    timed = [bucket for bucket in buckets if bucket.times_us.keys() & flags.keys()]
    if not timed:
        return None
    slowdowns = {bucket.rows: _slowdowns(bucket, flags) for bucket in timed}
    results = sorted((_result(name, flag, slowdowns, decode_rows) for name, flag in flags.items()), key=_rank)
    results = [result for result in results if len(result.missing) < len(slowdowns)]
    whole = [result for result in results if not result.missing]
    return FlagAnswer(
        decode_rows=decode_rows,
        ranges=tuple(_ranges([(bucket.rows, _fastest(bucket, flags)) for bucket in timed], flags)),
        flags=tuple(results),
        decode_flag=_cheapest((result.flag, result.decode) for result in results),
        prefill_flag=_cheapest((result.flag, result.prefill) for result in results),
        one_flag=whole[0].flag if whole else None,
        default=default if any(result.backend == default for result in results) else None,
        interleaved=all(bucket.interleaved or len(slowdowns[bucket.rows]) == 1 for bucket in timed),
    )


def _slowdowns(bucket: ComparedBucket, flags: Mapping[str, str]) -> dict[str, float]:
    """Returns by backend its time over that of the fastest backend with a flag."""
    times_us = {name: time_us for name, time_us in bucket.times_us.items() if name in flags}
    least_us = min(times_us.values())
    return {name: time_us / least_us for name, time_us in times_us.items()}


def _fastest(bucket: ComparedBucket, flags: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the backends that may be the fastest with a flag, the fastest first: those within the A/A noise of it.

    The runner-up is among them too if the comparison could not tell it from the winner.
    """
    slowdowns = _slowdowns(bucket, flags)
    close = {name for name, slowdown in slowdowns.items() if slowdown <= 1 + (bucket.noise or 0.0)}
    if bucket.interleaved and not bucket.decided and bucket.winner in close and bucket.runner_up in slowdowns:
        close.add(str(bucket.runner_up))
    return tuple(sorted(close, key=lambda name: slowdowns[name]))


def _ranges(fastest: Sequence[tuple[int, tuple[str, ...]]], flags: Mapping[str, str]) -> Iterable[FlagRange]:
    """Yields the fewest ranges in each of which one backend is among the fastest of every bucket.

    Each range begins with the backend that lasts longest from there on, which leaves as few ranges as can be. Of equals
    the one that is the fastest in the first bucket is taken.
    """
    at = 0
    while at < len(fastest):
        lengths = {name: _length(name, fastest[at:]) for name in fastest[at][1]}
        name = max(lengths, key=lambda each: lengths[each])
        last = at + lengths[name] - 1
        yield FlagRange(first_rows=fastest[at][0], last_rows=fastest[last][0], flag=flags[name], backend=name)
        at = last + 1


def _length(name: str, fastest: Sequence[tuple[int, tuple[str, ...]]]) -> int:
    return next((at for at, (_, names) in enumerate(fastest) if name not in names), len(fastest))


def _result(name: str, flag: str, slowdowns: Mapping[int, Mapping[str, float]], decode_rows: int) -> FlagResult:
    decode = {rows: by_name for rows, by_name in slowdowns.items() if rows <= decode_rows}
    prefill = {rows: by_name for rows, by_name in slowdowns.items() if rows > decode_rows}
    return FlagResult(
        flag=flag,
        backend=name,
        decode=_cost(name, decode),
        prefill=_cost(name, prefill),
        missing=tuple(rows for rows, by_name in slowdowns.items() if name not in by_name),
    )


def _cost(name: str, slowdowns: Mapping[int, Mapping[str, float]]) -> FlagCost | None:
    if not slowdowns or any(name not in by_name for by_name in slowdowns.values()):
        return None
    own = {rows: by_name[name] for rows, by_name in slowdowns.items()}
    worst_rows = max(own, key=lambda rows: own[rows])
    return FlagCost(mean=max(1.0, geomean(list(own.values()))), worst=own[worst_rows], worst_rows=worst_rows)


def _rank(result: FlagResult) -> tuple[int, float]:
    """Returns what orders flags: those without a time in some buckets last, then the mean over both phases.

    Decode and prefill count the same, however many buckets each has.
    """
    means = [cost.mean for cost in (result.decode, result.prefill) if cost]
    return len(result.missing), geomean(means) if means else math.inf


def _cheapest(costs: Iterable[tuple[str, FlagCost | None]]) -> str | None:
    known = {flag: cost.mean for flag, cost in costs if cost}
    return min(known, key=lambda flag: known[flag], default=None)
