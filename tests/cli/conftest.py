import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moetune.cli.main import main

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
