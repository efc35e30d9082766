import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.workload import packing
from moetune.workload.fused import Fused
from moetune.workload.packing import pack_eager, pack_topk, unpack_topk


def packed_word(expert: int, weight_bits: int) -> int:
    return struct.unpack("<i", struct.pack("<I", ((expert & 0xFFFF) << 16) | weight_bits))[0]


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [pack_topk, pack_eager])
def test_every_bf16_weight_is_packed_bit_for_bit(pack):
    """NaN payloads, negative weights, −1 ids and both zeros are among them."""
    ids = torch.arange(65536, dtype=torch.int32) % 513 - 1
    packed = pack(ids.view(-1, 8), every_bf16().view(-1, 8))
    assert packed.dtype == torch.int32
    assert packed.shape == (8192, 8)
    assert packed.flatten().tolist() == [packed_word(i % 513 - 1, i) for i in range(65536)]


@pytest.mark.no_cover
def test_unpacking_gives_back_ids_and_bits():
    ids = (torch.arange(65536, dtype=torch.int32) % 513 - 1).view(-1, 4)
    got_ids, got_weights = unpack_topk(pack_topk(ids, every_bf16().view(-1, 4)))
    assert (got_ids.dtype, got_weights.dtype) == (torch.int32, torch.bfloat16)
    assert torch.equal(got_ids, ids)
    assert torch.equal(got_weights.view(torch.int16), every_bf16().view(-1, 4).view(torch.int16))


@pytest.mark.no_cover
@pytest.mark.parametrize("pack", [pack_topk, pack_eager])
def test_a_nan_from_f32_or_f16_becomes_the_quiet_one(pack):
    ids = torch.tensor([3, -1, 7, 0], dtype=torch.int32)
    expected = [packed_word(i, 0x7FC0) for i in (3, -1, 7)] + [packed_word(0, 0xBF80)]
    singles = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x40800000], dtype=torch.int32).view(torch.float32)
    assert pack(ids, singles).tolist() == expected
    halves = torch.tensor([0x7C01, 0x7FFF, -1, -0x4400], dtype=torch.int16).view(torch.float16)
    assert pack(ids, halves).tolist() == expected


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-1, 32767), st.floats(width=32)), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_fused_equals_eager_and_rounds_to_nearest_even(slots, weight_dtype, id_dtype):
    ids = torch.tensor([expert for expert, _ in slots], dtype=id_dtype)
    weights = torch.tensor([weight for _, weight in slots], dtype=torch.float32).to(weight_dtype)
    packed = pack_topk(ids, weights)
    assert torch.equal(packed, pack_eager(ids, weights))
    for word, expert, weight in zip(packed.tolist(), ids.tolist(), weights.float(), strict=True):
        bits = int(weight.view(torch.int32)) & 0xFFFFFFFF
        rounded = 0x7FC0 if weight.isnan() else ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) & 0xFFFF
        assert word == packed_word(expert, rounded)


@pytest.mark.no_cover
def test_empty_single_and_strided_inputs():
    assert pack_topk(torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 8)).shape == (0, 8)
    assert pack_topk(torch.tensor([[5]]), torch.tensor([[-1.0]])).tolist() == [[packed_word(5, 0xBF80)]]
    ids, weights = torch.arange(12, dtype=torch.int32).view(3, 4).T, torch.rand(3, 4).T
    assert torch.equal(pack_topk(ids, weights), pack_eager(ids, weights))


def test_where_no_compiler_is_it_packs_eagerly_and_tries_once(monkeypatch):
    attempts = []

    def broken_compile(function, **options):
        def fail(*tensors):
            attempts.append(options)
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken_compile)
    monkeypatch.setattr(packing, "_fused", Fused(pack_eager))
    ids, weights = torch.tensor([[1, -1]], dtype=torch.int32), torch.tensor([[-0.5, 0.25]])
    for _ in range(3):
        assert torch.equal(pack_topk(ids, weights), pack_eager(ids, weights))
    assert attempts == [{"dynamic": True}]
    assert "no C++ compiler" in str(packing.compile_failure())


def test_wrong_dtypes_and_shapes_are_usage_errors():
    ids, weights = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3)
    with pytest.raises(UsageError, match="one shape"):
        pack_topk(ids, weights[:1])
    with pytest.raises(UsageError, match="float64"):
        pack_topk(ids, weights.double())
    with pytest.raises(UsageError, match="int16"):
        pack_topk(ids.short(), weights)
    with pytest.raises(UsageError, match="int64"):
        unpack_topk(ids.long())
