import pytest
from triton_profiles import profile

from moetune.export.triton import TritonProfile
from moetune.spec.layer import MoELayer
from moetune.workload.routing import realize

LAYER = MoELayer(num_experts=16, top_k=4, hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize(
    "regime",
    [
        {"ep_size": 1},
        {"ep_size": 4},
        {"ep_size": 4, "dispatch": "allgather"},
        {"ep_size": 4, "layout": "packed"},
        {"ep_size": 8, "layout": "packed"},
        {"ep_size": 4, "layout": "deduplicated"},
        {"ep_size": 4, "layout": "pool"},
        {"ep_size": 4, "layout": "slot"},
        {"ep_size": 1, "redundant_experts": 4},
    ],
    ids=str,
)
def test_remote_slots_are_where_the_workload_has_them(regime):
    stored = profile(LAYER, ladder="64", tune_max_num_tokens=64, **regime)
    shard = stored.regime.shard(LAYER)
    ids = realize(LAYER, stored.regime, rows=64).topk_ids
    remote = (ids < shard.first) | (ids >= shard.first + shard.num_local)
    assert TritonProfile.of(stored, "vllm").has_remote_slots is bool(remote.any())
