"""Times `pack_topk` (fused) and its definition (eager), and compares their results bit by bit.

    python benchmarks/pack_topk.py [--device cuda]

Exits 1 if the two, or the definition in plain Python, differ in a bit.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import sys
from collections.abc import Callable

import torch
from common import wall_us

from moetune.measure.clock import TimedCall
from moetune.workload import packing

Pack = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ROUNDS = 200
TOP_K = 8


def definition(expert: int, weight_bits: int) -> int:
    """Returns `(id << 16) | bf16 bits` as a signed 32-bit int."""
    return int(struct.unpack("<i", struct.pack("<I", ((expert & 0xFFFF) << 16) | weight_bits))[0])


def every_bf16(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all 65536 bit patterns of bf16, NaN payloads and negatives included, with ids from −1 up."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    ids = torch.arange(65536, dtype=torch.int32) % 512 - 1
    return ids.view(-1, TOP_K).to(device), bits.view(torch.bfloat16).view(-1, TOP_K).to(device)


def matches_definition(device: str) -> bool:
    ids, weights = every_bf16(device)
    packed = packing.pack_topk(ids, weights).flatten().tolist()
    exact = packed == [definition(i % 512 - 1, i) for i in range(65536)]
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32).to(device)
    quiet = packing.pack_topk(torch.full((3,), -1, dtype=torch.int32, device=device), nans)
    return exact and quiet.tolist() == [definition(-1, 0x7FC0)] * 3


def waited(pack: Pack, ids: torch.Tensor, weights: torch.Tensor) -> TimedCall:
    """Returns a call that packs and waits for the device."""

    def call(draw: int) -> torch.Tensor:
        packed = pack(ids, weights)
        if packed.is_cuda:
            torch.cuda.synchronize()
        return packed

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    generator = torch.Generator().manual_seed(0)
    equal = matches_definition(device)
    print(f"device {device}, top_k {TOP_K}; medians of {ROUNDS} interleaved rounds, µs (interquartile range)")
    for rows in (16, 256, 4096, 65536):
        ids = torch.randint(-1, 256, (rows, TOP_K), dtype=torch.int32, generator=generator).to(device)
        for dtype in packing.WEIGHT_DTYPES:
            weights = torch.randn(rows, TOP_K, generator=generator).to(device, dtype)
            packs: dict[str, Pack] = {"eager": packing.pack_eager, "fused": packing.pack_topk}
            eager, fused = (pack(ids, weights) for pack in packs.values())
            equal &= torch.equal(eager, fused)
            calls = {name: waited(pack, ids, weights) for name, pack in packs.items()}
            times = dict(zip(calls, wall_us(list(calls.values()), range(ROUNDS)), strict=True))
            cells = []
            for name, values in times.items():
                low, _, high = statistics.quantiles(values, n=4)
                cells.append(f"{name} {statistics.median(values):8.1f} ({high - low:.1f})")
            ratio = statistics.median(times["eager"]) / statistics.median(times["fused"])
            print(f"{rows:6d} rows  {str(dtype).removeprefix('torch.'):9s}  {'  '.join(cells)}  {ratio:.2f}x")
    failure = packing.compile_failure()
    print("fused by torch.compile" if failure is None else f"eager fallback, torch.compile failed: {failure}")
    print("bit for bit equal to the definition" if equal else "DIFFERS from the definition")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
