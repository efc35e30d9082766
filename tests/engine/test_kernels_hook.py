"""The flags of vLLM's triton_kernels, answered from the store by the plugin."""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from choices import make_choice
from engine_trees import functions
from kernels_trees import MODULE, plant

from moetune.backends.triton_kernels import package
from moetune.backends.triton_kernels.backend import TritonKernelsBackend
from moetune.backends.triton_kernels.space import Flags, tactic_of
from moetune.engine import plugins, session
from moetune.inputs import flashinfer_versions
from moetune.inputs.options import parse
from moetune.tuning.question import Question

SPELLED = "--model gpt-oss-120b --ep 32 --dp --dispatch allgather --ladder 2,16,64 --tune-max-num-tokens 64"
FEW = tactic_of(Flags(16, 64, 6, 2), Flags(32, 128, 3, 1))
DEFAULT = tactic_of(Flags(16, 128, 4, 1), Flags(16, 128, 4, 1))
MANY = tactic_of(Flags(64, 128, 4, 1), Flags(16, 64, 4, 1))
BIAS = torch.zeros(1)
OWN = [{"split_k": 1}, {"split_k": 1}]
"""What vLLM sets on Hopper, in both GEMMs."""


def of(tactic):
    return [Flags.parse(tactic[name]).constraints for name in ("gemm1", "gemm2")]


def save():
    """Stores a profile as `moetune tune` does. In the second bucket the default is the choice."""
    options = parse(SPELLED)
    question = Question.of(options.layer, options.regime, TritonKernelsBackend(), rank=options.rank)
    choices = tuple(
        make_choice(rows, tactic=tactic, default_tactic=DEFAULT, rejected=())
        for rows, tactic in zip(question.regime.buckets, (FEW, DEFAULT, MANY), strict=True)
    )
    question.store.save(question.profile(*choices))


def scale(name="HOPPER_SCALE", num_warps=8):
    return SimpleNamespace(storage=SimpleNamespace(layout=SimpleNamespace(name=name, num_warps=num_warps)))


def config(bias=BIAS, scales=None):
    precision = SimpleNamespace(weight_scale=scales or scale())
    return SimpleNamespace(w1_bias=bias, w2_bias=bias, w1_precision=precision, w2_precision=precision)


def weights(*shape):
    return SimpleNamespace(shape=list(shape))


def call(rows, **changed):
    """Returns the arguments of `triton_kernel_fused_experts` for the layer of `SPELLED` on one of 32 ranks."""
    return {
        "output_tensor": torch.zeros(rows, 2880, dtype=torch.bfloat16),
        "hidden_states": torch.zeros(rows, 2880, dtype=torch.bfloat16),
        "w1": weights(4, 2880, 5760),
        "w2": weights(4, 2880, 2880),
        "routing_data": SimpleNamespace(expt_hist="a histogram", gate_scal=None),
        "gather_indx": "gather",
        "scatter_indx": "scatter",
        "topk": 4,
        "activation": "swigluoai",
        "quant_config": config(),
        **changed,
    }


@pytest.fixture
def engine_of(monkeypatch, tmp_path, caplog):
    """Returns a function that starts vLLM with the plugin, and returns the module that runs the experts."""
    monkeypatch.setattr(plugins, "_registered", False)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, plugins._Watch)]  # of other tests
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(flashinfer_versions, "obstacle", lambda: "not in this test")
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.set_level(logging.INFO)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "triton_kernels")]:
            del sys.modules[name]

    def start(*, imported_first=False, **planted):
        plant(tmp_path, **planted)
        if imported_first:
            importlib.import_module(MODULE)
        monkeypatch.setenv(plugins.VARIABLE, SPELLED)
        plugins.vllm()
        package.module(package.OPT_FLAGS).update_opt_flags_constraints({"split_k": 1})
        return importlib.import_module(MODULE)

    forget()
    plant(tmp_path)  # the profile's environment has a digest of the package
    yield start
    forget()
    session.set_for_process(None)


def lines(caplog):
    return [record.message for record in caplog.records if "triton_kernels' experts" in record.message]


@pytest.mark.parametrize("imported_first", [False, True])
def test_each_gemm_runs_under_the_profiles_flags(imported_first, engine_of, caplog):
    save()
    module = engine_of(imported_first=imported_first)
    for rows in (1, 2):
        assert module.ask(**call(rows)) == of(FEW)
    assert module.ask(**call(16)) == OWN, "the default is the choice"
    for rows in (60, 64, 1000):
        assert module.ask(**call(rows)) == of(MANY)
    (asked,) = session.current().asked
    assert (asked.hits, asked.misses, asked.same) == (5, 1, 1)
    assert lines(caplog) == [
        "moetune: triton_kernels' experts E=4, N=2880: profile of gpt-oss-120b under ep32-tp1-dp-allgather-random, "
        "3 buckets"
    ]


def test_other_calls_of_the_process_run_under_the_engines_constraints(engine_of):
    save()
    module = engine_of()
    assert module.ask(**call(64)) == of(MANY)
    routing = SimpleNamespace(expt_hist=None)
    module.matmul_ogs("x", "w", None, routing)
    importlib.import_module("triton_kernels.matmul_ogs").matmul_ogs("x", "w", None, routing)
    assert module.calls == OWN


def test_a_call_that_fails_leaves_the_engines_constraints(engine_of):
    save()
    module = engine_of()
    with pytest.raises(RuntimeError, match="out of memory"):
        module.ask(**call(64, routing_data=SimpleNamespace(expt_hist="fails", gate_scal=None)))
    assert package.module(package.OPT_FLAGS)._opt_flags_constraints == {"split_k": 1}
    module.matmul_ogs("x", "w", None, SimpleNamespace(expt_hist=None))
    assert module.calls == OWN[:1]


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_states": torch.zeros(64, 2880)},
        {"w1": weights(8, 2880, 5760), "w2": weights(8, 2880, 2880)},
        {"w1": weights(4, 2880, 2880), "w2": weights(4, 1440, 2880)},
        {"topk": 2},
        {"quant_config": config(bias=None)},
        {"quant_config": config(scales=scale(num_warps=4))},
        {"quant_config": config(scales=scale("BLACKWELL_SCALE", None))},
        {"quant_config": config(scales="no tensor of the package")},
        {"swiglu_limit": 10.0},
        {"apply_router_weight_on_input": True},
    ],
    ids=[
        "fp32", "other experts", "other sizes", "other top-k", "no biases", "scales for 4 warps", "Blackwell",
        "plain scales", "other limit", "weights on the input",
    ],
)  # fmt: skip
def test_other_experts_keep_the_formula(changed, engine_of, caplog):
    save()
    module = engine_of()
    assert module.ask(**call(64, **changed)) == OWN
    assert (session.current().asked[0].hits, session.current().asked[0].misses) == (0, 1)
    assert "not gpt-oss-120b under" in lines(caplog)[0]


def test_without_a_profile_the_formula_chooses_and_the_log_names_the_command(engine_of, caplog):
    module = engine_of()
    assert module.ask(**call(64)) == OWN
    (line,) = lines(caplog)
    assert f"`moetune tune {SPELLED} --backend triton-kernels` makes one" in line


def test_a_profile_of_other_sources_of_triton_kernels_does_not_answer(engine_of, tmp_path, caplog):
    save()
    (tmp_path / "triton_kernels" / "another.py").touch()
    package._digest.cache_clear()
    module = engine_of()
    assert module.ask(**call(64)) == OWN
    assert "no profile" in lines(caplog)[0]
    package._digest.cache_clear()


def test_what_the_user_sets_in_vllm_wins(engine_of, monkeypatch, caplog):
    save()
    module = engine_of()
    monkeypatch.setattr(importlib.import_module("vllm.envs"), "VLLM_BATCH_INVARIANT", True)
    assert module.ask(**call(64)) == OWN
    assert "VLLM_BATCH_INVARIANT is set" in lines(caplog)[0]


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ("\ndel triton_kernel_fused_experts\n", "triton_kernel_fused_experts"),
        ("\ndef triton_kernel_fused_experts(hidden_states, experts):\n    pass\n", "triton_kernel_fused_experts"),
        ("\ndel matmul_ogs.__globals__['make_opt_flags']\n", "matmul_ogs"),
        ("\ndel matmul_ogs\n", "matmul_ogs"),
    ],
)
def test_another_version_of_the_functions_is_left_alone(extra, name, engine_of, caplog):
    save()
    module = engine_of(extra=extra)
    assert f"this vLLM or triton_kernels has another {name}" in lines(caplog)[0]
    assert not hasattr(getattr(module, "matmul_ogs", None), "__wrapped__")


def test_an_error_reaches_the_log_and_not_the_engine(engine_of, caplog, monkeypatch):
    save()
    module = engine_of()
    monkeypatch.setattr(Question, "of", lambda *given, **named: 1 / 0)
    for _ in range(2):
        assert module.ask(**call(64)) == OWN
    assert lines(caplog) == [
        "moetune: triton_kernels' experts are left to the engine: ZeroDivisionError: division by zero"
    ]


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_the_real_function_of_vllm_runs_what_the_profile_says(version, vllm_version_sources, engine_of):
    path = vllm_version_sources(version) / f"{MODULE.replace('.', '/')}.py"
    save()
    module = engine_of(functions=functions(path, "triton_kernel_fused_experts"))
    for rows, expected in ((2, of(FEW)), (16, OWN), (64, of(MANY))):
        assert module.ask(**call(rows)) == expected
