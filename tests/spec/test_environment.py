"""What must match for a profile to be served, and what may differ."""

import pytest

from moetune.errors import UsageError
from moetune.spec.environment import Environment

H200 = Environment(device="NVIDIA H200", strict={"torch": "2.13", "cuda": "13.0"}, informative={"driver": "580"})


def test_the_driver_may_differ():
    other = H200.model_copy(update={"informative": {"driver": "590", "host": "b"}})
    assert H200.differing(other) == {}
    assert other.digest == H200.digest


@pytest.mark.parametrize(
    ("update", "differing"),
    [
        ({"device": "NVIDIA B200"}, {"device": ("NVIDIA H200", "NVIDIA B200")}),
        ({"strict": {"torch": "2.12", "cuda": "13.0"}}, {"torch": ("2.13", "2.12")}),
        ({"strict": {"torch": "2.13"}}, {"cuda": ("13.0", None)}),
        ({"strict": {**H200.strict, "triton": "3.5"}}, {"triton": (None, "3.5")}),
    ],
)
def test_a_strict_difference_is_named_and_changes_the_digest(update, differing):
    other = H200.model_copy(update=update)
    assert H200.differing(other) == differing
    assert other.digest != H200.digest


def test_the_order_of_strict_fields_makes_no_difference():
    turned = H200.model_copy(update={"strict": {"cuda": "13.0", "torch": "2.13"}})
    assert turned.digest == H200.digest


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("AMD EPYC 9654 (96-Core)", "AMD_EPYC_9654_96_Core"),
        ("a/../b", "a_.._b"),
        ("///", "unknown"),
    ],
)
def test_a_device_is_one_folder_name(device, slug):
    assert Environment(device=device, strict={}).device_slug == slug


def test_json_gives_the_same_environment_back():
    assert Environment.model_validate_json(H200.model_dump_json()) == H200


def test_an_unknown_field_is_refused():
    with pytest.raises(UsageError, match="gpu"):
        Environment(device="x", strict={}, gpu="y")  # type: ignore[call-arg]
