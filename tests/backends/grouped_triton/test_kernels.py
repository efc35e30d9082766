"""The kernels around the GEMMs, under Triton's interpreter."""

import pytest
import torch
from torch.nn.functional import gelu as gelu_of
from torch.nn.functional import silu

from moetune.backends.grouped_triton.activation import activate_and_multiply, sum_slots
from moetune.backends.grouped_triton.quantize import (
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
    quantize_rows_reference,
    quantize_weight,
)


@pytest.mark.parametrize(("rows", "width"), [(1, 128), (3, 384), (17, 256)])
def test_quantized_rows_are_torchs_to_the_bit(rows, width):
    x = torch.randn(rows, width).bfloat16()
    x[0, :128] = 0
    quantized, scales = torch.empty(rows, width, dtype=torch.float8_e4m3fn), torch.empty(rows, width // 128)
    quantize_rows(x, quantized, scales)
    expected, expected_scales = quantize_rows_reference(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))


def test_the_largest_value_of_a_group_becomes_448():
    quantized, scales = quantize_rows_reference(torch.full((1, 128), -3.0).bfloat16())
    assert quantized.float().unique().tolist() == [-448.0]
    assert dequantize_rows(quantized, scales)[0, 0].item() == pytest.approx(-3.0)


def test_a_dequantized_weight_is_within_e4m3s_half_step():
    w = torch.randn(256, 384)
    error = (dequantize_weight(*quantize_weight(w)) - w).abs()
    scales = quantize_weight(w)[1].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert bool((error <= torch.maximum(w.abs() * 2**-4, scales * 2**-10) * 1.001).all())


@pytest.mark.parametrize("gelu", [False, True])
def test_gate_comes_first_and_is_activated(gelu):
    gate_up, out = torch.randn(5, 2 * 1100).bfloat16(), torch.empty(5, 1100, dtype=torch.bfloat16)
    activate_and_multiply(gate_up, out, gelu=gelu)
    gate, up = gate_up.float().chunk(2, dim=-1)
    expected = (gelu_of(gate, approximate="tanh") if gelu else silu(gate)) * up
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_slots_are_summed_in_fp32(top_k):
    products, out = torch.randn(4, top_k, 1100).bfloat16(), torch.empty(4, 1100, dtype=torch.bfloat16)
    sum_slots(products, out)
    torch.testing.assert_close(out, products.float().sum(1).bfloat16(), rtol=2**-7, atol=1e-6)
