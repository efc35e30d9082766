"""Writes docs/kernels.md: the kernels that each engine runs on Hopper, and what moetune tunes of them.

`make pages` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from moetune.backends.batched_triton.space import VALUES as BATCHED
from moetune.backends.grouped_triton.space import VALUES as GROUPED
from moetune.backends.registry import backends_computing, rivals_computing
from moetune.inputs import dispatcher
from moetune.inputs.dispatcher import Dispatcher, dispatchers
from moetune.inputs.engine_flags import engine_flags, reaches
from moetune.inputs.hopper_kernels import HopperKernel, on_hopper
from moetune.spec.enums import ENGINE_TITLES, Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

EP = 8
BLACKWELL = ("flashinfer-trtllm", "flashinfer-trtllm-routed")
"""The backends that need compute capability 10.0."""
TUNED = {
    "triton": ", ".join(GROUPED),
    "batched-triton": ", ".join(BATCHED),
    "flashinfer-cutlass": "a tactic for each of the two GEMMs",
    "triton-kernels": "block_m, block_k, num_stages and split_k of each GEMM",
    "humming": "for each of the two GEMMs the instruction, the tile of a block and of a warp, stages, blocks an SM, "
    "producer warps, stream-K and the order of tiles",
    "marlin": "the block size; in vLLM also the tile and the blocks an SM of each GEMM",
}
"""What a tactic of a backend is."""
_INTRODUCTION = f"""\
# Kernels on Hopper

`make pages` writes this page. It says which MoE kernels an engine runs on H100 and H200 if nothing selects them, and
what moetune tunes there. EP is {EP} where ranks share the experts. `moetune plan` and `moetune lookup` read the same
tables. Read were vLLM 0.33.0, SGLang 0.5.23 and TensorRT-LLM of October 2026.

- *tuned* is moetune's backend if it tunes what runs without a flag.
- *with a flag* are the backends that moetune tunes for this deployment, and the engine runs if its flag selects them.
- *timed* are the rivals that the engine runs if their flag selects them. They have nothing to tune;
  `moetune tune --backend auto` compares the tuned kernels with them.
- *not looked at*: moetune's authors have not read what the engine runs there."""


def page() -> str:
    """Returns the page as Markdown."""
    return "\n\n".join([_INTRODUCTION, _table(_merged(list(_rows()))), _tactics()]) + "\n"


def _layers() -> Iterator[tuple[str, MoELayer]]:
    """Yields a name and a layer for each precision, and two for mxfp4."""
    sizes = {"num_experts": 128, "top_k": 8, "hidden_size": 4096, "intermediate_size": 2048}
    for precision in Precision:
        if precision is Precision.MXFP4:
            gpt_oss = MoELayer(**sizes, precision=precision, activation=Activation.SWIGLU_CLAMPED, expert_bias=True)
            yield "mxfp4 (gpt-oss)", gpt_oss
            yield "mxfp4 (others)", MoELayer(**sizes, precision=precision)
        else:
            yield precision.value, MoELayer(**sizes, precision=precision)


Row = tuple[str, str, str, str, str, str, str]
"""Engine, dispatcher, precision, kernel, tuned, with a flag, timed."""
Answer = tuple[str, str, str, str, str, str]
"""A row without its precision, or without its dispatcher."""


def _rows() -> Iterator[Row]:
    """Yields a row for each engine, dispatcher and precision."""
    for engine, title in ENGINE_TITLES.items():
        own = [each for each in dispatchers() if each.engine == engine]
        if engine != "trtllm":  # it has dispatchers of its own for this
            for sharing, regime in (("none: tensor parallel", Regime(tp_size=EP)), ("none: EP", Regime(ep_size=EP))):
                yield from _of_regime(engine, title, f"{sharing}", regime)
        for each in own:
            if each.untunable:
                yield title, f"`{each.name}`", "all", each.untunable, "–", "–", "–"
            else:
                yield from _of_regime(engine, title, f"`{each.name}`", _regime(each))


def _regime(each: Dispatcher) -> Regime:
    _, layer = next(_layers())
    return Regime(ep_size=EP, **dispatcher.resolve(str(each), layer, EP))


def _of_regime(engine: str, title: str, name: str, regime: Regime) -> Iterator[Row]:
    for precision, layer in _layers():
        kernel = on_hopper(engine, layer, regime)
        yield title, name, precision, _named(kernel), *_backends(engine, layer, regime, kernel)


def _named(kernel: HopperKernel | None) -> str:
    return "not looked at" if kernel is None else kernel.name or "none on Hopper"


def _backends(engine: str, layer: MoELayer, regime: Regime, kernel: HopperKernel | None) -> tuple[str, str, str]:
    """Returns the backend that tunes what runs by itself, the others that a flag selects, and the rivals."""
    names = [name for name in backends_computing(layer, regime) if name not in BLACKWELL]
    flags = _flags(engine, layer, regime, names)
    tuned = kernel.backend if kernel and kernel.backend in flags else None
    others = {name: flag for name, flag in flags.items() if name != tuned}
    rivals = _flags(engine, layer, regime, rivals_computing(layer, regime))
    return f"`{tuned}`" if tuned else "–", _with_flags(others), _with_flags(rivals)


def _flags(engine: str, layer: MoELayer, regime: Regime, names: Sequence[str]) -> dict[str, str]:
    """Returns the flags of those of the backends that the engine can run under the layout."""
    flags = {
        name: engine_flags(name, layer.precision, regime.layout).get(engine)
        for name in names
        if reaches(name, regime.layout)
    }
    return {name: flag for name, flag in flags.items() if flag}


def _with_flags(flags: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}` (`{flag}`)" for name, flag in flags.items()) or "–"


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with the precisions of one answer in one row, then the dispatchers of equal answers."""
    by_answer: dict[Answer, list[str]] = {}
    for engine, name, precision, kernel, tuned, others, rivals in rows:
        by_answer.setdefault((engine, name, kernel, tuned, others, rivals), []).append(precision)
    by_precisions: dict[Answer, list[str]] = {}
    for (engine, name, kernel, tuned, others, rivals), precisions in by_answer.items():
        by_precisions.setdefault((engine, ", ".join(precisions), kernel, tuned, others, rivals), []).append(name)
    return [
        (engine, ", ".join(names), precisions, kernel, tuned, others, rivals)
        for (engine, precisions, kernel, tuned, others, rivals), names in by_precisions.items()
    ]


def _table(rows: Sequence[Row]) -> str:
    parts = []
    for engine, of_engine in groupby(rows, key=lambda row: row[0]):
        lines = ["| dispatcher | precision | kernels | tuned | with a flag | timed |", "|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row[1:])} |" for row in of_engine]
        parts.append(f"## {engine}\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _tactics() -> str:
    lines = ["## What a tactic is", "| backend | tunables |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in TUNED.items())])


if __name__ == "__main__":
    print(page(), end="")
