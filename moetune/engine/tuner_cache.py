"""The cache of FlashInfer's `AutoTuner`, one class for each form that it had, oldest first.

An entry maps a `ProfilingCacheKey` to a tactic and the optimization profile that it was timed with. Up to FlashInfer
0.6.18 all entries are in one dictionary. From 0.7.0 there is a dictionary for each managed store and measurement
policy, and each entry has a profiling policy that says how it was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashinfer.autotuner.autotuner import _tactic_to_json


@dataclass(frozen=True)
class PlainCache:
    """The cache of FlashInfer 0.6.18. `tuner` is its `AutoTuner`."""

    tuner: Any

    def place(self, key: Any, tactic: Any, profile: Any, config: Any) -> None:
        """Makes `tactic` the tuner's choice for `key`.

        Args:
            key: FlashInfer's `ProfilingCacheKey`.
            tactic: FlashInfer's tactic.
            profile: FlashInfer's optimization profile of the key's bucket.
            config: the `TuningConfig` of the call, as `effective_config` returns it.
        """
        self._entries()[key] = (tactic, profile)
        self.tuner._dirty = True
        self.tuner._dirty_seq += 1

    def entries_by_op(self) -> Counter[str]:
        """Returns the number of entries of each op."""
        return Counter(str(key.custom_op) for key in self._entries())

    def is_read_from_disk(self) -> bool:
        """Returns whether the tuner also finds entries in a file that it has loaded."""
        return bool(self.tuner._file_configs)

    def holds(self, key: Any, tactic: Any) -> bool:
        """Returns whether `tactic` is the tuner's choice for `key`."""
        entries = self._entries()
        return key in entries and bool(entries[key][0] == tactic)

    def effective_config(self, config: Any) -> Any:
        """Returns `config` as `AutoTuner.choose_one` applies it: with the overrides of this thread's contexts."""
        return self.tuner._apply_tuning_overrides(config) if self._is_overridden() else config

    def _entries(self) -> dict[Any, tuple[Any, Any]]:
        entries: dict[Any, tuple[Any, Any]] = self.tuner.profiling_cache
        return entries

    def _is_overridden(self) -> bool:
        return self.tuner._override_tuning_buckets is not None or bool(self.tuner._override_round_up)


class PolicyCache(PlainCache):
    """The cache of FlashInfer 0.7.0: profiling policies by key, and a managed store on disk."""

    def place(self, key: Any, tactic: Any, profile: Any, config: Any) -> None:
        """Makes `tactic` the tuner's choice for `key`, also in the managed store. See `PlainCache.place`."""
        super().place(key, tactic, profile, config)
        policy = self.tuner._profiling_policy(config)
        self.tuner._profiling_cache_policies[self._policy_key(key)] = policy
        store = self.tuner._active_managed_store
        if store is None:
            return
        # without this, a reload of the store would return the winner of FlashInfer's sweep
        fields = key.key_fields
        store.publish(
            key.file_key,
            key.runner_class_name,
            _tactic_to_json(tactic),
            key_fields=fields,
            **self._published_with(policy),
        )
        self.tuner._managed_decoded.pop((str(store.root), store.env_hash, fields), None)

    def is_read_from_disk(self) -> bool:
        """Returns whether the tuner also finds entries in a file that it has loaded, or in its managed store."""
        return super().is_read_from_disk() or self.tuner._active_managed_store is not None

    def effective_config(self, config: Any) -> Any:
        """Returns `config` with the overrides and the measurement policy of this thread's contexts."""
        overridden = super().effective_config(config)
        policy = self.tuner._effective_measure_policy
        return overridden if policy is None else self.tuner._apply_measure_policy(overridden, policy)

    def _entries(self) -> dict[Any, tuple[Any, Any]]:
        entries: dict[Any, tuple[Any, Any]] = self.tuner._winner_cache()
        return entries

    def _is_overridden(self) -> bool:
        replays = self.tuner._override_cuda_graph_profile_replays
        return replays is not None or super()._is_overridden()

    def _policy_key(self, key: Any) -> Any:
        return key

    def _published_with(self, policy: Any) -> Mapping[str, Any]:
        return {}


class PartitionedCache(PolicyCache):
    """The cache of FlashInfer 0.7.1 and later: profiling policies by partition and key, in the managed store too."""

    def _policy_key(self, key: Any) -> Any:
        return (self.tuner._winner_cache_identity(), key)

    def _published_with(self, policy: Any) -> Mapping[str, Any]:
        return {"profiling_policy": policy}


def cache_class(auto_tuner: type) -> type[PlainCache]:
    """Returns the class for the cache of this FlashInfer's `AutoTuner`, recognized by the methods that came with it."""
    if hasattr(auto_tuner, "_winner_cache_identity"):
        return PartitionedCache
    return PolicyCache if hasattr(auto_tuner, "_winner_cache") else PlainCache
