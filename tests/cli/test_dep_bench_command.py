"""`moetune dep-bench`: over two processes of torchrun on the CPU, and as one rank of many in this process."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import click
import planted_points
import pytest

from moetune.dep_bench import process_group, run
from moetune.dep_bench.process_group import Ranks
from moetune.dep_bench.result import DepBench

DEPLOYED = ("--ladder", "8,32", "--draws", "1", "--backend", "torch", "--device", "cpu")


@pytest.fixture
def words(tiny, tmp_path):
    return ["dep-bench", "--model", tiny(), *DEPLOYED, "--store", tmp_path / "store", "--journal", tmp_path / "j.jsonl"]


def test_one_process_is_one_rank_of_many(moetune, words, tmp_path):
    options = ("--ep", "4", "--dispatch", "alltoall", "--layout", "deduplicated", "--tokens", "4,16")
    ran = moetune(*words, *options, "--routing", "random", "--json")
    assert ran.exit_code == 0, ran.stderr
    found = DepBench.model_validate(json.loads(ran.stdout))
    assert (found.ranks, found.regime.ep_size, [point.tokens for point in found.points]) == (1, 4, [4, 16])
    for point in found.points:
        assert [arm.arm for arm in point.arms] == ["default", "pure_ep", "dispatcher"]
        assert [part.part for part in point.parts] == ["router", "top-k", "experts"]
        assert max(arm.error for arm in point.arms) < 1e-5
        assert (point.plan_bytes, point.received_bytes, point.fidelity) == (0, 0, None)
        assert point.rows_low == point.rows_high
    # 16 experts, top-2, of which a token has one on 4 of them with the chance 1 − C(12, 2)/C(16, 2) = 0.45
    assert [point.rows_low for point in found.points] == [7, 29]
    again = moetune(*words, *options, "--routing", "random", "--seconds", "0", "--json")
    assert json.loads(again.stdout)["points"] == json.loads(ran.stdout)["points"]
    late = moetune(*words, *options, "--routing", "powerlaw:1", "--seconds", "0").stdout
    assert "not measured for lack of time: 4 tokens under powerlaw:1, 16 tokens under powerlaw:1" in late


def test_the_result_is_printed_before_the_ranks_end(moetune, words, monkeypatch):
    """NCCL may never end, and a result of many minutes would be lost."""

    @contextmanager
    def joined(device):
        yield Ranks(device=device)
        click.echo("the ranks end")

    monkeypatch.setattr(process_group, "joined", joined)
    monkeypatch.setattr(run, "dep_bench", lambda *given, **options: planted_points.document(planted_points.point()))
    ran = moetune(*words, "--ep", "4", "--dispatch", "allgather", "--json")
    assert ran.exit_code == 0, ran.stderr
    document, end = json.JSONDecoder().raw_decode(ran.stdout)
    assert DepBench.model_validate(document) == planted_points.document(planted_points.point())
    assert ran.stdout[end:].strip() == "the ranks end"


@pytest.mark.slow
def test_two_processes_of_torchrun_agree_and_one_prints(words, tmp_path):
    options = ["--ep", "2", "--dispatch", "allgather", "--tokens", "8", "--json", "--wire", "fp4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "moetune"]
    ran = subprocess.run(
        [*command, *map(str, words), *options, "--wire-routing", "packed_topk"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = DepBench.model_validate(json.loads(ran.stdout))
    assert (found.ranks, found.wire, found.wire_routing) == (2, "fp4", "packed_topk")
    assert [point.routing for point in found.points] == ["random", "zipf:0.5"]
    for point in found.points:
        assert (point.rows_low, point.rows_high) == (16, 16)
        assert max(arm.error for arm in point.arms) < 1e-5
        assert point.plan_bytes == point.received_bytes == 8 * (64 // 2 + 64 // 16 + 2 * 4)
        assert len(point.fidelity_by_rank) == 2
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--ep", "4"), "with attention DP, and this deployment has none"),
        (("--ep", "4", "--dp", "--wire", "fp4"), "One process has no wire"),
        (("--ep", "4", "--dp", "--tokens", "8,x"), "--tokens must be batch sizes, given '8,x'"),
        (("--ep", "4", "--dp", "--tokens", "0"), "The batch sizes must be at least 1"),
        (("--ep", "4", "--dp", "--routing", "balanced"), "A router's logits cannot have the distribution"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_tuned(moetune, words, given, message, tmp_path):
    ran = moetune(*words, *given)
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert not (tmp_path / "store").exists()
