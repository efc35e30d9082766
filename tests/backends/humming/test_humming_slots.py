"""The kernels that sort slots by expert and sum an expert's products. Runs under Triton's interpreter."""

import pytest
import torch
from four_bit_layers import REGIMES, tiny
from planted_ops import Sorter

from moetune.backends.humming.slots import SlotSorter, combine
from moetune.backends.reference import relative_error
from moetune.workload.routing import realize


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("name", ["none", "EP", "deduplicated", "L < k"])
def test_slots_are_sorted_by_expert(name, rows):
    regime = REGIMES[name]
    shard = regime.shard(tiny("mxint4"), regime.ep_size - 1)
    ids = realize(tiny("mxint4"), regime, rows, shard.rank).topk_ids.int().contiguous()
    sorter, planted = SlotSorter(rows, ids.shape[1], shard, "cpu"), Sorter(shard, [])
    expected, found = planted.grouped(ids), sorter.grouped(ids)
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert torch.equal(found.places, expected.places)
    for block_m in (8, 24):
        aligned, blocks = planted.indexed(ids, block_m), sorter.indexed(ids, block_m)
        count = int(blocks.num_padded)
        assert torch.equal(blocks.slots[:count], aligned.slots)
        assert torch.equal(blocks.experts[: count // block_m], aligned.experts)


def test_products_are_summed_with_their_weights_and_others_are_not_read():
    products = torch.full((40, 300), torch.nan)
    products[:30] = torch.randn(30, 300)
    places = torch.randint(-1, 30, (17, 3), dtype=torch.int32)
    places[5] = -1
    weights, out = torch.rand(17, 3), torch.empty(17, 300)
    combine(products, places, weights, out)
    found = products[places.long().clamp(min=0)] * weights.unsqueeze(-1)
    expected = torch.where((places >= 0).unsqueeze(-1), found, 0.0).sum(1)
    assert relative_error(out, expected) < 1e-6
    assert not out[5].any()
