"""Captures CUDA graphs whose times are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def captured_in(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Captures in `graph` what this thread launches inside, on `stream`, which is not the default stream.

    It does what `torch.cuda.graph` does, but collects no garbage and keeps torch's cache. Those two steps take tens of
    ms for each capture. Other threads may use the device meanwhile, such as NCCL's watchdog and those of an engine.

    Args:
        graph: an empty graph.
        stream: a side stream of the current device.
        pool: what `torch.cuda.graph_pool_handle` returned for graphs that share their memory; None for memory of its
            own.

    Raises:
        RuntimeError: what runs inside cannot be captured. The graph is of no use then.
    """
    import torch

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # this error only repeats that the capture failed
                graph.capture_end()
            raise
        graph.capture_end()
