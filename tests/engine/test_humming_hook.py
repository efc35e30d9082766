"""vLLM's choice of Humming's configurations, answered from the store by the plugin."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from choices import make_choice
from humming_trees import MODULE, PLANTED, methods, plant

from moetune.backends.humming import package
from moetune.backends.humming.backend import HummingBackend
from moetune.backends.humming.config import Config
from moetune.backends.humming.gemm import gemms
from moetune.backends.humming.layer_fields import layer_fields
from moetune.backends.humming.space import AUTO, tactic_of
from moetune.engine import plugins, session
from moetune.engine.humming_answers import ENDLESS, Answer, merged
from moetune.inputs import flashinfer_versions
from moetune.inputs.options import parse
from moetune.tuning.question import Question

SIZES = "--experts 16 --top-k 2 --hidden 256 --intermediate 128"
FAST = "wgmma-32x256x64-32x32x64-s4-b1-producer-streamk"
SMALL = "mma-8x128x64-8x64x32-s4-b4-streamk"
TACTICS = (tactic_of(SMALL, AUTO), tactic_of(), tactic_of(FAST, SMALL))
OWN = [[0, 8, {"own": 1}], [8, 32, {"own": 2}], [32, ENDLESS, {"own": 3}]]


def spelled(precision="mxint4", dispatch="--dp --dispatch allgather", ladder="2,16,64"):
    return f"{SIZES} --precision {precision} --ep 4 {dispatch} --ladder {ladder} --tune-max-num-tokens 64"


def save(words, tactics=TACTICS):
    """Stores a profile as `moetune tune` does. In the second bucket the default is the choice."""
    options = parse(words)
    question = Question.of(options.layer, options.regime, HummingBackend(), rank=options.rank)
    choices = tuple(
        make_choice(rows, tactic=tactic, default_tactic=tactic_of(), rejected=())
        for rows, tactic in zip(question.regime.buckets, tactics, strict=False)
    )
    question.store.save(question.profile(*choices))


def layer_config(gemm, **changed):
    """Returns what vLLM's `LayerConfig` of a GEMM has."""
    fields = layer_fields(gemm, (9, 0)) | {"has_zero_point": False} | changed
    return SimpleNamespace(**fields)


def experts_of(module, words, **changed):
    options = parse(words)
    first, second = (layer_config(gemm, **changed) for gemm in gemms(options.layer, options.regime))
    return module.HummingExpertsBase(first, second, options.regime.shard(options.layer).num_physical, 2)


@pytest.fixture
def engine_of(monkeypatch, tmp_path, caplog):
    """Returns a function that starts vLLM with the plugin, and returns the module with the experts."""
    monkeypatch.setattr(package, "version", lambda: "0.1.19")
    monkeypatch.setattr(plugins, "_registered", False)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, plugins._Watch)]  # of other tests
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(flashinfer_versions, "obstacle", lambda: "not in this test")
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.set_level(logging.INFO)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]

    def start(words, functions=PLANTED):
        plant(tmp_path, functions)
        monkeypatch.setenv(plugins.VARIABLE, words)
        plugins.vllm()
        return importlib.import_module(MODULE)

    forget()
    yield start
    forget()
    session.set_for_process(None)


def lines(caplog):
    return [record.message for record in caplog.records if "Humming experts" in record.message]


def fields(spelled_config, gemm_type="grouped_contiguous"):
    return Config.parse(spelled_config).fields(gemm_type)


@pytest.mark.parametrize("precision", ["mxint4", "mxfp4", "nvfp4", "int4_g128"])
def test_vllm_gets_tables_with_what_the_profile_says(precision, engine_of, caplog):
    """All-gather on 4 ranks: M rows have M/2 slots of a rank, so the buckets 2, 16 and 64 end at 1, 8 and 32 slots."""
    words = spelled(precision)
    save(words)
    experts = experts_of(engine_of(words), words)
    assert experts.w13_tuning_config == [[0, 1, fields(SMALL)], [1, 8, {"own": 1}], [8, ENDLESS, fields(FAST)]]
    assert experts.w2_tuning_config == [[0, 8, {"own": 1}], [8, ENDLESS, fields(SMALL)]]
    assert json.loads(experts.w13_tuning_config_str) == experts.w13_tuning_config
    assert json.loads(experts.w2_tuning_config_str) == experts.w2_tuning_config
    assert lines(caplog) == [
        "moetune: Humming experts E=4, N=128: profile of custom under ep4-tp1-dp-allgather-random, 3 buckets"
    ]


def test_calls_are_counted_by_what_answered_them(engine_of):
    words = spelled()
    save(words)
    module = engine_of(words)
    for experts in (experts_of(module, words), experts_of(module, words)):  # two layers of one model
        for rows in (2, 16, 64, 1000):
            experts.estimate_local_valid_shape_m(torch.zeros(rows, 2))
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses, asked.same) == (6, 2, 2)


def test_rows_without_a_tuned_bucket_keep_vllms_configurations(engine_of):
    words = spelled()
    save(words, TACTICS[:1])
    experts = experts_of(engine_of(words), words)
    assert experts.w13_tuning_config == [[0, 1, fields(SMALL)], [1, 8, {"own": 1}], *OWN[1:]]
    assert experts.w2_tuning_config == OWN


@pytest.mark.parametrize(
    "changed",
    [
        {"a_dtype": "float8e4m3"},
        {"c_dtype": "float16"},
        {"num_experts": 8},
        {"weight_scale_group_size": 128},
        {"has_zero_point": True},
        {"has_bias": True},
        {"shape_n": 1024},
    ],
    ids=str,
)
def test_other_experts_keep_vllms_tables(changed, engine_of, caplog):
    words = spelled()
    save(words)
    experts = experts_of(engine_of(words), words, **changed)
    assert experts.w13_tuning_config == experts.w2_tuning_config == OWN
    assert "not custom under ep4-tp1-dp-allgather-random, vLLM's table is used" in lines(caplog)[0]


def test_indexed_gemms_under_expert_parallelism_keep_vllms_tables(engine_of, caplog):
    words = spelled()
    save(words)
    module = engine_of(words)
    module.HummingExpertsBase.gemm_type = module.GemmType.INDEXED
    assert experts_of(module, words).w13_tuning_config == OWN
    assert "not custom" in lines(caplog)[0]


@pytest.mark.parametrize("name", ["VLLM_BATCH_INVARIANT", "VLLM_HUMMING_USE_F16_ACCUM"])
def test_settings_for_which_nothing_was_measured_keep_vllms_tables(name, engine_of, caplog):
    words = spelled()
    save(words)
    module = engine_of(words)
    setattr(sys.modules["vllm.envs"], name, True)
    assert experts_of(module, words).w13_tuning_config == OWN
    assert f"{name} is set, vLLM's table is used" in lines(caplog)[0]


def test_without_a_profile_the_log_names_the_command(engine_of, caplog):
    words = spelled()
    assert experts_of(engine_of(words), words).w13_tuning_config == OWN
    assert f"`moetune tune {words} --backend humming` makes one" in lines(caplog)[0]


def test_a_layer_that_humming_does_not_run_is_named(engine_of, caplog):
    other = spelled().replace("--precision mxint4", "--precision bf16")
    module = engine_of(other)
    assert experts_of(module, spelled()).w13_tuning_config == OWN
    assert "moetune's backend humming tunes mxint4" in lines(caplog)[0]


def test_an_error_is_logged_once_and_vllm_goes_on(engine_of, caplog, monkeypatch):
    words = spelled()
    save(words)
    module = engine_of(words)
    monkeypatch.setattr(HummingBackend, "unsupported", lambda self, layer, regime: 1 / 0)
    for _ in range(2):
        assert experts_of(module, words, num_experts=4 + _).w13_tuning_config == OWN
    assert lines(caplog) == ["moetune: Humming experts are left to the engine: ZeroDivisionError: division by zero"]


def test_another_vllm_is_left_alone(engine_of, caplog):
    words = spelled()
    changed = PLANTED.replace("estimate_local_valid_shape_m(self, topk_ids)", "estimate_local_valid_shape_m(self, ids)")
    module = engine_of(words, changed)
    assert experts_of(module, words).w13_tuning_config == OWN
    assert lines(caplog) == [
        "moetune: Humming experts are left to the engine: vllm of this version has another estimate_local_valid_shape_m"
    ]


def test_answers_take_the_place_of_rows_and_parts_of_rows():
    new = {"new": 1}
    found = [Answer(0, 4, (new, None)), Answer(10, 20, (new, new)), Answer(20, 40, (None, new))]
    assert merged(OWN, found, 0) == [
        [0, 4, new],
        [4, 8, {"own": 1}],
        [8, 10, {"own": 2}],
        [10, 20, new],
        [20, 32, {"own": 2}],
        [32, ENDLESS, {"own": 3}],
    ]
    assert merged(OWN, found, 1) == [
        [0, 8, {"own": 1}],
        [8, 10, {"own": 2}],
        [10, 20, new],
        [20, 40, new],
        [40, ENDLESS, {"own": 3}],
    ]
    assert merged(OWN, [], 0) == OWN


def test_the_class_of_vllm_gets_the_profiles_tables(engine_of, engine_sources):
    """With the methods of vLLM's own source."""
    path = engine_sources("vllm") / f"{MODULE.replace('.', '/')}.py"
    words = spelled()
    save(words)
    experts = experts_of(engine_of(words, methods(path)), words)
    assert experts.w13_tuning_config == [[0, 1, fields(SMALL)], [1, 8, {"own": 1}], [8, ENDLESS, fields(FAST)]]
    assert json.loads(experts.w2_tuning_config_str) == experts.w2_tuning_config
    assert experts.estimate_local_valid_shape_m(torch.zeros(16, 2)) == 8
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses, asked.same) == (0, 1, 1)
