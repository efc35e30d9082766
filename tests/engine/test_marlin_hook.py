"""vLLM's and SGLang's choice of Marlin's block size and tiles, answered from the store by the plugins."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys

import pytest
import torch
from choices import make_choice
from engine_trees import functions
from marlin_trees import MODULES, plant

from moetune.backends.marlin.backend import MarlinBackend
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.space import gemms, tactic_of
from moetune.engine import plugins, session
from moetune.inputs import flashinfer_versions
from moetune.inputs.options import parse
from moetune.store.profile import Profile
from moetune.tuning.question import Question

ENGINES = ("vllm", "sglang")
SIZES = "--experts 16 --top-k 2 --hidden 256 --intermediate 128"
REGIME = "--ep 4 --dp --dispatch allgather --ladder 2,16,64 --tune-max-num-tokens 64"
VERSION = importlib.metadata.version
TACTICS = {
    "vllm": (tactic_of(16, "128x64x2", "64x128x3"), tactic_of(8), tactic_of(48, "auto", "64x256x1")),
    "sglang": (tactic_of(16), tactic_of(8), tactic_of(48)),
}
DEFAULT = tactic_of(8)


def spelled(precision="mxint4"):
    return f"{SIZES} --precision {precision} {REGIME}"


def save(engine, precision="mxint4"):
    """Stores a profile as `moetune tune` does. In the second bucket the default is the choice."""
    options = parse(spelled(precision))
    question = Question.of(options.layer, options.regime, MarlinBackend(engine), rank=options.rank)
    choices = tuple(
        make_choice(rows, tactic=tactic, default_tactic=DEFAULT, rejected=())
        for rows, tactic in zip(question.regime.buckets, TACTICS[engine], strict=True)
    )
    question.store.save(question.profile(*choices))
    return Profile


def call(rows, precision="mxint4", **changed):
    """Returns the arguments of `fused_marlin_moe` for the layer of `spelled` on one of 4 ranks."""
    options = parse(spelled(precision))
    fmt = FORMATS[options.layer.precision]
    first, second = gemms(options.layer, options.regime, fmt)
    dtype = {"bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}[fmt.scale]
    return {
        "hidden_states": torch.zeros(rows, first.K, dtype=torch.bfloat16),
        "w1": torch.zeros(4, first.K // 16, 2 * first.N, dtype=torch.int32),
        "w2": torch.zeros(4, second.K // 16, 2 * second.N, dtype=torch.int32),
        "w1_scale": torch.zeros(4, first.K // fmt.group, first.N).to(dtype),
        "topk_weights": torch.zeros(rows, 2),
        "topk_ids": torch.zeros(rows, 2, dtype=torch.int32),
        "quant_type_id": fmt.scalar_type,
        "global_num_experts": 16,
        "expert_map": torch.zeros(16, dtype=torch.int32),
        **changed,
    }


def own(engine, rows):
    """The engine's formula: 2 slots a row, on 16 experts for vLLM and on 4 for SGLang."""
    load = -(-rows // 4) * 2 / 4 if engine == "vllm" else rows * 2 / 4
    size = next((size for size in (8, 16, 32, 48) if load / size < 0.9), 64)
    return [(size, -1, -1, -1)] * 2


@pytest.fixture
def engine_of(monkeypatch, tmp_path, caplog):
    """Returns a function that starts an engine with the plugin, and returns the module with `fused_marlin_moe`."""
    versions = {"vllm": "0.33.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or VERSION(name))
    monkeypatch.setattr(plugins, "_registered", False)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, plugins._Watch)]  # of other tests
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(flashinfer_versions, "obstacle", lambda: "not in this test")
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.set_level(logging.INFO)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ENGINES]:
            del sys.modules[name]

    def start(engine, precision="mxint4", *, imported_first=False, **planted):
        plant(tmp_path, engine, **planted)
        if imported_first:
            importlib.import_module(MODULES[engine])
        monkeypatch.setenv(plugins.VARIABLE, spelled(precision))
        getattr(plugins, engine)()
        return importlib.import_module(MODULES[engine])

    forget()
    yield start
    forget()
    session.set_for_process(None)


def lines(caplog):
    return [record.message for record in caplog.records if "Marlin experts" in record.message]


@pytest.mark.parametrize("imported_first", [False, True])
@pytest.mark.parametrize("precision", ["mxint4", "mxfp4", "nvfp4", "int4_g128"])
def test_vllm_runs_what_the_profile_says(precision, imported_first, engine_of, caplog):
    save("vllm", precision)
    module = engine_of("vllm", precision, imported_first=imported_first)
    for rows in (1, 2):
        assert module.ask(**call(rows, precision)) == [(16, 128, 64, 2), (16, 64, 128, 3)]
    assert module.ask(**call(16, precision)) == own("vllm", 16), "the default is the choice"
    for rows in (60, 64, 1000):
        assert module.ask(**call(rows, precision)) == [(48, -1, -1, -1), (48, 64, 256, 1)]
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses, asked.same) == (5, 1, 1)
    assert lines(caplog) == [
        "moetune: Marlin experts E=4, N=128: profile of custom under ep4-tp1-dp-allgather-random, 3 buckets"
    ]


def test_sglang_runs_the_block_size_that_the_profile_says(engine_of, caplog):
    save("sglang")
    module = engine_of("sglang")
    assert module.ask(**call(1)) == own("sglang", 1), "a single row is aligned by another function"
    assert module.ask(**call(2)) == [(16, -1, -1, -1)] * 2
    assert module.ask(**call(16)) == own("sglang", 16)
    assert module.ask(**call(64)) == [(48, -1, -1, -1)] * 2
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"w1_zeros": torch.zeros(1)},
        {"hidden_states": torch.zeros(64, 256, dtype=torch.float16)},
        {"w1": torch.zeros(8, 16, 512, dtype=torch.int32), "w2": torch.zeros(8, 8, 512, dtype=torch.int32)},
        {"w1_scale": torch.zeros(4, 2, 256, dtype=torch.bfloat16)},
        {"topk_ids": torch.zeros(64, 3, dtype=torch.int32)},
    ],
    ids=["zero points", "fp16", "other experts", "other groups", "other top-k"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_other_experts_keep_the_engines_formula(engine, changed, engine_of, caplog):
    save(engine)
    module = engine_of(engine)
    asked = module.ask(**call(64, **changed))
    assert asked[0][1:] == (-1, -1, -1)
    assert (session.current().asked[0].hits, session.current().asked[0].misses) == (0, 1)
    assert "not custom under" in lines(caplog)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_profile_the_formula_chooses_and_the_log_names_the_command(engine, engine_of, caplog):
    module = engine_of(engine)
    assert module.ask(**call(64)) == own(engine, 64)
    (line,) = lines(caplog)
    option = " --backend-option formula=sglang" if engine == "sglang" else ""
    assert f"`moetune tune {spelled()} --backend marlin{option}` makes one" in line


@pytest.mark.parametrize(
    ("variable", "value"), [("VLLM_BATCH_INVARIANT", True), ("VLLM_MARLIN_MOE_BLOCK_SIZE_M", "32")]
)
def test_what_the_user_sets_in_vllm_wins(variable, value, engine_of, monkeypatch, caplog):
    save("vllm")
    module = engine_of("vllm")
    monkeypatch.setattr(importlib.import_module("vllm.envs"), variable, value)
    monkeypatch.setenv(variable, str(value))
    assert module.ask(**call(64)) == own("vllm", 64)
    assert f"{variable} is set" in lines(caplog)[0]


def test_another_version_of_the_function_is_left_alone(engine_of, caplog):
    save("vllm")
    module = engine_of("vllm", extra="\ndel moe_align_block_size\n")
    assert "has another moe_align_block_size" in lines(caplog)[0]
    assert module.fused_marlin_moe.__module__ == MODULES["vllm"]
    assert not hasattr(module.fused_marlin_moe, "__wrapped__")


def test_an_error_reaches_the_log_and_not_the_engine(engine_of, caplog, monkeypatch):
    save("vllm")
    module = engine_of("vllm")
    monkeypatch.setattr(Question, "of", lambda *given, **named: 1 / 0)
    for _ in range(2):
        assert module.ask(**call(64)) == own("vllm", 64)
    assert lines(caplog) == ["moetune: Marlin experts are left to the engine: ZeroDivisionError: division by zero"]


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_the_real_function_of_vllm_runs_what_the_profile_says(version, vllm_version_sources, engine_of):
    path = vllm_version_sources(version) / f"{MODULES['vllm'].replace('.', '/')}.py"
    save("vllm")
    real = functions(path, "_fused_marlin_moe", "fused_marlin_moe")
    module = engine_of("vllm", functions=real, act_order=version == "0.26.0")
    for rows, expected in (
        (2, [(16, 128, 64, 2), (16, 64, 128, 3)]),
        (16, own("vllm", 16)),
        (64, [(48, -1, -1, -1), (48, 64, 256, 1)]),
    ):
        assert module.ask(**call(rows)) == expected


def test_the_real_function_of_sglang_runs_what_the_profile_says(engine_sources, engine_of, monkeypatch):
    path = engine_sources("sglang") / f"{MODULES['sglang'].replace('.', '/')}.py"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    save("sglang")
    module = engine_of("sglang", functions=functions(path, "fused_marlin_moe"))
    for rows, expected in ((2, [(16, -1, -1, -1)] * 2), (16, own("sglang", 16)), (64, [(48, -1, -1, -1)] * 2)):
        assert module.ask(**call(rows), workspace=torch.zeros(1)) == expected
