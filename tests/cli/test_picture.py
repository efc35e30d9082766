import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from choices import make_choice
from processes import GIVE_UP_S

from moetune.inputs.presets import layer
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "benchmarks" / "picture.py"


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


@pytest.mark.parametrize("dispatch", ["vllm:allgather_reducescatter", "vllm:deepep_high_throughput"])
def test_the_command_names_the_dispatcher_that_produces_the_load(moetune, picture, dispatch):
    document = json.loads(
        moetune("plan", "--model", "deepseek-r1", "--ep", "8", "--dispatch", dispatch, "--json").stdout
    )
    profile = _profile(Regime(**document["regime"]))
    assert picture.dispatcher_of(profile) == dispatch
    words = picture.command(profile, dispatch).split()
    assert "--dp" not in words
    assert json.loads(moetune("plan", *words[2:], "--json").stdout)["regime"] == document["regime"]


def test_a_profile_of_the_ladder_vllm_names_the_dispatcher_and_the_ladder(moetune, picture):
    regime = Regime(ep_size=8, dispatch="allgather", ladder="vllm", draws=4, seed=2)
    profile = _profile(regime)
    dispatch = picture.dispatcher_of(profile)
    assert dispatch == "vllm:allgather_reducescatter"
    words = picture.command(profile, dispatch).split()
    assert ("--ladder", "vllm") in pairwise(words)
    assert Regime(**json.loads(moetune("plan", *words[2:], "--json").stdout)["regime"]) == regime


def test_a_load_that_no_engine_produces_has_no_dispatcher(picture):
    assert picture.dispatcher_of(_profile(Regime(ep_size=8, dispatch="allgather", ladder="3"))) == ""


def test_the_script_draws_the_readmes_picture(tmp_path):
    """The profile is the one that `make picture` names."""
    (wanted,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "benchmarks/picture.py" in line)
    (profile,) = ROOT.glob(wanted.split()[-1])
    drawn = tmp_path / "tune.svg"
    program = [sys.executable, SOURCE, profile, "--output", drawn]
    subprocess.run(
        program, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=GIVE_UP_S
    )
    text = drawn.read_text()
    assert "vllm:allgather_reducescatter" in text
    assert "NVIDIA" in text
