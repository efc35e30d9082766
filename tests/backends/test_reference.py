"""The one fp32 reference, against a loop over slots, and the error against it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetune.backends.prepared import E4M3_MAX
from moetune.backends.reference import moe_reference, reference_activation, relative_error
from moetune.spec.layer import Activation


def test_the_relative_error_is_that_of_the_whole_tensor() -> None:
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(reference.bfloat16(), reference) == 0
    assert relative_error(reference * 1.5, reference) == pytest.approx(0.5)
    assert relative_error(reference + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reference) == pytest.approx(0.2)


def test_of_a_reference_of_zeros_it_is_what_should_not_be_there() -> None:
    nothing = torch.zeros(2, 2)
    assert relative_error(nothing, nothing) == 0
    assert relative_error(torch.full((2, 2), 2.0), nothing) == 4


def test_a_result_that_is_no_number_is_never_within_a_tolerance() -> None:
    assert not relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1e9


@given(st.integers(0, 2**32), st.floats(1e-3, 0.5))
def test_the_relative_error_is_that_of_the_frobenius_norms(seed: int, size: float) -> None:
    expected = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    assert relative_error(expected, expected) == 0
    assert relative_error((1 + size) * expected, expected) == pytest.approx(size, rel=1e-4)


def test_only_what_is_finite_in_the_reference_is_compared_if_so_wanted() -> None:
    reference = torch.tensor([3.0, float("inf"), 4.0])
    assert relative_error(torch.tensor([3.0, 0.0, 9.0]), reference, ignore_nonfinite=True) == pytest.approx(1.0)
    assert not relative_error(torch.tensor([float("nan"), 0.0, 4.0]), reference, ignore_nonfinite=True) <= 1e9


def test_large_values_do_not_overflow_the_error() -> None:
    reference = torch.full((8,), 1e30)
    assert relative_error(1.5 * reference, reference) == pytest.approx(0.5)


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_the_reference_is_the_sum_over_a_rows_local_slots(weight_on_input: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator)
    ids = torch.tensor([[0, 3], [-1, 2], [7, 9], [4, 3], [2, 2]])
    weights = torch.rand(5, 2, generator=generator)
    matrices = torch.randn(3, 4, 4, generator=generator)
    found = moe_reference(
        x, ids, weights, range(2, 5), lambda at, rows: (rows @ matrices[at]).square(), weight_on_input=weight_on_input
    )
    expected = torch.zeros(5, 4)
    for row in range(5):
        for column in range(2):
            if 2 <= ids[row, column] < 5:
                weight, matrix = weights[row, column], matrices[ids[row, column] - 2]
                entering, leaving = (weight, 1.0) if weight_on_input else (1.0, weight)
                expected[row] += leaving * (entering * x[row] @ matrix).square()
    assert torch.allclose(found, expected, rtol=1e-5)


def test_the_reference_is_computed_in_fp32_whatever_the_process_allows() -> None:
    seen: list[str] = []
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ids = torch.zeros(1, 1, dtype=torch.int32)

        def expert(index: int, rows: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return rows

        moe_reference(torch.ones(1, 2), ids, torch.ones(1, 1), range(1), expert)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert seen == ["highest"]


def test_e4m3s_limit_is_torchs_and_that_of_the_kernels() -> None:
    quantize = pytest.importorskip("moetune.backends.grouped_triton.quantize", reason="needs triton")
    assert torch.finfo(torch.float8_e4m3fn).max == E4M3_MAX == quantize.E4M3_MAX


def test_a_clamped_activation_bounds_the_gate_from_above_and_up_on_both_sides() -> None:
    gate, up = torch.tensor([2.0, -20.0, 20.0]), torch.tensor([3.0, 20.0, -20.0])
    silu = torch.nn.functional.silu
    assert torch.allclose(reference_activation(Activation.SILU, gate, up), silu(gate) * up)
    clamped = reference_activation(Activation.SWIGLU_CLAMPED, gate, up)
    assert torch.allclose(clamped[2], 7 * torch.tensor(1.702 * 7).sigmoid() * (-7 + 1))
    assert torch.allclose(reference_activation(Activation.SILU_CLAMPED, gate, up)[2], silu(torch.tensor(10.0)) * -10)
