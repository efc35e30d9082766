"""Plugins of vLLM and SGLang: if `MOETUNE_REGIME` is set, each process of the engine tunes for that regime.

If `MOETUNE_RECORD` is set, rank 0 records the experts of its tokens; see `record_hook`.

The entry points are in the groups `vllm.general_plugins` and `sglang.srt.plugins`. Both engines call them early in
every process, sometimes more than once. A plugin imports neither torch nor FlashInfer. It waits until the engine itself
imports FlashInfer's tuner or its own Triton experts, and so costs nothing in a process that does not, and never queries
CUDA before a fork.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from moetune.engine import record_hook
from moetune.errors import MoetuneError, UsageError

if TYPE_CHECKING:
    from moetune.inputs.options import Deployment

VARIABLE = "MOETUNE_REGIME"
TIMEOUT_S = 120.0
"""After this time without a sign of life an engine's rank is lost. Its first comes from its first call of an MoE op,
and until then the ranks of an engine may load and compile for different times."""
TUNER_MODULE = "flashinfer.autotuner.autotuner"

_registered = False


def vllm() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    register(logging.getLogger("vllm.moetune"))


def sglang() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    register(logging.getLogger("sglang.moetune"))


def register(logger: logging.Logger) -> None:
    """Starts this process's session if `MOETUNE_REGIME` is set, and a recording if `MOETUNE_RECORD` is.

    A second call does nothing.

    `MOETUNE_REGIME` is spelled like the options of the command line:
    `--model qwen3-235b-a22b --ep 8 --dispatch vllm:deepep_high_throughput`. If the value cannot be read, that is logged
    as an error, and the engine starts without moetune.

    Args:
        logger: a logger whose lines the engine prints.
    """
    global _registered
    spelled, recorded = os.environ.get(VARIABLE), os.environ.get(record_hook.VARIABLE)
    if _registered or not (spelled or recorded):
        return
    _registered = True
    if recorded:
        record_hook.install(recorded, logger, when_imported)
    if not spelled:
        return
    try:
        _register(spelled, logger)
    except MoetuneError as error:
        logger.error("moetune: %s=%r is not used: %s", VARIABLE, spelled, error)
    except Exception as error:  # the engine must start
        logger.error("moetune: %s=%r is not used: %s: %s", VARIABLE, spelled, type(error).__name__, error)


def _register(spelled: str, logger: logging.Logger) -> None:
    began = time.perf_counter()
    from moetune.engine import (
        flashinfer_hook,
        humming_hook,
        kernels_hook,
        marlin_engines,
        marlin_hook,
        session,
        start_tune,
        triton_engines,
        triton_hook,
        warmup_end,
    )
    from moetune.engine.strategy import RankStrategy, strategy_of_variable
    from moetune.engine.warmup import session_for
    from moetune.inputs import flashinfer_versions
    from moetune.inputs.options import parse

    options = parse(spelled)
    for warning in options.warnings:
        logger.warning("moetune: %s: %s", VARIABLE, warning)
    if isinstance(options.rank, str):
        raise UsageError(
            f"--rank {options.rank} in {VARIABLE}: an engine's process is one rank.",
            "Give its number, or leave --rank out.",
        )
    _check_skew(options, logger)
    try:
        strategy = strategy_of_variable()
    except UsageError as error:
        strategy = RankStrategy.MERGE
        logger.error("moetune: the ranks tune with the strategy %s: %s", strategy, error)
    opened = session_for(
        options.layer, options.regime, options.rank, logger=logger, strategy=strategy, timeout_s=TIMEOUT_S
    )
    session.set_for_process(opened)
    opened.spent_s = time.perf_counter() - began
    try:
        tune_s = start_tune.seconds()
    except UsageError as error:
        logger.error("moetune: nothing is tuned at the start: %s", error)
        tune_s = None
    for engine in triton_engines.ENGINES:
        install = partial(
            triton_hook.install, engine=engine, session=opened, rank=options.rank, spelled=spelled, tune_s=tune_s
        )
        when_imported(engine.caller, install)
    for marlin in marlin_engines.ENGINES:
        answer = partial(marlin_hook.install, engine=marlin, session=opened, rank=options.rank, spelled=spelled)
        when_imported(marlin.module, answer)
    for hook in (humming_hook, kernels_hook):
        when_imported(hook.MODULE, partial(hook.install, session=opened, rank=options.rank, spelled=spelled))
    for step in warmup_end.LAST_STEPS:
        when_imported(step.module, partial(warmup_end.install, step=step, act=lambda _: opened.end_warm_up()))
    if obstacle := flashinfer_versions.obstacle():
        logger.warning("moetune: %s", obstacle)
        return
    when_imported(TUNER_MODULE, lambda module: flashinfer_hook.install_for_process())
    logger.info("moetune: FlashInfer's MoE ops will be tuned for %s under %s", opened.layer.name, opened.regime.slug)


def _check_skew(options: Deployment, logger: logging.Logger) -> None:
    """Logs a warning if the asked skew is missed, or raises UsageError if the options are strict."""
    if not any(part.skew for part in options.regime.parts):
        return
    from moetune.workload.achieved import miss

    for part in options.regime.parts:
        error = miss(options.layer, part, options.rank if isinstance(options.rank, int) else None)
        if error and options.strict_skew:
            raise error
        if error:
            logger.warning("moetune: %s: %s", VARIABLE, error)


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Calls `act` with the module `name` once that is imported; at once if it is imported already."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, act))


class _Watch(MetaPathFinder):
    """A finder that leaves one module to the other finders, and calls `act` after it was executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self._name, self._act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute, act = spec.loader.exec_module, self._act

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                act(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
