from typing import get_args

import pytest

from moetune.backends import registry
from moetune.errors import UsageError
from moetune.inputs.option_table import OPTIONS, TUNABLE, Group
from moetune.inputs.options import parse, resolve
from moetune.inputs.presets import layer
from moetune.spec.enums import Layout, Objective, Precision
from moetune.spec.layer import MoELayer
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


def test_every_option_sets_a_field_that_exists():
    fields = {"layer": MoELayer.model_fields, "regime": Regime.model_fields}
    for option in OPTIONS:
        if option.field and option.owner in fields:
            assert option.field in fields[option.owner]
    assert {option.field for option in OPTIONS if option.owner == "regime"} == set(Regime.model_fields) - {
        "uneven_shards",
        "eplb",
    }


def test_the_choices_of_an_option_are_the_values_of_its_field():
    values = {"layout": Layout, "objective": Objective}
    for option in OPTIONS:
        if option.choices and option.owner == "regime":
            assert set(option.choices) == set(get_args(values[option.field]))
    assert {option.choices for option in OPTIONS if option.name == "precision"} == {tuple(map(str, Precision))}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.group is Group.KERNELS])
def test_kernels_and_device_are_refused_with_the_reason(option):
    with pytest.raises(UsageError, match=f"{option.flag} cannot be given here: the engine chooses"):
        parse(f"--model qwen3-235b-a22b {option.flag} x")


def test_an_unknown_option_of_the_library_is_refused():
    with pytest.raises(UsageError, match="no option colour"):
        resolve("qwen3-235b-a22b", colour="red")


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("", "--model is missing"),
        ("--ep 8", "--model is missing"),
        ("--model", "requires an argument"),
        ("--model qwen3-235b-a22b --ep eight", "not a valid integer"),
        ("--model qwen3-235b-a22b --nonsense 1", "No such option.*--model, "),
        ("--model qwen3-235b-a22b --e 8", "No such option"),
        ("--model qwen3-235b-a22b more", "unexpected extra argument"),
        ("--model qwen3-235b-a22b --precision fp3", "'fp3' is not one of"),
        ("--model qwen3-235b-a22b 'open", "No closing quotation"),
        ("--model qwen3-235b-a22b --ep 7", "does not divide"),
        ("--model qwen3-235b-a22b --ep 8 --rank 8", "rank must be"),
        ("--model qwen3-235b-a22b --dispatch teleport", "--dispatch must be one of"),
        ("--launch 'cargo run'", "finds no server"),
    ],
)
def test_an_invalid_option_is_named(spelled, message):
    with pytest.raises(UsageError, match=message):
        parse(spelled)


def test_a_skew_is_spelled_like_flashinfers_and_may_be_strict():
    asked = parse("--model qwen3-235b-a22b --ep 8 --distribution ddist_1.5 --strict-skew")
    assert asked.regime.distribution == "ddist:1.5"
    assert asked.strict_skew
    assert not parse("--model qwen3-235b-a22b --distribution zipf:1").strict_skew


@pytest.mark.parametrize(
    ("dispatch", "engine"),
    [("vllm:deepep_high_throughput", "vllm"), ("sglang:none", "sglang"), ("trtllm:attention_dp", "trtllm")],
)
def test_the_engine_of_the_dispatcher_places_redundant_experts_under_a_skew(dispatch, engine):
    line = f"--model qwen3-235b-a22b --ep 8 --dispatch {dispatch} --redundant-experts 32"
    assert parse(f"{line} --distribution zipf:1").regime.eplb == engine
    assert parse(line).regime.eplb is None
    assert ("eplb" in parse(line).regime.model_dump()) is False


def test_what_a_balancer_may_do_otherwise_is_a_warning():
    grouped = "--model deepseek-r1 --ep 8 --redundant-experts 32 --distribution zipf:1 --dispatch"
    assert parse(f"{grouped} trtllm:attention_dp").warnings == ()
    assert "vLLM's balancer first packs the router's groups to nodes" in parse(f"{grouped} vllm:naive").warnings[0]
    nodes, flags = parse(f"{grouped} sglang:none").warnings
    assert "SGLang's balancer first packs the router's groups to nodes" in nodes
    assert "--enable-eplb or --init-expert-location" in flags


def test_redundant_experts_under_a_skew_without_an_engine_are_an_error():
    with pytest.raises(UsageError, match="Name the engine: --dispatch ENGINE:NAME or --launch"):
        parse("--model qwen3-235b-a22b --ep 8 --redundant-experts 32 --distribution zipf:1")


def test_the_help_names_the_precisions_that_a_backend_computes():
    layers = [layer(name, precision) for precision in Precision for name in ("qwen3-30b-a3b", "gpt-oss-120b")]
    computed = {each.precision.value for each in layers if registry.backends_computing(each, Regime())}
    assert computed == set(TUNABLE)
