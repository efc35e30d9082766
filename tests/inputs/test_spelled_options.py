import inspect

import pytest

from moetune.errors import UsageError
from moetune.inputs.options import NUMBERS, TEXT, parse, resolve
from moetune.spec.regime import Regime


def test_a_line_is_spelled_like_the_command_lines_options():
    asked = parse("--model qwen3-235b-a22b --ep 8 --dispatch vllm:deepep_high_throughput --seed=3")
    assert asked.layer.name == "qwen3-235b-a22b"
    assert asked.regime == Regime(
        ep_size=8, dispatch="alltoall", layout="deduplicated", ladder=asked.regime.ladder, seed=3
    )
    assert asked.rank is None


def test_dp_is_a_flag_with_an_opposite():
    assert parse("--model qwen3-235b-a22b --ep 8 --dp").regime.attention_dp
    assert not parse("--model qwen3-235b-a22b --ep 8 --no-dp").regime.attention_dp


def test_an_engines_launch_line_stands_for_its_options_and_those_beside_it_win():
    line = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel --all2all-backend deepep_high_throughput"
    spelled = f"--launch '{line}' --seed 3"
    assert parse(spelled) == parse(
        "--model qwen3-235b-a22b --precision bf16 --ep 8 --dispatch vllm:deepep_high_throughput --seed 3"
    )
    assert parse(f"{spelled} --layout slot").regime.layout == "slot"


def test_every_option_of_a_layer_and_a_regime_is_the_command_lines():
    from moetune.cli.options import _NAMES

    of_a_backend = {"backend", "kernel", "remote"}
    assert {*TEXT, *NUMBERS, "dp"} == set(_NAMES) - of_a_backend
    assert {*TEXT, *NUMBERS, "dp"} == set(inspect.signature(resolve).parameters)


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("", "--model is missing"),
        ("--ep 8", "--model is missing"),
        ("--model", "expected one argument"),
        ("--model qwen3-235b-a22b --ep eight", "invalid int value"),
        ("--model qwen3-235b-a22b --nonsense 1", "nrecognized arguments"),
        ("--model qwen3-235b-a22b --e 8", "nrecognized arguments"),
        ("--model qwen3-235b-a22b 'open", "No closing quotation"),
        ("--model qwen3-235b-a22b --ep 7", "does not divide"),
        ("--model qwen3-235b-a22b --ep 8 --rank 8", "rank must be"),
        ("--model qwen3-235b-a22b --dispatch teleport", "--dispatch must be one of"),
        ("--launch 'cargo run'", "finds no server"),
    ],
)
def test_what_cannot_be_asked_is_named(spelled, message):
    with pytest.raises(UsageError, match=message):
        parse(spelled)
