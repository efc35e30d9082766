import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_ambient_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION", raising=False)
    monkeypatch.setenv("MOETUNE_STORE", str(tmp_path / "default-store"))
    monkeypatch.setenv("MOETUNE_PACKAGED_PROFILES", "0")
