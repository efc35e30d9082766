import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from planted import PlantedBackend

from moetune.backends import registry
from moetune.cli.main import main
from moetune.tuning import final_comparison

CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "torch_dtype": "float32",
}


@pytest.fixture
def moetune() -> Callable[..., Result]:
    """Runs the command line in this process."""
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes the config.json of a tiny layer, some of its fields changed, and returns its path."""

    def write(**changed: object) -> Path:
        path = tmp_path / "tiny" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**CONFIG, **changed}))
        return path

    return write


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> PlantedBackend:
    """A backend `planted` with known times, in this process, and short finals."""
    backend = PlantedBackend(milliseconds={"default": 1.0, "fast": 0.1})
    real, tune_module = registry.backend, importlib.import_module("moetune.tuning.tune")
    monkeypatch.setattr(
        registry, "backend", lambda name, **options: backend if name == "planted" else real(name, **options)
    )
    monkeypatch.setattr(final_comparison, "SECONDS", 0.05)
    monkeypatch.setattr(tune_module, "tune", partial(tune_module.tune, isolate=False))
    return backend
