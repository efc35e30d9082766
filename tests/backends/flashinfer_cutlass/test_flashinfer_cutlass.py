"""The FlashInfer CUTLASS backend against the installed FlashInfer's signatures, with the kernels in its place faked."""

import inspect
import pickle
import random
from collections import Counter
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer.fused_moe")
from flashinfer.fused_moe import core  # noqa: E402
from flashinfer.jit import env  # noqa: E402
from planted_cutlass import (  # noqa: E402
    BOTH,
    FIRST,
    OP,
    RUNNER_FIELDS,
    TOO_BIG,
    FakeOp,
    FakeRunner,
    problem,
    relative_error,
    small,
)

from moetune.backends.base import Backend, Candidates  # noqa: E402
from moetune.backends.flashinfer_cutlass import op as op_module  # noqa: E402
from moetune.backends.flashinfer_cutlass.backend import (  # noqa: E402
    DEFAULT_TACTIC,
    ROUNDS,
    FlashInferCutlassBackend,
)
from moetune.backends.flashinfer_cutlass.op import unbuilt  # noqa: E402
from moetune.errors import UnsupportedError  # noqa: E402
from moetune.inputs.presets import layer as preset  # noqa: E402
from moetune.measure import bench as bench_module  # noqa: E402
from moetune.measure.bench import Bench  # noqa: E402
from moetune.measure.clock import CpuClock  # noqa: E402
from moetune.spec.regime import Regime  # noqa: E402
from moetune.spec.tactic import Tactic  # noqa: E402
from moetune.tuning.final_comparison import compare_finalists  # noqa: E402
from moetune.tuning.verdict import decide  # noqa: E402


def test_it_is_a_backend_that_survives_a_pickle():
    assert isinstance(FlashInferCutlassBackend(), Backend)
    assert pickle.loads(pickle.dumps(FlashInferCutlassBackend())).name == "flashinfer-cutlass"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"precision": "fp8_block"}, "nothing to tune"),
        ({"precision": "nvfp4"}, "not nvfp4"),
        ({"precision": "fp32"}, "not fp32"),
        ({"precision": "mxint4"}, "those of mxint4 have 32"),
        ({"precision": "int4_g128"}, "w4a8"),
        ({"activation": "relu2"}, "relu2"),
        ({"weight_on_input": True}, "at top_k = 1 only"),
        ({"hidden_size": 100}, "multiples of 8"),
        ({"intermediate_size": 24, "precision": "fp8_tensor"}, "multiples of 16"),
        ({"hidden_size": 80, "precision": "mxfp4"}, "multiples of 32"),
        ({"precision": "w4a8"}, "multiples of 128"),
    ],
)
def test_each_thing_that_it_does_not_tune_has_a_reason_of_its_own(fields, reason):
    assert reason in (FlashInferCutlassBackend().unsupported(small(**fields), Regime()) or "")


def test_unequal_shards_are_refused_and_equal_ones_of_redundant_experts_are_not():
    backend = FlashInferCutlassBackend()
    assert "equal" in (backend.unsupported(small(), Regime(ep_size=3, uneven_shards=True)) or "")
    assert backend.unsupported(small(), Regime(ep_size=3, redundant_experts=2)) is None
    assert backend.unsupported(preset("qwen3-235b-a22b"), Regime(ep_size=4, attention_dp=True)) is None
    assert backend.unsupported(preset("qwen3-235b-a22b"), Regime(tp_size=512)) is not None


@pytest.mark.parametrize("gemm", [1, 2])
def test_candidates_are_all_pairs_that_fit_the_device_the_untuned_one_first(op, gemm):
    found = FlashInferCutlassBackend().candidates(small(), Regime(ep_size=4), 16, "cuda")
    assert found.tactics[0] == DEFAULT_TACTIC
    assert len(found.tactics) == 1 + 44 * 80 == len(set(found.tactics))
    assert set(found.excluded) == {Tactic(gemm1=7), Tactic(gemm2=50)}
    assert {t[f"gemm{gemm}"] for t in found.tactics[1:]} == set(
        range(FIRST) if gemm == 1 else range(FIRST, BOTH)
    ) - TOO_BIG


def test_the_runner_is_made_with_the_op_s_arguments(op):
    FlashInferCutlassBackend().candidates(small(precision="fp8_tensor"), Regime(ep_size=4, layout="slot"), 16, "cuda")
    (made,) = FakeRunner.made
    assert (made["x_dtype"], made["weight_dtype"], made["output_dtype"]) == (
        torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16,
    )  # fmt: skip
    assert (made["top_k"], made["ep_size"], made["use_fused_finalize"]) == (1, 4, True)
    assert int(made["activation_type"]) == 3
    assert not any(made[name] for name in made if name.startswith("use_") and name != "use_fused_finalize")


def test_the_fake_runner_takes_what_the_real_one_takes():
    source = inspect.getsource(core.get_cutlass_fused_moe_module.__wrapped__)
    body = source[source.index("class MoERunner") :]
    signature = body[body.index("def __init__(") + 13 : body.index("):", body.index("def __init__("))]
    real = {line.split(":")[0].strip() for line in signature.splitlines() if ":" in line}
    assert real == RUNNER_FIELDS == set(inspect.signature(FakeRunner).parameters)
    for name in ("get_gemm1_tactic_count", "get_gemm2_tactic_count", "gemm_idx_for_tuning", "def get_valid_tactics"):
        assert name in body


def test_the_real_op_has_every_argument_that_is_given(op):
    layer, regime = small(), Regime(ep_size=4)
    runner = FlashInferCutlassBackend().prepare(problem(layer, regime, 3))
    given = set(runner.arguments()) | {"profile_ids"}
    assert given <= set(OP.parameters)
    assert "workspace_buffer" in given
    runner.run(Tactic(gemm1=5, gemm2=60))
    assert op.calls[-1].workspace_buffer.dtype == torch.uint8
    (asked,) = op.sizes
    assert (asked["max_num_tokens"], asked["num_experts_total"], asked["top_k"]) == (3, 16, 4)


@pytest.mark.parametrize(
    "regime",
    [
        Regime(),
        Regime(ep_size=4),
        Regime(ep_size=4, dispatch="allgather"),
        Regime(ep_size=4, attention_dp=True),
        Regime(ep_size=8, attention_dp=True),
        Regime(ep_size=4, layout="deduplicated"),
        Regime(ep_size=4, layout="slot"),
        Regime(ep_size=4, layout="pool"),
        Regime(ep_size=4, tp_size=2),
    ],
    ids=lambda regime: regime.slug,
)
@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [({}, 1e-2), ({"precision": "fp8_tensor"}, 5e-2), ({"activation": "gelu"}, 1e-2)],
    ids=["bf16", "fp8_tensor", "gelu"],
)
def test_the_op_is_given_what_the_reference_computes(op, regime, fields, tolerance):
    layer = small(**fields)
    backend = FlashInferCutlassBackend()
    assert backend.tolerance(layer) == tolerance
    runner = backend.prepare(problem(layer, regime, 12, rank=regime.ep_size - 1))
    for draw in (0, 1):
        out = runner.run(Tactic(gemm1=5, gemm2=60), draw)
        assert 0 < relative_error(out, runner.reference(draw)) <= tolerance
        call = op.calls[-1]
        assert call.profile_ids == [5, 60]
        assert (call.ep_size, call.ep_rank) == (regime.ep_size, regime.ep_size - 1)
        assert call.token_selected_experts.dtype == torch.int32
        assert call.input.is_contiguous()


def test_ids_reach_the_op_global_with_nothing_remapped(op):
    regime = Regime(ep_size=4, layout="pool")
    asked = problem(small(), regime, 12, rank=2)
    FlashInferCutlassBackend().prepare(asked).run(DEFAULT_TACTIC, 1)
    assert torch.equal(op.calls[-1].token_selected_experts, asked.draws[1].routing.topk_ids)
    assert (op.calls[-1].token_selected_experts == -1).any()
    assert op.calls[-1].profile_ids == [-1, -1]


def test_draws_differ_in_inputs_and_the_output_buffer_is_one(op):
    runner = FlashInferCutlassBackend().prepare(problem(small(), Regime(), 4))
    first = runner.run(DEFAULT_TACTIC, 0)
    kept = first.clone()
    second = runner.run(DEFAULT_TACTIC, 1)
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(kept, second)
    assert not torch.equal(op.calls[0].input, op.calls[1].input)


def test_weights_are_kept_for_the_next_bucket_and_made_anew_for_another_shard(op):
    backend, layer, regime = FlashInferCutlassBackend(), small(), Regime(ep_size=4)

    def weights(rows, rank=0):
        return backend.prepare(problem(layer, regime, rows, rank)).arguments()["fc1_expert_weights"]

    first = weights(4)
    assert weights(8).data_ptr() == first.data_ptr()
    assert torch.equal(FlashInferCutlassBackend().prepare(problem(layer, regime, 4)).arguments()["fc1_expert_weights"],
                       first)  # fmt: skip
    other = weights(4, rank=1)
    assert other.shape == first.shape
    assert other.data_ptr() != first.data_ptr()


def test_a_search_sweeps_less_once_it_has_warm_starts(op):
    backend, layer, regime = FlashInferCutlassBackend(), small(), Regime(ep_size=4)
    found = backend.candidates(layer, regime, 16, "cuda")

    def tuned(rows, starts):
        search = backend.search(problem(layer, regime, rows, draws=1), found, starts)
        batch, count, measured = next(search), 0, {}
        try:
            while True:
                count += len(batch.tactics)
                times = {t: 100.0 + 5 * (t["gemm1"] - 9) ** 2 + 4 * (t["gemm2"] - 77) ** 2
                         if t != DEFAULT_TACTIC else 1e4 for t in batch.tactics}  # fmt: skip
                measured |= times
                batch = search.send(times)
        except StopIteration as stop:
            return count, stop.value, measured

    cold, finalists, measured = tuned(16, ())
    assert finalists[0] == Tactic(gemm1=9, gemm2=77)
    warm, again, _ = tuned(32, (*finalists, *backend.promising(measured)))
    assert tuned(32, (*finalists, *backend.promising(measured)))[:2] == (warm, again)
    assert tuned(16, ()) == (cold, finalists, measured)
    assert again[0] == finalists[0]
    assert cold > 44 + 80
    assert warm < cold / 2


class Timed:
    """A bench that answers `us(tactic)` with a little noise, and adds up what a GPU would have run, first runs too."""

    def __init__(self, us, warm):
        self.us, self.failures, self.spent, self._warm, self._chance = us, {}, Counter(), warm, random.Random(0)

    def samples(self, tactics, draws):
        for tactic in tactics:
            self.spent[tactic] += self.us(tactic) * (len(draws) + (tactic not in self._warm))
            self._warm.add(tactic)
        return [tuple(self.us(tactic) * self._chance.gauss(1, 0.01) for _ in draws) for tactic in tactics]


@pytest.mark.parametrize(("t_us", "most_t"), [(2100.0, 650), (310.0, 700)], ids=["4096 rows", "128 rows"])
def test_a_warm_bucket_keeps_to_its_budget_though_the_default_is_far_slower(op, t_us, most_t):
    """In units of a good tactic's time; see `FINAL_S`. The default, five times as slow, is timed in few rounds."""
    chance, backend = random.Random(3), FlashInferCutlassBackend()
    first, second = ({at: part * (1 + chance.expovariate(1)) for at in range(126)} for part in (0.6, 0.4))
    found = backend.candidates(small(), Regime(), 16, "cuda")
    best = min(first[t["gemm1"]] + second[t["gemm2"]] for t in found.tactics[1:])

    def us(tactic):
        return (
            5 * t_us if tactic == DEFAULT_TACTIC else t_us * (first[tactic["gemm1"]] + second[tactic["gemm2"]]) / best
        )

    starts, promising, warm = (), (), set()
    for rows in (128, 256):
        bench, search = (
            Timed(us, warm),
            backend.search(problem(small(), Regime(), rows, draws=1), found, (*starts, *promising)),
        )
        batch, measured = next(search), {}
        try:
            while True:
                taken = bench.samples(batch.tactics, range(batch.rounds))
                means = [sum(series) / len(series) for series in taken]
                measured |= dict(zip(batch.tactics, means, strict=True))
                batch = search.send(dict(zip(batch.tactics, means, strict=True)))
        except StopIteration as stop:
            starts, promising = stop.value, backend.promising(measured)
        searched = bench.spent[DEFAULT_TACTIC]
        others = [tactic for tactic in starts if tactic != DEFAULT_TACTIC]
        samples = compare_finalists(bench, DEFAULT_TACTIC, others, range(16), 16, seconds=backend.final_s)
        assert bench.spent[DEFAULT_TACTIC] - searched <= 8 * 5 * t_us
        verdict = decide([samples], DEFAULT_TACTIC)
        assert us(verdict.tactic) < 1.01 * t_us
    assert sum(bench.spent.values()) < most_t * t_us


@pytest.mark.parametrize(("regime", "rows"), [(Regime(), 512), (Regime(), 1), (Regime(ep_size=2), 512)])
def test_a_search_narrows_down_in_three_passes_over_each_gemm(op, regime, rows):
    backend = FlashInferCutlassBackend()
    search = backend.search(
        problem(small(), regime, rows, draws=1), backend.candidates(small(), regime, rows, "cuda"), ()
    )
    batch, seen, sizes = next(search), [], []
    with suppress(StopIteration):
        while True:
            seen.append(batch.rounds)
            sizes.append(len(batch.tactics))
            batch = search.send({tactic: 100.0 + tactic["gemm1"] + tactic["gemm2"] for tactic in batch.tactics})
    assert seen == [ROUNDS[0], *ROUNDS, *ROUNDS]
    for first, second, third in (sizes[1:4], sizes[4:7]):
        assert first > second > third


def test_a_tactic_runs_untimed_once_for_all_buckets(op):
    backend, clock = FlashInferCutlassBackend(), Mock(spec=CpuClock, eager={})
    clock.paired_samples.side_effect = lambda calls, draws, before: [[1.0] * len(draws) for _ in calls]
    have_run = set()
    for rows in (16, 32):
        Bench(backend, problem(small(), Regime(), rows), clock, have_run=have_run).samples(
            [DEFAULT_TACTIC, Tactic(gemm1=1, gemm2=50)], [0]
        )
    assert clock.warm_up.call_count == 2


def test_a_first_run_that_fails_is_tried_again_in_another_bucket(op):
    backend, clock = FlashInferCutlassBackend(), Mock(spec=CpuClock, eager={})
    clock.warm_up.side_effect = RuntimeError("planted")
    have_run = set()
    for rows in (16, 32):
        bench = Bench(backend, problem(small(), Regime(), rows), clock, have_run=have_run)
        assert bench.samples([DEFAULT_TACTIC], [0]) == [None]
    assert clock.warm_up.call_count == 2


def test_nothing_of_a_search_is_left_out_of_the_candidates(op):
    backend = FlashInferCutlassBackend()
    tactics = (DEFAULT_TACTIC, Tactic(gemm1=0, gemm2=45))
    search = backend.search(problem(small(), Regime(), 4, draws=1), Candidates(tactics), ())
    assert set(next(search).tactics) <= set(tactics)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_and_prepares_nothing():
    backend = FlashInferCutlassBackend()
    assert "CUDA" in backend.unavailable()[0]
    assert backend.environment()["flashinfer"][0].isdigit()
    with pytest.raises(UnsupportedError, match="CUDA"):
        backend.prepare(problem(small(), Regime(), 4))
    with pytest.raises(UnsupportedError, match="CUDA"):
        backend.candidates(small(), Regime(), 4, "cpu")


def test_on_an_ampere_gpu_the_reason_names_the_needed_capability(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    reason, hint = FlashInferCutlassBackend().unavailable()
    assert "9.0" in reason
    assert "8.0" in reason
    assert "triton" in hint


def test_the_hint_for_a_flashinfer_without_profile_ids_is_an_upgrade(op):
    op.__signature__ = OP.replace(parameters=[p for p in OP.parameters.values() if p.name != "profile_ids"])
    reason, hint = FlashInferCutlassBackend().unavailable()
    assert "profile_ids" in reason
    assert "upgrade" in hint


@pytest.fixture
def empty_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "FLASHINFER_AOT_DIR", tmp_path / "aot")
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path / "jit")
    for name in ("FLASHINFER_DISABLE_JIT", "FLASHINFER_NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(op_module, "TOOLKIT", str(tmp_path / "cuda"))
    return tmp_path


def test_an_unbuilt_module_without_nvcc_is_explained(empty_caches):
    reason, hint = unbuilt("90")
    assert "nvcc" in reason
    assert "jit-cache" in hint


def test_the_hint_for_an_unbuilt_module_says_how_nvcc_builds_it(empty_caches):
    (empty_caches / "cuda/bin").mkdir(parents=True)
    (empty_caches / "cuda/bin/nvcc").touch()
    reason, hint = unbuilt("90")
    assert "half an hour" in reason
    assert "build('90')" in hint
    assert "half an hour" in unbuilt("103")[0]


def test_forbidden_builds_are_explained(empty_caches, monkeypatch):
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    reason, hint = unbuilt("90")
    assert "FLASHINFER_DISABLE_JIT" in reason
    assert "unset" in hint


@pytest.mark.parametrize(
    "place", ["aot/fused_moe_90", "jit/fused_moe_90", "jit/fused_moe_90_h20_prebuilt_d"], ids=lambda place: place
)
def test_a_built_module_is_found_where_flashinfer_looks(empty_caches, place):
    folder = empty_caches / place
    folder.mkdir(parents=True)
    assert unbuilt("90") is not None
    (folder / f"{folder.name}.so").touch()
    assert unbuilt("90") is None
    assert unbuilt("100") is not None


def test_tune_goes_through_the_search_and_answers_each_bucket(op, monkeypatch, tmp_path):
    from moetune.tuning.tune import tune

    compute, now_ns = FakeOp.__call__, [0]

    def slower(self, *args, **kwargs):
        gemm1, gemm2 = kwargs["profile_ids"]
        away = abs(gemm1 - 11) + abs(gemm2 - 99) / 2 if gemm1 >= 0 else 100
        now_ns[0] += int(2e4 * (1 + away))
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(FakeOp, "__call__", slower)
    monkeypatch.setattr(bench_module, "clock_for", lambda device: CpuClock(lambda: now_ns[0]))
    layer = small(num_experts=4, top_k=1, hidden_size=16, intermediate_size=16)
    regime = Regime(ep_size=2, ladder=[1, 2], draws=2)
    profile = tune(layer, regime, FlashInferCutlassBackend(), tmp_path, device="cpu", isolate=False)
    assert [choice.rows for choice in profile.choices] == [1, 2]
    for choice in profile.choices:
        assert choice.default_tactic == DEFAULT_TACTIC
        assert abs(choice.tactic["gemm1"] - 11) + abs(choice.tactic["gemm2"] - 99) / 2 < 12
        assert choice.tried < 44 + 80 + 30
        assert choice.gain > 1.5
    assert profile.choices[1].tried < profile.choices[0].tried
