import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.inputs.flag_table import ENGINES, table

PROGRAMS = (
    ("vllm", "vllm serve"), ("vllm", "dynamo.vllm"), ("sglang", "sglang serve"), ("sglang", "dynamo.sglang"),
    ("trtllm", "trtllm-serve"), ("trtllm", "trtllm-bench"), ("trtllm", "dynamo.trtllm"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "program", "spelled", "name", "value"),
    [
        ("vllm", None, "-tp", "tensor-parallel-size", "one"),
        ("vllm", None, "--tensor_parallel_size", "tensor-parallel-size", "one"),
        ("vllm", None, "--enable-expert-parallel", "enable-expert-parallel", "none"),
        ("vllm", None, "-ep", "enable-expert-parallel", "none"),
        ("vllm", None, "--no-enable-expert-parallel", "enable-expert-parallel", "none"),
        ("vllm", None, "--eplb-config.num_redundant_experts", "eplb-config", "json"),
        ("vllm", None, "--tensor-par", "tensor-parallel-size", "one"),
        ("vllm", "dynamo.vllm", "-dp", "data-parallel-size", "one"),
        ("sglang", None, "--ep-size", "ep-size", "one"),
        ("sglang", None, "--enable-dp-attention", "enable-dp-attention", "none"),
        ("trtllm", None, "--ep_size", "ep-size", "one"),
        ("trtllm", None, "--enable_attention_dp", "enable-attention-dp", "none"),
    ],
)
def test_a_flag_is_found_as_the_engine_spells_it(engine, program, spelled, name, value):
    found = table(engine, program).find(spelled)
    assert found is not None
    assert name in (found.name, *found.aliases)
    assert found.value == value


@pytest.mark.parametrize(
    ("engine", "spelled", "nearest"),
    [
        ("vllm", "--enable-expert-paralel", "enable-expert-parallel"),
        ("vllm", "--tensor-parallel-sizes", "tensor-parallel-size"),
        ("sglang", "--enable-dp-atention", "enable-dp-attention"),
        ("trtllm", "--tp_sise", "tensor-parallel-size"),
        ("vllm", "--xyzzy", None),
    ],
)
def test_a_flag_that_is_none_has_a_nearest_one(engine, spelled, nearest):
    assert table(engine).find(spelled) is None
    assert table(engine).nearest(spelled) == nearest


def test_a_removed_flag_is_known_and_says_what_became_of_it():
    for engine, name in (("sglang", "enable-ep-moe"), ("sglang", "enable-deepep-moe"), ("vllm", "device")):
        found = table(engine).find(f"--{name}")
        assert found is not None
        assert found.note


@pytest.mark.parametrize(("engine", "program"), PROGRAMS)
def test_every_flag_is_found_by_each_of_its_names_and_no_name_is_two_flags(engine, program):
    flags = table(engine, program)
    seen: dict[str, str] = {}
    for flag in flags.flags.values():
        for name in (flag.name, *flag.aliases, *flag.negative):
            assert seen.setdefault(name, flag.name) == flag.name
            assert flags.find(f"--{name}") is flag
    assert len(seen) > 40


@given(engine=st.sampled_from(ENGINES), name=st.text("abcdef-_.", max_size=12))
def test_any_text_is_a_flag_or_none(engine, name):
    found = table(engine).find(f"--{name}")
    assert found is None or found.name


def test_an_unknown_engine_is_named():
    with pytest.raises(UsageError, match="'lmdeploy'"):
        table("lmdeploy")
