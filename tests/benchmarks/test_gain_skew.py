"""The part of the benchmark of gain against skew that needs no GPU."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gain_skew
import gain_skew_report as report
from common import Journal
from gain_skew import DISTRIBUTIONS, Measurement, Place, TimeUpError
from planted import LAYER, tactic
from planted_skewed import SkewedBackend

from moetune.measure.compiling import Compilers
from moetune.measure.worker import open_benches
from moetune.tuning import final_comparison

PLACE = Place("tiny", 2, "allgather", "planted", 4)
MILLISECONDS = {
    "default": dict.fromkeys(DISTRIBUTIONS, 4.0),
    "first": {**dict.fromkeys(DISTRIBUTIONS, 2.5), "random": 1.0},
    "skewed": {**dict.fromkeys(DISTRIBUTIONS, 1.0), "random": 2.0},
    "between": dict.fromkeys(DISTRIBUTIONS, 1.4),
}
"""`first` is the fastest under random, `skewed` elsewhere, and `between` has the smallest worst slowdown."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(Place, "layer", lambda self: LAYER)
    monkeypatch.setattr(final_comparison, "SECONDS", 0.05)


def measured(folder, end=math.inf, place=PLACE):
    recorded = gain_skew.recording(LAYER, folder / "recorded.npy")
    _, alone, _ = gain_skew.regimes(place, recorded)
    table = {
        (name, alone[each].distribution): times[each] for name, times in MILLISECONDS.items() for each in DISTRIBUTIONS
    }
    backend = SkewedBackend.of(table)
    journal = Journal(folder / "journal.jsonl")
    with open_benches(backend, "cpu", isolate=False) as bench_of, Compilers(backend, None) as compilers:
        Measurement(journal, backend, "cpu", bench_of, compilers, 5.0, end).measure(place, recorded)
    return journal


def test_each_cell_has_what_was_tuned_for_random_there_and_the_worst_and_the_engine_s(tmp_path):
    journal = measured(tmp_path)
    tuned = {line["tuned"]: line["tactic"]["algorithm"] for line in journal.lines if line["kind"] == "tuned"}
    assert tuned == {**dict.fromkeys(DISTRIBUTIONS, "skewed"), "random": "first", "worst": "between"}
    cells = {line["distribution"]: line for line in journal.lines if line["kind"] == "cell"}
    assert list(cells) == list(DISTRIBUTIONS)
    for name, line in cells.items():
        chosen = {each: found["algorithm"] for each, found in line["tactics"].items()}
        assert chosen == {"random": "first", "worst": "between", "engine": "default", "here": tuned[name]}
        for each, series in line["us"].items():
            assert series == pytest.approx([1000 * MILLISECONDS[chosen[each]][name]] * len(series), rel=0.01)
        assert not line["failed"]
    assert cells["zipf:1"]["max_over_mean"] > 1.3 * cells["balanced"]["max_over_mean"]
    (found,) = report.places(journal.lines).values()
    losses = {name: [cell.loss(name) for cell in found[4].values()] for name in report.TACTICS}
    assert losses["random"] == pytest.approx([0.0] + [1.5] * 7, abs=0.02)
    assert losses["worst"] == pytest.approx([0.4] * 8, abs=0.02)
    assert losses["here"] == pytest.approx([0.0] * 8, abs=1e-9)
    assert "it is lower in 1. The mean loss changes by -91." in report.markdown(journal.lines)


def test_a_second_run_measures_nothing_and_another_tactic_its_cells_anew(tmp_path):
    lines = len(measured(tmp_path).lines)
    again = measured(tmp_path)
    assert len(again.lines) == lines
    other = next(line for line in again.lines if line["kind"] == "tuned" and line["tuned"] == "worst")
    again.add(**{**other, "tactic": dict(tactic("skewed"))})
    remeasured = measured(tmp_path)
    assert len(remeasured.lines) == lines + 1 + len(DISTRIBUTIONS)
    (found,) = report.places(remeasured.lines).values()
    assert found[4]["random"].loss("worst") == pytest.approx(1.0, abs=0.02)


def test_nothing_begins_when_the_time_is_up_and_the_next_run_goes_on(tmp_path, monkeypatch):
    with pytest.raises(TimeUpError):
        measured(tmp_path, end=0)
    assert not Journal(tmp_path / "journal.jsonl").lines
    clock = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(gain_skew.time, "time", lambda: next(clock))
        with pytest.raises(TimeUpError):
            measured(tmp_path, end=4)  # the tunes for random and the worst, a cell, a tune and its cell
    stopped = Journal(tmp_path / "journal.jsonl").lines
    assert [line["kind"] for line in stopped] == ["tuned", "tuned", "cell", "tuned", "cell"]
    assert "| 2 |" in report.markdown(stopped)
    assert measured(tmp_path).lines[: len(stopped)] == stopped


def test_the_first_places_are_every_load_and_backend_with_the_first_number_of_tokens():
    found = gain_skew.places()
    assert len(found) == len(set(map(str, found))) == 16
    assert {place.tokens for place in found[:4]} == {256}
    assert {(place.load, place.backend) for place in found[:4]} == {
        (load, backend) for load in ("allgather", "deduplicated") for backend in ("triton", "flashinfer-cutlass")
    }


def test_the_recording_has_distinct_ids_that_are_skewed_and_chosen_together(tmp_path):
    layer = LAYER.model_copy(update={"num_experts": 32, "top_k": 4})
    path = gain_skew.recording(layer, tmp_path / "recorded.npy")
    ids = np.load(path)
    assert ids.shape == (gain_skew.RECORDED_TOKENS, 4)
    assert all(len(set(row)) == 4 for row in ids[:500].tolist())
    loads = np.bincount(ids.ravel(), minlength=32)
    assert loads.max() > 1.5 * loads.mean()
    together = np.zeros((32, 32))
    for row in ids:
        together[np.ix_(row, row)] += 1
    share = loads / len(ids)
    expected = len(ids) * np.outer(share, share)
    apart = ~np.eye(32, dtype=bool)
    assert (together[apart] / expected[apart]).max() > 1.5
    before = path.read_bytes()
    assert gain_skew.recording(layer, path).read_bytes() == before
    assert gain_skew.recording(layer, tmp_path / "again.npy").read_bytes() == before


@pytest.mark.parametrize("load", ["allgather", "deduplicated"])
def test_all_distributions_of_a_place_have_its_rows_and_one_rank(tmp_path, load):
    recorded = gain_skew.recording(LAYER, tmp_path / "recorded.npy")
    place = Place("tiny", 2, load, "planted", 16)
    rows, alone, worst = gain_skew.regimes(place, recorded)
    assert list(alone) == list(DISTRIBUTIONS)
    assert {regime.rank for regime in alone.values()} == {worst.rank}
    assert {regime.buckets for regime in (*alone.values(), worst)} == {(rows,)}
    assert (rows == 32) == (load == "allgather")
    assert {each.distribution for each in worst.distributions} == {regime.distribution for regime in alone.values()}
    assert {each.weight for each in worst.distributions} == {1 / 8}
    assert worst.objective == "worst"


def line_of(distribution, tokens=16, again=None, **us):
    series = {name: None if time_us is None else [float(time_us)] * 8 for name, time_us in us.items()}
    return {
        "model": "tiny", "ep": 8, "load": "allgather", "backend": "triton", "device": "Example GPU", "kind": "cell",
        "tokens": tokens, "rows": 8 * tokens, "distribution": distribution, "us": series,
        "again": series["random"] if again is None else [float(again)] * 8, "max_over_mean": 1.25,
    }  # fmt: skip


def test_the_report_has_each_loss_the_means_and_what_the_worst_costs():
    lines = [
        line_of("random", random=100, here=100, worst=104, engine=150),
        line_of("zipf:1", random=130, here=100, worst=105, engine=120),
        line_of("random", tokens=64, random=100, here=101, worst=100, engine=100),
        line_of("zipf:1", tokens=64, random=101, here=100, worst=100, engine=None),
        {"kind": "tuned"},
    ]
    text = report.markdown(lines)
    assert (
        "| tiny EP8 allgather, triton | 16 (128) | 2 | 15.0% / 30.0% | 0.0% / 0.0% | 4.5% / 5.0% | 35.0% / 50.0% |"
        in text
    )
    assert "| 16 (128) | zipf:1 | 1.25 | 100.0 | **30.0%** | 0.0% | **5.0%** | **20.0%** | 0.0% |" in text
    assert "| 64 (512) | zipf:1 | 1.25 | 100.0 | **1.0%** | 0.0% | 0.0% | **failed** | 0.0% |" in text
    assert "the largest loss is 15.5% tuned for random and 2.5% with objective worst, means over 2 places" in text
    assert "it is lower in 2. The mean loss changes by -5.5 points, at most -0.5." in text
    assert report.markdown([{"kind": "tuned"}]) == "The journal has no cell."


def test_a_loss_within_the_noise_is_not_bold():
    cell = report.Cell(line_of("random", random=102, here=100, worst=100, engine=100, again=97))
    assert cell.noise > 0.02
    assert cell.shown("random") == "2.0%"


def test_the_command_says_what_is_left_and_reports_the_journal(tmp_path, monkeypatch, capsys):
    journal = tmp_path / "journal.jsonl"
    journal.write_text(json.dumps(line_of("random", random=100, here=100, worst=104, engine=150)) + "\n")
    assert gain_skew.main(["report", str(journal)]) == 0
    assert "tiny EP8 allgather" in capsys.readouterr().out
    seen = []

    def all_but_the_first(options, chosen, end):
        seen.extend(chosen)
        assert end <= time.time() + 10
        return [f"{place}: the time is up" for place in chosen[1:]]

    monkeypatch.setattr(gain_skew, "measure_all", all_but_the_first)
    words = ["measure", str(journal), "--only", "triton,allgather", "--tokens", "64,16", "--seconds", "10"]
    assert gain_skew.main(words) == 1
    assert [(place.load, place.backend, place.tokens) for place in seen] == [
        ("allgather", "triton", 64),
        ("allgather", "triton", 16),
    ]
    assert "allgather-triton-16: the time is up" in capsys.readouterr().err
