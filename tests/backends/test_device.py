import pytest
import torch

from moetune.backends.device import Device, without_device


@pytest.fixture
def capability(monkeypatch):
    def plant(found):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)

    return plant


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "needs a CUDA device, and torch sees none"),
        ((8, 9), "needs Hopper; the device has 8.9"),
        ((10, 0), "needs Hopper; the device has 10.0"),
    ],
)
def test_a_missing_and_an_unfit_device_are_named(capability, found, reason):
    capability(found)
    assert without_device(lambda of_device: of_device == (9, 0), "needs Hopper", "Use another.")[0] == reason


def test_nothing_is_said_of_a_device_that_fits(capability):
    capability((9, 0))
    assert without_device(lambda of_device: of_device == (9, 0), "needs Hopper", "Use another.") is None


def test_tactics_are_listed_for_an_h100_where_there_is_no_gpu():
    assert Device.of("cpu") == Device(232_448, 65_536, 132)
