import io
from typing import get_args

import pytest
from choices import make_choice
from rich.console import Console

from moetune.cli.output import patience
from moetune.cli.progress import Progress
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice
from moetune.tuning.events import BucketChosen, BucketStarted, DefaultDiffers, Event, NoisyBucket, TacticMeasured

GAINED = {"gain": 1.25, "gain_low": 1.2, "gain_high": 1.3}
TACTIC = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


@pytest.mark.parametrize(
    ("default", "said"),
    [
        (TACTIC, "[1/2] 8 rows: 51.2 µs, the default, by 16×64×128 group=1 warps=4 stages=3 · about"),
        (
            {**TACTIC, "num_warps": 8},
            "[1/2] 8 rows: 51.2 µs, 1.25× the default, by 16×64×128 group=1 warps=4 stages=3 · ",
        ),
    ],
)
def test_a_finished_bucket_is_a_line_where_no_terminal_shows_a_bar(default, said, capsys):
    choice = Choice(
        rows=8,
        tactic=TACTIC,
        time_us=51.2,
        default_tactic=default,
        default_time_us=51.2 if default == TACTIC else 64.0,
        **({"gain": 1.0, "gain_low": 1.0, "gain_high": 1.0} if default == TACTIC else GAINED),
        noise=0.01,
        tried=6,
        candidates=6,
        load=(1,),
        max_load=1,
        measured_at="2026-01-31T12:00:00Z",
    )
    with Progress() as progress:
        progress(BucketStarted(8, 0, 2, 6, {}))
        progress(BucketChosen(choice, 0, 2))
    assert capsys.readouterr().err.startswith(said)


def test_a_tactic_that_failed_is_named_shortly(capsys):
    with Progress() as progress:
        progress(BucketStarted(8, 0, 1, 6, {}))
        progress(TacticMeasured(8, Tactic(TACTIC), None, "out of shared memory"))
    assert capsys.readouterr().err == "8 rows: 16×64×128 group=1 warps=4 stages=3 failed: out of shared memory\n"


def test_a_default_that_no_engine_runs_is_a_warning(capsys):
    with Progress() as progress:
        progress(DefaultDiffers(8, "vLLM runs something else."))
    assert capsys.readouterr().err == "warning: vLLM runs something else.\n"


def test_a_bucket_that_is_too_noisy_is_named_and_what_happens_next(capsys):
    with Progress() as progress:
        progress(NoisyBucket(8, 0.234, 2))
        progress(NoisyBucket(8, 0.3, 0))
    assert capsys.readouterr().err.splitlines() == [
        "8 rows: A/A noise of 23 % is too much to decide, compared again after the other buckets",
        "8 rows: A/A noise of 30 % is too much to decide, so the default is kept",
    ]


def test_the_time_left_is_the_mean_of_the_finished_buckets(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 30.0])
    monkeypatch.setattr("moetune.cli.progress.time.monotonic", lambda: next(clock))
    chosen = make_choice(8)
    with Progress() as progress:
        for index in (0, 1):
            progress(BucketStarted(8, index, 4, 6, {}))
            progress(BucketChosen(chosen, index, 4))
    assert [line.rpartition(" · ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "about 30 s left",
        "about 30 s left",
    ]


def test_a_terminal_shows_the_finished_buckets_too(monkeypatch):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr("moetune.cli.progress.console", lambda stderr: terminal)
    with Progress() as progress:
        progress(BucketStarted(8, 0, 2, 6, {}))
        progress(BucketChosen(make_choice(8), 0, 2))
    assert "[1/2] 8 rows: " in written.getvalue()


def test_every_event_has_a_method():
    methods = vars(Progress)["_show"].dispatcher
    assert set(get_args(Event)) == set(methods.registry) - {object}
    with pytest.raises(TypeError, match="does not show str"):
        Progress()("no event")


def test_a_wait_is_announced_only_if_it_is_long(capsys, monkeypatch):
    class Timer:
        def __init__(self, seconds, act):
            self.seconds, self.act, self.cancelled = seconds, act, False
            timers.append(self)

        def start(self):
            pass

        def cancel(self):
            self.cancelled = True

    timers = []
    monkeypatch.setattr("moetune.cli.output.threading.Timer", Timer)
    with patience("Simulating ..."):
        assert timers[0].seconds == 2.0
        assert capsys.readouterr().err == ""
        timers[0].act()
        assert capsys.readouterr().err == "Simulating ...\n"
    assert timers[0].cancelled
