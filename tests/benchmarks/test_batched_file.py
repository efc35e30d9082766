"""The part of the benchmark of the batched kernel's file that needs no GPU."""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import batched_file
from batched_file import Deployment
from choices import make_choice
from common import Journal
from planted import PlantedBackend, tactic

import moetune
from moetune.backends.batched_triton.backend import BatchedTritonBackend
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.space import tactic_of
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile

TINY = Deployment("tiny", 2, 8)
LAYER = MoELayer(num_experts=8, top_k=2, hidden_size=8, intermediate_size=8, precision="fp32")
MILLISECONDS = {"default": 1.0, "own": 0.5, "all-gather": 0.6, "deduplicated": 0.5}
TACTICS = {
    "choice": tactic("own"), "default": tactic("default"), "allgather": tactic("all-gather"),
    "deduplicated": tactic("deduplicated"),
}  # fmt: skip
H200 = Environment(device="NVIDIA H200", strict={})


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(Deployment, "layer", lambda self: LAYER if self.model == "tiny" else moetune.layer(self.model))


def measured(tmp_path, backend, end=math.inf, tactics=TACTICS):
    journal = Journal(tmp_path / "journal.jsonl")
    left = batched_file.measure_cells(TINY, tactics, backend, journal, end, where="GPU", device="cpu")
    return journal, left


def profile_of(deployment, regime, backend, chosen):
    return Profile(
        layer=deployment.layer(), regime=regime, backend=backend, environment=H200,
        choices=(make_choice(deployment.capacity, tactic=chosen),),
    )  # fmt: skip


def test_every_deployment_fits_both_kernels():
    for each in batched_file.DEPLOYMENTS:
        layer = each.layer()
        assert BatchedTritonBackend().unsupported(layer, each.batched()) is None
        assert each.batched().buckets == (each.capacity,)
        for load in batched_file.GROUPED:
            assert TritonBackend().unsupported(layer, each.grouped(load)) is None
            assert each.grouped(load).buckets == (each.capacity,)
    assert len({str(each) for each in batched_file.DEPLOYMENTS}) == len(batched_file.DEPLOYMENTS)
    assert batched_file.DEPLOYMENTS[0].steps() == [4, 16, 64, 128, 256]
    assert [str(each) for each in batched_file.selected("r1,coder")] == [
        "qwen3-coder-480b-a35b-ep16-256", "deepseek-r1-ep16-256"
    ]  # fmt: skip


def test_each_cell_compares_all_tactics_at_one_number_of_tokens_on_unseen_draws(tmp_path, monkeypatch):
    seen = []
    realize = batched_file.realize
    monkeypatch.setattr(batched_file, "realize", lambda *given: (seen.append(given[2:]), realize(*given))[1])
    backend = PlantedBackend(MILLISECONDS)
    journal, left = measured(tmp_path, backend)
    assert left == 0
    assert [line["step"] for line in journal.lines] == TINY.steps() == [1, 2, 4, 8]
    assert backend.prepared == [TINY.capacity] * 4
    assert seen == [
        (step * 2, None, batched_file.UNSEEN + draw) for step in TINY.steps() for draw in range(batched_file.DRAWS)
    ]
    ratios = [batched_file.slowdown(line, name).value for line in journal.lines for name in ("allgather", "default")]
    assert ratios == pytest.approx([0.5 / 0.6, 0.5] * 4, rel=0.01)
    last = batched_file.markdown(journal.lines).splitlines()[-1]
    assert re.fullmatch(r"\| geometric mean \| \| 1\.(20\d|19\d)× \| 1\.000× \| (2\.00\d|1\.99\d)× \| – \|", last)
    assert batched_file.holds(journal.lines, [TINY])


def test_a_run_that_is_out_of_time_is_continued_and_other_tactics_are_measured_again(tmp_path, monkeypatch):
    backend = PlantedBackend(MILLISECONDS)
    assert measured(tmp_path, backend, end=0.0)[1] == 4
    clock = iter([1.0, 2.0])
    monkeypatch.setattr(batched_file.time, "time", lambda: next(clock))
    journal, left = measured(tmp_path, backend, end=1.5)
    assert (left, [line["step"] for line in journal.lines]) == (3, [1])
    assert not batched_file.holds(journal.lines, [TINY]), "cells are missing"
    monkeypatch.undo()
    monkeypatch.setattr(Deployment, "layer", lambda self: LAYER)
    journal, left = measured(tmp_path, backend)
    assert (left, [line["step"] for line in journal.lines]) == (0, [1, 2, 4, 8])
    journal, _ = measured(tmp_path, backend, tactics={**TACTICS, "choice": tactic("all-gather")})
    assert [line["step"] for line in journal.lines] == [1, 2, 4, 8] * 2
    assert all(line["tactics"]["choice"] == dict(tactic("all-gather")) for line in journal.lines[4:])
    assert not batched_file.holds(journal.lines, [TINY]), "the deduplicated row is faster"


def test_a_row_of_the_grouped_file_that_cannot_run_is_reported(tmp_path):
    journal, _ = measured(tmp_path, PlantedBackend(MILLISECONDS, raising=frozenset({"all-gather"})))
    assert "failed: RuntimeError: planted failure" in batched_file.markdown(journal.lines)
    assert batched_file.holds(journal.lines, [TINY])


def test_the_rows_are_compared_as_the_batched_kernel_runs_them(tmp_path):
    deployment = Deployment("deepseek-r1", 16)
    own = Tactic(BLOCK_SIZE_M=32, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128)
    batched = profile_of(deployment, deployment.batched(), "batched-triton", own)
    grouped = {
        load: profile_of(deployment, deployment.grouped(load), "triton", tactic_of(64, size, 256, 16, 8, 4))
        for load, size in (("allgather", 128), ("deduplicated", 64))
    }
    assert batched_file.tactics_of(deployment, batched, grouped, None) == {
        "choice": own,
        "default": Tactic(BLOCK_SIZE_M=64, BLOCK_SIZE_N=128, BLOCK_SIZE_K=128),
        "allgather": Tactic(BLOCK_SIZE_M=64, BLOCK_SIZE_N=128, BLOCK_SIZE_K=128),
        "deduplicated": Tactic(BLOCK_SIZE_M=64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128),
    }
    folder = tmp_path / batched_file.FUSED_MOE / "configs"
    folder.mkdir(parents=True)
    rows = {str(key): dict(tactic_of(size, 32, 64, 1, 4, 3)) for key, size in ((1, 16), (4096, 128), (9000, 256))}
    name = "E=16,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    (folder / name).write_text(json.dumps({"triton_version": "3.6.0", **rows}))
    found = batched_file.tactics_of(deployment, batched, grouped, tmp_path)
    assert found["shipped"] == Tactic(BLOCK_SIZE_M=128, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64)


def test_a_deployment_is_tuned_for_both_kernels_and_then_measured(tmp_path, monkeypatch):
    asked = []

    def tune(layer, regime, backend, store, *, on_event):
        asked.append((regime.layout or regime.dispatch, backend.name, backend.kernel, store))
        chosen = Tactic(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64)
        chosen = chosen if backend.name == "batched-triton" else tactic_of(16, 64, 64, 1, 4, 3)
        return profile_of(TINY, regime, backend.name, chosen)

    monkeypatch.setattr(moetune, "tune", tune)
    cells = []
    monkeypatch.setattr(batched_file, "measure_cells", lambda *given, **named: cells.append((given, named)) or 2)
    options = argparse.Namespace(kernel="builtin", store=tmp_path, vllm=None, journal=tmp_path / "journal.jsonl")
    reason = batched_file.measure(TINY, options, math.inf)
    assert reason == "the time is up, 2 cells are left"
    assert asked == [
        ("batched", "batched-triton", "builtin", tmp_path),
        ("allgather", "triton", "builtin", tmp_path),
        ("deduplicated", "triton", "builtin", tmp_path),
    ]
    ((given, named),) = cells
    assert given[0] == TINY
    assert set(given[1]) == {"choice", "default", "allgather", "deduplicated"}
    assert named["where"] == "NVIDIA H200"
