"""The cache of the FlashInfer versions that are not installed; the other tests here use the installed one's."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest

from moetune.engine.tuner_cache import PartitionedCache, PlainCache, PolicyCache, cache_class


class Key(NamedTuple):
    file_key: str = "key"
    runner_class_name: str = "MoERunner"
    key_fields: tuple[str, ...] = ("op", "MoERunner")
    custom_op: str = "op"


POLICY, CONFIG, IDENTITY = "cold", "config", ("root", "hash")
ENTRY = ("key", "MoERunner", [16, 1], ("op", "MoERunner"))


class Tuner0618:
    """The attributes that hold the choices of 0.6.18's tuner. There are no others."""

    def __init__(self):
        self.profiling_cache = {}
        self._dirty, self._dirty_seq = False, 0
        self._override_tuning_buckets, self._override_round_up = None, False
        self._file_configs = {}

    def _apply_tuning_overrides(self, config):
        return f"overridden {config}"


class Tuner070(Tuner0618):
    """The same of 0.7.0's, inside `autotune_v2` with a managed store."""

    def __init__(self):
        super().__init__()
        self.partition, self.published = {}, []
        self._profiling_cache_policies = {}
        self._override_cuda_graph_profile_replays = None
        self._effective_measure_policy = None
        self._active_managed_store = SimpleNamespace(root="root", env_hash="hash", publish=self._publish)
        self._managed_decoded = {(*IDENTITY, Key().key_fields): "the winner of the sweep"}

    def _publish(self, file_key, runner, tactic, *, key_fields):
        self.published.append((file_key, runner, tactic, key_fields))

    def _winner_cache(self):
        return self.partition

    def _profiling_policy(self, config):
        return f"{POLICY} {config}"

    def _apply_measure_policy(self, config, policy):
        return f"{policy} {config}"


class Tuner071(Tuner070):
    """The same of 0.7.1's."""

    def _publish(self, file_key, runner, tactic, *, key_fields, profiling_policy):
        self.published.append((file_key, runner, tactic, key_fields, profiling_policy))

    def _winner_cache_identity(self):
        return IDENTITY


@pytest.mark.parametrize(
    ("tuner_class", "expected"), [(Tuner0618, PlainCache), (Tuner070, PolicyCache), (Tuner071, PartitionedCache)]
)
def test_a_placed_tactic_is_held_until_another_replaces_it(tuner_class, expected):
    tuner = tuner_class()
    cache = cache_class(tuner_class)(tuner)
    assert type(cache) is expected
    assert not cache.holds(Key(), (16, 1))
    cache.place(Key(), (16, 1), "profile", CONFIG)
    assert cache.holds(Key(), (16, 1))
    assert not cache.holds(Key(), (8, 0))
    assert (tuner._dirty, tuner._dirty_seq) == (True, 1)
    entries = tuner.profiling_cache if tuner_class is Tuner0618 else tuner.partition
    assert entries == {Key(): ((16, 1), "profile")}


@pytest.mark.parametrize(
    ("tuner_class", "policy_key", "entry"),
    [(Tuner070, Key(), ENTRY), (Tuner071, (IDENTITY, Key()), (*ENTRY, f"{POLICY} {CONFIG}"))],
)
def test_the_policy_and_the_managed_store_follow(tuner_class, policy_key, entry):
    tuner = tuner_class()
    cache_class(tuner_class)(tuner).place(Key(), (16, 1), "profile", CONFIG)
    assert tuner._profiling_cache_policies == {policy_key: f"{POLICY} {CONFIG}"}
    assert tuner.published == [entry]
    assert not tuner._managed_decoded, "or the old tactic would be served without reading the store"


@pytest.mark.parametrize("tuner_class", [Tuner0618, Tuner070, Tuner071])
def test_entries_are_counted_by_op(tuner_class):
    cache = cache_class(tuner_class)(tuner_class())
    assert not cache.entries_by_op()
    for key in (Key(), Key(file_key="second"), Key(custom_op="other")):
        cache.place(key, (16, 1), "profile", CONFIG)
    assert cache.entries_by_op() == {"op": 2, "other": 1}


@pytest.mark.parametrize("tuner_class", [Tuner0618, Tuner070, Tuner071])
def test_a_file_or_an_open_managed_store_is_read_from_disk(tuner_class):
    tuner = tuner_class()
    cache = cache_class(tuner_class)(tuner)
    assert cache.is_read_from_disk() == (tuner_class is not Tuner0618), "the planted ones have a managed store"
    tuner._active_managed_store = None
    assert not cache.is_read_from_disk()
    tuner._file_configs["key"] = ("MoERunner", [16, 1])
    assert cache.is_read_from_disk()


@pytest.mark.parametrize("tuner_class", [Tuner0618, Tuner070, Tuner071])
def test_the_overrides_of_a_context_are_applied(tuner_class):
    tuner = tuner_class()
    cache = cache_class(tuner_class)(tuner)
    assert cache.effective_config(CONFIG) == CONFIG
    tuner._override_round_up = True
    assert cache.effective_config(CONFIG) == "overridden config"
    tuner._override_round_up, tuner._override_tuning_buckets = False, (2, 6)
    assert cache.effective_config(CONFIG) == "overridden config"


@pytest.mark.parametrize("tuner_class", [Tuner070, Tuner071])
def test_replays_and_a_measurement_policy_are_applied(tuner_class):
    tuner = tuner_class()
    cache = cache_class(tuner_class)(tuner)
    tuner._override_cuda_graph_profile_replays = 3
    assert cache.effective_config(CONFIG) == "overridden config"
    tuner._effective_measure_policy = "eager"
    assert cache.effective_config(CONFIG) == "eager overridden config"
