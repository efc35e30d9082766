"""The part of the FlashInfer benchmarks that needs no GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cliffs
import dispatch_fidelity as fidelity
import flashinfer_autotune as autotune
from common import Journal
from flashinfer_common import bf16_layer, pair, pair_us, searched, tactics_us

from moetune.search.coordinate import coordinate
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.tactic import Tactic
from moetune.workload.router import is_local


class PlantedRunner:
    """Remembers what it ran; a tactic with a negative gemm1 raises."""

    def run(self, tactic, draw=0):
        if tactic["gemm1"] < 0:
            raise RuntimeError("planted")
        self.ran = tactic, draw


class PlantedClock:
    """100 µs a unit of gemm1 + gemm2, one more for each draw and each round."""

    def warm_up(self, call, draw):
        call(draw)

    def paired_samples(self, calls, draws):
        return [[100.0 * sum(call.args[0].values()) + draw for draw in draws] for call in calls]


def test_a_journal_is_read_again_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add(model="a", rows=4, us=[1, 2])
    with path.open("a") as file:
        file.write('{"model": "b", "ro')
    again = Journal(path)
    assert again.find(model="a", rows=4)["us"] == [1, 2]
    assert again.find(model="a", rows=8) is None
    assert again.find(model="b") is None
    assert [json.loads(line)["model"] for line in path.read_text().splitlines()[:1]] == ["a"]


@pytest.mark.parametrize("torn", ['{"model": "b", "ro', '{"model":"b","us":{"1":2}', '{"model":"b","rows":8}', "12"])
def test_what_is_added_after_a_torn_line_is_found_by_the_next_reader(tmp_path, torn):
    """A line may be cut anywhere, also after a brace, or lack its newline alone."""
    path = tmp_path / "journal.jsonl"
    Journal(path).add(model="a", rows=4)
    with path.open("a") as file:
        file.write(torn)
    resumed = Journal(path)
    resumed.add(model="c", rows=16)
    resumed.add(model="d", rows=32)
    again = Journal(path)
    assert [line["model"] for line in again.lines if line["model"] != "b"] == ["a", "c", "d"]
    assert bool(again.find(model="b")) == (torn == '{"model":"b","rows":8}')


def test_the_last_line_of_a_key_counts(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for us in (1, 2):
        journal.add(rows=4, us=us)
    assert journal.find(rows=4)["us"] == 2


def test_means_are_over_draws_of_medians_over_rounds():
    assert tactics_us(PlantedRunner(), [pair((1, 2)), pair((1, 3))], (0, 4), 3, PlantedClock()) == [302.0, 402.0]


def test_a_search_runs_on_the_draws_it_is_given_and_leaves_failures_out(capsys):
    tactics = [pair((a, b)) for a in range(-2, 6) for b in range(8)]
    finalists = searched(coordinate(tactics), PlantedRunner(), (0, 1), PlantedClock())
    assert finalists[0] == pair((0, 0))
    assert all(tactic["gemm1"] >= 0 for tactic in finalists)
    assert "planted" in capsys.readouterr().out


def test_the_best_known_is_of_a_search_over_every_value():
    """However few values the choices have that it starts from."""
    ran = set()

    class Runner(PlantedRunner):
        def run(self, tactic, draw=0):
            ran.add(tactic)

    tactics = [pair((a, b)) for a in range(45) for b in range(45, 126)]
    finalists = searched(fidelity.longer_search(tactics, [pair((44, 125))]), Runner(), (0, 1), PlantedClock())
    assert finalists[0] == pair((0, 45))
    assert {tactic["gemm1"] for tactic in ran} == set(range(45))
    assert {tactic["gemm2"] for tactic in ran} == set(range(45, 126))


def test_a_recorded_table_gives_any_pair_and_the_fixed_one_exactly():
    table = {"fixed": [1, 5], "gemm1_us": {"0": 90.0, "1": 100.0}, "gemm2_us": {"5": 100.0, "6": 130.0}}
    assert pair_us(table, Tactic(gemm1=1, gemm2=5)) == 100.0
    assert pair_us(table, Tactic(gemm1=0, gemm2=6)) == 120.0


def test_layers_are_of_the_presets_shape_in_bf16():
    layer = bf16_layer("deepseek-r1")
    assert layer.precision is Precision.BF16
    assert (layer.num_experts, layer.hidden_size) == (256, 7168)


def test_a_load_or_a_dispatcher_gives_a_regime_in_flashinfers_buckets():
    layer = bf16_layer("qwen3-235b-a22b")
    assert autotune.regime_of(layer, 4, "packed").layout == "packed"
    high = autotune.regime_of(layer, 8, "vllm:deepep_high_throughput")
    assert high.layout == "deduplicated"
    assert len(high.buckets) == 21


def test_the_summary_names_the_buckets_where_moetune_is_slower():
    buckets = [
        {"rows": rows, "at": rows, "own_us": own, "moetune_us": 100.0, "noise": 0.002}
        for rows, own in ((64, 98.0), (128, 121.0), (1024, 100.0), (4096, 99.5))
    ]
    found = autotune.summary(buckets)
    assert found["slower"] == [(64, 64)]
    assert found["worst_at"] == (64, 64, 0.98)
    assert (found["worst"], found["best"]) == (0.98, 1.21)
    assert found["geomean_128_1024"] == pytest.approx(1.1)


def test_a_bucket_on_two_row_counts_counts_by_both_together_and_must_not_be_slower_on_either():
    own, ours = {"own_us": 100.0, "moetune_us": 90.0}, {"own_us": 80.0, "moetune_us": 82.0}
    found = autotune.summary(
        [{"rows": 512, "at": 512, "noise": 0.0, **own}, {"rows": 512, "at": 471, "noise": 0.0, **ours}]
    )
    assert found["worst"] == found["best"] == pytest.approx(180 / 172)
    assert found["slower"] == [(512, 471)]
    assert found["worst_at"] == (512, 471, pytest.approx(80 / 82))


def test_every_kind_and_share_has_its_cells_and_pools_are_whole_blocks():
    found = fidelity.cells(list(fidelity.SHARES), fidelity.KINDS, fidelity.TOKENS)
    assert {(cell["model"], cell["ep"], cell["kind"]) for cell in found} == {
        (model, ep, kind) for model, shares in fidelity.SHARES.items() for ep in shares for kind in fidelity.KINDS
    }
    assert all(cell["rows"] == cell["ep"] * cell["tokens"] for cell in found if cell["kind"] in ("pool", "allgather"))
    assert all(cell["bucket"] >= cell["rows"] for cell in found)
    slots = [cell for cell in found if cell["kind"] == "slot"]
    assert all(
        abs(cell["rows"] - 8 * cell["tokens"]) <= 0.02 * cell["rows"] for cell in slots if "qwen" in cell["model"]
    )


LAYER = MoELayer(num_experts=64, top_k=4, hidden_size=64, intermediate_size=64)


@pytest.mark.parametrize("kind", fidelity.KINDS)
def test_traffic_is_what_each_dispatch_produces(kind):
    regime = fidelity.regime_of(8, kind)
    shard = regime.shard(LAYER)
    routing = fidelity.traffic(LAYER, regime, 256, 0)
    local = is_local(routing.topk_ids, shard)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (256, 1 if kind == "slot" else 4)
    assert int(routing.load.sum()) == int(local.sum())
    if kind == "slot":
        assert local.all()
    if kind == "deduplicated":
        assert local.any(1).all()
        assert not local.all()
    if kind == "pool":
        empty = (routing.topk_ids < 0).all(1)
        assert torch.equal(empty, ~local.any(1))
        blocks = empty.view(8, -1).int()
        assert torch.equal(blocks, blocks.sort(dim=1).values)
    if kind == "allgather":
        assert 0.08 < local.float().mean() < 0.17


def test_traffic_differs_by_draw_and_repeats_by_number():
    regime = fidelity.regime_of(8, "deduplicated")
    first, again, other = (fidelity.traffic(LAYER, regime, 64, draw).topk_ids for draw in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_regrets_are_listed_by_kind_and_choice():
    lines = [
        {
            "kind": "slot",
            "own_us": 130.0,
            "packed_us": 102.0,
            "bucket_rows_us": 100.0,
            "moetune_us": 100.0,
            "best_us": 100.0,
        },
        {
            "kind": "slot",
            "own_us": 110.0,
            "packed_us": 100.0,
            "bucket_rows_us": 100.0,
            "moetune_us": 101.0,
            "best_us": 100.0,
        },
    ]
    own, _, _, ours = fidelity.summary(lines)
    assert (own["choice"], own["cells"], round(own["worst"], 3)) == ("own", 2, 0.3)
    assert own["geomean"] == pytest.approx((1.3 * 1.1) ** 0.5 - 1)
    assert ours["worst"] == pytest.approx(0.01)


FLAT, STEEP, SLOW = [100.0] * 5, [100.0, 100.0, 300.0, 400.0, 500.0], [300.0] * 5


def test_a_cliff_is_a_tactic_whose_slowdown_at_one_load_is_twice_that_at_another():
    line = {"us": {"gemm1": {"0": FLAT, "44": STEEP, "9": SLOW}}}
    assert cliffs.cliffs([line], "gemm1") == {"44": 5.0}
    growing = {"us": {"gemm1": {"0": [100.0, 200.0], "1": [110.0, 210.0]}}}  # all slow down alike
    assert cliffs.cliffs([growing], "gemm1") == {}


def test_a_cliff_as_seen_on_an_h200_is_found_though_all_slow_down():
    us = {"0": [100, 110, 120, 140, 160], "44": [70, 400, 870, 1500, 1710], "3": [90, 100, 110, 130, 150],
          "9": [300, 330, 400, 500, 600]}  # fmt: skip
    assert cliffs.cliffs([{"us": {"gemm1": us}}], "gemm1") == {"44": pytest.approx(1500 / 130, abs=0.01)}


def test_a_cliff_that_lies_before_the_first_load_is_known_from_other_rows():
    fewer = {"us": {"gemm1": {"0": FLAT, "44": STEEP}}}
    more = {"us": {"gemm1": {"0": FLAT, "44": [1000.0] * 5}}}
    assert cliffs.cliffs([more], "gemm1") == {}
    assert cliffs.cliffs([fewer, more], "gemm1") == {"44": 10.0}


def test_choices_that_are_over_their_cliff_are_named():
    us = {"gemm1": {"0": FLAT, "44": STEEP, "9": SLOW}, "gemm2": {"45": FLAT}}
    line = {"us": us, "own": [44, 45], "moetune": [9, 45]}
    found = {gemm: cliffs.cliffs([line], gemm) for gemm in cliffs.GEMMS}
    assert cliffs.fallen(line, "own", found) == {"gemm1 44": 5.0}
    assert cliffs.fallen(line, "moetune", found) == {}
    below = {**line, "us": {**us, "gemm1": {"0": FLAT, "44": FLAT, "9": SLOW}}}
    assert cliffs.fallen(below, "own", found) == {}


@pytest.fixture
def planted_tune(monkeypatch):
    """The questions of `tune_both`, which answers at once, and a comparison in which moetune is twice as fast."""
    asked = []

    def tune_both(journal, key, layer, regime, options):
        asked.append((layer, regime, options))
        picks = {str(rows): [1, 50] for rows in regime.buckets}
        return journal.add(**key, kind="tuned", own_s=1.0, moetune_s=1.0, own=picks, moetune=picks)

    def compare(backend, layer, regime, bucket, tuned, rows):
        own = tuned["own"][str(bucket)]
        times = {"own_us": 2.0, "moetune_us": 1.0, "untuned_us": 3.0, "noise": 0.0}
        return {"own": own, "moetune": own, **times, "environment": dict(backend.environment())}

    monkeypatch.setattr(autotune, "tune_both", tune_both)
    monkeypatch.setattr(autotune, "compare", compare)
    return asked


def run_autotune(monkeypatch, path, *words):
    monkeypatch.setattr(sys, "argv", ["flashinfer_autotune.py", str(path), *words])
    return autotune.main()


@pytest.mark.parametrize("ep", ["4", "8"])
def test_gpt_oss_is_compared_in_mxfp4_with_the_options_of_an_engine(monkeypatch, tmp_path, planted_tune, ep):
    words = ("--model", "gpt-oss-120b", "--precision", "mxfp4", "--ep", ep, "--dispatch", "allgather")
    given = ("--backend-option", "caller=sglang", "--backend-option", "mxfp4_activations=fp8")
    path = tmp_path / "out.jsonl"
    assert run_autotune(monkeypatch, path, *words, *given) == 0
    assert run_autotune(monkeypatch, path, *words) == 0, "another question of the same file"
    (layer, regime, options), (_, _, none) = planted_tune
    assert (layer.precision, layer.expert_bias, regime.ep_size) == (Precision.MXFP4, True, int(ep))
    assert options == {"caller": "sglang", "mxfp4_activations": "fp8"}
    assert none == {}
    compared = [line for line in Journal(path).lines if line["kind"] == "bucket"]
    assert {line["options"] for line in compared} == {"caller=sglang mxfp4_activations=fp8", ""}
    assert {line["environment"].get("caller") for line in compared} == {"sglang", None}
    assert run_autotune(monkeypatch, path, *words, *given) == 0
    assert len(planted_tune) == 2, "a second run takes the choices of the first"


def test_kimi_k2_5_is_refused_because_its_groups_are_smaller(monkeypatch, tmp_path, planted_tune, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_autotune(monkeypatch, tmp_path / "out.jsonl", "--model", "kimi-k2.5", "--precision", "mxint4", "--ep", "8")
    assert "groups of 128 values, those of mxint4 have 32" in capsys.readouterr().err
    assert not planted_tune
