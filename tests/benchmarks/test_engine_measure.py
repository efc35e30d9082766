"""What one process of `benchmarks/engine` measures, on planted engines: steps, prefills, kernels, EP shares."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/engine"))

import child
import ep_share
import worker_profile
from common import Journal
from steps import Recorder, Step, steady_ms, summary


class PlantedEngine:
    """An engine with these times: `base` + `each` per sequence and decode step, and `token` per prompt token, in ms."""

    def __init__(self, base: float = 2.0, each: float = 0.5, token: float = 0.01, stagger: int = 2) -> None:
        self.base, self.each, self.token, self.stagger = base, each, token, stagger
        self.now, self.calls, self.profiles = 100.0, [], []

    def generate(self, sequences: int, prompt_tokens: int, output_tokens: int) -> tuple[float, list[Step]]:
        self.calls.append((sequences, prompt_tokens, output_tokens))
        submitted, steps = self.now, []
        if output_tokens == 1:
            at_once = max(1, child.MAX_BATCHED_TOKENS // prompt_tokens)
            counts = [1] if sequences == 1 else [3, *[at_once] * (sequences // at_once - 1), at_once - 3]
            for count in counts:
                self.now += count * prompt_tokens * self.token / 1e3
                steps.append(Step(self.now, count))
            return submitted, steps
        ramp = [sequences // 2] * self.stagger if sequences > 1 else []
        for count in [*ramp, *[sequences] * (output_tokens - len(ramp)), *ramp]:
            self.now += (self.base + self.each * count) / 1e3
            steps.append(Step(self.now, count))
        return submitted, steps

    def profile(self, sequences: int, tokens: int, skip: int, count: int) -> None:
        self.profiles.append((sequences, tokens, skip, count))

    def profiled(self) -> dict[str, object]:
        return {"steps": 8, "kernels_ms": 4.0, "moe_ms": 3.0, "moe_calls": 96.0, "longest": []}


def measured(tmp_path: Path, engine: object, **options: object) -> list[dict]:
    given = {"running": (1, 8, 32), "passes": 2, "steps": 24, "profile": True} | options
    results = Journal(tmp_path / "result.jsonl")
    child.measure(engine, results, child.Marks(None, 1, 0), **given)
    assert Journal(results.path).lines == results.lines
    return results.lines


def test_a_steps_time_is_that_of_steps_in_which_all_sequences_run():
    steps = [Step(0.0, 1), Step(0.001, 8), *(Step(0.001 + 0.005 * at, 8) for at in range(1, 20)), Step(1.0, 3)]
    assert steady_ms(steps, 8) == pytest.approx([5.0] * 11)
    assert steady_ms(steps, 8, trim=0) == pytest.approx([5.0] * 19)
    assert steady_ms(steps, 3) == []


def test_the_longest_series_counts():
    broken = [*(Step(float(at), 4) for at in range(5)), Step(5.0, 2), *(Step(6.0 + 2 * at, 4) for at in range(9))]
    assert steady_ms(broken, 4, trim=0) == [2000.0] * 8


def test_too_few_steps_are_an_error():
    with pytest.raises(RuntimeError, match="only 3 steady steps"):
        summary([1.0, 2.0, 3.0])
    assert summary([1.0, 2.0, 3.0, 10.0])["ms"] == 2.5


def test_the_recorder_passes_outputs_on_and_keeps_the_engine_cores_time():
    messages = [SimpleNamespace(timestamp=1.5, outputs=[1, 2]), SimpleNamespace(timestamp=2.0, outputs=[])]
    recorder = Recorder(iter(messages).__next__)
    assert [recorder(), recorder()] == messages
    assert recorder.take() == [Step(1.5, 2)]
    assert recorder.take() == []


def test_decode_steps_and_prefills_are_measured_in_passes(tmp_path):
    lines = measured(tmp_path, engine := PlantedEngine())
    decode = [(line["number"], line["at"], line["ms"]) for line in lines if line["what"] == "decode"]
    assert decode == [(number, at, pytest.approx(2.0 + 0.5 * at)) for number in (0, 1) for at in (1, 8, 32)]
    prefill = [(line["at"], line["ms"]) for line in lines if line["what"] == "prefill"]
    assert prefill == [(at, pytest.approx(at * 0.01)) for _ in (0, 1) for at in (1024, 4096, 16384)]
    prefills = [(1, 1024, 1, 4), (1, 4096, 1, 4), (16, 16384, 1, 4)]
    assert engine.profiles == [*((at, at, 6, 8) for at in (1, 8, 32)), *prefills]
    assert [line["at"] for line in lines if line["what"] == "profile decode"] == [1, 8, 32]
    assert [line["at"] for line in lines if line["what"] == "profile prefill"] == [1024, 4096, 16384]
    assert [call for call in engine.calls if call[2] == 4] == [(at, 32, 4) for at in (1, 8, 32)]  # one warm-up each


def test_a_failed_measurement_is_a_line_and_the_others_go_on(tmp_path):
    lines = measured(tmp_path, PlantedEngine(stagger=12), profile=False)
    assert [line["error"][:32] for line in lines if "error" in line][:1] == ["RuntimeError: only 3 steady step"]
    assert {line["at"] for line in lines if line["what"] == "decode" and "ms" in line} == {1}
    assert sum(line["what"] == "prefill" and "ms" in line for line in lines) == 6


def test_a_profile_without_a_grouped_gemm_names_the_longest_kernels(tmp_path):
    engine = PlantedEngine()
    engine.profiled = lambda: {"moe_calls": 0, "longest": [["some_gemm", 3, 1.0]]}
    lines = measured(tmp_path, engine, running=(8,), passes=1)
    assert "no kernel is known as a grouped GEMM; the longest are [['some_gemm'" in lines[-1]["error"]


def test_ranks_wait_for_each_other(tmp_path):
    (tmp_path / "1.1").touch()
    child.Marks(tmp_path, 2, 0).wait()
    assert (tmp_path / "1.0").exists()
    with pytest.raises(TimeoutError, match="Rank 1 waited 0 s for the others at 1"):
        child.Marks(tmp_path, 3, 1, timeout_s=0.0).wait()


def test_the_profiler_sees_only_full_decode_steps():
    events: list[str] = []

    def start():
        events.append("start")
        return lambda: (
            events.append("end") or [("fused_moe_kernel", 192, 6000.0), ("silu", 8, 2000.0), ("launch", 9, 0.0)]
        )

    profile = worker_profile.StepProfile(lambda output: events.append("run") or output, 2, 2, 1, 2, start)
    pure = SimpleNamespace(num_scheduled_tokens={"a": 1, "b": 1}, total_num_scheduled_tokens=2)
    mixed = SimpleNamespace(num_scheduled_tokens={"a": 1, "b": 9}, total_num_scheduled_tokens=10)
    for output in (mixed, pure, pure, mixed, pure, pure, pure):
        assert profile(output) is output
    assert events == ["run", "run", "start", "run", "run", "run", "end", "run", "run"]
    assert profile.result == {
        "steps": 2,
        "kernels_ms": 4.0,
        "moe_ms": 3.0,
        "moe_calls": 96.0,
        "longest": [["fused_moe_kernel", 192, 3.0], ["silu", 8, 1.0]],
    }


def test_the_workers_runner_runs_unprofiled_afterwards():
    class Runner:
        def execute_model(self, scheduler_output):
            return scheduler_output

    worker = worker_profile.ProfilesSteps()
    worker.model_runner = Runner()
    worker.moetune_profile(2, 2, 0, 1)
    assert isinstance(worker.model_runner.execute_model, worker_profile.StepProfile)
    other = SimpleNamespace(num_scheduled_tokens={"a": 1}, total_num_scheduled_tokens=1)
    assert worker.model_runner.execute_model(other) is other
    assert worker.moetune_profiled() is None
    assert vars(worker.model_runner) == {}


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<…>", 2),
        ("void tensorrt_llm::kernels::cutlass_kernels::finalizeMoeRoutingKernel<__nv_bfloat16, …>", 2),
        ("void tensorrt_llm::kernels::cutlass_kernels::expandInputRowsKernel<__nv_bfloat16, …>", 0),
    ],
)
def test_flashinfers_kernels_that_depend_on_the_tactic_are_known_by_their_names(name, calls):
    assert worker_profile.kernel_times([(name, 2, 10.0)], 1)["moe_calls"] == calls


@dataclasses.dataclass
class ParallelConfig:
    """The fields of vLLM's `FusedMoEParallelConfig` that the share changes or checks."""

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    ep_rank: int = 0
    use_ep: bool = False

    @staticmethod
    def make(tp_size_: int, dp_size_: int = 1) -> ParallelConfig:
        return ParallelConfig(tp_size=tp_size_, dp_size=dp_size_)


def test_a_share_changes_only_how_the_experts_are_divided():
    class Config(ParallelConfig):
        pass

    ep_share.install(SimpleNamespace(FusedMoEParallelConfig=Config), 8)
    assert Config.make(tp_size_=1) == ParallelConfig(1, 1, 8, 0, True)
    with pytest.raises(RuntimeError, match="for an engine on one GPU"):
        Config.make(tp_size_=2)


def test_vllm_finds_the_share_by_an_entry_point(tmp_path, monkeypatch):
    ep_share.write_entry_point(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = [
        point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if "bench" in point.name
    ]
    monkeypatch.delenv(ep_share.VARIABLE, raising=False)
    finders = list(sys.meta_path)
    found.load()()
    assert sys.meta_path == finders  # unset, it does nothing
    monkeypatch.setenv(ep_share.VARIABLE, "8")
    monkeypatch.setitem(
        sys.modules, ep_share.MODULE, SimpleNamespace(FusedMoEParallelConfig=type("C", (ParallelConfig,), {}))
    )
    found.load()()
    assert sys.modules[ep_share.MODULE].FusedMoEParallelConfig.make(1).ep_size == 8


def test_equal_choices_of_flashinfers_tuner_have_equal_digests():
    def cache(tactic: int, runner: int) -> Any:
        shapes = SimpleNamespace(custom_op="moe::gemm1", nearest_profile=((16, 64),), runner_hash=runner)
        other = SimpleNamespace(custom_op="moe::gemm2", nearest_profile=((16, 64),), runner_hash=runner)
        entries = [(shapes, (tactic, "profile")), (other, (3, None))]
        return Entries(entries if runner else entries[::-1])

    class Entries(list):
        def items(self):
            return list(self)

    found = worker_profile.digest_of(cache(5, 0))
    assert found["count"] == 2
    assert worker_profile.digest_of(cache(5, 1)) == found
    assert worker_profile.digest_of(cache(6, 0)) != found
