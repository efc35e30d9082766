"""Runs the kernels under Triton's interpreter; see tests/interpreted.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interpreted import INTERPRETED, replace_parts_of_the_interpreter, skip_in_one_process

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

HERE = Path(__file__).parent
RUN_KERNELS = {"test_batched_runner.py", "test_batched_vllm.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels run in the interpreter's own process (see test_batched_interpreted.py)."""
    skip_in_one_process(items, HERE, RUN_KERNELS)


if INTERPRETED:
    replace_parts_of_the_interpreter()
