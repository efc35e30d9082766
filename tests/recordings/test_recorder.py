from __future__ import annotations

import subprocess
import sys
import threading

import numpy
import pytest
import torch
from processes import GIVE_UP_S
from recording_files import tokens
from torch.utils._python_dispatch import TorchDispatchMode

import moetune
from moetune.errors import UsageError
from moetune.recordings.reading import read_recording


def test_what_is_recorded_is_read_again(tmp_path):
    path = tmp_path / "new" / "traffic.npz"
    with moetune.record(path) as recorder:
        recorder.add(7, tokens(30, seed=1))
        recorder.add(3, tokens(20, seed=2).to(torch.int64))
        recorder.add(7, tokens(10, seed=3))
        recorder.add(7, tokens(1)[:0])
    assert recorder.seen == 60
    assert torch.equal(read_recording(path, 7).ids, torch.cat([tokens(30, seed=1), tokens(10, seed=3)]))
    found = read_recording(path)
    assert (found.layers, len(found.ids), found.left_out) == (2, 60, 20)
    with numpy.load(path, allow_pickle=False) as arrays:
        assert arrays["layers"].tolist() == [3, 7]
        assert arrays["topk_ids"].shape == (2, 40, 4)
        assert arrays["topk_ids"].dtype == numpy.int32


def test_the_sample_is_bounded_and_uniform(tmp_path):
    """Each of 5,000 tokens, which come in batches of many sizes, is kept with a chance of 100 / 5,000."""
    kept = torch.zeros(5_000)
    sizes = [1] * 50 + [3, 40, 7, 200] * 6 + [3_450]
    assert sum(sizes) == 5_000
    for seed in range(120):
        path = tmp_path / "a.npz"
        with moetune.record(path, tokens=100, every_s=None, seed=seed) as recorder:
            start = 0
            for size in sizes:
                recorder.add(0, torch.arange(start, start + size).unsqueeze(1) + torch.tensor([0, 10_000]))
                start += size
        ids = read_recording(path).ids
        assert ids.shape == (100, 2)
        kept[ids[:, 0].long()] += 1
    of_tenth = kept.view(10, -1).sum(1)  # 120 · 100 / 10, with a deviation of about 33
    assert of_tenth.tolist() == pytest.approx([1_200] * 10, abs=170)
    first = kept[:100].sum()  # the tokens that filled the sample: 120 · 100 · 100 / 5,000
    assert float(first) == pytest.approx(240, abs=75)


def test_the_same_seed_keeps_the_same_tokens(tmp_path):
    digests = set()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with moetune.record(tmp_path / f"{name}.npz", tokens=20, seed=seed) as recorder:
            for batch in range(10):
                recorder.add(0, tokens(50, seed=batch))
        digests.add(read_recording(tmp_path / f"{name}.npz").digest)
    assert len(digests) == 2


def test_only_tokens_that_enter_the_sample_are_copied(tmp_path, monkeypatch):
    copied = []
    real = torch.Tensor.to

    def to(self, *given, **named):
        if given[:1] == ("cpu",):
            copied.append(len(self))
        return real(self, *given, **named)

    with moetune.record(tmp_path / "a.npz", tokens=64, every_s=None) as recorder:
        monkeypatch.setattr(torch.Tensor, "to", to)
        for batch in range(200):
            recorder.add(0, tokens(64, seed=batch))
        monkeypatch.undo()
    assert sum(copied) < 64 * (1 + 5.3) * 1.5  # the harmonic series: 64 · (1 + ln 200)
    assert copied[0] == 64


def test_a_process_that_is_killed_leaves_what_was_saved(tmp_path):
    code = (
        "import os, sys, time, torch, moetune\n"
        "recorder = moetune.record(sys.argv[1], every_s=0.05)\n"
        "recorder.add(0, torch.tensor([[1, 2]]))\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "a.npz"
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=GIVE_UP_S).returncode == -9
    assert read_recording(path).ids.tolist() == [[1, 2]]


def test_many_threads_can_add_while_the_file_is_written(tmp_path):
    recorder = moetune.record(tmp_path / "a.npz", tokens=50, every_s=0.001)

    def work(layer):
        for batch in range(40):
            recorder.add(layer, tokens(20, seed=batch))

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    assert recorder.seen == 4 * 40 * 20
    assert read_recording(tmp_path / "a.npz").ids.shape == (200, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_nothing_recorded_writes_nothing(tmp_path):
    with moetune.record(tmp_path / "a.npz"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "named", "message"),
    [
        ("a.pt", {}, "A recording is written as .npz"),
        ("a.npz", {"tokens": 0}, "must be positive"),
        ("a.npz", {"every_s": 0.0}, "must be positive"),
        ("file/a.npz", {}, "cannot be written"),
    ],
)
def test_what_cannot_be_recorded_is_an_error_at_once(path, named, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=message):
        moetune.record(tmp_path / path, **named)


def test_ids_of_another_form_are_an_error(tmp_path):
    with moetune.record(tmp_path / "a.npz") as recorder:
        recorder.add(0, tokens(4))
        for ids, message in (
            (torch.ones(3, 2), "integers"),
            (torch.ones(3, dtype=torch.int32), r"\[tokens, k\]"),
            (torch.ones(3, 2, dtype=torch.int32), "All layers have top-4, given 2"),
        ):
            with pytest.raises(UsageError, match=message):
                recorder.add(1, ids)


class Ops(TorchDispatchMode):
    """Notes the number of elements of each op's new tensor, in a list for each call of `next`."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def next(self):
        self.elements.append([])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        is_new = isinstance(result, torch.Tensor) and not (args and result is args[0])
        self.elements[-1].append(result.numel() if is_new else 0)
        return result


def test_adding_costs_little_once_the_sample_is_full(tmp_path):
    """Few ops, none of more elements than there are tokens. The sample has more."""
    recorder = moetune.record(tmp_path / "a.npz", tokens=512, every_s=None)
    recorder.add(0, tokens(1).expand(500_000, -1))
    batch = tokens(256)
    with Ops() as ops:
        for _ in range(20):
            ops.next()
            recorder.add(0, batch)
    assert all(max(each) <= 256 for each in ops.elements)
    assert 0 < sorted(map(len, ops.elements))[10] <= 12
