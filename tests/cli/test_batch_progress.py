"""What `moetune batch` says on stderr while it works."""

import io

import pytest
from choices import make_choice
from rich.console import Console

from moetune.cli import batch_progress
from moetune.cli.batch_progress import BatchProgress
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.tuning.batch import Batch, BatchJob, BatchQuestion
from moetune.tuning.events import BucketChosen, BucketFailed, BucketStarted, NoisyBucket, NotSaved

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)


def planned(*missing, devices=("cuda:0", "cuda:1"), estimated_wall_s=0.0):
    questions = [
        BatchQuestion(number=number, layer=LAYER, regime=Regime(), backend="triton", missing_buckets=buckets)
        for number, buckets in enumerate(missing, 1)
    ]
    return Batch(
        file="jobs.yaml",
        devices=devices,
        dry_run=True,
        jobs=(BatchJob(number=1, words=()),),
        questions=questions,
        estimated_s=0.0,
        estimated_wall_s=estimated_wall_s,
    )


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(batch_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_question_has_a_line_at_its_beginning_and_at_its_end(capsys, clock):
    batch = planned(2, 2)
    with BatchProgress(batch) as progress:
        progress.start(1, "cuda:1")
        progress.event(1, BucketStarted(4, 0, 2, 5, {}))
        clock[0] = 30.0
        progress.event(1, BucketChosen(make_choice(4), 0, 2))
        clock[0] = 60.0
        progress.event(1, BucketChosen(make_choice(8), 1, 2))
        tuned = {"state": "tuned", "tuned_buckets": 2, "gain": 1.25, "seconds": 60.0}
        progress.answer(batch.questions[0].model_copy(update=tuned))
        progress.start(2, "cuda:0")
        failed = {"state": "failed", "failed": "out of memory"}
        progress.answer(batch.questions[1].model_copy(update=failed))
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] small ep1-tp1-nodp-none-random by triton on cuda:1",
        "[1/2] 2 buckets tuned, 1.25×, 60 s · about 60 s left",
        "[2/2] small ep1-tp1-nodp-none-random by triton on cuda:0",
        "[2/2] failed: out of memory · done",
    ]


def test_what_a_reader_must_know_is_said_with_the_question(capsys):
    with BatchProgress(planned(2, devices=("cpu",))) as progress:
        progress.start(1, "cpu")
        progress.event(1, BucketFailed(4, "The default failed."))
        progress.event(1, NoisyBucket(8, 0.2, 1))
        progress.event(1, NotSaved(8, "The disk is full."))
    assert capsys.readouterr().err.splitlines() == [
        "[1/1] small ep1-tp1-nodp-none-random by triton",
        "[1/1] 4 rows: no result. The default failed.",
        "[1/1] 8 rows: A/A noise of 20 %",
        "warning: [1/1] The disk is full.",
    ]


def test_the_time_left_is_the_recorded_one_until_there_are_buckets(clock):
    with BatchProgress(planned(2, 2, estimated_wall_s=1200.0)) as progress:
        assert progress.left == "about 20 min left"
        clock[0] = 10.0
        progress.event(1, BucketChosen(make_choice(4), 0, 4))  # the ladder has added two
        assert progress.left == "about 50 s left"
    assert BatchProgress(planned(2)).left == "estimating"
    assert BatchProgress(planned(0)).left == "done"


def test_an_interrupt_says_how_to_go_on(capsys):
    progress = BatchProgress(planned(2))
    progress.event(1, BucketChosen(make_choice(4), 0, 2))
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert said == "Buckets that were finished are saved: 1. Run the same command again to go on.\n"


@pytest.mark.parametrize(
    ("devices", "where"), [(("cuda",), "question 1 of 2"), (("cuda:0", "cuda:1"), "0 of 2 questions on 2 devices")]
)
def test_a_terminal_has_a_bar_below_the_lines(monkeypatch, devices, where):
    text = io.StringIO()
    terminal = Console(file=text, force_terminal=True, highlight=False, width=100)
    monkeypatch.setattr(batch_progress, "console", lambda stderr: terminal)
    with BatchProgress(planned(2, 2, devices=devices)) as progress:
        progress.start(1, devices[0])
        progress.note("cuda:7 is lost.")
        progress.event(1, BucketChosen(make_choice(4), 0, 2))
        progress._bar.refresh()
    shown = text.getvalue()
    assert "[1/2] small ep1-tp1-nodp-none-random by triton" in shown
    assert ("on cuda:0" in shown) == (len(devices) > 1)
    assert "note: cuda:7 is lost." in shown
    assert where in shown
    assert "1/4" in shown
