"""Runs the kernels around Humming's under Triton's interpreter; see tests/interpreted.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import INTERPRETED, replace_parts_of_the_interpreter, skip_in_one_process

HERE = Path(__file__).parent
RUN_KERNELS = {"test_humming_slots.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels run in the interpreter's own process (see test_humming_interpreted.py)."""
    skip_in_one_process(items, HERE, RUN_KERNELS)


if INTERPRETED:
    replace_parts_of_the_interpreter()
