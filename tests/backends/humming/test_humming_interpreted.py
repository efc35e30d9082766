"""Starts the process in which the kernels around Humming's run under Triton's interpreter."""

from pathlib import Path

from interpreted import INTERPRETED, run_interpreted

HERE = Path(__file__).parent


def test_the_kernels_compute_what_plain_torch_computes(tmp_path):
    assert not INTERPRETED
    run_interpreted(tmp_path, str(HERE / "test_humming_slots.py"))
