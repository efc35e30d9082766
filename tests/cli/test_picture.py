import importlib.util
import json
from pathlib import Path

import pytest
from choices import make_choice

from moetune.inputs.presets import layer
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

SOURCE = Path(__file__).parents[2] / "benchmarks" / "picture.py"


@pytest.fixture(scope="module")
def picture():
    spec = importlib.util.spec_from_file_location("picture", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _profile(regime, precision=None, choices=()):
    environment = Environment(device="Example GPU", strict={})
    return Profile(
        layer=layer("deepseek-r1", precision), regime=regime, backend="torch", environment=environment, choices=choices
    )


@pytest.mark.parametrize(
    ("regime", "precision"),
    [
        (Regime(), None),
        (Regime(ep_size=8, attention_dp=True, tune_max_num_tokens=128), "bf16"),
        (Regime(ep_size=4, tp_size=2, dispatch="allgather", distribution="balanced", ladder="8,16"), None),
        (
            Regime(ep_size=4, dispatch="alltoall", layout="pool", redundant_experts=4, seed=3, draws=2, ladder="vllm"),
            None,
        ),
    ],
)
def test_the_command_in_the_picture_asks_the_profiles_question(moetune, picture, regime, precision):
    words = picture.command(_profile(regime, precision)).split()
    assert words[:2] == ["moetune", "tune"]
    document = json.loads(moetune("plan", *words[2:], "--json").stdout)
    assert Regime(**document["regime"]) == regime
    assert document["layer"]["precision"] == layer("deepseek-r1", precision).precision


def test_the_picture_shows_the_choices(picture):
    choice = make_choice(
        8,
        tactic={"algorithm": "grouped_mm"},
        default_tactic={"algorithm": "eager"},
        gain=1.5,
        gain_low=1.4,
        gain_high=1.6,
    )
    drawn = picture.picture(_profile(Regime(ladder="8"), choices=(choice,)))
    assert drawn.startswith("<svg")
    assert "grouped_mm" in drawn
    assert "1.50×" in drawn
