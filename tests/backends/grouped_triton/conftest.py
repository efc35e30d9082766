"""Runs the kernels under Triton's interpreter; see tests/interpreted.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from interpreted import INTERPRETED, replace_parts_of_the_interpreter, skip_in_one_process
from wheels import VARIABLE

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

HERE = Path(__file__).parent
RUN_KERNELS = {
    "test_align.py",
    "test_kernels.py",
    "test_runner.py",
    "test_engine_forwards.py",
    "test_version_forwards.py",
}


@pytest.fixture(params=["vllm", "sglang"])
def engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, engine_sources: Callable[[str], Path]
) -> str:
    """Returns the name of an engine whose sources can be imported."""
    name: str = request.param
    sources = engine_sources(name)
    monkeypatch.syspath_prepend(str(sources))
    monkeypatch.setenv(VARIABLE, str(sources))
    return name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels run in the interpreter's own process (see test_interpreted.py), tests marked gpu on a GPU only."""
    skip_in_one_process(items, HERE, RUN_KERNELS)


if INTERPRETED:
    replace_parts_of_the_interpreter()
