"""The kernel tests, in a process whose Triton interprets: it decides that once, when it is imported."""

import os
import sys
from pathlib import Path

import pytest
from interpreted import run_interpreted

HERE = Path(__file__).parent


@pytest.mark.slow
def test_kernels_are_right_under_tritons_interpreter(tmp_path):
    run_interpreted(tmp_path, *(str(HERE / name) for name in ("test_align.py", "test_kernels.py", "test_runner.py")))


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.20.2", "0.26.0", "0.33.0"])
def test_the_builtin_kernel_computes_like_each_version_of_vllms(version, vllm_version_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(vllm_version_sources(version)), *sys.path]))
    monkeypatch.setenv("MOETUNE_TEST_VLLM", version)
    run_interpreted(tmp_path, str(HERE / "test_version_forwards.py"))


def test_an_engines_own_kernel_is_right_under_tritons_interpreter(engine, tmp_path):
    run_interpreted(tmp_path, str(HERE / "test_engine_forwards.py"), "-k", engine)
