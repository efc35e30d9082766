"""Skips test modules that import a package which moetune does not require, where that package is not installed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pytest

OPTIONAL: Final = frozenset({"flashinfer", "triton", "vllm"})


class _Module(pytest.Module):
    """A test module. It is skipped with the reason if an optional package that it imports is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            # the name of a part of an installed package would have a dot: that is an error
            if isinstance(cause, ModuleNotFoundError) and cause.name in OPTIONAL:
                pytest.skip(f"{self.path.name}: {cause.name} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Is a hook of pytest."""
    return _Module.from_parent(parent, path=module_path)
