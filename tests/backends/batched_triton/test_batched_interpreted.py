"""The kernel tests, in a process whose Triton interprets."""

import os
import sys
from pathlib import Path

import pytest
from interpreted import run_interpreted

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_batched_kernel_is_right_under_tritons_interpreter(tmp_path):
    run_interpreted(tmp_path, str(HERE / "test_batched_runner.py"))


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_the_batched_kernel_computes_like_vllms_own(version, vllm_version_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(vllm_version_sources(version)), *sys.path]))
    run_interpreted(tmp_path, str(HERE / "test_batched_vllm.py"))
