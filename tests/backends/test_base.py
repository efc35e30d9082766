"""What all families of kernels share."""

import pytest
import torch

from moetune.backends.base import relative_error


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
