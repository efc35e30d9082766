"""A tactic may fail in any way; the others are measured, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from planted_failures import FailingBackend, problem, tactic
from processes import GIVE_UP_S, children, eventually, is_running

from moetune.backends.base import Problem
from moetune.backends.plain_torch.backend import TorchBackend
from moetune.errors import NoResultError, UnsupportedError
from moetune.measure.bench import Activity
from moetune.measure.worker import RETRIES, Timeouts, Worker, open_benches
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

TIMEOUTS = Timeouts(prepare_s=300, first_run_s=300, timing_s=300, run_s=0.25)
GOOD, OTHER = tactic("default"), tactic("other")
HANGS_AT_ONCE, HANGS_LATER = tactic("spins"), tactic("spins", from_run=2)


class HangClock:
    """Real time, but while a tactic hangs, each look finds it `STEP_S` later than the look before."""

    STEP_S = 200.0
    HANGS = ((Activity.FIRST_RUN, HANGS_AT_ONCE), (Activity.TIMING, HANGS_LATER))

    def __init__(self):
        self.worker, self.hung_s = None, Counter()

    def __call__(self):
        status = self.worker._child.channel.noted()
        if (status.activity, status.tactic) not in self.HANGS:
            return time.monotonic()
        self.hung_s[status.tactic] += self.STEP_S
        return status.since + self.hung_s[status.tactic]


@pytest.fixture(scope="module")
def other_processes():
    """Child processes that are not the worker's."""
    return children()


@pytest.fixture(scope="module")
def hang_clock():
    return HangClock()


@pytest.fixture(scope="module")
def worker(other_processes, hang_clock):
    backend = FailingBackend(
        bad_rows={5: "segfaults", 6: "raises", 7: "is unsupported"}, bad_reference_rows={8: "exits", 9: "raises"}
    )
    with Worker(backend, "cpu", timeouts=TIMEOUTS, now_s=hang_clock) as hang_clock.worker:
        yield hang_clock.worker
    assert children() == other_processes


@pytest.fixture
def bench(worker):
    return worker.bench(problem())


def test_whatever_a_tactic_does_costs_that_tactic_and_nothing_else(bench, hang_clock, capfd):
    reasons = {
        tactic("raises"): "RuntimeError: planted failure",
        tactic("exhausts memory"): "out of memory: MemoryError: 200 GiB",
        HANGS_AT_ONCE: "hung: not finished within 300 s during its first run",
        tactic("segfaults"): "killed by SIGSEGV during its first run, twice",
        tactic("exits"): "the process exited with status 3: free(): invalid pointer during its first run, twice",
        tactic("is killed"): "killed by SIGKILL, as the system does when memory runs out during its first run, twice",
        tactic("loses the device"): "RuntimeError: CUDA error: an illegal memory access was encountered",
        tactic("segfaults", from_run=3): "killed by SIGSEGV during its timing, twice",
        HANGS_LATER: "hung: not finished within 300.25 s during its timing",
        tactic("raises", from_run=4): "RuntimeError: planted failure",
    }
    silent = tactic("prints")
    tactics = [GOOD, *reasons, silent, OTHER, GOOD]
    series = bench.samples(tactics, [0, 1, 0])
    assert bench.failures == reasons
    assert hang_clock.hung_s == dict.fromkeys([HANGS_AT_ONCE, HANGS_LATER], 400)  # not stopped at 200 s
    for timed, samples in zip(tactics, series, strict=True):
        assert (samples is None) == (timed in reasons)
        assert samples is None or (len(samples) == 3 and min(samples) >= 1000)
    assert series[0] != series[-1]
    assert capfd.readouterr() == ("", "")
    assert bench.samples([tactic("segfaults")], [0]) == [None]


def test_a_hang_is_found_in_real_time():
    with Worker(FailingBackend(), "cpu", timeouts=Timeouts(first_run_s=0.2)) as worker:
        bench = worker.bench(problem())
        begin = time.monotonic()
        assert bench.samples([HANGS_AT_ONCE], [0]) == [None]
        assert time.monotonic() - begin > 0.2
    assert bench.failures == {HANGS_AT_ONCE: "hung: not finished within 0.2 s during its first run"}


def test_a_wrong_result_is_found_and_a_right_one_passes(bench):
    assert bench.check(GOOD, 0)
    assert not bench.check(tactic("zeros"), 0)
    assert bench.failures == {tactic("zeros"): "wrong result: relative error 1.0e+00, allowed 1e-02"}


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("segfaults", "killed by SIGSEGV during its check, twice"),
        ("raises", "RuntimeError: planted failure"),
        ("loses the device", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_tactic_that_fails_in_its_check_is_not_right(bench, way, reason):
    assert not bench.check(tactic(way), 0)
    assert bench.failures == {tactic(way): reason}
    assert bench.check(GOOD, 0)


@pytest.mark.slow
def test_without_a_reference_no_tactic_fails(worker):
    for rows, said in (
        (8, "reference computation, 4 times in a row: the process exited with status 3"),
        (9, "planted failure"),
    ):
        bench = worker.bench(problem(rows))
        with pytest.raises(NoResultError, match=said) as error:
            bench.check(GOOD, 0)
        assert "No tactic caused this" in error.value.hint
        assert bench.failures == {}
        assert bench.samples([GOOD], [0]) != [None]


def test_a_problem_that_cannot_be_prepared_is_an_error_and_the_next_one_works(worker):
    with pytest.raises(
        NoResultError, match=r"5 rows of tiny on cpu failed during the preparation, 4 times in a row: killed by SIGSEGV"
    ):
        worker.bench(problem(5))
    with pytest.raises(NoResultError, match="RuntimeError: planted failure"):
        worker.bench(problem(6))
    with pytest.raises(UnsupportedError) as error:
        worker.bench(problem(7))
    assert (error.value.message, error.value.hint) == ("No such rows.", "Ask for others.")
    assert worker.bench(problem(4)).check(GOOD, 0)


def test_an_earlier_bench_still_answers_and_keeps_its_failures(worker):
    first, second = worker.bench(problem(1)), worker.bench(problem(2))
    assert first.samples([tactic("raises"), GOOD], [0])[0] is None
    assert second.check(GOOD, 0)
    assert first.check(GOOD, 0)
    assert first.failures.keys() == {tactic("raises")}
    assert second.failures == {}


def test_a_process_killed_from_outside_between_requests_is_replaced(bench, other_processes):
    (pid,) = children() - other_processes
    os.kill(pid, signal.SIGKILL)
    assert bench.samples([GOOD], [0]) != [None]
    assert bench.failures == {}
    assert children() - other_processes != {pid}


@pytest.fixture
def killed_worker(tmp_path):
    """Starts a worker whose processes are killed as planted, and returns the bench."""
    with ExitStack() as stack:

        def start(killed):
            backend = FailingBackend(killed=killed, folder=str(tmp_path))
            return stack.enter_context(Worker(backend, "cpu", timeouts=TIMEOUTS)).bench(problem())

        yield start


def test_tactics_that_are_killed_from_outside_once_are_measured(killed_worker):
    at_once, later = tactic("a"), tactic("b", from_run=3)
    bench = killed_worker({"prepare": 1, at_once: 1, later: 1})
    series = bench.samples([GOOD, at_once, later, GOOD], [0, 1, 0])
    assert [len(samples) for samples in series] == [3, 3, 3, 3]
    assert bench.failures == {}


@pytest.mark.slow
def test_a_check_and_its_reference_that_are_killed_from_outside_are_done_again(killed_worker):
    bench = killed_worker({"reference": 2, OTHER: 1, tactic("zeros"): 1})
    assert bench.check(OTHER, 0)
    assert not bench.check(tactic("zeros"), 0)
    assert bench.failures == {tactic("zeros"): "wrong result: relative error 1.0e+00, allowed 1e-02"}


def test_a_tactic_that_ran_alone_after_a_kill_may_be_killed_again_later(killed_worker):
    bench = killed_worker({tactic("a"): 1})
    assert bench.samples([GOOD, tactic("a")], [0]) != [None, None]
    os.kill(bench.worker._child.pid, signal.SIGKILL)
    bench._ended(tactic("a"), "killed by SIGKILL during its timing", hung=False)
    assert None not in bench.samples([GOOD, tactic("a")], [0])
    assert bench.failures == {}


def test_processes_that_die_again_and_again_are_an_error_that_blames_no_tactic(killed_worker):
    with pytest.raises(NoResultError, match="during the preparation, 4 times in a row: killed by SIGKILL"):
        killed_worker({"prepare": RETRIES + 1})
    assert killed_worker({"prepare": RETRIES}).samples([GOOD], [0]) != [None]


def test_a_tactic_that_dies_in_two_ways_fails_with_both(killed_worker):
    exits = tactic("exits", from_run=2)
    bench = killed_worker({exits: 1})
    bench._ended(exits, "killed by SIGKILL, as the system does when memory runs out during its check", hung=False)
    assert bench.samples([exits, GOOD], [0])[0] is None
    assert bench.failures[exits].startswith("killed by SIGKILL, as the system does when memory runs out during its")
    assert "; tried again: the process exited with status 3" in bench.failures[exits]


def test_a_hang_after_a_death_is_no_second_chance(bench):
    bench._ended(OTHER, "killed by SIGKILL during its timing", hung=False)
    assert bench.failures == {}
    bench._ended(OTHER, "hung: not finished within 1 s during its timing", hung=True)
    said = "killed by SIGKILL during its timing; tried again: hung: not finished within 1 s during its timing"
    assert bench.failures == {OTHER: said}


def test_a_tactic_that_dies_beside_others_alone_is_not_tried_for_ever(killed_worker):
    social = tactic("dies beside others")
    bench = killed_worker({})
    assert [bool(samples) for samples in bench.samples([GOOD, social], [0])] == [True, False]
    assert bench.failures == {social: "killed by SIGSEGV during its timing beside others, 4 times"}


def test_nothing_to_time_needs_no_request(bench):
    assert bench.samples([], [0]) == []


def test_after_an_interrupt_the_next_answer_is_to_the_next_request(worker, bench, other_processes):
    slow, noted = tactic("spins", from_run=3), worker._child.channel.noted

    def interrupt():
        if eventually(lambda: noted().activity is Activity.TIMING):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        bench.samples([slow], [0, 0])
    thread.join()
    assert children() == other_processes
    assert bench.check(OTHER, 0) is True
    assert bench.failures == {}


@pytest.mark.parametrize(("activity", "runs", "limit_s"), [(Activity.PREPARE, 1, 5), (Activity.FIRST_RUN, 1, 2)])
def test_time_outs_do_not_depend_on_runs_where_there_is_one(activity, runs, limit_s):
    assert Timeouts(5, 2, 3, 0.5).limit_s(activity, runs) == limit_s


def test_a_batch_may_take_longer_the_more_runs_it_has():
    assert Timeouts(5, 2, 3, 0.5).limit_s(Activity.TIMING, 48) == 27


SCRIPT = """
    from planted_failures import FailingBackend, problem, tactic
    from moetune.measure.worker import Worker

    print("script", flush=True)
    with Worker(FailingBackend(), "cpu") as worker:  # no guard: a spawned process would run this again
        bench = worker.bench(problem())
        print("measuring", flush=True)
        bench.samples([tactic("spins")], [0])
"""


@pytest.mark.parametrize("deadly", [signal.SIGINT, signal.SIGKILL])
def test_a_worker_does_not_outlive_its_parent(deadly, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as script:
        assert script.stdout.readline() == "script\n"
        assert script.stdout.readline() == "measuring\n"
        (worker,) = children(script.pid)
        os.killpg(script.pid, deadly)  # as a terminal's Ctrl-C does
        out, err = script.communicate(timeout=GIVE_UP_S)
    assert out == ""
    assert script.returncode == -deadly
    assert ("KeyboardInterrupt" in err) == (deadly == signal.SIGINT)
    assert eventually(lambda: not is_running(worker))


def test_ctrl_c_alone_does_not_end_the_worker(bench, other_processes):
    (pid,) = children() - other_processes
    os.kill(pid, signal.SIGINT)
    assert bench.check(GOOD, 0)
    assert children() - other_processes == {pid}


@dataclass
class LoadingBackend(FailingBackend):
    """Writes a file as its modules are loaded, and cannot be prepared before it has."""

    def load(self):
        Path(self.folder, "loaded").touch()

    def prepare(self, problem):
        assert Path(self.folder, "loaded").exists()
        return super().prepare(problem)


def test_the_process_loads_its_modules_before_it_has_a_problem(tmp_path):
    with Worker(LoadingBackend(folder=str(tmp_path)), "cpu") as worker:
        assert eventually((tmp_path / "loaded").exists)
        assert worker.bench(problem()).check(GOOD, 0)


def test_a_real_backend_is_measured_and_checked_in_a_worker():
    layer = MoELayer(num_experts=8, top_k=2, hidden_size=16, intermediate_size=8, precision="fp32")
    regime = Regime(ep_size=2, attention_dp=True)
    routings = tuple(realize(layer, regime, 4, draw=draw) for draw in range(2))
    backend = TorchBackend()
    tactics = backend.candidates(layer, regime, 4, "cpu").tactics
    with Worker(backend, "cpu") as worker:
        bench = worker.bench(Problem(layer, regime, 4, regime.shard(layer), as_draws(routings)))
        assert all(samples and min(samples) > 0 for samples in bench.samples(tactics, [0, 1]))
        assert all(bench.check(tactic, 1) for tactic in tactics)
    assert bench.failures == {}


def test_what_was_timed_without_a_graph_is_known_here_too():
    uncaptured = tactic("cannot be captured")
    with Worker(FailingBackend(), "cpu", timeouts=TIMEOUTS) as worker:
        bench = worker.bench(problem())
        bench.samples([uncaptured, GOOD], [0])
        assert bench.eager == {uncaptured: "it synchronizes"}
        assert bench.failures == {}


@dataclass
class LoggingBackend(FailingBackend):
    """Writes a line into `log` for each run of a tactic."""

    log: str = ""
    once: bool = False

    @property
    def warms_once(self):
        return self.once

    def prepare(self, problem):
        return LoggingRunner(self.log)


@dataclass
class LoggingRunner:
    log: str

    def run(self, tactic, draw=0):
        with open(self.log, "a") as log:
            log.write(f"{tactic['name']}\n")


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("once", [True, False])
def test_a_tactic_has_its_first_run_once_in_a_process_if_the_backend_warms_once(tmp_path, isolate, once):
    log = tmp_path / "runs"
    runs = []
    with open_benches(LoggingBackend(log=str(log), once=once), "cpu", isolate) as bench_of:
        for rows in (4, 8):
            log.write_text("")
            bench_of(problem(rows)).samples([GOOD], [0])
            runs.append(len(log.read_text().split()))
    assert runs[0] - runs[1] == once


def test_a_tactic_that_hangs_is_stopped_by_what_the_best_needs_and_tried_once_more():
    clock = HangClock()
    with Worker(FailingBackend(), "cpu", now_s=clock) as clock.worker:
        bench = clock.worker.bench(problem())
        hung, good = bench.samples([HANGS_LATER, GOOD], [0, 0], 1e5)
    assert (hung, len(good)) == (None, 2)
    reason = "stopped: not finished within 10.1 s, which allows one run 20 times the best so far during its timing"
    assert bench.failures == {HANGS_LATER: f"{reason}, twice"}
