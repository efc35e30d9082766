from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

import wheels
from optional_packages import pytest_pycollect_makemodule  # noqa: F401  a hook

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Undoes that signals are ignored: SIGINT by a shell that runs the tests in the background, SIGHUP by nohup."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what reads engine sources as `network`; skips what needs a GPU if there is none.

    Coverage is not measured in property tests: Python's tracing makes them several times as slow, and the tests of
    single cases beside them run the same lines.
    """
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.no_cover)
        if "engine_sources" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.network)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_ambient_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist sets it in its workers
    monkeypatch.setenv("MOETUNE_STORE", str(tmp_path / "default-store"))
    monkeypatch.setenv("MOETUNE_PACKAGED_PROFILES", "0")


@pytest.fixture(autouse=True)
def _real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes `planted_time.install` after each test."""
    from moetune.measure import bench, clock

    monkeypatch.setattr(bench, "clock_for", clock.clock_for)


@pytest.fixture(scope="session")
def engine_sources(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from an engine's name to a folder that contains its package.

    It skips the test if the engine is not installed, unless `-m network` allows a download.
    """
    download = cache(lambda engine: wheels.download(engine, tmp_path_factory.mktemp("engines") / engine))

    def sources(engine: str) -> Path:
        if local := wheels.local_sources(engine):
            return local
        if pytestconfig.getoption("markexpr") != "network":
            pytest.skip(f"{engine} is not installed, and only `pytest -m network` downloads it")
        return download(engine)

    return sources


@pytest.fixture(scope="session")
def vllm_version_sources(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Returns a function from a pinned version of vLLM to a folder with its package; only `-m network` downloads it."""

    @cache
    def sources(version: str) -> Path:
        if pytestconfig.getoption("markexpr") != "network":
            pytest.skip(f"only `pytest -m network` downloads vLLM {version}")
        wheel = wheels.OLDER_VLLM.get(version, wheels.WHEELS["vllm"])
        assert wheel.version == version
        return wheels.download("vllm", tmp_path_factory.mktemp("versions") / version, wheel)

    return sources


@pytest.fixture(scope="session")
def flashinfer_version_sources(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Returns a function from a pinned FlashInfer to a folder with its package; only `-m network` downloads it."""

    @cache
    def sources(version: str) -> Path:
        if pytestconfig.getoption("markexpr") != "network":
            pytest.skip(f"only `pytest -m network` downloads FlashInfer {version}")
        folder = tmp_path_factory.mktemp("flashinfer") / version
        return wheels.download("flashinfer", folder, wheels.FLASHINFER[version])

    return sources
