"""`TritonAnswers`: what moetune's store, or a tune at the engine's start, says of a Triton configuration."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from moetune.engine import start_tune
from moetune.engine.session import AskedShape, Config, Session
from moetune.engine.triton_engines import SGLANG, VLLM, Engine
from moetune.errors import MissError, MoetuneError, UnsupportedError
from moetune.tuning.refine import tuned_choice

if TYPE_CHECKING:
    from moetune.backends.grouped_triton.backend import TritonBackend
    from moetune.store.profile import Choice, Profile

T = TypeVar("T")
_UNKNOWN: Final[Any] = object()


class TritonAnswers:
    """The answers to one engine's look-ups, by shape.

    Args:
        session: the question, and the log.
        engine: the engine.
        original: the engine's own look-up.
        rank: as in `Question.of`.
        spelled: the value of `MOETUNE_REGIME`, for the command in the log.
        tune_s: how long the first look-up may tune what the store lacks; None not to tune.
    """

    def __init__(
        self,
        session: Session,
        engine: Engine,
        original: Callable[..., Any],
        rank: Any = None,
        spelled: str = "",
        tune_s: float | None = None,
    ) -> None:
        self.session, self.engine, self.original = session, engine, original
        self._rank, self._spelled, self._tune_s = rank, spelled, tune_s
        self._shapes: dict[Any, AskedShape] = {}
        self._overridden: Callable[[], object] = lambda: None
        self._failed = False

    def find(
        self,
        w1_shape: Sequence[int],
        w2_shape: Sequence[int],
        top_k: int,
        dtype: str | None,
        rows: int,
        block_shape: Sequence[int] | None,
    ) -> tuple[Config, AskedShape] | None:
        """Returns the configuration for a number of rows, and its shape; None if the engine's own look-up answers.

        It raises nothing. The first error is logged.

        Args:
            w1_shape: (E, 2 · N, K), the shape of the weights of the first GEMM.
            w2_shape: (E, K, N), that of the second.
            top_k: the number of ids in a row.
            dtype: one of `engine_files.DTYPES`.
            rows: M, the rows in the kernel.
            block_shape: the scale block, or None.
        """
        try:
            key = (w1_shape, w2_shape, top_k, dtype, None if block_shape is None else tuple(block_shape))
            shape = self._shapes.get(key)
            if shape is None:
                shape = self._shapes[key] = self._timed(self._looked_up, *key)
            config = shape.configs.get(rows, _UNKNOWN)
            if config is _UNKNOWN:
                shape.configs[rows] = None  # also if the next line raises
                config = shape.configs[rows] = self._timed(self._config, shape, rows, key)
            if config is None or self._overridden():
                shape.misses += 1
                shape.same += rows in shape.own_rows
                return None
            shape.hits += 1
            return config, shape
        except Exception as error:  # the engine must go on
            self._log_failure(error)
            return None

    def _timed(self, act: Callable[..., T], *given: Any) -> T:
        """Returns what `act` returns, and adds its time to the session's."""
        began = time.perf_counter()
        try:
            return act(*given)
        finally:
            self.session.spent_s += time.perf_counter() - began

    def _looked_up(self, w1: Any, w2: Any, top_k: int, dtype: str | None, block: tuple[int, ...] | None) -> AskedShape:
        """Returns a shape that is asked for the first time, and logs what answers it."""
        shape = AskedShape(f"Triton experts E={w2[0]}, N={w2[2]}")
        self.session.asked.append(shape)
        own = "the engine's own configuration runs"
        try:
            if self._is_other(w1, w2, top_k, dtype, block):
                self._log(f"{shape.name}: not {self.session.layer.name} under {self.session.regime.slug}, {own}")
                return shape
            if reason := self._obstacle():
                self._log(f"{shape.name}: {reason}, {own}")
                return shape
            package = sys.modules[self.original.__module__.rpartition(".")[0]]
            self._overridden = package.get_config
            profile, note = self._found(shape)
            if profile is None or not profile.choices:
                command = f"moetune tune {self._spelled} --backend triton{self._options()}"
                self._log(f"{shape.name}: no profile{note}, {own}; `{command}` makes one")
                return shape
            shape.largest_block_m = max(self._converted(choice)["BLOCK_SIZE_M"] for choice in profile.choices)
            shape.profile = profile
            buckets = f"{len(profile.choices)} bucket{'' if len(profile.choices) == 1 else 's'}"
            self._log(f"{shape.name}: profile of {profile.layer.name} under {profile.regime.slug}, {buckets}{note}")
        except Exception as error:  # the engine must go on
            self._log_failure(error)
        return shape

    def _is_other(self, w1: Any, w2: Any, top_k: int, dtype: str | None, block: tuple[int, ...] | None) -> bool:
        """Returns whether a shape is not that of the session's layer on one of the regime's ranks."""
        from moetune.backends.grouped_triton.engine_files import DTYPES
        from moetune.backends.grouped_triton.space import SCALE_BLOCK
        from moetune.spec.enums import Precision

        layer, regime = self.session.layer, self.session.regime
        width, depth = regime.intermediate_size(layer), layer.hidden_size
        scaled = (SCALE_BLOCK, SCALE_BLOCK) if layer.precision is Precision.FP8_BLOCK else None
        experts = {regime.shard(layer, rank).num_local for rank in (0, regime.ep_size - 1)}
        return (
            layer.precision not in DTYPES
            or w2[0] not in experts
            or tuple(w1) != (w2[0], 2 * width, depth)
            or tuple(w2) != (w2[0], depth, width)
            or (top_k, dtype, block) != (regime.row_top_k(layer), DTYPES[layer.precision], scaled)
        )

    def _obstacle(self) -> str | None:
        """Returns why the engine must run its own configuration, or moetune does not tune the layer."""
        if self.engine is VLLM:
            if self.original.__globals__["envs"].VLLM_BATCH_INVARIANT:
                return "VLLM_BATCH_INVARIANT is set"
        elif self.original.__globals__["get_exec"]().deterministic.enable_deterministic_inference:
            return "deterministic inference is on"
        reason = self._backend().unsupported(self.session.layer, self.session.regime)
        return None if reason is None else f"moetune's backend triton {reason}"

    def _backend(self) -> TritonBackend:
        """Returns the backend with moetune's own kernel that computes the layer as this engine does."""
        from moetune.backends.grouped_triton.backend import TritonBackend

        if self.engine is SGLANG:
            return TritonBackend(remote="zero")
        return TritonBackend().for_version(self._version(), self.session.layer, self.session.regime)

    def _version(self) -> str:
        """Returns the engine's installed version; if it has no metadata, the newest that was read."""
        from moetune.backends.grouped_triton.kernel_versions import NEWEST_READ

        try:
            return importlib.metadata.version(self.engine.name)
        except importlib.metadata.PackageNotFoundError:
            return NEWEST_READ[self.engine.name]

    def _backends(self) -> Iterator[TritonBackend]:
        """Yields the backends whose profiles answer, the best first: moetune's kernel, then the engine's own.

        Last come those that treat non-local slots in the other way.
        """
        from moetune.backends.grouped_triton.backend import TritonBackend

        builtin, own = self._backend(), TritonBackend(self.engine.name)
        yield builtin
        yield own
        for backend in (builtin, own):
            version = {"kernel_version": backend.version.since} if backend is builtin else {}
            yield TritonBackend(backend.kernel, "drop" if backend.remote == "zero" else "zero", **version)

    def _found(self, shape: AskedShape) -> start_tune.Found:
        """Returns the profile that answers a shape, or None, and what the log says of it. What is missing is tuned."""
        if self._tune_s is None:
            return self._profile() or (None, "")
        name = f"{self.engine.name}/{self.session.layer.digest}/{self.session.regime.digest}/{self._rank}"
        return start_tune.found(name, self._tune_s, self._profile, partial(self._tune, shape, self._tune_s))

    def _tune(self, shape: AskedShape, limit_s: float) -> str | None:
        import torch

        self._log(f"{shape.name}: tuning what the store lacks, at most {limit_s:g} s")
        device = f"cuda:{torch.cuda.current_device()}"
        layer, regime, store = self.session.layer, self.session.regime, str(self.session.store)
        return start_tune.tune_within(limit_s, layer, regime, self._backend(), store, device, self._rank)

    def _profile(self) -> tuple[Profile, str] | None:
        """Returns the stored profile and what the log says of its ladder and kernel; None if there is none."""
        from moetune.backends.grouped_triton.kernel_versions import unread
        from moetune.backends.grouped_triton.space import has_remote_slots
        from moetune.tuning.question import Question

        layer, regime = self.session.layer, self.session.regime
        wanted = self._backend()
        question = Question.of(layer, regime, wanted, self.session.store, rank=self._rank)
        strict = question.environment.strict
        machine = {name: strict[name] for name in strict.keys() - wanted.environment().keys()}
        for backend in self._backends():
            with suppress(MissError, UnsupportedError, ImportError):  # the engine's kernel may be one we cannot call
                environment = question.environment.model_copy(update={"strict": machine | backend.environment()})
                match = replace(question, backend=backend, environment=environment).match()
                differs = backend.remote != wanted.remote and has_remote_slots(layer, regime)
                note = f", measured on the ladder {match.measured_ladder}" if match.measured_ladder else ""
                note += f", measured with --remote {backend.remote}" if differs else ""
                if known := unread(self.engine.name, version := self._version()):
                    note += f". The kernel of {self.engine.name} {version} was not read, only that of {known}"
                return match.profile, note
        return None

    def _options(self) -> str:
        """Returns the options that make `moetune tune` measure this engine's kernel."""
        from moetune.backends.grouped_triton.kernel_versions import NEWEST

        backend = self._backend()
        if not backend.version.runs_like(NEWEST):
            return f" --backend-option kernel_version={backend.version.since}"
        return "" if backend.remote == NEWEST.remote else f" --remote {backend.remote}"

    def _config(self, shape: AskedShape, rows: int, key: tuple[Any, ...]) -> Config | None:
        """Returns the configuration for a number of rows; None for the engine's own.

        The engine's own runs if the bucket is not tuned, because another bucket's choice may be much slower there. It
        also runs if the choice is the default, and the engine's own configuration for the bucket is that default. It is
        another one if the profile was measured without the engine's tuned files, for instance.
        """
        profile = shape.profile
        choice = None if profile is None else tuned_choice(profile, rows)
        if choice is None:
            return None
        config = self._converted(choice)
        if choice.tactic != choice.default_tactic:
            return config
        w1, w2, top_k, dtype, block = key
        own = self.original(w1, w2, top_k, dtype, choice.rows, block_shape=None if block is None else list(block))
        if self._tunables(own) != config:
            return config
        shape.own_rows.add(rows)
        return None

    def _converted(self, choice: Choice) -> Config:
        from moetune.export.triton import engine_config
        from moetune.spec.enums import Precision

        blocks = self.session.layer.precision is Precision.FP8_BLOCK
        return dict(engine_config(choice.tactic, blocks, self.engine.name))

    def _tunables(self, own: Config) -> Config:
        """Returns an engine's configuration with all tunables and no others, BLOCK_SIZE_K as it runs."""
        from moetune.backends.grouped_triton.shipped import TRITONS_OWN
        from moetune.backends.grouped_triton.space import VALUES, effective_block_size_k
        from moetune.spec.enums import Precision

        full = {name: {**TRITONS_OWN, **own}[name] for name in VALUES}
        blocks = self.session.layer.precision is Precision.FP8_BLOCK
        return {**full, "BLOCK_SIZE_K": effective_block_size_k(full, blocks)}

    def _log(self, line: str) -> None:
        self.session.logger.info("moetune: %s", line)

    def _log_failure(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            kind = "" if isinstance(error, MoetuneError) else f"{type(error).__name__}: "
            self.session.logger.warning("moetune: Triton experts are left to the engine: %s%s", kind, error)
