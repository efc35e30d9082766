"""The backend triton-kernels: what it takes, its defaults, and one layer computed by a stand-in of the package."""

import pickle
import sys

import kernels_stand_in
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetune.backends import registry
from moetune.backends.base import Problem
from moetune.backends.reference import relative_error
from moetune.backends.triton_kernels import package
from moetune.backends.triton_kernels.backend import TOLERANCE, TritonKernelsBackend
from moetune.backends.triton_kernels.runner import KernelsRunner
from moetune.backends.triton_kernels.space import Flags, tactic_of
from moetune.backends.triton_kernels.weights import Mxfp4Matrices, random_experts
from moetune.errors import UnsupportedError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

REGIMES = {
    "none": Regime(),
    "EP": Regime(ep_size=4),
    "all-gather": Regime(ep_size=4, dispatch="allgather"),
    "deduplicated": Regime(ep_size=4, layout="deduplicated"),
    "slot": Regime(ep_size=4, layout="slot"),
    "L < k": Regime(ep_size=16, attention_dp=True, layout="deduplicated"),
}
TACTIC = tactic_of(Flags(16, 64, 4, 1), Flags(32, 128, 3, 2))


def tiny(**others):
    """gpt-oss, smaller: H = 192 and I = 96, which is padded to 128."""
    sizes = {"num_experts": 48, "top_k": 4, "hidden_size": 192, "intermediate_size": 96, **others}
    return MoELayer(
        **{"name": "tiny", "precision": "mxfp4", "activation": "swiglu_clamped", "expert_bias": True, **sizes}
    )


def problem_of(layer, regime, rows, rank, draws=1):
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings))


def runner_of(problem):
    return KernelsRunner(problem, random_experts(problem))


@pytest.fixture
def planted(monkeypatch):
    return kernels_stand_in.plant(monkeypatch)


@pytest.mark.parametrize("rows", [1, 6, 34])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_the_layer_is_computed_as_by_the_reference(planted, regime, rows):
    for rank in {0, regime.ep_size - 1}:
        runner = runner_of(problem_of(tiny(), regime, rows, rank, 2))
        for draw in (0, 1):
            assert relative_error(runner.run(TACTIC, draw), runner.reference(draw)) <= TOLERANCE


def test_each_gemm_runs_under_its_flags_and_the_engines_constraints_come_back(planted):
    runner_of(problem_of(tiny(), REGIMES["EP"], 5, 0)).run(TACTIC)
    assert planted.seen == [
        {"block_m": 16, "block_k": 64, "num_stages": 4, "split_k": 1},
        {"block_m": 32, "block_k": 128, "num_stages": 3, "split_k": 2},
    ]
    assert planted.flags._opt_flags_constraints == kernels_stand_in.VLLM


def test_constraints_come_back_after_an_error(planted):
    seen = []

    def fail():
        with package.constrained(planted.flags, {"block_m": 64, "split_k": 4}):
            seen.append(dict(planted.flags._opt_flags_constraints))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [{"split_k": 4, "block_m": 64}]
    assert planted.flags._opt_flags_constraints == kernels_stand_in.VLLM


def test_a_part_of_an_expert_is_padded(planted):
    """I = 288 on two ranks is 144, half a group beyond four; vLLM pads it to 192."""
    runner = runner_of(problem_of(tiny(intermediate_size=288), Regime(tp_size=2), 17, 0))
    assert relative_error(runner.run(TACTIC), runner.reference()) <= TOLERANCE


def test_a_layer_without_biases_is_computed(planted):
    runner = runner_of(problem_of(tiny(expert_bias=False), REGIMES["all-gather"], 9, 1))
    assert relative_error(runner.run(TACTIC), runner.reference()) <= TOLERANCE


def test_an_expert_without_slots_and_rows_without_ids_are_computed(planted):
    problem = problem_of(tiny(), Regime(), 5, 0)
    ids = torch.full_like(problem.draws[0].routing.topk_ids, -1)
    ids[:3, :2] = torch.tensor([[3, 9], [9, 3], [3, 47]])
    problem.draws[0].routing.topk_ids.copy_(ids)
    runner = runner_of(problem)
    assert relative_error(runner.run(TACTIC), runner.reference()) <= TOLERANCE
    assert not runner.run(TACTIC)[3:].any()


def test_weights_are_the_same_for_every_bucket_and_another_seed_has_others(planted):
    first, again = (random_experts(problem_of(tiny(), Regime(ep_size=4), rows, 1)) for rows in (3, 8))
    other = random_experts(problem_of(tiny(), Regime(ep_size=4, seed=7), 3, 1))
    assert torch.equal(first.w1.codes, again.w1.codes)
    assert torch.equal(first.w2.scales, again.w2.scales)
    assert not torch.equal(first.w1.codes, other.w1.codes)


@given(st.lists(st.floats(-40, 40, width=32), min_size=64, max_size=64))
def test_quantized_weights_are_the_nearest_that_a_scale_allows(values):
    """A group's largest value becomes 4 … 8 times its scale. The largest code is 6, and steps are up to 2 wide."""
    weights = torch.tensor(values).view(1, 64)
    stored = Mxfp4Matrices.empty(1, 1, 64, torch.device("cpu"))
    stored.store(0, weights)
    scales = (stored.scales[0].float() - 127).exp2().repeat_interleave(32, -1)
    assert ((stored.fp32(0) - weights).abs() <= 2 * scales).all()
    again = Mxfp4Matrices.empty(1, 1, 64, torch.device("cpu"))
    again.store(0, stored.fp32(0))
    assert torch.equal(again.fp32(0), stored.fp32(0))


@pytest.mark.parametrize(
    ("layer", "regime", "reason"),
    [
        (tiny(precision="bf16"), Regime(), "tunes mxfp4 experts, not bf16"),
        (tiny(activation=Activation.SILU), Regime(), "tunes swiglu_clamped, which the first GEMM applies, not silu"),
        (tiny(weight_on_input=True), Regime(), "this layer to its input"),
        (tiny(top_k=6), Regime(), "a top-k that is a power of two, not 6"),
        (tiny(hidden_size=160), Regime(), "needs H in multiples of 64"),
        (tiny(hidden_size=128), Regime(), "more than 128 columns in each GEMM; H = 128"),
        (tiny(), Regime(tp_size=2), "I/tp = 48"),
        (tiny(), Regime(ep_size=4, layout="batched"), "not the expert-major rows"),
    ],
)
def test_what_it_does_not_compute_has_a_reason(layer, regime, reason):
    assert reason in TritonKernelsBackend().unsupported(layer, regime)
    with pytest.raises(UnsupportedError, match="The backend triton-kernels"):
        TritonKernelsBackend().candidates(layer, regime, 16, "cpu")


@pytest.mark.parametrize("regime", [Regime(tp_size=4), Regime(ep_size=8, dispatch="allgather"), Regime(ep_size=64)])
@pytest.mark.parametrize("name", ["gpt-oss-120b", "gpt-oss-20b"])
def test_gpt_oss_is_computed(name, regime):
    if regime.ep_size <= preset(name).num_experts:
        assert TritonKernelsBackend().unsupported(preset(name), regime) is None
        assert "triton-kernels" in registry.backends_computing(preset(name), regime)


def test_the_default_is_the_engines_and_the_first_candidate():
    backend, layer, regime = TritonKernelsBackend(), preset("gpt-oss-120b"), Regime(ep_size=8, dispatch="allgather")
    default = backend.explained_default(layer, regime, 256)
    assert default.tactic == tactic_of(Flags(64, 128, 4, 1), Flags(64, 128, 4, 1))
    assert "vLLM" in default.source
    assert backend.candidates(layer, regime, 256, "cpu").tactics[0] == default.tactic


def finished(search, us, timed):
    """The finalists of a search that gets these times; `timed` gets the tactics as they are timed."""
    times = None
    while True:
        try:
            batch = search.send(times)
        except StopIteration as end:
            return end.value
        timed.extend(batch.tactics)
        times = {tactic: us(tactic) for tactic in batch.tactics}


def test_the_search_starts_at_the_default_and_tries_every_value_of_each_gemm(planted):
    backend, layer = TritonKernelsBackend(), preset("gpt-oss-120b")
    problem = problem_of(layer, Regime(ep_size=8, dispatch="allgather"), 512, 0)
    candidates = backend.candidates(layer, problem.regime, 512, "cpu")
    best = tactic_of(Flags(16, 64, 6, 1), Flags(32, 64, 3, 1))

    def us(tactic):
        return 10.0 + sum(5 * (tactic[name] != best[name]) for name in ("gemm1", "gemm2"))

    timed = []
    finalists = finished(backend.search(problem, candidates, ()), us, timed)
    assert timed[0] == candidates.tactics[0]
    assert best in finalists
    for name in ("gemm1", "gemm2"):
        assert {tactic[name] for tactic in timed} == {tactic[name] for tactic in candidates.tactics}
    assert len(set(timed)) < len(candidates.tactics) / 4


def test_what_a_cold_search_times_first_is_compiled_ahead():
    backend, layer = TritonKernelsBackend(), preset("gpt-oss-120b")
    problem = problem_of(layer, Regime(ep_size=8, dispatch="allgather"), 512, 0)
    candidates = backend.candidates(layer, problem.regime, 512, "cpu")
    likely = backend.likely(problem, candidates)
    assert likely[0] == candidates.tactics[0]
    assert len(likely) == 31 + 31 - 1, "31 flags for each GEMM, and the default counts once"


def test_kernels_are_compiled_anew_only_for_other_flags_and_other_kinds_of_numbers():
    backend, layer, regime = TritonKernelsBackend(), preset("gpt-oss-120b"), Regime(ep_size=8, dispatch="allgather")

    def keys(rows, tactic=TACTIC, regime=regime):
        return backend.compile_keys(layer, regime, rows, tactic)

    first, second = keys(1001)
    assert first != second
    assert keys(1003) == [first, second], "no row count, slot count or block count is a multiple of 16"
    assert keys(1008)[0] != first
    assert keys(1001, tactic_of(Flags(16, 64, 4, 1), Flags(16, 64, 4, 1)))[0] == first
    assert keys(1001, tactic_of(Flags(16, 64, 4, 1), Flags(16, 64, 4, 1)))[1] != second
    assert keys(1001, regime=Regime(ep_size=4, dispatch="allgather"))[0] != first, "other experts"


def test_it_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(TritonKernelsBackend()))
    assert again.environment() == TritonKernelsBackend().environment()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(package, "folder", lambda: None)
    reason, hint = TritonKernelsBackend().unavailable()
    assert reason == "the package triton_kernels is not installed"
    assert "vLLM 0.26.0" in hint
    assert package.digest() == "not installed"
    with pytest.raises(UnsupportedError, match="cannot run here"):
        TritonKernelsBackend().prepare(problem_of(tiny(), Regime(), 4, 0))


def written(folder, name=package.NAME):
    """A package with the files by which the known version is told, and one module."""
    for file in ("__init__.py", *package._NEEDED, "own.py"):
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("VALUE = 5\n" if file == "own.py" else "")
    return folder / name


def test_vllms_copy_is_found_without_importing_vllm_and_gets_its_own_name(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    copy = written(tmp_path / "vllm" / "third_party")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (package.NAME, f"{package.NAME}.own"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    assert package.folder() == copy
    assert package.obstacle() is None
    assert package.module("own").VALUE == 5
    assert package.folder() == copy, "as imported"


def test_an_installed_package_is_taken_before_vllms(monkeypatch, tmp_path):
    written(tmp_path / "vllm" / "third_party")
    installed = written(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package.folder() == installed
    before = package.digest()
    package._digest.cache_clear()
    (installed / "own.py").write_text("VALUE = 6\n")
    assert package.digest() != before


@pytest.mark.parametrize("missing", package._NEEDED)
def test_another_version_is_refused_by_name(monkeypatch, tmp_path, missing):
    """PyPI's triton-kernels has none of the files, Triton 3.6's no routing.py, Triton 3.8's no matmul_ogs.py."""
    installed = written(tmp_path)
    (installed / missing).unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    reason, _ = TritonKernelsBackend().unavailable()
    assert missing in reason
    assert str(installed) in reason
