"""The part of the regime gap benchmark that needs no GPU."""

import argparse
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import regime_gap as gap
import regime_gap_report as report
from common import Journal
from planted import LAYER, PlantedBackend, tactic
from processes import children
from regime_gap_report import COMPARED, DEFAULT

from moetune.spec.tactic import Tactic

ENVIRONMENT = {"device": "planted", "strict": {"torch": "2"}}


def entry(under, us, against=None, **more):
    return {"tactic": {"m": us}, "tuned_under": under, "us": us, "ratio": against and us / against, **more}


def cell(load, rows, entries, model="a", ep=8):
    return {"model": model, "ep": ep, "load": load, "rows": rows, "own_us": 100.0, "noise": 0.01, "entries": entries}


CELLS = [
    cell("packed", 16, [entry(["packed", "pool"], 100.0, 100.0), entry(["allgather"], 125.0, 100.0)]),
    cell("packed", 64, [entry(["packed"], 100.0, 100.0), entry(["allgather", DEFAULT], 180.0, 100.0)]),
    cell("slot", 64, [entry(["slot"], 100.0, 100.0), {"tactic": {"m": 1}, "tuned_under": ["pool"], "failed": "boom"}]),
]


class PlantedClock:
    """50 µs for `fast`, 80 for `middle`, 100 for others, one more for each draw; runs every call once."""

    eager: dict[int, str] = {}

    def warm_up(self, call, draw):
        call(draw)

    def paired_samples(self, calls, draws, before=lambda position, runs: None):
        for position, call in enumerate(calls):
            before(position, 1)
            call(0)
        base = {"fast": 50.0, "middle": 80.0}
        return [[base.get(call.args[0]["algorithm"], 100.0) + draw for draw in draws] for call in calls]


def test_every_layer_ep_and_load_has_a_tune_and_a_cell_for_each_bucket():
    tunings, cells, left_out = gap.plan(gap.MODELS, gap.EP_SIZES, COMPARED, gap.ROWS)
    assert len(set(tunings)) == len(tunings) == 2 * 2 * 5
    assert len(set(cells)) == len(cells) == 2 * (2 * 5 * 5 - 1)
    assert left_out == ["pool at EP32, 16 rows: a pool has ep equal blocks"]
    assert all(cell.rows % 32 == 0 for cell in cells if (cell.load, cell.ep) == ("pool", 32))


def test_a_pool_without_any_bucket_is_left_out_with_the_reason():
    tunings, _, left_out = gap.plan(["a"], [32], COMPARED, [16])
    assert {tuning.load for tuning in tunings} == set(COMPARED) - {"pool"}
    assert "multiples of 32" in left_out[0]


def test_an_unknown_load_is_refused():
    with pytest.raises(SystemExit, match="Unknown loads"):
        gap.plan(["a"], [8], ["packed", "wrapped"], [16])


@pytest.mark.parametrize("load", COMPARED)
def test_the_regime_of_a_load_has_its_dispatch_layout_and_buckets(load):
    regime = gap.regime_of(8, load, "16,64")
    assert regime.buckets == (16, 64)
    assert (regime.dispatch, regime.layout) == (("allgather", None) if load == "allgather" else ("alltoall", load))
    assert regime.with_default_distribution("balanced") == regime


def test_cells_begin_once_all_tunes_of_their_layer_and_ep_are_done_and_before_further_tunes():
    tunings, cells, _ = gap.plan(["a", "b"], [8], ["packed", "slot"], [16, 64])
    done, begun, order = set(), set(), []
    while job := gap.next_job(tunings, cells, done, begun):
        begun.add(job)
        done.add(job)
        order.append(job)
    assert set(order) == {*tunings, *cells}
    assert len(order) == len(tunings) + len(cells)
    assert [(job.kind, job.model) for job in order] == [
        ("tuned", "a"), ("tuned", "b"), ("tuned", "a"), *[("cell", "a")] * 4, ("tuned", "b"), *[("cell", "b")] * 4
    ]  # fmt: skip


def test_no_cell_begins_while_a_tune_of_its_layer_is_not_done():
    tunings, cells, _ = gap.plan(["a"], [8], ["packed", "slot"], [16])
    assert gap.next_job(tunings, cells, {tunings[0]}, set(tunings)) is None


def test_a_cell_takes_the_tactics_of_its_own_rows_layer_and_ep(tmp_path):
    tunings, cells, _ = gap.plan(["a", "b"], [8, 32], ["packed", "pool"], [16, 64])
    journal = Journal(tmp_path / "journal.jsonl")
    for at, tuning in enumerate(tunings):
        buckets = gap.regime_of(tuning.ep, tuning.load, tuning.ladder).buckets
        choices = [{"rows": rows, "tactic": {"m": 1000 * at + rows}, "default_tactic": {"m": -at}} for rows in buckets]
        journal.add(**asdict(tuning), choices=choices)
    of_cell = {(c.model, c.ep, c.load, c.rows): gap.tactics_of(c, journal, tunings) for c in cells}
    at = {(t.model, t.ep, t.load): index for index, t in enumerate(tunings)}
    assert of_cell["b", 8, "pool", 64] == {
        "pool": Tactic(m=1000 * at["b", 8, "pool"] + 64),
        "packed": Tactic(m=1000 * at["b", 8, "packed"] + 64),
        DEFAULT: Tactic(m=-at["b", 8, "pool"]),
    }
    assert set(of_cell["a", 32, "packed", 16]) == {"packed", DEFAULT}


def test_what_a_tune_chose_is_compiled_for_the_other_loads_at_its_rows():
    class Requests(list):
        def request(self, layer, regime, rows, tactics):
            self.append((layer.name, regime.ep_size, regime.layout, rows, tactics))

    tunings, cells, _ = gap.plan(["deepseek-r1", "qwen3-235b-a22b"], [8, 32], ["packed", "pool", "slot"], [16, 64])
    tuning = next(t for t in tunings if (t.model, t.ep, t.load) == ("deepseek-r1", 32, "pool"))
    requests = Requests()
    gap.request_elsewhere(requests, tuning, {"choices": [{"rows": 64, "tactic": {"m": 1}}]}, cells)
    assert sorted(requests) == [("deepseek-r1", 32, load, 64, [Tactic(m=1)]) for load in ("packed", "slot")]


def compared(backend, tactics):
    regime = gap.regime_of(2, "packed", "4")
    return gap.compare(LAYER, regime, 4, backend, "cpu", tactics, "packed", PlantedClock())


NAMES = {"default": 0.0, "fast": 0.0, "middle": 0.0}


def test_every_distinct_tactic_is_timed_once_against_the_own_one():
    tactics = {"packed": tactic("fast"), "slot": tactic("middle"), "pool": tactic("fast"), DEFAULT: tactic("default")}
    found = compared(PlantedBackend(NAMES), tactics)
    assert [each["tuned_under"] for each in found["entries"]] == [["packed", "pool"], ["slot"], [DEFAULT]]
    assert found["own_us"] == 57.5  # over sixteen draws
    assert [each["ratio"] for each in found["entries"]] == [
        1.0,
        pytest.approx(87.5 / 57.5),
        pytest.approx(107.5 / 57.5),
    ]
    assert found["noise"] == 0.0
    assert found["samples"] == 16 * gap.ROUNDS[1]


@pytest.mark.parametrize(("flaw", "reason"), [("raising", "planted failure"), ("wrong", "wrong result")])
def test_a_tactic_that_fails_under_another_load_is_reported_and_the_others_are_timed(flaw, reason):
    backend = PlantedBackend(NAMES, **{flaw: frozenset({"middle"})})
    found = compared(backend, {"packed": tactic("fast"), "slot": tactic("middle"), "pool": tactic("default")})
    _, slot, pool = found["entries"]
    assert reason in slot["failed"]
    assert "us" not in slot
    assert pool["ratio"] > 1


def test_without_its_own_tactic_a_cell_keeps_the_others_times_and_claims_no_ratio():
    backend = PlantedBackend(NAMES, raising=frozenset({"fast"}))
    found = compared(backend, {"packed": tactic("fast"), "slot": tactic("middle")})
    assert (found["own_us"], found["noise"]) == (None, None)
    assert "planted failure" in found["entries"][0]["failed"]
    assert (found["entries"][1]["us"], found["entries"][1]["ratio"]) == (87.5, None)
    row = {**cell("packed", 4, found["entries"]), **found}
    assert "| 4 | packed | failed |  | – | failed | – | ? | – | – |" in report.markdown([row], [], [])


def test_a_job_that_raises_is_reported_and_one_out_of_time_is_not_an_error():
    def late():
        raise gap._TimeUpError

    assert gap.attempt(late) == (None, None)
    assert gap.attempt(dict, {"a": 1}) == ({"a": 1}, None)
    line, error = gap.attempt(int, "x\ny")
    assert line is None
    assert error.startswith("ValueError: invalid literal")


def test_the_summary_has_geomean_and_worst_of_each_pair_of_loads():
    found = {(line["tuned_under"], line["run_under"]): line for line in report.summary(CELLS)}
    across = found["allgather", "packed"]
    assert across["geomean"] == pytest.approx(1.5)
    assert (across["worst"], across["cells"]) == (1.8, 2)
    assert across["worst_at"] == {"model": "a", "ep": 8, "rows": 64}
    assert found["pool", "packed"]["worst"] == 1.0
    assert set(found) == {("allgather", "packed"), ("pool", "packed"), (DEFAULT, "packed")}


def test_the_table_distinguishes_own_same_slower_missing_and_failed():
    text = report.markdown(CELLS, [], ["pool at EP32, 16 rows: why"])
    assert "### a, EP8" in text
    assert "| 16 | packed | 100.0 | 1.0% | +25.0 % | own | – | – | same | – |" in text
    assert "| 64 | slot | 100.0 | 1.0% | – | – | – | own | failed | – |" in text
    assert "| allgather | +50.0 % / +80.0 % (64) |" in text
    assert "- a EP8 slot, 64 rows, tuned under pool: m=1: boom" in text
    assert "- pool at EP32, 16 rows: why" in text
    assert "All layers" not in text


def test_layers_and_ep_sizes_have_tables_of_their_own_and_one_for_all():
    text = report.markdown([*CELLS, cell("packed", 16, CELLS[0]["entries"], ep=32)], [], [])
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### a, EP8", "### a, EP32", "### All layers and EP sizes"
    ]  # fmt: skip


def test_rejections_while_tuning_are_counted_by_reason():
    choices = [{"rejected": [[{}, "cliff: 3 times"], [{}, "cliff: 9 times"]]}, {"rejected": [[{}, "wrong result: 1"]]}]
    tuning = {"model": "a", "ep": 8, "load": "slot", "choices": choices}
    assert report.rejections([tuning, {**tuning, "choices": []}]) == ["a EP8 slot: 2 × cliff, 1 × wrong result"]


def test_lines_of_another_environment_are_not_mixed_in():
    same = {"environment": {**ENVIRONMENT, "informative": {"host": "b"}}}
    report.require_same_environment({"environment": ENVIRONMENT}, same)
    with pytest.raises(SystemExit, match="another environment"):
        report.require_same_environment(same, {"environment": {**ENVIRONMENT, "strict": {"torch": "3"}}})


def dies(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_costs_its_job_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gap, "tune_job", dies)
    tunings, _, _ = gap.plan(["a"], [2], ["packed", "slot"], [4])
    options = argparse.Namespace(backend="torch", gpus=0, journal=tmp_path / "gap.jsonl")
    told = gap.measure_all(options, Journal(options.journal), tunings, [], end=float("inf"))
    assert told == ["a EP2 slot, the tune: its process died", "a EP2 packed, the tune: its process died"]


@pytest.fixture
def one_core():
    """One core, and so one torch thread a process: threads that wait for each other on busy cores take seconds."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


CONFIG = """{"model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8,
"num_experts_per_tok": 2, "hidden_act": "silu", "torch_dtype": "bfloat16"}"""


def test_a_run_on_the_cpu_measures_all_and_a_second_one_nothing(tmp_path, capsys, one_core):
    config = tmp_path / "config.json"
    config.write_text(CONFIG)
    options = argparse.Namespace(backend="torch", gpus=0, journal=tmp_path / "gap.jsonl")
    tunings, cells, _ = gap.plan([str(config)], [2], ["packed", "allgather"], [4])
    journal = Journal(options.journal)
    assert gap.measure_all(options, journal, tunings, cells, end=0.0) == [
        f"{gap.named(job)}: left for the next run" for job in (*tunings, *cells)
    ]
    assert gap.measure_all(options, journal, tunings, cells, end=float("inf")) == []
    document = gap.result(journal, tunings, cells, [], options)
    assert {found["load"] for found in document["cells"]} == {"packed", "allgather"}
    assert all(found["own_us"] > 0 for found in document["cells"])
    again = Journal(options.journal)
    assert again.lines == journal.lines
    assert gap.measure_all(options, again, tunings, cells, end=float("inf")) == []
    assert len(again.lines) == len(tunings) + len(cells)


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_tune_that_fails_is_reported_and_its_cells_wait(tmp_path, capsys):
    tunings, cells, _ = gap.plan(["no-such-model"], [2], ["packed"], [4])
    options = argparse.Namespace(backend="torch", gpus=0, journal=tmp_path / "gap.jsonl")
    ours = children()
    told = gap.measure_all(options, Journal(options.journal), tunings, cells, end=float("inf"))
    assert not [child for child in children() - ours if "resource_tracker" not in command(child)]
    assert told[0].startswith("no-such-model EP2 packed, the tune: UsageError: Unknown model")
    assert told[1] == "no-such-model EP2 packed, 4 rows: left for the next run"
    assert not options.journal.exists()
