"""An extension of vLLM's worker that profiles a few steps, and reads the cache of FlashInfer's tuner.

vLLM mixes the class into its worker (`worker_extension_cls`), and the methods are called by `collective_rpc`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

MOE_KERNELS: Final = re.compile(
    r"fused_moe_kernel|Fused_Moe_Kernel|GroupProblemShape|GroupedGemm|grouped_gemm|moe_gemm|MoeGemm|MoeFCGemm|"
    r"finalizeMoeRoutingKernel|doActivationKernel"
)
"""The grouped GEMMs: vLLM's Triton kernel, and those of FlashInfer's CUTLASS experts.

Some tactics of FlashInfer's compute the activation or add up the results in a GEMM, which the others leave to a kernel
of its own. So these kernels count too.
"""
LONGEST: Final = 12


class StepProfile:
    """Profiles steps of one size of a model runner.

    Args:
        run: the runner's `execute_model`.
        running: the number of sequences in such a step.
        tokens: the tokens of such a step: as many as sequences if it is a decode step.
        skip: how many such steps pass first.
        count: how many are profiled.
        start: starts a profiler. It returns a function that ends it and returns (name, calls, µs) of each kernel.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        running: int,
        tokens: int,
        skip: int,
        count: int,
        start: Callable[[], Callable[[], Iterable[tuple[str, int, float]]]],
    ) -> None:
        self._run, self._size, self._skip, self._count, self._start = run, (running, tokens), skip, count, start
        self._seen = 0
        self._end: Callable[[], Iterable[tuple[str, int, float]]] | None = None
        self.result: dict[str, Any] | None = None

    def __call__(self, scheduler_output: Any, *given: Any, **named: Any) -> Any:
        size = (len(scheduler_output.num_scheduled_tokens), scheduler_output.total_num_scheduled_tokens)
        if size == self._size:
            if self._seen == self._skip:
                self._end = self._start()
            elif self._seen == self._skip + self._count and self._end is not None:
                self.result = kernel_times(self._end(), self._count)
            self._seen += 1
        return self._run(scheduler_output, *given, **named)


def kernel_times(kernels: Iterable[tuple[str, int, float]], steps: int) -> dict[str, Any]:
    """Returns the ms of all kernels and of the grouped GEMMs in one step, and the longest kernels.

    Args:
        kernels: (name, calls, µs) of each kernel over all steps.
        steps: the number of steps.
    """
    found = sorted((kernel for kernel in kernels if kernel[2] > 0), key=lambda kernel: -kernel[2])
    moe = [kernel for kernel in found if MOE_KERNELS.search(kernel[0])]
    return {
        "steps": steps,
        "kernels_ms": sum(time for _, _, time in found) / steps / 1e3,
        "moe_ms": sum(time for _, _, time in moe) / steps / 1e3,
        "moe_calls": sum(calls for _, calls, _ in moe) / steps,
        "longest": [[name[:160], calls, round(time / steps / 1e3, 4)] for name, calls, time in found[:LONGEST]],
    }


def start_torch_profiler() -> Callable[[], Iterable[tuple[str, int, float]]]:
    """Starts PyTorch's profiler of the GPU's kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.start()

    def end() -> Iterable[tuple[str, int, float]]:
        torch.cuda.synchronize()
        profiler.stop()
        return [(event.key, event.count, float(event.self_device_time_total)) for event in profiler.key_averages()]

    return end


class ProfilesSteps:
    """The extension."""

    model_runner: Any

    def moetune_profile(self, running: int, tokens: int, skip: int, count: int) -> None:
        """Profiles the next steps of `running` sequences and `tokens` tokens."""
        runner = self.model_runner
        runner.execute_model = StepProfile(
            type(runner).execute_model.__get__(runner), running, tokens, skip, count, start_torch_profiler
        )

    def moetune_profiled(self) -> dict[str, Any] | None:
        """Returns what was profiled, and ends profiling. None: too few steps ran."""
        result: dict[str, Any] | None = vars(self.model_runner).pop("execute_model").result
        return result

    def moetune_tactics(self) -> dict[str, int | str] | None:
        """Returns how many tactics FlashInfer's tuner has chosen in this worker, and their digest. None: no tuner."""
        tuner = sys.modules.get("flashinfer.autotuner")
        return None if tuner is None else digest_of(tuner.AutoTuner.get().profiling_cache)


def digest_of(cache: Mapping[Any, tuple[Any, ...]]) -> dict[str, int | str]:
    """Returns the number and the digest of a tuner's choices. Equal choices have equal digests, also on other ranks.

    Args:
        cache: `AutoTuner.profiling_cache`: the tactic and the optimization profile of each `ProfilingCacheKey`.
    """
    lines = sorted(f"{key.custom_op} {key.nearest_profile}: {found[0]}" for key, found in cache.items())
    return {"count": len(lines), "digest": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]}
