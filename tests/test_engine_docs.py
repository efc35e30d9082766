"""The lines of docs/engines.md are read by what they are given to, and mean one deployment each."""

import re
import shlex
from pathlib import Path

import click
import pytest

from moetune.cli.export import export
from moetune.cli.options import request_of
from moetune.cli.tune import tune
from moetune.inputs import launch
from moetune.inputs.option_table import OPTIONS
from moetune.inputs.options import parse, resolve

TEXT = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
BLOCKS = [block for language, block in FENCED if not language]
COMMANDS = {"tune": tune, "export": export}
ENGINES = ("vllm serve", "python -m sglang", "trtllm-serve")


def lines(block, *starts):
    return [line for line in block.splitlines() if line.startswith(starts)]


def question(line):
    """What a `moetune tune` or `moetune export` line asks, and its other options."""
    _, name, *words = shlex.split(line)
    command = COMMANDS[name]
    context = click.Context(command)
    command.parse_args(context, list(words))
    given = {key: value for key, value in context.params.items() if value is not None}
    asked = {option.name for option in OPTIONS} - {"launch"}
    return request_of(**{key: value for key, value in given.items() if key in asked}), given


def regime_of_launch(line):
    found = launch.read(line).options
    found.pop("backend", None)
    return resolve(**found).regime


TUNED = [block for block in BLOCKS if lines(block, "moetune export")]
PLUGGED = [block for block in BLOCKS if "MOETUNE_REGIME" in block]


def test_each_engine_has_its_lines():
    """Not fewer than there were; each new backend may bring its own."""
    assert len(TUNED) >= 4
    assert len(PLUGGED) >= 6


@pytest.mark.parametrize("block", TUNED)
def test_what_is_exported_is_what_was_tuned(block):
    tuned, exported = (question(line) for line in lines(block, "moetune tune", "moetune export"))
    assert tuned[0].regime == exported[0].regime
    assert tuned[0].layer == exported[0].layer
    assert tuned[0].backend.name == exported[0].backend.name == tuned[1]["backend"]
    assert exported[1]["target"] in TEXT
    for folder in re.findall(r"tuned/([\w-]+)", block):
        assert folder == tuned[0].regime.slug


@pytest.mark.parametrize("block", [block for block in TUNED if lines(block, *ENGINES) and "yaml" not in block])
def test_the_launch_line_has_the_regime_that_was_tuned(block):
    (started,) = lines(block, *ENGINES)
    tuned, _ = question(lines(block, "moetune tune")[0])
    assert regime_of_launch(started) == tuned.regime


@pytest.mark.parametrize("block", PLUGGED)
def test_the_plugins_variable_is_the_launch_lines_deployment(block):
    (spelled,) = re.findall(r'MOETUNE_REGIME="(.*)"', block)
    (started,) = lines(block, *ENGINES)
    asked, brought = parse(spelled), regime_of_launch(started)
    assert asked.regime.differing(brought).keys() <= {"ladder", "tune_max_num_tokens"}, "the op's own buckets are taken"


def test_a_tensorrt_llm_launch_line_with_its_settings_has_the_regime_that_was_tuned(tmp_path):
    settings = tmp_path / "extra.yaml"
    settings.write_text("\n".join(re.findall(r"`(enable_attention_dp: .*?)` and `(moe_config: .*?)`", TEXT)[0]))
    (block,) = (block for block in TUNED if lines(block, "trtllm-serve"))
    (started,) = lines(block, "trtllm-serve")
    tuned, _ = question(lines(block, "moetune tune")[0])
    assert regime_of_launch(started.replace("extra.yaml", str(settings))) == tuned.regime
