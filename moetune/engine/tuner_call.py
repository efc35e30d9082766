"""`TunerCall`: one call of FlashInfer's `AutoTuner.choose_one`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(eq=False)
class TunerCall:
    """The arguments of one call of `AutoTuner.choose_one`, and what FlashInfer's tuner derives from them.

    Attributes:
        tuner: moetune's subclass of `AutoTuner`.
        op: the tuner's name of the op.
        runner: FlashInfer's runner, which computes the op with a given tactic.
        config: FlashInfer's `TuningConfig`.
        inputs: the tensors of the call; None where the op has none.
        arguments: the keyword arguments of the runner.
    """

    tuner: Any
    op: str
    runner: Any
    config: Any
    inputs: Sequence[Any]
    arguments: Mapping[str, Any]

    @cached_property
    def effective_config(self) -> Any:
        """The tuning configuration with the overrides of this thread's contexts."""
        return self.tuner.choices.effective_config(self.config)

    @cached_property
    def identity(self) -> Any:
        """FlashInfer's key of this call without the rows. It is equal for all buckets of the op."""
        shapes = [list(shape) for shape in self.tuner._get_input_sizes(self.inputs)]
        for spec in self.effective_config.dynamic_tensor_specs:
            for at, dim in zip(spec.input_idx, spec.dim_idx, strict=True):
                shapes[at][dim] = 0
        for spec in self.effective_config.constraint_specs:
            shapes[spec.input_idx][spec.dim_idx] = -1
        extras = self.runner.get_cache_key_extras(self.inputs)
        return (self.op, type(self.runner).__name__, tuple(map(tuple, shapes)), extras)

    @cached_property
    def signature(self) -> Any:
        """It is equal for two calls if FlashInfer's keys of all their buckets are equal. It is found without a key."""
        (spec,) = self.effective_config.dynamic_tensor_specs
        buckets = spec.gen_tuning_buckets
        if callable(buckets):
            buckets = buckets(self.rows_of(self.inputs))
        return (self.identity, hash(self.runner), tuple(buckets))

    @cached_property
    def profiles(self) -> dict[int, Any]:
        """FlashInfer's optimization profile of each bucket, by rows."""
        (spec,) = self.effective_config.dynamic_tensor_specs
        at, dim = spec.input_idx[0], spec.dim_idx[0]
        made = self.tuner._generate_optimization_profiles(self.effective_config, self.inputs)
        return {profile.get_opt_shapes()[at][dim]: profile for profile in made}

    def rows_of(self, inputs: Sequence[Any]) -> int:
        """Returns the number of rows of these inputs."""
        spec = self.effective_config.dynamic_tensor_specs[0]
        return int(inputs[spec.input_idx[0]].shape[spec.dim_idx[0]])

    @cached_property
    def keys(self) -> dict[int, Any]:
        """FlashInfer's `ProfilingCacheKey` of each bucket, by rows."""
        extras = self.runner.get_cache_key_extras(self.inputs)
        return {
            rows: self.tuner._get_cache_key(
                self.op, self.runner, profile.get_opt_shapes(), self.effective_config, extras
            )
            for rows, profile in self.profiles.items()
        }

    def device(self) -> str:
        """Returns the torch device of the inputs."""
        return next(str(tensor.device) for tensor in self.inputs if hasattr(tensor, "device"))

    def run(self, draws: Sequence[Sequence[Any]], tactic: Any, draw: int) -> object:
        """Runs the op on the inputs of one draw and returns its output."""
        return self.runner(list(draws[draw]), tactic=tactic, **self.arguments)
