"""The part of the every-row benchmark that needs no GPU."""

import argparse
import json
import math
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import every_row
import every_row_report as report
from choices import make_choice
from common import Journal
from every_row import Deployment
from planted import LAYER, PlantedBackend, tactic

import moetune
from moetune.backends.grouped_triton.defaults import default_config
from moetune.errors import MissError
from moetune.spec.environment import Environment
from moetune.spec.ladder import VLLM_BUCKETS
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.folders import PACKAGED_VARIABLE
from moetune.store.profile import Profile
from moetune.tuning.events import BucketStarted

PLANTED = Deployment("tiny", 2, "packed", "planted")
MILLISECONDS = {"default": 1.0, "fast": 0.5, "slow": 1.1}


def profile_of(by_rows, backend="planted", **more):
    return Profile(
        **{
            "layer": LAYER,
            "regime": Regime(ep_size=2, layout="packed", ladder=list(by_rows)),
            "backend": backend,
            "environment": Environment(device="Example GPU", strict={}),
            "choices": tuple(make_choice(rows, tactic=chosen) for rows, chosen in by_rows.items()),
            **more,
        }
    )


def measured(tmp_path, profile, backend, end=math.inf, counts=(3, 5, 7), deployment=PLANTED):
    journal = Journal(tmp_path / "journal.jsonl")
    left = every_row.measure_cells(
        deployment, profile, backend, journal, end, ladder="4,8", device="cpu", counts=counts
    )  # fmt: skip
    return journal, left


def test_the_40_row_counts_are_no_buckets_and_spread_from_1_to_8192():
    counts = every_row.row_counts()
    assert len(set(counts)) == report.NUM_ROW_COUNTS == 40
    assert counts == sorted(counts)
    buckets = {size for ladder in ("pow2", "hybrid", "vllm") for size in Regime(ladder=ladder).buckets}
    assert not buckets & set(counts)
    assert counts[0] == 3
    assert 6500 < counts[-1] < 8192
    assert all(later / earlier < 1.7 for earlier, later in pairwise(counts))
    assert counts == every_row.row_counts()


def test_a_row_count_that_is_a_bucket_of_the_profile_is_replaced_by_the_nearest_free_one():
    keys = every_row.row_counts()[::2]
    counts = every_row.row_counts(keys)
    assert len(set(counts)) == 40
    assert not set(keys) & set(counts)
    assert set(every_row.row_counts()[21::2]) <= set(counts)


def test_the_deployments_are_four_layers_of_triton_and_two_of_cutlass_under_two_loads():
    names = [str(each) for each in every_row.DEPLOYMENTS]
    assert len(set(names)) == 12
    assert names[:2] == ["qwen3-235b-a22b-ep8-allgather-triton", "qwen3-235b-a22b-ep8-deduplicated-triton"]
    assert "qwen3-coder-480b-a35b-ep16-deduplicated-triton" in names
    for each in every_row.DEPLOYMENTS:
        layer, regime = each.layer(), each.regime(None)
        assert (regime.layout or regime.dispatch) == each.load
        assert regime.shard(layer).num_local * each.ep == layer.num_experts
        if each.backend == "triton":
            assert regime.buckets == VLLM_BUCKETS
        else:
            assert (str(regime.ladder), layer.precision) == ("hybrid", "bf16")
        assert each.regime("1,2").buckets == (1, 2)


def test_deployments_are_selected_by_parts_of_their_names():
    assert every_row.selected([]) == list(every_row.DEPLOYMENTS)
    assert {each.backend for each in every_row.selected(["cutlass"])} == {"flashinfer-cutlass"}
    assert [str(each) for each in every_row.selected(["r1-ep8-a", "m2.5-ep8-d"])] == [
        "deepseek-r1-ep8-allgather-triton", "minimax-m2.5-ep8-deduplicated-triton"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="No deployment is named like mixtral"):
        every_row.selected(["mixtral"])


def test_each_cell_compares_the_choice_of_its_bucket_with_the_default_on_unseen_draws(tmp_path, monkeypatch):
    seen = []
    realize = every_row.realize
    monkeypatch.setattr(every_row, "realize", lambda *given: (seen.append(given[2:]), realize(*given))[1])
    backend = PlantedBackend(MILLISECONDS)
    journal, left = measured(tmp_path, profile_of({4: tactic("slow"), 8: tactic("fast")}), backend)
    assert left == 0
    assert [line["rows"] for line in journal.lines] == [3, 5, 7]
    assert [line["tactics"]["choice"]["algorithm"] for line in journal.lines] == ["slow", "fast", "fast"]
    ratios = [report.slowdown(line, "default") for line in journal.lines]
    assert [round(ratio.value, 2) for ratio in ratios] == [1.1, 0.5, 0.5]
    assert all(len(line["pairs"]["default"]["choice_us"]) == every_row.num_draws(7) == 32 for line in journal.lines)
    assert all(abs(a / b - 1) < 0.01 for line in journal.lines for a, b in zip(*line["again"], strict=True))
    assert sorted(seen) == sorted((rows, None, every_row.UNSEEN + draw) for rows in (3, 5, 7) for draw in range(32))


def test_a_run_that_is_out_of_time_is_continued_where_it_stopped(tmp_path, monkeypatch):
    profile = profile_of({4: tactic("slow"), 8: tactic("fast")})
    assert measured(tmp_path, profile, PlantedBackend(MILLISECONDS), end=0.0)[1] == 3
    clock = iter([1.0, 2.0])
    monkeypatch.setattr(every_row.time, "time", lambda: next(clock))
    journal, left = measured(tmp_path, profile, PlantedBackend(MILLISECONDS), end=1.5)
    assert (left, [line["rows"] for line in journal.lines]) == (2, [3])
    monkeypatch.undo()
    with journal.path.open("a") as file:
        file.write('{"model":"tiny","rows":5')  # a killed run's last line
    backend = PlantedBackend(MILLISECONDS)
    journal, left = measured(tmp_path, profile, backend)
    assert (left, backend.prepared) == (0, [5, 7])
    assert [line["rows"] for line in Journal(journal.path).lines] == [3, 5, 7]
    backend = PlantedBackend(MILLISECONDS)
    assert measured(tmp_path, profile, backend)[1] == 0
    assert backend.prepared == []


def test_only_cells_of_the_last_profile_count(tmp_path):
    measured(tmp_path, profile_of({8: tactic("slow")}), PlantedBackend(MILLISECONDS))
    journal, _ = measured(tmp_path, profile_of({8: tactic("fast")}), PlantedBackend(MILLISECONDS), counts=(3, 5))
    (found,) = report.deployed(journal.lines)
    assert list(found.cells) == [3, 5]
    assert found.against("default").gains == pytest.approx([2.0, 2.0], rel=0.01)


def test_a_choice_that_is_the_default_is_equal_and_still_shows_the_noise(tmp_path):
    journal, _ = measured(tmp_path, profile_of({8: tactic("default")}), PlantedBackend(MILLISECONDS), counts=(3,))
    (line,) = journal.lines
    assert line["pairs"] == {}
    assert report.slowdown(line, "default").value == 1.0
    assert 0 <= report.deployed(journal.lines)[0].noises[0] < 0.01


@pytest.mark.parametrize(("flaw", "reason"), [("raising", "planted failure"), ("wrong", "wrong result")])
def test_a_choice_that_fails_at_a_row_count_is_an_infinite_slowdown(tmp_path, flaw, reason):
    backend = PlantedBackend(MILLISECONDS, **{flaw: frozenset({"fast"})})
    journal, _ = measured(tmp_path, profile_of({8: tactic("fast")}), backend, counts=(3,))
    (line,) = journal.lines
    assert reason in line["failed"]["choice"]
    assert report.slowdown(line, "default").low == math.inf
    text = report.markdown(journal.lines)
    assert "| failed at 3 | 1 |" in text
    assert f"3 rows, choice: {line['failed']['choice']}" in text


def test_a_default_that_fails_is_reported_and_not_compared(tmp_path):
    backend = PlantedBackend(MILLISECONDS, raising=frozenset({"default"}))
    journal, _ = measured(tmp_path, profile_of({8: tactic("fast")}), backend, counts=(3,))
    (line,) = journal.lines
    assert report.slowdown(line, "default") is None
    assert line["again"] is None
    assert "3 rows, default: " in report.markdown(journal.lines)
    assert not report.holds(journal.lines)


CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4,
          "num_stages": 3}  # fmt: skip


def test_the_row_of_vllms_file_is_that_of_the_nearest_key(tmp_path):
    vllm = tmp_path / "vllm"
    configs = vllm / every_row.FUSED_MOE / "configs"
    configs.mkdir(parents=True)
    rows = {str(key): {**CONFIG, "num_stages": stages, "SPLIT_K": 1} for key, stages in ((1, 2), (4, 3), (16, 4))}
    name = "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    (configs / name).write_text(json.dumps({"triton_version": "3.6.0", **rows}))
    layer = moetune.layer("deepseek-r1")
    regime = Regime(ep_size=8, dispatch="allgather", ladder="vllm")
    h200, h100 = (Environment(device=device, strict={}) for device in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"))
    profile = profile_of({4: Tactic(CONFIG)}, "triton", layer=layer, regime=regime, environment=h200)
    shipped = every_row.shipped_rows(profile, vllm)
    assert {key: found["num_stages"] for key, found in shipped.items()} == {1: 2, 4: 3, 16: 4}
    assert set(shipped[4]) == set(CONFIG)
    # two keys are equally near 10; vLLM takes the first of its file
    assert [every_row.nearest(shipped, rows)["num_stages"] for rows in (2, 3, 10, 11, 8000)] == [2, 3, 3, 4, 4]
    assert every_row.shipped_rows(profile.model_copy(update={"environment": h100}), vllm) == {}
    assert every_row.shipped_rows(profile, None) == {}


def test_tritons_default_is_the_rule_of_the_kernels_engine_at_the_real_row_count():
    layer, regime = moetune.layer("deepseek-r1"), Deployment("deepseek-r1", 8, "allgather").regime(None)
    backend = every_row.backend_of("triton", kernel="vllm")
    found = [every_row.default_of(backend, layer, regime, rows) for rows in (3, 471, 7546)]
    assert found == [default_config(rows, 32, True) for rows in (3, 471, 7546)]
    assert len(set(found)) > 1


def test_the_shipped_row_is_timed_in_the_rounds_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(every_row, "shipped_rows", lambda profile, vllm: {1: tactic("slow"), 8: tactic("default")})
    journal, _ = measured(tmp_path, profile_of({8: tactic("fast")}), PlantedBackend(MILLISECONDS), counts=(3, 6))
    first, second = journal.lines
    assert first["tactics"]["shipped"] == dict(tactic("slow"))
    assert report.slowdown(first, "shipped").value == pytest.approx(0.5 / 1.1, rel=0.01)
    assert second["pairs"]["shipped"] == second["pairs"]["default"]


CUTLASS = Deployment("tiny", 2, "packed", "flashinfer-cutlass")


def test_flashinfers_own_choice_is_timed_twice_and_the_untuned_default_apart(tmp_path, monkeypatch):
    timed = []

    class Bench(every_row.Bench):
        def samples(self, tactics, draws):
            timed.append([each["algorithm"] for each in tactics])
            return super().samples(tactics, draws)

    monkeypatch.setattr(every_row, "Bench", Bench)
    monkeypatch.setattr(
        every_row, "own_choices", lambda key, journal, profile, rows: dict.fromkeys(rows, tactic("slow"))
    )
    journal, _ = measured(
        tmp_path, profile_of({8: tactic("fast")}), PlantedBackend(MILLISECONDS), counts=(3,), deployment=CUTLASS
    )
    assert timed[1::2] == [["slow", "fast", "slow"], ["default", "fast"]]
    (line,) = journal.lines
    assert set(line["pairs"]) == {"own", "default"}
    assert report.slowdown(line, "own").value == pytest.approx(0.5 / 1.1, rel=0.01)
    assert report.slowdown(line, "default").value == pytest.approx(0.5, rel=0.01)


def test_flashinfers_autotune_runs_once_and_its_choices_are_journaled(tmp_path, monkeypatch):
    class Backend:
        def prepare(self, problem):
            return problem

    tuned = []
    monkeypatch.setattr(every_row, "backend_of", lambda name: Backend())
    monkeypatch.setattr(every_row, "warm_flashinfer", lambda: None)
    monkeypatch.setattr(every_row, "unseen_problem", lambda layer, regime, rows, draws: rows)
    monkeypatch.setattr(every_row, "own_autotune", lambda runner: tuned.append(runner) or 20.0)
    monkeypatch.setattr(every_row, "own_pick", lambda runner: Tactic(gemm1=runner, gemm2=7))
    profile, key = profile_of({8: Tactic(gemm1=0, gemm2=1)}), {"model": "tiny", "profile": "a"}
    first = every_row.own_choices(key, Journal(tmp_path / "own.jsonl"), profile, [3, 5])
    again = every_row.own_choices(key, Journal(tmp_path / "own.jsonl"), profile, [3, 5])
    assert first == again == {3: Tactic(gemm1=3, gemm2=7), 5: Tactic(gemm1=5, gemm2=7)}
    assert tuned == [profile.regime.tune_max_num_tokens]
    every_row.own_choices({**key, "profile": "b"}, Journal(tmp_path / "own.jsonl"), profile, [3])
    assert len(tuned) == 2


def options_of(tmp_path, **more):
    given = {"journal": tmp_path / "journal.jsonl", "store": tmp_path / "store", "tune": False, "ladder": "4",
             "kernel": "builtin", "vllm": None}  # fmt: skip
    return argparse.Namespace(**{**given, **more})


def test_a_profile_is_taken_from_the_store_and_measured_only_with_tune(tmp_path, monkeypatch):
    asked = []

    def tune(layer, regime, backend, store, *, frozen, on_event):
        asked.append((layer.name, str(regime.ladder), store, frozen))
        on_event(BucketStarted(4, 0, 1, 1, {}))
        return "profile"

    monkeypatch.setattr(moetune, "tune", tune)
    deployment = Deployment("deepseek-r1", 8, "allgather")
    for tuning in (False, True):
        options = options_of(tmp_path, tune=tuning)
        regime = deployment.regime(options.ladder)
        assert every_row.stored_or_tuned(deployment, regime, None, options, math.inf) == "profile"
        with pytest.raises(every_row.TimeUpError):
            every_row.stored_or_tuned(deployment, regime, None, options, 0.0)
    assert [frozen for *_, frozen in asked] == [True, True, False, False]
    assert asked[0] == ("deepseek-r1", "4", tmp_path / "store", True)


def test_without_tune_a_profile_that_is_not_stored_is_an_error(tmp_path):
    deployment = Deployment("deepseek-r1", 8, "allgather", "torch")
    with pytest.raises(MissError):
        every_row.stored_or_tuned(deployment, deployment.regime("4"), "torch", options_of(tmp_path), math.inf)


CONFIG_JSON = {"model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8,
               "num_experts_per_tok": 2, "hidden_act": "silu", "torch_dtype": "bfloat16"}  # fmt: skip


def test_a_deployment_is_tuned_and_measured_on_the_cpu_and_the_next_run_needs_no_tune(tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG_JSON))
    monkeypatch.setattr(every_row, "row_counts", lambda keys: [3, 5])
    deployment = Deployment(str(config), 2, "allgather", "torch")
    options = options_of(tmp_path, tune=True)
    assert every_row.measure(deployment, options, math.inf) == ""
    lines = Journal(options.journal).lines
    assert [(line["rows"], line["kernel"], line["ladder"], line["buckets"]) for line in lines] == [
        (3, "", "4", 1), (5, "", "4", 1)
    ]  # fmt: skip
    assert all(line["again"] and not line["failed"] for line in lines)
    monkeypatch.setattr(every_row, "row_counts", lambda keys: [3, 5, 6])
    options.tune = False
    assert every_row.measure(deployment, options, 0.0) == "the time is up, 1 cells are left"
    assert every_row.measure(deployment, options, math.inf) == ""
    assert [line["rows"] for line in Journal(options.journal).lines] == [3, 5, 6]


def dies(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_deployment_alone(tmp_path, capsys, monkeypatch):
    deployments = [Deployment("no-such-model", 8, load, "torch") for load in ("allgather", "deduplicated")]
    monkeypatch.setattr(every_row, "measure", dies)
    left = every_row.measure_all(options_of(tmp_path), deployments[:1], math.inf)
    assert left == ["no-such-model-ep8-allgather-torch: its process died"]
    monkeypatch.undo()
    left = every_row.measure_all(options_of(tmp_path), deployments, math.inf)
    assert [line.split(":")[0] for line in left] == [str(each) for each in deployments]
    assert all("Unknown model" in line for line in left)
    assert every_row.measure_all(options_of(tmp_path), deployments, 0.0)[1].endswith(": the time is up")


def test_the_measure_command_uses_no_packaged_profile_and_says_what_is_not_complete(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setenv(PACKAGED_VARIABLE, "1")

    def measure_all(options, deployments, end):
        given.append((options.tune, deployments, os.environ[PACKAGED_VARIABLE]))
        return ["a: why"] if options.tune else []

    monkeypatch.setattr(every_row, "measure_all", measure_all)
    arguments = ["measure", str(tmp_path / "j.jsonl"), "--store", str(tmp_path), "--only", "minimax,cutlass"]
    assert every_row.main(arguments) == 0
    assert every_row.main([*arguments, "--tune"]) == 1
    assert given == [(tuning, every_row.selected(["minimax", "cutlass"]), "0") for tuning in (False, True)]
    assert "All is measured.\n1 deployments are not complete." in capsys.readouterr().err


def test_a_folder_that_is_no_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="has no model_executor"):
        every_row.vllm_folder(tmp_path)
    kernel = tmp_path / "vllm" / every_row.FUSED_MOE / "fused_moe.py"
    kernel.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    kernel.touch()
    monkeypatch.setattr(every_row, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="finds another vLLM"):
        every_row.vllm_folder(tmp_path / "vllm")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert every_row.vllm_folder(tmp_path / "vllm") == tmp_path / "vllm"


def planted_cell(rows, choice_us, default_us=100.0, shipped_us=None, deployment=PLANTED, **more):
    """A cell with 16 draws; draw d takes d % 3 µs more."""

    def series(us):
        return [us + draw % 3 for draw in range(16)]

    others = {"default": default_us} | ({"shipped": shipped_us} if shipped_us else {})
    names = {"choice": {"m": 1}, **{name: {"m": place} for place, name in enumerate(others, 2)}}
    return {
        "model": deployment.model, "ep": deployment.ep, "load": deployment.load, "backend": deployment.backend,
        "kernel": "vllm", "ladder": "vllm", "device": "Example GPU", "profile": "a", "kind": "cell", "rows": rows,
        "buckets": 18, "tactics": names, "failed": {}, "again": [series(100.0), series(100.1)],
        "pairs": {name: {"choice_us": series(choice_us), "other_us": series(us)} for name, us in others.items()},
    } | more  # fmt: skip


GOOD = [planted_cell(rows, 90.0) for rows in every_row.row_counts()]


def test_a_journal_without_a_slower_cell_holds():
    assert report.holds(GOOD)
    text = report.markdown(GOOD)
    assert "No cell's interval lies wholly beyond 1% slower." in text
    assert "| tiny EP2 packed, planted (vllm) | vllm | Example GPU | 18 | 40 of 40 | 1.110× |" in text
    assert "- planted vllm, ladder vllm, Example GPU: 1.1100× over the default, 40 cells; goal 1.06×" in text
    assert "vLLM's file" not in text


def test_a_cell_whose_interval_lies_wholly_beyond_1_percent_slower_is_listed():
    lines = [*GOOD[:-1], planted_cell(GOOD[-1]["rows"], 105.0)]
    assert not report.holds(lines)
    text = report.markdown(lines)
    assert f"| +5.0% [+4.9%, +5.0%] at {GOOD[-1]['rows']} | 1 |" in text
    assert (
        f"- tiny EP2 packed, planted (vllm), {GOOD[-1]['rows']} rows: +5.0% [+4.9%, +5.0%] against the default" in text
    )
    assert "`1` against `2`" in text


def test_a_cell_that_may_be_less_than_1_percent_slower_is_not_listed():
    uncertain = planted_cell(GOOD[-1]["rows"], 101.5)
    us = uncertain["pairs"]["default"]["choice_us"]
    uncertain["pairs"]["default"]["choice_us"] = [value + (3 if draw % 2 else -3) for draw, value in enumerate(us)]
    ratio = report.slowdown(uncertain, "default")
    assert ratio.value > 1.01 > ratio.low
    assert report.holds([*GOOD[:-1], uncertain])


def test_a_cell_slower_than_vllms_file_alone_is_listed_too():
    shipped = Deployment("shipped", 8, "allgather", "planted")
    lines = [planted_cell(line["rows"], 90.0, shipped_us=95.0, deployment=shipped) for line in GOOD]
    assert report.holds([*GOOD, *lines])
    lines[3] = planted_cell(lines[3]["rows"], 90.0, shipped_us=85.0, deployment=shipped)
    assert not report.holds([*GOOD, *lines])
    text = report.markdown([*GOOD, *lines])
    assert "over vLLM's file" in text
    assert f"{lines[3]['rows']} rows: +5.8% [+5.8%, +5.8%] against vLLM's file" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| tiny EP2")]
    assert "| – | – | – |" in row


def test_missing_cells_and_a_small_mean_gain_do_not_hold():
    assert not report.holds([])
    assert report.markdown([]) == "The journal has no cell."
    assert not report.holds(GOOD[:-1])
    assert "| 39 of 40 |" in report.markdown(GOOD[:-1])
    small = [planted_cell(line["rows"], 96.0) for line in GOOD]
    assert not report.holds(small)
    assert report.holds(small, least_gain=1.04)


def test_each_backends_cells_have_a_mean_of_their_own():
    other = Deployment("tiny", 2, "packed", "other")
    lines = [*GOOD, *(planted_cell(line["rows"], 97.0, deployment=other) for line in GOOD)]
    means = {key[0]: len(gains) for key, gains in report.gains_over_default(report.deployed(lines)).items()}
    assert means == {"planted": 40, "other": 40}
    assert not report.holds(lines)


def test_the_report_command_prints_the_journal_and_says_whether_the_claim_holds(tmp_path, capsys):
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GOOD))
    assert every_row.main(["report", str(path)]) == 0
    assert report.markdown(GOOD) in capsys.readouterr().out
    assert every_row.main(["report", str(path), "--least-gain", "1.2"]) == 1
    with path.open("a") as file:
        file.write(json.dumps(planted_cell(3, 105.0)) + "\n")
    assert every_row.main(["report", str(path)]) == 1
