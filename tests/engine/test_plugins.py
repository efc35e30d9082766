import importlib.util
import logging
import os
import subprocess
import sys
import tomllib
import types
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from flashinfer.autotuner import AutoTuner, autotune
from flashinfer.autotuner.autotuner import AutoTuner as Stock
from processes import GIVE_UP_S
from stand_ins import FAST, Trtllm
from test_cutlass import MoERunner, call

import moetune
from moetune.engine import flashinfer_hook, hits, plugins, session, warmup_end
from moetune.inputs import flashinfer_versions
from moetune.spec.enums import DISTRIBUTION_VARIABLE

ROOT = Path(__file__).parents[2]
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")
CONFIG = """{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16,
"num_experts_per_tok": 2, "hidden_size": 32, "moe_intermediate_size": 16, "hidden_act": "silu",
"norm_topk_prob": true, "num_hidden_layers": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
"torch_dtype": "bfloat16"}"""


@pytest.fixture
def process(tuner, monkeypatch):
    """This process as one in which no plugin was loaded, and afterwards too."""
    monkeypatch.setattr(plugins, "_registered", False)
    monkeypatch.setattr(flashinfer_hook, "_users", 0)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    yield
    session.set_for_process(None)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(CONFIG)
    return path


def spelled(model):
    return f"--model {model} --ep 4 --dp --draws 4 --ladder hybrid --tune-max-num-tokens 8"


def plugin(group):
    (found,) = (entry for entry in entry_points(group=group) if entry.name == "moetune")
    return found.load()


@pytest.mark.parametrize("group", GROUPS)
def test_the_entry_points_are_declared_and_found(group):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    (found,) = (entry for entry in entry_points(group=group) if entry.name == "moetune")
    assert found.value == declared["moetune"]
    assert callable(found.load())


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_happens_without_the_variable(process, group, layer, regime):
    plugin(group)()
    assert type(AutoTuner.get()) is Stock
    assert session.current() is None


@pytest.mark.parametrize("group", GROUPS)
def test_with_the_variable_the_engines_own_warmup_is_tuned(process, group, model, regime, monkeypatch, caplog):
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    with caplog.at_level(logging.INFO):
        plugin(group)()
        plugin(group)()
        op = Trtllm(session.current().layer, regime)
        with autotune(True):  # as vLLM and SGLang do
            assert op() == tuple(FAST)
            op()
    lines = [record for record in caplog.records if "buckets of" in record.message]
    assert [line.message.partition("buckets of")[2] for line in lines] == [
        " flashinfer-trtllm-routed: 0 served, 4 tuned, 0 missed"
    ]
    assert lines[0].name.startswith(group.partition(".")[0]), "a logger that the engine prints"
    for _, inputs in op.runner.seen[:12]:
        rows = op.runner.rows(inputs)
        assert op.load(inputs) == moetune.realize(op.layer, regime, rows, rank=1).load.tolist()
    assert op(3) == tuple(FAST), "and serves"


OTHERS = {
    "cutlass": lambda layer, regime: partial(call, MoERunner(layer, regime), layer, regime),
    "trtllm": lambda layer, regime: Trtllm(
        layer, regime, op="flashinfer::trtllm_fp8_per_tensor_scale_routed_moe", maximum=8192
    ),
}


@pytest.fixture
def started(process, model, monkeypatch):
    """The session of a plugin of vLLM."""
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    plugins.vllm()
    return session.current()


@pytest.mark.parametrize("kernels", OTHERS)
def test_before_the_warmup_a_miss_is_not_logged(started, kernels, regime, caplog):
    """vLLM calls the ops while it compiles, and its sweep comes later."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        OTHERS[kernels](started.layer, regime)()
    assert started.missed
    assert not caplog.records


@pytest.mark.parametrize(("kernels", "lines"), [("cutlass", 2), ("trtllm", 1)])
def test_after_the_warmup_a_miss_is_one_short_line_for_each_op(started, kernels, lines, regime, caplog):
    with autotune(True):
        Trtllm(started.layer, regime)()
    caplog.clear()
    other = OTHERS[kernels](started.layer, regime)
    with caplog.at_level(logging.INFO):
        other()
        other()
    messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == lines
    for message in messages:
        assert message.startswith("moetune: no stored tactic for")
        assert message.endswith("or run `moetune tune` first.")
        assert len(message) <= 200


def test_at_the_end_of_the_warm_up_each_flashinfer_op_has_its_line(started, regime, monkeypatch, caplog):
    worker = types.ModuleType("vllm.v1.worker.gpu_worker")
    ops = [Trtllm(started.layer, regime), Trtllm(started.layer.model_copy(update={"num_experts": 20}), regime)]

    class Worker:
        def compile_or_warm_up_model(self):
            for op in ops:
                op(3)
                with autotune(True):
                    op()
                assert tuple(op(3)) == tuple(FAST)
            return "compiled"

    vars(worker)["Worker"] = Worker
    (step,) = (step for step in warmup_end.LAST_STEPS if step.module == worker.__name__)
    warmup_end.install(worker, step, lambda _: started.end_warm_up())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert Worker().compile_or_warm_up_model() == "compiled"
        ops[0]()
    op = "moetune: FlashInfer flashinfer::trtllm_fp4_block_scale_moe"
    assert [record.message for record in caplog.records if "calls hit" in record.message] == [
        f"{op} E=4: 2 calls hit, 1 left to the engine",
        f"{op} E=5: 0 calls hit, 3 left to the engine",
    ]
    assert started.spent_s > 0
    assert caplog.records[-1].message == f"moetune: took {started.spent_s:.1f} s until the end of the warm-up"


def test_the_two_gemms_of_cutlass_are_two_shapes(started, regime):
    OTHERS["cutlass"](started.layer, regime)()
    assert [(shape.name, shape.hits, shape.misses) for shape in started.asked] == [
        (f"FlashInfer trtllm::fused_moe::gemm{at} E=4", 0, 1) for at in (1, 2)
    ]


def test_if_a_call_cannot_be_counted_the_engine_goes_on_and_nothing_more_is(started, regime, monkeypatch):
    monkeypatch.setattr(hits, "_name", lambda call: 1 / 0)
    op = Trtllm(started.layer, regime)
    with autotune(True):
        assert [op(), op()] == [tuple(FAST)] * 2
    assert not started.asked
    assert started.is_warm


def test_an_engine_without_the_last_step_is_left_alone(started):
    for step in warmup_end.LAST_STEPS:
        for module in (types.ModuleType("empty"), types.SimpleNamespace(**{step.owner: object})):
            warmup_end.install(module, step, lambda _: started.end_warm_up())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("--model no-such-model --ep 4", "no-such-model"),
        ("--ep 4", "--model is missing"),
        ("--model {model} --ep 3", "does not divide"),
        ("nonsense", "unexpected extra argument"),
    ],
)
@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_value_is_logged_and_the_engine_starts(process, group, value, reason, model, monkeypatch, caplog):
    monkeypatch.setenv(plugins.VARIABLE, value.format(model=model))
    plugin(group)()
    plugin(group)()
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert reason in errors[0]
    assert type(AutoTuner.get()) is Stock


def test_tensorrt_llms_variable_gives_the_plugins_default_distribution(process, model, monkeypatch):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "balanced")
    monkeypatch.setenv(plugins.VARIABLE, f"--model {model} --ep 4")
    plugins.vllm()
    assert session.current().regime.distribution == "balanced"


def test_a_wrong_value_of_tensorrt_llms_variable_is_logged_and_the_engine_starts(process, model, monkeypatch, caplog):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "uniform")
    monkeypatch.setenv(plugins.VARIABLE, f"--model {model} --ep 4")
    plugins.vllm()
    assert f"{DISTRIBUTION_VARIABLE} must be" in caplog.text
    assert type(AutoTuner.get()) is Stock


@pytest.mark.parametrize(("spelled_as", "strategy"), [(None, "merge"), ("parallel", "parallel"), ("", "merge")])
def test_the_strategy_of_the_ranks_is_a_variable(process, model, monkeypatch, spelled_as, strategy):
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    monkeypatch.delenv("MOETUNE_STRATEGY", raising=False)
    if spelled_as is not None:
        monkeypatch.setenv("MOETUNE_STRATEGY", spelled_as)
    plugins.vllm()
    assert session.current().strategy == strategy


def test_a_wrong_strategy_is_logged_and_the_ranks_merge(process, model, monkeypatch, caplog):
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    monkeypatch.setenv("MOETUNE_STRATEGY", "vote")
    plugins.vllm()
    assert session.current().strategy == "merge"
    assert "strategy merge: MOETUNE_STRATEGY=vote is not a strategy. Use one of independent, broadcast" in caplog.text


def test_an_unknown_version_is_logged_and_left_alone(process, model, monkeypatch, caplog):
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    monkeypatch.setattr(flashinfer_versions, "version", lambda: "1.0.0")
    plugins.vllm()
    assert "does not know the tuner of flashinfer-python 1.0.0" in caplog.text
    assert type(AutoTuner.get()) is Stock


def test_a_plugin_loads_neither_torch_nor_flashinfer_and_waits_for_the_tuner(model):
    program = (
        "import sys\nfrom moetune.engine import plugins\nplugins.vllm()\n"
        "assert not {'torch', 'flashinfer'} & sys.modules.keys()\n"
        "from flashinfer.autotuner import AutoTuner\nassert AutoTuner._instance is None\n"
        "assert type(AutoTuner.get()).__name__ == 'MoetuneTuner'\nassert AutoTuner.get() is AutoTuner.get()\n"
    )
    environment = {**os.environ, plugins.VARIABLE: spelled(model)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
    )
    assert done.returncode == 0, done.stderr


def executed(path: Path, name: str, monkeypatch, **stand_ins: types.SimpleNamespace) -> types.ModuleType:
    """The engine's module with what it imports of its engine replaced."""
    for imported, stand_in in stand_ins.items():
        full = imported.replace("__", ".")
        module = types.ModuleType(full)
        vars(module).update(vars(stand_in))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, full, module)
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


def test_vllms_own_loader_loads_it(process, model, monkeypatch, engine_sources):
    path = engine_sources("vllm") / "vllm/plugins/__init__.py"
    envs = types.SimpleNamespace(VLLM_PLUGINS=["moetune"])
    platform = types.SimpleNamespace(is_xpu=lambda: False)
    loader = executed(
        path,
        "vllm.plugins",
        monkeypatch,
        vllm=types.SimpleNamespace(envs=envs),
        vllm__envs=envs,
        vllm__platforms=types.SimpleNamespace(current_platform=platform),
    )
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    loader.load_general_plugins()
    assert type(AutoTuner.get()).__name__ == "MoetuneTuner"


def test_sglangs_own_loader_loads_it(process, model, monkeypatch, engine_sources):
    path = engine_sources("sglang") / "sglang/srt/plugins/__init__.py"
    setting = types.SimpleNamespace(get=lambda: "moetune")
    unset = types.SimpleNamespace(get=lambda: None)
    registry = types.SimpleNamespace(apply_hooks=lambda: None)
    source = types.SimpleNamespace(set=lambda value: None, reset=lambda token: None)
    loader = executed(
        path,
        "sglang.srt.plugins",
        monkeypatch,
        sglang=types.SimpleNamespace(),
        sglang__srt=types.SimpleNamespace(),
        sglang__srt__environ=types.SimpleNamespace(
            envs=types.SimpleNamespace(SGLANG_PLUGINS=setting, SGLANG_PLATFORM=unset)
        ),
        sglang__srt__plugins__hook_registry=types.SimpleNamespace(
            HookRegistry=registry, HookSource=lambda **named: None, _current_plugin_source=source
        ),
    )
    monkeypatch.setenv(plugins.VARIABLE, spelled(model))
    loader.load_plugins()
    assert type(AutoTuner.get()).__name__ == "MoetuneTuner"


@pytest.mark.parametrize(("strict", "level"), [("", logging.WARNING), (" --strict-skew", logging.ERROR)])
def test_a_skew_that_is_missed_is_logged_and_if_strict_the_regime_is_not_used(
    process, model, monkeypatch, caplog, strict, level
):
    monkeypatch.setenv(plugins.VARIABLE, f"{spelled(model)} --distribution zipf:9{strict}")
    with caplog.at_level(logging.INFO):
        plugin(GROUPS[0])()
    lines = [record for record in caplog.records if "zipf:9 asks for" in record.message]
    assert [line.levelno for line in lines] == [level]
    assert (session.current() is None) == bool(strict)
