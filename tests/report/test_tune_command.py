import json
import shlex

import pytest
from click.testing import CliRunner
from shown import PROFILES, made_choice, made_profile

from moetune.cli.main import main
from moetune.inputs.presets import preset
from moetune.report.tune_command import can_ask, whole_command
from moetune.spec.regime import Regime
from moetune.store.profile import Profile


def asked(profile):
    """What `moetune plan` reads from the words of the profile's command."""
    words = shlex.split(whole_command(profile))
    assert words[:2] == ["moetune", "tune"]
    result = CliRunner().invoke(main, ["plan", *words[2:], "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("path", PROFILES[:3] + PROFILES[-2:], ids=lambda path: path.parent.name[:36])
def test_the_command_of_a_packaged_profile_asks_its_question(path):
    profile = Profile.model_validate_json(path.read_text())
    document = asked(profile)
    assert can_ask(profile)
    assert Regime(**document["regime"]) == profile.regime
    assert document["layer"] == profile.layer.model_dump(mode="json")


def test_the_command_of_a_skewed_profile_names_its_rank():
    regime = Regime(ep_size=8, dispatch="allgather", distribution="zipf:1", ladder="8", draws=2, rank=3)
    profile = made_profile(regime=regime).model_copy(update={"layer": preset("qwen3-30b-a3b")})
    assert can_ask(profile)
    assert Regime(**asked(profile)["regime"]) == regime


def test_what_options_cannot_ask_for_is_not_asked():
    named = made_profile().model_copy(update={"layer": preset("qwen3-30b-a3b")})
    assert can_ask(named)
    assert not can_ask(made_profile())
    other = named.layer.model_copy(update={"top_k": 3})
    assert not can_ask(named.model_copy(update={"layer": other}))
    placed = Regime(ep_size=8, dispatch="allgather", distribution="zipf:1", redundant_experts=8, eplb="vllm")
    assert not can_ask(named.model_copy(update={"regime": placed}))


def test_names_in_the_command_are_quoted_for_a_shell():
    hostile = made_profile(made_choice(8, 60.0), name="x; rm -rf ~", kernel="$(id)")
    words = shlex.split(whole_command(hostile))
    assert words[words.index("--model") + 1] == "x; rm -rf ~"
    assert words[words.index("--kernel") + 1] == "$(id)"
