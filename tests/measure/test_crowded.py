"""Memory that other processes hold is waited for, a bounded time, and no tactic is blamed for it."""

from functools import partial

import pytest
from planted_failures import FailingBackend, problem, tactic

from moetune.measure import bench as bench_module
from moetune.measure.bench import Activity, Bench
from moetune.measure.clock import CpuClock
from moetune.measure.crowded import BACKOFF_S, Crowded, held_by_others
from moetune.measure.reasons import CrowdedError, reason_of

GIB = 1 << 30
GOOD, OTHER = tactic("default"), tactic("other")
REASON = "not run: tried 5 times, memory was lacking while other processes held 60.0 of 80.0 GiB"


class Tenant:
    """Another process that holds `held` GiB of 80 until `until_s` of a planted clock."""

    def __init__(self, held=60.0, until_s=float("inf")):
        self.held, self.until_s, self.now_s, self.waits, self.tries = held, until_s, 0.0, [], 0

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now_s += seconds

    def holds(self, device="cuda"):
        return (int(self.held * GIB) if self.now_s < self.until_s else 0, 80 * GIB)

    def attempt(self):
        self.tries += 1
        if self.now_s < self.until_s:
            raise RuntimeError("CUDA out of memory. Tried to allocate 30.00 GiB")
        return "done"

    def crowded(self, lost=False):
        return Crowded(self.holds, lambda: lost, lambda: None, self.sleep)


def test_what_others_free_in_time_is_used():
    tenant = Tenant(until_s=3.0)
    assert tenant.crowded().tried(tenant.attempt) == "done"
    assert tenant.waits == [1.0, 2.0], "each wait is longer than the last"


def test_after_the_last_wait_the_reason_says_who_holds_the_memory_and_nothing_waits_again():
    tenant = Tenant()
    crowded = tenant.crowded()
    with pytest.raises(CrowdedError) as raised:
        crowded.tried(tenant.attempt)
    assert reason_of(raised.value) == REASON
    assert (tuple(tenant.waits), tenant.tries) == (BACKOFF_S, 5)
    with pytest.raises(CrowdedError, match="tried once"):
        crowded.tried(tenant.attempt)
    assert tuple(tenant.waits) == BACKOFF_S


@pytest.mark.parametrize(("held", "lost"), [(1.5, False), (60.0, True)], ids=["no tenant", "lost device"])
def test_without_another_tenant_the_error_is_the_tactics_own(held, lost):
    tenant = Tenant(held)
    with pytest.raises(RuntimeError, match="out of memory"):
        tenant.crowded(lost).tried(tenant.attempt)
    assert tenant.waits == []


@pytest.mark.parametrize(("size", "waits"), [("81.00 GiB", 0), ("79.50 GiB", 4), ("900.00 MiB", 4)])
def test_more_than_the_whole_device_has_is_the_tactics_own_fault(size, waits):
    tenant = Tenant()

    def asks():
        raise RuntimeError(f"CUDA out of memory. Tried to allocate {size}. GPU 0 has a total capacity of 80.00 GiB")

    with pytest.raises(CrowdedError if waits else RuntimeError):
        tenant.crowded().tried(asks)
    assert len(tenant.waits) == waits


def test_other_errors_are_not_tried_again():
    def fails():
        raise ValueError("planted")

    tenant = Tenant()
    with pytest.raises(ValueError, match="planted"):
        tenant.crowded().tried(fails)
    assert tenant.waits == []


def test_a_cpu_has_no_tenants_to_wait_for():
    assert held_by_others("cpu") is None


class Cramped(CpuClock):
    """Has no memory to run `hungry` until the tenant has gone, alone or beside others."""

    def __init__(self, tenant):
        super().__init__()
        self._tenant = tenant

    def warm_up(self, call, draw):
        if call.args[0] == tactic("hungry"):
            self._tenant.attempt()
        super().warm_up(call, draw)


class Recorder:
    def __init__(self):
        self.waits, self.reasons = [], {}

    def starts(self, activity, tactic=None, runs=1):
        if activity == Activity.WAIT:
            self.waits.append(tactic)

    def failed(self, tactic, reason):
        self.reasons[tactic] = reason


@pytest.mark.parametrize("until_s", [7.0, float("inf")], ids=["in time", "too late"])
def test_a_bench_waits_for_a_tenant_and_then_goes_on(monkeypatch, until_s):
    tenant, recorder = Tenant(until_s=until_s), Recorder()
    monkeypatch.setattr(bench_module, "held_by_others", tenant.holds)
    monkeypatch.setattr(bench_module, "Crowded", partial(Crowded, sleep_s=tenant.sleep))
    bench = Bench(FailingBackend(), problem(), Cramped(tenant), recorder)
    good, hungry, other = bench.samples([GOOD, tactic("hungry"), OTHER], [0, 1])
    assert (len(good), len(other)) == (2, 2)
    if until_s == 7.0:
        assert (len(hungry), bench.failures, tenant.waits) == (2, {}, [1.0, 2.0, 4.0])
    else:
        assert hungry is None
        assert bench.failures == recorder.reasons == {tactic("hungry"): REASON}
    assert set(recorder.waits) == {None}, "no tactic runs during a wait"


def test_a_problem_is_prepared_once_a_tenant_has_gone(monkeypatch):
    class Waiting(FailingBackend):
        def prepare(self, problem):
            tenant.attempt()
            return super().prepare(problem)

    tenant = Tenant(until_s=2.0)
    monkeypatch.setattr(bench_module, "held_by_others", tenant.holds)
    monkeypatch.setattr(bench_module, "Crowded", partial(Crowded, sleep_s=tenant.sleep))
    bench = Bench(Waiting(), problem())
    assert len(bench.samples([GOOD], [0])[0]) == 1
    assert tenant.waits == [1.0, 2.0]
