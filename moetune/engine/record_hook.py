"""Records the experts of an engine's tokens in its own process: the plugins, if `MOETUNE_RECORD` names a file.

Sources, in vLLM 0.26.0 and 0.33.0: each `MoERunner` has a `layer_id` and a `router`, whose `set_capture_fn` takes a
function that gets the ids of experts before EPLB replaces them (`BaseRouter._select_experts` in router/base_router.py).
vLLM uses it for `--enable-return-routed-experts`. In SGLang 0.5.23 all routers call
`capture_routed_experts_if_allowed(topk_config, layer_id, topk_ids)` in srt/layers/moe/topk.py with them.

Recording begins at the end of the warm-up, whose tokens are made up. A CUDA graph replays kernels without Python, so
what runs in one cannot be recorded.
"""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from moetune.engine import warmup_end

if TYPE_CHECKING:
    import torch

    from moetune.recordings.recorder import Recorder

VARIABLE: Final = "MOETUNE_RECORD"
SGLANG_ROUTER: Final = "sglang.srt.layers.moe.topk"
P = ParamSpec("P")


class Recording:
    """Records in this process from `begin` on, on rank 0 alone.

    An error ends the recording and is logged. It never reaches the engine.

    Args:
        path: the `.npz` file.
        logger: a logger whose lines the engine prints.
    """

    def __init__(self, path: str, logger: logging.Logger) -> None:
        self._path, self._logger = path, logger
        self._recorder: Recorder | None = None
        self._recording = False

    def begin(self, layers: int | None = None) -> None:
        """Opens the recorder. `layers` is the number of layers that are recorded, if it is known."""
        from moetune.recordings.recorder import record

        if not _is_first_rank() or layers == 0:
            if layers == 0:
                self._logger.error(
                    "moetune: %s: no layer's router can be recorded: the model has none, or its kernels route "
                    "themselves. Start the engine with Triton kernels",
                    VARIABLE,
                )
            return
        try:
            self._recorder = record(self._path)
        except Exception as error:  # the engine must go on
            self._logger.error("moetune: %s=%r is not used: %s", VARIABLE, self._path, error)
            return
        atexit.register(self._close)
        self._recording = True
        of = "" if layers is None else f" of {layers} layers"
        self._logger.info(
            "moetune: the experts%s are recorded in %s. Batches that run in a CUDA graph are not: start vLLM with "
            "--enforce-eager, SGLang with --cuda-graph-backend-decode=disabled --cuda-graph-backend-prefill=disabled",
            of,
            self._path,
        )

    def add(self, layer: int | None, topk_ids: torch.Tensor) -> None:
        """Records the tokens of one layer; nothing before `begin`, in a CUDA graph, or while torch compiles."""
        if not self._recording or layer is None:
            return
        import torch

        if torch.compiler.is_compiling() or (topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        assert self._recorder is not None
        self.guarded(self._recorder.add)(layer, topk_ids)

    def guarded(self, act: Callable[P, None]) -> Callable[P, None]:
        """Returns a function that calls `act`. An error of it is logged and ends the recording; the engine goes on."""

        @functools.wraps(act)
        def wrapped(*given: P.args, **named: P.kwargs) -> None:
            try:
                act(*given, **named)
            except Exception as error:
                self._recording = False
                self._logger.error("moetune: %s: recording ends: %s: %s", VARIABLE, type(error).__name__, error)

        return wrapped

    def _close(self) -> None:
        self._recording = False
        try:
            if self._recorder is not None:
                self._recorder.close()
        except Exception as error:
            self._logger.error("moetune: %s=%r: what was recorded is not saved: %s", VARIABLE, self._path, error)


def install(
    path: str, logger: logging.Logger, when_imported: Callable[[str, Callable[[ModuleType], None]], None]
) -> None:
    """Waits for the engine's modules, and then hooks into them.

    Args:
        path: the value of `MOETUNE_RECORD`.
        logger: a logger whose lines the engine prints.
        when_imported: calls a function with a module once it is imported; `plugins.when_imported`.
    """
    recording = Recording(path, logger)
    when_imported(warmup_end.VLLM.module, partial(hook_worker, recording=recording))
    when_imported(SGLANG_ROUTER, partial(hook_router, recording=recording))
    when_imported(warmup_end.SGLANG.module, partial(hook_scheduler, recording=recording))


def hook_worker(module: ModuleType, recording: Recording) -> None:
    """Begins to record at the end of vLLM's warm-up. A vLLM without this method is left alone."""

    @recording.guarded
    def begin(worker: Any) -> None:
        recording.begin(bind(worker.get_model(), recording))

    warmup_end.install(module, warmup_end.VLLM, begin)


def bind(model: torch.nn.Module, recording: Recording) -> int:
    """Gives each router of a model of vLLM a capture function, and keeps the one it has. Returns their number.

    Layers whose kernel routes by itself are left out, because their router is never called.
    """
    bound = 0
    for module in model.modules():
        router = getattr(module, "router", None)
        bind_to = getattr(router, "set_capture_fn", None)
        if not callable(bind_to) or getattr(module, "is_monolithic", False):
            continue
        layer = getattr(module, "layer_id", None)
        if isinstance(layer, int):
            bind_to(_capture(recording, layer, getattr(router, "capture_fn", None)))
            bound += 1
    return bound


def hook_router(module: ModuleType, recording: Recording) -> None:
    """Hooks into the function that SGLang gives each router's ids. A SGLang without it is left alone."""
    original = getattr(module, "capture_routed_experts_if_allowed", None)
    if not callable(original):
        return

    @recording.guarded
    def add(topk_config: Any, layer_id: int | None, topk_ids: torch.Tensor) -> None:
        if getattr(topk_config, "allow_routed_experts_capture", True):  # False in the draft of speculative decoding
            routed = getattr(topk_config, "top_k", topk_ids.shape[1]) - getattr(topk_config, "num_shared_topk_slots", 0)
            recording.add(layer_id, topk_ids[:, :routed])  # the columns of fused shared experts come last

    @functools.wraps(original)
    def capture_routed_experts_if_allowed(*given: Any, **named: Any) -> Any:
        add(*given, **named)
        return original(*given, **named)

    module.capture_routed_experts_if_allowed = capture_routed_experts_if_allowed  # type: ignore[attr-defined]


def hook_scheduler(module: ModuleType, recording: Recording) -> None:
    """Begins to record when SGLang's scheduler enters its loop. A SGLang without this method is left alone."""

    @recording.guarded
    def begin(scheduler: Any) -> None:
        recording.begin()

    warmup_end.install(module, warmup_end.SGLANG, begin)


def _capture(
    recording: Recording, layer: int, own: Callable[[torch.Tensor], None] | None
) -> Callable[[torch.Tensor], None]:
    def capture(topk_ids: torch.Tensor) -> None:
        recording.add(layer, topk_ids)
        if own is not None:
            own(topk_ids)

    return capture


def _is_first_rank() -> bool:
    import torch

    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
