"""The least time of a bucket on its device: the larger of weight bytes over bandwidth and FLOP over peak rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moetune.errors import UsageError
from moetune.store.profile import Profile
from moetune.tuning.plan import INPUT_BITS, bucket_load

MOST_SLOTS: Final = 1 << 24
MOST_EXPERTS: Final = 1_024
MOST_BUCKETS: Final = 512
"""Above these the load is not computed: a profile from elsewhere could ask for minutes and gigabytes."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak rates of one device, dense (without structured sparsity).

    Attributes:
        device: the name that the driver gives.
        bandwidth: bytes per second of its memory.
        flops: FLOP per second of its tensor cores, by the bits of a GEMM's input.
        source: where the figures are from.
    """

    device: str
    bandwidth: float
    flops: dict[int, float]
    source: str


_HOPPER = {32: 494.7e12, 16: 989.4e12, 8: 1978.9e12}
_SHEET = "data sheet of NVIDIA {}, half of its figures with sparsity"
PEAKS: Final = {
    peak.device: peak
    for peak in (
        Peak("NVIDIA A100-SXM4-80GB", 2.039e12, {32: 156e12, 16: 312e12, 8: 624e12}, "data sheet of NVIDIA A100"),
        Peak(
            "NVIDIA H100 PCIe", 2.0e12, {32: 378e12, 16: 756e12, 8: 1513e12}, _SHEET.format("H100 (2022, PCIe column)")
        ),
        Peak("NVIDIA H100 80GB HBM3", 3.35e12, _HOPPER, _SHEET.format("H100 (SXM column)")),
        Peak("NVIDIA H200", 4.8e12, _HOPPER, _SHEET.format("H200 (SXM column)")),
        Peak(
            "NVIDIA B200",
            8.0e12,
            {32: 1100e12, 16: 2250e12, 8: 4500e12, 4: 9000e12},
            _SHEET.format("HGX B200 (one GPU)"),
        ),
        Peak(
            "NVIDIA GB200",
            8.0e12,
            {32: 1250e12, 16: 2500e12, 8: 5000e12, 4: 10000e12},
            _SHEET.format("GB200 NVL72 (one GPU)"),
        ),
    )
}
"""The devices whose peak rates are known, by name."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one bucket and its least time. `least_us` is None if the device's peaks are not known.

    Attributes:
        weight_bytes: the weights of the experts that have a slot, on average over draws.
        flops: the operations of both GEMMs.
        least_us: max(weight_bytes / bandwidth, flops / peak rate), in µs.
    """

    weight_bytes: int
    flops: int
    least_us: float | None


def peak_rate(profile: Profile) -> tuple[Peak, float] | None:
    """Returns the peaks of a profile's device and the rate for its precision, or None if they are not known."""
    peak = PEAKS.get(profile.environment.device)
    if peak is None:
        return None
    bits = next(size for size in (4, 8, 16, 32) if INPUT_BITS[profile.layer.precision] < 2 * size)
    rate = peak.flops.get(bits)
    return None if rate is None else (peak, rate)


def work_by_bucket(profile: Profile) -> dict[int, Work]:
    """Returns the work and the least time of each bucket, by rows; without the buckets that are too large to compute.

    It is empty if all are, or if the regime does not fit the layer.
    """
    layer, regime = profile.layer, profile.regime
    if layer.num_experts + regime.redundant_experts > MOST_EXPERTS or len(profile.choices) > MOST_BUCKETS:
        return {}
    rates = peak_rate(profile)
    found = {}
    for rows in (choice.rows for choice in profile.choices if choice.rows * layer.top_k <= MOST_SLOTS):
        try:
            load = bucket_load(layer, regime, rows)
        except UsageError:
            return {}
        least = None
        if rates is not None:
            least = 1e6 * max(load.weight_bytes / rates[0].bandwidth, load.flops / rates[1])
        found[rows] = Work(load.weight_bytes, load.flops, least)
    return found


def roofline_line(profile: Profile, work: Mapping[int, Work]) -> str:
    """Returns what the roofline is computed from, or why there is none.

    Args:
        profile: the profile.
        work: its `work_by_bucket`.
    """
    precision = profile.layer.precision.value
    if (rates := peak_rate(profile)) is None:
        missing = "are" if profile.environment.device not in PEAKS else f"for {precision} are"
        return f"no roofline: the peak rates of {profile.environment.device} {missing} not in moetune's table"
    if not work:
        return "no roofline: the load cannot be computed, or is too large to compute"
    peak, rate = rates
    return (
        f"roofline: the weights of the active experts at {peak.bandwidth / 1e12:g} TB/s, or the FLOP of both GEMMs at "
        f"{rate / 1e12:,.4g} TFLOP/s ({precision}), whichever takes longer ({peak.source})"
    )
