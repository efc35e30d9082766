"""What reading a large recording needs: memory for its ids, and no more than that twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import GIVE_UP_S

CODE = """
import resource, sys, torch
from moetune.errors import UsageError
from moetune.recordings.reading import read_recording
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try:
    read_recording(sys.argv[1])
    print("read")
except UsageError as error:
    print(error)
print(peak() - before)
"""


def _read(path: object) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, timeout=GIVE_UP_S)
    assert done.returncode == 0, done.stderr
    said, grown = done.stdout.splitlines()
    return said, int(grown)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_large_file_of_zeros_costs_no_more_than_its_ids(suffix, tmp_path):
    import numpy

    path, ids = tmp_path / f"a.{suffix}", numpy.zeros((2**22, 8), numpy.int8)
    numpy.save(path, ids) if suffix == "npy" else numpy.savez_compressed(path, topk_ids=ids)
    said, grown = _read(path)
    assert "has no routed token" in said
    assert grown < 200_000_000, f"{grown / 1e6:.0f} MB for {ids.size * 4 / 1e6:.0f} MB of ids"
